"""SockJS 0.3, as far as the clients of release 0.6 use it."""

import json
import secrets
from typing import Any, ClassVar

from attrs import field, frozen
from klein import Klein
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.web.resource import Resource
from twisted.web.server import Request

from pulsar_api.web.api.following import Outlet
from pulsar_api.web.authentication import Access
from pulsar_api.web.legacy.feed import Feed
from pulsar_api.web.legacy.frames import BEAT, BUSY, LAST, OPEN, Frame, parse_messages
from pulsar_api.web.legacy.http_sessions import Session, Sessions
from pulsar_api.web.legacy.sockets import SOCKET, Tree
from pulsar_api.web.legacy.visit import Visits
from pulsar_api.web.responses import new_app, problem, reply
from pulsar_api.web.routing import Mount, patterns
from pulsar_api.web.server.body import BodyRequest, body_of
from pulsar_api.web.server.websocket import MAX_MESSAGE, limit_buffer

STREAMED = 128 * 1024
"""Bytes after which a stream ends, and the client opens another."""
_JSON = "application/json"
_PRELUDE = "h" * 2048
_SCRIPT = "application/javascript; charset=UTF-8"
_TEXT = "text/plain; charset=UTF-8"
_NO_CACHE = "no-store, no-cache, no-transform, must-revalidate, max-age=0"


@frozen(eq=False)
class SockJS:
    """The routes below ``/websocket``."""

    app: ClassVar[Klein] = new_app()

    access: Access
    feed: Feed
    clock: IReactorTime
    max_sessions: int = 1000
    """How many sessions by HTTP there may be at a time."""
    _visits: Visits = field(init=False)
    _sessions: Sessions = field(init=False)

    @_visits.default
    def _new_visits(self) -> Visits:
        return Visits(self.access, self.feed, self.clock)

    @_sessions.default
    def _new_sessions(self) -> Sessions:
        return Sessions(self._visits, self.max_sessions)

    def mount(self) -> Mount:
        """Return what the API contributes; the WebSocket is no route of Klein's."""
        routes = patterns(self.app) | {SOCKET}
        return Mount(self.resource(), routes, identifies_later=True)

    def resource(self) -> Resource:
        """Return what a site serves."""
        return Tree(self.app.resource(), self._visits)

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
            if self._sessions.open(request, name) is None:
                return self._too_many(request)
            return _answer(request, OPEN)
        if not self._sessions.belongs_to(session, request):
            return _not_theirs(request)
        if session.busy:
            return _answer(request, BUSY)
        self._sessions.take(session)
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
            self._sessions.give_back(name, session)

    @app.route("/websocket/<server>/<name>/xhr_streaming", methods=["POST"])
    async def stream(self, request: Request, server: str, name: str) -> bytes:
        self.access.origins.check(request)
        session = self._sessions.get(name)
        begin = [_PRELUDE]
        opens = session is None
        if session is None:
            session = self._sessions.open(request, name)
            if session is None:
                return self._too_many(request)
            begin.append(OPEN)
        elif not self._sessions.belongs_to(session, request):
            return _not_theirs(request)
        busy = session.busy
        outlet = _begin(request, self.clock)
        for line in [*begin, BUSY] if busy else begin:
            await outlet.write(f"{line}\n".encode())
        if busy:
            return outlet.end()
        self._sessions.take(session)
        try:
            while outlet.sent < STREAMED:
                if opens:
                    # This request has opened the session, so it belongs to its client.
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
            self._sessions.give_back(name, session)
        return outlet.end()

    @app.route("/websocket/<server>/<name>/xhr_send", methods=["POST"])
    async def send(self, request: Request, server: str, name: str) -> bytes:
        self.access.origins.check(request)
        session = self._sessions.get(name)
        if session is None or not self._sessions.belongs_to(session, request):
            detail = "There is no session of this name; it may have ended."
            return problem(request, 404, "unknown-session", "Unknown session", detail)
        messages = parse_messages(await body_of(request, None, MAX_MESSAGE))
        if messages is None:
            detail = "body: must be a JSON array of texts"
            return problem(request, 400, "invalid-input", "Invalid input", detail, "body")
        session.visit.hear(messages)
        request.setResponseCode(204)
        request.setHeader("Content-Type", _TEXT)
        return b""

    async def _frame(self, request: Request, session: Session) -> Frame | None:
        """Return the next frame; None if the session turns out to be another client's."""
        visit = session.visit
        if not visit.decided:
            await visit.settle()
            if not visit.decided:
                return BEAT
            if visit.known and not self._sessions.belongs_to(session, request):
                return None
        _note_known(request, session)
        return await visit.frame()

    async def _send(self, outlet: "_Outlet", session: Session, frame: Frame) -> None:
        """Write a frame and a line end."""

        async def write(text: str, last: bool) -> None:  # noqa: FBT001
            if session.visit.over:
                await outlet.abort()  # half a message cannot be completed
            await outlet.write(f"{text}\n".encode() if last else text.encode())

        if isinstance(frame, str):
            await outlet.write(f"{frame}\n".encode())
        else:
            await frame.send(write)

    def _too_many(self, request: Request) -> bytes:
        request.setHeader("Retry-After", "5")
        detail = (
            f"{self.max_sessions} sessions are open, which is the limit; try again later."
        )
        return problem(request, 503, "too-many-sessions", "Too many sessions", detail)

    def release(self) -> None:
        """Tell all clients that the daemon stops."""
        self.feed.end()
        self._sessions.release()


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
    """Answer another client: 404, with the frame that SockJS has for it."""
    body = _answer(request, BUSY)
    request.setResponseCode(404)
    return body


def _note_known(request: Request, session: Session) -> None:
    """Count the memory of a connection no longer as unidentified, once its client is."""
    if isinstance(request, BodyRequest) and session.visit.known:
        request.caller_known()


def _drop_body(request: Request) -> None:
    """Free the body of a request that is answered slowly, as no route reads it."""
    if isinstance(request, BodyRequest) and request.body is not None:
        request.body.drop()
