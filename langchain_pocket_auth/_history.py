"""Conversations that went on while a tool call was waiting."""

from __future__ import annotations

from collections.abc import Sequence

from langchain_core.messages import (
    AIMessage,
    AnyMessage,
    HumanMessage,
    ToolCall,
    ToolMessage,
)

_TEXT = (
    "No result: the user wrote again while this call was waiting, so it was given up. "
    "Call the tool again if it is still wanted."
)


def answer_open_calls(messages: Sequence[AnyMessage]) -> list[AnyMessage]:
    """
    Answer tool calls that were given up, because the user wrote something instead.

    A person may type during a pause; the conversation then has tool calls without a
    result, which models refuse. Each such call of a message that a newer
    `HumanMessage` follows gets an error result, right behind its message.
    `pocket.middleware()` does so by itself; in a hand-built graph:
    `model.invoke(answer_open_calls(state["messages"]))`.

    Returns:
        A new list; with the same messages, where none is open. Calling it again
        changes nothing.
    """
    complete: list[AnyMessage] = []
    # From the end, as only what stands behind a message answers its calls.
    answered: set[str] = set()
    given_up = False
    for message in reversed(messages):
        given_up = given_up or isinstance(message, HumanMessage)
        if isinstance(message, ToolMessage):
            answered.add(message.tool_call_id)
        if isinstance(message, AIMessage):
            open_calls = [c for c in message.tool_calls if c["id"] not in answered]
            if given_up:
                complete += [_given_up(message, call) for call in reversed(open_calls)]
            answered.clear()
        complete.append(message)
    complete.reverse()
    return complete


def _given_up(message: AIMessage, call: ToolCall) -> ToolMessage:
    return ToolMessage(
        _TEXT,
        # The same each time, so that a checkpoint keeps one.
        id=f"{message.id or 'message'}-{call['id']}",
        name=call["name"],
        tool_call_id=call["id"] or "",
        status="error",
    )
