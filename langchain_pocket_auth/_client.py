"""HTTP clients for tools: a credential goes to its provider, and stays fresh."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterable
from typing import Any
from urllib.parse import urlsplit

import httpx

from ._errors import ConfigurationError
from ._models import AuthContext

Renew = Callable[[AuthContext, tuple[str, ...] | None], Awaitable[AuthContext | None]]
"""Called with what an API refused, and the scopes it lacks; returns what to try."""
RenewSync = Callable[[AuthContext, tuple[str, ...] | None], AuthContext | None]

# RFC 6750 section 3: auth-param, quoted; a scope token is of RFC 6749 section 3.3.
_PARAMETER = re.compile(r'\b(error|scope)="([\x20\x21\x23-\x5b\x5d-\x7e]*)"')
_MAX_SCOPES = 20  # named by an API as missing; more is no honest answer
_UNAUTHORIZED, _FORBIDDEN = 401, 403


class ProviderAuth(httpx.Auth):
    """
    Puts a context's credential into requests to the provider, and nowhere else.

    An API that answers 401 gets the request once more, with a renewed credential.
    """

    def __init__(
        self,
        context: AuthContext,
        hosts: Iterable[str],
        renew: Renew,
        renew_sync: RenewSync,
    ) -> None:
        self._context = context
        self._renew, self._renew_sync = renew, renew_sync
        base = context.api_base_url
        self._origins = {_origin(f"https://{host}") for host in hosts}
        if base is not None:
            self._origins.add(_origin(base))
        if not self._origins:
            raise ConfigurationError(
                "it is not known where this provider's API is: name its hosts, "
                'async_client(hosts=["api.example.com"])'
            )

    async def async_auth_flow(
        self, request: httpx.Request
    ) -> AsyncGenerator[httpx.Request, httpx.Response]:
        """Send the request, and once more if the API does not take the credential."""
        again = _Copy(request)
        answer = yield self._placed(request)
        if (lacking := _lacking(answer)) is None:
            return
        renewed = await self._renew(self._context, lacking or None)
        if renewed is not None and again.possible:
            self._context = renewed
            await answer.aread()
            yield self._placed(again.restored())

    def sync_auth_flow(
        self, request: httpx.Request
    ) -> Generator[httpx.Request, httpx.Response, None]:
        """Send the request, and once more if the API does not take the credential."""
        again = _Copy(request)
        answer = yield self._placed(request)
        if (lacking := _lacking(answer)) is None:
            return
        renewed = self._renew_sync(self._context, lacking or None)
        if renewed is not None and again.possible:
            self._context = renewed
            answer.read()
            yield self._placed(again.restored())

    def check(self, request: httpx.Request) -> None:
        """
        Refuse a request to another host, also one that follows a redirect.

        Raises:
            ConfigurationError: It is none of this provider's API.
        """
        if _origin(str(request.url)) not in self._origins:
            raise ConfigurationError(
                f"{request.url.host} is not known as a host of this provider's API, so "
                "it gets no credential; if it is one, name it in hosts=[...]"
            )

    async def acheck(self, request: httpx.Request) -> None:
        """Refuse the same, as asynchronous clients call it."""
        self.check(request)

    def _placed(self, request: httpx.Request) -> httpx.Request:
        self.check(request)
        placed = self._context.apply(request)
        # A row may hold the whole address, credential and all.
        self._origins.add(_origin(str(placed.url)))
        return placed


class _Copy:
    """A request as it was before a credential was put into it."""

    def __init__(self, request: httpx.Request) -> None:
        self._request, self._url = request, request.url
        self._headers = request.headers.copy()
        # A stream that was sent cannot be sent again.
        self.possible = isinstance(request.stream, httpx.ByteStream)

    def restored(self) -> httpx.Request:
        self._request.url, self._request.headers = self._url, self._headers
        return self._request


def _lacking(answer: httpx.Response) -> tuple[str, ...] | None:
    """
    Return `()` where the credential is not taken, the scopes that it lacks, or `None`.

    RFC 6750 section 3.1: `invalid_token` is a 401, `insufficient_scope` a 403.
    """
    if answer.status_code == _UNAUTHORIZED:
        return ()
    if answer.status_code != _FORBIDDEN:
        return None
    told = dict(_PARAMETER.findall(answer.headers.get("www-authenticate", "")))
    scopes = tuple(told.get("scope", "").split())
    if told.get("error") != "insufficient_scope" or not scopes:
        return None
    return scopes if len(scopes) <= _MAX_SCOPES else None


def _origin(url: str) -> tuple[str, str, int | None]:
    parts = urlsplit(url)
    default = {"https": 443, "http": 80}.get(parts.scheme)
    return (parts.scheme, parts.hostname or "", parts.port or default)


def client(
    context: AuthContext,
    hosts: Iterable[str],
    renew: Renew,
    renew_sync: RenewSync,
    *,
    synchronous: bool,
    **settings: Any,
) -> httpx.AsyncClient | httpx.Client:
    """
    Return a client of the provider's API.

    Raises:
        ConfigurationError: Where the API is is not known, or a setting would let the
            credential go elsewhere.
    """
    if wrong := settings.keys() & {"auth", "follow_redirects"}:
        raise ConfigurationError(
            f"{' and '.join(sorted(wrong))} is not for this client: it authorizes "
            "requests itself, and follows no redirects with a credential"
        )
    settings.setdefault("base_url", context.api_base_url or "")
    auth = ProviderAuth(context, hosts, renew, renew_sync)
    # `follow_redirects` of a single call, too: httpx leaves in what is no
    # `Authorization`, and asks no `Auth` about where a redirect leads.
    hooks = settings.pop("event_hooks", {})
    last = auth.check if synchronous else auth.acheck
    settings["event_hooks"] = {**hooks, "request": [*hooks.get("request", ()), last]}
    kind = httpx.Client if synchronous else httpx.AsyncClient
    return kind(auth=auth, follow_redirects=False, **settings)
