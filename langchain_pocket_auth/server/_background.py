"""A server for notebooks and scripts: this machine only, on the background loop."""

from __future__ import annotations

import asyncio
import os
import socket
from itertools import count
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from weakref import WeakSet, WeakValueDictionary

from starlette.requests import Request
from starlette.responses import Response

from .._errors import CallbackServerError
from ._pages import SECURITY_HEADERS

if TYPE_CHECKING:
    import uvicorn
    from fastapi import APIRouter
    from starlette.types import ASGIApp, Receive, Scope, Send

STOP_LIMIT_S = 3.0
_listening: WeakSet[socket.socket] = WeakSet()
_ages = count()
_latest: WeakValueDictionary[str, BackgroundServer] = WeakValueDictionary()


def _let_go() -> None:
    # What a forked child inherits and does not serve would keep the port.
    for listener in list(_listening):
        listener.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


class BackgroundServer:
    """
    Serves the routes at the host and port of `base_url`, until stopped.

    A newer one of this process with the same *store* takes the port over: a notebook
    cell that makes a `PocketAuth` is run again. Links of the older one still work,
    because the store has them.

    Args:
        base_url: Where to listen.
        routes: What to serve.
        generation: The background loop's.
        store: What is equal for pockets of one store; `None`: shared with nobody.
    """

    def __init__(
        self, base_url: str, routes: APIRouter, generation: int, store: object
    ) -> None:
        self._base_url, self._routes, self.generation = base_url, routes, generation
        self._store, self._age = store, next(_ages)
        self._server: uvicorn.Server | None = None
        self._starting = asyncio.Lock()

    async def start(self) -> None:
        """
        Listen, if that is not so already.

        Raises:
            CallbackServerError: The port is taken. Never another port instead:
                redirect URIs are registered with this one, and whoever sits
                there would receive the codes.
        """
        async with self._starting:
            if self._is_serving:
                return
            other = _latest.get(self._base_url)
            if other and other._is_serving and self._shares_with(other):  # noqa: SLF001
                if other._age > self._age:  # noqa: SLF001 - of the same class
                    return  # it serves what we would
                await other.stop()
            self._server = await self._started()
            _latest[self._base_url] = self

    @property
    def _is_serving(self) -> bool:
        server = self._server
        return server is not None and all(s.is_serving() for s in server.servers)

    def _shares_with(self, other: BackgroundServer) -> bool:
        mine = (self.generation, self._store)
        return self._store is not None and mine == (other.generation, other._store)

    async def _started(self) -> uvicorn.Server:
        import uvicorn
        from fastapi import FastAPI

        app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
        app.include_router(self._routes)
        app.add_exception_handler(404, _no_page)
        app.add_exception_handler(405, _no_page)
        listener = self._bind()
        config = uvicorn.Config(
            _Unlogged(app),
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            date_header=False,
            proxy_headers=False,
        )
        config.load()
        server = uvicorn.Server(config)
        server.lifespan = config.lifespan_class(config)
        # Not `serve`: signals belong to the app, and its loop is for restarts.
        await server.startup(sockets=[listener])
        return server

    def _bind(self) -> socket.socket:
        parts = urlsplit(self._base_url)
        if parts.scheme == "https" or parts.path:
            raise CallbackServerError(
                f"the callback server speaks plain http at the root, and base_url is "
                f"{self._base_url}: mount pocket.router in your own app behind it"
            )
        host = "::1" if parts.hostname == "::1" else "127.0.0.1"
        port = parts.port or 80
        family = socket.AF_INET6 if host == "::1" else socket.AF_INET
        # Named, because asyncio sets TCP_NODELAY only then: without it 40 ms a click.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(128)
        except OSError as error:
            listener.close()
            raise CallbackServerError(
                f"the callback server cannot listen at {host}:{port} "
                f"({error.strerror}): end what uses that port (an older PocketAuth "
                "of this process: pocket.close()), set base_url "
                "(POCKET_AUTH_BASE_URL) to another that is registered as redirect "
                "URI, or mount pocket.router in your own app"
            ) from error
        listener.setblocking(False)
        _listening.add(listener)
        return listener

    async def stop(self) -> None:
        """Stop listening; requests in hand get a moment to end."""
        server, self._server = self._server, None
        if server is None:
            return
        for listener in server.servers:
            listener.close()
        state = server.server_state
        for connection in list(state.connections):
            connection.shutdown()  # when it has answered
        try:
            async with asyncio.timeout(STOP_LIMIT_S):
                while state.connections or state.tasks:  # noqa: ASYNC110
                    await asyncio.sleep(0.002)  # uvicorn tells nobody
        except TimeoutError:
            for task in state.tasks:
                task.cancel()


async def _no_page(_request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    return Response(status_code=status, headers=dict(SECURITY_HEADERS))


class _Unlogged:
    """Hides the query, and with it the code, from whatever logs requests later."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        inner = dict(scope)
        if "query_string" in scope:
            scope["query_string"] = b""
        await self._app(inner, receive, send)
