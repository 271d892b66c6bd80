"""
The pages a person sees while connecting an account.

One template for all: static text, escaped values, no script, nothing loaded
from elsewhere. Programs read the outcome from `<meta name="pocket-auth-outcome">`.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from enum import StrEnum, auto
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from starlette.responses import HTMLResponse

from .._models import Choice
from .._row_parts import FormField

if TYPE_CHECKING:
    import jinja2

# Complete for an answer without a body, such as a redirect; a page puts its own
# policy in place of this one.
_POLICY = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action "
SECURITY_HEADERS: Final[Mapping[str, str]] = {
    "Content-Security-Policy": _POLICY + "'none'",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Robots-Tag": "noindex",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


ATTEMPT: Final = "attempt"
"""Name of the input that says which attempt a form belongs to."""


class Outcome(StrEnum):
    """What a page tells; also the value of its `pocket-auth-outcome` element."""

    PENDING = auto()
    LEAVING = auto()
    FORM = auto()
    CHOOSE = auto()
    FINISH = auto()
    CODE = auto()
    CONNECTED = auto()
    DECLINED = auto()
    FAILED = auto()
    EXPIRED = auto()
    UNKNOWN = auto()
    REPLAYED = auto()
    MISMATCH = auto()
    SIGN_IN = auto()
    WRONG_PERSON = auto()
    WRONG_ACCOUNT = auto()
    TOO_MANY = auto()
    MALFORMED = auto()
    UNAVAILABLE = auto()
    WITHHELD = auto()


_BACK = "You can close this page and go back to the chat."
_WORDS: Final = {  # title and text; names are filled in first, then escaped
    Outcome.PENDING: (
        "Connect {provider}",
        "{app} asks to use {provider} on your behalf.",
    ),
    Outcome.LEAVING: (
        "On to {provider}",
        "{Provider} opens now and asks whether you agree.",
    ),
    Outcome.FORM: (
        "Your access to {provider}",
        "{app} asks to use {provider} on your behalf. It stores this encrypted.",
    ),
    Outcome.CHOOSE: (
        "Which account at {provider}?",
        "You gave access to several. Choose the one that may be used.",
    ),
    Outcome.FINISH: (
        "One more step for {provider}",
        "{Provider} said yes. Confirm here that it was you who agreed there.",
    ),
    Outcome.CODE: (
        "Your code for {provider}",
        (
            "Type it into your own chat, the one that asked you to connect. Give it "
            "to nobody: whoever has it can use your account."
        ),
    ),
    Outcome.CONNECTED: ("{Provider} is connected", _BACK),
    Outcome.DECLINED: (
        "{Provider} is not connected",
        "You declined, so nothing was stored. The chat has been told. " + _BACK,
    ),
    Outcome.FAILED: (
        "{Provider} could not be connected",
        "{Provider} did not complete the connection. Nothing was stored.",
    ),
    Outcome.EXPIRED: (
        "This link has expired",
        "Nothing was stored. Ask again in the chat to get a new link.",
    ),
    Outcome.UNKNOWN: (
        "This link is not known",
        "Open the link exactly as the chat shows it, or ask there for a new one.",
    ),
    Outcome.REPLAYED: (
        "This link was already used",
        "It works once. The chat knows whether the account is connected.",
    ),
    Outcome.MISMATCH: (
        "This answer does not belong to this connection",
        "Nothing was stored. Open the link from your own chat, in one browser only.",
    ),
    Outcome.SIGN_IN: (
        "You are not signed in",
        "Sign in first, then open the link again. It still works.",
    ),
    Outcome.WRONG_PERSON: (
        "This link is for somebody else",
        "It asks for another user's account, so nothing was done with yours.",
    ),
    Outcome.WRONG_ACCOUNT: (
        "This account cannot be used here",
        (
            "{app} takes another account at {provider}. Nothing was stored, and this "
            "one is not connected. Sign in there with the other one, then try again."
        ),
    ),
    Outcome.TOO_MANY: (
        "Too many tries",
        "Wait a minute, then open the link again.",
    ),
    Outcome.MALFORMED: (
        "This request cannot be read",
        "Nothing was stored. Open the link from the chat again.",
    ),
    Outcome.UNAVAILABLE: (
        "The connection cannot be made right now",
        "A service that is needed does not answer. Try again in a minute.",
    ),
    Outcome.WITHHELD: (
        "{Provider} is connected, with less than asked",
        "A permission was left out; what needs it will not work. " + _BACK,
    ),
}
_BUTTONS = {
    Outcome.PENDING: "Connect {provider}",
    Outcome.FAILED: "Try again",
    Outcome.CHOOSE: "Use this account",
    Outcome.FINISH: "Finish connecting",
    Outcome.WRONG_ACCOUNT: "Try again",
}


def page(
    outcome: Outcome,
    *,
    status: int,
    provider: str | None = None,
    scopes: Sequence[str] = (),
    tools: Sequence[str] = (),
    owner: str | None = None,
    account: str | None = None,
    person: str | None = None,
    code: str | None = None,
    app_name: str | None = None,
    next_url: str | None = None,
    detail: str | None = None,
    button: str | None = None,
    action: str = "",
    hidden: Mapping[str, str] | None = None,
    fields: Mapping[str, FormField] | None = None,
    note: str = "",
    help_url: str | None = None,
    choices: Sequence[Choice] = (),
) -> HTMLResponse:
    """
    Render the page for *outcome*.

    *scopes* are those asked for; with `Outcome.WITHHELD`, those left out.
    *next_url* is opened at once: a redirect after a form would fall under
    `form-action`, which Chrome applies to every further hop (seen in Chromium 156).
    *detail* is one more sentence: fixed text of ours, never the provider's.
    *button* labels the form, which posts to *action*, by default the page's own URL;
    `""`: no form. With it go *hidden* and *fields*, its inputs, always empty. *note*
    is one more sentence, *help_url* tells where to find what is asked for; only https
    is linked. *choices* are accounts, of which one is posted. *person* is who is
    signed in; *code* is what a person reads and types elsewhere.

    Raises:
        ValueError: *next_url* is no http(s) URL.
    """
    if next_url is not None and not next_url.startswith(("https://", "http://")):
        raise ValueError("a person is sent to http(s) URLs only")
    template, style = _template()
    title, text = _WORDS[outcome]
    names = {
        "provider": provider or "the service",
        "Provider": provider or "The service",
        "app": app_name or "The assistant in your chat",
    }
    if button is None:
        button = _BUTTONS.get(outcome, "").format(**names)
    asked = "Left out" if outcome is Outcome.WITHHELD else "Permissions"
    body = template.render(
        outcome=outcome,
        title=title.format(**names),
        text=text.format(**names),
        detail=detail,
        lists=((asked, scopes), ("Needed by", tools)),
        facts=(("Signed in as", person), ("For", owner), ("Account", account)),
        code=code,
        button=button,
        next_url=next_url,
        onward=f"Continue to {names['provider']}",
        action=action,
        hidden=hidden or {},
        fields=fields or {},
        choices=choices,
        note=note,
        help_url=help_url if (help_url or "").startswith("https://") else None,
    )
    policy = f"{_POLICY}'self'; style-src '{style}'"
    headers = {**SECURITY_HEADERS, "Content-Security-Policy": policy}
    return HTMLResponse(body, status_code=status, headers=headers)


@cache
def _template() -> tuple[jinja2.Template, str]:
    """Return the template, and its style element as a source for the CSP."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).with_name("templates"))
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True)
    source, *_ = loader.get_source(environment, "page.html")
    style = source.partition("<style>")[2].partition("</style>")[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return environment.get_template("page.html"), f"sha256-{digest}"
