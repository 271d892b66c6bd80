"""
How often a person is asked and a tool runs: each way to build an agent, each case.

The numbers that a run of these tests saw are printed at its end.
"""

# No `from __future__ import annotations`: tools are made of local annotations.

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import ACME, ZETA, call, says
from graphs import GATES, MODES, SYNC, State, Work, ask, build, shared, thread
from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.tools import BaseTool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.func import entrypoint, task
from langgraph.graph import START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.types import Command

from langchain_pocket_auth import PocketAuth, pending_authorizations, resume
from langchain_pocket_auth.testing import (
    AuthorizationServer,
    Browser,
    LeakWatch,
    ScriptedModel,
    assert_no_leak,
)

world, server, pocket, alice = shared()

# ------------------------------------------------------------------------- the promise

PROMISE = """
door           case                     pauses  asked        model  tools
create_agent   one call                 1       1            2      1
create_agent   four calls               1       2            2      4
create_agent   partial consent          2       2+1          2      0+4
create_agent   declined in the chat     1       2            2      2
create_agent   refused at the provider  1       2            2      2
create_agent   one tool asks            2       2+0          2      3+1
create_agent   each tool asks           2       2+0          2      0+4
add_tool_node  one call                 1       1            2      1
add_tool_node  four calls               1       2            2      4
add_tool_node  partial consent          2       2+1          2      0+4
add_tool_node  declined in the chat     1       2            2      2
add_tool_node  refused at the provider  1       2            2      2
add_tool_node  one tool asks            2       2+0          2      3+1
add_tool_node  each tool asks           2       2+0          2      0+4
subgraph       one call                 1       1            2      1
subgraph       four calls               1       2            2      4
subgraph       partial consent          2       2+1          2      0+4
subgraph       declined in the chat     1       2            2      2
subgraph       refused at the provider  1       2            2      2
subgraph       one tool asks            2       2+0          2      3+1
subgraph       each tool asks           2       2+0          2      0+4
entrypoint     one call                 1       1            2      1
entrypoint     four calls               1       2            2      4
entrypoint     partial consent          2       2+1          2      0+4
entrypoint     declined in the chat     1       2            2      2
entrypoint     refused at the provider  1       2            2      2
entrypoint     one tool asks            2       2+0          2      3+1
entrypoint     each tool asks           5       2+0+0+0+0    2      0+1+1+1+1
without gate   one call                 1       1            2      1
without gate   four calls               2       1+1          2      2+2
without gate   partial consent          2       1+1          2      2+2
without gate   declined in the chat     2       1+1          2      2+0
without gate   refused at the provider  2       1+1          2      2+0
without gate   one tool asks            3       1+0+1        2      1+1+2
without gate   each tool asks           6       1+0+0+1+0+0  2      0+1+1+0+1+1
"""
# pauses: how often the run stopped. asked: how many connections at each stop; 0 where
# tools asked questions of their own. model: its calls. tools: how many came to their
# end after each answer. entrypoint: with `pocket.gate`; without gate: the same tasks
# alone. LangGraph shows one question of an entrypoint's tasks at a time, and those that
# may run do not wait for the others.

CALLS = {"look": "acme", "list": "acme", "post": "zeta", "send": "zeta"}
"""Which provider each tool needs."""


class Row(NamedTuple):
    """What was counted, or promised, for one case at one door."""

    pauses: str
    asked: str
    model: str
    tools: str


def _promised() -> dict[tuple[str, str], Row]:
    width = {"door": 15, "case": 25}
    rows: dict[tuple[str, str], Row] = {}
    for line in PROMISE.strip().splitlines()[1:]:
        door, rest = line[: width["door"]], line[width["door"] :]
        case, numbers = rest[: width["case"]], rest[width["case"] :].split()
        rows[door.strip(), case.strip()] = Row(*numbers)
    return rows


PROMISED = _promised()

# --------------------------------------------------------------------------- the doors


def subgraph(
    pocket: PocketAuth, tools: list[BaseTool], script: list[AIMessage], saver: Any
) -> tuple[Any, ScriptedModel]:
    """Return a parent graph with an agent as its node."""
    agent, model = build("create_agent", pocket, tools, script, saver=None)
    builder = StateGraph(State)
    builder.add_node("helper", agent)
    builder.add_edge(START, "helper")
    return builder.compile(checkpointer=saver), model


def functional(
    pocket: PocketAuth,
    tools: list[BaseTool],
    script: list[AIMessage],
    saver: Any,
    *,
    gated: bool,
) -> tuple[Any, ScriptedModel]:
    """Return an entrypoint with a task for the model and one for each tool call."""
    model, gate = ScriptedModel(script=script), pocket.gate(tools)
    known = {tool.name: tool for tool in pocket.wrap(tools)}

    @task
    def think(messages: list[Any]) -> AIMessage:
        return model.invoke(messages)

    @task
    def act(one: dict[str, Any]) -> Any:
        return known[one["name"]].invoke(one)

    @entrypoint(checkpointer=saver)
    def flow(value: dict[str, Any], *, previous: Any = None) -> dict[str, Any]:
        messages = add_messages((previous or {}).get("messages", []), value["messages"])
        messages = add_messages(messages, think(messages).result())
        while messages[-1].tool_calls:
            refused = gate.check(messages).result() if gated else []
            running = [act(one) for one in allowed(messages[-1], refused)]
            results = [one.result() for one in running]
            messages = add_messages(messages, [*refused, *results])
            messages = add_messages(messages, think(messages).result())
        return {"messages": messages}

    return flow, model


def afunctional(
    pocket: PocketAuth,
    tools: list[BaseTool],
    script: list[AIMessage],
    saver: Any,
    *,
    gated: bool,
) -> tuple[Any, ScriptedModel]:
    """Return the same with coroutines."""
    model, gate = ScriptedModel(script=script), pocket.gate(tools)
    known = {tool.name: tool for tool in pocket.wrap(tools)}

    @task
    async def think(messages: list[Any]) -> AIMessage:
        return await model.ainvoke(messages)

    @task
    async def act(one: dict[str, Any]) -> Any:
        return await known[one["name"]].ainvoke(one)

    @entrypoint(checkpointer=saver)
    async def flow(value: dict[str, Any], *, previous: Any = None) -> dict[str, Any]:
        messages = add_messages((previous or {}).get("messages", []), value["messages"])
        messages = add_messages(messages, await think(messages))
        while messages[-1].tool_calls:
            refused = await gate.acheck(messages) if gated else []
            running = [act(one) for one in allowed(messages[-1], refused)]
            # All of them, and then in order: which one asks first is no race.
            await asyncio.gather(*running, return_exceptions=True)
            results = [one.result() for one in running]
            messages = add_messages(messages, [*refused, *results])
            messages = add_messages(messages, await think(messages))
        return {"messages": messages}

    return flow, model


def allowed(answer: AIMessage, refused: list[ToolMessage]) -> list[Any]:
    """Return the calls that have no result yet."""
    known = {message.tool_call_id for message in refused}
    return [one for one in answer.tool_calls if one["id"] not in known]


def open_door(
    door: str,
    pocket: PocketAuth,
    tools: list[BaseTool],
    script: list[AIMessage],
    *,
    mode: str,
    saver: Any = None,
) -> tuple[Any, ScriptedModel]:
    """Return a graph with a checkpointer, and its model."""
    saver = InMemorySaver() if saver is None else saver
    if door in GATES:
        return build(door, pocket, tools, script, saver)
    if door == "subgraph":
        return subgraph(pocket, tools, script, saver)
    make = functional if mode == SYNC else afunctional
    return make(pocket, tools, script, saver, gated=door == "entrypoint")


# --------------------------------------------------------------- what the person does


def connect(person: Browser, state: Any, *providers: str, approve: bool = True) -> None:
    """Open the links of these providers, or of all, and decide there."""
    for pending in pending_authorizations(state):
        if not providers or pending.provider in providers:
            person.visit(pending.url, approve=approve)


def questions(state: Any) -> dict[str, str]:
    """Return the tools' own questions by interrupt id."""
    return {p.id: p.value for p in state.interrupts if isinstance(p.value, str)}


def consents(person: Browser, state: Any, stop: int) -> Command[Any]:
    """Connect all that is asked for, and approve what tools ask."""
    own = {id_: f"yes to {question}" for id_, question in questions(state).items()}
    if own:
        return Command(resume=own)
    connect(person, state)
    return resume(state)


def consents_by_and_by(person: Browser, state: Any, stop: int) -> Command[Any]:
    """Connect acme first, and the rest when asked again."""
    if stop == 1:
        connect(person, state, "acme")
    else:
        connect(person, state)
    return resume(state)


def declines(person: Browser, state: Any, stop: int) -> Command[Any]:
    """Connect acme, and say in the chat that zeta is not wanted."""
    connect(person, state, "acme")
    return resume(
        state,
        decline=[p for p in pending_authorizations(state) if p.provider == "zeta"],
    )


def refuses(person: Browser, state: Any, stop: int) -> Command[Any]:
    """Connect acme, and press Deny at zeta."""
    connect(person, state, "acme")
    connect(person, state, "zeta", approve=False)
    return resume(state)


@dataclass(frozen=True)
class Case:
    """Which tools the model calls at once, which of them ask, what the person does."""

    answers: Callable[[Browser, Any, int], Command[Any]]
    calls: tuple[str, ...] = tuple(CALLS)
    asking: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()


CASES = {
    "one call": Case(consents, calls=("look",)),
    "four calls": Case(consents),
    "partial consent": Case(consents_by_and_by),
    "declined in the chat": Case(declines, refused=("post", "send")),
    "refused at the provider": Case(refuses, refused=("post", "send")),
    "one tool asks": Case(consents, asking=("look",)),
    "each tool asks": Case(consents, asking=tuple(CALLS)),
}


# ------------------------------------------------------------------- the conversation

STREAMS = ["values", "updates", "messages", "custom", "debug"]
STOPS = 8  # more than any case may have


@dataclass
class Conversation:
    """A thread of a graph, and all that it showed on the way."""

    graph: Any
    mode: str
    config: dict[str, Any]
    shown: list[str] = field(default_factory=list)
    watch: LeakWatch = field(default_factory=LeakWatch)

    def start(self) -> Any:
        """Send a message; return the state in which the run stopped."""
        with self.watch:
            result = ask(self.graph, self.mode, self.config)
        return self._stopped(result, result)

    def go_on(self, command: Command[Any]) -> Any:
        """Answer, and read along in every stream that there is."""
        how: dict[str, Any] = {"stream_mode": STREAMS, "subgraphs": True}
        with self.watch:
            if self.mode == SYNC:
                chunks = list(self.graph.stream(command, self.config, **how))
            else:
                chunks = asyncio.run(self._astream(command, how))
        updates = [c for path, kind, c in chunks if kind == "updates" and not path]
        return self._stopped(chunks, updates)

    async def _astream(self, command: Command[Any], how: dict[str, Any]) -> list[Any]:
        stream = self.graph.astream(command, self.config, **how)
        return [chunk async for chunk in stream]

    def _stopped(self, shown: Any, told: Any) -> Any:
        state = self.graph.get_state(self.config, subgraphs=True)
        self.shown += [repr(shown), repr(state)]
        # The result, or the stream, tells of the same links as the state.
        links = {p.url for p in pending_authorizations(state)}
        assert {p.url for p in pending_authorizations(told)} == links
        return state


@contextmanager
def saver_of(mode: str, file: Path) -> Iterator[Any]:
    """Keep checkpoints in a file where that goes with the mode."""
    if mode == SYNC:
        with SqliteSaver.from_conn_string(str(file)) as saver:
            yield saver
    else:
        yield InMemorySaver()


def plus(numbers: list[int]) -> str:
    """Write numbers one after another."""
    return "+".join(map(str, numbers))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("door", "case"), PROMISED)
def test_person_is_asked_and_tools_run_as_promised(
    server: AuthorizationServer,
    pocket: PocketAuth,
    alice: Browser,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    *,
    door: str,
    case: str,
    mode: str,
) -> None:
    """As many pauses, model calls and tool runs as the table says, and no leak."""
    what, work = CASES[case], Work(mode)
    tools = [
        work.tool(
            name,
            CALLS[name],
            f"may-{name}",
            question=f"{name}?" if name in what.asking else None,
        )
        for name in what.calls
    ]
    script = [says(*(call(name, text="x") for name in what.calls))]
    file, links = tmp_path / "checkpoints.db", set[str]()
    asked: list[int] = []
    ran: list[int] = []
    with saver_of(mode, file) as saver:
        graph, model = open_door(door, pocket, tools, script, mode=mode, saver=saver)
        talk = Conversation(graph, mode, thread())
        state = talk.start()
        assert work.done == []
        while state.interrupts and len(asked) < STOPS:
            pending = pending_authorizations(state)
            links |= {p.url for p in pending}
            asked.append(len(pending))
            command = what.answers(alice, state, len(asked))
            state = talk.go_on(command)
            ran.append(len(work.done) - sum(ran))
        seen = Row(str(len(asked)), plus(asked), str(model.calls), plus(ran))
        place = list(PROMISED).index((door, case))
        record_property("matrix", [place, door, case, mode, *seen])
    assert seen == PROMISED[door, case]

    # The run is over, with an answer to every call and the model's last word.
    assert (state.next, state.interrupts) == ((), ())
    *_, last = messages = state.values["messages"]
    answers = {m.name: m for m in messages if m.type == "tool"}
    assert (last.type, last.text) == ("ai", "done")
    assert sorted(m.name for m in messages if m.type == "tool") == sorted(what.calls)
    assert {n for n, m in answers.items() if m.status == "error"} == set(what.refused)

    # Nothing ran twice, each tool had its own provider's token and its own answer.
    assert work.names == sorted({*what.calls} - {*what.refused})
    assert {name: owner_of(server, token) for name, token in work.done} == {
        name: CALLS[name] for name in work.names
    }
    assert sorted(work.heard) == [(n, f"yes to {n}?") for n in sorted(what.asking)]
    providers = {CALLS[name] for name in work.names}
    assert server.token_requests == {"authorization_code": len(providers)}

    # No secret anywhere, and no link but in the pauses.
    secrets = [ACME[1], ZETA[1], *server.issued_codes]
    secrets += [*server.issued_access_tokens, *server.issued_refresh_tokens]
    files = [file] if mode == SYNC else []
    kept = [] if mode == SYNC else [dict(saver.storage), saver.writes, saver.blobs]
    talk.watch.assert_clean(secrets, state, talk.shown, kept, files=files)
    assert_no_leak(links, messages)


def owner_of(server: AuthorizationServer, token: str) -> str:
    """Return the provider whose token it is."""
    found = server.find_token(token)
    assert found is not None
    return found.grant.client_id.removesuffix("-client")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("door", dict.fromkeys(door for door, _ in PROMISED))
def test_call_ids_may_come_again_in_a_later_turn(
    pocket: PocketAuth, alice: Browser, door: str, mode: str
) -> None:
    """Some models count their calls anew each turn; each turn is asked for and run."""
    work = Work(mode)
    tools = [work.tool(name, CALLS[name]) for name in ("look", "post")]
    script = [says(call(name, "call_0", text="x")) for name in ("look", "post")]
    script.insert(1, AIMessage("done"))
    graph, model = open_door(door, pocket, tools, script, mode=mode)
    talk = Conversation(graph, mode, thread())
    for provider in ("acme", "zeta"):
        state = talk.start()
        assert [p.provider for p in pending_authorizations(state)] == [provider]
        connect(alice, state)
        state = talk.go_on(resume(state))
        assert (state.next, state.interrupts) == ((), ())
    assert ([name for name, _ in work.done], model.calls) == (["look", "post"], 4)
