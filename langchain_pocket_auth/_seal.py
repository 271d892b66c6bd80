"""Keys, and the envelope that everything at rest is sealed in (AES-256-GCM)."""

from __future__ import annotations

import os
import re
import secrets
from base64 import urlsafe_b64decode, urlsafe_b64encode
from contextlib import suppress
from pathlib import Path

from ._errors import ConfigurationError, CredentialUnreadable

ENVELOPE = b"\x01"
NONCE_BYTES = 12
KEY_BYTES = 32
_KEY_ID = re.compile(r"[A-Za-z0-9._-]{1,32}")


class KeyRing:
    """
    Named keys; the first seals, all open.

    Written as `POCKET_AUTH_KEYS="2026b:<key>,2026a:<key>"`, a key being 32
    random bytes in url-safe base64 (`pocket-auth keys new` prints one).
    """

    def __init__(self, keys: dict[str, bytes]) -> None:
        # cryptography is imported when the first key is, not with the package.
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self._ciphers = {key_id: AESGCM(key) for key_id, key in keys.items()}
        self._primary = next(iter(keys))

    @classmethod
    def parse(cls, text: str) -> KeyRing:
        """
        Read the written form.

        Raises:
            ConfigurationError: It is malformed; the text never shows a key.
        """
        keys: dict[str, bytes] = {}
        for entry in filter(None, (part.strip() for part in text.split(","))):
            key_id, _, encoded = entry.partition(":")
            try:
                key = urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))
            except ValueError:
                key = b""
            if not _KEY_ID.fullmatch(key_id) or len(key) != KEY_BYTES or key_id in keys:
                raise ConfigurationError(
                    "keys are written 'id:key,id:key', each id once, each key 32 "
                    "bytes in url-safe base64; make one with `pocket-auth keys new`"
                )
            keys[key_id] = key
        if not keys:
            raise ConfigurationError("no key given; `pocket-auth keys new` makes one")
        return cls(keys)

    @classmethod
    def ephemeral(cls) -> KeyRing:
        """Return a ring whose key lives as long as the process."""
        return cls({"memory": secrets.token_bytes(KEY_BYTES)})

    @classmethod
    def file(cls, path: Path) -> KeyRing:
        """Read the key file, which is made on first use: 0600 in a 0700 directory."""
        try:
            if not path.exists():
                _create_key_file(path)
            shared = path.stat().st_mode & 0o077 and os.name == "posix"
            text = path.read_text()
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"the key file {path} cannot be made or read "
                f"({type(error).__name__}); set POCKET_AUTH_KEYS instead"
            ) from None
        if shared:
            raise ConfigurationError(
                f"the key file {path} can be read by others: chmod 600 it"
            )
        return cls.parse(text.replace("\n", ","))

    def seal(self, plain: bytes, *bound_to: str) -> bytes:
        """Encrypt *plain*, openable only together with the same *bound_to*."""
        key_id = self._primary.encode()
        header = ENVELOPE + bytes([len(key_id)]) + key_id
        nonce = secrets.token_bytes(NONCE_BYTES)
        cipher = self._ciphers[self._primary]
        return header + nonce + cipher.encrypt(nonce, plain, _bound(header, bound_to))

    def open(self, sealed: bytes, *bound_to: str) -> bytes:
        """
        Decrypt what `seal` made.

        Raises:
            CredentialUnreadable: Another key, another row, or tampering.
        """
        from cryptography.exceptions import InvalidTag

        end = 2 + sealed[1] if len(sealed) > 1 else 0
        header, nonce = sealed[:end], sealed[end : end + NONCE_BYTES]
        if sealed[:1] != ENVELOPE or len(nonce) != NONCE_BYTES:
            raise CredentialUnreadable("a stored record is not in our envelope")
        key_id = header[2:].decode("ascii", "replace")
        if (cipher := self._ciphers.get(key_id)) is None:
            raise CredentialUnreadable(
                f"a stored record is sealed with the key {key_id!r}, which is not "
                "among the keys: add it to POCKET_AUTH_KEYS"
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
