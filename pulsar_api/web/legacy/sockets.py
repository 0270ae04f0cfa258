"""The WebSocket transport of SockJS."""

from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Request

from pulsar_api.errors import PulsarError
from pulsar_api.web.legacy.frames import LAST, OPEN, parse_messages
from pulsar_api.web.legacy.visit import Visits
from pulsar_api.web.responses import problem
from pulsar_api.web.routing import Pattern
from pulsar_api.web.server.websocket import WebSocket, handshake

_log = Logger()

SOCKET: Pattern = (b"websocket", None, None, b"websocket")
"""The path of a WebSocket, after the names of a server and a session."""
MAX_NAME = 100
"""Characters of the name of a session."""


class Tree(Resource):
    """Opens WebSockets, and leaves all other requests to the routes."""

    isLeaf = True

    def __init__(self, routes: Any, visits: Visits) -> None:
        super().__init__()
        self._routes = routes
        self._visits = visits

    def render(self, request: Request) -> bytes | int:
        """Answer a request."""
        segments = request.path.split(b"/")[1:]
        if len(segments) == 4 and segments[3] == b"websocket" and all(segments):
            return self._open(request)
        if len(segments) == 4 and len(segments[2]) > MAX_NAME:
            detail = f"The name of a session may have at most {MAX_NAME} characters."
            return problem(request, 404, "not-found", "Not found", detail)
        answer: bytes | int = self._routes.render(request)
        return answer

    def _open(self, request: Request) -> bytes | int:
        if request.method != b"GET":
            request.setHeader("Allow", "GET, OPTIONS")
            detail = "A WebSocket is opened by GET."
            return problem(request, 405, "method-not-allowed", "Not allowed", detail)
        try:
            self._visits.access.origins.check(request)
        except PulsarError as e:
            return problem(request, 403, "foreign-origin", "Another site", str(e))
        answer = handshake(request)
        if answer is None:
            detail = "This is not the handshake of a WebSocket (RFC 6455, section 4.2.1)."
            return problem(request, 400, "no-websocket", "No WebSocket", detail)
        Socket(request, self._visits).start(answer)
        return NOT_DONE_YET


class Socket(WebSocket):
    """Sends frames on a WebSocket, no faster than they are read."""

    def __init__(self, request: Request, visits: Visits) -> None:
        super().__init__(request, visits.clock)
        self._visit = visits.begin(request)
        self._running: Deferred[None] | None = None

    def start(self, answer: bytes) -> None:
        """Answer the handshake and begin to send."""
        super().start(answer)
        self._running = Deferred.fromCoroutine(self._run())
        self._running.addErrback(self._failed)

    def message_received(self, text: str) -> None:
        """Take a message; one that is not JSON ends the connection."""
        messages = parse_messages(text)
        if messages is None:
            self.close()
        else:
            self._visit.hear(messages)

    def connection_closed(self) -> None:
        """Stop sending."""
        if self._running is not None:
            self._running.cancel()
        self._visit.close()

    async def _run(self) -> None:
        await self.send(OPEN)
        while True:
            frame = await self._visit.frame()
            if isinstance(frame, str):
                await self.send(frame)
            else:
                await frame.send(self._part)
            if frame in LAST:
                self.close()
                return

    async def _part(self, text: str, last: bool) -> None:  # noqa: FBT001
        if self._visit.over:
            self.abort()  # half a message cannot be completed
        await self.send(text, last=last)

    def _failed(self, failure: Failure) -> None:
        if not failure.check(CancelledError):
            if not failure.check(PulsarError, OSError):
                _log.failure("A WebSocket has failed", failure)
            self.abort()
