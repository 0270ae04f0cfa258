"""Tests of runs with the real shim, real processes and the real reactor."""

import errno
import fcntl
import os
import pwd
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import ahocorasick_rs
import pytest
from attrs import define, field, frozen
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock, deferLater

from pulsar_api.errors import FolderInUse, StoreUnavailable
from pulsar_api.execution import capture, orphans, programs
from pulsar_api.execution.executor import ShimExecutor
from pulsar_api.execution.local_machine import LocalMachine
from pulsar_api.execution.programs import SHIM_COMMAND
from pulsar_api.execution.results import read_exit
from pulsar_api.execution.task_files import alive
from pulsar_api.output.files import Output
from pulsar_api.output.records import Record
from pulsar_api.shim import masker, shim
from pulsar_api.tasks.clock import SteadyClock
from pulsar_api.tasks.interfaces import Bounds, Reading, Run, Secrets
from pulsar_api.tasks.model import Cause, Command, Exit, Process, Status, judge
from pulsar_api.tasks.secret_forms import forms
from tests.fakes import person
from tests.integration.daemon import (
    PATIENCE,
    end_shim,
    marked,
    shim_lives,
    shim_of,
    wait_for,
)

T = TypeVar("T")

_COVERAGE = os.environ.get("COVERAGE_PROCESS_CONFIG")
MEASURED = (
    SHIM_COMMAND
    if _COVERAGE is None
    else (
        *("/usr/bin/env", f"COVERAGE_PROCESS_CONFIG={_COVERAGE}"),
        *(sys.executable, shim.__file__),
    )
)
"""The command that starts a shim.

Coverage is measured in it if it is measured in the tests.
"""


def adjusted(*lines: str, launcher: Sequence[str] = MEASURED) -> Sequence[str]:
    """Return the command of a shim that runs these lines of Python before it starts."""
    begin = ("import os, sys", f"sys.path.insert(0, {str(Path(shim.__file__).parent)!r})")
    code = "\n".join([*begin, "import shim", *lines, "os._exit(shim.main(sys.argv[1]))"])
    return (*launcher[:-1], "-c", code)


def held(go: Path) -> Sequence[str]:
    """Return the command of a shim that waits for a file before it starts."""
    wait = f'while ! [ -e {shlex.quote(str(go))} ]; do sleep 0.01; done; exec "$@"'
    return ("/bin/sh", "-c", wait, "sh", *MEASURED)


PYTHON = (sys.executable, "-I", "-S", "-c")
MARK = "TEST_MARK"
MACHINE = LocalMachine(reactor)

LATE = 1.0
"""Seconds after the grace period within which all processes of a task must be gone."""
NOISE = 2.0
"""Seconds that a busy machine with two cores may add to a step of milliseconds."""


# -- helpers


async def until(condition: Callable[[], T], what: str) -> T:
    """Return the first true value of a condition. The reactor runs meanwhile."""
    end = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < end, f"waited in vain for {what}"
        await deferLater(reactor, 0.01)
    return value


class RecordingSink:
    """A sink that remembers its calls."""

    def __init__(self) -> None:
        self.pids: list[int] = []
        self.sizes: list[int] = []
        self.exits: list[Exit] = []
        self._end: Deferred[Exit] = Deferred()

    def started(self, pid: int) -> None:
        self.pids.append(pid)

    def printed(self, size: int) -> None:
        self.sizes.append(size)

    def ended(self, exit: Exit) -> None:
        self.exits.append(exit)
        if len(self.exits) == 1:
            self._end.callback(exit)

    async def end(self) -> Exit:
        """Wait for the end."""
        return await self._end.addTimeout(PATIENCE, reactor)


@define
class Started:
    """A run, its sink, and its files."""

    run: Run
    sink: RecordingSink
    folder: Path

    @property
    def output(self) -> bytes:
        """Return the bytes of the output file."""
        path = self.folder / "output"
        return path.read_bytes() if path.exists() else b""

    @property
    def records(self) -> list[Record]:
        """Return the records of the index."""
        return list(Output(self.folder).records())

    def stream(self, code: int) -> bytes:
        """Return the bytes of one stream, put together again."""
        whole, result, begin = self.output, b"", 0
        for record in self.records:
            if record.code in {shim.STDOUT, shim.STDERR}:
                if record.code == code:
                    result += whole[begin : record.number]
                begin = record.number
        return result

    def at(self, code: int) -> float:
        """Return the time of the first record of a kind, in seconds since the epoch."""
        clock = next(r for r in self.records if r.code == shim.CLOCK)
        found = next(r for r in self.records if r.code == code)
        return (clock.number - clock.at + found.at) / 1000

    @property
    def result_at(self) -> float:
        """Return the time at which the result was written."""
        return (self.folder / "exit").stat().st_mtime

    @property
    def shim(self) -> int:
        """Return the process number of the shim, which may not hold its lock yet."""
        return int(self.run.transport.pid)  # type: ignore[attr-defined]

    @property
    def watcher(self) -> int:
        """Return the process number of the shim, read from its lock."""
        return shim_of(self.folder)

    async def prints(self, text: bytes) -> None:
        """Wait until the command has printed a text."""
        await until(lambda: text in self.output, f"{text!r} in the output")


@define
class Runner:
    """Starts commands and finds their processes again by a mark."""

    tasks: Path
    mark: str = field(factory=lambda: uuid4().hex)
    launcher: Sequence[str] = MEASURED
    umask: int = 0o022
    files: int = 0
    runs: list[Run] = field(factory=list)

    @property
    def executor(self) -> ShimExecutor:
        """Return the executor under test."""
        return ShimExecutor(
            LocalMachine(reactor, self.launcher),
            reactor,
            self.tasks,
            lambda: uuid4().hex,
            self.umask,
            self.files,
        )

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment of a command, unless its test gives another."""
        return {"PATH": os.environ["PATH"], MARK: self.mark}

    def start(
        self,
        *arguments: str,
        grace: float = 5,
        total: float = 0,
        silence: float = 0,
        environment: Mapping[str, str] | None = None,
        directory: str | None = None,
        last_line: str | None = None,
        number: int = 1,
    ) -> Started:
        """Start a command as task 1."""
        command = Command(
            arguments,
            self.environment if environment is None else environment,
            directory,
            last_line,
        )
        sink = RecordingSink()
        with suppress(OSError):
            (self.tasks / str(number)).mkdir(exist_ok=True)
        run = self.executor.start(number, command, Bounds(grace, total, silence), sink)
        self.runs.append(run)
        return Started(run, sink, self.tasks / str(number))

    def sh(self, text: str, *arguments: str, grace: float = 5) -> Started:
        """Start a shell script."""
        return self.start("/bin/sh", "-c", text, "sh", *arguments, grace=grace)

    def python(self, text: str, *arguments: str, grace: float = 5) -> Started:
        """Start a Python script."""
        return self.start(*PYTHON, text, *arguments, grace=grace)

    def adopt(self, number: int = 1, permit: str | None = None) -> Started:
        """Follow task 1 as a daemon does after a restart."""
        sink = RecordingSink()
        run = self.executor.adopt(number, permit, Bounds(5), sink)
        self.runs.append(run)
        return Started(run, sink, self.tasks / str(number))

    def left(self) -> list[int]:
        """Return the living processes of the commands."""
        return marked(f"{MARK}={self.mark}")

    def kill_left(self) -> bool:
        """Kill the living processes of the commands, and return whether there were none."""
        left = self.left()
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not left


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[Runner]:
    """Yield a runner. All processes of its commands end with the test."""
    runner = Runner(tmp_path / "tasks")
    runner.tasks.mkdir()
    yield runner
    for run in runner.runs:
        run.detach()
    locks = list(tmp_path.glob("**/lock"))
    for lock in locks:
        end_shim(lock)
    wait_for(runner.kill_left, "the end of all that this test started")
    # A shim of a failed test may still wait for something, even for its lock.
    for lock in locks:
        end_shim(lock, signal.SIGKILL)
    for run in runner.runs:
        transport = getattr(run, "transport", None)
        if transport is not None and transport.pid:
            os.kill(transport.pid, signal.SIGKILL)
    wait_for(lambda: not any(map(shim_lives, locks)), "the end of the shims")


# -- the end of a command


@pytest.mark.parametrize("code", [0, 1, 3, 127, 128, 143, 255])
async def test_an_exit_code_is_reported_unchanged(runner: Runner, code: int) -> None:
    """No exit code is read as a signal, not even one above 128."""
    started = runner.sh(f"exit {code}")
    exit = await started.sink.end()
    assert (exit.code, exit.signal, exit.error) == (code, None, None)
    assert (exit.cause, exit.forced, exit.lost) == (Cause.ITSELF, False, False)


def ended_at(exit: Exit) -> float:
    """Return the time of the end, which every result of a shim has."""
    assert exit.ended_at is not None
    return exit.ended_at


async def test_a_sink_hears_a_start_then_output_then_one_end(runner: Runner) -> None:
    """It hears one pid, growing sizes and one result.

    The shim is started without changes.
    """
    runner.launcher = SHIM_COMMAND
    begin = time.time()
    started = runner.sh("echo $$; echo no >&2; exit 3")
    exit = await started.sink.end()
    assert started.output.splitlines()[0] == str(started.sink.pids[0]).encode()
    assert len(started.sink.pids) == 1
    assert started.sink.sizes == sorted(started.sink.sizes)
    assert started.sink.sizes[-1] == exit.output_size == len(started.output)
    assert begin <= ended_at(exit) <= time.time()
    await deferLater(reactor, 0.05)
    assert started.sink.exits == [exit]


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (1, "SIGHUP"),
        (9, "SIGKILL"),
        (11, "SIGSEGV"),
        (13, "SIGPIPE"),
        (15, "SIGTERM"),
        (34, "SIGRTMIN"),
        (36, "SIGRTMIN+2"),
        (64, "SIGRTMAX"),
    ],
)
async def test_a_command_killed_by_a_signal_has_the_name_of_the_signal_and_no_code(
    runner: Runner, number: int, name: str
) -> None:
    """Real-time signals are among them."""
    started = runner.python(f"import os; os.kill(os.getpid(), {number})")
    if number == signal.SIGPIPE:  # Python ignores it
        started = runner.start("/bin/sh", "-c", "kill -PIPE $$", number=2)
    exit = await started.sink.end()
    assert (exit.code, exit.signal, exit.error) == (None, name, None)
    assert exit.cause is Cause.ITSELF


@pytest.mark.parametrize(
    ("last", "good"),
    [
        ("echo done", True),
        ("echo done; echo but >&2", True),
        ("printf done", True),
        ("echo done.", False),
        ("echo done; echo", False),
        ("echo done >&2", False),
        (":", False),
    ],
)
async def test_the_required_last_line_decides_whether_code_0_is_success(
    runner: Runner, last: str, *, good: bool
) -> None:
    """Only the last line of standard output counts, and it must match completely."""
    started = runner.start("/bin/sh", "-c", f"echo begin; {last}", last_line="done")
    exit = await started.sink.end()
    assert (exit.code, exit.good) == (0, good)


# -- the spec of a command

texts = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from("\0=\udc80\udcff")
)


def raw(text: str) -> bytes:
    """Return a text as the kernel receives it."""
    return text.encode("utf-8", "surrogateescape")


class NoProcess:
    """A reactor that starts nothing, so that the file ``spec`` is not removed."""

    def spawnProcess(self, *_: object, **__: object) -> None:
        """Start nothing."""


def written(folder: str, command: Command, bounds: Bounds) -> bytes:
    """Return the spec that the executor writes for a shim."""
    machine = LocalMachine(NoProcess())
    executor = ShimExecutor(machine, Clock(), Path(folder), str, 0o27, 99)
    (Path(folder) / "1").mkdir()
    executor.start(1, command, bounds, RecordingSink())
    return (Path(folder) / "1" / "spec").read_bytes()


@given(
    st.lists(texts, min_size=1),
    st.dictionaries(texts, texts),
    st.lists(st.text(min_size=1).map(str.encode)),
    st.text(),
)
def test_a_shim_reads_the_spec_that_the_executor_wrote(
    arguments: list[str], environment: dict[str, str], secrets: list[bytes], line: str
) -> None:
    """No character in a text acts as a separator."""
    command = Command(tuple(arguments), environment, last_line=line, secrets=tuple(secrets))
    with tempfile.TemporaryDirectory() as folder:
        spec = shim.Spec(written(folder, command, Bounds(1.5, 2, 3, 4)))
    assert (spec.grace, spec.total, spec.silence) == (1.5, 2, 3)
    assert (spec.limit, spec.umask, spec.files) == (4, 0o27, 99)
    assert (spec.arguments, spec.secrets) == (list(map(raw, arguments)), secrets)
    assert spec.directory == b"/"
    assert spec.promise == masker.masked(line.encode(), command.secrets)
    pairs = {raw(key): raw(value) for key, value in environment.items()}
    assert spec.environment == {**pairs, raw(orphans.MARK): raw(f"{folder}/1")}


def test_a_truncated_spec_is_refused(tmp_path: Path) -> None:
    """A shim must not start a command with half of its environment."""
    whole = written(str(tmp_path), Command(("x", "y"), {"a": "b"}), Bounds(1))
    shim.Spec(whole)
    for length in range(len(whole)):
        with pytest.raises(ValueError):  # noqa: PT011 - several kinds
            shim.Spec(whole[:length])


# -- commands that cannot start


async def has_not_started(started: Started) -> str:
    """Check that a command never ran, and return the reason."""
    exit = await started.sink.end()
    assert (exit.code, exit.signal, exit.lost) == (None, None, False)
    assert (started.output, started.sink.pids, started.sink.sizes) == (b"", [], [])
    assert exit.error is not None
    assert "Traceback" not in exit.error
    assert "\n" not in exit.error
    return exit.error


async def test_nul_cannot_set_another_variable(runner: Runner) -> None:
    """Nor can it end an argument. The command does not start, and the reason says why."""
    forged = {"x=1\0FORGED": "1"}, {"x": "1\0FORGED=1"}, {"a=b": "c"}
    for number, more in enumerate(forged, 1):
        environment = {**runner.environment, **more}
        why = await has_not_started(
            runner.start("/usr/bin/env", environment=environment, number=number)
        )
        assert why.startswith("cannot start /usr/bin/env: ")
    why = await has_not_started(runner.start("/bin/echo", "a\0b", number=9))
    assert why == "cannot start /bin/echo: embedded null byte"


async def test_a_command_missing_from_path_is_an_error(runner: Runner) -> None:
    """The reason names the command. The search uses the PATH of the command."""
    why = await has_not_started(runner.start("no-such-program"))
    assert why == "cannot start no-such-program: not found in PATH"
    environment = {"PATH": "/var/empty::/nowhere"}
    why = await has_not_started(runner.start("sh", environment=environment, number=2))
    assert why == "cannot start sh: not found in PATH"
    why = await has_not_started(runner.start("sh", environment={"PATH": ""}, number=3))
    assert why == "cannot start sh: not found in PATH"
    environment = {"PATH": "/nowhere"}
    why = await has_not_started(runner.start("sh", environment=environment, number=4))
    assert why == "cannot start sh: not found in PATH"


async def test_an_empty_name_is_an_error(runner: Runner) -> None:
    """The first argument of a template can turn out to be empty."""
    why = await has_not_started(runner.start(""))
    assert why.startswith("cannot start ")


async def test_without_path_a_default_path_is_searched(runner: Runner) -> None:
    """A command with an empty environment is still found."""
    exit = await runner.start("true", environment={}).sink.end()
    assert (exit.code, exit.error) == (0, None)


async def test_a_missing_file_is_an_error(runner: Runner) -> None:
    """A name with a slash is not searched in PATH."""
    why = await has_not_started(runner.start("/no/such/file"))
    assert why == "cannot start /no/such/file: No such file or directory"


async def test_a_reason_shows_the_whole_name_of_a_command(runner: Runner) -> None:
    """Unicode line separators and invalid UTF-8 do not cut the reason short."""
    name = "/no/line\u2028code 0\x85\r\x0cend\udcff"
    why = await has_not_started(runner.start(name))
    assert why.startswith("cannot start /no/line")
    assert why.endswith("end\ufffd: No such file or directory")


async def test_a_file_that_is_not_executable_is_an_error(
    runner: Runner, tmp_path: Path
) -> None:
    """The reason is the missing permission, even for a file found through PATH."""
    (tmp_path / "deploy").write_text("#!/bin/sh\n")
    why = await has_not_started(runner.start(str(tmp_path / "deploy")))
    assert why.endswith(": Permission denied")
    environment = {"PATH": f"{tmp_path}:/nowhere"}
    why = await has_not_started(runner.start("deploy", environment=environment, number=2))
    assert why == "cannot start deploy: Permission denied"


async def test_a_file_that_is_not_executable_does_not_hide_a_later_one_in_path(
    runner: Runner, tmp_path: Path
) -> None:
    """A shell searches in the same way."""
    (tmp_path / "true").write_text("")
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    exit = await runner.start("true", environment=environment).sink.end()
    assert (exit.code, exit.error) == (0, None)


async def test_a_script_without_an_interpreter_line_is_an_error(
    runner: Runner, tmp_path: Path
) -> None:
    """No shell runs a file that the kernel cannot execute."""
    path = tmp_path / "deploy"
    path.write_text("echo hello\n")
    path.chmod(0o755)
    why = await has_not_started(runner.start(str(path)))
    assert why == f"cannot start {path}: Exec format error"


async def test_a_missing_working_directory_is_an_error(
    runner: Runner, tmp_path: Path
) -> None:
    """The reason names the folder, not the command."""
    gone = str(tmp_path / "gone")
    why = await has_not_started(runner.start("true", directory=gone))
    assert why == f"cannot enter {gone}: No such file or directory"


async def test_arguments_that_are_too_long_are_an_error(runner: Runner) -> None:
    """The kernel accepts no argument of 128 KiB or more, and the reason says so."""
    why = await has_not_started(runner.start("true", "x" * (1 << 17)))
    assert why == "cannot start true: Argument list too long"


async def test_a_task_folder_that_cannot_be_created_is_an_error(runner: Runner) -> None:
    """The sink hears of it only after ``start`` has returned."""
    runner.tasks.rmdir()
    runner.tasks.write_text("a file")
    started = runner.start("true")
    assert started.sink.exits == []
    exit = await started.sink.end()
    assert exit.error is not None
    assert exit.error.startswith("cannot start: Not a directory")
    started.run.kill()


async def test_a_compiled_shim_is_a_copy(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An upgrade of the package does not change the shims of a running daemon."""
    source = tmp_path / "shim.py"
    shutil.copyfile(shim.__file__, source)
    monkeypatch.setattr(shim, "__file__", str(source))
    runner.launcher = programs.compiled(tmp_path).shim
    source.unlink()
    assert (await runner.start("true").sink.end()).code == 0


def test_the_copies_of_an_earlier_version_are_removed(tmp_path: Path) -> None:
    """Without accounts a task could write to them."""
    for name in ("mask.pyc", "masker.pyc", "shim.pyc", "launcher.pyc", "permits"):
        (tmp_path / name).touch()
    programs.remove_compiled(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["permits"]


def test_without_space_for_a_copy_the_shim_of_the_package_runs(tmp_path: Path) -> None:
    """A daemon must be able to start on a full disk."""
    (tmp_path / "file").touch()
    assert programs.compiled(tmp_path / "file").shim == SHIM_COMMAND


async def test_a_shim_that_cannot_be_started_is_an_error(runner: Runner) -> None:
    """The command has not run and never will. A kill is harmless."""
    runner.launcher = ("/no/such/python", shim.__file__)
    started = runner.start("true")
    started.run.kill()
    assert "No such file" in await has_not_started(started)


async def test_the_complaint_of_a_broken_shim_is_the_reason(runner: Runner) -> None:
    """The last line of its standard error explains why the command did not start."""
    runner.launcher = ("/bin/sh", "-c", "echo one >&2; echo two >&2; exit 3")
    why = await has_not_started(runner.start("true"))
    assert why == "cannot start the process that watches the command: two"
    runner.launcher = ("/bin/sh", "-c", "exit 3")
    why = await has_not_started(runner.start("true", number=2))
    assert why == "cannot start the process that watches the command: exit status 3"


# -- the environment of a command


async def test_standard_input_is_empty(runner: Runner) -> None:
    """A command that reads it gets the end of the file at once."""
    started = runner.sh("cat; readlink /proc/self/fd/0")
    assert (await started.sink.end()).code == 0
    assert started.output == b"/dev/null\n"


async def test_the_environment_is_exactly_the_given_one(runner: Runner) -> None:
    """The shim adds only the mark that identifies the processes of a lost task."""
    environment = {
        "PATH": os.environ["PATH"],
        "EMPTY": "",
        "LINES": "one\ntwo\n",
        "EQUALS": "a=b=",
        "UNICODE": "žluťoučký ✓",
        "BYTES": "\udcff\udcfe",
        "SHELL_SAFE": "$(id) `id` 'x' \"y\"",
    }
    started = runner.start("env", "-0", environment=environment)
    await started.sink.end()
    wanted = {f"{k}={v}".encode("utf-8", "surrogateescape") for k, v in environment.items()}
    mark = f"PULSAR_TASK_FOLDER={started.folder}".encode()
    assert set(started.output.split(b"\0")) == {*wanted, mark, b""}


async def test_arguments_arrive_unchanged(runner: Runner) -> None:
    """Each is one argument, even if it is empty or full of special characters."""
    arguments = ["", "a b", "*", "$(id)", "--", "-x", "two\nlines", "✓", "\udcff", ""]
    started = runner.start("printf", "%s\\0", *arguments)
    await started.sink.end()
    wanted = [a.encode("utf-8", "surrogateescape") for a in arguments]
    assert started.output.split(b"\0")[:-1] == wanted


async def test_a_command_starts_in_its_working_directory(
    runner: Runner, tmp_path: Path
) -> None:
    """A relative name is looked up there.

    Without a directory the command starts in the root.
    """
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "run").write_text("#!/bin/sh\npwd -P\n")
    (folder / "run").chmod(0o755)
    started = runner.start("./run", directory=str(folder))
    await started.sink.end()
    assert started.output.decode() == f"{folder.resolve()}\n"
    started = runner.start("pwd", number=2)
    await started.sink.end()
    assert started.output == b"/\n"


async def test_umask_and_limit_of_open_files_come_from_the_executor(runner: Runner) -> None:
    """A command does not inherit those of the daemon."""
    runner.umask, runner.files = 0o027, 77
    started = runner.sh("umask; ulimit -Sn; ulimit -Hn")
    await started.sink.end()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    most = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
    assert started.output.decode().split() == ["0027", "77", most]


async def test_no_signal_is_ignored_or_blocked_in_a_command(runner: Runner) -> None:
    """Python ignores SIGPIPE, and a command must not inherit that."""
    started = runner.start("grep", "-E", "Sig(Ign|Blk)", "/proc/self/status")
    await started.sink.end()
    blocked, ignored = (int(line.split()[1], 16) for line in started.output.splitlines())
    # 32 and 33 belong to the C library, which sets them as it needs.
    assert (blocked, ignored & ~(3 << 31)) == (0, 0)


async def test_a_command_has_only_descriptors_0_to_2(runner: Runner) -> None:
    """It inherits no lock, no pipe of another task and no database."""
    started = runner.python(
        "import os; print(sorted(map(int, os.listdir('/proc/self/fd'))))"
    )
    await started.sink.end()
    assert started.output == b"[0, 1, 2, 3]\n"  # 3 is the folder that is listed


async def test_a_command_leads_a_process_group_of_its_own(runner: Runner) -> None:
    """A signal that it sends to its group does not reach the shim."""
    started = runner.python(
        "import os, signal; print(os.getpgrp() == os.getpid(), flush=True);"
        "os.killpg(0, signal.SIGKILL)"
    )
    exit = await started.sink.end()
    assert (started.output, exit.signal) == (b"True\n", "SIGKILL")


async def test_the_spec_is_removed_before_the_command_runs(runner: Runner) -> None:
    """The environment may hold secrets.

    Only result files stay, readable by their owner alone.
    """
    started = runner.sh("echo ready; exec sleep 60")
    await started.prints(b"ready")
    names = {path.name: path.stat().st_mode & 0o777 for path in started.folder.iterdir()}
    assert names == dict.fromkeys(["lock", "output", "output.idx"], 0o600)
    started.run.kill()
    await started.sink.end()
    assert sorted(os.listdir(started.folder)) == ["exit", "lock", "output", "output.idx"]


# -- output


async def test_both_streams_are_restored_to_the_byte(runner: Runner) -> None:
    """The index returns each stream as it was written, and the streams cover all output."""
    started = runner.python(
        """
import os, random
chance = random.Random(1)
for number in range(3000):
    fd = chance.choice((1, 2))
    os.write(fd, chance.randbytes(chance.choice((1, 7, 100, 5000))))
"""
    )
    await started.sink.end()
    import random

    chance = random.Random(1)
    wanted = {1: b"", 2: b""}
    for _ in range(3000):
        fd = chance.choice((1, 2))
        wanted[fd] += chance.randbytes(chance.choice((1, 7, 100, 5000)))
    assert started.stream(shim.STDOUT) == wanted[1]
    assert started.stream(shim.STDERR) == wanted[2]
    assert len(started.output) == len(wanted[1]) + len(wanted[2])


async def test_output_with_pauses_is_kept_in_order(
    runner: Runner,
) -> None:
    """With time between them, pieces of both streams are stored as they were printed."""
    started = runner.python(
        """
import os, sys, time
for number in range(10):
    os.write(1 + number % 2, b"%d\\n" % number)
    size = 2 * (number + 1)
    while os.stat(sys.argv[1]).st_size < size:
        time.sleep(0.001)
""",
        str(runner.tasks / "1" / "output"),
    )
    await started.sink.end()
    assert started.output == b"".join(b"%d\n" % n for n in range(10))
    codes = [r.code for r in started.records if r.code in {shim.STDOUT, shim.STDERR}]
    assert codes == [shim.STDOUT, shim.STDERR] * 5


async def test_times_never_decrease(runner: Runner) -> None:
    """The index begins with the clock and the start."""
    started = runner.sh("for i in 1 2 3 4 5; do echo $i; sleep 0.02; done")
    begin = time.time()
    exit = await started.sink.end()
    records = started.records
    assert [r.code for r in records[:2]] == [shim.CLOCK, shim.STARTED]
    assert records[1].number == started.sink.pids[0]
    times = [r.at for r in records]
    assert times == sorted(times)
    assert times[-1] >= 80
    assert begin - 1 < started.at(shim.STDOUT) <= ended_at(exit) + 0.01


async def test_a_character_split_between_two_reads_stays_whole(
    runner: Runner, tmp_path: Path
) -> None:
    """The other stream prints in between, and its bytes do not split the character."""
    go = tmp_path / "go"
    started = runner.python(
        """
import os, sys, time
os.write(1, b"a\\xe2\\x82")
os.write(2, b"x")
while not os.path.exists(sys.argv[1]):
    time.sleep(0.005)
os.write(2, b"y")
os.write(1, b"\\xacb\\n")
""",
        str(go),
    )
    await started.prints(b"x")
    go.touch()
    await started.sink.end()
    text = "".join(Output(started.folder).text(0, 100))
    assert "\N{EURO SIGN}" in text
    assert "\ufffd" not in text
    assert started.stream(shim.STDOUT) == "a\N{EURO SIGN}b\n".encode()
    assert started.stream(shim.STDERR) == b"xy"


async def test_invalid_utf_8_is_kept(runner: Runner) -> None:
    """The bytes on disk are unchanged. Read as text they become U+FFFD."""
    data = b"ok \xff\xfe \xc3( \xed\xa0\x80 \xe2\x82"
    started = runner.python(f"import os; os.write(1, {data!r})")
    exit = await started.sink.end()
    assert started.output == data
    assert exit.output_size == len(data)
    assert "".join(Output(started.folder).text(0, 100)) == data.decode("utf-8", "replace")


async def test_a_slow_daemon_receives_the_newest_size(
    runner: Runner, tmp_path: Path
) -> None:
    """The command goes on, and no note is lost, while the pipe to the daemon is full."""
    go, wrote = tmp_path / "go", tmp_path / "wrote"
    started = runner.python(
        """
import os, sys, time
index, wrote, go = sys.argv[1:]
while os.stat(index).st_size < 16 * 6000:
    os.write(1, b"o")
    os.write(2, b"e")
os.mkdir(wrote)
while not os.path.exists(go):
    time.sleep(0.01)
""",
        *(str(runner.tasks / "1" / "output.idx"), str(wrote), str(go)),
    )
    wait_for(wrote.exists, "the end of the flood")  # the reactor stands still
    await until(
        lambda: started.sink.sizes and started.sink.sizes[-1] == len(started.output),
        "news of all of it",
    )
    assert len(started.sink.sizes) < 6000
    go.touch()
    exit = await started.sink.end()
    assert (exit.code, exit.output_size) == (0, len(started.output))


# -- background children


async def test_a_background_child_delays_the_end_by_the_patience_only(
    runner: Runner,
) -> None:
    """A silent child holds the pipes. The run ends all the same, and its result says so."""
    started = runner.sh("echo one; sleep 60 & echo two; exit 5")
    exit = await started.sink.end()
    assert (exit.code, exit.forced, exit.open) == (5, False, True)
    assert started.output == b"one\ntwo\n"
    took = started.result_at - ended_at(exit)
    assert shim.PATIENCE - 0.1 < took < shim.PATIENCE + NOISE
    assert len(runner.left()) == 1  # the run ended by itself


async def test_output_of_a_background_child_within_the_patience_is_kept(
    runner: Runner,
) -> None:
    """When the child ends within the patience, the run ends with it."""
    started = runner.sh("echo soon; (sleep 0.2; echo late) & exit 0")
    exit = await started.sink.end()
    assert started.output == b"soon\nlate\n"
    assert exit.output_size == len(started.output)
    assert (exit.open, exit.left) == (False, ())


@pytest.mark.parametrize("pause", [0.4, 1])
async def test_each_line_of_a_background_child_renews_the_patience(
    runner: Runner, pause: float
) -> None:
    """Output that comes line by line is not cut off."""
    filter = f'while read -r l; do sleep {pause}; echo "[log] $l"; done'
    script = f"exec > >({filter}); for i in 1 2 3 4 5 6; do echo $i; done"
    started = runner.start("/bin/bash", "-c", script)
    exit = await started.sink.end()
    assert started.output == b"".join(b"[log] %d\n" % n for n in range(1, 7))
    assert (exit.code, exit.open) == (0, False)


def test_the_patience_for_open_pipes_is_limited(tmp_path: Path) -> None:
    """The limit holds however often a child prints. Silence ends the patience earlier."""
    told = written(str(tmp_path), Command(("true",), {}), Bounds(5))
    tree = shim.Tree(b"")
    deadlines = shim.Deadlines(shim.Spec(told), shim.Recorder(-1, 0), tree)
    deadlines.last_output, tree.gone = 900.0, 1000.0
    assert deadlines.pipes_until() == 1000 + shim.PATIENCE
    deadlines.last_output = 1002.0
    assert deadlines.pipes_until() == 1002 + shim.PATIENCE
    deadlines.last_output = 1029.0
    assert deadlines.pipes_until() == 1000 + shim.LONGEST


async def test_a_background_child_that_prints_for_ever_does_not_keep_the_run_alive(
    runner: Runner,
) -> None:
    """Its output so far is kept, up to the size in the result."""
    runner.launcher = adjusted("shim.LONGEST = 1.5")
    # Small pieces, so that very many of them wait when the run ends.
    started = runner.sh("while :; do echo more; done & exit 6")
    exit = await started.sink.end()
    assert (exit.code, exit.error, exit.open) == (6, None, True)
    assert len(started.output) == exit.output_size
    assert (b"more\n" * (exit.output_size // 5 + 1)).startswith(started.output)
    assert 1.4 < started.result_at - ended_at(exit) < 1.5 + NOISE
    assert [process.pid for process in exit.left] == runner.left()


async def test_output_in_the_pipes_at_the_end_of_the_patience_is_kept(
    runner: Runner, tmp_path: Path
) -> None:
    """It was printed before the run ended, even if the shim reads it late."""
    go, wrote = tmp_path / "go", tmp_path / "wrote"
    # With O_DIRECT each read of a pipe returns the bytes of one write(2).
    started = runner.python(
        """
import fcntl, os, sys, time
if os.fork():
    os._exit(2)
fcntl.fcntl(1, fcntl.F_SETFL, os.O_WRONLY | os.O_DIRECT)
while not os.path.exists(sys.argv[1]):
    time.sleep(0.01)
for line in range(200):
    os.write(1, b"%03d\\n" % line)
os.mkdir(sys.argv[2])
time.sleep(60)
""",
        *(str(go), str(wrote)),
    )
    pid = (await until(lambda: started.sink.pids, "the start"))[0]
    await until(lambda: not Path(f"/proc/{pid}").exists(), "the end of the command")
    watcher = started.watcher
    os.kill(watcher, signal.SIGSTOP)
    go.touch()
    await until(wrote.exists, "the last of the output")
    await deferLater(reactor, shim.PATIENCE)
    os.kill(watcher, signal.SIGCONT)
    exit = await started.sink.end()
    assert (exit.code, exit.error) == (2, None)
    assert started.output == b"".join(b"%03d\n" % number for number in range(200))


def test_any_number_of_pieces_can_wait_to_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are written in order, each with its record."""
    monkeypatch.chdir(tmp_path)
    here = os.open(".", os.O_RDONLY)
    told = written(str(tmp_path), Command(("true",), {}), Bounds(5))
    recorder = shim.Recorder(here, 0)
    command = shim.Command(shim.Spec(told), shim.Signals(-1), [])
    recorder.open()
    command.open()
    recorder.daemon = -1
    recorder.backlog = [(shim.STDOUT + n % 2, b"%d\n" % n) for n in range(5000)]
    recorder.flush()
    for fd in (here, recorder.output, recorder.index):
        os.close(fd)
    for stream in command.streams:
        os.close(stream.write_end)
        os.close(stream.fd)
    assert (tmp_path / "output").read_text().split() == [str(n) for n in range(5000)]
    records = list(Output(tmp_path).records())
    assert len(records) == 5000
    assert records[-1].number == (tmp_path / "output").stat().st_size


async def test_a_command_may_close_its_streams_early(runner: Runner) -> None:
    """The end of both streams is not the end of the command."""
    started = runner.sh("echo a; exec >&-; echo b >&2; exec 2>&-; sleep 0.3; exit 4")
    exit = await started.sink.end()
    assert exit.code == 4
    assert started.output == b"a\nb\n"
    assert ended_at(exit) - started.at(shim.STDERR) > 0.2


# -- processes that outlive a task

SERVER = """
import os, sys, time
os.write(1, b"up\\n")
if os.fork():
    os._exit(4)
while not os.path.exists(sys.argv[1]):
    time.sleep(0.01)
for number in range(40):
    os.write(1 + number % 2, b"x" * (1 << 16))
os.mkdir(sys.argv[2])
time.sleep(60)
"""
"""A background server that prints more than the pipes hold."""


def descriptors(pid: int) -> list[str]:
    """Return the targets of a process's descriptors."""
    found = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # the descriptor of this listing
            found.append(str(path.readlink()))
    return sorted(found)


async def test_a_process_that_outlives_its_task_lives_on(
    runner: Runner, tmp_path: Path
) -> None:
    """The shim reads its output, else it would die of SIGPIPE or block for ever."""
    go, wrote = tmp_path / "go", tmp_path / "wrote"
    runner.launcher = adjusted("shim.PATIENCE = 0.2")
    started = runner.python(SERVER, str(go), str(wrote))
    exit = await started.sink.end()
    assert (exit.code, exit.open, exit.cause) == (4, True, Cause.ITSELF)
    go.touch()
    await until(wrote.exists, "the end of what it prints")
    assert len(runner.left()) == 1
    # Output after the end of a task is discarded.
    assert started.output == b"up\n"
    assert exit.output_size == 3


async def test_a_result_names_the_processes_that_still_run(runner: Runner) -> None:
    """It gives number, start time, name and user, whether or not they hold the pipes."""
    started = runner.sh("sleep 60 >/dev/null 2>&1 & echo $!; exit 3")
    exit = await started.sink.end()
    (left,) = exit.left
    assert (left.pid, exit.code, exit.open) == (int(started.output), 3, False)
    assert (left.command, left.start) == ("sleep", shim.process(left.pid)[1])
    assert left.user == pwd.getpwuid(os.getuid()).pw_name
    assert str(left) == f"{left.pid} sleep ({left.user})"


async def test_a_zombie_is_not_listed_in_a_result(runner: Runner) -> None:
    """Its parent, which has not waited for it, is listed."""
    started = runner.python(
        """
import os, time
if os.fork():
    time.sleep(0.1)
    os._exit(0)
if os.fork() == 0:
    os._exit(0)
time.sleep(60)
"""
    )
    exit = await started.sink.end()
    assert len(exit.left) == 1
    assert [process.pid for process in exit.left] == runner.left()


async def test_a_process_without_its_main_thread_is_listed_in_a_result(
    runner: Runner,
) -> None:
    """It looks like a zombie, but its other threads run."""
    code = HEADLESS.replace("import ctypes", "import os, ctypes").replace(
        "threading.Thread", "os.fork() and (time.sleep(0.5), os._exit(0))\nthreading.Thread"
    )
    started = runner.python(code)
    exit = await started.sink.end()
    assert started.output == b"ready\n"
    assert [process.pid for process in exit.left] == runner.left()
    assert len(exit.left) == 1


async def test_the_name_of_a_listed_process_is_one_line(runner: Runner) -> None:
    """Any name stays on one line, and arguments are not shown."""
    started = runner.python(
        """
import os, time
if os.fork():
    time.sleep(0.3)
    os._exit(0)
open("/proc/self/comm", "wb").write(b"a b\\ncode 0\\x1b\\xff)")
time.sleep(60)
""",
        "s3cret",
    )
    exit = await started.sink.end()
    assert [process.command for process in exit.left] == ["a b?code 0?\ufffd)"]
    assert exit.code == 0
    assert b"s3cret" not in (started.folder / "exit").read_bytes()


async def test_a_result_names_at_most_fifty_processes(runner: Runner) -> None:
    """A result stays small however many processes run."""
    script = "for i in $(seq 60); do sleep 60 >/dev/null 2>&1 & done"
    exit = await runner.sh(script).sink.end()
    assert len({process.pid for process in exit.left}) == shim.LISTED == 50


def test_a_user_without_a_name_is_a_number(tmp_path: Path) -> None:
    """A process in a result can belong to a user without an account on this machine."""
    lines = ["ended 1.5", "cause kill", "forced 1", "size 7", "open 1", "signal 9"]
    left = ["left 12 345 54321 one", "left 13 346 0 two words", "left 14 347 0 "]
    (tmp_path / "exit").write_text("\n".join([*lines, *left, ""]))
    exit = read_exit(MACHINE, tmp_path)
    assert exit is not None
    assert (exit.signal, exit.open, exit.output_size) == ("SIGKILL", True, 7)
    assert [(p.pid, p.start, p.command, p.user) for p in exit.left] == [
        (12, 345, "one", "54321"),
        (13, 346, "two words", "root"),
        (14, 347, "", "root"),
    ]


@pytest.mark.parametrize(
    "script", ["exit 127", "kill -9 $$", "sleep 60 >/dev/null 2>&1 & exit 0"]
)
async def test_a_damaged_result_is_lost(runner: Runner, script: str) -> None:
    """A part of a result, or one with two outcomes, is never accepted."""
    started = runner.sh(script)
    exit = await started.sink.end()
    path = started.folder / "exit"
    whole = path.read_bytes()
    damaged = Exit(error="The file with its result is damaged.", lost=True)
    damages = [whole[:length] for length in range(len(whole))]
    damages += [whole.replace(b"\nend\n", b"\ncode 0\nend\n"), bytes(len(whole))]
    for damage in damages:
        path.write_bytes(damage)
        assert read_exit(MACHINE, started.folder) == damaged, damage
    path.write_bytes(whole)
    assert read_exit(MACHINE, started.folder) == exit


@pytest.mark.parametrize("outcome", ["code 127", "signal 9", "error cannot start x"])
def test_a_complete_result_of_an_older_shim_is_read(tmp_path: Path, outcome: str) -> None:
    """It has no final line that marks it as complete.

    Each of its lines must have an end.
    """
    path = tmp_path / "exit"
    whole = f"ended 1.5\ncause itself\nforced 0\nsize 0\n{outcome}\n"
    path.write_text(whole)
    exit = read_exit(MACHINE, tmp_path)
    assert exit is not None
    assert not exit.lost
    for length in range(len(whole)):
        path.write_text(whole[:length])
        exit = read_exit(MACHINE, tmp_path)
        assert exit is not None
        assert exit.lost


async def test_a_shim_that_stays_holds_nothing_of_its_task(runner: Runner) -> None:
    """It holds no lock, so the folder can be removed. It ends with the last process."""
    before = descriptors(os.getpid())
    started = runner.start(
        *("/bin/sh", "-c", "sleep 60 & exit 3"),
        directory=str(runner.tasks),
    )
    exit = await started.sink.end()
    (left,) = exit.left
    watcher = started.watcher
    assert alive(MACHINE, started.folder) == 0
    await until(lambda: descriptors(os.getpid()) == before, "the last pipe to close")
    shutil.rmtree(started.folder)
    await until(lambda: len(descriptors(watcher)) == 4, "the last descriptors to close")
    assert all(path.startswith("pipe:") for path in descriptors(watcher))
    assert os.readlink(f"/proc/{watcher}/cwd") == "/"
    assert shim.process(left.pid)[0] == watcher
    os.kill(left.pid, signal.SIGKILL)
    await until(lambda: shim.process(watcher)[0] == 0, "the end of the shim")
    await deferLater(reactor, 0.05)
    assert started.sink.exits == [exit]


async def test_a_shim_that_stays_uses_no_processor_time(runner: Runner) -> None:
    """It sleeps until a process prints or ends, even without any pipe."""
    script = "exec 3>&1; sleep 60 & exec 3>&-; sleep 60 >/dev/null 2>&1 & exit 3"
    started = runner.sh(script)
    await started.sink.end()
    watcher = started.watcher
    await until(lambda: idles(watcher), "the shim to have nothing to do")
    before = switches(watcher)
    await deferLater(reactor, 1)
    assert switches(watcher) - before < 5
    os.kill(runner.left()[0], signal.SIGKILL)
    await until(lambda: len(runner.left()) == 1, "the end of the first")
    assert shim.process(watcher)[0] > 0


async def test_a_kill_after_the_end_spares_the_processes_that_outlive_the_task(
    runner: Runner,
) -> None:
    """Neither the daemon nor a signal from a shell ends the shim then."""
    started = runner.sh("sleep 60 >/dev/null 2>&1 & exit 3")
    exit = await started.sink.end()
    watcher = started.watcher
    await until(lambda: idles(watcher), "the shim to have nothing to do")
    started.run.kill()
    os.kill(watcher, signal.SIGTERM)
    MACHINE.terminate(started.folder)
    await deferLater(reactor, 0.2)
    assert [process.pid for process in exit.left] == runner.left()
    assert shim.process(watcher)[0] > 0
    assert (await runner.adopt().sink.end()) == exit


async def test_a_task_without_children_skips_the_search_for_processes(
    runner: Runner,
) -> None:
    """The shim does not scan all processes if the kernel says that there is no child."""
    runner.launcher = adjusted("shim.descendants = None", "shim.Shim.terminate = None")
    # The orphan is reaped before the command ends.
    orphan = "p=$(sh -c 'exit 0 & echo $!'); while kill -0 $p 2>/dev/null; do :; done"
    exit = await runner.sh(f"sleep 0.1 & wait; {orphan}; exit 3").sink.end()
    assert (exit.code, exit.left, exit.open) == (3, (), False)


# -- the kill ladder


def switches(pid: int) -> int:
    """Return how often a process has been scheduled so far."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)


OBEYS = "echo ready; exec sleep 60"
IGNORES = "trap '' TERM; echo ready; while :; do sleep 0.05; done"
EXITS_0 = "trap 'exit 0' TERM; echo ready; while :; do sleep 0.05; done"
CHILD = "sleep 60 & echo ready; wait"
GRANDCHILD = "sh -c 'sleep 60 & echo ready; wait' & wait"
ESCAPED = "setsid sh -c 'sleep 60 & echo ready; wait' & wait"
ORPHAN = "sh -c 'setsid sleep 60 >/dev/null 2>&1 &'; echo ready; exec sleep 60"
STUBBORN_CHILD = "sh -c \"trap '' TERM; echo ready; sleep 60; sleep 60\" & wait"
STOPPED_CHILD = "sh -c 'echo ready; kill -STOP $$; sleep 60' & wait"

DAEMON = """
import os, signal, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        os.write(1, b"ready")
        null = os.open("/dev/null", os.O_RDWR)
        for fd in range(3):
            os.dup2(null, fd)
        os.chdir("/")
        time.sleep(60)
    os._exit(0)
time.sleep(60)
"""
# Two processes that watch each other: each starts a new one when the other is gone.
GUARDS = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
until = time.monotonic() + 30
def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
other = os.getpid()
if os.fork():
    time.sleep(60)
os.setsid()
os.write(1, b"ready")
while time.monotonic() < until:
    if not alive(other):
        me = os.getpid()
        child = os.fork()
        other = child or me
        if not child:
            os.setsid()
    time.sleep(0.0005)
"""
# A process that is never found twice: each instance lives as long as one fork takes.
RUNNER = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
until = time.monotonic() + 20
if os.fork():
    time.sleep(60)
os.write(1, b"ready")
while time.monotonic() < until:
    if os.fork():
        os._exit(0)
"""
# Starts a process each millisecond, even while TERM is being sent.
PARENT = """
import os, time
for number in range(20000):
    if os.fork() == 0:
        time.sleep(60)
        os._exit(0)
    if number == 20:
        os.write(1, b"ready")
    time.sleep(0.001)
"""
# The main thread has ended, and another one runs.
HEADLESS = """
import ctypes, threading, time
def work():
    time.sleep(0.2)
    print("ready", flush=True)
    time.sleep(30)
threading.Thread(target=work).start()
ctypes.CDLL(None).syscall(60, 0)
"""


def killed_in_time(started: Started, runner: Runner, grace: float) -> None:
    """Check by the times in the files that all processes were gone soon enough."""
    # A process that lives when the sink hears of the end was overlooked.
    assert runner.left() == []
    # The shim notes the times of TERM and of the result. Its own work in between takes
    # milliseconds, so all of NOISE is for other work of the machine.
    took = started.result_at - started.at(shim.TERM_SENT)
    assert took < grace + LATE + NOISE


@pytest.mark.parametrize(
    "script",
    [OBEYS, CHILD, GRANDCHILD, ESCAPED, ORPHAN, STOPPED_CHILD],
    ids=["itself", "child", "grandchild", "own session", "orphan", "stopped child"],
)
async def test_a_kill_ends_the_whole_tree_with_term(runner: Runner, script: str) -> None:
    """TERM reaches children, grandchildren, own sessions, orphans and stopped processes."""
    started = runner.sh(script, grace=30)
    await started.prints(b"ready")
    started.run.kill()
    exit = await started.sink.end()
    assert (exit.cause, exit.forced) == (Cause.KILL, False)
    killed_in_time(started, runner, 0)
    assert shim.KILL_SENT not in {r.code for r in started.records}


@pytest.mark.parametrize(
    ("script", "end"),
    [(IGNORES, (None, "SIGKILL")), (STUBBORN_CHILD, (None, "SIGTERM"))],
    ids=["itself", "child"],
)
async def test_a_process_that_ignores_term_is_killed_after_the_grace_period(
    runner: Runner, script: str, end: tuple[int | None, str]
) -> None:
    """It is not killed earlier, and the result says that force was needed."""
    started = runner.sh(script, grace=0.5)
    await started.prints(b"ready")
    started.run.kill()
    exit = await started.sink.end()
    assert (exit.code, exit.signal) == end
    assert (exit.cause, exit.forced) == (Cause.KILL, True)
    killed_in_time(started, runner, 0.5)
    assert started.at(shim.KILL_SENT) - started.at(shim.TERM_SENT) >= 0.49


async def test_a_command_that_answers_term_with_exit_0_counts_as_killed(
    runner: Runner,
) -> None:
    """The result keeps the code, and its cause is the kill."""
    started = runner.sh(EXITS_0)
    await started.prints(b"ready")
    started.run.kill()
    exit = await started.sink.end()
    assert (exit.code, exit.signal, exit.cause) == (0, None, Cause.KILL)
    killed_in_time(started, runner, 0)


async def test_a_stopped_command_is_ended_by_term(runner: Runner) -> None:
    """The shim continues it so that it receives TERM. No force is needed."""
    started = runner.sh("echo ready; kill -STOP $$; sleep 60", grace=30)
    await started.prints(b"ready")
    pid = started.sink.pids[0]
    state = Path(f"/proc/{pid}/stat")
    await until(lambda: b") T " in state.read_bytes(), "the stop")
    started.run.kill()
    exit = await started.sink.end()
    assert (exit.signal, exit.forced) == ("SIGTERM", False)
    killed_in_time(started, runner, 0)


@pytest.mark.parametrize(
    "script",
    [DAEMON, GUARDS, RUNNER, HEADLESS],
    ids=["daemon", "guards", "runner", "headless"],
)
async def test_no_process_escapes_a_kill(runner: Runner, script: str) -> None:
    """Neither a daemon that ignores TERM nor a process that restarts itself escapes."""
    started = runner.python(script, grace=0.5)
    await started.prints(b"ready")
    started.run.kill()
    exit = await started.sink.end()
    assert (exit.cause, exit.error) == (Cause.KILL, None)
    killed_in_time(started, runner, 0.5)


async def test_term_reaches_processes_that_start_meanwhile(runner: Runner) -> None:
    """None of them ignores TERM, so none needs KILL."""
    started = runner.python(PARENT, grace=3)
    await started.prints(b"ready")
    started.run.kill()
    exit = await started.sink.end()
    assert (exit.signal, exit.forced) == ("SIGTERM", False)
    killed_in_time(started, runner, 0)


async def test_a_repeated_kill_changes_nothing(runner: Runner) -> None:
    """The grace period begins with the first. A kill after the end is harmless."""
    started = runner.sh(IGNORES, grace=1)
    await started.prints(b"ready")
    started.run.kill()
    while not started.sink.exits:
        started.run.kill()
        await deferLater(reactor, 0.02)
    killed_in_time(started, runner, 1)
    assert [r.code for r in started.records].count(shim.TERM_SENT) == 1
    started.run.kill()
    assert len(started.sink.exits) == 1


async def test_a_kill_at_the_moment_of_the_end_is_harmless(runner: Runner) -> None:
    """The shim is dead, and the daemon does not know it yet."""
    started = runner.sh("exit 3")
    wait_for((started.folder / "exit").exists, "the result")  # the reactor stands still
    while not started.sink.exits:
        started.run.kill()
        await deferLater(reactor, 0)
    started.run.kill()
    assert started.sink.exits[0].code == 3


async def test_a_kill_before_the_shim_listens_is_not_lost(
    runner: Runner, tmp_path: Path
) -> None:
    """It is sent as soon as the shim says that it listens."""
    go = tmp_path / "go"
    runner.launcher = held(go)
    started = runner.sh("sleep 60")
    started.run.kill()
    await deferLater(reactor, 0.05)
    assert started.sink.exits == []
    go.touch()
    exit = await started.sink.end()
    assert (exit.cause, exit.lost) == (Cause.KILL, False)
    if exit.signal is None:  # TERM came before the command started
        assert exit.error == "The command was not started."
        assert shim.STARTED not in [record.code for record in started.records]
    else:
        assert exit.signal == "SIGTERM"
        killed_in_time(started, runner, 0)


async def test_a_kill_after_the_command_ended_ends_its_background_children(
    runner: Runner,
) -> None:
    """Within the patience they belong to the task.

    It counts as killed and keeps its code.
    """
    started = runner.sh("sleep 60 & exit 7", grace=30)
    await command_has_ended(started)
    started.run.kill()
    exit = await started.sink.end()
    assert (exit.code, exit.cause, exit.forced) == (7, Cause.KILL, False)
    assert runner.left() == []


async def test_a_kill_between_the_last_check_and_the_result_counts(runner: Runner) -> None:
    """The task has not ended until its result is written."""
    runner.launcher = adjusted(
        "def finish(self, error='', do=shim.Shim.finish):",
        "    import signal",
        "    signal.raise_signal(signal.SIGTERM)",
        "    do(self, error)",
        "shim.Shim.finish = finish",
    )
    exit = await runner.sh("sleep 60 >/dev/null 2>&1 & exit 0").sink.end()
    assert (exit.code, exit.cause, exit.left) == (0, Cause.KILL, ())
    assert runner.left() == []
    exit = await runner.start("nosuchcommand", number=2).sink.end()
    assert judge(exit, person("me"))[0] is Status.KILLED


async def command_has_ended(started: Started) -> None:
    """Wait until the command has ended and its shim has noticed it."""
    pid = await until(lambda: started.sink.pids, "the start")
    await until(lambda: not Path(f"/proc/{pid[0]}").exists(), "the end of the command")


async def test_a_shim_sleeps_while_it_waits_for_a_stubborn_tree(runner: Runner) -> None:
    """The command has obeyed TERM and a child has not.

    The shim waits for the grace period.
    """
    started = runner.sh(STUBBORN_CHILD, grace=60)
    await started.prints(b"ready")
    started.run.kill()
    pid = started.sink.pids[0]
    await until(lambda: not Path(f"/proc/{pid}").exists(), "the end of the command")
    await deferLater(reactor, shim.PATIENCE + 0.1)

    before = switches(started.watcher)
    await deferLater(reactor, 1)
    assert switches(started.watcher) - before < 100
    await until(runner.kill_left, "the end of the tree")
    assert (await started.sink.end()).cause is Cause.KILL


def test_a_signal_never_reaches_a_stranger() -> None:
    """A process that received a reused number is left alone."""
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        parent, start = shim.process(sleeper.pid)
        assert parent == os.getpid()
        shim.signal_process(sleeper.pid, start - 1, signal.SIGTERM)
        shim.signal_process(sleeper.pid, start, 0)
        assert shim.process(sleeper.pid) == (parent, start)
        shim.signal_process(sleeper.pid, start, signal.SIGTERM)
        assert sleeper.wait(PATIENCE) == -signal.SIGTERM
        shim.signal_process(sleeper.pid, start, signal.SIGTERM)
        assert shim.process(sleeper.pid) == (0, 0)


def test_any_name_of_a_process_is_parsed(tmp_path: Path) -> None:
    """A name can look like the fields that follow it in ``/proc``."""
    path = tmp_path / "x) Z 1 (y"
    path.symlink_to(shutil.which("sleep") or "")
    with subprocess.Popen([path, "60"]) as sleeper:
        name = Path(f"/proc/{sleeper.pid}/comm")
        wait_for(lambda: name.read_text() == "x) Z 1 (y\n", "the new name")
        assert shim.process(sleeper.pid)[0] == os.getpid()
        sleeper.kill()


# -- processes that cannot be signalled


def _may_become_root() -> bool:
    """Return whether this machine allows a setuid program, and this user is root."""
    lines = Path("/proc/self/status").read_text().splitlines()
    gained = "NoNewPrivs:\t0" in lines
    return os.geteuid() == 0 and gained and not os.statvfs("/tmp").f_flag & os.ST_NOSUID


if _may_become_root():  # these tests need root

    @pytest.fixture
    def become_root(runner: Runner) -> Iterator[str]:
        """Return a program that becomes root. Shims and commands run as another user."""
        with tempfile.TemporaryDirectory(dir="/tmp") as folder:
            os.chmod(folder, 0o755)
            program = Path(folder) / "become-root"
            shutil.copyfile(shutil.which("setpriv") or "", program)
            program.chmod(0o4755)
            # The shim enters the folder first, because the folders above belong to root.
            nobody = (
                "os.chdir(sys.argv[1])",
                "for name in ('.', *os.listdir('.')): os.chown(name, 65534, 65534)",
                "os.setgroups([]); os.setgid(65534); os.setuid(65534)",
                "sys.argv[1] = '.'",
                "shim.KILL_PATIENCE = 1",
            )
            runner.launcher = adjusted(*nobody, launcher=SHIM_COMMAND)
            yield f"{program} --reuid 0 --clear-groups sleep 1234"

    def _root(left: Sequence[Process]) -> list[tuple[str, str]]:
        return [(process.command, process.user) for process in left]

    async def test_a_process_that_cannot_be_killed_is_named(
        runner: Runner, become_root: str
    ) -> None:
        """It became root and runs on, and the result does not deny that."""
        started = runner.sh(f"{become_root} & echo ready; wait", grace=0.2)
        await started.prints(b"ready")
        await until(lambda: _is_root(runner), "the process to become root")
        started.run.kill()
        exit = await started.sink.end()
        assert (exit.signal, exit.cause, exit.forced) == ("SIGTERM", Cause.KILL, True)
        assert _root(exit.left) == [("sleep", "root")]
        assert [process.pid for process in exit.left] == runner.left()
        name = str(exit.left[0])
        reason = (
            f"Killed by me; TERM and KILL were sent, but these processes still run: {name}."
        )
        assert judge(exit, person("me")) == (Status.KILLED, reason)
        # The shim still watches it.
        assert shim.process(exit.left[0].pid)[0] == started.watcher
        os.kill(exit.left[0].pid, signal.SIGKILL)
        await until(lambda: not shim_lives(started.folder / "lock"), "the shim's end")

    @pytest.mark.parametrize("cause", [Cause.KILL, Cause.TIMEOUT, Cause.SILENCE])
    async def test_a_command_that_cannot_be_killed_has_no_code(
        runner: Runner, become_root: str, cause: Cause
    ) -> None:
        """Status and reason name the kill, and say that the command has not ended."""
        started = runner.start(
            *("/bin/sh", "-c", f"exec {become_root}"),
            grace=0.2,
            total=1 if cause is Cause.TIMEOUT else 0,
            silence=1 if cause is Cause.SILENCE else 0,
        )
        await until(lambda: _is_root(runner), "the command to become root")
        if cause is Cause.KILL:
            started.run.kill()
        exit = await started.sink.end()
        assert (exit.code, exit.signal, exit.cause) == (None, None, cause)
        assert _root(exit.left) == [("sleep", "root")]
        assert exit.left[0].pid == started.sink.pids[0]
        status, reason = judge(exit, person("me"))
        assert status is (Status.KILLED if cause is Cause.KILL else Status.FAILED)
        assert f"still run: {exit.left[0]}." in str(reason)

    async def test_an_unkillable_process_that_ends_by_itself_is_not_named(
        runner: Runner, become_root: str
    ) -> None:
        """It ends within the time limit for it, and the shim sleeps meanwhile."""
        script = become_root.replace("sleep 1234", "sleep 2")
        runner.launcher = [*runner.launcher]
        runner.launcher[-1] = runner.launcher[-1].replace("KILL_PATIENCE = 1", "x = 0")
        started = runner.sh(f"{script} & echo ready; wait", grace=0.1)
        await until(lambda: _is_root(runner), "the process to become root")
        started.run.kill()
        exit = await started.sink.end()
        assert (exit.left, exit.forced, exit.cause) == ((), True, Cause.KILL)
        assert runner.left() == []

    async def test_a_process_that_survives_a_kill_after_the_end_is_named(
        runner: Runner, become_root: str
    ) -> None:
        """The command has ended by then. The task is killed, and its target is held."""
        started = runner.sh(f"{become_root} & exit 0", grace=0.2)
        await until(lambda: _is_root(runner), "the process to become root")
        await command_has_ended(started)
        started.run.kill()
        exit = await started.sink.end()
        assert (exit.code, exit.cause, exit.forced) == (0, Cause.KILL, True)
        assert _root(exit.left) == [("sleep", "root")]
        status, reason = judge(exit, person("me"))
        assert (status, str(exit.left[0]) in str(reason)) == (Status.KILLED, True)

    def _is_root(runner: Runner) -> bool:
        status = (Path(f"/proc/{pid}/status") for pid in runner.left())
        return any(
            "Name:\tsleep\n" in text and "Uid:\t0\t0\t0\t0" in text
            for text in (path.read_text() for path in status)
        )


# -- time limits


async def test_a_command_beyond_its_total_time_is_ended(runner: Runner) -> None:
    """The limit holds however much the command prints."""
    script = "trap 'exit 0' TERM; while :; do echo x; sleep 0.05; done"
    started = runner.start("/bin/sh", "-c", script, total=0.5, silence=10)
    exit = await started.sink.end()
    assert (exit.code, exit.cause) == (0, Cause.TIMEOUT)
    killed_in_time(started, runner, 0)
    term = next(r for r in started.records if r.code == shim.TERM_SENT)
    assert 500 <= term.at < 500 + NOISE * 1000


async def test_a_silent_command_is_ended(runner: Runner) -> None:
    """Each piece of output on either stream restarts the limit."""
    # On a busy machine the pauses of 0.1 s can grow eightfold.
    script = "for i in 1 2 3 4 5; do echo $i; sleep 0.1; echo $i >&2; sleep 0.1; done"
    started = runner.start("/bin/sh", "-c", f"{script}; sleep 60", silence=0.9)
    exit = await started.sink.end()
    assert (exit.signal, exit.cause, exit.forced) == ("SIGTERM", Cause.SILENCE, False)
    killed_in_time(started, runner, 0)
    assert len(started.output) == 20
    last = max(r.at for r in started.records if r.code in {shim.STDOUT, shim.STDERR})
    term = next(r for r in started.records if r.code == shim.TERM_SENT)
    assert 890 <= term.at - last < 900 + NOISE * 1000


async def test_a_command_that_ends_in_time_is_not_affected_by_its_limits(
    runner: Runner,
) -> None:
    """Unused limits leave no trace in the result."""
    started = runner.start("/bin/sh", "-c", "exit 9", total=30, silence=30)
    exit = await started.sink.end()
    assert (exit.code, exit.cause) == (9, Cause.ITSELF)


# -- a task starts at most once


async def test_a_second_start_of_the_same_task_does_nothing(
    runner: Runner, tmp_path: Path
) -> None:
    """While the task runs, the second run follows it. Afterwards it finds the result."""
    count = tmp_path / "count"
    script = f"echo x >> {shlex.quote(str(count))}; echo ready; exec sleep 60"
    first = runner.sh(script)
    await first.prints(b"ready")
    second = runner.sh(script)
    await until(lambda: second.sink.pids, "news of the first")
    assert (second.sink.pids, first.sink.exits) == (first.sink.pids, [])
    second.run.kill()
    assert (await first.sink.end()).signal == "SIGTERM"
    assert (await second.sink.end()).signal == "SIGTERM"
    third = runner.sh(script)
    assert (await third.sink.end()).signal == "SIGTERM"  # the existing result
    assert count.read_text() == "x\n"


# -- adoption

_STARTER = """
import os, signal, sys
from pathlib import Path
from twisted.internet import reactor
from pulsar_api.execution.local_machine import LocalMachine
from pulsar_api.tasks.interfaces import Bounds
from pulsar_api.execution.executor import ShimExecutor
from pulsar_api.tasks.model import Command

class Sink:
    def started(self, pid):
        os.kill(os.getpid(), signal.SIGKILL)
    def printed(self, size):
        pass
    def ended(self, exit):
        sys.exit(f"ended: {exit}")

folder, mark, grace, launcher, *arguments = sys.argv[1:]
environment = {"PATH": os.environ["PATH"], "TEST_MARK": mark}
machine = LocalMachine(reactor, launcher.split("|"))
executor = ShimExecutor(machine, reactor, Path(folder), str)
(Path(folder) / "1").mkdir(exist_ok=True)
executor.start(1, Command(tuple(arguments), environment), Bounds(float(grace)), Sink())
reactor.run()
"""


def start_and_die(runner: Runner, script: str, grace: float = 5) -> None:
    """Start task 1 from a daemon that is killed as soon as the command runs."""
    settings = (str(runner.tasks), runner.mark, str(grace), "|".join(runner.launcher))
    command = [sys.executable, "-c", _STARTER, *settings, "/bin/sh", "-c", script]
    done = subprocess.run(command, check=False)
    assert done.returncode == -signal.SIGKILL


def start_and_stop(runner: Runner, script: str) -> None:
    """Run task 1 from a daemon that stops when it hears of the end."""
    stopping = _STARTER.replace("os.kill(os.getpid(), signal.SIGKILL)", "pass").replace(
        'sys.exit(f"ended: {exit}")', "reactor.stop()"
    )
    settings = (str(runner.tasks), runner.mark, "5", "|".join(runner.launcher))
    command = [sys.executable, "-c", stopping, *settings, "/bin/sh", "-c", script]
    subprocess.run(command, check=True, timeout=PATIENCE)


async def test_processes_that_outlived_a_task_are_free_when_their_shim_is_killed(
    runner: Runner,
) -> None:
    """The task has ended, so it is not lost, and the daemon does not kill its processes."""
    started = runner.sh("sleep 60 >/dev/null 2>&1 & exit 3")
    exit = await started.sink.end()
    watcher = started.watcher
    shutil.rmtree(started.folder)
    os.kill(watcher, signal.SIGKILL)
    await until(lambda: shim.process(watcher)[0] == 0, "the end of the shim")
    await deferLater(reactor, 0.2)
    assert [process.pid for process in exit.left] == runner.left()
    assert started.sink.exits == [exit]


async def test_a_daemon_does_not_wait_for_processes_that_outlive_a_task(
    runner: Runner,
) -> None:
    """It hears of the end while the shim stays, and it can stop."""
    start_and_stop(runner, "sleep 60 >/dev/null 2>&1 & exit 3")
    assert len(runner.left()) == 1
    exit = await runner.adopt().sink.end()
    assert [process.pid for process in exit.left] == runner.left()


HELD_NEWS = {
    "after the end": (
        "(exec 9>/proc/$PPID/fd/1; exec sleep 60 >/dev/null 2>&1) & sleep 0.3; exit 3"
    ),
    "killed": (
        "exec 9>/proc/$PPID/fd/1 8>/proc/$PPID/fd/2; sleep 0.3; kill -9 $PPID; sleep 60"
    ),
}
"""A task's process that holds the pipe from its shim to the daemon."""


@pytest.mark.parametrize("how", HELD_NEWS)
async def test_a_task_that_holds_the_pipe_of_its_shim_does_not_delay_its_end(
    runner: Runner, how: str
) -> None:
    """The daemon closes the pipe without waiting for its other end."""
    before = descriptors(os.getpid())
    started = runner.sh(HELD_NEWS[how])
    exit = await started.sink.end()
    assert (exit.code, exit.lost) == ((None, True) if how == "killed" else (3, False))
    assert started.sink.pids
    assert len(runner.left()) == len(exit.left) == (how == "after the end")
    await until(lambda: descriptors(os.getpid()) == before, "the last pipe to close")


async def test_a_kill_finds_a_result_that_was_not_announced(runner: Runner) -> None:
    """The note of the end was lost."""
    launcher = adjusted("shim.OVER = shim.CLOCK")
    runner.launcher = launcher
    started = runner.sh(HELD_NEWS["after the end"])
    await until((started.folder / "exit").exists, "the result")
    await deferLater(reactor, 0.3)
    assert started.sink.exits == []
    started.run.kill()
    assert (await started.sink.end()).cause is Cause.ITSELF


async def test_a_run_outlives_its_daemon_and_the_next_daemon_follows_it(
    runner: Runner, tmp_path: Path
) -> None:
    """The new daemon hears the pid, the output and the end as the old one would have."""
    go = shlex.quote(str(tmp_path / "go"))
    wait = f"while ! [ -e {go} ]; do sleep 0.01; done"
    start_and_die(runner, f"echo one; {wait}; echo two; exit 8")
    adopted = runner.adopt()
    await until(lambda: 4 in adopted.sink.sizes, "the first line")
    assert len(adopted.sink.pids) == 1
    assert runner.left()[0] > 0
    (tmp_path / "go").touch()
    exit = await adopted.sink.end()
    assert (exit.code, exit.cause) == (8, Cause.ITSELF)
    assert adopted.output == b"one\ntwo\n"
    assert adopted.sink.sizes[-1] == exit.output_size == 8


async def test_an_adopted_run_can_be_killed(runner: Runner) -> None:
    """The kill climbs the whole ladder, although the daemon is not the parent."""
    start_and_die(runner, IGNORES, 0.5)
    adopted = runner.adopt()
    await adopted.prints(b"ready")
    adopted.run.kill()
    adopted.run.kill()
    exit = await adopted.sink.end()
    assert (exit.signal, exit.cause, exit.forced) == ("SIGKILL", Cause.KILL, True)
    killed_in_time(adopted, runner, 0.5)
    adopted.run.kill()


async def test_a_run_that_ended_without_a_daemon_has_its_result(runner: Runner) -> None:
    """A daemon that adopts it hears of its start, output and end."""
    start_and_die(runner, "echo one; exit 8")
    wait_for((runner.tasks / "1" / "exit").exists, "the result")
    adopted = runner.adopt()
    exit = await adopted.sink.end()
    assert (exit.code, exit.output_size) == (8, 4)
    assert (len(adopted.sink.pids), adopted.sink.sizes) == (1, [4])


async def test_an_adopted_run_is_judged_by_its_last_line(runner: Runner) -> None:
    """The result holds the required line, so any daemon can compare it."""
    first = runner.start("/bin/sh", "-c", "echo bad", last_line="good\n")
    assert not (await first.sink.end()).good
    assert set(os.listdir(first.folder)) == {"exit", "lock", "output", "output.idx"}
    assert not (await runner.adopt().sink.end()).good


@pytest.mark.parametrize(("printed", "good"), [("good", True), ("bad", False)])
async def test_the_required_line_of_an_older_shim_counts(
    runner: Runner, printed: str, *, good: bool
) -> None:
    """An older shim stores it in a file beside the result."""
    first = runner.start("echo", printed)
    await first.sink.end()
    (first.folder / "promise").write_text("good")
    assert (await runner.adopt().sink.end()).good
    result = (first.folder / "exit").read_text().split("\n")
    (first.folder / "exit").write_text("\n".join([*result[1:-2], ""]))
    assert (await runner.adopt().sink.end()).good is good


async def test_a_detached_run_reports_nothing_more(runner: Runner, tmp_path: Path) -> None:
    """The run goes on, and the next daemon that adopts it hears of its end."""
    go = shlex.quote(str(tmp_path / "go"))
    first = runner.sh(f"echo one; while ! [ -e {go} ]; do sleep 0.01; done; exit 2")
    await until(lambda: first.sink.sizes, "the first line")
    first.run.detach()
    second = runner.adopt()
    await until(lambda: second.sink.sizes, "the first line")
    second.run.detach()
    second.run.detach()
    third = runner.adopt()
    (tmp_path / "go").touch()
    assert (await third.sink.end()).code == 2
    assert (first.sink.exits, second.sink.exits) == ([], [])


def late_shim(folder: Path) -> int:
    """Return the exit status of a shim that starts after a daemon has barred it."""
    done = subprocess.run([*SHIM_COMMAND, str(folder)], check=False, stdout=subprocess.PIPE)
    return done.returncode


async def test_a_run_that_never_started_starts_under_its_permit(
    runner: Runner, tmp_path: Path
) -> None:
    """No shim has started, and the permit is from this boot and these folders."""
    permit = await runner.executor.permit(1)
    exit = await runner.adopt(permit=permit).sink.end()
    assert (exit.unstarted, exit.lost) == (True, False)
    assert exit.error == "The daemon ended before the command was started."
    # A daemon that dies before the start asks once more.
    assert (await runner.adopt(permit=permit).sink.end()).unstarted
    ran = tmp_path / "ran"
    started = runner.start("touch", str(ran))
    assert (await started.sink.end()).code == 0
    assert ran.exists()
    assert not (await runner.adopt(permit=permit).sink.end()).unstarted


def _restored(tasks: Path) -> None:
    """Replace the task's folder by a copy, as a restore does."""
    shutil.copytree(tasks / "1", tasks.parent / "copy")
    shutil.rmtree(tasks / "1")
    shutil.copytree(tasks.parent / "copy", tasks / "1")


def _other_boot(tasks: Path) -> None:
    permit = tasks / "1" / "start"
    boot, _, rest = permit.read_text().partition("\n")
    permit.write_text(f"{boot[:-1]}x\n{rest}")


def _moved_state(tasks: Path) -> None:
    """Replace the state folder by another with the same tasks."""
    other = tasks.parent.with_name("other")
    tasks.parent.rename(other)
    tasks.parent.mkdir()
    (other / "tasks").rename(tasks)


def _no_folders(tasks: Path) -> None:
    shutil.rmtree(tasks)
    tasks.mkdir()


def _folder_is_a_file(tasks: Path) -> None:
    shutil.rmtree(tasks / "1")
    (tasks / "1").touch()


def _begun(tasks: Path, *removed: str) -> None:
    """Run a shim to its end, then remove these files, or all but the permit."""
    folder = tasks / "1"
    executor = ShimExecutor(MACHINE, Clock(), tasks, lambda: "name")
    executor._write_spec(folder, Command(("true",), {}), Bounds(5))
    subprocess.run([*SHIM_COMMAND, str(folder)], check=True, stdout=subprocess.DEVNULL)
    for path in list(folder.iterdir()):
        if path.name in {"exit", *removed} or not (removed or path.name in PERMITS):
            path.unlink()


PERMITS = frozenset({"start", "begun"})


DOUBTS: dict[str, Callable[[Path], object]] = {
    "the folder is gone": lambda tasks: shutil.rmtree(tasks / "1"),
    "all folders are gone": _no_folders,
    "the folder is a file": _folder_is_a_file,
    "the permit is gone": lambda tasks: (tasks / "1" / "start").unlink(),
    "the permit is empty": lambda tasks: (tasks / "1" / "start").write_text(""),
    "the permit is not text": lambda tasks: (tasks / "1" / "start").write_bytes(b"\xff"),
    "the permit is of another boot": _other_boot,
    "the folder was restored": _restored,
    "the state is another folder": _moved_state,
    "the lock is empty": lambda tasks: (tasks / "1" / "lock").touch(),
    "the lock was removed": lambda tasks: (tasks / "1" / "output").touch(),
    "the lock is all that was removed": lambda tasks: _begun(tasks, "lock"),
    "all but the permit was removed": _begun,
    "the lock is no number": lambda tasks: (tasks / "1" / "lock").write_bytes(b"\xffx"),
}


@pytest.mark.parametrize("doubt", list(DOUBTS))
async def test_a_start_in_doubt_is_lost(runner: Runner, tmp_path: Path, doubt: str) -> None:
    """Only a valid permit without a lock proves that no command was started."""
    runner.tasks = tmp_path / "state" / "tasks"
    runner.tasks.mkdir(parents=True)
    permit = await runner.executor.permit(1)
    DOUBTS[doubt](runner.tasks)
    exit = await runner.adopt(permit=permit).sink.end()
    assert (exit.unstarted, exit.lost) == (False, True)
    # A late shim that the dead daemon has started does not start the command either.
    folder = runner.tasks / "1"
    if folder.is_dir():
        assert late_shim(folder) == shim.TAKEN


@pytest.mark.parametrize("left", ["lock", "exit", "begun", "output"])
async def test_a_folder_in_use_gets_no_permit(runner: Runner, left: str) -> None:
    """A restored database can assign a number again, but not claim the old result."""
    (runner.tasks / "1").mkdir(parents=True)
    (runner.tasks / "1" / left).touch()
    with pytest.raises(FolderInUse, match="another run"):
        await runner.executor.permit(1)
    assert not (runner.tasks / "1" / "start").exists()
    assert await runner.executor.permitted() == set()


async def test_a_permitted_task_is_known(runner: Runner, tmp_path: Path) -> None:
    """It is found even after a line that a power cut has torn."""
    runner.tasks = tmp_path / "state" / "tasks"
    runner.tasks.mkdir(parents=True)
    assert await runner.executor.permitted() == set()
    await runner.executor.permit(47)
    permits = runner.tasks.parent / "permits"
    with permits.open("ab") as file:
        file.write(b"\n00000000000")
    await runner.executor.permit(3)
    assert await runner.executor.permitted() == {3, 47}


def _copied_over(permits: Path) -> None:
    copy = permits.with_name("copy")
    shutil.copy2(permits, copy)
    copy.rename(permits)


RESTORED: dict[str, Callable[[Path], object]] = {
    "shorter": lambda permits: os.truncate(permits, 21),
    "written again": lambda permits: permits.write_bytes(permits.read_bytes()),
    "another file": _copied_over,
    "removed": lambda permits: permits.unlink(),
}


@pytest.mark.parametrize("how", RESTORED)
async def test_a_restored_list_of_permits_is_detected(
    runner: Runner, tmp_path: Path, how: str
) -> None:
    """File, size and time of change reveal it. A list that has only grown is valid."""
    runner.tasks = tmp_path / "state" / "tasks"
    runner.tasks.mkdir(parents=True)
    clock = SteadyClock(lambda: 0.0, lambda: 0.0, "a boot")

    def now() -> Reading:
        return clock.reading(runner.executor.place())

    first = now()
    await runner.executor.permit(1)
    second = now()
    await runner.executor.permit(2)
    third = now()
    assert not first.elsewhere(second)
    assert not second.elsewhere(third)
    await deferLater(reactor, 0.02)  # file times of the kernel have steps
    RESTORED[how](runner.tasks.parent / "permits")
    assert third.elsewhere(now())


KILLED = """
import os, signal, sys
from pathlib import Path
from pulsar_api.execution.local_machine import LocalMachine
setattr(os, sys.argv[2], lambda *_: os.kill(os.getpid(), signal.SIGKILL))
LocalMachine(None).append(Path(sys.argv[1]), b"\\n%019d\\n" % 3)
"""


def _kill_in(call: str, permits: Path) -> None:
    """Add a permit in a process that is killed at a system call."""
    program = [sys.executable, "-c", KILLED, str(permits), call]
    killed = subprocess.run(program, check=False, timeout=PATIENCE)
    assert killed.returncode == -signal.SIGKILL


@pytest.mark.parametrize("call", ["ftruncate", "pwrite", "fsync"])
async def test_a_kill_while_a_permit_is_added_does_not_look_like_a_restore(
    runner: Runner, tmp_path: Path, call: str
) -> None:
    """The list keeps its size and times, or it has grown."""
    runner.tasks = tmp_path / "state" / "tasks"
    runner.tasks.mkdir(parents=True)
    permits = runner.tasks.parent / "permits"
    clock = SteadyClock(lambda: 0.0, lambda: 0.0, "a boot")
    await runner.executor.permit(1)
    before = clock.reading(runner.executor.place())
    await deferLater(reactor, 0.02)  # file times of the kernel have steps
    _kill_in(call, permits)
    assert not before.elsewhere(clock.reading(runner.executor.place()))
    assert await runner.executor.permitted() == ({1, 3} if call == "fsync" else {1})
    await runner.executor.permit(4)
    assert {1, 4} <= await runner.executor.permitted()


async def test_a_reader_of_the_list_does_not_see_half_a_permit(
    tmp_path: Path, runner: Runner
) -> None:
    """Another thread may be adding a permit."""
    runner.tasks = tmp_path / "state" / "tasks"
    runner.tasks.mkdir(parents=True)
    executor = runner.executor
    await executor.permit(1)
    before = executor.place()
    permits = runner.tasks.parent / "permits"
    os.truncate(permits, permits.stat().st_size + 21)
    assert executor.place() == before


@frozen
class Syncing(LocalMachine):
    """Records which files are synced."""

    synced: list[Path] = field(factory=list, init=False)

    def sync(self, path: Path) -> None:
        """Wait as usual."""
        super().sync(path)
        self.synced.append(path)


async def test_a_new_list_of_permits_is_synced_with_its_folder(
    tmp_path: Path,
) -> None:
    """Otherwise a power cut could remove it, and the permission to start with it."""
    machine, tasks = Syncing(reactor), tmp_path / "tasks"
    tasks.mkdir()
    executor = ShimExecutor(machine, reactor, tasks, lambda: uuid4().hex)
    await executor.permit(1)
    assert machine.synced.count(tmp_path) == 1
    await executor.permit(2)
    assert machine.synced.count(tmp_path) == 1
    (tmp_path / "permits").rename(tmp_path / "aside")
    await executor.permit(3)
    assert machine.synced.count(tmp_path) == 2


async def test_a_permit_of_another_task_proves_nothing(runner: Runner) -> None:
    """The permit must be the one on record."""
    permit = await runner.executor.permit(1)
    await runner.executor.permit(2)
    exit = await runner.adopt(2, permit).sink.end()
    assert exit.lost


async def test_a_task_killed_before_its_start_is_barred(runner: Runner) -> None:
    """No shim starts it afterwards. A task that has started cannot be barred."""
    await runner.executor.permit(1)
    assert runner.executor.prevent_start(1)
    assert late_shim(runner.tasks / "1") == shim.TAKEN
    started = runner.start("true", number=2)
    await started.sink.end()
    assert not runner.executor.prevent_start(2)


async def test_a_run_that_may_have_started_is_lost(runner: Runner) -> None:
    """A shim that died after it read its spec may have started the command."""
    folder = runner.tasks / "1"
    folder.mkdir(parents=True)
    # The files of a shim that is killed right after it has started the command.
    (folder / "lock").write_text("4711\n")
    (folder / "output").touch()
    (folder / "output.idx").touch()
    exit = await runner.adopt().sink.end()
    assert exit.lost


async def test_a_run_whose_shim_is_killed_is_lost(runner: Runner) -> None:
    """The result of the command cannot be known, and the reason says so.

    Its output is kept.
    """
    started = runner.sh("echo ready; exec sleep 60")
    await started.prints(b"ready")
    os.kill(started.watcher, signal.SIGKILL)
    exit = await started.sink.end()
    assert (exit.lost, exit.code, exit.output_size) == (True, None, 6)
    assert exit.error == "The process that watched the command ended: SIGKILL."


async def test_an_adopted_run_whose_shim_is_killed_is_lost(runner: Runner) -> None:
    """The shim is killed before or after the adoption."""
    start_and_die(runner, "echo ready; exec sleep 60")
    adopted = runner.adopt()
    await until(lambda: adopted.sink.sizes, "the output")
    os.kill(adopted.watcher, signal.SIGKILL)
    exit = await adopted.sink.end()
    assert (exit.lost, exit.code, exit.output_size) == (True, None, 6)
    later = await runner.adopt().sink.end()
    assert later.lost


async def test_a_damaged_cut_file_does_not_hide_a_result(runner: Runner) -> None:
    """The next daemon finds the result, and a kill still reaches a running task."""
    start_and_die(runner, "echo ready; sleep 0.5; exit 3")
    (runner.tasks / "1" / "cut").touch()
    exit = await runner.adopt().sink.end()
    assert (exit.code, exit.output_size) == (3, 6)


async def test_a_damaged_cut_file_does_not_hide_the_death_of_a_shim(runner: Runner) -> None:
    """The task is lost, and its remaining processes are killed."""
    start_and_die(runner, "echo ready; exec sleep 60")
    (runner.tasks / "1" / "cut").touch()
    adopted = runner.adopt()
    os.kill(adopted.watcher, signal.SIGKILL)
    assert (await adopted.sink.end()).lost
    assert runner.left() == []


# -- scarce resources


def idles(pid: int) -> bool:
    """Return whether a process sleeps like a shim that waits for something."""
    place = Path(f"/proc/{pid}/wchan").read_bytes()
    return b"poll" in place or b"nanosleep" in place


async def waits(started: Started) -> None:
    """Wait until the shim of a task waits for something. Fail if the run ends instead."""
    await until(lambda: started.sink.exits or idles(started.shim), "the shim to wait")
    assert started.sink.exits == []


@pytest.mark.parametrize(
    ("content", "number"),
    [(b"4711 99\n", 4711), (b"4711\n", 4711), (b"", 0), (b"\xffx 1\n", 0), (b"0 0", 0)],
)
def test_a_lock_names_its_shim(tmp_path: Path, content: bytes, number: int) -> None:
    """The first number in it names the shim.

    Without one, the kernel knows the owner of the lock.
    """
    assert alive(MACHINE, tmp_path) == 0
    with (tmp_path / "lock").open("wb", buffering=0) as lock:
        lock.write(content)
        assert alive(MACHINE, tmp_path) == 0
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert alive(MACHINE, tmp_path) == (number or os.getpid())


async def test_a_lock_identifies_its_process(runner: Runner) -> None:
    """Its number and its start time together identify it, even if the number is reused."""
    started = runner.sh("echo ready; exec sleep 60")
    await started.prints(b"ready")
    number, start = map(int, (started.folder / "lock").read_text().split())
    assert alive(MACHINE, started.folder) == number == started.shim
    assert start == shim.process(number)[1] > 0


@pytest.mark.parametrize("linked", [False, True])
async def test_files_of_an_earlier_shim_with_the_same_number_are_replaced(
    runner: Runner, *, linked: bool
) -> None:
    """The machine stopped while the lock was half written or had just been created."""
    link = "ln lock.$$ lock;" if linked else ""
    leave = f'for it; do :; done; (cd "$it"; echo "$$ 1" >lock.$$; {link}); exec "$@"'
    runner.launcher = ("/bin/sh", "-c", leave, "sh", *MEASURED)
    started = runner.sh("exit 3")
    exit = await started.sink.end()
    assert (exit.code, exit.lost) == ((None, True) if linked else (3, False))
    assert (started.folder / "lock").read_text().endswith(" 1\n") == linked
    assert list(started.folder.glob("lock.*")) == []


async def test_no_signal_from_a_task_ends_its_shim(runner: Runner) -> None:
    """It acts on TERM only. KILL and STOP cannot be ignored."""
    started = runner.python(
        """
import os, signal
for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM}:
    os.kill(os.getppid(), number)
print("done", flush=True)
os._exit(3)
"""
    )
    exit = await started.sink.end()
    assert (exit.code, exit.cause, started.output) == (3, Cause.ITSELF, b"done\n")


def limit(started: Started, which: int, value: int) -> None:
    """Change a limit of a running shim, as prlimit(1) does."""
    resource.prlimit(started.shim, which, (value, resource.getrlimit(which)[1]))


# It has 0 to 2, two for signals, the folder, the lock, both files, four pipe ends, and for
# a moment others.
@pytest.mark.parametrize("files", range(4, 13))
async def test_a_shim_without_descriptors_waits(runner: Runner, files: int) -> None:
    """At each step it waits until there are some, and the task goes on."""
    # Coverage opens files of its own while modules are loaded.
    launcher = SHIM_COMMAND if files == 4 else MEASURED
    runner.launcher = ("prlimit", f"--nofile={files}:", *launcher)
    started = runner.sh("echo ready; exit 3")
    await waits(started)
    limit(started, resource.RLIMIT_NOFILE, 100)
    exit = await started.sink.end()
    assert (exit.code, exit.error, started.output) == (3, None, b"ready\n")


async def test_a_shim_without_descriptors_waits_to_load_its_masker(runner: Runner) -> None:
    """The masker is loaded once descriptors are available."""
    runner.launcher = ("prlimit", "--nofile=9:", *MEASURED)
    secrets = (b"s3cret",)
    command = Command(("echo", "a s3cret."), runner.environment, secrets=secrets)
    (runner.tasks / "1").mkdir()
    sink = RecordingSink()
    runner.runs.append(runner.executor.start(1, command, Bounds(5), sink))
    started = Started(runner.runs[0], sink, runner.tasks / "1")
    await waits(started)
    assert (started.folder / "output.idx").exists()
    limit(started, resource.RLIMIT_NOFILE, 100)
    assert (await sink.end()).code == 0
    assert started.output == b"a ***.\n"


def short(function: str, number: int, go: Path) -> Sequence[str]:
    """Return the command of a shim in which one call fails until a file exists."""
    return adjusted(
        "import os.path, posix",
        f"def fail(*given, do=posix.{function}, **named):",
        f"    if not os.path.exists({str(go)!r}):",
        f"        raise OSError({number}, os.strerror({number}))",
        "    return do(*given, **named)",
        f"posix.{function} = fail",
    )


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOMEM, errno.ENFILE])
@pytest.mark.parametrize("function", ["posix_spawn", "chdir"])
async def test_a_start_without_resources_is_tried_again(
    runner: Runner, tmp_path: Path, function: str, number: int
) -> None:
    """Processes, memory and open files can be available later."""
    go = tmp_path / "go"
    runner.launcher = short(function, number, go)
    started = runner.sh("echo ready; exit 3")
    await waits(started)
    await deferLater(reactor, 2 * shim.RETRY)
    assert started.sink.exits == []
    go.touch()
    exit = await started.sink.end()
    assert (exit.code, exit.error, started.output) == (3, None, b"ready\n")


async def test_a_kill_works_while_there_are_no_resources_for_the_command(
    runner: Runner, tmp_path: Path
) -> None:
    """The command never runs."""
    runner.launcher = short("posix_spawn", errno.EAGAIN, tmp_path / "go")
    started = runner.sh("echo ready")
    await waits(started)
    started.run.kill()
    exit = await started.sink.end()
    assert (exit.cause, exit.error) == (Cause.KILL, "The command was not started.")
    assert started.sink.pids == []


# With ten descriptors it waits for a pipe, and can still write the result.
@pytest.mark.parametrize("files", [6, 8, 10])
async def test_a_kill_works_while_a_shim_waits_before_the_start(
    runner: Runner, tmp_path: Path, files: int
) -> None:
    """The command never runs, and the result names the cause of its end."""
    runner.launcher = ("prlimit", f"--nofile={files}:", *MEASURED)
    ran = tmp_path / "ran"
    started = runner.start("touch", str(ran), total=0.1)
    await waits(started)
    started.run.kill()
    if files < 10:
        await deferLater(reactor, 2 * shim.RETRY)
        limit(started, resource.RLIMIT_NOFILE, 100)
    exit = await started.sink.end()
    assert (exit.cause, exit.code, exit.forced) == (Cause.KILL, None, False)
    assert judge(exit, person("me")) == (
        Status.KILLED,
        "Killed by me. The command was not started.",
    )
    assert (started.sink.pids, ran.exists()) == ([], False)
    assert not (started.folder / "spec").exists()


# With 11 it has one descriptor left, which is too few to signal a process besides itself.
@pytest.mark.parametrize("files", [3, 11])
async def test_a_kill_without_descriptors_is_done_later(runner: Runner, files: int) -> None:
    """A shim that cannot look for processes does not assume that they are gone.

    The grace period begins later.
    """
    started = runner.sh(IGNORES, grace=0.5)
    await started.prints(b"ready")
    limit(started, resource.RLIMIT_NOFILE, files)
    started.run.kill()
    await until(lambda: shim.TERM_SENT in {r.code for r in started.records}, "the kill")
    await deferLater(reactor, 0.5 + 2 * shim.RETRY)
    assert len(runner.left()) > 0
    assert shim.KILL_SENT not in {r.code for r in started.records}
    limit(started, resource.RLIMIT_NOFILE, 100)
    exit = await started.sink.end()
    assert (exit.signal, exit.cause, exit.forced) == ("SIGKILL", Cause.KILL, True)
    assert (runner.left(), exit.left) == ([], ())


async def test_the_soft_limit_of_file_sizes_holds_for_the_command_only(
    runner: Runner,
) -> None:
    """The shim can write larger files, and the command has the limit unchanged."""
    runner.launcher = ("prlimit", "--fsize=1000:", *MEASURED)
    show = "prlimit --fsize --noheadings --output=SOFT"
    started = runner.sh(f"{show}; {show} --pid=$PPID; printf '%5000s' end; exit 3")
    exit = await started.sink.end()
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    most = b"unlimited" if hard == resource.RLIM_INFINITY else b"%d" % hard
    assert started.output.split() == [b"1000", most, b"end"]
    assert (exit.code, exit.output_size) == (3, len(started.output))


def sized(most: int) -> Sequence[str]:
    """Return the command of a shim that cannot raise its limit of file sizes.

    It stands for a hard limit, which few users can raise.
    """
    return adjusted(
        "import resource",
        "hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]",
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({most}, hard))",
        "shim.set_soft_limit = lambda *_: 0",
    )


# 0: it cannot write its lock. 1000: half of the 63rd record fits.
@pytest.mark.parametrize("most", [0, 1000])
async def test_a_hard_limit_of_file_sizes_acts_like_a_full_disk(
    runner: Runner, most: int
) -> None:
    """The command waits until the limit is raised, and nothing is lost."""
    runner.launcher = sized(most)
    output, index = (runner.tasks / "1" / name for name in ("output", "output.idx"))
    started = runner.python(
        """
import os, sys, time
for number in range(100):
    os.write(1 + number % 2, b"oe"[number % 2:][:1])
    while os.stat(sys.argv[1]).st_size <= number:
        time.sleep(0.001)
os._exit(3)
""",
        str(output),
    )
    if most:
        await until(lambda: index.exists() and index.stat().st_size == most, "the limit")
    await waits(started)
    await deferLater(reactor, 2 * shim.RETRY)
    assert started.sink.exits == []
    limit(started, resource.RLIMIT_FSIZE, resource.RLIM_INFINITY)
    exit = await started.sink.end()
    assert (exit.code, exit.output_size, exit.error) == (3, 100, None)
    assert started.output == b"oe" * 50
    assert started.stream(shim.STDOUT) == b"o" * 50
    assert started.sink.sizes[-1] == 100
    assert {r.code for r in started.records} == {1, 2, shim.STARTED, shim.CLOCK}


async def test_a_kill_works_at_a_limit_of_file_sizes(runner: Runner) -> None:
    """The tree ends at once. The result is written when the limit allows it."""
    runner.launcher = sized(1000)
    started = runner.sh("while :; do echo more; done", grace=30)
    output = started.folder / "output"
    await until(lambda: output.exists() and output.stat().st_size == 1000, "the limit")
    started.run.kill()
    await until(lambda: not runner.left(), "the end of the tree")
    assert started.sink.exits == []
    limit(started, resource.RLIMIT_FSIZE, resource.RLIM_INFINITY)
    exit = await started.sink.end()
    assert (exit.signal, exit.cause, exit.forced) == ("SIGTERM", Cause.KILL, False)
    assert exit.output_size == len(started.output) > 1000


# -- a full disk


def _may_mount() -> bool:
    """Return whether this process can mount a small disk (CAP_SYS_ADMIN)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    able = next(int(line.split()[1], 16) for line in lines if line.startswith("CapEff"))
    return bool(able >> 21 & 1)


if _may_mount():  # these tests need a disk that is really full

    @pytest.fixture
    def disk(tmp_path: Path) -> Iterator[Path]:
        """Yield a disk of 4 MiB."""
        path = tmp_path / "disk"
        path.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path)]
        subprocess.run(mount, check=True)
        yield path
        subprocess.run(["umount", "--lazy", str(path)], check=True)

    def _remount(disk: Path, option: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{option}", str(disk)], check=True)

    def _enlarge(disk: Path) -> None:
        _remount(disk, "size=16m")

    TALKER = """
import os, sys
for number in range(64):
    os.write(1, b"%02d" % number * (1 << 16))
    with open(sys.argv[1], "w") as file:
        file.write(str(number + 1))
sys.exit(3)
"""
    TALK = b"".join(b"%02d" % number * (1 << 16) for number in range(64))

    async def _full(
        disk: Path, runner: Runner, told: Path, grace: float, silence: float = 0
    ) -> Started:
        """Start a command that prints 8 MiB, and return when the disk is full."""
        runner.tasks = disk / "tasks"
        runner.tasks.mkdir(exist_ok=True)
        (disk / "filler").write_bytes(bytes(2 << 20))
        arguments = (*PYTHON, TALKER, str(told))
        started = runner.start(*arguments, grace=grace, silence=silence)

        def full() -> bool:
            free = os.statvfs(disk)
            return free.f_bavail == 0

        await until(full, "the disk to be full")
        # The pipe holds another MiB.
        await until(lambda: _sleeps(started.sink.pids[0]), "the command to stall")
        return started

    def _sleeps(pid: int) -> bool:
        return b"pipe_write" in Path(f"/proc/{pid}/wchan").read_bytes() or (
            Path(f"/proc/{pid}/syscall").read_bytes().split()[:2] == [b"1", b"0x1"]
        )

    async def test_a_command_waits_on_a_full_disk_and_nothing_is_lost(
        runner: Runner, disk: Path, tmp_path: Path
    ) -> None:
        """It goes on when there is space. All bytes and the exit code are kept."""
        told = tmp_path / "told"
        started = await _full(disk, runner, told, grace=5)
        before = int(told.read_text())
        assert before < 64
        size = len(started.output)
        await deferLater(reactor, 3 * shim.RETRY)
        assert (int(told.read_text()), len(started.output)) == (before, size)
        assert started.sink.exits == []
        _enlarge(disk)
        exit = await started.sink.end()
        assert (exit.code, exit.output_size) == (3, len(TALK))
        assert started.output == TALK
        assert started.stream(shim.STDOUT) == TALK

    async def test_a_kill_works_on_a_full_disk(
        runner: Runner, disk: Path, tmp_path: Path
    ) -> None:
        """The tree ends at once.

        The result and the output are written when there is space.
        """
        told = tmp_path / "told"
        started = await _full(disk, runner, told, grace=30)
        started.run.kill()
        await until(lambda: not runner.left(), "the end of the tree")
        assert started.sink.exits == []
        assert not (started.folder / "exit").exists()
        # It sleeps while it waits for space.
        await deferLater(reactor, shim.PATIENCE + 0.1)
        before = switches(started.watcher)
        await deferLater(reactor, 1)
        assert switches(started.watcher) - before < 100
        _enlarge(disk)
        exit = await started.sink.end()
        assert (exit.signal, exit.cause, exit.forced) == ("SIGTERM", Cause.KILL, False)
        assert exit.output_size == len(started.output)
        assert len(started.output) >= int(told.read_text()) << 17
        assert TALK.startswith(started.output)

    async def test_a_full_disk_does_not_count_as_silence(
        runner: Runner, disk: Path, tmp_path: Path
    ) -> None:
        """The command would print if it could, so the silence limit is paused."""
        started = await _full(disk, runner, tmp_path / "told", 5, silence=1)
        await deferLater(reactor, 1.5)
        _enlarge(disk)
        exit = await started.sink.end()
        assert (exit.code, exit.cause) == (3, Cause.ITSELF)
        assert started.output == TALK

    async def test_a_result_waits_for_disk_space(runner: Runner, disk: Path) -> None:
        """A command that prints nothing can end while the disk is full."""
        runner.tasks = disk / "tasks"
        runner.tasks.mkdir(exist_ok=True)
        started = runner.sh("echo ready; exec sleep 60")
        await started.prints(b"ready")
        filler = disk / "filler"
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1 << 12))
            except OSError:
                pass
        started.run.kill()
        await until(lambda: not runner.left(), "the end of the tree")
        await deferLater(reactor, 2 * shim.RETRY)
        assert started.sink.exits == []
        filler.unlink()
        exit = await started.sink.end()
        assert (exit.signal, exit.cause) == ("SIGTERM", Cause.KILL)

    def _leave_inodes(disk: Path, free: int) -> None:
        """Leave so many free inodes on a disk."""
        _remount(disk, "nr_inodes=32")
        fillers = [disk / str(number) for number in range(32)]
        with suppress(OSError):
            for filler in fillers:
                filler.touch()
        for filler in fillers[:free]:
            filler.unlink()

    @pytest.mark.parametrize("free", range(3))
    @pytest.mark.parametrize("killed", [False, True])
    async def test_a_task_without_inodes_waits(
        runner: Runner, disk: Path, tmp_path: Path, free: int, *, killed: bool
    ) -> None:
        """It waits for its lock, its files or its result, and does not fail."""
        runner.tasks = disk / "tasks"
        runner.tasks.mkdir(exist_ok=True)
        go, ran = tmp_path / "go", tmp_path / "ran"
        runner.launcher = held(go)
        started = runner.sh(f"echo x >>{shlex.quote(str(ran))}; exit 3")
        _leave_inodes(disk, free)
        go.touch()
        await waits(started)
        if killed:
            started.run.kill()
        await deferLater(reactor, 2 * shim.RETRY)
        assert started.sink.exits == []
        _remount(disk, "nr_inodes=64")
        exit = await started.sink.end()
        assert not (free == 0 and killed and ran.exists())
        if exit.cause is Cause.KILL:
            # An inode may also have been freed when only the result was missing.
            assert (killed, exit.code) == (True, 3 if ran.exists() else None)
        else:
            assert (exit.code, exit.error, ran.read_text()) == (3, None, "x\n")

    @pytest.mark.parametrize("free", [3, 4])
    async def test_a_shim_needs_three_inodes(
        runner: Runner, disk: Path, tmp_path: Path, free: int
    ) -> None:
        """The result gets the inode of the spec."""
        runner.tasks = disk / "tasks"
        runner.tasks.mkdir(exist_ok=True)
        go = tmp_path / "go"
        runner.launcher = held(go)
        started = runner.sh("echo x; exit 3")
        _leave_inodes(disk, free)
        go.touch()
        exit = await started.sink.end()
        assert (exit.code, exit.error, started.output) == (3, None, b"x\n")


if _may_mount() and os.path.exists("/dev/loop-control"):

    @define
    class Machine:
        """A disk that loses everything that was not synced."""

        image: Path
        disk: Path

        def boot(self) -> None:
            """Mount the disk."""
            self._run("mount", "-o", "loop", str(self.image), str(self.disk))

        def stop(self) -> None:
            """Unmount the disk."""
            self._run("umount", str(self.disk))

        def cut_power(self) -> None:
            """Make ext4 write nothing more, not even its journal."""
            shutdown, no_log_flush = 0x8004587D, 2  # EXT4_IOC_SHUTDOWN
            fd = os.open(self.disk, os.O_RDONLY)
            try:
                fcntl.ioctl(fd, shutdown, no_log_flush.to_bytes(4, sys.byteorder))
            finally:
                os.close(fd)

        def _run(self, *command: str) -> None:
            subprocess.run(command, check=True)

    @pytest.fixture
    def machine(tmp_path: Path) -> Iterator[Machine]:
        """Yield a disk of 16 MiB that can lose its power."""
        machine = Machine(tmp_path / "image", tmp_path / "disk")
        machine.disk.mkdir()
        with machine.image.open("wb") as file:
            file.truncate(16 << 20)
        subprocess.run(["mkfs.ext4", "-q", str(machine.image)], check=True)
        machine.boot()
        yield machine
        subprocess.run(["umount", "--lazy", str(machine.disk)], check=True)

    async def test_the_lock_of_a_started_task_survives_a_power_cut(
        runner: Runner, machine: Machine
    ) -> None:
        """Without it the task would look as if it had not started, and start again."""
        runner.tasks = machine.disk / "tasks"
        runner.tasks.mkdir()
        started = runner.sh("echo ready; exec sleep 60")
        await started.prints(b"ready")
        content = (started.folder / "lock").read_text()
        watcher = started.shim
        machine.cut_power()
        os.kill(watcher, signal.SIGKILL)
        assert (await started.sink.end()).lost
        await until(runner.kill_left, "the end of the command")
        machine.stop()
        machine.boot()
        assert (started.folder / "lock").read_text() == content


# -- other parts of the module


async def test_capture_output_returns_standard_output() -> None:
    """Standard error is discarded, and standard input is empty."""
    command = Command(("sh", "-c", "cat; echo no >&2; echo $X; pwd"), {"X": "1.2"}, "/tmp")
    assert await capture.capture_output(reactor, reactor, command) == "1.2\n/tmp\n"


async def test_capture_output_of_a_missing_or_slow_command_is_empty() -> None:
    """Neither is an error."""
    missing = Command(("no-such-program",), {})
    assert await capture.capture_output(reactor, reactor, missing) == ""
    begin = time.monotonic()
    slow = Command(("sleep", "60"), {"TEST_CAPTURE": str(begin)})
    assert await capture.capture_output(reactor, reactor, slow, 0.2) == ""
    assert time.monotonic() - begin < 30
    await until(lambda: not marked(f"TEST_CAPTURE={begin}"), "the end of what was too slow")


async def test_a_cancelled_capture_kills_its_command() -> None:
    """The client of the request has gone away."""
    mark = f"TEST_CAPTURE={time.monotonic()}"
    slow = Command(("sleep", "60"), dict([mark.split("=")]))
    asked = Deferred.fromCoroutine(capture.capture_output(reactor, reactor, slow))
    asked.addErrback(lambda _: None)
    await until(lambda: marked(mark), "its start")
    asked.cancel()
    await until(lambda: not marked(mark), "its end")


@pytest.mark.parametrize(
    ("soft", "hard", "wanted"), [(100, 1000, 1000), (1000, 1000, 1000), (64, 128, 128)]
)
def test_the_limit_of_open_files_is_raised_as_far_as_allowed(
    soft: int, hard: int, wanted: int
) -> None:
    """The function returns both limits, because tasks get the old one."""
    code = (
        "import resource; from pulsar_api.execution import processes;"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}));"
        "print(processes.raise_file_limit(), resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"({soft}, {wanted}) ({wanted}, {hard})\n"


# -- secrets


async def test_secrets_are_masked_before_they_are_on_disk(runner: Runner) -> None:
    """They can span pieces, or end a stream. The records describe the masked output."""
    code = (
        "import os, time\n"
        "for piece in (b'is s3c', b'ret and ', b'pass', b'word\\nlast: s3cre', b't'):\n"
        "    os.write(1, piece); os.write(2, piece); time.sleep(0.01)\n"
    )
    secrets = (b"password", b"s3cret", b"word")
    command = Command((*PYTHON, code), runner.environment, secrets=secrets)
    sink = RecordingSink()
    (runner.tasks / "1").mkdir()
    runner.runs.append(runner.executor.start(1, command, Bounds(5), sink))
    exit = await sink.end()
    started = Started(runner.runs[0], sink, runner.tasks / "1")
    for code_of_stream in (shim.STDOUT, shim.STDERR):
        assert started.stream(code_of_stream) == b"is *** and ***\nlast: ***"
    assert exit.output_size == len(started.output) == started.records[-1].number


async def test_held_back_output_is_not_lost_with_a_background_child(
    runner: Runner,
) -> None:
    """A possible prefix of a secret is written when the patience is over."""
    command = Command(
        ("/bin/sh", "-c", "printf 'it is s3cr'; sleep 60 & exit 3"),
        runner.environment,
        secrets=(b"s3cret",),
    )
    sink = RecordingSink()
    (runner.tasks / "1").mkdir()
    runner.runs.append(runner.executor.start(1, command, Bounds(5), sink))
    exit = await sink.end()
    assert exit.code == 3
    assert (runner.tasks / "1" / "output").read_bytes() == b"it is s3cr"


def test_the_library_of_the_masker_comes_after_the_modules_of_python(
    tmp_path: Path,
) -> None:
    """Packages installed beside it cannot replace a standard module."""
    (tmp_path / "ahocorasick_rs").symlink_to(Path(ahocorasick_rs.__file__).parent)
    (tmp_path / "bisect.py").write_text("raise SystemExit('the wrong one')")
    code = (
        "import sys\n"
        f"sys.path.append({str(Path(shim.__file__).parent)!r})\n"
        "import shim\n"
        "path = sys.path[:]\n"
        f"masker = shim.masker([b's3cret'], {str(tmp_path)!r}.encode())\n"
        "print(masker.feed(b'a s3cret.'), sys.path == path)\n"
    )
    done = subprocess.run([*PYTHON, code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("b'a ***.' True\n", "")


def test_a_c_library_without_mallopt_is_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only glibc has that function."""
    with pytest.raises(OSError, match="no_such_function"):
        shim.c_function("no_such_function")
    call = shim.c_function
    monkeypatch.setattr(
        shim, "c_function", lambda name, *rest: call(f"no_such_{name}", *rest)
    )
    shim.keep_memory()


async def test_a_required_last_line_with_a_secret_is_recognised(runner: Runner) -> None:
    """It is compared in its masked form."""
    line = "Executed task deploy for site on production!"
    arguments = ("/bin/sh", "-c", f"echo '{line}'")
    secrets = (b"production",)
    command = Command(arguments, runner.environment, last_line=line, secrets=secrets)
    sink = RecordingSink()
    (runner.tasks / "1").mkdir()
    runner.runs.append(runner.executor.start(1, command, Bounds(5), sink))
    exit = await sink.end()
    assert (exit.code, exit.good) == (0, True)
    assert b"production" not in (runner.tasks / "1" / "output").read_bytes()


async def test_kept_secrets_are_read_again_and_removed(runner: Runner) -> None:
    """Only their owner can read the file, and its name cannot be guessed."""
    executor = runner.executor
    secrets = {"password": "pässword\n"}
    assert await executor.secrets(7, "unknown") is None
    name = await executor.keep_secrets(secrets)
    assert name != await executor.keep_secrets(secrets)
    folder = runner.tasks.parent / "secrets"
    assert (folder / name).stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700
    assert await executor.secrets(7, name) == Secrets(secrets, forms(secrets.values()))
    # A retry stores them again, under the name on record.
    (folder / name).unlink()
    assert await executor.keep_secrets({"password": "new"}, name) == name
    found = await executor.secrets(7, name)
    assert found is not None
    assert found.values == {"password": "new"}
    await executor.forget_other_secrets({name})
    assert [path.name for path in folder.iterdir()] == [name]
    executor.forget_secrets(7, name)
    assert await executor.secrets(7, name) is None


async def test_a_secret_that_cannot_be_removed_does_not_keep_others(runner: Runner) -> None:
    """The removal goes on with the next file."""
    folder = runner.tasks.parent / "secrets"
    (folder / "in the way").mkdir(parents=True)
    for number in range(5):
        (folder / f"name{number}").write_text("{}")
    await runner.executor.forget_other_secrets(set())
    assert [path.name for path in folder.iterdir()] == ["in the way"]


async def test_a_daemon_that_cannot_list_old_secrets_does_not_start(
    runner: Runner,
) -> None:
    """Otherwise they would stay on disk, because nothing looks for them again."""
    folder = runner.tasks.parent / "secrets"
    await runner.executor.forget_other_secrets(set())
    folder.symlink_to(folder)
    with pytest.raises(OSError, match="symbolic"):
        await runner.executor.forget_other_secrets(set())


async def test_secrets_that_cannot_be_stored_leave_no_file(runner: Runner) -> None:
    """Not even the temporary file stays."""
    folder = runner.tasks.parent / "secrets"
    (folder / "name" / "in the way").mkdir(parents=True)
    with pytest.raises(StoreUnavailable):
        await runner.executor.keep_secrets({"password": "x"}, "name")
    assert [path.name for path in folder.iterdir()] == ["name"]


async def test_secrets_in_the_folders_of_ended_tasks_are_removed(runner: Runner) -> None:
    """All files that may hold them go. The output of the task stays."""
    for number in (1, 2):
        (runner.tasks / str(number)).mkdir()
        for name in ("secrets", "secrets.tmp", "spec", "spec.tmp", "output"):
            (runner.tasks / str(number) / name).touch()
    await runner.executor.forget_all_secrets([1, 3])
    assert [path.name for path in (runner.tasks / "1").iterdir()] == ["output"]
    assert len(list((runner.tasks / "2").iterdir())) == 5


async def test_a_folder_that_cannot_be_used_bars_no_task(runner: Runner) -> None:
    """The daemon cannot tell then whether a shim starts, and tries again later."""
    (runner.tasks / "1").symlink_to("1")
    with pytest.raises(StoreUnavailable):
        runner.executor.prevent_start(1)


async def test_a_daemon_that_dies_at_the_start_leaves_the_secrets_for_the_shim(
    runner: Runner,
) -> None:
    """They are in the task's folder, where the shim removes them."""
    executor = runner.executor
    name = await executor.keep_secrets({"password": "x"})
    await executor.permit(1)
    (runner.tasks.parent / "secrets" / name).rename(runner.tasks / "1" / "secrets")
    assert await executor.secrets(1, name) == Secrets({"password": "x"})
    command = Command(("true",), runner.environment, secret_file=name)
    sink = RecordingSink()
    runner.runs.append(executor.start(1, command, Bounds(5), sink))
    assert (await sink.end()).code == 0
    assert await executor.secrets(1, name) is None


async def test_secrets_that_cannot_be_kept_are_an_error(runner: Runner) -> None:
    """No file of them stays."""
    (runner.tasks.parent / "secrets").touch()
    with pytest.raises(StoreUnavailable):
        await runner.executor.keep_secrets({"password": "x"})


IN_THE_WAY = {
    "a FIFO": "mkfifo {0}",
    "a link": "ln -s /dev/full {0}",
    "a link to nowhere": "ln -s /nowhere/at/all {0}",
    "a folder": "mkdir -p {0}/full/of; touch {0}/full/things",
    "a file": "echo nonsense > {0}; chmod 000 {0}",
    "a folder that is made again": "mkdir -p {0}/full {0}.away/full",
}


@pytest.mark.parametrize("name", ["exit", "exit.tmp"])
@pytest.mark.parametrize("what", IN_THE_WAY)
async def test_an_obstacle_in_place_of_the_result_is_moved_aside(
    runner: Runner, what: str, name: str
) -> None:
    """The task itself created it. The shim writes the true result."""
    task = runner.sh(f'cd "$PULSAR_TASK_FOLDER"; {IN_THE_WAY[what].format(name)}; exit 3')
    exit = await task.sink.end()
    assert (exit.code, exit.lost, exit.error) == (3, False, None)
