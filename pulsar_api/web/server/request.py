"""One request: its body is read when a route wants it, and kept within bounds."""

from typing import Any

from twisted.python.failure import Failure

from pulsar_api.web.server.body import MAX_BODY, Body, BodyRequest
from pulsar_api.web.server.refusals import TOO_LARGE


class BoundedRequest(BodyRequest):
    """A request that is answered as soon as its head is there; its body has a bound."""

    channel: Any
    """A `BoundedChannel`."""

    def gotLength(self, length: int | None) -> None:
        """Refuse a body that is announced as too large, before it is sent."""
        super().gotLength(0)  # the body is kept in `body`, not by Twisted
        if length is not None and length > MAX_BODY:
            self.channel.refuse(TOO_LARGE)
        elif length != 0:
            channel = self.channel
            self.body = Body(
                length, channel.site.bodies, channel.start_body, channel.pause_reading
            )

    def handleContentChunk(self, data: bytes) -> None:
        """Take a piece of the body."""
        assert self.body is not None
        self.body.receive(data)

    def caller_known(self) -> None:
        """Stop counting the memory of this connection as that of an unknown caller."""
        if not self.finished and self.channel is not None:
            self.channel.caller_known()

    def connectionLost(self, reason: Failure) -> None:
        """Free the body."""
        if self.body is not None:
            self.body.drop()
        super().connectionLost(reason)

    def process(self) -> None:
        """Drop what Twisted has parsed, set the headers of every answer, and answer."""
        # Thousands of parameters and cookies take a hundred times their bytes. Routes read
        # what they need from the head.
        self.args = {}
        self.received_cookies.clear()
        site = self.channel.site
        if site.hsts and self.isSecure():
            self.setHeader("Strict-Transport-Security", f"max-age={site.hsts}")
        super().process()

    def getRequestHostname(self) -> bytes:
        """Return a constant, as no route depends on the Host header."""
        return b"localhost"
