"""`pocket-auth providers`: which there are, and what each needs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from .._rows import Provider
from ._facts import facts_of
from ._terminal import (
    REFUSED,
    Json,
    Setup,
    complain,
    print_facts,
    print_json,
    print_table,
    say,
)

app = typer.Typer()
_COLUMNS = ("id", "name", "methods", "category", "sources")
_UNSEEN = "stated from general knowledge, no source was seen"
_OPTIONAL = {
    "form": "(optional: where these are set, nobody is asked)",
    "app": "(optional: the app registers itself)",
}
_TOLD_ELSEWHERE = {"handler", "scoped", "unverified"}


@app.callback(invoke_without_command=True)
def providers(
    context: typer.Context,
    search: Annotated[
        str | None,
        typer.Option(help="Part of an id, a name, a category or a handler's name."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the providers that are known, with the ways to connect, default first."""
    if context.invoked_subcommand is not None:
        if search is not None or as_json:
            raise typer.BadParameter("put the options behind the subcommand")
        return
    catalog = Setup.of(context).catalog()
    rows = [row for row in map(catalog.get, catalog) if _matches(row, search)]
    if as_json:
        print_json([_listed(row) for row in rows])
    else:
        print_table(_COLUMNS, (_cells(_listed(row)) for row in rows))
    if not rows:
        complain(f"No provider matches {search!r}.")
        raise typer.Exit(REFUSED)


def _matches(row: Provider, search: str | None) -> bool:
    if search is None:
        return True
    handlers = map(row.handler_name, row.methods)
    texts = (row.id, row.label, row.category, *row.aliases, *handlers)
    return any(search.casefold() in text.casefold() for text in texts)


def _listed(row: Provider) -> dict[str, Any]:
    return {
        "id": row.id,
        "name": row.label,
        "methods": list(row.methods),
        "category": row.category,
        "sources": row.sources,
    }


def _cells(listed: dict[str, Any]) -> list[str]:
    methods = ", ".join(listed["methods"]) or "none"
    sources = "" if listed["sources"] is None else str(listed["sources"])
    return [listed["id"], listed["name"], methods, listed["category"], sources]


@app.command()
def show(
    context: typer.Context,
    provider: Annotated[str, typer.Argument(help="Its id or one of its other names.")],
    base_url: Annotated[
        str | None,
        typer.Option(help="Where the app will be reached; default: as it is set."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what to register where for a provider, and how well its facts are known."""
    setup = Setup.of(context)
    row = setup.catalog().get(provider)
    if base_url is None:
        from .._settings import DEFAULT_BASE_URL

        base_url = setup.settings().base_url or DEFAULT_BASE_URL
    known = facts_of(row, base_url.rstrip("/"))
    if as_json:
        print_json(known)
        return
    say(f"{row.label} ({row.id})")
    for method in known["methods"].values():
        print_facts(method["handler"], _lines(method))
    print_facts("How well this is known", _standing(row))


def _lines(method: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield a label and a text for each line."""
    for name, value in method.items():
        if name in _TOLD_ELSEWHERE or value in ([], None):
            continue
        mark = " (unverified)" if name in method["unverified"] else ""
        for number, text in enumerate(_texts(name, value, method)):
            yield "" if number else name, f"{text}{mark}"


def _texts(name: str, value: Any, method: dict[str, Any]) -> Iterator[str]:
    match name, value:
        case "fields", _:
            yield from (_field(one, field) for one, field in value.items())
        case "settings", _:
            yield from map(_setting, value)
            if not any(one["required"] for one in value):
                yield _OPTIONAL["form" if "fields" in method else "app"]
        case "redirect_uri_prefixes", _:
            yield " or ".join(value)
            if not method["redirect_uri"].startswith(tuple(value)):
                yield "set POCKET_AUTH_BASE_URL to such an address"
        case "scope_separator", _:
            yield json.dumps(value)
        case _, bool():
            yield "yes" if value else "no"
        case _, list():
            yield " ".join(value)
        case _, dict():
            yield from (f"{key}: {one}" for key, one in value.items())
        case _:
            yield value


def _field(name: str, field: dict[str, Any]) -> str:
    said = ["secret"] if field["secret"] else []
    said += [] if field["required"] else ["optional"]
    said += [f"matches {field['pattern']}"] if field["pattern"] else []
    more = f" ({', '.join(said)})" if said else ""
    return f"{name}: {field['label']}{more}"


def _setting(one: dict[str, Any]) -> str:
    said = [one["description"]] if one["description"] else []
    said += [] if one["default"] is None else [f"default: {one['default']}"]
    more = f" ({'; '.join(said)})" if said else ""
    return f"{one['name']}{more}{' (unverified)' if one.get('unverified') else ''}"


def _standing(row: Provider) -> Iterator[tuple[str, str]]:
    if row.unsupported:
        yield "unsupported", f"{row.label} {row.unsupported}"
    if row.aliases:
        yield "aliases", ", ".join(row.aliases)
    unseen = " (unverified)" if "docs" in row.unverified else ""
    yield "docs", f"{row.docs or 'none'}{unseen}"
    yield "checked", str(row.checked or "not said")
    yield "sources", "not said" if row.sources is None else str(row.sources)
    if row.unverified:
        yield "unverified", f"{', '.join(row.unverified)}: {_UNSEEN}"
    if row.sources is not None and row.sources <= 1:
        count = "no independent source" if not row.sources else "one source only"
        yield "", f"These facts rest on {count}: they are not promised."
