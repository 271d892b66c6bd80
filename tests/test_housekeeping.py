"""What is done now and then: bounded, without scans, and in nobody's way."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from conftest import free_port
from support import (
    KEYS,
    Clock,
    Watched,
    answer_url,
    connect,
    deliver,
    link,
    state,
    token,
    until,
)

from langchain_pocket_auth import (
    ConfigurationError,
    CredentialUnreadable,
    Event,
    Owner,
    PocketAuth,
    StorageUnavailable,
)
from langchain_pocket_auth._pauses import GATE
from langchain_pocket_auth.storage import Key, StorageBackend
from langchain_pocket_auth.storage.memory import MemoryBackend
from langchain_pocket_auth.testing import AuthorizationServer, Browser

Make = Callable[..., PocketAuth]
DAY = 86_400
OWNER = Owner("thread", "default")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The package's clock."""
    return Clock(monkeypatch)


@pytest.fixture
def store(clock: Clock) -> Watched:
    """A store on the same clock, whose calls can be seen and broken."""
    return Watched(
        MemoryBackend(clock=lambda: time.time() + clock.ahead.total_seconds())
    )


@pytest.fixture
def pocket(make_pocket: Make, store: Watched) -> PocketAuth:
    """A pocket that remembers nothing itself."""
    return make_pocket(store, keys=KEYS, session_cache_ttl=timedelta())


async def everything(store: StorageBackend) -> list[Key]:
    """Return the keys of all records."""
    return list((await store.walk()).records)


async def spaces(store: Watched) -> set[str]:
    """Return which namespaces there are."""
    return {namespace for namespace, _ in await everything(store.inner)}


# --------------------------------------------------------------------- in the background


async def test_it_begins_by_itself_survives_an_outage_and_ends_with_the_pocket(
    pocket: PocketAuth,
    store: Watched,
    alice: Browser,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Turns go on through an outage, which is told once; after closing there is none."""
    monkeypatch.setattr("langchain_pocket_auth._housekeeping.EVERY_S", 0.02)
    turns = 0

    async def before(name: str, key: Key) -> None:
        nonlocal turns
        if key[0] == "outbox":
            turns += 1
            if turns < 4:
                raise StorageUnavailable("the store is away")

    store.before = before
    with caplog.at_level(logging.WARNING):
        await connect(pocket, alice, "read")

        async def often() -> bool:
            return turns > 6

        await until(often)
        await pocket.aclose()
    assert [r.message for r in caplog.records if "housekeeping" in r.message] == [
        "housekeeping waits: the store is away"
    ]
    assert "used" in await spaces(store)
    before_ = turns
    await asyncio.sleep(0.1)
    assert turns == before_


async def test_the_first_turn_is_not_before_a_minute(pocket: PocketAuth) -> None:
    """A script that lives for seconds does nothing for nothing."""

    async def left_s(engine: Any) -> float:
        return engine.housekeeping._timer.when() - asyncio.get_running_loop().time()

    assert 59 < await pocket._service.ask(left_s) < 76


async def test_caller_of_a_turn_is_told_of_an_outage(
    pocket: PocketAuth, store: Watched
) -> None:
    """A cron job fails; it does not report that there was nothing to do."""
    await state(pocket, "read")

    async def before(_name: str, _key: Key) -> None:
        raise StorageUnavailable("the store is away")

    store.before = before
    with pytest.raises(StorageUnavailable):
        await pocket.housekeeping()


# --------------------------------------------------------------------- what is over


async def test_links_and_attempts_that_are_over_leave_the_store(
    pocket: PocketAuth, store: Watched, alice: Browser, clock: Clock
) -> None:
    """Futures, tickets and attempts are erased for good, a bounded number at a time."""
    await pocket.housekeeping()
    at_first = await spaces(store)
    for name in ("a", "b"):
        await answer_url(alice, await link(pocket, "read", owner=name))
    left = {"ticket", "attempt", "user:a", "user:b"}
    assert await spaces(store) == at_first | left
    clock.forward(9 * DAY)
    heap = store.inner._due  # what is expired, and still takes room
    assert len(heap) >= 6
    assert (await pocket.housekeeping())["expired"] == 6
    assert not heap
    assert await spaces(store) == at_first
    assert (await pocket.housekeeping())["expired"] == 0


async def test_lease_of_a_dead_process_ends_by_itself(
    pocket: PocketAuth,
    server: AuthorizationServer,
    store: Watched,
    alice: Browser,
    clock: Clock,
) -> None:
    """Nobody has to free what a process held that died: leases end on the store's clock."""
    await connect(pocket, alice, "read")
    server.fault(500, times=2, path="/revoke")
    await pocket.delete_session("acme")
    [name] = await store.inner.list("outbox")
    clock.forward(61)
    assert await store.inner.lease(("outbox", name), "dead", timedelta(seconds=60))
    assert (await pocket.housekeeping())["given_back"] == 0
    clock.forward(61)
    assert (await pocket.housekeeping())["given_back"] == 1


async def test_pauses_with_counts_outlive_what_can_be_resumed_and_then_go(
    pocket: PocketAuth, store: Watched, clock: Clock
) -> None:
    """A year after the last pause; those of gates, twice the life of a link."""

    async def write(engine: Any) -> None:
        await engine.pauses.recount("guarded", 0, 1)
        await engine.pauses.claim("gated", GATE, "run")

    await pocket._service.ask(write)
    clock.forward(13 * DAY)
    assert len(await store.inner.list("pause")) == 2
    clock.forward(2 * DAY)
    assert list(await store.inner.list("pause")) == ["guarded"]
    clock.forward(350 * DAY)
    assert await store.inner.list("pause")
    clock.forward(2 * DAY)
    assert not await store.inner.list("pause")


# -------------------------------------------------------------------------- last used


async def test_last_use_is_written_down_once_a_day_and_goes_with_the_session(
    pocket: PocketAuth, store: Watched, alice: Browser, clock: Clock
) -> None:
    """Not by the call, and not into the session, whose renewal would lose by it."""

    async def last_used() -> list[Any]:
        async def ask(engine: Any) -> list[Any]:
            found = await engine.connections.sessions(OWNER)
            used = await engine.last_used(key for key, _, _ in found)
            return list(used.values())

        return await pocket._service.ask(ask)

    await connect(pocket, alice, "read")
    today = (await pocket._service.ask(_now)).date()
    assert await last_used() == [today]
    assert "used" not in await spaces(store)
    sessions = await store.inner.list("thread:default")
    assert [(await pocket.housekeeping())["used"] for _ in range(2)] == [1, 0]
    assert await last_used() == [today]
    for _ in range(3):
        await token(pocket, "read")
        assert (await pocket.housekeeping())["used"] == 0
    assert await store.inner.list("thread:default") == sessions
    clock.forward(DAY)
    assert await last_used() == [today]
    await token(pocket, "read")
    assert (await pocket.housekeeping())["used"] == 1
    assert await last_used() == [today + timedelta(days=1)]
    await token(pocket, "read")
    await pocket.delete_session("acme")
    await pocket.housekeeping()
    assert "used" not in await spaces(store)


async def _now(engine: Any) -> Any:
    return engine.vault.now()


async def test_use_of_a_session_that_another_process_deleted_leaves_nothing(
    make_pocket: Make, store: Watched, alice: Browser, clock: Clock
) -> None:
    """What was marked before is not written down after."""
    base = f"http://127.0.0.1:{free_port()}"
    pockets = [make_pocket(Watched(store), keys=KEYS, base_url=base) for _ in "ab"]
    await connect(pockets[0], alice, "read")
    await pockets[1].delete_session("acme")
    assert (await pockets[0].housekeeping())["used"] == 0
    assert "used" not in await spaces(store)


async def test_marks_are_written_when_the_pocket_is_closed(
    pocket: PocketAuth, store: Watched, alice: Browser
) -> None:
    """A short-lived worker's use counts, too."""
    await connect(pocket, alice, "read")
    await pocket.aclose()
    assert "used" in await spaces(store)


# ---------------------------------------------------------------------- idle sessions


async def test_session_that_nobody_uses_ends_after_its_time_and_is_revoked(
    make_pocket: Make,
    server: AuthorizationServer,
    store: Watched,
    alice: Browser,
    clock: Clock,
) -> None:
    """Each use counts anew, to the day; it ends as if it were disconnected."""
    heard: list[Event] = []
    pocket = make_pocket(
        store,
        keys=KEYS,
        session_cache_ttl=timedelta(),
        session_idle_ttl=timedelta(days=30),
    )
    pocket.on_event(heard.append)
    server.refresh_token_ttl_s = 100 * DAY
    for name in ("busy", "idle"):
        await connect(pocket, alice, "read", owner=name)
    for _ in range(3):
        assert (await pocket.housekeeping())["idle"] == 0
        clock.forward(9 * DAY)
        await token(pocket, "read", owner="busy")
    buckets = [key for key in await everything(store.inner) if key[0][:5] == "idle:"]
    assert len(buckets) == 2
    assert "busy" not in repr(buckets)
    assert (await pocket.housekeeping())["idle"] == 0
    clock.forward(5 * DAY)
    assert (await pocket.housekeeping())["idle"] == 1
    assert await state(pocket, "read", owner="idle") == "NO_SESSION"
    assert await state(pocket, "read", owner="busy") != "NO_SESSION"
    assert server.revocations == 2

    async def told() -> bool:
        return [e.type for e in heard[-2:]] == ["revoked", "given_back"]

    await until(told)
    assert (heard[-2].owner.id, heard[-2].reason) == (
        "idle",
        "it was not used for too long",
    )
    clock.forward(30 * DAY)
    assert (await pocket.housekeeping())["idle"] == 1
    assert await state(pocket, "read", owner="busy") == "NO_SESSION"
    assert not {s for s in await spaces(store) if s.startswith(("idle", "used"))}


async def test_use_that_was_not_written_down_keeps_the_session(
    make_pocket: Make,
    server: AuthorizationServer,
    store: Watched,
    alice: Browser,
    clock: Clock,
) -> None:
    """A process that died before it wrote has renewed the token: that is a use."""
    server.refresh_token_ttl_s = 100 * DAY
    settings: dict[str, Any] = {"keys": KEYS, "session_idle_ttl": timedelta(days=30)}
    settings["base_url"] = f"http://127.0.0.1:{free_port()}"
    pocket, killed = (make_pocket(Watched(store), **settings) for _ in "ab")
    await connect(pocket, alice, "read")
    await pocket.housekeeping()
    clock.forward(20 * DAY)
    await token(killed, "read")
    clock.forward(15 * DAY)
    assert (await pocket.housekeeping())["idle"] == 0
    assert await state(pocket, "read") == "DO_REFRESH"
    clock.forward(20 * DAY)
    assert (await pocket.housekeeping())["idle"] == 1


async def test_many_idle_sessions_end_a_bounded_number_at_a_time(
    make_pocket: Make, store: Watched, clock: Clock
) -> None:
    """A bucket is looked through in pages, by several replicas; none ends twice."""
    settings = {"keys": KEYS, "session_idle_ttl": timedelta(days=1)}
    pockets = [make_pocket(Watched(store), **settings) for _ in range(2)]

    async def make(engine: Any) -> None:
        for n in range(250):
            await _idle_session(engine, Owner("user", f"u{n}"))
        await engine.usage.write()

    await pockets[0]._service.ask(make)
    clock.forward(3 * DAY)
    done = []
    while not done or sum(done[-1]):
        turns = await asyncio.gather(*(p.housekeeping() for p in pockets))
        done.append([turn["idle"] for turn in turns])
    assert sum(map(sum, done)) == 250


async def _idle_session(engine: Any, owner: Owner) -> None:
    from langchain_pocket_auth import OAuth2Context
    from langchain_pocket_auth._models import SessionKey
    from langchain_pocket_auth._vault import Session, Typed, entry_key

    key = SessionKey(owner, "nobody", "default", "nobody-oauth2")
    context = OAuth2Context(access_token="at", description="", expires_at=None)
    now = engine.vault.now()
    session = Session(context=Typed.of(context), scopes=[], obtained_at=now)
    await engine.vault.create(entry_key(Session, key), session)
    engine.usage.mark(key)


def test_idle_time_below_a_day_is_refused() -> None:
    """Days are what it is counted in."""
    with pytest.raises(ConfigurationError, match="one day"):
        PocketAuth(session_idle_ttl=timedelta(hours=5))


# ------------------------------------------------------- records of another version


async def foreign(engine: Any, key: Key) -> None:
    """Put a record of another version of the package in the place of one."""
    vault = engine.vault
    old = await vault._backend.get(key)
    version = old.version + 1 if old else secrets.randbits(50)
    value = vault._keys.seal(b'{"form": 2, "id": 7}', *key, str(version))
    expected = old.version if old else None
    put = vault._backend.put(key, value, version=version, expected=expected)
    assert await put


async def test_question_of_another_version_counts_as_expired(
    pocket: PocketAuth, store: Watched, alice: Browser
) -> None:
    """Old links and answers lead to their page, and a new link works."""
    url = await link(pocket, "read")
    callback = await answer_url(alice, url)
    old = [k for k in await everything(store.inner) if k[0] != "meta"]
    assert {k[0] for k in old} == {"ticket", "attempt", "thread:default"}
    for key in old:
        await pocket._service.ask(lambda e, k=key: foreign(e, k))
    assert await state(pocket, "read") == "NO_SESSION"
    assert (await deliver(url)).status_code in {404, 410}
    assert (await deliver(callback)).status_code in {404, 410}
    assert await link(pocket, "read") != url
    await connect(pocket, alice, "read")


async def test_pause_of_another_version_is_begun_anew(pocket: PocketAuth) -> None:
    """It can be written over, and nothing is counted in it."""

    async def work(engine: Any) -> tuple[Any, Any]:
        await foreign(engine, ("pause", "task"))
        empty = await engine.pauses.get("task")
        await engine.pauses.recount("task", 0, 1)
        return empty.counts, (await engine.pauses.get("task")).counts

    assert await pocket._service.ask(work) == ({}, {"0": 1})


async def test_session_of_another_version_is_no_missing_session(
    pocket: PocketAuth, store: Watched, alice: Browser
) -> None:
    """Nobody is asked to consent again because of a deployment."""
    await connect(pocket, alice, "read")
    [name] = [n for n in await store.inner.list("thread:default") if "session" in n]
    await pocket._service.ask(lambda e: foreign(e, ("thread:default", name)))
    with pytest.raises(CredentialUnreadable, match="does not fit this version"):
        await state(pocket, "read")
