"""Connect links and callbacks: parse strictly, ask the engine, show a page."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from fastapi import APIRouter, FastAPI, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from .._errors import (
    CallbackRefused,
    ConfigurationError,
    FutureNotFound,
    PocketAuthError,
    ProviderError,
    ProviderUnavailable,
    StorageError,
)
from .._futures import FutureData, Serving, serving_context
from .._http import LOOPBACK_HOSTS
from .._service import Service
from ._pages import SECURITY_HEADERS, Outcome, page

logger = logging.getLogger(__name__)

MAX_QUERY_BYTES = 8192
_METHODS = ["GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE"]
_STATUS = {
    "unknown": 404,
    "expired": 410,
    "replayed": 409,
    "mismatch": 403,
    "malformed": 400,
}


def make_router(
    service: Service, routers: Sequence[APIRouter] = (), app_name: str | None = None
) -> APIRouter:
    """Return all routes, with those of own handlers first."""
    router = APIRouter(include_in_schema=False)
    desk = _Desk(service, app_name)
    handlers = service.registry.own
    for handler in [h for h in handlers if h.router is not None]:
        _add_foreign(router, handler.router, desk, {handler.name})
    for foreign in routers:
        _add_foreign(router, foreign, desk, {h.name for h in handlers if not h.router})

    @router.get("/connect/{ticket}")
    async def connect(request: Request, ticket: str) -> Response:
        """Show who asks for what. Changes nothing, whoever fetches it."""
        return await desk.show(request, ticket)

    @router.post("/connect/{ticket}")
    async def start(request: Request, ticket: str) -> Response:
        """Start an attempt and send the person to the provider."""
        return await desk.start(request, ticket)

    # All methods, so that none is answered by a page, or logged, without our care.
    @router.api_route("/auth/{provider}/{method}/callback", methods=_METHODS)
    async def callback(request: Request, provider: str, method: str) -> Response:
        """Take the provider's answer and exchange it at once."""
        return await desk.callback(request, provider, method)

    return router


class _Desk:
    """What the routes do."""

    def __init__(self, service: Service, app_name: str | None) -> None:
        self._base_url, self._app_name = service.base_url, app_name
        self._label = service.registry.label
        self.ask = service.ask
        self._origin = "{0.scheme}://{0.netloc}".format(urlsplit(service.base_url))

    async def show(self, request: Request, ticket: str) -> Response:
        """Answer GET of a connect link, before and after the person acted."""
        if (refused := self.foreign_host(request)) is not None:
            return refused
        try:
            stored, key = await self.ask(lambda e: e.attempts.ticket(ticket))
        except PocketAuthError as error:
            return self.failed(error)
        future = stored.entry
        label = self._label(key.provider)
        if future.status == "done" and future.withheld:
            left_out = future.withheld
            return page(Outcome.WITHHELD, status=200, provider=label, scopes=left_out)
        if future.status == "done":
            return page(Outcome.CONNECTED, status=200, provider=label)
        if future.status == "denied":
            button = f"Connect {label} after all"
            return page(Outcome.DECLINED, status=200, provider=label, button=button)
        return page(
            Outcome.PENDING,
            status=200,
            provider=label,
            scopes=future.scopes,
            tools=future.tools,
            owner=None if key.owner.id == "default" else key.owner.id,
            app_name=self._app_name,
        )

    async def start(self, request: Request, ticket: str) -> Response:
        """Answer POST of a connect link."""
        if (refused := self.foreign_host(request)) is not None:
            return refused
        if not self._same_origin(request):
            return _refusal("mismatch")
        try:
            url = await self.ask(lambda e: e.attempts.begin(ticket))
            _, key = await self.ask(lambda e: e.attempts.ticket(ticket))
        except PocketAuthError as error:
            return self.failed(error)
        label = self._label(key.provider)
        return page(Outcome.LEAVING, status=200, provider=label, next_url=url)

    async def callback(self, request: Request, provider: str, method: str) -> Response:
        """Answer a provider's redirect (RFC 6749 section 4.1.2)."""
        query = _query(request.scope)  # first: it hides the query from access logs
        refused = self.foreign_host(request) or _not_a_visit(request)
        if refused is not None:
            return refused
        if query is None or not query.get("state"):
            return _refusal("malformed")
        return await self.answer(
            query["state"],
            handler_name=f"{provider}-{method}",
            value=query.get("code"),
            error=query.get("error"),
            issuer=query.get("iss"),
        )

    async def answer(self, uid: str, **answer: Any) -> Response:
        """Carry out an answer; on success leave the URL that holds the code."""
        try:
            result = await self.ask(lambda e: e.attempts.answer(uid, **answer))
        except PocketAuthError as error:
            return self.failed(error)
        if result.ticket is None:
            return _refusal("expired")
        # 303: the code leaves the address bar and the history.
        return RedirectResponse(
            f"{self._base_url}/connect/{result.ticket}",
            status_code=303,
            headers=dict(SECURITY_HEADERS),
        )

    def failed(self, error: PocketAuthError) -> HTMLResponse:
        """Return the page for an error; its text is for the log only."""
        if isinstance(error, CallbackRefused):
            return _refusal(error.reason)
        provider = getattr(error, "provider", None)
        label = self._label(provider) if provider else None
        logger.warning("a person could not be connected: %s", error)
        if isinstance(error, (ProviderUnavailable, StorageError)):
            return page(Outcome.UNAVAILABLE, status=503, provider=label, button="")
        if isinstance(error, (ProviderError, ConfigurationError)):
            detail = (
                "The operator of this app has to look at its settings."
                if isinstance(error, ConfigurationError)
                else "Open the link in the chat again to retry."
            )
            return page(
                Outcome.FAILED, status=502, provider=label, detail=detail, button=""
            )
        return page(Outcome.FAILED, status=502, provider=label, button="")

    def foreign_host(self, request: Request) -> Response | None:
        """Refuse names that are not ours: DNS rebinding comes with its own."""
        try:
            host = urlsplit(f"//{request.headers.get('host', '')}").hostname
        except ValueError:
            host = None
        return None if host in LOOPBACK_HOSTS else _refusal("mismatch", status=421)

    def _same_origin(self, request: Request) -> bool:
        # Browsers since 2023 always send it; `same-site` is another port of ours.
        if (site := request.headers.get("sec-fetch-site")) is not None:
            return site == "same-origin"
        return request.headers.get("origin") in {None, self._origin}


def _refusal(reason: str, *, status: int | None = None) -> HTMLResponse:
    return page(Outcome(reason), status=status or _STATUS[reason])


def _not_a_visit(request: Request) -> Response | None:
    """Answer what is not a person's browser going there, and change nothing."""
    if request.method != "GET":
        headers = {**SECURITY_HEADERS, "Allow": "GET"}
        return Response(status_code=405, headers=headers)
    return _prefetched(request)


def _prefetched(request: Request) -> Response | None:
    purposes = (request.headers.get(name, "") for name in ("sec-purpose", "purpose"))
    if any("prefetch" in purpose for purpose in purposes):
        return Response(status_code=204, headers=dict(SECURITY_HEADERS))
    return None


def _query(scope: Scope) -> dict[str, str] | None:
    """
    Return the parameters; `None` for what no honest provider sends.

    The scope loses its query, so that access logs that read it afterwards do too.
    """
    raw: bytes = scope["query_string"]
    scope["query_string"] = b""
    if len(raw) > MAX_QUERY_BYTES:
        return None
    try:
        pairs = parse_qsl(
            raw.decode("ascii"),
            keep_blank_values=True,
            errors="strict",
            max_num_fields=50,
        )
    except ValueError:
        return None
    query = dict(pairs)
    if len(query) != len(pairs) or any("\0" in v for v in query.values()):
        return None
    return query


# --------------------------------------------------------- routes of third parties


def _add_foreign(
    router: APIRouter, foreign: APIRouter, desk: _Desk, handlers: Iterable[str]
) -> None:
    """Serve a third party's router below /auth, each answer passing our checks."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.include_router(foreign, prefix="/auth")
    for route in app.routes:
        if isinstance(route, Route):
            endpoint = _Foreign(app, desk, frozenset(handlers))
            methods = sorted(route.methods or ())
            router.routes.append(
                Route(route.path, endpoint, methods=methods, include_in_schema=False)
            )


class _Foreign:
    """
    Runs a third party's endpoint; what it resolves is exchanged afterwards.

    A refusal in the query is answered before the endpoint, whose `code: str` would
    make a 422 of it. A failed exchange replaces the endpoint's page.
    """

    def __init__(self, app: ASGIApp, desk: _Desk, handlers: frozenset[str]) -> None:
        self._app, self._desk, self._handlers = app, desk, handlers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        inner, query = dict(scope), _query(scope)
        request = Request(scope, receive)
        response = self._desk.foreign_host(request) or _prefetched(request)
        if response is None and query is None:
            response = _refusal("malformed")
        if response is None:
            try:
                response = await self._serve(query or {}, inner, receive)
            except PocketAuthError as error:
                response = self._desk.failed(error)
        await response(scope, receive, send)

    async def _serve(
        self, query: dict[str, str], inner: Scope, receive: Receive
    ) -> Response:
        uid, answer = query.get("state", ""), {"issuer": query.get("iss")}
        attempt = await self._ours(uid) if uid else None
        if attempt is not None and "error" in query:
            answer["error"] = query["error"]
            return await self._desk.answer(uid, handler_name=None, **answer)
        serving = Serving(bool(uid), attempt)
        response = await self._page(serving, inner, receive)
        for resolved, value in serving.resolved:
            if resolved != uid:
                await self._ours(resolved)
            ours = await self._desk.answer(
                resolved, handler_name=None, value=value, **answer
            )
            if ours.status_code >= 400:  # noqa: PLR2004
                return ours
        headers = {k: v for k, v in SECURITY_HEADERS.items() if "Policy" not in k}
        response.headers.update(headers)
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    async def _ours(self, uid: str) -> FutureData | None:
        """Return the attempt of a uid, if it is one that this route may answer."""
        stored = await self._desk.ask(lambda e: e.attempts.find(uid))
        if stored is None:
            return None
        if stored.entry.handler not in self._handlers:
            raise CallbackRefused("mismatch")
        return FutureData(uid, dict(stored.entry.data), tuple(stored.entry.scopes))

    async def _page(self, serving: Serving, inner: Scope, receive: Receive) -> Response:
        try:
            with serving_context(serving):
                response = await _captured(self._app, inner, receive)
        except FutureNotFound:
            return _refusal("unknown")
        except Exception as error:  # noqa: BLE001 - whatever an endpoint raises
            # Not its text: it may hold the code.
            logger.warning("a callback endpoint failed: %s", type(error).__name__)
            serving.resolved.clear()
            return page(Outcome.FAILED, status=502, button="")
        # FastAPI's own answer to a missing parameter would repeat the others.
        return _refusal("malformed") if response.status_code == 422 else response  # noqa: PLR2004


async def _captured(app: ASGIApp, scope: Scope, receive: Receive) -> Response:
    """Run an app and keep its answer instead of sending it."""
    response, body = Response(), bytearray()

    async def keep(message: Any) -> None:
        if message["type"] == "http.response.start":
            response.status_code = message["status"]
            response.raw_headers = [
                (k, v) for k, v in message.get("headers", ()) if k != b"content-length"
            ]
        elif message["type"] == "http.response.body":
            body.extend(message.get("body", b""))

    # The mounting app's own routing must not show through.
    for name in ("app", "router", "endpoint", "path_params", "route"):
        scope.pop(name, None)
    await app(scope, receive, keep)
    response.body = bytes(body)
    response.headers["content-length"] = str(len(body))
    return response
