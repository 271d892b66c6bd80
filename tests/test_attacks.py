# ruff: noqa: F811, PT012 - fixtures of other files; a client is closed, too
"""What a hostile reviewer found: each was a way in, or lost, before it was mended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import httpx
import pytest
from conftest import provider
from support import Clock, answer_url, connect, link, outcome_of, state
from test_public import (  # noqa: F401 - fixtures
    certificate,
    link_of,
    make_public,
    person,
    pressed,
    seen,
    served,
    visits,
    web_app,
)
from test_quarantine import (  # noqa: F401 - fixtures
    ALICE,
    MALLORY,
    URL,
    at,
    bob,
    chat,
    make_site,
    nobody,
    refusal,
    signed_in,
)

from langchain_pocket_auth import (
    ConfigurationError,
    FutureNotFound,
    FutureStore,
    PocketAuth,
)
from langchain_pocket_auth.server import callback_of
from langchain_pocket_auth.server._visitors import COOKIE
from langchain_pocket_auth.testing import AuthorizationServer, Browser
from langchain_pocket_auth.testing._outside import outside

# --------------------------------------------------------------------- 1: the cookie


@pytest.mark.parametrize("blank", [b"\xa0", b"\x85"])
@pytest.mark.parametrize("own", [False, True])
async def test_cookie_of_a_neighbour_is_not_taken_for_ours(
    make_public: Callable[..., PocketAuth],
    certificate: Any,
    person: Callable[..., Browser],
    blank: bytes,
    own: bool,
) -> None:
    """A blank that is none in a browser hides the prefix there, and not from us."""
    pocket = make_public(confirm="code")
    with served(web_app(pocket.router), pocket.base_url, certificate):
        url, mallory, bob = await link_of(pocket, "mallory"), *map(person, "mb")
        page = await asyncio.to_thread(pressed, mallory, url)
        hers = page.headers["set-cookie"].partition(";")[0].partition("=")[2]
        callback = await asyncio.to_thread(
            bob.authorize,
            page.text.partition("0;url=")[2].partition('"')[0].replace("&amp;", "&"),
        )
        planted = blank + COOKIE.encode() + b"=" + hers.encode()
        cookie = b"; ".join([COOKIE.encode() + b"=" + b"b" * 43] * own + [planted])
        with outside():
            answer = await asyncio.to_thread(
                lambda: bob._http.get(callback, headers=[(b"Cookie", cookie)])
            )
        assert (answer.status_code, outcome_of(answer)) == (403, "mismatch")
        assert await asyncio.to_thread(seen, mallory, url) == (200, "pending")


# ------------------------------------------------------ 2: answers beside our routes


@pytest.mark.parametrize("design", ["verify_user", "confirm"])
async def test_answer_beside_our_routes_is_nobodys_in_public(
    make_site: Callable[..., Any],
    server: AuthorizationServer,
    bob: Browser,
    design: str,
) -> None:
    """Bob's answer to the provider's page of mallory's link never becomes hers."""
    settings = {"verify_user": nobody, "confirm": "code"}
    site = make_site(**{design: settings[design]})
    url = await link(site.pocket, owner=MALLORY)
    callback = await answer_url(bob, await site.begin(url, at(MALLORY)))
    found = callback_of(callback, URL)
    with pytest.raises((ConfigurationError, FutureNotFound)):
        await asyncio.to_thread(
            FutureStore.resolve_future, found["uid"], found["parameters"]["code"]
        )
    with refusal("replayed"):
        await site.vouch(url, at(MALLORY))
    held = await site.held(url)
    assert held is None or held.code is None
    assert await state(site.pocket, owner=MALLORY) == "PENDING_RESOLVE"
    assert server.token_requests.total() == 0


# ---------------------------------------------------------- 3: redirects of an API


@pytest.mark.parametrize("asynchronous", [True, False])
async def test_no_single_call_carries_a_credential_elsewhere(
    make_pocket: Callable[..., PocketAuth],
    server: AuthorizationServer,
    alice: Browser,
    asynchronous: bool,
) -> None:
    """`follow_redirects=True` of one call, with an API key that httpx leaves in."""
    row = provider(
        server, "acme", api_base_url=server.api, api_credential={"header": "X-Api-Key"}
    )
    pocket = make_pocket(providers=[row])
    auth = await connect(pocket, alice, "read")
    got: list[str] = []

    def api(request: httpx.Request) -> httpx.Response:
        got.append(request.url.host)
        there = {"Location": "https://evil.example/take"}
        return httpx.Response(307 if len(got) == 1 else 200, headers=there)

    transport, to = httpx.MockTransport(api), f"{server.api}/one"
    with outside(), pytest.raises(ConfigurationError, match=r"evil\.example"):
        if asynchronous:
            async with auth.async_client(transport=transport) as http:
                await http.get(to, follow_redirects=True)
        else:
            with auth.sync_client(transport=transport) as client:
                client.get(to, follow_redirects=True)
    assert "evil.example" not in got


# ------------------------------------------------------------------- 4: locking out


async def test_page_of_another_site_locks_nobody_out(
    make_public: Callable[..., PocketAuth],
) -> None:
    """Images and frames that a stranger's page names do not count as Bob's guesses."""
    pocket = make_public()
    url = await link_of(pocket, "bob")
    async with visits(web_app(pocket.router), "198.41.0.4") as bob:
        for dest in ["image", "iframe", "script", "empty"] * 20:
            answer = await bob.get(
                "/connect/guess",
                headers={"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": dest},
            )
            assert (answer.status_code, outcome_of(answer)) == (403, "mismatch")
        bob.cookies.set("who", "bob")
        came = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "document"}
        page = await bob.get(url, headers=came)
        assert (page.status_code, outcome_of(page)) == (200, "pending")


# ------------------------------------------- 5: another user of the same machine


async def test_other_user_of_this_machine_has_no_page_of_connections(
    make_pocket: Callable[..., PocketAuth], alice: Browser, bob: Browser
) -> None:
    """A port of 127.0.0.1 is everybody's there: who has no link sees and ends nothing."""
    pocket = make_pocket()
    await connect(pocket, alice, "read")
    await link(pocket, "more")  # so that it listens
    [known] = await pocket.connections()
    async with httpx.AsyncClient() as stranger:  # no browser: it sends what it likes
        with outside():
            page = await stranger.get(f"{pocket.base_url}/connections")
            assert (page.status_code, outcome_of(page)) == (404, "unknown")
            for do in ("reconnect", "disconnect"):
                form = {"connection": known.id, "do": do}
                page = await stranger.post(f"{pocket.base_url}/connections", data=form)
                assert (page.status_code, outcome_of(page)) == (404, "unknown")
    assert await state(pocket, "read") == "SKIP_AUTH"


# ------------------------------------------------------- 6: held beyond its question


@pytest.mark.parametrize("after", ["code", "disconnect"])
async def test_grant_that_waits_outlives_its_question_and_no_disconnect(
    make_site: Callable[..., Any],
    server: AuthorizationServer,
    alice: Browser,
    monkeypatch: pytest.MonkeyPatch,
    after: str,
) -> None:
    """Asked anew before the code came: it is taken, or given back with the rest."""
    clock = Clock(monkeypatch)
    site = make_site(confirm="code", future_ttl=timedelta(minutes=5))
    old = await link(site.pocket, owner=ALICE)
    await site.agreed(old, alice, at(None))
    code = await site.code(old)
    clock.forward(400)
    assert (new := await link(site.pocket, owner=ALICE)) != old
    if after == "code":
        assert await site.pocket.confirm(new, code, owner=ALICE)
        assert await state(site.pocket, owner=ALICE) == "SKIP_AUTH"
        return
    await site.pocket.disconnect("acme", owner=ALICE)
    assert server.revocations == 2  # of one grant, each token
    assert not await site.pocket.confirm(new, code, owner=ALICE)
