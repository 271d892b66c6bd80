"""OAuth 2 authorization code with PKCE, driven by a catalog row (RFC 6749, 7636)."""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
from base64 import urlsafe_b64encode
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from typing import Any, ClassVar
from urllib.parse import urlencode

from .._errors import (
    ConfigurationError,
    TokenRequestError,
)
from .._futures import FutureData, FutureStore
from .._http import Answer
from .._placement import fill
from .._rows import Method, Provider
from ._answers import OAuth2Context, checked, context_of, scopes_of
from ._device import GRANT_TYPE, DeviceCode, device_code_of, polled, unsupported
from ._grant import GrantHandler, OAuth2Request, required


class OAuth2Handler(GrantHandler):
    """
    The handler of a row. Oddities that are values live in the row.

    What is behaviour is a subclass with `row = Provider(...)` that overrides one
    method, passed as `PocketAuth(handlers=[MyHandler])`.
    """

    method: ClassVar[Method] = "oauth2"

    @classmethod
    def _described(cls, row: Provider) -> str:
        return f"Connects {row.label} accounts by OAuth 2."

    # ------------------------------------------------------------ request and URL

    def make_request(
        self, auth_scopes: list[str] | None = None, **kwargs: Any
    ) -> OAuth2Request:
        """
        Make the request; raises what is wrong with the app's settings.

        Raises:
            MissingClient: No client id or secret; the text names the settings.
            ConfigurationError: The provider does not redirect to this base URL, or a
                variable of its URLs is not set.
        """
        del kwargs
        client, row = self._client, self.row
        redirect_uri = f"{self._registration.base_url}/auth/{row.id}/oauth2/callback"
        if not redirect_uri.startswith(row.redirect_uri_prefixes):
            allowed = " or ".join(row.redirect_uri_prefixes)
            raise ConfigurationError(
                f"{row.label} redirects to addresses that begin with {allowed}, and "
                f"base_url is {self._registration.base_url}: serve the callback there "
                "and set base_url to it"
            )
        self._variables(strict=True)
        return OAuth2Request(
            auth_scopes=list(auth_scopes or ()),
            client_id=client.client_id,
            client_secret=client.client_secret.get_secret_value()
            if client.client_secret
            else None,
            redirect_uri=client.redirect_uri or redirect_uri,
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
        """
        Return the authorization URL (RFC 6749 section 4.1.1, RFC 7636).

        Where the server takes requests beforehand (RFC 9126), the URL only names one.

        Raises:
            ConfigurationError: The server does not take the app or its request.
            ProviderUnavailable: It does not answer; the person tries again.
        """
        del thread_id, profile, args, kwargs
        row = await self._server()
        attempt = future or FutureStore.create_future(future_uid)
        app = await self._app(row, auth_req)
        asked = self._scope_of(row, auth_req)
        values = self._variables(strict=True)
        parameters = {
            name: fill(value, values)
            for name, value in row.authorization_parameters.items()
        }
        parameters |= self._client.authorization_parameters
        if row.response_type:
            parameters["response_type"] = row.response_type
        parameters |= {
            "client_id": app.client_id,
            "redirect_uri": auth_req.redirect_uri,
            "state": future_uid,
        }
        parameters |= asked
        attempt.data["redirect_uri"] = auth_req.redirect_uri
        if row.authorization_response_iss_parameter_supported:
            attempt.data["iss_promised"] = True
        if app.registered:
            attempt.data["client"] = app.as_data()
        if row.issuer and "openid" in self._scopes(row, auth_req):
            # OpenID Connect Core section 3.1.2.1: ties the ID token to this attempt.
            parameters["nonce"] = attempt.data["nonce"] = secrets.token_urlsafe(32)
        if row.code_challenge_method == "S256":
            verifier = secrets.token_urlsafe(48)
            digest = hashlib.sha256(verifier.encode()).digest()
            attempt.data["code_verifier"] = verifier
            parameters["code_challenge"] = (
                urlsafe_b64encode(digest).decode().rstrip("=")
            )
            parameters["code_challenge_method"] = "S256"
        parameters |= self._resource
        other = row.parameter_names | row.authorization_parameter_names
        renamed = {other.get(k, k): v for k, v in parameters.items()}
        if endpoint := row.pushed_authorization_request_endpoint:
            renamed = await self._requests(row).push(self._url(endpoint), app, renamed)
        return with_query(self._url(required(row.authorization_endpoint)), renamed)

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
            TokenRequestError: The provider refused the code, or its ID token does
                not hold.
            ProviderUnavailable: No usable answer; the code is spent.
        """
        del args, kwargs
        attempt = future or FutureStore.get_future(future_uid)
        code = await attempt.future
        row, learned = await self._server(), self._learned(attempt.parameters)
        values = self._variables(strict=True, learned=learned)
        grant = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": attempt.data["redirect_uri"],
            **{k: fill(v, values) for k, v in row.token_parameters.items()},
            **self._resource,
        }
        if verifier := attempt.data.get("code_verifier"):
            grant["code_verifier"] = verifier
        app = await self._app(row, auth_req, attempt.data.get("client"))
        endpoint = self._url(required(row.token_endpoint), learned)
        sent = datetime.now(UTC)
        answer = await self._requests(row).ask(endpoint, app, grant)
        context = context_of(row, checked(row, answer), sent, row.token_response)
        context.detail = {**learned, **(context.detail or {})} or None
        if context.scopes is None and "scope" in learned:
            # Strava tells in the callback what was granted.
            context.scopes = scopes_of(learned["scope"])
        context.client = app.as_data() if app.registered else None
        nonce = attempt.data.get("nonce")
        return await self._completed(row, app, auth_req, context, nonce=nonce)

    # ------------------------------------------------------------- the device flow

    @property
    def device_in_public(self) -> bool:
        """Whether the app's registration allows it on a public address."""
        return self._client.device_in_public

    async def begin_device(self, auth_req: OAuth2Request) -> DeviceCode:
        """
        Ask for a code that the person types elsewhere (RFC 8628 section 3.1).

        Raises:
            ConfigurationError: The provider has no such flow, or not for this app.
            ProviderUnavailable: No usable answer; retry later.
        """
        row = await self._server()
        if row.device_authorization_endpoint is None:
            raise unsupported(row)
        app = await self._app(row, auth_req)
        form = self._scope_of(row, auth_req) | self._resource
        endpoint = self._url(row.device_authorization_endpoint)
        sent = datetime.now(UTC)
        answer = await self._requests(row).ask(endpoint, app, form, odd=False)
        return device_code_of(row, answer, sent)

    async def finish_device(
        self,
        auth_req: OAuth2Request,
        code: DeviceCode,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> OAuth2Context:
        """
        Wait until the person has agreed; return the context.

        Raises:
            AuthorizationRefused: The person said no.
            AuthorizationRequired: The code ran out.
            ConfigurationError: The provider does not accept the app.
            TokenRequestError: The provider refused otherwise.
        """
        row = await self._server()
        app = await self._app(row, auth_req)
        form = {"grant_type": GRANT_TYPE, "device_code": code.device_code}
        form |= self._resource
        endpoint = self._url(required(row.token_endpoint))

        async def ask() -> Answer:
            return await self._requests(row).ask(endpoint, app, form)

        answer = await polled(
            row, code, ask, now=lambda: datetime.now(UTC), sleep=sleep
        )
        context = context_of(row, answer, datetime.now(UTC), row.token_response)
        context.client = app.as_data() if app.registered else None
        # No nonce: there is no authorization request that could carry one.
        return await self._completed(row, app, auth_req, context)

    # ------------------------------------------------------- what the engine asks

    def read_callback(self, parameters: Mapping[str, str]) -> Any:
        return parameters.get(self.row.code_parameter)

    @property
    def posts_callback(self) -> bool:  # type: ignore[override]
        """Whether the row asks for a posted answer (`response_mode=form_post`)."""
        return self.row.authorization_parameters.get("response_mode") == "form_post"

    def check_issuer(
        self, issuer: str | None, data: Mapping[str, Any] | None = None
    ) -> bool:
        """Compare exactly, without normalising (RFC 9207 section 2.4)."""
        row = self.row
        if row.issuer is None:
            return True
        if issuer is None:
            promised = row.authorization_response_iss_parameter_supported
            return not (promised or (data or {}).get("iss_promised"))
        expected = self._issuer(row.issuer)
        if "{tenantid}" not in row.issuer:
            return issuer == expected
        return re.fullmatch(_any_tenant(expected), issuer) is not None

    def _learned(self, parameters: Mapping[str, str]) -> dict[str, Any]:
        """Return what a callback tells besides the code."""
        row = self.row
        learned = {m: parameters[m] for m in row.callback_members if m in parameters}
        for name, variable in row.variables.items():
            value = parameters.get(variable.callback_parameter or "")
            if value is None:
                continue
            # Zoho sends a URL. What the row does not list gets no secret of the app's.
            value = value.removeprefix("https://").rstrip("/")
            if not re.fullmatch(variable.pattern, value):
                raise TokenRequestError(
                    f"{row.label}'s callback names a server that is not in its row",
                    provider=row.id,
                    code="invalid_request",
                    status=200,
                )
            learned[name] = value
        return learned


def with_query(endpoint: str, parameters: Mapping[str, str]) -> str:
    """Add parameters to a URL; before its fragment, unless that is a route."""
    fragment = ""
    if "#" in endpoint and "#/" not in endpoint:
        endpoint, _, fragment = endpoint.partition("#")
        fragment = f"#{fragment}"
    mark = "&" if "?" in endpoint else "?"
    return f"{endpoint}{mark}{urlencode(parameters)}{fragment}"


def _any_tenant(issuer: str) -> str:
    return re.escape(issuer).replace(re.escape("{tenantid}"), "[0-9a-fA-F-]{36}")
