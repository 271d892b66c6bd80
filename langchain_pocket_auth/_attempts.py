"""What persons do: open a link, consent or refuse, and what their answer brings."""

from __future__ import annotations

import asyncio
import inspect
import logging
import re
import secrets
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

from ._errors import (
    CallbackRefused,
    ConfigurationError,
    PocketAuthError,
    ProviderError,
    ProviderUnavailable,
)
from ._exchange import EXCHANGE_LIMIT, Exchanges, Result, restored_request
from ._futures import FutureData, attempt_context
from ._http import secure_url
from ._models import Owner, SessionKey
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
from .handlers import AuthHandlerInterface

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
        changed: Callable[[Owner], None],
    ) -> None:
        self._vault, self._registry, self._waiting = vault, registry, waiting
        self._exchanges = Exchanges(vault, registry, waiting, changed)

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
        entry = Attempt(
            uid=attempt.uid,
            future_id=future.id,
            target=Pointer.to(key),
            handler=handler.name,
            scopes=future.scopes,
            request=future.request,
            data=attempt.data,
            expires_at=self._vault.now() + ATTEMPT_TTL,
        )
        await self._vault.create(attempt_key(attempt.uid), entry, ATTEMPT_KEPT)
        return url

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
        handler_name: str | None,
        value: Any = None,
        error: str | None = None,
        issuer: str | None = None,
        future_id: str | None = None,
    ) -> Result:
        """
        Take a person's answer to an attempt and exchange it at once.

        Nothing is consumed before everything was compared, so an answer that is
        refused leaves the attempt to the person it belongs to.

        Args:
            uid: The `state` of the answer.
            handler_name: Whose callback was called; `None` where the caller proved it.
            value: What is exchanged: an authorization code.
            error: The provider's error code instead.
            issuer: The answer's `iss` (RFC 9207).
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
        if handler_name not in {None, attempt.handler}:
            raise CallbackRefused("mismatch")
        if future_id not in {None, attempt.future_id}:
            raise CallbackRefused("mismatch")
        if not handler.check_issuer(issuer):
            logger.warning("%s: an answer came from another issuer", handler.name)
            raise CallbackRefused("mismatch")
        return await self._take(stored, value, error)

    async def _take(
        self, stored: Stored[Attempt], value: Any, error: str | None
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
        return await asyncio.shield(self._exchanges.start(claimed, value))

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
                await self._take(stored, stored.entry.answer, None)
        await self._waiting.unresolve(key, uid)


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
