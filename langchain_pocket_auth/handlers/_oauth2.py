"""OAuth 2 authorization code with PKCE, driven by a catalog row (RFC 6749, 7636)."""

from __future__ import annotations

import hashlib
import re
import secrets
from base64 import urlsafe_b64encode
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, ClassVar, Self
from urllib.parse import quote_plus, urlencode, urlsplit

from .._catalog import AuthProvider, Client, Provider
from .._errors import (
    ConfigurationError,
    GrantRevoked,
    MissingClient,
    TokenRequestError,
)
from .._futures import FutureData, FutureStore
from .._http import Answer, Http
from .._models import AuthContext, AuthenticateRequest
from ._answers import OAuth2Context, checked, context_of
from ._base import AuthHandlerInterface

# What servers say for "this refresh token is no good"; the last two are Slack's.
_GONE = frozenset({"invalid_grant", "token_revoked", "invalid_refresh_token"})


class OAuth2Request(AuthenticateRequest):
    """The app's registration and where the person comes back to."""

    client_id: str
    client_secret: str | None = None
    redirect_uri: str


@dataclass(frozen=True, slots=True)
class Registration:
    """What the app brings: where callbacks arrive, its clients, its HTTP client."""

    base_url: str
    client: Client | None
    http: Http


class OAuth2Handler(AuthHandlerInterface):
    """
    The handler of a row. Oddities that are values live in the row.

    What is behaviour is a subclass with `row = Provider(...)` that overrides one
    method, passed as `PocketAuth(handlers=[MyHandler])`.
    """

    row: ClassVar[Provider]
    registration: Registration | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if row := vars(cls).get("row"):
            cls.name = vars(cls).get("name", row.handler_name)
            cls.description = f"Connects {row.label} accounts by OAuth 2."
            cls.scoped = row.scoped

    @classmethod
    def of(cls, row: Provider) -> type[Self]:
        """Return the handler class of a row."""
        name = f"{row.label.title().replace(' ', '')}OAuth2Handler"
        return type(name, (cls,), {"row": row, "__module__": cls.__module__})

    def bind(self, registration: Registration) -> None:
        """Receive what `PocketAuth` knows and the row does not."""
        self.registration = registration

    # `type(self).row` is what the spec's static methods read in a hand-written class.
    @classmethod
    def provider(cls) -> AuthProvider:
        return AuthProvider(cls.row.id)

    @staticmethod
    def provider_default() -> bool:
        return True

    @classmethod
    def recommended_scopes(cls) -> set[str]:
        return set(cls.row.recommended_scopes)

    # ------------------------------------------------------------ request and URL

    def make_request(
        self, auth_scopes: list[str] | None = None, **kwargs: Any
    ) -> OAuth2Request:
        """
        Make the request; raises what is wrong with the app's settings.

        Raises:
            MissingClient: No client id or secret; the text names the settings.
            ConfigurationError: The provider does not redirect to this base URL.
        """
        del kwargs
        client = self._client
        row, known = self.row, self._registration
        scheme = urlsplit(known.base_url).scheme
        if scheme not in row.redirect_uri_schemes:
            raise ConfigurationError(
                f"{row.label} redirects to {row.redirect_uri_schemes[0]} addresses "
                f"only, and base_url is {scheme}: serve the callback behind "
                f"{row.redirect_uri_schemes[0]} and set base_url to it"
            )
        return OAuth2Request(
            auth_scopes=list(auth_scopes or ()),
            client_id=client.client_id,
            client_secret=client.client_secret.get_secret_value()
            if client.client_secret
            else None,
            redirect_uri=f"{known.base_url}/auth/{row.id}/oauth2/callback",
        )

    async def prepare(  # type: ignore[override]
        self,
        auth_req: OAuth2Request,
        thread_id: str,
        profile: str,
        future_uid: str,
        *args: Any,
        future: FutureData | None = None,
        **kwargs: Any,
    ) -> str:
        """Return the authorization URL (RFC 6749 section 4.1.1, RFC 7636)."""
        del thread_id, profile, args, kwargs
        row = self.row
        attempt = future or FutureStore.create_future(future_uid)
        scopes = list(
            dict.fromkeys([*(auth_req.auth_scopes or ()), *row.required_scopes])
        )
        parameters = {
            **row.authorization_parameters,
            "response_type": "code",
            "client_id": auth_req.client_id,
            "redirect_uri": auth_req.redirect_uri,
            "state": future_uid,
        }
        if row.scoped and scopes:
            parameters[row.scope_parameter] = row.scope_separator.join(scopes)
        attempt.data["redirect_uri"] = auth_req.redirect_uri
        if row.code_challenge_method == "S256":
            verifier = secrets.token_urlsafe(48)
            digest = hashlib.sha256(verifier.encode()).digest()
            attempt.data["code_verifier"] = verifier
            parameters["code_challenge"] = (
                urlsafe_b64encode(digest).decode().rstrip("=")
            )
            parameters["code_challenge_method"] = "S256"
        endpoint = self._url(row.authorization_endpoint)
        return f"{endpoint}{'&' if '?' in endpoint else '?'}{urlencode(parameters)}"

    # -------------------------------------------------------------- token requests

    async def authenticate(  # type: ignore[override]
        self,
        auth_req: OAuth2Request,
        future_uid: str,
        *args: Any,
        future: FutureData | None = None,
        **kwargs: Any,
    ) -> OAuth2Context:
        """
        Exchange the code (RFC 6749 section 4.1.3).

        Raises:
            TokenRequestError: The provider refused the code.
            ProviderUnavailable: No usable answer; the code is spent.
        """
        del args, kwargs
        attempt = future or FutureStore.get_future(future_uid)
        code = await attempt.future
        grant = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": attempt.data["redirect_uri"],
            **self.row.token_parameters,
        }
        if verifier := attempt.data.get("code_verifier"):
            grant["code_verifier"] = verifier
        sent = datetime.now(UTC)
        answer = await self._token_request(auth_req, grant)
        return context_of(self.row, answer, sent, self.row.token_response)

    async def refresh(  # type: ignore[override]
        self,
        auth_req: OAuth2Request,
        context: OAuth2Context,
        *args: Any,
        **kwargs: Any,
    ) -> OAuth2Context:
        """
        Renew the token (RFC 6749 section 6).

        A new refresh token replaces the old one; without one the old stays.

        Raises:
            GrantRevoked: The refresh token is no good any more.
            ConfigurationError: The provider does not accept the app itself.
            ProviderUnavailable: Retry later.
        """
        del args, kwargs
        if context.refresh_token is None:
            raise GrantRevoked(
                f"{self.row.label} gave no refresh token", provider=self.row.id
            )
        grant = {"grant_type": "refresh_token", "refresh_token": context.refresh_token}
        sent = datetime.now(UTC)
        try:
            answer = await self._token_request(auth_req, grant)
        except TokenRequestError as error:
            if error.code in _GONE:
                raise GrantRevoked(
                    f"{self.row.label} withdrew the grant ({error.code})",
                    provider=self.row.id,
                ) from None
            raise
        new = context_of(self.row, answer, sent, {})
        return new.model_copy(
            update={
                "refresh_token": new.refresh_token or context.refresh_token,
                "id_token": new.id_token or context.id_token,
                "detail": new.detail or context.detail,
                # Absent means unchanged (RFC 6749 section 6).
                "scopes": context.scopes if new.scopes is None else new.scopes,
            }
        )

    async def revoke(self, auth_req: AuthenticateRequest, context: AuthContext) -> bool:
        """Revoke the refresh token, then the access token (RFC 7009 section 2.1)."""
        if self.row.revocation_endpoint is None:
            return False
        if not isinstance(auth_req, OAuth2Request):
            return False
        done = True
        for hint in ("refresh_token", "access_token"):
            if token := getattr(context, hint, None):
                answer = await self._post(
                    self._url(self.row.revocation_endpoint),
                    auth_req,
                    {"token": token, "token_type_hint": hint},
                )
                done = done and answer.status == 200  # noqa: PLR2004
        return done

    async def _token_request(
        self, auth_req: OAuth2Request, grant: Mapping[str, str]
    ) -> dict[str, Any]:
        answer = await self._post(self._url(self.row.token_endpoint), auth_req, grant)
        return checked(self.row, answer)

    async def _post(
        self, url: str, auth_req: OAuth2Request, form: Mapping[str, str]
    ) -> Answer:
        row, basic, data = self.row, None, dict(form)
        if row.token_endpoint_auth_method == "client_secret_basic" and (
            auth_req.client_secret is not None
        ):
            # Both are form-encoded first (RFC 6749 section 2.3.1).
            basic = (quote_plus(auth_req.client_id), quote_plus(auth_req.client_secret))
        else:
            data["client_id"] = auth_req.client_id
            if row.token_endpoint_auth_method != "none" and auth_req.client_secret:
                data["client_secret"] = auth_req.client_secret
        return await self._registration.http.post(
            url,
            provider=row.id,
            data=data,
            as_json=row.token_request_format == "json",
            # GitHub answers form-encoded without this.
            headers={"Accept": "application/json", **row.token_request_headers},
            auth=basic,
        )

    # ------------------------------------------------------- what the engine asks

    def connection(self) -> str:
        """The handler, and the tenant where there is one."""
        values = self._variables(strict=False)
        return (
            f"{self.name}?{urlencode(sorted(values.items()))}" if values else self.name
        )

    def missing_scopes(
        self, granted: Collection[str], needed: Collection[str]
    ) -> list[str]:
        """Compare in the provider's own spelling of scopes."""
        row = self.row
        if not row.scoped or row.granted_scopes == "unreliable":
            return []
        have: set[str] = set()
        todo = [self._spelled(scope) for scope in granted]
        while todo:
            scope = todo.pop()
            if scope not in have:
                have.add(scope)
                todo += map(self._spelled, row.scope_implies.get(scope, ()))
        have.update(map(self._spelled, row.scopes_not_echoed))
        return [s for s in needed if self._spelled(s) not in have]

    def _spelled(self, scope: str) -> str:
        return self.row.scope_aliases.get(scope, scope).removeprefix(
            self.row.scope_prefix
        )

    def can_refresh(self, context: AuthContext) -> bool:
        """Whether there is a refresh token."""
        return getattr(context, "refresh_token", None) is not None

    def check_issuer(self, issuer: str | None) -> bool:
        """Compare exactly, without normalising (RFC 9207 section 2.4)."""
        if self.row.issuer is None:
            return True
        if issuer is None:
            return not self.row.authorization_response_iss_parameter_supported
        return issuer == self._url(self.row.issuer)

    # ------------------------------------------------------------------ settings

    @property
    def _registration(self) -> Registration:
        if self.registration is None:
            raise ConfigurationError(
                f"{self.name} is not bound: pass it as PocketAuth(handlers=[...])"
            )
        return self.registration

    @property
    def _client(self) -> Client:
        row, client = self.row, self._registration.client
        setting = f"POCKET_AUTH_CLIENTS__{row.id.upper()}__CLIENT"
        if client is None:
            raise MissingClient(
                f"the app is not registered for {row.label}: set {setting}_ID and "
                f'{setting}_SECRET, or PocketAuth(clients={{"{row.id}": '
                '("client id", "client secret")})'
                + (f"; where to register: {row.docs}" if row.docs else "")
            )
        if client.client_secret is None and row.token_endpoint_auth_method != "none":
            raise MissingClient(
                f"{row.label} wants a client secret: set {setting}_SECRET"
            )
        return client

    def _variables(self, *, strict: bool) -> dict[str, str]:
        client = self._registration.client
        given = client.variables if client else {}
        values = {}
        for name, variable in self.row.variables.items():
            value = given.get(name, variable.default)
            if value is not None and re.fullmatch(variable.pattern, value):
                values[name] = value
            elif strict:
                raise ConfigurationError(
                    f"{self.row.label} needs {name} ({variable.description}): set "
                    f"POCKET_AUTH_CLIENTS__{self.row.id.upper()}__{name.upper()}"
                )
        return values

    def _url(self, template: str) -> str:
        return template.format_map(self._variables(strict=True))
