"""What has to be done now and then, whether anybody calls or not: bounded, no scans."""

from __future__ import annotations

import asyncio
import logging
import random
import weakref
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeAlias

from ._errors import StorageUnavailable

logger = logging.getLogger(__name__)

EVERY_S = 60.0
Job: TypeAlias = Callable[[], Awaitable[int]]


class Housekeeping:
    """
    Does some of each job in turns, the first a minute after it was started.

    Every replica does so: the jobs agree by leases and compare-and-swaps.

    Args:
        jobs: What is done, by name; each returns how much was.
    """

    def __init__(self, jobs: Mapping[str, Job]) -> None:
        self._jobs = jobs
        self._one = asyncio.Lock()
        self._timer: asyncio.TimerHandle | None = None
        self._running: asyncio.Task[None] | None = None
        self._away = False

    def start(self) -> None:
        """Do it from now on, on this loop."""
        # Not all replicas at once; and what nobody holds any more is not held by this.
        delay_s = EVERY_S * random.uniform(1.0, 1.25)  # noqa: S311 - jitter
        loop, itself = asyncio.get_running_loop(), weakref.ref(self)
        self._timer = loop.call_later(delay_s, _due, itself)

    async def close(self) -> None:
        """Stop, in the middle of a turn if need be: another goes on."""
        if self._timer is not None:
            self._timer.cancel()
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)

    async def turn(self) -> dict[str, int]:
        """
        Do some of each job now; how much, by its name.

        Raises:
            StorageUnavailable: The store does not answer.
        """
        async with self._one:
            jobs = self._jobs.items()
            return {name: await self._done(name, job) for name, job in jobs}

    @staticmethod
    async def _done(name: str, job: Job) -> int:
        try:
            return await job()
        except StorageUnavailable:
            raise
        except Exception as error:  # noqa: BLE001 - the other jobs go on
            # Not the text: it may be of somebody else.
            logger.warning("housekeeping: %s: %s", name, type(error).__name__)
            return 0

    def _begin(self) -> None:
        self._running = asyncio.ensure_future(self._turn())

    async def _turn(self) -> None:
        try:
            await self.turn()
        except StorageUnavailable as error:
            if not self._away:
                logger.warning("housekeeping waits: %s", error)
            self._away = True
        else:
            self._away = False
        self.start()


def _due(itself: weakref.ref[Housekeeping]) -> None:
    if (housekeeping := itself()) is not None:
        housekeeping._begin()  # noqa: SLF001 - of this module
