"""What tests share: a strict authorization server, a pocket that trusts it, a graph."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from langchain_core.messages import AIMessage

from langchain_pocket_auth import PocketAuth, Provider
from langchain_pocket_auth.testing import AuthorizationServer, Browser, free_port

if TYPE_CHECKING:
    from databases import Postgres, Redis

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


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Postgres]:
    """A PostgreSQL; `postgres_server.url(postgres_server.fresh())` is an empty one."""
    from databases import Postgres

    with Postgres() as running:
        yield running


@pytest.fixture(scope="session")
def redis_server() -> Iterator[Redis]:
    """A Redis; `redis_server.url(redis_server.fresh())` is an empty one."""
    from databases import Redis

    with Redis() as running:
        yield running


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


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the choice of twins."""
    parser.addoption(
        "--twins",
        choices=["even", "odd", "all"],
        default="even",
        help="of cases that differ in sync and async alone: one of two, or all",
    )


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """
    Run a case of a larger family in one mode, the next in the other.

    `--twins=odd` runs those that are left out here; CI does, with the lowest versions.
    """
    wanted = config.getoption("--twins")
    if wanted == "all":
        return
    families: dict[str, dict[str, int]] = {}
    for item in items:
        if (case := _twin(item)) is not None:
            family = families.setdefault(item.nodeid.partition("[")[0], {})
            family.setdefault(case[0], len(family))
    kept, left = [], []
    for item in items:
        case = _twin(item)
        family = families.get(item.nodeid.partition("[")[0], {})
        odd = case is not None and (family[case[0]] + case[1]) % 2
        (left if len(family) > 1 and odd == (wanted == "even") else kept).append(item)
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = kept


def _twin(item: pytest.Item) -> tuple[str, int] | None:
    """Return what an item shares with its twin, and which of the two it is."""
    parameters = dict(getattr(getattr(item, "callspec", None), "params", {}))
    mode = parameters.pop("mode", None)
    if mode not in ("sync", "async"):
        return None
    return repr(sorted(parameters.items(), key=lambda each: each[0])), mode == "async"
