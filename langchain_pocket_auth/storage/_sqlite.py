"""What is SQLite's alone: its file, its two connections, one thread hop a call."""

from __future__ import annotations

import asyncio
import errno
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Double, bindparam, make_url
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.pool import NullPool
from sqlalchemy.sql import ClauseElement

from .._errors import ConfigurationError, StorageUnavailable
from ._statements import Statements

BUSY_TIMEOUT_S = 10.0
"""How long a call waits while another process writes."""

_OLDEST = (3, 35)  # RETURNING


class SQLiteFile:
    """
    A database file, opened twice: whoever reads does not wait for writers.

    SQLAlchemy makes the connections and the tables. Statements go to aiosqlite
    directly, whose `execute_fetchall` is one hop to its thread and back; through
    SQLAlchemy's adapter the same statement is four (cursor, execute, fetch,
    close). A cancelled call leaves nothing open: each statement is its own
    transaction.
    """

    statements = Statements.of(sqlite.insert, bindparam("now", type_=Double))

    def __init__(self, url: str, clock: Callable[[], float] | None = None) -> None:
        self._path = _path_of(url)
        self._clock = clock or time.time
        self._opened = AsyncExitStack()
        self._reader: Any = None
        self._writer: Any = None

    async def open(self, migrate: Callable[[Connection], None]) -> None:
        """Connect, and let *migrate* work while no other process can."""
        if sqlite3.sqlite_version_info < _OLDEST:
            raise ConfigurationError(
                f"this Python has SQLite {sqlite3.sqlite_version}, and 3.35 or newer "
                "is needed: use another Python, or memory://"
            )
        async with AsyncExitStack() as stack:
            with _outages():
                # A thread: LangGraph servers refuse file access on any loop.
                await asyncio.to_thread(_create_privately, self._path)
                engine = create_async_engine(
                    URL.create("sqlite+aiosqlite", database=str(self._path)),
                    poolclass=NullPool,  # two connections are held instead
                    pool_reset_on_return=None,
                    hide_parameters=True,
                    # No isolation level: sqlite3 then begins nothing of its own.
                    connect_args={"timeout": BUSY_TIMEOUT_S, "isolation_level": None},
                )
                writer = await stack.enter_async_context(engine.connect())
                reader = await stack.enter_async_context(engine.connect())
                await _set_up(await _driver(writer))
                # All processes that open at once pass here one by one.
                await writer.exec_driver_sql("BEGIN IMMEDIATE")
                await writer.run_sync(migrate)
                await writer.commit()
                self._writer = await _driver(writer)
                self._reader = await _driver(reader)
            self._opened = stack.pop_all()

    async def close(self) -> None:
        self._reader = self._writer = None
        opened, self._opened = self._opened, AsyncExitStack()
        with _outages():
            await opened.aclose()

    async def read(
        self, statement: ClauseElement, parameters: Mapping[str, Any]
    ) -> Sequence[Any]:
        return await self._run(self._reader, statement, parameters)

    async def write(
        self, statement: ClauseElement, parameters: Mapping[str, Any]
    ) -> Sequence[Any]:
        return await self._run(self._writer, statement, parameters)

    async def _run(
        self, driver: Any, statement: ClauseElement, parameters: Mapping[str, Any]
    ) -> Sequence[Any]:
        if driver is None:
            raise StorageUnavailable("the SQLite store is not open")
        with _outages():
            rows: Sequence[Any] = await driver.execute_fetchall(
                _text(statement), _Hidden(parameters, now=self._clock())
            )
            return rows


class _Hidden(dict[str, Any]):
    """Parameters that aiosqlite's debug log cannot show."""

    def __repr__(self) -> str:
        return "<hidden>"


@cache
def _text(statement: ClauseElement) -> str:
    return str(statement.compile(dialect=sqlite.dialect(paramstyle="named")))


async def _driver(connection: AsyncConnection) -> Any:
    return (await connection.get_raw_connection()).driver_connection


async def _set_up(driver: Any) -> None:
    # FULL: NORMAL may forget the last writes in a power cut, and a rotated
    # refresh token that is forgotten is a session that is lost.
    await driver.execute_fetchall("PRAGMA synchronous=FULL")
    deadline = asyncio.get_running_loop().time() + BUSY_TIMEOUT_S
    while True:
        try:
            await driver.execute_fetchall("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            # SQLite does not wait here while another process does the same.
            if (
                error.sqlite_errorcode != sqlite3.SQLITE_BUSY
                or asyncio.get_running_loop().time() > deadline
            ):
                raise
            await asyncio.sleep(0.01)
        else:
            return


def _path_of(url: str) -> Path:
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # the latter for what is no port
        parsed = URL.create("unreadable")
    if parsed.drivername not in {"sqlite", "sqlite+aiosqlite"}:
        raise ConfigurationError(
            "a file's URL is sqlite:///path/to/file.db, and its driver aiosqlite"
        )
    if parsed.host or parsed.query:
        raise ConfigurationError(
            "a sqlite:// URL is a path and nothing else: sqlite:///relative/path.db "
            "or sqlite:////absolute/path.db"
        )
    if not parsed.database or parsed.database == ":memory:":
        raise ConfigurationError(
            "a sqlite:// URL needs the path of a file; to keep nothing, use memory://"
        )
    return Path(parsed.database).absolute()


def _create_privately(path: Path) -> None:
    """Create file and directory for this user only, if they are missing."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Never open a file that is there: to close it again would drop the locks
    # that SQLite holds on it in this process (sqlite.org/howtocorrupt.html, 2.2).
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    # What aiosqlite cannot connect to leaves it a thread that speaks to a loop
    # which may be closed by then; so the usual reasons are found here.
    if not path.is_file():
        raise OSError(errno.EINVAL, "its path is not a file")
    if not os.access(path, os.R_OK | os.W_OK):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))


@contextmanager
def _outages() -> Iterator[None]:
    """Say `StorageUnavailable` for what the system, SQLite or SQLAlchemy raise."""
    try:
        yield
    except (OSError, sqlite3.Error, SQLAlchemyError) as error:
        cause = error.orig if isinstance(error, DBAPIError) else error
        # Only SQLite's own texts are known to quote no stored value.
        detail = (
            f"{cause} ({cause.sqlite_errorname})"
            if isinstance(cause, sqlite3.Error) and hasattr(cause, "sqlite_errorname")
            else cause.strerror or type(cause).__name__
            if isinstance(cause, OSError)
            else type(cause).__name__
        )
        raise StorageUnavailable(
            f"the SQLite store does not answer: {detail}"
        ) from error
