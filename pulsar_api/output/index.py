"""Reads the index of an output: which stream printed which bytes, and when."""

import os
from collections.abc import Iterator
from errno import EIO
from itertools import islice
from pathlib import Path

from attrs import frozen

from pulsar_api import files
from pulsar_api.files import Damaged
from pulsar_api.output.records import (
    BLOCK,
    FIELDS,
    LARGEST,
    NO_TIME,
    NOTHING_CUT,
    PRINTED,
    Block,
    Cut,
    Record,
)
from pulsar_api.shim.shim import CLOCK, RECORD, STDERR, STDOUT

_CUTS = 20  # times that a block is read again because something else was cut
_MOST_BLOCKS = 1 << 12  # blocks that are read to find the last line
_NEWS = 1 << 8  # blocks that `Index.news` reads in one iteration of the reactor
_NOTES = 64  # records that are not of output and stand together, at most
_CUT_SIZE = 256  # bytes of the file ``cut`` that are read; it has four numbers


@frozen
class Index:
    """The index of one output, which may still grow, or not exist yet.

    Unless a method says otherwise, it raises `OSError` if the files cannot be read.
    """

    folder: Path
    """The folder of the task."""

    def holes(self) -> Cut:
        """Return what was cut out of the output and out of its index.

        The shim writes it before it cuts. So call this after a read: bytes that it does
        not name were read as they were written.

        Raises `Damaged` if the file ``cut`` makes no sense.
        """
        path = self.folder / "cut"
        try:
            return Cut.parse(files.read(path, _CUT_SIZE))
        except FileNotFoundError:
            return NOTHING_CUT
        except ValueError as e:
            message = "the file that says what was cut is damaged"
            raise Damaged(EIO, message, str(path)) from e

    def _known_holes(self) -> Cut:
        """Return the same, or that nothing was cut if the file is damaged."""
        try:
            return self.holes()
        except Damaged:
            return NOTHING_CUT

    def index_size(self) -> int:
        """Return the size of the index in bytes, without what was cut."""
        try:
            size = min(files.size(self.folder / "output.idx"), LARGEST)
        except FileNotFoundError:
            return 0
        cut = self._known_holes()
        return max(0, size - (cut.next - cut.first) * RECORD)

    def records(self, first: int = 0) -> Iterator[Record]:
        """Yield the records of the index from number ``first`` on."""
        while (block := self.block(first)).data:
            for number, rest in FIELDS.iter_unpack(block.data):
                yield Record(rest & 0xFF, number, rest >> 8)
            first = block.first + len(block.data) // RECORD

    def news(self, first: int) -> Iterator[tuple[int, Record]]:
        """Yield the records that matter to a follower, from number ``first`` on.

        These are, with their numbers, all that are not of output, and of those of output
        the last one in each block. Of a very large index it yields only the first part.
        """
        for _ in range(_NEWS):
            block = self.block(first)
            codes = block.data[8::RECORD]
            if not codes:
                return
            wanted = [max(codes.rfind(code) for code in PRINTED)]
            if codes.translate(None, bytes(PRINTED)):
                others = (at for at, code in enumerate(codes) if code not in PRINTED)
                wanted += islice(others, _NOTES)
            for at in sorted(wanted):
                if at >= 0:
                    data = block.data[at * RECORD : (at + 1) * RECORD]
                    yield block.first + at, Record.parse(data)
            first = block.first + len(codes)

    def block(self, first: int) -> Block:
        """Return up to `BLOCK` records from number ``first`` on.

        If that record was cut, start with the first one after the gap.
        """
        try:
            fd = files.open_regular(self.folder / "output.idx")
        except FileNotFoundError:
            return Block(first, b"", more=False, cut=NOTHING_CUT)
        try:
            for _ in range(_CUTS):
                # A client may have invented the number.
                at = min(first * RECORD, os.fstat(fd).st_size)
                data = os.pread(fd, BLOCK * RECORD, at)
                if data and not any(data):
                    # A hole that a task has made may be larger than any disk.
                    first = max(first, _next_data(fd, at) // RECORD)
                    data = os.pread(fd, BLOCK * RECORD, first * RECORD)
                # After the read: what was cut meanwhile was read as zeros.
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
        """Return the number of the record of the byte at ``offset``, or an earlier one."""
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
                while record.code not in PRINTED and found + 1 < min(high, middle + _NOTES):
                    found += 1
                    record = Record.parse(os.pread(fd, RECORD, found * RECORD))
                if record.code not in PRINTED or record.number > offset:
                    high = middle
                else:
                    low = found + 1
        finally:
            os.close(fd)
        return low

    def began(self) -> int | None:
        """Return when the shim began, in milliseconds since 1970, or None if unknown."""
        # It is among the first records, which are never cut.
        for number, rest in FIELDS.iter_unpack(self.block(0).data):
            if rest & 0xFF == CLOCK:
                began = number - (rest >> 8)
                return began if 0 <= began < NO_TIME else None
            if rest & 0xFF in PRINTED:
                break
        return None

    def backwards(self, cut: Cut) -> Iterator[Record]:
        """Yield records from the last one back to the gap, or to the first one."""
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
                        # The last of these records says where the bytes before it end.
                        last = codes.rfind(STDERR)
                        numbers = reversed(range(max(0, last), last + 1))
                    for number in numbers:
                        yield Record.parse(data[number * RECORD : (number + 1) * RECORD])
                    at = first
        except FileNotFoundError:
            return


def _next_data(fd: int, at: int) -> int:
    """Return where the next bytes are that are not in a hole, or the end of the file."""
    try:
        return os.lseek(fd, at, os.SEEK_DATA)
    except OSError:  # ENXIO: there are none
        return os.fstat(fd).st_size
