"""Every backend keeps the storage contract, and what is SQLite's alone."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import sqlite3
import stat
import sys
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import aiosqlite
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from langchain_pocket_auth._errors import ConfigurationError, StorageUnavailable
from langchain_pocket_auth.storage import (
    Record,
    StorageBackend,
    _sqlite,
    storage_from_url,
)
from langchain_pocket_auth.storage.memory import MemoryBackend
from langchain_pocket_auth.storage.sql import SQLBackend
from langchain_pocket_auth.testing._conformance import StorageConformance

KEY = ("owner", "name")


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@contextmanager
def locked(file: Path, lock: str) -> Iterator[None]:
    """Another program reads or writes a database that is not in WAL mode yet."""
    other = sqlite3.connect(file, isolation_level=None)
    try:
        other.execute("CREATE TABLE another (a)")
        other.execute("BEGIN" if lock == "reads" else "BEGIN EXCLUSIVE")
        other.execute("SELECT * FROM another").fetchall()
        yield
        other.execute("COMMIT")
    finally:
        other.close()


class TestMemory(StorageConformance):
    async def open_backend(self) -> StorageBackend:
        backend = MemoryBackend()
        await backend.open()
        return backend


class TestSQLite(StorageConformance):
    shared = True

    @pytest.fixture(autouse=True)
    def _file(self, tmp_path: Path) -> None:
        self.url = f"sqlite:///{tmp_path / 'store.db'}"

    async def open_backend(self) -> StorageBackend:
        backend = SQLBackend(self.url)
        await backend.open()
        return backend


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "made" / "here" / "store.db"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def sql(path: Path, clock: Clock) -> AsyncIterator[SQLBackend]:
    backend = SQLBackend(f"sqlite:///{path}", clock=clock)
    await backend.open()
    yield backend
    await backend.close()


@pytest.fixture(params=["memory", "sqlite"])
def timed(request, clock: Clock) -> StorageBackend:
    """A backend on the test's clock."""
    if request.param == "memory":
        return MemoryBackend(clock=clock)
    return request.getfixturevalue("sql")


# Both, on a clock


async def test_lifetime_ends_at_its_last_moment(timed, clock: Clock) -> None:
    """A record lives for less than `ttl`, to the microsecond."""
    await timed.put(KEY, b"a", version=1, expected=None, ttl=timedelta(hours=1))
    clock.now += 3600 - 0.000_01
    assert await timed.get(KEY) == Record(1, b"a")
    clock.now += 0.000_01
    assert await timed.get(KEY) is None


async def test_lease_ends_at_its_last_moment(timed, clock: Clock) -> None:
    """A lease excludes for less than its duration."""
    await timed.put(KEY, b"a", version=1, expected=None)
    await timed.lease(KEY, "one", timedelta(seconds=30))
    clock.now += 29.999
    assert await timed.lease(KEY, "two", timedelta(seconds=30)) is False
    clock.now += 0.001
    assert await timed.lease(KEY, "two", timedelta(seconds=30)) is True


async def test_sweep_counts_what_it_erases(timed, clock: Clock) -> None:
    """Sweeping goes on until nothing expired is left."""
    for number in range(5):
        ttl = timedelta(seconds=number + 1)
        await timed.put(("o", f"{number}"), b"", version=1, expected=None, ttl=ttl)
    await timed.put(("o", "endless"), b"", version=1, expected=None)
    await timed.put(("o", "1"), b"", version=2, expected=1)
    await timed.delete(("o", "2"))
    assert await timed.sweep() == 0
    clock.now += 5
    assert [await timed.sweep(limit=2) for _ in range(3)] == [2, 1, 0]
    assert sorted(await timed.list("o")) == ["1", "endless"]


@pytest.mark.parametrize("text", ["a\0b", "a\udc80b", "\ud800"])
async def test_text_no_store_can_keep_is_refused(timed, text: str) -> None:
    """NUL and lone surrogates are an error that does not quote them."""
    second = timedelta(seconds=1)
    for key in ((text, "name"), ("owner", text)):
        for call in (timed.get(key), timed.take(key), timed.delete(key)):
            with pytest.raises(ValueError, match="cannot be stored") as caught:
                await call
            assert type(caught.value) is ValueError
            assert text not in str(caught.value)
        with pytest.raises(ValueError, match="cannot be stored"):
            await timed.put(key, b"", version=1, expected=None)
    for call in (
        timed.list(text),
        timed.lease(KEY, text, second),
        timed.free(KEY, text),
    ):
        with pytest.raises(ValueError, match="cannot be stored"):
            await call


async def test_memory_forgets_lifetimes_that_no_longer_count(clock: Clock) -> None:
    """Writing one record again and again does not fill the memory."""
    backend = MemoryBackend(clock=clock)
    day = timedelta(days=1)
    for version in range(1, 2000):
        await backend.put(
            KEY, b"", version=version, expected=version - 1 or None, ttl=day
        )
    assert len(backend._due) < 200
    clock.now += 86_400
    assert await backend.sweep() == 1
    assert not backend._namespaces


async def test_memory_backends_share_nothing() -> None:
    """What one instance holds, no other does."""
    one, two = MemoryBackend(), MemoryBackend()
    await one.put(KEY, b"a", version=1, expected=None)
    assert await two.get(KEY) is None


_KEYS = st.sampled_from([("a", "b"), ("a", "c"), ("b", "b")])
_VERSIONS = st.integers(1, 3)
_SPANS = st.sampled_from([0, 1, 3, 10]).map(lambda s: timedelta(seconds=s))
_HOLDERS = st.sampled_from(["one", "two"])
_CALLS = st.one_of(
    st.tuples(st.just("get"), _KEYS),
    st.tuples(
        st.just("put"), _KEYS, _VERSIONS, st.none() | _VERSIONS, st.none() | _SPANS
    ),
    st.tuples(st.just("delete"), _KEYS, st.none() | _VERSIONS),
    st.tuples(st.just("list"), st.sampled_from("ab")),
    st.tuples(st.just("take"), _KEYS),
    st.tuples(st.just("lease"), _KEYS, _HOLDERS, _SPANS),
    st.tuples(st.just("free"), _KEYS, _HOLDERS),
    st.tuples(st.just("sweep"), st.integers(1, 2)),
    st.tuples(st.just("wait"), st.integers(0, 4)),
)


async def answer(store: StorageBackend, call: tuple) -> object:
    name, *arguments = call
    if name == "put":
        key, version, expected, ttl = arguments
        value = b"%d" % version
        return await store.put(key, value, version=version, expected=expected, ttl=ttl)
    if name == "delete":
        return await store.delete(arguments[0], expected=arguments[1])
    return await getattr(store, name)(*arguments)


@settings(max_examples=60, deadline=None, database=None)
@given(calls=st.lists(_CALLS, min_size=10, max_size=60))
def test_both_backends_answer_alike(calls: list[tuple]) -> None:
    """Whatever is called in whatever order, memory and SQLite say the same."""

    async def run(url: str) -> None:
        clock = Clock()
        memory, sql = MemoryBackend(clock=clock), SQLBackend(url, clock=clock)
        await sql.open()
        try:
            for call in calls:
                if call[0] == "wait":
                    clock.now += call[1]
                else:
                    assert await answer(memory, call) == await answer(sql, call)
        finally:
            await sql.close()

    with TemporaryDirectory() as directory:
        asyncio.run(asyncio.wait_for(run(f"sqlite:///{directory}/store.db"), 20))


# URLs


def test_url_names_the_backend(tmp_path: Path) -> None:
    """A URL opens nothing; it only says which store is meant."""
    assert isinstance(storage_from_url("memory://"), MemoryBackend)
    file = tmp_path / "a.db"
    for scheme in ("sqlite", "sqlite+aiosqlite"):
        assert isinstance(storage_from_url(f"{scheme}:///{file}"), SQLBackend)
    assert not file.exists()


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("sqlite://", "memory://"),
        ("sqlite:///", "memory://"),
        ("sqlite:///:memory:", "memory://"),
        ("sqlite://relative.db", "sqlite:///relative"),
        ("sqlite:///a.db?mode=hunter2", "nothing else"),
        ("mysql://u:hunter2@host/db", "known are memory://"),
        ("memory://hunter2", "known are memory://"),
        ("hunter2", "known are memory://"),
        ("", "known are memory://"),
    ],
)
def test_url_that_names_no_store_is_refused(url: str, text: str) -> None:
    """The error names what can be used, and not the URL with its password."""
    with pytest.raises(ConfigurationError, match=text) as caught:
        storage_from_url(url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("url", ["mysql://u:hunter2@h/db", "hunter2"])
def test_sql_backend_refuses_what_is_not_sql(url: str) -> None:
    """The class itself says what it supports."""
    with pytest.raises(ConfigurationError, match="only SQLite and Postgre") as caught:
        SQLBackend(url)
    assert "hunter2" not in str(caught.value)


def test_importing_the_package_does_not_import_sqlalchemy() -> None:
    """Who keeps sessions elsewhere does not pay for SQLAlchemy."""
    import subprocess

    code = (
        "import sys, langchain_pocket_auth.storage as s; s.storage_from_url('memory://');"
        "sys.exit('sqlalchemy' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


# The file


async def test_files_are_for_their_user_only(sql: SQLBackend, path: Path) -> None:
    """Directory 0700, database, log and index 0600."""
    await sql.put(KEY, b"a", version=1, expected=None)
    assert mode(path.parent) == 0o700
    files = list(path.parent.iterdir())
    assert len(files) == 3
    assert {mode(file) for file in files} == {0o600}


def test_files_that_are_there_keep_their_modes(tmp_path: Path) -> None:
    """What the operator set up is not changed."""
    file = tmp_path / "mine.db"
    file.touch()
    file.chmod(0o640)
    tmp_path.chmod(0o750)

    async def run() -> None:
        backend = SQLBackend(f"sqlite:///{file}")
        await backend.open()
        await backend.close()

    asyncio.run(run())
    assert mode(file) == 0o640
    assert mode(tmp_path) == 0o750


async def test_relative_path_is_of_the_directory_at_construction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changing the directory afterwards does not move the store."""
    monkeypatch.chdir(tmp_path)
    backend = SQLBackend("sqlite:///here.db")
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    await backend.open()
    await backend.close()
    assert (tmp_path / "here.db").exists()


async def test_log_is_written_ahead_and_to_the_disk(sql: SQLBackend) -> None:
    """WAL, synced at each commit: an acknowledged token survives a power cut."""
    writer = sql._database._writer
    assert list(await writer.execute_fetchall("PRAGMA journal_mode")) == [("wal",)]
    assert list(await writer.execute_fetchall("PRAGMA synchronous")) == [(2,)]
    for driver in (writer, sql._database._reader):
        assert list(await driver.execute_fetchall("PRAGMA busy_timeout")) == [(10000,)]


async def test_records_survive_reopening(sql: SQLBackend) -> None:
    """A store that was closed can be opened again, and has lost nothing."""
    await sql.put(KEY, b"a", version=1, expected=None)
    await sql.close()
    await sql.close()
    with pytest.raises(StorageUnavailable, match="not open"):
        await sql.get(KEY)
    with pytest.raises(StorageUnavailable, match="not open"):
        await sql.put(KEY, b"b", version=2, expected=1)
    await sql.open()
    assert await sql.get(KEY) == Record(1, b"a")


async def test_sweep_uses_the_index(sql: SQLBackend) -> None:
    """Finding what has expired does not read the table."""
    query = "SELECT 1 FROM pocket_auth_records WHERE expires_at <= 5 LIMIT 1"
    plan = await sql._database._reader.execute_fetchall(f"EXPLAIN QUERY PLAN {query}")
    assert "SEARCH" in str([tuple(row) for row in plan])


async def test_newer_schema_is_left_alone(sql: SQLBackend, path: Path) -> None:
    """An old package refuses tables of a new one and says what to do."""
    await sql.close()
    with sqlite3.connect(path) as database:
        database.execute("UPDATE pocket_auth_schema SET version = 2")
        database.execute("DROP TABLE pocket_auth_records")
    database.close()
    with pytest.raises(ConfigurationError, match="upgrade the package"):
        await sql.open()
    with sqlite3.connect(path) as database:
        names = database.execute("SELECT name FROM sqlite_schema").fetchall()
    database.close()
    assert names == [("pocket_auth_schema",)]


async def test_old_sqlite_is_named(path: Path, monkeypatch) -> None:
    """RHEL 9's SQLite is 3.34 and has no RETURNING; that is said at once."""
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 34, 1))
    with pytest.raises(ConfigurationError, match=r"3\.35 or newer"):
        await SQLBackend(f"sqlite:///{path}").open()


# Outages


@pytest.mark.parametrize("broken", ["directory", "under a file", "no database"])
async def test_store_that_cannot_be_opened_is_unavailable(
    tmp_path: Path, broken: str
) -> None:
    """The operator reads why; the original error is the cause."""
    file = tmp_path / "store.db"
    if broken == "directory":
        file.mkdir()
    elif broken == "under a file":
        file.touch()
        file = file / "store.db"
    else:
        file.write_bytes(b"this is not a database, but long enough to be one" * 100)
    backend = SQLBackend(f"sqlite:///{file}")
    with pytest.raises(StorageUnavailable, match="does not answer") as caught:
        await backend.open()
    assert caught.value.__cause__ is not None
    with pytest.raises(StorageUnavailable, match="not open"):
        await backend.get(KEY)


@pytest.mark.parametrize("function", ["mkdir", "open", "access"])
async def test_file_nobody_may_write_to_is_unavailable(
    monkeypatch: pytest.MonkeyPatch, path: Path, function: str
) -> None:
    """What the system forbids is an outage too (root, in CI, may write anywhere)."""

    def refuse(*_: object, **__: object) -> bool:
        if function == "access":
            return False
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, function, refuse)
    with pytest.raises(StorageUnavailable, match="Permission denied"):
        await SQLBackend(f"sqlite:///{path}").open()


async def test_outage_while_open_shows_no_values(sql: SQLBackend, path: Path) -> None:
    """A table that vanished is an outage, not an absent record."""
    with sqlite3.connect(path) as database:
        database.execute("DROP TABLE pocket_auth_records")
    database.close()
    for call in (
        sql.get(("hunter2", "hunter2")),
        sql.list("hunter2"),
        sql.put(("hunter2", "hunter2"), b"hunter2", version=1, expected=None),
    ):
        with pytest.raises(StorageUnavailable, match="no such table") as caught:
            await call
        assert isinstance(caught.value.__cause__, sqlite3.Error)
        assert "hunter2" not in f"{caught.value}{caught.value.__cause__}"


async def test_unreadable_text_is_not_quoted(sql: SQLBackend, path: Path) -> None:
    """Errors that `sqlite3` words itself may quote a column, so they are only named."""
    with sqlite3.connect(path) as database:
        database.execute(
            "INSERT INTO pocket_auth_records (namespace, name, version, value)"
            " VALUES ('owner', CAST(x'68756e74657232ff' AS TEXT), 1, x'00')"
        )
    database.close()
    with pytest.raises(StorageUnavailable, match="OperationalError") as caught:
        await sql.list("owner")
    assert "hunter2" not in str(caught.value)


async def test_wrong_type_of_the_caller_is_not_an_outage(sql: SQLBackend) -> None:
    """Only the store's own failures are translated."""
    with pytest.raises(OverflowError):
        await sql.put(KEY, b"a", version=2**70, expected=None)


async def test_nothing_is_logged_of_what_is_stored(
    sql: SQLBackend, caplog: pytest.LogCaptureFixture
) -> None:
    """Not even aiosqlite's and SQLAlchemy's debug logs show keys or values."""
    caplog.set_level(logging.DEBUG)
    await sql.put(("hunter2", "hunter2"), b"hunter2", version=1, expected=None)
    assert await sql.lease(("hunter2", "hunter2"), "hunter2", timedelta(seconds=9))
    assert await sql.take(("hunter2", "hunter2")) == Record(1, b"hunter2")
    assert caplog.records
    assert "hunter2" not in caplog.text


# Hops and waits


async def test_each_call_is_one_hop(sql: SQLBackend, monkeypatch) -> None:
    """A call costs one visit to a connection's thread: not two, not four."""
    hops = 0
    for driver in (sql._database._reader, sql._database._writer):

        async def counted(*arguments: object, execute=driver._execute) -> object:
            nonlocal hops
            hops += 1
            return await execute(*arguments)

        monkeypatch.setattr(driver, "_execute", counted)
    second = timedelta(seconds=1)
    for call in (
        sql.get(KEY),
        sql.put(KEY, b"a", version=1, expected=None, ttl=second),
        sql.put(KEY, b"b", version=2, expected=1),
        sql.lease(KEY, "one", second),
        sql.free(KEY, "one"),
        sql.list("owner"),
        sql.take(KEY),
        sql.delete(KEY),
        sql.sweep(),
    ):
        hops = 0
        await call
        assert hops == 1


async def test_readers_do_not_wait_for_a_writer(sql: SQLBackend, path: Path) -> None:
    """While another process writes, `get` answers; `put` waits its turn."""
    await sql.put(KEY, b"a", version=1, expected=None)
    other = sqlite3.connect(path, isolation_level=None)
    try:
        other.execute("BEGIN IMMEDIATE")
        put = asyncio.create_task(sql.put(KEY, b"b", version=2, expected=1))
        async with asyncio.timeout(5):
            assert await sql.get(KEY) == Record(1, b"a")
            assert not put.done()
            other.execute("COMMIT")
            assert await put is True
            assert await sql.get(KEY) == Record(2, b"b")
    finally:
        other.close()


async def test_writer_that_never_ends_is_an_outage(sql: SQLBackend, path: Path) -> None:
    """Who waits in vain is told so, and nothing was changed."""
    await sql._database._writer.execute_fetchall("PRAGMA busy_timeout=50")
    other = sqlite3.connect(path, isolation_level=None)
    try:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageUnavailable, match="locked"):
            await sql.put(KEY, b"b", version=2, expected=None)
    finally:
        other.close()
    assert await sql.get(KEY) is None


@pytest.mark.parametrize("lock", ["reads", "writes"])
async def test_file_locked_by_another_program_is_an_outage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lock: str
) -> None:
    """Opening gives up on a lock that does not end."""
    monkeypatch.setattr(_sqlite, "BUSY_TIMEOUT_S", 0.05)
    file = tmp_path / "locked.db"
    with locked(file, lock), pytest.raises(StorageUnavailable, match="locked"):
        await SQLBackend(f"sqlite:///{file}").open()


@pytest.mark.parametrize("lock", ["reads", "writes"])
async def test_opening_waits_for_another_program(tmp_path: Path, lock: str) -> None:
    """A lock that ends only delays."""
    file = tmp_path / "locked.db"
    backend = SQLBackend(f"sqlite:///{file}")
    with locked(file, lock):
        opening = asyncio.create_task(backend.open())
        await asyncio.wait([opening], timeout=0.1)
        assert not opening.done()
    async with asyncio.timeout(10):
        await opening
    await backend.close()


async def test_wal_is_tried_again_when_sqlite_does_not_wait(tmp_path: Path) -> None:
    """Processes that open a new file at once may be refused at once (no busy wait)."""
    file = tmp_path / "locked.db"
    async with aiosqlite.connect(file, isolation_level=None, timeout=0) as driver:
        with locked(file, "reads"):
            setting_up = asyncio.create_task(_sqlite._set_up(driver))
            await asyncio.wait([setting_up], timeout=0.1)
            assert not setting_up.done()
        async with asyncio.timeout(5):
            await setting_up
        assert list(await driver.execute_fetchall("PRAGMA journal_mode")) == [("wal",)]


async def test_cancelled_call_leaves_the_store_usable(
    sql: SQLBackend, path: Path
) -> None:
    """Who stops waiting for a write breaks nothing for the next."""
    other = sqlite3.connect(path, isolation_level=None)
    try:
        other.execute("BEGIN IMMEDIATE")
        put = asyncio.create_task(sql.put(KEY, b"b", version=2, expected=None))
        await asyncio.sleep(0)
        put.cancel()
        with pytest.raises(asyncio.CancelledError):
            await put
        other.execute("COMMIT")
    finally:
        other.close()
    async with asyncio.timeout(5):
        assert await sql.put(("owner", "next"), b"n", version=1, expected=None)
    # The statement was on its way: it happened whole, or not at all.
    assert await sql.get(KEY) in (None, Record(2, b"b"))


# Several processes

_barrier = None


def _remember(barrier) -> None:
    global _barrier  # noqa: PLW0603 - set once in each process
    _barrier = barrier


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessPoolExecutor]:
    """Four processes whose tasks start at the same moment."""
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(4)
    with ProcessPoolExecutor(4, spawn, _remember, (barrier,)) as pool:
        yield pool


def _increment(url: str, times: int) -> int:
    async def run() -> int:
        store, lost = SQLBackend(url), 0
        await store.open()
        try:
            for _ in range(times):
                while True:
                    record = await store.get(KEY)
                    before = record.version if record else None
                    after = (before or 0) + 1
                    count = b"%d" % (int(record.value) + 1 if record else 1)
                    if await store.put(KEY, count, version=after, expected=before):
                        break
                    lost += 1
        finally:
            await store.close()
        return lost

    _barrier.wait(20)
    return asyncio.run(asyncio.wait_for(run(), 20))


def _take_all(url: str, names: list[str]) -> list[str]:
    async def run() -> list[str]:
        store = SQLBackend(url)
        await store.open()
        try:
            return [name for name in names if await store.take(("states", name))]
        finally:
            await store.close()

    _barrier.wait(20)
    return asyncio.run(asyncio.wait_for(run(), 20))


async def test_no_increment_of_four_processes_is_lost(
    processes: ProcessPoolExecutor, path: Path
) -> None:
    """Four processes open a new file at once and count to 100 together."""
    url = f"sqlite:///{path}"
    tasks = [processes.submit(_increment, url, 25) for _ in range(4)]
    await asyncio.gather(*map(asyncio.wrap_future, tasks))
    store = SQLBackend(url)
    await store.open()
    assert await store.get(KEY) == Record(100, b"100")
    await store.close()


async def test_each_record_is_taken_by_one_process(
    processes: ProcessPoolExecutor, path: Path
) -> None:
    """A state is answered once, whichever worker gets the callback."""
    url, names = f"sqlite:///{path}", [f"{number}" for number in range(50)]
    store = SQLBackend(url)
    await store.open()
    for name in names:
        await store.put(("states", name), b"s", version=1, expected=None)
    tasks = [processes.submit(_take_all, url, names) for _ in range(4)]
    taken = await asyncio.gather(*map(asyncio.wrap_future, tasks))
    assert sorted(chain(*taken)) == sorted(names)
    assert await store.list("states") == {}
    await store.close()
