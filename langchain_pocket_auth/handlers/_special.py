"""Handlers of providers whose oddity is behaviour, which no value of a row tells."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Collection, Mapping
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import quote

from .._errors import (
    CallbackRefused,
    ConfigurationError,
    MissingClient,
    ProviderUnavailable,
)
from .._models import AuthenticateRequest
from .._placement import fill
from .._rows import Client, Method, Provider
from ._form import FormContext
from ._grant import OAuth2Request
from ._oauth2 import OAuth2Handler
from ._row import RowHandler
from ._service_account import LIFETIME, SigningHandler
from ._signing import CLOCK_SKEW, fingerprint, p256_key, rsa_key, signed
from ._token_requests import App

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey


class AppleHandler(OAuth2Handler):
    """
    Sign in with Apple: the client secret is signed for each request.

    It is made from three members of the app's registration: `team_id`, `key_id` and
    `private_key`, the content of the .p8 file.
    """

    members: ClassVar[Mapping[str, str]] = {
        "team_id": "id of the team",
        "key_id": "id of the key",
        "private_key": "content of the .p8 file",
    }
    _secret_lifetime: ClassVar[timedelta] = timedelta(minutes=5)

    def make_request(
        self, auth_scopes: list[str] | None = None, **kwargs: Any
    ) -> OAuth2Request:
        """
        Make the request; raises what is wrong with the app's settings.

        Raises:
            MissingClient: A member is not set; the text names the settings.
            ConfigurationError: The private key is none on the curve P-256.
        """
        self._key(self._client)
        return super().make_request(auth_scopes, **kwargs)

    async def _app(
        self,
        row: Provider,
        request: AuthenticateRequest,
        registered: Mapping[str, str] | None = None,
    ) -> App:
        del request, registered
        client = self._client
        # Apple: "Creating a client secret".
        secret = signed(
            {
                "iss": client.variables["team_id"],
                "aud": self._issuer(row.issuer or ""),
                "sub": client.client_id,
            },
            self._key(client),
            "ES256",
            now=datetime.now(UTC),
            lifetime=self._secret_lifetime,
            key_id=client.variables["key_id"],
        )
        method = client.token_endpoint_auth_method or row.token_endpoint_auth_method
        return App(client.client_id, secret, method)

    def _key(self, client: Client) -> EllipticCurvePrivateKey:
        try:
            return p256_key(client.variables["private_key"])
        except ValueError as error:
            problem = str(error).rstrip(".")
        raise ConfigurationError(f"{self._setting}PRIVATE_KEY {problem}")

    @property
    def _client(self) -> Client:
        client = super()._client
        missing = [m for m in self.members if not client.variables.get(m)]
        if missing:
            settings = ", ".join(f"{self._setting}{m.upper()}" for m in missing)
            raise MissingClient(
                f"{self.row.label} wants a client secret that is signed for each "
                f"request: set {settings}"
            )
        return client


class ShopifyHandler(OAuth2Handler):
    """Shopify signs its callbacks, and its write scopes include the read scopes."""

    _callback_lifetime: ClassVar[timedelta] = timedelta(days=1)

    def read_callback(self, parameters: Mapping[str, str]) -> Any:
        """
        Return the code of a callback that Shopify has signed for this shop.

        Raises:
            CallbackRefused: It is not signed, or for another shop, or a day old.
        """
        # Shopify: "Authorization code grant", verify the installation request.
        told = {name: value for name, value in parameters.items() if name != "hmac"}
        message = "&".join(sorted(map(_pair, told.items())))
        secret = self._client.client_secret
        key = secret.get_secret_value() if secret else ""
        digest = hmac.new(key.encode(), message.encode(), hashlib.sha256).hexdigest()
        if not key or not hmac.compare_digest(
            digest.encode(), parameters.get("hmac", "").encode()
        ):
            raise CallbackRefused("mismatch")
        shop = self._variables(strict=True)["shop"]
        if told.get("shop") != f"{shop}.myshopify.com":
            raise CallbackRefused("mismatch")
        when = told.get("timestamp", "")
        oldest = datetime.now(UTC) - self._callback_lifetime
        if not when.isdecimal() or int(when) < oldest.timestamp():
            raise CallbackRefused("expired")
        return super().read_callback(parameters)

    def missing_scopes(
        self, granted: Collection[str], needed: Collection[str]
    ) -> list[str]:
        """Count a read scope in with its write scope: answers name the latter only."""
        # Shopify: "Access scopes".
        included = [
            s.replace("write_", "read_", 1)
            for s in granted
            if s.startswith(("write_", "unauthenticated_write_"))
        ]
        return super().missing_scopes([*granted, *included], needed)


def _pair(parameter: tuple[str, str]) -> str:
    """Return `name=value`, so that no value reads as a further parameter."""
    name, value = (part.replace("%", "%25") for part in parameter)
    return f"{name.replace('=', '%3D')}={value}".replace("&", "%26")


class GitHubAppHandler(SigningHandler):
    """An installation of a GitHub App: the app's key makes tokens that live an hour."""

    # GitHub accepts 10 minutes.
    _assertion_lifetime: ClassVar[timedelta] = timedelta(minutes=10)

    async def _made(
        self, fields: Mapping[str, str], scopes: Collection[str]
    ) -> FormContext:
        del scopes  # the installation's permissions
        row, now = self.row, datetime.now(UTC)
        quoted = {name: quote(value, safe="") for name, value in fields.items()}
        assertion = signed(
            {"iss": fields["app_id"]},
            rsa_key(fields["private_key"]),
            "RS256",
            now=now,
            lifetime=self._assertion_lifetime,
        )
        answer = await self._registration.http.request(
            "POST",
            fill(row.token_endpoint or "", quoted),
            provider=row.id,
            headers={
                "Accept": "application/vnd.github+json",
                "Authorization": f"Bearer {assertion}",
            },
        )
        # Also how GitHub limits rates.
        if answer.status == 403 and answer.retry_after_s is not None:  # noqa: PLR2004
            raise ProviderUnavailable(
                f"{row.label} limits requests; try again later",
                provider=row.id,
                retry_after_s=answer.retry_after_s,
            )
        return self._answered(answer, now)


class SnowflakeKeyHandler(SigningHandler):
    """A user's key at Snowflake: what is signed is the token, without any request."""

    async def _made(
        self, fields: Mapping[str, str], scopes: Collection[str]
    ) -> FormContext:
        del scopes
        key, now = rsa_key(fields["private_key"]), datetime.now(UTC)
        user = f"{_account(fields['account'])}.{fields['user']}".upper()
        token = signed(
            {"iss": f"{user}.{fingerprint(key)}", "sub": user},
            key,
            "RS256",
            now=now,
            lifetime=LIFETIME,
        )
        return self._token_context(token, now + LIFETIME - CLOCK_SKEW)


def _account(identifier: str) -> str:
    """Return an account's name without its region, as Snowflake wants it in a JWT."""
    # Snowflake: "Authenticating to the server", SQL API: the example programs.
    return identifier.partition("-" if ".global" in identifier else ".")[0]


SPECIAL: dict[tuple[str, Method], type[RowHandler]] = {
    ("apple", "oauth2"): AppleHandler,
    ("github_app", "keypair"): GitHubAppHandler,
    ("shopify", "oauth2"): ShopifyHandler,
    ("snowflake", "keypair"): SnowflakeKeyHandler,
}
