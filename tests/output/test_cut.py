"""Tests of cut outputs: the space that they take on disk, and how they are read."""

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import chdir
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from attrs import define, field, frozen
from hypothesis import example, given, settings
from hypothesis import strategies as st
from twisted.internet.task import Clock

from pulsar_api.concurrency.turns import TurnScheduler
from pulsar_api.execution.executor import ShimExecutor
from pulsar_api.execution.local_machine import LocalMachine
from pulsar_api.execution.programs import SHIM_COMMAND
from pulsar_api.execution.results import read_exit
from pulsar_api.output.files import Output
from pulsar_api.output.pieces import read_pieces
from pulsar_api.output.reader import Chunk, Reader, stdout_text
from pulsar_api.output.records import Cut, Record
from pulsar_api.shim import shim
from pulsar_api.tasks.interfaces import Bounds
from pulsar_api.tasks.model import Command
from tests import needs
from tests.output.test_lines import Turns, done

MACHINE = LocalMachine(None)
KIB = 1 << 10
OUT, ERR = shim.STDOUT, shim.STDERR
BOTH = (OUT, ERR)
LEAST = 64 * KIB
"""Bytes that an index may have, however small the limit is."""
SLACK = 6 * shim.BLOCK
"""Bytes for partly filled blocks, and for those with the map of the file."""

MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""A folder where a sync is instant, because the tests make thousands of them."""

NUMBERS = b"".join(b"%07d\n" % number for number in range(1 << 20))
"""Bytes that repeat nowhere."""

Burst = tuple[tuple[int, ...], int, int]
"""The streams that take turns, the bytes printed each time, and the number of times."""


def on_disk(path: Path) -> int:
    """Return the bytes that a file takes on disk."""
    return path.stat().st_blocks * 512


def ordered(folder: Path, limit: int, *arguments: str) -> None:
    """Write the spec of a shim into its folder."""
    executor = ShimExecutor(MACHINE, Clock(), folder.parent, str)
    environment = {"PATH": os.environ["PATH"]}
    bounds = Bounds(5, max_output=limit)
    executor._write_spec(folder, Command(arguments, environment), bounds)


@define
class Feed:
    """A shim without a command. The test plays the two streams."""

    folder: Path
    limit: int
    watcher: shim.Shim = field(init=False)
    recorder: shim.Recorder = field(init=False)
    streams: bytearray = field(factory=bytearray)
    """The stream of each byte."""

    def __attrs_post_init__(self) -> None:
        ordered(self.folder, self.limit, "true")
        with chdir(self.folder):
            claim = shim.FolderLock()
            claim.folder = os.open(".", os.O_RDONLY)
            spec = shim.Spec(shim.read_file("spec"))
            self.watcher = shim.Shim(spec, shim.Signals(-1), claim)
            self.watcher.recorder.open()
            self.watcher.command.open()
        self.recorder = self.watcher.recorder
        self.recorder.daemon = -1
        self.recorder.note(shim.CLOCK, 1_700_000_000_000)
        self.recorder.note(shim.STARTED, 4711)

    @property
    def size(self) -> int:
        """The number of bytes printed."""
        return len(self.streams)

    @property
    def output(self) -> Output:
        """The output as readers see it."""
        return Output(self.folder)

    def keep(self, code: int, size: int) -> None:
        """Let a stream print the next bytes."""
        self.recorder.keep(code, NUMBERS[self.size : self.size + size])
        self.streams += bytes([code]) * size

    def burst(self, burst: Burst) -> None:
        """Let streams take turns."""
        codes, size, count = burst
        for number in range(count):
            self.keep(codes[number % len(codes)], size)

    def check_disk(self) -> None:
        """Check that both files together take a small multiple of the limit."""
        index = on_disk(self.folder / "output.idx")
        assert index <= max(self.limit, LEAST) + SLACK
        assert on_disk(self.folder / "output") <= self.limit + self.limit // 16 + SLACK

    def close(self) -> None:
        """Close the descriptors of the shim."""
        for stream in self.watcher.command.streams:
            os.close(stream.write_end)
            os.close(stream.fd)
        for fd in (self.recorder.folder, self.recorder.output, self.recorder.index):
            os.close(fd)


@pytest.fixture
def feeds() -> Iterator[Callable[[int], Feed]]:
    """Yield a function that creates a feed in a folder of its own."""
    made: list[Feed] = []

    def make(limit: int) -> Feed:
        folder = Path(name, str(len(made)))
        folder.mkdir()
        made.append(Feed(folder, limit))
        return made[-1]

    with TemporaryDirectory(dir=MEMORY) as name:
        yield make
        for feed in made:
            feed.close()


@define
class Follower:
    """Follows a growing output, and compares each byte and its stream."""

    feed: Feed
    stream: int | None = None
    timed: bool = False
    offset: int = 0
    seen: bytearray = field(factory=bytearray)
    """For each byte, 1 if it was read, and 2 if a marker reported it as cut."""
    reader: Reader = field(init=False)

    def __attrs_post_init__(self) -> None:
        output = self.feed.output
        record = output.record_at(self.offset) if self.offset else 0
        self.reader = Reader(output, self.offset, record, self.stream, timed=self.timed)

    def look(self) -> None:
        """Read all new output."""
        feed, begin = self.feed, max(self.offset, len(self.seen))
        self.seen += bytes(feed.size - len(self.seen))
        for chunk in self.reader.read(feed.size):
            if chunk.stream is None:
                self.marked(chunk)
                continue
            end = chunk.start + len(chunk.data)
            assert chunk.data == NUMBERS[chunk.start : end]
            assert set(feed.streams[chunk.start : end]) <= {chunk.stream}
            assert self.stream in {None, chunk.stream}
            self.seen[chunk.start : end] = b"\1" * len(chunk.data)
        # Comparing large integers takes seconds, and comparing bytes would take minutes.
        wanted = BOTH if self.stream is None else (self.stream,)
        ours = bytes(code in wanted for code in range(256))
        missed = bytes(code == 0 for code in range(256))
        printed = int.from_bytes(feed.streams[begin:].translate(ours))
        lost = printed & int.from_bytes(self.seen[begin:].translate(missed))
        assert lost.bit_count() == 0

    def marked(self, chunk: Chunk) -> None:
        """Check a marker of a cut. An empty chunk is no marker."""
        if not chunk.data:
            return
        begin, cut = self.feed.output.cut()
        start, end = map(int, re.findall(rb"\d+", chunk.data))
        text = f"\n[bytes {start} to {end} were cut: --max-output-size]\n"
        assert chunk.data.decode() == text
        # The cut may have grown since.
        assert begin <= start == chunk.start < end <= cut <= self.feed.size
        self.seen[chunk.start : end] = b"\2" * (end - chunk.start)


def check_readers(feed: Feed) -> None:
    """Check that a new reader gets each byte, or a marker that reports it as cut."""
    output, size = feed.output, feed.size
    start, end = output.cut()
    whole = bytes(feed.streams)
    for stream in (None, *BOTH):
        Follower(feed, stream).look()
    for offset in (0, start - 1, start, (start + end) // 2, end - 1, end, end + 1):
        if 0 <= offset < size:
            Follower(feed, offset=offset, timed=True).look()
    data = (feed.folder / "output").read_bytes()
    assert data[:start] == NUMBERS[:start]
    assert data[end:] == NUMBERS[end:size]
    clock = Turns()
    found = done(
        clock, read_pieces(output, TurnScheduler(clock), max(0, size - 100), size)
    ).pieces
    read = b"".join(bytes([code or 0]) * len(text) for code, _, text in found)
    assert read == whole[-100:]
    text = b"".join(NUMBERS[at : at + 1] for at in range(end, size) if whole[at] == OUT)
    if text.count(b"\n") > 1:
        assert output.last_line() == text.removesuffix(b"\n").rpartition(b"\n")[2]
    assert output.began() is not None
    records = list(output.records())
    numbers = [record.number for record in records if record.code in BOTH]
    assert numbers == sorted(numbers)
    assert [record.code for record in records][:2] == [shim.CLOCK, shim.STARTED]
    news = [record for _, record in output.news(0)]
    assert {r for r in records if r.code not in BOTH} <= set(news)
    assert news[-1] == records[-1]


# Sizes of pieces: tiny, usual, larger than the limit.
BURSTS = st.lists(
    st.tuples(
        st.sampled_from([(OUT,), (ERR,), (OUT, ERR), (OUT, OUT, ERR)]),
        st.sampled_from([1, 2, 7, 100, 5000, 70_000, 300_000]),
        st.integers(1, 3000),
    ).map(lambda burst: (*burst[:2], min(burst[2], 1 + 400_000 // burst[1]))),
    min_size=1,
    max_size=6,
)


@settings(max_examples=needs.trials(5, 20))
@given(bursts=BURSTS, limit=st.sampled_from([1, 10_000, 64 * KIB, 100 * KIB, 256 * KIB]))
@example(bursts=[((OUT, ERR), 1, 20_000)], limit=100 * KIB)
@example(bursts=[((OUT, ERR), 1, 5000), ((ERR,), 300_000, 2)], limit=64 * KIB)
def test_start_and_end_of_an_output_are_kept_for_any_pattern_of_printing(
    bursts: list[Burst], limit: int
) -> None:
    """Streams are told apart, both files are bounded, and followers miss nothing."""
    with TemporaryDirectory(dir=MEMORY) as name:
        feed = Feed(Path(name), limit)
        try:
            followers = [Follower(feed), Follower(feed, OUT), Follower(feed, ERR)]
            late = Follower(feed, timed=True)
            for number, (codes, size, count) in enumerate(bursts):
                for _ in range(4):
                    feed.burst((codes, size, -(-count // 4)))
                    feed.check_disk()
                    for follower in followers:
                        follower.look()
                if number % 2:
                    late.look()
            late.look()
            check_readers(feed)
        finally:
            feed.close()


@pytest.mark.parametrize("codes", [(OUT,), (ERR, OUT), (OUT, OUT, OUT, ERR)])
@pytest.mark.parametrize("limit", [1, 30_000, 100 * KIB])
def test_tiny_pieces_cost_a_small_multiple_of_the_limit(
    feeds: Callable[[int], Feed], codes: tuple[int, ...], limit: int
) -> None:
    """A single stream needs no more. A byte of output takes sixteen in the index."""
    feed = feeds(limit)
    for _ in range(10):
        feed.burst((codes, 1, 2000))
        feed.check_disk()
    assert (feed.folder / "output.idx").stat().st_size > 20_000 * shim.RECORD
    check_readers(feed)


def test_without_a_limit_nothing_is_cut(feeds: Callable[[int], Feed]) -> None:
    """Output and index stay whole."""
    feed = feeds(0)
    feed.burst(((OUT, ERR), 1, 10_000))
    feed.burst(((OUT,), 300_000, 3))
    assert len(list(feed.output.records())) == 10_005
    assert feed.output.holes() == (0, 0, 0, 0)
    Follower(feed).look()


def test_the_middle_of_a_piece_larger_than_the_limit_is_never_written(
    feeds: Callable[[int], Feed],
) -> None:
    """Its start ends between two characters, and its end is kept."""
    feed = feeds(10_000)
    data = "€".encode() * 200_000
    feed.recorder.keep(OUT, data)
    feed.recorder.keep(ERR, b"end")
    start, end = feed.output.cut()
    assert start == 4096
    assert len(data) - 10_000 < end <= len(data) - 5000
    assert on_disk(feed.folder / "output") < 16 * KIB
    written = (feed.folder / "output").read_bytes()
    assert (written[:start], written[end:]) == (data[:start], data[end:] + b"end")
    chunks = Reader(feed.output).read(feed.output.size())
    assert [chunk.stream for chunk in chunks if chunk.data] == [OUT, None, OUT, ERR]
    # The record of the start ends with a character, so that no character is split.
    first = next(r for r in feed.output.records() if r.code == OUT)
    assert first.number == 4098


def test_the_record_of_a_sent_signal_survives_a_cut(feeds: Callable[[int], Feed]) -> None:
    """The record is written again with its own time, exactly once."""
    feed = feeds(64 * KIB)
    feed.burst(((OUT, ERR), 1, 5000))
    feed.recorder.note(shim.TERM_SENT, feed.size)
    for _ in range(4):
        feed.burst(((OUT, ERR), 1, 4000))
        records = list(feed.output.records())
        found = [(r.code, r.number) for r in records if r.code not in BOTH]
        assert found[2:] == [(shim.TERM_SENT, 5000)]
    feed.check_disk()
    check_readers(feed)


# -- failures


@pytest.mark.parametrize("good", [0, 1, 2, 3, 6, 7])
def test_without_holes_all_output_is_kept_and_one_message_says_so(
    feeds: Callable[[int], Feed],
    good: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Cuts fail from the first on, or from a later one. Earlier cuts stay marked."""
    feed = feeds(32 * KIB)
    real, left = shim.punch, iter(range(good))

    def punch(fd: int, start: int, end: int) -> bool:
        return next(left, None) is not None and real(fd, start, end)

    monkeypatch.setattr(shim, "punch", punch)
    follower = Follower(feed)
    for _ in range(3):
        feed.burst(((OUT, ERR), 1, 6000))
        follower.look()
    monkeypatch.undo()
    cuts = feed.output.holes()
    assert (cuts == (0, 0, 0, 0)) == (good == 0)
    assert (feed.folder / "cut").exists() == (good > 0)
    feed.burst(((OUT, ERR), 1000, 400))
    assert feed.output.holes() == cuts
    check_readers(feed)
    assert capfd.readouterr().err.count("fallocate(2) has failed") == 1


def test_a_shim_can_complain_without_a_daemon() -> None:
    """The daemon has ended, and the task goes on."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    kept = os.dup(2)
    os.dup2(write_end, 2)
    try:
        shim.complain("for nobody")
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(write_end)


def test_a_cut_waits_for_disk_space(
    feeds: Callable[[int], Feed], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output that is printed meanwhile comes after it. Only cut bytes are lost."""
    feed = feeds(64 * KIB)
    real = shim.put

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    for turn in range(6):
        monkeypatch.setattr(shim, "put", full if turn % 2 else real)
        feed.burst(((OUT, ERR), 1, 4000))
        feed.burst(((OUT,), 100_000, 1))
        assert feed.recorder.waiting == (turn % 2 == 1)
        feed.check_disk()
    monkeypatch.undo()
    feed.recorder.flush()
    check_readers(feed)


# -- reading during a cut

MOST = 25_000
"""The number of bytes printed in all, each of them a piece."""


@frozen
class Moving(Output):
    """An output whose cut grows just before or after a reader asks for it."""

    feed: Feed
    turns: Iterator[str]
    """Whether the cut grows at each point: a repeated word of 0 and 1."""

    def holes(self) -> Cut:
        """Return the cut, which can grow before and after it is read."""
        self.go_on()
        found = super().holes()
        self.go_on()
        return found

    def go_on(self) -> None:
        """Print so much that the cut grows."""
        if next(self.turns) == "1" and self.feed.size < MOST:
            self.feed.burst(((OUT, ERR), 1, 1500))


@pytest.fixture(params=["01", "10", "0010", "0001", "1001000"])
def moving(request: pytest.FixtureRequest, feeds: Callable[[int], Feed]) -> Moving:
    """Return an output with a cut that will grow."""
    feed = feeds(64 * KIB)
    feed.burst(((OUT, ERR), 1, 6000))
    return Moving(feed.folder, feed, cycle(request.param))


@pytest.mark.parametrize("stream", [None, OUT, ERR])
def test_data_read_during_a_cut_is_discarded(moving: Moving, stream: int | None) -> None:
    """Neither records nor bytes that were read as zeros count.

    A follower misses nothing.
    """
    feed = moving.feed
    followers = []
    for offset in (0, 3000, 5900):
        follower = Follower(feed, stream, offset=offset)
        record = moving.record_at(offset) if offset else 0
        follower.reader = Reader(moving, offset, record, stream)
        followers.append(follower)
    while feed.size < MOST:
        for follower in followers:
            follower.look()
    for follower in followers:
        follower.look()
        assert follower.reader.offset == feed.size


@pytest.mark.parametrize("ask", [Output.records, lambda o: (r for _, r in o.news(0))])
def test_records_cut_while_they_are_read_are_skipped(
    moving: Moving, ask: Callable[[Output], Iterator[Record]]
) -> None:
    """Each record that is read was written, and they come in order."""
    records = list(ask(moving))
    assert [record.code for record in records[:2]] == [shim.CLOCK, shim.STARTED]
    numbers = [record.number for record in records[2:]]
    assert numbers == sorted(set(numbers))
    assert {record.code for record in records[2:]} <= {*BOTH}
    assert numbers[-1] >= 6000


def test_a_cut_does_not_mislead_the_search_for_a_record(moving: Moving) -> None:
    """It finds the record of the byte, or an earlier one."""
    for _ in range(10):
        offset = moving.feed.size - 100
        # Each piece is one byte, and two other records come first.
        assert moving.record_at(offset) <= offset + 2


# -- holes


def test_readers_skip_a_hole(tmp_path: Path) -> None:
    """A terabyte of records is missing, and no reader reads through it."""
    begin, end = b"begin\n", b"middle\nend\n"
    size, records = 1 << 40, (1 << 40) // shim.RECORD

    def record(code: int, number: int, at: int = 0) -> bytes:
        return number.to_bytes(8, "little") + (at << 8 | code).to_bytes(8, "little")

    with (tmp_path / "output").open("wb") as file:
        file.write(begin)
        file.seek(size)
        file.write(end)
    with (tmp_path / "output.idx").open("wb") as file:
        file.write(record(shim.CLOCK, 1_700_000_000_000) + record(shim.STARTED, 5))
        file.write(record(OUT, 6, 1))
        file.seek(1 << 40)
        file.write(record(ERR, size + 7, 8) + record(OUT, size + 11, 9))
    cut = f"{len(begin)} {size} {3 * shim.RECORD} {1 << 40}\n"
    (tmp_path / "cut").write_text(cut)
    output = Output(tmp_path)
    size += len(end)
    marker = f"\n[bytes 6 to {1 << 40} were cut: --max-output-size]\n".encode()
    for stream in (None, OUT, ERR):
        read = Reader(output, stream=stream).read(size)
        chunks = [(c.stream, c.data, c.at) for c in read if c.data]
        wanted = [
            (OUT, begin, 1),
            (None, marker, 8),
            (ERR, b"middle\n", 8),
            (OUT, b"end\n", 9),
        ]
        assert chunks == [
            one for one in wanted if stream in {None, one[0]} or one[0] is None
        ]
    assert "".join(stdout_text(output, size)) == f"begin\n{marker.decode()}end\n"
    assert "".join(output.text(0, size)) == f"begin\n{marker.decode()}middle\nend\n"
    assert all(output.record_at(at) <= 3 for at in (0, 5, 6, 1 << 30))
    assert [output.record_at(size - at) - records for at in (11, 5, 4, 1)] == [0, 0, 1, 1]
    assert [record.code for record in output.records()] == [6, 3, 1, 2, 1]
    found = [(number, record.code) for number, record in output.news(0)]
    assert found == [(0, 6), (1, 3), (2, 1), (records + 1, 1)]
    assert list(output.news(records + 2)) == []
    assert output.last_line() == b"end"
    assert output.last_line(2) == b"nd"
    assert output.began() == 1_700_000_000_000
    assert output.index_size() == 5 * shim.RECORD
    assert output.weight() == len(begin) + len(end) + 4 * 5 * shim.RECORD
    # The search also gives up on missing records that no cut file names.
    (tmp_path / "cut").unlink()
    assert output.record_at(size - 1) <= records + 1
    (tmp_path / "cut").write_text(cut)
    # Forged cursors.
    for offset, number in ((0, 1000), (3, records), (7, records + 1), (0, 1 << 62)):
        text = b"".join(c.data for c in Reader(output, offset, number).read(size))
        assert text.endswith(b"end\n")
        assert len(text) < 200


@pytest.mark.parametrize(
    ("pieces", "cut", "line"),
    [
        # The last line of standard output is before the cut, inside it, or after it.
        ([(OUT, b"one\n"), (ERR, b"x" * 90)], (50, 60), b"one"),
        ([(ERR, b"x" * 50), (OUT, b"one\n"), (ERR, b"x" * 90)], (50, 60), b""),
        ([(OUT, b"one\n"), (ERR, b"x" * 50), (OUT, b"two\n")], (10, 20), b"two"),
        # The rest of a partly cut line is returned.
        (
            [(OUT, b"one" * 20), (ERR, b"x"), (OUT, b"two\n")],
            (10, 30),
            b"one" * 10 + b"two",
        ),
    ],
)
def test_the_last_line_is_read_from_the_remaining_bytes(
    tmp_path: Path, pieces: list[tuple[int, bytes]], cut: tuple[int, int], line: bytes
) -> None:
    """An older shim has cut the output, but not its index."""
    data, index = b"", b""
    for code, text in pieces:
        data += text
        index += len(data).to_bytes(8, "little") + code.to_bytes(8, "little")
    start, end = cut
    (tmp_path / "output").write_bytes(data[:start] + bytes(end - start) + data[end:])
    (tmp_path / "output.idx").write_bytes(index)
    (tmp_path / "cut").write_text(f"{start} {end}\n")
    found = Output(tmp_path).last_line()
    assert found.strip(b"\0") == line


# -- real processes

ALTERNATES = """
import fcntl, os, sys
for fd in (1, 2):
    fcntl.fcntl(fd, fcntl.F_SETFL, os.O_WRONLY | os.O_DIRECT)
for _ in range(int(sys.argv[1])):
    os.write(1, b"o")
    os.write(2, b"e")
print("the last line")
"""
"""Prints one byte on each stream in turn, a given number of times.

With O_DIRECT each read of a pipe returns the bytes of one write(2), so that each byte is a
piece of its own, however slowly it is read.
"""


def test_a_task_that_alternates_takes_a_small_multiple_of_the_limit(tmp_path: Path) -> None:
    """It holds however long the task runs.

    The result names the remaining size of the index.
    """
    limit, folder = 100_000, tmp_path / "1"
    folder.mkdir()
    ordered(folder, limit, sys.executable, "-IS", "-c", ALTERNATES, "35000")
    most = 0
    with subprocess.Popen([*SHIM_COMMAND, str(folder)], stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        while running.stdout.read(1 << 16):
            most = max(most, on_disk(folder / "output.idx"))
    exit = read_exit(MACHINE, folder)
    assert exit is not None
    assert (exit.code, exit.output_size) == (0, (folder / "output").stat().st_size)
    assert (folder / "output.idx").stat().st_size > 10 * limit
    assert most <= limit + SLACK
    assert on_disk(folder / "output") <= limit + limit // 16 + SLACK
    assert 0 < exit.index_size <= limit
    output = Output(folder)
    start, _ = output.cut()
    for stream, letter in ((OUT, b"o"), (ERR, b"e")):
        chunks = [c for c in Reader(output, stream=stream).read(exit.output_size) if c.data]
        text = b"".join(c.data for c in chunks if c.stream is not None)
        assert set(text.removesuffix(b"the last line\n")) == set(letter)
        assert [(c.start, c.stream) for c in chunks if c.stream is None] == [(start, None)]
    assert output.last_line().endswith(b"the last line")
