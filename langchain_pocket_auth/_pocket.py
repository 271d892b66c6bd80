"""`PocketAuth`: wires the parts; the object that users see."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

from langchain_core.runnables import RunnableConfig, RunnableLambda
from langchain_core.tools import BaseTool

from ._catalog import Catalog, Provider
from ._engine import Engine
from ._errors import ConfigurationError, ProviderError
from ._futures import FutureData, register_backing
from ._gate import Gate, ToolGuard
from ._loop import LOOP
from ._models import (
    AuthContext,
    AuthenticateRequest,
    AuthState,
    Outcome,
    Owner,
    Requirement,
)
from ._owner import OwnerLike, OwnerResolver, OwnerSource, owner_of
from ._refresh import advisory_at
from ._registry import Registry, provider_id
from ._seal import KeyRing
from ._tools import Inject, InjectedAuth, guarded_needs, is_guarded, needs_of, wrap_tool
from ._vault import Session, Vault
from .handlers import AuthHandlerInterface
from .storage import StorageBackend, storage_from_url

if TYPE_CHECKING:
    from fastapi import APIRouter
    from langgraph.graph import StateGraph

    from ._middleware import PocketAuthMiddleware
    from ._settings import ClientLike

logger = logging.getLogger(__name__)

T = TypeVar("T")
MAX_CACHED_OWNERS = 10_000
Storage = str | StorageBackend | Callable[[], StorageBackend]


@dataclass(frozen=True, slots=True)
class _Cached:
    until: float  # time.monotonic()
    renew_at: datetime | None
    context: AuthContext


@dataclass(slots=True)
class _Opened:
    """What lives on one background loop."""

    generation: int
    engine: asyncio.Future[Engine]
    server: Any = None


class PocketAuth:
    """
    Lets an agent act for its end users at third-party services.

    Nothing is opened, written or started before it is first needed.

    Args:
        storage: `memory://`, `sqlite:///path`, a `StorageBackend`, or a function
            that makes one; default: a SQLite file in the user's data directory.
        clients: App registrations by provider: `(client id, client secret)` or
            `Client(...)`. `POCKET_AUTH_CLIENTS__GITHUB__CLIENT_ID` says the same.
        providers: Own providers: `Provider(...)`, or paths of TOML files.
        handlers: Own `AuthHandlerInterface` classes or instances.
        routers: Own FastAPI routers with callbacks, served below `/auth`.
        owner: Whose sessions: a user id, an `Owner`, or a function of `RunInfo`.
            Default: the user a LangGraph Server authenticated; off-server, with a
            loopback `base_url`, one person for the whole machine.
        base_url: Where connect links and callbacks live; loopback in this version.
        interactive: `False`: never ask; what needs consent fails at once.
        keys: `"id:key,..."`, the first seals; default `POCKET_AUTH_KEYS`, else a
            key file in the user's config directory.
        settings_file: A TOML file with the same settings as the environment.
        future_ttl: How long a connect link lives.
        session_cache_ttl: How long a valid session is answered from memory.
        app_name: What the connect page calls the app.

    Raises:
        ConfigurationError: A setting is wrong; the text names the remedy.
    """

    def __init__(
        self,
        storage: Storage | None = None,
        *,
        clients: Mapping[str, ClientLike] | None = None,
        providers: Iterable[Provider | str | Path] = (),
        handlers: Iterable[AuthHandlerInterface | type[AuthHandlerInterface]] = (),
        routers: Iterable[APIRouter] = (),
        owner: OwnerLike | OwnerResolver = None,
        base_url: str | None = None,
        interactive: bool = True,
        keys: str | None = None,
        settings_file: str | Path | None = None,
        future_ttl: timedelta = timedelta(days=7),
        session_cache_ttl: timedelta = timedelta(seconds=5),
        app_name: str | None = None,
    ) -> None:
        from ._settings import (
            DEFAULT_BASE_URL,
            check_base_url,
            client_of,
            read_settings,
        )

        settings = read_settings(settings_file)
        self.base_url = check_base_url(
            base_url or settings.base_url or DEFAULT_BASE_URL
        )
        self.interactive, self.app_name = interactive, app_name
        self.owners = OwnerSource(owner, loopback=True)
        self._storage = storage or settings.storage
        written = keys or (settings.keys.get_secret_value() if settings.keys else None)
        # Parsed now, so that a malformed key is told before any link.
        self._keys = KeyRing.parse(written) if written else None
        self._clients = {
            **settings.clients,
            **{k: client_of(str(k), v) for k, v in (clients or {}).items()},
        }
        self.catalog = Catalog(providers)
        self._handlers = list(handlers)
        self.routers = list(routers)
        self._future_ttl = future_ttl
        self._cache_ttl_s = session_cache_ttl.total_seconds()
        self._cache: OrderedDict[Owner, dict[Requirement, _Cached]] = OrderedDict()
        self._writes = 0
        self._registry = self._new_registry()
        self._opened: _Opened | None = None
        self._router: APIRouter | None = None
        self._guard = ToolGuard(self)
        register_backing(self)

    def __repr__(self) -> str:
        return f"PocketAuth(base_url={self.base_url!r})"

    # ------------------------------------------------------------- the agent's side

    @overload
    def wrap(
        self,
        tool: BaseTool,
        *,
        provider: str | None = ...,
        scopes: Iterable[str] = ...,
        handler: str | None = ...,
        profile: str = ...,
        inject: Inject | None = ...,
    ) -> BaseTool: ...

    @overload
    def wrap(
        self,
        tool: Sequence[BaseTool],
        *,
        provider: str | None = ...,
        scopes: Iterable[str] = ...,
        handler: str | None = ...,
        profile: str = ...,
        inject: Inject | None = ...,
    ) -> list[BaseTool]: ...

    def wrap(
        self,
        tool: BaseTool | Sequence[BaseTool],
        *,
        provider: str | None = None,
        scopes: Iterable[str] = (),
        handler: str | None = None,
        profile: str = "default",
        inject: Inject | None = None,
    ) -> BaseTool | list[BaseTool]:
        """
        Return a guarded copy of a tool, or of those of a list that need it.

        Args:
            tool: Annotated with `InjectedAuth`, or any tool together with *provider*.
            provider: What the tool needs, if it is not annotated; its body reads
                `current_auth()`.
            scopes: What it needs there.
            handler: Name of a handler; by default any of the provider's will do.
            profile: Which account of the owner.
            inject: Parameter to function of the context: `{"headers": lambda auth:
                {...}}`. These parameters leave the model's schema.

        Raises:
            TypeError: An annotation that the model would get to see.
            ValueError: A single tool with nothing to guard, or wrapped already.
        """
        if inject and provider is None:
            raise ValueError("inject= needs provider=, whose context it is given")
        extra = None
        if provider is not None:
            extra = InjectedAuth(
                provider, scopes=scopes, handler=handler, profile=profile
            ).requirement
        if isinstance(tool, BaseTool):
            return wrap_tool(tool, needs_of(tool, extra, inject), self._guard)
        wrapped = []
        for one in tool:
            needs = needs_of(one, extra, inject)
            guard = needs.requirements and not is_guarded(one)
            wrapped.append(wrap_tool(one, needs, self._guard) if guard else one)
        return wrapped

    def middleware(
        self, tools: Iterable[BaseTool] | None = None
    ) -> PocketAuthMiddleware:
        """
        Return the middleware for `create_agent`; list it first.

        Args:
            tools: The agent's tools, where they are not all in `create_agent(tools)`.

        Raises:
            ConfigurationError: The `langchain` package is not installed.
        """
        try:
            from ._middleware import PocketAuthMiddleware
        except ModuleNotFoundError as error:
            if error.name and error.name.split(".")[0] != "langchain":
                raise
            raise ConfigurationError(
                "pocket.middleware() needs the langchain package: "
                'pip install "langchain-pocket-auth[agents]"'
            ) from None
        return PocketAuthMiddleware(self, self._guard, tools)

    def add_tool_node(
        self,
        builder: StateGraph[Any, Any, Any, Any],
        tools: Sequence[BaseTool],
        *,
        name: str = "tools",
        then: str = "agent",
        messages_key: str = "messages",
        **tool_node_kwargs: Any,
    ) -> None:
        """
        Add the gate as *name* and, behind it, a `ToolNode` with the guarded tools.

        Stands where `builder.add_node("tools", ToolNode(tools))` stood, together with
        the edge to *then*. `tools_condition` stays as it is.

        Args:
            builder: The graph.
            tools: Wrapped or not.
            name: The gate's node; the tools run in `f"{name}_run"`.
            then: The node that sees the results.
            messages_key: The state's key of the messages.
            tool_node_kwargs: For `ToolNode`.
        """
        from langgraph.prebuilt import ToolNode

        guarded = self.wrap(list(tools))
        needs = {t.name: guarded_needs(t) for t in guarded if is_guarded(t)}
        gate = Gate(self, lambda n: needs[n].requirements if n in needs else ())
        run = f"{name}_run"
        node = _GateNode(gate, builder, name, run, then, messages_key)
        builder.add_node(
            name,
            RunnableLambda(node.check, node.acheck, name=name),
            destinations=(run, then),
        )
        tool_node = ToolNode(guarded, messages_key=messages_key, **tool_node_kwargs)
        builder.add_node(run, tool_node)
        builder.add_edge(run, then)

    # ------------------------------------------------------------- the spec's methods

    def make_request(
        self,
        auth_scopes: list[str] | None = None,
        auth_handler_name: str | None = None,
        auth_provider: str | None = None,
        **kwargs: Any,
    ) -> AuthenticateRequest:
        """
        Make a request of the handler that is meant.

        Raises:
            ConfigurationError: Unknown handler, or the app is not registered.
        """
        handler = self.find_handler_instance(auth_handler_name, auth_provider)
        return handler.make_request(auth_scopes, **kwargs)

    def find_handler_instance(
        self, name: str | None = None, auth_provider: str | None = None
    ) -> AuthHandlerInterface:
        """
        Return a handler by name, or the default one of a provider.

        Raises:
            UnknownProvider: There is none.
            ValueError: Neither is named.
        """
        if name is not None:
            return self._registry.named(name)
        if auth_provider is not None:
            return self._registry.of(_plain(auth_provider))[0]
        raise ValueError("name a handler or a provider")

    async def check(
        self,
        auth_req: AuthenticateRequest,
        auth_handler_name: str | None = None,
        auth_provider: str | None = None,
        thread_id: str = "default",
        profile: str = "default",
        *,
        owner: OwnerLike = None,
    ) -> AuthState:
        """Return how a request stands; changes nothing."""
        asked = self._asked(auth_req, auth_handler_name, auth_provider, profile)
        who = _owner(thread_id, owner)
        if self.peek(who, asked) is not None:
            return AuthState.SKIP_AUTH
        standing = await self._with(lambda e: e.standing(who, asked, auth_req))
        if standing.state is AuthState.SKIP_AUTH and standing.session:
            self._keep(who, asked, standing.session.entry, self._writes)
        return standing.state

    async def prepare(
        self,
        auth_req: AuthenticateRequest,
        auth_handler_name: str | None = None,
        auth_provider: str | None = None,
        thread_id: str = "default",
        profile: str = "default",
        *,
        owner: OwnerLike = None,
    ) -> str | None:
        """
        Return the connect link for the person, or `None` if none is needed.

        However often it is called, there is one link until it is used or over.

        Raises:
            ConfigurationError: A setting is wrong; raised before any link.
        """
        asked = self._asked(auth_req, auth_handler_name, auth_provider, profile)
        who = _owner(thread_id, owner)
        consent = await self._with(lambda e: e.prepare(who, asked, request=auth_req))
        return None if consent is None else consent.url

    async def authenticate(
        self,
        auth_req: AuthenticateRequest,
        auth_handler_name: str | None = None,
        auth_provider: str | None = None,
        thread_id: str = "default",
        profile: str = "default",
        *,
        owner: OwnerLike = None,
        timeout: float = 300.0,  # noqa: ASYNC109 - the spec's waiting time, in seconds
    ) -> AuthContext:
        """
        Return the context; waits at most *timeout* seconds for a prepared consent.

        Raises:
            AuthorizationRequired: Nothing was prepared, or not finished in time.
            AuthorizationRefused: The person said no.
            ProviderUnavailable: The token is over and cannot be renewed now.
        """
        asked = self._asked(auth_req, auth_handler_name, auth_provider, profile)
        who = _owner(thread_id, owner)
        if (context := self.peek(who, asked)) is not None:
            return context
        writes = self._writes
        session = await self._with(
            lambda e: e.authenticate(who, asked, request=auth_req, timeout_s=timeout)
        )
        return self._keep(who, asked, session.entry, writes)

    authenticate_async = authenticate

    async def get_auth_context(
        self,
        auth_provider: str,
        thread_id: str = "default",
        profile: str = "default",
        *,
        owner: OwnerLike = None,
    ) -> AuthContext | None:
        """Return the stored context of a provider, fresh or not; `None`: no session."""
        who, provider = _owner(thread_id, owner), _plain(auth_provider)
        for key, stored in await self._with(lambda e: e.sessions(who)):
            if (key.provider, key.profile) == (provider, profile):
                return self._for_tool(Requirement(provider), stored.entry)
        return None

    async def list_session_state(
        self,
        thread_id: str = "default",
        auth_provider: str | None = None,
        *,
        owner: OwnerLike = None,
    ) -> list[dict[str, Any]]:
        """Return provider, profile, scope and state of an owner's sessions."""
        who = _owner(thread_id, owner)
        wanted = None if auth_provider is None else _plain(auth_provider)
        listed = []
        for key, stored in await self._with(lambda e: e.sessions(who)):
            if wanted not in {None, key.provider}:
                continue
            asked = Requirement(key.provider, profile=key.profile)
            standing = await self._with(lambda e, a=asked: e.standing(who, a))
            listed.append(
                {
                    "provider": key.provider,
                    "profile": key.profile,
                    "scope": list(stored.entry.scopes),
                    "state": standing.state,
                }
            )
        return listed

    async def delete_session(
        self,
        auth_provider: str,
        thread_id: str = "default",
        profile: str = "default",
        *,
        auth_handler_name: str | None = None,
        owner: OwnerLike = None,
    ) -> bool:
        """Forget a connection: here at once, and revoke it at the provider."""
        who, provider = _owner(thread_id, owner), _plain(auth_provider)
        return await self._with(
            lambda e: e.delete(who, provider, profile, auth_handler_name)
        )

    def _asked(
        self,
        request: AuthenticateRequest,
        handler: str | None,
        provider: str | None,
        profile: str,
    ) -> Requirement:
        if provider is None:
            provider = provider_id(self.find_handler_instance(handler))
        scopes = tuple(request.auth_scopes or ())
        return Requirement(_plain(provider), scopes, handler, profile)

    # -------------------------------------------------------------------- the server

    @property
    def handlers(self) -> list[AuthHandlerInterface]:
        """The handlers that were passed in, as instances."""
        return self._registry.own

    def label(self, provider: str) -> str:
        """Return a provider's name for people."""
        return self._registry.label(provider)

    @property
    def router(self) -> APIRouter:
        """
        The routes, to mount: `app.include_router(pocket.router)`.

        Whoever asks for it serves it: no background server is started then. The
        app has to be reachable at `base_url`.
        """
        if self._router is None:
            from .server import make_router

            self._router = make_router(self)
        return self._router

    async def serve(self) -> None:
        """
        Start the background server now, instead of when the first link is made.

        Raises:
            CallbackServerError: Its port is taken.
        """
        await LOOP.run(self._listen())

    async def aclose(self) -> None:
        """Stop the server and close what was opened here."""
        await LOOP.run(self._close())

    def close(self) -> None:
        """Stop the server and close what was opened here."""
        LOOP.run_sync(self._close())

    async def _close(self) -> None:
        opened, self._opened = self._opened, None
        self._cache.clear()
        if opened is None or opened.generation != LOOP.generation:
            return
        if opened.server is not None:
            await opened.server.stop()
        if not opened.engine.cancelled():
            engine = await opened.engine
            await engine.close()
        await self._registry.close()

    async def _listen(self) -> None:
        if self._router is not None:
            return  # the app serves it
        await self._engine()
        opened = self._opened
        assert opened is not None  # noqa: S101 - _engine opened it
        if opened.server is None:
            from .server import BackgroundServer

            opened.server = BackgroundServer(self)
        await opened.server.start()

    # ------------------------------------------- the engine, on the background loop

    async def _engine(self) -> Engine:
        opened = self._opened
        if opened is None or opened.generation != LOOP.generation:
            opened = self._opened = _Opened(
                LOOP.generation, asyncio.ensure_future(self._open())
            )
        try:
            return await asyncio.shield(opened.engine)
        except Exception:
            if self._opened is opened:
                self._opened = None  # the next call tries again
            raise

    async def _open(self) -> Engine:
        storage, keys = self._storage, self._keys
        if storage is None:
            from platformdirs import user_data_path

            path = user_data_path("pocket-auth") / "sessions.db"
            storage = f"sqlite:///{path}"
        if isinstance(storage, str):
            ephemeral = storage == "memory://"
            backend = storage_from_url(storage)
        else:
            ephemeral = False
            backend = storage if isinstance(storage, StorageBackend) else storage()
        if keys is None:
            keys = KeyRing.ephemeral() if ephemeral else await _key_file()
        vault = Vault(backend, keys, lambda: datetime.now(UTC))
        await vault.open()
        return Engine(
            vault,
            self._registry,
            base_url=self.base_url,
            listen=self._listen,
            future_ttl=self._future_ttl,
            changed=self._forget,
        )

    def _new_registry(self) -> Registry:
        return Registry(
            self.catalog, self._handlers, base_url=self.base_url, clients=self._clients
        )

    async def call(self, work: Callable[[Engine], Awaitable[T]]) -> T:
        """Do *work* with the engine; on the background loop."""
        return await work(await self._engine())

    async def _with(self, work: Callable[[Engine], Awaitable[T]]) -> T:
        return await LOOP.run(self.call(work))

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run on the background loop."""
        return await LOOP.run(work)

    def run_sync(self, work: Coroutine[Any, Any, T]) -> T:
        """Run on the background loop and block."""
        return LOOP.run_sync(work)

    # ----------------------------------------------------- what gate and guard need

    def peek(self, owner: Owner, requirement: Requirement) -> AuthContext | None:
        """Answer from memory, if the session was valid a moment ago and still is."""
        cached = self._cache.get(owner, {}).get(requirement)
        if cached is None or time.monotonic() >= cached.until:
            return None
        if cached.renew_at is not None and datetime.now(UTC) >= cached.renew_at:
            return None
        return cached.context

    async def settle(
        self, owner: Owner, outcomes: list[Outcome], turn: str, *, ask: bool
    ) -> list[AuthContext | None]:
        """Bring outcomes up to date; contexts for those that are met."""
        engine = await self._engine()
        contexts: list[AuthContext | None] = []
        for outcome in outcomes:
            writes = self._writes
            session = None
            try:
                session = await engine.settle(owner, outcome, turn=turn, ask=ask)
            except ProviderError as error:
                outcome.refusal = error
            contexts.append(
                None
                if session is None
                else self._keep(owner, outcome.requirement, session.entry, writes)
            )
        return contexts

    async def pauses(self, task: str) -> Mapping[str, int]:
        """How often guarded calls of a task have paused, by ordinal."""
        stored = await (await self._engine()).pauses(task)
        return stored.entry.counts if stored else {}

    async def count_pause(self, task: str, ordinal: int, count: int) -> None:
        """Write down how often a guarded call has paused."""
        await (await self._engine()).count_pause(task, ordinal, count)

    def _keep(
        self, owner: Owner, requirement: Requirement, session: Session, writes: int
    ) -> AuthContext:
        context = self._for_tool(requirement, session)
        # Read before somebody wrote: perhaps old already.
        if self._cache_ttl_s and writes == self._writes and not session.needs_consent:
            mine = self._cache.setdefault(owner, {})
            mine[requirement] = _Cached(
                time.monotonic() + self._cache_ttl_s,
                advisory_at(session, session.auth_context()),
                context,
            )
            while len(self._cache) > MAX_CACHED_OWNERS:
                self._cache.popitem(last=False)
        return context

    def _forget(self, owner: Owner) -> None:
        self._writes += 1
        self._cache.pop(owner, None)

    def _for_tool(self, requirement: Requirement, session: Session) -> AuthContext:
        """Return what a tool gets: without what renews the grant."""
        context = session.auth_context()
        update: dict[str, Any] = dict.fromkeys(
            {"refresh_token", "id_token"} & type(context).model_fields.keys()
        )
        if not requirement.detail:
            update["detail"] = None
        update["scopes"] = list(session.scopes)
        copy = context.model_copy(update=update)
        provider = requirement.provider
        copy._provider = provider  # noqa: SLF001 - of our own base class
        copy._env_keys = self._registry.environment_keys(provider)  # noqa: SLF001
        return copy

    # ------------------------------------------------------- behind the FutureStore

    def find_future(self, uid: str) -> FutureData | None:
        """Return an attempt as its handler sees it."""
        if self._opened is None and self._storage == "memory://":
            return None
        stored = LOOP.run_sync(self.call(lambda e: e.attempts.find(uid)))
        if stored is None:
            return None
        attempt = stored.entry
        return FutureData(uid, dict(attempt.data), tuple(attempt.scopes))

    def resolve_future(self, uid: str, value: Any) -> bool:
        """Keep an answer that came outside a callback."""
        if self._opened is None and self._storage == "memory://":
            return False
        return LOOP.run_sync(self.call(lambda e: e.attempts.resolve(uid, value)))


@dataclass(slots=True)
class _GateNode:
    """The gate as a node of a hand-built graph: routes with one `Send` per call."""

    gate: Gate
    builder: Any
    name: str
    run: str
    then: str
    messages_key: str

    def check(self, state: Any, config: RunnableConfig) -> Any:
        return self._route(state, self.gate.check(self._messages(state), config))

    async def acheck(self, state: Any, config: RunnableConfig) -> Any:
        errors = await self.gate.acheck(self._messages(state), config)
        return self._route(state, errors)

    def _messages(self, state: Any) -> list[Any]:
        if (self.name, self.then) in self.builder.edges:
            raise ConfigurationError(
                f"remove add_edge({self.name!r}, {self.then!r}): add_tool_node made the "
                "edges behind the gate, and this one would not wait for the tools"
            )
        if isinstance(state, Mapping):
            return list(state[self.messages_key])
        return list(getattr(state, self.messages_key))

    def _route(self, state: Any, errors: list[Any]) -> Any:
        from langgraph.types import Command, Send

        from ._task import open_calls

        calls = open_calls([*self._messages(state), *errors])
        sends = [
            # With the state itself, so that InjectedState keeps its type.
            Send(
                self.run,
                {
                    "__type": "tool_call_with_context",
                    "tool_call": {**call, "type": "tool_call"},
                    "state": state,
                },
            )
            for call in calls
        ]
        return Command(
            update={self.messages_key: errors} if errors else None,
            goto=sends or self.then,
        )


async def _key_file() -> KeyRing:
    from platformdirs import user_config_path

    path = user_config_path("pocket-auth") / "keys"
    return await asyncio.to_thread(KeyRing.file, path)


def _plain(provider: Any) -> str:
    return str(getattr(provider, "value", provider))


def _owner(thread_id: str, owner: OwnerLike) -> Owner:
    return Owner("thread", thread_id) if owner is None else owner_of(owner)
