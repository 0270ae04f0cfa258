"""One connection: HTTP/1.1 with deadlines and bounds, answered from the head on."""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, Protocol, cast

from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.internet.protocol import connectionDone
from twisted.python.failure import Failure
from twisted.web.http_headers import Headers
from twisted.web.iweb import IRequest

from pulsar_api.web.headers import ALWAYS
from pulsar_api.web.server.body import BodyRequest, BodyTooSlow
from pulsar_api.web.server.hooks import HookedChannel, MalformedChunk
from pulsar_api.web.server.limits import Budget, UnidentifiedMemory
from pulsar_api.web.server.refusals import (
    BODY_DEADLINE,
    HEAD_DEADLINE,
    MALFORMED,
    MAX_HEADERS,
    MAX_NAME,
    TOO_SLOW,
)

STALL = 3600.0
"""Seconds in which a client must read what fills its buffer, 64 KiB at least.

So long because a person may page through what ``curl`` gets, and have lunch meanwhile.
"""
MAX_DISCARDED = 1 << 16
"""Bytes of an unwanted body that are read so that the connection can be used again."""
LINE_OVERHEAD = 300
"""Bytes that a line of a head takes in memory beside its own."""
LINGER = 2.0
"""Seconds for a refused client to read why, before the connection is cut."""


class Site(Protocol):
    """What a channel needs of the site that it belongs to."""

    reactor: IReactorTime
    hsts: int
    serving: int
    bodies: Budget
    unidentified: UnidentifiedMemory

    @property
    def idle(self) -> "OrderedDict[BoundedChannel, float]":
        """Connections that wait for the client, since when; the longest first."""

    def with_hsts(self, answer: bytes, transport: object) -> bytes:
        """Return an answer with the header for TLS connections."""

    def connection_ended(self, channel: "BoundedChannel") -> None:
        """Give the place of a connection back."""


class BoundedChannel(HookedChannel):
    """A connection with a deadline for each head, each body, and each refused client."""

    site: Site
    source: str | None
    """The address or network that it counts for, see `limits.source`."""
    maxHeaders = MAX_HEADERS
    stall = STALL
    """How long, in seconds, this client may leave a full send buffer unread."""
    _deadline: IDelayedCall | None = None
    _stalled: IDelayedCall | None = None
    _serving = False
    _refused = False
    _gone = False
    _known = False
    """Whether the caller of the request that is being answered has been identified."""
    _decoder: Any = None
    """Twisted's decoder of the body that is on its way."""
    _continue_expected = False
    """Whether the client waits for ``100 Continue`` before it sends the body."""
    _late = False
    """Whether the body has missed its deadline."""
    _closing = False
    """Whether the connection ends with the answer that is being sent."""

    def connectionMade(self) -> None:
        """Start the deadline of the first head."""
        super().connectionMade()
        self._set_deadline(HEAD_DEADLINE)
        self._update_idle()

    def dataReceived(self, data: bytes) -> None:
        """Receive bytes, unless the request that they belong to has been refused."""
        if self._refused:
            return
        if self._deadline is None and not self._serving and self._decoder is None:
            self._set_deadline(HEAD_DEADLINE)
        # A head of many lines takes more memory than its bytes.
        lines = data.count(b"\n") if self.line_mode else 0
        super().dataReceived(data)
        if (
            not self._known
            and (self.requests or self.has_partial_line())
            and not self._gone
        ):
            self.site.unidentified.hold(self, len(data) + LINE_OVERHEAD * lines)

    def lineReceived(self, line: bytes) -> None:
        """Receive a line of the head, unless an earlier one was refused."""
        if not self._refused:
            super().lineReceived(line)

    def lineLengthExceeded(self, line: bytes) -> None:
        """Refuse the request with a reason; Twisted would only hang up."""
        self.refuse(MALFORMED)

    def malformed(self) -> None:
        """Refuse the request with a reason; Twisted's answer would have no body."""
        self.refuse(MALFORMED)

    def headerReceived(self, line: bytes) -> bool:
        """Refuse a name that is too long; Twisted keeps 10,000 of them for ever."""
        if line.find(b":") > MAX_NAME:
            self.refuse(MALFORMED)
            return False
        received: bool = super().headerReceived(line)
        return received

    def allHeadersReceived(self) -> None:
        """End the deadline of the head; the answer begins before the body has come."""
        self._set_deadline(None)
        super().allHeadersReceived()
        if not self._refused and self.length != 0:
            self._decoder = self.body_decoder()
            self.length = 0  # so that Twisted takes the request for complete

    def allContentReceived(self) -> None:
        """Begin the answer, which has no deadline."""
        if self._refused:
            return
        if self._decoder is None:
            self._set_deadline(None)
            self._serve(True)
        super().allContentReceived()

    def requestDone(self, request: IRequest) -> None:
        """End an answer, and wait for the rest of its body or for the next request."""
        self.stall = STALL
        self._serve(False)
        self._forget_caller()
        if isinstance(request, BodyRequest) and request.body is not None:
            request.body.drop()
        if self._decoder is None:
            super().requestDone(request)
            return
        # The rest of the body comes before the next request.
        closing = self._closing or not self.persistent
        self.persistent = 1
        super().requestDone(request)
        self.setRawMode()
        if closing:
            # Not at once: a client that is still sending would not read the answer.
            self._refused = True
            self._set_deadline(LINGER)
        else:
            self._set_deadline(BODY_DEADLINE)

    # -- the body

    def start_body(self) -> None:
        """Read the body, whose deadline begins now."""
        if self._continue_expected:
            self._continue_expected = False
            self.send_continue()
        self._set_deadline(BODY_DEADLINE)
        self.resume_reading()

    def continue_expected(self) -> None:
        """Note it: the client is told to go on when a route reads the body."""
        self._continue_expected = True

    def rawDataReceived(self, data: bytes) -> None:
        """Receive a part of the body, or what follows a request that is answered."""
        if self._refused:
            return
        if self._decoder is None:
            super().rawDataReceived(data)
            return
        try:
            self._decoder.dataReceived(data)
        except MalformedChunk:
            self.refuse(MALFORMED)

    def body_finished(self, rest: bytes) -> None:
        """Hand the body to its request; ``rest`` begins the next one."""
        self._decoder = None
        self._continue_expected = False
        self._set_deadline(None)
        if not self.requests:
            self.setLineMode(rest)  # the answer ended before its body
            return
        self._serve(True)
        request = cast("BodyRequest", self.requests[-1])
        if rest:
            super().rawDataReceived(rest)
        assert request.body is not None
        request.body.end()

    def _can_discard_body(self) -> bool:
        """Return whether the rest of an unwanted body is small enough to be read."""
        body = cast("BodyRequest", self.requests[0]).body
        if body is None or body.length is None or self._continue_expected or self._late:
            return False
        return body.length - body.received <= MAX_DISCARDED

    # -- the caller

    def caller_known(self) -> None:
        """Count the memory of this connection no longer as that of an unknown caller."""
        self._known = True
        self.site.unidentified.free(self)

    def _forget_caller(self) -> None:
        self._known = False
        self.site.unidentified.free(self)

    def writeHeaders(
        self, version: bytes, code: bytes, reason: bytes, headers: Headers
    ) -> None:
        """Send the head of an answer with the headers of every answer, without Server."""
        if self._refused:
            return
        headers.removeHeader("Server")
        for name, value in ALWAYS:
            if not headers.hasHeader(name):
                headers.setRawHeaders(name, [value])
        if self._decoder is not None and not self._can_discard_body():
            self._closing = True
            headers.setRawHeaders("Connection", ["close"])
        super().writeHeaders(version, code, reason, headers)

    def pauseProducing(self) -> None:
        """Stop writing to a slow client, and give it `stall` seconds to read."""
        if self._stalled is None:
            self._stalled = self.callLater(self.stall, self._stuck)
        self._update_idle()
        super().pauseProducing()

    def resumeProducing(self) -> None:
        """Write again: the client has read."""
        self._end_stall()
        self._update_idle()
        super().resumeProducing()

    def timeoutConnection(self) -> None:
        """Hang up on an idle client, without a line in the log."""
        self._refused = True
        self._set_deadline(LINGER)
        self.loseConnection()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """End all deadlines and give the place back."""
        self._set_deadline(None)
        self._end_stall()
        self._serve(False)
        self._leave()
        super().connectionLost(reason)
        self._decoder = None

    def evict(self) -> None:
        """Hang up at once, as another client needs the place or the memory."""
        self._refused = True
        self.drop_received()
        self._leave()
        self.transport.abortConnection()

    def refuse(self, answer: bytes) -> None:
        """Send an answer, read no more, and cut the connection `LINGER` seconds later."""
        if self._refused:
            return
        self._refused = True
        if self.requests and self.requests[0].startedWriting:
            self.transport.abortConnection()
            return
        self.transport.write(self.site.with_hsts(answer, self.transport))
        self._set_deadline(LINGER)

    def write(self, data: bytes) -> None:
        """Send a part of an answer, unless its request was refused meanwhile."""
        if not self._refused:
            super().write(data)

    def writeSequence(self, iovec: Iterable[bytes]) -> None:
        """Send parts of an answer, unless its request was refused meanwhile."""
        if not self._refused:
            super().writeSequence(iovec)

    def _serve(self, serving: bool) -> None:  # noqa: FBT001
        self.site.serving += serving - self._serving
        self._serving = serving
        self._update_idle()

    def _update_idle(self) -> None:
        """Add this connection to the idle ones of the site, or remove it."""
        if self._gone or (self._serving and self._stalled is None):
            self.site.idle.pop(self, None)
        else:
            self.site.idle.setdefault(self, self.site.reactor.seconds())

    def _leave(self) -> None:
        if not self._gone:
            self._gone = True
            self._update_idle()
            self._forget_caller()
            self.site.connection_ended(self)

    def _end_stall(self) -> None:
        if self._stalled is not None and self._stalled.active():
            self._stalled.cancel()
        self._stalled = None

    def _stuck(self) -> None:
        self.transport.abortConnection()

    def _set_deadline(self, seconds: float | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if seconds is not None:
            self._deadline = self.callLater(seconds, self._too_late)

    def _too_late(self) -> None:
        self._deadline = None
        if self._refused or (self._decoder is not None and not self.requests):
            self.transport.abortConnection()
        elif self._decoder is not None:
            self._late = True
            body = cast("BodyRequest", self.requests[-1]).body
            assert body is not None
            body.fail(BodyTooSlow(BODY_DEADLINE))
        else:
            self.refuse(TOO_SLOW)
