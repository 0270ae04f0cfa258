"""Colours and other styles of a terminal that are in force at a place in an output."""

import re

from attrs import frozen

SEQUENCES = 20
"""Sequences that a style keeps at most."""
LONGEST = 200
"""Characters of the parameters of a sequence, and of the text of a style, at most."""

_SEQUENCE = re.compile(rb"\x1b\[([0-9;:]{0,%d})m" % LONGEST)
_TORN = re.compile(rb"\x1b(?:\[[0-9;:]{0,%d})?\Z" % LONGEST)
_FAR = LONGEST + 2  # bytes of the longest start of a sequence


@frozen
class Style:
    """How a terminal shows what follows a byte (ECMA-48, SGR)."""

    kept: bytes = b""
    """The parameters of the latest sequences since the last reset, each ended by ``m``.

    There are at most `SEQUENCES`, so a style is small whatever a task prints.
    """
    older: int = 0
    """How many earlier sequences are in force, but too many to be kept."""
    torn: bytes = b""
    """The start of a sequence that may continue with the next byte."""

    def after(self, data: bytes, at: int, end: int) -> "Style":
        """Return the style after the bytes ``data[at:end]``."""
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
        """The style without the start of a sequence."""
        return Style(self.kept, self.older)

    @property
    def text(self) -> str:
        """The style as the parameters of one sequence, or "" if that is too long."""
        return "" if self.older else self.kept[:-1].replace(b"m", b";").decode()


def _latest(data: bytes, at: int, end: int) -> tuple[bool, list[bytes]]:
    """Return whether there is a reset, and the parameters of the sequences after it.

    Of many sequences only the latest are returned.
    """
    latest: list[bytes] = []
    # From the end backwards: mostly the first part is enough.
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


PLAIN = Style()
