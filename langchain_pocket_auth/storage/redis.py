"""Records in Redis or Valkey, shared by all replicas of an app."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from datetime import timedelta
from typing import Any, TypeAlias

from .._errors import ConfigurationError
from . import _redis_scripts as scripts
from ._base import Key, Page, Record, StorageBackend
from ._text import check_text

_Hashes: TypeAlias = list[list[str]]
"""Keys, each with the cursor that a walk through it is at."""
_Place: TypeAlias = list[Any]
"""Where a walk is: run id, primaries to visit, cursor of the first, hashes."""


class RedisBackend(StorageBackend):
    """
    Keeps records in Redis 6.2 or newer, Valkey, or a cluster of either.

    A namespace is one hash, so every call is one script with one key, done in one
    round trip on one node. Times are the server's. Redis answers before its replicas
    and, with `appendfsync everysec`, before its disk have a write: a crash may lose
    the last second, and so may a failover.

    Args:
        url: `redis://user:password@host:6379/0`, `rediss://…` (TLS, certificates are
            checked), `unix:///path/to/socket?db=0`, `redis+cluster://…` or
            `rediss+cluster://…` (any node; the others are found). Options:
            `max_connections` (default 20), `socket_timeout` (seconds, default 5), and
            with TLS `ssl_ca_certs`, `ssl_certfile`, `ssl_keyfile` (paths).
        prefix: How all keys begin; apps that share a database each have their own.

    Raises:
        ConfigurationError: The URL is wrong, or redis-py is not installed.
    """

    def __init__(self, url: str, *, prefix: str = "pocket-auth") -> None:
        try:
            from ._redis import RedisServer
        except ImportError:
            raise ConfigurationError(
                "storage in Redis needs its driver: "
                'pip install "langchain-pocket-auth[redis]"'
            ) from None
        check_text(prefix)
        self._server = RedisServer(url)
        self._prefix = prefix
        # A namespace's digest has 64 characters: no other prefix's keys fit this.
        self._pattern = re.sub(r"([*?\[\]\\])", r"\\\1", prefix) + ":" + "?" * 64

    async def open(self) -> None:
        """
        Connect and look at the server; nothing is created.

        What may lose sessions is logged: a `maxmemory-policy` that evicts (a
        warning), and that nothing is saved to disk.

        Raises:
            ConfigurationError: Password, permissions, certificate or version do not
                do, or the URL is of a cluster and the server is not, or vice versa.
            StorageUnavailable: Nobody answers.
        """
        await self._server.open()

    async def close(self) -> None:
        await self._server.close()

    async def get(self, key: Key) -> Record | None:
        return _record(await self._run(scripts.GET, key, repeat=True))

    async def put(
        self,
        key: Key,
        value: bytes,
        *,
        version: int,
        expected: int | None,
        ttl: timedelta | None = None,
    ) -> bool:
        lifetime = "" if ttl is None else _milliseconds(ttl)
        arguments = (key[0], str(version), value, _version(expected), lifetime)
        return bool(await self._run(scripts.PUT, key, *arguments))

    async def delete(self, key: Key, *, expected: int | None = None) -> bool:
        return bool(await self._run(scripts.DELETE, key, _version(expected)))

    async def list(self, namespace: str) -> dict[str, Record]:
        check_text(namespace)
        found = await self._server.run(scripts.LIST, self._hash(namespace), repeat=True)
        return {name: record for (_, name), record in _records(found).items()}

    async def take(self, key: Key) -> Record | None:
        return _record(await self._run(scripts.TAKE, key))

    async def lease(self, key: Key, holder: str, duration: timedelta) -> bool:
        check_text(holder)
        arguments = (holder, _milliseconds(duration))
        return bool(await self._run(scripts.LEASE, key, *arguments))

    async def free(self, key: Key, holder: str) -> None:
        check_text(holder)
        await self._run(scripts.FREE, key, holder)

    async def rewrite(self, key: Key, value: bytes, *, expected: int) -> bool:
        return bool(await self._run(scripts.REWRITE, key, value, str(expected)))

    async def walk(
        self,
        namespace: str | None = None,
        *,
        after: str | None = None,
        limit: int = 500,
    ) -> Page:
        """
        Return a page, as the contract says; of all records by `SCAN`.

        A server that is started anew or replaced has its hashes in another order:
        the walk then begins again, so records may be met twice. While slots move
        between the nodes of a cluster, records may be missed.
        """
        place: _Place
        place = json.loads(after) if after else await self._beginning(namespace)
        run, nodes, cursor, hashes = place
        node = nodes[0]
        if not hashes:
            # A quarter: most namespaces hold a few records.
            count = max(limit // 4, 1)
            found = await self._server.scan(node, self._pattern, cursor, count)
            cursor = None if found[0] == "0" else found[0]
            hashes = [[key, "0"] for key in found[1]]
        share = str(max(limit // max(len(hashes), 1), 1))
        answers = await asyncio.gather(
            *(
                self._server.run(scripts.PAGE, key, at, share, repeat=True)
                for key, at in hashes
            )
        )
        records: dict[Key, Record] = {}
        further: _Hashes = []
        for (key, _), (at, *fields) in zip(hashes, answers, strict=True):
            records |= _records(fields)
            if at != b"0":
                further.append([key, at.decode()])
        if await self._server.run_id(node) != run:
            place = await self._beginning(namespace)
        elif further or cursor is not None:
            place = [run, nodes, cursor, further]
        elif nodes[1:]:
            place = [await self._server.run_id(nodes[1]), nodes[1:], "0", []]
        else:
            return Page(records, None)
        return Page(records, json.dumps(place))

    async def sweep(self, limit: int = 1000) -> int:
        """
        Do nothing, and return 0: Redis needs nobody for this.

        A namespace ends with the last of its records. Where others stay, `list` and
        `walk` erase what has ended, and each new record up to ten that have.
        """
        del limit
        return 0

    async def _beginning(self, namespace: str | None) -> _Place:
        if namespace is None:
            nodes = self._server.nodes()
            return [await self._server.run_id(nodes[0]), nodes, "0", []]
        check_text(namespace)
        key = self._hash(namespace)
        node = self._server.node_of(key)
        return [await self._server.run_id(node), [node], None, [[key, "0"]]]

    def _hash(self, namespace: str) -> str:
        return f"{self._prefix}:{hashlib.sha256(namespace.encode()).hexdigest()}"

    async def _run(
        self,
        script: scripts.Script,
        key: Key,
        *arguments: str | bytes,
        repeat: bool = False,
    ) -> Any:
        check_text(*key)
        namespace, name = key
        hash_key = self._hash(namespace)
        return await self._server.run(script, hash_key, name, *arguments, repeat=repeat)


def _version(expected: int | None) -> str:
    return "" if expected is None else str(expected)


def _milliseconds(duration: timedelta) -> str:
    return str(-(-duration // timedelta(milliseconds=1)))  # no less than asked for


def _record(found: Any) -> Record | None:
    return Record(int(found[0]), found[1]) if found else None


def _records(found: Any) -> dict[Key, Record]:
    parts = iter(found)
    return {
        (space.decode(), name.decode()): Record(int(version), value)
        for space, name, version, value in zip(*[parts] * 4, strict=True)
    }
