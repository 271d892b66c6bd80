"""The guard in front of each tool: lets a call in, pauses alone, or answers it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self, TypeAlias

from langchain_core.messages import ToolMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import BaseTool

from ._errors import (
    AuthorizationRefused,
    AuthorizationRequired,
    GateRequired,
    ProviderError,
    ScopeWithheld,
)
from ._models import AuthContext, Outcome, Owner, Requirement, Turn
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
    GuardedCall,
    answers_beside,
    detached,
    guarded_call,
    has_checkpointer,
    name_of,
    pause_would_be_lost,
    resumption,
    thread_of,
)
from ._tools import Entry, Hold, Needs

Contexts: TypeAlias = dict[Requirement, AuthContext | None]

# What a model can be told about; everything else ends the run.
_TOLD = (AuthorizationRefused, AuthorizationRequired, ScopeWithheld, ProviderError)


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

    def __deepcopy__(self, memo: object) -> Self:
        return self  # tools are copied, the service behind them is not

    def enter(
        self, tool: BaseTool, needs: Needs, config: RunnableConfig, call_id: str | None
    ) -> Entry | ToolMessage:
        """Let a call in, or answer it; synchronous."""
        with _under_way(config) as call:
            owner = self._desk.owners.resolve(config)
            visit = _Visit(self._desk, owner, tool.name, config, call, call_id)
            return drive(self._desk, visit.steps(needs.requirements))

    async def aenter(
        self, tool: BaseTool, needs: Needs, config: RunnableConfig, call_id: str | None
    ) -> Entry | ToolMessage:
        """Let a call in, or answer it."""
        with _under_way(config) as call:
            owner = await self._desk.owners.aresolve(config)
            visit = _Visit(self._desk, owner, tool.name, config, call, call_id)
            return await adrive(self._desk, visit.steps(needs.requirements))


@contextmanager
def _under_way(config: RunnableConfig) -> Iterator[GuardedCall | None]:
    """Register a call of a task; who lets it in ends it."""
    call = guarded_call(config)
    try:
        yield call
    except BaseException:
        if call is not None:
            call.leave()
        raise


@dataclass(slots=True)
class _Visit:
    """One call at the guard."""

    desk: Desk
    owner: Owner
    tool: str
    config: RunnableConfig
    call: GuardedCall | None
    call_id: str | None
    answers: list[Any] = field(default_factory=list)

    def steps(
        self, requirements: tuple[Requirement, ...]
    ) -> Steps[Entry | ToolMessage]:
        known: Contexts = {}
        if self.call is not None and self.call.resumed:
            yield from self._replay(self.call)
        for requirement in requirements:
            known[requirement] = self.desk.peek(self.owner, requirement)
        while None in known.values():
            try:
                asked = yield from self._decide(known)
            except _TOLD as error:
                if self.call_id is None:
                    raise
                if self.call is not None:
                    self.call.leave()
                return error_message(self.tool, self.call_id, [error])
            if not asked:
                break
            if self.call is None:
                raise _required(asked)
            answer = yield from pause(
                self.desk,
                asked,
                self.call.task,
                resumption(self.config),
                (self.call.ordinal, len(self.answers) + 1),
            )
            self.answers.append(answer)
        hold = None
        if self.call is not None:
            # Of several runs that were resumed at once, one goes on.
            hold = Hold.of(
                self.desk,
                self.config,
                self.call_id,
                ordinal=self.call.ordinal,
                last=self.call_id is not None and self.call.alone,
            )
        return Entry(self.desk.owners, self.owner, known, self.call, hold)

    def _replay(self, call: GuardedCall) -> Steps[None]:
        """Take the answers to the pauses that this call made before."""
        counts: Mapping[str, int]
        counts, ours = yield self.desk.pauses_of(call.task)
        call.drop_stale_answers(ours)
        count = counts.get(str(call.ordinal), 0)
        self.answers = take(count)
        if len(self.answers) < count:
            # Counted, but not answered: perhaps it never reached the checkpoint.
            yield self.desk.recount(call.task, call.ordinal, len(self.answers))

    def _decide(self, known: Contexts) -> Steps[list[Outcome]]:
        """Fill in *known*; return what to wait for."""
        call_ids = [self.call_id] if self.call_id else []
        outcomes = [
            Outcome(requirement, tools=[self.tool], tool_call_ids=list(call_ids))
            for requirement, context in known.items()
            if context is None
        ]
        turn = self._turn()
        # A refusal holds for all calls of the turn, each of which is a task.
        answers = [*answers_beside(self.config), *self.answers]
        task = self.call.task if self.call else None
        wrong = yield from confirm(self.desk, self.owner, answers, task)
        contexts = yield self.desk.settle(self.owner, outcomes, turn, ask=False)
        for outcome, context in zip(outcomes, contexts, strict=True):
            known[outcome.requirement] = context
        unmet = [o for o in unmet_of(outcomes, contexts) if o.requirement.required]
        interactive = may_ask(self.desk, self.config)
        if unmet and interactive:
            self._may_pause(unmet)
        asked = yield from ask(
            self.desk,
            self.owner,
            unmet,
            turn,
            answers,
            interactive=interactive,
            wrong_codes=wrong,
        )
        for outcome in outcomes:
            if outcome.refusal is not None and outcome.requirement.required:
                raise outcome.refusal
        return asked

    def _turn(self) -> Turn:
        thread = thread_of(self.config)
        if self.call is not None:
            name = name_of(self.call.task, self.call.ordinal)
            return Turn(name, thread, self.call.task)
        return Turn(name_of(self.tool, self.call_id), thread)

    def _may_pause(self, unmet: list[Outcome]) -> None:
        if self.call is None:
            return
        if detached(self.config):
            raise pause_would_be_lost()
        if not has_checkpointer(self.config):
            raise no_checkpointer()
        if not self.call.may_pause:
            providers = ", ".join(o.requirement.provider for o in unmet)
            raise GateRequired(
                f"{self.tool}: {providers} is not connected, and this task serves "
                "several tool calls: a pause here could hand its answer to another of "
                "them. Build the tools with pocket.add_tool_node(builder, tools) or "
                "use pocket.middleware()"
            )


def _required(asked: list[Outcome]) -> AuthorizationRequired:
    consent = asked[0].consent
    assert consent is not None  # noqa: S101 - `ask` returns only such
    return AuthorizationRequired(
        f"{consent.display_name} is not connected; the link for the person is in "
        "the `url` of this exception",
        provider=consent.provider,
        scopes=consent.scopes,
        url=consent.url,
    )
