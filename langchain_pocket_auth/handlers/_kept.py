"""What servers publish, kept for an hour: metadata and key sets."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

from .._http import Http

LIFETIME_S = 3600.0
RENEWAL_PAUSE_S = 60.0
LIMIT = 64  # one per server that an app talks to

V = TypeVar("V")


@dataclass(slots=True)
class _Entry(Generic[V]):
    loop: asyncio.AbstractEventLoop
    value: V | None = None
    fetched_at: float = 0.0
    renewed_at: float | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Kept(Generic[V]):
    """Values by URL, for as long as the HTTP client lives that fetched them."""

    def __init__(self) -> None:
        self._of: WeakKeyDictionary[Http, dict[str, _Entry[V]]] = WeakKeyDictionary()

    async def get(
        self,
        http: Http,
        url: str,
        fetch: Callable[[], Awaitable[V]],
        *,
        renew: bool = False,
    ) -> V:
        """
        Return what *fetch* gave within the last hour; callers share one call.

        What it raises is not kept. With *renew*, ask again, but once a minute at most.
        """
        entry = self._entry(http, url)
        async with entry.lock:
            value, now = entry.value, monotonic()
            if value is not None and now - entry.fetched_at < LIFETIME_S:
                last = entry.renewed_at
                if not renew or (last is not None and now - last < RENEWAL_PAUSE_S):
                    return value
                value = await fetch()
                entry.renewed_at = now
            else:
                value = await fetch()
            entry.value, entry.fetched_at = value, now
            return value

    def _entry(self, http: Http, url: str) -> _Entry[V]:
        entries = self._of.setdefault(http, {})
        entry, loop = entries.get(url), asyncio.get_running_loop()
        if entry is None or entry.loop is not loop:  # first use, or a forked child
            entries.pop(url, None)
            while len(entries) >= LIMIT:
                entries.pop(next(iter(entries)))
            entry = entries[url] = _Entry(loop)
        return entry
