"""
What authorization costs, as ratios: `python tests/benchmarks/bench.py [--quick]`.

Bare and guarded calls take turns in one run, because absolute times drift on shared
machines: the ratio is the median over pairs, p99 the ratio of the two 99th percentiles.
`--profile WHAT` prints where the time of one row goes (`invoke`, `ainvoke`, `graph`).
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import gc
import pstats
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from socket import AF_INET, IPPROTO_TCP, SOCK_STREAM, create_server, socket
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Self

import httpx
import uvicorn
from fastapi import FastAPI
from langchain_core.messages import AIMessage
from langchain_core.tools import BaseTool, InjectedToolArg, tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode
from langgraph.types import Command, Send, interrupt

from langchain_pocket_auth import (
    AuthContext,
    InjectedAuth,
    PocketAuth,
    Provider,
    pending_authorizations,
    resume,
)
from langchain_pocket_auth.testing import AuthorizationServer, Browser
from langchain_pocket_auth.testing._html import read_page

REGISTRATION = ("bench", "bench-secret")
CACHED, UNCACHED = timedelta(hours=1), timedelta(0)
Auth = Annotated[AuthContext, InjectedAuth("acme", scopes=["read"])]
Call = Callable[[], Awaitable[Any]]


@tool
def bare_sync(repo: str) -> str:
    """List issues."""
    return repo


@tool
async def bare(repo: str) -> str:
    """List issues."""
    return repo


@tool
def given_sync(repo: str, acme: Annotated[object, InjectedToolArg]) -> str:
    """List issues."""
    return repo


@tool
async def given(repo: str, acme: Annotated[object, InjectedToolArg]) -> str:
    """List issues."""
    return repo


def guarded() -> tuple[BaseTool, BaseTool]:
    """Return the same tools, sync and async, that need a connection."""

    @tool("bare_sync")
    def sync(repo: str, acme: Auth) -> str:
        """List issues."""
        return repo

    @tool("bare")
    async def asynchronous(repo: str, acme: Auth) -> str:
        """List issues."""
        return repo

    return sync, asynchronous


# --------------------------------------------------------------------- measuring


@dataclass
class Row:
    """One line of the table; times in seconds."""

    name: str
    floor: list[float]
    ours: list[float]
    goal: str

    def __str__(self) -> str:
        floor, ours = map(statistics.median, (self.floor, self.ours))
        ratio = statistics.median(
            b / a for a, b in zip(self.floor, self.ours, strict=True)
        )
        tail = p99(self.ours) / p99(self.floor)
        times = f"{floor * 1e6:10.1f} {ours * 1e6:10.1f}"
        return f"{self.name:46} {times} {ratio:7.2f} {tail:7.2f}   {self.goal}"


def p99(times: list[float]) -> float:
    return statistics.quantiles(times, n=100)[98] if len(times) > 1 else times[0]


async def timed(call: Call) -> float:
    begun = time.perf_counter()
    await call()
    return time.perf_counter() - begun


async def pairs(name: str, floor: Call, ours: Call, count: int, goal: str) -> Row:
    """Measure two calls in turns, the order of each turn by chance."""
    row = Row(name, [], [], goal)
    for _ in range(max(3, count // 10)):
        await floor()
        await ours()
    gc.collect()
    gc.disable()  # a collection would fall on one of the two by chance
    try:
        for number in range(count):
            order = [(floor, row.floor), (ours, row.ours)]
            random.shuffle(order)
            for call, times in order:
                times.append(await timed(call))
            if number % 100 == 0:
                gc.enable()
                gc.collect()
                gc.disable()
    finally:
        gc.enable()
    print(row, flush=True)
    return row


async def alone(name: str, call: Call, count: int, goal: str) -> None:
    """Measure a call that is compared with a number of microseconds."""
    times = []
    for _ in range(count):
        begun = time.perf_counter()
        for _ in range(10):
            await call()
        times.append((time.perf_counter() - begun) / 10)
    median = statistics.median(times) * 1e6
    print(f"{name:46} {'':10} {median:10.1f} {'':7} {'':7}   {goal}", flush=True)


# ------------------------------------------------------------------- what is there


class World:
    """An authorization server, and pockets whose session is there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server = AuthorizationServer(rotate=False)
        self.browser = Browser("alice")
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        self.server.start()
        self._stack.callback(self.server.stop)
        self._stack.callback(self.browser.close)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def pocket(self, storage: str, cache: timedelta) -> PocketAuth:
        """Return a pocket with a port of its own, connected."""
        with create_server(("127.0.0.1", 0)) as probe:
            base = f"http://127.0.0.1:{probe.getsockname()[1]}"
        uri = f"{base}/auth/acme/oauth2/callback"
        known = self.server.clients.get(REGISTRATION[0])
        self.server.register(
            client_id=REGISTRATION[0],
            client_secret=REGISTRATION[1],
            redirect_uris=[*(known.redirect_uris if known else ()), uri],
        )
        pocket = PocketAuth(
            storage,
            base_url=base,
            clients={"acme": REGISTRATION},
            providers=[self.provider()],
            session_cache_ttl=cache,
        )
        self._stack.push_async_callback(pocket.aclose)
        request = pocket.make_request(["read"], auth_provider="acme")
        link = await pocket.prepare(request, auth_provider="acme")
        assert link
        await self.browser.avisit(link)
        await pocket.authenticate(request, auth_provider="acme", timeout=5)
        return pocket

    def provider(self) -> Provider:
        return Provider(
            id="acme",
            issuer=self.server.issuer,
            authorization_endpoint=self.server.authorization_endpoint,
            token_endpoint=self.server.token_endpoint,
            revocation_endpoint=self.server.revocation_endpoint,
        )

    def sqlite(self) -> str:
        return f"sqlite:///{self.folder}/{random.random()}.db"


def turn(calls: int) -> dict[str, Any]:
    """Return the state of a graph whose model called a tool so often."""
    made = [
        {"name": "bare", "args": {"repo": "r"}, "id": f"c{n}", "type": "tool_call"}
        for n in range(calls)
    ]
    return {"messages": [AIMessage("", tool_calls=made)]}


def graph(add: Callable[[Any], None], checkpointer: Any = None) -> Any:
    """Return a graph of tools alone."""
    builder = StateGraph(MessagesState)
    add(builder)
    builder.add_edge(START, "tools")
    return builder.compile(checkpointer=checkpointer)


def plain_graph(one: BaseTool) -> Any:
    def add(builder: Any) -> None:
        builder.add_node("tools", ToolNode([one]))
        builder.add_edge("tools", END)

    return graph(add)


def gated_graph(pocket: PocketAuth, one: BaseTool, checkpointer: Any = None) -> Any:
    return graph(lambda b: pocket.add_tool_node(b, [one], then=END), checkpointer)


def sending_node(*, pause: bool) -> Callable[[Any], None]:
    """Return what adds nodes like ours, one `Send` per call, that check nothing."""

    async def node(state: MessagesState) -> Any:
        if pause:
            interrupt("go on?")
        calls = state["messages"][-1].tool_calls
        whole = {"__type": "tool_call_with_context", "state": state}
        return Command(goto=[Send("run", {**whole, "tool_call": c}) for c in calls])

    def add(builder: Any) -> None:
        builder.add_node("tools", node, destinations=("run",))
        builder.add_node("run", ToolNode([bare]))
        builder.add_edge("run", END)

    return add


def running_app(app: Any) -> tuple[uvicorn.Server, str]:
    """Serve an app in a thread; return the server and its address."""
    # With its protocol named, or asyncio leaves Nagle's algorithm on: 40 ms at times.
    listener = socket(AF_INET, SOCK_STREAM, IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    return server, f"http://127.0.0.1:{listener.getsockname()[1]}"


# -------------------------------------------------------------------------- rows


async def single_calls(world: World, count: int) -> None:
    sync, asynchronous = guarded()
    stores = [
        ("memory, cached", "memory://", CACHED, "must 1.10, excellent 0.85"),
        ("sqlite, cached", world.sqlite(), CACHED, "must 1.10"),
        ("sqlite, uncached", world.sqlite(), UNCACHED, "must 1.9, excellent 1.6"),
    ]
    for label, storage, cache, goal in stores:
        pocket = await world.pocket(storage, cache)
        ours, ours_sync = pocket.wrap(asynchronous), pocket.wrap(sync)
        plain, own = plain_graph(bare), plain_graph(ours)

        async def bare_call() -> Any:
            return await bare.ainvoke({"repo": "r"})

        async def our_call(one: BaseTool = ours) -> Any:
            return await one.ainvoke({"repo": "r"})

        async def bare_sync_call() -> Any:
            return bare_sync.invoke({"repo": "r"})

        async def our_sync_call(one: BaseTool = ours_sync) -> Any:
            return one.invoke({"repo": "r"})

        # The same tool with the parameter that the guard fills, given by hand.
        async def given_call() -> Any:
            return await given.ainvoke({"repo": "r", "acme": REGISTRATION})

        async def given_sync_call() -> Any:
            return given_sync.invoke({"repo": "r", "acme": REGISTRATION})

        await pairs(f"ainvoke ({label})", given_call, our_call, count, goal)
        await pairs(f"invoke ({label})", given_sync_call, our_sync_call, count, goal)
        lean = f"{label}; bare: no parameter"
        await pairs(f"ainvoke ({lean})", bare_call, our_call, count, "")
        await pairs(f"invoke ({lean})", bare_sync_call, our_sync_call, count, "")
        in_graph = {"memory, cached": "must 1.05", "sqlite, cached": "must 1.05"}
        await pairs(
            f"in a ToolNode, 1 call ({label})",
            lambda plain=plain: plain.ainvoke(turn(1)),
            lambda own=own: own.ainvoke(turn(1)),
            count // 4,
            in_graph.get(label, "must 1.3, excellent 1.2"),
        )


async def gates(world: World, count: int) -> None:
    pocket = await world.pocket("memory://", CACHED)
    gated = gated_graph(pocket, guarded()[1])
    floors = {"ToolNode": plain_graph(bare), "Sends": graph(sending_node(pause=False))}
    goals = {"ToolNode": "≤ 1.05 + one superstep (1.5 ms)", "Sends": "must 1.05"}
    for floor, calls in ((f, n) for n in (1, 10) for f in floors):
        row = await pairs(
            f"add_tool_node / bare {floor}, {calls} calls (memory)",
            lambda n=calls, f=floor: floors[f].ainvoke(turn(n)),
            lambda n=calls: gated.ainvoke(turn(n)),
            count // (4 if calls == 1 else 10),
            goals[floor],
        )
        more = statistics.median(
            b - a for a, b in zip(row.floor, row.ours, strict=True)
        )
        print(f"    {more * 1e3:.2f} ms more")


async def answers(world: World, count: int) -> None:
    for label, storage, cache, goals in (
        ("memory, cached", "memory://", CACHED, ("≤ 5 µs", "≤ 10 µs")),
        ("sqlite, uncached", world.sqlite(), UNCACHED, ("1.3 of read + hop", "")),
    ):
        pocket = await world.pocket(storage, cache)
        request = pocket.make_request(["read"], auth_provider="acme")
        number = count if cache else count // 4
        await alone(
            f"check, SKIP_AUTH ({label})",
            lambda p=pocket, r=request: p.check(r, auth_provider="acme"),
            number,
            goals[0],
        )
        await alone(
            f"authenticate, SKIP_AUTH ({label})",
            lambda p=pocket, r=request: p.authenticate(r, auth_provider="acme"),
            number,
            goals[1],
        )


class Cycle:
    """Pause, callback with its token request, resume; and the floors of these."""

    def __init__(self, world: World, pocket: PocketAuth, client: Any, url: str) -> None:
        self.world, self.pocket, self.client, self.url = world, pocket, client, url
        self.graph = gated_graph(pocket, guarded()[1], InMemorySaver())
        self.bare = graph(sending_node(pause=True), InMemorySaver())
        self.refresh_token = world.server.issued_refresh_tokens[0]
        self.number = 0
        self.parts: dict[str, list[float]] = {}

    def config(self) -> dict[str, Any]:
        self.number += 1
        return {"configurable": {"thread_id": str(self.number)}}

    async def part(self, name: str, work: Awaitable[Any]) -> Any:
        begun = time.perf_counter()
        result = await work
        self.parts.setdefault(name, []).append(time.perf_counter() - begun)
        return result

    async def ours(self) -> None:
        await self.pocket.delete_session("acme")
        config = self.config()
        paused = await self.part("pause", self.graph.ainvoke(turn(1), config))
        [pending] = pending_authorizations(paused)
        click = self.client.post(pending.url, headers={"Origin": self.pocket.base_url})
        page = await self.part("click", click)
        link = (read_page(page.text).refresh or "").partition("url=")[2]
        # The provider's side is nobody's cost here.
        callback = await asyncio.to_thread(self.world.browser.authorize, link)
        answer = await self.part("callback", self.client.get(callback))
        done = await self.part("resume", self.graph.ainvoke(resume(paused), config))
        assert answer.status_code == 303, answer.text
        assert done["messages"][-1].content == "r", done

    async def floor(self) -> None:
        config = self.config()
        await self.part("bare pause", self.bare.ainvoke(turn(1), config))
        on = self.bare.ainvoke(Command(resume=True), config)
        await self.part("bare resume", on)
        get = self.client.get(f"{self.url}/callback?code=c&state=s")
        await self.part("bare GET", get)
        answer = await self.part(
            "token POST",
            self.client.post(
                self.world.server.token_endpoint,
                data={
                    "grant_type": "refresh_token",
                    "refresh_token": self.refresh_token,
                },
                auth=REGISTRATION,
            ),
        )
        assert answer.status_code == 200, answer.text

    def row(self, name: str, floor: str, ours: str, goal: str) -> Row:
        """Compare the sums of parts, without the first rounds."""

        def total(names: str) -> list[float]:
            lists = [self.parts[n][3:] for n in names.split(", ")]
            return [sum(times) for times in zip(*lists, strict=True)]

        return Row(name, total(floor), total(ours), goal)


async def cycles(world: World, count: int) -> None:
    app = FastAPI()

    @app.get("/callback")
    async def callback(code: str, state: str) -> str:
        return code + state

    await world.pocket("memory://", CACHED)  # its refresh token is the floor's
    server, url = running_app(app)
    try:
        for label, storage in (("memory", "memory://"), ("sqlite", world.sqlite())):
            pocket = await world.pocket(storage, CACHED)
            async with httpx.AsyncClient(trust_env=False) as client:
                cycle = Cycle(world, pocket, client, url)
                for _ in range(count + 3):
                    await cycle.floor()
                    await cycle.ours()
            for name, floor, ours, goal in (
                (
                    "pause, callback, token, resume",
                    "bare pause, bare resume, bare GET, token POST",
                    "pause, callback, resume",
                    "≤ 1.4 of the sum of floors",
                ),
                (
                    "the same / one token POST",
                    "token POST",
                    "pause, callback, resume",
                    "",
                ),
                ("- pause", "bare pause", "pause", ""),
                ("- callback", "bare GET, token POST", "callback", ""),
                ("- resume", "bare resume", "resume", ""),
                ("click on the link", "bare GET", "click", ""),
            ):
                print(cycle.row(f"{name} ({label})", floor, ours, goal), flush=True)
    finally:
        server.should_exit = True


def imports(count: int) -> None:
    """Measure in new processes what the package adds to LangGraph's own import."""
    code = """
import time
begun = time.process_time()
import langgraph.graph, langgraph.prebuilt
host = time.process_time()
from langchain_pocket_auth import PocketAuth
imported = time.process_time()
PocketAuth("memory://")
print(host - begun, imported - host, time.process_time() - imported)
"""
    runs = [
        [
            float(t)
            for t in subprocess.check_output([sys.executable, "-c", code]).split()
        ]
        for _ in range(count)
    ]
    host, added, made = (
        statistics.median(times) * 1e3 for times in zip(*runs, strict=True)
    )
    print(f"import langgraph, CPU ms                       {host:10.1f}")
    print(f"import PocketAuth after it, CPU ms             {'':10} {added:10.1f}")
    print(f"PocketAuth() for the first time, CPU ms        {'':10} {made:10.1f}")
    total = added + made
    print(
        f"both, CPU ms                                   {'':10} {total:10.1f}"
        f" {1 + total / host:7.2f}           must 115 ms, excellent 46 ms"
    )


# ------------------------------------------------------------------------- profile


async def profile(world: World, what: str, count: int) -> None:
    pocket = await world.pocket("memory://", CACHED)
    sync, asynchronous = guarded()
    ours, ours_sync = pocket.wrap(asynchronous), pocket.wrap(sync)
    gated = gated_graph(pocket, asynchronous)
    profiler = cProfile.Profile()
    for _ in range(20):
        await ours.ainvoke({"repo": "r"})
    profiler.enable()
    for _ in range(count):
        if what == "invoke":
            ours_sync.invoke({"repo": "r"})
        elif what == "ainvoke":
            await ours.ainvoke({"repo": "r"})
        else:
            await gated.ainvoke(turn(10))
    profiler.disable()
    stats = pstats.Stats(profiler).sort_stats("cumulative")
    stats.print_stats("langchain_pocket_auth|langgraph/runtime|ensure_config", 40)
    stats.sort_stats("tottime").print_stats(25)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--profile", choices=["invoke", "ainvoke", "graph"])
    options = parser.parse_args()
    count = 200 if options.quick else 1500
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        async with World(Path(folder)) as world:
            if options.profile:
                await profile(world, options.profile, count)
                return
            print(
                f"{'':46} {'bare µs':>10} {'ours µs':>10} {'ratio':>7} {'p99':>7}   goal"
            )
            await single_calls(world, count)
            await gates(world, count)
            await answers(world, count)
            await cycles(world, 10 if options.quick else 60)
    imports(3 if options.quick else 7)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        asyncio.run(main())
