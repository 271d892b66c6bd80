"""Grants that are given back: once, by whoever can, whatever goes wrong meanwhile."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

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

from langchain_pocket_auth import Event, Owner, PocketAuth, StorageUnavailable
from langchain_pocket_auth.storage import Key
from langchain_pocket_auth.testing import AuthorizationServer, Browser, LeakWatch

Make = Callable[..., PocketAuth]
REVOKE = {"path": "/revoke"}
MINUTE, HOUR = 60, 3600
OWNER = Owner("thread", "default")


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


class Heard:
    """The events of pockets."""

    def __init__(self, *pockets: PocketAuth) -> None:
        self.events: list[Event] = []
        for pocket in pockets:
            pocket.on_event(self.events.append)

    async def ends(self, *expected: str) -> Event:
        """Wait until this is how it ended; return the last event."""
        wanted = list(expected)

        async def told() -> bool:
            return [e.type for e in self.events][-len(wanted) :] == wanted

        await until(told)
        return self.events[-1]


async def owed(store: Watched) -> int:
    """Return how many grants are still to be given back."""
    return len(await store.inner.list("outbox"))


def breaks(store: Watched, call: str, namespace: str) -> None:
    """Let the store be away for these calls."""

    async def before(name: str, key: Key) -> None:
        if (name, key[0]) == (call, namespace):
            raise StorageUnavailable("the store is away")

    store.before = before


# ------------------------------------------------------------------- tried again


@pytest.mark.parametrize("fault", [500, 503, 429, "502", "invalid_client", "reset"])
async def test_grant_is_given_back_when_the_provider_listens_again(
    pocket: PocketAuth,
    server: AuthorizationServer,
    store: Watched,
    alice: Browser,
    clock: Clock,
    fault: Any,
) -> None:
    """Gone here at once; what the provider misses it is told a minute later, once."""
    heard = Heard(pocket)
    context = await connect(pocket, alice, "read")
    server.fault(fault, times=2, **REVOKE)
    with LeakWatch() as watch:
        assert await pocket.delete_session("acme")
        assert await state(pocket, "read") == "NO_SESSION"
        assert server.revocations == 0
        assert (await pocket.housekeeping())["given_back"] == 0
        server.clear_faults()
        clock.forward(MINUTE + 1)
        assert (await pocket.housekeeping())["given_back"] == 1
    assert server.revocations == 2
    assert server.find_token(context.access_token).is_revoked()
    assert await owed(store) == 0
    assert (await pocket.housekeeping())["given_back"] == 0
    event = await heard.ends("revoked", "given_back")
    assert (event.provider, event.scopes) == ("acme", ("read",))
    watch.assert_clean([*server.issued_access_tokens, *server.issued_refresh_tokens])


async def test_provider_says_when_it_wants_to_be_asked_again(
    pocket: PocketAuth, server: AuthorizationServer, alice: Browser, clock: Clock
) -> None:
    """A Retry-After that is longer than our pause is kept (RFC 7009 section 2.2.1)."""
    await connect(pocket, alice, "read")
    server.fault(503, times=2, retry_after=600, **REVOKE)
    await pocket.delete_session("acme")
    clock.forward(590)
    assert (await pocket.housekeeping())["given_back"] == 0
    clock.forward(11)
    assert (await pocket.housekeeping())["given_back"] == 1


async def test_pauses_grow_and_end_after_three_days(
    pocket: PocketAuth,
    server: AuthorizationServer,
    store: Watched,
    alice: Browser,
    clock: Clock,
) -> None:
    """After 1, 5, 30 minutes, 2 hours, then every 6; then the record is erased."""
    heard = Heard(pocket)
    await connect(pocket, alice, "read")
    server.fault(500, times=999, **REVOKE)
    await pocket.delete_session("acme")
    pauses = [MINUTE, 5 * MINUTE, 30 * MINUTE, 2 * HOUR, *[6 * HOUR] * 11]
    pauses.append(72 * HOUR - sum(pauses))
    for number, pause in enumerate(pauses, start=1):
        clock.forward(pause - 2)
        await pocket.housekeeping()
        assert server.fired["500"] == 2 * number
        clock.forward(2)
        await pocket.housekeeping()
        assert server.fired["500"] == 2 * number + 2
    event = await heard.ends("not_given_back")
    assert event.reason
    assert await owed(store) == 0


@pytest.mark.parametrize("refused", ["refresh token", "access token"])
async def test_refusal_of_the_refresh_token_alone_ends_the_tries(
    pocket: PocketAuth,
    server: AuthorizationServer,
    store: Watched,
    alice: Browser,
    refused: str,
) -> None:
    """With it the grant is over, though a server may not revoke access tokens."""
    heard = Heard(pocket)
    await connect(pocket, alice, "read")
    if refused == "access token":
        server.fault("slow", **REVOKE)
    server.fault("invalid_grant", **REVOKE)
    await pocket.delete_session("acme")
    told = "given_back" if refused == "access token" else "not_given_back"
    await heard.ends("revoked", told)
    assert server.revocations == 1
    assert await owed(store) == 0


async def test_nothing_is_written_down_for_a_provider_that_revokes_nothing(
    make_pocket: Make, server: AuthorizationServer, store: Watched, alice: Browser
) -> None:
    """Without a place to give it back to there is nothing to try."""
    base = f"http://127.0.0.1:{free_port()}"
    mute = provider(server, "mute", revocation_endpoint=None)
    pocket = make_pocket(
        store, keys=KEYS, base_url=base, providers=[mute], clients={"mute": ACME}
    )
    server.register(
        client_id=ACME[0],
        client_secret=ACME[1],
        redirect_uris=[f"{base}/auth/mute/oauth2/callback"],
    )
    await connect(pocket, alice, "read", provider="mute")
    breaks(store, "put", "outbox")
    assert await pocket.delete_session("mute")
    assert await state(pocket, "read", provider="mute") == "NO_SESSION"


# --------------------------------------------------------------- several at once


async def test_one_of_several_replicas_gives_a_grant_back(
    make_pocket: Make,
    server: AuthorizationServer,
    alice: Browser,
    clock: Clock,
    tmp_path: Path,
) -> None:
    """All keep house at the same time; the provider is told once."""
    url, base = f"sqlite:///{tmp_path}/p.db", f"http://127.0.0.1:{free_port()}"
    pockets = [make_pocket(url, keys=KEYS, base_url=base) for _ in range(2)]
    who = [f"user-{n}" for n in range(3)]
    for name in who:
        await connect(pockets[0], alice, "read", owner=name)
    server.fault(500, times=6, **REVOKE)
    for name in who:
        await pockets[1].delete_session("acme", owner=name)
    clock.forward(MINUTE + 1)
    done = await asyncio.gather(*(p.housekeeping() for p in pockets))
    assert sum(d["given_back"] for d in done) == 3
    assert server.revocations == 6


async def test_many_who_disconnect_at_once_give_back_once(
    pocket: PocketAuth, server: AuthorizationServer, store: Watched, alice: Browser
) -> None:
    """Only who deleted the session tells the provider."""
    await connect(pocket, alice, "read")
    found = await asyncio.gather(*(pocket.delete_session("acme") for _ in range(5)))
    assert found.count(True) == 1
    assert server.revocations == 2
    assert await owed(store) == 0


async def test_grant_is_kept_until_somebody_has_its_handler_again(
    make_pocket: Make,
    server: AuthorizationServer,
    alice: Browser,
    clock: Clock,
    tmp_path: Path,
) -> None:
    """A deployment without the provider deletes; one with it gives the grant back."""
    url = f"sqlite:///{tmp_path}/p.db"
    knows = make_pocket(url, keys=KEYS)
    forgot = PocketAuth(url, keys=KEYS, base_url=f"http://127.0.0.1:{free_port()}")
    try:
        await connect(knows, alice, "read")
        assert await forgot.delete_session("acme")
        clock.forward(MINUTE + 1)
        assert (await forgot.housekeeping())["given_back"] == 0
        assert server.revocations == 0
        clock.forward(5 * MINUTE)
        assert (await knows.housekeeping())["given_back"] == 1
        assert server.revocations == 2
    finally:
        await forgot.aclose()


@pytest.mark.parametrize("who", ["alice", "bob"])
async def test_grant_of_an_account_that_is_connected_anew_is_left_alone(
    make_pocket: Make,
    server: AuthorizationServer,
    store: Watched,
    alice: Browser,
    clock: Clock,
    who: str,
) -> None:
    """Many providers would end the new one with it; another account's is revoked."""
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
    heard = Heard(pocket)
    old = await connect(pocket, alice, *scopes, provider="open")
    server.fault(500, times=2, **REVOKE)
    await pocket.delete_session("open")
    new = await connect(pocket, Browser(who), *scopes, provider="open")
    clock.forward(MINUTE + 1)
    await pocket.housekeeping()
    await heard.ends("connected", "not_given_back" if who == "alice" else "given_back")
    assert server.find_token(old.access_token).is_revoked() is (who == "bob")
    assert not server.find_token(new.access_token).is_revoked()
    assert await owed(store) == 0


# ------------------------------------------------------- what dies in between


@pytest.mark.parametrize(
    ("call", "namespace"), [("put", "outbox"), ("delete", "thread:default")]
)
async def test_store_that_is_away_leaves_the_connection_or_ends_it_later(
    pocket: PocketAuth,
    server: AuthorizationServer,
    store: Watched,
    alice: Browser,
    clock: Clock,
    call: str,
    namespace: str,
) -> None:
    """The caller is told; nothing reaches the provider before the session is gone."""
    await connect(pocket, alice, "read")
    await store.inner.delete(next(iter(await futures(store))))
    breaks(store, call, namespace)
    with pytest.raises(StorageUnavailable):
        await pocket.delete_session("acme")
    store.before = None
    assert await state(pocket, "read") == "SKIP_AUTH"
    assert server.revocations == 0
    clock.forward(MINUTE + 1)
    await pocket.housekeeping()
    written_down = call == "delete"
    assert await state(pocket, "read") == (
        "NO_SESSION" if written_down else "SKIP_AUTH"
    )
    assert server.revocations == (2 if written_down else 0)


async def futures(store: Watched) -> list[Key]:
    """Return where the person's futures are."""
    space = "thread:default"
    return [(space, n) for n in await store.inner.list(space) if "future" in n]


async def test_grant_is_given_back_although_that_cannot_be_written_down(
    pocket: PocketAuth, server: AuthorizationServer, store: Watched, alice: Browser
) -> None:
    """One that arrives for a deleted connection is revoked with the store away, too."""
    heard = Heard(pocket)
    callback = await answer_url(alice, await link(pocket, "read"))
    server.fault("slow", delay_s=0.3)
    answering = asyncio.create_task(deliver(callback))
    await asyncio.sleep(0.1)
    await pocket.delete_session("acme")
    breaks(store, "put", "outbox")
    assert (await asyncio.wait_for(answering, 5)).status_code == 410
    assert server.revocations == 2
    await heard.ends("given_back")


async def test_provider_is_told_again_if_that_could_not_be_noted(
    pocket: PocketAuth,
    server: AuthorizationServer,
    store: Watched,
    alice: Browser,
    clock: Clock,
) -> None:
    """Unknown tokens are revoked already (RFC 7009 section 2.2); told is once."""
    heard = Heard(pocket)
    await connect(pocket, alice, "read")
    breaks(store, "delete", "outbox")
    assert await pocket.delete_session("acme")
    assert server.revocations == 2
    store.before = None
    clock.forward(MINUTE + 1)
    assert (await pocket.housekeeping())["given_back"] == 1
    await heard.ends("revoked", "given_back")
    assert await owed(store) == 0


CHILD = """
import asyncio, os, sys
from langchain_pocket_auth import PocketAuth, Provider
from langchain_pocket_auth._vault import Session, Vault
url, keys, base, issuer, moment = sys.argv[1:]
pocket = PocketAuth(url, keys=keys, base_url=base, clients={"acme": ("acme-client", "acme-secret")},
    providers=[Provider(id="acme", authorization_endpoint=issuer + "/authorize", token_endpoint=issuer + "/token",
                        revocation_endpoint=issuer + "/revoke")])
delete = Vault.delete
async def dies(self, old):
    if moment == "before":
        os._exit(9)
    assert await delete(self, old)
    os._exit(9)
Vault.delete = dies
asyncio.run(pocket.delete_session("acme"))
"""


@pytest.mark.parametrize("moment", ["before", "after"])
async def test_what_a_killed_process_has_begun_is_finished(
    make_pocket: Make,
    server: AuthorizationServer,
    alice: Browser,
    clock: Clock,
    tmp_path: Path,
    moment: str,
) -> None:
    """It dies just before or after the deletion: deleted and given back it is."""
    url, base = f"sqlite:///{tmp_path}/p.db", f"http://127.0.0.1:{free_port()}"
    pocket = make_pocket(url, keys=KEYS, base_url=base, session_cache_ttl=timedelta())
    await connect(pocket, alice, "read")
    arguments = [url, KEYS, base, server.issuer, moment]
    run = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", CHILD, *arguments],
        timeout=30,
        check=False,
    )
    assert run.returncode == 9
    assert server.revocations == 0
    before = await state(pocket, "read")
    assert before == ("SKIP_AUTH" if moment == "before" else "NO_SESSION")
    clock.forward(MINUTE + 1)
    assert (await pocket.housekeeping())["given_back"] == 1
    assert await state(pocket, "read") == "NO_SESSION"
    assert server.revocations == 2


async def test_session_that_was_renewed_after_the_killed_delete_stays(
    pocket: PocketAuth, server: AuthorizationServer, alice: Browser, clock: Clock
) -> None:
    """Nobody was told that it is gone, and it is in use: it is not taken away."""
    await connect(pocket, alice, "read")

    async def begin(engine: Any) -> None:
        [(key, stored, _)] = await engine.connections.sessions(OWNER)
        await engine._outbox._owe(key, stored)  # and dies

    await pocket._service.ask(begin)
    clock.forward(HOUR + 1)
    await token(pocket, "read")
    await pocket.housekeeping()
    assert await state(pocket, "read") == "SKIP_AUTH"
    assert server.revocations == 0
