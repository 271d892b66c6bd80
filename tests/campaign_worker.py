"""One replica of the campaign: it serves its owners until it dies at a named point."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import importlib
import json
import logging
import os
import random
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextvars import Context, ContextVar
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi import FastAPI
from support import Clock, Watched, outcome_of

from langchain_pocket_auth import (
    AuthorizationRequired,
    PocketAuth,
    PocketAuthError,
    Provider,
    ProviderUnavailable,
    _http,
)
from langchain_pocket_auth.storage import Key
from langchain_pocket_auth.testing import Browser, FlowStuck
from langchain_pocket_auth.testing._outside import is_outside

PACKAGE = "langchain_pocket_auth."
# The package's times, a quarter of them, so that a short campaign sees them end.
TIMES = {
    ("_http", "TIMEOUT_S"): 2.0,
    ("_saving", "LEASE"): timedelta(seconds=7),
    ("_refresh", "LEASE"): timedelta(seconds=7),
    ("_refresh", "REQUEST_TIMEOUT"): timedelta(seconds=5),
    ("_exchange", "EXCHANGE_LIMIT"): timedelta(seconds=8),
    ("_attempts", "EXCHANGE_LIMIT"): timedelta(seconds=8),
}
IN_FLIGHT_S = 0.004
"""How long after a token request is sent it counts as under way."""
FINAL_S = 60.0
LEAVES = 0.03
"""How often an owner disconnects after a visit, so that consents go on."""
_request: ContextVar[int | None] = ContextVar("request", default=None)


@dataclass(frozen=True, slots=True)
class Task:
    """What a replica is started with."""

    name: str
    storage: str
    keys: str
    base_url: str
    provider: dict[str, Any]
    client: tuple[str, str]
    folder: Path
    owners: tuple[str, ...]
    tasks: int
    seed: int
    verbose: bool = False
    final: bool = False
    """Whether it visits every owner once and ends."""


class _WrongClock(Clock):
    """The clock of one replica; the store's stays right."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        with contextlib.suppress(ImportError):
            from langchain_pocket_auth._clock import StoreClock

            ask = StoreClock.ask
            super().__init__(patch)
            patch.setattr(StoreClock, "ask", ask)
            return
        super().__init__(patch)


class Link:
    """The connection to the supervisor: what happens here, what is to be done."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._lock = connection, threading.Lock()
        self.passed: Counter[str] = Counter()
        self._spared: frozenset[str] | None = None
        self.stopping = self.stormy = False
        self.clock = _WrongClock(pytest.MonkeyPatch())

    def tell(self, kind: str, *what: Any) -> None:
        """Say that something happened; the supervisor has it even if we die next."""
        with self._lock:
            self._connection.send((kind, time.monotonic(), *what))

    def obey(self) -> None:
        """Do as the supervisor says, in a thread of its own."""
        with contextlib.suppress(EOFError, OSError):
            while not self.stopping:
                kind, value = self._connection.recv()
                if kind == "stop":
                    self.stopping = True
                elif kind == "storm":
                    self.stormy = True
                elif kind == "spare":
                    self._spared = value
                elif kind == "ahead":
                    self.clock.ahead = timedelta(seconds=value)

    def at(self, point: str) -> None:
        """Pass a named point, or die there."""
        self.passed[point] += 1
        if self._spared is not None and point not in self._spared:
            self.tell("killed", point)
            os.kill(os.getpid(), signal.SIGKILL)


def _caller() -> str:
    """Return which function of the package stands behind a call of the backend."""
    frame, inmost = sys._getframe(1), "?"
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        name = f"{module.removeprefix(PACKAGE)}.{frame.f_code.co_name}"
        if module.startswith(PACKAGE) and not name.startswith(("storage", "_loop")):
            if not name.startswith("_vault"):
                return name
            inmost = name  # in a task of its own, as shielded calls are
        frame = frame.f_back  # type: ignore[assignment]
    return inmost


def purpose_of(key: Key) -> str:
    """Return what kind of record a key is of."""
    namespace, name = key
    return json.loads(name)[0] if name.startswith("[") else namespace


class Storage(Watched):
    """The real storage; before and after each of its calls is a named point."""

    def __init__(self, url: str, link: Link) -> None:
        super().__init__(url)
        self._link = link

    async def _call(self, name: str, key: Key, *args: Any, **kwargs: Any) -> Any:
        what = "owner" if name in {"list", "walk"} else purpose_of(key)
        point = f"{_caller()}: {name} {what}"
        self._link.at(f"{point}, before")
        result = await super()._call(name, key, *args, **kwargs)
        number = _request.get()
        if name == "put" and what == "session" and number is not None:
            self._link.tell("saved" if result else "superseded", number)
            _request.set(None)
        self._link.at(f"{point}, after")
        return result


def watch_requests(name: str, link: Link) -> None:
    """Make each request to a provider a numbered one with named points."""
    original, numbers = _http.Http.request, count(1)

    async def request(self: Any, method: str, url: str, **how: Any) -> Any:
        form, number = how.get("data") or {}, next(numbers)
        what = form.get("grant_type") or urlsplit(url).path.strip("/")
        point = f"{_caller()}: {what} request"
        how["headers"] = (how.get("headers") or {}) | {"X-Campaign": f"{name}#{number}"}
        link.at(f"{point}, before")
        link.tell("sent", number)
        _request.set(number)
        loop = asyncio.get_running_loop()
        timer = loop.call_later(IN_FLIGHT_S, link.at, f"{point}, under way")
        try:
            answer = await original(self, method, url, **how)
        except ProviderUnavailable:
            link.tell("lost", number)
            raise
        except BaseException as error:
            link.tell("dropped", number, type(error).__name__)
            raise
        finally:
            timer.cancel()
        link.tell("answered", number)
        link.at(f"{point}, after")
        return answer

    _http.Http.request = request  # type: ignore[method-assign]


class Inside(httpx.BaseTransport):
    """Lets a browser load our own pages without a socket, on the replica's loop."""

    def __init__(self, app: FastAPI) -> None:
        self._app = httpx.ASGITransport(app)
        self._loop = asyncio.get_running_loop()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        # A context of its own: what the app logs is not the person's doing.
        work = asyncio.run_coroutine_threadsafe
        return Context().run(work, self._answer(request), self._loop).result(30)

    async def _answer(self, request: httpx.Request) -> httpx.Response:
        inner = httpx.Request(
            request.method,
            request.url,
            headers=request.headers,
            content=request.read(),
        )
        answer = await self._app.handle_async_request(inner)
        content = await answer.aread()
        return httpx.Response(
            answer.status_code, headers=answer.headers, content=content
        )


class Replica:
    """A pocket on the shared store, and the tasks that use it."""

    def __init__(self, task: Task, link: Link) -> None:
        self._task, self._link = task, link
        self._pocket = PocketAuth(
            lambda: Storage(task.storage, link),
            keys=task.keys,
            base_url=task.base_url,
            providers=[Provider(**task.provider)],
            clients={"acme": task.client},
            session_cache_ttl=timedelta(),
        )
        app = FastAPI(openapi_url=None)
        app.include_router(self._pocket.router)
        self._inside = Inside(app)

    async def run(self) -> None:
        """Serve until told to stop, or each owner once."""
        rng = random.Random(f"{self._task.seed} {self._task.name}")
        names = [
            f"{self._task.seed} {self._task.name} {n}" for n in range(self._task.tasks)
        ]
        async with asyncio.TaskGroup() as group:
            ticker = group.create_task(self._report())
            if self._task.final:
                queue = iter(rng.sample(self._task.owners, len(self._task.owners)))
                work = [group.create_task(self._finish(queue)) for _ in names]
            else:
                work = [group.create_task(self._serve(random.Random(n))) for n in names]
            await asyncio.wait(work)
            ticker.cancel()
        await self._pocket.aclose()
        self._link.tell("points", dict(self._link.passed))

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(0.2)
            passed, self._link.passed = self._link.passed, Counter()
            self._link.tell("points", dict(passed))

    async def _serve(self, rng: random.Random) -> None:
        while not self._link.stopping:
            owner = rng.choice(self._task.owners)
            await self._visit(owner, rng)
            if self._link.stormy and rng.random() < LEAVES:
                await self._leave(owner)
            await asyncio.sleep(rng.uniform(0, 0.03))

    async def _leave(self, owner: str) -> None:
        self._link.tell("leaving", owner)
        try:
            await self._pocket.delete_session("acme", owner=owner)
        except PocketAuthError as error:
            self._link.tell("failed", owner, f"leaving {type(error).__name__}")

    async def _finish(self, owners: Iterator[str]) -> None:
        honest = random.Random(0)
        for owner in owners:
            end = time.monotonic() + FINAL_S
            while not await self._visit(owner, honest) and time.monotonic() < end:  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    async def _visit(self, owner: str, rng: random.Random) -> bool:
        """Act for an owner as a tool does; whether the provider's API answered."""
        where: Any = {"auth_provider": "acme", "owner": owner}
        asks = self._pocket.make_request(["read"], auth_provider="acme")
        try:
            await self._pocket.check(asks, **where)
            context = await self._pocket.authenticate(asks, timeout=0, **where)
        except AuthorizationRequired as error:
            state = re.search(r"\((\w+)\)", str(error))
            self._link.tell("asked", owner, state[1] if state else "?")
            await self._consent(owner, rng)
            return False
        except PocketAuthError as error:
            self._link.tell("failed", owner, type(error).__name__)
            return False
        headers = {"X-Handed": repr(time.time()), "X-Campaign": self._task.name}
        try:
            async with context.async_client(verify=False, headers=headers) as api:
                answer = await api.get("/whoami", params={"owner": owner})
        except (httpx.HTTPError, PocketAuthError) as error:
            self._link.tell("failed", owner, f"API {type(error).__name__}")
            return False
        if answer.status_code != 200:
            self._link.tell("failed", owner, f"API {answer.status_code}")
            return False
        told = answer.json()["sub"]
        self._link.tell("served" if told == owner else "wrong", owner)
        return True

    async def _consent(self, owner: str, rng: random.Random) -> None:
        """Let the person of an owner act, if no other replica has them."""
        with _person(self._task.folder / f"{owner}.lock") as here:
            if not here:
                return
            try:
                await self._connect(owner, rng)
            except (PocketAuthError, FlowStuck, httpx.HTTPError) as error:
                self._link.tell("stuck", owner, type(error).__name__)

    async def _connect(self, owner: str, rng: random.Random) -> None:
        asks = self._pocket.make_request(["read"], auth_provider="acme")
        link = await self._pocket.prepare(asks, auth_provider="acme", owner=owner)
        if link is None:
            return
        fate = 0.5 if self._task.final else rng.random()
        person = Browser(owner)
        person._http._mounts[httpx._utils.URLPattern(self._task.base_url)] = (
            self._inside
        )
        callback = await asyncio.to_thread(person.authorize, link, approve=fate > 0.04)
        if fate > 0.96:
            self._link.tell("closed tab", owner)
            return
        self._link.tell("delivering", owner)
        # Now and then it is reloaded while it loads.
        times = 2 if fate < 0.15 else 1
        pages = await asyncio.gather(
            *(asyncio.to_thread(person.visit, callback) for _ in range(times))
        )
        self._link.tell("delivered", owner, [outcome_of(page) for page in pages])


@contextlib.contextmanager
def _person(path: Path) -> Iterator[bool]:
    """A person is at one place at a time; the lock ends with the process."""
    descriptor, here = os.open(path, os.O_CREAT | os.O_RDWR, 0o600), True
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            here = False
        yield here
    finally:
        os.close(descriptor)


def _log(task: Task) -> None:
    """Write all that is said here into a file, in which secrets are searched for."""
    out = os.open(
        task.folder / f"{task.name.partition('.')[0]}.log",
        os.O_CREAT | os.O_APPEND | os.O_WRONLY,
        0o600,
    )
    os.dup2(out, 1)
    os.dup2(out, 2)
    handler = logging.StreamHandler(open(1, "w", closefd=False))  # noqa: SIM115
    handler.addFilter(lambda _: not is_outside())
    level = logging.DEBUG if task.verbose else logging.INFO
    logging.basicConfig(level=level, handlers=[handler], force=True)


def main(task: Task, connection: Connection) -> None:
    """Run a replica; the process ends with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor decides
    _log(task)
    for (module, name), value in TIMES.items():
        where = importlib.import_module(f"{PACKAGE}{module}")
        assert isinstance(getattr(where, name), type(value))
        setattr(where, name, value)
    link = Link(connection)
    watch_requests(task.name, link)
    threading.Thread(target=link.obey, daemon=True).start()

    async def run() -> None:
        await Replica(task, link).run()

    try:
        asyncio.run(run())
    except BaseException as error:
        logging.getLogger("campaign").exception("the replica ends")
        link.tell("broken", type(error).__name__)
        raise
    link.tell("done")
