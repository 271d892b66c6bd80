"""One background event loop for all I/O, reachable from sync code and any loop."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from contextvars import Context
from typing import Any, TypeVar

T = TypeVar("T")


class BackgroundLoop:
    """
    A daemon thread with an event loop, started when first used.

    A forked child gets a thread and a loop of its own: `generation` changes, so
    that whoever keeps connections of the old loop can see they are not its own.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self.generation = 0
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._loop = self._thread = None
        self.generation += 1

    def _running(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            with self._lock:
                if self._loop is None:
                    self._start()
        assert self._loop is not None  # noqa: S101 - _start sets it
        return self._loop

    def _start(self) -> None:
        loop, ready = asyncio.new_event_loop(), threading.Event()

        def main() -> None:
            asyncio.set_event_loop(loop)
            loop.call_soon(ready.set)
            loop.run_forever()

        self._thread = threading.Thread(target=main, name="pocket-auth", daemon=True)
        self._thread.start()
        ready.wait()
        self._loop = loop

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        # In a context of its own: what is started here, the callback server above all,
        # outlives the run that needed it first, and must not keep its owner or config.
        submit = asyncio.run_coroutine_threadsafe
        return Context().run(submit, work, self._running())

    @property
    def is_current(self) -> bool:
        """Whether the caller runs in the background thread."""
        return threading.current_thread() is self._thread

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run *work* on the background loop; cancelling the caller cancels it."""
        if self.is_current:
            return await work
        return await asyncio.wrap_future(self._submit(work))

    def run_sync(self, work: Coroutine[Any, Any, T]) -> T:
        """
        Run *work* and block until it is done.

        Raises:
            RuntimeError: Called on the background loop, which would wait for ever.
        """
        if self.is_current:
            work.close()
            raise RuntimeError(
                "a synchronous PocketAuth call inside its own event loop would wait "
                "for itself; await the asynchronous one"
            )
        future = self._submit(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise


LOOP = BackgroundLoop()
