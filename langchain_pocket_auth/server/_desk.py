"""What all routes do: see who comes, take answers, show how it went."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from fastapi import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from .._admission import Admission, same_browser
from .._cards import plain
from .._engine import Engine
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
from .._models import Owner, SessionKey
from .._service import Service
from .._site import Visitor
from .._vault import Attempt, Future, Stored, entry_key
from ._limits import Counter, Limits, address_of
from ._pages import SECURITY_HEADERS, Outcome, page
from ._refusals import embedded, not_allowed, prefetched, refusal, too_many
from ._requests import body_of, origin_of, parsed, query_of
from ._visitors import Visitors

logger = logging.getLogger(__name__)

LIMITS = Limits()
Answer = Callable[[Request], Awaitable[Response]]


class Desk:
    """
    Answers requests, for the routes of this package and of third parties.

    Args:
        service: What is behind it.
        app_name: What pages call the app.
    """

    def __init__(self, service: Service, app_name: str | None) -> None:
        self._base_url, self._app_name = service.base_url, app_name
        self._registry, self._label = service.registry, service.registry.label
        self._site, self._visitors = service.site, Visitors(service.site)
        self._admission, self.ask = Admission(service.site, service.tell), service.ask
        base = urlsplit(service.base_url)
        self._origin, self.prefix = origin_of(base), base.path
        self._starts = Counter(LIMITS.starts, LIMITS.names)
        self._refusals = Counter(LIMITS.refusals, LIMITS.names)

    def limited(self, answer: Answer) -> Answer:
        """Return *answer* for addresses that have not been refused too often."""

        async def within_limits(request: Request) -> Response:
            if embedded(request):
                # Not counted: another site would have its readers locked out.
                request.scope["query_string"] = b""
                return refusal("mismatch")
            address = address_of(request)
            if address is None:
                return await answer(request)
            if wait_s := self._refusals.wait_s(address):
                request.scope["query_string"] = b""  # as `query_of` would
                return too_many(wait_s)
            response = await answer(request)
            if 400 <= response.status_code < 500:  # noqa: PLR2004
                self._refusals.add(address)
            return response

        return within_limits

    # ------------------------------------------------------------------ who comes

    async def visitor(self, request: Request) -> Visitor | Response:
        """
        Return who comes with a request, or what the app wants shown instead.

        Raises:
            ConfigurationError: `verify_user` is wrong.
        """
        return await self._visitors.visitor(request)

    async def whoever(self, request: Request) -> Visitor:
        """
        Return who brings an answer; nobody, where the app would have them sign in.

        The answer is not lost for it: a session cookie that is `SameSite=Strict` does
        not come along from a provider's page.

        Raises:
            ConfigurationError: `verify_user` is wrong.
        """
        visitor = await self.visitor(request)
        if isinstance(visitor, Visitor):
            return visitor
        return Visitor(browser=self._visitors.browser(request))

    def foreign_host(self, request: Request) -> Response | None:
        """Refuse names that are not ours: DNS rebinding comes with its own."""
        if self._site.public:
            return None  # proxies change it, and nothing here reads it
        try:
            host = urlsplit(f"//{request.headers.get('host', '')}").hostname
        except ValueError:
            host = None
        return None if host in LOOPBACK_HOSTS else refusal("mismatch", status=421)

    def _same_origin(self, request: Request) -> bool:
        # Browsers since 2023 always send it; `same-site` is another port of ours.
        if (site := request.headers.get("sec-fetch-site")) is not None:
            return site == "same-origin"
        origin = request.headers.get("origin")
        return origin == self._origin or (origin is None and not self._site.public)

    def _stranger(self, owner: Owner, visitor: Visitor) -> str | None:
        """Say what is wrong with whom a link is shown to; `None`: nothing."""
        if self._site.verify_user is None or visitor.person == owner:
            return None
        return "sign_in" if visitor.person is None else "wrong_person"

    def admit(self, attempt: Attempt, visitor: Visitor, *, signed_in: bool) -> None:
        """
        Compare who comes with whose attempt it is, before anything is shown or run.

        Args:
            attempt: What is to be answered.
            visitor: Who comes.
            signed_in: Whether nobody is as wrong as somebody else.

        Raises:
            CallbackRefused: It is somebody else, or another browser.
        """
        same_browser(visitor, attempt)
        key = attempt.target.session_key()
        self._admission.admit(visitor, key, here=signed_in)

    # -------------------------------------------------------------------- answers

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
        try:
            visitor = await self.whoever(request)
        except PocketAuthError as error:
            return self.failed(error)
        return await self.answer(
            query["state"],
            visitor,
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

    async def answer(self, uid: str, visitor: Visitor, **answer: Any) -> Response:
        """Carry out an answer; on success leave the URL that holds the code."""
        try:
            result = await self.ask(
                lambda e: e.attempts.answer(uid, visitor=visitor, **answer)
            )
        except PocketAuthError as error:
            return await self._refused(error, visitor, uid=uid)
        if result.ticket is None:
            return refusal("expired")
        return self._back_to(result.ticket)

    async def _refused(
        self,
        error: PocketAuthError,
        visitor: Visitor,
        *,
        uid: str = "",
        ticket: str | None = None,
    ) -> HTMLResponse:
        """Return the page for an error; with another account one may try again."""
        if not isinstance(error, CallbackRefused) or error.reason != "wrong_account":
            return self.failed(error, visitor)

        async def look(engine: Engine) -> tuple[Stored[Future], SessionKey] | None:
            if ticket is not None:
                return await engine.attempts.ticket(ticket)
            if (attempt := await engine.attempts.find(uid)) is None:
                return None
            key = attempt.entry.target.session_key()
            future = await engine.vault.get(Future, entry_key(Future, key))
            return (future, key) if future else None

        try:
            found = await self.ask(look)
        except PocketAuthError as failure:
            return self.failed(failure, visitor)
        if found is None:  # disconnected meanwhile
            return refusal("expired")
        future, key = found
        return page(
            Outcome.WRONG_ACCOUNT,
            status=403,
            provider=self._label(key.provider),
            account=getattr(error, "account", None),
            app_name=self._app_name,
            # The page's own address is the one that holds the code.
            action=f"{self._base_url}/connect/{future.entry.ticket}",
        )

    def failed(
        self, error: PocketAuthError, visitor: Visitor | None = None
    ) -> HTMLResponse:
        """Return the page for an error; its text is for the log only."""
        if isinstance(error, CallbackRefused):
            return refusal(error.reason, visitor=visitor)
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


def _not_a_visit(request: Request) -> Response | None:
    """Answer what is not a person's browser going there, and change nothing."""
    return prefetched(request) if request.method == "GET" else not_allowed("GET")
