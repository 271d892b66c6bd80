"""What the test authorization server remembers, counts and is told to do."""

from __future__ import annotations

import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

LOOPBACK_HOSTS = frozenset({"127.0.0.1", "localhost", "::1"})

DEVICE_CODE = "urn:ietf:params:oauth:grant-type:device_code"
JWT_BEARER = "urn:ietf:params:oauth:grant-type:jwt-bearer"
GRANT_TYPES = frozenset(
    [
        "authorization_code",
        "refresh_token",
        "client_credentials",
        DEVICE_CODE,
        JWT_BEARER,
    ]
)

TokenKind = Literal["access_token", "refresh_token"]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Client:
    """A registered application, in the shape Authlib asks it questions."""

    client_id: str
    client_secret: str = field(default="", repr=False)
    redirect_uris: tuple[str, ...] = ()
    token_endpoint_auth_method: str = "client_secret_basic"
    scopes: frozenset[str] | None = None
    """What it may ask for; None allows everything."""
    grant_types: frozenset[str] = GRANT_TYPES
    public_key: str = field(default="", repr=False)
    """PEM: checks its assertions (RFC 7523)."""
    is_expired: Callable[[], bool] = field(default=lambda: False, repr=False)
    """Whether its secret has expired (RFC 7591)."""

    def get_client_id(self) -> str:
        return self.client_id

    def get_default_redirect_uri(self) -> None:
        """None: every request has to name its redirect URI."""

    def get_allowed_scope(self, scope: str | None) -> str:
        return scope or ""

    def check_redirect_uri(self, redirect_uri: str) -> bool:
        """
        Compare exactly, except for the port of a public client's loopback.

        RFC 9700 section 2.1 and RFC 8252 section 7.3.
        """
        if redirect_uri in self.redirect_uris:
            return True
        if self.token_endpoint_auth_method != "none":
            return False
        return any(_same_but_port(redirect_uri, known) for known in self.redirect_uris)

    def check_client_secret(self, client_secret: str) -> bool:
        return not self.is_expired() and secrets.compare_digest(
            self.client_secret.encode(), client_secret.encode()
        )

    def check_endpoint_auth_method(self, method: str, _endpoint: str) -> bool:
        return method == self.token_endpoint_auth_method

    def check_response_type(self, response_type: str) -> bool:
        return response_type == "code"

    def check_grant_type(self, grant_type: str) -> bool:
        return grant_type in self.grant_types

    def may_ask_for(self, scope: str | None) -> bool:
        return self.scopes is None or set((scope or "").split()) <= self.scopes


def _same_but_port(one: str, other: str) -> bool:
    a, b = urlsplit(one), urlsplit(other)
    if a.scheme != "http" or a.hostname not in LOOPBACK_HOSTS or "@" in a.netloc:
        return False
    return (a.scheme, a.hostname, a.path, a.query, a.fragment) == (
        b.scheme,
        b.hostname,
        b.path,
        b.query,
        b.fragment,
    )


@dataclass(eq=False)
class Grant:
    """One consent and everything that was ever issued for it: a token family."""

    username: str
    client_id: str
    scope: str
    revoked: bool = False
    resource: str | None = None
    """What its tokens are for (RFC 8707)."""


@dataclass(eq=False)
class Code:
    """An authorization code."""

    grant: Grant
    redirect_uri: str
    code_challenge: str
    code_challenge_method: str
    expires_at: float
    nonce: str | None
    used: bool = False

    def get_redirect_uri(self) -> str:
        return self.redirect_uri

    def get_scope(self) -> str:
        return self.grant.scope


@dataclass(eq=False)
class Device:
    """A device that waits for a person (RFC 8628)."""

    client_id: str
    scope: str
    user_code: str
    interval_s: float
    expires_at: float
    clock: Clock
    polled_at: float | None = None
    grant: Grant | None = None
    """Set when a person approved."""
    denied: bool = False
    used: bool = False

    def get_client_id(self) -> str:
        return self.client_id

    def get_scope(self) -> str:
        return self.grant.scope if self.grant else self.scope

    def get_user_code(self) -> str:
        return self.user_code

    def is_expired(self) -> bool:
        return self.clock() >= self.expires_at

    @property
    def waits(self) -> bool:
        """Whether a person may still decide."""
        return self.grant is None and not self.denied and not self.is_expired()


@dataclass(eq=False)
class Token:
    """An access or refresh token."""

    kind: TokenKind
    grant: Grant
    scope: str
    expires_at: float
    clock: Clock
    used_at: float | None = None
    revoked: bool = False

    def check_client(self, client: Client) -> bool:
        return client.client_id == self.grant.client_id

    def get_scope(self) -> str:
        return self.scope

    def is_expired(self) -> bool:
        return self.clock() >= self.expires_at

    def is_revoked(self) -> bool:
        return self.revoked or self.grant.revoked


@dataclass(kw_only=True, eq=False, repr=False)
class Ledger:
    """
    Options, counters and grants of the server, safe to use from any thread.

    Options may be changed while the server runs; the next request sees them.
    """

    port: int = 0
    """0 takes a free one, and keeps it over a restart."""
    issuer_path: str = ""
    """What the issuer has after host and port: `/tenant`."""
    clock: Clock = time.time
    """What time it is at the server, in seconds of the epoch."""
    access_token_ttl_s: float = 3600
    refresh_token_ttl_s: float = 86400
    code_ttl_s: float = 60
    rotate: bool = True
    """Each refresh answers a new refresh token and uses the old one up."""
    reuse_grace_s: float = 0.0
    """How long a used refresh token may be used again without harm."""
    pushed_requests: Literal["none", "offered", "required"] = "none"
    """Whether it takes authorization requests beforehand (RFC 9126)."""
    iss: str = "right"
    """RFC 9207: `"right"`, `"omitted"`, or a value sent as it is."""
    withhold: set[str] = field(default_factory=set)
    """Scopes the person unticks: granted is what was asked for minus these."""
    omit_scope: bool = False
    """Token answers carry no `scope`."""
    omit_refresh_token: bool = False
    """Token answers carry no `refresh_token`; one issued before stays good."""

    id_token_ttl_s: float = 3600
    id_token_claims: dict[str, Any] = field(default_factory=dict)
    """Claims that ID tokens have in place of the right ones; None takes one out."""
    id_token_algorithm: str = "RS256"
    id_token_key: Literal["right", "other", "none", "hs256"] = "right"
    """Who signs ID tokens: the server, somebody else under its `kid`, nobody
    (`alg` is `none`), or anybody, with the public key as an HS256 secret."""
    signing_key: str = "1"
    """Name (`kid`) of the only key that is published; another name rotates it."""
    client_secret_ttl_s: float = 0
    """How long secrets of dynamically registered clients live; 0: for ever."""
    device_code_ttl_s: float = 600
    device_interval_s: float = 5
    """How long a device has to wait between two polls."""

    token_requests: Counter[str] = field(default_factory=Counter, init=False)
    """Successful token requests by `grant_type`."""
    token_errors: Counter[str] = field(default_factory=Counter, init=False)
    """Error answers of the token endpoint, injected ones too, by `error`."""
    authorizations: int = field(default=0, init=False)
    """How often a person pressed Approve."""
    denials: int = field(default=0, init=False)
    """How often a person pressed Deny."""
    code_replays: int = field(default=0, init=False)
    refresh_token_reuses: int = field(default=0, init=False)
    revoked_families: int = field(default=0, init=False)
    """Grants that died, for whatever reason."""
    revocations: int = field(default=0, init=False)
    """Successful requests to the revocation endpoint."""
    api_calls: int = field(default=0, init=False)
    """Requests to the protected API, refused ones too."""
    registrations: int = field(default=0, init=False)
    """Clients that registered themselves."""
    device_authorizations: int = field(default=0, init=False)
    """Devices that asked for a code; their polls are token requests and errors."""
    document_reads: Counter[str] = field(default_factory=Counter, init=False)
    """Requests for metadata and keys, by path."""

    issued_codes: list[str] = field(default_factory=list, init=False)
    issued_access_tokens: list[str] = field(default_factory=list, init=False)
    issued_refresh_tokens: list[str] = field(default_factory=list, init=False)
    issued_id_tokens: list[str] = field(default_factory=list, init=False)
    issued_device_codes: list[str] = field(default_factory=list, init=False)

    clients: dict[str, Client] = field(default_factory=dict, init=False)
    _codes: dict[str, Code] = field(default_factory=dict, init=False)
    _devices: dict[str, Device] = field(default_factory=dict, init=False)
    _tokens: dict[str, Token] = field(default_factory=dict, init=False)
    _pushed: dict[str, dict[str, str]] = field(default_factory=dict, init=False)
    _grants: list[Grant] = field(default_factory=list, init=False)
    _lock: threading.RLock = field(default_factory=threading.RLock, init=False)

    def now(self) -> float:
        """Return the server's time; `clock` may be another by then."""
        return self.clock()

    @property
    def origin(self) -> str:
        """Where the server listens."""
        if not self.port:
            raise RuntimeError("The authorization server was not started.")
        return f"http://127.0.0.1:{self.port}"

    @property
    def issuer(self) -> str:
        """The server's name: its address, without a slash at the end."""
        return self.origin + self.issuer_path

    def register(
        self,
        *,
        client_id: str,
        client_secret: str = "",
        redirect_uris: Iterable[str] = (),
        token_endpoint_auth_method: str | None = None,
        scopes: Iterable[str] | None = None,
        grant_types: Iterable[str] = GRANT_TYPES,
        public_key: str = "",
    ) -> Client:
        """
        Make an application known.

        Args:
            client_id: Replaces an application registered under the same id.
            client_secret: Empty makes it a public client.
            redirect_uris: Compared exactly; a public client's loopback
                addresses may use any port (RFC 8252 section 7.3).
            token_endpoint_auth_method: The only method it may use. Default:
                `client_secret_basic`, or `none` without a secret.
            scopes: What it may ask for; None allows everything.
            grant_types: What it may use at the token endpoint.
            public_key: PEM; with it the client may send assertions (RFC 7523).
        """
        default_method = "client_secret_basic" if client_secret else "none"
        client = Client(
            client_id=client_id,
            client_secret=client_secret,
            redirect_uris=tuple(redirect_uris),
            token_endpoint_auth_method=token_endpoint_auth_method or default_method,
            scopes=None if scopes is None else frozenset(scopes),
            grant_types=frozenset(grant_types),
            public_key=public_key,
        )
        self.add_client(client)
        return client

    def add_client(self, client: Client) -> None:
        """Make a client known."""
        with self._lock:
            self.clients[client.client_id] = client

    def revoke_grants(self, username: str) -> int:
        """Revoke all of a person's grants, as an admin does; say how many."""
        with self._lock:
            grants = [g for g in self._grants if g.username == username]
            return sum(self._revoke(grant) for grant in grants)

    def add_code(
        self,
        *,
        username: str,
        client: Client,
        asked: Iterable[str],
        redirect_uri: str,
        code_challenge: str,
        code_challenge_method: str,
        nonce: str | None = None,
        resource: str | None = None,
    ) -> str:
        """Note a consent and give out a code for it."""
        code = "ac_" + secrets.token_urlsafe(32)
        with self._lock:
            grant = self.add_grant(username, client.client_id, asked)
            grant.resource = resource
            self._codes[code] = Code(
                grant,
                redirect_uri,
                code_challenge,
                code_challenge_method,
                self.now() + self.code_ttl_s,
                nonce,
            )
            self.issued_codes.append(code)
            self.authorizations += 1
        return code

    def add_grant(self, username: str, client_id: str, asked: Iterable[str]) -> Grant:
        """Note what is granted of what was asked for."""
        scope = " ".join(s for s in asked if s not in self.withhold)
        grant = Grant(username, client_id, scope)
        with self._lock:
            self._grants.append(grant)
        return grant

    def push(self, parameters: dict[str, str]) -> str:
        """Keep an authorization request; return what names it, once (RFC 9126)."""
        name = f"urn:ietf:params:oauth:request_uri:{secrets.token_urlsafe(24)}"
        with self._lock:
            self._pushed[name] = parameters
        return name

    def pushed(self, name: str, client_id: str) -> dict[str, str] | None:
        """Return a request that was kept for a client; it is used up."""
        with self._lock:
            kept = self._pushed.get(name)
            if kept is None or kept["client_id"] != client_id:
                return None
            return self._pushed.pop(name)

    def add_device(self, device_code: str, device: Device) -> None:
        """Note a device that waits."""
        with self._lock:
            self._devices[device_code] = device
            self.issued_device_codes.append(device_code)
            self.device_authorizations += 1

    def find_device(self, device_code: str) -> Device | None:
        """Return a device that has got no token yet."""
        with self._lock:
            device = self._devices.get(device_code)
        return device if device and not device.used else None

    def device_that_shows(self, user_code: str) -> Device | None:
        """Return the device that waits with that code; people may write it loosely."""
        code = user_code.strip().upper()
        with self._lock:
            waiting = [d for d in self._devices.values() if d.waits]
        return next((d for d in waiting if d.user_code == code), None)

    def decide(self, device: Device, username: str, *, approved: bool) -> None:
        """Note what a person decided about a device."""
        with self._lock:
            if approved:
                asked = device.scope.split()
                device.grant = self.add_grant(username, device.client_id, asked)
                self.authorizations += 1
            else:
                device.denied = True
                self.denials += 1

    def polls_too_fast(self, device: Device) -> bool:
        """Note a poll; one that comes too early adds 5 s to the interval, for good."""
        with self._lock:
            now, last = self.clock(), device.polled_at
            device.polled_at = now
            early = last is not None and now - last < device.interval_s
            device.interval_s += 5 * early
            return early

    def take_code(self, value: str, client: Client) -> Code | None:
        """
        Use a code up.

        A second use revokes what the first one gave (RFC 6749 section 4.1.2).
        """
        with self._lock:
            code = self._codes.get(value)
            if code is None or code.grant.client_id != client.client_id:
                return None
            if code.used:
                self.code_replays += 1
                self._revoke(code.grant)
                return None
            code.used = True
            return code if self.now() < code.expires_at else None

    def take_refresh_token(self, token: Token) -> bool:
        """Use a refresh token; reuse of a rotated one kills the family."""
        with self._lock:
            now = self.now()
            if token.used_at is not None and now - token.used_at >= self.reuse_grace_s:
                self.refresh_token_reuses += 1
                self._revoke(token.grant)
                return False
            if token.is_revoked() or token.is_expired():
                return False
            if self.rotate and not self.omit_refresh_token and token.used_at is None:
                token.used_at = now
            return True

    def add_token(self, kind: TokenKind, value: str, grant: Grant, scope: str) -> None:
        """Note a token that goes out with the next answer."""
        is_access = kind == "access_token"
        ttl_s = self.access_token_ttl_s if is_access else self.refresh_token_ttl_s
        issued = self.issued_access_tokens if is_access else self.issued_refresh_tokens
        with self._lock:
            expires_at = self.now() + ttl_s
            self._tokens[value] = Token(kind, grant, scope, expires_at, self.now)
            issued.append(value)

    def find_token(self, value: str, kind: TokenKind | None = None) -> Token | None:
        """Look a token up; it may be expired or revoked."""
        with self._lock:
            token = self._tokens.get(value)
        return token if token and kind in {None, token.kind} else None

    def revoke_token(self, token: Token) -> None:
        """Revoke a refresh token with its family, an access token alone."""
        with self._lock:
            token.revoked = True
            if token.kind == "refresh_token":
                self._revoke(token.grant)

    def _revoke(self, grant: Grant) -> bool:
        fresh = not grant.revoked
        grant.revoked = True
        self.revoked_families += fresh
        return fresh
