"""Rows of the catalog: what is known of a provider, and what the app brings."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    model_validator,
)

from ._placement import placeholders
from ._providers import register_id
from ._row_parts import (
    AccountLookup,
    Api,
    AuthMethod,
    Endpoint,
    Form,
    Paths,
    Revocation,
    TokenExchange,
    Variable,
)

JWT_BEARER = "urn:ietf:params:oauth:grant-type:jwt-bearer"
Method = Literal["oauth2", "token", "basic", "keypair", "client_credentials"]
_METHODS: tuple[Method, ...] = (
    "oauth2",
    "token",
    "basic",
    "keypair",
    "client_credentials",
)
_CLIENT_VALUES = {"token", "client_id", "client_secret"}


class Provider(Api):
    """
    The facts of one provider. Names are RFC 8414's, defaults the RFCs'.

    ```python
    PocketAuth(providers=[Provider(
        id="acme",
        authorization_endpoint="https://acme.test/authorize",
        token_endpoint="https://acme.test/token",
    )])
    ```
    The same keys, in a table named by the id, make a TOML file for
    `PocketAuth(providers=["acme.toml"])`. An unknown key is an error. A row offers
    OAuth 2 (`oauth2`) if it has an authorization endpoint or an issuer to discover it
    from, and each of the forms `token`, `basic` and `keypair` that it has a table for.
    """

    id: str
    display_name: str = ""
    aliases: tuple[str, ...] = ()
    category: str = ""
    docs: str | None = None
    """Where these facts were read."""
    checked: date | None = None
    sources: int | None = None
    """How many independent sources state them."""
    unverified: tuple[str, ...] = ()
    """Keys of this row that no source was seen for."""
    default_method: Method | None = None
    """The handler that is meant when only the provider is named; default: the first."""
    unsupported: str = ""
    """Why there is no way to connect, where there is none."""

    # -- the server (RFC 8414)
    issuer: Endpoint | None = None
    """Alone, it is where the other endpoints are discovered (RFC 8414, OpenID)."""
    authorization_endpoint: Endpoint | None = None
    token_endpoint: Endpoint | None = None
    refresh_endpoint: Endpoint | None = None
    revocation_endpoint: Endpoint | None = None
    pushed_authorization_request_endpoint: Endpoint | None = None
    """Where there is one, the person's browser carries no request (RFC 9126)."""
    device_authorization_endpoint: Endpoint | None = None
    registration_endpoint: Endpoint | None = None
    jwks_uri: Endpoint | None = None
    grant_types_supported: tuple[str, ...] = ("authorization_code", "refresh_token")
    authorization_response_iss_parameter_supported: bool = False

    # -- the authorization request and its answer
    response_type: str = "code"
    """`""`: not sent."""
    code_challenge_method: Literal["S256", "unsupported"] = "S256"
    redirect_uri_prefixes: tuple[str, ...] = ("https://", "http://")
    """What a redirect URI has to begin with."""
    authorization_parameters: dict[str, str] = {}
    resource: str | None = None
    """What the tokens are for, in all requests (RFC 8707): the URL of an MCP server."""
    code_parameter: str = "code"
    callback_members: tuple[str, ...] = ()
    """Parameters of the callback that are kept in `detail`."""

    # -- token requests and their answers
    token_endpoint_auth_method: AuthMethod = "client_secret_basic"
    refresh_endpoint_auth_method: AuthMethod | None = None
    token_request_method: Literal["POST", "GET"] = "POST"
    token_request_format: Literal["form", "json"] = "form"
    token_request_headers: dict[str, str] = {}
    parameter_names: dict[str, str] = {}
    """Other names in all requests: `client_id = "client_key"`."""
    authorization_parameter_names: dict[str, str] = {}
    """The same for the authorization request, where it differs from the others."""
    token_parameters: dict[str, str] = {}
    refresh_parameters: dict[str, str] = {}
    token_response: Paths = {}
    """Paths in the answer to a code: `access_token = "authed_user.access_token"`.

    Keys: access_token, refresh_token, expires_in, expires_at, scope, token_type,
    `success`, a member that must be true, and `error`, one that must be absent, 0 or
    empty.
    """
    refresh_response: Paths = {}
    """The same for the answer to a refresh token, which is flat more often."""
    token_response_members: tuple[str, ...] = ()
    """Members of the answer that are kept in `detail`; paths by their last part."""
    default_expires_in: int | None = None
    """Seconds to take for the lifetime where no answer tells it."""
    account_lookup: AccountLookup | None = None
    token_exchange: TokenExchange | None = None
    revocation: Revocation | None = None

    # -- scopes
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

    # -- ways without OAuth
    token: Form | None = None
    basic: Form | None = None
    keypair: Form | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        register_id(self.id)
        learned = {*self.callback_members}
        learned |= {p.rpartition(".")[2] for p in self.token_response_members}
        if self.account_lookup:
            learned |= self.account_lookup.members.keys()
        self._check_variables(learned)
        known = {*self.variables, *learned, *_CLIENT_VALUES}
        self.check_templates(known)
        sent = self.revocation.parameters.values() if self.revocation else ()
        if unknown := placeholders(*sent) - known:
            raise ValueError(
                f"revoking uses {sorted(unknown)}, known are {sorted(known)}"
            )
        for form in filter(None, (self.token, self.basic, self.keypair)):
            form.check_hosts(self.api_base_url)
        if self.authorization_endpoint and not self.token_endpoint:
            raise ValueError("an authorization endpoint needs a token_endpoint")
        if not self.methods and not self.unsupported:
            raise ValueError(
                "no way to authenticate: give authorization_endpoint and "
                "token_endpoint, an issuer, or a token, basic or keypair table"
            )
        if JWT_BEARER in self.grant_types_supported and not self.token_endpoint:
            raise ValueError("assertions need a token_endpoint")
        names = [self.handler_name(method) for method in self.methods]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two handlers are named {' and '.join(twice)}")
        if self.default_method and self.default_method not in self.methods:
            raise ValueError(f"default_method is one of {', '.join(self.methods)}")
        return self

    def _check_variables(self, learned: set[str]) -> None:
        # What is typed into a key pair's form may be a part of where tokens are made.
        by_key = self.keypair is not None and self.authorization_endpoint is None
        typed = self.keypair.fields.keys() if self.keypair and by_key else set()
        unknown = placeholders(*self._templates()) - self.variables.keys() - typed
        if unknown:
            raise ValueError(
                f"URLs and parameters use {sorted(unknown)}, which is not among the "
                f"row's variables {sorted(self.variables)}"
            )
        unused = self.variables.keys() - placeholders(
            *self._templates(), *self.api_templates()
        )
        if unused:
            raise ValueError(f"nothing uses the variables {sorted(unused)}")
        if both := self.variables.keys() & learned:
            raise ValueError(f"{sorted(both)} are variables and kept members")
        for name, variable in self.variables.items():
            has_pattern = "pattern" in variable.model_fields_set
            if variable.callback_parameter and not has_pattern:
                raise ValueError(
                    f"variables.{name}: a callback names a host here, so a pattern has "
                    "to list those that may be sent the app's secret"
                )

    def _templates(self) -> Iterator[str]:
        endpoints = [
            self.issuer,
            self.authorization_endpoint,
            self.token_endpoint,
            self.refresh_endpoint,
            self.revocation_endpoint,
            self.pushed_authorization_request_endpoint,
            self.device_authorization_endpoint,
            self.registration_endpoint,
            self.jwks_uri,
        ]
        if self.account_lookup:
            endpoints.append(self.account_lookup.endpoint)
        if self.token_exchange:
            endpoints.append(self.token_exchange.endpoint)
            endpoints.append(self.token_exchange.refresh_endpoint)
        if self.revocation:
            endpoints.append(self._of_variables(self.revocation.endpoint))
        for endpoint in filter(None, endpoints):
            # Microsoft's: the tenant is named by the ID token.
            yield endpoint.replace("{tenantid}", "")
        for parameters in (
            self.authorization_parameters,
            self.token_parameters,
            self.refresh_parameters,
            self.token_request_headers,
        ):
            yield from parameters.values()

    @staticmethod
    def _of_variables(template: str) -> str:
        for name in _CLIENT_VALUES:
            template = template.replace(f"{{{name}}}", "")
        return template

    @property
    def methods(self) -> tuple[Method, ...]:
        """The ways to authenticate, the default first."""
        found = [m for m in _METHODS if self._offers(m)]
        if self.default_method in found:
            found.remove(self.default_method)
            found.insert(0, self.default_method)
        return tuple(found)

    def _offers(self, method: Method) -> bool:
        if self.unsupported:
            return False
        if method == "oauth2":
            # An issuer alone is enough: the endpoints are discovered.
            return bool(self.authorization_endpoint) or self.is_discovered
        if method == "client_credentials":
            return method in self.grant_types_supported and bool(self.token_endpoint)
        return getattr(self, method) is not None

    @property
    def is_discovered(self) -> bool:
        """Whether the endpoints are read from the issuer's metadata."""
        return bool(self.issuer) and not self.token_endpoint

    def form(self, method: str) -> Form | None:
        """Return the form of a method, if it is one."""
        forms = {"token": self.token, "basic": self.basic, "keypair": self.keypair}
        return forms.get(method)

    def handler_name(self, method: str) -> str:
        """Name of the handler of a method: `github-oauth2`."""
        if (form := self.form(method)) and form.handler:
            return form.handler
        return f"{self.id}-{method}".replace("_", "-")

    @property
    def environment_keys(self) -> tuple[str, ...]:
        """Keys of `AuthContext.to_dict` for OAuth 2."""
        return self.env_keys or (f"{self.env_prefix}_TOKEN",)

    @property
    def env_prefix(self) -> str:
        """What names of settings and environment keys begin with."""
        return self.id.upper().replace("-", "_")

    @property
    def label(self) -> str:
        """Name for people."""
        return self.display_name or self.id


def _masked(value: Any) -> SecretStr:
    return value if isinstance(value, SecretStr) else SecretStr(str(value))


class Client(BaseModel):
    """
    The app's registration at one provider.

    Further members fill the variables of the provider's URLs (`tenant`), or the
    fields of a form: then nobody is asked, because the app itself connects.
    """

    model_config = ConfigDict(extra="allow", frozen=True, hide_input_in_errors=True)

    client_id: str = Field(default="", min_length=1)
    client_secret: SecretStr | None = None
    token_endpoint_auth_method: AuthMethod | None = None
    """As chosen where the app was registered; default: the row's."""
    redirect_uri: str | None = None
    """What to send in its place, where the provider knows it by another name."""
    authorization_parameters: dict[str, str] = Field(default_factory=dict)
    """Further parameters of the app's: `{"audience": "https://api.acme.test"}`."""
    device_in_public: bool = False
    """Whether codes for other machines are given out with `public_url`, too."""

    # They may be keys: masked in every dump.
    __pydantic_extra__: dict[str, Annotated[SecretStr, BeforeValidator(_masked)]] = (
        Field(init=False)
    )

    @property
    def variables(self) -> dict[str, str]:
        """Values for the variables of the provider's URLs, and for fields of forms."""
        extra = (self.model_extra or {}).items()
        return {name: _masked(value).get_secret_value() for name, value in extra}

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        # Further members may be keys.
        yield "client_id", self.client_id
