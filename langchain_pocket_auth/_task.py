"""The one place that reads what LangGraph keeps about a running task."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

from langchain_core.messages import AIMessage, ToolMessage

# All of these are LangGraph's own names, in use between its packages; the tests in
# tests/test_langgraph_seams.py name each, and run on the lowest and newest versions.
_SCRATCHPAD = "__pregel_scratchpad"
_TASK_ID = "__pregel_task_id"
_READ = "__pregel_read"
_CHECKPOINTER = "__pregel_checkpointer"
_RESUMING = "__pregel_resuming"
_RESUME_MAP = "__pregel_resume_map"
_CALL = "__pregel_call"
_PUSH = ("__pregel_push",)


class _Execution:
    """One execution of a task: its guarded calls are numbered and watched."""

    __slots__ = ("_active", "_lock", "_next")

    def __init__(self) -> None:
        self._next = 0
        self._active: set[GuardedCall] = set()
        self._lock = threading.Lock()

    def enter(self, call: GuardedCall, around: frozenset[GuardedCall]) -> int:
        with self._lock:
            beside = self._active - around
            for other in beside:
                other.alone = False
            call.alone = not beside
            self._active.add(call)
            self._next += 1
            return self._next - 1

    def leave(self, call: GuardedCall) -> None:
        with self._lock:
            self._active.discard(call)


# By the function with which a task takes its answers, which lives as long as the
# task; a retry keeps it and gets a new counter, because it starts from the top.
_executions: WeakKeyDictionary[Callable[..., Any], dict[Any, _Execution]]
_executions = WeakKeyDictionary()
_executions_lock = threading.Lock()


def _execution(scratchpad: Any) -> _Execution:
    with _executions_lock:
        attempts = _executions.setdefault(scratchpad.get_null_resume, {})
        return attempts.setdefault(scratchpad.interrupt_counter, _Execution())


_around: ContextVar[frozenset[GuardedCall]] = ContextVar(
    "pocket_calls", default=frozenset()
)


class GuardedCall:
    """
    A guarded call inside a task of a graph, from its entry to the end of its body.

    Attributes:
        task: The task's id; the same when the task runs again.
        ordinal: The how-manieth guarded call of this execution it is.
        alone: Whether no other guarded call of the task was under way beside it;
            the calls around it do not count.
    """

    def __init__(self, config: Mapping[str, Any], scratchpad: Any) -> None:
        self._config, self._scratchpad = config, scratchpad
        self._execution = _execution(scratchpad)
        self.task: str = config["configurable"][_TASK_ID]
        self.alone = True
        self.ordinal = self._execution.enter(self, _around.get())

    def leave(self) -> None:
        """End the call; more than once does no harm."""
        self._execution.leave(self)

    @contextmanager
    def body(self) -> Iterator[None]:
        """Mark the time in which calls belong to this one's body."""
        token = _around.set(_around.get() | {self})
        try:
            yield
        finally:
            _around.reset(token)

    @property
    def resumed(self) -> bool:
        """Whether this is not the task's first run, so that it may have paused."""
        return (
            bool(self._config["configurable"].get(_RESUMING))
            or bool(self._scratchpad.resume)
            or self._scratchpad.get_null_resume(False) is not None
        )

    def drop_stale_answer(self) -> None:
        """
        Forget an answer by value that an earlier run was given.

        LangGraph keeps it until the task has ended: in a run that is resumed by id,
        or started again without input, it would give it, perhaps the answer to our
        pause, to the next `interrupt()`.
        """
        loop = _loop(self._config)
        without_input = loop is not None and not loop.is_nested and loop.input is None
        if without_input or self._config["configurable"].get(_RESUME_MAP):
            self._scratchpad.get_null_resume(True)

    @property
    def may_pause(self) -> bool:
        """
        Whether the task serves this call alone.

        In a shared task the answer to one call's pause could reach another's,
        even when resumed by id: the order of their `interrupt()`s is a race.
        """
        if not self.alone:
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
    """
    Whether the graph that *config* belongs to can be resumed.

    A child graph with `checkpointer=False` cannot: it starts from its top, with new
    task ids, and nobody could tell our answers from those to other questions.
    """
    if (config.get("configurable") or {}).get(_CHECKPOINTER) is None:
        return False
    loop = _loop(config)
    return loop is None or loop.checkpointer is not None


def _loop(config: Mapping[str, Any]) -> Any:
    """Return the loop that runs the task, where it shows."""
    call = config["configurable"].get(_CALL)
    schedule = getattr(call, "keywords", {}).get("schedule_task")
    return getattr(schedule, "__self__", None)


def open_calls(messages: list[Any]) -> list[dict[str, Any]]:
    """Return the tool calls of the last AIMessage that have no answer yet."""
    for message in reversed(messages):
        if isinstance(message, AIMessage):
            answered = {m.tool_call_id for m in messages if isinstance(m, ToolMessage)}
            return [dict(c) for c in message.tool_calls if c["id"] not in answered]
    return []
