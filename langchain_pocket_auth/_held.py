"""What persons do with a grant that waits: choose, vouch, give its code, or nothing."""

from __future__ import annotations

from typing import Any

from ._admission import Admission, same_browser
from ._errors import CallbackRefused
from ._exchange import Exchanges
from ._linking import Result
from ._models import Owner, SessionKey
from ._quarantine import Held, Quarantine
from ._registry import Registry
from ._site import THE_APP, Visitor
from ._vault import Attempt, Future, Grant, Stored, Typed
from ._waiting import Waiting
from ._withdrawals import Withdrawals

WAITS = frozenset({"held", "choose"})  # outcomes that are not the end


class HeldGrants:
    """The grants of attempts that are exchanged and not linked yet."""

    def __init__(
        self,
        registry: Registry,
        waiting: Waiting,
        *,
        admission: Admission,
        exchanges: Exchanges,
        quarantine: Quarantine,
        withdrawals: Withdrawals,
    ) -> None:
        self._registry, self._waiting = registry, waiting
        self._admission, self._exchanges = admission, exchanges
        self._quarantine, self._withdrawals = quarantine, withdrawals

    async def ticket(self, ticket: str) -> tuple[Stored[Future], SessionKey]:
        """
        Return the future of a connect link.

        Raises:
            CallbackRefused: Unknown or expired.
        """
        return await self._waiting.ticket(ticket)

    async def held(self, future: Future) -> Held | None:
        """Return what a grant waits for that is exchanged and not linked yet."""
        return await self._quarantine.shown(future)

    async def choose(
        self, ticket: str, choice: str, visitor: Visitor = THE_APP
    ) -> Result:
        """
        Take the account that the person of a connect link has chosen.

        Raises:
            CallbackRefused: Nothing is to be chosen, or not that; `mismatch` of the
                browser, `sign_in`, `wrong_person`, `wrong_account`.
        """
        stored, key = await self._held_at(ticket, visitor)
        known = self._admission.admit(visitor, key, here=True)

        def chosen(grant: Grant) -> Grant:
            handler = self._registry.named(stored.entry.handler)
            context = grant.auth_context()
            if not grant.choose:
                raise CallbackRefused("replayed")
            if choice not in {each.id for each in handler.choices(context)}:
                raise CallbackRefused("malformed")
            update: dict[str, Any] = {"choose": False}
            update["context"] = Typed.of(handler.chosen(context, choice))
            if known:  # they have said so by choosing
                update["person"] = False
            return grant.model_copy(update=update)

        return await self._exchanges.go_on(await self._quarantine.give(stored, chosen))

    async def vouch(self, ticket: str, visitor: Visitor) -> Result:
        """
        Take the owner's word that it was they who agreed; more than once is fine.

        Raises:
            CallbackRefused: Nothing waits for that; `mismatch` of the browser,
                `sign_in`; `wrong_person`: the grant is given back; `wrong_account`.
        """
        try:
            stored, key = await self._held_at(ticket, visitor)
        except CallbackRefused:
            if (await self.ticket(ticket))[0].entry.status == "done":
                return Result("again", ticket)
            raise
        if visitor.trusted:
            raise CallbackRefused("sign_in")  # the app cannot say so for them
        try:
            known = self._admission.admit(visitor, key, here=True)
        except CallbackRefused as refusal:
            if refusal.reason == "wrong_person":
                await self._withdrawals.withdraw(stored)
            raise

        def vouched(grant: Grant) -> Grant:
            return grant.model_copy(update={"person": grant.person and not known})

        return await self._exchanges.go_on(await self._quarantine.give(stored, vouched))

    async def confirm(self, future_id: str, code: str, owner: Owner | None) -> bool:
        """
        Take the code that came from a chat; whether it was right and all is done.

        Args:
            future_id: Of the question in that chat.
            code: As a person writes it.
            owner: Whose chat; `None`: the caller has seen to that.

        Raises:
            StorageError: It could not be linked.
        """
        future = await self._waiting.asked(future_id)
        stored = await self._quarantine.of(future.entry) if future else None
        if stored is None:
            return False
        if owner not in {None, stored.entry.target.session_key().owner}:
            return False
        try:
            after = await self._quarantine.try_code(stored, code)
            return (await self._exchanges.go_on(after)).outcome not in WAITS
        except CallbackRefused:
            return False

    async def _held_at(
        self, ticket: str, visitor: Visitor
    ) -> tuple[Stored[Attempt], SessionKey]:
        future, key = await self.ticket(ticket)
        if (stored := await self._quarantine.of(future.entry)) is None:
            raise CallbackRefused("replayed")
        same_browser(visitor, stored.entry)
        return stored, key

    async def withdraw(self, future: Future) -> None:
        """Give back what the person of a future has not gone on with."""
        if stored := await self._quarantine.of(future):
            await self._withdrawals.withdraw(stored)

    async def expire_held(self, limit: int = 100) -> int:
        """Give back what has waited for too long, of the next *limit*; how many."""
        return await self._withdrawals.expire(limit)
