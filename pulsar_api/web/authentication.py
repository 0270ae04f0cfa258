"""Identifies the caller of a request, and gives each route the tasks that it may use."""

import base64
import binascii
import re
from collections.abc import Awaitable, Callable, Coroutine
from functools import wraps
from typing import Any, Concatenate, ParamSpec

from attrs import define, field
from twisted.internet.interfaces import IReactorTime
from twisted.web.server import Request

from pulsar_api.auth.audit import AuditLog
from pulsar_api.auth.authenticator import Authenticator, Credentials
from pulsar_api.auth.guard import Guard
from pulsar_api.auth.rights import Caller, Policy, Right
from pulsar_api.auth.sessions import TOTAL, Presented, SessionId, Sessions
from pulsar_api.errors import LoginBound, NotAuthenticated
from pulsar_api.tasks.service import TaskService
from pulsar_api.web import cookies
from pulsar_api.web.origin import ForeignOrigin, Origins
from pulsar_api.web.responses import header
from pulsar_api.web.revalidation import Revalidation
from pulsar_api.web.server.body import BodyRequest

IS_TOKEN = "x-oauth-basic"  # noqa: S105
"""The password that marks the user name as a token (release 0.6, GitHub)."""
_MAX_CREDENTIALS = 4096  # characters
_LOGIN = re.compile(r"[A-Za-z0-9_.-]{1,39}", re.ASCII)  # shorter than any token

P = ParamSpec("P")


def parse_authorization(text: str) -> Credentials | None:
    """Return the credentials of the header (RFC 7617, RFC 6750); None if it is malformed.

    Not by werkzeug's `Authorization.from_header`, which accepts what is not Base64 and
    Basic credentials without a colon.
    """
    scheme, _, rest = text.strip().partition(" ")
    rest = rest.strip()
    if not rest or len(rest) > _MAX_CREDENTIALS:
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


def cookie_name(*, secure: bool) -> str:
    """Return the name of the session cookie; browsers enforce the rules of its prefix."""
    return "__Host-pulsar" if secure else "pulsar"


@define(eq=False)
class Access:
    """Identifies callers and gives them access as far as their rights go."""

    service: TaskService
    audit: AuditLog
    origins: Origins
    clock: IReactorTime
    authenticator: Authenticator | None = None
    """None: callers do not have to authenticate."""
    sessions: Sessions | None = None
    policy: Policy = field(factory=Policy)
    _revalidation: Revalidation = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._revalidation = Revalidation(self.clock, self._caller_now)
        if self.authenticator is not None:
            self.authenticator.refused = self._refused

    async def enter(self, request: Request, right: Right) -> Guard:
        """Return the tasks on which the caller of a request has a right.

        Raises:
            ForeignOrigin: A browser sends the request on behalf of another site.
            NotAuthenticated: There are no credentials, or wrong ones.
            LoginBound: Another account is bound to the login of this one.
            TooManyFailures: The caller's address has failed too often.
            ProviderUnavailable: The provider cannot be asked now.
            StoreUnavailable: The sessions cannot be read now.
        """
        credentials = self.credentials(request)
        try:
            self.origins.check(request, navigation=right is Right.READ)
            by_session = isinstance(credentials, SessionId)
            if right is not Right.READ and request.method != b"POST":
                # A link that leads here may be on any page.
                if right is Right.KILL and by_session and self.authenticator is not None:
                    raise ForeignOrigin  # noqa: TRY301
                self.origins.check_link(request, referer=right is Right.RUN)
        except ForeignOrigin:
            caller = Caller(None, self.origins.address(request), "another site", ())
            self.audit.write(caller, right, allowed=False, path=_path(request))
            raise
        caller = await self.caller(credentials, self.origins.address(request))
        if isinstance(request, BodyRequest):
            request.caller_known()
        if credentials is not None:
            transport: Any = request.transport
            stop = self.watch(credentials, caller, transport.abortConnection)
            request.notifyFinish().addBoth(lambda _: stop())
        return self.guard(caller, right)

    def guard(self, caller: Caller, right: Right) -> Guard:
        """Return the tasks on which a caller has a right."""
        return Guard(self.service, caller, right, self.audit)

    def credentials(self, request: Request) -> Presented | None:
        """Return what a request presents: credentials, or else the id of a session."""
        given = header(request, "authorization")
        if given:
            return parse_authorization(given) or Credentials("", "")
        return self.session(request)

    def session(self, request: Request) -> SessionId | None:
        """Return the id of the session that a request belongs to."""
        found = cookies.parse(header(request, "cookie"))
        # Over HTTPS only the name that no other host can have set.
        id = found.get(cookie_name(secure=self.secure(request)))
        return None if id is None else SessionId(id)

    def secure(self, request: Request) -> bool:
        """Return whether the browser uses HTTPS, to the daemon or to its proxy."""
        return self.origins.base(request).startswith("https:")

    async def caller(
        self, credentials: Presented | None, address: str, *, used: bool = True
    ) -> Caller:
        """Return the caller with these credentials at an address.

        It raises the errors of `enter`.

        ``used``: whether this counts as a use of the session.
        """
        if self.authenticator is None:
            return Caller(None, address)
        if credentials is None:
            raise NotAuthenticated
        if isinstance(credentials, Credentials):
            return await self._identified(credentials, address, "")
        assert self.sessions is not None
        found = await self.sessions.find(credentials, used=used)
        if found is None:
            raise NotAuthenticated
        try:
            return await self._identified(found, address, " session")
        except NotAuthenticated:
            await self.sessions.end(credentials)
            raise

    async def _identified(self, credentials: Credentials, address: str, by: str) -> Caller:
        assert self.authenticator is not None
        try:
            # A session that has become invalid is no guess.
            guess = not by
            identity = await self.authenticator.identify(credentials, address, guess=guess)
        except LoginBound as e:
            stranger = Caller(e.principal, address, e.principal.provider + by, ())
            self.audit.write(stranger, "sign-in", allowed=False, reason="login-bound")
            raise
        principal = identity.principal
        grants = self.policy.grants(identity)
        return Caller(principal, address, principal.provider + by, grants)

    async def _caller_now(self, credentials: Presented, address: str) -> Caller:
        return await self.caller(credentials, address, used=False)

    def _refused(self, credentials: Credentials, address: str) -> None:
        # A name that might be a token is not logged.
        known = _LOGIN.fullmatch(credentials.user) is not None
        caller = Caller(None, address, "unknown", ())
        more = {"user": credentials.user} if known else {}
        self.audit.write(caller, "sign-in", allowed=False, **more)

    def watch(
        self, credentials: Presented, caller: Caller, end: Callable[[], object]
    ) -> Callable[[], None]:
        """Call ``end`` when the caller's rights change. Return a function that stops it."""
        if self.authenticator is None:
            return lambda: None
        return self._revalidation.watch(credentials, caller, end)

    def release(self) -> None:
        """Stop watching callers, and complete the audit log."""
        self.audit.close()
        self._revalidation.release()


def needs(
    right: Right,
) -> Callable[
    [Callable[Concatenate[Any, Request, Guard, P], Awaitable[bytes]]],
    Callable[Concatenate[Any, Request, P], Coroutine[Any, Any, bytes]],
]:
    """Return a decorator for routes: they get the tasks on which the caller has a right."""

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


def set_session(request: Request, id: SessionId | None, *, secure: bool) -> None:
    """Let a browser keep the id of a session; None removes it."""
    age = 0 if id is None else int(TOTAL)
    value = "" if id is None else id.value
    name = cookie_name(secure=secure)
    cookies.set_cookie(request, name, value, secure=secure, age=age)
