"""Redis keeps the storage contract, alone and in a cluster, and what is Redis' alone."""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
import sys
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
import redis
from conftest import free_port
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from databases import Redis
from support import BOUND_S, KEYS, Clock, connect, state, token

from langchain_pocket_auth import PocketAuth
from langchain_pocket_auth._errors import ConfigurationError, StorageUnavailable
from langchain_pocket_auth.storage import (
    Key,
    Record,
    StorageBackend,
    _redis,
    storage_from_url,
)
from langchain_pocket_auth.storage.redis import RedisBackend
from langchain_pocket_auth.testing import AuthorizationServer, Browser
from langchain_pocket_auth.testing._conformance import StorageConformance

KEY = ("owner", "name")
SHORT, LONG = timedelta(seconds=0.1), timedelta(minutes=1)


@pytest.fixture(scope="module")
def cluster_server() -> Iterator[Redis]:
    """One of two nodes of a cluster, which refuses a key that is the other's."""
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        servers = [Redis(cluster=True), Redis(cluster=True)]
        first, second = pool.map(stack.enter_context, servers)
        upper = range(8192, 16384)
        with first.client() as one, second.client() as two:
            for node in (one, two):  # after which they dare to join
                node.config_set("cluster-node-timeout", 500)
            two.execute_command("CLUSTER RESET", "HARD")
            one.execute_command("CLUSTER DELSLOTS", *upper)
            two.execute_command("CLUSTER ADDSLOTS", *upper)
            one.execute_command("CLUSTER MEET", "127.0.0.1", second.port)
            deadline = time.monotonic() + BOUND_S
            while not all(
                (known["cluster_known_nodes"], known["cluster_state"]) == ("2", "ok")
                for known in (c.execute_command("CLUSTER INFO") for c in (one, two))
            ):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            for node in (one, two):  # so that a busy machine does not part them
                node.config_set("cluster-node-timeout", 15_000)
        yield first


@pytest.fixture
def own_server() -> Iterator[Redis]:
    """A Redis that a test may stop or set up, with a password."""
    with Redis(password="hunter2") as running:
        yield running


@pytest.fixture
def url(redis_server: Redis) -> str:
    """The URL of an empty database."""
    return redis_server.url(redis_server.fresh())


def cluster_url(server: Redis) -> str:
    """Return the URL of a cluster that was emptied."""
    with server.client() as client:
        nodes = client.execute_command("CLUSTER NODES")
    for address in nodes:
        port = int(address.partition("@")[0].rpartition(":")[2])
        with redis.Redis("127.0.0.1", port, protocol=2) as client:
            client.flushall()
    return server.url().replace("redis://", "redis+cluster://")


@asynccontextmanager
async def opened(url: str, **settings: str) -> AsyncIterator[RedisBackend]:
    store = RedisBackend(url, **settings)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


async def everything(store: RedisBackend) -> dict[Key, Record]:
    """Walk through all there is."""
    page = await store.walk(limit=20)
    met = page.records
    while page.after:
        page = await store.walk(after=page.after, limit=20)
        met |= page.records
    return met


@pytest.fixture
async def store(url: str) -> AsyncIterator[RedisBackend]:
    """A backend on an empty database."""
    async with opened(url) as backend:
        yield backend


class Proxy:
    """Stands before a Redis, counts what clients send, and can change the answers."""

    def __init__(self, server: Redis) -> None:
        self.server, self.heard = server, b""
        self.answer: Callable[[bytes], bytes | None] | None = None

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        behind, ahead = await asyncio.open_connection("127.0.0.1", self.server.port)

        async def up() -> None:
            while data := await reader.read(65536):
                self.heard += data
                ahead.write(data)
            ahead.close()

        async def down() -> None:
            while data := await behind.read(65536):
                answer = self.answer(data) if self.answer else data
                if answer is None:
                    break
                writer.write(answer)
            writer.close()

        await asyncio.gather(up(), down(), return_exceptions=True)

    @asynccontextmanager
    async def listening(self, **tls: ssl.SSLContext) -> AsyncIterator[int]:
        """Yield a port of 127.0.0.1."""
        listener = await asyncio.start_server(self._serve, "127.0.0.1", 0, **tls)
        try:
            yield listener.sockets[0].getsockname()[1]
        finally:
            listener.close()

    def lose_next_answer(self) -> None:
        """Break the connection in place of the next answer; forget what was heard."""
        lost = iter([None])
        self.heard, self.answer = b"", lambda answer: next(lost, answer)

    def count(self, command: str) -> int:
        """How often a command was sent."""
        return self.heard.count(f"\r\n{command}\r\n".encode())


@asynccontextmanager
async def behind_proxy(server: Redis) -> AsyncIterator[tuple[Proxy, RedisBackend]]:
    """Yield a proxy, and a backend that knows no other way to an empty database."""
    proxy = Proxy(server)
    async with proxy.listening() as port:
        url = server.url(server.fresh()).replace(f":{server.port}", f":{port}")
        async with opened(url) as store:
            proxy.heard = b""
            yield proxy, store


# The contract


class TestRedis(StorageConformance):
    shared = True

    @pytest.fixture(autouse=True)
    def _database(self, url: str) -> None:
        self.url = url

    async def open_backend(self) -> StorageBackend:
        backend = storage_from_url(self.url)
        await backend.open()
        return backend


class TestCluster(StorageConformance):
    shared = True

    @pytest.fixture(autouse=True)
    def _database(self, cluster_server: Redis) -> None:
        self.url = cluster_url(cluster_server)

    async def open_backend(self) -> StorageBackend:
        backend = storage_from_url(self.url)
        await backend.open()
        return backend


def calls_of(store: StorageBackend) -> dict[str, Callable[[], object]]:
    """Every call of the contract, by name, on a record that is there."""
    key = ("hunter2", "hunter2")
    return {
        "get": lambda: store.get(key),
        "list": lambda: store.list(key[0]),
        "walk": store.walk,
        "lease": lambda: store.lease(key, "hunter2", LONG),
        "free": lambda: store.free(key, "hunter2"),
        "rewrite": lambda: store.rewrite(key, b"hunter2", expected=1),
        "put": lambda: store.put(key, b"hunter2", version=2, expected=1, ttl=LONG),
        "take": lambda: store.take(key),
        "delete": lambda: store.delete(key),
    }


async def test_each_call_is_one_command(redis_server: Redis) -> None:
    """A call costs one round trip, whatever a namespace holds."""
    async with behind_proxy(redis_server) as (proxy, store):
        for name in ("hunter2", "b", "c"):
            await store.put(("hunter2", name), b"a", version=1, expected=None)
        calls = calls_of(store)
        del calls["walk"]
        for warm in (True, False):  # the first time the server learns the script
            for name, call in calls.items():
                await store.put(("hunter2", "hunter2"), b"", version=1, expected=None)
                proxy.heard = b""
                await call()
                assert warm or proxy.heard.count(b"*") == 1, name
                assert warm or proxy.count("EVALSHA") == 1, name


async def test_expired_records_do_not_pile_up(
    store: RedisBackend, url: str, redis_server: Redis
) -> None:
    """Where records end as fast as others begin, what is kept stays bounded."""
    # For ever, so that the namespace itself does not end.
    await store.put(("states", "kept"), b"", version=1, expected=None)
    brief = timedelta(milliseconds=20)
    for first in range(0, 2_000, 200):
        puts = (
            store.put(("states", f"{n}"), b"", version=1, expected=None, ttl=brief)
            for n in range(first, first + 200)
        )
        await asyncio.gather(*puts)
        await asyncio.sleep(0.025)
    with redis_server.client(int(url.rpartition("/")[2])) as client:
        [name] = client.keys()
        assert client.hlen(name) <= 250
        assert await store.list("states") == {"kept": Record(1, b"")}
        assert client.hlen(name) == 1


async def test_namespace_ends_with_its_last_record(
    store: RedisBackend, url: str, redis_server: Redis
) -> None:
    """Redis itself forgets who has nothing that lasts, and never anybody else."""
    key_of = dict.fromkeys(("gone", "kept", "longer", "again"))
    with redis_server.client(int(url.rpartition("/")[2])) as client:
        for space in key_of:
            before = set(client.keys())
            await store.put((space, "a"), b"", version=1, expected=None, ttl=LONG)
            [key_of[space]] = set(client.keys()) - before
        await store.put(("kept", "b"), b"", version=1, expected=None)
        await store.put(("longer", "b"), b"", version=1, expected=None, ttl=2 * LONG)
        await store.put(("longer", "c"), b"", version=1, expected=None, ttl=LONG)
        await store.put(("again", "a"), b"", version=2, expected=1)
        left = {space: client.pttl(name) for space, name in key_of.items()}
    assert 59_000 < left["gone"] <= 61_000
    assert 119_000 < left["longer"] <= 121_000
    assert (left["kept"], left["again"]) == (-1, -1)


async def test_two_apps_share_a_database(
    url: str, store: RedisBackend, redis_server: Redis
) -> None:
    """Prefixes are compared exactly, and what is not ours is neither met nor harmed."""
    number = int(url.rpartition("/")[2])
    prefixes = ["a", "A", "a:", "*", "?", "[a]", "\\", "", "a:" + "?" * 64]
    with redis_server.client(number) as client:
        client.set("a:foreign", "x")
        client.rpush("a:" + "f" * 63, "x")
        for prefix in prefixes:
            async with opened(url, prefix=prefix) as mine:
                assert await mine.put(KEY, prefix.encode(), version=1, expected=None)
        for prefix in prefixes:
            async with opened(url, prefix=prefix) as mine:
                assert await everything(mine) == {KEY: Record(1, prefix.encode())}
        assert await store.get(KEY) is None
        assert len(client.keys()) == len(prefixes) + 2


async def test_keys_and_cursors_tell_nobody_who_is_stored(
    store: RedisBackend, url: str, redis_server: Redis
) -> None:
    """An owner's name is in no key of Redis, which tools and logs show."""
    await store.put(("alice@acme.example", "n"), b"", version=1, expected=None)
    with redis_server.client(int(url.rpartition("/")[2])) as client:
        [name] = client.keys()
    assert b"alice" not in name


# Outages


async def test_restart_is_an_outage_that_ends(own_server: Redis) -> None:
    """While Redis is away every call says so; then all is there, scripts too."""
    async with opened(own_server.url()) as store:
        assert await store.put(KEY, b"a", version=1, expected=None)
        assert await store.put(("hunter2", "hunter2"), b"b", version=1, expected=None)
        await asyncio.gather(*(store.get(KEY) for _ in range(20)))  # fill the pool
        await asyncio.to_thread(own_server.restart, kill=True)
        # At once: no connection of before is used for a write.
        assert await store.put(KEY, b"b", version=2, expected=1)
        assert await store.get(KEY) == Record(2, b"b")
        own_server.stop()
        for name, call in calls_of(store).items():
            with pytest.raises(StorageUnavailable, match="cannot be reached") as caught:
                await call()
            assert "not known" not in str(caught.value), name
        own_server.start()
        assert await store.lease(KEY, "one", LONG)
        assert await store.get(KEY) == Record(2, b"b")
        assert await store.get(("hunter2", "hunter2")) == Record(1, b"b")


async def test_cluster_comes_back(cluster_server: Redis) -> None:
    """After a restart a cluster's client finds its nodes again."""
    async with opened(cluster_url(cluster_server)) as store:
        assert await store.put(KEY, b"a", version=1, expected=None)
        cluster_server.stop()
        for call in (store.get(KEY), store.take(KEY), store.walk()):
            with pytest.raises(StorageUnavailable):
                await call
        cluster_server.start()
        assert await store.get(KEY) == Record(1, b"a")
        assert await store.put(KEY, b"b", version=2, expected=1)
        assert await everything(store) == {KEY: Record(2, b"b")}


async def test_scripts_that_redis_forgot_are_sent_again(
    store: RedisBackend, redis_server: Redis
) -> None:
    """`SCRIPT FLUSH` goes unnoticed."""
    for version in (1, 2):
        before = None if version == 1 else 1
        assert await store.put(KEY, b"a", version=version, expected=before)
        with redis_server.client() as client:
            client.script_flush()
    assert await store.take(KEY) == Record(2, b"a")


async def test_write_of_unknown_fate_is_not_repeated(redis_server: Redis) -> None:
    """The answer was lost: the write is sent once, said to be uncertain, and is there."""
    async with behind_proxy(redis_server) as (proxy, store):
        await store.put(("owner", "other"), b"o", version=1, expected=None)
        assert await store.get(KEY) is None  # the server knows both scripts now
        proxy.lose_next_answer()
        with pytest.raises(StorageUnavailable, match="is not known"):
            await store.put(KEY, b"a", version=1, expected=None)
        assert (proxy.count("EVALSHA"), proxy.count("EVAL")) == (1, 0)
        assert await store.get(KEY) == Record(1, b"a")
        proxy.lose_next_answer()
        assert await store.get(KEY) == Record(1, b"a")
        assert proxy.count("EVALSHA") == 2  # to read again harms nobody


async def test_answer_that_never_comes_is_an_outage(redis_server: Redis) -> None:
    """Nobody waits longer than the time-out; the connection is not used again."""
    proxy = Proxy(redis_server)
    async with proxy.listening() as port:
        url = redis_server.url(redis_server.fresh())
        url = url.replace(f":{redis_server.port}", f":{port}") + "?socket_timeout=0.1"
        async with opened(url) as store:
            await store.put(KEY, b"a", version=1, expected=None)
            proxy.answer = lambda _: b""
            with pytest.raises(StorageUnavailable, match="no answer in time; whether"):
                await store.take(KEY)
            proxy.answer = None
            assert await store.get(KEY) is None


async def test_cancelled_call_leaves_the_store_usable(redis_server: Redis) -> None:
    """An answer that nobody waits for any more is not taken for another's."""
    async with behind_proxy(redis_server) as (proxy, store):
        await store.put(KEY, b"a", version=1, expected=None)
        held, arrived = [], asyncio.Event()

        def hold(answer: bytes) -> bytes:
            held.append(answer)
            arrived.set()
            return b""

        proxy.answer = hold
        reading = asyncio.create_task(store.get(KEY))
        async with asyncio.timeout(BOUND_S):
            await arrived.wait()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        proxy.answer = None
        assert await store.get(("owner", "another")) is None


@pytest.mark.parametrize("kind", ["redis", "cluster"])
async def test_connections_are_bounded(
    redis_server: Redis, cluster_server: Redis, kind: str
) -> None:
    """Two hundred calls at once share a few connections, and all are answered."""
    server = redis_server if kind == "redis" else cluster_server
    with server.client() as client:
        address = server.url(server.fresh()) if kind == "redis" else cluster_url(server)
        before = client.info("stats")["total_connections_received"]
        async with opened(f"{address}?max_connections=5") as store:
            await store.put(KEY, b"a", version=1, expected=None)
            found = await asyncio.gather(*(store.get(KEY) for _ in range(200)))
            made = client.info("stats")["total_connections_received"] - before
    assert found == [Record(1, b"a")] * 200
    # A cluster's client asks for its nodes in connections of their own.
    assert made <= 5 + 2 * (kind == "cluster")


@pytest.mark.parametrize("kind", ["redis", "cluster"])
async def test_connection_that_never_gets_free_is_an_outage(
    redis_server: Redis,
    cluster_server: Redis,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """Who waits in vain for a connection is told so, and nothing was sent."""
    monkeypatch.setattr(_redis, "TIMEOUT_S", 0.05)
    server = redis_server if kind == "redis" else cluster_server
    address = server.url(server.fresh()) if kind == "redis" else cluster_url(server)
    async with opened(f"{address}?max_connections=1") as store:
        with server.client() as client:
            client.execute_command("CLIENT PAUSE", 4_000, "WRITE")  # scripts too
            holding = asyncio.create_task(store.get(KEY))
            await asyncio.sleep(0)
            with pytest.raises(StorageUnavailable, match=r"connections are in use$"):
                await store.put(KEY, b"a", version=1, expected=None)
            client.execute_command("CLIENT UNPAUSE")
        assert await holding is None
        assert await store.get(KEY) is None


async def test_calls_before_open_and_after_close_are_outages(url: str) -> None:
    """A store that is not open does not say that nothing is there."""
    backend = RedisBackend(url)
    for _ in range(2):
        with pytest.raises(StorageUnavailable, match="not open"):
            await backend.get(KEY)
        await backend.open()
        await backend.close()
        await backend.close()


async def test_full_memory_is_an_outage_that_loses_nothing(own_server: Redis) -> None:
    """A Redis without memory refuses writes; what is there can be read and deleted."""
    async with opened(own_server.url()) as store:
        await store.put(KEY, b"a", version=1, expected=None)
        with own_server.client() as client:
            client.config_set("maxmemory", 1)
        for write in (
            store.put(KEY, b"b", version=2, expected=1),
            store.put(("owner", "new"), b"b", version=2, expected=None, ttl=LONG),
            store.lease(KEY, "one", LONG),
        ):
            with pytest.raises(StorageUnavailable, match="maxmemory") as caught:
                await write
            assert "not known" not in str(caught.value)
        assert await store.list("owner") == {"name": Record(1, b"a")}
        assert await store.take(KEY) == Record(1, b"a")


# Walks


async def test_walk_goes_on_over_a_restart(own_server: Redis) -> None:
    """A server that is started anew has another order; no record is passed over."""
    async with opened(own_server.url()) as store:
        there = {(f"owner {n}", "big"): Record(1, bytes(99)) for n in range(40)}
        there |= {("ticket", f"{n}"): Record(1, bytes(99)) for n in range(200)}
        for (space, name), record in there.items():
            await store.put((space, name), record.value, version=1, expected=None)
        for namespace in (None, "ticket"):
            met: dict[Key, Record] = {}
            after, pages = None, 0
            while after is not None or not pages:
                page = await store.walk(namespace, after=after, limit=16)
                met |= page.records
                after, pages = page.after, pages + 1
                if pages == 4:
                    assert after
                    own_server.restart()
            assert met == {k: v for k, v in there.items() if namespace in {None, k[0]}}


async def test_walk_visits_all_nodes_of_a_cluster(cluster_server: Redis) -> None:
    """No node is passed over, and one that left makes the walk begin again."""
    async with opened(cluster_url(cluster_server)) as store:
        there = {(f"owner {n}", "n"): Record(1, b"a") for n in range(40)}
        for key in there:
            await store.put(key, b"a", version=1, expected=None)
        assert await everything(store) == there
        with cluster_server.client() as client:
            assert 0 < client.dbsize() < 40
        begun = await store.walk(limit=10)
        left = json.loads(begun.after)
        left[:2] = ["its run id", ["127.0.0.1:1"]]
        await store._server._driver._client.aclose()  # as it does on CLUSTERDOWN
        page = await store.walk(after=json.dumps(left), limit=10)
        met: dict[Key, Record] = {}
        while page.after:
            page = await store.walk(after=page.after, limit=10)
            met |= page.records
        assert met == there


async def test_page_of_a_walk_is_bounded(store: RedisBackend) -> None:
    """However many records a namespace has, a page has about as many as asked for."""
    puts = (
        store.put((f"ticket {n % 4}", f"{n}"), bytes(99), version=1, expected=None)
        for n in range(600)
    )
    await asyncio.gather(*puts)
    for namespace, there in ((None, 600), ("ticket 0", 150)):
        after, pages, most, met = None, 0, 0, 0
        while after is not None or not pages:
            page = await store.walk(namespace, after=after, limit=50)
            most, met = max(most, len(page.records)), met + len(page.records)
            after, pages = page.after, pages + 1
        assert (most <= 100, met >= there, pages >= there / 100) == (True, True, True)


# Who has to act


def shown(error: BaseException) -> str:
    """All that a traceback would show of it, its causes and contexts."""
    return "".join(traceback.format_exception(error)) + repr(error)


def chained(error: BaseException) -> list[BaseException]:
    return [e for e in (error.__cause__, error.__context__) if e is not None]


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("redis://:hunter2#@h:1/0", "percent-encoded"),
        ("redis://u:p@h:hunter2/0", "percent-encoded"),
        ("redis://[hunter2/0", "percent-encoded"),
        ("redis+hunter2://h/0", "percent-encoded"),
        ("unix://", "percent-encoded"),
        ("unix+cluster:///hunter2", "percent-encoded"),
        ("redis://u:hunter2@h/name", "number of a database"),
        ("redis://u:hunter2@h?db=hunter2", "percent-encoded"),
        ("redis+cluster://u:hunter2@h/3", "leave the number"),
        ("redis://u:hunter2@h?ssl_ca_certs=a", "these options are known: db,"),
        ("rediss://u:hunter2@h?ssl_cert_reqs=none", "certificates are always checked"),
        ("rediss://u:hunter2@h?ssl_check_hostname=no", "always checked"),
        ("redis://u:hunter2@h?retry_on_timeout=yes", "these options are known: db,"),
        ("redis://u:hunter2@h?max_connections=0", "above 0"),
        ("redis://u:hunter2@h?socket_timeout=0", "above 0"),
    ],
)
def test_wrong_url_is_refused(url: str, text: str) -> None:
    """The remedy is named, the URL is not shown."""
    with pytest.raises(ConfigurationError, match=text) as caught:
        storage_from_url(url)
    assert "hunter2" not in str(caught.value)
    assert chained(caught.value) == []


async def test_right_urls_are_understood(redis_server: Redis) -> None:
    """Parts that are left out are Redis' usual ones; a socket does as well."""
    storage_from_url("redis://")
    storage_from_url("REDISS+CLUSTER://u:p%23@h?ssl_ca_certs=a")
    path = redis_server.directory / "s"
    with pytest.raises(StorageUnavailable, match="cannot be reached"):
        await storage_from_url(f"unix://{path}?db=1").open()


@pytest.mark.parametrize("kind", ["redis", "cluster"])
@pytest.mark.parametrize("wrong", ["password", "user", "none"])
async def test_wrong_password_is_shown_nowhere(
    own_server: Redis, caplog: pytest.LogCaptureFixture, wrong: str, kind: str
) -> None:
    """The developer reads that it is wrong, and neither what it is nor was to be."""
    caplog.set_level(logging.DEBUG)
    secret = {"password": ":hunter3@", "user": "hunter3:hunter2@", "none": ""}[wrong]
    url = own_server.url().replace(":hunter2@", secret)
    if kind == "cluster":
        url = url.replace("redis://", "redis+cluster://")
    backend = storage_from_url(url)
    with pytest.raises(ConfigurationError, match="refuses the user name") as caught:
        await backend.open()
    told = shown(caught.value) + caplog.text + repr(backend)
    assert chained(caught.value) == []
    assert "hunter" not in told
    assert str(own_server.port) not in told


async def test_nothing_of_a_record_is_in_an_error_or_a_log(
    own_server: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """Errors of any call, and debug logs, hold no namespace, name, value or holder."""
    caplog.set_level(logging.DEBUG)
    async with opened(own_server.url()) as store:
        await store.put(("hunter2", "hunter2"), b"hunter2", version=1, expected=None)
        for call in list(calls_of(store).values())[:-2]:
            await call()
        with own_server.client() as client:
            [name] = client.keys()
            client.set(name, "foreign")
        calls = calls_of(store)
        for call in calls.values():
            with pytest.raises(ConfigurationError, match="another prefix") as caught:
                await call()
            assert chained(caught.value) == []
            assert "hunter2" not in shown(caught.value)
    assert "hunter2" not in caplog.text


async def test_replica_is_refused(own_server: Redis) -> None:
    """A replica can be read, and the first write says whom to name."""
    async with opened(own_server.url()) as store:
        with own_server.client() as client:
            client.replicaof("127.0.0.1", free_port())
            before = client.info("stats")["total_connections_received"]
            with pytest.raises(StorageUnavailable, match="name the primary"):
                await store.put(KEY, b"a", version=1, expected=None)
            assert await store.get(KEY) is None
            # By a new connection: after a failover the name leads to the primary.
            assert client.info("stats")["total_connections_received"] == before + 1


async def test_cluster_and_single_server_are_told_apart(
    redis_server: Redis, cluster_server: Redis
) -> None:
    """Whoever names the wrong kind reads which URL is right."""
    wrong = redis_server.url().replace("redis://", "redis+cluster://")
    with pytest.raises(ConfigurationError, match="is no cluster"):
        await storage_from_url(wrong).open()
    with pytest.raises(ConfigurationError, match=r"use redis\+cluster://"):
        await storage_from_url(cluster_server.url(1)).open()
    async with behind_proxy(redis_server) as (proxy, store):
        proxy.answer = lambda _: b"-MOVED 7 10.0.0.1:6379\r\n"
        with pytest.raises(ConfigurationError, match=r"use redis\+cluster://"):
            await store.get(KEY)


async def test_database_that_is_not_there_is_named(redis_server: Redis) -> None:
    """The number in the URL is too high."""
    with pytest.raises(ConfigurationError, match="no database of that number"):
        await storage_from_url(redis_server.url(9_999)).open()


async def test_old_redis_is_named(
    redis_server: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is too old is refused before it is used."""
    monkeypatch.setattr(_redis, "OLDEST", (9, 9))
    with pytest.raises(ConfigurationError, match=r"is version \d+\.\d+\.\d+, and"):
        await storage_from_url(redis_server.url()).open()


async def test_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The remedy is one command."""
    for name in [n for n in sys.modules if n.partition(".")[0] == "redis"]:
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("_redis", "_redis_url", "_redis_errors"):
        module = f"langchain_pocket_auth.storage.{name}"
        monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(ConfigurationError, match=r'pip install ".*\[redis\]"'):
        storage_from_url("redis://localhost/0")


NEEDED = (
    "+@scripting +@hash +@connection +time +pttl +pexpireat +persist +scan +info "
    "~pocket-auth:*"
)


async def test_user_needs_only_the_permissions_that_are_named(
    own_server: Redis,
) -> None:
    """With what the error asks for everything works; without, the error asks for it."""
    with own_server.client() as client:
        client.execute_command("ACL SETUSER app on >hunter3", *NEEDED.split())
        url = own_server.url().replace(":hunter2@", "app:hunter3@")
        async with opened(url) as store:
            await store.put(("hunter2", "hunter2"), b"", version=1, expected=None)
            await store.put(("hunter2", "2"), b"", version=1, expected=None, ttl=LONG)
            for call in calls_of(store).values():
                await call()
            client.execute_command("ACL SETUSER app -hset")
            with pytest.raises(ConfigurationError, match="allow @scripting"):
                await store.put(KEY, b"a", version=1, expected=None)
            client.execute_command("ACL SETUSER app +hset resetkeys ~else:*")
            with pytest.raises(ConfigurationError, match="allow @scripting"):
                await store.get(KEY)


async def test_redis_that_may_lose_sessions_is_told(
    own_server: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """Eviction is a warning, no persistence an information, anything else silent."""
    caplog.set_level(logging.INFO, "langchain_pocket_auth")
    url = own_server.url()
    async with opened(url):
        assert caplog.records == []
    with own_server.client() as client:
        client.config_set("appendonly", "no")
        client.config_set("save", "3600 1")
        async with opened(url):
            assert caplog.records == []
        client.config_set("save", "")
        client.config_set("maxmemory-policy", "allkeys-lru")
        async with opened(url):
            [evicts, loses] = caplog.records
        assert (evicts.levelname, loses.levelname) == ("WARNING", "INFO")
        assert "allkeys-lru" in evicts.getMessage()
        assert "appendonly" in loses.getMessage()
        caplog.clear()
        client.config_set("maxmemory-policy", "noeviction")
        client.execute_command("ACL SETUSER app on >hunter3 +@all -config ~*")
        async with opened(url.replace(":hunter2@", "app:hunter3@")):
            assert caplog.records == []


# TLS


def certificate(folder: Path) -> Path:
    """Make a certificate of 127.0.0.1 and its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.now(UTC)
    names = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder(
            name, name, key.public_key(), x509.random_serial_number()
        )
        .not_valid_before(now - LONG)
        .not_valid_after(now + timedelta(days=1))
        .add_extension(names, critical=False)
        .sign(key, hashes.SHA256())
    )
    how = (Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    file = folder / "server.pem"
    file.write_bytes(key.private_bytes(*how) + made.public_bytes(Encoding.PEM))
    return file


async def test_certificate_is_checked(redis_server: Redis, tmp_path: Path) -> None:
    """TLS is with the server that an authority vouches for, and with no other."""
    file = certificate(tmp_path)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(file)
    async with Proxy(redis_server).listening(ssl=tls) as port:
        url = f"rediss://127.0.0.1:{port}/{redis_server.fresh()}"
        with pytest.raises(ConfigurationError, match="ssl_ca_certs"):
            await storage_from_url(url).open()
        async with opened(f"{url}?ssl_ca_certs={file}") as store:
            assert await store.put(KEY, b"a", version=1, expected=None)
        in_cluster = url.rpartition("/")[0].replace("rediss", "rediss+cluster")
        with pytest.raises(ConfigurationError, match="ssl_ca_certs"):
            await storage_from_url(in_cluster).open()
        with pytest.raises(ConfigurationError, match="is no cluster"):
            await storage_from_url(f"{in_cluster}?ssl_ca_certs={file}").open()
        named = url.replace("127.0.0.1", "localhost")
        with pytest.raises(ConfigurationError, match="ssl_ca_certs"):
            await storage_from_url(f"{named}?ssl_ca_certs={file}").open()


# A pocket


async def test_pocket_lives_on_redis(
    make_pocket: Callable[..., PocketAuth],
    server: AuthorizationServer,
    alice: Browser,
    url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Consent in one process, use and renewal in the next, and nothing is asked twice."""
    clock = Clock(monkeypatch)
    base = f"http://127.0.0.1:{free_port()}"
    settings = {"base_url": base, "keys": KEYS, "session_cache_ttl": timedelta()}
    first = make_pocket(url, **settings)
    granted = await connect(first, alice, "read")
    first.close()
    second = make_pocket(url, **settings)
    assert await state(second, "read") == "SKIP_AUTH"
    assert (await token(second, "read")).access_token == granted.access_token
    clock.forward(3601)
    renewed = await asyncio.gather(*(token(second, "read") for _ in range(5)))
    assert {c.access_token for c in renewed} == {server.issued_access_tokens[-1]}
    assert server.token_requests["refresh_token"] == 1
    assert server.refresh_token_reuses == 0
