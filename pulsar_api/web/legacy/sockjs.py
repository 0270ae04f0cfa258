"""SockJS 0.3 as far as the clients of release 0.6 speak it: WebSocket and two by HTTP."""

import json
import re
import secrets
from functools import partial
from typing import Any, ClassVar
from urllib.parse import urlsplit

from attrs import define, field, frozen
from klein import Klein
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Request

from pulsar_api.errors import PulsarError
from pulsar_api.web.api.following import Outlet
from pulsar_api.web.authentication import Access, cookies
from pulsar_api.web.legacy.feed import Feed
from pulsar_api.web.legacy.visit import BEAT, LAST, Frame, Unidentified, Visit
from pulsar_api.web.responses import header, new_app, problem, reply
from pulsar_api.web.server.body import BodyRequest, body_of
from pulsar_api.web.server.websocket import MAX_MESSAGE, WebSocket, handshake, limit_buffer

_log = Logger()

AWAY = 5.0
"""Seconds for which a session by HTTP waits for its client to come back."""
STREAMED = 128 * 1024
"""Bytes after which a stream ends, and the client opens another."""
MAX_NAME = 100
"""Characters of the name of a session."""
COOKIE = "pulsar-sockjs"
"""Shows who has opened a session by HTTP, to a client that keeps cookies."""

_OPEN = "o"
_BUSY = 'c[2010,"Another connection still open"]'
_PRELUDE = "h" * 2048
_SCRIPT = "application/javascript; charset=UTF-8"
_TEXT = "text/plain; charset=UTF-8"
_PLAIN = re.compile(r"[\w./%~-]+", re.ASCII)
_NO_CACHE = "no-store, no-cache, no-transform, must-revalidate, max-age=0"


@define(eq=False)
class _Session:
    """A client by HTTP, between two of its requests as well."""

    visit: Visit
    key: str = field(factory=partial(secrets.token_urlsafe, 32), repr=False)
    """The value of its cookie."""
    busy: bool = False
    gone: IDelayedCall | None = None


@frozen(eq=False)
class SockJS:
    """The routes below ``/websocket``."""

    app: ClassVar[Klein] = new_app()

    access: Access
    feed: Feed
    clock: IReactorTime
    max_sessions: int = 1000
    """How many sessions by HTTP there may be at a time."""
    _sessions: dict[str, _Session] = field(factory=dict)
    _unidentified: Unidentified = field(factory=Unidentified)

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
                return self._too_many(request)
            return _answer(request, _OPEN)
        if not self._is_theirs(request, session):
            return _not_theirs(request)
        if session.busy:
            return _answer(request, _BUSY)
        self._take(session)
        _drop_body(request)
        try:
            frame = await self._frame(request, session)
            if frame is None:
                return _not_theirs(request)
            if isinstance(frame, str):
                return _answer(request, frame)
            outlet = _begin(request, self.clock)
            await self._send(outlet, session, frame)
            return outlet.end()
        finally:
            self._give_back(name, session)

    @app.route("/websocket/<server>/<name>/xhr_streaming", methods=["POST"])
    async def stream(self, request: Request, server: str, name: str) -> bytes:
        self.access.origins.check(request)
        session = self._sessions.get(name)
        begin = [_PRELUDE]
        opens = session is None
        if session is None:
            session = self._open(request, name)
            if session is None:
                return self._too_many(request)
            begin.append(_OPEN)
        elif not self._is_theirs(request, session):
            return _not_theirs(request)
        busy = session.busy
        outlet = _begin(request, self.clock)
        for line in [*begin, _BUSY] if busy else begin:
            await outlet.write(f"{line}\n".encode())
        if busy:
            return outlet.end()
        self._take(session)
        try:
            while outlet.sent < STREAMED:
                if opens:
                    # This very request is the proof that the session is the client's.
                    frame: Frame | None = await session.visit.frame()
                    _note_known(request, session)
                else:
                    frame = await self._frame(request, session)
                if frame is None:
                    break
                await self._send(outlet, session, frame)
                if frame in LAST:
                    break
        finally:
            self._give_back(name, session)
        return outlet.end()

    @app.route("/websocket/<server>/<name>/xhr_send", methods=["POST"])
    async def send(self, request: Request, server: str, name: str) -> bytes:
        self.access.origins.check(request)
        session = self._sessions.get(name)
        if session is None or not self._is_theirs(request, session):
            detail = "There is no such session; it may have ended."
            return problem(request, 404, "unknown-session", "Unknown session", detail)
        messages = _messages(await body_of(request, None, MAX_MESSAGE))
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
        visit = Visit(
            self.access, self.feed, self.clock, address, shown, self._unidentified
        )
        visit.begin()
        return visit

    async def _frame(self, request: Request, session: _Session) -> Frame | None:
        """Return the next frame; None if the session turns out to be somebody else's."""
        visit = session.visit
        if not visit.decided:
            await visit.settle()
            if not visit.decided:
                return BEAT
            if visit.known and not self._is_theirs(request, session):
                return None
        _note_known(request, session)
        return await visit.frame()

    async def _send(self, outlet: "_Outlet", session: _Session, frame: Frame) -> None:
        """Write a frame and a line end."""

        async def write(text: str, last: bool) -> None:  # noqa: FBT001
            if session.visit.over:
                await outlet.abort()  # half a message cannot be ended well
            await outlet.write(f"{text}\n".encode() if last else text.encode())

        if isinstance(frame, str):
            await outlet.write(f"{frame}\n".encode())
        else:
            await frame.send(write)

    def _is_theirs(self, request: Request, session: _Session) -> bool:
        """Return whether a request comes from the client that opened the session.

        The name of a session is no secret. The client shows the session's cookie, or the
        credentials that it was let in by. Before it is let in its address is enough: it
        may yet say who it is, and is told nothing.
        """
        visit = session.visit
        if visit.address != self.access.origins.address(request):
            return False
        key = cookies(header(request, "cookie")).get(COOKIE, "")
        if secrets.compare_digest(key.encode(), session.key.encode()):
            return True
        return visit.matches(self.access.shown(request))

    def _open(self, request: Request, name: str) -> _Session | None:
        if len(self._sessions) >= self.max_sessions and not self._make_room():
            return None
        session = self._sessions[name] = _Session(self.visit(request))
        if self.access.authenticator is not None:
            secure = self.access.secure(request)
            path = urlsplit(self.access.origins.base(request)).path + _folder(request)
            flags = "; HttpOnly; SameSite=Lax" + ("; Secure" if secure else "")
            text = f"{COOKIE}={session.key}; Path={path}{flags}"
            request.responseHeaders.addRawHeader("Set-Cookie", text)
        self._give_back(name, session)
        return session

    def _too_many(self, request: Request) -> bytes:
        request.setHeader("Retry-After", "5")
        detail = (
            f"{self.max_sessions} sessions are open, which is the limit; try again later."
        )
        return problem(request, 503, "too-many-sessions", "Too many sessions", detail)

    def _make_room(self) -> bool:
        """Forget who has opened a session and is not known by now; the oldest first."""
        for name, session in self._sessions.items():
            if not session.visit.known:
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
                session.visit.close()


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


class _Outlet(Outlet):
    """An outlet with a small buffer, which counts what it has written."""

    def __init__(self, request: Request, clock: IReactorTime) -> None:
        limit_buffer(request.channel)
        super().__init__(request, clock)
        self.sent = 0

    async def write(self, data: bytes) -> None:
        """Write, and wait until there is room for more."""
        self.sent += len(data)
        await super().write(data)

    async def abort(self) -> None:
        """Cut the connection, whatever has not been read yet."""
        transport: Any = self._request.transport
        transport.abortConnection()
        await Deferred()


def _begin(request: Request, clock: IReactorTime) -> _Outlet:
    """Begin an answer whose length is not known yet."""
    _drop_body(request)
    request.setHeader("Content-Type", _SCRIPT)
    request.setHeader("Cache-Control", _NO_CACHE)
    request.setHeader("X-Accel-Buffering", "no")
    return _Outlet(request, clock)


def _answer(request: Request, frame: str) -> bytes:
    body = reply(request, f"{frame}\n".encode(), kind=_SCRIPT)
    request.setHeader("Cache-Control", _NO_CACHE)
    return body


def _not_theirs(request: Request) -> bytes:
    """Answer somebody else: 404, with the frame that SockJS has for it."""
    body = _answer(request, _BUSY)
    request.setResponseCode(404)
    return body


def _note_known(request: Request, session: _Session) -> None:
    """Count what a connection holds as that of somebody known, once its visitor is."""
    if isinstance(request, BodyRequest) and session.visit.known:
        request.caller_known()


def _drop_body(request: Request) -> None:
    """Free the body of a request that is answered slowly: nobody reads it."""
    if isinstance(request, BodyRequest) and request.body is not None:
        request.body.drop()


def _folder(request: Request) -> str:
    """Return the path of a session for its cookie, or a wider one if it is odd."""
    path: str = request.path.decode("ascii", "replace")
    return path.rpartition("/")[0] if _PLAIN.fullmatch(path) else "/websocket"


class _Tree(Resource):
    """Sends who asks for a WebSocket to Twisted's own, all others to the routes."""

    isLeaf = True

    def __init__(self, routes: Any, sockjs: SockJS) -> None:
        super().__init__()
        self._routes = routes
        self._sockjs = sockjs

    def render(self, request: Request) -> bytes | int:
        """Answer a request."""
        segments = request.path.split(b"/")[1:]
        if len(segments) == 4 and segments[3] == b"websocket" and all(segments):
            return self._open(request)
        if len(segments) == 4 and len(segments[2]) > MAX_NAME:
            detail = f"The name of a session has {MAX_NAME} characters at most."
            return problem(request, 404, "not-found", "Not found", detail)
        answer: bytes | int = self._routes.render(request)
        return answer

    def _open(self, request: Request) -> bytes | int:
        if request.method != b"GET":
            request.setHeader("Allow", "GET, OPTIONS")
            detail = "Only GET is possible here."
            return problem(request, 405, "method-not-allowed", "Not allowed", detail)
        try:
            self._sockjs.access.origins.check(request)
        except PulsarError as e:
            return problem(request, 403, "foreign-origin", "Another site", str(e))
        answer = handshake(request)
        if answer is None:
            detail = "This is no handshake of a WebSocket (RFC 6455, 4.2.1)."
            return problem(request, 400, "no-websocket", "No WebSocket", detail)
        _Socket(request, self._sockjs).start(answer)
        return NOT_DONE_YET


class _Socket(WebSocket):
    """Sends frames on a WebSocket, no faster than they are read."""

    def __init__(self, request: Request, sockjs: SockJS) -> None:
        super().__init__(request, sockjs.clock)
        self._visit = sockjs.visit(request)
        self._running: Deferred[None] | None = None

    def start(self, answer: bytes) -> None:
        """Answer the handshake and begin to tell."""
        super().start(answer)
        self._running = Deferred.fromCoroutine(self._run())
        self._running.addErrback(self._failed)

    def message_received(self, text: str) -> None:
        """Take what the client says; what is no JSON ends the connection."""
        messages = _messages(text)
        if messages is None:
            self.close()
        else:
            self._visit.hear(messages)

    def connection_closed(self) -> None:
        """Stop telling."""
        if self._running is not None:
            self._running.cancel()
        self._visit.close()

    async def _run(self) -> None:
        await self.send(_OPEN)
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
            self.abort()  # half a message cannot be ended well
        await self.send(text, last=last)

    def _failed(self, failure: Failure) -> None:
        if not failure.check(CancelledError):
            if not failure.check(PulsarError, OSError):
                _log.failure("A WebSocket has failed", failure)
            self.abort()
