"""What is Redis' alone: its connections, one or a cluster's."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

from redis.asyncio import ConnectionPool, RedisCluster, SSLConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as NotConnected
from redis.exceptions import NoScriptError, ReadOnlyError, ResponseError

from .._errors import ConfigurationError, PocketAuthError, StorageUnavailable
from ._redis_errors import BROKEN, FAILURES, UNSENT, explained
from ._redis_scripts import Script
from ._redis_url import TIMEOUT_S, settings_of

logger = logging.getLogger(__name__)

OLDEST = (6, 2)  # HRANDFIELD


class RedisServer:
    """
    The connections to a Redis, or to a cluster of them.

    A command is sent once: after a broken connection or a time-out it may have
    happened, and only one that reads is sent again. What comes before it (to connect,
    to check an idle connection, to find a cluster's nodes) is tried twice.
    """

    def __init__(self, url: str) -> None:
        self._cluster, self._settings = settings_of(url)
        self._driver: _Cluster | _Single | None = None
        self._turns: asyncio.Semaphore

    async def open(self) -> None:
        """Connect, and look whether this Redis will do."""
        # The driver refuses what is above its bound; so nobody asks it for that.
        self._turns = asyncio.Semaphore(self._settings["max_connections"])
        driver = _Cluster if self._cluster else _Single
        self._driver = driver(self._settings)
        try:
            await self._guarded(self._driver.open, repeat=True)
            for name in self.nodes():
                await self._look_at(name)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        driver, self._driver = self._driver, None
        if driver is not None:
            with suppress(*FAILURES):  # closed all the same
                await driver.close()

    async def run(
        self, script: Script, key: str, *arguments: str | bytes, repeat: bool = False
    ) -> Any:
        """Run a script; *repeat*: it only reads."""
        send = self._opened().send

        async def run() -> Any:
            try:
                return await send("EVALSHA", script.digest, 1, key, *arguments)
            except NoScriptError:  # a server that was started anew has none
                return await send("EVAL", script.body, 1, key, *arguments)

        return await self._guarded(run, repeat=repeat)

    def nodes(self) -> list[str]:
        """Return the names of all primaries."""
        return self._opened().nodes()

    def node_of(self, key: str) -> str:
        """Return the name of the primary that has a key."""
        return self._opened().node_of(key)

    async def scan(
        self, node: str, pattern: str, cursor: str, count: int
    ) -> tuple[str, list[str]]:
        """Return the next cursor and some keys of a primary."""
        arguments = ("SCAN", cursor, "MATCH", pattern, "COUNT", count)
        further, keys = await self._ask(node, *arguments)
        if isinstance(further, dict):  # a cluster's client: by node
            [further] = further.values()
        return str(int(further)), [key.decode() for key in keys]

    async def run_id(self, node: str) -> str:
        """Return what changes when a primary is started anew or replaced."""
        return _facts(await self._ask(node, "INFO", "server")).get("run_id", "")

    async def _look_at(self, node: str) -> None:
        facts = _facts(await self._ask(node, "INFO"))
        version = facts.get("redis_version", "")
        numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
        if version and numbers < OLDEST:
            raise ConfigurationError(
                f"this Redis is version {version}, and 6.2 or newer is needed"
            )
        if facts.get("maxmemory_policy", "noeviction") != "noeviction":
            logger.warning(
                "Redis has the maxmemory-policy %s: when its memory is full it will "
                "drop records, and a dropped session has to be connected again; set "
                "noeviction",
                facts["maxmemory_policy"],
            )
        if facts.get("aof_enabled") == "0":
            # Managed services forbid CONFIG and save in their own way.
            with suppress(ConfigurationError, StorageUnavailable):
                saves = await self._ask(node, "CONFIG", "GET", "save")
                if not (saves.get("save") if isinstance(saves, dict) else saves[1]):
                    logger.info(
                        "Redis saves nothing to its disk (neither appendonly nor save "
                        "is on): sessions are lost when it is started anew"
                    )

    async def _ask(self, node: str, *command: Any) -> Any:
        send = self._opened().send
        return await self._guarded(lambda: send(*command, node=node), repeat=True)

    def _opened(self) -> _Cluster | _Single:
        if self._driver is None:
            raise StorageUnavailable("the Redis store is not open")
        return self._driver

    async def _guarded(
        self, work: Callable[[], Awaitable[Any]], *, repeat: bool
    ) -> Any:
        """Do *work*; errors of the driver may quote what is secret, and end here."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await self._turns.acquire()
        except TimeoutError:
            raise StorageUnavailable(
                "the Redis store does not answer: all connections are in use"
            ) from None
        failure: PocketAuthError | None = None
        try:
            for _ in range(2):
                try:
                    return await work()
                except FAILURES as error:
                    failure = explained(error, writes=not repeat)
                    if not isinstance(error, (*BROKEN, *UNSENT) if repeat else UNSENT):
                        break
        finally:
            self._turns.release()
        # Not in the `except`: it would be chained to the driver's.
        assert failure is not None  # noqa: S101 - the loop returns or sets it
        raise failure


class _Single:
    """A pool of connections to one server."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        # For connecting and for health checks alone.
        retry = Retry(NoBackoff(), 1, supported_errors=(NotConnected,))
        self._pool = ConnectionPool(retry=retry, **settings)

    async def open(self) -> None:
        await self.send("PING")

    async def close(self) -> None:
        await self._pool.aclose()

    async def send(self, *command: Any, node: str = "") -> Any:
        del node
        # Not through `Redis.execute_command`, which repeats what it has sent.
        connection = await self._pool.get_connection()  # type: ignore[no-untyped-call]
        try:
            await connection.send_command(*command)
            return await connection.read_response()
        except ResponseError as error:
            if isinstance(error, ReadOnlyError) or "READONLY" in str(error):
                # A primary no more: its name leads to another.
                await connection.disconnect()
            raise
        finally:
            await self._pool.release(connection)

    def nodes(self) -> list[str]:
        return [""]

    def node_of(self, key: str) -> str:
        del key
        return ""


class _Cluster:
    """The driver's client of a cluster, which follows slots as they move."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        settings = dict(settings)
        if settings.pop("connection_class", None) is SSLConnection:
            settings["ssl"] = True
        self._client = RedisCluster(retry=Retry(NoBackoff(), 0), **settings)

    async def open(self) -> None:
        await self._client.initialize()

    async def close(self) -> None:
        await self._client.aclose()

    async def send(self, *command: Any, node: str = "") -> Any:
        if not node:
            return await self._client.execute_command(*command)
        await self._client.initialize()
        # One that has left is stood in for by another, whose run id is another.
        to = self._client.get_node(node_name=node) or self._client.get_default_node()
        return await self._client.execute_command(*command, target_nodes=to)

    def nodes(self) -> list[str]:
        return [node.name for node in self._client.get_primaries()]

    def node_of(self, key: str) -> str:
        node = self._client.get_node_from_key(key)
        return node.name if node else ""


def _facts(answer: Any) -> dict[str, str]:
    """Read what INFO answers; a cluster's client has done so already."""
    if isinstance(answer, dict):
        return {name: str(value) for name, value in answer.items()}
    lines = answer.decode(errors="replace").splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)
