"""Reads what a task has printed from its files: bytes, text, one stream of the two."""

import os
from codecs import getincrementaldecoder
from collections.abc import Iterator
from pathlib import Path

from attrs import frozen

from pulsar_api.shim import RECORD, STDERR, STDOUT

PIECE = 1 << 16
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
        at = offset - begin
        if at >= len(data) or data[at] & 0xC0 != 0x80:
            return offset
        for back in range(1, at + 1):
            byte = data[at - back]
            if byte & 0xC0 != 0x80:
                length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
                return offset - back if byte >= 0xC2 and length > back else offset
        return offset

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
                begin = start + len(kept)
                yield f"\n[bytes {begin} to {hole_end} were cut: --max-output-size]\n"
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
                file.seek(first * RECORD)
                while len(data := file.read(RECORD)) == RECORD:
                    yield Record.parse(data)
        except FileNotFoundError:
            return

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
