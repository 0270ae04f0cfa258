"""Users of GitHub, or of a GitHub Enterprise server: by their token, or by OAuth.

REST API: https://docs.github.com/en/rest (users, orgs/members, teams/members).
OAuth: https://docs.github.com/en/apps/oauth-apps, RFC 6749, PKCE by RFC 7636.
"""

import base64
import hashlib
import re
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, NoReturn, TypeVar
from urllib.parse import quote, urlencode

from attrs import define, field, frozen
from twisted.internet.defer import (
    CancelledError,
    Deferred,
    DeferredSemaphore,
    FirstError,
    gatherResults,
)
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from pulsar_api.auth.authenticator import Credentials
from pulsar_api.auth.credentials import CredentialStore, Login
from pulsar_api.auth.providers.github_api import NAME, GitHubAPI
from pulsar_api.auth.rights import Identity
from pulsar_api.bounded import BoundedDict
from pulsar_api.concurrency.background import shielded
from pulsar_api.errors import LoginBound, ProviderUnavailable, PulsarError
from pulsar_api.principal import Principal

_log = Logger()
T = TypeVar("T")

DEADLINE = 4.0
"""Seconds for all requests that authenticate one user."""
MAX_LOOKUPS = 100
"""Users that are looked up at the same time."""
GROUPS_CACHED = 10.0
"""Seconds for which the groups of a user are cached, whichever token they present.

GitHub allows the daemon's own account 5,000 requests an hour.
"""
_MAX_ID = 1 << 63
_MAX_CACHED = 1000  # accounts
_TOKEN = re.compile(r"[A-Za-z0-9_.\-]{8,255}", re.ASCII)
_LOGIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}", re.ASCII)


@frozen
class Members:
    """Who has access: logins, or members of organisations or teams (``org/team``)."""

    method: str
    """``user``, ``org`` or ``team``."""
    names: frozenset[str]
    """In lower case."""

    def groups(self) -> frozenset[str]:
        """Return their names in `Identity.groups`."""
        return frozenset(f"{self.method}:{name}" for name in self.names)


@frozen
class OAuth:
    """Our registration as an OAuth app."""

    url: str
    """The URL of GitHub, ``https://github.com``."""
    client_id: str
    client_secret: str = field(repr=False)

    def authorize_url(self, state: str, verifier: str, callback: str, scope: str) -> str:
        """Return the URL that begins a sign-in."""
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
    """Asks GitHub whose token it is, and what groups its user is a member of."""

    _api: GitHubAPI
    _clock: IReactorTime
    _now: Callable[[], float]
    """The seconds since the epoch."""
    _store: CredentialStore
    _bound: Callable[[Principal], object]
    """Is called with the account that a listed login has been bound to."""
    members: Members
    groups: frozenset[str] = frozenset()
    """The groups that rules name: ``user:u``, ``org:o`` and ``team:o/t``."""
    own: tuple[str, str] | None = field(default=None, repr=False)
    """User and token of the daemon, to look up members; None: by the caller's token."""
    oauth: OAuth | None = None
    good: float = 60.0 - GROUPS_CACHED
    bad: float = 10.0
    _known: BoundedDict[tuple[str, frozenset[str]], tuple[float, frozenset[str] | None]] = (
        field(factory=partial(BoundedDict, _MAX_CACHED))
    )
    """The groups of accounts, by id and logins, and until when they are cached."""
    _asking: DeferredSemaphore = field(factory=lambda: DeferredSemaphore(MAX_LOOKUPS))

    @property
    def scope(self) -> str:
        """The OAuth scope that tokens need."""
        asked = self._asked(self.groups | self.members.groups())
        return "read:org" if asked and self.own is None else ""

    def takes(self, credentials: Credentials) -> bool:
        """Return whether this may be a token of GitHub."""
        return _TOKEN.fullmatch(credentials.secret) is not None

    async def identify(self, credentials: Credentials) -> Identity | None:
        """Return the user and their groups; None if the token is wrong or has no access.

        A login that the settings list is bound to the first account that is accepted under
        it. That account keeps its rights when it is renamed.

        Raises:
            LoginBound: Another account is bound to the login.
            ProviderUnavailable: GitHub does not answer in time, or not properly.
        """
        return await self._in_time(self._identify(credentials))

    async def token_for(self, code: str, verifier: str, callback: str) -> str | None:
        """Return the token for the code of a sign-in; None if GitHub rejects the code.

        Raises:
            ProviderUnavailable: GitHub does not answer in time, or not properly.
        """
        return await self._in_time(self._exchange(code, verifier, callback))

    async def _in_time(self, asked: Coroutine[Deferred[Any], Any, T]) -> T:
        """Return the answer, or raise `ProviderUnavailable` within `DEADLINE`."""
        answer: Deferred[T] = self._asking.run(lambda: Deferred.fromCoroutine(asked))

        def late(*_: object) -> NoReturn:
            raise ProviderUnavailable(NAME, "it does not answer in time")

        try:
            return await answer.addTimeout(DEADLINE, self._clock, late)
        except (PulsarError, CancelledError):
            raise
        except Exception as e:  # noqa: BLE001 - no error may let anybody in
            _log.error("{url} cannot be reached: {e!r}", url=self._api.url, e=e)
            raise ProviderUnavailable(NAME, "it cannot be reached") from None

    async def _identify(self, credentials: Credentials) -> Identity | None:
        auth = f"Bearer {credentials.secret}"
        status, user = await self._api.get("/user", auth)
        if status == 401:
            return None
        account = _account(user)
        if status != 200 or account is None:
            raise ProviderUnavailable(NAME, f"it answers with status {status} and no user")
        login = account.name.casefold()
        if credentials.user.casefold() not in {"", login}:
            return None
        listed = self.groups | self.members.groups()
        ids = await self._store.logins(login, account.id)
        named = {f"user:{name}" for name, id in ids.items() if id == account.id}
        named |= {f"user:{login}"}
        groups = await self._groups(account, auth, listed & named)
        if groups is None:
            _log.info("{login} of {name} has no access", login=account.name, name=NAME)
            return None
        if f"user:{login}" in listed:
            await self._check_login(account, ids.get(login))
        return Identity(account, groups)

    async def _check_login(self, account: Principal, bound: str | None) -> None:
        """Raise `LoginBound` if a login is bound to another account; bind it if to none."""
        if bound is None:
            # The audit log has it even if the caller hangs up.
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
        """Return the groups of a user; None if none of them has access.

        ``named`` are the groups that stand for this user alone.
        """
        login = account.name
        known = account.id, named
        until, found = self._known.get(known, (0.0, None))
        if self.own is not None and until > self._clock.seconds():
            return found
        # Callers without access cost no more requests than it takes to find that out.
        members = self.members.groups()
        groups = named | await self._those_with(login, auth, self._asked(members))
        found = None
        if groups & members:
            more = self._asked(self.groups - members)
            found = groups | await self._those_with(login, auth, more)
        if self.own is not None:
            self._known[known] = (self._clock.seconds() + GROUPS_CACHED, found)
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
        status, answer = await self._api.get(path, auth)
        if status == 200:
            # An invitation that has not been accepted is "pending".
            return isinstance(answer, dict) and answer.get("state") == "active"
        if status in {204, 302, 403, 404}:
            return status == 204
        raise ProviderUnavailable(NAME, f"it answers with status {status} about {group}")

    async def _exchange(self, code: str, verifier: str, callback: str) -> str | None:
        assert self.oauth is not None
        form = {
            "client_id": self.oauth.client_id,
            "client_secret": self.oauth.client_secret,
            "code": code,
            "redirect_uri": callback,
            "code_verifier": verifier,
        }
        url = f"{self.oauth.url}/login/oauth/access_token"
        status, answer = await self._api.post(url, form)
        if not isinstance(answer, dict) or status not in {200, 400, 401, 404}:
            raise ProviderUnavailable(NAME, f"it answers with status {status} to a sign-in")
        token = answer.get("access_token")
        return token if isinstance(token, str) and _TOKEN.fullmatch(token) else None


def _account(user: object) -> Principal | None:
    """Return the account in GitHub's answer; None if there is none."""
    if not isinstance(user, dict):
        return None
    login, id = user.get("login"), user.get("id")
    if not isinstance(login, str) or not _LOGIN.fullmatch(login):
        return None
    if not isinstance(id, int) or isinstance(id, bool) or not 0 < id < _MAX_ID:
        return None
    return Principal("github", str(id), login)
