"""What a click on a connect link does: an attempt is made, its handler prepares it."""

from __future__ import annotations

import asyncio
import inspect
import logging
import re
import secrets
from datetime import timedelta
from typing import Any

from ._errors import (
    CallbackRefused,
    ConfigurationError,
    PocketAuthError,
    ProviderError,
)
from ._futures import FutureData, attempt_context
from ._http import secure_url
from ._linking import restored_request
from ._models import SessionKey
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
)
from ._waiting import Waiting
from .handlers import AuthHandlerInterface

logger = logging.getLogger(__name__)

PREPARE_LIMIT = timedelta(seconds=20)  # a handler may make a request there
_URL = re.compile(r"https?://[^\s<>\"']+")


class Clicks:
    """Makes attempts, of which a future has ten at most: what is older is gone."""

    def __init__(self, vault: Vault, registry: Registry, waiting: Waiting) -> None:
        self._vault, self._registry, self._waiting = vault, registry, waiting

    async def begin(
        self, stored: Stored[Future], key: SessionKey, browser: str | None
    ) -> str:
        """
        Start an attempt; return the provider's page.

        Raises:
            CallbackRefused: So many start at once that this one is `too_many`.
            ConfigurationError: The handler gave no usable URL.
            ProviderError: The handler failed.
        """
        future, handler = stored.entry, self._registry.named(stored.entry.handler)
        attempt = FutureData(secrets.token_urlsafe(32), scopes=tuple(future.scopes))
        text = await self._prepared(handler, future, key, attempt)
        found = _URL.search(text) if isinstance(text, str) else None
        if found is None:
            raise ConfigurationError(f"{handler.name}: prepare returned no http(s) URL")
        url = secure_url(found.group(), f"{handler.name}: the authorization URL")
        await self.note(stored, key, browser, attempt)
        return url

    async def note(
        self,
        stored: Stored[Future],
        key: SessionKey,
        browser: str | None,
        made: FutureData | None = None,
    ) -> Stored[Attempt]:
        """
        Write an attempt down.

        Raises:
            CallbackRefused: `too_many`.
        """
        made = made or FutureData(secrets.token_urlsafe(32))
        future, handler = stored.entry, self._registry.named(stored.entry.handler)
        entry = Attempt(
            uid=made.uid,
            future_id=future.id,
            target=Pointer.to(key),
            handler=future.handler,
            scopes=future.scopes,
            request=future.request,
            data=made.data,
            browser=browser,
            expires_at=self._vault.now() + min(handler.attempt_ttl, ATTEMPT_TTL),
        )
        noted = await self._vault.create(attempt_key(made.uid), entry, ATTEMPT_KEPT)
        assert noted is not None  # noqa: S101 - its name is random
        too_many = await self._waiting.begun(stored, entry)
        if too_many is None:
            await self._vault.delete(noted)
            raise CallbackRefused("too_many")
        for name in too_many:
            old = await self._vault.get(Attempt, ("attempt", name))
            # What is under way keeps its place: its code may be spent.
            if old is not None and old.entry.status not in {"exchanging", "held"}:
                await self._vault.delete(old)
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
