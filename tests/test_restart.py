"""A pause survives the process; state keeps its type behind the gate."""

# No `from __future__ import annotations`: tools are made of local annotations.

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from conftest import call, free_port, says
from graphs import DOORS, GATES, MODES, SYNC, Work, build, results, run, thread
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.graph import START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.prebuilt import InjectedState, tools_condition
from langgraph.types import Command
from pydantic import BaseModel

from langchain_pocket_auth import (
    AuthContext,
    InjectedAuth,
    PocketAuth,
    pending_authorizations,
    resume,
)
from langchain_pocket_auth.testing import AuthorizationServer, Browser, ScriptedModel

KEYS = "test:" + "A" * 43


@dataclass
class Machine:
    """A disk on which processes come and go."""

    folder: Path
    make_pocket: Callable[..., PocketAuth]
    door: str
    mode: str
    question: str | None = None
    calls: tuple[str, ...] = ("look",)
    base_url: str = field(default_factory=lambda: f"http://127.0.0.1:{free_port()}")

    def process(self, value: Any) -> tuple[Any, Work, ScriptedModel]:
        """Start a process, run its graph once, end it."""
        pocket = self.make_pocket(
            f"sqlite:///{self.folder / 'sessions.db'}",
            base_url=self.base_url,
            keys=KEYS,
        )
        work = Work(self.mode)
        tools = [
            work.tool("look", "acme", "read", question=self.question),
            work.tool("post", "zeta"),
        ]
        calls = [call(name, text="x") for name in self.calls]
        made = self.door, pocket, tools, [says(*calls)]
        path = str(self.folder / "checkpoints.db")
        if self.mode == SYNC:
            opened: AbstractContextManager[Any] = SqliteSaver.from_conn_string(path)
            with opened as saver:
                graph, model = build(*made, saver)
                state = graph.invoke(value, thread())
        else:
            state, model = asyncio.run(_arun(made, path, value))
        self.last = pocket
        return state, work, model

    def consent(self, url: str) -> None:
        """Let the person agree while the process is up, then end it."""
        assert Browser().visit(url).status_code == 200


async def _arun(made: Any, path: str, value: Any) -> tuple[Any, ScriptedModel]:
    opened: AbstractAsyncContextManager[Any] = AsyncSqliteSaver.from_conn_string(path)
    async with opened as saver:
        graph, model = build(*made, saver)
        return await graph.ainvoke(value, thread()), model


START_VALUE = {"messages": [("user", "go")]}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("door", DOORS)
def test_pause_is_resumed_by_a_new_process(
    server: AuthorizationServer,
    make_pocket: Callable[..., PocketAuth],
    tmp_path: Path,
    door: str,
    mode: str,
) -> None:
    """Nobody tells the new process what the tools need; it looks again all the same."""
    machine = Machine(tmp_path, make_pocket, door, mode)
    paused, _, _ = machine.process(START_VALUE)
    [pending] = pending_authorizations(paused)
    machine.last.close()

    again, work, model = machine.process(resume(paused))
    [same] = pending_authorizations(again)
    assert (same.url, same.key) == (pending.url, pending.key)
    assert (work.done, model.calls) == ([], 0)
    machine.consent(same.url)
    machine.last.close()

    done, work, model = machine.process(resume(again))
    assert not pending_authorizations(done)
    assert work.done == [("look", server.issued_access_tokens[0])]
    assert model.calls == 1
    assert results(done)["look"].text == "look did x"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("door", GATES)
def test_gate_of_a_new_process_still_asks_for_all_at_once(
    make_pocket: Callable[..., PocketAuth],
    tmp_path: Path,
    door: str,
    mode: str,
) -> None:
    """Without a model call it knows the needs of every tool: from private state."""
    machine = Machine(tmp_path, make_pocket, door, mode, calls=("look", "post"))
    paused, _, _ = machine.process(START_VALUE)
    machine.last.close()
    again, _, model = machine.process(resume(paused))
    [pause] = again["__interrupt__"]
    assert [r["provider"] for r in pause.value["requests"]] == ["acme", "zeta"]
    assert "pocket_auth_needs" not in again
    assert model.calls == 0


@pytest.mark.parametrize("by_id", [True, False], ids=["id", "value"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("door", DOORS)
def test_own_question_after_restarts_gets_its_own_answer(
    make_pocket: Callable[..., PocketAuth],
    tmp_path: Path,
    door: str,
    mode: str,
    by_id: bool,
) -> None:
    """However many processes a call lives through, it never reads our answer."""

    def answer(state: Any, value: str) -> Command[Any]:
        [pause] = state["__interrupt__"]
        return Command(resume={pause.id: value} if by_id else value)

    machine = Machine(tmp_path, make_pocket, door, mode, question="approve?")
    state, _, _ = machine.process(START_VALUE)
    [pending] = pending_authorizations(state)
    machine.consent(pending.url)
    machine.last.close()

    state, work, _ = machine.process(answer(state, "ours"))
    assert [p.value for p in state["__interrupt__"]] == ["approve?"]
    assert work.heard == []
    machine.last.close()

    state, work, _ = machine.process(answer(state, "theirs"))
    assert work.heard == [("look", "theirs")]
    assert results(state)["look"].status == "success"


# ------------------------------------------------------------------------ own states


class AsDict(TypedDict):
    """A state with a field of its own, and messages under another name."""

    talk: Annotated[list[Any], add_messages]
    colour: str


@dataclass
class AsDataclass:
    """The same as a dataclass."""

    talk: Annotated[list[Any], add_messages] = field(default_factory=list)
    colour: str = ""


class AsModel(BaseModel):
    """The same as a pydantic model."""

    talk: Annotated[list[Any], add_messages] = []
    colour: str = ""


Acme = Annotated[AuthContext, InjectedAuth("acme")]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [AsDict, AsDataclass, AsModel])
def test_state_keeps_its_type_behind_the_gate(
    pocket: PocketAuth, alice: Browser, kind: Any, mode: str
) -> None:
    """InjectedState is the graph's own state class; its messages may have any key."""
    seen: list[Any] = []

    @tool
    def paint(
        text: str,
        acme: Acme,
        state: Annotated[Any, InjectedState],
        colour: Annotated[str, InjectedState("colour")],
    ) -> str:
        """Paint."""
        seen.append(state)
        return f"{text} in {colour}"

    @tool("paint")
    async def apaint(
        text: str,
        acme: Acme,
        state: Annotated[Any, InjectedState],
        colour: Annotated[str, InjectedState("colour")],
    ) -> str:
        """Paint."""
        seen.append(state)
        return f"{text} in {colour}"

    model = ScriptedModel(script=[says(call("paint", text="x", colour="red"))])

    def talk(state: Any) -> list[Any]:
        return state["talk"] if isinstance(state, dict) else state.talk

    builder = StateGraph(kind)
    builder.add_node("model", lambda s: {"talk": [model.invoke(talk(s))]})
    pocket.add_tool_node(
        builder,
        [paint if mode == SYNC else apaint],
        name="acts",
        then="model",
        messages_key="talk",
    )
    builder.add_edge(START, "model")
    builder.add_conditional_edges(
        "model",
        lambda s: tools_condition(s, messages_key="talk"),
        {"tools": "acts", "__end__": "__end__"},
    )
    graph = builder.compile(checkpointer=InMemorySaver())
    paused = run(graph, {"talk": [("user", "go")], "colour": "blue"}, mode)
    alice.visit(pending_authorizations(paused)[0].url)
    done = run(graph, resume(paused), mode)
    assert results(done, "talk")["paint"].text == "x in blue"
    [state] = seen
    assert isinstance(state, dict if kind is AsDict else kind)
