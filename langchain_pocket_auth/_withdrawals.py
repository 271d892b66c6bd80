"""Grants that were held and will not be linked: given back, now or in the end."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from ._errors import ConfigurationError, CredentialUnreadable, StorageError
from ._models import AuthContext, SessionKey
from ._outbox import Outbox
from ._registry import Registry
from ._vault import (
    ATTEMPT_KEPT,
    HOLD_KEPT,
    LINK_LIMIT,
    Attempt,
    Grant,
    Hold,
    Session,
    Stored,
    Vault,
    entry_key,
)
from ._waiting import Waiting


class Withdrawals:
    """
    Ends grants that wait in attempts.

    Each has an index entry from before it is kept until after it was linked or given
    back, so that whoever dies meanwhile leaves it to the housekeeping.
    """

    def __init__(
        self, vault: Vault, registry: Registry, waiting: Waiting, outbox: Outbox
    ) -> None:
        self._vault, self._registry = vault, registry
        self._waiting, self._outbox = waiting, outbox
        self._after: str | None = None

    async def withdraw(self, stored: Stored[Attempt]) -> bool:
        """Give back a grant that waits; `False`: it does not any more."""
        attempt, grant = stored.entry, stored.entry.grant
        if attempt.status != "held" or grant is None:
            return False
        return await self._withdraw(stored, grant)

    async def _withdraw(self, stored: Stored[Attempt], grant: Grant) -> bool:
        attempt = stored.entry
        # Kept until it is given back, should we die over that.
        until = self._vault.now() + LINK_LIMIT
        claim: dict[str, Any] = {"status": "failed", "exchange_until": until}
        claimed = await self._vault.replace(
            stored, attempt.model_copy(update=claim), HOLD_KEPT
        )
        if claimed is None:
            return False  # somebody else was faster
        await self.give_back(attempt, grant.auth_context())
        await self._vault.replace(
            claimed,
            claimed.entry.model_copy(update={"grant": None, "data": {}}),
            ATTEMPT_KEPT,
        )
        await self.settled(stored)
        await self._waiting.unmark(attempt.target.session_key(), attempt.uid)
        return True

    async def give_back(self, attempt: Attempt, context: AuthContext) -> None:
        """Revoke a grant that is not linked, unless that would end the one in use."""
        key, account = attempt.target.session_key(), getattr(context, "account", None)
        used = await self._used(key) if account else None
        if used is not None and used.account == account:
            return  # many providers revoke all that one person has granted to one app
        handler = self._registry.named(attempt.handler)
        await self._outbox.give_back(key, handler, attempt.scopes, context)

    async def _used(self, key: SessionKey) -> Session | None:
        try:
            stored = await self._vault.get(Session, entry_key(Session, key))
        except StorageError:
            return None
        return stored.entry if stored else None

    async def settled(self, stored: Stored[Attempt]) -> None:
        """Forget that an attempt holds something."""
        await self._vault.discard(("held", stored.key[1]))

    async def expire(self, limit: int = 100) -> int:
        """Give back what has waited for too long, of the next *limit*; how many."""
        found, self._after = await self._vault.page(
            Hold, "held", after=self._after, limit=limit
        )
        now = self._vault.now()
        due = [hold for hold in found if hold.entry.until <= now]
        given_back = 0
        for hold in due:
            # One that cannot be read, or whose handler is missing, is in nobody's way.
            with suppress(CredentialUnreadable, ConfigurationError):
                given_back += await self._expired(hold)
        return given_back

    async def _expired(self, hold: Stored[Hold]) -> bool:
        stored = await self._vault.get(Attempt, ("attempt", hold.key[1]))
        if stored is None or (grant := stored.entry.grant) is None:
            await self._vault.discard(hold.key)
            return False
        return await self.settle(stored, grant)

    async def settle(self, stored: Stored[Attempt], grant: Grant) -> bool:
        """End a grant that nobody is at any more; whether it was given back."""
        attempt, now = stored.entry, self._vault.now()
        until = attempt.expires_at
        if attempt.status != "held" and attempt.exchange_until:
            until = attempt.exchange_until
        if now < until:
            return False  # somebody is at it
        used = await self._used(attempt.target.session_key())
        if attempt.status == "held" or used is None or used.context != grant.context:
            return await self._withdraw(stored, grant)
        # Whoever linked it has died over it.
        await self._waiting.end(attempt, "done", (), grant.account)
        done = attempt.model_copy(update={"status": "done", "grant": None})
        await self._vault.replace(stored, done, ATTEMPT_KEPT)
        await self.settled(stored)
        return False
