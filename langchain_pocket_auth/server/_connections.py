"""The page where persons see what they have connected, and end it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from datetime import date
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from .._connections import Connection, ConnectionHealth, connection_id
from .._errors import PocketAuthError
from .._models import Owner
from .._service import Service
from ._forms import FormDesk
from ._pages import SECURITY_HEADERS
from ._refusals import not_allowed, prefetched, refusal
from ._requests import form_of

if TYPE_CHECKING:
    import jinja2

_WORDS = {
    ConnectionHealth.OK: "Works",
    ConnectionHealth.EXPIRING: "Works for now, then has to be connected again",
    ConnectionHealth.NEEDS_RECONNECT: "Does not work any more",
    ConnectionHealth.UNREADABLE: "Cannot be read: disconnect it",
}


class ConnectionsDesk(FormDesk):
    """Answers requests of persons about their own connections, too."""

    def __init__(self, service: Service, app_name: str | None) -> None:
        super().__init__(service, app_name)
        self._here = f"{service.base_url}/connections"

    async def connections(self, request: Request) -> Response:
        """Answer whatever comes to a person's connections."""
        request.scope["query_string"] = b""  # nothing here reads one
        if (refused := self.foreign_host(request)) is not None:
            return refused
        try:
            if request.method == "GET":
                return prefetched(request) or await self._overview(request)
            if request.method == "POST":
                return await self._change(request)
        except PocketAuthError as error:
            return self.failed(error)
        return not_allowed("GET, POST")

    async def _overview(self, request: Request) -> Response:
        """Show them. Changes nothing, whoever fetches it."""
        who = await self._who(request)
        if isinstance(who, Response):
            return who
        found = await self.ask(lambda e: e.connections.of(who))
        return connections_page(found, owner=who, app_name=self._app_name)

    async def _change(self, request: Request) -> Response:
        """Disconnect or reconnect one; those of others do not exist here."""
        if not self._same_origin(request):
            return refusal("mismatch")
        form = await form_of(request) or {}
        do, connection = form.get("do"), form.get("connection", "")
        if form.keys() != {"connection", "do"} or do not in {"disconnect", "reconnect"}:
            return refusal("malformed")
        who = await self._who(request)
        if isinstance(who, Response):
            # The way to a login page begins where a person can come back to.
            return _on_to(self._here) if "location" in who.headers else who
        if do == "reconnect":
            asked = await self.ask(lambda e: e.reconnect(who, connection))
            return _on_to(asked.url if asked else self._here)
        await self.ask(
            lambda e: e.connections.end(who, lambda k: connection_id(k) == connection)
        )
        return _on_to(self._here)

    async def _who(self, request: Request) -> Owner | Response:
        """
        Return whose page it is; where nobody can be known, there is none.

        On this machine, too: its address holds no secret, as that of a link does, and
        a port of 127.0.0.1 is open to all who have an account there.
        """
        if self._site.verify_user is None:
            return refusal("unknown")
        visitor = await self.visitor(request)
        if isinstance(visitor, Response):
            return visitor
        return visitor.person or refusal("sign_in")


def _on_to(url: str) -> Response:
    # 303: going back or reloading sends nothing again.
    return RedirectResponse(url, 303, headers=dict(SECURITY_HEADERS))


def connections_page(
    connections: Sequence[Connection], *, owner: Owner, app_name: str | None
) -> HTMLResponse:
    """Render the page of an owner's connections."""
    template, styles, policy = _template()
    body = template.render(
        styles,
        connections=connections,
        words=_WORDS,
        day=_day,
        owner=None if owner.id == "default" else owner.id,
        app=app_name or "The assistant in your chat",
    )
    headers = {**SECURITY_HEADERS, "Content-Security-Policy": policy}
    return HTMLResponse(body, headers=headers)


def _day(value: date) -> str:
    return f"{value.day} {value:%b %Y}"


@cache
def _template() -> tuple[jinja2.Template, dict[str, str], str]:
    """Return the template, its styles, and the policy that allows them."""
    import jinja2

    folder = Path(__file__).with_name("templates")
    loader = jinja2.FileSystemLoader(folder)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True)
    pages, *_ = loader.get_source(environment, "page.html")
    shared = pages.partition("<style>")[2].partition("</style>")[0]
    own = (folder / "connections.css").read_text()
    styles = {"shared": shared, "own": own}
    hashes = " ".join(map(_source, styles.values()))
    policy = SECURITY_HEADERS["Content-Security-Policy"].removesuffix("'none'")
    template = environment.get_template("connections.html")
    return template, styles, f"{policy}'self'; style-src {hashes}"


def _source(style: str) -> str:
    digest = hashlib.sha256(style.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
