"""Where an API takes a credential: header, query, basic, path; values only."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote, urlsplit

from pydantic import BaseModel, ConfigDict, model_validator

from ._errors import ConfigurationError

if TYPE_CHECKING:
    import httpx

PLACEHOLDER = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")
_LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


def placeholders(*templates: str | None) -> set[str]:
    """Return the names in curly brackets of *templates*."""
    return {name for text in templates if text for name in PLACEHOLDER.findall(text)}


def fill(template: str, values: Mapping[str, str]) -> str:
    """
    Return *template* with its placeholders filled in.

    Raises:
        ConfigurationError: A value is missing; the text names it.
    """

    def value(found: re.Match[str]) -> str:
        if (name := found[1]) not in values:
            raise ConfigurationError(f"{template!r} needs a value for {name}")
        return values[name]

    return PLACEHOLDER.sub(value, template)


def quiet(url: httpx.URL, path: str | None = None) -> httpx.URL:
    """Return a URL whose text has no query, and another *path*: httpx logs it."""
    kind: Any = type(url)
    hidden = _quiet_kind(kind)(url)
    shown = url.path if path is None else path
    hidden.shown = f"{url.scheme}://{url.netloc.decode()}{shown}"
    found: httpx.URL = hidden
    return found


@cache
def _quiet_kind(kind: Any) -> Any:
    if hasattr(kind, "shown"):
        return kind
    texts = {"__str__": lambda self: self.shown, "__repr__": lambda self: self.shown}
    return type(kind.__name__, (kind,), {"shown": "", **texts})


class Placement(BaseModel):
    """
    Where an API takes a credential. The default is `Authorization: Bearer {token}`.

    Of `header`, `query`, `username`/`password`, `url` and `signature` at most one is
    given. Texts may name values in curly brackets: `{token}`, the fields of a form,
    the variables of a row, `{client_id}`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    header: str | None = None
    prefix: str | None = None
    """Before the token; default: `Bearer ` in Authorization, nothing elsewhere."""
    query: str | None = None
    """Name of a query parameter."""
    username: str | None = None
    """Basic authentication (RFC 7617): `username = "{email}"`, and `password`."""
    password: str | None = None
    url: str | None = None
    """The beginning of every URL, with the credential in its path."""
    signature: bool = False
    """The API wants signed requests, which only the tool can make."""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        basic = self.username is not None or self.password is not None
        if basic and (self.username is None or self.password is None):
            raise ValueError("basic authentication takes both username and password")
        given = [self.header or self.prefix is not None, self.query, basic, self.url]
        if sum(map(bool, [*given, self.signature])) > 1:
            raise ValueError(
                "one place only: header (with prefix), query, username and password, "
                "url, or signature"
            )
        parts = urlsplit(self.url or "https:")
        if parts.scheme != "https" and parts.hostname not in _LOOPBACK:
            raise ValueError("url begins with https://: it holds the credential")
        return self

    @property
    def templates(self) -> Iterator[str]:
        """Texts with placeholders."""
        yield from filter(None, (self.username, self.password, self.url))


BEARER = Placement()


@dataclass(frozen=True, slots=True, repr=False)
class Placed:
    """
    A credential on its way into a request; no repr, because it holds secrets.

    Attributes:
        place: Where it goes.
        values: What placeholders stand for; `token` is the access token.
        headers: Further headers, as templates.
        query: Further query parameters, as templates.
        base_url: The API's address, as a template.
    """

    place: Placement
    values: Mapping[str, str]
    headers: Mapping[str, str] = field(default_factory=dict)
    query: Mapping[str, str] = field(default_factory=dict)
    base_url: str | None = None

    def rendered_headers(self) -> dict[str, str]:
        """
        Return the headers of an API call.

        Raises:
            ConfigurationError: The API wants a signature; the tool makes it.
        """
        place, headers = self.place, {}
        if place.signature:
            raise ConfigurationError(
                "this API wants signed requests: sign with the values of to_dict()"
            )
        if place.username is not None and place.password is not None:
            pair = f"{self._fill(place.username)}:{self._fill(place.password)}"
            coded = base64.b64encode(pair.encode()).decode()
            headers["Authorization"] = f"Basic {coded}"
        elif place.query is None and place.url is None:
            name = place.header or "Authorization"
            default = "Bearer " if name == "Authorization" else ""
            prefix = default if place.prefix is None else place.prefix
            headers[name] = f"{prefix}{self.values['token']}"
        headers |= {k: self._fill(v) for k, v in self.headers.items()}
        for name, value in headers.items():
            # Of answers and callbacks, too: what ends a line would begin a header.
            if not value.isprintable():
                raise ConfigurationError(f"a value for {name} is no text of a header")
        return headers

    def rendered_query(self) -> dict[str, str]:
        """Return the query parameters of an API call; most APIs have none."""
        own = {self.place.query: self.values["token"]} if self.place.query else {}
        return own | {k: self._fill(v) for k, v in self.query.items()}

    def rendered_url(self) -> str | None:
        """Return what every URL begins with, where the path holds the credential."""
        if self.place.url is None:
            return None
        quoted = {k: quote(v, safe=":") for k, v in self.values.items()}
        return fill(self.place.url, quoted)

    def rendered_base_url(self) -> str | None:
        """Return the API's address, if it is known."""
        if self.base_url is None or placeholders(self.base_url) - self.values.keys():
            return None
        return self._fill(self.base_url)

    def apply(self, request: httpx.Request) -> httpx.Request:
        """Put the credential into *request*, and return it."""
        parts = urlsplit(str(request.url))
        if parts.scheme != "https" and parts.hostname not in _LOOPBACK:
            raise ConfigurationError(
                f"a credential is not sent to {parts.hostname} without TLS: use https"
            )
        url, query = request.url, self.rendered_query()
        if begin := self.rendered_url():
            path = url.raw_path.decode().lstrip("/")
            url = type(url)(f"{begin.rstrip('/')}/{path}")
            request.headers["Host"] = url.netloc.decode()
        if query:
            url = url.copy_merge_params(query)
        if begin or query:
            request.url = quiet(url, "/***" if begin else None)
        request.headers.update(self.rendered_headers())
        return request

    def _fill(self, template: str) -> str:
        return fill(template, self.values)
