"""The tables, and how they come to be and change."""

from __future__ import annotations

from collections.abc import Callable

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
    func,
    insert,
    inspect,
    select,
    update,
)

from .._errors import ConfigurationError

SCHEMA_VERSION = 1

MIGRATIONS: dict[int, Callable[[Connection], None]] = {}
"""What makes tables of the next version from those of each version before."""

# PostgreSQL: compared and sorted byte by byte, whatever the database's language.
_EXACT = Text().with_variant(Text(collation="C"), "postgresql")

_METADATA = MetaData()
_SCHEMA = Table(
    "pocket_auth_schema",
    _METADATA,
    Column("version", Integer, primary_key=True, autoincrement=False),
)
RECORDS = Table(
    "pocket_auth_records",
    _METADATA,
    Column("namespace", _EXACT, primary_key=True),
    Column("name", _EXACT, primary_key=True),
    Column("version", BigInteger, nullable=False),
    Column("value", LargeBinary, nullable=False),
    Column("expires_at", Double),
    Column("lease_holder", Text),
    Column("lease_until", Double),
    sqlite_with_rowid=False,
)
Index(
    "pocket_auth_records_expires_at",
    RECORDS.c.expires_at,
    sqlite_where=RECORDS.c.expires_at.is_not(None),
    postgresql_where=RECORDS.c.expires_at.is_not(None),
)


def migrate(connection: Connection) -> None:
    """
    Bring the tables to `SCHEMA_VERSION`, or leave them as they were.

    Tables of this version are only read: who made them, and whether this user may
    make any, does not matter. The caller lets one process at a time do this, in one
    transaction.

    Raises:
        ConfigurationError: The tables are of a newer version of the package.
    """
    found = None
    if inspect(connection).has_table(_SCHEMA.name):
        found = connection.scalar(select(func.max(_SCHEMA.c.version)))
    if found is None:
        _METADATA.create_all(connection)
        connection.execute(insert(_SCHEMA).values(version=SCHEMA_VERSION))
        return
    if found > SCHEMA_VERSION:
        raise ConfigurationError(
            f"the store has schema {found}, this version of langchain-pocket-auth "
            f"knows {SCHEMA_VERSION}: upgrade the package, or name another store"
        )
    for version in range(found, SCHEMA_VERSION):
        MIGRATIONS[version](connection)
        connection.execute(update(_SCHEMA).values(version=version + 1))
