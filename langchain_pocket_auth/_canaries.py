"""Canaries: one record a key, by which each start proves that the keys fit."""

from __future__ import annotations

import secrets
from collections.abc import Mapping

from ._errors import ConfigurationError, CredentialUnreadable
from ._seal import KeyRing, sealed_with
from .storage import Key, Record, StorageBackend

_SPACE = "meta"
# Of a key that seals or has sealed; no start without it.
_USED = "canary/"
# Of a key that only opens so far: replicas may not have it yet, and need not.
_SPARE = "spare/"
# Of versions that had one for all keys, whichever sealed first.
_ONLY = "canary"
_VERSION_BITS = 52


def is_canary(key: Key) -> bool:
    """Whether a record is one of ours: bound to its key, and never sealed anew."""
    space, name = key
    return space == _SPACE and (name == _ONLY or name.startswith((_USED, _SPARE)))


async def prove(backend: StorageBackend, keys: KeyRing) -> None:
    """
    Prove that *keys* fit what is in an open store, and leave the proof of new ones.

    Raises:
        ConfigurationError: One is missing, or is another one than the store's.
        StorageUnavailable: The store does not answer.
    """
    names = _proved(keys, await backend.list(_SPACE))
    wanted = [name for key_id in keys.ids if (name := _lacking(keys, key_id, names))]
    made: list[Key] = []
    try:
        for name in wanted:
            key, version = (_SPACE, name), secrets.randbits(_VERSION_BITS)
            key_id = name.partition("/")[2]
            value = keys.seal(b"{}", *key, str(version), key_id=key_id)
            if await backend.put(key, value, version=version, expected=None):
                made.append(key)
        if wanted:
            # Of two that start at once with different keys, at least one sees the
            # other's: each looks again when its own are written.
            _proved(keys, await backend.list(_SPACE))
    except ConfigurationError:
        for key in made:  # nothing is sealed with these yet
            await backend.delete(key)
        raise


async def used(backend: StorageBackend) -> set[str]:
    """Return the ids of keys without which no start is allowed."""
    records = await backend.list(_SPACE)
    return {
        str(sealed_with(record.value))
        for name, record in records.items()
        if is_canary((_SPACE, name)) and not name.startswith(_SPARE)
    }


async def retire(backend: StorageBackend, key_id: str) -> None:
    """Drop the proof of a key that nothing is sealed with any more."""
    for name, record in (await backend.list(_SPACE)).items():
        key = (_SPACE, name)
        if is_canary(key) and sealed_with(record.value) == key_id:
            await backend.delete(key, expected=record.version)


def _proved(keys: KeyRing, records: Mapping[str, Record]) -> dict[str, str]:
    """Return the keys' ids by name of the canary, all of which open."""
    found: dict[str, str] = {}
    for name, record in records.items():
        if not is_canary((_SPACE, name)):
            continue
        key_id = sealed_with(record.value)
        if key_id is None or key_id not in keys.ids:
            if name.startswith(_SPARE):
                continue
            raise ConfigurationError(
                "the keys do not fit this store: records in it are sealed with the key "
                f"{key_id!r}, which is not among them: add it again, and drop it when "
                "`pocket-auth keys rewrap` has left nothing under it; if it is lost, "
                "so is what it sealed: use an empty store"
            )
        try:
            keys.open(record.value, _SPACE, name, str(record.version))
        except CredentialUnreadable:
            raise ConfigurationError(
                f"the keys do not fit this store: the key {key_id!r} is another one "
                "than the store knows by that name: give the one that was meant, or "
                "name the new one otherwise"
            ) from None
        found[name] = key_id
    return found


def _lacking(keys: KeyRing, key_id: str, names: Mapping[str, str]) -> str | None:
    """Return the name of the canary that a key still needs, if any."""
    proved = {of for name, of in names.items() if not name.startswith(_SPARE)}
    if key_id in proved:
        return None
    # In a store of an older version, any of the keys may have sealed something.
    if key_id == keys.primary or _ONLY in names:
        return _USED + key_id
    return None if _SPARE + key_id in names else _SPARE + key_id
