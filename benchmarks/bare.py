"""The bare alternatives: ``twisted.web`` with one leaf, nothing on disk, nothing checked.

Run as ``python -P bare.py MODE [ARGUMENT ...]``; prints its port, and ends by SIGTERM.
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
    """Keeps in memory what a command prints, and tells when there is more or the end."""

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
        """Say that it is over."""
        self.end()

    def run(self, arguments: list[bytes]) -> None:
        """Start a command by `spawnProcess` as it is."""
        from twisted.internet import reactor

        environment = dict(os.environb)
        reactor.spawnProcess(self, arguments[0], arguments, environment)
        self.transport.closeStdin()


class Run(Resource):
    """POST: run the arguments in the body (ended by NUL each), answer when they ended."""

    isLeaf = True
    newest: Kept

    def render_POST(self, request: Request) -> int:
        """Answer with the number of bytes that were printed; the newest are kept."""
        assert request.content is not None

        def end() -> None:
            request.write(b"%d" % sum(map(len, kept.pieces)))
            request.finish()

        self.newest = kept = Kept(lambda: None, end)
        kept.run(request.content.read().split(b"\0")[:-1])
        return NOT_DONE_YET


class Same(Resource):
    """GET: always the same bytes, which were read from standard input."""

    isLeaf = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.body = sys.stdin.buffer.read()

    def render_GET(self, request: Request) -> bytes:
        """Answer at once."""
        request.setHeader("Content-Type", "application/json")
        return self.body


class Follow(Resource):
    """GET: wait for the next piece that one command prints, answer with that."""

    isLeaf = True

    def __init__(self, *arguments: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.waiting: list[Request] = []
        self.kept = Kept(self.more, lambda: None)
        self.kept.run([os.fsencode(a) for a in arguments])

    def more(self) -> None:
        """Answer everybody who waits."""
        waiting, self.waiting = self.waiting, []
        for request in waiting:
            request.setHeader("Content-Length", str(len(self.kept.pieces[-1])))
            request.write(self.kept.pieces[-1])
            request.finish()

    def render_GET(self, request: Request) -> int:
        """Let it wait."""
        self.waiting.append(request)
        return NOT_DONE_YET


class Quiet(Site):
    """Keeps no access log, as the daemon keeps none: that would cost a quarter."""

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
