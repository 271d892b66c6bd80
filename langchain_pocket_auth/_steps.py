"""What gate and guard share: decisions that a sync and an async driver carry out."""

from __future__ import annotations

from collections.abc import Coroutine, Generator, Iterable, Mapping
from functools import reduce
from hashlib import sha256
from operator import or_
from typing import Any, Protocol, TypeAlias, TypeVar

from langchain_core.messages import ToolMessage
from langgraph.errors import GraphInterrupt
from langgraph.types import interrupt

from ._engine import declined
from ._errors import AuthorizationRefused, ConfigurationError
from ._models import AuthContext, Outcome, Owner, Requirement
from ._owner import OwnerSource
from ._resume import declined_keys

R = TypeVar("R")
Steps: TypeAlias = Generator[Coroutine[Any, Any, Any], Any, R]
"""A decision that asks its driver for I/O, so that sync and async share it."""


class Desk(Protocol):
    """What gate and guard need of the service behind `PocketAuth`."""

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


# ---------------------------------------------------------------------- the question


def ask(
    desk: Desk, owner: Owner, unmet: list[Outcome], turn: str, answers: list[Any]
) -> Steps[list[Outcome]]:
    """
    Make one question per connection; return those to wait for.

    What is refused is written into *unmet*, each requirement by itself: a refused
    upgrade must not take away what a smaller one has.
    """
    if not desk.interactive:
        for outcome in unmet:
            outcome.refusal = AuthorizationRefused(
                f"{outcome.requirement.provider} is not connected, and this run cannot "
                "ask the user."
            )
        return []
    if not unmet:
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


def unmet_of(
    outcomes: Iterable[Outcome], contexts: Iterable[AuthContext | None]
) -> list[Outcome]:
    """Return what is neither met nor refused."""
    return [
        outcome
        for outcome, context in zip(outcomes, contexts, strict=True)
        if context is None and outcome.refusal is None
    ]


def no_checkpointer() -> ConfigurationError:
    """Return what a graph that cannot be resumed is told."""
    return ConfigurationError(
        "this graph has to pause for an authorization and has no checkpointer: compile "
        "it with one, e.g. builder.compile(checkpointer=InMemorySaver()); a child "
        "graph takes its parent's, unless it is compiled with checkpointer=False"
    )


def error_message(tool: str, call_id: str, text: str) -> ToolMessage:
    """Return the result of a call that was not let in."""
    return ToolMessage(
        f"{text} The tool {tool} was not run.",
        name=tool,
        tool_call_id=call_id,
        status="error",
    )


# ------------------------------------------------------------------------ the answers


def take(count: int | None = None) -> list[Any]:
    """
    Take the next answers that this task has: *count* at most, or all.

    For all, only in a task that raises nothing but our own interrupt.
    """
    answers: list[Any] = []
    while count is None or len(answers) < count:
        try:
            answers.append(interrupt({"type": "pocket_auth.probe"}))
        except GraphInterrupt:
            break
    return answers


def name_of(*parts: Any) -> str:
    """Return a short name for *parts*; the same for the same ones."""
    return sha256(repr(parts).encode()).hexdigest()[:32]
