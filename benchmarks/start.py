"""The time of a shim: from its spawn for ``/bin/true`` to its end."""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import define
from twisted.internet.interfaces import IReactorProcess
from twisted.internet.task import Clock
from zope.interface import implementer

from benchmarks.measure import Line, compare, in_turn
from benchmarks.place import PYTHON, Place
from pulsar_api.execution.executor import ShimExecutor
from pulsar_api.execution.local_machine import LocalMachine
from pulsar_api.execution.results import read_exit
from pulsar_api.tasks.interfaces import Bounds
from pulsar_api.tasks.model import Command, Exit

TRUE = "/bin/true"
REPEAT = 8
"""Starts of each kind per round, in turn."""


def spawn(arguments: Sequence[str], environment: Mapping[str, str]) -> float:
    """Start a program, wait for its end, and return the milliseconds."""
    null = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in range(3)]
    begin = time.perf_counter()
    pid = os.posix_spawn(arguments[0], list(arguments), environment, file_actions=null)
    _, status = os.waitpid(pid, 0)
    took = (time.perf_counter() - begin) * 1000
    assert status == 0, arguments
    return took


@implementer(IReactorProcess)
@define
class Spawner:
    """Replaces the reactor of an executor: it starts a process and waits for its end."""

    took: float = 0.0

    def spawnProcess(
        self,
        processProtocol: object,
        executable: Any,
        args: Any = (),
        env: Any = None,
        path: object = None,
        uid: object = None,
        gid: object = None,
        usePTY: object = False,  # noqa: FBT002 - the interface's
        childFDs: object = None,
    ) -> Any:
        """Time the process that `ShimExecutor` starts."""
        self.took = spawn(args, env)


class IgnoringSink:
    """A sink that ignores the reports of a run."""

    def started(self, pid: int) -> None:
        """Ignore it."""

    def printed(self, size: int) -> None:
        """Ignore it."""

    def ended(self, exit: Exit) -> None:
        """Ignore it."""


@define
class Shims:
    """Starts shims as the daemon does, with a folder for each."""

    folder: Path
    number: int = 0

    def start(self) -> float:
        """Return the milliseconds of one run, to its result synced to disk."""
        self.number += 1
        spawner = Spawner()
        machine = LocalMachine(spawner)
        executor = ShimExecutor(machine, Clock(), self.folder, str)
        (self.folder / str(self.number)).mkdir(parents=True)
        command = Command((TRUE,), dict(os.environ))
        executor.start(self.number, command, Bounds(10.0), IgnoringSink())
        exit = read_exit(machine, self.folder / str(self.number))
        assert exit is not None
        assert exit.code == 0
        return spawner.took


def run(place: Place, rounds: int) -> list[Line]:
    """Compare with a start without a shim, and with an interpreter that does nothing."""
    shims = Shims(place.folder / "tasks")
    ours, true, python = in_turn(
        rounds * REPEAT,
        shims.start,
        lambda: spawn((TRUE,), os.environ),
        lambda: spawn((*PYTHON, "-c", "pass"), os.environ),
    )
    return [
        compare("shim for /bin/true / posix_spawn", "ms", ours, true),
        compare("shim for /bin/true / python -I -S", "ms", ours, python),
    ]
