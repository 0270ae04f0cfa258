"""Indexes the lines of an output, so that an output of any size can be read in parts."""

from array import array
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from pathlib import Path

from attrs import define, field
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from pulsar_api.concurrency.changes import Changes
from pulsar_api.concurrency.turns import TurnScheduler
from pulsar_api.output.characters import begin_of_character
from pulsar_api.output.files import Output, output_of
from pulsar_api.output.styles import PLAIN, Style

LEAST = 1 << 16
"""Bytes of a segment at least: it ends with the first line end after them."""
MOST = 1 << 17
"""Bytes of a segment at most, however long its lines are."""
STEP = 1 << 20
"""Bytes that are read in one iteration of the reactor."""
KEPT = 1000
"""Tasks whose line indexes are kept in memory."""
KEPT_SEGMENTS = 1 << 20
"""Segments of all these tasks that are kept, unless a single task has more."""
STYLED = 32
"""A segment that begins with a style counts as this many segments."""

BREAKS = 2
"""Newlines in the marker that readers get for what was cut (see `Output.text`)."""

Hole = tuple[int, int]

Segment = tuple[int, int, bool]
"""A part of the output that a reader gets as a whole.

Its offset; the number of the line of its first byte, from 1; and whether that byte begins
the line, or overwrites it from its start as a terminal does after a carriage return.
"""


@define(eq=False)
class _Scan:
    """One scan of an output, which all current callers share."""

    size: int
    """The offset up to which it reads."""
    ended: Changes
    reached: int = 0
    """The offset that it has reached."""
    failure: Failure | None = None


@define(eq=False)
class LineIndex:
    """The places of the lines of one output, which may grow.

    The output is divided into segments, in a way that does not depend on how it has grown.
    A segment ends after the first newline that is at least `LEAST` bytes from its start. If
    there is none within `MOST` bytes, it ends after the last carriage return in that range,
    or else between two characters. What was cut out of the middle is a segment of its own,
    and counts as the line of its marker.
    """

    output: Output
    turns: TurnScheduler
    _starts: "array[int]" = field(factory=lambda: array("q", [0]), init=False)
    """The offset of each segment; the last one is still open."""
    _lines: "array[int]" = field(factory=lambda: array("q", [3]), init=False)
    """For each segment twice its line number, plus one if it begins that line."""
    _styles: dict[int, Style] = field(factory=dict, init=False)
    """By offset, the style at the start of each segment where it is not plain."""
    _newlines: int = field(default=0, init=False)
    """The number of newlines in the open segment."""
    size: int = field(default=0, init=False)
    """The number of bytes that were read."""
    cut: Hole = field(default=(0, 0), init=False)
    """The part of them that is known to be cut out."""
    _wanted: int = field(default=0, init=False)
    """The largest size that a caller has asked for."""
    _scan: _Scan | None = field(default=None, init=False)

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def weight(self) -> int:
        """The memory that it takes, in segments without a style."""
        return len(self._starts) + STYLED * len(self._styles)

    @property
    def busy(self) -> bool:
        """Whether a scan is under way."""
        return self._scan is not None

    @property
    def lines(self) -> int:
        """The number of newlines."""
        return self._lines[-1] // 2 - 1 + self._newlines

    async def reach(self, size: int) -> None:
        """Read the output up to ``size``, or up to its end if that comes first.

        Callers that ask at the same time share one scan, which goes on as long as any of
        them waits.

        Raises `OSError` if the output cannot be read.
        """
        self._wanted = max(self._wanted, size)
        if size:
            self.output.check()
        while self._lacks(size):
            scan = self._scan or self._begin()
            await scan.ended.after(0)
            if scan.failure is not None:
                scan.failure.raiseException()
            if size <= scan.size and self.size >= min(size, scan.reached):
                return

    def segments(self, start: int, most: int | None = None) -> list[Segment]:
        """Return the segment of the byte ``start`` and those after it, at most ``most``."""
        first = self._at(start)
        known = len(self._starts) - (self._starts[-1] >= self.size)
        last = known if most is None else min(first + most, known)
        return [
            (offset, line >> 1, line & 1 == 1)
            for offset, line in zip(
                self._starts[first:last], self._lines[first:last], strict=True
            )
        ]

    def style_at(self, offset: int) -> str:
        """Return the style at the start of a segment, as parameters of SGR (ECMA-48)."""
        return self._styles.get(offset, PLAIN).text

    def line_at(self, offset: int) -> int:
        """Return the number of the line of the byte at an offset."""
        number = self._at(offset)
        start, line = self._starts[number], self._lines[number] >> 1
        if self._is_hole(start):
            return line
        return line + self.output.read(start, offset).count(b"\n")

    # -- scanning

    def _begin(self) -> _Scan:
        scan = self._scan = _Scan(self._wanted, Changes(self.turns.clock))

        def ended(result: object) -> None:
            self._scan = None
            scan.reached = self.size
            if isinstance(result, Failure):
                scan.failure = result
            scan.ended.advance(1)

        Deferred.fromCoroutine(self._look(scan)).addBoth(ended)
        return scan

    async def _look(self, scan: _Scan) -> None:
        while True:
            await self.turns.wait()
            if not scan.ended.waiting or not self._step(scan.size):
                return

    def _lacks(self, size: int) -> bool:
        """Return whether anything has to be read, perhaps again after a cut."""
        return self.size < size or self.output.cut() != self.cut

    def _step(self, size: int) -> bool:
        """Read the next bytes; return whether there may be more up to ``size``."""
        # Also after the last read: what was cut meanwhile was read as zeros.
        cut = self.output.cut()
        if cut != self.cut:
            self._forget(cut)
        if self.size >= size:
            return False
        start = self._starts[-1]
        hole_start, hole_end = self.cut
        if self._is_hole(start):
            style = self._styles.get(start, PLAIN).whole
            self._open(hole_end, self._lines[-1] // 2 + BREAKS, style, begins=True)
            self.size = max(self.size, hole_end)
            return True
        before = start < hole_start
        stop = min(hole_start if before else size, start + STEP)
        data = self.output.read(start, stop)
        at = 0
        while (end := _end(data, at)) is not None:
            self._close(data, at, end)
            at = end
        self._newlines = data.count(b"\n", at)
        self.size = start + len(data)
        if before and self.size == hole_start and at < len(data):
            self._close(data, at, len(data))
        # Nobody waits for bytes that were lost in a power cut.
        return self.size == stop

    def _close(self, data: bytes, at: int, end: int) -> None:
        start = self._starts[-1]
        line = self._lines[-1] // 2 + data.count(b"\n", at, end)
        style = self._styles.get(start, PLAIN).after(data, at, end)
        self._open(start + end - at, line, style, begins=_begins(data, end))

    def _open(self, offset: int, line: int, style: Style, *, begins: bool) -> None:
        self._starts.append(offset)
        self._lines.append(2 * line + begins)
        self._newlines = 0
        if style != PLAIN:
            self._styles[offset] = style

    def _forget(self, cut: Hole) -> None:
        """Forget everything after the start of the old and of the new gap."""
        first = min(hole[0] for hole in (cut, self.cut) if hole != (0, 0))
        number = max(1, bisect_left(self._starts, first))
        for offset in self._starts[number:]:
            self._styles.pop(offset, None)
        del self._starts[number:], self._lines[number:]
        self._newlines = 0
        self.size = self._starts[-1]
        self.cut = cut

    def _at(self, offset: int) -> int:
        return max(0, bisect_right(self._starts, offset) - 1)

    def _is_hole(self, start: int) -> bool:
        return self.cut != (0, 0) and start == self.cut[0]


def _end(data: bytes, at: int) -> int | None:
    """Return where the segment that begins at ``at`` ends, or None if not in this data."""
    least, most = at + LEAST, at + MOST
    newline = data.find(b"\n", least, most)
    if newline >= 0:
        return newline + 1
    if len(data) <= most:
        return None
    # The last byte may be the first one of a CR LF.
    last = most - 1 if data[most] == ord("\n") else most
    back = data.rfind(b"\r", least, last)
    return back + 1 if back >= 0 else begin_of_character(data, most)


def _begins(data: bytes, end: int) -> bool:
    """Return whether the next segment begins a line, or overwrites one from its start."""
    if data[end - 1] == ord("\r"):
        return end < len(data) and data[end] != ord("\n")
    return data[end - 1] == ord("\n")


@define(eq=False)
class LineIndexes:
    """The line indexes of the tasks that were read last."""

    folder: Path
    """The folder of all tasks."""
    turns: TurnScheduler
    most: int = KEPT_SEGMENTS
    _kept: OrderedDict[int, LineIndex] = field(factory=OrderedDict, init=False)

    def of(self, number: int) -> LineIndex:
        """Return the line index of a task, which may not have read the output yet."""
        found = self._kept.pop(number, None)
        if found is None:
            found = LineIndex(output_of(self.folder, number), self.turns)
        self._forget_some(KEPT - 1, self.most - found.weight)
        self._kept[number] = found
        return found

    def _forget_some(self, most: int, most_segments: int) -> None:
        """Forget the least recently used indexes beyond these bounds, but none in use."""
        segments = sum(index.weight for index in self._kept.values())
        for number, index in list(self._kept.items()):
            if len(self._kept) <= most and segments <= most_segments:
                return
            if not index.busy:
                segments -= index.weight
                del self._kept[number]
