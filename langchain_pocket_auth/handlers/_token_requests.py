"""Requests to a provider's server as its row says: clients, forms, look-ups."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote_plus

from .._cards import plain
from .._errors import (
    ConfigurationError,
    MissingClient,
    ProviderUnavailable,
    TokenRequestError,
)
from .._http import TRANSIENT_STATUS, Answer
from .._models import AuthenticateRequest
from .._placement import fill
from .._row_parts import AccountLookup, AuthMethod
from .._rows import Provider
from ._answers import OAuth2Context, member
from ._discovery import register
from ._row import Registration

Url = Callable[..., str]
MAX_ID = 512  # characters of what tells an account from the others


@dataclass(frozen=True, slots=True, repr=False)
class App:
    """The client that a request is made for; no repr, because it holds the secret."""

    client_id: str
    client_secret: str | None
    auth_method: AuthMethod
    registered: bool = False
    """Whether it was registered by itself (RFC 7591)."""

    def as_data(self) -> dict[str, str]:
        """Return what `of_data` takes, for the sealed attempt or context."""
        data = {"client_id": self.client_id, "auth_method": self.auth_method}
        if self.client_secret is not None:
            data["client_secret"] = self.client_secret
        return data | ({"registered": "yes"} if self.registered else {})

    @classmethod
    def of_data(cls, data: Mapping[str, str]) -> App:
        """Return the client of sealed data."""
        return cls(
            data["client_id"],
            data.get("client_secret"),
            data["auth_method"],  # type: ignore[arg-type]
            registered="registered" in data,
        )


class TokenRequests:
    """What is asked of one server, for one app."""

    def __init__(
        self, row: Provider, registration: Registration, connection: str
    ) -> None:
        self._row, self._known, self._connection = row, registration, connection

    async def app(self, request: AuthenticateRequest) -> App:
        """
        Return the client of a request; registers one where the app has none.

        Raises:
            ConfigurationError: The server does not register clients.
            ProviderUnavailable: It does not answer.
        """
        row, client = self._row, self._known.client
        method = row.token_endpoint_auth_method
        if client and client.token_endpoint_auth_method:
            method = client.token_endpoint_auth_method
        client_id = getattr(request, "client_id", "")
        if client_id:
            return App(client_id, getattr(request, "client_secret", None), method)
        return await self._registered(getattr(request, "redirect_uri", ""), method)

    async def _registered(self, redirect_uri: str, method: AuthMethod) -> App:
        row = self._row
        if row.registration_endpoint is None:
            raise MissingClient(
                f"{row.label} registers no clients by itself: register the app there, "
                f'and set clients={{"{row.id}": ("client id", "client secret")}}'
            )
        name = self._registration_name(redirect_uri)
        # Of many who come at once the first registers.
        async with self._known.registering:
            return await self._recalled(name, redirect_uri, method)

    async def _recalled(self, name: str, redirect_uri: str, method: AuthMethod) -> App:
        row, memory = self._row, self._known.memory
        assert row.registration_endpoint is not None  # noqa: S101 - seen above
        known = await memory.recall(name) if memory else None
        now = datetime.now(UTC).timestamp()
        if known and float(known.get("expires_at", "inf")) > now:
            return App.of_data(known)
        made = await register(
            self._known.http,
            row.registration_endpoint,
            provider=row.id,
            client_name=self._known.app_name or "langchain-pocket-auth",
            redirect_uri=redirect_uri,
            scopes=(*row.required_scopes, *row.recommended_scopes),
            token_endpoint_auth_method=method,
        )
        secret = made.client_secret
        app = App(
            made.client_id,
            secret.get_secret_value() if secret else None,
            made.token_endpoint_auth_method,
            registered=True,
        )
        if memory:
            data, ends = app.as_data(), made.client_secret_expires_at
            if ends:
                data["expires_at"] = str(ends.timestamp())
            await memory.remember(name, data)
        return app

    def _registration_name(self, redirect_uri: str) -> str:
        # Another redirect URI is another registration, and so is another server: of
        # another issuer or tenant, whatever endpoint its metadata names.
        row = self._row
        server = f"{row.issuer} {row.registration_endpoint}"
        return f"{self._connection} {server} {redirect_uri}"

    async def forget_registration(self, request: AuthenticateRequest) -> None:
        """Register anew next time: the server does not know the client any more."""
        if memory := self._known.memory:
            name = self._registration_name(getattr(request, "redirect_uri", ""))
            await memory.remember(name, {})

    async def ask(
        self,
        url: str,
        app: App,
        form: Mapping[str, str],
        *,
        refresh: bool = False,
        odd: bool = True,
    ) -> Answer:
        """
        Send a form to the token endpoint, or with `odd=False` one of an RFC.

        Raises:
            ProviderUnavailable: No answer.
        """
        row, basic, data = self._row, None, dict(form)
        method = app.auth_method
        if refresh and row.refresh_endpoint_auth_method:
            method = row.refresh_endpoint_auth_method
        if method == "client_secret_basic" and app.client_secret is not None:
            # Both are form-encoded first (RFC 6749 section 2.3.1).
            basic = (quote_plus(app.client_id), quote_plus(app.client_secret))
        else:
            data["client_id"] = app.client_id
            if method != "none" and app.client_secret:
                data["client_secret"] = app.client_secret
        data = {row.parameter_names.get(k, k): v for k, v in data.items()}
        return await self._known.http.request(
            row.token_request_method if odd else "POST",
            url,
            provider=row.id,
            data=data,
            as_json=odd and row.token_request_format == "json",
            headers=self._headers(),
            auth=basic,
        )

    async def push(
        self, url: str, app: App, parameters: Mapping[str, str]
    ) -> dict[str, str]:
        """
        Send an authorization request beforehand; return what names it (RFC 9126).

        Raises:
            ConfigurationError: The server does not take the app or its request.
            ProviderUnavailable: No usable answer.
        """
        row = self._row
        answer = await self.ask(url, app, parameters, odd=False)
        content = answer.json()
        known = content if isinstance(content, dict) else {}
        named = known.get("request_uri")
        # Section 2.2 says 201; some answer 200.
        if answer.status in {200, 201} and isinstance(named, str) and named:
            return {"client_id": app.client_id, "request_uri": named}
        if answer.status in TRANSIENT_STATUS or not isinstance(known.get("error"), str):
            raise ProviderUnavailable(
                f"{row.label} did not take the authorization request (status "
                f"{answer.status}); try again later",
                provider=row.id,
                retry_after_s=answer.retry_after_s,
            )
        raise ConfigurationError(
            f"{row.label} refused the authorization request "
            f"({plain(known['error'])[:60]}): check the app's registration there, its "
            "redirect URI and its scopes"
        )

    def _headers(self) -> dict[str, str]:
        client = self._known.client
        given = client.variables if client else {}
        values = {
            name: given.get(name, variable.default or "")
            for name, variable in self._row.variables.items()
        }
        own = self._row.token_request_headers
        # GitHub answers form-encoded without this.
        return {"Accept": "application/json"} | {
            name: fill(value, values) for name, value in own.items()
        }

    async def exchange(
        self, app: App, token: str, url: Url, *, refresh: bool
    ) -> Answer:
        """Ask for a longer-lived token in the place of *token*."""
        facts = self._row.token_exchange
        assert facts is not None  # noqa: S101 - asked for where the row has one
        endpoint, grant_type = facts.endpoint, facts.grant_type
        data = {facts.token_parameter: token}
        if refresh and facts.refresh_grant_type:
            endpoint = facts.refresh_endpoint or endpoint
            grant_type = facts.refresh_grant_type
        else:
            data |= {"client_id": app.client_id}
            if app.client_secret:
                data["client_secret"] = app.client_secret
        return await self._known.http.request(
            facts.method,
            url(endpoint),
            provider=self._row.id,
            data={"grant_type": grant_type, **data},
            headers=self._headers(),
        )

    async def look_up(self, context: OAuth2Context, url: Url) -> None:
        """
        Find out which accounts a token reaches; keep the only one, or all to choose.

        Raises:
            TokenRequestError: It reaches none.
            ProviderUnavailable: No usable answer.
        """
        row, facts = self._row, self._row.account_lookup
        assert facts is not None  # noqa: S101 - asked for where the row has one
        answer = await self._known.http.request(
            "GET",
            url(facts.endpoint, context.detail),
            provider=row.id,
            headers={
                **self._headers(),
                "Authorization": f"{facts.prefix}{context.access_token}",
            },
        )
        content = answer.json()
        if answer.status in TRANSIENT_STATUS or content is None:
            raise ProviderUnavailable(
                f"{row.label} does not say which accounts there are; try again later",
                provider=row.id,
                retry_after_s=answer.retry_after_s,
            )
        found = _accounts(facts, content) if answer.status < 400 else []  # noqa: PLR2004
        if not found:
            raise TokenRequestError(
                f"{row.label}: there is no account that this app may use",
                provider=row.id,
                code="no_account",
                status=answer.status,
            )
        if len(found) > 1:
            context.choices = found
        else:
            context.detail = {**(context.detail or {}), **found[0]["members"]}

    async def revoke_oddly(self, app: App, values: Mapping[str, str]) -> bool:
        """Revoke as the row's `revocation` says; whether the server agreed."""
        facts = self._row.revocation
        assert facts is not None  # noqa: S101 - asked for where the row has one
        pair = (app.client_id, app.client_secret or "")  # of an API: RFC 7617
        answer = await self._known.http.request(
            facts.method,
            fill(facts.endpoint, values),
            provider=self._row.id,
            data={name: fill(text, values) for name, text in facts.parameters.items()},
            as_json=facts.format == "json",
            headers={
                **self._headers(),
                **{name: fill(text, values) for name, text in facts.headers.items()},
            },
            auth=pair if facts.basic else None,
        )
        return revoked(self._row, answer)


def revoked(row: Provider, answer: Answer) -> bool:
    """
    Return whether a token is withdrawn; `False`: it cannot be.

    Raises:
        ProviderUnavailable: Later, perhaps.
        ConfigurationError: The server does not accept the app itself.
    """
    content = answer.json()
    code = content.get("error") if isinstance(content, dict) else None
    if answer.status in {200, 202, 204}:
        return True
    # Google's and others' word for a token that is no good any more, to which
    # RFC 7009 section 2.2 says 200.
    if code == "invalid_token":
        return True
    if answer.status in TRANSIENT_STATUS:
        raise ProviderUnavailable(
            f"{row.label} did not revoke a grant (status {answer.status})",
            provider=row.id,
            retry_after_s=answer.retry_after_s,
        )
    if code in {"invalid_client", "unauthorized_client"}:
        raise ConfigurationError(
            f"{row.label} does not accept the app itself ({code}): check client id "
            f"and secret of {row.id!r}"
        )
    return False


def _accounts(facts: AccountLookup, content: Any) -> list[dict[str, Any]]:
    entries = member(content, facts.list) if facts.list else content
    if not isinstance(entries, list):
        entries = [entries]
    found: dict[str, dict[str, Any]] = {}
    for entry in entries:
        members = {k: member(entry, path) for k, path in facts.members.items()}
        named = member(entry, facts.id)
        if named is None or None in members.values():
            continue
        # It has to come back in a form.
        if len(str(named)) > MAX_ID or not str(named).isprintable():
            continue
        # Atlassian lists a site once for each product.
        found[str(named)] = {
            "id": str(named),
            "label": plain(str(member(entry, facts.label) or named))[:MAX_ID],
            "members": members,
        }
    return list(found.values())
