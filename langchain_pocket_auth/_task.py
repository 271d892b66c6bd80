"""The one place that reads what LangGraph keeps about a running task."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from langchain_core.messages import AIMessage, ToolMessage

# All of these are LangGraph's own names, in use between its packages; the tests in
# tests/test_langgraph_seams.py name each, and run on the lowest and newest versions.
_SCRATCHPAD = "__pregel_scratchpad"
_TASK_ID = "__pregel_task_id"
_READ = "__pregel_read"
_CHECKPOINTER = "__pregel_checkpointer"
_PUSH = ("__pregel_push",)

_KEPT = 4096  # executions whose calls are counted; each ends within a superstep


class _Execution:
    """One execution of a task: guarded calls are numbered in it."""

    __slots__ = ("deciding", "lock", "next", "scratchpad")

    def __init__(self, scratchpad: Any) -> None:
        self.scratchpad = scratchpad  # kept, so that its id is not given out again
        self.next = 0
        self.deciding = 0
        self.lock = threading.Lock()


_executions: OrderedDict[int, _Execution] = OrderedDict()
_executions_lock = threading.Lock()


def _execution(scratchpad: Any) -> _Execution:
    with _executions_lock:
        found = _executions.get(id(scratchpad))
        if found is None:
            found = _executions[id(scratchpad)] = _Execution(scratchpad)
            if len(_executions) > _KEPT:
                _executions.popitem(last=False)
        else:
            _executions.move_to_end(id(scratchpad))
    return found


class GuardedCall:
    """
    A guarded call inside a task of a graph.

    Attributes:
        task: The task's id; the same when the task runs again.
        ordinal: The how-manieth guarded call of this execution it is.
    """

    __slots__ = ("_config", "_execution", "ordinal", "task")

    def __init__(self, config: Mapping[str, Any], scratchpad: Any) -> None:
        self._config = config
        self._execution = execution = _execution(scratchpad)
        self.task: str = config["configurable"][_TASK_ID]
        with execution.lock:
            self.ordinal = execution.next
            execution.next += 1
            execution.deciding += 1

    def decided(self) -> None:
        """The call knows what to do; others of the task may pause now."""
        with self._execution.lock:
            self._execution.deciding -= 1

    @property
    def resumed(self) -> bool:
        """Whether the task has an answer that could be ours."""
        scratchpad = self._execution.scratchpad
        return bool(scratchpad.resume) or scratchpad.get_null_resume(False) is not None

    @property
    def has_checkpointer(self) -> bool:
        """Whether a pause could ever be resumed."""
        return self._config["configurable"].get(_CHECKPOINTER) is not None

    @property
    def may_pause(self) -> bool:
        """
        Whether the task serves this call alone.

        In a shared task the answer to one call's pause could reach another's,
        even when resumed by id: the order of their `interrupt()`s is a race.
        """
        if self._execution.deciding > 1:
            return False
        triggers = (self._config.get("metadata") or {}).get("langgraph_triggers")
        return tuple(triggers or ()) == _PUSH or self._open_calls() <= 1

    def _open_calls(self) -> int:
        read = self._config["configurable"].get(_READ)
        if read is None:
            return 2  # cannot tell, so it is not alone
        # `partial(local_read, scratchpad, channels, ...)`: ToolNode reads it so too.
        values = read(list(read.args[1]), True).values()
        return max(
            (len(open_calls(v)) for v in values if isinstance(v, list)), default=0
        )


def guarded_call(config: Mapping[str, Any]) -> GuardedCall | None:
    """Register a guarded call; `None` outside a graph."""
    scratchpad = (config.get("configurable") or {}).get(_SCRATCHPAD)
    return None if scratchpad is None else GuardedCall(config, scratchpad)


def has_checkpointer(config: Mapping[str, Any]) -> bool:
    """Whether the graph that *config* belongs to can be resumed."""
    return (config.get("configurable") or {}).get(_CHECKPOINTER) is not None


def open_calls(messages: list[Any]) -> list[dict[str, Any]]:
    """Return the tool calls of the last AIMessage that have no answer yet."""
    for message in reversed(messages):
        if isinstance(message, AIMessage):
            answered = {m.tool_call_id for m in messages if isinstance(m, ToolMessage)}
            return [dict(c) for c in message.tool_calls if c["id"] not in answered]
    return []
