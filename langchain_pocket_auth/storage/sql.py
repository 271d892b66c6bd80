"""Records in SQLite or PostgreSQL: every call is one atomic statement."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Protocol

from sqlalchemy import Connection
from sqlalchemy.sql import ClauseElement

from .._errors import ConfigurationError
from ._base import Key, Page, Record, StorageBackend
from ._schema import migrate
from ._statements import Statements
from ._text import check_text


class _Database(Protocol):
    """What one kind of database does in its own way."""

    @property
    def statements(self) -> Statements: ...

    async def open(self, migrate: Callable[[Connection], None]) -> None: ...

    async def close(self) -> None: ...

    async def read(
        self, statement: ClauseElement, parameters: Mapping[str, Any]
    ) -> Sequence[Any]: ...

    async def write(
        self, statement: ClauseElement, parameters: Mapping[str, Any]
    ) -> Sequence[Any]: ...


class SQLBackend(StorageBackend):
    """
    Keeps records in a SQLite file or in PostgreSQL.

    A SQLite file may be shared by processes of one machine; PostgreSQL by any. Two
    tables are made, `pocket_auth_schema` and `pocket_auth_records`. PostgreSQL may
    be behind PgBouncer, in transaction mode too.

    Args:
        url: `sqlite:///relative/path.db` or `sqlite:////absolute/path.db`: file and
            directory are created, for this user only, when they are missing. Or
            `postgresql://user:password@host/database`, with libpq's settings as its
            query (`?sslmode=verify-full`, `?options=-csearch_path%3Dauth`).
        pool_size: How many connections to PostgreSQL are open at most.
        clock: Of SQLite: seconds since the epoch; all processes must agree on it.
            PostgreSQL uses its own.

    Raises:
        ConfigurationError: The URL names no such database, or the driver of
            PostgreSQL is not installed.
    """

    def __init__(
        self,
        url: str,
        *,
        pool_size: int = 10,
        clock: Callable[[], float] | None = None,
    ) -> None:
        scheme, _, _ = url.partition("://")
        scheme, _, _ = scheme.lower().partition("+")
        if scheme == "sqlite":
            from ._sqlite import SQLiteFile

            self._database: _Database = SQLiteFile(url, clock)
        elif scheme in {"postgresql", "postgres"}:
            if clock is not None:
                raise ConfigurationError("PostgreSQL uses its own clock: pass none")
            from ._postgres import PostgresPool

            self._database = PostgresPool(url, pool_size)
        else:
            raise ConfigurationError(
                "only SQLite and PostgreSQL are supported: sqlite:///path/to/file.db "
                "or postgresql://user:password@host/database"
            )
        self._statements = self._database.statements

    async def open(self) -> None:
        """
        Connect, and create or migrate the tables if that is needed.

        Processes that open at once do so one by one.

        Raises:
            ConfigurationError: The tables are of a newer version of the package.
            StorageUnavailable: The database cannot be opened, or is none.
        """
        await self._database.open(migrate)

    async def close(self) -> None:
        await self._database.close()

    async def get(self, key: Key) -> Record | None:
        rows = await self._database.read(self._statements.get, _at(key))
        return Record(*rows[0]) if rows else None

    async def put(
        self,
        key: Key,
        value: bytes,
        *,
        version: int,
        expected: int | None,
        ttl: timedelta | None = None,
    ) -> bool:
        creates = expected is None
        statement = self._statements.create if creates else self._statements.replace
        parameters = _at(
            key,
            new_version=version,
            new_value=value,
            expected=expected,
            lifetime=None if ttl is None else ttl.total_seconds(),
        )
        return bool(await self._database.write(statement, parameters))

    async def delete(self, key: Key, *, expected: int | None = None) -> bool:
        known, statements = expected is not None, self._statements
        statement = statements.delete_expected if known else statements.delete
        return bool(await self._database.write(statement, _at(key, expected=expected)))

    async def list(self, namespace: str) -> dict[str, Record]:
        parameters = _at((namespace, ""))
        rows = await self._database.read(self._statements.list, parameters)
        return {name: Record(version, value) for name, version, value in rows}

    async def take(self, key: Key) -> Record | None:
        rows = await self._database.write(self._statements.take, _at(key))
        return Record(*rows[0]) if rows else None

    async def lease(self, key: Key, holder: str, duration: timedelta) -> bool:
        check_text(holder)
        parameters = _at(key, holder=holder, lifetime=duration.total_seconds())
        return bool(await self._database.write(self._statements.lease, parameters))

    async def free(self, key: Key, holder: str) -> None:
        check_text(holder)
        await self._database.write(self._statements.free, _at(key, holder=holder))

    async def rewrite(self, key: Key, value: bytes, *, expected: int) -> bool:
        parameters = _at(key, expected=expected, new_value=value)
        return bool(await self._database.write(self._statements.rewrite, parameters))

    async def walk(
        self,
        namespace: str | None = None,
        *,
        after: str | None = None,
        limit: int = 500,
    ) -> Page:
        start: Key = tuple(json.loads(after)) if after else (namespace or "", "")
        every, one = self._statements.walk, self._statements.walk_one
        statement = every if namespace is None else one
        rows = await self._database.read(statement, _at(start, most=limit + 1))
        further = json.dumps(list(rows[limit][:2])) if len(rows) > limit else None
        return Page(
            {(space, name): Record(v, b) for space, name, v, b in rows[:limit]}, further
        )

    async def sweep(self, limit: int = 1000) -> int:
        parameters = {"most": limit}
        return len(await self._database.write(self._statements.sweep, parameters))


def _at(key: Key, **more: Any) -> dict[str, Any]:
    check_text(*key)
    namespace, name = key
    return {"in_namespace": namespace, "with_name": name, **more}
