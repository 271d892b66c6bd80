"""Whatever comes from outside is read, or refused in the words that are documented."""

from __future__ import annotations

import asyncio
import json
import os
import string
import tomllib
import traceback
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path
from typing import Annotated, Any, Optional, cast
from urllib.parse import urlencode

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from fastapi import Request
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from jwt.algorithms import ECAlgorithm
from langchain_core.tools import StructuredTool
from pydantic import SecretStr

from langchain_pocket_auth import (
    AuthContext,
    CallbackRefused,
    ConfigurationError,
    CredentialUnreadable,
    InjectedAuth,
    Provider,
    ProviderUnavailable,
    TokenRequestError,
    pending_authorizations,
    resume,
)
from langchain_pocket_auth import _vault as vault
from langchain_pocket_auth._catalog import Catalog, read_providers
from langchain_pocket_auth._http import Answer, _date, _retry_after
from langchain_pocket_auth._resume import codes, declined_keys
from langchain_pocket_auth._seal import KeyRing, new_key
from langchain_pocket_auth._settings import check_base_url, client_of, read_settings
from langchain_pocket_auth._site import Site
from langchain_pocket_auth._tools import needs_of
from langchain_pocket_auth.handlers._answers import OAuth2Context, checked, context_of
from langchain_pocket_auth.handlers._device import device_code_of
from langchain_pocket_auth.handlers._discovery import discover, register, with_metadata
from langchain_pocket_auth.handlers._openid import identity_of
from langchain_pocket_auth.server._requests import callback_of, form_of, parsed
from langchain_pocket_auth.server._visitors import Visitors
from langchain_pocket_auth.storage import Record, StorageBackend, storage_from_url

SECRET = "SECRET-dont-show-me"
NOW = datetime(2026, 1, 1, tzinfo=UTC)
HERE = "http://127.0.0.1:9"

EXAMPLES = int(os.environ.get("PARSERS_EXAMPLES", "0"))
fuzz = settings(
    max_examples=EXAMPLES or 35,
    derandomize=not EXAMPLES,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    database=None,
    deadline=2000,
    suppress_health_check=list(HealthCheck),
)

odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from(
        [0, -1, 10**30, 1e308, float("inf"), float("nan"), 2**63, 253402300800]
    ),
    st.text(max_size=20),
    st.sampled_from(
        ["", "\0", "\ud800", "²", "Infinity", "1e999", SECRET, "[", "//[", "0x1"]
    ),
)
anything = st.recursive(
    odd,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=8) | st.just("error"), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def damaged(draw: Any, whole: Any, times: int = 3) -> Any:
    """Return *whole* with some of its parts, however deep, taken out or replaced."""
    copy = json.loads(json.dumps(whole))
    for _ in range(draw(st.integers(0, times))):
        place, names = copy, _names(copy)
        while names:
            name = draw(st.sampled_from(names))
            inner = _names(place[name])
            if inner and draw(st.booleans()):
                place, names = place[name], inner
                continue
            if draw(st.booleans()):
                place[name] = draw(st.sampled_from([[], {}, ""]) | anything)
            else:
                del place[name]
            break
    return copy


def _names(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return sorted(value)
    return list(range(len(value))) if isinstance(value, list) else []


@st.composite
def bodies(draw: Any, whole: Any) -> bytes:
    """Return a damaged document as bytes, which may be damaged once more."""
    body = json.dumps(draw(damaged(whole))).encode()
    at = draw(st.integers(0, len(body)))
    cut = draw(
        st.sampled_from([body, body, body, body[:at], body[:at] + b"\xff" + body[at:]])
    )
    return draw(
        st.sampled_from([cut, cut, cut, b"", b"[" * 50_000, b"1" * 5000, b"<p>"])
    )


answers = st.sampled_from([200, 200, 200, 201, 204, 302, 400, 401, 429, 500, 999])


def read(
    work: Callable[[], Any], *documented: type[Exception], secret: str | None = SECRET
) -> Any:
    """Return what is read; what is raised is documented and shows no secret."""
    try:
        return work()
    except documented as error:
        told = "".join(traceback.format_exception(error))
        shown = [told, str(error), repr(error), repr(getattr(error, "__dict__", ""))]
        # The line of this test that is in the traceback is no leak.
        assert secret is None or not any(secret in text for text in shown)
        return None


# ------------------------------------------------------------------ token endpoints

TOKEN = {
    "access_token": f"{SECRET}-access",
    "token_type": "Bearer",
    "expires_in": 3600,
    "expires_at": "2026-02-01T00:00:00Z",
    "refresh_token": f"{SECRET}-refresh",
    "id_token": f"{SECRET}.id.token",
    "scope": "read write",
    "authed_user": {"access_token": f"{SECRET}-user", "scope": "a,b", "id": "U1"},
    "data": {"access_token": f"{SECRET}-data", "expires_in": "60"},
    "ok": True,
    "error": "",
}
ROWS = [
    Catalog().get(name) for name in ("github", "slack", "tiktok", "square", "google")
]


@fuzz
@given(row=st.sampled_from(ROWS), status=answers, body=bodies(TOKEN))
def test_token_answer_is_a_token_or_a_documented_refusal(
    row: Provider, status: int, body: bytes
) -> None:
    """What is no bearer token never becomes one (RFC 6749 section 5.1)."""

    def context() -> OAuth2Context:
        content = checked(row, Answer(status, body, None))
        return context_of(row, content, NOW, row.token_response)

    got = read(context, TokenRequestError, ConfigurationError, ProviderUnavailable)
    if got is not None:
        assert got.access_token.isascii()
        assert got.access_token.isprintable()
        assert got.expires_at is None or got.expires_at.tzinfo
        assert got.scopes is None or all(isinstance(s, str) for s in got.scopes)
        assert SECRET not in f"{got} {got.model_dump()}"


DEVICE = {
    "device_code": SECRET,
    "user_code": "ABCD-EFGH",
    "verification_uri": "https://acme.example/device",
    "verification_uri_complete": "https://acme.example/device?user_code=ABCD",
    "expires_in": 600,
    "interval": 5,
}


@fuzz
@given(status=answers, body=bodies(DEVICE))
def test_device_answer_is_a_code_or_a_documented_refusal(
    status: int, body: bytes
) -> None:
    """People are sent to secure pages only (RFC 8628 section 3.2)."""
    got = read(
        lambda: device_code_of(ROWS[0], Answer(status, body, None), NOW),
        *(TokenRequestError, ConfigurationError, ProviderUnavailable),
    )
    if got is not None:
        assert got.verification_uri.startswith(("https://", "http://127.0.0.1"))
        assert 0 < got.interval_s < 1e6
        assert SECRET not in repr(got)


# ------------------------------------------------------- what servers say of themselves


class Stub:
    """Answers with documents, as the HTTP client would."""

    def __init__(self, *documents: tuple[int, bytes]) -> None:
        self._documents = list(documents)

    async def request(self, *_: Any, **__: Any) -> Answer:
        status, body = self._documents[0]
        if len(self._documents) > 1:
            self._documents.pop(0)
        return Answer(status, body, None)

    def only_public(self, host: str) -> None:
        assert isinstance(host, str)


METADATA = {
    "issuer": HERE,
    "authorization_endpoint": f"{HERE}/authorize",
    "token_endpoint": f"{HERE}/token",
    "revocation_endpoint": f"{HERE}/revoke",
    "jwks_uri": f"{HERE}/jwks",
    "pushed_authorization_request_endpoint": f"{HERE}/par",
    "registration_endpoint": f"{HERE}/register",
    "token_endpoint_auth_methods_supported": ["client_secret_basic", "none"],
    "code_challenge_methods_supported": ["S256"],
    "grant_types_supported": ["authorization_code"],
    "scopes_supported": ["read"],
    "authorization_response_iss_parameter_supported": True,
}


@fuzz
@given(status=answers, body=bodies(METADATA))
def test_metadata_completes_a_row_or_is_refused(status: int, body: bytes) -> None:
    """Only http(s) addresses get into a row (RFC 8414 section 3)."""
    row = Provider(id="acme", issuer=HERE)

    def filled() -> Provider:
        http: Any = Stub((status, body))
        return with_metadata(row, asyncio.run(discover(http, HERE, provider="acme")))

    got = read(filled, ConfigurationError, ProviderUnavailable, secret=None)
    if got is not None:
        assert str(got.token_endpoint).startswith(("https://", "http://"))
        assert str(got.authorization_endpoint).startswith(("https://", "http://"))


CLIENT = {
    "client_id": "made",
    "client_secret": SECRET,
    "client_secret_expires_at": 0,
    "token_endpoint_auth_method": "client_secret_basic",
    "registration_access_token": SECRET,
    "error": "invalid_redirect_uri",
}


@fuzz
@example(status=400, body=b'{"error": []}')
@given(status=st.sampled_from([200, 201, 400, 400, 503]), body=bodies(CLIENT))
def test_registration_is_a_client_or_a_documented_refusal(
    status: int, body: bytes
) -> None:
    """The secret of a client that was made is in no message (RFC 7591)."""
    http: Any = Stub((status, body))
    work = register(
        http,
        f"{HERE}/register",
        provider="acme",
        client_name="app",
        redirect_uri=f"{HERE}/callback",
        scopes=["read"],
        token_endpoint_auth_method="client_secret_basic",
    )
    got = read(lambda: asyncio.run(work), ConfigurationError, ProviderUnavailable)
    if got is not None:
        assert isinstance(got.client_id, str)
        assert SECRET not in repr(got)


KEY = ec.generate_private_key(ec.SECP256R1())
JWKS = {
    "keys": [
        {**ECAlgorithm.to_jwk(KEY.public_key(), as_dict=True), "kid": "1", "use": "sig"}
    ]
}
CLAIMS = {
    "iss": HERE,
    "aud": "app",
    "azp": "app",
    "sub": "42",
    "exp": NOW.timestamp() + 600,
    "iat": NOW.timestamp(),
    "nbf": NOW.timestamp(),
    "nonce": "n",
    "email": f"{SECRET}@example.com",
    "name": "Ann",
}


@st.composite
def id_tokens(draw: Any) -> str:
    """Return an ID token: of damaged claims, or itself damaged."""
    claims = draw(damaged(CLAIMS))
    header = draw(damaged({"kid": "1", "crit": []}, times=1))
    try:
        token = jwt.PyJWS().encode(json.dumps(claims).encode(), KEY, "ES256", header)
    except (TypeError, ValueError, jwt.PyJWTError):
        token = draw(st.text(max_size=40))
    at = draw(st.integers(0, len(token)))
    return draw(st.sampled_from([token, token, token[:at], token[at:] + token[:at]]))


@fuzz
@given(token=id_tokens(), keys=bodies(JWKS), status=answers, good=st.booleans())
def test_id_token_names_somebody_or_is_refused(
    token: str, keys: bytes, status: int, good: bool
) -> None:
    """No claim of a token that does not hold is told (Core section 3.1.3.7)."""
    document = (200, json.dumps(JWKS).encode()) if good else (status, keys)
    http: Any = Stub(document)
    work = identity_of(
        http,
        provider="acme",
        id_token=token,
        issuer=HERE,
        client_id="app",
        nonce="n",
        jwks_uri=f"{HERE}/jwks",
        now=NOW,
    )
    got = read(
        lambda: asyncio.run(work),
        *(TokenRequestError, ProviderUnavailable, ConfigurationError),
    )
    assert got is None or got.label


# --------------------------------------------------------------- browsers and headers

fields = st.dictionaries(st.text(max_size=6), st.text(max_size=10), max_size=4)
queries = st.one_of(
    st.binary(max_size=60),
    fields.map(lambda f: urlencode(f, errors="replace").encode()),
    st.sampled_from([b"code=a&code=b", b"state=%ff", b"a=%00", b"&" * 9000, b"=" * 60]),
)


@fuzz
@given(raw=queries)
def test_query_is_read_without_a_doubt_or_not_at_all(raw: bytes) -> None:
    """Nothing is there twice, nothing is cut or guessed."""
    got = parsed(raw)
    if got is not None:
        assert parsed(urlencode(got).encode()) == got or len(got) > 50
        assert not any("\0" in value for value in got.values())


@fuzz
@given(
    address=st.one_of(
        st.text(max_size=40),
        st.tuples(
            st.sampled_from(
                [HERE, "http://127.0.0.1:9:9", "http://[", "//x", HERE.upper()]
            ),
            st.sampled_from(
                ["/auth/acme/oauth2/callback", "/auth/a", "/", "", "/\ud800"]
            ),
            st.text(max_size=10) | queries.map(lambda q: q.decode("latin-1")),
        ).map(lambda parts: f"{parts[0]}{parts[1]}?state={SECRET}&code={parts[2]}"),
    )
)
def test_pasted_address_is_a_callback_of_ours_or_malformed(address: str) -> None:
    """What a person pastes is in no message."""
    got = read(lambda: callback_of(address, HERE), CallbackRefused)
    if got is not None:
        assert got["uid"]
        assert got["callback"] == ("acme", "oauth2")


@fuzz
@given(
    body=queries,
    kind=st.sampled_from(
        ["application/x-www-form-urlencoded", "text/plain", "", "\xff;"]
    ),
    length=st.sampled_from(["0", "5", "x", ""]),
    parts=st.integers(1, 4),
)
def test_form_is_read_or_not_at_all(
    body: bytes, kind: str, length: str, parts: int
) -> None:
    """A body may come in any pieces, under any type and length."""
    size = max(len(body) // parts, 1)
    pieces = [body[i : i + size] for i in range(0, len(body), size)] or [b""]
    messages = [
        {"type": "http.request", "body": piece, "more_body": piece is not pieces[-1]}
        for piece in pieces
    ]
    messages[-1]["more_body"] = False

    async def receive() -> Any:
        return messages.pop(0)

    headers = [(b"content-type", kind.encode()), (b"content-length", length.encode())]
    request = Request({"type": "http", "headers": headers}, receive)
    got = asyncio.run(form_of(request))
    assert got is None or all(isinstance(value, str) for value in got.values())


@fuzz
@given(
    cookie=st.one_of(
        st.text(max_size=80),
        st.lists(
            st.sampled_from(
                [
                    "__Host-pocket-auth=",
                    "x" * 43,
                    "y" * 42,
                    ";",
                    '"',
                    "=",
                    "__Host-pocket-auth-post=",
                ]
            ),
            max_size=8,
        ).map("".join),
    )
)
def test_cookie_is_well_formed_or_ignored(cookie: str) -> None:
    """A browser is known by a value that we could have given it, or not at all."""
    site = Site(url="https://app.example.com", public=True, confirm="code")
    header = cookie.encode("utf-8", "surrogatepass")
    request = Request({"type": "http", "headers": [(b"cookie", header)]})
    made = Visitors(site).mark(request)
    assert made is not None
    assert len(made) == 43
    assert set(made) <= {*string.ascii_letters, *string.digits, "_", "-"}


DATES = ["Mon, 01 Jan 0001 00:00:00 +2359", "Fri, 31 Dec 9999 23:59:59 -2359", "1 1 1"]


@fuzz
@example(value=b"Fri, 31 Dec 9999 23:59:59 -2359")
@given(
    value=st.one_of(
        st.text(max_size=30).map(lambda t: t.encode("utf-8", "replace")),
        st.datetimes(timezones=st.timezones()).map(
            lambda d: format_datetime(d).encode()
        ),
        st.sampled_from(
            [d.encode() for d in DATES] + [b"9" * 400, "²".encode(), b"-1", b"1e9"]
        ),
    )
)
def test_times_in_headers_are_read_or_ignored(value: bytes) -> None:
    """A provider's headers never make its answer unreadable (RFC 9110)."""
    headers = httpx.Headers([(b"retry-after", value), (b"date", value)])
    wait_s, date = _retry_after(headers), _date(headers)
    assert wait_s is None or 0 <= wait_s <= 3600
    assert date is None or date.tzinfo


# ------------------------------------------------------------ what operators write


@fuzz
@given(
    text=st.one_of(
        st.text(max_size=60),
        st.lists(
            st.sampled_from(
                [
                    new_key(),
                    new_key()[:-3],
                    "a:",
                    ":",
                    ",",
                    SECRET,
                    f"a:{SECRET}",
                    "\n",
                    "é",
                ]
            ),
            max_size=5,
        ).map(",".join),
    )
)
def test_key_text_is_keys_or_a_documented_refusal(text: str) -> None:
    """A malformed key is told without showing it."""
    read(lambda: KeyRing.parse(text), ConfigurationError)


RING = KeyRing.parse(new_key())
SEALED = RING.seal(b"plain", "session", "1")


@fuzz
@given(
    sealed=st.one_of(
        st.binary(max_size=60),
        st.tuples(st.integers(0, len(SEALED)), st.binary(max_size=3)).map(
            lambda change: SEALED[: change[0]] + change[1] + SEALED[change[0] + 1 :]
        ),
        st.integers(0, len(SEALED)).map(lambda end: SEALED[:end]),
    )
)
def test_sealed_bytes_open_as_they_were_or_not_at_all(sealed: bytes) -> None:
    """No change of an envelope gives another text, or another error."""
    got = read(lambda: RING.open(sealed, "session", "1"), CredentialUnreadable)
    assert got in {None, b"plain"}
    assert sealed == SEALED or got is None


ENTRIES = {
    vault.Session: {
        "context": {
            "type": "langchain_pocket_auth.OAuth2Context",
            "data": {"access_token": SECRET, "description": "d", "expires_at": None},
        },
        "scopes": ["read"],
        "obtained_at": "2026-01-01T00:00:00Z",
    },
    vault.Pointer: {
        "owner": ["user", "ann"],
        "provider": "acme",
        "profile": "default",
        "connection": "acme-oauth2",
    },
}


def test_pointer_to_an_owner_of_another_version_is_unreadable() -> None:
    """A kind of owner that is not known yet is no ValueError for whoever asks."""
    team = {**ENTRIES[vault.Pointer], "owner": ["team", "ann"]}
    with pytest.raises(CredentialUnreadable):
        opened(vault.Pointer, team)


def opened(kind: Any, content: Any) -> Any:
    """Return what is read of a record with that content."""
    key, store = ("user:ann", "name"), cast("Any", None)
    record = Record(1, RING.seal(json.dumps(content).encode(), *key, "1"))
    entry = vault.Vault(store, RING, lambda: NOW).unseal(kind, key, record).entry
    return entry.session_key() if kind is vault.Pointer else entry.auth_context()


@fuzz
@given(data=st.data(), kind=st.sampled_from(list(ENTRIES)))
def test_record_of_another_version_is_unreadable_and_says_so(
    data: st.DataObject, kind: Any
) -> None:
    """What was sealed by who knows what is read, or CredentialUnreadable."""
    content = data.draw(damaged(ENTRIES[kind]))
    got = read(lambda: opened(kind, content), CredentialUnreadable)
    assert got is None or SECRET not in repr(got)


@fuzz
@example(url=f"sqlite://host:{SECRET}")
@given(
    url=st.one_of(
        st.text(max_size=40),
        st.tuples(
            st.sampled_from(
                [
                    "sqlite",
                    "postgresql",
                    "redis",
                    "rediss",
                    "memory",
                    "postgresql+asyncpg",
                    "REDIS",
                    "x",
                ]
            ),
            st.sampled_from(["://", ":", ":///"]),
            st.sampled_from(
                [f"user:{SECRET}@", f":{SECRET}@", "", f"{SECRET}%zz@", "["]
            ),
            st.sampled_from(
                ["host", "[::1", "host:99999", "host:x", "", "/tmp/x.db", ":memory:"]
            ),
            st.sampled_from(
                [
                    "",
                    "/db",
                    "/0",
                    "/x",
                    f"?password={SECRET}",
                    "/db?sslmode=x&a=b",
                    "#f",
                ]
            ),
        ).map("".join),
    )
)
def test_storage_url_names_a_store_or_is_refused_without_its_password(url: str) -> None:
    """Nothing is opened, and no part that may be a password is told."""
    got = read(lambda: storage_from_url(url), ConfigurationError)
    assert got is None or (isinstance(got, StorageBackend) and SECRET not in repr(got))


@fuzz
@given(
    url=st.text(max_size=30)
    | st.sampled_from(
        [
            "http://[",
            "http://127.0.0.1:x",
            "http://127.0.0.1:99999",
            "//",
            "http://localhost:0",
            "http://a@127.0.0.1",
        ]
    )
)
def test_base_url_is_of_this_machine_or_refused(url: str) -> None:
    """A malformed address is a ConfigurationError."""
    read(lambda: check_base_url(url), ConfigurationError, secret=None)


PROVIDER = {
    "display_name": "Acme",
    "authorization_endpoint": "https://acme.example/authorize",
    "token_endpoint": "https://acme.example/token",
    "scope_separator": " ",
    "recommended_scopes": ["read"],
    "api_headers": {"Authorization": "Bearer {token}"},
    "variables": {"tenant": {"pattern": "[a-z]+", "default": "common"}},
    "methods": ["oauth2"],
    "scope_aliases": {"r": "read"},
    "docs": "https://acme.example/docs",
}


@fuzz
@given(
    row=damaged(PROVIDER),
    broken=st.sampled_from(["", "", "", "\n[acme", '\nx = "', "\n\0"]),
)
def test_row_of_a_file_is_a_provider_or_a_documented_refusal(
    row: Any, broken: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The text of the refusal names the file; nothing else comes out."""
    path = _file(tmp_path_factory, _toml({"acme": row}) + broken)
    got = read(lambda: read_providers(path), ConfigurationError, secret=None)
    assert got is None or all(isinstance(each, Provider) for each in got)


SETTINGS = {
    "keys": SECRET,
    "storage": f"redis://:{SECRET}@host/0",
    "base_url": "http://127.0.0.1:1",
    "clients": {"acme": {"client_id": "a", "client_secret": SECRET}},
}


@fuzz
@given(
    wanted=damaged(SETTINGS),
    broken=st.sampled_from(["", "", "", f"\nkeys = {SECRET}", "\n["]),
)
def test_settings_file_is_read_or_refused_without_its_secrets(
    wanted: Any, broken: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A settings file holds secrets, so no value of it is told."""
    path = _file(tmp_path_factory, _toml(wanted) + broken)
    read(lambda: read_settings(path), ConfigurationError)


@fuzz
@given(value=anything | st.tuples(odd, odd) | st.tuples(odd, odd, odd))
def test_client_is_registered_or_refused_without_its_secret(value: Any) -> None:
    """In whatever form an app's registration is written."""
    got = read(lambda: client_of("acme", value), ConfigurationError)
    assert (
        got is None
        or got.client_secret is None
        or isinstance(got.client_secret, SecretStr)
    )


def _file(folder: pytest.TempPathFactory, text: str) -> Path:
    path = folder.getbasetemp() / "written.toml"
    path.write_text(text, encoding="utf-8", errors="replace")
    return path


def _toml(value: Any) -> str:
    """Write a document as TOML, as far as TOML can say it."""
    if not isinstance(value, dict):
        return f"value = {_toml_value(value)}"
    return "\n".join(f"{json.dumps(k)} = {_toml_value(v)}" for k, v in value.items())


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return (
            "{"
            + ", ".join(f"{json.dumps(k)} = {_toml_value(v)}" for k, v in value.items())
            + "}"
        )
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, float):
        return str(value)
    return '"nothing"' if value is None else json.dumps(value)


def test_damaged_rows_are_toml_most_of_the_time() -> None:
    """So what was found above was found in rows, not in their brackets."""
    assert tomllib.loads(_toml({"acme": PROVIDER}))["acme"] == PROVIDER


# ----------------------------------------------------------------- agents and their apps

PAUSE = {
    "type": "pocket_auth",
    "version": 1,
    "message": "Connect Acme.",
    "requests": [
        {
            "key": "k1",
            "mode": "url",
            "url": f"{HERE}/connect/t",
            "message": "Connect Acme.",
            "provider": "acme",
            "handler": "acme-oauth2",
            "profile": "default",
            "state": "NO_SESSION",
            "reason": "Acme is not connected yet",
            "scopes": ["read"],
            "missing_scopes": ["read"],
            "account": None,
            "tools": ["t"],
            "tool_call_ids": ["c1"],
            "expires_at": "2026-01-01T00:00:00+00:00",
        }
    ],
}
INTERRUPT = {"id": "i1", "value": PAUSE}
SOURCES = [
    PAUSE,
    INTERRUPT,
    {"__interrupt__": [INTERRUPT], "messages": []},
    {"tasks": [{"interrupts": [INTERRUPT]}], "values": {}},
    {"interrupts": {"task": [INTERRUPT]}},
    {"type": "updates", "ns": [], "data": {"__interrupt__": [INTERRUPT]}},
]


@fuzz
@example(source={"id": None, "value": PAUSE})
@example(source={**PAUSE, "requests": [{"key": "k1"}, 1]})
@given(source=st.sampled_from(SOURCES).flatmap(damaged) | anything)
def test_paused_run_is_read_from_whatever_describes_it(source: Any) -> None:
    """What is no pause of ours is nothing pending; `resume` says so."""
    found = pending_authorizations(source)
    assert all(isinstance(pending.key, str) for pending in found)
    command = read(lambda: resume(source), ValueError, secret=None)
    if command is not None:
        json.dumps(command.resume)


RESUMED = {"responses": {"k1": {"action": "decline", "content": {"code": "ABCD-EFGH"}}}}


@fuzz
@example(values=[{"responses": {"k": {"action": [], "content": {"code": "A"}}}}])
@given(values=st.lists(damaged(RESUMED) | anything, max_size=3))
def test_resume_value_declines_or_means_look_again(values: list[Any]) -> None:
    """It declines what it names, and nothing else is in it."""
    named = {
        key
        for value in values
        if isinstance(value, Mapping) and isinstance(value.get("responses"), Mapping)
        for key in value["responses"]
    }
    assert declined_keys(values) <= named
    assert codes(values).keys() <= named


CONTEXT = Annotated[AuthContext, InjectedAuth("acme")]


@fuzz
@example(hint="x y", wrap=[])
@given(
    hint=st.sampled_from(
        [
            AuthContext,
            InjectedAuth,
            InjectedAuth("acme"),
            CONTEXT,
            "AuthContext",
            "x y",
            str,
        ]
    ),
    wrap=st.lists(
        st.sampled_from(["list", "optional", "annotated", "dict", "twice"]), max_size=3
    ),
)
def test_annotation_is_taken_or_refused_and_never_shown_to_the_model(
    hint: Any, wrap: list[str]
) -> None:
    """A TypeError with the right line, or a requirement, or nothing of ours."""
    for how in () if isinstance(hint, str) else wrap:
        hint = {
            "list": lambda h: list[h],
            "optional": lambda h: h if isinstance(h, InjectedAuth) else Optional[h],  # noqa: UP045
            "annotated": lambda h: Annotated[h, "note"],
            "dict": lambda h: dict[str, h],
            "twice": lambda h: Annotated[h, InjectedAuth("acme"), InjectedAuth("zeta")],
        }[how](hint)

    def body(acme: Any) -> str:
        return "done"

    tool = StructuredTool.from_function(body, description="Do it.")
    body.__annotations__["acme"] = hint
    needs = read(lambda: needs_of(tool), TypeError, secret=None)
    if needs is not None and needs.parameters:
        assert needs.parameters["acme"].provider in {"acme", "zeta"}


@fuzz
@given(provider=odd, scopes=anything, profile=odd)
def test_mark_is_made_or_refused(provider: Any, scopes: Any, profile: Any) -> None:
    """What an author writes wrong is a TypeError or a ValueError at that line."""
    documented = (TypeError, ValueError, ConfigurationError)
    read(
        lambda: InjectedAuth(provider, scopes=scopes, profile=profile),
        *documented,
        secret=None,
    )
