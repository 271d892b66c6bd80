"""
What a million sessions cost: `python tests/benchmarks/million.py [--quick]`.

On SQLite and PostgreSQL a small and a large store are filled with sealed records, of
owners with four connections each, and one link with a lifetime to every ten sessions.
Then both stores take turns, because absolute times drift on shared machines; figures
are medians. Every check reads the store: nothing is remembered.

A sweep that erases costs more in a large store, because what it erases lies on as many
pages there, and on few in a small one; it depends on their number, not on the store's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import secrets
import sqlite3
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import psycopg

sys.path.insert(0, str(Path(__file__).parents[1]))

from databases import Postgres

from langchain_pocket_auth import AuthState, Owner, PocketAuth
from langchain_pocket_auth._models import SessionKey
from langchain_pocket_auth._seal import KeyRing, new_key
from langchain_pocket_auth._vault import Pointer, Session, ticket_key
from langchain_pocket_auth.storage import StorageBackend, storage_from_url
from langchain_pocket_auth.testing import AuthorizationServer, Browser, free_port

SMALL, LARGE, QUICK = 1_000, 1_000_000, 50_000
PLACES = [(p, f) for p in ("acme", "zeta") for f in ("default", "work")]
SWEPT = 100
COLUMNS = "namespace, name, version, value, expires_at"
Row = tuple[str, str, int, bytes, float | None]


@dataclass
class Store:
    """A store with so many sessions, and a pocket on it."""

    sessions: int
    backend: StorageBackend
    pocket: PocketAuth

    def owner(self) -> Owner:
        return Owner("user", f"u{random.randrange(self.sessions // len(PLACES))}")

    async def check(self) -> float:
        request = self.pocket.make_request(["read"], auth_provider="zeta")
        owner, begun = self.owner(), time.perf_counter()
        standing = await self.pocket.check(
            request, auth_provider="zeta", profile="work", owner=owner
        )
        spent = time.perf_counter() - begun
        assert standing is AuthState.SKIP_AUTH, standing
        return spent

    async def list(self) -> float:
        owner, begun = self.owner(), time.perf_counter()
        found = await self.pocket.connections(owner)
        spent = time.perf_counter() - begun
        assert len(found) == len(PLACES)
        return spent

    async def sweep(self) -> float:
        now = timedelta()
        while True:
            for _ in range(SWEPT):
                key = ticket_key(secrets.token_urlsafe())
                await self.backend.put(key, b"", version=1, expected=None, ttl=now)
            begun = time.perf_counter()
            erased = await self.backend.sweep()
            spent = time.perf_counter() - begun
            if erased == SWEPT:  # else the pocket's housekeeping came first
                return spent

    async def sweep_nothing(self) -> float:
        begun = time.perf_counter()
        erased = await self.backend.sweep()
        spent = time.perf_counter() - begun
        assert erased == 0, erased
        return spent

    async def walk(self) -> float:
        after = json.dumps([self.owner().namespace, ""])
        begun = time.perf_counter()
        page = await self.backend.walk(after=after)
        spent = time.perf_counter() - begun
        assert page.records
        return spent


class World:
    """An authorization server, keys, and what a person's consent left in a store."""

    def __init__(self) -> None:
        self.stack = AsyncExitStack()
        self.server = self.stack.enter_context(AuthorizationServer())
        self.written = new_key()
        self.connections: dict[str, str] = {}
        self.keys = KeyRing.parse(self.written)
        self.base = f"http://127.0.0.1:{free_port()}"
        for name in ("acme", "zeta"):
            self.server.register(
                client_id=name,
                client_secret=f"{name}-secret",
                redirect_uris=[f"{self.base}/auth/{name}/oauth2/callback"],
            )

    def pocket(self, url: str) -> PocketAuth:
        pocket = PocketAuth(
            url,
            base_url=self.base,
            keys=self.written,
            providers=[self.server.provider(name) for name in ("acme", "zeta")],
            clients={name: (name, f"{name}-secret") for name in ("acme", "zeta")},
            session_cache_ttl=timedelta(),
        )
        self.stack.push_async_callback(pocket.aclose)
        return pocket

    async def consents(self, url: str) -> dict[str, bytes]:
        """Let a person consent; return what is sealed in the session of a provider."""
        owner, sessions = Owner("user", "alice"), {}
        pocket, alice = self.pocket(url), Browser("alice")
        for name in ("acme", "zeta"):
            request = pocket.make_request(["read"], auth_provider=name)
            on = {"auth_provider": name, "owner": owner}
            link = await pocket.prepare(request, **on)
            assert link
            await alice.avisit(link)
            await pocket.authenticate(request, timeout=5, **on)
            handler = pocket.find_handler_instance(auth_provider=name)
            self.connections[name] = handler.connection()
        alice.close()
        await pocket.aclose()
        backend = storage_from_url(url)
        await backend.open()
        for name in ("acme", "zeta"):
            key = (owner.namespace, self._name(owner, name, "default"))
            record = await backend.get(key)
            assert record is not None
            bound = (*key, str(record.version))
            sessions[name] = self.keys.open(record.value, *bound)
        await backend.close()
        return sessions

    def rows(self, sealed: dict[str, bytes], count: int) -> Iterator[Row]:
        """Yield so many sessions, and the links of some."""
        for number in range(count // len(PLACES)):
            owner = Owner("user", f"u{number}")
            for provider, profile in PLACES:
                name = self._name(owner, provider, profile)
                yield self._row(owner.namespace, name, sealed[provider])
        end = time.time() + 86_400
        for number in range(count // 10):
            owner = Owner("user", f"u{number}")
            link = Pointer.to(SessionKey(owner, "acme", "default", "c"))
            plain = link.model_dump_json().encode()
            space, name = ticket_key(secrets.token_urlsafe())
            yield self._row(space, name, plain, end + number)

    def _name(self, owner: Owner, provider: str, profile: str) -> str:
        key = SessionKey(owner, provider, profile, self.connections[provider])
        return key.name(Session.purpose)

    def _row(
        self, space: str, name: str, plain: bytes, end: float | None = None
    ) -> Row:
        version = secrets.randbits(52)
        value = self.keys.seal(plain, space, name, str(version))
        return space, name, version, value, end

    async def store(
        self, url: str, fill: Callable[[str, Iterator[Row]], None], count: int
    ) -> Store:
        sealed = await self.consents(url)
        begun = time.perf_counter()
        await asyncio.to_thread(fill, url, self.rows(sealed, count))
        spent = time.perf_counter() - begun
        print(f"  filled with {count:,} sessions in {spent:.0f} s", flush=True)
        backend = storage_from_url(url)
        await backend.open()
        self.stack.push_async_callback(backend.close)
        return Store(count, backend, self.pocket(url))


def fill_sqlite(url: str, rows: Iterator[Row]) -> None:
    """Write all rows in one transaction."""
    statement = f"INSERT INTO pocket_auth_records ({COLUMNS}) VALUES (?, ?, ?, ?, ?)"
    database = sqlite3.connect(url.removeprefix("sqlite:///"))
    with database:
        database.executemany(statement, rows)
    database.close()


def fill_postgres(url: str, rows: Iterator[Row]) -> None:
    """Copy all rows; then do what the server would do by itself, sooner or later."""
    with psycopg.connect(url, autocommit=True) as database:
        with (
            database.cursor() as cursor,
            cursor.copy(f"COPY pocket_auth_records ({COLUMNS}) FROM STDIN") as copy,
        ):
            for row in rows:
                copy.write_row(row)
        database.execute("VACUUM ANALYZE pocket_auth_records")


async def compare(small: Store, large: Store, turns: int) -> None:
    """Print what each call costs in the one and in the other."""
    calls: dict[str, tuple[Callable[[Store], Awaitable[float]], int]] = {
        "check": (Store.check, turns),
        "connections of an owner": (Store.list, turns),
        f"sweep of {SWEPT} expired": (Store.sweep, turns // 20),
        "sweep of nothing": (Store.sweep_nothing, turns // 5),
        "page of a walk (500)": (Store.walk, turns // 10),
    }
    for what, (call, times) in calls.items():
        spent: dict[int, list[float]] = {small.sessions: [], large.sessions: []}
        for warming in (True, False):
            for _ in range(5 if warming else times):
                for store in random.sample([small, large], 2):
                    spent[store.sessions].append(await call(store))
            if warming:
                for each in spent.values():
                    each.clear()
        little, much = (statistics.median(each) * 1e6 for each in spent.values())
        print(f"  {what:30} {little:10.0f} {much:10.0f} {much / little:8.2f}")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK:,} sessions")
    large = QUICK if parser.parse_args().quick else LARGE
    with TemporaryDirectory() as folder, Postgres() as postgres:
        stores = {
            "SQLite": (lambda n: f"sqlite:///{folder}/{n}.db", fill_sqlite),
            "PostgreSQL": (lambda _: postgres.url(postgres.fresh()), fill_postgres),
        }
        for kind, (url, fill) in stores.items():
            print(kind, flush=True)
            world = World()
            async with world.stack:
                both = [
                    await world.store(url(count), fill, count)
                    for count in (SMALL, large)
                ]
                head = f"{SMALL:,} µs", f"{large:,} µs", "ratio"
                print(f"  {'':30} {head[0]:>10} {head[1]:>12} {head[2]:>6}")
                await compare(*both, turns=400)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        asyncio.run(main())
