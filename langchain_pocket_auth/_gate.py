"""Where calls are let in: the gate for a whole turn, the guard inside each tool."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator, Iterable, Mapping
from functools import reduce
from hashlib import sha256
from operator import or_
from typing import Any, Protocol, TypeAlias, TypeVar

from langchain_core.messages import ToolMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import BaseTool
from langgraph.errors import GraphInterrupt
from langgraph.types import interrupt

from ._engine import declined
from ._errors import (
    AuthorizationRefused,
    AuthorizationRequired,
    ConfigurationError,
    GateRequired,
    PocketAuthError,
    ProviderError,
    ScopeWithheld,
)
from ._models import AuthContext, Outcome, Owner, Requirement
from ._owner import OwnerSource
from ._resume import declined_keys, payload
from ._task import GuardedCall, guarded_call, has_checkpointer, open_calls
from ._tools import Entry, Needs

R = TypeVar("R")
Steps: TypeAlias = Generator[Coroutine[Any, Any, Any], Any, R]
"""A decision that asks its driver for I/O, so that sync and async share it."""

Calls: TypeAlias = list[tuple[Mapping[str, Any], tuple[Requirement, ...]]]

# What a model can be told about; everything else ends the run.
_TOLD = (AuthorizationRefused, ScopeWithheld, ProviderError)


class Desk(Protocol):
    """What gate and guard need of `PocketAuth`."""

    owners: OwnerSource
    interactive: bool

    def peek(self, owner: Owner, requirement: Requirement) -> AuthContext | None:
        """Answer from memory, without I/O."""

    async def settle(
        self, owner: Owner, outcomes: list[Outcome], turn: str, *, ask: bool
    ) -> list[AuthContext | None]:
        """Bring outcomes up to date; contexts for those that are met."""

    async def pauses(self, task: str) -> Mapping[str, int]:
        """How often guarded calls of a task have paused, by ordinal."""

    async def count_pause(self, task: str, ordinal: int, count: int) -> None:
        """Write down how often a guarded call has paused."""

    def run_sync(self, work: Coroutine[Any, Any, R]) -> R:
        """Run on the background loop and block."""

    async def run(self, work: Coroutine[Any, Any, R]) -> R:
        """Run on the background loop."""


def drive(desk: Desk, steps: Steps[R]) -> R:
    """Carry out *steps*, blocking."""
    try:
        work = next(steps)
        while True:
            try:
                result = desk.run_sync(work)
            except BaseException as error:  # noqa: BLE001 - handed to the steps
                work = steps.throw(error)
            else:
                work = steps.send(result)
    except StopIteration as stop:
        value: R = stop.value
        return value


async def adrive(desk: Desk, steps: Steps[R]) -> R:
    """Carry out *steps*."""
    try:
        work = next(steps)
        while True:
            try:
                result = await desk.run(work)
            except BaseException as error:  # noqa: BLE001 - handed to the steps
                work = steps.throw(error)
            else:
                work = steps.send(result)
    except StopIteration as stop:
        value: R = stop.value
        return value


# ------------------------------------------------------------------- a turn as a whole


class Gate:
    """
    Checks all open tool calls of a turn before any of them runs.

    Raises one interrupt that lists every missing connection; returns error messages
    for calls that will not be authorized in this turn.
    """

    def __init__(
        self, desk: Desk, needs: Callable[[str], Iterable[Requirement]]
    ) -> None:
        self._desk, self._needs = desk, needs

    def check(self, messages: list[Any], config: RunnableConfig) -> list[ToolMessage]:
        """Check a turn; synchronous."""
        answers, calls = drain(), self._calls(messages)
        if not calls:
            return []
        owner = self._desk.owners.resolve(config)
        return drive(self._desk, self._steps(owner, calls, messages, config, answers))

    async def acheck(
        self, messages: list[Any], config: RunnableConfig
    ) -> list[ToolMessage]:
        """Check a turn."""
        answers, calls = drain(), self._calls(messages)
        if not calls:
            return []
        owner = await self._desk.owners.aresolve(config)
        steps = self._steps(owner, calls, messages, config, answers)
        return await adrive(self._desk, steps)

    def _calls(self, messages: list[Any]) -> Calls:
        found: Calls = []
        for call in open_calls(messages):
            requirements = tuple(r for r in self._needs(call["name"]) if r.required)
            if requirements:
                found.append((call, requirements))
        return found

    def _steps(
        self,
        owner: Owner,
        calls: Calls,
        messages: list[Any],
        config: RunnableConfig,
        answers: list[Any],
    ) -> Steps[list[ToolMessage]]:
        # Each distinct requirement by itself: a refused upgrade must not take away
        # what a smaller one has.
        single = _outcomes(calls)
        missing = [o for o in single if not self._desk.peek(owner, o.requirement)]
        if missing:
            turn = _turn(messages, config)
            contexts = yield self._desk.settle(owner, missing, turn, ask=False)
            unmet = _unmet(missing, contexts)
            asked = yield from _ask(self._desk, owner, unmet, turn, answers)
            if asked:
                if not has_checkpointer(config):
                    raise ConfigurationError(_NO_CHECKPOINTER)
                interrupt(payload(asked))
        return _errors(calls, single)


def drain() -> list[Any]:
    """
    Take every answer that this task has, so that none is left for another's pause.

    Only for a task that raises nothing but our own interrupt.
    """
    answers: list[Any] = []
    while True:
        try:
            answers.append(interrupt({"type": "pocket_auth.probe"}))
        except GraphInterrupt:
            return answers


def _ask(
    desk: Desk, owner: Owner, unmet: list[Outcome], turn: str, answers: list[Any]
) -> Steps[list[Outcome]]:
    """Make one question per connection; return those to wait for."""
    if unmet and not desk.interactive:
        for outcome in unmet:
            outcome.refusal = _cannot_ask(outcome.requirement)
    if not unmet or not desk.interactive:
        return []
    asked = _merged(unmet)
    yield desk.settle(owner, asked, turn, ask=True)
    refused = declined_keys(answers)
    for question in asked:
        consent = question.consent
        if consent is not None and consent.key in refused:
            question.refusal = declined(consent.display_name)
        if question.refusal is not None:
            for outcome in unmet:
                if outcome.requirement.place == question.requirement.place:
                    outcome.refusal = question.refusal
    return [q for q in asked if q.consent is not None and q.refusal is None]


def _outcomes(calls: Calls) -> list[Outcome]:
    found: dict[Requirement, Outcome] = {}
    for call, requirements in calls:
        for requirement in requirements:
            outcome = found.setdefault(requirement, Outcome(requirement))
            outcome.tools.append(call["name"])
            outcome.tool_call_ids.append(call["id"])
    return list(found.values())


def _unmet(
    outcomes: list[Outcome], contexts: Iterable[AuthContext | None]
) -> list[Outcome]:
    return [
        outcome
        for outcome, context in zip(outcomes, contexts, strict=True)
        if context is None and outcome.refusal is None
    ]


def _merged(unmet: list[Outcome]) -> list[Outcome]:
    """One question per connection, with the union of the scopes."""
    places: dict[Any, list[Outcome]] = {}
    for outcome in unmet:
        places.setdefault(outcome.requirement.place, []).append(outcome)
    return [
        Outcome(
            reduce(or_, (o.requirement for o in same)),
            tools=[t for o in same for t in o.tools],
            tool_call_ids=list(dict.fromkeys(i for o in same for i in o.tool_call_ids)),
        )
        for same in places.values()
    ]


def _errors(calls: Calls, outcomes: list[Outcome]) -> list[ToolMessage]:
    refusals = {o.requirement: o.refusal for o in outcomes if o.refusal}
    errors = []
    for call, requirements in calls:
        refused = [str(refusals[r]) for r in requirements if r in refusals]
        if refused:
            errors.append(_error(call["name"], call["id"], " ".join(refused)))
    return errors


def _error(name: str, call_id: str, text: str) -> ToolMessage:
    return ToolMessage(
        f"{text} The tool {name} was not run.",
        name=name,
        tool_call_id=call_id,
        status="error",
    )


def _turn(messages: list[Any], config: RunnableConfig) -> str:
    """Name this turn of this conversation; the same when the gate runs again."""
    last = next((m for m in reversed(messages) if m.type == "ai"), None)
    calls = [call["id"] for call in getattr(last, "tool_calls", ())]
    thread = (config.get("configurable") or {}).get("thread_id")
    return _name(thread, getattr(last, "id", None), calls)


def _name(*parts: Any) -> str:
    return sha256(repr(parts).encode()).hexdigest()[:32]


# ---------------------------------------------------------------------- a single call


class ToolGuard:
    """
    Lets single calls in: at once where a session is valid.

    Where no gate stands before the tool it pauses by itself, in a task of its own.
    How often it did is kept outside the graph: when the task runs again, each
    guarded call first takes the answers to its own pauses, so that an `interrupt()`
    in the tool's body never reads one of them.
    """

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def enter(
        self, tool: BaseTool, needs: Needs, config: RunnableConfig, call_id: str | None
    ) -> Entry | ToolMessage:
        """Let a call in, or answer it; synchronous."""
        call = guarded_call(config)
        try:
            owner = self._desk.owners.resolve(config)
            steps = self._steps(owner, tool.name, needs, call, call_id)
            return drive(self._desk, steps)
        finally:
            if call is not None:
                call.decided()

    async def aenter(
        self, tool: BaseTool, needs: Needs, config: RunnableConfig, call_id: str | None
    ) -> Entry | ToolMessage:
        """Let a call in, or answer it."""
        call = guarded_call(config)
        try:
            owner = await self._desk.owners.aresolve(config)
            steps = self._steps(owner, tool.name, needs, call, call_id)
            return await adrive(self._desk, steps)
        finally:
            if call is not None:
                call.decided()

    def _steps(
        self,
        owner: Owner,
        tool: str,
        needs: Needs,
        call: GuardedCall | None,
        call_id: str | None,
    ) -> Steps[Entry | ToolMessage]:
        answers: list[Any] = []
        if call is not None and call.resumed:
            answers = yield from self._replay(call)
        known = {r: self._desk.peek(owner, r) for r in needs.requirements}
        while None in known.values():
            try:
                known, asked = yield from self._decide(
                    owner, tool, known, call, call_id, answers
                )
            except _TOLD as error:
                if call_id is None:
                    raise
                return _error(tool, call_id, str(error))
            if not asked:
                break
            if call is None:
                raise _required(asked)
            yield self._desk.count_pause(call.task, call.ordinal, len(answers) + 1)
            answers.append(interrupt(payload(asked)))
        return Entry(owner, known)

    def _replay(self, call: GuardedCall) -> Steps[list[Any]]:
        """Take the answers to the pauses that this call made before."""
        answers: list[Any] = []
        counts = yield self._desk.pauses(call.task)
        for _ in range(counts.get(str(call.ordinal), 0)):
            try:
                answers.append(interrupt({"type": "pocket_auth.probe"}))
            except GraphInterrupt:
                # Counted, but the pause never reached the checkpoint.
                yield self._desk.count_pause(call.task, call.ordinal, len(answers))
                break
        return answers

    def _decide(
        self,
        owner: Owner,
        tool: str,
        known: Mapping[Requirement, AuthContext | None],
        call: GuardedCall | None,
        call_id: str | None,
        answers: list[Any],
    ) -> Steps[tuple[dict[Requirement, AuthContext | None], list[Outcome]]]:
        turn = _name(call.task, call.ordinal) if call else _name(tool, call_id)
        outcomes = [
            Outcome(r, tools=[tool], tool_call_ids=[call_id] if call_id else [])
            for r, context in known.items()
            if context is None
        ]
        contexts = yield self._desk.settle(owner, outcomes, turn, ask=False)
        found = dict(known) | {
            o.requirement: c for o, c in zip(outcomes, contexts, strict=True)
        }
        outcomes = [o for o in outcomes if o.requirement.required]
        unmet = [o for o in outcomes if not found[o.requirement] and not o.refusal]
        if unmet and call is not None and self._desk.interactive:
            _may_pause(call, tool, unmet)
        asked = yield from _ask(self._desk, owner, unmet, turn, answers)
        for outcome in outcomes:
            if outcome.refusal is not None:
                raise outcome.refusal
        return found, asked


def _may_pause(call: GuardedCall, tool: str, unmet: list[Outcome]) -> None:
    if not call.has_checkpointer:
        raise ConfigurationError(_NO_CHECKPOINTER)
    if not call.may_pause:
        names = ", ".join(o.requirement.provider for o in unmet)
        raise GateRequired(_GATE_REQUIRED.format(tool=tool, provider=names))


def _required(asked: list[Outcome]) -> AuthorizationRequired:
    first = asked[0]
    consent = first.consent
    assert consent is not None  # noqa: S101 - `_ask` returns only such
    return AuthorizationRequired(
        f"{consent.display_name} is not connected; the link for the person is in "
        "the `url` of this exception",
        provider=consent.provider,
        scopes=consent.scopes,
        url=consent.url,
    )


def _cannot_ask(requirement: Requirement) -> PocketAuthError:
    return AuthorizationRefused(
        f"{requirement.provider} is not connected, and this run cannot ask the user."
    )


_NO_CHECKPOINTER = (
    "this graph has to pause for an authorization and has no checkpointer: compile it "
    "with one, e.g. builder.compile(checkpointer=InMemorySaver())"
)
_GATE_REQUIRED = (
    "{tool}: {provider} is not connected, and this task serves several tool calls: a "
    "pause here could hand its answer to another of them. Build the tools with "
    "pocket.add_tool_node(builder, tools) or use pocket.middleware()"
)
