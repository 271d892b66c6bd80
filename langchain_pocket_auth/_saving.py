"""Renewed sessions on their way into the store, and the lease of who renews."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from ._errors import ConfigurationError, StorageError, StorageUnavailable
from ._events import Event, Tell
from ._models import AuthContext, SessionKey
from ._outbox import Outbox
from ._vault import Session, Stored, Vault
from .handlers import AuthHandlerInterface

logger = logging.getLogger(__name__)

LEASE = timedelta(seconds=30)  # longer than a request with its one repetition
SAVE_LIMIT_S = 5.0  # how long callers wait for a store that is away
SAVE_EVERY_S = 1.0  # after that, in the background
SAVE_FOR_S = 600.0  # then the grant is as good as lost
CLOSE_LIMIT_S = 5.0  # most token requests take less than one
# A store that lets nobody in any more is repaired, too, and this token is spent.
_AWAY = (StorageUnavailable, ConfigurationError)


class Lease:
    """
    How much of a lease is left, as the process sees it.

    By two clocks, as a process or its machine may have stood still: one of them does
    not see it. From before it was asked for, so that it is over here first.
    """

    def __init__(self, now: Callable[[], datetime]) -> None:
        self.holder = secrets.token_hex(8)
        self._now, self._began, self._tick = now, now(), time.monotonic()

    def outlasts(self, duration: timedelta) -> bool:
        """Whether it is still there when something that takes so long is over."""
        passed = timedelta(seconds=time.monotonic() - self._tick)
        return max(passed, self._now() - self._began) + duration < LEASE


@dataclass(frozen=True, slots=True, repr=False)
class Renewed:
    """A renewed session, before it is known to be saved."""

    key: SessionKey
    handler: AuthHandlerInterface
    old: Stored[Session]
    session: Session
    context: AuthContext
    lease: Lease

    @property
    def new(self) -> Stored[Session]:
        """What is stored then."""
        return Stored(self.old.key, self.old.version + 1, self.session)


class Saving:
    """
    Saves renewed sessions: the refresh tokens that are stored are spent.

    While the store is away they are held in memory, for ten minutes at most.
    """

    def __init__(self, vault: Vault, outbox: Outbox, tell: Tell) -> None:
        self._vault, self._outbox, self._tell = vault, outbox, tell
        self._held: dict[SessionKey, Renewed] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = asyncio.Event()

    async def close(self) -> None:
        """Try once more to save what is held."""
        self._closing.set()
        await finished(self._tasks)

    def held(self, key: SessionKey, stored: Stored[Session]) -> Stored[Session] | None:
        """Return what is to take the place of *stored*, if it is still held."""
        renewed = self._held.get(key)
        same = renewed is not None and renewed.old.version == stored.version
        return renewed.new if renewed and same else None

    async def save(self, renewed: Renewed) -> Stored[Session] | None:
        """
        Save it; return what is stored then, or in the end will be.

        A record that has changed meanwhile counts more. `None`: it is gone, and the
        new grant is given back.
        """
        try:
            async with asyncio.timeout(SAVE_LIMIT_S):
                current = await self._soon(renewed)
        except TimeoutError:
            self._held[renewed.key] = renewed
            task = asyncio.ensure_future(self._save_later(renewed))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            return renewed.new
        if current is None:
            await self._give_back(renewed)
        return current

    async def _soon(self, renewed: Renewed) -> Stored[Session] | None:
        for pause_s in (0.1, 0.3, 1.0, 3.0):
            try:
                return await self._saved(renewed)
            except _AWAY:
                logger.critical("a refreshed token is not saved yet; retrying")
                await asyncio.sleep(pause_s)
        raise TimeoutError

    async def _saved(self, renewed: Renewed) -> Stored[Session] | None:
        key, scopes = renewed.key, tuple(renewed.session.scopes)
        current = await self._vault.replace(renewed.old, renewed.session)
        saved = current is not None
        if current is None:
            current = await self._vault.get(Session, renewed.old.key)
            # The store's answer was lost, not what it was told.
            saved = current is not None and current.entry == renewed.session
        if saved:
            account = renewed.session.account
            self._tell(Event.at(key, "refreshed", scopes=scopes, account=account))
        return current

    async def _give_back(self, renewed: Renewed) -> None:
        # Disconnected meanwhile: it does not come back, the new grant is returned. Not
        # within the time that saving has: that would be over, and this begun twice.
        key, scopes = renewed.key, renewed.session.scopes
        handler, context = renewed.handler, renewed.context
        await self._outbox.give_back(key, handler, scopes, context, spare=True)

    async def _save_later(self, renewed: Renewed) -> None:
        now = asyncio.get_running_loop().time
        end = now() + SAVE_FOR_S
        try:
            while True:
                with suppress(TimeoutError):
                    async with asyncio.timeout(SAVE_EVERY_S):
                        await self._closing.wait()
                last = self._closing.is_set() or now() > end
                try:
                    # So that nobody sends the refresh token that is still stored.
                    holder = renewed.lease.holder
                    await self._vault.lease(renewed.old, holder, LEASE)
                    current = await self._saved(renewed)
                except _AWAY:
                    if last:
                        raise
                else:
                    break
            if current is None:
                await self._give_back(renewed)
        except (StorageError, ConfigurationError) as error:
            logger.critical("a refreshed token is lost: %s", error)
        finally:
            del self._held[renewed.key]

    async def free(
        self, stored: Stored[Session], lease: Lease, key: SessionKey
    ) -> None:
        """End a lease, unless it is still needed."""
        if self.held(key, stored) is None:
            with suppress(*_AWAY):  # it ends by itself
                await self._vault.free(stored, lease.holder)


async def finished(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Wait a little for what runs, then cancel it."""
    running = list(tasks)
    if running:
        await asyncio.wait(running, timeout=CLOSE_LIMIT_S)
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
