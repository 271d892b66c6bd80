"""What all commands share: their settings, how they print, and how they end."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from .._catalog import Catalog
from .._errors import ConfigurationError, PocketAuthError

if TYPE_CHECKING:
    from .._pocket import PocketAuth
    from .._settings import Settings

WIDTH = 80
LAST_PAGE_S = 1.0  # a redirect on this machine takes milliseconds
Handler = Annotated[str | None, typer.Option(help="Default: the provider's first.")]
Profile = Annotated[str, typer.Option(help="Which account of the owner.")]
Owner = Annotated[
    str | None, typer.Option(help="A user's id; default: whoever uses this machine.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
# Exit codes: somebody has to act; a setting or the usage is wrong.
REFUSED, WRONG = 1, 2


@dataclass(frozen=True, slots=True)
class Setup:
    """What the options before a command say."""

    settings_file: Path | None = None
    provider_files: tuple[Path, ...] = ()

    @staticmethod
    def of(context: typer.Context) -> Setup:
        """Return what stood before the command."""
        found = context.find_object(Setup)
        return found or Setup()

    def settings(self) -> Settings:
        """Read the environment and the settings file."""
        from .._settings import read_settings

        return read_settings(self.settings_file)

    def kept_settings(self) -> Settings:
        """
        Read the settings for what other processes are to see.

        Raises:
            ConfigurationError: They name a store that is this process's alone.
        """
        settings = self.settings()
        if settings.storage == "memory://":
            raise ConfigurationError(
                "memory:// is kept in one process, and your agent runs in another: set "
                "POCKET_AUTH_STORAGE to a store that both can open"
            )
        return settings

    def catalog(self) -> Catalog:
        """Return the providers that are known here."""
        return Catalog(self.provider_files)

    def pocket(self, **options: Any) -> PocketAuth:
        """Return a `PocketAuth` with these settings, not yet opened."""
        from .._pocket import PocketAuth

        if "base_url" not in options and self.settings().public_url:
            # Its pages are served by the app, which knows who is signed in.
            options.setdefault("verify_user", _nobody)
        return PocketAuth(
            providers=self.provider_files, settings_file=self.settings_file, **options
        )


def _nobody() -> None:
    """Stand in for the app's `verify_user` where no page is served."""


class Reporting(TyperGroup):
    """Commands whose errors are one sentence, and an exit code that says who acts."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except PocketAuthError as error:
            complain(str(error))
            wrong = isinstance(error, ConfigurationError)
            raise typer.Exit(WRONG if wrong else REFUSED) from None


def clean(text: object) -> str:
    """Return *text* without what could steer a terminal: others named some things."""
    return "".join(
        c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text)
    )


def say(*lines: str) -> None:
    """Print lines for a person, at once."""
    for line in lines:
        typer.echo(clean(line))
    sys.stdout.flush()


def complain(text: str) -> None:
    """Tell a person what is wrong, apart from what the command prints."""
    for line in wrap(clean(text), WIDTH, **_WHOLE_WORDS):
        typer.echo(line, err=True)


def print_json(value: object) -> None:
    """Print for programs; dates as in RFC 3339."""
    typer.echo(json.dumps(value, indent=2, default=_written))


def _written(value: Any) -> str:
    return str(value.isoformat())


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table: framed on a terminal, else one line a row, to search and cut."""
    cells = [[clean(cell) for cell in row] for row in rows]
    if not cells:
        return
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table()
        for name in header:
            table.add_column(name, overflow="fold")
        for row in cells:
            table.add_row(*map(Text, row))
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        padded = (cell.ljust(w) for cell, w in zip(row, widths, strict=True))
        typer.echo("  ".join(padded).rstrip())


_WHOLE_WORDS: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}


def print_facts(title: str, facts: Iterable[tuple[str, str]]) -> None:
    """Print labels with what is known; no address is broken, so each can be copied."""
    known = list(facts)
    width = max((len(label) for label, _ in known), default=0) + 2
    say("")
    typer.secho(clean(title), bold=True)
    for label, text in known:
        lines = wrap(clean(text), WIDTH - 2 - width, **_WHOLE_WORDS) or [""]
        for number, line in enumerate(lines):
            typer.echo(f"  {'' if number else label:{width}}{line}")


def local(when: datetime) -> str:
    """Return a time as a clock on the wall here shows it."""
    return when.astimezone().strftime("%Y-%m-%d %H:%M")


def open_browser(link: str) -> None:
    """Open the person's browser, if this is a desktop."""
    desktop = sys.platform in {"darwin", "win32"} or any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY")
    )
    if desktop:  # elsewhere `webbrowser` would start a text browser in here
        import webbrowser

        webbrowser.open(link)
