"""Credentials that a person types into our own form, honestly and otherwise."""

# No `from __future__ import annotations`: tools are made of local annotations.

import asyncio
import base64
import html
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Annotated, Any

import httpx
import pytest
from conftest import call, free_port, says
from fastapi import APIRouter, FastAPI
from graphs import SYNC, Work, ask, build, results, run
from langchain.agents import create_agent
from langchain.agents.middleware import ToolRetryMiddleware
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite import SqliteSaver
from support import BOUND_S, KEYS, Clock, deliver, outcome_of, query_of
from test_pages import MARKUP

from langchain_pocket_auth import (
    AuthContext,
    AuthorizationRequired,
    ConfigurationError,
    FutureStore,
    InjectedAuth,
    PocketAuth,
    Provider,
    ProviderError,
    pending_authorizations,
    resume,
)
from langchain_pocket_auth.handlers import AuthHandlerInterface, FormHandler
from langchain_pocket_auth.server._pages import SECURITY_HEADERS
from langchain_pocket_auth.testing import (
    Browser,
    LeakWatch,
    ScriptedModel,
    assert_no_leak,
)
from langchain_pocket_auth.testing._html import read_page

KEY = "sk-2fd41c0e9b77"
PEM = "-----BEGIN PRIVATE KEY-----\nMIIEvQ+/w0BAQ==\n-----END PRIVATE KEY-----"
ACME = {
    "token": {
        "fields": {
            "token": {"label": "Key", "secret": True, "pattern": r"ak_[a-z0-9_]+"},
            "team": {"label": "Team", "required": False},
            "chain": {
                "label": "Certificates",
                "secret": True,
                "multiline": True,
                "required": False,
            },
        },
        "note": "Keys of the team are better than your own.",
        "docs": "https://docs.acme.test/keys",
    }
}
Make = Callable[..., PocketAuth]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Make pockets with the bundled providers and acme; they are closed at the end."""
    made: list[PocketAuth] = []

    def make_one(storage: str = "memory://", **settings: Any) -> PocketAuth:
        base = f"http://127.0.0.1:{free_port()}"
        rows = [Provider(id="acme", **ACME)]
        settings = {"base_url": base, "keys": KEYS, "providers": rows} | settings
        made.append(PocketAuth(storage, **settings))
        return made[-1]

    yield make_one
    for pocket in made:
        pocket.close()


@pytest.fixture
def pocket(make: Make) -> PocketAuth:
    """A pocket with memory storage."""
    return make()


def basic(user: str, password: str) -> str:
    """Return the credentials of RFC 7617."""
    return base64.b64encode(f"{user}:{password}".encode()).decode()


class Flow:
    """One handler of one pocket, as an app and a person's browser see it."""

    def __init__(self, pocket: PocketAuth, name: str = "openai-token") -> None:
        self.pocket = pocket
        self.handler = pocket.find_handler_instance(name)
        provider = self.handler.provider()
        self.names = {
            "auth_handler_name": name,
            "auth_provider": str(getattr(provider, "value", provider)),
        }
        self.request = pocket.make_request([], **self.names)

    async def link(self) -> str:
        """Return the connect link."""
        url = await self.pocket.prepare(self.request, **self.names)
        assert url is not None
        return url

    async def form(self) -> str:
        """Press the button of the connect page; return where the form is."""
        left = await deliver(await self.link(), method="POST")
        meta = re.search(r'content="0;url=([^"]+)"', left.text)
        url = html.unescape(meta[1]) if meta else left.headers["location"]
        assert re.fullmatch(
            rf"{self.pocket.base_url}/auth/[^?]+/form\?state=.{{43}}", url
        )
        return url

    async def state(self) -> str:
        """Return the name of the state."""
        return (await self.pocket.check(self.request, **self.names)).name

    async def context(self) -> AuthContext:
        """Return what a tool would get, without waiting."""
        return await self.pocket.authenticate(self.request, timeout=0, **self.names)


async def submit(url: str, *, follow: bool = False, **values: Any) -> httpx.Response:
    """Post a form's values, `None` for none, as a browser does."""
    path, attempt = url.partition("?")[0], query_of(url).get("state", "")
    data = {k: v for k, v in {"attempt": attempt, **values}.items() if v is not None}
    return await deliver(path, method="POST", data=data, follow_redirects=follow)


def is_bare(page: httpx.Response) -> bool:
    """Whether a page carries every header that keeps it to itself."""
    return all(name in page.headers for name in SECURITY_HEADERS)


# ------------------------------------------------------------------- the whole way

AWS = {"access_key_id": "AKIA7Q2W", "secret_access_key": KEY, "region": "eu-west-1"}
KINDS: dict[str, tuple[dict[str, str], str, dict[str, str], dict[str, str] | None]] = {
    "openai-token": (
        {"token": KEY},
        KEY,
        {"OPENAI_API_KEY": KEY},
        {"Authorization": f"Bearer {KEY}"},
    ),
    "apitoken": (
        {"token": KEY},
        KEY,
        {"API_TOKEN": KEY},
        {"Authorization": f"Bearer {KEY}"},
    ),
    "azure-openai-token": (
        {"token": KEY, "endpoint": "https://mine.openai.azure.com"},
        KEY,
        {
            "AZURE_OPENAI_API_KEY": KEY,
            "AZURE_OPENAI_ENDPOINT": "https://mine.openai.azure.com",
        },
        {"api-key": KEY},
    ),
    "jira-token": (
        {"email": "a@acme.test", "token": KEY, "site": "acme.atlassian.net"},
        KEY,
        {
            "JIRA_EMAIL": "a@acme.test",
            "JIRA_TOKEN": KEY,
            "JIRA_SITE": "acme.atlassian.net",
        },
        {"Authorization": f"Basic {basic('a@acme.test', KEY)}"},
    ),
    "linkedin-basicauth": (
        {"username": "alice", "password": "pass wörd:1"},
        basic("alice", "pass wörd:1"),
        {
            "LINKEDIN_USERNAME": "alice",
            "LINKEDIN_PASSWORD": "pass wörd:1",
            "LINKEDIN_BASIC_AUTH": basic("alice", "pass wörd:1"),
        },
        {"Authorization": f"Basic {basic('alice', 'pass wörd:1')}"},
    ),
    "basicauth": (
        {"username": "alice", "password": KEY},
        basic("alice", KEY),
        {
            "BASICAUTH_USERNAME": "alice",
            "BASICAUTH_PASSWORD": KEY,
            "BASIC_AUTH": basic("alice", KEY),
        },
        {"Authorization": f"Basic {basic('alice', KEY)}"},
    ),
    "zendesk-basic": (
        {"email": "a@acme.test", "token": KEY, "subdomain": "acme"},
        basic("a@acme.test/token", KEY),
        {
            "ZENDESK_EMAIL": "a@acme.test",
            "ZENDESK_TOKEN": KEY,
            "ZENDESK_SUBDOMAIN": "acme",
        },
        {"Authorization": f"Basic {basic('a@acme.test/token', KEY)}"},
    ),
    "datadog-token": (
        {"token": KEY, "application_key": "app-77c1e0", "site": "datadoghq.eu"},
        KEY,
        {
            "DATADOG_TOKEN": KEY,
            "DATADOG_APPLICATION_KEY": "app-77c1e0",
            "DATADOG_SITE": "datadoghq.eu",
        },
        {"DD-API-KEY": KEY, "DD-APPLICATION-KEY": "app-77c1e0"},
    ),
    "acme-token": (
        {"token": "ak_41c0e9b77", "team": "red", "chain": PEM},
        "ak_41c0e9b77",
        {"ACME_TOKEN": "ak_41c0e9b77", "ACME_TEAM": "red", "ACME_CHAIN": PEM},
        {"Authorization": "Bearer ak_41c0e9b77"},
    ),
    "aws-keypair": (
        AWS | {"session_token": ""},
        KEY,
        {f"AWS_{name.upper()}": value for name, value in AWS.items()},
        None,
    ),
    "kraken-keypair": (
        {"kraken_api_key": "kk-1", "kraken_api_secret": KEY},
        KEY,
        {"KRAKEN_API_KEY": "kk-1", "KRAKEN_API_SECRET": KEY},
        None,
    ),
}


@pytest.mark.parametrize("name", KINDS)
async def test_what_is_typed_is_what_the_tool_gets(
    pocket: PocketAuth, name: str
) -> None:
    """From the link to the tool, under the keys and in the headers of the API."""
    typed, token, environment, headers = KINDS[name]
    flow = Flow(pocket, name)
    assert await flow.state() == "NO_SESSION"
    with Browser("alice", fields=typed) as alice:
        page = await alice.avisit(await flow.link())
    assert (page.status_code, outcome_of(page)) == (200, "connected")
    context = await flow.context()
    assert context.access_token == token
    assert context.expires_at is None
    assert context.to_dict() == environment
    assert context.to_profiled_dict("work") == {
        f"WORK_{key}": value for key, value in environment.items()
    }
    if headers is None:
        with pytest.raises(ConfigurationError, match="sign with the values"):
            context.headers()
    else:
        assert context.headers() == headers
    assert await flow.state() == "SKIP_AUTH"


async def test_credential_goes_into_the_query_where_the_api_wants_it(
    pocket: PocketAuth,
) -> None:
    """Trello takes both keys in the query."""
    flow = Flow(pocket, "trello-token")
    await submit(await flow.form(), token=KEY, api_key="power-up")
    context = await flow.context()
    request = context.apply(httpx.Request("GET", "https://api.trello.com/1/boards?x=1"))
    query = dict(request.url.params)
    assert query == {"x": "1", "token": KEY, "key": "power-up"}


async def test_api_address_is_the_one_that_was_typed(pocket: PocketAuth) -> None:
    """A field can be part of the API's address."""
    flow = Flow(pocket, "zendesk-basic")
    await submit(await flow.form(), email="a@b.test", token=KEY, subdomain="acme")
    context = await flow.context()
    assert context.api_base_url == "https://acme.zendesk.com/api/v2"


def test_agent_pauses_for_a_form_and_goes_on_once(pocket: PocketAuth) -> None:
    """One pause, one form, one run of the tool."""
    work = Work()
    tools = [work.tool("ask_ai", "openai")]
    script = [says(call("ask_ai", text="a"))]
    agent, _ = build("create_agent", pocket, tools, script)
    paused = ask(agent, SYNC)
    [pending] = pending_authorizations(paused)
    assert work.done == []
    with Browser("alice", fields={"token": KEY}) as alice:
        assert outcome_of(alice.visit(pending.url)) == "connected"
    done = run(agent, resume(paused), SYNC)
    assert work.done == [("ask_ai", KEY)]
    assert results(done)["ask_ai"].text == "ask_ai did a"
    assert pending_authorizations(done) == []


# ------------------------------------------------------------------------- the page


async def test_page_asks_for_the_rows_fields(pocket: PocketAuth) -> None:
    """Labels, masks, help and who asks; nothing is filled in, no address in it."""
    flow = Flow(pocket, "acme-token")
    url = await flow.form()
    page = await deliver(url)
    assert page.status_code == 200
    assert is_bare(page)
    [form] = read_page(page.text).forms
    attempt = query_of(url)["state"]
    assert form.types == {
        "attempt": "hidden",
        "token": "password",
        "team": "text",
        "chain": "textarea",
    }
    assert form.fields == {"attempt": attempt, "token": "", "team": "", "chain": ""}
    assert (form.method, form.action) == ("post", "form")
    assert page.text.count('autocomplete="off"') == 4
    assert page.text.count(" required>") == 1
    assert "Team (optional)" in page.text
    assert "Keys of the team are better than your own." in page.text
    assert (
        '<a href="https://docs.acme.test/keys" target="_blank" '
        'rel="noreferrer noopener">' in page.text
    )
    assert "<script" not in page.text
    assert "redirect" not in page.text


async def test_form_says_who_asks_and_what_for(make: Make) -> None:
    """App, owner and tools are shown as on the connect page."""
    pocket = make(owner=lambda _: "alice@acme.test", app_name="Acme Assistant")
    agent, _ = build(
        "create_agent",
        pocket,
        [Work().tool("ask_ai", "openai")],
        [says(call("ask_ai", text="a"))],
    )
    paused = await asyncio.to_thread(ask, agent, SYNC)
    [pending] = pending_authorizations(paused)
    assert pending.url
    flow = Flow(pocket)
    flow.link = lambda: _soon(pending.url)  # type: ignore[method-assign]
    page = await deliver(await flow.form())
    for text in ("Acme Assistant", "alice@acme.test", "ask_ai", "OpenAI"):
        assert text in page.text


async def _soon(value: Any) -> Any:
    return value


async def test_help_that_is_not_https_is_not_linked(make: Make) -> None:
    """A row's link can neither run nor load without TLS."""
    for number, url in enumerate(("javascript:alert(1)", "http://acme.test/keys")):
        row = Provider(id=f"odd{number}", docs=url, token={})
        page = await deliver(
            await Flow(make(providers=[row]), f"odd{number}-token").form()
        )
        assert page.status_code == 200
        assert "<a " not in page.text
        assert url not in page.text


class Elements(HTMLParser):
    """What a browser finds in a page: elements with their attributes, and texts."""

    def __init__(self, page: httpx.Response) -> None:
        super().__init__()
        self.found: list[tuple[str, list[str]]] = []
        self.texts = ""
        self.feed(page.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, [name for name, _ in attrs]))

    def handle_data(self, data: str) -> None:
        self.texts += " ".join(data.split()) + "\n"


@pytest.mark.parametrize("planted", MARKUP)
async def test_markup_in_a_row_is_shown_as_text(make: Make, planted: str) -> None:
    """Labels, names and notes are text, also in what tells of a mistake."""
    shown = []
    for text in (planted, "value"):
        fields = {"token": {"label": text, "secret": True}}
        form = {"fields": fields, "note": text}
        row = Provider(id="odd", display_name=text, token=form)
        url = await Flow(make(providers=[row]), "odd-token").form()
        pages = [await deliver(url), await submit(url, token="")]
        shown.append([Elements(page) for page in pages])
    for evil, plain in zip(*shown, strict=True):
        assert evil.found == plain.found
        assert evil.texts == plain.texts.replace("value", planted)
        assert evil.texts.count(planted) >= 5


# ------------------------------------------------------- what fits and what does not


@pytest.mark.parametrize(
    ("typed", "kept"),
    [
        ({"token": "  ak_1 \n", "team": " a  b\t"}, {"token": "ak_1", "team": "a  b"}),
        ({"chain": PEM.replace("\n", "\r\n") + "\r\n"}, {"chain": PEM}),
        ({"chain": "a\tb"}, {"chain": "a\tb"}),
        ({"chain": "x" * (64 << 10)}, {"chain": "x" * (64 << 10)}),
        ({"chain": "ü" * (32 << 10)}, {"chain": "ü" * (32 << 10)}),
        ({"token": "ak_" + "x" * 4093}, {"token": "ak_" + "x" * 4093}),
        ({"team": "Zoë & <Söhne> %00"}, {"team": "Zoë & <Söhne> %00"}),
        *(({"team": text}, {"team": text}) for text in MARKUP),
        *(({"chain": text}, {"chain": text}) for text in MARKUP),
    ],
)
async def test_value_that_fits_is_kept_as_it_is(
    pocket: PocketAuth, typed: dict[str, str], kept: dict[str, str]
) -> None:
    """Space around it is dropped, lines end as in a file; nothing is shown."""
    flow = Flow(pocket, "acme-token")
    values = {"token": "ak_1", "team": "", "chain": ""} | typed
    page = await submit(await flow.form(), follow=True, **values)
    assert (page.status_code, outcome_of(page)) == (200, "connected")
    assert str(page.url).partition("/connect/")[1]
    for value in typed.values():
        assert value not in page.text
    found = (await flow.context()).to_dict()
    expected = {"token": "ak_1"} | kept
    assert found == {f"ACME_{n.upper()}": v for n, v in expected.items()}


UNFIT = {
    "missing": ("token", "", "Key"),
    "space only": ("token", " \r\n\t ", "Key"),
    "pattern": ("token", "zk_secret-7e1f", "Key"),
    "pattern in part": ("token", "ak_1 secret-7e1f", "Key"),
    "too long": ("token", "ak_" + "7e1f" * 1024, "Key"),
    "too long in bytes": ("team", "ü" * 2049, "Team"),
    "line break": ("team", "secret\n7e1f", "Team"),
    "CR LF": ("team", "secret\r\nX-Evil: 7e1f", "Team"),
    "line separator": ("team", "secret\u20287e1f", "Team"),
    "escape": ("team", "secret\x1b7e1f", "Team"),
    "masked copy": ("token", "ak_••••7e1f", "Key"),
    "65 KiB": ("chain", "7e1f" * ((65 << 10) // 4), "Certificates"),
    "control in lines": ("chain", "secret\x077e1f", "Certificates"),
    **{
        f"markup {number}": ("token", text, "Key") for number, text in enumerate(MARKUP)
    },
}


@pytest.mark.parametrize("case", UNFIT)
async def test_value_that_does_not_fit_is_asked_for_again(
    pocket: PocketAuth, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    """The page names the field and shows no value; the attempt is still good."""
    name, value, label = UNFIT[case]
    flow = Flow(pocket, "acme-token")
    url = await flow.form()
    good = {"token": "ak_other-secret", "team": "", "chain": ""} | {"token": "ak_1x9"}
    page = await submit(url, **good | {name: value})
    assert page.status_code == 422
    assert is_bare(page)
    alert = re.search(r'role="alert">([^<]+)<', page.text)
    assert alert is not None
    assert alert[1].startswith(f"“{label}” ")
    assert "ak_1x9" not in page.text
    if value.strip():
        assert value not in page.text
        assert value not in html.unescape(page.text)
        assert "7e1f" not in page.text + caplog.text
    [form] = read_page(page.text).forms
    assert {n: v for n, v in form.fields.items() if v} == {
        "attempt": query_of(url)["state"]
    }
    assert await flow.state() == "PENDING_RESOLVE"
    again = await submit(url, follow=True, **good)
    assert outcome_of(again) == "connected"


# --------------------------------------------------------- what is not an answer


async def test_attempt_belongs_to_its_own_form(pocket: PocketAuth) -> None:
    """Another provider's form, or another kind of the same, neither shows nor takes."""
    url = await Flow(pocket).form()
    for path in ("/auth/acme/token/", "/auth/openai/basic/", "/auth/none/token/"):
        other = re.sub(r"/auth/.*/(?=form)", path, url)
        for page in (await deliver(other), await submit(other, token=KEY)):
            assert (page.status_code, outcome_of(page)) == (403, "mismatch")
            assert is_bare(page)
    page = await submit(url, token=KEY, follow=True)
    assert outcome_of(page) == "connected"


async def test_attempt_of_a_login_has_no_form(make: Make) -> None:
    """A form does not take what another way of the provider asks for."""
    pocket = make(clients={"github": ("an-id", "a-secret")})
    left = await deliver(await Flow(pocket, "github-oauth2").link(), method="POST")
    state = query_of(html.unescape(left.text.partition("0;url=")[2].partition('"')[0]))
    form = f"{pocket.base_url}/auth/github/token/form?state={state['state']}"
    for page in (await deliver(form), await submit(form, token=KEY)):
        assert (page.status_code, outcome_of(page)) == (403, "mismatch")


@pytest.mark.parametrize(
    ("state", "status"), [("x" * 43, 404), ("", 400), ("ü", 404), ("a\0b", 400)]
)
async def test_unknown_attempt_has_no_form(
    pocket: PocketAuth, state: str, status: int
) -> None:
    """Nothing is shown and nothing taken without an attempt."""
    url = f"{pocket.base_url}/auth/openai/token/form"
    await Flow(pocket).link()
    shown = await deliver(url, params={"state": state})
    data = {"attempt": state, "token": KEY}
    taken = await deliver(url, method="POST", data=data)
    for page in (shown, taken):
        assert page.status_code == status
        assert is_bare(page)
        assert KEY not in page.text
    assert (await deliver(url)).status_code == 400


@pytest.mark.parametrize("planted", MARKUP)
async def test_no_parameter_is_reflected(pocket: PocketAuth, planted: str) -> None:
    """Whatever stands in path, query or body, no page repeats it."""
    url = await Flow(pocket).form()
    path, quoted = url.partition("?")[0], httpx.QueryParams({"x": planted})
    text = str(quoted).partition("=")[2].replace("%2F", "-")
    pages = [
        await deliver(f"{url}&{quoted}"),
        await deliver(path, params={"state": planted}),
        await deliver(f"{pocket.base_url}/auth/{text}/token/form?{url.split('?')[1]}"),
        await deliver(f"{pocket.base_url}/auth/openai/{text}/form?{url.split('?')[1]}"),
        await submit(url, token=KEY, **{planted: planted}),
        await submit(url, token=KEY, attempt=planted),
        await submit(url, redirect_uri=planted),
    ]
    for page in pages:
        assert is_bare(page)
        assert planted not in page.text
        assert html.escape(planted) not in page.text
        assert KEY not in page.text
    assert [page.status_code for page in pages] == [200, 404, 403, 403, 400, 404, 400]


async def test_form_expires(
    pocket: PocketAuth, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes too late is not kept, whether it fits or not."""
    flow = Flow(pocket)
    clock, url = Clock(monkeypatch), await flow.form()
    clock.forward(3600)
    for page in (
        await deliver(url),
        await submit(url, token=KEY),
        await submit(url, token=""),
    ):
        assert (page.status_code, outcome_of(page)) == (410, "expired")
    assert await flow.state() == "PENDING_RESOLVE"


async def test_form_of_a_connection_that_was_forgotten_is_over(
    pocket: PocketAuth,
) -> None:
    """Disconnecting ends the forms that are open."""
    flow = Flow(pocket)
    url = await flow.form()
    await pocket.delete_session("openai")
    for page in (await deliver(url), await submit(url, token=KEY)):
        assert (page.status_code, outcome_of(page)) == (410, "expired")
    assert await flow.state() == "NO_SESSION"


async def test_second_submit_changes_nothing(pocket: PocketAuth) -> None:
    """The same again gets the same page, something else is refused."""
    flow = Flow(pocket)
    url = await flow.form()
    pages = [await submit(url, token=KEY, follow=True) for _ in range(3)]
    assert {(p.status_code, outcome_of(p)) for p in pages} == {(200, "connected")}
    for other in ("sk-other-key", "", "ak_•"):
        page = await submit(url, token=other)
        assert (page.status_code, outcome_of(page)) == (409, "replayed")
    page = await deliver(url)
    assert (page.status_code, outcome_of(page)) == (409, "replayed")
    assert (await flow.context()).access_token == KEY


async def test_ten_submits_at_once_connect_once(pocket: PocketAuth) -> None:
    """A double click is one answer; of different ones the first counts."""
    flow = Flow(pocket)
    url = await flow.form()
    same = await asyncio.gather(
        *(submit(url, token=KEY, follow=True) for _ in range(10))
    )
    assert {outcome_of(page) for page in same} == {"connected"}
    await pocket.delete_session("openai")
    url = await flow.form()
    keys = [f"{KEY}-{number}" for number in range(10)]
    pages = await asyncio.gather(*(submit(url, token=key) for key in keys))
    assert sorted(page.status_code for page in pages) == [303] + [409] * 9
    won = [k for k, page in zip(keys, pages, strict=True) if page.status_code == 303]
    assert [(await flow.context()).access_token] == won


async def test_form_in_another_tab_tells_that_it_is_done(pocket: PocketAuth) -> None:
    """Who comes back to an open form sees that the account is connected."""
    flow = Flow(pocket)
    first, second = await flow.form(), await flow.form()
    await submit(first, token=KEY)
    page = await deliver(second, follow_redirects=True)
    assert (page.status_code, outcome_of(page)) == (200, "connected")


async def test_refusal_in_the_chat_does_not_lock_the_form(pocket: PocketAuth) -> None:
    """A person may think again."""
    agent, _ = build(
        "create_agent",
        pocket,
        [Work().tool("ask_ai", "openai")],
        [says(call("ask_ai", text="a"))],
    )
    paused = await asyncio.to_thread(ask, agent, SYNC)
    [pending] = pending_authorizations(paused)
    flow = Flow(pocket)
    flow.link = lambda: _soon(pending.url)  # type: ignore[method-assign]
    url = await flow.form()
    answer = resume(paused, decline=["openai"])
    await asyncio.to_thread(run, agent, answer, SYNC)
    assert (await deliver(url)).status_code == 200


# ------------------------------------------------------------- who may send what


@pytest.mark.parametrize(
    "headers",
    [
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "none"},
        {"origin": "https://evil.example"},
        {"origin": "null"},
    ],
)
async def test_other_sites_cannot_submit(
    pocket: PocketAuth, headers: dict[str, str]
) -> None:
    """A form of another page is refused, and the attempt stays the person's."""
    url = await Flow(pocket).form()
    data = {"attempt": query_of(url)["state"], "token": KEY}
    page = await deliver(
        url.partition("?")[0], method="POST", data=data, headers=headers
    )
    assert (page.status_code, outcome_of(page)) == (403, "mismatch")
    assert outcome_of(await submit(url, token=KEY, follow=True)) == "connected"


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_other_names_of_this_host_are_refused(
    pocket: PocketAuth, method: str
) -> None:
    """DNS rebinding comes with a name of its own."""
    url = await Flow(pocket).form()
    data = {"attempt": query_of(url)["state"], "token": KEY}
    asked: dict[str, Any] = {"data": data} if method == "POST" else {}
    page = await deliver(url, method=method, headers={"host": "evil.example"}, **asked)
    assert page.status_code == 421
    assert "password" not in page.text
    assert outcome_of(await submit(url, token=KEY, follow=True)) == "connected"


async def test_looking_at_a_form_changes_nothing(pocket: PocketAuth) -> None:
    """Scanners, prefetch and other methods leave the attempt to the person."""
    flow = Flow(pocket)
    url = await flow.form()
    for _ in range(5):
        assert (await deliver(url)).status_code == 200
    for method in ("HEAD", "OPTIONS", "PUT", "PATCH", "DELETE"):
        page = await deliver(url, method=method)
        assert (page.status_code, page.headers["allow"]) == (405, "GET, POST")
        assert is_bare(page)
    for name in ("sec-purpose", "purpose"):
        page = await deliver(url, headers={name: "prefetch"})
        assert (page.status_code, page.text) == (204, "")
    assert await flow.state() == "PENDING_RESOLVE"
    assert outcome_of(await submit(url, token=KEY, follow=True)) == "connected"


BODIES: dict[str, Callable[[str], dict[str, Any]]] = {
    "JSON": lambda s: {"json": {"attempt": s, "token": KEY}},
    "multipart": lambda s: {"data": {"attempt": s}, "files": {"token": KEY.encode()}},
    "text": lambda s: {
        "content": f"attempt={s}&token={KEY}",
        "headers": {"content-type": "text/plain"},
    },
    "no type": lambda s: {"content": f"attempt={s}&token={KEY}"},
    "nothing": lambda _: {},
    "value in the URL": lambda s: {
        "data": {"attempt": s, "token": KEY},
        "params": {"token": KEY},
    },
    "attempt in the URL": lambda s: {
        "data": {"token": KEY},
        "params": {"attempt": s},
    },
    "no attempt": lambda _: {"data": {"token": KEY}},
    "no field": lambda s: {"data": {"attempt": s}},
    "further field": lambda s: {"data": {"attempt": s, "token": KEY, "x": KEY}},
    "redirect_uri": lambda s: {
        "data": {"attempt": s, "token": KEY, "redirect_uri": "https://evil.example"}
    },
    "field twice": lambda s: {"data": {"attempt": s, "token": [KEY, KEY]}},
    "attempt twice": lambda s: {"data": {"attempt": [s, s], "token": KEY}},
    "NUL": lambda s: {"data": {"attempt": s, "token": f"{KEY}\0"}},
    "not UTF-8": lambda s: {
        "content": f"attempt={s}&token={KEY}%ff",
        "headers": {"content-type": "application/x-www-form-urlencoded"},
    },
    "too large": lambda s: {"data": {"attempt": s, "token": KEY * 20000}},
}


@pytest.mark.parametrize("case", BODIES)
async def test_body_that_is_no_form_of_ours_is_refused(
    pocket: PocketAuth, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    """Nothing of it is kept or shown; the attempt is still good."""
    flow = Flow(pocket)
    url = await flow.form()
    body = BODIES[case](query_of(url)["state"])
    page = await deliver(url.partition("?")[0], method="POST", **body)
    assert (page.status_code, outcome_of(page)) == (400, "malformed")
    assert is_bare(page)
    assert_no_leak([KEY], page.text, str(page.headers), caplog.text)
    assert await flow.state() == "PENDING_RESOLVE"
    assert outcome_of(await submit(url, token=KEY, follow=True)) == "connected"


async def test_credential_does_not_come_by_a_callback(pocket: PocketAuth) -> None:
    """An address that holds a key connects nothing."""
    flow = Flow(pocket)
    url = await flow.form()
    callback = url.replace("/form?", "/callback?") + f"&code={KEY}&token={KEY}"
    page = await deliver(callback)
    assert (page.status_code, outcome_of(page)) == (400, "malformed")
    assert await flow.state() == "PENDING_RESOLVE"


# -------------------------------------------------------------------- where it shows


async def test_query_is_hidden_from_access_logs(make: Make) -> None:
    """Whatever looks at the request afterwards finds no attempt in it."""
    pocket = make()
    url = await Flow(pocket).form()
    app, seen = FastAPI(), []
    app.include_router(pocket.router)

    async def logged(scope: Any, receive: Any, send: Any) -> None:
        await app(scope, receive, send)
        seen.append(scope["query_string"])

    transport = httpx.ASGITransport(logged)
    async with httpx.AsyncClient(transport=transport, timeout=BOUND_S) as http:
        for method in ("GET", "HEAD", "POST"):
            await http.request(method, url)
    assert seen == [b"", b"", b""]


def test_no_value_shows_anywhere(make: Make, tmp_path: Path) -> None:
    """Pages, logs, traces, checkpoints and the store hold nothing that was typed."""
    store, checkpoints = tmp_path / "sessions.db", tmp_path / "checkpoints.db"
    pocket = make(f"sqlite:///{store}")
    secrets = ["alice-the-user", "correct horse battery", KEY]
    secrets.append(basic(secrets[0], secrets[1]))
    typed = {"username": secrets[0], "password": secrets[1], "token": KEY}
    work, seen = Work(), []
    tools = [work.tool("pay", "openai"), work.tool("post", "basicauth")]
    script = [says(call("pay", text="a"), call("post", text="b"))]
    with LeakWatch() as watch, SqliteSaver.from_conn_string(str(checkpoints)) as saver:
        agent, _ = build("create_agent", pocket, tools, script, saver)
        config: Any = {
            "configurable": {"thread_id": "1"},
            "callbacks": watch.callbacks,
        }
        paused = ask(agent, SYNC, config)
        person = Browser("alice", fields=typed)
        for pending in pending_authorizations(paused):
            page = person.visit(pending.url)
            assert outcome_of(page) == "connected"
            seen += [page.text, str(page.headers), str(page.url), pending]
        done = run(agent, resume(paused), SYNC, config)
        assert work.names == ["pay", "post"]
        seen += [paused, done, pocket, list(saver.list(config))]
        context = asyncio.run(Flow(pocket, "basicauth").context())
        seen += [context, context.model_dump(), f"{context!r}"]
    pocket.close()
    assert any("pay did a" in text for text in watch.collected)
    watch.assert_clean(secrets, *seen, files=[store, checkpoints])


@pytest.mark.parametrize(
    "name", ["openai-token", "linkedin-basicauth", "jira-token", "acme-token"]
)
def test_tool_cannot_show_what_was_typed(pocket: PocketAuth, name: str) -> None:
    """Every secret of a form is masked in a tool's texts; what is none stays."""
    typed, token, _, _ = KINDS[name]
    secret = typed.get("token") or typed["password"]
    provider = Flow(pocket, name).names["auth_provider"]
    Need = Annotated[AuthContext, InjectedAuth(provider, handler=name)]  # noqa: N806

    @tool("blab")
    def blab(text: str, auth: Need) -> str:
        """Show all that it knows."""
        return f"{text} {auth.to_dict()} {auth.headers()}"

    @tool("breaks")
    def breaks(auth: Need) -> str:
        """Fail with all that it knows."""
        raise ValueError([*auth.to_dict().values(), *auth.headers().values()])

    calls = says(call("blab", text="a"), call("breaks"))
    retry = ToolRetryMiddleware(max_retries=0, on_failure="continue")
    agent = create_agent(
        ScriptedModel(script=[calls]),
        [blab, breaks],
        middleware=[pocket.middleware(), retry],
        checkpointer=InMemorySaver(),
    )
    paused = ask(agent, SYNC)
    [pending] = pending_authorizations(paused)
    with Browser("alice", fields=typed) as alice:
        assert outcome_of(alice.visit(pending.url)) == "connected"
    done = results(run(agent, resume(paused), SYNC))
    assert "***" in done["blab"].text
    assert "***" in done["breaks"].text
    shown = {"alice", "a@acme.test"} & {*typed.values()}
    assert all(value in done["blab"].text for value in shown)
    secrets = [secret, token, typed.get("chain", secret)]
    assert_no_leak([*secrets, basic(typed.get("email", "x"), secret)], done)


# --------------------------------------------------------------- the app's own key


def test_app_with_a_key_of_its_own_asks_nobody(make: Make) -> None:
    """The settings hold what the form requires, so the agent does not pause."""
    pocket = make(clients={"openai": {"token": f" {KEY} "}})
    work = Work()
    agent, _ = build(
        "create_agent",
        pocket,
        [work.tool("ask_ai", "openai")],
        [says(call("ask_ai", text="a"))],
    )
    done = ask(agent, SYNC)
    assert pending_authorizations(done) == []
    assert work.done == [("ask_ai", KEY)]


async def test_app_credential_of_several_fields_is_complete(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the environment; a field may be called as something of a login."""
    monkeypatch.setenv("POCKET_AUTH_CLIENTS__ADOBE__TOKEN", KEY)
    monkeypatch.setenv("POCKET_AUTH_CLIENTS__ADOBE__CLIENT_ID", "adobe-app")
    context = await Flow(make(), "adobe-token").context()
    assert context.headers() == {
        "Authorization": f"Bearer {KEY}",
        "x-api-key": "adobe-app",
    }
    assert context.to_dict() == {"ADOBE_TOKEN": KEY, "ADOBE_CLIENT_ID": "adobe-app"}


async def test_client_secret_can_be_a_field(make: Make) -> None:
    """What every registration has is read from there."""
    fields = {"client_secret": {"label": "Secret", "secret": True}}
    row = Provider(id="odd", keypair={"fields": fields})
    pocket = make(providers=[row], clients={"odd": ("odd-app", KEY)})
    assert (await Flow(pocket, "odd-keypair").context()).access_token == KEY


async def test_half_of_an_app_credential_is_none(make: Make) -> None:
    """Where a required value is not set, the person is asked for all."""
    pocket = make(clients={"jira": {"email": "app@acme.test", "token": ""}})
    flow = Flow(pocket, "jira-token")
    assert await flow.state() == "NO_SESSION"
    with pytest.raises(AuthorizationRequired):
        await flow.context()


async def test_app_key_that_was_changed_is_used_at_once(
    make: Make, tmp_path: Path
) -> None:
    """A session that was made of the old settings does not outlive them."""
    for key in (KEY, f"{KEY}-new"):
        pocket = make(f"sqlite:///{tmp_path}/p.db", clients={"openai": {"token": key}})
        assert (await Flow(pocket).context()).access_token == key
        pocket.close()


@pytest.mark.parametrize(
    "value", ["sk-\n7e1f", "sk-•7e1f", "sk-\udc807e1f", "7e1f" * 1025]
)
def test_app_key_that_does_not_fit_is_named_by_its_setting(
    make: Make, value: str
) -> None:
    """The operator learns where to look; the value is not shown."""
    pocket = make(clients={"openai": {"token": value}})
    with pytest.raises(ConfigurationError) as caught:
        pocket.make_request([], auth_handler_name="openai-token")
    assert "POCKET_AUTH_CLIENTS__OPENAI__TOKEN" in str(caught.value)
    assert "7e1f" not in repr(caught.value)
    assert "7e1f" not in repr(pocket)


# ------------------------------------------------------------------- own handlers


class AcmeKeys(FormHandler):
    """As somebody would write it."""

    row = Provider(
        id="acmekeys",
        token={
            "fields": {
                "region": {"label": "Region"},
                "first": {"label": "First key", "secret": True, "required": False},
                "other": {"label": "Other key", "secret": True, "required": False},
            }
        },
    )
    name = "keys-of-acme"


@pytest.mark.parametrize(
    ("typed", "token"),
    [({"first": "k1", "other": "k2"}, "k1"), ({"other": "k2"}, "k2"), ({}, "")],
)
async def test_own_handler_is_a_row(
    make: Make, typed: dict[str, str], token: str
) -> None:
    """The access token is the first secret that was typed."""
    flow = Flow(make(handlers=[AcmeKeys]), "keys-of-acme")
    url = await flow.form()
    assert "/auth/acmekeys/token/form" in url
    values = {"region": "eu", "first": "", "other": ""} | typed
    await submit(url, **values)
    context = await flow.context()
    assert context.access_token == token
    expected = {"ACMEKEYS_REGION": "eu"}
    assert context.to_dict() == expected | {
        f"ACMEKEYS_{name.upper()}": value for name, value in typed.items()
    }


async def test_basic_form_without_a_placement_gives_its_secret(make: Make) -> None:
    """Where the row does not say how user and password go, nothing is made up."""
    row = Provider(id="odd", basic={})
    flow = Flow(make(providers=[row]), "odd-basic")
    await submit(await flow.form(), token=KEY)
    assert (await flow.context()).headers() == {"Authorization": f"Bearer {KEY}"}


def test_handler_without_a_form_says_so(make: Make) -> None:
    """The developer learns what the row lacks."""

    class Odd(FormHandler):
        row = Provider(id="odd", basic={})

    with pytest.raises(ConfigurationError, match="'odd' has no token form"):
        make(handlers=[Odd]).make_request([], auth_handler_name="odd-token")


@pytest.mark.parametrize(
    "value", [KEY, {}, {"token": ""}, {"token": 7}, {"token": f"{KEY}\n"}]
)
async def test_answer_that_is_not_of_the_form_connects_nothing(
    pocket: PocketAuth, value: Any
) -> None:
    """What comes through the store of futures is checked like what is typed."""
    flow = Flow(pocket)
    uid = query_of(await flow.form())["state"]
    await asyncio.to_thread(FutureStore.resolve_future, uid, value)
    assert await flow.state() == "RESOLVED"
    if value == {"token": f"{KEY}\n"}:
        assert (await flow.context()).access_token == KEY
        return
    with pytest.raises(ProviderError) as caught:
        await flow.context()
    assert KEY not in repr(caught.value)
    assert await flow.state() == "PENDING_RESOLVE"


async def test_routes_of_a_third_party_do_not_hide_forms(make: Make) -> None:
    """A router that nests others is asked first and lets the rest through."""
    inner, outer = APIRouter(), APIRouter()

    @inner.get("/theirs/page")
    async def theirs() -> str:
        return "theirs"

    outer.include_router(inner)

    class Theirs(AuthHandlerInterface):
        name, description, scoped, router = "theirs", "", False, outer

        @staticmethod
        def provider() -> str:
            return "theirs"

        async def authenticate(self, *args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError

    url = await Flow(make(handlers=[Theirs])).form()
    assert (await deliver(url)).status_code == 200
    assert outcome_of(await submit(url, token=KEY, follow=True)) == "connected"
