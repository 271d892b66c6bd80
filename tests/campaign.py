"""
The fault campaign: what is left of many users' sessions after hostile weather.

    python tests/campaign.py sqlite --seconds 60

A strict rotating authorization server with tokens of 2 seconds, one store, several
replicas with several tasks each. Meanwhile replicas are killed (-9) at every named
point of consent and refresh, the store is restarted, the provider fails in all ways,
clocks are wrong. Then all is calm, every owner is visited once more, and the figures
are printed. The exit status is 1 if something was lost that need not be.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import random
import secrets
import shutil
import sqlite3
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Protocol

import campaign_worker
from campaign_verdict import Verdict
from campaign_witness import Witness, Words, leaks
from campaign_worker import Task, purpose_of

from langchain_pocket_auth._seal import new_key
from langchain_pocket_auth.storage import storage_from_url
from langchain_pocket_auth.testing import free_port

STORES = ("sqlite", "postgres", "redis")
# Each at most once a request; "invalid_grant" and the like are no trouble but an end.
TROUBLE = ("500", "502", "503", "429", "malformed", "html200", "empty", "list200")
LOSSES = ("reset", "hang", "drop_after", "slow")
GRACE_S = 60.0
WRONG_S = (600.0, -600.0)
INHERITED = [
    "campaign_worker",
    "cryptography.hazmat.primitives.ciphers.aead",
    "langchain_pocket_auth.server",
    "langchain_pocket_auth.storage.sql",
    "sqlalchemy.dialects.sqlite.aiosqlite",
]
JOIN_S = 15.0
PEOPLE_S = 120.0


class Store(Protocol):
    """A store that can be put into trouble."""

    url: str

    def trouble(self, rng: random.Random) -> str:
        """Make trouble, and end it; say which."""

    def files(self) -> list[Path]:
        """Return the files that it keeps its data in."""


class SQLite:
    """A file that somebody locks for a while."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "store.db"
        self.url = f"sqlite:///{self._path}"

    def trouble(self, rng: random.Random) -> str:
        connection = sqlite3.connect(self._path, timeout=10, isolation_level=None)
        with suppress(sqlite3.OperationalError):
            connection.execute("BEGIN IMMEDIATE")
            time.sleep(rng.uniform(0.2, 1.5))
            connection.execute("ROLLBACK")
        connection.close()
        return "write lock held"

    def files(self) -> list[Path]:
        return list(self._path.parent.glob("store.db*"))


class Server:
    """A database server that is restarted, or crashes."""

    def __init__(self, server: Any, url: str) -> None:
        self._server, self.url = server, url

    def trouble(self, rng: random.Random) -> str:
        kill = rng.random() < 0.5
        self._server.stop(kill=kill)
        time.sleep(rng.uniform(0.0, 1.0))
        self._server.start()
        return "killed and started" if kill else "restarted"

    def files(self) -> list[Path]:
        return [p for p in self._server.directory.rglob("*") if p.is_file()]


@contextmanager
def opened(kind: str, folder: Path) -> Iterator[Store]:
    """Start a store of that kind."""
    if kind == "sqlite":
        yield SQLite(folder)
        return
    import databases

    if kind == "redis":
        with databases.Redis() as redis:
            yield Server(redis, redis.url(redis.fresh()))
        return
    with databases.Postgres() as postgres:
        # A commit that was answered outlasts a crash, as in every sane installation.
        postgres.execute("ALTER ROLE postgres SET synchronous_commit = on")
        yield Server(postgres, postgres.url(postgres.fresh()))


@dataclass
class Replica:
    """A process of the campaign, seen from outside."""

    name: str
    process: Any
    connection: Connection
    listener: threading.Thread
    done: threading.Event = field(default_factory=threading.Event)

    def order(self, kind: str, value: Any = None) -> None:
        """Tell it to do something, if it lives."""
        with suppress(OSError):
            self.connection.send((kind, value))


class Campaign:
    """One store, one server, many replicas, and what befalls them."""

    def __init__(self, store: Store, server: Witness, folder: Path, how: Any) -> None:
        self._store, self._server, self._folder, self._how = store, server, folder, how
        self._rng = random.Random(how.seed)
        self.words, self.trouble = Words(), Counter[str]()
        # Imports what replicas need once; it has to find it first.
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(INHERITED)
        self._keys, self.secret = new_key(), secrets.token_urlsafe(32)
        self._base = f"http://127.0.0.1:{free_port()}"
        self.owners = tuple(f"owner-{n}" for n in range(how.owners))
        self._started: Counter[int] = Counter()
        self._ahead: Counter[int] = Counter()
        server.register(
            client_id="campaign",
            client_secret=self.secret,
            redirect_uris=[f"{self._base}/auth/acme/oauth2/callback"],
        )

    def start(self, slot: int, *, final: bool = False) -> Replica:
        """Start a replica."""
        self._started[slot] += 1
        name = f"r{slot}.{self._started[slot]}"
        ours, theirs = self._context.Pipe()
        task = Task(
            name=name,
            storage=self._store.url,
            keys=self._keys,
            base_url=self._base,
            provider=self._server.provider(
                "acme", api_base_url=self._server.api
            ).model_dump(exclude_unset=True),
            client=("campaign", self.secret),
            folder=self._folder,
            owners=self.owners,
            tasks=self._how.tasks,
            seed=self._how.seed,
            verbose=slot == 0,
            final=final,
        )
        process = self._context.Process(
            target=campaign_worker.main, args=(task, theirs), daemon=True
        )
        process.start()
        theirs.close()
        listener = threading.Thread(target=self._listen, args=(name, ours), daemon=True)
        listener.start()
        replica = Replica(name, process, ours, listener)
        if self._ahead[slot]:
            replica.order("ahead", float(self._ahead[slot]))
        return replica

    def _listen(self, name: str, connection: Connection) -> None:
        with suppress(EOFError, OSError):
            while True:
                kind, at, *what = connection.recv()
                self.words.hear(name, kind, at, *what)

    def ended(self, replica: Replica) -> bool:
        """Whether a replica has ended; if so all that it told has been heard."""
        if replica.process.is_alive():
            return False
        replica.process.join()
        replica.listener.join(JOIN_S)
        replica.connection.close()
        code = replica.process.exitcode
        if code and replica.name not in self.words.died:
            self.words.broken.append(f"{replica.name} ended with {code}")
        return True

    def people(self) -> dict[int, Replica]:
        """Start all replicas, and wait until every owner has connected once."""
        replicas = {slot: self.start(slot) for slot in range(self._how.processes)}
        end = time.monotonic() + PEOPLE_S
        while len(self.words.served) < len(self.owners) and time.monotonic() < end:
            for slot, replica in replicas.items():
                if self.ended(replica):
                    replicas[slot] = self.start(slot)
            time.sleep(0.02)
        return replicas

    def storm(self, replicas: dict[int, Replica], seconds: float) -> None:
        """Let everything go wrong for a while."""
        stop = threading.Event()
        makers = [
            threading.Thread(target=self._provider_trouble, args=(stop,)),
            threading.Thread(target=self._store_trouble, args=(stop,)),
        ]
        for maker in makers:
            maker.start()
        for replica in replicas.values():
            replica.order("storm")
        now = time.monotonic()
        end, next_clock, deadly = now + seconds, now, dict.fromkeys(replicas, now)
        while (now := time.monotonic()) < end:
            for slot, replica in replicas.items():
                if self.ended(replica):
                    replicas[slot] = self.start(slot)
                    replicas[slot].order("storm")
                    deadly[slot] = now + self._rng.uniform(0.3, 1.5)
                elif now > deadly[slot]:
                    # Dies at the first point that has killed less than others.
                    replica.order("spare", self._spared())
                    deadly[slot] = now + 1.0
            if self._how.clocks and now > next_clock:
                self._move_clock(replicas)
                next_clock = now + self._rng.uniform(1.0, 3.0)
            time.sleep(0.02)
        stop.set()
        for maker in makers:
            maker.join()
        self._server.clear_faults()
        for replica in replicas.values():
            replica.order("spare", None)
            replica.order("stop")
        self._ahead.clear()
        self._wait(list(replicas.values()))

    def _spared(self) -> frozenset[str]:
        known = {*self.words.passed, *self.words.killed_at}
        least = min((self.words.killed_at[p] for p in known), default=0)
        return frozenset(p for p in known if self.words.killed_at[p] > least)

    def _move_clock(self, replicas: dict[int, Replica]) -> None:
        slot = self._rng.choice(list(replicas))
        self._ahead[slot] = 0 if self._ahead[slot] else int(self._rng.choice(WRONG_S))
        moves = self.words.ahead[f"r{slot}"]
        moves.append((time.monotonic(), float(self._ahead[slot])))
        replicas[slot].order("ahead", float(self._ahead[slot]))
        self.trouble["clock wrong by 10 min"] += bool(self._ahead[slot])

    def _provider_trouble(self, stop: threading.Event) -> None:
        rng = random.Random(self._how.seed + 1)
        while not stop.wait(rng.uniform(0.1, 0.5)):
            mode = rng.choice(TROUBLE if rng.random() < 0.6 else LOSSES)
            grants = ["refresh_token"] * 4 + ["authorization_code"]
            self._server.fault(
                mode,
                times=rng.randint(1, 2),
                grant_type=rng.choice(grants),
                delay_s=rng.uniform(0.2, 1.0) if mode == "slow" else 0.0,
            )

    def _store_trouble(self, stop: threading.Event) -> None:
        rng = random.Random(self._how.seed + 2)
        while not stop.wait(rng.uniform(3.0, 6.0)):
            self.trouble[f"store {self._store.trouble(rng)}"] += 1

    def finish(self) -> set[str]:
        """With everything calm, visit all owners; return who was not served."""
        before = Counter(self.words.served)
        replica = self.start(self._how.processes, final=True)
        self._wait([replica], 2 * campaign_worker.FINAL_S)
        return {o for o in self.owners if self.words.served[o] == before[o]}

    def _wait(self, replicas: list[Replica], limit_s: float = JOIN_S) -> None:
        end = time.monotonic() + limit_s
        while replicas and time.monotonic() < end:
            replicas = [each for each in replicas if not self.ended(each)]
            time.sleep(0.02)
        for each in replicas:
            self.words.broken.append(f"{each.name} did not end")
            each.process.kill()
            self.ended(each)

    async def left(self) -> tuple[Counter[str], int, bytes]:
        """Return what is in the store: records by purpose, leases, all bytes."""
        backend = storage_from_url(self._store.url)
        await backend.open()
        rows, leased, after, content = Counter[str](), 0, None, bytearray()
        while True:
            page = await backend.walk(after=after)
            for key, record in page.records.items():
                rows[purpose_of(key)] += 1
                content += repr(key).encode() + record.value
                if await backend.lease(key, "campaign", timedelta(seconds=1)):
                    await backend.free(key, "campaign")
                else:
                    leased += 1
            if (after := page.after) is None:
                break
        await backend.close()
        return rows, leased, bytes(content)

    def report(self, unserved: set[str]) -> Verdict:
        """Put all figures together."""
        server, verdict = self._server, None
        verdict = Verdict(server, self.words, bool(server.reuse_grace_s))
        verdict.tell("owners", len(self.owners))
        verdict.tell("replicas started", self._started.total())
        verdict.tell("replicas killed (kill -9)", len(self.words.died))
        every = list(verdict.points())
        hit = sum(bool(killed) for *_, killed in every)
        verdict.tell("named points, and how many were deadly", f"{len(every)}, {hit}")
        verdict.tell("provider faults", _counted(server.fired))
        verdict.tell("store and clocks", _counted(self.trouble))
        verdict.judge()
        verdict.tell("owners not served at the end", len(unserved))
        verdict.blame("owners not served at the end", sorted(unserved)[:5])
        rows, leased, content = asyncio.run(self.left())
        verdict.tell("rows left in the store", _counted(rows))
        verdict.tell("lease leftovers", leased)
        verdict.blame("leases left over", leased)
        known = [*server.secrets(), self.secret]
        places = [content, *self._store.files(), *self._folder.glob("*.log")]
        found = list(leaks(known, places))
        size = sum(p.stat().st_size for p in places if isinstance(p, Path)) >> 10
        verdict.tell(
            "secrets found in clear",
            f"{len(found)} of {len(known)}, in {len(places)} places, {size} KiB",
        )
        verdict.blame("secrets in clear", found[:5])
        return verdict


def _counted(counted: Counter[str]) -> str:
    return ", ".join(f"{name} {many}" for name, many in sorted(counted.items())) or "0"


def run(kind: str, how: argparse.Namespace, *, grace_s: float) -> bool:
    """Run one campaign and print its figures; whether all is well."""
    folder = Path(mkdtemp(prefix="campaign-"))
    title = f"{kind}, {f'{grace_s:g} s of grace' if grace_s else 'strict'}"
    try:
        with ExitStack() as stack:
            store = stack.enter_context(opened(kind, folder))
            server = Witness(access_token_ttl_s=2, reuse_grace_s=grace_s)
            stack.enter_context(server)
            campaign = Campaign(store, server, folder, how)
            campaign.storm(campaign.people(), how.seconds)
            verdict = campaign.report(campaign.finish())
        print(f"\n{title}, {how.seconds:g} s, seed {how.seed}")
        for name, value in verdict.figures:
            print(f"  {name:<52} {value}")
        if how.points:
            print("  point: passed, deadly")
            for point, passed, killed in verdict.points():
                print(f"    {point:<66} {passed:>6} {killed or 'NEVER':>6}")
            print("  functions that reach the store or a provider, never passed")
            print(f"    {', '.join(verdict.never_passed()) or 'none'}")
        for fault in verdict.faults:
            print(f"  MUST NOT BE: {fault}")
        print(f"  {'all is well' if not verdict.faults else 'NOT WELL'}", flush=True)
        if verdict.faults and how.keep:
            print(f"  kept: {folder}")
        return not verdict.faults
    finally:
        if not how.keep:
            shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(description="The fault campaign.")
    parser.add_argument("store", nargs="?", default="sqlite", choices=[*STORES, "all"])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--owners", type=int, default=200)
    parser.add_argument("--mode", default="both", choices=["both", "strict", "grace"])
    parser.add_argument("--no-clocks", dest="clocks", action="store_false")
    parser.add_argument("--no-points", dest="points", action="store_false")
    parser.add_argument("--keep", action="store_true", help="keep store and logs")
    how = parser.parse_args()
    modes = {"strict": [0.0], "grace": [GRACE_S], "both": [0.0, GRACE_S]}[how.mode]
    kinds = STORES if how.store == "all" else (how.store,)
    well = [run(kind, how, grace_s=grace) for kind in kinds for grace in modes]
    return 0 if all(well) else 1


if __name__ == "__main__":
    sys.exit(main())
