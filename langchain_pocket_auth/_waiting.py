"""Futures while a person is awaited: found by their link, waited for, ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import timedelta
from typing import Any

from ._errors import CallbackRefused, StorageError, StorageUnavailable
from ._models import SessionKey
from ._vault import (
    ATTEMPT_TTL,
    CAS_TRIES,
    HOLD_TTL,
    Attempt,
    Future,
    Pointer,
    Stored,
    Vault,
    digest,
    entry_key,
    ticket_key,
)

LOOK_AGAIN_S = 1.0  # another process may end the future, which wakes nobody here
MAX_ATTEMPTS = 10  # of one future at a time: tabs, retries; a flood pushes out its own


class Waiting:
    """The futures of all owners, and who waits for them in this process."""

    def __init__(
        self, vault: Vault, ended: Callable[[SessionKey, Future, str | None], None]
    ) -> None:
        self._vault, self._ended = vault, ended
        self._events: dict[str, set[asyncio.Event]] = {}
        self._closed = False

    def close(self) -> None:
        """Wake all who wait: what they wait for cannot come here any more."""
        self._closed = True
        for name in self._events:
            self._wake(name)

    async def of(self, attempt: Attempt) -> Stored[Future] | None:
        """Return the future at an attempt's place; perhaps a newer question."""
        return await self._at(attempt.target.session_key())

    async def _at(self, key: SessionKey) -> Stored[Future] | None:
        return await self._vault.get(Future, entry_key(Future, key))

    async def ticket(self, ticket: str) -> tuple[Stored[Future], SessionKey]:
        """
        Return the future of a connect link.

        Raises:
            CallbackRefused: Unknown or expired.
        """
        pointer = await self._vault.get(Pointer, ticket_key(ticket))
        if pointer is None:
            raise CallbackRefused("unknown")
        key = pointer.entry.session_key()
        future = await self._at(key)
        if future is None or future.entry.ticket != ticket:
            # Disconnected, or a newer question took its place.
            raise CallbackRefused("expired")
        if self._vault.now() >= future.entry.expires_at and not future.entry.held:
            raise CallbackRefused("expired")
        return future, key

    async def asked(self, future_id: str) -> Stored[Future] | None:
        """Return the future of that id, or `None`."""
        pointer = await self._vault.get(Pointer, ("ticket", future_id))
        if pointer is None:
            return None
        future = await self._at(pointer.entry.session_key())
        return future if future and future.entry.id == future_id else None

    async def wait(self, future: Stored[Future], timeout_s: float) -> None:
        """Return when *future* has changed, or soon: then look again."""
        event, name = asyncio.Event(), future.entry.id
        self._events.setdefault(name, set()).add(event)
        try:
            # It may have changed before anybody could know of this event.
            current = await self._vault.get(Future, future.key)
            if current is None or current.version != future.version:
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(min(timeout_s, LOOK_AGAIN_S)):
                    await event.wait()
            if self._closed:
                raise StorageUnavailable("this PocketAuth was closed meanwhile")
        finally:
            self._events[name].discard(event)
            if not self._events[name]:
                del self._events[name]

    async def end(
        self,
        attempt: Attempt,
        status: str,
        withheld: Iterable[str] = (),
        account: str | None = None,
    ) -> None:
        """Write down how an attempt of a future ended, and with whose account."""
        left_out, key = sorted(withheld), attempt.target.session_key()
        for _ in range(CAS_TRIES):
            if (stored := await self.of(attempt)) is None:
                return
            old = stored.entry
            marks = {"resolved": old.resolved, "held": old.held}
            update: dict[str, Any] = {
                mark: None for mark, uid in marks.items() if uid == attempt.uid
            }
            if status == "denied":
                # A refusal in one tab does not undo a success in another.
                if old.id == attempt.future_id and old.status == "pending":
                    threads = dict.fromkeys(old.pauses.values(), self._vault.now())
                    update |= {"status": status, "refused": old.refused | threads}
            # Widened since this attempt began: the rest has yet to be asked for.
            elif set(old.scopes) <= set(attempt.scopes) and (
                old.status != "done" or set(left_out) < set(old.withheld)
            ):
                update |= {"status": status, "withheld": left_out}
            if not update:
                self._wake(old.id)
                return
            if ended := await self._replace(stored, update):
                self._wake(old.id)
                if "status" in update:
                    self._ended(key, ended.entry, account)
                return

    async def refuse(self, key: SessionKey, future_id: str, thread: str) -> bool:
        """Write down that a person said no in a thread; `False`: known already."""
        for _ in range(CAS_TRIES):
            stored = await self._at(key)
            if stored is None or stored.entry.id != future_id:
                return False
            refused = {**stored.entry.refused, thread: self._vault.now()}
            if await self._replace(stored, {"refused": refused}):
                return thread not in stored.entry.refused
        return False

    async def resolved(self, attempt: Attempt) -> bool:
        """Mark that *attempt* has an answer which is not exchanged yet."""
        for _ in range(CAS_TRIES):
            if (stored := await self.of(attempt)) is None:
                return False
            status = "done" if stored.entry.status == "done" else "pending"
            update = {"resolved": attempt.uid, "status": status}
            if await self._replace(stored, update):
                self._wake(stored.entry.id)
                return True
        return False

    async def begun(self, future: Stored[Future], attempt: Attempt) -> list[str] | None:
        """
        Note that *attempt* was begun; return those that are too many by it.

        `None`: so many begin at once that this one cannot be noted.

        Args:
            future: As it was read a moment ago.
            attempt: Of that future.
        """
        name, stored = digest(attempt.uid), future
        for _ in range(CAS_TRIES):
            names = [*stored.entry.attempts, name]
            if await self._replace(stored, {"attempts": names[-MAX_ATTEMPTS:]}):
                return names[:-MAX_ATTEMPTS]
            stored = await self.of(attempt) or stored
        return None

    async def holding(self, attempt: Attempt) -> str | None:
        """
        Mark that the grant of *attempt* waits; return what was marked before.

        Raises:
            CallbackRefused: Disconnected meanwhile.
            StorageError: It could not be marked.
        """
        for _ in range(CAS_TRIES):
            if (stored := await self.of(attempt)) is None:
                raise CallbackRefused("expired")
            if await self._replace(stored, {"held": attempt.uid}):
                self._wake(stored.entry.id)
                return stored.entry.held
        raise StorageError("a future could not be saved: too many writers")

    async def unmark(self, key: SessionKey, uid: str, *marks: str) -> None:
        """
        Take marks of an attempt back, by default all: the link works again.

        Args:
            key: Where its future is.
            uid: The attempt's.
            marks: `resolved`, `held`.
        """
        for _ in range(CAS_TRIES):
            stored = await self._at(key)
            if stored is None:
                return
            marked = {"resolved": stored.entry.resolved, "held": stored.entry.held}
            update = {m: None for m in marks or marked if marked[m] == uid}
            if not update:
                return
            if await self._replace(stored, update):
                self._wake(stored.entry.id)
                return

    async def _replace(
        self, stored: Stored[Future], update: dict[str, Any]
    ) -> Stored[Future] | None:
        entry = stored.entry.model_copy(update=update)
        ttl = lifetime(entry.expires_at - self._vault.now())
        return await self._vault.replace(stored, entry, ttl)

    def _wake(self, future_id: str) -> None:
        for event in self._events.get(future_id, ()):
            event.set()


def lifetime(left: timedelta) -> timedelta:
    """How long a future's record lives: attempts of its last moment need it."""
    return max(left, timedelta()) + ATTEMPT_TTL + HOLD_TTL
