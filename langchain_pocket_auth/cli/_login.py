"""`pocket-auth login`: connect an account on this machine."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._errors import AuthorizationRequired, CallbackServerError
from .._providers import canonical
from ._terminal import (
    LAST_PAGE_S,
    Handler,
    Owner,
    Profile,
    Setup,
    open_browser,
    say,
)

if TYPE_CHECKING:
    from .._models import AuthContext
    from .._pocket import PocketAuth


def login(
    context: typer.Context,
    provider: Annotated[
        str, typer.Argument(help="The provider's id; `demo` needs no account.")
    ],
    *,
    scopes: Annotated[str, typer.Option(help="Separated by commas.")] = "",
    handler: Handler = None,
    profile: Profile = "default",
    owner: Owner = None,
    device: Annotated[
        bool, typer.Option("--device", help="Show a code to type in elsewhere.")
    ] = False,
    browser: Annotated[bool, typer.Option(help="Open the browser.")] = True,
    yes: Annotated[
        bool, typer.Option("--yes", help="Only for `demo`: agree without asking you.")
    ] = False,
    timeout: Annotated[
        float, typer.Option(min=0, help="How many seconds to wait for you.")
    ] = 300.0,
) -> None:
    """Connect an account on this machine; the token is stored, and never shown."""
    setup, demo = Setup.of(context), provider == "demo"
    if yes and not demo:
        raise typer.BadParameter("only you can agree: --yes is for `login demo`")
    if device and demo:
        raise typer.BadParameter("the demo's provider has no --device")
    if demo:
        from ._login_demo import play

        # Without a terminal there is nobody to ask.
        alone = yes or not (sys.stdin.isatty() and sys.stdout.isatty())
        code = asyncio.run(play(alone=alone, browser=browser, timeout_s=timeout))
        raise typer.Exit(code)
    setup.kept_settings()
    wanted = tuple(filter(None, (scope.strip() for scope in scopes.split(","))))
    login = Login(
        setup.pocket(),
        canonical(provider),
        wanted,
        handler,
        {"profile": profile, "owner": owner},
        timeout,
    )
    asyncio.run(login.run(device=device, browser=browser))


@dataclass(frozen=True, slots=True)
class Login:
    """One account that is to be connected."""

    pocket: PocketAuth
    provider: str
    scopes: tuple[str, ...]
    handler: str | None
    whose: dict[str, Any]
    """Profile and owner."""
    timeout_s: float

    async def run(self, *, device: bool, browser: bool) -> None:
        """
        Connect, and say what is connected then.

        Raises:
            PocketAuthError: Nobody agreed, or it cannot be done.
        """
        try:
            context = await (self._by_code() if device else self._by_link(browser))
            say(f"Connected: {await self._told(context)}")
        except AuthorizationRequired:
            raise AuthorizationRequired(
                f"nobody agreed within {self.timeout_s:g} seconds: run this again",
                provider=self.provider,
            ) from None
        finally:
            await self.pocket.aclose()

    async def _by_link(self, browser: bool) -> AuthContext:
        """Show the connect link, open it, wait."""
        pocket, named = self.pocket, (self.handler, self.provider)
        request = pocket.make_request(list(self.scopes), *named)
        link = await self._link(request, named)
        if link is None:  # connected already, or nobody has to be asked
            return await pocket.authenticate(request, *named, **self.whose, timeout=0)
        # First, so that no refusal is missed.
        waiting = asyncio.create_task(
            pocket.wait_connected(
                self.provider,
                scopes=self.scopes,
                handler=self.handler,
                **self.whose,
                timeout=self.timeout_s,
            )
        )
        say("Open this link and agree:", "", f"  {link}", "")
        try:
            if browser:
                await asyncio.to_thread(open_browser, link)
            return await waiting
        finally:
            waiting.cancel()
            # The browser is still on its way from the callback to the last page.
            await asyncio.sleep(LAST_PAGE_S)

    async def _link(self, request: Any, named: tuple[str | None, str]) -> str | None:
        pocket = self.pocket
        try:
            return await pocket.prepare(request, *named, **self.whose)
        except CallbackServerError:
            from ._serve import answers

            if not await answers(f"{pocket.base_url}/connect/login"):
                raise
        # An agent of ours, or `pocket-auth serve`, sits there: it answers for us, if
        # it has the same store.
        _ = pocket.router
        link = await pocket.prepare(request, *named, **self.whose)
        if link and await answers(link) != "pending":
            raise CallbackServerError(
                f"another PocketAuth, with a store of its own, serves {pocket.base_url}"
                ": end it, or set POCKET_AUTH_STORAGE to its store"
            )
        return link

    async def _by_code(self) -> AuthContext:
        """Show a code to type in on any machine (RFC 8628)."""
        return await self.pocket.connect(
            self.provider,
            scopes=self.scopes,
            handler=self.handler,
            **self.whose,
            timeout=self.timeout_s,
            device=True,
        )

    async def _told(self, context: AuthContext) -> str:
        """Say which account it is, and what it may do."""
        states = await self.pocket.list_session_state(
            auth_provider=self.provider, owner=self.whose["owner"]
        )
        profile = self.whose["profile"]
        accounts = [
            one["account"]
            for one in states
            if one["profile"] == profile and self.handler in {None, one["handler"]}
        ]
        # What the app itself connects to belongs to no person, and is not listed.
        account = accounts[0] if accounts else None
        parts = [
            self.provider,
            *([f"account {account}"] if account else []),
            *([f"profile {profile}"] if profile != "default" else []),
            *([f"scopes {' '.join(context.scopes)}"] if context.scopes else []),
        ]
        return ", ".join(parts)
