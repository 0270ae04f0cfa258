"""Visitors of SockJS, whatever they come by: who they are, and what they are told."""

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

from pulsar_api.auth.authenticator import Credentials
from pulsar_api.auth.rights import Right
from pulsar_api.concurrency.changes import Changes
from pulsar_api.errors import NotAuthenticated, PulsarError
from pulsar_api.web.authentication import Access, cookie_name, cookies
from pulsar_api.web.legacy.feed import Closed, Feed, Subscription
from pulsar_api.web.legacy.message import Message

_log = Logger()

HEARTBEAT = 25.0
"""Seconds of silence after which a heartbeat is sent."""
MAX_ID = 200
"""Characters of the id of a session of the page."""
ANSWER = 10.0
"""Seconds for a client to say who it is, where its request did not."""
MAX_UNIDENTIFIED = 250
"""Clients that may be about to say who they are; with one more the oldest is denied."""

BEAT = "h"
_GO_AWAY = 'c[3000,"Go away!"]'
_DENIED = 'c[403,"Access denied"]'
LAST = frozenset({_GO_AWAY, _DENIED})
"""Frames after which there is nothing more."""


Frame = str | Message
"""What is sent at a time."""


async def next_frame(subscription: Subscription, clock: IReactorTime) -> Frame:
    """Return the next frame: a message, after a silence a heartbeat, or the end."""
    waiting: Deferred[Frame] = Deferred.fromCoroutine(subscription.next())
    try:
        return await waiting.addTimeout(HEARTBEAT, clock, lambda *_: BEAT)
    except Closed:
        return _GO_AWAY


@define(eq=False)
class Unidentified:
    """The visits that have not said yet who they are."""

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
    """A client, whatever it came by: who it is, once that is known, and what it is told."""

    _access: Access
    _feed: Feed
    _clock: IReactorTime
    address: str
    shown: Credentials | str | None
    """What the request showed by which it came."""
    _unidentified: Unidentified
    _decided: Changes = field(init=False)
    """Its version is 1 when it is known who it is."""
    _heard: Deferred[str] = field(factory=Deferred, init=False)
    _subscription: Subscription | None = field(default=None, init=False)
    _proof: Credentials | str | None = field(default=None, init=False)
    """The credentials that were accepted."""
    _forget: Callable[[], None] = field(default=lambda: None, init=False)
    _deciding: Deferred[None] | None = field(default=None, init=False)
    _over: str = field(default="", init=False)
    """The last frame, if there is nothing more to tell."""

    def __attrs_post_init__(self) -> None:
        self._decided = Changes(self._clock)

    @property
    def decided(self) -> bool:
        """Whether it is known who it is, or that it is nobody."""
        return self._decided.version > 0

    @property
    def known(self) -> bool:
        """Whether the client has been let in."""
        return self._subscription is not None

    @property
    def over(self) -> bool:
        """Whether there is nothing more to tell."""
        return self._over != ""

    def begin(self) -> None:
        """Find out who it is: by its request, or by the first thing that it says."""
        self._deciding = Deferred.fromCoroutine(self._decide())
        self._deciding.addErrback(_ended)

    async def _decide(self) -> None:
        access, shown = self._access, self.shown
        caller = None
        try:
            if shown is not None or access.authenticator is None:
                with suppress(NotAuthenticated):  # it may yet say something better
                    caller = await access.caller(shown, self.address)
            if caller is None:
                self._unidentified.enter(self)
                try:
                    waiting = self._heard.addTimeout(ANSWER, self._clock, lambda *_: "")
                    shown = _shown(await waiting)
                finally:
                    self._unidentified.leave(self)
                caller = await access.caller(shown, self.address)
        except PulsarError:
            self.deny()
            return
        if self._over:
            return
        self._proof = shown
        if shown is not None:
            self._forget = access.hold(shown, caller, self.deny)
        sees = access.guard(caller, Right.READ).sees
        self._subscription = self._feed.subscribe(sees)
        self._decided.advance(1)

    def matches(self, shown: Credentials | str | None) -> bool:
        """Return whether a request that shows this may come from the same client.

        Once the client is known, only if it shows the credentials that were accepted.
        """
        if self.known and self._access.authenticator is not None:
            return _same(shown, self._proof)
        return self.shown is None or _same(shown, self.shown)

    def hear(self, messages: Sequence[str]) -> None:
        """Take what the client says; only the first message counts."""
        if messages and not self._heard.called:
            self._heard.callback(messages[0])

    def deny(self) -> None:
        """Let it hear that it may not, and nothing more."""
        self._over = self._over or _DENIED
        if self._subscription is not None:
            self._subscription.end()
        self._decided.advance(1)

    def end(self) -> None:
        """Let it hear that the daemon stops, if it was never told who it is."""
        if self._subscription is None:
            self._over = self._over or _GO_AWAY
            self._decided.advance(1)

    def close(self) -> None:
        """Forget it."""
        self._forget()
        self._over = self._over or _GO_AWAY
        if self._deciding is not None:
            self._deciding.cancel()
        if self._subscription is not None:
            self._subscription.close()

    async def settle(self) -> None:
        """Wait until it is known who it is, `HEARTBEAT` seconds at most."""
        decided = self._decided.after(0)
        await decided.addTimeout(HEARTBEAT, self._clock, lambda *_: 0)

    async def frame(self) -> Frame:
        """Return the next frame: a message, after a silence a heartbeat, or the end."""
        if not self.decided:
            await self.settle()
        if self._over or self._subscription is None:
            return self._over or BEAT
        frame = await next_frame(self._subscription, self._clock)
        return self._over or frame


def _shown(text: str) -> Credentials | str | None:
    """Return what ``{"token": …}`` or ``{"cookie": …}`` shows."""
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
        found = cookies(cookie)
        names = [cookie_name(secure=secure) for secure in (True, False)]
        return next((found[n] for n in names if n in found), cookie[:MAX_ID])
    return None


def _same(one: Credentials | str | None, other: Credentials | str | None) -> bool:
    """Return whether both are the same credentials, in constant time; None is none."""
    if isinstance(one, Credentials) and isinstance(other, Credentials):
        return compare_digest(one.key, other.key)
    if isinstance(one, str) and isinstance(other, str):
        return compare_digest(one.encode(), other.encode())
    return False


def _ended(failure: Failure) -> None:
    if not failure.check(CancelledError):
        _log.failure("A visit has failed", failure)
