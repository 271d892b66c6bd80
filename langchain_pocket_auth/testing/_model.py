"""A chat model that says what a script says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.runnables import Runnable
from pydantic import Field


class ScriptedModel(BaseChatModel):
    """
    Answers the n-th time with the n-th message of `script`, then with "done".

    Which time it is, is read off the conversation: a new process with the same
    script goes on where the old one stopped.
    """

    script: list[AIMessage] = Field(default_factory=list)
    calls: int = 0
    """How often it was asked."""
    bound: list[Any] = Field(default_factory=list)
    """The tools it was last told about."""

    @property
    def _llm_type(self) -> str:
        return "scripted"

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> Runnable[Any, Any]:
        """Remember the tools."""
        del kwargs
        self.bound = list(tools)
        return self

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        del stop, run_manager, kwargs
        self.calls += 1
        said = sum(message.type == "ai" for message in messages)
        answer = self.script[said] if said < len(self.script) else AIMessage("done")
        # A copy: the graph gives messages ids, and a script may be used twice.
        copy = answer.model_copy(deep=True)
        return ChatResult(generations=[ChatGeneration(message=copy)])
