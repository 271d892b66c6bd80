"""Connect links: what persons see there, and what they press."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastapi import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from .._errors import PocketAuthError
from .._models import SessionKey
from .._site import Visitor
from .._vault import Future, digest
from ..handlers import FormHandler
from ._desk import Desk
from ._pages import SECURITY_HEADERS, Outcome, page
from ._refusals import not_allowed, refusal, too_many
from ._requests import form_of

_FINISH = {"finish": "1"}


class LinkDesk(Desk):
    """Answers requests for connect links, too."""

    async def connect(self, request: Request) -> Response:
        """Answer whatever comes to a connect link."""
        if (refused := self.foreign_host(request)) is not None:
            return refused
        ticket = request.path_params["ticket"]
        try:
            if request.method == "GET":
                return await self._show(request, ticket)
            if request.method == "POST":
                return await self._posted(request, ticket)
        except PocketAuthError as error:
            return self.failed(error)
        return not_allowed("GET, POST")

    async def _show(self, request: Request, ticket: str) -> Response:
        """Show how it stands. Changes nothing, whoever fetches it."""
        stored, key = await self.ask(lambda e: e.attempts.ticket(ticket))
        visitor = await self.visitor(request)
        if isinstance(visitor, Response):
            return visitor
        if reason := self._stranger(key.owner, visitor):
            return refusal(reason, visitor=visitor)
        future, label = stored.entry, self._label(key.provider)
        # Declined in one tab, agreed to in another: what waits there comes first.
        held = None
        if future.status != "done":
            held = await self._held(future, label, visitor)
        if future.status != "pending":
            return held or _ended(future, label)
        return held or page(
            Outcome.PENDING,
            status=200,
            provider=label,
            scopes=future.scopes,
            tools=future.tools,
            owner=None if key.owner.id == "default" else key.owner.id,
            app_name=self._app_name,
        )

    async def _held(
        self, future: Future, label: str, visitor: Visitor
    ) -> Response | None:
        """Show what a grant that is not stored yet waits for, if there is one."""
        held = await self.ask(lambda e: e.attempts.held(future))
        if held is None or held.browser not in {None, visitor.browser}:
            return None  # to other browsers all is as before
        about: dict[str, Any] = {"status": 200, "provider": label}
        if held.choices:
            return page(Outcome.CHOOSE, choices=held.choices, **about)
        about |= {"account": held.account, "app_name": self._app_name}
        if held.person:
            return page(Outcome.FINISH, hidden=_FINISH, **about)
        if held.code:
            return page(Outcome.CODE, code=held.code, **about)
        return None

    async def _posted(self, request: Request, ticket: str) -> Response:
        """Take what a person pressed."""
        if not self._same_origin(request):
            return refusal("mismatch")
        form = await form_of(request)
        if form is None or not (form.keys() == {"account"} or form in ({}, _FINISH)):
            return refusal("malformed")
        visitor = await self.visitor(request)
        if isinstance(visitor, Response):
            # The way to a login page begins where a person can come back to.
            away = "location" in visitor.headers
            return self._back_to(ticket) if away else visitor
        try:
            if not form:
                return await self._begin(request, ticket, visitor)
            if "account" in form:
                choice = form["account"]
                await self.ask(lambda e: e.attempts.choose(ticket, choice, visitor))
            else:
                await self.ask(lambda e: e.attempts.vouch(ticket, visitor))
        except PocketAuthError as error:
            return await self._refused(error, visitor, ticket=ticket)
        return self._back_to(ticket)

    async def _begin(self, request: Request, ticket: str, visitor: Visitor) -> Response:
        """Start an attempt and send the person to the provider."""
        stored, key = await self.ask(lambda e: e.attempts.ticket(ticket))
        if wait_s := self._counted(key, visitor):
            return too_many(wait_s)
        if value := self._visitors.mark(request):
            visitor = replace(visitor, browser=digest(value))
        url = await self.ask(lambda e: e.attempts.begin(ticket, visitor))
        handler = self._registry.named(stored.entry.handler)
        response: Response
        if isinstance(handler, FormHandler):
            # Of our own origin, which `form-action` allows.
            response = RedirectResponse(url, 303, headers=dict(SECURITY_HEADERS))
        else:
            label = self._label(key.provider)
            response = page(Outcome.LEAVING, status=200, provider=label, next_url=url)
        if value:
            self._visitors.set_cookie(response, value, posted=handler.posts_callback)
        return response

    def _counted(self, key: SessionKey, visitor: Visitor) -> int:
        """Count a start of the owner's own; return for how long to wait instead."""
        if not self._site.public or self._stranger(key.owner, visitor):
            return 0
        if not (wait_s := self._starts.wait_s(key.owner)):
            self._starts.add(key.owner)
        return wait_s


def _ended(future: Future, label: str) -> HTMLResponse:
    """Return the page for a question that was answered."""
    if future.status == "denied":
        button = f"Connect {label} after all"
        return page(Outcome.DECLINED, status=200, provider=label, button=button)
    if left_out := future.withheld:
        return page(Outcome.WITHHELD, status=200, provider=label, scopes=left_out)
    return page(Outcome.CONNECTED, status=200, provider=label)
