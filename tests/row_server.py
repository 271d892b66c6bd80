"""
A provider on loopback for each row of the catalog, which demands what the row says.

One server for a whole run; a `Case` is one provider on it, with its own addresses:
`https://slack.com/api/x` becomes `http://127.0.0.1:<port>/<case>/https/slack.com/api/x`.
Whatever a client does otherwise than the row says is refused as that provider refuses
it, and written to `Case.complaints`, so that a test can tell why a flow failed.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import time
import zlib
from base64 import b64decode, b64encode, urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from threading import Thread
from typing import Any, Self
from urllib.parse import parse_qsl, quote, unquote, unquote_plus, urlencode, urlsplit

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils

from langchain_pocket_auth import Provider
from langchain_pocket_auth._row_parts import Form
from langchain_pocket_auth._rows import JWT_BEARER

FRAGMENT = "X-Page-Fragment"
"""In which the person tells what a script of the page would read of the address."""
LIFETIME_S = 3600
EXCHANGED_S = 5_184_000  # Meta's 60 days

# What the vendors do and no key of a row says, because every client copes with it.
ERRORS_WITH_200 = {"github", "naver", "tiktok", "zoho"}
SCOPES_AS_ARRAY = {"hubspot", "twitch"}
SCOPES_WITH_COMMA = {"github"}
EVERLASTING = {"mailchimp", "tiktok_ads"}
ONE_OBJECT = {"mailchimp"}  # the answer to its look-up is the account itself
NUMBERS = {"basecamp", "harvest"}  # their ids are numbers
CALLBACK_VALUES = {
    "zoho": {"accounts-server": "https://accounts.zoho.eu"},
    "datadog": {"domain": "datadoghq.eu"},
}
INSTALLATION = (
    "https://api.github.com/app/installations/{installation_id}/access_tokens"
)
ADDRESSES = {
    "issuer",
    "authorization_endpoint",
    "token_endpoint",
    "refresh_endpoint",
    "revocation_endpoint",
    "device_authorization_endpoint",
    "registration_endpoint",
    "jwks_uri",
    "endpoint",
    "api_base_url",
    "url",
}


class Refused(Exception):  # noqa: N818 - it reads as what happened
    """A request deviates; `place: what` is the complaint."""

    def __init__(self, place: str, what: str, code: str = "invalid_request") -> None:
        super().__init__(f"{place}: {what}")
        self.place, self.code = place, code


@dataclass
class Asked:
    """A request as it arrived."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    body: bytes


@dataclass
class Given:
    """An answer."""

    body: Any = None
    status: int = 200
    location: str | None = None
    name: str | None = None
    """What was asked for, where the address does not say it."""


@dataclass
class Code:
    """An authorization code that was given out."""

    challenge: str | None
    nonce: str | None
    used: bool = False


@cache
def rsa_key() -> rsa.RSAPrivateKey:
    """The key of ID tokens, and of those who sign as an app: making one takes 50 ms."""
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


@cache
def ec_key() -> ec.EllipticCurvePrivateKey:
    """The key of an app at Apple."""
    return ec.generate_private_key(ec.SECP256R1())


def pem(key: Any) -> str:
    """Return a private key as people paste it."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ).decode()


def _b64(data: bytes) -> str:
    return urlsafe_b64encode(data).decode().rstrip("=")


def _unb64(text: str) -> bytes:
    return urlsafe_b64decode(text + "=" * (-len(text) % 4))


def signed(claims: Mapping[str, Any]) -> str:
    """Return an RS256 JWT of the server."""
    header = {"alg": "RS256", "kid": "row-server", "typ": "JWT"}
    text = ".".join(_b64(json.dumps(part).encode()) for part in (header, claims))
    signature = rsa_key().sign(text.encode(), padding.PKCS1v15(), hashes.SHA256())
    return f"{text}.{_b64(signature)}"


def verified(token: str, algorithm: str, place: str, now: float) -> dict[str, Any]:
    """Return the claims of a client's JWT, signed by the key of this module."""
    try:
        text, _, signature = token.rpartition(".")
        header, claims = (json.loads(_unb64(part)) for part in text.split("."))
        if header["alg"] != algorithm:
            raise Refused(place, f"the JWT's alg is not {algorithm}", "invalid_client")
        raw = _unb64(signature)
        if algorithm == "ES256":
            ints = (int.from_bytes(raw[:32]), int.from_bytes(raw[32:]))
            ec_key().public_key().verify(
                utils.encode_dss_signature(*ints),
                text.encode(),
                ec.ECDSA(hashes.SHA256()),
            )
        else:
            rsa_key().public_key().verify(
                raw, text.encode(), padding.PKCS1v15(), hashes.SHA256()
            )
    except (ValueError, KeyError, TypeError, InvalidSignature) as error:
        problem = type(error).__name__
        raise Refused(place, f"no good JWT ({problem})", "invalid_client") from None
    if not claims.get("exp", 0) > now or claims.get("iat", now) > now + 60:
        raise Refused(place, "the JWT is not valid now", "invalid_client")
    return {**claims, "kid": header.get("kid")}


def pairs_of(text: str, place: str) -> dict[str, str]:
    """Return the parameters; none may be there twice (RFC 6749 section 3.1)."""
    pairs = parse_qsl(text, keep_blank_values=True, strict_parsing=bool(text))
    if len(dict(pairs)) != len(pairs):
        raise Refused(place, "a parameter is there twice")
    return dict(pairs)


def same(
    place: str,
    given: Mapping[str, str],
    wanted: Mapping[str, str],
    maybe: Iterable[str] = (),
) -> None:
    """Refuse what is missing, what is different, and what nobody asked for."""
    for name, value in wanted.items():
        if name not in given:
            raise Refused(place, f"{name} is missing")
        if given[name] != value:
            raise Refused(place, f"{name} is wrong")
    if unknown := sorted(given.keys() - wanted.keys() - set(maybe)):
        raise Refused(place, f"{unknown[0]} is not a parameter here")


def put(answer: dict[str, Any], path: str, value: Any) -> None:
    """Set a member at a path."""
    *parents, last = path.split(".")
    for name in parents:
        answer = answer.setdefault(name, {})
    answer[last] = value


def fill(template: str, values: Mapping[str, Any]) -> str:
    """Return a template with its values; others stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda m: str(values.get(m[1], m[0])), template)


@dataclass
class Case:
    """One provider of the server: what it demands, what it gave out, what it saw."""

    row: Provider
    """The original row, whatever the client believes."""
    method: str
    origin: str
    """Address of the server and this case, without a slash at the end."""
    redirect_uri: str
    client_id: str
    client_secret: str
    variables: dict[str, str]
    scopes: list[str]
    """What the client's tool needs."""
    typed: dict[str, str] = field(default_factory=dict)
    """What a person types into the form."""
    complaints: list[str] = field(default_factory=list)
    served: list[str] = field(default_factory=list)
    """Names of the requests that were answered as asked."""
    learned: dict[str, Any] = field(default_factory=dict)
    codes: dict[str, Code] = field(default_factory=dict)
    token: str = ""
    refresh_token: str = ""
    revoked: set[str] = field(default_factory=set)
    exchanged: bool = False
    lifetime_s: int = 0
    """Of the last token; 0: for ever."""
    ahead_s: float = 0
    """How far the client's clock was moved; this one goes with it."""

    # ------------------------------------------------------------------ addresses

    def local(self, url: str) -> str:
        """Return the address of this case that stands for *url*."""
        return url.replace("https://", f"{self.origin}/https/", 1)

    def rewritten(self, row: Provider | None = None) -> Provider:
        """Return a row that a client uses, with the addresses of this case."""

        def moved(key: str, value: Any) -> Any:
            if isinstance(value, dict):
                return {k: moved(k, v) for k, v in value.items()}
            if key in ADDRESSES and isinstance(value, str):
                return self.local(value)
            return value

        facts = (row or self.row).model_dump(mode="json", exclude_unset=True)
        # Providers that want https here are another test's.
        facts.pop("redirect_uri_prefixes", None)
        return Provider(**moved("", facts))

    def _path(self, url: str | None) -> str | None:
        """Return the path of an address of the row, as it is now."""
        if url is None:
            return None
        return unquote(urlsplit(self.local(fill(url, self._values))).path)

    @property
    def _values(self) -> dict[str, Any]:
        return {
            **self.learned,
            **self.variables,
            "client_id": self.client_id,
            "client_secret": self.client_secret,
            "token": self.token,
            **self.typed,
        }

    @property
    def _now(self) -> float:
        return time.time() + self.ahead_s

    def _in(self, seconds: int) -> datetime:
        return datetime.fromtimestamp(self._now + seconds, UTC)

    def _requests(self) -> dict[str, str | None]:
        row = self.row
        exchange = row.token_exchange
        found = {
            "refresh": row.refresh_endpoint,
            "authorize": row.authorization_endpoint,
            "revocation": row.revocation.endpoint
            if row.revocation
            else row.revocation_endpoint,
            "lookup": row.account_lookup and row.account_lookup.endpoint,
            "exchange": exchange and exchange.endpoint,
            "exchange again": exchange and exchange.refresh_endpoint,
            "keys": row.jwks_uri or (row.issuer and row.issuer.rstrip("/") + "/keys"),
        }
        if row.id == "github_app":
            found["installation token"] = INSTALLATION
        found["token"] = row.token_endpoint  # last, because others may be there
        return {name: self._path(url) for name, url in found.items()}

    def answer(self, asked: Asked) -> Given:
        """Do what a request asks for, or say why not."""
        try:
            name = self._which(asked)
            given: Given = getattr(self, f"_{name.replace(' ', '_')}")(asked)
        except Refused as refused:
            self.complaints.append(str(refused))
            return self._failure(refused)
        self.served.append(given.name or name)
        return given

    def _which(self, asked: Asked) -> str:
        if asked.path == "/api" or asked.path.endswith("/getMe"):
            return "api"
        if ".well-known/" in asked.path:
            return "metadata"
        found = [n for n, p in self._requests().items() if p == unquote(asked.path)]
        if not found:
            raise Refused("server", f"nothing is at {asked.path}")
        # Naver revokes, and Facebook exchanges, where tokens are.
        text = f"{asked.query}&{asked.body.decode(errors='replace')}"
        grants = {"revocation": "grant_type=delete"}
        if exchange := self.row.token_exchange:
            grants["exchange"] = f"grant_type={exchange.grant_type}"
        if "token" in found:
            found = [n for n in found if grants.get(n, "") in text]
        return found[0]

    def _failure(self, refused: Refused) -> Given:
        if refused.place == "authorize":
            return Given("<!doctype html><p>This request is refused.", 400)
        if refused.place == "api":
            return Given({"error": "unauthorized"}, 401)
        paths = self.row.token_response
        code = refused.code
        if "success" in paths:
            body: dict[str, Any] = {"error": code}
            put(body, paths["success"], False)
            return Given(body)
        if "error" in paths:
            body = {"message": code}
            put(body, paths["error"], 40001)
            return Given(body)
        body = {"error": code, "error_description": "This request is refused."}
        if self.row.id in ERRORS_WITH_200:
            return Given(body)
        return Given(body, 401 if code == "invalid_client" else 400)

    # -------------------------------------------------------------- authorization

    def _asked_as(self, parameter: str) -> str:
        """Return the name of a parameter in the authorization request."""
        names = self.row.parameter_names | self.row.authorization_parameter_names
        return names.get(parameter, parameter)

    def _name(self, parameter: str) -> str:
        return self.row.parameter_names.get(parameter, parameter)

    def _authorize(self, asked: Asked) -> Given:
        row, place = self.row, "authorize"
        given = self._authorization_parameters(asked)
        wanted = {
            **{
                k: fill(v, self.variables)
                for k, v in row.authorization_parameters.items()
            },
            self._asked_as("client_id"): self.client_id,
            "redirect_uri": self.redirect_uri,
            "state": given.get("state", ""),
        }
        if row.response_type:
            wanted["response_type"] = row.response_type
        if row.code_challenge_method == "S256":
            wanted |= {"code_challenge_method": "S256"}
            wanted["code_challenge"] = given.get("code_challenge", "")
        asks = {*self.scopes, *row.required_scopes}
        if row.scoped and asks:
            text = given.get(row.scope_parameter, "")
            listed = text.split(row.scope_separator)
            right = set(listed) == asks and len(listed) == len(asks)
            wanted[row.scope_parameter] = text if right else "another"
        maybe = {"nonce"} if row.scoped and "openid" in asks else set()
        same(place, given, wanted, maybe)
        if asked.method != "GET":
            raise Refused(place, "the method is wrong")
        if not 20 <= len(given["state"]) <= 200:
            raise Refused(place, "state is not fit to be one")
        challenge = given.get("code_challenge")
        if challenge is not None and not re.fullmatch(r"[\w-]{43}", challenge):
            raise Refused(place, "code_challenge is no S256 challenge")
        code = f"c0de/{secrets.token_urlsafe(9)}+~=&"
        if row.id == "shopify":  # its signature is over what needs no encoding
            code = secrets.token_hex(16)
        self.codes[code] = Code(challenge, given.get("nonce"))
        answer = {row.code_parameter: code, "state": given["state"]}
        return self._to_client(answer, given)

    def _authorization_parameters(self, asked: Asked) -> dict[str, str]:
        """Return the parameters; some pages are reached through the fragment."""
        place, fragment = "authorize", asked.headers.get(FRAGMENT, "")
        wanted = (self.row.authorization_endpoint or "").partition("#")[2]
        if wanted.startswith("/"):
            route, _, query = fragment.partition("?")
            if route != wanted or asked.query:
                raise Refused(place, "the page is not reached through the fragment")
            return pairs_of(query, place)
        if fragment != wanted:
            raise Refused(place, "the fragment is wrong")
        return pairs_of(asked.query, place)

    def _to_client(self, answer: dict[str, str], given: Mapping[str, str]) -> Given:
        row = self.row
        if row.authorization_response_iss_parameter_supported and row.issuer:
            answer["iss"] = self.local(fill(row.issuer, self.variables))
        answer |= {name: f"cb-{name}" for name in row.callback_members}
        for parameter, value in CALLBACK_VALUES.get(row.id, {}).items():
            answer[parameter] = value
            for name, variable in row.variables.items():
                if variable.callback_parameter == parameter:
                    self.variables[name] = value.removeprefix("https://")
        if row.id == "shopify":
            answer["shop"] = f"{self.variables['shop']}.myshopify.com"
            answer["timestamp"] = str(int(time.time()))
            answer["host"] = "YWRtaW4uc2hvcGlmeS5jb20"
            answer["hmac"] = shopify_hmac(answer, self.client_secret)
        for name in {*row.callback_members} - row.variables.keys():
            self.learned[name] = answer[name]
        if given.get("response_mode") == "form_post":
            fields = "".join(
                f'<input type="hidden" name="{escape(k)}" value="{escape(v)}">'
                for k, v in answer.items()
            )
            action = escape(self.redirect_uri)
            page = f'<form method="post" action="{action}">{fields}</form>'
            return Given(f"<!doctype html>{page}")
        return Given(None, 302, location=f"{self.redirect_uri}?{urlencode(answer)}")

    # --------------------------------------------------------------------- tokens

    def _parameters(self, asked: Asked, place: str) -> dict[str, str]:
        """Return what a token request carries, in the form the row says."""
        row = self.row
        if asked.method != row.token_request_method:
            raise Refused(place, "the method is wrong")
        headers = {"Accept": "application/json", **row.token_request_headers}
        for name, value in headers.items():
            if asked.headers.get(name) != fill(value, self.variables):
                raise Refused(place, f"the header {name} is wrong")
        if re.match(r"(?i)$|python|httpx", asked.headers.get("User-Agent", "")):
            raise Refused(place, "the header User-Agent names a library, or nothing")
        if row.token_request_method == "GET":
            if asked.body:
                raise Refused(place, "a GET request has no body")
            return pairs_of(asked.query, place)
        if asked.query:
            raise Refused(place, "parameters are in the address")
        return self._body(asked, row.token_request_format, place)

    @staticmethod
    def _body(asked: Asked, kind: str, place: str) -> dict[str, str]:
        types = {
            "form": "application/x-www-form-urlencoded",
            "json": "application/json",
        }
        if asked.headers.get("Content-Type", "").partition(";")[0] != types[kind]:
            raise Refused(place, f"the body is not {kind}")
        if kind == "form":
            return pairs_of(asked.body.decode(), place)
        try:
            found = json.loads(asked.body)
        except ValueError:
            raise Refused(place, "the body is no JSON") from None
        return {str(k): str(v) for k, v in found.items()}

    def _app(
        self, asked: Asked, given: Mapping[str, str], method: str, place: str
    ) -> dict[str, str]:
        """Check who asks (RFC 6749 section 2.3); return what that adds to a body."""
        id_, secret = self._name("client_id"), self._name("client_secret")
        header = asked.headers.get("Authorization")
        if method == "client_secret_basic":
            if header is None:
                raise Refused(
                    place, "the app is not in Authorization", "invalid_client"
                )
            # Each is form-encoded before (RFC 6749 section 2.3.1).
            user, _, password = _basic(header, place).partition(":")
            pair = (unquote_plus(user), unquote_plus(password))
            if pair != (self.client_id, self.client_secret):
                raise Refused(place, "Authorization is wrong", "invalid_client")
            return {}
        if header is not None:
            raise Refused(place, "the app is in Authorization", "invalid_client")
        if method == "none":
            return {id_: self.client_id}
        known = self.client_secret
        if self.row.id == "apple":
            known = self._apple_secret(given.get(secret, ""), place)
        if given.get(secret, known) != known:
            raise Refused(place, f"{secret} is wrong", "invalid_client")
        return {id_: self.client_id, secret: known}

    def _apple_secret(self, token: str, place: str) -> str:
        claims = verified(token, "ES256", place, self._now)
        wanted = {
            "iss": self.variables["team_id"],
            "sub": self.client_id,
            "kid": self.variables["key_id"],
        }
        same(place, {k: claims.get(k, "") for k in wanted}, wanted)
        origins = {"https://appleid.apple.com", self.local("https://appleid.apple.com")}
        if claims.get("aud") not in origins:
            raise Refused(place, "aud is wrong", "invalid_client")
        if claims["exp"] > self._now + 183 * 86400:
            raise Refused(place, "the JWT lives too long", "invalid_client")
        return token

    def _token(self, asked: Asked, *, at_refresh: bool = False) -> Given:
        row, place = self.row, "refresh" if at_refresh else "token"
        given = self._parameters(asked, place)
        kind = given.get(self._name("grant_type"), "")
        if kind == "refresh_token":
            place = "refresh"
            if row.refresh_endpoint and not at_refresh:
                raise Refused(place, "it belongs to the refresh endpoint")
        elif at_refresh:
            raise Refused(place, "only refresh tokens are taken here")
        grants: dict[str, Callable[[Asked, dict[str, str]], Given]] = {
            "authorization_code": self._of_code,
            "refresh_token": self._of_refresh_token,
            "client_credentials": self._of_client,
            JWT_BEARER: self._of_assertion,
        }
        expected = {
            "oauth2": {"authorization_code", "refresh_token"},
            "client_credentials": {"client_credentials"},
            "keypair": {JWT_BEARER},
        }
        if kind not in expected.get(self.method, set()):
            raise Refused(place, f"{self._name('grant_type')} is wrong")
        return grants[kind](asked, given)

    def _refresh(self, asked: Asked) -> Given:
        return self._token(asked, at_refresh=True)

    def _of_code(self, asked: Asked, given: dict[str, str]) -> Given:
        row, place = self.row, "token"
        app = self._app(asked, given, row.token_endpoint_auth_method, place)
        code = given.get(self._name("code"), "")
        issued = self.codes.get(code)
        if issued is None or issued.used:
            raise Refused(place, f"{self._name('code')} is wrong", "invalid_grant")
        wanted = {
            self._name("grant_type"): "authorization_code",
            self._name("code"): code,
            self._name("redirect_uri"): self.redirect_uri,
            **{k: fill(v, self.variables) for k, v in row.token_parameters.items()},
            **app,
        }
        if issued.challenge is not None:
            verifier = given.get("code_verifier", "")
            digest = _b64(hashlib.sha256(verifier.encode()).digest())
            fits = digest == issued.challenge and 43 <= len(verifier) <= 128
            wanted["code_verifier"] = verifier if fits else "another"
        same(place, given, wanted)
        issued.used = True
        return Given(self._grant({**row.token_response}, issued.nonce, first=True))

    def _of_refresh_token(self, asked: Asked, given: dict[str, str]) -> Given:
        row, place = self.row, "refresh"
        method = row.refresh_endpoint_auth_method or row.token_endpoint_auth_method
        app = self._app(asked, given, method, place)
        name = self._name("refresh_token")
        if not self.refresh_token or given.get(name, "") != self.refresh_token:
            raise Refused(place, f"{name} is wrong", "invalid_grant")
        wanted = {
            self._name("grant_type"): "refresh_token",
            name: self.refresh_token,
            **{k: fill(v, self.variables) for k, v in row.refresh_parameters.items()},
            **app,
        }
        same(place, given, wanted)
        answer = self._grant({**row.token_response, **row.refresh_response})
        return Given(answer, name="refresh")

    def _of_client(self, asked: Asked, given: dict[str, str]) -> Given:
        row, place = self.row, "token"
        app = self._app(asked, given, row.token_endpoint_auth_method, place)
        wanted = {self._name("grant_type"): "client_credentials", **app}
        if row.scoped:
            text = given.get(row.scope_parameter, "")
            listed = set(text.split(row.scope_separator))
            # Nobody is offline here, who would come back.
            needed = {*self.scopes, *row.required_scopes} - {"offline_access"}
            right = listed - {"offline_access"} == needed
            wanted[row.scope_parameter] = text if right else "another"
        same(place, given, wanted)
        return Given(self._grant({}, first=True, renewable=False))

    def _of_assertion(self, asked: Asked, given: dict[str, str]) -> Given:
        place, row = "token", self.row
        claims = verified(given.get("assertion", ""), "RS256", place, self._now)
        wanted = {
            "iss": self.typed["client_email"],
            "sub": self.typed["subject"],
            "scope": self.typed["scopes"],
        }
        same(place, {k: str(claims.get(k, "")) for k in wanted}, wanted)
        at = str(row.token_endpoint)
        if claims.get("aud") not in {at, self.local(at)}:
            raise Refused(place, "aud is wrong")
        if claims["exp"] > claims["iat"] + 3600:
            raise Refused(place, "the assertion lives too long")
        same(
            place,
            given,
            {"grant_type": JWT_BEARER, "assertion": given["assertion"]},
        )
        return Given(self._grant({}, first=True, renewable=False))

    def _installation_token(self, asked: Asked) -> Given:
        place = "installation token"
        if asked.method != "POST":
            raise Refused(place, "the method is wrong")
        if not asked.headers.get("User-Agent"):
            raise Refused(place, "the header User-Agent is missing")
        scheme, _, token = asked.headers.get("Authorization", "").partition(" ")
        if scheme != "Bearer":
            raise Refused(place, "no Bearer token")
        claims = verified(token, "RS256", place, self._now)
        if str(claims.get("iss")) != self.typed["app_id"]:
            raise Refused(place, "iss is wrong")
        if claims["exp"] > self._now + 600:
            raise Refused(place, "the JWT lives too long")
        self._new_token()
        until = self._in(LIFETIME_S)
        self.lifetime_s = LIFETIME_S
        body = {"token": self.token, "expires_at": f"{until:%Y-%m-%dT%H:%M:%SZ}"}
        return Given(body, 201)

    def _new_token(self) -> None:
        self.token = f"at.{secrets.token_urlsafe(12)}~+/="

    def _grant(
        self,
        paths: dict[str, str],
        nonce: str | None = None,
        *,
        first: bool = False,
        renewable: bool = True,
    ) -> dict[str, Any]:
        """Return a token answer; the token before it is over."""
        row, answer = self.row, dict[str, Any]()
        self._new_token()

        def say(name: str, value: Any) -> None:
            put(answer, paths.get(name, name), value)

        say("access_token", self.token)
        say("token_type", "user" if row.id == "slack" else "Bearer")
        self._say_expiry(say)
        if (
            renewable
            and row.token_exchange is None
            and self._gives_refresh_token(first)
        ):
            self.refresh_token = f"rt.{secrets.token_urlsafe(12)}~+/="
            say("refresh_token", self.refresh_token)
        if row.scoped and first and (scopes := self._spelled()):
            as_array = row.id in SCOPES_AS_ARRAY
            separator = "," if row.id in SCOPES_WITH_COMMA else row.scope_separator
            say("scope", scopes if as_array else separator.join(scopes))
        if "success" in paths:
            say("success", value=True)
        if "error" in paths and paths["error"] != "errcode":
            say("error", 0)
        if first and self.method == "oauth2":
            for path in row.token_response_members:
                name = path.rpartition(".")[2]
                self.learned[name] = self._value_of(name)
                put(answer, path, self.learned[name])
            if row.issuer and "openid" in {*self.scopes, *row.required_scopes}:
                answer["id_token"] = self._id_token(row.issuer, nonce)
        return answer

    def _gives_refresh_token(self, first: bool) -> bool:
        # Half of the rows rotate theirs, the other half keep the first for ever.
        return first or bool(zlib.crc32(self.row.id.encode()) % 2)

    def _say_expiry(self, say: Callable[[str, Any], None]) -> None:
        until = self._in(LIFETIME_S)
        self.lifetime_s = self.row.default_expires_in or LIFETIME_S
        if self.row.id in EVERLASTING:
            self.lifetime_s = 0
        match self.row.id:
            case "mailchimp":
                say("expires_in", 0)
            case "tiktok_ads":
                pass
            case "naver":
                say("expires_in", str(LIFETIME_S))
            case "square":
                say("expires_at", f"{until:%Y-%m-%dT%H:%M:%SZ}")
            case "strava":
                say("expires_at", int(until.timestamp()))
                say("expires_in", LIFETIME_S)
            case _ if self.row.default_expires_in is None:
                say("expires_in", LIFETIME_S)

    def _spelled(self) -> list[str]:
        """Return the scopes as this provider spells them in answers."""
        row = self.row
        asked = dict.fromkeys([*self.scopes, *row.required_scopes])
        implied = {
            narrow for wide in asked for narrow in row.scope_implies.get(wide, ())
        }
        return [
            row.scope_aliases.get(scope) or f"{row.scope_prefix}{scope}"
            for scope in asked
            if scope not in {*row.scopes_not_echoed, *implied}
        ]

    def _value_of(self, member: str) -> Any:
        if (self.row.api_base_url or "").startswith(f"{{{member}}}"):
            return f"{self.origin}/https/{member.replace('_', '-')}.example.com"
        if member == "livemode":
            return True
        if member == "athlete":
            return {"id": 4711}
        return f"member-{member}"

    def _id_token(self, issuer: str, nonce: str | None) -> str:
        values = {**self.variables, "tenantid": "11111111-2222-4333-8444-555555555555"}
        now = int(self._now)
        claims = {
            "iss": self.local(fill(issuer, values)),
            "tid": values["tenantid"],
            "aud": self.client_id,
            "sub": f"sub-{self.row.id}",
            "email": "alice@example.com",
            "email_verified": True,
            "iat": now,
            "exp": now + LIFETIME_S,
        }
        return signed(claims | ({"nonce": nonce} if nonce else {}))

    def _exchange(self, asked: Asked, *, again: bool = False) -> Given:
        place, exchange = "exchange", self.row.token_exchange
        assert exchange is not None
        if asked.method != exchange.method:
            raise Refused(place, "the method is wrong")
        if exchange.method == "GET":
            given = pairs_of(asked.query, place)
        else:
            given = self._body(asked, "form", place)
        app = self._app(asked, given, self.row.token_endpoint_auth_method, place)
        grant = exchange.refresh_grant_type if again else exchange.grant_type
        wanted = {
            "grant_type": grant or exchange.grant_type,
            exchange.token_parameter: self.token,
        }
        # What refreshes at an address of its own knows the app by the token.
        same(place, given, wanted if again else wanted | app, app if again else ())
        if exchange.refresh_endpoint and again != self.exchanged:
            raise Refused(place, "it belongs to the other endpoint")
        self._new_token()
        self.exchanged, self.lifetime_s = True, EXCHANGED_S
        return Given(
            {
                "access_token": self.token,
                "token_type": "bearer",
                "expires_in": EXCHANGED_S,
            }
        )

    def _exchange_again(self, asked: Asked) -> Given:
        return self._exchange(asked, again=True)

    # -------------------------------------------------- look-up, API and revocation

    def _lookup(self, asked: Asked) -> Given:
        place, look = "lookup", self.row.account_lookup
        assert look is not None
        if asked.method != "GET" or asked.query or asked.body:
            raise Refused(place, "it is a plain GET request")
        if asked.headers.get("Authorization") != f"{look.prefix}{self.token}":
            raise Refused(place, "Authorization is wrong")
        account: dict[str, Any] = {}
        put(account, look.label, "Acme Inc.")
        put(account, look.id, 4711 if self.row.id in NUMBERS else "acc-4711")
        for name, path in look.members.items():
            if path != look.id:
                put(account, path, self._value_of(name))
            value: Any = account
            for step in path.split("."):
                value = value[step]
            self.learned[name] = value
        if look.list:
            body: dict[str, Any] = {}
            put(body, look.list, [account])
            return Given(body)
        return Given(account if self.row.id in ONE_OBJECT else [account])

    @property
    def form(self) -> Form | None:
        """The form of the method, if it is one."""
        return self.row.form(self.method)

    def _api(self, asked: Asked) -> Given:
        """Check that the credential is where the API takes it, and nowhere else."""
        place, rules = "api", self.form or self.row
        where, values = rules.api_credential, self._values
        if where.signature:  # signed as an app: what it got is a bearer token
            where = type(where)()
        token = values["token"]
        headers = {k: fill(v, values) for k, v in rules.api_headers.items()}
        query = {k: fill(v, values) for k, v in rules.api_query.items()}
        if self.row.id == "snowflake" and self.method == "keypair":
            token = self._snowflake_token(asked)
            headers["X-Snowflake-Authorization-Token-Type"] = "KEYPAIR_JWT"
        if where.username is not None:
            pair = (
                f"{fill(where.username, values)}:{fill(where.password or '', values)}"
            )
            headers["Authorization"] = f"Basic {b64encode(pair.encode()).decode()}"
        elif where.url is not None:
            quoted = {k: quote(str(v), safe="") for k, v in values.items()}
            begin = urlsplit(self.local(fill(where.url, quoted))).path
            if unquote(asked.path) != f"{unquote(begin).rstrip('/')}/getMe":
                raise Refused(place, "the path is wrong")
        elif where.query is not None:
            query[where.query] = token
        else:
            name = where.header or "Authorization"
            prefix = "Bearer " if name == "Authorization" else ""
            headers[name] = f"{prefix if where.prefix is None else where.prefix}{token}"
        self._only_there(asked, headers, query, token)
        return Given({"ok": True})

    @staticmethod
    def _only_there(
        asked: Asked, headers: dict[str, str], query: dict[str, str], token: str
    ) -> None:
        place = "api"
        for name, value in headers.items():
            if name not in asked.headers:
                raise Refused(place, f"the header {name} is missing")
            if asked.headers[name] != value:
                raise Refused(place, f"the header {name} is wrong")
        same(place, pairs_of(asked.query, place), query)
        known = {name.lower() for name in headers}
        for name, value in asked.headers.items():
            if name.lower() not in known and (
                name.lower() == "authorization" or (token and token in value)
            ):
                raise Refused(place, f"the header {name} holds a credential")

    def _snowflake_token(self, asked: Asked) -> str:
        token = asked.headers.get("Authorization", "").removeprefix("Bearer ")
        claims = verified(token, "RS256", "api", self._now)
        account = self.typed["account"].upper().partition(".")[0]
        user = f"{account}.{self.typed['user'].upper()}"
        public = rsa_key().public_key()
        der = public.public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        print_ = b64encode(hashlib.sha256(der).digest()).decode()
        wanted = {"sub": user, "iss": f"{user}.SHA256:{print_}"}
        same("api", {k: str(claims.get(k, "")) for k in wanted}, wanted)
        if claims["exp"] > claims["iat"] + 3600:
            raise Refused("api", "the JWT lives too long")
        self.lifetime_s = LIFETIME_S
        return token

    def _revocation(self, asked: Asked) -> Given:
        if self.row.revocation:
            return self._own_revocation(asked)
        place = "revocation"
        if asked.method != "POST" or asked.query:
            raise Refused(place, "the method is wrong")
        given = self._body(asked, "form", place)  # RFC 7009 section 2.1
        app = self._app(asked, given, self.row.token_endpoint_auth_method, place)
        known = {self.token: "access_token", self.refresh_token: "refresh_token"}
        token = given.get("token", "")
        if not token or token not in known:
            raise Refused(place, "token is wrong")
        if given.get("token_type_hint", known[token]) != known[token]:
            raise Refused(place, "token_type_hint is wrong")
        same(place, given, {"token": token, **app}, {"token_type_hint"})
        self.revoked.add(known[token])
        return Given({})

    def _own_revocation(self, asked: Asked) -> Given:
        place, rules, values = "revocation", self.row.revocation, self._values
        assert rules is not None
        if asked.method != rules.method:
            raise Refused(place, "the method is wrong")
        wanted = {k: fill(v, values) for k, v in rules.parameters.items()}
        for name, value in rules.headers.items():
            if asked.headers.get(name) != fill(value, values):
                raise Refused(place, f"the header {name} is wrong")
        if rules.basic:
            pair = _basic(asked.headers.get("Authorization", ""), place)
            if pair != f"{self.client_id}:{self.client_secret}":
                raise Refused(place, "Authorization is wrong")
        elif "Authorization" not in rules.headers and "Authorization" in asked.headers:
            raise Refused(place, "there is Authorization")
        if wanted:
            same(place, self._body(asked, rules.format, place), wanted)
        elif asked.body.strip() not in {b"", b"null"} or asked.query:
            raise Refused(place, "the body is not empty")
        self.revoked.add("access_token")
        return Given({"ok": True})

    # ------------------------------------------------------------------- metadata

    def _metadata(self, asked: Asked) -> Given:
        del asked
        row = self.row
        issuer = self.local(fill(str(row.issuer), self.variables))
        ends = ("authorization_endpoint", "token_endpoint", "revocation_endpoint")
        body: dict[str, Any] = {
            name: self.local(fill(url, self.variables))
            for name in ends
            if (url := getattr(row, name))
        }
        keys = urlsplit(self.origin)
        body |= {
            "issuer": issuer,
            "jwks_uri": f"{keys.scheme}://{keys.netloc}{self._requests()['keys']}",
            "response_types_supported": ["code"],
            "subject_types_supported": ["public"],
            "id_token_signing_alg_values_supported": ["RS256"],
        }
        return Given(body)

    def _keys(self, asked: Asked) -> Given:
        del asked
        numbers = rsa_key().public_key().public_numbers()
        key = {
            "kty": "RSA",
            "use": "sig",
            "alg": "RS256",
            "kid": "row-server",
            "n": _b64(numbers.n.to_bytes(256)),
            "e": _b64(numbers.e.to_bytes(3)),
        }
        return Given({"keys": [key]})


def shopify_hmac(answer: Mapping[str, str], secret: str) -> str:
    """Sign a callback as Shopify does: the sorted query without the signature."""
    text = urlencode(sorted((k, v) for k, v in answer.items() if k != "hmac"))
    return hmac.new(secret.encode(), text.encode(), hashlib.sha256).hexdigest()


def _basic(header: str, place: str) -> str:
    scheme, _, coded = header.partition(" ")
    try:
        if scheme == "Basic":
            return b64decode(coded, validate=True).decode()
    except ValueError:
        pass
    raise Refused(place, "Authorization is no Basic one", "invalid_client")


class RowServer:
    """The server of all cases. A context manager."""

    def __init__(self) -> None:
        self._cases: dict[str, Case] = {}
        self._numbers = count(1)
        server = self

        class Handler(_Handler):
            cases = server._cases

        self._http = _Http(("127.0.0.1", 0), Handler)
        self.origin = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = Thread(
            target=self._http.serve_forever,
            args=(0.01,),
            name="row-server",
            daemon=True,
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._thread.join(5)
        self._http.server_close()

    def case(self, row: Provider, method: str, **facts: Any) -> Case:
        """Serve a provider that demands what *row* says."""
        key = f"{row.id}-{next(self._numbers)}"
        case = Case(row, method, f"{self.origin}/{key}", **facts)
        self._cases[key] = case
        return case


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64


class _Handler(BaseHTTPRequestHandler):
    cases: dict[str, Case]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # head and body in one packet

    def _serve(self) -> None:
        path, _, query = self.path.partition("?")
        length = int(self.headers.get("Content-Length") or 0)
        asked = Asked(self.command, path, query, self.headers, self.rfile.read(length))
        known = [k for k in path.split("/") if k in self.cases]
        case = self.cases[known[0]] if known else None
        if case is None:
            self._send(Given({"error": "not found"}, 404))
            return
        if path == f"/{known[0]}/api":
            asked.path = "/api"
        self._send(case.answer(asked))

    def _send(self, given: Given) -> None:
        is_page = isinstance(given.body, str)
        text = given.body if is_page else json.dumps(given.body)
        body = b"" if given.body is None else text.encode()
        self.send_response(given.status)
        kind = "text/html; charset=utf-8" if is_page else "application/json"
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if given.location:
            self.send_header("Location", given.location)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    do_GET = do_POST = do_DELETE = do_PUT = do_HEAD = _serve  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Say nothing."""
