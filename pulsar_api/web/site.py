"""The bounds that ``twisted.web`` lacks: deadlines, sizes, numbers; and no access log."""

from typing import Any

from twisted.internet.interfaces import (
    IAddress,
    IDelayedCall,
    IReactorTime,
    ISSLTransport,
)
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from twisted.web.http import HTTPChannel
from twisted.web.http import Request as HTTPRequest
from twisted.web.iweb import IRequest
from twisted.web.resource import IResource
from twisted.web.server import Request, Site

from pulsar_api import wire

HEAD_DEADLINE = 10.0
"""Seconds from a request's first byte to the end of its head, however it trickles."""
BODY_DEADLINE = 30.0
"""Seconds for the whole body."""
IDLE = 60.0
"""Seconds that a connection may stay open between two requests."""
LINGER = 2.0
"""Seconds in which a refused client can read why, before the connection is cut."""
MAX_BODY = 1 << 20
_MAX_REFUSED = 64  # connections that are being told that there are too many


def _raw_problem(
    status: int, reason: str, type_: str, detail: str, more: str = ""
) -> bytes:
    body = wire.problem(status, type_, reason, detail)
    head = (
        f"HTTP/1.1 {status} {reason}\r\nContent-Type: {wire.PROBLEM}\r\n{more}"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


_TOO_LARGE = _raw_problem(
    413,
    "Content Too Large",
    "body-too-large",
    f"A body may have {MAX_BODY} bytes at most.",
)
_TOO_SLOW = _raw_problem(
    408,
    "Request Timeout",
    "too-slow",
    f"The head of a request must arrive within {HEAD_DEADLINE:g} seconds, its body "
    f"within {BODY_DEADLINE:g} more.",
)
_MALFORMED = _raw_problem(
    400,
    "Bad Request",
    "malformed",
    "This is no HTTP/1.1 request whose head has 16 KiB at most.",
)
_TOO_MANY = _raw_problem(
    503,
    "Service Unavailable",
    "too-many-connections",
    "The daemon has as many connections as it can serve; try again in a moment.",
    "Retry-After: 5\r\n",
)


class BoundedRequest(Request):
    """A request whose body is kept in memory and has a bound."""

    channel: "BoundedChannel"
    _received = 0

    def gotLength(self, length: int | None) -> None:
        """Refuse a body that announces itself as too large before it is sent."""
        super().gotLength(0)  # always in memory, never a temporary file
        if length is not None and length > MAX_BODY:
            self.channel.refuse(_TOO_LARGE)

    def handleContentChunk(self, data: bytes) -> None:
        """Count while it arrives: a chunked body announces nothing."""
        self._received += len(data)
        if self._received > MAX_BODY:
            self.channel.refuse(_TOO_LARGE)
        else:
            super().handleContentChunk(data)

    def process(self) -> None:
        """Begin the answer with what every answer has."""
        site = self.channel.site
        if site.hsts and self.isSecure():
            self.setHeader("Strict-Transport-Security", f"max-age={site.hsts}")
        super().process()

    def getRequestHostname(self) -> bytes:
        """Return a constant: whatever the Host header says decides no route of ours."""
        return b"localhost"


class BoundedChannel(HTTPChannel):
    """HTTP/1.1 with a deadline for the head, for the body, and for the refused."""

    site: "BoundedSite"
    transport: Any  # TCP or TLS round it; both can abort
    _deadline: IDelayedCall | None = None
    _serving = False
    _refused = False

    def connectionMade(self) -> None:
        """Start the clock: whoever connects has to say something."""
        super().connectionMade()
        self._expect(HEAD_DEADLINE)

    def dataReceived(self, data: bytes) -> None:
        """Take bytes, unless the request they belong to has been refused."""
        if self._refused:
            return
        if self._deadline is None and not self._serving:
            self._expect(HEAD_DEADLINE)
        super().dataReceived(data)

    def lineReceived(self, line: bytes) -> None:
        """Take a line of the head, unless an earlier one was refused."""
        if not self._refused:
            super().lineReceived(line)

    def lineLengthExceeded(self, line: bytes) -> None:
        """Say why, where Twisted would only hang up."""
        self.refuse(_MALFORMED)

    def allHeadersReceived(self) -> None:
        """The head is there in time."""
        self._expect(BODY_DEADLINE)
        super().allHeadersReceived()

    def allContentReceived(self) -> None:
        """The request is whole; how long its answer takes is nobody's fault."""
        if self._refused:
            return
        self._expect(None)
        self._serve(True)
        super().allContentReceived()

    def requestDone(self, request: IRequest) -> None:
        """The answer is written; the next request may already be here."""
        self._serve(False)
        super().requestDone(request)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Stop all clocks."""
        self._expect(None)
        self._serve(False)
        self.site.connections -= 1
        super().connectionLost(reason)

    def refuse(self, answer: bytes) -> None:
        """Answer now, read no more, and cut when the client had time to read it."""
        if not self._refused:
            self._refused = True
            self.transport.write(self.site.strict(answer, self.transport))
            self._expect(LINGER)

    def _serve(self, serving: bool) -> None:  # noqa: FBT001
        self.site.serving += serving - self._serving
        self._serving = serving

    def _respondToBadRequestAndDisconnect(self) -> None:
        # Twisted's own answer has no body. If this hook went away, that would come back.
        self.refuse(_MALFORMED)

    def _send100Continue(self) -> None:
        if not self._refused:
            super()._send100Continue()

    def _expect(self, seconds: float | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if seconds is not None:
            self._deadline = self.callLater(seconds, self._too_late)

    def _too_late(self) -> None:
        self._deadline = None
        if self._refused:
            self.transport.abortConnection()
        else:
            self.refuse(_TOO_SLOW)


class _Full(Protocol):
    """Says that there are too many connections, and ends."""

    transport: Any
    _cut: IDelayedCall | None = None

    def __init__(self, site: "BoundedSite") -> None:
        self._site = site

    def connectionMade(self) -> None:
        self._site.refused += 1
        if self._site.refused > _MAX_REFUSED:
            # They take files too: hang up without a word.
            self.transport.abortConnection()
            return
        self.transport.write(self._site.strict(_TOO_MANY, self.transport))
        self.transport.loseConnection()
        # Over TLS who says nothing would stay until the handshake, which is for ever.
        clock = self._site.reactor
        self._cut = clock.callLater(LINGER, self.transport.abortConnection)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._site.refused -= 1
        if self._cut is not None and self._cut.active():
            self._cut.cancel()


class BoundedSite(Site):
    """Serves a resource to at most ``most`` connections at a time.

    ``hsts``: seconds for which a browser shall come back by TLS only, 0 for not said.
    """

    # One protocol class rather than Twisted's chooser: no HTTP/2 to bound as well.
    protocol: Any = BoundedChannel
    requestFactory = BoundedRequest

    def __init__(
        self, resource: IResource, clock: IReactorTime, most: int, hsts: int = 0
    ) -> None:
        super().__init__(
            resource, timeout=IDLE, reactor=clock, parsePOSTFormSubmission=False
        )
        self.most = most
        self.hsts = hsts
        self.connections = 0
        self.refused = 0
        self.serving = 0
        """How many requests are being answered."""

    def buildProtocol(self, addr: IAddress | None) -> Any:
        """Return a channel, or something that says that there are too many."""
        if self.connections >= self.most:
            return _Full(self)
        self.connections += 1
        return super().buildProtocol(addr)

    def strict(self, answer: bytes, transport: object) -> bytes:
        """Return an answer that was made beforehand, with HSTS if it goes over TLS."""
        if not self.hsts or not ISSLTransport.providedBy(transport):
            return answer
        line = f"\r\nStrict-Transport-Security: max-age={self.hsts}\r\n"
        return answer.replace(b"\r\n", line.encode(), 1)

    def startFactory(self) -> None:
        """Keep no access log: a line per poll costs a quarter and says nothing."""

    def log(self, request: HTTPRequest) -> None:
        """What changes something is logged where it is decided."""

    def acceptableProtocols(self) -> list[bytes]:
        """Offer HTTP/1.1 only."""
        return [b"http/1.1"]
