"""The bounds that ``twisted.web`` lacks: deadlines, sizes, numbers; and no access log."""

from collections import OrderedDict
from typing import Any, cast

from attrs import frozen
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
from twisted.web.http_headers import Headers
from twisted.web.iweb import IRequest
from twisted.web.resource import IResource
from twisted.web.server import Request, Site

from pulsar_api.web import limits
from pulsar_api.web.headers import ALWAYS
from pulsar_api.web.refusals import (
    BODY_DEADLINE,
    HEAD_DEADLINE,
    MALFORMED,
    MAX_BODY,
    TOO_LARGE,
    TOO_MANY,
    TOO_MANY_FROM_ADDRESS,
    TOO_SLOW,
    TooManyRequests,
)

IDLE = 60.0
"""Seconds that a connection may stay open between two requests."""
STALL = 3600.0
"""Seconds in which a client must take what fills its buffer, 64 KiB at least.

So long because a person may page through what ``curl`` gets, and have lunch meanwhile.
"""
YIELD = 10.0
"""Seconds after which a connection that does nothing gives way when all are taken."""
BURST = 5
"""Seconds' worth of requests that an address may send at once."""
LINGER = 2.0
"""Seconds in which a refused client can read why, before the connection is cut."""
_MAX_REFUSED = 64  # connections that are being told that there are too many


class BoundedRequest(Request):
    """A request whose body is kept in memory and has a bound."""

    channel: "BoundedChannel"
    _received = 0

    def gotLength(self, length: int | None) -> None:
        """Refuse a body that announces itself as too large before it is sent."""
        super().gotLength(0)  # always in memory, never a temporary file
        if length is not None and length > MAX_BODY:
            self.channel.refuse(TOO_LARGE)

    def handleContentChunk(self, data: bytes) -> None:
        """Count while it arrives: a chunked body announces nothing."""
        self._received += len(data)
        if self._received > MAX_BODY:
            self.channel.refuse(TOO_LARGE)
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
    source: str | None
    """Whom it counts for, see `limits.source`."""
    transport: Any  # TCP or TLS round it; both can abort
    stall = STALL
    """How long this client may leave what fills its buffer."""
    _deadline: IDelayedCall | None = None
    _stalled: IDelayedCall | None = None
    _serving = False
    _refused = False
    _gone = False

    def connectionMade(self) -> None:
        """Start the clock: whoever connects has to say something."""
        super().connectionMade()
        self._expect(HEAD_DEADLINE)
        self._note()

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
        self.refuse(MALFORMED)

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
        self.stall = STALL
        self._serve(False)
        super().requestDone(request)

    def writeHeaders(
        self, version: bytes, code: bytes, reason: bytes, headers: Headers
    ) -> None:
        """Send the head of an answer, whoever made it; which version of what is secret."""
        headers.removeHeader("Server")
        for name, value in ALWAYS:
            if not headers.hasHeader(name):
                headers.setRawHeaders(name, [value])
        super().writeHeaders(version, code, reason, headers)

    def pauseProducing(self) -> None:
        """The client reads more slowly than we write; it may, but not for ever."""
        if self._stalled is None:
            self._stalled = self.callLater(self.stall, self._stuck)
        self._note()
        super().pauseProducing()

    def resumeProducing(self) -> None:
        """It has read what there was."""
        self._flows()
        self._note()
        super().resumeProducing()

    def timeoutConnection(self) -> None:
        """Hang up on who asks nothing any more, without a word in the log."""
        self._refused = True
        self._expect(LINGER)
        self.loseConnection()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Stop all clocks."""
        self._expect(None)
        self._flows()
        self._serve(False)
        self._leave()
        super().connectionLost(reason)

    def give_way(self) -> None:
        """Hang up at once: somebody else needs the place."""
        self._leave()
        self.transport.abortConnection()

    def refuse(self, answer: bytes) -> None:
        """Answer now, read no more, and cut when the client had time to read it."""
        if not self._refused:
            self._refused = True
            self.transport.write(self.site.strict(answer, self.transport))
            self._expect(LINGER)

    def _serve(self, serving: bool) -> None:  # noqa: FBT001
        self.site.serving += serving - self._serving
        self._serving = serving
        self._note()

    def _note(self) -> None:
        """Keep the site's list of connections that do nothing true."""
        if self._gone or (self._serving and self._stalled is None):
            self.site.resting.pop(self, None)
        else:
            self.site.resting.setdefault(self, self.site.reactor.seconds())

    def _leave(self) -> None:
        if not self._gone:
            self._gone = True
            self._note()
            self.site.left(self)

    def _flows(self) -> None:
        if self._stalled is not None and self._stalled.active():
            self._stalled.cancel()
        self._stalled = None

    def _stuck(self) -> None:
        self.transport.abortConnection()

    def _respondToBadRequestAndDisconnect(self) -> None:
        # Twisted's own answer has no body. If this hook went away, that would come back.
        self.refuse(MALFORMED)

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
            self.refuse(TOO_SLOW)


class _Full(Protocol):
    """Says that there are too many connections, and ends."""

    transport: Any
    _cut: IDelayedCall | None = None

    def __init__(self, site: "BoundedSite", why: bytes) -> None:
        self._site = site
        self._why = why

    def connectionMade(self) -> None:
        self._site.refused += 1
        if self._site.refused > _MAX_REFUSED:
            # They take files too: hang up without a word.
            self.transport.abortConnection()
            return
        self.transport.write(self._site.strict(self._why, self.transport))
        self.transport.loseConnection()
        # Over TLS who says nothing would stay until the handshake, which is for ever.
        clock = self._site.reactor
        self._cut = clock.callLater(LINGER, self.transport.abortConnection)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._site.refused -= 1
        if self._cut is not None and self._cut.active():
            self._cut.cancel()


@frozen
class Most:
    """How much the daemon serves. 0 of what is for one address is any number."""

    connections: int
    """At a time, of all."""
    connections_of_address: int = 1000
    """At a time; in any case no more than a quarter of all."""
    requests_of_address: int = 100
    """In a second; `BURST` times as many at once after a silence."""


class BoundedSite(Site):
    """Serves a resource to a bounded number of connections.

    ``hsts``: seconds for which a browser shall come back by TLS only, 0 for not said.
    """

    # One protocol class rather than Twisted's chooser: no HTTP/2 to bound as well.
    protocol: Any = BoundedChannel
    requestFactory = BoundedRequest

    def __init__(
        self, resource: IResource, clock: IReactorTime, most: Most, hsts: int = 0
    ) -> None:
        super().__init__(
            resource, timeout=IDLE, reactor=clock, parsePOSTFormSubmission=False
        )
        self.most = most.connections
        self.hsts = hsts
        self.connections = 0
        self.refused = 0
        self.serving = 0
        """How many requests are being answered."""
        self.resting: OrderedDict[BoundedChannel, float] = OrderedDict()
        """Connections that wait for the client, since when; the longest first."""
        share = self.most + 1  # nobody meets it
        if most.connections_of_address:
            share = min(most.connections_of_address, self.most // 4)
        self._places = limits.Places(share)
        per_second = most.requests_of_address or 10**9
        self._rate = limits.Rate(clock, per_second, BURST * per_second)

    def buildProtocol(self, addr: IAddress | None) -> Any:
        """Return a channel, or something that says that there are too many."""
        source = limits.source(addr)
        if not self._places.take(source):
            return _Full(self, TOO_MANY_FROM_ADDRESS)
        if self.connections >= self.most and not self._make_room():
            self._places.give_back(source)
            return _Full(self, TOO_MANY)
        self.connections += 1
        channel = cast("BoundedChannel", super().buildProtocol(addr))
        channel.source = source
        return channel

    def _make_room(self) -> bool:
        """Hang up on who has done nothing for longest, be that long enough."""
        for channel, since in self.resting.items():
            if self.reactor.seconds() - since < YIELD:
                break
            channel.give_way()
            return True
        return False

    def left(self, channel: BoundedChannel) -> None:
        """Give the place of a connection back."""
        self.connections -= 1
        self._places.give_back(channel.source)

    def getResourceFor(self, request: BoundedRequest) -> Any:
        """Return who answers: before any routing, whether the address asks too often."""
        wait = self._rate.wait(request.channel.source)
        if wait:
            return TooManyRequests(self.reactor, wait)
        return super().getResourceFor(request)

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
