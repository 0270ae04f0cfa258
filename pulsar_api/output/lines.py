"""Knows where the lines of an output are, so that one of any size is read by parts."""

import re
from array import array
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from pathlib import Path

from attrs import define, field, frozen
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from pulsar_api.concurrency.changes import Changes
from pulsar_api.concurrency.turns import TurnScheduler
from pulsar_api.output.characters import begin_of_character
from pulsar_api.output.files import Output, output_of

LEAST = 1 << 16
"""Bytes of a segment, if its lines are not very long, and a line more."""
MOST = 1 << 17
"""Bytes of a segment, whatever its lines."""
STEP = 1 << 20
"""Bytes that are looked at in one turn of the reactor."""
KEPT = 1000
"""Tasks whose lines are remembered."""
KEPT_SEGMENTS = 1 << 20
"""Segments that are remembered of all of them, if it is not a single one that has more."""
STYLED = 32
"""As how many of these a segment counts at whose begin some style is in force."""

BREAKS = 2
"""Newlines of the marker that readers get for what was cut (see `Output.text`)."""

SEQUENCES = 20
"""Sequences of a style that are remembered."""
LONGEST = 200
"""Characters of parameters that a sequence may have, and a style that is told."""

_SEQUENCE = re.compile(rb"\x1b\[([0-9;:]{0,%d})m" % LONGEST)
_TORN = re.compile(rb"\x1b(?:\[[0-9;:]{0,%d})?\Z" % LONGEST)
_FAR = LONGEST + 2  # bytes of the longest begin of a sequence

Hole = tuple[int, int]

Segment = tuple[int, int, bool]
"""A part of the output that a reader gets as a whole.

Its first byte, the number, from 1, of the line that this byte belongs to, and whether it
begins the line, or writes over it as a terminal shows it.
"""


@frozen
class Style:
    """How a terminal shows what follows a byte (ECMA-48, SGR)."""

    kept: bytes = b""
    """The parameters of the latest sequences since the last reset, each ended by ``m``.

    As many as can be told: all of them together are small whatever is printed.
    """
    older: int = 0
    """How many before these are in force as well, so that nothing is told."""
    torn: bytes = b""
    """The begin of a sequence, which may go on with that byte."""

    def after(self, data: bytes, at: int, end: int) -> "Style":
        """Return the style behind the bytes of ``data`` from ``at`` to ``end``."""
        if self.torn:
            data = self.torn + data[at:end]
            at, end = 0, len(data)
        elif data.find(b"\x1b", at, end) < 0:
            return self
        found = _TORN.search(data, max(at, end - _FAR), end)
        torn = b"" if found is None else found.group()
        if data.find(b"\x1b[", at, end) < 0:
            return Style(self.kept, self.older, torn)
        reset, latest = _latest(data, at, end)
        before = [] if reset else self.kept.split(b"m")[:-1]
        kept = (before + latest)[-SEQUENCES:]
        older = 0 if reset else min(self.older, SEQUENCES - len(kept))
        while len(b";".join(kept)) > LONGEST:
            del kept[0]
            older += 1
        return Style(b"".join(part + b"m" for part in kept), older, torn)

    @property
    def whole(self) -> "Style":
        """The same without the begin of a sequence."""
        return Style(self.kept, self.older)

    @property
    def text(self) -> str:
        """What is in force, as the parameters of one sequence; "" if that is too much."""
        return "" if self.older else self.kept[:-1].replace(b"m", b";").decode()


def _latest(data: bytes, at: int, end: int) -> tuple[bool, list[bytes]]:
    """Return the parameters of the latest sequences, and whether a reset is before them."""
    latest: list[bytes] = []
    # From the end on, and mostly that is enough.
    for size in (1 << 12, 1 << 15, end - at):
        latest.clear()
        for parameters in reversed(_SEQUENCE.findall(data, max(at, end - size), end)):
            first, _, rest = parameters.partition(b";")
            reset = not first.strip(b"0")
            if not reset or rest:
                latest.insert(0, rest if reset else parameters)
            if reset or len(latest) == SEQUENCES:
                return reset, latest
        if size >= end - at:
            break
    return False, latest


_PLAIN = Style()


@define(eq=False)
class _Looking:
    """One going through an output, for all who wait for it."""

    size: int
    """Up to where."""
    ended: Changes
    reached: int = 0
    """How far it came."""
    failure: Failure | None = None


@define(eq=False)
class LineIndex:
    """Where the lines of one output are; grows with it.

    The output is divided into segments, always in the same way, however it has grown: a
    segment ends after the first newline that is `LEAST` bytes or more from its begin. If
    there is none within `MOST` bytes it ends after the last carriage return that is as
    far, or, if there is none, between two characters. What was cut out of the middle is a
    segment by itself, and counts as the line that says so.
    """

    output: Output
    turns: TurnScheduler
    _starts: "array[int]" = field(factory=lambda: array("q", [0]), init=False)
    """Where each segment begins; the last one is still open."""
    _lines: "array[int]" = field(factory=lambda: array("q", [3]), init=False)
    """For each its line twice, and one more if it begins that line."""
    _styles: dict[int, Style] = field(factory=dict, init=False)
    """The style at the begin of each segment, if it is not plain."""
    _newlines: int = field(default=0, init=False)
    """How many newlines the open segment has."""
    size: int = field(default=0, init=False)
    """How many bytes have been looked at."""
    cut: Hole = field(default=(0, 0), init=False)
    """What is known to be cut out of them."""
    _wanted: int = field(default=0, init=False)
    """The largest size that was asked for."""
    _looking: _Looking | None = field(default=None, init=False)

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def weight(self) -> int:
        """What it costs to remember, in segments without a style."""
        return len(self._starts) + STYLED * len(self._styles)

    @property
    def busy(self) -> bool:
        """Whether it is being looked on."""
        return self._looking is not None

    @property
    def lines(self) -> int:
        """How many newlines there are."""
        return self._lines[-1] // 2 - 1 + self._newlines

    async def reach(self, size: int) -> None:
        """Look at the output up to ``size``, or to where it ends if that is before.

        Whoever asks meanwhile waits for the same looking, which goes on as long as anybody
        waits. If the output cannot be read all of them get the OSError.
        """
        self._wanted = max(self._wanted, size)
        if size:
            self.output.check()
        while self._lacks(size):
            looking = self._looking or self._begin()
            await looking.ended.after(0)
            if looking.failure is not None:
                looking.failure.raiseException()
            if size <= looking.size and self.size >= min(size, looking.reached):
                return

    def segments(self, start: int, most: int | None = None) -> list[Segment]:
        """Return the segments from the one on that holds the byte ``start``."""
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
        """Return the style at the begin of a segment (ECMA-48, SGR parameters), or ""."""
        return self._styles.get(offset, _PLAIN).text

    def line_at(self, offset: int) -> int:
        """Return the number of the line that a byte belongs to."""
        number = self._at(offset)
        start, line = self._starts[number], self._lines[number] >> 1
        if self._is_hole(start):
            return line
        return line + self.output.read(start, offset).count(b"\n")

    # -- the looking

    def _begin(self) -> _Looking:
        looking = self._looking = _Looking(self._wanted, Changes(self.turns.clock))

        def ended(result: object) -> None:
            self._looking = None
            looking.reached = self.size
            if isinstance(result, Failure):
                looking.failure = result
            looking.ended.advance(1)

        Deferred.fromCoroutine(self._look(looking)).addBoth(ended)
        return looking

    async def _look(self, looking: _Looking) -> None:
        while True:
            await self.turns.wait()
            if not looking.ended.waiting or not self._step(looking.size):
                return

    def _lacks(self, size: int) -> bool:
        """Return whether there is something to look at, also again."""
        return self.size < size or self.output.cut() != self.cut

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
            style = self._styles.get(start, _PLAIN).whole
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
        # For what a power cut has taken, though the index knows of it, nobody waits.
        return self.size == stop

    def _close(self, data: bytes, at: int, end: int) -> None:
        start = self._starts[-1]
        line = self._lines[-1] // 2 + data.count(b"\n", at, end)
        style = self._styles.get(start, _PLAIN).after(data, at, end)
        self._open(start + end - at, line, style, begins=_begins(data, end))

    def _open(self, offset: int, line: int, style: Style, *, begins: bool) -> None:
        self._starts.append(offset)
        self._lines.append(2 * line + begins)
        self._newlines = 0
        if style != _PLAIN:
            self._styles[offset] = style

    def _forget(self, cut: Hole) -> None:
        """Know nothing any more of what is behind the begin of the new or old hole."""
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
    """Return where the segment ends that begins at ``at``; None: not in these bytes."""
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
    """Return whether what follows a segment that ends there begins a line, or again."""
    if data[end - 1] == ord("\r"):
        return end < len(data) and data[end] != ord("\n")
    return data[end - 1] == ord("\n")


@define(eq=False)
class LineIndexes:
    """The line indexes of the tasks that were asked for last."""

    folder: Path
    """Where the output of task 47 is in the folder ``47``."""
    turns: TurnScheduler
    most: int = KEPT_SEGMENTS
    _kept: OrderedDict[int, LineIndex] = field(factory=OrderedDict, init=False)

    def of(self, number: int) -> LineIndex:
        """Return the index of a task, which may have to look at its output yet."""
        found = self._kept.pop(number, None)
        if found is None:
            found = LineIndex(output_of(self.folder, number), self.turns)
        self._forget_some(KEPT - 1, self.most - found.weight)
        self._kept[number] = found
        return found

    def _forget_some(self, most: int, most_segments: int) -> None:
        """Forget the oldest until there is no more; never one that is being looked at."""
        segments = sum(index.weight for index in self._kept.values())
        for number, index in list(self._kept.items()):
            if len(self._kept) <= most and segments <= most_segments:
                return
            if not index.busy:
                segments -= index.weight
                del self._kept[number]
