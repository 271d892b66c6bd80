"""PostgreSQL keeps the storage contract, and what is its alone."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shutil
import sqlite3
import subprocess
import sys
import textwrap
import time
import traceback
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from itertools import product
from pathlib import Path
from subprocess import PIPE
from typing import Any

import psycopg
import pytest
from databases import Postgres
from sqlalchemy import Connection, text
from support import BOUND_S, KEYS, Clock, connect, state, token, until

from langchain_pocket_auth import PocketAuth
from langchain_pocket_auth._errors import ConfigurationError, StorageUnavailable
from langchain_pocket_auth.storage import (
    Record,
    StorageBackend,
    _postgres,
    _postgres_errors,
    _schema,
    storage_from_url,
)
from langchain_pocket_auth.storage.sql import SQLBackend
from langchain_pocket_auth.testing import AuthorizationServer, Browser
from langchain_pocket_auth.testing._conformance import StorageConformance

KEY = ("owner", "name")
LONG = timedelta(minutes=1)
SECRET = "hunter2/ä@?"


@pytest.fixture(scope="module")
def database(postgres_server: Postgres) -> str:
    """A database that the tests of this module share."""
    return postgres_server.fresh()


@pytest.fixture
async def store(postgres_server: Postgres, database: str) -> AsyncIterator[SQLBackend]:
    """An opened store without records."""
    backend = SQLBackend(postgres_server.url(database))
    await backend.open()
    postgres_server.execute("TRUNCATE pocket_auth_records", database)
    yield backend
    await backend.close()


def pool(store: SQLBackend) -> Any:
    """Return SQLAlchemy's pool."""
    return store._database._engine.pool


async def raw(store: SQLBackend, statement: str) -> list[Any]:
    """Run a statement on a connection of the store."""
    async with store._database._engine.connect() as connection:
        result = await connection.exec_driver_sql(statement)
        return list(result) if result.returns_rows else []


def said(error: BaseException | None) -> str:
    """Return all that a log or a tracker could show of an error."""
    return "".join(traceback.format_exception(error, chain=True)) + repr(error)


class TestPostgres(StorageConformance):
    shared = True

    @pytest.fixture(autouse=True)
    def _database(self, postgres_server: Postgres, database: str) -> None:
        self.url = postgres_server.url(database)

    async def open_backend(self) -> StorageBackend:
        backend = storage_from_url(self.url)
        await backend.open()
        return backend


# The pocket


async def test_pocket_lives_on_postgres(
    make_pocket: Callable[..., PocketAuth],
    postgres_server: Postgres,
    server: AuthorizationServer,
    alice: Browser,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Consent outlives the process; the next one renews; no secret is in the clear."""
    database = postgres_server.fresh()
    url = postgres_server.url(database)
    first = make_pocket(url, keys=KEYS)
    granted = await connect(first, alice, "read")
    base = first.base_url
    first.close()
    clock = Clock(monkeypatch)
    second = make_pocket(url, keys=KEYS, base_url=base)
    clock.forward(3570)
    renewed = await token(second, "read")
    assert renewed.access_token != granted.access_token
    assert await state(second, "read") == "SKIP_AUTH"
    stored = str(postgres_server.execute("TABLE pocket_auth_records", database))
    assert "pocket_auth" not in stored
    for context in (granted, renewed):
        assert context.access_token not in stored


# URLs and drivers


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
async def test_every_usual_url_opens(
    postgres_server: Postgres, database: str, scheme: str
) -> None:
    """Platforms hand out `postgres://`, SQLAlchemy's users name the driver."""
    url = postgres_server.url(database).replace("postgresql", scheme)
    backend = storage_from_url(url)
    await backend.open()
    assert await backend.get(KEY) is None
    await backend.close()


@pytest.mark.parametrize(
    ("url", "remedy"),
    [
        ("postgresql+asyncpg://u:hunter2@h/db", "driver psycopg or none"),
        ("postgresql://u:hunter2@h:port/db", "as %40"),
        ("postgresql://u:hunter1@hunter2@h/db", "as %40"),
        ("postgresql://u:hunter2@h/db?pgbouncer=hunter2", "libpq does not know"),
    ],
)
def test_url_that_cannot_work_is_refused(url: str, remedy: str) -> None:
    """What is wrong with a URL is said before anything connects, without the URL."""
    with pytest.raises(ConfigurationError, match=remedy) as caught:
        storage_from_url(url)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__context__ is None


def test_clock_of_the_caller_is_refused() -> None:
    """Lifetimes and leases follow the database's clock alone."""
    with pytest.raises(ConfigurationError, match="its own clock"):
        SQLBackend("postgresql://h/db", clock=lambda: 0.0)


def test_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has not installed the extra is told how."""
    monkeypatch.setitem(sys.modules, "psycopg", None)
    for module in (_postgres, _postgres_errors):
        monkeypatch.delitem(sys.modules, module.__name__)
    for _ in range(2):
        with pytest.raises(ConfigurationError, match="pip install") as caught:
            storage_from_url("postgresql://h/db")
        assert '"langchain-pocket-auth[postgres]"' in str(caught.value)


# Tables


def table(store_url: str) -> list[str]:
    """Return the columns of the records."""
    with psycopg.connect(store_url) as connection:
        cursor = connection.execute("SELECT * FROM pocket_auth_records LIMIT 0")
        return [column.name for column in cursor.description or ()]


async def test_processes_that_open_at_once_make_one_set_of_tables(
    postgres_server: Postgres,
) -> None:
    """Eight replicas start on an empty database; all of them run."""
    url = postgres_server.url(postgres_server.fresh())
    code = f"""
        import asyncio, sys
        from langchain_pocket_auth.storage import storage_from_url

        async def main():
            await asyncio.gather(*(store.open() for store in stores))
            for store in stores:
                await store.put(("o", "n"), b"", version=1, expected=None)
                await store.close()

        stores = [storage_from_url({url!r}) for _ in range(4)]
        print("ready", flush=True)
        sys.stdin.readline()
        asyncio.run(main())
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    other = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE)
    assert other.stdout is not None
    assert await other.stdout.readline() == b"ready\n"
    stores = [storage_from_url(url) for _ in range(4)]
    opening = [asyncio.create_task(store.open()) for store in stores]
    await other.communicate(b"\n")
    await asyncio.gather(*opening)
    assert other.returncode == 0
    for store in stores:
        assert await store.get(("o", "n")) == Record(1, b"")
        await store.close()
    with psycopg.connect(url) as connection:
        versions = connection.execute("TABLE pocket_auth_schema").fetchall()
    assert versions == [(_schema.SCHEMA_VERSION,)]


async def test_role_that_may_not_create_tables_works_in_those_there_are(
    postgres_server: Postgres,
) -> None:
    """An administrator opens the store once; the app needs four rights."""
    database = postgres_server.fresh()
    postgres_server.execute(f"CREATE ROLE app LOGIN PASSWORD '{SECRET}'")
    app = SQLBackend(postgres_server.url(database, user="app", password=SECRET))
    with pytest.raises(StorageUnavailable, match="GRANT SELECT, INSERT") as caught:
        await app.open()
    assert SECRET not in said(caught.value)

    administrator = SQLBackend(postgres_server.url(database))
    await administrator.open()
    await administrator.close()
    with pytest.raises(StorageUnavailable, match="GRANT SELECT, INSERT"):
        await app.open()
    postgres_server.execute(
        "GRANT SELECT, INSERT, UPDATE, DELETE ON pocket_auth_schema, "
        "pocket_auth_records TO app",
        database,
    )
    await app.open()
    assert await app.put(KEY, b"a", version=1, expected=None, ttl=timedelta())
    assert await app.put(KEY, b"a", version=1, expected=None)
    assert await app.lease(KEY, "one", LONG)
    assert await app.take(KEY) == Record(1, b"a")
    assert await app.sweep() == 0
    await app.close()


async def test_search_path_of_the_url_says_where_the_tables_are(
    postgres_server: Postgres,
) -> None:
    """Two schemas of one database are two stores."""
    database, stores = postgres_server.fresh(), []
    for name in ("one", "two"):
        postgres_server.execute(f"CREATE SCHEMA {name}", database)
        options = f"-csearch_path={name}"
        store = SQLBackend(postgres_server.url(database, options=options))
        await store.open()
        await store.put(KEY, name.encode(), version=1, expected=None)
        stores.append(store)
    for store, name in zip(stores, ("one", "two"), strict=True):
        assert await store.get(KEY) == Record(1, name.encode())
        await store.close()
    found = "SELECT schemaname FROM pg_tables WHERE tablename = 'pocket_auth_records'"
    assert sorted(postgres_server.execute(found, database)) == [("one",), ("two",)]


async def test_database_of_another_encoding_is_refused(
    postgres_server: Postgres,
) -> None:
    """Names of owners may be any text, which LATIN1 does not keep."""
    name = "latin"
    postgres_server.execute(
        f"CREATE DATABASE {name} ENCODING 'LATIN1' TEMPLATE template0 LOCALE 'C'"
    )
    with pytest.raises(ConfigurationError, match="ENCODING 'UTF8'"):
        await SQLBackend(postgres_server.url(name)).open()


# As version 1 of the package made them. Never to be changed: stores look like this.
FIRST = {
    "sqlite": """
        CREATE TABLE pocket_auth_schema (version INTEGER NOT NULL PRIMARY KEY);
        CREATE TABLE pocket_auth_records (
            namespace TEXT NOT NULL, name TEXT NOT NULL, version BIGINT NOT NULL,
            value BLOB NOT NULL, expires_at DOUBLE, lease_holder TEXT,
            lease_until DOUBLE, PRIMARY KEY (namespace, name)
        ) WITHOUT ROWID;
        CREATE INDEX pocket_auth_records_expires_at ON pocket_auth_records (expires_at)
            WHERE expires_at IS NOT NULL;
        INSERT INTO pocket_auth_schema VALUES (1);
        INSERT INTO pocket_auth_records VALUES ('owner','name',7,x'00ff',NULL,NULL,NULL)
    """,
    "postgresql": """
        CREATE TABLE pocket_auth_schema (version INTEGER NOT NULL PRIMARY KEY);
        CREATE TABLE pocket_auth_records (
            namespace TEXT COLLATE "C" NOT NULL, name TEXT COLLATE "C" NOT NULL,
            version BIGINT NOT NULL, value BYTEA NOT NULL, expires_at DOUBLE PRECISION,
            lease_holder TEXT, lease_until DOUBLE PRECISION,
            PRIMARY KEY (namespace, name)
        );
        CREATE INDEX pocket_auth_records_expires_at ON pocket_auth_records (expires_at)
            WHERE expires_at IS NOT NULL;
        INSERT INTO pocket_auth_schema VALUES (1);
        INSERT INTO pocket_auth_records VALUES
            ('owner','name',7,'\\x00ff',NULL,NULL,NULL)
    """,
}


@pytest.fixture(params=["sqlite", "postgresql"])
def first_version(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a store that version 1 of the tables is in, with a record."""
    if request.param == "sqlite":
        with sqlite3.connect(tmp_path / "first.db") as connection:
            connection.executescript(FIRST["sqlite"])
        connection.close()
        return f"sqlite:///{tmp_path}/first.db"
    server: Postgres = request.getfixturevalue("postgres_server")
    database = server.fresh()
    server.execute(FIRST["postgresql"], database)
    return server.url(database)


def add(column: str) -> Callable[[Connection], None]:
    """Return a migration."""

    def migration(connection: Connection) -> None:
        statement = f"ALTER TABLE pocket_auth_records ADD COLUMN {column} INTEGER"
        connection.execute(text(statement))

    return migration


async def test_stores_are_brought_up_to_date(
    first_version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From version 1 each step is taken once, in order, and records stay."""
    store, rival = SQLBackend(first_version), SQLBackend(first_version)
    await store.open()
    assert await store.get(KEY) == Record(7, b"\x00\xff")
    monkeypatch.setattr(_schema, "SCHEMA_VERSION", 3)
    monkeypatch.setattr(_schema, "MIGRATIONS", {1: add("second"), 2: add("third")})
    await store.close()
    await asyncio.gather(store.open(), rival.open())
    for one in (store, rival):
        assert await one.get(KEY) == Record(7, b"\x00\xff")
        await one.close()
    monkeypatch.setattr(_schema, "SCHEMA_VERSION", 1)
    with pytest.raises(ConfigurationError, match=r"has schema 3.*upgrade the package"):
        await store.open()
    with pytest.raises(StorageUnavailable, match="not open"):
        await store.get(KEY)


async def test_migration_that_fails_changes_nothing(
    first_version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All steps happen, or none."""
    store = SQLBackend(first_version)
    monkeypatch.setattr(_schema, "SCHEMA_VERSION", 3)
    monkeypatch.setattr(_schema, "MIGRATIONS", {1: add("second"), 2: add("second")})
    with pytest.raises(StorageUnavailable):
        await store.open()
    monkeypatch.undo()
    await store.open()
    assert await store.get(KEY) == Record(7, b"\x00\xff")
    await store.close()


# Connections


async def test_connections_are_bounded(
    postgres_server: Postgres, database: str
) -> None:
    """A hundred calls at once share three connections."""
    store = SQLBackend(
        postgres_server.url(database, application_name="bounded"), pool_size=3
    )
    await store.open()
    calls = [
        store.put(("bounded", f"{n}"), b"v", version=n, expected=None)
        for n in range(100)
    ]
    assert all(await asyncio.gather(*calls))
    count = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'bounded'"
    assert 1 <= postgres_server.execute(count)[0][0] <= 3
    await store.close()


async def test_calls_survive_a_restart_of_the_server(
    postgres_server: Postgres, store: SQLBackend
) -> None:
    """What was stored is there; connections of before are replaced unnoticed."""
    await asyncio.gather(*(store.get(KEY) for _ in range(5)))
    assert pool(store).checkedin() > 1
    for version in (1, 2):
        postgres_server.restart(kill=version == 2)
        before = version - 1 or None
        assert await store.put(KEY, b"v", version=version, expected=before)
        calls = [store.get(KEY) for _ in range(10)]
        assert await asyncio.gather(*calls) == [Record(version, b"v")] * 10


async def test_outage_is_an_error_and_ends_by_itself(
    postgres_server: Postgres, store: SQLBackend
) -> None:
    """While the server is away every call says so; after that, none does."""
    await store.put(KEY, b"a", version=1, expected=None)
    postgres_server.stop()
    try:
        for call in (store.get, store.list, store.take):
            with pytest.raises(StorageUnavailable) as caught:
                await call("owner" if call == store.list else KEY)
            assert str(postgres_server.directory) not in said(caught.value)
            assert caught.value.__context__ is None
        with pytest.raises(StorageUnavailable, match=r"No such file|refused"):
            await SQLBackend(postgres_server.url()).open()
    finally:
        postgres_server.start()
    assert await store.take(KEY) == Record(1, b"a")


async def test_of_a_lost_answer_only_reads_are_repeated(
    postgres_server: Postgres, store: SQLBackend, database: str
) -> None:
    """A write that may have happened is not sent again; its caller reads."""
    await store.put(KEY, b"a", version=1, expected=None)
    with psycopg.connect(postgres_server.url(database)) as other:
        other.execute("LOCK TABLE pocket_auth_records")
        calls = [
            asyncio.create_task(call)
            for call in (store.get(KEY), store.put(KEY, b"b", version=2, expected=1))
        ]
        waiting = (
            "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock' "
            f"AND datname = '{database}'"
        )

        async def both_wait() -> bool:
            return len(postgres_server.execute(waiting)) == 2

        await until(both_wait)
        for (pid,) in postgres_server.execute(waiting):
            postgres_server.execute(f"SELECT pg_terminate_backend({pid})")
        with pytest.raises(StorageUnavailable, match="AdminShutdown"):
            await calls[1]
        assert not calls[0].done()
        other.rollback()
    assert await calls[0] == await store.get(KEY) == Record(1, b"a")


async def test_call_that_hangs_is_an_outage(
    postgres_server: Postgres, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every wait is bounded: for an answer, and for a connection; slots come back."""
    monkeypatch.setattr(_postgres, "CALL_TIMEOUT_S", 0.4)
    monkeypatch.setattr(_postgres, "FREE_TIMEOUT_S", 0.1)
    store, absent = SQLBackend(postgres_server.url(database), pool_size=1), ("o", "n")
    await store.open()
    with psycopg.connect(postgres_server.url(database)) as other:
        other.execute("LOCK TABLE pocket_auth_records")
        results = await asyncio.gather(
            store.get(absent), store.get(absent), return_exceptions=True
        )
        texts = sorted(map(str, results))
        assert texts[0].startswith("PostgreSQL did not answer within")
        assert texts[1].startswith("all 1 connections to PostgreSQL are in use")
        stopped = asyncio.create_task(store.get(absent))
        await asyncio.sleep(0.02)
        stopped.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stopped
    assert await store.get(absent) is None
    assert pool(store).checkedout() == 0
    await store.close()


async def test_nothing_stays_prepared(store: SQLBackend) -> None:
    """PgBouncer gives each statement another server, which knows no earlier one."""
    for version in range(10):
        await store.put(KEY, b"a", version=version, expected=version - 1 or None)
        await store.get(KEY)
    assert pool(store).size() == 10
    assert await raw(store, "SELECT * FROM pg_prepared_statements") == []


# What it does not say


async def test_wrong_password_shows_nowhere(
    postgres_server: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    """The reason is told; neither password, user, address nor database are."""
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, logger="sqlalchemy")
    store = SQLBackend(postgres_server.url("private", user="someone", password=SECRET))
    with pytest.raises(StorageUnavailable, match="authentication failed") as caught:
        await store.open()
    assert "Error on connect" in caplog.text
    for hidden in (SECRET, "hunter2"):
        assert hidden not in caplog.text + repr(store)
    for hidden in (SECRET, "hunter2", "someone", "private", "127.0.0.1"):
        assert hidden not in str(caught.value)
    assert caught.value.__context__ is None


async def test_nothing_of_what_is_stored_is_said(
    postgres_server: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither in debug logs nor in errors."""
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, logger="sqlalchemy")
    database = postgres_server.fresh()
    store = SQLBackend(postgres_server.url(database))
    key = secrets.token_hex(), secrets.token_hex()
    value, holder = key[1].encode(), key[0]
    await store.open()
    await store.put(key, value, version=1, expected=None)
    assert await store.lease(key, holder, LONG)
    assert await store.get(key) == Record(1, value)
    postgres_server.execute(
        "ALTER TABLE pocket_auth_records ADD CHECK (version < 9)", database
    )
    with pytest.raises(StorageUnavailable, match="CheckViolation") as caught:
        await store.put(key, value, version=9, expected=1)
    postgres_server.execute("DROP TABLE pocket_auth_records", database)
    with pytest.raises(StorageUnavailable, match="its tables are gone") as gone:
        await store.take(key)
    assert caplog.records
    everything = said(caught.value) + said(gone.value) + caplog.text
    for hidden in key:
        assert hidden not in everything
    await store.close()


# Many records


async def test_every_call_uses_an_index(store: SQLBackend) -> None:
    """No call reads the table: a million records of others cost nothing."""
    fill = """
        INSERT INTO pocket_auth_records (namespace, name, version, value, expires_at)
        SELECT 'o' || n / 4, n::text, 1, '', CASE WHEN mod(n, 10) = 0 THEN n END
        FROM generate_series(1, 20000) n
    """
    for statement in (fill, "ANALYZE pocket_auth_records"):
        await raw(store, statement)
    values = {
        "in_namespace": "o7",
        "with_name": "30",
        "holder": "h",
        "expected": 1,
        "lifetime": 1.0,
        "new_value": b"",
        "new_version": 2,
    }
    statements = store._statements
    async with store._database._engine.connect() as connection:
        driver = await _postgres._driver(connection)
        for name, most in product(set(statements.__slots__) - {"create"}, (5, 1000)):
            query = f"EXPLAIN {_postgres._text(getattr(statements, name))}"
            found = await driver.execute(query, values | {"most": most})
            plan = str(await found.fetchall())
            assert "Index" in plan, (name, most, plan)
            assert "Seq Scan" not in plan, (name, most, plan)
    assert await store.sweep(limit=1500) == 1500
    assert await store.sweep(limit=1500) == 500


async def test_sweeping_spares_what_was_made_again(
    postgres_server: Postgres, store: SQLBackend, database: str
) -> None:
    """A record that comes back while two sweep is not swept; nobody waits."""
    for name in ("a", "b"):
        await store.put(("o", name), b"", version=1, expected=None, ttl=timedelta())
    with psycopg.connect(postgres_server.url(database)) as other:
        other.execute(
            "UPDATE pocket_auth_records SET expires_at = NULL WHERE name = 'a'"
        )
        assert await store.sweep() == 1
    assert await store.list("o") == {"a": Record(1, b"")}


# The servers of these tests


def test_server_ends_with_who_started_it(tmp_path: Path) -> None:
    """SIGKILL leaves no server; a package no other user can read is copied first."""
    package = Postgres()._package
    assert package is not None
    closed = tmp_path / "closed"
    for name in (package.name, f"{package.name}.libs"):
        shutil.copytree(
            package.with_name(name),
            closed / name,
            copy_function=_link,
            ignore=shutil.ignore_patterns("pginstall", "include", "*.a"),
        )
    closed.chmod(0o700)
    code = f"""
        import sys, time
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from databases import Postgres

        server = Postgres(Path({str(closed / package.name)!r})).__enter__()
        assert server.execute("SELECT 1") == [(1,)]
        print(server.process.pid, server.directory, flush=True)
        time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, stdout=PIPE, text=True) as child:
        assert child.stdout is not None
        pid, directory = child.stdout.readline().split()
        child.kill()
    deadline = time.monotonic() + BOUND_S
    while _lives(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _lives(pid)
    shutil.rmtree(directory)


def _link(source: str, to: str) -> None:
    try:
        os.link(source, to)
    except OSError:
        shutil.copy2(source, to)


def _lives(pid: str) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
