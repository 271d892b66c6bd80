"""What is said of PostgreSQL's errors, without what their texts quote."""

from __future__ import annotations

from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from .._errors import ConfigurationError, StorageUnavailable

try:
    import psycopg
except ImportError as error:
    raise ConfigurationError(
        "PostgreSQL needs a driver that is not installed: "
        'pip install "langchain-pocket-auth[postgres]"'
    ) from error

FAILURES = (OSError, SQLAlchemyError, psycopg.Error)

# Only these words are ever said, because the server's and libpq's
# texts may quote a value, or what a misread URL took for the host.
_RIGHTS = (
    "the role has too few rights: GRANT SELECT, INSERT, UPDATE, DELETE ON "
    "pocket_auth_schema, pocket_auth_records, once a role that may create tables "
    "has opened the store"
)
_REMEDIES = {
    psycopg.errors.InsufficientPrivilege: _RIGHTS,
    psycopg.errors.UndefinedTable: "its tables are gone; they are made when it opens",
    psycopg.errors.ReadOnlySqlTransaction: "it is read-only; name the primary server",
}
_PHRASES = (
    "authentication failed",
    "no password supplied",
    "does not exist",
    "Connection refused",
    "No such file or directory",
    "failed to resolve host",
    "connection timeout expired",
    "too many clients",
    "remaining connection slots",
    "starting up",
    "shutting down",
    "closed the connection unexpectedly",
    "certificate",
    "no encryption",
)


class StorageInterrupted(StorageUnavailable):
    """It is not about the statement: the connection broke, the server restarts."""


def unavailable(error: Exception) -> StorageUnavailable:
    """Return what stands for one of `FAILURES`; it is not chained to it."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    known = [remedy for kind, remedy in _REMEDIES.items() if isinstance(cause, kind)]
    # Before there is a connection, errors have no code, only a text.
    coded = getattr(cause, "sqlstate", None) is not None
    said = [phrase for phrase in _PHRASES if not coded and phrase in str(cause)]
    reason = (*known, *said, type(cause).__name__)[0]
    passing = isinstance(cause, psycopg.OperationalError)
    kind = StorageInterrupted if passing else StorageUnavailable
    return kind(f"PostgreSQL does not answer: {reason}")
