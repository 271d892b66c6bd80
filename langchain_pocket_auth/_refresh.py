"""Renewing sessions: one token request per expiry, whoever asks, wherever it runs."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Iterable
from datetime import datetime, timedelta

from ._errors import (
    ConfigurationError,
    GrantRevoked,
    PocketAuthError,
    ProviderUnavailable,
    StorageError,
)
from ._events import Event, Tell
from ._http import is_transport_error
from ._models import AuthContext, AuthenticateRequest, AuthState, SessionKey
from ._outbox import Outbox
from ._registry import provider_id
from ._saving import LEASE, Lease, Renewed, Saving, finished
from ._vault import CAS_TRIES, Session, Stored, Typed, Vault, entry_key
from .handlers import AuthHandlerInterface

logger = logging.getLogger(__name__)

REQUEST_TIMEOUT = timedelta(seconds=20)
COOLDOWN = timedelta(seconds=30)  # after a transient failure, per session
MAX_COOLDOWN = timedelta(seconds=60)
FORCE_EVERY = timedelta(minutes=1)  # for a token that an API does not take
MAX_COOLDOWNS = 10_000  # remembered at a time; those that are over go first
MAX_FAILURES = 3  # refusals nobody can interpret, before consent is asked for


def mandatory_at(session: Session, context: AuthContext) -> datetime | None:
    """From when on the token must not be used without trying to renew it."""
    return _before_expiry(session, context, timedelta(minutes=1), 0.2)


def advisory_at(session: Session, context: AuthContext) -> datetime | None:
    """From when on the token is renewed in passing, while it is still handed out."""
    return _before_expiry(session, context, timedelta(minutes=5), 0.5)


def _before_expiry(
    session: Session, context: AuthContext, most: timedelta, share: float
) -> datetime | None:
    if context.expires_at is None:
        return None
    lifetime = max(context.expires_at - session.obtained_at, timedelta())
    return context.expires_at - min(most, share * lifetime)


def usable(
    session: Session,
    handler: AuthHandlerInterface,
    request: AuthenticateRequest,
    now: datetime,
) -> AuthState | None:
    """Return SKIP_AUTH or DO_REFRESH, or `None` if consent is needed again."""
    if session.refused or session.client_id != getattr(request, "client_id", None):
        return None  # by the API; or the app's registration has changed
    context = session.auth_context()
    due = mandatory_at(session, context)
    if due is None or now < due:
        return AuthState.SKIP_AUTH
    if not session.needs_consent and handler.can_refresh(context):
        return AuthState.DO_REFRESH
    # Cannot be renewed, but is good until its last second.
    over = context.expires_at is not None and now >= context.expires_at
    return None if over else AuthState.SKIP_AUTH


class _LookAgainError(Exception):
    """Somebody else changed the record meanwhile."""


class Refresher:
    """
    Renews sessions under a lease in the record; saves by compare-and-swap.

    Nothing is held open during the token request. Callers of one process share
    one task; between processes the lease decides.

    What remains: a process that stands still for longer than the rest of its lease,
    between the last look at the record and the moment in which its request leaves (a
    connection and, for discovered servers, their metadata lie between; together 20 s
    at most), may send a refresh token which another has used meanwhile.
    """

    def __init__(self, vault: Vault, outbox: Outbox, tell: Tell) -> None:
        self._vault, self._outbox, self._tell = vault, outbox, tell
        self._running: dict[
            tuple[SessionKey, bool, str | None], asyncio.Task[Stored[Session] | None]
        ] = {}
        self._forced: dict[SessionKey, datetime] = {}
        self._obtaining: dict[
            tuple[SessionKey, tuple[str, ...]], asyncio.Task[Stored[Session]]
        ] = {}
        self._cooldown: dict[SessionKey, datetime] = {}
        self._saving = Saving(vault, outbox, tell)

    async def close(self) -> None:
        """Let what runs end: the old refresh token may be spent already."""
        await finished([*self._running.values(), *self._obtaining.values()])
        await self._saving.close()

    async def renew(
        self,
        key: SessionKey,
        handler: AuthHandlerInterface,
        *,
        early: bool = False,
        refused: str | None = None,
    ) -> Stored[Session] | None:
        """
        Return the session, renewed if its time has come; `None` if it is gone.

        A session that cannot be renewed comes back with `needs_consent`.

        Args:
            key: Which session.
            handler: The handler that it came from.
            early: Renew in the advisory window already.
            refused: A token that the API does not take: renew it whatever its
                lifetime, at most once a minute.

        Raises:
            ProviderUnavailable: The token is over and there is no new one now.
            ConfigurationError: The provider does not accept the app.
        """
        name = (key, early, refused)
        task = self._running.get(name)
        if task is None:
            renewal = self._renew(key, handler, early=early, refused=refused)
            task = self._running[name] = asyncio.ensure_future(renewal)
            task.add_done_callback(lambda _: self._running.pop(name, None))
            # Nobody may be waiting when a renewal in passing fails.
            task.add_done_callback(lambda t: t.cancelled() or t.exception())
        # A caller who is cancelled does not end the renewal for the others.
        return await asyncio.shield(task)

    async def obtain(
        self, key: SessionKey, handler: AuthHandlerInterface, scopes: Iterable[str]
    ) -> Stored[Session]:
        """
        Return a session that is made without a person, with all of *scopes*.

        Raises:
            ProviderError: The provider refused or does not answer.
            ConfigurationError: A setting is missing or wrong.
        """
        wanted = tuple(sorted(scopes))
        task = self._obtaining.get((key, wanted))
        if task is None:
            task = asyncio.ensure_future(self._obtain(key, handler, wanted))
            self._obtaining[key, wanted] = task
            task.add_done_callback(lambda _: self._obtaining.pop((key, wanted), None))
            task.add_done_callback(lambda t: t.cancelled() or t.exception())
        return await asyncio.shield(task)

    async def _obtain(
        self, key: SessionKey, handler: AuthHandlerInterface, scopes: tuple[str, ...]
    ) -> Stored[Session]:
        request = handler.make_request(list(scopes))
        sent, problem = self._vault.now(), "no answer in time"
        if (until := self._cooldown.get(key)) and sent < until:
            raise ProviderUnavailable(
                f"{handler.name}: the provider did not answer a moment ago",
                provider=provider_id(handler),
            )
        context: AuthContext | None = None
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT.total_seconds()):
                context = await handler.authenticate(auth_req=request, future_uid="")
        except ProviderUnavailable as error:
            wait_s = error.retry_after_s or COOLDOWN.total_seconds()
            self._rest(key, sent + min(timedelta(seconds=wait_s), MAX_COOLDOWN))
            raise
        except PocketAuthError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a handler raises
            problem = f"could not authenticate ({type(error).__name__})"
        if context is None:
            # Out here: the original may hold the app's secret.
            raise ProviderUnavailable(
                f"{handler.name}: {problem}", provider=provider_id(handler)
            )
        session = Session(
            context=Typed.of(context),
            # As asked: nobody could grant more if it were asked for again.
            scopes=sorted({*scopes, *(context.scopes or ())}),
            client_id=getattr(request, "client_id", None),
            obtained_at=sent,
        )
        place = entry_key(Session, key)
        for _ in range(CAS_TRIES):
            old = await self._vault.get(Session, place)
            saved = (
                await self._vault.create(place, session)
                if old is None
                else await self._vault.replace(old, session)
            )
            if saved is not None:
                return saved
        raise StorageError("a session could not be saved: too many writers")

    async def _renew(
        self,
        key: SessionKey,
        handler: AuthHandlerInterface,
        *,
        early: bool,
        refused: str | None,
    ) -> Stored[Session] | None:
        deadline = self._vault.now() + 2 * LEASE
        while True:
            stored = await self._vault.get(Session, entry_key(Session, key))
            if stored is None or stored.entry.needs_consent:
                return stored
            # Then what is stored is spent.
            stored = self._saving.held(key, stored) or stored
            context = stored.entry.auth_context()
            due = (advisory_at if early else mandatory_at)(stored.entry, context)
            now = self._vault.now()
            forced = refused == context.access_token and self._may_force(key, now)
            if not forced and (due is None or now < due):
                return stored
            if (until := self._cooldown.get(key)) and now < until:
                return self._old(stored, context, key, None)
            lease = Lease(self._vault.now)
            if await self._vault.lease(stored, lease.holder, LEASE):
                try:
                    await self._still(stored, lease)
                    if forced:
                        self._force(key, now)
                    return await self._request(key, handler, stored, context, lease)
                except _LookAgainError:
                    pass
                finally:
                    await asyncio.shield(self._saving.free(stored, lease, key))
            if early or now > deadline:
                return self._old(stored, context, key, None)
            await asyncio.sleep(random.uniform(0.02, 0.08))  # noqa: S311 - jitter

    def forces(self, key: SessionKey) -> bool:
        """Whether a token that an API refuses may be made anew now; counts as done."""
        now = self._vault.now()
        if not self._may_force(key, now):
            return False
        self._force(key, now)
        return True

    def _may_force(self, key: SessionKey, now: datetime) -> bool:
        # An API that takes no token at all must not cost a request each time.
        last = self._forced.get(key)
        return last is None or now >= last + FORCE_EVERY

    def _force(self, key: SessionKey, now: datetime) -> None:
        if len(self._forced) >= MAX_COOLDOWNS:
            end = now - FORCE_EVERY
            self._forced = {k: t for k, t in self._forced.items() if t > end}
        self._forced[key] = now

    async def _still(self, stored: Stored[Session], lease: Lease) -> None:
        # Somebody may have renewed it, and freed it, since it was read: its old
        # refresh token is spent then, and sending it would end the grant.
        current = await self._vault.get(Session, stored.key)
        if current is None or current.version != stored.version:
            raise _LookAgainError
        if not lease.outlasts(REQUEST_TIMEOUT):
            raise _LookAgainError

    async def _request(
        self,
        key: SessionKey,
        handler: AuthHandlerInterface,
        stored: Stored[Session],
        context: AuthContext,
        lease: Lease,
    ) -> Stored[Session] | None:
        sent = self._vault.now()
        try:
            new = await self._refreshed(handler, stored.entry, context, lease)
        except GrantRevoked as error:
            logger.info("%s: grant of %s is over", handler.name, key.connection)
            return await self._needs_consent(key, stored, str(error))
        except ProviderUnavailable as error:
            return self._old(stored, context, key, error)
        except ConfigurationError as error:
            # Our registration is wrong: this is nobody's session's fault.
            logger.error("%s: %s", handler.name, error)  # noqa: TRY400
            now = self._vault.now()
            if context.expires_at is None or now >= context.expires_at:
                raise
            self._rest(key, min(now + COOLDOWN, context.expires_at))
            return stored
        except Exception as error:  # noqa: BLE001 - whatever a handler raises
            # Not the text: a third party's may hold the token.
            logger.warning(
                "%s: refresh failed with %s", handler.name, type(error).__name__
            )
            return await self._failed(key, handler, stored, context)
        if new.expires_at is None and context.expires_at is not None:
            # Left out of the answer: it lives as long as the one before.
            lifetime = context.expires_at - stored.entry.obtained_at
            new = new.model_copy(update={"expires_at": sent + lifetime})
        session = Session(
            context=Typed.of(new),
            scopes=stored.entry.scopes if new.scopes is None else new.scopes,
            client_id=stored.entry.client_id,
            connected_at=stored.entry.connected_at,
            obtained_at=sent,
        )
        self._cooldown.pop(key, None)
        renewed = Renewed(key, handler, stored, session, new, lease)
        return await self._saving.save(renewed)

    @staticmethod
    async def _refreshed(
        handler: AuthHandlerInterface,
        session: Session,
        context: AuthContext,
        lease: Lease,
    ) -> AuthContext:
        request = handler.make_request(list(session.scopes))
        problem = "no answer to a refresh in time"
        try:
            # Over both tries: the lease must outlast them.
            async with asyncio.timeout(REQUEST_TIMEOUT.total_seconds()):
                try:
                    return await handler.refresh(auth_req=request, context=context)
                except ProviderUnavailable as error:
                    # The answer was lost: the server may have rotated already, and
                    # one that allows for that does so within seconds only.
                    if not error.lost or not lease.outlasts(LEASE - REQUEST_TIMEOUT):
                        raise
                return await handler.refresh(auth_req=request, context=context)
        except TimeoutError:
            pass
        except Exception as error:
            if not is_transport_error(error):
                raise
            problem = f"no answer to a refresh ({type(error).__name__})"
        # Out here, so that it does not carry the other, which may hold the token.
        raise ProviderUnavailable(
            f"{handler.name}: {problem}", provider=provider_id(handler)
        )

    async def _failed(
        self,
        key: SessionKey,
        handler: AuthHandlerInterface,
        stored: Stored[Session],
        context: AuthContext,
    ) -> Stored[Session]:
        failures = stored.entry.failures + 1
        if failures >= MAX_FAILURES:
            return await self._needs_consent(
                key, stored, f"{handler.name} could not be renewed {failures} times"
            )
        counted = stored.entry.model_copy(update={"failures": failures})
        saved = await self._vault.replace(stored, counted)
        error = ProviderUnavailable(
            f"{handler.name} could not be renewed", provider=provider_id(handler)
        )
        if saved is None:
            raise _LookAgainError
        return self._old(saved, context, key, error)

    async def _needs_consent(
        self, key: SessionKey, stored: Stored[Session], why: str
    ) -> Stored[Session]:
        # By compare-and-swap: if someone else renewed it meanwhile, look again.
        marked = stored.entry.model_copy(update={"needs_consent": why})
        saved = await self._vault.replace(stored, marked)
        if saved is None:
            raise _LookAgainError
        about = {"scopes": tuple(marked.scopes), "account": marked.account}
        self._tell(Event.at(key, "needs_reconnect", **about, reason=why))
        return saved

    def _old(
        self,
        stored: Stored[Session],
        context: AuthContext,
        key: SessionKey,
        error: ProviderUnavailable | None,
    ) -> Stored[Session]:
        """Hand out the old token as long as it is valid."""
        now = self._vault.now()
        if error is not None:
            lifetime = (context.expires_at or now) - stored.entry.obtained_at
            wanted = min(COOLDOWN, 0.2 * lifetime)
            if error.retry_after_s:
                wanted = timedelta(seconds=error.retry_after_s)
            self._rest(key, now + min(wanted, MAX_COOLDOWN))
        if context.expires_at is None or now < context.expires_at:
            return stored
        raise error or ProviderUnavailable(
            f"{key.provider}: the token is over and cannot be renewed right now",
            provider=key.provider,
        )

    def _rest(self, key: SessionKey, until: datetime) -> None:
        if len(self._cooldown) >= MAX_COOLDOWNS:
            now = self._vault.now()
            self._cooldown = {k: u for k, u in self._cooldown.items() if now < u}
        self._cooldown[key] = until
