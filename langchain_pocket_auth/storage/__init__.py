"""Where sealed records are kept: the contract, and stores by URL."""

from __future__ import annotations

from .._errors import ConfigurationError
from ._base import Key, Page, Record, StorageBackend

__all__ = ["Key", "Page", "Record", "StorageBackend", "storage_from_url"]

_KNOWN = "memory://, sqlite:///relative/path.db and sqlite:////absolute/path.db"
_NOT_YET = frozenset({"postgres", "postgresql", "redis", "rediss"})


def storage_from_url(url: str) -> StorageBackend:
    """
    Return the backend that *url* names, not yet opened.

    Args:
        url: `memory://`, `sqlite:///relative/path.db` or
            `sqlite:////absolute/path.db`.

    Raises:
        ConfigurationError: No store is known by that URL. The text names those
            that are, and not the URL: it may hold a password.
    """
    scheme, _, place = url.partition("://")
    scheme, _, _ = scheme.lower().partition("+")
    if url == "memory://":
        from .memory import MemoryBackend

        return MemoryBackend()
    if scheme == "sqlite" and place:
        from .sql import SQLBackend

        return SQLBackend(url)
    if scheme == "sqlite":
        raise ConfigurationError(
            "a sqlite:// URL needs a path, such as sqlite:///pocket-auth.db; "
            "to keep nothing, use memory://"
        )
    if scheme in _NOT_YET:
        raise ConfigurationError(
            f"{scheme}:// is not supported yet by this version; use {_KNOWN}, or "
            "pass a StorageBackend of your own"
        )
    raise ConfigurationError(f"no store is known by this URL; known are {_KNOWN}")
