"""Imports go one way only, and each library has its place."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import langchain_pocket_auth

PACKAGE = Path(langchain_pocket_auth.__file__).parent
NAME = PACKAGE.name

# From the bottom up. A module may import from lines below its own; a folder is one
# module, whose files may import each other.
LAYERS = """
_errors
_placement _providers
_models _loop _cards _history
_events _site _client
_http _seal _futures
_row_parts
_rows
_catalog
handlers storage
_canaries
_vault _registry
_usage
_outbox _rewrap
_saving
_refresh _pauses
_waiting _proof
_withdrawals
_quarantine _linking
_exchange _clicks _admission
_held
_attempts _standing
_questions
_connections _housekeeping
_engine
_task _resume
_owner
_steps _scrub
_tools
_wrapping _guard
_gate
_graph _middleware
_service _settings
server _autoresume
notebook
_accounts
_sessions
_pocket
testing
demo
cli
"""
LEVEL = {
    module: level
    for level, line in enumerate(LAYERS.split("\n"))
    for module in line.split()
}

# Who may import what outside the standard library; pydantic and langchain_core are
# everybody's.
PLACES = {
    "aiosqlite": "storage",
    "authlib": "testing",
    "cryptography": "_seal handlers testing",
    "fastapi": "server",
    "flask": "testing",
    "httpx": "_client _http testing demo",
    "jinja2": "server",
    "jwt": "handlers testing",
    "langchain": "_middleware demo",
    "IPython": "notebook",
    "langgraph": "_autoresume _gate _graph _guard _middleware _owner _pocket _resume _steps _task demo",
    "langgraph_sdk": "_task",
    "platformdirs": "_service",
    "psycopg": "storage",
    "pydantic_settings": "_settings",
    "pytest": "testing",
    "redis": "storage",
    "rich": "cli",
    "sqlalchemy": "storage",
    "starlette": "server",
    "typer": "cli",
    "uvicorn": "server",
    "werkzeug": "testing",
}

FILES = sorted(PACKAGE.rglob("*.py"))


def ids(file: Path) -> str:
    """Return what a test of *file* is called."""
    return str(file.relative_to(PACKAGE))


def module_of(file: Path) -> str:
    """Return the module's name in LAYERS: its first part below the package."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """Yield line and absolute name of all that is imported at run time."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []  # for type checkers: may point anywhere
    here = [NAME, *file.relative_to(PACKAGE).parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: -node.level] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            # `from . import name`: the name is the module.
            names = [f"{source}.{a.name}" for a in node.names] if source == NAME else []
            yield from ((node.lineno, name) for name in names or [source])


# The package's own names are imported for type checkers, and lazily.
@pytest.mark.parametrize(
    "file", [f for f in FILES if module_of(f) != "__init__"], ids=ids
)
def test_imports_go_down(file: Path) -> None:
    """A module imports from layers below its own, in functions too."""
    mine = module_of(file)
    assert mine in LEVEL, f"{mine} has no layer: give it one in LAYERS"
    wrong = [
        f"{file.name}:{line} imports {name}"
        for line, name in imports(file)
        if name.split(".")[0] == NAME
        and (other := [*name.split("."), "__init__"][1]) != mine
        and LEVEL[other] >= LEVEL[mine]
    ]
    assert not wrong


@pytest.mark.parametrize("file", FILES, ids=ids)
def test_each_library_has_its_place(file: Path) -> None:
    """Only the modules named in PLACES import a library."""
    wrong = [
        f"{file.name}:{line} imports {name}"
        for line, name in imports(file)
        if module_of(file)
        not in PLACES.get(name.split(".")[0], module_of(file)).split()
    ]
    assert not wrong


def test_no_layer_is_without_its_module() -> None:
    """What LAYERS lists is there."""
    assert LEVEL.keys() - {module_of(file) for file in FILES} == set()
