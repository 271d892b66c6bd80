"""Keys, and the envelope that everything at rest is sealed in (AES-256-GCM)."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import stat
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

from ._errors import ConfigurationError, CredentialUnreadable

Written: TypeAlias = str | Mapping[str, bytes]
"""Keys as `"id:key,id:key"`, or as id and 32 bytes; the first seals."""
KeySource: TypeAlias = Path | Callable[[], Written | Awaitable[Written]]
"""Where keys are fetched when the store is opened: a file, or whatever a KMS needs."""

ENVELOPE = b"\x01"
NONCE_BYTES = 12
KEY_BYTES = 32
ANSWER_LIMIT_S = 30.0  # a key service that takes longer is down
_KEY_ID = re.compile(r"[A-Za-z0-9._-]{1,32}")


class KeyRing:
    """
    Named keys; the first seals, all open.

    Written as `POCKET_AUTH_KEYS="2026b:<key>,2026a:<key>"`, a key being 32
    random bytes in url-safe base64 (`pocket-auth keys new` prints one).
    """

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        # cryptography is imported when the first key is, not with the package.
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self._ciphers = {key_id: AESGCM(key) for key_id, key in keys.items()}
        self.ids = tuple(keys)
        self.primary = self.ids[0]

    @classmethod
    def parse(cls, text: str) -> KeyRing:
        """
        Read the written form.

        Raises:
            ConfigurationError: It is malformed; the text never shows a key.
        """
        entries = filter(None, (part.strip() for part in text.split(",")))
        return cls._of([_entry(entry) for entry in entries])

    @classmethod
    def _of(cls, pairs: list[tuple[Any, Any]]) -> KeyRing:
        if not pairs:
            raise ConfigurationError("no key given; `pocket-auth keys new` makes one")
        keys = {key_id: key for key_id, key in pairs if _fits(key_id, key)}
        if len(keys) < len(pairs):
            raise ConfigurationError(
                "keys are written 'id:key,id:key', each id once, each key 32 "
                "bytes in url-safe base64; make one with `pocket-auth keys new`"
            )
        return cls(keys)

    @classmethod
    async def read(cls, source: KeySource) -> KeyRing:
        """
        Fetch the keys.

        Raises:
            ConfigurationError: They are malformed, or cannot be had.
        """
        if isinstance(source, Path):
            return await asyncio.to_thread(cls.file, source, make=False)
        name = getattr(source, "__qualname__", type(source).__name__)
        try:
            async with asyncio.timeout(ANSWER_LIMIT_S):
                # In a thread and on a loop of its own: it may block.
                given = await asyncio.to_thread(_called, source)
        except Exception as error:  # noqa: BLE001 - whatever it raises
            problem = f"keys={name} failed with {type(error).__name__}"
        else:
            if isinstance(given, str):
                return cls.parse(given)
            if isinstance(given, Mapping):
                return cls._of(list(given.items()))
            problem = f"keys={name} returned neither text nor a mapping"
        # Out here, so that it does not carry the other, which may hold a key.
        raise ConfigurationError(
            f"{problem}: it has to return 'id:key,id:key', or 32 bytes by id"
        )

    @classmethod
    def ephemeral(cls) -> KeyRing:
        """Return a ring whose key lives as long as the process."""
        return cls({"memory": secrets.token_bytes(KEY_BYTES)})

    @classmethod
    def file(cls, path: Path, *, make: bool = True) -> KeyRing:
        """
        Read a key file, a key a line; with *make* it is made where it is missing.

        It is 0600 in a 0700 directory. One that others can read is refused, unless
        it is root's on a read-only mount, which is how Kubernetes and Docker hand out
        secrets: there the container is the limit.

        Raises:
            ConfigurationError: It is malformed, or cannot be made or read.
        """
        try:
            if make and not path.exists():
                _create_key_file(path)
            with path.open("rb") as file:
                shared = _is_shared(file.fileno())
                text = file.read().decode()
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"the key file {path} cannot be made or read "
                f"({type(error).__name__}): put there what `pocket-auth keys new` "
                "prints, or set POCKET_AUTH_KEYS instead"
            ) from None
        if shared:
            raise ConfigurationError(
                f"the key file {path} can be read by others: chmod 600 it"
            )
        return cls.parse(text.replace("\n", ","))

    def seal(self, plain: bytes, *bound_to: str, key_id: str | None = None) -> bytes:
        """
        Encrypt *plain*, openable only together with the same *bound_to*.

        The first key seals, unless another is named.
        """
        key_id = key_id or self.primary
        header = ENVELOPE + bytes([len(key_id)]) + key_id.encode()
        nonce = secrets.token_bytes(NONCE_BYTES)
        cipher = self._ciphers[key_id]
        return header + nonce + cipher.encrypt(nonce, plain, _bound(header, bound_to))

    def open(self, sealed: bytes, *bound_to: str) -> bytes:
        """
        Decrypt what `seal` made.

        Raises:
            CredentialUnreadable: Another key, another row, or tampering.
        """
        from cryptography.exceptions import InvalidTag

        key_id = sealed_with(sealed)
        if key_id is None:
            raise CredentialUnreadable("a stored record is not in our envelope")
        end = 2 + sealed[1]
        header, nonce = sealed[:end], sealed[end : end + NONCE_BYTES]
        if (cipher := self._ciphers.get(key_id)) is None:
            raise CredentialUnreadable(
                f"a stored record is sealed with the key {key_id!r}, which is not "
                "among the keys: add it, and restart what runs without it"
            )
        try:
            return cipher.decrypt(
                nonce, sealed[end + NONCE_BYTES :], _bound(header, bound_to)
            )
        except InvalidTag:
            raise CredentialUnreadable(
                f"a stored record does not open with the key {key_id!r}: it was "
                "changed, moved from another row, or the key is another one"
            ) from None


def sealed_with(sealed: bytes) -> str | None:
    """Return the id of the key that sealed it; `None`: this is no envelope."""
    end = 2 + sealed[1] if len(sealed) > 1 else 0
    if sealed[:1] != ENVELOPE or len(sealed) < end + NONCE_BYTES:
        return None
    return sealed[2:end].decode("ascii", "replace")


def _fits(key_id: Any, key: Any) -> bool:
    named = isinstance(key_id, str) and _KEY_ID.fullmatch(key_id)
    return bool(named) and isinstance(key, bytes) and len(key) == KEY_BYTES


def _entry(text: str) -> tuple[str, bytes]:
    key_id, _, encoded = text.partition(":")
    try:
        return key_id, urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))
    except ValueError:
        return key_id, b""


def _called(source: Callable[[], Any]) -> Any:
    given = source()
    return asyncio.run(_awaited(given)) if isinstance(given, Awaitable) else given


async def _awaited(given: Awaitable[Any]) -> Any:
    return await given


def _is_shared(descriptor: int) -> bool:
    """Whether somebody else on this machine can read an open file."""
    if os.name != "posix":
        return False
    status = os.fstat(descriptor)
    if not status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        return False
    read_only = os.fstatvfs(descriptor).f_flag & os.ST_RDONLY
    return status.st_uid != 0 or not read_only


def _create_key_file(path: Path) -> None:
    # Written aside and linked into place: of two processes that start at once
    # one wins, and nobody ever reads half a key.
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as out:
            out.write(new_key() + "\n")
            out.flush()
            os.fsync(out.fileno())
        with suppress(FileExistsError):
            os.link(aside, path)
    finally:
        aside.unlink()


def new_key() -> str:
    """Return a new key in its written form, named by a random id."""
    key = urlsafe_b64encode(secrets.token_bytes(KEY_BYTES)).decode().rstrip("=")
    return f"{secrets.token_hex(4)}:{key}"


def _bound(header: bytes, parts: tuple[str, ...]) -> bytes:
    # Length-prefixed, so that ("ab", "c") and ("a", "bc") differ.
    encoded = [part.encode() for part in parts]
    return header + b"".join(len(p).to_bytes(4, "big") + p for p in encoded)
