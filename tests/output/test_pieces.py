"""Tests of the pieces of an output between two bytes, with stream and time."""

from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pulsar_api.concurrency.turns import TurnScheduler
from pulsar_api.output.characters import begin_of_character
from pulsar_api.output.files import Output
from pulsar_api.output.pieces import Pieces, Portion, read_pieces
from pulsar_api.shim import shim
from tests.output.test_lines import Turns, done
from tests.output.test_reader import STREAM, encoded

TEXT = st.text("aé€😀\n", min_size=1, max_size=3).map(str.encode)
PRINTED = st.lists(st.tuples(STREAM, TEXT, st.integers(0, 2)), max_size=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that the examples of a property share, one after the other."""
    return tmp_path_factory.mktemp("task")


def printed(
    folder: Path, pieces: list[tuple[int, bytes, int]], cut: tuple[int, int] = (0, 0)
) -> Output:
    """Write the files as the shim does. The last number of a piece is its delay."""
    data, index, at = b"", encoded(shim.CLOCK, 1_700_000_000_000), 0
    for code, text, later in pieces:
        data += text
        at += later
        index += encoded(code, len(data), at)
    start, end = cut
    (folder / "cut").unlink(missing_ok=True)
    if cut != (0, 0):
        (folder / "cut").write_text(f"{start} {end}\n")
    (folder / "output").write_bytes(data[:start] + bytes(end - start) + data[end:])
    (folder / "output.idx").write_bytes(index)
    return Output(folder)


def read(output: Output, start: int, end: int, *bounds: int) -> Pieces:
    """Return the pieces from one byte to another."""
    clock = Turns()
    return done(
        clock, read_pieces(output, TurnScheduler(clock), start, end, Portion(*bounds))
    )


def naive(pieces: list[tuple[int, bytes, int]], start: int, end: int) -> list[Any]:
    """Return stream, time and text of the bytes between two."""
    found = []
    offset = at = 0
    for code, text, later in pieces:
        at += later
        part = text[max(0, start - offset) : max(0, end - offset)]
        found.append((code, at, part))
        offset += len(text)
    return [
        (*key, b"".join(part for _, _, part in group).decode())
        for key, group in groupby((p for p in found if p[2]), key=lambda p: p[:2])
    ]


@given(pieces=PRINTED, first=st.integers(0, 60), second=st.integers(0, 60))
@example(pieces=[(1, "😀".encode(), 0)], first=1, second=2)
@example(pieces=[(1, "a😀".encode(), 0)], first=1, second=2)
def test_each_piece_has_one_stream_and_time(
    folder: Path, pieces: list[tuple[int, bytes, int]], first: int, second: int
) -> None:
    """It consists of whole characters.

    One that the range splits is in it, or comes next.
    """
    output = printed(folder, pieces)
    data = b"".join(text for _, text, _ in pieces)
    start, end = sorted(min(number, len(data)) for number in (first, second))
    found = read(output, start, end)
    assert found.start == begin_of_character(data, start)
    assert found.pieces == naive(pieces, found.start, found.next)
    data[found.start : found.next].decode()
    assert found.next > found.start or found.start == end
    assert found.next <= end or begin_of_character(data, end) == found.start


@given(pieces=PRINTED, size=st.integers(1, 9), most=st.integers(1, 4))
def test_a_reader_that_continues_gets_everything_once(
    folder: Path, pieces: list[tuple[int, bytes, int]], size: int, most: int
) -> None:
    """No answer exceeds its limit."""
    output = printed(folder, pieces)
    data = b"".join(text for _, text, _ in pieces)
    at, text = 0, ""
    while at < len(data):
        found = read(output, at, len(data), size, most)
        assert found.start == at
        assert at < found.next < at + size + 4
        assert 0 < len(found.pieces) <= most
        text += "".join(part for _, _, part in found.pieces)
        at = found.next
    assert text == data.decode()


def test_a_cut_is_a_piece_with_its_marker(tmp_path: Path) -> None:
    """The next request continues after the cut, even if the first one began inside it."""
    lines = [(shim.STDOUT, b"line\n", 1)] * 100
    output = printed(tmp_path, lines, (7, 402))
    marker = (None, 2, "\n[bytes 7 to 402 were cut: --max-output-size]\n")
    start = [(shim.STDOUT, 1, "line\n"), (shim.STDOUT, 2, "li")]
    found = read(output, 0, 300)
    assert (found.next, found.pieces) == (402, [*start, marker])
    found = read(output, 0, 406)
    assert found.pieces == [*start, marker, (1, 81, "ne\n"), (1, 82, "l")]
    found = read(output, 100, 300)
    (piece,) = found.pieces
    assert (found.start, found.next, piece[0]) == (100, 402, None)
    assert piece[2] == "\n[bytes 100 to 402 were cut: --max-output-size]\n"


def test_bytes_without_a_record_have_no_stream(tmp_path: Path) -> None:
    """The shim was killed between the bytes and their record."""
    output = printed(tmp_path, [(shim.STDERR, b"one", 5)])
    with (tmp_path / "output").open("ab") as file:
        file.write(b"two")
    found = read(output, 0, 6)
    assert found.pieces == [(shim.STDERR, 5, "one"), (None, 0, "two")]
    assert found.next == 6


def test_a_flood_of_small_pieces_leaves_turns_to_others(tmp_path: Path) -> None:
    """An answer has some thousands of them at most."""
    small = [(shim.STDOUT, b"x", 1), (shim.STDERR, b"y", 0)]
    output = printed(tmp_path, small * 3000)
    clock = Turns()
    before = len(clock.getDelayedCalls())
    found = done(clock, read_pieces(output, TurnScheduler(clock), 0, 6000))
    assert before == 0
    assert clock.seconds() >= 10
    assert (len(found.pieces), found.next) == (4096, 4096)
