"""What the tests of the flow share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from datetime import datetime, timedelta, tzinfo
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from langchain_pocket_auth import AuthContext, PocketAuth
from langchain_pocket_auth._seal import new_key
from langchain_pocket_auth.storage import (
    Key,
    Page,
    Record,
    StorageBackend,
    storage_from_url,
)
from langchain_pocket_auth.testing import Browser
from langchain_pocket_auth.testing._outside import outside

KEYS = new_key()
BOUND_S = 10.0


def on(provider: str = "acme", **who: Any) -> dict[str, Any]:
    """Return the keywords of the spec's methods."""
    return {"auth_provider": provider} | who


def asks(pocket: PocketAuth, *scopes: str, provider: str = "acme") -> Any:
    """Return a request of the provider's default handler."""
    return pocket.make_request(list(scopes), auth_provider=provider)


async def link(
    pocket: PocketAuth, *scopes: str, provider: str = "acme", **who: Any
) -> str:
    """Return the connect link for these scopes; there must be one."""
    request = asks(pocket, *scopes, provider=provider)
    url = await pocket.prepare(request, **on(provider, **who))
    assert url is not None
    return url


async def connect(
    pocket: PocketAuth,
    person: Browser,
    *scopes: str,
    provider: str = "acme",
    **who: Any,
) -> AuthContext:
    """Let a person connect an account; return its context."""
    url = await link(pocket, *scopes, provider=provider, **who)
    page = await person.avisit(url)
    assert page.status_code == 200, page.text
    return await token(pocket, *scopes, provider=provider, **who)


async def token(
    pocket: PocketAuth, *scopes: str, provider: str = "acme", **who: Any
) -> AuthContext:
    """Return what a tool would get, without waiting for anybody."""
    request = asks(pocket, *scopes, provider=provider)
    return await pocket.authenticate(request, timeout=0, **on(provider, **who))


async def state(
    pocket: PocketAuth, *scopes: str, provider: str = "acme", **who: Any
) -> str:
    """Return the name of the state."""
    request = asks(pocket, *scopes, provider=provider)
    return (await pocket.check(request, **on(provider, **who))).name


async def answer_url(person: Browser, url: str, *, approve: bool = True) -> str:
    """Let a person decide at the provider; return the answer, not yet delivered."""
    return await asyncio.to_thread(person.authorize, url, approve=approve)


async def deliver(url: str, **kwargs: Any) -> httpx.Response:
    """Load a URL, following nothing."""
    method = kwargs.pop("method", "GET")
    # Plain http only: reading the certificates takes 20 ms a client.
    with outside():
        async with httpx.AsyncClient(timeout=BOUND_S, verify=False) as http:
            return await http.request(method, url, **kwargs)


def query_of(url: str) -> dict[str, str]:
    """Return a URL's parameters."""
    return {k: v[0] for k, v in parse_qs(urlsplit(url).query).items()}


def outcome_of(page: httpx.Response) -> str:
    """Return what a page of ours tells."""
    found = page.text.partition('name="pocket-auth-outcome" content="')[2]
    return found.partition('"')[0]


def in_thread(work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Run a coroutine function in this thread, with a loop of its own."""
    return asyncio.run(work())


class Watched(StorageBackend):
    """A real storage whose calls are counted, and can be delayed or broken."""

    def __init__(self, inner: StorageBackend | str) -> None:
        self.inner = storage_from_url(inner) if isinstance(inner, str) else inner
        self.reads = self.writes = 0
        self.before: Callable[[str, Key], Coroutine[Any, Any, None]] | None = None

    async def _call(self, name: str, key: Key, *args: Any, **kwargs: Any) -> Any:
        if self.before is not None:
            await self.before(name, key)
        return await getattr(self.inner, name)(*args, **kwargs)

    async def open(self) -> None:
        await self.inner.open()

    async def close(self) -> None:
        await self.inner.close()

    async def get(self, key: Key) -> Record | None:
        self.reads += 1
        return await self._call("get", key, key)

    async def list(self, namespace: str) -> dict[str, Record]:
        self.reads += 1
        return await self._call("list", (namespace, ""), namespace)

    async def put(self, key: Key, value: bytes, **kwargs: Any) -> bool:
        self.writes += 1
        return await self._call("put", key, key, value, **kwargs)

    async def delete(self, key: Key, *, expected: int | None = None) -> bool:
        self.writes += 1
        return await self._call("delete", key, key, expected=expected)

    async def take(self, key: Key) -> Record | None:
        self.writes += 1
        return await self._call("take", key, key)

    async def lease(self, key: Key, holder: str, duration: Any) -> bool:
        self.writes += 1
        return await self._call("lease", key, key, holder, duration)

    async def free(self, key: Key, holder: str) -> None:
        self.writes += 1
        await self._call("free", key, key, holder)

    async def rewrite(self, key: Key, value: bytes, *, expected: int) -> bool:
        self.writes += 1
        return await self._call("rewrite", key, key, value, expected=expected)

    async def walk(self, namespace: str | None = None, **kwargs: Any) -> Page:
        self.reads += 1
        return await self._call("walk", (namespace or "", ""), namespace, **kwargs)

    async def sweep(self, limit: int = 1000) -> int:
        return await self.inner.sweep(limit)


class Clock:
    """The time as the package sees it, which a test can move ahead."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead = timedelta()
        for module in ("_service", "handlers._oauth2", "handlers._grant"):
            monkeypatch.setattr(f"langchain_pocket_auth.{module}.datetime", self)

    def now(self, zone: tzinfo) -> datetime:
        """Stand in for `datetime.now`."""
        return datetime.now(zone) + self.ahead

    def forward(self, seconds: float) -> None:
        """Move the clock."""
        self.ahead += timedelta(seconds=seconds)


async def until(
    holds: Callable[[], Coroutine[Any, Any, bool]], bound_s: float = BOUND_S
) -> None:
    """Wait for something that nobody announces."""
    async with asyncio.timeout(bound_s):
        while not await holds():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
