"""The bounds that ``twisted.web`` lacks: deadlines, sizes, numbers; and no access log."""

from collections import OrderedDict
from collections.abc import Iterable
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
from twisted.web.http import HTTPChannel, _MalformedChunkedDataError
from twisted.web.http import Request as HTTPRequest
from twisted.web.http_headers import Headers
from twisted.web.iweb import IRequest
from twisted.web.resource import IResource
from twisted.web.server import Site

from pulsar_api.web.headers import ALWAYS
from pulsar_api.web.server import limits
from pulsar_api.web.server.body import MAX_BODY, Body, BodyRequest, BodyTooSlow
from pulsar_api.web.server.refusals import (
    BODY_DEADLINE,
    HEAD_DEADLINE,
    MALFORMED,
    MAX_HEADERS,
    MAX_NAME,
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
STRANGERS = 4 << 20
"""Bytes that are held for all of whom nobody knows yet who they are."""
BODIES = 12 << 20
"""Bytes of bodies that are held for all callers together; for one, a third of it."""
REST = 1 << 16
"""Bytes of a body that nobody wants that are read for the next request's sake."""
LINE = 300
"""Bytes that a line of a head takes beside those it has."""
LINGER = 2.0
"""Seconds in which a refused client can read why, before the connection is cut."""
_MAX_REFUSED = 64  # connections that are being told that there are too many


class BoundedRequest(BodyRequest):
    """A request that is answered from its head on, and whose body has a bound."""

    channel: "BoundedChannel"

    def gotLength(self, length: int | None) -> None:
        """Refuse a body that announces itself as too large before it is sent."""
        super().gotLength(0)  # `body` has it
        if length is not None and length > MAX_BODY:
            self.channel.refuse(TOO_LARGE)
        elif length != 0:
            channel = self.channel
            self.body = Body(
                length, channel.site.bodies, channel.body_wanted, channel.body_waits
            )

    def handleContentChunk(self, data: bytes) -> None:
        """Take a piece of the body."""
        assert self.body is not None
        self.body.receive(data)

    def caller_known(self) -> None:
        """Count what this connection holds no longer as that of somebody unknown."""
        if not self.finished and self.channel is not None:
            self.channel.caller_known()

    def connectionLost(self, reason: Failure) -> None:
        """Hold nothing any more."""
        if self.body is not None:
            self.body.drop()
        super().connectionLost(reason)

    def process(self) -> None:
        """Begin the answer with what every answer has."""
        # Thousands of parameters and cookies take a hundred times their bytes; who wants
        # one reads it from the head.
        self.args = {}
        self.received_cookies.clear()
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
    maxHeaders = MAX_HEADERS
    stall = STALL
    """How long this client may leave what fills its buffer."""
    _deadline: IDelayedCall | None = None
    _stalled: IDelayedCall | None = None
    _serving = False
    _refused = False
    _gone = False
    _known = False
    """Whether somebody knows who has sent the request that is being answered."""
    _decoder: Any = None
    """Twisted's, of the body that is on its way."""
    _promised = False
    """Whether a client waits for ``100 Continue`` before it sends that."""
    _late = False
    """Whether the time for it is over."""
    _hanging_up = False
    """Whether the answer that is being sent is the last one."""

    def connectionMade(self) -> None:
        """Start the clock: whoever connects has to say something."""
        super().connectionMade()
        self._expect(HEAD_DEADLINE)
        self._note()

    def dataReceived(self, data: bytes) -> None:
        """Take bytes, unless the request they belong to has been refused."""
        if self._refused:
            return
        if self._deadline is None and not self._serving and self._decoder is None:
            self._expect(HEAD_DEADLINE)
        # A head of many lines takes more than its bytes.
        lines = data.count(b"\n") if self.line_mode else 0
        super().dataReceived(data)
        if not self._known and (self.requests or self._buffer) and not self._gone:
            self.site.strangers.hold(self, len(data) + LINE * lines)

    def lineReceived(self, line: bytes) -> None:
        """Take a line of the head, unless an earlier one was refused."""
        if not self._refused:
            super().lineReceived(line)

    def lineLengthExceeded(self, line: bytes) -> None:
        """Say why, where Twisted would only hang up."""
        self.refuse(MALFORMED)

    def headerReceived(self, line: bytes) -> bool:
        """Refuse a name that is too long; Twisted keeps 10,000 of them for ever."""
        if line.find(b":") > MAX_NAME:
            self.refuse(MALFORMED)
            return False
        received: bool = super().headerReceived(line)
        return received

    def allHeadersReceived(self) -> None:
        """The head is there in time; the answer begins before the body has come."""
        self._expect(None)
        super().allHeadersReceived()
        if not self._refused and self.length != 0:
            self._decoder = self._transferDecoder
            self.length = 0  # for Twisted the request is whole

    def allContentReceived(self) -> None:
        """Begin the answer; how long that takes is nobody's fault."""
        if self._refused:
            return
        if self._decoder is None:
            self._expect(None)
            self._serve(True)
        super().allContentReceived()

    def requestDone(self, request: IRequest) -> None:
        """The answer is written; the next request may already be here."""
        self.stall = STALL
        self._serve(False)
        self._forget_caller()
        if isinstance(request, BodyRequest) and request.body is not None:
            request.body.drop()
        if self._decoder is None:
            super().requestDone(request)
            return
        # The rest of the body comes between this answer and the next request.
        hanging_up = self._hanging_up or not self.persistent
        self.persistent = 1
        super().requestDone(request)
        self.setRawMode()
        if hanging_up:
            # Not at once: who is still sending would not read why.
            self._refused = True
            self._expect(LINGER)
        else:
            self._expect(BODY_DEADLINE)

    # -- the body

    def body_wanted(self) -> None:
        """Let the body come, which has its time from now on."""
        if self._promised:
            self._promised = False
            super()._send100Continue()
        self._expect(BODY_DEADLINE)
        if not self._waitingForTransport:
            self._networkProducer.resumeProducing()

    def body_waits(self) -> None:
        """Read nothing more until somebody wants it."""
        self._networkProducer.pauseProducing()

    def rawDataReceived(self, data: bytes) -> None:
        """Take a part of the body, or what comes behind a request that is answered."""
        if self._refused:
            return
        if self._decoder is None:
            super().rawDataReceived(data)
            return
        try:
            self._decoder.dataReceived(data)
        except _MalformedChunkedDataError:
            self.refuse(MALFORMED)

    def _finishRequestBody(self, rest: bytes) -> None:
        self._decoder = None
        self._promised = False
        self._expect(None)
        if not self.requests:
            self.setLineMode(rest)  # the answer was there before
            return
        self._serve(True)
        request = cast("BoundedRequest", self.requests[-1])
        if rest:
            super().rawDataReceived(rest)
        assert request.body is not None
        request.body.end()

    def _can_go_on(self) -> bool:
        """Return whether the rest of a body that nobody wants is worth waiting for."""
        body = cast("BoundedRequest", self.requests[0]).body
        if body is None or body.length is None or self._promised or self._late:
            return False
        return body.length - body.received <= REST

    # -- who it is

    def caller_known(self) -> None:
        """What this connection holds is that of somebody who is known."""
        self._known = True
        self.site.strangers.free(self)

    def _forget_caller(self) -> None:
        self._known = False
        self.site.strangers.free(self)

    def writeHeaders(
        self, version: bytes, code: bytes, reason: bytes, headers: Headers
    ) -> None:
        """Send the head of an answer, whoever made it; which version of what is secret."""
        if self._refused:
            return
        headers.removeHeader("Server")
        for name, value in ALWAYS:
            if not headers.hasHeader(name):
                headers.setRawHeaders(name, [value])
        if self._decoder is not None and not self._can_go_on():
            self._hanging_up = True
            headers.setRawHeaders("Connection", ["close"])
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
        self._decoder = None

    def give_way(self) -> None:
        """Hang up at once: somebody else needs the place, or the memory."""
        self._refused = True
        # Twisted lets go in its next turn only, after it has taken from all others.
        self._buffer, self._dataBuffer = b"", []
        for request in self.requests:
            request.requestHeaders = Headers()
        self._leave()
        self.transport.abortConnection()

    def refuse(self, answer: bytes) -> None:
        """Answer now, read no more, and cut when the client had time to read it."""
        if self._refused:
            return
        self._refused = True
        if self.requests and self.requests[0].startedWriting:
            self.transport.abortConnection()
            return
        self.transport.write(self.site.strict(answer, self.transport))
        self._expect(LINGER)

    def write(self, data: bytes) -> None:
        """Send a part of an answer, if its request was not refused meanwhile."""
        if not self._refused:
            super().write(data)

    def writeSequence(self, iovec: Iterable[bytes]) -> None:
        """Send parts of an answer, likewise."""
        if not self._refused:
            super().writeSequence(iovec)

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
            self._forget_caller()
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
        # Not before somebody wants the body.
        self._promised = True

    def _expect(self, seconds: float | None) -> None:
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
            body = cast("BoundedRequest", self.requests[-1]).body
            assert body is not None
            body.fail(BodyTooSlow(BODY_DEADLINE))
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
        self.bodies = limits.Budget(BODIES, BODIES // 3)
        self.strangers = limits.Strangers(STRANGERS)
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
