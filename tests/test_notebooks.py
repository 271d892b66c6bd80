"""Notebooks: the committed ones, on a real kernel, and asking ahead of time."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nbformat
import pytest
from conftest import call, provider, says
from graphs import SYNC, Work, ask, build
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient
from support import BOUND_S, Clock, answer_url, link, query_of, state

import langchain_pocket_auth.notebook as notebook_module
from langchain_pocket_auth import (
    AuthorizationRefused,
    AuthorizationRequired,
    CallbackRefused,
    OwnerUnknown,
    PendingAuthorization,
    PocketAuth,
    ProviderError,
    ScopeWithheld,
    pending_authorizations,
)
from langchain_pocket_auth._cards import Card
from langchain_pocket_auth.testing import AuthorizationServer, Browser, assert_no_leak

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
CELL_S = 30.0
Make = Callable[..., PocketAuth]


class Links(HTMLParser):
    """Where the links of a page lead, and which elements it has."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.elements: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        self.links += [v or "" for k, v in attrs if k == "href"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home for kernels, and for what they would leave there."""
    folder = tmp_path / "home"
    for name in ("HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(folder / name))
    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):
        monkeypatch.setenv(name, str(folder / name))
    (folder / "HOME").mkdir(parents=True)
    return folder


# Every random value that the kernel makes: states, verifiers, tokens, codes, tickets.
# Shorter ones are the names of questions.
SPY = """
import secrets
_made, _token_urlsafe = [], secrets.token_urlsafe
def spied(size=None):
    value = _token_urlsafe(size)
    if size != 16:
        _made.append(value)
    return value
secrets.token_urlsafe = spied
"""
REPORT = """
import json
json.dumps([_made, [*server.issued_access_tokens, *server.issued_refresh_tokens,
                    *server.issued_codes]])
"""


PAUSE = "\npending_authorizations("


def evaluated(text: str) -> Any:
    """Read the `repr` of a JSON text, as a cell shows it."""
    return json.loads(text.strip("'"))


# ------------------------------------------------------------------- the committed ones


def test_there_are_notebooks() -> None:
    """The two that the README points to."""
    assert [n.name for n in NOTEBOOKS] == ["01_quickstart.ipynb", "02_agent.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_notebook_is_committed_without_what_a_run_left(path: Path) -> None:
    """No outputs, no numbers, nothing of the machine it was written on."""
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert notebook.metadata == {
        "kernelspec": {
            "display_name": "Python 3",
            "language": "python",
            "name": "python3",
        },
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        assert cell.metadata == {}
        assert cell.cell_type == "markdown" or cell.outputs == []
        assert cell.get("execution_count") is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_notebook_can_be_run_again_and_keeps_no_secret(
    path: Path, home: Path, tmp_path: Path
) -> None:
    """Nobody is needed; the pause is a card; what is saved has links of ours only."""
    folder = tmp_path / "notebooks"
    shutil.copytree(path.parent, folder)
    before = sorted(folder.iterdir())
    notebook = nbformat.read(folder / path.name, 4)
    first = [cell for cell in notebook.cells if cell.cell_type == "code"]
    # Once more from top to bottom, the cell that makes the pocket twice.
    sources = [cell.source for cell in first]
    [pocket] = [n for n, source in enumerate(sources) if "pocket = " in source]
    order = [*range(pocket + 1), *range(pocket, len(sources))]
    if not any("auto_resume" in source for source in sources):
        # And while a run is paused: the link that is shown goes on working.
        pause = next(n for n, source in enumerate(sources) if PAUSE in source)
        order.insert(order.index(pause) + 1, pocket)
    again = [nbformat.v4.new_code_cell(sources[n]) for n in order]
    report = nbformat.v4.new_code_cell(REPORT)
    spied = nbformat.v4.new_code_cell(SPY)
    notebook.cells = [spied, *first, *again, report]
    NotebookClient(
        notebook,
        timeout=CELL_S,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
    ).execute()

    random, issued = evaluated(report.outputs[0].data["text/plain"])
    saved = json.dumps([c.get("outputs") for c in [*first, *again]])
    tickets = re.findall(r"/connect/([\w-]+)", saved)
    secrets = {*issued, *random} - set(tickets)
    assert len(issued) >= 3
    assert {value.partition("_")[2] for value in issued} <= {*random}  # none is missed
    assert_no_leak(secrets, saved, files=[home])
    with pytest.raises(AssertionError):  # it would be seen
        assert_no_leak(secrets, json.dumps(report.outputs))

    for cells in (first, again):
        cards = [
            output.data["text/html"]
            for cell in cells
            for output in cell.get("outputs", ())
            if "text/html" in output.get("data", {})
        ]
        links = [url for card in cards for url in Links(card).links]
        assert links
        assert all(re.search(r"//127\.0\.0\.1:\d+/connect/", url) for url in links)
    assert sorted(folder.iterdir()) == before
    assert list(home.rglob("*pocket*")) == []


# ------------------------------------------------------------------------------- cards


MARKUP = "<script>alert(1)</script>\"'&"


def pending(**fields: Any) -> PendingAuthorization:
    known: dict[str, Any] = {
        "key": "k",
        "url": "http://127.0.0.1:1/connect/t",
        "message": "Connect",
        "provider": "acme",
        "handler": "acme-oauth2",
        "profile": "default",
        "state": "NO_SESSION",
        "reason": "Acme is not connected yet",
        "scopes": ("read",),
        "missing_scopes": (),
        "account": None,
        "tools": ("look",),
        "tool_call_ids": (),
        "expires_at": datetime.now(UTC),
    }
    return PendingAuthorization(**known | fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"message": MARKUP},
        {"reason": MARKUP},
        {"scopes": (MARKUP,)},
        {"account": MARKUP},
        {"provider": MARKUP},
        {"handler": MARKUP},
        {"profile": MARKUP},
        {"tools": (MARKUP,)},
        {"missing_scopes": (MARKUP,)},
        {"url": f"http://127.0.0.1:1/connect/{MARKUP}"},
    ],
    ids=lambda f: next(iter(f)),
)
def test_card_shows_markup_as_text(fields: dict[str, Any]) -> None:
    """Whatever a provider or a payload says, the card has its own elements only."""
    card = pending(**fields)
    html = card._repr_html_()
    assert Links(html).elements <= {"div", "strong", "a"}
    assert Links(html).links == [card.url]


@pytest.mark.parametrize("part", ["title", "line", "button"])
def test_card_of_connect_shows_markup_as_text(part: str) -> None:
    """So it is with what `connect` shows."""
    words = dict.fromkeys(["title", "line", "button"], "plain") | {part: MARKUP}
    html = Card(
        words["title"], (words["line"],), "http://x.test", words["button"]
    )._repr_html_()
    assert Links(html).elements == {"div", "strong", "a"}
    assert "<script" not in html


@pytest.mark.parametrize(
    "url",
    [
        "javascript:alert(1)",
        " javascript:alert(1)",
        "JavaScript:alert(1)//http://x.test",
        "data:text/html,x",
        "//x.test",
        "\thttp://x.test",
        "",
    ],
)
def test_card_links_to_pages_only(url: str) -> None:
    """A payload cannot make the button run a script."""
    assert Links(pending(url=url)._repr_html_()).links == []


def test_list_of_what_is_pending_is_a_card_each(
    make_pocket: Make, server: AuthorizationServer
) -> None:
    """And says so when there is none; names of provider, tool and scope are text."""
    odd = provider(server, "odd", display_name=MARKUP)
    pocket = make_pocket(providers=[odd], clients={"odd": ("odd-client", "secret")})
    work = Work()
    tools = [work.tool("look", "odd", MARKUP), work.tool("post", "zeta", "send")]
    script = [says(call("look", text="x"), call("post", text="x"))]
    graph, _ = build("create_agent", pocket, tools, script)
    found = pending_authorizations(ask(graph, SYNC))
    assert isinstance(found, list)
    html = found._repr_html_()
    assert Links(html).links == [p.url for p in found]
    assert Links(html).elements == {"div", "strong", "a"}
    assert all(text in html for text in ("look", "post", "send", "&lt;script&gt;"))
    assert "Nothing" in pending_authorizations({})._repr_html_()
    assert repr(Card("Title", ("line",), "http://x")) == "Title\nline\nhttp://x"


# --------------------------------------------------------------- asking, in a terminal


LINK = re.compile(r"http://\S+/connect/\S+")
PAGE = re.compile(r"http://\S+/authorize\S+")


def port_of(base_url: str) -> int:
    return int(base_url.rpartition(":")[2])


async def shown(capsys: pytest.CaptureFixture[str], pattern: str = LINK.pattern) -> str:
    """Return what was printed, as soon as it is."""
    text = ""
    async with asyncio.timeout(BOUND_S):
        while not (found := re.search(pattern, text)):
            await asyncio.sleep(0.01)
            text += capsys.readouterr().out
    return found.group()


async def test_connect_prints_the_link_and_waits(
    pocket: PocketAuth, alice: Browser, capsys: pytest.CaptureFixture[str]
) -> None:
    """What comes back shows no token; connected, nothing is printed any more."""
    asked: dict[str, Any] = {"scopes": ["read"], "profile": "work"}
    asking = asyncio.create_task(pocket.connect("acme", **asked))
    card = await shown(capsys, rf"[\s\S]*{LINK.pattern}")
    assert "Permissions: read\nProfile: work\n" in card
    await alice.avisit(card.split()[-1])
    context = await asyncio.wait_for(asking, BOUND_S)
    assert context.scopes == ["read"]
    assert context.access_token not in repr(context)
    assert "Acme is connected" in capsys.readouterr().out
    await pocket.connect("acme", **asked)
    assert capsys.readouterr().out == ""


async def test_connect_ends_with_a_reason(
    pocket: PocketAuth, alice: Browser, capsys: pytest.CaptureFixture[str]
) -> None:
    """The person did not come, said no, or the program gave up."""
    with pytest.raises(AuthorizationRequired):
        await pocket.connect("acme", timeout=0.05)
    assert "Acme is not connected" in capsys.readouterr().out
    asking = asyncio.create_task(pocket.connect("acme"))
    await alice.avisit(await shown(capsys), approve=False)
    with pytest.raises(AuthorizationRefused):
        await asyncio.wait_for(asking, BOUND_S)
    asking = asyncio.create_task(pocket.connect("acme"))
    await shown(capsys)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(asking, BOUND_S)
    assert "Acme is not connected" in capsys.readouterr().out


async def test_connect_takes_what_a_paused_run_waits_for(
    make_pocket: Make, alice: Browser, capsys: pytest.CaptureFixture[str]
) -> None:
    """For the owner who paused, whoever that is."""
    pocket, work = make_pocket(owner=lambda _: "ann"), Work()
    script = [says(call("look", text="x"))]
    tools = [work.tool("look", "acme", "read")]
    graph, _ = build("create_agent", pocket, tools, script)
    paused = await asyncio.to_thread(ask, graph, SYNC)
    [found] = pending_authorizations(paused)
    asking = asyncio.create_task(pocket.connect(found, owner="bob"))
    assert await shown(capsys) == found.url
    await alice.avisit(found.url)
    assert (await asyncio.wait_for(asking, BOUND_S)).scopes == ["read"]
    assert await state(pocket, "read", owner="ann") == "SKIP_AUTH"
    assert await state(pocket, "read", owner="bob") == "NO_SESSION"


async def test_connect_asks_whose_account_is_meant(
    make_pocket: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where that is a function of the run, and there is none."""
    pocket = make_pocket(owner=lambda _: "ann")
    for connect in (pocket.connect, pocket.wait_connected):
        with pytest.raises(OwnerUnknown, match="owner="):
            await connect("acme")
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------------- pasting it back


class Remote:
    """A person whose browser does not reach this machine, and what they paste."""

    def __init__(self, person: Browser, capsys: pytest.CaptureFixture[str]) -> None:
        self.person, self._capsys = person, capsys
        self.texts: list[str | Callable[[], str]] = []
        self.pages: list[str] = []
        self.printed = ""

    def getpass(self, prompt: str) -> str:
        """Stand in for the terminal."""
        assert "address" in prompt
        self.look()
        self.pages.append(PAGE.findall(self.printed)[-1])
        text = self.texts.pop(0)
        return text if isinstance(text, str) else text()

    def look(self) -> str:
        """Read the screen."""
        self.printed += self._capsys.readouterr().out
        return self.printed

    def agrees(self) -> str:
        """Agree on the page that is shown; the answer, which the browser cannot load."""
        return self.person.authorize(self.pages[-1])

    def declines(self) -> str:
        """Say no there."""
        return self.person.authorize(self.pages[-1], approve=False)


@pytest.fixture
def remote(
    monkeypatch: pytest.MonkeyPatch,
    alice: Browser,
    capsys: pytest.CaptureFixture[str],
) -> Remote:
    """What the person pastes goes into its `texts`."""
    found = Remote(alice, capsys)
    monkeypatch.setattr(notebook_module.getpass, "getpass", found.getpass)
    return found


async def pasting(pocket: PocketAuth, *scopes: str, **who: Any) -> Any:
    """Connect acme from afar."""
    work = pocket.connect("acme", scopes=scopes or ["read"], paste=True, **who)
    return await asyncio.wait_for(work, BOUND_S)


async def test_pasted_address_connects_without_a_callback_server(
    pocket: PocketAuth, remote: Remote
) -> None:
    """Nothing listens at the callback at all; quotes and spaces do no harm."""
    remote.texts = [lambda: f' "{remote.agrees()}"\n']
    context = await pasting(pocket)
    assert context.scopes == ["read"]
    assert remote.look().rstrip().endswith("Acme is connected.")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port_of(pocket.base_url)))


BAD = {
    "nothing": "",
    "words": "no address",
    "a link of ours": "{base}/connect/x",
    "no parameters": "{base}/auth/acme/oauth2/callback",
    "unknown": "{base}/auth/acme/oauth2/callback?state=x&code=y",
    "another host": "http://127.0.0.1:9/auth/acme/oauth2/callback?{query}",
    "another provider": "{base}/auth/zeta/oauth2/callback?{query}",
    "another scheme": "https{host}/auth/acme/oauth2/callback?{query}",
    "no code": "{base}/auth/acme/oauth2/callback?state={state}",
    "two states": "{base}/auth/acme/oauth2/callback?{query}&state=x",
    "another issuer": "{base}/auth/acme/oauth2/callback?{query}&iss=http://x.test",
    "not ascii": "{base}/auth/acme/oauth2/callback?{query}&x=\u00e9",
    "half": "http://[::1",
}


@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
async def test_what_is_no_answer_can_be_pasted_again(
    pocket: PocketAuth, remote: Remote, server: AuthorizationServer, text: str
) -> None:
    """It spends nothing: the right address still connects."""
    good: list[str] = []

    def wrong() -> str:
        good.append(remote.agrees())
        query = good[0].partition("?")[2]
        if "iss=" in text:
            query = query.partition("&iss=")[0]
        return text.format(
            base=pocket.base_url,
            host=pocket.base_url.removeprefix("http"),
            query=query,
            state=query_of(good[0])["state"],
        )

    remote.texts = [wrong, lambda: good[0]]
    assert (await pasting(pocket)).access_token in server.issued_access_tokens
    assert "try again" in remote.look()
    assert remote.pages == [remote.pages[0]] * 2


async def test_pasting_nonsense_is_not_asked_for_ever(
    pocket: PocketAuth, remote: Remote
) -> None:
    """After three times the error says why."""
    remote.texts = ["x", "y", "z"]
    with pytest.raises(CallbackRefused, match="malformed"):
        await pasting(pocket)
    assert remote.look().rstrip().endswith("Acme is not connected.")


async def test_address_of_another_question_is_refused_and_not_spent(
    make_pocket: Make, remote: Remote, alice: Browser
) -> None:
    """What is pasted must answer this very question; the other one still can be."""
    pocket = make_pocket()
    other = await link(pocket, "write", owner="bob")
    page = await pocket._service.ask(
        lambda e: e.attempts.begin(other.rpartition("/")[2])
    )
    foreign = await answer_url(alice, page)
    remote.texts = [foreign] * 3
    with pytest.raises(CallbackRefused, match="mismatch"):
        await pasting(pocket)
    assert await state(pocket, "write", owner="bob") == "PENDING_RESOLVE"
    assert (await alice.avisit(foreign)).status_code == 200
    assert await state(pocket, "write", owner="bob") == "SKIP_AUTH"
    assert await state(pocket, "read") != "SKIP_AUTH"


async def test_address_is_good_once(
    pocket: PocketAuth, remote: Remote, server: AuthorizationServer
) -> None:
    """Of an earlier question, or of an exchange that failed, it connects nothing."""
    first: list[str] = []
    remote.texts = [lambda: first.append(remote.agrees()) or first[0]]
    await pasting(pocket)
    await pocket.delete_session("acme")
    remote.texts = [first[0]] * 3
    with pytest.raises(CallbackRefused, match="mismatch"):
        await pasting(pocket)

    server.fault("503")
    spent: list[str] = []
    remote.texts = [lambda: spent.append(remote.agrees()) or spent[0], *spent]
    with pytest.raises(ProviderError):
        await pasting(pocket)
    remote.texts = [spent[0]]
    with pytest.raises(ProviderError):
        await pasting(pocket)
    assert server.code_replays == 0
    remote.texts = [remote.agrees]
    assert (await pasting(pocket)).access_token
    assert len(server.issued_access_tokens) == 2


async def test_pasted_refusal_is_one(pocket: PocketAuth, remote: Remote) -> None:
    """Who said no at the provider has said no here."""
    remote.texts = [remote.declines]
    with pytest.raises(AuthorizationRefused):
        await pasting(pocket)
    assert remote.look().rstrip().endswith("Acme is not connected.")


async def test_pasted_consent_to_less_is_said(
    pocket: PocketAuth, remote: Remote, server: AuthorizationServer
) -> None:
    """The missing permission is named; what was granted can be used."""
    server.withhold = {"write"}
    remote.texts = [remote.agrees]
    with pytest.raises(ScopeWithheld, match="write"):
        await pasting(pocket, "read", "write")
    assert remote.look().rstrip().endswith("Acme is not connected.")
    assert (await pasting(pocket, "read")).scopes == ["read"]


@pytest.mark.parametrize("approve", [True, False])
async def test_pasting_what_the_callback_has_seen_tells_the_truth(
    pocket: PocketAuth, remote: Remote, approve: bool
) -> None:
    """The browser had reached the callback after all: that is how it ended."""
    await pocket.serve()

    def loaded() -> str:
        address = remote.agrees() if approve else remote.declines()
        remote.person.open(address)
        return address

    remote.texts = [loaded]
    if approve:
        assert (await pasting(pocket)).access_token
    else:
        with pytest.raises(AuthorizationRefused):
            await pasting(pocket)
    said = "Acme is connected." if approve else "Acme is not connected."
    assert remote.look().rstrip().endswith(said)


async def test_pasting_for_what_was_disconnected_meanwhile_connects_nothing(
    pocket: PocketAuth, remote: Remote
) -> None:
    """Neither the person's refusal nor a connection: it has to be asked again."""
    await pocket.serve()

    def loaded() -> str:
        remote.person.open(address := remote.agrees())
        assert asyncio.run(pocket.delete_session("acme"))
        return address

    remote.texts = [loaded]
    with pytest.raises(AuthorizationRequired):
        await pasting(pocket)
    assert remote.look().rstrip().endswith("Acme is not connected.")
    remote.texts = [remote.agrees]
    assert (await pasting(pocket)).access_token


async def test_who_comes_too_late_begins_anew(
    pocket: PocketAuth, remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attempt lives ten minutes; then the page is shown with another one."""
    clock = Clock(monkeypatch)

    def late() -> str:
        clock.forward(601)
        return remote.agrees()

    remote.texts = [late, remote.agrees]
    assert (await pasting(pocket)).access_token
    assert "too long" in remote.look()
    first, second = (query_of(page)["state"] for page in remote.pages)
    assert first != second


# ------------------------------------------------------------------------ a real kernel


class Kernel:
    """A kernel, and what a notebook's file would keep of its outputs."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def cell(
        self,
        code: str,
        *,
        seen: Callable[[str], None] | None = None,
        typed: Callable[[str], str] | None = None,
    ) -> tuple[str, list[dict[str, Any]]]:
        """
        Run a cell.

        Args:
            code: Its text.
            seen: Called with the HTML of each card when it is first shown.
            typed: What the person types, given the card above the field; without
                it, there is no field.

        Returns:
            `ok` or the error's name, and the outputs that remain.
        """
        outputs: list[dict[str, Any]] = []
        prompts = [""]  # the card above each

        def html() -> str:
            return str(outputs[-1]["data"]["text/html"]) if outputs else ""

        def hear(message: Any) -> None:
            kind, content = message["msg_type"], message["content"]
            if kind == "update_display_data":
                name = content["transient"]["display_id"]
                for output in outputs:
                    if output.get("transient", {}).get("display_id") == name:
                        output["data"] = content["data"]
            elif kind in {"display_data", "execute_result", "stream", "error"}:
                outputs.append(content)
                if kind == "display_data" and seen:
                    seen(html())

        def asked(message: Any) -> None:
            assert message["content"]["password"] is True
            assert typed is not None
            while html() == prompts[-1]:  # the card comes on another channel
                hear(self._client.get_iopub_msg(timeout=CELL_S))
            prompts.append(html())
            self._client.input(typed(html()))

        content = self._client.execute_interactive(
            code,
            timeout=CELL_S,
            output_hook=hear,
            allow_stdin=typed is not None,
            stdin_hook=asked,
        )["content"]
        return content.get("ename") or content["status"], outputs

    def value(self, code: str) -> Any:
        """Evaluate an expression to JSON."""
        status, [output] = self.cell(f"import json; json.dumps({code})")
        assert status == "ok"
        return evaluated(output["data"]["text/plain"])


@pytest.fixture
def kernel(home: Path) -> Iterator[Kernel]:
    """A kernel in which the second notebook has made its pocket."""
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(home))
    client = manager.blocking_client()
    try:
        client.start_channels()
        client.wait_for_ready(timeout=CELL_S)
        kernel = Kernel(client)
        for code in [SPY, *sources_until_pocket()]:
            assert kernel.cell(code) == ("ok", [])
        yield kernel
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
        manager.cleanup_resources()


def sources_until_pocket() -> Iterator[str]:
    for cell in nbformat.read(NOTEBOOKS[1], 4).cells:
        if cell.cell_type == "code":
            yield cell.source
            if "pocket = " in cell.source:
                return


def snippet() -> str:
    """Return the code that the second notebook gives for remote kernels."""
    texts = "\n".join(c.source for c in nbformat.read(NOTEBOOKS[1], 4).cells)
    [code] = re.findall(r"```python\n(.*?)```", texts, re.DOTALL)
    return str(code)


def shown_html(outputs: list[dict[str, Any]]) -> list[str]:
    return [o["data"]["text/html"] for o in outputs if "text/html" in o.get("data", {})]


def test_connect_shows_a_card_in_a_kernel_until_it_is_done(
    kernel: Kernel, alice: Browser, home: Path
) -> None:
    """A button to click; then the card says how it ended, and the result is masked."""
    cards: list[str] = []

    def clicked(html: str) -> None:
        cards.append(html)
        [url] = Links(html).links
        assert "/connect/" in url
        assert alice.visit(url, approve=len(cards) > 1).status_code == 200

    code = "await pocket.connect('mail', scopes=['send'], profile='work')"
    status, outputs = kernel.cell(code, seen=clicked)
    assert status == "AuthorizationRefused"
    [html] = shown_html(outputs)
    assert "Mail is not connected" in html

    status, outputs = kernel.cell(code, seen=clicked)
    assert status == "ok"
    assert "Permissions: send" in cards[1]
    assert "Profile: work" in cards[1]
    [html] = shown_html(outputs)
    assert "Mail is connected" in html
    assert not Links(html).links
    assert "Mail account" in outputs[-1]["data"]["text/plain"]
    made = kernel.value("_made")  # the links are used and over
    assert len(made) > 6
    assert_no_leak(made, json.dumps(outputs), files=[home])

    status, outputs = kernel.cell(code, seen=clicked)
    assert (status, shown_html(outputs)) == ("ok", [])


def test_remote_kernel_takes_the_address_and_keeps_nothing(
    kernel: Kernel, alice: Browser, home: Path
) -> None:
    """As the second notebook says, through the kernel's own field."""
    addresses = ["no address"]
    states: list[str] = []

    def typed(html: str) -> str:
        [url] = Links(html).links
        assert url.startswith(kernel_pages)
        states.append(query_of(url)["state"])
        if addresses:
            return addresses.pop()
        assert "try again" in html
        return alice.authorize(url)

    kernel_pages = kernel.value("server.authorization_endpoint")
    status, outputs = kernel.cell(snippet())
    assert status == "StdinNotImplementedError"
    assert "Mail is not connected" in shown_html(outputs)[0]

    status, outputs = kernel.cell(snippet(), typed=typed)
    assert status == "ok", outputs
    assert states == [states[0]] * 2
    [html] = shown_html(outputs)
    assert "Mail is connected" in html
    assert not Links(html).links
    assert "Mail account" in outputs[-1]["data"]["text/plain"]
    made = kernel.value("_made")
    assert states[0] in made
    assert_no_leak(made, json.dumps(outputs), files=[home])
    port = port_of(kernel.value("base_url"))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
