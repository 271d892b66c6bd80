"""Paused tasks: what they wait for, how often they paused, who continues them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

from ._errors import StorageError
from ._models import Consent, Owner, Resumption
from ._vault import (
    CAS_TRIES,
    Claim,
    Future,
    Pause,
    Pointer,
    Stored,
    Vault,
    Waited,
    entry_key,
    pause_key,
)

# 60 s: longer than a run takes from its start to our check, short enough when who
# claimed has died.
CLAIM_TTL = timedelta(seconds=60)
# A count must outlive whatever can still be resumed: without it the answer to a pause
# would be read by the tool's own `interrupt`. A year after the task paused last: its
# question went out with its link, most of that year ago, and whoever resumes such a
# run answers something that nobody asks any more.
COUNTED_KEPT = timedelta(days=366)
GATE = "gate"
"""What the gate claims when it lets a turn go on."""
MAX_REMEMBERED = 1000  # pauses whose run-time contexts are kept at a time


class Pauses:
    """The pauses of all graphs, by task."""

    def __init__(self, vault: Vault, keep: timedelta) -> None:
        self._vault, self._keep = vault, keep
        self._remembered: OrderedDict[str, Resumption] = OrderedDict()

    async def get(self, task: str) -> Pause:
        """Return what is known of a task's pauses."""
        stored = await self._get(task)
        return stored.entry if stored else Pause()

    async def recount(self, task: str, ordinal: int, count: int) -> None:
        """Correct the count of a guarded call."""
        await self._change(task, counted=(ordinal, count))

    async def note(
        self,
        task: str,
        interrupt_id: str,
        consents: Iterable[Consent],
        resumption: Resumption | None,
        counted: tuple[int, int] | None,
    ) -> None:
        """
        Write down a pause that is about to be raised.

        Args:
            task: The task that pauses.
            interrupt_id: The interrupt's.
            consents: What it waits for.
            resumption: How it can be continued; `None` where it cannot be.
            counted: Ordinal and count of a guarded call that pauses by itself.
        """
        update: dict[str, Any] = {
            "claims": {},  # whoever went on has come to this pause
            "waits_for": [
                Waited(target=Pointer.to(c.place), future_id=c.key) for c in consents
            ],
        }
        if resumption is not None:
            update |= {
                "thread_id": resumption.thread_id,
                "checkpoint_id": resumption.checkpoint_id,
                "nodes": sorted(resumption.nodes),
                "configurable": resumption.configurable,
            }
            self._remembered[task] = resumption
            while len(self._remembered) > MAX_REMEMBERED:
                self._remembered.popitem(last=False)
        await self._change(task, update, raised=interrupt_id, counted=counted)

    def remembered(self, task: str) -> Resumption | None:
        """Return how a run that paused in this process can be continued."""
        return self._remembered.get(task)

    async def final(self, task: str) -> Pause | None:
        """Return the pause if nothing that it waits for is open any more."""
        stored = await self._get(task)
        if stored is None or not stored.entry.waits_for:
            return None
        for waited in stored.entry.waits_for:
            key = entry_key(Future, waited.target.session_key())
            future = await self._vault.get(Future, key)
            if (
                future is not None
                and future.entry.id == waited.future_id
                and future.entry.status == "pending"
                and self._vault.now() < future.entry.expires_at
            ):
                return None
        return stored.entry

    async def claim(self, task: str, name: str, holder: str, answers: int = 0) -> bool:
        """
        Become the one that continues a task; whether that succeeded.

        Args:
            task: The task.
            name: Which continuation of it.
            holder: Who claims; may claim again.
            answers: How many answers the task has.
        """
        for _ in range(CAS_TRIES):
            stored, now = await self._get(task), self._vault.now()
            entry = stored.entry if stored else Pause()
            alive = {n: c for n, c in entry.claims.items() if now < c.until}
            claim = alive.get(name)
            if claim and claim.holder != holder and claim.answers >= answers:
                return False
            until = now + CLAIM_TTL
            alive[name] = Claim(holder=holder, answers=answers, until=until)
            update: dict[str, Any] = {"claims": alive}
            if name == GATE:
                update |= _nothing_to_resume()  # the turn goes on
            if await self._save(task, stored, entry, update):
                return True
        raise StorageError("a pause could not be claimed: too many writers")

    async def release(self, task: str, name: str, holder: str) -> None:
        """End a claim: its holder failed, and another may try."""
        for _ in range(CAS_TRIES):
            stored = await self._get(task)
            claim = stored.entry.claims.get(name) if stored else None
            if stored is None or claim is None or claim.holder != holder:
                return
            left = {n: c for n, c in stored.entry.claims.items() if n != name}
            if await self._save(task, stored, stored.entry, {"claims": left}):
                return

    async def forget(self, owner: Owner) -> int:
        """Erase what pauses know of an owner; none goes on by itself any more."""
        erased = 0
        async for stored in self._vault.entries(Pause, "pause"):
            if _waits_for(stored.entry, owner):
                erased += await self._forget(stored.key[1], owner)
        return erased

    async def _forget(self, task: str, owner: Owner) -> bool:
        self._remembered.pop(task, None)
        for _ in range(CAS_TRIES):
            stored = await self._get(task)
            if stored is None or not _waits_for(stored.entry, owner):
                return False
            if await self._save(task, stored, stored.entry, _nothing_to_resume()):
                return True
        raise StorageError("a pause could not be erased: too many writers")

    async def _get(self, task: str) -> Stored[Pause] | None:
        return await self._vault.get(Pause, pause_key(task))

    async def _save(
        self,
        task: str,
        stored: Stored[Pause] | None,
        entry: Pause,
        update: dict[str, Any],
    ) -> bool:
        entry = entry.model_copy(update=update)
        ttl = max(COUNTED_KEPT, self._keep) if entry.counts else self._keep
        if stored is None:
            saved = await self._vault.create(pause_key(task), entry, ttl)
        else:
            saved = await self._vault.replace(stored, entry, ttl)
        return saved is not None

    async def _change(
        self,
        task: str,
        update: dict[str, Any] | None = None,
        *,
        raised: str | None = None,
        counted: tuple[int, int] | None = None,
    ) -> None:
        for _ in range(CAS_TRIES):
            stored = await self._get(task)
            entry = stored.entry if stored else Pause()
            counts = dict(entry.counts)
            if counted is not None:
                counts[str(counted[0])] = counted[1]
            ids = [i for i in entry.interrupt_ids if i != raised]
            ids += [raised] if raised else []
            changed = {**(update or {}), "counts": counts, "interrupt_ids": ids}
            if await self._save(task, stored, entry, changed):
                return
        raise StorageError("a pause could not be written down: too many writers")


def _waits_for(pause: Pause, owner: Owner) -> bool:
    return any(w.target.session_key().owner == owner for w in pause.waits_for)


def _nothing_to_resume() -> dict[str, Any]:
    """Return a pause's fields as they are when it says nothing of a person."""
    fields = {"waits_for", "thread_id", "checkpoint_id", "nodes", "configurable"}
    return Pause().model_dump(include=fields)
