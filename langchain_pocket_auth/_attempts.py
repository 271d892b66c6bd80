"""What persons do: open a link, consent or refuse, and what their answer brings."""

from __future__ import annotations

import asyncio
import inspect
import logging
import re
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from ._errors import (
    CallbackRefused,
    ConfigurationError,
    PocketAuthError,
    ProviderError,
    ProviderUnavailable,
    StorageError,
)
from ._futures import Answered, FutureData, attempt_context
from ._http import secure_url
from ._models import AuthContext, AuthenticateRequest, Owner, SessionKey
from ._refresh import usable
from ._registry import Registry
from ._vault import (
    Attempt,
    Future,
    Pointer,
    Session,
    Stored,
    Typed,
    Vault,
    attempt_key,
    digest,
    entry_key,
    ticket_key,
)
from .handlers import AuthHandlerInterface

logger = logging.getLogger(__name__)

ATTEMPT_TTL = timedelta(minutes=10)  # the longest a login takes; codes live less
ATTEMPT_KEPT = timedelta(days=1)  # so that a late answer is told "expired"
EXCHANGE_LIMIT = timedelta(seconds=30)  # longer than a token request (10 s)
CAS_TRIES = 8
_URL = re.compile(r"https?://[^\s<>\"']+")
# Errors of an authorization answer that say "later" (RFC 6749 section 4.1.2.1).
_TRANSIENT_ERRORS = frozenset({"server_error", "temporarily_unavailable"})


@dataclass(frozen=True, slots=True)
class Result:
    """What a person's answer led to, for the page that is shown."""

    outcome: str
    ticket: str | None = None


class Attempts:
    """Attempts of futures: independent of each other, each good for one answer."""

    def __init__(
        self, vault: Vault, registry: Registry, changed: Callable[[Owner], None]
    ) -> None:
        self._vault, self._registry, self._changed = vault, registry, changed
        self._exchanges: dict[str, asyncio.Task[Result]] = {}
        self._waiting: dict[str, asyncio.Event] = {}

    async def close(self) -> None:
        """End the exchanges that run."""
        tasks = list(self._exchanges.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def wait(self, future_id: str, timeout_s: float) -> None:
        """Wait for the future; another process may finish it, so look now and then."""
        event = self._waiting.setdefault(future_id, asyncio.Event())
        with suppress(TimeoutError):
            async with asyncio.timeout(min(timeout_s, 1.0)):
                await event.wait()

    async def ticket(self, ticket: str) -> tuple[Stored[Future], SessionKey]:
        """
        Return the future of a connect link.

        Raises:
            CallbackRefused: Unknown or expired.
        """
        pointer = await self._vault.get(Pointer, ticket_key(ticket))
        if pointer is None:
            raise CallbackRefused("unknown")
        key = pointer.entry.session_key()
        future = (await self._vault.shelf(key.owner)).get(Future, key)
        if future is None or future.entry.ticket != ticket:
            # A newer question took its place.
            raise CallbackRefused("expired")
        if self._vault.now() >= future.entry.expires_at:
            raise CallbackRefused("expired")
        return future, key

    async def begin(self, ticket: str) -> str:
        """
        Start an attempt; return the provider's page to send the person to.

        Raises:
            CallbackRefused: Unknown or expired link.
            ConfigurationError: The handler gave no usable URL.
            ProviderUnavailable: It could not be made right now.
        """
        stored, key = await self.ticket(ticket)
        future = stored.entry
        handler = self._registry.named(future.handler)
        request = _request(future.request)
        attempt = FutureData(secrets.token_urlsafe(32), scopes=tuple(future.scopes))
        with attempt_context(attempt):
            arguments = (request, key.owner.id, key.profile, attempt.uid)
            if inspect.iscoroutinefunction(handler.prepare):
                text = await handler.prepare(*arguments, future=attempt)
            else:
                made = await asyncio.to_thread(
                    handler.prepare, *arguments, future=attempt
                )
                text = await made if inspect.isawaitable(made) else made
        found = _URL.search(text) if isinstance(text, str) else None
        if found is None:
            raise ConfigurationError(f"{handler.name}: prepare returned no http(s) URL")
        url = secure_url(found.group(), f"{handler.name}: the authorization URL")
        entry = Attempt(
            uid=attempt.uid,
            future_id=future.id,
            target=Pointer(
                owner=(key.owner.kind, key.owner.id),
                provider=key.provider,
                profile=key.profile,
                connection=key.connection,
            ),
            handler=handler.name,
            scopes=future.scopes,
            request=future.request,
            data=attempt.data,
            expires_at=self._vault.now() + ATTEMPT_TTL,
        )
        await self._vault.create(attempt_key(attempt.uid), entry, ATTEMPT_KEPT)
        return url

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

        Raises:
            CallbackRefused: Unknown, expired, replayed, or not of this callback.
            ProviderError: The exchange failed; the link can be opened again.
        """
        stored = await self.find(uid) if uid else None
        if stored is None:
            raise CallbackRefused("unknown")
        attempt = stored.entry
        handler = self._registry.named(attempt.handler)
        if handler_name is not None and handler_name != attempt.handler:
            raise CallbackRefused("mismatch")
        if not handler.check_issuer(issuer):
            logger.warning("%s: an answer came from another issuer", handler.name)
            raise CallbackRefused("mismatch")
        given = digest(repr((value, error)))
        if attempt.status not in {"pending", "resolved"}:
            return await self._again(stored, given)
        if self._vault.now() >= attempt.expires_at:
            raise CallbackRefused("expired")
        if error is not None:
            return await self._denied(stored, error, given)
        if value is None:
            raise CallbackRefused("malformed")
        return await self._exchange_once(stored, value, given)

    async def _again(self, stored: Stored[Attempt], given: str) -> Result:
        """Answer a repeated callback: the same answer gets the same page."""
        attempt = stored.entry
        if attempt.answer_digest != given:
            raise CallbackRefused("replayed")
        if attempt.status == "exchanging":
            name = stored.key[1]
            if task := self._exchanges.get(name):
                return await asyncio.shield(task)
            if attempt.exchange_until and self._vault.now() < attempt.exchange_until:
                await asyncio.sleep(0.1)  # another process is at it
                again = await self.find(attempt.uid)
                if again is None:
                    raise CallbackRefused("unknown")
                return await self._again(again, given)
            raise ProviderUnavailable(
                "the exchange was interrupted", provider=attempt.target.provider
            )
        if attempt.status == "failed":
            raise ProviderError("the exchange failed", provider=attempt.target.provider)
        return Result("again", await self._ticket_of(attempt))

    async def _denied(self, stored: Stored[Attempt], error: str, given: str) -> Result:
        attempt = stored.entry
        declined = error == "access_denied"
        ended = attempt.model_copy(
            update={
                "status": "denied" if declined else "failed",
                "answer_digest": given,
                "data": {},
            }
        )
        if await self._vault.replace(stored, ended, ATTEMPT_KEPT) is None:
            raise CallbackRefused("replayed")
        provider = attempt.target.provider
        if error in _TRANSIENT_ERRORS:
            raise ProviderUnavailable(f"{provider}: try again later", provider=provider)
        if not declined:
            logger.warning("%s: the authorization request was refused", attempt.handler)
            raise ProviderError(
                f"{provider} refused the authorization request", provider=provider
            )
        await self._end_future(attempt, "denied")
        return Result("declined", await self._ticket_of(attempt))

    async def _exchange_once(
        self, stored: Stored[Attempt], value: Any, given: str
    ) -> Result:
        claim = stored.entry.model_copy(
            update={
                "status": "exchanging",
                "answer_digest": given,
                "exchange_until": self._vault.now() + EXCHANGE_LIMIT,
            }
        )
        claimed = await self._vault.replace(stored, claim, ATTEMPT_KEPT)
        if claimed is None:
            again = await self.find(stored.entry.uid)
            if again is None:
                raise CallbackRefused("unknown")
            return await self._again(again, given)
        # A task of its own: a browser that hangs up does not stop it.
        name = stored.key[1]
        task = asyncio.ensure_future(self._exchange(claimed, value))
        self._exchanges[name] = task
        task.add_done_callback(lambda _: self._exchanges.pop(name, None))
        task.add_done_callback(lambda t: t.cancelled() or t.exception())
        return await asyncio.shield(task)

    async def _exchange(self, stored: Stored[Attempt], value: Any) -> Result:
        attempt = stored.entry
        handler = self._registry.named(attempt.handler)
        sent = self._vault.now()
        try:
            context = await self._authenticated(handler, attempt, value)
            withheld = await self._save_grant(attempt, handler, context, sent)
        except Exception as error:
            await self._end_attempt(stored, "failed")
            if isinstance(error, PocketAuthError):
                raise
            # Not the text and not the chain: a third party's may hold the code.
            name = type(error).__name__
            logger.warning("%s: exchange failed with %s", handler.name, name)
            raise ProviderError(
                f"{handler.name}: the exchange failed ({name})",
                provider=attempt.target.provider,
            ) from None
        await self._end_future(attempt, "done")
        await self._end_attempt(stored, "done")
        outcome = "withheld" if withheld else "connected"
        return Result(outcome, await self._ticket_of(attempt))

    async def _authenticated(
        self, handler: AuthHandlerInterface, attempt: Attempt, value: Any
    ) -> AuthContext:
        future = FutureData(
            attempt.uid, dict(attempt.data), tuple(attempt.scopes), Answered(value)
        )
        with attempt_context(future):
            try:
                async with asyncio.timeout(EXCHANGE_LIMIT.total_seconds() - 5):
                    context = await handler.authenticate(
                        _request(attempt.request), attempt.uid, future=future
                    )
            except TimeoutError:
                raise ProviderUnavailable(
                    f"{handler.name}: no answer to the exchange in time",
                    provider=attempt.target.provider,
                ) from None
        if not isinstance(context, AuthContext):
            raise ConfigurationError(
                f"{handler.name}: authenticate gave no AuthContext"
            )
        return context

    async def _save_grant(
        self,
        attempt: Attempt,
        handler: AuthHandlerInterface,
        context: AuthContext,
        sent: datetime,
    ) -> list[str]:
        """Store the grant unless that would take something away."""
        key, request = attempt.target.session_key(), _request(attempt.request)
        granted = attempt.scopes if context.scopes is None else context.scopes
        withheld = handler.missing_scopes(granted, attempt.scopes)
        session = Session(
            context=Typed.of(context),
            scopes=granted,
            client_id=getattr(request, "client_id", None),
            obtained_at=sent,
        )
        for _ in range(CAS_TRIES):
            shelf = await self._vault.shelf(key.owner)
            old, future = shelf.get(Session, key), shelf.get(Future, key)
            if old is None:
                if await self._vault.create(entry_key(Session, key), session):
                    break
                continue
            now = self._vault.now()
            alive = usable(old.entry, handler, request, now) is not None
            less = alive and handler.missing_scopes(granted, old.entry.scopes)
            first_won = (
                alive
                and future is not None
                and future.entry.id == attempt.future_id
                and future.entry.status == "done"
                and not handler.missing_scopes(old.entry.scopes, attempt.scopes)
            )
            if less or first_won or await self._vault.replace(old, session):
                break
        else:
            raise StorageError("a grant could not be saved: too many writers")
        self._changed(key.owner)
        return withheld

    async def _end_future(self, attempt: Attempt, status: str) -> None:
        key = attempt.target.session_key()
        for _ in range(CAS_TRIES):
            stored = (await self._vault.shelf(key.owner)).get(Future, key)
            # A success counts after a refusal in another tab, not the reverse.
            if (
                stored is None
                or stored.entry.id != attempt.future_id
                or stored.entry.status in {"done", status}
            ):
                break
            entry = stored.entry.model_copy(update={"status": status, "resolved": None})
            left = entry.expires_at - self._vault.now()
            if await self._vault.replace(stored, entry, max(left, ATTEMPT_TTL)):
                break
        if event := self._waiting.pop(attempt.future_id, None):
            event.set()

    async def _end_attempt(self, stored: Stored[Attempt], status: str) -> None:
        # What it was made with is not needed any more; the digest is, for replays.
        update: dict[str, Any] = {"status": status, "data": {}, "answer": None}
        await self._vault.replace(
            stored, stored.entry.model_copy(update=update), ATTEMPT_KEPT
        )
        if status == "failed":
            await self._unresolve(stored.entry)

    async def _unresolve(self, attempt: Attempt) -> None:
        key = attempt.target.session_key()
        stored = (await self._vault.shelf(key.owner)).get(Future, key)
        if stored and stored.entry.resolved == attempt.uid:
            entry = stored.entry.model_copy(update={"resolved": None})
            left = entry.expires_at - self._vault.now()
            await self._vault.replace(stored, entry, max(left, ATTEMPT_TTL))

    async def _ticket_of(self, attempt: Attempt) -> str | None:
        key = attempt.target.session_key()
        future = (await self._vault.shelf(key.owner)).get(Future, key)
        return future.entry.ticket if future else None

    # ------------------------------------------------- answers outside a callback

    async def resolve(self, uid: str, value: Any) -> bool:
        """Keep an answer that came outside a callback; `authenticate` exchanges it."""
        stored = await self.find(uid)
        if stored is None or stored.entry.status != "pending":
            return False
        if self._vault.now() >= stored.entry.expires_at:
            return False
        resolved = stored.entry.model_copy(
            update={"status": "resolved", "answer": value}
        )
        if await self._vault.replace(stored, resolved, ATTEMPT_KEPT) is None:
            return False
        key = stored.entry.target.session_key()
        for _ in range(CAS_TRIES):
            future = (await self._vault.shelf(key.owner)).get(Future, key)
            if future is None or future.entry.id != stored.entry.future_id:
                return False
            entry = future.entry.model_copy(update={"resolved": uid})
            left = entry.expires_at - self._vault.now()
            if await self._vault.replace(future, entry, max(left, ATTEMPT_TTL)):
                break
        if event := self._waiting.pop(stored.entry.future_id, None):
            event.set()
        return True

    async def finish(self, uid: str) -> None:
        stored = await self.find(uid)
        if stored is None or stored.entry.answer is None:
            if stored is not None and stored.entry.status == "exchanging":
                await asyncio.sleep(0.05)  # another caller is at it
                return
            raise CallbackRefused("expired")
        await self.answer(uid, handler_name=None, value=stored.entry.answer)


def _request(typed: Typed) -> AuthenticateRequest:
    request = typed.restore()
    assert isinstance(request, AuthenticateRequest)  # noqa: S101 - sealed as one
    return request
