"""Visits of SockJS clients over any transport: who they are, what they are sent."""

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from hmac import compare_digest

from attrs import define, field
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.server import Request

from pulsar_api.auth.authenticator import Credentials
from pulsar_api.auth.rights import Right
from pulsar_api.auth.sessions import Presented, SessionId
from pulsar_api.concurrency.changes import Changes
from pulsar_api.errors import NotAuthenticated, PulsarError
from pulsar_api.web import cookies
from pulsar_api.web.authentication import Access, cookie_name
from pulsar_api.web.legacy.feed import Closed, Feed, Subscription
from pulsar_api.web.legacy.frames import BEAT, DENIED, GO_AWAY, Frame

_log = Logger()

HEARTBEAT = 25.0
"""Seconds of silence after which a heartbeat is sent."""
MAX_ID = 200
"""Characters of a session id of the page."""
ANSWER = 10.0
"""Seconds for a client to authenticate by a message, where its request did not."""
MAX_UNIDENTIFIED = 250
"""Clients that have not authenticated yet; with one more the oldest is denied."""


async def next_frame(subscription: Subscription, clock: IReactorTime) -> Frame:
    """Return the next frame: a message, a heartbeat after a silence, or the end."""
    waiting: Deferred[Frame] = Deferred.fromCoroutine(subscription.next())
    try:
        return await waiting.addTimeout(HEARTBEAT, clock, lambda *_: BEAT)
    except Closed:
        return GO_AWAY


@define(eq=False)
class Unidentified:
    """The visits that have not authenticated yet."""

    limit: int = MAX_UNIDENTIFIED
    _waiting: OrderedDict["Visit", None] = field(factory=OrderedDict, init=False)

    def enter(self, visit: "Visit") -> None:
        """Add a visit; if there are too many, deny the oldest."""
        self._waiting[visit] = None
        if len(self._waiting) > self.limit:
            oldest, _ = self._waiting.popitem(last=False)
            oldest.deny()

    def leave(self, visit: "Visit") -> None:
        """Remove a visit."""
        self._waiting.pop(visit, None)


@define(eq=False)
class Visit:
    """A client: who it is, once that is known, and what it is sent."""

    _access: Access
    _feed: Feed
    _clock: IReactorTime
    address: str
    credentials: Presented | None
    """What its first request presented."""
    _unidentified: Unidentified
    _decided: Changes = field(init=False)
    """Its version is 1 once the client is accepted or denied."""
    _heard: Deferred[str] = field(factory=Deferred, init=False)
    _subscription: Subscription | None = field(default=None, init=False)
    _accepted: Presented | None = field(default=None, init=False)
    """The credentials that were accepted."""
    _unwatch: Callable[[], None] = field(default=lambda: None, init=False)
    _deciding: Deferred[None] | None = field(default=None, init=False)
    _over: str = field(default="", init=False)
    """The last frame, once there is nothing more to send."""

    def __attrs_post_init__(self) -> None:
        self._decided = Changes(self._clock)

    @property
    def decided(self) -> bool:
        """Whether the client has been accepted or denied."""
        return self._decided.version > 0

    @property
    def known(self) -> bool:
        """Whether the client has been accepted."""
        return self._subscription is not None

    @property
    def over(self) -> bool:
        """Whether there is nothing more to send."""
        return self._over != ""

    def begin(self) -> None:
        """Authenticate the client by its request, or by its first message."""
        self._deciding = Deferred.fromCoroutine(self._decide())
        self._deciding.addErrback(_ended)

    async def _decide(self) -> None:
        access, credentials = self._access, self.credentials
        caller = None
        try:
            if credentials is not None or access.authenticator is None:
                with suppress(NotAuthenticated):  # its first message may be better
                    caller = await access.caller(credentials, self.address)
            if caller is None:
                self._unidentified.enter(self)
                try:
                    waiting = self._heard.addTimeout(ANSWER, self._clock, lambda *_: "")
                    credentials = _presented(await waiting)
                finally:
                    self._unidentified.leave(self)
                caller = await access.caller(credentials, self.address)
        except PulsarError:
            self.deny()
            return
        if self._over:
            return
        self._accepted = credentials
        if credentials is not None:
            self._unwatch = access.watch(credentials, caller, self.deny)
        sees = access.guard(caller, Right.READ).sees
        self._subscription = self._feed.subscribe(sees)
        self._decided.advance(1)

    def matches(self, credentials: Presented | None) -> bool:
        """Return whether a request with these credentials may be of the same client.

        Once the client is accepted, only the accepted credentials match.
        """
        if self.known and self._access.authenticator is not None:
            return _same(credentials, self._accepted)
        return self.credentials is None or _same(credentials, self.credentials)

    def hear(self, messages: Sequence[str]) -> None:
        """Take messages of the client; only the first one counts."""
        if messages and not self._heard.called:
            self._heard.callback(messages[0])

    def deny(self) -> None:
        """Tell the client that it has no access, and nothing more."""
        self._over = self._over or DENIED
        if self._subscription is not None:
            self._subscription.end()
        self._decided.advance(1)

    def end(self) -> None:
        """Tell a client that the feed does not tell that the daemon stops."""
        if self._subscription is None:
            self._over = self._over or GO_AWAY
            self._decided.advance(1)

    def close(self) -> None:
        """End the visit."""
        self._unwatch()
        self._over = self._over or GO_AWAY
        if self._deciding is not None:
            self._deciding.cancel()
        if self._subscription is not None:
            self._subscription.close()

    async def settle(self) -> None:
        """Wait until the client is accepted or denied, for `HEARTBEAT` seconds at most."""
        decided = self._decided.after(0)
        await decided.addTimeout(HEARTBEAT, self._clock, lambda *_: 0)

    async def frame(self) -> Frame:
        """Return the next frame: a message, a heartbeat after a silence, or the end."""
        if not self.decided:
            await self.settle()
        if self._over or self._subscription is None:
            return self._over or BEAT
        frame = await next_frame(self._subscription, self._clock)
        return self._over or frame


@define(eq=False)
class Visits:
    """Begins the visits of clients."""

    access: Access
    feed: Feed
    clock: IReactorTime
    _unidentified: Unidentified = field(factory=Unidentified, init=False)

    def begin(self, request: Request) -> Visit:
        """Return the visit of a client, which may not have authenticated yet."""
        address = self.access.origins.address(request)
        credentials = self.access.credentials(request)
        visit = Visit(
            self.access, self.feed, self.clock, address, credentials, self._unidentified
        )
        visit.begin()
        return visit


def _presented(text: str) -> Presented | None:
    """Return the credentials of a message ``{"token": …}`` or ``{"cookie": …}``."""
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return None
    token, cookie = (
        said.get(name) if isinstance(said, dict) else None for name in ("token", "cookie")
    )
    if isinstance(token, str):
        return Credentials("", token)
    if isinstance(cookie, str):
        found = cookies.parse(cookie)
        names = [cookie_name(secure=secure) for secure in (True, False)]
        return SessionId(next((found[n] for n in names if n in found), cookie[:MAX_ID]))
    return None


def _same(one: Presented | None, other: Presented | None) -> bool:
    """Return whether both are the same, in constant time; nothing is never the same."""
    if isinstance(one, Credentials) and isinstance(other, Credentials):
        return compare_digest(one.key, other.key)
    if isinstance(one, SessionId) and isinstance(other, SessionId):
        return compare_digest(one.value.encode(), other.value.encode())
    return False


def _ended(failure: Failure) -> None:
    if not failure.check(CancelledError):
        _log.failure("A visit has failed", failure)
