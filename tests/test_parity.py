"""The reference's 74 providers and 82 handlers are all here, or it is said why not."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import aclosing, closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from row_flow import Flow, typed_for
from row_server import RowServer

from langchain_pocket_auth import AuthContext, AuthProvider, PocketAuth, Provider
from langchain_pocket_auth._catalog import Catalog

HANDLERS: list[dict[str, Any]] = json.loads(
    Path(__file__).with_name("hyperpocket_handlers.json").read_text()
)
EVERY = pytest.mark.parametrize("facts", HANDLERS, ids=lambda f: f["handler"])
BASE = "http://127.0.0.1:8711"
CATALOG = Catalog()

_TYPED = "a typed secret travels in the body of our own form, never in a redirect"
_NONE = "the reference has none, and a login without scopes can call nothing useful"
# What is not as in the reference, by handler (or kind of handler) and fact.
DEVIATIONS = {
    ("token", "callback_path"): _TYPED,
    ("basic", "callback_path"): _TYPED,
    ("keypair", "callback_path"): _TYPED,
    ("basicauth", "form path"): "the reference names a token's, and routes another",
    ("sendgrid-token", "provider"): "a slip of the pen, which is an alias here",
    ("calendly-oauth2", "scoped"): "Calendly has scopes since March 2026",
    ("mailchimp-oauth2", "scoped"): "Mailchimp has none; none was ever sent",
    ("notion-oauth2", "scoped"): "Notion has none; none was ever sent",
    ("linear-token", "default"): "the reference has two defaults",
    ("linkedin-basicauth", "default"): "an app does not ask for a person's password",
    ("linkedin-oauth2", "default"): "so this is the default",
    ("asana-oauth2", "recommended_scopes"): _NONE,
    ("calendly-oauth2", "recommended_scopes"): _NONE,
    ("discord-oauth2", "recommended_scopes"): _NONE,
    ("facebook-oauth2", "recommended_scopes"): _NONE,
    ("jira-oauth2", "recommended_scopes"): _NONE,
    ("linear-oauth2", "recommended_scopes"): _NONE,
    ("linkedin-oauth2", "recommended_scopes"): _NONE,
    ("salesforce-oauth2", "recommended_scopes"): _NONE,
    ("x-oauth2", "recommended_scopes"): _NONE,
}


@pytest.fixture(scope="module")
def pocket() -> Iterator[PocketAuth]:
    """An app that is registered for nothing."""
    with closing(PocketAuth("memory://", base_url=BASE)) as pocket:
        yield pocket


@pytest.fixture(scope="module")
def row_server() -> Iterator[RowServer]:
    """A server for any row."""
    with RowServer() as running:
        yield running


def row_of(facts: dict[str, Any]) -> Provider:
    return CATALOG.get(facts["provider"])


def test_reference_is_complete() -> None:
    """74 providers and 82 handlers, no name twice."""
    assert len({h["handler"] for h in HANDLERS}) == len(HANDLERS) == 82
    assert len({h["provider"] for h in HANDLERS}) == 74
    assert Counter(h["kind"] for h in HANDLERS) == {
        "token": 60,
        "oauth2": 19,
        "basic": 2,
        "keypair": 1,
    }


@EVERY
def test_handler_is_as_in_the_reference(
    pocket: PocketAuth, facts: dict[str, Any]
) -> None:
    """Kind, scopes, default and paths: what differs is in the table, and only that."""
    handler: Any = pocket.find_handler_instance(facts["handler"])
    assert handler.method == facts["kind"]
    ours = {
        "provider": str(handler.provider()),
        "scoped": handler.scoped,
        "default": handler.provider_default(),
        "recommended_scopes": sorted(handler.recommended_scopes()),
    }
    theirs = {"recommended_scopes": []} | facts
    if facts["kind"] != "oauth2":  # whose path is compared at the login, below
        ours["form path"] = ours["callback_path"] = handler.address.removeprefix(BASE)
        theirs["form path"] = facts["callback_path"].replace("/callback", "/form")
    different = {what for what, value in ours.items() if value != theirs[what]}
    told = {
        what for who, what in DEVIATIONS if who in {facts["handler"], facts["kind"]}
    }
    assert different == told


def test_table_names_nothing_else() -> None:
    """A deviation of a handler that does not exist would hide a typing error."""
    names = {h[key] for h in HANDLERS for key in ("handler", "kind")}
    assert {who for who, _ in DEVIATIONS} <= names


@EVERY
def test_provider_has_its_name_in_the_enumeration(
    pocket: PocketAuth, facts: dict[str, Any]
) -> None:
    """By name and by value, the reference's code finds the same provider."""
    handler = pocket.find_handler_instance(facts["handler"])
    provider = AuthProvider[facts["enum_name"]]
    assert AuthProvider(facts["provider"]) is provider is handler.provider()
    first = pocket.find_handler_instance(auth_provider=facts["provider"])
    assert first.provider() is provider


@pytest.mark.parametrize("provider", sorted({h["provider"] for h in HANDLERS}))
def test_provider_alone_means_its_only_default(
    pocket: PocketAuth, provider: str
) -> None:
    """One handler of a provider is the default, and it is the one that is found."""
    names = [
        row.handler_name(m) for row in [CATALOG.get(provider)] for m in row.methods
    ]
    defaults = [n for n in names if pocket.find_handler_instance(n).provider_default()]
    assert len(defaults) == 1
    assert pocket.find_handler_instance(auth_provider=provider).name == defaults[0]


def _shows(auth: AuthContext, facts: dict[str, Any]) -> None:
    shown, profiled = auth.to_dict(), auth.to_profiled_dict("p1")
    assert shown.keys() >= set(facts["env_keys"])
    assert all(shown[key] for key in facts["env_keys"])
    assert {f"P1_{key}" for key in facts["env_keys"]} <= profiled.keys()
    assert {f"P1_{key}": value for key, value in shown.items()} == profiled


@pytest.mark.parametrize(
    "facts",
    [h for h in HANDLERS if h["kind"] == "oauth2"],
    ids=lambda f: f["handler"],
)
async def test_login_yields_the_environment_of_the_reference(
    row_server: RowServer, facts: dict[str, Any]
) -> None:
    """After a whole consent, the token is under the reference's keys."""
    async with Flow(row_server, row_of(facts), "oauth2") as flow:
        assert urlsplit(flow.request().redirect_uri).path == facts["callback_path"]
        assert await flow.connect() == "connected"
        auth = await flow.auth()
        _shows(auth, facts)
        assert {auth.to_dict()[k] for k in facts["env_keys"]} == {flow.case.token}


@pytest.mark.parametrize(
    "facts",
    [h for h in HANDLERS if h["kind"] != "oauth2"],
    ids=lambda f: f["handler"],
)
async def test_typed_credential_yields_the_environment_of_the_reference(
    facts: dict[str, Any],
) -> None:
    """What the form asks for is under the reference's keys."""
    row = row_of(facts)
    typed = typed_for(row, facts["kind"])
    app = PocketAuth("memory://", base_url=BASE, clients={row.id: typed})
    async with aclosing(app):
        request = app.make_request(auth_handler_name=facts["handler"])
        auth = await app.authenticate(request, auth_handler_name=facts["handler"])
        _shows(auth, facts)
        if facts["kind"] == "token":
            assert auth.to_dict()[facts["env_keys"][0]] == typed["token"]
