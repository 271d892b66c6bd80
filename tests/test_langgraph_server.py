"""The example app on a real LangGraph Server: paused, connected, resumed over HTTP."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import ACME, free_port
from langgraph_sdk import get_client
from langgraph_sdk.client import LangGraphClient
from langgraph_sdk.errors import AuthenticationError, NotFoundError
from support import BOUND_S, KEYS, deliver, outcome_of, until

from langchain_pocket_auth import PendingAuthorization, pending_authorizations, resume
from langchain_pocket_auth.testing import (
    AuthorizationServer,
    Browser,
    assert_no_leak,
)

EXAMPLE = Path(__file__).with_name("langgraph_server")
README = Path(__file__).parents[1] / "README.md"
START_LIMIT_S = 40.0
KEPT = {"PATH", "LANG", "LC_ALL", "VIRTUAL_ENV", "PYTHONPATH", "SYSTEMROOT"}
GO = {"messages": [("user", "What is open?")]}


@dataclass
class Server:
    """A copy of the example in a folder of its own, served by `langgraph dev`."""

    config: str
    folder: Path
    consent: AuthorizationServer
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        """What it has printed since it was first started."""
        return (self.folder / "log").read_text()

    def begin(self) -> None:
        """Start it, without waiting for it."""
        client_id, secret = ACME
        kept = {name: value for name, value in os.environ.items() if name in KEPT}
        env = kept | {
            "HOME": str(self.folder),
            "POCKET_AUTH_BASE_URL": self.base_url,
            "POCKET_AUTH_STORAGE": f"sqlite:///{self.folder}/pocket/sessions.db",
            "POCKET_AUTH_KEYS": KEYS,
            "POCKET_AUTH_CLIENTS__ACME__CLIENT_ID": client_id,
            "POCKET_AUTH_CLIENTS__ACME__CLIENT_SECRET": secret,
            "ACME_AUTHORIZATION_ENDPOINT": self.consent.authorization_endpoint,
            "ACME_TOKEN_ENDPOINT": self.consent.token_endpoint,
            "ACME_API": self.consent.api,
            # Nothing but the agent talks, and only to this machine.
            "LANGSMITH_TRACING": "false",
            "LANGGRAPH_CLI_NO_ANALYTICS": "1",
            "LANGGRAPH_NO_VERSION_CHECK": "true",
            "LOG_COLOR": "false",
        }
        command = [sys.executable, "-m", "langgraph_cli", "dev", "--no-browser"]
        # Every request is logged, so that a code in a query would be, too.
        command += ["--no-reload", "--server-log-level", "info"]
        command += ["--port", str(self.port), "--config", self.config]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def start(self) -> None:
        """Start it."""
        self.begin()
        self.wait()

    def wait(self) -> None:
        """Wait until it answers."""
        assert self.process is not None
        end = time.monotonic() + START_LIMIT_S
        with httpx.Client(trust_env=False, verify=False) as http:
            while time.monotonic() < end and self.process.poll() is None:
                with suppress(httpx.HTTPError):
                    if http.get(f"{self.base_url}/ok").status_code == 200:
                        return
                time.sleep(0.05)
        pytest.fail(f"the server did not start:\n{self.log[-4000:]}")

    def stop(self) -> None:
        """End it with all that it started; it gets a moment to write its files."""
        process, self.process = self.process, None
        if process is None:
            return
        for how in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, how)
            with suppress(subprocess.TimeoutExpired):
                process.wait(BOUND_S)

    def client(self, user: str | None = None) -> LangGraphClient:
        """Return the client of a user's app; of anybody's, without a name."""
        headers = {} if user is None else {"Authorization": f"Bearer {user}"}
        return get_client(url=self.base_url, api_key=None, headers=headers)


@dataclass
class Servers:
    """The example with its users, and open to everybody."""

    private: Server
    open: Server


@pytest.fixture(scope="module")
def consent() -> Iterator[AuthorizationServer]:
    """Where people agree, and what the tool asks."""
    with AuthorizationServer() as running:
        yield running


@pytest.fixture(scope="module")
def servers(
    consent: AuthorizationServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Servers]:
    """Both servers; they start at the same time."""
    made = []
    for config in ("langgraph.json", "langgraph.open.json"):
        folder = tmp_path_factory.mktemp("server") / "app"
        shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns(".*", "__*"))
        made.append(Server(config, folder, consent))
    client_id, secret = ACME
    consent.register(
        client_id=client_id,
        client_secret=secret,
        redirect_uris=[f"{s.base_url}/auth/acme/oauth2/callback" for s in made],
    )
    try:
        for server in made:
            server.begin()
        for server in made:
            server.wait()
        yield Servers(*made)
    finally:
        for server in made:
            server.stop()


@dataclass
class Talk:
    """A conversation of somebody with the agent."""

    client: LangGraphClient
    graph: str = "agent"
    thread_id: str = ""
    waits_for: PendingAuthorization = field(init=False)

    async def ask(self, **keywords: Any) -> dict[str, Any]:
        """Ask in a new thread; return how the run ended."""
        thread = await self.client.threads.create()
        self.thread_id = thread["thread_id"]
        return await self._run(input=GO, **keywords)

    async def go_on(self, **keywords: Any) -> dict[str, Any]:
        """Answer the pause; return how the run ended."""
        state = await self.client.threads.get_state(self.thread_id)
        command = {"resume": resume(state).resume}
        return await self._run(command=command, **keywords)

    async def _run(self, **keywords: Any) -> dict[str, Any]:
        async with asyncio.timeout(3 * BOUND_S):
            ended = await self.client.runs.wait(
                self.thread_id, self.graph, raise_error=False, **keywords
            )
        assert isinstance(ended, dict)
        return ended

    async def resumed(self) -> dict[str, Any]:
        """Return how the run ended that the server started by itself, as the second."""
        runs: list[Any] = []

        async def started() -> bool:
            runs[:] = await self.client.runs.list(self.thread_id)
            return len(runs) > 1

        await until(started)
        assert len(runs) == 2
        async with asyncio.timeout(3 * BOUND_S):
            ended = await self.client.runs.join(self.thread_id, runs[0]["run_id"])
        assert isinstance(ended, dict)
        return ended

    async def pending(self) -> PendingAuthorization:
        """Return the one thing that the thread waits for."""
        state = await self.client.threads.get_state(self.thread_id)
        [found] = pending_authorizations(state)
        return found


def issues(ended: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what the tool brought, one entry per time it was run."""
    assert "__interrupt__" not in ended, ended
    messages = [m for m in ended["messages"] if m["type"] == "tool"]
    return [json.loads(m["content"]) for m in messages if m["status"] == "success"]


# ------------------------------------------------------------------------ with users

ANN = {"identity": "ann"}
SETTINGS = {
    "user_id": "ann",
    "langgraph_auth_user": ANN,
    "langgraph_auth_user_id": "ann",
    "thread_id": "ann",
}
CLAIMS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "user_id": {"config": {"configurable": {"user_id": "ann"}}},
    "configurable": {"config": {"configurable": SETTINGS}},
    "context": {"context": SETTINGS},
    "metadata": {"metadata": {"owner": "ann", "user_id": "ann"}},
}


async def test_users_are_asked_and_served_apart_whatever_their_apps_claim(
    servers: Servers, consent: AuthorizationServer
) -> None:
    """Bob's apps say "ann", and bob is asked; after consent all go on by themselves."""
    server, calls = servers.private, consent.api_calls
    async with server.client("ann") as ours, server.client("bob") as theirs:
        ann, claims = Talk(ours), list(CLAIMS.values())
        bobs = [Talk(theirs) for _ in claims]
        claiming = list(zip(bobs, claims, strict=True))
        paused = await asyncio.gather(
            ann.ask(), *(bob.ask(**claim) for bob, claim in claiming)
        )
        [anns], *others = map(pending_authorizations, paused)
        [bobs_link] = {pending.url for [pending] in others}
        assert anns.url.startswith(f"{server.base_url}/connect/")
        assert anns.url != bobs_link
        thread = await ours.threads.get(ann.thread_id)
        assert thread["status"] == "interrupted"
        assert pending_authorizations(thread) == [anns] == [await ann.pending()]

        assert outcome_of(await Browser("ann").avisit(anns.url)) == "connected"
        assert outcome_of(await Browser("bob").avisit(bobs_link)) == "connected"
        # Ann asks in another thread, too: that is not asked again.
        done = await asyncio.gather(
            Talk(ours).ask(), ann.resumed(), *(bob.resumed() for bob in bobs)
        )
    assert [[found["sub"] for found in issues(one)] for one in done] == [
        ["ann"],
        ["ann"],
        *([["bob"]] * len(claims)),
    ]
    assert consent.api_calls - calls == len(done)


@pytest.fixture(scope="module")
def paused(servers: Servers) -> Talk:
    """Carol's conversation, which waits for her consent."""

    async def ask() -> Talk:
        async with servers.private.client("carol") as client:
            talk = Talk(client)
            await talk.ask()
            talk.waits_for = await talk.pending()
            return talk

    return asyncio.run(ask())


async def test_pause_is_shown_to_its_user_only(servers: Servers, paused: Talk) -> None:
    """The auth handlers filter threads, and with them the connect links."""
    server, thread_id = servers.private, paused.thread_id
    async with server.client("carol") as ours, server.client("mallory") as theirs:
        answer = resume(await ours.threads.get_state(thread_id)).resume
        for tried in (
            theirs.threads.get(thread_id),
            theirs.threads.get_state(thread_id),
            theirs.runs.create(thread_id, "agent", command={"resume": answer}),
        ):
            with pytest.raises(NotFoundError):
                await tried
        assert await theirs.threads.search() == []
        mine = await ours.threads.search()
    assert [thread["thread_id"] for thread in mine] == [thread_id]


async def test_routes_are_open_to_browsers_and_the_api_is_not(
    servers: Servers, paused: Talk
) -> None:
    """A person's browser has no API token: connect page and callback need none."""
    base, callback = servers.private.base_url, "auth/acme/oauth2/callback"
    for path, status, outcome in (
        (paused.waits_for.url.removeprefix(f"{base}/"), 200, "pending"),
        ("connect/nothing", 404, "unknown"),
        (f"{callback}?state=nothing&code=nothing", 404, "unknown"),
        (callback, 400, "malformed"),
        ("auth/acme/other/callback?state=nothing&code=nothing", 404, "unknown"),
    ):
        page = await deliver(f"{base}/{path}")
        assert (page.status_code, outcome_of(page)) == (status, outcome), path
        assert page.headers["Cache-Control"] == "no-store"
    async with servers.private.client() as nobody:
        with pytest.raises(AuthenticationError):
            await nobody.threads.search()
    described = (await deliver(f"{base}/openapi.json")).json()["paths"]
    assert "/threads" in described
    assert not [path for path in described if path.startswith(("/connect", "/auth"))]


COMPLAINT = re.compile(
    r"blocking call|BlockingError|Traceback|never awaited", re.IGNORECASE
)


async def test_restarted_server_goes_on_and_its_files_hold_no_secret(
    servers: Servers, consent: AuthorizationServer, paused: Talk
) -> None:
    """The pause outlives the process; log and saved threads have no token, no code."""
    server = servers.private
    async with server.client("hal") as client:
        hal = Talk(client)
        [pending] = pending_authorizations(await hal.ask())
        await Browser("hal").avisit(pending.url)
        [found] = issues(await hal.resumed())
    assert found["sub"] == "hal"
    await asyncio.to_thread(server.stop)

    assert "/auth/acme/oauth2/callback" in server.log
    assert not COMPLAINT.search(server.log)
    assert "code_verifier" not in server.log
    saved = server.folder / ".langgraph_api"
    link = paused.waits_for.url.encode()
    assert any(link in file.read_bytes() for file in saved.iterdir())
    secrets = [
        *consent.issued_access_tokens,
        *consent.issued_refresh_tokens,
        *consent.issued_codes,
        ACME[1],
        KEYS.partition(":")[2],
    ]
    assert_no_leak(secrets, files=[server.folder / "log", saved])

    await asyncio.to_thread(server.start)
    page = await Browser("carol").avisit(paused.waits_for.url)
    assert outcome_of(page) == "connected"
    # The new process cannot act as carol by itself: her app has to go on.
    await until(lambda: has_logged(server, "a paused run was not resumed"))
    async with server.client("carol") as client:
        carol = Talk(client, thread_id=paused.thread_id)
        [found] = issues(await carol.go_on())
        runs = await client.runs.list(carol.thread_id)
    assert found["sub"] == "carol"
    assert [run["status"] for run in runs] == ["success", "success"]


async def has_logged(server: Server, text: str) -> bool:
    """Whether a line of the log has a text."""
    return text in server.log


# --------------------------------------------------------------------- without users


async def test_open_server_guesses_no_owner(servers: Servers) -> None:
    """Nobody was authenticated and the app names no owner: a clear end, not a guess."""
    async with servers.open.client() as client:
        talk = Talk(client)
        ended = await talk.ask(config={"configurable": SETTINGS})
        assert ended["__error__"]["error"] == "OwnerUnknown"
        state = await client.threads.get_state(talk.thread_id)
        thread = await client.threads.get(talk.thread_id)
    assert thread["status"] == "error"
    assert not pending_authorizations(state)
    assert "set PocketAuth(owner=...)" in str(state["tasks"][0]["error"])


async def test_open_server_keeps_accounts_by_conversation(servers: Servers) -> None:
    """With `by_thread`, two conversations are asked and served apart."""
    async with servers.open.client() as client:
        first, second = Talk(client, "conversation"), Talk(client, "conversation")
        await asyncio.gather(first.ask(), second.ask())
        links = [(await talk.pending()).url for talk in (first, second)]
        for name, link in zip(("fay", "gus"), links, strict=True):
            assert outcome_of(await Browser(name).avisit(link)) == "connected"
        done = await asyncio.gather(first.go_on(), second.go_on())
    assert [[a["sub"] for a in issues(one)] for one in done] == [["fay"], ["gus"]]
    assert "langgraph_api" in servers.open.log
    assert not re.search(
        r"blocking call|BlockingError", servers.open.log, re.IGNORECASE
    )


# -------------------------------------------------------------------------- the README

SHOWN = re.compile(r"^```(?:python|json) (\S+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_readme_shows_the_files_that_run_here() -> None:
    """What "On LangGraph Server" tells to write is what these servers were made of."""
    shown = dict(SHOWN.findall(README.read_text()))
    assert {"langgraph.json", "webapp.py"} <= shown.keys()
    for name, text in shown.items():
        assert text == (EXAMPLE / name).read_text(), name
