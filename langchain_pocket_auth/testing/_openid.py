"""ID tokens of the test authorization server, true and otherwise (OpenID Core)."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import threading
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import get_default_algorithms

from ._ledger import Grant, Ledger

_CURVES: dict[str, type[Any]] = {
    "ES256": ec.SECP256R1,
    "ES384": ec.SECP384R1,
    "ES512": ec.SECP521R1,
}
_keys: dict[tuple[str, str], Any] = {}
_lock = threading.Lock()


def private_key(name: str, algorithm: str) -> Any:
    """Return the key of that name, the same in the whole process: RSA takes 50 ms."""
    kind = algorithm if algorithm in {*_CURVES, "EdDSA"} else "RSA"
    with _lock:
        if (kind, name) not in _keys:
            _keys[kind, name] = _new_key(kind)
        return _keys[kind, name]


def _new_key(kind: str) -> Any:
    if kind == "EdDSA":
        return ed25519.Ed25519PrivateKey.generate()
    if curve := _CURVES.get(kind):
        return ec.generate_private_key(curve())
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def key_set(ledger: Ledger) -> dict[str, Any]:
    """Return the keys that check ID tokens (RFC 7517)."""
    algorithm, kid = ledger.id_token_algorithm, ledger.signing_key
    public = private_key(kid, algorithm).public_key()
    key: Any = get_default_algorithms()[algorithm].to_jwk(public, as_dict=True)
    return {"keys": [{**key, "kid": kid, "alg": algorithm, "use": "sig"}]}


def id_token(ledger: Ledger, grant: Grant, nonce: str | None) -> str:
    """Return what says who the person of *grant* is, as the options tell."""
    now, name = int(ledger.now()), grant.username
    right = {
        "iss": ledger.issuer,
        "sub": name,
        "aud": grant.client_id,
        "iat": now,
        "exp": now + int(ledger.id_token_ttl_s),
        "nonce": nonce,
        "email": f"{name}@users.test" if "email" in grant.scope.split() else None,
        "name": name.title() if "profile" in grant.scope.split() else None,
    }
    claims = right | ledger.id_token_claims
    claims = {name: value for name, value in claims.items() if value is not None}
    token = _signed(ledger, claims)
    with ledger._lock:  # noqa: SLF001
        ledger.issued_id_tokens.append(token)
    return token


def _signed(ledger: Ledger, claims: dict[str, Any]) -> str:
    algorithm, kid = ledger.id_token_algorithm, ledger.signing_key
    if ledger.id_token_key == "none":
        return jwt.encode(claims, "", "none", {"kid": kid})
    if ledger.id_token_key == "hs256":
        # By hand, because the library refuses a public key as a secret.
        public = private_key(kid, algorithm).public_key()
        secret = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        header = {"alg": "HS256", "typ": "JWT", "kid": kid}
        signed = f"{_coded(json.dumps(header))}.{_coded(json.dumps(claims))}"
        digest = hmac.digest(secret, signed.encode(), hashlib.sha256)
        return f"{signed}.{_coded(digest)}"
    name = "other" if ledger.id_token_key == "other" else kid
    return jwt.encode(claims, private_key(name, algorithm), algorithm, {"kid": kid})


def _coded(content: str | bytes) -> str:
    raw = content.encode() if isinstance(content, str) else content
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
