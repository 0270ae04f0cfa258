"""Reads what a task has printed from its files: bytes, text, one stream of the two."""

import os
from codecs import getincrementaldecoder
from collections.abc import Iterator
from datetime import UTC, datetime
from errno import EIO
from itertools import islice
from pathlib import Path
from struct import Struct
from typing import NamedTuple

from attrs import define, field, frozen

from pulsar_api import files
from pulsar_api.files import Damaged
from pulsar_api.shim.shim import CLOCK, RECORD, STDERR, STDOUT, incomplete

PIECE = 1 << 16
BLOCK = 4096
"""CredentialStore that are read at once."""
_AHEAD = 4096  # bytes that are read with those that are wanted
_FIELDS = Struct("<QQ")
NAMES = {STDOUT: "stdout", STDERR: "stderr"}
"""The streams, by their numbers in a record."""
_PRINTED = frozenset(NAMES)
_Decoder = getincrementaldecoder("utf-8")
_CUTS = 20  # looks at what was cut, if it is something else each time
_MOST_BLOCKS = 1 << 12  # of an index that are looked at for the last line
_MOST_RECORDS = 1 << 16  # the same
_NEWS = 1 << 8  # of an index that are looked at in one turn of the reactor, in blocks
NO_TIME = 253_402_300_800_000
"""Milliseconds from 1970 to the year 10000."""
FAR = 1 << 63
"""More than the size of any file."""
LARGEST = 1 << 53
"""Bytes that a task may say it has printed: sums of many such still fit into 64 bits."""
_CUT_SIZE = 256  # bytes; four numbers are less
_NOTES = 64  # records that are not of output and stand together, at most


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
        number, rest = _FIELDS.unpack(data)
        return cls(rest & 0xFF, number, rest >> 8)


class Cut(NamedTuple):
    """What was cut out of the middle of an output and of its index; nothing if empty."""

    start: int = 0
    end: int = 0
    """Of the output the bytes from ``start`` to before ``end``."""
    first: int = 0
    next: int = 0
    """Of the index the records from number ``first`` to before ``next``.

    All of them are of bytes that were cut.
    """

    @classmethod
    def parse(cls, data: bytes) -> "Cut":
        """Return what the file ``cut`` says, or raise ValueError.

        Without the last two numbers an older shim has written it, which cuts no index.
        """
        numbers = [int(text) for text in data.split()]
        start, end, first, stop = numbers if len(numbers) != 2 else (*numbers, 0, 0)
        if not (0 <= start <= end < FAR and 0 <= first <= stop < FAR):
            raise ValueError(data)
        return cls(start, end, first // RECORD, stop // RECORD)

    def holds(self, offset: int) -> bool:
        """Return whether this byte of the output was cut."""
        return self.start <= offset < self.end


class Block(NamedTuple):
    """Some thousands of records."""

    first: int
    """The number of the first one."""
    data: bytes
    more: bool
    """Whether there may be more behind them."""
    cut: Cut
    """What was cut, looked at after they were read."""


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
            return min(files.size(self.folder / "output"), LARGEST)
        except FileNotFoundError:
            return 0

    def check(self) -> None:
        """Raise OSError if there is no output any more; it costs next to nothing."""
        files.size(self.folder / "output")

    def readable(self, size: int) -> bool:
        """Return whether an output of ``size`` bytes is there and makes sense.

        Raises: `OSError` if nobody can look now.
        """
        try:
            if size:
                self.check()
            self.holes()
        except (FileNotFoundError, NotADirectoryError, Damaged):
            return False
        return True

    def index_size(self) -> int:
        """Return how many bytes of the index are kept."""
        try:
            size = min(files.size(self.folder / "output.idx"), LARGEST)
        except FileNotFoundError:
            return 0
        cut = self._known_holes()
        return max(0, size - (cut.next - cut.first) * RECORD)

    def weight(self) -> int:
        """Return how much work it is to read all of it, in bytes: small pieces are dear."""
        cut = self._known_holes()
        return max(0, self.size() - (cut.end - cut.start)) + 4 * self.index_size()

    def read(self, start: int, end: int) -> bytes:
        """Return the bytes from ``start`` to before ``end``, which are not too many."""
        return b"".join(self.pieces(start, end))

    def pieces(self, start: int, end: int) -> Iterator[bytes]:
        """Yield the bytes from ``start`` to before ``end``, 64 KiB at a time."""
        if end <= start:
            return
        fd = files.open_regular(self.folder / "output")
        try:
            # A record that is damaged may name any number.
            end = min(end, os.fstat(fd).st_size)
            while start < end and (data := os.pread(fd, min(PIECE, end - start), start)):
                start += len(data)
                yield data
        finally:
            os.close(fd)

    def cut(self) -> tuple[int, int]:
        """Return from which byte to before which byte the output was cut, or (0, 0)."""
        return self.holes()[:2]

    def holes(self) -> Cut:
        """Return what was cut of the output and of its index.

        The shim says it before it cuts. So bytes that were read before this call, and that
        it does not name, were read as they were written.

        Raises: `Damaged` if the file that says it makes no sense.
        """
        path = self.folder / "cut"
        try:
            return Cut.parse(files.read(path, _CUT_SIZE))
        except FileNotFoundError:
            return _WHOLE
        except ValueError as e:
            message = "the file that says what was cut is damaged"
            raise Damaged(EIO, message, str(path)) from e

    def _known_holes(self) -> Cut:
        """Return the same; if it is damaged, take nothing for cut."""
        try:
            return self.holes()
        except Damaged:
            return _WHOLE

    def character_start(self, offset: int) -> int:
        """Return where the character begins that ``offset`` is in the middle of."""
        begin = max(0, offset - 3)
        data = self.read(begin, min(offset + 1, self.size()))
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
        while (block := self.block(first)).data:
            for number, rest in _FIELDS.iter_unpack(block.data):
                yield Record(rest & 0xFF, number, rest >> 8)
            first = block.first + len(block.data) // RECORD

    def news(self, first: int) -> Iterator[tuple[int, Record]]:
        """Yield the records that say more than the next one, from number ``first`` on.

        These are, with their numbers, those that are not of output, and of those that are
        the last of some thousands. It ends after a part of a very large index.
        """
        for _ in range(_NEWS):
            block = self.block(first)
            codes = block.data[8::RECORD]
            if not codes:
                return
            wanted = [max(codes.rfind(code) for code in _PRINTED)]
            if codes.translate(None, bytes(_PRINTED)):
                others = (at for at, code in enumerate(codes) if code not in _PRINTED)
                wanted += islice(others, _NOTES)
            for at in sorted(wanted):
                if at >= 0:
                    data = block.data[at * RECORD : (at + 1) * RECORD]
                    yield block.first + at, Record.parse(data)
            first = block.first + len(codes)

    def stdout(self, end: int, start: int = 0) -> Iterator[str]:
        """Yield the text of standard output alone, from ``start`` to before ``end``."""
        record = self.record_at(start) if start else 0
        parts: list[str] = []
        size = 0
        for chunk in Reader(self, start, record, STDOUT).read(end):
            parts.append(chunk.data.decode("utf-8", "replace"))
            size += len(chunk.data)
            if size >= PIECE or not chunk.data:
                yield "".join(parts)
                parts, size = [], 0
        yield "".join(parts)

    def block(self, first: int) -> Block:
        """Return some thousands of records as they are, from number ``first`` on.

        If that one was cut, from the first one behind what was cut.
        """
        try:
            fd = files.open_regular(self.folder / "output.idx")
        except FileNotFoundError:
            return Block(first, b"", more=False, cut=_WHOLE)
        try:
            for _ in range(_CUTS):
                # A client may have made the number up.
                at = min(first * RECORD, os.fstat(fd).st_size)
                data = os.pread(fd, BLOCK * RECORD, at)
                if data and not any(data):
                    # A hole that no shim has made may be larger than any disk.
                    first = max(first, _next_data(fd, at) // RECORD)
                    data = os.pread(fd, BLOCK * RECORD, first * RECORD)
                # Looked at after the read: what was cut meanwhile has been read as zeros.
                cut = self.holes()
                if not cut.first <= first < cut.next:
                    break
                first = cut.next
            else:
                raise Damaged(EIO, "what was cut changes all the time", str(self.folder))
        finally:
            os.close(fd)
        size = len(data) // RECORD
        if first < cut.first < min(cut.next, first + size):
            size = cut.first - first
            return Block(first, data[: size * RECORD], more=True, cut=cut)
        return Block(first, data[: size * RECORD], size == BLOCK, cut)

    def record_at(self, offset: int) -> int:
        """Return the number of the record of the byte at ``offset``, or one before it."""
        try:
            fd = files.open_regular(self.folder / "output.idx")
        except FileNotFoundError:
            return 0
        try:
            low, high = 0, os.fstat(fd).st_size // RECORD
            cut = self.holes()
            if cut.first < cut.next <= high:
                low, high = (cut.next, high) if offset >= cut.end else (0, cut.first)
            while low < high:
                middle = found = (low + high) // 2
                record = Record.parse(os.pread(fd, RECORD, found * RECORD))
                # CredentialStore that are cut meanwhile read as code 0, millions of them.
                while record.code not in _PRINTED and found + 1 < min(
                    high, middle + _NOTES
                ):
                    found += 1
                    record = Record.parse(os.pread(fd, RECORD, found * RECORD))
                if record.code not in _PRINTED or record.number > offset:
                    high = middle
                else:
                    low = found + 1
        finally:
            os.close(fd)
        return low

    def began(self) -> int | None:
        """Return when the shim began: milliseconds since 1970; None if it is not known."""
        # It is one of the first records, and these are never cut.
        for number, rest in _FIELDS.iter_unpack(self.block(0).data):
            if rest & 0xFF == CLOCK:
                began = number - (rest >> 8)
                return began if 0 <= began < NO_TIME else None
            if rest & 0xFF in _PRINTED:
                break
        return None

    def last_line(self, limit: int = 4096) -> bytes:
        """Return the last line of standard output; of a longer one, its last bytes.

        If a part of the line was cut, return the rest; b"" if nobody knows the line.
        """
        tail = b""
        end = None
        try:
            cut = self.holes()
        except Damaged:
            return b""
        for record in islice(self._backwards(cut), _MOST_RECORDS):
            if record.code not in {STDOUT, STDERR}:
                continue
            if end is not None:
                start = max(record.number, end - limit - 1)
                tail = self._kept(start, end, cut) + tail
                end = None
                if b"\n" in tail.rstrip(b"\n") or len(tail) > limit:
                    break
            if record.code == STDOUT:
                end = record.number
        if end is not None:
            tail = self._kept(max(0, end - limit - 1), end, cut) + tail
        return tail.removesuffix(b"\n").rpartition(b"\n")[2]

    def _kept(self, start: int, end: int, cut: Cut) -> bytes:
        """Return the bytes from ``start`` to before ``end`` that are not before a hole."""
        return self.read(cut.end if start < cut.end < end else start, end)

    def _backwards(self, cut: Cut) -> Iterator[Record]:
        """Yield records from the last one on, as far back as there is a hole."""
        try:
            with open(files.open_regular(self.folder / "output.idx"), "rb") as file:
                at = file.seek(0, os.SEEK_END) // RECORD
                least = cut.next if cut.first < cut.next else 0
                least = max(least, at - _MOST_BLOCKS * BLOCK)
                while at > least:
                    first = max(least, at - BLOCK)
                    file.seek(first * RECORD)
                    data = file.read((at - first) * RECORD)
                    codes = data[8::RECORD]
                    numbers = reversed(range(len(codes)))
                    if STDOUT not in codes:
                        # Of these the last one says where what is before them ends.
                        last = codes.rfind(STDERR)
                        numbers = reversed(range(max(0, last), last + 1))
                    for number in numbers:
                        yield Record.parse(data[number * RECORD : (number + 1) * RECORD])
                    at = first
        except FileNotFoundError:
            return


_WHOLE = Cut()


@frozen
class Missing(Output):
    """Stands for an output whose files are gone or damaged: it is empty."""

    def size(self) -> int:
        """Return 0."""
        return 0

    def index_size(self) -> int:
        """Return 0."""
        return 0

    def holes(self) -> Cut:
        """Return that nothing was cut."""
        return _WHOLE

    def pieces(self, start: int, end: int) -> Iterator[bytes]:
        """Yield nothing."""
        return iter(())

    def stdout(self, end: int, start: int = 0) -> Iterator[str]:
        """Yield nothing."""
        return iter(())


def _next_data(fd: int, at: int) -> int:
    """Return where the next bytes are that are on disk, or the end of the file."""
    try:
        return os.lseek(fd, at, os.SEEK_DATA)
    except OSError:  # ENXIO: there are none
        return os.fstat(fd).st_size


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


class Span(NamedTuple):
    """A part of the output that one stream printed; None: nobody knows which."""

    stream: int | None
    start: int
    end: int
    record: int
    """The number of the record that says so."""
    at: int
    """Milliseconds since the shim began."""


def _spans(block: Block, start: int, end: int, *, timed: bool) -> Iterator[Span]:
    """Yield which stream printed what from ``start`` to ``end``, as far as records say.

    Neighbours of one stream are one span, up to `PIECE`; if ``timed``, those of one time.
    """
    stream, begin, known, at = 0, start, block.first, 0
    for record, (stop, rest) in enumerate(_FIELDS.iter_unpack(block.data), block.first):
        code = rest & 0xFF
        if stop <= start or code not in _PRINTED:
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

        After some thousands of records a chunk without bytes: who reads may let others
        have their turn.
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
                # Behind what was cut; its records are not read, they may be millions.
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
        """Go on behind what was cut with its records: nobody knows who printed it."""
        start, end = self.offset, block.cut.end
        self.offset, self.record = end, block.first
        at = Record.parse(block.data[:RECORD]).at if block.data else 0
        return Chunk(None, start, _marker(start, end).encode(), at)

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
                yield Chunk(None, start, _marker(start, hole_end).encode(), span.at)
            elif data:
                if start + len(data) < span.end:
                    data = data[: len(data) - incomplete(data)] or data
                self.offset, self.record = start + len(data), span.record
                yield Chunk(span.stream, start, data, span.at)
            else:
                # A power cut has taken bytes of which the index still knows.
                self.offset, self.record = end, span.record


@define(eq=False)
class _Window:
    """The bytes of an output around where it is read."""

    output: Output
    start: int = 0
    data: bytes = b""
    hole: tuple[int, int] = (0, 0)
    """What of them is cut out."""
    passed: bool = False
    """Whether the reader has passed what is cut out."""

    def read(self, start: int, stop: int, end: int) -> bytes:
        """Return bytes; read ahead of ``stop``, but not behind ``end``."""
        if start < self.start or stop > self.start + len(self.data):
            self.start = start
            self.data = self.output.read(start, min(max(stop, start + _AHEAD), end))
            # Looked at after the read: what was cut meanwhile has been read as zeros.
            self.hole = self.output.cut()
        return self.data[start - self.start : stop - self.start]


@define(eq=False)
class Timed:
    """Knows when the pieces of an output were printed."""

    output: Output
    _fresh: bool = True
    """Whether a line begins with the next byte."""
    _began: int | None = field(default=None, init=False)
    _asked: bool = field(default=False, init=False)

    def moment(self, chunk: Chunk) -> int | None:
        """Return when it was: milliseconds since 1970; None if it is not known."""
        if not self._asked:
            self._asked, self._began = True, self.output.began()
        moment = None if self._began is None else self._began + chunk.at
        return None if moment is None or moment >= NO_TIME else moment

    def dress(self, chunk: Chunk) -> bytes:
        """Return the bytes of a chunk with the time before each line, if it is known.

        RFC 3339, UTC, milliseconds.
        """
        stamp = _stamp(self.moment(chunk))
        lines = _lines(chunk.data)
        result = b"".join(
            (stamp if number or self._fresh else b"") + line
            for number, line in enumerate(lines)
        )
        if lines:
            self._fresh = lines[-1].endswith(b"\n")
        return result


def _stamp(moment: int | None) -> bytes:
    if moment is None:
        return b""
    seconds, milliseconds = divmod(moment, 1000)
    time = datetime.fromtimestamp(seconds, UTC)
    return f"{time:%Y-%m-%dT%H:%M:%S}.{milliseconds:03}Z ".encode()


def _lines(data: bytes) -> list[bytes]:
    """Return the lines, with their ends; only a line feed ends one."""
    lines = [line + b"\n" for line in data.split(b"\n")]
    last = lines.pop()[:-1]
    return [*lines, last] if last else lines
