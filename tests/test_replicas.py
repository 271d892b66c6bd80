"""Two replicas of an app behind a load balancer: whoever is asked can answer."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import cycle
from pathlib import Path

import httpx
import pytest
from conftest import ACME, free_port
from databases import Postgres, Redis
from support import BOUND_S, KEYS

from langchain_pocket_auth.testing import AuthorizationServer, Browser
from langchain_pocket_auth.testing._outside import outside

FLOWS = 12
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


class RoundRobin:
    """A load balancer that sends each request to the next replica."""

    def __init__(self, ports: list[int]) -> None:
        self._next, self.served = cycle(ports), dict.fromkeys(ports, 0)

    async def __call__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            length = _LENGTH.search(head)
            body = await reader.readexactly(int(length[1])) if length else b""
            port = next(self._next)
            self.served[port] += 1
            replica, to_replica = await asyncio.open_connection("127.0.0.1", port)
            # One request a connection, so that the next one goes elsewhere.
            head = re.sub(rb"\r\nconnection:[^\r]*", b"", head, flags=re.IGNORECASE)
            to_replica.write(head[:-4] + b"\r\nConnection: close\r\n\r\n" + body)
            writer.write(await replica.read())
            to_replica.close()
            await writer.drain()
        writer.close()


@contextmanager
def replicas(store: str, base: str, issuer: str, folder: Path) -> Iterator[list[int]]:
    """Run two replicas of tests/replica.py."""
    ports = [free_port(), free_port()]
    script = Path(__file__).with_name("replica.py")
    running = [
        subprocess.Popen(
            [
                *(sys.executable, script, store, KEYS, base, str(port), issuer),
                folder / "graphs.db",
            ]
        )
        for port in ports
    ]
    try:
        end = time.monotonic() + 45
        for port in ports:
            while True:
                with suppress(httpx.TransportError):
                    httpx.get(f"http://127.0.0.1:{port}/connect/none", timeout=BOUND_S)
                    break
                assert time.monotonic() < end, "a replica does not start"
                time.sleep(0.05)
        yield ports
    finally:
        for process in running:
            process.kill()
            process.wait()


async def flows(store: str, folder: Path, count: int) -> dict[str, int]:
    """Let *count* persons ask, consent and go on; return what was counted."""
    base = f"http://127.0.0.1:{free_port()}"
    with outside(), AuthorizationServer() as server:
        server.register(
            client_id=ACME[0],
            client_secret=ACME[1],
            redirect_uris=[f"{base}/auth/acme/oauth2/callback"],
        )
        with replicas(store, base, server.issuer, folder) as ports:
            balancer = RoundRobin(ports)
            port = int(base.rpartition(":")[2])
            listening = await asyncio.start_server(balancer, "127.0.0.1", port)
            counted = dict.fromkeys(("done", "asked", "asked again", "wrong"), 0)
            several = asyncio.Semaphore(8)

            async def flow(http: httpx.AsyncClient, user: str) -> None:
                async with several:
                    asked = (await http.post(f"/ask/{user}")).json()
                    counted["asked"] += len(asked["links"])
                    await Browser(user).avisit(asked["links"][0])
                    went_on = (await http.post(f"/resume/{user}")).json()
                    counted["asked again"] += len(went_on["links"])
                    counted["done"] += went_on["said"] == [user]
                    counted["wrong"] += went_on["said"] not in ([], [user])

            async with (
                listening,
                httpx.AsyncClient(base_url=base, timeout=30, verify=False) as http,
            ):
                await asyncio.gather(*(flow(http, f"user{n}") for n in range(count)))
            counted["consents"] = server.authorizations
            counted["token requests"] = server.token_requests["authorization_code"]
            counted["replays"] = server.code_replays
            counted["served by the busier"] = max(balancer.served.values())
            counted["served by the other"] = min(balancer.served.values())
        return counted


@pytest.mark.timeout(120)
async def test_any_replica_serves_any_step(
    tmp_path: Path, postgres_server: Postgres
) -> None:
    """Question, page, callback and resume fall on either; nobody is asked twice."""
    url = postgres_server.url(postgres_server.fresh())
    counted = await flows(url, tmp_path, FLOWS)
    busier, other = counted.pop("served by the busier"), counted["served by the other"]
    assert busier - counted.pop("served by the other") <= 1, (busier, other)
    assert counted == {
        "done": FLOWS,
        "asked": FLOWS,
        "asked again": 0,
        "wrong": 0,
        "consents": FLOWS,
        "token requests": FLOWS,
        "replays": 0,
    }


if (
    __name__ == "__main__"
):  # python tests/test_replicas.py [sqlite|postgres|redis] [200]
    import tempfile
    from contextlib import ExitStack

    kind, number = (*sys.argv[1:], "postgres", "200")[:2]
    with ExitStack() as stack:
        where = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = f"sqlite:///{where}/store.db"
        if kind != "sqlite":
            running = stack.enter_context(Postgres() if kind == "postgres" else Redis())
            url = running.url(running.fresh())
        begun = time.monotonic()
        counts = asyncio.run(flows(url, where, int(number)))
        print(kind, counts, f"{time.monotonic() - begun:.1f} s")
