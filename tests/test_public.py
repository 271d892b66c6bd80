"""Many users: who may open a link, who may answer it, and how much of it."""

import asyncio
import contextlib
import ipaddress
import json
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlencode, urlsplit

import httpx
import pytest
import uvicorn
from conftest import ACME, provider
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from fastapi import APIRouter, Cookie, Depends, FastAPI, Header, HTTPException, Request
from fastapi.responses import PlainTextResponse, RedirectResponse
from support import BOUND_S, KEYS, link, outcome_of, query_of, state
from test_callbacks import changed, is_bare, requests_at
from typer.testing import CliRunner

from langchain_pocket_auth import (
    CallbackServerError,
    ConfigurationError,
    FutureStore,
    OAuth2Handler,
    Owner,
    PocketAuth,
)
from langchain_pocket_auth.cli import make_app
from langchain_pocket_auth.server._limits import Counter, Limits
from langchain_pocket_auth.server._visitors import COOKIE, POSTED_COOKIE
from langchain_pocket_auth.testing import AuthorizationServer, Browser, free_port
from langchain_pocket_auth.testing._navigation import Navigation
from langchain_pocket_auth.testing._outside import outside

Make = Callable[..., PocketAuth]
FORGED = {
    "Host": "evil.example",
    "X-Forwarded-Host": "evil.example",
    "X-Forwarded-Proto": "http",
    "X-Forwarded-Prefix": "/evil",
    "X-Forwarded-For": "198.41.0.4",
    "Forwarded": "host=evil.example;proto=http;for=198.41.0.4",
}


# ------------------------------------------------------------- an app, and its persons


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a certificate of this machine, with its key, that signed itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "pocket-auth test")])
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = tmp_path_factory.mktemp("tls") / "both.pem"
    form = serialization.PrivateFormat.PKCS8
    pem, nothing = serialization.Encoding.PEM, serialization.NoEncryption()
    file.write_bytes(made.public_bytes(pem) + key.private_bytes(pem, form, nothing))
    return file


def signed_in(who: Annotated[str | None, Cookie()] = None) -> str | None:
    """Say who is signed in, as an app with a session cookie does."""
    return who


@pytest.fixture
def make_public(server: AuthorizationServer) -> Iterator[Make]:
    """Make pockets for many users; they are closed at the end."""
    made: list[PocketAuth] = []

    def make(path: str = "", **settings: Any) -> PocketAuth:
        url = f"https://127.0.0.1:{free_port()}{path}"
        server.register(
            client_id=ACME[0],
            client_secret=ACME[1],
            redirect_uris=[f"{url}/auth/acme/oauth2/callback"],
        )
        if "confirm" not in settings:
            settings.setdefault("verify_user", signed_in)
        rows = [
            provider(server, "acme", **settings.pop("facts", {})),
            *settings.pop("providers", ()),
        ]
        pocket = PocketAuth(
            settings.pop("storage", "memory://"),
            public_url=url,
            providers=rows,
            clients={"acme": ACME},
            **settings,
        )
        made.append(pocket)
        return pocket

    yield make
    for pocket in made:
        pocket.close()


def web_app(router: APIRouter, prefix: str = "") -> FastAPI:
    """Return an app with a session cookie that serves a pocket's pages."""
    app = FastAPI()

    @app.get("/sign-in/{name}")
    def sign_in(name: str, same_site: Any = "lax") -> PlainTextResponse:
        response = PlainTextResponse("hello")
        response.set_cookie("who", name, secure=True, samesite=same_site)
        return response

    app.include_router(router, prefix=prefix)
    return app


@contextlib.contextmanager
def served(
    app: Any, at: str, certificate: Path | None = None, **settings: Any
) -> Iterator[str]:
    """Serve an app with uvicorn, in a thread; with a certificate over https."""
    config = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=urlsplit(at).port or 0,
        ssl_certfile=certificate,
        lifespan="off",
        log_config=None,
        **settings,
    )
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    try:
        while not running.started:
            threading.Event().wait(0.005)
        yield at
    finally:
        running.should_exit = True
        thread.join(BOUND_S)


@pytest.fixture
def person(certificate: Path) -> Callable[..., Browser]:
    """Make persons, each with a browser of their own, signed in to an app or not."""

    def make(
        name: str, at: PocketAuth | None = None, same_site: str = "lax"
    ) -> Browser:
        browser = Browser(name, certificate=certificate)
        if at is not None:
            sign_in(browser, at, name, same_site)
        return browser

    return make


def sign_in(
    browser: Browser, at: PocketAuth, name: str, same_site: str = "lax"
) -> None:
    """Sign in to the app that serves a pocket."""
    hello = browser.open(f"{at.base_url}/sign-in/{name}?same_site={same_site}")
    assert hello.text == "hello"


@pytest.fixture
def shop(make_public: Make, certificate: Path) -> Iterator[PocketAuth]:
    """Return a pocket that is served over https by an app with a sign-in."""
    pocket = make_public()
    with served(web_app(pocket.router), pocket.base_url, certificate):
        yield pocket


async def link_of(pocket: PocketAuth, owner: str = "alice") -> str:
    """Return a connect link that is for somebody."""
    return await link(pocket, "read", owner=owner)


def seen(browser: Browser, url: str) -> tuple[int, str]:
    """Return status and outcome of what a browser gets."""
    page = browser.open(url)
    return page.status_code, outcome_of(page)


def pressed(browser: Browser, url: str, **form: str) -> httpx.Response:
    """Press a button of the page at an address, without looking at the page."""
    headers = {"Sec-Fetch-Site": "same-origin", "Origin": "null"}
    with outside():
        return browser._http.post(url, headers=headers, data=form or None)


def visits(app: Any, address: str | None = None) -> httpx.AsyncClient:
    """Return a client of an app, without a network between them."""
    transport = httpx.ASGITransport(app, client=(address or "127.0.0.1", 1))
    return httpx.AsyncClient(transport=transport, base_url="https://127.0.0.1")


PRESS = {"Sec-Fetch-Site": "same-origin"}


# ---------------------------------------------------------------------- the right ones


async def test_signed_in_owner_connects(
    shop: PocketAuth, server: AuthorizationServer, person: Callable[..., Browser]
) -> None:
    """The whole way over https; only the POST sets the cookie, with every guard."""
    url = await link_of(shop)
    assert url.startswith(f"{shop.base_url}/connect/")
    alice = person("alice", shop)
    page = await asyncio.to_thread(alice.open, url)
    assert "set-cookie" not in page.headers
    page = await asyncio.to_thread(pressed, alice, url)
    (cookie,) = page.headers.get_list("set-cookie")
    value, *guards = cookie.split("; ")
    assert re.fullmatch(r"__Host-pocket-auth=[\w-]{43}", value)
    assert {g.lower() for g in guards} == {
        *("secure", "httponly", "path=/", "samesite=lax")
    }
    again = await asyncio.to_thread(pressed, alice, url)
    assert again.headers["set-cookie"].startswith(value)  # for what other tabs began
    assert outcome_of(await alice.avisit(url)) == "connected"
    assert await state(shop, "read", owner="alice") == "SKIP_AUTH"
    assert await state(shop, "read", owner="bob") == "NO_SESSION"
    assert server.token_requests == {"authorization_code": 1}


async def test_who_is_not_signed_in_is_asked_to_and_then_connects(
    shop: PocketAuth, server: AuthorizationServer, person: Callable[..., Browser]
) -> None:
    """Neither look nor press begins anything."""
    url, stranger = await link_of(shop), person("alice")
    assert await asyncio.to_thread(seen, stranger, url) == (401, "sign_in")
    page = await asyncio.to_thread(pressed, stranger, url)
    assert (page.status_code, outcome_of(page)) == (401, "sign_in")
    assert "set-cookie" not in page.headers
    assert server.issuer not in page.text
    stranger.open(f"{shop.base_url}/sign-in/alice")
    assert outcome_of(await stranger.avisit(url)) == "connected"


async def test_link_that_was_sent_on_connects_nobody(
    shop: PocketAuth, server: AuthorizationServer, person: Callable[..., Browser]
) -> None:
    """Mallory's link in Bob's browser: he reads that it is not his, and no more."""
    url = await link_of(shop, "mallory")
    bob, mallory = person("bob", shop), person("mallory", shop)
    for page in (
        await asyncio.to_thread(bob.open, url),
        await asyncio.to_thread(pressed, bob, url),
    ):
        assert (page.status_code, outcome_of(page)) == (403, "wrong_person")
        assert "bob" in page.text
        assert not re.search("mallory|acme|read", page.text, re.IGNORECASE)
        assert "set-cookie" not in page.headers
        assert is_bare(page)
    assert requests_at(server) == 0
    assert outcome_of(await mallory.avisit(url)) == "connected"
    assert await asyncio.to_thread(seen, bob, url) == (403, "wrong_person")


@pytest.mark.parametrize("who", ["bob", "bob at hers", "alice elsewhere", "nobody"])
async def test_answer_from_another_person_or_browser_is_refused_and_burns_nothing(
    shop: PocketAuth,
    server: AuthorizationServer,
    person: Callable[..., Browser],
    who: str,
) -> None:
    """The provider's answer counts where it was asked for, and nowhere else."""
    alice = person("alice", shop)
    callback = await asyncio.to_thread(alice.authorize, await link_of(shop))
    other = person(who.split(maxsplit=1)[0], None if who == "nobody" else shop)
    if who == "bob":  # with a cookie of ours, from a start of his own
        await asyncio.to_thread(pressed, other, await link_of(shop, "bob"))
    elif who == "bob at hers":
        other = alice
        await asyncio.to_thread(sign_in, alice, shop, "bob")
    why = "wrong_person" if other is alice else "mismatch"
    assert await asyncio.to_thread(seen, other, callback) == (403, why)
    await asyncio.to_thread(sign_in, alice, shop, "alice")
    assert requests_at(server) == 0
    assert await state(shop, "read", owner="alice") == "PENDING_RESOLVE"
    assert outcome_of(await alice.avisit(callback)) == "connected"


@pytest.mark.parametrize("own_answer", [False, True])
async def test_session_cookie_that_stays_behind_costs_one_more_press(
    make_public: Make,
    server: AuthorizationServer,
    certificate: Path,
    person: Callable[..., Browser],
    own_answer: bool,
) -> None:
    """`SameSite=Strict`: nobody comes back from the provider, then Alice says it was she."""
    shop = make_public(verify_user=refuses if own_answer else signed_in)
    with served(web_app(shop.router), shop.base_url, certificate):
        await strict(shop, server, person, own_answer)


async def strict(
    shop: PocketAuth,
    server: AuthorizationServer,
    person: Callable[..., Browser],
    own_answer: bool,
) -> None:
    """Connect with a session cookie that does not come along from elsewhere."""
    url = await link_of(shop)
    alice = person("alice", shop, same_site="strict")
    page = await alice.avisit(url)
    assert page.status_code == 401
    assert outcome_of(page) == ("" if own_answer else "sign_in")
    assert server.token_requests == {"authorization_code": 1}  # codes do not wait
    assert await state(shop, "read", owner="alice") == "PENDING_RESOLVE"
    page = await asyncio.to_thread(alice.open, url)
    assert "Finish connecting" in page.text
    for form in ({"finish": "2"}, {"finish": "1", "x": "1"}, {"x": "1"}):
        page = await asyncio.to_thread(lambda f: pressed(alice, url, **f), form)
        assert (page.status_code, outcome_of(page)) == (400, "malformed")
    bob = person("bob", shop)
    page = await asyncio.to_thread(lambda: pressed(bob, url, finish="1"))
    assert (page.status_code, outcome_of(page)) == (403, "mismatch")
    assert outcome_of(await alice.avisit(url)) == "connected"
    assert await state(shop, "read", owner="alice") == "SKIP_AUTH"


async def test_code_is_shown_to_the_browser_that_agreed_and_to_no_other(
    make_public: Make, certificate: Path, person: Callable[..., Browser]
) -> None:
    """Where nobody signs in: whom Mallory sends her link reads what the code is for."""
    pocket = make_public(confirm="code", app_name="Acme Bot")
    with served(web_app(pocket.router), pocket.base_url, certificate):
        url, bob = await link_of(pocket, "mallory"), person("bob")
        page = await bob.avisit(url)
        assert (page.status_code, outcome_of(page)) == (200, "code")
        assert re.search(r"<bdi>[A-Z2-9]{4}-[A-Z2-9]{4}</bdi>", page.text)
        assert "Type it into your own chat" in page.text
        assert "to nobody: whoever has it" in " ".join(page.text.split())
        assert page.headers["Cache-Control"] == "no-store"
        assert str(page.url) == url
        for other in (person("mallory"), person("scanner")):
            assert await asyncio.to_thread(seen, other, url) == (200, "pending")
        # Nor after a start of her own.
        mallory = person("mallory")
        await asyncio.to_thread(pressed, mallory, url)
        assert await asyncio.to_thread(seen, mallory, url) == (200, "pending")
        assert await asyncio.to_thread(seen, bob, url) == (200, "code")
    assert await state(pocket, "read", owner="mallory") == "PENDING_RESOLVE"


async def test_account_that_the_app_does_not_take_can_be_changed(
    make_public: Make,
    server: AuthorizationServer,
    certificate: Path,
    person: Callable[..., Browser],
) -> None:
    """The page says so, and its button begins again."""
    taken: list[bool] = [False, True]
    pocket = make_public(account_matcher=lambda owner, context: taken.pop(0))
    with served(web_app(pocket.router), pocket.base_url, certificate):
        url, alice = await link_of(pocket), person("alice", pocket)
        page = await alice.avisit(url)
        assert (page.status_code, outcome_of(page)) == (403, "wrong_account")
        assert f'action="{url}"' in page.text
        assert await state(pocket, "read", owner="alice") == "PENDING_RESOLVE"
        page = await asyncio.to_thread(pressed, alice, url)
        assert "/authorize?" in page.text
        assert outcome_of(await alice.avisit(url)) == "connected"
    assert taken == []


# -------------------------------------------------------------- how an app may say who


def from_header(x_user: Annotated[str, Header()]) -> str:
    return x_user


def required_cookie(who: Annotated[str, Cookie()]) -> str:
    return who


async def from_request(request: Request) -> str | None:
    assert asyncio.get_running_loop() is request.app.state.loop
    return request.cookies.get("who")


async def with_cleanup(who: Annotated[str | None, Cookie()] = None) -> Any:
    yield who


def of_a_dependency(who: Annotated[str | None, Depends(signed_in)]) -> Owner | None:
    return Owner("user", who) if who else None


def refuses(request: Request) -> str:
    if (who := request.cookies.get("who")) is None:
        raise HTTPException(401, "who are you?", {"WWW-Authenticate": "Basic"})
    return who


def sends_to_login(request: Request) -> str:
    if (who := request.cookies.get("who")) is None:
        location = f"/login?{urlencode({'next': request.url.path})}"
        raise HTTPException(303, headers={"Location": location})
    return who


def named_cookie(name: str, request: Request) -> str | None:
    return request.cookies.get(name)


class NotSignedInError(Exception):
    """Of an app that answers it with a handler of its own."""


def raises_its_own(request: Request) -> str:
    if (who := request.cookies.get("who")) is None:
        raise NotSignedInError
    return who


class Callable_:  # noqa: N801
    async def __call__(self, who: Annotated[str | None, Cookie()] = None) -> str | None:
        return who


STYLES: dict[str, tuple[Any, int]] = {
    "function with a cookie": (signed_in, 401),
    "cookie that has to be there": (required_cookie, 401),
    "header": (from_header, 401),
    "coroutine of the request": (from_request, 401),
    "generator": (with_cleanup, 401),
    "dependency of another": (of_a_dependency, 401),
    "object": (Callable_(), 401),
    "partial": (partial(named_cookie, "who"), 401),
    "HTTPException": (refuses, 401),
    "way to a login page": (sends_to_login, 303),
    "exception with a handler": (raises_its_own, 307),
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("mounted", [False, True])
async def test_app_says_who_is_signed_in_as_fastapi_dependencies_do(
    make_public: Make, style: str, mounted: bool
) -> None:
    """Any dependency will do, and what it answers itself is the answer."""
    verify_user, status = STYLES[style]
    pocket = make_public(verify_user=verify_user)
    app = web_app(pocket.router)
    app.state.loop = asyncio.get_running_loop()

    @app.exception_handler(NotSignedInError)
    def login(request: Request, error: Exception) -> RedirectResponse:
        return RedirectResponse("/login")

    path = urlsplit(await link_of(pocket)).path
    outer = app
    if mounted:
        outer = FastAPI()
        outer.mount("/sub", app)
        path = f"/sub{path}"
    async with visits(outer) as browser:
        for method in ("GET", "POST"):
            nobody = await browser.request(method, path, headers=PRESS)
            # A person comes back to a page, not to what was posted.
            away = method == "POST" and status == 307
            assert nobody.status_code == (303 if away else status)
            assert "alice" not in nobody.text
        if style == "HTTPException":
            assert nobody.json() == {"detail": "who are you?"}
            assert nobody.headers["WWW-Authenticate"] == "Basic"
        elif style == "way to a login page":
            assert nobody.headers["location"].startswith(pocket.base_url)
            nobody = await browser.get(path)
            assert nobody.headers["location"] == f"/login?{urlencode({'next': path})}"
        elif status == 401:
            assert outcome_of(nobody) == "sign_in"
        statuses = {}
        for name in ("alice", "bob"):
            cookies = {"Cookie": f"who={name}", "X-User": name}
            for method in ("GET", "POST"):
                page = await browser.request(method, path, headers=cookies | PRESS)
                statuses[name, method] = page.status_code, outcome_of(page)
    assert statuses == {
        ("alice", "GET"): (200, "pending"),
        ("alice", "POST"): (200, "pending"),
        ("bob", "GET"): (403, "wrong_person"),
        ("bob", "POST"): (403, "wrong_person"),
    }


async def test_apps_tests_can_put_another_in_its_place(make_public: Make) -> None:
    """`app.dependency_overrides` holds for `verify_user`, too."""
    pocket = make_public()
    app = web_app(pocket.router)
    path = urlsplit(await link_of(pocket)).path
    async with visits(app) as browser:
        assert (await browser.get(path)).status_code == 401
        app.dependency_overrides[signed_in] = lambda: "alice"
        assert (await browser.get(path)).status_code == 200


@pytest.mark.parametrize("wrong", [lambda: 42, lambda request: "alice"])
async def test_wrong_verify_user_lets_nobody_in_and_says_why(
    make_public: Make, caplog: pytest.LogCaptureFixture, wrong: Any
) -> None:
    """An id that is no string, a parameter that FastAPI cannot fill: the log tells."""
    pocket = make_public(verify_user=wrong)
    async with visits(web_app(pocket.router)) as browser:
        page = await browser.get(urlsplit(await link_of(pocket)).path)
    assert (page.status_code, outcome_of(page)) == (502, "failed")
    assert "verify_user=" in caplog.text


def test_function_that_is_no_dependency_is_refused_before_any_request(
    make_public: Make,
) -> None:
    """FastAPI cannot fill a parameter of such a type."""

    def asks_for_the_pocket(pocket: PocketAuth) -> str:
        return "alice"

    with pytest.raises(ConfigurationError, match="verify_user="):
        _ = make_public(verify_user=asks_for_the_pocket).router


async def test_failure_of_the_app_is_the_apps(make_public: Make) -> None:
    """What else `verify_user` raises reaches the app's own handlers."""

    def broken() -> str:
        raise ZeroDivisionError

    pocket = make_public(verify_user=broken)
    path = urlsplit(await link_of(pocket)).path
    with pytest.raises(ZeroDivisionError):
        async with visits(web_app(pocket.router)) as browser:
            await browser.get(path)


# ---------------------------------------------------------------- what is no person


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site", "Origin": "SELF"}, 403),
        ({"Sec-Fetch-Site": "none"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({}, 403),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "null"}, 200),
        ({"Origin": "SELF"}, 200),
    ],
)
async def test_other_sites_cannot_press_the_button(
    make_public: Make, headers: dict[str, str], status: int
) -> None:
    """Only our own page begins an attempt, and says so in every browser."""
    pocket = make_public()
    path = urlsplit(await link_of(pocket)).path
    sent = {k: pocket.base_url if v == "SELF" else v for k, v in headers.items()}
    async with visits(web_app(pocket.router)) as browser:
        page = await browser.post(path, headers={"Cookie": "who=alice"} | sent)
    assert page.status_code == status
    assert ("/authorize?" in page.text) == (status == 200)
    assert ("set-cookie" in page.headers) == (status == 200)


async def test_link_scanners_begin_and_use_up_nothing(
    shop: PocketAuth, server: AuthorizationServer, person: Callable[..., Browser]
) -> None:
    """Whatever loads every link, prefetches or asks for options, comes before Alice."""
    url, alice = await link_of(shop), person("alice", shop)
    callback = await asyncio.to_thread(alice.authorize, url)

    def scan() -> Iterator[httpx.Response]:
        with outside():
            for target in (url, callback):
                for method in ("HEAD", "OPTIONS", "PUT", "DELETE"):
                    yield alice._http.request(method, target)
                yield alice._http.get(target, headers={"Sec-Purpose": "prefetch"})

    for page in await asyncio.to_thread(lambda: list(scan())):
        assert page.status_code in {200, 204, 405}
        assert "set-cookie" not in page.headers
    assert requests_at(server) == 0
    assert outcome_of(await alice.avisit(callback)) == "connected"


# ----------------------------------------------------------- what an app's handlers do


async def test_third_partys_callback_runs_for_the_right_person_only(
    make_public: Make,
    server: AuthorizationServer,
    certificate: Path,
    person: Callable[..., Browser],
) -> None:
    """Its endpoint does not even run for Bob, or in another browser of Alice's."""
    theirs, codes = APIRouter(prefix="/acme"), []

    @theirs.get("/oauth2/callback")
    async def answered(code: str, state: str) -> PlainTextResponse:
        codes.append(code)
        FutureStore.resolve_future(state, code)
        return PlainTextResponse("thank you")

    own = {"row": provider(server, "acme"), "router": theirs}
    pocket = make_public(handlers=[type("Own", (OAuth2Handler,), own)])
    with served(web_app(pocket.router), pocket.base_url, certificate):
        alice, bob = person("alice", pocket), person("bob", pocket)
        hers = await link_of(pocket)
        callback = await asyncio.to_thread(alice.authorize, hers)
        denial = changed(callback, code=None, error="access_denied")
        await asyncio.to_thread(pressed, bob, await link_of(pocket, "bob"))
        for url in (callback, denial):
            for other in (bob, person("alice", pocket), person("nobody")):
                assert await asyncio.to_thread(seen, other, url) == (403, "mismatch")
            await asyncio.to_thread(sign_in, alice, pocket, "bob")
            assert await asyncio.to_thread(seen, alice, url) == (403, "wrong_person")
        assert codes == []
        alice.cookies.delete("who")  # as one that did not come along
        assert (await asyncio.to_thread(alice.open, callback)).text == "thank you"
        assert await state(pocket, "read", owner="alice") == "PENDING_RESOLVE"
        await asyncio.to_thread(sign_in, alice, pocket, "alice")
        assert outcome_of(await alice.avisit(hers)) == "connected"
    assert codes == server.issued_codes
    assert await state(pocket, "read", owner="alice") == "SKIP_AUTH"


async def test_form_is_the_right_persons_only(
    make_public: Make, certificate: Path, person: Callable[..., Browser]
) -> None:
    """What is typed by somebody else, or in another browser, is not even read."""
    pocket = make_public()
    with served(web_app(pocket.router), pocket.base_url, certificate):
        alice, bob = person("alice", pocket), person("bob", pocket)
        url = await link(pocket, provider="openai", owner="alice")
        page = await asyncio.to_thread(pressed, alice, url)
        form = page.headers["location"]
        assert form.startswith(f"{pocket.base_url}/auth/openai/token/form?")
        await asyncio.to_thread(pressed, bob, await link_of(pocket, "bob"))
        typed = {"attempt": query_of(form)["state"], "token": "sk-bobs-own-key"}
        for other in (bob, person("alice", pocket), person("nobody")):
            assert (await asyncio.to_thread(other.open, form)).status_code == 403
            page = await asyncio.to_thread(
                lambda b: pressed(b, form.partition("?")[0], **typed), other
            )
            assert page.status_code == 403
            assert "bobs" not in page.text
        await asyncio.to_thread(sign_in, alice, pocket, "bob")
        assert await asyncio.to_thread(seen, alice, form) == (403, "wrong_person")
        alice.cookies.delete("who")
        assert await asyncio.to_thread(seen, alice, form) == (401, "sign_in")
        await asyncio.to_thread(sign_in, alice, pocket, "alice")
        alice.fields["token"] = "sk-of-alice"
        assert outcome_of(await alice.avisit(form)) == "connected"
    context = await pocket.get_auth_context("openai", owner="alice")
    assert context is not None
    assert context.access_token == "sk-of-alice"


async def test_answer_that_a_providers_page_posts_finds_its_browser(
    make_public: Make,
    server: AuthorizationServer,
    certificate: Path,
    person: Callable[..., Browser],
) -> None:
    """A second cookie comes along from other sites; the app's own session does not."""
    posts = {"response_mode": "form_post"}
    pocket = make_public(facts={"authorization_parameters": posts})
    with served(web_app(pocket.router), pocket.base_url, certificate):
        url, alice = await link_of(pocket), person("alice", pocket)
        callback = await asyncio.to_thread(alice.authorize, url)
        (lax, posted) = (alice.cookies[n] for n in (COOKIE, POSTED_COOKIE))
        assert lax == posted
        answer = Navigation(
            callback.partition("?")[0],
            initiator=server.issuer,
            method="POST",
            data=query_of(callback),
            origin=server.issuer,
            site="cross-site",
        )
        stranger = person("alice", pocket)
        page = await asyncio.to_thread(stranger._load, answer)
        assert (page.status_code, outcome_of(page)) == (403, "mismatch")
        page = await asyncio.to_thread(alice._load, answer)
        assert (page.status_code, page.headers["location"]) == (303, url)
        assert outcome_of(await alice.avisit(url)) == "connected"


# -------------------------------------------------------------------- proxies and paths


class Proxy:
    """What stands in front: ends TLS, may take a path away, adds its headers."""

    def __init__(self, inner: str, *, strips: str = "") -> None:
        self._inner, self._strips = inner, strips

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = (await receive())["body"]
        path = scope["path"].removeprefix(self._strips)
        headers = [(k.decode(), v.decode()) for k, v in scope["headers"]]
        headers = [(k, v) for k, v in headers if k != "host"]
        with outside():
            async with httpx.AsyncClient(timeout=BOUND_S, verify=False) as http:
                answer = await http.request(
                    scope["method"],
                    f"{self._inner}{path}?{scope['query_string'].decode()}",
                    headers=[*headers, *FORGED.items()],
                    content=body,
                )
        drop = {"content-encoding", "transfer-encoding", "content-length"}
        given = [
            (k, v) for k, v in answer.headers.raw if k.decode().lower() not in drop
        ]
        start = {"type": "http.response.start", "status": answer.status_code}
        await send(start | {"headers": given})
        await send({"type": "http.response.body", "body": answer.content})


LAYOUTS: dict[str, Callable[[PocketAuth, str], tuple[FastAPI, str, dict[str, Any]]]]
LAYOUTS = {
    "strips": lambda p, path: (web_app(p.router), path, {}),
    "strips, root_path": lambda p, path: (web_app(p.router), path, {"root_path": path}),
    "does not strip": lambda p, path: (web_app(p.router), "", {}),
    "does not strip, prefix": lambda p, path: (web_app(p.router, path), "", {}),
    "mounted": lambda p, path: (mounted_at(path, web_app(p.router)), "", {}),
}


def mounted_at(path: str, app: FastAPI) -> FastAPI:
    """Return an app that has another one below a path."""
    outer = FastAPI()
    outer.mount(path, app)
    return outer


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_address_comes_from_public_url_whatever_the_proxy_does(
    make_public: Make,
    server: AuthorizationServer,
    certificate: Path,
    person: Callable[..., Browser],
    layout: str,
) -> None:
    """A round trip; `Host` and `X-Forwarded-*` steer nothing, wherever they come from."""
    pocket = make_public("/agents")
    app, strips, settings = LAYOUTS[layout](pocket, "/agents")
    inner, at = f"http://127.0.0.1:{free_port()}", urlsplit(pocket.base_url)
    front = f"{at.scheme}://{at.netloc}"
    with (
        served(app, inner, **settings),
        served(Proxy(inner, strips=strips), front, certificate),
    ):
        url, alice = await link_of(pocket), person("alice")
        alice.cookies.set("who", "alice", domain="127.0.0.1")
        page = await asyncio.to_thread(pressed, alice, url)
        redirect_uri = f"{pocket.base_url}/auth/acme/oauth2/callback"
        assert urlencode({"redirect_uri": redirect_uri}) in page.text
        assert "evil" not in page.text
        callback = await asyncio.to_thread(alice.authorize, url)
        assert callback.startswith(redirect_uri)
        for slashed in (f"{url}/", f"{url}/?x=1", callback.replace("?", "/?")):
            page = await asyncio.to_thread(alice.open, slashed)
            assert (page.status_code, outcome_of(page)) == (404, "unknown")
        page = await asyncio.to_thread(alice.open, callback)
        assert page.headers["location"] == url
        assert outcome_of(await alice.avisit(url)) == "connected"


# -------------------------------------------------------------------------------- limits


async def test_thousand_starts_leave_a_bounded_number_of_records(
    make_public: Make, server: AuthorizationServer
) -> None:
    """Twenty a minute for one owner; others are not held up."""
    pocket = make_public()
    mine = urlsplit(await link_of(pocket)).path
    theirs = urlsplit(await link_of(pocket, "bob")).path
    async with visits(web_app(pocket.router)) as browser:
        press = {"Cookie": "who=alice"} | PRESS
        pages = [await browser.post(mine, headers=press) for _ in range(1000)]
        statuses = [page.status_code for page in pages]
        assert statuses[:20] == [200] * 20
        assert set(statuses[20:]) == {429}
        assert outcome_of(pages[-1]) == "too_many"
        assert 0 < int(pages[-1].headers["Retry-After"]) <= 60
        assert (await browser.get(mine, headers=press)).status_code == 200
        page = await browser.post(theirs, headers={"Cookie": "who=bob"} | PRESS)
        assert page.status_code == 200
        # Nor does who has a link only use up what its owner may do.
        for _ in range(21):
            await browser.post(theirs, headers=press)
        page = await browser.post(theirs, headers={"Cookie": "who=bob"} | PRESS)
        assert page.status_code == 200

    async def records(engine: Any) -> int:
        return len((await engine.vault.walk(None, 1000)).records)

    assert await pocket._service.ask(records) < 40


@pytest.mark.parametrize(
    ("trusted", "one", "other"),
    [
        ("127.0.0.1", "198.41.0.4", "199.9.14.201"),
        # The same network, which is one customer's.
        ("127.0.0.1", "2001:500:2f::f", "2001:500:2d::d"),
        ("", "198.41.0.4", None),
    ],
)
async def test_address_that_guesses_is_stopped_where_the_server_knows_it(
    make_public: Make,
    monkeypatch: pytest.MonkeyPatch,
    trusted: str,
    one: str,
    other: str | None,
) -> None:
    """Of a proxy that uvicorn does not trust, nobody is locked out, or let through."""
    few = Limits(refusals=5)
    monkeypatch.setattr("langchain_pocket_auth.server._desk.LIMITS", few)
    pocket = make_public()
    inner, path = (
        f"http://127.0.0.1:{free_port()}",
        urlsplit(await link_of(pocket)).path,
    )

    async def asked(http: httpx.AsyncClient, address: str, path: str) -> int:
        headers = {"X-Forwarded-For": address, "Cookie": "who=alice"}
        return (await http.get(f"{inner}{path}", headers=headers)).status_code

    with served(web_app(pocket.router), inner, forwarded_allow_ips=trusted), outside():
        async with httpx.AsyncClient(timeout=BOUND_S, verify=False) as http:
            guesses = [await asked(http, one, f"/connect/{n}") for n in range(8)]
            if other is None:
                assert guesses == [404] * 8
            else:
                assert guesses == [404] * 5 + [429] * 3
                assert await asked(http, one, path) == 429
                assert await asked(http, one.replace("::f", "::e"), path) == 429
                assert await asked(http, other, path) == 200


def test_count_is_of_a_minute_and_of_a_bounded_number_of_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever waited may go on; of many names the oldest are forgotten."""
    now = 0.0
    monkeypatch.setattr("langchain_pocket_auth.server._limits.monotonic", lambda: now)
    counter = Counter(2, names=100)
    assert counter.wait_s("a") == 0
    counter.add("a")
    assert counter.wait_s("a") == 0
    now = 20.0
    counter.add("a")
    assert counter.wait_s("a") == 40
    now = 60.0
    assert counter.wait_s("a") == 0
    counter.add("a")
    assert counter.wait_s("a") == 0
    for name in range(1000):
        counter.add(name)
    assert len(counter) == 100


# ------------------------------------------------------------------------------ settings


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "nobody is asked who they are": ({"verify_user": None}, "verify_user"),
    "plain http": ({"public_url": "http://app.example.com"}, "https://"),
    "a query": ({"public_url": "https://app.example.com?x=1"}, "https://"),
    "both addresses": ({"base_url": "http://127.0.0.1:1"}, "not both"),
    "no store": ({"storage": None}, "storage="),
    "no keys": ({"keys": None}, "keys="),
    "not a function": ({"verify_user": Depends(signed_in)}, "the function itself"),
    "no such way": ({"confirm": "email"}, "confirm="),
    "matcher is no function": ({"account_matcher": "@acme"}, "the function itself"),
}


@pytest.mark.parametrize("case", WRONG)
def test_public_pocket_that_is_not_safe_is_refused_when_it_is_made(
    tmp_path: Path, case: str
) -> None:
    """Each error names what to set."""
    wrong, remedy = WRONG[case]
    settings: dict[str, Any] = {
        "storage": f"sqlite:///{tmp_path}/p.db",
        "keys": KEYS,
        "public_url": "https://app.example.com",
        "verify_user": signed_in,
    }
    PocketAuth(**settings)
    with pytest.raises(ConfigurationError, match=re.escape(remedy)):
        PocketAuth(**settings | wrong)
    assert not list(tmp_path.iterdir())


async def test_worker_gives_links_out_that_another_process_serves(
    make_public: Make,
) -> None:
    """With a public address no server of ours is started, whoever asks for one."""
    pocket = make_public()
    port = urlsplit(pocket.base_url).port
    assert await link_of(pocket)
    with socket.create_server(("127.0.0.1", port)):
        pass
    with pytest.raises(CallbackServerError, match=r"pocket\.router"):
        await pocket.serve()


def test_commands_know_a_public_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`serve` shows what to write instead; `doctor` looks; lists work for one owner."""
    for name in [n for n in os.environ if n.startswith("POCKET_AUTH_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "PUBLIC_URL": "https://app.example.com/agents",
        "STORAGE": f"sqlite:///{tmp_path}/p.db",
        "CLIENTS__GITHUB__CLIENT_ID": "id",
        "CLIENTS__GITHUB__CLIENT_SECRET": "secret",
    }.items():
        monkeypatch.setenv(f"POCKET_AUTH_{name}", value)

    def typed(*arguments: str) -> Any:
        return CliRunner().invoke(make_app(), arguments)

    assert "POCKET_AUTH_KEYS" in typed("doctor").stdout
    monkeypatch.setenv("POCKET_AUTH_KEYS", KEYS)
    result = typed("serve")
    assert result.exit_code == 2
    assert "app.include_router(pocket.router)" in " ".join(result.stderr.split())
    result = typed("doctor", "--json")
    found = {one["name"]: one for one in json.loads(result.stdout)}
    assert (result.exit_code, found["replicas"]["status"]) == (0, "warning")
    assert found["public_url"]["status"] == "ok"
    uri = "https://app.example.com/agents/auth/github/oauth2/callback"
    assert uri in found["app github"]["text"]
    assert typed("connections", "--owner", "alice").exit_code == 0
    assert typed("connections").exit_code == 2
