"""What a token endpoint answers: checked, and read as a row says (RFC 6749, 5)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from .._errors import ConfigurationError, ProviderUnavailable, TokenRequestError
from .._http import TRANSIENT_STATUS, Answer
from .._models import AuthContext
from .._placement import BEARER
from .._rows import Provider

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
    """
    An access token and what renews it. Tools get it without the latter.

    `detail` holds what the row says to keep of answers and look-ups.
    """

    public_fields = AuthContext.public_fields | {"account"}

    refresh_token: str | None = None
    id_token: str | None = None
    account: str | None = None
    """Whose account it is, as the ID token tells: an e-mail address, or a name."""
    client: dict[str, str] | None = None
    """The client that was registered for it (RFC 7591)."""
    choices: list[dict[str, Any]] | None = None
    """Accounts that a look-up found, while the person has not chosen."""


def checked(row: Provider, answer: Answer) -> dict[str, Any]:
    """
    Return the members of a token answer.

    Raises:
        TokenRequestError: It is a refusal.
        ConfigurationError: It refuses the app itself.
        ProviderUnavailable: It is none, or says "later".
    """
    label, status, content = row.label, answer.status, answer.json()
    code = _error(row, content)
    if status in TRANSIENT_STATUS or code in {
        "temporarily_unavailable",
        "server_error",
    }:
        raise ProviderUnavailable(
            f"{label} answered {status}; try again later",
            provider=row.id,
            retry_after_s=answer.retry_after_s,
        )
    # Several report errors with status 200.
    if code or status >= 400:  # noqa: PLR2004
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
    if status not in {200, 201} or not isinstance(content, dict):
        raise ProviderUnavailable(
            f"{label} sent no token answer (status {status})", provider=row.id
        )
    return content


def _error(row: Provider, content: Any) -> str | None:
    """Return the error code of an answer; `None`: it reports none."""
    if not isinstance(content, dict):
        return None
    paths = row.token_response
    raw = content.get("error")
    if isinstance(raw, dict):
        raw = raw.get("code") or raw.get("type")
    # Numbers: 0 is none. A word for "none" is TikTok's.
    own = content.get(paths["error"]) if "error" in paths else None
    raw = raw or own
    if raw in (0, "0", "", "ok", None):  # it may be no hashable value
        success = paths.get("success")
        return "other" if success and content.get(success) is not True else None
    return raw if isinstance(raw, str) and raw in _CODES else "other"


def member(content: Any, path: str) -> Any:
    """Return what is at a path with dots; `None`: nothing."""
    for part in path.split("."):
        content = content.get(part) if isinstance(content, dict) else None
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

    def text(name: str) -> str | None:
        value = member(answer, paths.get(name, name))
        return value if isinstance(value, str) and value else None

    # An answer without a token must never stamp the old one as fresh.
    if (token := text("access_token")) is None:
        raise ProviderUnavailable(f"{row.label} sent no access token", provider=row.id)
    # RFC 6749 appendix A.12; anything else could end a header.
    if not (token.isascii() and token.isprintable()):
        raise ProviderUnavailable(
            f"{row.label} sent what is no access token", provider=row.id
        )
    # RFC 6749 section 5.1 wants token_type; several providers leave it out, and
    # Slack calls a bearer token "user" or "bot".
    kind = (text("token_type") or "bearer").lower()
    if row.api_credential == BEARER and kind not in {"bearer", "user", "bot"}:
        raise TokenRequestError(
            f"{row.label} sent a token that is no bearer token",
            provider=row.id,
            code="unsupported_token_type",
            status=200,
        )
    kept = {p.rpartition(".")[2]: member(answer, p) for p in row.token_response_members}
    return OAuth2Context(
        access_token=token,
        description=f"{row.label} account",
        expires_at=_expiry(member(answer, paths.get("expires_in", "expires_in")), sent)
        or _moment(member(answer, paths.get("expires_at", "expires_at")))
        or _expiry(row.default_expires_in, sent),
        scopes=scopes_of(member(answer, paths.get("scope", "scope"))),
        refresh_token=text("refresh_token"),
        id_token=text("id_token"),
        detail={k: v for k, v in kept.items() if v is not None} or None,
    )


def _expiry(expires_in: Any, sent: datetime) -> datetime | None:
    # Counted from the request, not the answer. Some send strings; 0 means never.
    try:
        seconds = float(expires_in)
    except (TypeError, ValueError, OverflowError):
        return None
    return sent + timedelta(seconds=min(seconds, 3.2e9)) if seconds > 0 else None


def _moment(expires_at: Any) -> datetime | None:
    # Square sends ISO 8601, others the seconds of the epoch, Medium milliseconds.
    try:
        if isinstance(expires_at, str) and not expires_at.isdigit():
            moment = datetime.fromisoformat(expires_at)
            return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        number = float(expires_at)
        seconds = number / 1000 if number > 1e11 else number  # noqa: PLR2004
        return datetime.fromtimestamp(seconds, UTC) if seconds > 0 else None
    except (TypeError, ValueError, OverflowError, OSError):
        return None


def scopes_of(value: Any) -> list[str] | None:
    """Return the scopes of an answer; `None`: it does not tell."""
    # GitHub lists with commas whatever was sent; some send an array.
    if isinstance(value, str):
        value = re.split(r"[\s,]+", value.strip()) if value.strip() else []
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        return None
    return [scope for scope in dict.fromkeys(value) if scope]
