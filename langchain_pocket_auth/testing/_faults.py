"""The ways in which the test authorization server can go wrong on request."""

from __future__ import annotations

import json
import socket
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from flask import Flask, Response, request

HANG_LIMIT_S = 60.0
HUGE_BODY_BYTES = 2 * 1024 * 1024
ELSEWHERE = "http://127.0.0.1:9/elsewhere"  # port 9 is "discard": nobody listens


def json_answer(
    status: int, body: object, headers: Mapping[str, str] | None = None
) -> Response:
    """Build a JSON answer."""
    return Response(json.dumps(body), status, headers, content_type="application/json")


@dataclass
class Fault:
    """One planned misbehaviour."""

    mode: str
    times: int
    path: str
    grant_type: str | None
    delay_s: float
    changes: dict[str, Any] = field(default_factory=dict)

    def concerns(self, path: str, grant_type: str | None) -> bool:
        """Whether this fault waits for such a request."""
        return self.path == path and self.grant_type in {None, grant_type}


class Faults:
    """The queue of planned faults, hooked into a Flask application."""

    def __init__(self, fired: Counter[str]) -> None:
        self.stopping = threading.Event()
        self._fired = fired
        self._lock = threading.Lock()
        self._planned: list[Fault] = []

    def plan(self, fault: Fault) -> None:
        """Queue a fault; of several for one request the oldest fires."""
        if fault.mode not in MODES:
            modes = ", ".join(sorted(MODES))
            raise ValueError(f"Unknown fault {fault.mode!r}; known are: {modes}.")
        with self._lock:
            self._planned.append(fault)

    def clear(self) -> None:
        """Forget what has not fired yet."""
        with self._lock:
            self._planned.clear()

    def install(self, app: Flask) -> None:
        """Let *app* misbehave as planned."""
        app.before_request(self._before)
        app.after_request(self._after)

    def _take(self, path: str, grant_type: str | None) -> Fault | None:
        with self._lock:
            for fault in self._planned:
                if fault.concerns(path, grant_type):
                    fault.times -= 1
                    if fault.times <= 0:
                        self._planned.remove(fault)
                    self._fired[fault.mode] += 1
                    return fault
        return None

    def _before(self) -> Response | None:
        fault = self._take(request.path, request.form.get("grant_type"))
        request.environ["pocket_auth.fault"] = fault
        if fault is None:
            return None
        if fault.delay_s:
            self.stopping.wait(fault.delay_s)
        if fault.mode == "hang":
            self.stopping.wait(HANG_LIMIT_S)
            return _cut()
        answer = INSTEAD.get(fault.mode)
        return answer(fault) if answer else None

    def _after(self, response: Response) -> Response:
        fault: Fault | None = request.environ.get("pocket_auth.fault")
        if fault and fault.mode == "drop_after":
            return _cut()
        if fault and fault.mode == "mutate":
            body = response.get_json()
            for name in fault.changes.get("drop", ()):
                body.pop(name, None)
            body.update(fault.changes.get("set", {}))
            response.set_data(json.dumps(body))
        return response


def _cut() -> Response:
    """End the connection under the answer; the client never sees it."""
    connection: socket.socket = request.environ["werkzeug.socket"]
    with suppress(OSError):  # the other side, or stop(), was faster
        connection.shutdown(socket.SHUT_RDWR)
    return Response("")


def _busy(status: int, error: str) -> Callable[[Fault], Response]:
    def answer(fault: Fault) -> Response:
        retry_after = str(fault.changes.get("retry_after", 1))
        return json_answer(status, {"error": error}, {"Retry-After": retry_after})

    return answer


def _oauth_error(status: int, error: str) -> Callable[[Fault], Response]:
    return lambda _: json_answer(status, {"error": error})


def _huge(_fault: Fault) -> Response:
    # Valid in every other respect: only a limit on the size refuses it.
    token = {"access_token": "at_huge", "token_type": "Bearer", "expires_in": 3600}
    return json_answer(200, token | {"padding": "x" * HUGE_BODY_BYTES})


def _redirect(fault: Fault) -> Response:
    location = str(fault.changes.get("to", ELSEWHERE))
    return Response("", 302, {"Location": location})


def _html(status: int, text: str) -> Callable[[Fault], Response]:
    return lambda _: Response(f"<!doctype html><h1>{text}</h1>", status)


INSTEAD: dict[str, Callable[[Fault], Response]] = {
    "500": _oauth_error(500, "server_error"),
    "502": _html(502, "502 Bad Gateway"),
    "503": _busy(503, "temporarily_unavailable"),
    "429": _busy(429, "slow_down"),
    "malformed": lambda _: Response(
        '{"access_token": "at_cut-o', 200, content_type="application/json"
    ),
    "html200": _html(200, "We are down for maintenance"),
    "empty": lambda _: json_answer(200, {}),
    # GitHub reports errors with status 200.
    "error200": _oauth_error(200, "bad_verification_code"),
    "list200": lambda _: json_answer(200, []),
    "invalid_grant": _oauth_error(400, "invalid_grant"),
    "invalid_client": _oauth_error(401, "invalid_client"),
    "redirect": _redirect,
    "reset": lambda _: _cut(),
    "huge": _huge,
}

MODES = frozenset(INSTEAD) | {"hang", "drop_after", "mutate", "slow"}
