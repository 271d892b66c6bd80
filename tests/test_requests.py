"""Authorization requests sent beforehand, resources, and where metadata may lead."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import pytest
from conftest import ACME
from support import KEYS, Clock, connect, deliver, link, outcome_of, query_of, token

from langchain_pocket_auth import ConfigurationError, PocketAuth
from langchain_pocket_auth._http import Http
from langchain_pocket_auth.handlers._discovery import discover
from langchain_pocket_auth.storage.memory import MemoryBackend
from langchain_pocket_auth.testing import AuthorizationServer, Browser

Make = Callable[..., PocketAuth]
MCP = "https://mcp.acme.test/mcp"


@pytest.fixture
def pushing(server: AuthorizationServer) -> AuthorizationServer:
    """A server that takes no other requests than pushed ones."""
    server.pushed_requests = "required"
    return server


async def started(url: str) -> str:
    """Press the button of a connect page; return where it leads."""
    page = await deliver(url, method="POST")
    return page.text.partition('href="')[2].partition('"')[0].replace("&amp;", "&")


def pushes(server: AuthorizationServer, make_pocket: Make, **facts: Any) -> PocketAuth:
    """Return a pocket whose provider `pushed` takes requests beforehand."""
    endpoint = f"{server.origin}/par"
    row = server.provider(
        "pushed", pushed_authorization_request_endpoint=endpoint, **facts
    )
    pocket = make_pocket(providers=[row], clients={"pushed": ACME})
    uri = f"{pocket.base_url}/auth/pushed/oauth2/callback"
    server.register(client_id=ACME[0], client_secret=ACME[1], redirect_uris=[uri])
    return pocket


async def test_pushed_request_is_not_in_the_address(
    pushing: AuthorizationServer, make_pocket: Make, alice: Browser
) -> None:
    """The person's browser carries the client's name and the request's, no more."""
    pocket = pushes(pushing, make_pocket)
    first = await started(await link(pocket, provider="pushed"))
    assert query_of(first).keys() == {"client_id", "request_uri"}
    assert await connect(pocket, alice, provider="pushed")
    assert (
        await token(pocket, provider="pushed")
    ).access_token in pushing.issued_access_tokens


async def test_used_address_is_started_anew_from_the_link(
    pushing: AuthorizationServer, make_pocket: Make, alice: Browser
) -> None:
    """A pushed request is good for one visit; the connect link makes another."""
    pocket = pushes(pushing, make_pocket)
    url = await link(pocket, provider="pushed")
    address = await started(url)
    for status in (303, 400):
        answer = await deliver(address)
        assert answer.status_code == status
    assert await connect(pocket, alice, provider="pushed")
    assert await token(pocket, provider="pushed")


async def test_server_says_in_its_metadata_that_it_takes_them(
    pushing: AuthorizationServer,
) -> None:
    """The endpoint is discovered, and what is discovered is used."""
    http = Http()
    metadata = await discover(http, pushing.issuer, provider="acme")
    await http.close()
    endpoint = metadata.pushed_authorization_request_endpoint
    assert endpoint == f"{pushing.origin}/par"


@pytest.mark.parametrize(
    ("fault", "outcome"),
    [("503", "unavailable"), ("html200", "unavailable"), ("invalid_client", "failed")],
)
async def test_refused_push_is_a_page_and_the_link_works_again(
    pushing: AuthorizationServer,
    make_pocket: Make,
    alice: Browser,
    fault: str,
    outcome: str,
) -> None:
    """Nothing is lost when the server does not take a request."""
    pocket = pushes(pushing, make_pocket)
    pushing.fault(fault, path="/par")
    page = await deliver(await link(pocket, provider="pushed"), method="POST")
    assert outcome_of(page) == outcome
    assert await connect(pocket, alice, provider="pushed")


async def test_resource_is_named_in_every_request(
    server: AuthorizationServer,
    make_pocket: Make,
    alice: Browser,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Consent, code and refresh ask for the same resource, or the server refuses."""
    row = server.provider("mcp", resource=MCP)
    pocket = make_pocket(providers=[row], clients={"mcp": ACME})
    uri = f"{pocket.base_url}/auth/mcp/oauth2/callback"
    server.register(client_id=ACME[0], client_secret=ACME[1], redirect_uris=[uri])
    assert (
        query_of(await started(await link(pocket, provider="mcp")))["resource"] == MCP
    )
    await connect(pocket, alice, provider="mcp")
    Clock(monkeypatch).forward(3600)
    assert await token(pocket, provider="mcp")
    assert server.token_requests["refresh_token"] == 1
    assert server.token_errors == {}


async def test_session_for_one_resource_is_not_taken_for_another(
    server: AuthorizationServer, make_pocket: Make, alice: Browser
) -> None:
    """A row that names another resource asks again: its tokens are for that one."""
    rows = [server.provider("mcp", resource=f"{MCP}/{n}") for n in (1, 2)]
    backend = MemoryBackend()
    for row in rows:
        pocket = make_pocket(backend, keys=KEYS, providers=[row], clients={"mcp": ACME})
        uri = f"{pocket.base_url}/auth/mcp/oauth2/callback"
        server.register(client_id=ACME[0], client_secret=ACME[1], redirect_uris=[uri])
        assert await link(pocket, provider="mcp")
        await connect(pocket, alice, provider="mcp")
    assert server.authorizations == 2


# ------------------------------------------------------ where metadata may lead


@pytest.fixture
def inner() -> Iterator[socket.socket]:
    """A service of the private network that must not be reached."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0)
        yield listener


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "::1", "::ffff:127.0.0.1", "10.0.0.1", "192.168.1.1"),
        *("169.254.169.254", "fd00::1", "fe80::1", "0.0.0.0", "100.64.0.1"),
        *("224.0.0.1", "::ffff:10.0.0.1"),
    ],
)
async def test_name_that_leads_into_a_private_network_is_not_connected_to(
    monkeypatch: pytest.MonkeyPatch, inner: socket.socket, address: str
) -> None:
    """Names are resolved before, and what is connected to is what was looked at."""
    port = inner.getsockname()[1]

    async def leads_inside(*_: Any, **__: Any) -> Any:
        return [(0, 0, 0, "", ("1.1.1.1", 1)), (0, 0, 0, "", (address, 1))]

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "getaddrinfo", leads_inside)
    http = Http()
    http.only_public("evil.test")
    with pytest.raises(ConfigurationError, match="private network") as told:
        await http.request(
            "POST", f"https://evil.test:{port}/token", provider="acme", data={"a": "b"}
        )
    await http.close()
    assert address not in str(told.value)
    with pytest.raises(BlockingIOError):
        inner.accept()


async def test_looked_at_address_is_the_one_connected_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A name that leads elsewhere the second time does not help."""
    asked: list[str] = []
    connected: list[str] = []

    async def once(host: str, *_: Any, **__: Any) -> Any:
        asked.append(host)
        return [(0, 0, 0, "", ("93.184.216.34", 443))]

    async def note(remote_host: str, **_: Any) -> Any:
        connected.append(remote_host)
        raise OSError

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "getaddrinfo", once)
    monkeypatch.setattr(anyio, "connect_tcp", note)
    http = Http()
    http.only_public("idp.test")
    with pytest.raises(Exception, match=r"idp\.test"):
        await http.request("GET", "https://idp.test/jwks", provider="acme")
    await http.close()
    assert asked == ["idp.test"]
    assert connected == ["93.184.216.34"]
