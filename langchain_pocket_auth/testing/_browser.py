"""A person at a browser, without the browser."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from http.cookiejar import Cookie
from pathlib import Path
from typing import Self
from urllib.parse import parse_qs, urljoin, urlsplit

import httpx

from ._html import Button, Form, Page, read_page
from ._navigation import Navigation, place, posted, redirected, refreshed
from ._outside import outside

__all__ = ["Browser", "FlowStuck"]

HOP_LIMIT = 40

_USERNAME_FIELDS = {"username", "user", "login", "email", "identifier"}
_YES = {
    *("approve", "allow", "accept", "authorize", "yes", "agree", "consent"),
    *("continue", "confirm", "connect"),
}
_NO = {"deny", "cancel", "refuse", "reject", "decline", "no", "not", "abort"}


@cache
def _trusted(certificate: Path | None) -> ssl.SSLContext:
    if certificate is not None:
        return ssl.create_default_context(cafile=certificate)
    return httpx.create_ssl_context()  # 20 ms, so once for all browsers


class FlowStuck(RuntimeError):  # noqa: N818 - it reads as what happened
    """A visit led nowhere; the text lists its steps, without their queries."""

    def __init__(self, why: str, steps: list[str]) -> None:
        super().__init__(f"{why} Steps: {'; '.join(steps[-8:])}.")
        self.steps = steps


@dataclass
class _Visit:
    """One walk: what was met and what was already done."""

    approve: bool
    stop_at_client: bool
    steps: list[str] = field(default_factory=list)
    pressed: set[tuple[str, ...]] = field(default_factory=set)
    redirect_uri: str = ""

    def meets(self, url: str) -> None:
        """Learn the client's redirect URI from an authorization URL."""
        found = parse_qs(urlsplit(url).query).get("redirect_uri")
        if found:
            self.redirect_uri = found[0]

    def reached_client(self, url: str) -> bool:
        return bool(
            self.stop_at_client
            and self.redirect_uri
            and place(url) == place(self.redirect_uri)
        )


class Browser:
    """
    One person with one cookie jar: use two to play attacker and victim.

    It does what browsers do where that matters to a flow: cookies are shared
    between the ports of a host, and stay behind as their `SameSite` says, by
    default `Lax`; `Origin` and `Sec-Fetch-Site` are sent, and `Origin` is
    `null` from a page with `Referrer-Policy: no-referrer`; a
    `form-action` of a Content-Security-Policy also holds for the redirects
    after the form, as in Chromium. It runs no JavaScript.

    Args:
        username: Typed into sign-in forms.
        password: Default: `<username>-password`.
        fields: What the person types into further fields, by field name.
        certificate: PEM file of the one certificate to trust over https: a test
            server's own. Default: what public servers have.
        timeout_s: Of every single request.
    """

    def __init__(
        self,
        username: str = "alice",
        password: str | None = None,
        *,
        fields: Mapping[str, str] | None = None,
        certificate: str | Path | None = None,
        timeout_s: float = 10.0,
    ) -> None:
        self.username = username
        self.password = f"{username}-password" if password is None else password
        self.fields = dict(fields or {})
        self._http = httpx.Client(
            verify=_trusted(Path(certificate) if certificate else None),
            timeout=timeout_s,
            trust_env=False,
            # Nothing stays open between requests, so nobody has to close.
            limits=httpx.Limits(max_keepalive_connections=0),
            headers={"User-Agent": "Mozilla/5.0 (pocket-auth testing)"},
        )
        self._http.headers["Accept"] = "text/html,application/xhtml+xml,*/*;q=0.8"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Forget the connections; the browser cannot be used any more."""
        self._http.close()

    @property
    def cookies(self) -> httpx.Cookies:
        """The cookie jar."""
        return self._http.cookies

    def open(self, url: str) -> httpx.Response:
        """Load one address as if typed in; redirects are not followed."""
        return self._load(Navigation(url))

    def visit(self, url: str, *, approve: bool = True) -> httpx.Response:
        """
        Do all a person does from *url* on and return the last page.

        Follows redirects and refreshes, signs in, presses Approve (or Deny)
        and the button of any other form, each form once. A page is the last
        one if it is an error, has no form left to press, or tells an outcome
        (`<meta name="pocket-auth-outcome">`) other than `pending`.

        Raises:
            FlowStuck: The walk does not end, or a page forbids the next step.
        """
        end = self._walk(url, _Visit(approve, stop_at_client=False))
        assert isinstance(end, httpx.Response)  # noqa: S101 - only authorize() stops
        return end

    async def avisit(self, url: str, *, approve: bool = True) -> httpx.Response:
        """`visit` in a worker thread: the event loop stays free to answer it."""
        return await asyncio.to_thread(self.visit, url, approve=approve)

    def authorize(self, url: str, *, approve: bool = True) -> str:
        """
        Like `visit`, but stop before the answer reaches the client.

        Returns:
            The callback URL, not loaded: deliver it with `open` or `visit`.

        Raises:
            FlowStuck: The walk ended elsewhere.
        """
        visit = _Visit(approve, stop_at_client=True)
        end = self._walk(url, visit)
        if isinstance(end, str):
            return end
        raise FlowStuck(
            f"No redirect to the client, but a page with status {end.status_code}.",
            visit.steps,
        )

    def approve_device(
        self, verification_uri: str, user_code: str = "", *, approve: bool = True
    ) -> httpx.Response:
        """
        Type in the code that a device shows, and decide (RFC 8628 section 3.3).

        Args:
            verification_uri: With `verification_uri_complete` there is no code to type.
            user_code: What the device shows.
            approve: Or deny.

        Raises:
            FlowStuck: The walk does not end.
        """
        if user_code:
            self.fields["user_code"] = user_code
        return self.visit(verification_uri, approve=approve)

    def _load(self, to: Navigation) -> httpx.Response:
        request = self._http.build_request(
            to.method, to.url, data=to.data, headers=to.headers()
        )
        if request.headers.pop("Cookie", None) is not None:
            sent = httpx.Cookies()
            for cookie in self._http.cookies.jar:
                if to.takes_along(_same_site(cookie)):
                    sent.jar.set_cookie(cookie)
            sent.set_cookie_header(request)
        with outside():
            return self._http.send(request)

    def _walk(self, url: str, visit: _Visit) -> httpx.Response | str:
        to: Navigation | None = Navigation(url)
        response: httpx.Response | None = None
        while to is not None:
            if response is not None and visit.reached_client(to.url):
                return to.url
            if len(visit.steps) >= HOP_LIMIT:
                raise FlowStuck(f"Gave up after {HOP_LIMIT} steps.", visit.steps)
            if not to.allowed():
                raise FlowStuck(
                    "The form-action of the page with the form does not allow "
                    f"{place(to.url)}: Chromium stops here.",
                    visit.steps,
                )
            visit.meets(to.url)
            response = self._load(to)
            visit.steps.append(f"{to.method} {place(to.url)} {response.status_code}")
            to = self._next(to, response, visit)
        assert response is not None  # noqa: S101 - the first step is always taken
        return response

    def _next(
        self, done: Navigation, response: httpx.Response, visit: _Visit
    ) -> Navigation | None:
        """Say where a person gets from here, None if this is the end."""
        if response.has_redirect_location:
            return redirected(done, response)
        is_html = "html" in response.headers.get("Content-Type", "")
        if response.is_error or not is_html:
            return None
        page = read_page(response.text)
        if page.outcome is not None and page.outcome != "pending":
            return None
        return refreshed(page, response) or self._submit(page, response, visit)

    def _submit(
        self, page: Page, response: httpx.Response, visit: _Visit
    ) -> Navigation | None:
        wanted = _YES if visit.approve else _NO
        left = [
            form
            for form in page.forms
            if _key(form, response) not in visit.pressed
            and not (visit.approve and _only_refuses(form))
        ]
        if not left:
            # A page that waits and reloads itself, with nothing left to press.
            return refreshed(page, response, reload=True)
        form = max(left, key=lambda f: _urgency(f, wanted))
        visit.pressed.add(_key(form, response))
        button = _pick(form, approve=visit.approve)
        data = self._fill_in(form)
        if button and button.name:
            data[button.name] = button.value
        return posted(form, button, data, response)

    def _fill_in(self, form: Form) -> dict[str, str]:
        data = dict(form.fields)
        for name, kind in form.types.items():
            if name in self.fields:
                data[name] = self.fields[name]
            elif kind == "password":
                data[name] = self.password
            elif kind in {"text", "email"} and name.lower() in _USERNAME_FIELDS:
                data[name] = self.username
        return data


def _same_site(cookie: Cookie) -> str:
    written = (cookie.get_nonstandard_attr(n) for n in ("SameSite", "samesite"))
    return next((value.lower() for value in written if value), "lax")


def _key(form: Form, response: httpx.Response) -> tuple[str, ...]:
    """What makes a form the same one, although its hidden values change."""
    target = place(urljoin(str(response.url), form.action))
    names = sorted({*form.fields, *(b.name for b in form.buttons)})
    return (form.method, target, *names)


def _urgency(form: Form, wanted: set[str]) -> tuple[bool, bool, bool]:
    answers = any(button.words & wanted for button in form.buttons)
    refuses = any(button.words & _NO for button in form.buttons)
    return (
        form.wants_password,
        answers,
        form.method == "post" and not refuses,
    )


def _only_refuses(form: Form) -> bool:
    return bool(form.buttons) and all(b.words & _NO for b in form.buttons)


def _pick(form: Form, *, approve: bool) -> Button | None:
    wanted, other = (_YES, _NO) if approve else (_NO, _YES)
    for button in form.buttons:
        if button.words & wanted and not button.words & other:
            return button
    rest = [b for b in form.buttons if not b.words & _NO]
    return next(iter(rest or form.buttons), None)
