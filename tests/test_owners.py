"""Whose account a run uses: never the model's choice, the same in nested runs."""

# No `from __future__ import annotations`: tools are made of local annotations.

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
from conftest import call, says
from graphs import (
    ASYNC,
    DOORS,
    GATES,
    MODES,
    SYNC,
    Work,
    ask,
    build,
    results,
    run,
    thread,
)
from langchain.agents import create_agent
from langchain_core.tools import StructuredTool, tool
from langgraph.checkpoint.memory import InMemorySaver

from langchain_pocket_auth import (
    AuthContext,
    AuthorizationRequired,
    InjectedAuth,
    Owner,
    OwnerUnknown,
    PocketAuth,
    RunInfo,
    by_thread,
    current_auth,
    from_configurable,
    pending_authorizations,
    resume,
)
from langchain_pocket_auth.testing import AuthorizationServer, Browser, ScriptedModel

Acme = Annotated[AuthContext, InjectedAuth("acme")]


def connect(pocket: PocketAuth, person: Browser, **owner: Any) -> None:
    """Connect acme for an owner."""
    request = pocket.make_request([], auth_provider="acme")
    url = asyncio.run(pocket.prepare(request, auth_provider="acme", **owner))
    assert url is not None
    assert person.visit(url).status_code == 200


def user(run: RunInfo) -> str | None:
    """Resolve as an app does."""
    return run.config["configurable"].get("user")


async def auser(run: RunInfo) -> str | None:
    """Resolve with a look-up of the app's own."""
    await asyncio.sleep(0)
    return user(run)


def thread_owner(run: RunInfo) -> Owner | None:
    """Resolve to an owner of another kind."""
    return Owner("app", run.thread_id) if run.thread_id else None


RESOLVERS = {
    "function": (user, {"user": "ann"}, {"user": "bob"}),
    "coroutine": (auser, {"user": "ann"}, {"user": "bob"}),
    "from_configurable": (from_configurable("uid"), {"uid": "ann"}, {"uid": "bob"}),
    "by_thread": (by_thread, {"thread_id": "t-ann"}, {"thread_id": "t-bob"}),
    "owner": (thread_owner, {"thread_id": "t-ann"}, {"thread_id": "t-bob"}),
}


PLACES = [
    *((name, "create_agent") for name in RESOLVERS),
    *(("coroutine", door) for door in DOORS[1:]),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("resolver", "door"), PLACES)
def test_two_users_never_see_each_others_tokens(
    server: AuthorizationServer,
    make_pocket: Callable[..., PocketAuth],
    resolver: str,
    door: str,
    mode: str,
) -> None:
    """Each user is asked for the own account, and only its token reaches the tool."""
    owner, ann, bob = RESOLVERS[resolver]
    pocket, work = make_pocket(owner=owner), Work(mode)
    script = [says(call("look", text="x", user_id="bob", auth="bob"))]
    graph, _ = build(door, pocket, [work.tool("look", "acme")], script)
    for who in (ann, bob):
        config = {"configurable": {"thread_id": str(who), **who}}
        paused = ask(graph, mode, config)
        [pending] = pending_authorizations(paused)
        Browser(str(who)).visit(pending.url)
        run(graph, resume(paused), mode, config)
    first, second = server.issued_access_tokens
    assert work.done == [("look", first), ("look", second)]
    assert first != second


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("owner", [user, auser, from_configurable("user"), lambda _: 7])
def test_unknown_owner_ends_the_run(
    make_pocket: Callable[..., PocketAuth], door: str, mode: str, owner: Any
) -> None:
    """Without an owner nothing is guessed: the developer is told."""
    work = Work(mode)
    tools, script = [work.tool("look", "acme")], [says(call("look", text="x"))]
    graph, _ = build(door, make_pocket(owner=owner), tools, script)
    with pytest.raises(OwnerUnknown, match="owner="):
        ask(graph, mode)
    assert work.done == []


@pytest.mark.parametrize("owner", ["ann", Owner("app", "bot"), None])
def test_fixed_owner_is_the_same_in_every_conversation(
    server: AuthorizationServer,
    make_pocket: Callable[..., PocketAuth],
    alice: Browser,
    owner: Any,
) -> None:
    """A str is a user, an Owner itself, and without either one machine is a person."""
    pocket, work = make_pocket(owner=owner), Work()
    tools, script = [work.tool("look", "acme")], [says(call("look", text="x"))]
    graph, _ = build("create_agent", pocket, tools, script)
    connect(pocket, alice, **({"owner": owner} if owner else {}))
    for name in "12":
        assert "__interrupt__" not in ask(graph, SYNC, thread(name))
    assert work.done == [("look", server.issued_access_tokens[0])] * 2


@pytest.mark.parametrize("door", GATES)
@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "plain"])
@pytest.mark.parametrize("mode", MODES)
def test_nested_run_keeps_its_parents_owner(
    server: AuthorizationServer,
    make_pocket: Callable[..., PocketAuth],
    alice: Browser,
    mode: str,
    guarded: bool,
    door: str,
) -> None:
    """A child graph with a thread id of its own acts for who started the parent."""
    asked: list[str | None] = []

    def owner(run: RunInfo) -> str | None:
        asked.append(run.thread_id)
        return {"parent": "ann", "child": "mallory"}[run.thread_id or ""]

    pocket, work = make_pocket(owner=owner), Work(mode)
    connect(pocket, alice, owner="ann")
    child, _ = build(
        "create_agent",
        pocket,
        [work.tool("look", "acme")],
        [says(call("look", text="x"))],
    )
    config = thread("child")

    @tool
    def delegate() -> str:
        """Ask another agent."""
        return str(child.invoke({"messages": [("user", "go")]}, config)["messages"][-1])

    @tool("delegate")
    async def adelegate() -> str:
        """Ask another agent."""
        value = {"messages": [("user", "go")]}
        return str((await child.ainvoke(value, config))["messages"][-1])

    outer = delegate if mode == SYNC else adelegate
    if guarded:
        outer = pocket.wrap(outer, provider="acme")
    parent, _ = build(door, pocket, [outer], [says(call("delegate"))])
    done = ask(parent, mode, thread("parent"))
    assert results(done)["delegate"].status == "success"
    assert work.done == [("look", server.issued_access_tokens[0])]
    assert set(asked) == {"parent"}


def test_one_pockets_owner_is_not_anothers(
    server: AuthorizationServer,
    make_pocket: Callable[..., PocketAuth],
    alice: Browser,
) -> None:
    """A tool inside another pocket's tool acts for its own pocket's owner."""
    app, users = make_pocket(owner=Owner("app", "bot")), make_pocket(owner="ann")
    connect(users, alice, owner="ann")
    connect_app = Browser("bot")
    server.register(
        client_id="acme-client",
        client_secret="acme-secret",
        redirect_uris=[f"{app.base_url}/auth/acme/oauth2/callback"],
    )
    connect(app, connect_app, owner=Owner("app", "bot"))
    first, second = server.issued_access_tokens

    @tool
    def inner(acme: Acme) -> str:
        """Act for the user."""
        return acme.access_token[:8]

    wrapped = users.wrap(inner)

    @tool
    def outer(acme: Acme) -> str:
        """Act for the app."""
        return f"{wrapped.invoke({})} {acme.access_token[:8]}"

    assert app.wrap(outer).invoke({}) == f"{first[:8]} {second[:8]}"


@dataclass
class Context:
    """What an app hands to its graph."""

    user: str


@pytest.mark.parametrize("mode", MODES)
def test_resolver_sees_context_and_thread(
    make_pocket: Callable[..., PocketAuth], mode: str
) -> None:
    """A resolver may use the run-time context, which no client's config reaches."""
    seen: list[RunInfo] = []

    def owner(run: RunInfo) -> str:
        seen.append(run)
        return str(run.context.user)

    work = Work(mode)
    agent = create_agent(
        ScriptedModel(script=[says(call("look", text="x"))]),
        [work.tool("look", "acme")],
        middleware=[make_pocket(owner=owner).middleware()],
        context_schema=Context,
        checkpointer=InMemorySaver(),
    )
    value = {"messages": [("user", "go")]}
    if mode == SYNC:
        agent.invoke(value, thread("7"), context=Context("ann"))
    else:
        asyncio.run(agent.ainvoke(value, thread("7"), context=Context("ann")))
    assert {(r.context.user, r.thread_id, r.user) for r in seen} == {("ann", "7", None)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("door", GATES)
def test_one_person_may_have_several_accounts_of_one_provider(
    server: AuthorizationServer,
    make_pocket: Callable[..., PocketAuth],
    door: str,
    mode: str,
) -> None:
    """The author of a tool, or who wraps it, says which; the model cannot."""
    pocket, used = make_pocket(owner="ann"), {}

    def work(text: str, auth: AuthContext) -> str:
        """Act for the user."""
        used["work"] = auth.access_token
        return "done"

    def private(text: str) -> str:
        """Act for the user."""
        used["private"] = current_auth().access_token
        return "done"

    work.__annotations__["auth"] = Annotated[
        AuthContext, InjectedAuth("acme", profile="work")
    ]
    tools = [
        StructuredTool.from_function(work),
        pocket.wrap(
            StructuredTool.from_function(private), provider="acme", profile="private"
        ),
    ]
    forged = {"text": "x", "profile": "work"}
    script = [says(call("work", **forged), call("private", **forged))]
    graph, _ = build(door, pocket, tools, script)
    paused = ask(graph, mode)
    links = {p.profile: p.url for p in pending_authorizations(paused)}
    assert set(links) == {"work", "private"}
    for person, profile in (("ann@work", "work"), ("ann", "private")):
        Browser(person).visit(links[profile])
    run(graph, resume(paused), mode)
    first, second = server.issued_access_tokens
    assert used == {"work": first, "private": second}


# ------------------------------------------------------------------ outside a graph


async def test_tool_outside_a_graph_raises_with_the_link(
    server: AuthorizationServer, pocket: PocketAuth, alice: Browser
) -> None:
    """There is nothing to pause: the exception has the link, its text does not."""
    look = pocket.wrap(Work(ASYNC).tool("look", "acme", "read"))
    with pytest.raises(AuthorizationRequired) as caught:
        await look.ainvoke({"text": "x"})
    error = caught.value
    assert error.url is not None
    assert (error.provider, error.scopes) == ("acme", ("read",))
    assert error.url not in f"{error} {error!r}"
    await alice.avisit(error.url)
    assert await look.ainvoke({"text": "x"}) == "look did x"


async def test_synchronous_call_inside_a_running_loop_works(
    make_pocket: Callable[..., PocketAuth], alice: Browser
) -> None:
    """As in a notebook: neither the engine nor an async resolver needs the loop."""
    pocket = make_pocket(owner=auser)

    @tool
    def look() -> str:
        """Look."""
        return current_auth().description

    look = pocket.wrap(look, provider="acme")
    config = thread(user="ann")
    with pytest.raises(AuthorizationRequired) as caught:
        look.invoke({}, config)
    await alice.avisit(caught.value.url or "")
    assert look.invoke({}, config)
    graph, _ = build("create_agent", pocket, [look], [says(call("look"))])
    assert results(ask(graph, SYNC, config))["look"].status == "success"


async def test_failing_resolver_leaves_nothing_behind(
    make_pocket: Callable[..., PocketAuth],
) -> None:
    """What a resolver raises ends the call; no coroutine is left unawaited."""

    async def owner(_: RunInfo) -> str:
        raise ZeroDivisionError

    look = make_pocket(owner=owner).wrap(Work().tool("look", "acme"))
    with pytest.raises(ZeroDivisionError):
        look.invoke({"text": "x"})
    with pytest.raises(ZeroDivisionError):
        await look.ainvoke({"text": "x"})


def test_threads_and_loops_share_one_pocket(
    server: AuthorizationServer, pocket: PocketAuth, alice: Browser
) -> None:
    """Sync calls of several threads and async ones of several loops all work."""
    connect(pocket, alice)
    work, awork = Work(), Work(ASYNC)
    look = pocket.wrap(work.tool("look", "acme"))
    alook = pocket.wrap(awork.tool("look", "acme"))
    with_threads = look.batch([{"text": str(n)} for n in range(8)])
    assert with_threads == [f"look did {n}" for n in range(8)]
    for _ in range(2):
        assert asyncio.run(alook.abatch([{"text": "x"}] * 4)) == ["look did x"] * 4
    assert len(server.issued_access_tokens) == 1
