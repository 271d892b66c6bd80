"""Tools of a module whose annotations are texts (PEP 563)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from langchain_core.tools import BaseTool, tool
from pydantic import BaseModel

from langchain_pocket_auth import AuthContext, InjectedAuth

if TYPE_CHECKING:
    from langchain_pocket_auth import AuthContext as Unseen


class TextArgs(BaseModel):
    """Arguments without the context."""

    text: str


@tool
def resolved(text: str, acme: Annotated[AuthContext, InjectedAuth("acme")]) -> str:
    """Act."""
    return f"{text}:{acme.access_token}"


class Unresolved(BaseTool):
    """A tool that names a class which is there for type checkers only."""

    name: str = "unresolved"
    description: str = "Act."
    args_schema: type[BaseModel] = TextArgs

    def _run(self, text: str, acme: Annotated[Unseen, InjectedAuth("acme")]) -> str:
        return text
