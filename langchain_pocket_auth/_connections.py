"""An owner's connections: listed without secrets, ended, and forgotten altogether."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import date, datetime
from enum import StrEnum
from typing import Any, TypeAlias

from ._attempts import Attempts
from ._cards import Card, plain
from ._errors import ConfigurationError, CredentialUnreadable
from ._events import Event, Tell
from ._models import AuthContext, AuthState, Owner, SessionKey
from ._outbox import Outbox
from ._pauses import Pauses
from ._refresh import usable
from ._registry import Registry
from ._vault import Future, Pointer, Session, Shelf, Stored, Vault, entry_key

LastUsed: TypeAlias = Callable[
    [Iterable[SessionKey]], Awaitable[Mapping[SessionKey, date]]
]


class ConnectionHealth(StrEnum):
    """How a connection stands."""

    OK = "ok"
    """It works, and is renewed without the person where it has to be."""
    EXPIRING = "expiring"
    """It works until `expires_at`; after that the person has to connect again."""
    NEEDS_RECONNECT = "needs_reconnect"
    """It does not work any more; the person has to connect again."""
    UNREADABLE = "unreadable"
    """Its record does not open; it can be disconnected, but not revoked."""


_WORDS = {
    ConnectionHealth.OK: "works",
    ConnectionHealth.EXPIRING: "works for now, cannot be renewed",
    ConnectionHealth.NEEDS_RECONNECT: "has to be connected again",
    ConnectionHealth.UNREADABLE: "cannot be read",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """
    An account that an owner has connected; holds no secret.

    Attributes:
        id: A handle for `pocket.disconnect`: always the same for the same owner,
            provider, handler, tenant and profile.
        owner: Whose it is.
        provider: The provider's id.
        display_name: The provider's name for people.
        handler: The handler's name.
        profile: Which account of the owner.
        account: Whose account it is at the provider, where it told. Others named it:
            what could steer a terminal is replaced.
        scopes: What was granted.
        health: Whether it works.
        reason: Why it does not, or not for long; one sentence.
        connected_at: When the person agreed first; `None` where nobody had to, or an
            older version was told.
        expires_at: When the present token ends; `None`: not known.
        last_used: The last day on which it was used; `None`: not known.
    """

    id: str
    owner: Owner
    provider: str
    display_name: str
    handler: str
    profile: str
    account: str | None = None
    scopes: tuple[str, ...] = ()
    health: ConnectionHealth
    reason: str | None = None
    connected_at: datetime | None = None
    expires_at: datetime | None = None
    last_used: date | None = None

    def _repr_html_(self) -> str:
        facts = {
            "Account": self.account,
            "Profile": None if self.profile == "default" else self.profile,
            "Permissions": " ".join(self.scopes),
            "State": self.reason or _WORDS[self.health],
            "Connected": self.connected_at and f"{self.connected_at:%Y-%m-%d}",
            "Last used": self.last_used and f"{self.last_used:%Y-%m-%d}",
        }
        lines = tuple(f"{name}: {value}" for name, value in facts.items() if value)
        return Card(self.display_name, lines)._repr_html_()


@dataclass(frozen=True, slots=True, kw_only=True)
class Forgotten:
    """
    How much of an owner was erased.

    Attributes:
        connections: Connections, which are revoked at their providers.
        links: Connect links, used or not.
        attempts: Answers of providers that were awaited or kept against replays.
        pauses: Paused runs, which cannot be continued by themselves any more.
    """

    connections: int
    links: int
    attempts: int
    pauses: int


class Connections:
    """
    The connections of all owners.

    Args:
        vault: Where they are.
        registry: Which handlers there are.
        outbox: What revokes grants.
        attempts: What persons are doing right now.
        pauses: The paused runs.
        changed: Called when an owner's sessions have changed.
        tell: Called with what happened.
        last_used: Says when sessions were used last.
    """

    def __init__(
        self,
        vault: Vault,
        registry: Registry,
        outbox: Outbox,
        attempts: Attempts,
        pauses: Pauses,
        *,
        changed: Callable[[Owner], None],
        tell: Tell,
        last_used: LastUsed,
    ) -> None:
        self._vault, self._registry, self._outbox = vault, registry, outbox
        self._attempts, self._pauses, self._changed = attempts, pauses, changed
        self._tell, self._last_used = tell, last_used

    # --------------------------------------------------------------------- listing

    async def of(self, owner: Owner) -> list[Connection]:
        """Return all of an owner, those that cannot be read included."""
        shelf = await self._vault.shelf(owner)
        keys = shelf.keys(Session)
        used = await self._last_used(keys) if keys else {}
        found = [self._connection(shelf, key, used.get(key)) for key in keys]
        return sorted(found, key=lambda c: (c.display_name, c.profile, c.handler))

    def _connection(
        self, shelf: Shelf, key: SessionKey, used: date | None
    ) -> Connection:
        known: dict[str, Any] = {
            "id": connection_id(key),
            "owner": key.owner,
            "provider": key.provider,
            "display_name": self._registry.label(key.provider),
            "handler": handler_of(key),
            "profile": key.profile,
            "last_used": used,
        }
        try:
            stored = shelf.get(Session, key)
            assert stored is not None  # noqa: S101 - the key is from this shelf
            session, context = stored.entry, stored.entry.auth_context()
        except CredentialUnreadable as error:
            unreadable = ConnectionHealth.UNREADABLE
            return Connection(**known, health=unreadable, reason=plain(str(error)))
        health, reason = self._health(key, session, context)
        return Connection(
            **known,
            account=None if session.account is None else plain(session.account),
            scopes=tuple(map(plain, session.scopes)),
            health=health,
            reason=None if reason is None else plain(reason),
            connected_at=session.connected_at,
            expires_at=context.expires_at,
        )

    def _health(
        self, key: SessionKey, session: Session, context: AuthContext
    ) -> tuple[ConnectionHealth, str | None]:
        try:
            handler = self._registry.named(handler_of(key))
            request = handler.make_request(list(session.scopes))
            connection = handler.connection()
        except ConfigurationError as error:
            return ConnectionHealth.NEEDS_RECONNECT, str(error)
        alone, client_id = handler.unattended, getattr(request, "client_id", None)
        if session.needs_consent:
            reason = session.needs_consent
        elif session.refused:
            reason = "the provider's API does not take it any more"
        elif connection != key.connection:
            reason = "the app uses another tenant of this provider now"
        elif not alone and session.client_id != client_id:
            reason = "the app is registered anew at this provider"
        elif not alone and usable(session, handler, request, self._vault.now()) is None:
            reason = "it has run out and cannot be renewed"
        elif alone or context.expires_at is None or handler.can_refresh(context):
            return ConnectionHealth.OK, None
        else:
            return ConnectionHealth.EXPIRING, "it cannot be renewed"
        return ConnectionHealth.NEEDS_RECONNECT, reason

    async def find(self, owner: Owner, connection: str) -> SessionKey | None:
        """Return the place of an owner's connection by its id, or `None`."""
        keys = (await self._vault.shelf(owner)).keys(Session)
        return next((k for k in keys if connection_id(k) == connection), None)

    async def sessions(
        self, owner: Owner
    ) -> list[tuple[SessionKey, Stored[Session], AuthState]]:
        """
        Return all sessions of an owner, and how each stands by itself.

        Raises:
            CredentialUnreadable: One of them does not open.
        """
        shelf = await self._vault.shelf(owner)
        found = [(key, shelf.get(Session, key)) for key in shelf.keys(Session)]
        return [
            (key, stored, self._state(key, stored.entry))
            for key, stored in found
            if stored is not None
        ]

    def _state(self, key: SessionKey, session: Session) -> AuthState:
        try:
            handler = self._registry.named(handler_of(key))
            request = handler.make_request(list(session.scopes))
        except ConfigurationError:
            return AuthState.DO_AUTH  # the app is not registered there any more
        return usable(session, handler, request, self._vault.now()) or AuthState.DO_AUTH

    # ---------------------------------------------------------------------- ending

    async def end(
        self, owner: Owner, chosen: Callable[[SessionKey], bool]
    ) -> tuple[int, int]:
        """
        End connections and links: here at once, then at the provider.

        Returns:
            How many connections and how many links there were.
        """
        shelf = await self._vault.shelf(owner)
        links = [key for key in shelf.keys(Future) if chosen(key)]
        # The links first: who stores a grant looks afterwards whether its link is
        # still there, so that either of us sees it.
        for key in links:
            place = entry_key(Future, key)
            with suppress(CredentialUnreadable, ConfigurationError):
                if future := await self._vault.get(Future, place):
                    await self._attempts.withdraw(future.entry)
            await self._vault.discard(place)
        if links:
            shelf = await self._vault.shelf(owner)
        keys = [key for key in shelf.keys(Session) if chosen(key)]
        return sum([await self._outbox.end(key) for key in keys]), len(links)

    async def forget(self, owner: Owner) -> Forgotten:
        """Erase everything of an owner; grants are given back to their providers."""
        connections, links = await self.end(owner, lambda _: True)
        attempts = await self._attempts.forget(owner)
        pauses = await self._pauses.forget(owner)
        await self._vault.clear(owner)
        # What an answer has stored meanwhile; erased only, it would stay granted.
        late, _ = await self.end(owner, lambda _: True)
        async for pointer in self._vault.entries(Pointer, "ticket"):
            if pointer.entry.session_key().owner == owner:
                await self._vault.discard(pointer.key)
        self._changed(owner)
        self._tell(Event(type="forgotten", owner=owner))
        return Forgotten(
            connections=connections + late,
            links=links,
            attempts=attempts,
            pauses=pauses,
        )


def connection_id(key: SessionKey) -> str:
    """Return the handle of a connection; it says nothing of whose or what it is."""
    place = [key.owner.kind, key.owner.id, key.provider, key.profile, key.connection]
    return hashlib.sha256(json.dumps(place).encode()).hexdigest()[:32]


def handler_of(key: SessionKey) -> str:
    """Return the name of the handler that a connection came from."""
    return key.connection.partition("?")[0]
