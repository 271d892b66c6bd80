"""What persons and apps see of connections, how they end, and what is told of it."""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from conftest import ACME, call, provider, says
from fastapi import Request
from graphs import SYNC, Work, ask, build, thread
from support import (
    KEYS,
    Clock,
    Watched,
    answer_url,
    asks,
    connect,
    deliver,
    link,
    on,
    outcome_of,
    state,
    token,
    until,
)

from langchain_pocket_auth import (
    AuthorizationRequired,
    ConfigurationError,
    Connection,
    ConnectionHealth,
    Event,
    Owner,
    OwnerUnknown,
    PocketAuth,
    StorageUnavailable,
    pending_authorizations,
)
from langchain_pocket_auth._cards import plain
from langchain_pocket_auth._seal import KeyRing
from langchain_pocket_auth.server._pages import SECURITY_HEADERS
from langchain_pocket_auth.testing import (
    AuthorizationServer,
    Browser,
    LeakWatch,
    assert_no_leak,
)
from langchain_pocket_auth.testing._html import read_page
from langchain_pocket_auth.testing._navigation import posted

Make = Callable[..., PocketAuth]
SIGNED = ("openid", "email")
MARKUP = """<script>alert("1")</script>'"""
ALICE = "alice@users.test"


@pytest.fixture
def bob() -> Browser:
    """Another person with a browser."""
    return Browser("bob")


ME = Owner("user", "me")


def signed_in(request: Request) -> str | None:
    """Say who is signed in, as an app with a session cookie would."""
    return request.cookies.get("user")


def signs_in(browser: Browser, who: str | None = None) -> Browser:
    """Sign a person in to the app."""
    browser.cookies.set("user", who or browser.username, domain="127.0.0.1")
    return browser


def told(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """Return what the audit log says."""
    records = [r for r in caplog.records if r.name == "langchain_pocket_auth.audit"]
    return [record.pocket_auth for record in records]  # type: ignore[attr-defined]


# ---------------------------------------------------------------------- the list


async def test_connections_are_listed_without_their_secrets(
    make_pocket: Make, server: AuthorizationServer, alice: Browser
) -> None:
    """Each with whose it is, what was granted, since when, and how it stands."""
    before = datetime.now(UTC)
    pocket = make_pocket(owner="alice")
    assert await pocket.connections() == []
    for profile in ("work", "default"):
        await connect(pocket, alice, "read", owner="alice", profile=profile)
    await connect(pocket, alice, *SIGNED, provider="zeta", owner="alice")
    found = await pocket.connections()
    assert [(c.display_name, c.profile, c.account, c.scopes) for c in found] == [
        ("Acme", "default", None, ("read",)),
        ("Acme", "work", None, ("read",)),
        ("Zeta", "default", ALICE, SIGNED),
    ]
    for each in found:
        assert isinstance(each, Connection)
        assert each.owner == Owner("user", "alice")
        assert (each.health, each.reason) == (ConnectionHealth.OK, None)
        assert each.connected_at is not None
        assert each.expires_at is not None
        assert before < each.connected_at < datetime.now(UTC) < each.expires_at
    assert len({each.id for each in found}) == 3
    assert [c.id for c in await pocket.connections("alice")] == [c.id for c in found]
    assert await pocket.connections("bob") == []
    assert await pocket.connections(Owner("app", "app")) == []
    shown = [*map(repr, found), *(c._repr_html_() for c in found)]
    assert ALICE in shown[-1]
    secrets = [*server.issued_access_tokens, *server.issued_refresh_tokens]
    assert_no_leak(secrets, shown)


async def test_since_when_outlives_renewals_and_further_permissions(
    pocket: PocketAuth,
    server: AuthorizationServer,
    alice: Browser,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first consent counts, until the connection is ended."""
    clock = Clock(monkeypatch)
    await connect(pocket, alice, "read")
    [first] = await pocket.connections()
    clock.forward(server.access_token_ttl_s)
    await token(pocket, "read")
    await connect(pocket, alice, "read", "write")
    [later] = await pocket.connections()
    assert (later.id, later.connected_at) == (first.id, first.connected_at)
    assert later.scopes == ("read", "write")
    await pocket.disconnect(later)
    await connect(pocket, alice, "read")
    [again] = await pocket.connections()
    assert again.id == first.id
    assert again.connected_at is not None
    assert first.connected_at is not None
    assert again.connected_at > first.connected_at


async def test_health_says_whether_the_person_is_needed(
    make_pocket: Make,
    server: AuthorizationServer,
    alice: Browser,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Renewable or not, withdrawn, run out, the app registered anew or not at all."""
    clock, store = Clock(monkeypatch), f"sqlite:///{tmp_path}/p.db"
    pocket = make_pocket(store, keys=KEYS)

    async def health(of: PocketAuth = pocket) -> tuple[str, bool]:
        [found] = await of.connections()
        return found.health.value, bool(found.reason)

    await connect(pocket, alice, "read")
    clock.forward(server.access_token_ttl_s)
    assert await health() == ("ok", False)
    server.fault("invalid_grant", grant_type="refresh_token")
    with pytest.raises(AuthorizationRequired):
        await token(pocket, "read")
    assert await health() == ("needs_reconnect", True)
    await pocket.disconnect("acme")

    server.fault("mutate", drop=["refresh_token"])
    await connect(pocket, alice, "read")
    assert await health() == ("expiring", True)
    clock.forward(server.access_token_ttl_s)
    assert await health() == ("needs_reconnect", True)

    await connect(pocket, alice, "read")
    rows = [provider(server, "acme")]
    for clients in ({}, {"acme": ("other-client", "secret")}):
        other = PocketAuth(store, keys=KEYS, providers=rows, clients=clients)
        assert await health(other) == ("needs_reconnect", True)
        await other.aclose()
    unknown = PocketAuth(store, keys=KEYS)
    assert await health(unknown) == ("needs_reconnect", True)
    # Which cannot be told to the provider, and is gone here all the same.
    assert await unknown.disconnect("acme")
    await unknown.aclose()
    assert await pocket.connections() == []


async def test_record_that_does_not_open_is_listed_and_can_be_disconnected(
    make_pocket: Make, alice: Browser, tmp_path: Path
) -> None:
    """It breaks neither the list nor the others."""
    path = tmp_path / "p.db"
    pocket = make_pocket(f"sqlite:///{path}", keys=KEYS, verify_user=lambda: ME)
    for name in ("acme", "zeta"):
        await connect(pocket, alice, "read", provider=name, owner=ME)
    with sqlite3.connect(path) as database:
        database.execute(
            "UPDATE pocket_auth_records SET version = version + 1 "
            """WHERE name LIKE '["session", "acme"%'"""
        )
    database.close()
    broken, fine = await pocket.connections(ME)
    assert (broken.provider, broken.health) == ("acme", "unreadable")
    assert broken.reason
    assert fine.health == "ok"
    page = await deliver(f"{pocket.base_url}/connections")
    assert page.status_code == 200
    assert await pocket.disconnect(broken)
    assert await pocket.connections(ME) == [fine]


# ------------------------------------------------------------------- disconnecting


@pytest.mark.parametrize("by", ["connection", "id", "provider"])
async def test_disconnecting_ends_it_here_and_at_the_provider(
    make_pocket: Make, server: AuthorizationServer, alice: Browser, by: str
) -> None:
    """Once; a cached context is not handed out any more; the rest stays."""
    pocket = make_pocket(session_cache_ttl=timedelta(minutes=1))
    for profile in ("default", "work"):
        await connect(pocket, alice, "read", profile=profile)
    await connect(pocket, alice, "read", provider="zeta")
    [mine, work, other] = await pocket.connections()
    name: Any = {"connection": mine, "id": mine.id, "provider": "acme"}[by]
    assert not await pocket.disconnect(mine.id, owner="bob")
    assert not await pocket.disconnect(name, profile="none")
    assert await pocket.disconnect(name, profile="default")
    assert not await pocket.disconnect(name, profile="default")
    assert await pocket.connections() == [work, other]
    assert server.revocations == 2
    assert await state(pocket, "read") == "NO_SESSION"
    assert await state(pocket, "read", provider="zeta") == "SKIP_AUTH"
    assert not await pocket.disconnect("nothing")


async def test_disconnecting_a_provider_ends_all_its_profiles_and_links(
    pocket: PocketAuth, server: AuthorizationServer, alice: Browser
) -> None:
    """A consent that is under way stores nothing afterwards."""
    for profile in ("default", "work"):
        await connect(pocket, alice, "read", profile=profile)
    callback = await answer_url(alice, await link(pocket, "read", profile="third"))
    assert await pocket.disconnect("acme")
    assert (await deliver(callback)).status_code == 410
    assert await pocket.connections() == []
    # The third was never given a token.
    assert [grant.revoked for grant in server._grants] == [True, True, False]


async def test_grant_stored_while_it_is_disconnected_does_not_stay(
    make_pocket: Make, server: AuthorizationServer, alice: Browser
) -> None:
    """Whoever is second sees what the first did: nothing is left, the grant is dead."""
    store = Watched("memory://")
    pocket = make_pocket(store)
    callback = await answer_url(alice, await link(pocket, "read"))

    async def at_the_last_moment(name: str, key: Any) -> None:
        if name == "put" and key[1].startswith('["session"'):
            store.before = None
            assert not await pocket._service.ask(
                lambda e: e.disconnect(Owner("thread", "default"), "acme", None)
            )

    store.before = at_the_last_moment
    assert (await deliver(callback)).status_code == 410
    assert await pocket.connections() == []
    await until(lambda: asyncio.sleep(0, all(g.revoked for g in server._grants)))


# ------------------------------------------------------------------------ forgetting


async def everything(store: Watched, *texts: str) -> list[str]:
    """Return where one of the texts stands in a store, opened: keys and records."""
    ring, found, after = KeyRing.parse(KEYS), [], None
    while True:
        page = await store.inner.walk(after=after)
        for key, record in page.records.items():
            opened = ring.open(record.value, *key, str(record.version)).decode()
            if any(text in "".join(key) + opened for text in texts):
                found.append(f"{key}: {opened}")
        if (after := page.after) is None:
            return found


async def test_nothing_of_a_forgotten_person_is_left(
    make_pocket: Make,
    server: AuthorizationServer,
    alice: Browser,
    bob: Browser,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sessions, links, attempts, paused runs; revoked first; others keep theirs."""
    clock, store, who = Clock(monkeypatch), Watched("memory://"), "alice-4711"
    pocket = make_pocket(
        store,
        keys=KEYS,
        owner=who,
    )
    events: list[Event] = []
    pocket.on_event(events.append)
    await connect(pocket, alice, *SIGNED, owner=who)
    await connect(pocket, bob, "read", owner="bob")
    # A consent that waits, an older link that it took the place of, and a paused run.
    await alice.avisit(await link(pocket, "read", owner=who), approve=False)
    under_way = await answer_url(alice, await link(pocket, "read", owner=who))
    work = Work(SYNC)
    script = [says(call("look", text="x"))]
    graph, _ = build("create_agent", pocket, [work.tool("look", "zeta")], script)
    config = thread(f"of-{who}", user_id=who)
    paused = await asyncio.to_thread(ask, graph, SYNC, config)
    [pending] = pending_authorizations(paused)
    assert len(await everything(store, who, ALICE)) >= 8

    server.fault(503, times=9, path="/revoke")
    forgotten = await pocket.forget(who)
    assert (forgotten.connections, forgotten.links) == (1, 2)
    assert forgotten.attempts >= 2
    assert forgotten.pauses == 1
    assert await pocket.connections(who) == []
    # What the provider has yet to be told is all that is left, and goes when it is.
    left = await everything(store, who, ALICE)
    assert len(left) == 1
    server.clear_faults()
    clock.forward(600)
    assert (await pocket.housekeeping())["given_back"] == 1
    assert await everything(store, who, ALICE) == []
    # The second was never given a token.
    assert [g.revoked for g in server._grants if g.username == "alice"] == [True, False]

    for url in (under_way, pending.url):
        assert (await deliver(url)).status_code in {404, 410}
    assert await everything(store, who, ALICE) == []
    assert await state(pocket, "read", owner="bob") == "SKIP_AUTH"

    async def heard() -> bool:
        return any(event.type == "forgotten" for event in events)

    await until(heard)
    again = await pocket.forget(who)
    assert (again.connections, again.links, again.attempts, again.pauses) == (0,) * 4


async def test_grant_that_waits_for_its_code_is_given_back_when_forgotten(
    make_pocket: Make, server: AuthorizationServer, alice: Browser
) -> None:
    """It is nobody's yet, and belongs to the person's data all the same."""
    store, who = Watched("memory://"), "alice-4711"
    pocket = make_pocket(store, keys=KEYS, confirm="code")
    page = await alice.avisit(await link(pocket, *SIGNED, owner=who))
    assert outcome_of(page) == "code"
    assert len(await everything(store, who, ALICE)) >= 3
    forgotten = await pocket.forget(who)
    assert (forgotten.connections, forgotten.links, forgotten.attempts) == (0, 1, 1)
    assert [grant.revoked for grant in server._grants] == [True]
    assert await everything(store, who, ALICE) == []


async def test_forgetting_is_not_done_by_halves(
    make_pocket: Make, alice: Browser
) -> None:
    """An outage is told, and the second try finishes."""
    store = Watched("memory://")
    pocket = make_pocket(store)
    await connect(pocket, alice, "read", owner="alice")

    async def down(name: str, _: Any) -> None:
        if name == "walk":
            raise StorageUnavailable("down")

    store.before = down
    with pytest.raises(StorageUnavailable):
        await pocket.forget("alice")
    store.before = None
    await pocket.forget("alice")
    assert await pocket.connections("alice") == []
    with pytest.raises(OwnerUnknown):
        await pocket.forget("")


# ----------------------------------------------------------------------- whose it is

SPEC = {
    "check": lambda p, r, **w: p.check(r, **on(**w)),
    "prepare": lambda p, r, **w: p.prepare(r, **on(**w)),
    "authenticate": lambda p, r, **w: p.authenticate(r, timeout=0, **on(**w)),
    "get_auth_context": lambda p, _, **w: p.get_auth_context("acme", **w),
    "list_session_state": lambda p, _, **w: p.list_session_state(**w),
    "delete_session": lambda p, _, **w: p.delete_session("acme", **w),
    "connections": lambda p, _, **w: p.connections(**w),
    "disconnect": lambda p, _, **w: p.disconnect("acme", **w),
    "wait_connected": lambda p, _, **w: p.wait_connected("acme", timeout=0, **w),
}


async def test_where_many_are_served_nobody_is_the_default(make_pocket: Make) -> None:
    """Every method wants to be told whose connection is meant (rule 35)."""
    pocket = make_pocket(verify_user=signed_in)
    request = asks(pocket)
    for name, method in SPEC.items():
        with pytest.raises(OwnerUnknown):
            await method(pocket, request)
        try:
            await method(pocket, request, owner="alice")
        except AuthorizationRequired:
            assert name in {"authenticate", "wait_connected"}
    assert await pocket.check(request, **on(thread_id="1"))
    with pytest.raises(ConfigurationError):
        await pocket.connections()


# ---------------------------------------------------------------------- what is told


async def test_life_of_a_connection_is_in_the_audit_log(
    make_pocket: Make,
    server: AuthorizationServer,
    alice: Browser,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One record each, which a program can read, and no secret, state or link in it."""
    clock = Clock(monkeypatch)
    caplog.set_level(logging.INFO, "langchain_pocket_auth.audit")
    owner = "alice\nforged: \x1b[2J"
    server.id_token_claims = {"email": "alice\n@\x1b[31musers.test"}
    pocket = make_pocket()
    watch, who = LeakWatch(), {"owner": owner}
    with watch:
        url = await link(pocket, *SIGNED, **who)
        refused = await answer_url(alice, url, approve=False)
        await deliver(refused)
        callback = await answer_url(alice, await link(pocket, *SIGNED, **who))
        await deliver(callback)
        clock.forward(server.access_token_ttl_s)
        await token(pocket, *SIGNED, **who)
        server.fault("invalid_grant", grant_type="refresh_token")
        clock.forward(server.access_token_ttl_s)
        with pytest.raises(AuthorizationRequired):
            await token(pocket, *SIGNED, **who)
        [broken] = await pocket.connections(owner)
        await pocket.disconnect(broken)
        await pocket.forget(owner)
    lines = told(caplog)
    assert [line["type"] for line in lines] == [
        "declined",
        "connected",
        "refreshed",
        "needs_reconnect",
        "revoked",
        "given_back",
        "forgotten",
    ]
    by_type = {line["type"]: line for line in lines}
    connected = json.loads(json.dumps(by_type["connected"]))
    assert connected.pop("time").endswith("+00:00")
    assert connected == {
        "type": "connected",
        "owner": {"kind": "user", "id": plain(owner)},
        "provider": "acme",
        "profile": "default",
        "handler": "acme-oauth2",
        "scopes": list(SIGNED),
        "thread_ids": [],
        "account": "alice@[31musers.test",
        "reason": None,
    }
    accounts = [line["account"] for line in lines]
    assert accounts == [None, *[broken.account] * 5, None]
    assert by_type["needs_reconnect"]["reason"]
    text = json.dumps(lines, ensure_ascii=False)
    assert "\\n" not in text
    assert "\\u001b" not in text
    for record in caplog.records:
        if record.name == "langchain_pocket_auth.audit":
            assert record.levelno == logging.INFO
            assert record.getMessage() == f"pocket-auth: {record.pocket_auth['type']}"  # type: ignore[attr-defined]
    secrets = [
        *server.issued_access_tokens,
        *server.issued_refresh_tokens,
        *server.issued_codes,
        url.rpartition("/")[2],
        ACME[1],
    ]
    watch.assert_clean(secrets, text)


# ---------------------------------------------------------------------- the page


class Shown(HTMLParser):
    """What a page shows, and whether its elements are well nested."""

    def __init__(self, page: httpx.Response) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page.text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in {"meta", "input"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "title"} & {*self.open}:
            self.words += data.split()

    @property
    def text(self) -> str:
        """All that a person reads, with single spaces."""
        return " ".join(self.words)


def press(
    browser: Browser, page: httpx.Response, do: str, number: int = 0, **changed: str
) -> httpx.Response:
    """Press one of the buttons of that kind; redirects are not followed."""
    forms = [f for f in read_page(page.text).forms if f.buttons[0].value == do]
    form = forms[number]
    data = {**form.fields, "do": do, **changed}
    return browser._load(posted(form, form.buttons[0], data, page))


def seen(browser: Browser, pocket: PocketAuth) -> httpx.Response:
    """Open the page."""
    page = browser.open(f"{pocket.base_url}/connections")
    assert page.status_code == 200, outcome_of(page)
    return page


@pytest.fixture
def many(make_pocket: Make, server: AuthorizationServer) -> Iterator[PocketAuth]:
    """A pocket of an app to which persons sign in, and which tells accounts."""
    return make_pocket(
        "memory://",
        keys=KEYS,
        verify_user=signed_in,
        app_name="The app",
    )


async def test_each_person_sees_and_ends_only_their_own(
    many: PocketAuth, server: AuthorizationServer, alice: Browser, bob: Browser
) -> None:
    """Bob's page has nothing of Alice's, and her connection's id is nothing to him."""
    for person in (alice, bob):
        signs_in(person)
        who = {"owner": person.username}
        await connect(many, person, *SIGNED, **who)
    [hers], [his] = await many.connections("alice"), await many.connections("bob")
    pages = [await asyncio.to_thread(seen, p, many) for p in (alice, bob)]
    assert ALICE in pages[0].text
    assert hers.id in pages[0].text
    for text in ("alice", hers.id):
        assert text not in pages[1].text
    assert his.id in pages[1].text
    assert all(name in pages[0].headers for name in SECURITY_HEADERS)

    forged = {"connection": hers.id}
    for _ in range(2):
        answer = await asyncio.to_thread(press, bob, pages[1], "disconnect", **forged)
        assert answer.status_code == 303
        assert answer.headers["location"] == f"{many.base_url}/connections"
    assert await many.connections("alice") == [hers]
    assert server.revocations == 0

    answer = await asyncio.to_thread(press, alice, pages[0], "disconnect")
    assert (answer.status_code, await many.connections("alice")) == (303, [])
    after = await asyncio.to_thread(seen, alice, many)
    assert "No account is connected." in Shown(after).text
    # The back button: the page of before does nothing any more.
    answer = await asyncio.to_thread(press, alice, pages[0], "disconnect")
    assert answer.status_code == 303
    assert await many.connections("bob") == [his]

    async def revoked() -> bool:
        return [g.revoked for g in server._grants] == [True, False]

    await until(revoked)


async def test_nobody_signed_in_sees_nothing(many: PocketAuth, alice: Browser) -> None:
    """Neither the page nor its buttons are for strangers."""
    signs_in(alice)
    await connect(many, alice, "read", owner="alice")
    page = await asyncio.to_thread(seen, alice, many)
    alice.cookies.delete("user")
    shown = await asyncio.to_thread(alice.open, f"{many.base_url}/connections")
    assert shown.status_code in {401, 403}
    assert "Acme" not in shown.text
    answer = await asyncio.to_thread(press, alice, page, "disconnect")
    assert answer.status_code in {401, 403}
    assert len(await many.connections("alice")) == 1


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "cross-site", "Origin": "https://evil.example"},
        {"Sec-Fetch-Site": "same-site", "Origin": "null"},
        {"Origin": "https://evil.example"},
    ],
    ids=["other site", "other port", "old browser"],
)
async def test_button_on_another_site_does_nothing(
    pocket: PocketAuth, alice: Browser, headers: dict[str, str]
) -> None:
    """The person's browser comes along, their will does not (rule 15)."""
    await connect(pocket, alice, "read")
    [mine] = await pocket.connections()
    form = {"connection": mine.id, "do": "disconnect"}
    url = f"{pocket.base_url}/connections"
    answer = await deliver(url, method="POST", data=form, headers=headers)
    assert (answer.status_code, outcome_of(answer)) == (403, "mismatch")
    assert await pocket.connections() == [mine]


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"connection": "x"},
        {"connection": "x", "do": "anything"},
        {"connection": "x", "do": "disconnect", "owner": "bob"},
        {"connection": ["x", "y"], "do": "disconnect"},
        {"connection": "x" * 9000, "do": "disconnect"},
    ],
    ids=["empty", "half", "other verb", "more", "twice", "oversized"],
)
async def test_form_that_is_not_ours_is_refused(
    pocket: PocketAuth, form: dict[str, Any]
) -> None:
    """It changes nothing and is not shown again."""
    await pocket.serve()
    url = f"{pocket.base_url}/connections"
    answer = await deliver(url, method="POST", data=form)
    assert (answer.status_code, outcome_of(answer)) == (400, "malformed")
    assert "xxx" not in answer.text


async def test_revoked_grant_is_reconnected_from_the_page(
    make_pocket: Make,
    server: AuthorizationServer,
    alice: Browser,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same question, for all that was granted, and its answer makes it healthy."""
    clock, pocket = Clock(monkeypatch), make_pocket(verify_user=lambda: ME)
    await connect(pocket, alice, "read", "write", profile="work", owner=ME)
    [before] = await pocket.connections(ME)
    page = await asyncio.to_thread(seen, alice, pocket)
    assert "reconnect" not in Shown(page).text.lower()
    for grant in server._grants:
        grant.revoked = True
    clock.forward(server.access_token_ttl_s)
    with pytest.raises(AuthorizationRequired):
        await token(pocket, "read", profile="work", owner=ME)
    [broken] = await pocket.connections(ME)
    assert (broken.id, broken.health) == (before.id, "needs_reconnect")
    page = await asyncio.to_thread(seen, alice, pocket)
    links = set()
    for _ in range(2):
        answer = await asyncio.to_thread(press, alice, page, "reconnect")
        assert answer.status_code == 303
        links.add(answer.headers["location"])
    [url] = links
    assert "/connect/" in url
    assert outcome_of(await alice.avisit(url)) == "connected"
    [after] = await pocket.connections(ME)
    assert (after.id, after.health) == (before.id, "ok")
    assert after.scopes == ("read", "write")
    assert after.connected_at == before.connected_at
    assert await state(pocket, "read", "write", profile="work", owner=ME) == "SKIP_AUTH"


async def test_connection_that_runs_out_is_reconnected_before_it_does(
    make_pocket: Make, server: AuthorizationServer, alice: Browser
) -> None:
    """Although it works still, and goes on working until the new one is there."""
    pocket = make_pocket(verify_user=lambda: ME)
    server.fault("mutate", drop=["refresh_token"])
    first = await connect(pocket, alice, "read", owner=ME)
    page = await asyncio.to_thread(seen, alice, pocket)
    answer = await asyncio.to_thread(press, alice, page, "reconnect")
    assert (await token(pocket, "read", owner=ME)).access_token == first.access_token
    assert outcome_of(await alice.avisit(answer.headers["location"])) == "connected"
    [after] = await pocket.connections(ME)
    assert after.health == "ok"
    assert (await token(pocket, "read", owner=ME)).access_token != first.access_token


async def test_what_others_named_is_shown_as_text(
    make_pocket: Make, server: AuthorizationServer, alice: Browser
) -> None:
    """Account, owner, profile and app cannot add an element or leave an attribute."""
    server.id_token_claims = {"email": MARKUP}
    pocket = make_pocket(verify_user=lambda: MARKUP, app_name=MARKUP)
    await connect(pocket, alice, *SIGNED, owner=MARKUP, profile=MARKUP)
    [found] = await pocket.connections(MARKUP)
    assert found.account == MARKUP
    assert "<script" not in found._repr_html_()
    page = await asyncio.to_thread(seen, alice, pocket)
    shown = Shown(page)
    assert "<script" not in page.text
    assert shown.text.count(MARKUP) >= 5
    assert not {tag for tag, _ in shown.elements} & {"script", "img", "a", "base"}
    names = {name for _, attributes in shown.elements for name in attributes}
    assert not {name for name in names if name.startswith("on")}
    policy = page.headers["content-security-policy"]
    assert "script-src" not in policy
    assert "unsafe" not in policy


async def test_page_is_there_where_it_is_known_who_comes(
    make_pocket: Make, alice: Browser
) -> None:
    """A port of 127.0.0.1 is every user's of a machine: without a check there is none."""
    others = [{}, {"owner": "ann"}, {"confirm": "code", "owner": "ann"}]
    for settings, status in [({"verify_user": lambda: ME}, 200)] + [
        (each, 404) for each in others
    ]:
        pocket = make_pocket(**settings)
        await pocket.serve()
        url = f"{pocket.base_url}/connections"
        form = {"connection": "x", "do": "disconnect"}
        answers = [await deliver(url), await deliver(url, method="POST", data=form)]
        assert [a.status_code for a in answers] == [
            status,
            303 if status == 200 else 404,
        ]
    ann = make_pocket(verify_user=lambda: "ann")
    await connect(ann, alice, "read", owner="ann")
    page = await asyncio.to_thread(seen, alice, ann)
    assert "For ann" in Shown(page).text
    strange = {"Host": "evil.example"}
    url = f"{ann.base_url}/connections"
    assert (await deliver(url, headers=strange)).status_code == 421
    for method in ("HEAD", "OPTIONS", "PUT", "DELETE"):
        assert (await deliver(url, method=method)).status_code == 405
    ahead = {"Sec-Purpose": "prefetch"}
    assert (await deliver(url, headers=ahead)).status_code == 204
    assert await ann.connections("ann")


async def test_page_is_complete_without_scripts_and_for_screen_readers(
    make_pocket: Make, alice: Browser
) -> None:
    """A list with headings; every button says what it does, to which account."""
    pocket = make_pocket(verify_user=lambda: ME)
    for profile in ("default", "work"):
        await connect(pocket, alice, "read", profile=profile, owner=ME)
    page = await asyncio.to_thread(seen, alice, pocket)
    shown = Shown(page)
    kinds = [tag for tag, _ in shown.elements]
    assert (kinds.count("h1"), kinds.count("h2"), kinds.count("main")) == (1, 2, 1)
    assert kinds.count("details") == kinds.count("summary") == kinds.count("form") == 2
    assert ("html", {"lang": "en"}) in shown.elements
    buttons = [b for f in read_page(page.text).forms for b in f.buttons]
    labels = {" ".join(button.text.split()) for button in buttons}
    assert labels == {"Yes, disconnect Acme", "Yes, disconnect Acme (work)"}
    # Asked before anything happens, and the heading's day is a person's.
    today = datetime.now(UTC)
    assert f"Connected since {today.day} {today:%b %Y}" in shown.text
    assert urlsplit(str(page.url)).query == ""
