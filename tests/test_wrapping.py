"""Wrapped tools look and behave as the tools they wrap, and bring the context."""

# No `from __future__ import annotations`: tools are made of local annotations.

import asyncio
import copy
import functools
import threading
from collections.abc import Callable
from typing import Annotated, Any, Optional, Union

import futures_tools
import pytest
from conftest import call, says
from graphs import ASYNC, MODES, SYNC, Work, World, ask, build, results, shared
from langchain_core.messages import ToolMessage
from langchain_core.tools import (
    BaseTool,
    InjectedToolCallId,
    StructuredTool,
    Tool,
    ToolException,
    tool,
)
from langchain_core.utils.function_calling import convert_to_openai_tool
from langchain_tests.unit_tests import ToolsUnitTests
from langgraph.prebuilt import InjectedState, InjectedStore, ToolRuntime
from langgraph.store.memory import InMemoryStore
from langgraph.types import Command
from pydantic import BaseModel, ConfigDict, Field, field_validator

from langchain_pocket_auth import (
    AuthContext,
    AuthorizationRequired,
    InjectedAuth,
    PocketAuth,
    current_auth,
)
from langchain_pocket_auth.testing import (
    AuthorizationServer,
    Browser,
    LeakWatch,
    ScriptedModel,
    assert_no_leak,
)

world, server, pocket, alice = shared()

Acme = Annotated[AuthContext, InjectedAuth("acme")]
MaybeZeta = Annotated[AuthContext | None, InjectedAuth("zeta", required=False)]


def link(pocket: PocketAuth, person: Browser, provider: str, *scopes: str) -> None:
    """Connect a provider for the person of this test."""
    owner = pocket._service.owners.resolve({})
    request = pocket.make_request(list(scopes), auth_provider=provider)
    url = asyncio.run(pocket.prepare(request, auth_provider=provider, owner=owner))
    assert person.visit(url or "").status_code == 200


@pytest.fixture(scope="module")
def connected(world: World, alice: Browser) -> str:
    """The access token of somebody who is connected at acme."""
    world.renew()
    world.person = "connected"
    link(world.pocket, alice, "acme")
    return world.server.issued_access_tokens[-1]


@pytest.fixture
def token(connected: str, world: World, pocket: PocketAuth) -> str:
    """Let the test be run for somebody who is connected; return the token."""
    world.person = "connected"
    return connected


# ------------------------------------------------------------------------- the kinds


class Args(BaseModel):
    """What the tool takes."""

    model_config = ConfigDict(extra="forbid")
    text: str = Field(description="what to say")
    times: int = 1


class ArgsWithAuth(Args):
    """What the tool takes, the context included."""

    acme: Acme


class Plain(BaseTool):
    """A tool with a class of its own."""

    name: str = "plain"
    description: str = "Say something."
    args_schema: type[BaseModel] = Args

    def _run(self, text: str, acme: Acme, times: int = 1) -> str:
        return f"{text * times}:{acme.access_token}"


class Schemaless(BaseTool):
    """A tool whose schema is inferred from `_run`."""

    name: str = "schemaless"
    description: str = "Say something."

    def _run(self, text: str, acme: Acme) -> str:
        return f"{text}:{acme.access_token}"


class AsyncOnly(BaseTool):
    """A tool that only runs asynchronously."""

    name: str = "async_only"
    description: str = "Say something."
    args_schema: type[BaseModel] = ArgsWithAuth

    def _run(self, *_: Any, **__: Any) -> str:
        raise NotImplementedError

    async def _arun(self, text: str, acme: Acme, times: int = 1) -> str:
        return f"{text * times}:{acme.access_token}"


def _say(text: str, acme: Acme, times: int = 1) -> str:
    """Say something."""
    return f"{text * times}:{acme.access_token}"


async def _asay(text: str, acme: Acme, times: int = 1) -> str:
    """Say something."""
    return f"{text * times}:{acme.access_token}"


def _traced(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def traced(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return traced


@tool
def everything(
    text: str,
    *,
    acme: Acme,
    zeta: MaybeZeta,
    runtime: ToolRuntime,
    state: Annotated[dict[str, Any], InjectedState],
    store: Annotated[Any, InjectedStore()],
    call_id: Annotated[str, InjectedToolCallId],
) -> str:
    """Say something, with everything that can be injected."""
    assert runtime.tool_call_id == call_id
    assert state["messages"]
    assert store is runtime.store
    assert zeta is None
    return f"{text}:{acme.access_token}"


@tool(parse_docstring=True, return_direct=True, extras={"cache": "yes"})
def documented(text: str, acme: Acme) -> str:
    """Say something.

    Args:
        text: what to say
        acme: who says it
    """
    return f"{text}:{acme.access_token}"


def _mcp(**kwargs: Any) -> tuple[str, dict[str, Any]]:
    auth = current_auth()
    return f"{kwargs['text']}:{auth.access_token}", {"arguments": kwargs}


async def _amcp(**kwargs: Any) -> tuple[str, dict[str, Any]]:
    return _mcp(**kwargs)


MCP_SCHEMA = {
    "type": "object",
    "title": "mcp",
    "properties": {"text": {"type": "string"}, "headers": {"type": "object"}},
    "required": ["text", "headers"],
}

KINDS: dict[str, Callable[[], BaseTool]] = {
    "@tool": lambda: tool("say")(_say),
    "async @tool": lambda: tool("say")(_asay),
    "both": lambda: StructuredTool.from_function(_say, _asay, name="say"),
    "schema": lambda: tool("say", args_schema=Args)(_say),
    "schema with auth": lambda: tool("say", args_schema=ArgsWithAuth)(_say),
    "decorated": lambda: tool("say")(_traced(_say)),
    "PEP 563": lambda: futures_tools.resolved,
    "class": Plain,
    "class without schema": Schemaless,
    "async class": AsyncOnly,
    "docstring": lambda: documented,
    "flags": lambda: StructuredTool.from_function(
        _say,
        name="say",
        return_direct=True,
        handle_tool_error="oh no",
        handle_validation_error=True,
        tags=["a", "b"],
        metadata={"team": "red"},
        verbose=False,
        infer_schema=True,
    ),
}
FOREIGN: dict[str, Callable[[], BaseTool]] = {
    "Tool": lambda: Tool("say", lambda text: f"{text}:{current_auth()}", "Say."),
    "MCP": lambda: StructuredTool(
        name="mcp",
        description="Say.",
        args_schema=MCP_SCHEMA,
        coroutine=_amcp,
        func=_mcp,
        response_format="content_and_artifact",
        metadata={"server": "x"},
    ),
}


def looks(one: BaseTool) -> dict[str, Any]:
    """Return all that a tool shows."""
    shown = one.tool_call_schema
    return {
        "name": one.name,
        "description": one.description,
        "args": one.args,
        "args_schema": one.args_schema,
        "schema": shown if isinstance(shown, dict) else shown.model_json_schema(),
        "input": one.get_input_jsonschema() if isinstance(shown, dict) else None,
        "openai": convert_to_openai_tool(one),
        "output": str(one.get_output_schema()),
        **{
            flag: getattr(one, flag)
            for flag in (
                "return_direct",
                "response_format",
                "handle_tool_error",
                "handle_validation_error",
                "tags",
                "metadata",
                "extras",
                "verbose",
                "callbacks",
                "is_single_input",
            )
            if hasattr(one, flag)
        },
    }


@pytest.mark.parametrize("kind", [*KINDS, *FOREIGN, "everything"])
def test_wrapped_tool_looks_like_the_bare_one(pocket: PocketAuth, kind: str) -> None:
    """Name, schemas, flags and class stay; the model is not shown the context."""
    known: dict[str, Any] = {**KINDS, **FOREIGN, "everything": lambda: everything}
    bare = known[kind]()
    foreign = {"provider": "acme"} if kind in FOREIGN else {}
    wrapped = pocket.wrap(bare, **foreign)
    assert looks(wrapped) == looks(bare)
    assert isinstance(wrapped, type(bare))
    assert type(wrapped).__name__ == type(bare).__name__
    assert type(wrapped).__doc__ == type(bare).__doc__
    assert "acme" not in str(looks(wrapped)["openai"]).replace("who says it", "")
    assert wrapped is not bare


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_context_reaches_every_kind_of_tool(
    pocket: PocketAuth, token: str, kind: str, mode: str
) -> None:
    """The tool gets the live context, and what the model makes up is dropped."""
    wrapped = pocket.wrap(KINDS[kind]())
    seen: list[Any] = []
    for extra in ({}, {"acme": "forged"}, {"acme": {"access_token": "forged"}}):
        given = {"text": "x", **extra}
        if mode == ASYNC:
            seen.append(asyncio.run(wrapped.ainvoke(given)))
        elif "async" in kind:
            with pytest.raises(NotImplementedError):
                wrapped.invoke(given)
            return
        else:
            seen.append(wrapped.invoke(given))
    assert seen == ["x:***"] * 3


@pytest.mark.parametrize("mode", MODES)
def test_foreign_tools_read_the_current_context(
    pocket: PocketAuth, token: str, mode: str
) -> None:
    """Tools of others get the context by contextvar, and nothing in their arguments."""
    for name, make in FOREIGN.items():
        wrapped = pocket.wrap(make(), provider="acme")
        given = call(wrapped.name, text="x", headers={})
        if name == "Tool":
            given = call(wrapped.name, __arg1="x")
        if mode == ASYNC:
            answer = asyncio.run(wrapped.ainvoke(given))
        else:
            answer = wrapped.invoke(given)
        assert answer.text.startswith("x:")
        assert answer.status == "success"
        if name == "MCP":
            assert answer.artifact == {"arguments": {"text": "x", "headers": {}}}


@pytest.mark.parametrize("door", ["create_agent", "add_tool_node", "ToolNode"])
def test_everything_injected_works_in_a_graph(
    pocket: PocketAuth, token: str, door: str
) -> None:
    """State, store, runtime and call id come beside the contexts."""
    from langchain.agents import create_agent

    script = [says(call("everything", text="x", acme="forged", zeta="forged"))]
    if door == "create_agent":
        graph = create_agent(
            ScriptedModel(script=script),
            [everything],
            middleware=[pocket.middleware()],
            store=InMemoryStore(),
        )
        assert results(ask(graph, SYNC))["everything"].text == "x:***"
        return
    graph, _ = build(door, pocket, [everything], script)
    graph.store = InMemoryStore()
    assert results(ask(graph, SYNC))["everything"].text == "x:***"


# ---------------------------------------------------------------- LangChain's own tests


class _Standard(ToolsUnitTests):
    """LangChain's unit tests for tools, on a tool of a wrapped or a bare kind."""

    wrapped = False

    @pytest.fixture(autouse=True)
    def _world(self, world: World) -> None:
        type(self).pocket = world.pocket

    @property
    def tool_constructor(self) -> Any:
        @tool
        def standard(text: str, acme: MaybeAcme = None) -> str:
            """Say something."""
            return text

        return self.pocket.wrap(standard) if self.wrapped else standard  # type: ignore[attr-defined]

    @property
    def tool_invoke_params_example(self) -> dict[str, Any]:
        return {"text": "x"}


MaybeAcme = Annotated[AuthContext | None, InjectedAuth("acme", required=False)]


class TestBare(_Standard):
    """The bare tool passes."""


class TestWrapped(_Standard):
    """So does the wrapped one."""

    wrapped = True


# ----------------------------------------------------------------------- what is refused


def _bare_context(text: str, acme: AuthContext) -> str:
    """Act."""
    return text


def _or_none(text: str, acme: AuthContext | None = None) -> str:
    """Act."""
    return text


def _optional(text: str, acme: Optional[Acme] = None) -> str:  # noqa: UP045
    """Act."""
    return text


def _class_mark(text: str, acme: Annotated[AuthContext, InjectedAuth]) -> str:
    """Act."""
    return text


def _mark_alone(text: str, acme: InjectedAuth) -> str:
    """Act."""
    return text


def _in_list(text: str, acme: list[Acme]) -> str:
    """Act."""
    return text


def _no_context(text: str, acme: Annotated[str, InjectedAuth("acme")]) -> str:
    """Act."""
    return text


def _required_or_none(
    text: str, acme: Annotated[AuthContext | None, InjectedAuth("acme")]
) -> str:
    """Act."""
    return text


def _two_marks(
    text: str, acme: Annotated[AuthContext, InjectedAuth("acme"), InjectedAuth("zeta")]
) -> str:
    """Act."""
    return text


def _union(text: str, acme: Union[Acme, str]) -> str:  # noqa: UP007
    """Act."""
    return text


WRONG = [
    _bare_context,
    _or_none,
    _optional,
    _class_mark,
    _mark_alone,
    _in_list,
    _no_context,
    _required_or_none,
    _two_marks,
    _union,
]


@pytest.mark.parametrize("function", WRONG, ids=lambda f: f.__name__)
def test_wrong_annotation_is_refused_with_the_right_line(
    pocket: PocketAuth, function: Any
) -> None:
    """What the model would get to see is a TypeError that says what to write."""

    class Wrong(BaseTool):
        name: str = "wrong"
        description: str = "Act."
        args_schema: type[BaseModel] = Args
        _run = function

    right = r"acme: Annotated\[AuthContext, InjectedAuth\('provider'\)\]"
    with pytest.raises(TypeError, match=right):
        pocket.wrap(Wrong())
    with pytest.raises(TypeError, match=right):
        pocket.wrap([Wrong()])
    with pytest.raises(TypeError, match=right):
        pocket.middleware([Wrong()])


def test_unresolvable_annotation_is_refused(pocket: PocketAuth) -> None:
    """A name that exists for type checkers only cannot be looked at."""
    with pytest.raises(TypeError, match="cannot be resolved"):
        pocket.wrap(futures_tools.Unresolved())


def test_wrapping_twice_or_for_nothing_is_refused(pocket: PocketAuth) -> None:
    """Neither is silently right: the inner guard, or any guard, would be missing."""

    @tool
    def plain(text: str) -> str:
        """Echo."""
        return text

    with pytest.raises(ValueError, match="wrapped already"):
        pocket.wrap(pocket.wrap(plain, provider="acme"), provider="zeta")
    with pytest.raises(ValueError, match="needs no authorization"):
        pocket.wrap(plain)
    assert pocket.wrap([plain]) == [plain]
    wrapped = pocket.wrap([plain], provider="acme")
    assert pocket.wrap(wrapped)[0] is wrapped[0]
    with pytest.raises(TypeError, match="list of strings"):
        InjectedAuth("acme", scopes="read")


# --------------------------------------------------------------- what a call has at hand


@pytest.mark.parametrize("mode", MODES)
def test_optional_connection_is_used_and_never_asked_for(
    server: AuthorizationServer, pocket: PocketAuth, alice: Browser, mode: str
) -> None:
    """`required=False` gives None until there is a connection, then its context."""

    @tool("look")
    def look(text: str, zeta: MaybeZeta) -> str:
        """Look."""
        return "none" if zeta is None else f"{zeta.access_token[:6]}"

    @tool("look")
    async def alook(text: str, zeta: MaybeZeta) -> str:
        """Look."""
        return "none" if zeta is None else f"{zeta.access_token[:6]}"

    tools = [look if mode == SYNC else alook]
    script = [says(call("look", text="x"))]
    for door in ("create_agent", "add_tool_node", "ToolNode"):
        graph, _ = build(door, pocket, tools, script)
        assert results(ask(graph, mode))["look"].text == "none"
    link(pocket, alice, "zeta")
    first = server.issued_access_tokens[0][:6]
    for door in ("create_agent", "add_tool_node", "ToolNode"):
        graph, _ = build(door, pocket, tools, script)
        assert results(ask(graph, mode))["look"].text == first


def test_current_auth_names_what_there_is(
    server: AuthorizationServer, pocket: PocketAuth, alice: Browser
) -> None:
    """One connection needs no name; of several the fitting one, else a list."""
    link(pocket, alice, "acme", "read", "write")
    link(pocket, alice, "zeta")
    first, second = server.issued_access_tokens
    Read = Annotated[AuthContext, InjectedAuth("acme", scopes=["read"])]  # noqa: N806
    Write = Annotated[AuthContext, InjectedAuth("acme", scopes=["write"])]  # noqa: N806
    Zeta = Annotated[AuthContext, InjectedAuth("zeta")]  # noqa: N806
    seen: dict[str, Any] = {}

    @tool
    def both(acme: Read, same: Write, zeta: Zeta) -> str:
        """Look at everything."""
        seen["acme"] = current_auth("acme").access_token
        seen["zeta"] = current_auth("zeta", "default").access_token
        for wrong in ({}, {"provider": "nope"}, {"profile": "work"}):
            try:
                current_auth(**wrong)
            except LookupError as error:
                seen[str(wrong)] = str(error)
        return "ok"

    pocket.wrap(both).invoke({})
    assert (seen["acme"], seen["zeta"]) == (first, second)
    errors = [text for key, text in seen.items() if key.startswith("{")]
    assert len(errors) == 3
    for text in errors:
        assert "acme (profile 'default'), zeta (profile 'default')" in text
    with pytest.raises(LookupError, match="outside a guarded tool"):
        current_auth()


def test_function_called_directly_fails_closed(pocket: PocketAuth, token: str) -> None:
    """Past the guard there is no context: neither argument nor contextvar."""
    wrapped = pocket.wrap(FOREIGN["MCP"](), provider="acme")
    assert isinstance(wrapped, StructuredTool)
    assert wrapped.func is not None
    with pytest.raises(LookupError):
        wrapped.func(text="x")
    with pytest.raises(LookupError):
        wrapped._run(text="x", config={})


# ------------------------------------------------------------------------------ inject=


class Strict(BaseModel):
    """A schema with a validator, which must survive."""

    model_config = ConfigDict(extra="forbid")
    text: str
    headers: dict[str, str]

    @field_validator("text")
    @classmethod
    def _upper(cls, value: str) -> str:
        return value.upper()


def _send(text: str, headers: dict[str, str]) -> str:
    """Send."""
    return f"{text} {sorted(headers)} {headers['Authorization'].split()[0]}"


def bearer(auth: AuthContext) -> dict[str, str]:
    """Make a header."""
    return {"Authorization": f"Bearer {auth.access_token}"}


INJECTED: dict[str, Callable[[], BaseTool]] = {
    "@tool": lambda: tool("send")(_send),
    "schema": lambda: tool("send", args_schema=Strict)(_send),
    "dict schema": lambda: StructuredTool(
        name="send", description="Send.", args_schema=MCP_SCHEMA, func=_send
    ),
}


@pytest.mark.parametrize("looked", [False, True], ids=["fresh", "looked at before"])
@pytest.mark.parametrize("kind", INJECTED)
def test_injected_parameters_leave_the_schema_and_are_filled(
    pocket: PocketAuth, token: str, kind: str, looked: bool
) -> None:
    """The model neither sees nor sets them; validators of the schema stay."""
    bare = INJECTED[kind]()
    if looked:
        assert "headers" in str(convert_to_openai_tool(bare))
    wrapped = pocket.wrap(bare, provider="acme", inject={"headers": bearer})
    for shown in (wrapped.args, looks(wrapped)["schema"], looks(wrapped)["openai"]):
        assert "headers" not in str(shown)
        assert "text" in str(shown)
    text = "X" if kind == "schema" else "x"
    wanted = f"{text} ['Authorization'] Bearer"
    assert wrapped.invoke({"text": "x"}) == wanted
    forged = {"text": "x", "headers": {"Authorization": "Forged token", "x": "y"}}
    assert wrapped.invoke(forged) == wanted
    graph, _ = build("create_agent", pocket, [wrapped], [says(call("send", **forged))])
    assert results(ask(graph, SYNC))["send"].text == wanted
    assert "headers" in str(convert_to_openai_tool(bare))


def test_injecting_what_is_not_there_is_refused(pocket: PocketAuth) -> None:
    """A misspelt parameter, or one without a provider, is told at once."""
    for make in INJECTED.values():
        with pytest.raises(ValueError, match="no parameter 'header'"):
            pocket.wrap(make(), provider="acme", inject={"header": bearer})
    with pytest.raises(ValueError, match="need provider"):
        pocket.wrap(INJECTED["@tool"](), inject={"headers": bearer})
    with pytest.raises(TypeError, match="no schema"):
        pocket.wrap(FOREIGN["Tool"](), provider="acme", inject={"x": bearer})


# ------------------------------------------------------------------------- as a runnable


async def test_runnable_methods_work(pocket: PocketAuth, world: World) -> None:
    """deepcopy, batch, abatch, stream, astream and with_retry act as on a bare tool."""
    alice = Browser("alice")
    owner = pocket._service.owners.resolve({})
    request = pocket.make_request([], auth_provider="acme")
    url = await pocket.prepare(request, auth_provider="acme", owner=owner)
    await alice.avisit(url or "")
    wrapped = copy.deepcopy(pocket.wrap(KINDS["both"]()))
    given = {"text": "x"}
    assert await asyncio.to_thread(wrapped.batch, [given] * 3) == ["x:***"] * 3
    assert await wrapped.abatch([given] * 3) == ["x:***"] * 3
    assert await asyncio.to_thread(lambda: [*wrapped.stream(given)]) == ["x:***"]
    assert [part async for part in wrapped.astream(given)] == ["x:***"]
    assert await wrapped.with_retry().ainvoke(given) == "x:***"
    assert await (wrapped | str.upper).ainvoke(given) == "X:***"


def test_guard_runs_once_per_call(pocket: PocketAuth, token: str) -> None:
    """A sync tool that is awaited is let in on the loop, and only there."""
    entered: list[str] = []
    guard = pocket._guard

    class Watched:
        def enter(self, *args: Any) -> Any:
            entered.append("sync")
            return guard.enter(*args)

        async def aenter(self, *args: Any) -> Any:
            entered.append("async")
            return await guard.aenter(*args)

    from langchain_pocket_auth._tools import needs_of
    from langchain_pocket_auth._wrapping import wrap_tool

    bare = KINDS["@tool"]()
    wrapped = wrap_tool(bare, needs_of(bare), Watched())
    assert asyncio.run(wrapped.ainvoke({"text": "x"})) == "x:***"
    assert wrapped.invoke({"text": "x"}) == "x:***"
    assert entered == ["async", "sync"]


# ----------------------------------------------------------------------- secrets going out


class Blob:
    """Something whose text shows a secret."""

    def __init__(self, secret: str) -> None:
        self.secret = secret

    def __str__(self) -> str:
        return f"Blob({self.secret})"


class Report(BaseModel):
    """A model that carries a secret."""

    line: str


RETURNS: dict[str, Callable[[str], Any]] = {
    "text": lambda t: f"a {t} b {t}",
    "list": lambda t: [{"type": "text", "text": t}],
    "dict": lambda t: {"deep": [{"er": (t, 1, None)}]},
    "bytes": lambda t: t.encode(),
    "object": Blob,
    "model": lambda t: Report(line=t),
    "message": lambda t: ToolMessage(t, tool_call_id="c", artifact={"raw": t}),
    "command": lambda t: Command(
        update={"messages": [ToolMessage(t, tool_call_id="call-leak")]}
    ),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", RETURNS)
def test_token_in_a_result_is_masked_everywhere(
    pocket: PocketAuth, token: str, kind: str, mode: str
) -> None:
    """Whatever a tool returns, the token does not reach model, tracer or state."""
    make = RETURNS[kind]

    @tool("leak")
    def leak(acme: Acme) -> Any:
        """Leak."""
        return make(acme.access_token)

    @tool("leak")
    async def aleak(acme: Acme) -> Any:
        """Leak."""
        return make(acme.access_token)

    used = leak if mode == SYNC else aleak
    graph, _ = build("create_agent", pocket, [used], [says(call("leak"))])
    with LeakWatch() as watch:
        config = {"configurable": {"thread_id": "1"}, "callbacks": watch.callbacks}
        done = ask(graph, mode, config)
    assert "***" in str(results(done).values()) + str(done["messages"])
    watch.assert_clean([token], done, graph.get_state(config))


def _deep(secret: str) -> None:
    try:
        {}[secret]
    except KeyError as error:
        error.add_note(f"tried {secret}")
        raise ToolException(f"cannot use {secret}") from error


def _group(secret: str) -> None:
    raise ExceptionGroup("several", [ValueError(secret), KeyError({"key": [secret]})])


def _validation(secret: str) -> None:
    Strict.model_validate({"text": {"no": secret}, "headers": secret})


class StubbornError(Exception):
    """An error whose text is made elsewhere than in its arguments."""

    def __init__(self, secret: str) -> None:
        super().__init__()
        self._secret = secret

    def __str__(self) -> str:
        return f"stubborn {self._secret}"


def _stubborn(secret: str) -> None:
    raise StubbornError(secret)


def _stubborn_cause(secret: str) -> None:
    raise ToolException("harmless") from StubbornError(secret)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "fail", [_deep, _group, _validation, _stubborn, _stubborn_cause]
)
def test_token_in_an_error_is_masked_everywhere(
    pocket: PocketAuth, token: str, fail: Callable[[str], None], mode: str
) -> None:
    """Whatever a tool raises, its chain, notes and groups show no token."""

    @tool("leak")
    def leak(acme: Acme) -> str:
        """Leak."""
        fail(acme.access_token)
        return ""

    @tool("leak")
    async def aleak(acme: Acme) -> str:
        """Leak."""
        fail(acme.access_token)
        return ""

    wrapped = pocket.wrap(leak if mode == SYNC else aleak)

    def act(config: Any) -> Any:
        if mode == SYNC:
            return wrapped.invoke(call("leak"), config)
        return asyncio.run(wrapped.ainvoke(call("leak"), config))

    masked = r"\*\*\*|harmless|several"
    with LeakWatch() as watch, pytest.raises(Exception, match=masked) as caught:
        act({"callbacks": watch.callbacks})
    watch.assert_clean([token], caught.value)


def test_handled_errors_stay_handled(pocket: PocketAuth, token: str) -> None:
    """`handle_tool_error` and `handle_validation_error` see cleaned errors."""

    def fail(times: int, acme: Acme) -> str:
        """Fail."""
        raise ToolException(f"no: {acme.access_token}")

    wrapped = pocket.wrap(
        StructuredTool.from_function(
            fail, handle_tool_error=True, handle_validation_error=True
        )
    )
    failed = wrapped.invoke(call("fail", times=1))
    assert (failed.text, failed.status) == ("no: ***", "error")
    invalid = wrapped.invoke(call("fail", times="x", acme="forged"))
    assert invalid.status == "error"
    assert_no_leak([token], invalid, failed)


def test_cleaning_leaves_harmless_results_as_they_are(
    pocket: PocketAuth, token: str
) -> None:
    """Without a token inside, the very object comes back, even one within itself."""
    loop: list[Any] = []
    loop.append(loop)
    things = [[1, "a"], {"k": object()}, Report(line="x"), loop, lambda: None, 1.5]

    @tool
    def give(n: int, acme: Acme) -> Any:
        """Give."""
        return things[n]

    wrapped = pocket.wrap(give)
    for n, thing in enumerate(things):
        assert wrapped.invoke({"n": n}) is thing


def test_errors_of_the_guard_name_no_link(pocket: PocketAuth) -> None:
    """The link is in the attribute only, also in what tracers see."""
    wrapped = pocket.wrap(Work().tool("look", "acme"))
    with LeakWatch() as watch, pytest.raises(AuthorizationRequired) as caught:
        wrapped.invoke({"text": "x"}, {"callbacks": watch.callbacks})
    ticket = str(caught.value.url).rsplit("/", 1)[-1]
    watch.assert_clean([ticket], str(caught.value), repr(caught.value))


def test_many_threads_get_their_own_contexts(
    server: AuthorizationServer, pocket: PocketAuth, token: str
) -> None:
    """Context variables do not mix between concurrent calls of one tool."""
    barrier = threading.Barrier(4, timeout=10)

    @tool
    def meet(acme: Acme) -> bool:
        """Meet the others."""
        before = current_auth() is acme
        barrier.wait()
        return before and current_auth() is acme

    assert pocket.wrap(meet).batch([{}] * 4, {"max_concurrency": 4}) == [True] * 4
