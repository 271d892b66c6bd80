"""Renewing sessions: once per expiry, whoever asks, whatever goes wrong."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import free_port
from support import (
    BOUND_S,
    KEYS,
    Clock,
    Watched,
    asks,
    connect,
    in_thread,
    link,
    on,
    state,
    token,
    until,
)

from langchain_pocket_auth import (
    AuthorizationRequired,
    ConfigurationError,
    PocketAuth,
    ProviderUnavailable,
    StorageUnavailable,
)
from langchain_pocket_auth.storage.memory import MemoryBackend
from langchain_pocket_auth.testing import AuthorizationServer, Browser, LeakWatch

Make = Callable[..., PocketAuth]
IN_WINDOW_S, LEFT_S = 3570, 30  # of a token of an hour: must be renewed, still valid
REFRESH = {"grant_type": "refresh_token"}
SAVING = "langchain_pocket_auth._saving"


@pytest.fixture(params=["memory", "sqlite"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A storage URL; every behaviour holds on all of them."""
    return "memory://" if request.param == "memory" else f"sqlite:///{tmp_path}/p.db"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The package's clock."""
    return Clock(monkeypatch)


@pytest.fixture
def pocket(make_pocket: Make, storage: str) -> PocketAuth:
    """A pocket on each storage, which remembers nothing itself."""
    return make_pocket(storage, keys=KEYS, session_cache_ttl=timedelta())


@pytest.fixture(autouse=True)
def no_reuse(server: AuthorizationServer) -> Iterator[None]:
    """Unless a test says so, no refresh token is used twice."""
    yield
    if server.reuse_grace_s == 0 and not server.fired["drop_after"]:
        assert server.refresh_token_reuses == 0


# ---------------------------------------------------------------------- exactly once


@pytest.mark.parametrize("callers", ["tasks", "threads", "two pockets"])
async def test_parallel_calls_at_expiry_make_one_token_request(
    make_pocket: Make,
    server: AuthorizationServer,
    alice: Browser,
    storage: str,
    clock: Clock,
    callers: str,
) -> None:
    """Twenty callers get the one new token, and the rotated one renews again."""
    base = f"http://127.0.0.1:{free_port()}"
    first = make_pocket(storage, keys=KEYS, base_url=base)
    pockets = [first] * 20
    if callers == "two pockets":
        if storage == "memory://":
            storage = Watched(storage)  # the same object, opened twice
            pockets = [first := make_pocket(storage, keys=KEYS, base_url=base)] * 20
        pockets[::2] = [make_pocket(storage, keys=KEYS, base_url=base)] * 10
    await connect(first, alice, "read")
    for round_ in (1, 2):
        clock.forward(3601)
        if callers == "threads":
            with ThreadPoolExecutor(20) as pool:
                loop = asyncio.get_running_loop()
                work = [
                    loop.run_in_executor(pool, in_thread, lambda p=p: token(p, "read"))
                    for p in pockets
                ]
                contexts = await asyncio.gather(*work)
        else:
            contexts = await asyncio.gather(*(token(p, "read") for p in pockets))
        assert {c.access_token for c in contexts} == {server.issued_access_tokens[-1]}
        assert server.token_requests["refresh_token"] == round_


CHILD = """
import asyncio, sys, time
from pathlib import Path
from langchain_pocket_auth import PocketAuth, Provider
url, keys, base, issuer, go = sys.argv[1:]
pocket = PocketAuth(url, keys=keys, base_url=base, clients={"acme": ("acme-client", "acme-secret")},
    providers=[Provider(id="acme", authorization_endpoint=issuer + "/authorize", token_endpoint=issuer + "/token")])
request = pocket.make_request(["read"], auth_provider="acme")
async def main():
    await pocket.list_session_state("nobody")
    print("ready", flush=True)
    while not Path(go).exists():
        await asyncio.sleep(0.005)
    found = await asyncio.gather(*(pocket.authenticate(request, auth_provider="acme", timeout=0) for _ in range(10)))
    print(" ".join({c.access_token for c in found}))
    await pocket.aclose()
asyncio.run(main())
"""


async def test_two_processes_make_one_token_request(
    make_pocket: Make, server: AuthorizationServer, alice: Browser, tmp_path: Path
) -> None:
    """The lease in the record holds between processes."""
    url, base = f"sqlite:///{tmp_path}/p.db", f"http://127.0.0.1:{free_port()}"
    pocket = make_pocket(url, keys=KEYS, base_url=base)
    server.access_token_ttl_s = 1
    await connect(pocket, alice, "read")
    server.access_token_ttl_s = 3600
    arguments = [url, KEYS, base, server.issuer, str(tmp_path / "go")]
    children = [
        subprocess.Popen(  # noqa: ASYNC220 - it only starts
            [sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    try:
        for child in children:
            assert await asyncio.to_thread(child.stdout.readline) == "ready\n"
        (tmp_path / "go").touch()
        outputs = [
            (await asyncio.to_thread(child.communicate, timeout=30))[0]
            for child in children
        ]
    finally:
        for child in children:
            child.kill()
            child.wait()
            child.stdout.close()
    assert {out.strip() for out in outputs} == {server.issued_access_tokens[-1]}
    assert server.token_requests["refresh_token"] == 1


async def test_session_renewed_between_read_and_lease_is_not_renewed_again(
    make_pocket: Make, server: AuthorizationServer, alice: Browser, clock: Clock
) -> None:
    """The spent refresh token of a stale read is never sent."""
    base, shared = f"http://127.0.0.1:{free_port()}", Watched("memory://")
    slow, fast = Watched(shared), Watched(shared)
    pockets = [
        make_pocket(s, keys=KEYS, base_url=base, session_cache_ttl=timedelta())
        for s in (slow, fast)
    ]
    await connect(pockets[0], alice, "read")
    clock.forward(IN_WINDOW_S)
    about_to_lease, renewed = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    async def before(name: str, _key: Any) -> None:
        if name == "lease":
            slow.before = None
            loop.call_soon_threadsafe(about_to_lease.set)
            while not renewed.is_set():  # noqa: ASYNC110 - of another loop
                await asyncio.sleep(0.005)

    slow.before = before
    stale = asyncio.create_task(token(pockets[0], "read"))
    await asyncio.wait_for(about_to_lease.wait(), BOUND_S)
    winner = await token(pockets[1], "read")
    renewed.set()
    assert (await asyncio.wait_for(stale, BOUND_S)).access_token == winner.access_token
    assert server.token_requests["refresh_token"] == 1


async def test_fresh_short_lived_token_is_not_renewed_early(
    pocket: PocketAuth, server: AuthorizationServer, alice: Browser
) -> None:
    """Twenty calls in the first half second of two make no token request."""
    server.access_token_ttl_s = 2
    await connect(pocket, alice, "read")
    for _ in range(20):
        await token(pocket, "read")
        await asyncio.sleep(0.02)
    assert server.token_requests["refresh_token"] == 0


async def test_token_is_renewed_in_passing_before_it_must_be(
    pocket: PocketAuth, server: AuthorizationServer, alice: Browser, clock: Clock
) -> None:
    """In the advisory window callers get the old token at once; one request is made."""
    old = await connect(pocket, alice, "read")
    clock.forward(3600 - 200)
    server.fault("slow", delay_s=0.3, **REFRESH)
    found = await asyncio.gather(*(token(pocket, "read") for _ in range(10)))
    assert {c.access_token for c in found} == {old.access_token}

    async def renewed() -> bool:
        return (await token(pocket, "read")).access_token != old.access_token

    await until(renewed)
    assert server.token_requests["refresh_token"] == 1


# --------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("kind", ["rotates", "keeps", "omits it"])
async def test_refresh_token_of_the_next_renewal_is_the_right_one(
    pocket: PocketAuth,
    server: AuthorizationServer,
    alice: Browser,
    clock: Clock,
    kind: str,
) -> None:
    """A rotated one replaces the old; without one in the answer the old stays."""
    server.rotate = kind == "rotates"
    await connect(pocket, alice, "read")
    server.omit_refresh_token = kind == "omits it"
    seen = set()
    for _ in range(3):
        clock.forward(IN_WINDOW_S)
        seen.add((await token(pocket, "read")).access_token)
    assert len(seen) == 3
    assert server.token_requests["refresh_token"] == 3


async def test_answer_without_expiry_is_taken_to_live_as_long_as_before(
    pocket: PocketAuth, server: AuthorizationServer, alice: Browser, clock: Clock
) -> None:
    """A refresh answer that leaves `expires_in` out does not make the token eternal."""
    await connect(pocket, alice, "read")
    clock.forward(IN_WINDOW_S)
    server.fault("mutate", drop=["expires_in"], **REFRESH)
    assert (await token(pocket, "read")).expires_at is not None


async def test_scopes_that_a_refresh_takes_away_are_asked_for_again(
    pocket: PocketAuth, server: AuthorizationServer, alice: Browser, clock: Clock
) -> None:
    """What the answer grants is what the session covers; absent means unchanged."""
    await connect(pocket, alice, "read", "write")
    clock.forward(IN_WINDOW_S)
    server.fault("mutate", drop=["scope"], **REFRESH)
    await token(pocket, "read", "write")
    clock.forward(IN_WINDOW_S)
    server.fault("mutate", set={"scope": "read"}, **REFRESH)
    await token(pocket, "read")
    assert await state(pocket, "write") == "DO_AUTH"


# ------------------------------------------------------------------ a server in trouble

TRANSIENT: list[Any] = [
    *(500, 502, 503, 429, "malformed", "html200", "empty", "error200", "list200"),
    *("reset", "hang", "huge", "redirect"),
]


@pytest.mark.parametrize("mode", TRANSIENT)
async def test_trouble_keeps_the_session_and_the_token_while_it_is_valid(
    pocket: PocketAuth,
    server: AuthorizationServer,
    alice: Browser,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    mode: Any,
) -> None:
    """The old token, then ProviderUnavailable, then, when it is over, a new token."""
    if mode == "hang":
        monkeypatch.setattr("langchain_pocket_auth._http.TIMEOUT_S", 0.1)
    old = await connect(pocket, alice, "read")
    clock.forward(IN_WINDOW_S)
    with AuthorizationServer() as elsewhere, LeakWatch() as watch:
        changes = {"to": elsewhere.token_endpoint} if mode == "redirect" else {}
        server.fault(mode, times=50, **REFRESH, **changes)
        for _ in range(5):
            assert (await token(pocket, "read")).access_token == old.access_token
        # The first failure is followed by a pause; a lost answer is asked for twice.
        assert server.fired[str(mode)] == (2 if mode in {"reset", "hang"} else 1)
        clock.forward(LEFT_S + 1)
        with pytest.raises(ProviderUnavailable) as caught:
            await token(pocket, "read")
        assert not elsewhere.token_errors
        assert not elsewhere.token_requests
    watch.assert_clean(
        [*server.issued_access_tokens, *server.issued_refresh_tokens, "acme-secret"],
        caught.value,
    )
    assert await state(pocket, "read") == "DO_REFRESH"
    assert await pocket.prepare(asks(pocket, "read"), **on()) is None
    server.clear_faults()
    clock.forward(61)
    assert (await token(pocket, "read")).access_token == server.issued_access_tokens[-1]
    assert server.token_requests["refresh_token"] == 1


async def test_retry_after_is_honoured_up_to_a_minute(
    pocket: PocketAuth, server: AuthorizationServer, alice: Browser, clock: Clock
) -> None:
    """Nothing is sent before the server wants to hear of us again."""
    await connect(pocket, alice, "read")
    clock.forward(3601)
    server.fault(503, times=1, retry_after=45, **REFRESH)
    with pytest.raises(ProviderUnavailable) as caught:
        await token(pocket, "read")
    assert caught.value.retry_after_s == 45
    clock.forward(40)
    with pytest.raises(ProviderUnavailable):
        await token(pocket, "read")
    clock.forward(6)
    await token(pocket, "read")
    assert server.fired["503"] == 1


async def test_lost_answer_is_asked_for_once_more(
    pocket: PocketAuth, server: AuthorizationServer, alice: Browser, clock: Clock
) -> None:
    """A server that allows for lost answers gives the session back."""
    server.reuse_grace_s = 10
    await connect(pocket, alice, "read")
    clock.forward(3601)
    server.fault("drop_after", **REFRESH)
    context = await token(pocket, "read")
    assert context.access_token == server.issued_access_tokens[-1]
    assert server.token_requests["refresh_token"] == 2


@pytest.mark.parametrize("why", ["lost answer", "revoked", "invalid_grant"])
async def test_grant_that_is_over_needs_consent_and_keeps_its_record(
    pocket: PocketAuth,
    server: AuthorizationServer,
    alice: Browser,
    clock: Clock,
    why: str,
) -> None:
    """DO_AUTH with a new link; the record stays until the new consent replaces it."""
    await connect(pocket, alice, "read")
    clock.forward(3601)
    if why == "lost answer":
        server.fault("drop_after", **REFRESH)
    elif why == "revoked":
        server.revoke_grants("alice")
    else:
        server.fault("invalid_grant", **REFRESH)
    with pytest.raises(AuthorizationRequired, match="DO_AUTH"):
        await token(pocket, "read")
    errors = server.token_errors.total()
    assert await state(pocket, "read") == "DO_AUTH"
    assert await pocket.get_auth_context("acme") is not None
    assert await link(pocket, "read")
    assert server.token_errors.total() == errors
    await connect(pocket, alice, "read")
    assert await state(pocket, "read") == "SKIP_AUTH"


async def test_refused_renewal_leaves_the_old_token_its_last_minute(
    pocket: PocketAuth, server: AuthorizationServer, alice: Browser, clock: Clock
) -> None:
    """Consent is asked for when the token is over, not before."""
    old = await connect(pocket, alice, "read")
    clock.forward(IN_WINDOW_S)
    server.fault("invalid_grant", times=9, **REFRESH)
    for _ in range(3):
        assert (await token(pocket, "read")).access_token == old.access_token
    assert server.fired["invalid_grant"] == 1
    clock.forward(LEFT_S + 1)
    assert await state(pocket, "read") == "DO_AUTH"


async def test_refusals_nobody_can_read_end_in_consent_after_three(
    pocket: PocketAuth, server: AuthorizationServer, alice: Browser, clock: Clock
) -> None:
    """An odd error is taken for trouble twice, spaced out, and then for an end."""
    await connect(pocket, alice, "read")
    clock.forward(3601)
    server.fault("error200", times=9, **REFRESH)
    for _ in range(2):
        with pytest.raises(ProviderUnavailable):
            await token(pocket, "read")
        with pytest.raises(ProviderUnavailable):
            await token(pocket, "read")
        clock.forward(61)
    with pytest.raises(AuthorizationRequired):
        await token(pocket, "read")
    assert server.fired["error200"] == 3


async def test_refused_app_is_the_developers_trouble_and_logs_nobody_out(
    make_pocket: Make, server: AuthorizationServer, alice: Browser, clock: Clock
) -> None:
    """`invalid_client` is a ConfigurationError; no session is touched."""
    store = Watched("memory://")
    pocket = make_pocket(store, keys=KEYS, session_cache_ttl=timedelta())
    people = [f"user-{n}" for n in range(5)]
    old = {name: await connect(pocket, alice, "read", owner=name) for name in people}
    rows = [await store.list(f"user:{name}") for name in people]
    clock.forward(IN_WINDOW_S)
    server.fault("invalid_client", times=20, **REFRESH)
    for name in people:
        for _ in range(3):
            context = await token(pocket, "read", owner=name)
            assert context.access_token == old[name].access_token
    assert server.fired["invalid_client"] == 5
    clock.forward(LEFT_S + 1)
    for name in people:
        with pytest.raises(ConfigurationError, match="client id and secret"):
            await token(pocket, "read", owner=name)
    assert [await store.list(f"user:{name}") for name in people] == rows
    server.clear_faults()
    for name in people:
        await token(pocket, "read", owner=name)


# -------------------------------------------------------------------- while it runs


async def test_session_deleted_during_a_refresh_does_not_come_back(
    pocket: PocketAuth, server: AuthorizationServer, alice: Browser, clock: Clock
) -> None:
    """The token that arrives too late is revoked."""
    await connect(pocket, alice, "read")
    clock.forward(3601)
    server.fault("slow", delay_s=0.4, **REFRESH)
    refreshing = asyncio.create_task(token(pocket, "read"))
    await asyncio.sleep(0.15)
    # The provider cannot be told just now, so the old refresh token still works.
    server.fault(500, times=2, path="/revoke")
    assert await pocket.delete_session("acme")
    with pytest.raises(AuthorizationRequired, match="NO_SESSION"):
        await asyncio.wait_for(refreshing, BOUND_S)
    assert await state(pocket, "read") == "NO_SESSION"
    assert server.token_requests["refresh_token"] == 1
    late = server.find_token(server.issued_access_tokens[-1])
    assert late is not None
    assert late.is_revoked()


@pytest.mark.parametrize("cancelled", [1, 5])
async def test_cancelled_callers_do_not_stop_the_refresh(
    pocket: PocketAuth,
    server: AuthorizationServer,
    alice: Browser,
    clock: Clock,
    cancelled: int,
) -> None:
    """The others get the new token; even with none left it is stored."""
    await connect(pocket, alice, "read")
    clock.forward(3601)
    server.fault("slow", delay_s=0.3, **REFRESH)
    callers = [asyncio.create_task(token(pocket, "read")) for _ in range(5)]
    await asyncio.sleep(0.1)
    for caller in callers[:cancelled]:
        caller.cancel()
    found = await asyncio.gather(*callers, return_exceptions=True)
    assert sum(isinstance(f, asyncio.CancelledError) for f in found) == cancelled
    context = await token(pocket, "read")
    assert {f.access_token for f in found[cancelled:]} <= {context.access_token}
    assert context.access_token == server.issued_access_tokens[-1]
    assert server.token_requests["refresh_token"] == 1


async def test_new_consent_during_a_refresh_wins(
    pocket: PocketAuth, server: AuthorizationServer, alice: Browser, clock: Clock
) -> None:
    """A session that was replaced meanwhile is not overwritten by the old grant."""
    await connect(pocket, alice, "read")
    url = await link(pocket, "read", "write")
    clock.forward(3590)
    server.fault("slow", delay_s=0.4, **REFRESH)
    refreshing = asyncio.create_task(token(pocket, "read"))
    await asyncio.sleep(0.1)
    await alice.avisit(url)
    await asyncio.wait_for(refreshing, BOUND_S)
    assert await state(pocket, "read", "write") == "SKIP_AUTH"


async def test_refresh_that_runs_is_finished_before_closing(
    make_pocket: Make,
    server: AuthorizationServer,
    alice: Browser,
    clock: Clock,
    tmp_path: Path,
) -> None:
    """A rotated refresh token that is on its way is stored, not lost."""
    pocket = make_pocket(f"sqlite:///{tmp_path}/p.db", keys=KEYS)
    await connect(pocket, alice, "read")
    clock.forward(3601)
    server.fault("slow", delay_s=0.3, **REFRESH)
    refreshing = asyncio.create_task(token(pocket, "read"))
    await asyncio.sleep(0.1)
    await pocket.aclose()
    assert (await refreshing).access_token == server.issued_access_tokens[-1]
    assert (await token(pocket, "read")).access_token == server.issued_access_tokens[-1]
    assert server.token_requests["refresh_token"] == 1


# ------------------------------------------------------- a store that is away meanwhile


class Outage:
    """A store that is away as soon as the provider has answered a refresh."""

    def __init__(
        self,
        store: Watched,
        server: AuthorizationServer,
        monkeypatch: Any,
        calls: tuple[str, ...] = (),
    ) -> None:
        monkeypatch.setattr(f"{SAVING}.SAVE_LIMIT_S", 0.3)
        monkeypatch.setattr(f"{SAVING}.SAVE_EVERY_S", 0.05)
        self._store, self._server, self._calls = store, server, calls
        store.before = self._before

    async def _before(self, name: str, _key: Any) -> None:
        broken = not self._calls or name in self._calls
        if broken and self._server.token_requests["refresh_token"]:
            raise StorageUnavailable("the store is away")

    def end(self) -> None:
        """Let it be back."""
        self._store.before = None


@pytest.fixture
def shared(clock: Clock) -> Watched:
    """A store for several pockets, on the same clock."""
    return Watched(
        MemoryBackend(clock=lambda: time.time() + clock.ahead.total_seconds())
    )


@pytest.fixture
def pair(make_pocket: Make, shared: Watched) -> tuple[PocketAuth, PocketAuth, Watched]:
    """Two pockets on one store, and what is between it and the first."""
    between, base = Watched(shared), f"http://127.0.0.1:{free_port()}"
    one, two = (
        make_pocket(s, keys=KEYS, base_url=base, session_cache_ttl=timedelta())
        for s in (between, shared)
    )
    return one, two, between


@pytest.mark.parametrize("meanwhile", ["nothing", "deleted", "connected anew"])
async def test_token_that_cannot_be_saved_is_used_and_saved_later(
    pair: tuple[PocketAuth, PocketAuth, Watched],
    server: AuthorizationServer,
    alice: Browser,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    meanwhile: str,
) -> None:
    """Callers have it from memory; a record that changed meanwhile counts more."""
    pocket, other, between = pair
    await connect(other, alice, "read")
    url = await link(other, "read", "write")
    clock.forward(3601)
    outage = Outage(between, server, monkeypatch)
    with LeakWatch() as watch:
        found = await asyncio.gather(*(token(pocket, "read") for _ in range(3)))
        new = server.issued_access_tokens[-1]
        assert {context.access_token for context in found} == {new}
        with pytest.raises(StorageUnavailable):
            await token(pocket, "read")
    assert "CRITICAL" in {record.levelname for record in caplog.records}
    watch.assert_clean([*server.issued_access_tokens, *server.issued_refresh_tokens])
    if meanwhile == "deleted":
        await other.delete_session("acme")
    elif meanwhile == "connected anew":
        await alice.avisit(url)
    kept = server.issued_access_tokens[-1]
    outage.end()

    async def decided() -> bool:
        if meanwhile == "deleted":
            return server.find_token(new).is_revoked()
        return (await token(other, "read")).access_token == kept

    if meanwhile == "nothing":
        # Until it is saved the lease keeps others from sending what is spent.
        assert (await token(other, "read")).access_token == new
    await until(decided)
    expected = "NO_SESSION" if meanwhile == "deleted" else "SKIP_AUTH"
    assert await state(pocket, "read") == expected
    assert server.token_requests["refresh_token"] == 1


async def test_others_wait_while_a_token_cannot_be_saved(
    pair: tuple[PocketAuth, PocketAuth, Watched],
    server: AuthorizationServer,
    alice: Browser,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The lease is held on to: nobody sends the spent token that is still stored."""
    pocket, other, between = pair
    await connect(other, alice, "read")
    clock.forward(3601)
    outage = Outage(between, server, monkeypatch, ("put",))
    new = await token(pocket, "read")
    waiting = asyncio.create_task(token(other, "read"))
    for ahead in (20, 20):  # longer than a lease
        await asyncio.sleep(0.15)
        clock.forward(ahead)
    assert (await token(pocket, "read")).access_token == new.access_token
    assert not waiting.done()
    outage.end()
    found = await asyncio.wait_for(waiting, BOUND_S)
    assert found.access_token == new.access_token
    assert server.token_requests["refresh_token"] == 1


async def test_token_that_cannot_be_saved_gets_a_last_chance_on_closing(
    pair: tuple[PocketAuth, PocketAuth, Watched],
    server: AuthorizationServer,
    alice: Browser,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The store is back just before the pocket is closed: the grant survives."""
    pocket, other, between = pair
    await connect(pocket, alice, "read")
    clock.forward(3601)
    outage = Outage(between, server, monkeypatch)
    monkeypatch.setattr(f"{SAVING}.SAVE_EVERY_S", 60.0)
    new = await token(pocket, "read")
    outage.end()
    await asyncio.wait_for(pocket.aclose(), BOUND_S)
    assert (await token(other, "read")).access_token == new.access_token
    assert server.token_requests["refresh_token"] == 1


async def test_token_that_is_never_saved_does_not_keep_the_pocket_open(
    pair: tuple[PocketAuth, PocketAuth, Watched],
    server: AuthorizationServer,
    alice: Browser,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One more try, then the operator is told that the grant is lost."""
    pocket, _, between = pair
    await connect(pocket, alice, "read")
    clock.forward(3601)
    Outage(between, server, monkeypatch)
    await token(pocket, "read")
    await asyncio.wait_for(pocket.aclose(), 2)
    assert "a refreshed token is lost: the store is away" in caplog.messages


async def test_answer_of_the_store_that_was_lost_is_no_lost_token(
    pair: tuple[PocketAuth, PocketAuth, Watched],
    server: AuthorizationServer,
    alice: Browser,
    clock: Clock,
) -> None:
    """What was saved without our knowing is found to be ours."""
    pocket, _, between = pair
    told: list[str] = []
    pocket.on_event(lambda event: told.append(event.type))
    await connect(pocket, alice, "read")
    clock.forward(3601)
    put, lost = between.put, []

    async def losing(key: Any, *args: Any, **kwargs: Any) -> bool:
        done = await put(key, *args, **kwargs)
        if "session" in key[1] and not lost:
            lost.append(done)
            raise StorageUnavailable("no answer")
        return done

    between.put = losing  # type: ignore[method-assign]
    context = await token(pocket, "read")
    assert lost == [True]
    assert context.access_token == server.issued_access_tokens[-1]
    assert not server.revocations
    assert await state(pocket, "read") == "SKIP_AUTH"

    async def heard() -> bool:
        return told == ["connected", "refreshed"]

    await until(heard)


async def test_process_that_stood_still_longer_than_its_lease_sends_nothing_old(
    pair: tuple[PocketAuth, PocketAuth, Watched],
    server: AuthorizationServer,
    alice: Browser,
    clock: Clock,
) -> None:
    """Just before it would send, somebody else has renewed: it looks again."""
    pocket, other, between = pair
    await connect(pocket, alice, "read")
    clock.forward(3601)
    get, leased, stood = between.get, [], []

    async def before(name: str, key: Any) -> None:
        if name == "lease" and "session" in key[1]:
            leased.append(key)

    async def getting(key: Any) -> Any:
        found = await get(key)
        if leased and not stood:  # the last look before the request
            stood.append(found)
            clock.forward(31)
            await token(other, "read")
        return found

    between.before, between.get = before, getting  # type: ignore[method-assign]
    context = await token(pocket, "read")
    assert stood
    assert context.access_token == server.issued_access_tokens[-1]
    assert server.token_requests["refresh_token"] == 1


# -------------------------------------------------------------------- what a call costs


@pytest.mark.parametrize("cache_s", [0, 5])
async def test_authorized_call_reads_once_at_most_and_writes_nothing(
    make_pocket: Make,
    server: AuthorizationServer,
    alice: Browser,
    storage: str,
    cache_s: int,
) -> None:
    """One read for a valid session, none when it was valid a moment ago."""
    store = Watched(storage)
    pocket = make_pocket(store, keys=KEYS, session_cache_ttl=timedelta(seconds=cache_s))
    await connect(pocket, alice, "read")
    store.reads = store.writes = 0
    for _ in range(10):
        await token(pocket, "read")
    assert store.writes == 0
    assert store.reads == (0 if cache_s else 10)
    assert (await token(pocket, "read")).access_token == server.issued_access_tokens[-1]


async def test_own_writes_are_seen_at_once_in_spite_of_the_cache(
    make_pocket: Make, alice: Browser, storage: str
) -> None:
    """A disconnect is not answered from memory for five more seconds."""
    pocket = make_pocket(storage, keys=KEYS)
    await connect(pocket, alice, "read")
    assert await state(pocket, "read") == "SKIP_AUTH"
    await pocket.delete_session("acme")
    assert await state(pocket, "read") == "NO_SESSION"
