"""A grant becomes a session: saved in any weather, unless that would take away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

from ._errors import (
    CallbackRefused,
    ConfigurationError,
    StorageError,
    StorageUnavailable,
)
from ._models import AuthContext, AuthenticateRequest, Owner
from ._outbox import Outbox
from ._refresh import usable
from ._registry import Registry
from ._vault import (
    ATTEMPT_KEPT,
    CAS_TRIES,
    Attempt,
    Session,
    Stored,
    Typed,
    Vault,
    entry_key,
)
from ._waiting import Waiting
from ._withdrawals import Withdrawals
from .handlers import AuthHandlerInterface

logger = logging.getLogger(__name__)
T = TypeVar("T")

PAUSES_S = (0.1, 0.3, 1.0, 3.0)  # the person waits, and the exchange has its limit


@dataclass(frozen=True, slots=True)
class Result:
    """What a person's answer led to, for the page that is shown."""

    outcome: str
    ticket: str | None = None


class Linking:
    """Links grants to their owners."""

    def __init__(
        self,
        vault: Vault,
        registry: Registry,
        waiting: Waiting,
        outbox: Outbox,
        withdrawals: Withdrawals,
        *,
        changed: Callable[[Owner], None],
    ) -> None:
        self._vault, self._registry, self._waiting = vault, registry, waiting
        self._outbox, self._withdrawals = outbox, withdrawals
        self._changed = changed

    async def link(
        self, stored: Stored[Attempt], context: AuthContext, sent: datetime
    ) -> Result:
        """
        Store a grant as its owner's session, and tell who waits for it.

        Raises:
            CallbackRefused: Disconnected meanwhile; it is given back.
            StorageError: It cannot be stored; it is given back.
            ConfigurationError: It is not JSON; it is given back.
        """
        attempt = stored.entry
        handler = self._registry.named(attempt.handler)
        try:
            saved, withheld = await patiently(
                lambda: self._save(attempt, handler, context, sent)
            )
        except (StorageError, ConfigurationError):
            await self._withdrawals.give_back(attempt, context)
            raise
        if saved and await patiently(lambda: self._waiting.of(attempt)) is None:
            # Disconnected this very moment: whoever did so took the future first,
            # and perhaps did not see the session yet.
            await self._outbox.end(attempt.target.session_key())
            raise CallbackRefused("expired")
        account = getattr(context, "account", None)
        # It is theirs now: who waits for it is told in any weather, too.
        await patiently(lambda: self._waiting.end(attempt, "done", withheld, account))
        await patiently(lambda: self.end_attempt(stored, "done"))
        outcome = "withheld" if withheld else "connected"
        return Result(outcome, await self.ticket_of(attempt))

    async def end_attempt(self, stored: Stored[Attempt], status: str) -> None:
        """Forget what an attempt was made with; its digest is kept, for replays."""
        update: dict[str, Any] = {"status": status, "data": {}, "answer": None}
        update["grant"] = None
        entry = stored.entry.model_copy(update=update)
        await self._vault.replace(stored, entry, ATTEMPT_KEPT)
        if stored.entry.grant is not None:
            await self._withdrawals.settled(stored)
        if status == "failed":
            key = stored.entry.target.session_key()
            await self._waiting.unmark(key, stored.entry.uid)

    async def _save(
        self,
        attempt: Attempt,
        handler: AuthHandlerInterface,
        context: AuthContext,
        sent: datetime,
    ) -> tuple[bool, list[str]]:
        """
        Store the grant unless that would take something away.

        Returns:
            Whether it was stored, and the scopes that it lacks.
        """
        key, request = attempt.target.session_key(), restored_request(attempt.request)
        granted = attempt.scopes if context.scopes is None else context.scopes
        session = Session(
            context=Typed.of(context),
            scopes=granted,
            client_id=getattr(request, "client_id", None),
            connected_at=sent,
            obtained_at=sent,
        )
        saved: Stored[Session] | None = None
        loser: tuple[list[str], AuthContext] | None = None
        for _ in range(CAS_TRIES):
            future = await self._waiting.of(attempt)
            if future is None:
                # Disconnected meanwhile: it does not come back.
                await self._outbox.give_back(key, handler, session.scopes, context)
                raise CallbackRefused("expired")
            old = await self._vault.get(Session, entry_key(Session, key))
            if old is None:
                saved = await self._vault.create(entry_key(Session, key), session)
                if saved is not None:
                    break
                continue
            if old.entry.account == session.account:  # agreed to again
                since = old.entry.connected_at
                session = session.model_copy(update={"connected_at": since})
            alive = usable(old.entry, handler, request, self._vault.now()) is not None
            less = alive and handler.missing_scopes(granted, old.entry.scopes)
            first_won = (
                alive
                and future.entry.id == attempt.future_id
                and future.entry.status == "done"
                and not handler.missing_scopes(old.entry.scopes, attempt.scopes)
            )
            known = {old.entry.account, session.account} - {None}
            if less or first_won:
                loser = (session.scopes, context) if len(known) > 1 else None
                break
            loser = (old.entry.scopes, old.entry.auth_context())
            loser = loser if len(known) > 1 else None
            if (saved := await self._vault.replace(old, session)) is not None:
                break
        else:
            raise StorageError("a grant could not be saved: too many writers")
        self._changed(key.owner)
        if loser is not None:
            # Of another account. Of the same one it is left as it is: many providers
            # revoke all that one person has granted to one app.
            await self._outbox.give_back(key, handler, *loser)
        return saved is not None, handler.missing_scopes(granted, attempt.scopes)

    async def ticket_of(self, attempt: Attempt) -> str | None:
        """Return the ticket whose page tells how it went."""
        future = await self._waiting.of(attempt)
        return future.entry.ticket if future else None


async def patiently(work: Callable[[], Awaitable[T]]) -> T:
    """Do *work*, which may be done more than once, as soon as the store is back."""
    for pause_s in PAUSES_S:
        try:
            return await work()
        except StorageUnavailable:
            logger.critical("a grant is not stored yet; retrying")
            await asyncio.sleep(pause_s)
    return await work()


def restored_request(typed: Typed) -> AuthenticateRequest:
    """Return a request as it was sealed."""
    request = typed.restore()
    assert isinstance(request, AuthenticateRequest)  # noqa: S101 - sealed as one
    return request
