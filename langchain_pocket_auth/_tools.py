"""What tools need: their annotations, and what a call is let in with."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import UnionType
from typing import (
    Annotated,
    Any,
    Protocol,
    Union,
    get_args,
    get_origin,
)

from langchain_core.messages import ToolMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import BaseTool, InjectedToolArg, StructuredTool, Tool
from langchain_core.tools.base import get_all_basemodel_annotations
from pydantic import BaseModel

from ._models import AuthContext, Owner, Requirement
from ._owner import OwnerSource
from ._providers import register_id
from ._task import GuardedCall, TaskRun, just_resumed, place_of

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


class Holder(Protocol):
    """Who keeps claims on tasks."""

    async def claim(self, task: str, name: str, holder: str, answers: int) -> None: ...
    async def release(self, task: str, name: str, holder: str) -> None: ...
    def run_sync(self, work: Coroutine[Any, Any, None]) -> None: ...
    async def run(self, work: Coroutine[Any, Any, None]) -> None: ...


@dataclass(frozen=True, slots=True)
class Hold:
    """
    The right to run a tool in a resumed run, which no other run has meanwhile.

    Given back when the body raises, a question of its own included, so that the run
    which brings the answer may go on. After a body that ended well it is kept, if it
    is the task's last: its result is on its way into the checkpoint.
    """

    desk: Holder
    place: str
    holder: str
    answers: int
    last: bool

    @classmethod
    def of(
        cls,
        desk: Holder,
        config: Mapping[str, Any],
        call_id: str | None,
        *,
        ordinal: int = 0,
        last: bool = True,
    ) -> Hold | None:
        """
        Return the right that a call needs; `None` where nobody could compete.

        Args:
            desk: Who keeps it.
            config: The call's.
            call_id: The tool call's id.
            ordinal: Its number among the guarded calls of its task.
            last: Whether nothing of the task follows it.
        """
        if not just_resumed(config):
            return None
        run = TaskRun.of(config)
        place = place_of(config, call_id, ordinal)
        return cls(desk, place, run.holder, run.answers, last)

    def _claim(self) -> Coroutine[Any, Any, None]:
        return self.desk.claim(self.place, "run", self.holder, self.answers)

    def _release(self) -> Coroutine[Any, Any, None]:
        return self.desk.release(self.place, "run", self.holder)

    def __enter__(self) -> None:
        self.desk.run_sync(self._claim())

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error or not self.last:
            self.desk.run_sync(self._release())

    async def __aenter__(self) -> None:
        await self.desk.run(self._claim())

    async def __aexit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error or not self.last:
            await self.desk.run(self._release())


@dataclass(frozen=True, slots=True)
class Entry:
    """What a guard hands to a call that may run."""

    owners: OwnerSource
    owner: Owner
    contexts: Mapping[Requirement, AuthContext | None]
    call: GuardedCall | None = None
    hold: Hold | None = None

    def leave(self) -> None:
        """End the call."""
        if self.call is not None:
            self.call.leave()


class Guard(Protocol):
    """Lets a call in, or answers it in its stead."""

    def enter(
        self, tool: BaseTool, needs: Needs, config: RunnableConfig, call_id: str | None
    ) -> Entry | ToolMessage: ...

    async def aenter(
        self, tool: BaseTool, needs: Needs, config: RunnableConfig, call_id: str | None
    ) -> Entry | ToolMessage: ...


_entry: ContextVar[Entry | None] = ContextVar("pocket_entry", default=None)


@contextmanager
def entered(entry: Entry) -> Iterator[None]:
    """Run the body of a call that was let in with *entry*."""
    token = _entry.set(entry)
    try:
        with entry.call.body() if entry.call else nullcontext():
            yield
    finally:
        _entry.reset(token)


def current_entry() -> Entry | None:
    """Return what the guarded call that is running was let in with."""
    return _entry.get()


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
    entry = _entry.get()
    there = {
        requirement: context
        for requirement, context in (entry.contexts.items() if entry else ())
        if context is not None
    }
    fits = [
        context
        for requirement, context in there.items()
        if provider in {None, requirement.provider}
        and profile in {None, requirement.profile}
    ]
    # One connection may stand there twice, for requirements of different scopes.
    if len({context.access_token for context in fits}) == 1:
        return max(fits, key=lambda context: len(context.scopes or ()))
    names = sorted({f"{r.provider} (profile {r.profile!r})" for r in there})
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
        except Exception:  # noqa: BLE001 - names known to the type checker only
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
