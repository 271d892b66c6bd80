"""The storage contract as tests: one per promise of `StorageBackend`."""
# ruff: noqa: S101, PLR2004 - these are tests, shipped to whoever writes a backend

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from datetime import timedelta
from typing import Any, ClassVar, TypeAlias
from uuid import uuid4

import pytest

from ..storage import Record, StorageBackend

LONG = timedelta(minutes=1)
SHORT = timedelta(seconds=0.1)
TEST_TIMEOUT_S = 30.0

_Test: TypeAlias = Callable[[Any, StorageBackend], Coroutine[Any, Any, None]]


def _promise(test: _Test) -> Callable[[Any], None]:
    """Make a test of a coroutine, so that no plugin or setting is needed to run it."""

    async def run(case: StorageConformance) -> None:
        store = await case.open_backend()
        try:
            await test(case, store)
        finally:
            await store.close()

    def promise(self: StorageConformance) -> None:
        asyncio.run(asyncio.wait_for(run(self), TEST_TIMEOUT_S))

    # Not `functools.wraps`: pytest would take `store` for a fixture.
    promise.__name__, promise.__doc__ = test.__name__, test.__doc__
    return promise


async def _until_over(lifetime: timedelta = SHORT) -> None:
    await asyncio.sleep(lifetime.total_seconds() + 0.05)


def _key(name: str = "name") -> tuple[str, str]:
    """Return a key that no other test uses, should the data outlive a test."""
    return uuid4().hex, name


class StorageConformance:
    """
    Subclass this in a test module to check a backend of your own.

    ```python
    class TestMyBackend(StorageConformance):
        shared = True

        async def open_backend(self) -> StorageBackend:
            backend = MyBackend("db://127.0.0.1/test")
            await backend.open()
            return backend
    ```

    Tests wait for real lifetimes of 0.1 s; the rest of the suite takes no time.

    Attributes:
        shared: Whether two backends of one test see the same records.
    """

    shared: ClassVar[bool] = False

    async def open_backend(self) -> StorageBackend:
        """Return an opened backend; the test closes it."""
        raise NotImplementedError

    # Reading and writing

    @_promise
    async def test_absent_record_is_none(self, store: StorageBackend) -> None:
        """What was never stored is absent, and not an error."""
        key = _key()
        assert await store.get(key) is None
        assert await store.take(key) is None
        assert await store.list(key[0]) == {}
        assert await store.delete(key) is False

    @_promise
    async def test_bytes_come_back_unchanged(self, store: StorageBackend) -> None:
        """Any bytes are kept: none, all 256, 64 KiB."""
        for value in (b"", bytes(range(256)), b"\x00\xff" * 32 * 1024):
            key = _key()
            assert await store.put(key, value, version=1, expected=None)
            assert await store.get(key) == Record(1, value)
            assert await store.list(key[0]) == {key[1]: Record(1, value)}
            assert await store.take(key) == Record(1, value)

    @_promise
    async def test_versions_are_kept_exactly(self, store: StorageBackend) -> None:
        """A version may be any whole number below 2**53, and need not follow."""
        key, before = _key(), None
        for version in (0, 2**53 - 1, 7):
            assert await store.put(key, b"v", version=version, expected=before)
            assert await store.get(key) == Record(version, b"v")
            before = version

    @_promise
    async def test_put_replaces_the_version_it_names(
        self, store: StorageBackend
    ) -> None:
        """A record is created from nothing and replaced at its version."""
        key = _key()
        assert await store.put(key, b"a", version=1, expected=None) is True
        assert await store.put(key, b"b", version=2, expected=1) is True
        assert await store.get(key) == Record(2, b"b")

    @_promise
    async def test_wrong_expectation_changes_nothing(
        self, store: StorageBackend
    ) -> None:
        """A `put` that names another version, or none, is refused."""
        key, absent = _key(), _key()
        await store.put(key, b"a", version=5, expected=None)
        for expected in (None, 4, 6, 0):
            assert not await store.put(
                key, b"b", version=9, expected=expected, ttl=SHORT
            )
        assert await store.put(absent, b"b", version=2, expected=1) is False
        await _until_over()
        assert await store.get(key) == Record(5, b"a")
        assert await store.get(absent) is None

    @_promise
    async def test_delete_happens_once(self, store: StorageBackend) -> None:
        """Deleting says whether something was there."""
        key = _key()
        await store.put(key, b"a", version=1, expected=None)
        assert await store.delete(key) is True
        assert await store.delete(key) is False
        assert await store.get(key) is None
        assert await store.put(key, b"b", version=1, expected=None)

    @_promise
    async def test_delete_can_expect_a_version(self, store: StorageBackend) -> None:
        """A record that has changed is not deleted by who did not see the change."""
        key = _key()
        await store.put(key, b"a", version=2, expected=None)
        assert await store.delete(key, expected=1) is False
        assert await store.get(key) == Record(2, b"a")
        assert await store.delete(key, expected=2) is True
        assert await store.get(key) is None

    @_promise
    async def test_take_reads_and_deletes(self, store: StorageBackend) -> None:
        """What was taken is gone."""
        key = _key()
        await store.put(key, b"a", version=3, expected=None)
        assert await store.take(key) == Record(3, b"a")
        assert await store.take(key) is None
        assert await store.get(key) is None

    # Who comes first

    @_promise
    async def test_one_of_eight_takes_wins(self, store: StorageBackend) -> None:
        """Of concurrent `take`s of a record one gets it."""
        key = _key()
        await store.put(key, b"a", version=1, expected=None)
        taken = await asyncio.gather(*(store.take(key) for _ in range(8)))
        assert sorted(taken, key=str) == [*[None] * 7, Record(1, b"a")]

    @_promise
    async def test_one_of_twenty_puts_wins(self, store: StorageBackend) -> None:
        """Of concurrent writes that expect the same version one is stored."""
        key, before = _key(), None
        for start in (100, 200):  # to create, then to replace
            versions = range(start, start + 20)
            stored = await asyncio.gather(
                *(
                    store.put(key, b"%d" % version, version=version, expected=before)
                    for version in versions
                )
            )
            assert stored.count(True) == 1
            before = versions[stored.index(True)]
            assert await store.get(key) == Record(before, b"%d" % before)

    @_promise
    async def test_one_of_eight_leases_wins(self, store: StorageBackend) -> None:
        """Of concurrent holders one gets the lease."""
        key = _key()
        await store.put(key, b"a", version=1, expected=None)
        leased = await asyncio.gather(
            *(store.lease(key, f"holder {number}", LONG) for number in range(8))
        )
        assert leased.count(True) == 1

    # Lifetimes

    @_promise
    async def test_expired_record_is_gone_everywhere(
        self, store: StorageBackend
    ) -> None:
        """No call sees a record whose lifetime has passed."""
        key = _key()
        assert await store.put(key, b"a", version=1, expected=None, ttl=SHORT)
        await _until_over()
        assert await store.get(key) is None
        assert await store.list(key[0]) == {}
        assert await store.lease(key, "holder", LONG) is False
        assert await store.delete(key) is False
        assert await store.delete(key, expected=1) is False
        assert await store.take(key) is None
        assert await store.put(key, b"b", version=2, expected=1) is False

    @_promise
    async def test_expired_record_can_be_created_again(
        self, store: StorageBackend
    ) -> None:
        """A `put` that expects nothing finds nothing, and no lease that was left."""
        key = _key()
        await store.put(key, b"a", version=1, expected=None, ttl=SHORT)
        await store.lease(key, "before", LONG)
        await _until_over()
        assert await store.put(key, b"b", version=1, expected=None)
        assert await store.get(key) == Record(1, b"b")
        assert await store.lease(key, "after", LONG)

    @_promise
    async def test_lifetime_is_not_over_early(self, store: StorageBackend) -> None:
        """A record with a lifetime is there for everyone until then."""
        key = _key()
        await store.put(key, b"a", version=1, expected=None, ttl=LONG)
        assert await store.put(key, b"b", version=2, expected=None) is False
        assert await store.list(key[0]) == {key[1]: Record(1, b"a")}
        assert await store.lease(key, "holder", LONG)
        assert await store.take(key) == Record(1, b"a")

    @_promise
    async def test_put_can_shorten_a_lifetime(self, store: StorageBackend) -> None:
        """The lifetime of the last `put` counts."""
        key, endless = _key(), _key()
        await store.put(key, b"a", version=1, expected=None, ttl=LONG)
        await store.put(endless, b"a", version=1, expected=None)
        for each in (key, endless):
            assert await store.put(each, b"b", version=2, expected=1, ttl=SHORT)
        await _until_over()
        assert await store.get(key) is None
        assert await store.get(endless) is None

    @_promise
    async def test_put_without_lifetime_lifts_the_old_one(
        self, store: StorageBackend
    ) -> None:
        """A `put` without a `ttl` keeps the record for ever."""
        for seconds in (0.2, 1.0, 5.0):  # longer only where the machine is too slow
            key, ttl = _key(), timedelta(seconds=seconds)
            await store.put(key, b"a", version=1, expected=None, ttl=ttl)
            if await store.put(key, b"b", version=2, expected=1):
                break
        await _until_over(ttl)
        assert await store.get(key) == Record(2, b"b")

    # Leases

    @_promise
    async def test_lease_excludes_until_it_is_freed(
        self, store: StorageBackend
    ) -> None:
        """While one holds a lease nobody else can; freeing it ends that."""
        key = _key()
        await store.put(key, b"a", version=1, expected=None)
        assert await store.lease(key, "one", LONG) is True
        assert await store.lease(key, "two", LONG) is False
        await store.free(key, "one")
        assert await store.lease(key, "two", LONG) is True

    @_promise
    async def test_only_the_holder_frees(self, store: StorageBackend) -> None:
        """Freeing what one does not hold does nothing."""
        key = _key()
        await store.free(key, "one")
        await store.put(key, b"a", version=1, expected=None)
        await store.free(key, "one")
        await store.lease(key, "one", LONG)
        for other in ("two", "One", "one ", ""):
            await store.free(key, other)
            assert await store.lease(key, other, LONG) is False

    @_promise
    async def test_holder_extends_its_lease(self, store: StorageBackend) -> None:
        """Leasing again moves the end."""
        key = _key()
        await store.put(key, b"a", version=1, expected=None)
        assert await store.lease(key, "one", SHORT)
        assert await store.lease(key, "one", LONG)
        await _until_over()
        assert await store.lease(key, "two", LONG) is False

    @_promise
    async def test_lease_that_is_over_is_taken_over(
        self, store: StorageBackend
    ) -> None:
        """Who crashed blocks nobody for longer than its lease, and frees no other's."""
        key = _key()
        await store.put(key, b"a", version=1, expected=None)
        assert await store.lease(key, "one", SHORT)
        await _until_over()
        assert await store.lease(key, "two", LONG)
        await store.free(key, "one")
        assert await store.lease(key, "one", LONG) is False

    @_promise
    async def test_absent_record_cannot_be_leased(self, store: StorageBackend) -> None:
        """A lease is of a record, and ends with it."""
        key = _key()
        assert await store.lease(key, "one", LONG) is False
        assert await store.get(key) is None
        await store.put(key, b"a", version=1, expected=None)
        await store.lease(key, "one", LONG)
        assert await store.delete(key)
        await store.put(key, b"a", version=1, expected=None)
        assert await store.lease(key, "two", LONG)

    @_promise
    async def test_lease_leaves_the_record_as_it_is(
        self, store: StorageBackend
    ) -> None:
        """Leasing and freeing change neither version, value nor lifetime."""
        key, brief = _key(), _key()
        await store.put(key, b"a", version=1, expected=None)
        await store.lease(key, "one", SHORT)
        assert await store.get(key) == Record(1, b"a")
        await store.free(key, "one")
        assert await store.get(key) == Record(1, b"a")
        await store.lease(key, "one", SHORT)
        await store.put(brief, b"a", version=1, expected=None, ttl=SHORT)
        await store.lease(brief, "one", LONG)
        await _until_over()
        assert await store.put(key, b"b", version=2, expected=1)
        assert await store.get(brief) is None

    @_promise
    async def test_put_ends_the_lease_if_it_succeeds(
        self, store: StorageBackend
    ) -> None:
        """The write that a lease was for ends it; a refused write does not."""
        key = _key()
        await store.put(key, b"a", version=1, expected=None)
        await store.lease(key, "one", LONG)
        assert not await store.put(key, b"b", version=2, expected=7)
        assert not await store.put(key, b"b", version=2, expected=None)
        assert await store.lease(key, "two", LONG) is False
        assert await store.put(key, b"b", version=2, expected=1)
        assert await store.lease(key, "two", LONG) is True

    # Keys

    @_promise
    async def test_no_two_keys_are_the_same(self, store: StorageBackend) -> None:
        """Nothing in a key is a pattern, a separator or folded."""
        unique = uuid4().hex
        texts = [
            *("", "*", "%", "_", "?", "[a]", "\\", "'", '"', "a", "A", " a", "a "),
            *("a:b", "b", "b:c", "c", "a/b", "{a}", "é", "e\u0301", "É", "ß", "ss"),
            *(
                "\u0430",
                "ﬁ",
                "fi",
                "İ",
                "i",
                "\u0131",
                "\u200ba",
                "😀",
                "1",
                "01",
                "\n",
            ),
            *("x" * 200, "x" * 199 + "y", "ж" * 200),
        ]
        keys = [(unique + text, name) for text in texts for name in ("n", text)]
        keys += [(f"{unique}a", f"b:{unique}"), (f"{unique}a:b", unique)]
        keys += [(unique, f"{unique}!"), (f"{unique}!", unique), ("", unique)]
        keys = list(dict.fromkeys(keys))
        for number, key in enumerate(keys):
            assert await store.put(key, b"%d" % number, version=number, expected=None)
        for number, key in enumerate(keys):
            assert await store.take(key) == Record(number, b"%d" % number)

    @_promise
    async def test_list_is_of_one_namespace(self, store: StorageBackend) -> None:
        """All names of exactly this namespace are listed, and no other's."""
        unique, names = uuid4().hex, ["", "*", "a", "A", "é", "x" * 200]
        spaces = [unique + end for end in ("", "*", "%", "_", ":", "a", "A", "aa")]
        for version, space in enumerate(spaces):
            for name in names:
                await store.put((space, name), b"v", version=version, expected=None)
        for version, space in enumerate(spaces):
            listed = await store.list(space)
            assert listed == dict.fromkeys(names, Record(version, b"v"))
        assert await store.list(unique.upper() + "!") == {}
        assert await store.list(f"{unique}b") == {}

    # Upkeep

    @_promise
    async def test_rewrite_changes_the_bytes_alone(self, store: StorageBackend) -> None:
        """Other bytes, same version, same lifetime, same lease: nobody notices."""
        key, brief = _key(), _key()
        assert not await store.rewrite(key, b"z", expected=1)
        await store.put(key, b"a", version=4, expected=None)
        await store.lease(key, "one", LONG)
        assert not await store.rewrite(key, b"z", expected=3)
        assert await store.get(key) == Record(4, b"a")
        assert await store.rewrite(key, b"b", expected=4)
        assert await store.get(key) == Record(4, b"b")
        assert not await store.lease(key, "two", LONG)
        assert await store.put(key, b"c", version=5, expected=4)
        await store.put(brief, b"a", version=1, expected=None, ttl=SHORT)
        assert await store.rewrite(brief, b"b", expected=1)
        await _until_over()
        assert await store.get(brief) is None
        assert not await store.rewrite(brief, b"c", expected=1)

    @_promise
    async def test_walk_meets_every_record(self, store: StorageBackend) -> None:
        """All that is there from beginning to end is met, in bounded pages."""
        unique = uuid4().hex
        spaces = [unique + end for end in ("", "*", "é", "a")]
        names = ["", "*", "A", "a", "é", "x" * 200, *map(str, range(30))]
        there = {(space, name) for space in spaces for name in names}
        for key in there:
            await store.put(key, b"v", version=3, expected=None)
        gone = (spaces[0], "over")
        await store.put(gone, b"v", version=1, expected=None, ttl=SHORT)
        await _until_over()
        for namespace in (None, *spaces):
            met: dict[tuple[str, str], Record] = {}
            after, pages = None, 0
            while after is not None or not pages:
                page = await store.walk(namespace, after=after, limit=10)
                # Written meanwhile: what was there before is met all the same.
                late = (spaces[1], f"late {namespace} {pages}")
                await store.put(late, b"w", version=1, expected=None, ttl=LONG)
                met |= page.records
                after, pages = page.after, pages + 1
                assert pages < 10_000
            wanted = {k for k in there if namespace in {None, k[0]}}
            assert wanted <= met.keys()
            assert {met[key] for key in wanted} == {Record(3, b"v")}
            assert gone not in met
            if namespace is not None:
                assert {space for space, _ in met} == {namespace}

    @_promise
    async def test_sweep_erases_only_what_has_expired(
        self, store: StorageBackend
    ) -> None:
        """A sweep is bounded by its limit and touches no live record."""
        space = uuid4().hex
        for number in range(5):
            dead, live = (space, f"dead {number}"), (space, f"live {number}")
            await store.put(dead, b"d", version=1, expected=None, ttl=SHORT)
            ttl = LONG if number % 2 else None
            await store.put(live, b"l", version=1, expected=None, ttl=ttl)
        await _until_over()
        assert 0 <= await store.sweep(limit=2) <= 2
        assert await store.sweep() >= 0
        expected = {f"live {number}": Record(1, b"l") for number in range(5)}
        assert await store.list(space) == expected

    @_promise
    async def test_two_backends_share_one_database(self, store: StorageBackend) -> None:
        """What one process does, another sees at once."""
        if not self.shared:
            pytest.skip("this backend is its own database")
        other, key = await self.open_backend(), _key()
        try:
            assert await store.put(key, b"a", version=1, expected=None)
            assert await other.get(key) == Record(1, b"a")
            assert await other.lease(key, "other", LONG)
            assert await store.lease(key, "store", LONG) is False
            assert await other.put(key, b"b", version=2, expected=1)
            assert await store.put(key, b"c", version=2, expected=1) is False
            assert await store.list(key[0]) == {key[1]: Record(2, b"b")}
            both: list[Awaitable[Record | None]] = [store.take(key), other.take(key)]
            taken = await asyncio.gather(*both)
            assert sorted(taken, key=str) == [None, Record(2, b"b")]
        finally:
            await other.close()
