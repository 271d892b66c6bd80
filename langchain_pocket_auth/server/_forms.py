"""The form for what a person types: shown by GET, taken by POST, once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from fastapi import Request
from starlette.responses import Response

from .._engine import Engine
from .._errors import CallbackRefused, PocketAuthError
from .._site import Visitor
from .._vault import Attempt, Future, entry_key
from ..handlers import FormHandler
from ._links import LinkDesk
from ._pages import ATTEMPT, Outcome, page
from ._refusals import not_allowed, prefetched, refusal
from ._requests import body_of, parsed, query_of

# A key of 64 KiB whose every character is quoted, and what else a form asks for.
MAX_BODY_BYTES = 256 << 10


@dataclass(frozen=True, slots=True, repr=False)
class _Asked:
    """What one attempt asks for, as it stands now."""

    attempt: Attempt
    handler: FormHandler
    future: Future | None
    """Gone where the person was disconnected meanwhile."""
    now: datetime

    @property
    def waits(self) -> bool:
        """Whether an answer would be taken."""
        in_time = self.future is not None and self.now < self.attempt.expires_at
        return self.attempt.status == "pending" and in_time


class FormDesk(LinkDesk):
    """Answers requests for forms, too."""

    async def form(self, request: Request) -> Response:
        """Answer whatever comes to the address of a form."""
        query = query_of(request.scope)  # first: it hides the query from access logs
        if (refused := self.foreign_host(request) or prefetched(request)) is not None:
            return refused
        try:
            if request.method == "GET":
                return await self._empty(request, query)
            if request.method == "POST":
                return await self._filled(request, query)
        except PocketAuthError as error:
            return self.failed(error)
        return not_allowed("GET, POST")

    async def _empty(
        self, request: Request, query: Mapping[str, str] | None
    ) -> Response:
        """Show the form. Changes nothing, whoever fetches it."""
        if query is None or not query.get("state"):
            return refusal("malformed")
        visitor = await self.whoever(request)
        asked = await self._asked(request, query["state"], visitor)
        if asked.attempt.status != "pending":
            return refusal("replayed")
        if asked.future is None or not asked.waits:
            return refusal("expired")
        if asked.future.status == "done":  # in another tab
            return self._back_to(asked.future.ticket)
        return self._page(asked, status=200)

    async def _filled(
        self, request: Request, query: Mapping[str, str] | None
    ) -> Response:
        """Take what was typed; nothing of it is in any answer."""
        if not self._same_origin(request):
            return refusal("mismatch")
        body = await body_of(request, MAX_BODY_BYTES)
        typed = None if body is None else parsed(body, MAX_BODY_BYTES)
        # Not a value in a URL, which others may have seen.
        if query != {} or not typed or not (uid := typed.pop(ATTEMPT, "")):
            return refusal("malformed")
        visitor = await self.whoever(request)
        asked = await self._asked(request, uid, visitor)
        if typed.keys() != asked.handler.form.fields.keys():
            return refusal("malformed")
        values, problems = asked.handler.checked(typed)
        if problems and asked.waits:
            return self._page(asked, status=422, problems=problems)
        return await self.answer(uid, visitor, callback=None, value=values)

    async def _asked(self, request: Request, uid: str, visitor: Visitor) -> _Asked:
        """
        Return what an attempt asks for.

        Raises:
            CallbackRefused: Unknown, not of this form, or not of this visitor.
        """
        path = request.path_params

        async def look(engine: Engine) -> _Asked:
            stored = await engine.attempts.find(uid)
            if stored is None:
                raise CallbackRefused("unknown")
            attempt = stored.entry
            handler = self._registry.named(attempt.handler)
            if not isinstance(handler, FormHandler) or (
                (handler.row.id, handler.segment) != (path["provider"], path["method"])
            ):
                raise CallbackRefused("mismatch")
            self.admit(attempt, visitor, signed_in=True)
            key = attempt.target.session_key()
            future = await engine.vault.get(Future, entry_key(Future, key))
            entry = future.entry if future else None
            return _Asked(attempt, handler, entry, engine.vault.now())

        return await self.ask(look)

    def _page(
        self, asked: _Asked, *, status: int, problems: Mapping[str, str] | None = None
    ) -> Response:
        """Return the form, always empty."""
        handler, form, future = asked.handler, asked.handler.form, asked.future
        owner = asked.attempt.target.session_key().owner
        wrong = [f"“{form.fields[n].label}” {p}" for n, p in (problems or {}).items()]
        return page(
            Outcome.FORM,
            status=status,
            provider=handler.row.label,
            tools=future.tools if future else (),
            owner=None if owner.id == "default" else owner.id,
            app_name=self._app_name,
            detail=" ".join([*wrong, "Nothing was kept: enter all again."])
            if wrong
            else None,
            button=f"Connect {handler.row.label}",
            action="form",
            hidden={ATTEMPT: asked.attempt.uid},
            fields=form.fields,
            note=form.note,
            help_url=form.docs or handler.row.docs,
        )
