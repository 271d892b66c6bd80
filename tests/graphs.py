"""Graphs with guarded tools, built three ways, and how tests run them."""

# No `from __future__ import annotations`: tools are made of local annotations.

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, TypedDict
from uuid import uuid4

import pytest
from conftest import ACME, ZETA, free_port, provider
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.tools import BaseTool, tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.prebuilt import ToolNode, tools_condition
from langgraph.types import interrupt

from langchain_pocket_auth import AuthContext, InjectedAuth, PocketAuth
from langchain_pocket_auth.testing import AuthorizationServer, Browser, ScriptedModel

SYNC, ASYNC = "sync", "async"
MODES = [SYNC, ASYNC]
DOORS = ["create_agent", "add_tool_node", "ToolNode"]
GATES = DOORS[:2]


class State(TypedDict):
    """The state of a hand-built graph."""

    messages: Annotated[list[Any], add_messages]


def thread(name: str = "1", **configurable: Any) -> dict[str, Any]:
    """Return the config of a conversation."""
    return {"configurable": {"thread_id": name, **configurable}}


def run(graph: Any, value: Any, mode: str, config: dict[str, Any] | None = None) -> Any:
    """Run a graph; asynchronous ones on a new event loop each time."""
    config = config or thread()
    if mode == SYNC:
        return graph.invoke(value, config)
    return asyncio.run(graph.ainvoke(value, config))


def ask(graph: Any, mode: str, config: dict[str, Any] | None = None) -> Any:
    """Send a person's message."""
    return run(graph, {"messages": [("user", "go")]}, mode, config)


@dataclass
class Work:
    """Tools that write down what they did, and with which token."""

    mode: str = SYNC
    done: list[tuple[str, str]] = field(default_factory=list)
    """Tool and access token, in the order of the calls."""
    scopes: dict[str, list[str]] = field(default_factory=dict)
    heard: list[tuple[str, Any]] = field(default_factory=list)
    """Tool and the answer to its own question."""

    @property
    def names(self) -> list[str]:
        return sorted(name for name, _ in self.done)

    def tool(
        self, name: str, provider: str, *scopes: str, question: str | None = None
    ) -> BaseTool:
        """Make a tool that needs *provider*, and may ask a question of its own."""
        Need = Annotated[AuthContext, InjectedAuth(provider, scopes=scopes)]  # noqa: N806

        def body(text: str, auth: AuthContext) -> str:
            if question is not None:
                self.heard.append((name, interrupt(question)))
            self.done.append((name, auth.access_token))
            self.scopes[name] = list(auth.scopes or [])
            return f"{name} did {text}"

        if self.mode == SYNC:

            @tool(name)
            def act(text: str, auth: Need) -> str:
                """Act for the user."""
                return body(text, auth)

        else:

            @tool(name)
            async def act(text: str, auth: Need) -> str:
                """Act for the user."""
                return body(text, auth)

        return act


def build(
    door: str,
    pocket: PocketAuth,
    tools: list[BaseTool],
    script: list[AIMessage],
    saver: Any = "memory",
) -> tuple[Any, ScriptedModel]:
    """Return a compiled graph and its model."""
    model = ScriptedModel(script=script)
    checkpointer = InMemorySaver() if saver == "memory" else saver
    if door == "create_agent":
        middleware = [pocket.middleware()]
        graph = create_agent(
            model, tools, middleware=middleware, checkpointer=checkpointer
        )
        return graph, model
    builder = StateGraph(State)
    builder.add_node("agent", lambda s: {"messages": [model.invoke(s["messages"])]})
    builder.add_edge(START, "agent")
    if door == "add_tool_node":
        pocket.add_tool_node(builder, tools)
    else:
        builder.add_node("tools", ToolNode(pocket.wrap(tools)))
        builder.add_edge("tools", "agent")
    builder.add_conditional_edges("agent", tools_condition)
    return builder.compile(checkpointer=checkpointer), model


def results(state: Any, key: str = "messages") -> dict[str, ToolMessage]:
    """Return the results of the tool calls by the tool's name."""
    return {m.name: m for m in state[key] if m.type == "tool"}


class World:
    """One server and one pocket for a whole module; `renew` brings another person."""

    def __init__(self, server: AuthorizationServer) -> None:
        self.server, self.person = server, ""
        self.base_url = f"http://127.0.0.1:{free_port()}"
        self.pocket = PocketAuth(
            "memory://",
            base_url=self.base_url,
            owner=lambda _: self.person,
            providers=[provider(server, name) for name in ("acme", "zeta")],
            clients={"acme": ACME, "zeta": ZETA},
        )

    def renew(self) -> None:
        """Begin as if nothing had happened yet."""
        self.person, server = uuid4().hex, self.server
        server.withhold, server.access_token_ttl_s = set(), 3600
        server.clear_faults()
        for name, (client_id, secret) in {"acme": ACME, "zeta": ZETA}.items():
            server.register(
                client_id=client_id,
                client_secret=secret,
                redirect_uris=[f"{self.base_url}/auth/{name}/oauth2/callback"],
            )
        server.token_requests.clear()
        server.issued_codes.clear()
        server.issued_access_tokens.clear()
        server.issued_refresh_tokens.clear()


def shared() -> tuple[Any, Any, Any, Any]:
    """Return the fixtures `world`, `server`, `pocket` and `alice` for a module."""

    @pytest.fixture(scope="module", name="world")
    def world() -> Iterator[World]:
        with AuthorizationServer() as server:
            found = World(server)
            yield found
            found.pocket.close()

    @pytest.fixture(name="server")
    def server(world: World) -> AuthorizationServer:
        world.renew()
        return world.server

    @pytest.fixture(name="pocket")
    def pocket(world: World, server: AuthorizationServer) -> PocketAuth:
        return world.pocket

    @pytest.fixture(scope="module", name="alice")
    def alice() -> Iterator[Browser]:
        with Browser("alice") as browser:
            yield browser

    return world, server, pocket, alice
