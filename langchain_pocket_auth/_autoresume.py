"""Paused runs continued by themselves, once what they wait for is final."""

from __future__ import annotations

import asyncio
import inspect
import logging
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from contextvars import Context
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum, auto
from typing import Any, Protocol, TypeAlias
from weakref import WeakValueDictionary

from langgraph.errors import UnknownInterruptError
from langgraph.types import Command

from ._events import Event, EventType
from ._models import Owner, Resumption
from ._service import Service
from ._task import STRICT_RESUME, AlreadyResumed
from ._vault import Pause

logger = logging.getLogger(__name__)

OnResult: TypeAlias = Callable[[Any, dict[str, Any]], Awaitable[None] | None]
Headers: TypeAlias = Callable[[Owner], Mapping[str, str]]

FIRST_LOOK_S, LAST_LOOK_S = 0.02, 1.0  # between two looks at a run that is busy


class _State(Enum):
    """What a paused run is doing."""

    PENDING = auto()
    BUSY = auto()
    GONE = auto()


class _SupersededError(Exception):
    """Somebody else has continued the run, or newer input came."""


class _BusyError(Exception):
    """Another run of the thread was faster: look again what became of the pause."""


class _CannotError(Exception):
    """It cannot be continued from here; the text says why."""


@dataclass(frozen=True, slots=True)
class Paused:
    """A paused run that nothing keeps waiting any more."""

    pause: Pause
    memory: Resumption | None
    """What is known of it in this process, if it paused here."""

    @property
    def owner(self) -> Owner:
        """Whose connections it waits for."""
        return self.pause.waits_for[0].target.session_key().owner

    @property
    def interrupt_id(self) -> str:
        """What the answer is addressed to."""
        return self.pause.interrupt_ids[-1]

    @property
    def answer(self) -> dict[str, Any]:
        """A wake-up for each question; the store decides."""
        keys = [waited.future_id for waited in self.pause.waits_for]
        responses = {key: {"action": "accept"} for key in keys}
        return {self.interrupt_id: {"responses": responses}}


class Target(Protocol):
    """Where paused runs live."""

    def is_mine(self, paused: Paused) -> bool: ...
    async def look(self, paused: Paused) -> _State: ...
    async def go_on(self, paused: Paused) -> tuple[Any, dict[str, Any]]: ...


class Resumer:
    """Continues each paused run once, however many callbacks end what it waits for."""

    def __init__(
        self,
        service: Service,
        target: Target,
        on_result: OnResult | None,
        loop: asyncio.AbstractEventLoop | None,
        patience: timedelta,
    ) -> None:
        self._service, self._target = service, target
        self._on_result, self._loop, self._patience = on_result, loop, patience
        self._tasks: set[asyncio.Task[None]] = set()
        self._threads: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def __call__(self, name: str) -> None:
        """Look whether the pause *name* is over; on the background loop."""
        task = asyncio.ensure_future(self._settled(name))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _settled(self, name: str) -> None:
        try:
            await self._resume(name)
        except Exception as error:  # noqa: BLE001 - nobody waits for this task
            # Not the text: it may be of an app's own.
            logger.error("a paused run was not resumed: %s", type(error).__name__)  # noqa: TRY400

    async def _resume(self, name: str) -> None:
        pauses = await self._service.call(_pauses)
        pause = await pauses.final(name)
        if pause is None or not (pause.interrupt_ids and pause.thread_id):
            return
        paused = Paused(pause, pauses.remembered(name))
        if not self._target.is_mine(paused):
            return
        claim, holder = f"resume:{paused.interrupt_id}", secrets.token_hex(8)
        if not await pauses.claim(name, claim, holder):
            return  # another callback, or another process, is at it
        reason: str | None = None
        event: EventType = "resumed"
        # Of several pauses of a conversation one after the other.
        lock = self._threads.setdefault(pause.thread_id, asyncio.Lock())
        try:
            async with lock:
                result, config = await self._gone_on(paused)
        except (_SupersededError, AlreadyResumed, UnknownInterruptError):
            event, reason = "superseded", "the conversation went on without it"
        except Exception as error:  # noqa: BLE001 - whatever a graph raises
            await pauses.release(name, claim, holder)
            kind, ours = type(error).__name__, isinstance(error, _CannotError)
            event, reason = "not_resumed", str(error) if ours else f"it ended in {kind}"
            logger.warning("a paused run was not resumed: %s", reason)
        self._tell(paused, event, reason)
        if event == "resumed" and self._on_result is not None:
            await self._hand_over(self._on_result, result, config)

    async def _hand_over(
        self, on_result: OnResult, result: Any, config: dict[str, Any]
    ) -> None:
        async def handed_over() -> None:
            done = on_result(result, config)
            if inspect.isawaitable(done):
                await done

        if inspect.iscoroutinefunction(on_result) and self._loop is not None:
            await _on(self._loop, handed_over())
        else:
            await asyncio.to_thread(asyncio.run, handed_over())

    async def _gone_on(self, paused: Paused) -> tuple[Any, dict[str, Any]]:
        """Wait while siblings of the paused task are still at work, then resume."""
        loop, pause_s = asyncio.get_running_loop(), FIRST_LOOK_S
        end = loop.time() + self._patience.total_seconds()
        while True:
            state = await self._target.look(paused)
            if state is _State.PENDING:
                with suppress(_BusyError):
                    return await self._target.go_on(paused)
            if state is _State.GONE:
                raise _SupersededError
            if loop.time() >= end:
                raise _CannotError("other parts of the run were still busy")
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LAST_LOOK_S)

    def _tell(self, paused: Paused, event: EventType, reason: str | None) -> None:
        for waited in paused.pause.waits_for[:1]:
            key = waited.target.session_key()
            threads = (paused.pause.thread_id or "",)
            self._service.tell(Event.at(key, event, thread_ids=threads, reason=reason))


async def _pauses(engine: Any) -> Any:
    return engine.pauses


async def _on(
    loop: asyncio.AbstractEventLoop | None,
    work: Coroutine[Any, Any, Any],
    context: Context | None = None,
) -> Any:
    """Run *work* on the app's loop, or here where it has none."""
    target = loop or asyncio.get_running_loop()
    try:
        if not target.is_running():
            raise RuntimeError  # noqa: TRY301 - as a closed one does
        inside = (context or Context()).copy()
        future = inside.run(asyncio.run_coroutine_threadsafe, work, target)
    except RuntimeError:
        work.close()
        raise _CannotError(
            "the event loop that auto_resume was called on has ended"
        ) from None
    return await asyncio.wrap_future(future)


# ------------------------------------------------------------------- in this process


class LocalGraph:
    """
    A compiled graph of this process.

    Args:
        graph: The root graph, with its checkpointer.
        owners: Whose sessions the resumed run may use: those of the paused one.
        loop: Where the app runs it; `None`: it is run in a thread.
    """

    def __init__(
        self, graph: Any, owners: Any, loop: asyncio.AbstractEventLoop | None
    ) -> None:
        self._graph, self._owners, self._loop = graph, owners, loop
        self._synchronous = loop is None

    def is_mine(self, paused: Paused) -> bool:
        """Whether it is this graph that paused; after a restart, one like it."""
        if paused.memory is not None:
            return paused.memory.nodes is self._graph.nodes
        return paused.pause.nodes == sorted(self._graph.nodes)

    async def look(self, paused: Paused) -> _State:
        """Read the thread's newest checkpoint."""
        snapshot = await self._read(
            self._graph.aget_state, self._graph.get_state, self._config(paused.pause)
        )
        # Checkpoint ids are in the order of time.
        found = snapshot.config["configurable"].get("checkpoint_id") or ""
        pausing = paused.pause.checkpoint_id or ""
        pending = paused.interrupt_id in {i.id for i in snapshot.interrupts}
        if not pending and found > pausing:
            return _State.GONE
        if not pending and found < pausing:  # with durability="exit" it is yet to come
            return _State.BUSY if paused.memory is not None else _State.GONE
        open_tasks = {
            task.id
            for task in snapshot.tasks
            if not task.interrupts and task.error is None and task.result is None
        }
        if open_tasks:  # or they have ended, and their result is `None`
            saver = self._graph.checkpointer
            saved = await self._read(saver.aget_tuple, saver.get_tuple, snapshot.config)
            open_tasks -= {task for task, *_ in saved.pending_writes or ()}
        if open_tasks:
            return _State.BUSY
        return _State.PENDING if pending else _State.GONE

    async def go_on(self, paused: Paused) -> tuple[Any, dict[str, Any]]:
        """Resume, by id and strictly: what is not pending any more is an error."""
        config = self._config(paused.pause)
        strict = {**config["configurable"], STRICT_RESUME: True}
        command: Command[Any] = Command(resume=paused.answer)
        context = paused.memory.context if paused.memory else None
        arguments = (command, {"configurable": strict})

        def run() -> Any:
            with self._owners.handed_down(paused.owner):
                return self._graph.invoke(*arguments, context=context)

        async def arun() -> Any:
            with self._owners.handed_down(paused.owner):
                return await self._graph.ainvoke(*arguments, context=context)

        if self._synchronous:
            return await asyncio.to_thread(Context().run, run), config
        return await _on(self._loop, arun()), config

    @staticmethod
    def _config(pause: Pause) -> dict[str, Any]:
        return {"configurable": {**pause.configurable, "thread_id": pause.thread_id}}

    async def _read(self, aread: Any, read: Any, config: dict[str, Any]) -> Any:
        if not self._synchronous:
            with suppress(NotImplementedError):  # a saver for threads only
                return await _on(self._loop, aread(config))
            self._synchronous = True
        return await asyncio.to_thread(Context().run, read, config)


# --------------------------------------------------------------- on a LangGraph Server


class Server:
    """
    Threads of a LangGraph Server, through its SDK's client.

    Args:
        client: `langgraph_sdk.get_client(...)`.
        headers: Of requests on behalf of an owner, where the server wants to know who
            asks. Without it, a client of the server's own process acts as the user
            whose run paused, as long as that process lives.
        loop: Where the client is used.
    """

    def __init__(
        self,
        client: Any,
        headers: Headers | None,
        loop: asyncio.AbstractEventLoop | None,
    ) -> None:
        self._client, self._headers, self._loop = client, headers, loop

    def is_mine(self, paused: Paused) -> bool:
        """Whether it is a run of a server."""
        return "assistant_id" in paused.pause.configurable

    async def look(self, paused: Paused) -> _State:
        """Ask for the thread's status, then for what it waits for."""
        found: _State = await self._as_owner(paused, self._look, paused.interrupt_id)
        return found

    async def _look(
        self, pause: Pause, more: dict[str, Any], interrupt_id: str
    ) -> _State:
        thread = await self._client.threads.get(pause.thread_id, **more)
        if thread["status"] == "busy":
            return _State.BUSY
        state = await self._client.threads.get_state(pause.thread_id, **more)
        pending = {interrupt["id"] for interrupt in state.get("interrupts") or ()}
        return _State.PENDING if interrupt_id in pending else _State.GONE

    async def go_on(self, paused: Paused) -> tuple[Any, dict[str, Any]]:
        """Create a run, unless the thread has one; returns what was created."""
        created = await self._as_owner(paused, self._go_on, paused.answer)
        return created, {"configurable": {"thread_id": paused.pause.thread_id}}

    async def _go_on(
        self, pause: Pause, more: dict[str, Any], answer: dict[str, Any]
    ) -> Any:
        known = pause.configurable
        kept = {
            key: value
            for key, value in known.items()
            if key not in _SERVERS_OWN and not key.startswith("langgraph_")
        }
        try:
            return await self._client.runs.create(
                pause.thread_id,
                known.get("assistant_id") or known.get("graph_id"),
                command={"resume": answer},
                config={"configurable": kept},
                multitask_strategy="reject",
                **more,
            )
        except Exception as error:
            if getattr(error, "status_code", None) == 409:  # noqa: PLR2004 - conflict
                raise _BusyError from None
            raise

    async def _as_owner(self, paused: Paused, work: Any, *args: Any) -> Any:
        pause, more, context = paused.pause, {}, None
        if self._headers is not None:
            headers = await asyncio.to_thread(self._headers, paused.owner)
            more = {"headers": dict(headers)}
        elif paused.memory is not None:
            context = paused.memory.user
        elif pause.configurable.get("langgraph_auth_user_id"):
            raise _CannotError(
                "the run did not pause in this process, and headers= does not say how "
                "to ask on behalf of its user"
            )
        return await _on(self._loop, work(pause, more, *args), context)


# The server puts these into every run's `configurable`.
_SERVERS_OWN = {"run_id", "thread_id", "graph_id", "assistant_id"}
