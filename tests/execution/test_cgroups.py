"""Tests of the cgroups of tasks, as far as a plain folder can stand for them."""

import os
from pathlib import Path

import pytest
from twisted.internet import reactor
from twisted.internet.task import Clock

from pulsar_api.execution import cgroups
from pulsar_api.execution.cgroups import Cgroups
from pulsar_api.execution.executor import ShimExecutor
from pulsar_api.execution.local_machine import LocalMachine
from pulsar_api.shim import shim
from pulsar_api.tasks.interfaces import Bounds
from pulsar_api.tasks.model import Account, Command, Exit

LIMITS = (("memory.max", "67108864"), ("pids.max", "20"))


class Ends:
    """A sink that keeps the result."""

    def __init__(self) -> None:
        self.exits: list[Exit] = []

    def started(self, pid: int) -> None:
        """Fail, because nothing may start."""
        raise AssertionError(pid)

    def printed(self, size: int) -> None:
        """Fail, because nothing may print."""
        raise AssertionError(size)

    def ended(self, exit: Exit) -> None:
        """Keep the result."""
        self.exits.append(exit)


def test_the_name_differs_for_each_permit() -> None:
    """A task of a restored state gets another cgroup than the one that ran before."""
    permits = ["boot a\npermit 5 100", "boot b\npermit 5 100", "boot a\npermit 6 100"]
    names = {cgroups.name(47, permit) for permit in permits}
    assert len(names | {cgroups.name(48, permits[0])}) == 4


async def test_the_name_is_known_from_the_folder(tmp_path: Path) -> None:
    """The permit has another file name as soon as a shim has started."""
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    machine = LocalMachine(reactor)
    executor = ShimExecutor(machine, Clock(), tasks, str)
    permit = await executor.permit(1)
    assert executor.cgroup(1) == cgroups.name(1, permit)
    (tasks / "1" / "start").rename(tasks / "1" / "begun")
    assert executor.cgroup(1) == cgroups.name(1, permit)
    (tasks / "1" / "begun").unlink()
    assert executor.cgroup(1) == ""


MOUNTS = """\
22 1 8:1 / / rw,relatime - ext4 /dev/root rw
23 22 0:21 / /media/caf\xe9 rw - tmpfs none rw
31 22 0:26 {root} {at} rw,nosuid shared:9 - cgroup2 cgroup2 rw
"""


@pytest.mark.parametrize(
    ("root", "at", "inside", "expected"),
    [
        ("/", "tree", "/unit", "tree/unit"),
        ("/", "a\\040tree", "/unit/daemon", "a tree/unit"),
        ("/unit", "tree", "/unit", "tree"),
        ("/another", "tree", "/unit", None),
        ("/", "tree", "/unmarked", None),
        ("/", "tree", "/unit/below", None),
        ("/", "nowhere", "/unit", None),
    ],
)
def test_delegated_finds_the_marked_cgroup(
    tmp_path: Path, root: str, at: str, inside: str, expected: str | None
) -> None:
    """It reads mounts with any name, and follows no path outside the mounted tree."""
    for name in ("tree", "a tree", "tree/unit", "a tree/unit"):
        path = tmp_path / name
        path.mkdir()
        for file in ("cgroup.procs", "cgroup.kill"):
            (path / file).touch()
        os.setxattr(path, "user.delegate", b"1")
    for name in ("tree/unmarked", "tree/unit/below", "a tree/unit/daemon"):
        (tmp_path / name).mkdir()
    text = MOUNTS.format(root=root, at=tmp_path / at)
    (tmp_path / "mountinfo").write_bytes(text.encode("latin-1"))
    (tmp_path / "cgroup").write_bytes(f"3:cpuset:/\n0::{inside}\n".encode())
    found = cgroups.delegated(tmp_path)
    assert found == (None if expected is None else tmp_path / expected)


def test_nested_cgroups_are_found_at_any_depth(tmp_path: Path) -> None:
    """A task that runs as the daemon can create them."""
    found = Cgroups(tmp_path, -1)
    place = Path(found.make("task-1-x", ()))
    inner = place
    for _ in range(1200):
        inner /= "c"
        inner.mkdir()
        (inner / "cgroup.procs").touch()
    (place / "cgroup.procs").touch()
    assert list(cgroups._members(place)) == []
    folders = shim.cgroup_tree(os.fsencode(place))
    assert len(folders) == 1201
    for folder in reversed(folders):  # too deep for the clean-up of pytest
        os.unlink(folder + b"/cgroup.procs")
        os.rmdir(folder)


def test_sub_cgroups_are_removed(tmp_path: Path) -> None:
    """Containers create some for themselves."""
    found = Cgroups(tmp_path, -1)
    place = Path(found.make("task-1-x", ()))
    (place / "of a container" / "deeper").mkdir(parents=True)
    cgroups._remove(place)
    assert not place.exists()


def test_a_start_sets_limits_again(tmp_path: Path) -> None:
    """The unit lifts them after a stop."""
    found = Cgroups(tmp_path, -1)
    place = Path(found.make("task-1-x", ()))
    for file, _ in LIMITS:
        (place / file).touch()
    found.make("task-1-x", LIMITS)
    (place / "cgroup.events").write_text("populated 1\n")
    (place / "memory.max").write_text("max")
    found._tidy(0.0)
    assert (place / "memory.max").read_text() == "67108864"


@pytest.mark.parametrize("limits", ["", "[" * 60000, "\0", "memory.max", "\n\n x 1"])
def test_a_start_ignores_damaged_limits(tmp_path: Path, limits: str) -> None:
    """A task that runs as the daemon can change the attribute of its cgroup."""
    found = Cgroups(tmp_path, -1)
    place = Path(found.make("task-1-x", ()))
    (place / "cgroup.events").write_text("populated 1\n")
    try:
        os.setxattr(place, "user.pulsar-api.limits", limits.encode())
    except OSError:  # this file system allows less than a cgroup does
        os.setxattr(place, "user.pulsar-api.limits", limits[:1000].encode())
    found._tidy(0.0)
    assert place.exists()


def test_a_start_writes_no_file_but_limits(tmp_path: Path) -> None:
    """The attribute could name any file of the host."""
    found = Cgroups(tmp_path, -1)
    place = Path(found.make("task-1-x", ()))
    (place / "cgroup.events").write_text("populated 1\n")
    forged = f"../../{tmp_path.name}/victim harm\ncgroup.procs 1\n"
    os.setxattr(place, "user.pulsar-api.limits", forged.encode())
    found._tidy(0.0)
    assert not (tmp_path / "victim").exists()
    assert not (place / "cgroup.procs").exists()


def test_a_task_whose_limits_cannot_be_set_does_not_start(tmp_path: Path) -> None:
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
