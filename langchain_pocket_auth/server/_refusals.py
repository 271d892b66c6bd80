"""Answers that refuse, or do nothing."""

from __future__ import annotations

from fastapi import Request
from starlette.responses import HTMLResponse, Response

from .._site import Visitor
from ._limits import WINDOW_S
from ._pages import SECURITY_HEADERS, Outcome, page

_STATUS = {
    "unknown": 404,
    "expired": 410,
    "replayed": 409,
    "mismatch": 403,
    "malformed": 400,
    "sign_in": 401,
    "wrong_person": 403,
    "wrong_account": 403,
    "too_many": 429,
}


def refusal(
    reason: str, *, status: int | None = None, visitor: Visitor | None = None
) -> HTMLResponse:
    """Return the page for an answer that was refused."""
    if reason == "too_many":
        return too_many(int(WINDOW_S))
    outcome = Outcome(reason)
    person = visitor.person.id if visitor and visitor.person else None
    return page(
        outcome,
        status=status or _STATUS[reason],
        # Whom the link is for is nobody else's business.
        person=person if outcome is Outcome.WRONG_PERSON else None,
    )


def too_many(wait_s: int) -> HTMLResponse:
    """Return the page for who has to wait."""
    response = page(Outcome.TOO_MANY, status=_STATUS["too_many"])
    response.headers["Retry-After"] = str(wait_s)
    return response


def not_allowed(methods: str) -> Response:
    """Answer a method that nothing is done for."""
    headers = {**SECURITY_HEADERS, "Allow": methods}
    return Response(status_code=405, headers=headers)


def embedded(request: Request) -> bool:
    """Whether another site's page asks, as for an image or a frame, and no person."""
    site = request.headers.get("sec-fetch-site", "none")
    place = request.headers.get("sec-fetch-dest", "document")
    return site in {"cross-site", "same-site"} and place != "document"


def prefetched(request: Request) -> Response | None:
    """Answer a browser that only loads ahead."""
    purposes = (request.headers.get(name, "") for name in ("sec-purpose", "purpose"))
    if any("prefetch" in purpose for purpose in purposes):
        return Response(status_code=204, headers=dict(SECURITY_HEADERS))
    return None
