"""The public names, and what importing them costs: nothing."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import langchain_pocket_auth

SOURCE = Path(langchain_pocket_auth.__file__)

HEAVY = "langchain langchain_core langgraph fastapi starlette uvicorn sqlalchemy"
HEAVY += " aiosqlite cryptography httpx jinja2 pydantic pydantic_settings"


def python(code: str, folder: Path, **variables: str) -> str:
    """Run code in a new interpreter, in an empty folder; return what it prints."""
    kept = {"PATH": os.environ["PATH"], "HOME": str(folder), "TMPDIR": str(folder)}
    homes = ("XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME")
    kept |= dict.fromkeys(homes, str(folder))
    done = subprocess.run(
        [sys.executable, "-B", "-c", code],
        cwd=folder,
        env=kept | {"PYTHONPATH": str(SOURCE.parents[1])} | variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_public_names_are_sorted_and_there() -> None:
    """`__all__` is sorted as ruff sorts it, without a name twice, and all resolve."""
    names = langchain_pocket_auth.__all__
    assert names == sorted(set(names), key=lambda n: (n[0].islower(), n))
    for name in names:
        assert getattr(langchain_pocket_auth, name) is not None


def test_public_names_are_said_three_times_alike() -> None:
    """`__all__`, the lazy imports and those for type checkers name the same."""
    tree = ast.parse(SOURCE.read_text())
    checked = [node for node in tree.body if isinstance(node, ast.If)]
    for_checkers = {
        (alias.name, part.module)
        for block in checked
        for part in block.body
        if isinstance(part, ast.ImportFrom)
        for alias in part.names
    }
    lazy = langchain_pocket_auth._HOME
    assert for_checkers == set(lazy.items())
    assert set(langchain_pocket_auth.__all__) == set(lazy)


def test_unknown_name_is_an_attribute_error() -> None:
    """A misspelt name is told as any module tells it."""
    with pytest.raises(AttributeError, match="no attribute 'PocketAuht'"):
        langchain_pocket_auth.PocketAuht  # noqa: B018 - to see it fail


def test_star_import_brings_all(tmp_path: Path) -> None:
    """`from langchain_pocket_auth import *` gives exactly the public names."""
    code = "from langchain_pocket_auth import *; print(*sorted(set(dir()) - NONE))"
    code = code.replace("NONE", "{n for n in dir() if n.startswith('__')}")
    assert set(python(code, tmp_path).split()) == set(langchain_pocket_auth.__all__)


def test_import_does_nothing(tmp_path: Path) -> None:
    """Importing starts no thread, reads no setting, opens no file, loads no library."""
    code = f"""
import os, sys, threading
seen = []
def note(event, arguments):
    if event == "open" and not str(arguments[0]).endswith((".py", ".pyc", ".so")):
        seen.append(arguments[0])
    if event.startswith(("socket.", "subprocess.", "os.mkdir", "tempfile.")):
        seen.append(event)
before = set(sys.modules)
class Environment(dict):
    def _note(self, key): seen.append(key)
    def __getitem__(self, key): self._note(key); return super().__getitem__(key)
    def get(self, key, *rest): self._note(key); return super().get(key, *rest)
    def __iter__(self): self._note("all"); return super().__iter__()
    def items(self): self._note("all"); return super().items()
os.environ = Environment(os.environ)
sys.addaudithook(note)
import langchain_pocket_auth
print(seen, threading.active_count(), set({HEAVY.split()}) & set(sys.modules))
"""
    assert python(code, tmp_path) == "[] 1 set()\n"
    assert list(tmp_path.iterdir()) == []


def test_errors_and_models_come_without_the_graph(tmp_path: Path) -> None:
    """A name brings no more than its own module needs."""
    code = """
import sys
from langchain_pocket_auth import AuthContext, PocketAuthError, Provider
print({"langgraph", "langchain", "fastapi", "sqlalchemy", "cryptography"} & {*sys.modules})
"""
    assert python(code, tmp_path) == "set()\n"


def test_making_a_pocket_opens_nothing(tmp_path: Path) -> None:
    """No file, no thread and no server before the first question is asked."""
    code = """
import sys, threading
from langchain_pocket_auth import PocketAuth
pocket = PocketAuth(clients={"github": ("id", "secret")})
pocket.make_request(["repo"], auth_provider="github")
heavy = {"langchain", "fastapi", "uvicorn", "sqlalchemy", "cryptography"}
print(repr(pocket), threading.active_count(), heavy & set(sys.modules))
"""
    assert python(code, tmp_path) == (
        "PocketAuth(base_url='http://127.0.0.1:8711') 1 set()\n"
    )
    assert list(tmp_path.iterdir()) == []
