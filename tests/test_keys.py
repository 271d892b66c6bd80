"""Keys: where they come from, how a store knows its own, and how one takes over."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import subprocess
import sys
import threading
from base64 import urlsafe_b64decode
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from conftest import call, free_port, says
from graphs import ASYNC, Work, build, thread
from langgraph.checkpoint.memory import InMemorySaver
from support import (
    BOUND_S,
    Clock,
    Watched,
    answer_url,
    connect,
    deliver,
    link,
    outcome_of,
    state,
    token,
)

from langchain_pocket_auth import (
    ConfigurationError,
    CredentialUnreadable,
    PocketAuth,
    StorageUnavailable,
    pending_authorizations,
    resume,
)
from langchain_pocket_auth._canaries import is_canary
from langchain_pocket_auth._rewrap import MAX_PASSES, rewrap, survey
from langchain_pocket_auth._seal import KeyRing, new_key, sealed_with
from langchain_pocket_auth._vault import Known, Vault, known_key
from langchain_pocket_auth.storage import Key, Record, StorageBackend, storage_from_url
from langchain_pocket_auth.storage.memory import MemoryBackend
from langchain_pocket_auth.testing import AuthorizationServer, Browser, assert_no_leak

if TYPE_CHECKING:
    from databases import Postgres, Redis

Make = Callable[..., PocketAuth]


def named(key_id: str) -> str:
    """Return a new key of that name."""
    return f"{key_id}:{new_key().partition(':')[2]}"


KINDS = {"session", "future", "ticket", "attempt", "pause", "known", "outbox"}
OLD, NEW = named("old"), named("new")
SECRETS = [key.partition(":")[2] for key in (OLD, NEW)]


@pytest.fixture(params=["memory", "sqlite", "postgres", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """An empty store that is opened again and again."""
    match request.param:
        case "memory":
            return MemoryBackend()
        case "sqlite":
            return f"sqlite:///{tmp_path}/p.db"
        case "postgres":
            postgres: Postgres = request.getfixturevalue("postgres_server")
            return postgres.url(postgres.fresh())
    redis: Redis = request.getfixturevalue("redis_server")
    return redis.url(redis.fresh())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The package's clock."""
    return Clock(monkeypatch)


def backend_of(store: Any) -> StorageBackend:
    """Return a backend of the store, not yet opened."""
    return storage_from_url(store) if isinstance(store, str) else store


@asynccontextmanager
async def vault_of(store: Any, keys: str) -> AsyncIterator[Vault]:
    """Open what is stored, as one more replica."""
    vault = Vault(backend_of(store), KeyRing.parse(keys), lambda: datetime.now(UTC))
    await vault.open()
    try:
        yield vault
    finally:
        await vault.close()


async def records_of(store: Any) -> dict[Key, Record]:
    """Return all that is stored."""
    backend, found, after = backend_of(store), {}, None
    await backend.open()
    while True:
        page = await backend.walk(after=after)
        found |= page.records
        if (after := page.after) is None:
            break
    await backend.close()
    return found


def calls_of(watched: Watched) -> Counter[str]:
    """Return a counter of what is called from now on."""
    calls = Counter[str]()

    async def count(name: str, _: Key) -> None:
        calls[name] += 1

    watched.before = count
    return calls


async def fill(vault: Vault, number: int) -> None:
    """Store that many records."""
    for n in range(number):
        assert await vault.create(known_key(f"record {n}"), Known(data={"n": n}))


# ----------------------------------------------------------------- one key takes over


async def all_is_sealed_with(key_id: str, store: Any) -> None:
    """Look at the records: each kind is there, and all have that key."""
    found = {k: r for k, r in (await records_of(store)).items() if not is_canary(k)}
    assert {sealed_with(record.value) for record in found.values()} == {key_id}
    kinds = {json.loads(name)[0] if name[0] == "[" else space for space, name in found}
    assert kinds >= KINDS, KINDS - kinds


async def test_everything_outlives_the_key_it_was_sealed_with(
    make_pocket: Make,
    server: AuthorizationServer,
    alice: Browser,
    clock: Clock,
    store: Any,
) -> None:
    """What k1 sealed works with "k2,k1", and after a rewrap with k2 alone."""
    base, saver = f"http://127.0.0.1:{free_port()}", InMemorySaver()

    def replica(keys: str) -> tuple[PocketAuth, Work, Any]:
        pocket = make_pocket(
            store, keys=keys, base_url=base, session_cache_ttl=timedelta()
        )
        work, script = Work(ASYNC), [says(call("look", text="x"))]
        tools = [work.tool("look", "zeta", "read")]
        return pocket, work, build("create_agent", pocket, tools, script, saver)[0]

    async def renewed(pocket: PocketAuth, owner: str) -> bool:
        before = server.token_requests["refresh_token"]
        await token(pocket, "read", owner=owner)
        return server.token_requests["refresh_token"] == before + 1

    first, _, graph = replica(OLD)
    server.access_token_ttl_s = 1
    for owner in ("ann", "bob"):
        await connect(first, alice, "read", owner=owner)
    over = asyncio.get_running_loop().time() + 1
    server.access_token_ttl_s = 3600
    await connect(first, alice, "read", provider="zeta", owner="cid")
    server.fault(503, times=9, path="/revoke")
    assert await first.disconnect("zeta", owner="cid")
    unclicked = await link(first, "read", owner="dan")
    answer = await answer_url(alice, await link(first, "read", owner="eva"))
    paused = await graph.ainvoke({"messages": [("user", "go")]}, thread())
    [pending] = pending_authorizations(paused)
    remembered = {"client_id": "registered"}
    await first._service.run(first._service.remember("acme", remembered))
    await first.housekeeping()  # writes down what was used
    await first.aclose()
    await all_is_sealed_with("old", store)

    await asyncio.sleep(max(0, over - asyncio.get_running_loop().time()))
    both, _, _ = replica(f"{NEW},{OLD}")
    assert await renewed(both, "ann")
    done = await both.rewrap()
    assert done.before["old"] > done.before["new"] >= 1
    assert (set(done.after), done.unreadable) == ({"new"}, 0)
    assert sum(done.after.values()) == sum(done.before.values())
    await both.aclose()
    await all_is_sealed_with("new", store)

    server.clear_faults()
    last, work, graph = replica(NEW)
    await last.serve()
    clock.forward(61)  # a minute after it failed, the grant is given back
    assert (await last.housekeeping())["given_back"] == 1
    assert server.revocations
    assert await renewed(last, "bob")
    assert outcome_of(await deliver(answer, follow_redirects=True)) == "connected"
    assert outcome_of(await alice.avisit(unclicked)) == "connected"
    for owner in ("ann", "bob", "dan", "eva"):
        assert await state(last, "read", owner=owner) == "SKIP_AUTH"
    assert outcome_of(await alice.avisit(pending.url)) == "connected"
    result = await graph.ainvoke(resume(paused), thread())
    assert (result["messages"][-1].text, work.names) == ("done", ["look"])
    assert await last._service.run(last._service.recall("acme")) == remembered
    assert server.refresh_token_reuses == 0


CHILD = """
import asyncio, os, sys
from datetime import UTC, datetime
from langchain_pocket_auth._rewrap import rewrap
from langchain_pocket_auth._seal import KeyRing
from langchain_pocket_auth._vault import Vault
from langchain_pocket_auth.storage.sql import SQLBackend
url, keys, left = sys.argv[1:]

class Dying(SQLBackend):
    left = int(left)
    async def rewrite(self, key, value, *, expected):
        if not Dying.left:
            os._exit(9)
        Dying.left -= 1
        return await super().rewrite(key, value, expected=expected)

async def main():
    vault = Vault(Dying(url), KeyRing.parse(keys), lambda: datetime.now(UTC))
    await vault.open()
    await rewrap(vault, batch=10)

asyncio.run(main())
"""


async def test_killed_rewrap_goes_on_where_it_was(tmp_path: Path) -> None:
    """Killed among the second ten of thirty: the next run neither begins anew nor stops."""
    url, both = f"sqlite:///{tmp_path}/p.db", f"{NEW},{OLD}"
    async with vault_of(url, OLD) as vault:
        await fill(vault, 30)
    killed = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", CHILD, url, both, "14"], timeout=30
    )
    assert killed.returncode == 9
    watched, seen = Watched(url), []
    calls = calls_of(watched)
    async with vault_of(watched, both) as vault:
        assert (await survey(vault)).after == {"old": 16, "new": 14}
        done = await rewrap(vault, batch=10, on_progress=seen.append)
    assert seen[0] == 20  # the first ten are behind it
    assert (done.after, done.unreadable) == ({"new": 30}, 0)
    assert calls["rewrite"] == 16
    async with vault_of(url, NEW) as vault:
        assert (await survey(vault)).after == {"new": 30}
        assert not await vault.get(Known, known_key("rewrap"))


async def test_continued_rewrap_looks_at_the_beginning_again(tmp_path: Path) -> None:
    """What came meanwhile to where the ended run had been is not left behind."""
    url, both = f"sqlite:///{tmp_path}/p.db", f"{NEW},{OLD}"

    def end(_: int) -> None:
        raise KeyboardInterrupt

    async with vault_of(url, f"{OLD},{NEW}") as late, vault_of(url, both) as vault:
        await fill(late, 15)
        with pytest.raises(KeyboardInterrupt):
            await rewrap(vault, batch=10, on_progress=end)
        for key, record in (await records_of(url)).items():
            if sealed_with(record.value) == "old" and not is_canary(key):
                await vault.discard(key)
        assert await late.create(("a", "early"), Known(data={}))
        assert (await rewrap(vault, batch=10)).after == {"new": 11}


async def test_rewrapping_disturbs_no_refresh(
    make_pocket: Make, server: AuthorizationServer, alice: Browser, tmp_path: Path
) -> None:
    """Back and forth under 2-second tokens: one token request per expiry, none lost."""
    url, owners = f"sqlite:///{tmp_path}/p.db", ("ann", "bob", "cid")
    base = f"http://127.0.0.1:{free_port()}"
    pockets = [
        make_pocket(url, keys=keys, base_url=base, session_cache_ttl=timedelta())
        for keys in (f"{OLD},{NEW}", f"{NEW},{OLD}")
    ]
    server.access_token_ttl_s = 2
    for owner in owners:
        await connect(pockets[0], alice, "read", owner=owner)
    asked = asyncio.get_running_loop().time
    end, seen = asked() + 3.0, {owner: set[str]() for owner in owners}

    async def use(owner: str) -> None:
        while asked() < end:
            for pocket in pockets:
                context = await token(pocket, "read", owner=owner)
                seen[owner].add(context.access_token)
            await asyncio.sleep(0.1)

    async def reseal() -> Counter[str]:
        moved = Counter[str]()
        while asked() < end:
            for pocket in pockets:
                moved.update((await pocket.rewrap()).before)
            await asyncio.sleep(0.1)
        return moved

    *_, moved = await asyncio.gather(*map(use, owners), reseal())
    assert min(moved["old"], moved["new"]) > 20
    assert all(len(tokens) >= 2 for tokens in seen.values())
    for owner in owners:  # what is renewed in passing is under way yet
        seen[owner].add((await token(pockets[0], "read", owner=owner)).access_token)
    new = sum(len(tokens) - 1 for tokens in seen.values())
    assert server.token_requests["refresh_token"] - new in range(len(owners))
    assert (server.refresh_token_reuses, server.revoked_families) == (0, 0)
    assert not server.token_errors


async def test_record_that_does_not_open_is_counted_and_left(tmp_path: Path) -> None:
    """Tampered with, of a lost key, or no envelope: told, untouched, and no hindrance."""
    url, both = f"sqlite:///{tmp_path}/p.db", f"{NEW},{OLD}"
    async with vault_of(url, OLD) as vault:
        await fill(vault, 5)
    broken = {("known", f"broken {n}"): v for n, v in enumerate(_broken())}
    backend = backend_of(url)
    await backend.open()
    for key, value in broken.items():
        await backend.put(key, value, version=1, expected=None)
    await backend.close()
    async with vault_of(url, both) as vault:
        assert (await survey(vault)).unreadable == len(broken)
        done = await rewrap(vault, batch=2)
    assert (done.before, done.after) == ({"old": 5}, {"new": 5})
    assert done.unreadable == len(broken)
    kept = await records_of(url)
    assert {key: kept[key].value for key in broken} == broken
    async with vault_of(url, NEW):
        pass  # the old key is not needed for them


def _broken() -> Iterator[bytes]:
    yield b"no envelope"
    yield KeyRing.parse(OLD).seal(b"{}", "another", "row")
    yield KeyRing.parse(named("lost")).seal(b"{}", "known", "broken 2", "1")


@pytest.mark.parametrize("writes", [1, 99])
async def test_what_an_old_replica_seals_meanwhile_is_found_or_told(
    writes: int,
) -> None:
    """Another pass finds it; if that never ends, it is told, and the key is needed."""
    store, both, left = MemoryBackend(), f"{NEW},{OLD}", iter(range(writes))
    watched = Watched(store)

    async with vault_of(store, OLD) as late, vault_of(watched, both) as vault:
        await fill(late, 3)

        async def meanwhile(name: str, _: Key) -> None:
            if name == "rewrite" and (n := next(left, None)) is not None:
                await late.create(known_key(f"late {n}"), Known(data={}))

        watched.before = meanwhile
        done = await rewrap(vault)
    if writes == 1:
        assert done.after == {"new": 4}
        async with vault_of(store, NEW):
            return
    assert done.after == {"new": 3 * (MAX_PASSES - 1), "old": 3}
    with pytest.raises(ConfigurationError, match="'old'"):
        async with vault_of(store, NEW):
            pass


# -------------------------------------------------------------- which keys a store knows


async def refusal(make: Make, store: Any, keys: Any) -> str:
    """Return why a pocket does not open a store; it must say so each time."""
    pocket = make(store, keys=keys)
    for _ in range(2):
        with pytest.raises(ConfigurationError) as caught:
            await state(pocket, "read")
    await pocket.aclose()
    assert_no_leak(SECRETS, caught.value)
    return str(caught.value)


async def opens(make: Make, store: Any, keys: Any) -> bool:
    """Whether a pocket opens a store."""
    pocket = make(store, keys=keys)
    try:
        return await state(pocket, "read") == "NO_SESSION"
    finally:
        await pocket.aclose()


async def test_key_is_needed_from_its_first_use_until_a_rewrap(
    make_pocket: Make, tmp_path: Path
) -> None:
    """A key that only opens so far is nobody's need; one that sealed is everybody's."""
    url = f"sqlite:///{tmp_path}/p.db"
    assert await opens(make_pocket, url, OLD)
    # The new key goes everywhere first, while others start without it still.
    assert await opens(make_pocket, url, f"{OLD},{NEW}")
    assert await opens(make_pocket, url, OLD)
    assert await opens(make_pocket, url, f"{NEW},{OLD}")
    for keys, missing in ((OLD, "new"), (NEW, "old")):
        told = await refusal(make_pocket, url, keys)
        assert f"sealed with the key '{missing}', which is not among them" in told
        assert "`pocket-auth keys rewrap`" in told
    pocket = make_pocket(url, keys=f"{NEW},{OLD}")
    assert set((await pocket.rewrap()).after) <= {"new"}
    assert await opens(make_pocket, url, NEW)
    assert await opens(make_pocket, url, f"{NEW},{OLD}")
    assert await opens(make_pocket, url, NEW)


@pytest.mark.parametrize("place", ["first", "last"])
async def test_another_key_of_the_same_name_is_refused(
    make_pocket: Make, tmp_path: Path, place: str
) -> None:
    """Replicas that mean different keys are told at the start, before one has sealed."""
    url, other = f"sqlite:///{tmp_path}/p.db", named("new")
    before, wrong = {
        "first": (NEW, other),
        "last": (f"{OLD},{NEW}", f"{OLD},{other}"),
    }[place]
    assert await opens(make_pocket, url, before)
    told = await refusal(make_pocket, url, wrong)
    assert "'new' is another one" in told
    assert_no_leak([other.partition(":")[2]], text=[told])


async def test_store_with_the_one_canary_of_older_versions_opens(
    make_pocket: Make, tmp_path: Path
) -> None:
    """Its key is needed, and any other that may have sealed since, until a rewrap."""
    url, place, middle = f"sqlite:///{tmp_path}/p.db", ("meta", "canary"), named("mid")
    backend = backend_of(url)
    await backend.open()
    value = KeyRing.parse(OLD).seal(b"{}", *place, "7")
    await backend.put(place, value, version=7, expected=None)
    await backend.close()
    assert "'old'" in await refusal(make_pocket, url, f"{NEW},{middle}")
    pocket = make_pocket(url, keys=f"{NEW},{middle},{OLD}")
    assert await state(pocket, "read") == "NO_SESSION"
    assert "'mid'" in await refusal(make_pocket, url, f"{NEW},{OLD}")
    await pocket.rewrap()
    assert await opens(make_pocket, url, NEW)


async def test_replica_without_the_new_key_says_so_and_asks_nobody(
    make_pocket: Make, alice: Browser, tmp_path: Path
) -> None:
    """What others seal with the new key is an error that names it, never "no session"."""
    url, base = f"sqlite:///{tmp_path}/p.db", f"http://127.0.0.1:{free_port()}"
    late, early, first = (
        make_pocket(url, keys=keys, base_url=base)
        for keys in (OLD, f"{OLD},{NEW}", f"{NEW},{OLD}")
    )
    await connect(late, alice, "read", owner="ann")
    assert await state(early, "read") == "NO_SESSION"
    await connect(first, alice, "read", owner="bob")
    for look in (state, token, link):
        with pytest.raises(CredentialUnreadable, match=r"'new'.*restart"):
            await look(late, "read", owner="bob")
    for pocket, owner in (
        (late, "ann"),
        (early, "ann"),
        (early, "bob"),
        (first, "ann"),
    ):
        assert await state(pocket, "read", owner=owner) == "SKIP_AUTH"


@pytest.mark.parametrize("together", ["start", "start and look"])
@pytest.mark.parametrize("keys", [(OLD, OLD), (OLD, NEW), (OLD, named("old"))])
async def test_two_that_start_at_once_agree_on_the_keys(
    keys: tuple[str, str], together: str
) -> None:
    """With the same keys both run, with different ones one at most; nothing is stuck."""
    shared = MemoryBackend()
    meet = [asyncio.Barrier(2) for _ in range(1 if together == "start" else 2)]

    async def start(key: str) -> str | None:
        mine, looks = Watched(shared), iter(meet)

        async def before(name: str, _: Key) -> None:
            # Before the first writes, when all have looked; before the second look.
            if name == wanted.pop(name, None) and (barrier := next(looks, None)):
                await barrier.wait()
            if name == "put":
                wanted["list"] = "list"

        wanted = {"put": "put"}
        mine.before = before
        try:
            async with vault_of(mine, key):
                return key
        except ConfigurationError:
            return None

    async with asyncio.timeout(BOUND_S):
        started = [k for k in await asyncio.gather(*map(start, keys)) if k]
    if len(set(keys)) == 1:
        assert started == [*keys]
    else:
        assert len(started) <= 1
    async with asyncio.timeout(BOUND_S):
        again = started[0] if started else keys[0]
        async with vault_of(shared, again) as vault:
            assert await vault.used_keys() == {again.partition(":")[0]}


async def test_open_costs_one_look_once_the_keys_are_known(tmp_path: Path) -> None:
    """A start reads the canaries in one step, and writes for new keys only."""
    url = f"sqlite:///{tmp_path}/p.db"
    counted = []
    for keys in (f"{NEW},{OLD}", f"{NEW},{OLD}"):
        watched = Watched(url)
        calls = calls_of(watched)
        async with vault_of(watched, keys):
            counted.append(dict(calls))
    assert counted == [{"list": 2, "put": 2}, {"list": 1}]


async def test_store_that_is_away_at_the_start_is_an_outage(tmp_path: Path) -> None:
    """An outage says nothing about keys."""
    watched = Watched(f"sqlite:///{tmp_path}/p.db")

    async def away(name: str, _: Key) -> None:
        raise StorageUnavailable("away")

    watched.before = away
    with pytest.raises(StorageUnavailable):
        async with vault_of(watched, OLD):
            pass


# ---------------------------------------------------------------------- where they are


def given_by(keys: Any, *, later: bool) -> Callable[[], Any]:
    """Return a function that returns keys, or raises them."""

    def fetch_keys() -> Any:
        asked.append(keys)
        if isinstance(keys, Exception):
            raise keys
        return keys

    async def fetch_keys_later() -> Any:
        await asyncio.sleep(0)
        return fetch_keys()

    asked: list[Any] = []
    fetch = fetch_keys_later if later else fetch_keys
    fetch.asked = asked  # type: ignore[attr-defined]
    return fetch


@pytest.mark.parametrize("later", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("form", ["text", "mapping"])
async def test_keys_are_fetched_when_the_store_is_opened(
    make_pocket: Make, tmp_path: Path, form: str, later: bool
) -> None:
    """Once per opening, off the event loop, and in either form."""
    url = f"sqlite:///{tmp_path}/p.db"
    assert await opens(make_pocket, url, OLD)
    raw = {"old": urlsafe_b64decode(OLD.partition(":")[2] + "=")}
    fetch: Any = given_by(OLD if form == "text" else raw, later=later)
    pocket = make_pocket(url, keys=fetch)
    assert fetch.asked == []
    for _ in range(2):
        assert await state(pocket, "read") == "NO_SESSION"
    assert len(fetch.asked) == 1
    await pocket.aclose()
    assert await state(pocket, "read") == "NO_SESSION"
    assert len(fetch.asked) == 2


MALFORMED: dict[str, Any] = {
    "no key": "",
    "commas": " , ",
    "no id": SECRETS[0],
    "odd id": f"a b:{SECRETS[0]}",
    "long id": f"{'a' * 33}:{SECRETS[0]}",
    "short key": f"a:{SECRETS[0][:-4]}",
    "long key": f"a:{SECRETS[0]}{SECRETS[0]}",
    "no base64": f"a:{SECRETS[0][:-1]}\N{BULLET}",
    "twice": f"{OLD},old:{SECRETS[1]}",
    "one is broken": f"{NEW},{OLD}x",
    "no bytes": {"old": SECRETS[0]},
    "too few bytes": {"old": SECRETS[0][:31].encode()},
    "odd name": {7: b"x" * 32},
    "nothing by id": {},
    "nothing": None,
    "bytes": OLD.encode(),
    "raises": RuntimeError(f"denied: {SECRETS[0]}"),
}


@pytest.mark.parametrize("case", MALFORMED)
async def test_keys_that_cannot_be_used_are_a_setting_to_fix(
    make_pocket: Make,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    case: str,
) -> None:
    """From a function they are told at the opening, as text at once; none is shown."""
    caplog.set_level("DEBUG")
    keys, url = MALFORMED[case], f"sqlite:///{tmp_path}/p.db"
    told = await refusal(make_pocket, url, fetch := given_by(keys, later=True))
    if not isinstance(keys, str | dict):
        assert fetch.__qualname__ in told
    if case == "raises":
        assert "failed with RuntimeError: it has to return" in told
    if isinstance(keys, str) and keys:
        with pytest.raises(ConfigurationError) as caught:
            make_pocket(url, keys=keys)
        assert_no_leak(SECRETS, caught.value)
    assert_no_leak(SECRETS, text=[told, caplog.text])


async def test_key_service_that_hangs_is_given_up(
    make_pocket: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits for the store learns which function does not answer."""
    monkeypatch.setattr("langchain_pocket_auth._seal.ANSWER_LIMIT_S", 0.01)
    answer = threading.Event()
    try:
        told = await refusal(make_pocket, "memory://", answer.wait)
    finally:
        answer.set()
    assert "Event.wait failed with TimeoutError" in told


@pytest.mark.parametrize("by", ["constructor", "environment", "settings file"])
async def test_key_file_is_named_three_ways(
    make_pocket: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, by: str
) -> None:
    """A key a line; it is read when the store is opened, and never made."""
    file, url = tmp_path / "keys", f"sqlite:///{tmp_path}/p.db"
    settings: dict[str, Any] = {}
    if by == "constructor":
        settings["keys"] = file
    elif by == "environment":
        monkeypatch.setenv("POCKET_AUTH_KEYS_FILE", str(file))
    else:
        settings["settings_file"] = tmp_path / "settings.toml"
        settings["settings_file"].write_text(f"keys_file = '{file}'")
    pocket = make_pocket(url, **settings)
    with pytest.raises(ConfigurationError, match=f"{file} cannot be made or read"):
        await state(pocket, "read")
    assert not file.exists()
    file.write_text(f"{NEW}\n{OLD}\n")
    file.chmod(0o640)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        await state(pocket, "read")
    file.chmod(0o600)
    assert await state(pocket, "read") == "NO_SESSION"
    canaries = {name for space, name in await records_of(url) if space == "meta"}
    assert canaries == {"canary/new", "spare/old"}


def test_keys_are_set_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two settings that may differ are refused; the constructor wins over both."""
    monkeypatch.setenv("POCKET_AUTH_KEYS", OLD)
    monkeypatch.setenv("POCKET_AUTH_KEYS_FILE", "/run/secrets/keys")
    with pytest.raises(ConfigurationError, match="both set") as caught:
        PocketAuth()
    assert_no_leak(SECRETS, caught.value)
    assert repr(PocketAuth(keys=NEW)) == repr(PocketAuth(keys=Path("keys")))


@pytest.mark.parametrize(
    ("uid", "read_only", "mode", "taken"),
    [
        (0, True, 0o644, True),  # Kubernetes, Docker
        (0, True, 0o440, True),
        (0, False, 0o644, False),
        (1000, True, 0o644, False),
        (1000, False, 0o600, True),
    ],
)
def test_mounted_secret_may_be_readable(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    uid: int,
    read_only: bool,
    mode: int,
    taken: bool,
) -> None:
    """Only of root and on a read-only mount: nobody outside of the container is there."""
    file = tmp_path / "keys"
    file.write_text(OLD)
    # What it takes a container to have.
    status = SimpleNamespace(st_uid=uid, st_mode=stat.S_IFREG | mode)
    flags = SimpleNamespace(f_flag=os.ST_RDONLY if read_only else 0)
    with monkeypatch.context() as patched:
        patched.setattr("os.fstat", lambda _: status)
        patched.setattr("os.fstatvfs", lambda _: flags)
        try:
            ids = KeyRing.file(file, make=False).ids
        except ConfigurationError:
            ids = ()
    assert ids == (("old",) if taken else ())
