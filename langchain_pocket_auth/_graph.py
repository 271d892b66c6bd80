"""The gate in hand-built graphs: as a node, and as tasks of the functional API."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from langchain_core.messages import ToolMessage
from langchain_core.runnables import RunnableConfig, RunnableLambda
from langchain_core.runnables.config import ensure_config
from langgraph.func import task
from langgraph.types import Command, Send

from ._errors import ConfigurationError
from ._gate import Gate
from ._owner import run_info
from ._steps import Desk
from ._task import open_calls
from ._tools import Hold, is_guarded

if TYPE_CHECKING:
    from langgraph.pregel._call import SyncAsyncFuture


class GateNode:
    """Checks a turn, then sends each call that may run to the tools' node."""

    def __init__(
        self,
        gate: Gate,
        builder: Any,
        *,
        name: str,
        tools: str,
        then: str,
        messages_key: str,
    ) -> None:
        self._gate, self._builder, self._name = gate, builder, name
        self._tools, self._then, self._messages_key = tools, then, messages_key

    def runnable(self) -> RunnableLambda[Any, Any]:
        """Return the node, synchronous and asynchronous."""
        return RunnableLambda(self._check, self._acheck, name=self._name)

    def _check(self, state: Any, config: RunnableConfig) -> Command[Any]:
        return self._route(state, self._gate.check(self._messages(state), config))

    async def _acheck(self, state: Any, config: RunnableConfig) -> Command[Any]:
        errors = await self._gate.acheck(self._messages(state), config)
        return self._route(state, errors)

    def _messages(self, state: Any) -> list[Any]:
        if (self._name, self._then) in self._builder.edges:
            raise ConfigurationError(
                f"remove add_edge({self._name!r}, {self._then!r}): add_tool_node made "
                "the edges behind the gate, and this one does not wait for the tools"
            )
        if isinstance(state, Mapping):
            return list(state[self._messages_key])
        return list(getattr(state, self._messages_key))

    def _route(self, state: Any, errors: list[ToolMessage]) -> Command[Any]:
        calls = open_calls([*self._messages(state), *errors])
        sends = [Send(self._tools, _call_with_state(call, state)) for call in calls]
        return Command(
            update={self._messages_key: errors} if errors else None,
            goto=sends or self._then,
        )


class GateTasks:
    """
    The gate for the functional API: two tasks, one to call and one to await.

    Both take the messages up to the model's answer, pause once for all that its tool
    calls need, and return an error result for each call that must not be run.
    """

    check: Callable[[list[Any]], SyncAsyncFuture[list[ToolMessage]]]
    acheck: Callable[[list[Any]], SyncAsyncFuture[list[ToolMessage]]]

    def __init__(self, gate: Gate) -> None:
        def authorize(messages: list[Any]) -> list[ToolMessage]:
            return gate.check(messages, ensure_config())

        async def aauthorize(messages: list[Any]) -> list[ToolMessage]:
            return await gate.acheck(messages, ensure_config())

        # Tasks of their own: a gate takes all answers that its task is given.
        self.check, self.acheck = task(authorize), task(aauthorize)


def guard_others(tool_node_kwargs: dict[str, Any], desk: Desk) -> None:
    """
    Look after tools that need no authorization.

    Runs that they start act for their own run's owner, and of several runs that were
    resumed at once, one runs them.
    """
    around = tool_node_kwargs.get("wrap_tool_call")
    a_around = tool_node_kwargs.get("awrap_tool_call")

    def hold_of(request: Any) -> Any:
        if request.tool is not None and is_guarded(request.tool):
            return None  # its guard does it
        return Hold.of(desk, ensure_config(), request.tool_call["id"])

    def run(request: Any, handler: Any) -> Any:
        with (
            desk.owners.handed_down(run_info(ensure_config())),
            hold_of(request) or nullcontext(),
        ):
            return around(request, handler) if around else handler(request)

    async def arun(request: Any, handler: Any) -> Any:
        with desk.owners.handed_down(run_info(ensure_config())):
            async with hold_of(request) or nullcontext():
                if a_around:
                    return await a_around(request, handler)
                return await handler(request)

    tool_node_kwargs |= {"wrap_tool_call": run}
    if a_around or not around:  # ToolNode takes a lone synchronous one for both
        tool_node_kwargs |= {"awrap_tool_call": arun}


def _call_with_state(call: Mapping[str, Any], state: Any) -> dict[str, Any]:
    # ToolNode's `ToolCallWithContext`: with it, InjectedState keeps the state's type.
    return {
        "__type": "tool_call_with_context",
        "tool_call": {**call, "type": "tool_call"},
        "state": state,
    }
