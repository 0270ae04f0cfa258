"""Messages of the job feed, made piece by piece while they are sent."""

from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from attrs import define, field, frozen
from twisted.logger import Logger

from pulsar_api.concurrency.turns import TurnScheduler
from pulsar_api.output.files import Output
from pulsar_api.output.reader import Reader
from pulsar_api.output.records import NAMES
from pulsar_api.tasks.model import TaskSnapshot
from pulsar_api.web import encoding
from pulsar_api.web.json_stream import escaped, opened

_log = Logger()

PIECE_BYTES = 8192
"""Bytes of output read for one step of a piece; up to 7 times more as nested JSON."""
MAX_TEXT = 1 << 20
"""Bytes of output in each text of a message; longer output loses its beginning."""
MAX_CHANGE_TEXT = 1 << 16
"""The same for a running job, whose output is sent many times."""

_MAX_ENCODED = 1.5
"""How many times its limit a text may take as JSON; beyond that it has less output."""
_RECORD_COST = 4  # the cost of a record of the index, in bytes that take the same time
_ENTRY_BYTES = 1024  # what a cached piece takes beside its text
_MAX_CHUNKS = 256  # read in one step
_MEASURED_BYTES = 8 * PIECE_BYTES  # measured in one turn of the reactor
_HEAD, _STDOUT, _BETWEEN, _OUTPUT, _TAIL = range(5)
_STDOUT_CODE = next(code for code, name in NAMES.items() if name == "stdout")


class Position(NamedTuple):
    """How far a client has read a message."""

    part: int = _HEAD
    offset: int = 0
    """In the head a character, in a text a byte of the output."""
    record: int = 0


Piece = tuple[str, Position | None]
"""A piece of text and the position behind it; None behind the last piece."""


@define(eq=False)
class PieceCache:
    """Caches the newest pieces, so that readers at the same position share them."""

    max_bytes: int = 1 << 20
    misses: int = field(default=0, init=False)
    """How many pieces had to be made."""
    size: int = field(default=0, init=False)
    """Bytes of the cached pieces."""
    _kept: OrderedDict[tuple["Message", Position], Piece] = field(
        factory=OrderedDict, init=False
    )

    def get(self, message: "Message", position: Position) -> Piece:
        """Return the piece at a position of a message; make it if it is not cached."""
        piece = self._kept.get((message, position))
        if piece is None:
            self.misses += 1
            piece = self._kept[message, position] = message.make_piece(position)
            self.size += len(piece[0]) + _ENTRY_BYTES
            while self.size > self.max_bytes:
                _, (text, _) = self._kept.popitem(last=False)
                self.size -= len(text) + _ENTRY_BYTES
        return piece

    def clear(self) -> None:
        """Drop all pieces."""
        self._kept.clear()
        self.size = 0


@frozen(eq=False)
class Message:
    """A SockJS frame ``a["…"]`` with the state of a job.

    It holds no text, so its memory does not depend on how many clients read it, and how
    slowly. Each client holds its position and the piece that it is sent.
    """

    _kind: str
    _snapshot: TaskSnapshot
    _output: Output
    _start: int
    """The byte of the output at which both texts begin; see `start_offset`."""
    _cache: PieceCache
    _turns: TurnScheduler

    async def send(self, write: Callable[[str, bool], Awaitable[None]]) -> None:
        """Call ``write`` with each piece, in a turn of its own; with True for the last."""
        position: Position | None = Position()
        while position is not None:
            await self._turns.wait()
            text, position = self._cache.get(self, position)
            await write(text, position is None)

    def make_piece(self, position: Position) -> Piece:
        """Return the piece at a position: some KiB, or less where reading is slow."""
        parts: list[str] = []
        cost = 0
        behind: Position | None = position
        while behind is not None and cost < 2 * PIECE_BYTES:
            before = behind
            text, behind = self._step(before)
            parts.append(text)
            cost += len(text)
            if behind is not None and behind.part == before.part == _STDOUT:
                cost += _RECORD_COST * (behind.record - before.record)
        return "".join(parts), behind

    def _step(self, position: Position) -> Piece:
        if position.part == _HEAD:
            head = self._head()
            end = position.offset + 2 * PIECE_BYTES
            more = end < len(head)
            return head[position.offset : end], (
                Position(_HEAD, end) if more else self._first(_STDOUT)
            )
        if position.part == _BETWEEN:
            text = '", "output": "' + _escaped(self._left_out())
            return _escaped(text), self._first(_OUTPUT)
        if position.part == _TAIL:
            return _escaped('"}}') + '"]', None
        return self._text(position, self._snapshot.output_size)

    def _text(self, position: Position, end: int) -> Piece:
        text = ""
        behind = Position(position.part, end)
        try:
            # Control characters are so long as JSON that a step has fewer of them.
            for size in (PIECE_BYTES, PIECE_BYTES // 4):
                if position.part == _STDOUT:
                    found, behind = self._stdout(position, end, size)
                else:
                    found, offset = read_text(self._output, position.offset, end, size)
                    behind = Position(_OUTPUT, offset)
                text = _escaped(_escaped(found))
                if len(text) <= 2 * PIECE_BYTES:
                    break
        except OSError as e:
            number = self._snapshot.id
            _log.error("Cannot read the output of task {id}: {e}", id=number, e=e)
            text = _escaped(_escaped(f"[cannot be read now: {e.strerror}]\n"))
            behind = Position(position.part, end)
        return text, behind if behind.offset < end else Position(position.part + 1)

    def _first(self, part: int) -> Position:
        if self._start >= self._snapshot.output_size:
            return Position(part + 1)
        return Position(part, self._start)

    def _head(self) -> str:
        head = opened({"event": f"job.{self._kind}"}, "job", ascii=True)
        job = opened(encoding.job_fields(self._snapshot), "stdout", ascii=True)
        return 'a["' + _escaped(f'{head}{job}"{_escaped(self._left_out())}')

    def _left_out(self) -> str:
        if not self._start:
            return ""
        return f"[the first {self._start} bytes: GET /task/{self._snapshot.id}/log]\n"

    def _stdout(self, position: Position, end: int, size: int) -> tuple[str, Position]:
        output, offset, record = self._output, position.offset, position.record
        if offset and not record:
            record = output.record_at(offset)
        reader = Reader(output, offset, record, _STDOUT_CODE)
        parts: list[str] = []
        for count, chunk in enumerate(reader.read(_stop(output, offset, end, size)), 1):
            parts.append(chunk.data.decode("utf-8", "replace"))
            if not chunk.data or count == _MAX_CHUNKS:
                break
        return "".join(parts), Position(_STDOUT, reader.offset, reader.record)


async def start_offset(output: Output, turns: TurnScheduler, size: int, limit: int) -> int:
    """Return the byte from which on the output fits into a text of a message.

    From there to ``size`` are at most ``limit`` bytes, and at most half as many again once
    they are JSON inside JSON. Raises OSError if the output cannot be read.
    """
    start = output.character_start(size - limit) if size > limit else 0
    room = limit * _MAX_ENCODED
    at = size
    while at > start:
        before = max(start, output.character_start(max(0, at - PIECE_BYTES)))
        room -= len(_escaped(_escaped(read_text(output, before, at, at - before)[0])))
        if room < 0:
            return at
        at = before
        if at > start and (size - at) % _MEASURED_BYTES < PIECE_BYTES:
            await turns.wait()
    return start


def read_text(output: Output, offset: int, end: int, size: int) -> tuple[str, int]:
    """Return about ``size`` bytes of text from a byte on, and the byte behind them."""
    stop = _stop(output, offset, end, size)
    while True:
        hole_start, hole_end = output.cut()
        text = "".join(output.text(offset, stop))
        if output.cut() == (hole_start, hole_end):
            break  # otherwise some output was dropped meanwhile
    if offset < hole_end and hole_start < stop:
        stop = max(stop, hole_end)
    return text, stop


def _stop(output: Output, offset: int, end: int, size: int) -> int:
    return output.character_start(offset + size) if offset + size < end else end


def _escaped(text: str) -> str:
    """Return a text as it stands between quotation marks in JSON, in ASCII."""
    return escaped(text, ascii=True)
