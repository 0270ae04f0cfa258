"""Tests of kills by HTTP: no process of the task is left, and the task has the reason."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from uuid import uuid4

import pytest
from attrs import define, field

from pulsar_api.execution import proc, processes
from pulsar_api.execution.sessions import read_sessions
from pulsar_api.output.files import Output
from pulsar_api.shim import shim
from tests.integration import zygote
from tests.integration.conftest import Start
from tests.integration.daemon import (
    PATIENCE,
    PULSAR_API,
    SHELL,
    Daemon,
    Poll,
    marked,
    shim_of,
    wait_for,
)

GRACE = 2
LATE = 1.0
"""Seconds after the grace within which no process of a task is left."""
NOISE = 2.0
"""Seconds that a busy machine with two cores may add.

The shim needs milliseconds between TERM and the result, and the times in its files include
neither HTTP nor the daemon. So this covers only the wait for a processor.
"""


@define
class Victim:
    """A task whose processes the test can find."""

    daemon: Daemon
    number: int
    mark: str

    def left(self) -> list[int]:
        """Return the numbers of its live processes."""
        return marked(f"PULSAR_VAR_mark={self.mark}")

    def ready(self) -> None:
        """Wait until the task has printed ``ready``."""
        path = self.daemon.output_file(self.number)
        wait_for(lambda: path.exists() and b"ready" in path.read_bytes(), "ready")

    def kill(self) -> dict[str, object]:
        """Kill the task by HTTP, wait for its end and return it."""
        answer = self.daemon.get(f"/task/{self.number}/kill")
        assert answer.status == 200
        return self.daemon.ended(self.number)

    def took(self) -> float:
        """Return the seconds from TERM to the result, by the times in the task's files."""
        folder = self.daemon.output_file(self.number).parent
        records = list(Output(folder).records())
        clock = next(r for r in records if r.code == shim.CLOCK)
        term = next(r for r in records if r.code == shim.TERM_SENT)
        asked = (clock.number - clock.at + term.at) / 1000
        return (folder / "exit").stat().st_mtime - asked


@define
class Victims:
    """A function that starts lines of shell as tasks of one daemon."""

    daemon: Daemon
    started: list[Victim] = field(factory=list)

    def __call__(self, run: str) -> Victim:
        """Start a task."""
        mark = uuid4().hex
        self.started.append(Victim(self.daemon, self.daemon.sh(run, mark=mark), mark))
        return self.started[-1]


OPTIONS = ("--command", SHELL, "--kill-grace", str(GRACE))


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """Return a daemon with a short grace period, shared by the tests."""
    daemon = Daemon(tmp_path_factory.mktemp("daemon"), *OPTIONS)
    yield daemon
    daemon.stop()


@pytest.fixture
def victims(daemon: Daemon) -> Victims:
    """Return a function that starts tasks."""
    return Victims(daemon)


@pytest.fixture
def mortal(start: Start) -> Victims:
    """Return such a function with a daemon of its own, which the test can kill."""
    return Victims(start(*OPTIONS))


OBEDIENT = {
    "itself": "echo ready; exec sleep 300",
    "child": "sleep 300 & echo ready; wait",
    "grandchild": "sh -c 'sleep 300 & echo ready; wait' & wait",
    "own session": "setsid sh -c 'sleep 300 & echo ready; wait' & wait",
    "orphan": "sh -c 'setsid sleep 300 >/dev/null 2>&1 &'; echo ready; exec sleep 300",
    "stopped": "echo ready; kill -STOP $$; sleep 300",
    "stopped child": "sh -c 'echo ready; kill -STOP $$; sleep 300' & wait",
}
STUBBORN = {
    "itself": "trap '' TERM; echo ready; while :; do sleep 0.05; done",
    "child": "sh -c 'trap \"\" TERM; echo ready; while :; do sleep 0.05; done' & wait",
    "own session": (
        "setsid sh -c 'trap \"\" TERM; echo ready; while :; do sleep 0.05; done' & wait"
    ),
    "stopped": "trap '' TERM; echo ready; kill -STOP $$; while :; do sleep 0.05; done",
    "daemon": (
        "sh -c 'trap \"\" TERM HUP; cd /; setsid sleep 300 </dev/null >/dev/null 2>&1 &';"
        "echo ready; exec sleep 300"
    ),
}


@pytest.mark.parametrize("script", OBEDIENT.values(), ids=OBEDIENT.keys())
def test_a_kill_ends_a_task_that_obeys_term_at_once(victims: Victims, script: str) -> None:
    """All its processes are gone when the task has ended, long before the grace is over."""
    victim = victims(script)
    victim.ready()
    ended = victim.kill()
    assert victim.left() == []
    assert (ended["status"], ended["exitCode"]) == ("killed", None)
    assert ended["signal"] == "SIGTERM"
    assert ended["reason"] == "Killed by 127.0.0.1."
    assert victim.took() < LATE + NOISE


@pytest.mark.parametrize("script", STUBBORN.values(), ids=STUBBORN.keys())
def test_a_kill_ends_a_task_that_ignores_term_after_the_grace(
    victims: Victims, script: str
) -> None:
    """No process is left a second later, and the reason says that KILL was sent."""
    victim = victims(script)
    victim.ready()
    ended = victim.kill()
    assert victim.left() == []
    assert ended["status"] == "killed"
    assert ended["reason"] == "Killed by 127.0.0.1; TERM was not enough, KILL was sent."
    assert GRACE - 0.1 < victim.took() < GRACE + LATE + NOISE


@pytest.mark.parametrize("code", [0, 1, 143])
def test_a_killed_task_is_killed_whatever_its_exit_code(
    victims: Victims, code: int
) -> None:
    """The status is ``killed`` even if the task answers TERM with exit code 0.

    The code is kept.
    """
    victim = victims(
        f"trap 'echo bye; exit {code}' TERM; echo ready; while :; do sleep 0.05; done"
    )
    victim.ready()
    ended = victim.kill()
    assert (ended["status"], ended["exitCode"], ended["signal"]) == ("killed", code, None)
    assert "bye\n" in victim.daemon.task(victim.number)["output"]
    assert victim.left() == []


def test_a_task_killed_after_the_end_of_its_command_is_killed(victims: Victims) -> None:
    """The task still runs while a child holds its output, so a kill ends it."""
    victim = victims("while :; do echo ready; sleep 0.2; done & exit 0")
    victim.ready()
    time.sleep(1)
    ended = victim.kill()
    assert victim.left() == []
    assert (ended["status"], ended["exitCode"]) == ("killed", 0)
    assert ended["reason"] == "Killed by 127.0.0.1."


def test_a_kill_does_not_affect_other_tasks(victims: Victims) -> None:
    """A task with the same command keeps running."""
    script = "echo ready; exec sleep 300"
    victim, other = victims(script), victims(script)
    victim.ready()
    other.ready()
    alive = other.left()
    victim.kill()
    assert other.left() == alive
    assert other.daemon.task(other.number)["status"] == "running"
    assert other.kill()["status"] == "killed"
    assert other.left() == []


def test_a_long_poll_on_a_killed_task_is_answered(victims: Victims) -> None:
    """Each kill answers with the task, also when it is repeated."""
    victim = victims("echo ready; exec sleep 300")
    victim.ready()
    state = Poll(victim.daemon, f"/task/{victim.number}/state")
    for method in ("POST", "GET", "POST"):
        answer = victim.daemon.request(method, f"/task/{victim.number}/kill")
        assert (answer.status, answer.json()["id"]) == (200, victim.number)
    answer = state.answer()
    assert answer.json()["changed"] is True
    assert answer.json()["task"]["status"] == "killed"


def test_a_kill_of_an_ended_task_changes_nothing(victims: Victims) -> None:
    """The response is the task as it is."""
    victim = victims("echo ready; exit 3")
    before = victim.daemon.ended(victim.number)
    after = victim.daemon.get(f"/task/{victim.number}/kill?output=none")
    assert (after.status, after.json()) == (200, before)
    assert victim.daemon.ended(victim.number) == before


def test_a_kill_around_the_end_of_a_task_is_no_error(victims: Victims) -> None:
    """The result can already be on the disk when the daemon gets the kill."""
    with closing(victims.daemon.connect()) as connection:
        for _ in range(30):
            victim = victims("exit 3")
            result = victim.daemon.output_file(victim.number).with_name("exit")
            end = time.monotonic() + PATIENCE
            while not result.exists():  # no pause, because the moment is short
                assert time.monotonic() < end
            connection.request("POST", f"/task/{victim.number}/kill?output=none")
            answer = connection.getresponse()
            body = answer.read()
            assert answer.status == 200, body
            ended = victim.daemon.ended(victim.number)
            assert (ended["status"], ended["exitCode"]) == ("failed", 3)


def test_a_kill_right_after_the_creation_leaves_no_process(victims: Victims) -> None:
    """The kill can meet the record, the starting shim, or the command."""
    for _ in range(10):
        victim = victims("echo ready; exec sleep 300")
        assert victim.kill()["status"] == "killed"
        assert victim.left() == []


def test_a_killed_task_that_waits_never_starts(start: Start) -> None:
    """The task before it keeps running."""
    daemon = start("--command", SHELL, "--max-running", "1")
    victims = Victims(daemon)
    first, second = victims("echo ready; exec sleep 300"), victims("echo ready")
    first.ready()
    ended = second.kill()
    assert (ended["status"], ended["pid"], ended["startedAt"]) == ("killed", None, None)
    assert ended["reason"] == "Killed by 127.0.0.1 before it started."
    assert not daemon.output_file(second.number).exists()
    assert daemon.task(first.number)["status"] == "running"
    first.kill()


def test_a_task_of_an_earlier_daemon_can_be_killed(mortal: Victims) -> None:
    """After a ``kill -9`` of the daemon, the next daemon ends the whole process tree."""
    victim = mortal(STUBBORN["own session"])
    victim.ready()
    victim.daemon.kill()
    assert victim.left() != []
    victim.daemon.start()
    ended = victim.kill()
    assert victim.left() == []
    assert ended["status"] == "killed"
    assert victim.took() < GRACE + LATE + NOISE


def test_a_restart_does_not_forget_a_kill(mortal: Victims) -> None:
    """The daemon dies during the grace period.

    The task is killed, and the reason has the caller.
    """
    victim = mortal(STUBBORN["child"])
    victim.ready()
    answer = victim.daemon.get(f"/task/{victim.number}/kill")
    assert answer.json()["reason"] == "Kill asked for by 127.0.0.1."
    victim.daemon.kill()
    victim.daemon.start()
    ended = victim.daemon.ended(victim.number)
    assert victim.left() == []
    assert ended["status"] == "killed"
    assert str(ended["reason"]).startswith("Killed by 127.0.0.1")


def test_a_term_signal_to_the_shim_kills_the_task(victims: Victims) -> None:
    """The daemon uses the same signal."""
    victim = victims("echo ready; exec sleep 300")
    victim.ready()
    os.kill(shim_of(victim.daemon.output_file(victim.number).parent), 15)
    ended = victim.daemon.ended(victim.number)
    assert ended["status"] == "killed"
    assert "a signal that somebody sent" in str(ended["reason"])
    assert victim.left() == []


def test_time_limits_end_the_whole_process_tree(start: Start) -> None:
    """The task has failed, and its reason names the option."""
    slow = Victims(start(*OPTIONS, "--task-timeout", "1"))
    quiet = Victims(start(*OPTIONS, "--silence-timeout", "1"))
    begin = time.time()
    for victims, word in ((slow, "--task-timeout"), (quiet, "--silence-timeout")):
        victim = victims("sleep 300 & echo ready; wait")
        ended = victim.daemon.ended(victim.number)
        assert ended["status"] == "failed"
        assert word in str(ended["reason"])
        assert victim.left() == []
        assert victim.took() < LATE + NOISE
    assert time.time() - begin > 2


def test_an_ended_task_leaves_no_entry_in_the_process_table(mortal: Victims) -> None:
    """Neither a shim nor a zombie stays, whether the task was killed or not."""
    for script in ("exit 0", "sleep 300 & echo ready; wait"):
        victim = mortal(script)
        if "ready" in script:
            victim.ready()
            victim.kill()
        victim.daemon.ended(victim.number)
    launcher = mortal.daemon.launcher()

    def children(pid: int) -> list[int]:
        paths = list(Path(f"/proc/{pid}/task").glob("*/children"))
        assert paths
        return [int(child) for path in paths for child in path.read_text().split()]

    wait_for(
        lambda: children(mortal.daemon.process.pid) == [launcher],
        "the daemon to have no child but the launcher",
    )
    wait_for(lambda: children(launcher) == [], "the launcher to have no child")


# -- shims that are killed or stopped

CLEARED = {
    "environment": "echo $$; exec env -i sleep 300",
    "session": "(setsid env -i sh -c 'echo $$; exec sleep 300' &); exec sleep 300",
    "daemon": (
        "(setsid env -i sh -c 'sh -c \"echo \\$\\$; exec sleep 300\" &' &); exec sleep 300"
    ),
    "name": (
        'perl -e \'use POSIX; fork and exit; setsid; %ENV = (); $0 = "x" x 9000;'
        '$| = 1; print "$$\\n"; sleep 300\'; exec sleep 300'
    ),
}


def printed(victim: Victim) -> proc.Key:
    """Wait until a task has printed a process id, and return that process."""
    path = victim.daemon.output_file(victim.number)
    wait_for(lambda: path.exists() and path.read_text().endswith("\n"), "the process")
    found = proc.Entry.of(int(path.read_text()))
    assert found is not None
    return found.key


def watcher(victim: Victim) -> int:
    """Return the process id of a task's shim."""
    lock = victim.daemon.output_file(victim.number).with_name("lock")
    return int(lock.read_text().split()[0])


@pytest.mark.parametrize("script", CLEARED.values(), ids=CLEARED.keys())
def test_a_task_whose_shim_was_killed_leaves_no_process(
    mortal: Victims, script: str
) -> None:
    """The processes have cleared the environment, or changed the session or name."""
    victim = mortal(script)
    process = printed(victim)
    try:
        os.kill(watcher(victim), signal.SIGKILL)
        assert victim.daemon.ended(victim.number)["status"] == "lost"
        assert not proc.lives(process)
        assert victim.left() == []
    finally:
        proc.send(process, signal.SIGKILL)


@pytest.mark.parametrize("script", CLEARED.values(), ids=CLEARED.keys())
def test_the_next_daemon_ends_processes_of_a_killed_shim(
    mortal: Victims, script: str
) -> None:
    """The daemon is killed together with the shim, some seconds after the start."""
    victim = mortal(script)
    process = printed(victim)
    entry = proc.Entry.of(process[0])
    assert entry is not None
    folder = victim.daemon.output_file(victim.number).parent
    try:
        wait_for(lambda: entry.session in read_sessions(folder), "the look of the daemon")
        victim.daemon.kill()
        os.kill(watcher(victim), signal.SIGKILL)
        victim.daemon.start()
        assert victim.daemon.ended(victim.number)["status"] == "lost"
        assert not proc.lives(process)
        assert victim.left() == []
    finally:
        proc.send(process, signal.SIGKILL)


STOPS = {
    "once": "kill -STOP $PPID; sleep 300",
    "again and again": (
        "trap '' TERM; for i in $(seq 6000); do kill -STOP $PPID; sleep 0.01; done"
    ),
    "from a session without environment": (
        "(setsid env -i SHIM=$PPID sh -c \"trap '' TERM;"
        " for i in \\$(/usr/bin/seq 6000); do"
        ' kill -STOP \\$SHIM; sleep 0.01; done" &); exec sleep 300'
    ),
}


@pytest.mark.parametrize("restart", ["same", "next"])
@pytest.mark.parametrize("script", STOPS.values(), ids=STOPS.keys())
def test_a_task_that_stops_its_shim_can_be_killed(
    start: Start, script: str, restart: str
) -> None:
    """The daemon wakes the shim. If that is not enough, the daemon ends the task itself."""
    options = ("--command", SHELL, "--kill-grace=1", "--max-running-per-target=1")
    victims = Victims(start(*options))
    victim = victims(script)
    lock = victim.daemon.output_file(victim.number).with_name("lock")
    wait_for(lambda: lock.exists() and lock.read_bytes(), "the shim")
    watched = proc.Entry.of(watcher(victim))
    assert watched is not None
    try:
        stat = Path(f"/proc/{watched.pid}/stat")
        wait_for(lambda: b") T " in stat.read_bytes(), "the stop")
        if restart == "next":
            victim.daemon.kill()
            victim.daemon.start()
        assert victim.daemon.post(f"/task/{victim.number}/kill").status == 200
        wait_for(lambda: victim.daemon.task(victim.number)["endedAt"], "the end")
        ended = victim.daemon.task(victim.number)
        assert ended["status"] == "killed"
        assert str(ended["reason"]).startswith("Killed by 127.0.0.1")
        assert victim.left() == []
        assert not proc.lives(watched.key)
        assert victims.daemon.ended(victims("exit 0").number)["status"] == "finished"
    finally:
        processes.end_tree(watched.key)


@pytest.mark.parametrize("option", ["--task-timeout", "--silence-timeout"])
@pytest.mark.parametrize("how", ["once", "again and again"])
def test_a_time_limit_ends_a_task_whose_shim_is_stopped(
    start: Start, how: str, option: str
) -> None:
    """The daemon watches both limits too."""
    victims = Victims(start("--command", SHELL, "--kill-grace=1", option, "2"))
    victim = victims(STOPS[how])
    lock = victim.daemon.output_file(victim.number).with_name("lock")
    wait_for(lambda: lock.exists() and lock.read_bytes(), "the shim")
    watched = proc.Entry.of(watcher(victim))
    assert watched is not None
    try:
        ended = victim.daemon.ended(victim.number)
        assert (ended["status"], ended["exitCode"]) == ("failed", None)
        assert option in str(ended["reason"])
        assert victim.left() == []
        assert not proc.lives(watched.key)
    finally:
        processes.end_tree(watched.key)


def test_end_tasks_ends_a_task_whose_shim_is_stopped(
    mortal: Victims,
) -> None:
    """The command wakes the shim so that the shim gets the signal."""
    victim = mortal("echo ready; exec sleep 300")
    victim.ready()
    number = watcher(victim)
    os.kill(number, signal.SIGSTOP)
    victim.daemon.kill()
    end = [*PULSAR_API, "end-tasks", "--state-dir", str(victim.daemon.state)]
    try:
        zygote.run(end, check=True, timeout=PATIENCE, stdout=subprocess.DEVNULL)
        wait_for(lambda: not victim.left(), "the end of the task")
    finally:
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGCONT)
    victim.daemon.start()
    assert victim.daemon.ended(victim.number)["status"] == "killed"
