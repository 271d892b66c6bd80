"""The agent. It has no checkpointer: the server brings its own."""

import os
from typing import Annotated

import httpx
from accounts import pocket
from langchain.agents import create_agent
from langchain_core.messages import AIMessage
from langchain_core.tools import tool

from langchain_pocket_auth import AuthContext, InjectedAuth
from langchain_pocket_auth.testing import ScriptedModel


@tool
async def list_issues(
    repo: str, acme: Annotated[AuthContext, InjectedAuth("acme", scopes=["repo"])]
) -> str:
    """List the open issues of a repository."""
    headers = {"Authorization": f"Bearer {acme.access_token}"}
    async with httpx.AsyncClient(headers=headers) as client:
        answer = await client.get(os.environ["ACME_API"] + "/issues")
    return answer.text


ask = {"name": "list_issues", "args": {"repo": "acme/app"}, "id": "call-1"}
model = ScriptedModel(script=[AIMessage("", tool_calls=[ask])])

agent = create_agent(model, [list_issues], middleware=[pocket.middleware()])
