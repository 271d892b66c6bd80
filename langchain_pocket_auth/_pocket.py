"""`PocketAuth`: wires the parts; the object that users see."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from langchain_core.tools import BaseTool

from ._catalog import Catalog
from ._errors import CallbackServerError, ConfigurationError
from ._futures import register_backing
from ._gate import Gate
from ._guard import ToolGuard
from ._loop import LOOP
from ._owner import OwnerLike, OwnerResolver, OwnerSource
from ._registry import Registry
from ._rewrap import Rewrapped, rewrap
from ._rows import Provider
from ._seal import KeyRing, KeySource
from ._service import Service, Storage
from ._sessions import Sessions
from ._site import AccountMatcher, VerifyUser
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


class PocketAuth(Sessions):
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
        base_url: Where connect links and callbacks live, for the person of this
            machine; default `http://127.0.0.1:8711`.
        public_url: Where they live for everybody: https, the address that browsers
            see. Mount `router` there. Needs *verify_user* or *confirm*.
        verify_user: A FastAPI dependency that returns who is signed in to your app,
            as an id or an `Owner`; `None`: nobody. Only the person that a link is
            for can use it.
        confirm: `"code"`, where nobody signs in (a chat, a terminal): whoever
            consented sees a code and gives it back in the chat.
        account_matcher: Called with the owner and the new context, whose `account`
            the provider told; `False` gives the grant back, and so does an exception
            or no answer for 10 s. A coroutine function runs on the library's loop,
            any other in a thread.
        interactive: `False`: never ask; what needs consent fails at once. One run
            says otherwise with `configurable["pocket_auth_interactive"]`.
        keys: `"id:key,..."`, the first seals; the `Path` of a key file; or a function,
            sync or async, that fetches them (from a KMS, say) when the store is opened
            and returns that text or 32 bytes by id. Default: `POCKET_AUTH_KEYS` or
            `POCKET_AUTH_KEYS_FILE`, else a key file in the user's config directory.
        settings_file: A TOML file with the same settings as the environment.
        future_ttl: How long a connect link lives.
        decline_cooldown: How long a refusal holds in its conversation: the model is
            told so, and the person is not asked for the same again.
        session_cache_ttl: How long a valid session is answered from memory; by
            default 5 s, with *public_url* not at all.
        session_idle_ttl: After how long without use a connection ends, as if it were
            disconnected: a day or more, to the day; `None`: never.
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
        public_url: str | None = None,
        verify_user: VerifyUser | None = None,
        confirm: Literal["code"] | None = None,
        account_matcher: AccountMatcher | None = None,
        interactive: bool = True,
        keys: str | KeySource | None = None,
        settings_file: str | Path | None = None,
        future_ttl: timedelta = timedelta(days=7),
        decline_cooldown: timedelta = timedelta(minutes=1),
        session_cache_ttl: timedelta | None = None,
        session_idle_ttl: timedelta | None = None,
        app_name: str | None = None,
    ) -> None:
        from ._settings import (
            check_public,
            client_of,
            read_settings,
            site_of,
        )

        if session_idle_ttl is not None and session_idle_ttl < timedelta(days=1):
            raise ConfigurationError("session_idle_ttl is one day at least, or None")
        settings = read_settings(settings_file)
        if base_url is None and public_url is None:
            base_url, public_url = settings.base_url, settings.public_url
        site = site_of(
            base_url,
            public_url,
            verify_user=verify_user,
            confirm=confirm,
            account_matcher=account_matcher,
        )
        self.base_url = site.url
        storage, keys = storage or settings.storage, keys or settings.key_source()
        if site.public:
            check_public(storage, has_keys=bool(keys))
        registered = {str(k): client_of(str(k), v) for k, v in (clients or {}).items()}
        registry = Registry(
            Catalog(providers),
            handlers,
            base_url=self.base_url,
            clients={**settings.clients, **registered},
            app_name=app_name,
        )
        self._service = Service(
            storage,
            # Parsed now, so that a malformed key is told before any link.
            KeyRing.parse(keys) if isinstance(keys, str) else keys,
            registry,
            owners=OwnerSource(owner, loopback=not site.asks_who),
            site=site,
            listen=self._listen,
            interactive=interactive,
            future_ttl=future_ttl,
            decline_cooldown=decline_cooldown,
            session_idle_ttl=session_idle_ttl,
            # Public: of several replicas, so that what one deletes is gone everywhere.
            cache_ttl=timedelta(seconds=0 if site.public else 5)
            if session_cache_ttl is None
            else session_cache_ttl,
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

    # ------------------------------------------------------------ what happens

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
            CallbackServerError: Its port is taken, or your app has to serve.
        """
        if self._service.site.public:
            raise CallbackServerError(
                f"{self.base_url} is for everybody, and the background server for "
                "this machine alone: mount pocket.router in your own app"
            )
        await LOOP.run(self._listen())

    async def housekeeping(self) -> dict[str, int]:
        """
        Do now what is done once a minute in the background anyhow.

        For cron jobs, where nothing else keeps running. Each call does a bounded
        part: call it until all counts are 0.

        Returns:
            How many of each: `given_back`, grants that their providers took; `held`,
            grants that waited to be linked for too long; `idle`, connections ended
            because nobody used them; `expired`, records erased; `used`, connections
            whose last use was written down.

        Raises:
            StorageUnavailable: The store does not answer.
        """
        return await self._service.ask(lambda e: e.housekeeping.turn())

    async def rewrap(self) -> Rewrapped:
        """
        Seal everything that is stored with the first of the keys.

        The last step of a rotation, when every replica has the new key in front.
        Nothing stands still meanwhile; a run that was ended goes on with the next one.

        Returns:
            How many records are under which key. One that `after` does not name can
            be dropped.

        Raises:
            StorageUnavailable: The store does not answer; call again.
        """
        return await self._service.ask(lambda e: rewrap(e.vault))

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
        # The app serves it, here or elsewhere: workers give links out, too.
        if self._router is not None or self._service.site.public:
            return
        from .server import BackgroundServer, make_router

        if self._server is None or self._server.generation != LOOP.generation:
            routes = make_router(self._service, self._routers, self._app_name)
            self._server = BackgroundServer(
                self.base_url, routes, LOOP.generation, self._service.store
            )
        await self._server.start()
