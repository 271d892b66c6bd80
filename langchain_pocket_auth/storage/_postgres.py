"""What is PostgreSQL's alone: a bounded pool of connections that heals itself."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import Any, TypeVar

from sqlalchemy import (
    URL,
    Connection,
    Double,
    cast,
    event,
    extract,
    func,
    literal_column,
    make_url,
    select,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import psycopg as driver
from sqlalchemy.exc import ArgumentError, DisconnectionError
from sqlalchemy.exc import TimeoutError as NoneFree
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.sql import ClauseElement

from .._errors import ConfigurationError, StorageUnavailable
from ._postgres_errors import FAILURES, StorageInterrupted, unavailable
from ._statements import Statements

CALL_TIMEOUT_S = 10.0
"""How long a call takes at most, connecting included."""
FREE_TIMEOUT_S = 5.0
"""How long of that it waits for others to be done with a connection."""
OPEN_TIMEOUT_S = 60.0
"""How long opening takes at most, with the wait for another process's migration."""

_NOW = cast(extract("epoch", func.clock_timestamp()), Double)
# A subquery is read once, so that an index can be searched for it.
_ONCE = select(_NOW).scalar_subquery()

# "pocket"; who migrates holds it until the transaction ends.
_LOCK = func.pg_advisory_xact_lock(0x706F636B6574)

# Names a dead peer within a minute, as a proxy's silence would not.
_KEEPALIVE = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}

T_ = TypeVar("T_")


class PostgresPool:
    """
    At most *size* connections, each used for one statement at a time.

    SQLAlchemy makes, keeps and hands out the connections; statements go to psycopg
    directly, so that no log of SQLAlchemy shows them. Each is its own transaction.

    Before a connection is used, its socket is looked at, which costs no round trip:
    nothing may come in on an idle connection but its end. So a server's restart is
    noticed before anything is sent. A connection that breaks later is replaced and
    a read repeated; of a write nobody knows whether it happened, so it is not.
    """

    statements = Statements.of(
        postgresql.insert, _NOW, once=_ONCE, row=literal_column("ctid")
    )

    def __init__(self, url: str, size: int) -> None:
        self._url, self._size = _parsed(url), size
        self._engine: AsyncEngine | None = None

    async def open(self, migrate: Callable[[Connection], None]) -> None:
        """Connect, and let *migrate* work while no other process can."""
        await self.close()
        engine = self._make_engine()
        try:
            await self._attempt(self._migrate(engine, migrate), OPEN_TIMEOUT_S)
        except BaseException:
            await engine.dispose()
            raise
        self._engine = engine

    async def close(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            await engine.dispose()

    async def read(
        self, statement: ClauseElement, parameters: Mapping[str, Any]
    ) -> Sequence[Any]:
        with suppress(StorageInterrupted):
            return await self.write(statement, parameters)
        return await self.write(statement, parameters)

    async def write(
        self, statement: ClauseElement, parameters: Mapping[str, Any]
    ) -> Sequence[Any]:
        if self._engine is None:
            raise StorageUnavailable("the PostgreSQL store is not open")
        run = self._run(self._engine, _text(statement), parameters)
        return await self._attempt(run, CALL_TIMEOUT_S)

    def _make_engine(self) -> AsyncEngine:
        asked = self._url.query
        engine = create_async_engine(
            self._url,
            isolation_level="AUTOCOMMIT",
            pool_size=self._size,
            max_overflow=0,
            pool_timeout=FREE_TIMEOUT_S,
            pool_reset_on_return=None,  # there is nothing to roll back
            hide_parameters=True,
            use_native_hstore=False,  # or it asks for it on the first connection
            connect_args={
                **{n: v for n, v in _KEEPALIVE.items() if n not in asked},
                # PgBouncer hands each transaction to another server connection.
                "prepare_threshold": None,
            },
        )
        event.listen(engine.sync_engine, "checkout", _refuse_ended)
        return engine

    async def _migrate(
        self, engine: AsyncEngine, migrate: Callable[[Connection], None]
    ) -> None:
        async with engine.connect() as connection:
            await connection.execution_options(isolation_level="READ COMMITTED")
            async with connection.begin():
                await connection.execute(select(_LOCK))
                encoding = func.current_setting("server_encoding")
                if await connection.scalar(select(encoding)) != "UTF8":
                    raise ConfigurationError(
                        "the database does not keep all text: create one with "
                        "ENCODING 'UTF8'"
                    )
                await connection.run_sync(migrate)

    async def _run(
        self, engine: AsyncEngine, text: str, parameters: Mapping[str, Any]
    ) -> Sequence[Any]:
        async with engine.connect() as connection:
            try:
                psycopg_connection = await _driver(connection)
                asked = psycopg_connection.execute(text, parameters, binary=True)
                cursor = await _at_once(psycopg_connection, asked)
                rows: Sequence[Any] = await cursor.fetchall()
            except BaseException:
                # Whatever went wrong: others get a new one.
                await connection.invalidate()
                raise
            return rows

    async def _attempt(self, work: Awaitable[T_], timeout_s: float) -> T_:
        """Say `StorageUnavailable` for what the system, psycopg or SQLAlchemy raise."""
        try:
            async with asyncio.timeout(timeout_s):
                return await work
        except TimeoutError:
            failed = StorageUnavailable(
                f"PostgreSQL did not answer within {timeout_s:.0f} s"
            )
        except NoneFree:
            failed = StorageUnavailable(
                f"all {self._size} connections to PostgreSQL are in use; `pool_size` "
                "allows for more"
            )
        except FAILURES as error:
            failed = unavailable(error)
        # Out here it has no context: that could quote what it must not.
        raise failed


@cache
def _text(statement: ClauseElement) -> str:
    dialect = driver.dialect()  # type: ignore[no-untyped-call]
    return str(statement.compile(dialect=dialect))


async def _driver(connection: AsyncConnection) -> Any:
    return (await connection.get_raw_connection()).driver_connection


async def _at_once(connection: Any, work: Awaitable[T_]) -> T_:
    """
    Do *work*; end it at once when the caller is cancelled.

    psycopg would ask the server to stop, and wait for it: 10 s more, and before 3.3
    without an end.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        connection.pgconn.finish()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        raise


def _refuse_ended(connection: Any, *_: object) -> None:
    """Have the pool replace a connection whose end is there to be read."""
    with selectors.DefaultSelector() as selector:
        selector.register(connection.driver_connection, selectors.EVENT_READ)
        if selector.select(0):
            raise DisconnectionError


def _parsed(url: str) -> URL:
    """
    Read the URL.

    Raises:
        ConfigurationError: It is none, or has settings that libpq does not know.
    """
    from psycopg.pq import Conninfo

    parsed = URL.create("unreadable")
    # With a second @ part of a password would be taken for the host, and logged.
    if url.count("@") <= 1:
        with suppress(ArgumentError, ValueError):
            parsed = make_url(url)
    if parsed.drivername not in {"postgres", "postgresql", "postgresql+psycopg"}:
        raise ConfigurationError(
            "this is no URL of PostgreSQL: postgresql://user:password@host/database "
            "(special characters of the password as %40, the driver psycopg or none)"
        )
    known = {option.keyword.decode() for option in Conninfo.get_defaults()}
    if unknown := set(parsed.query) - known:
        raise ConfigurationError(
            f"the query of the PostgreSQL URL has {len(unknown)} settings that libpq "
            "does not know; postgresql.org/docs/current/libpq-connect.html lists them"
        )
    return parsed.set(drivername="postgresql+psycopg")
