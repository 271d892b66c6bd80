"""The one place that talks HTTP to providers: bounded, without redirects."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from http.cookiejar import CookieJar, DefaultCookiePolicy
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import httpx

from ._errors import ConfigurationError, ProviderUnavailable
from ._placement import quiet

USER_AGENT = "langchain-pocket-auth"
TIMEOUT_S = 10.0
MAX_BODY_BYTES = 1 << 20  # a token answer is a few KiB
LOOPBACK_HOSTS = frozenset({"127.0.0.1", "::1", "localhost"})
# `None` is httpx's default transport: no proxy of the environment reaches this machine.
_NO_PROXY = dict.fromkeys(("all://127.0.0.1", "all://[::1]", "all://localhost"))
# RFC 9110 section 15: these say "later", whatever the body says.
TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True, slots=True, repr=False)
class Answer:
    """A provider's answer; no repr, because the body holds tokens."""

    status: int
    body: bytes
    retry_after_s: float | None
    date: datetime | None = None
    """What time it was there (RFC 9110 section 6.6.1)."""

    def json(self) -> Any:
        """Return the body as JSON, or `None` when it is none."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            return None


class Http:
    """
    A shared client of one event loop.

    Redirects are not followed: a token request would re-post its secrets to
    the new place. Bodies are cut at 1 MiB, and an answer takes 10 s at most.
    """

    def __init__(self) -> None:
        self._client: httpx.AsyncClient | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._public: set[str] = set()

    def only_public(self, host: str) -> None:
        """Refuse to connect to *host* where it leads into a private network."""
        self._public.add(host)

    async def request(
        self,
        method: str,
        url: str,
        *,
        provider: str,
        data: Mapping[str, Any] | None = None,
        as_json: bool = False,
        headers: Mapping[str, str] | None = None,
        auth: tuple[str, str] | None = None,
    ) -> Answer:
        """
        Send *data* as a form, as JSON, or, with GET, as the query.

        Raises:
            ConfigurationError: A host of `only_public` leads to a private address.
            ProviderUnavailable: No answer.
        """
        client, loop = self._client, asyncio.get_running_loop()
        if client is None or self._loop is not loop:  # first use, or a forked child
            client = self._client = httpx.AsyncClient(
                verify=_trusted(),
                timeout=TIMEOUT_S,
                follow_redirects=False,
                # Some providers refuse the names that libraries have by default.
                headers={"User-Agent": USER_AGENT},
                mounts=_NO_PROXY,
                # What is set for one person must not be sent for the next.
                cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
            )
            self._loop = loop
        kind = "params" if method == "GET" else "json" if as_json else "data"
        body: dict[str, Any] = {kind: dict(data)} if data else {}
        try:
            request = client.build_request(method, url, headers=headers, **body)
            if request.url.host in self._public:
                await _pin(request, provider)
            request.url = quiet(request.url, "/***")  # some want secrets there
            async with asyncio.timeout(TIMEOUT_S):
                reply = await client.send(request, auth=auth, stream=True)
                try:
                    received = await _body(reply, provider)
                finally:
                    await reply.aclose()
        except (httpx.HTTPError, httpx.StreamError, TimeoutError, OSError) as error:
            problem = type(error).__name__
        else:
            again_s = _retry_after(reply.headers)
            date = _date(reply.headers)
            return Answer(reply.status_code, received, again_s, date)
        # Out here: the original holds the request, and with it secrets.
        raise ProviderUnavailable(
            f"{provider}: no answer from {urlsplit(url).hostname} ({problem})",
            provider=provider,
            lost=True,
        )

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None


async def public_address(host: str, port: int) -> str | None:
    """
    Return an address of *host*; `None` if any of them is not of the public internet.

    Raises:
        OSError: There is none.
    """
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [ip_address(str(address[0])) for *_, address in found]
    mapped = [getattr(a, "ipv4_mapped", None) or a for a in addresses]
    if not addresses or not all(a.is_global and not a.is_multicast for a in mapped):
        return None
    return str(addresses[0])


async def _pin(request: httpx.Request, provider: str) -> None:
    """
    Connect to the very address that was looked at: a name may lead elsewhere next.

    Raises:
        ConfigurationError: It is a private one (server-side request forgery).
    """
    host = request.url.host
    if getproxies():
        return  # a proxy resolves names itself, and decides where one may go
    address = await public_address(host, request.url.port or 443)
    if address is None:
        raise ConfigurationError(
            f"{provider}: {host}, which the server's metadata names, leads into a "
            "private network; give the row that endpoint itself if this is meant"
        )
    request.headers["Host"] = request.url.netloc.decode()
    request.extensions["sni_hostname"] = host  # what the certificate is checked for
    request.url = request.url.copy_with(host=address)


async def _body(reply: httpx.Response, provider: str) -> bytes:
    received = bytearray()
    async for part in reply.aiter_bytes():
        received += part
        if len(received) > MAX_BODY_BYTES:
            raise ProviderUnavailable(
                f"{provider}: the answer is larger than 1 MiB", provider=provider
            )
    return bytes(received)


@cache
def _trusted() -> ssl.SSLContext:
    # Reading the certificates takes 20 ms, so once is enough for all pockets.
    return httpx.create_ssl_context()


def _date(headers: httpx.Headers) -> datetime | None:
    try:
        # Aware, whatever zone it names.
        return parsedate_to_datetime(headers.get("date", "")).astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def _retry_after(headers: httpx.Headers) -> float | None:
    # RFC 9110 section 10.2.3; the date form is rare and read as "unknown".
    value = headers.get("retry-after", "")
    known = value.isascii() and value.isdigit()  # "²" is a digit, and no number
    return min(float(value), 3600.0) if known else None


def is_transport_error(error: Exception) -> bool:
    """Whether no answer arrived; also for clients that handlers bring along."""
    return isinstance(error, (httpx.TransportError, OSError))


def secure_url(url: str, what: str) -> str:
    """
    Return *url* if a secret may go there: https, or http to this machine.

    Raises:
        ConfigurationError: It may not.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        raise ConfigurationError(f"{what} is no URL") from None
    if parts.scheme == "https" and parts.hostname:
        return url
    if parts.scheme == "http" and parts.hostname in LOOPBACK_HOSTS:
        return url
    raise ConfigurationError(
        f"{what} must be an https URL (http only to this machine), not "
        f"{parts.scheme or 'no scheme'}://{parts.hostname or ''}"
    )
