"""SockJS 0.3 as far as the clients of release 0.6 speak it: WebSocket and two by HTTP."""

import json
import secrets
from collections.abc import Callable
from typing import Any, ClassVar

from attrs import define, field, frozen
from klein import Klein
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.resource import Resource
from twisted.web.server import Request
from twisted.web.websocket import WebSocketResource, WebSocketTransport
from wsproto.utilities import RemoteProtocolError

from pulsar_api.errors import PulsarError
from pulsar_api.web.access import Access
from pulsar_api.web.feed import Feed
from pulsar_api.web.follow import Outlet, Valve
from pulsar_api.web.reply import new_app, problem, reply
from pulsar_api.web.visit import HEARTBEAT, LAST, Visit

_log = Logger()

AWAY = 5.0
"""Seconds for which a session by HTTP waits for its client to come back."""
STREAMED = 128 * 1024
"""Bytes after which a stream ends, and the client opens another."""
MAX_MESSAGE = 64 * 1024
"""Bytes of a message of a client; it has nothing to say but who it is."""
MAX_SESSIONS = 1000
"""Sessions by HTTP."""

_OPEN = "o"
_BUSY = 'c[2010,"Another connection still open"]'
_PRELUDE = "h" * 2048
_SCRIPT = "application/javascript; charset=UTF-8"
_TEXT = "text/plain; charset=UTF-8"
_NO_CACHE = "no-store, no-cache, no-transform, must-revalidate, max-age=0"


@define(eq=False)
class _Session:
    """A client by HTTP, between two of its requests as well."""

    visit: Visit
    busy: bool = False
    gone: IDelayedCall | None = None


@frozen(eq=False)
class SockJS:
    """The routes below ``/websocket``."""

    app: ClassVar[Klein] = new_app()

    access: Access
    feed: Feed
    clock: IReactorTime
    _sessions: dict[str, _Session] = field(factory=dict)

    def resource(self) -> Resource:
        """Return what a site serves."""
        return _Tree(self.app.resource(), self)

    @app.route("/websocket", methods=["GET"])
    def welcome(self, request: Request) -> bytes:
        return reply(request, b"Welcome to SockJS!\n", kind=_TEXT)

    @app.route("/websocket/info", methods=["GET"])
    def info(self, request: Request) -> bytes:
        answer = {
            "websocket": True,
            "origins": ["*:*"],
            "cookie_needed": False,
            "entropy": secrets.randbits(32),
        }
        body = reply(request, json.dumps(answer).encode(), kind=f"{_JSON}; charset=UTF-8")
        request.setHeader("Cache-Control", _NO_CACHE)
        return body

    @app.route("/websocket/<server>/<name>/xhr", methods=["POST"])
    async def poll(self, request: Request, server: str, name: str) -> bytes:
        self.access.origins.check(request)
        session = self._sessions.get(name)
        if session is None:
            if self._open(request, name) is None:
                return _too_many(request)
            return _answer(request, _OPEN)
        if session.busy or not self._is_theirs(request, session):
            return _answer(request, _BUSY)
        self._take(session)
        try:
            frame = await session.visit.frame()
        finally:
            self._give_back(name, session)
        return _answer(request, frame)

    @app.route("/websocket/<server>/<name>/xhr_streaming", methods=["POST"])
    async def stream(self, request: Request, server: str, name: str) -> bytes:
        self.access.origins.check(request)
        session = self._sessions.get(name)
        begin = [_PRELUDE]
        if session is None:
            session = self._open(request, name)
            if session is None:
                return _too_many(request)
            begin.append(_OPEN)
        busy = session.busy or not self._is_theirs(request, session)
        request.setHeader("Content-Type", _SCRIPT)
        request.setHeader("Cache-Control", _NO_CACHE)
        request.setHeader("X-Accel-Buffering", "no")
        outlet = Outlet(request, self.clock)
        for frame in [*begin, _BUSY] if busy else begin:
            await outlet.write(f"{frame}\n".encode())
        if busy:
            return outlet.end()
        self._take(session)
        sent = 0
        try:
            while sent < STREAMED:
                frame = await session.visit.frame()
                data = f"{frame}\n".encode()
                sent += len(data)
                await outlet.write(data)
                if frame in LAST:
                    break
        finally:
            self._give_back(name, session)
        return outlet.end()

    @app.route("/websocket/<server>/<name>/xhr_send", methods=["POST"])
    def send(self, request: Request, server: str, name: str) -> bytes:
        self.access.origins.check(request)
        session = self._sessions.get(name)
        if session is None or not self._is_theirs(request, session):
            detail = "There is no such session; it may have ended."
            return problem(request, 404, "unknown-session", "Unknown session", detail)
        body = b"" if request.content is None else request.content.read()
        messages = _messages(body)
        if messages is None:
            detail = "body: must be a JSON array of texts"
            return problem(request, 400, "invalid-input", "Invalid input", detail, "body")
        session.visit.hear(messages)
        request.setResponseCode(204)
        request.setHeader("Content-Type", _TEXT)
        return b""

    def visit(self, request: Request) -> Visit:
        """Return a visit, whose visitor may not be known yet."""
        address = self.access.origins.address(request)
        shown = self.access.shown(request)
        visit = Visit(self.access, self.feed, self.clock, address, shown)
        visit.begin()
        return visit

    def _is_theirs(self, request: Request, session: _Session) -> bool:
        """Return whether it is who has opened the session, whose name is no secret."""
        visit = session.visit
        if visit.shown is not None and visit.shown != self.access.shown(request):
            return False
        return visit.address == self.access.origins.address(request)

    def _open(self, request: Request, name: str) -> _Session | None:
        if len(self._sessions) >= MAX_SESSIONS and not self._make_room():
            return None
        session = self._sessions[name] = _Session(self.visit(request))
        self._give_back(name, session)
        return session

    def _make_room(self) -> bool:
        """Forget who has opened a session and not said yet who it is; the oldest first."""
        for name, session in self._sessions.items():
            if not session.visit.decided:
                session.visit.deny()
                if session.gone is not None:
                    session.gone.cancel()
                self._forget(name, session)
                return True
        return False

    def _forget(self, name: str, session: _Session) -> None:
        if self._sessions.get(name) is session:
            del self._sessions[name]
        session.gone = None
        session.visit.close()

    def _take(self, session: _Session) -> None:
        session.busy = True
        if session.gone is not None:
            session.gone.cancel()
            session.gone = None

    def _give_back(self, name: str, session: _Session) -> None:
        session.busy = False
        if session.gone is None and self._sessions.get(name) is session:
            session.gone = self.clock.callLater(AWAY, self._forget, name, session)

    def release(self) -> None:
        """Say goodbye to all, and forget who is between two requests."""
        self.feed.end()
        for session in self._sessions.values():
            session.visit.end()
            if session.gone is not None:
                session.gone.cancel()
                session.gone = None


_JSON = "application/json"


def _messages(data: bytes | str) -> list[str] | None:
    """Return what a client has sent: texts; None if it is something else."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        return value
    return None


def _answer(request: Request, frame: str) -> bytes:
    body = reply(request, f"{frame}\n".encode(), kind=_SCRIPT)
    request.setHeader("Cache-Control", _NO_CACHE)
    return body


def _too_many(request: Request) -> bytes:
    request.setHeader("Retry-After", "5")
    detail = f"{MAX_SESSIONS} sessions are open, which is the limit; try again later."
    return problem(request, 503, "too-many-sessions", "Too many sessions", detail)


class _Tree(Resource):
    """Sends who asks for a WebSocket to Twisted's own, all others to the routes."""

    isLeaf = True

    def __init__(self, routes: Any, sockjs: SockJS) -> None:
        super().__init__()
        self._routes = routes
        self._websocket = WebSocketResource(_Factory(sockjs))
        self._origins = sockjs.access.origins

    def render(self, request: Request) -> bytes | int:
        """Answer a request."""
        segments = request.path.split(b"/")[1:]
        if len(segments) == 4 and segments[3] == b"websocket" and all(segments):
            if request.method != b"GET":
                request.setHeader("Allow", "GET, OPTIONS")
                detail = "Only GET is possible here."
                return problem(request, 405, "method-not-allowed", "Not allowed", detail)
            try:
                self._origins.check(request)
            except PulsarError as e:
                return problem(request, 403, "foreign-origin", "Another site", str(e))
            found: bytes | int = self._websocket.render(request)
            return found
        answer: bytes | int = self._routes.render(request)
        return answer


@frozen(eq=False)
class _Factory:
    """Makes what speaks on one WebSocket."""

    sockjs: SockJS

    def buildProtocol(self, request: Request) -> "_Socket":
        """Return it, for Twisted."""
        visit = self.sockjs.visit(request)
        return _Socket(
            visit, self.sockjs.clock, request.channel, request.channel.connectionLost
        )


@define(eq=False, slots=False)
class _Socket(Valve):
    """Sends frames on a WebSocket, no faster than they are read."""

    _visit: Visit
    _clock: IReactorTime
    _channel: Any
    """The HTTP channel below, whose methods Twisted has replaced by its own."""
    _lost: Callable[[Failure], None]
    """What it would do at its end."""
    _transport: Any = None
    _received: int = 0
    """Bytes since the last whole message, or in the last 25 seconds."""
    _since: float = 0.0
    _running: Deferred[None] | None = None

    def negotiationStarted(self, transport: WebSocketTransport) -> None:
        """The connection is there."""
        self._transport = transport

    def negotiationFinished(self) -> None:
        """Both sides speak WebSocket."""
        deliver = self._channel.dataReceived

        def bounded(data: bytes) -> None:
            now = self._clock.seconds()
            if now >= self._since + HEARTBEAT:
                self._since, self._received = now, 0
            self._received += len(data)
            try:
                if self._received <= MAX_MESSAGE:
                    deliver(data)
                    return
            except RemoteProtocolError:
                pass
            self._channel.transport.abortConnection()

        self._channel.dataReceived = bounded
        # The channel has registered itself; now it is we who write.
        self._transport.detachProducer()
        self._transport.attachProducer(self)
        self._running = Deferred.fromCoroutine(self._run())
        self._running.addErrback(self._failed)

    def textMessageReceived(self, message: str) -> None:
        """Take what the client says; what is no JSON ends the connection."""
        self._received = 0
        messages = _messages(message)
        if messages is None:
            self._transport.loseConnection()
        else:
            self._visit.hear(messages)

    def bytesMessageReceived(self, data: bytes | bytearray) -> None:
        """Nobody sends that."""
        self._transport.loseConnection()

    def pongReceived(self, payload: bytes) -> None:
        """We do not ping: heartbeats are frames."""
        self._received = 0

    def connectionLost(self, reason: Failure) -> None:
        """Stop, and let the channel do what it does at its end."""
        if self._running is not None:
            self._running.cancel()
        self._visit.close()
        self._lost(reason)

    async def _run(self) -> None:
        self._transport.sendTextMessage(_OPEN)
        while True:
            frame = await self._visit.frame()
            self._transport.sendTextMessage(frame)
            if frame in LAST:
                self._transport.detachProducer()
                self._transport.loseConnection()
                return
            await self.open()

    def _failed(self, failure: Failure) -> None:
        if not failure.check(CancelledError):
            if not failure.check(PulsarError, OSError):
                _log.failure("A WebSocket has failed", failure)
            self._channel.transport.abortConnection()
