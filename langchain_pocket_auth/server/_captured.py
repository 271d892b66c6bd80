"""Apps inside of ours, whose answers are looked at before anybody gets them."""

from __future__ import annotations

from typing import Any, Final

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope

ROUTING: Final = frozenset({"router", "endpoint", "path_params", "route", "fastapi"})
"""What routing writes into a scope; another router is to find its own."""


async def captured(app: ASGIApp, scope: Scope, receive: Receive) -> Response:
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

    await app(scope, receive, keep)
    response.body = bytes(body)
    response.headers["content-length"] = str(len(body))
    return response
