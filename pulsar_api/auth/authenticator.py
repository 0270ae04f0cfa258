"""Authenticates callers: asks providers, caches their answers, and slows down guessing."""

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from ipaddress import IPv6Address, ip_address
from typing import NoReturn, Protocol

from attrs import define, field, frozen
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime

from pulsar_api.auth.rights import Identity
from pulsar_api.bounded import BoundedDict
from pulsar_api.concurrency.single_flight import SingleFlight
from pulsar_api.errors import (
    LoginBound,
    NotAuthenticated,
    ProviderUnavailable,
    TooManyFailures,
)

_Answer = Identity | LoginBound | None
"""An identity; an account that must not use its login; or None for wrong credentials."""

FAILURES = 10
"""Wrong credentials from one address within a minute, after which it is refused."""
MINUTE = 60.0
MAX_LOOKUPS = 10
"""New credentials of one address that are looked up at the same time; others wait."""
PATIENCE = 10.0
"""Seconds that a look-up waits for earlier ones of its address."""
_MAX_CACHED = 10_000  # credentials, and addresses
_PROVED = 3600.0  # seconds for which accepted credentials are exempt from the throttle


@frozen
class Credentials:
    """What a caller presents: a token, or a user name and a password."""

    user: str
    """The user name; "" if there is a token only."""
    secret: str = field(repr=False)

    @property
    def key(self) -> bytes:
        """A hash of them, by which they are cached and compared."""
        # The length says where the name ends, whatever character is in it.
        text = f"{len(self.user)}:{self.user}{self.secret}".encode("utf-8", "surrogatepass")
        return hashlib.sha256(text).digest()


class Provider(Protocol):
    """Knows users and checks their credentials."""

    @property
    def good(self) -> float:
        """How long, in seconds, an accepted credential is cached."""

    @property
    def bad(self) -> float:
        """How long, in seconds, a rejected credential is cached."""

    def takes(self, credentials: Credentials) -> bool:
        """Return whether this provider is responsible for these credentials."""

    async def identify(self, credentials: Credentials) -> Identity | None:
        """Return the identity that the credentials belong to; None if they are wrong.

        Raises:
            LoginBound: Another account is bound to the login of this one.
            ProviderUnavailable: The provider cannot be asked now.

        """


@define(eq=False)
class Throttle:
    """Counts failures by IPv4 address, or by the /64 network of an IPv6 address."""

    _clock: IReactorTime
    _failed: BoundedDict[str, list[float]] = field(
        factory=partial(BoundedDict, _MAX_CACHED)
    )

    def check(self, address: str) -> None:
        """Raise `TooManyFailures` if this address has failed too often."""
        failed = self._recent(address)
        if len(failed) >= FAILURES:
            wait = failed[-FAILURES] + MINUTE - self._clock.seconds()
            raise TooManyFailures(math.ceil(wait))

    def left(self, address: str) -> int:
        """Return how many more failures this address may have before it is refused."""
        return FAILURES - len(self._recent(address))

    def _recent(self, address: str) -> list[float]:
        begin = self._clock.seconds() - MINUTE
        return [at for at in self._failed.get(_network(address), ()) if at > begin]

    def failed(self, address: str) -> None:
        """Count a failure."""
        name = _network(address)
        times = [*self._failed.get(name, ()), self._clock.seconds()]
        self._failed[name] = times[-FAILURES:]


def _network(address: str) -> str:
    try:
        found = ip_address(address)
    except ValueError:
        return address
    if isinstance(found, IPv6Address) and found.ipv4_mapped is None:
        return found.exploded[:19]
    return address


@define(eq=False)
class _Queue:
    """The look-ups of one address: how many are under way, and which wait."""

    running: int = 0
    waiting: dict[Deferred[None], None] = field(factory=dict)

    def wait(self) -> Deferred[None]:
        """Fire when there may be room for one more. Cancelling leaves the queue."""
        waiter: Deferred[None] = Deferred(self._forget)
        self.waiting[waiter] = None
        return waiter

    def wake(self, number: int) -> None:
        """Let the first ones check again whether there is room."""
        for waiter in list(self.waiting)[:number]:
            if waiter in self.waiting:
                del self.waiting[waiter]
                waiter.callback(None)

    def _forget(self, waiter: Deferred[None]) -> None:
        self.waiting.pop(waiter, None)


@define(eq=False)
class Authenticator:
    """Tells who the caller with given credentials is."""

    _providers: Sequence[Provider]
    _clock: IReactorTime
    throttle: Throttle = field(init=False)
    refused: Callable[[Credentials, str], object] = lambda *_: None
    """Is called with rejected credentials and the address that they came from."""
    _answers: BoundedDict[bytes, tuple[float, _Answer]] = field(
        factory=partial(BoundedDict, _MAX_CACHED)
    )
    """Answers, each with the time until which it is cached."""
    _lookups: SingleFlight[bytes, _Answer] = field(
        factory=partial(SingleFlight, "A look-up of credentials")
    )
    _proved: BoundedDict[bytes, float] = field(factory=partial(BoundedDict, _MAX_CACHED))
    """When credentials were accepted last."""
    _queues: dict[str, _Queue] = field(factory=dict)
    """By address or network; only those with a look-up under way."""

    def __attrs_post_init__(self) -> None:
        self.throttle = Throttle(self._clock)

    async def identify(
        self, credentials: Credentials, address: str, *, guess: bool = True
    ) -> Identity:
        """Return the identity that credentials from an address belong to.

        ``guess``: whether a rejection counts as a failure of the address.

        Raises:
            NotAuthenticated: The credentials are wrong.
            LoginBound: Another account is bound to the login of this one.
            TooManyFailures: The address has failed too often.
            ProviderUnavailable: The provider cannot be asked now.

        """
        key, now = credentials.key, self._clock.seconds()
        identity: _Answer
        until, identity = self._answers.get(key, (0.0, None))
        if key in self._lookups or until <= now:
            new = guess and self._proved.get(key, -_PROVED) <= now - _PROVED
            if new and key not in self._lookups:
                self.throttle.check(address)
            # It goes on when the caller hangs up, which has guessed all the same.
            look = self._look_in_turn if new else self._look
            identity = await self._lookups.do(
                key, partial(look, credentials, address, guess=guess)
            )
        elif identity is None and guess:
            self.throttle.check(address)
            self._failed(credentials, address)
        if identity is None:
            raise NotAuthenticated
        if isinstance(identity, LoginBound):
            raise LoginBound(identity.principal)  # a new one each time
        return identity

    def _failed(self, credentials: Credentials, address: str) -> None:
        self.throttle.failed(address)
        self.refused(credentials, address)

    async def _look_in_turn(
        self, credentials: Credentials, address: str, *, guess: bool
    ) -> _Answer:
        """Look up credentials when the queue of their address has room.

        No more are looked up at once than may fail before the address is refused. So any
        number of correct ones are accepted, and no more wrong ones are tried than if they
        had come one by one.
        """
        name = _network(address)
        queue = self._queues.setdefault(name, _Queue())
        try:
            await self._room(queue, address)
            queue.running += 1
            try:
                return await self._look(credentials, address, guess=guess)
            finally:
                queue.running -= 1
                left = self.throttle.left(address)
                # After the last failure all that wait are refused.
                room = max(0, min(MAX_LOOKUPS, left) - queue.running)
                queue.wake(room if left > 0 else len(queue.waiting))
        finally:
            if not queue.running and not queue.waiting:
                self._queues.pop(name, None)

    async def _room(self, queue: _Queue, address: str) -> None:
        """Wait until one more may be looked up; raise `TooManyFailures` if none may."""
        until = self._clock.seconds() + PATIENCE
        while queue.running >= min(MAX_LOOKUPS, self.throttle.left(address)):
            left = max(0.0, until - self._clock.seconds())
            await queue.wait().addTimeout(left, self._clock, _too_long)
            self.throttle.check(address)

    async def _look(
        self, credentials: Credentials, address: str, *, guess: bool
    ) -> _Answer:
        key = credentials.key
        provider = next((p for p in self._providers if p.takes(credentials)), None)
        identity: _Answer = None
        try:
            identity = None if provider is None else await provider.identify(credentials)
        except LoginBound as e:
            identity = e
        if identity is None and guess:
            self._failed(credentials, address)
        if provider is None:
            return None
        now = self._clock.seconds()
        good = isinstance(identity, Identity)
        self._answers[key] = (now + (provider.good if good else provider.bad), identity)
        if good:
            self._proved[key] = now
        return identity


def _too_long(*_: object) -> NoReturn:
    detail = "it is checking too many other credentials from your address"
    raise ProviderUnavailable("This daemon", detail, 2)
