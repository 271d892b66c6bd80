"""`PocketAuth`: wires the parts; the object that users see."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from langchain_core.tools import BaseTool

from ._catalog import Catalog, Provider
from ._errors import ConfigurationError
from ._futures import register_backing
from ._gate import Gate
from ._guard import ToolGuard
from ._loop import LOOP
from ._models import (
    AuthContext,
    AuthenticateRequest,
    AuthState,
    Owner,
    Requirement,
)
from ._owner import OwnerLike, OwnerResolver, OwnerSource, owner_of
from ._registry import Registry, provider_id
from ._seal import KeyRing
from ._service import Service, Storage
from ._tools import (
    Inject,
    InjectedAuth,
    guarded_needs,
    is_guarded,
    needs_of,
)
from ._wrapping import wrap_tool
from .handlers import AuthHandlerInterface

if TYPE_CHECKING:
    from fastapi import APIRouter
    from langgraph.graph import StateGraph

    from ._middleware import PocketAuthMiddleware
    from ._settings import ClientLike
    from .server import BackgroundServer


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
        written = keys or (settings.keys.get_secret_value() if settings.keys else None)
        registered = {str(k): client_of(str(k), v) for k, v in (clients or {}).items()}
        registry = Registry(
            Catalog(providers),
            handlers,
            base_url=self.base_url,
            clients={**settings.clients, **registered},
        )
        self._service = Service(
            storage or settings.storage,
            # Parsed now, so that a malformed key is told before any link.
            KeyRing.parse(written) if written else None,
            registry,
            owners=OwnerSource(owner, loopback=True),
            base_url=self.base_url,
            listen=self._listen,
            interactive=interactive,
            future_ttl=future_ttl,
            cache_ttl=session_cache_ttl,
        )
        self._guard = ToolGuard(self._service)
        self._app_name, self._routers = app_name, tuple(routers)
        self._router: APIRouter | None = None
        self._server: BackgroundServer | None = None
        register_backing(self._service)

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
        return PocketAuthMiddleware(self._service, self._guard, tools)

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

        from ._graph import GateNode, add_owner

        guarded = self.wrap(list(tools))
        needs = {t.name: guarded_needs(t) for t in guarded if is_guarded(t)}
        gate = Gate(
            self._service, lambda n: needs[n].requirements if n in needs else ()
        )
        run = f"{name}_run"
        if len(needs) < len(guarded):
            add_owner(tool_node_kwargs, self._service.owners)
        node = GateNode(
            gate, builder, name=name, tools=run, then=then, messages_key=messages_key
        )
        builder.add_node(name, node.runnable(), destinations=(run, then))
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
            return self._service.registry.named(name)
        if auth_provider is not None:
            return self._service.registry.of(_plain(auth_provider))[0]
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
        if self._service.peek_request(who, asked, auth_req) is not None:
            return AuthState.SKIP_AUTH
        writes = self._service.writes
        standing = await self._service.ask(lambda e: e.standing(who, asked, auth_req))
        if standing.state is AuthState.SKIP_AUTH and standing.session:
            self._service.keep(who, asked, standing.session.entry, writes)
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
        consent = await self._service.ask(
            lambda e: e.prepare(who, asked, request=auth_req)
        )
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
        context = self._service.peek_request(who, asked, auth_req)
        if context is not None:
            return context
        writes = self._service.writes
        session = await self._service.ask(
            lambda e: e.authenticate(who, asked, request=auth_req, timeout_s=timeout)
        )
        return self._service.keep(who, asked, session.entry, writes)

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
        for key, stored, _ in await self._service.ask(lambda e: e.sessions(who)):
            if (key.provider, key.profile) == (provider, profile):
                return self._service.for_tool(Requirement(provider), stored.entry)
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
        return [
            {
                "provider": key.provider,
                "profile": key.profile,
                "scope": list(stored.entry.scopes),
                "state": state,
            }
            for key, stored, state in await self._service.ask(lambda e: e.sessions(who))
            if wanted in {None, key.provider}
        ]

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
        return await self._service.ask(
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
    def router(self) -> APIRouter:
        """
        The routes, to mount: `app.include_router(pocket.router)`.

        Whoever asks for it serves it: no background server is started then. The
        app has to be reachable at `base_url`.
        """
        if self._router is None:
            from .server import make_router

            self._router = make_router(self._service, self._routers, self._app_name)
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
        server, self._server = self._server, None
        if server is not None:
            await server.stop()
        await self._service.close()

    async def _listen(self) -> None:
        if self._router is not None:
            return  # the app serves it
        from .server import BackgroundServer, make_router

        if self._server is None or self._server.generation != LOOP.generation:
            routes = make_router(self._service, self._routers, self._app_name)
            self._server = BackgroundServer(self.base_url, routes, LOOP.generation)
        await self._server.start()


def _plain(provider: Any) -> str:
    return str(getattr(provider, "value", provider))


def _owner(thread_id: str, owner: OwnerLike) -> Owner:
    return Owner("thread", thread_id) if owner is None else owner_of(owner)
