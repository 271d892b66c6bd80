"""What a hostile provider, account or caller tries against what providers can do."""

# No `from __future__ import annotations`: tools are made of local annotations.

import asyncio
import base64
import html
import json
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Annotated, Any
from urllib.parse import quote, quote_plus, urlencode

import httpx
import pytest
from conftest import call, provider
from langchain_core.tools import tool
from support import KEYS, connect, deliver, link, outcome_of, query_of
from support import state as state_of
from support import token as token_of
from test_device import shown

from langchain_pocket_auth import (
    AuthorizationRequired,
    ConfigurationError,
    FormContext,
    InjectedAuth,
    Owner,
    Placed,
    Placement,
    PocketAuth,
    Provider,
    ProviderError,
    ProviderUnavailable,
    Variable,
)
from langchain_pocket_auth._cards import Card
from langchain_pocket_auth._http import Answer
from langchain_pocket_auth._settings import read_settings
from langchain_pocket_auth.handlers._answers import checked, context_of
from langchain_pocket_auth.testing import (
    AuthorizationServer,
    Browser,
    LeakWatch,
    free_port,
)

Make = Callable[..., PocketAuth]
TWO = [{"id": "c-1", "name": "One"}, {"id": "c-2", "name": "Two"}]
WHO_KEY, OPENAI_KEY = "sk-the-persons-own", "sk-the-apps-own"


class Odd(ThreadingHTTPServer):
    """A provider that answers whatever a test wants, and keeps what it was sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.base = f"http://127.0.0.1:{self.server_port}"
        self.answers: dict[str, tuple[int, Any]] = {}
        self.asked: list[tuple[str, str]] = []


class _Answers(BaseHTTPRequestHandler):
    server: Odd

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append((self.path, self.headers.get("Authorization", "")))
        status, content = self.server.answers.get(self.path, (404, {}))
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_DELETE = do_GET  # noqa: N815

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def odd() -> Iterator[Odd]:
    """A provider that does what it wants."""
    with Odd() as running:
        Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running
        running.shutdown()


def robot(odd: Odd, **facts: Any) -> dict[str, Any]:
    """Return settings for a provider that connects the app itself."""
    odd.answers["/token"] = (200, {"access_token": "first", "expires_in": 3600})
    row = Provider(
        id="robot",
        token_endpoint=f"{odd.base}/token",
        grant_types_supported=("client_credentials",),
        **facts,
    )
    return {"providers": [row], "clients": {"robot": ("app", "app-secret")}}


def several(server: AuthorizationServer, odd: Odd, **facts: Any) -> dict[str, Any]:
    """Return settings for acme with a look-up of accounts at *odd*."""
    odd.answers["/sites"] = (200, TWO)
    look = {"endpoint": f"{odd.base}/sites", "members": {"site": "id"}}
    return {"providers": [provider(server, "acme", account_lookup=look, **facts)]}


async def consented(pocket: PocketAuth, person: Browser) -> str:
    """Let a person agree at the provider, and choose nothing; return the link."""
    url = await link(pocket)
    answer = await asyncio.to_thread(person.authorize, url)
    await deliver(answer)
    return url


async def started(url: str) -> str:
    """Press the button of a connect page; return the provider's page."""
    left = await deliver(url, method="POST")
    found = re.search(r'content="0;url=([^"]+)"', left.text)
    return html.unescape(found[1]) if found else left.headers["location"]


# --------------------------------------------------------- where secrets must not show


async def test_token_in_a_revocation_address_is_not_logged(
    make_pocket: Make, server: AuthorizationServer, odd: Odd, alice: Browser
) -> None:
    """A row may put `{token}` into the path; the log shows the host only."""
    how = {"endpoint": f"{odd.base}/grants/{{token}}", "method": "DELETE"}
    row = provider(server, "acme", revocation_endpoint=None, revocation=how)
    pocket = make_pocket(providers=[row])
    with LeakWatch() as watch:
        await connect(pocket, alice)
        await pocket.delete_session("acme", "default")
    assert odd.asked
    watch.assert_clean(server.issued_access_tokens)


SAID: dict[str, Callable[[str, str], Any]] = {
    "in a query": lambda password, _: f"?key={quote_plus(password)}",
    "in a path": lambda password, _: f"/bot{quote(password, safe='')}/",
    "as JSON": lambda password, _: json.dumps({"password": password}),
    "as Python": lambda password, _: repr([password]),
    "as a key of a dict": lambda password, _: {password: 1},
    "key with other line ends": lambda _, pem: pem.replace("\n", "\r\n"),
    "key without line ends": lambda _, pem: "".join(pem.splitlines()[1:-1]),
}


@pytest.mark.parametrize("how", SAID)
async def test_secret_is_masked_however_a_tool_writes_it(
    make_pocket: Make, how: str
) -> None:
    """What libraries put into their errors is quoted, escaped or wrapped anew."""
    password = 'p+w/"\\ü=='
    body = ["MIIEvQIBADANBgkq" + letter * 48 for letter in "AB"]
    pem = "\n".join(["-----BEGIN PRIVATE KEY-----", *body, "-----END PRIVATE KEY-----"])
    fields = {
        "token": {"label": "Password", "secret": True},
        "key": {"label": "Key", "secret": True, "multiline": True},
    }
    form = {"fields": fields, "api_credential": Placement(query="key")}
    row = Provider(id="vault", token=form)
    settings = {"vault": {"token": password, "key": pem}}
    pocket = make_pocket(providers=[row], clients=settings)

    @tool
    def blab(vault: Annotated[FormContext, InjectedAuth("vault")]) -> Any:
        """Say what must not be said."""
        return SAID[how](vault.access_token, vault.fields["key"])

    message = await pocket.wrap(blab).ainvoke(call("blab"))
    assert "***" in message.text
    for secret in (password, quote(password, safe=""), *body):
        assert secret not in message.text


@pytest.mark.parametrize("written", ["12345e67", "true", "null", '"quoted"', "[1]"])
def test_key_in_the_environment_is_taken_as_it_is(
    written: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that happens to be JSON is no number, no list, and keeps its quotes."""
    monkeypatch.setenv("POCKET_AUTH_CLIENTS__OPENAI__TOKEN", written)
    assert read_settings(None).clients["openai"].variables["token"] == written


# -------------------------------------------------------------------- hostile answers


ODD: list[tuple[int, str, type[Exception] | None]] = [
    (503, '{"error": ["busy"]}', ProviderUnavailable),
    (503, '{"error": {"code": {"busy": 1}}}', ProviderUnavailable),
    (200, f'{{"access_token": "t", "expires_in": 1{"0" * 400}}}', None),
    (200, '{"access_token": "t\\r\\nX-Evil: 1"}', ProviderError),
    (200, '{"access_token": "t\\ud800"}', ProviderError),
    (200, '{"access_token": "tokén"}', ProviderError),
]


@pytest.mark.parametrize(("status", "body", "raised"), ODD)
def test_odd_token_answer_is_an_error_of_the_provider(
    status: int, body: str, raised: type[Exception] | None
) -> None:
    """No answer gets a type or an overflow error out, or a line into a header."""
    row = Provider(
        id="acme",
        authorization_endpoint="https://a.test",
        token_endpoint="https://a.test",
    )
    answer = Answer(status, body.encode(), None)
    with pytest.raises(raised) if raised else nullcontext():
        context_of(row, checked(row, answer), datetime.now(UTC), {})


@pytest.mark.parametrize("value", ["x\r\nX-Evil: 1", "x\ny", "x\0"])
def test_value_that_ends_a_header_is_in_none(value: str) -> None:
    """What a look-up or callback told cannot add a header to API calls."""
    placed = Placed(Placement(), {"token": "t", "site": value}, {"X-Site": "{site}"})
    with pytest.raises(ConfigurationError):
        placed.rendered_headers()


async def test_terminal_is_not_steered_by_a_provider(
    make_pocket: Make, server: AuthorizationServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """User codes and pages are shown without escape sequences; so are account names."""
    path = server.device_authorization_endpoint
    row = provider(server, "acme", device_authorization_endpoint=path)
    pocket = make_pocket(providers=[row])
    sent = {"user_code": "A\x1b]0;x\x07B", "verification_uri": "https://a.test/\x1b[2J"}
    server.fault("mutate", path="/device_authorization", set=sent)
    with pytest.raises(AuthorizationRequired):
        await pocket.connect("acme", device=True, timeout=0.3)
    shown = capsys.readouterr().out + str(Card("Which?", ("1: \x1b[31m\u202eeno",)))
    assert "Type the code" in shown
    assert not [c for c in shown if not c.isprintable() and c != "\n"]


async def test_grant_that_cannot_be_kept_is_given_back(
    make_pocket: Make, server: AuthorizationServer, alice: Browser
) -> None:
    """Whatever stops it after the exchange, no token stays alive that nobody knows."""
    row = provider(server, "acme", token_response_members=["team"])
    pocket = make_pocket(providers=[row])
    server.fault("mutate", set={"team": "\ud800"})  # no store can hold it
    page = await alice.avisit(await link(pocket))
    assert outcome_of(page) == "failed"
    assert server.revoked_families == 1


@pytest.mark.parametrize("odd_id", ["\ud800", "x" * 600, "a\0b", "a\x1b[2J"], ids=ascii)
async def test_account_that_no_form_brings_back_is_not_offered(
    make_pocket: Make,
    server: AuthorizationServer,
    odd: Odd,
    alice: Browser,
    odd_id: str,
) -> None:
    """Of two accounts one cannot be chosen: the other is taken."""
    pocket = make_pocket(**several(server, odd))
    odd.answers["/sites"] = (200, [TWO[0], {"id": odd_id, "name": "Two"}])
    page = await alice.avisit(await link(pocket))
    assert outcome_of(page) == "connected"


def test_url_that_carries_a_credential_never_shows_it() -> None:
    """Nor if a request is used twice; what is sent has the credential once."""
    placed = Placed(Placement(query="key"), {"token": "s3cr3t"})
    request = httpx.Request("GET", "https://a.test/v1?page=2")
    for _ in range(2):
        placed.apply(request)
        assert (str(request.url), repr(request.url)) == ("https://a.test/v1",) * 2
        assert request.url.raw_path == b"/v1?page=2&key=s3cr3t"


# ---------------------------------------------------------------------- the choice


async def test_disconnecting_ends_a_grant_that_waits_for_a_choice(
    make_pocket: Make, server: AuthorizationServer, odd: Odd, alice: Browser
) -> None:
    """The token is held already: it is revoked, and the choice comes too late."""
    pocket = make_pocket(**several(server, odd))
    url = await consented(pocket, alice)
    await pocket.delete_session("acme")
    late = await deliver(url, method="POST", data={"account": "c-1"})
    assert (late.status_code, await state_of(pocket)) == (410, "NO_SESSION")
    assert server.revoked_families == 1


async def test_one_of_ten_choices_at_once_wins(
    make_pocket: Make, server: AuthorizationServer, odd: Odd, alice: Browser
) -> None:
    """The others are told that the link was used; there is one grant."""
    pocket = make_pocket(**several(server, odd))
    url = await consented(pocket, alice)
    given = [{"account": f"c-{n % 2 + 1}"} for n in range(10)]
    done = await asyncio.gather(
        *(deliver(url, method="POST", data=form) for form in given)
    )
    assert sorted(page.status_code for page in done) == [303] + [409] * 9
    assert len(server.issued_access_tokens) == 1


async def test_account_is_chosen_after_a_device_code(
    make_pocket: Make,
    server: AuthorizationServer,
    odd: Odd,
    alice: Browser,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A grant that reaches several accounts is asked about here, not left hanging."""
    server.device_interval_s = 0.05
    path = server.device_authorization_endpoint
    facts = several(server, odd, device_authorization_endpoint=path)
    pocket = make_pocket(**facts)
    monkeypatch.setattr("getpass.getpass", lambda _: "2")
    waiting = asyncio.ensure_future(pocket.connect("acme", device=True, timeout=5))
    await asyncio.to_thread(alice.approve_device, *await shown(capsys))
    assert (await waiting).access_token == server.issued_access_tokens[-1]


# ------------------------------------------------------------- registered by itself


async def test_client_of_one_tenant_is_not_sent_to_another(
    make_pocket: Make,
    server: AuthorizationServer,
    odd: Odd,
    alice: Browser,
    tmp_path: Path,
) -> None:
    """Metadata that names another server's registration gets none of its secret."""
    row = Provider(
        id="found",
        issuer="http://127.0.0.1:{tenant}",
        variables={"tenant": Variable(pattern="[0-9]+")},
    )
    facts: Any = {"storage": f"sqlite:///{tmp_path}/p.db", "keys": KEYS}
    facts |= {"base_url": f"http://127.0.0.1:{free_port()}", "providers": [row]}
    pocket = make_pocket(**facts, clients={"found": {"tenant": str(server.port)}})
    await connect(pocket, alice, provider="found")
    await asyncio.to_thread(pocket.close)
    told = {"issuer": odd.base, "registration_endpoint": server.registration_endpoint}
    told |= {"authorization_endpoint": f"{odd.base}/a", "token_endpoint": odd.base}
    odd.answers["/.well-known/oauth-authorization-server"] = (200, told)
    pocket = make_pocket(**facts, clients={"found": {"tenant": str(odd.server_port)}})
    page = await started(await link(pocket, provider="found"))
    answer = {"code": "x", "state": query_of(page)["state"]}
    await deliver(f"{pocket.base_url}/auth/found/oauth2/callback", params=answer)
    [first] = [c for c in server.clients if c.startswith("cl_")][:1]
    sent = [base64.b64decode(basic[6:]).decode() for _, basic in odd.asked if basic]
    assert not [pair for pair in sent if pair.startswith(first)]


async def test_twenty_persons_at_once_register_one_client(
    make_pocket: Make, server: AuthorizationServer
) -> None:
    """Servers limit how many clients an app may register."""
    row = Provider(id="found", issuer=server.issuer)
    pocket = make_pocket(providers=[row])
    links = [await link(pocket, provider="found", thread_id=str(n)) for n in range(20)]
    await asyncio.gather(*map(started, links))
    assert server.registrations == 1


# ------------------------------------------------------------- the app's own sessions


async def test_session_of_the_app_is_the_app_s_to_delete(
    make_pocket: Make, odd: Odd
) -> None:
    """A person's disconnecting leaves it; who deletes the app's deletes it for all."""
    facts = robot(odd, revocation_endpoint=f"{odd.base}/revoke")
    pocket = make_pocket(**facts, session_cache_ttl=timedelta(minutes=1))
    for who in ("a", "b", "b"):
        await token_of(pocket, provider="robot", thread_id=who)
    odd.answers["/token"] = (200, {"access_token": "second", "expires_in": 3600})
    assert not await pocket.delete_session("robot", "a")
    context = await token_of(pocket, provider="robot", thread_id="b")
    assert context.access_token == "first"
    assert await pocket.delete_session("robot", owner=Owner("app", "app"))
    assert "/revoke" in [path for path, _ in odd.asked]
    context = await token_of(pocket, provider="robot", thread_id="b")
    assert context.access_token == "second"


async def test_own_key_can_be_forgotten_when_the_app_has_one(
    make_pocket: Make, tmp_path: Path
) -> None:
    """What a person typed before stays the person's to delete."""
    store: Any = {"storage": f"sqlite:///{tmp_path}/p.db", "keys": KEYS}
    pocket = make_pocket(**store)
    page = await started(await link(pocket, provider="openai"))
    typed = {"attempt": query_of(page)["state"], "token": WHO_KEY}
    await deliver(page.partition("?")[0], method="POST", data=typed)
    await asyncio.to_thread(pocket.close)
    pocket = make_pocket(**store, clients={"openai": {"token": OPENAI_KEY}})
    assert await pocket.delete_session("openai")
    assert await pocket.list_session_state() == []


# -------------------------------------------------------------------------- callbacks


async def test_unknown_providers_cost_no_memory(make_pocket: Make) -> None:
    """Posting to callbacks that do not exist leaves nothing behind."""
    pocket = make_pocket()
    await pocket.serve()
    for number in range(5):
        url = f"{pocket.base_url}/auth/x{number}/oauth2/callback"
        assert (await deliver(url, method="POST")).status_code == 405
    assert not [p for p in pocket._service.registry._rows if p.startswith("x")]


FORM = {"Content-Type": "application/x-www-form-urlencoded"}
POSTS: dict[str, tuple[int, Callable[[dict[str, str]], dict[str, Any]]]] = {
    "JSON": (400, lambda q: {"json": q}),
    "multipart": (400, lambda q: {"files": {k: (None, v) for k, v in q.items()}}),
    "too long": (400, lambda q: {"data": q | {"user": "x" * 9000}}),
    "twice": (400, lambda q: {"content": f"{urlencode(q)}&state=x", "headers": FORM}),
    "in the query": (400, lambda q: {"params": q}),
    "another host": (421, lambda q: {"data": q, "headers": {"Host": "evil.test"}}),
    "another issuer": (403, lambda q: {"data": q | {"iss": "https://evil.test"}}),
}


@pytest.mark.parametrize("how", POSTS)
async def test_posted_answer_is_a_form_of_this_attempt(
    make_pocket: Make, server: AuthorizationServer, alice: Browser, how: str
) -> None:
    """What is refused leaves the attempt alone; the right answer counts once."""
    posts = {"response_mode": "form_post"}
    row = provider(server, "acme", authorization_parameters=posts)
    pocket = make_pocket(providers=[row])
    url = await link(pocket)
    answer = await asyncio.to_thread(alice.authorize, url)
    here, query = answer.partition("?")[0], query_of(answer)
    status, sent = POSTS[how]
    assert (await deliver(here, method="POST", **sent(query))).status_code == status
    there = here.replace("/acme/", "/zeta/")
    assert (await deliver(there, method="POST", data=query)).status_code == 405
    assert (await deliver(here, method="POST", data=query)).status_code == 303
    other = query | {"code": "another"}
    assert (await deliver(here, method="POST", data=other)).status_code == 409
    assert len(server.issued_access_tokens) == 1


HOSTS = [
    *("accounts.zoho.com.evil.test", "accounts.zoho.com@evil.test", "evil.test"),
    *("accounts.zoho.com:444", "accounts.zoho.com/x", "accounts.zoho.com#", "zoho.com"),
    *("accounts.zoho.com\n", "accounts.zoho.com\u200b", "ⓐccounts.zoho.com"),
    *("accountsXzoho.com", "http://accounts.zoho.com", "https://https://evil.test"),
]


async def test_callback_sends_the_apps_secret_to_listed_hosts_only(
    make_pocket: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """A host that is almost the provider's is refused before any request."""
    pocket = make_pocket(clients={"zoho": ("zoho-id", "zoho-secret")})
    for host in HOSTS:
        page = await started(await link(pocket, provider="zoho"))
        answer = {"code": "x", "state": query_of(page)["state"]}
        url = f"{pocket.base_url}/auth/zoho/oauth2/callback"
        got = await deliver(url, params=answer | {"accounts-server": host})
        assert (got.status_code, outcome_of(got)) == (502, "failed"), host
    assert caplog.text.count("names a server that is not in its row") == len(HOSTS)
