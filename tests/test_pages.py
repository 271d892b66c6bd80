"""The pages a person sees: escaped, closed to everything else, readable by programs."""

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest

from langchain_pocket_auth.server._pages import SECURITY_HEADERS, Outcome, page

MARKUP = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onfocus='alert(1)",
    "{{7*7}}{% raw %}",
    "{provider.__class__}",
    "javascript:alert(1)",
    "</style></title><base href=//evil.example>",
]
ELEMENTS = {
    *("html", "head", "meta", "title", "style", "body", "main", "svg", "circle"),
    *("path", "h1", "h2", "p", "section", "ul", "li", "bdi", "form", "button"),
}
ATTRIBUTES = {
    *("lang", "charset", "name", "content", "class", "viewbox", "aria-hidden", "d"),
    *("focusable", "cx", "cy", "r", "method", "action", "type"),
}


class Page(HTMLParser):
    """What a browser would find in a response."""

    def __init__(self, outcome, **values):
        super().__init__()
        self.elements, self.style, self.text, self.inside = [], "", "", ""
        self.response = page(outcome, **{"status": 200, **values})
        self.body = self.response.body.decode()
        self.feed(self.body)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "style":
            self.style += data
        else:
            self.text += " ".join(data.split()) + "\n"

    def find(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def policy(self):
        header = self.response.headers["content-security-policy"]
        return dict(part.strip().split(" ", 1) for part in header.split(";"))


@pytest.mark.parametrize("outcome", Outcome)
def test_every_page_carries_all_security_headers(outcome):
    """No page can be framed, cached, indexed, sniffed or made to load anything."""
    shown = Page(outcome, status=418)
    headers = shown.response.headers
    assert shown.response.status_code == 418
    assert headers["content-type"] == "text/html; charset=utf-8"
    assert headers["x-frame-options"] == "DENY"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-store"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-robots-tag"] == "noindex"
    assert headers["cross-origin-opener-policy"] == "same-origin"
    assert "camera=()" in headers["permissions-policy"]
    digest = hashlib.sha256(shown.style.encode()).digest()
    assert shown.policy == {
        "default-src": "'none'",
        "style-src": f"'sha256-{base64.b64encode(digest).decode()}'",
        "form-action": "'self'",
        "frame-ancestors": "'none'",
        "base-uri": "'none'",
    }


def test_headers_for_other_responses_allow_nothing():
    """A redirect has the same headers as a page and a policy without exceptions."""
    names = {name.lower() for name in SECURITY_HEADERS}
    assert names == set(page(Outcome.PENDING, status=200).headers) - {
        "content-type",
        "content-length",
    }
    assert SECURITY_HEADERS["Content-Security-Policy"] == (
        "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    )


@pytest.mark.parametrize("outcome", Outcome)
@pytest.mark.parametrize("planted", MARKUP)
def test_markup_in_any_value_is_shown_as_text(outcome, planted):
    """A value can neither add an element or attribute nor be evaluated."""
    texts = dict.fromkeys(
        (
            *("provider", "owner", "account", "app_name", "detail", "button"),
            *("person", "code"),
        ),
        planted,
    )
    shown = Page(outcome, **texts, scopes=[planted] * 2, tools=[planted] * 2)
    plain = Page(
        outcome,
        **dict.fromkeys(texts, "value"),
        scopes=["value"] * 2,
        tools=["value"] * 2,
    )
    assert shown.elements == plain.elements
    assert shown.style == plain.style
    assert shown.text == plain.text.replace("value", planted)
    assert shown.text.count(planted) >= 10
    assert "<script" not in shown.body
    assert "<img" not in shown.body
    assert "<base" not in shown.body


@pytest.mark.parametrize("outcome", Outcome)
def test_page_loads_nothing_and_runs_nothing(outcome):
    """Only known elements and attributes; no address of anything outside."""
    shown = Page(outcome, provider="GitHub", button="Go", scopes=["repo"], owner="me")
    assert {tag for tag, _ in shown.elements} <= ELEMENTS
    assert {name for _, each in shown.elements for name in each} <= ATTRIBUTES
    assert not re.search(r"<script|//|url\(|@import|javascript:", shown.body)
    assert shown.find("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in (
        shown.find("meta")
    )
    assert len(shown.find("h1")) == 1


@pytest.mark.parametrize("outcome", Outcome)
def test_programs_can_read_the_outcome(outcome):
    """The outcome stands in one meta element."""
    metas = Page(outcome).find("meta")
    assert [m["content"] for m in metas if m.get("name") == "pocket-auth-outcome"] == [
        outcome.value
    ]


def test_titles_are_all_different():
    """Each outcome tells the person something else."""
    titles = {page(outcome, status=200).body.split(b"title>")[1] for outcome in Outcome}
    assert len(titles) == len(Outcome)


def test_connect_page_says_who_asks_for_what():
    """Provider, permissions, tools, owner and app are shown above one form."""
    shown = Page(
        Outcome.PENDING,
        provider="GitHub",
        scopes=["repo", "read:user"],
        tools=["list_issues"],
        owner="alice@example.com",
        app_name="Acme Assistant",
    )
    for value in ("repo", "read:user", "list_issues", "alice@example.com"):
        assert value in shown.text.splitlines()
    assert "Acme Assistant asks to use GitHub on your behalf." in shown.text
    assert shown.find("form") == [{"method": "post", "action": ""}]
    assert shown.find("button") == [{"type": "submit"}]
    assert shown.text.count("Connect GitHub\n") == 3  # title, heading, button


def test_page_without_names_still_reads_well():
    """What is not known is left out or named in general words."""
    shown = Page(Outcome.PENDING)
    assert "The assistant in your chat asks to use the service on your" in shown.text
    assert "None" not in shown.text
    assert shown.find("h2") == []


@pytest.mark.parametrize("outcome", Outcome)
def test_form_is_there_only_where_it_helps(outcome):
    """Some outcomes have a form of their own; the caller adds or removes one."""
    own = {Outcome.PENDING, Outcome.FAILED, Outcome.CHOOSE, Outcome.FINISH}
    own.add(Outcome.WRONG_ACCOUNT)
    assert len(Page(outcome).find("form")) == (1 if outcome in own else 0)
    assert len(Page(outcome, button="").find("form")) == 0
    shown = Page(outcome, button="Connect after all")
    assert len(shown.find("form")) == 1
    assert "Connect after all" in shown.text


def test_connected_page_sends_the_person_back():
    """The last page names the provider and the account, and asks for nothing."""
    shown = Page(Outcome.CONNECTED, provider="GitHub", account="octocat")
    assert "GitHub is connected" in shown.text
    assert "You can close this page and go back to the chat." in shown.text
    assert "octocat" in shown.text
    assert shown.find("form") == []


def test_withheld_page_lists_what_was_left_out():
    """The scopes given are those that are missing, and the heading says so."""
    shown = Page(Outcome.WITHHELD, scopes=["repo"])
    assert "Left out\n" in shown.text
    assert "repo\n" in shown.text
    assert "Permissions" not in shown.text


@pytest.mark.parametrize(("given", "end"), [(50, None), (51, "1"), (75, "25")])
def test_long_lists_are_cut(given, end):
    """At most 50 values of a list are shown, then how many were left off."""
    shown = Page(Outcome.PENDING, scopes=[f"scope{n}" for n in range(given)])
    assert len(re.findall(r"scope\d+\n", shown.text)) == 50
    assert re.findall(r"and (\d+) more", shown.text) == ([end] if end else [])


@pytest.mark.parametrize(
    "url", ["javascript:alert(1)", "data:text/html,x", "//example.com", "", "ftp://x"]
)
def test_nobody_is_sent_to_anything_but_a_web_page(url):
    """Only http(s) URLs are opened."""
    with pytest.raises(ValueError, match="http"):
        page(Outcome.LEAVING, status=200, next_url=url)


def test_page_on_the_way_opens_the_provider_and_shows_a_link():
    """Leaving works without JavaScript, and outside the form's policy."""
    url = 'https://login.example/authorize?a=1&b="><script>alert(1)</script>'
    body = page(Outcome.LEAVING, status=200, next_url=url).body.decode()
    assert "<script" not in body
    assert body.count("https://login.example/authorize?a=1&amp;b=") == 2
    assert '<meta name="pocket-auth-outcome" content="pending">' in body
