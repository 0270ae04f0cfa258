"""Reads a part of an output in pieces, with their streams and times."""

from attrs import frozen

from pulsar_api.concurrency.turns import TurnScheduler
from pulsar_api.output.files import Output
from pulsar_api.output.reader import Reader

Piece = tuple[int | None, int, str]
"""A stream or None, milliseconds since the shim began, and text."""

_STEP = 256  # chunks that are read in one iteration of the reactor


@frozen
class Portion:
    """How much is read for one answer."""

    size: int = 1 << 18
    """Bytes at most, apart from those that complete the last character."""
    pieces: int = 4096


_DEFAULT = Portion()


@frozen
class Pieces:
    """The pieces in a part of an output."""

    start: int
    next: int
    """The offset at which to go on: after the last piece, and after a gap there."""
    pieces: list[Piece]


async def read_pieces(
    output: Output, turns: TurnScheduler, start: int, end: int, portion: Portion = _DEFAULT
) -> Pieces:
    """Return the pieces from the character at ``start`` up to ``end``, or fewer.

    Adjacent pieces of one stream and time are joined.

    Raises `OSError` if the output cannot be read.
    """
    start = output.character_start(start)
    stop = _between_characters(output, start, min(end, start + portion.size))
    await turns.wait()
    reader = Reader(output, start, output.record_at(start) if start else 0, timed=True)
    found: list[Piece] = []
    for count, chunk in enumerate(reader.read(stop), 1):
        if not chunk.data or count % _STEP == 0:
            await turns.wait()
        if not chunk.data:
            continue
        text = chunk.data.decode("utf-8", "replace")
        if found and found[-1][:2] == (chunk.stream, chunk.at):
            text = found.pop()[2] + text
        found.append((chunk.stream, chunk.at, text))
        if len(found) == portion.pieces:
            break
    return Pieces(start, reader.offset, found)


def _between_characters(output: Output, start: int, stop: int) -> int:
    """Return the start of the character at ``stop``, or the end of the first character."""
    begin = output.character_start(stop)
    if begin > start:
        return begin
    # Otherwise a caller that asks for a part of a character would never get further.
    return next(at for at in range(stop, stop + 4) if output.character_start(at) == at)
