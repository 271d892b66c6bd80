"""Records in a SQL database, today SQLite: every call is one atomic statement."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Double,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    bindparam,
    delete,
    func,
    insert,
    literal_column,
    null,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy.dialects import sqlite

from .._errors import ConfigurationError
from ._base import Key, Page, Record, StorageBackend
from ._sqlite import SQLiteFile
from ._text import check_text

SCHEMA_VERSION = 1

_METADATA = MetaData()
_SCHEMA = Table(
    "pocket_auth_schema",
    _METADATA,
    Column("version", Integer, primary_key=True, autoincrement=False),
)
_RECORDS = Table(
    "pocket_auth_records",
    _METADATA,
    Column("namespace", Text, primary_key=True),
    Column("name", Text, primary_key=True),
    Column("version", BigInteger, nullable=False),
    Column("value", LargeBinary, nullable=False),
    Column("expires_at", Double),
    Column("lease_holder", Text),
    Column("lease_until", Double),
    sqlite_with_rowid=False,
)
_R = _RECORDS.c
Index(
    "pocket_auth_records_expires_at",
    _R.expires_at,
    sqlite_where=_R.expires_at.is_not(None),
)

# Parameters are named other than columns: SQLAlchemy keeps those names for itself.
_NAMESPACE = bindparam("in_namespace", type_=Text)
_NAME = bindparam("with_name", type_=Text)
_HOLDER = bindparam("holder", type_=Text)
_EXPECTED = bindparam("expected", type_=BigInteger)
_NOW = bindparam("now", type_=Double)
_END = bindparam("end", type_=Double)

_ALIVE = or_(_R.expires_at.is_(None), _R.expires_at > _NOW)
_THERE = (_R.namespace == _NAMESPACE, _R.name == _NAME, _ALIVE)
_FREE_FOR_HOLDER = or_(
    _R.lease_until.is_(None), _R.lease_until <= _NOW, _R.lease_holder == _HOLDER
)
_UNLEASED = {"lease_holder": null(), "lease_until": null()}
_STORED = {
    "version": bindparam("new_version", type_=BigInteger),
    "value": bindparam("new_value", type_=LargeBinary),
    "expires_at": _END,
    **_UNLEASED,
}
_DONE = literal_column("1", Integer)

_GET = select(_R.version, _R.value).where(*_THERE)
_LIST = select(_R.name, _R.version, _R.value).where(_R.namespace == _NAMESPACE, _ALIVE)
_TAKE = delete(_RECORDS).where(*_THERE).returning(_R.version, _R.value)
_DELETE = delete(_RECORDS).where(*_THERE).returning(_DONE)
_DELETE_EXPECTED = _DELETE.where(_R.version == _EXPECTED)
_REPLACE = (
    update(_RECORDS)
    .where(*_THERE, _R.version == _EXPECTED)
    .values(_STORED)
    .returning(_DONE)
)
_CREATE = (
    sqlite.insert(_RECORDS)
    .values(namespace=_NAMESPACE, name=_NAME, **_STORED)
    .on_conflict_do_update(
        index_elements=[_R.namespace, _R.name],
        set_=_STORED,
        where=_R.expires_at <= _NOW,
    )
    .returning(_DONE)
)
_REWRITE = (
    update(_RECORDS)
    .where(*_THERE, _R.version == _EXPECTED)
    .values(value=bindparam("new_value", type_=LargeBinary))
    .returning(_DONE)
)
_WALK = (
    select(_R.namespace, _R.name, _R.version, _R.value)
    .where(tuple_(_R.namespace, _R.name) >= tuple_(_NAMESPACE, _NAME), _ALIVE)
    .order_by(_R.namespace, _R.name)
    .limit(bindparam("most", type_=Integer))
    .offset(literal_column("0", Integer))
)
_WALK_ONE = (
    select(_R.namespace, _R.name, _R.version, _R.value)
    .where(_R.namespace == _NAMESPACE, _R.name >= _NAME, _ALIVE)
    .order_by(_R.name)
    .limit(bindparam("most", type_=Integer))
    .offset(literal_column("0", Integer))
)
_LEASE = (
    update(_RECORDS)
    .where(*_THERE, _FREE_FOR_HOLDER)
    .values(lease_holder=_HOLDER, lease_until=_END)
    .returning(_DONE)
)
_FREE = (
    update(_RECORDS)
    .where(*_THERE, _R.lease_holder == _HOLDER)
    .values(_UNLEASED)
    .returning(_DONE)
)
_SWEEP = (
    delete(_RECORDS)
    .where(
        tuple_(_R.namespace, _R.name).in_(
            select(_R.namespace, _R.name)
            .where(_R.expires_at <= _NOW)
            .limit(bindparam("most", type_=Integer))
            .offset(literal_column("0", Integer))  # else one more parameter
        )
    )
    .returning(_DONE)
)


class SQLBackend(StorageBackend):
    """
    Keeps records in a SQLite file that processes of one machine may share.

    Args:
        url: `sqlite:///relative/path.db` or `sqlite:////absolute/path.db`. File
            and directory are created, for this user only, when they are missing.
        clock: Seconds since the epoch; all processes must agree on it.

    Raises:
        ConfigurationError: The URL names no SQLite file.
    """

    def __init__(self, url: str, *, clock: Callable[[], float] | None = None) -> None:
        self._database = SQLiteFile(url)
        self._clock = clock or time.time

    async def open(self) -> None:
        """
        Connect, and create the file and its tables if they are missing.

        Raises:
            ConfigurationError: The tables are of a newer version of the package.
            StorageUnavailable: The file cannot be opened, or is no database.
        """
        await self._database.open(_migrate)

    async def close(self) -> None:
        await self._database.close()

    async def get(self, key: Key) -> Record | None:
        rows = await self._database.read(_GET, self._at(key))
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
        parameters = self._at(key)
        parameters |= {"new_version": version, "new_value": value, "end": None}
        if ttl is not None:
            parameters["end"] = parameters["now"] + ttl.total_seconds()
        if expected is None:
            return bool(await self._database.write(_CREATE, parameters))
        parameters["expected"] = expected
        return bool(await self._database.write(_REPLACE, parameters))

    async def delete(self, key: Key, *, expected: int | None = None) -> bool:
        statement = _DELETE if expected is None else _DELETE_EXPECTED
        parameters = self._at(key) | {"expected": expected}
        return bool(await self._database.write(statement, parameters))

    async def list(self, namespace: str) -> dict[str, Record]:
        rows = await self._database.read(_LIST, self._at((namespace, "")))
        return {name: Record(version, value) for name, version, value in rows}

    async def take(self, key: Key) -> Record | None:
        rows = await self._database.write(_TAKE, self._at(key))
        return Record(*rows[0]) if rows else None

    async def lease(self, key: Key, holder: str, duration: timedelta) -> bool:
        check_text(holder)
        parameters = self._at(key) | {"holder": holder}
        parameters["end"] = parameters["now"] + duration.total_seconds()
        return bool(await self._database.write(_LEASE, parameters))

    async def free(self, key: Key, holder: str) -> None:
        check_text(holder)
        await self._database.write(_FREE, self._at(key) | {"holder": holder})

    async def rewrite(self, key: Key, value: bytes, *, expected: int) -> bool:
        parameters = self._at(key) | {"expected": expected, "new_value": value}
        return bool(await self._database.write(_REWRITE, parameters))

    async def walk(
        self,
        namespace: str | None = None,
        *,
        after: str | None = None,
        limit: int = 500,
    ) -> Page:
        start: Key = tuple(json.loads(after)) if after else (namespace or "", "")
        statement = _WALK if namespace is None else _WALK_ONE
        parameters = self._at(start) | {"most": limit + 1}
        rows = await self._database.read(statement, parameters)
        further = json.dumps(rows[limit][:2]) if len(rows) > limit else None
        return Page(
            {(space, name): Record(v, b) for space, name, v, b in rows[:limit]}, further
        )

    async def sweep(self, limit: int = 1000) -> int:
        parameters = {"now": self._clock(), "most": limit}
        return len(await self._database.write(_SWEEP, parameters))

    def _at(self, key: Key) -> dict[str, Any]:
        check_text(*key)
        namespace, name = key
        return {"in_namespace": namespace, "with_name": name, "now": self._clock()}


def _migrate(connection: Connection) -> None:
    """Bring the tables to `SCHEMA_VERSION`; the caller holds the write lock."""
    _SCHEMA.create(connection, checkfirst=True)
    found = connection.scalar(select(func.max(_SCHEMA.c.version)))
    if found is None:
        _RECORDS.create(connection, checkfirst=True)
        connection.execute(insert(_SCHEMA).values(version=SCHEMA_VERSION))
    elif found > SCHEMA_VERSION:
        raise ConfigurationError(
            f"the store has schema {found}, this version of langchain-pocket-auth "
            f"knows {SCHEMA_VERSION}: upgrade the package, or name another file"
        )
