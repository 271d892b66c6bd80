"""HTTP clients of a context: whom the credential goes to, and what a refusal brings."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import httpx
import pytest
from conftest import provider
from support import connect, link, state, token

from langchain_pocket_auth import AuthContext, ConfigurationError, PocketAuth
from langchain_pocket_auth.testing import AuthorizationServer, Browser
from langchain_pocket_auth.testing._outside import outside

Make = Callable[..., PocketAuth]
Get = Callable[[AuthContext, str], Awaitable[httpx.Response]]


@pytest.fixture(autouse=True)
def _not_the_agents_requests() -> Iterator[None]:
    with outside():
        yield


@pytest.fixture
def api(make_pocket: Make, server: AuthorizationServer) -> PocketAuth:
    """A pocket that knows where acme's API is."""
    row = provider(server, "acme", api_base_url=server.api)
    return make_pocket(providers=[row])


async def get_async(auth: AuthContext, url: str) -> httpx.Response:
    async with auth.async_client(verify=False) as http:
        return await http.get(url)


async def get_sync(auth: AuthContext, url: str) -> httpx.Response:
    def get() -> httpx.Response:
        with auth.sync_client(verify=False) as http:
            return http.get(url)

    return await asyncio.to_thread(get)


@pytest.mark.parametrize("get", [get_async, get_sync])
async def test_refused_token_is_renewed_once_and_the_call_repeated(
    api: PocketAuth, server: AuthorizationServer, alice: Browser, get: Get
) -> None:
    """A token that the API does not take is renewed, whatever its lifetime says."""
    auth = await connect(api, alice, "read")
    server.find_token(auth.access_token).revoked = True
    answer = await get(auth, "/one")
    assert (answer.status_code, server.token_requests["refresh_token"]) == (200, 1)
    assert (await token(api, "read")).access_token != auth.access_token
    # Another call with the old context takes what there is by now.
    assert (await get(auth, "/two")).status_code == 200
    assert server.token_requests["refresh_token"] == 1


async def test_api_that_takes_no_token_costs_one_renewal(
    api: PocketAuth, server: AuthorizationServer, alice: Browser
) -> None:
    """Ten refusals are ten answers, one token request, and nobody is asked."""
    auth = await connect(api, alice, "read")
    server.fault("mutate", path="/api/one", times=50)
    for _ in range(10):
        auth = await token(api, "read")
        server.find_token(auth.access_token).revoked = True
        await get_async(auth, "/one")
    assert server.token_requests["refresh_token"] == 1
    assert await state(api, "read") == "SKIP_AUTH"


async def test_refused_token_that_cannot_be_renewed_is_asked_for_again(
    api: PocketAuth, server: AuthorizationServer, alice: Browser
) -> None:
    """What a person revoked at the provider leads to a new consent, not to failures."""
    server.omit_refresh_token = True
    auth = await connect(api, alice, "read")
    server.revoke_grants("alice")
    assert (await get_async(auth, "/one")).status_code == 401
    assert await state(api, "read") == "DO_AUTH"
    new = await connect(api, alice, "read")
    assert (await get_async(new, "/one")).status_code == 200


async def test_grant_that_is_over_is_asked_for_again(
    api: PocketAuth, server: AuthorizationServer, alice: Browser
) -> None:
    """A refresh that is refused ends in a consent, and the tool sees the 401."""
    auth = await connect(api, alice, "read")
    server.revoke_grants("alice")
    assert (await get_async(auth, "/one")).status_code == 401
    assert await state(api, "read") in {"DO_AUTH", "SKIP_AUTH"}
    assert server.token_errors["invalid_grant"] == 1


async def test_scope_that_the_api_misses_is_asked_for(
    api: PocketAuth, server: AuthorizationServer, alice: Browser
) -> None:
    """A 403 that names a scope widens the next consent; what worked still works."""
    auth = await connect(api, alice, "read")
    answer = await get_async(auth, "/one?require=admin")
    assert answer.status_code == 403
    assert await state(api, "read") == "DO_AUTH"
    assert await state(api) == "SKIP_AUTH"  # a tool that needs less
    await link(api, "read")
    assert await state(api, "read") == "PENDING_RESOLVE"
    new = await connect(api, alice, "read")
    assert set(new.scopes or ()) == {"read", "admin"}
    assert (await get_async(new, "/one?require=admin")).status_code == 200


async def test_credential_does_not_follow_a_redirect(
    api: PocketAuth, server: AuthorizationServer, alice: Browser
) -> None:
    """Another host gets neither the request nor the credential."""
    auth = await connect(api, alice, "read")
    with AuthorizationServer() as other:
        server.fault("redirect", path="/api/one", to=f"{other.api}/stolen")
        answer = await get_async(auth, "/one")
        assert answer.is_redirect
        with pytest.raises(ConfigurationError, match="not known as a host"):
            await get_async(auth, f"{other.api}/stolen")
        assert other.api_calls == 0


@pytest.mark.parametrize("wrong", ["auth", "follow_redirects"])
async def test_setting_that_would_send_it_elsewhere_is_refused(
    api: PocketAuth, alice: Browser, wrong: str
) -> None:
    """The client authorizes requests itself."""
    auth = await connect(api, alice, "read")
    with pytest.raises(ConfigurationError, match=wrong):
        auth.async_client(**{wrong: True})


async def test_client_of_an_unknown_api_wants_its_hosts(
    pocket: PocketAuth, alice: Browser
) -> None:
    """Where the API is has to be known: by the row, or by the tool's author."""
    auth = await connect(pocket, alice, "read")
    with pytest.raises(ConfigurationError, match="name its hosts"):
        auth.async_client()
    async with auth.async_client(hosts=["api.example.com"]) as http:
        with pytest.raises(ConfigurationError, match="not known as a host"):
            await http.get("https://evil.example/")


async def test_stream_that_was_sent_is_not_sent_again(
    api: PocketAuth, server: AuthorizationServer, alice: Browser
) -> None:
    """A body that can be read once is the tool's to send again."""

    async def body() -> AsyncIterator[bytes]:
        yield b"once"

    auth = await connect(api, alice, "read")
    server.find_token(auth.access_token).revoked = True
    async with auth.async_client(verify=False) as http:
        answer = await http.request("GET", "/one", content=body())
        assert answer.status_code == 401
        assert (await http.get("/one")).status_code == 200


async def test_credential_in_the_url_is_taken_out_for_the_second_try(
    make_pocket: Make, server: AuthorizationServer, alice: Browser
) -> None:
    """The renewed credential stands in the place of the old one, not beside it."""
    place: Any = {"query": "access_token"}
    row = provider(server, "acme", api_base_url=server.api, api_credential=place)
    pocket = make_pocket(providers=[row])
    auth = await connect(pocket, alice, "read")
    sent: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(request.url.query.decode())
        return httpx.Response(401 if len(sent) == 1 else 200)

    async with auth.async_client(transport=httpx.MockTransport(answer)) as http:
        assert (await http.get("/one?a=b")).status_code == 200
    old, new = server.issued_access_tokens[-2:]
    assert sent == [f"a=b&access_token={old}", f"a=b&access_token={new}"]


def test_context_of_ones_own_has_no_client() -> None:
    """Nobody would renew it."""

    class Own(AuthContext):
        """A context that a test made."""

    with pytest.raises(ConfigurationError, match="headers"):
        Own(access_token="t", description="d", expires_at=None).async_client()
