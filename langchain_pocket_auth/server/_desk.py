"""What the routes do: parse strictly, ask the engine, show a page."""

from __future__ import annotations

import logging
import re
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from fastapi import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import Scope

from .._cards import plain
from .._errors import (
    CallbackRefused,
    ConfigurationError,
    PocketAuthError,
    ProviderError,
    ProviderUnavailable,
    StorageError,
    UnknownProvider,
)
from .._http import LOOPBACK_HOSTS
from .._service import Service
from .._vault import Future
from ..handlers import FormHandler
from ._pages import SECURITY_HEADERS, Outcome, page

logger = logging.getLogger(__name__)

MAX_QUERY_BYTES = 8192
_CALLBACK = re.compile(r"/auth/([^/]+)/([^/]+)/callback")
_STATUS = {
    "unknown": 404,
    "expired": 410,
    "replayed": 409,
    "mismatch": 403,
    "malformed": 400,
}


class Desk:
    """Answers requests, for the routes of this package and of third parties."""

    def __init__(self, service: Service, app_name: str | None) -> None:
        self._base_url, self._app_name = service.base_url, app_name
        self._registry, self._label = service.registry, service.registry.label
        self.ask = service.ask
        base = urlsplit(service.base_url)
        self._origin, self.prefix = f"{base.scheme}://{base.netloc}", base.path

    async def show(self, request: Request, ticket: str) -> Response:
        """Answer GET of a connect link, before and after the person acted."""
        if (refused := self.foreign_host(request)) is not None:
            return refused
        try:
            stored, key = await self.ask(lambda e: e.attempts.ticket(ticket))
            choices = await self.ask(lambda e: e.attempts.choices(stored.entry))
        except PocketAuthError as error:
            return self.failed(error)
        future, label = stored.entry, self._label(key.provider)
        if future.status != "pending":
            return _ended(future, label)
        if choices:
            return page(Outcome.CHOOSE, status=200, provider=label, choices=choices)
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
            return refusal("mismatch")
        chosen = parsed(await body_of(request) or b"\0") if _has_body(request) else {}
        if chosen != {}:
            return await self._choose(ticket, chosen)
        try:
            url = await self.ask(lambda e: e.attempts.begin(ticket))
            stored, key = await self.ask(lambda e: e.attempts.ticket(ticket))
        except PocketAuthError as error:
            return self.failed(error)
        if isinstance(self._registry.named(stored.entry.handler), FormHandler):
            # Of our own origin, which `form-action` allows.
            return RedirectResponse(url, 303, headers=dict(SECURITY_HEADERS))
        label = self._label(key.provider)
        return page(Outcome.LEAVING, status=200, provider=label, next_url=url)

    async def _choose(self, ticket: str, form: dict[str, str] | None) -> Response:
        """Take the account that a person has chosen."""
        if form is None or form.keys() != {"account"}:
            return refusal("malformed")
        try:
            await self.ask(lambda e: e.attempts.choose(ticket, form["account"]))
        except PocketAuthError as error:
            return self.failed(error)
        return self._back_to(ticket)

    def _back_to(self, ticket: str) -> Response:
        # 303: the code leaves the address bar and the history.
        return RedirectResponse(
            f"{self._base_url}/connect/{ticket}",
            status_code=303,
            headers=dict(SECURITY_HEADERS),
        )

    async def callback(self, request: Request) -> Response:
        """Answer a provider's redirect (RFC 6749 section 4.1.2)."""
        query = query_of(request.scope)  # first: it hides the query from access logs
        path = (request.path_params["provider"], request.path_params["method"])
        posted = request.method == "POST" and self._posts(*path)
        refused = self.foreign_host(request) or (
            None if posted else _not_a_visit(request)
        )
        if refused is not None:
            return refused
        if posted:
            query = parsed(await body_of(request) or b"")
        if not query or not query.get("state"):
            return refusal("malformed")
        return await self.answer(
            query["state"],
            callback=path,
            error=query.get("error"),
            issuer=query.get("iss"),
            parameters=query,
        )

    def _posts(self, provider: str, method: str) -> bool:
        """Whether a provider answers with a form (`response_mode=form_post`)."""
        try:
            handlers = self._registry.of(provider)
        except UnknownProvider:
            return False
        return any(h.posts_callback and h.name.endswith(method) for h in handlers)

    async def answer(self, uid: str, **answer: Any) -> Response:
        """Carry out an answer; on success leave the URL that holds the code."""
        try:
            result = await self.ask(lambda e: e.attempts.answer(uid, **answer))
        except PocketAuthError as error:
            return self.failed(error)
        if result.ticket is None:
            return refusal("expired")
        return self._back_to(result.ticket)

    def failed(self, error: PocketAuthError) -> HTMLResponse:
        """Return the page for an error; its text is for the log only."""
        if isinstance(error, CallbackRefused):
            return refusal(error.reason)
        provider = getattr(error, "provider", None)
        label = self._label(provider) if provider else None
        # Others named some of what is in it.
        logger.warning("a person could not be connected: %s", plain(str(error)))
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
        return None if host in LOOPBACK_HOSTS else refusal("mismatch", status=421)

    def _same_origin(self, request: Request) -> bool:
        # Browsers since 2023 always send it; `same-site` is another port of ours.
        if (site := request.headers.get("sec-fetch-site")) is not None:
            return site == "same-origin"
        return request.headers.get("origin") in {None, self._origin}


def _ended(future: Future, label: str) -> HTMLResponse:
    """Return the page for a question that was answered."""
    if future.status == "denied":
        button = f"Connect {label} after all"
        return page(Outcome.DECLINED, status=200, provider=label, button=button)
    if left_out := future.withheld:
        return page(Outcome.WITHHELD, status=200, provider=label, scopes=left_out)
    return page(Outcome.CONNECTED, status=200, provider=label)


def refusal(reason: str, *, status: int | None = None) -> HTMLResponse:
    """Return the page for an answer that was refused."""
    return page(Outcome(reason), status=status or _STATUS[reason])


def _not_a_visit(request: Request) -> Response | None:
    """Answer what is not a person's browser going there, and change nothing."""
    if request.method != "GET":
        headers = {**SECURITY_HEADERS, "Allow": "GET"}
        return Response(status_code=405, headers=headers)
    return prefetched(request)


def prefetched(request: Request) -> Response | None:
    """Answer a browser that only loads ahead."""
    purposes = (request.headers.get(name, "") for name in ("sec-purpose", "purpose"))
    if any("prefetch" in purpose for purpose in purposes):
        return Response(status_code=204, headers=dict(SECURITY_HEADERS))
    return None


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


def _has_body(request: Request) -> bool:
    length = request.headers.get("content-length", "0")
    return length != "0" or "transfer-encoding" in request.headers


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
