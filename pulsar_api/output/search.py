"""Searches an output for the lines that contain a text."""

from collections.abc import Iterator

from attrs import frozen

from pulsar_api.output.lines import BREAKS, STEP, LineIndex


@frozen
class Effort:
    """How much one search does, so that it answers soon."""

    matches: int = 1000
    """Lines that it finds at most."""
    size: int = 1 << 26
    """Bytes that it reads at most."""
    step: int = STEP
    """Bytes that it reads in one iteration of the reactor."""


_DEFAULT = Effort()


@frozen
class Found:
    """The result of a search, and how far it went."""

    matches: list[tuple[int, int]]
    """The number of each line, and the offset of the first match in it."""
    next: int | None
    """The offset at which to go on; None if everything was searched."""
    searched: int
    """The number of bytes that were searched."""


async def search(
    index: LineIndex, text: str, start: int, effort: Effort = _DEFAULT
) -> Found:
    """Return the lines from an offset on that contain a text.

    The case of ASCII letters does not matter. The search ends early at its bounds, and
    when more of the output is cut meanwhile, as that changes the numbers of lines.

    Raises `OSError` if the output cannot be read.
    """
    needle = text.encode().lower()
    matches: list[tuple[int, int]] = []
    size, cut = index.size, index.cut
    at, searched = start, 0
    line = index.line_at(at) if at < size else 0
    told = False  # whether the line that `at` is in the middle of was found already
    while at < size and searched < effort.size and len(matches) < effort.matches:
        if cut[0] <= at < cut[1]:
            at, line, told = cut[1], index.line_at(cut[0]) + BREAKS, False
            continue
        stop = cut[0] if at < cut[0] else size
        length = min(effort.step, stop - at)
        # A match may extend into what the next step reads.
        await index.turns.wait()
        data = index.output.read(at, min(at + length + len(needle) - 1, stop)).lower()
        if index.output.cut() != cut:
            break
        counted, last = 0, 0 if told else -1
        for match in _firsts(data, needle, length, told=told):
            line += data.count(b"\n", counted, match)
            counted = last = match
            matches.append((line, at + match))
            if len(matches) == effort.matches:
                length = data.find(b"\n", match, length) + 1 or length
                break
        line += data.count(b"\n", counted, length)
        told = last >= 0 and data.find(b"\n", last, length) < 0
        at += length
        searched += length
    return Found(matches, at if at < size else None, searched)


def _firsts(data: bytes, needle: bytes, end: int, *, told: bool) -> Iterator[int]:
    """Yield the position of the first match in each line, if it begins before ``end``.

    ``told``: skip the line that the data begins with.
    """
    at = data.find(b"\n", 0, end) + 1 or end if told else 0
    while at < end:
        match = data.find(needle, at, end + len(needle) - 1)
        if match < 0:
            return
        yield match
        at = data.find(b"\n", match, end) + 1 or end
