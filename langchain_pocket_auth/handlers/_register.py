"""An app registers itself at an authorization server (RFC 7591)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, get_args
from urllib.parse import urlsplit

from pydantic import SecretStr

from .._errors import ConfigurationError, ProviderUnavailable
from .._http import LOOPBACK_HOSTS, TRANSIENT_STATUS, Http
from .._row_parts import AuthMethod

# Section 3.2.2; other codes are shown as "refused".
_REFUSALS = frozenset(
    [
        "invalid_redirect_uri",
        "invalid_client_metadata",
        "invalid_software_statement",
        "unapproved_software_statement",
        "access_denied",
        "invalid_token",
    ]
)


@dataclass(frozen=True, slots=True)
class RegisteredClient:
    """
    What a server knows the app by from now on.

    Attributes:
        client_id: Public.
        client_secret: `None` for a public client.
        client_secret_expires_at: Then the app has to register again; `None`: never.
        token_endpoint_auth_method: How it authenticates.
    """

    client_id: str
    client_secret: SecretStr | None
    client_secret_expires_at: datetime | None
    token_endpoint_auth_method: AuthMethod


async def register(
    http: Http,
    endpoint: str,
    *,
    provider: str,
    client_name: str,
    redirect_uri: str,
    scopes: Iterable[str],
    token_endpoint_auth_method: AuthMethod,
) -> RegisteredClient:
    """
    Register the app at a `registration_endpoint` (RFC 7591 section 3).

    Args:
        http: Sends the request.
        endpoint: The server's.
        provider: Names the provider in messages and settings.
        client_name: What people see when they are asked to consent.
        redirect_uri: Where they come back to.
        scopes: What the app may ask for; none: what the server decides.
        token_endpoint_auth_method: What to ask for; the server may decide otherwise.

    Raises:
        ConfigurationError: The server does not register apps, or not this one; the
            developer registers it by hand.
        ProviderUnavailable: No usable answer; try again later.
    """
    loopback = urlsplit(redirect_uri).hostname in LOOPBACK_HOSTS
    metadata: Any = {
        "client_name": client_name,
        "redirect_uris": [redirect_uri],
        "grant_types": ["authorization_code", "refresh_token"],
        "response_types": ["code"],
        "token_endpoint_auth_method": token_endpoint_auth_method,
        # OpenID Connect Registration section 2: "web" excludes this machine.
        "application_type": "native" if loopback else "web",
    }
    if wanted := " ".join(dict.fromkeys(scopes)):
        metadata["scope"] = wanted
    answer = await http.request(
        "POST",
        endpoint,
        provider=provider,
        data=metadata,
        as_json=True,
        headers={"Accept": "application/json"},
    )
    status, content = answer.status, answer.json()
    if 400 <= status < 500 and status not in TRANSIENT_STATUS:  # noqa: PLR2004
        code = content.get("error") if isinstance(content, dict) else None
        known = isinstance(code, str) and code in _REFUSALS
        code = code if known else "refused"
        raise _by_hand(provider, f"does not register this app ({code}, {status})")
    if status not in {200, 201} or not isinstance(content, dict):
        raise ProviderUnavailable(
            f"{provider} did not register the app (status {status}); try again later",
            provider=provider,
            retry_after_s=answer.retry_after_s,
        )
    return _client(content, provider, token_endpoint_auth_method)


def _client(
    content: dict[str, Any], provider: str, asked: AuthMethod
) -> RegisteredClient:
    client_id, secret = content.get("client_id"), content.get("client_secret")
    method = content.get("token_endpoint_auth_method", asked)
    if method not in get_args(AuthMethod):
        raise _by_hand(provider, "wants the app to authenticate in another way")
    if not isinstance(client_id, str) or not client_id:
        raise ProviderUnavailable(
            f"{provider} registered the app without a client_id", provider=provider
        )
    if not isinstance(secret, str) or not secret:
        if method != "none":
            raise ProviderUnavailable(
                f"{provider} registered the app without a secret", provider=provider
            )
        secret = None
    return RegisteredClient(
        client_id,
        SecretStr(secret) if secret else None,
        _moment(content.get("client_secret_expires_at")),
        method,
    )


def _moment(seconds: Any) -> datetime | None:
    # Section 3.2.1: 0 is "never".
    try:
        return datetime.fromtimestamp(float(seconds), UTC) if seconds else None
    except (TypeError, ValueError, OverflowError, OSError):
        return None


def _by_hand(provider: str, why: str) -> ConfigurationError:
    setting = f"POCKET_AUTH_CLIENTS__{provider.upper()}__CLIENT"
    return ConfigurationError(
        f"{provider} {why}: register it there by hand, and set {setting}_ID and "
        f"{setting}_SECRET"
    )
