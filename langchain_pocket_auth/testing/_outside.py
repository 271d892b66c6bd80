"""
Marks what the kit does in the role of somebody else.

The browser and the authorization server of a test live in the process of the
code under test. What they log is not that code's doing, so `LeakWatch` passes
over records made inside `outside()`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_OUTSIDE: ContextVar[bool] = ContextVar("pocket_auth_testing_outside", default=False)


@contextmanager
def outside() -> Iterator[None]:
    """Count what happens in the block, in this thread, as somebody else's."""
    token = _OUTSIDE.set(True)
    try:
        yield
    finally:
        _OUTSIDE.reset(token)


def is_outside() -> bool:
    """Whether the caller runs inside `outside()`."""
    return _OUTSIDE.get()
