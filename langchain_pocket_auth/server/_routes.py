"""The routes to mount: connect links, callbacks, forms, and third parties' own."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.routing import Route, Router

from .._service import Service
from ._foreign import foreign_routes
from ._forms import FormDesk

CALLBACK = "/auth/{provider}/{method}/callback"
FORM = "/auth/{provider}/{method}/form"
# All, so that none is answered, or logged, without our care.
METHODS = ["GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE"]


def make_router(
    service: Service, routers: Sequence[APIRouter] = (), app_name: str | None = None
) -> APIRouter:
    """Return all routes, with those of own handlers first."""
    router = APIRouter(include_in_schema=False)
    desk = FormDesk(service, app_name)

    @router.get("/connect/{ticket}")
    async def connect(request: Request, ticket: str) -> Response:
        """Show who asks for what. Changes nothing, whoever fetches it."""
        return await desk.show(request, ticket)

    @router.post("/connect/{ticket}")
    async def start(request: Request, ticket: str) -> Response:
        """Start an attempt and send the person to the provider."""
        return await desk.start(request, ticket)

    handlers = service.registry.own
    foreign = [(h.router, {h.name}) for h in handlers if h.router is not None]
    routed = {h.name for h in handlers if h.router is None}
    ours = [
        Route(CALLBACK, desk.callback, methods=METHODS),
        Route(FORM, desk.form, methods=METHODS),
    ]
    otherwise = Router(routes=ours)
    for theirs, names in [*foreign, *((r, routed) for r in routers)]:
        router.routes += foreign_routes(desk, theirs, names, otherwise)
    router.routes += ours
    return router
