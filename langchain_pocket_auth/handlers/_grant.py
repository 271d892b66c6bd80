"""Grants of OAuth 2: kept alive, compared, given back (RFC 6749, 7009)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from .._errors import (
    ConfigurationError,
    GrantRevoked,
    MissingClient,
    TokenRequestError,
)
from .._models import AuthContext, AuthenticateRequest, Choice
from .._placement import fill, placeholders
from .._rows import Client, Provider
from ._answers import OAuth2Context, checked, context_of
from ._discovery import discover, with_metadata
from ._openid import identity_of
from ._row import RowHandler
from ._token_requests import App, TokenRequests, revoked

# What servers say for "this refresh token is no good"; the last two are Slack's.
_GONE = frozenset({"invalid_grant", "token_revoked", "invalid_refresh_token"})


class OAuth2Request(AuthenticateRequest):
    """The app's registration and where the person comes back to."""

    client_id: str
    client_secret: str | None = None
    redirect_uri: str


class GrantHandler(RowHandler):
    """What all OAuth 2 handlers of a row do, however the grant was obtained."""

    @classmethod
    def _is_scoped(cls, row: Provider) -> bool:
        return row.scoped

    @classmethod
    def recommended_scopes(cls) -> set[str]:
        return set(cls.row.recommended_scopes)

    # -------------------------------------------------------------- token requests

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
            GrantRevoked: The refresh token is no good any more, or the provider forgot
                the client that was registered for it.
            ConfigurationError: The provider does not accept the app itself.
            ProviderUnavailable: Retry later.
        """
        del args, kwargs
        row = await self._server()
        app = await self._app(row, auth_req, context.client)
        try:
            if row.token_exchange:
                new = await self._exchanged(row, app, context, refresh=True)
            else:
                new = await self._refreshed(row, app, context)
        except ConfigurationError:
            if context.client is None:
                raise
            # Nobody can repair a registration that was made by itself.
            await self._requests(row).forget_registration(auth_req)
            raise GrantRevoked(
                f"{row.label} does not know the client any more that was registered "
                "there",
                provider=row.id,
            ) from None
        except TokenRequestError as error:
            if error.code in _GONE:
                raise GrantRevoked(
                    f"{row.label} withdrew the grant ({error.code})", provider=row.id
                ) from None
            raise
        detail = {**(context.detail or {}), **(new.detail or {})}
        return new.model_copy(
            update={
                "refresh_token": new.refresh_token or context.refresh_token,
                "id_token": new.id_token or context.id_token,
                "detail": detail or None,
                "account": context.account,
                "description": context.description,
                "client": context.client,
                # Absent means unchanged (RFC 6749 section 6).
                "scopes": context.scopes if new.scopes is None else new.scopes,
            }
        )

    async def _refreshed(
        self, row: Provider, app: App, context: OAuth2Context
    ) -> OAuth2Context:
        if context.refresh_token is None:
            raise GrantRevoked(f"{row.label} gave no refresh token", provider=row.id)
        values = self._variables(strict=True, learned=context.detail)
        grant = {
            "grant_type": "refresh_token",
            "refresh_token": context.refresh_token,
            **{k: fill(v, values) for k, v in row.refresh_parameters.items()},
            **self._resource,
        }
        endpoint = row.refresh_endpoint or required(row.token_endpoint)
        sent = datetime.now(UTC)
        answer = await self._requests(row).ask(
            self._url(endpoint, context.detail), app, grant, refresh=True
        )
        paths = {**row.token_response, **row.refresh_response}
        return context_of(row, checked(row, answer), sent, paths)

    async def _exchanged(
        self, row: Provider, app: App, context: OAuth2Context, *, refresh: bool
    ) -> OAuth2Context:
        """Put a longer-lived token in the place of *context*'s (Meta's way)."""
        sent = datetime.now(UTC)
        answer = await self._requests(row).exchange(
            app, context.access_token, self._url, refresh=refresh
        )
        new = context_of(row, checked(row, answer), sent, row.token_response)
        detail = {**(context.detail or {}), **(new.detail or {})}
        update = {"detail": detail or None, "scopes": new.scopes or context.scopes}
        return new.model_copy(update=update)

    async def _completed(
        self,
        row: Provider,
        app: App,
        auth_req: OAuth2Request,
        context: OAuth2Context,
        *,
        nonce: str | None = None,
    ) -> OAuth2Context:
        """Exchange, identify and look up, where the row says so."""
        try:
            if row.token_exchange:
                context = await self._exchanged(row, app, context, refresh=False)
            if row.issuer and "openid" in self._scopes(row, auth_req):
                await self._identify(row, row.issuer, app, context, nonce=nonce)
            if row.account_lookup:
                await self._requests(row).look_up(context, self._url)
        except Exception:
            with suppress(Exception):  # what went wrong first is what is told
                await self.revoke(auth_req, context)  # nobody would know of it
            raise
        return context

    async def _identify(
        self,
        row: Provider,
        issuer: str,
        app: App,
        context: OAuth2Context,
        *,
        nonce: str | None,
    ) -> None:
        """Learn from the ID token whose account it is."""
        if context.id_token is None:
            raise TokenRequestError(
                f"{row.label} sent no ID token, though openid was asked for",
                provider=row.id,
                code="invalid_id_token",
                status=200,
            )
        identity = await identity_of(
            self._registration.http,
            provider=row.id,
            id_token=context.id_token,
            issuer=self._issuer(issuer),
            client_id=app.client_id,
            nonce=nonce,
            jwks_uri=self._url(row.jwks_uri) if row.jwks_uri else None,
            now=datetime.now(UTC),
        )
        context.account = identity.label
        context.description = f"{row.label} account of {identity.label}"

    def can_revoke(self, context: AuthContext) -> bool:  # noqa: ARG002
        """Whether there is a place for it, or may be: a server may tell later."""
        row = self.row
        return bool(row.revocation or row.revocation_endpoint or row.is_discovered)

    async def revoke(self, auth_req: AuthenticateRequest, context: AuthContext) -> bool:
        """
        Revoke the refresh token, then the access token (RFC 7009 section 2.1).

        The grant is over with its refresh token, so that one counts where there is
        one: not every server revokes access tokens (section 2.2.1).

        Raises:
            ProviderUnavailable: No answer, or one that says "later".
            ConfigurationError: The provider does not accept the app itself.
        """
        if not isinstance(auth_req, OAuth2Request):
            return False
        row = await self._server()
        requests = self._requests(row)
        app = await self._app(row, auth_req, getattr(context, "client", None))
        if row.revocation:
            values = {
                **self._values(context),
                "client_id": app.client_id,
                "client_secret": app.client_secret or "",
            }
            return await requests.revoke_oddly(app, values)
        if row.revocation_endpoint is None:
            return False
        endpoint = self._url(row.revocation_endpoint, context.detail)
        hints = ("refresh_token", "access_token")
        answers = [
            await requests.ask(endpoint, app, form, odd=False)
            for hint in hints
            if (token := getattr(context, hint, None))
            for form in ({"token": token, "token_type_hint": hint},)
        ]
        # All are sent before one is judged: what can be withdrawn now, is.
        judged = [revoked(row, answer) for answer in answers]
        return all(judged[:1])

    # ------------------------------------------------------- what the engine asks

    def missing_scopes(
        self, granted: Collection[str], needed: Collection[str]
    ) -> list[str]:
        """Compare in the provider's own spelling of scopes."""
        row = self.row
        if not row.scoped or row.granted_scopes == "unreliable":
            return []
        implied = {self._spelled(s): more for s, more in row.scope_implies.items()}
        have: set[str] = set()
        todo = [self._spelled(scope) for scope in granted]
        while todo:
            scope = todo.pop()
            if scope not in have:
                have.add(scope)
                todo += map(self._spelled, implied.get(scope, ()))
        have.update(map(self._spelled, row.scopes_not_echoed))
        return [s for s in needed if self._spelled(s) not in have]

    def _spelled(self, scope: str) -> str:
        scope = self.row.scope_aliases.get(scope, scope)
        # Microsoft answers "User.Read" where "user.read" was asked for.
        return scope.removeprefix(self.row.scope_prefix).casefold()

    def can_refresh(self, context: AuthContext) -> bool:
        """Whether there is a refresh token, or a token that can be exchanged."""
        if self.row.token_exchange:
            return True
        return getattr(context, "refresh_token", None) is not None

    def choices(self, context: AuthContext) -> Sequence[Choice]:
        """Return the accounts that a look-up found, if there are several."""
        found = getattr(context, "choices", None) or ()
        return [Choice(each["id"], each["label"]) for each in found]

    def chosen(self, context: AuthContext, choice: str) -> AuthContext:
        """Return *context* with what is kept of the chosen account."""
        [members] = [
            each["members"]
            for each in getattr(context, "choices", None) or ()
            if each["id"] == choice
        ]
        detail = {**(context.detail or {}), **members}
        return context.model_copy(update={"detail": detail, "choices": None})

    def environment(self) -> dict[str, str]:
        return dict.fromkeys(self.row.environment_keys, "access_token")

    def secrets(self, context: AuthContext) -> tuple[str, ...]:
        placed = self.placement(context)
        named = placeholders(*placed.headers.values(), *placed.query.values())
        secret = (
            placed.values.get("client_secret") if "client_secret" in named else None
        )
        return (context.access_token, *([secret] if secret else []))

    def _values(self, context: AuthContext) -> dict[str, str]:
        values = super()._values(context)
        values |= {
            name: value
            for name, value in (getattr(context, "client", None) or {}).items()
            if name in {"client_id", "client_secret"}
        }
        kept = context.detail if isinstance(context.detail, Mapping) else {}
        return values | {k: str(v) for k, v in kept.items() if v is not None}

    # ------------------------------------------------------------------ settings

    @staticmethod
    def _scopes(row: Provider, request: AuthenticateRequest) -> list[str]:
        """Return what is asked for: what tools need, and what the row always wants."""
        asked = [*(request.auth_scopes or ()), *row.required_scopes]
        return list(dict.fromkeys(asked)) if row.scoped else []

    @classmethod
    def _scope_of(cls, row: Provider, request: AuthenticateRequest) -> dict[str, str]:
        scopes = row.scope_separator.join(cls._scopes(row, request))
        return {row.scope_parameter: scopes} if scopes else {}

    async def _server(self) -> Provider:
        """Return the row, with what its issuer's metadata tells."""
        row = self.row
        if not row.is_discovered or row.issuer is None:
            return row
        http = self._registration.http
        issuer = self._url(row.issuer)
        return with_metadata(row, await discover(http, issuer, provider=row.id))

    def _issuer(self, template: str) -> str:
        # Microsoft's: the tenant is not known before its ID token.
        tenant = {"tenantid": "{tenantid}"}
        return fill(template, self._variables(strict=True) | tenant)

    async def _app(
        self,
        row: Provider,
        request: AuthenticateRequest,
        registered: Mapping[str, str] | None = None,
    ) -> App:
        """Return the client of a request, or the one that was registered for it."""
        if registered is not None:
            return App.of_data(registered)
        return await self._requests(row).app(request)

    def _requests(self, row: Provider) -> TokenRequests:
        return TokenRequests(row, self._registration, self.connection())

    @property
    def _client(self) -> Client:
        """
        Return the app's registration; an empty one where it registers itself.

        Raises:
            MissingClient: There is none, or a part is missing.
        """
        row, client = self.row, self._registration.client
        if client is None or not client.client_id:
            if row.is_discovered or row.registration_endpoint:
                return client or Client()
            raise MissingClient(
                f"the app is not registered for {row.label}: set "
                f"{self._setting}CLIENT_ID and {self._setting}CLIENT_SECRET, or "
                f'PocketAuth(clients={{"{row.id}": ("client id", "client secret")}})'
                + (f"; where to register: {row.docs}" if row.docs else "")
                + "".join(
                    f'; without an app, people type a key: handler="{name}"'
                    for method in row.methods
                    if row.form(method)
                    for name in [row.handler_name(method)]
                )
            )
        method = client.token_endpoint_auth_method or row.token_endpoint_auth_method
        # A discovered server says its methods later.
        needs_secret = method != "none" and not row.is_discovered
        if client.client_secret is None and needs_secret and not self.members:
            raise MissingClient(
                f"{row.label} wants a client secret: set {self._setting}CLIENT_SECRET"
            )
        return client


def required(endpoint: str | None) -> str:
    assert endpoint is not None  # noqa: S101 - the row's validator, or discovery
    return endpoint
