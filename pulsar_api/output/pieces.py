"""Reads a part of an output with the stream that printed it, and when."""

from attrs import frozen

from pulsar_api.concurrency.turns import TurnScheduler
from pulsar_api.output.files import Output
from pulsar_api.output.reader import Reader

Piece = tuple[int | None, int, str]
"""A stream or None, milliseconds since the shim began, and text."""

_TURN = 256  # chunks that are read in one turn of the reactor


@frozen
class Portion:
    """How much is read at once."""

    size: int = 1 << 18
    """Bytes at most, with a few for the last character."""
    pieces: int = 4096


_USUAL = Portion()


@frozen
class Pieces:
    """What was printed between two bytes of an output."""

    start: int
    next: int
    """Where to go on: behind the last piece, and behind what was cut out there."""
    pieces: list[Piece]


async def read_pieces(
    output: Output, turns: TurnScheduler, start: int, end: int, portion: Portion = _USUAL
) -> Pieces:
    """Read from the character at ``start`` to ``end``, or less if that is too much.

    Neighbours of one stream and time are one piece.
    """
    start = output.character_start(start)
    stop = _between_characters(output, start, min(end, start + portion.size))
    await turns.wait()
    reader = Reader(output, start, output.record_at(start) if start else 0, timed=True)
    found: list[Piece] = []
    for count, chunk in enumerate(reader.read(stop), 1):
        if not chunk.data or count % _TURN == 0:
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
    """Return where the character begins that ``stop`` is in; of the first one the end."""
    begin = output.character_start(stop)
    if begin > start:
        return begin
    # Else nobody who asks for a part of a character would ever get further.
    return next(at for at in range(stop, stop + 4) if output.character_start(at) == at)
