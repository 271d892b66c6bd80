"""Agents inside agents: the pause reaches the root, and one answer continues all."""

# No `from __future__ import annotations`: tools are made of local annotations.

import asyncio
import contextvars
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

import httpx
import pytest
from conftest import call, says
from fastapi import APIRouter, FastAPI
from graphs import (
    ASYNC,
    GATES,
    MODES,
    SYNC,
    State,
    Work,
    ask,
    build,
    results,
    run,
    shared,
    thread,
)
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.runnables import RunnableConfig, RunnableLambda
from langchain_core.tools import BaseTool, InjectedToolCallId, tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.func import entrypoint, task
from langgraph.graph import START, StateGraph
from langgraph.prebuilt import InjectedState
from langgraph.types import Command, Send
from langgraph_supervisor import create_supervisor
from langgraph_swarm import create_handoff_tool, create_swarm
from support import BOUND_S, connect, until

from langchain_pocket_auth import (
    ConfigurationError,
    Event,
    PocketAuth,
    RunInfo,
    pending_authorizations,
    resume,
)
from langchain_pocket_auth._vault import Future
from langchain_pocket_auth.testing import AuthorizationServer, Browser, ScriptedModel

world, server, pocket, alice = shared()

GO = {"messages": [("user", "go")]}
Invoke = Callable[..., Any]


@dataclass
class Team:
    """Agents that start each other, and how often each part of them ran."""

    pocket: PocketAuth
    mode: str
    kind: str = "create_agent"
    work: Work = field(init=False)
    ran: Counter[str] = field(default_factory=Counter)
    models: list[ScriptedModel] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.work = Work(self.mode)

    def build(self, tools: list[BaseTool], *turns: AIMessage, saver: Any = None) -> Any:
        """Return an agent of this team's kind."""
        graph, model = build(self.kind, self.pocket, tools, list(turns), saver)
        self.models.append(model)
        return graph

    def child(self, provider: str = "acme", saver: Any = None) -> Any:
        """Return an agent that does finished work first, then needs *provider*."""
        use = self.work.tool(f"use_{provider}", provider)
        turns = says(call("note")), says(call(use.name, text="x"))
        return self.build([self.note(), use], *turns, saver=saver)

    def note(self) -> BaseTool:
        """Return a tool that needs nothing."""

        @tool
        def note() -> str:
            """Note something."""
            self.ran["note"] += 1
            return "noted"

        return note

    def node(self, name: str, work: Invoke | None = None) -> Any:
        """Return a node that counts, and does *work* with state and config."""

        def sync(state: Any, config: RunnableConfig) -> Any:
            self.ran[name] += 1
            return work(state, config) if work else {}

        async def async_(state: Any, config: RunnableConfig) -> Any:
            self.ran[name] += 1
            return await work(state, config) if work else {}

        return sync if self.mode == SYNC else async_

    def invoke(self, child: Any, config: Any = None, **kwargs: Any) -> Invoke:
        """Return what starts *child*: with no config, a fixed or a derived one."""

        def start(state: Any, mine: RunnableConfig) -> Any:
            del state
            given = config(mine) if callable(config) else config
            run = child.invoke if self.mode == SYNC else child.ainvoke
            return run(GO, given, **kwargs)

        return start

    def tool(self, start: Invoke, name: str = "delegate") -> BaseTool:
        """Return a tool that starts a child and gives its last message."""

        @tool(name)
        def delegate(config: RunnableConfig) -> str:
            """Ask another agent."""
            self.ran[name] += 1
            return str(start(None, config)["messages"][-1].text)

        @tool(name)
        async def adelegate(config: RunnableConfig) -> str:
            """Ask another agent."""
            self.ran[name] += 1
            return str((await start(None, config))["messages"][-1].text)

        return delegate if self.mode == SYNC else adelegate

    def graph(self, *nodes: tuple[str, Any], saver: Any = None) -> Any:
        """Return a graph of nodes in a row."""
        builder = StateGraph(State)
        for name, node in nodes:
            builder.add_node(name, node)
        for one, next_ in zip((START, *dict(nodes)), dict(nodes), strict=False):
            builder.add_edge(one, next_)
        return builder.compile(checkpointer=saver)


def passed_on(config: RunnableConfig) -> RunnableConfig:
    return config


# ------------------------------------------------------- where a child agent may stand

Place = Callable[[Team, Any], Any]
"""A root graph around a child; the child's saver is given."""


def as_node(team: Team, saver: Any) -> Any:
    child = team.child(saver=saver)
    before, after = team.node("before"), team.node("after")
    nodes = [("before", before), ("child", child), ("after", after)]
    return team.graph(*nodes, saver=InMemorySaver())


def in_node(team: Team, saver: Any) -> Any:
    """Started by a node's code, with the config left out."""
    start = team.invoke(team.child(saver=saver))
    return team.graph(("before", team.node("before", start)), saver=InMemorySaver())


def as_tool(team: Team, saver: Any) -> Any:
    delegate = team.tool(team.invoke(team.child(saver=saver)))
    return team.build([delegate], says(call("delegate")), saver=InMemorySaver())


def as_tool_with_config(team: Team, saver: Any) -> Any:
    delegate = team.tool(team.invoke(team.child(saver=saver), passed_on))
    return team.build([delegate], says(call("delegate")), saver=InMemorySaver())


def node_in_node(team: Team, saver: Any) -> Any:
    middle = team.graph(
        ("middle", team.node("middle")), ("child", team.child(saver=saver))
    )
    nodes = [("before", team.node("before")), ("graph", middle)]
    return team.graph(*nodes, saver=InMemorySaver())


def tool_in_tool(team: Team, saver: Any) -> Any:
    inner = team.tool(team.invoke(team.child(saver=saver)), "inner")
    middle = team.build([inner, team.note()], says(call("note")), says(call("inner")))
    outer = team.tool(team.invoke(middle), "outer")
    return team.build([outer], says(call("outer")), saver=InMemorySaver())


def tool_in_node(team: Team, saver: Any) -> Any:
    inner = team.tool(team.invoke(team.child(saver=saver)), "inner")
    middle = team.build([inner], says(call("inner")))
    nodes = [("before", team.node("before")), ("middle", middle)]
    return team.graph(*nodes, saver=InMemorySaver())


# How often each part runs in all: what starts a child by its code runs again from its
# top, which is LangGraph's way; all that is finished does not.
PLACES: dict[str, tuple[Place, dict[str, int], list[int]]] = {
    "node": (as_node, {"before": 1, "after": 1, "note": 1}, [3]),
    "node's code": (in_node, {"before": 2, "note": 1}, [3]),
    "tool": (as_tool, {"delegate": 2, "note": 1}, [3, 2]),
    "tool, config": (as_tool_with_config, {"delegate": 2, "note": 1}, [3, 2]),
    "node in node": (node_in_node, {"before": 1, "middle": 1, "note": 1}, [3]),
    "tool in tool": (tool_in_tool, {"outer": 2, "inner": 2, "note": 2}, [3, 3, 2]),
    "tool in node": (tool_in_node, {"before": 1, "inner": 2, "note": 1}, [3, 2]),
}
# The other doors need not be tried in all ways again.
BY_AGENT = [("create_agent", mode) for mode in MODES]
BY_HAND = [("add_tool_node", SYNC), ("ToolNode", ASYNC)]
KINDS = BY_AGENT + BY_HAND
SAVERS = {"none": lambda: None, "True": lambda: True, "own": InMemorySaver}
FEW = list(PLACES)[:3]
CASES = [
    *((place, *kind, "none") for place in PLACES for kind in BY_AGENT),
    *((place, *kind, "none") for place in FEW for kind in BY_HAND),
    *((place, *kind, s) for place in FEW for kind in BY_AGENT for s in ("True", "own")),
]


@pytest.mark.parametrize(("name", "kind", "mode", "saver"), CASES)
def test_childs_pause_reaches_the_root_and_one_answer_continues(
    server: AuthorizationServer,
    pocket: PocketAuth,
    alice: Browser,
    *,
    name: str,
    kind: str,
    saver: str,
    mode: str,
) -> None:
    """One question, one answer; what was finished is not done again."""
    place, ran, asked = PLACES[name]
    team = Team(pocket, mode, kind)
    root = place(team, SAVERS[saver]())
    paused = ask(root, mode)
    [pending] = pending_authorizations(paused)
    assert (pending.provider, pending.tools) == ("acme", ("use_acme",))
    assert team.work.done == []
    assert [p.url for p in pending_authorizations(root.get_state(thread()))] == [
        pending.url
    ]

    alice.visit(pending.url)
    done = run(root, resume(paused), mode)
    assert "__interrupt__" not in done
    assert team.work.done == [("use_acme", server.issued_access_tokens[0])]
    assert team.ran == ran
    assert [model.calls for model in team.models] == asked


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("where", ["here", "provider"])
def test_refusal_reaches_the_childs_model_and_nobody_elses(
    pocket: PocketAuth, alice: Browser, where: str, mode: str
) -> None:
    """The child is told, and its parent gets its answer as ever."""
    team = Team(pocket, mode)
    root = as_tool(team, None)
    paused = ask(root, mode)
    [pending] = pending_authorizations(paused)
    if where == "provider":
        alice.visit(pending.url, approve=False)
    done = run(root, resume(paused, decline=["acme"] * (where == "here")), mode)
    assert results(done)["delegate"].text == "done"
    assert team.work.done == []
    assert [model.calls for model in team.models] == [3, 2]


@pytest.mark.parametrize(("kind", "mode"), KINDS)
def test_guarded_tool_that_starts_a_child_pauses_for_both_in_turn(
    server: AuthorizationServer,
    pocket: PocketAuth,
    alice: Browser,
    kind: str,
    mode: str,
) -> None:
    """First for the tool's own connection, then for its child's, each asked once."""
    team = Team(pocket, mode, kind)
    start = team.invoke(team.child("zeta"))
    delegate = pocket.wrap(team.tool(start), provider="acme")
    root = team.build([delegate], says(call("delegate")), saver=InMemorySaver())
    paused = ask(root, mode)
    for provider in ("acme", "zeta"):
        [pending] = pending_authorizations(paused)
        assert pending.provider == provider
        alice.visit(pending.url)
        paused = run(root, resume(paused), mode)
    assert "__interrupt__" not in paused
    assert team.work.done == [("use_zeta", server.issued_access_tokens[1])]
    assert team.ran == {"delegate": 2, "note": 1}
    assert [model.calls for model in team.models] == [3, 2]


# --------------------------------------------------------------- several at the same time


def fanned_out(team: Team, providers: list[str]) -> Any:
    """Children as nodes, all of one step."""
    builder = StateGraph(State)
    builder.add_node("before", team.node("before"))
    builder.add_node("after", team.node("after"))
    builder.add_edge(START, "before")
    names = [f"child{n}" for n, _ in enumerate(providers)]
    for name, provider in zip(names, providers, strict=True):
        builder.add_node(name, team.child(provider))
        builder.add_edge(name, "after")
    sends = [Send(name, GO) for name in names]
    builder.add_conditional_edges("before", lambda _: sends, names)
    return builder.compile(checkpointer=InMemorySaver())


def sent_to_one(team: Team, providers: list[str]) -> Any:
    """One node that is sent several tasks, each with a child of its own."""
    children = {name: team.child(name) for name in set(providers)}
    starts = {name: team.invoke(child) for name, child in children.items()}

    def choose(state: Any, config: RunnableConfig) -> Any:
        return starts[state["provider"]](state, config)

    builder = StateGraph(State)
    builder.add_node("before", team.node("before"))
    builder.add_node("one", team.node("one", choose))
    builder.add_edge(START, "before")
    sends = [Send("one", {"provider": name}) for name in providers]
    builder.add_conditional_edges("before", lambda _: sends, ["one"])
    return builder.compile(checkpointer=InMemorySaver())


def called_at_once(team: Team, providers: list[str]) -> Any:
    """Tool calls of one turn, each of which asks another child."""
    starts = [team.invoke(team.child(provider)) for provider in providers]
    names = [f"delegate{n}" for n, _ in enumerate(starts)]
    tools = [team.tool(s, name) for s, name in zip(starts, names, strict=True)]
    kind, team.kind = team.kind, "create_agent"
    root = team.build(tools, says(*map(call, names)), saver=InMemorySaver())
    team.kind = kind
    return root


# With how often each part runs in all, for so many children.
CROWDS: dict[str, tuple[Callable[..., Any], Callable[[int], dict[str, int]]]] = {
    "fanned out": (fanned_out, lambda n: {"before": 1, "after": 1}),
    "sent to one": (sent_to_one, lambda n: {"before": 1, "one": 2 * n}),
    "called at once": (
        called_at_once,
        lambda n: {f"delegate{which}": 2 for which in range(n)},
    ),
}
SIZES = [
    *((name, *kind, size) for name in CROWDS for kind in BY_AGENT for size in (2, 4)),
    *((name, *kind, 2) for name in CROWDS for kind in BY_HAND),
]


@pytest.mark.parametrize(("name", "kind", "mode", "size"), SIZES)
def test_one_answer_continues_all_agents_that_run_at_once(
    server: AuthorizationServer,
    pocket: PocketAuth,
    alice: Browser,
    *,
    name: str,
    kind: str,
    size: int,
    mode: str,
) -> None:
    """Each connection is listed once, with the pauses of all who need it."""
    place, ran = CROWDS[name]
    providers = ["acme", "zeta"] * (size // 2)
    team = Team(pocket, mode, kind)
    root = place(team, providers)
    paused = ask(root, mode)
    pending = pending_authorizations(paused)
    assert sorted(p.provider for p in pending) == ["acme", "zeta"]
    assert [len(p.interrupt_ids) for p in pending] == [size // 2] * 2
    assert team.work.done == []

    for question in pending:
        alice.visit(question.url)
    done = run(root, resume(paused), mode)
    assert "__interrupt__" not in done
    assert team.work.names == sorted(f"use_{provider}" for provider in providers)
    assert len(set(team.work.done)) == 2
    assert server.token_requests == {"authorization_code": 2}

    assert team.ran == {**ran(size), "note": size}
    if place is called_at_once:
        assert team.models.pop().calls == 2
    assert sum(model.calls for model in team.models) == 3 * size


@pytest.mark.parametrize("mode", MODES)
def test_agent_whose_connection_is_there_finishes_beside_one_that_waits(
    pocket: PocketAuth, alice: Browser, mode: str
) -> None:
    """Only what is missing waits, and what has finished is not repeated."""
    asyncio.run(_connect(pocket, alice))
    team = Team(pocket, mode)
    root = fanned_out(team, ["acme", "zeta"])
    paused = ask(root, mode)
    [pending] = pending_authorizations(paused)
    assert pending.provider == "zeta"
    assert team.work.names == ["use_acme"]
    alice.visit(pending.url)
    assert "__interrupt__" not in run(root, resume(paused), mode)
    assert team.work.names == ["use_acme", "use_zeta"]
    assert [model.calls for model in team.models] == [3, 3]
    assert team.ran == {"before": 1, "after": 1, "note": 2}


async def _connect(pocket: PocketAuth, person: Browser) -> None:
    owner = pocket._service.owners.resolve({})
    await connect(pocket, person, owner=owner)


# ------------------------------------------------------------------ resumed by itself


async def resumed_by_itself(pocket: PocketAuth, root: Any, person: Browser) -> None:
    """Consent to all that the root waits for; it must come to its end."""

    async def has_ended() -> bool:
        state = await root.aget_state(thread())
        return not state.tasks

    stop = pocket.auto_resume(root)
    try:
        paused = await root.ainvoke(GO, thread())
        for pending in pending_authorizations(paused):
            assert (await person.avisit(pending.url)).status_code == 200
        await until(has_ended)
    finally:
        stop()


@pytest.mark.parametrize("name", PLACES)
def test_consent_continues_the_root_by_itself(
    server: AuthorizationServer, pocket: PocketAuth, alice: Browser, name: str
) -> None:
    """`auto_resume` of the root reaches the child that waits."""
    place, ran, asked = PLACES[name]
    team = Team(pocket, ASYNC)
    root = place(team, None)
    asyncio.run(resumed_by_itself(pocket, root, alice))
    assert team.work.done == [("use_acme", server.issued_access_tokens[0])]
    assert team.ran == ran
    assert [model.calls for model in team.models] == asked


@pytest.mark.parametrize("name", CROWDS)
def test_consents_continue_agents_that_run_at_once_each_once(
    pocket: PocketAuth, alice: Browser, name: str
) -> None:
    """Several pauses of one conversation do not resume it over each other."""
    team, providers = Team(pocket, ASYNC), ["acme", "zeta"] * 2
    place, ran = CROWDS[name]
    root = place(team, providers)
    asyncio.run(resumed_by_itself(pocket, root, alice))
    assert team.work.names == sorted(f"use_{provider}" for provider in providers)
    # What starts a child runs as often as the conversation was resumed.
    finished = {"before", "after", "note"}
    expected = Counter({**ran(4), "note": 4})
    assert [team.ran[part] for part in finished] == [expected[p] for p in finished]
    if place is called_at_once:
        assert team.models.pop().calls == 2
    assert sum(model.calls for model in team.models) == 3 * 4


# -------------------------------------------------------------------------- hand-offs


def over_to(name: str) -> BaseTool:
    """Return a hand-made tool that hands the conversation to another agent."""

    @tool
    def hand_over(
        state: Annotated[Any, InjectedState],
        tool_call_id: Annotated[str, InjectedToolCallId],
    ) -> Any:
        """Hand over."""
        told = ToolMessage("over", name="hand_over", tool_call_id=tool_call_id)
        messages = [*state["messages"], told]
        update = {"messages": messages}
        return Command(goto=name, graph=Command.PARENT, update=update)

    return hand_over


@pytest.mark.parametrize(("kind", "mode"), KINDS)
def test_guarded_hand_off_happens_after_the_consent(
    server: AuthorizationServer,
    pocket: PocketAuth,
    alice: Browser,
    kind: str,
    mode: str,
) -> None:
    """`Command(graph=PARENT)` of a guarded tool arrives; the next agent asks its own."""
    team = Team(pocket, mode, kind)
    use = team.work.tool("use_zeta", "zeta")
    hand_over = pocket.wrap(over_to("second"), provider="acme")
    first = team.build([hand_over], says(call("hand_over")))
    second = team.build([use], AIMessage(""), says(call("use_zeta", text="x")))
    builder = StateGraph(State)
    builder.add_node("first", first)
    builder.add_node("second", second)
    builder.add_edge(START, "first")
    root = builder.compile(checkpointer=InMemorySaver())

    paused = ask(root, mode)
    for provider in ("acme", "zeta"):
        [pending] = pending_authorizations(paused)
        assert pending.provider == provider
        alice.visit(pending.url)
        paused = run(root, resume(paused), mode)
    assert "__interrupt__" not in paused
    assert results(paused)["hand_over"].text == "over"
    assert team.work.done == [("use_zeta", server.issued_access_tokens[1])]
    assert [model.calls for model in team.models] == [1, 2]


def swarm(team: Team) -> Any:
    use = team.work.tool("use_acme", "acme")
    model = ScriptedModel(script=[says(call("transfer_to_second"))])
    first = create_agent(
        model,
        [create_handoff_tool(agent_name="second"), use],
        middleware=[team.pocket.middleware()],
        name="first",
    )
    other = ScriptedModel(script=[AIMessage(""), says(call("use_acme", text="x"))])
    second = create_agent(
        other, [use], middleware=[team.pocket.middleware()], name="second"
    )
    team.models += [model, other]
    made = create_swarm([first, second], default_active_agent="first")
    return made.compile(checkpointer=InMemorySaver())


def supervised(team: Team) -> Any:
    use = team.work.tool("use_acme", "acme")
    model = ScriptedModel(script=[says(call("transfer_to_worker"))])
    other = ScriptedModel(script=[AIMessage(""), says(call("use_acme", text="x"))])
    worker = create_agent(
        other, [use], middleware=[team.pocket.middleware()], name="worker"
    )
    team.models += [model, other]
    made = create_supervisor([worker], model=model)
    return made.compile(checkpointer=InMemorySaver())


def supervised_twice(team: Team) -> Any:
    """Two workers, and a supervisor whose own tool is guarded in a ToolNode."""
    use, look = team.work.tool("use_acme", "acme"), team.work.tool("look", "zeta")
    script = [says(call("transfer_to_worker"))]
    model = ScriptedModel(script=script)
    other = ScriptedModel(script=[AIMessage(""), says(call("use_acme", text="x"))])
    worker = create_agent(other, team.pocket.wrap([use]), name="worker")
    idle = create_agent(ScriptedModel(), team.pocket.wrap([look]), name="idle")
    team.models += [model, other]
    made = create_supervisor([worker, idle], model=model)
    return made.compile(checkpointer=InMemorySaver())


HANDED = {
    "swarm": (swarm, [1, 2]),
    "supervisor": (supervised, [2, 2]),
    "supervisor, wrapped only": (supervised_twice, [2, 2]),
}


@pytest.mark.filterwarnings("ignore::langgraph.warnings.LangGraphDeprecatedSinceV10")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("place", "asked"), HANDED.values(), ids=HANDED)
def test_agent_that_was_handed_the_turn_pauses_the_root(
    server: AuthorizationServer,
    pocket: PocketAuth,
    alice: Browser,
    place: Callable[[Team], Any],
    asked: list[int],
    mode: str,
) -> None:
    """The hand-off is not repeated, and the conversation ends with who has it."""
    team = Team(pocket, mode)
    root = place(team)
    paused = ask(root, mode)
    [pending] = pending_authorizations(paused)
    alice.visit(pending.url)
    done = run(root, resume(paused), mode)
    assert "__interrupt__" not in done
    assert team.work.done == [("use_acme", server.issued_access_tokens[0])]
    assert [model.calls for model in team.models] == asked
    again = ask(root, mode)
    assert "__interrupt__" not in again


# ------------------------------------------------------------------- whose account it is


@dataclass
class Context:
    """What an app hands to its graph."""

    user: str


def by_context(run: RunInfo) -> str:
    return str(run.context.user)


def by_config(run: RunInfo) -> str:
    return str(run.config["configurable"]["user"])


def as_mallory(config: RunnableConfig) -> Any:
    """Return a part's own config, as code may change it for a child."""
    own = {**config["configurable"], "user": "mallory", "thread_id": "own"}
    return {**config, "configurable": own}


FORGED = {
    "config in a tool": (by_config, as_mallory, None, True),
    "config in a node": (by_config, as_mallory, None, False),
    "settings in a node": (
        by_config,
        {"configurable": {"user": "mallory"}},
        None,
        False,
    ),
    "context in a tool": (by_context, None, Context("mallory"), True),
    "context in a node": (by_context, None, Context("mallory"), False),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("owner", "config", "context", "in_tool"), FORGED.values(), ids=FORGED
)
def test_child_acts_for_whom_the_root_was_started(
    server: AuthorizationServer,
    make_pocket: Callable[..., PocketAuth],
    alice: Browser,
    *,
    owner: Any,
    config: Any,
    context: Any,
    in_tool: bool,
    mode: str,
) -> None:
    """What a child is given, a thread id of its own included, changes no owner."""
    team = Team(make_pocket(owner=owner), mode)
    child = team.child()
    child.context_schema = Context
    start = team.invoke(child, config, context=context)
    if in_tool:
        start_it = team.tool(start)
        model = ScriptedModel(script=[says(call("delegate"))])
        root = create_agent(
            model, [start_it], context_schema=Context, checkpointer=InMemorySaver()
        )
    else:
        builder = StateGraph(State, context_schema=Context)
        builder.add_node("node", team.node("node", start))
        builder.add_edge(START, "node")
        root = builder.compile(checkpointer=InMemorySaver())

    def go(value: Any) -> Any:
        mine, ann = thread("1", user="ann"), Context("ann")
        if mode == SYNC:
            return root.invoke(value, mine, context=ann)
        return asyncio.run(root.ainvoke(value, mine, context=ann))

    asyncio.run(connect(team.pocket, Browser("mallory"), owner="mallory"))
    paused = go(GO)
    [pending] = pending_authorizations(paused)
    alice.visit(pending.url)
    assert "__interrupt__" not in go(resume(paused))
    _, anns = server.issued_access_tokens
    assert team.work.done == [("use_acme", anns)]


# --------------------------------------------- children that are runs of their own


OWN = thread("own")


def own_in_tool(team: Team, child: Any) -> Any:
    delegate = team.tool(team.invoke(child, OWN))
    return team.build([delegate], says(call("delegate")), saver=InMemorySaver())


def own_in_guarded_tool(team: Team, child: Any) -> Any:
    delegate = team.pocket.wrap(team.tool(team.invoke(child, OWN)), provider="zeta")
    return team.build([delegate], says(call("delegate")), saver=InMemorySaver())


def own_in_foreign_tool(team: Team, child: Any) -> Any:
    """An agent that knows nothing of us."""
    delegate = team.tool(team.invoke(child, OWN))
    model = ScriptedModel(script=[says(call("delegate"))])
    return create_agent(model, [delegate], checkpointer=InMemorySaver())


def own_in_node(team: Team, child: Any) -> Any:
    node = team.node("node", team.invoke(child, OWN))
    return team.graph(("node", node), saver=InMemorySaver())


def own_without_root_saver(team: Team, child: Any) -> Any:
    return team.graph(("node", team.node("node", team.invoke(child, OWN))))


def own_above_another(team: Team, child: Any) -> Any:
    """The graph that pauses is a good child of one that is a run of its own."""
    middle = team.graph(("child", child), saver=InMemorySaver())
    node = team.node("node", team.invoke(middle, OWN))
    return team.graph(("node", node), saver=InMemorySaver())


def own_in_task(team: Team, child: Any) -> Any:
    start = task(team.node("node", team.invoke(child, OWN)))

    @entrypoint(checkpointer=InMemorySaver())
    def flow(value: Any) -> Any:
        return start(value).result()

    @entrypoint(checkpointer=InMemorySaver())
    async def aflow(value: Any) -> Any:
        return await start(value)

    return flow if team.mode == SYNC else aflow


def own_in_own_task(team: Team, child: Any) -> Any:
    """Started in the background by a node, and not waited for in its own task."""
    start = team.invoke(child, OWN)

    def in_background(state: Any, config: Any) -> Any:
        if team.mode == ASYNC:
            return asyncio.create_task(start(state, config))
        context = contextvars.copy_context()
        raised: list[BaseException] = []

        def work() -> None:
            try:
                context.run(start, state, config)
            except BaseException as error:  # noqa: BLE001 - raised below
                raised.append(error)

        worker = threading.Thread(target=work)
        worker.start()
        worker.join(BOUND_S)
        if raised:
            raise raised[0]
        return {}

    node = team.node("node", in_background)
    return team.graph(("node", node), saver=InMemorySaver())


APART = {
    "tool": own_in_tool,
    "guarded tool": own_in_guarded_tool,
    "foreign tool": own_in_foreign_tool,
    "node": own_in_node,
    "no saver": own_without_root_saver,
    "one above": own_above_another,
    "task": own_in_task,
    "background": own_in_own_task,
}
LOST = [
    *((name, *kind) for name in APART for kind in BY_AGENT),
    *((name, *kind) for name in ("tool", "node", "one above") for kind in BY_HAND),
]


@pytest.mark.parametrize(("name", "kind", "mode"), LOST)
def test_pause_that_the_root_would_not_see_is_an_error(
    pocket: PocketAuth, alice: Browser, name: str, kind: str, mode: str
) -> None:
    """A child with a thread id of its own is told so; nothing is asked, nothing runs."""
    team = Team(pocket, mode, kind)
    root = APART[name](team, team.child(saver=InMemorySaver()))
    if name == "guarded tool":
        paused = ask(root, mode)
        [pending] = pending_authorizations(paused)
        alice.visit(pending.url)
        with pytest.raises(ConfigurationError, match="without a thread_id"):
            run(root, resume(paused), mode)
    else:
        with pytest.raises(ConfigurationError, match="without a thread_id"):
            ask(root, mode)
    assert team.work.done == []
    assert "acme" not in asyncio.run(_asked_for(pocket))


async def _asked_for(pocket: PocketAuth) -> set[str]:
    """Return the providers for which a link is, or was, out."""
    owner = pocket._service.owners.resolve({})
    shelf = await pocket._service.ask(lambda engine: engine.vault.shelf(owner))
    return {key.provider for key in shelf.keys(Future)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["tool", "node", "one above"])
def test_child_that_needs_no_pause_may_be_a_run_of_its_own(
    server: AuthorizationServer,
    pocket: PocketAuth,
    alice: Browser,
    name: str,
    mode: str,
) -> None:
    """What is connected works wherever it is called."""
    asyncio.run(_connect(pocket, alice))
    team = Team(pocket, mode)
    root = APART[name](team, team.child(saver=InMemorySaver()))
    assert "__interrupt__" not in ask(root, mode)
    assert team.work.done == [("use_acme", server.issued_access_tokens[0])]


@pytest.mark.parametrize(("kind", "mode"), KINDS)
def test_run_of_its_own_that_must_not_ask_goes_on(
    pocket: PocketAuth, kind: str, mode: str
) -> None:
    """The remedy that the error names: its model is told, and nobody is asked."""
    team = Team(pocket, mode, kind)
    child = team.child(saver=InMemorySaver())
    unasked = thread("own", pocket_auth_interactive=False)
    delegate = team.tool(team.invoke(child, unasked))
    root = team.build([delegate], says(call("delegate")), saver=InMemorySaver())
    assert results(ask(root, mode))["delegate"].text == "done"
    assert team.work.done == []


@pytest.mark.parametrize(("kind", "mode"), KINDS)
def test_child_node_without_checkpoints_is_told_so(
    pocket: PocketAuth, kind: str, mode: str
) -> None:
    """`checkpointer=False` cannot be resumed; the error names it."""
    team = Team(pocket, mode, kind)
    root = as_node(team, False)
    with pytest.raises(ConfigurationError, match="checkpointer=False"):
        ask(root, mode)
    assert team.work.done == []


# ------------------------------------------------- runs that are rightly independent


def the_link(state: Any) -> str:
    [pending] = pending_authorizations(state)
    return pending.url


@pytest.mark.parametrize("kind", GATES)
def test_graph_in_a_chain_pauses_as_ever(pocket: PocketAuth, kind: str) -> None:
    """A LangChain chain around a graph is no graph: who calls it gets the pause."""
    graph = Team(pocket, SYNC, kind).child(saver=InMemorySaver())
    chain = RunnableLambda(lambda _: graph.invoke(GO, OWN))
    assert the_link(chain.invoke(1))


async def test_graph_of_a_web_handler_or_a_task_pauses_as_ever(
    pocket: PocketAuth,
) -> None:
    """An app's handlers and tasks start runs of their own, also beside others."""
    graph = Team(pocket, ASYNC).child(saver=InMemorySaver())
    app = FastAPI()

    @app.post("/{name}")
    async def start(name: str) -> str:
        return the_link(await graph.ainvoke(GO, thread(name)))

    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://app") as http:
        answer = await http.post("/a")
    other = await asyncio.create_task(graph.ainvoke(GO, thread("b")))
    assert answer.json() == the_link(other)


@pytest.mark.parametrize("mode", MODES)
def test_run_that_a_node_starts_outside_its_context_is_independent(
    pocket: PocketAuth, mode: str
) -> None:
    """A node may start something that is not its own, if it says so."""
    graph = Team(pocket, mode).child(saver=InMemorySaver())
    links: list[str] = []

    def node(state: Any) -> Any:
        links.append(the_link(contextvars.Context().run(graph.invoke, GO, OWN)))
        return {}

    async def anode(state: Any) -> Any:
        work, empty = graph.ainvoke(GO, OWN), contextvars.Context()
        started = asyncio.get_running_loop().create_task(work, context=empty)
        links.append(the_link(await started))
        return {}

    team = Team(pocket, mode)
    ask(team.graph(("node", node if mode == SYNC else anode)), mode)
    assert len(links) == 1


def test_run_whose_parent_is_in_another_process_is_left_to_it(
    pocket: PocketAuth,
) -> None:
    """A RemoteGraph sends its task's metadata along, and gets the pause back."""
    graph = Team(pocket, SYNC).child(saver=InMemorySaver())
    sent = {"langgraph_node": "remote", "langgraph_triggers": ["branch:to:remote"]}
    assert the_link(graph.invoke(GO, {**OWN, "metadata": sent}))


@pytest.mark.parametrize("mode", MODES)
def test_callback_server_does_not_belong_to_the_run_that_started_it(
    make_pocket: Callable[..., PocketAuth], mode: str
) -> None:
    """A graph that an own route starts is independent, and acts for its own owner."""
    router, owners = APIRouter(), []

    def owner(run: RunInfo) -> str:
        owners.append(run.thread_id)
        return run.thread_id or "nobody"

    pocket = make_pocket(owner=owner, routers=[router])
    other = Team(pocket, ASYNC).child(saver=InMemorySaver())

    @router.get("/own")
    async def start() -> str:
        return the_link(await other.ainvoke(GO, OWN))

    team = Team(pocket, mode)
    root = as_tool(team, None)
    first = the_link(ask(root, mode))
    page = httpx.get(f"{pocket.base_url}/auth/own", timeout=BOUND_S, trust_env=False)
    assert page.status_code == 200, page.text
    assert page.json() != first
    assert owners[-1] == "own"


@pytest.mark.parametrize("mode", MODES)
async def test_graph_that_an_event_starts_is_independent(
    pocket: PocketAuth, mode: str
) -> None:
    """Who is told of a run, and starts another, is no part of the first."""
    graph = Team(pocket, ASYNC).child(saver=InMemorySaver())
    links: asyncio.Queue[str] = asyncio.Queue()

    async def start(event: Event) -> None:
        if event.type == "required":
            await links.put(the_link(await graph.ainvoke(GO, OWN)))

    stop = pocket.on_event(start)
    try:
        silent = Team(pocket, mode).child(saver=InMemorySaver())
        config = thread("silent", pocket_auth_interactive=False)
        run_it = silent.invoke if mode == SYNC else silent.ainvoke
        done = run_it(GO, config) if mode == SYNC else await run_it(GO, config)
        assert results(done)["use_acme"].status == "error"
        assert await asyncio.wait_for(links.get(), BOUND_S)
    finally:
        stop()
