"""The one place that reads what LangGraph keeps about a running task."""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass
from hashlib import sha256
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from langchain_core.messages import AIMessage, ToolMessage
from langgraph.errors import GraphBubbleUp
from langgraph.types import _interrupt_id

from ._errors import ConfigurationError, PocketAuthError
from ._models import Resumption

# All of these are LangGraph's own names, in use between its packages; the tests in
# tests/test_langgraph_seams.py name each, and run on the lowest and newest versions.
_SCRATCHPAD = "__pregel_scratchpad"
_TASK_ID = "__pregel_task_id"
_READ = "__pregel_read"
_CHECKPOINTER = "__pregel_checkpointer"
_RESUMING = "__pregel_resuming"
_RESUME_MAP = "__pregel_resume_map"
_CALL = "__pregel_call"
_RUNTIME = "__pregel_runtime"
_TRIGGERS = "langgraph_triggers"
_PUSH = ("__pregel_push",)
_CHECKPOINT_MAP = "checkpoint_map"
_ERROR, _INTERRUPT = "__error__", "__interrupt__"
STRICT_RESUME = "__pregel_strict_resume"
# What `configurable` says of one run, and is not handed to the next.
_OF_THE_RUN = {"thread_id", "checkpoint_id", "checkpoint_ns", _CHECKPOINT_MAP}


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
_cleaned: WeakSet[Callable[..., Any]] = WeakSet()
"""Task runs whose answers were looked through; retries share what is left."""


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

    def drop_stale_answers(self, ours: Collection[str]) -> None:
        """
        Forget answers that are not to what the task asks next.

        One by value that an earlier run was given: LangGraph keeps it until the task
        has ended, and would give it, in a run that is resumed by id or started again
        without input, to the next `interrupt()`. And one by id that comes a second
        time: LangGraph gives what is addressed to a task's first interrupt to any
        later one, too. Where the first was *ours*, that must approve nothing.
        """
        by_id = self._config["configurable"].get(_RESUME_MAP)
        loop = _loop(self._config)
        without_input = loop is not None and not loop.is_nested and loop.input is None
        if without_input or by_id:
            self._scratchpad.get_null_resume(True)
        if by_id and self._scratchpad.get_null_resume not in _cleaned:
            _cleaned.add(self._scratchpad.get_null_resume)
            namespace = self._config["configurable"]["checkpoint_ns"]
            answers = self._scratchpad.resume
            last = _interrupt_id(namespace, len(answers) - 1)
            if len(answers) > 1 and last not in by_id:
                first = _interrupt_id(namespace, 0)
                if first in by_id and first in ours:
                    answers.pop()

    @property
    def may_pause(self) -> bool:
        """
        Whether the task serves this call alone.

        In a shared task the answer to one call's pause could reach another's,
        even when resumed by id: the order of their `interrupt()`s is a race.
        """
        if not self.alone:
            return False
        triggers = (self._config.get("metadata") or {}).get(_TRIGGERS)
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


def detached(config: Mapping[str, Any]) -> bool:
    """
    Whether the run was started inside another graph's run and is no part of it.

    LangGraph takes a graph that is started with a thread id for a run of its own: its
    pause goes to the code that started it, and the graph around would go on as if
    nothing were missing.
    """
    root = _root(config)
    # What a task starts inherits the task's metadata. From a RemoteGraph they arrive
    # as lists, and there the pause does come back.
    metadata = (root.config.get("metadata") if root else None) or {}
    return isinstance(metadata.get(_TRIGGERS), tuple)


def pause_would_be_lost() -> ConfigurationError:
    """Return what a detached run is told."""
    return ConfigurationError(
        "this graph has to pause for an authorization, and was started inside another "
        "graph's run as a run of its own, so the graph around would never learn of the "
        "pause: start it without a thread_id, e.g. child.invoke(input), or with the "
        "config of the code that starts it; or let it go on without asking, by "
        '{"configurable": {"pocket_auth_interactive": False}}'
    )


def root_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what the outermost graph of the run was started with."""
    root = _root(config)
    found: Mapping[str, Any] = config if root is None else root.config
    return found


def runtime_of(config: Mapping[str, Any]) -> Any:
    """Return the run-time object of the graph that *config* belongs to."""
    return (config.get("configurable") or {}).get(_RUNTIME)


def _root(config: Mapping[str, Any]) -> Any:
    """Return the loop of the outermost graph of the run, where it shows."""
    loop = _loop(config)
    while loop is not None and loop.is_nested:
        loop = _loop(loop.config)
    return loop


def _loop(config: Mapping[str, Any]) -> Any:
    """Return the loop that runs the task, where it shows."""
    call = (config.get("configurable") or {}).get(_CALL)
    schedule = getattr(call, "keywords", {}).get("schedule_task")
    return getattr(schedule, "__self__", None)


class AlreadyResumed(PocketAuthError, GraphBubbleUp):  # noqa: N818
    """
    Another run continues this pause already, so this one ends here.

    Nothing was lost and no tool has run twice: read the thread's state instead. Like a
    pause it passes through whatever handles the errors of tools.
    """


@dataclass(frozen=True, slots=True)
class TaskRun:
    """
    One run of a task.

    Attributes:
        id: The task's id; the same when the task runs again.
        holder: Names this run of it, retries included, and no other.
        answers: How many answers the task has read, now or before.
    """

    id: str
    holder: str
    answers: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> TaskRun:
        """Return the run of a task that *config* belongs to."""
        configurable = config["configurable"]
        scratchpad = configurable[_SCRATCHPAD]
        null_resume = scratchpad.get_null_resume
        with _executions_lock:
            holder = _holders.setdefault(null_resume, secrets.token_hex(8))
        task_id, loop = configurable[_TASK_ID], _loop(config)
        # Who held it failed, after the tool had ended: the next may go on at once.
        failed = loop is not None and any(
            task == task_id and channel == _ERROR
            for task, channel, _ in loop.checkpoint_pending_writes
        )
        return cls(task_id, holder, len(scratchpad.resume) + failed)


def place_of(config: Mapping[str, Any], call_id: str | None, ordinal: int) -> str:
    """
    Name the place of a tool call; the same for all runs that could be at it.

    A run that has come here past the gate has made a checkpoint of its own, and with
    it a task of its own: what they share is the checkpoint before.
    """
    loop = _loop(config)
    before = getattr(loop, "prev_checkpoint_config", None) or {"configurable": {}}
    anchor = before["configurable"].get("checkpoint_id")
    path = (config.get("metadata") or {}).get("langgraph_path")
    return name_of(anchor or config["configurable"][_TASK_ID], path, call_id, ordinal)


def name_of(*parts: Any) -> str:
    """Return a short name for *parts*; the same for the same ones."""
    return sha256(repr(parts).encode()).hexdigest()[:32]


def just_resumed(config: Mapping[str, Any]) -> bool:
    """
    Whether the run was resumed, and has not gone far since.

    As far as another that was resumed as well could be at the same task.
    """
    loop, root = _loop(config), _root(config)
    if loop is None or root is None:
        return loop is not None
    if root.input is not None and getattr(root.input, "resume", None) is None:
        return False  # it has input of its own
    first = loop.stop - loop.config["recursion_limit"] - 1
    # The gate, perhaps something behind it, the tools; the next turn's come later.
    near: bool = loop.step - first <= 2  # noqa: PLR2004
    return near


_holders: WeakKeyDictionary[Callable[..., Any], str] = WeakKeyDictionary()


def answers_beside(config: Mapping[str, Any]) -> list[Any]:
    """Return what the run was told in answer to pauses of this graph's tasks."""
    configurable, loop = config.get("configurable") or {}, _loop(config)
    if loop is None or not configurable.get(_RESUMING):
        return []  # of an earlier step of the run
    asked = {
        interrupt.id
        for _, channel, value in loop.checkpoint_pending_writes
        if channel == _INTERRUPT
        for interrupt in value
    }
    named = configurable.get(_RESUME_MAP) or {}
    return [answer for id_, answer in named.items() if id_ in asked]


def thread_of(config: Mapping[str, Any]) -> str | None:
    """Return the id of the conversation."""
    thread_id = (root_config(config).get("configurable") or {}).get("thread_id")
    return None if thread_id is None else str(thread_id)


def resumption(config: Mapping[str, Any]) -> Resumption | None:
    """Return how the run that *config* belongs to can be continued from outside."""
    thread_id, root = thread_of(config), root_config(config)
    if thread_id is None:
        return None
    kept = {
        key: value
        for key, value in root["configurable"].items()
        if not key.startswith("__") and key not in _OF_THE_RUN and _is_json(value)
    }
    checkpoints = config["configurable"].get(_CHECKPOINT_MAP) or {}
    runtime = runtime_of(root) or runtime_of(config)
    return Resumption(
        thread_id,
        checkpoints.get(""),
        kept,
        getattr(_root(config), "nodes", {}),
        getattr(runtime, "context", None),
        _server_user() if "assistant_id" in kept else None,
    )


def _server_user() -> Context:
    """Return a context that holds nothing but who asks a LangGraph Server."""
    from langgraph_sdk.auth.types import BaseAuthContext

    kept = Context()
    for variable, value in copy_context().items():
        if isinstance(value, BaseAuthContext):
            kept.run(variable.set, value)
    return kept


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def open_calls(messages: list[Any]) -> list[dict[str, Any]]:
    """Return the tool calls of the last AIMessage that have no answer yet."""
    # Only what stands behind it answers them: some models count calls anew each turn.
    answered: set[str] = set()
    for message in reversed(messages):
        if isinstance(message, ToolMessage):
            answered.add(message.tool_call_id)
        if isinstance(message, AIMessage):
            return [dict(c) for c in message.tool_calls if c["id"] not in answered]
    return []
