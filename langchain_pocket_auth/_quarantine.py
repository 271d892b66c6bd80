"""Grants that are exchanged and not linked yet: what each waits for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from ._errors import CallbackRefused, StorageError
from ._events import Event, Tell
from ._models import AuthContext, Choice
from ._proof import CODE_TRIES, is_taken, new_code, shown_code, tried_code
from ._registry import Registry
from ._site import Site
from ._vault import (
    CAS_TRIES,
    HOLD_KEPT,
    HOLD_TTL,
    LINK_LIMIT,
    Attempt,
    Future,
    Grant,
    Hold,
    Stored,
    Typed,
    Vault,
    attempt_key,
)
from ._waiting import Waiting
from ._withdrawals import Withdrawals


@dataclass(frozen=True, slots=True, repr=False)
class Held:
    """
    What a grant waits for that is exchanged and not linked yet; one after the other.

    Attributes:
        choices: The accounts between which the person has to choose.
        person: Whether the owner has to say that it was they who agreed.
        code: What the person has to give in the chat: `"7KMQ-X2RD"`. For the page of
            the browser that agreed, and for no other.
        browser: Digest of that browser's cookie.
        account: Whose account it is at the provider, where it told.
    """

    choices: Sequence[Choice]
    code: str | None
    person: bool
    browser: str | None
    account: str | None


@dataclass(frozen=True, slots=True)
class Shown:
    """
    What was shown of who answers.

    Attributes:
        proven: There is nothing to prove: the app itself answers, on this machine.
        known: The owner is signed in where the answer came from.
        browser: Digest of the cookie of the browser that it came from.
    """

    proven: bool = False
    known: bool = False
    browser: str | None = None


class Quarantine:
    """Keeps grants, sealed, until nothing is missing."""

    def __init__(
        self,
        vault: Vault,
        registry: Registry,
        waiting: Waiting,
        withdrawals: Withdrawals,
        *,
        site: Site,
        tell: Tell,
    ) -> None:
        self._vault, self._registry, self._waiting = vault, registry, waiting
        self._withdrawals, self._site, self._tell = withdrawals, site, tell

    # ------------------------------------------------------------------ coming in

    async def examine(
        self, attempt: Attempt, context: AuthContext, sent: datetime, shown: Shown
    ) -> Grant | None:
        """
        Return what has to be kept of a grant because something is missing, or `None`.

        Args:
            attempt: What brought it.
            context: The grant.
            sent: When it was asked for.
            shown: What is known of who brought it.

        Raises:
            CallbackRefused: The app does not take the account.
        """
        handler, site = self._registry.named(attempt.handler), self._site
        choose = len(handler.choices(context)) > 1
        person = site.verify_user is not None and not (shown.proven or shown.known)
        code = new_code() if site.confirm and not shown.proven else None
        if not (choose or person):
            await self._match(attempt, context)
            if code is None:
                return None
        return Grant(
            context=Typed.of(context),
            sent=sent,
            choose=choose,
            person=person,
            code=code,
            matched=not (choose or person),
        )

    async def keep(
        self, stored: Stored[Attempt], grant: Grant, browser: str | None
    ) -> None:
        """
        Keep a grant; more than once is as good as once.

        Raises:
            CallbackRefused: Disconnected meanwhile; it is given back.
            StorageError: It could not be kept.
        """
        attempt = stored.entry
        until = max(attempt.expires_at, grant.sent + HOLD_TTL)
        # First: what it names is perhaps not kept, but nothing is kept unnamed.
        index = ("held", stored.key[1])
        await self._vault.create(index, Hold(until=until), HOLD_KEPT)
        update = {"status": "held", "grant": grant, "data": {}, "expires_at": until}
        # The first to answer has to go on, where nobody clicked on the link before.
        update["browser"] = attempt.browser or browser
        entry = attempt.model_copy(update=update)
        held = await self._vault.replace(stored, entry, HOLD_KEPT)
        if held is None:
            # Perhaps an answer was lost, not what the store was told.
            held = await self._vault.get(Attempt, stored.key)
            if held is None or held.entry != entry:
                raise StorageError("a grant could not be kept: its attempt is over")
        try:
            before = await self._waiting.holding(attempt)
        except CallbackRefused:
            await self._withdrawals.withdraw(held)
            raise
        if before in {None, attempt.uid}:
            return
        # Begun in another tab: who goes on here does not go on there any more.
        forgotten = await self._vault.get(Attempt, attempt_key(before or ""))
        if forgotten is not None:
            await self._withdrawals.withdraw(forgotten)

    # ------------------------------------------------------------- what is missing

    async def of(self, future: Future) -> Stored[Attempt] | None:
        """Return the attempt whose grant waits; one whose time is over is ended."""
        if future.held is None:
            return None
        stored = await self._vault.get(Attempt, attempt_key(future.held))
        if stored is None or stored.entry.status != "held":
            return None
        if self._vault.now() >= stored.entry.expires_at:
            await self._withdrawals.withdraw(stored)
            return None
        return stored

    async def shown(self, future: Future) -> Held | None:
        """Return what the grant of a future waits for; `None`: there is none."""
        stored = await self.of(future)
        if stored is None or (grant := stored.entry.grant) is None:
            return None
        handler = self._registry.named(stored.entry.handler)
        browser = stored.entry.browser
        # Answered by the app itself it belongs to no browser, so to nobody's eyes.
        seen = browser is not None or not self._site.public
        last = seen and not (grant.choose or grant.person)
        return Held(
            choices=handler.choices(grant.auth_context()) if grant.choose else (),
            code=shown_code(grant.code) if grant.code and last else None,
            person=grant.person,
            browser=browser,
            account=grant.account,
        )

    async def give(
        self, stored: Stored[Attempt], change: Callable[[Grant], Grant]
    ) -> Stored[Attempt]:
        """
        Give a grant what it waits for.

        Returns:
            Its attempt, held still; or `exchanging`: the caller has to link it now.

        Raises:
            CallbackRefused: It waits no more, or is given back now, as the app does not
                take the account. Or what *change* raises.
        """
        for _ in range(CAS_TRIES):
            attempt, old = stored.entry, stored.entry.grant
            if attempt.status != "held" or old is None:
                raise CallbackRefused("replayed")
            new = await self._brought_on(stored, change(old))
            update: dict[str, Any] = {"grant": new}
            if not new.waits:
                until = self._vault.now() + LINK_LIMIT
                update |= {"status": "exchanging", "exchange_until": until}
            entry = attempt.model_copy(update=update)
            if saved := await self._vault.replace(stored, entry, HOLD_KEPT):
                return saved
            again = await self._vault.get(Attempt, stored.key)
            if again is None:
                raise CallbackRefused("replayed")
            stored = again
        raise StorageError("a grant could not be changed: too many writers")

    async def try_code(self, stored: Stored[Attempt], code: str) -> Stored[Attempt]:
        """
        Give a grant the code that came from the chat.

        The last try that is wrong ends the attempt; the link works again.

        Raises:
            CallbackRefused: It is not the code, or nothing waits for it.
        """
        right = False

        def tried(grant: Grant) -> Grant:
            nonlocal right
            right, after = tried_code(grant, code)
            return after

        # Written down before anybody learns of it: no two tries count as one.
        after = await self.give(stored, tried)
        if right:
            return after
        if (grant := after.entry.grant) and len(grant.wrong) >= CODE_TRIES:
            self.refused(after.entry, "too many wrong codes", grant.account)
            await self._withdrawals.withdraw(after)
        raise CallbackRefused("mismatch")

    # -------------------------------------------------------- whether it is right

    async def _brought_on(self, stored: Stored[Attempt], grant: Grant) -> Grant:
        if grant.choose or grant.person or grant.matched:
            return grant
        try:
            await self._match(stored.entry, grant.auth_context())
        except CallbackRefused:
            await self._withdrawals.withdraw(stored)
            raise
        return grant.model_copy(update={"matched": True})

    async def _match(self, attempt: Attempt, context: AuthContext) -> None:
        matcher, owner = self._site.account_matcher, attempt.target.session_key().owner
        if matcher is not None and not await is_taken(matcher, owner, context):
            account = getattr(context, "account", None)
            self.refused(attempt, "the app does not take this account", account)
            raise CallbackRefused("wrong_account", account=account)

    def refused(
        self, attempt: Attempt, reason: str, account: str | None = None
    ) -> None:
        """Tell that somebody was turned away."""
        key, scopes = attempt.target.session_key(), tuple(attempt.scopes)
        self._tell(
            Event.at(key, "refused", scopes=scopes, account=account, reason=reason)
        )
