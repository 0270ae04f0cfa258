"""The providers that ask nobody else: tokens of our own, and one user with a password."""

import hashlib
import hmac
from collections.abc import Callable

from attrs import field, frozen

from pulsar_api.auth.gate import Credentials
from pulsar_api.auth.records import PREFIX, Records
from pulsar_api.auth.rights import Identity


@frozen
class OwnTokens:
    """Knows the tokens that ``pulsar-api token`` has made.

    They are looked up by their hash, so how long that takes says nothing about them.
    """

    _records: Records
    _now: Callable[[], float]
    """The seconds since the epoch."""
    good: float = 5.0
    bad: float = 5.0

    def takes(self, credentials: Credentials) -> bool:
        """Return whether it looks like one of ours."""
        return credentials.secret.startswith(PREFIX)

    async def identify(self, credentials: Credentials) -> Identity | None:
        """Return whose it is: the token's own name."""
        found = await self._records.token(credentials.secret, self._now())
        if found is None:
            return None
        name = f"token:{found.name}"
        return Identity(name, "token", frozenset({name}), found.grants)


def _hashed(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


@frozen
class Static:
    """Knows one user."""

    _user: str
    _password: str = field(repr=False)
    good: float = 60.0
    bad: float = 10.0

    def takes(self, credentials: Credentials) -> bool:
        """Return whether there is a name to look at."""
        return bool(credentials.user)

    async def identify(self, credentials: Credentials) -> Identity | None:
        """Return the user; a wrong password takes as long as a right one."""
        user = hmac.compare_digest(_hashed(credentials.user), _hashed(self._user))
        right = hmac.compare_digest(_hashed(credentials.secret), _hashed(self._password))
        if not (user and right):
            return None
        return Identity(self._user, "static", frozenset({f"user:{self._user.casefold()}"}))
