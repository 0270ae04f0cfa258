"""Tests of damaged task files. They harm neither the daemon nor other tasks."""

import fcntl
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet import reactor
from twisted.internet.defer import Deferred, succeed
from twisted.internet.task import Clock

from pulsar_api import files
from pulsar_api.concurrency.turns import TurnScheduler
from pulsar_api.errors import StoreUnavailable
from pulsar_api.execution import proc, processes, sessions
from pulsar_api.execution.executor import ShimExecutor
from pulsar_api.execution.local_machine import LocalMachine
from pulsar_api.execution.results import read_exit
from pulsar_api.execution.task_files import alive
from pulsar_api.output.files import Output
from pulsar_api.output.lines import LineIndex
from pulsar_api.output.reader import Reader, stdout_text
from pulsar_api.output.records import LARGEST
from pulsar_api.output.timestamps import Timed
from pulsar_api.shim import shim
from pulsar_api.tasks.interfaces import Bounds
from pulsar_api.tasks.model import Exit, Process
from pulsar_api.web.legacy.message import read_text, start_offset
from tests import needs

MACHINE = LocalMachine(reactor)
NOBODY = 65534
HUGE = 1 << 40
"""Size in bytes of a file that is larger than the disk."""
LIMIT = 20
"""Seconds after which a test counts as hanging. All of them need milliseconds."""

NAMES = (
    *("output", "output.idx", "cut", "exit", "lock", "start", "begun", "sessions"),
    *("kill", "secrets", "promise"),
)
"""All files of a task's folder that a daemon reads."""


@pytest.fixture(autouse=True)
def _does_not_hang() -> Iterator[None]:
    """Fail instead of hanging, because the reactor would hang with this thread."""

    def late(_: int, frame: FrameType | None) -> None:
        pytest.fail(f"hangs at {frame}")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# -- obstacles and wrong contents


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        # The path of a socket must be short.
        folder = os.open(path.parent, os.O_PATH)
        sock.bind(f"/proc/self/fd/{folder}/{path.name}")
        os.close(folder)


def _folder(path: Path) -> None:
    path.mkdir()
    (path / "in").touch()


def _link(target: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.symlink_to(target)

    return make


def _content(data: bytes) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.write_bytes(data)

    return make


def _huge(path: Path) -> None:
    path.touch()
    os.truncate(path, HUGE)


def _huge_with_data(path: Path) -> None:
    path.write_bytes(b"x" * 5000)
    os.truncate(path, HUGE)
    with path.open("r+b") as file:
        file.seek(HUGE // 2)
        file.write(b"\x01" * 5000)


NO_FILES: dict[str, Callable[[Path], None]] = {
    "a FIFO": _fifo,
    "a socket": _socket,
    "a folder": _folder,
    "a link to a device": _link("/dev/zero"),
    "a link to a full device": _link("/dev/full"),
    "a link to a file": _link("/etc/passwd"),
    "a dangling link": _link("/nowhere/at/all"),
    "a link to itself": lambda path: path.symlink_to(path.name),
}
"""Things that are not regular files."""
CONTENTS: dict[str, Callable[[Path], None]] = {
    "nothing": _content(b""),
    "zeros": _content(bytes(5000)),
    "bytes that are no text": _content(bytes(range(256)) * 20),
    "all ones": _content(b"\xff" * 4096),
    "a negative number": _content(b"-5 -7 -9 -1\n"),
    "a number of 10,000 digits": _content(b"9" * 10_000 + b" 1\n"),
    "large numbers": _content(b"9223372036854775807 9223372036854775808 1e999 nan\n"),
    "nested brackets": _content(b"[" * 100_000),
    "a hole": _huge,
    "a hole around a few bytes": _huge_with_data,
}
"""Contents that no shim writes."""
DAMAGES = {**NO_FILES, **CONTENTS}


def damage(path: Path, how: str) -> None:
    """Replace a file by an obstacle or by wrong contents."""
    with suppress(FileNotFoundError):
        path.unlink()
    DAMAGES[how](path)


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """Return the folder of a task whose shim has ended, with all of its files."""
    folder = tmp_path / "tasks" / "1"
    folder.mkdir(parents=True)
    fill(folder)
    return folder


def fill(folder: Path) -> None:
    """Write the files of a task as its shim does."""
    index = [(shim.CLOCK, 1_700_000_000_000, 0), (shim.STARTED, 4711, 1)]
    index += [(shim.STDOUT, 4, 5), (shim.STDERR, 8, 6), (shim.STDOUT, 12, 7)]
    records = [
        number.to_bytes(8, "little") + (at << 8 | code).to_bytes(8, "little")
        for code, number, at in index
    ]
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    result = "version 2\nended 1.5\ncause itself\nforced 0\nsize 12\ncode 0\nend\n"
    for name, text in {
        "output": "one\ntwo\nend\n",
        "exit": result,
        "lock": "4194304 1\n",
        "begun": f"boot {boot}",
        "sessions": f"{boot}4194304 1 2\n",
        "kill": "joe",
        "secrets": '{"A": "b"}',
        "promise": "end",
    }.items():
        (folder / name).write_text(text)
    (folder / "output.idx").write_bytes(b"".join(records))


class Sink:
    """A sink that remembers the result of a run."""

    def __init__(self) -> None:
        self.exits: list[Exit] = []

    def started(self, pid: int) -> None:
        """Check the number."""
        assert 0 <= pid <= LARGEST

    def printed(self, size: int) -> None:
        """Check the size."""
        assert 0 <= size <= LARGEST

    def ended(self, exit: Exit) -> None:
        """Remember the result."""
        self.exits.append(exit)


class Alone(LocalMachine):
    """A machine without processes of these tasks."""

    def end(
        self, folder: Path, *, numbers: bool, cgroup: str
    ) -> Deferred[tuple[Process, ...]]:
        """Return that no process is left."""
        return succeed(())


def adopted(folder: Path) -> Exit:
    """Return the result of a task that the next daemon finds."""
    clock, sink = Clock(), Sink()
    executor = ShimExecutor(Alone(reactor), clock, folder.parent, lambda: "name")
    run = executor.adopt(int(folder.name), None, Bounds(5), sink)
    clock.advance(0)
    for _ in range(10):
        clock.advance(1)
    run.detach()
    assert len(sink.exits) == 1
    return sink.exits[0]


def read_all(folder: Path) -> None:
    """Read an output in every possible way. No error but `OSError` may come out."""
    output = Output(folder)
    turns = TurnScheduler(Clock())
    size = 0
    with suppress(OSError):
        size = min(output.size(), 1 << 17)
    ways: list[Callable[[], object]] = [
        output.check,
        lambda: output.readable(size),
        output.index_size,
        output.weight,
        output.holes,
        output.began,
        output.last_line,
        lambda: output.read(0, size),
        lambda: output.character_start(size // 2),
        lambda: output.record_at(size // 2),
        lambda: list(output.text(0, size)),
        lambda: list(output.news(0)),
        lambda: list(stdout_text(output, size)),
        lambda: read_text(output, 0, size, 1000),
        lambda: [Timed(output).dress(chunk) for chunk in Reader(output).read(size)],
        lambda: list(Reader(output, 3, timed=True).read(size)),
        lambda: start_offset(output, turns, size, 10).send(None),
        lambda: _reach(LineIndex(output, turns), size),
    ]
    for way in ways:
        with suppress(OSError, StopIteration):
            way()


def _reach(index: LineIndex, size: int) -> None:
    for _ in range(10):
        if not index._step(size):
            break
    index.segments(0)
    index.line_at(size // 2)


# -- the tests


@pytest.mark.parametrize("how", NO_FILES)
@pytest.mark.parametrize("name", NAMES)
def test_a_replaced_file_is_damaged(task: Path, name: str, how: str) -> None:
    """It does not count as missing or as not yet written."""
    damage(task / name, how)
    with pytest.raises(files.Damaged):
        MACHINE.read(task / name)
    with pytest.raises(files.Damaged):
        files.size(task / name)


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", [*NAMES, "the folder"])
def test_a_task_with_a_damaged_file_has_a_true_result(
    task: Path, name: str, how: str
) -> None:
    """Its result is read or counts as lost. All reads come to an end."""
    if name == "the folder":
        shutil.rmtree(task)
        DAMAGES[how](task)
    else:
        damage(task / name, how)
    exit = adopted(task)
    assert exit.lost == (name in {"exit", "the folder"})
    if not exit.lost:
        assert (exit.code, exit.output_size) == (0, 12)
    read_all(task)


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", NAMES)
def test_a_task_without_a_result_is_lost(task: Path, name: str, how: str) -> None:
    """The other files of its folder, damaged or not, do not tell its result."""
    (task / "exit").unlink()
    damage(task / name, how)
    assert adopted(task).lost


@pytest.mark.parametrize(
    "line",
    [
        *("size -1", "size 9223372036854775807", f"size {'9' * 4000}", "ended nan"),
        *("ended inf", "ended 1e300", "ended -1", "code 256", "code -1", "signal 65"),
        *("left -1 2 0 x", f"left {1 << 70} 2 0 x", "left 1 2 99999999999 x"),
        "\n".join(["left 1 2 0 x"] * 51),
    ],
)
def test_a_result_with_impossible_numbers_is_damaged(task: Path, line: str) -> None:
    """The database could not store them."""
    text = (task / "exit").read_text()
    name = line.partition(" ")[0]
    lines = [one for one in text.splitlines() if not one.startswith(f"{name} ")]
    if name == "signal":
        lines.remove("code 0")
    lines.insert(-1, line)
    (task / "exit").write_text("\n".join([*lines, ""]))
    exit = read_exit(MACHINE, task)
    assert exit is not None
    assert exit.lost


def test_a_damaged_lock_that_is_held_names_its_holder(task: Path) -> None:
    """The kernel knows the holder, so a kill still finds the shim."""
    for how in CONTENTS:
        damage(task / "lock", how)
        with (task / "lock").open("r+b") as lock:
            assert alive(MACHINE, task) == 0
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = processes.holder(task)
            if how != "a negative number":
                assert alive(MACHINE, task) == os.getpid()
                assert found is not None
                assert found[0] == os.getpid()


def test_the_time_of_a_record_is_never_in_the_future(task: Path) -> None:
    """Otherwise later sessions of strangers would count as the task's."""
    (task / "output.idx").write_bytes(b"\xff" * 16)
    assert sessions.last_sign(task, 5) <= proc.now()


@pytest.mark.parametrize("how", DAMAGES)
def test_files_are_created_in_place_of_any_obstacle(tmp_path: Path, how: str) -> None:
    """No other file is written. A folder is an error."""
    path = tmp_path / "file"
    damage(path, how)
    if how == "a folder":
        with pytest.raises(IsADirectoryError):
            MACHINE.write(path, b"new")
        return
    MACHINE.write(path, b"new")
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert not path.is_symlink()


@pytest.mark.parametrize("how", NO_FILES)
async def test_a_list_of_permits_that_is_no_file_prevents_no_start(
    tmp_path: Path, how: str
) -> None:
    """It is moved aside, and the start of the next task creates a new one."""
    (tmp_path / "tasks").mkdir()
    executor = ShimExecutor(MACHINE, Clock(), tmp_path / "tasks", lambda: "name")
    damage(tmp_path / "permits", how)
    with pytest.raises(StoreUnavailable):
        await executor.permit(47)
    assert await executor.permitted() == set()
    assert "permits.name" in MACHINE.names(tmp_path)
    await executor.permit(48)
    assert await executor.permitted() == {48}


async def test_a_folder_with_an_impossible_number_is_not_a_task(tmp_path: Path) -> None:
    """Otherwise no number would be left for the next task."""
    for name in ("7", "08", "9" * 19, "9" * 200, "x", "\u0663"):
        (tmp_path / name).mkdir()
    executor = ShimExecutor(MACHINE, Clock(), tmp_path, lambda: "name")
    assert await executor.kept() == [7]


@pytest.mark.parametrize("how", DAMAGES)
async def test_damaged_secrets_count_as_missing(task: Path, how: str) -> None:
    """The task that waits for them fails instead of waiting for ever."""
    damage(task / "secrets", how)
    executor = ShimExecutor(MACHINE, Clock(), task.parent, lambda: "name")
    assert await executor.secrets(1, None) is None


@pytest.mark.parametrize("how", DAMAGES)
async def test_the_folder_of_an_ended_task_is_removed(task: Path, how: str) -> None:
    """The state of its lock does not matter."""
    damage(task / "lock", how)
    executor = ShimExecutor(MACHINE, Clock(), task.parent, lambda: "name")
    await executor.forget([1])
    assert MACHINE.names(task.parent) == []


@pytest.mark.parametrize("mine", [True, False])
@pytest.mark.needs("root")
def test_a_file_without_read_permission_is_read(tmp_path: Path, *, mine: bool) -> None:
    """The daemon owns it and restores the permission. A file of root is damaged."""
    folder = tmp_path / "1"
    folder.mkdir()
    (folder / "exit").write_text("text")
    os.chown(folder, NOBODY, NOBODY)
    if mine:
        os.chown(folder / "exit", NOBODY, NOBODY)
    (folder / "exit").chmod(0)
    folder.chmod(0)
    before = Path.cwd()
    # The parent folders are closed to that user.
    os.chdir(tmp_path)
    tmp_path.chmod(0o755)
    os.seteuid(NOBODY)
    try:
        if mine:
            assert files.read(Path("1/exit")) == b"text"
        else:
            with pytest.raises(files.Damaged):
                files.read(Path("1/exit"))
    finally:
        os.seteuid(0)
        os.chdir(before)


# Fuzzed contents: parts of valid files, and numbers at the limits.
NUMBER = st.one_of(
    st.integers(-(1 << 70), 1 << 70),
    st.sampled_from([0, -1, 1 << 31, 1 << 53, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]),
)
RECORD = st.tuples(NUMBER, st.integers(0, 9), st.integers(0, 1 << 56)).map(
    lambda r: (
        (r[0] % (1 << 64)).to_bytes(8, "little")
        + (r[2] << 8 & (1 << 64) - 1 | r[1]).to_bytes(8, "little")
    )
)
WORDS = st.lists(
    st.one_of(
        NUMBER.map(lambda n: b"%d" % n),
        st.sampled_from(
            [
                *(b"version 2", b"ended", b"cause", b"itself", b"forced", b"size", b"open"),
                *(b"code", b"signal", b"error", b"promise", b"left", b"end", b"kill"),
                *(b"nan", b"1e400", b"9" * 5000, b"\xff\xfe", b"\x00", b'{"A": 5}', b"["),
            ]
        ),
        st.binary(max_size=6),
    ),
    max_size=24,
).flatmap(
    lambda words: st.lists(
        st.sampled_from([b" ", b"\n", b"\n", b""]),
        min_size=len(words),
        max_size=len(words),
    ).map(lambda ends: b"".join(w + e for w, e in zip(words, ends, strict=True)))
)
DATA = st.one_of(
    st.binary(max_size=200),
    st.lists(RECORD, max_size=20).map(b"".join),
    WORDS,
    st.integers(0, 500).map(lambda n: n),  # the valid contents, cut at this byte
)


@settings(max_examples=needs.trials(50, 200))
@given(
    st.dictionaries(st.sampled_from(NAMES), DATA, max_size=5),
    st.dictionaries(st.sampled_from(NAMES), st.sampled_from(list(DAMAGES)), max_size=2),
)
def test_reading_any_files_of_a_task_comes_to_an_end(
    tmp_path_factory: pytest.TempPathFactory,
    contents: dict[str, bytes | int],
    damages: dict[str, str],
) -> None:
    """The result is plausible, and reading the output raises no error but `OSError`."""
    signal.alarm(LIMIT)
    folder = tmp_path_factory.mktemp("fuzz") / "tasks" / "1"
    folder.mkdir(parents=True)
    fill(folder)
    for name, data in contents.items():
        whole = (folder / name).read_bytes() if (folder / name).exists() else b""
        (folder / name).write_bytes(whole[:data] if isinstance(data, int) else data)
    for name, how in damages.items():
        damage(folder / name, how)
    exit = adopted(folder)
    if not exit.lost:
        assert exit.code is None or 0 <= exit.code <= 255
        assert exit.ended_at is not None
        assert 0 <= exit.output_size <= LARGEST
    read_all(folder)
    shutil.rmtree(folder.parents[1])
