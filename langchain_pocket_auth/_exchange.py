"""What follows a consent: the answer is exchanged, the grant stored."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from ._errors import (
    CallbackRefused,
    ConfigurationError,
    PocketAuthError,
    ProviderError,
    ProviderUnavailable,
    StorageError,
)
from ._futures import Answered, FutureData, attempt_context
from ._models import AuthContext, AuthenticateRequest, Owner
from ._outbox import Outbox
from ._refresh import finished, usable
from ._registry import Registry
from ._vault import (
    ATTEMPT_KEPT,
    CAS_TRIES,
    Attempt,
    Session,
    Stored,
    Typed,
    Vault,
    attempt_key,
    entry_key,
)
from ._waiting import Waiting
from .handlers import AuthHandlerInterface

logger = logging.getLogger(__name__)

EXCHANGE_LIMIT = timedelta(seconds=30)  # longer than a token request (10 s)


@dataclass(frozen=True, slots=True)
class Result:
    """What a person's answer led to, for the page that is shown."""

    outcome: str
    ticket: str | None = None


class Exchanges:
    """The exchanges of this process, each a task that no browser can stop."""

    def __init__(
        self,
        vault: Vault,
        registry: Registry,
        waiting: Waiting,
        outbox: Outbox,
        changed: Callable[[Owner], None],
    ) -> None:
        self._vault, self._registry, self._waiting = vault, registry, waiting
        self._outbox, self._changed = outbox, changed
        self._running: dict[str, asyncio.Task[Result]] = {}

    async def close(self) -> None:
        """Let the exchanges that run end: their codes may be spent already."""
        await finished(self._running.values())

    def start(
        self, claimed: Stored[Attempt], value: Any, parameters: Mapping[str, str]
    ) -> asyncio.Task[Result]:
        """Exchange *value* in a task of its own."""
        name = claimed.key[1]
        task = asyncio.ensure_future(self._exchange(claimed, value, parameters))
        self._running[name] = task
        task.add_done_callback(lambda _: self._running.pop(name, None))
        # Nobody may be waiting any more when it fails.
        task.add_done_callback(lambda t: t.cancelled() or t.exception())
        return task

    def running(self, attempt: Stored[Attempt]) -> asyncio.Task[Result] | None:
        """Return the task that exchanges that attempt, if it is ours."""
        return self._running.get(attempt.key[1])

    async def end_attempt(self, stored: Stored[Attempt], status: str) -> None:
        """Forget what an attempt was made with; its digest is kept, for replays."""
        update: dict[str, Any] = {"status": status, "data": {}, "answer": None}
        update["context"] = None
        entry = stored.entry.model_copy(update=update)
        await self._vault.replace(stored, entry, ATTEMPT_KEPT)
        if status == "failed":
            key = stored.entry.target.session_key()
            await self._waiting.unresolve(key, stored.entry.uid)

    async def _exchange(
        self, stored: Stored[Attempt], value: Any, parameters: Mapping[str, str]
    ) -> Result:
        attempt = stored.entry
        handler = self._registry.named(attempt.handler)
        sent = self._vault.now()
        try:
            context = await self._authenticated(handler, attempt, value, parameters)
            return await self.granted(stored, context, sent)
        except Exception as error:  # noqa: BLE001 - whatever a handler raises
            failure = error
        # Out here, so that what follows does not carry it: it may hold the code.
        with suppress(StorageError):
            await self.end_attempt(stored, "failed")
        if isinstance(failure, PocketAuthError):
            raise failure
        name = type(failure).__name__
        logger.warning("%s: exchange failed with %s", handler.name, name)
        raise ProviderError(
            f"{handler.name}: the exchange failed ({name})",
            provider=attempt.target.provider,
        )

    async def granted(
        self, stored: Stored[Attempt], context: AuthContext, sent: datetime
    ) -> Result:
        """Store a grant, or keep it until its person has chosen an account."""
        handler = self._registry.named(stored.entry.handler)
        try:
            if len(handler.choices(context)) > 1:
                return await self._hold(stored, context, sent)
            return await self._finish(stored, handler, context, sent)
        except ConfigurationError:  # it cannot be stored
            place = stored.entry.target.session_key()
            await self._outbox.give_back(place, handler, stored.entry.scopes, context)
            raise

    async def withdraw(self, stored: Stored[Attempt]) -> None:
        """Give back a grant that waits for a choice, which nobody will make."""
        attempt = stored.entry
        context = attempt.context.restore() if attempt.context else None
        if attempt.status != "choosing" or not isinstance(context, AuthContext):
            return
        update: dict[str, Any] = {"status": "failed", "context": None, "data": {}}
        entry = attempt.model_copy(update=update)
        if await self._vault.replace(stored, entry, ATTEMPT_KEPT):
            handler = self._registry.named(attempt.handler)
            place = attempt.target.session_key()
            await self._outbox.give_back(place, handler, attempt.scopes, context)

    async def _finish(
        self,
        stored: Stored[Attempt],
        handler: AuthHandlerInterface,
        context: AuthContext,
        sent: datetime,
    ) -> Result:
        attempt = stored.entry
        withheld = await self._save_grant(attempt, handler, context, sent)
        await self._waiting.end(attempt, "done", withheld)
        await self.end_attempt(stored, "done")
        outcome = "withheld" if withheld else "connected"
        return Result(outcome, await self.ticket_of(attempt))

    async def _hold(
        self, stored: Stored[Attempt], context: AuthContext, sent: datetime
    ) -> Result:
        """Keep a grant until its person has chosen an account."""
        update = {
            "status": "choosing",
            "context": Typed.of(context),
            "data": {"sent": sent.isoformat()},
        }
        entry = stored.entry.model_copy(update=update)
        await self._vault.replace(stored, entry, ATTEMPT_KEPT)
        before = await self._waiting.choosing(entry)
        if before is not None and before != entry.uid:
            # Begun in another tab: who chooses here does not choose there any more.
            forgotten = await self._vault.get(Attempt, attempt_key(before))
            if forgotten is not None:
                await self.withdraw(forgotten)
        return Result("choose", await self.ticket_of(entry))

    async def chosen(self, stored: Stored[Attempt], choice: str) -> Result:
        """
        Finish with the account that was chosen.

        Raises:
            CallbackRefused: There is no such account, or it was chosen already.
        """
        attempt, handler = stored.entry, self._registry.named(stored.entry.handler)
        context = attempt.context.restore() if attempt.context else None
        if attempt.status != "choosing" or not isinstance(context, AuthContext):
            raise CallbackRefused("replayed")
        if choice not in {each.id for each in handler.choices(context)}:
            raise CallbackRefused("malformed")
        sent = datetime.fromisoformat(attempt.data["sent"])
        update = {"status": "exchanging", "context": None}
        claimed = await self._vault.replace(
            stored, attempt.model_copy(update=update), ATTEMPT_KEPT
        )
        if claimed is None:
            raise CallbackRefused("replayed")
        return await self._finish(
            claimed, handler, handler.chosen(context, choice), sent
        )

    async def _authenticated(
        self,
        handler: AuthHandlerInterface,
        attempt: Attempt,
        value: Any,
        parameters: Mapping[str, str],
    ) -> AuthContext:
        future = FutureData(
            attempt.uid,
            dict(attempt.data),
            tuple(attempt.scopes),
            Answered(value),
            parameters,
        )
        context: Any = None
        with attempt_context(future), suppress(TimeoutError):
            async with asyncio.timeout(EXCHANGE_LIMIT.total_seconds() - 5):
                context = await handler.authenticate(
                    restored_request(attempt.request), attempt.uid, future=future
                )
                if not isinstance(context, AuthContext):
                    raise ConfigurationError(
                        f"{handler.name}: authenticate gave no AuthContext"
                    )
                return context
        raise ProviderUnavailable(
            f"{handler.name}: no answer to the exchange in time",
            provider=attempt.target.provider,
        )

    async def _save_grant(
        self,
        attempt: Attempt,
        handler: AuthHandlerInterface,
        context: AuthContext,
        sent: datetime,
    ) -> list[str]:
        """Store the grant unless that would take something away."""
        key, request = attempt.target.session_key(), restored_request(attempt.request)
        granted = attempt.scopes if context.scopes is None else context.scopes
        session = Session(
            context=Typed.of(context),
            scopes=granted,
            client_id=getattr(request, "client_id", None),
            obtained_at=sent,
        )
        for _ in range(CAS_TRIES):
            future = await self._waiting.of(attempt)
            if future is None:
                # Disconnected meanwhile: it does not come back.
                await self._outbox.give_back(key, handler, session.scopes, context)
                raise CallbackRefused("expired")
            old = await self._vault.get(Session, entry_key(Session, key))
            if old is None:
                if await self._vault.create(entry_key(Session, key), session):
                    break
                continue
            alive = usable(old.entry, handler, request, self._vault.now()) is not None
            less = alive and handler.missing_scopes(granted, old.entry.scopes)
            first_won = (
                alive
                and future.entry.id == attempt.future_id
                and future.entry.status == "done"
                and not handler.missing_scopes(old.entry.scopes, attempt.scopes)
            )
            if less or first_won or await self._vault.replace(old, session):
                break
        else:
            raise StorageError("a grant could not be saved: too many writers")
        self._changed(key.owner)
        return handler.missing_scopes(granted, attempt.scopes)

    async def ticket_of(self, attempt: Attempt) -> str | None:
        """Return the ticket whose page tells how it went."""
        future = await self._waiting.of(attempt)
        return future.entry.ticket if future else None


def restored_request(typed: Typed) -> AuthenticateRequest:
    """Return a request as it was sealed."""
    request = typed.restore()
    assert isinstance(request, AuthenticateRequest)  # noqa: S101 - sealed as one
    return request
