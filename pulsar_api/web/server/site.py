"""The site: limits on connections and requests, and no access log."""

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
from twisted.web.http import Request as HTTPRequest
from twisted.web.resource import IResource
from twisted.web.server import Site

from pulsar_api.web.server import limits
from pulsar_api.web.server.channel import LINGER, BoundedChannel
from pulsar_api.web.server.refusals import TOO_MANY, TOO_MANY_FROM_ADDRESS, TooManyRequests
from pulsar_api.web.server.request import BoundedRequest

IDLE = 60.0
"""Seconds that a connection may stay open between two requests."""
MIN_IDLE = 10.0
"""Seconds after which an idle connection is closed if a new one needs its place."""
BURST = 5
"""Seconds' worth of requests that an address may send at once."""
UNIDENTIFIED_MEMORY = 4 << 20
"""Bytes that are held for all callers who are not identified yet."""
BODY_MEMORY = 9 << 20
"""Bytes of bodies that are held for all callers together; for one, a third of it."""
_MAX_REJECTIONS = 64  # connections that are told at the same time that there are too many


class _Rejection(Protocol):
    """A connection that is told that there are too many, and closed."""

    transport: Any
    _cut: IDelayedCall | None = None

    def __init__(self, site: "BoundedSite", why: bytes) -> None:
        self._site = site
        self._why = why

    def connectionMade(self) -> None:
        self._site.refused += 1
        if self._site.refused > _MAX_REJECTIONS:
            # These take file descriptors too, so hang up without an answer.
            self.transport.abortConnection()
            return
        self.transport.write(self._site.with_hsts(self._why, self.transport))
        self.transport.loseConnection()
        # Over TLS a silent client would stay until its handshake, which may never come.
        clock = self._site.reactor
        self._cut = clock.callLater(LINGER, self.transport.abortConnection)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._site.refused -= 1
        if self._cut is not None and self._cut.active():
            self._cut.cancel()


@frozen
class Capacity:
    """How much a site serves. 0 for one address means no limit for it."""

    connections: int
    """Connections at a time, of all addresses."""
    connections_of_address: int = 1000
    """Connections of one address at a time, and never more than a quarter of all."""
    requests_of_address: int = 100
    """Requests of one address in a second; `BURST` times as many after a silence."""


class BoundedSite(Site):
    """Serves a resource to a bounded number of connections.

    ``hsts``: seconds for which browsers are told to use TLS only; 0 for no such header.
    """

    # One protocol class rather than Twisted's chooser: no HTTP/2 to bound as well.
    protocol: Any = BoundedChannel
    requestFactory = BoundedRequest

    def __init__(
        self, resource: IResource, clock: IReactorTime, capacity: Capacity, hsts: int = 0
    ) -> None:
        super().__init__(
            resource, timeout=IDLE, reactor=clock, parsePOSTFormSubmission=False
        )
        self.max_connections = capacity.connections
        self.hsts = hsts
        self.connections = 0
        self.refused = 0
        self.serving = 0
        """How many requests are being answered."""
        self.idle: OrderedDict[BoundedChannel, float] = OrderedDict()
        """Connections that wait for the client, since when; the longest first."""
        share = self.max_connections + 1  # more than there can be
        if capacity.connections_of_address:
            share = min(capacity.connections_of_address, self.max_connections // 4)
        self._slots = limits.Slots(share)
        self.bodies = limits.Budget(BODY_MEMORY, BODY_MEMORY // 3)
        self.unidentified = limits.UnidentifiedMemory(UNIDENTIFIED_MEMORY)
        per_second = capacity.requests_of_address or 10**9
        self._rate = limits.Rate(clock, per_second, BURST * per_second)

    def buildProtocol(self, addr: IAddress | None) -> Any:
        """Return a channel, or a protocol that rejects the connection."""
        source = limits.source(addr)
        if not self._slots.take(source):
            return _Rejection(self, TOO_MANY_FROM_ADDRESS)
        if self.connections >= self.max_connections and not self._make_room():
            self._slots.give_back(source)
            return _Rejection(self, TOO_MANY)
        self.connections += 1
        channel = cast("BoundedChannel", super().buildProtocol(addr))
        channel.source = source
        return channel

    def _make_room(self) -> bool:
        """Close the connection that is idle for longest; return whether there was one."""
        for channel, since in self.idle.items():
            if self.reactor.seconds() - since < MIN_IDLE:
                break
            channel.evict()
            return True
        return False

    def connection_ended(self, channel: BoundedChannel) -> None:
        """Give the place of a connection back."""
        self.connections -= 1
        self._slots.give_back(channel.source)

    def getResourceFor(self, request: BoundedRequest) -> Any:
        """Return what answers; an address that asks too often is refused before routing."""
        wait = self._rate.wait(request.channel.source)
        if wait:
            return TooManyRequests(self.reactor, wait)
        return super().getResourceFor(request)

    def with_hsts(self, answer: bytes, transport: object) -> bytes:
        """Return a prepared answer, with the HSTS header if it goes over TLS."""
        if not self.hsts or not ISSLTransport.providedBy(transport):
            return answer
        line = f"\r\nStrict-Transport-Security: max-age={self.hsts}\r\n"
        return answer.replace(b"\r\n", line.encode(), 1)

    def startFactory(self) -> None:
        """Keep no access log: a line for each poll costs a quarter of the time."""

    def log(self, request: HTTPRequest) -> None:
        """Log nothing: requests that change something are in the audit log."""

    def acceptableProtocols(self) -> list[bytes]:
        """Offer HTTP/1.1 only."""
        return [b"http/1.1"]
