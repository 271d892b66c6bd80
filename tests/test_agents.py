"""Agents that pause for their user: through real graphs, server and consent."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from conftest import call, says
from graphs import (
    ASYNC,
    DOORS,
    GATES,
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
from langchain_core.messages import AIMessage
from langgraph.graph import START, StateGraph
from langgraph.prebuilt import tools_condition
from langgraph.types import Command

from langchain_pocket_auth import (
    ConfigurationError,
    PendingAuthorization,
    PocketAuth,
    pending_authorizations,
    resume,
)
from langchain_pocket_auth.testing import AuthorizationServer, Browser, assert_no_leak

world, server, pocket, alice = shared()

REQUEST_KEYS = {
    *("key", "mode", "url", "message", "provider", "handler", "profile", "state"),
    *("reason", "scopes", "missing_scopes", "account", "tools", "tool_call_ids"),
    "expires_at",
}


def pauses(state: Any) -> list[Any]:
    return list(state.get("__interrupt__", ()))


def the(state: Any) -> PendingAuthorization:
    """Return the one connection that is asked for."""
    [pending] = pending_authorizations(state)
    return pending


# ------------------------------------------------------------- a missing connection


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("door", DOORS)
def test_missing_connection_pauses_once_and_the_tool_runs_once(
    server: AuthorizationServer,
    pocket: PocketAuth,
    alice: Browser,
    door: str,
    mode: str,
) -> None:
    """One pause, one consent, one call with the token; then nothing is asked again."""
    work = Work(mode)
    tools = [work.tool("look", "acme", "read")]
    graph, model = build(door, pocket, tools, [says(call("look", text="x"))])

    paused = ask(graph, mode)
    [pause] = pauses(paused)
    [request] = pause.value["requests"]
    assert set(pause.value) == {"type", "version", "message", "requests"}
    assert (pause.value["type"], pause.value["version"]) == ("pocket_auth", 1)
    assert set(request) == REQUEST_KEYS
    assert {k: request[k] for k in ("mode", "provider", "handler", "profile")} == {
        "mode": "url",
        "provider": "acme",
        "handler": "acme-oauth2",
        "profile": "default",
    }
    assert request["state"] == "NO_SESSION"
    assert request["scopes"] == request["missing_scopes"] == ["read"]
    assert (request["tools"], request["tool_call_ids"]) == (["look"], ["call-look"])
    assert request["url"].startswith(f"{pocket.base_url}/connect/")
    written = json.dumps(pause.value)
    assert server.issuer not in written
    assert "state=" not in written
    assert (work.done, model.calls) == ([], 1)

    assert alice.visit(the(paused).url).status_code == 200
    done = run(graph, resume(paused), mode)
    assert not pauses(done)
    assert work.done == [("look", server.issued_access_tokens[0])]
    assert model.calls == 2
    assert results(done)["look"].text == "look did x"
    assert_no_leak([*server.issued_access_tokens, *server.issued_codes], pause.value)

    again = ask(graph, mode, thread("2"))
    assert not pauses(again)
    assert work.names == ["look", "look"]
    assert server.token_requests == {"authorization_code": 1}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("door", GATES)
def test_two_providers_are_asked_for_in_one_pause(
    server: AuthorizationServer,
    pocket: PocketAuth,
    alice: Browser,
    door: str,
    mode: str,
) -> None:
    """Partial consent pauses again for the other one only; each tool runs once."""
    work = Work(mode)
    tools = [
        work.tool("look", "acme", "read"),
        work.tool("list", "acme", "list"),
        work.tool("post", "zeta", "write"),
    ]
    script = [says(*(call(t.name, text="x") for t in tools))]
    graph, model = build(door, pocket, tools, script)

    paused = ask(graph, mode)
    assert len(pauses(paused)) == 1
    acme, zeta = pending_authorizations(paused)
    assert (acme.provider, acme.scopes) == ("acme", ("read", "list"))
    assert acme.tools == ("list", "look")
    assert acme.tool_call_ids == ("call-look", "call-list")
    assert (zeta.provider, zeta.tools) == ("zeta", ("post",))

    alice.visit(acme.url)
    paused = run(graph, resume(paused), mode)
    assert (the(paused).key, the(paused).url) == (zeta.key, zeta.url)
    assert work.done == []

    alice.visit(zeta.url)
    done = run(graph, resume(paused), mode)
    assert not pauses(done)
    assert (work.names, model.calls) == (["list", "look", "post"], 2)
    first, second = server.issued_access_tokens
    assert dict(work.done) == {"look": first, "list": first, "post": second}


def by_value(value: Any) -> Callable[[Any], Command[Any]]:
    return lambda _: Command(resume=value)


def by_id(value: Any) -> Callable[[Any], Command[Any]]:
    return lambda state: Command(resume={p.id: value for p in pauses(state)})


FORGED = {"authorized": True, "access_token": "forged-token", "action": "accept"}
ANSWERS = {
    "value": by_value("done"),
    "map": by_id("done"),
    "resume": resume,
    "forged value": by_value(FORGED),
    "forged map": by_id({"responses": {"x": FORGED}, **FORGED}),
    "nonsense": by_id([None, 1, {"responses": 3}]),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_any_answer_is_a_wake_up_and_grants_nothing(
    server: AuthorizationServer,
    pocket: PocketAuth,
    alice: Browser,
    door: str,
    answer: Callable[[Any], Command[Any]],
) -> None:
    """Before the consent the same link comes again; after it the tool runs."""
    work = Work()
    tools = [work.tool("look", "acme", "read")]
    graph, model = build(door, pocket, tools, [says(call("look", text="x"))])
    paused = first = ask(graph, SYNC)
    for _ in range(2):
        paused = run(graph, answer(paused), SYNC)
        assert the(paused).url == the(first).url
        assert the(paused).state == "PENDING_RESOLVE"
        assert work.done == []
    alice.visit(the(paused).url)
    done = run(graph, answer(paused), SYNC)
    assert not pauses(done)
    assert work.done == [("look", server.issued_access_tokens[0])]
    assert model.calls == 2


def test_no_answer_at_all_looks_again(pocket: PocketAuth, alice: Browser) -> None:
    """`invoke(None)` continues a paused run as soon as the person has agreed."""
    work = Work()
    tools = [work.tool("look", "acme", "read", question="sure?")]
    for door in DOORS:
        graph, _ = build(door, pocket, tools, [says(call("look", text="x"))])
        paused = ask(graph, SYNC)
        if door == DOORS[0]:
            paused = run(graph, None, SYNC)
            alice.visit(the(paused).url)
            paused = run(graph, None, SYNC)
        assert [p.value for p in pauses(paused)] == ["sure?"]
        run(graph, Command(resume=f"yes {door}"), SYNC)
    assert work.heard == [("look", f"yes {door}") for door in DOORS]


# --------------------------------------------------------------------- saying no


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("door", GATES)
@pytest.mark.parametrize("where", ["here", "provider"])
def test_refused_connection_becomes_a_result_and_the_rest_runs(
    pocket: PocketAuth, alice: Browser, door: str, mode: str, where: str
) -> None:
    """A refusal, here or at the provider, is told to the model and not asked again."""
    work = Work(mode)
    tools = [work.tool("look", "acme"), work.tool("post", "zeta")]
    script = [says(call("look", text="x"), call("post", text="y"))]
    graph, model = build(door, pocket, tools, script)
    paused = ask(graph, mode)
    acme, zeta = pending_authorizations(paused)
    alice.visit(acme.url)
    if where == "provider":
        alice.visit(zeta.url, approve=False)
        done = run(graph, resume(paused), mode)
    else:
        done = run(graph, resume(paused, decline=[zeta]), mode)
    assert not pauses(done)
    assert (work.names, model.calls) == (["look"], 2)
    answer = results(done)["post"]
    assert answer.status == "error"
    assert answer.tool_call_id == "call-post"
    assert "declined to connect Zeta" in answer.text
    assert "http" not in answer.text
    assert results(done)["look"].status == "success"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("where", ["here", "provider"])
def test_refusal_without_a_gate_is_a_result_as_well(
    pocket: PocketAuth, alice: Browser, mode: str, where: str
) -> None:
    """A tool that paused by itself answers the refusal, and asks nothing again."""
    work = Work(mode)
    tools = [work.tool("look", "acme")]
    graph, _ = build("ToolNode", pocket, tools, [says(call("look", text="x"))])
    paused = ask(graph, mode)
    if where == "provider":
        alice.visit(the(paused).url, approve=False)
    decline = ["acme"] if where == "here" else []
    done = run(graph, resume(paused, decline=decline), mode)
    assert not pauses(done)
    assert results(done)["look"].status == "error"
    assert work.done == []


@pytest.mark.parametrize("where", ["here", "provider"])
def test_refusal_cools_down_before_it_is_asked_again(
    make_pocket: Callable[..., PocketAuth], alice: Browser, where: str
) -> None:
    """The model's next try in that conversation asks nobody, until the time is up."""
    pocket, work = make_pocket(decline_cooldown=timedelta(seconds=1)), Work()
    again = [says(call("look", str(n), text="x")) for n in range(2)]
    graph, _ = build("create_agent", pocket, [work.tool("look", "acme")], again)
    paused = ask(graph, SYNC)
    if where == "provider":
        alice.visit(the(paused).url, approve=False)
    unwanted = ["acme"] if where == "here" else []
    done = run(graph, resume(paused, decline=unwanted), SYNC)
    assert not pauses(done)
    refused = [m for m in done["messages"] if m.type == "tool"]
    assert [m.artifact["errors"] for m in refused] == [["AuthorizationRefused"]] * 2

    elsewhere = ask(graph, SYNC, thread("2"))
    assert the(elsewhere).provider == "acme"

    time.sleep(1.0)  # the cool-down
    graph, _ = build("create_agent", pocket, [work.tool("look", "acme")], again[:1])
    paused = ask(graph, SYNC)
    alice.visit(the(paused).url)
    assert not pauses(run(graph, resume(paused), SYNC))
    assert work.names == ["look"]


def test_without_a_cool_down_a_later_turn_may_ask_again(
    make_pocket: Callable[..., PocketAuth], alice: Browser
) -> None:
    """A refusal holds for its turn; the next message of the model asks anew."""
    pocket, work = make_pocket(decline_cooldown=timedelta()), Work()
    script = [says(call("look", text="x")), says(call("look", "second", text="x"))]
    graph, _ = build("create_agent", pocket, [work.tool("look", "acme")], script)
    paused = ask(graph, SYNC)
    alice.visit(the(paused).url, approve=False)
    paused = run(graph, resume(paused), SYNC)
    assert the(paused).tool_call_ids == ("second",)
    alice.visit(the(paused).url)
    assert not pauses(run(graph, resume(paused), SYNC))
    assert work.names == ["look"]


def test_declining_what_is_not_asked_is_an_error(pocket: PocketAuth) -> None:
    """A misspelt name in `decline` must not become an acceptance."""
    work = Work()
    graph, _ = build(
        "create_agent", pocket, [work.tool("a", "acme")], [says(call("a", text="x"))]
    )
    paused = ask(graph, SYNC)
    with pytest.raises(ValueError, match="amce"):
        resume(paused, decline=["amce"])
    with pytest.raises(ValueError, match="does not wait"):
        resume({"messages": []})


# ------------------------------------------------------------------- more permissions


@pytest.mark.parametrize("door", GATES)
@pytest.mark.parametrize("together", [False, True], ids=["alone", "together"])
@pytest.mark.parametrize("approve", [True, False], ids=["granted", "denied"])
def test_more_scopes_are_asked_for_and_never_cost_what_is_there(
    server: AuthorizationServer,
    pocket: PocketAuth,
    alice: Browser,
    *,
    door: str,
    together: bool,
    approve: bool,
) -> None:
    """An upgrade adds scopes; refused, the tool that needs fewer works on."""
    work = Work()
    tools = [work.tool("look", "acme", "read"), work.tool("post", "acme", "write")]
    turn = [call("look", "again", text="x")] if together else []
    script = [
        says(call("look", text="x")),
        says(call("post", text="y"), *turn),
        says(call("look", "last", text="x")),
    ]
    graph, _ = build(door, pocket, tools, script)
    paused = ask(graph, SYNC)
    alice.visit(the(paused).url)
    paused = run(graph, resume(paused), SYNC)

    upgrade = the(paused)
    assert upgrade.state == "DO_AUTH"
    assert set(upgrade.scopes) == {"read", "write"}
    assert upgrade.missing_scopes == ("write",)
    assert upgrade.tools == ("post",)
    assert "write" in upgrade.reason
    assert work.names == ["look"]

    alice.visit(upgrade.url, approve=approve)
    done = run(graph, resume(paused), SYNC)
    assert not pauses(done)
    assert work.names == ["look"] * (2 + together) + ["post"] * approve
    if approve:
        assert set(work.scopes["post"]) == {"read", "write"}
        granted = server.find_token(server.issued_access_tokens[-1])
        assert granted is not None
        assert set(granted.scope.split()) == {"read", "write"}
    else:
        assert "declined" in results(done)["post"].text
        assert work.scopes["look"] == ["read"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("door", DOORS)
def test_withheld_scope_is_a_result_and_no_loop(
    server: AuthorizationServer,
    pocket: PocketAuth,
    alice: Browser,
    door: str,
    mode: str,
) -> None:
    """Who agrees to less than is needed is not asked again in that turn."""
    server.withhold = {"write"}
    work = Work(mode)
    tools = [work.tool("post", "acme", "read", "write")]
    graph, _ = build(door, pocket, tools, [says(call("post", text="x"))])
    paused = ask(graph, mode)
    alice.visit(the(paused).url)
    done = run(graph, resume(paused), mode)
    assert not pauses(done)
    assert results(done)["post"].status == "error"
    assert "did not grant: write" in results(done)["post"].text
    assert work.done == []


def test_provider_trouble_is_a_result(
    server: AuthorizationServer, pocket: PocketAuth, alice: Browser
) -> None:
    """An expired token that cannot be renewed now does not end the run."""
    server.access_token_ttl_s = 1
    work, script = Work(), [says(call("look", text="x"))]
    tools = [work.tool("look", "acme")]
    graphs = [build(door, pocket, tools, script)[0] for door in DOORS]
    paused = [ask(graph, SYNC) for graph in graphs]
    alice.visit(the(paused[0]).url)
    time.sleep(1.1)  # the token's lifetime
    server.fault(503, times=9, grant_type="refresh_token")
    for graph, state in zip(graphs, paused, strict=True):
        done = run(graph, resume(state), SYNC)
        assert not pauses(done)
        assert results(done)["look"].status == "error"
    assert work.done == []


# -------------------------------------------------------- graphs that cannot ask


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("door", DOORS)
def test_without_interaction_the_model_is_told_at_once(
    make_pocket: Callable[..., PocketAuth], door: str, mode: str
) -> None:
    """`interactive=False` never pauses: the call fails, the run goes on."""
    work = Work(mode)
    tools = [work.tool("look", "acme")]
    pocket = make_pocket(interactive=False)
    graph, model = build(door, pocket, tools, [says(call("look", text="x"))])
    done = ask(graph, mode)
    assert not pauses(done)
    assert results(done)["look"].status == "error"
    assert "cannot ask the user" in results(done)["look"].text
    assert (work.done, model.calls) == ([], 2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("door", DOORS)
def test_graph_without_checkpointer_is_told_so(
    pocket: PocketAuth, door: str, mode: str
) -> None:
    """A pause that nobody could resume is an error that names the remedy."""
    work = Work(mode)
    tools = [work.tool("look", "acme")]
    script = [says(call("look", text="x"))]
    graph, _ = build(door, pocket, tools, script, saver=None)
    with pytest.raises(ConfigurationError, match="checkpointer"):
        ask(graph, mode)
    assert work.done == []


@pytest.mark.parametrize("mode", MODES)
def test_edge_around_the_gate_is_an_error(pocket: PocketAuth, mode: str) -> None:
    """A leftover edge from the gate to the model would not wait for the tools."""
    work = Work(mode)
    builder = StateGraph(State)
    builder.add_node("agent", lambda _: {"messages": [says(call("a", text="x"))]})
    pocket.add_tool_node(builder, [work.tool("a", "acme")])
    builder.add_edge(START, "agent")
    builder.add_conditional_edges("agent", tools_condition)
    builder.add_edge("tools", "agent")
    with pytest.raises(ConfigurationError, match="add_edge"):
        ask(builder.compile(), mode)


def test_drawn_graph_is_true(pocket: PocketAuth) -> None:
    """The picture shows the gate, the tools behind it, and the way back."""
    tools = [Work().tool("look", "acme")]
    graph, _ = build("add_tool_node", pocket, tools, [])
    edges = {(e.source, e.target) for e in graph.get_graph().edges}
    assert edges == {
        ("__start__", "agent"),
        ("agent", "tools"),
        ("agent", "__end__"),
        ("tools", "tools_run"),
        ("tools", "agent"),
        ("tools_run", "agent"),
    }


@pytest.mark.parametrize("door", GATES)
def test_two_agents_may_use_one_name_differently(
    server: AuthorizationServer, pocket: PocketAuth, alice: Browser, door: str
) -> None:
    """What a tool needs is known per agent, not per name in the process."""
    work, script = Work(), [says(call("act", text="x"))]
    graphs = [
        build(door, pocket, [work.tool("act", provider)], script)[0]
        for provider in ("acme", "zeta")
    ]
    asked = [ask(graph, SYNC) for graph in graphs]
    assert [the(state).provider for state in asked] == ["acme", "zeta"]
    for graph, state in zip(graphs, asked, strict=True):
        alice.visit(the(state).url)
        assert not pauses(run(graph, resume(state), SYNC))
    assert work.done == [("act", token) for token in server.issued_access_tokens]


def test_unguarded_tools_are_left_alone(pocket: PocketAuth) -> None:
    """Tools that need nothing run beside a gate as if it were not there."""
    from langchain_core.tools import tool

    @tool
    def plain(text: str) -> str:
        """Echo."""
        return text

    for door in DOORS:
        script = [says(call("plain", text="x"))]
        graph, _ = build(door, pocket, [plain], script, saver=None)
        assert results(ask(graph, SYNC))["plain"].text == "x"


def test_calls_without_a_tool_are_toolnodes_to_answer(pocket: PocketAuth) -> None:
    """A name that the model made up reaches the tool node, which says so."""
    for door in DOORS:
        script = [AIMessage("", tool_calls=[call("nope")])]
        tools = [Work().tool("look", "acme")]
        graph, _ = build(door, pocket, tools, script)
        assert "not a valid tool" in results(ask(graph, SYNC))["nope"].text


async def test_one_loop_and_many_conversations(
    server: AuthorizationServer, pocket: PocketAuth, alice: Browser
) -> None:
    """Concurrent runs of one owner share one link and one token request."""
    work = Work(ASYNC)
    tools = [work.tool("look", "acme")]
    graph, _ = build("create_agent", pocket, tools, [says(call("look", text="x"))])
    value = {"messages": [("user", "go")]}
    configs = [thread(str(n)) for n in range(5)]
    paused = await asyncio.gather(*(graph.ainvoke(value, c) for c in configs))
    assert len({the(state).url for state in paused}) == 1
    await alice.avisit(the(paused[0]).url)
    await asyncio.gather(
        *(
            graph.ainvoke(resume(state), config)
            for state, config in zip(paused, configs, strict=True)
        )
    )
    assert work.done == [("look", server.issued_access_tokens[0])] * 5
    assert server.token_requests == {"authorization_code": 1}
