"""What rows are made of: forms, variables, places of a credential, look-ups."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    model_validator,
)

from ._errors import ConfigurationError
from ._http import secure_url
from ._placement import BEARER, Placement, placeholders

AuthMethod = Literal["client_secret_basic", "client_secret_post", "none"]


def _endpoint(url: str) -> str:
    try:
        secure_url(re.sub(r"\{[a-z_]+\}", "x", url), "an endpoint")
    except ConfigurationError as error:
        raise ValueError(str(error)) from None
    return url


Endpoint = Annotated[str, AfterValidator(_endpoint)]


def _pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"no regular expression: {error}") from None
    return pattern


Pattern = Annotated[str, AfterValidator(_pattern)]
_MEMBERS = (
    "access_token",
    "refresh_token",
    "expires_in",
    "expires_at",
    "scope",
    "token_type",
    "success",
    "error",
)


def _paths(paths: dict[str, str]) -> dict[str, str]:
    if unknown := sorted(paths.keys() - set(_MEMBERS)):
        raise ValueError(f"unknown {unknown}; known are {', '.join(_MEMBERS)}")
    return paths


Paths = Annotated[dict[str, str], AfterValidator(_paths)]


class Row(BaseModel):
    """Facts: strict, and not to be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Api(Row):
    """What calls of an API look like."""

    api_base_url: str | None = None
    api_credential: Placement = BEARER
    api_headers: dict[str, str] = {}
    api_query: dict[str, str] = {}

    def api_templates(self) -> Iterator[str]:
        """Return all texts with placeholders."""
        yield from self.api_credential.templates
        yield from self.api_headers.values()
        yield from self.api_query.values()
        if self.api_base_url:
            yield self.api_base_url

    def check_templates(self, known: set[str]) -> None:
        """
        See that calls use values that there are.

        Raises:
            ValueError: They use another.
        """
        if unknown := placeholders(*self.api_templates()) - known:
            raise ValueError(
                f"API calls use {sorted(unknown)}, known are {sorted(known)}"
            )


class Variable(Row):
    """A part of a provider's URLs that the app's registration fills in."""

    description: str = ""
    default: str | None = None
    pattern: Pattern = r"[A-Za-z0-9][A-Za-z0-9.-]*"
    callback_parameter: str | None = None
    """A parameter of the callback that says it for this person, if it fits."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.default and not re.fullmatch(self.pattern, self.default):
            raise ValueError(f"the default does not fit {self.pattern}")
        return self


class FormField(Row):
    """One input of a form."""

    label: str
    secret: bool = False
    required: bool = True
    multiline: bool = False
    """A text area: for keys in PEM."""
    pattern: Pattern | None = None
    """What a value has to match as a whole."""
    env_key: str | None = None
    """Key in `AuthContext.to_dict`; default `<ID>_<FIELD>`."""


_ONE_TOKEN = {"token": FormField(label="API key or token", secret=True)}


class Form(Api):
    """A way to connect by typing: an API key, a user and password, a key pair."""

    handler: str | None = None
    """Name of the handler; default `<id>-<method>`."""
    fields: dict[str, FormField] = _ONE_TOKEN
    env_keys: tuple[str, ...] = ()
    """Keys of the access token in `AuthContext.to_dict`, beside those of fields."""
    docs: str | None = None
    """Where a person finds what is asked for; default: the row's `docs`."""
    note: str = ""
    """One more sentence for the person."""

    @model_validator(mode="after")
    def _placed(self) -> Self:
        known = {*self.fields, "token"}
        self.check_templates(known)
        if not self.fields:
            raise ValueError("a form has at least one field")
        if not any(f.secret for f in self.fields.values()):
            raise ValueError("a form has at least one secret field")
        return self

    def check_hosts(self, base_url: str | None) -> None:
        """
        See that what a person types does not decide freely where requests go.

        Raises:
            ValueError: A field is a part of URLs and has no pattern.
        """
        urls = (self.api_base_url or base_url, self.api_credential.url)
        for name in placeholders(*urls) & self.fields.keys():
            field = self.fields[name]
            if field.pattern is None and not field.secret:
                raise ValueError(f"{name} is a part of URLs: give it a pattern")


class AccountLookup(Row):
    """
    A request after the token that tells which accounts or sites it reaches.

    The members of the chosen one become values of the connection, for URLs and
    headers of API calls. If there are several, the person chooses.
    """

    endpoint: Endpoint
    list: str = ""
    """Path of the array in the answer; `""`: the answer itself, array or object."""
    id: str = "id"
    """What tells one from the others."""
    label: str = "name"
    """What a person knows it by."""
    members: dict[str, str]
    """Value to member: `cloud_id = "id"`."""
    prefix: str = "Bearer "
    """Before the token in Authorization."""


class TokenExchange(Row):
    """
    A second token in place of the first, and in place of refreshing.

    Meta's: a short-lived token is exchanged for one that lives 60 days.
    """

    endpoint: Endpoint
    grant_type: str
    token_parameter: str = "access_token"
    method: Literal["GET", "POST"] = "GET"
    refresh_endpoint: Endpoint | None = None
    """Default: the exchange again, with the token that is still good."""
    refresh_grant_type: str | None = None


class Revocation(Row):
    """A way to revoke that is not RFC 7009."""

    endpoint: Endpoint
    method: Literal["POST", "DELETE", "GET"] = "POST"
    format: Literal["form", "json"] = "form"
    basic: bool = False
    """Basic authentication with the app's id and secret."""
    headers: dict[str, str] = {}
    parameters: dict[str, str] = {}
    """May name `{token}`, `{client_id}`, `{client_secret}` and kept members."""
