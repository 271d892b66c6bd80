"""
Each private name of LangGraph and LangChain that the package reads, by a real run.

A failure here names what moved; the places to adapt are `_task.py` and `_wrapping.py`.
"""

from __future__ import annotations

import asyncio
import functools
import weakref
from typing import Any

import pytest
from conftest import call, says
from graphs import ASYNC, MODES, SYNC, State, run
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import BaseTool, StructuredTool, Tool, tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.func import entrypoint
from langgraph.graph import START, StateGraph
from langgraph.prebuilt import ToolNode
from langgraph.types import Command, RetryPolicy, Send, interrupt
from pydantic import Field

from langchain_pocket_auth import _task


def entering(seen: list[Any], body: Any = None) -> Any:
    """Return a graph of one node that looks at its config."""

    def node(state: Any, config: RunnableConfig) -> Any:
        found = dict(config["configurable"])
        scratchpad = found["__pregel_scratchpad"]
        found["answers"] = list(scratchpad.resume)
        found["by value"] = scratchpad.get_null_resume(False)
        seen.append({**found, "metadata": dict(config["metadata"])})
        return body() if body else {}

    builder = StateGraph(State)
    builder.add_node("node", node)
    builder.add_edge(START, "node")
    return builder


def twice() -> Any:
    interrupt("first?")
    interrupt("second?")
    return {}


GO = {"messages": [("user", "go")]}


@pytest.mark.parametrize("mode", MODES)
def test_scratchpad_has_answers_and_counter(mode: str) -> None:
    """`__pregel_scratchpad`: .resume, .get_null_resume(consume), .interrupt_counter."""
    seen: list[Any] = []
    graph = entering(seen, twice).compile(checkpointer=InMemorySaver())
    state = run(graph, GO, mode)
    run(graph, Command(resume="one"), mode)
    state = graph.get_state({"configurable": {"thread_id": "1"}})
    run(graph, Command(resume={state.interrupts[0].id: "two"}), mode)
    answers = [(s["answers"], s["by value"]) for s in seen]
    assert answers[0] == ([], None), "the first execution already has answers"
    assert answers[1] == ([], "one"), "an answer by value is not in get_null_resume"
    assert answers[2][0] == ["one", "two"], "scratchpad.resume is not in order"
    for found in seen:
        scratchpad = found["__pregel_scratchpad"]
        assert {scratchpad.interrupt_counter: 1}, "the counter cannot be a key"
        assert weakref.ref(scratchpad.get_null_resume), "it cannot be a weak key"


@pytest.mark.parametrize("mode", MODES)
def test_task_id_stays_the_same_when_a_task_runs_again(mode: str) -> None:
    """`__pregel_task_id`: the durable count of pauses is kept under it."""
    seen: list[Any] = []
    graph = entering(seen, twice).compile(checkpointer=InMemorySaver())
    run(graph, GO, mode)
    run(graph, Command(resume="one"), mode)
    ids = {found["__pregel_task_id"] for found in seen}
    assert len(seen) == 2
    assert len(ids) == 1, "a task that runs again has another id"


@pytest.mark.parametrize("mode", MODES)
def test_resumed_runs_say_so(mode: str) -> None:
    """`__pregel_resuming`, and `__pregel_resume_map` when resumed by id."""
    seen: list[Any] = []
    graph = entering(seen, twice).compile(checkpointer=InMemorySaver())
    state = run(graph, GO, mode)
    run(graph, None, mode)
    run(graph, Command(resume={state["__interrupt__"][0].id: "one"}), mode)
    first, again, by_id = seen
    assert not first.get("__pregel_resuming"), "a first run says it is resumed"
    assert again.get("__pregel_resuming"), "a run without input does not say so"
    assert by_id.get("__pregel_resuming"), "a resumed run does not say so"
    assert not again.get("__pregel_resume_map")
    assert by_id.get("__pregel_resume_map"), "the map of answers is kept elsewhere"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("keeps", [True, False])
def test_loop_of_a_task_shows_its_own_checkpointer_and_input(
    mode: str, keeps: bool
) -> None:
    """`__pregel_call` → schedule_task → the loop: .checkpointer, .input, .is_nested."""
    seen: list[Any] = []
    child = entering(seen, twice).compile(checkpointer=None if keeps else False)
    builder = entering(seen)
    builder.add_node("child", child)
    builder.add_edge("node", "child")
    graph = builder.compile(checkpointer=InMemorySaver())
    run(graph, GO, mode)
    run(graph, None, mode)
    loops = [_task._loop({"configurable": found}) for found in seen]
    assert None not in loops, "the loop is not behind __pregel_call any more"
    assert [loop.is_nested for loop in loops] == [False, True, True]
    kept = [_task.has_checkpointer({"configurable": found}) for found in seen]
    assert kept == [True, keeps, keeps], "loop.checkpointer is not the graph's own"
    seen.clear()
    graph = entering(seen, twice).compile(checkpointer=InMemorySaver())
    run(graph, GO, mode)
    run(graph, Command(resume="one"), mode)
    run(graph, None, mode)
    inputs = [_task._loop({"configurable": found}).input for found in seen]
    assert isinstance(inputs[1], Command), "a resumed run does not tell its command"
    assert [value is None for value in inputs] == [False, False, True]


def starting(child: Any, config: Any, mode: str) -> Any:
    """Return a node that starts a child graph by its code."""
    if mode == SYNC:
        return lambda _: child.invoke(GO, config)

    async def start(state: Any) -> Any:
        return await child.ainvoke(GO, config)

    return start


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("own", [None, {"user": "bob"}, {"thread_id": "own"}])
def test_what_a_task_starts_is_told_from_what_it_is_part_of(
    mode: str, own: dict[str, str] | None
) -> None:
    """
    A child's `loop.config` leads to its parent's loop; with a thread id it does not.

    Then it has no parent, and `metadata["langgraph_triggers"]` of the task that
    started it: a tuple, and not yet overwritten with those of its own tasks.
    """
    seen: list[Any] = []
    child = entering(seen).compile(checkpointer=InMemorySaver())
    middle = StateGraph(State)
    middle.add_node("child", child)
    middle.add_edge(START, "child")
    builder = StateGraph(State)
    config = {"configurable": own} if own else None
    builder.add_node("node", starting(middle.compile(checkpointer=None), config, mode))
    builder.add_edge(START, "node")
    mine = {"configurable": {"thread_id": "1", "user": "ann"}, "metadata": {"a": 1}}
    run(builder.compile(checkpointer=InMemorySaver()), GO, mode, mine)
    [found] = seen
    root = _task._root({"configurable": found})
    assert root is not None, "a child's loop does not lead to its parent's any more"
    assert root.is_nested is False
    apart = own == {"thread_id": "own"}
    expected = own if apart else mine["configurable"]
    known = {k: root.config["configurable"].get(k) for k in ("thread_id", "user")}
    assert {k: v for k, v in known.items() if v} == expected
    triggers = root.config["metadata"].get("langgraph_triggers")
    assert isinstance(triggers, tuple) is apart, f"a child is started with {triggers}"
    assert root.config["metadata"]["a"] == 1, "metadata are not handed down any more"
    assert _task.detached({"configurable": found}) is apart


@pytest.mark.parametrize("mode", MODES)
def test_runtime_is_in_the_config(mode: str) -> None:
    """`__pregel_runtime` of the root loop has the context that the app gave."""
    seen: list[Any] = []
    child = entering(seen).compile()
    child.context_schema = dict
    start = {
        SYNC: lambda _: child.invoke(GO, context={"user": "bob"}),
        ASYNC: lambda _: child.ainvoke(GO, context={"user": "bob"}),
    }[mode]

    def node(state: Any) -> Any:
        return start(state)

    async def anode(state: Any) -> Any:
        return await start(state)

    builder = StateGraph(State, context_schema=dict)
    builder.add_node("node", node if mode == SYNC else anode)
    builder.add_edge(START, "node")
    graph, context = builder.compile(), {"user": "ann"}
    if mode == SYNC:
        graph.invoke(GO, context=context)
    else:
        asyncio.run(graph.ainvoke(GO, context=context))
    [found] = seen
    mine = _task.runtime_of({"configurable": found})
    roots = _task.runtime_of(_task.root_config({"configurable": found}))
    assert mine.context == {"user": "bob"}, "a child has no context of its own"
    assert roots.context == {"user": "ann"}, "the root's run time is kept elsewhere"


@pytest.mark.parametrize("saver", [None, InMemorySaver()], ids=["none", "memory"])
def test_checkpointer_is_in_the_config(saver: Any) -> None:
    """`__pregel_checkpointer`: without one a pause is refused."""
    seen: list[Any] = []
    run(entering(seen).compile(checkpointer=saver), GO, SYNC)
    assert _task.has_checkpointer({"configurable": seen[0]}) is (saver is not None)


@pytest.mark.parametrize("mode", MODES)
def test_sent_tasks_are_told_by_their_trigger(mode: str) -> None:
    """`langgraph_triggers` is `("__pregel_push",)` under Send, and nowhere else."""
    seen: list[Any] = []
    builder = entering(seen)
    builder.add_node("sender", lambda _: {})
    builder.add_edge(START, "sender")
    builder.add_conditional_edges("sender", lambda _: [Send("node", GO)], ["node"])
    run(builder.compile(), GO, mode)
    triggers = [tuple(s["metadata"]["langgraph_triggers"]) for s in seen]
    assert len(triggers) == 2
    assert triggers.count(("__pregel_push",)) == 1, f"a Send task says {triggers}"


@pytest.mark.parametrize("mode", MODES)
def test_channels_are_read_as_toolnode_reads_them(mode: str) -> None:
    """`__pregel_read` is a partial whose second argument are the channels."""
    seen: list[Any] = []
    calls = says(call("a"), call("b"))
    graph = entering(seen).compile()
    run(graph, {"messages": [calls]}, mode)
    read = seen[0]["__pregel_read"]
    assert isinstance(read, functools.partial), "__pregel_read is no partial any more"
    values = read(list(read.args[1]), True)
    assert [c["id"] for c in _task.open_calls(values["messages"])] == [
        "call-a",
        "call-b",
    ]


def test_retry_starts_counting_anew() -> None:
    """A retried task keeps its answers and gets a new interrupt_counter."""
    counters: list[Any] = []

    def node(state: Any, config: RunnableConfig) -> Any:
        scratchpad = config["configurable"]["__pregel_scratchpad"]
        counters.append((scratchpad.get_null_resume, scratchpad.interrupt_counter))
        if len(counters) == 1:
            raise ConnectionError
        return {}

    builder = StateGraph(State)
    policy = RetryPolicy(initial_interval=0.01, jitter=False, retry_on=ConnectionError)
    builder.add_node("node", node, retry_policy=policy)
    builder.add_edge(START, "node")
    builder.compile().invoke(GO)
    (answers, counter), (same_answers, other) = counters
    assert answers is same_answers, "a retry takes its answers elsewhere"
    assert counter is not other, "a retry goes on counting where it stopped"


@pytest.mark.parametrize("mode", MODES)
def test_executions_are_forgotten_with_their_tasks(mode: str) -> None:
    """What is kept about a running task does not outlive it."""
    import gc

    seen: list[Any] = []

    def body() -> Any:
        from langgraph.config import get_config

        found = _task.guarded_call(get_config())
        assert found is not None
        seen.append(found.ordinal)
        found.leave()
        return {}

    gc.collect()
    before = len(_task._executions)
    for _ in range(3):
        run(entering([], body).compile(), GO, mode)
    gc.collect()
    assert seen == [0, 0, 0]
    assert len(_task._executions) <= before


# ----------------------------------------------------------------------- langchain-core


class Noted(BaseTool):
    """A tool that notes which of its methods LangChain calls."""

    name: str = "noted"
    description: str = "Note."
    notes: list[str] = Field(default_factory=list)

    def _to_args_and_kwargs(self, tool_input: Any, tool_call_id: str | None) -> Any:
        self.notes.append("_to_args_and_kwargs")
        return super()._to_args_and_kwargs(tool_input, tool_call_id)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        self.notes.append("run")
        assert {"config", "tool_call_id"} <= kwargs.keys(), "run() is called otherwise"
        return super().run(*args, **kwargs)

    async def arun(self, *args: Any, **kwargs: Any) -> Any:
        self.notes.append("arun")
        assert {"config", "tool_call_id"} <= kwargs.keys(), "arun() is called otherwise"
        return await super().arun(*args, **kwargs)

    def _run(self, text: str) -> str:
        self.notes.append("_run")
        return text

    async def _arun(self, text: str) -> str:
        self.notes.append("_arun")
        return text


def test_invoke_passes_the_seams_in_order() -> None:
    """`invoke` → `run` → `_to_args_and_kwargs` → `_run`; the async ones likewise."""
    noted = Noted()
    noted.invoke(call("noted", text="x"))
    assert noted.notes == ["run", "_to_args_and_kwargs", "_run"]
    noted.notes.clear()
    asyncio.run(noted.ainvoke(call("noted", text="x")))
    assert noted.notes == ["arun", "_to_args_and_kwargs", "_arun"]


@pytest.mark.parametrize("kind", [StructuredTool, Tool])
def test_function_tools_go_to_a_thread_through_invoke(kind: Any) -> None:
    """`ainvoke` of a tool without a coroutine calls `invoke`, and so `run`."""
    import threading

    threads: list[Any] = []

    class Watched(kind):
        def run(self, *args: Any, **kwargs: Any) -> Any:
            threads.append(threading.current_thread())
            return super().run(*args, **kwargs)

    def echo(text: str) -> str:
        """Echo."""
        return text

    if kind is Tool:
        watched = Watched(name="echo", func=echo, description="Echo.")
    else:
        watched = Watched.from_function(echo)
    assert asyncio.run(watched.ainvoke("x" if kind is Tool else {"text": "x"})) == "x"
    assert threads
    assert threads[0] is not threading.main_thread(), "ainvoke does not use a thread"


@pytest.mark.parametrize("mode", MODES)
def test_toolnode_calls_tools_by_invoke_with_a_tool_call(mode: str) -> None:
    """ToolNode passes the ToolCall and the config, so that a call knows its id."""
    noted = Noted()
    builder = StateGraph(State)
    builder.add_node("tools", ToolNode([noted]))
    builder.add_edge(START, "tools")
    done = run(builder.compile(), {"messages": [says(call("noted", text="x"))]}, mode)
    assert done["messages"][-1].tool_call_id == "call-noted"
    assert noted.notes[0] == ("run" if mode == SYNC else "arun")


def test_class_of_a_tool_can_be_changed() -> None:
    """`__class__` and `__pydantic_private__` of a copied tool may be set."""

    @tool
    def echo(text: str) -> str:
        """Echo."""
        return text

    copy = echo.model_copy()
    other = type("Other", (type(echo),), {"__annotations__": {}})
    object.__setattr__(copy, "__class__", other)
    object.__setattr__(
        copy, "__pydantic_private__", {**(copy.__pydantic_private__ or {})}
    )
    assert isinstance(copy, StructuredTool)
    assert copy.invoke({"text": "x"}) == "x"
    assert type(echo) is StructuredTool


async def test_entrypoints_and_tasks_have_the_same_seams() -> None:
    """The functional API keeps scratchpad, task id and channels at the same place."""
    seen: list[Any] = []

    @entrypoint(checkpointer=InMemorySaver())
    async def flow(value: Any, config: RunnableConfig) -> Any:
        seen.append(config["configurable"])
        return value

    await flow.ainvoke(1, {"configurable": {"thread_id": "1"}})
    names = ("__pregel_scratchpad", "__pregel_task_id", "__pregel_read")
    missing = [name for name in names if name not in seen[0]]
    assert not missing, f"an entrypoint does not tell {missing}"
    found = _task.guarded_call({"configurable": seen[0]})
    assert found is not None
    assert found.may_pause, f"an entrypoint looks like a shared task in {ASYNC} runs"
    found.leave()


@pytest.mark.parametrize("mode", MODES)
def test_loop_tells_how_far_a_resumed_run_has_come(mode: str) -> None:
    """`.input`, `.step`, `.stop`: which steps of which run others could be at, too."""
    seen: list[Any] = []

    def look(name: str) -> Any:
        def node(_: Any, config: RunnableConfig) -> Any:
            seen.append((name, _task.just_resumed(config)))
            return interrupt("?") and {} if name == "gate" else {}

        return node

    builder = StateGraph(State)
    names = ["gate", "tools", "model", "again"]
    for name in names:
        builder.add_node(name, look(name))
    for before, after in zip([START, *names], names, strict=False):
        builder.add_edge(before, after)
    graph = builder.compile(checkpointer=InMemorySaver())
    run(graph, GO, mode)
    run(graph, Command(resume="yes"), mode)
    assert seen == [
        ("gate", False),
        ("gate", True),
        ("tools", True),
        ("model", True),
        ("again", False),
    ], "the loop's input and steps are counted otherwise"


@pytest.mark.parametrize("mode", MODES)
def test_loop_tells_nodes_and_the_checkpoint_before(mode: str) -> None:
    """`.nodes` is the graph's own; `.prev_checkpoint_config`, `checkpoint_map`."""
    seen: list[Any] = []

    def node(_: Any, config: RunnableConfig) -> Any:
        loop = _task._loop(config)
        before = loop.prev_checkpoint_config["configurable"]["checkpoint_id"]
        found = _task.resumption(config)
        assert found is not None
        seen.append((loop.nodes, before, found.checkpoint_id, found.nodes))
        return {}

    builder = StateGraph(State)
    builder.add_node("one", node)
    builder.add_node("two", node)
    builder.add_edge(START, "one")
    builder.add_edge("one", "two")
    graph = builder.compile(checkpointer=InMemorySaver())
    run(graph, GO, mode)
    (nodes, _, first, known), (_, before, second, _) = seen
    assert nodes is graph.nodes
    assert known is graph.nodes
    assert before == first, "the checkpoint before is kept elsewhere"
    assert first < second, "checkpoint ids are not in the order of time"


@pytest.mark.parametrize("mode", MODES)
def test_interrupts_are_named_by_namespace_and_answers(mode: str) -> None:
    """`_interrupt_id`, and the pending writes in which a loop keeps interrupts."""
    from langgraph.types import _interrupt_id

    seen: list[Any] = []

    def node(_: Any, config: RunnableConfig) -> Any:
        found = dict(config["configurable"])
        pending = _task._loop(config).checkpoint_pending_writes
        found["interrupts"] = [
            interrupt.id
            for _, channel, value in pending
            if channel == "__interrupt__"
            for interrupt in value
        ]
        seen.append(found)
        return twice()

    builder = StateGraph(State)
    builder.add_node("node", node)
    builder.add_edge(START, "node")
    graph = builder.compile(checkpointer=InMemorySaver())
    state = run(graph, GO, mode)
    [asked] = state["__interrupt__"]
    assert _interrupt_id(seen[0]["checkpoint_ns"], 0) == asked.id
    run(graph, Command(resume={asked.id: "one"}), mode)
    assert seen[1]["__pregel_resume_map"] == {asked.id: "one"}
    assert asked.id in seen[1]["interrupts"], "pending interrupts are kept elsewhere"


@pytest.mark.parametrize("mode", MODES)
def test_strict_resume_is_refused_when_nothing_is_pending(mode: str) -> None:
    """`__pregel_strict_resume`: a late answer by id is an error before anything runs."""
    from langgraph.errors import UnknownInterruptError

    seen: list[Any] = []
    graph = entering(seen, twice).compile(checkpointer=InMemorySaver())
    state = run(graph, GO, mode)
    [asked] = state["__interrupt__"]
    run(graph, Command(resume={asked.id: "one"}), mode)
    strict = {"configurable": {"thread_id": "1", _task.STRICT_RESUME: True}}
    with pytest.raises(UnknownInterruptError):
        run(graph, Command(resume={asked.id: "one"}), mode, strict)
    assert len(seen) == 2
