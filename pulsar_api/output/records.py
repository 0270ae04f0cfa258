"""The format of the index of an output: records of 16 bytes, and what was cut out."""

from struct import Struct
from typing import NamedTuple

from attrs import frozen

from pulsar_api.shim.shim import RECORD, STDERR, STDOUT

NAMES = {STDOUT: "stdout", STDERR: "stderr"}
"""The names of the streams, by the codes of their records."""

PRINTED = frozenset(NAMES)
"""Codes of records of output."""

BLOCK = 4096
"""Records that are read at once."""

FIELDS = Struct("<QQ")
"""A record: a number; milliseconds above the lowest byte, and in that the code."""

NO_TIME = 253_402_300_800_000
"""Milliseconds from 1970 to the year 10000."""

LARGEST = 1 << 53
"""Bytes that a task may say it has printed: sums of many such still fit into 64 bits."""

_FAR = 1 << 63  # more than the size of any file


@frozen
class Record:
    """One record of ``output.idx``: what happened, a number that belongs to it, and when.

    For output the number is the offset at which the piece ends; for a start it is the
    process number. ``at`` is in milliseconds since the shim began.
    """

    code: int
    number: int
    at: int

    @classmethod
    def parse(cls, data: bytes) -> "Record":
        """Return the record that these 16 bytes are."""
        number, rest = FIELDS.unpack(data)
        return cls(rest & 0xFF, number, rest >> 8)


class Cut(NamedTuple):
    """What was cut out of the middle of an output and of its index; by default nothing."""

    start: int = 0
    end: int = 0
    """The bytes of the output in ``range(start, end)`` were cut."""
    first: int = 0
    next: int = 0
    """The records of the index in ``range(first, next)`` were cut.

    All of them were of bytes that were cut.
    """

    @classmethod
    def parse(cls, data: bytes) -> "Cut":
        """Return what the file ``cut`` says.

        A shim of an older version has written only two numbers: it cuts no index.

        Raises `ValueError` if the file makes no sense.
        """
        numbers = [int(text) for text in data.split()]
        start, end, first, stop = numbers if len(numbers) != 2 else (*numbers, 0, 0)
        if not (0 <= start <= end < _FAR and 0 <= first <= stop < _FAR):
            raise ValueError(data)
        return cls(start, end, first // RECORD, stop // RECORD)

    def holds(self, offset: int) -> bool:
        """Return whether the byte at this offset of the output was cut."""
        return self.start <= offset < self.end


class Block(NamedTuple):
    """Some thousands of records, as bytes."""

    first: int
    """The number of the first record."""
    data: bytes
    more: bool
    """Whether there may be more records after these."""
    cut: Cut
    """The part that was cut out; it is read after the records."""


NOTHING_CUT = Cut()
