"""`PocketAuth`: wires the parts; the object that users see."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
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
from ._resume import PendingAuthorization
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

    from ._autoresume import Headers, OnResult
    from ._events import Subscriber
    from ._graph import GateTasks
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
        interactive: `False`: never ask; what needs consent fails at once. One run
            says otherwise with `configurable["pocket_auth_interactive"]`.
        keys: `"id:key,..."`, the first seals; default `POCKET_AUTH_KEYS`, else a
            key file in the user's config directory.
        settings_file: A TOML file with the same settings as the environment.
        future_ttl: How long a connect link lives.
        decline_cooldown: How long a refusal holds in its conversation: the model is
            told so, and the person is not asked for the same again.
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
        decline_cooldown: timedelta = timedelta(minutes=1),
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
            decline_cooldown=decline_cooldown,
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
        if provider is None and (scopes or handler or inject or profile != "default"):
            raise ValueError(
                "scopes=, handler=, profile= and inject= need provider=; an "
                "annotated tool says them in InjectedAuth(...)"
            )
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

        from ._graph import GateNode, guard_others

        guarded, gate, run = self.wrap(list(tools)), self._gate(tools), f"{name}_run"
        if not all(map(is_guarded, guarded)):
            guard_others(tool_node_kwargs, self._service)
        node = GateNode(
            gate, builder, name=name, tools=run, then=then, messages_key=messages_key
        )
        builder.add_node(name, node.runnable(), destinations=(run, then))
        tool_node = ToolNode(guarded, messages_key=messages_key, **tool_node_kwargs)
        builder.add_node(run, tool_node)
        builder.add_edge(run, then)

    def gate(self, tools: Sequence[BaseTool]) -> GateTasks:
        """
        Return the gate for the functional API, where each tool call is a task.

        ```python
        gate = pocket.gate(tools)
        refused = await gate.acheck(messages)  # in an entrypoint; sync: gate.check
        ```
        One pause for all that the calls of the last message need; an error result for
        each that must not be run, which goes to the model as it is.

        Args:
            tools: All of the agent's; the tasks run those of `pocket.wrap(tools)`.
        """
        from ._graph import GateTasks

        return GateTasks(self._gate(tools))

    def _gate(self, tools: Sequence[BaseTool]) -> Gate:
        guarded = filter(is_guarded, self.wrap(list(tools)))
        needs = {tool.name: guarded_needs(tool).requirements for tool in guarded}
        return Gate(self._service, lambda name: needs.get(name, ()))

    # ------------------------------------------------------------ what happens, waiting

    def on_event(self, callback: Subscriber) -> Callable[[], None]:
        """
        Call *callback* with an `Event` whenever something happens to a connection.

        A coroutine function runs on the loop this is called on, any other callback in
        a thread of its own; what it raises is logged by name and stops nothing. Told
        is what happens in this process.

        Returns:
            A function that ends the subscription.
        """
        return self._service.events.subscribe(callback)

    def auto_resume(
        self,
        graph: Any,
        *,
        on_result: OnResult | None = None,
        headers: Headers | None = None,
        patience: timedelta = timedelta(minutes=10),
    ) -> Callable[[], None]:
        """
        Continue paused runs of *graph* by themselves.

        As soon as everything that a pause waits for is final, agreed to or refused,
        the run goes on, once, in the process that served the callback; `on_event`
        tells `resumed`, `superseded` or `not_resumed`. It acts for the owner that it
        paused for, with the `configurable` it had, and, where it paused in this
        process, with its run-time context. A link that ran out continues nothing.

        Args:
            graph: A compiled root graph with a checkpointer, or the client of
                `langgraph_sdk` for threads of a LangGraph Server. Called inside an
                event loop, the graph or the client is used on that loop, otherwise a
                graph is run in a thread.
            on_result: Called with what the run returned (of a server: the run that
                was created) and its config, where `on_event` would call it.
            headers: For a client: the headers of requests on behalf of an owner.
            patience: How long to wait while other parts of the run are busy.

        Returns:
            A function that ends it.
        """
        from ._autoresume import LocalGraph, Resumer, Server

        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            loop = None
        service = self._service
        target: LocalGraph | Server
        if hasattr(graph, "threads") and hasattr(graph, "runs"):
            target = Server(graph, headers, loop)
        elif getattr(graph, "checkpointer", None):
            target = LocalGraph(graph, service.owners, loop)
        else:
            raise ConfigurationError(
                "auto_resume takes a compiled graph with a checkpointer, or the client "
                "of langgraph_sdk; a graph without one cannot be resumed"
            )
        resumer = Resumer(service, target, on_result, loop, patience)
        service.ended.append(resumer)

        def stop() -> None:
            with suppress(ValueError):
                service.ended.remove(resumer)

        return stop

    async def wait_connected(
        self,
        provider: str,
        *,
        scopes: Iterable[str] = (),
        handler: str | None = None,
        profile: str = "default",
        owner: OwnerLike = None,
        timeout: float = 300.0,  # noqa: ASYNC109 - as in `authenticate`, in seconds
    ) -> AuthContext:
        """
        Wait until there is a connection, whoever asks for it; return its context.

        Raises:
            AuthorizationRequired: None came within *timeout* seconds.
            AuthorizationRefused: The person said no meanwhile.
            ScopeWithheld: The person agreed, but to less.
        """
        need = InjectedAuth(provider, scopes=scopes, handler=handler, profile=profile)
        who, asked = self._service.owners.outside_runs(owner), need.requirement
        writes = self._service.writes
        session = await self._service.ask(
            lambda e: e.wait_connected(who, asked, timeout_s=timeout)
        )
        return self._service.keep(who, asked, session.entry, writes)

    async def connect(
        self,
        provider: str | PendingAuthorization,
        *,
        scopes: Iterable[str] = (),
        handler: str | None = None,
        profile: str = "default",
        owner: OwnerLike = None,
        timeout: float = 300.0,  # noqa: ASYNC109 - as in `authenticate`, in seconds
        paste: bool = False,
    ) -> AuthContext:
        """
        Ask the person for a connection ahead of time; return its context.

        In a notebook the link is shown as a card, elsewhere it is printed. Nothing is
        shown when there is a connection already.

        Args:
            provider: The provider's id, or what a paused run waits for.
            scopes: What is needed there.
            handler: Name of a handler; by default the provider's first.
            profile: Which account of the owner.
            owner: Whose; by default the one that `PocketAuth(owner=)` names, or
                the person of this machine.
            timeout: How many seconds to wait; pasting waits for the person.
            paste: For kernels and machines whose 127.0.0.1 the person's browser does
                not reach: the provider's page is shown, the browser ends at an address
                that does not load, and that address is asked for, unseen. Only an
                answer to this very question is taken.

        Raises:
            AuthorizationRequired: The person did not finish in time.
            AuthorizationRefused: The person said no.
            ScopeWithheld: The person agreed, but to less.
            CallbackRefused: What was pasted does not answer this question.
            ProviderError: The exchange failed; call again.
        """
        from .notebook import Connecting

        if isinstance(provider, PendingAuthorization):
            pending, ticket = provider, provider.url.rpartition("/")[2]
            _, key = await self._service.ask(lambda e: e.attempts.ticket(ticket))
            who, scopes, handler = key.owner, pending.scopes, pending.handler
            provider, profile = pending.provider, pending.profile
        else:
            who = self._service.owners.outside_runs(owner)
        need = InjectedAuth(provider, scopes=scopes, handler=handler, profile=profile)
        asked = need.requirement
        connecting = Connecting(self._service, who, asked)
        await connecting.run(paste=paste, timeout_s=timeout)
        return await self.wait_connected(
            provider,
            scopes=asked.scopes,
            handler=handler,
            profile=profile,
            owner=who,
            timeout=0,
        )

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
            self._server = BackgroundServer(
                self.base_url, routes, LOOP.generation, self._service.store
            )
        await self._server.start()


def _plain(provider: Any) -> str:
    return str(getattr(provider, "value", provider))


def _owner(thread_id: str, owner: OwnerLike) -> Owner:
    return Owner("thread", thread_id) if owner is None else owner_of(owner)
