"""The gate: checks the tool calls of a whole turn, and pauses once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from langchain_core.messages import ToolMessage
from langchain_core.runnables import RunnableConfig

from ._models import Outcome, Owner, Requirement, Turn
from ._pauses import GATE
from ._steps import (
    Desk,
    Steps,
    adrive,
    ask,
    confirm,
    drive,
    error_message,
    may_ask,
    no_checkpointer,
    pause,
    take,
    unmet_of,
)
from ._task import (
    TaskRun,
    detached,
    has_checkpointer,
    just_resumed,
    name_of,
    open_calls,
    pause_would_be_lost,
    resumption,
    thread_of,
)

Calls: TypeAlias = list[tuple[Mapping[str, Any], tuple[Requirement, ...]]]


class Gate:
    """
    Checks all open tool calls of a turn before any of them runs.

    Raises one interrupt that lists every missing connection; returns error messages
    for calls that will not be authorized in this turn. Runs in a task of its own,
    whose answers it takes all, so that none is left for another's pause.
    """

    def __init__(
        self, desk: Desk, needs: Callable[[str], Iterable[Requirement]]
    ) -> None:
        self._desk, self._needs = desk, needs

    def check(self, messages: list[Any], config: RunnableConfig) -> list[ToolMessage]:
        """Check a turn; synchronous."""
        answers, calls = self._answers(config), self._calls(messages)
        if not calls:
            return []
        owner = self._desk.owners.resolve(config)
        return drive(self._desk, self._steps(owner, calls, messages, config, answers))

    async def acheck(
        self, messages: list[Any], config: RunnableConfig
    ) -> list[ToolMessage]:
        """Check a turn."""
        answers, calls = self._answers(config), self._calls(messages)
        if not calls:
            return []
        owner = await self._desk.owners.aresolve(config)
        steps = self._steps(owner, calls, messages, config, answers)
        return await adrive(self._desk, steps)

    @staticmethod
    def _answers(config: RunnableConfig) -> list[Any]:
        # Where the gate cannot have paused, an answer is to somebody else.
        return take() if has_checkpointer(config) else []

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
        outcomes, task = _outcomes(calls), TaskRun.of(config)
        missing = [o for o in outcomes if not self._desk.peek(owner, o.requirement)]
        if missing:
            turn = _turn(messages, config, task)
            wrong = yield from confirm(self._desk, owner, answers, task.id)
            contexts = yield self._desk.settle(owner, missing, turn, ask=False)
            unmet, interactive = (
                unmet_of(missing, contexts),
                may_ask(self._desk, config),
            )
            if unmet and interactive and detached(config):
                raise pause_would_be_lost()
            if unmet and interactive and not has_checkpointer(config):
                raise no_checkpointer()
            asked = yield from ask(
                self._desk,
                owner,
                unmet,
                turn,
                answers,
                interactive=interactive,
                wrong_codes=wrong,
            )
            if asked:
                yield from pause(self._desk, asked, task.id, resumption(config))
        if answers or just_resumed(config):
            # Of several runs that were resumed at once, one goes on, whatever answers
            # they bring: a gate that has let a turn through has no second question.
            yield self._desk.claim(task.id, GATE, task.holder, 0)
        return _errors(calls, outcomes)


def _outcomes(calls: Calls) -> list[Outcome]:
    found: dict[Requirement, Outcome] = {}
    for call, requirements in calls:
        for requirement in requirements:
            outcome = found.setdefault(requirement, Outcome(requirement))
            outcome.tools.append(call["name"])
            outcome.tool_call_ids.append(call["id"])
    return list(found.values())


def _errors(calls: Calls, outcomes: list[Outcome]) -> list[ToolMessage]:
    refusals = {o.requirement: o.refusal for o in outcomes if o.refusal}
    errors = []
    for call, requirements in calls:
        refused = [refusals[r] for r in requirements if r in refusals]
        if refused:
            errors.append(error_message(call["name"], call["id"], refused))
    return errors


def _turn(messages: list[Any], config: RunnableConfig, task: TaskRun) -> Turn:
    """Name this turn of this conversation; the same when the gate runs again."""
    last = next((m for m in reversed(messages) if m.type == "ai"), None)
    calls = [call["id"] for call in getattr(last, "tool_calls", ())]
    thread = thread_of(config)
    return Turn(name_of(thread, getattr(last, "id", None), calls), thread, task.id)
