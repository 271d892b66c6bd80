"""Asking the person ahead of time: in a notebook, a terminal, or from afar."""

from __future__ import annotations

import asyncio
import getpass
import sys
from typing import Any

from ._cards import Card
from ._engine import Engine, declined, withheld
from ._errors import AuthorizationRequired, CallbackRefused, ConfigurationError
from ._linking import Result
from ._models import Consent, Owner, Requirement
from ._service import Service
from .handlers._device import DeviceCode
from .server import callback_of

PROMPT = "Paste the address here: "
NUMBER = "Number: "
TRIES = 3  # of pasting


class Connecting:
    """One question to the person, shown where the person is."""

    def __init__(
        self, service: Service, owner: Owner, requirement: Requirement
    ) -> None:
        self._service, self._owner = service, owner
        self._need = requirement

    async def run(self, *, paste: bool, device: bool, timeout_s: float) -> None:
        """
        Ask, if there is something to ask, and wait for the answer.

        Raises:
            ConfigurationError: Nobody could tell who pastes.
        """
        if paste and self._service.site.public:
            raise ConfigurationError(
                "paste=True is for one person's own machine: with public_url nothing "
                "shows that who pastes an answer is who agreed; give out the link"
            )
        listen = not (paste or device)
        consent = await self._service.ask(
            lambda e: e.prepare(self._owner, self._need, listen=listen)
        )
        if consent is None:
            return
        place, outcome = _Place(), f"{consent.display_name} is not connected."
        try:
            if device:
                await self._elsewhere(consent, place, timeout_s)
            elif paste:
                await self._pasted(consent, place)
                await self._service.ask(lambda e: self._ended(e, consent.display_name))
            else:
                place.show(_link(consent))
                await self._service.ask(
                    lambda e: e.wait_connected(
                        self._owner, self._need, timeout_s=timeout_s
                    )
                )
            outcome = f"{consent.display_name} is connected."
        finally:
            # What was shown is kept in the notebook's file: it must not be of use.
            place.close(Card(outcome))

    async def _elsewhere(
        self, consent: Consent, place: _Place, timeout_s: float
    ) -> None:
        """Let the person agree on another machine (RFC 8628)."""
        loop, ticket = asyncio.get_running_loop(), consent.url.rpartition("/")[2]

        def show(code: DeviceCode) -> None:  # on the background loop
            loop.call_soon_threadsafe(place.show, _code(consent, code))

        try:
            async with asyncio.timeout(timeout_s):
                result = await self._service.ask(
                    lambda e: e.attempts.device(ticket, show)
                )
        except TimeoutError:
            raise AuthorizationRequired(
                f"{consent.display_name} was not connected within {timeout_s:g} "
                "seconds",
                provider=consent.provider,
                scopes=consent.scopes,
            ) from None
        if result.outcome == "choose":
            await self._chosen(consent, place)

    async def _pasted(self, consent: Consent, place: _Place) -> None:
        base_url, note = self._service.base_url, None
        url = await self._service.ask(lambda e: e.begin(consent))
        for left in reversed(range(TRIES)):
            place.show(_page(consent, url, base_url, note))
            try:
                answer = callback_of(await _asked(PROMPT), base_url)
                result = await self._answered(answer, consent.key)
            except CallbackRefused as error:
                if not left:
                    raise
                note = "That is not the address which this question ends at: try again."
                if error.reason == "expired":
                    note = "That took too long: begin anew."
                    url = await self._service.ask(lambda e: e.begin(consent))
            else:
                if result.outcome == "choose":
                    await self._chosen(consent, place)
                return

    async def _answered(self, answer: dict[str, Any], future_id: str) -> Result:
        uid = answer.pop("uid") or ""
        return await self._service.ask(
            lambda e: e.attempts.answer(uid, **answer, future_id=future_id)
        )

    async def _chosen(self, consent: Consent, place: _Place) -> None:
        """Let the person choose between the accounts that the grant reaches."""
        ticket = consent.url.rpartition("/")[2]
        stored, _ = await self._service.ask(lambda e: e.attempts.ticket(ticket))
        held = await self._service.ask(lambda e: e.attempts.held(stored.entry))
        choices = held.choices if held else ()
        numbered = {str(n): choice for n, choice in enumerate(choices, 1)}
        lines = [f"{number}: {choice.label}" for number, choice in numbered.items()]
        title = f"Which account at {consent.display_name}?"
        place.show(Card(title, (*lines, "Type its number below.")))
        for left in reversed(range(TRIES)):
            if choice := numbered.get((await _asked(NUMBER)).strip()):
                await self._service.ask(lambda e: e.attempts.choose(ticket, choice.id))
                return
            if not left:
                raise CallbackRefused("malformed")

    async def _ended(self, engine: Engine, name: str) -> None:
        """
        Raise, unless it is connected now.

        That is looked up, because the browser may have reached the callback after
        all, and the answer to what was pasted then says only that it is known.
        """
        try:
            await engine.wait_connected(self._owner, self._need, timeout_s=0)
        except AuthorizationRequired:
            standing = await engine.standing(self._owner, self._need)
            status = standing.future.entry.status if standing.future else "pending"
            if status == "denied":
                raise declined(name) from None
            if status == "done":
                raise withheld(name, standing.missing) from None
            raise


def _asked_for(consent: Consent) -> tuple[str, ...]:
    scopes, profile = ", ".join(consent.scopes), consent.profile
    return (
        *([f"Permissions: {scopes}"] if scopes else []),
        *([f"Profile: {profile}"] if profile != "default" else []),
    )


def _link(consent: Consent) -> Card:
    title = f"Connect {consent.display_name}"
    return Card(title, _asked_for(consent), consent.url, title)


def _code(consent: Consent, code: DeviceCode) -> Card:
    name, url = consent.display_name, code.verification_uri
    lines = (
        *_asked_for(consent),
        f"1. Open {url} on any machine.",
        f"2. Type the code {code.user_code} there, and agree.",
    )
    return Card(
        f"Connect {name}",
        lines,
        code.verification_uri_complete or url,
        f"Open {name}",
    )


def _page(consent: Consent, url: str, base_url: str, note: str | None) -> Card:
    name = consent.display_name
    lines = (
        *([note] if note else []),
        *_asked_for(consent),
        f"1. Open the page of {name} and agree there.",
        f"2. Your browser ends at {base_url}/auth/... and cannot load it: all right.",
        "3. Copy that address, and paste it below: it is not shown and not kept.",
    )
    return Card(f"Connect {name}", lines, url, f"Open {name}")


class _Place:
    """Where cards are shown, each in the place of the last; a terminal has them all."""

    def __init__(self) -> None:
        self._used, self._display = False, None

    def show(self, card: Card) -> None:
        """Show a card."""
        self._used = True
        if not _in_kernel():
            sys.stdout.write(f"{card}\n")
            sys.stdout.flush()
        elif self._display is None:
            from IPython.display import display

            self._display = display(card, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._display.update(card)

    def close(self, card: Card) -> None:
        """Put the last card in the place of what was shown, if anything was."""
        if self._used:
            self.show(card)


def _in_kernel() -> bool:
    """Whether this runs in a notebook, or what else talks to a kernel."""
    ipython: Any = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


async def _asked(prompt: str) -> str:
    if _in_kernel():
        # Its own prompt, which only its main thread may show. Cells run one by one.
        return getpass.getpass(prompt)
    return await asyncio.to_thread(getpass.getpass, prompt)
