"""Tasks in cgroups of their own, with real daemons. These tests need root."""

import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from selenium.webdriver import Chrome
from twisted.internet.task import Clock

from pulsar_api.execution import cgroups
from pulsar_api.execution.executor import ShimExecutor
from pulsar_api.execution.local_machine import LocalMachine
from pulsar_api.tasks.interfaces import Bounds
from pulsar_api.tasks.model import Command
from tests.integration.daemon import SHELL, Daemon, wait_for
from tests.integration.test_run_as import OWN, PYTHON, SHOP, TABLES, capable, refused

pytestmark = pytest.mark.needs("cgroups", "setpriv")

BOMB = """
import os, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for _ in range(500):
    # Each has another parent, another session and no environment.
    print('.', flush=True)
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.execve('/bin/sleep', ['sleep', sys.argv[1]], {})
        os._exit(0)
    os.wait()
print('all here', flush=True)
signal.pause()
"""
"""Starts 500 processes that ignore TERM and that nothing attributes to the task."""

Start = Callable[..., Daemon]


def tree() -> Path:
    """Return the root of the tree of cgroups, version 2."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        fields = line.split()
        if fields[2] == "cgroup2":
            return Path(fields[1])
    raise RuntimeError("mount a cgroup2 file system for these tests")


def members(cgroup: Path) -> list[int]:
    """Return the processes of a cgroup, without its sub-cgroups."""
    return list(map(int, (cgroup / "cgroup.procs").read_text().split()))


@pytest.fixture
def user(request: pytest.FixtureRequest) -> str:
    """Return the user of the daemon."""
    name: str = getattr(request, "param", OWN)
    return name


EACH = pytest.mark.parametrize("user", ["root", OWN], indirect=True)
"""Run a test with a daemon of root, and with one of an ordinary user."""


@pytest.fixture
def delegated(user: str) -> Iterator[Path]:
    """Return a cgroup that is delegated to the user, as systemd does it."""
    path = tree() / f"pulsar-api-{os.getpid()}-{time.monotonic_ns()}"
    path.mkdir()
    os.setxattr(path, "user.delegate", b"1")
    for name in (".", "cgroup.procs", "cgroup.subtree_control", "cgroup.threads"):
        shutil.chown(path / name, user)
    yield path
    (path / "cgroup.kill").write_text("1")
    below = [folder for folder, _, _ in os.walk(path, topdown=False)]
    wait_for(lambda: "populated 0" in (path / "cgroup.events").read_text(), "an empty tree")
    for folder in below:
        os.rmdir(folder)


@pytest.fixture
def start(user: str, delegated: Path, place: Path) -> Iterator[Start]:
    """Return a function that starts a daemon in the cgroup."""
    daemons: list[Daemon] = []

    def begin(*options: str, tables: str = TABLES, before: tuple[str, ...] = ()) -> Daemon:
        number = len(daemons)
        (place / "settings.toml").write_text(tables)
        home = place / f"home{number}"
        home.mkdir(mode=0o755)
        shutil.chown(home, user)
        become = () if user == "root" else capable(user)
        program = (*become, *before, sys.executable, "-m", "pulsar_api")
        enter = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
        made = Daemon(
            home,
            *("--command", SHELL, "--config", str(place / "settings.toml")),
            *("--kill-grace", "1", *options),
            program=("sh", "-c", enter, str(delegated), *program),
            state=home / "state",
        )
        daemons.append(made)
        return made

    yield begin
    for daemon in daemons:
        daemon.stop()


def cgroup(delegated: Path, number: int) -> Path:
    """Wait for the cgroup of a task and return it."""

    def found() -> list[Path]:
        return list(delegated.glob(f"task-{number}-*"))

    return wait_for(found, "the cgroup")[0]


def named(text: str) -> list[int]:
    """Return the processes with a text in their arguments."""
    wanted, found = text.encode(), []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if wanted in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def bomb(daemon: Daemon, place: Path) -> tuple[int, str]:
    """Start a task with 500 such processes. Return its number and their argument."""
    name = f"3600.{time.monotonic_ns()}"
    program = place / "bomb.py"
    program.write_text(BOMB)
    line = f"exec {PYTHON} -ISs {program} {name}"
    number = daemon.run("shop", "live", "run", run=line)
    wait_for(lambda: "all here" in daemon.task(number)["output"], "the processes")
    wait_for(lambda: len(named(name)) > 500, "their programs")
    return number, name


@EACH
def test_command_begins_in_a_cgroup_of_its_task(start: Start, delegated: Path) -> None:
    """The shim stays outside. The cgroup is removed with its last process."""
    daemon = start()
    first = daemon.run("shop", "live", "run", run="cat /proc/self/cgroup; exec sleep 60")
    second = daemon.run("toys", "live", "run", run="cat /proc/self/cgroup; exec sleep 60")
    for number in (first, second):
        wait_for(lambda n=number: daemon.task(n)["output"], "its word")  # type: ignore[misc]
        line = daemon.task(number)["output"].splitlines()[-1]
        assert line == f"0::/{cgroup(delegated, number).relative_to(tree())}"
        shim = int((daemon.state / "tasks" / str(number) / "lock").read_text().split()[0])
        assert shim in members(delegated / "daemon")
        # Programs read their limits there.
        assert cgroup(delegated, number).stat().st_mode & 0o777 == 0o755
    assert members(delegated) == []
    assert {daemon.process.pid, daemon.launcher()} <= set(members(delegated / "daemon"))
    assert cgroup(delegated, first) != cgroup(delegated, second)
    daemon.post(f"/task/{first}/kill")
    assert daemon.ended(first)["status"] == "killed"
    wait_for(lambda: not list(delegated.glob(f"task-{first}-*")), "its end")
    assert cgroup(delegated, second).exists()


def test_task_has_its_cpu_seconds(start: Start) -> None:
    """Its background processes count as well."""
    daemon = start()
    line = f"{PYTHON} -ISc 'import time\nwhile time.process_time() < 0.3: pass'"
    used = daemon.ended(daemon.run("shop", "live", "run", run=f"({line} &) ; {line}; wait"))
    idle = daemon.ended(daemon.run("shop", "live", "run", run="sleep 1"))
    assert used["cpuSeconds"] >= 0.3
    assert idle["cpuSeconds"] < used["cpuSeconds"]
    assert daemon.get(f"/task/{used['id']}").json()["cpuSeconds"] == used["cpuSeconds"]


def test_page_shows_the_processor_time(start: Start, browser: Chrome) -> None:
    """The facts of the task include it."""
    daemon = start()
    number = daemon.run("shop", "live", "run", run="exit 0")
    used = daemon.ended(number)["cpuSeconds"]
    browser.get(f"{daemon.base}/web#job/{number}")
    facts = "return [...document.querySelectorAll('.facts div')].map(e => e.innerText)"
    wanted = f"Processor time\n{used:.2f} s"
    wait_for(lambda: wanted in browser.execute_script(facts), "the fact")


@pytest.mark.parametrize("how", ["kill", "silence", "lost", "stopped"])
def test_ended_task_leaves_no_process(
    start: Start, place: Path, delegated: Path, how: str
) -> None:
    """All 500 processes are gone before the task is reported as ended."""
    options = ("--silence-timeout", "5") if how == "silence" else ()
    daemon = start(*options)
    number, name = bomb(daemon, place)
    lock = daemon.state / "tasks" / str(number) / "lock"
    shim = int(lock.read_text().split()[0])
    if how in {"kill", "stopped"}:
        if how == "stopped":
            os.kill(shim, signal.SIGSTOP)
        daemon.post(f"/task/{number}/kill")
    elif how == "lost":
        os.kill(shim, signal.SIGKILL)
    task = daemon.ended(number)
    status = {"silence": "failed", "lost": "lost"}.get(how, "killed")
    assert (task["status"], task["heldBy"]) == (status, [])
    assert named(name) == []
    wait_for(lambda: not list(delegated.glob(f"task-{number}-*")), "the cgroup's end")


def test_next_daemon_ends_the_task_of_a_killed_shim(
    start: Start, place: Path, delegated: Path
) -> None:
    """It finds the cgroup by the record of the start, without the folder of the task."""
    daemon = start()
    number, name = bomb(daemon, place)
    shim = int((daemon.state / "tasks" / str(number) / "lock").read_text().split()[0])
    daemon.kill()
    os.kill(shim, signal.SIGKILL)
    shutil.rmtree(daemon.state / "tasks" / str(number))
    daemon.start()
    assert daemon.ended(number)["status"] == "lost"
    assert named(name) == []
    assert not list(delegated.glob(f"task-{number}-*"))


@EACH
def test_kill_ends_a_process_that_became_root(start: Start, place: Path) -> None:
    """The daemon needs no permission to signal a process to end its cgroup."""
    tables = "allow-sudo = true\n" + TABLES
    daemon = start(tables=tables)
    program = place / "become-root"
    shutil.copyfile(shutil.which("setpriv") or "", program)
    program.chmod(0o4755)
    number = daemon.run(
        "shop", "live", "run", run=f"exec {program} --reuid 0 --clear-groups sleep 1234567"
    )
    wait_for(lambda: named("1234567"), "the program")
    wait_for(lambda: os.stat(f"/proc/{named('1234567')[0]}").st_uid == 0, "root")
    daemon.post(f"/task/{number}/kill")
    task = daemon.ended(number)
    assert (task["status"], task["heldBy"]) == ("killed", [])
    assert named("1234567") == []


def test_background_process_survives_an_ordinary_end(start: Start, delegated: Path) -> None:
    """The task lists it, and its cgroup is removed when it ends."""
    daemon = start()
    number = daemon.run("shop", "live", "run", run="(exec sleep 60) >/dev/null 2>&1 & :")
    task = daemon.ended(number)
    assert (task["status"], task["heldBy"]) == ("finished", [])
    [left] = task["stillRunning"]
    assert members(cgroup(delegated, number)) == [left["pid"]]
    os.kill(left["pid"], signal.SIGKILL)
    wait_for(lambda: not list(delegated.glob(f"task-{number}-*")), "its end")


@EACH
def test_task_cannot_leave_or_change_its_cgroup(start: Start) -> None:
    """It has no permission to write the files that would do it."""
    daemon = start()
    line = (
        f"own={tree()}$(sed -n s/^0:://p /proc/self/cgroup); "
        "for file in $own/../cgroup.procs $own/../daemon/cgroup.procs $own/cgroup.kill "
        "$own/cgroup.subtree_control $own/cgroup.type; do "
        "(echo $$ > $file) 2>/dev/null && echo wrote $file; done; "
        "mkdir $own/mine 2>/dev/null && echo made; echo done"
    )
    number = daemon.run("shop", "live", "run", run=line)
    assert daemon.ended(number)["exitCode"] == 0
    assert daemon.task(number)["output"] == "done\n"


def test_next_daemon_kills_by_the_same_cgroup(
    start: Start, place: Path, delegated: Path
) -> None:
    """A restart leaves the processes where they are."""
    daemon = start()
    number, name = bomb(daemon, place)
    own = cgroup(delegated, number)
    before = set(members(own))
    daemon.process.send_signal(signal.SIGTERM)
    daemon.process.wait()
    daemon.start()
    assert set(members(own)) == before
    daemon.post(f"/task/{number}/kill")
    assert daemon.ended(number)["status"] == "killed"
    assert named(name) == []


def test_start_removes_old_empty_cgroups(start: Start, delegated: Path) -> None:
    """It keeps a new one, because a shim can be about to start its command there."""
    old, new = delegated / "task-1-old", delegated / "task-1-new"
    for path in (old, new):
        path.mkdir()
    hours = time.time() - 7200
    os.utime(old, (hours, hours))
    start()
    assert (old.exists(), new.exists()) == (False, True)


def test_second_daemon_runs_tasks_without_cgroups(start: Start, delegated: Path) -> None:
    """The tree of cgroups belongs to the first daemon."""
    start()
    second = start()
    assert "get no cgroups" in second.log.read_text()
    number = second.run("shop", "live", "run", run="cat /proc/self/cgroup")
    task = second.ended(number)
    assert (task["exitCode"], task["cpuSeconds"]) == (0, None)
    assert not list(delegated.glob("task-*"))


def test_task_runs_without_a_cgroup_if_none_can_be_made(
    start: Start, delegated: Path
) -> None:
    """The log names the reason once."""
    daemon = start()
    (delegated / "cgroup.max.descendants").write_text("1")  # that of the daemon itself
    for _ in range(2):
        task = daemon.ended(daemon.run("shop", "live", "run", run="exit 3"))
        assert (task["exitCode"], task["cpuSeconds"]) == (3, None)
    assert daemon.log.read_text().count("A task gets no cgroup") == 1


@EACH
def test_command_enters_its_cgroup_without_clone3(start: Start, delegated: Path) -> None:
    """Some containers forbid the system call. The command is moved instead."""
    daemon = start(before=(sys.executable, "-c", FORBID))
    number = daemon.run("shop", "live", "run", run="cat /proc/self/cgroup; id -un")
    assert daemon.ended(number)["exitCode"] == 0
    *_, place, name = daemon.task(number)["output"].splitlines()
    assert place.startswith(f"0::/{delegated.relative_to(tree())}/task-{number}-")
    assert name == SHOP


CLONE3, NOT_THERE = 435, 0x00050000 | 38  # SECCOMP_RET_ERRNO, ENOSYS
_RULES = (
    (0x20, 0, 0, 0),  # load the number of the call
    (0x15, 0, 1, CLONE3),
    (0x06, 0, 0, NOT_THERE),
    (0x06, 0, 0, 0x7FFF0000),  # SECCOMP_RET_ALLOW
)
FORBID = f"""
import ctypes, os, sys
rules = ctypes.create_string_buffer({b"".join(struct.pack("<HBBI", *r) for r in _RULES)!r})
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("rules", ctypes.c_void_p)]
program = Program({len(_RULES)}, ctypes.addressof(rules))
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
if libc.prctl(22, 2, ctypes.byref(program)):  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
    sys.exit(os.strerror(ctypes.get_errno()))
os.execvp(sys.argv[1], sys.argv[1:])
"""
"""Starts a program that cannot use clone3(2)."""


def ordered(folder: Path, cgroup: Path, *arguments: str, path: str = "/bin") -> None:
    """Write the files that tell a shim its command and cgroup."""
    folder.mkdir()
    executor = ShimExecutor(LocalMachine(None), Clock(), folder.parent, str)
    command = Command(arguments, {"PATH": path})
    executor._write_spec(folder, command, Bounds(1), str(cgroup))


def shim_with(folder: Path, *lines: str) -> str:
    """Run a shim that lines of Python have changed first. Return its result."""
    code = "\n".join(
        ["import errno, os, posix, sys", "from pulsar_api.shim import shim", *lines]
    )
    code += "\nshim.main(sys.argv[1])\n"
    program = [sys.executable, "-c", code, str(folder)]
    subprocess.run(program, check=True, stdout=subprocess.DEVNULL, timeout=60, cwd="/")
    return (folder / "exit").read_text()


REMOVED = """
start = shim.Command.{method}
def once(self):
    shim.Command.{method} = start
    os.rmdir(self.spec.cgroup)
    return start(self)
shim.Command.{method} = once
"""


@pytest.mark.parametrize("method", ["open", "start"])
def test_shim_makes_a_removed_cgroup_again(
    delegated: Path, tmp_path: Path, method: str
) -> None:
    """Systemd removes empty cgroups when the unit stops."""
    cgroup = delegated / "task-1-x"
    cgroup.mkdir()
    ordered(tmp_path / "1", cgroup, "sh", "-c", "cat /proc/self/cgroup")
    result = shim_with(tmp_path / "1", REMOVED.format(method=method))
    assert "code 0\n" in result
    assert (tmp_path / "1" / "output").read_text().endswith("/task-1-x\n")
    assert not cgroup.exists()


def test_shim_waits_for_processes_and_descriptors(delegated: Path, tmp_path: Path) -> None:
    """Each attempt closes the descriptors that it has opened."""
    cgroup = delegated / "task-1-x"
    cgroup.mkdir()
    ordered(tmp_path / "1", cgroup, "sh", "-c", "exit 3", path="/nowhere:/usr/none:/bin")
    result = shim_with(
        tmp_path / "1",
        "shim.RETRY = 0.01",
        "fork, pipe2, seen = posix.fork, posix.pipe2, []",
        "shim.clone_into = lambda cgroup: -1",
        "def short_of_processes():",
        "    seen.append(len(os.listdir('/proc/self/fd')))",
        "    if len(seen) < 20: raise OSError(errno.EAGAIN, 'no more processes')",
        "    assert set(seen) == {seen[0]}, seen",
        "    return fork()",
        "def short_of_descriptors(flags):",
        "    if len(seen) == 10: seen.append(seen[0]); raise OSError(errno.EMFILE, 'full')",
        "    return pipe2(flags)",
        "posix.fork, posix.pipe2 = short_of_processes, short_of_descriptors",
    )
    assert "code 3\n" in result


def test_shim_removes_sub_cgroups(delegated: Path, tmp_path: Path) -> None:
    """A task with the user of the daemon can make them, as container tools do."""
    cgroup = delegated / "task-1-x"
    cgroup.mkdir()
    inner = cgroup / "inner" / "most"
    line = f"mkdir -p {inner}; echo $$ > {inner}/cgroup.procs; sleep 3600.5 & exit 0"
    ordered(tmp_path / "1", cgroup, "sh", "-c", line)
    result = shim_with(tmp_path / "1", "shim.Shim.linger = lambda self: self.kill(0)")
    assert "left " in result
    wait_for(lambda: not named("3600.5"), "the end of the process")
    cgroups.Cgroups(delegated, -1).end("task-1-x", 5)
    assert not cgroup.exists()


def test_start_moves_processes_of_a_version_without_cgroups(
    start: Start, delegated: Path
) -> None:
    """The kernel gives no controllers to tasks while their parent has processes."""
    with subprocess.Popen(["sleep", "3600"]) as process:
        (delegated / "cgroup.procs").write_text(str(process.pid))
        start()
        assert members(delegated) == []
        assert process.pid in members(delegated / "daemon")
        process.kill()


@pytest.mark.parametrize(
    "limit", ['memory-max = "64M"', 'cpu-quota = "50%"', "tasks-max = 9"]
)
def test_limit_without_its_controller_is_refused(place: Path, limit: str) -> None:
    """Otherwise tasks would run without the limit."""
    table = f'[[run-as]]\non = ["*"]\nuser = "{SHOP}"\n{limit}\n'
    refused(place, table, limit.partition(" ")[0])


@pytest.mark.parametrize(
    ("limit", "why"),
    [
        ('memory-max = "64"', "memory-max"),
        ('memory-max = "lots"', "memory-max"),
        ("memory-max = 1.5", "memory-max"),
        ("cpu-quota = 50", "cpu-quota"),
        ('cpu-quota = "0%"', "cpu-quota"),
        ("tasks-max = 0", "tasks-max"),
        ('tasks-max = "many"', "tasks-max"),
        ("tasks-max = true", "tasks-max"),
    ],
)
def test_invalid_limit_is_refused(place: Path, limit: str, why: str) -> None:
    """The message names the setting."""
    table = f'[[run-as]]\non = ["*"]\nuser = "{SHOP}"\n{limit}\n'
    refused(place, table, f"{why} must be")
