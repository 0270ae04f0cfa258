"""The bare alternatives: ``twisted.web`` with one leaf, without a disk and without checks.

Run it as ``python -P bare.py MODE [ARGUMENT ...]``. It prints its port; SIGTERM ends it.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

from twisted.internet.protocol import ProcessProtocol
from twisted.python.failure import Failure
from twisted.web.http import Request as HTTPRequest
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Request, Site


class Kept(ProcessProtocol):
    """Keeps the output of a command in memory; calls back for new output and the end."""

    transport: Any

    def __init__(self, more: Callable[[], None], end: Callable[[], None]) -> None:
        self.pieces: list[bytes] = []
        self.more = more
        self.end = end

    def outReceived(self, data: bytes) -> None:
        """Keep a piece, as Twisted reads it."""
        self.pieces.append(data)
        self.more()

    def processEnded(self, reason: Failure) -> None:
        """Call back: the command has ended."""
        self.end()

    def run(self, arguments: list[bytes]) -> None:
        """Start a command with a plain `spawnProcess`."""
        from twisted.internet import reactor

        environment = dict(os.environb)
        reactor.spawnProcess(self, arguments[0], arguments, environment)
        self.transport.closeStdin()


class Run(Resource):
    """POST: run the arguments in the body (each ends with NUL), and respond at the end."""

    isLeaf = True
    newest: Kept

    def render_POST(self, request: Request) -> int:
        """Respond with the number of bytes that the command printed."""
        assert request.content is not None

        def end() -> None:
            request.write(b"%d" % sum(map(len, kept.pieces)))
            request.finish()

        self.newest = kept = Kept(lambda: None, end)
        kept.run(request.content.read().split(b"\0")[:-1])
        return NOT_DONE_YET


class Same(Resource):
    """GET: always the same bytes, read once from standard input."""

    isLeaf = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.body = sys.stdin.buffer.read()

    def render_GET(self, request: Request) -> bytes:
        """Respond at once."""
        request.setHeader("Content-Type", "application/json")
        return self.body


class Follow(Resource):
    """GET: respond with the next piece that a command prints."""

    isLeaf = True

    def __init__(self, *arguments: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.waiting: list[Request] = []
        self.kept = Kept(self.more, lambda: None)
        self.kept.run([os.fsencode(a) for a in arguments])

    def more(self) -> None:
        """Respond to all waiters."""
        waiting, self.waiting = self.waiting, []
        for request in waiting:
            request.setHeader("Content-Length", str(len(self.kept.pieces[-1])))
            request.write(self.kept.pieces[-1])
            request.finish()

    def render_GET(self, request: Request) -> int:
        """Add the request to the waiters."""
        self.waiting.append(request)
        return NOT_DONE_YET


class Quiet(Site):
    """Keeps no access log, because the daemon keeps none. A log would cost 25 %."""

    def log(self, request: HTTPRequest) -> None:
        """Write nothing."""


def main(mode: str, *arguments: str) -> None:
    """Serve until SIGTERM."""
    from twisted.internet import reactor

    leaves: dict[str, Callable[..., Resource]] = {
        "run": Run,
        "same": Same,
        "follow": Follow,
    }
    site: Any = Quiet(leaves[mode](*arguments))  # type: ignore[no-untyped-call]
    port: Any = reactor.listenTCP(0, site, 4096, "127.0.0.1")
    os.write(1, b"%d\n" % port.getHost().port)
    reactor.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
