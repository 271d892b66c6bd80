"""`pocket-auth login demo`: the same login, at a provider of this machine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from .._errors import AuthorizationRefused, AuthorizationRequired
from .._pocket import PocketAuth
from ._terminal import LAST_PAGE_S, REFUSED, WRONG, complain, open_browser, say

if TYPE_CHECKING:
    from ..testing import AuthorizationServer

SCOPES = ["issues:read"]
REGISTRATION = ("demo-app", "demo-app-secret")


async def play(*, alone: bool, browser: bool, timeout_s: float) -> int:
    """
    Connect alice's account at a provider that lives as long as this command.

    Args:
        alone: A browser of ours agrees, instead of you.
        browser: Whether to open yours.
        timeout_s: How long to wait for you.

    Returns:
        The exit code.
    """
    try:
        from ..testing import AuthorizationServer, free_port
    except ImportError:
        complain('The demo needs more: pip install "langchain-pocket-auth[testing]"')
        return WRONG
    base_url = f"http://127.0.0.1:{free_port()}"
    person = _ours if alone else _yours(browser)
    with AuthorizationServer() as server:
        server.register(
            client_id=REGISTRATION[0],
            client_secret=REGISTRATION[1],
            redirect_uris=[f"{base_url}/auth/demo/oauth2/callback"],
        )
        say(
            "1. A provider named demo runs on this machine, as long as this command.",
            "   An app is registered there; nothing is written to your disk.",
        )
        pocket = PocketAuth(
            "memory://",
            base_url=base_url,
            clients={"demo": REGISTRATION},
            providers=[server.provider("demo")],
            app_name="pocket-auth login demo",
        )
        try:
            return await _scenes(pocket, server, person, timeout_s)
        finally:
            await pocket.aclose()


async def _scenes(
    pocket: PocketAuth,
    server: AuthorizationServer,
    person: Callable[[str], Awaitable[None]],
    timeout_s: float,
) -> int:
    request = pocket.make_request(SCOPES, auth_provider="demo")
    link = await pocket.prepare(request, auth_provider="demo")
    say(
        "2. Open this link, sign in as alice (password: alice-password), and agree:",
        "",
        f"   {link}",
        "",
    )
    # First, so that no refusal is missed.
    waiting = asyncio.create_task(
        pocket.wait_connected("demo", scopes=SCOPES, timeout=timeout_s)
    )
    try:
        await person(link or "")
        context = await waiting
    except AuthorizationRefused:
        say("3. You said no: nothing was stored.")
        return REFUSED
    except AuthorizationRequired:
        say("3. Nobody agreed in time: nothing was stored.")
        return REFUSED
    finally:
        waiting.cancel()
    say(
        f"3. Connected, with the scopes {' '.join(context.scopes or ())}. The callback",
        "   exchanged the code at once and stored the token sealed; no page, link or",
        "   line shows it.",
    )
    if person is not _ours:
        # The browser is still on its way from the callback to the last page.
        await asyncio.sleep(LAST_PAGE_S)
    await pocket.delete_session("demo")
    revoked = "is revoked there" if server.revocations else "STAYED ALIVE THERE"
    say(f"4. Disconnected: forgotten here, and the grant {revoked}.")
    return 0


async def _ours(link: str) -> None:
    """Be the person: sign in and agree, request by request, as a browser does."""
    from ..testing import Browser

    say("   (a browser of ours does it: it opens the link, signs in and agrees)")
    with Browser("alice") as browser:
        await browser.avisit(link)


def _yours(browser: bool) -> Callable[[str], Awaitable[None]]:
    async def person(link: str) -> None:
        if browser:
            await asyncio.to_thread(open_browser, link)
        say("   (waiting for you; Ctrl-C ends it)")

    return person
