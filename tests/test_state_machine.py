"""
Random interleavings of everything persons, tools and providers do, against a model.

`STATE_MACHINE_EXAMPLES=2000 python -m pytest tests/test_state_machine.py -n0` takes
other steps each time, and as many as one likes.
"""

from __future__ import annotations

import asyncio
import html
import os
import re
from collections.abc import Coroutine
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import httpx
import pytest
from conftest import ACME, ZETA
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    multiple,
    rule,
)
from support import KEYS, Clock, outcome_of

from langchain_pocket_auth import (
    AuthorizationRefused,
    AuthorizationRequired,
    PocketAuth,
    ScopeWithheld,
)
from langchain_pocket_auth._http import Answer, Http
from langchain_pocket_auth._loop import LOOP
from langchain_pocket_auth._models import Outcome, Owner, Requirement, Turn
from langchain_pocket_auth.storage.memory import MemoryBackend
from langchain_pocket_auth.testing import AuthorizationServer

EXAMPLES = int(os.environ.get("STATE_MACHINE_EXAMPLES", "0"))
BASE = "http://127.0.0.1:8711"
# No sum of these steps comes near a lifetime below, or near what follows from it.
STEPS_S = (130, 130, 130, 650, 650, 3700, 7300)
TOKEN_S, LINK_S, ATTEMPT_S, COOLDOWN_S = 3600, 7230, 600, 60
MANDATORY_S, ADVISORY_S = 60, 300

HERE = ("ann", "acme", "default")
# Most happens at one place; the others differ from it in one part each.
BESIDE = [("bob", *HERE[1:]), ("ann", "zeta", "default"), ("ann", "acme", "work")]
PLACES = st.sampled_from([HERE, HERE, HERE, *BESIDE])
SCOPES = st.sampled_from([("read",), ("write",), ("read", "write")])
TURNS = st.sampled_from([("t1", "1"), ("t1", "2"), ("t2", "3")])
POCKETS = st.integers(0, 1)

Place = tuple[str, str, str]


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """Do something where the engine lives."""
    return LOOP.run_sync(work)


@dataclass
class Grant:
    """A session as the model knows it."""

    scopes: set[str]
    since: float
    family: Any
    over: bool = False
    """Whether the provider has refused to renew it."""

    def usable(self, now: float) -> str | None:
        age = now - self.since
        if age < TOKEN_S - MANDATORY_S:
            return "SKIP_AUTH"
        if not self.over:
            return "DO_REFRESH"
        return "SKIP_AUTH" if age < TOKEN_S else None


@dataclass
class Question:
    """A future as the model knows it."""

    link: str
    scopes: set[str]
    needed: set[str]
    until: float
    status: str = "pending"
    withheld: set[str] = field(default_factory=set)
    turns: set[str] = field(default_factory=set)
    refused: dict[str, float] = field(default_factory=dict)

    def is_open(self, now: float) -> bool:
        return self.status == "pending" and now < self.until


@dataclass
class Click:
    """An attempt as the model knows it."""

    place: Place
    question: Question
    scopes: set[str]
    query: dict[str, str]
    since: float
    answer: str | None = None
    """The address that was delivered, once one has counted."""
    outcome: int = 0


class Provider:
    """The strict server without sockets: its own application is called."""

    def __init__(self, clock: Clock) -> None:
        self.server = AuthorizationServer(port=9, access_token_ttl_s=TOKEN_S)
        self.server.clock = lambda: self._now(clock)
        for name, (client_id, secret) in {"acme": ACME, "zeta": ZETA}.items():
            self.server.register(
                client_id=client_id,
                client_secret=secret,
                redirect_uris=[f"{BASE}/auth/{name}/oauth2/callback"],
            )
        self._app = self.server._build_app()

    @staticmethod
    def _now(clock: Clock) -> float:
        from datetime import UTC

        return clock.now(UTC).timestamp()

    async def request(self, method: str, url: str, **how: Any) -> Answer:
        """Stand in for `Http.request`."""
        with self._app.test_client() as client:
            answer = client.open(
                urlsplit(url).path,
                method=method,
                data=how.get("data"),
                auth=how.get("auth"),
                headers=how.get("headers"),
            )
            return Answer(answer.status_code, answer.data, None)


class Weather(RuleBasedStateMachine):
    """Everything that can happen, in any order."""

    links = Bundle("links")
    clicks = Bundle("clicks")

    def __init__(self) -> None:
        super().__init__()
        self._patch = pytest.MonkeyPatch()
        self._clock = Clock(self._patch)
        self._provider = Provider(self._clock)
        self._server = self._provider.server
        asked = self._provider.request

        async def request(_: Http, method: str, url: str, **how: Any) -> Answer:
            return await asked(method, url, **how)

        self._patch.setattr(Http, "request", request)
        self._store = MemoryBackend()
        self._pockets = [self._opened(), self._opened()]
        self._sessions: dict[Place, Grant] = {}
        self._questions: dict[Place, Question] = {}
        self._refreshes = self._exchanges = 0

    def teardown(self) -> None:
        for pocket in self._pockets:
            pocket.close()
        self._patch.undo()

    def _opened(self) -> PocketAuth:
        pocket = PocketAuth(
            self._store,
            keys=KEYS,
            base_url=BASE,
            providers=[self._server.provider("acme"), self._server.provider("zeta")],
            clients={"acme": ACME, "zeta": ZETA},
            session_cache_ttl=timedelta(),
            future_ttl=timedelta(seconds=LINK_S),
        )
        app = FastAPI(openapi_url=None)
        app.include_router(pocket.router)
        pocket._pages = httpx.ASGITransport(app)  # type: ignore[attr-defined]
        return pocket

    @property
    def _now(self) -> float:
        return self._clock.ahead.total_seconds()

    def _load(self, pocket: int, method: str, url: str) -> httpx.Response:
        async def load() -> httpx.Response:
            pages = self._pockets[pocket]._pages  # type: ignore[attr-defined]
            headers = {"Sec-Fetch-Site": "same-origin"} if method == "POST" else {}
            request = httpx.Request(method, url, headers=headers)
            answer = await pages.handle_async_request(request)
            body = await answer.aread()
            return httpx.Response(
                answer.status_code, headers=answer.headers, content=body
            )

        return run(load())

    def _where(self, place: Place) -> dict[str, Any]:
        owner, provider, profile = place
        return {"auth_provider": provider, "owner": owner, "profile": profile}

    # ------------------------------------------------------------------ the model

    def _state(self, place: Place, scopes: tuple[str, ...]) -> str:
        session, question = self._sessions.get(place), self._questions.get(place)
        covered = session is not None and set(scopes) <= session.scopes
        if covered and session and (found := session.usable(self._now)):
            return found
        if question and question.is_open(self._now) and set(scopes) <= question.scopes:
            return "PENDING_RESOLVE"
        return "DO_AUTH" if session else "NO_SESSION"

    def _ask(self, place: Place, scopes: tuple[str, ...], link: str) -> None:
        """Note that a link was given out: the open one, or one never seen before."""
        session, question = self._sessions.get(place), self._questions.get(place)
        wanted = {*scopes, *(session.scopes if session else ())}
        if question and question.is_open(self._now):
            assert link == question.link
            question.scopes |= wanted
            question.needed |= set(scopes)
            return
        assert all(link != other.link for other in self._questions.values())
        refused = question.refused if question else {}
        self._questions[place] = Question(
            link, wanted, set(scopes), self._now + LINK_S, refused=dict(refused)
        )

    def _given(self, click: Click, withheld: set[str], family: Any) -> None:
        """Note a grant: it replaces the session unless that covers more."""
        question, old = self._questions[click.place], self._sessions.get(click.place)
        granted = click.scopes - withheld
        alive = old is not None and old.usable(self._now) is not None
        keeps = alive and old is not None and bool(old.scopes - granted)
        first_won = (
            alive
            and old is not None
            and question is click.question
            and question.status == "done"
            and click.scopes <= old.scopes
        )
        if not keeps and not first_won:
            self._sessions[click.place] = Grant(granted, self._now, family)
        left_out = click.scopes & withheld
        if question.scopes <= click.scopes and (
            question.status != "done" or left_out < question.withheld
        ):
            question.status, question.withheld = "done", left_out

    # --------------------------------------------------------------- what tools do

    @rule(place=PLACES, scopes=SCOPES, pocket=POCKETS)
    def check(self, place: Place, scopes: tuple[str, ...], pocket: int) -> None:
        asks = self._request(place, scopes, pocket)
        state = run(self._pockets[pocket].check(asks, **self._where(place)))
        assert state.name == self._state(place, scopes)

    def _request(self, place: Place, scopes: tuple[str, ...], pocket: int) -> Any:
        return self._pockets[pocket].make_request(list(scopes), auth_provider=place[1])

    @rule(target=links, place=PLACES, scopes=SCOPES, pocket=POCKETS)
    def prepare(self, place: Place, scopes: tuple[str, ...], pocket: int) -> Any:
        expected = self._state(place, scopes)
        asks = self._request(place, scopes, pocket)
        link = run(self._pockets[pocket].prepare(asks, **self._where(place)))
        assert (link is None) == (expected in {"SKIP_AUTH", "DO_REFRESH"})
        if link is None:
            return multiple()
        self._ask(place, scopes, link)
        return (place, self._questions[place])

    @rule(place=PLACES, scopes=SCOPES, pocket=POCKETS)
    def use(self, place: Place, scopes: tuple[str, ...], pocket: int) -> None:
        expected = self._state(place, scopes)
        asks = self._request(place, scopes, pocket)
        work = self._pockets[pocket].authenticate(asks, timeout=0, **self._where(place))
        session = self._sessions.get(place)
        if expected == "DO_REFRESH":
            assert session is not None
            self._renew(session)
            expected = self._state(place, scopes)
        if expected != "SKIP_AUTH":
            with pytest.raises(AuthorizationRequired, match=expected):
                run(work)
            return
        context = run(work)
        assert session is not None
        self._serves(context, place, session)
        if self._now - session.since >= TOKEN_S - ADVISORY_S and not session.over:
            # Renewed in passing; the next look finds it done.
            run(self._quiet(pocket))
            self._renew(session)

    def _renew(self, session: Grant) -> None:
        if session.family.revoked:
            session.over = True
        else:
            session.since = self._now
            self._refreshes += 1

    async def _quiet(self, pocket: int) -> None:
        engine = await self._pockets[pocket]._service._engine()
        while engine._background:
            await asyncio.gather(*engine._background, return_exceptions=True)
            await asyncio.sleep(0)

    def _serves(self, context: Any, place: Place, session: Grant) -> None:
        """A token is of that place, of its present grant, and covers what it says."""
        token = self._server.find_token(context.access_token, "access_token")
        assert token is not None
        assert token.grant.username == "/".join(place)
        assert token.grant is session.family
        assert set(context.scopes) == session.scopes
        assert session.family.revoked or not token.is_expired()

    @rule(target=links, place=PLACES, scopes=SCOPES, turn=TURNS, pocket=POCKETS)
    def call_tool(
        self, place: Place, scopes: tuple[str, ...], turn: tuple[str, str], pocket: int
    ) -> Any:
        owner, provider, profile = place
        outcome = Outcome(Requirement(provider, scopes, profile=profile))
        now = Turn("/".join((*place, *turn)), turn[0])
        service = self._pockets[pocket]._service
        state, session = self._state(place, scopes), self._sessions.get(place)
        work = service.settle(Owner("user", owner), [outcome], now, ask=True)
        question = self._questions.get(place)
        if state == "DO_REFRESH":
            assert session is not None
            self._renew(session)
            state = self._state(place, scopes)
        [context] = run(run_in(service, work))
        if state == "SKIP_AUTH":
            assert context is not None
            assert session is not None
            self._serves(context, place, session)
            run(self._quiet(pocket))
            if self._now - session.since >= TOKEN_S - ADVISORY_S and not session.over:
                self._renew(session)
            return multiple()
        assert context is None
        if self._said_no(question, scopes, now):
            assert isinstance(outcome.refusal, AuthorizationRefused)
            return multiple()
        if question and now.name in question.turns and question.status == "done":
            assert isinstance(outcome.refusal, ScopeWithheld)
            return multiple()
        assert outcome.refusal is None
        assert outcome.consent is not None
        self._ask(place, scopes, outcome.consent.url)
        self._questions[place].turns.add(now.name)
        return (place, self._questions[place])

    def _said_no(
        self, question: Question | None, scopes: tuple[str, ...], turn: Turn
    ) -> bool:
        if question is None:
            return False
        if turn.name in question.turns and question.status == "denied":
            return True
        when = question.refused.get(turn.thread_id or "", -1e9)
        return self._now < when + COOLDOWN_S and set(scopes) <= question.needed

    @rule(place=PLACES, scopes=SCOPES, turn=TURNS, pocket=POCKETS)
    def refuse_in_chat(
        self, place: Place, scopes: tuple[str, ...], turn: tuple[str, str], pocket: int
    ) -> None:
        owner, provider, profile = place
        outcome = Outcome(Requirement(provider, scopes, profile=profile))
        now = Turn("/".join((*place, *turn)), turn[0])
        service = self._pockets[pocket]._service
        if self._state(place, scopes) in {"SKIP_AUTH", "DO_REFRESH"}:
            return
        question = self._questions.get(place)
        run(
            run_in(
                service, service.settle(Owner("user", owner), [outcome], now, ask=True)
            )
        )
        if outcome.consent is None:
            return
        self._ask(place, scopes, outcome.consent.url)
        question = self._questions[place]
        question.turns.add(now.name)
        run(run_in(service, service.refuse(outcome.consent, now)))
        question.refused[turn[0]] = self._now

    # ------------------------------------------------------------- what persons do

    @rule(target=clicks, link=links, pocket=POCKETS)
    def open_link(self, link: tuple[Place, Question], pocket: int) -> Any:
        place, question = link
        looked = self._load(pocket, "GET", question.link)
        page = self._load(pocket, "POST", question.link)
        if self._questions.get(place) is not question or self._now >= question.until:
            assert (looked.status_code, page.status_code) == (410, 410)
            return multiple()
        assert looked.status_code == page.status_code == 200
        told = {"pending": "pending", "denied": "declined"}.get(question.status)
        finished = "withheld" if question.withheld else "connected"
        assert outcome_of(looked) == (told or finished)
        found = re.search(r'href="(http[^"]+/authorize[^"]*)"', page.text)
        assert found, page.text
        query = {
            k: v[0]
            for k, v in parse_qs(urlsplit(html.unescape(found[1])).query).items()
        }
        assert set(query["scope"].split()) == question.scopes
        return Click(place, question, set(question.scopes), query, self._now)

    @rule(
        click=clicks,
        pocket=POCKETS,
        withheld=st.sampled_from([frozenset(), frozenset(["write"])]),
        trouble=st.sampled_from([None, None, None, "503"]),
    )
    def agree(
        self, click: Click, pocket: int, withheld: frozenset[str], trouble: str | None
    ) -> None:
        """The right person agrees; so does whoever replays an answer's state."""
        self._agree(click, pocket, withheld, trouble)

    @rule(target=clicks, place=PLACES, scopes=SCOPES, pocket=POCKETS)
    def connect(self, place: Place, scopes: tuple[str, ...], pocket: int) -> Any:
        """All of it in one go, as it is most often."""
        link = self.prepare(place, scopes, pocket)
        click = self.open_link(link, pocket) if isinstance(link, tuple) else link
        if isinstance(click, Click):
            self._agree(click, pocket, frozenset(), None)
        return click

    @rule(target=clicks, place=PLACES, pocket=POCKETS)
    def open_two_tabs(self, place: Place, pocket: int) -> Any:
        """More is asked for after the link was opened; it is opened again."""
        opened = []
        for scopes in (("read",), ("read", "write")):
            link = self.prepare(place, scopes, pocket)
            if isinstance(link, tuple):
                opened.append(self.open_link(link, pocket))
        return multiple(*(click for click in opened if isinstance(click, Click)))

    def _agree(
        self, click: Click, pocket: int, withheld: frozenset[str], trouble: str | None
    ) -> None:
        client = self._server.clients[click.query["client_id"]]
        code = self._server.add_code(
            username="/".join(click.place),
            client=client,
            asked=sorted(click.scopes - withheld),
            redirect_uri=click.query["redirect_uri"],
            code_challenge=click.query["code_challenge"],
            code_challenge_method=click.query["code_challenge_method"],
        )
        family = self._server._grants[-1]
        address = self._answer(click, code=code)
        expected = self._expected(click)
        if expected == 303 and trouble:
            self._server.fault(trouble, grant_type="authorization_code")
            expected = 503
        page = self._load(pocket, "GET", address)
        assert page.status_code == expected, outcome_of(page)
        if expected in {303, 503}:
            click.answer, click.outcome = address, expected
        if expected == 303:
            self._exchanges += 1
            self._given(click, set(withheld), family)

    def _answer(self, click: Click, **parameters: str) -> str:
        query = {"state": click.query["state"], "iss": self._server.issuer} | parameters
        return f"{click.query['redirect_uri']}?{urlencode(query)}"

    def _expected(self, click: Click) -> int:
        if click.answer is not None:
            return 409
        if self._now >= click.since + ATTEMPT_S or click.place not in self._questions:
            return 410
        return 303

    @rule(click=clicks, pocket=POCKETS)
    def reload(self, click: Click, pocket: int) -> None:
        """The same answer again gets the same page and makes no request."""
        if click.answer is None:
            return
        page = self._load(pocket, "GET", click.answer)
        same = {303: {303}, 503: {502, 503}, 502: {502}, 410: {410}}[click.outcome]
        if click.place not in self._questions and click.outcome == 303:
            same = {410}  # disconnected: there is no page to go to
        assert page.status_code in same, outcome_of(page)

    @rule(
        click=clicks,
        pocket=POCKETS,
        error=st.sampled_from(["access_denied", "server_error", "invalid_scope"]),
    )
    def say_no(self, click: Click, pocket: int, error: str) -> None:
        address = self._answer(click, error=error)
        if address == click.answer:
            return  # as `reload`
        expected = self._expected(click)
        if expected == 303 and error != "access_denied":
            expected = 503 if error == "server_error" else 502
        page = self._load(pocket, "GET", address)
        assert page.status_code == expected, outcome_of(page)
        if expected in {303, 502, 503}:
            click.answer, click.outcome = address, expected
        question = self._questions.get(click.place)
        if (
            expected == 303
            and question is click.question
            and question.status == "pending"
        ):
            question.status = "denied"

    @rule(
        click=clicks,
        pocket=POCKETS,
        how=st.sampled_from(["other path", "other issuer", "no issuer", "other state"]),
    )
    def attack(self, click: Click, pocket: int, how: str) -> None:
        """What does not fit is refused, and consumes nothing."""
        address = self._answer(click, code="ac_stolen")
        status = 403
        if how == "other path":
            other = {"acme": "zeta", "zeta": "acme"}[click.place[1]]
            address = address.replace(f"/auth/{click.place[1]}/", f"/auth/{other}/")
        elif how == "other issuer":
            address = self._answer(click, code="ac_stolen", iss="http://evil.example")
        elif how == "no issuer":
            address = re.sub(r"&iss=[^&]*", "", address)
        else:
            address = address.replace(click.query["state"], "x" * 43)
            status = 404
        assert self._load(pocket, "GET", address).status_code == status

    # ------------------------------------------------- what else happens meanwhile

    @rule(seconds=st.sampled_from(STEPS_S))
    def wait(self, seconds: int) -> None:
        self._clock.forward(seconds)

    @rule(place=PLACES)
    def revoke_at_provider(self, place: Place) -> None:
        self._server.revoke_grants("/".join(place))

    @rule(place=PLACES, pocket=POCKETS)
    def disconnect(self, place: Place, pocket: int) -> None:
        owner, provider, profile = place
        had = self._sessions.pop(place, None)
        self._questions.pop(place, None)
        done = run(
            self._pockets[pocket].delete_session(provider, profile=profile, owner=owner)
        )
        assert done == (had is not None)
        run(self._quiet(pocket))
        if had:
            assert had.family.revoked

    @rule(pocket=POCKETS)
    def crash(self, pocket: int) -> None:
        """A process ends without a word; the next one opens the store."""
        self._pockets[pocket] = self._opened()

    # ------------------------------------------------------------- what always holds

    @invariant()
    def provider_saw_no_misuse(self) -> None:
        server = self._server
        assert server.code_replays == 0
        assert server.refresh_token_reuses == 0
        assert server.token_requests["refresh_token"] == self._refreshes
        assert server.token_requests["authorization_code"] == self._exchanges


async def run_in(service: Any, work: Any) -> Any:
    """Settle as the gate does, on the engine's loop."""
    return await work


TestWeather = Weather.TestCase
TestWeather.settings = settings(
    max_examples=EXAMPLES or 12,
    stateful_step_count=50,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    phases=(Phase.generate, Phase.shrink),  # explaining costs more than both
    suppress_health_check=list(HealthCheck),
)
