"""A secret in all the shapes it may have been written down in."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Iterator
from urllib.parse import quote, quote_plus

SHORTEST = 8
LABEL_LENGTH = 4


class Needles:
    """Secrets to look for; it says of a text which of them it holds."""

    def __init__(self, secrets: Iterable[str]) -> None:
        # A dict keeps the order and drops repetitions.
        known = dict.fromkeys([secrets] if isinstance(secrets, str) else secrets)
        if not known:
            raise ValueError("There is no secret to look for: the check is empty.")
        if any(len(secret) < SHORTEST for secret in known):
            raise ValueError(
                f"A secret of fewer than {SHORTEST} characters is found by chance."
            )
        self._shapes = [
            (shape, label(secret), how)
            for secret in known
            for shape, how in _shapes(secret)
        ]
        self._as_bytes = [(s.encode(), who, how) for s, who, how in self._shapes]

    def found_in(self, haystack: str | bytes) -> Iterator[str]:
        """Say of each secret that is there which one it is and in what shape."""
        told = set()
        shapes = self._shapes if isinstance(haystack, str) else self._as_bytes
        for shape, who, how in shapes:
            if who not in told and shape in haystack:  # type: ignore[operator]
                told.add(who)
                yield f"{who}, {how}"

    def blank(self, text: str) -> str:
        """Take every secret out of *text*."""
        for shape, who, _ in self._shapes:
            text = text.replace(shape, f"<{who}>")
        return text


def label(secret: str) -> str:
    """Name a secret without telling it."""
    return f"'{secret[:LABEL_LENGTH]}…' ({len(secret)} characters)"


def _shapes(secret: str) -> Iterator[tuple[str, str]]:
    """All shapes of one secret, without repetitions, the secret itself first."""
    raw = secret.encode()
    shapes = {secret: "as it is"}
    for escaped in (quote(secret, safe=""), quote(secret), quote_plus(secret)):
        shapes.setdefault(escaped, "URL-quoted")
    shapes.setdefault(json.dumps(secret)[1:-1], "JSON-escaped")
    shapes.setdefault(repr(secret)[1:-1], "as in repr()")
    shapes.setdefault(repr(raw)[2:-1], "as in repr() of bytes")
    shapes.setdefault(html.escape(secret), "HTML-escaped")
    shapes.setdefault(raw.hex(), "as hexadecimal")
    for offset in range(3):
        encoded = _base64(raw, offset)
        shapes.setdefault(encoded, "as base64")
        shapes.setdefault(encoded.translate(_URLSAFE), "as base64url")
    yield from shapes.items()


_URLSAFE = str.maketrans("+/", "-_")


def _base64(raw: bytes, offset: int) -> str:
    """
    Encode *raw* as it looks in something longer, *offset* bytes after a triple.

    Only the characters that depend on nothing else, so that `user:secret` of a
    Basic header is found as well.
    """
    encoded = base64.b64encode(bytes(offset) + raw).decode()
    first = -(-offset * 8 // 6)
    last = (offset + len(raw)) * 8 // 6
    return encoded[first:last]
