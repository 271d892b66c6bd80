"""A package that somebody else published: installed, typed, and used by an app."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import KEYS

from langchain_pocket_auth.testing import AuthorizationServer, free_port

SOURCE = Path(__file__).with_name("third_party")
ACCOUNTS = ("acme", "acme-admin", "acme-legacy")
SECRET = "acme-secret"
Run = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the package was installed, offline."""
    target = tmp_path_factory.mktemp("site")
    _ran(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet"),
            *("--no-deps", "--no-index", "--no-build-isolation"),
            *("--disable-pip-version-check", "--target", str(target), str(SOURCE)),
        ],
        {**os.environ, "PIP_NO_INPUT": "1"},
        target,
    )
    return target


@pytest.fixture
def acme() -> Iterator[AuthorizationServer]:
    """A server whose tokens are soon over."""
    with AuthorizationServer(access_token_ttl_s=2) as server:
        yield server


@pytest.fixture
def run(site: Path, acme: AuthorizationServer, tmp_path: Path) -> Run:
    """Run a step of the app in a process that knows nothing of these tests."""
    base = f"http://127.0.0.1:{free_port()}"
    legacy = f"{base}/auth/acme-legacy/oauth2/callback"
    acme.register(
        client_id="acme-id",
        client_secret=SECRET,
        redirect_uris=[
            f"{base}/auth/{provider}/oauth2/callback" for provider in ACCOUNTS[:2]
        ],
    )
    acme.register(client_id="legacy-id", client_secret=SECRET, redirect_uris=[legacy])
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(site),
        "PYTHONWARNINGS": "error",
        "HOME": str(tmp_path),
        "POCKET_AUTH_KEYS": KEYS,
        "APP_URL": base,
        "APP_STORE": f"sqlite:///{tmp_path}/app.db",
        "ACME_URL": acme.issuer,
        "ACME_SECRET": SECRET,
        "ACME_LEGACY_CLIENT_ID": "legacy-id",
        "ACME_LEGACY_CLIENT_SECRET": SECRET,
        "ACME_LEGACY_REDIRECT_URI": legacy,
    }
    app = str(SOURCE / "app.py")

    def step(name: str) -> dict[str, Any]:
        output = _ran([sys.executable, app, name], environment, tmp_path)
        found: dict[str, Any] = json.loads(output)
        assert Path(found["from"]).is_relative_to(site)
        told: dict[str, Any] = found["told"]
        return told

    return step


def _ran(command: list[str], environment: dict[str, str], folder: Path) -> str:
    done = subprocess.run(
        command,
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_installed_package_connects_survives_a_restart_and_refreshes(
    run: Run, acme: AuthorizationServer
) -> None:
    """A row, a file, an overridden method and a spec handler, in two processes."""
    first = run("connect")
    assert acme.token_requests["authorization_code"] == len(ACCOUNTS)
    second = run("again")
    assert acme.token_requests["authorization_code"] == len(ACCOUNTS)
    assert acme.token_requests["refresh_token"] >= len(ACCOUNTS)
    assert not acme.token_errors
    assert acme.refresh_token_reuses == 0

    key = {
        "acme": "ACME_TOKEN",
        "acme-admin": "ACME_ADMIN",
        "acme-legacy": "ACME_LEGACY_TOKEN",
    }
    for told in (first, second):
        for provider in ACCOUNTS:
            [(name, token)] = told[provider]["environment"].items()
            assert name == key[provider]
            assert token in acme.issued_access_tokens
            assert told[provider]["profiled"] == {f"WORK_{name}": token}
            assert told[provider]["headers"] == {"Authorization": f"Bearer {token}"}
            assert told[provider]["status"] == 200
        typed = "a-key-typed-by-a-person"
        assert told["acme-keys"]["environment"]["ACME_API_KEY"] == typed
        assert told["acme-keys"]["headers"] == {"X-Acme-Key": typed}
    for provider in ACCOUNTS:
        assert first[provider]["environment"] != second[provider]["environment"]
    # The type is found again in the new process.
    assert first["acme-legacy"]["type"] == second["acme-legacy"]["type"]
    assert second["acme-legacy"]["type"] == "LegacyContext"


def test_package_is_typed_and_brings_its_file(site: Path) -> None:
    """What a type checker and `PocketAuth(providers=...)` look for is installed."""
    names = {path.name for path in (site / "acme_pocket").iterdir()}
    assert {"py.typed", "providers.toml"} <= names
