"""ID tokens: what is believed of them, and all that is not."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import time
import traceback
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any

import jwt
import pytest
import pytest_asyncio
from conftest import call, provider, says
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from graphs import ASYNC, GATES, Work, build, thread
from jwt.algorithms import ECAlgorithm, RSAAlgorithm
from support import (
    BOUND_S,
    Clock,
    asks,
    connect,
    link,
    on,
    outcome_of,
    state,
    token,
    until,
)

from langchain_pocket_auth import (
    AuthContext,
    ConfigurationError,
    PocketAuth,
    ProviderUnavailable,
    TokenRequestError,
    pending_authorizations,
)
from langchain_pocket_auth._http import Http
from langchain_pocket_auth.handlers._openid import Identity, identity_of
from langchain_pocket_auth.testing import (
    AuthorizationServer,
    Browser,
    LeakWatch,
    assert_no_leak,
)
from langchain_pocket_auth.testing._ledger import Grant
from langchain_pocket_auth.testing._openid import id_token, private_key

NONCE = "the-nonce"
SCOPES = ("openid", "email", "profile")
TENANT = "9188040d-6c67-4c5b-b112-36a304b66dad"
NOW_S = int(datetime.now(UTC).timestamp())


@pytest_asyncio.fixture
async def http() -> AsyncIterator[Http]:
    """What talks to the server."""
    client = Http()
    yield client
    await client.close()


def signed(server: AuthorizationServer, **claims: Any) -> str:
    """Return an ID token of alice's, as the server's options make it."""
    # Times are written as if it were still the moment of the import.
    passed_s = int(time.time()) - NOW_S
    for name in claims.keys() & {"exp", "iat", "nbf"}:
        if type(claims[name]) in {int, float} and claims[name] > NOW_S / 2:
            claims[name] += passed_s
    server.id_token_claims = server.id_token_claims | claims
    return id_token(server, Grant("alice", "acme-client", " ".join(SCOPES)), NONCE)


async def believed(
    http: Http, server: AuthorizationServer, token: str, **expected: Any
) -> Identity:
    """Return what a client makes of *token*."""
    facts = {
        "provider": "acme",
        "issuer": server.issuer,
        "client_id": "acme-client",
        "nonce": NONCE,
        "jwks_uri": server.jwks_uri,
        "now": datetime.now(UTC),
    }
    return await identity_of(http, id_token=token, **facts | expected)


async def refusal(
    http: Http, server: AuthorizationServer, token: str, **expected: Any
) -> str:
    """Return why *token* is refused."""
    with pytest.raises(TokenRequestError) as refused:
        await believed(http, server, token, **expected)
    assert (refused.value.code, refused.value.status) == ("invalid_id_token", 200)
    told = "".join(traceback.format_exception(refused.value))
    for secret in (token, token.rpartition(".")[2], "alice", NONCE):
        assert len(secret) < 5 or secret not in told
    return str(refused.value)


def reads(server: AuthorizationServer) -> int:
    """Return how often the keys were fetched."""
    return server.document_reads["/jwks"]


# ------------------------------------------------------------------------- who it is


@pytest.mark.parametrize(
    "algorithm",
    [
        *("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
        *("ES256", "ES384", "ES512", "EdDSA"),
    ],
)
async def test_token_signed_with_the_published_key_is_believed(
    http: Http, server: AuthorizationServer, algorithm: str
) -> None:
    """Every signature that only the provider can make is taken."""
    server.id_token_algorithm = algorithm
    who = await believed(http, server, signed(server))
    assert (who.subject, who.email, who.name) == (
        "alice",
        "alice@users.test",
        "Alice",
    )
    assert who.label == "alice@users.test"


@pytest.mark.parametrize(
    ("claims", "label"),
    [
        ({"email": None, "preferred_username": "al"}, "al"),
        ({"email": None}, "Alice"),
        ({"email": None, "name": None}, "alice"),
        ({"email": 7, "name": ["x"]}, "alice"),
        ({"email_verified": True}, "alice@users.test"),
        ({"email_verified": False}, "Alice"),
        ({"email_verified": "false"}, "Alice"),
        ({"email": "a\u202eb\x00c\nd@users.test "}, "abcd@users.test"),
        ({"email": "\u200b"}, "Alice"),
        ({"email": "x" * 999}, "x" * 255),
    ],
)
async def test_account_is_named_as_its_person_knows_it(
    http: Http, server: AuthorizationServer, claims: dict[str, Any], label: str
) -> None:
    """E-mail if it is verified, else a name, else the subject; never what hides text."""
    assert (await believed(http, server, signed(server, **claims))).label == label


@pytest.mark.parametrize(
    "claims",
    [
        {"aud": ["other", "acme-client"], "azp": "acme-client"},
        {"aud": ["acme-client"]},
        {"azp": "acme-client"},
        {"exp": NOW_S - 30, "iat": NOW_S - 4000},
        {"iat": NOW_S + 30, "nbf": NOW_S + 30},
        {"exp": NOW_S + 60.5},
    ],
)
async def test_unusual_token_that_holds_is_believed(
    http: Http, server: AuthorizationServer, claims: dict[str, Any]
) -> None:
    """Several audiences with our party, and clocks that differ by less than a minute."""
    assert (await believed(http, server, signed(server, **claims))).subject == "alice"


async def test_nonce_is_compared_only_if_one_was_sent(
    http: Http, server: AuthorizationServer
) -> None:
    """An authorization without a nonce, a device's, gets a token without one."""
    token = signed(server, nonce=None)
    assert (await believed(http, server, token, nonce=None)).subject == "alice"
    assert "nonce" in await refusal(http, server, token)


# -------------------------------------------------------------------- what is refused

LIES: dict[str, tuple[dict[str, Any], str]] = {
    "other issuer": ({"iss": "https://evil.test"}, "(iss)"),
    "no issuer": ({"iss": None}, "(iss)"),
    "other audience": ({"aud": "zeta-client"}, "(aud)"),
    "longer audience": ({"aud": "acme-client-2"}, "(aud)"),
    "no audience": ({"aud": None}, "(aud)"),
    "empty audience": ({"aud": []}, "(aud)"),
    "audience object": ({"aud": {"acme-client": 1}}, "(aud)"),
    "two audiences": ({"aud": ["acme-client", "zeta-client"]}, "(azp)"),
    "other party": ({"azp": "zeta-client"}, "(azp)"),
    "other party of two": (
        {"aud": ["acme-client", "zeta-client"], "azp": "zeta-client"},
        "(azp)",
    ),
    "other nonce": ({"nonce": "another"}, "nonce"),
    "no nonce": ({"nonce": None}, "nonce"),
    "number as nonce": ({"nonce": 1}, "nonce"),
    "surrogate as nonce": ({"nonce": "\ud800"}, "nonce"),
    "expired": ({"exp": NOW_S - 61}, "expired"),
    "no expiry": ({"exp": None}, "exp is no time"),
    "endless": ({"exp": float("inf")}, "exp is no time"),
    "not a number": ({"exp": float("nan")}, "exp is no time"),
    "true as expiry": ({"exp": True}, "exp is no time"),
    "text as expiry": ({"exp": str(NOW_S + 60)}, "exp is no time"),
    "from the future": ({"iat": NOW_S + 600}, "(iat)"),
    "no issue time": ({"iat": None}, "iat is no time"),
    "not yet": ({"nbf": NOW_S + 600}, "(nbf)"),
    "no subject": ({"sub": None}, "(sub)"),
    "empty subject": ({"sub": ""}, "(sub)"),
    "number as subject": ({"sub": 1}, "(sub)"),
    "long subject": ({"sub": "x" * 256}, "(sub)"),
    "subject with a line": ({"sub": "x\ny"}, "(sub)"),
    "subject not ASCII": ({"sub": "ålice"}, "(sub)"),
}


@pytest.mark.parametrize("case", LIES)
async def test_token_with_a_wrong_claim_is_refused(
    http: Http, server: AuthorizationServer, case: str
) -> None:
    """The text names the check that failed, and nothing of the token."""
    claims, words = LIES[case]
    assert words in await refusal(http, server, signed(server, **claims))


@pytest.mark.parametrize("issuer", ["{}/", "{}/x", "HTTP{}"])
async def test_issuer_is_compared_exactly(
    http: Http, server: AuthorizationServer, issuer: str
) -> None:
    """Nothing is normalised: a slash more is another issuer."""
    expected = issuer.format(server.issuer).replace("HTTPhttp", "HTTP")
    assert "(iss)" in await refusal(http, server, signed(server), issuer=expected)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("other", "its signature is wrong"),
        ("none", "algorithm"),
        ("hs256", "algorithm"),
    ],
)
async def test_token_that_the_provider_did_not_sign_is_refused(
    http: Http, server: AuthorizationServer, key: Any, words: str
) -> None:
    """Another key, no signature, and the public key as a shared secret prove nothing."""
    server.id_token_key = key
    assert words in await refusal(http, server, signed(server))


async def test_changed_claims_break_the_signature(
    http: Http, server: AuthorizationServer
) -> None:
    """What is signed cannot be changed on the way."""
    header, _, signature = signed(server).split(".")
    claims = {"iss": server.issuer, "sub": "bob", "aud": "acme-client", "nonce": NONCE}
    now_s = int(time.time())
    body = json.dumps(claims | {"iat": now_s, "exp": now_s + 60}).encode()
    forged = base64.urlsafe_b64encode(body).rstrip(b"=").decode()
    told = await refusal(http, server, f"{header}.{forged}.{signature}")
    assert "signature is wrong" in told


def _raw(header: object, payload: object) -> str:
    parts = (json.dumps(part).encode() for part in (header, payload))
    coded = (base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)
    return ".".join([*coded, "c2ln"])


GARBAGE = {
    "nothing": "",
    "words": "no token",
    "dots": "..",
    "not base64": "\u00e4.\u00f6.\u00fc",
    "encrypted": "a.b.c.d.e",
    "list as header": _raw([], {}),
    "list as claims": _raw({"alg": "RS256"}, []),
    "no algorithm": _raw({}, {}),
    "list as algorithm": _raw({"alg": ["RS256"]}, {}),
    "number as key": _raw({"alg": "RS256", "kid": 1}, {}),
    "critical extension": _raw({"alg": "RS256", "crit": ["x"], "x": 1}, {}),
    "deep claims": _raw({"alg": "RS256"}, {}).replace(
        ".", "." + base64.urlsafe_b64encode(b"[" * 100_000).decode() + ".", 1
    ),
}


@pytest.mark.parametrize("case", GARBAGE)
async def test_what_is_no_signed_token_is_refused(
    http: Http, server: AuthorizationServer, case: str
) -> None:
    """Whatever stands there, it is an answer of the provider's, and no crash."""
    assert "acme: the ID token is refused" in await refusal(http, server, GARBAGE[case])
    assert reads(server) == 0


# ------------------------------------------------------------------------------ keys


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let time pass for what is kept."""
    clock = [1000.0]
    monkeypatch.setattr(
        "langchain_pocket_auth.handlers._kept.monotonic", lambda: clock[0]
    )

    def forward(seconds: float) -> None:
        clock[0] += seconds

    return forward


async def test_keys_are_fetched_once_an_hour(
    http: Http, server: AuthorizationServer, later: Callable[[float], None]
) -> None:
    """Ten at once and all within the hour share one request."""
    token = signed(server)
    await asyncio.gather(*(believed(http, server, token) for _ in range(10)))
    later(3599)
    await believed(http, server, token)
    assert reads(server) == 1
    later(2)
    await believed(http, server, token)
    assert reads(server) == 2


async def test_new_key_is_fetched_when_a_token_names_it(
    http: Http, server: AuthorizationServer, later: Callable[[float], None]
) -> None:
    """A rotation is noticed at once; made-up keys cost one request a minute."""
    await believed(http, server, signed(server))
    server.signing_key = "2"
    rotated = signed(server)
    await asyncio.gather(*(believed(http, server, rotated) for _ in range(10)))
    assert reads(server) == 2
    server.signing_key = "made-up"
    made_up = signed(server)
    server.signing_key = "2"
    for _ in range(3):
        told = await refusal(http, server, made_up)
        assert "none of the provider's keys" in told
    assert reads(server) == 2
    later(61)
    for _ in range(3):
        await refusal(http, server, made_up)
    assert reads(server) == 3
    await believed(http, server, rotated)


async def test_wrong_signature_under_a_known_key_fetches_nothing(
    http: Http, server: AuthorizationServer
) -> None:
    """Only a key that is not known makes for another look."""
    server.id_token_key = "other"
    for _ in range(3):
        await refusal(http, server, signed(server))
    assert reads(server) == 1


@pytest.mark.parametrize(
    "fault", ["503", "500", "429", "html200", "empty", "list200", "malformed", "reset"]
)
async def test_keys_that_cannot_be_fetched_are_asked_for_again(
    http: Http, server: AuthorizationServer, fault: str
) -> None:
    """The provider is unavailable, and nothing of that is kept."""
    server.fault(fault, path="/jwks", retry_after=7)
    with pytest.raises(ProviderUnavailable, match="acme") as lost:
        await believed(http, server, signed(server))
    if fault in {"503", "429"}:
        assert lost.value.retry_after_s == 7
    assert (await believed(http, server, signed(server))).subject == "alice"


async def test_failure_to_look_for_a_new_key_is_not_a_forgery(
    http: Http, server: AuthorizationServer
) -> None:
    """Who cannot look whether a key is the provider's says "later", and looks again."""
    await believed(http, server, signed(server))
    server.signing_key = "2"
    server.fault("503", path="/jwks")
    with pytest.raises(ProviderUnavailable):
        await believed(http, server, signed(server))
    assert (await believed(http, server, signed(server))).subject == "alice"


def _short_key() -> dict[str, Any]:
    key = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    return {"key": key, "jwk": RSAAlgorithm.to_jwk(key.public_key(), as_dict=True)}


async def test_short_key_proves_nothing(
    http: Http, server: AuthorizationServer
) -> None:
    """RSA keys have 2048 bits at least (RFC 7518 section 3.3)."""
    made = _short_key()
    right = jwt.decode(signed(server), options={"verify_signature": False})
    with pytest.warns(jwt.InsecureKeyLengthWarning):
        token = jwt.encode(right, made["key"], "RS256", {"kid": "s"})
    keys = [made["jwk"] | {"kid": "s"}]
    server.fault("mutate", path="/jwks", set={"keys": keys})
    assert "signature" in await refusal(http, server, token)


def _changed(**members: Any) -> Callable[[dict[str, Any]], list[Any]]:
    return lambda key: [key | members]


P384 = ec.generate_private_key(ec.SECP384R1())
KEY_SETS: dict[str, Callable[[dict[str, Any]], list[Any]]] = {
    "none": lambda _: [],
    "no objects": lambda _: ["key", None, 7],
    "for encryption": _changed(use="enc"),
    "for another algorithm": _changed(alg="PS256"),
    "another id": _changed(kid="2"),
    "a secret": lambda key: [{"kty": "oct", "k": "c2VjcmV0", "kid": key["kid"]}],
    "half a key": lambda key: [{"kty": "RSA", "kid": key["kid"], "n": key["n"]}],
    "no kind": lambda key: [{"kid": key["kid"]}],
    "odd kind": _changed(kty=["RSA"]),
    "another curve": lambda key: [
        ECAlgorithm.to_jwk(P384.public_key(), as_dict=True) | {"kid": key["kid"]}
    ],
}


@pytest.mark.parametrize("case", KEY_SETS)
async def test_key_that_does_not_fit_proves_nothing(
    http: Http, server: AuthorizationServer, case: str
) -> None:
    """Kind, use, algorithm and id of a key have to be those of the signature."""
    [key] = await _published(http, server)
    server.fault("mutate", path="/jwks", times=2, set={"keys": KEY_SETS[case](key)})
    assert "signature" in await refusal(http, server, signed(server))


async def _published(http: Http, server: AuthorizationServer) -> list[dict[str, Any]]:
    answer = await http.request("GET", server.jwks_uri, provider="acme")
    keys: list[dict[str, Any]] = answer.json()["keys"]
    return keys


async def test_token_without_a_key_id_is_checked_with_each_key(
    http: Http, server: AuthorizationServer
) -> None:
    """Some providers name no key; then all of theirs are tried."""
    keys = []
    for server.signing_key in ("old", "1"):
        [key] = await _published(http, server)
        keys.append({k: v for k, v in key.items() if k != "kid"})
    server.fault("mutate", path="/jwks", times=2, set={"keys": keys})
    right = jwt.decode(signed(server), options={"verify_signature": False})
    token = jwt.encode(right, private_key("1", "RS256"), "RS256")
    assert (await believed(http, server, token)).subject == "alice"
    forged = jwt.encode(right, private_key("other", "RS256"), "RS256")
    assert "none of the provider's keys" in await refusal(http, server, forged)


async def test_keys_are_found_in_the_metadata(
    http: Http, server: AuthorizationServer
) -> None:
    """A row that names no key set gets the issuer's."""
    token = signed(server)
    assert (await believed(http, server, token, jwks_uri=None)).subject == "alice"
    well_known = "/.well-known/oauth-authorization-server"
    assert server.document_reads == {well_known: 1, "/jwks": 1}


async def test_issuer_without_keys_is_a_configuration_error(
    http: Http, server: AuthorizationServer
) -> None:
    """The text says what to give the row."""
    path = "/.well-known/oauth-authorization-server"
    server.fault("mutate", path=path, drop=["jwks_uri"])
    with pytest.raises(ConfigurationError, match="jwks_uri"):
        await believed(http, server, signed(server), jwks_uri=None)


# --------------------------------------------------------------------------- tenants


def _of_tenant(server: AuthorizationServer, **claims: Any) -> str:
    issuer = f"{server.origin}/{TENANT}/v2.0"
    return signed(server, **{"iss": issuer, "tid": TENANT} | claims)


async def test_issuer_of_any_tenant_is_the_tokens_own(
    http: Http, server: AuthorizationServer
) -> None:
    """Microsoft's issuer names the tenant that the token comes from."""
    expected = {"issuer": f"{server.origin}/{{tenantid}}/v2.0"}
    token = _of_tenant(server)
    assert (await believed(http, server, token, **expected)).subject == "alice"


@pytest.mark.parametrize(
    "claims",
    [
        {"tid": None},
        {"tid": "common"},
        {"tid": f"{TENANT}/x"},
        {"tid": [TENANT]},
        {"tid": TENANT.replace("9", "8")},
        {"iss": "https://evil.test/" + TENANT + "/v2.0"},
    ],
)
async def test_tenant_that_does_not_fit_the_issuer_is_refused(
    http: Http, server: AuthorizationServer, claims: dict[str, Any]
) -> None:
    """The tenant is a GUID, and the issuer is of that tenant."""
    issuer = f"{server.origin}/{{tenantid}}/v2.0"
    await refusal(http, server, _of_tenant(server, **claims), issuer=issuer)


@pytest.mark.parametrize(
    ("owner", "holds"), [("{tenantid}", True), (TENANT, True), ("0" * 8, False)]
)
async def test_key_of_one_tenant_signs_for_that_tenant_only(
    http: Http, server: AuthorizationServer, owner: str, holds: bool
) -> None:
    """Microsoft's key set says which key is for whom."""
    [key] = await _published(http, server)
    keys = [key | {"issuer": f"{server.origin}/{owner}/v2.0"}]
    server.fault("mutate", path="/jwks", times=2, set={"keys": keys})
    expected = {"issuer": f"{server.origin}/{{tenantid}}/v2.0"}
    if holds:
        await believed(http, server, _of_tenant(server), **expected)
    else:
        await refusal(http, server, _of_tenant(server), **expected)


# ------------------------------------------------------------------- the whole flow


async def test_account_is_shown_where_connections_are(
    pocket: PocketAuth, server: AuthorizationServer, alice: Browser
) -> None:
    """Lists, and the pause of an upgrade, say whose account is connected."""
    await connect(pocket, alice, *SCOPES)
    [session] = await pocket.list_session_state()
    assert session["account"] == "alice@users.test"
    assert_no_leak([*server.issued_id_tokens, *server.issued_access_tokens], session)
    request = asks(pocket, *SCOPES, "write")
    assert (await pocket.check(request, **on())).name == "DO_AUTH"


@pytest.mark.parametrize("door", GATES)
async def test_pause_of_an_upgrade_names_the_account(
    pocket: PocketAuth, alice: Browser, door: str
) -> None:
    """Who is asked for more sees of which account."""
    await connect(pocket, alice, *SCOPES)
    work = Work(ASYNC)
    tools, script = (
        [work.tool("write", "acme", "write")],
        [says(call("write", text="x"))],
    )
    graph, _ = build(door, pocket, tools, script)
    result = await graph.ainvoke({"messages": [("user", "go")]}, thread())
    [pending] = pending_authorizations(result)
    assert pending.account == "alice@users.test"
    assert "alice@users.test" in str(pending)


async def test_each_attempt_has_a_nonce_of_its_own(
    pocket: PocketAuth, server: AuthorizationServer, alice: Browser
) -> None:
    """256 random bits tie an ID token to its attempt; without openid there is none."""
    for who in ("a", "b"):
        await connect(pocket, alice, *SCOPES, thread_id=who)
    nonces = {
        jwt.decode(token, options={"verify_signature": False})["nonce"]
        for token in server.issued_id_tokens
    }
    assert len(nonces) == 2
    assert all(len(nonce) == 43 for nonce in nonces)
    await connect(pocket, alice, "read", thread_id="c")
    assert len(server.issued_id_tokens) == 2


FLOW_LIES = ["other issuer", "other audience", "other nonce", "no nonce", "expired"]


@pytest.mark.parametrize("case", [*FLOW_LIES, "other", "none", "hs256", "left out"])
async def test_lying_id_token_connects_nobody(
    pocket: PocketAuth, server: AuthorizationServer, alice: Browser, case: str
) -> None:
    """The person sees that it failed, nothing is stored, and the grant is given back."""
    if case in LIES:
        server.id_token_claims = LIES[case][0]
    elif case == "left out":
        server.fault("mutate", drop=["id_token"])
    else:
        server.id_token_key = case  # type: ignore[assignment]
    url = await link(pocket, *SCOPES)
    with LeakWatch() as watch:
        page = await alice.avisit(url)
    assert outcome_of(page) == "failed"
    assert server.token_requests == {"authorization_code": 1}
    assert await pocket.list_session_state() == []
    assert server.revoked_families == 1
    watch.assert_clean([*server.issued_id_tokens, *server.issued_access_tokens])
    # The same link works when the provider does.
    server.id_token_claims, server.id_token_key = {}, "right"
    await connect(pocket, alice, *SCOPES)
    assert await state(pocket, *SCOPES) == "SKIP_AUTH"


async def test_refresh_keeps_the_account(
    pocket: PocketAuth,
    server: AuthorizationServer,
    alice: Browser,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whose account it is does not change with a new access token."""
    await connect(pocket, alice, *SCOPES)
    Clock(monkeypatch).forward(3590)
    context = await token(pocket, *SCOPES)
    assert server.token_requests["refresh_token"] == 1
    assert "alice@users.test" in context.description
    [session] = await pocket.list_session_state()
    assert session["account"] == "alice@users.test"


async def test_keys_that_cannot_be_fetched_connect_nobody_yet(
    pocket: PocketAuth, server: AuthorizationServer, alice: Browser
) -> None:
    """The person is told to come back, and the same link works then."""
    url = await link(pocket, *SCOPES)
    server.fault("503", path="/jwks")
    assert outcome_of(await alice.avisit(url)) == "unavailable"
    assert await pocket.list_session_state() == []
    assert server.revoked_families == 1
    assert outcome_of(await alice.avisit(url)) == "connected"


async def test_app_learns_that_the_issuer_publishes_no_keys(
    pocket: PocketAuth, server: AuthorizationServer, alice: Browser
) -> None:
    """Nobody is connected on an ID token that cannot be checked; the grant goes back."""
    path = "/.well-known/oauth-authorization-server"
    server.fault("mutate", path=path, times=9, drop=["jwks_uri"])
    page = await alice.avisit(await link(pocket, *SCOPES))
    assert outcome_of(page) == "failed"
    assert await pocket.list_session_state() == []
    assert server.revoked_families == 1


async def test_first_problem_is_told_though_the_grant_cannot_be_given_back(
    pocket: PocketAuth, server: AuthorizationServer, alice: Browser
) -> None:
    """An unreachable revocation does not turn a wrong setting into an outage."""
    path = "/.well-known/oauth-authorization-server"
    server.fault("mutate", path=path, times=9, drop=["jwks_uri"])
    server.fault("reset", path="/revoke", times=9)
    page = await alice.avisit(await link(pocket, *SCOPES))
    assert outcome_of(page) == "failed"
    assert server.fired["reset"] > 0


# ------------------------------------------------------------------ without a browser


async def on_a_device(
    pocket: PocketAuth, person: Browser, capsys: pytest.CaptureFixture[str]
) -> AuthContext:
    """Let a person agree with a code that a terminal shows."""
    text = ""

    async def printed() -> bool:
        nonlocal text
        text += capsys.readouterr().out
        return "code " in text

    waiting = pocket.connect("acme", scopes=SCOPES, device=True, timeout=BOUND_S)
    task = asyncio.ensure_future(waiting)
    await until(printed)
    [(url, code)] = re.findall(r"Open (\S+) .*\n.* the code (\S+)", text)
    await asyncio.to_thread(person.approve_device, url, code)
    return await task


@pytest.fixture
def far(make_pocket: Callable[..., PocketAuth], server: AuthorizationServer) -> Any:
    """A pocket whose provider has the device flow."""
    server.device_interval_s = 0.05
    endpoint = server.device_authorization_endpoint
    row = provider(server, "acme", device_authorization_endpoint=endpoint)
    return make_pocket(providers=[row])


async def test_account_of_a_device_is_shown(
    far: PocketAuth, alice: Browser, capsys: pytest.CaptureFixture[str]
) -> None:
    """The ID token that devices get, without a nonce, is checked all the same."""
    await on_a_device(far, alice, capsys)
    [session] = await far.list_session_state()
    assert session["account"] == "alice@users.test"


async def test_lying_id_token_connects_no_device(
    far: PocketAuth,
    server: AuthorizationServer,
    alice: Browser,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nothing is stored, and the grant is given back."""
    server.id_token_key = "other"
    with pytest.raises(TokenRequestError, match="signature"):
        await on_a_device(far, alice, capsys)
    assert await far.list_session_state() == []
    assert server.revoked_families == 1
