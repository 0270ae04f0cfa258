"""Tests of the orphans of a killed shim, with real shims and processes."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from uuid import uuid4

import pytest

from pulsar_api.execution import history as process_history
from pulsar_api.execution import proc
from pulsar_api.execution.history import ProcessHistory
from pulsar_api.execution.orphans import MARK
from pulsar_api.execution.proc import Entry, Table, lives
from pulsar_api.execution.sessions import SESSIONS, Session, read_sessions
from pulsar_api.shim import shim
from tests.integration.daemon import wait_for
from tests.shims import (
    BOMB,
    NEW_NUMBERS,
    PYTHON,
    RUNNER,
    Elsewhere,
    Trees,
    runs,
    with_argument,
)


@pytest.fixture
def history(trees: Trees) -> ProcessHistory:
    """Return the process history of a daemon."""
    return ProcessHistory(trees.tasks)


def perl(text: str) -> str:
    """Return a line of shell that runs a one-line program."""
    return f"perl -e '{text}'"


# Processes that are found without an earlier look at them.
BY_ITSELF = {
    "mark": "echo $$; exec sleep 60",
    "session": "echo $$; exec env -i sleep 60",
    "session of one with the mark": (
        "setsid sh -c '(env -i sleep 60 & echo $!); exec sleep 60'"
    ),
    "below one with the mark": "setsid env -i sleep 60 & echo $!; echo $$; wait",
    "below one in the session": (
        "env -i sh -c 'setsid sh -c \"echo \\$\\$; exec sleep 60\" & wait' & echo $$; wait"
    ),
    "daemon": (
        "sh -c '(setsid sh -c \"trap : HUP TERM; sleep 60 & echo \\$!; wait\" &)'; exit 0"
    ),
    "another name": perl(
        '%ENV = (); $0 = "[kworker/0:1]" . " " x 9000; $| = 1; print "$$\\n"; sleep 60'
    ),
    "without its first thread": (
        f"{PYTHON} -I -c 'import ctypes, os, threading, time;"
        "threading.Thread(target=lambda: (print(os.getpid(), flush=True), time.sleep(60)))"
        ".start(); ctypes.CDLL(None).syscall(60, 0)'"
    ),
    "stopped": "setsid sh -c 'echo $$; kill -STOP $$; sleep 60' & wait",
}


@pytest.mark.parametrize("script", BY_ITSELF.values(), ids=BY_ITSELF.keys())
def test_orphans_are_recognised_by_mark_session_and_parent(
    trees: Trees, history: ProcessHistory, script: str
) -> None:
    """The mark is in the environment. The session is that of the shim."""
    tree = trees.sh(script)
    count = script.count("echo ") or 1
    wait_for(lambda: tree.output.count("\n") == count, "the start")
    tree.pids(count)
    tree.kill_shim()
    found = history.orphans(1, tree.key)
    assert {(p.pid, p.start) for p in found.find()} >= set(tree.left()) != set()
    assert found.end() == []
    assert tree.left() == []
    assert found.find() == []


# Processes that the daemon saw while the shim lived.
REMEMBERED = {
    "session": "(setsid env -i sh -c 'echo $$; exec sleep 60' &)",
    "session without a leader": (
        "(setsid env -i sh -c 'sh -c \"echo \\$\\$; exec sleep 60\" &' &)"
    ),
    "another name": perl(
        'use POSIX; fork and exit; setsid; %ENV = (); $0 = "x" x 9000; $| = 1;'
        'print "$$\\n"; sleep 60'
    ),
    "much begetting": (
        "(setsid env -i sh -c 'echo $$; for i in $(/usr/bin/seq 6000);"
        " do setsid sleep 0.01; done' &)"
    ),
}


@pytest.mark.parametrize("daemon", ["same", "next"])
@pytest.mark.parametrize("script", REMEMBERED.values(), ids=REMEMBERED.keys())
def test_orphans_are_recognised_by_remembered_sessions_and_processes(
    trees: Trees, history: ProcessHistory, script: str, daemon: str
) -> None:
    """The next daemon never saw the shim alive, and reads the sessions file."""
    tree = trees.sh(script + "; sleep 60")
    tree.pids(1)
    history.sample({1: tree.key})
    tree.kill_shim()
    history.sample({1: tree.key})
    if daemon == "same":
        (tree.folder / SESSIONS).unlink()
    then = history if daemon == "same" else ProcessHistory(trees.tasks)
    assert then.orphans(1, tree.key).end() == []
    assert tree.left() == []


def test_a_sessions_file_is_valid_for_this_boot_only(
    trees: Trees, history: ProcessHistory
) -> None:
    """After another boot its numbers belong to other processes."""
    tree = trees.sh("(setsid env -i sh -c 'echo $$; exec sleep 60' &); sleep 60")
    (sleeper,) = tree.pids(1)
    history.sample({1: tree.key})
    path = tree.folder / SESSIONS
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    sessions = read_sessions(tree.folder)
    assert set(sessions) == {tree.key[0], sleeper[0]}
    assert sessions[sleeper[0]].leader == sleeper[1]
    before = path.stat()
    history.sample({1: tree.key})
    assert os.path.samestat(path.stat(), before)  # it was not written again
    tree.kill_shim()
    data = path.read_bytes()
    for other in (
        b"x" + data[1:],
        data.replace(b" ", b" x"),
        data + b"1\n",
        b"",
        data[:20],
    ):
        path.write_bytes(other)
        ProcessHistory(trees.tasks).orphans(1, None).end()
        assert lives(sleeper)
    path.write_bytes(data)
    assert ProcessHistory(trees.tasks).orphans(1, None).end() == []
    assert not lives(sleeper)


def test_a_sessions_file_is_renewed_for_the_next_daemon(
    trees: Trees, history: ProcessHistory
) -> None:
    """It is rewritten when no process by which a session is recognised lives any more."""
    tree = trees.sh(
        "(setsid env -i sh -c 'sh -c \""
        "echo \\$\\$; sleep 1.5; sleep 60 & echo \\$!\" &' &); sleep 60"
    )
    (before,) = tree.pids(1)
    history.sample({1: tree.key})
    (sleeper,) = set(tree.pids(2)) - {before}
    wait_for(lambda: not lives(before), "its end")
    # The process of the first look is gone, and the leader of its session was gone by then.
    history.sample({1: tree.key})
    tree.kill_shim()
    assert ProcessHistory(trees.tasks).orphans(1, tree.key).end() == []
    assert not lives(sleeper)


def test_a_session_is_identified_by_the_start_of_its_leader() -> None:
    """Its number alone can have been reused."""
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as sleeper:
        table = Table()
        known = Session.of(table, sleeper.pid)
        assert known.goes_on(table)
        start = table.entries[sleeper.pid].start
        for other in (
            Session(sleeper.pid, start - 1, table.at),
            Session(sleeper.pid, 0, table.at),
        ):
            assert not other.goes_on(table)
        sleeper.kill()


@pytest.mark.parametrize("leader", ["alive", "dead"])
@pytest.mark.needs("a namespace of processes")
def test_a_reused_number_belongs_to_a_stranger(elsewhere: Elsewhere, leader: str) -> None:
    """Its new process is alive, or only the session that this process created."""
    found = elsewhere(
        """
        history = ProcessHistory(tmp / "tasks")
        tree = trees.sh("(setsid env -i sh -c 'echo $$; exec sleep 60' &); sleep 60")
        (sleeper,) = tree.pids(1)
        history.sample({1: tree.key})
        numbers = [tree.key[0], sleeper[0]]
        every = [one.key for n in numbers for one in Table().members(n)]
        for key in every:
            proc.send(key, signal.SIGKILL)
        tree.wait()
        wait_for(lambda: not any(Entry.of(n) for n, _ in every), "their end")
        time.sleep(sessions.MARGIN / proc.TICKS + 0.05)  # sooner no number comes round
        for number in numbers:
            Path("/proc/sys/kernel/ns_last_pid").write_text(str(number - 1))
            pid = os.fork()
            if pid == 0:
                os.setsid()
                end = "& exit" if sys.argv[1] == "dead" else "& wait"
                os.execlp("sh", "sh", "-c", f"sleep 60 {end}")
            assert pid == number
            wait_for(lambda: len(Table().members(pid)) == 2, "the session")
            if sys.argv[1] == "dead":
                os.waitpid(pid, 0)
        strangers = [one.key for n in numbers for one in Table().members(n)]
        left = [
            search.find() + search.end()
            for one in (history, ProcessHistory(tmp / "tasks"))
            for search in [one.orphans(1, tree.key)]
        ]
        print(json.dumps([left, len(strangers), all(map(lives, strangers))]))
        """,
        *NEW_NUMBERS,
        argument=leader,
    )
    assert found == [[[], []], 2 if leader == "dead" else 4, True]


def test_strangers_are_left_alone(trees: Trees, history: ProcessHistory) -> None:
    """Some belong to another task, others to none."""
    tree = trees.sh("env -i sleep 60 & echo $!; setsid sleep 60 & echo $!; wait")
    other = trees.sh("env -i sleep 60 & echo $!; setsid sleep 60 & echo $!; wait", 2)
    tree.pids(2)
    other.pids(2)
    with (
        subprocess.Popen(["sleep", "60"]) as one,
        subprocess.Popen(["sleep", "60"], start_new_session=True) as two,
        subprocess.Popen(["sleep", "60"], env={MARK: f"{tree.folder}1"}) as three,
    ):
        history.sample({1: tree.key, 2: other.key})
        tree.kill_shim()
        history.sample({1: tree.key, 2: other.key})
        assert history.orphans(1, tree.key).end() == []
        assert tree.left() == []
        assert other.left() == other.printed
        assert lives(other.key)
        for stranger in (one, two, three):
            assert stranger.poll() is None
            stranger.kill()


def test_the_tasks_of_another_daemon_are_left_alone(
    trees: Trees, history: ProcessHistory, tmp_path: Path
) -> None:
    """A task can start a daemon, whose shims are then below its own."""
    others = Trees(tmp_path / "others")
    folder = others.prepare("/bin/sh", "-c", "env -i sleep 60 & echo $!; echo $$; wait")
    begin = f"env -i {PYTHON} -I -S {shim.__file__} {folder}"
    tree = trees.sh(f"{begin} >/dev/null & echo $!; env -i sleep 60 & echo $!; wait")
    other, sleeper = tree.pids(2)
    output = folder / "output"
    wait_for(lambda: output.exists() and output.read_text().count("\n") == 2, "the start")
    below = [Entry.of(int(word)) for word in output.read_text().split()]
    keys = [one.key for one in below if one is not None]
    try:
        history.sample({1: tree.key})
        tree.kill_shim()
        left = history.orphans(1, tree.key)
        found = {(process.pid, process.start) for process in left.find()}
        assert sleeper in found
        assert not found & {other, *keys}
        assert left.end() == []
        assert not lives(sleeper)
        assert lives(other)
        assert len(keys) == 2
        assert all(map(lives, keys))
    finally:
        for key in [*keys, other]:
            proc.send(key, signal.SIGKILL)


def test_a_daemon_that_a_task_started_does_not_kill_itself(
    trees: Trees, tmp_path: Path
) -> None:
    """Its children survive, too, although all of them carry the mark of the task."""
    go, done = tmp_path / "go", tmp_path / "done"
    text = f"""
import os, subprocess, sys, time
sys.path[:0] = {sys.path!r}
from pathlib import Path
from pulsar_api.execution.history import ProcessHistory
from pulsar_api.execution.proc import now
mine = subprocess.Popen(["sleep", "60"])
print(os.getpid(), mine.pid, sep="\\n", flush=True)
go, done = Path({str(go)!r}), Path({str(done)!r})
while not go.exists():
    time.sleep(0.01)
number, start = map(int, go.read_text().split())
left = ProcessHistory(Path({str(trees.tasks)!r})).orphans(1, (number, start), now()).end()
done.write_text(repr(left))
time.sleep(60)
"""
    (tmp_path / "daemon.py").write_text(text)
    tree = trees.sh(f"sleep 60 & echo $!; {PYTHON} {tmp_path}/daemon.py & echo $!; wait")
    sleeper, daemon, *_ = tree.pids(4)
    tree.kill_shim()
    (tmp_path / "go.tmp").write_text("{} {}".format(*tree.key))
    (tmp_path / "go.tmp").rename(go)
    wait_for(lambda: done.exists() and done.read_text(), "the daemon")
    assert done.read_text() == "[]"
    assert not lives(sleeper)
    assert set(tree.left()) == {daemon, *tree.printed[2:]}


def test_a_process_that_starts_during_the_kill_is_killed(
    trees: Trees, history: ProcessHistory
) -> None:
    """Nothing identifies it once its parent is gone."""
    life = f"60.{uuid4().int % 10**9}"
    begets = f"setsid env -i /bin/sleep {life} & sleep 0.002"
    # It prints nothing, or it would die of SIGPIPE.
    tree = trees.sh(f"exec >&- 2>&-; for n in $(seq 3000); do {begets}; done; sleep 60")
    wait_for(lambda: len(with_argument(life)) > 20, "the start")
    tree.kill_shim()
    assert history.orphans(1, tree.key).end(30) == []
    left = with_argument(life)
    for key in left:
        proc.send(key, signal.SIGKILL)
    assert left == []


def test_a_fork_bomb_without_its_shim_is_ended(
    trees: Trees, history: ProcessHistory
) -> None:
    """Its 255 processes keep forking. Each has a session of its own, and no environment."""
    bomb = f"# {uuid4().hex}{BOMB}"
    tree = trees("/bin/sh", "-c", bomb, bomb, "7")
    tree.pids(255)
    tree.kill_shim()
    assert history.orphans(1, tree.key).end(30) == []
    assert with_argument(bomb) == []


def test_a_chain_of_short_lived_processes_is_ended(
    trees: Trees, history: ProcessHistory, tmp_path: Path
) -> None:
    """Each process lives as long as a fork takes, so its session identifies it."""
    count = tmp_path / "count"
    run = ("/usr/bin/env", "-i", PYTHON, "-I", "-S", "-c", RUNNER, str(count), "plain")
    tree = trees(*run)
    wait_for(lambda: runs(count), "the start")
    tree.kill_shim()
    assert history.orphans(1, tree.key, proc.now()).end(30) == []
    assert not runs(count)


def test_the_size_of_the_history_is_limited(
    trees: Trees, history: ProcessHistory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With too many sessions and processes the oldest ones are remembered."""
    monkeypatch.setattr(process_history, "MOST_SESSIONS", 2)
    monkeypatch.setattr(process_history, "MOST_PROCESSES", 3)
    tree = trees.sh("for n in 1 2 3 4; do setsid sleep 60 & echo $!; done; wait")
    tree.pids(4)
    history.sample({1: tree.key})
    assert len(read_sessions(tree.folder)) == 2
    assert tree.key[0] in read_sessions(tree.folder)
    assert len(history._known[1].processes) == 3
    history.sample({})
    assert history._known == {}


def test_a_folder_that_cannot_be_written_is_no_obstacle(
    trees: Trees, history: ProcessHistory
) -> None:
    """The sessions file is written at the next look."""
    tree = trees.sh("echo $$; exec sleep 60")
    tree.pids(1)
    away = tree.folder.with_name("away")
    tree.folder.rename(away)
    history.sample({1: tree.key})
    away.rename(tree.folder)
    assert history.sample({1: tree.key}) < time.thread_time()
    assert set(read_sessions(tree.folder)) == {tree.key[0]}


# -- a daemon that is a subreaper


def test_a_process_that_was_never_seen_becomes_a_child_of_the_daemon(
    elsewhere: Elsewhere,
) -> None:
    """It is ended with its task. Earlier orphans of other tasks stay."""
    found = elsewhere(
        """
        processes.become_subreaper()
        own = set()
        history = ProcessHistory(tmp / "tasks", own)
        line = "(setsid env -i sh -c 'echo $$; exec sleep 60' &); sleep 60"

        go = tmp / "go"
        second = trees.sh(f"while ! [ -e {go} ]; do sleep 0.01; done; {line}", 2)
        own.add(second.key[0])
        # What this daemon does not wait for, but another task has left.
        first = trees.sh(line, 1)
        own.add(first.key[0])
        (left,) = first.pids(1)
        first.kill_shim()
        history.sample({1: first.key, 2: second.key})
        go.touch()
        second.pids(1)
        # A shim that begins, of which nobody knows yet.
        begins = "import os, time; os.setsid(); print(1, flush=True); time.sleep(60)"
        young = subprocess.Popen(
            [PYTHON, "-c", begins, str(tmp / "tasks" / "3")], stdout=subprocess.PIPE
        )
        young.stdout.readline()
        waited = subprocess.Popen(["sleep", "60"], start_new_session=True)
        own.add(waited.pid)
        mine = subprocess.Popen(["sleep", "60"])
        third = trees.sh("echo $$; exec sleep 60", 4)
        third.pids(1)
        second.kill_shim()
        found = history.orphans(2, second.key).end()
        result = [
            found, second.left(), lives(left), third.left() == third.printed,
            young.poll(), waited.poll(), mine.poll(),
        ]
        history.orphans(1, first.key).end()
        result.append(lives(left))
        for child in (young, waited, mine):
            child.kill()
        trees.end()
        print(json.dumps(result))
        """
    )
    assert found == [[], [], True, True, None, None, None, False]


def test_processes_that_outlived_an_ended_task_are_not_orphans(
    elsewhere: Elsewhere,
) -> None:
    """All shims are killed at once, and the daemon remembers nothing of ended tasks."""
    found = elsewhere(
        """
        processes.become_subreaper()
        own = set()
        history = ProcessHistory(tmp / "tasks", own)
        first = trees.sh("env -i sleep 60 & echo $!; exec sleep 60", 1)
        own.add(first.key[0])
        first.pids(1)
        second = trees.sh("setsid sleep 60 & echo $!; exit 0", 2)
        own.add(second.key[0])
        (server,) = second.pids(1)
        history.sample({1: first.key})
        second.kill_shim()
        first.kill_shim()
        result = [history.orphans(1, first.key).end(), first.left(), lives(server)]
        proc.send(server, 9)
        trees.end()
        print(json.dumps(result))
        """
    )
    assert found == [[], [], True]


def test_a_process_with_the_mark_that_is_older_than_the_shim_is_left_alone(
    trees: Trees, history: ProcessHistory
) -> None:
    """It belongs to a task with the same number in a state folder that was moved away."""
    mark = {MARK: str(trees.tasks / "1")}
    with subprocess.Popen(["sleep", "60"], start_new_session=True, env=mark) as older:
        time.sleep(0.05)  # clock ticks of the kernel, which tell starts apart
        tree = trees.sh("setsid sleep 60 & echo $!; wait")
        tree.pids(1)
        tree.kill_shim()
        assert history.orphans(1, tree.key).end() == []
        assert tree.left() == []
        assert older.poll() is None
        older.kill()


def test_a_chain_of_sessions_becomes_a_child_of_the_daemon(
    elsewhere: Elsewhere,
) -> None:
    """Each generation is its child for a moment, and one of them is caught."""
    found = elsewhere(
        """
        processes.become_subreaper()
        count = tmp / "count"
        tree = trees(
            "/usr/bin/env", "-i", PYTHON, "-I", "-S", "-c", RUNNER, str(count), "session"
        )
        wait_for(lambda: runs(count), "the start")
        tree.kill_shim()
        left = ProcessHistory(tmp / "tasks", set()).orphans(1, tree.key).end(30)
        print(json.dumps([left, runs(count)]))
        """
    )
    assert found == [[], False]
