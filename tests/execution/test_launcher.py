"""Tests of the launcher, the shims that it forks, and its failures."""

import errno
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from attrs import define, field
from twisted.internet import reactor
from twisted.internet.error import ProcessDone, ProcessExitedAlready, ProcessTerminated
from twisted.internet.interfaces import IProcessTransport
from twisted.internet.process import ProcessReader
from twisted.internet.protocol import ProcessProtocol
from twisted.internet.task import deferLater
from twisted.logger import ILogObserver, LogEvent, globalLogPublisher
from twisted.python.failure import Failure
from zope.interface import implementer
from zope.interface.verify import verifyObject

from pulsar_api.execution import followed_run, launcher, launcher_process, proc
from pulsar_api.execution.executor import ShimExecutor
from pulsar_api.execution.launched_shim import StatusUnknown
from pulsar_api.execution.launcher import Launcher
from pulsar_api.execution.local_machine import LocalMachine
from pulsar_api.execution.proc import Entry, Table
from pulsar_api.execution.programs import Programs
from pulsar_api.shim import shim
from pulsar_api.tasks.interfaces import Bounds
from pulsar_api.tasks.model import Cause, Command, Exit
from tests.execution.test_executor import MEASURED, Runner, Started, until
from tests.integration.daemon import wait_for

ROOT = Path(__file__).parents[2]


def changed(*lines: str) -> Sequence[str]:
    """Return the command of a launcher that runs these lines of Python before it starts."""
    code = [
        "import os, posix, signal, sys, time",
        f"sys.path.insert(0, {str(ROOT)!r})",
        "from pulsar_api.shim import launcher, shim",
        "die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)",
        *lines,
        "os._exit(launcher.main())",
    ]
    return (sys.executable, "-I", "-S", "-c", "\n".join(code))


@define
class Residents(Runner):
    """Runs commands under shims that a launcher forks, unless a test changes that."""

    resident: Launcher | None = None

    @property
    def executor(self) -> ShimExecutor:
        """The executor under test."""
        machine = LocalMachine(reactor, self.launcher, None, self.resident)
        return ShimExecutor(machine, reactor, self.tasks, str, self.umask, self.files)

    @property
    def pid(self) -> int:
        """The process number of the present launcher."""
        assert self.resident is not None
        assert self.resident._process is not None
        transport: Any = self.resident._process.transport
        number: int = transport.pid
        return number

    async def begin(self, command: Sequence[str] = Programs().launcher) -> None:
        """Start a launcher and wait until it is ready."""
        self.resident = Launcher(reactor, command, self.tasks.parent)
        self.resident.start()
        await self.works()

    async def works(self) -> None:
        """Wait until a launcher is ready."""
        assert self.resident is not None
        await until(lambda: self.resident and self.resident._works, "a launcher")

    async def end(self, started: Started) -> Exit:
        """Return the result of a run once its pipes are closed."""
        exit = await started.sink.end()
        await deferLater(reactor, 0)
        return exit

    def prepare(self, number: int, *arguments: str) -> Path:
        """Create the folder of a task that something else starts, and return it."""
        folder = self.tasks / str(number)
        folder.mkdir()
        self.executor._write_spec(folder, Command(arguments, self.environment), Bounds(1))
        return folder

    def starts(self) -> list[str]:
        """Return the shims that started a command."""
        path = self.tasks.parent / "starts"
        return path.read_text().split() if path.exists() else []

    async def first(self) -> str:
        """Wait for the first command and return its shim."""
        return (await until(self.starts, "the note of a start"))[0]

    def count(self, then: str = "", number: int = 1) -> Started:
        """Start a line of shell that first notes its start."""
        note = f"echo $PPID >> {self.tasks.parent}/starts"
        return self.start("/bin/sh", "-c", f"{note}; {then}", number=number)


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[Residents]:
    """Yield a runner. All processes of its commands end with the test."""
    runner = Residents(tmp_path / "tasks")
    runner.tasks.mkdir()
    yield runner
    for run in runner.runs:
        run.detach()
    if runner.resident is not None:
        runner.resident.stop()
    for entry in Table().entries.values():
        if str(tmp_path).encode() in b"\0".join(proc.arguments(entry)):
            with suppress(ProcessLookupError):
                os.kill(entry.pid, signal.SIGKILL)
    wait_for(runner.kill_left, "the end of all that this test started")


@pytest.fixture
def log() -> Iterator[list[str]]:
    """Return the log messages as text."""
    texts: list[str] = []

    @implementer(ILogObserver)
    def observe(event: LogEvent) -> None:
        with suppress(KeyError):
            texts.append(event["log_format"].format(**event))

    globalLogPublisher.addObserver(observe)
    yield texts
    globalLogPublisher.removeObserver(observe)


def descriptors() -> dict[str, str]:
    """Return the open descriptors of this process."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found[name] = os.readlink(f"/proc/self/fd/{name}")
    return found


@define(eq=False)
class Heard(ProcessProtocol):
    """Records the events that a transport reports."""

    events: list[str] = field(factory=list)
    text: dict[int, bytes] = field(factory=lambda: {1: b"", 2: b""})
    reason: Any = None
    transport: Any = None

    def connectionMade(self) -> None:
        self.events.append("made")
        self.transport.closeStdin()

    def childDataReceived(self, childFD: int, data: bytes) -> None:
        self.text[childFD] += data

    def childConnectionLost(self, childFD: int) -> None:
        if childFD:
            self.events.append(f"lost {childFD}")

    def processExited(self, reason: Failure) -> None:
        self.events.append("exited")

    def processEnded(self, reason: Failure) -> None:
        self.events.append("ended")
        self.reason = reason.value

    async def end(self) -> Any:
        """Wait for the end and return the reason."""
        await until(lambda: self.reason, "the end of a process")
        return self.reason


# -- a forked shim


async def test_a_task_under_a_forked_shim_ends_normally(runner: Residents) -> None:
    """Its shim is a child of the launcher. Output, records and code are the usual ones."""
    await runner.begin()
    started = runner.count("echo one; echo two >&2; exit 3")
    exit = await runner.end(started)
    assert (exit.code, exit.error, exit.lost) == (3, None, False)
    assert started.output == b"one\ntwo\n"
    assert len(started.sink.pids) == 1
    await deferLater(reactor, 0.05)
    assert started.sink.exits == [exit]


LOOK = r"""
cd /proc/$PPID
while grep -q '^SigBlk:.*[1-9a-f]' status; do sleep 0.01; done
grep -E '^(Uid|Gid|Groups|Sig(Blk|Ign|Cgt)|Cap|NoNew|Seccomp|Umask|Threads)' status
cat limits environ
cut -d' ' -f5,6,7,8 stat | sed s/$PPID/SHIM/g
for fd in fd/*; do readlink $fd; done |
    sed 's/:.*//; s/lock.*/lock/; s:/dev/null:pipe:' | sort
readlink cwd exe root
"""
"""Return the visible properties of a shim. Its descriptor 0 is a pipe or ``/dev/null``.

While it starts a command it blocks signals for a moment (posix_spawn(3)).
"""


async def test_a_forked_shim_equals_one_with_its_own_interpreter(runner: Residents) -> None:
    """Signals, limits, rights, session and descriptors are the same."""
    await runner.begin()
    forked = runner.start("/bin/sh", "-c", LOOK, number=1)
    await forked.sink.end()
    assert runner.resident is not None
    runner.resident.stop()
    executed = runner.start("/bin/sh", "-c", LOOK, number=2)
    await executed.sink.end()
    assert forked.output == executed.output.replace(b"tasks/2", b"tasks/1")
    assert b"SigIgn" in forked.output
    assert b"socket" not in forked.output


async def test_the_process_table_shows_the_folder_of_a_forked_shim(
    runner: Residents,
) -> None:
    """Processes of a dead launcher are therefore not mistaken for orphans of a task."""
    await runner.begin()
    started = runner.count("sleep 60")
    await until(runner.starts, "the start")
    entry = Entry.of(int(await runner.first()))
    assert entry is not None
    assert entry.parent == runner.pid
    assert entry.session == entry.pid
    assert proc.arguments(entry)[-1] == os.fsencode(started.folder)
    started.run.kill()
    await runner.end(started)


async def test_the_launcher_is_in_the_session_and_group_of_the_daemon(
    runner: Residents,
) -> None:
    """So is a new shim. Only KILL ends the launcher."""
    await runner.begin()
    pid = runner.pid
    assert os.getsid(pid) == os.getsid(0)
    assert os.getpgid(pid) == os.getpgrp()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        os.kill(pid, number)
        started = runner.count("cut -d' ' -f4 /proc/$PPID/stat; exit 4", number=number)
        assert (await runner.end(started)).code == 4
        assert int(started.output) == pid


async def test_shims_outlive_the_launcher(runner: Residents) -> None:
    """The launcher ends with the socket of the daemon. Its shims go on to their results."""
    await runner.begin()
    go = runner.tasks.parent / "go"
    started = runner.count(f"while ! [ -e {go} ]; do sleep 0.01; done; exit 5")
    await until(runner.starts, "the start")
    started.run.detach()
    pid = runner.pid
    assert runner.resident is not None
    runner.resident.stop()
    await until(lambda: not Path(f"/proc/{pid}").exists(), "the end of the launcher")
    go.touch()
    adopted = runner.adopt()
    assert (await adopted.sink.end()).code == 5


# -- the transport


async def both(runner: Residents, folder: Path) -> list[Heard]:
    """Start a shim by the launcher and by `spawnProcess`, and return what both reported."""
    heard = [Heard(), Heard()]
    assert runner.resident is not None
    assert runner.resident.spawn(heard[0], folder)
    LocalMachine(reactor, MEASURED).spawn(heard[1], folder)
    for one in heard:
        await one.end()
    return heard


async def test_a_transport_reports_the_same_as_one_of_spawn_process(
    runner: Residents,
) -> None:
    """A failing shim shows its reason. Its end comes last, with the true status."""
    await runner.begin()
    for one in await both(runner, runner.tasks / "none"):
        assert isinstance(one.reason, ProcessTerminated)
        assert (one.reason.exitCode, one.reason.signal) == (1, None)
        assert one.text[2].startswith(b"Traceback")
        assert one.text[2].rstrip().endswith(b"'%b'" % os.fsencode(runner.tasks / "none"))
        assert one.events[0] == "made"
        assert one.events[-1] == "ended"
        assert sorted(one.events[1:-1]) == ["exited", "lost 1", "lost 2"]
        assert one.transport.pid is None
        with pytest.raises(ProcessExitedAlready):
            one.transport.signalProcess("TERM")
    verifyObject(IProcessTransport, (await both(runner, runner.tasks))[0].transport)


async def test_a_transport_reports_code_0_and_death_by_a_signal(runner: Residents) -> None:
    """`ProcessDone` stands for code 0 only. KILL is the only signal that ends a shim."""
    await runner.begin()
    assert runner.resident is not None
    done, killed = Heard(), Heard()
    assert runner.resident.spawn(done, runner.prepare(1, "/bin/true"))
    assert isinstance(await done.end(), ProcessDone)
    assert runner.resident.spawn(killed, runner.prepare(2, "/bin/sleep", "60"))
    await until(lambda: killed.text[1], "the start")
    killed.transport.signalProcess("KILL")
    assert isinstance(await killed.end(), ProcessTerminated)
    assert (killed.reason.exitCode, killed.reason.signal) == (None, signal.SIGKILL)


async def test_a_kill_goes_through_the_launcher(runner: Residents) -> None:
    """It ends the whole tree."""
    await runner.begin()
    started = runner.count("sleep 60 & sleep 60")
    await until(lambda: started.sink.pids, "the start")
    started.run.kill()
    exit = await runner.end(started)
    assert exit.signal == "SIGTERM"
    assert runner.left() == []


# -- scarce resources


async def test_a_start_without_descriptors_fails_at_once_and_leaks_nothing(
    runner: Residents,
) -> None:
    """It raises an `OSError` before anything starts, as `spawnProcess` does."""
    await runner.begin()
    assert runner.resident is not None
    before = descriptors()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = next(n for n in range(1000) if str(n) not in before)
    for free in range(4):
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + free, hard))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                runner.resident.spawn(Heard(), runner.tasks / "1")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert descriptors() == before
    assert (await runner.end(runner.count("exit 6"))).code == 6


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOMEM])
async def test_a_failed_fork_is_tried_again(runner: Residents, number: int) -> None:
    """No process exists yet. The task waits for resources as without a launcher."""
    fail = f"def fork(): raise OSError({number}, 'no')"
    await runner.begin(changed(fail, "posix.fork = fork"))
    before = descriptors()
    exit = await runner.end(runner.count())
    assert (exit.unstarted, exit.passing) == (True, True)
    assert os.strerror(number) in str(exit.error)
    assert runner.starts() == []
    await until(lambda: descriptors() == before, "the end of the pipes")


async def test_a_full_socket_does_not_block_the_daemon(runner: Residents) -> None:
    """Messages wait in order, with their pipes. None is lost, and no descriptor leaks."""
    await runner.begin()
    assert runner.resident is not None
    before = descriptors()
    os.kill(runner.pid, signal.SIGSTOP)
    crowd = [Heard() for _ in range(400)]
    begin = time.monotonic()
    for one in crowd:
        assert runner.resident.spawn(one, runner.tasks / "none")
    assert time.monotonic() < begin + 3
    assert runner.resident._process is not None
    assert runner.resident._process._unsent
    os.kill(runner.pid, signal.SIGCONT)
    for one in crowd:
        assert (await one.end()).exitCode == 1
    assert descriptors() == before


async def test_a_folder_with_too_long_a_name_gets_its_own_interpreter(
    runner: Residents,
) -> None:
    """The name does not fit into the process table."""
    await runner.begin()
    assert runner.resident is not None
    assert not runner.resident.spawn(Heard(), runner.tasks / ("n" * 200))


# -- the death of a launcher


async def test_a_launcher_that_dies_before_a_fork_starts_nothing(
    runner: Residents, log: list[str]
) -> None:
    """The task is started once, by an interpreter of its own."""
    await runner.begin(changed("posix.fork = die"))
    exit = await runner.end(runner.count("exit 7"))
    assert exit.code == 7
    assert len(runner.starts()) == 1
    assert any("another one is started" in text for text in log)


async def test_a_launcher_that_dies_after_a_fork_does_not_start_a_task_twice(
    runner: Residents,
) -> None:
    """The forked shim has the lock. A second shim finds the lock, or its files."""
    tell = "tell = launcher.Launcher.tell"
    dies = "launcher.Launcher.tell = lambda s, n, w, v: die() if n else tell(s, n, w, v)"
    await runner.begin(changed(tell, dies))
    started = runner.count("sleep 0.3; echo done; exit 8")
    exit = await runner.end(started)
    assert exit.code == 8
    assert started.output == b"done\n"
    assert len(runner.starts()) == 1
    assert len(started.sink.pids) == 1


@pytest.mark.parametrize("first", ["forked", "again"])
async def test_only_one_of_two_shims_starts_the_command(
    runner: Residents, first: str
) -> None:
    """The launcher dies between the fork and the lock.

    Each of the shims is the faster once.
    """
    go, gone = runner.tasks.parent / "go", runner.tasks.parent / "gone"
    await runner.begin(changed(*NEVER_TOLD, WAITS.format(go=str(go), gone=str(gone))))
    if first == "forked":
        late = f"while ! [ -e {runner.tasks}/1/lock ]; do sleep 0.01; done"
        runner.launcher = ("/bin/sh", "-c", f'{late}; exec "$@"', "sh", *MEASURED)
        go.touch()
    started = runner.count("sleep 0.2; exit 9")
    if first == "again":
        await until(runner.starts, "the start")
        go.touch()
        await until(lambda: gone.exists() and gone.read_text(), "the end of the other")
        assert gone.read_text() == "75"
    exit = await runner.end(started)
    assert exit.code == 9
    assert len(runner.starts()) == 1
    assert len(started.sink.exits) == 1


async def test_a_running_task_outlives_its_launcher(runner: Residents) -> None:
    """The daemon follows its lock, because the exit status goes to another process."""
    await runner.begin()
    go, again = runner.tasks.parent / "go", runner.tasks.parent / "again"
    runner.launcher = ("/bin/sh", "-c", f'touch {again}; exec "$@"', "sh", *MEASURED)
    started = runner.count(f"while ! [ -e {go} ]; do sleep 0.01; done; exit 10")
    await until(lambda: started.sink.pids, "the start")
    os.kill(runner.pid, signal.SIGKILL)
    await runner.works()
    go.touch()
    exit = await runner.end(started)
    assert (exit.code, len(runner.starts())) == (10, 1)
    assert not again.exists()


async def test_a_task_of_a_dead_launcher_can_be_killed(runner: Residents) -> None:
    """The kill comes before the death, and is carried out after it."""
    await runner.begin()
    started = runner.count("sleep 60")
    await until(lambda: started.sink.pids, "the start")
    os.kill(runner.pid, signal.SIGSTOP)
    started.run.kill()
    os.kill(runner.pid, signal.SIGKILL)
    exit = await runner.end(started)
    assert exit.cause is Cause.KILL
    assert runner.left() == []


async def test_without_a_launcher_an_exit_status_is_unknown(runner: Residents) -> None:
    """The transport reports that like any other end, after the pipes have closed."""
    await runner.begin()
    assert runner.resident is not None
    heard = Heard()
    assert runner.resident.spawn(heard, runner.prepare(1, "/bin/sleep", "60"))
    await until(lambda: heard.text[1], "the start")
    os.kill(runner.pid, signal.SIGKILL)
    assert isinstance(await heard.end(), StatusUnknown)
    assert heard.events == ["made", "lost 1", "lost 2", "ended"]
    with pytest.raises(ProcessExitedAlready):
        heard.transport.signalProcess("TERM")


async def test_a_stopped_launcher_is_killed_and_delays_a_start_briefly(
    runner: Residents, monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    """The pending start is made by an interpreter of its own."""
    await runner.begin()
    monkeypatch.setattr(launcher_process, "TICK", 0.05)
    os.kill(runner.pid, signal.SIGSTOP)
    exit = await runner.end(runner.count("exit 11"))
    assert (exit.code, len(runner.starts())) == (11, 1)
    assert any("does not answer" in text for text in log)


async def test_a_launcher_that_survives_kill_is_abandoned(
    runner: Residents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each shim that it forks takes the lock, or finds it taken."""
    await runner.begin()
    monkeypatch.setattr(launcher_process, "TICK", 0.05)
    monkeypatch.setattr(launcher_process.LauncherProcess, "kill", lambda _: None)
    pid = runner.pid
    os.kill(pid, signal.SIGSTOP)
    started = runner.count("sleep 0.5; exit 15")
    await until(runner.starts, "the start")
    os.kill(pid, signal.SIGCONT)  # it forks for the message in its socket
    exit = await runner.end(started)
    assert (exit.code, len(runner.starts())) == (15, 1)
    await until(lambda: Entry.of(pid) is None, "the end of the launcher")


async def test_a_failed_start_in_doubt_bars_late_shims(runner: Residents) -> None:
    """The daemon takes the lock before it reports the end of the task."""
    go, gone = runner.tasks.parent / "go", runner.tasks.parent / "gone"
    await runner.begin(changed(*NEVER_TOLD, WAITS.format(go=str(go), gone=str(gone))))
    runner.launcher = ("/bin/sh", "-c", "echo no >&2; exit 3")
    exit = await runner.end(runner.count())
    assert exit.error == "cannot start the process that watches the command: no"
    assert not exit.unstarted
    go.touch()
    await until(lambda: gone.exists() and gone.read_text(), "the end of the other")
    assert gone.read_text() == "75"
    assert runner.starts() == []


async def test_a_stopped_launcher_does_not_hide_the_death_of_a_shim(
    runner: Residents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pipes have closed without a status.

    The daemon asks the launcher and gets no answer.
    """
    await runner.begin()
    monkeypatch.setattr(launcher_process, "TICK", 0.05)
    started = runner.count("sleep 60")
    await until(lambda: started.sink.pids, "the start")
    os.kill(runner.pid, signal.SIGSTOP)
    os.kill(int(await runner.first()), signal.SIGKILL)
    exit = await runner.end(started)
    assert exit.lost
    assert runner.left() == []


async def test_an_idle_launcher_is_left_alone(
    runner: Residents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is idle while a shim without pipes watches the remaining processes of its task."""
    await runner.begin()
    monkeypatch.setattr(launcher_process, "TICK", 0.02)
    pid = runner.pid
    started = runner.count("(exec >/dev/null 2>&1; sleep 60) & exit 0")
    assert (await runner.end(started)).code == 0
    await deferLater(reactor, 0.5)  # 25 ticks
    assert runner.pid == pid
    assert runner.resident is not None
    assert runner.resident._process is not None
    again = runner.resident._process._next
    assert again is not None
    # The next check is far away.
    assert again.getTime() - reactor.seconds() > launcher_process.REST / 2


async def test_tasks_run_without_a_launcher_until_one_starts(
    runner: Residents, monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    """Each starts an interpreter, and one message says so.

    Later the launcher starts and works.
    """
    monkeypatch.setattr(launcher, "PAUSE", 0.3)
    program = runner.tasks.parent / "python"
    command = (str(program), *Programs().launcher[1:])
    runner.resident = Launcher(reactor, command, runner.tasks.parent)
    runner.resident.start()
    await until(lambda: any("each task" in text for text in log), "the third failure")
    assert (await runner.end(runner.count("exit 12"))).code == 12
    await deferLater(reactor, 0.7)
    assert sum("each task starts an interpreter" in text for text in log) == 1
    program.symlink_to(sys.executable)
    await runner.works()
    assert any("works again" in text for text in log)
    exit = await runner.end(runner.count("exit 13", number=2))
    entry = runner.starts()
    assert (exit.code, len(entry)) == (13, 2)


async def test_a_launcher_that_dies_repeatedly_is_not_restarted_for_a_while(
    runner: Residents, log: list[str]
) -> None:
    """Each pending start is made, once."""
    await runner.begin()
    resident = runner.resident
    assert resident is not None
    for number in range(1, launcher.DEATHS + 1):
        await runner.works()
        os.kill(runner.pid, signal.SIGKILL)
        deaths = range(number, number + 1)
        await until(lambda d=deaths: len(resident._deaths) in d, "a death")  # type: ignore[misc]
    assert not resident._works
    assert sum("each task starts an interpreter" in text for text in log) == 1
    assert (await runner.end(runner.count("exit 14"))).code == 14


WAITS = """
def main(folder, main=shim.main):
    while not os.path.exists({go!r}):
        time.sleep(0.01)
    done = main(folder)
    open({gone!r}, "w").write(str(done))
    return done
shim.main = main
"""
"""A shim that starts when its test allows it, and writes its exit status to a file."""

NEVER_TOLD = (
    "tell = launcher.Launcher.tell",
    "launcher.Launcher.tell = lambda s, n, w, v: die() if n else tell(s, n, w, v)",
)
"""A launcher that dies right after a fork."""


async def test_a_task_reported_as_lost_does_not_start_later(runner: Residents) -> None:
    """The second shim of a start in doubt reported itself without the lock.

    The first must not start.
    """
    go, gone = runner.tasks.parent / "go", runner.tasks.parent / "gone"
    await runner.begin(changed(*NEVER_TOLD, WAITS.format(go=str(go), gone=str(gone))))
    ready = "".join(f"\\{byte:03o}" for byte in shim.bare(shim.READY))
    runner.launcher = ("/bin/sh", "-c", f"printf '{ready}'; kill -9 $$")
    exit = await runner.end(runner.count())
    assert exit.lost
    assert not (runner.tasks / "1" / "spec").exists()
    go.touch()
    await until(lambda: gone.exists() and gone.read_text(), "the end of the first shim")
    assert (gone.read_text(), runner.starts()) == (str(shim.TAKEN), [])


async def test_a_start_in_doubt_that_cannot_be_repeated_can_be_killed(
    runner: Residents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While no process can be forked, it is tried a few times a second."""
    flag = runner.tasks.parent / "flag"
    forks = f"""
def fork():
    with open({str(flag)!r}, "a") as file:
        file.write(".")
    if os.path.getsize({str(flag)!r}) == 1:
        die()
    raise OSError(11, "no more processes")
posix.fork = fork
"""
    await runner.begin(changed(forks))
    runner.launcher = ("/nowhere/to/be/found",)
    real = reactor.spawnProcess

    def spawn(protocol: ProcessProtocol, program: str, *more: Any, **named: Any) -> Any:
        if program == runner.launcher[0]:
            raise OSError(errno.EAGAIN, "no more processes")
        return real(protocol, program, *more, **named)

    monkeypatch.setattr(reactor, "spawnProcess", spawn)
    started = runner.count()
    begin = time.monotonic()
    await until(lambda: flag.exists() and flag.stat().st_size > 3, "some tries")
    assert flag.stat().st_size < 10 + (time.monotonic() - begin) / followed_run.INTERVAL
    started.run.kill()
    exit = await runner.end(started)
    assert (exit.cause, exit.code, exit.lost) == (Cause.KILL, None, False)
    assert runner.starts() == []


async def test_the_daemon_asks_for_a_shim_whose_end_it_cannot_see(
    runner: Residents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The task holds the pipes of the dead shim open, and the launcher is stopped."""
    await runner.begin()
    monkeypatch.setattr(launcher_process, "TICK", 0.05)
    monkeypatch.setattr(launcher_process, "REST", 0.2)
    started = runner.count("exec 9>/proc/$PPID/fd/1 8>/proc/$PPID/fd/2; sleep 60")
    await until(lambda: started.sink.pids and runner.starts(), "the start")
    await until(lambda: os.path.exists(f"/proc/{started.sink.pids[0]}/fd/8"), "the pipes")
    os.kill(runner.pid, signal.SIGSTOP)
    os.kill(int(await runner.first()), signal.SIGKILL)
    assert (await runner.end(started)).lost


async def test_without_resources_to_watch_a_pipe_nothing_starts(
    runner: Residents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start reports its failure, and leaves nothing open."""
    await runner.begin()
    before = descriptors()
    real = reactor.addReader

    def add(reader: Any) -> None:
        if isinstance(reader, ProcessReader) and reader.name == 2:
            raise OSError(errno.ENOSPC, "too many watches")
        real(reader)

    monkeypatch.setattr(reactor, "addReader", add)
    exit = await runner.end(runner.count())
    assert (exit.unstarted, exit.passing) == (True, True)
    assert descriptors() == before
    monkeypatch.undo()
    assert (await runner.end(runner.count("exit 3", number=2))).code == 3
    assert len(runner.starts()) == 1
