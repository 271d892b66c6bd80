"""Whose session: from trusted run-time data, never from the model."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

from ._errors import OwnerUnknown
from ._models import Owner
from ._task import root_config, runtime_of


@dataclass(frozen=True, slots=True)
class RunInfo:
    """
    What is known of a run when its owner is asked for.

    Attributes:
        config: What the outermost graph of the run was started with.
        context: The graph's run-time context, or `None`.
        user: Identity that a LangGraph Server authenticated, or `None`.
        thread_id: The conversation, or `None`.
        on_server: Whether it runs in a LangGraph Server.
    """

    config: Mapping[str, Any]
    context: Any
    user: str | None
    thread_id: str | None
    on_server: bool = False


OwnerLike: TypeAlias = Owner | str | None
OwnerResolver: TypeAlias = Callable[[RunInfo], OwnerLike | Awaitable[OwnerLike]]

DEFAULT_OWNER = Owner("thread", "default")
"""Off-server with a loopback base URL: one machine, one person (the spec's default)."""


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
    if value is not None:
        raise OwnerUnknown(
            f"owner= gave a {type(value).__name__}: a user id is a non-empty string"
        )
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
        return owner_of(_wait(found) if inspect.isawaitable(found) else found)

    async def aresolve(self, config: Mapping[str, Any]) -> Owner:
        """Return the owner; the app's resolver runs on the caller's loop."""
        found = self._known(config)
        return owner_of(await found if inspect.isawaitable(found) else found)

    def outside_runs(self, owner: OwnerLike) -> Owner:
        """Return the owner where no run says it: the one given, or the fixed one."""
        if owner is not None:
            return owner_of(owner)
        if callable(self._setting):
            raise OwnerUnknown(
                "PocketAuth(owner=) is a function of the run, and this is none: say "
                "whose connection is meant, with owner="
            )
        if self._setting is None and self._loopback:
            return DEFAULT_OWNER
        return owner_of(self._setting)

    @contextmanager
    def handed_down(self, owner: Owner | RunInfo) -> Iterator[None]:
        """
        Let nested runs, whatever their thread id, act for the same owner.

        With a `RunInfo`: for the owner of that run, resolved when one is asked for,
        unless the run itself is such a nested one.
        """
        known = _inherited.get()
        if self not in known or isinstance(owner, Owner):
            known = {**known, self: owner}
        token = _inherited.set(known)
        try:
            yield
        finally:
            _inherited.reset(token)

    def _known(self, config: Mapping[str, Any]) -> OwnerLike | Awaitable[OwnerLike]:
        inherited = _inherited.get().get(self)
        if isinstance(inherited, Owner):
            return inherited
        run = inherited or run_info(config)
        if run.user:  # whom a server authenticated goes before any setting
            return Owner("user", run.user)
        if callable(self._setting):
            return self._setting(run)
        if self._setting is not None:
            return self._setting
        return DEFAULT_OWNER if self._loopback and not run.on_server else None


# By source: another pocket's owner is not ours.
_inherited: ContextVar[Mapping[OwnerSource, Owner | RunInfo]]
_inherited = ContextVar("pocket_owner", default=MappingProxyType({}))


def _wait(value: Awaitable[OwnerLike]) -> OwnerLike:
    async def awaited() -> OwnerLike:
        return await value

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(awaited())
    # Synchronous code inside a running loop, as in a notebook.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(copy_context().run, asyncio.run, awaited()).result()


def run_info(config: Mapping[str, Any]) -> RunInfo:
    """
    Gather what is known of the run that *config* belongs to.

    Of the outermost graph: a child's own thread id or settings change no owner.
    """
    config = root_config(config)
    runtime = runtime_of(config) or _runtime()
    # Set by LangGraph Server only; `configurable` can be set by any client.
    server = getattr(runtime, "server_info", None)
    user = getattr(getattr(server, "user", None), "identity", None)
    thread_id = (config.get("configurable") or {}).get("thread_id")
    return RunInfo(
        config=config,
        context=getattr(runtime, "context", None),
        user=user if isinstance(user, str) and user else None,
        thread_id=str(thread_id) if thread_id is not None else None,
        on_server=server is not None,
    )


def _runtime() -> Any:
    from langgraph.runtime import get_runtime

    try:
        return get_runtime()
    except (RuntimeError, KeyError):
        return None  # outside a graph
