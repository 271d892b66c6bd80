"""A server for notebooks and scripts: this machine only, on the background loop."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from .._errors import CallbackServerError

if TYPE_CHECKING:
    import uvicorn
    from fastapi import APIRouter
    from starlette.types import ASGIApp, Receive, Scope, Send

STOP_LIMIT_S = 3.0


class BackgroundServer:
    """Serves the routes at the host and port of `base_url`, until stopped."""

    def __init__(self, base_url: str, routes: APIRouter, generation: int) -> None:
        self._base_url, self._routes, self.generation = base_url, routes, generation
        self._server: uvicorn.Server | None = None
        self._task: asyncio.Task[None] | None = None
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
            if self._task is not None and not self._task.done():
                return
            await self._start()

    async def _start(self) -> None:
        import uvicorn
        from fastapi import FastAPI

        app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
        app.include_router(self._routes)
        listener = self._bind()
        config = uvicorn.Config(
            _Unlogged(app),
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=int(STOP_LIMIT_S),
        )
        server = self._server = uvicorn.Server(config)
        # Signals belong to the app.
        self._task = asyncio.ensure_future(server._serve([listener]))  # noqa: SLF001
        while not server.started and not self._task.done():  # noqa: ASYNC110
            await asyncio.sleep(0.001)  # uvicorn says so in an attribute only
        if self._task.done():
            listener.close()
            raise CallbackServerError(
                f"the callback server did not start at {self._base_url}"
            ) from self._task.exception()

    def _bind(self) -> socket.socket:
        parts = urlsplit(self._base_url)
        host = "::1" if parts.hostname == "::1" else "127.0.0.1"
        port = parts.port or (443 if parts.scheme == "https" else 80)
        family = socket.AF_INET6 if host == "::1" else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(128)
        except OSError as error:
            listener.close()
            raise CallbackServerError(
                f"the callback server cannot listen at {host}:{port} "
                f"({error.strerror}): end what uses that port, set base_url "
                "(POCKET_AUTH_BASE_URL) to another that is registered as redirect "
                "URI, or mount pocket.router in your own app"
            ) from error
        listener.setblocking(False)
        return listener

    async def stop(self) -> None:
        """Stop listening; requests in hand get a moment to end."""
        server, task = self._server, self._task
        self._server = self._task = None
        if server is None or task is None:
            return
        server.should_exit = True
        try:
            async with asyncio.timeout(2 * STOP_LIMIT_S):
                await task
        except TimeoutError:
            task.cancel()


class _Unlogged:
    """Hides the query, and with it the code, from whatever logs requests later."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        inner = dict(scope)
        if "query_string" in scope:
            scope["query_string"] = b""
        await self._app(inner, receive, send)
