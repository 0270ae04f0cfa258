"""Tests of the private parts of Twisted that the server uses, one for each hook.

When one of them fails after an update, Twisted has changed that part.
"""

from typing import Any

import pytest
from twisted.internet.protocol import Protocol
from twisted.internet.tcp import Connection
from twisted.internet.testing import StringTransport
from twisted.web.client import HTTPConnectionPool
from twisted.web.http import HTTPChannel
from twisted.web.resource import Resource
from twisted.web.server import Request, Site

from pulsar_api.web.server import hooks
from pulsar_api.web.server.channel import BoundedChannel
from pulsar_api.web.server.request import BoundedRequest
from pulsar_api.web.server.site import BoundedSite

HEAD = b"POST / HTTP/1.1\r\nHost: localhost\r\n"


class Channel(hooks.HookedChannel):
    """A channel that records the hooks that Twisted calls."""

    def __init__(self) -> None:
        base: Any = super()
        base.__init__()
        self.called: list[object] = []

    def malformed(self) -> None:
        """Record the call."""
        self.called.append("malformed")

    def continue_expected(self) -> None:
        """Record the call."""
        self.called.append("continue")

    def body_finished(self, rest: bytes) -> None:
        """Record the call."""
        self.called.append(rest)


class Unanswered(Request):
    """A request that is never answered, without a file for its body."""

    def gotLength(self, length: int | None) -> None:
        """Treat any body as a small one."""
        base: Any = super()
        base.gotLength(0)

    def process(self) -> None:
        """Do nothing."""


@pytest.fixture
def channel() -> Any:
    """Return a connected channel."""
    site: Any = Site(Resource())
    made: Any = Channel()
    made.site = made.factory = site
    made.requestFactory = Unanswered
    made.makeConnection(StringTransport())
    return made


def test_malformed_request_is_reported(channel: Any) -> None:
    """``_respondToBadRequestAndDisconnect``."""
    channel.dataReceived(b"no HTTP\r\n")
    assert channel.called == ["malformed"]
    assert channel.transport.value() == b""


def test_continue_is_left_to_us(channel: Any) -> None:
    """``_send100Continue``."""
    channel.dataReceived(HEAD + b"Content-Length: 3\r\nExpect: 100-continue\r\n\r\n")
    assert channel.called == ["continue"]
    assert channel.transport.value() == b""
    channel.send_continue()
    assert channel.transport.value() == b"HTTP/1.1 100 Continue\r\n\r\n"


def test_end_of_a_body_is_reported_with_what_follows(channel: Any) -> None:
    """``_finishRequestBody``."""
    channel.dataReceived(HEAD + b"Content-Length: 3\r\n\r\nabcGET")
    assert channel.called == [b"GET"]


@pytest.mark.parametrize("how", [b"Content-Length: 3", b"Transfer-Encoding: chunked"])
def test_body_has_a_decoder(channel: Any, how: bytes) -> None:
    """``_transferDecoder``."""
    channel.dataReceived(HEAD + how + b"\r\n\r\n")
    channel.body_decoder().dataReceived(b"3\r\nabc\r\n0\r\n\r\n" if b"T" in how else b"abc")
    assert channel.called == [b""]


def test_malformed_chunk_has_its_error(channel: Any) -> None:
    """``_MalformedChunkedDataError``."""
    channel.dataReceived(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    with pytest.raises(hooks.MalformedChunk):
        channel.body_decoder().dataReceived(b"no number\r\n")


def test_reading_pauses_and_resumes(channel: Any) -> None:
    """``_networkProducer`` and ``_waitingForTransport``."""
    channel.pause_reading()
    assert channel.transport.producerState == "paused"
    channel.resume_reading()
    assert channel.transport.producerState == "producing"
    channel.pauseProducing()  # the client does not read its response
    channel.pause_reading()
    channel.resume_reading()
    assert channel.transport.producerState == "paused"


def test_partial_line_and_following_requests_are_dropped(channel: Any) -> None:
    """``_buffer`` and ``_dataBuffer``."""
    assert not channel.has_partial_line()
    channel.dataReceived(b"GET / HT")
    assert channel.has_partial_line()
    channel.drop_received()
    assert not channel.has_partial_line()
    channel.dataReceived(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\nGET / HTTP/1.1\r\n")
    assert channel._dataBuffer
    channel.drop_received()
    assert not channel._dataBuffer
    assert not channel.requests[0].requestHeaders.hasHeader("host")


def test_upgraded_channel_hands_its_bytes_over(channel: Any) -> None:
    """``_protocolUpgradeForWebsockets``; `detach` leaves the channel as it was."""
    received: list[bytes] = []

    class Frames(Protocol):
        def dataReceived(self, data: bytes) -> None:
            received.append(data)

    channel.dataReceived(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    hooks.upgrade(channel, Frames())
    channel.dataReceived(b"frame")
    channel.rawDataReceived(b"frame behind the handshake")
    assert received == [b"frame", b"frame behind the handshake"]
    hooks.detach(channel)
    own = {"dataReceived", "rawDataReceived", "connectionLost"}
    assert not own & set(vars(channel))


def test_buffer_of_a_connection_can_be_set() -> None:
    """``FileDescriptor.bufferSize``; TLS has TCP as its ``transport``."""
    assert Connection.bufferSize == 1 << 16
    plain, tls = StringTransport(), StringTransport()
    tls.transport = plain  # type: ignore[attr-defined]
    assert hooks.tcp_below(tls) is plain
    assert hooks.tcp_below(plain) is plain


def test_pool_of_a_client_can_be_silent() -> None:
    """``HTTPConnectionPool._factory.noisy`` would log two lines for each connection."""
    assert HTTPConnectionPool._factory.noisy


OVERRIDDEN: list[tuple[Any, Any, str]] = [
    (
        BoundedChannel,
        HTTPChannel,
        """
        allContentReceived allHeadersReceived connectionLost connectionMade dataReceived
        headerReceived lineLengthExceeded lineReceived maxHeaders pauseProducing
        rawDataReceived requestDone resumeProducing timeoutConnection write writeHeaders
        writeSequence
        """,
    ),
    (
        BoundedRequest,
        Request,
        "connectionLost getRequestHostname gotLength handleContentChunk process",
    ),
    (
        BoundedSite,
        Site,
        "acceptableProtocols buildProtocol getResourceFor log startFactory",
    ),
]


@pytest.mark.parametrize(("ours", "theirs", "names"), OVERRIDDEN)
def test_twisted_still_has_what_is_overridden(ours: Any, theirs: Any, names: str) -> None:
    """An override of a method that Twisted removed would never be called."""
    for name in names.split():
        assert name in vars(ours)
        assert getattr(theirs, name) is not None


def test_every_override_is_known(channel: Any) -> None:
    """Twisted keeps these as attributes of instances, which the channel reads or sets."""
    channel.dataReceived(HEAD + b"Content-Length: 3\r\n\r\n")
    assert (channel.length, channel.line_mode, channel.persistent) == (3, 0, 1)
    assert len(channel.requests) == 1
