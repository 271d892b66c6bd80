"""What apps are told of connections, and how they wait for one."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from conftest import call, says
from graphs import DOORS, GATES, MODES, SYNC, Work, ask, build, results, run, thread
from support import BOUND_S, Clock, asks, connect, link, on, token, until

from langchain_pocket_auth import (
    AuthorizationRefused,
    AuthorizationRequired,
    ConfigurationError,
    Event,
    Owner,
    OwnerUnknown,
    PocketAuth,
    ScopeWithheld,
    pending_authorizations,
    resume,
)
from langchain_pocket_auth.testing import AuthorizationServer, Browser, assert_no_leak

Make = Callable[..., PocketAuth]


class Heard(list[Event]):
    """The events so far."""

    async def wait(self, *types: str) -> None:
        """Return when these were told, in this order, and nothing else."""

        async def told() -> bool:
            return len(self) >= len(types)

        await until(told)
        assert [event.type for event in self] == list(types)


@pytest.fixture
def heard(pocket: PocketAuth) -> Heard:
    """What the pocket tells."""
    events = Heard()
    pocket.on_event(events.append)
    return events


# ---------------------------------------------------------------------- what is told


async def test_life_of_a_connection_is_told(
    server: AuthorizationServer,
    pocket: PocketAuth,
    alice: Browser,
    heard: Heard,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Connected, refreshed, not renewable, deleted, revoked: once, with its place."""
    clock = Clock(monkeypatch)
    await connect(pocket, alice, "read")
    await heard.wait("connected")
    clock.forward(server.access_token_ttl_s)
    await token(pocket, "read")
    await heard.wait("connected", "refreshed")
    server.fault("invalid_grant", grant_type="refresh_token")
    clock.forward(server.access_token_ttl_s)
    with pytest.raises(AuthorizationRequired):
        await token(pocket, "read")
    await heard.wait("connected", "refreshed", "needs_reconnect")
    await pocket.delete_session("acme")
    ended = ("revoked", "given_back")
    await heard.wait("connected", "refreshed", "needs_reconnect", *ended)
    assert {(e.provider, e.handler, e.profile) for e in heard} == {
        ("acme", "acme-oauth2", "default")
    }
    assert {e.owner for e in heard} == {Owner("thread", "default")}
    assert [e.scopes for e in heard] == [("read",)] * 5
    secrets = [*server.issued_access_tokens, *server.issued_refresh_tokens]
    assert_no_leak(secrets, *map(repr, heard))


async def test_refusal_at_the_provider_is_told(
    pocket: PocketAuth, alice: Browser, heard: Heard
) -> None:
    """Who says no is heard, with what was asked for."""
    await alice.avisit(await link(pocket, "read"), approve=False)
    await heard.wait("declined")
    assert heard[0].scopes == ("read",)


def test_refusal_in_the_chat_is_told_once(make_pocket: Make, alice: Browser) -> None:
    """However often the run looks at the answer again."""
    pocket, heard, work = make_pocket(), Heard(), Work()
    pocket.on_event(heard.append)
    tools = [work.tool("look", "acme"), work.tool("post", "zeta")]
    script = [says(call("look", text="x"), call("post", text="x"))]
    graph, _ = build("create_agent", pocket, tools, script)
    paused = ask(graph, SYNC)
    paused = run(graph, resume(paused, decline=["acme"]), SYNC)
    paused = run(graph, None, SYNC)
    alice.visit(pending_authorizations(paused)[0].url)
    done = run(graph, resume(paused), SYNC)
    assert results(done)["look"].status == "error"
    asyncio.run(heard.wait("declined", "connected"))
    assert heard[0].thread_ids == ("1",)


async def test_link_that_ran_out_is_told(make_pocket: Make) -> None:
    """Without anybody looking, in the process that made the link."""
    pocket, heard = make_pocket(future_ttl=timedelta(seconds=0.2)), Heard()
    pocket.on_event(heard.append)
    await link(pocket, "read")
    await heard.wait("expired")
    assert heard[0].scopes == ("read",)


async def test_link_that_was_used_does_not_run_out(
    make_pocket: Make, alice: Browser
) -> None:
    """A success in time is the end of it."""
    pocket, heard = make_pocket(future_ttl=timedelta(seconds=0.5)), Heard()
    pocket.on_event(heard.append)
    await connect(pocket, alice, "read")
    await asyncio.sleep(0.6)  # the link's life
    await heard.wait("connected")


# ------------------------------------------------------------------ runs that must not ask


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("door", DOORS)
def test_one_run_can_be_told_not_to_ask(
    pocket: PocketAuth, alice: Browser, heard: Heard, door: str, mode: str
) -> None:
    """A nightly job gets an error at once, the app an event; a chat still pauses."""
    work = Work(mode)
    tools = [work.tool("look", "acme", "read")]
    graph, model = build(door, pocket, tools, [says(call("look", text="x"))])
    done = ask(graph, mode, thread("job", pocket_auth_interactive=False))
    assert "__interrupt__" not in done
    answer = results(done)["look"]
    assert (answer.status, model.calls) == ("error", 2)
    assert answer.artifact == {
        "type": "pocket_auth",
        "errors": ["AuthorizationRequired"],
    }
    asyncio.run(heard.wait("required"))
    [event] = heard
    assert (event.provider, event.scopes, event.thread_ids) == (
        "acme",
        ("read",),
        ("job",),
    )
    assert pending_authorizations(ask(graph, mode, thread("chat")))


def test_one_run_can_be_told_to_ask(make_pocket: Make) -> None:
    """The run's word goes before the pocket's."""
    pocket, work = make_pocket(interactive=False), Work()
    script = [says(call("look", text="x"))]
    graph, _ = build("create_agent", pocket, [work.tool("look", "acme")], script)
    assert not pending_authorizations(ask(graph, SYNC))
    config = thread("2", pocket_auth_interactive=True)
    assert pending_authorizations(ask(graph, SYNC, config))


@pytest.mark.parametrize("value", ["false", 0, 1, []])
def test_word_that_is_no_truth_value_is_refused(pocket: PocketAuth, value: Any) -> None:
    """The text "false" must not mean yes."""
    script = [says(call("look", text="x"))]
    graph, _ = build("create_agent", pocket, [Work().tool("look", "acme")], script)
    with pytest.raises(ConfigurationError, match="True or False"):
        ask(graph, SYNC, thread(pocket_auth_interactive=value))


# ---------------------------------------------------------------------- who is told


async def test_coroutine_is_called_on_its_loop_and_a_function_in_a_thread(
    pocket: PocketAuth, alice: Browser
) -> None:
    """In the order of what happened, and never on ours."""
    threads: list[tuple[str, threading.Thread]] = []
    told = asyncio.Event()

    async def here(event: Event) -> None:
        threads.append(("coroutine", threading.current_thread()))
        told.set()

    def anywhere(event: Event) -> None:
        threads.append(("function", threading.current_thread()))

    pocket.on_event(here)
    pocket.on_event(anywhere)
    await connect(pocket, alice)
    await asyncio.wait_for(told.wait(), BOUND_S)

    async def both() -> bool:
        return len(threads) == 2

    await until(both)
    where = dict(threads)
    assert where["coroutine"] is threading.current_thread()
    assert where["function"].name.startswith("pocket-auth-events")


async def test_failing_subscriber_is_in_nobodys_way(
    pocket: PocketAuth,
    alice: Browser,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The consent counts, the others hear of it, and the log has no text of it."""
    heard = Heard()

    def fails(event: Event) -> None:
        raise ValueError("secret-text")

    pocket.on_event(fails)
    pocket.on_event(heard.append)
    with caplog.at_level(logging.DEBUG):
        await connect(pocket, alice)
        await heard.wait("connected")
    assert "ValueError" in caplog.text
    assert "secret-text" not in caplog.text


async def test_who_unsubscribed_is_not_told(
    pocket: PocketAuth, alice: Browser, heard: Heard
) -> None:
    """More than once does no harm."""
    other = Heard()
    stop = pocket.on_event(other.append)
    stop()
    stop()
    await connect(pocket, alice)
    await heard.wait("connected")
    assert other == []


def test_subscriber_whose_loop_has_ended_is_still_told(
    pocket: PocketAuth, alice: Browser
) -> None:
    """On a loop of its own then."""
    told = threading.Event()

    async def tell(event: Event) -> None:
        told.set()

    async def subscribe() -> str:
        pocket.on_event(tell)
        return await link(pocket)

    alice.visit(asyncio.run(subscribe()))
    assert told.wait(BOUND_S)


# ------------------------------------------------------------------ waiting for one


async def test_script_waits_until_somebody_has_connected(
    pocket: PocketAuth, alice: Browser
) -> None:
    """Whoever asks, and before or after the waiting began."""
    early = asyncio.create_task(pocket.wait_connected("acme", scopes=["read"]))
    await asyncio.sleep(0.05)
    await alice.avisit(await link(pocket, "read"))
    context = await asyncio.wait_for(early, BOUND_S)
    assert context.scopes == ["read"]
    again = await pocket.wait_connected("acme", scopes=["read"], timeout=0)
    assert again.access_token == context.access_token


async def test_waiting_ends_with_a_reason(
    server: AuthorizationServer, pocket: PocketAuth, alice: Browser
) -> None:
    """Nobody came, or said no, or agreed to less."""
    with pytest.raises(AuthorizationRequired, match="Acme") as caught:
        await pocket.wait_connected("acme", timeout=0.05)
    assert caught.value.url is None
    url = await link(pocket, "read")
    with pytest.raises(AuthorizationRequired) as caught:
        await pocket.wait_connected("acme", scopes=["read"], timeout=0.05)
    assert caught.value.url == url

    waiting = asyncio.create_task(pocket.wait_connected("acme", scopes=["read"]))
    await asyncio.sleep(0.05)
    await alice.avisit(url, approve=False)
    with pytest.raises(AuthorizationRefused):
        await asyncio.wait_for(waiting, BOUND_S)

    server.withhold = {"write"}
    url = await link(pocket, "read", "write")
    waiting = asyncio.create_task(
        pocket.wait_connected("acme", scopes=["read", "write"])
    )
    await asyncio.sleep(0.05)
    await alice.avisit(url)
    with pytest.raises(ScopeWithheld, match="write"):
        await asyncio.wait_for(waiting, BOUND_S)


async def test_waiting_is_for_the_pockets_own_user(
    make_pocket: Make, alice: Browser
) -> None:
    """The fixed owner by default; where a function decides, it has to be said."""
    pocket = make_pocket(owner="ann")
    request = asks(pocket)
    url = await pocket.prepare(request, owner="ann", **on())
    await alice.avisit(url or "")
    assert await pocket.wait_connected("acme", timeout=0)
    with pytest.raises(AuthorizationRequired):
        await pocket.wait_connected("acme", owner="bob", timeout=0)
    with pytest.raises(OwnerUnknown, match="owner="):
        await make_pocket(owner=lambda _: "ann").wait_connected("acme", timeout=0)


# -------------------------------------------------------- a message typed in a pause


@pytest.mark.parametrize("mode", MODES)
def test_message_typed_during_a_pause_does_not_break_the_conversation(
    pocket: PocketAuth, alice: Browser, mode: str
) -> None:
    """The waiting call gets a result, right behind it, and the model goes on."""
    work = Work(mode)
    tools = [work.tool("look", "acme"), work.tool("post", "zeta")]
    script = [
        says(call("look", text="x"), call("post", text="x")),
        says(call("look", "second", text="x")),
    ]
    graph, model = build("create_agent", pocket, tools, script)
    first = ask(graph, mode)
    typed = {"messages": [("user", "done, I connected it")]}
    alice.visit(pending_authorizations(first)[0].url)
    done = run(graph, typed, mode)
    kinds = [(m.type, getattr(m, "tool_call_id", None)) for m in done["messages"]]
    assert kinds == [
        ("human", None),
        ("ai", None),
        ("tool", "call-look"),
        ("tool", "call-post"),
        ("human", None),
        ("ai", None),
        ("tool", "second"),
        ("ai", None),
    ]
    assert [m.status for m in done["messages"] if m.type == "tool"] == [
        "error",
        "error",
        "success",
    ]
    assert (work.names, model.calls) == (["look"], 3)
    # A late resume of what was given up changes nothing.
    late = run(graph, resume(first), mode)
    assert [m.id for m in late["messages"]] == [m.id for m in done["messages"]]
    assert work.names == ["look"]


@pytest.mark.parametrize("door", GATES)
def test_conversation_without_open_calls_stays_as_it_is(
    pocket: PocketAuth, alice: Browser, door: str
) -> None:
    """No message is changed, removed or written again."""
    from langchain_pocket_auth import answer_open_calls

    work = Work()
    script = [says(call("look", text="x"))]
    graph, _ = build(door, pocket, [work.tool("look", "acme")], script)
    paused = ask(graph, SYNC)
    assert answer_open_calls(paused["messages"]) == paused["messages"]
    alice.visit(pending_authorizations(paused)[0].url)
    done = run(graph, resume(paused), SYNC)
    again = ask(graph, SYNC)
    assert again["messages"][: len(done["messages"])] == done["messages"]


def test_helper_answers_each_open_call_once() -> None:
    """For hand-built graphs: the same result however often it is called."""
    from langchain_core.messages import AIMessage, HumanMessage, ToolMessage

    from langchain_pocket_auth import answer_open_calls

    messages = [
        HumanMessage("go"),
        AIMessage("", id="1", tool_calls=[call("a"), call("b")]),
        ToolMessage("done", tool_call_id="call-a"),
        HumanMessage("well?"),
        AIMessage("", id="2", tool_calls=[call("c")]),
    ]
    once = answer_open_calls(messages)
    assert [m.type for m in once] == ["human", "ai", "tool", "tool", "human", "ai"]
    assert {getattr(m, "tool_call_id", None) for m in once[2:4]} == {
        "call-a",
        "call-b",
    }
    assert answer_open_calls(once) == once
    assert once == answer_open_calls(messages)
    assert len(messages) == 5
