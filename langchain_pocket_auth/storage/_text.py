"""Which text a key, a namespace or a lease holder may be."""

from __future__ import annotations


def check_text(*texts: str) -> None:
    """
    Refuse text that some store could not keep exactly.

    Raises:
        ValueError: A lone surrogate has no UTF-8 form, and PostgreSQL keeps no
            NUL. The text itself is not in the message.
    """
    for text in texts:
        if "\0" in text:
            raise ValueError("a NUL character cannot be stored in a key")
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            raise ValueError("a lone surrogate cannot be stored in a key")
