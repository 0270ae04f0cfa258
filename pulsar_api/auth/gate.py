"""Decides who somebody is: asks providers, remembers for a while, brakes who guesses."""

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from ipaddress import IPv6Address, ip_address
from typing import Protocol

from attrs import define, field, frozen
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from pulsar_api.auth.rights import Identity
from pulsar_api.errors import NotAuthenticated, PulsarError, TooManyFailures

_log = Logger()

FAILURES = 10
"""Wrong credentials from one address in a minute, after which it is not heard."""
MINUTE = 60.0
ASKED = 10
"""Credentials of one address that are being looked at, at the same time."""
_REMEMBERED = 10_000  # credentials, and addresses
_PROVED = 3600.0  # seconds for which who was let in is heard in spite of the brake


@frozen
class Credentials:
    """What somebody shows: a token, or a name and a password."""

    user: str
    """"" for a token alone."""
    secret: str = field(repr=False)

    @property
    def key(self) -> bytes:
        """What to remember them by."""
        # The length says where the name ends, whatever sign is in it.
        text = f"{len(self.user)}:{self.user}{self.secret}".encode("utf-8", "surrogatepass")
        return hashlib.sha256(text).digest()


class Provider(Protocol):
    """Somebody who knows users."""

    @property
    def good(self) -> float:
        """Seconds for which its yes counts."""

    @property
    def bad(self) -> float:
        """Seconds for which its no counts."""

    def takes(self, credentials: Credentials) -> bool:
        """Return whether these are for this provider to judge."""

    async def identify(self, credentials: Credentials) -> Identity | None:
        """Return who it is, None if it is nobody; or raise `ProviderUnavailable`."""


@define(eq=False)
class Brake:
    """Counts what went wrong by address; IPv6 by network, as anybody has many of them."""

    _clock: IReactorTime
    _failed: OrderedDict[str, list[float]] = field(factory=OrderedDict)
    _asked: dict[str, int] = field(factory=dict)

    def check(self, address: str) -> None:
        """Raise `TooManyFailures` if this address is not heard now."""
        now = self._clock.seconds()
        failed = [at for at in self._failed.get(_network(address), ()) if at > now - MINUTE]
        if len(failed) >= FAILURES:
            raise TooManyFailures(math.ceil(failed[-FAILURES] + MINUTE - now))
        if self._asked.get(_network(address), 0) >= ASKED:
            raise TooManyFailures(1)

    def failed(self, address: str) -> None:
        """Count a failure."""
        name = _network(address)
        times = self._failed.setdefault(name, [])
        times.append(self._clock.seconds())
        del times[:-FAILURES]
        self._failed.move_to_end(name)
        while len(self._failed) > _REMEMBERED:
            self._failed.popitem(last=False)

    def begin(self, address: str) -> None:
        """Count that something is being looked at."""
        name = _network(address)
        self._asked[name] = self._asked.get(name, 0) + 1

    def end(self, address: str) -> None:
        """Count that it is no more."""
        name = _network(address)
        self._asked[name] -= 1
        if not self._asked[name]:
            del self._asked[name]


def _network(address: str) -> str:
    try:
        found = ip_address(address)
    except ValueError:
        return address
    if isinstance(found, IPv6Address) and found.ipv4_mapped is None:
        return found.exploded[:19]
    return address


@define(eq=False)
class Gate:
    """Says who somebody is."""

    _providers: Sequence[Provider]
    _clock: IReactorTime
    brake: Brake = field(init=False)
    refused: Callable[[Credentials, str], object] = lambda *_: None
    """Is told of each wrong guess, and where it came from."""
    _answers: OrderedDict[bytes, tuple[float, Identity | None]] = field(factory=OrderedDict)
    """Until when an answer counts."""
    _waiting: dict[bytes, list[Deferred[Identity | None]]] = field(factory=dict)
    """Who waits for the same answer."""
    _proved: OrderedDict[bytes, float] = field(factory=OrderedDict)

    def __attrs_post_init__(self) -> None:
        self.brake = Brake(self._clock)

    async def identify(
        self, credentials: Credentials, address: str, *, guess: bool = True
    ) -> Identity:
        """Return who it is.

        Raises `NotAuthenticated`, `TooManyFailures` or `ProviderUnavailable`. ``guess``:
        whether a no counts as one; what has been proved once does not.
        """
        key, now = credentials.key, self._clock.seconds()
        until, identity = self._answers.get(key, (0.0, None))
        if key in self._waiting:
            identity = await self._ask(key)
        elif until <= now:
            if guess and self._proved.get(key, -_PROVED) <= now - _PROVED:
                self.brake.check(address)
            # It goes on if who asked does not wait any more: others may, and one who hangs
            # up has guessed all the same.
            self._waiting[key] = []
            answer = self._ask(key)
            self.brake.begin(address)
            looking = Deferred.fromCoroutine(self._look(key, credentials))
            looking.addBoth(self._tell, credentials, address, guess)
            identity = await answer
        elif identity is None and guess:
            self.brake.check(address)
            self._failed(credentials, address)
        if identity is None:
            raise NotAuthenticated
        return identity

    def _failed(self, credentials: Credentials, address: str) -> None:
        self.brake.failed(address)
        self.refused(credentials, address)

    def _ask(self, key: bytes) -> Deferred[Identity | None]:
        answer: Deferred[Identity | None] = Deferred()
        self._waiting[key].append(answer)
        return answer

    def _tell(
        self,
        result: Identity | Failure | None,
        credentials: Credentials,
        address: str,
        guess: bool,  # noqa: FBT001
    ) -> None:
        self.brake.end(address)
        if isinstance(result, Failure):
            if not result.check(PulsarError):
                _log.failure("A provider has failed", result)
        elif result is None and guess:
            self._failed(credentials, address)
        for answer in self._waiting.pop(credentials.key):
            if not answer.called:
                answer.callback(result)  # a Failure is an errback

    async def _look(self, key: bytes, credentials: Credentials) -> Identity | None:
        provider = next((p for p in self._providers if p.takes(credentials)), None)
        if provider is None:
            return None
        identity = await provider.identify(credentials)
        now = self._clock.seconds()
        self._answers[key] = (now + (provider.good if identity else provider.bad), identity)
        self._answers.move_to_end(key)
        if identity is not None:
            self._proved[key] = now
            self._proved.move_to_end(key)
        for remembered in (self._answers, self._proved):
            while len(remembered) > _REMEMBERED:
                remembered.popitem(last=False)
        return identity
