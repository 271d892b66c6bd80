"""Grants that are given back to their providers: at once, or as soon as they listen."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from ._errors import (
    ConfigurationError,
    CredentialUnreadable,
    ProviderUnavailable,
    StorageError,
)
from ._events import Event, Tell
from ._models import AuthContext, Owner, SessionKey
from ._registry import Registry
from ._usage import Usage
from ._vault import CAS_TRIES, Owed, Pointer, Session, Stored, Typed, Vault, entry_key
from .handlers import AuthHandlerInterface

logger = logging.getLogger(__name__)

TRY_LIMIT_S = 20.0  # two requests of 10 s
LEASE = timedelta(seconds=60)  # of who tries: longer than a try
# Until the first is over, it is whoever wrote the record that tries.
PAUSES = tuple(timedelta(minutes=m) for m in (1, 5, 30, 120))
PAUSE = timedelta(hours=6)  # after those
KEPT = timedelta(days=3)
ERASED = KEPT + timedelta(days=1)  # even if nobody keeps house
AT_ONCE = 10  # tries beside each other, of the records that are due


class _LaterError(Exception):
    """It has to be tried again."""

    def __init__(self, why: str, wait_s: float = 0.0) -> None:
        super().__init__(why)
        self.wait = timedelta(seconds=wait_s)


@dataclass(slots=True, repr=False)
class _Debt:
    """A grant to give back, and its record, where there is one."""

    key: SessionKey
    handler: str
    scopes: list[str]
    context: AuthContext | None
    record: Stored[Owed] | None = None


class Outbox:
    """
    Revokes grants (RFC 7009). What is to be done is written down before it is tried.

    A connection ends in three steps: the record here, the deletion, the request to
    the provider. Whoever dies between them leaves a record, by which any replica goes
    on. The deletion is a compare-and-swap, so one of many who delete gives back.

    A grant whose connection was made anew meanwhile is not revoked any more, unless
    both accounts are known and differ: many providers revoke all that one person has
    granted to one app, and with it the new grant. Its tokens are erased here.

    Args:
        vault: Where the records are.
        registry: Which handlers there are.
        usage: What is forgotten together with a session.
        changed: Called when an owner's sessions have changed.
        tell: Called with what happened.
    """

    def __init__(
        self,
        vault: Vault,
        registry: Registry,
        usage: Usage,
        *,
        changed: Callable[[Owner], None],
        tell: Tell,
    ) -> None:
        self._vault, self._registry, self._usage = vault, registry, usage
        self._changed, self._tell = changed, tell
        self._after: str | None = None
        self.running: set[asyncio.Task[bool]] = set()
        """Tries that run; what is cut off is done by its record later."""

    # ---------------------------------------------------------------------- ending

    async def end(self, key: SessionKey, reason: str | None = None) -> bool:
        """
        Delete a session, then give its grant back; `False`: there is none.

        Raises:
            StorageError: It may be there still. If it was written down by then that it
                ends, it does as soon as the store is back.
        """
        place = entry_key(Session, key)
        for _ in range(CAS_TRIES):
            try:
                if (stored := await self._vault.get(Session, place)) is None:
                    return False
                debt = await self._owe(key, stored)
            except CredentialUnreadable:
                # Deleting it is the remedy for that.
                logger.warning("%s: unreadable, so not revoked", _handler_of(key))
                if not await self._vault.discard(place):
                    return False
                await self._gone(key, None, reason)
                return True
            if await self._vault.delete(stored):
                await self._gone(key, stored.entry, reason)
                if debt is not None:
                    await self._pay_now(debt)
                return True
            # Renewed or deleted this very moment: this grant is not ours to give back.
            # Unless somebody goes on by our record, who has leased it then.
            if debt is not None and (record := debt.record) is not None:
                holder = secrets.token_urlsafe(16)
                if await self._vault.lease(record, holder, LEASE):
                    await self._vault.delete(record)
        raise StorageError("a session could not be deleted: too many writers")

    async def _owe(self, key: SessionKey, stored: Stored[Session]) -> _Debt | None:
        context, name = stored.entry.auth_context(), _handler_of(key)
        # One that is not passed any more may be tomorrow, or elsewhere already.
        with suppress(ConfigurationError):
            if not self._registry.named(name).can_revoke(context):
                return None
        debt = _Debt(key, name, stored.entry.scopes, context)
        debt.record = await self._write(debt, session_version=stored.version)
        return debt

    async def _gone(
        self, key: SessionKey, session: Session | None, reason: str | None
    ) -> None:
        self._changed(key.owner)
        scopes = tuple(session.scopes) if session else ()
        account = session.account if session else None
        self._tell(
            Event.at(key, "revoked", scopes=scopes, account=account, reason=reason)
        )
        with suppress(StorageError):  # it has a lifetime
            await self._usage.forget(key)

    async def give_back(
        self,
        key: SessionKey,
        handler: AuthHandlerInterface,
        scopes: Iterable[str],
        context: AuthContext,
        *,
        spare: bool = False,
    ) -> None:
        """
        Revoke a grant that is in no session; tries once, and then in the background.

        Args:
            key: Where it would have been kept.
            handler: Where it came from.
            scopes: What it grants.
            context: Its tokens.
            spare: Do not revoke it late if there is a session at *key* by then, of
                an account that is not known; one of the same always spares it.
        """
        if not handler.can_revoke(context):
            return
        debt = _Debt(key, handler.name, list(scopes), context)
        try:
            debt.record = await self._write(debt, spares=spare)
        except (StorageError, ConfigurationError) as error:
            # The store is away, or it cannot be stored: this one try has to do.
            name = type(error).__name__
            logger.warning("%s: not written down: %s", handler.name, name)
        await self._pay_now(debt)

    async def _write(self, debt: _Debt, **more: Any) -> Stored[Owed] | None:
        assert debt.context is not None  # noqa: S101 - only of records is it unknown
        now = self._vault.now()
        owed = Owed(
            target=Pointer.to(debt.key),
            handler=debt.handler,
            scopes=debt.scopes,
            context=Typed.of(debt.context),
            next_try=now + PAUSES[0],
            since=now,
            **more,
        )
        place = ("outbox", secrets.token_urlsafe(16))
        return await self._vault.create(place, owed, ERASED)

    async def _pay_now(self, debt: _Debt) -> None:
        task = asyncio.ensure_future(self._pay(debt))
        self.running.add(task)
        task.add_done_callback(self.running.discard)
        task.add_done_callback(lambda t: t.cancelled() or t.exception())
        # A caller who is cancelled does not stop it.
        with suppress(StorageError):  # the record is there still, so it comes again
            await asyncio.shield(task)

    # ---------------------------------------------------------------------- trying

    async def _pay(self, debt: _Debt) -> bool:
        """Try once; whether it is given back now."""
        try:
            taken = await self._tried(debt)
        except _LaterError as later:
            logger.warning("%s: not revoked yet: %s", debt.handler, later)
            return await self._try_again(debt, later.wait)
        return await self._closed(debt, None if taken else "it cannot be revoked there")

    async def _tried(self, debt: _Debt) -> bool:
        assert debt.context is not None  # noqa: S101 - it was restored
        try:
            async with asyncio.timeout(TRY_LIMIT_S):
                handler = self._registry.named(debt.handler)
                request = handler.make_request(list(debt.scopes))
                return bool(await handler.revoke(request, debt.context))
        except ProviderUnavailable as error:
            why, wait_s = type(error).__name__, error.retry_after_s or 0.0
        except Exception as error:  # noqa: BLE001 - whatever a handler raises
            # A wrong setting, too: it is repaired, and the grant is not forgotten.
            why, wait_s = type(error).__name__, 0.0
        # Out here: the original may hold the token.
        raise _LaterError(why, wait_s)

    async def _try_again(self, debt: _Debt, wait: timedelta) -> bool:
        if (record := debt.record) is None:
            return await self._closed(debt, "neither provider nor store could be told")
        owed, now = record.entry, self._vault.now()
        if now >= owed.since + KEPT:
            return await self._closed(debt, "the provider did not take it for 3 days")
        pause = PAUSES[owed.tries] if owed.tries < len(PAUSES) else PAUSE
        then = min(now + max(pause, wait), owed.since + KEPT)
        update = {"tries": owed.tries + 1, "next_try": then}
        left = owed.since + ERASED - now
        await self._vault.replace(record, owed.model_copy(update=update), left)
        return False

    async def _closed(self, debt: _Debt, reason: str | None) -> bool:
        if debt.record is not None and not await self._vault.delete(debt.record):
            return False  # another replica was faster
        self._tell(
            Event.at(
                debt.key,
                "given_back" if reason is None else "not_given_back",
                scopes=tuple(debt.scopes),
                account=_account(debt.context),
                reason=reason,
            )
        )
        return reason is None

    # ------------------------------------------------------------------ what is due

    async def give_back_due(self, limit: int = 100) -> int:
        """Try what is due among the next *limit* records; how many are given back."""
        found, self._after = await self._vault.page(
            Owed, "outbox", after=self._after, limit=limit
        )
        now, turn = self._vault.now(), asyncio.Semaphore(AT_ONCE)
        due = [stored for stored in found if stored.entry.next_try <= now]
        tries = (self._leased(stored, turn) for stored in due)
        results = await asyncio.gather(*tries, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results.count(True)

    async def _leased(self, stored: Stored[Owed], turn: asyncio.Semaphore) -> bool:
        holder = secrets.token_urlsafe(16)
        async with turn:
            if not await self._vault.lease(stored, holder, LEASE):
                return False
            try:
                current = await self._vault.get(Owed, stored.key)
                if current is None or current.version != stored.version:
                    return False
                return await self._pay_due(current)
            finally:
                await asyncio.shield(self._vault.free(stored, holder))

    async def _pay_due(self, record: Stored[Owed]) -> bool:
        owed, key = record.entry, record.entry.target.session_key()
        debt = _Debt(key, owed.handler, owed.scopes, None, record)
        try:
            context = owed.context.restore()
            assert isinstance(context, AuthContext)  # noqa: S101 - sealed as one
            debt.context = context
            session = await self._vault.get(Session, entry_key(Session, key))
        except CredentialUnreadable as error:
            logger.warning("%s: not revoked yet: %s", owed.handler, error)
            return await self._try_again(debt, timedelta())
        if session is not None and session.version == owed.session_version:
            # Whoever wanted it gone has died before it was.
            if not await self._vault.delete(session):
                return False
            await self._gone(key, session.entry, None)
        elif session is not None:
            ours, theirs = _account(context), session.entry.account
            unknown = ours is None or theirs is None
            spares = owed.spares or owed.session_version is not None
            if spares if unknown else ours == theirs:
                return await self._closed(debt, "it was connected anew meanwhile")
        return await self._pay(debt)


def _account(context: AuthContext | None) -> str | None:
    account = getattr(context, "account", None)
    return account if isinstance(account, str) else None


def _handler_of(key: SessionKey) -> str:
    return key.connection.partition("?")[0]
