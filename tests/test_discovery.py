"""Servers that say of themselves where they are, and take apps that nobody registered."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import AsyncIterator, Callable
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import pytest_asyncio
from conftest import free_port
from pydantic import SecretStr
from support import KEYS, Clock, asks, connect, link, outcome_of, state, token

from langchain_pocket_auth import (
    AuthorizationRequired,
    ConfigurationError,
    PocketAuth,
    Provider,
    ProviderUnavailable,
)
from langchain_pocket_auth._http import Http
from langchain_pocket_auth._row_parts import Variable
from langchain_pocket_auth.handlers._discovery import (
    RegisteredClient,
    ServerMetadata,
    discover,
    register,
    with_metadata,
)
from langchain_pocket_auth.handlers._row import Registration
from langchain_pocket_auth.testing import AuthorizationServer, Browser, assert_no_leak

Make = Callable[..., PocketAuth]
OAUTH = "/.well-known/oauth-authorization-server"
OPENID = "/.well-known/openid-configuration"
CALLBACK = "http://127.0.0.1:8711/auth/found/oauth2/callback"


@pytest_asyncio.fixture
async def http() -> AsyncIterator[Http]:
    """What talks to the server."""
    client = Http()
    yield client
    await client.close()


async def found(http: Http, issuer: str) -> ServerMetadata:
    """Return what the issuer publishes."""
    return await discover(http, issuer, provider="found")


async def problem(http: Http, issuer: str) -> str:
    """Return what the developer is told about an issuer."""
    with pytest.raises(ConfigurationError) as wrong:
        await found(http, issuer)
    return str(wrong.value)


# -------------------------------------------------------------------------- metadata


async def test_metadata_is_what_the_server_publishes(
    http: Http, server: AuthorizationServer
) -> None:
    """Names and values are RFC 8414's."""
    metadata = await found(http, server.issuer)
    published = server.metadata
    for field in fields(metadata):
        value = getattr(metadata, field.name)
        listed = list(value) if isinstance(value, tuple) else value
        assert listed == published.get(field.name), field.name
    assert server.document_reads == {OAUTH: 1}


@pytest.mark.parametrize("issuer_path", ["", "/tenant", "/a/b/"])
@pytest.mark.parametrize("place", [0, 1, 2])
async def test_metadata_is_found_wherever_it_may_be(
    http: Http, issuer_path: str, place: int
) -> None:
    """RFC 8414 puts it before the path; OpenID Connect Discovery after it."""
    with AuthorizationServer(issuer_path=issuer_path) as server:
        path = issuer_path.rstrip("/")
        places = [OAUTH + path, OPENID + path]
        places += [path + OPENID] if path else []
        for earlier in places[:place]:
            server.fault("html200", path=earlier)
        if place >= len(places):
            assert server.issuer in await problem(http, server.issuer)
            return
        metadata = await found(http, server.issuer)
        assert metadata.issuer == server.issuer
        assert metadata.token_endpoint == server.token_endpoint
        assert server.document_reads == {places[place]: 1}


async def test_metadata_is_asked_for_once_an_hour(
    http: Http, server: AuthorizationServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten at once and all within the hour share one request."""
    now = [5.0]
    monkeypatch.setattr(
        "langchain_pocket_auth.handlers._kept.monotonic", lambda: now[0]
    )
    await asyncio.gather(*(found(http, server.issuer) for _ in range(10)))
    now[0] += 3599
    await found(http, server.issuer)
    assert server.document_reads == {OAUTH: 1}
    now[0] += 2
    await found(http, server.issuer)
    assert server.document_reads == {OAUTH: 2}


async def test_each_client_asks_for_itself_and_forgets_the_oldest(
    server: AuthorizationServer,
) -> None:
    """What is kept lives as long as the HTTP client, and has a bound."""
    first, second = Http(), Http()
    await found(first, server.issuer)
    await found(second, server.issuer)
    assert server.document_reads == {OAUTH: 2}
    for number in range(64):
        server.issuer_path = f"/{number}"
        await found(first, server.issuer)
    server.issuer_path = ""
    await found(first, server.issuer)
    assert server.document_reads[OAUTH] == 3
    await first.close()
    await second.close()


def test_another_event_loop_asks_anew(server: AuthorizationServer) -> None:
    """A forked child, or a second `asyncio.run`, does not wait for the first."""
    client = Http()

    async def read() -> None:
        await asyncio.gather(*(found(client, server.issuer) for _ in range(3)))

    asyncio.run(read())
    asyncio.run(read())
    assert server.document_reads == {OAUTH: 2}


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("named", ["https://evil.test", "{}/", "", None, 7, ["{}"]])
async def test_metadata_for_another_issuer_is_not_used(
    http: Http, server: AuthorizationServer, named: Any
) -> None:
    """The issuer in the document has to be the one that was asked for, exactly."""
    named = named.format(server.issuer) if isinstance(named, str) else named
    for path in (OAUTH, OPENID):
        server.fault("mutate", path=path, set={"issuer": named})
    told = await problem(http, server.issuer)
    assert server.issuer in told
    assert repr(str(named)) in told
    assert "token_endpoint" in told
    # Nothing of it was kept.
    assert (await found(http, server.issuer)).issuer == server.issuer


async def test_document_of_the_right_issuer_is_taken_after_a_wrong_one(
    http: Http, server: AuthorizationServer
) -> None:
    """A document that is for another issuer is passed over."""
    server.fault("mutate", path=OAUTH, set={"issuer": "https://evil.test"})
    assert (await found(http, server.issuer)).issuer == server.issuer
    assert server.document_reads == {OAUTH: 1, OPENID: 1}


@pytest.mark.parametrize("fault", ["html200", "list200", "malformed", "redirect"])
async def test_issuer_without_metadata_is_named(
    http: Http, server: AuthorizationServer, fault: str
) -> None:
    """Web pages, lists, half documents and redirects are no metadata."""
    for path in (OAUTH, OPENID):
        server.fault(fault, path=path)
    told = await problem(http, server.issuer)
    assert server.issuer in told
    assert OPENID in told
    assert "authorization_endpoint and token_endpoint" in told


async def test_issuer_whose_path_is_wrong_is_named(
    http: Http, server: AuthorizationServer
) -> None:
    """404 everywhere: the developer reads which addresses were tried."""
    told = await problem(http, f"{server.issuer}/realm")
    assert f"{server.issuer}/realm{OPENID} is none (status 404)" in told


@pytest.mark.parametrize("fault", ["503", "500", "429"])
async def test_busy_server_is_asked_again(
    http: Http, server: AuthorizationServer, fault: str
) -> None:
    """Who says "later" is not told to be wrong."""
    server.fault(fault, path=OAUTH, retry_after=9)
    server.fault("html200", path=OPENID)
    with pytest.raises(ProviderUnavailable, match=server.issuer) as busy:
        await found(http, server.issuer)
    assert busy.value.retry_after_s == (None if fault == "500" else 9)
    assert (await found(http, server.issuer)).issuer == server.issuer


async def test_server_that_does_not_answer_is_unavailable(http: Http) -> None:
    """A server that is down makes no configuration wrong."""
    with pytest.raises(ProviderUnavailable):
        await found(http, f"http://127.0.0.1:{free_port()}")


@pytest.mark.parametrize(
    "issuer",
    [
        "http://acme.test",
        "ftp://acme.test",
        "acme.test",
        "",
        "https://",
        "http://127.0.0.1.evil.test",
        "https://acme.test?tenant=1",
        "https://acme.test#x",
    ],
)
async def test_issuer_is_an_https_address_without_query(
    http: Http, issuer: str
) -> None:
    """Nothing is asked over plain http, but of this machine."""
    assert "found: the issuer" in await problem(http, issuer)


@pytest.mark.parametrize(
    "name",
    [
        "authorization_endpoint",
        "token_endpoint",
        "revocation_endpoint",
        "device_authorization_endpoint",
        "registration_endpoint",
        "jwks_uri",
    ],
)
@pytest.mark.parametrize(
    "url",
    [
        "http://acme.test/x",
        "http://169.254.169.254/latest",
        "http://[::ffff:127.0.0.1]/x",
        "javascript:alert(1)",
        "file:///etc/passwd",
        "//acme.test/x",
        "https://",
        "http://[",
        7,
    ],
)
async def test_endpoint_that_secrets_may_not_go_to_is_refused(
    http: Http, server: AuthorizationServer, name: str, url: Any
) -> None:
    """Endpoints are https; the text says which is not."""
    server.fault("mutate", path=OAUTH, set={name: url})
    told = await problem(http, server.issuer)
    assert name in told
    assert server.issuer in told


class Elsewhere(Http):
    """A client that finds a public server on this machine."""

    def __init__(self, server: AuthorizationServer) -> None:
        super().__init__()
        self.server = server

    async def request(self, method: str, url: str, **kwargs: Any) -> Any:
        local = url.replace("https://acme.test", self.server.origin)
        return await super().request(method, local, **kwargs)


@pytest.mark.parametrize("host", ["http://127.0.0.1:8711", "https://localhost"])
async def test_public_server_does_not_lead_to_this_machine(
    server: AuthorizationServer, host: str
) -> None:
    """What is published for everybody names nothing on the reader's machine."""
    http = Elsewhere(server)
    public = {
        name: f"https://acme.test/{name}"
        for name, value in server.metadata.items()
        if isinstance(value, str)
    } | {"issuer": "https://acme.test"}
    server.fault("mutate", path=OAUTH, set=public)
    assert (await found(http, "https://acme.test")).token_endpoint is not None
    await http.close()
    http = Elsewhere(server)
    public["token_endpoint"] = f"{host}/token"
    server.fault("mutate", path=OAUTH, set=public)
    assert "token_endpoint" in await problem(http, "https://acme.test")
    await http.close()


# ------------------------------------------------------------------------------ rows


def metadata(**facts: Any) -> ServerMetadata:
    """Return the metadata of a server that says as little as may be."""
    known: dict[str, Any] = {field.name: None for field in fields(ServerMetadata)}
    known |= {
        "issuer": "https://acme.test",
        "authorization_endpoint": "https://acme.test/authorize",
        "token_endpoint": "https://acme.test/token",
        "authorization_response_iss_parameter_supported": False,
    }
    return ServerMetadata(**known | facts)


ROW = Provider(id="found", issuer="https://acme.test")


def test_row_with_an_issuer_gets_the_rest() -> None:
    """Endpoints, keys, methods and promises come from the metadata."""
    told = {
        "revocation_endpoint": "https://acme.test/revoke",
        "device_authorization_endpoint": "https://acme.test/device",
        "registration_endpoint": "https://acme.test/register",
        "jwks_uri": "https://acme.test/keys",
        "grant_types_supported": ("authorization_code", "client_credentials"),
        "authorization_response_iss_parameter_supported": True,
    }
    row = with_metadata(ROW, metadata(**told))
    assert row.issuer == "https://acme.test"
    assert row.token_endpoint == "https://acme.test/token"
    for name, value in told.items():
        assert getattr(row, name) == value
    assert not row.is_discovered


def test_silent_metadata_leaves_the_defaults() -> None:
    """Basic authentication is RFC 8414's default, and PKCE is tried."""
    row = with_metadata(ROW, metadata())
    assert row.token_endpoint_auth_method == "client_secret_basic"
    assert row.code_challenge_method == "S256"
    assert row.grant_types_supported == ROW.grant_types_supported
    assert not row.authorization_response_iss_parameter_supported


@pytest.mark.parametrize(
    ("methods", "chosen"),
    [
        (("none", "client_secret_post", "client_secret_basic"), "client_secret_basic"),
        (("private_key_jwt", "none", "client_secret_post"), "client_secret_post"),
        (("none",), "none"),
    ],
)
def test_app_authenticates_as_the_server_takes_it(
    methods: tuple[str, ...], chosen: str
) -> None:
    """Basic is preferred (RFC 6749 section 2.3.1), then the form, then nothing."""
    told = metadata(token_endpoint_auth_methods_supported=methods)
    assert with_metadata(ROW, told).token_endpoint_auth_method == chosen


def test_server_that_takes_no_known_authentication_is_refused() -> None:
    """The text names what there is; a row may insist."""
    told = metadata(token_endpoint_auth_methods_supported=("tls_client_auth",))
    with pytest.raises(ConfigurationError, match="client_secret_post"):
        with_metadata(ROW, told)
    own = Provider(
        id="found", issuer="https://acme.test", token_endpoint_auth_method="none"
    )
    assert with_metadata(own, told).token_endpoint_auth_method == "none"


def test_row_keeps_what_it_says_itself() -> None:
    """A fact of the row is not overruled by the server."""
    own = Provider(
        id="found",
        issuer="https://acme.test",
        token_endpoint_auth_method="client_secret_post",
        jwks_uri="https://keys.test/keys",
    )
    told = metadata(
        token_endpoint_auth_methods_supported=("none",),
        jwks_uri="https://acme.test/keys",
    )
    row = with_metadata(own, told)
    assert row.token_endpoint_auth_method == "client_secret_post"
    assert row.jwks_uri == "https://keys.test/keys"


def test_pkce_is_left_out_where_the_server_has_another_kind_only() -> None:
    """`plain` is never sent."""
    told = metadata(code_challenge_methods_supported=("plain",))
    assert with_metadata(ROW, told).code_challenge_method == "unsupported"
    told = metadata(code_challenge_methods_supported=("plain", "S256"))
    assert with_metadata(ROW, told).code_challenge_method == "S256"


@pytest.mark.parametrize("name", ["authorization_endpoint", "token_endpoint"])
def test_server_without_authorization_codes_is_refused(name: str) -> None:
    """The text names what is missing, and where to give it."""
    with pytest.raises(ConfigurationError, match=f"names no {name}"):
        with_metadata(ROW, metadata(**{name: None}))


def test_metadata_that_makes_no_row_is_refused() -> None:
    """An endpoint with a placeholder in it is no endpoint."""
    told = metadata(token_endpoint="https://acme.test/{tenant}/token")
    with pytest.raises(ConfigurationError, match="tenant"):
        with_metadata(ROW, told)


# ---------------------------------------------------------------------- registration


async def registered(http: Http, endpoint: str, **wishes: Any) -> RegisteredClient:
    """Register an app."""
    facts: dict[str, Any] = {
        "client_name": "The app",
        "redirect_uri": CALLBACK,
        "scopes": ["openid", "read"],
        "token_endpoint_auth_method": "client_secret_basic",
    }
    return await register(http, endpoint, provider="found", **facts | wishes)


@pytest.mark.parametrize(
    "method", ["client_secret_basic", "client_secret_post", "none"]
)
async def test_registered_app_is_known_to_the_server(
    http: Http, server: AuthorizationServer, method: str
) -> None:
    """It gets an id, and a secret unless it is a public client."""
    made = await registered(
        http, server.registration_endpoint, token_endpoint_auth_method=method
    )
    assert server.registrations == 1
    client = server.clients[made.client_id]
    assert client.redirect_uris == (CALLBACK,)
    assert client.scopes == {"openid", "read"}
    assert client.grant_types == {"authorization_code", "refresh_token"}
    assert client.token_endpoint_auth_method == method
    assert made.token_endpoint_auth_method == method
    assert made.client_secret_expires_at is None
    if method == "none":
        assert made.client_secret is None
    else:
        assert made.client_secret == SecretStr(client.client_secret)
        assert_no_leak([client.client_secret], repr(made), str(made))


async def test_secret_that_expires_says_when(
    http: Http, server: AuthorizationServer
) -> None:
    """After that the app has to register again (RFC 7591 section 3.2.1)."""
    server.client_secret_ttl_s = 600
    made = await registered(http, server.registration_endpoint)
    assert made.client_secret_expires_at is not None
    left = made.client_secret_expires_at - datetime.now(UTC)
    assert timedelta(seconds=590) < left <= timedelta(seconds=600)


async def test_app_elsewhere_registers_as_a_web_app(
    http: Http, server: AuthorizationServer
) -> None:
    """This machine's addresses are for native apps, all others for web apps."""
    uri = "https://app.test/auth/found/oauth2/callback"
    made = await registered(
        http, server.registration_endpoint, redirect_uri=uri, scopes=()
    )
    client = server.clients[made.client_id]
    assert client.redirect_uris == (uri,)
    assert client.scopes is None


@pytest.mark.parametrize(
    ("wishes", "code"),
    [
        ({"redirect_uri": "http://app.test/callback"}, "invalid_redirect_uri"),
        ({"redirect_uri": "nowhere"}, "invalid_"),
        (
            {"token_endpoint_auth_method": "private_key_jwt"},
            "invalid_client_metadata",
        ),
    ],
)
async def test_refused_registration_says_how_to_go_on(
    http: Http, server: AuthorizationServer, wishes: dict[str, Any], code: str
) -> None:
    """The developer registers by hand, and reads which settings to set."""
    with pytest.raises(ConfigurationError) as refused:
        await registered(http, server.registration_endpoint, **wishes)
    assert code in str(refused.value)
    assert "POCKET_AUTH_CLIENTS__FOUND__CLIENT_ID" in str(refused.value)
    assert server.registrations == 0


@pytest.mark.parametrize("fault", ["invalid_client", "invalid_grant"])
async def test_closed_registration_is_a_configuration_error(
    http: Http, server: AuthorizationServer, fault: str
) -> None:
    """Some servers register for whoever has a token of theirs only."""
    server.fault(fault, path="/register")
    with pytest.raises(ConfigurationError, match=r"\(refused, 40[01]\)"):
        await registered(http, server.registration_endpoint)


@pytest.mark.parametrize(
    "fault",
    ["503", "500", "429", "html200", "malformed", "list200", "empty", "redirect"],
)
async def test_unusable_answer_is_asked_for_again(
    http: Http, server: AuthorizationServer, fault: str
) -> None:
    """No client came of it."""
    server.fault(fault, path="/register")
    with pytest.raises(ProviderUnavailable, match="found"):
        await registered(http, server.registration_endpoint)
    assert (await registered(http, server.registration_endpoint)).client_id


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"drop": ["client_id"]}, ProviderUnavailable, "client_id"),
        ({"set": {"client_id": 7}}, ProviderUnavailable, "client_id"),
        ({"drop": ["client_secret"]}, ProviderUnavailable, "secret"),
        ({"set": {"client_secret": ["x"]}}, ProviderUnavailable, "secret"),
        (
            {"set": {"token_endpoint_auth_method": "private_key_jwt"}},
            ConfigurationError,
            "another way",
        ),
        (
            {"set": {"token_endpoint_auth_method": ["none"]}},
            ConfigurationError,
            "another way",
        ),
    ],
)
async def test_half_a_registration_is_none(
    http: Http,
    server: AuthorizationServer,
    changes: dict[str, Any],
    error: type[Exception],
    words: str,
) -> None:
    """Whatever is wrong, no secret is in what is said about it."""
    server.fault("mutate", path="/register", **changes)
    with pytest.raises(error, match=words) as failed:
        await registered(http, server.registration_endpoint)
    [client] = server.clients.values()
    assert_no_leak(
        [client.client_secret], "".join(traceback.format_exception(failed.value))
    )


async def test_server_decides_how_the_app_authenticates(
    http: Http, server: AuthorizationServer
) -> None:
    """What is registered holds, not what was asked for (RFC 7591 section 3.2.1)."""
    server.fault(
        "mutate",
        path="/register",
        set={"token_endpoint_auth_method": "none", "client_secret_expires_at": "soon"},
        drop=["client_secret"],
    )
    made = await registered(http, server.registration_endpoint)
    assert made.token_endpoint_auth_method == "none"
    assert made.client_secret is None
    assert made.client_secret_expires_at is None


# ------------------------------------------------------------------- the whole flow


@pytest.fixture
def issuer_only(make_pocket: Make, server: AuthorizationServer) -> PocketAuth:
    """A pocket that knows nothing of a provider but its issuer."""
    return make_pocket(providers=[Provider(id="found", issuer=server.issuer)])


def self_registered(server: AuthorizationServer) -> list[str]:
    """Return the ids of the clients that registered themselves."""
    return [client_id for client_id in server.clients if client_id.startswith("cl_")]


async def test_issuer_alone_is_enough_to_connect(
    issuer_only: PocketAuth, server: AuthorizationServer, alice: Browser
) -> None:
    """Endpoints are discovered, the app registers itself, and the account is shown."""
    context = await connect(issuer_only, alice, "openid", "email", provider="found")
    assert context.access_token == server.issued_access_tokens[-1]
    [session] = await issuer_only.list_session_state(auth_provider="found")
    assert session["account"] == "alice@users.test"
    assert server.registrations == 1
    [client_id] = self_registered(server)
    secret = server.clients[client_id].client_secret
    assert_no_leak([secret], repr(context), session)


async def test_registered_client_is_used_again(
    make_pocket: Make,
    server: AuthorizationServer,
    alice: Browser,
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Other people, refreshes and a restart use the same client."""
    settings: dict[str, Any] = {
        "storage": f"sqlite:///{tmp_path}/p.db",
        "providers": [Provider(id="found", issuer=server.issuer)],
        "base_url": f"http://127.0.0.1:{free_port()}",
    }
    pocket = make_pocket(**settings)
    await connect(pocket, alice, "read", provider="found", thread_id="a")
    bob = Browser("bob")
    await connect(pocket, bob, "read", provider="found", thread_id="b")
    await asyncio.to_thread(pocket.close)
    pocket = make_pocket(**settings)
    assert await state(pocket, "read", provider="found", thread_id="a") == "SKIP_AUTH"
    clock = Clock(monkeypatch)
    clock.forward(3590)
    await token(pocket, "read", provider="found", thread_id="a")
    assert server.token_requests["refresh_token"] == 1
    await connect(pocket, alice, "read", provider="found", thread_id="c")
    assert server.registrations == 1
    assert_no_leak(
        [
            server.clients[client_id].client_secret
            for client_id in self_registered(server)
        ],
        files=[tmp_path / "p.db"],
    )


async def test_expired_client_registers_again(
    issuer_only: PocketAuth,
    server: AuthorizationServer,
    alice: Browser,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A secret that has expired is replaced by one new registration."""
    server.client_secret_ttl_s = 600
    await connect(issuer_only, alice, "read", provider="found", thread_id="a")
    clock, before = Clock(monkeypatch), server.clock
    module = "langchain_pocket_auth.handlers._token_requests"
    monkeypatch.setattr(f"{module}.datetime", clock, raising=False)
    clock.forward(601)
    server.clock = lambda: before() + 601
    await connect(issuer_only, alice, "read", provider="found", thread_id="b")
    assert server.registrations == 2


async def test_client_that_the_server_forgot_is_registered_again(
    issuer_only: PocketAuth, server: AuthorizationServer, alice: Browser
) -> None:
    """Its sessions need consent again, and the next question is of a new client."""
    server.access_token_ttl_s = 1
    await connect(issuer_only, alice, "read", provider="found")
    server.clients.clear()
    await asyncio.sleep(1.1)
    assert await state(issuer_only, "read", provider="found") == "DO_REFRESH"
    with pytest.raises(AuthorizationRequired):
        await token(issuer_only, "read", provider="found")
    assert await state(issuer_only, "read", provider="found") == "DO_AUTH"
    await connect(issuer_only, alice, "read", provider="found")
    assert server.registrations == 2


def test_registering_waits_on_each_loop_for_itself() -> None:
    """After a fork, the background loop of the child is another."""
    registration = Registration("http://127.0.0.1:1", None, Http())

    async def once(done: list[int]) -> None:
        async with registration.registering:
            await asyncio.sleep(0)
            done.append(1)

    async def several() -> int:
        done: list[int] = []
        await asyncio.gather(*(once(done) for _ in range(3)))
        return len(done)

    assert [asyncio.run(several()) for _ in range(2)] == [3, 3]


async def test_own_client_is_used_at_a_discovered_server(
    make_pocket: Make, server: AuthorizationServer, alice: Browser
) -> None:
    """An app that was registered by hand does not register itself."""
    base = f"http://127.0.0.1:{free_port()}"
    server.register(
        client_id="by-hand",
        client_secret="by-hand-secret",
        redirect_uris=[f"{base}/auth/found/oauth2/callback"],
    )
    pocket = make_pocket(
        base_url=base,
        providers=[Provider(id="found", issuer=server.issuer)],
        clients={"found": ("by-hand", "by-hand-secret")},
    )
    await connect(pocket, alice, "read", provider="found")
    assert server.registrations == 0


async def test_disconnecting_revokes_at_a_discovered_server(
    issuer_only: PocketAuth, server: AuthorizationServer, alice: Browser
) -> None:
    """The revocation endpoint is discovered too."""
    await connect(issuer_only, alice, "read", provider="found")
    assert await issuer_only.delete_session("found")
    assert server.revoked_families == 1


async def test_issuer_promised_in_answers_is_missed(
    issuer_only: PocketAuth, server: AuthorizationServer, alice: Browser
) -> None:
    """Metadata that promises `iss` makes an answer without it a stranger's (RFC 9207)."""
    url = await link(issuer_only, "read", provider="found")
    for path in (OAUTH, OPENID):
        promise = {"authorization_response_iss_parameter_supported": True}
        server.fault("mutate", path=path, times=9, set=promise)
    server.iss = "omitted"
    page = await alice.avisit(url)
    assert page.status_code == 403
    assert server.token_requests.total() == 0


async def test_server_that_registers_nobody_leaves_it_to_the_developer(
    issuer_only: PocketAuth,
    server: AuthorizationServer,
    alice: Browser,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The person meets a page, the log says which setting to set."""
    url = await link(issuer_only, "read", provider="found")
    server.fault("mutate", path=OAUTH, drop=["registration_endpoint"])
    page = await alice.avisit(url)
    assert outcome_of(page) == "failed"
    assert "client id" in caplog.text
    assert server.registrations == 0


async def test_clients_of_two_tenants_are_kept_apart(
    make_pocket: Make, server: AuthorizationServer, alice: Browser, tmp_path: Any
) -> None:
    """A client that one tenant registered is never shown to another."""
    row = Provider(
        id="found",
        issuer="http://127.0.0.1:{tenant}",
        variables={"tenant": Variable(pattern="[0-9]+")},
    )
    base_url = f"http://127.0.0.1:{free_port()}"
    with AuthorizationServer() as other:
        for tenant in (server, other):
            pocket = make_pocket(
                f"sqlite:///{tmp_path}/p.db",
                providers=[row],
                clients={"found": {"tenant": str(tenant.port)}},
                base_url=base_url,
                keys=KEYS,
            )
            await connect(pocket, alice, "read", provider="found")
            await asyncio.to_thread(pocket.close)
            assert tenant.registrations == 1


@pytest.mark.parametrize(
    "fault", [{"issuer": "https://evil.test"}, {"token_endpoint": "http://evil.test"}]
)
async def test_person_meets_a_page_where_the_issuer_lies(
    issuer_only: PocketAuth,
    server: AuthorizationServer,
    alice: Browser,
    fault: dict[str, str],
) -> None:
    """Nobody is led anywhere, and the link works when the server does."""
    url = await link(issuer_only, "read", provider="found")
    for path in (OAUTH, OPENID):
        server.fault("mutate", path=path, set=fault)
    page = await alice.avisit(url)
    assert page.is_error
    assert outcome_of(page)
    assert server.registrations == 0
    server.clear_faults()
    assert outcome_of(await alice.avisit(url)) == "connected"


def test_request_needs_no_client_at_a_discovered_server(
    issuer_only: PocketAuth,
) -> None:
    """`make_request` asks nobody; discovery happens when a person clicks."""
    assert asks(issuer_only, "read", provider="found").client_id == ""
