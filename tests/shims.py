"""Real shims as children of the test, without a daemon, and their remaining processes."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attrs import define, field
from twisted.internet.task import Clock

from pulsar_api.execution import proc
from pulsar_api.execution.executor import ShimExecutor
from pulsar_api.execution.local_machine import LocalMachine
from pulsar_api.execution.proc import Entry, Key, Table, lives, send
from pulsar_api.shim import shim
from pulsar_api.tasks.interfaces import Bounds
from pulsar_api.tasks.model import Command
from tests.integration.daemon import wait_for

PYTHON = os.path.realpath(sys.executable)


Elsewhere = Callable[..., Any]
"""The fixture that runs a script in a new process (``conftest.py``)."""

NEW_NUMBERS = (
    *("unshare", "--pid", "--fork", "--kill-child", "--mount-proc"),
    *("sh", "-c", '"$@"; exit $?', "sh"),
)
"""Runs a command in a new PID namespace, which can choose the next process number."""


# All of these end by themselves if their test is killed.
# Each process starts two more, without environment and in new sessions, to a depth of $1.
BOMB = """
echo $$
if [ $1 -gt 0 ]; then
    setsid env -i /bin/sh -c "$0" "$0" $(($1 - 1)) &
    setsid env -i /bin/sh -c "$0" "$0" $(($1 - 1)) &
fi
for i in $(/usr/bin/seq 120); do /bin/sleep 0.5; done
"""
# A chain of processes that each live only as long as a fork, so no look can catch them.
RUNNER = """
import os, signal, sys, time
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
until = time.monotonic() + 60
if os.fork():
    time.sleep(60)
count = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
while time.monotonic() < until:
    os.write(count, b".")
    if os.fork():
        os._exit(0)
    if sys.argv[2] == "session":
        os.setsid()
"""


def runs(count: Path) -> bool:
    """Return whether a `RUNNER` still runs."""
    before = count.stat().st_size if count.exists() else 0
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        time.sleep(0.01)
        if count.exists() and count.stat().st_size > before:
            return True
    return False


def with_argument(text: str) -> list[Key]:
    """Return the running processes that have an argument."""
    entries = Table().entries.values()
    return [e.key for e in entries if text.encode() in proc.arguments(e)]


def spawn(folder: Path) -> int:
    """Start the shim of a folder as the daemon does."""
    arguments = [PYTHON, "-I", "-S", shim.__file__, str(folder)]
    nothing = [(os.POSIX_SPAWN_OPEN, fd, "/dev/null", os.O_RDWR, 0) for fd in (0, 1)]
    return os.posix_spawn(PYTHON, arguments, {}, file_actions=nothing)


@define
class Tree:
    """A task: its shim, and the processes whose numbers it prints."""

    number: int
    folder: Path
    key: Key
    """The process number and the start time of the shim."""
    printed: list[Key] = field(factory=list)
    status: int | None = None

    @property
    def output(self) -> str:
        """The output of the task so far."""
        path = self.folder / "output"
        return path.read_text() if path.exists() else ""

    def pids(self, count: int) -> list[Key]:
        """Wait until the task has printed ``count`` process numbers, and return them."""
        wait_for(lambda: self.output.count("\n") >= count, f"{count} processes")
        found = [Entry.of(int(word)) for word in self.output.split()[:count]]
        self.printed = [one.key for one in found if one is not None]
        return self.printed

    def kill_shim(self) -> None:
        """Kill only the shim."""
        send(self.key, signal.SIGKILL)
        self.wait()

    def wait(self) -> int:
        """Wait for the end of the shim, and return its exit status."""
        if self.status is None:
            number = self.key[0]
            found = wait_for(
                lambda: [end for end in [os.waitpid(number, os.WNOHANG)] if end[0]],
                "the end of a shim",
            )
            self.status = os.waitstatus_to_exitcode(found[0][1])
        return self.status

    def left(self) -> list[Key]:
        """Return the printed processes that still run."""
        return [key for key in self.printed if lives(key)]


@define
class Trees:
    """Starts tasks in a folder, and ends their remaining processes."""

    tasks: Path
    spawn: Callable[[Path], int] = spawn
    trees: list[Tree] = field(factory=list)

    def __call__(self, *arguments: str, number: int = 1, grace: float = 5) -> Tree:
        """Start a task, and wait until its shim handles signals."""
        folder = self.prepare(*arguments, number=number, grace=grace)
        found = Entry.of(self.spawn(folder))
        assert found is not None
        self.trees.append(Tree(number, folder, found.key))
        wait_for(lambda: not (folder / "spec").exists(), "the shim")
        return self.trees[-1]

    def prepare(self, *arguments: str, number: int = 1, grace: float = 5) -> Path:
        """Make the folder of a task without starting its shim."""
        folder = self.tasks / str(number)
        folder.mkdir(parents=True)
        command = Command(arguments, {"PATH": os.environ["PATH"]})
        machine = LocalMachine(None)
        executor = ShimExecutor(machine, Clock(), self.tasks, str)
        executor._write_spec(folder, command, Bounds(grace))
        return folder

    def sh(self, text: str, number: int = 1, grace: float = 5) -> Tree:
        """Start a shell command."""
        return self("/bin/sh", "-c", text, number=number, grace=grace)

    def python(self, text: str, number: int = 1, grace: float = 5) -> Tree:
        """Start a Python script."""
        return self(PYTHON, "-I", "-S", "-c", text, number=number, grace=grace)

    def end(self) -> None:
        """End all shims and all printed processes."""
        for tree in self.trees:
            for key in tree.printed:
                send(key, signal.SIGKILL)
            send(tree.key, signal.SIGCONT, signal.SIGTERM)
            tree.wait()
