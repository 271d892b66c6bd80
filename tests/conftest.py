"""What tests share: a strict authorization server, a pocket that trusts it, a graph."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from langchain_core.messages import AIMessage

from langchain_pocket_auth import PocketAuth, Provider
from langchain_pocket_auth.testing import AuthorizationServer, Browser, free_port

ACME, ZETA = ("acme-client", "acme-secret"), ("zeta-client", "zeta-secret")


def provider(server: AuthorizationServer, name: str, **facts: Any) -> Provider:
    """Return a provider whose endpoints are *server*'s."""
    known = {
        "id": name,
        "display_name": name.title(),
        "issuer": server.issuer,
        "authorization_endpoint": server.authorization_endpoint,
        "token_endpoint": server.token_endpoint,
        "revocation_endpoint": server.revocation_endpoint,
        "authorization_response_iss_parameter_supported": True,
    }
    return Provider(**known | facts)


def call(name: str, call_id: str | None = None, **args: Any) -> dict[str, Any]:
    """Return a tool call as a model writes it."""
    return {
        "name": name,
        "args": args,
        "id": call_id or f"call-{name}",
        "type": "tool_call",
    }


def says(*calls: dict[str, Any]) -> AIMessage:
    """Return the message of a model that calls tools."""
    return AIMessage("", tool_calls=list(calls))


@pytest.fixture
def server() -> Iterator[AuthorizationServer]:
    """A strict authorization server with two clients, acme's and zeta's."""
    with AuthorizationServer() as running:
        yield running


@pytest.fixture
def make_pocket(server: AuthorizationServer) -> Iterator[Callable[..., PocketAuth]]:
    """
    Make pockets that know the providers acme and zeta; they are closed at the end.

    `make_pocket(base_url=..., storage=..., **settings)`; each gets a port of its own.
    """
    made: list[PocketAuth] = []

    def make(storage: Any = "memory://", **settings: Any) -> PocketAuth:
        base = settings.pop("base_url", None) or f"http://127.0.0.1:{free_port()}"
        for name, (client_id, secret) in {"acme": ACME, "zeta": ZETA}.items():
            server.register(
                client_id=client_id,
                client_secret=secret,
                redirect_uris=[f"{base}/auth/{name}/oauth2/callback"],
            )
        rows = [provider(server, "acme"), provider(server, "zeta")]
        pocket = PocketAuth(
            storage,
            base_url=base,
            providers=[*rows, *settings.pop("providers", ())],
            clients={"acme": ACME, "zeta": ZETA} | settings.pop("clients", {}),
            **settings,
        )
        made.append(pocket)
        return pocket

    yield make
    for pocket in made:
        pocket.close()


@pytest.fixture
def pocket(make_pocket: Callable[..., PocketAuth]) -> PocketAuth:
    """A pocket with memory storage."""
    return make_pocket()


@pytest.fixture
def alice() -> Browser:
    """A person with a browser."""
    return Browser("alice")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One more than there are cores: tests wait for servers, processes and lifetimes."""
    return (os.cpu_count() or 1) + 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what test_matrix.py saw; the workers of pytest-xdist cannot."""
    seen: dict[tuple[int, str, str, tuple[str, ...]], list[str]] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", ()):
                if name == "matrix" and report.when == "call":
                    place, door, case, mode, *numbers = value
                    row = (place, door, case, tuple(numbers))
                    seen.setdefault(row, []).append(mode)
    if not seen:
        return
    counted = ("pauses", "connections asked", "model calls", "tool runs")
    lines: list[tuple[str, ...]] = [("agent", "case", "mode", *counted)]
    for (_, door, case, numbers), modes in sorted(seen.items()):
        lines.append((door, case, ", ".join(sorted(modes, reverse=True)), *numbers))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    terminalreporter.section("pauses, connections asked at each, and what ran")
    for line in lines:
        cells = (c.ljust(w) for c, w in zip(line, widths, strict=True))
        terminalreporter.write_line("  ".join(cells).rstrip())
