"""The command `pocket-auth` where accounts are connected: real servers, one machine."""

from __future__ import annotations

import asyncio
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from support import connect
from typer.testing import CliRunner

from langchain_pocket_auth import PocketAuth
from langchain_pocket_auth.cli import _login_demo, make_app
from langchain_pocket_auth.testing import (
    AuthorizationServer,
    Browser,
    assert_no_leak,
    free_port,
)

MODULE = [sys.executable, "-m", "langchain_pocket_auth.cli"]
SECRET = "acme-very-secret"
LINK = re.compile(r"http://127\.0\.0\.1:\d+/connect/\S+")
LIMIT_S = 20.0


class Machine:
    """A person's machine, on which an app is registered at the provider acme."""

    def __init__(
        self, folder: Path, server: AuthorizationServer, set_env: Callable[..., None]
    ) -> None:
        self.folder, self.server, self._set = folder, server, set_env
        self.base_url = f"http://127.0.0.1:{free_port()}"
        self.file = folder / "acme.toml"
        self.file.write_text(
            "[acme]\n"
            f'issuer = "{server.issuer}"\n'
            f'authorization_endpoint = "{server.authorization_endpoint}"\n'
            f'token_endpoint = "{server.token_endpoint}"\n'
            f'revocation_endpoint = "{server.revocation_endpoint}"\n'
            f'device_authorization_endpoint = "{server.device_authorization_endpoint}"\n'
            "authorization_response_iss_parameter_supported = true\n"
        )
        server.register(
            client_id="acme-client",
            client_secret=SECRET,
            redirect_uris=[f"{self.base_url}/auth/acme/oauth2/callback"],
        )
        for place in ("CONFIG", "DATA"):
            set_env(f"XDG_{place}_HOME", str(folder / place.lower()))
        self.set(
            BASE_URL=self.base_url,
            STORAGE=f"sqlite:///{folder / 'sessions.db'}",
            CLIENTS__ACME__CLIENT_ID="acme-client",
            CLIENTS__ACME__CLIENT_SECRET=SECRET,
        )
        self.output: list[str] = []

    def set(self, **settings: str) -> None:
        """Set variables of the environment."""
        for name, value in settings.items():
            self._set(f"POCKET_AUTH_{name}", value)

    def typed(self, *arguments: str) -> Any:
        """Return what became of the command: `exit_code`, `stdout`, `stderr`."""
        before = ("--provider-file", str(self.file))
        result = CliRunner().invoke(make_app(), (*before, *arguments))
        self.output.append(result.output)
        if not isinstance(result.exception, SystemExit | None):
            raise result.exception
        return result

    def connections(self, *arguments: str) -> list[dict[str, Any]]:
        """Return the connections, as a program reads them."""
        found = self.typed("connections", "--json", *arguments)
        assert found.exit_code == 0, found.output
        listed: list[dict[str, Any]] = json.loads(found.stdout)
        return listed

    @contextmanager
    def running(self, *arguments: str) -> Iterator[Running]:
        """Run the command in a process of its own."""
        command = [*MODULE, "--provider-file", str(self.file), *arguments]
        process = Running(command)
        try:
            yield process
        finally:
            self.output.append(process.close())

    def pocket(self) -> PocketAuth:
        """Return an agent's pocket on this machine, which serves no links itself."""
        pocket = PocketAuth(providers=[self.file])
        _ = pocket.router
        return pocket

    def assert_clean(self) -> None:
        """No secret was printed, and none can be read in the files."""
        issued = [*self.server.issued_access_tokens, *self.server.issued_refresh_tokens]
        assert_no_leak([SECRET, *issued], text=self.output, files=[self.folder])


class Running:
    """A command in a process of its own, and what it has printed so far."""

    def __init__(self, command: list[str]) -> None:
        # Tests that run in the background ignore Ctrl-C; so would the command.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        finally:
            signal.signal(signal.SIGINT, before)
        self.text = ""

    def read_until(self, pattern: str) -> re.Match[str]:
        """Wait for a text."""
        out, end = self._process.stdout, time.monotonic() + LIMIT_S
        assert out is not None
        while (found := re.search(pattern, self.text)) is None:
            assert time.monotonic() < end, self.text
            if select.select([out], [], [], 0.1)[0]:
                data = os.read(out.fileno(), 65536)
                assert data, f"it ended: {self.text}"
                self.text += data.decode()
        return found

    def exit_code(self, signal_number: int | None = None) -> int:
        """Wait for the end, perhaps after asking for it."""
        if signal_number is not None:
            self._process.send_signal(signal_number)
        return self._process.wait(LIMIT_S)

    def close(self) -> str:
        """End it, should it still run; return all that it printed."""
        self._process.kill()
        rest, _ = self._process.communicate(timeout=LIMIT_S)
        self.text += rest.decode()
        return self.text


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    # A person's browser is given a second for the last page; ours has it at once.
    for module in ("_login", "_login_demo"):
        monkeypatch.setattr(f"langchain_pocket_auth.cli.{module}.LAST_PAGE_S", 0.05)


@pytest.fixture
def machine(
    tmp_path: Path, server: AuthorizationServer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Machine]:
    """A person's machine; at the end, nothing of it shows a secret."""
    made = Machine(tmp_path, server, monkeypatch.setenv)
    yield made
    made.assert_clean()


@pytest.fixture
def desktop(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Put a browser on the machine, whose person agrees or not."""
    opened: list[str] = []

    def browser(*, approve: bool = True) -> list[str]:
        def visit(url: str) -> bool:
            opened.append(url)
            Browser("alice").visit(url, approve=approve)
            return True

        monkeypatch.setenv("DISPLAY", ":0")
        monkeypatch.setattr("webbrowser.open", visit)
        return opened

    return browser


# ------------------------------------------------------------------------------ login


def test_login_connects_the_account_and_shows_no_token(
    machine: Machine, desktop: Callable[..., list[str]]
) -> None:
    """The printed link is opened, the person agrees, and an agent has the account."""
    opened = desktop()
    result = machine.typed("login", "acme", "--scopes", "read,write")
    assert result.exit_code == 0, result.output
    assert LINK.findall(result.stdout) == opened
    assert re.search(r"Connected: acme.*scopes read write", result.stdout)
    [found] = machine.connections()
    assert (found["provider"], found["profile"]) == ("acme", "default")
    assert found["handler"] == "acme-oauth2"
    assert (found["scopes"], found["health"]) == (["read", "write"], "ok")
    assert found["expires_at"]
    line = machine.typed("connections").stdout
    assert re.match(r"acme +acme-oauth2 +default +\S+ +read write +connected", line)
    again = machine.typed("login", "acme", "--scopes", "read")
    assert again.exit_code == 0
    assert len(opened) == 1  # there is nothing to ask


def test_owner_and_profile_tell_accounts_apart(
    machine: Machine, desktop: Callable[..., list[str]]
) -> None:
    """Each owner sees and disconnects own accounts only."""
    desktop()
    work = ("--owner", "bob", "--profile", "work")
    result = machine.typed("login", "acme", *work)
    assert "profile work" in result.stdout
    assert machine.connections() == []
    assert [c["profile"] for c in machine.connections("--owner", "bob")] == ["work"]
    assert machine.typed("logout", "acme").exit_code == 1
    assert machine.typed("logout", "acme", *work).exit_code == 0
    assert machine.connections("--owner", "bob") == []


def test_refusal_ends_with_1(
    machine: Machine, desktop: Callable[..., list[str]]
) -> None:
    """The person says no at the provider: nothing is connected."""
    desktop(approve=False)
    result = machine.typed("login", "acme")
    assert result.exit_code == 1
    assert "Connected" not in result.output
    assert machine.connections() == []


def test_nobody_at_the_link_ends_with_1(
    machine: Machine, desktop: Callable[..., list[str]]
) -> None:
    """Without a browser the link is printed only; in time the command gives up."""
    opened = desktop()
    result = machine.typed("login", "acme", "--no-browser", "--timeout", "0")
    assert result.exit_code == 1
    assert LINK.search(result.stdout)
    assert "nobody agreed within 0 seconds" in result.stderr
    assert opened == []


def test_logout_revokes_and_says_whether_there_was_one(
    machine: Machine, desktop: Callable[..., list[str]]
) -> None:
    """The first finds a connection, the second none."""
    desktop()
    machine.typed("login", "acme")
    result = machine.typed("logout", "acme")
    assert (result.exit_code, result.stdout) == (0, "Disconnected: acme.\n")
    assert machine.server.revocations
    again = machine.typed("logout", "acme")
    assert again.exit_code == 1
    assert "There was no connection of acme" in again.stderr
    assert "No account is connected" in machine.typed("connections").stderr


def test_names_of_others_cannot_steer_the_terminal(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a provider or user named is printed without control characters."""
    result = machine.typed("logout", "acme", "--profile", "\x1b[2Jwork\n")
    assert "\x1b" not in result.output
    assert "work" in result.output


def test_account_is_connected_in_a_real_process(machine: Machine) -> None:
    """`login` in a process of its own waits for the person, and ends."""
    with machine.running("login", "acme") as login:
        url = login.read_until(LINK.pattern)[0]
        assert Browser("alice").visit(url).status_code == 200
        login.read_until("Connected: acme")
        assert login.exit_code() == 0
    assert len(machine.connections()) == 1


@pytest.mark.parametrize("approve", [True, False])
def test_account_is_connected_by_a_code(machine: Machine, approve: bool) -> None:
    """`--device` shows a code, which the person types in elsewhere, and agrees or not."""
    machine.server.device_interval_s = 0.05
    with machine.running("login", "acme", "--device", "--scopes", "read") as login:
        url = login.read_until(r"Open (\S+) on any machine")[1]
        code = login.read_until(r"Type the code (\S+) ")[1]
        Browser("alice").approve_device(url, code, approve=approve)
        assert login.exit_code() == (0 if approve else 1)
    assert ("Connected: acme, scopes read" in login.text) == approve
    assert len(machine.connections()) == approve


def test_key_is_typed_into_a_page_and_not_shown(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a provider gives out keys, `login` leads to our form."""
    machine.file.write_text(f"{machine.file.read_text()}[safe]\ntoken = {{}}\n")
    person = Browser("alice", fields={"token": "typed-secret-key"})
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr("webbrowser.open", person.visit)
    result = machine.typed("login", "safe")
    assert result.exit_code == 0, result.output
    [found] = machine.connections()
    assert (found["handler"], found["expires_at"]) == ("safe-token", None)
    assert_no_leak(["typed-secret-key"], text=machine.output, files=[machine.folder])


def test_app_with_its_own_key_is_connected_without_anybody(machine: Machine) -> None:
    """The key stands in the settings: nothing is asked, no link is made."""
    machine.file.write_text(f"{machine.file.read_text()}[safe]\ntoken = {{}}\n")
    machine.set(CLIENTS__SAFE__TOKEN="safe-secret-key")
    result = machine.typed("login", "safe")
    assert result.exit_code == 0, result.output
    assert LINK.search(result.output) is None
    assert "Connected: safe" in result.stdout
    assert_no_leak(["safe-secret-key"], text=machine.output, files=[machine.folder])


def test_account_that_nobody_would_see_is_not_connected(machine: Machine) -> None:
    """A store in memory ends with the command: it says so, and asks nobody."""
    machine.set(STORAGE="memory://")
    result = machine.typed("login", "acme")
    assert result.exit_code == 2
    assert "POCKET_AUTH_STORAGE" in result.stderr


# ----------------------------------------------------------------------- where it runs


def test_serve_answers_for_an_agent_elsewhere(machine: Machine) -> None:
    """A link of another process works at `serve`, which ends at Ctrl-C, unlogged."""
    with machine.running("serve") as serve:
        serve.read_until(f"Serving {machine.base_url} ")
        pocket = machine.pocket()

        async def agent() -> None:
            try:
                await connect(pocket, Browser("alice"), "read")
            finally:
                await pocket.aclose()

        asyncio.run(agent())
        assert serve.exit_code(signal.SIGINT) == 0
    assert len(serve.text.splitlines()) == 1  # no codes, no tickets, no traceback
    with socket.create_server(("127.0.0.1", int(machine.base_url.rpartition(":")[2]))):
        pass


def test_login_uses_the_server_that_runs_already(
    machine: Machine, desktop: Callable[..., list[str]]
) -> None:
    """Its port is taken by ours, with the same store: that one answers, and SIGTERM ends it."""
    desktop()
    with machine.running("serve") as serve:
        serve.read_until("Serving ")
        found = {
            c["name"]: c for c in json.loads(machine.typed("doctor", "--json").stdout)
        }
        assert found["port"]["status"] == "ok"
        assert "served by PocketAuth" in found["port"]["text"]
        result = machine.typed("login", "acme")
        assert result.exit_code == 0, result.output
        # The same port, another store: its links lead nowhere there.
        machine.set(STORAGE=f"sqlite:///{machine.folder / 'other.db'}")
        result = machine.typed("login", "acme")
        assert result.exit_code == 2
        assert "with a store of its own" in result.stderr
        # And a second server does not start.
        second = machine.typed("serve")
        assert second.exit_code == 2
        assert "cannot listen" in second.stderr
        assert serve.exit_code(signal.SIGTERM) == 0


def test_links_name_the_port_that_is_served(machine: Machine) -> None:
    """`serve --port` listens there, and says so."""
    port = free_port()
    with machine.running("serve", "--port", str(port)) as serve:
        serve.read_until(rf"Serving http://127\.0\.0\.1:{port} ")
        page = Browser("alice").open(f"http://127.0.0.1:{port}/connect/none")
        assert page.status_code == 404


@pytest.mark.parametrize(
    ("settings", "arguments", "remedy"),
    [
        ({"STORAGE": "memory://"}, (), "POCKET_AUTH_STORAGE"),
        ({"BASE_URL": "https://localhost:8443"}, (), "--port"),
        ({}, ("--host", "0.0.0.0"), "127.0.0.1"),
    ],
)
def test_what_cannot_be_served_is_told(
    settings: dict[str, str], arguments: tuple[str, ...], remedy: str, machine: Machine
) -> None:
    """A store that nobody shares, an address that others answer at, a public one."""
    machine.set(**settings)
    result = machine.typed("serve", *arguments)
    assert result.exit_code == 2
    assert remedy in result.stderr


def test_server_behind_another_keeps_its_address(machine: Machine) -> None:
    """With an https address, which a proxy answers at, links keep naming that one."""
    machine.set(BASE_URL="https://localhost:8443")
    port = free_port()
    with machine.running("serve", "--port", str(port)) as serve:
        serve.read_until(
            rf"Serving https://localhost:8443 \(at http://127\.0\.0\.1:{port}\)"
        )


# ----------------------------------------------------------------------------- doctor


def test_port_that_somebody_else_has_is_told(machine: Machine) -> None:
    """Codes would go to a stranger: the doctor fails, and no link is made."""
    port = int(machine.base_url.rpartition(":")[2])
    with http_server(port, clock_ahead_s=0):
        result = machine.typed("doctor")
        assert result.exit_code == 1
        assert "would not reach PocketAuth" in " ".join(result.stdout.split())
        result = machine.typed("login", "acme")
    assert result.exit_code == 2
    assert LINK.search(result.output) is None
    assert "cannot listen" in result.stderr


@contextmanager
def http_server(port: int, *, clock_ahead_s: float) -> Iterator[None]:
    """Answer 404 everywhere, and say a time."""

    class Strange(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def date_time_string(self, timestamp: float | None = None) -> str:
            return super().date_time_string(time.time() + clock_ahead_s)

        def log_message(self, *args: Any) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", port), Strange) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield
        finally:
            running.shutdown()
            thread.join(LIMIT_S)


def test_clock_is_not_compared_where_nothing_says_whose(machine: Machine) -> None:
    """A host that the settings leave open, or that is still to be discovered."""
    machine.file.write_text(
        machine.file.read_text()
        + '[open]\nauthorization_endpoint = "https://{host}.example/a"\n'
        + 'token_endpoint = "https://{host}.example/t"\n[open.variables.host]\n'
        + '[found]\nissuer = "https://issuer.example"\n'
    )
    machine.set(CLIENTS__OPEN__CLIENT_ID="a", CLIENTS__FOUND__CLIENT_ID="b")
    found = json.loads(machine.typed("doctor", "--online", "--json").stdout)
    names = {one["name"] for one in found}
    assert {"app open", "app found", "clock of acme"} <= names
    assert not {"clock of open", "clock of found"} & names


@pytest.mark.parametrize(("ahead_s", "status"), [(0, "ok"), (3600, "failed")])
def test_doctor_compares_clocks_if_asked_to(
    ahead_s: float, status: str, machine: Machine
) -> None:
    """Only with --online is the provider's host asked what time it is."""
    port = free_port()
    text = machine.file.read_text()
    machine.file.write_text(
        text.replace(machine.server.token_endpoint, f"http://127.0.0.1:{port}/token")
    )
    with http_server(port, clock_ahead_s=ahead_s):
        found = json.loads(machine.typed("doctor", "--online", "--json").stdout)
        offline = json.loads(machine.typed("doctor", "--json").stdout)
    said = {one["name"]: one["status"] for one in found}
    assert said["clock of acme"] == status
    assert "clock of acme" not in {one["name"] for one in offline}
    nobody = json.loads(machine.typed("doctor", "--online", "--json").stdout)
    assert {o["name"]: o["status"] for o in nobody}["clock of acme"] == "warning"


# ------------------------------------------------------------------------------- demo


def test_login_demo_plays_to_the_end(machine: Machine) -> None:
    """`login demo --yes` needs no account, tells its steps, and leaves nothing."""
    before = set(machine.folder.rglob("*"))
    with machine.running("login", "demo", "--yes") as demo:
        assert demo.exit_code() == 0
    steps = re.findall(r"^(\d)\. ", demo.text, re.MULTILINE)
    assert steps == list("1234")
    assert "Connected, with the scopes issues:read" in demo.text
    assert "is revoked there" in demo.text
    assert set(machine.folder.rglob("*")) == before


@pytest.mark.parametrize("approve", [True, False])
def test_login_demo_asks_you_at_a_terminal(
    machine: Machine,
    desktop: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
    approve: bool,
) -> None:
    """Your browser is opened, and you may refuse."""
    opened = desktop(approve=approve)
    code = asyncio.run(_login_demo.play(alone=False, browser=True, timeout_s=LIMIT_S))
    assert code == (0 if approve else 1)
    text = capsys.readouterr().out
    assert LINK.findall(text) == opened
    assert ("You said no: nothing was stored." in text) == (not approve)


def test_login_demo_waits_no_longer_than_it_was_told(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody opens the link: the exit code is 1."""
    code = asyncio.run(_login_demo.play(alone=False, browser=False, timeout_s=0))
    assert code == 1
    assert "Nobody agreed in time" in capsys.readouterr().out


def test_login_demo_says_what_it_needs(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the extra `testing`: one sentence, and the exit code is 2."""
    monkeypatch.setitem(sys.modules, "langchain_pocket_auth.testing._server", None)
    result = machine.typed("login", "demo", "--yes")
    assert result.exit_code == 2
    assert 'pip install "langchain-pocket-auth[testing]"' in result.stderr
