"""The gate among other middlewares, tools and questions: none gets in another's way."""

# No `from __future__ import annotations`: tools are made of local annotations.

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from inspect import signature
from itertools import product
from typing import Annotated, Any, TypedDict, get_args

import pytest
import uvicorn
from conftest import call, says
from graphs import (
    ASYNC,
    MODES,
    SYNC,
    State,
    Work,
    ask,
    build,
    results,
    run,
    shared,
    thread,
)
from langchain.agents import AgentState, create_agent
from langchain.agents.middleware import (
    AgentMiddleware,
    HumanInTheLoopMiddleware,
    ModelCallLimitMiddleware,
    ModelFallbackMiddleware,
    ModelRetryMiddleware,
    SummarizationMiddleware,
    ToolCallLimitMiddleware,
    ToolRetryMiddleware,
    tool_retry,
)
from langchain.agents.middleware.human_in_the_loop import DecisionType
from langchain_core.messages import RemoveMessage, ToolMessage
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import BaseTool, InjectedToolCallId, ToolException, tool
from langchain_mcp_adapters.callbacks import Callbacks
from langchain_mcp_adapters.tools import load_mcp_tools
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.func import entrypoint
from langgraph.graph import START, StateGraph
from langgraph.graph.message import REMOVE_ALL_MESSAGES, add_messages
from langgraph.prebuilt import (
    InjectedState,
    InjectedStore,
    ToolNode,
    ToolRuntime,
    tools_condition,
)
from langgraph.store.base import BaseStore
from langgraph.store.memory import InMemoryStore
from langgraph.types import Command, interrupt
from mcp.server.fastmcp import Context as ServerContext
from mcp.server.fastmcp import FastMCP
from mcp.types import ElicitResult
from pydantic import BaseModel, ValidationError

from langchain_pocket_auth import (
    AuthContext,
    InjectedAuth,
    PocketAuth,
    current_auth,
    pending_authorizations,
    resume,
)
from langchain_pocket_auth.testing import AuthorizationServer, Browser, ScriptedModel

try:
    from langchain.agents.middleware import ToolErrorMiddleware
except ImportError:  # in older ones
    ToolErrorMiddleware = None

world, server, pocket, alice = shared()

Acme = Annotated[AuthContext, InjectedAuth("acme")]

FIRST, LAST = "gate first", "gate last"
ORDERS = [FIRST, LAST]
BY_VALUE, BY_ID = "value", "id"
STYLES = [BY_VALUE, BY_ID]
BATCHED, PER_CALL = "batched", "per_call"
# Since LangChain 1.4.6; the package works with older ones.
PER_CALL_KNOWN = "interrupt_mode" in signature(HumanInTheLoopMiddleware).parameters
REVIEW_MODES = [BATCHED, PER_CALL] if PER_CALL_KNOWN else [BATCHED]
per_call_known = pytest.mark.skipif(not PER_CALL_KNOWN, reason="LangChain below 1.4.6")
# Enough of each: the sync and the async half of LangChain's code, in either place.
PLACED = [(FIRST, SYNC), (FIRST, ASYNC), (LAST, SYNC), (LAST, ASYNC)]
ANSWERED = [(BY_VALUE, SYNC), (BY_ID, ASYNC)]
THROUGH = [
    *(("create_agent", SYNC), ("create_agent", ASYNC)),
    *(("add_tool_node", SYNC), ("add_tool_node", ASYNC), ("ToolNode", ASYNC)),
]

placed = pytest.mark.parametrize(("order", "mode"), PLACED)
placed_once = pytest.mark.parametrize(("order", "mode"), [PLACED[1], PLACED[2]])
answered_both_ways = pytest.mark.parametrize(("style", "mode"), ANSWERED)
through_all = pytest.mark.parametrize(("door", "mode"), THROUGH)
through_gates = pytest.mark.parametrize(("door", "mode"), THROUGH[:4])


def agent(
    pocket: PocketAuth,
    tools: list[BaseTool],
    script: list[Any],
    *others: AgentMiddleware[Any, Any],
    order: str = FIRST,
    **settings: Any,
) -> Any:
    """Return an agent with other middlewares behind, or before, ours."""
    gate = pocket.middleware()
    middleware = [gate, *others] if order == FIRST else [*others, gate]
    model = settings.pop("model", None) or ScriptedModel(script=script)
    settings = {"checkpointer": InMemorySaver()} | settings
    return create_agent(model, tools, middleware=middleware, **settings)


def as_child(graph: Any) -> Any:
    """Return a graph whose one node is another graph."""
    graph.checkpointer = None
    builder = StateGraph(State)
    builder.add_node("child", graph)
    builder.add_edge(START, "child")
    return builder.compile(checkpointer=InMemorySaver())


PLACES = {"root": lambda graph: graph, "child": as_child}


@dataclass
class Person:
    """Answers every question of a run in its own way, and writes down which came."""

    browser: Browser
    style: str = BY_ID
    decisions: dict[str, Any] = field(default_factory=dict)
    """What to tell who asks for approval, by the tool's name."""
    log: list[Any] = field(default_factory=list)
    """For each pause the questions that were asked at once."""

    def asked(self, question: Any) -> Any:
        """Return what is asked, in short."""
        if not isinstance(question, dict):
            return question
        if (
            question["type" if "type" in question else "action_requests"]
            == "pocket_auth"
        ):
            return {"connect": sorted(r["provider"] for r in question["requests"])}
        return {"approve": self.named(question)}

    def named(self, question: Any) -> list[str]:
        """Return the tools that somebody wants to be approved."""
        if "action_requests" in question:
            return [request["name"] for request in question["action_requests"]]
        return [question["name"]]

    def answer(self, question: Any) -> Any:
        """Return the answer to a question that is not ours."""
        if not isinstance(question, dict):
            return f"answer to {question}"
        if "action_requests" in question:
            names = self.named(question)
            return {"decisions": [self.decisions[name] for name in names]}
        return self.decisions[question["name"]]

    def reply(self, state: Any) -> Command[Any]:
        """Do what is asked, and return the answer to all of it."""
        pauses = state["__interrupt__"]
        self.log.append(sorted((self.asked(p.value) for p in pauses), key=str))
        waiting = pending_authorizations(state)
        for pending in waiting:
            assert self.browser.visit(pending.url).status_code == 200
        ours = resume(state).resume if waiting else {}
        answers = {
            pause.id: self.answer(pause.value)
            for pause in pauses
            if pause.id not in ours
        }
        if self.style == BY_VALUE and len(pauses) == 1:
            [value] = ours.values() if ours else answers.values()
            return Command(resume=value)
        return Command(resume={**ours, **answers})

    def go(self, graph: Any, mode: str, config: dict[str, Any] | None = None) -> Any:
        """Run a graph to its end; return its last state."""
        state = ask(graph, mode, config)
        for _ in range(9):
            if "__interrupt__" not in state:
                return state
            state = run(graph, self.reply(state), mode, config)
        raise AssertionError(self.log)


def provider_of(server: AuthorizationServer, work: Work, name: str) -> str:
    """Return whose token a tool was last given."""
    found = server.find_token(dict(work.done)[name])
    assert found is not None
    return found.grant.client_id.removesuffix("-client")


def disconnect(pocket: PocketAuth, *providers: str) -> None:
    """Take a person's connections away."""
    owner = pocket._service.owners.resolve({})

    async def delete() -> None:
        for provider in providers:
            assert await pocket.delete_session(provider, owner=owner)

    asyncio.run(delete())


def connect(pocket: PocketAuth, person: Browser, *providers: str) -> None:
    """Connect providers for the person of this test."""
    owner = pocket._service.owners.resolve({})
    for provider in providers:
        request = pocket.make_request([], auth_provider=provider)
        made = pocket.prepare(request, auth_provider=provider, owner=owner)
        assert person.visit(asyncio.run(made) or "").status_code == 200


def plain(work: Work, name: str = "plain", question: str | None = None) -> BaseTool:
    """Return a tool that needs nothing."""

    def body(text: str) -> str:
        if question is not None:
            work.heard.append((name, interrupt(question)))
        work.done.append((name, text))
        return f"{name} did {text}"

    if work.mode == SYNC:

        @tool(name)
        def act(text: str) -> str:
            """Act."""
            return body(text)

    else:

        @tool(name)
        async def act(text: str) -> str:
            """Act."""
            return body(text)

    return act


# ------------------------------------------------------------------ human in the loop

DECISIONS: dict[str, Any] = {
    "approve": {"type": "approve"},
    "edit": {
        "type": "edit",
        "edited_action": {"name": "send", "args": {"text": "edited"}},
    },
    "reject": {"type": "reject", "message": "no"},
    "respond": {"type": "respond", "message": "sent by hand"},
}
DECIDED = [decision for decision in DECISIONS if decision in get_args(DecisionType)]


def reviewing(*names: str, mode: str = BATCHED) -> HumanInTheLoopMiddleware[Any, Any]:
    """Return the middleware that lets a person look at calls first."""
    settings: dict[str, Any] = {} if mode == BATCHED else {"interrupt_mode": mode}
    return HumanInTheLoopMiddleware(dict.fromkeys(names, True), **settings)


REVIEWED = [
    ("root", BY_ID, ASYNC),
    ("root", BY_VALUE, SYNC),
    ("child", BY_VALUE, ASYNC),
]
REVIEWS = [
    (*asked, *REVIEWED[n % len(REVIEWED)])
    for n, asked in enumerate(product(DECIDED, REVIEW_MODES, ORDERS))
]


@pytest.mark.parametrize(
    ("decision", "review", "order", "place", "style", "mode"), REVIEWS
)
def test_reviewed_tool_asks_all_its_questions_and_runs_once(
    server: AuthorizationServer,
    pocket: PocketAuth,
    alice: Browser,
    *,
    place: str,
    style: str,
    review: str,
    decision: str,
    order: str,
    mode: str,
) -> None:
    """
    Approval, connection and the tool's own question: each gets its own answer.

    Rejected calls do not run; nor are they to be authorized, where the gate is
    listed first. Siblings run once.
    """
    work = Work(mode)
    tools = [
        work.tool("send", "acme", question="sure?"),
        work.tool("look", "zeta"),
        plain(work),
    ]
    hitl = reviewing("send", mode=review)
    script = [
        says(call("send", text="x"), call("look", text="y"), call("plain", text="z"))
    ]
    graph = PLACES[place](agent(pocket, tools, script, hitl, order=order))
    person = Person(alice, style, {"send": DECISIONS[decision]})
    done = person.go(graph, mode)

    runs = decision in {"approve", "edit"}
    spared = not runs and review == BATCHED and order == FIRST
    connects = [{"connect": ["zeta"] if spared else ["acme", "zeta"]}]
    approves = [{"approve": ["send"]}]
    first = [approves, connects] if (review, order) == (BATCHED, FIRST) else None
    expected = first or [connects, approves]
    assert person.log == [*expected, *([["sure?"]] if runs else [])]
    assert work.names == ["look", "plain", *(["send"] if runs else [])]
    assert work.heard == ([("send", "answer to sure?")] if runs else [])
    texts = {name: m.text for name, m in results(done).items()}
    assert texts["look"] == "look did y"
    assert {"approve": "did x", "edit": "did edited"}.get(decision, "") in texts["send"]
    assert results(done)["send"].status == (
        "error" if decision == "reject" else "success"
    )
    assert len([m for m in done["messages"] if m.type == "tool"]) == 3
    tokens = dict(work.done)
    assert tokens["look"] in server.issued_access_tokens
    assert not runs or tokens["send"] in server.issued_access_tokens


@answered_both_ways
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("wrapped", [False, True], ids=["annotated", "wrapped"])
def test_call_that_a_person_sends_to_another_tool_is_guarded_there(
    server: AuthorizationServer,
    pocket: PocketAuth,
    alice: Browser,
    *,
    style: str,
    wrapped: bool,
    order: str,
    mode: str,
) -> None:
    """The other tool gets the account that it needs, and asks its own question."""
    work = Work(mode)
    tools = [work.tool("send", "acme"), work.tool("post", "zeta", question="sure?")]
    action = {"name": "post", "args": {"text": "edited"}}
    person = Person(alice, style, {"send": {"type": "edit", "edited_action": action}})
    hitl = reviewing("send")
    script = [says(call("send", text="x"))]
    used = pocket.wrap(tools) if wrapped else tools
    graph = agent(pocket, used, script, hitl, order=order)
    done = person.go(graph, mode)
    assert [t for t, _ in work.done] == ["post"]
    assert work.heard == [("post", "answer to sure?")]
    assert provider_of(server, work, "post") == "zeta"
    [told] = [m for m in done["messages"] if m.type == "tool"]
    assert (told.tool_call_id, told.status) == ("call-send", "success")
    assert "post did edited" in told.text
    asked = [entry["connect"] for [entry] in person.log if "connect" in entry]
    assert asked[-1] == ["zeta"]
    assert person.log.count([{"approve": ["send"]}]) == 1
    assert person.log[-1] == ["sure?"]


@pytest.mark.parametrize("mode", MODES)
def test_ours_and_theirs_pending_at_once_are_answered_together(
    pocket: PocketAuth, alice: Browser, mode: str
) -> None:
    """`resume(result)` and a person's answers by interrupt id make one command."""
    work = Work(mode)
    tools = [
        pocket.wrap(work.tool("send", "acme", question="sure?")),
        plain(work, "ask", question="ask?"),
        plain(work),
    ]
    script = [says(*(call(t.name, text="x") for t in tools))]
    # Without a gate, so that calls pause one by one.
    graph = create_agent(
        ScriptedModel(script=script),
        tools,
        middleware=[reviewing("send")],
        checkpointer=InMemorySaver(),
    )
    person = Person(alice, decisions={"send": {"type": "approve"}})
    person.go(graph, mode)
    assert person.log == [
        [{"approve": ["send"]}],
        ["ask?", {"connect": ["acme"]}],
        ["sure?"],
    ]
    assert sorted(work.heard) == [
        ("ask", "answer to ask?"),
        ("send", "answer to sure?"),
    ]
    assert work.names == ["ask", "plain", "send"]


@per_call_known
@placed_once
def test_reviews_of_single_calls_are_answered_one_by_one_or_together(
    pocket: PocketAuth, alice: Browser, order: str, mode: str
) -> None:
    """A finished sibling stays finished, however many answers come, in any order."""
    work = Work(mode)
    tools = [
        work.tool("send", "acme", question="sure?"),
        work.tool("post", "zeta"),
        work.tool("look", "zeta"),
        plain(work),
    ]
    hitl = reviewing("send", "post", mode=PER_CALL)
    script = [says(*(call(t.name, text="x") for t in tools))]
    graph = agent(pocket, tools, script, hitl, order=order)
    person = Person(alice)
    state = run(graph, person.reply(ask(graph, mode)), mode)
    asked = {pause.value["name"]: pause.id for pause in state["__interrupt__"]}
    assert sorted(asked) == ["post", "send"]
    assert work.names == ["look", "plain"]
    with pytest.raises(RuntimeError, match="multiple pending"):
        run(graph, Command(resume={"type": "approve"}), mode)
    wrong = {"type": "edit", "edited_action": {"name": "look", "args": {"text": "x"}}}
    with pytest.raises(ValidationError):
        run(graph, Command(resume={asked["send"]: wrong}), mode)
    state = run(graph, Command(resume={asked["send"]: {"type": "approve"}}), mode)
    values = [pause.value for pause in state["__interrupt__"]]
    assert "sure?" in values
    assert work.names == ["look", "plain"]
    person.decisions = {"post": {"type": "approve"}}
    state = run(graph, person.reply(state), mode)
    assert "__interrupt__" not in state
    assert work.names == ["look", "plain", "post", "send"]
    assert work.heard == [("send", "answer to sure?")]


@per_call_known
@answered_both_ways
@pytest.mark.parametrize("order", ORDERS)
def test_connection_lost_during_a_review_is_asked_for_behind_it(
    pocket: PocketAuth, alice: Browser, style: str, order: str, mode: str
) -> None:
    """Approval, our pause and the tool's question in one task: none reads another's."""
    work = Work(mode)
    tools = [work.tool("send", "acme", question="sure?"), work.tool("look", "acme")]
    hitl = reviewing("send", mode=PER_CALL)
    script = [says(call("send", text="x"), call("look", text="y"))]
    graph = agent(pocket, tools, script, hitl, order=order)
    person = Person(alice, style, {"send": {"type": "approve"}})
    state = run(graph, person.reply(ask(graph, mode)), mode)
    disconnect(pocket, "acme")
    state = run(graph, person.reply(state), mode)
    for early in ("too early", {"type": "reject"}, {"decisions": []}):
        [pause] = state["__interrupt__"]
        assert person.asked(pause.value) == {"connect": ["acme"]}
        answer = early if style == BY_VALUE else {pause.id: early}
        state = run(graph, Command(resume=answer), mode)
    state = run(graph, person.reply(state), mode)
    done = run(graph, person.reply(state), mode)
    assert "__interrupt__" not in done
    assert person.log == [
        [{"connect": ["acme"]}],
        [{"approve": ["send"]}],
        [{"connect": ["acme"]}],
        ["sure?"],
    ]
    assert work.names == ["look", "send"]
    assert work.heard == [("send", "answer to sure?")]


@placed_once
@pytest.mark.parametrize("review", REVIEW_MODES)
def test_refused_connection_and_a_review_end_in_one_result(
    pocket: PocketAuth, alice: Browser, review: str, order: str, mode: str
) -> None:
    """An approved call whose connection is declined does not run, and says so once."""
    work = Work(mode)
    tools = [work.tool("send", "acme"), plain(work)]
    hitl = reviewing("send", mode=review)
    script = [says(call("send", text="x"), call("plain", text="y"))]
    graph = agent(pocket, tools, script, hitl, order=order)
    state = ask(graph, mode)
    for _ in range(2):
        if pending_authorizations(state):
            command = resume(state, decline=["acme"])
        elif "__interrupt__" in state:
            command = Person(
                alice, decisions=DECISIONS | {"send": {"type": "approve"}}
            ).reply(state)
        else:
            break
        state = run(graph, command, mode)
    assert "__interrupt__" not in state
    assert work.names == ["plain"]
    told = [m for m in state["messages"] if m.type == "tool" and m.name == "send"]
    assert [m.status for m in told] == ["error"]
    assert "declined" in told[0].text


# ------------------------------------------------------------------- tools of MCP servers


class Sure(BaseModel):
    """What the server asks for."""

    yes: bool


@dataclass
class Notes:
    """An MCP server that acts for who calls it, and asks before it wipes."""

    url: str = ""
    seen: list[tuple[str, str]] = field(default_factory=list)
    """Tool and Authorization header of each call that did something."""

    def tools(self) -> FastMCP:
        server = FastMCP("notes", log_level="CRITICAL")

        def caller(context: Any) -> str:
            return str(context.request_context.request.headers.get("authorization"))

        @server.tool()
        async def read(text: str, context: ServerContext) -> str:
            """Read a note."""
            self.seen.append(("read", caller(context)))
            return f"read {text}"

        @server.tool()
        async def wipe(text: str, context: ServerContext) -> str:
            """Wipe a note."""
            answer = await context.elicit(f"wipe {text}?", Sure)
            if answer.action != "accept" or not answer.data.yes:
                return f"kept {text}: {answer.action}"
            self.seen.append(("wipe", caller(context)))
            return f"wiped {text}"

        return server


@pytest.fixture(scope="module")
def mcp_server() -> Iterator[Notes]:
    """A real MCP server on loopback."""
    notes = Notes()
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        notes.url = f"http://127.0.0.1:{listening.getsockname()[1]}/mcp"
        app = notes.tools().streamable_http_app()
        running = uvicorn.Server(uvicorn.Config(app, log_level="critical", ws="none"))
        thread = threading.Thread(target=running.run, args=([listening],))
        thread.start()
        yield notes
        running.should_exit = True
        thread.join(10)


@pytest.fixture
def notes(mcp_server: Notes) -> Notes:
    mcp_server.seen.clear()
    return mcp_server


@dataclass
class Talk:
    """What a call has heard from the person, and what it has to ask."""

    answers: list[dict[str, Any]]
    question: Any = None


talk: ContextVar[Talk] = ContextVar("talk")


async def elicited(mcp_context: Any, params: Any, context: Any) -> ElicitResult:
    """Answer a server's question, if the person has; else remember it."""
    now = talk.get()
    if now.answers:
        answer = now.answers.pop(0)
        return ElicitResult(action=answer["action"], content=answer.get("content"))
    now.question = params
    return ElicitResult(action="cancel")


async def asking(request: Any, handler: Any) -> Any:
    """Pause for what a server asks, in LangChain's form, and call again."""
    heard: list[dict[str, Any]] = []
    while True:
        now = Talk(list(heard))
        talk.set(now)
        result = await handler(request)
        if now.question is None:
            return result
        question = {
            "key": "q",
            "message": now.question.message,
            "mode": "form",
            "requested_schema": now.question.requestedSchema,
        }
        answer = interrupt(
            {
                "type": "mcp_elicitation",
                "tool_name": request.name,
                "requests": [question],
            }
        )
        heard.append(answer["responses"]["q"])


async def authorized(request: Any, handler: Any) -> Any:
    """Send the token of the call that is under way, and nobody else's."""
    token = current_auth().access_token
    headers = {"Authorization": f"Bearer {token}"}
    return await handler(request.override(headers=headers))


def mcp_tools(notes: Notes) -> list[BaseTool]:
    """Return the tools that the server has."""
    return asyncio.run(
        load_mcp_tools(
            None,
            connection={"transport": "streamable_http", "url": notes.url},
            callbacks=Callbacks(on_elicitation=elicited),
            tool_interceptors=[asking, authorized],
            server_name="notes",
        )
    )


@pytest.mark.parametrize(
    ("door", "style", "action"),
    [
        ("create_agent", BY_VALUE, "accept"),
        ("create_agent", BY_ID, "decline"),
        ("add_tool_node", BY_ID, "accept"),
        ("ToolNode", BY_VALUE, "accept"),
    ],
)
def test_mcp_elicitation_and_our_pause_get_their_own_answers(
    server: AuthorizationServer,
    pocket: PocketAuth,
    alice: Browser,
    notes: Notes,
    *,
    action: str,
    style: str,
    door: str,
) -> None:
    """Both have one form: what answers ours never accepts what the server asks."""
    wipe = pocket.wrap(mcp_tools(notes)[1], provider="acme")
    graph, _ = build(door, pocket, [wipe], [says(call("wipe", text="x"))])
    yes = {"responses": {"q": {"action": "accept", "content": {"yes": True}}}}

    def answered(state: Any, value: Any) -> Any:
        [pause] = state["__interrupt__"]
        return Command(resume={pause.id: value} if style == BY_ID else value)

    state = ask(graph, ASYNC)
    for early in (yes, yes):
        assert [p.provider for p in pending_authorizations(state)] == ["acme"]
        state = run(graph, answered(state, early), ASYNC)
    alice.visit(pending_authorizations(state)[0].url)
    state = run(graph, answered(state, yes), ASYNC)
    [pause] = state["__interrupt__"]
    assert pause.value["type"] == "mcp_elicitation"
    assert pause.value["requests"][0]["message"] == "wipe x?"
    assert pending_authorizations(state) == []
    assert notes.seen == []

    reply = yes if action == "accept" else {"responses": {"q": {"action": "decline"}}}
    done = run(graph, answered(state, reply), ASYNC)
    assert "__interrupt__" not in done
    bearer = f"Bearer {server.issued_access_tokens[0]}"
    assert notes.seen == ([("wipe", bearer)] if action == "accept" else [])
    told = "wiped x" if action == "accept" else "kept x: decline"
    assert results(done)["wipe"].text == told


def test_mcp_tools_of_one_server_send_the_token_of_their_own_call(
    server: AuthorizationServer,
    pocket: PocketAuth,
    alice: Browser,
    notes: Notes,
) -> None:
    """The header is made of `current_auth()`, in calls that run side by side."""
    read, wipe = mcp_tools(notes)
    tools = [pocket.wrap(read, provider="acme"), pocket.wrap(wipe, provider="zeta")]
    script = [says(call("read", text="x"), call("wipe", text="y"))]
    graph, _ = build("create_agent", pocket, tools, script)
    state = ask(graph, ASYNC)
    tokens = {}
    for pending in pending_authorizations(state):
        alice.visit(pending.url)
        tokens[pending.provider] = f"Bearer {server.issued_access_tokens[-1]}"
    state = run(graph, resume(state), ASYNC)
    yes = {"responses": {"q": {"action": "accept", "content": {"yes": True}}}}
    run(graph, Command(resume=yes), ASYNC)
    assert notes.seen == [("read", tokens["acme"]), ("wipe", tokens["zeta"])]


# ------------------------------------------------------- tools that come and go at run time


class Changing(AgentMiddleware[Any, Any]):
    """Gives the model other tools than the agent was built with, and runs those."""

    def __init__(self, choose: Callable[[list[BaseTool], int], list[BaseTool]]) -> None:
        super().__init__()
        self.choose = choose
        self.used: dict[str, BaseTool] = {}

    def changed(self, request: Any) -> Any:
        turn = sum(m.type == "ai" for m in request.messages)
        tools = self.choose(list(request.tools), turn)
        self.used = {t.name: t for t in tools}
        return request.override(tools=tools)

    def wrap_model_call(self, request: Any, handler: Any) -> Any:
        return handler(self.changed(request))

    async def awrap_model_call(self, request: Any, handler: Any) -> Any:
        return await handler(self.changed(request))

    def routed(self, request: Any) -> Any:
        # After a restart no model has been called; the registered one is what is left.
        found = self.used.get(request.tool_call["name"], request.tool)
        return request.override(tool=found)

    def wrap_tool_call(self, request: Any, handler: Any) -> Any:
        return handler(self.routed(request))

    async def awrap_tool_call(self, request: Any, handler: Any) -> Any:
        return await handler(self.routed(request))


@placed
@pytest.mark.parametrize("wrapped", [False, True], ids=["annotated", "wrapped"])
def test_tool_added_at_run_time_is_guarded_like_the_others(
    server: AuthorizationServer,
    pocket: PocketAuth,
    alice: Browser,
    *,
    wrapped: bool,
    order: str,
    mode: str,
) -> None:
    """One pause asks for what it needs, too; it runs once, with its own account."""
    work = Work(mode)
    look, post = work.tool("look", "acme"), work.tool("post", "zeta", question="sure?")
    late = pocket.wrap(post) if wrapped else post
    changing = Changing(lambda tools, _: [*tools, late])
    script = [says(call("look", text="x"), call("post", text="y"))]
    graph = agent(pocket, [look], script, changing, order=order)
    person = Person(alice)
    done = person.go(graph, mode)
    assert person.log == [[{"connect": ["acme", "zeta"]}], ["sure?"]]
    assert work.names == ["look", "post"]
    assert provider_of(server, work, "look") == "acme"
    assert provider_of(server, work, "post") == "zeta"
    assert results(done)["post"].text == "post did y"


@placed
def test_tool_that_is_swapped_between_turns_uses_the_account_of_its_turn(
    server: AuthorizationServer,
    pocket: PocketAuth,
    alice: Browser,
    order: str,
    mode: str,
) -> None:
    """What a name needs is what the model of that turn was given."""
    work = Work(mode)
    versions = [plain(work, "act"), work.tool("act", "acme"), work.tool("act", "zeta")]
    changing = Changing(lambda tools, turn: [versions[turn % 3]])
    script = [says(call("act", str(n), text="x")) for n in range(4)]
    graph = agent(pocket, versions[1:2], script, changing, order=order)
    person = Person(alice)
    state = ask(graph, mode)
    assert work.done == [("act", "x")]  # the first version needs nothing
    while "__interrupt__" in state:
        state = run(graph, person.reply(state), mode)
    assert person.log == [[{"connect": ["acme"]}], [{"connect": ["zeta"]}]]
    acme, zeta = server.issued_access_tokens
    assert [token for _, token in work.done] == ["x", acme, zeta, "x"]


@placed_once
def test_swapped_tool_is_known_after_a_restart(
    pocket: PocketAuth, alice: Browser, order: str, mode: str
) -> None:
    """The gate of a process in which no model was called asks for the same."""
    work, saver = Work(mode), InMemorySaver()

    def process() -> Any:
        changing = Changing(lambda tools, _: [work.tool("act", "zeta")])
        tools, script = [work.tool("act", "acme")], [says(call("act", text="x"))]
        return agent(pocket, tools, script, changing, order=order, checkpointer=saver)

    [pending] = pending_authorizations(ask(process(), mode))
    again = run(process(), Command(resume="not yet"), mode)
    assert pending.provider == "zeta"
    assert [p.key for p in pending_authorizations(again)] == [pending.key]


@placed_once
def test_tool_that_was_filtered_away_is_not_asked_for_and_stays_guarded(
    server: AuthorizationServer,
    pocket: PocketAuth,
    alice: Browser,
    order: str,
    mode: str,
) -> None:
    """A model that calls it all the same gets no further than any other."""
    work = Work(mode)
    tools = [work.tool("look", "acme"), work.tool("post", "zeta")]
    changing = Changing(lambda tools, _: [t for t in tools if t.name == "look"])
    changing.routed = lambda request: request  # type: ignore[method-assign]
    model = ScriptedModel(
        script=[says(call("look", text="x")), says(call("post", text="y"))]
    )
    graph = agent(pocket, tools, [], changing, order=order, model=model)
    person = Person(alice)
    person.go(graph, mode)
    assert [t.name for t in model.bound] == ["look"]
    assert person.log == [[{"connect": ["acme"]}], [{"connect": ["zeta"]}]]
    assert [name for name, _ in work.done] == ["look", "post"]
    assert provider_of(server, work, "post") == "zeta"


@pytest.mark.parametrize("order", ORDERS)
def test_tools_of_the_provider_of_the_model_pass(
    pocket: PocketAuth, alice: Browser, order: str
) -> None:
    """A tool that is no more than a description, run by others, is not looked into."""
    work = Work()
    search = {"type": "web_search"}
    model = ScriptedModel(script=[says(call("look", text="x"))])
    tools: list[Any] = [work.tool("look", "acme"), search]
    changing = Changing(lambda tools, _: tools)
    changing.routed = lambda request: request  # type: ignore[method-assign]
    changing.changed = lambda request: request  # type: ignore[method-assign]
    graph = agent(pocket, tools, [], changing, order=order, model=model)
    Person(alice).go(graph, SYNC)
    assert search in model.bound
    assert work.names == ["look"]


# ------------------------------------------------------------------- agents side by side


@through_gates
@pytest.mark.parametrize("together", ["one middleware", "one saver", "apart"])
def test_agents_in_one_process_keep_their_tools_of_one_name_apart(
    server: AuthorizationServer,
    pocket: PocketAuth,
    alice: Browser,
    *,
    together: str,
    door: str,
    mode: str,
) -> None:
    """Interleaved step by step, each is asked for its own account and gets it."""
    works = [Work(mode) for _ in range(3)]
    tools = [
        works[0].tool("act", "acme"),
        works[1].tool("act", "zeta"),
        plain(works[2], "act"),
    ]
    script = [says(call("act", text="x")), says(call("act", "again", text="y"))]
    saver = InMemorySaver() if together == "one saver" else None
    gate = pocket.middleware()
    graphs = []
    for one in tools:
        if door == "create_agent" and together == "one middleware":
            graphs.append(
                create_agent(
                    ScriptedModel(script=script),
                    [one],
                    middleware=[gate],
                    checkpointer=InMemorySaver(),
                )
            )
        else:
            graphs.append(build(door, pocket, [one], script, saver or "memory")[0])
    configs = [thread(f"thread {n}") for n in range(3)]
    states = [ask(g, mode, c) for g, c in zip(graphs, configs, strict=True)]
    asked = [[p.provider for p in pending_authorizations(s)] for s in states]
    assert asked == [["acme"], ["zeta"], []]
    for n in (1, 0):  # the other way round than they paused
        # The other's answer is none of mine.
        with_other = Command(resume=resume(states[1 - n]).resume)
        state = run(graphs[n], with_other, mode, configs[n])
        assert [p.provider for p in pending_authorizations(state)] == asked[n]
        alice.visit(pending_authorizations(state)[0].url)
        assert "__interrupt__" not in run(graphs[n], resume(state), mode, configs[n])
    acme, zeta = reversed(server.issued_access_tokens)
    assert [w.done for w in works] == [
        [("act", acme)] * 2,
        [("act", zeta)] * 2,
        [("act", "x"), ("act", "y")],
    ]


async def test_agents_that_run_at_the_same_time_do_not_mix(
    server: AuthorizationServer, pocket: PocketAuth, alice: Browser
) -> None:
    """Twenty runs of two agents on one loop: each call has its own agent's account."""
    works = [Work(ASYNC), Work(ASYNC)]
    script = [says(call("act", text="x"), call("act", "two", text="y"))]
    graphs = [
        build("create_agent", pocket, [work.tool("act", provider)], script)[0]
        for work, provider in zip(works, ("acme", "zeta"), strict=True)
    ]
    runs = [(graphs[n % 2], thread(str(n))) for n in range(20)]
    value = {"messages": [("user", "go")]}
    states = await asyncio.gather(*(g.ainvoke(value, c) for g, c in runs))
    waiting = pending_authorizations(states)
    assert sorted(p.provider for p in waiting) == ["acme", "zeta"]
    for pending in waiting:
        await alice.avisit(pending.url)
    done = await asyncio.gather(
        *(g.ainvoke(resume(s), c) for (g, c), s in zip(runs, states, strict=True))
    )
    assert not pending_authorizations(done)
    tokens = {
        p.provider: t for p, t in zip(waiting, server.issued_access_tokens, strict=True)
    }
    assert works[0].done == [("act", tokens["acme"])] * 20
    assert works[1].done == [("act", tokens["zeta"])] * 20


# ------------------------------------------------------- what deals with errors and limits


@dataclass
class Noted:
    """What a middleware took for an error."""

    errors: list[str] = field(default_factory=list)

    def on_error(self, error: Exception, request: Any) -> str:
        self.errors.append(type(error).__name__)
        return f"handled {type(error).__name__}"

    def retry_on(self, error: Exception) -> bool:
        self.errors.append(type(error).__name__)
        return True


def retry(noted: Noted, **settings: Any) -> ToolRetryMiddleware:
    """Return the middleware that tries a tool again, at once."""
    at_once = {"initial_delay": 0.0, "jitter": False, "retry_on": noted.retry_on}
    return ToolRetryMiddleware(**at_once | settings)


# In older ones ToolRetryMiddleware takes every interrupt for a failure.
INTERRUPTS_PASS = hasattr(tool_retry, "GraphBubbleUp")
interrupts_pass = pytest.mark.skipif(
    not INTERRUPTS_PASS, reason="LangChain retries interrupts"
)

COMPANY: dict[str, Callable[[Noted], list[AgentMiddleware[Any, Any]]]] = {
    "model retry": lambda noted: [
        ModelRetryMiddleware(initial_delay=0, retry_on=noted.retry_on)
    ],
    "model fallback": lambda noted: [ModelFallbackMiddleware(ScriptedModel())],
    "limits": lambda noted: [
        ToolCallLimitMiddleware(
            tool_name="look", thread_limit=1, exit_behavior="error"
        ),
        ModelCallLimitMiddleware(thread_limit=2, exit_behavior="error"),
    ],
}
if INTERRUPTS_PASS:
    COMPANY["tool retry"] = lambda noted: [retry(noted, max_retries=2)]
if ToolErrorMiddleware is not None:
    COMPANY["tool error"] = lambda noted: [
        ToolErrorMiddleware(noted.on_error),
        retry(noted, on_failure="error"),
    ]


@pytest.mark.parametrize(("order", "mode"), [PLACED[0], PLACED[3], ("no gate", ASYNC)])
@pytest.mark.parametrize("company", COMPANY)
def test_pause_is_no_error_and_no_second_call(
    pocket: PocketAuth, alice: Browser, company: str, order: str, mode: str
) -> None:
    """Nothing swallows, retries or counts it, whether gate or tool pauses."""
    work, noted = Work(mode), Noted()
    others = COMPANY[company](noted)
    tools = [work.tool("look", "acme", question="sure?"), plain(work)]
    script = [says(call("look", text="x"), call("plain", text="y"))]
    if order == "no gate":
        graph = create_agent(
            ScriptedModel(script=script),
            [pocket.wrap(tools[0]), tools[1]],
            middleware=others,
            checkpointer=InMemorySaver(),
        )
    else:
        graph = agent(pocket, tools, script, *others, order=order)
    person = Person(alice)
    state = ask(graph, mode)
    state = run(graph, Command(resume="not yet"), mode)  # the same pause again
    while "__interrupt__" in state:
        state = run(graph, person.reply(state), mode)
    assert person.log == [[{"connect": ["acme"]}], ["sure?"]]
    assert (work.names, noted.errors) == (["look", "plain"], [])
    assert work.heard == [("look", "answer to sure?")]
    assert state["messages"][-1].text == "done"


def failing(work: Work, times: int, error: Exception) -> BaseTool:
    """Return a guarded tool that fails so often, then asks, then acts."""
    left = [times]

    def body(acme: AuthContext) -> str:
        if left[0]:
            left[0] -= 1
            work.done.append(("failed", acme.access_token))
            raise error
        work.heard.append(("act", interrupt("sure?")))
        work.done.append(("act", acme.access_token))
        return "acted"

    if work.mode == SYNC:

        @tool
        def act(acme: Acme) -> str:
            """Act."""
            return body(acme)

    else:

        @tool
        async def act(acme: Acme) -> str:
            """Act."""
            return body(acme)

    return act


@interrupts_pass
@answered_both_ways
@pytest.mark.parametrize("order", [*ORDERS, "no gate"])
def test_tool_that_is_tried_again_is_let_in_again(
    pocket: PocketAuth, alice: Browser, style: str, order: str, mode: str
) -> None:
    """After our pause it fails twice; the third time its question gets its answer."""
    work, noted = Work(mode), Noted()
    act = failing(work, 2, ConnectionError("try again"))
    others, script = [retry(noted, max_retries=2)], [says(call("act"))]
    if order == "no gate":
        graph = create_agent(
            ScriptedModel(script=script),
            [pocket.wrap(act)],
            middleware=others,
            checkpointer=InMemorySaver(),
        )
    else:
        graph = agent(pocket, [act], script, *others, order=order)
    person = Person(alice, style)
    done = person.go(graph, mode)
    assert person.log == [[{"connect": ["acme"]}], ["sure?"]]
    assert [name for name, _ in work.done] == ["failed", "failed", "act"]
    assert len({token for _, token in work.done}) == 1
    assert noted.errors == ["ConnectionError"] * 2
    assert work.heard == [("act", "answer to sure?")]
    assert results(done)["act"].text == "acted"


class Moody(ScriptedModel):
    """A model that fails a number of times before it answers."""

    fails: int = 0

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        if self.fails:
            self.fails -= 1
            raise ConnectionError("no model")
        return super()._generate(*args, **kwargs)


@placed_once
@pytest.mark.parametrize("remedy", ["retry", "fallback"])
def test_gate_knows_the_tools_though_the_model_failed(
    pocket: PocketAuth, alice: Browser, remedy: str, order: str, mode: str
) -> None:
    """A second attempt, or another model, changes nothing about what is asked."""
    work = Work(mode)
    tools = [work.tool("look", "acme"), work.tool("post", "zeta")]
    script = [says(call("look", text="x"), call("post", text="y"))]
    other: AgentMiddleware[Any, Any] = ModelFallbackMiddleware(
        ScriptedModel(script=script)
    )
    if remedy == "retry":
        other = ModelRetryMiddleware(initial_delay=0, jitter=False)
    model = Moody(script=script, fails=1)
    graph = agent(pocket, tools, [], other, order=order, model=model)
    person = Person(alice)
    person.go(graph, mode)
    assert person.log == [[{"connect": ["acme", "zeta"]}]]
    assert work.names == ["look", "post"]


@pytest.mark.parametrize(
    ("exit_behavior", "mode"), [("continue", SYNC), ("end", ASYNC)]
)
def test_call_over_a_limit_is_not_asked_for(
    pocket: PocketAuth, alice: Browser, exit_behavior: Any, mode: str
) -> None:
    """With the gate listed first, what another middleware stops needs no account."""
    work = Work(mode)
    tools = [work.tool("look", "acme"), work.tool("post", "zeta")]
    limit = ToolCallLimitMiddleware(
        tool_name="post", thread_limit=0, run_limit=0, exit_behavior=exit_behavior
    )
    script = [says(call("look", text="x")), says(call("post", text="y"))]
    graph = agent(pocket, tools, script, limit)
    person = Person(alice)
    done = person.go(graph, mode)
    assert person.log == [[{"connect": ["acme"]}]]
    assert work.names == ["look"]
    assert results(done)["post"].status == "error"
    assert "limit" in results(done)["post"].text


def explain(error: Exception) -> str:
    """Tell the model what went wrong, as apps do."""
    return f"explained {type(error).__name__}"


HANDLERS = {
    "all": True,
    "text": "explained",
    "types": (ValueError,),
    "callable": explain,
}


@pytest.mark.parametrize(("door", "mode"), THROUGH[2:])
@pytest.mark.parametrize("handle", HANDLERS.values(), ids=HANDLERS)
def test_tool_nodes_error_handling_is_for_errors_only(
    pocket: PocketAuth, alice: Browser, handle: Any, door: str, mode: str
) -> None:
    """Our pause and the tool's own pass it by; the tool's error does not."""
    work = Work(mode)
    look, act = (
        work.tool("look", "acme", question="sure?"),
        failing(work, 1, ValueError("bad")),
    )
    script = [says(call("look", text="x")), says(call("act"))]
    model = ScriptedModel(script=script)
    builder = StateGraph(State)
    builder.add_node("agent", lambda s: {"messages": [model.invoke(s["messages"])]})
    builder.add_edge(START, "agent")
    if door == "add_tool_node":
        pocket.add_tool_node(builder, [look, act], handle_tool_errors=handle)
    else:
        node = ToolNode(pocket.wrap([look, act]), handle_tool_errors=handle)
        builder.add_node("tools", node)
        builder.add_edge("tools", "agent")
    builder.add_conditional_edges("agent", tools_condition)
    graph = builder.compile(checkpointer=InMemorySaver())
    person = Person(alice)
    done = person.go(graph, mode)
    assert person.log == [[{"connect": ["acme"]}], ["sure?"]]
    assert [name for name, _ in work.done] == ["look", "failed"]
    told = results(done)
    assert told["look"].text == "look did x"
    assert told["act"].status == "error"


@through_all
@pytest.mark.parametrize("handle", [True, explain], ids=["all", "callable"])
def test_tools_own_error_handling_is_for_errors_only(
    pocket: PocketAuth, alice: Browser, handle: Any, door: str, mode: str
) -> None:
    """A tool with `handle_tool_error` pauses as any other, and handles its errors."""
    work = Work(mode)
    act = failing(work, 1, ToolException("bad"))
    act.handle_tool_error = handle
    script = [says(call("act", str(n))) for n in range(2)]
    graph, _ = build(door, pocket, [act], script)
    person = Person(alice)
    done = person.go(graph, mode)
    assert person.log == [[{"connect": ["acme"]}], ["sure?"]]
    assert [name for name, _ in work.done] == ["failed", "act"]
    first, second = (m for m in done["messages"] if m.type == "tool")
    assert (first.status, second.status) == ("error", "success")
    assert work.heard == [("act", "answer to sure?")]


class Approval(BaseModel):
    """The form of an answer."""

    yes: bool


@through_all
def test_answer_of_the_wrong_form_is_refused_and_can_be_given_again(
    pocket: PocketAuth, alice: Browser, door: str, mode: str
) -> None:
    """The schema of a tool's own question holds inside a guarded tool, too."""
    heard: list[Any] = []

    @tool
    def act(acme: Acme) -> str:
        """Act."""
        heard.append(interrupt("sure?", response_schema=Approval))
        return "acted"

    @tool("act")
    async def aact(acme: Acme) -> str:
        """Act."""
        heard.append(interrupt("sure?", response_schema=Approval))
        return "acted"

    script = [says(call("act"))]
    graph, _ = build(door, pocket, [act if mode == SYNC else aact], script)
    person = Person(alice)
    state = run(graph, person.reply(ask(graph, mode)), mode)
    [pause] = state["__interrupt__"]
    assert pause.response_schema["title"] == "Approval"
    for wrong in ({"responses": {}}, {"yes": "perhaps"}):
        with pytest.raises(ValidationError):
            run(graph, Command(resume={pause.id: wrong}), mode)
        assert [i.id for i in graph.get_state(thread()).interrupts] == [pause.id]
    done = run(graph, Command(resume={pause.id: {"yes": True}}), mode)
    assert heard == [Approval(yes=True)]
    assert results(done)["act"].text == "acted"


# ------------------------------------------------------ what swallows an interrupt itself

Inside = Callable[[BaseTool, Callable[[Any], str]], Any]


def with_retry(act: BaseTool, plan_b: Callable[[Any], str]) -> Any:
    return act.with_retry(stop_after_attempt=3, wait_exponential_jitter=False)


def with_fallbacks(act: BaseTool, plan_b: Callable[[Any], str]) -> Any:
    return act.with_fallbacks([RunnableLambda(plan_b)])


def with_except(act: BaseTool, plan_b: Callable[[Any], str]) -> Any:
    def attempt(value: Any) -> str:
        try:
            return str(act.invoke(value))
        except Exception:  # noqa: BLE001 - as careless code does
            return plan_b(value)

    return RunnableLambda(attempt)


SWALLOWERS: dict[str, Inside] = {
    "retry": with_retry,
    "fallbacks": with_fallbacks,
    "except": with_except,
}


@answered_both_ways
def test_retry_of_a_runnable_asks_once_and_runs_once(
    pocket: PocketAuth, alice: Browser, mode: str, style: str
) -> None:
    """`with_retry` takes a pause for a failure: three questions, of which one is seen."""
    work = Work(mode)
    act = with_retry(pocket.wrap(work.tool("act", "acme", question="sure?")), str)

    def flow(_: Any) -> Any:
        return act.invoke({"text": "x"})

    async def aflow(_: Any) -> Any:
        return await act.ainvoke({"text": "x"})

    graph = entrypoint(checkpointer=InMemorySaver())(flow if mode == SYNC else aflow)
    person = Person(alice, style)
    state = run(graph, 1, mode)
    state = run(graph, Command(resume="not yet"), mode)
    while "__interrupt__" in state:
        state = run(graph, person.reply(state), mode)
    assert person.log == [[{"connect": ["acme"]}], ["sure?"]]
    assert work.heard == [("act", "answer to sure?")]
    assert work.names == ["act"]
    assert state == "act did x"


@pytest.mark.parametrize("kind", ["fallbacks", "except"])
def test_swallowed_pause_is_never_shown_and_grants_nothing(
    pocket: PocketAuth, alice: Browser, kind: str
) -> None:
    """Code that takes every exception for a failure goes on without the tool."""
    work = Work()
    guarded = pocket.wrap(work.tool("act", "acme"))
    act = SWALLOWERS[kind](guarded, lambda _: "plan b")

    @entrypoint(checkpointer=InMemorySaver())
    def flow(_: Any) -> Any:
        return act.invoke({"text": "x"})

    assert flow.invoke(1, thread()) == "plan b"
    assert not flow.get_state(thread()).interrupts
    assert work.done == []
    connect(pocket, alice, "acme")
    assert flow.invoke(1, thread()) == "act did x"


@pytest.mark.parametrize("style", STYLES)
def test_question_behind_a_swallowed_pause_never_gets_our_answer(
    pocket: PocketAuth, alice: Browser, style: str
) -> None:
    """It is asked again until the account is there; then it is not needed any more."""
    work = Work()
    heard: list[Any] = []

    def plan_b(_: Any) -> str:
        heard.append(interrupt("plan b?"))
        return "plan b"

    act = with_except(pocket.wrap(work.tool("act", "acme")), plan_b)

    @entrypoint(checkpointer=InMemorySaver())
    def flow(_: Any) -> Any:
        return act.invoke({"text": "x"})

    state, person = flow.invoke(1, thread()), Person(alice, style)
    for _ in range(3):
        [pause] = state["__interrupt__"]
        assert pause.value == "plan b?"
        assert work.done == []
        state = flow.invoke(person.reply(state), thread())
        if "__interrupt__" not in state:
            break
    assert set(heard) <= {"answer to plan b?"}


@pytest.mark.parametrize("kind", SWALLOWERS)
def test_behind_a_gate_there_is_nothing_to_swallow(
    pocket: PocketAuth, alice: Browser, kind: str
) -> None:
    """What a turn needs was asked for before: inside, no interrupt is raised."""
    work = Work()
    inner = pocket.wrap(work.tool("inner", "acme"))
    safe = SWALLOWERS[kind](inner, lambda _: "plan b")

    @tool
    def outer(acme: Acme) -> str:
        """Act through another tool."""
        return str(safe.invoke({"text": "x"}))

    graph, _ = build("create_agent", pocket, [outer], [says(call("outer"))])
    person = Person(alice)
    done = person.go(graph, SYNC)
    assert person.log == [[{"connect": ["acme"]}]]
    assert results(done)["outer"].text == "inner did x"
    assert work.names == ["inner"]


# ------------------------------------------------------ everything that can be injected


class AgentColours(AgentState[Any]):
    """An agent's state with a field of its own."""

    colour: str


class DictColours(TypedDict):
    """A hand-built graph's state, with messages under another name."""

    talk: Annotated[list[Any], add_messages]
    colour: str


@dataclass
class DataColours:
    """The same as a dataclass."""

    talk: Annotated[list[Any], add_messages] = field(default_factory=list)
    colour: str = ""


class ModelColours(BaseModel):
    """The same as a pydantic model."""

    talk: Annotated[list[Any], add_messages] = []
    colour: str = ""


@dataclass
class Context:
    """What an app hands to its graph."""

    user: str


def painting(seen: list[Any], mode: str) -> BaseTool:
    """Return a tool that takes all there is."""

    @tool
    def paint(
        text: str,
        *,
        acme: Acme,
        zeta: Annotated[AuthContext | None, InjectedAuth("zeta", required=False)],
        state: Annotated[Any, InjectedState],
        colour: Annotated[str, InjectedState("colour")],
        store: Annotated[BaseStore, InjectedStore()],
        ident: Annotated[str, InjectedToolCallId],
        runtime: ToolRuntime[Context, Any],
    ) -> str:
        """Paint."""
        seen.append((acme, zeta, state, store, ident, runtime))
        return f"{text} in {colour}"

    @tool("paint")
    async def apaint(
        text: str,
        *,
        acme: Acme,
        zeta: Annotated[AuthContext | None, InjectedAuth("zeta", required=False)],
        state: Annotated[Any, InjectedState],
        colour: Annotated[str, InjectedState("colour")],
        store: Annotated[BaseStore, InjectedStore()],
        ident: Annotated[str, InjectedToolCallId],
        runtime: ToolRuntime[Context, Any],
    ) -> str:
        """Paint."""
        seen.append((acme, zeta, state, store, ident, runtime))
        return f"{text} in {colour}"

    return paint if mode == SYNC else apaint


def painter(
    kind: Any, pocket: PocketAuth, one: BaseTool, model: Any, store: Any
) -> Any:
    """Return a graph whose state is of this kind."""
    saver = InMemorySaver()
    if kind is AgentColours:
        return create_agent(
            model,
            [one],
            middleware=[pocket.middleware()],
            state_schema=AgentColours,
            context_schema=Context,
            checkpointer=saver,
            store=store,
        )

    def talk(state: Any) -> list[Any]:
        return state["talk"] if isinstance(state, dict) else state.talk

    builder = StateGraph(kind, context_schema=Context)
    builder.add_node("model", lambda s: {"talk": [model.invoke(talk(s))]})
    pocket.add_tool_node(builder, [one], then="model", messages_key="talk")
    builder.add_edge(START, "model")
    builder.add_conditional_edges(
        "model", lambda s: tools_condition(s, messages_key="talk")
    )
    return builder.compile(checkpointer=saver, store=store)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        (AgentColours, SYNC),
        (AgentColours, ASYNC),
        (DictColours, ASYNC),
        (DataColours, SYNC),
        (ModelColours, ASYNC),
    ],
)
def test_all_that_can_be_injected_comes_beside_the_contexts(
    server: AuthorizationServer,
    pocket: PocketAuth,
    alice: Browser,
    kind: Any,
    mode: str,
) -> None:
    """State, one of its fields, store, call id, run time, after a pause as before."""
    seen: list[Any] = []
    forged = {"colour": "red", "ident": "forged", "acme": "forged", "state": {}}
    script = [
        says(call("paint", "one", text="x", **forged)),
        says(call("paint", "two", text="y", runtime=None, store=None, zeta="forged")),
    ]
    model, store = ScriptedModel(script=script), InMemoryStore()
    graph = painter(kind, pocket, painting(seen, mode), model, store)
    key = "messages" if kind is AgentColours else "talk"

    def go(value: Any) -> Any:
        if mode == SYNC:
            return graph.invoke(value, thread(), context=Context("ann"))
        return asyncio.run(graph.ainvoke(value, thread(), context=Context("ann")))

    paused = go({key: [("user", "go")], "colour": "blue"})
    assert seen == []
    alice.visit(pending_authorizations(paused)[0].url)
    done = go(resume(paused))
    told = [m.text for m in done[key] if m.type == "tool"]
    assert told == ["x in blue", "y in blue"]
    for given, name in zip(seen, ["one", "two"], strict=True):
        acme, zeta, state, its_store, ident, runtime = given
        typed = kind in {DataColours, ModelColours}
        assert isinstance(state, kind if typed else dict)
        assert type(runtime.state) is type(state)
        assert ident == runtime.tool_call_id == name
        assert runtime.context == Context("ann")
        assert its_store is runtime.store is store
        assert acme.access_token == server.issued_access_tokens[0]
        assert zeta is None
    shown = (
        str(model.bound[0].tool_call_schema.model_json_schema()) if model.bound else ""
    )
    assert not any(name in shown for name in ("acme", "zeta", "store", "colour"))


# ------------------------------------------------------------- what rewrites the history


class Forgetful(AgentMiddleware[Any, Any]):
    """Puts other messages in the place of all, as summaries do."""

    def before_model(self, state: Any, runtime: Any) -> dict[str, Any] | None:
        kept = state["messages"]
        if kept[-1].type != "tool":
            return None
        removed = RemoveMessage(id=REMOVE_ALL_MESSAGES)
        return {"messages": [removed, ("user", "so far: nothing"), *kept[-2:]]}


REWRITERS: dict[str, Callable[[], AgentMiddleware[Any, Any]]] = {
    "remove all": Forgetful,
    "summary": lambda: SummarizationMiddleware(
        ScriptedModel(), trigger=("messages", 3), keep=("messages", 2)
    ),
}


@placed_once
@pytest.mark.parametrize("rewriter", REWRITERS.values(), ids=REWRITERS)
def test_rewritten_history_changes_nothing_about_the_pauses(
    pocket: PocketAuth,
    alice: Browser,
    rewriter: Callable[[], AgentMiddleware[Any, Any]],
    order: str,
    mode: str,
) -> None:
    """Three turns, two of which ask; every tool runs once, no question comes twice."""
    work = Work(mode)
    tools = [work.tool("look", "acme"), work.tool("post", "zeta", question="sure?")]
    script = [
        says(call("look", "one", text="x")),
        says(call("post", "two", text="y")),
        says(call("look", "three", text="z")),
    ]

    class Counting(ScriptedModel):
        """Goes on with its script though the history is gone."""

        def _generate(self, *args: Any, **kwargs: Any) -> Any:
            fresh = ScriptedModel(script=self.script[self.calls :])
            self.calls += 1
            return fresh._generate(
                [], **{k: v for k, v in kwargs.items() if k == "stop"}
            )

    model = Counting(script=script)
    graph = agent(pocket, tools, [], rewriter(), order=order, model=model)
    person = Person(alice)
    done = person.go(graph, mode)
    assert person.log == [[{"connect": ["acme"]}], [{"connect": ["zeta"]}], ["sure?"]]
    assert [name for name, _ in work.done] == ["look", "post", "look"]
    assert len(done["messages"]) < 8
    assert done["messages"][-1].text == "done"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("decline", [False, True], ids=["granted", "declined"])
def test_result_that_is_returned_directly_ends_the_run(
    pocket: PocketAuth, alice: Browser, mode: str, *, decline: bool
) -> None:
    """After the pause as without it; a refusal goes to the model instead."""
    work = Work(mode)
    look = work.tool("look", "acme")
    look.return_direct = True
    model = ScriptedModel(script=[says(call("look", text="x"))])
    graph = agent(pocket, [look], [], model=model)
    paused = ask(graph, mode)
    if not decline:
        alice.visit(pending_authorizations(paused)[0].url)
    done = run(graph, resume(paused, decline=["acme"] if decline else []), mode)
    assert done["messages"][-1].type == ("ai" if decline else "tool")
    assert model.calls == (2 if decline else 1)
    assert work.names == ([] if decline else ["look"])


@through_gates
@pytest.mark.parametrize("decline", [False, True], ids=["granted", "declined"])
def test_unguarded_call_waits_with_the_others_and_runs_once(
    pocket: PocketAuth, alice: Browser, door: str, mode: str, *, decline: bool
) -> None:
    """No call of a turn starts before all are let in; a refusal stops only its own."""
    work = Work(mode)
    tools = [
        plain(work, "before", question="before?"),
        work.tool("look", "acme"),
        plain(work, "after"),
    ]
    script = [says(*(call(t.name, text="x") for t in tools))]
    graph, model = build(door, pocket, tools, script)
    paused = ask(graph, mode)
    assert (work.done, work.heard) == ([], [])
    if not decline:
        alice.visit(pending_authorizations(paused)[0].url)
    state = run(graph, resume(paused, decline=["acme"] if decline else []), mode)
    ran = ["after"] if decline else ["after", "look"]
    assert work.names == ran
    assert [p.value for p in state["__interrupt__"]] == ["before?"]
    done = run(graph, Command(resume="theirs"), mode)
    assert work.names == sorted([*ran, "before"])
    assert work.heard == [("before", "theirs")]
    assert model.calls == 2
    assert len([m for m in done["messages"] if m.type == "tool"]) == 3


@through_all
def test_tool_may_return_a_command(
    pocket: PocketAuth, alice: Browser, door: str, mode: str
) -> None:
    """It updates the graph's own fields, after a pause as without; the token stays out."""
    seen: list[str] = []

    def body(text: str, acme: AuthContext, call_id: str) -> Command[Any]:
        seen.append(acme.access_token)
        message = ToolMessage(f"painted {acme.access_token}", tool_call_id=call_id)
        return Command(update={"messages": [message], "colour": text})

    @tool
    def paint(
        text: str, acme: Acme, call_id: Annotated[str, InjectedToolCallId]
    ) -> Command[Any]:
        """Paint."""
        return body(text, acme, call_id)

    @tool("paint")
    async def apaint(
        text: str, acme: Acme, call_id: Annotated[str, InjectedToolCallId]
    ) -> Command[Any]:
        """Paint."""
        return body(text, acme, call_id)

    one = paint if mode == SYNC else apaint
    script = [says(call("paint", text="green"))]
    model = ScriptedModel(script=script)
    if door == "create_agent":
        graph = agent(pocket, [one], script, state_schema=AgentColours)
    else:
        builder = StateGraph(AgentColours)
        builder.add_node("agent", lambda s: {"messages": [model.invoke(s["messages"])]})
        builder.add_edge(START, "agent")
        if door == "add_tool_node":
            pocket.add_tool_node(builder, [one])
        else:
            builder.add_node("tools", ToolNode(pocket.wrap([one])))
            builder.add_edge("tools", "agent")
        builder.add_conditional_edges("agent", tools_condition)
        graph = builder.compile(checkpointer=InMemorySaver())
    value = {"messages": [("user", "go")], "colour": "blue"}
    paused = run(graph, value, mode)
    assert paused["colour"] == "blue"
    alice.visit(pending_authorizations(paused)[0].url)
    done = run(graph, resume(paused), mode)
    assert done["colour"] == "green"
    assert [m.text for m in done["messages"] if m.type == "tool"] == ["painted ***"]
    assert done["messages"][-1].text == "done"
    assert len(seen) == 1
