"""What token endpoints publish as granted, and what it says about what was asked."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from typing import Any

import pytest

from langchain_pocket_auth._catalog import Catalog
from langchain_pocket_auth.handlers import OAuth2Handler
from langchain_pocket_auth.handlers._answers import context_of
from langchain_pocket_auth.handlers._of_rows import handlers_of

CATALOG = Catalog()
LOGINS = [row for row in map(CATALOG.get, CATALOG) if "oauth2" in row.methods]
GOOGLE = "https://www.googleapis.com/auth/"
GRAPH = "https://graph.microsoft.com/"


def handler_of(provider: str) -> OAuth2Handler:
    row = CATALOG.get(provider)
    for kind in handlers_of(row):
        if kind.method == "oauth2":
            assert issubclass(kind, OAuth2Handler)
            return kind()
    raise AssertionError(provider)


def withheld(provider: str, asked: str, answer: dict[str, Any]) -> list[str]:
    """Return what counts as withheld after a token answer, as the exchange does."""
    row = CATALOG.get(provider)
    full = {"access_token": "t", "token_type": "bearer", **answer}
    context = context_of(row, full, datetime.now(UTC), row.token_response)
    scopes = asked.split()
    # An answer that does not tell grants what was asked (RFC 6749 section 5.1).
    granted = scopes if context.scopes is None else context.scopes
    return handler_of(provider).missing_scopes(granted, scopes)


# Provider, what was asked, and the answer as it is published. Nothing is withheld.
PUBLISHED: list[tuple[str, str, dict[str, Any]]] = [
    # Google expands two scopes, adds earlier ones, and keeps no order.
    (
        "google",
        "email profile",
        {"scope": f"{GOOGLE}userinfo.email openid {GOOGLE}userinfo.profile"},
    ),
    (
        "google",
        "openid profile email",
        {
            "scope": f"email profile {GOOGLE}userinfo.profile "
            f"{GOOGLE}userinfo.email openid"
        },
    ),
    (
        "google",
        f"{GOOGLE}userinfo.email {GOOGLE}drive.readonly",
        {"scope": f"{GOOGLE}drive.readonly openid {GOOGLE}userinfo.email"},
    ),
    (
        "google",
        f"{GOOGLE}drive.file",  # and, by include_granted_scopes, what was before
        {"scope": f"{GOOGLE}calendar.readonly {GOOGLE}drive.file"},
    ),
    # GitHub normalizes: "Scopes for OAuth apps".
    ("github", "repo gist", {"scope": "repo,gist"}),
    ("github", "user gist user:email", {"scope": "gist,user"}),
    ("github", "repo public_repo repo:status", {"scope": "repo"}),
    ("github", "admin:org read:org write:org", {"scope": "admin:org"}),
    ("github", "read:org", {"scope": "write:org"}),
    ("github", "read:repo_hook", {"scope": "admin:repo_hook"}),
    ("github", "project read:project", {"scope": "project"}),
    ("github", "read:enterprise", {"scope": "admin:enterprise"}),
    # Microsoft lists what its own API is asked for, with or without its address, in
    # its own case ("scopes are case insensitive"), and never offline_access.
    (
        "microsoft",
        "openid profile offline_access User.Read",
        {"scope": f"profile openid email {GRAPH}User.Read"},
    ),
    (
        "microsoft",
        "openid email User.Read",
        {"scope": "profile openid email User.Read"},
    ),
    ("microsoft", f"offline_access {GRAPH}mail.read", {"scope": f"{GRAPH}mail.read"}),
    (
        "microsoft",
        "user.read calendars.read",
        {"scope": f"profile openid email {GRAPH}User.Read {GRAPH}Calendars.Read"},
    ),
    (
        "microsoft",
        f"{GRAPH}Files.ReadWrite offline_access",
        {
            "scope": f"email openid profile {GRAPH}Files.ReadWrite "
            f"{GRAPH}User.ReadWrite {GRAPH}.default"
        },
    ),
    # Slack: the user's are inside, with commas, and `identify` comes by itself.
    (
        "slack",
        "chat:write",
        {
            "ok": True,
            "scope": "commands,incoming-webhook",
            "authed_user": {
                "id": "U1234",
                "scope": "chat:write",
                "access_token": "xoxp-1234",
                "token_type": "user",
            },
        },
    ),
    (
        "slack",
        "search:read chat:write",
        {
            "ok": True,
            "authed_user": {
                "scope": "identify,chat:write,search:read",
                "access_token": "xoxp-1234",
                "token_type": "user",
            },
        },
    ),
    # Shopify leaves out what a write scope includes.
    ("shopify", "read_products write_products", {"scope": "write_products"}),
    (
        "shopify",
        "read_inventory write_inventory read_products write_products read_orders",
        {"scope": "write_inventory,write_products,read_orders"},
    ),
    (  # as Shopify's own libraries read it
        "shopify",
        "unauthenticated_read_checkouts",
        {"scope": "unauthenticated_write_checkouts"},
    ),
    # Bitbucket: what the app was registered with, less what others include.
    (
        "bitbucket",
        "account email repository pullrequest",
        {"scopes": "pipeline pullrequest project team repository account email"},
    ),
    (
        "bitbucket",
        "account repository:write repository pullrequest issue snippet pipeline",
        {
            "scopes": "pipeline:variable webhook snippet:write wiki issue:write "
            "pullrequest:write repository:delete repository:admin project:write "
            "team:write account:write"
        },
    ),
    (
        "bitbucket",
        "repository account",
        {"scopes": "pipeline runner pullrequest team project account issue snippet"},
    ),
    # Commas, arrays, other orders, and more than was asked.
    (
        "linkedin",
        "openid profile email w_member_social",
        {"scope": "email,openid,profile,w_member_social"},
    ),
    ("twitch", "user:read:email", {"scope": ["user:read:email"]}),
    (
        "twitch",
        "channel:read:polls channel:manage:polls",
        {"scope": ["channel:manage:polls", "channel:read:polls"]},
    ),
    (
        "jira",
        "read:jira-work read:jira-user offline_access",
        {"scope": "read:jira-work offline_access read:jira-user"},
    ),
    (
        "x",
        "users.read tweet.read offline.access",
        {"scope": "tweet.read users.read like.read offline.access"},
    ),
    (
        "dropbox",
        "files.content.read",
        {"scope": "account_info.read files.content.read files.metadata.read"},
    ),
    (
        "spotify",
        "user-read-private user-read-email",
        {"scope": "user-read-private user-read-email"},
    ),
    ("discord", "identify", {"scope": "identify"}),
    ("salesforce", "api full refresh_token", {"scope": "refresh_token api full"}),
    # Salesforce: "OAuth Tokens and Scopes": two names of one scope.
    ("salesforce", "api offline_access", {"scope": "refresh_token api"}),
    # These tell nothing, or have none.
    ("facebook", "public_profile email", {"expires_in": 5183944}),
    ("strava", "read activity:read", {"athlete": {"id": 1}}),
    ("notion", "", {"workspace_id": "w", "bot_id": "b"}),
]


@pytest.mark.parametrize(
    ("provider", "asked", "answer"),
    PUBLISHED,
    ids=[f"{provider}: {asked}" for provider, asked, _ in PUBLISHED],
)
def test_published_answer_withholds_nothing(
    provider: str, asked: str, answer: dict[str, Any]
) -> None:
    """A person who agreed to everything is not told that something is missing."""
    assert withheld(provider, asked, answer) == []


# The same with something that the person did not agree to.
WITHHELD: list[tuple[str, str, dict[str, Any], list[str]]] = [
    # Each of Google's scopes has a box of its own.
    (
        "google",
        f"email {GOOGLE}drive {GOOGLE}calendar",
        {"scope": f"{GOOGLE}userinfo.email {GOOGLE}drive openid"},
        [f"{GOOGLE}calendar"],
    ),
    ("google", "openid email", {"scope": "openid"}, ["email"]),
    (
        "google",
        f"{GOOGLE}drive",
        {"scope": f"{GOOGLE}drive.readonly"},
        [GOOGLE + "drive"],
    ),
    # "Users can edit their scopes": GitHub.
    ("github", "repo user", {"scope": ""}, ["repo", "user"]),
    ("github", "repo user:email", {"scope": "public_repo,user"}, ["repo"]),
    ("github", "admin:org read:org", {"scope": "read:org"}, ["admin:org"]),
    (
        "microsoft",
        "User.Read Mail.Send offline_access",
        {"scope": f"profile openid email {GRAPH}User.Read"},
        ["Mail.Send"],
    ),
    (
        "microsoft",
        f"{GRAPH}Mail.ReadWrite",
        {"scope": f"{GRAPH}Mail.Read"},
        [f"{GRAPH}Mail.ReadWrite"],
    ),
    # A bot's scopes are none of the user's.
    (
        "slack",
        "chat:write search:read",
        {
            "ok": True,
            "scope": "search:read",
            "authed_user": {"scope": "chat:write", "access_token": "xoxp-1"},
        },
        ["search:read"],
    ),
    ("shopify", "write_products", {"scope": "read_products"}, ["write_products"]),
    ("shopify", "read_orders", {"scope": "write_products"}, ["read_orders"]),
    ("bitbucket", "repository:write", {"scopes": "pullrequest"}, ["repository:write"]),
    ("bitbucket", "webhook", {"scopes": "repository:admin"}, ["webhook"]),
    (
        "linkedin",
        "openid w_member_social",
        {"scope": "email,openid,profile"},
        ["w_member_social"],
    ),
    ("twitch", "user:read:email", {"scope": []}, ["user:read:email"]),
    (
        "dropbox",
        "account_info.read files.content.read",
        {"scope": "account_info.read"},
        ["files.content.read"],
    ),
]


@pytest.mark.parametrize(
    ("provider", "asked", "answer", "missing"),
    WITHHELD,
    ids=[f"{provider}: {asked}" for provider, asked, *_ in WITHHELD],
)
def test_what_a_person_withholds_is_seen(
    provider: str, asked: str, answer: dict[str, Any], missing: list[str]
) -> None:
    """Leniency about spelling does not hide a refusal."""
    assert withheld(provider, asked, answer) == missing


@pytest.mark.parametrize("form", ["spaces", "commas", "commas and spaces", "array"])
def test_echo_withholds_nothing(form: str) -> None:
    """Whatever the separator and the order, every provider's own scopes are found."""
    for row in LOGINS:
        asked = _asked(row)
        scopes = random.Random(row.id).sample(asked, len(asked))
        value: Any = {
            "spaces": " ".join(scopes),
            "commas": ",".join(scopes),
            "commas and spaces": ", ".join(scopes),
            "array": scopes,
        }[form]
        answer = _answer(row.token_response.get("scope", "scope"), value)
        missing = withheld(row.id, " ".join(asked), _with_token(row, answer))
        assert missing == [], row.id


def test_scope_that_an_answer_lacks_is_withheld() -> None:
    """At every provider that has scopes, unless its row says why not."""
    for row in filter(lambda row: row.scoped, LOGINS):
        asked = _asked(row)
        scopes = " ".join(s for s in asked if s != "second:thing")
        answer = _answer(row.token_response.get("scope", "scope"), scopes)
        exact = row.granted_scopes == "exact"
        missing = withheld(row.id, " ".join(asked), _with_token(row, answer))
        assert missing == ["second:thing"] * exact, row.id


def _asked(row: Any) -> list[str]:
    own = [*row.recommended_scopes, *row.required_scopes]
    return list(dict.fromkeys([*own, "first.thing", "second:thing"]))


def _answer(path: str, value: Any) -> dict[str, Any]:
    for name in reversed(path.split(".")):
        value = {name: value}
    return dict(value)


def _with_token(row: Any, answer: dict[str, Any]) -> dict[str, Any]:
    """Add a token where the row expects it."""
    node = answer
    *parents, last = row.token_response.get("access_token", "access_token").split(".")
    for name in parents:
        node = node.setdefault(name, {})
    node[last] = "t"
    return answer
