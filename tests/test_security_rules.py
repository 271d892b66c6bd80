"""Rules of the threat model that no other file is about."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from conftest import ACME, free_port, provider
from pydantic import BaseModel
from support import (
    KEYS,
    Clock,
    Watched,
    answer_url,
    asks,
    connect,
    deliver,
    link,
    on,
    outcome_of,
    query_of,
    state,
    token,
)

from langchain_pocket_auth import (
    AuthContext,
    ConfigurationError,
    CredentialUnreadable,
    PocketAuth,
    PocketAuthError,
    Provider,
    ProviderUnavailable,
)
from langchain_pocket_auth._http import Answer, Http, secure_url
from langchain_pocket_auth._seal import KeyRing, new_key
from langchain_pocket_auth.testing import (
    AuthorizationServer,
    Browser,
    LeakWatch,
    assert_no_leak,
)

Make = Callable[..., PocketAuth]


async def started(url: str) -> dict[str, str]:
    """Press the button of a connect page; return the authorization request."""
    page = await deliver(url, method="POST")
    target = page.text.partition('href="')[2].partition('"')[0].replace("&amp;", "&")
    return query_of(target)


# ------------------------------------------------------------------------- PKCE, state


async def test_every_click_has_a_challenge_and_a_state_of_its_own(
    pocket: PocketAuth, server: AuthorizationServer
) -> None:
    """S256, never `plain`; 256 bits of state; nothing is shared between attempts."""
    url = await link(pocket, "read")
    attempts = [await started(url) for _ in range(20)]
    assert {a["code_challenge_method"] for a in attempts} == {"S256"}
    for name in ("state", "code_challenge"):
        values = {a[name] for a in attempts}
        assert len(values) == 20
        assert all(len(base64.urlsafe_b64decode(v + "=")) >= 32 for v in values)
    assert urlsplit(url).query == ""


async def test_verifier_is_long_enough_and_fits_its_challenge(
    pocket: PocketAuth,
) -> None:
    """64 characters from 48 random bytes, hashed as RFC 7636 section 4.2 says."""
    sent = await started(await link(pocket, "read"))
    stored = await pocket._service.ask(lambda e: e.attempts.find(sent["state"]))
    verifier = stored.entry.data["code_verifier"]
    assert len(verifier) == 64
    digest = hashlib.sha256(verifier.encode()).digest()
    assert sent["code_challenge"] == base64.urlsafe_b64encode(digest).decode().rstrip(
        "="
    )


# ------------------------------------------------------------------------- at rest


def planted(server: AuthorizationServer, *callbacks: str) -> list[str]:
    """Return every secret of a flow, as far as it is known outside the package."""
    states = [query_of(c)["state"] for c in callbacks]
    return [
        *(ACME[1], KEYS.partition(":")[2]),
        *(states + server.issued_codes),
        *(server.issued_access_tokens + server.issued_refresh_tokens),
    ]


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
async def test_store_holds_nothing_in_clear(
    make_pocket: Make,
    server: AuthorizationServer,
    alice: Browser,
    tmp_path: Path,
    kind: str,
) -> None:
    """Not during the flow, not after it: no token, code, state, verifier, link, secret."""
    store = Watched("memory://" if kind == "memory" else f"sqlite:///{tmp_path}/p.db")
    pocket = make_pocket(store, keys=KEYS)
    seen: list[bytes] = []
    keep = store.put

    async def put(key: Any, value: bytes, **kwargs: Any) -> bool:
        seen.append("".join(key).encode() + value)
        return await keep(key, value, **kwargs)

    store.put = put  # type: ignore[method-assign]
    url = await link(pocket, "read")
    callback = await answer_url(alice, url)
    verifier = await pocket._service.ask(
        lambda e: e.attempts.find(query_of(callback)["state"])
    )
    ticket = url.rpartition("/")[2]
    found = [*planted(server, callback), verifier.entry.data["code_verifier"], ticket]
    await deliver(callback)
    assert await state(pocket, "read") == "SKIP_AUTH"
    await pocket.delete_session("acme", "nobody")
    assert len(seen) >= 6
    assert_no_leak([*found, *server.issued_access_tokens], seen, files=[tmp_path])


async def test_used_attempt_keeps_neither_verifier_nor_answer(
    pocket: PocketAuth, alice: Browser
) -> None:
    """What an attempt was made with is gone when it is over; its digest is kept."""
    callback = await answer_url(alice, await link(pocket, "read"))
    await deliver(callback)
    stored = await pocket._service.ask(
        lambda e: e.attempts.find(query_of(callback)["state"])
    )
    assert stored.entry.status == "done"
    assert (stored.entry.data, stored.entry.answer) == ({}, None)
    assert stored.entry.answer_digest


@pytest.mark.parametrize(
    "trick", ["flip", "cut", "other row", "other purpose", "no envelope", "key id"]
)
def test_sealed_record_opens_as_it_was_made_or_not_at_all(trick: str) -> None:
    """Every bit and everything it is bound to counts; errors show nothing of it."""
    ring = KeyRing.parse(f"{new_key()},{KEYS}")
    sealed = bytearray(ring.seal(b"the-secret-value", "ab", "c"))
    assert ring.open(bytes(sealed), "ab", "c") == b"the-secret-value"
    bound = {"other row": ("a", "bc"), "other purpose": ("ab", "d")}.get(
        trick, ("ab", "c")
    )
    if trick == "flip":
        sealed[-1] ^= 1
    elif trick == "cut":
        sealed = sealed[:15]
    elif trick == "no envelope":
        sealed[0] = 0
    elif trick == "key id":
        sealed[3] ^= 1
    with pytest.raises(CredentialUnreadable) as caught:
        ring.open(bytes(sealed), *bound)
    assert_no_leak(["the-secret-value"], caught.value)


def test_empty_record_is_unreadable_and_not_a_crash() -> None:
    """Whatever is in a row, it ends in the one error for that."""
    ring = KeyRing.parse(KEYS)
    for sealed in (b"", b"\1", b"\1\xff", b"\1\0"):
        with pytest.raises(CredentialUnreadable):
            ring.open(sealed, "a")


# ---------------------------------------------------------------------- in the process


@pytest.mark.parametrize(
    "fault", [None, 500, "invalid_grant", "invalid_client", "malformed", "reset"]
)
async def test_whole_flow_tells_no_log_and_no_error_a_secret(
    make_pocket: Make,
    server: AuthorizationServer,
    alice: Browser,
    clock: Clock,
    tmp_path: Path,
    fault: Any,
) -> None:
    """At DEBUG, with every library's logger on, through consent, refresh, deletion."""
    pocket = make_pocket(f"sqlite:///{tmp_path}/p.db", keys=KEYS)
    errors: list[Any] = []
    with LeakWatch() as watch:
        logging.getLogger("asyncio").setLevel(logging.DEBUG)
        callback = await answer_url(alice, await link(pocket, "read"))
        if fault:
            server.fault(fault)
            await deliver(callback)
            callback = await answer_url(alice, await link(pocket, "read"))
        await deliver(callback)
        contexts = [await token(pocket, "read"), await pocket.get_auth_context("acme")]
        clock.forward(3601)
        if fault:
            server.fault(fault, times=9)
        try:
            await token(pocket, "read")
        except PocketAuthError as error:
            errors.append(error)
        server.fault(500, times=9, path="/revoke")
        await pocket.delete_session("acme")
        await pocket.aclose()
    assert bool(errors) == bool(fault)
    assert watch.collected
    shown = [
        *errors,
        pocket,
        *map(repr, contexts),
        *(c.model_dump_json() for c in contexts),
    ]
    watch.assert_clean(planted(server, callback), *shown, files=[tmp_path])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The package's clock."""
    return Clock(monkeypatch)


async def test_context_of_a_tool_shows_its_token_in_no_default_way(
    pocket: PocketAuth, server: AuthorizationServer, alice: Browser
) -> None:
    """Printed, dumped, nested or iterated it holds nothing; pickling raises."""
    context = await connect(pocket, alice, "read")

    class Outer(BaseModel):
        inner: Any

    ways = [
        repr(context),
        str(context),
        context.model_dump(),
        context.model_dump_json(),
        dict(context),
        Outer(inner=context).model_dump(),
        Outer(inner=context).model_dump_json(),
        f"{asks(pocket, 'read')!r}",
    ]
    assert_no_leak(
        [*server.issued_access_tokens, *server.issued_refresh_tokens, ACME[1]], ways
    )
    assert isinstance(context, AuthContext)
    assert context.refresh_token is None  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(context)


# -------------------------------------------------------------------------- endpoints


@pytest.mark.parametrize(
    "url",
    [
        "javascript:alert(1)",
        "data:text/html,x",
        "file:///etc/passwd",
        "http://public.example/authorize",
        "http://127.0.0.1.evil.example/",
        "http://127.0.0.1@evil.example/",
        "https://",
        "//evil.example",
        "https://[::1",
        "",
    ],
)
def test_address_no_secret_may_go_to_is_refused(url: str) -> None:
    """https, or http to this machine; nothing else, however it is spelt."""
    with pytest.raises(ConfigurationError, match="endpoint"):
        secure_url(url, "an endpoint")
    with pytest.raises(ValueError, match="endpoint"):
        Provider(
            id="own", authorization_endpoint=url, token_endpoint="https://a.example/"
        )


class Recorder:
    """A server that answers as told and notes what it was sent."""

    def __init__(self, *answers: bytes) -> None:
        self.answers, self.requests = list(answers), list[bytes]()
        self.base = ""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.base = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: Any, writer: Any) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        size = int(
            head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0] or 0
        )
        self.requests.append(head + await reader.readexactly(size))
        writer.write(self.answers.pop(0))
        await writer.drain()
        writer.close()


def http_answer(status: str, body: bytes = b"{}", *headers: str) -> bytes:
    """Return a raw HTTP answer."""
    lines = [
        f"HTTP/1.1 {status}",
        f"Content-Length: {len(body)}",
        "Connection: close",
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def test_cookie_of_one_persons_answer_is_not_sent_for_the_next() -> None:
    """The HTTP client is shared by all owners, so it keeps no cookies."""
    http = Http()
    async with Recorder(
        http_answer("200 OK", b"{}", "Set-Cookie: who=alice; Path=/"),
        http_answer("200 OK"),
    ) as server:
        for _ in range(2):
            await http.request(
                "POST", f"{server.base}/token", provider="p", data={"a": "b"}
            )
    await http.close()
    assert all(b"cookie" not in request.lower() for request in server.requests)


@pytest.mark.parametrize(
    "status", ["301 Moved", "302 Found", "303 See Other", "307 Again", "308 Moved"]
)
async def test_redirect_of_a_token_request_is_not_followed(status: str) -> None:
    """The second host sees neither the secret nor anything else."""
    http = Http()
    async with Recorder(http_answer("200 OK")) as second:
        location = f"Location: {second.base}/token"
        async with Recorder(http_answer(status, b"", location)) as first:
            answer = await http.request(
                "POST",
                f"{first.base}/token",
                provider="p",
                data={"refresh_token": "r"},
                auth=("i", "s"),
            )
    await http.close()
    assert answer.status == int(status[:3])
    assert second.requests == []


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("5", 5.0),
        ("99999", 3600.0),
        ("²", None),
        ("-1", None),
        ("Wed, 21 Oct 2026 07:28:00 GMT", None),
        ("", None),
    ],
)
async def test_retry_after_is_read_or_left_alone(
    value: str, expected: float | None
) -> None:
    """An odd header is no crash; a huge one is an hour at most."""
    http = Http()
    async with Recorder() as server:
        server.answers.append(
            http_answer("503 Later", b"", "Retry-After: ").replace(
                b"Retry-After: ", b"Retry-After: " + value.encode("latin-1")
            )
        )
        answer = await http.request("POST", f"{server.base}/token", provider="p")
    await http.close()
    assert answer.retry_after_s == expected


def test_deeply_nested_answer_is_no_answer() -> None:
    """A megabyte of brackets ends in "not JSON", not in a crash."""
    assert Answer(200, b"[" * 500_000, None).json() is None
    assert "b'" not in repr(Answer(200, b"secret", None))


async def test_unreachable_provider_is_told_without_the_request() -> None:
    """The error names the host; the request, which holds the secret, is not in it."""
    http = Http()
    with pytest.raises(
        ProviderUnavailable, match=r"127\.0\.0\.1 \(ConnectError\)"
    ) as caught:
        await http.request(
            "POST",
            f"http://127.0.0.1:{free_port()}/token",
            provider="p",
            data={"client_secret": "a-secret-value"},
        )
    await http.close()
    assert caught.value.lost
    assert caught.value.__context__ is None
    assert_no_leak(["a-secret-value"], caught.value)


@pytest.mark.parametrize("secret", ["a:b%c+d e", "päss/wörd=&?", "x" * 300])
async def test_odd_client_secrets_arrive_as_they_are(
    make_pocket: Make, server: AuthorizationServer, alice: Browser, secret: str
) -> None:
    """Client id and secret are form-encoded before Basic (RFC 6749 section 2.3.1)."""
    base = f"http://127.0.0.1:{free_port()}"
    async with Recorder(http_answer("200 OK")) as recorder:
        row = provider(server, "odd", token_endpoint=f"{recorder.base}/token")
        pocket = make_pocket(
            base_url=base,
            providers=[row],
            clients={"odd": ("an:id", secret)},
        )
        server.register(
            client_id="an:id",
            client_secret=secret,
            redirect_uris=[f"{base}/auth/odd/oauth2/callback"],
        )
        callback = await answer_url(alice, await link(pocket, "read", provider="odd"))
        assert outcome_of(await deliver(callback)) == "unavailable"
    [request] = recorder.requests
    basic = request.partition(b"Authorization: Basic ")[2].partition(b"\r\n")[0]
    sent = base64.b64decode(basic).decode().split(":")
    decoded = [parse_qs(f"v={part}", keep_blank_values=True)["v"][0] for part in sent]
    assert decoded == ["an:id", secret]
    body = parse_qs(request.partition(b"\r\n\r\n")[2].decode())
    assert not {"client_secret", "client_id"} & body.keys()


# --------------------------------------------------------------------------- identity


async def test_request_cannot_name_another_owner(
    pocket: PocketAuth, alice: Browser, server: AuthorizationServer
) -> None:
    """What comes with a callback or a click is not asked whose session it is."""
    url = await link(pocket, "read", thread_id="1")
    forged = "&owner=2&thread_id=2&profile=work&redirect_uri=http://evil.example"
    page = await deliver(f"{url}?{forged[1:]}", method="POST", data={"thread_id": "2"})
    assert "evil.example" not in page.text
    callback = await answer_url(alice, url)
    assert (await deliver(callback + forged)).status_code == 303
    assert await state(pocket, "read", thread_id="1") == "SKIP_AUTH"
    assert await state(pocket, "read", thread_id="2") == "NO_SESSION"
    assert await state(pocket, "read", thread_id="1", profile="work") == "NO_SESSION"


async def test_many_starts_leave_one_future_and_bounded_rows(
    make_pocket: Make, alice: Browser
) -> None:
    """A loop that asks a thousand times keeps one question open."""
    store = Watched("memory://")
    pocket = make_pocket(store, keys=KEYS)
    request = asks(pocket, "read")
    links = {await pocket.prepare(request, **on()) for _ in range(1000)}
    assert len(links) == 1
    assert len(await store.list("thread:default")) == 1
    assert len(await store.list("ticket")) == 1


def test_import_does_nothing(tmp_path: Path) -> None:
    """Importing and constructing write no file and open no port."""
    import os
    import subprocess
    import sys

    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "XDG_CONFIG_HOME": str(tmp_path),
        "XDG_DATA_HOME": str(tmp_path),
    }
    code = "import langchain_pocket_auth as p; p.PocketAuth(); print(len(__import__('threading').enumerate()))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert run.stdout.strip() == "1"
    assert list(tmp_path.iterdir()) == []


async def test_default_store_and_key_are_the_users_own(
    server: AuthorizationServer,
    alice: Browser,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without settings: a database and a key file, apart, and for the user alone."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    base = f"http://127.0.0.1:{free_port()}"
    server.register(
        client_id="i",
        client_secret="s",
        redirect_uris=[f"{base}/auth/acme/oauth2/callback"],
    )
    pocket = PocketAuth(
        base_url=base,
        providers=[provider(server, "acme")],
        clients={"acme": ("i", "s")},
    )
    await connect(pocket, alice, "read")
    await pocket.aclose()
    key = tmp_path / "config" / "pocket-auth" / "keys"
    database = tmp_path / "data" / "pocket-auth" / "sessions.db"
    for path in (key, database):
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700
    assert_no_leak(planted(server)[1:], files=[database.parent])
    assert httpx.URL(base).port
