"""The decision: which of the six states a requirement is in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from ._models import AuthenticateRequest, AuthState, Owner, Requirement, SessionKey
from ._refresh import usable
from ._registry import provider_id
from ._vault import Future, Session, Shelf, Stored
from .handlers import AuthHandlerInterface


@dataclass(frozen=True, slots=True)
class Standing:
    """How a requirement stands: its state and what was read to find it."""

    state: AuthState
    handler: AuthHandlerInterface
    request: AuthenticateRequest
    key: SessionKey
    session: Stored[Session] | None
    future: Stored[Future] | None
    missing: tuple[str, ...]
    """Scopes that the session does not grant; all, where it is made anew."""


def decide(
    shelf: Shelf,
    candidates: Iterable[AuthHandlerInterface],
    owner: Owner,
    requirement: Requirement,
    request: AuthenticateRequest | None,
    *,
    now: datetime,
) -> Standing:
    """
    Return how *requirement* stands with what is on the shelf.

    Args:
        shelf: The owner's records.
        candidates: Handlers whose sessions may serve it, best first.
        owner: Whose.
        requirement: What is needed.
        request: Of the first candidate; the others make their own.
        now: The time.
    """
    first: Standing | None = None
    for handler in candidates:
        key = SessionKey(
            owner, provider_id(handler), requirement.profile, handler.connection()
        )
        if first is not None and not shelf.holds(Session, key):
            continue  # a further handler counts by its sessions only
        asked = request if first is None else None
        asked = asked or handler.make_request(list(requirement.scopes))
        standing = _decide_one(shelf, key, handler, asked, requirement.scopes, now)
        if standing.state in {AuthState.SKIP_AUTH, AuthState.DO_REFRESH}:
            return standing
        # Ask where there is a session to widen, else at the default handler.
        if first is None or (first.session is None and standing.session):
            first = standing
    assert first is not None  # noqa: S101 - candidates() is never empty
    return first


def _decide_one(  # noqa: PLR0917 - private, and called once
    shelf: Shelf,
    key: SessionKey,
    handler: AuthHandlerInterface,
    request: AuthenticateRequest,
    needed: tuple[str, ...],
    now: datetime,
) -> Standing:
    stored = shelf.get(Session, key)
    future = shelf.get(Future, key)
    missing = tuple(needed)
    if stored is not None:
        lacking = stored.entry.lacking(needed)
        missing = (*handler.missing_scopes(stored.entry.scopes, needed), *lacking)
        state = usable(stored.entry, handler, request, now)
        if not missing and state is not None:
            return Standing(state, handler, request, key, stored, future, ())
    if handler.unattended:  # made anew without anybody, wider if need be
        wanted = {*needed, *(stored.entry.scopes if stored else ())}
        wanted = wanted or handler.recommended_scopes()
        state = AuthState.DO_REFRESH
        return Standing(state, handler, request, key, None, None, tuple(wanted))
    state = AuthState.DO_AUTH if stored else AuthState.NO_SESSION
    if future is not None and is_open(future.entry, now):
        if future.entry.resolved:
            state = AuthState.RESOLVED
        elif not handler.missing_scopes(future.entry.scopes, {*needed, *missing}):
            state = AuthState.PENDING_RESOLVE
    return Standing(state, handler, request, key, stored, future, missing)


def is_open(future: Future, now: datetime) -> bool:
    """Whether a future's link still waits for the person."""
    return future.status == "pending" and now < future.expires_at
