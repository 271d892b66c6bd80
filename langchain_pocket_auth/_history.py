"""Conversations that went on while a tool call was waiting."""

from __future__ import annotations

from collections.abc import Sequence

from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, ToolMessage

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
    answered = {m.tool_call_id for m in messages if isinstance(m, ToolMessage)}
    last_human = max(
        (n for n, m in enumerate(messages) if isinstance(m, HumanMessage)), default=-1
    )
    complete: list[AnyMessage] = []
    for n, message in enumerate(messages):
        complete.append(message)
        if n < last_human and isinstance(message, AIMessage):
            complete += [
                ToolMessage(
                    _TEXT,
                    # The same each time, so that a checkpoint keeps one.
                    id=f"{message.id or 'message'}-{call['id']}",
                    name=call["name"],
                    tool_call_id=call["id"] or "",
                    status="error",
                )
                for call in message.tool_calls
                if call["id"] not in answered
            ]
    return complete
