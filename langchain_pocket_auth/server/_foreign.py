"""Callback routes of third parties: run inside, behind all of our checks."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from .._errors import CallbackRefused, FutureNotFound, PocketAuthError
from .._futures import FutureData, Serving, serving_context
from .._site import Visitor
from ._captured import ROUTING, captured
from ._desk import Answer, Desk
from ._pages import SECURITY_HEADERS, Outcome, page
from ._refusals import prefetched, refusal
from ._requests import query_of

logger = logging.getLogger(__name__)


def foreign_routes(
    desk: Desk,
    foreign: APIRouter,
    handlers: Iterable[str],
    otherwise: ASGIApp,
    prefix: str,
) -> list[Route]:
    """
    Return routes that serve a third party's router below *prefix* and `/auth`.

    Args:
        desk: Takes the answers.
        foreign: The router.
        handlers: The handlers whose attempts it may answer.
        otherwise: Serves what the router does not.
        prefix: What stands before all paths.
    """
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.include_router(foreign, prefix="/auth")
    served = _Foreign(app, desk, frozenset(handlers), otherwise)
    # What it included itself may be hidden in there, so below its prefix we ask.
    nested = f"{foreign.prefix}/{{rest:path}}"
    paths = [r.path if isinstance(r, Route) else nested for r in foreign.routes]
    return [Route(f"{prefix}/auth{path}", served) for path in dict.fromkeys(paths)]


class _Foreign:
    """
    Runs a third party's endpoint; what it resolves is exchanged afterwards.

    A refusal in the query is answered before the endpoint, whose `code: str` would
    make a 422 of it. A failed exchange replaces the endpoint's page.
    """

    def __init__(
        self, app: FastAPI, desk: Desk, handlers: frozenset[str], otherwise: ASGIApp
    ) -> None:
        self._app, self._desk, self._handlers = app, desk, handlers
        self._otherwise = otherwise

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # As if nobody had mounted it: it knows neither the app nor its prefix.
        inner = {k: v for k, v in scope.items() if k not in {*ROUTING, "app"}}
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        path = path.removeprefix(self._desk.prefix)
        path = path[max(path.find("/auth/"), 0) :]  # it is mounted deeper
        inner |= {"path": path, "raw_path": path.encode(), "root_path": ""}
        if all(r.matches(dict(inner))[0] is not Match.FULL for r in self._app.routes):
            await self._otherwise(scope, receive, send)
            return
        request = Request(scope, receive)
        response = await self._desk.limited(self._answer(inner))(request)
        await response(scope, receive, send)

    def _answer(self, inner: Scope) -> Answer:
        async def answer(request: Request) -> Response:
            query = query_of(request.scope)
            refused = self._desk.foreign_host(request) or prefetched(request)
            if refused is not None:
                return refused
            if query is None:
                return refusal("malformed")
            try:
                visitor = await self._desk.whoever(request)
                return await self._serve(query, visitor, inner, request.receive)
            except PocketAuthError as error:
                return self._desk.failed(error)

        return answer

    async def _serve(
        self, query: dict[str, str], visitor: Visitor, inner: Scope, receive: Receive
    ) -> Response:
        uid, answer = query.get("state", ""), dict[str, Any](issuer=query.get("iss"))
        attempt = await self._ours(uid, visitor) if uid else None
        if attempt is not None and "error" in query:
            answer["error"] = query["error"]
            return await self._desk.answer(uid, visitor, callback=None, **answer)
        serving = Serving(bool(uid), attempt)
        response = await self._page(serving, inner, receive)
        for resolved, value in serving.resolved:
            if resolved != uid:
                await self._ours(resolved, visitor)
            answer |= {"value": value, "parameters": query}
            ours = await self._desk.answer(resolved, visitor, callback=None, **answer)
            if ours.status_code >= 400:  # noqa: PLR2004
                return ours
        headers = {k: v for k, v in SECURITY_HEADERS.items() if "Policy" not in k}
        response.headers.update(headers)
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    async def _ours(self, uid: str, visitor: Visitor) -> FutureData | None:
        """Return the attempt of a uid, if this visitor may answer it on this route."""
        stored = await self._desk.ask(lambda e: e.attempts.find(uid))
        if stored is None:
            return None
        if stored.entry.handler not in self._handlers:
            raise CallbackRefused("mismatch")
        # Nobody's answer is kept until its person says so.
        self._desk.admit(stored.entry, visitor, signed_in=False)
        return FutureData(uid, dict(stored.entry.data), tuple(stored.entry.scopes))

    async def _page(self, serving: Serving, inner: Scope, receive: Receive) -> Response:
        try:
            with serving_context(serving):
                response = await captured(self._app, inner, receive)
        except FutureNotFound:
            return refusal("unknown")
        except Exception as error:  # noqa: BLE001 - whatever an endpoint raises
            # Not its text: it may hold the code.
            logger.warning("a callback endpoint failed: %s", type(error).__name__)
            serving.resolved.clear()
            return page(Outcome.FAILED, status=502, button="")
        # FastAPI's own answer to a missing parameter would repeat the others.
        return refusal("malformed") if response.status_code == 422 else response  # noqa: PLR2004
