"""Apps that act without a person, and that register themselves."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import jwt
from authlib.oauth2.rfc6749 import InvalidGrantError, grants
from authlib.oauth2.rfc6749.errors import InvalidScopeError
from authlib.oauth2.rfc7523 import JWTBearerGrant as BaseJWTBearerGrant
from authlib.oauth2.rfc7591 import ClientRegistrationEndpoint
from authlib.oauth2.rfc7591.errors import (
    InvalidClientMetadataError,
    InvalidRedirectURIError,
)

from ._ledger import LOOPBACK_HOSTS, Client

if TYPE_CHECKING:
    from ._grants import Protocol

ASSERTION_TTL_S = 3600  # Google's limit
_ALGORITHMS = ["RS256", "PS256", "ES256", "EdDSA"]
_AUTH_METHODS = {"client_secret_basic", "client_secret_post", "none"}


class ClientCredentialsGrant(grants.ClientCredentialsGrant):  # type: ignore[misc]
    """The app acts for itself (RFC 6749 section 4.4)."""

    server: Protocol

    def validate_requested_scope(self) -> None:
        if not self.request.client.may_ask_for(self.request.payload.scope):
            raise InvalidScopeError


class JWTBearerGrant(BaseJWTBearerGrant):  # type: ignore[misc]
    """The app signs who it is, and for whom it acts (RFC 7523 section 2.1)."""

    server: Protocol

    def process_assertion_claims(self, assertion: str) -> dict[str, Any]:
        ledger = self.server.ledger
        try:
            issuer = jwt.decode(assertion, options={"verify_signature": False})["iss"]
            claims = jwt.decode(
                assertion,
                ledger.clients[issuer].public_key,
                algorithms=_ALGORITHMS,
                audience=[f"{ledger.origin}/token", ledger.issuer],
                # By the server's own clock, below.
                options={
                    "require": ["iss", "aud", "exp", "iat"],
                    "verify_exp": False,
                    "verify_iat": False,
                },
            )
            issued_at, expires_at = float(claims["iat"]), float(claims["exp"])
        except (jwt.PyJWTError, KeyError, TypeError, ValueError):
            raise InvalidGrantError from None
        now = ledger.now()
        if not issued_at - self.LEEWAY <= now < expires_at:
            raise InvalidGrantError
        if expires_at - issued_at > ASSERTION_TTL_S:
            raise InvalidGrantError
        # Google takes the scopes from the assertion.
        self._scope = self.request.payload.scope or claims.get("scope")
        return claims

    def resolve_issuer_client(self, issuer: str) -> Client:
        return self.server.ledger.clients[issuer]

    def validate_requested_scope(self) -> None:
        if not self.request.client.may_ask_for(self._scope):
            raise InvalidScopeError

    def authenticate_user(self, subject: str) -> str:
        return subject

    def has_granted_permission(self, _client: Client, _user: str) -> bool:
        return True

    def create_token_response(self) -> tuple[int, dict[str, Any], Any]:
        token = self.generate_token(
            scope=self._scope, user=self.request.user, include_refresh_token=False
        )
        self.save_token(token)
        return 200, token, self.TOKEN_RESPONSE_HEADER


class Registration(ClientRegistrationEndpoint):  # type: ignore[misc]
    """Open registration (RFC 7591)."""

    server: Protocol

    def authenticate_token(self, _request: object) -> bool:
        return True

    def get_server_metadata(self) -> dict[str, Any]:
        return {}

    def generate_client_info(self, request: Any) -> dict[str, Any]:
        ledger, data = self.server.ledger, request.payload.data
        issued_at = int(ledger.now())
        info: dict[str, Any] = {
            "client_id": "cl_" + secrets.token_urlsafe(12),
            "client_id_issued_at": issued_at,
        }
        if data.get("token_endpoint_auth_method") == "none":
            return info
        ttl_s = int(ledger.client_secret_ttl_s)
        return info | {
            "client_secret": "cs_" + secrets.token_urlsafe(32),
            "client_secret_expires_at": issued_at + ttl_s if ttl_s else 0,
        }

    def save_client(
        self, info: dict[str, Any], metadata: dict[str, Any], request: Any
    ) -> Client:
        ledger, scope = self.server.ledger, metadata.get("scope")
        method = metadata.get("token_endpoint_auth_method", "client_secret_basic")
        if method not in _AUTH_METHODS:
            raise InvalidClientMetadataError("token_endpoint_auth_method")
        kind = request.payload.data.get("application_type", "web")
        redirect_uris = metadata.get("redirect_uris", ())
        if not redirect_uris or not all(_fits(uri, kind) for uri in redirect_uris):
            raise InvalidRedirectURIError
        expires_at = info.get("client_secret_expires_at", 0)
        client = Client(
            client_id=info["client_id"],
            client_secret=info.get("client_secret", ""),
            redirect_uris=tuple(redirect_uris),
            token_endpoint_auth_method=method,
            scopes=frozenset(scope.split()) if scope else None,
            grant_types=frozenset(metadata.get("grant_types", ["authorization_code"])),
            is_expired=lambda: 0 < expires_at <= ledger.now(),
        )
        ledger.add_client(client)
        with ledger._lock:  # noqa: SLF001
            ledger.registrations += 1
        return client


def _fits(redirect_uri: str, application_type: str) -> bool:
    """Say whether it may be one (OpenID Connect Registration section 2)."""
    parts = urlsplit(redirect_uri)
    if application_type == "native":
        return parts.scheme == "http" and parts.hostname in LOOPBACK_HOSTS
    return parts.scheme == "https" and parts.hostname not in LOOPBACK_HOSTS
