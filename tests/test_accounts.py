"""Grants that reach several accounts or sites: which is meant is the person's choice."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Annotated, Any

import httpx
import pytest
from conftest import ACME, call, free_port, provider, says
from graphs import results, thread
from langchain.agents import create_agent
from langchain_core.messages import AIMessage
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from support import deliver, link, outcome_of, state, token

from langchain_pocket_auth import (
    AuthContext,
    InjectedAuth,
    PocketAuth,
    notebook,
    pending_authorizations,
    resume,
)
from langchain_pocket_auth.testing import (
    AuthorizationServer,
    Browser,
    ScriptedModel,
    assert_no_leak,
)

SITES = [
    {"id": "c-1", "name": "Acme <b>main</b>"},
    {"id": "c-2", "name": "Acme sandbox"},
    {"id": "c-1", "name": "Acme <b>main</b>"},  # once for each product
]


class Sites(ThreadingHTTPServer):
    """Says which sites a token reaches."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.url = f"http://127.0.0.1:{self.server_port}/sites"
        self.answer: tuple[int, Any] = (200, SITES)
        self.asked: list[str | None] = []


class _Answers(BaseHTTPRequestHandler):
    server: Sites

    def do_GET(self) -> None:
        self.server.asked.append(self.headers["Authorization"])
        status, content = self.server.answer
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def sites() -> Iterator[Sites]:
    """A provider's look-up of sites."""
    with Sites() as running:
        serve = {"target": running.serve_forever, "args": (0.01,)}
        threading.Thread(**serve, daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture
def pocket(
    server: AuthorizationServer, sites: Sites, tmp_path: Any
) -> Iterator[PocketAuth]:
    """A pocket whose provider's API has an address for each site."""
    base = f"http://127.0.0.1:{free_port()}"
    server.register(
        client_id=ACME[0],
        client_secret=ACME[1],
        redirect_uris=[f"{base}/auth/acme/oauth2/callback"],
    )
    acme = provider(
        server,
        "acme",
        account_lookup={"endpoint": sites.url, "members": {"site": "id"}},
        api_base_url="https://api.acme.test/{site}",
        api_headers={"X-Site": "{site}"},
    )
    made = PocketAuth(
        f"sqlite:///{tmp_path}/store.db",
        base_url=base,
        providers=[acme],
        clients={"acme": ACME},
        session_cache_ttl=timedelta(),
    )
    yield made
    made.close()


async def consented(pocket: PocketAuth, person: Browser) -> tuple[str, httpx.Response]:
    """Let a person agree at the provider; return link and the page after that."""
    url = await link(pocket)
    answer = await asyncio.to_thread(_agreed, person, url)
    return url, answer


def _agreed(person: Browser, url: str) -> httpx.Response:
    """Follow the callback's redirect, and press nothing after it."""
    arrived = person.authorize(url)
    return httpx.get(arrived, follow_redirects=True, verify=False)


async def choose(url: str, **form: str) -> httpx.Response:
    """Press the button of the page."""
    return await deliver(url, method="POST", data=form)


async def test_only_account_is_taken_without_a_question(
    pocket: PocketAuth, sites: Sites, alice: Browser
) -> None:
    """One site: connected at once, and calls of the API go to it."""
    sites.answer = (200, SITES[:1])
    page = await alice.avisit(await link(pocket))
    assert outcome_of(page) == "connected"
    auth = await token(pocket)
    assert auth.api_base_url == "https://api.acme.test/c-1"
    assert auth.headers()["X-Site"] == "c-1"
    assert sites.asked == [f"Bearer {auth.access_token}"]


async def test_person_chooses_between_accounts(
    pocket: PocketAuth, alice: Browser
) -> None:
    """Nothing is stored before the choice, and what is chosen is used."""
    url, page = await consented(pocket, alice)
    assert "Which account at Acme?" in page.text
    assert page.text.count('type="radio"') == 2
    assert "<b>" not in page.text
    assert await state(pocket) == "PENDING_RESOLVE"
    chosen = await choose(url, account="c-2")
    assert (chosen.status_code, chosen.headers["location"]) == (303, url)
    assert outcome_of(await deliver(url)) == "connected"
    auth = await token(pocket)
    assert auth.api_base_url == "https://api.acme.test/c-2"


@pytest.mark.parametrize("account", ["c-3", "", "c-1 ", "0", "__class__", "c-" * 4000])
async def test_account_that_was_not_offered_is_refused(
    pocket: PocketAuth, alice: Browser, account: str
) -> None:
    """A forged choice changes nothing; the real one still works."""
    url, _ = await consented(pocket, alice)
    refused = await choose(url, account=account)
    assert refused.status_code in {200, 400}
    assert len(account) < 2 or account not in refused.text
    assert await state(pocket) == "PENDING_RESOLVE"
    again = await choose(url, account="c-1")
    # Too long to be read as a choice, the first one has begun anew at the provider.
    assert again.status_code == 303
    assert await state(pocket) == "SKIP_AUTH"


async def test_choice_is_made_once(pocket: PocketAuth, alice: Browser) -> None:
    """A second choice is refused, and the first stays."""
    url, _ = await consented(pocket, alice)
    await choose(url, account="c-2")
    assert outcome_of(await choose(url, account="c-1")) in {"replayed", "expired"}
    assert (await token(pocket)).headers()["X-Site"] == "c-2"


async def test_choice_from_another_page_is_refused(
    pocket: PocketAuth, alice: Browser
) -> None:
    """A form on somebody else's page cannot choose for the person."""
    url, _ = await consented(pocket, alice)
    headers = {"Sec-Fetch-Site": "cross-site"}
    page = await deliver(url, method="POST", data={"account": "c-1"}, headers=headers)
    assert page.status_code == 403
    assert await state(pocket) == "PENDING_RESOLVE"


async def test_choice_survives_a_restart_and_hides_the_token(
    server: AuthorizationServer, pocket: PocketAuth, alice: Browser, tmp_path: Any
) -> None:
    """While a person thinks, the grant lies sealed in the store."""
    url, page = await consented(pocket, alice)
    pocket.close()
    secrets = [*server.issued_access_tokens, *server.issued_refresh_tokens]
    assert_no_leak(secrets, page.text, files=[*tmp_path.iterdir()])
    await pocket.serve()
    await choose(url, account="c-2")
    assert await state(pocket) == "SKIP_AUTH"


async def test_choice_is_kept_by_a_refresh(
    server: AuthorizationServer, pocket: PocketAuth, alice: Browser
) -> None:
    """A new token is for the same account."""
    server.access_token_ttl_s = 1
    url, _ = await consented(pocket, alice)
    await choose(url, account="c-2")
    first = (await token(pocket)).access_token
    await asyncio.sleep(1.1)
    renewed = await token(pocket)
    assert renewed.access_token != first
    assert renewed.headers()["X-Site"] == "c-2"


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        ((200, []), "failed"),
        ((200, [{"id": None, "name": "x"}, "y", 3]), "failed"),
        ((403, {"error": "no"}), "failed"),
        ((503, {}), "unavailable"),
        ((429, SITES), "unavailable"),
    ],
    ids=str,
)
async def test_grant_without_an_account_is_given_back(
    server: AuthorizationServer,
    pocket: PocketAuth,
    sites: Sites,
    alice: Browser,
    answer: tuple[int, Any],
    outcome: str,
) -> None:
    """No usable account: a page says so, nothing is stored, the token is revoked."""
    sites.answer = answer
    page = await alice.avisit(await link(pocket))
    assert outcome_of(page) == outcome
    assert await state(pocket) == "PENDING_RESOLVE"
    assert server.revocations > 0


async def test_choice_is_asked_for_where_the_address_is_pasted(
    pocket: PocketAuth, alice: Browser, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Far from the callback, the person types a number; nonsense is asked for again."""
    prompts: list[str] = []
    typed = iter(["3", "b", "2"])

    def getpass(prompt: str) -> str:
        prompts.append(prompt)
        if prompt == notebook.NUMBER:
            return next(typed)
        # After what was printed so far: the provider's page is the last line.
        return alice.authorize(capsys.readouterr().out.strip().splitlines()[-1])

    monkeypatch.setattr(notebook.getpass, "getpass", getpass)
    auth = await pocket.connect("acme", paste=True)
    assert prompts == [notebook.PROMPT, *[notebook.NUMBER] * 3]
    assert auth.headers()["X-Site"] == "c-2"
    assert "2: Acme sandbox" in capsys.readouterr().out


async def test_agent_waits_for_the_choice(pocket: PocketAuth, alice: Browser) -> None:
    """Resumed before the choice, a run pauses again; after it, the tool gets the site."""

    @tool
    def visit(acme: Annotated[AuthContext, InjectedAuth("acme")]) -> str:
        """Visit the site."""
        return acme.headers()["X-Site"]

    agent = create_agent(
        ScriptedModel(script=[says(call("visit")), AIMessage("done")]),
        [visit],
        middleware=[pocket.middleware()],
        checkpointer=InMemorySaver(),
    )
    paused = await agent.ainvoke({"messages": [("user", "go")]}, thread())
    [pending] = pending_authorizations(paused)
    await asyncio.to_thread(_agreed, alice, pending.url)
    paused = await agent.ainvoke(resume(paused), thread())
    assert [p.url for p in pending_authorizations(paused)] == [pending.url]
    await choose(pending.url, account="c-2")
    done = await agent.ainvoke(resume(paused), thread())
    assert [m.content for m in results(done).values()] == ["c-2"]
