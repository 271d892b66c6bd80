"""What gate and guard share: decisions that a sync and an async driver carry out."""

from __future__ import annotations

from collections.abc import Collection, Coroutine, Generator, Iterable, Mapping
from functools import reduce
from operator import or_
from typing import Any, Protocol, TypeAlias, TypeVar

from langchain_core.messages import ToolMessage
from langgraph.errors import GraphInterrupt
from langgraph.types import interrupt

from ._engine import declined
from ._errors import AuthorizationRequired, ConfigurationError, PocketAuthError
from ._events import Event
from ._models import AuthContext, Consent, Outcome, Owner, Requirement, Resumption, Turn
from ._owner import OwnerSource
from ._resume import codes, declined_keys, payload

INTERACTIVE = "pocket_auth_interactive"
"""Key of `configurable` with which one run overrides `PocketAuth(interactive=)`."""

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
        self, owner: Owner, outcomes: list[Outcome], turn: Turn, *, ask: bool
    ) -> list[AuthContext | None]:
        """Bring outcomes up to date; contexts for those that are met."""

    async def confirm(
        self, owner: Owner, key: str, code: str, task: str | None
    ) -> bool:
        """Take a code from the owner's chat; whether it was right and all is done."""

    async def refuse(self, consent: Consent, turn: Turn) -> None:
        """Write down that the person said no in the chat."""

    def tell(self, event: Event) -> None:
        """Tell the app what happened."""

    async def pauses_of(self, task: str) -> tuple[Mapping[str, int], list[str]]:
        """How often a task's guarded calls have paused, and the interrupts' ids."""

    async def recount(self, task: str, ordinal: int, count: int) -> None:
        """Correct how often a guarded call has paused."""

    async def note_pause(
        self,
        task: str,
        interrupt_id: str,
        consents: Iterable[Consent],
        resumption: Resumption | None,
        counted: tuple[int, int] | None,
    ) -> None:
        """Write down a pause that is about to be raised."""

    async def claim(self, task: str, name: str, holder: str, answers: int) -> None:
        """Be the one that goes on after a pause, or raise `AlreadyResumed`."""

    async def release(self, task: str, name: str, holder: str) -> None:
        """Let another run go on after a pause."""

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


def may_ask(desk: Desk, config: Mapping[str, Any]) -> bool:
    """Whether this run may ask the person: the pocket's setting, or the run's own."""
    wanted = (config.get("configurable") or {}).get(INTERACTIVE)
    if wanted is None:
        return desk.interactive
    if not isinstance(wanted, bool):
        raise ConfigurationError(f"configurable[{INTERACTIVE!r}] is True or False")
    return wanted


def confirm(
    desk: Desk, owner: Owner, answers: list[Any], task: str | None
) -> Steps[set[str]]:
    """Hand over the codes among the answers; return the keys of those that failed."""
    failed = set()
    for key, code in codes(answers).items():
        if not (yield desk.confirm(owner, key, code, task)):
            failed.add(key)
    return failed


def ask(
    desk: Desk,
    owner: Owner,
    unmet: list[Outcome],
    turn: Turn,
    answers: list[Any],
    *,
    interactive: bool,
    wrong_codes: Collection[str] = (),
) -> Steps[list[Outcome]]:
    """
    Make one question per connection; return those to wait for.

    What is refused is written into *unmet*, each requirement by itself: a refused
    upgrade must not take away what a smaller one has.
    """
    if not interactive:
        for outcome in unmet:
            _required(desk, owner, outcome, turn)
        return []
    if not unmet:
        return []
    asked = _merged(unmet)
    yield desk.settle(owner, asked, turn, ask=True)
    refused = declined_keys(answers)
    for question in asked:
        consent = question.consent
        question.wrong_code = consent is not None and consent.key in wrong_codes
        if consent is not None and consent.key in refused:
            question.refusal = declined(consent.display_name)
            yield desk.refuse(consent, turn)
        if question.refusal is not None:
            for outcome in unmet:
                if outcome.requirement.place == question.requirement.place:
                    outcome.refusal = question.refusal
    return [q for q in asked if q.consent is not None and q.refusal is None]


def _required(desk: Desk, owner: Owner, outcome: Outcome, turn: Turn) -> None:
    """Answer what a run that must not ask lacks."""
    need = outcome.requirement
    outcome.refusal = AuthorizationRequired(
        f"{need.provider} is not connected, and this run cannot ask the user.",
        provider=need.provider,
        scopes=need.scopes,
    )
    desk.tell(
        Event(
            type="required",
            owner=owner,
            provider=need.provider,
            profile=need.profile,
            handler=need.handler,
            scopes=need.scopes,
            thread_ids=(turn.thread_id,) if turn.thread_id else (),
        )
    )


def pause(
    desk: Desk,
    asked: list[Outcome],
    task: str,
    resumption: Resumption | None,
    counted: tuple[int, int] | None = None,
) -> Steps[Any]:
    """
    Raise the interrupt for what is asked, after it was written down.

    Written down first: who ends a future must find who waits for it, and the answer
    must find the count. The interrupt has to be made for that: only it has its id.

    Returns:
        The answer, where the task has one that nobody counted.
    """
    try:
        return interrupt(payload(asked))
    except GraphInterrupt as interrupted:
        raised = interrupted
    consents = [o.consent for o in asked if o.consent is not None]
    interrupt_id = raised.args[0][0].id
    yield desk.note_pause(task, interrupt_id, consents, resumption, counted)
    raise raised


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


def error_message(
    tool: str, call_id: str, errors: Iterable[PocketAuthError]
) -> ToolMessage:
    """
    Return the result of a call that was not let in.

    The model reads its text; an app reads the names of the errors in `artifact`.
    """
    known = {str(error): type(error).__name__ for error in errors}
    return ToolMessage(
        f"{' '.join(known)} The tool {tool} was not run.",
        name=tool,
        tool_call_id=call_id,
        status="error",
        artifact={"type": "pocket_auth", "errors": list(dict.fromkeys(known.values()))},
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
