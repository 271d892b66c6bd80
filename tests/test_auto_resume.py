"""Paused runs that go on by themselves: once, for their own user, or not at all."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import pytest
from conftest import call, says
from graphs import ASYNC, DOORS, GATES, SYNC, State, Work, ask, build, results, thread
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.graph import START, StateGraph
from langgraph.types import interrupt
from support import BOUND_S, KEYS, Watched, deliver, until

from langchain_pocket_auth import (
    AuthContext,
    ConfigurationError,
    Event,
    InjectedAuth,
    PendingAuthorization,
    PocketAuth,
    RunInfo,
    pending_authorizations,
    resume,
)
from langchain_pocket_auth.testing import AuthorizationServer, Browser, ScriptedModel

GO = {"messages": [("user", "go")]}
RUNS = {"resumed", "superseded", "not_resumed"}


@dataclass
class Ear:
    """Hears events and results."""

    events: list[Event] = field(default_factory=list)
    results: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)
    expects_results: bool = False

    def hear(self, event: Event) -> None:
        self.events.append(event)

    def result(self, result: Any, config: dict[str, Any]) -> None:
        self.results.append((result, config))

    @property
    def types(self) -> list[str]:
        return [e.type for e in self.events]

    @property
    def of_runs(self) -> list[str]:
        return [t for t in self.types if t in RUNS]

    async def wait(self, count: int = 1) -> list[str]:
        """Return what became of runs, as soon as there is so much to tell."""

        async def enough() -> bool:
            resumed = self.of_runs.count("resumed")
            given = len(self.results) >= resumed or not self.expects_results
            return len(self.of_runs) >= count and given

        await until(enough)
        return self.of_runs


@pytest.fixture
def ear() -> Ear:
    return Ear()


def listening(pocket: PocketAuth, graph: Any, ear: Ear, **settings: Any) -> None:
    """Let a graph go on by itself, and hear of it."""
    pocket.on_event(ear.hear)
    ear.expects_results = True
    pocket.auto_resume(graph, on_result=ear.result, **settings)


def one_tool(door: str, pocket: PocketAuth, saver: Any = "memory") -> tuple[Any, Work]:
    work = Work(ASYNC)
    tools = [work.tool("look", "acme")]
    graph, _ = build(door, pocket, tools, [says(call("look", text="x"))], saver)
    return graph, work


def beside(agent: Any, sibling: Any) -> Any:
    """Return a graph in which an agent and another node run at the same time."""
    builder = StateGraph(State)
    builder.add_node("agent", agent)
    builder.add_node("sibling", sibling)
    builder.add_edge(START, "agent")
    builder.add_edge(START, "sibling")
    return builder.compile(checkpointer=InMemorySaver())


async def paused_beside(graph: Any) -> PendingAuthorization:
    """Return what is asked for, while the other node is still busy."""

    async def pending() -> bool:
        return bool((await state_of(graph)).interrupts)

    await until(pending)
    [asked] = pending_authorizations(await state_of(graph))
    return asked


async def state_of(graph: Any, name: str = "1") -> Any:
    return await graph.aget_state(thread(name))


# ------------------------------------------------------------------------ going on


@pytest.mark.parametrize("door", DOORS)
async def test_run_goes_on_when_the_person_has_agreed(
    pocket: PocketAuth, alice: Browser, ear: Ear, door: str
) -> None:
    """Nobody resumes: the callback does, the tool runs once, the app gets the result."""
    graph, work = one_tool(door, pocket)
    listening(pocket, graph, ear)
    paused = await graph.ainvoke(GO, thread())
    [pending] = pending_authorizations(paused)
    await alice.avisit(pending.url)
    assert await ear.wait() == ["resumed"]
    assert ear.types == ["connected", "resumed"]
    assert [e.thread_ids for e in ear.events] == [("1",), ("1",)]
    assert work.names == ["look"]
    [(result, config)] = ear.results
    assert results(result)["look"].status == "success"
    assert config["configurable"]["thread_id"] == "1"
    assert not (await state_of(graph)).next


async def test_refusal_lets_the_run_go_on_as_well(
    pocket: PocketAuth, alice: Browser, ear: Ear
) -> None:
    """A denial is final: the model is told, without anybody resuming."""
    graph, work = one_tool("create_agent", pocket)
    listening(pocket, graph, ear)
    [pending] = pending_authorizations(await graph.ainvoke(GO, thread()))
    await alice.avisit(pending.url, approve=False)
    assert await ear.wait() == ["resumed"]
    assert ear.types == ["declined", "resumed"]
    assert results(ear.results[0][0])["look"].status == "error"
    assert work.done == []


@pytest.mark.parametrize("door", GATES)
async def test_pause_for_two_waits_for_both(
    pocket: PocketAuth, alice: Browser, ear: Ear, door: str
) -> None:
    """The first consent of two continues nothing; the second one does, once."""
    work = Work(ASYNC)
    tools = [work.tool("look", "acme"), work.tool("post", "zeta")]
    script = [says(*(call(t.name, text="x") for t in tools))]
    graph, model = build(door, pocket, tools, script)
    listening(pocket, graph, ear)
    acme, zeta = pending_authorizations(await graph.ainvoke(GO, thread()))
    await alice.avisit(acme.url)
    assert (await state_of(graph)).interrupts
    await alice.avisit(zeta.url)
    assert await ear.wait() == ["resumed"]
    assert (work.names, model.calls) == (["look", "post"], 2)


async def test_one_consent_continues_every_conversation_that_waits(
    pocket: PocketAuth, alice: Browser, ear: Ear
) -> None:
    """Futures and pauses are many-to-many."""
    graph, work = one_tool("create_agent", pocket)
    listening(pocket, graph, ear)
    names = [str(n) for n in range(6)]
    paused = await asyncio.gather(*(graph.ainvoke(GO, thread(n)) for n in names))
    await alice.avisit(pending_authorizations(paused[0])[0].url)
    assert await ear.wait(6) == ["resumed"] * 6
    assert work.names == ["look"] * 6
    resumed = [e.thread_ids for e in ear.events if e.type == "resumed"]
    assert sorted(resumed) == [(n,) for n in names]


async def test_twenty_callbacks_and_duplicate_clicks_continue_it_once(
    server: AuthorizationServer, pocket: PocketAuth, alice: Browser, ear: Ear
) -> None:
    """However often the answer is delivered, from however many tabs: one run."""
    graph, work = one_tool("create_agent", pocket)
    listening(pocket, graph, ear)
    [pending] = pending_authorizations(await graph.ainvoke(GO, thread()))
    people = [Browser("alice") for _ in range(4)]
    answers = [await asyncio.to_thread(p.authorize, pending.url) for p in people]
    await asyncio.gather(*(deliver(url) for url in answers * 5))
    await ear.wait()
    await asyncio.sleep(0.1)  # whatever else might have been started
    assert [t for t in ear.of_runs if t == "resumed"] == ["resumed"]
    assert work.names == ["look"]
    assert len(ear.results) == 1


async def test_app_that_resumes_as_well_runs_the_tool_once(
    pocket: PocketAuth, alice: Browser, ear: Ear
) -> None:
    """The app's own resume and ours race; one of them goes on."""
    graph, work = one_tool("create_agent", pocket)
    listening(pocket, graph, ear)
    for n in range(5):
        name = str(n)
        paused = await graph.ainvoke(GO, thread(name))
        [pending] = pending_authorizations(paused)
        # The answer is on its way back to the browser, and the app does not wait.
        await alice.avisit(pending.url)
        await asyncio.gather(
            graph.ainvoke(resume(paused), thread(name)), return_exceptions=True
        )
        await ear.wait(n + 1)
        await pocket.delete_session("acme")
    assert work.names == ["look"] * 5


# -------------------------------------------------------------------------- not going on


async def test_newer_input_supersedes_the_pause(
    pocket: PocketAuth, alice: Browser, ear: Ear
) -> None:
    """Who wrote something else is not interrupted by an old call."""
    graph, work = one_tool("create_agent", pocket)
    listening(pocket, graph, ear)
    [pending] = pending_authorizations(await graph.ainvoke(GO, thread()))
    newer = await graph.ainvoke({"messages": [("user", "never mind")]}, thread())
    assert newer["messages"][-1].text == "done"
    await alice.avisit(pending.url)
    assert await ear.wait() == ["superseded"]
    assert (work.done, ear.results) == ([], [])


async def test_pause_that_the_app_continued_is_not_told_of_later(
    pocket: PocketAuth, alice: Browser, ear: Ear
) -> None:
    """Declined in the chat and connected after all: nothing is superseded by that."""
    graph, _ = one_tool("create_agent", pocket)
    listening(pocket, graph, ear)
    paused = await graph.ainvoke(GO, thread())
    [pending] = pending_authorizations(paused)
    await graph.ainvoke(resume(paused, decline=[pending]), thread())
    await alice.avisit(pending.url)
    await asyncio.sleep(0.1)
    assert ear.types == ["declined", "connected"]


async def test_busy_siblings_are_waited_for(
    pocket: PocketAuth, alice: Browser, ear: Ear
) -> None:
    """A branch that still works is neither run again nor cut off."""
    work, slow, release = Work(ASYNC), [], asyncio.Event()
    agent, _ = build(
        "create_agent",
        pocket,
        [work.tool("look", "acme")],
        [says(call("look", text="x"))],
        saver=None,
    )

    async def sibling(_: Any) -> dict[str, Any]:
        slow.append("begun")
        await release.wait()
        slow.append("ended")
        return {}

    graph = beside(agent, sibling)
    listening(pocket, graph, ear)
    first = asyncio.create_task(graph.ainvoke(GO, thread()))
    await alice.avisit((await paused_beside(graph)).url)
    await asyncio.sleep(0.2)
    assert (ear.of_runs, work.done) == ([], [])
    release.set()
    await asyncio.wait_for(first, BOUND_S)
    assert await ear.wait() == ["resumed"]
    assert (slow, work.names) == (["begun", "ended"], ["look"])


async def test_patience_ends_with_a_reason(
    pocket: PocketAuth, alice: Browser, ear: Ear
) -> None:
    """A run that stays busy is reported, not cut off."""
    never = asyncio.Event()
    agent, work = one_tool("create_agent", pocket, saver=None)

    async def sibling(_: Any) -> dict[str, Any]:
        await never.wait()
        return {}

    graph = beside(agent, sibling)
    listening(pocket, graph, ear, patience=timedelta(seconds=0.1))
    first = asyncio.create_task(graph.ainvoke(GO, thread()))
    await alice.avisit((await paused_beside(graph)).url)
    assert await ear.wait() == ["not_resumed"]
    assert "busy" in (ear.events[-1].reason or "")
    never.set()
    paused = await asyncio.wait_for(first, BOUND_S)
    await graph.ainvoke(resume(paused), thread())
    assert work.names == ["look"]


async def test_failing_run_is_reported_and_can_be_resumed_again(
    pocket: PocketAuth, alice: Browser, ear: Ear
) -> None:
    """What a tool raises reaches the event by its name only."""
    tries: list[str] = []

    async def look(auth: Any) -> str:
        """Look."""
        tries.append("x")
        if len(tries) == 1:
            raise RuntimeError(f"no luck with {auth.access_token}")
        return "fine"

    look.__annotations__["auth"] = Annotated[AuthContext, InjectedAuth("acme")]
    graph, _ = build("create_agent", pocket, [tool(look)], [says(call("look"))])
    listening(pocket, graph, ear)
    [pending] = pending_authorizations(await graph.ainvoke(GO, thread()))
    await alice.avisit(pending.url)
    assert await ear.wait() == ["not_resumed"]
    assert ear.events[-1].reason == "it ended in RuntimeError"
    done = await graph.ainvoke(None, thread())
    assert results(done)["look"].text == "fine"


def test_graph_without_checkpointer_is_refused(pocket: PocketAuth) -> None:
    """What cannot be resumed says so when it is registered."""
    graph, _ = one_tool("create_agent", pocket, saver=None)
    with pytest.raises(ConfigurationError, match="checkpointer"):
        pocket.auto_resume(graph)
    with pytest.raises(ConfigurationError, match="compiled graph"):
        pocket.auto_resume(object())


async def test_stopped_it_continues_nothing(
    pocket: PocketAuth, alice: Browser, ear: Ear
) -> None:
    """What `auto_resume` returns ends it."""
    graph, work = one_tool("create_agent", pocket)
    pocket.on_event(ear.hear)
    stop = pocket.auto_resume(graph)
    stop()
    stop()
    [pending] = pending_authorizations(await graph.ainvoke(GO, thread()))
    await alice.avisit(pending.url)
    await asyncio.sleep(0.1)
    assert (ear.types, work.done) == (["connected"], [])


async def test_expired_link_continues_nothing(
    make_pocket: Callable[..., PocketAuth], ear: Ear
) -> None:
    """It is told that the link ran out; the run waits on."""
    pocket = make_pocket(future_ttl=timedelta(seconds=0.3))
    graph, work = one_tool("create_agent", pocket)
    listening(pocket, graph, ear)
    [pending] = pending_authorizations(await graph.ainvoke(GO, thread()))

    async def expired() -> bool:
        return "expired" in ear.types

    await until(expired)
    assert ear.types == ["expired"]
    assert ear.events[0].thread_ids == ("1",)
    again = await graph.ainvoke(resume(await state_of(graph)), thread())
    assert pending_authorizations(again)[0].url != pending.url
    assert work.done == []


# ------------------------------------------------------------- loops, savers, restarts


async def test_thread_bound_saver_is_run_in_a_thread(
    pocket: PocketAuth, alice: Browser, ear: Ear, tmp_path: Path
) -> None:
    """A synchronous saver in an asynchronous app works."""
    work = Work(SYNC)
    with SqliteSaver.from_conn_string(str(tmp_path / "checkpoints.db")) as saver:
        graph, _ = build(
            "create_agent",
            pocket,
            [work.tool("look", "acme")],
            [says(call("look", text="x"))],
            saver,
        )
        listening(pocket, graph, ear)
        [pending] = pending_authorizations(await asyncio.to_thread(ask, graph, SYNC))
        await alice.avisit(pending.url)
        assert await ear.wait() == ["resumed"]
    assert work.names == ["look"]


async def test_loop_bound_saver_is_run_on_its_loop(
    pocket: PocketAuth, alice: Browser, ear: Ear, tmp_path: Path
) -> None:
    """An asynchronous saver is used on the loop that it belongs to."""
    loops: list[Any] = []

    def seen(result: Any, config: Any) -> None:
        ear.result(result, config)

    async def aseen(result: Any, config: Any) -> None:
        loops.append(asyncio.get_running_loop())
        seen(result, config)

    path = str(tmp_path / "checkpoints.db")
    async with AsyncSqliteSaver.from_conn_string(path) as saver:
        graph, work = one_tool("create_agent", pocket, saver)
        pocket.on_event(ear.hear)
        pocket.auto_resume(graph, on_result=aseen)
        [pending] = pending_authorizations(await graph.ainvoke(GO, thread()))
        await alice.avisit(pending.url)
        assert await ear.wait() == ["resumed"]

        async def called() -> bool:
            return bool(loops)

        await until(called)
    assert loops == [asyncio.get_running_loop()]
    assert work.names == ["look"]


def test_script_without_a_loop_goes_on_in_a_thread(
    pocket: PocketAuth, alice: Browser, ear: Ear
) -> None:
    """Synchronous from end to end."""
    work = Work(SYNC)
    graph, _ = build(
        "create_agent",
        pocket,
        [work.tool("look", "acme")],
        [says(call("look", text="x"))],
    )
    listening(pocket, graph, ear)
    [pending] = pending_authorizations(ask(graph, SYNC))
    alice.visit(pending.url)
    assert asyncio.run(ear.wait()) == ["resumed"]
    assert work.names == ["look"]


def test_loop_that_has_ended_is_reported(
    pocket: PocketAuth, alice: Browser, ear: Ear
) -> None:
    """Nothing hangs, and the app can still resume."""
    graph, work = one_tool("create_agent", pocket)

    async def begin() -> Any:
        listening(pocket, graph, ear)
        return await graph.ainvoke(GO, thread())

    paused = asyncio.run(begin())
    alice.visit(pending_authorizations(paused)[0].url)
    assert asyncio.run(ear.wait()) == ["not_resumed"]
    assert "event loop" in (ear.events[-1].reason or "")
    asyncio.run(graph.ainvoke(resume(paused), thread()))
    assert work.names == ["look"]


async def test_pause_of_an_ended_process_goes_on_in_a_new_one(
    make_pocket: Callable[..., PocketAuth], alice: Browser, ear: Ear, tmp_path: Path
) -> None:
    """After a restart the thread, its settings and its user are known from the store."""
    seen: list[Any] = []

    def owner(run: RunInfo) -> str:
        seen.append(run.config["configurable"].get("user"))
        return str(run.config["configurable"]["user"])

    store, path = f"sqlite:///{tmp_path}/sessions.db", str(tmp_path / "checkpoints.db")
    settings = {"storage": store, "owner": owner, "keys": KEYS}
    config = thread(user="ann", topic="weather")
    async with AsyncSqliteSaver.from_conn_string(path) as saver:
        old = make_pocket(**settings)
        graph, _ = one_tool("create_agent", old, saver)
        [pending] = pending_authorizations(await graph.ainvoke(GO, config))
        await old.aclose()
        new = make_pocket(base_url=old.base_url, **settings)
        graph, work = one_tool("create_agent", new, saver)
        listening(new, graph, ear)
        await new.serve()
        await alice.avisit(pending.url)
        assert await ear.wait() == ["resumed"]
    assert work.names == ["look"]
    assert ear.results[0][1]["configurable"] == {
        "thread_id": "1",
        "user": "ann",
        "topic": "weather",
    }
    assert ear.events[0].owner.id == "ann"


async def test_durability_exit_is_waited_for(
    pocket: PocketAuth, alice: Browser, ear: Ear
) -> None:
    """A person faster than the checkpoint is not taken for a newer conversation."""
    graph, work = one_tool("create_agent", pocket)
    listening(pocket, graph, ear)
    for name in "12":
        paused = await graph.ainvoke(GO, thread(name), durability="exit")
        if name == "1":
            await alice.avisit(pending_authorizations(paused)[0].url)
            assert await ear.wait() == ["resumed"]
    assert work.names == ["look", "look"]


# -------------------------------------------------------- whose, which, and what with


async def test_run_goes_on_for_the_user_it_paused_for(
    server: AuthorizationServer,
    make_pocket: Callable[..., PocketAuth],
    ear: Ear,
) -> None:
    """A resolver that knows only the request's own user is not asked again."""
    current: ContextVar[str] = ContextVar("current_user")
    pocket = make_pocket(owner=lambda _: current.get())
    graph, work = one_tool("create_agent", pocket)
    listening(pocket, graph, ear)

    async def request(user: str) -> Any:
        current.set(user)
        return await graph.ainvoke(GO, thread(user))

    people = ["ann", "bob"]
    paused = [await asyncio.create_task(request(p)) for p in people]
    for person, state in zip(people, paused, strict=True):
        await Browser(person).avisit(pending_authorizations(state)[0].url)
    assert await ear.wait(2) == ["resumed"] * 2
    assert sorted(t for _, t in work.done) == sorted(server.issued_access_tokens)
    assert [e.owner.id for e in ear.events if e.type == "connected"] == people


@dataclass
class Context:
    """What an app hands to its graph."""

    user: str


async def test_run_time_context_is_there_again(
    make_pocket: Callable[..., PocketAuth], alice: Browser, ear: Ear
) -> None:
    """In the process that paused, the run goes on with its context."""
    pocket = make_pocket(owner=lambda run: run.context.user)
    work, seen = Work(ASYNC), []

    class Sees(AgentMiddleware[Any, Any]):
        async def abefore_model(self, state: Any, runtime: Any) -> None:
            seen.append(runtime.context.user)

    agent = create_agent(
        ScriptedModel(script=[says(call("look", text="x"))]),
        [work.tool("look", "acme")],
        middleware=[pocket.middleware(), Sees()],
        context_schema=Context,
        checkpointer=InMemorySaver(),
    )
    listening(pocket, agent, ear)
    paused = await agent.ainvoke(GO, thread(), context=Context("ann"))
    await alice.avisit(pending_authorizations(paused)[0].url)
    assert await ear.wait() == ["resumed"]
    assert seen == ["ann", "ann"]


async def test_two_graphs_on_one_saver_are_told_apart(
    server: AuthorizationServer, pocket: PocketAuth, alice: Browser, ear: Ear
) -> None:
    """Each pause goes on in the graph that paused, though their nodes are alike."""
    saver, works, graphs = InMemorySaver(), [], []
    pocket.on_event(ear.hear)
    for provider in ("acme", "zeta"):
        work = Work(ASYNC)
        script = [says(call("look", text="x"))]
        tools = [work.tool("look", provider)]
        graph, _ = build("create_agent", pocket, tools, script, saver)
        pocket.auto_resume(graph)
        works.append(work)
        graphs.append(graph)
    for n, graph in enumerate(graphs):
        paused = await graph.ainvoke(GO, thread(str(n)))
        await alice.avisit(pending_authorizations(paused)[0].url)
    assert await ear.wait(2) == ["resumed"] * 2
    assert [work.names for work in works] == [["look"], ["look"]]


async def test_next_question_is_left_to_the_person(
    pocket: PocketAuth, alice: Browser, ear: Ear
) -> None:
    """A tool's own question after the authorization reads no answer of ours."""
    work = Work(ASYNC)
    tools = [work.tool("look", "acme", question="sure?")]
    script = [says(call("look", text="x"))]
    graph, _ = build("create_agent", pocket, tools, script)
    listening(pocket, graph, ear)
    paused = await graph.ainvoke(GO, thread())
    await alice.avisit(pending_authorizations(paused)[0].url)
    assert await ear.wait() == ["resumed"]
    [question] = (await state_of(graph)).interrupts
    assert (question.value, work.heard) == ("sure?", [])
    assert ear.results[0][0]["__interrupt__"][0].value == "sure?"


async def test_pause_in_a_sub_agent_continues_the_root(
    pocket: PocketAuth, alice: Browser, ear: Ear
) -> None:
    """The root graph is resumed, wherever below it the pause was raised."""
    agent, work = one_tool("create_agent", pocket, saver=None)
    builder = StateGraph(State)
    builder.add_node("agent", agent)
    builder.add_node("after", lambda _: {"messages": [("ai", "after")]})
    builder.add_edge(START, "agent")
    builder.add_edge("agent", "after")
    graph = builder.compile(checkpointer=InMemorySaver())
    listening(pocket, graph, ear)
    paused = await graph.ainvoke(GO, thread())
    await alice.avisit(pending_authorizations(paused)[0].url)
    assert await ear.wait() == ["resumed"]
    assert work.names == ["look"]
    assert ear.results[0][0]["messages"][-1].text == "after"


async def test_nothing_polls_while_a_person_is_awaited(
    make_pocket: Callable[..., PocketAuth], alice: Browser, ear: Ear
) -> None:
    """Between the pause and the click the store is not touched at all."""
    store = Watched("memory://")
    pocket = make_pocket(storage=store)
    graph, work = one_tool("create_agent", pocket)
    listening(pocket, graph, ear)
    paused = await graph.ainvoke(GO, thread())
    await asyncio.sleep(0.1)  # what follows the pause
    before = (store.reads, store.writes, threading.active_count())
    await asyncio.sleep(1.2)  # longer than any poll of ours
    assert (store.reads, store.writes, threading.active_count()) == before
    await alice.avisit(pending_authorizations(paused)[0].url)
    assert await ear.wait() == ["resumed"]
    assert work.names == ["look"]


async def test_other_interrupts_of_the_thread_stay_where_they_are(
    pocket: PocketAuth, alice: Browser, ear: Ear
) -> None:
    """A question of another branch is neither answered nor lost."""
    agent, work = one_tool("create_agent", pocket, saver=None)
    heard: list[Any] = []
    graph = beside(agent, lambda _: heard.append(interrupt("sure?")) or {})
    listening(pocket, graph, ear)
    paused = await graph.ainvoke(GO, thread())
    await alice.avisit(pending_authorizations(paused)[0].url)
    assert await ear.wait() == ["resumed"]
    [left] = (await state_of(graph)).interrupts
    assert (left.value, heard, work.names) == ("sure?", [], ["look"])
