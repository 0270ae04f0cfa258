"""Users of GitHub, or of a GitHub Enterprise server: by their token, or by OAuth.

REST API: https://docs.github.com/en/rest (users, orgs/members, teams/members).
OAuth: https://docs.github.com/en/apps/oauth-apps, RFC 6749, PKCE by RFC 7636.
"""

import base64
import hashlib
import json
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NoReturn, TypeVar
from urllib.parse import quote, urlencode

from attrs import define, field, frozen
from treq.client import HTTPClient
from twisted.internet.defer import (
    CancelledError,
    Deferred,
    DeferredSemaphore,
    FirstError,
    gatherResults,
)
from twisted.internet.interfaces import IReactorTime
from twisted.internet.protocol import Protocol, connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone
from twisted.web.http_headers import Headers

from pulsar_api.auth.authenticator import Credentials
from pulsar_api.auth.credentials import CredentialStore, Login
from pulsar_api.auth.rights import Identity
from pulsar_api.concurrency.background import shielded
from pulsar_api.errors import LoginBound, ProviderUnavailable, PulsarError
from pulsar_api.principal import Principal

_log = Logger()
T = TypeVar("T")

NAME = "GitHub"
DEADLINE = 4.0
"""Seconds for all that has to be asked to let one user in."""
MOST = 100
"""Users that are asked for at the same time."""
KNOWN = 10.0
"""Seconds for which the groups of a user are known, whichever token they show: the
daemon's own questions are counted by GitHub, 5,000 in an hour."""
_MAX_ANSWER = 1 << 20
_MAX_WAIT = 3600
_MOST_ID = 1 << 63
_REMEMBERED = 1000
_TOKEN = re.compile(r"[A-Za-z0-9_.\-]{8,255}", re.ASCII)
_LOGIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}", re.ASCII)


@frozen
class Members:
    """Who is let in: logins, members of organisations, or of teams (``org/team``)."""

    method: str
    """``user``, ``org`` or ``team``."""
    names: frozenset[str]
    """In lower case."""

    def groups(self) -> frozenset[str]:
        """Return what they are called in `Identity.groups`."""
        return frozenset(f"{self.method}:{name}" for name in self.names)


@frozen
class OAuth:
    """Our registration as an OAuth app."""

    url: str
    """Where people sign in, ``https://github.com``."""
    client_id: str
    client_secret: str = field(repr=False)

    def authorize_url(self, state: str, verifier: str, callback: str, scope: str) -> str:
        """Return where to send a browser that wants to sign in."""
        hashed = hashlib.sha256(verifier.encode()).digest()
        query = {
            "client_id": self.client_id,
            "redirect_uri": callback,
            "scope": scope,
            "state": state,
            "code_challenge": base64.urlsafe_b64encode(hashed).rstrip(b"=").decode(),
            "code_challenge_method": "S256",
        }
        return f"{self.url}/login/oauth/authorize?{urlencode(query)}"


@define(eq=False)
class GitHub:
    """Asks GitHub who has a token, and what they are a member of."""

    _http: HTTPClient
    _clock: IReactorTime
    _now: Callable[[], float]
    """The seconds since the epoch, as GitHub's limits have them."""
    api_url: str
    _store: CredentialStore
    _bound: Callable[[Principal], object]
    """Is told of each listed login that is seen for the first time, and whose it is."""
    members: Members
    groups: frozenset[str] = frozenset()
    """What else rules want to know: ``user:u``, ``org:o`` and ``team:o/t``."""
    own: tuple[str, str] | None = field(default=None, repr=False)
    """User and token of the daemon, to see members by; else by the caller's token."""
    oauth: OAuth | None = None
    good: float = 60.0 - KNOWN
    bad: float = 10.0
    _known: OrderedDict[tuple[str, frozenset[str]], tuple[float, frozenset[str] | None]] = (
        field(factory=OrderedDict)
    )
    """The groups of an account with these logins, by the daemon's own questions."""
    _asking: DeferredSemaphore = field(factory=lambda: DeferredSemaphore(MOST))
    _silent: OrderedDict[bytes, float] = field(factory=OrderedDict)
    """Until when GitHub wants to hear nothing from somebody: seconds since the epoch."""

    @property
    def scope(self) -> str:
        """What a token of OAuth has to be good for."""
        asked = self._asked(self.groups | self.members.groups())
        return "read:org" if asked and self.own is None else ""

    def takes(self, credentials: Credentials) -> bool:
        """Return whether it may be a token of GitHub; a password never is one."""
        return _TOKEN.fullmatch(credentials.secret) is not None

    async def identify(self, credentials: Credentials) -> Identity | None:
        """Return the user and their groups; None if the token is wrong or not let in.

        A login that the settings list is bound to the first account that is let in by it,
        which keeps what it may when it is renamed. Raises `LoginBound` for another account
        that has the login later.
        """
        return await self._in_time(self._identify(credentials))

    async def token_for(self, code: str, verifier: str, callback: str) -> str | None:
        """Return the token for the code of a sign-in, None if GitHub does not take it."""
        return await self._in_time(self._exchange(code, verifier, callback))

    async def _in_time(self, asked: Coroutine[Deferred[Any], Any, T]) -> T:
        """Return what was asked for, or raise `ProviderUnavailable` in good time."""
        answer: Deferred[T] = self._asking.run(lambda: Deferred.fromCoroutine(asked))

        def late(*_: object) -> NoReturn:
            raise ProviderUnavailable(NAME, "it does not answer in time")

        try:
            return await answer.addTimeout(DEADLINE, self._clock, late)
        except (PulsarError, CancelledError):
            raise
        except Exception as e:  # noqa: BLE001 - whatever it is, it is no yes
            _log.error("{name} cannot be asked: {e!r}", name=self.api_url, e=e)
            raise ProviderUnavailable(NAME, "it cannot be reached") from None

    async def _identify(self, credentials: Credentials) -> Identity | None:
        auth = f"Bearer {credentials.secret}"
        status, user = await self._get("/user", auth)
        if status == 401:
            return None
        account = _account(user)
        if status != 200 or account is None:
            raise ProviderUnavailable(NAME, f"it answers {status} and no user")
        login = account.name.casefold()
        if credentials.user.casefold() not in {"", login}:
            return None
        listed = self.groups | self.members.groups()
        ids = await self._store.logins(login, account.id)
        named = {f"user:{name}" for name, id in ids.items() if id == account.id}
        named |= {f"user:{login}"}
        groups = await self._groups(account, auth, listed & named)
        if groups is None:
            _log.info("{login} of {name} is not let in", login=account.name, name=NAME)
            return None
        if f"user:{login}" in listed:
            await self._check_login(account, ids.get(login))
        return Identity(account, groups)

    async def _check_login(self, account: Principal, bound: str | None) -> None:
        """Raise `LoginBound` if the login of an account is somebody else's; or bind it."""
        if bound is None:
            # It is in the audit log even if who asked does not wait for it.
            bound = await shielded(self._bind(account))
        if bound != account.id:
            raise LoginBound(account)

    async def _bind(self, account: Principal) -> str:
        login = Login(account.name.casefold(), account.id, self._now())
        id, new = await self._store.bind_new_login(login)
        if new:
            self._bound(account)
        return id

    async def _groups(
        self, account: Principal, auth: str, named: frozenset[str]
    ) -> frozenset[str] | None:
        """Return the groups of a user; None if none of them is let in.

        ``named`` are those that stand for the user alone.
        """
        login = account.name
        known = account.id, named
        until, found = self._known.get(known, (0.0, None))
        if self.own is not None and until > self._clock.seconds():
            return found
        # Strangers cost no more questions than it takes to know that.
        members = self.members.groups()
        groups = named | await self._those_with(login, auth, self._asked(members))
        found = None
        if groups & members:
            more = self._asked(self.groups - members)
            found = groups | await self._those_with(login, auth, more)
        if self.own is not None:
            self._known[known] = (self._clock.seconds() + KNOWN, found)
            while len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        return found

    @staticmethod
    def _asked(groups: frozenset[str]) -> list[str]:
        return sorted(name for name in groups if not name.startswith("user:"))

    async def _those_with(self, login: str, auth: str, names: Sequence[str]) -> set[str]:
        asked = [Deferred.fromCoroutine(self._is_in(n, login, auth)) for n in names]
        try:
            found = await gatherResults(asked, consumeErrors=True)
        except FirstError as e:
            for one in asked:
                one.cancel()
            e.subFailure.raiseException()
        return {name for name, member in zip(names, found, strict=True) if member}

    async def _is_in(self, group: str, login: str, auth: str) -> bool:
        kind, _, name = group.partition(":")
        org, _, team = (quote(part, safe="") for part in name.partition("/"))
        if self.own is not None:
            text = base64.b64encode(":".join(self.own).encode()).decode()
            auth = f"Basic {text}"
        if kind == "team":
            path = f"/orgs/{org}/teams/{team}/memberships/{login}"
        elif self.own is not None:
            path = f"/orgs/{org}/members/{login}"
        else:
            path = f"/user/memberships/orgs/{org}"
        status, answer = await self._get(path, auth)
        if status == 200:
            # One who was invited and has not accepted is "pending".
            return isinstance(answer, dict) and answer.get("state") == "active"
        if status in {204, 302, 403, 404}:
            return status == 204
        raise ProviderUnavailable(NAME, f"it answers {status} about {group}")

    async def _get(self, path: str, auth: str) -> tuple[int, Any]:
        headers = {
            "Authorization": auth,
            "Accept": "application/vnd.github+json",
            "X-GitHub-Api-Version": "2022-11-28",
            "User-Agent": "pulsar-api",
        }
        return await self._send("GET", f"{self.api_url}{path}", headers, None)

    async def _exchange(self, code: str, verifier: str, callback: str) -> str | None:
        assert self.oauth is not None
        form = {
            "client_id": self.oauth.client_id,
            "client_secret": self.oauth.client_secret,
            "code": code,
            "redirect_uri": callback,
            "code_verifier": verifier,
        }
        headers = {"Accept": "application/json", "User-Agent": "pulsar-api"}
        url = f"{self.oauth.url}/login/oauth/access_token"
        status, answer = await self._send("POST", url, headers, form)
        if not isinstance(answer, dict) or status not in {200, 400, 401, 404}:
            raise ProviderUnavailable(NAME, f"it answers {status} to a sign-in")
        token = answer.get("access_token")
        return token if isinstance(token, str) and _TOKEN.fullmatch(token) else None

    async def _send(
        self, method: str, url: str, headers: dict[str, str], form: dict[str, str] | None
    ) -> tuple[int, Any]:
        left = self._silent.get(_digest(headers.get("Authorization", "")), 0) - self._now()
        if left > 0:
            raise ProviderUnavailable(NAME, "its rate limit is reached", math.ceil(left))
        response: Any = await self._http.request(
            method,
            url,
            headers=Headers({k: [v] for k, v in headers.items()}),
            data=form,
            allow_redirects=False,
        )
        body = _Body()
        response.deliverBody(body)
        text = await body.whole
        if response.code in {403, 429}:
            self._heed(response.headers, headers.get("Authorization", ""))
        if response.code >= 500:
            raise ProviderUnavailable(NAME, f"it answers {response.code}")
        try:
            return response.code, json.loads(text) if text else None
        except (ValueError, RecursionError):
            return response.code, None

    def _heed(self, headers: Any, auth: str) -> None:
        """Ask nothing for as long as GitHub's limits want it; raise if they do."""
        wait = None
        if (text := headers.getRawHeaders("retry-after", [""])[0]).isdigit():
            wait = float(text)
        elif headers.getRawHeaders("x-ratelimit-remaining", [""])[0] == "0":
            reset = headers.getRawHeaders("x-ratelimit-reset", [""])[0]
            wait = float(reset) - self._now() if reset.isdigit() else 60.0
        if wait is not None:
            wait = min(max(wait, 1.0), _MAX_WAIT)
            self._silent[_digest(auth)] = self._now() + wait
            while len(self._silent) > _REMEMBERED:
                self._silent.popitem(last=False)
            _log.warn("{name}: rate limit, silent for {s:.0f} s", name=NAME, s=wait)
            raise ProviderUnavailable(NAME, "its rate limit is reached", math.ceil(wait))


def _account(user: object) -> Principal | None:
    """Return whom GitHub's answer is about; None if it names no user."""
    if not isinstance(user, dict):
        return None
    login, id = user.get("login"), user.get("id")
    if not isinstance(login, str) or not _LOGIN.fullmatch(login):
        return None
    if not isinstance(id, int) or isinstance(id, bool) or not 0 < id < _MOST_ID:
        return None
    return Principal("github", str(id), login)


def _digest(auth: str) -> bytes:
    return hashlib.sha256(auth.encode()).digest()


class _Body(Protocol):
    """Takes an answer of a bounded size; who stops waiting ends the connection."""

    transport: Any

    def __init__(self) -> None:
        self._data = b""
        self.whole: Deferred[bytes] = Deferred(lambda _: self._stop())

    def dataReceived(self, data: bytes) -> None:
        """Take a piece."""
        if len(self._data) <= _MAX_ANSWER:
            self._data += data
        if len(self._data) > _MAX_ANSWER:
            self._stop()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Take the end."""
        if self.whole.called:
            return
        if reason.check(ResponseDone) and len(self._data) <= _MAX_ANSWER:
            self.whole.callback(self._data)
        else:
            self.whole.errback(reason)

    def _stop(self) -> None:
        self.transport.loseConnection()
