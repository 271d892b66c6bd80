"""Grants that are given back to their providers."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from ._events import Tell
from ._models import AuthContext, SessionKey
from ._registry import Registry
from ._vault import Vault
from .handlers import AuthHandlerInterface

logger = logging.getLogger(__name__)


class Outbox:
    """Revokes grants that are gone here already."""

    def __init__(self, vault: Vault, registry: Registry, tell: Tell) -> None:
        self._vault, self._registry, self._tell = vault, registry, tell

    async def give_back(
        self,
        key: SessionKey,
        handler: AuthHandlerInterface,
        scopes: Iterable[str],
        context: AuthContext,
    ) -> None:
        """Withdraw a grant at the provider, as far as it can be done."""
        del key
        try:
            request = handler.make_request(list(scopes))
            await handler.revoke(request, context)
        except Exception as error:  # noqa: BLE001 - best effort, it is gone here
            logger.warning("%s: not revoked: %s", handler.name, type(error).__name__)
