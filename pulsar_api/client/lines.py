"""Reads event streams line by line."""

from collections import deque
from typing import Any, cast

from twisted.internet.defer import Deferred
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone, ResponseFailed

from pulsar_api.client.http import TooLarge
from pulsar_api.client.retries import BROKEN

_MAX_BUFFERED = 1 << 20  # bytes that wait to be read before the daemon is paused
_MAX_LINE = 4 << 20  # bytes of one line


class Lines(Protocol):
    """Reads the body of an answer line by line, no faster than it is asked for."""

    def __init__(self) -> None:
        self._lines: deque[bytes] = deque()
        self._rest = b""
        self._waiting: Deferred[None] | None = None
        self._end: Failure | None = None
        self._buffered = 0
        self._paused = False

    def dataReceived(self, data: bytes) -> None:
        """Receive bytes."""
        *whole, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _MAX_LINE:
            self._rest = b""
            self.close()
            self._end = Failure(TooLarge(_MAX_LINE))
        self._lines.extend(whole)
        self._buffered += len(data)
        if self._buffered > _MAX_BUFFERED and not self._paused:
            self._paused = True
            cast("Any", self.transport).pauseProducing()
        self._wake()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Receive the end of the body."""
        self._end = self._end or reason
        self._wake()

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.callback(None)

    def next(self) -> Deferred[bytes | None]:
        """Fire with the next line, None at the end; fail if the body is incomplete."""
        return Deferred.fromCoroutine(self._next())

    async def _next(self) -> bytes | None:
        while not self._lines:
            if self._end is not None:
                if self._end.check(ResponseDone):
                    return None
                self._end.trap(*BROKEN)  # after anything else another try makes no sense
                raise ResponseFailed([self._end])
            if self._paused:
                self._paused = False
                cast("Any", self.transport).resumeProducing()
            self._waiting = Deferred()
            await self._waiting
        line = self._lines.popleft()
        self._buffered -= len(line) + 1
        return line

    def close(self) -> None:
        """Stop reading and close the connection."""
        if self._end is None and self.transport is not None:
            cast("Any", self.transport).loseConnection()
