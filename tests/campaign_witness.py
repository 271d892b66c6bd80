"""What the campaign knows: the server's side of every token, the replicas' own words."""

from __future__ import annotations

import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flask import Flask, Response, request

from langchain_pocket_auth.testing import AuthorizationServer
from langchain_pocket_auth.testing._ledger import Grant, Token, TokenKind
from langchain_pocket_auth.testing._needles import Needles

SETTING_S = 0.3
"""How long setting a clock takes, from the supervisor's order on."""
ADVISORY = 0.5
"""The share of its life before which nobody may renew a token."""
_WORDS = re.compile(rb"[A-Za-z0-9_-]{24,}")
_ENCODED = 100  # secrets that are also searched for in other encodings


@dataclass(eq=False)
class Use:
    """A token request as the server saw it."""

    sender: str
    kind: str
    spent: str
    grant: Grant | None
    at: float
    fault: str | None = None
    status: int = 0
    ok: bool = False
    """Whether tokens were made, and so the old ones used up."""
    gave: str | None = None
    """The refresh token that it gave."""


@dataclass(eq=False)
class Revoked:
    """A family that ended, and by what."""

    grant: Grant
    by: str
    use: Use | None
    at: float


@dataclass(kw_only=True, eq=False, repr=False)
class Witness(AuthorizationServer):
    """The strict server, which also remembers who did what with each token."""

    uses: list[Use] = field(default_factory=list, init=False)
    ended: list[Revoked] = field(default_factory=list, init=False)
    born: dict[str, Use] = field(default_factory=dict, init=False)
    """By refresh token: the request that gave it."""
    states: set[str] = field(default_factory=set, init=False)
    wrong_owner: list[str] = field(default_factory=list, init=False)
    handed_dead: list[tuple[str, str, float]] = field(default_factory=list, init=False)
    """Replica, owner and by how many seconds a token was over when it was got."""
    dead: Counter[str] = field(default_factory=Counter, init=False)
    """By access token that was over when a replica got it: how often it came."""
    consents: list[tuple[Grant, float]] = field(default_factory=list, init=False)

    def _build_app(self) -> Flask:
        app = super()._build_app()
        app.before_request_funcs.setdefault(None, []).insert(0, self._note)
        app.after_request(self._judge)
        return app

    def _note(self) -> None:
        if request.path == "/authorize" and (state := request.args.get("state")):
            self.states.add(state)
        if request.path != "/token":
            return
        form = request.form
        spent = form.get("refresh_token") or form.get("code") or ""
        source: Any = self._tokens.get(spent) or self._codes.get(spent)
        grant = source.grant if source else None
        sender, kind = request.headers.get("X-Campaign", ""), form.get("grant_type", "")
        use = Use(sender, kind, spent, grant, time.monotonic())
        request.environ["campaign.use"] = use
        with self._lock:
            self.uses.append(use)

    def _judge(self, response: Response) -> Response:
        use: Use | None = request.environ.get("campaign.use")
        if use:
            fault = request.environ.get("pocket_auth.fault")
            use.fault, use.status = fault.mode if fault else None, response.status_code
        return response

    def add_grant(self, username: str, client_id: str, asked: Iterable[str]) -> Grant:
        grant = super().add_grant(username, client_id, asked)
        with self._lock:
            self.consents.append((grant, time.monotonic()))
        return grant

    def add_token(self, kind: TokenKind, value: str, grant: Grant, scope: str) -> None:
        super().add_token(kind, value, grant, scope)
        use: Use = request.environ["campaign.use"]
        use.ok = True
        if kind == "refresh_token":
            use.gave = value
            with self._lock:
                self.born[value] = use

    def _revoke(self, grant: Grant) -> bool:
        fresh = super()._revoke(grant)
        if fresh:
            use = request.environ.get("campaign.use")
            by = use.kind if use else request.path
            self.ended.append(Revoked(grant, by, use, time.monotonic()))
        return fresh

    def _api(self, path: str) -> Response:
        value = request.headers.get("Authorization", "").partition(" ")[2]
        token: Token | None = self.find_token(value, "access_token")
        owner = request.args.get("owner", "")
        late_s = float(request.headers.get("X-Handed", "0"))
        late_s -= token.expires_at if token else 0
        with self._lock:
            if token is None or token.grant.username != owner:
                self.wrong_owner.append(owner)
            elif late_s > 0:
                replica = request.headers.get("X-Campaign", "")
                self.handed_dead.append((replica, owner, late_s))
                self.dead[value] += 1
        return super()._api(path)

    def secrets(self) -> list[str]:
        """Return everything that nobody but a replica's memory may hold."""
        return [
            *self.issued_access_tokens,
            *self.issued_refresh_tokens,
            *self.issued_codes,
            *self.states,
        ]


@dataclass(eq=False)
class Words:
    """What the replicas told, by request and by owner."""

    fates: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """By request: sent, answered, lost, dropped, saved, superseded."""
    told_at: dict[tuple[str, str], float] = field(default_factory=dict)
    """By request and what became of it: when."""
    died: dict[str, float] = field(default_factory=dict)
    """By replica that was killed: when."""
    killed_at: Counter[str] = field(default_factory=Counter)
    passed: Counter[str] = field(default_factory=Counter)
    served: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    asked: list[tuple[float, str, str, str]] = field(default_factory=list)
    """When, by which replica, of which owner, in which state."""
    acts: dict[str, list[tuple[float, str, str]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    """What persons did, by owner: when, where, what."""
    pages: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    ahead: dict[str, list[tuple[float, float]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    """By replica: from when on its clock was how many seconds ahead."""

    def hear(self, replica: str, kind: str, at: float, *what: Any) -> None:
        """Take down what a replica told."""
        match kind:
            case "sent" | "answered" | "lost" | "dropped" | "saved" | "superseded":
                self.fates[f"{replica}#{what[0]}"].add(kind)
                self.told_at[f"{replica}#{what[0]}", kind] = at
            case "killed":
                self.killed_at[what[0]] += 1
                self.died[replica] = at
            case "points":
                self.passed.update(what[0])
            case "served":
                self.served[what[0]] += 1
            case "failed":
                self.failed[what[1]] += 1
            case "asked":
                self.asked.append((at, replica, *what))
            case "wrong":
                self.wrong.append(what[0])
            case "broken":
                self.broken.append(f"{replica}: {what[0]}")
            case "stuck" | "closed tab" | "delivering" | "delivered" | "leaving":
                self.acts[what[0]].append((at, replica, kind))
                self.pages.update([f"stuck: {what[1]}"] if kind == "stuck" else [])
                self.pages.update(what[1] if kind == "delivered" else [])

    def fate(self, use: Use) -> str:
        """Return what became of the answer to a request."""
        known = self.fates.get(use.sender, set())
        replica = use.sender.partition("#")[0]
        for word in ("saved", "superseded", "lost"):
            if word in known:
                return word
        return "killed" if replica in self.died else "unknown"

    def sent_at(self, use: Use) -> float:
        """Return when a replica began to send a request."""
        return self.told_at.get((use.sender, "sent"), use.at)

    def moved(self, use: Use) -> bool:
        """Whether the clock of a request's sender was set while it was made."""
        moves = self.ahead.get(use.sender.partition(".")[0], [])
        return any(abs(at - self.sent_at(use)) < SETTING_S for at, _ in moves)


def leaks(secrets: list[str], places: Iterable[Path | bytes]) -> Iterator[str]:
    """Name each place that holds a secret, in clear or encoded."""
    known = {secret.encode() for secret in secrets}
    encoded = Needles(secrets[-_ENCODED:]) if secrets else None
    for place in places:
        content = place if isinstance(place, bytes) else place.read_bytes()
        name = "the store's records" if isinstance(place, bytes) else place.name
        for found in set(_WORDS.findall(content)):
            # A word may have something at its ends that is no part of the secret.
            if found in known or any(s in found for s in known if len(found) > len(s)):
                yield f"{name}: {found[:6].decode()}…"
        if encoded and (which := next(encoded.found_in(content), None)):
            yield f"{name}: {which}"
