"""Cgroups of tasks, as far as a plain folder can stand for a tree of them."""

import os
from pathlib import Path

import pytest
from twisted.internet.task import Clock

from pulsar_api import cgroups
from pulsar_api.cgroups import Cgroups
from pulsar_api.machine import LocalMachine
from pulsar_api.ports import Bounds
from pulsar_api.process import ShimExecutor
from pulsar_api.task import Account, Command, Exit

LIMITS = (("memory.max", "67108864"), ("pids.max", "20"))


class Ends:
    """A sink that keeps the result."""

    def __init__(self) -> None:
        self.exits: list[Exit] = []

    def started(self, pid: int) -> None:
        """Fail: nothing may start."""
        raise AssertionError(pid)

    def printed(self, size: int) -> None:
        """Fail as well."""
        raise AssertionError(size)

    def ended(self, exit: Exit) -> None:
        """Keep the result."""
        self.exits.append(exit)


def test_name_differs_for_each_permit() -> None:
    """A restored state has other permits, and so no part in the cgroups of its past."""
    names = {cgroups.name(47, "one"), cgroups.name(47, "another"), cgroups.name(48, "one")}
    assert len(names) == 3
    assert cgroups.name(47, "one") == cgroups.name(47, "one")


def test_start_sets_limits_again(tmp_path: Path) -> None:
    """The unit lifts them after a stop."""
    found = Cgroups(tmp_path, -1)
    place = Path(found.make("task-1-x", LIMITS))
    (place / "cgroup.events").write_text("populated 1\n")
    (place / "memory.max").write_text("max")
    found._tidy()
    assert (place / "memory.max").read_text() == "67108864"


@pytest.mark.parametrize("limits", ["[", '[["memory.max"]]', '"text"', "[1]", "{}"])
def test_start_ignores_damaged_limits(tmp_path: Path, limits: str) -> None:
    """A task that runs as the daemon can change the attribute of its cgroup."""
    found = Cgroups(tmp_path, -1)
    place = Path(found.make("task-1-x", ()))
    (place / "cgroup.events").write_text("populated 1\n")
    os.setxattr(place, "user.pulsar-api.limits", limits.encode())
    found._tidy()
    assert place.exists()


def test_start_writes_no_file_but_limits(tmp_path: Path) -> None:
    """The attribute could name any file of the host."""
    found = Cgroups(tmp_path, -1)
    place = Path(found.make("task-1-x", ()))
    (place / "cgroup.events").write_text("populated 1\n")
    forged = f'[["../../{tmp_path.name}/victim", "harm"], ["cgroup.procs", "1"]]'
    os.setxattr(place, "user.pulsar-api.limits", forged.encode())
    found._tidy()
    assert not (tmp_path / "victim").exists()
    assert not (place / "cgroup.procs").exists()


def test_task_without_its_limits_does_not_start(tmp_path: Path) -> None:
    """The result names the reason."""
    clock, sink = Clock(), Ends()
    executor = ShimExecutor(LocalMachine(None), clock, tmp_path, str)
    account = Account("games", 5, 60, (60,), "/", None, LIMITS)
    executor.start(1, Command(("true",), {}, account=account), Bounds(5), sink, "permit")
    clock.advance(0)
    [exit] = sink.exits
    assert exit.error is not None
    assert "limits cannot be set" in exit.error
    assert not exit.passing
