"""The routes to mount: connect links, callbacks, forms, and third parties' own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.routing import Route, Router

from .._service import Service
from ._connections import ConnectionsDesk
from ._foreign import foreign_routes
from ._refusals import refusal

CONNECT = "/connect/{ticket}"
CALLBACK = "/auth/{provider}/{method}/callback"
FORM = "/auth/{provider}/{method}/form"
CONNECTIONS = "/connections"
# All, so that none is answered, or logged, without our care.
METHODS = ["GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE"]


def make_router(
    service: Service,
    routers: Sequence[APIRouter] = (),
    app_name: str | None = None,
) -> APIRouter:
    """
    Return all routes, with those of own handlers first.

    Where the address has a path, they answer with it and without it: some proxies
    take it away, others do not.
    """
    router = APIRouter(include_in_schema=False)
    desk = ConnectionsDesk(service, app_name)
    handlers = service.registry.own
    foreign = [(h.router, {h.name}) for h in handlers if h.router is not None]
    routed = {h.name for h in handlers if h.router is None}
    for prefix in dict.fromkeys(("", desk.prefix)):
        ours = list(_ours(prefix, desk))
        otherwise = Router(routes=ours)
        for theirs, names in [*foreign, *((r, routed) for r in routers)]:
            router.routes += foreign_routes(desk, theirs, names, otherwise, prefix)
        router.routes += ours
    return router


def _ours(prefix: str, desk: ConnectionsDesk) -> Iterator[Route]:
    for path, answer in (
        (CONNECT, desk.connect),
        (CALLBACK, desk.callback),
        (FORM, desk.form),
        (CONNECTIONS, desk.connections),
    ):
        yield Route(prefix + path, desk.limited(answer), methods=METHODS)
        # Starlette would redirect there to whatever `Host` says.
        yield Route(f"{prefix}{path}/", desk.limited(_nothing), methods=METHODS)


async def _nothing(request: Request) -> Response:
    request.scope["query_string"] = b""
    return refusal("unknown")
