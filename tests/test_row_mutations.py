"""A row that is wrong in one value fails at the server that demands the right one."""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, quote_plus, urlencode, urlsplit

import httpx
import pytest
from pydantic import ValidationError
from row_flow import EverywhereClock, Flow, scopes_of
from row_server import EVERLASTING, RowServer

from langchain_pocket_auth import PocketAuthError, Provider
from langchain_pocket_auth._catalog import Catalog
from langchain_pocket_auth._placement import BEARER
from langchain_pocket_auth.testing._outside import outside

ROWS = [row for row in map(Catalog().get, Catalog()) if row.methods]
OAUTH2 = [row for row in ROWS if "oauth2" in row.methods]
# Of a value that many rows share, so many of them are tried.
SAMPLE = 2


@pytest.fixture(scope="module")
def server() -> Iterator[RowServer]:
    """One server for all rows."""
    with RowServer() as running:
        yield running


def changed(row: Provider, **changes: Any) -> Provider:
    """Return a row with other values; `a__b` is key b of table a, `None` removes."""
    facts = row.model_dump(mode="json", exclude_unset=True)
    for path, value in changes.items():
        *tables, key = path.split("__")
        place = facts
        for table in tables:
            place = place[table]
        if value is None:
            place.pop(key, None)
        else:
            place[key] = value
    return Provider(**facts)


@dataclass(frozen=True)
class Mutation:
    """A wrong value, the rows that it is wrong for, and what the server says."""

    name: str
    applies: Callable[[Provider], Any]
    changes: Callable[[Provider], dict[str, Any]]
    complaint: str
    """A regular expression for the first; `""`: the client sees it itself."""
    method: str = "oauth2"
    scopes: tuple[str, ...] | None = None


def _set(**changes: Any) -> Callable[[Provider], dict[str, Any]]:
    return lambda _: changes


def _way(method: str) -> Callable[[Provider], bool]:
    return lambda row: row.token_endpoint_auth_method == method


def _many_scopes(row: Provider) -> bool:
    return row.scoped and len({*scopes_of(row, "oauth2"), *row.required_scopes}) > 1


def _refreshes(row: Provider) -> bool:
    return row.id not in EVERLASTING and not row.token_exchange


def _required(row: Provider) -> bool:
    return row.scoped and not {*row.required_scopes} <= {*scopes_of(row, "oauth2")}


AUTHORIZE = [
    Mutation(
        "another scope separator",
        _many_scopes,
        lambda row: {"scope_separator": " " if row.scope_separator == "," else ","},
        r"authorize: (user_)?scope is wrong",
    ),
    Mutation(
        "scopes under another name",
        lambda row: row.scope_parameter != "scope",
        _set(scope_parameter="scope"),
        "authorize: user_scope is missing",
    ),
    Mutation(
        "scopes where there are none",
        lambda row: not row.scoped,
        _set(scoped=True),
        "authorize: scope is not a parameter here",
        scopes=("read", "write"),
    ),
    Mutation(
        "no offline scope",
        _required,
        _set(required_scopes=None),
        "authorize: scope is (wrong|missing)",
    ),
    Mutation(
        "no PKCE",
        lambda row: row.code_challenge_method == "S256",
        _set(code_challenge_method="unsupported"),
        "authorize: code_challenge_method is missing",
    ),
    Mutation(
        "PKCE where it is refused",
        lambda row: row.code_challenge_method == "unsupported",
        _set(code_challenge_method="S256"),
        "authorize: code_challenge is not a parameter here",
    ),
    Mutation(
        "no static parameters",
        lambda row: row.authorization_parameters,
        _set(authorization_parameters=None),
        r"authorize: \w+ is missing",
    ),
    Mutation(
        "an unknown parameter",
        lambda row: not row.authorization_parameters,
        _set(authorization_parameters={"audience": "https://api.example.com"}),
        "authorize: audience is not a parameter here",
    ),
    Mutation(
        "another static parameter",
        lambda row: row.authorization_parameters and not row.variables,
        lambda row: {
            "authorization_parameters": dict.fromkeys(
                row.authorization_parameters, "another"
            )
        },
        r"authorize: \w+ is wrong",
    ),
    Mutation(
        "no response type",
        lambda row: row.response_type,
        _set(response_type=""),
        "authorize: response_type is missing",
    ),
    Mutation(
        "a response type where there is none",
        lambda row: not row.response_type,
        _set(response_type="code"),
        "authorize: response_type is not a parameter here",
    ),
    Mutation(
        "parameters with their usual names",
        lambda row: row.parameter_names and not row.authorization_parameter_names,
        _set(parameter_names=None),
        r"authorize: (client_key|app_id|appid) is missing",
    ),
    Mutation(
        "no fragment",
        lambda row: (row.authorization_endpoint or "").endswith("#wechat_redirect"),
        lambda row: {
            "authorization_endpoint": str(row.authorization_endpoint).partition("#")[0]
        },
        "authorize: the fragment is wrong",
    ),
    Mutation(
        "no route in the fragment",
        lambda row: "#/" in (row.authorization_endpoint or ""),
        lambda row: {
            "authorization_endpoint": str(row.authorization_endpoint).partition("#")[0]
        },
        "authorize: the page is not reached through the fragment",
    ),
    Mutation(
        "another authorization endpoint",
        lambda row: "#" not in (row.authorization_endpoint or "#"),
        lambda row: {"authorization_endpoint": f"{row.authorization_endpoint}/v0"},
        r"server: nothing is at \S+/v0",
    ),
]
TOKEN = [
    Mutation(
        "token parameters with their usual names",
        lambda row: row.authorization_parameter_names,
        _set(parameter_names=None, authorization_parameter_names=None),
        "token: grantType is wrong",
    ),
    Mutation(
        "another token endpoint",
        lambda row: True,
        lambda row: {"token_endpoint": f"{row.token_endpoint}/v0"},
        r"server: nothing is at \S+/v0",
    ),
    Mutation(
        "a form for JSON",
        lambda row: row.token_request_format == "json",
        _set(token_request_format="form"),
        "token: the body is not json",
    ),
    Mutation(
        "JSON for a form",
        lambda row: (
            (row.token_request_format, row.token_request_method) == ("form", "POST")
        ),
        _set(token_request_format="json"),
        "token: the body is not form",
    ),
    Mutation(
        "POST for GET",
        lambda row: row.token_request_method == "GET",
        _set(token_request_method="POST"),
        "token: the method is wrong",
    ),
    Mutation(
        "GET for POST",
        lambda row: row.token_request_method == "POST",
        _set(token_request_method="GET"),
        "token: the method is wrong",
    ),
    Mutation(
        "the secret in the body",
        _way("client_secret_basic"),
        _set(token_endpoint_auth_method="client_secret_post"),
        "token: the app is not in Authorization",
    ),
    Mutation(
        "the secret in the header",
        _way("client_secret_post"),
        _set(token_endpoint_auth_method="client_secret_basic"),
        "token: the app is in Authorization",
    ),
    Mutation(
        "no secret",
        _way("client_secret_post"),
        _set(token_endpoint_auth_method="none"),
        r"token: \w+ is missing",
    ),
    Mutation(
        "a secret where there is none",
        # The app has one all the same: for the API.
        lambda row: row.id == "etsy",
        _set(token_endpoint_auth_method="client_secret_post"),
        "token: client_secret is not a parameter here",
    ),
    Mutation(
        "no static token parameters",
        lambda row: row.token_parameters,
        _set(token_parameters=None),
        r"token: \w+ is missing",
    ),
    Mutation(
        "no headers of its own",
        lambda row: row.token_request_headers,
        _set(token_request_headers=None),
        r"token: the header (User-Agent|Accept) is wrong",
    ),
    Mutation(
        "the callback's host is not heard",
        lambda row: any(v.callback_parameter for v in row.variables.values()),
        lambda row: {
            f"variables__{name}__callback_parameter": None
            for name, variable in row.variables.items()
            if variable.callback_parameter
        },
        r"server: nothing is at \S+",
    ),
    Mutation(
        "another exchange",
        lambda row: row.token_exchange,
        _set(token_exchange__grant_type="another"),
        r"(token|exchange): grant_type is wrong",
    ),
    Mutation(
        "the exchange names its token otherwise",
        lambda row: row.token_exchange,
        _set(token_exchange__token_parameter="subject_token"),
        r"exchange: \w+ is missing",
    ),
    Mutation(
        "another prefix at the look-up",
        lambda row: row.account_lookup,
        lambda row: {
            "account_lookup__prefix": "Bearer "
            if row.account_lookup and row.account_lookup.prefix != "Bearer "
            else "OAuth "
        },
        "lookup: Authorization is wrong",
    ),
]
REFRESH = [
    Mutation(
        "no refresh endpoint",
        lambda row: row.refresh_endpoint,
        _set(refresh_endpoint=None),
        "refresh: it belongs to the refresh endpoint",
    ),
    Mutation(
        "another refresh endpoint",
        lambda row: _refreshes(row) and not row.refresh_endpoint,
        lambda row: {"refresh_endpoint": f"{row.token_endpoint}/refresh"},
        r"server: nothing is at \S+/refresh",
    ),
    Mutation(
        "no static refresh parameters",
        lambda row: row.refresh_parameters,
        _set(refresh_parameters=None),
        r"refresh: \w+ is missing",
    ),
    Mutation(
        "the client as at the exchange",
        lambda row: row.refresh_endpoint_auth_method,
        _set(refresh_endpoint_auth_method=None),
        "refresh: the app is not in Authorization",
    ),
    Mutation(
        "another way of the client than at the exchange",
        lambda row: (
            row.token_endpoint_auth_method == "client_secret_post"
            and not row.refresh_endpoint_auth_method
            and _refreshes(row)
        ),
        _set(refresh_endpoint_auth_method="client_secret_basic"),
        "refresh: the app is in Authorization",
    ),
    Mutation(
        "the exchange again",
        lambda row: row.token_exchange and row.token_exchange.refresh_endpoint,
        _set(
            token_exchange__refresh_endpoint=None,
            token_exchange__refresh_grant_type=None,
        ),
        "exchange: it belongs to the other endpoint",
    ),
]
REVOKE = [
    Mutation(
        "RFC 7009",
        lambda row: (
            row.revocation
            and row.revocation.parameters
            and "{" not in row.revocation.endpoint
        ),
        lambda row: {
            "revocation": None,
            "revocation_endpoint": row.revocation and row.revocation.endpoint,
        },
        r"(revocation|token): .*",
    ),
    Mutation(
        "another method",
        lambda row: row.revocation,
        lambda row: {
            "revocation__method": "POST"
            if row.revocation and row.revocation.method == "DELETE"
            else "DELETE"
        },
        r"(revocation|token): the method is wrong",
    ),
    Mutation(
        "a form for JSON",
        lambda row: row.revocation and row.revocation.format == "json",
        _set(revocation__format=None),
        "revocation: the body is not json",
    ),
    Mutation(
        "no header",
        lambda row: row.revocation and row.revocation.headers,
        _set(revocation__headers=None),
        "revocation: the header Authorization is wrong",
    ),
    Mutation(
        "no basic authentication",
        lambda row: row.revocation and row.revocation.basic,
        _set(revocation__basic=None),
        "revocation: Authorization is no Basic one",
    ),
    Mutation(
        "the token under another name",
        lambda row: (
            row.revocation
            and len(row.revocation.parameters) == 1
            and not row.revocation.basic
        ),
        _set(revocation__parameters={"token": "{token}"}),
        "revocation: access_token is missing",
    ),
    Mutation(
        "another endpoint",
        lambda row: row.revocation_endpoint,
        lambda row: {"revocation_endpoint": f"{row.revocation_endpoint}/v0"},
        r"server: nothing is at \S+/v0",
    ),
]
API = [
    Mutation(
        "Bearer",
        lambda row: row.api_credential != BEARER,
        _set(api_credential=None),
        r"api: .+ is (missing|wrong)",
    ),
    Mutation(
        "another header",
        lambda row: row.api_credential == BEARER,
        _set(api_credential={"header": "X-Api-Key"}),
        "api: the header Authorization is missing",
    ),
    Mutation(
        "in the query",
        lambda row: row.api_credential == BEARER,
        _set(api_credential={"query": "access_token"}),
        "api: the header Authorization is missing",
    ),
    Mutation(
        "no further headers",
        lambda row: row.api_headers,
        _set(api_headers=None),
        r"api: the header \S+ is (missing|wrong)",
    ),
    Mutation(
        "no further parameters",
        lambda row: row.api_query,
        _set(api_query=None),
        "api: openid is missing",
    ),
    Mutation(
        "further headers",
        lambda row: not row.api_headers,
        _set(api_headers={"X-Token": "{token}"}),
        "api: the header X-Token holds a credential",
    ),
    *(
        Mutation(
            f"Bearer for the {method} form",
            lambda row, method=method: (
                (form := row.form(method))
                and form.api_credential != BEARER
                and not form.api_credential.signature
            ),
            _set(**{f"{method}__api_credential": None}),
            r"(api|server): .+",
            method,
        )
        for method in ("token", "basic")
    ),
    Mutation(
        "a form without further headers",
        lambda row: row.token and row.token.api_headers,
        _set(token__api_headers=None),
        r"api: the header \S+ is missing",
        "token",
    ),
    Mutation(
        "a form without further parameters",
        lambda row: row.token and row.token.api_query,
        _set(token__api_query=None),
        "api: key is missing",
        "token",
    ),
    Mutation(
        "user and password the other way round",
        lambda row: row.basic,
        lambda row: {
            "basic__api_credential": {
                "username": row.basic.api_credential.password,
                "password": row.basic.api_credential.username,
            }
            if row.basic
            else {}
        },
        "api: the header Authorization is wrong",
        "basic",
    ),
]
OF_THE_APP = [
    Mutation(
        "the secret in the body",
        _way("client_secret_basic"),
        _set(token_endpoint_auth_method="client_secret_post"),
        "token: the app is not in Authorization",
        "client_credentials",
    ),
    Mutation(
        "the secret in the header",
        _way("client_secret_post"),
        _set(token_endpoint_auth_method="client_secret_basic"),
        "token: the app is in Authorization",
        "client_credentials",
    ),
    Mutation(
        "POST for GET",
        lambda row: row.token_request_method == "GET",
        _set(token_request_method="POST"),
        "token: the method is wrong",
        "client_credentials",
    ),
    Mutation(
        "no scope",
        lambda row: {*row.required_scopes} - {"offline_access"},
        _set(required_scopes=None),
        "token: scope is (wrong|missing)",
        "client_credentials",
    ),
]
UNREADABLE = [
    Mutation(
        "the code under another name",
        lambda row: row.code_parameter != "code",
        _set(code_parameter="code"),
        "",
    ),
    Mutation(
        "the token at another place",
        lambda row: "access_token" in row.token_response,
        _set(token_response__access_token="token"),
        "",
    ),
    Mutation(
        "the refreshed token at another place",
        lambda row: row.refresh_response,
        _set(refresh_response=None),
        "",
    ),
    Mutation(
        "the accounts at another place",
        lambda row: row.account_lookup and row.account_lookup.list,
        _set(account_lookup__list="sites"),
        "",
    ),
]


def _cases(mutations: list[Mutation], *facts: str) -> list[Any]:
    found = []
    for mutation in mutations:
        rows = [
            (row, believes)
            for row in ROWS
            if mutation.method in row.methods and mutation.applies(row)
            if (believes := _believes(row, mutation)) is not None
        ]
        assert rows, f"{mutation.name} is wrong for no row"
        step = max(1, len(rows) // SAMPLE)
        found += [
            pytest.param(
                row, believes, mutation, *facts, id=f"{mutation.name}-{row.id}"
            )
            for row, believes in rows[::step][:SAMPLE]
        ]
    return found


def _believes(row: Provider, mutation: Mutation) -> Provider | None:
    # A changed row is no row if, say, a variable is left that nothing uses.
    with suppress(ValidationError):
        return changed(row, **mutation.changes(row))
    return None


async def drive(flow: Flow, clock: EverywhereClock) -> str:
    """Do all there is to do until the server complains; return where that was."""
    case = flow.case
    if case.method != "client_credentials":
        outcome = await flow.connect()
        if outcome != "connected":
            return outcome
    try:
        auth = await flow.auth()
    except PocketAuthError as error:
        return f"no token: {type(error).__name__}"
    if flow.call(auth) != 200:
        return "no call"
    if case.lifetime_s:
        clock.forward(case.lifetime_s + 1)
        case.ahead_s += case.lifetime_s + 1
        try:
            await flow.auth()
        except PocketAuthError as error:
            return f"no refresh: {type(error).__name__}"
    await flow.disconnect()
    return "no revocation"


# Each with where the flow has to end.
REFUSED = [
    *_cases(AUTHORIZE, "status 400"),
    *_cases(TOKEN, "failed"),
    *_cases(REFRESH, "no refresh: .*"),
    *_cases(REVOKE, "no revocation"),
    *_cases(API, "no call"),
    *_cases(OF_THE_APP, "no token: ConfigurationError"),
]


@pytest.mark.parametrize(("row", "believes", "mutation", "end"), REFUSED)
async def test_wrong_value_is_refused_by_the_provider(
    server: RowServer,
    monkeypatch: pytest.MonkeyPatch,
    row: Provider,
    believes: Provider,
    mutation: Mutation,
    end: str,
) -> None:
    """The flow stops where the value matters, and the provider says why."""
    clock = EverywhereClock(monkeypatch)
    scopes = None if mutation.scopes is None else list(mutation.scopes)
    async with Flow(
        server, row, mutation.method, believes=believes, scopes=scopes
    ) as flow:
        where = await drive(flow, clock)
        complaints = flow.case.complaints
        assert complaints, f"nothing was refused; the flow ended with {where}"
        assert re.fullmatch(mutation.complaint, complaints[0])
        assert re.fullmatch(end, where)


@pytest.mark.parametrize(("row", "believes", "mutation"), _cases(UNREADABLE))
async def test_answer_at_another_place_is_not_taken_for_one(
    server: RowServer,
    monkeypatch: pytest.MonkeyPatch,
    row: Provider,
    believes: Provider,
    mutation: Mutation,
) -> None:
    """What is not found where the row says is missing, and nobody is connected."""
    async with Flow(server, row, "oauth2", believes=believes) as flow:
        where = await drive(flow, EverywhereClock(monkeypatch))
        assert re.fullmatch("unavailable|failed|malformed|no refresh: .*", where)
        assert flow.case.complaints == []


# --------------------------------------------------- what no value of a row can spoil


@dataclass
class Direct:
    """A client by hand: right in everything that a test does not change."""

    flow: Flow
    verifier: str = "v" * 50

    @property
    def challenge(self) -> str:
        digest = hashlib.sha256(self.verifier.encode()).digest()
        return urlsafe_b64encode(digest).decode().rstrip("=")

    def send(self, method: str, url: str, **facts: Any) -> httpx.Response:
        with outside():
            return self.flow.person._http.request(
                method, self.flow.case.local(url), **facts
            )

    def authorize(self, **changes: str | None) -> str:
        """Return the code, or nothing."""
        case, row = self.flow.case, self.flow.row
        parameters: dict[str, str | None] = {
            "response_type": "code",
            "client_id": case.client_id,
            "redirect_uri": case.redirect_uri,
            "state": "s" * 43,
            "scope": " ".join([*case.scopes, *row.required_scopes]),
            "code_challenge": self.challenge,
            "code_challenge_method": "S256",
        } | changes
        query = {k: v for k, v in parameters.items() if v is not None}
        answer = self.send(
            "GET", f"{row.authorization_endpoint}?{urlencode(query)}"
        ).headers.get("Location", "")
        return parse_qs(urlsplit(answer).query).get("code", [""])[0]

    def token(
        self, code_: str, headers: dict[str, str | None] | None = None, **changes: Any
    ) -> httpx.Response:
        case = self.flow.case
        pair = f"{quote_plus(case.client_id)}:{quote_plus(case.client_secret)}"
        sent = {
            "Accept": "application/json",
            "User-Agent": "langchain-pocket-auth",
            "Authorization": f"Basic {b64encode(pair.encode()).decode()}",
            "Content-Type": "application/x-www-form-urlencoded",
        } | (headers or {})
        form = {
            "grant_type": "authorization_code",
            "code": code_,
            "redirect_uri": case.redirect_uri,
            "code_verifier": self.verifier,
        } | changes
        return self.send(
            "POST",
            str(self.flow.row.token_endpoint),
            headers={k: "" if v is None else v for k, v in sent.items()},
            content=urlencode({k: v for k, v in form.items() if v is not None}),
        )


@pytest.fixture
async def direct(server: RowServer) -> Any:
    """A client by hand of Airtable's row, which has no oddity."""
    row = next(row for row in ROWS if row.id == "airtable")
    async with Flow(server, row, "oauth2") as flow:
        yield Direct(flow)


async def test_right_request_by_hand_is_answered(direct: Direct) -> None:
    """The requests that the next tests change are right as they are."""
    answer = direct.token(direct.authorize())
    assert answer.status_code == 200
    assert answer.json()["access_token"] == direct.flow.case.token
    assert direct.flow.case.complaints == []


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"code_challenge_method": "plain"}, "code_challenge_method is wrong"),
        ({"code_challenge_method": None}, "code_challenge_method is missing"),
        ({"code_challenge": "challenge"}, "code_challenge is no S256 challenge"),
        ({"state": None}, "state is missing"),
        ({"state": "short"}, "state is not fit to be one"),
        ({"redirect_uri": "https://evil.example.com/"}, "redirect_uri is wrong"),
        ({"client_id": "another"}, "client_id is wrong"),
        ({"scope": None}, "scope is missing"),
        ({"response_code": "code"}, "response_code is not a parameter here"),
    ],
)
async def test_wrong_authorization_request_is_refused(
    direct: Direct, changes: dict[str, str | None], complaint: str
) -> None:
    """Each parameter of RFC 6749 section 4.1.1 and RFC 7636 counts."""
    assert direct.authorize(**changes) == ""
    assert direct.flow.case.complaints == [f"authorize: {complaint}"]


@pytest.mark.parametrize(
    ("headers", "changes", "complaint"),
    [
        ({"Accept": "*/*"}, {}, "the header Accept is wrong"),
        ({"User-Agent": None}, {}, "the header User-Agent names a library, or nothing"),
        (
            {"User-Agent": "python-httpx/0.28"},
            {},
            "the header User-Agent names a library, or nothing",
        ),
        ({}, {"client_secret": "s"}, "client_secret is not a parameter here"),
        ({}, {"client_id": "c"}, "client_id is not a parameter here"),
        ({}, {"code": "another"}, "code is wrong"),
        ({}, {"code_verifier": "w" * 50}, "code_verifier is wrong"),
        ({}, {"code_verifier": None}, "code_verifier is missing"),
        ({}, {"redirect_uri": None}, "redirect_uri is missing"),
        ({}, {"grant_type": "code"}, "grant_type is wrong"),
        ({"Content-Type": "application/json"}, {}, "the body is not form"),
    ],
)
async def test_wrong_token_request_is_refused(
    direct: Direct,
    headers: dict[str, str | None],
    changes: dict[str, str | None],
    complaint: str,
) -> None:
    """Each parameter of RFC 6749 section 4.1.3, and what vendors want beside."""
    answer = direct.token(direct.authorize(), headers, **changes)
    assert answer.status_code >= 400
    assert direct.flow.case.complaints == [f"token: {complaint}"]


async def test_code_is_taken_once(direct: Direct) -> None:
    """A code is good for one token (RFC 6749 section 4.1.2)."""
    code = direct.authorize()
    assert direct.token(code).status_code == 200
    assert direct.token(code).status_code == 400
    assert direct.flow.case.complaints == ["token: code is wrong"]


async def test_secret_that_is_not_encoded_is_refused(direct: Direct) -> None:
    """Id and secret are form-encoded before base64 (RFC 6749 section 2.3.1)."""
    case = direct.flow.case
    pair = b64encode(f"{case.client_id}:{case.client_secret}".encode()).decode()
    answer = direct.token(direct.authorize(), {"Authorization": f"Basic {pair}"})
    assert answer.status_code == 401
    assert case.complaints == ["token: Authorization is wrong"]
