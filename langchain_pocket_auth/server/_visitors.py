"""Who is behind a request: the signed-in user, and the browser."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Coroutine
from typing import Any, Final

from fastapi import APIRouter, Depends, Request
from fastapi.exceptions import FastAPIError, RequestValidationError
from fastapi.routing import APIRoute
from starlette.responses import Response
from starlette.types import Message, Scope

from .._errors import ConfigurationError
from .._models import Owner
from .._site import Site, VerifyUser, Visitor
from .._vault import digest
from ._captured import ROUTING, captured

# The prefix keeps it from being set by other hosts or without TLS (RFC 6265bis).
COOKIE: Final = "__Host-pocket-auth"
# Of the same value; it comes along with a form that a provider's page posts.
POSTED_COOKIE: Final = "__Host-pocket-auth-post"
_WELL_FORMED = re.compile(r"[A-Za-z0-9_-]{43}")
_FOUND = "pocket_auth.person"


class Visitors:
    """
    Says who is behind a request.

    Args:
        site: Whose `verify_user` is asked, as FastAPI asks a dependency of a route.

    Raises:
        ConfigurationError: FastAPI does not take `verify_user` as one.
    """

    def __init__(self, site: Site) -> None:
        self._site = site
        self._asking: tuple[Any, APIRouter] | None = None
        if site.verify_user is not None:
            try:
                self._router_for(None, site.verify_user)
            except (FastAPIError, AssertionError, NameError, TypeError) as error:
                raise ConfigurationError(
                    "verify_user= cannot be a dependency of FastAPI: it says "
                    f"{type(error).__name__} ({error})"
                ) from None

    async def visitor(self, request: Request) -> Visitor | Response:
        """
        Return who comes with *request*, or what the app's dependency answered.

        Raises:
            ConfigurationError: `verify_user` cannot be called, or returned what names
                nobody.
        """
        person = await self._person(request)
        if isinstance(person, Response):
            return person
        return Visitor(person=person, browser=self.browser(request))

    def browser(self, request: Request) -> str | None:
        """Return what a browser is known by; `None`: it is not known."""
        value = self._cookie(request)
        return digest(value) if value else None

    def _cookie(self, request: Request) -> str | None:
        if not self._site.public:
            return None
        for name in (COOKIE, POSTED_COOKIE):
            found = _sent(request.scope, name)
            # Several are no browser's, which keeps one of that name.
            if len(found) == 1 and _WELL_FORMED.fullmatch(value := found.pop()):
                return value
        return None

    def mark(self, request: Request) -> str | None:
        """Return the cookie's value for a browser that starts; `None`: it gets none."""
        if not self._site.public:
            return None
        # The one that is there: attempts in other tabs go by it.
        return self._cookie(request) or secrets.token_urlsafe(32)

    @staticmethod
    def set_cookie(response: Response, value: str, *, posted: bool) -> None:
        """
        Make a browser known.

        Args:
            response: What it is sent.
            value: Of `mark`.
            posted: Whether the provider answers with a form of its page: a POST from
                another site, which a `Lax` cookie does not come along with.
        """
        options: dict[str, Any] = {"path": "/", "secure": True, "httponly": True}
        response.set_cookie(COOKIE, value, samesite="lax", **options)
        if posted:
            response.set_cookie(POSTED_COOKIE, value, samesite="none", **options)

    async def _person(self, request: Request) -> Owner | Response | None:
        """Ask the app, on this loop, as if it was asked for the page shown."""
        verify_user = self._site.verify_user
        if verify_user is None:
            return None
        found: list[Any] = []
        scope = {k: v for k, v in request.scope.items() if k not in ROUTING}
        # GET: only who it is is asked, and what was posted is not for the app.
        scope |= {"method": "GET", _FOUND: found}
        router = self._router_for(scope.get("app"), verify_user)
        response = await captured(router, scope, _nothing)
        if not found:
            return response
        if found[0] is None or isinstance(found[0], Owner):
            return found[0]
        if isinstance(found[0], str):
            return Owner("user", found[0]) if found[0] else None
        raise ConfigurationError(
            f"verify_user= returned a {type(found[0]).__name__}: it returns a user's "
            "id as a string, an Owner, or None if nobody is signed in"
        )

    def _router_for(self, app: Any, verify_user: VerifyUser) -> APIRouter:
        if self._asking is None or self._asking[0] is not app:
            self._asking = (app, _asking_router(app, verify_user))
        return self._asking[1]


def _sent(scope: Scope, cookie: str) -> set[str]:
    """
    Return the values of a cookie, whose name is compared byte by byte.

    Starlette strips what is blank in Latin-1: with byte A0 before it, a neighbouring
    host sets a name whose prefix browsers do not see, so they guard it by nothing.
    """
    pairs = (
        pair.strip(b" ").partition(b"=")
        for header, line in scope["headers"]
        if header == b"cookie"
        for pair in line.split(b";")
    )
    return {value.decode("latin-1") for n, _, value in pairs if n == cookie.encode()}


async def _nothing() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


class _Asking(APIRoute):
    """A request without what `verify_user` reads, a cookie, is of nobody."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = super().get_route_handler()

        async def ask(request: Request) -> Response:
            try:
                return await answer(request)
            except RequestValidationError as error:
                places = {str(e["loc"][0]) for e in error.errors()}
            if wrong := places - {"cookie", "header"}:
                raise ConfigurationError(
                    "verify_user= wants a parameter from the request's "
                    f"{' and '.join(sorted(wrong))}, which connect links and callbacks "
                    "do not have; what is to be the request is annotated as `Request`"
                )
            return _found(request.scope, None)

        return ask


def _asking_router(app: Any, verify_user: VerifyUser) -> APIRouter:
    # What the app's own tests put in place of a dependency holds here, too.
    provider = app if hasattr(app, "dependency_overrides") else None
    router = APIRouter(
        route_class=_Asking,
        dependency_overrides_provider=provider,
        redirect_slashes=False,
    )

    async def ask(
        request: Request,
        person: Any = Depends(verify_user),  # noqa: B008 - FastAPI's way
    ) -> Response:
        return _found(request.scope, person)

    router.add_api_route("/{rest:path}", ask, methods=["GET"], response_model=None)
    return router


def _found(scope: Scope, person: Any) -> Response:
    scope[_FOUND].append(person)
    return Response()
