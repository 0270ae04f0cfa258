"""An HTTP client with bounds in time and bytes, whatever a server does."""

from operator import attrgetter
from typing import Any

from attrs import frozen
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import HostnameEndpoint, wrapClientTLS
from twisted.internet.interfaces import IDelayedCall, IReactorTime, IStreamClientEndpoint
from twisted.internet.protocol import Protocol, connectionDone
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory
from twisted.python.failure import Failure
from twisted.web.client import (
    URI,
    Agent,
    HTTPConnectionPool,
    ResponseDone,
)
from twisted.web.error import SchemeNotSupported
from twisted.web.http import PotentialDataLoss
from twisted.web.iweb import IAgentEndpointFactory, IPolicyForHTTPS
from zope.interface import implementer

CONNECT = 10.0
"""Seconds within which a server must accept a connection."""
HEAD = 128 << 10
"""Bytes after which the head of a response is taken for endless."""
RATE = 1024
"""Bytes a second: a body that comes more slowly is given up in the end."""


@frozen(str=False)
class Late(Exception):
    """A server has not answered in time."""

    seconds: float
    """How long the client has waited."""

    def __str__(self) -> str:
        return f"it has not answered within {self.seconds:g} seconds"


@frozen(str=False)
class TooLarge(Exception):
    """A response is larger than a valid one can be."""

    limit: int
    """Bytes."""

    def __str__(self) -> str:
        return f"the response has more than {self.limit} bytes"


class Body(Protocol):
    """Reads the body of a response.

    ``whole`` fires with it. It fails with `Late` if it comes more slowly than `RATE` after
    ``seconds``, or with `TooLarge` beyond ``most`` bytes. Then, and when it is cancelled,
    the connection is closed.
    """

    transport: Any

    def __init__(self, clock: IReactorTime, seconds: float, most: int | None) -> None:
        self.whole: Deferred[bytes] = Deferred(lambda _: self._stop())
        self._clock = clock
        self._seconds = seconds
        self._most = most
        self._size = 0
        self._pieces: list[bytes] = []
        self._began = clock.seconds()
        self._look: IDelayedCall | None = clock.callLater(seconds, self._looked)

    def dataReceived(self, data: bytes) -> None:
        """Receive a piece."""
        self._size += len(data)
        if self.whole.called:
            return
        if self._most is not None and self._size > self._most:
            self._fail(TooLarge(self._most))
        else:
            self._pieces.append(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Receive the end."""
        self._look_no_more()
        if self.whole.called:
            return
        if reason.check(ResponseDone, PotentialDataLoss):
            self.whole.callback(b"".join(self._pieces))
        else:
            self.whole.errback(reason)

    def _looked(self) -> None:
        self._look = None
        waited = self._clock.seconds() - self._began
        left = self._seconds + self._size / RATE - waited
        if left > 0:
            self._look = self._clock.callLater(left, self._looked)
        else:
            self._fail(Late(round(waited, 1)))

    def _fail(self, error: Exception) -> None:
        self._stop()
        if not self.whole.called:
            self.whole.errback(error)

    def _stop(self) -> None:
        self._look_no_more()
        self._pieces.clear()
        if self.transport is not None:
            self.transport.loseConnection()

    def _look_no_more(self) -> None:
        if self._look is not None:
            self._look.cancel()
            self._look = None


class _Meter(ProtocolWrapper):
    """A connection with a bound for the head of a response, and that is closed at once.

    Twisted's parser keeps the lines of a head without a limit. It pauses the connection
    when a head is complete; from there on bytes are those of a body. With TLS it would
    wait for a silent server to close the connection.
    """

    transport: Any
    wrappedProtocol: Any
    _of_head = 0
    _in_head = False

    def write(self, data: bytes) -> None:
        """Send a part of a request; the next bytes are the head of its response."""
        self._in_head, self._of_head = True, 0
        self.transport.write(data)

    def writeSequence(self, data: Any) -> None:
        """Send parts of a request."""
        self.write(b"".join(data))

    def pauseProducing(self) -> None:
        """Receive no bytes for now."""
        self._in_head = False
        self.transport.pauseProducing()

    def dataReceived(self, data: bytes) -> None:
        """Pass bytes on, or hang up."""
        self._of_head += len(data)
        if self._in_head and self._of_head > HEAD:
            self.transport.abortConnection()
        else:
            self.wrappedProtocol.dataReceived(data)

    def loseConnection(self) -> None:
        """Hang up without waiting for the server."""
        self.disconnecting = 1
        self.transport.abortConnection()


@implementer(IStreamClientEndpoint)
@frozen
class _Metered:
    _endpoint: IStreamClientEndpoint

    def connect(self, factory: Any) -> Deferred[Any]:
        """Connect with a meter between protocol and connection."""
        metering: Any = WrappingFactory(factory)
        metering.noisy = False
        metering.protocol = _Meter
        connecting: Deferred[Any] = self._endpoint.connect(metering)
        return connecting.addCallback(attrgetter("wrappedProtocol"))


@implementer(IAgentEndpointFactory)
@frozen
class _Endpoints:
    _reactor: Any
    _policy: IPolicyForHTTPS

    def endpointForURI(self, uri: URI) -> IStreamClientEndpoint:
        """Return the endpoint of a URL."""
        endpoint: Any = HostnameEndpoint(
            self._reactor, uri.host.decode("ascii"), uri.port, timeout=CONNECT
        )
        if uri.scheme == b"https":
            creator = self._policy.creatorForNetloc(uri.host, uri.port)
            endpoint = wrapClientTLS(creator, endpoint)
        elif uri.scheme != b"http":
            raise SchemeNotSupported(f"Unsupported scheme: {uri.scheme!r}")
        return _Metered(endpoint)


def bounded_agent(reactor: Any, policy: IPolicyForHTTPS, pool: HTTPConnectionPool) -> Agent:
    """Return an agent that bounds the heads of responses."""
    endpoints = _Endpoints(reactor, policy)
    agent: Agent = Agent.usingEndpointFactory(reactor, endpoints, pool)
    return agent
