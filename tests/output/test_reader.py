"""Tests of reading a task's output files, most of them for any bytes."""

import codecs
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pulsar_api.output.files import PIECE, Output
from pulsar_api.output.reader import Chunk, Reader
from pulsar_api.output.records import BLOCK, Record
from pulsar_api.output.timestamps import Timed
from pulsar_api.shim import shim

Piece = tuple[int, bytes]
"""A piece of output: its stream and its bytes."""

# Bytes of every kind that matters to UTF-8, so that near misses are frequent.
ODD = st.lists(
    st.sampled_from(
        [
            *(b"a", b"\n", "é".encode(), "€".encode(), "😀".encode()),
            *(b"\x80", b"\xbf", b"\xc0", b"\xc2", b"\xdf", b"\xe0", b"\xe2", b"\xed"),
            *(b"\xa0", b"\x9f", b"\x90", b"\xf0", b"\xf4", b"\xf5", b"\xff"),
        ]
    ),
    max_size=12,
).map(b"".join)
ANY = st.one_of(st.binary(max_size=40), ODD, st.text(max_size=20).map(str.encode))

STREAM = st.sampled_from([shim.STDOUT, shim.STDERR])
LINES = st.lists(st.sampled_from([b"\n", b"a", b"bc", b"\r"]), max_size=8).map(b"".join)
PIECES = st.lists(st.tuples(STREAM, LINES.filter(bool)), max_size=12)
OTHER = (shim.CLOCK, shim.STARTED, shim.TERM_SENT, shim.KILL_SENT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that the examples of a property share, one after the other."""
    return tmp_path_factory.mktemp("task")


def encoded(code: int, number: int, at: int = 0) -> bytes:
    """Return a record as the shim writes it."""
    return number.to_bytes(8, "little") + (at << 8 | code).to_bytes(8, "little")


def printed(folder: Path, pieces: Sequence[Piece]) -> Output:
    """Write the files as the shim does, with a few records of other kinds."""
    output, index = bytearray(), bytearray(encoded(shim.CLOCK, 1_700_000_000_000))
    for number, (code, data) in enumerate(pieces):
        output += data
        index += encoded(code, len(output), number)
        if number % 3 == 0:
            # Its number is no offset, but can look like one.
            index += encoded(OTHER[number % 4], len(output) // 2, number)
    (folder / "output").write_bytes(output)
    (folder / "output.idx").write_bytes(index)
    return Output(folder)


def replaced(data: bytes) -> str:
    """Return bytes as the text that readers shall see."""
    return data.decode("utf-8", "replace")


# -- character_start


@given(data=ANY, at=st.integers(0, 45))
@example(data=b"\x80\x80\x80\x80\x80", at=4)
def test_an_answer_never_begins_inside_a_character(
    folder: Path, data: bytes, at: int
) -> None:
    """For any bytes and offset, decoding from there gives the end of the whole text."""
    output = printed(folder, [(shim.STDOUT, data)])
    start = output.character_start(at)
    assert at - 3 <= start <= at
    assert start >= 0
    assert replaced(data[:start]) + replaced(data[start:]) == replaced(data)


@given(text=st.text(max_size=20), at=st.integers(0, 80))
def test_an_answer_begins_with_the_character_at_its_offset(
    folder: Path, text: str, at: int
) -> None:
    """The offset can be in the middle of the character."""
    data = text.encode()
    output = printed(folder, [(shim.STDOUT, data)])
    begins = [len(text[:number].encode()) for number in range(len(text) + 1)]
    wanted = max(b for b in begins if b <= at) if at < len(data) else at
    assert output.character_start(at) == wanted


# -- text


@given(data=ANY, ends=st.tuples(st.integers(0, 45), st.integers(0, 45)))
def test_text_equals_the_bytes_decoded_as_a_whole(
    folder: Path, data: bytes, ends: tuple[int, int]
) -> None:
    """Each part can be read. Invalid UTF-8 becomes U+FFFD, and an empty part is empty."""
    output = printed(folder, [(shim.STDOUT, data)])
    assert "".join(output.text(*ends)) == replaced(data[slice(*ends)])
    assert "".join(output.text(0, output.size())) == replaced(data)


@pytest.mark.parametrize("before", range(PIECE - 4, PIECE + 1))
@pytest.mark.parametrize("character", ["é", "€", "😀", "\N{COMBINING ACUTE ACCENT}"])
def test_a_character_between_two_reads_is_whole(
    tmp_path: Path, before: int, character: str
) -> None:
    """A read ends after 64 KiB."""
    text = "x" * before + character + "y" * PIECE
    output = printed(tmp_path, [(shim.STDOUT, text.encode())])
    assert "".join(output.text(0, output.size())) == text


def test_pieces_are_bounded_and_give_all_bytes(tmp_path: Path) -> None:
    """No piece is larger than 64 KiB."""
    data = bytes(range(256)) * 1024
    output = printed(tmp_path, [(shim.STDOUT, data)])
    pieces = list(output.pieces(3, len(data) + 10))
    assert b"".join(pieces) == data[3:]
    assert max(map(len, pieces)) <= PIECE


# -- the index


@given(pieces=PIECES, first=st.integers(0, 20), cut=st.integers(0, 15))
def test_records_are_read_as_they_were_written(
    folder: Path, pieces: list[Piece], first: int, cut: int
) -> None:
    """Reading starts at any number. An incomplete record is ignored."""
    output = printed(folder, pieces)
    index = output.folder / "output.idx"
    data = index.read_bytes()
    index.write_bytes(data + encoded(shim.STDOUT, 1)[:cut])
    wanted = [
        Record.parse(data[at : at + shim.RECORD]) for at in range(0, len(data), shim.RECORD)
    ]
    assert list(output.records()) == wanted
    assert list(output.records(first)) == wanted[first:]


@given(
    code=st.integers(0, 6),
    number=st.integers(0, 2**64 - 1),
    at=st.integers(0, 2**56 - 1),
)
def test_a_record_keeps_the_values_of_the_shim(code: int, number: int, at: int) -> None:
    """Any size of output and any time fit."""
    assert Record.parse(encoded(code, number, at)) == Record(code, number, at)


def test_missing_files_are_empty(tmp_path: Path) -> None:
    """A task that has not printed yet has no files."""
    output = Output(tmp_path / "gone")
    assert output.size() == 0
    assert list(output.records()) == []
    assert list(output.pieces(0, 0)) == []
    assert "".join(output.text(0, 0)) == ""
    assert output.last_line() == b""
    assert output.character_start(0) == 0
    assert output.character_start(7) == 7


# -- last_line


def last(data: bytes) -> bytes:
    """Return the last line of a stream, in the simplest way."""
    return data.removesuffix(b"\n").split(b"\n")[-1]


@given(pieces=PIECES)
def test_the_last_line_is_that_of_standard_output_alone(
    folder: Path, pieces: list[Piece]
) -> None:
    """The streams can be mixed in any way, even within a line."""
    output = printed(folder, pieces)
    stdout = b"".join(data for code, data in pieces if code == shim.STDOUT)
    assert output.last_line() == last(stdout)


@given(pieces=PIECES, limit=st.integers(1, 6))
def test_the_end_of_a_long_last_line_is_returned(
    folder: Path, pieces: list[Piece], limit: int
) -> None:
    """A line up to the limit is returned whole, a longer one by its last bytes."""
    output = printed(folder, pieces)
    stdout = b"".join(data for code, data in pieces if code == shim.STDOUT)
    found, wanted = output.last_line(limit), last(stdout)
    assert wanted.endswith(found)
    assert len(found) >= min(limit, len(wanted))


def test_the_last_line_can_be_far_from_the_end_of_the_index(tmp_path: Path) -> None:
    """Thousands of pieces on standard error after it neither hide it nor belong to it."""
    pieces = [(shim.STDOUT, b"one\ntwo\n"), *[(shim.STDERR, b"x\n")] * 10_000]
    assert printed(tmp_path, pieces).last_line() == b"two"
    # It begins before the last 4096 records, which are read at once.
    codes = [shim.STDERR] * 5000 + [shim.STDOUT] + [shim.STDERR] * 4095
    records = [encoded(code, number) for number, code in enumerate(codes, 1)]
    (tmp_path / "output").write_bytes(b"x" * 5000 + b"3" + b"x" * 4095)
    (tmp_path / "output.idx").write_bytes(b"".join(records))
    assert Output(tmp_path).last_line() == b"3"


def test_the_last_line_can_consist_of_single_bytes(tmp_path: Path) -> None:
    """A thousand pieces make one line."""
    pieces = [(shim.STDOUT, b"one\n")]
    for number in range(1000):
        pieces += [(shim.STDOUT, b"%d" % (number % 10)), (shim.STDERR, b"\n")]
    assert printed(tmp_path, pieces).last_line() == b"0123456789" * 100


# -- how the shim treats characters


@given(data=ANY, at=st.integers(0, 45))
def test_bytes_that_the_shim_holds_back_complete_characters(data: bytes, at: int) -> None:
    """No piece ends inside a character, and few bytes are held back."""
    arrived = data[:at]
    held = shim.incomplete(arrived)
    assert 0 <= held <= 3
    cut = len(arrived) - held
    assert replaced(data[:cut]) + replaced(data[cut:]) == replaced(data)


@given(data=ANY)
def test_the_shim_holds_back_all_that_a_decoder_would_wait_for(data: bytes) -> None:
    """No piece ends with bytes that Python's decoder would keep for later."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(data)
    kept, _ = decoder.getstate()
    assert shim.incomplete(data) >= len(kept)


@given(text=st.text(max_size=20))
def test_the_shim_holds_back_nothing_of_a_complete_text(text: str) -> None:
    """A command that prints whole characters is never delayed."""
    assert shim.incomplete(text.encode()) == 0


@given(text=st.text(min_size=1, max_size=10), at=st.integers(0, 40))
def test_the_shim_holds_back_exactly_the_start_of_a_character(text: str, at: int) -> None:
    """All other bytes are visible at once."""
    data = text.encode()[:at]
    whole = data.decode("utf-8", "ignore").encode()
    assert shim.incomplete(data) == len(data) - len(whole)


@given(
    texts=st.tuples(st.text(max_size=12), st.text(max_size=12)),
    turns=st.lists(st.tuples(STREAM, st.integers(1, 5)), max_size=30),
)
def test_two_streams_never_cut_into_each_others_characters(
    folder: Path, texts: tuple[str, str], turns: list[tuple[int, int]]
) -> None:
    """In any order of arrival the output is one text with every character of each."""
    left = dict(zip((shim.STDOUT, shim.STDERR), map(str.encode, texts), strict=True))
    turns += [(code, len(data)) for code, data in left.items()]
    held = dict.fromkeys(left, b"")
    pieces: list[Piece] = []
    for code, size in turns:
        data = held[code] + left[code][:size]
        left[code] = left[code][size:]
        cut = len(data) - shim.incomplete(data)
        pieces.append((code, data[:cut]))
        held[code] = data[cut:]
    assert set(held.values()) == {b""}
    output = printed(folder, pieces)
    assert sorted("".join(output.text(0, output.size()))) == sorted("".join(texts))


# -- readers


@given(pieces=PIECES, steps=st.lists(st.integers(0, 40), max_size=6), timed=st.booleans())
def test_a_reader_continues_where_another_has_stopped(
    folder: Path, pieces: Sequence[Piece], steps: list[int], *, timed: bool
) -> None:
    """It returns each byte once, with its stream, whatever sizes were known in between."""
    output = printed(folder, pieces)
    size = output.size()
    found: dict[int | None, bytes] = {shim.STDOUT: b"", shim.STDERR: b""}
    cursor = (0, 0)
    for end in [*sorted(min(step, size) for step in steps), size]:
        reader = Reader(output, *cursor, timed=timed)
        for chunk in reader.read(end):
            assert chunk.start + len(chunk.data) == reader.offset
            found[chunk.stream] += chunk.data
        cursor = (reader.offset, reader.record)
    expected = {
        code: b"".join(data for stream, data in pieces if stream == code)
        for code in (shim.STDOUT, shim.STDERR)
    }
    assert found == expected
    for code, text in expected.items():
        one = Reader(output, stream=code)
        assert b"".join(chunk.data for chunk in one.read(size)) == text


@given(pieces=PIECES)
def test_a_record_is_found_by_its_offset(folder: Path, pieces: Sequence[Piece]) -> None:
    """Reading from there gives the same as a reader that started at the beginning."""
    output = printed(folder, pieces)
    size = output.size()
    whole = (folder / "output").read_bytes()
    for offset in range(size + 1):
        reader = Reader(output, offset, output.record_at(offset))
        assert b"".join(chunk.data for chunk in reader.read(size)) == whole[offset:]


def test_neighbours_of_one_stream_are_merged(folder: Path) -> None:
    """A thousand small pieces are one chunk, unless their times are needed."""
    output = printed(folder, [(shim.STDOUT, b"x\n")] * 1000)
    assert len(list(Reader(output).read(2000))) == 1
    assert len(list(Reader(output, timed=True).read(2000))) == 1000
    output = printed(folder, [(shim.STDOUT, b"x" * 40_000)] * 3)
    assert [len(chunk.data) for chunk in Reader(output).read(120_000)] == [40_000] * 3


def test_bytes_without_a_record_have_no_known_stream(folder: Path) -> None:
    """A killed shim can leave some, and they are not lost."""
    output = printed(folder, [(shim.STDOUT, b"one\n")])
    with (folder / "output").open("ab") as file:
        file.write(b"two\n")
    found = [(chunk.stream, chunk.data) for chunk in Reader(output).read(8)]
    assert found == [(shim.STDOUT, b"one\n"), (None, b"two\n")]
    one = Reader(output, stream=shim.STDERR)
    assert b"".join(chunk.data for chunk in one.read(8)) == b"two\n"


def test_an_index_longer_than_its_output_comes_to_an_end(folder: Path) -> None:
    """After a power cut existing bytes are read, and no reader waits for the rest."""
    output = printed(folder, [(shim.STDOUT, b"one\n"), (shim.STDERR, b"two\n")])
    (folder / "output").write_bytes(b"one\n")
    reader = Reader(output)
    assert b"".join(chunk.data for chunk in reader.read(8)) == b"one\n"
    assert reader.offset == 8


def test_a_reader_that_skips_many_records_reports_it(folder: Path) -> None:
    """It does so after each 4096 records, so that other work can run in between."""
    output = printed(folder, [(shim.STDOUT, b"x"), (shim.STDERR, b"y")] * 9000)
    chunks = list(Reader(output, stream=shim.STDERR, timed=True).read(18000))
    assert sum(not chunk.data for chunk in chunks) == 24_001 // BLOCK
    assert b"".join(chunk.data for chunk in chunks) == b"y" * 9000
    printed(folder, [(shim.STDOUT, b"x")] * 9000)
    chunks = list(Reader(output).read(9000))
    assert sum(not chunk.data for chunk in chunks) == 12_001 // BLOCK
    assert b"".join(chunk.data for chunk in chunks) == b"x" * 9000


def test_records_of_cut_bytes_are_not_read(folder: Path) -> None:
    """There can be millions."""
    output = printed(folder, [(shim.STDOUT, b"x"), (shim.STDERR, b"y")] * 20_000)
    (folder / "cut").write_text("1 39999\n")
    try:
        chunks = list(Reader(output).read(40_000))
    finally:
        (folder / "cut").unlink()
    assert [chunk.data for chunk in chunks if chunk.data][::2] == [b"x", b"y"]
    assert sum(not chunk.data for chunk in chunks) == 1


def test_a_large_piece_is_split_between_characters(folder: Path) -> None:
    """Each part of at most 64 KiB can be decoded by itself."""
    text = "ä€😀" * 20_000
    output = printed(folder, [(shim.STDOUT, text.encode())])
    chunks = list(Reader(output).read(output.size()))
    assert len(chunks) == 3
    assert "".join(chunk.data.decode() for chunk in chunks) == text


def test_times_come_before_each_line(folder: Path) -> None:
    """A line in several pieces has the time of its start."""
    output = printed(folder, [(shim.STDOUT, b"one\ntwo"), (shim.STDOUT, b" more\n\nx")])
    timed = Timed(output)
    text = b"".join(timed.dress(c) for c in Reader(output, timed=True).read(16)).decode()
    day = "2023-11-14T22:13:20"
    assert text == f"{day}.000Z one\n{day}.000Z two more\n{day}.001Z \n{day}.001Z x"
    assert Timed(output, fresh=False).dress(Chunk(1, 4, b"two\n", 0)) == b"two\n"


def test_an_unknown_time_is_not_shown(folder: Path) -> None:
    """The record of the start is missing, and the reader searches for it once."""
    output = printed(folder, [(shim.STDOUT, b"one\n")])
    index = (folder / "output.idx").read_bytes()
    (folder / "output.idx").write_bytes(index[shim.RECORD :] + index[: shim.RECORD])
    assert output.began() is None
    timed = Timed(output)
    assert timed.dress(Chunk(1, 0, b"one\n", 0)) == b"one\n"
    # It searched once.
    (folder / "output.idx").write_bytes(index)
    assert output.began() == 1_700_000_000_000
    assert timed.moment(Chunk(1, 0, b"one\n", 0)) is None


@pytest.mark.parametrize(
    "damage",
    [
        *(b"", b"7", b"seven eight", b"1 2 3", b"\xff \xff", b"2 1", b"-1 2"),
        *(b"1 2 3 4 5", b"1 2 4 3", b"1 2 -3 4", b"1 2 3 %d" % (1 << 63)),
    ],
)
def test_a_damaged_cut_file_makes_the_output_unreadable(
    folder: Path, damage: bytes
) -> None:
    """It acts like a broken disk. The size is still known."""
    output = printed(folder, [(shim.STDOUT, b"one\n")])
    (folder / "cut").write_bytes(damage)
    try:
        with pytest.raises(OSError, match="damaged"):
            output.cut()
        # The result of the task is known all the same.
        assert output.last_line() == b""
        assert output.index_size() == (folder / "output.idx").stat().st_size
    finally:
        (folder / "cut").unlink()
