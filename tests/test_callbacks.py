"""What arrives at the callback and the connect link, honest and otherwise."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import httpx
import pytest
import uvicorn
from conftest import free_port
from fastapi import FastAPI
from support import (
    BOUND_S,
    KEYS,
    answer_url,
    connect,
    deliver,
    link,
    outcome_of,
    query_of,
    state,
    token,
)

from langchain_pocket_auth import (
    CallbackServerError,
    PocketAuth,
    ProviderUnavailable,
)
from langchain_pocket_auth._http import Http
from langchain_pocket_auth.server._pages import SECURITY_HEADERS
from langchain_pocket_auth.testing import AuthorizationServer, Browser, LeakWatch

Make = Callable[..., PocketAuth]


@pytest.fixture(params=["memory", "sqlite"])
def stored(
    make_pocket: Make, request: pytest.FixtureRequest, tmp_path: Path
) -> PocketAuth:
    """A pocket on each storage, for what the storage decides."""
    memory = request.param == "memory"
    return make_pocket(
        "memory://" if memory else f"sqlite:///{tmp_path}/p.db", keys=KEYS
    )


def requests_at(server: AuthorizationServer) -> int:
    """Return how many token requests the server has seen."""
    return server.token_requests.total() + server.token_errors.total()


def changed(url: str, **parameters: Any) -> str:
    """Return an answer with other parameters; `None` takes one out."""
    query = {k: v for k, v in {**query_of(url), **parameters}.items() if v is not None}
    return f"{url.partition('?')[0]}?{urlencode(query, doseq=True)}"


def is_bare(page: httpx.Response) -> bool:
    """Whether a page carries every header that keeps it to itself."""
    return all(name in page.headers for name in SECURITY_HEADERS)


# ------------------------------------------------------------------------ once only


async def test_same_answer_again_gets_the_same_page(
    stored: PocketAuth, server: AuthorizationServer, alice: Browser
) -> None:
    """Reload, back button and retrying proxies make no second token request."""
    callback = await answer_url(alice, await link(stored, "read"))
    pages = [await deliver(callback, follow_redirects=True) for _ in range(3)]
    assert [p.status_code for p in pages] == [200] * 3
    assert {p.text for p in pages} == {pages[0].text}
    assert outcome_of(pages[0]) == "connected"
    assert requests_at(server) == 1
    # The code has left the address bar.
    assert urlsplit(str(pages[0].url)).query == ""


async def test_ten_identical_callbacks_at_once_exchange_once(
    stored: PocketAuth, server: AuthorizationServer, alice: Browser
) -> None:
    """All of them get the page of the one that came first."""
    callback = await answer_url(alice, await link(stored, "read"))
    server.fault("slow", delay_s=0.2)
    pages = await asyncio.gather(
        *(deliver(callback, follow_redirects=True) for _ in range(10))
    )
    assert {p.status_code for p in pages} == {200}
    assert {outcome_of(p) for p in pages} == {"connected"}
    assert server.token_requests == {"authorization_code": 1}
    assert server.code_replays == 0


async def test_other_code_for_a_used_state_is_a_replay(
    stored: PocketAuth, server: AuthorizationServer, alice: Browser
) -> None:
    """An attempt is good for one answer."""
    callback = await answer_url(alice, await link(stored, "read"))
    await deliver(callback)
    for other in (
        changed(callback, code="other"),
        changed(callback, code=None, error="access_denied"),
    ):
        page = await deliver(other)
        assert (page.status_code, outcome_of(page)) == (409, "replayed")
    assert requests_at(server) == 1
    assert await state(stored, "read") == "SKIP_AUTH"


# -------------------------------------------------------------- what is not an answer

REFUSED: dict[str, tuple[int, Callable[[str], str]]] = {
    "unknown state": (404, lambda u: changed(u, state="x" * 43)),
    "no state": (400, lambda u: changed(u, state=None)),
    "empty state": (400, lambda u: changed(u, state="")),
    "no code": (400, lambda u: changed(u, code=None)),
    "state twice": (400, lambda u: f"{u}&state=x"),
    "code twice": (400, lambda u: f"{u}&code=x"),
    "iss twice": (400, lambda u: f"{u}&iss=x"),
    "code array": (404, lambda u: changed(u, state=["a"])),
    "NUL in code": (400, lambda u: changed(u, code="a\0b")),
    "NUL in state": (400, lambda u: changed(u, state="\0")),
    "not UTF-8": (400, lambda u: f"{u}&x=%ff"),
    "oversized": (400, lambda u: changed(u, code="x" * 9000)),
    "many fields": (400, lambda u: u + "".join(f"&a{n}=1" for n in range(60))),
    "non-ASCII state": (404, lambda u: changed(u, state="ü" * 20)),
    "other provider's path": (403, lambda u: u.replace("/auth/acme/", "/auth/zeta/")),
    "unknown provider's path": (403, lambda u: u.replace("/auth/acme/", "/auth/none/")),
    "other method's path": (403, lambda u: u.replace("/oauth2/", "/token/")),
    "other issuer": (403, lambda u: changed(u, iss="http://evil.example")),
    "issuer with a slash": (403, lambda u: changed(u, iss=query_of(u)["iss"] + "/")),
    "issuer left out": (403, lambda u: changed(u, iss=None)),
    "error of another issuer": (
        403,
        lambda u: changed(
            u, code=None, error="access_denied", iss="http://evil.example"
        ),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_answer_that_does_not_fit_is_refused_and_burns_nothing(
    pocket: PocketAuth, server: AuthorizationServer, alice: Browser, case: str
) -> None:
    """A page with a status, no token request, and the honest answer works afterwards."""
    callback = await answer_url(alice, await link(pocket, "read"))
    status, spoil = REFUSED[case]
    page = await deliver(spoil(callback))
    assert page.status_code == status
    assert is_bare(page)
    assert outcome_of(page)
    assert requests_at(server) == 0
    assert (await deliver(callback, follow_redirects=True)).status_code == 200
    assert await state(pocket, "read") == "SKIP_AUTH"


async def test_code_for_another_attempts_state_is_worthless(
    stored: PocketAuth, server: AuthorizationServer, alice: Browser
) -> None:
    """PKCE binds a code to its attempt; an injected one connects nobody."""
    mallory = await answer_url(
        Browser("mallory"), await link(stored, "read", thread_id="m")
    )
    honest = await answer_url(alice, await link(stored, "read", thread_id="a"))
    page = await deliver(changed(honest, code=query_of(mallory)["code"]))
    assert (page.status_code, outcome_of(page)) == (502, "failed")
    assert server.token_errors == {"invalid_grant": 1}
    assert not server.token_requests
    assert await state(stored, "read", thread_id="a") == "PENDING_RESOLVE"
    await connect(stored, alice, "read", thread_id="a")


async def test_answer_of_another_provider_stays_with_its_own(
    pocket: PocketAuth, server: AuthorizationServer, alice: Browser
) -> None:
    """Code and state of zeta, delivered at acme's callback, reach neither."""
    zeta = await answer_url(alice, await link(pocket, "read", provider="zeta"))
    assert (await deliver(zeta.replace("/zeta/", "/acme/"))).status_code == 403
    assert requests_at(server) == 0
    await deliver(zeta)
    assert await state(pocket, "read", provider="zeta") == "SKIP_AUTH"


async def test_late_answer_is_told_so(
    stored: PocketAuth,
    server: AuthorizationServer,
    alice: Browser,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An attempt lives ten minutes, its link on: opening it again works."""
    monkeypatch.setattr(
        "langchain_pocket_auth._clicks.ATTEMPT_TTL", timedelta(seconds=0.3)
    )
    url = await link(stored, "read")
    callback = await answer_url(alice, url)
    await asyncio.sleep(0.3)
    page = await deliver(callback)
    assert (page.status_code, outcome_of(page)) == (410, "expired")
    assert requests_at(server) == 0
    monkeypatch.undo()
    assert await link(stored, "read") == url
    await connect(stored, alice, "read")


async def test_expired_link_is_told_so(make_pocket: Make, alice: Browser) -> None:
    """A link past its lifetime shows 410 and starts nothing; a new one is made."""
    pocket = make_pocket(future_ttl=timedelta(seconds=0.3))
    url = await link(pocket, "read")
    await asyncio.sleep(0.3)
    for method in ("GET", "POST"):
        page = await deliver(url, method=method)
        assert (page.status_code, outcome_of(page)) == (410, "expired")
    assert await state(pocket, "read") == "NO_SESSION"
    assert await link(pocket, "read") != url


async def test_unknown_link_is_told_so(pocket: PocketAuth) -> None:
    """Guessing a ticket leads to one page, whatever the method."""
    url = await link(pocket, "read")
    for method in ("GET", "POST"):
        page = await deliver(url[:-1] + ("A" if url[-1] != "A" else "B"), method=method)
        assert (page.status_code, outcome_of(page)) == (404, "unknown")


# ----------------------------------------------------------------- refusals, failures


@pytest.mark.parametrize(
    "error", ["temporarily_unavailable", "server_error", "invalid_scope", "x" * 99]
)
async def test_error_answer_is_a_page_and_the_link_works_again(
    stored: PocketAuth, server: AuthorizationServer, alice: Browser, error: str
) -> None:
    """Errors of the provider end the attempt, not the link; repeated, they look the same."""
    url = await link(stored, "read")
    callback = await answer_url(alice, url)
    failed = changed(
        callback, code=None, error=error, error_description="<b>secret</b>"
    )
    transient = error in {"temporarily_unavailable", "server_error"}
    for _ in range(2):
        page = await deliver(failed)
        assert page.status_code == (503 if transient else 502)
        assert outcome_of(page) == ("unavailable" if transient else "failed")
        assert "secret" not in page.text
    assert requests_at(server) == 0
    assert await link(stored, "read") == url
    await connect(stored, alice, "read")


async def test_identical_denials_at_once_get_the_same_page(
    stored: PocketAuth, alice: Browser
) -> None:
    """A double click on Deny is no replay."""
    callback = await answer_url(alice, await link(stored, "read"), approve=False)
    pages = await asyncio.gather(
        *(deliver(callback, follow_redirects=True) for _ in range(5))
    )
    assert {(p.status_code, outcome_of(p)) for p in pages} == {(200, "declined")}


@pytest.mark.parametrize(
    "mode", [500, "invalid_grant", "invalid_client", "malformed", "reset", "error200"]
)
async def test_failed_exchange_is_a_page_and_the_link_works_again(
    stored: PocketAuth, server: AuthorizationServer, alice: Browser, mode: Any
) -> None:
    """The code is spent and never sent again; a new click gets a new one."""
    url = await link(stored, "read")
    callback = await answer_url(alice, url)
    server.fault(mode, times=1)
    for page in (await deliver(callback), await deliver(callback)):
        assert page.status_code in {502, 503}
        assert outcome_of(page) in {"failed", "unavailable"}
        assert is_bare(page)
    assert server.fired[str(mode)] == 1
    assert not server.token_requests
    assert await state(stored, "read") == "PENDING_RESOLVE"
    assert await link(stored, "read") == url
    await connect(stored, alice, "read")
    assert server.code_replays == 0


async def test_exchange_that_died_is_failed_in_the_end_and_its_code_never_sent_again(
    stored: PocketAuth,
    server: AuthorizationServer,
    alice: Browser,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same answer, delivered again, waits for the other process, then fails."""
    limit = timedelta(seconds=0.5)
    monkeypatch.setattr("langchain_pocket_auth._attempts.EXCHANGE_LIMIT", limit)
    url = await link(stored, "read")
    callback = await answer_url(alice, url)
    server.fault("slow", delay_s=0.3)
    answering = asyncio.create_task(deliver(callback))
    await asyncio.sleep(0.15)

    async def die(engine: Any) -> None:
        for task in engine.attempts._exchanges._running.values():
            task.cancel()

    await stored._service.ask(die)
    await asyncio.gather(answering, return_exceptions=True)
    pages = await asyncio.gather(*(deliver(callback) for _ in range(3)))
    assert {(p.status_code, outcome_of(p)) for p in pages} == {(502, "failed")}
    assert server.code_replays == 0
    assert not server.token_errors
    assert await link(stored, "read") == url
    await connect(stored, alice, "read")


async def test_exchange_that_runs_is_finished_before_closing(
    make_pocket: Make, server: AuthorizationServer, alice: Browser, tmp_path: Path
) -> None:
    """A code that is at the provider already is not thrown away."""
    base = f"http://127.0.0.1:{free_port()}"
    pocket = make_pocket(f"sqlite:///{tmp_path}/p.db", keys=KEYS, base_url=base)
    callback = await answer_url(alice, await link(pocket, "read"))
    server.fault("slow", delay_s=0.3)
    answering = asyncio.create_task(deliver(callback))
    await asyncio.sleep(0.1)
    await pocket.aclose()
    assert (await answering).status_code == 303
    assert await state(pocket, "read") == "SKIP_AUTH"


async def test_first_success_of_two_tabs_wins(
    stored: PocketAuth, server: AuthorizationServer, alice: Browser
) -> None:
    """Two attempts of one link do not disturb each other."""
    url = await link(stored, "read")
    tabs = [await answer_url(alice, url) for _ in range(2)]
    assert query_of(tabs[0])["state"] != query_of(tabs[1])["state"]
    pages = [await deliver(tab, follow_redirects=True) for tab in reversed(tabs)]
    assert [outcome_of(p) for p in pages] == ["connected"] * 2
    context = await connect_context(stored)
    assert context == server.issued_access_tokens[0]


async def connect_context(pocket: PocketAuth) -> str:
    """Return the stored access token."""
    context = await pocket.get_auth_context("acme")
    assert context is not None
    return context.access_token


@pytest.mark.parametrize("first", ["denial", "success"])
async def test_success_in_one_tab_outweighs_denial_in_the_other(
    stored: PocketAuth, alice: Browser, first: str
) -> None:
    """Whichever comes first, the account is connected in the end."""
    url = await link(stored, "read")
    no = await answer_url(alice, url, approve=False)
    yes = await answer_url(alice, url)
    order = [no, yes] if first == "denial" else [yes, no]
    pages = [await deliver(tab, follow_redirects=True) for tab in order]
    assert outcome_of(pages[-1]) == "connected"
    assert await state(stored, "read") == "SKIP_AUTH"


# --------------------------------------------------------------- who is not the person


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "POST", "PUT", "DELETE"])
async def test_other_methods_of_the_callback_change_nothing(
    pocket: PocketAuth, server: AuthorizationServer, alice: Browser, method: str
) -> None:
    """Only a browser's GET answers an attempt."""
    callback = await answer_url(alice, await link(pocket, "read"))
    page = await deliver(callback, method=method)
    assert page.status_code == 405
    assert is_bare(page)
    assert requests_at(server) == 0
    assert (await deliver(callback)).status_code == 303


@pytest.mark.parametrize("header", ["Sec-Purpose", "Purpose"])
async def test_prefetch_of_the_callback_changes_nothing(
    pocket: PocketAuth, server: AuthorizationServer, alice: Browser, header: str
) -> None:
    """A browser that loads ahead gets an empty answer."""
    callback = await answer_url(alice, await link(pocket, "read"))
    page = await deliver(callback, headers={header: "prefetch;prerender"})
    assert (page.status_code, page.content) == (204, b"")
    assert requests_at(server) == 0
    assert (await deliver(callback)).status_code == 303


async def test_link_scanners_start_and_use_up_nothing(
    pocket: PocketAuth, server: AuthorizationServer, alice: Browser
) -> None:
    """Chats and mail programs open every link; the person comes after them."""
    url = await link(pocket, "read")
    for method in ("GET", "GET", "GET", "GET", "GET", "HEAD", "OPTIONS"):
        page = await deliver(url, method=method)
        assert is_bare(page)
        assert page.status_code == (200 if method == "GET" else 405)
        assert server.issuer not in page.text
    assert outcome_of(await alice.avisit(url)) == "connected"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "none"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Origin": "SELF"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "null"}, 200),
        ({"Origin": "SELF"}, 200),
        ({}, 200),
    ],
)
async def test_other_sites_cannot_press_the_button(
    pocket: PocketAuth, headers: dict[str, str], status: int
) -> None:
    """Only our own page starts an attempt."""
    url = await link(pocket, "read")
    sent = {k: pocket.base_url if v == "SELF" else v for k, v in headers.items()}
    page = await deliver(url, method="POST", headers=sent)
    assert page.status_code == status
    assert ("/authorize?" in page.text) == (status == 200)


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "169.254.1.1", "[", ""]
)
async def test_foreign_host_names_are_refused(
    pocket: PocketAuth, server: AuthorizationServer, alice: Browser, host: str
) -> None:
    """DNS rebinding reaches this port under its own name, and gets nothing."""
    url = await link(pocket, "read")
    callback = await answer_url(alice, url)
    tries = [("GET", url), ("POST", url), ("GET", callback)]
    for method, target in tries:
        page = await deliver(target, method=method, headers={"Host": host})
        assert page.status_code == 421
        assert "read" not in page.text
    assert requests_at(server) == 0
    assert (await deliver(callback)).status_code == 303


async def test_redirect_uri_is_never_taken_from_the_request(
    pocket: PocketAuth, server: AuthorizationServer, alice: Browser
) -> None:
    """Host and X-Forwarded-* of a request do not steer where answers go."""
    url = await link(pocket, "read")
    forged = {
        "X-Forwarded-Host": "evil.example",
        "X-Forwarded-Proto": "https",
        "Forwarded": "host=evil.example",
        "Host": "localhost:1",
    }
    page = await deliver(url, method="POST", headers=forged)
    assert "evil.example" not in page.text
    assert (
        urlencode({"r": f"{pocket.base_url}/auth/acme/oauth2/callback"})[2:]
        in page.text
    )
    callback = await answer_url(alice, url)
    answer = await deliver(callback, headers=forged)
    assert answer.headers["Location"].startswith(f"{pocket.base_url}/connect/")


MARKUP = "\"'><script>alert(1)</script>&lt;{{7*7}}"


@pytest.mark.parametrize(
    "name", ["state", "code", "error", "error_description", "error_uri", "iss", "extra"]
)
async def test_markup_in_a_parameter_is_never_echoed(
    pocket: PocketAuth, alice: Browser, name: str
) -> None:
    """No page repeats anything that came in the query."""
    callback = await answer_url(alice, await link(pocket, "read"))
    drop = {"code": None} if name.startswith("error") else {}
    page = await deliver(
        changed(callback, **drop, **{name: MARKUP}), follow_redirects=True
    )
    for part in ("alert(1)", "7*7", "49"):
        assert part not in page.text
    assert is_bare(page)
    path = f"{pocket.base_url}/connect/%3Cscript%3Ealert(1)"
    assert "alert(1)" not in (await deliver(path)).text


async def test_every_answer_keeps_to_itself(pocket: PocketAuth, alice: Browser) -> None:
    """Pages, the redirect and answers for unknown paths carry the security headers."""
    url = await link(pocket, "read")
    callback = await answer_url(alice, url)
    answers = [
        await deliver(url),
        await deliver(url, method="POST"),
        await deliver(callback),
        await deliver(url),
        await deliver(f"{pocket.base_url}/nothing/here"),
        await deliver(f"{pocket.base_url}/"),
        await deliver(url, method="DELETE"),
    ]
    assert [a.status_code for a in answers] == [200, 200, 303, 200, 404, 404, 405]
    for answer in answers:
        assert is_bare(answer)
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        assert "server" not in answer.headers


# ----------------------------------------------------------------------- the servers


async def test_taken_port_is_an_error_before_any_link(
    make_pocket: Make, alice: Browser
) -> None:
    """Never another port in silence; when it is free again all is well."""
    port = free_port()
    pocket = make_pocket(base_url=f"http://127.0.0.1:{port}")
    with socket.create_server(("127.0.0.1", port)):
        for _ in range(2):
            with pytest.raises(CallbackServerError, match=f"127.0.0.1:{port}"):
                await link(pocket, "read")
        assert await state(pocket, "read") == "NO_SESSION"
    await connect(pocket, alice, "read")


async def test_server_stops_and_starts_cleanly(
    make_pocket: Make, alice: Browser
) -> None:
    """After `aclose` the port is free at once; the same pocket listens again."""
    port = free_port()
    pocket = make_pocket(base_url=f"http://127.0.0.1:{port}")
    for _ in range(3):
        url = await link(pocket, "read")
        async with httpx.AsyncClient(timeout=BOUND_S, verify=False) as idle:
            await idle.get(url)  # keeps its connection open
            async with asyncio.timeout(2):
                await pocket.aclose()
        with socket.create_server(("127.0.0.1", port)):
            pass


async def test_server_listens_on_this_machine_only(make_pocket: Make) -> None:
    """`localhost` in the URL does not widen what is bound."""
    port = free_port()
    pocket = make_pocket(base_url=f"http://localhost:{port}")
    await pocket.serve()
    text = await asyncio.to_thread(Path("/proc/net/tcp").read_text)
    listening = {f[1] for f in map(str.split, text.splitlines()[1:]) if f[3] == "0A"}
    assert f"0100007F:{port:04X}" in listening
    assert f"00000000:{port:04X}" not in listening


@contextlib.contextmanager
def served(app: Any, port: int) -> Iterator[None]:
    """Serve an app as its owner would: uvicorn, a thread, a loop, an access log."""
    config = uvicorn.Config(
        app, host="127.0.0.1", port=port, lifespan="off", log_config=None
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            threading.Event().wait(0.005)
        yield
    finally:
        server.should_exit = True
        thread.join(BOUND_S)


async def test_router_in_the_apps_own_server_works_the_same(
    make_pocket: Make, server: AuthorizationServer, alice: Browser, tmp_path: Path
) -> None:
    """Mounted, on another thread's loop, with no background server beside it."""
    port = free_port()
    pocket = make_pocket(
        f"sqlite:///{tmp_path}/p.db", keys=KEYS, base_url=f"http://127.0.0.1:{port}"
    )
    app = FastAPI()
    app.include_router(pocket.router)
    assert app.openapi()["paths"] == {}
    with served(app, port):
        url = await link(pocket, "read")
        callback = await answer_url(alice, url)
        assert (await deliver(changed(callback, iss="x"))).status_code == 403
        assert (await deliver(callback, method="HEAD")).status_code == 405
        pages = await asyncio.gather(
            *(deliver(callback, follow_redirects=True) for _ in range(5))
        )
        assert {(p.status_code, outcome_of(p)) for p in pages} == {(200, "connected")}
        assert await state(pocket, "read") == "SKIP_AUTH"
    assert server.token_requests == {"authorization_code": 1}


@pytest.mark.parametrize("mounted", [True, False])
async def test_no_access_log_shows_a_code(
    make_pocket: Make, server: AuthorizationServer, alice: Browser, mounted: bool
) -> None:
    """Neither in the app's own server nor in ours, honest callbacks or others."""
    port = free_port()
    pocket = make_pocket(base_url=f"http://127.0.0.1:{port}")
    with contextlib.ExitStack() as stack:
        if mounted:
            app = FastAPI()
            app.include_router(pocket.router)
            stack.enter_context(served(app, port))
        watch = stack.enter_context(LeakWatch())
        logging.getLogger("uvicorn.access").setLevel(logging.DEBUG)
        callback = await answer_url(alice, await link(pocket, "read"))
        for method in ("HEAD", "OPTIONS", "POST"):
            await deliver(callback, method=method)
        await deliver(callback, headers={"Host": "evil.example"})
        await deliver(callback, headers={"Sec-Purpose": "prefetch"})
        await deliver(f"{callback}&code=2")
        await deliver(callback)
        assert await state(pocket, "read") == "SKIP_AUTH"
        await pocket.aclose()
    secret = [*server.issued_codes, query_of(callback)["state"], "acme-secret"]
    watch.assert_clean([*secret, *server.issued_access_tokens])
    if mounted:
        assert any("/auth/acme/oauth2/callback" in text for text in watch.collected)


async def test_proxy_of_the_environment_is_not_asked_for_this_machine(
    pocket: PocketAuth, alice: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is elsewhere is reached through it; a provider on loopback directly."""
    asked: list[bytes] = []

    async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readline())
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(proxy, "127.0.0.1", 0) as listening:
        host, port = listening.sockets[0].getsockname()
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
            value = "" if name == "NO_PROXY" else f"http://{host}:{port}"
            monkeypatch.setenv(name, value)
            monkeypatch.setenv(name.lower(), value)
        await connect(pocket, alice, "read")
        http = Http()
        for place in ("127.0.0.1", "localhost", "[::1]"):
            with pytest.raises(ProviderUnavailable):
                await http.request(
                    "POST", f"http://{place}:{free_port()}", provider="p"
                )
        assert asked == []
        with pytest.raises(ProviderUnavailable):
            await http.request("POST", "http://elsewhere.example/", provider="p")
        await http.close()
    assert asked == [b"POST http://elsewhere.example/ HTTP/1.1\r\n"]


async def test_newer_pocket_of_the_same_store_takes_the_port_over(
    make_pocket: Callable[..., PocketAuth], alice: Browser, tmp_path: Path
) -> None:
    """A notebook cell may be run again; links that are out still work."""
    settings = {"storage": f"sqlite:///{tmp_path}/sessions.db", "keys": KEYS}
    old = make_pocket(**settings)
    url = await link(old, "read")
    new = make_pocket(base_url=old.base_url, **settings)
    assert await link(new, "read") == url
    assert (await alice.avisit(url)).status_code == 200
    assert (await token(old, "read")).access_token
    assert await link(old, "write")  # the older one lets the newer one serve
    await new.aclose()
    page = await alice.avisit(await link(old, "write"))
    assert page.status_code == 200
    assert (await token(old, "write")).access_token


async def test_pocket_of_another_store_does_not_take_the_port_over(
    make_pocket: Callable[..., PocketAuth],
) -> None:
    """Its links would lead nowhere: the error names what to close."""
    old = make_pocket()
    await link(old, "read")
    with pytest.raises(CallbackServerError, match=r"pocket\.close"):
        await link(make_pocket(base_url=old.base_url), "read")
