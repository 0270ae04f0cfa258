"""Tests of the process table and of ending processes, with real ones only."""

import os
import pwd
import signal
import subprocess
import tempfile
import textwrap
from pathlib import Path
from uuid import uuid4

import pytest

from pulsar_api.execution import proc, processes
from pulsar_api.execution.proc import Table, lives
from pulsar_api.tasks.model import Process
from tests.integration.daemon import PATIENCE, wait_for
from tests.shims import BOMB, PYTHON, RUNNER, Elsewhere, Tree, Trees, runs, with_argument

# -- the table


def test_a_table_has_the_whole_tree() -> None:
    """Parents come before their children. Excluded processes are left out."""
    script = "sh -c 'sleep 60 & sleep 60 & echo; wait' & wait"
    with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE) as top:
        assert top.stdout is not None
        top.stdout.read(1)
        table = Table()
        found = table.entries[top.pid]
        assert found.parent == os.getpid()
        below = table.below(found, lambda _: False)
        assert [one.parent for one in below] == [top.pid, below[0].pid, below[0].pid]
        assert table.below(found, lambda one: one == below[0]) == []
        assert [one.pid for one in table.line(below[1])][:3] == [
            *(below[1].pid, below[0].pid, top.pid)
        ]
        assert table.get((top.pid, found.start)) == found
        assert table.get((top.pid, found.start + 1)) is None
        for one in [found, *below]:
            proc.send(one.key, signal.SIGKILL)


def test_a_zombie_does_not_live() -> None:
    """It has ended, and its parent has not waited for it."""
    with subprocess.Popen("true") as child:
        wait_for(lambda: Table().entries[child.pid].ended, "its end")
        found = Table().entries[child.pid]
        assert not found.alive
        assert not lives(found.key)


HEADLESS = """
import ctypes, threading, time
def work():
    time.sleep(0.2)
    print("ready", flush=True)
    time.sleep(60)
threading.Thread(target=work).start()
ctypes.CDLL(None).syscall(60, 0)
"""


def test_a_process_lives_after_its_first_thread_has_ended() -> None:
    """It looks like a zombie, but its environment can be read."""
    with subprocess.Popen(
        [PYTHON, "-c", HEADLESS], stdout=subprocess.PIPE, env={"A": "b"}
    ) as child:
        assert child.stdout is not None
        child.stdout.read(1)
        found = Table().entries[child.pid]
        assert found.ended
        assert found.alive
        assert b"A=b" in proc.environ(found)
        assert processes.kill(proc.describe([found])) == processes.Remains()
        assert not lives(found.key)


def test_a_process_whose_parent_ends_during_the_reading_is_found(
    elsewhere: Elsewhere,
) -> None:
    """The parent is gone before it is read. The child appears below its new parent."""
    found = elsewhere(
        """
        class Slow(Table):
            def _add(self, pid):
                super()._add(pid)
                if pid == child and parent.poll() is None:
                    os.kill(parent.pid, signal.SIGKILL)
                    parent.wait()

        processes.become_subreaper()
        script = "sleep 60 >/dev/null & echo $!; wait"
        parent = subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE)
        child = int(parent.stdout.readline())
        table = Slow()
        below = table.below(table.entries[os.getpid()], lambda _: False)
        os.kill(child, signal.SIGKILL)
        print(json.dumps([[one.pid for one in below], child, parent.pid in table.entries]))
        """
    )
    below, child, gone = found
    assert below == [child]
    assert not gone


# -- signals


def test_a_signal_never_reaches_a_stranger() -> None:
    """A process with a reused number is left alone."""
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        key = Table().entries[sleeper.pid].key
        other = (key[0], key[1] - 1)
        assert proc.send(other, signal.SIGKILL) is proc.Answer.GONE
        assert processes.kill([Process(*other, "sleep", "root")]) == processes.Remains()
        assert processes.living([Process(*other, "sleep", "root")]) == []
        assert lives(key)
        assert proc.send(key, signal.SIGKILL) is proc.Answer.SENT
    assert proc.send(key, signal.SIGKILL) is proc.Answer.GONE


def test_a_name_is_shown_in_one_line(tmp_path: Path) -> None:
    """It can have any characters, and look like the fields that follow it."""
    path = tmp_path / "x) Z 1\n(y"
    path.symlink_to("/bin/sleep")
    with subprocess.Popen([path, "60"]) as sleeper:
        comm = Path(f"/proc/{sleeper.pid}/comm")
        wait_for(lambda: "x" in comm.read_text(), "the new name")
        found = Table().entries[sleeper.pid]
        user = pwd.getpwuid(os.geteuid()).pw_name
        shown = Process(sleeper.pid, found.start, "x) Z 1?(y", user)
        assert proc.describe([found]) == [shown]
        sleeper.kill()


@pytest.mark.needs("loop mounts")
def test_a_process_that_survives_kill_is_named(tmp_path: Path) -> None:
    """The kernel still holds it after the signal."""
    disk, folder = tmp_path / "disk", tmp_path / "folder"
    folder.mkdir()
    with disk.open("wb") as file:
        file.truncate(4 << 20)
    subprocess.run(["mkfs.ext4", "-q", disk], check=True)
    subprocess.run(["mount", "-o", "loop", disk, folder], check=True)
    try:
        subprocess.run(["fsfreeze", "--freeze", folder], check=True)
        with subprocess.Popen(["touch", folder / "x"]) as held:
            try:
                stat = Path(f"/proc/{held.pid}/stat")
                wait_for(lambda: b"(touch) D" in stat.read_bytes(), "its wait")
                shown = proc.describe([Table().entries[held.pid]])
                remains = processes.kill(shown, 0.1)
                assert remains == processes.Remains(unending=tuple(shown))
                assert processes.living(shown) == shown
            finally:
                subprocess.run(["fsfreeze", "--unfreeze", folder], check=True)
        assert processes.living(shown) == []
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_survivor_is_killed_later_with_the_processes_below_it(trees: Trees) -> None:
    """It may have started others meanwhile."""
    tree = trees.sh("sh -c 'echo $$; sleep 60 & echo $!; wait' & wait")
    above, below = tree.pids(2)
    shown = proc.describe([Table().entries[above[0]]])
    assert [(p.pid, p.start) for p in processes.living(shown)] == [above, below]
    remains = processes.kill(processes.living(shown))
    assert remains == processes.Remains()
    assert processes.living(shown) == []


def test_lack_of_descriptors_is_reported(elsewhere: Elsewhere) -> None:
    """The result must not claim that there are no processes."""
    found = elsewhere(
        """
        import resource
        child = subprocess.Popen(["sleep", "60"])
        found = Table().entries[child.pid]
        shown = proc.describe([found])
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        said = []
        for what in (
            Table,
            lambda: processes.kill(shown),
            lambda: processes.living(shown),
            lambda: processes.end_tree(found.key),
            lambda: ProcessHistory(tmp).sample({}),
            lambda: ProcessHistory(tmp).orphans(1, None).find(),
            lambda: ProcessHistory(tmp).orphans(1, None).end(),
        ):
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
            try:
                what()
                said.append("nothing")
            except OSError as e:
                said.append(e.strerror)
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        child.kill()
        print(json.dumps([said, lives(found.key)]))
        """
    )
    assert found[0] == ["Too many open files"] * 7


# -- a shim and its lock


def stopped(tree: Tree) -> None:
    """Stop a shim."""
    os.kill(tree.key[0], signal.SIGSTOP)
    stat = Path(f"/proc/{tree.key[0]}/stat")
    wait_for(lambda: b") T " in stat.read_bytes(), "the stop")


def test_a_stopped_shim_receives_term(trees: Trees) -> None:
    """It is continued, and ends its tree as usual."""
    tree = trees.sh("echo $$; exec sleep 60")
    tree.pids(1)
    assert processes.holder(tree.folder) == tree.key
    stopped(tree)
    assert processes.terminate(tree.folder)
    assert tree.wait() == 0
    assert b"cause kill" in (tree.folder / "exit").read_bytes()
    assert tree.left() == []
    assert processes.holder(tree.folder) is None
    assert not processes.terminate(tree.folder)
    assert not processes.terminate(tree.folder.parent)


def test_only_the_holder_of_a_lock_is_signalled(trees: Trees) -> None:
    """The number in the lock of a dead shim can belong to any process."""
    tree = trees.sh("echo $$; exec sleep 60")
    tree.pids(1)
    tree.kill_shim()
    with subprocess.Popen(["sleep", "60"]) as stranger:
        start = Table().entries[stranger.pid].start
        (tree.folder / "lock").write_text(f"{stranger.pid} {start}\n")
        assert not processes.terminate(tree.folder)
        assert processes.holder(tree.folder) is None
        assert stranger.poll() is None
        stranger.kill()


# -- a shim that does not end its tree

SLEEPS = {
    "child": "sleep 60 & echo $!; echo $$; wait",
    "environment": "env -i sleep 60 & echo $!; echo $$; wait",
    "session": "sh -c 'setsid env -i sh -c \"echo \\$\\$; exec sleep 60\" &'; echo $$",
}


@pytest.mark.parametrize("script", SLEEPS.values(), ids=SLEEPS.keys())
def test_the_tree_of_a_stopped_shim_is_ended(trees: Trees, script: str) -> None:
    """Its processes can have changed environment, session and parent."""
    tree = trees.sh(f"{script}; exec sleep 60")
    tree.pids(2)
    stopped(tree)
    assert processes.end_tree(tree.key) == []
    assert tree.left() == []
    assert tree.wait() == -signal.SIGKILL


def test_a_fork_bomb_below_a_stopped_shim_is_ended(trees: Trees) -> None:
    """Its 255 processes keep forking. Each has a session of its own, and no environment."""
    mark = uuid4().hex
    bomb = f"# {mark}{BOMB}"
    tree = trees("/bin/sh", "-c", bomb, bomb, "7")
    tree.pids(255)
    stopped(tree)
    assert processes.end_tree(tree.key, PATIENCE) == []
    assert tree.wait() == -signal.SIGKILL
    assert with_argument(bomb) == []


@pytest.mark.parametrize("how", ["plain", "session"])
def test_a_chain_of_short_lived_processes_is_ended(
    trees: Trees, tmp_path: Path, how: str
) -> None:
    """It is found below the shim, which ends after it."""
    count = tmp_path / "count"
    tree = trees(PYTHON, "-I", "-S", "-c", RUNNER, str(count), how)
    wait_for(lambda: runs(count), "the start")
    stopped(tree)
    assert processes.end_tree(tree.key, PATIENCE) == []
    assert tree.wait() == -signal.SIGKILL
    assert not runs(count)


def test_a_shim_that_is_gone_is_not_ended() -> None:
    """A process with the same number is left alone."""
    with subprocess.Popen(["sleep", "60"]) as stranger:
        number, start = Table().entries[stranger.pid].key
        assert processes.end_tree((number, start + 1)) == []
        assert stranger.poll() is None
        stranger.kill()


# Run as another user than root: a shim, and below it a process that becomes root.
SET_UID = """
import shutil
tmp = Path(sys.argv[1])
tmp.chmod(0o755)
(tmp / "tasks").mkdir()
os.chown(tmp / "tasks", 65534, 65534)
shutil.copy("/usr/bin/perl", tmp / "perl")
(tmp / "perl").chmod(0o4755)
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
def spawn(folder):
    pid = os.fork()  # it may not be able to read the interpreter
    if pid == 0:
        os.dup2(os.open("/dev/null", os.O_RDWR), 1)
        os._exit(shim.main(str(folder)))
    return pid
trees = Trees(tmp / "tasks", spawn)
(tmp / "tasks" / "perl").write_text("$< = 0; $| = 1; print qq($$\\\\n); sleep 60")
tree = trees.sh(f"setsid {tmp}/perl {tmp}/tasks/perl & env -i sleep 60 & echo $!; wait")
first, second = tree.pids(2)
root, other = (first, second) if Entry.of(first[0]).name == b"perl" else (second, first)
wait_for(lambda: os.stat(f"/proc/{root[0]}").st_uid == 0, "root")
history = ProcessHistory(tmp / "tasks")
"""
WAYS = {
    "tree": "left = processes.end_tree(tree.key)",
    "session": "tree.kill_shim(); left = history.orphans(1, tree.key).end()",
    "remembered": (
        "history.sample({1: tree.key}); tree.kill_shim();"
        "left = ProcessHistory(tmp / 'tasks').orphans(1, tree.key).end()"
    ),
    "named": (
        "described = [proc.describe([Entry.of(one[0])]) for one in (root, other)];"
        "left = processes.kill(processes.living(described[0])).denied;"
        "tree.kill_shim(); processes.kill(described[1])"
    ),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
@pytest.mark.needs("set-uid programs")
def test_a_process_that_became_root_is_named(elsewhere: Elsewhere, way: str) -> None:
    """A daemon without root cannot signal it, and says so. All others are ended."""
    with tempfile.TemporaryDirectory() as folder:
        script = """
            print(json.dumps([
                [[p.pid, p.start, p.command, p.user] for p in left],
                processes.living(left) == list(left),
                lives(other),
                root,
            ]))
        """
        script = SET_UID + way + textwrap.dedent(script)
        left, same, other, root = elsewhere(script, argument=folder)
        assert proc.send(tuple(root), signal.SIGKILL) is proc.Answer.SENT
        assert left == [[*root, "perl", "root"]]
        assert same
        assert not other


# -- children without a waiting parent


def test_children_without_a_waiting_parent_are_reaped(elsewhere: Elsewhere) -> None:
    """They are reaped at the second look. Children that this process waits for are not."""
    reaped, status, left = elsewhere(
        """
        processes.become_subreaper()
        mine = subprocess.Popen(["sh", "-c", "(exit 1) & (sleep 0.1) & exit 7"])
        own = {mine.pid}
        reaper = processes.Reaper(own)
        def dead():
            me = os.getpid()
            return [e for e in Table().entries.values() if e.parent == me and e.ended]
        wait_for(lambda: len(dead()) == 3, "their end")
        first = reaper.reap()
        counts = [first, reaper.reap(), reaper.reap(), len(dead())]
        status = mine.wait()
        print(json.dumps([counts, status, reaper.reap()]))
        """
    )
    assert (reaped, status, left) == ([0, 2, 0, 1], 7, 0)
