"""Tests of a daemon whose launcher is killed or stopped."""

import os
import random
import signal
import sqlite3
import sys
import time
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

import pytest

from pulsar_api.execution.proc import Entry
from tests.integration.conftest import Start
from tests.integration.daemon import SHELL, Daemon, shim_of, wait_for
from tests.shims import with_argument

NOTE = 'echo "$PULSAR_VAR_name" >> "$PULSAR_VAR_file"'


PATIENT = (
    *(
        "import runpy, sys",
        "from pulsar_api.execution import launcher",
        "launcher.DEATHS = 1000",
    ),
    *("sys.argv[0] = 'pulsar_api'", "runpy.run_module('pulsar_api', run_name='__main__')"),
)
"""A daemon that always starts a new launcher, however often it dies."""


@pytest.fixture
def daemon(start: Start) -> Daemon:
    """Return a daemon with a working launcher."""
    program = (sys.executable, "-c", "; ".join(PATIENT))
    options = ("--command", SHELL, "--kill-grace=1", "--max-running=40")
    daemon = start(*options, program=program)
    forks(daemon)
    return daemon


def forks(daemon: Daemon) -> None:
    """Wait until the launcher forks shims."""

    def forked() -> bool:
        number = daemon.sh("sleep 60", env=f"try{time.monotonic_ns()}")
        parent = shim_that_runs(daemon, number).parent
        assert daemon.get(f"/task/{number}/kill").status == 200
        daemon.ended(number)
        return parent == daemon.launcher()

    wait_for(forked, "a launcher that works", 20)


def shim_that_runs(daemon: Daemon, number: int) -> Entry:
    """Wait until the command of a task runs, and return its shim."""
    wait_for(lambda: daemon.task(number)["pid"], "a command", 20)
    found = Entry.of(shim_of(daemon.state / "tasks" / str(number)))
    assert found is not None
    return found


def gone(process: Path) -> bool:
    """Return whether a process has ended. It can be a zombie."""
    try:
        return ") Z " in (process / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


def descriptors(daemon: Daemon) -> int:
    """Return the number of open descriptors of the daemon, without its sockets."""
    count = 0
    for path in Path(f"/proc/{daemon.process.pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            count += not os.readlink(path).startswith("socket")
    return count


def test_repeated_kills_of_the_launcher_lose_no_task(
    daemon: Daemon, tmp_path: Path
) -> None:
    """Tasks are running and starting meanwhile. Each starts once and has its own result."""
    chance = random.Random(7)
    file, go = tmp_path / "starts", tmp_path / "go"
    before = descriptors(daemon)
    numbers = {}
    for turn in range(12):
        for n in range(5):
            name, code = f"{turn}.{n}", (turn * 5 + n) % 100
            wait = f"while ! [ -e {go} ]; do sleep 0.02; done; " if n == 0 else ""
            run = f"{NOTE}; {wait}echo {name}; exit {code}"
            numbers[daemon.sh(run, env=name, name=name, file=str(file))] = name, code
        time.sleep(chance.uniform(0, 0.05))
        os.kill(daemon.launcher(), signal.SIGKILL)
    go.touch()
    for number, (name, code) in numbers.items():
        task = daemon.ended(number)
        assert (task["exitCode"], task["reason"], task["signal"]) == (code, None, None)
        assert daemon.output_file(number).read_text() == f"{name}\n"
    assert sorted(file.read_text().split()) == sorted(name for name, _ in numbers.values())
    wait_for(lambda: descriptors(daemon) <= before + 1, "the end of all pipes", 20)
    assert "Traceback" not in daemon.log.read_text()


def test_the_daemon_adopts_the_shims_of_a_dead_launcher(daemon: Daemon) -> None:
    """The shims become its children, so it can kill them and learns of their end."""
    numbers = [daemon.sh("echo $$; sleep 60", env=f"env{n}") for n in range(3)]
    shims = [shim_that_runs(daemon, number) for number in numbers]
    os.kill(daemon.launcher(), signal.SIGKILL)
    forks(daemon)
    for shim in shims:
        entry = Entry.of(shim.pid)
        assert entry is not None
        assert (entry.key, entry.parent) == (shim.key, daemon.process.pid)
    # The end of one shim does not affect the others.
    os.kill(shims[0].pid, signal.SIGKILL)
    assert daemon.ended(numbers[0])["status"] == "lost"
    assert daemon.get(f"/task/{numbers[1]}/kill").status == 200
    assert daemon.ended(numbers[1])["status"] == "killed"
    assert daemon.task(numbers[2])["status"] == "running"
    wait_for(lambda: Entry.of(shims[1].pid) is None, "no zombie", 20)


def test_a_stopped_launcher_delays_a_start_by_seconds(
    daemon: Daemon, tmp_path: Path
) -> None:
    """The daemon then kills the launcher and starts the task without it, once."""
    file = tmp_path / "starts"
    os.kill(daemon.launcher(), signal.SIGSTOP)
    begin = time.monotonic()
    ended = daemon.ended(daemon.sh(f"{NOTE}; exit 3", name="one", file=str(file)))
    assert time.monotonic() < begin + 20
    assert (ended["exitCode"], file.read_text()) == (3, "one\n")
    assert "does not answer" in daemon.log.read_text()
    forks(daemon)


def test_the_launcher_ends_with_the_daemon(daemon: Daemon) -> None:
    """It ends on SIGKILL and SIGTERM of the daemon, and tasks keep running."""
    number = daemon.sh("sleep 0.5; exit 3")
    shim_that_runs(daemon, number)
    for end in (signal.SIGKILL, signal.SIGTERM):
        launcher = daemon.launcher()
        daemon.process.send_signal(end)
        daemon.process.wait(20)
        proc = Path(f"/proc/{launcher}")
        wait_for(partial(gone, proc), "the end of the launcher", 20)
        daemon.start()
    assert daemon.ended(number)["exitCode"] == 3


def test_a_launcher_that_resumes_late_starts_nothing_twice(
    daemon: Daemon, tmp_path: Path
) -> None:
    """The launcher is stopped with starts to do, its daemon is killed, then it resumes."""
    file = tmp_path / "starts"
    old = daemon.launcher()
    os.kill(old, signal.SIGSTOP)
    names = [f"n{n}" for n in range(5)]
    numbers = [
        daemon.sh(f"{NOTE}; exit 3", env=name, name=name, file=str(file)) for name in names
    ]

    def recorded() -> bool:
        """Return whether all starts are recorded.

        The API shows none of them before the launcher has answered.
        """
        with closing(sqlite3.connect(daemon.state / "pulsar-api.db")) as db:
            rows = db.execute("SELECT count(*) FROM task WHERE status = 'running'")
            return bool(rows.fetchone()[0] == len(numbers))

    wait_for(recorded, "the record", 4)
    daemon.kill()
    daemon.start()
    ends = [daemon.ended(number) for number in numbers]
    assert [(end["status"], end["exitCode"]) for end in ends] == [("failed", 3)] * 5
    os.kill(old, signal.SIGCONT)
    wait_for(partial(gone, Path(f"/proc/{old}")), "the end of the old launcher", 20)
    wait_for(lambda: not with_argument(f"{daemon.state}/tasks/"), "the late shims", 20)
    assert sorted(file.read_text().split()) == names
