"""One replica of an app: an agent, its connect pages and callbacks, on a shared store."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.tools import tool
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

from langchain_pocket_auth import (
    AuthContext,
    InjectedAuth,
    PocketAuth,
    Provider,
    from_configurable,
    pending_authorizations,
    resume,
)
from langchain_pocket_auth.testing import ScriptedModel


@tool
async def whose(
    acme: Annotated[AuthContext, InjectedAuth("acme", scopes=["read"])],
) -> str:
    """Say whose account it is."""
    async with acme.async_client() as http:
        return (await http.get("/me")).json()["sub"]


def answer(result: dict[str, Any]) -> dict[str, Any]:
    """Return what a person's chat would show."""
    said = [m.content for m in result["messages"] if isinstance(m, ToolMessage)]
    return {"links": [p.url for p in pending_authorizations(result)], "said": said}


def main(store: str, keys: str, base: str, port: str, issuer: str, graphs: str) -> None:
    """Serve until killed."""
    pocket = PocketAuth(
        store,
        keys=keys,
        base_url=base,
        owner=from_configurable("user_id"),
        clients={"acme": ("acme-client", "acme-secret")},
        providers=[
            Provider(
                id="acme",
                issuer=issuer,
                authorization_endpoint=f"{issuer}/authorize",
                token_endpoint=f"{issuer}/token",
                api_base_url=f"{issuer}/api",
            )
        ],
    )
    agents: list[Any] = []

    @asynccontextmanager
    async def running(_: FastAPI) -> AsyncIterator[None]:
        call = {"name": "whose", "args": {}, "id": "c1"}
        async with AsyncSqliteSaver.from_conn_string(graphs) as saver:
            agents.append(
                create_agent(
                    ScriptedModel(script=[AIMessage("", tool_calls=[call])]),
                    [whose],
                    middleware=[pocket.middleware()],
                    checkpointer=saver,
                )
            )
            yield
        await pocket.aclose()

    app = FastAPI(lifespan=running)
    app.include_router(pocket.router)

    def config(user: str) -> Any:
        return {"configurable": {"thread_id": user, "user_id": user}}

    @app.post("/ask/{user}")
    async def ask(user: str) -> dict[str, Any]:
        asked = {"messages": [("user", "whose account is it?")]}
        return answer(await agents[0].ainvoke(asked, config(user)))

    @app.post("/resume/{user}")
    async def go_on(user: str) -> dict[str, Any]:
        state = await agents[0].aget_state(config(user))
        return answer(await agents[0].ainvoke(resume(state), config(user)))

    uvicorn.run(app, port=int(port), log_level="error", access_log=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
