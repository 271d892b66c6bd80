"""Records in this process: for tests, demos and one worker; a restart loses them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from heapq import heapify, heappop, heappush
from math import inf
from typing import TypeAlias

from ._base import Key, Page, Record, StorageBackend
from ._text import check_text

_Due: TypeAlias = tuple[float, Key]


@dataclass(slots=True)
class _Entry:
    """A record with its lifetime and its lease."""

    record: Record
    expires_at: float = inf
    lease_holder: str | None = None
    lease_until: float = -inf


class MemoryBackend(StorageBackend):
    """
    Keeps records in dictionaries of this instance.

    No call looks at more than the records it is about. `close` keeps them: the
    instance can be opened again.

    Args:
        clock: Seconds since any epoch; tests pass their own to move time.
    """

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._namespaces: dict[str, dict[str, _Entry]] = {}
        # A heap of lifetimes. Entries of replaced or deleted records stay in it
        # until they are due or outnumber the others.
        self._due: list[_Due] = []
        self._stale = 0

    async def get(self, key: Key) -> Record | None:
        entry = self._find(key)
        return entry.record if entry else None

    async def put(
        self,
        key: Key,
        value: bytes,
        *,
        version: int,
        expected: int | None,
        ttl: timedelta | None = None,
    ) -> bool:
        entry = self._find(key)
        if (entry.record.version if entry else None) != expected:
            return False
        self._erase(key)
        entry = _Entry(Record(version, value))
        if ttl is not None:
            entry.expires_at = self._clock() + ttl.total_seconds()
            heappush(self._due, (entry.expires_at, key))
        namespace, name = key
        self._namespaces.setdefault(namespace, {})[name] = entry
        return True

    async def delete(self, key: Key, *, expected: int | None = None) -> bool:
        entry = self._find(key)
        if entry is None or expected not in (None, entry.record.version):
            return False
        self._erase(key)
        return True

    async def list(self, namespace: str) -> dict[str, Record]:
        check_text(namespace)
        now = self._clock()
        return {
            name: entry.record
            for name, entry in self._namespaces.get(namespace, {}).items()
            if entry.expires_at > now
        }

    async def take(self, key: Key) -> Record | None:
        entry = self._find(key)
        if entry is None:
            return None
        self._erase(key)
        return entry.record

    async def lease(self, key: Key, holder: str, duration: timedelta) -> bool:
        check_text(holder)
        entry = self._find(key)
        now = self._clock()
        if entry is None or (entry.lease_until > now and entry.lease_holder != holder):
            return False
        entry.lease_holder = holder
        entry.lease_until = now + duration.total_seconds()
        return True

    async def free(self, key: Key, holder: str) -> None:
        check_text(holder)
        entry = self._find(key)
        if entry and entry.lease_holder == holder:
            entry.lease_holder, entry.lease_until = None, -inf

    async def rewrite(self, key: Key, value: bytes, *, expected: int) -> bool:
        entry = self._find(key)
        if entry is None or entry.record.version != expected:
            return False
        entry.record = Record(expected, value)
        return True

    async def walk(
        self,
        namespace: str | None = None,
        *,
        after: str | None = None,
        limit: int = 500,
    ) -> Page:
        del after, limit  # all of it is here anyhow
        now = self._clock()
        spaces = self._namespaces if namespace is None else (namespace,)
        records = {
            (space, name): entry.record
            for space in spaces
            for name, entry in self._namespaces.get(space, {}).items()
            if entry.expires_at > now
        }
        return Page(records, None)

    async def sweep(self, limit: int = 1000) -> int:
        erased, now = 0, self._clock()
        while erased < limit and self._due and self._due[0][0] <= now:
            due = heappop(self._due)
            if self._is_current(due):
                self._remove(due[1])
                erased += 1
            else:
                self._stale -= 1
        return erased

    def _find(self, key: Key) -> _Entry | None:
        check_text(*key)
        namespace, name = key
        entry = self._namespaces.get(namespace, {}).get(name)
        return entry if entry and entry.expires_at > self._clock() else None

    def _erase(self, key: Key) -> None:
        """Remove what is stored under *key*, expired or not, if anything is."""
        entry = self._remove(key)
        if entry is None or entry.expires_at == inf:
            return
        self._stale += 1
        # 64: below that a rebuild costs more than the entries weigh.
        if self._stale > max(64, len(self._due) // 2):
            self._due = [due for due in self._due if self._is_current(due)]
            heapify(self._due)
            self._stale = 0

    def _remove(self, key: Key) -> _Entry | None:
        namespace, name = key
        names = self._namespaces.get(namespace, {})
        entry = names.pop(name, None)
        if not names:
            self._namespaces.pop(namespace, None)
        return entry

    def _is_current(self, due: _Due) -> bool:
        expires_at, (namespace, name) = due
        entry = self._namespaces.get(namespace, {}).get(name)
        return entry is not None and entry.expires_at == expires_at
