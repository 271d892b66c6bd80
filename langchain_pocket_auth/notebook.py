"""Asking the person ahead of time: in a notebook, a terminal, or from afar."""

from __future__ import annotations

import asyncio
import getpass
import sys
from collections.abc import Callable
from typing import Any

from ._cards import Card
from ._engine import Engine, declined, withheld
from ._errors import CallbackRefused
from ._exchange import Result
from ._models import Consent, Owner, Requirement
from ._service import Service
from .server import callback_of

PROMPT = "Paste the address here: "
TRIES = 3  # of pasting


class Connecting:
    """One question to the person, shown where the person is."""

    def __init__(
        self, service: Service, owner: Owner, requirement: Requirement
    ) -> None:
        self._service, self._owner = service, owner
        self._need = requirement

    async def run(self, *, paste: bool, timeout_s: float) -> None:
        """Ask, if there is something to ask, and wait for the answer."""
        consent = await self._service.ask(
            lambda e: e.prepare(self._owner, self._need, listen=not paste)
        )
        if consent is None:
            return
        name = consent.display_name
        outcome = f"{name} is not connected."
        replace = None
        try:
            if paste:
                url = await self._service.ask(lambda e: e.begin(consent))
                replace = _show(_page(name, url, self._service.base_url))
                await self._pasted(consent)
            else:
                replace = _show(_link(consent))
                await self._service.ask(
                    lambda e: e.wait_connected(
                        self._owner, self._need, timeout_s=timeout_s
                    )
                )
            outcome = f"{name} is connected."
        finally:
            # What was shown is kept in the notebook's file: it must not be of use.
            if replace is not None:
                replace(Card(outcome))

    async def _pasted(self, consent: Consent) -> None:
        for left in reversed(range(TRIES)):
            text = await _asked()
            try:
                answer = callback_of(text, self._service.base_url)
                work = self._answered(answer, consent.key)
                result = await self._service.run(work)
            except CallbackRefused:
                if not left:
                    raise
                _show(Card("That is not the address this question ends at. Try again."))
                continue
            if result.outcome == "declined":
                raise declined(consent.display_name)
            if result.outcome == "withheld":
                raise withheld(consent.display_name, consent.missing_scopes)
            return

    async def _answered(self, answer: dict[str, str | None], future: str) -> Result:
        attempts = (await self._service.call(_engine)).attempts
        uid = answer["uid"] or ""
        return await attempts.answer(
            uid,
            handler_name=answer["handler_name"],
            value=answer["value"],
            error=answer["error"],
            issuer=answer["issuer"],
            future_id=future,
        )


async def _engine(engine: Engine) -> Engine:
    return engine


def _link(consent: Consent) -> Card:
    name = consent.display_name
    scopes = ", ".join(consent.scopes)
    lines = (f"Permissions: {scopes}",) if scopes else ()
    return Card(f"Connect {name}", lines, consent.url, f"Connect {name}")


def _page(name: str, url: str, base_url: str) -> Card:
    lines = (
        f"1. Open the page of {name} and agree there.",
        f"2. Your browser ends at {base_url}/auth/... and cannot load it: all right.",
        "   Copy the address from there.",
        "3. Paste it into the field below; it is not shown and not kept.",
    )
    return Card(f"Connect {name}", lines, url, f"Open {name}")


def _kernel() -> Any:
    """Return the shell of the notebook that this runs in, or `None`."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell if hasattr(shell, "kernel") else None


def _show(card: Card) -> Callable[[Card], None]:
    """Show a card; returns a function that puts another in its place."""
    if _kernel() is None:
        _write(card)
        return _write
    from IPython.display import display

    shown = display(card, display_id=True)  # type: ignore[no-untyped-call]
    replace: Callable[[Card], None] = shown.update
    return replace


def _write(card: Card) -> None:
    sys.stdout.write(f"{card}\n")
    sys.stdout.flush()


async def _asked() -> str:
    if _kernel() is not None:
        # Its own prompt, which only its main thread may show. Cells run one by one.
        return getpass.getpass(PROMPT)
    return await asyncio.to_thread(getpass.getpass, PROMPT)
