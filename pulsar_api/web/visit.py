"""Visitors of SockJS, whatever they come by: who they are, and what they are told."""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress

from attrs import define, field
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from pulsar_api.auth.gate import Credentials
from pulsar_api.auth.rights import Right
from pulsar_api.changes import Changes
from pulsar_api.errors import NotAuthenticated, PulsarError
from pulsar_api.web.access import Access, cookie_name, cookies
from pulsar_api.web.feed import Closed, Feed, Subscription

_log = Logger()

HEARTBEAT = 25.0
"""Seconds of silence after which a heartbeat is sent."""
MAX_ID = 200
"""Characters of the id of a session of the page."""
ANSWER = 10.0
"""Seconds for a client to say who it is, where its request did not."""

_BEAT = "h"
_GO_AWAY = 'c[3000,"Go away!"]'
_DENIED = 'c[403,"Access denied"]'
LAST = frozenset({_GO_AWAY, _DENIED})
"""Frames after which there is nothing more."""


def _framed(message: str) -> str:
    return f"a[{json.dumps(message)}]"


async def next_frame(subscription: Subscription, clock: IReactorTime) -> str:
    """Return the next frame: a message, after a silence a heartbeat, or the end."""
    waiting = Deferred.fromCoroutine(subscription.next())
    try:
        message = await waiting.addTimeout(HEARTBEAT, clock, lambda *_: "")
    except Closed:
        return _GO_AWAY
    return _framed(message) if message else _BEAT


@define(eq=False)
class Visit:
    """A client, whatever it came by: who it is, once that is known, and what it is told."""

    _access: Access
    _feed: Feed
    _clock: IReactorTime
    address: str
    shown: Credentials | str | None
    """What the request showed by which it came."""
    _decided: Changes = field(init=False)
    """Its version is 1 when it is known who it is."""
    _heard: Deferred[str] = field(factory=Deferred, init=False)
    _subscription: Subscription | None = field(default=None, init=False)
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

    def begin(self) -> None:
        """Find out who it is: by its request, or by the first thing that it says."""
        self._deciding = Deferred.fromCoroutine(self._decide(self.shown))
        self._deciding.addErrback(_ended)

    async def _decide(self, shown: Credentials | str | None) -> None:
        access = self._access
        caller = None
        try:
            if shown is not None or access.gate is None:
                with suppress(NotAuthenticated):  # it may yet say something better
                    caller = await access.caller(shown, self.address)
            if caller is None:
                said = await self._heard.addTimeout(ANSWER, self._clock, lambda *_: "")
                shown = _shown(said)
                caller = await access.caller(shown, self.address)
        except PulsarError:
            self.deny()
            return
        if self._over:
            return
        if shown is not None:
            self._forget = access.hold(shown, caller, self.deny)
        sees = access.guard(caller, Right.READ).sees
        self._subscription = self._feed.subscribe(sees)
        self._decided.advance(1)

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

    async def frame(self) -> str:
        """Return the next frame: a message, after a silence a heartbeat, or the end."""
        if not self._decided.version:
            decided = self._decided.after(0)
            await decided.addTimeout(HEARTBEAT, self._clock, lambda *_: 0)
        if self._over or self._subscription is None:
            return self._over or _BEAT
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


def _ended(failure: Failure) -> None:
    if not failure.check(CancelledError):
        _log.failure("A visit has failed", failure)
