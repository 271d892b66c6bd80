"""Authlib's grants and endpoints over the ledger: the strict OAuth 2.0 part."""

from __future__ import annotations

import secrets
import warnings
from typing import Any

from flask import Request
from flask import request as flask_request

from ._ledger import Client, Code, Device, Grant, Ledger, Token
from ._openid import id_token

with warnings.catch_warnings():
    # Authlib announces its own future (authlib.jose, httpx) when imported.
    warnings.simplefilter("ignore")
    from authlib.integrations.flask_oauth2 import AuthorizationServer
    from authlib.integrations.flask_oauth2.requests import (
        FlaskJsonRequest,
        FlaskOAuth2Payload,
        FlaskOAuth2Request,
    )
    from authlib.oauth2 import OAuth2Error, OAuth2Request
    from authlib.oauth2.rfc6749 import InvalidGrantError, InvalidRequestError, grants
    from authlib.oauth2.rfc6749.errors import InvalidScopeError
    from authlib.oauth2.rfc7009 import RevocationEndpoint
    from authlib.oauth2.rfc7636 import CodeChallenge
    from authlib.oauth2.rfc7662 import IntrospectionEndpoint

    from ._device import DeviceAuthorization, DeviceCodeGrant
    from ._machines import ClientCredentialsGrant, JWTBearerGrant, Registration

__all__ = ["AUTH_METHODS", "OAuth2Error", "Protocol"]

AUTH_METHODS = ["client_secret_basic", "client_secret_post", "none"]


class _LoopbackRequest(FlaskOAuth2Request):  # type: ignore[misc]
    """A request that Authlib takes although this server speaks plain http."""

    def __init__(self, request: Request) -> None:
        # The base class refuses http. The alternative, AUTHLIB_INSECURE_TRANSPORT,
        # would hold for the whole process.
        https = request.url.replace("http://", "https://", 1)
        OAuth2Request.__init__(
            self, method=request.method, uri=https, headers=request.headers
        )
        self._request = request
        self.payload = FlaskOAuth2Payload(request)


class Protocol(AuthorizationServer):  # type: ignore[misc]
    """Authlib's authorization server, bound to a ledger."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger
        self.register_token_generator("default", self._generate_token)
        self.register_grant(_AuthorizationCodeGrant, [_RequiredS256(required=True)])
        self.register_grant(_RefreshTokenGrant)
        self.register_grant(DeviceCodeGrant)
        self.register_grant(ClientCredentialsGrant)
        self.register_grant(JWTBearerGrant)
        self.register_endpoint(_Revocation)
        self.register_endpoint(_Introspection)
        self.register_endpoint(DeviceAuthorization)
        self.register_endpoint(Registration)

    def create_oauth2_request(self, _request: object) -> _LoopbackRequest:
        return _LoopbackRequest(flask_request)

    def create_json_request(self, _request: object) -> FlaskJsonRequest:
        return FlaskJsonRequest(flask_request)

    def query_client(self, client_id: str) -> Client | None:
        return self.ledger.clients.get(client_id)

    def save_token(self, token: dict[str, Any], request: Any) -> None:
        """Note what the answer holds, then leave out what the options omit."""
        ledger = self.ledger
        code: Code | None = request.authorization_code
        device: Device | None = request.credential
        source: Any = code or device or request.refresh_token
        grant: Grant = source.grant if source else self._machine_grant(token, request)
        if request.payload.data.get("resource") != grant.resource and not device:
            raise _InvalidTargetError
        if device:
            device.used = True
        ledger.add_token("access_token", token["access_token"], grant, token["scope"])
        if "refresh_token" in token:
            # It keeps the scope of the grant: a narrower access token does not
            # narrow the next refresh (RFC 6749 section 6).
            ledger.add_token(
                "refresh_token", token["refresh_token"], grant, grant.scope
            )
        if source and "openid" in token["scope"].split():
            token["id_token"] = id_token(ledger, grant, code.nonce if code else None)
        with ledger._lock:  # noqa: SLF001
            ledger.token_requests[request.payload.grant_type] += 1
        if ledger.omit_scope:
            del token["scope"]

    def _machine_grant(self, token: dict[str, Any], request: Any) -> Grant:
        """Return the grant of an app that acts for itself, or for whom it says."""
        client: Client = request.client
        username = request.user or client.client_id
        asked = token["scope"].split()
        grant = self.ledger.add_grant(username, client.client_id, asked)
        grant.resource = request.payload.data.get("resource")
        return grant

    def _generate_token(
        self,
        *,
        scope: str | None = None,
        include_refresh_token: bool = True,
        **_: object,
    ) -> dict[str, Any]:
        token: dict[str, Any] = {
            "access_token": "at_" + secrets.token_urlsafe(24),
            "token_type": "Bearer",
            "expires_in": int(self.ledger.access_token_ttl_s),
            "scope": scope or "",
        }
        if include_refresh_token and not self.ledger.omit_refresh_token:
            token["refresh_token"] = "rt_" + secrets.token_urlsafe(32)
        return token


class _AuthorizationCodeGrant(grants.AuthorizationCodeGrant):  # type: ignore[misc]
    TOKEN_ENDPOINT_AUTH_METHODS = AUTH_METHODS
    server: Protocol

    def validate_requested_scope(self) -> None:
        client = self.server.query_client(self.request.payload.client_id)
        if client and not client.may_ask_for(self.request.payload.scope):
            raise InvalidScopeError

    def generate_authorization_code(self) -> str:
        payload = self.request.payload
        client: Client = self.request.client
        return self.server.ledger.add_code(
            username=self.request.user,
            client=client,
            asked=(payload.scope or "").split() or sorted(client.scopes or ()),
            redirect_uri=payload.redirect_uri,
            code_challenge=payload.data["code_challenge"],
            code_challenge_method=payload.data["code_challenge_method"],
            nonce=payload.data.get("nonce"),
            resource=payload.data.get("resource"),
        )

    def save_authorization_code(self, code: str, request: object) -> None:
        """Nothing: the ledger already knows it."""

    def query_authorization_code(self, code: str, client: Client) -> Code | None:
        return self.server.ledger.take_code(code, client)

    def delete_authorization_code(self, authorization_code: Code) -> None:
        """Nothing: a used code is kept so that its replay is noticed."""

    def authenticate_user(self, authorization_code: Code) -> str:
        if authorization_code.grant.revoked:
            raise InvalidGrantError
        return authorization_code.grant.username


class _InvalidTargetError(OAuth2Error):  # type: ignore[misc]
    """Tokens are asked for another resource than the person agreed to (RFC 8707)."""

    error = "invalid_target"


class _RequiredS256(CodeChallenge):  # type: ignore[misc]
    """PKCE for every client; `plain`, also by omission, is refused."""

    SUPPORTED_CODE_CHALLENGE_METHOD = ("S256",)

    def validate_code_challenge(self, grant: Any, redirect_uri: str) -> None:
        data = grant.request.payload.data
        if not data.get("code_challenge") or not data.get("code_challenge_method"):
            raise InvalidRequestError("PKCE with S256 is required")
        super().validate_code_challenge(grant, redirect_uri)


class _RefreshTokenGrant(grants.RefreshTokenGrant):  # type: ignore[misc]
    TOKEN_ENDPOINT_AUTH_METHODS = AUTH_METHODS
    server: Protocol

    @property
    def INCLUDE_NEW_REFRESH_TOKEN(self) -> bool:  # noqa: N802
        """Authlib's name for rotation."""
        return self.server.ledger.rotate

    def authenticate_refresh_token(self, refresh_token: str) -> Token | None:
        return self.server.ledger.find_token(refresh_token, "refresh_token")

    def authenticate_user(self, refresh_token: Token) -> str:
        # The last step before tokens are made, after client and scope were
        # checked: a refused request must not use the token up.
        if not self.server.ledger.take_refresh_token(refresh_token):
            raise InvalidGrantError
        return refresh_token.grant.username

    def revoke_old_credential(self, refresh_token: Token) -> None:
        """Nothing: it was used up when it was taken."""


class _Revocation(RevocationEndpoint):  # type: ignore[misc]
    CLIENT_AUTH_METHODS = AUTH_METHODS
    server: Protocol

    def query_token(self, token_string: str, _hint: str | None) -> Token | None:
        return self.server.ledger.find_token(token_string)

    def revoke_token(self, token: Token, _request: object) -> None:
        self.server.ledger.revoke_token(token)


class _Introspection(IntrospectionEndpoint):  # type: ignore[misc]
    CLIENT_AUTH_METHODS = AUTH_METHODS
    server: Protocol

    def query_token(self, token_string: str, _hint: str | None) -> Token | None:
        return self.server.ledger.find_token(token_string)

    def check_permission(self, token: Token, client: Client, _request: object) -> bool:
        return token.check_client(client)

    def introspect_token(self, token: Token) -> dict[str, Any]:
        return {
            "active": token.used_at is None,
            "client_id": token.grant.client_id,
            "sub": token.grant.username,
            "scope": token.scope,
            "exp": int(token.expires_at),
        }
