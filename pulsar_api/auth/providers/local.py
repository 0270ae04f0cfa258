"""The providers on this machine: API tokens, and one user with a password."""

import hashlib
import hmac
from collections.abc import Callable
from math import inf

from attrs import field, frozen
from twisted.logger import Logger
from twisted.python.failure import Failure

from pulsar_api.auth.authenticator import Credentials
from pulsar_api.auth.credentials import PREFIX, CredentialStore, Token
from pulsar_api.auth.rights import Identity
from pulsar_api.principal import Principal

_log = Logger()

_NOBODY = Token("nobody", (), (), 0.0, expires_at=0.0)
_STEP = 60.0  # seconds: the precision of the time of last use


@frozen
class OwnTokens:
    """The tokens that ``pulsar-api token create`` has made.

    They are looked up by their hash, and a wrong one takes the same steps as a right one,
    so that the time tells nothing.
    """

    _store: CredentialStore
    _now: Callable[[], float]
    """The seconds since the epoch."""
    good: float = 5.0
    bad: float = 5.0
    _used: dict[str, float] = field(factory=dict)

    def takes(self, credentials: Credentials) -> bool:
        """Return whether this looks like an API token."""
        return credentials.secret.startswith(PREFIX)

    async def identify(self, credentials: Credentials) -> Identity | None:
        """Return the identity of a token; None if it is unknown or expired.

        Raises:
            StoreUnavailable: The tokens cannot be read now.
        """
        token = await self._store.token(credentials.secret)
        found = token or _NOBODY
        name = f"token:{found.name}"
        principal = Principal("token", found.name, name)
        identity = Identity(principal, frozenset({name}), found.grants)
        now = self._now()
        good = now < (inf if found.expires_at is None else found.expires_at)
        if good & (self._used.get(found.name, 0.0) <= now - _STEP):
            self._used[found.name] = now
            # The request neither waits for that nor fails with it.
            self._store.use_token(found.name, now).addErrback(_not_noted)
        return (None, identity)[good]


def _not_noted(failure: Failure) -> None:
    _log.error("Cannot note that a token was used: {e}", e=failure.value)


def _hashed(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


@frozen
class Static:
    """The one user of ``--auth-provider static``."""

    _user: str
    _password: str = field(repr=False)
    good: float = 60.0
    bad: float = 10.0
    _identity: Identity = field(init=False)

    @_identity.default
    def _known(self) -> Identity:
        principal = Principal("static", self._user, self._user)
        return Identity(principal, frozenset({f"user:{self._user.casefold()}"}))

    def takes(self, credentials: Credentials) -> bool:
        """Return whether there is a user name."""
        return bool(credentials.user)

    async def identify(self, credentials: Credentials) -> Identity | None:
        """Return the user, or None; a wrong password takes as long as the right one."""
        user = hmac.compare_digest(_hashed(credentials.user), _hashed(self._user))
        right = hmac.compare_digest(_hashed(credentials.secret), _hashed(self._password))
        return (None, self._identity)[user & right]
