"""Who a person is, as an ID token proves it (OpenID Connect Core 1.0)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from .._errors import ConfigurationError, TokenRequestError
from .._http import Http
from ._discovery import discover
from ._signatures import TENANT, Wrong, prove, read

LEEWAY_S = 60.0  # for clocks that differ
MAX_TEXT = 255  # of a subject; e-mail addresses are shorter
_TENANT_ID = re.compile(r"[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}", re.IGNORECASE)


@dataclass(frozen=True, slots=True, repr=False)
class Identity:
    """
    What an ID token says of a person.

    Attributes:
        subject: Never changes and is never given to somebody else.
        email: Unless the provider says that it is not verified.
        name: The user name, or else the full name.
    """

    subject: str
    email: str | None
    name: str | None

    @property
    def label(self) -> str:
        """What people know the account by: e-mail, else name, else subject."""
        return self.email or self.name or self.subject


async def identity_of(
    http: Http,
    *,
    provider: str,
    id_token: str,
    issuer: str,
    client_id: str,
    nonce: str | None,
    jwks_uri: str | None,
    now: datetime,
) -> Identity:
    """
    Return whose *id_token* it is, after all checks of Core section 3.1.3.7.

    Args:
        http: Fetches the keys, which are kept for an hour.
        provider: Names the provider in messages.
        id_token: As the token endpoint sent it.
        issuer: Compared exactly. `{tenantid}` in it is the token's `tid` (Microsoft).
        client_id: Has to be among the audiences.
        nonce: What the authorization request sent; `None`: it sent none.
        jwks_uri: Where the keys are; `None`: where the issuer's metadata says.
        now: Aware; times may differ by a minute.

    Raises:
        TokenRequestError: A check failed, which the text names; `invalid_id_token`.
        ProviderUnavailable: The keys could not be fetched; try again later.
        ConfigurationError: The issuer's metadata names no keys.
    """
    try:
        unproved = read(id_token)
        claims = unproved.claims
        issuer = _expected_issuer(issuer, claims)
        uri = jwks_uri or await _published_keys(http, issuer, provider)
        await prove(http, uri, unproved, provider=provider)
        _check(claims, issuer, client_id, nonce, now.timestamp())
        return _identity(claims)
    except Wrong as wrong:
        reason = str(wrong)
    # Out here: what was caught may hold claims of the token.
    raise TokenRequestError(
        f"{provider}: the ID token is refused: {reason}",
        provider=provider,
        code="invalid_id_token",
        status=200,
    )


def _expected_issuer(issuer: str, claims: dict[str, Any]) -> str:
    if TENANT not in issuer:
        return issuer
    tenant = claims.get("tid")
    if not isinstance(tenant, str) or not _TENANT_ID.fullmatch(tenant):
        raise Wrong("its tid is no tenant")
    return issuer.replace(TENANT, tenant)


async def _published_keys(http: Http, issuer: str, provider: str) -> str:
    metadata = await discover(http, issuer, provider=provider)
    if metadata.jwks_uri is None:
        raise ConfigurationError(
            f"{provider}: the metadata of {issuer} names no jwks_uri, so its ID tokens "
            "cannot be checked: give the provider's row a jwks_uri, or do not ask for "
            "the scope openid"
        )
    return metadata.jwks_uri


def _check(
    claims: dict[str, Any], issuer: str, client_id: str, nonce: str | None, now: float
) -> None:
    if claims.get("iss") != issuer:
        raise Wrong("its issuer (iss) is another")
    audiences = claims.get("aud")
    if not isinstance(audiences, list):
        audiences = [audiences]
    if client_id not in audiences:
        raise Wrong("its audience (aud) is another app")
    party = claims.get("azp")
    if party != client_id and (len(audiences) > 1 or "azp" in claims):
        raise Wrong("it was issued to another app (azp)")
    if _time(claims, "exp") <= now - LEEWAY_S:
        raise Wrong("it has expired (exp)")
    if _time(claims, "iat") > now + LEEWAY_S:
        raise Wrong("it comes from the future (iat): is this computer's clock right?")
    if "nbf" in claims and _time(claims, "nbf") > now + LEEWAY_S:
        raise Wrong("it is not valid yet (nbf): is this computer's clock right?")
    if nonce is not None and claims.get("nonce") != nonce:
        raise Wrong("its nonce is not the one that was sent")


def _time(claims: dict[str, Any], name: str) -> float:
    value = claims.get(name)
    # JSON as Python reads it has Infinity, and `true` is a number in Python.
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Wrong(f"its {name} is no time")
    if isinstance(value, float) and not math.isfinite(value):
        raise Wrong(f"its {name} is no time")
    return value


def _identity(claims: dict[str, Any]) -> Identity:
    subject = _text(claims, "sub")
    # At most 255 ASCII characters (section 2).
    if subject is None or subject != claims["sub"] or not subject.isascii():
        raise Wrong("it names no subject (sub)")
    # Apple sends a text.
    unverified = claims.get("email_verified") in (False, "false")
    return Identity(
        subject,
        None if unverified else _text(claims, "email"),
        _text(claims, "preferred_username") or _text(claims, "name"),
    )


def _text(claims: dict[str, Any], name: str) -> str | None:
    """Return a claim for people: without what hides or turns text around."""
    value = claims.get(name)
    if not isinstance(value, str):
        return None
    return "".join(filter(str.isprintable, value)).strip()[:MAX_TEXT] or None
