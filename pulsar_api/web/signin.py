"""Signing in and out with a browser: a form, or GitHub's OAuth flow."""

import hmac
import json
import re
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import ClassVar
from urllib.parse import quote

from attrs import define, field
from cryptography.fernet import Fernet, InvalidToken
from klein import Klein
from twisted.internet.interfaces import IReactorTime
from twisted.web.server import Request

from pulsar_api.auth.authenticator import Credentials
from pulsar_api.auth.credentials import new_secret
from pulsar_api.auth.providers.github import GitHub
from pulsar_api.auth.rights import Caller
from pulsar_api.auth.sessions import SessionId
from pulsar_api.errors import (
    InvalidInput,
    LoginBound,
    NotAuthenticated,
    ProviderUnavailable,
    TooManyFailures,
)
from pulsar_api.tasks.targets import Target
from pulsar_api.web import cookies, decoding, encoding
from pulsar_api.web.api.tasks import query_of
from pulsar_api.web.authentication import IS_TOKEN, Access, set_session
from pulsar_api.web.responses import header, new_app, page, reply
from pulsar_api.web.server.body import FORM, body_of

START = "/web/"
"""The path that a browser is sent to after a sign-in, unless it asked for another."""
PENDING = 600.0
"""Seconds that a sign-in at GitHub may take."""
_LOCAL = re.compile(r"/(?![/\\])[!-\[\]-~]{0,2000}")
_HTML = "text/html; charset=utf-8"


@define(eq=False, slots=False)
class SignIn:
    """The routes of ``/login`` and ``/logout``."""

    app: ClassVar[Klein] = new_app()

    access: Access
    clock: IReactorTime
    github: GitHub | None = None
    """The provider for sign-ins at GitHub, if it has an OAuth app; or None."""
    confirm: Sequence[Target] = ()
    """Targets and actions for which the page asks for confirmation."""
    secret: Sequence[str] = ()
    """Name patterns of secret variables."""
    _fernet: Fernet = field(factory=lambda: Fernet(Fernet.generate_key()), init=False)
    """Seals what a browser keeps for us during a sign-in at GitHub."""
    _page: str = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._page = (files("pulsar_api") / "ui" / "login.html").read_text("utf-8")

    @app.route("/login", methods=["GET"])
    def form(self, request: Request) -> bytes:
        return self._form(request, local(query_of(request).get("next", "")), "", 200)

    @app.route("/login", methods=["POST"])
    async def login(self, request: Request) -> bytes:
        """Begin a session with a user name and password, or with a token."""
        self.access.origins.check(request)
        body = await body_of(request, None, FORM)
        fields = decoding.parse_form(header(request, "content-type"), body)
        user, secret = fields.get("user", ""), fields.get("password", "")
        target = local(fields.get("next", ""))
        if secret == IS_TOKEN:
            user, secret = "", user
        refusal = "Wrong user name or password, or this account has no access."
        return await self._enter(request, Credentials(user, secret), target, refusal)

    @app.route("/login/github", methods=["GET"])
    def ask_github(self, request: Request) -> bytes:
        """Send the browser to GitHub to sign in."""
        github = self._github()
        assert github.oauth is not None
        state, verifier = new_secret(), new_secret()
        target = local(query_of(request).get("next", ""))
        begun = json.dumps([state, verifier, target]).encode()
        sealed = self._fernet.encrypt_at_time(begun, int(self.clock.seconds()))
        self._remember(request, sealed.decode())
        callback = self._callback(request)
        url = github.oauth.authorize_url(state, verifier, callback, github.scope)
        return self._send_to(request, url)

    @app.route("/login/callback", methods=["GET"])
    async def from_github(self, request: Request) -> bytes:
        """Begin a session for a browser that GitHub has sent back with a code."""
        github = self._github()
        query = query_of(request)
        begun = self._begun(request, query.get("state", ""))
        self._remember(request, "")
        if begun is None:
            detail = "This sign-in was begun in another browser or too long ago. Try again."
            return self._form(request, START, detail, 403)
        verifier, target = begun
        code = query.get("code", "")
        token = None
        try:
            if code:
                callback = self._callback(request)
                token = await github.token_for(code, verifier, callback)
        except ProviderUnavailable as e:
            return self._later(request, target, e, 503)
        # Without a token the credentials are rejected.
        refusal = "GitHub did not confirm the sign-in, or this account has no access."
        return await self._enter(request, Credentials("", token or ""), target, refusal)

    @app.route("/login/me", methods=["GET"])
    async def me(self, request: Request) -> bytes:
        """Return who is signed in, and with which rights."""
        credentials = self.access.credentials(request)
        address = self.access.origins.address(request)
        caller = await self.access.caller(credentials, address)
        rights = [
            {"may": sorted(grant.rights), "on": list(map(str, grant.targets))}
            for grant in caller.grants
        ]
        me = {
            "user": None if caller.principal is None else caller.principal.name,
            "means": caller.means,
            "rights": rights,
            "signedIn": isinstance(credentials, SessionId)
            and self.access.authenticator is not None,
            "confirm": list(map(str, self.confirm)),
            "secret": list(self.secret),
        }
        return reply(request, encoding.encode(me))

    @app.route("/logout", methods=["POST"])
    async def logout(self, request: Request) -> bytes:
        """End this session, or with ``everywhere=1`` all sessions of the same user."""
        self.access.origins.check(request)
        everywhere = decoding.parse_flag(query_of(request), "everywhere")
        id = self.access.session(request)
        sessions = self.access.sessions
        user = None if id is None or sessions is None else await sessions.user(id)
        if sessions is not None and id is not None and user is not None:
            address = self.access.origins.address(request)
            caller = Caller(user, address, "session")
            what = "sign-out everywhere" if everywhere else "sign-out"
            self.access.audit.write(caller, what, allowed=True)
            await sessions.end(id)
            if everywhere:
                await sessions.end_all(user)
        set_session(request, None, secure=self.access.secure(request))
        return self._send_to(request, "/login")

    # -- what they share

    def _begun(self, request: Request, state: str) -> tuple[str, str] | None:
        """Return the verifier and the target of the sign-in that this browser has begun."""
        text = cookies.parse(header(request, "cookie")).get(self._login_cookie(request), "")
        now = int(self.clock.seconds())
        try:
            data = self._fernet.decrypt_at_time(text.encode(), int(PENDING), now)
        except InvalidToken:
            return None
        expected, verifier, target = json.loads(data)
        if not hmac.compare_digest(expected.encode(), state.encode("utf-8", "replace")):
            return None
        return verifier, target

    def _login_cookie(self, request: Request) -> str:
        return "__Host-pulsar-login" if self.access.secure(request) else "pulsar-login"

    async def _enter(
        self, request: Request, credentials: Credentials, target: str, refusal: str
    ) -> bytes:
        """Begin a session and send the browser on, or show the form with the reason."""
        try:
            await self._begin(request, credentials)
        except NotAuthenticated:
            return self._form(request, target, refusal, 403)
        except LoginBound as e:
            return self._form(request, target, str(e), 403)
        except TooManyFailures as e:
            return self._later(request, target, e, 429)
        except ProviderUnavailable as e:
            return self._later(request, target, e, 503)
        return self._send_to(request, target)

    def _later(
        self,
        request: Request,
        target: str,
        why: TooManyFailures | ProviderUnavailable,
        status: int,
    ) -> bytes:
        request.setHeader("Retry-After", str(why.retry_after))
        return self._form(request, target, str(why), status)

    async def _begin(self, request: Request, credentials: Credentials) -> None:
        """Begin a new session for the caller with these credentials."""
        sessions = self.access.sessions
        if sessions is None:
            raise InvalidInput(
                "login",
                "this daemon does not authenticate callers; there is no need to sign in",
            )
        address = self.access.origins.address(request)
        caller = await self.access.caller(credentials, address)
        assert caller.principal is not None
        old = self.access.session(request)
        if old is not None:
            await sessions.end(old)
        id = await sessions.begin(caller.principal, credentials)
        set_session(request, id, secure=self.access.secure(request))
        self.access.audit.write(caller, "sign-in", allowed=True)

    def _github(self) -> GitHub:
        if self.github is None or self.github.oauth is None:
            raise InvalidInput("login", "this daemon is not set up for sign-ins at GitHub")
        return self.github

    def _callback(self, request: Request) -> str:
        return f"{self.access.origins.base(request)}/login/callback"

    def _remember(self, request: Request, value: str) -> None:
        age = int(PENDING) if value else 0
        secure = self.access.secure(request)
        name = self._login_cookie(request)
        cookies.set_cookie(request, name, value, secure=secure, age=age)

    def _send_to(self, request: Request, url: str) -> bytes:
        request.setHeader("Location", url)
        return reply(request, b"", 303, _HTML)

    def _form(self, request: Request, target: str, message: str, status: int) -> bytes:
        by_github = self.github is not None and self.github.oauth is not None
        places = {
            "next": escape(target),
            "next_query": quote(target, safe=""),
            "message": escape(message),
            "github": "" if by_github else " hidden",
        }
        return page(request, self._page, places, status)


def local(text: str) -> str:
    """Return a path of the daemon: the given one, or `START` if that leads elsewhere."""
    return text if _LOCAL.fullmatch(text) else START
