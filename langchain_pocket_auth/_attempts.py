"""What persons do: open a link, consent or refuse, and what their answer brings."""

from __future__ import annotations

import asyncio
import inspect
import logging
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

from ._errors import (
    AuthorizationRefused,
    CallbackRefused,
    ConfigurationError,
    PocketAuthError,
    ProviderError,
    ProviderUnavailable,
)
from ._exchange import EXCHANGE_LIMIT, Exchanges, Result, restored_request
from ._futures import FutureData, attempt_context
from ._http import secure_url
from ._models import AuthContext, Choice, Owner, SessionKey
from ._outbox import Outbox
from ._registry import Registry, provider_id
from ._vault import (
    ATTEMPT_KEPT,
    ATTEMPT_TTL,
    Attempt,
    Future,
    Pointer,
    Stored,
    Vault,
    attempt_key,
    digest,
)
from ._waiting import Waiting
from .handlers import AuthHandlerInterface, OAuth2Handler, OAuth2Request
from .handlers._device import DeviceCode

logger = logging.getLogger(__name__)

PREPARE_LIMIT = timedelta(seconds=20)  # a handler may make a request there
_URL = re.compile(r"https?://[^\s<>\"']+")
# Errors of an authorization answer that say "later" (RFC 6749 section 4.1.2.1).
_TRANSIENT_ERRORS = frozenset({"server_error", "temporarily_unavailable"})


class Attempts:
    """Attempts of futures: independent of each other, each good for one answer."""

    def __init__(
        self,
        vault: Vault,
        registry: Registry,
        waiting: Waiting,
        outbox: Outbox,
        changed: Callable[[Owner], None],
    ) -> None:
        self._vault, self._registry, self._waiting = vault, registry, waiting
        self._exchanges = Exchanges(vault, registry, waiting, outbox, changed)

    async def close(self) -> None:
        """Let the exchanges that run end."""
        await self._exchanges.close()
        self._waiting.close()

    async def wait(self, future: Stored[Future], timeout_s: float) -> None:
        """Return when *future* has changed, or soon: then look again."""
        await self._waiting.wait(future, timeout_s)

    async def ticket(self, ticket: str) -> tuple[Stored[Future], SessionKey]:
        """
        Return the future of a connect link.

        Raises:
            CallbackRefused: Unknown or expired.
        """
        return await self._waiting.ticket(ticket)

    async def begin(self, ticket: str) -> str:
        """
        Start an attempt; return the provider's page to send the person to.

        Raises:
            CallbackRefused: Unknown or expired link.
            ConfigurationError: The handler gave no usable URL.
            ProviderError: The handler failed.
        """
        stored, key = await self.ticket(ticket)
        future = stored.entry
        handler = self._registry.named(future.handler)
        attempt = FutureData(secrets.token_urlsafe(32), scopes=tuple(future.scopes))
        text = await self._prepared(handler, future, key, attempt)
        found = _URL.search(text) if isinstance(text, str) else None
        if found is None:
            raise ConfigurationError(f"{handler.name}: prepare returned no http(s) URL")
        url = secure_url(found.group(), f"{handler.name}: the authorization URL")
        await self._noted(future, key, attempt)
        return url

    async def _noted(
        self, future: Future, key: SessionKey, attempt: FutureData
    ) -> Stored[Attempt]:
        handler = self._registry.named(future.handler)
        entry = Attempt(
            uid=attempt.uid,
            future_id=future.id,
            target=Pointer.to(key),
            handler=future.handler,
            scopes=future.scopes,
            request=future.request,
            data=attempt.data,
            expires_at=self._vault.now() + min(handler.attempt_ttl, ATTEMPT_TTL),
        )
        noted = await self._vault.create(attempt_key(attempt.uid), entry, ATTEMPT_KEPT)
        assert noted is not None  # noqa: S101 - its name is random
        return noted

    @staticmethod
    async def _prepared(
        handler: AuthHandlerInterface,
        future: Future,
        key: SessionKey,
        attempt: FutureData,
    ) -> Any:
        request = restored_request(future.request)
        arguments = (request, key.owner.id, key.profile, attempt.uid)
        try:
            with attempt_context(attempt):
                async with asyncio.timeout(PREPARE_LIMIT.total_seconds()):
                    if inspect.iscoroutinefunction(handler.prepare):
                        return await handler.prepare(*arguments, future=attempt)
                    made = await asyncio.to_thread(
                        handler.prepare, *arguments, future=attempt
                    )
                    return await made if inspect.isawaitable(made) else made
        except PocketAuthError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a handler raises
            name = type(error).__name__
        # Out here: not the text and not the chain, a third party's may hold secrets.
        logger.warning("%s: prepare failed with %s", handler.name, name)
        raise ProviderError(
            f"{handler.name}: prepare failed ({name})", provider=provider_id(handler)
        )

    async def find(self, uid: str) -> Stored[Attempt] | None:
        """Return the attempt of a uid, or `None`."""
        return await self._vault.get(Attempt, attempt_key(uid))

    async def answer(
        self,
        uid: str,
        *,
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
            callback: Provider and method whose callback was called; `None` where the
                caller proved it.
            value: What is exchanged: an authorization code. Default: what the handler
                reads from *parameters*.
            error: The provider's error code instead.
            issuer: The answer's `iss` (RFC 9207).
            parameters: All parameters of the callback.
            future_id: The future it has to belong to, where the caller knows it.

        Raises:
            CallbackRefused: Unknown, expired, replayed, or not of this callback.
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
        if not handler.check_issuer(issuer, attempt.data):
            logger.warning("%s: an answer came from another issuer", handler.name)
            raise CallbackRefused("mismatch")
        if value is None and error is None:
            value = handler.read_callback(parameters or {})
        return await self._take(stored, value, error, parameters or {})

    async def _take(
        self,
        stored: Stored[Attempt],
        value: Any,
        error: str | None,
        parameters: Mapping[str, str],
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
        return await asyncio.shield(self._exchanges.start(claimed, value, parameters))

    async def _refused(self, attempt: Attempt, error: str) -> Result:
        if error != "access_denied":
            await self._waiting.unresolve(attempt.target.session_key(), attempt.uid)
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
                # "choosing" too: the page that the person gets asks again.
                ticket = await self._exchanges.ticket_of(attempt)
                return Result("again", ticket)
            if task := self._exchanges.running(stored):
                return await asyncio.shield(task)
            if attempt.exchange_until and self._vault.now() < attempt.exchange_until:
                await asyncio.sleep(0.1)  # another process is at it
            else:
                # It died over it. The code may be spent: it is never sent again.
                await self._exchanges.end_attempt(stored, "failed")
            if (now := await self.find(attempt.uid)) is None:
                raise CallbackRefused("unknown")
            stored = now

    async def choices(self, future: Future) -> Sequence[Choice]:
        """Return the accounts between which the person of a future has to choose."""
        stored = await self.find(future.choosing) if future.choosing else None
        if stored is None or stored.entry.status != "choosing":
            return ()
        if self._vault.now() >= stored.entry.expires_at or not stored.entry.context:
            return ()
        context = stored.entry.context.restore()
        assert isinstance(context, AuthContext)  # noqa: S101 - sealed as one
        handler = self._registry.named(stored.entry.handler)
        return handler.choices(context)

    async def choose(self, ticket: str, choice: str) -> Result:
        """
        Take the account that the person of a connect link has chosen.

        Raises:
            CallbackRefused: Nothing is to be chosen, or not that.
        """
        future, _ = await self.ticket(ticket)
        stored = await self.find(future.entry.choosing or "")
        if stored is None:
            raise CallbackRefused("replayed")
        if self._vault.now() >= stored.entry.expires_at:
            raise CallbackRefused("expired")
        return await asyncio.shield(self._exchanges.chosen(stored, choice))

    async def withdraw(self, future: Future) -> None:
        """Give back what the person of a future has not chosen from."""
        if future.choosing and (stored := await self.find(future.choosing)):
            await self._exchanges.withdraw(stored)

    # --------------------------------------------------------------- the device flow

    async def device(self, ticket: str, show: Callable[[DeviceCode], None]) -> Result:
        """
        Let the person of a link agree on another machine; returns when it is over.

        Args:
            ticket: The connect link's.
            show: Called with what the person needs to know.

        Raises:
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
        request = restored_request(found.entry.request)
        assert isinstance(request, OAuth2Request)  # noqa: S101 - as it was made
        code = await handler.begin_device(request)
        uid = FutureData(secrets.token_urlsafe(32))
        noted = await self._noted(found.entry, key, uid)
        show(code)
        try:
            context = await handler.finish_device(request, code)
        except AuthorizationRefused:
            await self._waiting.end(noted.entry, "denied")
            raise
        # Shielded: who stops waiting now does not lose a grant that was given.
        saving = self._exchanges.granted(noted, context, self._vault.now())
        return await asyncio.shield(saving)

    # ------------------------------------------------- answers outside a callback

    async def resolve(self, uid: str, value: Any) -> bool:
        """Keep an answer that came outside a callback; `authenticate` exchanges it."""
        stored = await self.find(uid)
        if stored is None or stored.entry.status != "pending":
            return False
        attempt = stored.entry
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
                await self._take(stored, stored.entry.answer, None, {})
        await self._waiting.unresolve(key, uid)


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
