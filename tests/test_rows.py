"""Every way to authenticate of every row, at a server that demands what the row says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
from row_flow import EverywhereClock, Flow, scopes_of
from row_server import RowServer, fill

from langchain_pocket_auth import AuthContext, ConfigurationError, Provider
from langchain_pocket_auth._catalog import Catalog

CATALOG = Catalog()
WAYS = [(row.id, method) for row in map(CATALOG.get, CATALOG) for method in row.methods]
# They sign for the API themselves; the tool of any other does it.
MINTED = {"github_app", "google_service_account", "snowflake"}


@pytest.fixture(scope="module")
def server() -> Iterator[RowServer]:
    """One server for all rows."""
    with RowServer() as running:
        yield running


def test_all_handlers_are_tried() -> None:
    """The 287 handlers of the data, and client credentials at four providers."""
    assert Counter(method for _, method in WAYS) == {
        "oauth2": 150,
        "token": 125,
        "basic": 7,
        "keypair": 5,
        "client_credentials": 4,
    }
    assert len(WAYS) == len(set(WAYS)) == 287 + 4


@pytest.mark.parametrize(("provider", "method"), WAYS, ids=map("-".join, WAYS))
async def test_row_goes_through_a_whole_flow(
    server: RowServer, monkeypatch: pytest.MonkeyPatch, provider: str, method: str
) -> None:
    """Consent, exchange, API call, refresh and revocation, each as the row says."""
    clock = EverywhereClock(monkeypatch)
    row = CATALOG.get(provider)
    async with Flow(server, row, method) as flow:
        case = flow.case
        if method != "client_credentials":
            outcome = await flow.connect()
            assert (case.complaints, outcome) == ([], "connected")
        auth = await flow.auth()
        _shows(flow, auth)
        if _is_signed(row, method):
            with pytest.raises(ConfigurationError, match="sign"):
                auth.headers()
        else:
            _calls(flow, auth)
        rounds = 2 if case.lifetime_s else 0  # the second with what the first brought
        for _ in range(rounds):
            clock.forward(case.lifetime_s + 1)
            case.ahead_s += case.lifetime_s + 1
            before, auth = auth, await flow.auth()
            assert case.complaints == []
            assert auth.access_token != before.access_token
            _calls(flow, auth)
            assert flow.call(before) == 401, "the token before is over"
            assert case.complaints.pop().startswith("api: ")
        assert await flow.disconnect()
        gone = "DO_REFRESH" if method == "client_credentials" else "NO_SESSION"
        assert await flow.state() == gone
        assert case.complaints == []
        assert case.served == _expected(row, method, rounds)


def _is_signed(row: Provider, method: str) -> bool:
    form = row.form(method)
    return bool(form and form.api_credential.signature and row.id not in MINTED)


def _shows(flow: Flow, auth: AuthContext) -> None:
    """The context has the environment's keys, and knows where the API is."""
    row, case = flow.row, flow.case
    form = row.form(case.method)
    if form is None:
        assert auth.to_dict() == dict.fromkeys(row.environment_keys, case.token)
    else:
        typed = {
            field.env_key or f"{row.env_prefix}_{name.upper()}": case.typed[name]
            for name, field in form.fields.items()
        }
        shown = auth.to_dict()
        assert shown.keys() >= {*typed, *form.env_keys}
        assert {k: shown[k] for k in typed} == typed
    profiled = auth.to_profiled_dict("work")
    assert profiled == {f"WORK_{k}": v for k, v in auth.to_dict().items()}
    if form is None and row.api_base_url and case.method == "oauth2":
        expected = case.local(fill(row.api_base_url, case._values))
        assert auth.api_base_url == expected
    # What tells the account is kept: URLs and headers of API calls may name it.
    kept = auth._placed.values if auth._placed else {}
    for name, value in case.learned.items():
        assert kept.get(name) == str(value), f"{name} is not kept"


def _calls(flow: Flow, auth: AuthContext) -> None:
    """The API takes the credential, and `headers()` says what `apply` does."""
    status = flow.call(auth)
    assert (flow.case.complaints, status) == ([], 200)
    rules = flow.case.form or flow.row
    if rules.api_credential.query or rules.api_credential.url:
        with pytest.raises(ConfigurationError, match="apply"):
            auth.headers()
    else:
        request = flow.person._http.build_request("GET", flow.case.origin)
        plain = dict(request.headers)
        changed = {
            k: v for k, v in auth.apply(request).headers.items() if plain.get(k) != v
        }
        assert {k.lower(): v for k, v in auth.headers().items()} == changed


def _expected(row: Provider, method: str, rounds: int) -> list[str]:
    """Return which requests the server has to have seen, in order."""
    if method != "oauth2":
        return _without_consent(row, method) * (1 + rounds)
    asks = {*scopes_of(row, method), *row.required_scopes}
    seen = ["authorize", "token"]
    if row.token_exchange:
        seen += ["exchange"]
    if row.issuer and "openid" in asks:
        seen += ["keys"] if row.jwks_uri else ["metadata", "keys"]
    if row.account_lookup:
        seen += ["lookup"]
    seen += ["api"]
    again = "refresh"
    if row.token_exchange:
        own = row.token_exchange.refresh_endpoint
        again = "exchange again" if own else "exchange"
    seen += [again, "api"] * rounds
    if row.revocation:
        seen += ["revocation"]
    elif row.revocation_endpoint:
        seen += ["revocation", "revocation"]  # of either token
    return seen


def _without_consent(row: Provider, method: str) -> list[str]:
    if _is_signed(row, method):
        return []
    mints = {"github_app": ["installation token"], "google_service_account": ["token"]}
    asks = ["token"] if method == "client_credentials" else mints.get(row.id, [])
    return [*asks, "api"]
