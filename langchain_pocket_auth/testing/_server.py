"""A strict authorization server that misbehaves on request, for tests and demos."""

from __future__ import annotations

import secrets
import socket
import threading
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Self
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from .._rows import Provider
from ._ledger import GRANT_TYPES, Client, Device, Ledger, Token
from ._outside import outside

try:
    from flask import Flask, Response, request, session
    from werkzeug.routing import Map, Rule
    from werkzeug.serving import ThreadedWSGIServer, WSGIRequestHandler

    from ._faults import Fault, Faults, json_answer
    from ._grants import AUTH_METHODS, OAuth2Error, Protocol
    from ._openid import key_set
    from ._pages import (
        consent_page,
        device_page,
        done_page,
        error_page,
        login_page,
        page_headers,
    )
except ModuleNotFoundError as error:  # pragma: no cover
    if (error.name or "").partition(".")[0] not in {"authlib", "flask", "werkzeug"}:
        raise
    raise ImportError(
        "AuthorizationServer needs Authlib and Flask: "
        "install `langchain-pocket-auth[testing]`."
    ) from error

__all__ = ["AuthorizationServer", "Client"]

STOP_TIMEOUT_S = 5.0
ISSUES_SCOPES = {"issues:read", "repo"}


# Methods by name, with what they serve.
_ROUTES: dict[str, tuple[str, *tuple[str, ...]]] = {
    "_ask": ("GET", "/authorize"),
    "_decide": ("POST", "/authorize"),
    "_ask_device": ("GET", "/device"),
    "_decide_device": ("POST", "/device"),
    "_login": ("POST", "/login", "/device/login"),
    "_token": ("POST", "/token"),
    "_revocation": ("POST", "/revoke"),
    "_introspect": ("POST", "/introspect"),
    "_register": ("POST", "/register"),
    "_device": ("POST", "/device_authorization"),
    "_push": ("POST", "/par"),
    "_jwks": ("GET", "/jwks"),
    "_well_known": (
        "GET",
        "/.well-known/<name>",
        "/.well-known/<name>/<path:path>",
        "/<path:path>/.well-known/openid-configuration",
    ),
    "_api": ("GET", "/api/<path:path>"),
}


@cache
def _url_map() -> Map:
    # Compiling them takes 10 ms, which tests with a server each would pay again.
    return Map(
        Rule(path, endpoint=name, methods=[method])
        for name, (method, *paths) in _ROUTES.items()
        for path in paths
    )


@dataclass(kw_only=True, eq=False, repr=False)
class AuthorizationServer(Ledger):
    """
    An OAuth 2.0 authorization server on a free port of 127.0.0.1.

    ```python
    with AuthorizationServer(access_token_ttl_s=2) as server:
        server.register(client_id="app", client_secret="s", redirect_uris=[url])
        server.fault("503", times=2)
        ...
        assert server.refresh_token_reuses == 0
    ```

    It is strict where clients tend to be wrong: PKCE with S256 for everybody,
    exact redirect URIs, codes for one use, one authentication method per
    client, refresh tokens that rotate and whose reuse revokes the family.
    Any name may sign in with the password `<name>-password`.

    With the scope `openid` it is an OpenID provider, whose ID tokens may lie; it
    registers clients (RFC 7591), serves devices (RFC 8628), and gives tokens to apps
    that act for themselves (`client_credentials`, RFC 7523).

    It is also a protected API: `GET /api/<path>` with a bearer token answers
    `{"sub", "scope", "path"}`, `/api/issues` two issues as well (scope
    `issues:read` or `repo`); `?require=<scope>` asks for a scope.

    Options and counters are those of `Ledger`.
    """

    fired: Counter[str] = field(default_factory=Counter, init=False)
    """How often each fault fired."""

    def __post_init__(self) -> None:
        self._faults = Faults(self.fired)
        self._protocol = Protocol(self)
        self._http: _HTTPServer | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listen and serve in a daemon thread; back in a few milliseconds."""
        if self._http is not None:
            raise RuntimeError("The authorization server is already running.")
        self._faults.stopping.clear()
        # Bound here because werkzeug ends the process when the port is taken.
        with socket.create_server(("127.0.0.1", self.port)) as listener:
            self.port = listener.getsockname()[1]
            self._http = _HTTPServer(self._build_app(), self.port, listener.fileno())
        self._http.start()

    def stop(self) -> None:
        """End every connection, a hanging one too, and free the port."""
        http, self._http = self._http, None
        if http is not None:
            self._faults.stopping.set()
            http.stop()

    @property
    def authorization_endpoint(self) -> str:
        return self.origin + "/authorize"

    @property
    def token_endpoint(self) -> str:
        return self.origin + "/token"

    @property
    def revocation_endpoint(self) -> str:
        return self.origin + "/revoke"

    @property
    def introspection_endpoint(self) -> str:
        return self.origin + "/introspect"

    @property
    def device_authorization_endpoint(self) -> str:
        return self.origin + "/device_authorization"

    @property
    def registration_endpoint(self) -> str:
        return self.origin + "/register"

    @property
    def jwks_uri(self) -> str:
        return self.origin + "/jwks"

    @property
    def api(self) -> str:
        """The base address of the protected API."""
        return self.origin + "/api"

    @property
    def metadata(self) -> dict[str, Any]:
        """What the server says about itself (RFC 8414, OpenID Connect Discovery)."""
        methods = ["client_secret_basic", "client_secret_post", "none"]
        pushed = {
            "pushed_authorization_request_endpoint": self.origin + "/par",
            "require_pushed_authorization_requests": self.pushed_requests == "required",
        }
        return {
            **(pushed if self.pushed_requests != "none" else {}),
            "issuer": self.issuer,
            "authorization_endpoint": self.authorization_endpoint,
            "token_endpoint": self.token_endpoint,
            "revocation_endpoint": self.revocation_endpoint,
            "introspection_endpoint": self.introspection_endpoint,
            "device_authorization_endpoint": self.device_authorization_endpoint,
            "registration_endpoint": self.registration_endpoint,
            "jwks_uri": self.jwks_uri,
            "response_types_supported": ["code"],
            "grant_types_supported": sorted(GRANT_TYPES),
            "subject_types_supported": ["public"],
            "id_token_signing_alg_values_supported": [self.id_token_algorithm],
            "code_challenge_methods_supported": ["S256"],
            "token_endpoint_auth_methods_supported": methods,
            "revocation_endpoint_auth_methods_supported": methods,
            "authorization_response_iss_parameter_supported": self.iss != "omitted",
        }

    def provider(self, name: str, **facts: Any) -> Provider:
        """
        Return a row that leads here, for `PocketAuth(providers=[...])`.

        Args:
            name: Its id.
            facts: Further keys of `Provider`, or others in the place of these.
        """
        known = {
            "id": name,
            "display_name": name.title(),
            "issuer": self.issuer,
            "authorization_endpoint": self.authorization_endpoint,
            "token_endpoint": self.token_endpoint,
            "revocation_endpoint": self.revocation_endpoint,
            "authorization_response_iss_parameter_supported": self.iss != "omitted",
        }
        return Provider(**known | facts)

    def fault(
        self,
        mode: str | int,
        *,
        times: int = 1,
        path: str = "/token",
        grant_type: str | None = None,
        delay_s: float = 0.0,
        **changes: Any,
    ) -> None:
        """
        Go wrong at the next *times* requests to *path*.

        Args:
            mode: Instead of the real answer, and with nothing done: `500`,
                `502` (HTML), `503` and `429` (Retry-After), `malformed` (JSON
                cut off), `html200`, `empty` (`{}`), `error200`, `list200`,
                `invalid_grant`, `invalid_client`, `redirect`, `reset`
                (connection cut), `hang` (until the server stops), `huge`
                (2 MiB). After the request was processed: `drop_after` (done,
                but the answer is lost), `mutate`, `slow` (only *delay_s*).
            times: How many requests.
            path: Which path, on any HTTP method.
            grant_type: Only token requests with this `grant_type`.
            delay_s: Wait before answering, with any mode.
            changes: For `mutate`: `set={...}` and `drop=[...]`, members of the
                JSON answer. For `503` and `429`: `retry_after=`. For
                `redirect`: `to=`.
        """
        plan = Fault(str(mode), times, path, grant_type, delay_s, changes)
        self._faults.plan(plan)

    def clear_faults(self) -> None:
        """Forget the faults that have not fired yet."""
        self._faults.clear()

    def _build_app(self) -> Flask:
        app = Flask(__name__, static_folder=None)
        app.secret_key = secrets.token_bytes(32)
        # Browsers share cookies between the ports of a host.
        app.config["SESSION_COOKIE_NAME"] = f"as_session_{self.port}"
        app.config["SESSION_COOKIE_SAMESITE"] = "Lax"
        # Flask runs these from the last to the first: errors are counted as the
        # client sees them, after a fault changed the answer.
        app.after_request(self._count_errors)
        self._faults.install(app)
        app.url_map = _url_map()
        for name in _ROUTES:
            app.view_functions[name] = getattr(self, name)
        return app

    def _count_errors(self, response: Response) -> Response:
        response.headers["Cache-Control"] = "no-store"
        if request.path == "/token" and response.is_json:
            body = response.get_json(silent=True)
            if isinstance(body, dict) and "error" in body:
                with self._lock:
                    self.token_errors[str(body["error"])] += 1
        return response

    # Where machines ask

    def _token(self) -> Response:
        answer: Response = self._protocol.create_token_response()
        return answer

    def _revocation(self) -> Response:
        answer: Response = self._protocol.create_endpoint_response("revocation")
        with self._lock:
            self.revocations += answer.status_code == 200  # noqa: PLR2004
        return answer

    def _introspect(self) -> Response:
        answer: Response = self._protocol.create_endpoint_response("introspection")
        return answer

    def _register(self) -> Response:
        answer: Response = self._protocol.create_endpoint_response(
            "client_registration"
        )
        return answer

    def _device(self) -> Response:
        answer: Response = self._protocol.create_endpoint_response(
            "device_authorization"
        )
        return answer

    def _push(self) -> Response:
        """Keep a request until the person comes with its name (RFC 9126)."""
        try:
            client = self._protocol.authenticate_client(
                self._protocol.create_oauth2_request(None), AUTH_METHODS
            )
        except OAuth2Error as error:
            return _error_response(error.error, "", 401)
        kept = request.form.to_dict() | {"client_id": client.client_id}
        if "request_uri" in kept or "client_secret" in request.args:
            return _error_response("invalid_request", "Not of RFC 9126.")
        if not client.check_redirect_uri(kept.get("redirect_uri", "")):
            return _error_response("invalid_request", "The redirect URI is unknown.")
        kept.pop("client_secret", None)
        return json_answer(201, {"request_uri": self.push(kept), "expires_in": 60})

    def _jwks(self) -> Response:
        return self._document(key_set(self))

    def _well_known(
        self, name: str = "openid-configuration", path: str = ""
    ) -> Response:
        """Answer at the places of RFC 8414 section 3.1 and of OpenID."""
        known = name in {"oauth-authorization-server", "openid-configuration"}
        if not known or path != self.issuer_path.strip("/"):
            return json_answer(404, {})
        return self._document(self.metadata)

    def _document(self, content: dict[str, Any]) -> Response:
        with self._lock:
            self.document_reads[request.path] += 1
        return json_answer(200, content)

    def _api(self, path: str) -> Response:
        with self._lock:
            self.api_calls += 1
        scheme, _, value = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return json_answer(401, {}, {"WWW-Authenticate": "Bearer"})
        token = self.find_token(value, "access_token")
        if token is None or token.is_revoked() or token.is_expired():
            return _bearer_error(401, "invalid_token")
        granted = set(token.scope.split())
        required = set(request.args.get("require", "").split())
        if path == "issues" and not granted & ISSUES_SCOPES:
            required.add("issues:read")
        if not required <= granted:
            return _bearer_error(403, "insufficient_scope", required)
        return json_answer(200, _resource(path, token))

    # Where a person is asked

    def _ask(self) -> Response:
        """Show the sign-in page, then the consent page."""
        if name := request.args.get("request_uri"):
            kept = self.pushed(name, request.args.get("client_id", ""))
            if kept is None or set(request.args) != {"request_uri", "client_id"}:
                return _error_response("invalid_request", "Unknown request_uri.")
            ticket = session["pushed"] = secrets.token_urlsafe(16)
            return Response(
                "",
                303,
                {"Location": f"/authorize?{urlencode({**kept, 'par': ticket})}"},
            )
        if self.pushed_requests == "required" and (
            not session.get("pushed") or request.args.get("par") != session["pushed"]
        ):
            return _error_response("invalid_request", "Push the request (RFC 9126).")
        grant = self._consent_grant()
        if isinstance(grant, Response):
            return grant
        username = session.get("username")
        if not username:
            return self._login_page(failed=False)
        session["csrf"] = secrets.token_urlsafe(16)
        client: Client = grant.request.client
        scope = grant.request.payload.scope or ""
        page = consent_page(
            client_id=client.client_id,
            scopes=scope.split() or sorted(client.scopes or ()),
            action=_with_same_query("/authorize"),
            csrf=session["csrf"],
            username=username,
        )
        return Response(page, headers=page_headers(request.args["redirect_uri"]))

    def _login(self) -> Response:
        """Sign the person in and go back to the question."""
        username = request.form.get("username", "")
        if not username or request.form.get("password") != f"{username}-password":
            return self._login_page(failed=True)
        session["username"] = username
        asked = "/device" if request.path.startswith("/device") else "/authorize"
        return Response("", 303, {"Location": _with_same_query(asked)})

    def _decide(self) -> Response:
        """Answer the client what the person decided."""
        grant = self._consent_grant()
        if isinstance(grant, Response):
            return grant
        expected = session.pop("csrf", None)
        if not expected or request.form.get("csrf") != expected:
            return _error_response("access_denied", "This page was used before.", 403)
        approved = request.form.get("decision") == "approve"
        if not approved:
            with self._lock:
                self.denials += 1
        answer = self._protocol.create_authorization_response(
            grant.request,
            grant_user=session["username"] if approved else None,
            grant=grant,
        )
        return self._to_client(answer)

    def _ask_device(self) -> Response:
        """Ask for the code that a device shows, then what it may."""
        username = session.get("username")
        if not username:
            return self._login_page(failed=False)
        if not request.args.get("user_code"):
            return Response(device_page(action="/device"), headers=page_headers())
        device = self._shown_device()
        if device is None:
            return _no_device()
        session["csrf"] = secrets.token_urlsafe(16)
        page = consent_page(
            client_id=device.client_id,
            scopes=device.scope.split(),
            action=_with_same_query("/device"),
            csrf=session["csrf"],
            username=username,
            note=f"The device shows the code {device.user_code}.",
        )
        return Response(page, headers=page_headers())

    def _decide_device(self) -> Response:
        """Note what the person decided; the device hears of it when it asks."""
        device, expected = self._shown_device(), session.pop("csrf", None)
        if not expected or request.form.get("csrf") != expected:
            return _error_response("access_denied", "This page was used before.", 403)
        if device is None:
            return _no_device()
        approved = request.form.get("decision") == "approve"
        self.decide(device, session["username"], approved=approved)
        return Response(done_page(), headers=page_headers())

    def _shown_device(self) -> Device | None:
        return self.device_that_shows(request.args.get("user_code", ""))

    def _consent_grant(self) -> Any:
        """Validate the request; an answer to give at once if it is not valid."""
        client = self.clients.get(request.args.get("client_id", ""))
        if client is None:
            return _error_response("invalid_client", "The client is not known.")
        redirect_uri = request.args.get("redirect_uri", "")
        if not client.check_redirect_uri(redirect_uri):
            return _error_response(
                "invalid_request", "The redirect URI is not registered."
            )
        try:
            return self._protocol.get_consent_grant()
        except OAuth2Error as error:
            if not error.redirect_uri:
                return _error_response(error.error, error.get_error_description())
            return self._to_client(self._protocol.handle_error_response(None, error))

    def _to_client(self, answer: Response) -> Response:
        """Redirect with 303, so that no form is sent along (RFC 9700 4.12)."""
        answer.status_code = 303
        if self.iss != "omitted":
            iss = self.issuer if self.iss == "right" else self.iss
            answer.location = _add_query(answer.location or "", iss=iss)
        return answer

    def _login_page(self, *, failed: bool) -> Response:
        on_device = request.path.startswith("/device")
        page = login_page(
            client_id=request.args.get("client_id", "a device"),
            action=_with_same_query("/device/login" if on_device else "/login"),
            username=request.args.get("login_hint", ""),
            failed=failed,
        )
        headers = page_headers(request.args.get("redirect_uri", ""))
        return Response(page, 401 if failed else 200, headers)


def _bearer_error(status: int, error: str, required: Iterable[str] = ()) -> Response:
    challenge = f'Bearer error="{error}"'
    if required:
        challenge += f', scope="{" ".join(sorted(required))}"'
    return json_answer(status, {"error": error}, {"WWW-Authenticate": challenge})


def _no_device() -> Response:
    return _error_response("invalid_request", "No device waits with this code.", 404)


def _error_response(error: str, description: str, status: int = 400) -> Response:
    return Response(error_page(error, description), status, page_headers())


def _with_same_query(path: str) -> str:
    return f"{path}?{request.query_string.decode('latin-1')}"


def _add_query(url: str, **parameters: str) -> str:
    parts = urlsplit(url)
    query = [*parse_qsl(parts.query, keep_blank_values=True), *parameters.items()]
    return urlunsplit(parts._replace(query=urlencode(query)))


def _resource(path: str, token: Token) -> dict[str, Any]:
    """What the protected API answers."""
    body: dict[str, Any] = {
        "sub": token.grant.username,
        "scope": token.scope,
        "path": path,
    }
    if path == "issues":
        body["repo"] = request.args.get("repo", "")
        body["issues"] = [
            {"number": 1, "title": "The door does not open", "state": "open"},
            {"number": 2, "title": "Add a window", "state": "open"},
        ]
    return body


class _Handler(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"
    # Head and body are two writes; without this the second waits 40 ms for the
    # acknowledgement of the first.
    disable_nagle_algorithm = True

    def log(self, *_: object, **__: object) -> None:
        """Say nothing."""


class _HTTPServer(ThreadedWSGIServer):
    """A threaded server that knows its connections and can end them."""

    def __init__(self, app: Flask, port: int, fd: int) -> None:
        self._connections: set[socket.socket] = set()
        self._changed = threading.Condition()
        super().__init__("127.0.0.1", port, app, _Handler, fd=fd)
        self._loop = threading.Thread(
            # 10 ms: how long stop() may have to wait for the loop.
            target=self.serve_forever,
            args=(0.01,),
            name="authorization-server",
            daemon=True,
        )

    def start(self) -> None:
        """Serve in the background."""
        self._loop.start()

    def stop(self) -> None:
        """Close the port and all connections."""
        self.shutdown()
        self._loop.join(STOP_TIMEOUT_S)
        with self._changed:
            for connection in self._connections:
                with suppress(OSError):  # closed by itself in the meantime
                    connection.shutdown(socket.SHUT_RDWR)
            self._changed.wait_for(lambda: not self._connections, STOP_TIMEOUT_S)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Note the connection before its thread starts, so that stop() sees it."""
        with self._changed:
            self._connections.add(request)
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve one connection; what happens here is the test's other side."""
        try:
            with outside():
                super().process_request_thread(request, client_address)
        finally:
            with self._changed:
                self._connections.discard(request)
                self._changed.notify_all()
