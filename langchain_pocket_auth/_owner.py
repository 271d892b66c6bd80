"""Whose session: from trusted run-time data, never from the model."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeAlias

from ._errors import OwnerUnknown
from ._models import Owner


@dataclass(frozen=True, slots=True)
class RunInfo:
    """
    What is known of a run when its owner is asked for.

    Attributes:
        config: The run's config.
        context: The graph's run-time context, or `None`.
        user: Identity that a LangGraph Server authenticated, or `None`.
        thread_id: The conversation, or `None`.
    """

    config: Mapping[str, Any]
    context: Any
    user: str | None
    thread_id: str | None


OwnerLike: TypeAlias = Owner | str | None
OwnerResolver: TypeAlias = Callable[[RunInfo], OwnerLike | Awaitable[OwnerLike]]

DEFAULT_OWNER = Owner("thread", "default")
"""Off-server with a loopback base URL: one machine, one person (the spec's default)."""

_inherited: ContextVar[Owner | None] = ContextVar("pocket_owner", default=None)


@contextmanager
def inherited_owner(owner: Owner) -> Iterator[None]:
    """Let nested runs, whatever their thread id, act for the same owner."""
    token = _inherited.set(owner)
    try:
        yield
    finally:
        _inherited.reset(token)


def by_thread(run: RunInfo) -> Owner | None:
    """Give every conversation its own sessions."""
    return Owner("thread", run.thread_id) if run.thread_id else None


def from_configurable(key: str) -> OwnerResolver:
    """
    Take the user's id from `config["configurable"][key]`.

    Only for apps that set it themselves: one that forwards its clients' config
    lets every client choose whose account is used.
    """

    def resolve(run: RunInfo) -> Owner | None:
        value = (run.config.get("configurable") or {}).get(key)
        return Owner("user", value) if isinstance(value, str) and value else None

    return resolve


def owner_of(value: OwnerLike) -> Owner:
    """Return *value* as an owner; a string is a user's id."""
    if isinstance(value, Owner):
        return value
    if isinstance(value, str) and value:
        return Owner("user", value)
    raise OwnerUnknown(
        "nobody knows whose account this run may use: set PocketAuth(owner=...) to "
        "a user id or to a function of the run, or run under an authenticated "
        "LangGraph Server"
    )


class OwnerSource:
    """Resolves a run's owner: inherited, server's user, the app's, the default."""

    def __init__(self, setting: OwnerLike | OwnerResolver, *, loopback: bool) -> None:
        self._setting, self._loopback = setting, loopback

    def resolve(self, config: Mapping[str, Any]) -> Owner:
        """Return the owner; an asynchronous resolver is run in a loop of its own."""
        found = self._known(config)
        if inspect.isawaitable(found):
            found = asyncio.run(_awaited(found))
        return owner_of(found)

    async def aresolve(self, config: Mapping[str, Any]) -> Owner:
        """Return the owner; the app's resolver runs on the caller's loop."""
        found = self._known(config)
        return owner_of(await found if inspect.isawaitable(found) else found)

    def _known(self, config: Mapping[str, Any]) -> OwnerLike | Awaitable[OwnerLike]:
        if (owner := _inherited.get()) is not None:
            return owner
        setting = self._setting
        if setting is None or callable(setting):
            run = run_info(config)
            if run.user:
                return Owner("user", run.user)
            if setting is None:
                on_server = _server_info() is not None
                return DEFAULT_OWNER if self._loopback and not on_server else None
            return setting(run)
        return setting


async def _awaited(value: Awaitable[OwnerLike]) -> OwnerLike:
    return await value


def run_info(config: Mapping[str, Any]) -> RunInfo:
    """Gather what is known of the run that *config* belongs to."""
    runtime, server = _runtime(), _server_info()
    user = getattr(getattr(server, "user", None), "identity", None)
    thread_id = (config.get("configurable") or {}).get("thread_id")
    return RunInfo(
        config=config,
        context=getattr(runtime, "context", None),
        user=user if isinstance(user, str) and user else None,
        thread_id=str(thread_id) if thread_id is not None else None,
    )


def _runtime() -> Any:
    from langgraph.runtime import get_runtime

    try:
        return get_runtime()
    except (RuntimeError, KeyError):
        return None  # outside a graph


def _server_info() -> Any:
    # Set by LangGraph Server only; `configurable` can be set by any client.
    return getattr(_runtime(), "server_info", None)
