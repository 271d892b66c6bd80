"""Everything an object shows of itself when it is printed, dumped or raised."""

from __future__ import annotations

import dataclasses
import logging
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel

Rendering = tuple[str, str | bytes]
"""Where it was found, and the text."""

# Deeper than any state of a graph, shallow enough for a recursive structure.
DEPTH_LIMIT = 30


def renderings(thing: object, where: str) -> Iterator[Rendering]:
    """
    Walk through *thing*, and yield each text it can turn into.

    Containers are walked, models dumped, exceptions followed through cause,
    context and notes. An attribute that no printing shows is no leak and not
    looked at.
    """
    yield from _Walk().of(thing, where)


class _Walk:
    def __init__(self) -> None:
        # The objects themselves: an id alone is reused after a dump is freed.
        self._seen: dict[int, object] = {}

    def of(self, thing: object, where: str, depth: int = 0) -> Iterator[Rendering]:
        if isinstance(thing, str | bytes | bytearray | memoryview):
            yield where, thing if isinstance(thing, str) else bytes(thing)
            return
        if id(thing) in self._seen or depth > DEPTH_LIMIT:
            return
        self._seen[id(thing)] = thing
        shown, said = repr(thing), str(thing)
        yield f"repr() of {where}", shown
        if said != shown:
            yield f"str() of {where}", said
        for part, suffix in _parts(thing):
            yield from self.of(part, where + suffix, depth + 1)


def _parts(thing: object) -> Iterator[tuple[object, str]]:
    """What *thing* shows beyond its own repr."""
    if isinstance(thing, BaseException):
        yield from _of_exception(thing)
    elif isinstance(thing, logging.LogRecord):
        yield from _of_record(thing)
    elif isinstance(thing, BaseModel):
        yield from _of_model(thing)
    elif dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        yield from _of_dataclass(thing)
    else:
        yield from _of_container(thing)


def _of_container(thing: object) -> Iterator[tuple[object, str]]:
    if isinstance(thing, Mapping):
        for number, (key, value) in enumerate(thing.items()):
            yield key, f" key {number}"
            yield value, f"[{key!r}]"
    elif isinstance(thing, Sequence | AbstractSet) and not isinstance(thing, range):
        for number, value in enumerate(thing):
            yield value, f"[{number}]"


def _of_dataclass(thing: Any) -> Iterator[tuple[object, str]]:
    shown = repr(thing)
    for field in dataclasses.fields(thing):
        value = getattr(thing, field.name, None)
        if repr(value) in shown:  # not what a repr of its own masks
            yield value, f".{field.name}"


def _of_exception(error: BaseException) -> Iterator[tuple[object, str]]:
    yield "".join(traceback.format_exception(error)), " traceback"
    yield error.args, ".args"
    yield vars(error), ".__dict__"
    yield list(getattr(error, "__notes__", ())), " notes"
    if isinstance(error, BaseExceptionGroup):
        yield error.exceptions, ".exceptions"
    if error.__cause__ is not None:
        yield error.__cause__, ".__cause__"
    if error.__context__ is not None:
        yield error.__context__, ".__context__"


def _of_record(record: logging.LogRecord) -> Iterator[tuple[object, str]]:
    with suppress(TypeError, ValueError):  # args that do not fit; logging goes on
        yield record.getMessage(), " message"
    # Includes args, what came in by extra=, and the exception of exc_info.
    yield {k: v for k, v in vars(record).items() if k != "exc_info"}, " fields"
    if isinstance(record.exc_info, tuple):
        yield record.exc_info[1], " exception"


def _of_model(model: BaseModel) -> Iterator[tuple[object, str]]:
    dumps: list[tuple[object, str]] = []
    with warnings.catch_warnings():
        # Pydantic warns of values that are not of the declared type.
        warnings.simplefilter("ignore")
        dumps.append((model.model_dump(), ".model_dump()"))
        with suppress(TypeError, ValueError):  # what JSON cannot express stays in
            dumps.append((model.model_dump_json(), ".model_dump_json()"))
    yield from dumps


def file_renderings(files: Iterable[Path]) -> Iterator[Rendering]:
    """Yield the content of files, of folders, and of SQLite's files beside one."""
    for given in files:
        path = Path(given)
        found = sorted(path.rglob("*")) if path.is_dir() else _with_companions(path)
        for file in found:
            if file.is_file():
                yield f"file {file.name}", file.read_bytes()


def _with_companions(path: Path) -> Iterator[Path]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path.name} to look into.")
    yield path
    for suffix in ("-wal", "-shm", "-journal"):
        yield path.with_name(path.name + suffix)
