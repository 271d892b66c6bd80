"""What an authorization server says of itself (RFC 8414, OpenID Discovery)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from pydantic import ValidationError

from .._errors import ConfigurationError, ProviderUnavailable
from .._http import (
    LOOPBACK_HOSTS,
    TRANSIENT_STATUS,
    Answer,
    Http,
    public_address,
    secure_url,
)
from .._row_parts import AuthMethod
from .._rows import Provider
from ._kept import Kept
from ._register import RegisteredClient, register

__all__ = [
    "RegisteredClient",
    "ServerMetadata",
    "discover",
    "register",
    "with_metadata",
]

_AUTH_METHODS: tuple[AuthMethod, ...] = (
    "client_secret_basic",
    "client_secret_post",
    "none",
)
_ENDPOINTS = (
    "authorization_endpoint",
    "token_endpoint",
    "revocation_endpoint",
    "pushed_authorization_request_endpoint",
    "device_authorization_endpoint",
    "registration_endpoint",
    "jwks_uri",
)
_LISTS = (
    "token_endpoint_auth_methods_supported",
    "code_challenge_methods_supported",
    "grant_types_supported",
    "scopes_supported",
)


@dataclass(frozen=True, slots=True)
class ServerMetadata:
    """A server's metadata, by the names of RFC 8414; `None`: it does not say."""

    issuer: str
    authorization_endpoint: str | None
    token_endpoint: str | None
    revocation_endpoint: str | None
    pushed_authorization_request_endpoint: str | None
    device_authorization_endpoint: str | None
    registration_endpoint: str | None
    jwks_uri: str | None
    token_endpoint_auth_methods_supported: tuple[str, ...] | None
    code_challenge_methods_supported: tuple[str, ...] | None
    grant_types_supported: tuple[str, ...] | None
    scopes_supported: tuple[str, ...] | None
    authorization_response_iss_parameter_supported: bool


_known: Kept[ServerMetadata] = Kept()


async def discover(http: Http, issuer: str, *, provider: str) -> ServerMetadata:
    """
    Return what the server of *issuer* publishes; asked once an hour.

    Looked for as RFC 8414 section 3.1 says, then as OpenID Connect Discovery does.

    Raises:
        ConfigurationError: There is none, or it is not for this issuer; the developer
            names another issuer, or gives the row its endpoints.
        ProviderUnavailable: The server does not answer; try again later.
    """
    parts = urlsplit(secure_url(issuer, f"{provider}: the issuer"))
    if parts.query or parts.fragment:
        raise ConfigurationError(
            f"{provider}: the issuer {issuer} has a query or fragment, which no issuer "
            "has (RFC 8414 section 2)"
        )
    return await _known.get(http, issuer, lambda: _discovered(http, issuer, provider))


def _places(issuer: str) -> Iterator[str]:
    parts = urlsplit(issuer)
    path = parts.path.rstrip("/")
    for name in ("oauth-authorization-server", "openid-configuration"):
        yield parts._replace(path=f"/.well-known/{name}{path}").geturl()
    if path:
        openid = f"{path}/.well-known/openid-configuration"
        yield parts._replace(path=openid).geturl()


async def _discovered(http: Http, issuer: str, provider: str) -> ServerMetadata:
    failures: list[str] = []
    busy: Answer | None = None
    for url in _places(issuer):
        answer = await http.request("GET", url, provider=provider)
        if answer.status in TRANSIENT_STATUS:
            busy = answer
        content = answer.json()
        if answer.status != 200 or not isinstance(content, dict):  # noqa: PLR2004
            failures.append(f"{url} is none (status {answer.status})")
        elif (named := content.get("issuer")) != issuer:
            # RFC 8414 section 3.3. Most often it is a slash at the end.
            failures.append(f"{url} is for the issuer {str(named)[:200]!r}")
        else:
            metadata = _read(content, issuer, provider)
            await _guard(http, metadata)
            return metadata
    if busy is not None:
        raise ProviderUnavailable(
            f"{provider}: the metadata of {issuer} cannot be read (status "
            f"{busy.status}); try again later",
            provider=provider,
            retry_after_s=busy.retry_after_s,
        )
    raise ConfigurationError(
        f"{provider}: the issuer {issuer} has no metadata ({'; '.join(failures)}): "
        "correct it, or give the row authorization_endpoint and token_endpoint"
    )


async def _guard(http: Http, metadata: ServerMetadata) -> None:
    """
    Let a public server's metadata lead to public addresses only.

    What is published on the internet must not send us into the network that we run
    in. A server of that network may: its issuer is named by the developer.
    """
    own = urlsplit(metadata.issuer)
    try:
        address = await public_address(own.hostname or "", own.port or 443)
    except (OSError, UnicodeError):
        address = ""  # only a proxy knows the name, so it is none of this network
    if address is None:
        return
    for name in _ENDPOINTS:
        host = urlsplit(getattr(metadata, name) or "").hostname
        if host and host != own.hostname:
            http.only_public(host)


def _read(content: dict[str, Any], issuer: str, provider: str) -> ServerMetadata:
    values: dict[str, Any] = {"issuer": issuer}
    for name in _ENDPOINTS:
        value = content.get(name)
        values[name] = value and _endpoint(value, name, issuer, provider)
    for name in _LISTS:
        value = content.get(name)
        values[name] = (
            tuple(v for v in value if isinstance(v, str))
            if isinstance(value, list)
            else None
        )
    name = "authorization_response_iss_parameter_supported"
    return ServerMetadata(**values | {name: content.get(name) is True})


def _endpoint(value: Any, name: str, issuer: str, provider: str) -> str:
    what = f"{provider}: the {name} in the metadata of {issuer}"
    if not isinstance(value, str):
        raise ConfigurationError(f"{what} is no URL")
    host = urlsplit(secure_url(value, what)).hostname
    # What is published for everybody must not lead to this machine.
    if host in LOOPBACK_HOSTS and urlsplit(issuer).hostname not in LOOPBACK_HOSTS:
        raise ConfigurationError(f"{what} is an address of this machine")
    return value


def with_metadata(row: Provider, metadata: ServerMetadata) -> Provider:
    """
    Return *row* with what it leaves open filled in from *metadata*.

    Raises:
        ConfigurationError: The server lacks what authorization codes need, or takes no
            way to authenticate the app that there is.
    """
    found: dict[str, Any] = {name: getattr(metadata, name) for name in _ENDPOINTS}
    methods = metadata.token_endpoint_auth_methods_supported
    if methods is not None:  # otherwise the default is RFC 8414's
        usable = [m for m in _AUTH_METHODS if m in methods]
        if not usable and "token_endpoint_auth_method" not in row.model_fields_set:
            raise ConfigurationError(
                f"{row.label} takes none of {', '.join(_AUTH_METHODS)} to authenticate "
                f"the app (metadata of {metadata.issuer})"
            )
        found["token_endpoint_auth_method"] = next(iter(usable), None)
    # Servers that do not mention PKCE ignore it, or have it without saying so.
    challenges = metadata.code_challenge_methods_supported
    if challenges is not None and "S256" not in challenges:
        found["code_challenge_method"] = "unsupported"
    found["grant_types_supported"] = metadata.grant_types_supported
    if metadata.authorization_response_iss_parameter_supported:
        found["authorization_response_iss_parameter_supported"] = True
    own = {name: getattr(row, name) for name in row.model_fields_set}
    told = {name: value for name, value in found.items() if value is not None}
    filled = {**told, **own}
    missing = {"authorization_endpoint", "token_endpoint"} - filled.keys()
    if missing:
        raise ConfigurationError(
            f"{row.label}: the metadata of {metadata.issuer} names no "
            f"{' and no '.join(sorted(missing))}: give them in the row"
        )
    try:
        return Provider(**filled)
    except ValidationError as error:
        problems = "; ".join(line["msg"] for line in error.errors())
    raise ConfigurationError(
        f"{row.label}: the metadata of {metadata.issuer} makes no provider: {problems}"
    )
