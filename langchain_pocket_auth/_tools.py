"""Wrapping tools: what they need, and a subclass of their own class that brings it."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import UnionType
from typing import (
    Annotated,
    Any,
    Protocol,
    TypeVar,
    Union,
    get_args,
    get_origin,
)

from langchain_core.messages import ToolMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import ensure_config
from langchain_core.tools import BaseTool, InjectedToolArg, StructuredTool, Tool
from langchain_core.tools.base import get_all_basemodel_annotations
from pydantic import BaseModel, PrivateAttr, create_model

from ._catalog import register_id
from ._models import AuthContext, Owner, Requirement
from ._owner import inherited_owner

Inject = Mapping[str, Callable[[AuthContext], Any]]


class InjectedAuth(InjectedToolArg):
    """
    Marks a tool's parameter that receives an `AuthContext`.

    ```python
    github: Annotated[AuthContext, InjectedAuth("github", scopes=["repo"])]
    ```
    The model does not see the parameter, and a value it makes up is dropped.

    Args:
        provider: The provider's id.
        scopes: What the tool needs, in the provider's spelling.
        handler: Name of a handler; by default any of the provider's will do.
        profile: Which account of the owner.
        required: `False`: use the connection if there is one, never ask; the
            parameter is `Annotated[AuthContext | None, ...]` then.
        detail: Hand over what the provider said besides the token, too.
    """

    def __init__(
        self,
        provider: str,
        *,
        scopes: Iterable[str] = (),
        handler: str | None = None,
        profile: str = "default",
        required: bool = True,
        detail: bool = False,
    ) -> None:
        if isinstance(scopes, str):
            raise TypeError("scopes is a list of strings, not one string")
        self.requirement = Requirement(
            register_id(provider), tuple(scopes), handler, profile, required, detail
        )

    def __repr__(self) -> str:
        return f"InjectedAuth({self.requirement.provider!r})"


@dataclass(frozen=True, slots=True)
class Needs:
    """What a tool needs: by parameter, by hand, and values to inject."""

    parameters: Mapping[str, Requirement] = field(default_factory=dict)
    extra: Requirement | None = None
    inject: Inject = field(default_factory=dict)

    @property
    def requirements(self) -> tuple[Requirement, ...]:
        """All distinct requirements."""
        extra = (self.extra,) if self.extra else ()
        return tuple(dict.fromkeys([*self.parameters.values(), *extra]))


@dataclass(frozen=True, slots=True)
class Entry:
    """What a guard hands to a call that may run."""

    owner: Owner
    contexts: Mapping[Requirement, AuthContext | None]


class Guard(Protocol):
    """Lets a call in, or answers it in its stead."""

    def enter(
        self, tool: BaseTool, needs: Needs, config: RunnableConfig, call_id: str | None
    ) -> Entry | ToolMessage: ...

    async def aenter(
        self, tool: BaseTool, needs: Needs, config: RunnableConfig, call_id: str | None
    ) -> Entry | ToolMessage: ...


_granted: ContextVar[tuple[AuthContext, ...]] = ContextVar("pocket_auth", default=())
_entry: ContextVar[Entry | None] = ContextVar("pocket_entry", default=None)


def current_auth(
    provider: str | None = None, profile: str | None = None
) -> AuthContext:
    """
    Return the context of the guarded tool call that is running.

    Args:
        provider: Which one, if the tool needs several.
        profile: Which account, if the tool needs several of one provider.

    Raises:
        LookupError: None, or more than one, fits; the text lists what there is.
    """
    there = _granted.get()
    entry = _entry.get()
    fits = [
        context
        for requirement, context in (entry.contexts.items() if entry else ())
        if context is not None
        and provider in {None, requirement.provider}
        and profile in {None, requirement.profile}
    ]
    if len({id(context) for context in fits}) == 1:
        return fits[0]
    names = sorted({str(c._provider) for c in there})  # noqa: SLF001
    raise LookupError(
        f"{len(fits)} connections fit provider={provider!r}, profile={profile!r}; "
        f"this call has: {', '.join(names) or 'none: it runs outside a guarded tool'}"
    )


# ------------------------------------------------------------------ what a tool needs


def needs_of(
    tool: BaseTool, extra: Requirement | None = None, inject: Inject | None = None
) -> Needs:
    """
    Return what the annotations of *tool* say, and what is said beside them.

    Raises:
        TypeError: An annotation that the model would get to see.
    """
    parameters: dict[str, Requirement] = {}
    for name, annotation in _annotations(tool).items():
        if (requirement := _requirement(tool, name, annotation)) is not None:
            parameters[name] = requirement
    return Needs(parameters, extra, dict(inject or {}))


def is_guarded(tool: BaseTool) -> bool:
    """Whether *tool* came out of `wrap`."""
    return "__pocket_base__" in vars(type(tool))


def guarded_needs(tool: BaseTool) -> Needs:
    """Return what a guarded tool needs."""
    needs: Needs = tool._pocket_needs  # type: ignore[attr-defined]  # noqa: SLF001
    return needs


def _annotations(tool: BaseTool) -> dict[str, Any]:
    """Hints of every callable of the tool and of its schema, resolved once."""
    found: dict[str, Any] = {}
    if isinstance(tool.args_schema, type) and issubclass(tool.args_schema, BaseModel):
        found |= get_all_basemodel_annotations(tool.args_schema)
    functions = [getattr(tool, "func", None), getattr(tool, "coroutine", None)]
    if type(tool)._run not in {StructuredTool._run, Tool._run}:  # noqa: SLF001
        functions += [tool._run, tool._arun]  # noqa: SLF001
    for function in filter(None, functions):
        target = inspect.unwrap(function)
        while isinstance(target, functools.partial):
            target = target.func
        try:
            hints = typing.get_type_hints(target, include_extras=True)
        except (NameError, TypeError):  # names known to the type checker only
            hints = dict(getattr(target, "__annotations__", {}))
        hints.pop("return", None)
        found |= hints
    return found


def _requirement(tool: BaseTool, name: str, annotation: Any) -> Requirement | None:
    if isinstance(annotation, str):
        if "InjectedAuth" in annotation or "AuthContext" in annotation:
            raise TypeError(
                f"{tool.name}: the annotation of {name!r} cannot be resolved; import "
                "what it names at run time, outside TYPE_CHECKING and functions"
            )
        return None
    marks = [a for a in get_args(annotation)[1:] if _is_mark(a)]
    wanted = f"{name}: Annotated[AuthContext, InjectedAuth('provider')]"
    if get_origin(annotation) is not Annotated or not marks:
        if _mentions(annotation):
            raise TypeError(
                f"{tool.name}: the model would be shown the parameter {name!r}; "
                f"write {wanted}"
            )
        return None
    if len(marks) > 1 or isinstance(marks[0], type):
        raise TypeError(f"{tool.name}: {name!r} needs one InjectedAuth; write {wanted}")
    requirement: Requirement = marks[0].requirement
    kind = get_args(annotation)[0]
    allowed = {kind}
    if get_origin(kind) in {Union, UnionType} and not requirement.required:
        allowed = set(get_args(kind)) - {type(None)}
    if len(allowed) != 1 or not _is_context(*allowed):
        raise TypeError(
            f"{tool.name}: {name!r} is marked as InjectedAuth and is no AuthContext; "
            f"write {wanted} (AuthContext | None only with required=False)"
        )
    return requirement


def _is_mark(value: Any) -> bool:
    return isinstance(value, InjectedAuth) or value is InjectedAuth


def _is_context(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, AuthContext)


def _mentions(annotation: Any) -> bool:
    if _is_mark(annotation) or _is_context(annotation):
        return True
    return any(map(_mentions, get_args(annotation)))


# ------------------------------------------------------------------------- the wrapper


T_ = TypeVar("T_", bound=BaseTool)


def wrap_tool(tool: BaseTool, needs: Needs, guard: Guard) -> BaseTool:
    """
    Return a guarded copy: an instance of a subclass of the tool's own class.

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
    copy = tool.model_copy(update=_without_injected(tool, needs.inject))
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


def _without_injected(tool: BaseTool, inject: Inject) -> dict[str, Any]:
    schema = tool.args_schema
    if not inject:
        return {}
    if isinstance(schema, dict):
        known = set(schema.get("properties", {}))
        lean: Any = {
            **schema,
            "properties": {
                k: v for k, v in schema.get("properties", {}).items() if k not in inject
            },
            "required": [r for r in schema.get("required", ()) if r not in inject],
        }
    elif isinstance(schema, type) and issubclass(schema, BaseModel):
        known = set(schema.model_fields)
        kept = {
            name: (info.annotation, info)
            for name, info in schema.model_fields.items()
            if name not in inject
        }
        lean = create_model(
            schema.__name__,
            __config__=schema.model_config,
            __doc__=schema.__doc__,
            **kept,  # type: ignore[call-overload]
        )
    else:
        raise TypeError(f"{tool.name!r} has no schema to take parameters out of")
    if unknown := set(inject) - known:
        raise ValueError(f"{tool.name!r} has no parameter {sorted(unknown)[0]!r}")
    return {"args_schema": lean}


class _Admitted:
    """Says that this very call was let in already: from `ainvoke` to `run`."""

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


class _Inside:
    """The time in which a call's body runs with what it was let in with."""

    __slots__ = ("_entry", "_owner", "_tokens")

    def __init__(self, entry: Entry) -> None:
        self._entry = entry

    def __enter__(self) -> None:
        granted = tuple(c for c in self._entry.contexts.values() if c is not None)
        self._owner = inherited_owner(self._entry.owner)
        self._owner.__enter__()
        self._tokens = (_granted.set(granted), _entry.set(self._entry))

    def __exit__(self, *_: object) -> None:
        granted, entry = self._tokens
        _entry.reset(entry)
        _granted.reset(granted)
        self._owner.__exit__(None, None, None)


@functools.cache
def _guarded_class(base: type[BaseTool]) -> type[BaseTool]:
    """Return the guarded subclass of a tool class; one per class."""

    def with_declared(self: Any, tool_input: Any, entry: Entry) -> Any:
        if not self._pocket_declared or not isinstance(tool_input, dict):
            return tool_input
        values = _values(self._pocket_needs, entry)
        # Overrides whatever a model made up under that name.
        return {**tool_input, **{k: values[k] for k in self._pocket_declared}}

    def run(self: Any, tool_input: Any, *args: Any, **kwargs: Any) -> Any:
        entry = _take_admission(self)
        if entry is None:
            config = kwargs.get("config") or ensure_config()
            entry = self._pocket_guard.enter(
                self, self._pocket_needs, config, kwargs.get("tool_call_id")
            )
        if isinstance(entry, ToolMessage):
            return entry
        with _Inside(entry):
            return base.run(
                self, with_declared(self, tool_input, entry), *args, **kwargs
            )

    async def arun(self: Any, tool_input: Any, *args: Any, **kwargs: Any) -> Any:
        entry = _take_admission(self)
        if entry is None:
            config = kwargs.get("config") or ensure_config()
            entry = await self._pocket_guard.aenter(
                self, self._pocket_needs, config, kwargs.get("tool_call_id")
            )
        if isinstance(entry, ToolMessage):
            return entry
        with _Inside(entry):
            return await base.arun(
                self, with_declared(self, tool_input, entry), *args, **kwargs
            )

    def _to_args_and_kwargs(
        self: Any, tool_input: Any, tool_call_id: str | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # LangChain's own seam between validation and call: what is in no schema
        # is added here. tests/test_langgraph_seams.py names it.
        if isinstance(tool_input, dict):
            hidden = self._pocket_needs.inject.keys() | (
                self._pocket_needs.parameters.keys() - self._pocket_declared
            )
            tool_input = {k: v for k, v in tool_input.items() if k not in hidden}
        args, kwargs = base._to_args_and_kwargs(self, tool_input, tool_call_id)
        entry = _entry.get()
        if entry is not None:
            needs: Needs = self._pocket_needs
            values = _values(needs, entry)
            kwargs = {**kwargs, **values}
            if needs.extra is not None and needs.inject:
                context = entry.contexts[needs.extra]
                if context is not None:
                    kwargs |= {k: make(context) for k, make in needs.inject.items()}
        return args, kwargs

    members: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__annotations__": {},
        "__pocket_base__": base,
        "_pocket_guard": PrivateAttr(default=None),
        "_pocket_needs": PrivateAttr(default=None),
        "_pocket_declared": PrivateAttr(default=frozenset()),
        "run": run,
        "arun": arun,
        "_to_args_and_kwargs": _to_args_and_kwargs,
        "_run": _scrubbed(base._run),  # noqa: SLF001
        "_arun": _ascrubbed(base._arun),  # noqa: SLF001
    }
    if issubclass(base, (StructuredTool, Tool)):
        # Without a coroutine theirs goes to a thread: be let in on the loop first.
        async def ainvoke(
            self: Any, input: Any, config: RunnableConfig | None = None, **kwargs: Any
        ) -> Any:
            if self.coroutine:
                return await base.ainvoke(self, input, config, **kwargs)
            is_call = isinstance(input, dict) and input.get("type") == "tool_call"
            entry = await self._pocket_guard.aenter(
                self,
                self._pocket_needs,
                ensure_config(config),
                input["id"] if is_call else None,
            )
            token = _admitted.set(_Admitted(self, entry))
            try:
                return await base.ainvoke(self, input, config, **kwargs)
            finally:
                _admitted.reset(token)

        members["ainvoke"] = ainvoke
    return type(base.__name__, (base,), members)


def _values(needs: Needs, entry: Entry) -> dict[str, AuthContext | None]:
    return {name: entry.contexts[r] for name, r in needs.parameters.items()}


# ---------------------------------------------------------------- secrets on the way out


def _scrubbed(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return _clean(method(*args, **kwargs))
        except BaseException as error:
            _clean_error(error)
            raise

    return run


def _ascrubbed(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    async def arun(*args: Any, **kwargs: Any) -> Any:
        try:
            return _clean(await method(*args, **kwargs))
        except BaseException as error:
            _clean_error(error)
            raise

    return arun


def _clean(value: Any) -> Any:
    """Take the live tokens of this call out of a text, also inside lists and dicts."""
    if isinstance(value, str):
        for context in _granted.get():
            if context.access_token in value:
                value = value.replace(context.access_token, "***")
        return value
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple(map(_clean, value))
    if type(value) is list:
        return [_clean(part) for part in value]
    if type(value) is dict:
        return {k: _clean(part) for k, part in value.items()}
    return value


def _clean_error(error: BaseException) -> None:
    """Clean the exception and its chain, as far as their arguments are texts."""
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        current = todo.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        cleaned = _clean(current.args)
        if cleaned != current.args:
            current.args = cleaned
        todo += [current.__cause__, current.__context__]
