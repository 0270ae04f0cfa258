"""Who sends a request: every route comes in here, and gets no more than it needs."""

import base64
import binascii
import re
from collections.abc import Awaitable, Callable, Coroutine
from functools import wraps
from typing import Any, Concatenate, ParamSpec

from attrs import define, field
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.server import Request

from pulsar_api.auth.audit import AuditLog
from pulsar_api.auth.authenticator import Authenticator, Credentials
from pulsar_api.auth.guard import Guard
from pulsar_api.auth.rights import Caller, Policy, Right
from pulsar_api.auth.sessions import TOTAL, Sessions
from pulsar_api.errors import LoginBound, NotAuthenticated, PulsarError
from pulsar_api.tasks.service import TaskService
from pulsar_api.web.origin import ForeignOrigin, Origins
from pulsar_api.web.responses import header
from pulsar_api.web.server.body import BodyRequest

_log = Logger()

RECHECK = 5.0
"""Seconds between two looks whether who is being answered still may."""
GRACE = 300.0
"""Seconds for which an open stream goes on while nobody can say who it is for."""
IS_TOKEN = "x-oauth-basic"  # noqa: S105
"""The password that says that the user name is a token (release 0.6, GitHub)."""
_MOST = 4096  # characters of credentials
_LOGIN = re.compile(r"[A-Za-z0-9_.-]{1,39}", re.ASCII)  # shorter than any token

P = ParamSpec("P")


def parse_authorization(text: str) -> Credentials | None:
    """Return what the header shows (RFC 7617, RFC 6750); None if it is not understood."""
    scheme, _, rest = text.strip().partition(" ")
    rest = rest.strip()
    if not rest or len(rest) > _MOST:
        return None
    if scheme.lower() == "bearer":
        return Credentials("", rest)
    if scheme.lower() != "basic":
        return None
    try:
        user, colon, password = (
            base64.b64decode(rest, validate=True).decode().partition(":")
        )
    except (binascii.Error, ValueError):
        return None
    if not colon:
        return None
    if password in {"", IS_TOKEN}:
        return Credentials("", user)
    return Credentials(user, password)


def cookies(text: str) -> dict[str, str]:
    """Return the cookies of a header (RFC 6265); one that is odd hides no other."""
    pairs = [part.partition("=") for part in text.split(";")]
    return {name.strip(): value.strip() for name, equals, value in pairs if equals}


def cookie_name(*, secure: bool) -> str:
    """Return what the cookie is called; the browser keeps this prefix to its promises."""
    return "__Host-pulsar" if secure else "pulsar"


@define(eq=False)
class _Held:
    """An answer that takes its time, and whom it is for."""

    shown: Credentials | str
    caller: Caller
    sure: float
    """When it was last certain that they may."""
    end: Callable[[], object]


@define(eq=False)
class Access:
    """Knows who sends a request, and lets them in as far as they may."""

    service: TaskService
    audit: AuditLog
    origins: Origins
    clock: IReactorTime
    authenticator: Authenticator | None = None
    """None: nobody is asked who they are."""
    sessions: Sessions | None = None
    policy: Policy = field(factory=Policy)
    _held: dict[_Held, None] = field(factory=dict, init=False)
    _next: IDelayedCall | None = field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        if self.authenticator is not None:
            self.authenticator.refused = self._refused

    async def enter(self, request: Request, right: Right) -> Guard:
        """Return the tasks as whoever sends this may see them by this right.

        Raises `NotAuthenticated`, `TooManyFailures`, `ProviderUnavailable`; and
        `ForeignOrigin` for what a browser sends for another site.
        """
        shown = self.shown(request)
        try:
            self.origins.check(request, navigation=right is Right.READ)
            by_session = self.authenticator is not None and isinstance(shown, str)
            if right is not Right.READ and request.method != b"POST":
                # A link may be from anywhere.
                if right is Right.KILL and by_session:
                    raise ForeignOrigin  # noqa: TRY301
                self.origins.check_link(request, referer=right is Right.RUN)
        except ForeignOrigin:
            caller = Caller(None, self.origins.address(request), "another site", ())
            self.audit.write(caller, right, allowed=False, path=_path(request))
            raise
        caller = await self.caller(shown, self.origins.address(request))
        if isinstance(request, BodyRequest):
            request.caller_known()
        if shown is not None:
            transport: Any = request.transport
            done = self.hold(shown, caller, transport.abortConnection)
            request.notifyFinish().addBoth(lambda _: done())
        return self.guard(caller, right)

    def guard(self, caller: Caller, right: Right) -> Guard:
        """Return the tasks as a caller may see them by this right."""
        return Guard(self.service, caller, right, self.audit)

    def shown(self, request: Request) -> Credentials | str | None:
        """Return what a request shows: credentials, or the id of a session."""
        given = header(request, "authorization")
        if given:
            return parse_authorization(given) or Credentials("", "")
        return self.session(request)

    def session(self, request: Request) -> str | None:
        """Return the id of the session that a request belongs to."""
        found = cookies(header(request, "cookie"))
        # Over HTTPS the name that no other host can have set, and no other.
        return found.get(cookie_name(secure=self.secure(request)))

    def secure(self, request: Request) -> bool:
        """Return whether the browser is connected by HTTPS, be it to a proxy."""
        return self.origins.base(request).startswith("https:")

    async def caller(
        self, shown: Credentials | str | None, address: str, *, used: bool = True
    ) -> Caller:
        """Return who shows this; raises as `enter`. ``used``: if a session is by that."""
        if self.authenticator is None:
            return Caller(None, address)
        if shown is None:
            raise NotAuthenticated
        means = ""
        credentials: Credentials | None
        if isinstance(shown, str):
            assert self.sessions is not None
            credentials = await self.sessions.find(shown, used=used)
            means = " session"
            if credentials is None:
                raise NotAuthenticated
        else:
            credentials = shown
        try:
            guess = not isinstance(shown, str)
            identity = await self.authenticator.identify(credentials, address, guess=guess)
        except NotAuthenticated:
            if isinstance(shown, str) and self.sessions is not None:
                await self.sessions.end(shown)
            raise
        except LoginBound as e:
            stranger = Caller(e.principal, address, e.principal.provider + means, ())
            self.audit.write(stranger, "sign-in", allowed=False, reason="login-bound")
            raise
        grants = self.policy.grants(identity)
        principal = identity.principal
        return Caller(principal, address, principal.provider + means, grants)

    def _refused(self, credentials: Credentials, address: str) -> None:
        # A name that might be a token is not written down.
        known = _LOGIN.fullmatch(credentials.user) is not None
        caller = Caller(None, address, "unknown", ())
        more = {"user": credentials.user} if known else {}
        self.audit.write(caller, "sign-in", allowed=False, **more)

    # -- who is let in now need not be in a minute

    def hold(
        self, shown: Credentials | str, caller: Caller, end: Callable[[], object]
    ) -> Callable[[], None]:
        """Call ``end`` when they may no more what they may now; return how to forget."""
        if self.authenticator is None:
            return lambda: None
        held = _Held(shown, caller, self.clock.seconds(), end)
        self._held[held] = None
        if self._next is None:
            self._next = self.clock.callLater(RECHECK, self._recheck)

        def done() -> None:
            self._held.pop(held, None)

        return done

    def release(self) -> None:
        """Look no more."""
        self.audit.close()
        if self._next is not None and self._next.active():
            self._next.cancel()
        self._held.clear()

    def _recheck(self) -> None:
        self._next = None
        now = self.clock.seconds()
        callers: dict[tuple[Credentials | str, str], list[_Held]] = {}
        for held in self._held:
            if held.sure <= now - RECHECK:
                callers.setdefault((held.shown, held.caller.address), []).append(held)
        for (shown, address), some in callers.items():
            looking = Deferred.fromCoroutine(self._look(shown, address, some))
            looking.addErrback(self._cannot_look, some)
        if self._held:
            self._next = self.clock.callLater(RECHECK, self._recheck)

    def _cannot_look(self, failure: Failure, some: list[_Held]) -> None:
        _log.failure("Cannot look who still may", failure)
        for held in some:
            self._held.pop(held, None)
            held.end()

    async def _look(
        self, shown: Credentials | str, address: str, some: list[_Held]
    ) -> None:
        now = self.clock.seconds()
        now_known = None
        unsure = False
        who = some[0].caller.by.name
        try:
            caller = await self.caller(shown, address, used=False)
            now_known = caller.principal, caller.grants
        except (NotAuthenticated, LoginBound) as e:
            _log.info("{who} is let in no more: {e}", who=who, e=e)
        except PulsarError as e:
            _log.warn("Nobody knows whether {who} may: {e}", who=who, e=e)
            unsure = True
        for held in some:
            if (held.caller.principal, held.caller.grants) == now_known:
                held.sure = now
            elif held in self._held and not (unsure and now < held.sure + GRACE):
                del self._held[held]
                held.end()


def needs(
    right: Right,
) -> Callable[
    [Callable[Concatenate[Any, Request, Guard, P], Awaitable[bytes]]],
    Callable[Concatenate[Any, Request, P], Coroutine[Any, Any, bytes]],
]:
    """Let a route be called with the tasks as its caller may see them by this right."""

    def decorate(
        handler: Callable[Concatenate[Any, Request, Guard, P], Awaitable[bytes]],
    ) -> Callable[Concatenate[Any, Request, P], Coroutine[Any, Any, bytes]]:
        @wraps(handler)
        async def enter(
            self: Any, request: Request, *args: P.args, **kwargs: P.kwargs
        ) -> bytes:
            access: Access = self.access
            guard = await access.enter(request, right)
            return await handler(self, request, guard, *args, **kwargs)

        found: Any = enter
        found.right = right
        return found  # type: ignore[no-any-return]

    return decorate


def _path(request: Request) -> str:
    path: bytes = request.path
    return path.decode("utf-8", "replace")


def set_session(request: Request, id: str, *, secure: bool) -> None:
    """Let a browser keep a session's id; an empty one lets it forget."""
    age = int(TOTAL) if id else 0
    flags = "; Secure" if secure else ""
    text = (
        f"{cookie_name(secure=secure)}={id}; Path=/; Max-Age={age}; HttpOnly; "
        f"SameSite=Lax{flags}"
    )
    request.responseHeaders.addRawHeader("Set-Cookie", text)
