"""Taking live tokens out of what a tool's body returns or raises."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, get_type_hints
from urllib.parse import quote, quote_plus

from pydantic import BaseModel

from ._models import Confidential

MASK = "***"
_DEPTH = 20  # containers nested deeper, or in themselves, are left as they are
_PLAIN = (int, float, complex, type(None))


MIN_LINE = 16  # shorter lines of a key are no secret by themselves


def spellings(secrets: Iterable[str]) -> tuple[str, ...]:
    """Return secrets as they are, and as URLs, JSON and Python spell them."""
    found: set[str] = set()
    for text in secrets:
        lines = text.split("\n")
        keys = [x for x in lines if len(x) >= MIN_LINE and not x.startswith("-----")]
        for one in {text, *(keys if len(lines) > 1 else ())}:
            found |= {
                one,
                quote(one, safe="", errors="replace"),
                quote(one, errors="replace"),
                quote_plus(one, errors="replace"),
                json.dumps(one)[1:-1],
                json.dumps(one, ensure_ascii=False)[1:-1],
                repr(one)[1:-1],
            }
    return tuple(sorted(found - {""}, key=len, reverse=True))


def scrubbed(
    method: Callable[..., Any], tokens: Callable[[], tuple[str, ...]]
) -> Callable[..., Any]:
    """Return *method* with *tokens* masked in its results and exceptions."""

    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return clean(method(*args, **kwargs), tokens())
        except BaseException as error:
            if (other := clean_error(error, tokens())) is error:
                raise
        raise other  # out here, so that it does not keep the first as its context

    return _described(run, method)


def ascrubbed(
    method: Callable[..., Any], tokens: Callable[[], tuple[str, ...]]
) -> Callable[..., Any]:
    """Return asynchronous *method* with *tokens* masked as by `scrubbed`."""

    @functools.wraps(method)
    async def arun(*args: Any, **kwargs: Any) -> Any:
        try:
            return clean(await method(*args, **kwargs), tokens())
        except BaseException as error:
            if (other := clean_error(error, tokens())) is error:
                raise
        raise other

    return _described(arun, method)


def _described(
    run: Callable[..., Any], method: Callable[..., Any]
) -> Callable[..., Any]:
    # LangChain asks for both on every call; annotations that are strings would be
    # compiled each time.
    with suppress(NameError, TypeError):
        run.__annotations__ = get_type_hints(method, include_extras=True)
    run.__signature__ = inspect.signature(method)  # type: ignore[attr-defined]
    return run


def clean(value: Any, tokens: tuple[str, ...], depth: int = _DEPTH) -> Any:
    """Return *value*, or a copy without the tokens; in texts and containers of them."""
    if isinstance(value, str):
        return _clean_text(value, tokens)
    if isinstance(value, (*_PLAIN, Confidential)) or not depth:
        return value
    parts = _parts(value)
    if parts is None:
        return _clean_other(value, tokens)
    if type(value) is dict and any(
        isinstance(name, str) and _clean_text(name, tokens) is not name
        for name in value
    ):
        parts = value = {clean(name, tokens, 1): part for name, part in value.items()}
    cleaned = {name: clean(part, tokens, depth - 1) for name, part in parts.items()}
    changed = {name: v for name, v in cleaned.items() if v is not parts[name]}
    return _rebuilt(value, cleaned, changed) if changed else value


def _parts(value: Any) -> Mapping[Any, Any] | None:
    if type(value) in {list, tuple}:
        return dict(enumerate(value))
    if type(value) is dict:
        return value
    if isinstance(value, BaseModel):
        return vars(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return None


def _rebuilt(value: Any, cleaned: dict[Any, Any], changed: dict[Any, Any]) -> Any:
    if type(value) is dict:
        return cleaned
    if isinstance(value, BaseModel):
        return value.model_copy(update=changed)
    if dataclasses.is_dataclass(value):
        return dataclasses.replace(value, **changed)  # type: ignore[type-var]
    return type(value)(cleaned.values())


def _clean_text(text: str, tokens: tuple[str, ...]) -> str:
    for token in tokens:
        if token in text:
            text = text.replace(token, MASK)
    return text


def _clean_other(value: Any, tokens: tuple[str, ...]) -> Any:
    """LangChain will turn it into a text: if that shows a token, do so here."""
    if isinstance(value, bytes):
        for token in tokens:
            value = value.replace(token.encode(), MASK.encode())
        return value
    with suppress(Exception):
        text = str(value)
        cleaned = _clean_text(text, tokens)
        return value if cleaned is text else cleaned
    return value


def clean_error(error: BaseException, tokens: tuple[str, ...]) -> BaseException:
    """
    Mask the tokens in an exception and all that it came from.

    Returns:
        The exception itself, or another where its text cannot be changed.
    """
    if not tokens:
        return error
    for one in _family(error):
        one.args = clean(one.args, tokens)
        if hasattr(one, "__notes__"):
            one.__notes__ = clean(one.__notes__, tokens)
    for one in _family(error):
        if one.__cause__ is not None and _shows(one.__cause__, tokens):
            one.__cause__ = None
        if one.__context__ is not None and _shows(one.__context__, tokens):
            one.__context__ = None
    if not _shows(error, tokens):
        return error
    return RuntimeError(_clean_text(f"{type(error).__name__}: {error}", tokens))


def _shows(error: BaseException, tokens: tuple[str, ...]) -> bool:
    return any(token in f"{error} {error!r}" for token in tokens)


def _family(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        one = todo.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        todo += [one.__cause__, one.__context__, *getattr(one, "exceptions", ())]
        yield one
