"""What the test authorization server remembers, counts and is told to do."""

from __future__ import annotations

import secrets
import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

LOOPBACK_HOSTS = frozenset({"127.0.0.1", "localhost", "::1"})

TokenKind = Literal["access_token", "refresh_token"]


@dataclass(frozen=True)
class Client:
    """A registered application, in the shape Authlib asks it questions."""

    client_id: str
    client_secret: str = field(default="", repr=False)
    redirect_uris: tuple[str, ...] = ()
    token_endpoint_auth_method: str = "client_secret_basic"
    scopes: frozenset[str] | None = None
    """What it may ask for; None allows everything."""

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
        return secrets.compare_digest(
            self.client_secret.encode(), client_secret.encode()
        )

    def check_endpoint_auth_method(self, method: str, _endpoint: str) -> bool:
        return method == self.token_endpoint_auth_method

    def check_response_type(self, response_type: str) -> bool:
        return response_type == "code"

    def check_grant_type(self, grant_type: str) -> bool:
        return grant_type in {"authorization_code", "refresh_token"}


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


@dataclass(eq=False)
class Code:
    """An authorization code."""

    grant: Grant
    redirect_uri: str
    code_challenge: str
    code_challenge_method: str
    expires_at: float
    used: bool = False

    def get_redirect_uri(self) -> str:
        return self.redirect_uri

    def get_scope(self) -> str:
        return self.grant.scope


@dataclass(eq=False)
class Token:
    """An access or refresh token."""

    kind: TokenKind
    grant: Grant
    scope: str
    expires_at: float
    used_at: float | None = None
    revoked: bool = False

    def check_client(self, client: Client) -> bool:
        return client.client_id == self.grant.client_id

    def get_scope(self) -> str:
        return self.scope

    def is_expired(self) -> bool:
        return time.time() >= self.expires_at

    def is_revoked(self) -> bool:
        return self.revoked or self.grant.revoked


@dataclass(kw_only=True, eq=False, repr=False)
class Ledger:
    """
    Options, counters and grants of the server, safe to use from any thread.

    Options may be changed while the server runs; the next request sees them.
    """

    access_token_ttl_s: float = 3600
    refresh_token_ttl_s: float = 86400
    code_ttl_s: float = 60
    rotate: bool = True
    """Each refresh answers a new refresh token and uses the old one up."""
    reuse_grace_s: float = 0.0
    """How long a used refresh token may be used again without harm."""
    iss: str = "right"
    """RFC 9207: `"right"`, `"omitted"`, or a value sent as it is."""
    withhold: set[str] = field(default_factory=set)
    """Scopes the person unticks: granted is what was asked for minus these."""
    omit_scope: bool = False
    """Token answers carry no `scope`."""
    omit_refresh_token: bool = False
    """Token answers carry no `refresh_token`; one issued before stays good."""

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

    issued_codes: list[str] = field(default_factory=list, init=False)
    issued_access_tokens: list[str] = field(default_factory=list, init=False)
    issued_refresh_tokens: list[str] = field(default_factory=list, init=False)

    clients: dict[str, Client] = field(default_factory=dict, init=False)
    _codes: dict[str, Code] = field(default_factory=dict, init=False)
    _tokens: dict[str, Token] = field(default_factory=dict, init=False)
    _grants: list[Grant] = field(default_factory=list, init=False)
    _lock: threading.RLock = field(default_factory=threading.RLock, init=False)

    def register(
        self,
        *,
        client_id: str,
        client_secret: str = "",
        redirect_uris: Iterable[str] = (),
        token_endpoint_auth_method: str | None = None,
        scopes: Iterable[str] | None = None,
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
        """
        default_method = "client_secret_basic" if client_secret else "none"
        client = Client(
            client_id=client_id,
            client_secret=client_secret,
            redirect_uris=tuple(redirect_uris),
            token_endpoint_auth_method=token_endpoint_auth_method or default_method,
            scopes=None if scopes is None else frozenset(scopes),
        )
        with self._lock:
            self.clients[client_id] = client
        return client

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
    ) -> str:
        """Note a consent and give out a code for it."""
        code = "ac_" + secrets.token_urlsafe(32)
        with self._lock:
            scope = " ".join(s for s in asked if s not in self.withhold)
            grant = Grant(username, client.client_id, scope)
            self._grants.append(grant)
            self._codes[code] = Code(
                grant,
                redirect_uri,
                code_challenge,
                code_challenge_method,
                time.time() + self.code_ttl_s,
            )
            self.issued_codes.append(code)
            self.authorizations += 1
        return code

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
            return code if time.time() < code.expires_at else None

    def take_refresh_token(self, token: Token) -> bool:
        """Use a refresh token; reuse of a rotated one kills the family."""
        with self._lock:
            now = time.time()
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
            self._tokens[value] = Token(kind, grant, scope, time.time() + ttl_s)
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
