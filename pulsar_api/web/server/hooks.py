"""All that the server uses of Twisted beyond its public interface, under names of our own.

No other module of the server touches a private name of Twisted.
``tests/web/server/test_hooks.py`` has a test for each of them, so that a new Twisted that
breaks one says which.
"""

from typing import Any

from twisted.internet.protocol import connectionDone
from twisted.python.failure import Failure
from twisted.web.http import HTTPChannel
from twisted.web.http import _MalformedChunkedDataError as MalformedChunk
from twisted.web.http_headers import Headers

__all__ = ["HookedChannel", "MalformedChunk", "detach", "tcp_below", "upgrade"]


class HookedChannel(HTTPChannel):
    """An HTTP channel with public names for the private hooks of Twisted's.

    A subclass overrides `malformed`, `continue_expected` and `body_finished`.
    """

    transport: Any  # TCP or TLS round it; both can abort

    # -- what Twisted calls

    def malformed(self) -> None:
        """Handle a request that is not HTTP/1.1; Twisted's answer would have no body."""

    def continue_expected(self) -> None:
        """Handle a client that waits for ``100 Continue`` before it sends its body."""

    def body_finished(self, rest: bytes) -> None:
        """Handle the end of a body; ``rest`` came behind it."""

    def _respondToBadRequestAndDisconnect(self) -> None:
        self.malformed()

    def _send100Continue(self) -> None:
        self.continue_expected()

    def _finishRequestBody(self, rest: bytes) -> None:
        self.body_finished(rest)

    # -- what we call

    def send_continue(self) -> None:
        """Send ``100 Continue``."""
        super()._send100Continue()

    def body_decoder(self) -> Any:
        """Return what takes the bytes of the body that the head has just announced."""
        return self._transferDecoder

    def pause_reading(self) -> None:
        """Read nothing more from the network."""
        self._networkProducer.pauseProducing()

    def resume_reading(self) -> None:
        """Read from the network again, unless the client has yet to read an answer."""
        if not self._waitingForTransport:
            self._networkProducer.resumeProducing()

    def has_partial_line(self) -> bool:
        """Return whether the begin of a line has been received."""
        return bool(self._buffer)

    def drop_received(self) -> None:
        """Free what has been received.

        Twisted frees it in its next turn, after it has read from all other connections.
        """
        self._buffer, self._dataBuffer = b"", []
        for request in self.requests:
            request.requestHeaders = Headers()


def upgrade(channel: Any, protocol: Any) -> None:
    """Let a protocol take over a channel, and receive what follows the handshake."""
    channel._protocolUpgradeForWebsockets(protocol)  # noqa: SLF001
    channel.rawDataReceived = protocol.dataReceived


def detach(channel: Any, reason: Failure = connectionDone) -> None:
    """Undo `upgrade` at the end of the connection, and let the channel end.

    Otherwise channel and protocol would refer to each other, and what the client left
    unread would stay in memory until the garbage collector finds the cycle.
    """
    for name in ("dataReceived", "rawDataReceived", "connectionLost"):
        vars(channel).pop(name, None)
    channel.connectionLost(reason)


def tcp_below(transport: Any) -> Any:
    """Return the TCP transport below TLS, or the transport itself.

    It has ``bufferSize``, above which it pauses its producer, and ``socket``.
    """
    return getattr(transport, "transport", transport)
