"""What follows a consent: the answer is exchanged, the grant stored."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Mapping
from contextlib import suppress
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
from ._linking import Linking, Result, patiently, restored_request
from ._models import AuthContext
from ._quarantine import Quarantine, Shown
from ._registry import Registry
from ._saving import finished
from ._vault import Attempt, Grant, Stored, Vault
from ._withdrawals import Withdrawals
from .handlers import AuthHandlerInterface

logger = logging.getLogger(__name__)

EXCHANGE_LIMIT = timedelta(seconds=30)  # longer than a token request (10 s)


class Exchanges:
    """The exchanges of this process, each a task that no browser can stop."""

    def __init__(
        self,
        vault: Vault,
        registry: Registry,
        linking: Linking,
        quarantine: Quarantine,
        withdrawals: Withdrawals,
    ) -> None:
        self._vault, self._registry, self._linking = vault, registry, linking
        self._quarantine, self._withdrawals = quarantine, withdrawals
        self.ticket_of, self.end_attempt = linking.ticket_of, linking.end_attempt
        self._running: dict[str, asyncio.Task[Result]] = {}

    async def close(self) -> None:
        """Let the exchanges that run end: their codes may be spent already."""
        await finished(self._running.values())

    def start(
        self,
        claimed: Stored[Attempt],
        value: Any,
        parameters: Mapping[str, str],
        shown: Shown,
    ) -> asyncio.Task[Result]:
        """Exchange *value* in a task of its own."""
        return self._task(claimed, self._exchange(claimed, value, parameters, shown))

    def _task(
        self, stored: Stored[Attempt], work: Coroutine[Any, Any, Result]
    ) -> asyncio.Task[Result]:
        name = stored.key[1]
        task = self._running[name] = asyncio.ensure_future(work)
        task.add_done_callback(lambda t: self._ended(name, t))
        # Nobody may be waiting any more when it fails.
        task.add_done_callback(lambda t: t.cancelled() or t.exception())
        return task

    def _ended(self, name: str, task: asyncio.Task[Result]) -> None:
        if self._running.get(name) is task:
            del self._running[name]

    def running(self, attempt: Stored[Attempt]) -> asyncio.Task[Result] | None:
        """Return the task that exchanges that attempt, if it is ours."""
        return self._running.get(attempt.key[1])

    async def _exchange(
        self,
        stored: Stored[Attempt],
        value: Any,
        parameters: Mapping[str, str],
        shown: Shown,
    ) -> Result:
        attempt = stored.entry
        handler = self._registry.named(attempt.handler)
        sent = self._vault.now()
        try:
            context = await self._authenticated(handler, attempt, value, parameters)
            return await self.granted(stored, context, sent, shown)
        except Exception as error:  # noqa: BLE001 - whatever a handler raises
            failure = error
        # Out here, so that what follows does not carry it: it may hold the code.
        with suppress(StorageError):
            await self._linking.end_attempt(stored, "failed")
        if isinstance(failure, PocketAuthError):
            raise failure
        name = type(failure).__name__
        logger.warning("%s: exchange failed with %s", handler.name, name)
        raise ProviderError(
            f"{handler.name}: the exchange failed ({name})",
            provider=attempt.target.provider,
        )

    async def granted(
        self,
        stored: Stored[Attempt],
        context: AuthContext,
        sent: datetime,
        shown: Shown,
    ) -> Result:
        """
        Link a grant, or keep it until nothing is missing any more.

        Raises:
            CallbackRefused: Another account, or disconnected; it is given back.
            ConfigurationError: It cannot be stored; it is given back.
            StorageError: The store is away; it is given back.
        """
        attempt = stored.entry
        try:
            grant = await self._quarantine.examine(attempt, context, sent, shown)
        except (CallbackRefused, ConfigurationError):
            await self._withdrawals.give_back(attempt, context)
            raise
        if grant is None:
            return await self._linking.link(stored, context, sent)
        try:
            keep = self._quarantine.keep
            await patiently(lambda: keep(stored, grant, shown.browser))
        except StorageError:
            await self._withdrawals.give_back(attempt, context)
            raise
        return await self._waits(attempt, grant)

    async def _waits(self, attempt: Attempt, grant: Grant | None) -> Result:
        choose = grant is not None and grant.choose
        return Result("choose" if choose else "held", await self.ticket_of(attempt))

    async def go_on(self, stored: Stored[Attempt]) -> Result:
        """
        Link a grant that waits for nothing any more.

        Raises:
            CallbackRefused: Disconnected meanwhile; it is given back.
            StorageError: The store is away; it is given back.
        """
        attempt, grant = stored.entry, stored.entry.grant
        if attempt.status != "exchanging" or grant is None:
            return await self._waits(attempt, grant)
        return await asyncio.shield(self._task(stored, self._linked(stored, grant)))

    async def _linked(self, stored: Stored[Attempt], grant: Grant) -> Result:
        try:
            return await self._linking.link(stored, grant.auth_context(), grant.sent)
        except (CallbackRefused, StorageError):
            with suppress(StorageError):
                await self._linking.end_attempt(stored, "failed")
            raise

    async def _authenticated(
        self,
        handler: AuthHandlerInterface,
        attempt: Attempt,
        value: Any,
        parameters: Mapping[str, str],
    ) -> AuthContext:
        future = FutureData(
            attempt.uid,
            dict(attempt.data),
            tuple(attempt.scopes),
            Answered(value),
            parameters,
        )
        context: Any = None
        with attempt_context(future), suppress(TimeoutError):
            async with asyncio.timeout(EXCHANGE_LIMIT.total_seconds() - 5):
                context = await handler.authenticate(
                    restored_request(attempt.request), attempt.uid, future=future
                )
                if not isinstance(context, AuthContext):
                    raise ConfigurationError(
                        f"{handler.name}: authenticate gave no AuthContext"
                    )
                return context
        raise ProviderUnavailable(
            f"{handler.name}: no answer to the exchange in time",
            provider=attempt.target.provider,
        )
