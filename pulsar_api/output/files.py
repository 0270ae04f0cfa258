"""The output of a task: where its files are, and how to read bytes and text from them."""

import os
from codecs import getincrementaldecoder
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from attrs import frozen

from pulsar_api import files
from pulsar_api.files import Damaged
from pulsar_api.output.characters import begin_of_character
from pulsar_api.output.index import Index
from pulsar_api.output.records import LARGEST, NOTHING_CUT, PRINTED, Cut
from pulsar_api.shim.shim import STDOUT

PIECE = 1 << 16
"""Bytes that are read at once."""

_Decoder = getincrementaldecoder("utf-8")
_MOST_RECORDS = 1 << 16  # records that are looked at to find the last line


def folder_of(tasks: Path, task_id: int) -> Path:
    """Return the folder of a task, in the folder of all tasks."""
    return tasks / str(task_id)


def marker(start: int, end: int) -> str:
    """Return the text that readers get in place of the bytes that were cut."""
    return f"\n[bytes {start} to {end} were cut: --max-output-size]\n"


@frozen
class Output(Index):
    """The output of one task, which may still grow, or not exist yet.

    The shim never lets one stream print in the middle of a character of the other, so the
    bytes of both streams together decode as one text.
    """

    def size(self) -> int:
        """Return the size of the output in bytes, including what was cut."""
        try:
            return min(files.size(self.folder / "output"), LARGEST)
        except FileNotFoundError:
            return 0

    def check(self) -> None:
        """Raise `OSError` if the output is gone; this is cheap."""
        files.size(self.folder / "output")

    def readable(self, size: int) -> bool:
        """Return whether an output of ``size`` bytes exists and makes sense.

        Raises `OSError` if that cannot be known now.
        """
        try:
            if size:
                self.check()
            self.holes()
        except (FileNotFoundError, NotADirectoryError, Damaged):
            return False
        return True

    def weight(self) -> int:
        """Return what reading everything costs, in bytes; each piece adds a fixed cost."""
        cut = self._known_holes()
        return max(0, self.size() - (cut.end - cut.start)) + 4 * self.index_size()

    def read(self, start: int, end: int) -> bytes:
        """Return the bytes in ``range(start, end)``, all in memory."""
        return b"".join(self.pieces(start, end))

    def pieces(self, start: int, end: int) -> Iterator[bytes]:
        """Yield the bytes in ``range(start, end)``, at most `PIECE` at a time."""
        if end <= start:
            return
        fd = files.open_regular(self.folder / "output")
        try:
            # A damaged record may contain any number.
            end = min(end, os.fstat(fd).st_size)
            while start < end and (data := os.pread(fd, min(PIECE, end - start), start)):
                start += len(data)
                yield data
        finally:
            os.close(fd)

    def cut(self) -> tuple[int, int]:
        """Return the start and the end of what was cut out of the output, or (0, 0)."""
        return self.holes()[:2]

    def character_start(self, offset: int) -> int:
        """Return the offset of the first byte of the character that ``offset`` is in."""
        begin = max(0, offset - 3)
        data = self.read(begin, min(offset + 1, self.size()))
        return begin + begin_of_character(data, offset - begin)

    def text(self, start: int, end: int) -> Iterator[str]:
        """Yield the text in ``range(start, end)``; bytes that are not UTF-8 become U+FFFD.

        A marker stands for what was cut.
        """
        decoder = _Decoder("replace")
        while start < end:
            piece = next(self.pieces(start, min(end, start + PIECE)), b"")
            # After the read: what was cut meanwhile was read as zeros.
            hole_start, hole_end = self.cut()
            if start < hole_end and start + len(piece) > hole_start:
                kept = piece[: max(0, hole_start - start)]
                yield decoder.decode(kept, final=True)
                decoder.reset()
                yield marker(start + len(kept), hole_end)
                start = hole_end
            elif piece:
                yield decoder.decode(piece)
                start += len(piece)
            else:
                break
        yield decoder.decode(b"", final=True)

    def last_line(self, limit: int = 4096) -> bytes:
        """Return the last line of standard output, at most its last ``limit`` bytes.

        If a part of the line was cut, return the rest; if the line is not known, b"".
        """
        tail = b""
        end = None
        try:
            cut = self.holes()
        except Damaged:
            return b""
        for record in islice(self.backwards(cut), _MOST_RECORDS):
            if record.code not in PRINTED:
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
        """Return the bytes in ``range(start, end)``, without those before a gap in it."""
        return self.read(cut.end if start < cut.end < end else start, end)


@frozen
class Missing(Output):
    """An empty output, in place of one whose files are gone or damaged."""

    def size(self) -> int:
        """Return 0."""
        return 0

    def index_size(self) -> int:
        """Return 0."""
        return 0

    def holes(self) -> Cut:
        """Return that nothing was cut."""
        return NOTHING_CUT

    def pieces(self, start: int, end: int) -> Iterator[bytes]:
        """Yield nothing."""
        return iter(())


def output_of(tasks: Path, task_id: int) -> Output:
    """Return the output of a task; ``tasks`` is the folder of all tasks."""
    return Output(folder_of(tasks, task_id))
