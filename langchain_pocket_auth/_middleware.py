"""The gate as middleware of `create_agent`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any, NotRequired

from langchain.agents.middleware import AgentMiddleware, AgentState
from langchain.agents.middleware.types import (
    ExtendedModelResponse,
    ModelRequest,
    ModelResponse,
    PrivateStateAttr,
    ToolCallRequest,
)
from langchain_core.messages import AIMessage, RemoveMessage, ToolMessage
from langchain_core.runnables.config import ensure_config
from langchain_core.tools import BaseTool
from langgraph.graph.message import REMOVE_ALL_MESSAGES
from langgraph.types import Command

from ._gate import Gate
from ._history import answer_open_calls
from ._models import Requirement
from ._owner import run_info
from ._steps import Desk
from ._tools import Guard, Hold, guarded_needs, is_guarded, needs_of
from ._wrapping import wrap_tool

Requirements = tuple[Requirement, ...]
Stored = dict[str, list[dict[str, Any]]]

_KEPT = 1024  # tools whose annotations are known; an agent may make new ones per call


@dataclass
class _ToolCall(ToolCallRequest):
    """
    A request whose tool is guarded, also one that a middleware behind us names.

    `override` makes a request anew, of the same class.
    """

    guard_of: Callable[[BaseTool], BaseTool] = field(kw_only=True, repr=False)

    def __post_init__(self) -> None:
        if self.tool is not None:
            # Assignment would warn.
            object.__setattr__(self, "tool", self.guard_of(self.tool))


@dataclass(init=False)
class _ModelCall(ModelRequest[Any]):
    """A request that tells of the tools that middlewares behind us put into it."""

    seen: list[Any] = field(default_factory=list)

    def __init__(self, *, seen: list[Any], **settings: Any) -> None:
        super().__init__(**settings)
        object.__setattr__(self, "seen", seen)  # assignment would warn
        seen.extend(self.tools)

    @classmethod
    def of(cls, request: ModelRequest[Any]) -> _ModelCall:
        known = {f.name: getattr(request, f.name) for f in fields(ModelRequest)}
        return cls(seen=[], **known)


class PocketAuthState(AgentState[Any]):
    """What the tools of the last model call need; for the gate after a restart."""

    pocket_auth_needs: NotRequired[Annotated[Stored, PrivateStateAttr]]


class PocketAuthMiddleware(AgentMiddleware[PocketAuthState, Any]):
    """
    Guards every tool of the agent that is annotated with `InjectedAuth`.

    List it first: `after_model` hooks run last to first, so a call that a human
    rejects is not asked to be authorized.
    """

    state_schema = PocketAuthState

    def __init__(
        self, desk: Desk, guard: Guard, tools: Iterable[BaseTool] | None
    ) -> None:
        super().__init__()
        self._desk, self._guard = desk, guard
        self._guarded: OrderedDict[int, tuple[BaseTool, BaseTool]] = OrderedDict()
        self._listed = _needs_by_name(map(self._guard_of, tools or ()))

    def _guard_of(self, tool: BaseTool) -> BaseTool:
        """Return the guarded twin of a tool; itself, if it needs nothing."""
        known = self._guarded.get(id(tool))
        if known is not None and known[0] is tool:
            return known[1]
        twin = tool
        if not is_guarded(tool) and (needs := needs_of(tool)).requirements:
            twin = wrap_tool(tool, needs, self._guard)
        self._guarded[id(tool)] = (tool, twin)
        if len(self._guarded) > _KEPT:
            self._guarded.popitem(last=False)
        return twin

    # -- what there is to check: told with every model call, kept in private state

    def _remembered(self, request: _ModelCall) -> Command[Any] | None:
        # Of several with one name the last one counts: it took the others' place.
        tools = {t.name: t for t in request.seen if isinstance(t, BaseTool)}
        listed = {n: r for n, r in self._listed.items() if n not in tools}
        needs = listed | _needs_by_name(map(self._guard_of, tools.values()))
        stored = {name: list(map(_stored, needs[name])) for name in sorted(needs)}
        if stored == (request.state.get("pocket_auth_needs") or {}):
            return None
        return Command(update={"pocket_auth_needs": stored})

    def wrap_model_call(
        self,
        request: ModelRequest[Any],
        handler: Callable[[ModelRequest[Any]], ModelResponse[Any]],
    ) -> Any:
        """Learn the tools of this call."""
        call = _ModelCall.of(request)
        response = handler(call)
        return _extended(response, self._remembered(call))

    async def awrap_model_call(
        self,
        request: ModelRequest[Any],
        handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]],
    ) -> Any:
        """Learn the tools of this call."""
        call = _ModelCall.of(request)
        response = await handler(call)
        return _extended(response, self._remembered(call))

    # -- what was typed during a pause

    def before_agent(self, state: Any, runtime: Any) -> dict[str, Any] | None:
        """Answer calls that were waiting when the user wrote something instead."""
        del runtime
        messages = state["messages"]
        complete = answer_open_calls(messages)
        if len(complete) == len(messages):
            return None
        return {"messages": [RemoveMessage(id=REMOVE_ALL_MESSAGES), *complete]}

    # -- the gate

    def _gate(self, state: Any) -> Gate:
        # The state's is what the model of this very turn was given.
        stored: Stored | None = state.get("pocket_auth_needs")

        def needs(name: str) -> Iterable[Requirement]:
            if stored is None:
                return self._listed.get(name, ())
            return map(_restored, stored.get(name, ()))

        return Gate(self._desk, needs)

    def after_model(self, state: Any, runtime: Any) -> dict[str, Any] | None:
        """Pause once for all that the turn's calls need."""
        del runtime
        errors = self._gate(state).check(state["messages"], ensure_config())
        return {"messages": errors} if errors else None

    async def aafter_model(self, state: Any, runtime: Any) -> dict[str, Any] | None:
        """Pause once for all that the turn's calls need."""
        del runtime
        errors = await self._gate(state).acheck(state["messages"], ensure_config())
        return {"messages": errors} if errors else None

    # -- the tools themselves

    def _with_guard(self, request: ToolCallRequest) -> ToolCallRequest:
        return _ToolCall(
            tool_call=request.tool_call,
            tool=request.tool,
            state=request.state,
            runtime=request.runtime,
            guard_of=self._guard_of,
        )

    def wrap_tool_call(
        self,
        request: ToolCallRequest,
        handler: Callable[[ToolCallRequest], ToolMessage | Command[Any]],
    ) -> ToolMessage | Command[Any]:
        """Bring the contexts into the call, and the owner into runs inside it."""
        request = self._with_guard(request)
        with self._desk.owners.handed_down(run_info(ensure_config())):
            hold = self._hold(request)
            if hold is None:
                return handler(request)
            with hold:
                return handler(request)

    async def awrap_tool_call(
        self,
        request: ToolCallRequest,
        handler: Callable[[ToolCallRequest], Awaitable[ToolMessage | Command[Any]]],
    ) -> ToolMessage | Command[Any]:
        """Bring the contexts into the call, and the owner into runs inside it."""
        request = self._with_guard(request)
        with self._desk.owners.handed_down(run_info(ensure_config())):
            hold = self._hold(request)
            if hold is None:
                return await handler(request)
            async with hold:
                return await handler(request)

    def _hold(self, request: ToolCallRequest) -> Hold | None:
        if request.tool is not None and is_guarded(request.tool):
            return None  # its guard does it
        return Hold.of(self._desk, ensure_config(), request.tool_call["id"])


def _extended(
    response: ModelResponse[Any] | AIMessage | ExtendedModelResponse[Any],
    command: Command[Any] | None,
) -> Any:
    if command is None or not isinstance(response, ModelResponse):
        return response
    return ExtendedModelResponse(model_response=response, command=command)


def _needs_by_name(tools: Iterable[BaseTool]) -> dict[str, Requirements]:
    return {t.name: guarded_needs(t).requirements for t in tools if is_guarded(t)}


def _stored(requirement: Requirement) -> dict[str, Any]:
    return {**asdict(requirement), "scopes": list(requirement.scopes)}


def _restored(item: dict[str, Any]) -> Requirement:
    return Requirement(**{**item, "scopes": tuple(item["scopes"])})
