"""The spec's six states, asked and changed through `PocketAuth`."""

from __future__ import annotations

import asyncio
import sqlite3
import time
import tomllib
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import ACME, free_port, provider
from pydantic import ValidationError
from support import (
    KEYS,
    Watched,
    answer_url,
    asks,
    connect,
    deliver,
    in_thread,
    link,
    on,
    outcome_of,
    query_of,
    state,
    token,
    until,
)

from langchain_pocket_auth import (
    AuthorizationRefused,
    AuthorizationRequired,
    AuthProvider,
    AuthState,
    CallbackServerError,
    Client,
    ConfigurationError,
    CredentialUnreadable,
    FutureStore,
    MissingClient,
    OAuth2Context,
    OAuth2Handler,
    Owner,
    PocketAuth,
    Provider,
    ProviderError,
    RedactedContext,
    UnknownProvider,
)
from langchain_pocket_auth._models import Requirement, Turn, find_type, type_name
from langchain_pocket_auth._seal import KeyRing, new_key
from langchain_pocket_auth.testing import AuthorizationServer, Browser
from langchain_pocket_auth.testing._outside import outside

Make = Callable[..., PocketAuth]


@pytest.fixture(params=["memory", "sqlite"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A storage URL; every behaviour holds on all of them."""
    return "memory://" if request.param == "memory" else f"sqlite:///{tmp_path}/p.db"


@pytest.fixture
def pocket(make_pocket: Make, storage: str) -> PocketAuth:
    """A pocket on each storage."""
    return make_pocket(storage, keys=KEYS)


# ------------------------------------------------------------------- the transitions


async def test_states_follow_a_consent_from_nothing_to_refresh(
    pocket: PocketAuth, server: AuthorizationServer, alice: Browser
) -> None:
    """NO_SESSION, PENDING_RESOLVE, SKIP_AUTH, DO_AUTH for more, DO_REFRESH later."""
    server.access_token_ttl_s = 2
    assert await state(pocket, "read") == "NO_SESSION"
    url = await link(pocket, "read")
    assert await state(pocket, "read") == "PENDING_RESOLVE"
    await alice.avisit(url)
    assert await state(pocket, "read") == "SKIP_AUTH"
    assert await state(pocket) == "SKIP_AUTH"
    assert await state(pocket, "read", "write") == "DO_AUTH"
    assert await pocket.prepare(asks(pocket, "read"), **on()) is None
    await asyncio.sleep(1.7)
    assert await state(pocket, "read") == "DO_REFRESH"
    assert await pocket.prepare(asks(pocket, "read"), **on()) is None
    context = await token(pocket, "read")
    assert context.access_token == server.issued_access_tokens[-1]
    assert server.token_requests == {"authorization_code": 1, "refresh_token": 1}


async def test_prepare_gives_one_link_however_often_it_is_called(
    pocket: PocketAuth,
) -> None:
    """A node that runs again, and ten at once, get the same link."""
    first = await link(pocket, "read")
    again = [await link(pocket, "read") for _ in range(4)]
    at_once = await asyncio.gather(*(link(pocket, "read") for _ in range(10)))
    assert {*again, *at_once} == {first}


async def test_ten_first_prepares_at_once_agree_on_one_link(pocket: PocketAuth) -> None:
    """Whoever loses the race to create the future takes the winner's link."""
    links = await asyncio.gather(*(link(pocket, f"s{n % 3}") for n in range(10)))
    assert len(set(links)) == 1


async def test_thirty_conversations_that_pause_at_once_share_one_link(
    pocket: PocketAuth,
) -> None:
    """However many turns wait for the same account, none is told of too many writers."""
    who = Owner("user", "u")

    async def prepare(engine: Any) -> set[str]:
        asked = [
            engine.prepare(who, Requirement("acme", (f"s{n}",)), turn=Turn(f"t{n}"))
            for n in range(30)
        ]
        return {consent.url for consent in await asyncio.gather(*asked)}

    assert len(await pocket._service.ask(prepare)) == 1
    scopes = [f"s{n}" for n in range(30)]
    assert await state(pocket, *scopes, owner=who) == "PENDING_RESOLVE"


async def test_wider_scopes_widen_the_link_that_is_out(
    pocket: PocketAuth, alice: Browser
) -> None:
    """One link asks for everything that was needed before it was opened."""
    url = await link(pocket, "read")
    assert await state(pocket, "write") == "NO_SESSION"
    assert await link(pocket, "write") == url
    page = await asyncio.to_thread(alice.open, url)
    assert "read" in page.text
    assert "write" in page.text
    await alice.avisit(url)
    assert await state(pocket, "read", "write") == "SKIP_AUTH"


async def test_scopes_added_after_the_click_are_still_asked_for(
    pocket: PocketAuth, alice: Browser
) -> None:
    """An attempt that began before the link was widened does not end the question."""
    url = await link(pocket, "read")
    callback = await answer_url(alice, url)
    await link(pocket, "write")
    assert (await deliver(callback)).status_code == 303
    assert await state(pocket, "read") == "SKIP_AUTH"
    assert await state(pocket, "read", "write") == "PENDING_RESOLVE"
    assert outcome_of(await deliver(url)) == "pending"
    await alice.avisit(url)
    assert await state(pocket, "read", "write") == "SKIP_AUTH"


async def test_pending_upgrade_leaves_the_working_session_alone(
    pocket: PocketAuth, alice: Browser
) -> None:
    """What the session covers stays SKIP_AUTH while more is asked for, and if denied."""
    before = await connect(pocket, alice, "read")
    url = await link(pocket, "read", "write")
    assert await state(pocket, "read", "write") == "PENDING_RESOLVE"
    assert await state(pocket, "read") == "SKIP_AUTH"
    page = await alice.avisit(url, approve=False)
    assert outcome_of(page) == "declined"
    assert await state(pocket, "read", "write") == "DO_AUTH"
    assert (await token(pocket, "read")).access_token == before.access_token


async def test_withheld_scope_leaves_a_page_that_says_so(
    pocket: PocketAuth, server: AuthorizationServer, alice: Browser
) -> None:
    """A consent to less is stored for what it grants, and the person is told."""
    server.withhold = {"write"}
    page = await alice.avisit(await link(pocket, "read", "write"))
    assert outcome_of(page) == "withheld"
    assert "write" in page.text
    assert await state(pocket, "read") == "SKIP_AUTH"
    assert await state(pocket, "write") == "DO_AUTH"


async def test_consent_to_less_does_not_replace_a_session_that_grants_more(
    pocket: PocketAuth, server: AuthorizationServer, alice: Browser
) -> None:
    """An upgrade in which the person unticks what was granted before harms nothing."""
    before = await connect(pocket, alice, "read", "mail")
    server.withhold = {"mail"}
    await alice.avisit(await link(pocket, "read", "mail", "write"))
    assert (await token(pocket, "mail")).access_token == before.access_token


# ---------------------------------------------------------------------- authenticate


@pytest.mark.parametrize("before", ["NO_SESSION", "DO_AUTH"])
async def test_authenticate_without_a_prepared_consent_raises(
    pocket: PocketAuth, alice: Browser, before: str
) -> None:
    """These states do not reach `authenticate`; its error names what is missing."""
    if before == "DO_AUTH":
        await connect(pocket, alice, "read")
    assert await state(pocket, "write") == before
    with pytest.raises(AuthorizationRequired, match=before) as caught:
        await pocket.authenticate(asks(pocket, "write"), **on())
    assert (caught.value.provider, caught.value.scopes) == ("acme", ("write",))
    assert caught.value.url is None


async def test_authenticate_returns_as_soon_as_the_callback_arrives(
    pocket: PocketAuth, server: AuthorizationServer, alice: Browser
) -> None:
    """It waits for the event, not for the next look."""
    callback = await answer_url(alice, await link(pocket, "read"))
    waiting = asyncio.create_task(
        pocket.authenticate(asks(pocket, "read"), timeout=10, **on())
    )
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await deliver(callback)
    begun = time.monotonic()
    context = await asyncio.wait_for(waiting, 5)
    assert time.monotonic() - begun < 0.5
    assert context.access_token == server.issued_access_tokens[-1]


async def test_authenticate_gives_up_after_its_timeout_with_the_link(
    pocket: PocketAuth,
) -> None:
    """Not finished in time is AuthorizationRequired; the link is not in its text."""
    url = await link(pocket, "read")
    begun = time.monotonic()
    with pytest.raises(AuthorizationRequired, match="PENDING_RESOLVE") as caught:
        await pocket.authenticate(asks(pocket, "read"), timeout=0.2, **on())
    assert 0.2 <= time.monotonic() - begun < 1.0
    assert caught.value.url == url
    assert url not in str(caught.value)


async def test_waiters_that_gave_up_leave_nothing_behind(pocket: PocketAuth) -> None:
    """A link nobody opens does not collect events of those who waited for it."""
    await link(pocket, "read")
    for _ in range(3):
        with pytest.raises(AuthorizationRequired):
            await pocket.authenticate(asks(pocket, "read"), timeout=0.01, **on())

    async def events(engine: Any) -> dict[str, Any]:
        return engine.attempts._waiting._events

    assert await pocket._service.ask(events) == {}


async def test_denial_reaches_whoever_waits(pocket: PocketAuth, alice: Browser) -> None:
    """A refusal at the provider is AuthorizationRefused, at once."""
    url = await link(pocket, "read")
    waiting = asyncio.create_task(
        pocket.authenticate(asks(pocket, "read"), timeout=10, **on())
    )
    page = await alice.avisit(url, approve=False)
    assert outcome_of(page) == "declined"
    with pytest.raises(AuthorizationRefused, match="declined to connect Acme"):
        await asyncio.wait_for(waiting, 5)
    assert await state(pocket, "read") == "NO_SESSION"
    assert await link(pocket, "read") != url


async def test_answer_resolved_from_another_thread_is_finished_by_authenticate(
    pocket: PocketAuth, server: AuthorizationServer, alice: Browser
) -> None:
    """`FutureStore.resolve_future` outside a request makes RESOLVED, then SKIP_AUTH."""
    callback = query_of(await answer_url(alice, await link(pocket, "read")))
    uid, code = callback["state"], callback["code"]
    assert FutureStore.get_future(uid).scopes == ("read",)
    await asyncio.to_thread(FutureStore.resolve_future, uid, code)
    assert await state(pocket, "read") == "RESOLVED"
    assert await pocket.prepare(asks(pocket, "read"), **on()) is None
    assert not server.token_requests
    contexts = await asyncio.gather(*(token(pocket, "read") for _ in range(5)))
    assert {c.access_token for c in contexts} == {server.issued_access_tokens[-1]}
    assert server.token_requests == {"authorization_code": 1}
    assert await state(pocket, "read") == "SKIP_AUTH"


async def test_resolved_answer_that_fails_gives_the_link_back(
    pocket: PocketAuth, server: AuthorizationServer, alice: Browser
) -> None:
    """A wrong code ends in an error, not in RESOLVED for ever."""
    url = await link(pocket, "read")
    uid = query_of(await answer_url(alice, url))["state"]
    FutureStore.resolve_future(uid, "a code of somebody else")
    with pytest.raises(ProviderError):
        await token(pocket, "read")
    assert await state(pocket, "read") == "PENDING_RESOLVE"
    assert await link(pocket, "read") == url
    await connect(pocket, alice, "read")


async def test_resolved_answer_that_expired_gives_the_link_back(
    pocket: PocketAuth, alice: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer nobody exchanged in time does not leave the state at RESOLVED."""
    monkeypatch.setattr(
        "langchain_pocket_auth._clicks.ATTEMPT_TTL", timedelta(seconds=0.5)
    )
    url = await link(pocket, "read")
    callback = query_of(await answer_url(alice, url))
    FutureStore.resolve_future(callback["state"], callback["code"])
    await asyncio.sleep(0.6)
    assert await state(pocket, "read") == "RESOLVED"
    with pytest.raises(AuthorizationRequired, match="PENDING_RESOLVE"):
        await token(pocket, "read")
    assert await link(pocket, "read") == url


async def test_unknown_uid_is_no_future(pocket: PocketAuth) -> None:
    """Own endpoints can tell that nobody waits; the error is a ValueError as well."""
    await link(pocket, "read")
    for ask in (
        FutureStore.get_future,
        lambda uid: FutureStore.resolve_future(uid, "x"),
    ):
        with pytest.raises(ValueError, match="no consent of that uid"):
            ask("unknown")


async def test_of_two_pockets_the_one_that_asked_gets_the_answer(
    make_pocket: Make, alice: Browser, tmp_path: Path
) -> None:
    """The store finds the pocket of a uid, even beside one whose store is broken."""
    (tmp_path / "broken.db").write_text("this is no database, " * 100)
    broken = make_pocket(f"sqlite:///{tmp_path}/broken.db", keys=KEYS)
    pockets = [make_pocket(), make_pocket(), broken]
    callback = query_of(await answer_url(alice, await link(pockets[1], "read")))
    FutureStore.resolve_future(callback["state"], callback["code"])
    assert await state(pockets[1], "read") == "RESOLVED"
    assert await state(pockets[0], "read") == "NO_SESSION"


async def test_closed_pocket_is_not_opened_again_by_somebody_elses_uid(
    make_pocket: Make, tmp_path: Path
) -> None:
    """Looking for a uid asks the pockets in use, and only those."""
    opened = []
    store = Watched(f"sqlite:///{tmp_path}/p.db")
    open_store = store.open

    async def noting() -> None:
        opened.append(1)
        await open_store()

    store.open = noting  # type: ignore[method-assign]
    pocket = make_pocket(store, keys=KEYS)
    await link(pocket, "read")
    await pocket.aclose()
    with pytest.raises(ValueError, match="no consent"):
        FutureStore.resolve_future("unknown", "x")
    assert opened == [1]


# ------------------------------------------------------------------ whose, and which


async def test_owners_profiles_and_threads_are_apart(
    pocket: PocketAuth, alice: Browser
) -> None:
    """A session answers for its owner and profile only; lists show nobody else's."""
    await connect(pocket, alice, "read", thread_id="1")
    strangers: list[dict[str, Any]] = [
        {},
        {"thread_id": "2"},
        {"thread_id": "1", "profile": "work"},
        {"owner": "1"},
        {"owner": Owner("app", "1")},
        *(
            {"owner": name}
            for name in ("*", "%", "thread:1", "1 ", "a__b", "é", "x" * 1024)
        ),
    ]
    for who in strangers:
        assert await state(pocket, "read", **who) == "NO_SESSION"
    assert await state(pocket, "read", thread_id="1") == "SKIP_AUTH"
    assert await pocket.list_session_state("2") == []
    assert await pocket.list_session_state("1") == [
        {
            "provider": "acme",
            "handler": "acme-oauth2",
            "profile": "default",
            "account": None,
            "scope": ["read"],
            "state": AuthState.SKIP_AUTH,
            "expires_at": (await token(pocket, thread_id="1")).expires_at,
        }
    ]
    assert await pocket.list_session_state("1", auth_provider="zeta") == []
    assert await pocket.get_auth_context("acme", "2") is None
    assert not await pocket.delete_session("acme", "2")
    found = await pocket.get_auth_context("acme", "1")
    assert found is not None
    assert not getattr(found, "refresh_token", None)


class TeamHandler(OAuth2Handler):
    """A second way to authenticate at acme."""

    name = "acme-team"
    description = "a second way"
    scoped = True

    @staticmethod
    def provider() -> str:  # type: ignore[override]
        return "acme"

    @staticmethod
    def provider_default() -> bool:
        return False


async def test_requirement_without_handler_accepts_any_that_covers_it(
    make_pocket: Make, server: AuthorizationServer, alice: Browser, storage: str
) -> None:
    """Who connected by another handler is not asked again for the default one's sake."""
    team = type(
        "Team", (TeamHandler,), {"row": provider(server, "acme"), "name": "acme-team"}
    )
    pocket = make_pocket(storage, keys=KEYS, handlers=[team])
    named = {"auth_handler_name": "acme-team"}
    assert pocket.find_handler_instance(auth_provider="acme").name == "acme-oauth2"
    url = await pocket.prepare(pocket.make_request(["read"], **named), **named)
    assert url
    callback = await answer_url(alice, url)
    # The server knows one redirect URI per provider; the path names the handler.
    assert (await deliver(callback)).status_code == 403
    await deliver(callback.replace("/oauth2/", "/team/"))
    assert await state(pocket, "read") == "SKIP_AUTH"
    assert (await token(pocket, "read")).access_token == server.issued_access_tokens[-1]
    asked = pocket.make_request(["read"], auth_provider="acme")
    strict = await pocket.check(asked, auth_handler_name="acme-oauth2")
    assert strict.name == "NO_SESSION"


async def test_find_handler_instance_names_what_is_missing(pocket: PocketAuth) -> None:
    """Unknown names and providers are told apart from no name at all."""
    assert pocket.find_handler_instance("acme-oauth2").provider() == "acme"
    assert pocket.make_request(["a"], auth_provider="acme").auth_scopes == ["a"]
    with pytest.raises(UnknownProvider, match="nobody-oauth2"):
        pocket.find_handler_instance("nobody-oauth2")
    with pytest.raises(UnknownProvider, match="add your own"):
        pocket.find_handler_instance(auth_provider="nobody")
    with pytest.raises(ValueError, match="name a handler or a provider"):
        pocket.find_handler_instance()


async def test_changed_client_id_asks_again(
    make_pocket: Make, server: AuthorizationServer, alice: Browser, tmp_path: Path
) -> None:
    """A grant belongs to the app's registration; under another it is DO_AUTH."""
    base, url = f"http://127.0.0.1:{free_port()}", f"sqlite:///{tmp_path}/p.db"
    old = make_pocket(url, keys=KEYS, base_url=base)
    await connect(old, alice, "read")
    pending = await link(old, "read", thread_id="2")
    await old.aclose()
    server.register(
        client_id="other",
        client_secret="s",
        redirect_uris=[f"{base}/auth/acme/oauth2/callback"],
    )
    new = make_pocket(url, keys=KEYS, base_url=base, clients={"acme": ("other", "s")})
    assert await state(new, "read") == "DO_AUTH"
    await connect(new, alice, "read")
    # A link that is out already asks for the new registration, too.
    assert await link(new, "read", thread_id="2") == pending
    await connect(new, alice, "read", thread_id="2")
    assert {grant.client_id for grant in server._grants} == {ACME[0], "other"}


# ------------------------------------------------------------------------- settings


async def test_missing_client_names_its_settings_before_any_link(
    server: AuthorizationServer,
) -> None:
    """Nothing is opened or listened to for an app that is not registered."""
    port = free_port()
    pocket = PocketAuth(
        "memory://",
        providers=[provider(server, "acme")],
        base_url=f"http://127.0.0.1:{port}",
    )
    with pytest.raises(
        MissingClient, match=r"POCKET_AUTH_CLIENTS__ACME__CLIENT_ID and .*SECRET"
    ):
        asks(pocket)
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)


@pytest.mark.parametrize("source", ["environment", "file", "both"])
async def test_clients_come_from_environment_and_file(
    server: AuthorizationServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    source: str,
) -> None:
    """The same names work in both; the environment wins."""
    file = tmp_path / "settings.toml"
    file.write_text('[clients.acme]\nclient_id = "from-file"\nclient_secret = "fs"\n')
    if source != "file":
        monkeypatch.setenv("POCKET_AUTH_CLIENTS__ACME__CLIENT_ID", "from-env")
        monkeypatch.setenv("POCKET_AUTH_CLIENTS__ACME__CLIENT_SECRET", "es")
    pocket = PocketAuth(
        "memory://",
        providers=[provider(server, "acme")],
        settings_file=None if source == "environment" else file,
    )
    request = asks(pocket)
    expected = ("from-file", "fs") if source == "file" else ("from-env", "es")
    assert (request.client_id, request.client_secret) == expected


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"base_url": "https://app.example"}, "not on this machine"),
        ({"base_url": "http://0.0.0.0:8711"}, "not on this machine"),
        ({"base_url": "http://127.0.0.1:99999"}, "base_url must be like"),
        ({"base_url": "ftp://127.0.0.1"}, "base_url must be like"),
        ({"base_url": "http://u:p@127.0.0.1"}, "base_url must be like"),
        ({"keys": "a:b"}, "keys are written"),
        ({"keys": ","}, "no key given"),
        ({"clients": {"acme": "id"}}, r"clients\['acme'\]"),
        ({"clients": {"acme": ("", "s")}}, r"clients\['acme'\]"),
        ({"settings_file": "/nowhere.toml"}, "no settings file"),
    ],
)
def test_wrong_settings_are_refused_when_they_are_given(
    settings: dict[str, Any], match: str
) -> None:
    """The constructor says which setting is wrong, before anything is opened."""
    with pytest.raises(ConfigurationError, match=match):
        PocketAuth("memory://", **settings)


async def test_provider_that_wants_https_is_refused_before_any_link() -> None:
    """Slack redirects to https only, and a link that cannot end is not given out."""
    pocket = PocketAuth("memory://", clients={"slack": ("id", "secret")})
    with pytest.raises(ConfigurationError, match="https"):
        pocket.make_request(["chat:write"], auth_provider="slack")


async def test_https_base_url_needs_the_apps_own_server(
    server: AuthorizationServer,
) -> None:
    """The background server speaks plain http and does not pretend otherwise."""
    pocket = PocketAuth(
        "memory://",
        base_url="https://127.0.0.1:8443",
        providers=[provider(server, "acme")],
        clients={"acme": ACME},
    )
    with pytest.raises(CallbackServerError, match=r"mount pocket\.router"):
        await link(pocket, "read")
    await pocket.aclose()


# ------------------------------------------------------------------------- providers


async def test_provider_of_a_toml_file_works_end_to_end(
    server: AuthorizationServer, alice: Browser, tmp_path: Path
) -> None:
    """A user adds a provider with a file, and no code."""
    base = f"http://127.0.0.1:{free_port()}"
    server.register(
        client_id="c",
        client_secret="s",
        redirect_uris=[f"{base}/auth/my-own/oauth2/callback"],
    )
    file = tmp_path / "own.toml"
    file.write_text(
        "[my-own]\n"
        f'authorization_endpoint = "{server.authorization_endpoint}"\n'
        f'token_endpoint = "{server.token_endpoint}"\n'
    )
    pocket = PocketAuth(
        "memory://", providers=[file], clients={"my-own": ("c", "s")}, base_url=base
    )
    context = await connect(pocket, alice, "read", provider="my-own")
    assert context.to_dict() == {"MY_OWN_TOKEN": server.issued_access_tokens[0]}
    assert AuthProvider("my-own") == "my-own"
    await pocket.aclose()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("authorisation_endpoint", "https://a.example/"),
        ("token_endpoint", "http://public.example/token"),
        ("authorization_endpoint", "javascript:alert(1)"),
        ("revocation_endpoint", "file:///etc/passwd"),
        ("token_endpoint", "https://[broken"),
        ("token_endpoint", "https://{tenant}.example/token"),
        ("token_endpoint_auth_method", "magic"),
    ],
)
def test_wrong_facts_are_refused_with_row_and_key(
    tmp_path: Path, key: str, value: str
) -> None:
    """A misspelt key or an address no secret may go to does not get past the start."""
    facts = {
        "authorization_endpoint": "https://a.example/authorize",
        "token_endpoint": "https://a.example/token",
        key: value,
    }
    file = tmp_path / "own.toml"
    lines = [f'{name} = "{text}"' for name, text in facts.items()]
    file.write_text("\n".join(["[own]", *lines]))
    named = "tenant" if "tenant" in value else key
    with pytest.raises(ConfigurationError, match=rf"own.toml: \[own\].*{named}"):
        PocketAuth("memory://", providers=[file])
    with pytest.raises(ValidationError, match=named):
        Provider(id="own", **facts)


def test_bundled_row_is_read_when_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Making a pocket reads no row; using one reads that one, once."""
    reads: list[str] = []
    real = tomllib.loads

    def counted(text: str) -> dict[str, Any]:
        reads.extend(real(text))
        return real(text)

    monkeypatch.setattr("langchain_pocket_auth._catalog.tomllib.loads", counted)
    pocket = PocketAuth(
        "memory://", clients={"github": Client(client_id="i", client_secret="s")}
    )
    assert reads == []
    pocket.make_request(["repo"], auth_provider="github")
    pocket.make_request(["repo"], auth_provider="github")
    assert reads == ["github"]


async def test_context_authorizes_a_whole_client(
    make_pocket: Make, server: AuthorizationServer, alice: Browser
) -> None:
    """`auth=auth.apply` is all that an HTTP client needs, as the README says."""
    row = provider(server, "acme", api_base_url=server.api)
    auth = await connect(make_pocket(providers=[row]), alice, "read")
    with outside():
        async with httpx.AsyncClient(
            auth=auth.apply, base_url=auth.api_base_url or "", verify=False
        ) as client:
            answers = [await client.get(path) for path in ("/one", "/two?a=b")]
    assert [(a.status_code, a.json()["path"]) for a in answers] == [
        (200, "one"),
        (200, "two"),
    ]
    with pytest.raises(ConfigurationError, match="without TLS"):
        auth.apply(httpx.Request("GET", "http://elsewhere.example/"))


# -------------------------------------------------------------------- disconnecting


async def test_deleting_revokes_the_grant_at_the_provider(
    pocket: PocketAuth, server: AuthorizationServer, alice: Browser
) -> None:
    """Nothing is left here, and the refresh token is dead over there."""
    await connect(pocket, alice, "read")
    assert await pocket.delete_session("acme")
    assert await state(pocket, "read") == "NO_SESSION"
    assert server.revocations == 2
    assert all(grant.revoked for grant in server._grants)
    assert not await pocket.delete_session("acme")


async def test_deleting_works_here_although_the_provider_is_down(
    pocket: PocketAuth, server: AuthorizationServer, alice: Browser
) -> None:
    """The local record goes first; the provider's trouble does not bring it back."""
    await connect(pocket, alice, "read")
    server.fault("slow", path="/revoke", delay_s=1.0)
    server.fault(500, times=5, path="/revoke")
    deleting = asyncio.create_task(pocket.delete_session("acme"))

    async def gone() -> bool:
        return await state(pocket, "read") == "NO_SESSION"

    await until(gone, 0.8)
    assert not deleting.done()
    assert await asyncio.wait_for(deleting, 5)


async def test_consent_that_ends_after_the_disconnect_stores_nothing(
    pocket: PocketAuth, server: AuthorizationServer, alice: Browser
) -> None:
    """A tab that was left open does not bring a deleted connection back."""
    url = await link(pocket, "read")
    callback = await answer_url(alice, url)
    await pocket.delete_session("acme")
    assert (await deliver(callback)).status_code == 410
    assert (await deliver(url)).status_code == 410
    assert not server.token_requests
    assert await state(pocket, "read") == "NO_SESSION"


async def test_disconnect_during_the_exchange_gives_the_grant_back(
    pocket: PocketAuth, server: AuthorizationServer, alice: Browser
) -> None:
    """The grant that arrives for a deleted connection is revoked, not stored."""
    callback = await answer_url(alice, await link(pocket, "read"))
    server.fault("slow", delay_s=0.3)
    answering = asyncio.create_task(deliver(callback))
    await asyncio.sleep(0.1)
    await pocket.delete_session("acme")
    assert (await asyncio.wait_for(answering, 5)).status_code == 410
    assert server.revocations == 2
    assert await state(pocket, "read") == "NO_SESSION"


# ------------------------------------------------------------------ what is at rest


async def test_dumped_context_has_no_token_and_says_so(
    pocket: PocketAuth, alice: Browser
) -> None:
    """Restored from a dump it raises, rather than sending a mask as a token."""
    context = await connect(pocket, alice, "read")
    dump = context.model_dump()
    assert "access_token" not in dump
    restored = OAuth2Context.model_construct(**dump)
    assert restored.scopes == ["read"]
    with pytest.raises(RedactedContext, match="ask PocketAuth"):
        _ = restored.access_token


def test_own_types_are_stored_by_names_that_outlive_their_modules() -> None:
    """Moving a class inside the package makes no stored session unreadable."""
    assert type_name(OAuth2Context) == "langchain_pocket_auth.OAuth2Context"
    assert find_type(type_name(OAuth2Context)) is OAuth2Context


def test_key_file_is_made_once_and_for_its_user_only(tmp_path: Path) -> None:
    """Of many that start at once all read the same key; others cannot read it."""
    path = tmp_path / "config" / "keys"

    async def make() -> list[KeyRing]:
        return await asyncio.gather(
            *(asyncio.to_thread(KeyRing.file, path) for _ in range(16))
        )

    rings = in_thread(make)
    sealed = rings[0].seal(b"x", "a")
    assert {ring.open(sealed, "a") for ring in rings} == {b"x"}
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert [p.name for p in path.parent.iterdir()] == ["keys"]
    path.chmod(0o644)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        KeyRing.file(path)


def test_key_file_that_cannot_be_made_is_a_setting_to_fix(tmp_path: Path) -> None:
    """A read-only or odd place is told with the remedy."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="POCKET_AUTH_KEYS"):
        KeyRing.file(tmp_path / "file" / "keys")


async def test_wrong_key_refuses_to_start(
    make_pocket: Make, alice: Browser, tmp_path: Path
) -> None:
    """Another key is a ConfigurationError, never "no session"; the right one works."""
    url, base = f"sqlite:///{tmp_path}/p.db", f"http://127.0.0.1:{free_port()}"
    first = make_pocket(url, keys=KEYS, base_url=base)
    await connect(first, alice, "read")
    await first.aclose()
    other = new_key()
    same_id = f"{KEYS.partition(':')[0]}:{other.partition(':')[2]}"
    for wrong in (other, same_id):
        pocket = make_pocket(url, keys=wrong, base_url=base)
        for _ in range(2):
            with pytest.raises(ConfigurationError, match="keys do not fit"):
                await state(pocket, "read")
    rotated = make_pocket(url, keys=f"{other},{KEYS}", base_url=base)
    assert await state(rotated, "read") == "SKIP_AUTH"


def _rows(path: Path, sql: str, *values: Any) -> list[Any]:
    connection = sqlite3.connect(path)
    try:
        with connection:
            return connection.execute(sql, values).fetchall()
    finally:
        connection.close()


SESSION = "name LIKE '[\"session\"%'"


@pytest.mark.parametrize(
    "trick", ["other owner", "older version", "deleted and made again"]
)
async def test_row_that_does_not_belong_there_is_unreadable(
    make_pocket: Make, alice: Browser, tmp_path: Path, trick: str
) -> None:
    """Whoever can write to the table can neither move a session nor bring one back."""
    path = tmp_path / "p.db"
    pocket = make_pocket(f"sqlite:///{path}", keys=KEYS, session_cache_ttl=timedelta())
    await connect(pocket, alice, "read", thread_id="alice")
    [old] = _rows(
        path, f"SELECT version, value FROM pocket_auth_records WHERE {SESSION}"
    )
    if trick == "other owner":
        await connect(pocket, Browser("mallory"), "read", thread_id="mallory")
    elif trick == "older version":
        await connect(pocket, alice, "read", "write", thread_id="alice")
    else:
        await pocket.delete_session("acme", "alice")
        await connect(pocket, alice, "read", thread_id="alice")
    victim = "mallory" if trick == "other owner" else "alice"
    _rows(
        path,
        f"UPDATE pocket_auth_records SET value = ? WHERE {SESSION} AND namespace = ?",
        old[1],
        f"thread:{victim}",
    )
    with pytest.raises(CredentialUnreadable, match="changed, moved"):
        await state(pocket, "read", thread_id=victim)
    with pytest.raises(CredentialUnreadable):
        await link(pocket, "read", thread_id=victim)
    [kept] = _rows(
        path,
        f"SELECT value FROM pocket_auth_records WHERE {SESSION} AND namespace = ?",
        f"thread:{victim}",
    )
    assert kept[0] == old[1]
    # The remedy is to disconnect.
    assert await pocket.delete_session("acme", victim)
    assert await state(pocket, "read", thread_id=victim) == "NO_SESSION"


async def test_pocket_works_again_after_it_was_closed(
    make_pocket: Make, alice: Browser, tmp_path: Path
) -> None:
    """`close` ends what runs; the next call opens it anew, port included."""
    pocket = make_pocket(f"sqlite:///{tmp_path}/p.db", keys=KEYS)
    await connect(pocket, alice, "read")
    for _ in range(2):
        await pocket.aclose()
        await pocket.aclose()
        assert await state(pocket, "read") == "SKIP_AUTH"
    await connect(pocket, alice, "read", "write")


async def test_expired_records_are_erased_and_not_only_hidden(
    make_pocket: Make, alice: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Abandoned links and attempts do not pile up in the store."""
    path = tmp_path / "p.db"
    monkeypatch.setattr("langchain_pocket_auth._vault.SWEEP_EVERY", 5)
    monkeypatch.setattr(
        "langchain_pocket_auth._clicks.ATTEMPT_KEPT", timedelta(seconds=0.01)
    )
    pocket = make_pocket(f"sqlite:///{path}", keys=KEYS)
    url = await link(pocket, "read")
    for _ in range(30):
        await deliver(url, method="POST")
    [[left]] = _rows(
        path, "SELECT count(*) FROM pocket_auth_records WHERE namespace = 'attempt'"
    )
    assert left <= 6


async def test_listing_survives_an_app_registration_that_was_removed(
    make_pocket: Callable[..., PocketAuth], tmp_path: Path, alice: Browser
) -> None:
    """A connection whose client is gone is listed as needing consent."""
    first = make_pocket(f"sqlite:///{tmp_path}/s.db", keys="k:" + "A" * 43)
    request = first.make_request(["read"], auth_provider="acme")
    await alice.avisit(str(await first.prepare(request, auth_provider="acme")))
    assert [s["state"] for s in await first.list_session_state()] == [
        AuthState.SKIP_AUTH
    ]
    rows = [first._service.registry.catalog.get("acme")]
    bare = PocketAuth(
        f"sqlite:///{tmp_path}/s.db",
        keys="k:" + "A" * 43,
        providers=rows,
        base_url=first.base_url,
    )
    try:
        [listed] = await bare.list_session_state()
        assert listed["state"] is AuthState.DO_AUTH
    finally:
        await bare.aclose()
