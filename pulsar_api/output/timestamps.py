"""The times at which the lines of an output were printed."""

from datetime import UTC, datetime

from attrs import define, field

from pulsar_api.output.files import Output
from pulsar_api.output.reader import Chunk
from pulsar_api.output.records import NO_TIME


@define(eq=False)
class Timed:
    """Tells when the chunks of an output were printed."""

    output: Output
    _fresh: bool = True
    """Whether the next byte begins a line."""
    _began: int | None = field(default=None, init=False)
    _asked: bool = field(default=False, init=False)

    def moment(self, chunk: Chunk) -> int | None:
        """Return when a chunk was printed, in milliseconds since 1970; None if unknown."""
        if not self._asked:
            self._asked, self._began = True, self.output.began()
        moment = None if self._began is None else self._began + chunk.at
        return None if moment is None or moment >= NO_TIME else moment

    def dress(self, chunk: Chunk) -> bytes:
        """Return the bytes of a chunk with a timestamp before each line, if it is known.

        A timestamp is in UTC with milliseconds (RFC 3339).
        """
        stamp = _stamp(self.moment(chunk))
        lines = _lines(chunk.data)
        result = b"".join(
            (stamp if number or self._fresh else b"") + line
            for number, line in enumerate(lines)
        )
        if lines:
            self._fresh = lines[-1].endswith(b"\n")
        return result


def _stamp(moment: int | None) -> bytes:
    if moment is None:
        return b""
    seconds, milliseconds = divmod(moment, 1000)
    time = datetime.fromtimestamp(seconds, UTC)
    return f"{time:%Y-%m-%dT%H:%M:%S}.{milliseconds:03}Z ".encode()


def _lines(data: bytes) -> list[bytes]:
    """Return the lines with their line feeds; no other character ends a line."""
    lines = [line + b"\n" for line in data.split(b"\n")]
    last = lines.pop()[:-1]
    return [*lines, last] if last else lines
