"""Tests of the line index, for any bytes that grow in any steps, with or without a cut."""

import gc
import re
import tracemalloc
from collections.abc import Awaitable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock

from pulsar_api.concurrency.turns import TurnScheduler
from pulsar_api.output import lines
from pulsar_api.output.characters import begin_of_character
from pulsar_api.output.files import Output
from pulsar_api.output.lines import LEAST, MOST, LineIndex, LineIndexes, Segment
from pulsar_api.output.search import Effort, search

T = TypeVar("T")
Run = tuple[bytes, int]
Rows = list[Segment]

# Runs of one text. They are long enough that segments end in every possible way.
RUN = st.tuples(
    st.sampled_from(
        [
            *(b"a", b"\n", b"ab\n", b"\r", b"a\r", b"\r\n"),
            *("é".encode(), "😀".encode(), b"\x80", b"\xf0"),
        ]
    ),
    st.sampled_from([1, 2, 3, 1000, LEAST - 1, LEAST, LEAST + 1, MOST, MOST + 1]),
)
RUNS = st.lists(RUN, max_size=8)
FEW = settings(max_examples=40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that the examples of a property share, one after the other."""
    return tmp_path_factory.mktemp("task")


def joined(runs: list[Run]) -> bytes:
    """Join the texts, each repeated up to a number of bytes."""
    return b"".join((text * length)[:length] for text, length in runs)


def written(folder: Path, data: bytes, cut: tuple[int, int] = (0, 0)) -> Output:
    """Write an output. A part may be cut out, as the shim does it."""
    start, end = cut
    (folder / "cut").unlink(missing_ok=True)
    if cut != (0, 0):
        (folder / "cut").write_text(f"{start} {end}\n")
    (folder / "output").write_bytes(data[:start] + bytes(end - start) + data[end:])
    return Output(folder)


class Turns(Clock):
    """A clock on which each `turn` is one turn of the reactor."""

    def callLater(self, delay: float, *call: Any, **more: Any) -> Any:
        """Schedule a call of the next turn one second later."""
        return super().callLater(delay + 1, *call, **more)

    def turn(self) -> None:
        """Let one turn pass."""
        self.advance(1)


def done(clock: Turns, wanted: Awaitable[T]) -> T:
    """Return the result of a coroutine, which may take many turns."""
    found: list[Any] = []

    async def run() -> None:
        found.append(await wanted)

    running = Deferred.fromCoroutine(run())
    for _ in range(1000):
        if running.called:
            break
        clock.turn()
    running.addErrback(found.append)
    assert len(found) == 1
    result: T = found[0]
    return result


def rows(index: LineIndex, start: int = 0) -> Rows:
    """Return the segments from a byte on."""
    return index.segments(start)


def naive_end(data: bytes, start: int, stop: int) -> int | None:
    """Return the end of a segment by its definition, byte by byte."""
    for at in range(start + LEAST, min(start + MOST, stop)):
        if data[at : at + 1] == b"\n":
            return at + 1
    if stop <= start + MOST:
        return None
    for at in range(start + MOST - 1, start + LEAST - 1, -1):
        if is_return(data[:stop], at):
            return at + 1
    # `test_output` tests where a character begins.
    return begin_of_character(data, start + MOST)


def is_return(data: bytes, at: int) -> bool:
    """Return whether this byte is a carriage return that no newline follows."""
    return data[at : at + 1] == b"\r" and data[at + 1 : at + 2] not in {b"", b"\n"}


def naive(data: bytes, cut: tuple[int, int] = (0, 0)) -> Rows:
    """Return the segments of an output, by the definition."""
    found: Rows = []
    line, start, begins = 1, 0, True
    while start < len(data):
        found.append((start, line, begins))
        if cut != (0, 0) and start == cut[0]:
            line, start, begins = line + 2, cut[1], True
            continue
        stop = cut[0] if start < cut[0] else len(data)
        end = naive_end(data[:stop], start, stop) or stop
        line += data[start:end].count(b"\n")
        begins = data[end - 1 : end] == b"\n" or is_return(data[:stop], end - 1)
        start = end
    return found


@FEW
@given(runs=RUNS, ends=st.lists(st.integers(0, 9 * MOST), max_size=5))
@example(runs=[(b"a", MOST - 1), ("é".encode(), 2), (b"\n", 1)], ends=[MOST, MOST + 1])
@example(runs=[(b"a", LEAST - 1), (b"\n", 2)], ends=[LEAST, LEAST + 1])
@example(runs=[(b"a", LEAST), (b"\n", 2)], ends=[LEAST, LEAST + 1])
@example(runs=[(b"a", MOST - 1), (b"\n", 1), (b"b", 3)], ends=[MOST])
@example(runs=[(b"a", MOST)], ends=[])
@example(runs=[(b"a", MOST - 1), (b"\r\n", 2)], ends=[MOST, MOST + 1])
@example(runs=[(b"a", LEAST), (b"\r\n", LEAST), (b"a", 1)], ends=[MOST])
@example(runs=[(b"a", LEAST), (b"\r", 1), (b"a", LEAST + 1)], ends=[MOST])
@example(runs=[(b"a", LEAST - 1), (b"\r", 1), (b"a", LEAST + 1)], ends=[MOST])
@example(runs=[(b"a", MOST - 2), (b"\r", 1), (b"\r\n", 2)], ends=[MOST, MOST + 1])
def test_segments_do_not_depend_on_how_the_output_grew(
    folder: Path, runs: list[Run], ends: list[int]
) -> None:
    """They match the definition, and a closed segment never changes."""
    data = joined(runs)
    clock = Turns()
    index = LineIndex(written(folder, data), TurnScheduler(clock))
    before: Rows = []
    for end in [*sorted(min(end, len(data)) for end in ends), len(data)]:
        output = written(folder, data[:end])
        done(clock, index.reach(output.size()))
        assert rows(index) == naive(data[:end])
        assert index.size == end
        assert index.lines == data[:end].count(b"\n")
        assert rows(index)[: len(before)][:-1] == before[:-1]
        before = rows(index)


@FEW
@given(
    runs=RUNS,
    numbers=st.tuples(*[st.integers(0, 9 * MOST)] * 3),
    at=st.integers(0, 9 * MOST),
)
@example(runs=[(b"a\nbc\nd", 6 * LEAST)], numbers=(LEAST, MOST + 5, 3 * MOST), at=MOST)
@example(runs=[(b"a", LEAST), (b"\n", 9)], numbers=(LEAST + 1, LEAST + 2, LEAST + 3), at=0)
@example(runs=[(b"a", 10)], numbers=(0, 3, 5), at=4)
@example(runs=[(b"a", 10)], numbers=(2, 3, 10), at=4)
@example(runs=[(b"a", 2 * MOST)], numbers=(MOST, MOST + 1, MOST + 2), at=4)
def test_a_cut_is_one_segment_and_its_marker_line(
    folder: Path, runs: list[Run], numbers: tuple[int, int, int], at: int
) -> None:
    """It holds for an early and a late cut and for a growing one.

    Segments before it stay.
    """
    data = joined(runs)
    start, *ends = sorted(number % (len(data) + 1) for number in numbers)
    clock = Turns()
    index = LineIndex(written(folder, data), TurnScheduler(clock))
    done(clock, index.reach(len(data)))
    for end in ends:
        cut = (start, end) if end > start else (0, 0)
        if cut == (0, 0):
            continue
        written(folder, data, cut)
        done(clock, index.reach(len(data)))
        assert index.cut == cut
        assert rows(index) == naive(data, cut)
        left = data[:start] + b"\n\n" + data[end:]
        assert index.lines == left.count(b"\n")
        assert index.size == len(data)
        at %= len(data)
        line = 1 + data[: min(at, start)].count(b"\n")
        if at >= end:
            line += 2 + data[end:at].count(b"\n")
        assert index.line_at(at) == line
    # As if the shim had failed to make the hole.
    written(folder, data)
    done(clock, index.reach(len(data)))
    assert rows(index) == naive(data)


def test_a_progress_bar_is_split_where_it_overwrites_itself(tmp_path: Path) -> None:
    """Each segment begins with a complete state of the bar. All of it is one line."""
    data = b"".join(b"\rprogress %d" % number for number in range(100_000)) + b"\ndone"
    index = LineIndex(written(tmp_path, data), TurnScheduler(clock := Turns()))
    done(clock, index.reach(len(data)))
    found = rows(index)
    assert len(found) > 10
    for offset, line, begins in found[1:]:
        assert data[offset - 1 : offset + 9] == b"\rprogress "
        assert (line, begins) == (1, True)


# -- styles

STYLED = st.lists(
    st.tuples(
        st.sampled_from(
            [
                *(b"\x1b[31m", b"\x1b[1;4m", b"\x1b[m", b"\x1b[0m", b"\x1b[0;34;49m"),
                *(b"\x1b[;7m", b"\x1b[00m", b"\x1b[38:5:1m", b"\x1b[2K", b"\x1b[", b"\x1b"),
                *(b"\x1b[%sm" % (b"4;" * 60), b"\x1b[%sm" % (b"1" * 201), b"1m", b"x"),
            ]
        ),
        st.sampled_from([1, 1, 2, 4, 19, 21, 1000]),
        st.sampled_from([b"a", b"\n", b"a\n"]),
        st.sampled_from([0, 1, LEAST - 2, LEAST, MOST - 4, MOST - 3, MOST - 1, MOST]),
    ),
    max_size=6,
)


def naive_style(parts: list[bytes]) -> str:
    """Return the style after some bytes, by its definition."""
    found: list[bytes] = []
    for part in parts:
        for sequence in re.findall(rb"\x1b\[([0-9;:]*)m", part):
            if len(sequence) > 200:
                continue
            first, *rest = sequence.split(b";")
            if first in {b"", b"0", b"00"}:
                found = []
                sequence = b";".join(rest)  # noqa: PLW2901
            if sequence:
                found.append(sequence)
    text = b";".join(found[-20:]).decode()
    return text if len(text) <= 200 else ""


@FEW
@given(
    styled=STYLED,
    end=st.integers(0, 7 * MOST),
    hole=st.tuples(st.integers(0, 7 * MOST), st.integers(0, 7 * MOST)),
)
@example(styled=[(b"\x1b[31m", 1, b"a", MOST)] * 3, end=MOST, hole=(MOST + 6, 2 * MOST))
@example(
    styled=[(b"x", 1, b"a", MOST - 3), (b"\x1b[31m", 1, b"a", MOST)], end=0, hole=(0, 0)
)
@example(styled=[(b"\x1b[31m", 1, b"a", MOST)] * 3, end=0, hole=(2, 2 * MOST))
@example(styled=[(b"\x1b[1;4m", 21, b"a", MOST)] * 2, end=0, hole=(MOST + 30, MOST + 80))
def test_the_style_at_the_start_of_a_segment_is_known(
    folder: Path,
    styled: list[tuple[bytes, int, bytes, int]],
    end: int,
    hole: tuple[int, int],
) -> None:
    """It does not depend on how the output grew, and a cut does not change it."""
    data = b"".join(a * n + (b * m)[:m] for a, n, b, m in styled)
    end %= len(data) + 1
    low, high = sorted(number % (len(data) + 1) for number in hole)
    clock = Turns()
    index = LineIndex(written(folder, data[:end]), TurnScheduler(clock))
    done(clock, index.reach(end))
    written(folder, data)
    done(clock, index.reach(len(data)))
    for offset, _, _ in rows(index):
        assert index.style_at(offset) == naive_style([data[:offset]])
    if low < high:
        written(folder, data, (low, high))
        done(clock, index.reach(len(data)))
        for offset, _, _ in rows(index):
            parts = [data[: min(low, offset)], data[high : max(high, offset)]]
            assert index.style_at(offset) == naive_style(parts)


def test_many_colours_cost_an_index_little(tmp_path: Path) -> None:
    """A segment keeps no more than an answer can show, and the start of a sequence."""
    colours = [b"\x1b[%s%03dm" % (b"1;" * 98, number) for number in range(20)]
    whole = b"".join([*colours, b"\n"]).rjust(LEAST + 1, b"x")
    torn = b"".join([*colours, b"\x1b[", b"1;" * 99]).rjust(MOST, b"x")
    for line in (whole, torn):
        index = LineIndex(written(tmp_path, line * 100), TurnScheduler(clock := Turns()))
        tracemalloc.start()
        try:
            done(clock, index.reach(100 * len(line)))
            gc.collect()
            size = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
        assert len(index) >= 100
        assert size / len(index) < 800


# -- concurrent callers


def test_a_part_cut_while_it_is_read_is_not_read_as_zeros(tmp_path: Path) -> None:
    """The index describes the output as it is in the end."""
    data = b"a line\n" * (4 * lines.STEP // 7)
    clock = Turns()
    index = LineIndex(written(tmp_path, data), TurnScheduler(clock))
    reaching = Deferred.fromCoroutine(index.reach(len(data)))
    clock.turn()
    cut = (lines.STEP // 2, 3 * lines.STEP)
    written(tmp_path, data, cut)
    while not reaching.called:
        clock.turn()
    assert rows(index) == naive(data, cut)


class Shrinking(Output):
    """An output that is cut while it is read for the first time."""

    def pieces(self, start: int, end: int) -> Iterator[bytes]:
        """Yield the pieces of the output, with zeros for the part being cut."""
        if self.cut() == (0, 0):
            written(self.folder, (self.folder / "output").read_bytes(), (1000, 2 * LEAST))
        return super().pieces(start, end)


def test_bytes_read_during_a_cut_are_discarded(tmp_path: Path) -> None:
    """They can be zeros."""
    data = b"a line\n" * LEAST
    written(tmp_path, data)
    index = LineIndex(Shrinking(tmp_path), TurnScheduler(clock := Turns()))
    done(clock, index.reach(len(data)))
    assert rows(index) == naive(data, (1000, 2 * LEAST))


def test_segments_are_found_by_a_byte_in_them(tmp_path: Path) -> None:
    """The first is the one with that byte. Beyond the end it is the last one."""
    data = b"x" * 1023 + b"\n"
    data *= 300
    index = LineIndex(written(tmp_path, data), TurnScheduler(clock := Turns()))
    assert rows(index) == []
    done(clock, index.reach(len(data)))
    found = rows(index)
    assert len(found) == 5
    for number, (offset, _, _) in enumerate(found):
        assert rows(index, offset) == found[number:]
        if number:
            assert rows(index, offset - 1) == found[number - 1 :]
    assert rows(index, 10**15) == found[-1:]


def test_an_index_does_not_wait_for_a_missing_end(tmp_path: Path) -> None:
    """After a power cut an output can be shorter than its size on record."""
    index = LineIndex(written(tmp_path, b"one\ntwo"), TurnScheduler(clock := Turns()))
    done(clock, index.reach(1000))
    assert (index.size, index.lines) == (7, 1)


def test_concurrent_callers_share_one_scan(tmp_path: Path) -> None:
    """Each turn makes one step for all of them. A caller that leaves stops no other."""
    data = b"a line\n" * (8 * lines.STEP // 7)
    index = LineIndex(written(tmp_path, data), TurnScheduler(clock := Turns()))
    first, second, third = (
        Deferred.fromCoroutine(index.reach(len(data))) for _ in range(3)
    )
    sizes = []
    for _ in range(3):
        sizes.append(index.size)
        clock.turn()
    steps = [after - before for before, after in pairwise(sizes)]
    assert all(lines.STEP - MOST <= step <= lines.STEP for step in steps)
    second.cancel()
    first.cancel()
    for gone in (first, second):
        gone.addErrback(lambda failure: failure.trap(CancelledError) and None)
    turns = 0
    while not third.called:
        clock.turn()
        turns += 1
    assert turns < 8
    assert rows(index) == naive(data)


def waiting(index: LineIndex, size: int, number: int) -> list[Deferred[None]]:
    """Start a number of callers that wait for a size."""
    return [Deferred.fromCoroutine(index.reach(size)) for _ in range(number)]


def test_hundreds_of_callers_can_wait_for_a_cold_index(tmp_path: Path) -> None:
    """They are woken over several turns, with turns of other work in between."""
    data = b"a line\n" * 1000
    index = LineIndex(written(tmp_path, data), TurnScheduler(clock := Turns()))
    all_of_them = waiting(index, len(data), 500)
    woken = []
    for _ in range(10):
        clock.turn()
        woken.append(sum(one.called for one in all_of_them))
    assert woken[-1] == 500
    assert max(after - before for before, after in pairwise(woken)) <= 100
    assert rows(index) == naive(data)
    assert not index.busy


def test_any_of_hundreds_of_waiters_can_leave(tmp_path: Path) -> None:
    """The first can leave, before or while they are woken. The scan ends with the last."""
    data = b"a line\n" * (3 * lines.STEP // 7)
    index = LineIndex(written(tmp_path, data), TurnScheduler(clock := Turns()))
    gone = waiting(index, len(data), 250)
    stay = waiting(index, len(data), 250)
    clock.turn()
    for one in gone[:100]:
        one.cancel()
    while index.size != len(data):
        clock.turn()
    clock.turn()
    for one in gone:
        one.cancel()
        one.addErrback(lambda failure: failure.trap(CancelledError) and None)
    for _ in range(10):
        clock.turn()
    assert all(one.called for one in stay)
    assert rows(index) == naive(data)
    other = LineIndex(index.output, index.turns)
    (only,) = waiting(other, len(data), 1)
    clock.turn()
    only.addErrback(lambda failure: failure.trap(CancelledError) and None).cancel()
    clock.turn()
    assert not other.busy
    assert not clock.getDelayedCalls()
    done(clock, other.reach(len(data)))
    assert rows(other) == naive(data)


def test_an_unreadable_output_is_an_error_for_all_waiters(tmp_path: Path) -> None:
    """A later call tries again."""
    data = b"a line\n" * 1000
    index = LineIndex(written(tmp_path, data), TurnScheduler(clock := Turns()))
    all_of_them = waiting(index, len(data), 300)
    (tmp_path / "output").unlink()
    errors: list[Any] = []
    for one in all_of_them:
        one.addErrback(errors.append)
    for _ in range(10):
        clock.turn()
    assert [error.type for error in errors] == [FileNotFoundError] * 300
    written(tmp_path, data)
    done(clock, index.reach(len(data)))
    assert rows(index) == naive(data)
    (tmp_path / "output").unlink()
    gone: Any = done(clock, index.reach(len(data)))
    assert gone.type is FileNotFoundError


def test_a_caller_that_needs_more_than_the_present_scan_gets_it(tmp_path: Path) -> None:
    """Others need less."""
    data = b"a line\n" * (3 * lines.STEP // 7)
    index = LineIndex(written(tmp_path, data), TurnScheduler(clock := Turns()))
    (first,) = waiting(index, 100, 1)
    (second,) = waiting(index, len(data), 1)
    (third,) = waiting(index, 10, 1)
    sizes: dict[Deferred[None], int] = {}
    for _ in range(10):
        clock.turn()
        for one in (first, second, third):
            if one.called:
                sizes.setdefault(one, index.size)
    assert [sizes[one] for one in (first, second, third)] == [100, len(data), 100]


def test_a_waiter_woken_during_a_new_scan_waits_again(tmp_path: Path) -> None:
    """The output was cut again, so the index is out of date."""
    data = b"a line\n" * (2 * lines.STEP // 7)
    index = LineIndex(written(tmp_path, data), TurnScheduler(clock := Turns()))
    sizes: list[int] = []
    for one in waiting(index, len(data), 250):
        one.addCallback(lambda _: sizes.append(index.size))
    while not sizes:
        clock.turn()
    assert len(sizes) < 250
    written(tmp_path, data, (LEAST, lines.STEP))
    done(clock, index.reach(len(data)))
    clock.turn()
    assert sizes == [len(data)] * 250


def test_a_caller_that_leaves_gives_up_its_turn(tmp_path: Path) -> None:
    """The next caller gets it."""
    index = LineIndex(written(tmp_path, b"a line\n"), TurnScheduler(clock := Turns()))
    done(clock, index.reach(7))
    first, second = (Deferred.fromCoroutine(search(index, "a", 0)) for _ in range(2))
    first.addErrback(lambda failure: failure.trap(CancelledError) and None).cancel()
    clock.turn()
    assert second.called


def test_each_turn_makes_one_step_of_one_scan(tmp_path: Path) -> None:
    """Scans for lines and searches for a text take turns."""
    data = b"a line\n" * (4 * lines.STEP // 7)
    turns = TurnScheduler(clock := Turns())
    indexes = [LineIndex(written(tmp_path, data), turns) for _ in range(5)]
    all_of_them = [waiting(index, len(data), 1)[0] for index in indexes]
    before = [0] * 5
    for turn in range(20):
        clock.turn()
        after = [index.size for index in indexes]
        assert [n for n in range(5) if after[n] != before[n]] == [turn % 5]
        before = after
    while not all(one.called for one in all_of_them):
        clock.turn()
    begun = clock.seconds()
    for index in indexes:
        Deferred.fromCoroutine(search(index, "none", 0))
    while clock.getDelayedCalls():
        clock.turn()
    assert clock.seconds() - begun >= 5 * 4


def test_a_limited_number_of_indexes_is_cached(tmp_path: Path) -> None:
    """Those used last are kept, and all that are in use."""
    indexes = LineIndexes(tmp_path, TurnScheduler(Turns()))
    first = [indexes.of(number) for number in range(lines.KEPT)]
    assert indexes.of(0) is first[0]
    (tmp_path / "1").mkdir()
    written(tmp_path / "1", b"x")
    looking = Deferred.fromCoroutine(first[1].reach(1))
    indexes.of(lines.KEPT)
    assert indexes.of(0) is first[0]
    assert indexes.of(1) is first[1]
    assert indexes.of(2) is not first[2]
    looking.addErrback(lambda failure: failure.trap(CancelledError) and None).cancel()


def test_an_index_with_colours_is_dropped_sooner(tmp_path: Path) -> None:
    """It needs more memory."""
    indexes = LineIndexes(tmp_path, TurnScheduler(clock := Turns()), most=200)
    for number, begin in enumerate((b"", b"\x1b[31m")):
        (tmp_path / str(number)).mkdir()
        data = begin + (b"x" * LEAST + b"\n") * 99
        written(tmp_path / str(number), data)
        index = indexes.of(number)
        done(clock, index.reach(len(data)))
        assert len(index) == 100
        # A single index may exceed the limit. With a second one it is dropped.
        assert indexes.of(number) is index
        indexes.of(7)
        assert (indexes.of(number) is index) is (number == 0)


# -- search


def naive_search(data: bytes, needle: bytes, start: int, cut: tuple[int, int]) -> Any:
    """Return line and offset of the first match in each line, from a byte on."""
    found: dict[int, tuple[int, int]] = {}
    wanted = needle.lower()
    parts = [(0, data)]
    if cut != (0, 0):
        parts = [(0, data[: cut[0]]), (cut[1], data[cut[1] :])]
    for number, (offset, part) in enumerate(parts):
        for at in range(len(part)):
            if offset + at >= start and part[at : at + len(wanted)].lower() == wanted:
                line = 1 + part[:at].count(b"\n")
                if number:
                    line += 2 + parts[0][1].count(b"\n")
                found.setdefault(line, (line, offset + at))
    return sorted(found.values())


SHORT = st.lists(st.sampled_from([b"a", b"B", b"ab", b"\n", "é".encode()]), max_size=40)


@given(
    data=SHORT.map(b"".join),
    text=st.sampled_from(["a", "ab", "B", "aba", "é", "bb", "É"]),
    start=st.integers(0, 60),
    cut=st.tuples(st.integers(0, 60), st.integers(0, 60)),
    step=st.integers(1, 7),
)
@example(data=b"a\nxx\na\na", text="a", start=0, cut=(2, 4), step=7)
def test_a_search_finds_each_line_with_the_text(
    folder: Path,
    data: bytes,
    text: str,
    start: int,
    cut: tuple[int, int],
    step: int,
) -> None:
    """Steps have any size, so that matches cross their borders."""
    low, high = sorted(number % (len(data) + 1) for number in cut)
    hole = (low, high) if low < high else (0, 0)
    index = LineIndex(written(folder, data, hole), TurnScheduler(clock := Turns()))
    done(clock, index.reach(len(data)))
    found = done(clock, search(index, text, start, Effort(step=step)))
    assert found.matches == naive_search(data, text.encode(), start, hole)
    assert found.next is None
    looked = range(min(start, len(data)), len(data))
    assert found.searched == len([at for at in looked if not hole[0] <= at < hole[1]])


@given(
    data=SHORT.map(b"".join),
    most=st.integers(1, 3),
    far=st.integers(1, 9),
    step=st.integers(1, 9),
)
def test_a_search_continues_where_it_stopped(
    folder: Path, data: bytes, most: int, far: int, step: int
) -> None:
    """All parts together find the same lines, whichever limit stops them."""
    index = LineIndex(written(folder, data), TurnScheduler(clock := Turns()))
    done(clock, index.reach(len(data)))
    lines_found: set[int] = set()
    at: int | None = 0
    while at is not None:
        found = done(clock, search(index, "ab", at, Effort(most, far, step)))
        assert len(found.matches) <= most
        assert found.searched < far + step
        assert found.next is None or found.next > at
        lines_found |= {line for line, _ in found.matches}
        at = found.next
    assert sorted(lines_found) == [n for n, _ in naive_search(data, b"ab", 0, (0, 0))]


def test_a_search_stops_at_a_further_cut(tmp_path: Path) -> None:
    """The line numbers after it have changed. The caller can ask again."""
    data = b"a line\n" * (3 * lines.STEP // 7)
    index = LineIndex(written(tmp_path, data), TurnScheduler(clock := Turns()))
    done(clock, index.reach(len(data)))
    searching = Deferred.fromCoroutine(search(index, "none", 0))
    clock.turn()
    written(tmp_path, data, (2 * lines.STEP, 2 * lines.STEP + 100))
    clock.turn()
    found: Any = searching.result
    assert (found.matches, found.next, found.searched) == ([], lines.STEP, lines.STEP)
