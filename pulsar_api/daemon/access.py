"""Builds the parts that control access: providers, sessions, rights, audit log."""

import socket
import time
from collections.abc import Callable
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path
from typing import Any, cast

from attrs import frozen
from treq.client import HTTPClient
from twisted.web.client import Agent, HTTPConnectionPool

from pulsar_api.auth import audit, credentials
from pulsar_api.auth.authenticator import Authenticator, Provider
from pulsar_api.auth.credentials import CredentialStore
from pulsar_api.auth.providers.github import DEADLINE, GitHub, Members, OAuth
from pulsar_api.auth.providers.github_api import GitHubAPI
from pulsar_api.auth.providers.local import OwnTokens, Static
from pulsar_api.auth.rights import Caller, Policy
from pulsar_api.auth.sessions import Sessions
from pulsar_api.config.settings import Settings
from pulsar_api.principal import Principal
from pulsar_api.tasks.clock import SteadyClock
from pulsar_api.tasks.service import TaskService
from pulsar_api.web.authentication import Access
from pulsar_api.web.origin import Origins


@frozen
class AccessParts:
    """The parts that control access, and the resources to close with them."""

    access: Access
    store: CredentialStore | None = None
    """None if callers do not authenticate."""
    github: GitHub | None = None
    pool: HTTPConnectionPool | None = None
    """The connections to GitHub."""


def build_access(
    reactor: Any,
    s: Settings,
    service: TaskService,
    clock: SteadyClock,
    certificate_names: Callable[[], frozenset[str]],
) -> AccessParts:
    """Return the parts that the settings describe.

    ``certificate_names`` returns the host names in the current certificate.
    """
    state = Path(s.state_dir)
    log = audit.AuditLog(state / audit.FILE, time.time)
    names = {socket.gethostname().lower(), *(name.lower() for name in s.hosts)}
    origins = Origins(
        s.public_url, frozenset(names), frozenset(s.proxies), certificate_names
    )
    if not s.authenticated:
        return AccessParts(Access(service, log, origins, reactor))
    policy = Policy(s.rights)
    store = CredentialStore(state / credentials.FILE, reactor.callFromThread)
    providers: list[Provider] = [OwnTokens(store, time.time)]
    found: GitHub | None = None
    pool: HTTPConnectionPool | None = None
    if s.auth_provider == "static":
        assert s.auth_username is not None
        assert s.auth_password is not None
        providers.append(Static(s.auth_username, s.auth_password))
    if s.auth_provider == "github":
        pool = HTTPConnectionPool(reactor, persistent=True)
        pool._factory.noisy = False  # noqa: SLF001 - two lines for each connection
        found = _github(s, policy, reactor, pool, store, log)
        providers.append(found)
    authenticator = Authenticator(providers, reactor)
    sessions = Sessions(store, clock.steady)
    access = Access(service, log, origins, reactor, authenticator, sessions, policy)
    return AccessParts(access, store, found, pool)


def _github(
    s: Settings,
    policy: Policy,
    reactor: Any,
    pool: HTTPConnectionPool,
    logins: CredentialStore,
    log: audit.AuditLog,
) -> GitHub:
    def note(account: Principal) -> None:
        caller = Caller(account, "the daemon", "github")
        log.write(caller, "login bind", allowed=True, login=account.name.casefold())

    oauth = None
    if s.github_client_id is not None and s.github_client_secret is not None:
        oauth = OAuth(s.github_url, s.github_client_id, s.github_client_secret)
    own = None
    if s.auth_username is not None and s.auth_password is not None:
        own = s.auth_username, s.auth_password
    names = frozenset(name.casefold() for name in s.auth_members)
    # No cookies: a cookie of one user must not be sent with the token of another.
    http = HTTPClient(
        Agent(reactor, connectTimeout=DEADLINE, pool=pool),
        cast("Any", CookieJar(DefaultCookiePolicy(allowed_domains=[]))),
    )
    return GitHub(
        GitHubAPI(http, time.time, s.api_url),
        reactor,
        time.time,
        logins,
        note,
        Members(s.auth_method or "user", names),
        policy.groups(),
        own,
        oauth,
    )
