"""The testing kit is strict where it promises to be, and finds what it looks for."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import secrets
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, urlencode, urlsplit

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import tool
from pydantic import BaseModel, SecretStr
from pydantic import Field as ModelField

import langchain_pocket_auth.testing as kit
from langchain_pocket_auth.testing import (
    AuthorizationServer,
    Browser,
    FlowStuck,
    LeakWatch,
    assert_no_leak,
)

CALLBACK = "http://127.0.0.1:9/callback"
SECRET = "app-secret-of-the-test"
TIMEOUT_S = 5.0


class App:
    """A client of the server, as small as it can be."""

    def __init__(self, server: AuthorizationServer) -> None:
        self.server = server
        self.verifier = secrets.token_urlsafe(48)
        self.http = httpx.Client(timeout=TIMEOUT_S)

    def url(self, **changes: str | None) -> str:
        digest = hashlib.sha256(self.verifier.encode()).digest()
        query = {
            "response_type": "code",
            "client_id": "app",
            "redirect_uri": CALLBACK,
            "scope": "repo issues:read",
            "state": "the-state",
            "code_challenge": base64.urlsafe_b64encode(digest).rstrip(b"=").decode(),
            "code_challenge_method": "S256",
        } | changes
        query = {name: value for name, value in query.items() if value is not None}
        return f"{self.server.authorization_endpoint}?{urlencode(query)}"

    def callback(
        self, *, approve: bool = True, **changes: str | None
    ) -> dict[str, str]:
        with Browser() as browser:
            url = browser.authorize(self.url(**changes), approve=approve)
        return {k: v[0] for k, v in parse_qs(urlsplit(url).query).items()}

    def post(self, endpoint: str | None = None, **form: str) -> httpx.Response:
        return self.http.post(
            endpoint or self.server.token_endpoint, data=form, auth=("app", SECRET)
        )

    def exchange(self, code: str, **changes: str) -> httpx.Response:
        form = {"code": code, "redirect_uri": CALLBACK, "code_verifier": self.verifier}
        return self.post(grant_type="authorization_code", **form | changes)

    def refresh(self, refresh_token: str, **form: str) -> httpx.Response:
        return self.post(
            grant_type="refresh_token", refresh_token=refresh_token, **form
        )

    def tokens(self, **changes: str | None) -> dict[str, Any]:
        return self.exchange(self.callback(**changes)["code"]).json()

    def api(self, access_token: str, path: str = "/me") -> httpx.Response:
        headers = {"Authorization": f"Bearer {access_token}"}
        return self.http.get(self.server.api + path, headers=headers)


@pytest.fixture
def server() -> Iterator[AuthorizationServer]:
    with AuthorizationServer() as server:
        server.register(client_id="app", client_secret=SECRET, redirect_uris=[CALLBACK])
        yield server


@pytest.fixture
def app(server: AuthorizationServer) -> Iterator[App]:
    app = App(server)
    yield app
    app.http.close()


# The server is strict


@pytest.mark.parametrize(
    "changes",
    [
        {"code_challenge": None, "code_challenge_method": None},
        {"code_challenge_method": "plain"},
        {"code_challenge_method": None},
        {"code_challenge": "short"},
    ],
)
def test_request_without_s256_is_refused(app: App, changes: dict[str, str]) -> None:
    """PKCE is required of every client, and `plain` is no PKCE."""
    answer = app.callback(**changes)
    assert answer["error"] == "invalid_request"
    assert answer["state"] == "the-state"
    assert answer["iss"] == app.server.issuer
    assert app.server.issued_codes == []


@pytest.mark.parametrize(
    "redirect_uri",
    [
        "http://127.0.0.1:9/callback/",
        "http://127.0.0.1:9/callback?x=1",
        "http://127.0.0.1:10/callback",
        "http://evil.example/callback",
        None,
    ],
)
def test_other_redirect_uri_is_not_redirected_to(
    app: App, redirect_uri: str | None
) -> None:
    """A confidential client's redirect URI is compared exactly, port included."""
    page = Browser().open(app.url(redirect_uri=redirect_uri))
    assert page.status_code == 400
    assert "Location" not in page.headers


def test_public_client_may_use_any_loopback_port(app: App) -> None:
    """RFC 8252 section 7.3: the port is free, the path is not."""
    app.server.register(client_id="app", redirect_uris=["http://127.0.0.1/callback"])
    assert "code" in app.callback()
    other = app.url(redirect_uri="http://127.0.0.1:9/elsewhere")
    assert Browser().open(other).status_code == 400
    https = app.url(redirect_uri="https://127.0.0.1/callback")
    assert Browser().open(https).status_code == 400


def test_repeated_parameter_is_refused(app: App) -> None:
    """RFC 6749 section 3.1; nobody is redirected on such a request."""
    page = Browser().open(app.url() + "&state=second")
    assert page.status_code == 400
    assert "Location" not in page.headers


def test_unknown_client_and_unknown_scope_are_refused(app: App) -> None:
    """What was not registered is not given."""
    assert Browser().open(app.url(client_id="<b>")).status_code == 400
    app.server.register(
        client_id="app",
        client_secret=SECRET,
        redirect_uris=[CALLBACK],
        scopes=["repo"],
    )
    assert app.callback()["error"] == "invalid_scope"
    assert app.callback(response_type="token")["error"] == "unsupported_response_type"
    assert app.exchange(app.callback(scope=None)["code"]).json()["scope"] == "repo"


@pytest.mark.parametrize(
    "changes",
    [
        {"code_verifier": "wrong" * 10},
        {"redirect_uri": CALLBACK + "/"},
        {"code": "made-up"},
    ],
)
def test_wrong_exchange_is_refused(app: App, changes: dict[str, str]) -> None:
    """Verifier, redirect URI and code all have to be the right ones."""
    code = app.callback()["code"]
    answer = app.exchange(**{"code": code} | changes)
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_grant")
    assert app.server.token_errors == {"invalid_grant": 1}
    assert app.server.issued_access_tokens == []


def test_missing_verifier_is_refused(app: App) -> None:
    """The challenge of the request demands a verifier."""
    answer = app.exchange(app.callback()["code"], code_verifier="")
    assert answer.json()["error"] == "invalid_request"


@pytest.mark.parametrize(
    ("auth", "form"),
    [
        (("app", "wrong"), {}),
        (("unknown", SECRET), {}),
        (None, {"client_id": "app", "client_secret": SECRET}),
        (None, {"client_id": "app"}),
        (None, {}),
    ],
)
def test_client_has_to_authenticate_its_own_way(
    app: App, auth: tuple[str, str] | None, form: dict[str, str]
) -> None:
    """A wrong secret, and the right one sent by another method, are refused."""
    form |= {"grant_type": "authorization_code", "code": app.callback()["code"]}
    answer = httpx.post(app.server.token_endpoint, data=form, auth=auth)
    assert answer.json()["error"] == "invalid_client"
    assert app.server.token_errors == {"invalid_client": 1}


def test_expired_code_is_refused(app: App) -> None:
    """A code lives `code_ttl_s`, also when that changes at run time."""
    app.server.code_ttl_s = 0
    assert app.exchange(app.callback()["code"]).json()["error"] == "invalid_grant"


def test_code_replay_revokes_what_it_gave(app: App) -> None:
    """RFC 6749 section 4.1.2."""
    code = app.callback()["code"]
    tokens = app.exchange(code).json()
    assert app.exchange(code).json()["error"] == "invalid_grant"
    assert app.api(tokens["access_token"]).status_code == 401
    assert app.refresh(tokens["refresh_token"]).json()["error"] == "invalid_grant"
    assert (app.server.code_replays, app.server.revoked_families) == (1, 1)


def test_refresh_rotates_and_reuse_kills_the_family(app: App) -> None:
    """RFC 9700 section 4.14.2."""
    first = app.tokens()
    second = app.refresh(first["refresh_token"]).json()
    assert second["refresh_token"] != first["refresh_token"]
    assert app.api(second["access_token"]).status_code == 200
    assert app.refresh(first["refresh_token"]).json()["error"] == "invalid_grant"
    assert app.refresh(second["refresh_token"]).json()["error"] == "invalid_grant"
    assert app.api(second["access_token"]).status_code == 401
    assert (app.server.refresh_token_reuses, app.server.revoked_families) == (1, 1)
    assert app.server.token_requests == {"authorization_code": 1, "refresh_token": 1}
    assert app.server.issued_refresh_tokens == [
        first["refresh_token"],
        second["refresh_token"],
    ]


def test_of_eight_threads_with_one_refresh_token_one_wins(app: App) -> None:
    """Looking and marking are one step."""
    token = app.tokens()["refresh_token"]
    barrier = threading.Barrier(8)

    def refresh(_: int) -> int:
        barrier.wait(TIMEOUT_S)
        return app.refresh(token).status_code

    with ThreadPoolExecutor(8) as threads:
        statuses = sorted(threads.map(refresh, range(8)))
    assert statuses == [200] + [400] * 7
    assert app.server.refresh_token_reuses == 7
    assert app.server.revoked_families == 1


def test_grace_forgives_reuse_for_a_while(app: App) -> None:
    """Within `reuse_grace_s` a lost answer can be asked for again."""
    app.server.reuse_grace_s = 60
    token = app.tokens()["refresh_token"]
    assert app.refresh(token).status_code == app.refresh(token).status_code == 200
    app.server.reuse_grace_s = 0
    assert app.refresh(token).status_code == 400


def test_server_that_does_not_rotate_keeps_the_refresh_token(app: App) -> None:
    """`rotate=False` answers no new refresh token, and the old one stays good."""
    app.server.rotate = False
    token = app.tokens()["refresh_token"]
    for _ in range(2):
        assert "refresh_token" not in app.refresh(token).json()


def test_refused_refresh_does_not_use_the_token_up(app: App) -> None:
    """Too many scopes or another client's authentication burn nothing."""
    token = app.tokens(scope="repo")["refresh_token"]
    assert app.refresh(token, scope="repo x").json()["error"] == "invalid_scope"
    app.server.register(client_id="other", client_secret=SECRET)
    form = {"grant_type": "refresh_token", "refresh_token": token}
    foreign = httpx.post(app.server.token_endpoint, data=form, auth=("other", SECRET))
    assert foreign.json()["error"] == "invalid_grant"
    assert app.refresh(token).status_code == 200


def test_narrower_refresh_does_not_narrow_the_next(app: App) -> None:
    """RFC 6749 section 6: the refresh token keeps the scope of the grant."""
    token = app.tokens()["refresh_token"]
    narrow = app.refresh(token, scope="repo").json()
    assert narrow["scope"] == "repo"
    assert app.refresh(narrow["refresh_token"]).json()["scope"] == "repo issues:read"


def test_expired_refresh_token_is_refused(app: App) -> None:
    """A refresh token lives `refresh_token_ttl_s`."""
    app.server.refresh_token_ttl_s = 0
    token = app.tokens()["refresh_token"]
    assert app.refresh(token).json()["error"] == "invalid_grant"


def test_revoked_refresh_token_takes_the_family_with_it(app: App) -> None:
    """RFC 7009 section 2.1; introspection says so."""
    tokens = app.tokens()
    state = app.post(app.server.introspection_endpoint, token=tokens["access_token"])
    assert state.json()["active"]
    assert state.json()["sub"] == "alice"
    answer = app.post(app.server.revocation_endpoint, token=tokens["refresh_token"])
    assert answer.status_code == 200
    assert app.api(tokens["access_token"]).status_code == 401
    for token in (tokens["access_token"], tokens["refresh_token"], "unknown"):
        state = app.post(app.server.introspection_endpoint, token=token)
        assert state.json() == {"active": False}
    assert app.server.revocations == 1


def test_revoked_access_token_leaves_the_family(app: App) -> None:
    """Only a refresh token revokes the grant."""
    tokens = app.tokens()
    app.post(app.server.revocation_endpoint, token=tokens["access_token"])
    assert app.api(tokens["access_token"]).status_code == 401
    assert app.refresh(tokens["refresh_token"]).status_code == 200


def test_unauthenticated_revocation_is_refused(app: App) -> None:
    """Nobody revokes for a client but the client."""
    token = app.tokens()["refresh_token"]
    answer = httpx.post(app.server.revocation_endpoint, data={"token": token})
    assert answer.json()["error"] == "invalid_client"
    assert app.server.revocations == 0


def test_admin_revokes_all_grants_of_a_person(app: App) -> None:
    """Refreshing answers `invalid_grant` afterwards; others are not concerned."""
    tokens = app.tokens()
    assert app.server.revoke_grants("bob") == 0
    assert app.server.revoke_grants("alice") == 1
    assert app.refresh(tokens["refresh_token"]).json()["error"] == "invalid_grant"
    code = app.callback()["code"]
    app.server.revoke_grants("alice")
    assert app.exchange(code).json()["error"] == "invalid_grant"


# What the person and the options decide


def test_denial_is_answered_with_state_and_issuer(app: App) -> None:
    """`access_denied` goes to the client like any answer."""
    answer = app.callback(approve=False)
    assert answer["error"] == "access_denied"
    assert (answer["state"], answer["iss"]) == ("the-state", app.server.issuer)
    assert (app.server.authorizations, app.server.denials) == (0, 1)


@pytest.mark.parametrize("approve", [True, False])
def test_issuer_is_right_wrong_or_omitted(app: App, *, approve: bool) -> None:
    """RFC 9207, as the test wants it."""
    assert app.callback(approve=approve)["iss"] == app.server.issuer
    app.server.iss = "http://evil.example"
    assert app.callback(approve=approve)["iss"] == "http://evil.example"
    app.server.iss = "omitted"
    assert "iss" not in app.callback(approve=approve)


def test_withheld_scope_is_not_granted(app: App) -> None:
    """The person unticks a scope, and the answer tells it."""
    app.server.withhold = {"repo"}
    tokens = app.tokens()
    assert tokens["scope"] == "issues:read"
    refused = app.api(tokens["access_token"], "/me?require=repo")
    assert refused.status_code == 403


def test_answers_leave_out_what_the_options_say(app: App) -> None:
    """Neither `scope` nor `refresh_token`, and the issued ones stay good."""
    before = app.tokens()
    app.server.omit_scope = app.server.omit_refresh_token = True
    assert set(app.tokens()) == {"access_token", "token_type", "expires_in"}
    for _ in range(2):
        assert "refresh_token" not in app.refresh(before["refresh_token"]).json()


def test_metadata_describes_the_server(app: App) -> None:
    """RFC 8414; a fault can make it lie."""
    well_known = f"{app.server.issuer}/.well-known/oauth-authorization-server"
    assert httpx.get(well_known).json() == app.server.metadata
    app.server.iss = "omitted"
    promise = "authorization_response_iss_parameter_supported"
    assert httpx.get(well_known).json()[promise] is False
    path = "/.well-known/oauth-authorization-server"
    app.server.fault("mutate", path=path, set={promise: True})
    assert httpx.get(well_known).json()[promise] is True


# The server is an OpenID provider


def claims_of(id_token: str) -> dict[str, Any]:
    """Return what an ID token says, unproved."""
    return jwt.decode(id_token, options={"verify_signature": False})


def test_scope_openid_is_answered_with_an_id_token(app: App) -> None:
    """It is signed with the published key, and for this request only."""
    answer = app.tokens(scope="openid email profile", nonce="n-1")
    keys = jwt.PyJWKSet.from_dict(httpx.get(app.server.jwks_uri).json())
    claims = jwt.decode(
        answer["id_token"],
        keys["1"],
        issuer=app.server.issuer,
        audience="app",
        options={"require": ["exp", "iat", "sub"]},
    )
    assert (claims["sub"], claims["nonce"]) == ("alice", "n-1")
    assert (claims["email"], claims["name"]) == ("alice@users.test", "Alice")
    assert app.server.issued_id_tokens == [answer["id_token"]]
    refreshed = claims_of(app.refresh(answer["refresh_token"]).json()["id_token"])
    assert refreshed["sub"] == "alice"
    assert "nonce" not in refreshed


def test_id_token_says_only_what_was_asked_for(app: App) -> None:
    """No openid, no ID token; no email, no e-mail address."""
    assert "id_token" not in app.tokens(scope="email", nonce="n")
    claims = claims_of(app.tokens(scope="openid")["id_token"])
    assert claims.keys() == {"iss", "sub", "aud", "iat", "exp"}


def test_id_token_lies_as_the_options_say(app: App) -> None:
    """Claims are replaced or left out; the rest stays right."""
    app.server.id_token_claims = {"iss": "https://evil.test", "sub": None}
    app.server.id_token_ttl_s = -5
    claims = claims_of(app.tokens(scope="openid")["id_token"])
    assert claims["iss"] == "https://evil.test"
    assert "sub" not in claims
    assert claims["exp"] < time.time()
    assert claims["aud"] == "app"


@pytest.mark.parametrize(
    ("key", "algorithm"), [("other", "RS256"), ("none", "none"), ("hs256", "HS256")]
)
def test_id_token_is_forged_as_the_options_say(
    app: App, key: Any, algorithm: str
) -> None:
    """The published key does not check it, although it says so."""
    app.server.id_token_key = key
    token = app.tokens(scope="openid")["id_token"]
    header = jwt.get_unverified_header(token)
    assert (header["alg"], header["kid"]) == (algorithm, "1")
    keys = jwt.PyJWKSet.from_dict(httpx.get(app.server.jwks_uri).json())
    with pytest.raises(jwt.InvalidTokenError):
        jwt.decode(token, keys["1"], audience="app")


@pytest.mark.parametrize("algorithm", ["PS512", "ES256", "ES384", "ES512", "EdDSA"])
def test_signing_key_is_of_the_algorithm_and_rotates(app: App, algorithm: str) -> None:
    """One key is published at a time, by its name."""
    app.server.id_token_algorithm = algorithm
    for app.server.signing_key in ("1", "2"):
        answer = app.tokens(scope="openid")
        [key] = httpx.get(app.server.jwks_uri).json()["keys"]
        assert (key["kid"], key["alg"]) == (app.server.signing_key, algorithm)
        assert jwt.decode(answer["id_token"], jwt.PyJWK(key), audience="app")
    assert app.server.document_reads == {"/jwks": 2}


def test_issuer_may_have_a_path() -> None:
    """Its metadata is at the places of RFC 8414 and OpenID, and nowhere else."""
    with AuthorizationServer(issuer_path="/t/1") as server:
        assert server.issuer == f"{server.origin}/t/1"
        places = {
            "/.well-known/oauth-authorization-server/t/1": 200,
            "/.well-known/openid-configuration/t/1": 200,
            "/t/1/.well-known/openid-configuration": 200,
            "/.well-known/openid-configuration": 404,
            "/t/2/.well-known/openid-configuration": 404,
            "/.well-known/other/t/1": 404,
        }
        for path, status in places.items():
            answer = httpx.get(server.origin + path)
            assert answer.status_code == status
            assert (answer.json() == server.metadata) is (status == 200)
        assert server.metadata["token_endpoint"] == f"{server.origin}/token"


# The server registers clients


def register_app(app: App, **metadata: Any) -> httpx.Response:
    """Send a registration request (RFC 7591)."""
    return app.http.post(
        app.server.registration_endpoint, json={"redirect_uris": [CALLBACK]} | metadata
    )


def test_client_registers_itself(app: App) -> None:
    """It may do what it registered for, with the secret that it got."""
    answer = register_app(
        app,
        application_type="native",
        scope="repo",
        grant_types=["authorization_code", "refresh_token"],
    )
    assert answer.status_code == 201
    made = answer.json()
    assert made["client_secret_expires_at"] == 0
    assert app.server.registrations == 1
    code = app.callback(client_id=made["client_id"], scope="repo")["code"]
    pair = (made["client_id"], made["client_secret"])
    form = {
        "grant_type": "authorization_code",
        "code": code,
        "redirect_uri": CALLBACK,
        "code_verifier": app.verifier,
    }
    tokens = app.http.post(app.server.token_endpoint, data=form, auth=pair).json()
    assert tokens["scope"] == "repo"
    refused = app.callback(client_id=made["client_id"], scope="repo gist")
    assert refused["error"] == "invalid_scope"
    form = {"grant_type": "client_credentials"}
    answer = app.http.post(app.server.token_endpoint, data=form, auth=pair)
    assert answer.json()["error"] == "unauthorized_client"


def test_public_client_gets_no_secret(app: App) -> None:
    """It asked for none."""
    made = register_app(
        app, application_type="native", token_endpoint_auth_method="none"
    ).json()
    assert "client_secret" not in made
    assert app.server.clients[made["client_id"]].token_endpoint_auth_method == "none"


def test_registered_secret_expires(app: App) -> None:
    """After its time the client is not accepted any more."""
    app.server.client_secret_ttl_s = 60
    made = register_app(
        app, application_type="native", grant_types=["client_credentials"]
    ).json()
    form = {"grant_type": "client_credentials"}
    pair = (made["client_id"], made["client_secret"])
    answer = app.http.post(app.server.token_endpoint, data=form, auth=pair)
    assert answer.status_code == 200
    app.server.clock = lambda: time.time() + 61
    answer = app.http.post(app.server.token_endpoint, data=form, auth=pair)
    assert answer.json()["error"] == "invalid_client"


@pytest.mark.parametrize(
    ("metadata", "error"),
    [
        ({"application_type": "web"}, "invalid_redirect_uri"),
        ({"application_type": "native", "redirect_uris": []}, "invalid_redirect_uri"),
        (
            {"application_type": "native", "redirect_uris": ["https://app.test/c"]},
            "invalid_redirect_uri",
        ),
        ({"redirect_uris": ["http://app.test/c"]}, "invalid_redirect_uri"),
        ({"redirect_uris": ["nowhere"]}, "invalid_client_metadata"),
        (
            {
                "application_type": "native",
                "token_endpoint_auth_method": "private_key_jwt",
            },
            "invalid_client_metadata",
        ),
    ],
)
def test_client_that_does_not_fit_is_not_registered(
    app: App, metadata: dict[str, Any], error: str
) -> None:
    """Web apps are at https addresses elsewhere, native ones on this machine."""
    answer = register_app(app, **metadata)
    assert (answer.status_code, answer.json()["error"]) == (400, error)
    assert app.server.registrations == 0


# The server knows devices

DEVICE = "urn:ietf:params:oauth:grant-type:device_code"


def ask_device(app: App, **form: str) -> dict[str, Any]:
    """Ask for the two codes."""
    form = {"scope": "openid repo"} | form
    answer = app.post(app.server.device_authorization_endpoint, **form)
    return answer.json()


def poll(app: App, codes: dict[str, Any]) -> dict[str, Any]:
    """Ask whether the person has decided."""
    return app.post(grant_type=DEVICE, device_code=codes["device_code"]).json()


def test_device_gets_a_token_when_its_person_agrees(app: App) -> None:
    """The person types the code in any way, signs in and agrees; once."""
    codes = ask_device(app)
    assert (codes["interval"], codes["expires_in"]) == (5, 600)
    assert poll(app, codes)["error"] == "authorization_pending"
    page = Browser().approve_device(
        codes["verification_uri"], f" {codes['user_code'].lower()} "
    )
    assert "go back to your device" in page.text
    answer = poll(app, codes)
    assert answer["scope"] == "openid repo"
    assert claims_of(answer["id_token"])["sub"] == "alice"
    assert app.refresh(answer["refresh_token"]).status_code == 200
    assert poll(app, codes)["error"] == "invalid_grant"
    assert app.server.device_authorizations == app.server.authorizations == 1
    assert app.server.token_requests[DEVICE] == 1


def test_device_hears_that_its_person_refuses(app: App) -> None:
    """The link with the code in it needs no typing."""
    codes = ask_device(app)
    Browser().approve_device(codes["verification_uri_complete"], approve=False)
    assert poll(app, codes)["error"] == "access_denied"
    assert app.server.denials == 1
    page = Browser().approve_device(codes["verification_uri_complete"])
    assert page.status_code == 404


def test_device_that_asks_too_often_has_to_slow_down(app: App) -> None:
    """Each early poll adds 5 s to the interval, for good (RFC 8628 section 3.5)."""
    now = time.time()
    app.server.clock = lambda: now
    codes = ask_device(app)
    heard = []
    for waited in (0, 4, 10, 9, 15):
        now += waited
        heard.append(poll(app, codes)["error"].removeprefix("authorization_"))
    assert heard == ["pending", "slow_down", "pending", "slow_down", "pending"]


def test_code_of_a_device_expires(app: App) -> None:
    """Neither the device nor the person can use it any more."""
    app.server.device_code_ttl_s = 30
    codes = ask_device(app)
    app.server.clock = lambda: time.time() + 31
    assert poll(app, codes)["error"] == "expired_token"
    page = Browser().approve_device(codes["verification_uri_complete"])
    assert page.status_code == 404


def test_device_of_another_client_gets_nothing(app: App) -> None:
    """A device code is bound to its client, and a client to its scopes."""
    app.server.register(client_id="app", client_secret=SECRET, scopes=["repo"])
    assert ask_device(app, scope="gist")["error"] == "invalid_scope"
    codes = ask_device(app, scope="")
    app.server.register(client_id="tv")
    form = {"client_id": "tv", "device_code": codes["device_code"]}
    answer = app.http.post(
        app.server.token_endpoint, data={"grant_type": DEVICE} | form
    )
    assert answer.json()["error"] == "unauthorized_client"
    made_up = app.post(grant_type=DEVICE, device_code="made-up").json()
    assert made_up["error"] == "invalid_grant"


def test_device_page_is_good_for_one_answer(app: App) -> None:
    """A decision needs the page it was made on, and a code that somebody waits with."""
    codes = ask_device(app)
    with Browser() as browser:
        browser.approve_device(codes["verification_uri"], "WRONG")
        posted = browser._http.post(codes["verification_uri_complete"])
        assert posted.status_code == 403
        asked = browser.open(codes["verification_uri_complete"])
        csrf = asked.text.partition('name="csrf" value="')[2].partition('"')[0]
        app.server.clock = lambda: time.time() + 3600
        form = {"csrf": csrf, "decision": "approve"}
        late = browser._http.post(codes["verification_uri_complete"], data=form)
        assert late.status_code == 404
    assert app.server.authorizations == 0


# The server knows apps that act for themselves


def test_app_acts_for_itself(app: App) -> None:
    """Client credentials give a token with the scopes asked for, and no refresh token."""
    answer = app.post(grant_type="client_credentials", scope="repo").json()
    assert answer.keys() == {"access_token", "token_type", "expires_in", "scope"}
    me = app.api(answer["access_token"]).json()
    assert (me["sub"], me["scope"]) == ("app", "repo")
    app.server.register(client_id="app", client_secret=SECRET, scopes=["repo"])
    answer = app.post(grant_type="client_credentials", scope="gist").json()
    assert answer["error"] == "invalid_scope"
    app.server.register(client_id="app")
    form = {"grant_type": "client_credentials", "client_id": "app"}
    answer = app.http.post(app.server.token_endpoint, data=form).json()
    assert answer["error"] == "invalid_client"


KEY = ec.generate_private_key(ec.SECP256R1())
PUBLIC_KEY = KEY.public_key().public_bytes(
    Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
)


def assert_as_robot(app: App, **changes: Any) -> dict[str, Any]:
    """Send an assertion (RFC 7523)."""
    app.server.register(
        client_id="robot", public_key=PUBLIC_KEY.decode(), scopes=["repo", "gist"]
    )
    now = int(time.time())
    key = changes.pop("key", KEY)
    form = changes.pop("form", {})
    claims = {
        "iss": "robot",
        "sub": "alice",
        "aud": app.server.token_endpoint,
        "iat": now,
        "exp": now + 300,
        "scope": "repo",
    } | changes
    claims = {name: value for name, value in claims.items() if value is not None}
    form = {
        "grant_type": "urn:ietf:params:oauth:grant-type:jwt-bearer",
        "assertion": jwt.encode(claims, key, "ES256"),
    } | form
    return app.http.post(app.server.token_endpoint, data=form).json()


def test_app_acts_for_whom_its_assertion_names(app: App) -> None:
    """Without a refresh token; without a subject for itself."""
    answer = assert_as_robot(app)
    assert answer.keys() == {"access_token", "token_type", "expires_in", "scope"}
    me = app.api(answer["access_token"]).json()
    assert (me["sub"], me["scope"]) == ("alice", "repo")
    answer = assert_as_robot(
        app, sub=None, aud=app.server.issuer, form={"scope": "gist"}
    )
    me = app.api(answer["access_token"]).json()
    assert (me["sub"], me["scope"]) == ("robot", "gist")


@pytest.mark.parametrize(
    "changes",
    [
        {"iss": "app"},
        {"iss": "unknown"},
        {"aud": "https://evil.test"},
        {"aud": None},
        {"exp": 1},
        {"exp": None},
        {"exp": int(time.time()) + 9000},
        {"iat": int(time.time()) + 9000, "exp": int(time.time()) + 9300},
        {"iat": None},
        {"iat": "now"},
        {"key": ec.generate_private_key(ec.SECP256R1())},
        {"form": {"assertion": "no.such.thing"}},
    ],
)
def test_wrong_assertion_is_refused(app: App, changes: dict[str, Any]) -> None:
    """Issuer, audience, times and signature have to be right."""
    assert assert_as_robot(app, **changes)["error"] == "invalid_grant"
    assert app.server.issued_access_tokens == []


def test_assertion_is_held_to_the_scopes_of_its_client(app: App) -> None:
    """An app asks for what it was registered for."""
    assert assert_as_robot(app, scope="admin")["error"] == "invalid_scope"
    assert assert_as_robot(app, form={"assertion": ""})["error"] == "invalid_request"


# The protected API


def test_api_answers_with_a_token(app: App) -> None:
    """Who it is, what it may, and two issues."""
    token = app.tokens()["access_token"]
    me = app.api(token, "/me").json()
    assert me == {"sub": "alice", "scope": "repo issues:read", "path": "me"}
    issues = app.api(token, "/issues?repo=octo/cat").json()
    assert issues["repo"] == "octo/cat"
    assert len(issues["issues"]) == 2
    assert app.server.api_calls == 2


def test_api_refuses_bad_and_expired_tokens(app: App) -> None:
    """401 with a challenge (RFC 6750 section 3)."""
    assert httpx.get(app.server.api + "/me").headers["WWW-Authenticate"] == "Bearer"
    app.server.access_token_ttl_s = 0
    tokens = app.tokens()
    for token in ("made-up", tokens["access_token"], tokens["refresh_token"]):
        answer = app.api(token)
        assert answer.status_code == 401
        assert 'error="invalid_token"' in answer.headers["WWW-Authenticate"]


def test_api_asks_for_scopes(app: App) -> None:
    """403 names the scope that is missing."""
    token = app.tokens(scope="gist")["access_token"]
    for path in ("/issues?repo=a/b", "/me?require=issues:read"):
        answer = app.api(token, path)
        assert answer.status_code == 403
        challenge = answer.headers["WWW-Authenticate"]
        assert 'error="insufficient_scope", scope="issues:read"' in challenge
    assert app.api(token, "/me?require=gist").status_code == 200


# Faults


@pytest.mark.parametrize(
    ("mode", "status", "seen"),
    [
        (500, 500, '"server_error"'),
        ("502", 502, "<h1>"),
        ("503", 503, "temporarily_unavailable"),
        ("429", 429, "slow_down"),
        ("malformed", 200, '{"access_token": "at_'),
        ("html200", 200, "maintenance"),
        ("empty", 200, "{}"),
        ("error200", 200, '"error"'),
        ("list200", 200, "[]"),
        ("invalid_grant", 400, "invalid_grant"),
        ("invalid_client", 401, "invalid_client"),
        ("redirect", 302, ""),
        ("huge", 200, "x" * 1_000_000),
    ],
)
def test_fault_answers_instead_once(
    app: App, mode: str | int, status: int, seen: str
) -> None:
    """The next request goes wrong, the one after it is answered."""
    token = app.tokens()["refresh_token"]
    app.server.fault(mode)
    answer = app.refresh(token)
    assert answer.status_code == status
    assert seen in answer.text
    assert app.refresh(token).status_code == 200
    assert app.server.fired == {str(mode): 1}


def test_busy_faults_say_when_to_retry(app: App) -> None:
    """503 and 429 carry Retry-After."""
    app.server.fault("503")
    app.server.fault("429", retry_after=7)
    assert app.refresh("x").headers["Retry-After"] == "1"
    assert app.refresh("x").headers["Retry-After"] == "7"


def test_redirect_fault_leads_elsewhere(app: App) -> None:
    """A client must not carry its secret there."""
    app.server.fault("redirect", to="http://127.0.0.1:9/steal")
    assert app.refresh("x").headers["Location"] == "http://127.0.0.1:9/steal"


def test_reset_fault_does_nothing_and_cuts(app: App) -> None:
    """The request was not processed."""
    token = app.tokens()["refresh_token"]
    app.server.fault("reset")
    with pytest.raises(httpx.TransportError):
        app.refresh(token)
    assert app.refresh(token).status_code == 200


def test_drop_after_fault_processes_and_cuts(app: App) -> None:
    """The token was rotated, and the client never hears of it."""
    token = app.tokens()["refresh_token"]
    app.server.fault("drop_after")
    with pytest.raises(httpx.TransportError):
        app.refresh(token)
    assert app.server.token_requests["refresh_token"] == 1
    assert app.refresh(token).json()["error"] == "invalid_grant"


def test_mutate_fault_changes_the_answer(app: App) -> None:
    """Members are set and dropped."""
    app.server.fault("mutate", set={"token_type": "mac"}, drop=["expires_in", "none"])
    answer = app.tokens()
    assert answer["token_type"] == "mac"
    assert "expires_in" not in answer


def test_slow_fault_delays_and_answers(app: App) -> None:
    """`delay_s` works with any mode."""
    app.server.fault("slow", delay_s=0.2)
    began = time.monotonic()
    assert app.refresh("x").status_code == 400
    assert time.monotonic() - began >= 0.2


def test_hang_fault_ends_with_the_server(app: App) -> None:
    """No answer comes, and stopping does not wait for it."""
    app.server.fault("hang")
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(app.server.token_endpoint, timeout=0.2)
    began = time.monotonic()
    app.server.stop()
    assert time.monotonic() - began < 1


def test_fault_waits_for_its_request(app: App) -> None:
    """Path, grant type and count are respected; planned faults can be dropped."""
    app.server.fault("500", times=2, grant_type="refresh_token")
    app.server.fault("502", path="/api/me")
    tokens = app.tokens()
    statuses = [app.refresh(tokens["refresh_token"]).status_code for _ in range(3)]
    assert statuses == [500, 500, 200]
    assert app.api(app.server.issued_access_tokens[-1]).status_code == 502
    app.server.fault("500")
    app.server.clear_faults()
    assert app.refresh("x").status_code == 400
    with pytest.raises(ValueError, match="known are"):
        app.server.fault("tornado")


# Running it


def test_server_starts_and_stops_cleanly() -> None:
    """It can be started again on its port, and twice stopped."""
    server = AuthorizationServer(access_token_ttl_s=2)
    with pytest.raises(RuntimeError, match="not started"):
        _ = server.issuer
    for _ in range(2):
        with server:
            issuer = server.issuer
            assert httpx.get(server.api + "/me").status_code == 401
            with pytest.raises(RuntimeError, match="already running"):
                server.start()
        server.stop()
        assert server.issuer == issuer
        with pytest.raises(httpx.ConnectError):
            httpx.get(server.api + "/me")


def test_stopping_ends_open_connections(app: App) -> None:
    """An idle connection of a pool does not outlive the server, nor delay it."""
    assert app.refresh("x").status_code == 400
    began = time.monotonic()
    app.server.stop()
    assert time.monotonic() - began < 1
    with pytest.raises(httpx.TransportError):
        app.refresh("x")


def test_taken_port_is_an_error_not_an_exit(server: AuthorizationServer) -> None:
    """Another server cannot sit on the same port."""
    with pytest.raises(OSError, match="in use"):
        AuthorizationServer(port=server.port).start()


def test_missing_extra_is_named() -> None:
    """Without Authlib the import error tells what to install."""
    code = (
        "import sys; sys.modules['authlib'] = None\n"
        "from langchain_pocket_auth.testing import Browser\n"
        "try:\n    from langchain_pocket_auth.testing import AuthorizationServer\n"
        "except ImportError as error:\n    print(error)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert "langchain-pocket-auth[testing]" in ran.stdout, ran.stderr


def test_kit_exports_what_it_lists() -> None:
    """Names load when asked for, and no others."""
    assert sorted(kit.__all__) == kit.__all__ == dir(kit)
    for name in kit.__all__:
        assert getattr(kit, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing"):
        _ = kit.nothing


# The person


def test_browser_signs_in_once_and_agrees(app: App) -> None:
    """The sign-in is remembered by cookie, the consent is asked for each time."""
    with Browser("bob") as browser:
        assert "Sign in" in browser.open(app.url()).text
        assert browser.authorize(app.url()).startswith(CALLBACK + "?code=")
        page = browser.open(app.url()).text
        assert "Approve" in page
        assert "<li>issues:read</li>" in page
        assert "bob" in page
    assert app.server.authorizations == 1


def test_consent_page_cannot_be_posted_to_from_outside(app: App) -> None:
    """The decision needs the value that the page carries."""
    with Browser() as browser:
        browser.authorize(app.url())
        forged = browser._http.post(app.url(), data={"decision": "approve"})
        wrong = browser._http.post(app.url(client_id="x"))
    assert wrong.status_code == 400
    assert forged.status_code == 403
    assert app.server.authorizations == 1


def test_pages_escape_what_they_show(app: App) -> None:
    """Nothing in a request becomes markup."""
    evil = '"><script>alert(1)</script>'
    page = Browser().open(app.url(scope=evil, login_hint=evil))
    assert "<script>" not in page.text
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    with Browser() as browser:
        with pytest.raises(FlowStuck):
            browser.authorize(app.url(redirect_uri="http://127.0.0.1:9/" + evil))
        assert browser.visit(app.url(client_id=evil)).status_code == 400


def test_wrong_password_ends_the_visit(app: App) -> None:
    """An error page is the last one; the error lists steps without queries."""
    browser = Browser(password="guessed")
    assert browser.visit(app.url()).status_code == 401
    with pytest.raises(FlowStuck, match="status 401") as stuck:
        browser.authorize(app.url())
    assert "the-state" not in str(stuck.value)


Answer = tuple[int, dict[str, str], str]


class Site:
    """A web site of a few canned pages that remembers what it was asked."""

    def __init__(self) -> None:
        self.pages: dict[str, Answer | Callable[[], Answer]] = {}
        self.asked: list[tuple[str, str, dict[str, str], str]] = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                body = self.rfile.read(length).decode()
                path, _, query = self.path.partition("?")
                site.asked.append(
                    (self.command, path, dict(self.headers), body or query)
                )
                answer = site.pages.get(path, (404, {}, ""))
                status, headers, text = answer() if callable(answer) else answer
                self.send_response(status)
                for name, value in {"Content-Type": "text/html", **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())

            do_POST = do_GET  # noqa: N815 - http.server's name

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,))
        self.thread.start()

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join(TIMEOUT_S)

    def methods(self) -> list[str]:
        return [f"{method} {path}" for method, path, _, _ in self.asked]


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    yield site
    site.stop()


@pytest.fixture
def other() -> Iterator[Site]:
    site = Site()
    yield site
    site.stop()


FAILED = """<meta name="pocket-auth-outcome" content="failed">
<form method="post" action="/again"><button>Try again</button></form>"""
BUTTON = '<form method="post" action="/go"><button>Continue to Example</button></form>'


def test_visit_presses_follows_and_ends_at_the_outcome(site: Site) -> None:
    """Button, redirect, refresh; a page with an outcome is not pressed again."""
    site.pages |= {
        "/": (200, {}, BUTTON),
        "/go": (303, {"Location": "/wait"}, ""),
        "/wait": (200, {}, '<meta http-equiv="refresh" content="0; url=/end">'),
        "/end": (
            200,
            {},
            FAILED,
        ),
    }
    assert "Try again" in Browser().visit(site.url + "/").text
    assert site.methods() == ["GET /", "POST /go", "GET /wait", "GET /end"]


async def test_visit_from_a_coroutine_leaves_the_loop_free(site: Site) -> None:
    """`avisit` walks in a thread."""
    site.pages["/"] = (200, {}, BUTTON)
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0)
            ticks += 1

    ticking = asyncio.create_task(tick())
    page = await Browser().avisit(site.url + "/")
    ticking.cancel()
    assert page.status_code == 404
    assert ticks > 1


def test_pending_page_is_waited_for(site: Site) -> None:
    """A page that reloads itself is loaded again until it says how it ended."""
    answers = iter(["pending", "pending", "connected"])
    meta = '<meta http-equiv="refresh" content="0"><meta name="pocket-auth-outcome" '
    cancel = '<form method="post" action="/no"><button>Cancel</button></form>'
    site.pages["/"] = lambda: (200, {}, f'{meta} content="{next(answers)}">{cancel}')
    assert "connected" in Browser().visit(site.url + "/").text
    assert site.methods() == ["GET /"] * 3


def test_form_is_pressed_once_and_endless_walks_end(site: Site) -> None:
    """A page that comes back is final; a circle is an error."""
    site.pages |= {"/": (200, {}, BUTTON), "/go": (200, {}, BUTTON)}
    Browser().visit(site.url + "/")
    assert site.methods() == ["GET /", "POST /go"]
    site.pages["/circle"] = (302, {"Location": "/circle"}, "")
    with pytest.raises(FlowStuck, match="Gave up after"):
        Browser().visit(site.url + "/circle")


FORMS = """<form id="f" method="post" action="/a">
<input name="username" value="x"><input type="password" name="pw">
<input type="hidden" name="token" value="t"><input type="checkbox" name="on" checked>
<input type="checkbox" name="off"><input name="key" value=""><input disabled name="d"><input value="no name">
<select name="s"><option value="1"><option value="2" selected></select>
<textarea name="note">hi</textarea></form><input form="f" name="late" value="l">
<button form="f" formaction="/b" name="go" value="yes">Agree</button>"""


def test_browser_fills_in_forms_like_a_person(site: Site) -> None:
    """Sign-in fields, defaults, ticked boxes and what the test says to type."""
    site.pages["/"] = (200, {}, FORMS)
    Browser("bob", fields={"key": "typed"}).visit(site.url + "/")
    method, path, _, body = site.asked[1]
    assert (method, path) == ("POST", "/b")
    assert parse_qs(body) == {
        "username": ["bob"],
        "pw": ["bob-password"],
        "token": ["t"],
        "on": ["on"],
        "key": ["typed"],
        "s": ["2"],
        "note": ["hi"],
        "late": ["l"],
        "go": ["yes"],
    }


TWO_FORMS = """
<form action="/no"><button name="d" value="1">Do not allow</button></form>
<form action="/yes"><button name="d" value="1">Allow</button></form>"""


@pytest.mark.parametrize(("approve", "pressed"), [(True, "/yes"), (False, "/no")])
def test_browser_chooses_between_forms(
    site: Site, *, approve: bool, pressed: str
) -> None:
    """Approve and Deny may be two forms, with GET as well."""
    site.pages["/"] = (
        200,
        {},
        TWO_FORMS,
    )
    Browser().visit(site.url + "/", approve=approve)
    assert site.methods()[1] == f"GET {pressed}"
    assert site.asked[1][3] == "d=1"


def test_browser_says_where_it_comes_from(site: Site, other: Site) -> None:
    """`Origin` and `Sec-Fetch-Site` as browsers send them."""
    site.pages |= {
        "/": (200, {}, BUTTON),
        "/go": (303, {"Location": other.url + "/"}, ""),
    }
    Browser().visit(site.url + "/")
    typed, posted, redirected = [
        (headers.get("Origin"), headers["Sec-Fetch-Site"])
        for _, _, headers, _ in site.asked + other.asked
    ]
    assert typed == (None, "none")
    assert posted == (site.url, "same-origin")
    assert redirected == (None, "same-site")


def test_no_referrer_page_posts_without_an_origin(site: Site) -> None:
    """Browsers then send `Origin: null`, which an Origin check has to know."""
    site.pages["/"] = (200, {"Referrer-Policy": "no-referrer"}, BUTTON)
    Browser().visit(site.url + "/")
    assert site.asked[1][2]["Origin"] == "null"
    assert site.asked[1][2]["Sec-Fetch-Site"] == "same-origin"


def test_form_of_another_site_says_so(site: Site) -> None:
    """`localhost` and `127.0.0.1` are two sites."""
    target = site.url.replace("127.0.0.1", "localhost")
    site.pages["/"] = (200, {}, BUTTON.replace('"/go"', f'"{target}/go"'))
    Browser().visit(site.url + "/")
    assert site.asked[1][2]["Origin"] == site.url
    assert site.asked[1][2]["Sec-Fetch-Site"] == "cross-site"


def test_post_is_kept_by_307_only(site: Site, other: Site) -> None:
    """303 turns it into a GET; a third party's redirect loses the origin."""
    site.pages |= {
        "/": (200, {}, BUTTON),
        "/go": (307, {"Location": other.url + "/x"}, ""),
    }
    other.pages["/x"] = (307, {"Location": site.url + "/y"}, "")
    site.pages["/y"] = (303, {"Location": "/z"}, "")
    Browser().visit(site.url + "/")
    assert other.asked[0][0] == "POST"
    assert other.asked[0][2]["Origin"] == site.url
    assert site.asked[2][2]["Origin"] == "null"
    assert site.asked[2][2]["Sec-Fetch-Site"] == "same-site"
    assert site.asked[3][0] == "GET"


@pytest.mark.parametrize(
    ("sources", "allowed"),
    [
        ("'self'", False),
        ("'none'", False),
        ("'self' {other}", True),
        ("'self' http://127.0.0.1:*", True),
        ("'self' 127.0.0.1:*", True),
        ("'self' http://127.0.0.1:1", False),
        ("'self' http://127.0.0.1", False),
        ("'self' https:", False),
        ("http:", True),
        ("*", True),
    ],
)
def test_form_action_holds_for_the_redirect(
    site: Site, other: Site, sources: str, *, allowed: bool
) -> None:
    """A page whose policy forgets where its form ends up does not work."""
    policy = f"default-src 'none'; form-action {sources.format(other=other.url)}"
    site.pages |= {
        "/": (200, {"Content-Security-Policy": policy}, BUTTON),
        "/go": (303, {"Location": other.url + "/"}, ""),
    }
    if allowed:
        Browser().visit(site.url + "/")
    else:
        with pytest.raises(FlowStuck, match="form-action"):
            Browser().visit(site.url + "/")
    assert bool(other.asked) is allowed


def test_cookies_are_shared_between_ports_but_not_people(
    site: Site, other: Site
) -> None:
    """A host's cookies do not know ports; each browser has its own jar."""
    site.pages["/"] = (200, {"Set-Cookie": "flow=1; Path=/; HttpOnly"}, "")
    browser = Browser()
    browser.open(site.url + "/")
    browser.open(other.url + "/")
    Browser().open(site.url + "/")
    assert other.asked[0][2]["Cookie"] == "flow=1"
    assert "Cookie" not in site.asked[-1][2]
    assert browser.cookies["flow"] == "1"


# Leaks


CANARY = "c4n/ary+" + secrets.token_urlsafe(24) + '"<ä>'


class Model(BaseModel):
    shown: str = ""
    hidden: str = ModelField("", repr=False)
    odd: object = None


@dataclass
class Record:
    value: object = None
    masked: str = field(default="", repr=False)


class Printed:
    def __init__(self, text: str) -> None:
        self.text = text

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return "Printed()"


def raised(error: BaseException, **parts: object) -> BaseException:
    for name, value in parts.items():
        setattr(error, name, value)
    return error


def noted(note: str) -> BaseException:
    error = ValueError("x")
    error.add_note(note)
    return error


def suppressed(secret: str) -> BaseException:
    error = raised(ValueError("clean"), __context__=KeyError(secret))
    error.__suppress_context__ = True
    return error


def looped(secret: str) -> list[object]:
    loop: list[object] = [secret]
    loop.append(loop)
    return loop


PLACES: dict[str, Callable[[str], object]] = {
    "text": lambda s: f"<{s}>",
    "bytes": lambda s: s.encode(),
    "bytearray": lambda s: bytearray(s.encode()),
    "key": lambda s: {s: 1},
    "value": lambda s: {"a": [{"b": (s,)}]},
    "set": lambda s: {s},
    "cycle": looped,
    "str": Printed,
    "model": lambda s: Model(shown=s),
    "model field without repr": lambda s: Model(hidden=s),
    "model JSON cannot express": lambda s: Model(hidden=s, odd=object()),
    "dataclass": lambda s: Record([Model(hidden=s)]),
    "message": HumanMessage,
    "message kwargs": lambda s: AIMessage("", additional_kwargs={"k": s}),
    "artifact": lambda s: ToolMessage("", tool_call_id="1", artifact={"k": s}),
    "exception": ValueError,
    "exception attribute": lambda s: raised(ValueError("x"), response=s),
    "cause": lambda s: raised(ValueError("x"), __cause__=KeyError(s)),
    "suppressed context": suppressed,
    "note": noted,
    "group": lambda s: ExceptionGroup("g", [ValueError(s)]),
    "url": lambda s: "https://example.com/?t=" + quote(s, safe=""),
    "form": lambda s: urlencode({"t": s}),
    "json": json.dumps,
    "json in json": lambda s: {"body": json.dumps({"t": s})},
    "base64": lambda s: base64.b64encode(s.encode()).decode(),
    "base64url": lambda s: base64.urlsafe_b64encode(s.encode()).rstrip(b"="),
    "basic 1": lambda s: base64.b64encode(b"a" + s.encode() + b"b").decode(),
    "basic 2": lambda s: base64.b64encode(b"ab" + s.encode() + b"bc").decode(),
    "hex": lambda s: s.encode().hex(),
    "html": lambda s: (
        s.replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;")
    ),
    "repr of bytes": lambda s: repr(s.encode()),
}


@pytest.mark.parametrize("place", PLACES)
def test_planted_secret_is_found_and_not_told(place: str) -> None:
    """In every kind of place; the failure names it without showing it."""
    assert_no_leak([CANARY], PLACES[place]("innocent-text"), "c4n/")
    with pytest.raises(AssertionError) as failure:
        assert_no_leak(["another-secret", CANARY], "clean", PLACES[place](CANARY))
    text = str(failure.value)
    assert "place 1" in text
    assert f"'c4n/…' ({len(CANARY)} characters)" in text
    assert_no_leak([CANARY], failure.value, text)


def test_masked_values_are_no_leak() -> None:
    """What no printing shows may hold the secret."""
    assert_no_leak(
        [CANARY],
        Model(odd=SecretStr(CANARY)),
        Record(masked=CANARY),
        {"hash": hashlib.sha256(CANARY.encode()).hexdigest()},
        object(),
        None,
        range(3),
        text="clean",
    )


def test_further_texts_are_searched() -> None:
    """`text=` takes texts, or one."""
    for text in ([CANARY], CANARY):
        with pytest.raises(AssertionError, match="text 0"):
            assert_no_leak([CANARY], text=text)


def test_files_are_searched_with_what_lies_beside(tmp_path: Any) -> None:
    """A folder, a file, and the write-ahead log of a SQLite database."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "note.bin").write_bytes(b"\0" + CANARY.encode())
    with pytest.raises(AssertionError, match=r"file note\.bin"):
        assert_no_leak([CANARY], files=[tmp_path])
    database = tmp_path / "store.sqlite"
    connection = sqlite3.connect(database, isolation_level=None)
    connection.execute("pragma journal_mode=wal")
    connection.execute("create table t (v)")
    connection.execute("insert into t values ('clean')")
    assert_no_leak([CANARY], files=[database])
    connection.execute("insert into t values (?)", [CANARY])
    with pytest.raises(AssertionError, match=r"file store\.sqlite-wal"):
        assert_no_leak([CANARY], files=[database])
    connection.close()
    with pytest.raises(FileNotFoundError, match=r"absent\.db"):
        assert_no_leak([CANARY], files=[tmp_path / "absent.db"])


@pytest.mark.parametrize("wrong", [[], [""], ["short"], "a text"])
def test_useless_secrets_are_refused(wrong: Any) -> None:
    """A check that cannot find anything, or finds anything, is a mistake."""
    with pytest.raises(ValueError, match=r"no secret|fewer than 8"):
        assert_no_leak(wrong, "place")


def leak_to_log(secret: str) -> None:
    logging.getLogger("pocket.test").debug("value %s", secret)


def leak_to_deaf_logger(secret: str) -> None:
    logger = logging.getLogger("pocket.deaf")
    logger.propagate = False
    logger.info("%r", {"value": secret})


def leak_to_log_extra(secret: str) -> None:
    logging.getLogger("pocket.test").info("x", extra={"response": {"body": secret}})


def leak_to_log_exception(secret: str) -> None:
    try:
        int(secret)
    except ValueError:
        logging.getLogger("pocket.test").exception("failed")


def leak_to_warning(secret: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning(secret, UserWarning, "file.py", 1)


LOG_LEAKS = [
    leak_to_log,
    leak_to_deaf_logger,
    leak_to_log_extra,
    leak_to_log_exception,
]


@pytest.mark.parametrize("leak", LOG_LEAKS)
def test_watch_hears_every_logger(leak: Callable[[str], None]) -> None:
    """From DEBUG on, without propagation, with arguments, extras, exceptions."""
    logging.getLogger("pocket.deaf").setLevel(logging.ERROR)
    with LeakWatch() as watch:
        leak("innocent-text")
        watch.assert_clean([CANARY])
        leak(CANARY)
    assert logging.getLogger("pocket.deaf").level == logging.ERROR
    with pytest.raises(AssertionError, match="log record of pocket"):
        watch.assert_clean([CANARY])


def test_watch_hears_warnings() -> None:
    """As they are shown, and lets them through."""
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with LeakWatch() as watch:
            warnings.warn(CANARY, UserWarning, stacklevel=1)
        warnings.warn("after", UserWarning, stacklevel=1)
    assert len(shown) == 2
    with pytest.raises(AssertionError, match="warning UserWarning"):
        watch.assert_clean([CANARY])
    assert "after" not in watch.collected


@tool
def leaky(secret: str) -> str:
    """Return it or fail with it."""
    if secret.startswith("!"):
        raise ValueError(secret[1:])
    return secret


def run_tool(secret: str, config: Any) -> None:
    leaky.invoke({"secret": secret}, config)


def run_failing_tool(secret: str, config: Any) -> None:
    with pytest.raises(ValueError, match=r"c4n|inno"):
        leaky.invoke({"secret": "!" + secret}, config)


def run_chat_model(secret: str, config: Any) -> None:
    FakeListChatModel(responses=["ok"]).invoke([HumanMessage(secret)], config)


def run_with_metadata(secret: str, config: Any) -> None:
    chain = RunnableLambda(lambda x: x)
    chain.invoke(1, config | {"metadata": {"token": secret}})


RUNS = [run_tool, run_failing_tool, run_chat_model, run_with_metadata]


@pytest.mark.parametrize("who", ["callback", "tracer"])
@pytest.mark.parametrize("run", RUNS)
def test_watch_sees_what_callbacks_see(run: Callable[..., None], who: str) -> None:
    """Inputs, outputs, errors and metadata of tools, models and chains."""
    watch = LeakWatch()
    config = {"callbacks": [getattr(watch, who)]}
    run("innocent-text", config)
    assert any("innocent-text" in text for text in watch.collected)
    watch.assert_clean([CANARY])
    run(CANARY, config)
    with pytest.raises(AssertionError, match=r"callback on_|trace of"):
        watch.assert_clean([CANARY])


async def test_watch_sees_asynchronous_runs() -> None:
    """Both recorders, and the places given at the end."""
    watch = LeakWatch()
    await leaky.ainvoke({"secret": CANARY}, {"callbacks": watch.callbacks})
    with pytest.raises(AssertionError, match="callback on_tool_start"):
        watch.assert_clean([CANARY])
    with pytest.raises(AssertionError, match="place 0"):
        LeakWatch().assert_clean([CANARY], CANARY)


def test_watch_passes_over_the_kit_itself(app: App) -> None:
    """The browser's and the server's own records are not the product's."""
    with LeakWatch() as watch:
        code = app.callback()["code"]
        watch.assert_clean([code])
        tokens = app.exchange(code).json()
        watch.assert_clean([code, tokens["access_token"], tokens["refresh_token"]])
        assert any("/token" in text for text in watch.collected)
        httpx.get(f"{app.server.api}/me?access_token={tokens['access_token']}")
    with pytest.raises(AssertionError, match="log record of httpx"):
        watch.assert_clean([tokens["access_token"]])
