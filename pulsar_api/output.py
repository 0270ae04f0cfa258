"""Reads what a task has printed from its files: bytes, text, one stream of the two."""

import os
from codecs import getincrementaldecoder
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from attrs import define, evolve, frozen

from pulsar_api.shim import CLOCK, RECORD, STDERR, STDOUT, incomplete

PIECE = 1 << 16
_SKIPPED = 4096  # records after which a reader that has found nothing says so
NAMES = {STDOUT: "stdout", STDERR: "stderr"}
"""The streams, by their numbers in a record."""
_PRINTED = frozenset(NAMES)
_Decoder = getincrementaldecoder("utf-8")


@frozen
class Record:
    """One line of ``output.idx``: what happened, a number with it, and when.

    For output the number is where the piece ends; for a start it is the process number.
    ``at`` is milliseconds since the shim began.
    """

    code: int
    number: int
    at: int

    @classmethod
    def parse(cls, data: bytes) -> "Record":
        """Make a record of its 16 bytes."""
        rest = int.from_bytes(data[8:], "little")
        return cls(rest & 0xFF, int.from_bytes(data[:8], "little"), rest >> 8)


@frozen
class Output:
    """The output files of one task, which may still grow, or not exist yet.

    The shim never lets a character be cut by the other stream, so the bytes of both
    together decode as one text.
    """

    folder: Path

    def size(self) -> int:
        """Return how many bytes are on disk."""
        try:
            return os.stat(self.folder / "output").st_size
        except FileNotFoundError:
            return 0

    def pieces(self, start: int, end: int) -> Iterator[bytes]:
        """Yield the bytes from ``start`` to before ``end``, 64 KiB at a time."""
        if end <= start:
            return
        fd = os.open(self.folder / "output", os.O_RDONLY | os.O_CLOEXEC)
        try:
            while start < end and (data := os.pread(fd, min(PIECE, end - start), start)):
                start += len(data)
                yield data
        finally:
            os.close(fd)

    def cut(self) -> tuple[int, int]:
        """Return from which byte to before which byte the output was cut, or (0, 0)."""
        path = os.path.join(self.folder, "cut")
        if not os.path.exists(path):
            return 0, 0
        start, end = Path(path).read_bytes().split()
        return int(start), int(end)

    def character_start(self, offset: int) -> int:
        """Return where the character begins that ``offset`` is in the middle of."""
        begin = max(0, offset - 3)
        data = b"".join(self.pieces(begin, min(offset + 1, self.size())))
        return begin + begin_of_character(data, offset - begin)

    def text(self, start: int, end: int) -> Iterator[str]:
        """Yield the text from ``start`` to ``end``; what is not UTF-8 becomes U+FFFD."""
        decoder = _Decoder("replace")
        while start < end:
            piece = next(self.pieces(start, min(end, start + PIECE)), b"")
            # Looked at after the read: what was cut meanwhile has been read as zeros.
            hole_start, hole_end = self.cut()
            if start < hole_end and start + len(piece) > hole_start:
                kept = piece[: max(0, hole_start - start)]
                yield decoder.decode(kept, final=True)
                decoder.reset()
                yield _marker(start + len(kept), hole_end)
                start = hole_end
            elif piece:
                yield decoder.decode(piece)
                start += len(piece)
            else:
                break
        yield decoder.decode(b"", final=True)

    def records(self, first: int = 0) -> Iterator[Record]:
        """Yield the records of the index, beginning with number ``first``."""
        try:
            with (self.folder / "output.idx").open("rb") as file:
                # A client may have made the number up.
                file.seek(min(first * RECORD, os.fstat(file.fileno()).st_size))
                while len(data := file.read(RECORD)) == RECORD:
                    yield Record.parse(data)
        except FileNotFoundError:
            return

    def stdout(self, end: int, start: int = 0) -> Iterator[str]:
        """Yield the text of standard output alone, from ``start`` to before ``end``."""
        record = self.record_at(start) if start else 0
        for chunk in Reader(self, start, record, STDOUT).read(end):
            yield chunk.data.decode("utf-8", "replace")

    def spans(self, start: int, end: int, first: int = 0) -> Iterator["Span"]:
        """Yield which stream printed what, from ``start`` to ``end``, piece by piece.

        ``first`` is the number of a record at or before the one of ``start``.
        """
        number = first
        for number, record in enumerate(self.records(first), first):
            if start >= end:
                return
            if record.code in _PRINTED and record.number > start:
                stop = min(record.number, end)
                yield Span(record.code, start, stop, number, record.at)
                start = stop
        if start < end:
            # The shim was killed between the bytes and their record.
            yield Span(None, start, end, number, 0)

    def record_at(self, offset: int) -> int:
        """Return the number of the record of the byte at ``offset``, or one before it."""
        try:
            fd = os.open(self.folder / "output.idx", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return 0
        try:
            low, high = 0, os.fstat(fd).st_size // RECORD
            while low < high:
                middle = found = (low + high) // 2
                record = Record.parse(os.pread(fd, RECORD, found * RECORD))
                while record.code not in _PRINTED and found + 1 < high:
                    found += 1
                    record = Record.parse(os.pread(fd, RECORD, found * RECORD))
                if record.code not in _PRINTED or record.number > offset:
                    high = middle
                else:
                    low = found + 1
        finally:
            os.close(fd)
        return low

    def began(self) -> float:
        """Return when the shim began: seconds since the epoch, 0 if it is not known."""
        for record in self.records():
            if record.code == CLOCK:
                return (record.number - record.at) / 1000
        return 0.0

    def last_line(self, limit: int = 4096) -> bytes:
        """Return the last line of standard output; of a longer one, its last bytes."""
        tail = b""
        end = None
        for record in self._backwards():
            if record.code not in {STDOUT, STDERR}:
                continue
            if end is not None:
                start = max(record.number, end - limit - 1)
                tail = b"".join(self.pieces(start, end)) + tail
                end = None
                if b"\n" in tail.rstrip(b"\n") or len(tail) > limit:
                    break
            if record.code == STDOUT:
                end = record.number
        if end is not None:
            tail = b"".join(self.pieces(max(0, end - limit - 1), end)) + tail
        return tail.removesuffix(b"\n").rpartition(b"\n")[2]

    def _backwards(self) -> Iterator[Record]:
        try:
            with (self.folder / "output.idx").open("rb") as file:
                at = file.seek(0, os.SEEK_END) // RECORD
                while at > 0:
                    first = max(0, at - 256)
                    file.seek(first * RECORD)
                    data = file.read((at - first) * RECORD)
                    for i in reversed(range(0, len(data), RECORD)):
                        yield Record.parse(data[i : i + RECORD])
                    at = first
        except FileNotFoundError:
            return


def begin_of_character(data: bytes, at: int) -> int:
    """Return where the character begins that ``at`` is in the middle of."""
    if at >= len(data) or data[at] & 0xC0 != 0x80:
        return at
    for back in range(1, min(at, 3) + 1):
        byte = data[at - back]
        if byte & 0xC0 != 0x80:
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return at - back if byte >= 0xC2 and length > back else at
    return at


def _marker(start: int, end: int) -> str:
    return f"\n[bytes {start} to {end} were cut: --max-output-size]\n"


@frozen
class Span:
    """A part of the output that one stream printed; None: nobody knows which."""

    stream: int | None
    start: int
    end: int
    record: int
    """The number of the record that says so."""
    at: int
    """Milliseconds since the shim began."""


@frozen
class Chunk:
    """Bytes of one stream, whole characters; of what was cut a line that says so."""

    stream: int | None
    start: int
    data: bytes
    at: int


@define(eq=False)
class Reader:
    """Reads on from where it has got to, as the output grows.

    ``offset`` and ``record`` together are a cursor: another reader that begins there reads
    exactly what this one has not. With ``stream`` it gives that stream alone.
    """

    output: Output
    offset: int = 0
    record: int = 0
    stream: int | None = None
    timed: bool = False
    """Whether neighbours are read as one only if they are of the same millisecond."""

    def read(self, end: int) -> Iterator[Chunk]:
        """Yield what there is before ``end``, 64 KiB at a time.

        Now and then a chunk without bytes, when much had to be passed over.
        """
        while self.offset < end:
            yield from self._spans(end)
            if self.offset < end:
                # Behind what was cut; its records are not read, they may be millions.
                self.record = self.output.record_at(self.offset)

    def _spans(self, end: int) -> Iterator[Chunk]:
        passed = 0
        spans = self.output.spans(self.offset, end, self.record)
        for span in _merged(spans, timed=self.timed):
            if self.stream is not None and span.stream not in {self.stream, None}:
                self.offset, self.record = span.end, span.record
                passed += 1
                if passed % _SKIPPED == 0:
                    yield Chunk(None, span.end, b"", span.at)
                continue
            while self.offset < span.end:
                yield from self._read(span)
            if self.offset > span.end:
                return

    def _read(self, span: Span) -> Iterator[Chunk]:
        start = self.offset
        data = next(self.output.pieces(start, min(span.end, start + PIECE)), b"")
        # Looked at after the read: what was cut meanwhile has been read as zeros.
        hole_start, hole_end = self.output.cut()
        if start < hole_end and start + len(data) > hole_start:
            data = data[: max(0, hole_start - start)]
            if data:
                self.offset, self.record = start + len(data), span.record
                yield Chunk(span.stream, start, data, span.at)
            start += len(data)
            self.offset, self.record = hole_end, span.record
            yield Chunk(None, start, _marker(start, hole_end).encode(), span.at)
        elif data:
            if start + len(data) < span.end:
                data = data[: len(data) - incomplete(data)] or data
            self.offset, self.record = start + len(data), span.record
            yield Chunk(span.stream, start, data, span.at)
        else:
            # A power cut has taken bytes of which the index still knows.
            self.offset, self.record = span.end, span.record


def _merged(spans: Iterator[Span], *, timed: bool) -> Iterator[Span]:
    """Join neighbours of one stream, so that small pieces are read in large ones."""
    last: Span | None = None
    for span in spans:
        if last is None:
            last = span
        elif (
            last.stream == span.stream
            and span.end - last.start <= PIECE
            and not (timed and last.at != span.at)
        ):
            last = evolve(span, start=last.start, at=last.at)
        else:
            yield last
            last = span
    if last is not None:
        yield last


@define(eq=False)
class Timed:
    """Puts the time before each line: RFC 3339, UTC, milliseconds."""

    output: Output
    _fresh: bool = True
    """Whether a line begins with the next byte."""
    _began: float = 0.0

    def dress(self, chunk: Chunk) -> bytes:
        """Return the bytes of a chunk with the times in them."""
        self._began = self._began or self.output.began()
        moment = datetime.fromtimestamp(self._began + chunk.at / 1000, UTC)
        stamp = f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03}Z ".encode()
        lines = _lines(chunk.data)
        result = b"".join(
            (stamp if number or self._fresh else b"") + line
            for number, line in enumerate(lines)
        )
        if lines:
            self._fresh = lines[-1].endswith(b"\n")
        return result


def _lines(data: bytes) -> list[bytes]:
    """Return the lines, with their ends; only a line feed ends one."""
    lines = [line + b"\n" for line in data.split(b"\n")]
    last = lines.pop()[:-1]
    return [*lines, last] if last else lines
