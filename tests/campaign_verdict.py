"""Figures and verdict of a campaign: what was lost, and who may be blamed for it."""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from campaign_witness import ADVISORY, Revoked, Use, Witness, Words

import langchain_pocket_auth

LATE_S = 2.0  # between what is read and what is told
SLACK_S = 0.2  # of a busy machine, between a time that is noted and a request
UNEXPLAINED = "UNEXPLAINED"


@dataclass
class Verdict:
    """What is to be printed: figures in order, and what must not be."""

    server: Witness
    words: Words
    graceful: bool
    figures: list[tuple[str, object]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._by_grant: dict[int, list[Use]] = defaultdict(list)
        for use in self.server.uses:
            if use.grant is not None:
                self._by_grant[id(use.grant)].append(use)
        self._ok: dict[str, list[Use]] = defaultdict(list)
        for use in self.server.uses:
            if use.ok and use.kind == "refresh_token":
                self._ok[use.spent].append(use)

    def tell(self, name: str, value: object) -> None:
        """Add a figure."""
        self.figures.append((name, value))

    def blame(self, what: str, many: object) -> None:
        """Add something that must not be, if there is any of it."""
        if many:
            self.faults.append(f"{what}: {many}")

    def judge(self) -> None:
        """Work out all figures that come from the server and the replicas."""
        server, words = self.server, self.words
        self.tell("API calls served", words.served.total())
        self.tell("calls that failed", _listed(words.failed))
        self.tell("pages at the end of consents", _listed(words.pages))
        self._token_requests()
        self._families()
        self._consents()
        self._lost()
        self.tell("tokens served to the wrong owner", len(server.wrong_owner))
        self.blame("tokens with a wrong owner", server.wrong_owner + words.wrong)
        self._handed_dead()
        self.blame("replicas that broke", words.broken)
        self.blame("code replays", server.code_replays)

    def _token_requests(self) -> None:
        made = [use for uses in self._ok.values() for use in uses]
        again: Counter[str] = Counter()
        for uses in self._ok.values():
            for one, _ in pairwise(uses):
                again[self._trouble_of(one)] += 1
        early: Counter[str] = Counter()
        for use in made:
            giver, first = self.server.born[use.spent], self._ok[use.spent][0]
            # Counted from when it was asked for, as its end is.
            age_s = self.words.sent_at(use) - self.words.sent_at(giver)
            early_s = ADVISORY * self.server.access_token_ttl_s - SLACK_S
            if age_s < early_s and use is first:
                moved = self.words.moved(giver) or self.words.moved(use)
                early["a clock was set meanwhile" if moved else UNEXPLAINED] += 1
                if not moved:
                    how = f"by {use.sender}, of {giver.sender}'s, {age_s:.2f} s old"
                    self.faults.append(f"before its time: {how}")
        expiries = len(self._ok)
        self.tell("expiries seen", expiries)
        self.tell("token requests that succeeded, for them", len(made))
        self.tell("  per expiry", f"{len(made) / max(expiries, 1):.3f}")
        self.tell("  a second one, because the first answer was", _listed(again))
        self.tell("  before their time, because", _listed(early))
        refused = Counter(
            use.fault or str(use.status) for use in self.server.uses if not use.ok
        )
        self.tell("token requests that failed", _listed(refused))
        self.blame("second token requests for an expiry", again[UNEXPLAINED])
        self.blame("token requests before their time", early[UNEXPLAINED])

    def _trouble_of(self, use: Use) -> str:
        """Say why the answer to a request did not reach the store."""
        fate = self.words.fate(use)
        if use.fault == "drop_after" or fate == "lost":
            return "lost on the way"
        return "lost with its replica (kill -9)" if fate == "killed" else UNEXPLAINED

    def _why_revoked(self, revoked: Revoked) -> str:
        if revoked.by == "/revoke":
            return "given back"
        if revoked.by != "refresh_token" or revoked.use is None:
            return UNEXPLAINED
        first, *_ = self._ok[revoked.use.spent]
        why = self._trouble_of(first)
        if why == UNEXPLAINED and self.words.fate(revoked.use) == "lost":
            return "a request was answered later than it is waited for"
        return why

    def _families(self) -> None:
        why = Counter(map(self._why_revoked, self.server.ended))
        self.tell("reuse detections", self.server.refresh_token_reuses)
        self.tell("families revoked", _listed(why))
        self.blame("families revoked for no good reason", why.pop(UNEXPLAINED, 0))
        why.pop("given back", 0)
        self.tell("  of these unavoidable with a strict server", why.total())
        if self.graceful:
            self.blame("families revoked in spite of the grace", why.total())

    def _consents(self) -> None:
        grants = defaultdict(list)
        for grant, at in self.server.consents:
            grants[grant.username].append((grant, at))
        why: Counter[str] = Counter()
        for owner, given in grants.items():
            for (grant, since), (_, until) in pairwise(given):
                cause = self._why_over(owner, id(grant), since, until)
                why[cause] += 1
                if cause == UNEXPLAINED:
                    uses = [
                        (u.kind, u.sender, u.fault, u.status, self.words.fate(u))
                        for u in self._by_grant[id(grant)][-3:]
                    ]
                    self.faults.append(f"{owner} was asked again; before: {uses}")
        left = [a for acts in self.words.acts.values() for *_, a in acts]
        self.tell("owners who consented", len(grants))
        self.tell("disconnected by their owners", left.count("leaving"))
        self.tell("consents asked again", why.total())
        for cause, many in why.most_common():
            self.tell(f"  {cause}", many)
        if self.graceful:
            lost = [c for c in why if c.startswith("family revoked")]
            self.blame("consents asked again in spite of the grace", lost)

    def _why_over(self, owner: str, grant: int, since: float, until: float) -> str:
        """Say why a grant was of no use any more when the next was given."""
        acts = self.words.acts[owner]
        if any(what == "leaving" and since <= at <= until for at, _, what in acts):
            return "the person disconnected"
        uses = self._by_grant[grant]
        code = next((use for use in uses if use.kind == "authorization_code"), None)
        if code is None:
            return self._why_undelivered(owner, since, until)
        if (fate := self.words.fate(code)) != "saved":
            if not code.ok:
                return f"exchange failed ({code.fault or fate})"
            why = self._trouble_of(code)
            return why if why == UNEXPLAINED else f"exchange: answer {why}"
        for revoked in self.server.ended:
            if id(revoked.grant) == grant and revoked.at < until:
                why = self._why_revoked(revoked)
                return why if why == UNEXPLAINED else f"family revoked: {why}"
        return UNEXPLAINED

    def _why_undelivered(self, owner: str, since: float, until: float) -> str:
        acts = [
            (replica, what)
            for at, replica, what in self.words.acts[owner]
            if since - LATE_S <= at <= until
        ]
        for what in ("closed tab", "stuck"):
            if any(what == act for _, act in acts):
                return f"the person: {what}"
        died = [r for r, at in self.words.died.items() if since - LATE_S <= at <= until]
        return "the callback met a replica that died" if died else UNEXPLAINED

    def _lost(self) -> None:
        saved: dict[str, list[float]] = defaultdict(list)
        for use in self.server.uses:
            if use.grant and (at := self.words.told_at.get((use.sender, "saved"))):
                saved[use.grant.username].append(at)
        lost = [
            f"{owner} at {replica}"
            for at, replica, owner, state in self.words.asked
            if state == "NO_SESSION" and self._had(owner, saved[owner], at)
        ]
        self.tell("sessions lost", len(lost))
        self.blame("sessions lost", lost[:5])

    def _had(self, owner: str, saved: list[float], until: float) -> bool:
        """Whether there must have been a session: saved, and not disconnected."""
        before = [at for at in saved if at < until - LATE_S]
        left = [at for at, _, what in self.words.acts[owner] if what == "leaving"]
        last = max(before, default=until)
        return last < until and not any(last - LATE_S <= at <= until for at in left)

    def _handed_dead(self) -> None:
        dead = self.server.handed_dead
        worst = max((late for *_, late in dead), default=0.0)
        self.tell(
            "tokens handed out that were over", f"{len(dead)}, by {worst:.1f} s at most"
        )
        long = sum(late > self.server.access_token_ttl_s for *_, late in dead)
        self.blame("tokens handed out long after they were over", long)
        for replica, owner, late in sorted(dead, key=lambda each: -each[2])[:5]:
            if late > self.server.access_token_ttl_s:
                self.faults.append(f"{owner}'s at {replica}, {late:.1f} s over")
        twice = sum(times > 1 for times in self.server.dead.values())
        self.tell("  sent again after a 401", twice)

    def points(self) -> Iterator[tuple[str, int, int]]:
        """Return all named points, how often passed and how often deadly."""
        words = self.words
        for point in sorted({*words.passed, *words.killed_at}):
            yield point, words.passed[point], words.killed_at[point]

    def never_passed(self) -> list[str]:
        """Return the functions of consent and refresh that no replica was in."""
        seen = {point.partition(":")[0] for point, *_ in self.points()}
        return sorted(set(_reaching()) - seen)


def _reaching() -> Iterator[str]:
    """Find the functions of consent and refresh with an await on the vault."""
    folder = Path(langchain_pocket_auth.__file__).parent
    for module in ("_questions", "_attempts", "_waiting", "_exchange", "_refresh"):
        for function in ast.walk(ast.parse((folder / f"{module}.py").read_text())):
            if isinstance(function, ast.AsyncFunctionDef):
                awaited = (n for n in ast.walk(function) if isinstance(n, ast.Await))
                if any("self._vault." in ast.unparse(each) for each in awaited):
                    yield f"{module}.{function.name}"


def _listed(counted: Counter[str]) -> str:
    parts = [f"{name} {many}" for name, many in counted.most_common() if many]
    return f"{counted.total()}" + (f" ({', '.join(parts)})" if parts else "")
