"""Guarded tools: instances of a subclass of the tool's own class."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Annotated, Any

from langchain_core.messages import ToolMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import ensure_config
from langchain_core.tools import BaseTool, InjectedToolArg, StructuredTool, Tool
from langchain_core.tools.base import get_all_basemodel_annotations
from pydantic import BaseModel, PrivateAttr, create_model

from ._models import AuthContext
from ._scrub import ascrubbed, scrubbed
from ._tools import Entry, Guard, Inject, Needs, current_entry, entered, is_guarded


def wrap_tool(tool: BaseTool, needs: Needs, guard: Guard) -> BaseTool:
    """
    Return a guarded copy.

    Everything that describes the tool stays as it is, but for the parameters that
    `inject` fills, which the model does not see any more.

    Raises:
        ValueError: The tool is guarded already, or there is nothing to guard.
    """
    if is_guarded(tool):
        raise ValueError(f"{tool.name!r} is wrapped already")
    if not needs.requirements:
        raise ValueError(
            f"{tool.name!r} needs no authorization: annotate a parameter with "
            "InjectedAuth, or pass provider="
        )
    copy = tool.model_copy(update=_hidden(tool, needs.inject))
    declared: set[str] = set()
    if isinstance(copy.args_schema, type):
        declared = set(get_all_basemodel_annotations(copy.args_schema))
    object.__setattr__(copy, "__class__", _guarded_class(type(tool)))
    private = {
        **(copy.__pydantic_private__ or {}),
        "_pocket_guard": guard,
        "_pocket_needs": needs,
        "_pocket_declared": frozenset(needs.parameters) & declared,
    }
    object.__setattr__(copy, "__pydantic_private__", private)
    return copy


def _hidden(tool: BaseTool, inject: Inject) -> dict[str, Any]:
    """Return the schema without the parameters that we fill."""
    schema, lean = tool.args_schema, None
    if not inject:
        return {}
    if isinstance(schema, dict):
        known = set(schema.get("properties", {}))
        left = {
            k: v for k, v in schema.get("properties", {}).items() if k not in inject
        }
        required = [r for r in schema.get("required", ()) if r not in inject]
        lean = {**schema, "properties": left, "required": required}
    elif isinstance(schema, type) and issubclass(schema, BaseModel):
        known = set(schema.model_fields)
        hidden = Annotated[Any, InjectedToolArg]
        # A subclass, so that validators and settings of the schema stay.
        lean = create_model(
            schema.__name__,
            __base__=schema,
            __doc__=schema.__doc__,
            **dict.fromkeys(inject, (hidden, None)),  # type: ignore[call-overload]
        )
    else:
        raise TypeError(f"{tool.name!r} has no schema to take parameters out of")
    if unknown := set(inject) - known:
        raise ValueError(f"{tool.name!r} has no parameter {min(unknown)!r}")
    return {"args_schema": lean}


# ------------------------------------------------------------------------- the class

if TYPE_CHECKING:
    _Base = BaseTool
else:
    _Base = object  # its fields would hide those of the tool's own class


class _Guarded(_Base):
    """What every guarded tool does; stands before the tool's own class."""

    _pocket_guard: Guard
    _pocket_needs: Needs
    _pocket_declared: frozenset[str]

    def run(self, tool_input: Any, *args: Any, **kwargs: Any) -> Any:
        entry = _take_admission(self)
        if entry is None:
            config = kwargs.get("config") or ensure_config()
            call_id = kwargs.get("tool_call_id")
            entry = self._pocket_guard.enter(self, self._pocket_needs, config, call_id)
        if isinstance(entry, ToolMessage):
            return entry
        with _inside(entry):
            tool_input = self._with_declared(tool_input, entry)
            if entry.hold is None:
                return super().run(tool_input, *args, **kwargs)
            with entry.hold:
                return super().run(tool_input, *args, **kwargs)

    async def arun(self, tool_input: Any, *args: Any, **kwargs: Any) -> Any:
        entry = _take_admission(self)
        if entry is None:
            config = kwargs.get("config") or ensure_config()
            call_id = kwargs.get("tool_call_id")
            entry = await self._pocket_guard.aenter(
                self, self._pocket_needs, config, call_id
            )
        if isinstance(entry, ToolMessage):
            return entry
        with _inside(entry):
            tool_input = self._with_declared(tool_input, entry)
            if entry.hold is None:
                return await super().arun(tool_input, *args, **kwargs)
            async with entry.hold:
                return await super().arun(tool_input, *args, **kwargs)

    def _with_declared(self, tool_input: Any, entry: Entry) -> Any:
        """Fill what the schema declares; what a model made up there is dropped."""
        if not self._pocket_declared or not isinstance(tool_input, dict):
            return tool_input
        values = _values(self._pocket_needs, entry)
        return {**tool_input, **{k: values[k] for k in self._pocket_declared}}

    def _to_args_and_kwargs(
        self, tool_input: Any, tool_call_id: str | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # LangChain's own seam between validation and call: what is in no schema
        # is added here. tests/test_langgraph_seams.py names it.
        needs = self._pocket_needs
        if isinstance(tool_input, dict):
            hidden = {*needs.inject, *needs.parameters} - self._pocket_declared
            tool_input = {k: v for k, v in tool_input.items() if k not in hidden}
        args, kwargs = super()._to_args_and_kwargs(tool_input, tool_call_id)
        entry = current_entry()
        if entry is not None:
            kwargs = {**kwargs, **_values(needs, entry), **_injected(needs, entry)}
        return args, kwargs


class _GuardedFunction(_Guarded):
    """For tools made of a function: without a coroutine theirs goes to a thread."""

    async def ainvoke(
        self,
        input: Any,  # noqa: A002 - LangChain's name
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> Any:
        if getattr(self, "coroutine", None):
            return await super().ainvoke(input, config, **kwargs)
        # Be let in here, on the loop, and not in the thread.
        is_call = isinstance(input, dict) and input.get("type") == "tool_call"
        entry = await self._pocket_guard.aenter(
            self,
            self._pocket_needs,
            ensure_config(config),
            input["id"] if is_call else None,
        )
        token = _admitted.set(_Admitted(self, entry))
        try:
            return await super().ainvoke(input, config, **kwargs)
        finally:
            _admitted.reset(token)
            if isinstance(entry, Entry):
                entry.leave()


@functools.cache
def _guarded_class(base: type[BaseTool]) -> type[BaseTool]:
    """Return the guarded subclass of a tool class; one per class."""
    made_of_function = issubclass(base, (StructuredTool, Tool))
    mixin = _GuardedFunction if made_of_function else _Guarded
    members: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__annotations__": {},
        "__pocket_base__": base,
        "_pocket_guard": PrivateAttr(default=None),
        "_pocket_needs": PrivateAttr(default=None),
        "_pocket_declared": PrivateAttr(default=frozenset()),
        # LangChain looks at the signatures of these two.
        "_run": scrubbed(base._run, _tokens),  # noqa: SLF001
        "_arun": ascrubbed(base._arun, _tokens),  # noqa: SLF001
    }
    return type(base.__name__, (mixin, base), members)


@contextmanager
def _inside(entry: Entry) -> Iterator[None]:
    """Run a body with what its call was let in with."""
    try:
        with entry.owners.handed_down(entry.owner), entered(entry):
            yield
    finally:
        entry.leave()


def _tokens() -> tuple[str, ...]:
    entry = current_entry()
    found = [c._masked_texts for c in entry.contexts.values() if c] if entry else []  # noqa: SLF001
    if len(found) == 1:  # most often, and on the way of every call
        return found[0]
    return tuple(sorted({t for texts in found for t in texts}, key=len, reverse=True))


def _values(needs: Needs, entry: Entry) -> dict[str, AuthContext | None]:
    return {name: entry.contexts[r] for name, r in needs.parameters.items()}


def _injected(needs: Needs, entry: Entry) -> dict[str, Any]:
    context = entry.contexts[needs.extra] if needs.extra and needs.inject else None
    if context is None:
        return {}
    return {name: make(context) for name, make in needs.inject.items()}


# ----------------------------------------------------- from `ainvoke` into the thread


class _Admitted:
    """Says that this very call was let in already."""

    __slots__ = ("entry", "tool")

    def __init__(self, tool: BaseTool, entry: Entry | ToolMessage) -> None:
        self.tool: BaseTool | None = tool
        self.entry = entry


_admitted: ContextVar[_Admitted | None] = ContextVar("pocket_admitted", default=None)


def _take_admission(tool: BaseTool) -> Entry | ToolMessage | None:
    admitted = _admitted.get()
    if admitted is None or admitted.tool is not tool:
        return None
    admitted.tool = None
    return admitted.entry
