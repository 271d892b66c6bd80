"""The state machine: check, prepare, authenticate, and what a callback brings."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from contextlib import suppress
from datetime import date, timedelta
from typing import Any
from weakref import WeakValueDictionary

from ._attempts import Attempts
from ._connections import Connections, connection_id, handler_of
from ._errors import (
    AuthorizationRefused,
    AuthorizationRequired,
    PocketAuthError,
    ScopeWithheld,
    StorageError,
)
from ._events import Event, Tell
from ._housekeeping import Housekeeping
from ._models import (
    AuthenticateRequest,
    AuthState,
    Consent,
    Outcome,
    Owner,
    Requirement,
    SessionKey,
    Turn,
)
from ._outbox import Outbox
from ._pauses import Pauses
from ._questions import Questions
from ._refresh import Refresher, advisory_at
from ._registry import Registry
from ._saving import finished
from ._site import Site
from ._standing import Standing, decide, is_open
from ._usage import Usage
from ._vault import (
    CAS_TRIES,
    Future,
    Session,
    Stored,
    Vault,
    entry_key,
)
from ._waiting import LOOK_AGAIN_S, Waiting
from .handlers import AuthHandlerInterface

logger = logging.getLogger(__name__)

APP = Owner("app", "app")
"""Whose sessions are those that no person is asked for: the app's own."""
LAST_WRITES_S = 1.0  # on closing; what is missed is marked again at the next use
MAX_EXPIRIES = 10_000  # links whose end this process announces
_NOTHING_TO_ASK = {AuthState.SKIP_AUTH, AuthState.DO_REFRESH, AuthState.RESOLVED}


class Engine:
    """
    Decides and keeps. Runs on one event loop; knows no LangChain, HTTP or SQL.

    Args:
        vault: Where everything is kept.
        registry: Which handlers there are.
        site: Where connect links and callbacks live, and who may use them.
        listen: Awaited before a link is given out.
        future_ttl: How long a connect link lives.
        decline_cooldown: How long a refusal holds in its thread.
        session_idle_ttl: After how long without use a session ends; `None`: never.
        changed: Called when an owner's sessions have changed.
        tell: Called with what happened.
        ended: Called with the pauses that waited for a future which is final now.
    """

    def __init__(
        self,
        vault: Vault,
        registry: Registry,
        *,
        site: Site,
        listen: Callable[[], Awaitable[None]],
        future_ttl: timedelta,
        decline_cooldown: timedelta,
        session_idle_ttl: timedelta | None,
        changed: Callable[[Owner], None],
        tell: Tell,
        ended: Callable[[Iterable[str]], None],
    ) -> None:
        self.vault, self.registry = vault, registry
        self._listen = listen
        self._questions = Questions(vault, registry, site, future_ttl)
        self._changed, self._tell, self._on_end = changed, tell, ended
        self._cooldown = decline_cooldown
        self.usage = Usage(vault, session_idle_ttl)
        self._outbox = Outbox(vault, registry, self.usage, changed=changed, tell=tell)
        self._refresher = Refresher(vault, self._outbox, tell)
        self._waiting = Waiting(vault, self._ended)
        self.attempts = Attempts(
            vault,
            registry,
            self._waiting,
            self._outbox,
            site=site,
            changed=changed,
            tell=tell,
        )
        # Twice the life of a link: a pause must not be forgotten before its link.
        self.pauses = Pauses(vault, 2 * future_ttl)
        self.connections = Connections(
            vault,
            registry,
            self._outbox,
            self.attempts,
            self.pauses,
            changed=changed,
            tell=tell,
            last_used=self.last_used,
        )
        self.housekeeping = Housekeeping(
            {
                "used": self.usage.write,
                "given_back": self._outbox.give_back_due,
                "idle": self._end_idle,
                "held": self.attempts.expire_held,
                "expired": vault.sweep,
            }
        )
        self._answering: Counter[str] = Counter()
        self._expiries: dict[str, asyncio.TimerHandle] = {}
        self._background: set[asyncio.Task[Any]] = set()
        self._turnstiles: WeakValueDictionary[Owner, asyncio.Lock]
        self._turnstiles = WeakValueDictionary()

    async def close(self) -> None:
        """End what runs in the background."""
        await self.housekeeping.close()
        for timer in self._expiries.values():
            timer.cancel()
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await asyncio.gather(self._refresher.close(), self.attempts.close())
        await finished(self._outbox.running)
        with suppress(StorageError, TimeoutError):
            async with asyncio.timeout(LAST_WRITES_S):
                await self.usage.write()
        await self.vault.close()

    # ------------------------------------------------------------ check and prepare

    async def standing(
        self,
        owner: Owner,
        requirement: Requirement,
        request: AuthenticateRequest | None = None,
    ) -> Standing:
        """Read everything of the owner once, and decide."""
        candidates = self.registry.candidates(requirement)
        if candidates[0].unattended:
            owner = APP
        shelf = await self.vault.shelf(owner)
        now = self.vault.now()
        return decide(shelf, candidates, owner, requirement, request, now=now)

    async def prepare(
        self,
        owner: Owner,
        requirement: Requirement,
        *,
        request: AuthenticateRequest | None = None,
        turn: Turn | None = None,
        tools: Iterable[str] = (),
        listen: bool = True,
        anew: bool = False,
    ) -> Consent | None:
        """
        Return the consent to wait for; `None` if none is needed and *anew* is unset.

        However often it is called there is one future, and so one link, per
        session key; more scopes widen it.

        Raises:
            ConfigurationError: A setting is wrong; no link was made.
        """
        # One after the other here, so that only other processes can come between.
        async with self._turnstiles.setdefault(owner, asyncio.Lock()):
            for _ in range(CAS_TRIES):
                standing = await self.standing(owner, requirement, request)
                if standing.state in _NOTHING_TO_ASK and not anew:
                    return None
                if listen:
                    await self._listen()
                consent = await self._questions.ask(standing, requirement, turn, tools)
                if consent is not None:
                    self._watch_expiry(consent)
                    return consent
        raise StorageError("a future could not be saved: too many writers")

    async def begin(self, consent: Consent) -> str:
        """Start an attempt of a consent; return the provider's page."""
        return await self.attempts.begin(consent.url.rpartition("/")[2])

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
                self.usage.mark(standing.key)
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
        key, handler = standing.key, standing.handler
        renewed: Stored[Session] | None
        if standing.session is None:
            renewed = await self._refresher.obtain(key, handler, standing.missing)
        else:
            renewed = await self._refresher.renew(key, handler)
        self._changed(standing.key.owner)
        if renewed is None or renewed.entry.needs_consent:
            return None
        self.usage.mark(key)
        return renewed

    def _renew_in_passing(self, standing: Standing) -> None:
        session, handler = standing.session, standing.handler
        if session is None or session.entry.needs_consent:
            return
        context = session.entry.auth_context()
        due = advisory_at(session.entry, context)
        if due and self.vault.now() >= due and handler.can_refresh(context):
            self._in_background(self._renew_early(standing))

    async def _renew_early(self, standing: Standing) -> None:
        with suppress(PocketAuthError):
            await self._refresher.renew(standing.key, standing.handler, early=True)
        self._changed(standing.key.owner)

    async def wait_connected(
        self, owner: Owner, requirement: Requirement, *, timeout_s: float
    ) -> Stored[Session]:
        """
        Return the session as soon as there is one, whoever asks for it.

        Raises:
            AuthorizationRequired: None came within *timeout_s* seconds.
            AuthorizationRefused: The person said no meanwhile.
            ScopeWithheld: The person agreed to less meanwhile.
        """
        end = asyncio.get_running_loop().time() + timeout_s
        awaited: str | None = None
        while True:
            standing = await self.standing(owner, requirement)
            if standing.state in _NOTHING_TO_ASK:
                return await self.authenticate(owner, requirement, timeout_s=0)
            future, label = standing.future, self.registry.label(requirement.provider)
            if future and future.entry.id == awaited:
                if future.entry.status == "denied":
                    raise declined(label)
                if future.entry.status == "done":
                    raise withheld(label, standing.missing)
            left = end - asyncio.get_running_loop().time()
            if left <= 0:
                raise AuthorizationRequired(
                    f"{label} was not connected within {timeout_s:g} seconds",
                    provider=requirement.provider,
                    scopes=standing.missing,
                    url=self._questions.link(future.entry)
                    if future and is_open(future.entry, self.vault.now())
                    else None,
                )
            if future and is_open(future.entry, self.vault.now()):
                awaited = future.entry.id
                await self.attempts.wait(future, left)
            else:  # nobody has asked yet
                await asyncio.sleep(min(left, LOOK_AGAIN_S))

    # ----------------------------------------------------------------- agent side

    async def settle(
        self, owner: Owner, outcome: Outcome, *, turn: Turn, ask: bool
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
            self.usage.mark(standing.key)
            self._renew_in_passing(standing)
            return standing.session
        future = standing.future.entry if standing.future else None
        label = self.registry.label(requirement.provider)
        if future and self._declined(future, requirement, turn):
            outcome.refusal = declined(label)
        elif future and turn.name in future.turns and future.status == "done":
            outcome.refusal = withheld(label, standing.missing)
        elif ask:
            outcome.consent = await self.prepare(
                owner, requirement, turn=turn, tools=outcome.tools
            )
            if outcome.consent is None:  # connected this very moment
                return await self.settle(owner, outcome, turn=turn, ask=False)
        return None

    def _declined(self, future: Future, requirement: Requirement, turn: Turn) -> bool:
        """Whether the person said no: in this turn, or to the same a moment ago."""
        if turn.name in future.turns and future.status == "denied":
            return True
        when = future.refused.get(turn.thread_id or "")
        if when is None or self.vault.now() >= when + self._cooldown:
            return False
        return set(requirement.scopes) <= set(future.needed)

    async def confirm(
        self, owner: Owner | None, key: str, code: str, task: str | None = None
    ) -> bool:
        """
        Take the code that came from a chat; whether it was right and all is done.

        Args:
            owner: Whose chat; `None`: the caller has seen to that.
            key: The question's.
            code: As a person writes it.
            task: The task of a graph that brings it, which goes on by itself.

        Raises:
            StorageError: It could not be linked.
        """
        if task is None:
            return await self.attempts.confirm(key, code, owner)
        self._answering[task] += 1
        try:
            return await self.attempts.confirm(key, code, owner)
        finally:
            self._answering[task] -= 1
            self._answering = +self._answering

    async def refuse(self, consent: Consent, turn: Turn) -> None:
        """Write down that the person said no in the chat."""
        place, thread = consent.place, turn.thread_id or ""
        if await self._waiting.refuse(place, consent.key, thread):
            threads = (thread,) if thread else ()
            scopes = consent.scopes
            self._tell(Event.at(place, "declined", scopes=scopes, thread_ids=threads))

    async def not_taken(
        self,
        key: SessionKey,
        needed: tuple[str, ...],
        token: str,
        lacking: tuple[str, ...] | None,
    ) -> Stored[Session] | None:
        """
        Learn that an API does not take a credential; return what to try instead.

        Args:
            key: The session's.
            needed: The scopes that the tool asked for.
            token: What the API refused.
            lacking: Scopes that the API misses; `None`: it refuses the credential.
        """
        place = entry_key(Session, key)
        for _ in range(CAS_TRIES):
            stored = await self.vault.get(Session, place)
            if stored is None:
                return None
            context, session = stored.entry.auth_context(), stored.entry
            handler = self.registry.named(key.connection.partition("?")[0])
            if context.access_token != token and not handler.missing_scopes(
                session.scopes, lacking or ()
            ):
                return stored  # renewed meanwhile, or granted
            renewable = handler.unattended or handler.can_refresh(context)
            if lacking is None and renewable and not session.needs_consent:
                return await self._made_anew(key, handler, stored)
            update: dict[str, Any] = {"refused": True}
            if lacking is not None:
                missed = {" ".join(sorted(needed)): list(lacking)}
                update = {"lacks": session.lacks | missed}
            if await self.vault.replace(stored, session.model_copy(update=update)):
                self._changed(key.owner)
                why = "the API does not take the credential any more"
                if lacking is not None:
                    why = f"the API also wants {' '.join(lacking)}"
                about = {"scopes": tuple(session.scopes), "account": session.account}
                self._tell(Event.at(key, "needs_reconnect", **about, reason=why))
                return None
        raise StorageError("a session could not be changed: too many writers")

    async def _made_anew(
        self, key: SessionKey, handler: AuthHandlerInterface, refused: Stored[Session]
    ) -> Stored[Session] | None:
        """Renew a session that an API refuses; `None` if it stays as it is."""
        context = refused.entry.auth_context()
        if handler.unattended:
            if not self._refresher.forces(key):
                return None
            await self.vault.delete(refused)
            return await self._refresher.obtain(key, handler, refused.entry.scopes)
        token = context.access_token
        renewed = await self._refresher.renew(key, handler, refused=token)
        self._changed(key.owner)
        if renewed is None or renewed.entry.needs_consent:
            return None
        return renewed if renewed.entry.auth_context() != context else None

    # ----------------------------------------------------------- how futures end

    def _ended(self, key: SessionKey, future: Future, account: str | None) -> None:
        if timer := self._expiries.pop(future.id, None):
            timer.cancel()
        if future.status == "done":  # from now on it can be idle
            self.usage.mark(key)
        granted = tuple(s for s in future.scopes if s not in future.withheld)
        self._tell(
            Event.at(
                key,
                "connected" if future.status == "done" else "declined",
                scopes=granted if future.status == "done" else tuple(future.scopes),
                thread_ids=tuple(dict.fromkeys(future.pauses.values())),
                account=account,
            )
        )
        self._on_end(task for task in future.pauses if not self._answering[task])

    def _watch_expiry(self, consent: Consent) -> None:
        if consent.key in self._expiries or len(self._expiries) >= MAX_EXPIRIES:
            return
        left = (consent.expires_at - self.vault.now()).total_seconds()
        self._expiries[consent.key] = asyncio.get_running_loop().call_later(
            max(left, 0.0), lambda: self._in_background(self._expire(consent))
        )

    async def _expire(self, consent: Consent) -> None:
        self._expiries.pop(consent.key, None)
        stored = await self.vault.get(Future, entry_key(Future, consent.place))
        future = stored.entry if stored else None
        if future and future.id == consent.key and future.status == "pending":
            threads = tuple(dict.fromkeys(future.pauses.values()))
            scopes = tuple(future.scopes)
            place = consent.place
            self._tell(Event.at(place, "expired", scopes=scopes, thread_ids=threads))

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    # ----------------------------------------------------------------- connections

    async def delete(
        self, owner: Owner, provider: str, profile: str, handler: str | None
    ) -> bool:
        """
        Delete sessions, here at once, at the provider as far as it can be.

        Raises:
            ConfigurationError: There is none, and no such provider or handler.
        """

        def chosen(key: SessionKey) -> bool:
            of = (key.provider, key.profile, handler or handler_of(key))
            return of == (provider, profile, handler_of(key))

        # The app's own session is everybody's: only who names the app deletes it.
        ended, links = await self.connections.end(owner, chosen)
        if not ended and not links:
            requirement = Requirement(provider, handler=handler, profile=profile)
            self.registry.candidates(requirement)
        return ended > 0

    async def disconnect(self, owner: Owner, name: str, profile: str | None) -> bool:
        """End the connections of an owner by a provider's id or by their own."""
        ended, _ = await self.connections.end(
            owner,
            lambda key: (
                name in {key.provider, connection_id(key)}
                and profile in {None, key.profile}
            ),
        )
        return ended > 0

    async def reconnect(self, owner: Owner, connection: str) -> Consent | None:
        """
        Ask the person anew for what a connection grants; `None`: not theirs, or gone.

        Raises:
            ConfigurationError: A setting is wrong; no link was made.
            CredentialUnreadable: The connection does not open.
        """
        key = await self.connections.find(owner, connection)
        stored = await self.vault.get(Session, entry_key(Session, key)) if key else None
        if key is None or stored is None:
            return None
        scopes = tuple(stored.entry.scopes)
        need = Requirement(key.provider, scopes, handler_of(key), key.profile)
        return await self.prepare(owner, need, anew=True)

    async def last_used(self, keys: Iterable[SessionKey]) -> Mapping[SessionKey, date]:
        """Return the last days on which sessions were used, as far as known."""
        return await self.usage.last(keys)

    async def _end_idle(self) -> int:
        why = "it was not used for too long"
        return await self.usage.end_idle(lambda key: self._outbox.end(key, why))


def withheld(label: str, missing: Iterable[str]) -> ScopeWithheld:
    """Return what a tool is told when the person agreed to less."""
    return ScopeWithheld(
        f"The user connected {label} but did not grant: "
        f"{', '.join(missing) or 'what is needed'}."
    )


def declined(label: str) -> AuthorizationRefused:
    """Return what a tool is told when the person said no."""
    return AuthorizationRefused(f"The user declined to connect {label}.")
