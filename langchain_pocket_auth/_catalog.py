"""The lazy catalog of providers: own rows first, then the bundled ones."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ._errors import ConfigurationError, UnknownProvider
from ._providers import canonical
from ._rows import Provider

BUNDLED = Path(__file__).with_name("providers.toml")
# A row begins at its own table; its further tables follow it.
_ROW = re.compile(r"^\[([a-z0-9_-]+)\]$", re.MULTILINE)


def read_providers(path: Path) -> list[Provider]:
    """
    Read the providers of a TOML file, one table per id.

    Raises:
        ConfigurationError: The file or a row is wrong; the text names the key.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"providers file {path}: {error}") from error
    return [_row(path.name, name, table) for name, table in tables.items()]


def _row(file: str, name: str, table: Any) -> Provider:
    if not isinstance(table, Mapping):
        raise ConfigurationError(f"{file}: [{name}] is no table of a provider")
    if "id" in table:
        raise ConfigurationError(f"{file}: [{name}]: id: it is the table's name")
    try:
        return Provider(id=name, **table)
    except ConfigurationError as error:
        lines = [str(error)]
    except ValidationError as error:
        lines = [_line(each["loc"], each["msg"]) for each in error.errors()]
    raise ConfigurationError(f"{file}: [{name}]: {'; '.join(lines)}")


def _line(loc: tuple[int | str, ...], text: str) -> str:
    key, text = ".".join(map(str, loc)), text.removeprefix("Value error, ")
    return f"{key}: {text}" if key else text


@cache
def _sections(path: Path) -> dict[str, str]:
    """Return the text of each row: parsing all takes 100 ms, one of them none."""
    text = path.read_text(encoding="utf-8")
    begins = [(found[1], found.start()) for found in _ROW.finditer(text)]
    ends = [begin for _, begin in begins[1:]] + [len(text)]
    return {
        name: text[begin:end] for (name, begin), end in zip(begins, ends, strict=True)
    }


class Catalog:
    """Own rows first, then the bundled ones, each read when first asked for."""

    def __init__(self, own: Iterable[Provider | str | Path] = ()) -> None:
        self._rows: dict[str, Provider] = {}
        for entry in own:
            rows = (
                [entry] if isinstance(entry, Provider) else read_providers(Path(entry))
            )
            self._rows.update((row.id, row) for row in rows)
        self.own = tuple(self._rows)
        """Ids of the app's own rows."""
        self._aliases = {a: row.id for row in self._rows.values() for a in row.aliases}

    def canonical(self, provider: str) -> str:
        """Return the id behind an alias, unless a row of the app's has that id."""
        if provider in self._rows:
            return provider
        return self._aliases.get(provider) or canonical(provider)

    def find(self, provider: str) -> Provider | None:
        """Return the row of that id or alias, or `None`."""
        name = self.canonical(provider)
        if (row := self._rows.get(name)) is None and (
            section := _sections(BUNDLED).get(name)
        ):
            [table] = tomllib.loads(section).values()
            row = self._rows[name] = _row(BUNDLED.name, name, table)
        return row

    def get(self, provider: str) -> Provider:
        """
        Return the row of that id or alias.

        Raises:
            UnknownProvider: There is none; the text says how to add one.
        """
        if (row := self.find(provider)) is None:
            raise UnknownProvider(
                f"no provider {provider!r}{self._similar(provider)}; `pocket-auth "
                "providers` lists them; add your own with "
                "PocketAuth(providers=[Provider(...)]) or handlers=[...]"
            )
        return row

    def _similar(self, provider: str) -> str:
        from difflib import get_close_matches

        near = get_close_matches(provider, list(self))
        return f": did you mean {' or '.join(near)}?" if near else ""

    def __iter__(self) -> Iterator[str]:
        """Ids of all providers, sorted."""
        yield from sorted(_sections(BUNDLED).keys() | self._rows.keys())
