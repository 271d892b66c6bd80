"""A process that dies at the worst moment, and the one that goes on."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from conftest import ACME, free_port
from support import BOUND_S, KEYS, answer_url, deliver, outcome_of, query_of

from langchain_pocket_auth.testing import AuthorizationServer, Browser

# The agent of an app: started, killed, started again on the same files.
APP = """
import asyncio, os, sys
from typing import Annotated
from langchain.agents import create_agent
from langchain_core.messages import AIMessage
from langchain_core.tools import tool
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langchain_pocket_auth import AuthContext, InjectedAuth, PocketAuth, Provider, by_thread, pending_authorizations, resume
from langchain_pocket_auth.testing import ScriptedModel

folder, keys, base, issuer, client_id, secret = sys.argv[1:]
pocket = PocketAuth(
    f"sqlite:///{folder}/auth.db", keys=keys, base_url=base, owner=by_thread,
    clients={"acme": (client_id, secret)},
    providers=[Provider(id="acme", authorization_endpoint=issuer + "/authorize", token_endpoint=issuer + "/token", issuer=issuer)],
)

@tool
async def list_issues(repo: str, acme: Annotated[AuthContext, InjectedAuth("acme", scopes=["read"])]) -> str:
    '''List issues.'''
    with open(f"{folder}/ran", "a") as out:
        out.write(acme.access_token + "\\n")
    return f"issues of {repo}"

async def main():
    script = [AIMessage("", tool_calls=[{"name": "list_issues", "args": {"repo": "r"}, "id": "c1"}])]
    async with AsyncSqliteSaver.from_conn_string(f"{folder}/graph.db") as saver:
        agent = create_agent(ScriptedModel(script=script), [list_issues], middleware=[pocket.middleware()], checkpointer=saver)
        print("ready", flush=True)
        for line in sys.stdin:
            command, _, thread = line.strip().partition(" ")
            config = {"configurable": {"thread_id": thread}}
            match command:
                case "ask":
                    result = await agent.ainvoke({"messages": [("user", "hi")]}, config)
                case "resume":
                    state = await agent.aget_state(config)
                    result = await agent.ainvoke(resume(state), config)
                case "serve":
                    await pocket.serve()
                    print("serving", flush=True)
                    continue
            waiting = pending_authorizations(result)
            print(waiting[0].url if waiting else result["messages"][-1].content, flush=True)

asyncio.run(main())
"""


class App:
    """The child process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def says(self, command: str | None = None) -> str:
        """Give a command; return what the app prints."""
        assert self._process.stdin
        assert self._process.stdout
        if command:
            self._process.stdin.write(f"{command}\n".encode())
        line = await asyncio.wait_for(self._process.stdout.readline(), 3 * BOUND_S)
        return line.decode().strip()

    async def kill(self) -> None:
        """End it as the system does when memory runs out."""
        if self._process.returncode is None:
            self._process.kill()
            await self._process.wait()


class Household:
    """The files, port and keys that all its processes share."""

    def __init__(self, folder: Path, server: AuthorizationServer) -> None:
        base = f"http://127.0.0.1:{free_port()}"
        client_id, secret = ACME
        server.register(
            client_id=client_id,
            client_secret=secret,
            redirect_uris=[f"{base}/auth/acme/oauth2/callback"],
        )
        self.folder = folder
        self._arguments = [str(folder), KEYS, base, server.issuer, client_id, secret]

    @asynccontextmanager
    async def app(self) -> AsyncIterator[App]:
        """Start the app; it is killed at the end."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", APP, *self._arguments, stdin=-1, stdout=-1
        )
        app = App(process)
        try:
            assert await app.says() == "ready"
            yield app
        finally:
            await app.kill()
            process._transport.close()  # type: ignore[attr-defined]

    def ran(self) -> list[str]:
        """Return the tokens that the tool's body was run with."""
        path = self.folder / "ran"
        return path.read_text().split() if path.exists() else []


@pytest.fixture
def household(tmp_path: Path, server: AuthorizationServer) -> Household:
    """An app's files and settings."""
    return Household(tmp_path, server)


async def test_killed_app_goes_on_where_it_was(
    household: Household, server: AuthorizationServer, alice: Browser
) -> None:
    """Four conversations, killed at four moments, end well in the next process."""
    # Both are started at once, which saves the second one's imports.
    async with household.app() as app, household.app() as successor:
        links = [await app.says(f"ask {n}") for n in range(4)]
        unclicked, clicked, connected, exchanging = links
        waiting = await answer_url(alice, clicked)
        done = await answer_url(alice, connected)
        interrupted = await answer_url(alice, exchanging)
        assert (await deliver(done)).status_code == 303
        server.fault("slow", delay_s=1.0)
        answering = asyncio.create_task(deliver(interrupted))
        await asyncio.sleep(0.3)
        await app.kill()
        await asyncio.gather(answering, return_exceptions=True)

        # Connected before the kill: nobody is asked anything.
        assert await successor.says("resume 2") == "done"
        await successor.says("serve")
        # Between consent and callback: the answer is taken by the new process.
        assert outcome_of(await deliver(waiting, follow_redirects=True)) == "connected"
        assert await successor.says("resume 1") == "done"
        # Before the click: the link is as good as before.
        assert outcome_of(await alice.avisit(unclicked)) == "connected"
        assert await successor.says("resume 0") == "done"
        # During the exchange: nobody knows whether the code was taken, so it is
        # never sent again. Another code is a replay, and the link starts afresh.
        other = interrupted.replace(query_of(interrupted)["code"], "other")
        assert (await deliver(other)).status_code == 409
        assert await successor.says("resume 3") == exchanging
        assert outcome_of(await alice.avisit(exchanging)) == "connected"
        assert await successor.says("resume 3") == "done"
    assert len(household.ran()) == len(set(household.ran())) == 4
    assert set(household.ran()) <= set(server.issued_access_tokens)
    assert server.authorizations == 5
    assert server.code_replays == 0
    assert not server.token_errors


FORK = """
import asyncio, os, sys
from langchain_pocket_auth import PocketAuth, Provider
folder, keys, base, issuer, client_id, secret = sys.argv[1:]
pocket = PocketAuth(
    f"sqlite:///{folder}/auth.db", keys=keys, base_url=base, clients={"acme": (client_id, secret)},
    providers=[Provider(id="acme", authorization_endpoint=issuer + "/authorize", token_endpoint=issuer + "/token")],
)
request = pocket.make_request(["read"], auth_provider="acme")
async def state():
    return (await pocket.check(request, auth_provider="acme")).name
print(asyncio.run(state()), flush=True)
child = os.fork()
if not child:
    print(asyncio.run(state()), flush=True)
    os._exit(0)
os.waitpid(child, 0)
print(asyncio.run(state()), flush=True)
pocket.close()
"""


async def test_forked_child_opens_a_loop_and_a_store_of_its_own(
    household: Household,
) -> None:
    """A pocket that was used before the fork works on both sides of it."""
    run = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-W", "error", "-c", FORK, *household._arguments],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert run.stdout.split() == ["NO_SESSION"] * 3, run.stderr
