"""The state machine: check, prepare, authenticate, and what a callback brings."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from datetime import timedelta
from typing import Any
from weakref import WeakValueDictionary

from ._attempts import Attempts
from ._errors import (
    AuthorizationRefused,
    AuthorizationRequired,
    ConfigurationError,
    CredentialUnreadable,
    PocketAuthError,
    ScopeWithheld,
    StorageError,
)
from ._models import (
    AuthenticateRequest,
    AuthState,
    Consent,
    Outcome,
    Owner,
    Requirement,
    SessionKey,
)
from ._questions import Questions
from ._refresh import Refresher, advisory_at, give_back, usable
from ._registry import Registry
from ._standing import Standing, decide
from ._vault import (
    CAS_TRIES,
    Future,
    Pauses,
    Session,
    Stored,
    Vault,
    entry_key,
)

logger = logging.getLogger(__name__)

_NOTHING_TO_ASK = {AuthState.SKIP_AUTH, AuthState.DO_REFRESH, AuthState.RESOLVED}


class Engine:
    """
    Decides and keeps. Runs on one event loop; knows no LangChain, HTTP or SQL.

    Args:
        vault: Where everything is kept.
        registry: Which handlers there are.
        base_url: Where connect links and callbacks live.
        listen: Awaited before a link is given out.
        future_ttl: How long a connect link lives.
    """

    def __init__(
        self,
        vault: Vault,
        registry: Registry,
        *,
        base_url: str,
        listen: Callable[[], Awaitable[None]],
        future_ttl: timedelta,
        changed: Callable[[Owner], None] = lambda _: None,
    ) -> None:
        self.vault, self.registry = vault, registry
        self._listen = listen
        self._questions = Questions(vault, registry, base_url, future_ttl)
        self._changed = changed
        self._refresher = Refresher(vault)
        self.attempts = Attempts(vault, registry, changed)
        self._background: set[asyncio.Task[Any]] = set()
        self._turnstiles: WeakValueDictionary[Owner, asyncio.Lock]
        self._turnstiles = WeakValueDictionary()

    async def close(self) -> None:
        """End what runs in the background."""
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await asyncio.gather(self._refresher.close(), self.attempts.close())
        await self.vault.close()

    # ------------------------------------------------------------ check and prepare

    async def standing(
        self,
        owner: Owner,
        requirement: Requirement,
        request: AuthenticateRequest | None = None,
    ) -> Standing:
        """Read everything of the owner once, and decide."""
        shelf = await self.vault.shelf(owner)
        candidates = self.registry.candidates(requirement)
        now = self.vault.now()
        return decide(shelf, candidates, owner, requirement, request, now=now)

    async def prepare(
        self,
        owner: Owner,
        requirement: Requirement,
        *,
        request: AuthenticateRequest | None = None,
        turn: str | None = None,
        tools: Iterable[str] = (),
    ) -> Consent | None:
        """
        Return the consent to wait for; `None` if none is needed.

        However often it is called there is one future, and so one link, per
        session key; more scopes widen it.

        Raises:
            ConfigurationError: A setting is wrong; no link was made.
        """
        # One after the other here, so that only other processes can come between.
        async with self._turnstiles.setdefault(owner, asyncio.Lock()):
            for _ in range(CAS_TRIES):
                standing = await self.standing(owner, requirement, request)
                if standing.state in _NOTHING_TO_ASK:
                    return None
                await self._listen()
                consent = await self._questions.ask(standing, requirement, turn, tools)
                if consent is not None:
                    return consent
        raise StorageError("a future could not be saved: too many writers")

    # --------------------------------------------------------------- authenticate

    async def authenticate(
        self,
        owner: Owner,
        requirement: Requirement,
        *,
        request: AuthenticateRequest | None = None,
        timeout_s: float = 300.0,
    ) -> Stored[Session]:
        """
        Return the session, fresh; waits while a connect link is out.

        Raises:
            AuthorizationRequired: Nothing was prepared, or the person did not
                finish within *timeout_s* seconds.
            AuthorizationRefused: The person said no.
            ProviderUnavailable: The token is over and cannot be renewed now.
        """
        end = asyncio.get_running_loop().time() + timeout_s
        awaited: str | None = None
        while True:
            standing = await self.standing(owner, requirement, request)
            if standing.state is AuthState.SKIP_AUTH and standing.session:
                self._renew_in_passing(standing)
                return standing.session
            if standing.state is AuthState.DO_REFRESH:
                if renewed := await self._renew(standing):
                    return renewed
                continue
            future = standing.future
            if (
                standing.state is AuthState.RESOLVED
                and future
                and future.entry.resolved
            ):
                awaited = future.entry.id
                await self.attempts.finish(future.entry.resolved, standing.key)
                continue
            left = end - asyncio.get_running_loop().time()
            pending = standing.state is AuthState.PENDING_RESOLVE
            if pending and future and left > 0:
                awaited = future.entry.id
                await self.attempts.wait(future, left)
                continue
            if (
                future
                and awaited == future.entry.id
                and future.entry.status == "denied"
            ):
                raise declined(self.registry.label(requirement.provider))
            raise AuthorizationRequired(
                f"{requirement.provider}: not connected ({standing.state.name}); "
                "call prepare and let the person open the link",
                provider=requirement.provider,
                scopes=standing.missing,
                url=self._questions.link(future.entry) if pending and future else None,
            )

    async def _renew(self, standing: Standing) -> Stored[Session] | None:
        renewed = await self._refresher.renew(standing.key, standing.handler)
        self._changed(standing.key.owner)
        if renewed is None or renewed.entry.needs_consent:
            return None
        return renewed

    def _renew_in_passing(self, standing: Standing) -> None:
        session, handler = standing.session, standing.handler
        if session is None or session.entry.needs_consent:
            return
        context = session.entry.auth_context()
        due = advisory_at(session.entry, context)
        if due and self.vault.now() >= due and handler.can_refresh(context):
            task = asyncio.ensure_future(self._renew_early(standing))
            self._background.add(task)
            task.add_done_callback(self._background.discard)

    async def _renew_early(self, standing: Standing) -> None:
        with suppress(PocketAuthError):
            await self._refresher.renew(standing.key, standing.handler, early=True)
        self._changed(standing.key.owner)

    # ----------------------------------------------------------------- agent side

    async def settle(
        self, owner: Owner, outcome: Outcome, *, turn: str, ask: bool
    ) -> Stored[Session] | None:
        """
        Bring a turn's requirement to its outcome, which is written into *outcome*.

        Returns the session when the requirement is met. With `ask=False` a missing
        session is left as neither consent nor refusal.
        """
        requirement = outcome.requirement
        standing = await self.standing(owner, requirement)
        if standing.state is AuthState.RESOLVED and standing.future:
            uid = standing.future.entry.resolved or ""
            await self.attempts.finish(uid, standing.key)
            standing = await self.standing(owner, requirement)
        if standing.state is AuthState.DO_REFRESH:
            renewed = await self._renew(standing)
            standing = await self.standing(owner, requirement)
            if renewed is not None:
                return renewed
        if standing.state is AuthState.SKIP_AUTH and standing.session:
            self._renew_in_passing(standing)
            return standing.session
        future = standing.future.entry if standing.future else None
        label = self.registry.label(requirement.provider)
        if future and turn in future.turns and future.status == "denied":
            outcome.refusal = declined(label)
        elif future and turn in future.turns and future.status == "done":
            outcome.refusal = ScopeWithheld(
                f"The user connected {label} but did not grant: "
                f"{', '.join(standing.missing) or 'what is needed'}."
            )
        elif ask:
            outcome.consent = await self.prepare(
                owner, requirement, turn=turn, tools=outcome.tools
            )
            if outcome.consent is None:  # connected this very moment
                return await self.settle(owner, outcome, turn=turn, ask=False)
        return None

    async def pauses(self, task: str) -> Stored[Pauses] | None:
        """Return how often guarded calls of a task have paused."""
        return await self.vault.get(Pauses, ("pauses", task))

    async def count_pause(self, task: str, ordinal: int, count: int) -> None:
        """Write down how often the guarded call *ordinal* of a task has paused."""
        for _ in range(CAS_TRIES):
            old = await self.pauses(task)
            counts = dict(old.entry.counts) if old else {}
            counts[str(ordinal)] = count
            entry = Pauses(counts=counts)
            key = ("pauses", task)
            if await (
                self.vault.replace(old, entry) if old else self.vault.create(key, entry)
            ):
                return
        raise StorageError("a pause could not be counted: too many writers")

    async def forget_pauses(self, task: str) -> None:
        """Forget a task that is over."""
        await self.vault.discard(("pauses", task))

    # ----------------------------------------------------------------- connections

    async def delete(
        self, owner: Owner, provider: str, profile: str, handler: str | None
    ) -> bool:
        """Delete sessions, here at once, at the provider as far as it can be."""
        requirement = Requirement(provider, handler=handler, profile=profile)
        shelf = await self.vault.shelf(owner)
        found = False
        for candidate in self.registry.candidates(requirement):
            key = SessionKey(owner, provider, profile, candidate.connection())
            await self.vault.discard(entry_key(Future, key))
            if not shelf.holds(Session, key):
                continue
            await self.vault.discard(entry_key(Session, key))
            self._changed(owner)
            found = True
            try:
                session = shelf.get(Session, key)
                context = session.entry.auth_context() if session else None
            except CredentialUnreadable:
                # Deleting it is the remedy for that.
                logger.warning("%s: unreadable, so not revoked", candidate.name)
                continue
            if session and context:
                await give_back(candidate, session.entry, context)
        return found

    async def sessions(
        self, owner: Owner
    ) -> list[tuple[SessionKey, Stored[Session], AuthState]]:
        """Return all sessions of an owner, and how each stands by itself."""
        shelf = await self.vault.shelf(owner)
        found = [(key, shelf.get(Session, key)) for key in shelf.keys(Session)]
        return [
            (key, stored, self._state(key, stored.entry))
            for key, stored in found
            if stored is not None
        ]

    def _state(self, key: SessionKey, session: Session) -> AuthState:
        try:
            handler = self.registry.named(key.connection.partition("?")[0])
            request = handler.make_request(list(session.scopes))
        except ConfigurationError:
            return AuthState.DO_AUTH  # the app is not registered there any more
        return usable(session, handler, request, self.vault.now()) or AuthState.DO_AUTH


def declined(label: str) -> AuthorizationRefused:
    """Return what a tool is told when the person said no."""
    return AuthorizationRefused(f"The user declined to connect {label}.")
