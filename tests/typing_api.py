"""
The public API as type checkers see it; never run.

`mypy tests/typing_api.py` reads it in strict mode; pyright finds nothing in it either.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, assert_type

import httpx
from fastapi import APIRouter
from langchain.agents import create_agent
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AnyMessage, ToolMessage
from langchain_core.tools import BaseTool, tool
from langgraph.graph import MessagesState, StateGraph
from langgraph.types import Command

from langchain_pocket_auth import (
    AlreadyResumed,
    AuthContext,
    AuthenticateRequest,
    AuthHandlerInterface,
    AuthorizationRequired,
    AuthProvider,
    AuthState,
    Choice,
    Client,
    Connection,
    ConnectionHealth,
    Event,
    Forgotten,
    Form,
    FormContext,
    FormField,
    FormHandler,
    FutureStore,
    InjectedAuth,
    OAuth2Handler,
    Owner,
    PendingAuthorization,
    Placement,
    PocketAuth,
    PocketAuthError,
    Provider,
    Rewrapped,
    RunInfo,
    answer_open_calls,
    by_thread,
    current_auth,
    from_configurable,
    pending_authorizations,
    resume,
)


@tool
async def list_issues(
    repo: str,
    github: Annotated[AuthContext, InjectedAuth("github", scopes=["repo"])],
    slack: Annotated[AuthContext | None, InjectedAuth("slack", required=False)],
) -> str:
    """List the open issues of a repository."""
    assert_type(github.access_token, str)
    assert_type(github.scopes, list[str] | None)
    assert_type(github.to_dict(), dict[str, str])
    assert_type(current_auth("github"), AuthContext)
    return f"{repo} {slack}"


def make(path: Path, router: APIRouter) -> PocketAuth:
    """Every way of making a pocket."""

    def by_tenant(run: RunInfo) -> Owner | None:
        return Owner("user", run.user) if run.user else by_thread(run)

    async def looked_up(run: RunInfo) -> str | None:
        return run.thread_id

    PocketAuth()
    PocketAuth("memory://", owner="alice", interactive=False)
    PocketAuth(owner=from_configurable("user_id"))
    PocketAuth(owner=looked_up)
    return PocketAuth(
        "sqlite:///sessions.db",
        clients={
            "github": ("client id", "client secret"),
            AuthProvider.SLACK: Client(client_id="public"),
            "google": {"client_id": "id", "client_secret": "secret"},
        },
        providers=[
            Provider(
                id="acme",
                authorization_endpoint="https://acme.test/authorize",
                token_endpoint="https://acme.test/token",
            ),
            path,
            "acme.toml",
        ],
        handlers=[Own, Own()],
        routers=[router],
        owner=by_tenant,
        base_url="http://127.0.0.1:8711",
        keys="2026:key",
        settings_file=path,
        future_ttl=timedelta(days=1),
        session_cache_ttl=timedelta(0),
        app_name="Acme",
    )


def agents(pocket: PocketAuth, model: BaseChatModel, tools: list[BaseTool]) -> None:
    """An agent, a graph, and tools that somebody else wrote."""
    create_agent(model, tools, middleware=[pocket.middleware()])
    pocket.middleware(tools)

    builder = StateGraph(MessagesState)
    pocket.add_tool_node(builder, tools, name="tools", then="agent")

    assert_type(pocket.wrap(list_issues), BaseTool)
    assert_type(pocket.wrap(tools, provider="slack"), list[BaseTool])
    pocket.wrap(
        list_issues,
        provider=AuthProvider.GITHUB,
        scopes=["repo"],
        inject={"headers": lambda auth: {"Authorization": auth.access_token}},
    )
    assert_type(pocket.router, APIRouter)


def pauses(result: dict[str, Any]) -> Command[Any]:
    """Read a pause and answer it."""
    pending = pending_authorizations(result)
    assert_type(pending, list[PendingAuthorization])
    assert_type(pending[0].url, str)
    assert_type(pending[0].missing_scopes, tuple[str, ...])
    assert_type(pending[0].confirm, Literal["code"] | None)
    resume(result)
    resume(result, code="K7MQ-X2RD")
    resume(result, code={"github": "K7MQ-X2RD"})
    return resume(result, decline=[pending[0], "github"])


async def spec(pocket: PocketAuth) -> None:
    """Use the methods of the spec."""
    request = pocket.make_request(["repo"], auth_provider="github")
    assert_type(request, AuthenticateRequest)
    assert_type(pocket.find_handler_instance("github-oauth2"), AuthHandlerInterface)
    state = await pocket.check(request, auth_provider="github")
    assert_type(state, AuthState)
    link = await pocket.prepare(request, "github-oauth2", thread_id="t", profile="work")
    assert_type(link, str | None)
    try:
        context = await pocket.authenticate(
            request, auth_provider=AuthProvider.GITHUB, owner="alice", timeout=5
        )
    except AuthorizationRequired as error:
        assert_type(error.url, str | None)
        return
    assert_type(context, AuthContext)
    await pocket.authenticate_async(request, auth_provider="github")
    assert_type(await pocket.get_auth_context("github"), AuthContext | None)
    await pocket.list_session_state("t", "github", owner=Owner("user", "alice"))
    assert_type(await pocket.delete_session("github"), bool)
    mine = await pocket.connections("alice")
    assert_type(mine, list[Connection])
    assert_type(mine[0].health, ConnectionHealth)
    assert_type(mine[0].account, str | None)
    assert_type(await pocket.disconnect(mine[0]), bool)
    await pocket.disconnect("github", profile="work", owner=Owner("user", "alice"))
    assert_type(await pocket.forget("alice"), Forgotten)
    assert_type(await pocket.rewrap(), Rewrapped)
    await pocket.serve()
    await pocket.aclose()
    pocket.close()


async def watch(
    pocket: PocketAuth, graph: Any, message: AnyMessage, tools: list[BaseTool]
) -> None:
    """What apps are told, and how runs go on."""

    def heard(event: Event) -> None:
        assert_type(event.owner, Owner)
        assert_type(event.thread_ids, tuple[str, ...])
        assert_type(event.reason, str | None)
        assert_type(event.to_dict(), dict[str, Any])

    async def done(result: Any, config: dict[str, Any]) -> None:
        assert_type(config, dict[str, Any])

    stop = pocket.on_event(heard)
    assert_type(stop(), None)
    stop = pocket.auto_resume(graph, on_result=done, patience=timedelta(minutes=1))
    assert_type(stop(), None)
    assert_type(await pocket.wait_connected("github", timeout=1), AuthContext)
    assert_type(await pocket.connect("github", scopes=["repo"]), AuthContext)
    [pending] = pending_authorizations(graph)
    await pocket.connect(pending, paste=True)
    assert_type(await pocket.confirm(pending, "K7MQ-X2RD", owner="alice"), bool)
    auth = await pocket.connect("github", device=True)
    assert_type(auth.headers(), dict[str, str])
    assert_type(auth.apply(httpx.Request("GET", "https://a.test")), httpx.Request)
    assert_type(auth.api_base_url, str | None)
    httpx.AsyncClient(auth=auth.apply)
    assert_type(await pocket.gate(tools).acheck([message]), list[ToolMessage])
    assert_type(pocket.gate(tools).check([message]).result(), list[ToolMessage])
    assert_type(answer_open_calls([message]), list[AnyMessage])
    assert issubclass(AlreadyResumed, PocketAuthError)


KEY = Form(
    fields={"token": FormField(label="API key", secret=True)},
    api_credential=Placement(header="X-Key"),
)
SEARCH = Provider(id="search", token=KEY, variables={})


class SearchHandler(FormHandler):
    """A form of one's own, with one method of it changed."""

    row = SEARCH

    def choices(self, context: AuthContext) -> list[Choice]:
        assert isinstance(context, FormContext)
        return [Choice("1", context.description)]


class OwnContext(AuthContext):
    """A context of one's own."""


class Own(AuthHandlerInterface):
    """A handler written as the spec says."""

    name = "acme-key"
    description = "A key of Acme's"
    scoped = False

    @staticmethod
    def provider() -> AuthProvider:
        return AuthProvider("acme")

    def make_request(
        self, auth_scopes: list[str] | None = None, **kwargs: Any
    ) -> AuthenticateRequest:
        return AuthenticateRequest(auth_scopes=auth_scopes)

    def prepare(
        self,
        auth_req: AuthenticateRequest,
        thread_id: str,
        profile: str,
        future_uid: str,
        *args: Any,
        **kwargs: Any,
    ) -> str:
        return f"https://acme.test/?state={future_uid}"

    async def authenticate(
        self, auth_req: AuthenticateRequest, future_uid: str, *args: Any, **kwargs: Any
    ) -> AuthContext:
        code = await FutureStore.get_future(future_uid).future
        return OwnContext(access_token=str(code), description="Acme", expires_at=None)

    async def refresh(
        self,
        auth_req: AuthenticateRequest,
        context: AuthContext,
        *args: Any,
        **kwargs: Any,
    ) -> AuthContext:
        return context


assert_type(OAuth2Handler.recommended_scopes(), set[str])
