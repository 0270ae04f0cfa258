"""WebSockets (RFC 6455) with bounded cost, whatever a client sends or leaves unread."""

import socket
from typing import Any

from attrs import define, field
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.internet.protocol import connectionDone
from twisted.python.failure import Failure
from twisted.web.http_headers import Headers
from twisted.web.server import Request
from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Event, Ping, TextMessage
from wsproto.frame_protocol import CloseReason
from wsproto.utilities import (
    LocalProtocolError,
    RemoteProtocolError,
    generate_accept_token,
)

from pulsar_api.web.responses import Valve
from pulsar_api.web.server import hooks
from pulsar_api.web.server.body import BodyRequest
from pulsar_api.web.server.channel import LINGER

MAX_MESSAGE = 8192
"""Bytes of a client's message with all its fragments; it only authenticates the client."""
BURST = 10_000
"""Bytes that a client may send at once after a silence."""
BYTES_PER_SECOND = 400.0
"""How fast a client may send beyond that."""
FRAME_COST = 64
"""Bytes that each frame counts beside its own, as an empty frame takes time too."""
BUFFER = 16 * 1024
"""Bytes that a client may leave unread before the daemon neither writes nor reads more."""
KERNEL_BUFFER = 64 * 1024
"""Bytes that the kernel may hold for a client; Linux doubles it for bookkeeping."""
STALL = 60.0
"""How long, in seconds, a client may leave its send buffer unread."""


def limit_buffer(channel: Any) -> None:
    """Bound what a connection buffers for its client, and for how long.

    Twisted pauses a producer only at 64 KiB, and the kernel takes megabytes for each client
    that does not read.
    """
    channel.stall = STALL
    below = hooks.tcp_below(channel.transport)
    below.bufferSize = BUFFER
    sock = getattr(below, "socket", None)
    if sock is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, KERNEL_BUFFER)


@define(eq=False)
class TokenBucket:
    """Limits how much a client sends; only time adds tokens."""

    _clock: IReactorTime
    _tokens: float = field(default=BURST, init=False)
    _at: float = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._at = self._clock.seconds()

    def take(self, number: int) -> bool:
        """Take tokens; return whether there were enough."""
        now = self._clock.seconds()
        self._tokens = min(BURST, self._tokens + (now - self._at) * BYTES_PER_SECOND)
        self._at = now
        self._tokens -= number
        return self._tokens >= 0


def handshake(request: Request) -> bytes | None:
    """Return the response to a WebSocket handshake; None if the request is not one.

    A handshake has no body: the request is answered before its body is read, so that would
    be taken for frames.
    """
    headers = request.requestHeaders

    def words(name: bytes) -> set[bytes]:
        lines = headers.getRawHeaders(name, [])
        return {word.strip().lower() for line in lines for word in line.split(b",")}

    keys = headers.getRawHeaders(b"sec-websocket-key", [])
    if (
        request.clientproto != b"HTTP/1.1"
        or (isinstance(request, BodyRequest) and request.body is not None)
        or b"websocket" not in words(b"upgrade")
        or b"upgrade" not in words(b"connection")
        or headers.getRawHeaders(b"sec-websocket-version") != [b"13"]
        or len(keys) != 1
    ):
        return None
    return (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: " + generate_accept_token(keys[0].strip()) + b"\r\n\r\n"
    )


class WebSocket(Valve):
    """The daemon's side of a WebSocket, on the channel of its handshake.

    While the client does not read, the daemon does not read from it either, and the
    channel's stall deadline runs. A refused client is cut off, whatever is unread.
    """

    def __init__(self, request: Request, clock: IReactorTime) -> None:
        self._request = request
        self._channel: Any = request.channel
        self._clock = clock
        self._protocol = Connection(ConnectionType.SERVER)
        self._bucket = TokenBucket(clock)
        self._parts: list[str] = []
        self._size = 0
        self._closed = False
        self._cut: IDelayedCall | None = None

    def start(self, answer: bytes) -> None:
        """Answer the handshake and take over the channel."""
        limit_buffer(self._channel)
        hooks.upgrade(self._channel, self)
        self._channel.transport.write(answer)
        self._request.registerProducer(self, True)
        # The head is no longer needed, and an open socket is not counted as unidentified.
        self._request.requestHeaders = Headers()
        if isinstance(self._request, BodyRequest):
            self._request.caller_known()

    # -- what a subclass does

    def message_received(self, text: str) -> None:
        """Handle a text message."""

    def connection_closed(self) -> None:
        """Stop sending."""

    # -- sending

    async def send(self, text: str, *, last: bool = True) -> None:
        """Send a text, or a part of one as a frame of its own; wait until there is room.

        This never returns after the connection has ended; `connection_closed` cancels it.
        """
        if self._closed:
            await Deferred()
        self._write(TextMessage(text, message_finished=last))
        await self.open()

    def close(self, code: int = CloseReason.NORMAL_CLOSURE) -> None:
        """Send a close frame; cut the connection if the client does not end it soon."""
        self._end(CloseConnection(code))

    def abort(self) -> None:
        """Cut the connection and drop unsent data."""
        self._closed = True
        self._parts.clear()
        self._channel.transport.abortConnection()

    def _end(self, event: CloseConnection) -> None:
        self._closed = True
        self._parts.clear()
        try:
            self._write(event)
        except LocalProtocolError:
            self.abort()
            return
        self._request.unregisterProducer()
        self._channel.loseConnection()
        self._cut = self._clock.callLater(LINGER, self.abort)

    def _write(self, event: Event) -> None:
        self._channel.transport.write(self._protocol.send(event))

    # -- what Twisted calls

    def makeConnection(self, transport: object) -> None:
        """Do nothing, as the channel has the transport."""

    def dataReceived(self, data: bytes) -> None:
        """Receive bytes; cut a client that sends too many."""
        if self._closed:
            return
        if not self._bucket.take(len(data)):
            self.abort()
            return
        try:
            self._protocol.receive_data(data)
            for event in self._protocol.events():
                if not self._bucket.take(FRAME_COST):
                    self.abort()
                else:
                    self._take(event)
                if self._closed:
                    return
        except (LocalProtocolError, RemoteProtocolError):
            self.abort()

    def _take(self, event: Event) -> None:
        match event:
            case TextMessage():
                self._parts.append(event.data)
                self._size += max(1, len(event.data))  # an empty part takes memory too
                if self._size > MAX_MESSAGE:
                    self.abort()
                elif event.message_finished:
                    text = "".join(self._parts)
                    self._parts, self._size = [], 0
                    self.message_received(text)
            case Ping():
                self._write(event.response())
            case CloseConnection():
                self._end(event.response())
            case BytesMessage():
                self.close(CloseReason.UNSUPPORTED_DATA)

    def pauseProducing(self) -> None:
        """Stop writing and reading, as the client does not read."""
        super().pauseProducing()
        self._channel.transport.pauseProducing()

    def resumeProducing(self) -> None:
        """Write and read again, as the client has read."""
        self._channel.transport.resumeProducing()
        super().resumeProducing()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Stop, and let the channel end."""
        self._closed = True
        if self._cut is not None and self._cut.active():
            self._cut.cancel()
        self.connection_closed()
        hooks.detach(self._channel, reason)
