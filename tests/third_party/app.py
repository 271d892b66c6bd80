"""An app that uses Acme's package: `app.py connect` and, in a new process, `again`."""

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable

import acme_pocket
import httpx

from langchain_pocket_auth import AuthContext, AuthState, PocketAuth
from langchain_pocket_auth.testing import Browser

ASKED = {
    "acme": ["read"],
    "acme-admin": ["write"],
    "acme-keys": [],
    "acme-legacy": ["read"],
}
KEY = "a-key-typed-by-a-person"


def make() -> PocketAuth:
    return PocketAuth(
        os.environ["APP_STORE"],
        base_url=os.environ["APP_URL"],
        providers=[acme_pocket.ACME, acme_pocket.PROVIDERS],
        handlers=[acme_pocket.AcmeAdminHandler, acme_pocket.AcmeLegacyHandler],
        clients={
            "acme": ("acme-id", os.environ["ACME_SECRET"]),
            "acme-admin": ("acme-id", os.environ["ACME_SECRET"]),
        },
    )


async def connect(pocket: PocketAuth, provider: str) -> AuthContext:
    request = pocket.make_request(ASKED[provider], auth_provider=provider)
    link = await pocket.prepare(request, auth_provider=provider)
    assert link is not None
    page = await Browser("alice", fields={"token": KEY}).avisit(link)
    assert page.status_code == 200, page.text
    return await pocket.authenticate(request, auth_provider=provider, timeout=0)


async def again(pocket: PocketAuth, provider: str) -> AuthContext:
    needed = ["read"] if provider == "acme-admin" else ASKED[provider]
    request = pocket.make_request(needed, auth_provider=provider)

    async def state() -> AuthState:
        return await pocket.check(request, auth_provider=provider)

    assert await state() in {AuthState.SKIP_AUTH, AuthState.DO_REFRESH}
    if provider != "acme-keys":  # whose keys last
        async with asyncio.timeout(20):
            while await state() is not AuthState.DO_REFRESH:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    return await pocket.authenticate(request, auth_provider=provider, timeout=0)


async def call(auth: AuthContext) -> int:
    """Call Acme's API as a tool does."""
    async with httpx.AsyncClient(timeout=10, headers=auth.headers()) as api:
        return (await api.get(f"{os.environ['ACME_URL']}/api/things")).status_code


async def main(step: Callable[[PocketAuth, str], Awaitable[AuthContext]]) -> None:
    pocket = make()
    told = {}
    for provider in ASKED:
        auth = await step(pocket, provider)
        told[provider] = {
            "type": type(auth).__name__,
            "environment": auth.to_dict(),
            "profiled": auth.to_profiled_dict("work"),
            "headers": auth.headers(),
            "status": await call(auth),
        }
    await pocket.aclose()
    json.dump({"from": acme_pocket.__file__, "told": told}, sys.stdout)


if __name__ == "__main__":
    asyncio.run(main({"connect": connect, "again": again}[sys.argv[1]]))
