"""
Resumes that come late, twice, at once, or from somebody else.

An answer wakes a run up; what the person did at the provider decides. So none of these
can grant anything or run a tool twice. The worst that they can do is to decline.
"""

# No `from __future__ import annotations`: tools are made of local annotations.

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
from conftest import call, says
from graphs import ASYNC, MODES, SYNC, Work, World, ask, build, shared, thread
from langchain_core.messages import AIMessage
from langchain_core.tools import BaseTool, tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.func import entrypoint, task
from langgraph.types import Command
from test_matrix import CALLS, open_door

from langchain_pocket_auth import (
    AlreadyResumed,
    AuthContext,
    InjectedAuth,
    PocketAuth,
    pending_authorizations,
    resume,
)
from langchain_pocket_auth.testing import AuthorizationServer, Browser, ScriptedModel

world, server, pocket, alice = shared()

DOORS = ["create_agent", "add_tool_node", "subgraph", "entrypoint"]
MANY = [*DOORS, "without gate"]
ALL = [*MANY, "ToolNode"]  # the last two pause in the tool itself
BOUND_S = 10.0


class Meeting(InMemorySaver):
    """Lets several runs read one checkpoint, or keeps one from being written."""

    def __init__(self) -> None:
        super().__init__()
        self._expected = 0
        self._held: list[threading.Event] = []

    def of(self, count: int, *, nested: bool) -> None:
        """Let the next *count* runs meet, where they read a child's checkpoint or not."""
        self._expected, self._nested = count, nested
        self._threads, self._tasks = threading.Barrier(count), asyncio.Barrier(count)

    def _is_expected(self, config: Any) -> bool:
        child = bool(config["configurable"].get("checkpoint_ns"))
        if not self._expected or child is not self._nested:
            return False
        self._expected -= 1
        return True

    def get_tuple(self, config: Any) -> Any:
        found = super().get_tuple(config)
        if self._is_expected(config):
            self._threads.wait(BOUND_S)
        return found

    async def aget_tuple(self, config: Any) -> Any:
        found = super().get_tuple(config)
        if self._is_expected(config):
            async with asyncio.timeout(BOUND_S):
                await self._tasks.wait()
        return found

    def hold(self, until: threading.Event) -> None:
        """Let the next checkpoint, which is written in the background, take long."""
        self._held.append(until)

    def put(self, *args: Any) -> Any:
        if self._held:
            self._held.pop().wait(BOUND_S)
        return super().put(*args)

    async def aput(self, *args: Any) -> Any:
        if self._held:
            await asyncio.to_thread(self._held.pop().wait, BOUND_S)
        return super().put(*args)


@dataclass
class Scene:
    """An agent that paused, because its tool needs acme."""

    door: str
    mode: str
    graph: Any
    model: ScriptedModel
    work: Work
    saver: Meeting
    config: dict[str, Any]
    paused: Any

    @property
    def state(self) -> Any:
        return self.graph.get_state(self.config)

    @property
    def link(self) -> str:
        """The one link that is asked to be opened now."""
        [pending] = pending_authorizations(self.state)
        return pending.url

    @property
    def key(self) -> str:
        """The name of the question in an answer."""
        [pending] = pending_authorizations(self.paused)
        return pending.key

    def go_on(self, command: Any, **how: Any) -> Any:
        if self.mode == SYNC:
            return self.graph.invoke(command, self.config, **how)
        return asyncio.run(self.graph.ainvoke(command, self.config, **how))

    def at_once(self, *commands: Any) -> list[Any]:
        """Resume in as many runs at the same time; return results and exceptions."""
        self.saver.of(len(commands), nested=self.door == "subgraph")
        if self.mode == ASYNC:
            return asyncio.run(self._gathered(commands))
        with ThreadPoolExecutor(len(commands)) as pool:
            runs = [pool.submit(self.graph.invoke, c, self.config) for c in commands]
            return [r.exception(BOUND_S) or r.result() for r in runs]

    async def _gathered(self, commands: tuple[Any, ...]) -> list[Any]:
        runs = (self.graph.ainvoke(c, self.config) for c in commands)
        return await asyncio.gather(*runs, return_exceptions=True)

    def is_over(self, *tools: str) -> bool:
        """Whether the run has ended, and these tools ran, each once."""
        assert self.work.names == sorted(tools)
        assert self.model.calls == 2
        state = self.state
        assert (state.next, state.interrupts) == ((), ())
        return state.values["messages"][-1].text == "done"


def scene(
    door: str,
    mode: str,
    pocket: PocketAuth,
    *names: str,
    question: str | None = None,
    config: dict[str, Any] | None = None,
    tools: list[BaseTool] | None = None,
) -> Scene:
    """Run an agent up to its pause."""
    work, names = Work(mode), names or ("look",)
    used = tools or [work.tool(n, CALLS[n], question=question) for n in names]
    first, second = (
        says(*(call(t.name, f"{t.name}-{n}", text="x") for t in used)) for n in "12"
    )
    script = [first, AIMessage("done"), second]
    saver, config = Meeting(), config or thread()
    if door == "ToolNode":
        graph, model = build(door, pocket, used, script, saver)
    else:
        graph, model = open_door(door, pocket, used, script, mode=mode, saver=saver)
    paused = ask(graph, mode, config)
    assert pending_authorizations(paused)
    return Scene(door, mode, graph, model, work, saver, config, paused)


def connect(person: Browser, state: Any, *providers: str) -> None:
    """Open the links of these providers, or of all, and agree."""
    for pending in pending_authorizations(state):
        if not providers or pending.provider in providers:
            assert person.visit(pending.url).status_code == 200


def by_value(state: Any) -> Command[Any]:
    return Command(resume="done")


def by_id(state: Any) -> Command[Any]:
    return Command(resume={p.id: "done" for p in state["__interrupt__"]})


def no_answer(state: Any) -> None:
    return None


def declining(state: Any) -> Command[Any]:
    return resume(state, decline=pending_authorizations(state))


WAYS: dict[str, Callable[[Any], Any]] = {
    "resume": resume,
    "value": by_value,
    "id": by_id,
    "nothing": no_answer,
}


# -------------------------------------------------------------------- late and twice


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("door", DOORS)
def test_late_resume_of_a_finished_run_does_nothing(
    pocket: PocketAuth, alice: Browser, door: str, mode: str
) -> None:
    """Whatever comes when all is done: same state, no tool, no model, no refusal."""
    on = scene(door, mode, pocket)
    connect(alice, on.paused)
    done = on.go_on(resume(on.paused))
    assert on.is_over("look")
    for late in [*WAYS.values(), declining]:
        again = on.go_on(late(on.paused))
        assert again is None or again["messages"] == done["messages"]
        assert on.is_over("look")
    # Nor has the late refusal taken anything away.
    assert "__interrupt__" not in ask(on.graph, mode, on.config)
    assert on.work.names == ["look", "look"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("way", ["resume", "value"])
def test_same_resume_before_and_after_the_consent_counts_once(
    pocket: PocketAuth, alice: Browser, door: str, mode: str, way: str
) -> None:
    """Twice too early it asks again with the same link, then the tool runs once."""
    on = scene(door, mode, pocket)
    same, link = WAYS[way](on.paused), on.link
    for _ in range(2):
        on.go_on(same)
        assert (on.link, on.work.done) == (link, [])
    connect(alice, on.state)
    for _ in range(2):
        on.go_on(same)
    if on.state.next:  # its interrupt has another id by now
        on.go_on(resume(on.state))
    assert on.is_over("look")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("door", MANY)
def test_same_resume_at_a_partial_consent_counts_once(
    pocket: PocketAuth, alice: Browser, door: str, mode: str
) -> None:
    """A repeated answer to the first question is none to the second."""
    on = scene(door, mode, pocket, *CALLS)
    same = resume(on.paused)
    connect(alice, on.paused, "acme")
    for _ in range(2):
        on.go_on(same)
        [pending] = pending_authorizations(on.state)
        assert pending.provider == "zeta"
    connect(alice, on.state)
    on.go_on(same)
    while on.state.next:
        on.go_on(resume(on.state))
    assert on.is_over(*CALLS)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("door", ALL)
@pytest.mark.parametrize("way", [resume, by_id])
def test_late_duplicate_is_no_answer_to_the_tools_own_question(
    pocket: PocketAuth,
    alice: Browser,
    *,
    door: str,
    mode: str,
    way: Callable[[Any], Any],
) -> None:
    """Who clicks "continue" twice has not approved what the tool asks meanwhile."""
    on = scene(door, mode, pocket, question="delete?")
    connect(alice, on.paused)
    for _ in range(3):
        on.go_on(way(on.paused))
        assert [p.value for p in on.state.interrupts] == ["delete?"]
        assert (on.work.heard, on.work.done) == ([], [])
    on.go_on(Command(resume="theirs"))
    assert on.is_over("look")
    assert on.work.heard == [("look", "theirs")]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("door", DOORS)
def test_answer_by_value_is_for_whoever_asks_now(
    pocket: PocketAuth, alice: Browser, door: str, mode: str
) -> None:
    """LangGraph's own rule, also between tools of one's own: `resume` uses ids."""
    on = scene(door, mode, pocket, question="delete?")
    connect(alice, on.paused)
    on.go_on(by_value(on.paused))
    assert on.work.heard == []
    on.go_on(by_value(on.paused))
    assert on.is_over("look")
    assert on.work.heard == [("look", "done")]


# -------------------------------------------------------------------------- forged


def nested(depth: int) -> Any:
    value: Any = {"action": "accept", "authorized": True}
    for _ in range(depth):
        value = {"responses": value}
    return value


TOKEN = "forged-access-token"
# Made from the key of the question; none of them declines it.
FORGED: dict[str, Callable[[str], Any]] = {
    "token": lambda _: TOKEN,
    "authorized": lambda _: {"authorized": True, "access_token": TOKEN},
    "context": lambda _: {"contexts": {"acme": {"access_token": TOKEN}}},
    "accepted": lambda key: {"responses": {key: {"action": "accept"}}},
    "with content": lambda key: {
        "responses": {key: {"action": "accept", "content": {"access_token": TOKEN}}}
    },
    "made-up action": lambda key: {"responses": {key: {"action": "grant"}}},
    "request": lambda key: {
        "type": "pocket_auth",
        "requests": [{"key": key, "state": "SKIP_AUTH"}],
    },
    "deep": lambda _: nested(50),
    "huge": lambda _: "x" * 100_000,
    "keys that are no text": lambda _: {1: 2, None: 3, b"x": TOKEN},
    "responses to nobody": lambda _: {
        "responses": {1: {"action": "decline"}, None: {"action": "decline"}, "": 1}
    },
    "list of responses": lambda key: {"responses": [key, {"action": "decline"}]},
    "response is a word": lambda key: {"responses": {key: "decline"}},
    "action is a list": lambda key: {"responses": {key: {"action": ["decline"]}}},
    "action is a mapping": lambda key: {"responses": {key: {"action": {"a": 1}}}},
    "true": lambda _: True,
    "false": lambda _: False,
    "zero": lambda _: 0,
    "empty text": lambda _: "",
    "empty list": lambda _: [],
    "empty mapping": lambda _: {},
    "ids of nobody": lambda _: {"0" * 32: {"action": "accept"}},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("door", ALL)
def test_forged_answer_grants_nothing_and_breaks_nothing(
    server: AuthorizationServer,
    pocket: PocketAuth,
    alice: Browser,
    door: str,
    mode: str,
) -> None:
    """After each the same link is asked for; after the consent the tool runs once."""
    on, wrong = scene(door, mode, pocket), dict[str, Any]()
    link = on.link
    for name, make in FORGED.items():
        value = make(on.key)
        for style in ("value", "id"):
            if (name, style) == ("keys that are no text", "value"):
                continue  # LangGraph does not even read it
            ids = {p.id: value for p in on.state.interrupts}
            try:
                on.go_on(Command(resume=ids if style == "id" else value))
                seen = (on.link, on.work.done)
            except Exception as error:  # noqa: BLE001 - all that go wrong are shown
                seen = repr(error)
                break
            finally:
                if seen != (link, []):
                    wrong[f"{name} by {style}"] = seen
    assert wrong == {}
    connect(alice, on.state)
    on.go_on(resume(on.state))
    assert on.is_over("look")
    assert on.work.done == [("look", server.issued_access_tokens[0])]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("door", MANY)
@pytest.mark.parametrize("other", ["person", "provider"])
def test_decline_of_anothers_question_declines_nothing(
    world: World, pocket: PocketAuth, alice: Browser, door: str, mode: str, other: str
) -> None:
    """Two threads answer with each other's key; both wait on, and both get done."""
    persons = ("ann", "bob") if other == "person" else ("ann", "ann")
    tools = ("look", "look") if other == "person" else ("look", "post")
    scenes = []
    for person, name in zip(persons, tools, strict=True):
        world.person = f"{person} {door} {mode} {other}"
        on = scene(door, mode, pocket, name, config=thread(f"{person} {name}"))
        scenes.append((world.person, name, on))
    keys = [on.key for _, _, on in scenes]
    assert keys[0] != keys[1]
    forged = {"responses": {key: {"action": "decline"} for key in keys}}
    for (person, _, on), foreign in zip(scenes, reversed(keys), strict=True):
        world.person, link = person, on.link
        answer = {"responses": {foreign: forged["responses"][foreign]}}
        on.go_on(Command(resume={p.id: answer for p in on.state.interrupts}))
        assert on.link == link
    for person, name, on in scenes:
        world.person = person
        connect(alice, on.state)
        on.go_on(resume(on.state))
        assert on.is_over(name)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("door", DOORS)
def test_decline_in_one_thread_leaves_the_other_its_question(
    pocket: PocketAuth, alice: Browser, door: str, mode: str
) -> None:
    """One person, one link, two conversations: each decides for itself."""
    one = scene(door, mode, pocket, config=thread("one"))
    two = scene(door, mode, pocket, config=thread("two"))
    assert one.key == two.key
    one.go_on(declining(one.paused))
    assert one.is_over()
    connect(alice, two.paused)
    two.go_on(resume(two.paused))
    assert two.is_over("look")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("door", MANY)
@pytest.mark.parametrize("way", [resume, declining])
def test_resume_of_another_thread_is_none_of_this(
    pocket: PocketAuth,
    alice: Browser,
    *,
    door: str,
    mode: str,
    way: Callable[[Any], Any],
) -> None:
    """Delivered to the wrong thread, a command answers nothing there."""
    one = scene(door, mode, pocket, config=thread("one"))
    two = scene(door, mode, pocket, config=thread("two"))
    link = one.link
    one.go_on(way(two.paused))
    assert (one.link, one.work.done) == (link, [])
    for on in (one, two):
        connect(alice, on.state)
        on.go_on(resume(on.state))
        assert on.is_over("look")


# --------------------------------------------------------------------------- racing


def winner(outcomes: list[Any]) -> Any:
    """Return the one result; all others lost, and were told so."""
    results = [o for o in outcomes if not isinstance(o, BaseException)]
    errors = [o for o in outcomes if isinstance(o, BaseException)]
    assert [type(e) for e in errors] == [AlreadyResumed] * (len(outcomes) - 1), outcomes
    [result] = results
    return result


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("door", ALL)
@pytest.mark.parametrize(
    ("way", "count"), [("resume", 5), *((name, 2) for name in WAYS)]
)
def test_of_resumes_at_once_one_goes_on(
    pocket: PocketAuth, alice: Browser, *, door: str, mode: str, way: str, count: int
) -> None:
    """All read the same pause; one runs the tool and finishes, the others say so."""
    on = scene(door, mode, pocket)
    connect(alice, on.paused)
    won = winner(on.at_once(*[WAYS[way](on.paused)] * count))
    assert "__interrupt__" not in won
    assert won["messages"][-1].text == "done"
    assert on.is_over("look")
    # And the thread is sound: the next turn runs as if nothing had happened.
    assert "__interrupt__" not in ask(on.graph, mode, on.config)
    assert on.work.names == ["look", "look"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("door", MANY)
def test_of_resumes_of_many_calls_one_goes_on(
    pocket: PocketAuth, alice: Browser, door: str, mode: str
) -> None:
    """
    No call runs twice, and with a gate one of the resumes takes all calls.

    Tasks without a gate are claimed one by one: two runs may share them out and both
    be told so; what they did is kept, and the next resume goes on.
    """
    on = scene(door, mode, pocket, *CALLS)
    connect(alice, on.paused)
    outcomes = on.at_once(*[resume(on.paused)] * 2)
    gated = door != "without gate"
    if gated:
        winner(outcomes)
    for _ in range(6):  # an entrypoint asks for one connection at a time
        if not on.state.next:
            break
        connect(alice, on.state)
        outcomes = on.at_once(resume(on.state) if on.state.interrupts else None)
        assert gated or not any(isinstance(o, AlreadyResumed) for o in outcomes)
    assert on.is_over(*CALLS)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("door", MANY)
def test_yes_and_no_at_once_is_one_of_them(
    pocket: PocketAuth, alice: Browser, door: str, mode: str
) -> None:
    """After the consent a "no" that races a "yes" costs the call at most."""
    on = scene(door, mode, pocket)
    connect(alice, on.paused)
    won = winner(on.at_once(resume(on.paused), declining(on.paused)))
    [answer] = [m for m in won["messages"] if m.type == "tool"]
    assert on.is_over(*(["look"] if answer.status == "success" else []))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("door", ALL)
def test_resumes_at_once_before_the_consent_lose_nothing(
    pocket: PocketAuth, alice: Browser, door: str, mode: str
) -> None:
    """All ask again; later answers still reach who asked."""
    on = scene(door, mode, pocket, question="delete?")
    link = on.link
    for _ in range(2):
        outcomes = on.at_once(*[resume(on.state)] * 3)
        for outcome in outcomes:
            if not isinstance(outcome, AlreadyResumed):
                assert [p.url for p in pending_authorizations(outcome)] == [link]
    connect(alice, on.state)
    on.go_on(resume(on.state))
    assert [p.value for p in on.state.interrupts] == ["delete?"]
    on.go_on(Command(resume="theirs"))
    assert on.is_over("look")
    assert on.work.heard == [("look", "theirs")]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("door", ALL)
def test_answers_to_the_tools_own_question_at_once_run_it_once(
    pocket: PocketAuth, alice: Browser, door: str, mode: str
) -> None:
    """The tool was let in after a pause; of two approvals at once one goes on."""
    on = scene(door, mode, pocket, question="delete?")
    connect(alice, on.paused)
    on.go_on(resume(on.paused))
    ids = [p.id for p in on.state.interrupts]
    winner(on.at_once(*[Command(resume=dict.fromkeys(ids, "theirs"))] * 2))
    assert on.is_over("look")


# --------------------------------------------------------------- while a tool runs


class Slow:
    """A tool whose first run takes until it may end, or fails."""

    def __init__(self, mode: str, error: Exception | None = None) -> None:
        self.started, self.may_end = threading.Event(), threading.Event()
        self.starts, self.ends, self._error = 0, 0, error
        Acme = Annotated[AuthContext, InjectedAuth("acme")]  # noqa: N806

        @tool("look")
        def look(text: str, auth: Acme) -> str:
            """Take a while."""
            if self._begin():
                self.may_end.wait(BOUND_S)
            return self._end()

        @tool("look")
        async def alook(text: str, auth: Acme) -> str:
            """Take a while."""
            if self._begin():
                await asyncio.to_thread(self.may_end.wait, BOUND_S)
            return self._end()

        self.tool = look if mode == SYNC else alook

    def _begin(self) -> bool:
        self.starts += 1
        self.started.set()
        return self.starts == 1

    def _end(self) -> str:
        if self._error is not None and self.starts == 1:
            raise self._error
        self.ends += 1
        return "looked"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("door", ALL)
@pytest.mark.parametrize("way", ["resume", "nothing"])
@pytest.mark.parametrize("stored", [True, False], ids=["stored", "on its way"])
def test_resume_while_the_tool_runs_does_not_run_it_again(
    pocket: PocketAuth,
    alice: Browser,
    *,
    door: str,
    mode: str,
    way: str,
    stored: bool,
) -> None:
    """
    Who is impatient and continues once more is told that it is going on.

    Whether the checkpoint behind the gate can be read by then, or is on its way.
    """
    slow = Slow(mode)
    on = scene(door, mode, pocket, tools=[slow.tool])
    connect(alice, on.paused)
    how = {"durability": "sync"} if stored else {}
    if not stored:
        on.saver.hold(until=slow.may_end)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(on.go_on, resume(on.paused), **how)
        try:
            assert slow.started.wait(BOUND_S)
            with pytest.raises(AlreadyResumed):
                on.go_on(WAYS[way](on.paused))
        finally:
            slow.may_end.set()
        done = running.result(BOUND_S)
    assert done["messages"][-1].text == "done"
    assert (slow.starts, slow.ends, on.model.calls) == (1, 1, 2)
    assert (on.state.next, on.state.interrupts) == ((), ())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("door", ALL)
def test_run_that_failed_after_its_resume_can_be_continued(
    pocket: PocketAuth, alice: Browser, door: str, mode: str
) -> None:
    """A tool that raises ends the run, and does not keep the pause for itself."""
    slow = Slow(mode, ZeroDivisionError("broken"))
    slow.may_end.set()
    on = scene(door, mode, pocket, tools=[slow.tool])
    connect(alice, on.paused)
    with pytest.raises(ZeroDivisionError):
        on.go_on(resume(on.paused))
    on.go_on(None)
    assert (slow.starts, slow.ends) == (2, 1)
    assert on.state.values["messages"][-1].text == "done"


@pytest.mark.parametrize("door", ALL)
def test_run_that_was_cancelled_after_its_resume_can_be_continued(
    pocket: PocketAuth, alice: Browser, door: str
) -> None:
    """A closed browser tab cancels the run; the next resume goes on at once."""
    slow = Slow(ASYNC)
    on = scene(door, ASYNC, pocket, tools=[slow.tool])
    connect(alice, on.paused)

    async def cancelled() -> None:
        running = asyncio.create_task(on.graph.ainvoke(resume(on.paused), on.config))
        try:
            assert await asyncio.to_thread(slow.started.wait, BOUND_S)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        finally:
            slow.may_end.set()

    asyncio.run(cancelled())
    assert slow.ends == 0
    on.go_on(None)
    assert (slow.starts, slow.ends) == (2, 1)
    assert on.state.values["messages"][-1].text == "done"


@pytest.mark.parametrize("gated", [True, False], ids=["gate", "no gate"])
def test_task_that_failed_behind_its_tool_can_be_continued(
    pocket: PocketAuth, alice: Browser, *, gated: bool
) -> None:
    """What a task does after its tool may fail; the next resume goes on at once."""
    work, failures = Work(), [ZeroDivisionError()]
    look = work.tool("look", "acme")
    gate, guarded = pocket.gate([look]), pocket.wrap(look)
    messages = [says(call("look", text="x"))]

    @task
    def act() -> Any:
        result = guarded.invoke(messages[0].tool_calls[0])
        if failures:
            raise failures.pop()
        return result

    @entrypoint(checkpointer=InMemorySaver())
    def flow(_: Any) -> dict[str, Any]:
        refused = gate.check(messages).result() if gated else []
        return {"messages": [*refused, act().result()]}

    paused = flow.invoke(1, thread())
    connect(alice, paused)
    with pytest.raises(ZeroDivisionError):
        flow.invoke(resume(paused), thread())
    done = flow.invoke(None, thread())
    assert [message.text for message in done["messages"]] == ["look did x"]
    assert work.names == ["look", "look"]  # LangGraph runs a failed task anew
