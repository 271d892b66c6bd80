"""What a token endpoint answers: checked, and read as a row says (RFC 6749, 5)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from .._catalog import Provider
from .._errors import ConfigurationError, ProviderUnavailable, TokenRequestError
from .._http import TRANSIENT_STATUS, Answer
from .._models import AuthContext

# RFC 6749 section 5.2 and 4.1.2.1; other codes are shown as "other".
_CODES = frozenset(
    [
        "invalid_request",
        "invalid_client",
        "invalid_grant",
        "unauthorized_client",
        "unsupported_grant_type",
        "invalid_scope",
        "server_error",
        "temporarily_unavailable",
        "access_denied",
        "slow_down",
        "bad_verification_code",
        "token_revoked",
        "invalid_refresh_token",
    ]
)


class OAuth2Context(AuthContext):
    """An access token and what renews it. Tools get it without the latter."""

    refresh_token: str | None = None
    id_token: str | None = None


def checked(row: Provider, answer: Answer) -> dict[str, Any]:
    """
    Return the members of a token answer.

    Raises:
        TokenRequestError: It is a refusal.
        ConfigurationError: It refuses the app itself.
        ProviderUnavailable: It is none, or says "later".
    """
    label, status, content = row.label, answer.status, answer.json()
    raw = content.get("error") if isinstance(content, dict) else None
    if isinstance(raw, dict):
        raw = raw.get("code") or raw.get("type")
    code = raw if isinstance(raw, str) and raw in _CODES else "other" if raw else None
    if status in TRANSIENT_STATUS or code in {
        "temporarily_unavailable",
        "server_error",
    }:
        raise ProviderUnavailable(
            f"{label} answered {status}; try again later",
            provider=row.id,
            retry_after_s=answer.retry_after_s,
        )
    success = row.token_response.get("success")
    failed = success and isinstance(content, dict) and content.get(success) is not True
    # GitHub and Slack report errors with status 200.
    if code or failed or status >= 400:  # noqa: PLR2004
        code = code or "other"
        if code in {"invalid_client", "unauthorized_client"}:
            raise ConfigurationError(
                f"{label} does not accept the app itself ({code}): check "
                f"client id and secret, and the redirect URI, of {row.id!r}"
            )
        raise TokenRequestError(
            f"{label} refused the token request ({code}, status {status})",
            provider=row.id,
            code=code,
            status=status,
        )
    if status != 200 or not isinstance(content, dict):  # noqa: PLR2004
        raise ProviderUnavailable(
            f"{label} sent no token answer (status {status})", provider=row.id
        )
    return content


def context_of(
    row: Provider, answer: dict[str, Any], sent: datetime, paths: Mapping[str, str]
) -> OAuth2Context:
    """
    Return the context of a token answer.

    Raises:
        ProviderUnavailable: There is no access token in it.
        TokenRequestError: It is no bearer token.
    """

    def member(name: str) -> Any:
        value: Any = answer
        for part in paths.get(name, name).split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    token, kind = member("access_token"), member("token_type")
    # An answer without a token must never stamp the old one as fresh.
    if not isinstance(token, str) or not token:
        raise ProviderUnavailable(f"{row.label} sent no access token", provider=row.id)
    # RFC 6749 section 5.1 wants token_type; several providers leave it out, and
    # Slack calls a bearer token "user" or "bot".
    if isinstance(kind, str) and kind.lower() not in {"bearer", "user", "bot"}:
        raise TokenRequestError(
            f"{row.label} sent a token that is no bearer token",
            provider=row.id,
            code="unsupported_token_type",
            status=200,
        )
    refresh, id_token = member("refresh_token"), member("id_token")
    return OAuth2Context(
        access_token=token,
        description=f"{row.label} account",
        expires_at=_expiry(member("expires_in"), sent),
        scopes=_scopes(member("scope")),
        refresh_token=refresh if isinstance(refresh, str) and refresh else None,
        id_token=id_token if isinstance(id_token, str) and id_token else None,
    )


def _expiry(expires_in: Any, sent: datetime) -> datetime | None:
    # Counted from the request, not the answer. Some send strings; 0 means never.
    try:
        seconds = float(expires_in)
    except (TypeError, ValueError):
        return None
    return sent + timedelta(seconds=min(seconds, 3.2e9)) if seconds > 0 else None


def _scopes(value: Any) -> list[str] | None:
    # GitHub lists with commas whatever was sent; some send an array.
    if isinstance(value, str):
        value = re.split(r"[\s,]+", value.strip()) if value.strip() else []
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        return None
    return [scope for scope in dict.fromkeys(value) if scope]
