"""Finds the lines of an output that have a text."""

from collections.abc import Iterator

from attrs import frozen

from pulsar_api.output.lines import BREAKS, STEP, LineIndex


@frozen
class Effort:
    """How much is done at once, so that nobody waits for long."""

    matches: int = 1000
    """Lines that are found at most."""
    size: int = 1 << 26
    """Bytes that are looked at."""
    step: int = STEP
    """How many of them in one turn of the reactor."""


_USUAL = Effort()


@frozen
class Found:
    """What a search has found, and how far it went."""

    matches: list[tuple[int, int]]
    """Of each line its number, and where the first match in it begins."""
    next: int | None
    """Where to go on; None: all was looked at."""
    searched: int
    """How many bytes were."""


async def search(index: LineIndex, text: str, start: int, effort: Effort = _USUAL) -> Found:
    """Look from a byte on for lines that have a text, whatever the case of ASCII letters.

    Ends early at its bounds, or when more of the output is cut meanwhile, as lines have
    other numbers then.
    """
    needle = text.encode().lower()
    matches: list[tuple[int, int]] = []
    size, cut = index.size, index.cut
    at, searched = start, 0
    line = index.line_at(at) if at < size else 0
    told = False  # whether the line that goes on at `at` is among the matches
    while at < size and searched < effort.size and len(matches) < effort.matches:
        if cut[0] <= at < cut[1]:
            at, line, told = cut[1], index.line_at(cut[0]) + BREAKS, False
            continue
        stop = cut[0] if at < cut[0] else size
        length = min(effort.step, stop - at)
        # A match may go on in what the next turn looks at.
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
    """Yield where in each line the first match begins, of those that do before ``end``.

    ``told``: not in the line that the data begin with.
    """
    at = data.find(b"\n", 0, end) + 1 or end if told else 0
    while at < end:
        match = data.find(needle, at, end + len(needle) - 1)
        if match < 0:
            return
        yield match
        at = data.find(b"\n", match, end) + 1 or end
