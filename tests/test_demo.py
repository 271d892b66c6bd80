"""The demo: what a newcomer runs first, with and without a terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from langchain_pocket_auth import demo
from langchain_pocket_auth.testing import Browser, LeakWatch
from langchain_pocket_auth.testing._ledger import Ledger

COMMAND = [sys.executable, "-m", "langchain_pocket_auth.cli", "demo"]
LIMIT_S = 15
LINK = re.compile(r"http://127\.0\.0\.1:\d+/connect/\S+")


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """The environment of a person with an empty home, and no desktop."""
    kept = {"PATH", "LANG", "LC_ALL", "VIRTUAL_ENV", "SYSTEMROOT"}
    env = {name: value for name, value in os.environ.items() if name in kept}
    places = {"HOME": "home", "TMPDIR": "tmp"}
    xdg = ("CONFIG", "DATA", "CACHE", "STATE")
    places |= {f"XDG_{name}_HOME": f"xdg-{name}" for name in xdg}
    for name, folder in places.items():
        (tmp_path / folder).mkdir()
        env[name] = str(tmp_path / folder)
    return env


def left_over(env: dict[str, str]) -> list[Path]:
    """Return the files in that person's folders."""
    folders = [Path(v) for k, v in env.items() if k in {"HOME", "TMPDIR"} or "XDG" in k]
    return [path for folder in folders for path in folder.rglob("*")]


class Terminal:
    """A terminal with the demo in it."""

    def __init__(self, env: dict[str, str]) -> None:
        self._ours, theirs = pty.openpty()
        # Tests that run in the background ignore Ctrl-C; so would the demo after them.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            self.process = subprocess.Popen(
                COMMAND, stdin=theirs, stdout=theirs, stderr=theirs, env=env
            )
        finally:
            signal.signal(signal.SIGINT, before)
            os.close(theirs)
        self.text = ""

    def read_until(self, pattern: str) -> re.Match[str]:
        """Wait for a text on the screen."""
        end = time.monotonic() + LIMIT_S
        while (found := re.search(pattern, self.text)) is None:
            assert time.monotonic() < end, self.text
            if select.select([self._ours], [], [], 0.1)[0]:
                data = os.read(self._ours, 65536)
                if not data:
                    raise EOFError(self.text)
                self.text += data.decode()
        return found

    def close(self) -> None:
        """End it, should it still run."""
        self.process.kill()
        self.process.wait(LIMIT_S)
        os.close(self._ours)

    def exit_code(self) -> int:
        """Read to the end."""
        # How terminals say that nobody writes any more.
        with suppress(OSError, EOFError):
            self.read_until("never written")
        return self.process.wait(LIMIT_S)


@contextmanager
def terminal(env: dict[str, str]) -> Iterator[Terminal]:
    """Run the demo in a terminal."""
    running = Terminal(env)
    try:
        yield running
    finally:
        running.close()


def test_demo_plays_all_scenes_without_a_terminal(home: dict[str, str]) -> None:
    """Nobody is asked, each step is told, nothing stays, and it is over in 15 s."""
    done = subprocess.run(
        COMMAND,
        env=home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    steps = re.findall(r"^(\d)\. ", done.stdout, re.MULTILINE)
    assert steps == list("1234567")
    assert LINK.search(done.stdout)
    assert done.stdout.count("#1 The door does not open") == 3
    assert "with exactly one request" in done.stdout
    assert "is revoked there" in done.stdout
    assert left_over(home) == []


def test_demo_shows_no_secret(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither the screen nor a log gets a token, a code or the app's secret."""
    secrets = [demo.REGISTRATION[1]]
    add_token, add_code = Ledger.add_token, Ledger.add_code

    def noted_token(self: Ledger, kind: Any, value: str, *rest: Any) -> None:
        secrets.append(value)
        add_token(self, kind, value, *rest)

    def noted_code(self: Ledger, **facts: Any) -> str:
        secrets.append(add_code(self, **facts))
        return secrets[-1]

    monkeypatch.setattr(Ledger, "add_token", noted_token)
    monkeypatch.setattr(Ledger, "add_code", noted_code)
    with LeakWatch() as watch:
        assert demo.run(yes=True) == 0
    assert len(secrets) == 1 + 1 + 4
    watch.assert_clean(secrets, capfd.readouterr())


def test_person_at_a_terminal_is_waited_for(home: dict[str, str]) -> None:
    """With a terminal the demo waits until the link was opened and agreed to."""
    with terminal(home) as screen:
        link = screen.read_until(LINK.pattern)
        screen.read_until("waiting for you")
        with Browser("bob") as browser:
            assert "is connected" in browser.visit(link.group()).text
        assert screen.exit_code() == 0
        assert "7. You disconnect Tracker" in screen.text
    assert left_over(home) == []


def test_person_may_say_no(home: dict[str, str]) -> None:
    """A refusal is told, reaches the model as a result, and is exit code 1."""
    with terminal(home) as screen:
        link = screen.read_until(LINK.pattern)
        screen.read_until("waiting for you")
        with Browser("bob") as browser:
            browser.visit(link.group(), approve=False)
        assert screen.exit_code() == 1
        assert "3. You said no" in screen.text
        assert "declined to connect Tracker" in screen.text
    assert left_over(home) == []


def test_person_may_leave(home: dict[str, str]) -> None:
    """Ctrl-C ends the demo in words, and leaves nothing."""
    with terminal(home) as screen:
        screen.read_until("waiting for you")
        screen.process.send_signal(signal.SIGINT)
        assert screen.exit_code() == 130
        assert "Stopped." in screen.text
        assert "Traceback" not in screen.text
    assert left_over(home) == []


def test_refusal_before_the_wait_counts_too(capsys: pytest.CaptureFixture[str]) -> None:
    """Somebody else's way of opening the link may be given, and may refuse."""

    async def refuses(link: str) -> None:
        with Browser("bob") as browser:
            await browser.avisit(link, approve=False)

    assert demo.run(person=refuses) == 1
    assert "3. You said no" in capsys.readouterr().out


def test_link_nobody_opens_ends_the_demo(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever never opens the link is not waited for without end."""

    async def sleeps(link: str) -> None:
        assert LINK.fullmatch(link)

    monkeypatch.setattr(demo, "MACHINE_S", 0.2)
    assert demo.run(person=sleeps) == 1
    assert "Nobody agreed in time" in capsys.readouterr().out


def test_taken_port_is_told_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    """A port that is taken is one sentence on stderr, no traceback."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as other:
        assert demo.run(yes=True, port=other.getsockname()[1]) == 1
    assert "cannot listen" in capsys.readouterr().err


@pytest.mark.parametrize(
    "missing", ["langchain", "langgraph.checkpoint.sqlite", "flask"]
)
def test_missing_package_is_told_in_one_sentence(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What to install is said in one line, and is exit code 2."""
    real = demo.find_spec
    monkeypatch.setattr(demo, "find_spec", lambda n: None if n == missing else real(n))
    assert demo.run(yes=True) == 2
    assert capsys.readouterr().err == (
        'The demo needs more: pip install "langchain-pocket-auth[demo]"\n'
    )
