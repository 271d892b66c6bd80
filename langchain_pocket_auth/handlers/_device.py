"""The device flow: agreeing on another machine, with a code to type (RFC 8628)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from .._errors import (
    AuthorizationRefused,
    AuthorizationRequired,
    ConfigurationError,
    ProviderUnavailable,
)
from .._http import Answer, secure_url
from .._rows import Provider
from ._answers import checked

GRANT_TYPE = "urn:ietf:params:oauth:grant-type:device_code"
DEFAULT_INTERVAL_S = 5.0  # section 3.2
SLOW_DOWN_S = 5.0  # section 3.5: for this and all later requests
LONGEST_INTERVAL_S = 60.0


@dataclass(frozen=True, slots=True)
class DeviceCode:
    """
    What a person needs for agreeing elsewhere.

    Attributes:
        user_code: What to type at the provider's page.
        verification_uri: Where.
        verification_uri_complete: The same page with the code filled in, if there is.
        expires_at: Until when.
        interval_s: Seconds between two questions whether the person has agreed.
        device_code: What is asked with; a secret.
    """

    user_code: str
    verification_uri: str
    verification_uri_complete: str | None
    expires_at: datetime
    interval_s: float
    device_code: str = field(repr=False)


def device_code_of(row: Provider, answer: Answer, sent: datetime) -> DeviceCode:
    """
    Read the answer to a device authorization request (section 3.2).

    Raises:
        ProviderUnavailable: It is none.
        TokenRequestError: It is a refusal.
        ConfigurationError: It refuses the app, or sends people to an insecure page.
    """
    content = checked(row, answer)
    # Google called it verification_url before the RFC, and still does.
    uri = content.get("verification_uri") or content.get("verification_url")
    texts = (content.get("device_code"), content.get("user_code"), uri)
    if not all(isinstance(text, str) and text for text in texts):
        raise ProviderUnavailable(f"{row.label} sent no device code", provider=row.id)
    device_code, user_code, uri = map(str, texts)
    complete = content.get("verification_uri_complete")
    return DeviceCode(
        user_code=user_code,
        verification_uri=secure_url(uri, f"{row.label}'s verification page"),
        verification_uri_complete=secure_url(complete, "the verification page")
        if isinstance(complete, str)
        else None,
        expires_at=sent + timedelta(seconds=_number(content.get("expires_in"), 300)),
        interval_s=_number(content.get("interval"), DEFAULT_INTERVAL_S),
        device_code=device_code,
    )


def _number(value: Any, default: float) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return default
    return number if 0 < number < 1e6 else default  # noqa: PLR2004


async def polled(
    row: Provider,
    code: DeviceCode,
    ask: Callable[[], Awaitable[Answer]],
    *,
    now: Callable[[], datetime],
    sleep: Callable[[float], Awaitable[None]],
) -> dict[str, Any]:
    """
    Ask until the person has decided; return the token answer (section 3.4, 3.5).

    Raises:
        AuthorizationRefused: The person said no.
        AuthorizationRequired: The code ran out.
        ConfigurationError: The server does not let this app use the flow.
        TokenRequestError: Another refusal.
    """
    interval_s = code.interval_s
    while True:
        await sleep(interval_s)
        if now() >= code.expires_at:
            raise AuthorizationRequired(
                f"{row.label}: the code ran out; begin again", provider=row.id
            )
        try:
            answer = await ask()
            content = answer.json()
            error = content.get("error") if isinstance(content, dict) else None
            match error:
                case "authorization_pending":
                    continue
                case "slow_down":
                    interval_s += SLOW_DOWN_S
                    continue
                case "access_denied":
                    raise AuthorizationRefused(
                        f"The user declined to connect {row.label}."
                    )
                case "expired_token":
                    raise AuthorizationRequired(
                        f"{row.label}: the code ran out; begin again", provider=row.id
                    )
                case _:
                    return checked(row, answer)
        except ProviderUnavailable:
            # Section 3.5: exponential backoff after a timeout.
            interval_s = min(2 * interval_s, LONGEST_INTERVAL_S)


def unsupported(row: Provider) -> ConfigurationError:
    """Return what is told where a provider has no device flow."""
    return ConfigurationError(
        f"{row.label} has no device authorization endpoint in its row: connect with "
        "the link instead (without device=True)"
    )
