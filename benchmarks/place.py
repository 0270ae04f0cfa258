"""A temporary folder, and the daemon and the bare servers that run in it."""

import contextlib
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from attrs import define, field, frozen

from benchmarks.client import Connection, request
from tests.integration.daemon import PATIENCE, Daemon, wait_for

HERE = Path(__file__).parent
PYTHON = (sys.executable, "-I", "-S")
JSON = "application/json"
_FILES = 16384


@frozen
class Server:
    """A running server: its process and its port."""

    pid: int
    port: int

    def cpu(self) -> int:
        """Return the processor time of the server, in clock ticks."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    def memory(self) -> int:
        """Return the resident memory of the server, in bytes."""
        fields = Path(f"/proc/{self.pid}/statm").read_text().split()
        return int(fields[1]) * resource.getpagesize()

    def rest(self) -> None:
        """Wait until the server is idle: it uses no processor time for 0.2 s."""
        used = -1
        while used != (used := self.cpu()):
            time.sleep(0.2)


@define
class Place:
    """Starts servers and makes files, and at the end stops and removes them all."""

    folder: Path
    _stack: contextlib.ExitStack
    _daemons: list[Daemon] = field(factory=list, init=False)

    def action(self, name: str, *command: str) -> None:
        """Make an action of the app ``bench`` that runs a command."""
        path = self._action(name)
        path.write_text(f"#!/bin/sh\nexec {shlex.join(command)}\n")
        path.chmod(0o755)

    def link(self, name: str, program: str) -> None:
        """Make an action that is the program itself, without a shell to start it."""
        self._action(name).symlink_to(program)

    def _action(self, name: str) -> Path:
        path = self.folder / "repo" / "apps" / "bench" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def daemon(self, *options: str) -> Daemon:
        """Start the daemon. It serves the actions that have been made."""
        repo = ("--command", "scripts", "--config-repo", str(self.folder / "repo"))
        daemon = Daemon(self.folder, *repo, *options)
        self._stack.callback(_stop_daemon, daemon)
        return daemon

    def bare(self, *arguments: str, body: bytes = b"") -> Server:
        """Start one of the `bare` servers; ``body`` is its standard input."""
        # -P: modules in this folder must not hide modules of the standard library.
        process = subprocess.Popen(
            [sys.executable, "-P", str(HERE / "bare.py"), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._stack.callback(_stop, process)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(body)
        process.stdin.close()
        return Server(process.pid, int(process.stdout.readline()))

    def tap(self, fifo: Path) -> int:
        """Open a FIFO for writing once it has a reader, and return the descriptor."""
        fd = os.open(fifo, os.O_WRONLY)
        self._stack.callback(os.close, fd)
        return fd

    def connect(self, server: Server) -> Connection:
        """Return a connection that is closed at the end."""
        connection = Connection(server.port)
        self._stack.callback(connection.close)
        return connection

    def fifo(self, name: str) -> Path:
        """Make a named pipe. For each byte in it the program ``line`` prints a line."""
        path = self.folder / name
        os.mkfifo(path)
        return path


def _stop_daemon(daemon: Daemon) -> None:
    """Stop the daemon and its tasks, and wait until none of them writes any more."""
    daemon.stop()
    locks = list(daemon.state.glob("tasks/*/lock"))
    wait_for(
        lambda: all(lock.with_name("exit").exists() for lock in locks),
        "the end of all tasks",
    )


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    process.wait(PATIENCE)
    if process.stdout is not None:
        process.stdout.close()


@contextlib.contextmanager
def place(parent: Path | None) -> Iterator[Place]:
    """Make a place, and remove all of it at the end."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _FILES:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(_FILES, hard), hard))
    with (
        tempfile.TemporaryDirectory(prefix="pulsar-bench-", dir=parent) as folder,
        contextlib.ExitStack() as stack,
    ):
        yield Place(Path(folder), stack)


def program(name: str, *arguments: str) -> list[str]:
    """Return the command that runs one of the `programs`."""
    return [*PYTHON, str(HERE / "programs.py"), name, *arguments]


def served(daemon: Daemon) -> Server:
    """Return the daemon as a server."""
    return Server(daemon.process.pid, daemon.port)


def create(connection: Connection, action: str) -> int:
    """Create a task of the daemon and return its number."""
    body = json.dumps({"action": action}).encode()
    number: int = json.loads(connection.ask(request("POST", "/bench/here", body, JSON)))[
        "id"
    ]
    return number


def finished(connection: Connection, number: int) -> None:
    """Wait until a task has ended. It must have finished without an error."""
    while True:
        path = f"/task/{number}/state?output=none"
        answer = json.loads(connection.ask(request("GET", path)))
        if answer["changed"]:
            break
    assert answer["task"]["status"] == "finished", answer
