"""Reads a growing output from a cursor on, and tells its two streams apart."""

from collections.abc import Iterator
from typing import NamedTuple

from attrs import define, frozen

from pulsar_api.output.files import PIECE, Missing, Output, marker
from pulsar_api.output.records import FIELDS, PRINTED, Block, Record
from pulsar_api.shim.shim import RECORD, STDOUT, incomplete

_AHEAD = 4096  # bytes that are read in addition to those that are needed


class Span(NamedTuple):
    """A part of the output that one stream printed."""

    stream: int | None
    """None if the stream is not known."""
    start: int
    end: int
    record: int
    """The number of the record of its last byte."""
    at: int
    """Milliseconds since the shim began."""


def _spans(block: Block, start: int, end: int, *, timed: bool) -> Iterator[Span]:
    """Yield the spans in ``range(start, end)`` that the records of a block describe.

    Adjacent pieces of one stream are one span, up to `PIECE` bytes; with ``timed`` only if
    they were printed in the same millisecond.
    """
    stream, begin, known, at = 0, start, block.first, 0
    for record, (stop, rest) in enumerate(FIELDS.iter_unpack(block.data), block.first):
        code = rest & 0xFF
        if stop <= start or code not in PRINTED:
            continue
        upto = min(stop, end)
        if code != stream or upto - begin > PIECE or (timed and rest >> 8 != at):
            if start > begin:
                yield Span(stream, begin, start, known, at)
            stream, begin, at = code, start, rest >> 8
        start, known = upto, record
        if start == end:
            break
    if start > begin:
        yield Span(stream, begin, start, known, at)


@frozen
class Chunk:
    """Bytes of one stream, in whole characters; or a marker for what was cut."""

    stream: int | None
    start: int
    data: bytes
    at: int


@define(eq=False)
class Reader:
    """Reads an output from a cursor on, as far as it has grown.

    ``offset`` and ``record`` are the cursor: another reader that starts with them reads
    exactly what this one has not read yet. ``stream`` restricts it to that stream.
    """

    output: Output
    offset: int = 0
    record: int = 0
    stream: int | None = None
    timed: bool = False
    """Whether pieces are joined only if they were printed in the same millisecond."""

    def read(self, end: int) -> Iterator[Chunk]:
        """Yield chunks of what is before ``end``, at most `PIECE` bytes each.

        After some thousands of records it yields an empty chunk, so that the caller can
        let other callers work.

        Raises `OSError` if the files cannot be read.
        """
        window = _Window(self.output)
        while self.offset < end:
            block = self.output.block(self.record)
            if block.first > self.record and block.cut.holds(self.offset):
                yield self._pass(block)
                continue
            yield from self._known(window, block, end)
            if self.offset >= end:
                return
            behind = block.first + len(block.data) // RECORD
            if window.passed:
                # After a gap: skip its records, which may be millions.
                self.record = self.output.record_at(self.offset)
                window.passed = False
            elif block.more:
                self.record = behind
            else:
                # The shim was killed between the bytes and their record.
                last = max(block.first, behind - 1)
                yield from self._read(window, Span(None, self.offset, end, last, 0), end)
                window.passed = False
                continue
            yield Chunk(None, self.offset, b"", 0)

    def _pass(self, block: Block) -> Chunk:
        """Skip a gap whose records were cut as well, and return its marker."""
        start, end = self.offset, block.cut.end
        self.offset, self.record = end, block.first
        at = Record.parse(block.data[:RECORD]).at if block.data else 0
        return Chunk(None, start, marker(start, end).encode(), at)

    def _known(self, window: "_Window", block: Block, end: int) -> Iterator[Chunk]:
        for span in _spans(block, self.offset, end, timed=self.timed):
            if self.stream is not None and span.stream != self.stream:
                self.offset, self.record = span.end, span.record
                continue
            yield from self._read(window, span, end)
            if self.offset > span.end:
                return

    def _read(self, window: "_Window", span: Span, end: int) -> Iterator[Chunk]:
        while self.offset < span.end:
            start = self.offset
            data = window.read(start, min(span.end, start + PIECE), end)
            hole_start, hole_end = window.hole
            if start < hole_end and start + len(data) > hole_start:
                data = data[: max(0, hole_start - start)]
                if data:
                    self.offset, self.record = start + len(data), span.record
                    yield Chunk(span.stream, start, data, span.at)
                start += len(data)
                self.offset, self.record = hole_end, span.record
                window.passed = True
                yield Chunk(None, start, marker(start, hole_end).encode(), span.at)
            elif data:
                if start + len(data) < span.end:
                    data = data[: len(data) - incomplete(data)] or data
                self.offset, self.record = start + len(data), span.record
                yield Chunk(span.stream, start, data, span.at)
            else:
                # The index has records of bytes that were lost in a power cut.
                self.offset, self.record = end, span.record


@define(eq=False)
class _Window:
    """The bytes of an output near the cursor, so that small pieces cost no read each."""

    output: Output
    start: int = 0
    data: bytes = b""
    hole: tuple[int, int] = (0, 0)
    """The gap, as it was after the last read."""
    passed: bool = False
    """Whether the reader has passed the gap."""

    def read(self, start: int, stop: int, end: int) -> bytes:
        """Return the bytes in ``range(start, stop)``; read ahead up to ``end``."""
        if start < self.start or stop > self.start + len(self.data):
            self.start = start
            self.data = self.output.read(start, min(max(stop, start + _AHEAD), end))
            # After the read: what was cut meanwhile was read as zeros.
            self.hole = self.output.cut()
        return self.data[start - self.start : stop - self.start]


def stdout_text(output: Output, end: int, start: int = 0) -> Iterator[str]:
    """Yield the text that standard output printed in ``range(start, end)``."""
    if isinstance(output, Missing):
        return
    record = output.record_at(start) if start else 0
    parts: list[str] = []
    size = 0
    for chunk in Reader(output, start, record, STDOUT).read(end):
        parts.append(chunk.data.decode("utf-8", "replace"))
        size += len(chunk.data)
        if size >= PIECE or not chunk.data:
            yield "".join(parts)
            parts, size = [], 0
    yield "".join(parts)
