"""The engine as the agent's side uses it: opened when needed, cached, on one loop."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from ._engine import APP, Engine
from ._errors import ProviderError, UnknownProvider
from ._events import Event, Events
from ._futures import FutureData
from ._loop import LOOP
from ._models import (
    AuthContext,
    AuthenticateRequest,
    Consent,
    Outcome,
    Owner,
    Requirement,
    Resumption,
    SessionKey,
    Turn,
)
from ._owner import OwnerSource
from ._refresh import advisory_at
from ._registry import Registry
from ._scrub import spellings
from ._seal import KeyRing, KeySource
from ._site import Site
from ._task import AlreadyResumed
from ._vault import (
    CAS_TRIES,
    Known,
    Session,
    Stored,
    Vault,
    handler_name,
    known_key,
    session_key_of,
)
from .storage import StorageBackend, storage_from_url

T = TypeVar("T")
MAX_CACHED_OWNERS = 10_000
Storage = str | StorageBackend | Callable[[], StorageBackend]


@dataclass(frozen=True, slots=True)
class Cached:
    """A context that was valid a moment ago."""

    until: float  # time.monotonic()
    renew_at: datetime | None
    client_id: str | None
    context: AuthContext


@dataclass(slots=True)
class _Opened:
    generation: int
    engine: asyncio.Future[Engine]


class Service:
    """
    Opens the engine on the background loop when it is first needed.

    Args:
        storage: A URL, a backend, a function that makes one, or `None`: a file in
            the user's data directory.
        keys: What seals, or where it is fetched when the store is opened; `None`: a
            key file of the user, or for memory a key of the process.
        registry: Which handlers there are.
        owners: Whose session a run may use.
        site: Where connect links live, and who may use them.
        listen: Awaited before a link is given out.
        interactive: Whether to ask at all.
        future_ttl: How long a link lives.
        decline_cooldown: How long a refusal holds in its thread.
        session_idle_ttl: After how long without use a session ends; `None`: never.
        cache_ttl: How long a valid session is answered from memory.
    """

    def __init__(
        self,
        storage: Storage | None,
        keys: KeyRing | KeySource | None,
        registry: Registry,
        *,
        owners: OwnerSource,
        site: Site,
        listen: Callable[[], Awaitable[None]],
        interactive: bool,
        future_ttl: timedelta,
        decline_cooldown: timedelta,
        session_idle_ttl: timedelta | None,
        cache_ttl: timedelta,
    ) -> None:
        self.registry, self.owners, self.site = registry, owners, site
        self.base_url = site.url
        registry.remember_in(self)
        self.interactive = interactive
        self._storage, self._keys = storage, keys
        self._listen, self._future_ttl = listen, future_ttl
        self._cooldown, self._session_idle_ttl = decline_cooldown, session_idle_ttl
        self.events = Events()
        self.ended: list[Callable[[str], None]] = []
        """Called on our loop with each pause that waited for what is final now."""
        self._cache_ttl_s = cache_ttl.total_seconds()
        self._cache: OrderedDict[Owner, dict[Requirement, Cached]] = OrderedDict()
        self._writes = 0
        self._opened: _Opened | None = None
        self._of_parents: list[_Opened] = []
        self._closed = False

    # ------------------------------------------------------- on the background loop

    async def call(self, work: Callable[[Engine], Awaitable[T]]) -> T:
        """Do *work* with the engine; on the background loop."""
        return await work(await self._engine())

    async def ask(self, work: Callable[[Engine], Awaitable[T]]) -> T:
        """Do *work* with the engine; from any loop."""
        return await LOOP.run(self.call(work))

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run on the background loop."""
        return await LOOP.run(work)

    def run_sync(self, work: Coroutine[Any, Any, T]) -> T:
        """Run on the background loop and block."""
        return LOOP.run_sync(work)

    async def _engine(self) -> Engine:
        opened = self._opened
        if opened is None or opened.generation != LOOP.generation:
            self._closed = False
            if opened is not None:
                # Of the process that forked this one. Collected, it would be closed,
                # which waits for threads that do not exist here.
                self._of_parents.append(opened)
            opened = self._opened = _Opened(
                LOOP.generation, asyncio.ensure_future(self._open())
            )
        try:
            return await asyncio.shield(opened.engine)
        except Exception:
            if self._opened is opened:
                self._opened = None  # the next call tries again
            raise

    @property
    def store(self) -> object:
        """What is equal for services of one store; `None`: shared with nobody."""
        if self._storage == "memory://":
            return None
        return "the user's own" if self._storage is None else self._storage

    async def _open(self) -> Engine:
        keys = self._keys
        storage = default_storage() if self._storage is None else self._storage
        ephemeral = storage == "memory://"
        if isinstance(storage, str):
            backend = storage_from_url(storage)
        else:
            backend = storage if isinstance(storage, StorageBackend) else storage()
        if keys is None:
            keys = KeyRing.ephemeral() if ephemeral else await _key_file()
        elif not isinstance(keys, KeyRing):
            keys = await KeyRing.read(keys)
        vault = Vault(backend, keys, lambda: datetime.now(UTC))
        await vault.open()
        engine = Engine(
            vault,
            self.registry,
            site=self.site,
            listen=self._listen,
            future_ttl=self._future_ttl,
            decline_cooldown=self._cooldown,
            session_idle_ttl=self._session_idle_ttl,
            changed=self.forget,
            tell=self.events.tell,
            ended=self._ended,
        )
        engine.housekeeping.start()
        return engine

    async def close(self) -> None:
        """Close what was opened here; the next call opens it again."""
        opened, self._opened = self._opened, None
        self._closed = True
        self._cache.clear()
        self.events.close()
        if opened is None or opened.generation != LOOP.generation:
            return
        with suppress(Exception):  # an engine that never opened
            await (await opened.engine).close()
        await self.registry.close()

    # ------------------------------------------------------------------- the cache

    def peek(self, owner: Owner, requirement: Requirement) -> AuthContext | None:
        """Answer from memory, if the session was valid a moment ago and still is."""
        mine = self._cache.get(owner)
        cached = mine.get(requirement) if mine else None
        if cached is None or time.monotonic() >= cached.until:
            return None
        if cached.renew_at is not None and datetime.now(UTC) >= cached.renew_at:
            return None
        # A copy: what one tool does to it reaches no other.
        return cached.context.model_copy()

    def peek_request(
        self, owner: Owner, requirement: Requirement, request: AuthenticateRequest
    ) -> AuthContext | None:
        """Answer from memory, if the session is of the request's client."""
        context = self.peek(owner, requirement)
        cached = self._cache.get(owner, {}).get(requirement)
        client_id = getattr(request, "client_id", None)
        return context if cached and cached.client_id == client_id else None

    @property
    def writes(self) -> int:
        """How many sessions were written here; taken before a read, for `keep`."""
        return self._writes

    def keep(
        self,
        owner: Owner,
        requirement: Requirement,
        stored: Stored[Session],
        writes: int,
    ) -> AuthContext:
        """Return a session's context for tools, and remember it for a while."""
        context, session = self.for_tool(requirement, stored), stored.entry
        # Read before somebody wrote: perhaps old already.
        if self._cache_ttl_s and writes == self._writes and not session.needs_consent:
            self._cache.setdefault(owner, {})[requirement] = Cached(
                time.monotonic() + self._cache_ttl_s,
                advisory_at(session, session.auth_context()),
                session.client_id,
                context,
            )
            while len(self._cache) > MAX_CACHED_OWNERS:
                self._cache.popitem(last=False)
        return context

    def forget(self, owner: Owner) -> None:
        """Forget what is remembered of an owner: it was written."""
        self._writes += 1
        if owner == APP:  # everybody's
            self._cache.clear()
        self._cache.pop(owner, None)

    def for_tool(
        self, requirement: Requirement, stored: Stored[Session]
    ) -> AuthContext:
        """Return what a tool gets: without what renews the grant."""
        context = stored.entry.auth_context()
        update: dict[str, Any] = dict.fromkeys(
            {"refresh_token", "id_token", "client"} & type(context).model_fields.keys()
        )
        if not requirement.detail:
            update["detail"] = None
        update["scopes"] = list(stored.entry.scopes)
        copy = context.model_copy(update=update)
        copy._provider = self.registry.canonical(requirement.provider)  # noqa: SLF001 - of our own base class
        secrets = {context.access_token}
        with suppress(UnknownProvider):  # of a handler that is not passed any more
            handler = self.registry.named(handler_name(stored))
            copy._environment = handler.environment()  # noqa: SLF001
            copy._placed = handler.placement(context)  # noqa: SLF001
            secrets.update(handler.secrets(context))
        copy._masked_texts = spellings(secrets)  # noqa: SLF001
        copy._clients = self._clients_of(requirement, session_key_of(stored))  # noqa: SLF001
        return copy

    def _clients_of(
        self, requirement: Requirement, key: SessionKey
    ) -> Callable[..., Any]:
        """Return what makes HTTP clients of a context that is renewed from here."""

        async def renewed(
            refused: AuthContext, lacking: tuple[str, ...] | None
        ) -> AuthContext | None:
            token, needed = refused.access_token, requirement.scopes
            stored = await self.ask(lambda e: e.not_taken(key, needed, token, lacking))
            return None if stored is None else self.for_tool(requirement, stored)

        def renewed_sync(
            refused: AuthContext, lacking: tuple[str, ...] | None
        ) -> AuthContext | None:
            return LOOP.run_sync(renewed(refused, lacking))

        def make(context: AuthContext, hosts: Iterable[str], **settings: Any) -> Any:
            from ._client import client

            return client(context, hosts, renewed, renewed_sync, **settings)

        return make

    # ----------------------------------------------------- what gate and guard need

    async def settle(
        self, owner: Owner, outcomes: list[Outcome], turn: Turn, *, ask: bool
    ) -> list[AuthContext | None]:
        """Bring outcomes up to date; contexts for those that are met."""
        engine = await self._engine()
        contexts: list[AuthContext | None] = []
        for outcome in outcomes:
            writes, context = self._writes, None
            try:
                stored = await engine.settle(owner, outcome, turn=turn, ask=ask)
            except ProviderError as error:
                outcome.refusal = error
            else:
                if stored is not None:
                    need = outcome.requirement
                    context = self.keep(owner, need, stored, writes)
            contexts.append(context)
        return contexts

    async def confirm(
        self, owner: Owner, key: str, code: str, task: str | None
    ) -> bool:
        """Take a code from the owner's chat; whether it was right and all is done."""
        return await (await self._engine()).confirm(owner, key, code, task)

    async def refuse(self, consent: Consent, turn: Turn) -> None:
        """Write down that the person said no in the chat."""
        await (await self._engine()).refuse(consent, turn)

    def tell(self, event: Event) -> None:
        """Tell the app what happened."""
        self.events.tell(event)

    async def pauses_of(self, task: str) -> tuple[Mapping[str, int], list[str]]:
        """How often a task's guarded calls have paused, and the interrupts' ids."""
        pause = await (await self._engine()).pauses.get(task)
        return pause.counts, pause.interrupt_ids

    async def recount(self, task: str, ordinal: int, count: int) -> None:
        """Correct how often a guarded call has paused."""
        await (await self._engine()).pauses.recount(task, ordinal, count)

    async def note_pause(
        self,
        task: str,
        interrupt_id: str,
        consents: Iterable[Consent],
        resumption: Resumption | None,
        counted: tuple[int, int] | None,
    ) -> None:
        """Write down a pause that is about to be raised."""
        pauses = (await self._engine()).pauses
        await pauses.note(task, interrupt_id, consents, resumption, counted)
        # What it waits for may have ended before anybody could know of it.
        self._ended([task])

    def _ended(self, pauses: Iterable[str]) -> None:
        for task in pauses:
            for callback in self.ended:
                callback(task)

    async def claim(self, task: str, name: str, holder: str, answers: int) -> None:
        """
        Be the one that goes on after a pause.

        Raises:
            AlreadyResumed: Another run is.
        """
        pauses = (await self._engine()).pauses
        if not await pauses.claim(task, name, holder, answers):
            raise AlreadyResumed(
                "another run continues this pause: look at the thread's state; if "
                "that run has died, resume again in a minute"
            )

    async def release(self, task: str, name: str, holder: str) -> None:
        """Let another run go on after a pause."""
        await (await self._engine()).pauses.release(task, name, holder)

    # ----------------------------------------------------------- what the app knows

    async def recall(self, name: str) -> dict[str, Any] | None:
        """Return what was remembered under a name, or `None`."""
        vault = (await self._engine()).vault
        known = await vault.get(Known, known_key(name))
        return known.entry.data if known else None

    async def remember(self, name: str, data: dict[str, Any]) -> None:
        """Remember *data*, sealed, in the place of what was; the last write counts."""
        vault, key = (await self._engine()).vault, known_key(name)
        known = Known(data=data)
        for _ in range(CAS_TRIES):
            old = await vault.get(Known, key)
            saved = await (
                vault.replace(old, known) if old else vault.create(key, known)
            )
            if saved is not None:
                return

    # ------------------------------------------------------- behind the FutureStore

    def find_future(self, uid: str) -> FutureData | None:
        """Return an attempt as its handler sees it."""
        if self._idle:
            return None
        stored = LOOP.run_sync(self.call(lambda e: e.attempts.find(uid)))
        if stored is None:
            return None
        attempt = stored.entry
        return FutureData(uid, dict(attempt.data), tuple(attempt.scopes))

    def resolve_future(self, uid: str, value: Any) -> bool:
        """Keep an answer that came outside a callback."""
        if self._idle:
            return False
        return LOOP.run_sync(self.call(lambda e: e.attempts.resolve(uid, value)))

    @property
    def _idle(self) -> bool:
        """Whether nobody waits here: closed, or memory that was never opened."""
        return self._opened is None and (self._closed or self._storage == "memory://")


def default_storage() -> str:
    """Return the URL of the store that is used where none is named."""
    from platformdirs import user_data_path

    return f"sqlite:///{user_data_path('pocket-auth') / 'sessions.db'}"


def key_path() -> Path:
    """Return the file of the keys that are used where none are given."""
    from platformdirs import user_config_path

    return user_config_path("pocket-auth") / "keys"


async def _key_file() -> KeyRing:
    return await asyncio.to_thread(KeyRing.file, key_path())
