"""
A tool's own `interrupt()` gets its own answer, never ours.

Where no gate stands, or a connection was lost behind it, a guarded call pauses by
itself, in the task in which the tool asks its own questions. LangGraph hands answers
to the `interrupt()` calls of a task by their order; an answer that we leave behind
would be read as the approval of whatever the tool asks next.
"""

# No `from __future__ import annotations`: tools are made of local annotations.

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from conftest import call, says
from graphs import (
    ASYNC,
    DOORS,
    MODES,
    SYNC,
    State,
    Work,
    World,
    ask,
    build,
    results,
    run,
    shared,
    thread,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.func import entrypoint, task
from langgraph.graph import START, StateGraph
from langgraph.prebuilt import ToolNode
from langgraph.types import Command, RetryPolicy, Send, interrupt

from langchain_pocket_auth import (
    ConfigurationError,
    GateRequired,
    PocketAuth,
    pending_authorizations,
)
from langchain_pocket_auth.testing import AuthorizationServer, Browser

world, server, pocket, alice = shared()

BY_VALUE, BY_ID = "value", "id"
STYLES = [BY_VALUE, BY_ID]
GO = {"messages": [("user", "go")]}


def answer(state: Any, value: Any, style: str) -> Command[Any]:
    """Answer the one pause of a run."""
    [pause] = state["__interrupt__"]
    return Command(resume={pause.id: value} if style == BY_ID else value)


def question(state: Any) -> Any:
    """Return the value of the one pause of a run."""
    [pause] = state["__interrupt__"]
    return pause.value


# ------------------------------------------------ places where a guarded call may stand


def door(name: str) -> Callable[..., Any]:
    def make(pocket: PocketAuth, work: Work) -> Any:
        tools = [work.tool("act", "acme", question="approve?")]
        return build(name, pocket, tools, [says(call("act", text="x"))])[0]

    return make


def sent(pocket: PocketAuth, work: Work) -> Any:
    """One `Send` per call to a plain ToolNode: several calls, each in its own task."""
    other = work.tool("other", "acme")
    act = work.tool("act", "acme", question="approve?")
    builder = StateGraph(State)
    calls = [call("act", text="x"), call("other", text="y")]
    builder.add_node("agent", lambda _: {"messages": [says(*calls)]})
    builder.add_node("tools", ToolNode(pocket.wrap([act, other])))
    builder.add_edge(START, "agent")
    builder.add_conditional_edges(
        "agent", lambda _: [Send("tools", [c]) for c in calls[:1]], ["tools"]
    )
    return builder.compile(checkpointer=InMemorySaver())


def in_entrypoint(pocket: PocketAuth, work: Work) -> Any:
    """A plain call in a function of the functional API."""
    act = pocket.wrap(work.tool("act", "acme", question="approve?"))
    return entrypoint(checkpointer=InMemorySaver())(_calling(act, work.mode))


def in_task(pocket: PocketAuth, work: Work) -> Any:
    """The same inside a `@task` of an entrypoint."""
    act = pocket.wrap(work.tool("act", "acme", question="approve?"))
    inner = task(_calling(act, work.mode))
    if work.mode == SYNC:

        def flow(value: Any) -> Any:
            return inner(value).result()

        return entrypoint(checkpointer=InMemorySaver())(flow)

    async def aflow(value: Any) -> Any:
        return await inner(value)

    return entrypoint(checkpointer=InMemorySaver())(aflow)


def in_tool(pocket: PocketAuth, work: Work) -> Any:
    """A guarded tool that an unguarded one calls."""
    act = pocket.wrap(work.tool("act", "acme", question="approve?"))
    return _outer(pocket, work, act, wrap=False)


def in_guarded_tool(pocket: PocketAuth, work: Work) -> Any:
    """A guarded tool that a guarded one calls."""
    act = pocket.wrap(work.tool("act", "acme", question="approve?"))
    return _outer(pocket, work, act, wrap=True)


def in_subgraph(pocket: PocketAuth, work: Work) -> Any:
    """A child graph as a node: it inherits the parent's answer given by value."""
    child = door("ToolNode")(pocket, work)
    child.checkpointer = None
    builder = StateGraph(State)
    builder.add_node("child", child)
    builder.add_edge(START, "child")
    return builder.compile(checkpointer=InMemorySaver())


def agent_as_tool(name: str, *, keeps: bool = True) -> Callable[..., Any]:
    """Return a place: a tool that runs a child graph, with or without checkpoints."""

    def make(pocket: PocketAuth, work: Work) -> Any:
        child = door(name)(pocket, work)
        child.checkpointer = None if keeps else False

        @tool
        def delegate() -> str:
            """Ask another agent."""
            return str(child.invoke(GO)["messages"][-1].text)

        @tool("delegate")
        async def adelegate() -> str:
            """Ask another agent."""
            return str((await child.ainvoke(GO))["messages"][-1].text)

        outer = delegate if work.mode == SYNC else adelegate
        return build("create_agent", pocket, [outer], [says(call("delegate"))])[0]

    return make


def retried(pocket: PocketAuth, work: Work) -> Any:
    """A node that fails once after its answers, and is run again from its top."""
    act = pocket.wrap(work.tool("act", "acme", question="approve?"))
    failed: list[bool] = []

    def node(state: Any) -> Any:
        result = act.invoke({"text": "x"})
        if not failed:
            failed.append(True)
            raise ConnectionError
        return {"messages": [("ai", result)]}

    async def anode(state: Any) -> Any:
        result = await act.ainvoke({"text": "x"})
        if not failed:
            failed.append(True)
            raise ConnectionError
        return {"messages": [("ai", result)]}

    builder = StateGraph(State)
    policy = RetryPolicy(initial_interval=0.01, jitter=False, retry_on=ConnectionError)
    builder.add_node("node", node if work.mode == SYNC else anode, retry_policy=policy)
    builder.add_edge(START, "node")
    return builder.compile(checkpointer=InMemorySaver())


def _calling(act: Any, mode: str) -> Any:
    if mode == SYNC:

        def flow(value: Any) -> Any:
            return act.invoke({"text": "x"})

        return flow

    async def aflow(value: Any) -> Any:
        return await act.ainvoke({"text": "x"})

    return aflow


def _outer(pocket: PocketAuth, work: Work, act: Any, *, wrap: bool) -> Any:
    if work.mode == SYNC:

        @tool
        def outer() -> str:
            """Call another tool."""
            return str(act.invoke({"text": "x"}))

    else:

        @tool
        async def outer() -> str:
            """Call another tool."""
            return str(await act.ainvoke({"text": "x"}))

    used = pocket.wrap(outer, provider="acme") if wrap else outer
    return build("ToolNode", pocket, [used], [says(call("outer"))])[0]


PLACES = {
    **{name: door(name) for name in DOORS},
    "Send": sent,
    "entrypoint": in_entrypoint,
    "task": in_task,
    "tool": in_tool,
    "guarded tool": in_guarded_tool,
    "subgraph": in_subgraph,
    "retry": retried,
    "agent as tool": agent_as_tool("create_agent"),
    "agent as tool, no gate": agent_as_tool("ToolNode"),
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_own_question_gets_its_own_answer(
    server: AuthorizationServer,
    pocket: PocketAuth,
    alice: Browser,
    *,
    place: Callable[..., Any],
    mode: str,
    style: str,
) -> None:
    """Looking again twice, then the consent, then the tool's question: in order."""
    work = Work(mode)
    graph = place(pocket, work)
    state = run(graph, GO, mode)
    for n in range(2):
        assert question(state)["type"] == "pocket_auth"
        state = run(graph, answer(state, f"ours {n}", style), mode)
    alice.visit(pending_authorizations(state)[0].url)
    state = run(graph, answer(state, "ours, done", style), mode)
    assert question(state) == "approve?"
    assert (work.heard, work.done) == ([], [])
    state = run(graph, answer(state, "theirs", style), mode)
    assert "__interrupt__" not in state
    assert set(work.heard) == {("act", "theirs")}
    assert set(work.done) == {("act", server.issued_access_tokens[0])}
    # The node that fails once runs its body once more, with the same answer.
    assert len(work.done) == (2 if place is retried else 1)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", DOORS)
def test_pause_behind_an_own_question_is_told_apart(
    server: AuthorizationServer,
    pocket: PocketAuth,
    alice: Browser,
    *,
    name: str,
    mode: str,
    style: str,
) -> None:
    """A connection lost while the tool asks is asked for, and the tool asks again."""
    work = Work(mode)
    graph = door(name)(pocket, work)
    state = run(graph, GO, mode)
    alice.visit(pending_authorizations(state)[0].url)
    state = run(graph, answer(state, "ours", style), mode)
    assert question(state) == "approve?"
    server.revoke_grants("alice")
    asyncio.run(_disconnect(pocket))

    state = run(graph, answer(state, "too early", style), mode)
    assert question(state)["type"] == "pocket_auth"
    alice.visit(pending_authorizations(state)[0].url)
    state = run(graph, answer(state, "ours again", style), mode)
    if "__interrupt__" in state:
        assert question(state) == "approve?"
        state = run(graph, answer(state, "theirs", style), mode)
    assert work.heard in ([("act", "theirs")], [("act", "too early")])


async def _disconnect(pocket: PocketAuth) -> None:
    owner = pocket._service.owners.resolve({})
    assert await pocket.delete_session("acme", owner=owner)


@pytest.mark.parametrize("mode", MODES)
def test_partial_answers_leave_the_other_call_alone(
    pocket: PocketAuth, alice: Browser, mode: str
) -> None:
    """Of two paused tasks one is answered; the other re-runs and loses no answer."""
    work = Work(mode)
    tools = [
        work.tool("one", "acme", question="one?"),
        work.tool("two", "zeta", question="two?"),
    ]
    calls = [call("one", text="x"), call("two", text="y")]
    builder = StateGraph(State)
    builder.add_node("agent", lambda _: {"messages": [says(*calls)]})
    builder.add_node("tools", ToolNode(pocket.wrap(tools)))
    builder.add_edge(START, "agent")
    builder.add_conditional_edges(
        "agent", lambda _: [Send("tools", [c]) for c in calls], ["tools"]
    )
    graph = builder.compile(checkpointer=InMemorySaver())
    state = run(graph, GO, mode)
    ids = {p.value["requests"][0]["provider"]: p.id for p in state["__interrupt__"]}
    for pending in pending_authorizations(state):
        alice.visit(pending.url)
    # Both are connected now, but only one task is told so.
    state = run(graph, Command(resume={ids["acme"]: "ours"}), mode)
    asked = {p.value: p.id for p in state["__interrupt__"]}
    assert set(asked) == {"one?", "two?"}
    state = run(graph, Command(resume={asked["two?"]: "second"}), mode)
    state = run(graph, Command(resume={asked["one?"]: "first"}), mode)
    assert sorted(work.heard) == [("one", "first"), ("two", "second")]
    assert sorted(results(state)) == ["one", "two"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("then", [BY_ID, "again"])
def test_answer_by_value_does_not_come_back_in_a_later_run(
    pocket: PocketAuth, alice: Browser, mode: str, then: str
) -> None:
    """LangGraph keeps an answer by value; no later question of the task reads it."""
    heard: list[Any] = []
    steps = [("guarded", "acme"), ("asks", "zeta")]
    flow = flow_of(pocket, steps, heard, mode)
    state = run(flow, 1, mode)
    alice.visit(pending_authorizations(state)[0].url)
    state = run(flow, answer(state, "ours", BY_VALUE), mode)
    alice.visit(pending_authorizations(state)[0].url)
    again = then == "again"
    state = run(flow, None if again else answer(state, "ours", BY_ID), mode)
    assert question(state) == "question 1"
    run(flow, answer(state, "theirs", BY_ID), mode)
    assert heard == [("act1", "theirs")]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", DOORS)
def test_child_graph_without_checkpoints_does_not_pause(
    pocket: PocketAuth, alice: Browser, name: str, mode: str
) -> None:
    """It starts from its top each time: no pause of ours, and no answer taken."""
    work = Work(mode)
    graph = agent_as_tool(name, keeps=False)(pocket, work)
    with pytest.raises(ConfigurationError, match="checkpointer=False"):
        run(graph, GO, mode)
    assert asyncio.run(_futures(pocket)) == set()

    request = pocket.make_request([], auth_provider="acme")
    owner = pocket._service.owners.resolve({})
    url = asyncio.run(pocket.prepare(request, auth_provider="acme", owner=owner))
    alice.visit(url or "")
    state = run(graph, GO, mode, thread("2"))
    assert question(state) == "approve?"
    run(graph, answer(state, "theirs", BY_VALUE), mode, thread("2"))
    assert work.heard == [("act", "theirs")]


# ---------------------------------------------------------------------- shared tasks


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("connected", [False, True], ids=["none", "one"])
def test_two_calls_in_one_task_need_the_gate(
    pocket: PocketAuth, alice: Browser, mode: str, connected: bool
) -> None:
    """In a shared task nothing is asked or prepared; the error names the remedy."""
    work = Work(mode)
    tools = [work.tool("a", "acme"), work.tool("b", "zeta")]
    if connected:
        graph, _ = build("create_agent", pocket, tools[:1], [says(call("a", text="x"))])
        alice.visit(pending_authorizations(ask(graph, mode, thread("0")))[0].url)
    script = [says(call("a", text="x"), call("b", text="y"))]
    graph, _ = build("ToolNode", pocket, tools, script)
    with pytest.raises(GateRequired, match="add_tool_node"):
        ask(graph, mode)
    assert not graph.get_state(thread()).interrupts
    assert asyncio.run(_futures(pocket)) == ({"acme"} if connected else set())


async def _futures(pocket: PocketAuth) -> set[str]:
    """Return the providers for which a link is, or was, out."""
    from langchain_pocket_auth._vault import Future

    owner = pocket._service.owners.resolve({})
    shelf = await pocket._service.ask(lambda engine: engine.vault.shelf(owner))
    return {key.provider for key in shelf.keys(Future)}


@pytest.mark.parametrize("delay_s", [0.0, 0.01], ids=["at once", "staggered"])
async def test_concurrent_calls_in_one_entrypoint_need_the_gate(
    pocket: PocketAuth, delay_s: float
) -> None:
    """Two calls at once in a task: no pause, no link, whoever comes first."""
    work = Work(ASYNC)
    one = pocket.wrap(work.tool("one", "acme"))
    two = pocket.wrap(work.tool("two", "zeta"))

    async def later(act: Any) -> Any:
        await asyncio.sleep(0)
        return await act.ainvoke({"text": "y"})

    @entrypoint(checkpointer=InMemorySaver())
    async def flow(_: Any) -> Any:
        first = one.ainvoke({"text": "x"})
        second = later(two) if delay_s else two.ainvoke({"text": "y"})
        return await asyncio.gather(first, second, return_exceptions=True)

    errors = await flow.ainvoke(1, thread())
    assert [type(error) for error in errors] == [GateRequired, GateRequired]
    assert await _futures(pocket) == set()


async def test_call_beside_a_running_body_does_not_pause(
    server: AuthorizationServer, pocket: PocketAuth, alice: Browser
) -> None:
    """While another guarded body of the task runs, its questions could be mixed up."""
    started, ended = asyncio.Event(), asyncio.Event()

    @tool
    async def slow() -> str:
        """Take a while."""
        started.set()
        await ended.wait()
        return "slow"

    work = Work(ASYNC)
    one = pocket.wrap(slow, provider="acme")
    two = pocket.wrap(work.tool("two", "zeta"))
    owner = pocket._service.owners.resolve({})
    request = pocket.make_request([], auth_provider="acme")
    url = await pocket.prepare(request, auth_provider="acme", owner=owner)
    await alice.avisit(url or "")

    async def beside() -> Any:
        await started.wait()
        try:
            return await two.ainvoke({"text": "y"})
        finally:
            ended.set()

    @entrypoint(checkpointer=InMemorySaver())
    async def flow(_: Any) -> Any:
        return await asyncio.gather(one.ainvoke({}), beside(), return_exceptions=True)

    async with asyncio.timeout(10):
        first, second = await flow.ainvoke(1, thread())
    assert (first, type(second)) == ("slow", GateRequired)


async def test_calls_after_concurrent_ones_may_pause_again(
    pocket: PocketAuth, alice: Browser
) -> None:
    """What ran side by side and is over does not forbid a pause."""
    work = Work(ASYNC)
    one = pocket.wrap(work.tool("one", "acme"))
    two = pocket.wrap(work.tool("two", "zeta", question="sure?"))
    owner = pocket._service.owners.resolve({})
    request = pocket.make_request([], auth_provider="acme")
    url = await pocket.prepare(request, auth_provider="acme", owner=owner)
    await alice.avisit(url or "")

    @entrypoint(checkpointer=InMemorySaver())
    async def flow(_: Any) -> Any:
        await asyncio.gather(*(one.ainvoke({"text": "x"}) for _ in range(3)))
        return await two.ainvoke({"text": "y"})

    state = await flow.ainvoke(1, thread())
    await alice.avisit(pending_authorizations(state)[0].url)
    state = await flow.ainvoke(answer(state, "ours", BY_VALUE), thread())
    assert question(state) == "sure?"
    await flow.ainvoke(answer(state, "theirs", BY_VALUE), thread())
    assert work.heard == [("two", "theirs")]


# ------------------------------------------------------------------- any order of these


Step = tuple[str, str]
STEPS = st.lists(
    st.sampled_from(
        [
            ("guarded", "acme"),
            ("guarded", "zeta"),
            ("asks", "acme"),
            ("asks", "zeta"),
            ("own", ""),
        ]
    ),
    min_size=1,
    max_size=5,
)


def flow_of(pocket: PocketAuth, steps: list[Step], heard: list[Any], mode: str) -> Any:
    """Return an entrypoint that does the steps, each question with a tag of its own."""
    work = Work(mode)
    acts = [
        None
        if kind == "own"
        else pocket.wrap(
            work.tool(
                f"act{n}",
                provider,
                question=f"question {n}" if kind == "asks" else None,
            )
        )
        for n, (kind, provider) in enumerate(steps)
    ]

    def sync(_: Any) -> str:
        work.heard.clear()
        for n, act in enumerate(acts):
            if act is None:
                work.heard.append((f"act{n}", interrupt(f"question {n}")))
            else:
                act.invoke({"text": "x"})
        heard[:] = work.heard
        return "done"

    async def async_(_: Any) -> str:
        work.heard.clear()
        for n, act in enumerate(acts):
            if act is None:
                work.heard.append((f"act{n}", interrupt(f"question {n}")))
            else:
                await act.ainvoke({"text": "x"})
        heard[:] = work.heard
        return "done"

    flow = sync if mode == SYNC else async_
    return entrypoint(checkpointer=InMemorySaver())(flow)


# How pauses are met: after the consent or too early; with an answer by value, by id,
# or by running the graph again without one.
CONSENT = st.sampled_from(["consent", "too early"])
MEETINGS = st.lists(
    st.tuples(st.sampled_from([*STYLES, "again"]), CONSENT), max_size=12
)


@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(steps=STEPS, mode=st.sampled_from(MODES), meetings=MEETINGS)
def test_every_answer_reaches_who_asked(
    world: World,
    alice: Browser,
    steps: list[Step],
    mode: str,
    meetings: list[tuple[str, str]],
) -> None:
    """
    Whatever a task does in a row, and however it is resumed, none of our answers.

    And where answers by value are not mixed with other ways to resume, each question
    gets the very answer to it; LangGraph itself gives others where they are.
    """
    world.renew()
    heard: list[Any] = []
    flow = flow_of(world.pocket, steps, heard, mode)
    styles = {style for style, _ in meetings}
    rest = BY_VALUE if styles == {BY_VALUE} else BY_ID
    state, met = run(flow, 1, mode), iter(meetings)
    while state != "done":
        style, consent = next(met, (rest, "consent"))
        asked = question(state)
        value = f"answer to {asked}" if isinstance(asked, str) else "ours"
        if value == "ours" and consent == "consent":
            alice.visit(pending_authorizations(state)[0].url)
        again = style == "again"
        state = run(flow, None if again else answer(state, value, style), mode)
    wanted = [n for n, (kind, _) in enumerate(steps) if kind != "guarded"]
    assert [name for name, _ in heard] == [f"act{n}" for n in wanted]
    assert "ours" not in [value for _, value in heard]
    if BY_VALUE not in styles or styles == {BY_VALUE}:
        assert heard == [(f"act{n}", f"answer to question {n}") for n in wanted]
