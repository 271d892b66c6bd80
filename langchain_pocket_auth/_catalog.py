"""Providers as data: rows, bundled or the user's own, and their lazy catalog."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from datetime import date
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)

from ._errors import ConfigurationError, UnknownProvider
from ._http import secure_url

BUNDLED = Path(__file__).parent / "providers"
_ID = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_VARIABLE = re.compile(r"\{([a-z_]+)\}")


class AuthProvider(str, Enum):  # noqa: UP042 - the spec's; str() is the id
    """
    A provider by id. Plain strings are accepted wherever one of these is.

    The members are the bundled providers; ids of own providers become members
    when their `Provider` or handler is made.
    """

    GITHUB = "github"
    GOOGLE = "google"
    LINEAR = "linear"
    MICROSOFT = "microsoft"
    NOTION = "notion"
    SLACK = "slack"

    @classmethod
    def _missing_(cls, value: object) -> AuthProvider | None:
        if not isinstance(value, str) or value not in _own_ids:
            return None
        member = str.__new__(cls, value)
        member._name_ = value.upper()
        member._value_ = value
        return cls._value2member_map_.setdefault(value, member)  # type: ignore[return-value]

    def __str__(self) -> str:
        return str(self.value)


_own_ids: set[str] = set()


def register_id(provider: str) -> str:
    """Admit *provider* as a value of `AuthProvider`; return the plain id."""
    value = str(provider.value) if isinstance(provider, Enum) else provider
    if not isinstance(value, str) or not _ID.fullmatch(value):
        raise ConfigurationError(
            f"{value!r} is no provider id: use a-z, 0-9, '-' and '_', 64 at most"
        )
    _own_ids.add(value)
    return value


def _endpoint(url: str) -> str:
    try:
        secure_url(_VARIABLE.sub("x", url), "an endpoint")
    except ConfigurationError as error:
        raise ValueError(str(error)) from None
    return url


Endpoint = Annotated[str, AfterValidator(_endpoint)]


class Variable(BaseModel):
    """A part of a provider's URLs that the app's registration fills in."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    description: str = ""
    default: str | None = None
    pattern: str = r"[A-Za-z0-9][A-Za-z0-9.-]*"


class Provider(BaseModel):
    """
    The facts of one OAuth 2 provider. Names are RFC 8414's, defaults the RFCs'.

    ```python
    PocketAuth(providers=[Provider(
        id="acme",
        authorization_endpoint="https://acme.test/authorize",
        token_endpoint="https://acme.test/token",
    )])
    ```
    The same keys, in a table named by the id, make a TOML file for
    `PocketAuth(providers=["acme.toml"])`. An unknown key is an error.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    display_name: str = ""
    docs: str | None = None
    """Where these facts were read."""
    checked: date | None = None
    sources: int | None = None
    """How many independent sources state the endpoints."""

    authorization_endpoint: Endpoint
    token_endpoint: Endpoint
    revocation_endpoint: Endpoint | None = None
    issuer: str | None = None
    authorization_response_iss_parameter_supported: bool = False

    token_endpoint_auth_method: Literal[
        "client_secret_basic", "client_secret_post", "none"
    ] = "client_secret_basic"
    token_request_format: Literal["form", "json"] = "form"
    token_request_headers: dict[str, str] = {}
    code_challenge_method: Literal["S256", "unsupported"] = "S256"
    redirect_uri_schemes: tuple[Literal["http", "https"], ...] = ("http", "https")

    authorization_parameters: dict[str, str] = {}
    token_parameters: dict[str, str] = {}
    token_response: dict[str, str] = {}
    """Paths in the answer to a code: `access_token = "authed_user.access_token"`.

    Keys: access_token, refresh_token, expires_in, scope, token_type, and
    `success`, a member that must be true. A refresh answer is flat.
    """

    scoped: bool = True
    scope_parameter: str = "scope"
    scope_separator: str = " "
    required_scopes: tuple[str, ...] = ()
    """Asked for every time, whatever a tool needs (`offline_access`)."""
    recommended_scopes: tuple[str, ...] = ()
    scope_aliases: dict[str, str] = {}
    """Other spellings in answers: `email = "https://…/userinfo.email"`."""
    scope_prefix: str = ""
    """A prefix that answers put before a scope, or leave out."""
    scope_implies: dict[str, tuple[str, ...]] = {}
    scopes_not_echoed: tuple[str, ...] = ()
    """Scopes that are granted although answers do not list them."""
    granted_scopes: Literal["exact", "unreliable"] = "exact"

    variables: dict[str, Variable] = {}
    env_keys: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        register_id(self.id)
        used = {
            name
            for url in (
                self.authorization_endpoint,
                self.token_endpoint,
                self.revocation_endpoint or "",
                self.issuer or "",
            )
            for name in _VARIABLE.findall(url)
        }
        if used != self.variables.keys():
            raise ValueError(
                f"URLs use the variables {sorted(used)}, the row declares "
                f"{sorted(self.variables)}"
            )
        return self

    @property
    def handler_name(self) -> str:
        """Name of the OAuth 2 handler: `github-oauth2`."""
        return f"{self.id}-oauth2"

    @cached_property
    def environment_keys(self) -> tuple[str, ...]:
        """Keys of `AuthContext.to_dict`."""
        return self.env_keys or (f"{self.id.upper().replace('-', '_')}_TOKEN",)

    @property
    def label(self) -> str:
        """Name for people."""
        return self.display_name or self.id


class Client(BaseModel):
    """
    The app's registration at one provider.

    Further members fill the variables of the provider's URLs (`tenant`).
    """

    model_config = ConfigDict(extra="allow", frozen=True, hide_input_in_errors=True)

    client_id: str = Field(min_length=1)
    client_secret: SecretStr | None = None

    @property
    def variables(self) -> dict[str, str]:
        """Values for the variables of the provider's URLs."""
        return {k: str(v) for k, v in (self.model_extra or {}).items()}


def read_providers(path: Path) -> list[Provider]:
    """
    Read the providers of a TOML file, one table per id.

    Raises:
        ConfigurationError: The file or a row is wrong; the text names the key.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"providers file {path}: {error}") from error
    return [_row(path.name, name, table) for name, table in tables.items()]


def _row(file: str, name: str, table: Any) -> Provider:
    if not isinstance(table, Mapping):
        raise ConfigurationError(f"{file}: [{name}] is no table of a provider")
    try:
        return Provider(id=name, **table)
    except (ValidationError, TypeError) as error:
        lines = (
            [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
            if isinstance(error, ValidationError)
            else [str(error)]
        )
        raise ConfigurationError(f"{file}: [{name}]: {'; '.join(lines)}") from None


class Catalog:
    """Own rows first, then the bundled ones, each read when first asked for."""

    def __init__(self, own: Iterable[Provider | str | Path] = ()) -> None:
        self._rows: dict[str, Provider] = {}
        for entry in own:
            rows = (
                [entry] if isinstance(entry, Provider) else read_providers(Path(entry))
            )
            self._rows.update((row.id, row) for row in rows)

    def find(self, provider: str) -> Provider | None:
        """Return the row of that id, or `None`."""
        if (row := self._rows.get(provider)) is None and _ID.fullmatch(provider):
            path = BUNDLED / f"{provider}.toml"
            if path.is_file():
                [row] = read_providers(path)
                self._rows[provider] = row
        return row

    def get(self, provider: str) -> Provider:
        """
        Return the row of that id.

        Raises:
            UnknownProvider: There is none; the text says how to add one.
        """
        if (row := self.find(provider)) is None:
            raise UnknownProvider(
                f"no provider {provider!r}: known are {', '.join(self)}; add your own "
                "with PocketAuth(providers=[Provider(...)]) or handlers=[...]"
            )
        return row

    def __iter__(self) -> Iterator[str]:
        """Ids of all providers, sorted."""
        yield from sorted({p.stem for p in BUNDLED.glob("*.toml")} | self._rows.keys())
