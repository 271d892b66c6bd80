"""The storage contract: bytes under two-part keys, versions, lifetimes, leases."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeAlias

Key: TypeAlias = tuple[str, str]
"""Namespace and name. Both are any text; neither is ever a pattern."""


@dataclass(frozen=True, slots=True)
class Record:
    """What is stored under one key."""

    version: int
    value: bytes


@dataclass(frozen=True, slots=True)
class Page:
    """
    Some of all records, on a walk through them.

    Attributes:
        records: What is there; may be empty before the end.
        after: Where the next page begins, opaque; `None`: this was the last.
    """

    records: dict[Key, Record]
    after: str | None


class StorageBackend(ABC):
    """
    Keeps sealed bytes for the vault and knows nothing else.

    What a backend promises, and `testing.StorageConformance` checks:

    - every write is a compare-and-swap: it names the version it replaces;
    - a record whose `ttl` has passed is gone everywhere: for `get`, `list`,
      `take`, `delete`, `lease`, and for a `put` that expects nothing;
    - a `put` that succeeds sets the lifetime anew and ends a lease;
    - of any number of concurrent `take`s of a record one gets it;
    - a lease excludes others until it is freed or over; only its holder frees it,
      time is the store's clock, and the version stays as it is;
    - a walk meets every record that is there from its beginning to its end, whatever
      is written meanwhile, and no call of it looks at much more than `limit`;
    - namespaces and names are compared exactly (`*`, `%`, `_`, case, unicode);
    - an outage is `StorageUnavailable`, never "nothing there".

    All methods are called on one event loop. `open` is awaited once before
    anything else, `close` once at the end.
    """

    async def open(self) -> None:  # noqa: B027 - a default
        """Connect, and create or migrate what the backend needs."""

    async def close(self) -> None:  # noqa: B027 - a default
        """Close what was opened here, and nothing else."""

    @abstractmethod
    async def get(self, key: Key) -> Record | None:
        """Return the record, or `None`."""

    @abstractmethod
    async def put(
        self,
        key: Key,
        value: bytes,
        *,
        version: int,
        expected: int | None,
        ttl: timedelta | None = None,
    ) -> bool:
        """
        Store *value* as *version* if the record is at *expected* now.

        Args:
            key: Where.
            value: What; sealed.
            version: The new version, below 2**53.
            expected: The version to replace; `None`: there must be no record.
            ttl: How long the record lives; `None`: for ever.

        Returns:
            Whether it was stored. `False` changes nothing.
        """

    @abstractmethod
    async def delete(self, key: Key, *, expected: int | None = None) -> bool:
        """Delete the record (if at version *expected*); whether one was deleted."""

    @abstractmethod
    async def list(self, namespace: str) -> dict[str, Record]:
        """Return all records of a namespace by name."""

    @abstractmethod
    async def take(self, key: Key) -> Record | None:
        """Read and delete in one step: a record is taken by one caller only."""

    @abstractmethod
    async def lease(self, key: Key, holder: str, duration: timedelta) -> bool:
        """
        Reserve an existing record for *holder*; whether it succeeded.

        The present holder may lease again, which moves the end.
        """

    @abstractmethod
    async def free(self, key: Key, holder: str) -> None:
        """End the lease if *holder* has it."""

    @abstractmethod
    async def rewrite(self, key: Key, value: bytes, *, expected: int) -> bool:
        """
        Put other bytes in place of those of version *expected*.

        Version, lifetime and lease stay as they are: whoever works with the record
        does not notice. `False` changes nothing.
        """

    @abstractmethod
    async def walk(
        self,
        namespace: str | None = None,
        *,
        after: str | None = None,
        limit: int = 500,
    ) -> Page:
        """
        Return a page of all records, or of all of one namespace, in any order.

        Args:
            namespace: Only these; `None`: all there are.
            after: What the page before said; `None`: from the beginning.
            limit: About how many records a page has.
        """

    @abstractmethod
    async def sweep(self, limit: int = 1000) -> int:
        """Erase at most *limit* expired records for good; how many were erased."""
