"""When sessions were used last, and which have not been for too long."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from datetime import date, timedelta

from ._errors import CredentialUnreadable
from ._models import SessionKey
from ._vault import (
    CAS_TRIES,
    Idle,
    Session,
    Stored,
    Used,
    Vault,
    entry_key,
    used_key,
)

MAX_MARKED = 100_000  # sessions whose use is still to be written down
MAX_KNOWN = 10_000  # sessions of which this process knows that it is
# Two years: nobody asks after it any more; and what is missed at a delete goes too.
USED_KEPT = timedelta(days=730)
# A year: a shorter time in the settings finds what longer ones left behind, and so
# does an app that was off.
LOOK_BACK = timedelta(days=366)
DAY = timedelta(days=1)


class Usage:
    """
    Writes the day of the last use down, once a day at most and never in a call's way.

    Not into the session, whose renewal would lose its compare-and-swap by it. What is
    marked is written with the next turn of housekeeping, and when the app is closed;
    what a process that dies has marked is lost, and marked again at the next use.

    Sessions that are not used are found without looking at all: each is in the bucket
    of the last day it was used on, and a bucket is looked through when its time has
    come.

    Args:
        vault: Where it is kept.
        idle_ttl: After how long without use a session ends; `None`: it does not.
    """

    def __init__(self, vault: Vault, idle_ttl: timedelta | None) -> None:
        self._vault, self._idle_ttl = vault, idle_ttl
        self._marked: OrderedDict[SessionKey, None] = OrderedDict()
        self._known: OrderedDict[SessionKey, date] = OrderedDict()
        self._bucket: date | None = None
        self._after: str | None = None

    def mark(self, key: SessionKey) -> None:
        """Note that a session is used now."""
        if self._known.get(key) == self._today() or key in self._marked:
            return
        self._marked[key] = None
        if len(self._marked) > MAX_MARKED:
            self._marked.popitem(last=False)

    async def last(self, keys: Iterable[SessionKey]) -> dict[SessionKey, date]:
        """Return the days of the last use, of those for which one is known."""
        found: dict[SessionKey, date] = {}
        for key in keys:
            if key in self._marked:
                found[key] = self._today()
            elif stored := await self._vault.get(Used, used_key(key)):
                found[key] = stored.entry.day
        return found

    async def forget(self, key: SessionKey) -> None:
        """Erase what is known of a session that is gone."""
        self._marked.pop(key, None)
        self._known.pop(key, None)
        if stored := await self._vault.get(Used, used_key(key)):
            await self._leave(stored.entry.bucket, key)
            await self._vault.delete(stored)

    async def write(self, limit: int = 1000) -> int:
        """Write down what was marked; of how many sessions."""
        written = 0
        for key in list(self._marked)[:limit]:
            with suppress(CredentialUnreadable):
                # It may be deleted meanwhile: nothing of it is to be left.
                if await self._vault.get(Session, entry_key(Session, key)):
                    written += await self._write(key, self._today())
            self._marked.pop(key, None)
        return written

    async def _write(self, key: SessionKey, day: date) -> bool:
        place, bucket = used_key(key), None if self._idle_ttl is None else day
        for _ in range(CAS_TRIES):
            old = await self._vault.get(Used, place)
            if old and old.entry.day >= day and (old.entry.bucket or not bucket):
                self._know(key, old.entry.day)
                return False
            if bucket:  # before it is left: a session is never in no bucket
                await self._enter(bucket, key)
            new = Used(day=day, bucket=bucket)
            if old is None:
                saved = await self._vault.create(place, new, USED_KEPT)
            else:
                saved = await self._vault.replace(old, new, USED_KEPT)
            if saved is not None:
                if old and old.entry.bucket != bucket:
                    await self._leave(old.entry.bucket, key)
                self._know(key, day)
                return True
        return False  # many others write the same

    def _know(self, key: SessionKey, day: date) -> None:
        self._known[key] = day
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)

    def _today(self) -> date:
        return self._vault.now().date()

    # --------------------------------------------------------------- idle sessions

    async def _enter(self, day: date, key: SessionKey) -> None:
        kept = (self._idle_ttl or timedelta()) + LOOK_BACK
        await self._vault.create(_in_bucket(day, key), Idle.to(key), kept)

    async def _leave(self, day: date | None, key: SessionKey) -> None:
        if day is not None:
            await self._vault.discard(_in_bucket(day, key))

    async def end_idle(
        self, end: Callable[[SessionKey], Awaitable[bool]], limit: int = 100
    ) -> int:
        """
        End the sessions whose time without use is over; how many.

        Looks at about *limit* of them, and goes on there the next time.

        Args:
            end: Ends one; whether it was there.
            limit: How many are looked at.
        """
        if self._idle_ttl is None:
            return 0
        ended = looked = 0
        # Of a day that is over by that time: its last moment counts.
        last = (self._vault.now() - self._idle_ttl).date() - DAY
        while (day := self._bucket or last - LOOK_BACK) <= last and looked < limit:
            found, after = await self._vault.page(
                Idle, _name(day), after=self._after, limit=limit
            )
            for pointer in found:
                with suppress(CredentialUnreadable):  # nobody knows how old it is
                    ended += await self._ended(pointer, day, end)
            looked += len(found)
            # Not before: after an outage in between they are looked at again.
            self._bucket, self._after = (day, after) if after else (day + DAY, None)
        return ended

    async def _ended(
        self,
        pointer: Stored[Idle],
        day: date,
        end: Callable[[SessionKey], Awaitable[bool]],
    ) -> bool:
        key = pointer.entry.session_key()
        session = await self._vault.get(Session, entry_key(Session, key))
        used = await self._vault.get(Used, used_key(key))
        # A token was obtained for somebody who used it.
        days = [session.entry.obtained_at.date()] if session else []
        days += [used.entry.day] if used else []
        if session and max(days) > day:
            await self._write(key, max(days))  # where it belongs, if it is not there
            ended = False
        else:
            ended = await end(key) if session else False
        await self._vault.delete(pointer)
        return ended


def _in_bucket(day: date, key: SessionKey) -> tuple[str, str]:
    return (_name(day), used_key(key)[1])


def _name(day: date) -> str:
    return f"idle:{day.isoformat()}"
