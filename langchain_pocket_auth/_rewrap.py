"""Rewrapping: seals what is stored with the first key, so that others can go."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from ._errors import CredentialUnreadable
from ._seal import sealed_with
from ._vault import Known, Vault, known_key
from .storage import Key, Record

PAGE = 500  # records: some 500 kB in memory, and one note of the place
MAX_PASSES = 3  # the second finds what was written during the first
_PLACE = known_key("rewrap")
_PLACE_TTL = timedelta(days=7)  # of one that was given up


@dataclass(frozen=True, slots=True)
class Rewrapped:
    """
    How many records there were and are under each key.

    A key that *after* does not name holds nothing any more and can be dropped. One
    that it still names, besides the first, seals somewhere: give that replica the
    same keys in the same order, and rewrap again.

    Attributes:
        before: Records by id of their key, at the beginning.
        after: Records by id of their key, as the last look found them.
        unreadable: Records that do not open with the key that they name, or name none
            of the keys; they are left as they are, and counted nowhere else.
    """

    before: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)
    unreadable: int = 0


async def rewrap(
    vault: Vault, *, batch: int = PAGE, on_progress: Callable[[int], None] | None = None
) -> Rewrapped:
    """
    Seal everything that is stored with the first key.

    Version, lifetime and lease of a record stay, so that who works with it does not
    notice. A run that was ended in the middle is continued by the next one; several
    at once do no harm. What a replica with another first key writes meanwhile is found
    by another pass, of at most `MAX_PASSES`; where the last still finds something, no
    key counts as free.

    Args:
        vault: What to go through.
        batch: How many records are read at once.
        on_progress: Called with the number of records looked at so far, after each
            batch.

    Raises:
        StorageUnavailable: The store does not answer; the next run continues.
    """
    place = _Place(vault)
    after, earlier = await place.find()
    before, seen, look = Counter(earlier), earlier.total(), _Look()
    for number in range(MAX_PASSES):
        whole, look = after is None, _Look()
        async for records, further in _pages(vault, after, batch):
            changed = await look.at(vault, records, reseal=True)
            seen += len(records)
            if number == 0 and changed and further:
                await place.keep(further, earlier + look.found)
            if on_progress is not None:
                on_progress(seen)
        if number == 0:
            before += look.found
            await place.clear()
        if whole and not look.changed:
            for key_id in set(vault.key_ids[1:]) - look.found.keys():
                await vault.retire(key_id)
            break
        after = None
    return Rewrapped(dict(before), dict(look.found), look.unreadable)


async def survey(vault: Vault, *, batch: int = PAGE) -> Rewrapped:
    """
    Count what is stored under each key, and change nothing.

    Raises:
        StorageUnavailable: The store does not answer.
    """
    look = _Look()
    async for records, _ in _pages(vault, None, batch):
        await look.at(vault, records, reseal=False)
    return Rewrapped(dict(look.found), dict(look.found), look.unreadable)


@dataclass(slots=True)
class _Look:
    """What one pass through the store found."""

    found: Counter[str] = field(default_factory=Counter)
    unreadable: int = 0
    changed: int = 0

    async def at(
        self, vault: Vault, records: dict[Key, Record], *, reseal: bool
    ) -> int:
        """Count *records*, and seal anew those that need it; return how many did."""
        before = self.changed
        for key, record in records.items():
            key_id = str(sealed_with(record.value))
            if key_id != vault.key_ids[0]:
                try:
                    value = vault.sealed_anew(key, record)
                except CredentialUnreadable:
                    self.unreadable += 1
                    continue
                self.changed += 1
                if reseal:
                    # Or else somebody has written it, and the next pass will see.
                    await vault.rewrite(key, record, value)
            self.found[key_id] += 1
        await asyncio.sleep(0)  # a store in memory never waits by itself
        return self.changed - before


async def _pages(
    vault: Vault, after: str | None, batch: int
) -> AsyncIterator[tuple[dict[Key, Record], str | None]]:
    while True:
        page = await vault.walk(after, batch)
        records = {key: r for key, r in page.records.items() if key != _PLACE}
        yield records, page.after
        if (after := page.after) is None:
            return


class _Place:
    """Where a run has come to, kept in the store itself."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault

    async def find(self) -> tuple[str | None, Counter[str]]:
        with suppress(CredentialUnreadable):
            stored = await self._vault.get(Known, _PLACE)
            data = stored.entry.data if stored else {}
            # Of a run with another first key, it would skip what that one sealed.
            if data.get("primary") == self._vault.key_ids[0]:
                return data["after"], Counter(data["counted"])
        return None, Counter()

    async def keep(self, after: str, counted: Counter[str]) -> None:
        data: dict[str, Any] = {
            "primary": self._vault.key_ids[0],
            "after": after,
            "counted": dict(counted),
        }
        # Of several runs at once any place will do: none leaves anything undone.
        await self._vault.discard(_PLACE)
        await self._vault.create(_PLACE, Known(data=data), _PLACE_TTL)

    async def clear(self) -> None:
        await self._vault.discard(_PLACE)
