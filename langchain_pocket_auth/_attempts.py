"""What persons do: open a link, consent or refuse, and what their answer brings."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from ._admission import Admission, same_browser
from ._clicks import Clicks
from ._errors import (
    AuthorizationRefused,
    CallbackRefused,
    ConfigurationError,
    CredentialUnreadable,
    ProviderError,
    ProviderUnavailable,
)
from ._events import Tell
from ._exchange import EXCHANGE_LIMIT, Exchanges
from ._held import HeldGrants
from ._linking import Linking, Result, restored_request
from ._models import Owner, SessionKey
from ._outbox import Outbox
from ._quarantine import Quarantine, Shown
from ._registry import Registry, provider_id
from ._site import THE_APP, Site, Visitor
from ._vault import (
    ATTEMPT_KEPT,
    Attempt,
    Future,
    Stored,
    Vault,
    attempt_key,
    digest,
)
from ._waiting import Waiting
from ._withdrawals import Withdrawals
from .handlers import AuthHandlerInterface, OAuth2Handler, OAuth2Request
from .handlers._device import DeviceCode

logger = logging.getLogger(__name__)

# Errors of an authorization answer that say "later" (RFC 6749 section 4.1.2.1).
_TRANSIENT_ERRORS = frozenset({"server_error", "temporarily_unavailable"})


class Attempts(HeldGrants):
    """Attempts of futures: independent of each other, each good for one answer."""

    def __init__(
        self,
        vault: Vault,
        registry: Registry,
        waiting: Waiting,
        outbox: Outbox,
        *,
        site: Site,
        changed: Callable[[Owner], None],
        tell: Tell,
    ) -> None:
        self._vault, self._site = vault, site
        self._clicks = Clicks(vault, registry, waiting)
        withdrawals = Withdrawals(vault, registry, waiting, outbox)
        quarantine = Quarantine(
            vault, registry, waiting, withdrawals, site=site, tell=tell
        )
        linking = Linking(
            vault, registry, waiting, outbox, withdrawals, changed=changed
        )
        super().__init__(
            registry,
            waiting,
            admission=Admission(site, tell),
            exchanges=Exchanges(vault, registry, linking, quarantine, withdrawals),
            quarantine=quarantine,
            withdrawals=withdrawals,
        )

    async def close(self) -> None:
        """Let the exchanges that run end."""
        await self._exchanges.close()
        self._waiting.close()

    async def wait(self, future: Stored[Future], timeout_s: float) -> None:
        """Return when *future* has changed, or soon: then look again."""
        await self._waiting.wait(future, timeout_s)

    async def begin(self, ticket: str, visitor: Visitor = THE_APP) -> str:
        """
        Start an attempt; return the provider's page to send the person to.

        Raises:
            CallbackRefused: Unknown or expired link; `sign_in`, `wrong_person`;
                `too_many` at once.
            ConfigurationError: The handler gave no usable URL.
            ProviderError: The handler failed.
        """
        stored, key = await self.ticket(ticket)
        if self._vault.now() >= stored.entry.expires_at:
            raise CallbackRefused("expired")
        self._admission.admit(visitor, key, here=True)
        return await self._clicks.begin(stored, key, visitor.browser)

    async def find(self, uid: str) -> Stored[Attempt] | None:
        """Return the attempt of a uid, or `None`."""
        return await self._vault.get(Attempt, attempt_key(uid))

    async def answer(
        self,
        uid: str,
        *,
        visitor: Visitor = THE_APP,
        callback: tuple[str, str] | None,
        value: Any = None,
        error: str | None = None,
        issuer: str | None = None,
        parameters: Mapping[str, str] | None = None,
        future_id: str | None = None,
    ) -> Result:
        """
        Take a person's answer to an attempt and exchange it at once.

        Nothing is consumed before everything was compared, so an answer that is
        refused leaves the attempt to the person it belongs to.

        Args:
            uid: The `state` of the answer.
            visitor: Who brings it. The app itself, on this machine, proves nothing.
            callback: Provider and method whose callback was called; `None` where the
                caller proved it.
            value: What is exchanged: an authorization code. Default: what the handler
                reads from *parameters*.
            error: The provider's error code instead.
            issuer: The answer's `iss` (RFC 9207).
            parameters: All parameters of the callback.
            future_id: The future it has to belong to, where the caller knows it.

        Raises:
            CallbackRefused: Unknown, expired, replayed, or not of this callback;
                `wrong_person`, `wrong_account`.
            ProviderError: The exchange failed; the link can be opened again.
        """
        stored = await self.find(uid) if uid else None
        if stored is None:
            raise CallbackRefused("unknown")
        attempt = stored.entry
        handler = self._registry.named(attempt.handler)
        if callback is not None and not _is_of(handler, *callback):
            raise CallbackRefused("mismatch")
        if future_id not in {None, attempt.future_id}:
            raise CallbackRefused("mismatch")
        same_browser(visitor, attempt)
        known = self._admission.admit(visitor, attempt.target.session_key())
        if not handler.check_issuer(issuer, attempt.data):
            logger.warning("%s: an answer came from another issuer", handler.name)
            raise CallbackRefused("mismatch")
        if value is None and error is None:
            value = handler.read_callback(parameters or {})
        shown = Shown(self._admission.proves(visitor), known, visitor.browser)
        return await self._take(stored, value, error, parameters or {}, shown)

    async def _take(
        self,
        stored: Stored[Attempt],
        value: Any,
        error: str | None,
        parameters: Mapping[str, str],
        shown: Shown,
    ) -> Result:
        attempt = stored.entry
        given = digest(repr((value, error)))
        if attempt.status not in {"pending", "resolved"}:
            return await self._again(stored, given, error)
        if self._vault.now() >= attempt.expires_at:
            raise CallbackRefused("expired")
        if await self._waiting.of(attempt) is None:
            raise CallbackRefused("expired")  # disconnected meanwhile
        if error is None and value is None:
            raise CallbackRefused("malformed")
        claim: dict[str, Any] = {"answer_digest": given}
        if error is not None:
            claim |= {"status": "denied" if error == "access_denied" else "failed"}
            claim |= {"data": {}, "answer": None}
        else:
            claim |= {"status": "exchanging"}
            claim |= {"exchange_until": self._vault.now() + EXCHANGE_LIMIT}
        claimed = await self._vault.replace(
            stored, attempt.model_copy(update=claim), ATTEMPT_KEPT
        )
        if claimed is None:
            if (now := await self.find(attempt.uid)) is None:
                raise CallbackRefused("unknown")
            return await self._again(now, given, error)
        if error is not None:
            return await self._refused(attempt, error)
        # Shielded: a browser that hangs up does not stop it.
        exchange = self._exchanges.start(claimed, value, parameters, shown)
        return await asyncio.shield(exchange)

    async def _refused(self, attempt: Attempt, error: str) -> Result:
        if error != "access_denied":
            await self._waiting.unmark(attempt.target.session_key(), attempt.uid)
            raise _refusal(attempt, error)
        await self._waiting.end(attempt, "denied")
        return Result("declined", await self._exchanges.ticket_of(attempt))

    async def _again(
        self, stored: Stored[Attempt], given: str, error: str | None
    ) -> Result:
        """Answer a repeated callback: the same answer gets the same page."""
        while True:
            attempt = stored.entry
            if attempt.answer_digest != given:
                raise CallbackRefused("replayed")
            if attempt.status == "failed":
                raise _refusal(attempt, error)
            if attempt.status == "denied":
                # Whoever was first may not have come so far yet.
                await self._waiting.end(attempt, "denied")
            if attempt.status != "exchanging":
                # "held" too: the page that the person gets asks again.
                ticket = await self._exchanges.ticket_of(attempt)
                return Result("again", ticket)
            if task := self._exchanges.running(stored):
                return await asyncio.shield(task)
            if attempt.exchange_until and self._vault.now() < attempt.exchange_until:
                await asyncio.sleep(0.1)  # another process is at it
            # It died over it. The code may be spent: it is never sent again.
            elif attempt.grant is None:
                await self._exchanges.end_attempt(stored, "failed")
            else:
                await self._withdrawals.settle(stored, attempt.grant)
            if (now := await self.find(attempt.uid)) is None:
                raise CallbackRefused("unknown")
            stored = now

    async def forget(self, owner: Owner) -> int:
        """Erase the attempts of an owner, and give back what waits in them."""
        erased = 0
        async for stored in self._vault.entries(Attempt, "attempt"):
            if stored.entry.target.session_key().owner == owner:
                if grant := stored.entry.grant:
                    # Whoever is at it finds no future any more, or has died.
                    with suppress(CredentialUnreadable, ConfigurationError):
                        context = grant.auth_context()
                        await self._withdrawals.give_back(stored.entry, context)
                    await self._withdrawals.settled(stored)
                erased += await self._vault.discard(stored.key)
        return erased

    # --------------------------------------------------------------- the device flow

    async def device(
        self,
        ticket: str,
        show: Callable[[DeviceCode], None],
        visitor: Visitor = THE_APP,
    ) -> Result:
        """
        Let the person of a link agree on another machine; returns when it is over.

        Args:
            ticket: The connect link's.
            show: Called with what the person needs to know.
            visitor: Who sees that.

        Raises:
            CallbackRefused: `sign_in`, `wrong_person`, `wrong_account`, `too_many`.
            AuthorizationRefused: The person said no.
            AuthorizationRequired: The code ran out.
            ConfigurationError: The provider has no such flow, or not for this app.
            ProviderError: The provider did not give a token.
        """
        found, key = await self.ticket(ticket)
        handler = self._registry.named(found.entry.handler)
        if not isinstance(handler, OAuth2Handler):
            raise ConfigurationError(
                f"{handler.name} has no device flow: connect with the link instead"
            )
        if self._site.public and not handler.device_in_public:
            raise ConfigurationError(
                f"{handler.name}: nothing ties a device code to the person it was made "
                "for, so on a public address it is off; an app that shows it to nobody "
                f'else says clients={{"{key.provider}": Client(device_in_public=True, '
                "client_id=...)}, and had better set account_matcher="
            )
        self._admission.admit(visitor, key, here=True)
        request = restored_request(found.entry.request)
        assert isinstance(request, OAuth2Request)  # noqa: S101 - as it was made
        code = await handler.begin_device(request)
        noted = await self._clicks.note(found, key, visitor.browser)
        show(code)
        try:
            context = await handler.finish_device(request, code)
        except AuthorizationRefused:
            await self._waiting.end(noted.entry, "denied")
            raise
        # Shielded: who stops waiting now does not lose a grant that was given.
        shown = Shown(proven=True)  # as the app was told that it has to be
        now = self._vault.now()
        return await asyncio.shield(self._exchanges.granted(noted, context, now, shown))

    # ------------------------------------------------- answers outside a callback

    async def resolve(self, uid: str, value: Any) -> bool:
        """
        Keep an answer that came outside a callback; `authenticate` exchanges it.

        Raises:
            ConfigurationError: Many use this app, and nothing says whose answer it is.
        """
        stored = await self.find(uid)
        if stored is None or stored.entry.status != "pending":
            return False
        attempt = stored.entry
        if self._site.public:
            # Whoever began it would be asked to vouch, or shown the code, for a
            # consent that came from a browser which nobody has looked at.
            raise ConfigurationError(
                f"{attempt.handler}: with public_url an answer counts only where the "
                "person's browser can be compared: hand the route that calls "
                "resolve_future to PocketAuth(routers=[...]) instead of mounting it "
                "beside pocket.router"
            )
        if self._vault.now() >= attempt.expires_at:
            return False
        entry = attempt.model_copy(update={"status": "resolved", "answer": value})
        if await self._vault.replace(stored, entry, ATTEMPT_KEPT) is None:
            return False
        return await self._waiting.resolved(attempt)

    async def finish(self, uid: str, key: SessionKey) -> None:
        """
        Exchange an answer that was kept; one that is no good any more is dropped.

        Raises:
            ProviderError: The exchange failed; the link can be opened again.
        """
        stored = await self.find(uid)
        if stored is not None and stored.entry.answer is not None:
            with suppress(CallbackRefused):
                shown = Shown(self._admission.proves(THE_APP))
                await self._take(stored, stored.entry.answer, None, {}, shown)
        await self._waiting.unmark(key, uid, "resolved")


def _is_of(handler: AuthHandlerInterface, provider: str, method: str) -> bool:
    """Whether a callback's path is the handler's; foreign ones use their full name."""
    if provider != provider_id(handler):
        return False
    name = f"{provider}-{method}"
    return handler.name in {method, name, name.replace("_", "-")}


def _refusal(attempt: Attempt, error: str | None) -> ProviderError:
    provider = attempt.target.provider
    if error in _TRANSIENT_ERRORS:
        return ProviderUnavailable(f"{provider}: try again later", provider=provider)
    if error is None:
        return ProviderError(f"{provider}: the exchange failed", provider=provider)
    logger.warning("%s: the authorization request was refused", attempt.handler)
    return ProviderError(
        f"{provider} refused the authorization request", provider=provider
    )
