"""Where sealed records are kept: the contract, and stores by URL."""

from __future__ import annotations

from .._errors import ConfigurationError
from ._base import Key, Page, Record, StorageBackend

__all__ = ["Key", "Page", "Record", "StorageBackend", "storage_from_url"]

_KNOWN = (
    "memory://, sqlite:///relative/path.db, sqlite:////absolute/path.db, "
    "postgresql://user:password@host/database and redis://host:6379/0"
)
_REDIS = frozenset({"redis", "rediss", "unix"})


def storage_from_url(url: str) -> StorageBackend:
    """
    Return the backend that *url* names, not yet opened.

    Args:
        url: `memory://`, or one of those that `storage.sql.SQLBackend` and
            `storage.redis.RedisBackend` describe: `sqlite:///relative/path.db`,
            `postgresql://user:password@host/database`, `redis://host:6379/0`.

    Raises:
        ConfigurationError: No store is known by that URL, or its driver is not
            installed. The text names those that are known, and not the URL: it may
            hold a password.
    """
    scheme, _, place = url.partition("://")
    scheme, _, _ = scheme.lower().partition("+")
    if url == "memory://":
        from .memory import MemoryBackend

        return MemoryBackend()
    if scheme in {"postgresql", "postgres"} or (scheme == "sqlite" and place):
        from .sql import SQLBackend

        return SQLBackend(url)
    if scheme == "sqlite":
        raise ConfigurationError(
            "a sqlite:// URL needs a path, such as sqlite:///pocket-auth.db; "
            "to keep nothing, use memory://"
        )
    if scheme in _REDIS:
        from .redis import RedisBackend

        return RedisBackend(url)
    raise ConfigurationError(f"no store is known by this URL; known are {_KNOWN}")
