"""Signed tokens of a provider, and the keys that it publishes (RFC 7515, 7517)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from .._errors import ProviderUnavailable
from .._http import Http
from ._kept import Kept

TENANT = "{tenantid}"
# Never `none`, and never HS256: a public key must not become a shared secret
# (RFC 8725 section 3.1).
_ALGORITHMS = (
    *("RS256", "RS384", "RS512"),
    *("PS256", "PS384", "PS512"),
    *("ES256", "ES384", "ES512"),
    "EdDSA",
)
_key_sets: Kept[list[dict[str, Any]]] = Kept()


class Wrong(Exception):  # noqa: N818 - caught where the token came from
    """A check failed; the text says which, and nothing of the token."""


@dataclass(frozen=True, slots=True, repr=False)
class Unproved:
    """A token, and what it claims."""

    token: str
    header: dict[str, Any]
    claims: dict[str, Any]


def read(token: str) -> Unproved:
    """
    Return the parts of a token.

    Raises:
        Wrong: It is none that can be proved.
    """
    import jwt  # it takes 30 ms, and most apps never see an ID token

    try:
        parts = jwt.PyJWS().decode_complete(token, options={"verify_signature": False})
        claims = json.loads(parts["payload"])
    except (jwt.PyJWTError, ValueError, RecursionError):
        raise Wrong("it is no signed JWT") from None
    if not isinstance(claims, dict):
        raise Wrong("it is no signed JWT")
    if parts["header"].get("alg") not in _ALGORITHMS:
        raise Wrong("its algorithm proves nothing")
    return Unproved(token, parts["header"], claims)


async def prove(
    http: Http, jwks_uri: str, unproved: Unproved, *, provider: str
) -> None:
    """
    Check the signature with the keys at *jwks_uri*, which are kept for an hour.

    A key that is not among them makes for another look, once a minute at most.

    Raises:
        Wrong: No key of the provider's made it.
        ProviderUnavailable: The keys could not be fetched.
    """
    for renew in (False, True):
        keys = await _key_sets.get(
            http, jwks_uri, lambda: _fetch(http, jwks_uri, provider), renew=renew
        )
        fitting = [key for key in keys if _fits(key, unproved)]
        if any(_signed(unproved, key) for key in fitting):
            return
        if fitting and "kid" in unproved.header:
            raise Wrong("its signature is wrong")
    raise Wrong("its signature is by none of the provider's keys")


async def _fetch(http: Http, jwks_uri: str, provider: str) -> list[dict[str, Any]]:
    answer = await http.request("GET", jwks_uri, provider=provider)
    content = answer.json()
    keys = content.get("keys") if isinstance(content, dict) else None
    if answer.status != 200 or not isinstance(keys, list):  # noqa: PLR2004
        raise ProviderUnavailable(
            f"{provider}: the keys of its ID tokens cannot be read (status "
            f"{answer.status}); try again later",
            provider=provider,
            retry_after_s=answer.retry_after_s,
        )
    return [key for key in keys if isinstance(key, dict)]


def _fits(key: dict[str, Any], unproved: Unproved) -> bool:
    header, claims = unproved.header, unproved.claims
    # Microsoft has one key set for all tenants, and says which key is whose.
    owner = str(key.get("issuer", claims.get("iss")))
    return (
        ("kid" not in header or key.get("kid") == header["kid"])
        and key.get("use", "sig") == "sig"
        and key.get("alg", header["alg"]) == header["alg"]
        and owner.replace(TENANT, str(claims.get("tid"))) == str(claims.get("iss"))
    )


def _signed(unproved: Unproved, key: dict[str, Any]) -> bool:
    import jwt

    algorithm = unproved.header["alg"]
    jws = jwt.PyJWS(options={"enforce_minimum_key_length": True})
    try:
        # A key of another kind or curve is an error too.
        jws.decode(unproved.token, jwt.PyJWK(key, algorithm), algorithms=[algorithm])
    except (jwt.PyJWTError, ValueError, TypeError):
        return False
    return True
