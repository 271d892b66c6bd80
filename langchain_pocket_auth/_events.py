"""What happens to connections and paused runs: an audit log, and told to apps."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import Context
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias

from ._cards import plain
from ._models import Owner, SessionKey

logger = logging.getLogger(__name__)
audit = logging.getLogger(f"{__package__}.audit")

EventType: TypeAlias = Literal[
    "connected",
    "declined",
    "expired",
    "refreshed",
    "revoked",
    "needs_reconnect",
    "required",
    "refused",
    "given_back",
    "not_given_back",
    "forgotten",
    "resumed",
    "superseded",
    "not_resumed",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """
    Something that happened to a connection or to a paused run.

    Attributes:
        type: `connected`: a person agreed. `declined`: a person said no, at the
            provider or in the chat. `expired`: a connect link that this process made
            ran out unused. `refreshed`: a token was renewed. `revoked`: a connection
            was deleted here. `needs_reconnect`: it cannot be renewed any more, the
            next use asks the person. `required`: a run that must not ask lacks it.
            `refused`: somebody else, another account or a wrong code was turned away.
            `given_back`: the provider was told to revoke a grant; `not_given_back`:
            it would not hear of it. `forgotten`: all of an owner's data was erased.
            Of `auto_resume`: `resumed`, a paused run was continued; `superseded`,
            it had been already, or newer input came; `not_resumed`, it could not
            be, see `reason`.
        owner: Whose connection.
        provider: The provider's id; empty where all are meant (`forgotten`).
        profile: Which account of the owner.
        handler: The handler's name.
        scopes: What was asked for, granted, or is missing.
        thread_ids: The conversations that wait for it, or the one it happened in.
        account: Whose account it is at the provider, where it told.
        reason: One sentence, where there is something to explain; no secret.
        time: When, in UTC.
    """

    type: EventType
    owner: Owner
    provider: str = ""
    profile: str = "default"
    handler: str | None = None
    scopes: tuple[str, ...] = ()
    thread_ids: tuple[str, ...] = ()
    account: str | None = None
    reason: str | None = None
    time: datetime = field(default_factory=lambda: datetime.now(UTC))

    @classmethod
    def at(cls, key: SessionKey, event: EventType, **more: Any) -> Event:
        """Make an event of the connection at *key*."""
        return cls(
            type=event,
            owner=key.owner,
            provider=key.provider,
            profile=key.profile,
            handler=key.connection.partition("?")[0],
            **more,
        )

    def to_dict(self) -> dict[str, Any]:
        """
        Return the event as JSON, for logs: it holds no secret, link or state.

        What could steer a terminal or begin a new line is replaced in every text:
        providers and persons named some of them.
        """
        said = {**asdict(self), "time": self.time.isoformat(timespec="milliseconds")}
        return {name: _plain(value) for name, value in said.items()}


Subscriber: TypeAlias = Callable[[Event], Awaitable[None] | None]
Tell: TypeAlias = Callable[[Event], None]


class Events:
    """
    Writes the audit log and calls subscribers, never in the way of what happened.

    Each event is one record of the logger `langchain_pocket_auth.audit` at INFO,
    whatever subscribers do: fixed words, with `Event.to_dict()` as `pocket_auth`.
    """

    def __init__(self) -> None:
        self._subscribers: list[tuple[Subscriber, asyncio.AbstractEventLoop | None]]
        self._subscribers = []
        self._thread: ThreadPoolExecutor | None = None

    def subscribe(self, callback: Subscriber) -> Callable[[], None]:
        """
        Call *callback* with every event from now on.

        A coroutine function runs on the loop it was subscribed on; any other
        callback, and one whose loop is closed, in a thread of its own.

        Returns:
            A function that ends the subscription.
        """
        loop = None
        if inspect.iscoroutinefunction(callback):
            with suppress(RuntimeError):
                loop = asyncio.get_running_loop()
        entry = (callback, loop)
        self._subscribers.append(entry)

        def unsubscribe() -> None:
            with suppress(ValueError):
                self._subscribers.remove(entry)

        return unsubscribe

    def tell(self, event: Event) -> None:
        """Write it into the audit log, and tell all subscribers; returns at once."""
        said = {"pocket_auth": event.to_dict()}
        audit.info("pocket-auth: %s", event.type, extra=said)
        for callback, loop in list(self._subscribers):
            with suppress(RuntimeError):  # the loop is being closed
                if loop is not None and not loop.is_closed():
                    # In a context of its own: what a subscriber starts is no part of
                    # the run that something happened in.
                    inside = Context().run
                    called = _called(callback, event)
                    inside(asyncio.run_coroutine_threadsafe, called, loop)
                    continue
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, "pocket-auth-events")
            self._thread.submit(_run, callback, event)

    def close(self) -> None:
        """Let what was told be heard; nothing more is."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.shutdown(wait=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return plain(value) if isinstance(value, str) else value


def _run(callback: Subscriber, event: Event) -> None:
    asyncio.run(_called(callback, event))


async def _called(callback: Subscriber, event: Event) -> None:
    try:
        done = callback(event)
        if inspect.isawaitable(done):
            await done
    except Exception as error:  # noqa: BLE001 - an app's own
        # Not the text: it is of somebody else.
        logger.warning("a subscriber failed with %s", type(error).__name__)
