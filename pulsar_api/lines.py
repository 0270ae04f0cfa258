"""Knows where the lines of an output are, so that one of any size is read by parts."""

from array import array
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

from attrs import define, field, frozen
from twisted.internet.defer import DeferredLock
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater

from pulsar_api.output import Output, begin_of_character

LEAST = 1 << 16
"""Bytes of a segment, if its lines are not very long, and a line more."""
MOST = 1 << 17
"""Bytes of a segment, whatever its lines."""
STEP = 1 << 20
"""Bytes that are looked at in one turn of the reactor."""
KEPT = 16
"""Tasks whose lines are remembered."""
KEPT_SEGMENTS = 1 << 20
"""Segments that are remembered of all of them, if it is not a single one that has more."""

BREAKS = 2
"""Newlines of the marker that readers get for what was cut (see `Output.text`)."""

Hole = tuple[int, int]


@frozen
class Segment:
    """A part of the output that a reader gets as a whole."""

    offset: int
    line: int
    """The number, from 1, of the line that its first byte belongs to."""
    begins: bool
    """Whether that byte begins the line."""


@define(eq=False)
class LineIndex:
    """Where the lines of one output are; grows with it.

    The output is divided into segments, always in the same way, however it has grown: a
    segment ends after the first newline that is `LEAST` bytes or more from its begin; if
    there is none within `MOST` bytes it ends there, between two characters. What was cut
    out of the middle is a segment by itself, and counts as the line that says so.
    """

    output: Output
    _clock: IReactorTime
    _starts: "array[int]" = field(factory=lambda: array("q", [0]), init=False)
    """Where each segment begins; the last one is still open."""
    _lines: "array[int]" = field(factory=lambda: array("q", [3]), init=False)
    """For each its line twice, and one more if it begins that line."""
    _newlines: int = field(default=0, init=False)
    """How many newlines the open segment has."""
    size: int = field(default=0, init=False)
    """How many bytes have been looked at."""
    cut: Hole = field(default=(0, 0), init=False)
    """What is known to be cut out of them."""
    _lock: DeferredLock = field(factory=DeferredLock, init=False)

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def lines(self) -> int:
        """How many newlines there are."""
        return self._lines[-1] // 2 - 1 + self._newlines

    async def reach(self, size: int) -> None:
        """Look at the output up to ``size``, or to where it ends if that is before.

        Whoever asks meanwhile waits for the same looking.
        """
        await self._lock.acquire()
        try:
            while self._step(size):
                await deferLater(self._clock, 0)
        finally:
            self._lock.release()

    def segments(self, start: int) -> Iterator[Segment]:
        """Yield the segments from the one on that holds the byte ``start``."""
        for number in range(self._at(start), len(self._starts)):
            if self._starts[number] < self.size:
                yield self._segment(number)

    def line_at(self, offset: int) -> int:
        """Return the number of the line that a byte belongs to."""
        found = self._segment(self._at(offset))
        if self._is_hole(found.offset):
            return found.line
        return found.line + self.read(found.offset, offset).count(b"\n")

    def read(self, start: int, end: int) -> bytes:
        """Return some bytes; whoever asks knows that they are not too many."""
        return b"".join(self.output.pieces(start, end))

    # -- the looking

    def _step(self, size: int) -> bool:
        """Look at the next bytes; return whether to go on."""
        # Also after the last read: what was cut meanwhile has been read as zeros.
        cut = self.output.cut()
        if cut != self.cut:
            self._forget(cut)
        if self.size >= size:
            return False
        start = self._starts[-1]
        hole_start, hole_end = self.cut
        if self._is_hole(start):
            self._open(hole_end, self._lines[-1] // 2 + BREAKS, begins=True)
            self.size = max(self.size, hole_end)
            return True
        before = start < hole_start
        stop = min(hole_start if before else size, start + STEP)
        data = self.read(start, stop)
        at = 0
        while (end := _end(data, at)) is not None:
            self._close(data, at, end)
            at = end
        self._newlines = data.count(b"\n", at)
        self.size = start + len(data)
        if before and self.size == hole_start and at < len(data):
            self._close(data, at, len(data))
        # For what a power cut has taken, though the index knows of it, nobody waits.
        return self.size == stop

    def _close(self, data: bytes, at: int, end: int) -> None:
        line = self._lines[-1] // 2 + data.count(b"\n", at, end)
        offset = self._starts[-1] + end - at
        self._open(offset, line, begins=data[end - 1] == ord("\n"))

    def _open(self, offset: int, line: int, *, begins: bool) -> None:
        self._starts.append(offset)
        self._lines.append(2 * line + begins)
        self._newlines = 0

    def _forget(self, cut: Hole) -> None:
        """Know nothing any more of what is behind the begin of the new or old hole."""
        first = min(hole[0] for hole in (cut, self.cut) if hole != (0, 0))
        number = max(1, bisect_left(self._starts, first))
        del self._starts[number:], self._lines[number:]
        self._newlines = 0
        self.size = self._starts[-1]
        self.cut = cut

    def _at(self, offset: int) -> int:
        return max(0, bisect_right(self._starts, offset) - 1)

    def _segment(self, number: int) -> Segment:
        line = self._lines[number]
        return Segment(self._starts[number], line // 2, bool(line % 2))

    def _is_hole(self, start: int) -> bool:
        return self.cut != (0, 0) and start == self.cut[0]


def _end(data: bytes, at: int) -> int | None:
    """Return where the segment ends that begins at ``at``; None: not in these bytes."""
    newline = data.find(b"\n", at + LEAST, at + MOST)
    if newline >= 0:
        return newline + 1
    return begin_of_character(data, at + MOST) if len(data) > at + MOST else None


@define(eq=False)
class LineIndexes:
    """The line indexes of the tasks that were asked for last."""

    folder: Path
    """Where the output of task 47 is in the folder ``47``."""
    clock: IReactorTime
    _kept: OrderedDict[int, LineIndex] = field(factory=OrderedDict, init=False)

    def of(self, number: int) -> LineIndex:
        """Return the index of a task, which may have to look at its output yet."""
        found = self._kept.pop(number, None)
        if found is None:
            found = LineIndex(Output(self.folder / str(number)), self.clock)
        self._kept[number] = found
        while len(self._kept) > 1 and (
            len(self._kept) > KEPT or sum(map(len, self._kept.values())) > KEPT_SEGMENTS
        ):
            self._kept.popitem(last=False)
        return found
