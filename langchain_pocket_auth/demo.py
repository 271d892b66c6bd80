"""
`pocket-auth demo`: the main job from end to end, on this machine, without an account.

Real are the protocol, the pause, the callback, the storage and the renewal; only the
model is a script, and the authorization server is the one of our tests.
"""
# ruff: noqa: T201 - a command talks

from __future__ import annotations

import asyncio
import os
import sys
import webbrowser
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import httpx
from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.tools import BaseTool, tool

from ._errors import AuthorizationRefused, AuthorizationRequired, PocketAuthError
from ._models import AuthContext
from ._pocket import PocketAuth
from ._resume import pending_authorizations, resume
from ._seal import new_key
from ._tools import InjectedAuth

if TYPE_CHECKING:
    from .testing import AuthorizationServer

Person: TypeAlias = Callable[[str], Awaitable[object]]
"""Whoever opens the connect link; awaited until the link was acted on, or at once."""

PATIENCE_S = 600.0  # a person may have to look for the window
MACHINE_S = 20.0  # whoever else agrees does it at once
TOKEN_TTL_S = 3
QUESTION = "What is open in acme/app?"
REGISTRATION = ("demo-app", "demo-app-secret")
_NEEDS = ("langchain", "langgraph.checkpoint.sqlite", "authlib", "flask")


def run(
    *, yes: bool = False, port: int | None = None, person: Person | None = None
) -> int:
    """
    Play the demo and say what happens.

    Args:
        yes: Agree without asking; so it is, too, when there is no terminal.
        port: Where the connect link lives; by default any free port.
        person: Opens the link, instead of you or of a browser of ours.

    Returns:
        The exit code: 0, or 1 if nobody agreed, 2 if a package is missing, 130 when
        interrupted.
    """
    if not all(map(_there, _NEEDS)):
        text = 'The demo needs more: pip install "langchain-pocket-auth[demo]"'
        print(text, file=sys.stderr)
        return 2
    from .testing import free_port

    if person is None:
        terminal = sys.stdin.isatty() and sys.stdout.isatty()
        person = _you if terminal and not yes else _browser
    try:
        return asyncio.run(_play(person, port or free_port()))
    except KeyboardInterrupt:
        print("\nStopped. Nothing was kept.")
        return 130
    except PocketAuthError as error:
        print(f"The demo cannot run: {error}", file=sys.stderr)
        return 1


def _there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even its parent
        return False


# ------------------------------------------------------------------ who is asked


async def _you(link: str) -> None:
    """Open your browser, if this is a desktop; the link is on the screen anyway."""
    desktop = sys.platform in {"darwin", "win32"} or any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY")
    )
    if desktop:  # elsewhere `webbrowser` would start a text browser in here
        await asyncio.to_thread(webbrowser.open, link)
    print("   (waiting for you; Ctrl-C ends the demo)\n", flush=True)


async def _browser(link: str) -> None:
    """Be the person: sign in and agree, request by request, as a browser does."""
    from .testing import Browser

    print("   (a browser of ours does it: it opens the link, signs in and agrees)\n")
    with Browser("alice") as browser:
        await browser.avisit(link)


# -------------------------------------------------------------------- the play


def _tool(api: str) -> BaseTool:
    @tool
    async def list_issues(
        repo: str,
        tracker: Annotated[
            AuthContext, InjectedAuth("tracker", scopes=["issues:read"])
        ],
    ) -> str:
        """List the open issues of a repository."""
        headers = {"Authorization": f"Bearer {tracker.access_token}"}
        # No proxy: the API is on this machine.
        async with httpx.AsyncClient(headers=headers, trust_env=False) as client:
            answer = await client.get(f"{api}/issues", params={"repo": repo})
        answer.raise_for_status()
        issues = answer.json()["issues"]
        return "\n".join(f"#{issue['number']} {issue['title']}" for issue in issues)

    return list_issues


@dataclass(frozen=True)
class _Stage:
    """What the scenes are played on."""

    server: AuthorizationServer
    pocket: PocketAuth
    agent: Any
    folder: Path

    async def ask(self, thread_id: str) -> dict[str, Any]:
        """Ask the question in a conversation of its own."""
        return await self.go_on({"messages": [("user", QUESTION)]}, thread_id)

    async def go_on(self, value: Any, thread_id: str) -> dict[str, Any]:
        """Run the agent until it is done or pauses."""
        config = {"configurable": {"thread_id": thread_id}}
        result: dict[str, Any] = await self.agent.ainvoke(value, config)
        return result

    @property
    def token_requests(self) -> int:
        """How often the tracker issued tokens."""
        return sum(self.server.token_requests.values())


async def _play(person: Person, port: int) -> int:
    from langchain.agents import create_agent
    from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

    from .testing import AuthorizationServer, ScriptedModel

    _say(
        "An agent reads the issues of a tracker for you, with your consent.",
        "All of it happens on this machine, in a folder that is deleted at the end.",
    )
    base_url = f"http://127.0.0.1:{port}"
    call = {"name": "list_issues", "args": {"repo": "acme/app"}, "id": "call-1"}
    with (
        TemporaryDirectory(prefix="pocket-auth-demo-") as name,
        AuthorizationServer(access_token_ttl_s=TOKEN_TTL_S) as server,
    ):
        server.register(
            client_id=REGISTRATION[0],
            client_secret=REGISTRATION[1],
            redirect_uris=[f"{base_url}/auth/tracker/oauth2/callback"],
        )
        pocket = PocketAuth(
            f"sqlite:///{Path(name, 'sessions.db')}",
            clients={"tracker": REGISTRATION},
            providers=[server.provider("tracker")],
            base_url=base_url,
            keys=new_key(),
            app_name="pocket-auth demo",
        )
        try:
            async with AsyncSqliteSaver.from_conn_string(
                f"{name}/checkpoints.db"
            ) as db:
                agent = create_agent(
                    ScriptedModel(script=[AIMessage("", tool_calls=[call])]),
                    [_tool(server.api)],
                    middleware=[pocket.middleware()],
                    checkpointer=db,
                )
                return await _scenes(_Stage(server, pocket, agent, Path(name)), person)
        finally:
            await pocket.aclose()


async def _scenes(stage: _Stage, person: Person) -> int:
    answer = await _connect(stage, person)
    if answer is None or answer.status == "error":
        return 1
    await _use_again(stage)
    await _renew(stage)
    await _disconnect(stage)
    return 0


async def _connect(stage: _Stage, person: Person) -> ToolMessage | None:
    _say(
        f'1. You ask: "{QUESTION}" The model calls the tool list_issues, which',
        "   needs your account at Tracker. It is not connected, so the run pauses",
        "   before the tool runs, and waits in its checkpoint, for days if need be.",
    )
    paused = await stage.ask("first")
    [pending] = pending_authorizations(paused)
    _say(
        f"2. {pending.message}",
        "   Open this link, sign in as alice (password: alice-password), and agree:",
        "",
        f"   {pending.url}",
    )
    request = stage.pocket.make_request(list(pending.scopes), auth_provider="tracker")
    waiting = asyncio.create_task(
        stage.pocket.authenticate(
            request,
            auth_provider="tracker",
            timeout=PATIENCE_S if person is _you else MACHINE_S,
        )
    )
    try:
        await person(pending.url)
        await waiting
    except AuthorizationRefused:
        pass  # the tool's answer will say so
    except AuthorizationRequired:
        if stage.server.denials == 0:
            _say("   Nobody agreed in time: the demo ends here.")
            return None
    finally:
        waiting.cancel()
    answer = _answer(await stage.go_on(resume(paused), "first"))
    if answer.status == "error":
        _say(
            "3. You said no. The run goes on; instead of a result the model reads:",
            f"   {answer.text}",
        )
    else:
        _say(
            "3. Connected: the callback exchanged the code at once and stored the",
            "   session sealed. The run goes on, and the tool runs with your token:",
            *_indented(answer),
        )
    return answer


async def _use_again(stage: _Stage) -> None:
    answer = _answer(await stage.ask("second"))
    _say(
        "4. You ask again, in another conversation. Nothing is asked of you:",
        *_indented(answer),
    )


async def _renew(stage: _Stage) -> None:
    context = await stage.pocket.get_auth_context("tracker")
    if context is not None and context.expires_at is not None:
        left = (context.expires_at - datetime.now(UTC)).total_seconds()
        await asyncio.sleep(max(left, 0.0) + 0.05)
    before = stage.token_requests
    answer = _answer(await stage.ask("third"))
    count = stage.token_requests - before
    _say(
        f"5. The access token, good for {TOKEN_TTL_S} seconds, has expired. You ask a",
        f"   third time: it is renewed on the way, with {_times(count)}",
        "   to the token endpoint:",
        *_indented(answer),
    )


async def _disconnect(stage: _Stage) -> None:
    from .testing import assert_no_leak

    tokens = [*stage.server.issued_access_tokens, *stage.server.issued_refresh_tokens]
    assert_no_leak(tokens, files=[stage.folder])
    _say(
        f"6. None of the {len(tokens)} tokens issued so far can be read in the files:",
        "   checkpoints never get them, and the session store has them sealed.",
    )
    await stage.pocket.delete_session("tracker")
    revoked = "is revoked there" if stage.server.revocations else "STAYED ALIVE THERE"
    _say(
        "7. You disconnect Tracker: the session is deleted here, and the grant",
        f"   {revoked}. That was the demo.",
    )


def _answer(result: dict[str, Any]) -> ToolMessage:
    return next(m for m in reversed(result["messages"]) if isinstance(m, ToolMessage))


def _indented(answer: ToolMessage) -> list[str]:
    return [f"      {line}" for line in answer.text.splitlines()]


def _times(requests: int) -> str:
    return "exactly one request" if requests == 1 else f"{requests} requests"


def _say(*lines: str) -> None:
    print(*lines, "", sep="\n", flush=True)
