"""What happens when parts fail: the cases that no other file is about."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from conftest import free_port
from support import KEYS, Clock, Watched, asks, connect, on, state, token

from langchain_pocket_auth import Owner, PocketAuth, StorageUnavailable
from langchain_pocket_auth.testing import AuthorizationServer, Browser

Make = Callable[..., PocketAuth]

# Dies between lease and request; its lease is short, so that nobody waits long.
DIES = """
import asyncio, os, sys
from datetime import timedelta
from langchain_pocket_auth import PocketAuth, Provider, _refresh
from langchain_pocket_auth.handlers import OAuth2Handler
url, keys, base, issuer = sys.argv[1:]
_refresh.LEASE = timedelta(seconds=1)

class Handler(OAuth2Handler):
    row = Provider(id="acme", authorization_endpoint=issuer + "/authorize", token_endpoint=issuer + "/token")

    async def refresh(self, *args, **kwargs):
        os._exit(9)

pocket = PocketAuth(url, keys=keys, base_url=base, clients={"acme": ("acme-client", "acme-secret")}, handlers=[Handler])
request = pocket.make_request(["read"], auth_provider="acme")
asyncio.run(pocket.authenticate(request, auth_provider="acme", thread_id="default", timeout=0))
"""


async def test_lease_of_a_dead_process_is_taken_over(
    make_pocket: Make, server: AuthorizationServer, alice: Browser, tmp_path: Path
) -> None:
    """Who died with the lease delays the next caller, who renews and asks nobody."""
    url, base = f"sqlite:///{tmp_path}/p.db", f"http://127.0.0.1:{free_port()}"
    pocket = make_pocket(url, keys=KEYS, base_url=base, session_cache_ttl=timedelta())
    server.access_token_ttl_s = 1
    first = await connect(pocket, alice, "read")
    server.access_token_ttl_s = 3600
    await asyncio.sleep(1.0)
    died = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", DIES, url, KEYS, base, server.issuer],
        check=False,
        timeout=30,
    )
    assert died.returncode == 9
    second = await token(pocket, "read")
    assert second.access_token != first.access_token
    assert server.token_requests["refresh_token"] == 1
    assert server.refresh_token_reuses == server.revoked_families == 0


async def test_store_that_is_away_is_no_missing_session(
    make_pocket: Make, alice: Browser
) -> None:
    """Nobody is asked again because a store does not answer, and it recovers."""
    store = Watched("memory://")
    pocket = make_pocket(store, keys=KEYS, session_cache_ttl=timedelta())
    await connect(pocket, alice, "read")

    async def away(*_: object) -> None:
        raise StorageUnavailable("the store does not answer")

    store.before = away
    with pytest.raises(StorageUnavailable):
        await token(pocket, "read")
    with pytest.raises(StorageUnavailable):
        await state(pocket, "read")
    with pytest.raises(StorageUnavailable):
        await pocket.prepare(asks(pocket, "read"), **on())
    store.before = None
    assert await state(pocket, "read") == "SKIP_AUTH"
    assert (await store.list("thread:default")).keys() & {"ticket"} == set()


ODD = [
    "a__b",
    "a",
    "b",
    "*",
    ".*",
    "a:b",
    "a/b",
    "%",
    "_",
    "A",
    "\u0430",
    "\u00e9",
    "e\u0301",
]
ODD += ["x" * 1024, " ", "user:a", "[a]", "{a}", "'", '"', "\\", "\n"]


@pytest.mark.parametrize("store", ["memory", "sqlite", "postgres", "redis"])
async def test_owners_of_odd_names_never_meet(
    make_pocket: Make,
    server: AuthorizationServer,
    store: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """No name is a pattern, a separator or another name, on any store."""
    del server
    url = {"memory": "memory://", "sqlite": f"sqlite:///{tmp_path}/s.db"}.get(store)
    if url is None:
        running = request.getfixturevalue(f"{store}_server")
        url = running.url(running.fresh())
    pocket = make_pocket(url, keys=KEYS)
    asked = asks(pocket, "read")
    owners = [Owner(kind, name) for kind in ("user", "thread") for name in ODD]
    links = [await pocket.prepare(asked, **on(owner=owner)) for owner in owners]
    assert len(set(links)) == len(owners)
    for owner, known in zip(owners, links, strict=True):
        assert await pocket.prepare(asked, **on(owner=owner)) == known
        assert await pocket.list_session_state(owner=owner) == []


@pytest.mark.parametrize("minutes", [-10, 10])
async def test_wrong_clock_makes_no_storm(
    make_pocket: Make,
    server: AuthorizationServer,
    alice: Browser,
    monkeypatch: pytest.MonkeyPatch,
    minutes: int,
) -> None:
    """A process whose clock is wrong renews at most once, and its token is good."""
    store = Watched("memory://")
    base = f"http://127.0.0.1:{free_port()}"
    off = {"keys": KEYS, "base_url": base, "session_cache_ttl": timedelta()}
    server.access_token_ttl_s = 620
    await connect(make_pocket(store, **off), alice, "read")
    Clock(monkeypatch).forward(60 * minutes)
    other = make_pocket(store, **off)
    for _ in range(20):
        context = await token(other, "read")
    assert context.access_token in server.issued_access_tokens
    assert server.token_requests["refresh_token"] <= 1
    assert server.refresh_token_reuses == 0
