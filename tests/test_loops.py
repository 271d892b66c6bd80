"""One pocket in all kinds of programs: loops, threads, forks, a notebook's kernel."""

# No `from __future__ import annotations`: tools are made of local annotations.

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import uvloop
from conftest import ACME, ZETA, call, free_port, says
from graphs import (
    ASYNC,
    DOORS,
    SYNC,
    Work,
    ask,
    build,
    results,
    run,
    shared,
    thread,
)
from jupyter_client.blocking import BlockingKernelClient
from jupyter_client.manager import KernelManager
from langchain_core.tools import tool
from support import BOUND_S, KEYS, Watched, asks, connect, link, on, until

from langchain_pocket_auth import (
    PocketAuth,
    PocketAuthError,
    pending_authorizations,
    resume,
)
from langchain_pocket_auth.testing import AuthorizationServer, Browser

world, server, pocket, alice = shared()

GO = {"messages": [("user", "go")]}
TESTS = Path(__file__).parent
KERNEL_S = 30.0


def the_link(state: Any) -> str:
    [pending] = pending_authorizations(state)
    return pending.url


def looking(door: str, pocket: PocketAuth, work: Work) -> Any:
    """Return a graph that looks once."""
    tools = [work.tool("look", "acme")]
    return build(door, pocket, tools, [says(call("look", text="x"))])[0]


# ----------------------------------------------------------- sync and async, mixed


@pytest.mark.parametrize("door", DOORS)
def test_synchronous_tools_work_in_asynchronous_graphs(
    server: AuthorizationServer, pocket: PocketAuth, alice: Browser, door: str
) -> None:
    """They go to a thread, with their token; they run once."""
    work = Work(SYNC)
    graph = looking(door, pocket, work)
    paused = ask(graph, ASYNC)
    alice.visit(the_link(paused))
    done = run(graph, resume(paused), ASYNC)
    assert results(done)["look"].text == "look did x"
    assert work.done == [("look", server.issued_access_tokens[0])]


@pytest.mark.parametrize("door", DOORS)
def test_asynchronous_tools_fail_in_synchronous_graphs_as_they_do_without_us(
    server: AuthorizationServer, pocket: PocketAuth, alice: Browser, door: str
) -> None:
    """LangChain says why; the pause came before, and an asynchronous run goes on."""

    @tool
    async def bare() -> None:
        """Do nothing."""

    with pytest.raises(NotImplementedError) as without_us:
        bare.invoke({})
    work = Work(ASYNC)
    graph = looking(door, pocket, work)
    paused = ask(graph, SYNC)
    alice.visit(the_link(paused))
    with pytest.raises(NotImplementedError) as with_us:
        run(graph, resume(paused), SYNC)
    assert str(with_us.value) == str(without_us.value)
    assert work.done == []
    done = run(graph, None, ASYNC)
    assert "__interrupt__" not in done
    assert work.done == [("look", server.issued_access_tokens[0])]


@pytest.mark.parametrize("door", DOORS)
async def test_synchronous_run_inside_a_running_loop_pauses_and_goes_on(
    server: AuthorizationServer, pocket: PocketAuth, alice: Browser, door: str
) -> None:
    """As in a notebook's cell: nothing waits for the loop that it blocks."""
    work = Work(SYNC)
    graph = looking(door, pocket, work)
    paused = ask(graph, SYNC)
    await alice.avisit(the_link(paused))
    assert "__interrupt__" not in run(graph, resume(paused), SYNC)
    assert work.done == [("look", server.issued_access_tokens[0])]


# -------------------------------------------------------------------- several loops


@pytest.mark.parametrize("first", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("then", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("door", DOORS)
def test_run_that_paused_on_one_loop_goes_on_on_another(
    server: AuthorizationServer,
    pocket: PocketAuth,
    alice: Browser,
    *,
    door: str,
    first: Callable[..., Any],
    then: Callable[..., Any],
) -> None:
    """Whoever's loop it is; nothing of ours is bound to it."""
    work = Work(ASYNC)
    graph = looking(door, pocket, work)
    paused = first(graph.ainvoke(GO, thread()))
    alice.visit(the_link(paused))
    assert "__interrupt__" not in then(graph.ainvoke(resume(paused), thread()))
    assert work.done == [("look", server.issued_access_tokens[0])]


def test_waiting_on_uvloop_ends_with_the_consent(
    pocket: PocketAuth, alice: Browser
) -> None:
    """`authenticate` is woken on the app's loop, also while others wait elsewhere."""
    owner = pocket._service.owners.resolve({})

    async def wait(*, opens: bool) -> str:
        url = await link(pocket, owner=owner)
        request = asks(pocket)
        waits = pocket.authenticate(request, timeout=BOUND_S, **on(owner=owner))
        waiting = asyncio.create_task(waits)
        if opens:
            await until(lambda: _waiters(pocket, 2))
            await alice.avisit(url)
        return (await waiting).access_token

    with ThreadPoolExecutor(1) as other:
        elsewhere = other.submit(asyncio.run, wait(opens=False))
        mine = uvloop.run(wait(opens=True))
        assert elsewhere.result(BOUND_S) == mine


async def _waiters(pocket: PocketAuth, count: int) -> bool:
    """Whether exactly so many wait for a person."""

    async def events(engine: Any) -> int:
        return sum(map(len, engine.attempts._waiting._events.values()))

    return await pocket._service.ask(events) == count


@pytest.mark.parametrize("mode", [SYNC, ASYNC])
def test_threads_that_run_graphs_at_once_share_link_and_token(
    server: AuthorizationServer, pocket: PocketAuth, alice: Browser, mode: str
) -> None:
    """Eight runs, each in a thread, or on a loop, of its own: one link, one token."""
    work, together = Work(mode), threading.Barrier(8)
    graphs = [looking(DOORS[n % 3], pocket, work) for n in range(8)]

    def at_once(graph: Any, value: Any) -> Any:
        together.wait(BOUND_S)
        return run(graph, value, mode)

    with ThreadPoolExecutor(8) as threads:
        paused = list(threads.map(at_once, graphs, [GO] * 8))
        [url] = {the_link(state) for state in paused}
        alice.visit(url)
        done = list(threads.map(at_once, graphs, map(resume, paused)))
    assert not any("__interrupt__" in state for state in done)
    assert work.done == [("look", server.issued_access_tokens[0])] * 8
    assert server.token_requests == {"authorization_code": 1}


# -------------------------------------------------------------- cancelled, and closed


async def test_cancelled_wait_ends_at_once_and_disturbs_nobody(
    pocket: PocketAuth, alice: Browser
) -> None:
    """Who gives up leaves nothing behind; who still waits gets the connection."""
    owner = pocket._service.owners.resolve({})
    url = await link(pocket, owner=owner)
    request, who = asks(pocket), on(owner=owner)
    cancelled, stays = (
        asyncio.create_task(pocket.authenticate(request, timeout=BOUND_S, **who))
        for _ in range(2)
    )
    await until(lambda: _waiters(pocket, 2))
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(cancelled, 1)
    await until(lambda: _waiters(pocket, 1))
    await alice.avisit(url)
    assert (await asyncio.wait_for(stays, BOUND_S)).access_token


@pytest.mark.parametrize("door", DOORS)
async def test_run_cancelled_at_the_gate_can_be_started_again(
    make_pocket: Callable[..., PocketAuth], alice: Browser, door: str
) -> None:
    """A cancelled run stops waiting for a store that hangs, and harms nothing."""
    storage, hung = Watched("memory://"), asyncio.Event()
    app = asyncio.get_running_loop()

    async def hang(name: str, key: Any) -> None:
        app.call_soon_threadsafe(hung.set)
        await asyncio.sleep(BOUND_S)

    pocket, work = make_pocket(storage), Work(ASYNC)
    graph = looking(door, pocket, work)
    await pocket.check(asks(pocket), **on())
    storage.before = hang
    started = asyncio.create_task(graph.ainvoke(GO, thread()))
    await asyncio.wait_for(hung.wait(), BOUND_S)
    started.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(started, 1)
    storage.before = None
    paused = await graph.ainvoke(None, thread())
    await alice.avisit(the_link(paused))
    assert "__interrupt__" not in await graph.ainvoke(resume(paused), thread())
    assert work.names == ["look"]


@pytest.fixture(params=["memory", "sqlite"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A storage URL."""
    return "memory://" if request.param == "memory" else f"sqlite:///{tmp_path}/p.db"


async def test_wait_ends_when_the_pocket_is_closed(
    make_pocket: Callable[..., PocketAuth], storage: str
) -> None:
    """The answer cannot come any more, so nobody waits for it to the end."""
    pocket = make_pocket(storage, keys=KEYS)
    await link(pocket)
    waits = pocket.authenticate(asks(pocket), timeout=BOUND_S, **on())
    waiting = asyncio.create_task(waits)
    await until(lambda: _waiters(pocket, 1))
    await pocket.aclose()
    with pytest.raises(PocketAuthError):
        await asyncio.wait_for(waiting, 2)


@pytest.mark.parametrize("mode", [SYNC, ASYNC])
def test_paused_run_goes_on_after_the_pocket_was_closed(
    make_pocket: Callable[..., PocketAuth], alice: Browser, tmp_path: Path, mode: str
) -> None:
    """Closing ends no pause: the same link comes again, and the tool runs."""
    pocket = make_pocket(f"sqlite:///{tmp_path}/p.db", keys=KEYS)
    work = Work(mode)
    graph = looking("create_agent", pocket, work)
    paused = ask(graph, mode)
    url = the_link(paused)
    pocket.close()
    paused = run(graph, resume(paused), mode)
    assert the_link(paused) == url
    alice.visit(url)
    pocket.close()
    assert "__interrupt__" not in run(graph, resume(paused), mode)
    assert work.names == ["look"]


# ---------------------------------------------------------------------- other processes

# What a program does that uses the pocket at BASE, whose person is Alice.
PROGRAM = """
import sys
sys.path.insert(0, {tests!r})
from types import SimpleNamespace
from conftest import ACME, ZETA, call, provider, says
from graphs import Work, build, run, thread
from langchain_pocket_auth import PocketAuth, pending_authorizations, resume

GO = {{"messages": [("user", "go")]}}
server = SimpleNamespace(**{server!r})
pocket = PocketAuth(
    {storage!r},
    base_url={base_url!r},
    keys={keys!r},
    providers=[provider(server, "acme"), provider(server, "zeta")],
    clients={{"acme": ACME, "zeta": ZETA}},
)

def graph_of(needs, mode):
    work = Work(mode)
    tools = [work.tool("look", needs)]
    return build("create_agent", pocket, tools, [says(call("look", text="x"))])[0], work

def the_link(state):
    [pending] = pending_authorizations(state)
    return pending.url
"""

FORKING = """
import os
from multiprocessing import get_context

pocket.router  # another process serves it

def use(name):
    told = [name]
    for mode in ("sync", "async"):
        graph, work = graph_of("acme", mode)
        run(graph, GO, mode)
        told += [token for _, token in work.done]
        graph, work = graph_of("zeta", mode)
        told.append(the_link(run(graph, GO, mode)))
    print(*told, sep=",", flush=True)

def fork(name):
    child = os.fork()
    if child == 0:
        try:
            use(name)
            os._exit(0)
        finally:
            os._exit(1)
    return child

early = fork("forked before use")
use("parent")
late = fork("forked after use")
use("parent beside a child")
process = get_context("fork").Process(target=use, args=["multiprocessing"])
process.start()
assert [os.waitpid(child, 0)[1] for child in (early, late)] == [0, 0]
process.join(10)
assert process.exitcode == 0
use("parent after its children")
pocket.close()
"""
USERS = {
    *("forked before use", "parent", "forked after use", "parent beside a child"),
    *("multiprocessing", "parent after its children"),
}

PORT = """
import asyncio, os, sys
from langchain_pocket_auth import PocketAuth

pocket = PocketAuth("memory://", base_url=sys.argv[1])
asyncio.run(pocket.serve())
read, write = os.pipe()
child = os.fork()
if child == 0:
    os.close(write)
    os.read(read, 1)  # until the parent has ended, or says so
    os._exit(0)
try:
    pocket.close()
    asyncio.run(pocket.serve())
    pocket.close()
finally:
    os.close(write)
    os.waitpid(child, 0)
"""


async def ended(script: Path, *arguments: str) -> str:
    """Run a program to its end; return what it printed."""
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, script, *arguments],
        capture_output=True,
        text=True,
        timeout=2 * BOUND_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def program(server: AuthorizationServer, storage: str, base_url: str) -> str:
    """Return what a program begins with."""
    names = ("issuer", "authorization_endpoint", "token_endpoint")
    facts = {name: getattr(server, name) for name in (*names, "revocation_endpoint")}
    return PROGRAM.format(
        tests=str(TESTS), server=facts, storage=storage, base_url=base_url, keys=KEYS
    )


async def test_forked_processes_use_the_pocket_as_their_parent_does(
    make_pocket: Callable[..., PocketAuth],
    server: AuthorizationServer,
    alice: Browser,
    tmp_path: Path,
) -> None:
    """All get the token that is there, and the link for what is not."""
    storage, script = f"sqlite:///{tmp_path}/p.db", tmp_path / "forks.py"
    served = make_pocket(storage, keys=KEYS)
    context = await connect(served, alice)
    url = await link(served, provider="zeta")
    script.write_text(program(server, storage, served.base_url) + FORKING)
    told = [line.split(",") for line in (await ended(script)).splitlines()]
    expected = [context.access_token, url] * 2
    assert {name: found for name, *found in told} == dict.fromkeys(USERS, expected)


async def test_forked_process_does_not_keep_the_port(tmp_path: Path) -> None:
    """A child that only inherited the callback server is not in its parent's way."""
    script = tmp_path / "port.py"
    script.write_text(PORT)
    await ended(script, f"http://127.0.0.1:{free_port()}")


class Kernel:
    """A real notebook kernel; each cell is bounded."""

    def __init__(self, client: BlockingKernelClient) -> None:
        self._client = client

    def cell(self, code: str) -> str:
        """Run a cell; return what it printed."""
        printed: list[str] = []

        def hear(message: dict[str, Any]) -> None:
            content = message["content"]
            if message["msg_type"] == "stream" and content["name"] == "stdout":
                printed.append(content["text"])

        reply = self._client.execute_interactive(
            code, timeout=KERNEL_S, output_hook=hear, allow_stdin=False
        )
        content = reply["content"]
        assert content["status"] == "ok", "\n".join(content.get("traceback", ()))
        return "".join(printed).strip()


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    """A kernel with an empty home."""
    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(tmp_path))
    client = manager.blocking_client()
    try:
        client.start_channels()
        client.wait_for_ready(timeout=KERNEL_S)
        yield Kernel(client)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
        manager.cleanup_resources()


def test_notebook_cells_pause_and_go_on(
    server: AuthorizationServer, alice: Browser, kernel: Kernel
) -> None:
    """In a real kernel: `invoke` in a cell, `await ainvoke` in a cell, one after other."""
    base_url = f"http://127.0.0.1:{free_port()}"
    for name, (client_id, secret) in {"acme": ACME, "zeta": ZETA}.items():
        server.register(
            client_id=client_id,
            client_secret=secret,
            redirect_uris=[f"{base_url}/auth/{name}/oauth2/callback"],
        )
    kernel.cell(program(server, "memory://", base_url))
    kernel.cell("import asyncio; asyncio.get_running_loop()")  # it runs in a cell

    alice.visit(
        kernel.cell(
            "graph, work = graph_of('acme', 'sync')\n"
            "state = graph.invoke(GO, thread())\n"
            "print(the_link(state))"
        )
    )
    told = kernel.cell(
        "state = graph.invoke(resume(state), thread())\nprint(work.done)"
    )
    acme = server.issued_access_tokens[0]
    assert told == str([("look", acme)])

    alice.visit(
        kernel.cell(
            "graph, work = graph_of('zeta', 'async')\n"
            "state = await graph.ainvoke(GO, thread())\n"
            "print(the_link(state))"
        )
    )
    told = kernel.cell(
        "state = await graph.ainvoke(resume(state), thread())\nprint(work.done)"
    )
    assert told == str([("look", server.issued_access_tokens[1])])

    # A synchronous call between awaits, and what is connected asks nobody.
    told = kernel.cell(
        "graph, work = graph_of('acme', 'sync')\n"
        "await graph.ainvoke(GO, thread('2'))\n"
        "graph.invoke(GO, thread('3'))\n"
        "await pocket.aclose()\n"
        "print(work.done)"
    )
    assert told == str([("look", acme)] * 2)
