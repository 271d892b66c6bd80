"""What requests say, read strictly: nothing that no honest browser sends."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import SplitResult, parse_qsl, urlsplit

from fastapi import Request
from starlette.types import Scope

from .._errors import CallbackRefused

MAX_QUERY_BYTES = 8192
_CALLBACK = re.compile(r"/auth/([^/]+)/([^/]+)/callback")


def query_of(scope: Scope) -> dict[str, str] | None:
    """
    Return the parameters; `None` for what no honest provider sends.

    The scope loses its query, so that access logs that read it afterwards do too.
    """
    raw: bytes = scope["query_string"]
    scope["query_string"] = b""
    return parsed(raw)


def callback_of(address: str, base_url: str) -> dict[str, Any]:
    """
    Return what a callback's address says, as `Attempts.answer` takes it.

    Raises:
        CallbackRefused: It is not the address of one of our callbacks.
    """
    try:
        parts, base = urlsplit(address.strip().strip("\"'<>")), urlsplit(base_url)
        ours = (parts.scheme, parts.netloc) == (base.scheme, base.netloc)
    except ValueError:
        ours = False
    found = _CALLBACK.fullmatch(parts.path.removeprefix(base.path)) if ours else None
    query = parsed(parts.query.encode()) if found else None
    if found is None or query is None or not query.get("state"):
        raise CallbackRefused("malformed")
    return {
        "uid": query["state"],
        "callback": (found[1], found[2]),
        "error": query.get("error"),
        "issuer": query.get("iss"),
        "parameters": query,
    }


def origin_of(base: SplitResult) -> str:
    """Return the origin of an address as browsers write it."""
    default = {"https": ":443", "http": ":80"}[base.scheme]
    return f"{base.scheme}://{base.netloc.lower().removesuffix(default)}"


async def form_of(request: Request) -> dict[str, str] | None:
    """Return what a small form posted; `None` for what is none."""
    length = request.headers.get("content-length", "0")
    if length == "0" and "transfer-encoding" not in request.headers:
        return {}
    body = await body_of(request)
    return parsed(body) if body else None


async def body_of(request: Request, limit: int = MAX_QUERY_BYTES) -> bytes | None:
    """Return the body of a posted form; `None` for what is too long or no form."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        return None
    received = bytearray()
    async for part in request.stream():
        received += part
        if len(received) > limit:
            return None
    return bytes(received)


def parsed(raw: bytes, limit: int = MAX_QUERY_BYTES) -> dict[str, str] | None:
    """Return what a query or a form holds; `None` for what is malformed."""
    if len(raw) > limit:
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
