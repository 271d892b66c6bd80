"""Futures made and widened: what a person is asked, at which link."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from datetime import timedelta

from ._models import AuthenticateRequest, Consent, Requirement, Turn
from ._registry import Registry
from ._site import Site
from ._standing import Standing, is_open
from ._vault import (
    ATTEMPT_KEPT,
    Future,
    Pointer,
    Stored,
    Typed,
    Vault,
    digest,
    entry_key,
    ticket_key,
)
from ._waiting import lifetime

MAX_TURNS = 50  # turns, pauses and refusals that one future remembers


class Questions:
    """One question per session key, however often it is asked."""

    def __init__(
        self, vault: Vault, registry: Registry, site: Site, future_ttl: timedelta
    ) -> None:
        self._vault, self._registry = vault, registry
        self._site, self._future_ttl = site, future_ttl

    async def ask(
        self,
        standing: Standing,
        requirement: Requirement,
        turn: Turn | None,
        tools: Iterable[str],
    ) -> Consent | None:
        """Make the future or widen the open one; `None` if another was faster."""
        old = standing.future
        if old is not None and is_open(old.entry, self._vault.now()):
            saved = await self._widen(old, standing, requirement, turn, tools)
        else:
            saved = await self._new(old, standing, requirement, turn, tools)
        return None if saved is None else self._consent(saved, standing)

    async def _new(
        self,
        old: Stored[Future] | None,
        standing: Standing,
        requirement: Requirement,
        turn: Turn | None,
        tools: Iterable[str],
    ) -> Stored[Future] | None:
        key, scopes = standing.key, self._scopes_to_ask(standing, requirement)
        ticket = secrets.token_urlsafe(32)
        future = Future(
            # Under which its place is found, by who knows the id and not the ticket.
            id=digest(ticket),
            ticket=ticket,
            handler=standing.handler.name,
            owner_id=key.owner.id,
            scopes=scopes,
            needed=list(requirement.scopes),
            state="DO_AUTH" if standing.session else "NO_SESSION",
            request=self._sealed_request(standing.request, scopes),
            turns=[turn.name] if turn else [],
            pauses=_pauses({}, turn),
            refused=dict(old.entry.refused) if old else {},
            # What somebody has agreed to already: still good, and still to be ended.
            held=old.entry.held if old else None,
            tools=sorted(tools),
            expires_at=self._vault.now() + self._future_ttl,
        )
        pointer = Pointer.to(key)
        # The pointer first: a link that leads nowhere must never be given out.
        # It stays a while longer, so that who comes too late is told so.
        known = self._future_ttl + ATTEMPT_KEPT
        await self._vault.create(ticket_key(future.ticket), pointer, known)
        place, ttl = entry_key(Future, key), lifetime(self._future_ttl)
        if old is None:
            saved = await self._vault.create(place, future, ttl)
        else:
            saved = await self._vault.replace(old, future, ttl)
        if saved is None:
            await self._vault.discard(ticket_key(future.ticket))
        return saved

    async def _widen(
        self,
        old: Stored[Future],
        standing: Standing,
        requirement: Requirement,
        turn: Turn | None,
        tools: Iterable[str],
    ) -> Stored[Future] | None:
        entry = old.entry
        scopes = list(
            dict.fromkeys([*entry.scopes, *self._scopes_to_ask(standing, requirement)])
        )
        wider = entry.model_copy(
            update={
                "scopes": scopes,
                # Perhaps the app is registered anew, or lives elsewhere.
                "request": self._sealed_request(standing.request, scopes),
                "needed": list(dict.fromkeys([*entry.needed, *requirement.scopes])),
                "turns": _turns(entry.turns, turn),
                "pauses": _pauses(entry.pauses, turn),
                "tools": sorted({*entry.tools, *tools}),
            }
        )
        if wider == entry:
            return old
        ttl = lifetime(entry.expires_at - self._vault.now())
        return await self._vault.replace(old, wider, ttl)

    @staticmethod
    def _scopes_to_ask(standing: Standing, requirement: Requirement) -> list[str]:
        granted = standing.session.entry.scopes if standing.session else []
        wanted = requirement.scopes or sorted(standing.handler.recommended_scopes())
        return list(dict.fromkeys([*granted, *wanted, *standing.missing]))

    @staticmethod
    def _sealed_request(request: AuthenticateRequest, scopes: list[str]) -> Typed:
        return Typed.of(request.model_copy(update={"auth_scopes": scopes}))

    def link(self, future: Future) -> str:
        """Return the connect link of a future."""
        return f"{self._site.url}/connect/{future.ticket}"

    def _consent(self, stored: Stored[Future], standing: Standing) -> Consent:
        future = stored.entry
        return Consent(
            key=future.id,
            url=self.link(future),
            expires_at=future.expires_at,
            state=standing.state,
            provider=standing.key.provider,
            display_name=self._registry.label(standing.key.provider),
            handler=future.handler,
            profile=standing.key.profile,
            scopes=tuple(future.scopes),
            missing_scopes=standing.missing,
            place=standing.key,
            upgrade=standing.session is not None,
            account=standing.session.entry.account if standing.session else None,
            confirm=self._site.confirm,
        )


def _turns(known: list[str], turn: Turn | None) -> list[str]:
    if turn is None or turn.name in known:
        return known
    return [*known, turn.name][-MAX_TURNS:]


def _pauses(known: dict[str, str], turn: Turn | None) -> dict[str, str]:
    if turn is None or turn.task is None or turn.thread_id is None:
        return known
    latest = {**known, turn.task: turn.thread_id}
    return dict(list(latest.items())[-MAX_TURNS:])
