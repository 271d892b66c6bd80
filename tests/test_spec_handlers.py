"""Handlers written by the spec's "How to implement auth", and by nothing else."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import secrets
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlencode

import httpx
import pytest
from conftest import free_port
from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse
from support import (
    KEYS,
    Clock,
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
    AuthContext,
    AuthenticateRequest,
    AuthenticateResponse,
    AuthHandlerInterface,
    AuthorizationRequired,
    ConfigurationError,
    CredentialUnreadable,
    FutureStore,
    PocketAuth,
    ProviderUnavailable,
)
from langchain_pocket_auth import _models as models
from langchain_pocket_auth.testing import AuthorizationServer, Browser, LeakWatch

Make = Callable[..., PocketAuth]
SECRET = "own-handler-secret"


class Config:
    """The developer's own settings."""

    issuer = base = ""


# The server of these tests insists on PKCE; a spec handler may use a fixed verifier
# of its app, or one per attempt (`FreshVerifierHandler`).
VERIFIER = "v" * 43


def challenge_of(verifier: str) -> str:
    digest = hashlib.sha256(verifier.encode()).digest()
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")


class OwnRequest(AuthenticateRequest):
    client_id: str
    client_secret: str


class OwnResponse(AuthenticateResponse):
    access_token: str
    expires_in: int | None
    refresh_token: str | None
    scope: str
    token_type: str


class OwnContext(AuthContext):
    _KEY: str = "OWN_TOKEN"

    def to_dict(self) -> dict[str, str]:
        return {self._KEY: self.access_token}

    @classmethod
    def from_response(cls, response: OwnResponse) -> OwnContext:
        lifetime = (
            timedelta(seconds=response.expires_in) if response.expires_in else None
        )
        return cls(
            access_token=response.access_token,
            description=f"logged in with {response.scope}",
            expires_at=Clocked.now() + lifetime if lifetime else None,
            detail=response,
        )


class Clocked:
    """The developer's clock: naive UTC, as many write it."""

    clock: Clock | None = None

    @classmethod
    def now(cls) -> datetime:
        now = cls.clock.now(UTC) if cls.clock else datetime.now(UTC)
        return now.replace(tzinfo=None)


class OwnHandler(AuthHandlerInterface):
    """As in the spec: sync `prepare` with prose, its own HTTP client, `detail`."""

    name: str = "own-oauth2"
    description: str = "Authenticates users at Own."
    scoped: bool = True

    @staticmethod
    def provider() -> str:
        return "own"

    @staticmethod
    def provider_default() -> bool:
        return True

    @staticmethod
    def recommended_scopes() -> set[str]:
        return {"read"}

    def make_request(
        self, auth_scopes: list[str] | None = None, **kwargs: Any
    ) -> OwnRequest:
        return OwnRequest(
            auth_scopes=auth_scopes, client_id="own-client", client_secret=SECRET
        )

    def prepare(
        self,
        auth_req: OwnRequest,
        thread_id: str,
        profile: str,
        future_uid: str,
        *args: Any,
        **kwargs: Any,
    ) -> str:
        redirect_uri = f"{Config.base}/auth/own/oauth2/callback"
        FutureStore.create_future(
            future_uid,
            data={
                "redirect_uri": redirect_uri,
                "thread_id": thread_id,
                "profile": profile,
            },
        )
        return f"User needs to authenticate using the following URL: {self.url(auth_req, redirect_uri, future_uid)}"

    def url(self, auth_req: OwnRequest, redirect_uri: str, uid: str) -> str:
        query = {
            "response_type": "code",
            "client_id": auth_req.client_id,
            "redirect_uri": redirect_uri,
            "scope": " ".join(auth_req.auth_scopes or ()),
            "state": uid,
            "code_challenge": challenge_of(self.verifier(uid)),
            "code_challenge_method": "S256",
        }
        return f"{Config.issuer}/authorize?{urlencode(query)}"

    def verifier(self, uid: str) -> str:
        return VERIFIER

    async def authenticate(
        self, auth_req: OwnRequest, future_uid: str, *args: Any, **kwargs: Any
    ) -> OwnContext:
        future_data = FutureStore.get_future(future_uid)
        auth_code = await future_data.future
        return await self.ask(
            auth_req,
            grant_type="authorization_code",
            code=auth_code,
            redirect_uri=future_data.data["redirect_uri"],
            code_verifier=self.verifier(future_uid),
        )

    async def refresh(
        self, auth_req: OwnRequest, context: OwnContext, *args: Any, **kwargs: Any
    ) -> OwnContext:
        last: OwnResponse = context.detail
        assert isinstance(last, OwnResponse)
        return await self.ask(
            auth_req, grant_type="refresh_token", refresh_token=last.refresh_token
        )

    async def ask(self, auth_req: OwnRequest, **form: Any) -> OwnContext:
        async with httpx.AsyncClient(timeout=5, verify=False) as client:
            resp = await client.post(
                f"{Config.issuer}/token",
                data=form,
                auth=(auth_req.client_id, auth_req.client_secret),
            )
        if resp.status_code != 200:
            raise Exception(f"failed: {resp.status_code} {form}")  # noqa: TRY002
        return OwnContext.from_response(OwnResponse(**resp.json()))


def own_router(*, is_async: bool) -> APIRouter:
    """Return a callback router as the spec's server step describes."""
    router = APIRouter(prefix="/own")

    async def acallback(code: str, state: str) -> HTMLResponse:
        FutureStore.resolve_future(state, code)
        return HTMLResponse(content="success")

    def callback(code: str, state: str) -> HTMLResponse:
        FutureStore.resolve_future(state, code)
        return HTMLResponse(content="success")

    router.get("/oauth2/callback")(acallback if is_async else callback)
    return router


class FreshVerifierHandler(OwnHandler):
    """Makes a verifier in `prepare` and keeps it with the attempt."""

    def verifier(self, uid: str) -> str:
        data = FutureStore.get_future(uid).data
        return str(data.setdefault("verifier", secrets.token_urlsafe(48)))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    """One clock for the package and for the handler."""
    Clocked.clock = Clock(monkeypatch)
    yield Clocked.clock
    Clocked.clock = None


@pytest.fixture
def make_own(make_pocket: Make, server: AuthorizationServer, tmp_path: Path) -> Make:
    """Make pockets with a handler of one's own, all on the same store and port."""
    Config.base, Config.issuer = f"http://127.0.0.1:{free_port()}", server.issuer
    server.register(
        client_id="own-client",
        client_secret=SECRET,
        redirect_uris=[f"{Config.base}/auth/own/oauth2/callback"],
    )

    def make(
        handler: Any = OwnHandler,
        how: str = "attribute",
        *,
        is_async: bool = True,
        **kwargs: Any,
    ) -> PocketAuth:
        router = own_router(is_async=is_async)
        settings: dict[str, Any] = {"session_cache_ttl": timedelta()} | kwargs
        if how == "attribute":
            handler = type(handler.__name__, (handler,), {"router": router})
        else:
            settings["routers"] = [router]
        return make_pocket(
            f"sqlite:///{tmp_path}/own.db",
            keys=KEYS,
            base_url=Config.base,
            handlers=[handler() if how == "instance" else handler],
            **settings,
        )

    return make


@pytest.mark.parametrize("how", ["attribute", "routers", "instance"])
@pytest.mark.parametrize("is_async", [True, False])
async def test_spec_handler_connects_survives_a_restart_and_refreshes(
    make_own: Make,
    server: AuthorizationServer,
    alice: Browser,
    clock: Clock,
    how: str,
    *,
    is_async: bool,
) -> None:
    """Class or instance, async or plain endpoint, own router or `routers=`: it works."""
    pocket = make_own(how=how, is_async=is_async)
    page = await alice.avisit(await link(pocket, "read", provider="own"))
    assert (page.status_code, page.text) == (200, "success")
    assert page.headers["Cache-Control"] == "no-store"
    context = await token(pocket, "read", provider="own")
    assert context.to_dict() == {"OWN_TOKEN": server.issued_access_tokens[0]}
    assert context.detail is None
    await pocket.aclose()

    again = make_own(how=how, is_async=is_async)
    assert await state(again, "read", provider="own") == "SKIP_AUTH"
    for round_ in (1, 2):
        clock.forward(3601)
        assert await state(again, "read", provider="own") == "DO_REFRESH"
        contexts = await asyncio.gather(
            *(token(again, "read", provider="own") for _ in range(5))
        )
        assert {c.access_token for c in contexts} == {
            server.issued_access_tokens[round_]
        }
    assert server.token_requests == {"authorization_code": 1, "refresh_token": 2}


async def test_restart_between_click_and_callback_loses_nothing(
    make_own: Make, server: AuthorizationServer, alice: Browser
) -> None:
    """What `prepare` kept with `create_future` is there in the next process."""
    pocket = make_own(FreshVerifierHandler)
    callback = await answer_url(alice, await link(pocket, "read", provider="own"))
    await pocket.aclose()
    again = make_own(FreshVerifierHandler)
    await again.serve()
    assert (await deliver(callback)).text == "success"
    assert await state(again, "read", provider="own") == "SKIP_AUTH"


async def test_verifiers_of_two_tabs_are_apart(
    make_own: Make, server: AuthorizationServer, alice: Browser
) -> None:
    """`prepare` runs once per click, and each answer meets its own data."""
    pocket = make_own(FreshVerifierHandler)
    url = await link(pocket, "read", provider="own")
    first, second = [await answer_url(alice, url) for _ in range(2)]
    assert (await deliver(second)).text == "success"
    assert (await deliver(first)).text == "success"
    assert server.token_requests == {"authorization_code": 2}
    assert await state(pocket, "read", provider="own") == "SKIP_AUTH"


async def test_denial_without_a_code_is_a_page(make_own: Make, alice: Browser) -> None:
    """The endpoint's `code: str` does not make a 422 of a refusal."""
    pocket = make_own()
    page = await alice.avisit(await link(pocket, "read", provider="own"), approve=False)
    assert (page.status_code, outcome_of(page)) == (200, "declined")
    assert await state(pocket, "read", provider="own") == "NO_SESSION"


async def test_missing_code_is_a_page_and_echoes_nothing(
    make_own: Make, alice: Browser
) -> None:
    """FastAPI's 422 would repeat what was sent."""
    pocket = make_own()
    callback = await answer_url(alice, await link(pocket, "read", provider="own"))
    page = await deliver(
        f"{callback.partition('?')[0]}?state={query_of(callback)['state']}&x=canary"
    )
    assert (page.status_code, outcome_of(page)) == (400, "malformed")
    assert "canary" not in page.text
    assert (await deliver(callback)).text == "success"


@pytest.mark.parametrize("mode", [500, "invalid_grant", "malformed", "reset"])
async def test_failed_exchange_of_a_spec_handler_is_our_page(
    make_own: Make, server: AuthorizationServer, alice: Browser, mode: Any
) -> None:
    """Not "success" and not a 500; no log shows the code; the link works again."""
    pocket = make_own()
    url = await link(pocket, "read", provider="own")
    callback = await answer_url(alice, url)
    server.fault(mode)
    with LeakWatch() as watch:
        page = await deliver(callback)
    assert page.status_code == 502
    assert outcome_of(page) == "failed"
    watch.assert_clean([query_of(callback)["code"], SECRET], page.text)
    assert await link(pocket, "read", provider="own") == url
    await connect(pocket, alice, "read", provider="own")


async def test_replayed_answer_of_a_spec_handler_is_not_exchanged_again(
    make_own: Make, server: AuthorizationServer, alice: Browser
) -> None:
    """The endpoint may resolve it once more; nothing follows."""
    pocket = make_own()
    callback = await answer_url(alice, await link(pocket, "read", provider="own"))
    pages = [await deliver(callback) for _ in range(2)]
    assert [p.status_code for p in pages] == [200, 200]
    other = await deliver(callback.replace("code=ac_", "code=xx_"))
    assert (other.status_code, outcome_of(other)) == (409, "replayed")
    assert server.token_requests == {"authorization_code": 1}
    assert not server.token_errors


@pytest.mark.parametrize("is_async", [True, False])
async def test_unknown_state_at_an_own_endpoint_is_a_page(
    make_own: Make, server: AuthorizationServer, *, is_async: bool
) -> None:
    """`resolve_future` raises there, as the reference's does; the person gets 404."""
    pocket = make_own(is_async=is_async)
    await pocket.serve()
    page = await deliver(f"{Config.base}/auth/own/oauth2/callback?code=c&state=unknown")
    assert (page.status_code, outcome_of(page)) == (404, "unknown")


async def test_foreign_state_at_an_own_endpoint_is_refused(
    make_own: Make, server: AuthorizationServer, alice: Browser
) -> None:
    """A third party's route cannot answer for another handler, nor the reverse."""
    pocket = make_own()
    acme = await answer_url(alice, await link(pocket, "read"))
    own = await answer_url(alice, await link(pocket, "read", provider="own"))
    crossed = [
        acme.replace("/auth/acme/oauth2/", "/auth/own/oauth2/"),
        own.replace("/auth/own/oauth2/", "/auth/acme/oauth2/"),
    ]
    for url in crossed:
        assert (await deliver(url)).status_code == 403
    assert not server.token_requests
    for url in (acme, own):
        assert (await deliver(url, follow_redirects=True)).status_code == 200
    assert server.token_requests == {"authorization_code": 2}


async def test_endpoint_that_raises_is_a_page_without_its_text(
    make_own: Make, alice: Browser
) -> None:
    """A third party's bug shows neither a 500 nor what it was about."""
    router = APIRouter(prefix="/own")

    @router.get("/oauth2/callback")
    async def broken(code: str, state: str) -> None:
        FutureStore.resolve_future(state, code)
        raise RuntimeError(code)

    pocket = make_own(type("Broken", (OwnHandler,), {"router": router}), how="none")
    callback = await answer_url(alice, await link(pocket, "read", provider="own"))
    with LeakWatch() as watch:
        page = await deliver(callback)
    assert (page.status_code, outcome_of(page)) == (502, "failed")
    watch.assert_clean([query_of(callback)["code"]], page.text)
    assert await state(pocket, "read", provider="own") == "PENDING_RESOLVE"


# ------------------------------------------------------------------- typed-in tokens


class TokenResponse(AuthenticateResponse):
    access_token: str


class TokenContext(AuthContext):
    @classmethod
    def from_response(cls, response: TokenResponse) -> TokenContext:
        return cls(
            access_token=response.access_token, description="typed in", expires_at=None
        )


class TokenHandler(AuthHandlerInterface):
    """In the style of the reference's token handlers: a form, and no expiry."""

    name: str = "own-token"
    description: str = "Takes a token."
    scoped: bool = False
    router = APIRouter(prefix="/own/token")

    @staticmethod
    def provider() -> str:
        return "own"

    def make_request(
        self, auth_scopes: list[str] | None = None, **kwargs: Any
    ) -> AuthenticateRequest:
        return AuthenticateRequest()

    def prepare(
        self,
        auth_req: AuthenticateRequest,
        thread_id: str,
        profile: str,
        future_uid: str,
        *args: Any,
        **kwargs: Any,
    ) -> str:
        FutureStore.create_future(future_uid, data={"profile": profile})
        return (
            f"Open {Config.base}/auth/own/token/form?{urlencode({'state': future_uid})}"
        )

    async def authenticate(
        self, auth_req: AuthenticateRequest, future_uid: str, *args: Any, **kwargs: Any
    ) -> TokenContext:
        value = await FutureStore.get_future(future_uid).future
        return TokenContext.from_response(TokenResponse(access_token=value))

    async def refresh(
        self,
        auth_req: AuthenticateRequest,
        context: AuthContext,
        *args: Any,
        **kwargs: Any,
    ) -> AuthContext:
        raise Exception("a token is not renewed")  # noqa: TRY002


@TokenHandler.router.get("/form")
async def form(state: str) -> HTMLResponse:
    profile = FutureStore.get_future(state).data["profile"]
    return HTMLResponse(
        f'<form method="post" action="callback">{profile}<input type="hidden" name="state" value="{state}">'
        '<input name="token" type="password"><button>Connect</button></form>'
    )


@TokenHandler.router.post("/callback")
async def typed(request: Request) -> HTMLResponse:
    fields = await request.form()
    FutureStore.resolve_future(str(fields["state"]), str(fields["token"]))
    return HTMLResponse("success")


async def test_token_form_of_a_spec_handler_works(
    make_own: Make, alice: Browser, server: AuthorizationServer
) -> None:
    """The attempt may be named in the form's body; its data is there for the page."""
    pocket = make_own(TokenHandler, how="none")
    url = await link(pocket, provider="own", profile="work")
    mallory = await answer_url(
        Browser("m"), await link(pocket, "read", provider="acme")
    )
    alice.password = "a-token-typed-in"
    page = await alice.avisit(url)
    assert (page.status_code, page.text) == (200, "success")
    context = await token(pocket, provider="own", profile="work")
    assert context.access_token == "a-token-typed-in"
    form_url = f"{Config.base}/auth/own/token/callback"
    for uid, status in (("unknown", 404), (query_of(mallory)["state"], 403)):
        page = await deliver(form_url, method="POST", data={"state": uid, "token": "x"})
        assert page.status_code == status
    assert await pocket.delete_session("own", profile="work")


# ---------------------------------------------------------------- what can go wrong


async def test_network_trouble_of_an_own_client_is_no_reason_to_ask_again(
    make_own: Make, server: AuthorizationServer, alice: Browser, clock: Clock
) -> None:
    """However often the server cannot be reached, the session stays."""
    pocket = make_own()
    await connect(pocket, alice, "read", provider="own")
    server.fault("reset", times=50, grant_type="refresh_token")
    clock.forward(3601)
    for _ in range(5):
        with pytest.raises(ProviderUnavailable) as caught:
            await token(pocket, "read", provider="own")
        assert caught.value.__context__ is None
        clock.forward(61)
    server.clear_faults()
    await token(pocket, "read", provider="own")


async def test_renewal_that_is_refused_for_good_asks_again(
    make_own: Make, server: AuthorizationServer, alice: Browser, clock: Clock
) -> None:
    """A spec handler says it in an exception of any type; three are enough."""
    pocket = make_own()
    await connect(pocket, alice, "read", provider="own")
    server.revoke_grants("alice")
    clock.forward(3601)
    with LeakWatch() as watch:
        for _ in range(2):
            with pytest.raises(ProviderUnavailable):
                await token(pocket, "read", provider="own")
            clock.forward(61)
        with pytest.raises(AuthorizationRequired):
            await token(pocket, "read", provider="own")
    watch.assert_clean([*server.issued_refresh_tokens, SECRET])
    assert await state(pocket, "read", provider="own") == "DO_AUTH"


async def test_context_type_that_is_not_imported_is_unreadable_and_kept(
    make_own: Make, alice: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a restart without the handler's module: an error, not "no session"."""
    pocket = make_own()
    await connect(pocket, alice, "read", provider="own")
    known = dict(models._TYPES)
    monkeypatch.setattr(
        models,
        "_TYPES",
        {k: v for k, v in known.items() if not k.endswith("OwnContext")},
    )
    with pytest.raises(CredentialUnreadable, match=r"OwnContext.*import the module"):
        await state(pocket, "read", provider="own")
    monkeypatch.setattr(models, "_TYPES", known)
    assert await state(pocket, "read", provider="own") == "SKIP_AUTH"


class Odd(OwnHandler):
    """Wrong in one place."""

    wrong: ClassVar[str] = ""

    def prepare(self, auth_req: Any, thread_id: str, profile: str, future_uid: str, *args: Any, **kwargs: Any) -> Any:  # fmt: skip
        if self.wrong == "raises":
            raise RuntimeError(SECRET)
        if self.wrong == "object kept":
            FutureStore.create_future(future_uid, data={"x": object()})
        url = super().prepare(auth_req, thread_id, profile, future_uid)
        return {
            "no URL": "please log in",
            "no text": None,
            "script": "javascript:alert(1)",
            "plain http": "see http://public.example/authorize",
            "broken": "http://[::1",
        }.get(self.wrong, url)

    async def authenticate(
        self, auth_req: Any, future_uid: str, *args: Any, **kwargs: Any
    ) -> Any:
        context = await super().authenticate(auth_req, future_uid)
        if self.wrong == "object in detail":
            return OwnContext(
                access_token=SECRET, description="", expires_at=None, detail=object()
            )
        if self.wrong == "bytes in detail":
            return OwnContext(
                access_token=SECRET,
                description="",
                expires_at=None,
                detail={"a": b"\xff"},
            )
        return {"access_token": SECRET} if self.wrong == "no context" else context


@pytest.mark.parametrize(
    "wrong",
    ["raises", "object kept", "no URL", "no text", "script", "plain http", "broken"],
)
async def test_prepare_that_is_wrong_is_a_page(
    make_own: Make, alice: Browser, wrong: str
) -> None:
    """A handler's mistake at the click is told without its secrets."""
    pocket = make_own(type("Odd", (Odd,), {"wrong": wrong}))
    url = await link(pocket, "read", provider="own")
    with LeakWatch() as watch:
        page = await deliver(url, method="POST")
    assert (page.status_code, outcome_of(page)) == (502, "failed")
    for part in ("javascript:", "public.example", "http-equiv"):
        assert part not in page.text
    watch.assert_clean([SECRET], page.text)


@pytest.mark.parametrize("wrong", ["object in detail", "bytes in detail", "no context"])
async def test_context_that_cannot_be_stored_is_told_to_the_developer(
    make_own: Make, alice: Browser, caplog: pytest.LogCaptureFixture, wrong: str
) -> None:
    """What is not JSON is an error when it is saved, and nothing is stored."""
    pocket = make_own(type("Odd", (Odd,), {"wrong": wrong}))
    callback = await answer_url(alice, await link(pocket, "read", provider="own"))
    page = await deliver(callback)
    assert (page.status_code, outcome_of(page)) == (502, "failed")
    assert ("JSON" in caplog.text) != ("no AuthContext" in caplog.text)
    assert SECRET not in caplog.text
    assert await state(pocket, "read", provider="own") == "PENDING_RESOLVE"


async def test_value_that_is_not_json_cannot_be_kept_for_later(
    make_own: Make, alice: Browser
) -> None:
    """`resolve_future` outside a request stores its value, and says if it cannot."""
    pocket = make_own()
    callback = query_of(
        await answer_url(alice, await link(pocket, "read", provider="own"))
    )
    with pytest.raises(ConfigurationError, match="not JSON"):
        FutureStore.resolve_future(callback["state"], object())
    FutureStore.resolve_future(callback["state"], callback["code"])
    await token(pocket, "read", provider="own")
