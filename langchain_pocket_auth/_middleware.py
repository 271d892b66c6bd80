"""The gate as middleware of `create_agent`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Annotated, Any, NotRequired

from langchain.agents.middleware import AgentMiddleware, AgentState
from langchain.agents.middleware.types import (
    ExtendedModelResponse,
    ModelRequest,
    ModelResponse,
    PrivateStateAttr,
    ToolCallRequest,
)
from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.runnables.config import ensure_config
from langchain_core.tools import BaseTool
from langgraph.types import Command

from ._gate import Desk, Gate
from ._models import Requirement
from ._tools import Guard as ToolGuardLike
from ._tools import Needs, guarded_needs, is_guarded, needs_of, wrap_tool

Stored = dict[str, list[dict[str, Any]]]


class PocketAuthState(AgentState[Any]):
    """What the middleware keeps for the time after a restart."""

    pocket_auth_needs: NotRequired[Annotated[Stored, PrivateStateAttr]]


class PocketAuthMiddleware(AgentMiddleware[PocketAuthState, Any]):
    """
    Guards every tool of the agent that is annotated with `InjectedAuth`.

    List it first: `after_model` hooks run last to first, so a call that a human
    rejects is not asked to be authorized.
    """

    state_schema = PocketAuthState

    def __init__(
        self, desk: Desk, guard: ToolGuardLike, tools: Iterable[BaseTool] | None
    ) -> None:
        super().__init__()
        self._desk, self._guard = desk, guard
        self._needs: dict[str, Needs | None] = {}
        self._wrapped: dict[int, tuple[BaseTool, BaseTool]] = {}
        for tool in tools or ():
            self._register(tool)

    # -- which tools there are: told with every model call, kept in private state

    def _register(self, tool: Any) -> None:
        if isinstance(tool, BaseTool):
            needs = guarded_needs(tool) if is_guarded(tool) else needs_of(tool)
            self._needs[tool.name] = needs if needs.requirements else None

    def _remembered(self, request: ModelRequest[Any]) -> Command[Any] | None:
        for tool in request.tools:
            self._register(tool)
        stored = _stored(self._needs)
        if not stored or stored == request.state.get("pocket_auth_needs"):
            return None
        return Command(update={"pocket_auth_needs": stored})

    def wrap_model_call(
        self,
        request: ModelRequest[Any],
        handler: Callable[[ModelRequest[Any]], ModelResponse[Any]],
    ) -> Any:
        """Learn the tools of this call."""
        command = self._remembered(request)
        response = handler(request)
        return _extended(response, command)

    async def awrap_model_call(
        self,
        request: ModelRequest[Any],
        handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]],
    ) -> Any:
        """Learn the tools of this call."""
        command = self._remembered(request)
        response = await handler(request)
        return _extended(response, command)

    # -- the gate

    def _gate(self, state: Any) -> Gate:
        stored: Stored = state.get("pocket_auth_needs") or {}

        def needs(name: str) -> Iterable[Requirement]:
            if name in self._needs:
                known = self._needs[name]
                return known.requirements if known else ()
            return [_requirement(item) for item in stored.get(name, ())]

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

    # -- the tools themselves: unwrapped ones are guarded for the call

    def _guarded(self, request: ToolCallRequest) -> ToolCallRequest:
        tool = request.tool
        if tool is None or is_guarded(tool):
            return request
        known = self._wrapped.get(id(tool))
        if known is None or known[0] is not tool:
            needs = needs_of(tool)
            guarded = (
                wrap_tool(tool, needs, self._guard) if needs.requirements else tool
            )
            known = self._wrapped[id(tool)] = (tool, guarded)
        return request if known[1] is tool else request.override(tool=known[1])

    def wrap_tool_call(
        self,
        request: ToolCallRequest,
        handler: Callable[[ToolCallRequest], ToolMessage | Command[Any]],
    ) -> ToolMessage | Command[Any]:
        """Bring the contexts into the call."""
        return handler(self._guarded(request))

    async def awrap_tool_call(
        self,
        request: ToolCallRequest,
        handler: Callable[[ToolCallRequest], Awaitable[ToolMessage | Command[Any]]],
    ) -> ToolMessage | Command[Any]:
        """Bring the contexts into the call."""
        return await handler(self._guarded(request))


def _extended(
    response: ModelResponse[Any] | AIMessage | ExtendedModelResponse[Any],
    command: Command[Any] | None,
) -> Any:
    if command is None or not isinstance(response, ModelResponse):
        return response
    return ExtendedModelResponse(model_response=response, command=command)


def _stored(needs: dict[str, Needs | None]) -> Stored:
    return {
        name: [
            {
                "provider": r.provider,
                "scopes": list(r.scopes),
                "handler": r.handler,
                "profile": r.profile,
                "required": r.required,
            }
            for r in known.requirements
        ]
        for name, known in sorted(needs.items())
        if known is not None
    }


def _requirement(item: dict[str, Any]) -> Requirement:
    return Requirement(**{**item, "scopes": tuple(item["scopes"])})
