"""`FutureStore`: how handlers and own endpoints meet a person's answer."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakSet

from ._errors import (
    ConfigurationError,
    FutureNotFound,
    PocketAuthError,
    StorageError,
)

_UNSET = object()


class Answered:
    """An awaitable that is done as soon as the person's answer is there."""

    def __init__(self, value: Any = _UNSET) -> None:
        self._value = value

    def done(self) -> bool:
        """Whether the answer is there."""
        return self._value is not _UNSET

    def result(self) -> Any:
        """Return the answer."""
        if self._value is _UNSET:
            raise FutureNotFound("the person has not answered yet")
        return self._value

    def __await__(self) -> Generator[Any, None, Any]:
        return self.result()
        yield  # makes this a generator, as `await` wants it


@dataclass(slots=True, repr=False)
class FutureData:
    """
    One attempt as its handler sees it.

    Attributes:
        uid: The attempt's uid, which is the `state` of the protocol.
        data: What `prepare` wants to find again in `authenticate`; JSON.
        scopes: What this attempt asks for.
        future: Awaitable; gives what the attempt was resolved with.
        parameters: All parameters of the callback, where there was one.
    """

    uid: str
    data: dict[str, Any] = field(default_factory=dict)
    scopes: tuple[str, ...] = ()
    future: Answered = field(default_factory=Answered)
    parameters: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True, repr=False)
class Serving:
    """
    A request that a third party's route is serving.

    Attributes:
        named: Whether its query names an attempt; else its body may.
        attempt: The attempt that its query names, if there is one.
        resolved: What the route resolved; carried out when it has returned.
    """

    named: bool = False
    attempt: FutureData | None = None
    resolved: list[tuple[str, Any]] = field(default_factory=list)


class Backing(Protocol):
    """What stands behind the store: a live `PocketAuth`."""

    def find_future(self, uid: str) -> FutureData | None: ...
    def resolve_future(self, uid: str, value: Any) -> bool: ...


_attempt: ContextVar[FutureData | None] = ContextVar("pocket_attempt", default=None)
_serving: ContextVar[Serving | None] = ContextVar("pocket_serving", default=None)
_backings: WeakSet[Backing] = WeakSet()


def register_backing(backing: Backing) -> None:
    """Let the store find attempts of *backing* from anywhere."""
    _backings.add(backing)


@contextmanager
def attempt_context(attempt: FutureData) -> Iterator[None]:
    """Make *attempt* the one that handlers reach through the store."""
    token = _attempt.set(attempt)
    try:
        yield
    finally:
        _attempt.reset(token)


@contextmanager
def serving_context(serving: Serving) -> Iterator[None]:
    """Collect resolutions of a request instead of carrying them out."""
    token = _serving.set(serving)
    try:
        yield
    finally:
        _serving.reset(token)


class _FutureStore:
    """
    The reference's `FutureStore`, durable underneath.

    Callable from sync code and from any event loop. Inside a handler and
    inside a route that this package serves it does no I/O at all.
    """

    def create_future(self, uid: str, data: dict[str, Any] | None = None) -> FutureData:
        """
        Keep *data* with the attempt that `prepare` is called for.

        Raises:
            FutureNotFound: Not inside the `prepare` of that attempt.
        """
        attempt = _attempt.get()
        if attempt is None or attempt.uid != uid:
            raise FutureNotFound("futures are created inside the handler's `prepare`")
        if data:
            attempt.data.update(data)
        return attempt

    def get_future(self, uid: str) -> FutureData:
        """
        Return the attempt of that uid.

        Raises:
            FutureNotFound: There is none, or it is over.
        """
        serving = _serving.get()
        for attempt in (_attempt.get(), serving.attempt if serving else None):
            if attempt is not None and attempt.uid == uid:
                return attempt
        if serving is not None and serving.named:
            raise FutureNotFound("no consent of that uid is being waited for")
        found: FutureData | None = self._first(lambda b: b.find_future(uid))
        if found is None:
            raise FutureNotFound("no consent of that uid is being waited for")
        return found

    def resolve_future(self, uid: str, value: Any) -> None:
        """
        Say what the person's answer was: an authorization code, a token.

        Inside a route, the exchange follows when the route returns, and its
        failure replaces the route's page.

        Raises:
            FutureNotFound: Nobody waits for that uid.
        """
        if (serving := _serving.get()) is not None:
            known = serving.attempt.uid if serving.attempt else None
            if serving.named and known != uid:
                raise FutureNotFound("no consent of that uid is being waited for")
            serving.resolved.append((uid, value))
        elif not self._first(lambda backing: backing.resolve_future(uid, value)):
            raise FutureNotFound("no consent of that uid is being waited for")

    @staticmethod
    def _first(ask: Callable[[Backing], Any]) -> Any:
        failure: PocketAuthError | None = None
        for backing in list(_backings):
            try:
                if found := ask(backing):
                    return found
            except (StorageError, ConfigurationError) as error:
                failure = error  # of one of several; another may know the uid
        if failure is not None:
            raise failure
        return None


FutureStore = _FutureStore()
