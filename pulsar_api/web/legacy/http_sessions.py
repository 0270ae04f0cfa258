"""Sessions of SockJS clients that use plain HTTP, kept between two of their requests."""

import re
import secrets
from functools import partial
from urllib.parse import urlsplit

from attrs import define, field
from twisted.internet.interfaces import IDelayedCall
from twisted.web.server import Request

from pulsar_api.web import cookies
from pulsar_api.web.legacy.visit import Visit, Visits
from pulsar_api.web.responses import header

AWAY = 5.0
"""Seconds for which a session waits for the next request of its client."""
COOKIE = "pulsar-sockjs"
"""Proves who has opened a session, for clients that keep cookies."""
_PLAIN = re.compile(r"[\w./%~-]+", re.ASCII)


@define(eq=False)
class Session:
    """A client by HTTP."""

    visit: Visit
    key: str = field(factory=partial(secrets.token_urlsafe, 32), repr=False)
    """The value of its cookie."""
    busy: bool = False
    """Whether a request of the client is being answered."""
    end: IDelayedCall | None = None
    """What ends the session unless the client returns."""


@define(eq=False)
class Sessions:
    """The open sessions by name."""

    visits: Visits
    most: int
    """How many there may be at a time."""
    _open: dict[str, Session] = field(factory=dict, init=False)

    def get(self, name: str) -> Session | None:
        """Return an open session, or None."""
        return self._open.get(name)

    def open(self, request: Request, name: str) -> Session | None:
        """Return a new session; None if too many are open."""
        if len(self._open) >= self.most and not self._make_room():
            return None
        session = self._open[name] = Session(self.visits.begin(request))
        access = self.visits.access
        if access.authenticator is not None:
            secure = access.secure(request)
            path = urlsplit(access.origins.base(request)).path + _folder(request)
            cookies.set_cookie(request, COOKIE, session.key, secure=secure, path=path)
        self.give_back(name, session)
        return session

    def belongs_to(self, session: Session, request: Request) -> bool:
        """Return whether a request comes from the client that opened the session.

        The name of a session is no secret. The client presents the cookie of the session
        or its accepted credentials. Before it is accepted its address is enough: it may
        yet authenticate, and is sent nothing.
        """
        visit, access = session.visit, self.visits.access
        if visit.address != access.origins.address(request):
            return False
        key = cookies.parse(header(request, "cookie")).get(COOKIE, "")
        if secrets.compare_digest(key.encode(), session.key.encode()):
            return True
        return visit.matches(access.credentials(request))

    def take(self, session: Session) -> None:
        """Keep a session open while a request of its client is answered."""
        session.busy = True
        if session.end is not None:
            session.end.cancel()
            session.end = None

    def give_back(self, name: str, session: Session) -> None:
        """End a session in `AWAY` seconds unless its client returns."""
        session.busy = False
        if session.end is None and self._open.get(name) is session:
            clock = self.visits.clock
            session.end = clock.callLater(AWAY, self._end, name, session)

    def release(self) -> None:
        """Tell all clients that the daemon stops, and end the idle sessions."""
        for session in self._open.values():
            session.visit.end()
            if session.end is not None:
                session.end.cancel()
                session.end = None
                session.visit.close()

    def _make_room(self) -> bool:
        """End the oldest session that is not accepted; return whether there was one."""
        for name, session in self._open.items():
            if not session.visit.known:
                session.visit.deny()
                if session.end is not None:
                    session.end.cancel()
                self._end(name, session)
                return True
        return False

    def _end(self, name: str, session: Session) -> None:
        if self._open.get(name) is session:
            del self._open[name]
        session.end = None
        session.visit.close()


def _folder(request: Request) -> str:
    """Return the path for the cookie of a session, or a wider one if it is odd."""
    path: str = request.path.decode("ascii", "replace")
    return path.rpartition("/")[0] if _PLAIN.fullmatch(path) else "/websocket"
