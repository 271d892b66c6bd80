"""Where a browser goes next, and what it tells about where it comes from."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from urllib.parse import SplitResult, urljoin, urlsplit

import httpx

from ._html import Button, Form, Page

REFRESH_WAIT_LIMIT_S = 0.25

_REFRESH = re.compile(
    r"\s*(\d*\.?\d+)\s*(?:[;,]\s*(?:url\s*=)?\s*['\"]?([^'\"]*))?", re.IGNORECASE
)


@dataclass
class Navigation:
    """One address a browser is about to load, and what it knows about why."""

    url: str
    initiator: str = ""
    """Origin of the page that led there; empty for an address typed in."""
    method: str = "GET"
    data: dict[str, str] | None = None
    origin: str | None = None
    """The `Origin` header, of a form that is posted."""
    site: str = "none"
    """`Sec-Fetch-Site`: the worst relation met on the way."""
    form_action: str | None = None
    """The `form-action` of the page whose form began it."""

    def allowed(self) -> bool:
        """Whether the page whose form began it lets the browser go there."""
        if self.form_action is None:
            return True
        target = urlsplit(self.url)
        return any(_source_allows(s, target) for s in self.form_action.split())

    def takes_along(self, same_site: str) -> bool:
        """Whether a cookie of that `SameSite` is sent (RFC 6265bis section 5.6.7)."""
        if self.site != "cross-site" or same_site == "none":
            return True
        return same_site == "lax" and self.method == "GET"

    def headers(self) -> dict[str, str]:
        headers = {
            "Sec-Fetch-Dest": "document",
            "Sec-Fetch-Mode": "navigate",
            "Sec-Fetch-Site": self.site,
        }
        if self.method != "GET" and self.origin is not None:
            headers["Origin"] = self.origin
        return headers


def place(url: str) -> str:
    """An address without its query, fit for an error text."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}{parts.path}"


def origin_of(url: str | httpx.URL) -> str:
    """Scheme, host and port."""
    parts = urlsplit(str(url))
    return f"{parts.scheme}://{parts.netloc}"


def relation(initiator: str, url: str) -> str:
    """`Sec-Fetch-Site` of one address (ports make no other site)."""
    if not initiator:
        return "none"
    if initiator == origin_of(url):
        return "same-origin"
    a, b = urlsplit(initiator), urlsplit(url)
    same = (a.scheme, a.hostname) == (b.scheme, b.hostname)
    return "same-site" if same else "cross-site"


def _worst(*sites: str) -> str:
    return max(sites, key=["none", "same-origin", "same-site", "cross-site"].index)


def redirected(done: Navigation, response: httpx.Response) -> Navigation:
    """Where a redirect leads; only 307 and 308 keep the form's content."""
    url = urljoin(done.url, response.headers["Location"])
    keeps = response.status_code in {307, 308}
    # Who is redirected on by a third party does not speak for the page any more
    # (Fetch, "redirect-tainted origin").
    tainted = done.origin != origin_of(done.url) != origin_of(url)
    return Navigation(
        url,
        initiator=done.initiator,
        method=done.method if keeps else "GET",
        data=done.data if keeps else None,
        origin="null" if tainted else done.origin,
        site=_worst(done.site, relation(done.initiator, url)),
        form_action=done.form_action,
    )


def refreshed(
    page: Page, response: httpx.Response, *, reload: bool = False
) -> Navigation | None:
    """Where a refresh leads: to another page, or with *reload* to itself."""
    match = _REFRESH.match(page.refresh or "")
    if not match:
        return None
    url = urljoin(str(response.url), (match[2] or "").strip())
    if (url == str(response.url)) != reload:
        return None
    time.sleep(min(float(match[1]), REFRESH_WAIT_LIMIT_S))
    page_origin = origin_of(response.url)
    return Navigation(url, initiator=page_origin, site=relation(page_origin, url))


def posted(
    form: Form, button: Button | None, data: dict[str, str], response: httpx.Response
) -> Navigation:
    """Where a submitted form leads."""
    action = (button.formaction if button else "") or form.action
    url = urljoin(str(response.url), action) if action else str(response.url)
    page_origin = origin_of(response.url)
    navigation = Navigation(
        url,
        initiator=page_origin,
        site=relation(page_origin, url),
        form_action=_form_action(response),
    )
    if form.method == "post":
        navigation.method, navigation.data = "POST", data
        # Fetch, "append a request Origin header".
        hides = {"no-referrer"}
        if navigation.site != "same-origin":
            hides.add("same-origin")
        hidden = _referrer_policy(response) in hides
        navigation.origin = "null" if hidden else page_origin
    else:
        navigation.url = str(httpx.URL(url).copy_with(params=data))
    return navigation


def _referrer_policy(response: httpx.Response) -> str:
    header: str = response.headers.get("Referrer-Policy", "")
    return header.rpartition(",")[2].strip().lower()


def _form_action(response: httpx.Response) -> str | None:
    policy: str = response.headers.get("Content-Security-Policy", "")
    for directive in policy.split(";"):
        name, _, sources = directive.strip().partition(" ")
        if name.lower() == "form-action":
            # 'self' is the page's origin, also after redirects.
            return sources.replace("'self'", origin_of(response.url))
    return None


def _source_allows(source: str, target: SplitResult) -> bool:
    """CSP level 3 source matching, without paths and the keywords."""
    if source == "*":
        return target.scheme in {"http", "https"}
    if source.endswith(":") and "/" not in source:
        return target.scheme == source[:-1]
    scheme, _, rest = source.rpartition("://")
    host, _, port = rest.partition("/")[0].rpartition(":")
    if not host:
        host, port = port, ""
    default = {"http": 80, "https": 443}.get(target.scheme)
    name = target.hostname or ""
    return (
        scheme in {"", target.scheme}
        and (name.endswith(host[1:]) if host.startswith("*.") else name == host)
        and (port == "*" or int(port or default or 0) == (target.port or default))
    )
