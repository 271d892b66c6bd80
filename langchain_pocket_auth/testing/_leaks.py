"""Looking for secrets in places where they must not be."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self, TextIO

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.tracers import BaseTracer, Run

from ._needles import Needles
from ._outside import is_outside
from ._renderings import Rendering, file_renderings, renderings

__all__ = ["LeakWatch", "assert_no_leak"]

SHOWN_LEAKS = 10


def assert_no_leak(
    secrets: Iterable[str],
    *places: object,
    files: Iterable[Path] = (),
    text: Iterable[str] = (),
) -> None:
    """
    Fail if a secret is visible in one of the places, in whatever encoding.

    Looks for each secret as it is, quoted for a URL, in base64 (also in the
    middle of something longer), in hexadecimal, escaped for JSON and HTML.

    Args:
        secrets: Each at least 8 characters long, and at least one.
        places: Anything. Containers, models and LangChain messages are walked,
            exceptions followed through cause, context and notes; of other
            objects `repr()` and `str()` count.
        files: Searched byte by byte; folders with all that is in them, and
            SQLite's `-wal`, `-shm` and `-journal` beside a file.
        text: Further texts.

    Raises:
        AssertionError: Names the place and the secret by its first four
            characters; it never shows the secret.
        ValueError: A secret is too short to be searched for, or none is given.
    """
    __tracebackhide__ = True
    texts = [text] if isinstance(text, str) else text
    found = [
        *(r for i, p in enumerate(places) for r in renderings(p, f"place {i}")),
        *((f"text {number}", one) for number, one in enumerate(texts)),
        *file_renderings(files),
    ]
    _search(Needles(secrets), found)


def _search(needles: Needles, found: Iterable[Rendering]) -> None:
    __tracebackhide__ = True
    # A dict keeps the order and drops repetitions.
    leaks = dict.fromkeys(
        f"{needles.blank(where)}: secret {which}"
        for where, content in found
        for which in needles.found_in(content)
    )
    if leaks:
        lines = "\n  ".join([*leaks][:SHOWN_LEAKS])
        raise AssertionError(f"{len(leaks)} leak(s)\n  {lines}")


class LeakWatch:
    """
    Collects what a run tells logs, warnings, callbacks and tracers.

    ```python
    with LeakWatch() as watch:
        agent.invoke(question, config={"callbacks": watch.callbacks})
    watch.assert_clean(server.issued_access_tokens, files=[database])
    ```

    Inside the block every logger writes from DEBUG on. What this kit's own
    browser and server log is passed over: they are the other side. The
    callbacks go on collecting after the block.
    """

    def __init__(self) -> None:
        self.callback: BaseCallbackHandler = _CallbackRecorder(self._note)
        """Records the arguments of every event."""
        self.tracer: BaseTracer = _TraceRecorder(self._note)
        """Records every run as LangSmith would be sent it."""
        self._lock = threading.Lock()
        self._found: list[Rendering] = []
        self._restore: list[Callable[[], None]] = []

    @property
    def callbacks(self) -> list[BaseCallbackHandler]:
        """For `config={"callbacks": ...}`."""
        return [self.callback, self.tracer]

    @property
    def collected(self) -> list[str]:
        """All texts so far, to see that the watch watched something."""
        with self._lock:
            return [
                content if isinstance(content, str) else content.decode("latin-1")
                for _, content in self._found
            ]

    def __enter__(self) -> Self:
        self._watch_logging()
        self._watch_warnings()
        return self

    def __exit__(self, *_: object) -> None:
        while self._restore:
            self._restore.pop()()

    def assert_clean(
        self, secrets: Iterable[str], *places: object, files: Iterable[Path] = ()
    ) -> None:
        """Do `assert_no_leak` over all that was collected and the given places."""
        __tracebackhide__ = True
        secrets = [secrets] if isinstance(secrets, str) else list(secrets)
        with self._lock:
            found = list(self._found)
        _search(Needles(secrets), found)
        assert_no_leak(secrets, *places, files=files)

    def _note(self, where: str, thing: object) -> None:
        # At once: the object may change after the event.
        found = list(renderings(thing, where))
        with self._lock:
            self._found.extend(found)

    def _watch_logging(self) -> None:
        self._put(logging.root.manager, "disable", 0)
        names = list(logging.root.manager.loggerDict)
        for logger in [logging.root, *map(logging.getLogger, names)]:
            if logger is logging.root or logger.level > logging.DEBUG:
                self._restore.append(_level_setter(logger, logger.level))
                logger.setLevel(logging.DEBUG)
        original = logging.Logger.callHandlers

        # Every record passes here, also of loggers that do not propagate.
        def call_handlers(logger: logging.Logger, record: logging.LogRecord) -> None:
            if not is_outside():
                self._note(f"log record of {record.name}", record)
            original(logger, record)

        self._put(logging.Logger, "callHandlers", call_handlers)

    def _watch_warnings(self) -> None:
        original = warnings.showwarning

        def show(  # noqa: PLR0917 - the shape of warnings.showwarning
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if not is_outside():
                self._note(f"warning {category.__name__}", message)
            original(message, category, filename, lineno, file, line)

        self._put(warnings, "showwarning", show)

    def _put(self, owner: Any, name: str, value: object) -> None:
        original = getattr(owner, name)
        self._restore.append(lambda: setattr(owner, name, original))
        setattr(owner, name, value)


def _level_setter(logger: logging.Logger, level: int) -> Callable[[], None]:
    return lambda: logger.setLevel(level)


class _CallbackRecorder(BaseCallbackHandler):
    """Notes every event; the methods are added below, one per event."""

    run_inline = True

    def __init__(self, note: Callable[[str, object], None]) -> None:
        self._note = note


def _noting(event: str) -> Callable[..., None]:
    def method(self: _CallbackRecorder, *args: object, **kwargs: object) -> None:
        self._note(f"callback {event}", [args, kwargs])

    return method


for _event in dir(BaseCallbackHandler):
    if _event.startswith("on_"):
        setattr(_CallbackRecorder, _event, _noting(_event))


class _TraceRecorder(BaseTracer):
    """Notes a run when it starts and whenever it changes."""

    run_inline = True

    def __init__(self, note: Callable[[str, object], None]) -> None:
        super().__init__(_schema_format="original+chat")
        self._note = note

    def _persist_run(self, run: Run) -> None:
        """Nothing: the run was noted when it changed."""

    def _on_run_create(self, run: Run) -> None:
        self._note_run(run)

    def _on_run_update(self, run: Run) -> None:
        self._note_run(run)

    def _note_run(self, run: Run) -> None:
        names = ("name", "inputs", "outputs", "error", "extra", "events", "tags")
        seen = {name: getattr(run, name, None) for name in (*names, "serialized")}
        self._note(f"trace of {run.run_type} {run.name}", seen)
