"""Apps and service accounts that connect by themselves; Apple's and Shopify's ways."""

from __future__ import annotations

import asyncio
import hmac
import json
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Annotated, Any
from urllib.parse import urlencode

import jwt
import pytest
from conftest import call, says
from cryptography.hazmat.primitives import serialization as coding
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from langchain.agents import create_agent
from langchain_core.tools import tool
from row_flow import SECRET, EverywhereClock, Flow
from row_server import RowServer, ec_key, pem, rsa_key, shopify_hmac
from support import KEYS, connect, deliver, link, outcome_of, query_of, state, token

from langchain_pocket_auth import (
    AuthContext,
    AuthorizationRequired,
    Client,
    ConfigurationError,
    InjectedAuth,
    MissingClient,
    PocketAuth,
    Provider,
    ProviderUnavailable,
)
from langchain_pocket_auth._catalog import Catalog
from langchain_pocket_auth._rows import JWT_BEARER
from langchain_pocket_auth.testing import (
    AuthorizationServer,
    Browser,
    LeakWatch,
    ScriptedModel,
    assert_no_leak,
)

CATALOG = Catalog()
ROBOT, GOOGLE = "robot@acme.iam.example.com", "google_service_account"
HOUR_S = 3600
MakePocket = Callable[..., PocketAuth]


@cache
def key(kind: str) -> str:
    """Return what is no private key of the robot, in one way."""
    if kind in BITS:
        return pem(rsa.generate_private_key(65537, BITS[kind]))
    if kind == "encrypted":
        how = coding.BestAvailableEncryption(b"passphrase")
        kinds = (coding.Encoding.PEM, coding.PrivateFormat.PKCS8)
        return rsa_key().private_bytes(*kinds, how).decode()
    return {
        "curve": pem(ec.generate_private_key(ec.SECP384R1())),
        "public": public(rsa_key()),
        "unsound": made_up(2048),
        "huge": made_up(16384),  # its check would stop the event loop for a minute
        "cut": pem(rsa_key())[:900],
        "text": "a-secret-that-is-no-key-at-all",
    }[kind]


BITS = {"short": 1024, "other": 2048}


def made_up(bits: int) -> str:
    """Return an RSA key in PEM whose factors are no primes."""
    p, q, e = 2 ** (bits // 2) - 3, 2 ** (bits // 2) - 9, 65537
    d = pow(e, -1, (p - 1) * (q - 1))
    known = rsa.RSAPublicNumbers(e, p * q)
    parts = (p, q, d, d % (p - 1), d % (q - 1), pow(q, -1, p))
    return pem(
        rsa.RSAPrivateNumbers(*parts, known).private_key(
            unsafe_skip_rsa_key_validation=True
        )
    )


def public(private: Any) -> str:
    """Return the public half of a key in PEM."""
    kinds = (coding.Encoding.PEM, coding.PublicFormat.SubjectPublicKeyInfo)
    return private.public_key().public_bytes(*kinds).decode()


def inside(secret: str) -> str:
    """Return what to look for: a line from the middle of a key."""
    lines = secret.strip().splitlines()
    return lines[len(lines) // 2]


WRONG = {
    "short": "has 1024 bits",
    "huge": "has 16384 bits",
    "unsound": "is no private key in PEM",
    "curve": "is no RSA key",
    "encrypted": "is encrypted",
    "public": "is no private key in PEM",
    "cut": "is no private key in PEM",
    "text": "is no private key in PEM",
}


@pytest.fixture(scope="module")
def rows() -> Iterator[RowServer]:
    """A server that demands what rows say."""
    with RowServer() as running:
        yield running


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, server: AuthorizationServer) -> Any:
    """The time of the package and of the server."""
    made = EverywhereClock(monkeypatch)
    server.clock = lambda: made.now(UTC).timestamp()
    return made


# ---------------------------------------------------------------- client credentials

APP, APP_SECRET = "clipper", "s3cret-of-clipper"


@pytest.fixture
def clipper(server: AuthorizationServer) -> Provider:
    """A provider that knows apps only."""
    server.register(
        client_id=APP,
        client_secret=APP_SECRET,
        scopes=["clips", "pins"],
        grant_types=["client_credentials"],
    )
    return Provider(
        id="clipper",
        token_endpoint=server.token_endpoint,
        grant_types_supported=("client_credentials",),
        required_scopes=("clips", "offline_access"),
    )


def clipping(make_pocket: MakePocket, row: Provider, **client: Any) -> PocketAuth:
    """Return a pocket of the app."""
    facts = {"client_id": APP, "client_secret": APP_SECRET} | client
    return make_pocket(providers=[row], clients={row.id: Client(**facts)})


async def test_app_connects_itself(
    server: AuthorizationServer, make_pocket: MakePocket, clipper: Provider
) -> None:
    """Nobody is asked, and all conversations share the app's one token."""
    pocket, who = clipping(make_pocket, clipper), {"provider": "clipper"}
    request = pocket.make_request([], auth_provider="clipper")
    assert await pocket.prepare(request, auth_provider="clipper") is None
    assert await state(pocket, **who) == "DO_REFRESH"
    threads = [f"thread-{n % 3}" for n in range(9)]
    every = [token(pocket, **who, thread_id=thread) for thread in threads]
    [access_token] = {auth.access_token for auth in await asyncio.gather(*every)}
    assert await state(pocket, **who, thread_id="a fourth") == "SKIP_AUTH"
    assert server.issued_access_tokens == [access_token]
    assert server.token_requests == {"client_credentials": 1}
    auth = await token(pocket, **who)
    assert auth.headers() == {"Authorization": f"Bearer {access_token}"}
    assert auth.to_dict() == {"CLIPPER_TOKEN": access_token}
    # A refresh token, which `offline_access` asks for, does not exist here.
    assert auth.scopes == ["clips"]


def test_agent_of_an_app_does_not_pause(
    server: AuthorizationServer, make_pocket: MakePocket, clipper: Provider
) -> None:
    """A tool of the app's own account runs at once."""

    @tool
    def clip(
        auth: Annotated[AuthContext, InjectedAuth("clipper", scopes=["pins"])],
    ) -> str:
        """Clip something."""
        return ",".join(auth.scopes or ())

    agent = create_agent(
        ScriptedModel(script=[says(call("clip")), says()]),
        [clip],
        middleware=[clipping(make_pocket, clipper).middleware()],
    )
    result = agent.invoke({"messages": [("user", "go")]})
    [answer] = [m.text for m in result["messages"] if m.type == "tool"]
    assert "__interrupt__" not in result
    assert set(answer.split(",")) == {"clips", "pins"}
    assert server.denials == server.authorizations == 0


async def test_another_token_follows_one_that_is_over(
    server: AuthorizationServer, make_pocket: MakePocket, clipper: Provider, clock: Any
) -> None:
    """There is no refresh token: the app asks again."""
    pocket = clipping(make_pocket, clipper)
    first = await token(pocket, provider="clipper")
    clock.forward(HOUR_S + 1)
    second = await token(pocket, provider="clipper")
    assert [first.access_token, second.access_token] == server.issued_access_tokens
    assert server.issued_refresh_tokens == []


async def test_wider_token_is_made_without_a_person(
    server: AuthorizationServer, make_pocket: MakePocket, clipper: Provider
) -> None:
    """A tool that needs more gets it; the tools before do, too."""
    pocket = clipping(make_pocket, clipper)
    await token(pocket, "clips", provider="clipper")
    wider = await token(pocket, "pins", provider="clipper")
    again = await token(pocket, "clips", provider="clipper")
    assert set(wider.scopes or ()) == {"clips", "pins"}
    assert again.access_token == wider.access_token
    assert len(server.issued_access_tokens) == 2


@pytest.mark.parametrize(
    ("client", "scopes", "told"),
    [
        ({"client_secret": "wr0ng-secret-of-clipper"}, [], "does not accept the app"),
        ({"client_id": "somebody-else"}, [], "does not accept the app"),
        ({}, ["everything"], "invalid_scope"),
    ],
)
async def test_refused_app_is_the_developers_to_repair(
    make_pocket: MakePocket,
    clipper: Provider,
    client: dict[str, str],
    scopes: list[str],
    told: str,
) -> None:
    """There is no person to ask, so the error names what to look at, and no secret."""
    pocket = clipping(make_pocket, clipper, **client)
    with LeakWatch() as watch, pytest.raises(ConfigurationError, match=told) as refused:
        await token(pocket, *scopes, provider="clipper")
    assert "clipper" in str(refused.value)
    watch.assert_clean([client.get("client_secret", APP_SECRET)], refused.value)


async def test_app_waits_for_a_server_that_is_away(
    server: AuthorizationServer,
    make_pocket: MakePocket,
    clipper: Provider,
    clock: Any,
) -> None:
    """An outage is no refusal: it is left alone for a moment, then asked again."""
    pocket = clipping(make_pocket, clipper)
    server.fault(503, times=1, retry_after=20)
    for _ in range(3):
        with pytest.raises(ProviderUnavailable):
            await token(pocket, provider="clipper")
    assert server.fired["503"] == 1
    assert not server.token_requests
    clock.forward(21)
    assert (await token(pocket, provider="clipper")).access_token


@pytest.mark.parametrize("missing", ["client_id", "client_secret"])
async def test_app_without_id_or_secret_is_told_the_settings(
    make_pocket: MakePocket, clipper: Provider, missing: str
) -> None:
    """Only confidential clients may do this (RFC 6749 section 4.4)."""
    facts = {"client_id": APP, "client_secret": APP_SECRET}
    del facts[missing]
    # Neither a public client nor one that registers itself will do.
    odd = {"token_endpoint_auth_method": "none", "registration_endpoint": "https://x"}
    row = clipper.model_copy(update=odd)
    pocket = make_pocket(providers=[row], clients={"clipper": Client(**facts)})
    with pytest.raises(MissingClient, match="CLIENTS__CLIPPER__CLIENT_SECRET"):
        await state(pocket, provider="clipper")


async def test_app_without_a_host_is_told_the_setting(make_pocket: MakePocket) -> None:
    """Where Marketo is, nobody but the app knows."""
    client = Client(client_id=APP, client_secret=APP_SECRET)
    pocket = make_pocket(clients={"marketo": client})
    with pytest.raises(ConfigurationError, match="CLIENTS__MARKETO__IDENTITY_HOST"):
        await state(pocket, provider="marketo")


@pytest.mark.parametrize(
    ("people", "granted"), [(False, {"clips", "pins"}), (True, {"clips"})]
)
async def test_scopes_recommended_for_people_are_not_the_apps(
    server: AuthorizationServer,
    make_pocket: MakePocket,
    clipper: Provider,
    people: bool,
    granted: set[str],
) -> None:
    """A row that serves both recommends what a person's account needs."""
    update: dict[str, Any] = {"recommended_scopes": ("pins", "offline_access")}
    if people:
        update["authorization_endpoint"] = server.authorization_endpoint
    pocket = clipping(make_pocket, clipper.model_copy(update=update))
    handler = {"auth_handler_name": "clipper-client-credentials"}
    request = pocket.make_request(**handler)
    auth = await pocket.authenticate(request, timeout=0, **handler)
    assert set(auth.scopes or ()) == granted


async def test_app_has_no_page(make_pocket: MakePocket, clipper: Provider) -> None:
    """Whoever asks the handler for a person's page learns that there is none."""
    pocket = clipping(make_pocket, clipper)
    handler = pocket.find_handler_instance("clipper-client-credentials")
    with pytest.raises(ConfigurationError, match="no page"):
        await handler.prepare(handler.make_request(), "1", "default", "uid")  # type: ignore[misc]


async def test_secret_in_a_query_is_not_logged(rows: RowServer) -> None:
    """Marketo takes the app's secret in the URL, which no log shows."""
    async with Flow(rows, CATALOG.get("marketo"), "client_credentials") as flow:
        with LeakWatch() as watch:
            auth = await flow.auth()
        assert flow.case.complaints == []
        assert any("marketo" in text or "127.0.0.1" in text for text in watch.collected)
        watch.assert_clean([SECRET, auth.access_token], auth)


# ------------------------------------------------------------------- service accounts


def google(server: AuthorizationServer) -> Provider:
    """Return Google's row, for a server that knows the robot."""
    knows(server, rsa_key())
    facts = CATALOG.get(GOOGLE).model_dump(exclude_unset=True)
    return Provider(**facts | {"token_endpoint": server.token_endpoint})


def knows(server: AuthorizationServer, private: Any) -> None:
    """Let the server know the robot by this key."""
    server.register(
        client_id=ROBOT,
        public_key=public(private),
        scopes=["drive", "mail", "calendar"],
        grant_types=[JWT_BEARER],
    )


def typed(**changes: str) -> dict[str, str]:
    """Return what a person types about the robot."""
    fields = {"client_email": ROBOT, "private_key": pem(rsa_key()), "scopes": "drive"}
    return fields | changes


async def test_typed_key_makes_tokens(
    server: AuthorizationServer, make_pocket: MakePocket
) -> None:
    """The API is called with a token; the key serves to make it (RFC 7523)."""
    pocket = make_pocket(providers=[google(server)])
    person = Browser(fields=typed(subject="ann@example.com"))
    auth = await connect(pocket, person, "mail", provider=GOOGLE)
    [access_token] = server.issued_access_tokens
    assert auth.headers() == {"Authorization": f"Bearer {access_token}"}
    assert auth.expires_at is not None
    assert set(auth.scopes or ()) == {"mail", "drive"}, "the tool's and the field's"
    answer = await deliver(f"{server.api}/me", headers=auth.headers())
    assert answer.json()["sub"] == "ann@example.com"
    assert auth.to_dict() == {
        "GOOGLE_CLIENT_EMAIL": ROBOT,
        "GOOGLE_PRIVATE_KEY": pem(rsa_key()).strip(),
        "GOOGLE_SCOPES": "drive",
        "GOOGLE_SUBJECT": "ann@example.com",
    }


async def test_key_in_the_settings_needs_no_person(
    server: AuthorizationServer, make_pocket: MakePocket
) -> None:
    """The app's own service account; the key may have its line ends escaped."""
    escaped = typed(private_key=pem(rsa_key()).replace("\n", "\\n"))
    row = google(server)
    pocket = make_pocket(providers=[row], clients={GOOGLE: Client(**escaped)})
    request = pocket.make_request([], auth_provider=GOOGLE)
    assert await pocket.prepare(request, auth_provider=GOOGLE) is None
    auth = await token(pocket, provider=GOOGLE, thread_id="a")
    other = await token(pocket, provider=GOOGLE, thread_id="b")
    assert {auth.access_token, other.access_token} == {*server.issued_access_tokens}
    wider = await token(pocket, "calendar", provider=GOOGLE)
    assert set(wider.scopes or ()) == {"drive", "calendar"}


@pytest.mark.parametrize("unattended", [False, True], ids=["typed", "settings"])
async def test_next_token_is_signed_anew(
    server: AuthorizationServer, make_pocket: MakePocket, clock: Any, unattended: bool
) -> None:
    """A token that is over is replaced without the person."""
    clients = {GOOGLE: Client(**typed())} if unattended else {}
    pocket = make_pocket(providers=[google(server)], clients=clients)
    if not unattended:
        await connect(pocket, Browser(fields=typed()), "mail", provider=GOOGLE)
    first = await token(pocket, "mail", provider=GOOGLE)
    clock.forward(HOUR_S + 1)
    second = await token(pocket, "mail", provider=GOOGLE)
    assert [first.access_token, second.access_token] == server.issued_access_tokens
    assert second.scopes == first.scopes
    assert second.to_dict() == first.to_dict()


async def test_key_that_replaced_another_in_the_settings_is_used(
    server: AuthorizationServer, make_pocket: MakePocket, clock: Any, tmp_path: Path
) -> None:
    """The session of the key before is not waited for: it could not be renewed."""
    row, store = google(server), f"sqlite:///{tmp_path / 'sessions.db'}"
    before = make_pocket(
        store, keys=KEYS, providers=[row], clients={GOOGLE: Client(**typed())}
    )
    await token(before, provider=GOOGLE)
    await before.aclose()
    knows(server, coding.load_pem_private_key(key("other").encode(), None))
    clock.forward(HOUR_S + 1)
    rotated = {GOOGLE: Client(**typed(private_key=key("other")))}
    after = make_pocket(store, keys=KEYS, providers=[row], clients=rotated)
    auth = await token(after, provider=GOOGLE)
    assert auth.access_token == server.issued_access_tokens[1]
    assert auth.to_dict()["GOOGLE_PRIVATE_KEY"] == key("other").strip()


async def test_key_that_was_withdrawn_is_asked_for_again(
    server: AuthorizationServer, make_pocket: MakePocket, clock: Any
) -> None:
    """A person who typed a key that is no good any more types another."""
    pocket = make_pocket(providers=[google(server)])
    await connect(pocket, Browser(fields=typed()), provider=GOOGLE)
    new = coding.load_pem_private_key(key("other").encode(), None)
    knows(server, new)
    clock.forward(HOUR_S + 1)
    with pytest.raises(AuthorizationRequired):
        await token(pocket, provider=GOOGLE)
    renewed = Browser(fields=typed(private_key=key("other")))
    assert (await connect(pocket, renewed, provider=GOOGLE)).access_token


async def test_refused_key_of_the_settings_is_the_developers_to_repair(
    server: AuthorizationServer, make_pocket: MakePocket, clock: Any
) -> None:
    """The error names the setting, at first and when a key was withdrawn."""
    row, setting = google(server), "CLIENTS__GOOGLE_SERVICE_ACCOUNT__PRIVATE_KEY"
    wrong = Client(**typed(private_key=key("other")))
    pocket = make_pocket(providers=[row], clients={GOOGLE: wrong})
    with pytest.raises(ConfigurationError, match=setting):
        await token(pocket, provider=GOOGLE)
    right = make_pocket(providers=[row], clients={GOOGLE: Client(**typed())})
    await token(right, provider=GOOGLE)
    clock.forward(HOUR_S + 1)
    server.clients.pop(ROBOT)
    with pytest.raises(ConfigurationError, match=setting) as refused:
        await token(right, provider=GOOGLE)
    assert_no_leak([inside(pem(rsa_key()))], refused.value)


@pytest.mark.parametrize(("kind", "told"), WRONG.items(), ids=WRONG)
async def test_wrong_key_is_told_and_not_echoed(
    server: AuthorizationServer, make_pocket: MakePocket, kind: str, told: str
) -> None:
    """The form says what is wrong with a key, and shows nothing of it."""
    pocket, secret = make_pocket(providers=[google(server)]), key(kind)
    url = await link(pocket, provider=GOOGLE)
    with LeakWatch() as watch:
        page = Browser(fields=typed(private_key=secret)).visit(url)
    assert page.status_code == 422
    assert "Private key (PEM)" in page.text
    assert told in page.text
    watch.assert_clean([inside(secret)], page.text, str(page.headers))
    assert server.token_errors == {}
    assert (await connect(pocket, Browser(fields=typed()), provider=GOOGLE)).scopes


@pytest.mark.parametrize(("kind", "told"), WRONG.items(), ids=WRONG)
async def test_wrong_key_of_the_settings_is_named_and_not_shown(
    server: AuthorizationServer, make_pocket: MakePocket, kind: str, told: str
) -> None:
    """It is found before anything is sent."""
    client, row = Client(**typed(private_key=key(kind))), google(server)
    pocket = make_pocket(providers=[row], clients={GOOGLE: client})
    with pytest.raises(ConfigurationError, match=told) as refused:
        await state(pocket, provider=GOOGLE)
    assert "CLIENTS__GOOGLE_SERVICE_ACCOUNT__PRIVATE_KEY" in str(refused.value)
    assert_no_leak([inside(key(kind))], refused.value, pocket)


@pytest.mark.parametrize(
    "wrong",
    [
        {"client_email": "nobody@acme.iam.example.com"},
        {"private_key": "other"},
        {"scopes": "everything"},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
async def test_account_that_the_provider_refuses_is_not_connected(
    server: AuthorizationServer, make_pocket: MakePocket, wrong: dict[str, str]
) -> None:
    """The person sees that it failed, and can open the link again."""
    pocket = make_pocket(providers=[google(server)])
    fields = typed(**wrong)
    if fields["private_key"] == "other":
        fields["private_key"] = key("other")
    url = await link(pocket, provider=GOOGLE)
    with LeakWatch() as watch:
        page = Browser(fields=fields).visit(url)
    assert outcome_of(page) == "failed"
    watch.assert_clean([inside(fields["private_key"])], page.text)
    assert server.issued_access_tokens == []
    again = Browser(fields=typed()).visit(url)
    assert outcome_of(again) == "connected"


async def test_key_and_token_show_nowhere(
    server: AuthorizationServer, make_pocket: MakePocket, clock: Any
) -> None:
    """Neither contexts, logs, pages nor errors show a key or what it made."""
    seen: list[Any] = []
    with LeakWatch() as watch:
        pocket = make_pocket(providers=[google(server)])
        auth = await connect(pocket, Browser(fields=typed()), provider=GOOGLE)
        seen += [auth, auth.model_dump(), dict(auth), auth.model_dump_json(), pocket]
        clock.forward(HOUR_S + 1)
        server.fault(500, times=5)
        with pytest.raises(ProviderUnavailable) as away:
            await token(pocket, provider=GOOGLE)
        seen += [away.value]
        server.clear_faults()
        server.clients.pop(ROBOT)
        clock.forward(60)
        with pytest.raises(AuthorizationRequired) as gone:
            await token(pocket, provider=GOOGLE)
        seen += [gone.value]
    secrets = [inside(pem(rsa_key())), *server.issued_access_tokens]
    watch.assert_clean(secrets, *seen)


# ------------------------------------------------------------------------ GitHub Apps


class GitHub:
    """What makes tokens for installations of an app, as GitHub does."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.assertions: list[str] = []
        self.paths: list[str] = []
        self.tokens: list[str] = []
        self.refusal: tuple[int, dict[str, str]] | None = None

    def answer(self, path: str, headers: Any) -> tuple[int, dict[str, str], Any]:
        """Return status, headers and body."""
        scheme, _, assertion = headers["Authorization"].partition(" ")
        self.assertions.append(assertion)
        self.paths.append(path)
        if self.refusal:
            return *self.refusal, {"message": "Not Found"}
        by_hand = {"verify_exp": False, "verify_iat": False}
        claims = jwt.decode(
            assertion, public(rsa_key()), ["RS256"], issuer="12345", options=by_hand
        )
        now = self.now()
        right = (
            path == "/app/installations/7890/access_tokens"
            and headers["Accept"] == "application/vnd.github+json"
            and scheme == "Bearer"
            and claims["iat"] <= now - 59  # so that a fast clock is no reason
            and 0 < claims["exp"] - now <= 600
        )
        if not right:
            return 401, {}, {"message": "A JSON web token could not be decoded"}
        self.tokens.append(f"ghs_token-number-{len(self.tokens)}")
        until = f"{datetime.fromtimestamp(now + HOUR_S, UTC):%Y-%m-%dT%H:%M:%SZ}"
        return 201, {}, {"token": self.tokens[-1], "expires_at": until}


@contextmanager
def serving(github: GitHub) -> Iterator[str]:
    """Serve it on a free port; give its origin."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            status, headers, body = github.answer(self.path, self.headers)
            content = json.dumps(body).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = Thread(target=http.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join(5)


@pytest.fixture
def github(clock: Any) -> Iterator[tuple[GitHub, Provider]]:
    """GitHub, and the row of one who uses it here."""
    made = GitHub(lambda: clock.now(UTC).timestamp())
    with serving(made) as origin:
        row = CATALOG.get("github_app")
        endpoint = (row.token_endpoint or "").replace("https://api.github.com", origin)
        facts = row.model_dump(exclude_unset=True) | {"token_endpoint": endpoint}
        yield made, Provider(**facts)


def installation(**changes: str) -> dict[str, str]:
    """Return what a person types about an installation."""
    fields = {"app_id": "12345", "installation_id": "7890"}
    return fields | {"private_key": pem(rsa_key())} | changes


@pytest.mark.parametrize("unattended", [False, True], ids=["typed", "settings"])
async def test_installation_of_an_app_gets_tokens(
    github: tuple[GitHub, Provider],
    make_pocket: MakePocket,
    clock: Any,
    unattended: bool,
) -> None:
    """Each lives an hour, and is made with a JWT of its own."""
    made, row = github
    clients = {row.id: Client(**installation())} if unattended else {}
    pocket = make_pocket(providers=[row], clients=clients)
    with LeakWatch() as watch:
        if not unattended:
            person = Browser(fields=installation())
            await connect(pocket, person, provider=row.id)
        first = await token(pocket, provider=row.id)
        clock.forward(HOUR_S + 1)
        second = await token(pocket, provider=row.id)
    assert [first.access_token, second.access_token] == made.tokens
    assert len({*made.assertions}) == 2
    assert second.headers() == {"Authorization": f"Bearer {made.tokens[1]}"}
    assert second.to_dict() == {
        "GITHUB_APP_ID": "12345",
        "GITHUB_APP_INSTALLATION_ID": "7890",
        "GITHUB_APP_PRIVATE_KEY": pem(rsa_key()).strip(),
    }
    watch.assert_clean([*made.tokens, *made.assertions, inside(pem(rsa_key()))], second)


async def test_installation_that_was_removed_is_asked_for_again(
    github: tuple[GitHub, Provider], make_pocket: MakePocket, clock: Any
) -> None:
    """GitHub does not know it any more (404)."""
    made, row = github
    pocket = make_pocket(providers=[row])
    await connect(pocket, Browser(fields=installation()), provider=row.id)
    made.refusal = (404, {})
    clock.forward(HOUR_S + 1)
    with pytest.raises(AuthorizationRequired):
        await token(pocket, provider=row.id)


async def test_limited_rate_keeps_the_installation(
    github: tuple[GitHub, Provider], make_pocket: MakePocket, clock: Any
) -> None:
    """GitHub limits rates with 403, too; nobody has to type anything again."""
    made, row = github
    pocket = make_pocket(providers=[row])
    await connect(pocket, Browser(fields=installation()), provider=row.id)
    made.refusal = (403, {"Retry-After": "40"})
    clock.forward(HOUR_S + 1)
    with pytest.raises(ProviderUnavailable) as limited:
        await token(pocket, provider=row.id)
    assert limited.value.retry_after_s == 40
    made.refusal = None
    clock.forward(41)
    assert (await token(pocket, provider=row.id)).access_token == made.tokens[1]


async def test_installation_id_stays_a_part_of_the_path(
    github: tuple[GitHub, Provider], make_pocket: MakePocket
) -> None:
    """What is typed cannot lead the app's JWT to another endpoint."""
    made, row = github
    pocket = make_pocket(providers=[row])
    url = await link(pocket, provider=row.id)
    sly = installation(installation_id="7890/../7890/access_tokens?x=")
    page = await Browser(fields=sly).avisit(url)
    assert page.status_code == 422
    assert made.assertions == []
    lax = row.model_dump(exclude_unset=True)
    del lax["keypair"]["fields"]["installation_id"]["pattern"]
    pocket = make_pocket(providers=[Provider(**lax)])
    page = await Browser(fields=sly).avisit(await link(pocket, provider=row.id))
    assert outcome_of(page) == "failed"
    [path] = made.paths
    assert path.startswith("/app/installations/7890%2F..%2F7890%2F")


# -------------------------------------------------------------------------- Snowflake


@pytest.mark.parametrize(
    ("account", "name"),
    [
        ("acme-eu1", "ACME-EU1"),
        ("xy12345.us-east-1.aws", "XY12345"),
        ("acme-eu1.global", "ACME"),
    ],
)
async def test_snowflake_takes_what_is_signed(
    make_pocket: MakePocket, clock: Any, account: str, name: str
) -> None:
    """The JWT is the token: of the account without its region, for an hour at most."""
    fields = {"account": account, "user": "ann", "private_key": pem(rsa_key())}
    pocket = make_pocket()
    handler = {"auth_handler_name": "snowflake-keypair", "auth_provider": "snowflake"}
    request = pocket.make_request([], **handler)
    url = await pocket.prepare(request, **handler)
    page = await Browser(fields=fields).avisit(url or "")
    assert outcome_of(page) == "connected"
    first = await pocket.authenticate(request, timeout=0, **handler)
    now = clock.now(UTC).timestamp()
    claims = jwt.decode(first.access_token, public(rsa_key()), ["RS256"])
    der = (coding.Encoding.DER, coding.PublicFormat.SubjectPublicKeyInfo)
    digest = sha256(rsa_key().public_key().public_bytes(*der)).digest()
    assert claims["sub"] == f"{name}.ANN"
    assert claims["iss"] == f"{name}.ANN.SHA256:{b64encode(digest).decode()}"
    assert claims["iat"] <= now < claims["exp"] <= claims["iat"] + HOUR_S
    assert first.expires_at
    assert abs(first.expires_at.timestamp() - claims["exp"]) <= 1
    assert first.headers() == {
        "Authorization": f"Bearer {first.access_token}",
        "X-Snowflake-Authorization-Token-Type": "KEYPAIR_JWT",
    }
    assert first.api_base_url == f"https://{account}.snowflakecomputing.com"
    clock.forward(HOUR_S)
    second = await pocket.authenticate(request, timeout=0, **handler)
    assert second.access_token != first.access_token


# ------------------------------------------------------------------------------ Apple


class AppleFlow(Flow):
    """An app at Apple, some of whose settings are others."""

    def __init__(self, rows: RowServer, **settings: str) -> None:
        self.settings = settings
        super().__init__(rows, CATALOG.get("apple"), "oauth2")

    def _client(self) -> Client:
        return super()._client().model_copy(update=self.settings)


async def test_apple_gets_a_fresh_secret_with_each_request(
    rows: RowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is signed for the app by its key, and is good for five minutes."""
    clock = EverywhereClock(monkeypatch)
    async with AppleFlow(rows) as flow:
        case, sent = flow.case, []
        check = case._apple_secret

        def noted(secret: str, place: str) -> str:
            sent.append(secret)
            return check(secret, place)

        monkeypatch.setattr(case, "_apple_secret", noted)
        with LeakWatch() as watch:
            assert await flow.connect() == "connected"
            auth = await flow.auth()
            clock.forward(case.lifetime_s + 1)
            case.ahead_s += case.lifetime_s + 1
            renewed = await flow.auth()
            assert await flow.disconnect()
        assert case.complaints == []
        assert auth.account == "alice@example.com"
        assert renewed.access_token != auth.access_token
        assert len(sent) == 4, "code, refresh, and both revocations"
        assert len({*sent}) == 3, "one for each occasion"
        for secret in sent:
            assert jwt.get_unverified_header(secret) == {
                "alg": "ES256",
                "kid": "KEY1234567",
                "typ": "JWT",
            }
            claims = jwt.decode(
                secret,
                public(ec_key()),
                ["ES256"],
                issuer="TEAM123456",
                audience=case.local("https://appleid.apple.com"),
                subject=case.client_id,
                options={"verify_iat": False, "verify_exp": False},
            )
            assert 0 < claims["exp"] - claims["iat"] <= 300
        watch.assert_clean([*sent, inside(pem(ec_key()))], auth, renewed)


@pytest.mark.parametrize("missing", ["team_id", "key_id", "private_key"])
async def test_apple_names_the_setting_that_is_missing(
    rows: RowServer, missing: str
) -> None:
    """Before there is any link."""
    async with AppleFlow(rows, **{missing: ""}) as flow:
        with pytest.raises(MissingClient, match=f"CLIENTS__APPLE__{missing.upper()}"):
            await flow.connect()


@pytest.mark.parametrize("kind", ["curve", "other", "encrypted", "text"])
async def test_wrong_key_at_apple_is_named_and_not_shown(
    rows: RowServer, kind: str
) -> None:
    """It is found before there is any link."""
    async with AppleFlow(rows, private_key=key(kind)) as flow:
        with pytest.raises(ConfigurationError, match="APPLE__PRIVATE_KEY") as refused:
            await flow.connect()
    assert_no_leak([inside(key(kind))], refused.value)


async def test_key_at_apple_may_have_its_line_ends_escaped(rows: RowServer) -> None:
    """As environment variables have them."""
    escaped = pem(ec_key()).strip().replace("\n", "\\n")
    async with AppleFlow(rows, private_key=escaped) as flow:
        assert await flow.connect() == "connected"


# ---------------------------------------------------------------------------- Shopify

DAY_S = 24 * HOUR_S


def resigned(query: dict[str, str], secret: str = SECRET) -> dict[str, str]:
    """Return a callback's parameters as Shopify would sign them."""
    return {**query, "hmac": shopify_hmac(query, secret)}


def without(query: dict[str, str], name: str) -> dict[str, str]:
    """Return the parameters without one."""
    return {k: v for k, v in query.items() if k != name}


def older(query: dict[str, str], seconds: int) -> dict[str, str]:
    """Return the parameters as they were some time ago, with their signature."""
    return resigned({**query, "timestamp": str(int(query["timestamp"]) - seconds)})


FORGED: dict[str, tuple[str, Callable[[dict[str, str]], dict[str, str]]]] = {
    "another code": ("mismatch", lambda q: q | {"code": "c0de-of-an-attacker"}),
    "another host": ("mismatch", lambda q: q | {"host": "ZXZpbC5leGFtcGxl"}),
    "one more": ("mismatch", lambda q: q | {"session": "1"}),
    "one hidden": (
        "mismatch",
        lambda q: without(q, "host") | {"code": f"{q['code']}&host={q['host']}"},
    ),
    "no signature": ("mismatch", lambda q: without(q, "hmac")),
    "empty signature": ("mismatch", lambda q: q | {"hmac": ""}),
    "odd signature": ("mismatch", lambda q: q | {"hmac": "\u00e9" * 64}),
    "another's signature": ("mismatch", lambda q: resigned(q, "another-secret")),
    "another shop": (
        "mismatch",
        lambda q: resigned(q | {"shop": "evil.myshopify.com"}),
    ),
    "no shop": ("mismatch", lambda q: resigned(without(q, "shop"))),
    "too old": ("expired", lambda q: older(q, DAY_S + 60)),
    "no time": ("expired", lambda q: resigned(without(q, "timestamp"))),
}


@pytest.mark.parametrize(("outcome", "forge"), FORGED.values(), ids=FORGED)
async def test_callback_that_shopify_did_not_sign_is_refused(
    rows: RowServer, outcome: str, forge: Callable[[dict[str, str]], dict[str, str]]
) -> None:
    """It changes nothing: the person's own answer still connects."""
    async with Flow(rows, CATALOG.get("shopify"), "oauth2") as flow:
        url = await flow.pocket.prepare(flow.request(), **flow.who)
        answer = await asyncio.to_thread(flow.person.authorize, url or "")
        path, query = answer.partition("?")[0], query_of(answer)
        assert resigned(query) == query
        page = await deliver(f"{path}?{urlencode(forge(query))}")
        assert outcome_of(page) == outcome
        assert flow.case.served == ["authorize"], "no code was exchanged"
        assert (await deliver(answer)).status_code == 303
        assert (await flow.auth()).access_token == flow.case.token


async def test_value_with_delimiters_is_signed_with_those_escaped(
    rows: RowServer,
) -> None:
    """As Shopify's own libraries do, so that no value reads as a parameter."""
    async with Flow(rows, CATALOG.get("shopify"), "oauth2") as flow:
        url = await flow.pocket.prepare(flow.request(), **flow.who)
        answer = await asyncio.to_thread(flow.person.authorize, url or "")
        path, query = answer.partition("?")[0], without(query_of(answer), "hmac")
        pairs = [f"{k}={v}" for k, v in query.items()] + ["a%3Db=50%25 %26 more=1"]
        text = "&".join(sorted(pairs)).encode()
        query["a=b"] = "50% & more=1"
        query["hmac"] = hmac.new(SECRET.encode(), text, sha256).hexdigest()
        assert (await deliver(f"{path}?{urlencode(query)}")).status_code == 303


async def test_shopify_may_take_its_time(rows: RowServer) -> None:
    """A callback is good for a day."""
    async with Flow(rows, CATALOG.get("shopify"), "oauth2") as flow:
        url = await flow.pocket.prepare(flow.request(), **flow.who)
        answer = await asyncio.to_thread(flow.person.authorize, url or "")
        late = urlencode(older(query_of(answer), DAY_S - 60))
        page = await deliver(f"{answer.partition('?')[0]}?{late}")
        assert page.status_code == 303
        assert flow.case.served == ["authorize", "token"]
