"""The command `pocket-auth`, as it is typed."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version

import pytest
from typer.testing import CliRunner

from langchain_pocket_auth._seal import KeyRing
from langchain_pocket_auth.cli import main, make_app

MODULE = [sys.executable, "-m", "langchain_pocket_auth.cli"]


def pocket_auth(*arguments: str) -> str:
    """Return what the command prints."""
    result = CliRunner().invoke(make_app(), arguments)
    assert result.exit_code == 0, result.output
    return result.output


def test_new_key_is_one_that_is_accepted() -> None:
    """`keys new` prints one key in the form of POCKET_AUTH_KEYS, another each time."""
    first, second = pocket_auth("keys", "new"), pocket_auth("keys", "new")
    assert first != second
    assert len(first.splitlines()) == 1
    ring = KeyRing.parse(f"{first.strip()},{second.strip()}")
    assert ring.open(ring.seal(b"plain", "row"), "row") == b"plain"


def test_providers_are_listed_for_people_and_for_programs() -> None:
    """Both lists name the same providers."""
    rows = json.loads(pocket_auth("providers", "--json"))
    assert {"id": "github", "name": "GitHub"} in rows
    lines = pocket_auth("providers").splitlines()
    assert [line.split(maxsplit=1) for line in lines] == [
        [row["id"], row["name"]] for row in rows
    ]


def test_version_is_the_package_s() -> None:
    """`--version` prints the version alone."""
    assert pocket_auth("--version") == version("langchain-pocket-auth") + "\n"


def test_command_alone_shows_its_help() -> None:
    """Without a subcommand the help names them all."""
    text = CliRunner().invoke(make_app(), []).output
    for command in ("demo", "keys", "providers"):
        assert command in text


def test_exit_code_of_the_demo_is_the_command_s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`demo --yes --port` reaches the demo, and its exit code comes back."""
    asked = {}

    def run(**options: object) -> int:
        asked.update(options)
        return 1

    monkeypatch.setattr("langchain_pocket_auth.demo.run", run)
    result = CliRunner().invoke(make_app(), ["demo", "--yes", "--port", "1234"])
    assert result.exit_code == 1
    assert asked == {"yes": True, "port": 1234}


def test_missing_typer_is_told_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the extra, one line says what to install, and the exit code is 2."""
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    assert capsys.readouterr().err == (
        'The command needs more: pip install "langchain-pocket-auth[cli]"\n'
    )


def test_module_runs_as_the_command() -> None:
    """`python -m langchain_pocket_auth.cli` is the command, where PATH lacks it."""
    done = subprocess.run(
        [*MODULE, "--version"], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.strip() == version("langchain-pocket-auth")
