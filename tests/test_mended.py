"""What was found when the stores, the outbox and the renewals were attacked."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conftest import ACME, free_port, provider
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

from langchain_pocket_auth import Owner, PocketAuth, StorageUnavailable
from langchain_pocket_auth.storage import Key
from langchain_pocket_auth.testing import AuthorizationServer, Browser

if TYPE_CHECKING:
    from databases import Redis

Make = Callable[..., PocketAuth]
REVOKE = {"path": "/revoke"}
MINUTE, HOUR, DAY = 60, 3600, 86_400
OWNER = Owner("thread", "default")
KEY = ("a", "b")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The package's clock."""
    return Clock(monkeypatch)


@pytest.fixture
def store() -> Watched:
    """A store whose calls can be seen and broken."""
    return Watched("memory://")


@pytest.fixture
def pocket(make_pocket: Make, store: Watched) -> PocketAuth:
    """A pocket that remembers nothing itself."""
    return make_pocket(store, keys=KEYS, session_cache_ttl=timedelta())


# 1 (test_redis.py; needs `Redis` there) ----------------------------------------------


async def test_failover_while_a_token_is_renewed_loses_nothing(
    make_pocket: Make,
    server: AuthorizationServer,
    alice: Browser,
    clock: Clock,
    redis_server: Redis,
) -> None:
    """A primary that becomes a replica is an outage: the rotated token is kept."""
    store = Watched(redis_store(redis_server))
    pocket = make_pocket(store, keys=KEYS, session_cache_ttl=timedelta())
    await connect(pocket, alice, "read")
    with redis_server.client() as client:

        async def demoted(name: str, key: Key) -> None:
            if name == "put" and '"session"' in key[1]:
                client.replicaof("127.0.0.1", free_port())
                store.before = None

        store.before = demoted
        clock.forward(HOUR + 1)
        try:
            renewing = asyncio.create_task(token(pocket, "read"))
            await asyncio.sleep(0.3)
        finally:
            client.replicaof("NO", "ONE")
    renewed = await asyncio.wait_for(renewing, 10)
    assert not server.find_token(renewed.access_token).is_revoked()
    clock.forward(HOUR + 1)
    await token(pocket, "read")
    assert not any(grant.revoked for grant in server._grants)


def redis_store(redis_server: Redis) -> Any:
    """Return an empty store."""
    from langchain_pocket_auth.storage import storage_from_url

    return storage_from_url(redis_server.url(redis_server.fresh()))


# 2 (test_outbox.py) --------------------------------------------------------------------


async def test_answer_to_a_deleted_question_does_not_end_what_came_after(
    make_pocket: Make,
    server: AuthorizationServer,
    store: Watched,
    alice: Browser,
    clock: Clock,
) -> None:
    """What could not be given back at once is of the account that is in use by then."""
    base, scopes = f"http://127.0.0.1:{free_port()}", ("openid", "read")
    row = provider(server, "open", jwks_uri=server.jwks_uri)
    pocket = make_pocket(
        store, keys=KEYS, base_url=base, providers=[row], clients={"open": ACME}
    )
    server.register(
        client_id=ACME[0],
        client_secret=ACME[1],
        redirect_uris=[f"{base}/auth/open/oauth2/callback"],
    )
    callback = await answer_url(alice, await link(pocket, *scopes, provider="open"))
    server.fault("slow", delay_s=0.3)
    server.fault(500, times=2, **REVOKE)
    answering = asyncio.create_task(deliver(callback))
    await asyncio.sleep(0.1)
    await pocket.delete_session("open")
    assert (await asyncio.wait_for(answering, 5)).status_code == 410
    new = await connect(pocket, alice, *scopes, provider="open")
    clock.forward(MINUTE + 1)
    await pocket.housekeeping()
    assert server.revocations == 0
    assert not server.find_token(new.access_token).is_revoked()
    assert await store.inner.list("outbox") == {}


# 3 (test_outbox.py) --------------------------------------------------------------------


async def test_record_by_which_another_goes_on_stays_until_it_is_paid(
    make_pocket: Make,
    server: AuthorizationServer,
    store: Watched,
    alice: Browser,
    clock: Clock,
) -> None:
    """Who was held up does not take it away, though it did not delete the session."""
    base = f"http://127.0.0.1:{free_port()}"
    beside = Watched(store.inner)
    stuck, other = (
        make_pocket(s, keys=KEYS, base_url=base, session_cache_ttl=timedelta())
        for s in (store, beside)
    )
    await connect(stuck, alice, "read")
    server.fault(500, times=2, **REVOKE)
    ended = asyncio.Event()

    async def not_yet(name: str, key: Key) -> None:
        if (name, key[0]) == ("put", "outbox"):
            await until(lambda: asyncio.sleep(0, ended.is_set()))

    beside.before = not_yet

    going_on: list[asyncio.Task[Any]] = []

    async def held_up(name: str, key: Key) -> None:
        if name == "delete" and '"session"' in key[1]:
            store.before = None
            clock.forward(MINUTE + 1)
            going_on.append(asyncio.ensure_future(other._service.call(turn_of)))
            await until(gone)

    async def turn_of(engine: Any) -> None:
        await engine.housekeeping.turn()

    async def gone() -> bool:
        return not any("session" in n for n in await store.inner.list(OWNER.namespace))

    store.before = held_up
    await stuck.delete_session("acme")
    ended.set()
    await until(lambda: asyncio.sleep(0, going_on[0].done()))
    clock.forward(HOUR)
    await other.housekeeping()
    assert all(grant.revoked for grant in server._grants)


# 4 (test_quarantine.py or test_housekeeping.py) ------------------------------------------


async def test_held_grant_that_does_not_open_is_in_nobodys_way(
    pocket: PocketAuth, store: Watched
) -> None:
    """The others that have waited for too long are looked at, too."""
    from langchain_pocket_auth._vault import Hold

    async def hold(engine: Any) -> None:
        until_then = engine.vault.now() - timedelta(minutes=1)
        for name in ("a", "b", "c"):
            await engine.vault.create(("held", name), Hold(until=until_then))

    await pocket._service.ask(hold)
    first, *_ = (await store.inner.walk("held")).records
    foreign = ("attempt", first[1])
    await store.inner.put(foreign, b"pasted", version=1, expected=None)
    await pocket.housekeeping()
    assert list(await store.inner.list("held")) == [first[1]]


# 5 (test_connections.py) -----------------------------------------------------------------


async def test_grant_stored_while_its_person_is_forgotten_is_given_back(
    pocket: PocketAuth, server: AuthorizationServer, store: Watched, alice: Browser
) -> None:
    """It arrives after all others were ended: erased, and not without the provider."""
    callback = await answer_url(alice, await link(pocket, "read"))
    forgetting: list[asyncio.Task[Any]] = []

    async def beside(name: str, key: Key) -> None:
        # Stored, and the last look at its question is not done.
        if name == "put" and '"session"' in key[1] and not forgetting:
            forgetting.append(asyncio.create_task(pocket.forget(OWNER)))
            await until(lambda: asyncio.sleep(0, paused.is_set()))
        if name == "walk" and key[0] == "attempt" and forgetting:
            paused.set()
            await stored.wait()
        if name == "get" and '"future"' in key[1] and paused.is_set():
            stored.set()
            await asyncio.wait(forgetting)

    paused, stored = asyncio.Event(), asyncio.Event()
    store.before = beside
    await asyncio.wait_for(deliver(callback), 10)
    await forgetting[0]
    assert await pocket.connections(OWNER) == []
    assert all(grant.revoked for grant in server._grants)


# 6 (test_clients.py) ---------------------------------------------------------------------


async def test_late_refusal_of_an_old_token_says_nothing_of_a_wider_one(
    pocket: PocketAuth, alice: Browser
) -> None:
    """Who has granted more meanwhile is not asked for it again."""
    old = await connect(pocket, alice, "read")
    await connect(pocket, alice, "read", "write")

    async def late(engine: Any) -> Any:
        [(key, _, _)] = await engine.connections.sessions(OWNER)
        return await engine.not_taken(key, ("read",), old.access_token, ("write",))

    assert await pocket._service.ask(late) is not None
    assert await state(pocket, "read") == "SKIP_AUTH"


# 7 (test_housekeeping.py) ----------------------------------------------------------------


async def test_outage_in_a_turn_leaves_no_idle_session_out(
    make_pocket: Make, clock: Clock, tmp_path: Path
) -> None:
    """The next turn goes on where the store was away, not behind it."""
    from test_housekeeping import _idle_session

    store = Watched(f"sqlite:///{tmp_path}/p.db")
    pocket = make_pocket(store, keys=KEYS, session_idle_ttl=timedelta(days=1))

    async def make(engine: Any) -> None:
        for n in range(3):
            await _idle_session(engine, Owner("user", f"u{n}"))
        await engine.usage.write()

    await pocket._service.ask(make)
    clock.forward(3 * DAY)

    async def away(name: str, key: Key) -> None:
        if name == "get" and key[0].startswith("user:"):
            raise StorageUnavailable("the store is away")

    async def turn(engine: Any) -> int:
        return await engine.usage.end_idle(engine._outbox.end, limit=1)

    await pocket._service.ask(turn)
    store.before = away
    with pytest.raises(StorageUnavailable):
        await pocket._service.ask(turn)
    store.before = None
    assert (await pocket.housekeeping())["idle"] == 2


# 8 (test_refresh.py) ---------------------------------------------------------------------


async def test_slow_revocation_of_a_renewed_token_is_begun_once(
    pocket: PocketAuth,
    server: AuthorizationServer,
    store: Watched,
    alice: Browser,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Disconnected while it was renewed: nobody gets it, and it is given back once."""
    monkeypatch.setattr("langchain_pocket_auth._saving.SAVE_LIMIT_S", 0.3)
    monkeypatch.setattr("langchain_pocket_auth._saving.SAVE_EVERY_S", 0.1)
    await connect(pocket, alice, "read")

    async def gone(name: str, key: Key) -> None:
        if name == "put" and '"session"' in key[1]:
            store.before = None
            await store.inner.delete(key)

    store.before = gone
    server.fault("slow", delay_s=0.7, times=1, **REVOKE)
    clock.forward(HOUR + 1)
    with pytest.raises(Exception, match="not connected"):
        await token(pocket, "read")
    await asyncio.sleep(1.2)  # more than a second try needs
    assert server.revocations == 2


# 9 (test_storage.py or test_states.py) ---------------------------------------------------


async def test_foreign_row_among_an_owners_records_is_passed_over(
    pocket: PocketAuth, store: Watched, alice: Browser
) -> None:
    """Who can write rows can delete them; what is ours goes on, and is forgotten."""
    await connect(pocket, alice, "read")
    for name in ("foreign", "3", "[]"):
        place = (OWNER.namespace, name)
        await store.inner.put(place, b"pasted", version=1, expected=None)
    assert len(await pocket.connections()) == 1
    await pocket.forget(OWNER)
    assert await store.inner.list(OWNER.namespace) == {}


# 10 (test_postgres.py) -------------------------------------------------------------------


async def test_call_ends_in_time_though_the_server_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody waits until a server that stands still has stopped what it does."""
    from databases import Postgres

    from langchain_pocket_auth.storage import _postgres, storage_from_url

    with Postgres() as server:
        store = storage_from_url(server.url(server.fresh()))
        await store.open()
        await store.get(KEY)
        monkeypatch.setattr(_postgres, "CALL_TIMEOUT_S", 0.3)
        main = server.process.pid
        path = Path(f"/proc/{main}/task/{main}/children")
        children = await asyncio.to_thread(path.read_text)
        processes = [main, *map(int, children.split())]
        try:
            for process in processes:
                os.kill(process, signal.SIGSTOP)
            async with asyncio.timeout(3):
                for call in (store.get, store.take, store.list):
                    with pytest.raises(StorageUnavailable):
                        await call(KEY if call != store.list else "a")  # type: ignore[operator, arg-type]
        finally:
            for process in processes:
                os.kill(process, signal.SIGCONT)
        monkeypatch.undo()
        assert await store.get(KEY) is None
        await store.close()
