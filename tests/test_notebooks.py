"""Notebooks: the committed ones, on a real kernel, and asking ahead of time."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nbformat
import pytest
from conftest import call, says
from graphs import SYNC, Work, ask, build
from jupyter_client.manager import start_new_kernel
from nbclient import NotebookClient
from support import BOUND_S, answer_url, link, query_of, state

import langchain_pocket_auth.notebook as notebook_module
from langchain_pocket_auth import (
    AuthorizationRefused,
    AuthorizationRequired,
    CallbackRefused,
    PendingAuthorization,
    PocketAuth,
    pending_authorizations,
)
from langchain_pocket_auth._cards import Card
from langchain_pocket_auth.testing import AuthorizationServer, Browser, assert_no_leak

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
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


# ------------------------------------------------------------------- the committed ones


def test_there_are_notebooks() -> None:
    """The two that the README points to."""
    assert [n.name for n in NOTEBOOKS] == ["01_quickstart.ipynb", "02_agent.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_notebook_runs_from_top_to_bottom_and_shows_no_secret(path: Path) -> None:
    """On a real kernel, without a person; the pause is a card with a button."""
    notebook = nbformat.read(path, 4)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert not any(c.outputs or c.execution_count for c in code), "clear the outputs"
    # Before the last cell ends the server: what must not be in any output.
    secrets = nbformat.v4.new_code_cell(
        "import json; print('SECRETS', json.dumps([*server.issued_access_tokens, "
        "*server.issued_refresh_tokens, *server.issued_codes]))"
    )
    notebook.cells.insert(len(notebook.cells) - 1, secrets)
    NotebookClient(notebook, timeout=BOUND_S, kernel_name="python3").execute()
    found = json.loads(secrets.outputs[0].text.removeprefix("SECRETS "))
    assert len(found) >= 3
    secrets.outputs = []
    outputs = [o for c in code for o in c.outputs]
    assert_no_leak(found, json.dumps(outputs))
    cards = [o.data["text/html"] for o in outputs if "text/html" in o.get("data", {})]
    links = [url for card in cards for url in Links(card).links]
    assert links
    assert all("/connect/" in url for url in links)


# ------------------------------------------------------------------------------- cards


MARKUP = "<script>alert(1)</script>\"'&"


def pending(**fields: Any) -> PendingAuthorization:
    from datetime import UTC, datetime

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
        {"url": f"http://127.0.0.1:1/connect/{MARKUP}"},
    ],
    ids=lambda f: next(iter(f)),
)
def test_card_shows_markup_as_text(fields: dict[str, Any]) -> None:
    """Whatever a provider or a payload says, the card has its own elements only."""
    html = pending(**fields)._repr_html_()
    assert Links(html).elements <= {"div", "strong", "a"}
    assert len(Links(html).links) == 1


@pytest.mark.parametrize("url", ["javascript:alert(1)", "data:text/html,x", "//x.test"])
def test_card_links_to_pages_only(url: str) -> None:
    """A payload cannot make the button run a script."""
    assert Links(pending(url=url)._repr_html_()).links == []


def test_list_of_what_is_pending_is_a_card_each(pocket: PocketAuth) -> None:
    """And says so when there is none."""
    work = Work()
    tools = [work.tool("look", "acme", "read"), work.tool("post", "zeta")]
    script = [says(call("look", text="x"), call("post", text="x"))]
    graph, _ = build("create_agent", pocket, tools, script)
    found = pending_authorizations(ask(graph, SYNC))
    assert isinstance(found, list)
    assert Links(found._repr_html_()).links == [p.url for p in found]
    assert "read" in found._repr_html_()
    assert "Nothing" in pending_authorizations({})._repr_html_()
    assert repr(Card("Title", ("line",), "http://x")) == "Title\nline\nhttp://x"


# --------------------------------------------------------------- asking, in a terminal


async def shown_link(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the link that was printed, as soon as it is."""
    text = ""
    async with asyncio.timeout(BOUND_S):
        while not (found := re.search(r"http://\S+", text)):
            await asyncio.sleep(0.01)
            text += capsys.readouterr().out
    return found.group()


async def test_connect_prints_the_link_and_waits(
    pocket: PocketAuth, alice: Browser, capsys: pytest.CaptureFixture[str]
) -> None:
    """What comes back shows no token; connected, nothing is printed any more."""
    asking = asyncio.create_task(pocket.connect("acme", scopes=["read"]))
    await alice.avisit(await shown_link(capsys))
    context = await asyncio.wait_for(asking, BOUND_S)
    assert context.scopes == ["read"]
    assert context.access_token not in repr(context)
    assert "Acme is connected" in capsys.readouterr().out
    await pocket.connect("acme", scopes=["read"])
    assert capsys.readouterr().out == ""


async def test_connect_ends_with_a_reason(
    pocket: PocketAuth, alice: Browser, capsys: pytest.CaptureFixture[str]
) -> None:
    """The person said no, or did not come."""
    with pytest.raises(AuthorizationRequired):
        await pocket.connect("acme", timeout=0.05)
    assert "Acme is not connected" in capsys.readouterr().out
    asking = asyncio.create_task(pocket.connect("acme"))
    await alice.avisit(await shown_link(capsys), approve=False)
    with pytest.raises(AuthorizationRefused):
        await asyncio.wait_for(asking, BOUND_S)


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
    assert await shown_link(capsys) == found.url
    await alice.avisit(found.url)
    assert (await asyncio.wait_for(asking, BOUND_S)).scopes == ["read"]
    assert await state(pocket, "read", owner="ann") == "SKIP_AUTH"
    assert await state(pocket, "read", owner="bob") == "NO_SESSION"


# ---------------------------------------------------------------------- pasting it back


@pytest.fixture
def pasted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the person pastes, one after the other: a text or a function of nothing."""
    texts: list[Any] = []

    def getpass(prompt: str) -> str:
        assert "address" in prompt
        text = texts.pop(0)
        return str(text() if callable(text) else text)

    monkeypatch.setattr(notebook_module.getpass, "getpass", getpass)
    return texts


async def test_pasted_address_connects_without_a_callback_server(
    make_pocket: Make,
    alice: Browser,
    pasted: list[Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The browser is elsewhere: nothing listens at the callback at all."""
    pocket = make_pocket()

    def address() -> str:
        text = capsys.readouterr().out
        url = re.search(r"http://\S+/authorize\S+", text)
        assert url is not None, text
        return asyncio.run(answer_url(alice, url.group()))

    pasted += [
        "",
        "no address",
        f"{pocket.base_url}/auth/acme/oauth2/callback",
        address,
    ]
    with pytest.raises(CallbackRefused):
        await pocket.connect("acme", scopes=["read"], paste=True)
    assert (await pocket.connect("acme", scopes=["read"], paste=True)).access_token
    out = capsys.readouterr().out
    assert "Acme is connected" in out
    assert "state=" not in out.partition("Acme is connected")[2]
    assert pocket._server is None


async def test_address_of_another_question_is_refused_and_not_spent(
    make_pocket: Make, pasted: list[Any], alice: Browser
) -> None:
    """What is pasted must answer this very question; the other one still can be."""
    pocket = make_pocket()
    other = await link(pocket, "write", owner="bob")
    page = await pocket._service.ask(
        lambda e: e.attempts.begin(other.rpartition("/")[2])
    )
    foreign = await answer_url(alice, page)
    pasted += [foreign] * 3
    with pytest.raises(CallbackRefused, match="mismatch"):
        await pocket.connect("acme", scopes=["read"], paste=True)
    assert await state(pocket, "write", owner="bob") == "PENDING_RESOLVE"
    assert (await alice.avisit(foreign)).status_code == 200
    assert await state(pocket, "write", owner="bob") == "SKIP_AUTH"
    assert await state(pocket, "read") != "SKIP_AUTH"


async def test_pasted_refusal_is_one(
    make_pocket: Make,
    alice: Browser,
    pasted: list[Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Who said no at the provider has said no here."""
    pocket = make_pocket()

    def address() -> str:
        url = re.search(r"http://\S+/authorize\S+", capsys.readouterr().out)
        assert url is not None
        return asyncio.run(answer_url(alice, url.group(), approve=False))

    pasted.append(address)
    with pytest.raises(AuthorizationRefused):
        await pocket.connect("acme", paste=True)


# ------------------------------------------------------------------------ a real kernel


SETUP = """
from langchain_pocket_auth import PocketAuth, Provider
pocket = PocketAuth(
    "memory://",
    base_url={base!r},
    providers=[Provider(id="acme", display_name="Acme", authorization_endpoint={authorize!r},
                        token_endpoint={token!r})],
    clients={{"acme": ("acme-client", "acme-secret")}},
)
"""


def test_kernel_shows_a_card_takes_the_address_and_forgets_both(
    server: AuthorizationServer, alice: Browser, make_pocket: Make
) -> None:
    """Through the kernel's own field; afterwards the notebook's file has nothing."""
    base = make_pocket().base_url  # registers it, and listens nowhere
    manager, client = start_new_kernel(kernel_name="python3")
    try:
        setup = SETUP.format(
            base=base,
            authorize=server.authorization_endpoint,
            token=server.token_endpoint,
        )
        assert client.execute_interactive(setup, timeout=BOUND_S)["content"][
            "status"
        ] == ("ok")
        messages: list[Any] = []

        def typed(message: Any) -> None:
            assert message["content"]["password"] is True
            [card] = [m for m in messages if m["msg_type"] == "display_data"]
            html = card["content"]["data"]["text/html"]
            [url] = Links(html).links
            assert url.startswith(server.authorization_endpoint)
            client.input(alice.authorize(url))

        reply = client.execute_interactive(
            "await pocket.connect('acme', scopes=['read'], paste=True)",
            allow_stdin=True,
            stdin_hook=typed,
            output_hook=messages.append,
            timeout=BOUND_S,
        )
        assert reply["content"]["status"] == "ok", reply
        kinds = [m["msg_type"] for m in messages]
        assert "update_display_data" in kinds
        [replaced] = [m for m in messages if m["msg_type"] == "update_display_data"]
        assert "Acme is connected" in replaced["content"]["data"]["text/html"]
        # What stays in the file: the last version of the card, and the result.
        kept = [m["content"] for m in messages if m["msg_type"] != "display_data"]
        text = json.dumps(kept, default=str)
        secrets = [*server.issued_access_tokens, *server.issued_codes]
        [attempt] = [m for m in messages if m["msg_type"] == "display_data"]
        [url] = Links(attempt["content"]["data"]["text/html"]).links
        assert_no_leak([*secrets, query_of(url)["state"]], text)
        assert "acme" in text
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
        manager.cleanup_resources()
