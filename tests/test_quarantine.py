"""Whose account becomes whose: grants that wait until it is shown who agreed."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import ACME, call, provider, says
from graphs import ASYNC, DOORS, Work, build, results, thread
from langgraph.types import Command
from support import KEYS, Clock, Watched, answer_url, link, state, token, until
from test_accounts import Sites

from langchain_pocket_auth import (
    CallbackRefused,
    Client,
    ConfigurationError,
    Event,
    Owner,
    OwnerUnknown,
    PocketAuth,
    ProviderError,
    StorageError,
    StorageUnavailable,
    pending_authorizations,
    resume,
)
from langchain_pocket_auth._linking import Linking, Result
from langchain_pocket_auth._quarantine import Held
from langchain_pocket_auth._site import THE_APP, Visitor
from langchain_pocket_auth._vault import Hold
from langchain_pocket_auth._waiting import Waiting
from langchain_pocket_auth.server import callback_of
from langchain_pocket_auth.testing import AuthorizationServer, Browser

URL = "https://app.test"
ALICE, MALLORY = Owner("user", "alice"), Owner("user", "mallory")
WHOSE = {"owner": ALICE}
SIGNED = ("openid", "email")  # then the provider tells whose account it is


def nobody() -> None:
    """Stand for the app's dependency: here the tests say who comes."""


@dataclass
class Site:
    """An app for many users, and how its links and callbacks are met."""

    pocket: PocketAuth
    events: list[Event] = field(default_factory=list)

    async def attempts(self, work: Callable[[Any], Any]) -> Any:
        """Do something with the attempts of the engine."""
        return await self.pocket._service.ask(lambda engine: work(engine.attempts))

    async def begin(self, url: str, visitor: Visitor) -> str:
        """Press the button of a connect link."""
        return await self.attempts(
            lambda a: a.begin(url.rpartition("/")[2], visitor=visitor)
        )

    async def answer(self, callback: str, visitor: Visitor) -> Result:
        """Arrive at the callback."""
        found = callback_of(callback, URL)
        return await self.attempts(
            lambda a: a.answer(found.pop("uid"), visitor=visitor, **found)
        )

    async def agreed(self, url: str, person: Browser, visitor: Visitor) -> Result:
        """Press the button, agree at the provider, come back."""
        there = await self.begin(url, visitor)
        return await self.answer(await answer_url(person, there), visitor)

    async def held(self, url: str) -> Held | None:
        """Return what the link's page would ask for."""

        async def look(attempts: Any) -> Held | None:
            future, _ = await attempts.ticket(url.rpartition("/")[2])
            return await attempts.held(future.entry)

        return await self.attempts(look)

    async def code(self, url: str) -> str:
        """Return the code that the page shows."""
        held = await self.held(url)
        assert held is not None
        assert held.code is not None
        return held.code

    async def vouch(self, url: str, visitor: Visitor) -> Result:
        """Press "Finish connecting"."""
        return await self.attempts(lambda a: a.vouch(url.rpartition("/")[2], visitor))

    def told(self, event: str) -> list[Event]:
        """Return the events of a type."""
        return [each for each in self.events if each.type == event]


Make = Callable[..., Site]


@pytest.fixture
def make_site(server: AuthorizationServer) -> Iterator[Make]:
    """Make apps with a public address; they are closed at the end."""
    made: list[PocketAuth] = []
    server.register(
        client_id=ACME[0],
        client_secret=ACME[1],
        redirect_uris=[f"{URL}/auth/acme/oauth2/callback"],
    )

    def make(storage: Any = "memory://", **settings: Any) -> Site:
        facts = {
            "jwks_uri": server.jwks_uri,
            "device_authorization_endpoint": server.device_authorization_endpoint,
            **settings.pop("facts", {}),
        }
        settings = {"public_url": URL, "clients": {"acme": ACME}} | settings
        pocket = PocketAuth(
            storage, providers=[provider(server, "acme", **facts)], **settings
        )
        made.append(pocket)
        assert pocket.router  # the app serves it
        site = Site(pocket)
        pocket.on_event(site.events.append)
        return site

    yield make
    for pocket in made:
        pocket.close()


@pytest.fixture
def signed_in(make_site: Make) -> Site:
    """An app whose users sign in."""
    return make_site(verify_user=nobody)


@pytest.fixture
def chat(make_site: Make) -> Site:
    """An app without a sign-in: the chat confirms."""
    return make_site(confirm="code")


@pytest.fixture
def bob() -> Browser:
    """Another person, who is made to open what they should not."""
    return Browser("bob")


def at(owner: Owner | str | None, browser: str = "") -> Visitor:
    """Return somebody at a browser; by default at their own."""
    owner = Owner("user", owner) if isinstance(owner, str) else owner
    return Visitor(owner, browser or f"browser of {owner.id if owner else 'nobody'}")


def refusal(reason: str) -> Any:
    """Expect that somebody is turned away."""
    return pytest.raises(CallbackRefused, match=f": {reason}$")


def given_back(server: AuthorizationServer) -> float:
    """Return how many grants the provider was told to end, each by its two tokens."""
    return server.revocations / 2


def other(code: str, n: int = 0) -> str:
    """Return the *n*-th code that is not *code*."""
    kind = "ABCDEFGHJKMNPQRSTUVWXYZ23456789"
    return code[:-2] + kind[kind.index(code[-2]) - n // 30 - 1] + kind[n % 30]


# ------------------------------------------------------------- the attack (A0, A1 1-4)


@pytest.mark.parametrize("page", ["the provider's", "ours"])
@pytest.mark.parametrize(
    "design",
    [
        {"verify_user": nobody},
        {"confirm": "code"},
        {"verify_user": nobody, "confirm": "code"},
    ],
    ids="+".join,
)
async def test_consent_of_a_victim_never_reaches_who_sent_the_link(
    make_site: Make,
    server: AuthorizationServer,
    bob: Browser,
    design: dict[str, Any],
    page: str,
) -> None:
    """Bob agrees at mallory's link: nothing of his is hers, and hers still works."""
    site = make_site(**design)
    url = await link(site.pocket, owner=MALLORY)
    victim, taken = at("bob"), False
    if page == "ours":
        if "verify_user" in design:
            with refusal("wrong_person"):
                await site.agreed(url, bob, victim)
        else:
            assert (await site.agreed(url, bob, victim)).outcome == "held"
            taken = True
            # The page of his browser shows it, she cannot guess it.
            guess = other((await site.code(url)).replace("-", ""))
            assert not await site.pocket.confirm(url, guess, owner=MALLORY)
    else:
        there = await site.begin(url, at(MALLORY))
        with refusal("mismatch"):
            await site.answer(await answer_url(bob, there), victim)
    assert await state(site.pocket, owner=MALLORY) == "PENDING_RESOLVE"
    assert server.token_requests.total() == taken
    herself = Browser("mallory")
    outcome = (await site.agreed(url, herself, at(MALLORY))).outcome
    if "confirm" in design:
        assert await site.pocket.confirm(url, await site.code(url), owner=MALLORY)
    else:
        assert outcome == "connected"
    # What bob gave is back at the provider; what is linked is her own.
    assert given_back(server) == taken
    linked = (await token(site.pocket, owner=MALLORY)).access_token
    assert linked == server.issued_access_tokens[-1]


async def test_no_design_that_the_attack_defeats_can_be_set() -> None:
    """A state alone, or a cookie beside it, does not show who agreed: it is refused."""
    with pytest.raises(ConfigurationError, match="whoever is sent a link"):
        PocketAuth("memory://", public_url=URL)


async def test_nobody_is_somebody_by_default(signed_in: Site) -> None:
    """Two anonymous conversations never share a connection."""
    with pytest.raises(OwnerUnknown):
        await state(signed_in.pocket)


# ------------------------------------------------------------------ the signed-in user


async def test_answer_of_another_user_leaves_the_attempt_to_its_owner(
    signed_in: Site, server: AuthorizationServer, alice: Browser
) -> None:
    """Nothing is consumed before browser and user were compared."""
    url = await link(signed_in.pocket, **WHOSE)
    there = await signed_in.begin(url, at("alice"))
    callback = await answer_url(alice, there)
    here = at("alice").browser
    for visitor, reason in [
        (at("alice", "another"), "mismatch"),
        (Visitor(ALICE), "mismatch"),
        (at("bob", here or ""), "wrong_person"),
        # A user of that id, but not that owner.
        (Visitor(Owner("thread", "alice"), here), "wrong_person"),
    ]:
        with refusal(reason):
            await signed_in.answer(callback, visitor)
    assert server.token_requests.total() == 0
    assert (await signed_in.answer(callback, at("alice"))).outcome == "connected"
    assert [e.owner for e in signed_in.told("refused")] == [ALICE, ALICE]


async def test_link_is_opened_by_its_owner_alone(signed_in: Site) -> None:
    """Nobody who is not signed in, and nobody else, starts anything."""
    url = await link(signed_in.pocket, **WHOSE)
    for visitor, reason in [(at(None), "sign_in"), (at("bob"), "wrong_person")]:
        with refusal(reason):
            await signed_in.begin(url, visitor)
    assert await signed_in.held(url) is None


async def test_owner_who_was_not_seen_at_the_callback_vouches_for_it(
    signed_in: Site, server: AuthorizationServer, alice: Browser
) -> None:
    """The code is exchanged at once, and the grant is theirs when they have said so."""
    url, here = await link(signed_in.pocket, **WHOSE), at("alice").browser or ""
    callback = await answer_url(alice, await signed_in.begin(url, at("alice")))
    unseen = Visitor(browser=here)
    assert (await signed_in.answer(callback, unseen)).outcome == "held"
    assert (await signed_in.answer(callback, unseen)).outcome == "again"
    assert server.token_requests.total() == 1
    held = await signed_in.held(url)
    assert (held and held.person, held and held.browser) == (True, here)
    assert await state(signed_in.pocket, **WHOSE) == "PENDING_RESOLVE"
    for visitor, reason in [
        (at("alice", "another"), "mismatch"),
        (unseen, "sign_in"),
        (THE_APP, "sign_in"),
    ]:
        with refusal(reason):
            await signed_in.vouch(url, visitor)
    assert (await signed_in.vouch(url, at("alice"))).outcome == "connected"
    assert (await signed_in.vouch(url, at("alice"))).outcome == "again"
    assert server.token_requests.total() == 1
    assert given_back(server) == 0


async def test_word_of_another_user_gives_the_grant_back(
    signed_in: Site, server: AuthorizationServer, alice: Browser, bob: Browser
) -> None:
    """Bob agreed in a browser where alice had begun: it is nobody's, and she can go on."""
    url, here = await link(signed_in.pocket, **WHOSE), at("alice").browser or ""
    callback = await answer_url(bob, await signed_in.begin(url, at("alice")))
    await signed_in.answer(callback, Visitor(browser=here))
    with refusal("wrong_person"):
        await signed_in.vouch(url, at("bob", here))
    assert given_back(server) == 1
    with refusal("replayed"):
        await signed_in.vouch(url, at("alice"))
    assert (await signed_in.agreed(url, alice, at("alice"))).outcome == "connected"
    assert given_back(server) == 1


async def test_ways_that_show_nobody_are_off_in_public(
    make_site: Make, server: AuthorizationServer, alice: Browser
) -> None:
    """Pasting is refused, and device codes are unless the app says otherwise (A1 31)."""
    site = make_site(verify_user=nobody)
    for way in ("paste", "device"):
        with pytest.raises(ConfigurationError, match="public"):
            await site.pocket.connect("acme", owner=ALICE, **{way: True})
    assert server.token_requests.total() == 0
    app = Client(client_id=ACME[0], client_secret=ACME[1], device_in_public=True)
    site = make_site(verify_user=nobody, clients={"acme": app})
    url, shown = await link(site.pocket, **WHOSE), asyncio.Event()
    loop, codes = asyncio.get_running_loop(), []

    def show(code: Any) -> None:
        codes.append(code)
        loop.call_soon_threadsafe(shown.set)

    server.device_interval_s = 0.05
    work = asyncio.ensure_future(
        site.attempts(lambda a: a.device(url.rpartition("/")[2], show))
    )
    await asyncio.wait_for(shown.wait(), 5)
    await asyncio.to_thread(
        alice.approve_device, codes[0].verification_uri, codes[0].user_code
    )
    assert (await asyncio.wait_for(work, 10)).outcome == "connected"


# ------------------------------------------------------------------- the chat's code


async def test_code_is_taken_however_it_is_written(chat: Site, alice: Browser) -> None:
    """Case, spaces and dashes do not count; another owner's chat does not either."""
    url = await link(chat.pocket, **WHOSE)
    await chat.agreed(url, alice, at(None))
    code = await chat.code(url)
    assert len(code) == 9
    assert code[4] == "-"
    assert not await chat.pocket.confirm(url, code, owner=MALLORY)
    assert not await chat.pocket.confirm("no such question", code)
    assert not await chat.pocket.confirm(url, "")
    written = f" {code.lower().replace('-', ' ')} "
    assert await chat.pocket.confirm(url, written, owner=ALICE)
    assert await state(chat.pocket, **WHOSE) == "SKIP_AUTH"
    assert not await chat.pocket.confirm(url, code)  # used up


async def test_fifth_wrong_code_gives_the_grant_back(
    chat: Site, server: AuthorizationServer, alice: Browser
) -> None:
    """However many come at once, five are tried; the same one again is one."""
    url = await link(chat.pocket, **WHOSE)
    await chat.agreed(url, alice, at(None))
    code = (await chat.code(url)).replace("-", "")
    for _ in range(7):
        assert not await chat.pocket.confirm(url, other(code))
    assert await chat.code(url)
    wrong = [chat.pocket.confirm(url, other(code, n)) for n in range(1, 20)]
    assert not any(await asyncio.gather(*wrong))
    assert given_back(server) == 1
    assert not await chat.pocket.confirm(url, code)
    assert [e.reason for e in chat.told("refused")] == ["too many wrong codes"]
    assert await state(chat.pocket, **WHOSE) == "PENDING_RESOLVE"
    # The link works on, with another code.
    await chat.agreed(url, alice, at(None))
    assert await chat.pocket.confirm(url, await chat.code(url))


async def test_right_code_after_five_wrong_ones_comes_too_late(
    make_site: Make, alice: Browser
) -> None:
    """Also in the moment in which the fifth is known and nothing is given back yet."""
    store, puts, blocked = Watched("memory://"), 0, True

    async def before(name: str, key: tuple[str, str]) -> None:
        nonlocal puts
        if (name, key[0]) == ("put", "attempt"):
            puts += 1
            while puts > 5 and blocked:  # noqa: ASYNC110 - on another loop
                await asyncio.sleep(0.005)

    site = make_site(store, keys=KEYS, confirm="code")
    url = await link(site.pocket, **WHOSE)
    await site.agreed(url, alice, at(None))
    code = (await site.code(url)).replace("-", "")
    store.before = before
    for n in range(4):
        assert not await site.pocket.confirm(url, other(code, n))
    fifth = asyncio.ensure_future(site.pocket.confirm(url, other(code, 4)))

    async def is_known() -> bool:
        return puts == 6

    await until(is_known)
    late = asyncio.ensure_future(site.pocket.confirm(url, code))
    await asyncio.wait([late], timeout=0.1)
    blocked = False
    assert not await fifth
    assert not await late
    assert await state(site.pocket, **WHOSE) == "PENDING_RESOLVE"


async def test_user_and_code_are_asked_for_one_after_the_other(
    make_site: Make, alice: Browser
) -> None:
    """Where both are set, the code is shown to who has vouched."""
    site = make_site(verify_user=nobody, confirm="code")
    url, here = await link(site.pocket, **WHOSE), at("alice").browser or ""
    callback = await answer_url(alice, await site.begin(url, at("alice")))
    await site.answer(callback, Visitor(browser=here))
    held = await site.held(url)
    assert (held and held.person, held and held.code) == (True, None)
    assert (await site.vouch(url, at("alice"))).outcome == "held"
    assert (await site.vouch(url, at("alice"))).outcome == "held"
    assert await site.pocket.confirm(url, await site.code(url), owner=ALICE)


@pytest.mark.parametrize("door", DOORS)
async def test_code_reaches_a_paused_run_with_its_resume_value(
    make_site: Make,
    alice: Browser,
    caplog: pytest.LogCaptureFixture,
    door: str,
) -> None:
    """A wrong one pauses again at the same link and says so; no log has any."""
    caplog.set_level(logging.DEBUG)
    site, work = make_site(confirm="code", owner="alice"), Work(ASYNC)
    tools = [work.tool("act", "acme")]
    graph, _ = build(door, site.pocket, tools, [says(call("act", text="it"))])
    paused = await graph.ainvoke({"messages": [("user", "go")]}, thread())
    [pending] = pending_authorizations(paused)
    assert pending.confirm == "code"
    await site.agreed(pending.url, alice, at(None))
    code = await site.code(pending.url)
    assert code not in json.dumps(paused["__interrupt__"][0].value)
    # Without a code, with a wrong one, with what only looks like one.
    for given in (None, other(code.replace("-", ""))):
        paused = await graph.ainvoke(resume(paused, code=given), thread())
        [again] = pending_authorizations(paused)
        assert again.url == pending.url
        assert not work.done
    assert "not the code" in again.reason
    for odd in ({"code": 7}, {"code": ["x"]}, "x", None):
        response = {"action": "accept", "content": odd}
        value = {"responses": {pending.key: response}}
        answer = Command(resume={each.id: value for each in paused["__interrupt__"]})
        paused = await graph.ainvoke(answer, thread())
        [again] = pending_authorizations(paused)
        assert "not the code" not in again.reason
    done = await graph.ainvoke(resume(paused, code={"acme": code}), thread())
    assert results(done)["act"].content == "act did it"
    assert work.names == ["act"]
    assert code not in caplog.text
    assert code.replace("-", "") not in caplog.text


async def test_run_that_brings_the_code_is_not_resumed_a_second_time(
    make_site: Make, alice: Browser
) -> None:
    """With `auto_resume`, too, one run goes on: the one that was given the code."""
    site, work = make_site(confirm="code", owner="alice"), Work(ASYNC)
    tools = [work.tool("act", "acme")]
    script = [says(call("act", text="it"))]
    graph, model = build("create_agent", site.pocket, tools, script)
    site.pocket.auto_resume(graph)
    paused = await graph.ainvoke({"messages": [("user", "go")]}, thread())
    [pending] = pending_authorizations(paused)
    await site.agreed(pending.url, alice, at(None))
    code = await site.code(pending.url)
    done = await graph.ainvoke(resume(paused, code=code), thread())
    assert results(done)["act"].content == "act did it"
    # Another conversation is, where the app confirms it itself.
    await site.pocket.delete_session("acme", owner=ALICE)
    paused = await graph.ainvoke({"messages": [("user", "go")]}, thread("2"))
    [pending] = pending_authorizations(paused)
    await site.agreed(pending.url, alice, at(None))
    assert await site.pocket.confirm(pending, await site.code(pending.url))

    async def resumed() -> bool:
        return bool(site.told("resumed"))

    await until(resumed)
    assert [e.thread_ids for e in site.told("resumed")] == [("2",)]
    assert not [*site.told("not_resumed"), *site.told("superseded")]
    assert work.names == ["act", "act"]
    assert model.calls == 4


def test_code_says_which_connection_it_is_for() -> None:
    """One code for two questions would be a guess; one for another is a mistake."""

    def request(name: str) -> dict[str, Any]:
        words = ("url", "message", "handler", "profile", "state", "reason", "account")
        lists = ("scopes", "missing_scopes", "tools", "tool_call_ids")
        return {
            **dict.fromkeys(words, ""),
            **{each: [] for each in lists},
            "key": f"key of {name}",
            "provider": name,
            "expires_at": "2026-01-01T00:00:00+00:00",
        }

    value = {"type": "pocket_auth", "requests": [request("acme"), request("zeta")]}
    asked = {"id": "i", "value": value}
    with pytest.raises(ValueError, match="which one"):
        resume(asked, code="K")
    with pytest.raises(ValueError, match="not confirmed"):
        resume(asked, code={"other": "K"})
    one, two = "key of acme", "key of zeta"
    given = resume(asked, code={"acme": "K"}).resume["i"]["responses"]
    assert given == {
        one: {"action": "accept", "content": {"code": "K"}},
        two: {"action": "accept"},
    }
    given = resume(asked, code="K", decline=["acme"]).resume["i"]["responses"]
    assert given[one] == {"action": "decline"}
    assert given[two]["content"] == {"code": "K"}


# --------------------------------------------------------------- the app's own opinion


async def test_account_that_the_app_does_not_take_is_given_back(
    make_site: Make, server: AuthorizationServer, alice: Browser, bob: Browser
) -> None:
    """A matcher that says no, fails or says nothing refuses; the link works on."""
    asked: list[tuple[Owner, Any]] = []

    def no(owner: Owner, context: Any) -> bool:
        asked.append((owner, context))
        return context.account == "alice@users.test"

    async def late(owner: Owner, context: Any) -> bool:
        await asyncio.sleep(0)
        return no(owner, context)

    def fails(owner: Owner, context: Any) -> bool:
        raise RuntimeError(f"{owner} {context.access_token}")

    for n, matcher in enumerate((no, late, fails)):
        site = make_site(verify_user=nobody, account_matcher=matcher)
        url = await link(site.pocket, *SIGNED, **WHOSE)
        with refusal("wrong_account"):
            await site.agreed(url, bob, at("alice"))
        assert given_back(server) == n + 1
        assert await state(site.pocket, *SIGNED, **WHOSE) == "PENDING_RESOLVE"

        async def heard(site: Site = site) -> bool:
            return bool(site.told("refused"))

        await until(heard)
        assert site.told("refused")[0].account == "bob@users.test"
        if matcher is not fails:
            done = await site.agreed(url, alice, at("alice"))
            assert done.outcome == "connected"

            async def told(site: Site = site) -> bool:
                return bool(site.told("connected"))

            await until(told)
            # Who was told the link learns whose account it became.
            assert site.told("connected")[0].account == "alice@users.test"
    assert {owner for owner, _ in asked} == {ALICE}
    assert {context.refresh_token for _, context in asked} == {None}


async def test_account_is_looked_at_before_its_code_is_shown(
    make_site: Make, server: AuthorizationServer, bob: Browser
) -> None:
    """Whoever agreed learns on the page, not from the chat, that it will not do."""
    site = make_site(
        verify_user=nobody, confirm="code", account_matcher=lambda *_: False
    )
    url, here = await link(site.pocket, **WHOSE), at("alice").browser or ""
    callback = await answer_url(bob, await site.begin(url, at("alice")))
    await site.answer(callback, Visitor(browser=here))
    with refusal("wrong_account"):
        await site.vouch(url, at("alice"))
    assert given_back(server) == 1
    assert await site.held(url) is None


# ----------------------------------------------------------------- what comes between


@pytest.mark.parametrize("who", ["housekeeping", "the page"])
async def test_grant_whose_time_is_over_is_given_back(
    chat: Site,
    server: AuthorizationServer,
    alice: Browser,
    monkeypatch: pytest.MonkeyPatch,
    who: str,
) -> None:
    """Nobody came with the code: the provider hears of it, once, and the link works."""
    clock = Clock(monkeypatch)
    url = await link(chat.pocket, **WHOSE)
    await chat.agreed(url, alice, at(None))
    code = await chat.code(url)
    assert await chat.attempts(lambda a: a.expire_held()) == 0
    clock.forward(3600)
    if who == "the page":
        assert await chat.held(url) is None
    else:
        assert await chat.attempts(lambda a: a.expire_held()) == 1
    assert given_back(server) == 1
    assert not await chat.pocket.confirm(url, code)

    async def left(engine: Any) -> int:
        stray = Hold(until=engine.vault.now())  # of an attempt that is gone
        await engine.vault.create(("held", "stray"), stray)
        assert await engine.attempts.expire_held() == 0
        return len((await engine.vault._backend.walk("held")).records)

    assert await chat.pocket._service.ask(left) == 0
    await chat.agreed(url, alice, at(None))
    assert await chat.pocket.confirm(url, await chat.code(url))
    assert given_back(server) == 1


@pytest.mark.parametrize("moment", ["before the link", "after it"])
@pytest.mark.parametrize("by", ["housekeeping", "a late answer"])
async def test_grant_of_a_replica_that_died_is_given_back_or_stays(
    make_site: Make,
    server: AuthorizationServer,
    alice: Browser,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
    by: str,
) -> None:
    """Dead before it was linked: given back. Dead right after: it is the owner's."""
    clock, storage = Clock(monkeypatch), f"sqlite:///{tmp_path}/p.db"
    site = make_site(storage, keys=KEYS, confirm="code")
    url = await link(site.pocket, **WHOSE)
    callback = await answer_url(alice, await site.begin(url, at(None)))
    await site.answer(callback, at(None))
    code = await site.code(url)
    clock.forward(590)

    async def dies(*_: Any) -> Any:
        raise asyncio.CancelledError

    lost = moment == "before the link"
    with monkeypatch.context() as broken:
        broken.setattr(*((Linking, "link") if lost else (Waiting, "end")), dies)
        with suppress(asyncio.CancelledError):
            await site.pocket.confirm(url, code)
    site.pocket.close()
    twins = [make_site(storage, keys=KEYS, confirm="code") for _ in range(2)]
    clock.forward(20)

    async def tidied() -> int:
        work = [twin.attempts(lambda a: a.expire_held()) for twin in twins]
        return sum(await asyncio.gather(*work))

    assert await tidied() == 0  # its time is over, but somebody may be at it
    clock.forward(3600)
    if by == "housekeeping":
        assert await tidied() == lost
    elif lost:
        with pytest.raises(ProviderError, match="exchange failed"):
            await twins[0].answer(callback, at(None))
    else:
        assert (await twins[0].answer(callback, at(None))).outcome == "again"
    assert await tidied() == 0
    assert given_back(server) == lost
    if lost:
        await twins[1].agreed(url, alice, at(None))
        assert await twins[1].pocket.confirm(url, await twins[1].code(url))
        return
    assert (await token(twins[1].pocket, **WHOSE)).access_token

    async def told() -> bool:
        return any(twin.told("connected") for twin in twins)

    await until(told)


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("held", [False, True])
async def test_grant_that_cannot_be_stored_is_not_lost(
    make_site: Make,
    server: AuthorizationServer,
    alice: Browser,
    monkeypatch: pytest.MonkeyPatch,
    held: bool,
    lasting: bool,
) -> None:
    """The store is away after the exchange: stored when it is back, or given back."""
    monkeypatch.setattr("langchain_pocket_auth._linking.PAUSES_S", (0.01, 0.02))
    store, away = Watched("memory://"), 2

    async def before(name: str, key: tuple[str, str]) -> None:
        nonlocal away
        if name in {"get", "put"} and '"session"' in key[1] and away:
            away -= 0 if lasting else 1
            raise StorageUnavailable("away")

    store.before = before
    settings = {"confirm": "code"} if held else {"verify_user": nobody}
    site = make_site(store, keys=KEYS, **settings)
    url = await link(site.pocket, *SIGNED, **WHOSE)

    async def connected() -> bool:
        result = await site.agreed(url, alice, at("alice"))
        if held:
            return await site.pocket.confirm(url, await site.code(url))
        return result.outcome == "connected"

    if not lasting:
        assert await connected()
        assert given_back(server) == 0
        return
    with pytest.raises(StorageUnavailable):
        await connected()
    assert given_back(server) == 1
    away = 0
    assert await connected()
    assert given_back(server) == 1


class Store(Watched):
    """A storage where others are faster, and whose answers are lost on the way."""

    refuses: Callable[[str], bool] | None = None
    forgets: Callable[[str], bool] | None = None

    async def put(self, key: tuple[str, str], value: bytes, **kwargs: Any) -> bool:
        name = f"{key[0]} {key[1]}"
        if self.refuses is not None and self.refuses(f"{name} {kwargs['ttl']}"):
            return False
        done = await super().put(key, value, **kwargs)
        if self.forgets is not None and self.forgets(f"{name} {kwargs['ttl']}"):
            self.forgets = None
            raise StorageUnavailable("the answer was lost")
        return done


@pytest.mark.parametrize("what", ["click", "answer", "grant", "code"])
async def test_too_many_writers_lose_no_grant(
    make_site: Make, server: AuthorizationServer, alice: Browser, what: str
) -> None:
    """Who cannot write down what they do has done nothing, or it is undone."""
    store = Store("memory://")
    site = make_site(store, keys=KEYS, confirm="code")
    url = await link(site.pocket, **WHOSE)
    if what == "click":
        store.refuses = lambda name: '"future"' in name
        with refusal("too_many"):
            await site.begin(url, at(None))
        return
    there = await answer_url(alice, await site.begin(url, at(None)))
    if what != "code":
        place = '"future"' if what == "answer" else "30 days"
        store.refuses = lambda name: place in name and not name.startswith("held")
        with pytest.raises(StorageError):
            await site.answer(there, at(None))
        store.refuses = None
        assert given_back(server) == 1
        assert await site.held(url) is None
        return
    await site.answer(there, at(None))
    code = await site.code(url)
    store.refuses = lambda name: name.startswith("attempt")
    with pytest.raises(StorageError, match="too many writers"):
        await site.pocket.confirm(url, code)
    # A mark that is left behind leads nowhere.
    store.refuses = lambda name: '"future"' in name
    for n in range(5):
        assert not await site.pocket.confirm(url, other(code.replace("-", ""), n))
    store.refuses = None
    assert given_back(server) == 1
    assert await site.held(url) is None
    await site.agreed(url, alice, at(None))
    assert await site.pocket.confirm(url, await site.code(url))


async def test_answer_of_the_store_may_be_lost_when_a_grant_is_kept(
    make_site: Make, server: AuthorizationServer, alice: Browser
) -> None:
    """It was stored all the same: that is looked up, and nothing is given back."""
    store = Store("memory://")
    site = make_site(store, keys=KEYS, confirm="code")
    url = await link(site.pocket, **WHOSE)
    there = await answer_url(alice, await site.begin(url, at(None)))
    store.forgets = lambda name: name.startswith("attempt") and "30 days" in name
    await site.answer(there, at(None))
    assert store.forgets is None
    assert given_back(server) == 0
    assert await site.pocket.confirm(url, await site.code(url))


async def test_code_is_used_once_however_often_it_comes(
    make_site: Make, server: AuthorizationServer, alice: Browser
) -> None:
    """Of several that come at once one connects; one for what is gone does not."""
    store = Store("memory://")
    site = make_site(store, keys=KEYS, confirm="code")
    url = await link(site.pocket, **WHOSE)
    await site.agreed(url, alice, at(None))
    code = await site.code(url)

    async def slow(name: str, key: tuple[str, str]) -> None:
        if key[0] == "attempt":
            await asyncio.sleep(0.02)

    store.before = slow
    at_once = [site.pocket.confirm(url, code) for _ in range(5)]
    assert sorted(await asyncio.gather(*at_once)) == [*[False] * 4, True]
    assert given_back(server) == 0
    url = await link(site.pocket, "more", **WHOSE)
    await site.agreed(url, alice, at(None))
    code = await site.code(url)

    async def erased(name: str, key: tuple[str, str]) -> None:
        if (name, key[0]) == ("put", "attempt"):
            await store.inner.delete(key)

    store.before = erased
    assert not await site.pocket.confirm(url, code)
    store.before = None
    # Nor does it stand in the way of the next.
    await site.agreed(url, alice, at(None))
    assert await site.pocket.confirm(url, await site.code(url))


async def test_grant_that_is_being_linked_is_not_given_back_for_a_newer_one(
    chat: Site, server: AuthorizationServer, alice: Browser, bob: Browser
) -> None:
    """The code of one tab comes while another tab agrees: the first is connected."""
    url, reached, go = await link(chat.pocket, **WHOSE), asyncio.Event(), []
    tabs = [await chat.begin(url, at("alice")) for _ in range(2)]
    await chat.answer(await answer_url(alice, tabs[0]), at("alice"))
    loop, link_it = asyncio.get_running_loop(), Linking.link

    async def waits(*args: Any) -> Result:
        loop.call_soon_threadsafe(reached.set)
        while not go:  # noqa: ASYNC110 - on another loop
            await asyncio.sleep(0.005)
        return await link_it(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Linking, "link", waits)
        code = await chat.code(url)
        first = asyncio.ensure_future(chat.pocket.confirm(url, code))
        await asyncio.wait_for(reached.wait(), 5)
        await chat.answer(await answer_url(bob, tabs[1]), at("alice"))
        go.append(True)
        assert await first
    assert given_back(server) == 0
    assert await state(chat.pocket, **WHOSE) == "SKIP_AUTH"


async def test_consent_of_an_owner_who_disconnects_meanwhile_is_given_back(
    make_site: Make, server: AuthorizationServer, alice: Browser
) -> None:
    """Their link is gone while the code is exchanged: so is what it brought."""
    store = Store("memory://")
    site = make_site(store, keys=KEYS, confirm="code")
    url = await link(site.pocket, **WHOSE)
    there = await answer_url(alice, await site.begin(url, at(None)))

    async def before(name: str, key: tuple[str, str]) -> None:
        if name == "put" and key[0] == "held":
            for each in await store.inner.list("user:alice"):
                await store.inner.delete(("user:alice", each))

    store.before = before
    with refusal("expired"):
        await site.answer(there, at(None))
    assert given_back(server) == 1


async def test_refused_upgrade_leaves_the_working_connection_alone(
    chat: Site, server: AuthorizationServer, alice: Browser, bob: Browser
) -> None:
    """Many providers end all that one person gave one app: only others' is given back."""
    url = await link(chat.pocket, *SIGNED, **WHOSE)
    await chat.agreed(url, alice, at(None))
    assert await chat.pocket.confirm(url, await chat.code(url))
    more = (*SIGNED, "write")
    url = await link(chat.pocket, *more, **WHOSE)
    for person, back in ((alice, 0), (bob, 1)):
        await chat.agreed(url, person, at(None))
        code = (await chat.code(url)).replace("-", "")
        for n in range(5):
            assert not await chat.pocket.confirm(url, other(code, n))
        assert given_back(server) == back
        assert await token(chat.pocket, *SIGNED, **WHOSE)
    # Agreed to in the end, with another account: that of before is not needed any more.
    await chat.agreed(url, bob, at(None))
    assert await chat.pocket.confirm(url, await chat.code(url))
    assert given_back(server) == 2
    assert await state(chat.pocket, *more, **WHOSE) == "SKIP_AUTH"


async def test_second_account_at_one_link_is_given_back(
    signed_in: Site, server: AuthorizationServer, alice: Browser, bob: Browser
) -> None:
    """The first success counts; what another tab brings is kept by nobody."""
    url = await link(signed_in.pocket, *SIGNED, **WHOSE)
    tabs = [await signed_in.begin(url, at("alice")) for _ in range(3)]
    for person, there, back in zip((alice, bob, alice), tabs, (0, 1, 1), strict=True):
        await signed_in.answer(await answer_url(person, there), at("alice"))
        assert given_back(server) == back
    context = await token(signed_in.pocket, *SIGNED, **WHOSE)
    assert context.account == "alice@users.test"  # type: ignore[attr-defined]


async def test_owner_chooses_in_their_own_browser_and_vouches_by_that(
    make_site: Make, server: AuthorizationServer, alice: Browser
) -> None:
    """Who chooses is compared like who starts; the choice is made once."""
    with Sites() as sites:
        serve = {"target": sites.serve_forever, "args": (0.01,)}
        threading.Thread(**serve, daemon=True).start()
        members = {"endpoint": sites.url, "members": {"site": "id"}}
        site = make_site(
            verify_user=nobody, confirm="code", facts={"account_lookup": members}
        )
        url, here = await link(site.pocket, **WHOSE), at("alice").browser or ""
        callback = await answer_url(alice, await site.begin(url, at("alice")))
        seen = Visitor(browser=here)
        assert (await site.answer(callback, seen)).outcome == "choose"
        sites.shutdown()

    async def choose(visitor: Visitor, choice: str = "c-2") -> Result:
        ticket = url.rpartition("/")[2]
        return await site.attempts(lambda a: a.choose(ticket, choice, visitor))

    for visitor, reason in [
        (at("alice", "another"), "mismatch"),
        (at("bob", here), "wrong_person"),
        (seen, "sign_in"),
    ]:
        with refusal(reason):
            await choose(visitor)
    with refusal("malformed"):
        await choose(at("alice"), "c-9")
    held = await site.held(url)
    assert held is not None
    assert [each.id for each in held.choices] == ["c-1", "c-2"]
    assert (await choose(at("alice"))).outcome == "held"
    with refusal("replayed"):
        await choose(at("alice"))
    assert await site.pocket.confirm(url, await site.code(url))
    assert given_back(server) == 0


async def test_link_that_runs_out_meanwhile_lets_the_owner_finish(
    make_site: Make, alice: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They agreed in time; only to begin anew is it too late."""
    clock = Clock(monkeypatch)
    site = make_site(verify_user=nobody, future_ttl=timedelta(minutes=5))
    url, here = await link(site.pocket, **WHOSE), at("alice").browser or ""
    callback = await answer_url(alice, await site.begin(url, at("alice")))
    clock.forward(240)
    await site.answer(callback, Visitor(browser=here))
    clock.forward(240)
    with refusal("expired"):
        await site.begin(url, at("alice"))
    assert (await site.vouch(url, at("alice"))).outcome == "connected"


async def test_flood_of_clicks_leaves_a_handful_of_attempts(
    signed_in: Site, alice: Browser
) -> None:
    """However often a link is opened, ten attempts of it are kept (A1 40)."""
    url = await link(signed_in.pocket, **WHOSE)
    first = await signed_in.begin(url, at("alice"))
    starts = [signed_in.begin(url, at("alice")) for _ in range(40)]
    started = await asyncio.gather(*starts, return_exceptions=True)
    refused = [each for each in started if isinstance(each, BaseException)]
    assert all(str(each).endswith("too_many") for each in refused)
    latest = await signed_in.begin(url, at("alice"))

    async def kept(engine: Any) -> int:
        page = await engine.vault._backend.walk("attempt", limit=1000)
        return len(page.records)

    assert await signed_in.pocket._service.ask(kept) <= 10
    with refusal("unknown"):
        await signed_in.answer(await answer_url(alice, first), at("alice"))
    done = await signed_in.answer(await answer_url(alice, latest), at("alice"))
    assert done.outcome == "connected"


async def test_disconnected_meanwhile_gives_back_what_waits(
    chat: Site, server: AuthorizationServer, alice: Browser
) -> None:
    """A grant whose owner has left is nobody's; its code opens nothing."""
    url = await link(chat.pocket, **WHOSE)
    await chat.agreed(url, alice, at(None))
    code = await chat.code(url)
    await chat.pocket.delete_session("acme", owner=ALICE)
    assert given_back(server) == 1
    assert not await chat.pocket.confirm(url, code)
