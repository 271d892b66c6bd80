"""Private keys in PEM, and JWTs that are signed with them (RFC 7515, 7518)."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

# RFC 7518 section 3.3; twice as long takes seconds to check.
MIN_RSA_BITS, MAX_RSA_BITS = 2048, 4096
# Servers refuse what was issued in their future.
CLOCK_SKEW = timedelta(minutes=1)

_sound: set[bytes] = set()  # digests of keys that were checked
_MAX_SOUND = 1000


def rsa_key(pem: str) -> RSAPrivateKey:
    """
    Return the RSA key of a text in PEM, for RS256.

    Raises:
        ValueError: It is none. The text ends a sentence that begins with the name of
            the input or setting, and holds nothing of the key.
    """
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

    key = _loaded(pem, sound=True)
    if not isinstance(key, RSAPrivateKey):
        raise ValueError("is no RSA key.")  # noqa: TRY004 - of a value, not of a type
    if not MIN_RSA_BITS <= key.key_size <= MAX_RSA_BITS:
        raise ValueError(
            f"has {key.key_size} bits: take one of {MIN_RSA_BITS} to {MAX_RSA_BITS}."
        )
    # 40 ms for 2048 bits, 300 ms for 4096: once for each key.
    if (digest := hashlib.sha256(pem.encode()).digest()) not in _sound:
        _loaded(pem, sound=False)
        if len(_sound) >= _MAX_SOUND:
            _sound.clear()
        _sound.add(digest)
    return key


def p256_key(pem: str) -> EllipticCurvePrivateKey:
    """
    Return the key on the curve P-256 of a text in PEM, for ES256.

    Raises:
        ValueError: It is none; as for `rsa_key`.
    """
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

    key = _loaded(pem, sound=False)
    if not isinstance(key, EllipticCurvePrivateKey) or key.curve.name != "secp256r1":
        raise ValueError("is no key on the curve P-256.")
    return key


def _loaded(pem: str, *, sound: bool) -> object:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    # Environment variables and copied JSON have "\n" in the place of line ends.
    text = pem.replace("\\n", "\n").strip().encode()
    problem = "is no private key in PEM: copy all of it, from -----BEGIN to END-----."
    try:
        return load_pem_private_key(text, None, unsafe_skip_rsa_key_validation=sound)
    except TypeError:
        problem = "is encrypted: remove its passphrase."
    except (ValueError, UnsupportedAlgorithm):
        pass
    # Out here: the original may quote what was given.
    raise ValueError(problem)


def signed(
    claims: Mapping[str, Any],
    key: RSAPrivateKey | EllipticCurvePrivateKey,
    algorithm: str,
    *,
    now: datetime,
    lifetime: timedelta,
    key_id: str | None = None,
) -> str:
    """Return a JWT of *claims* that lives *lifetime*, from a minute ago."""
    import jwt

    issued = int((now - CLOCK_SKEW).timestamp())
    times = {"iat": issued, "exp": issued + int(lifetime.total_seconds())}
    headers = {"kid": key_id} if key_id else None
    return jwt.encode({**claims, **times}, key, algorithm, headers)


def fingerprint(key: RSAPrivateKey) -> str:
    """Return `SHA256:` and the base64 digest of the public key in DER."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    public = key.public_key().public_bytes(
        Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    )
    return f"SHA256:{base64.b64encode(hashlib.sha256(public).digest()).decode()}"
