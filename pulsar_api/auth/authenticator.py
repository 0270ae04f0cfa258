"""Decides who somebody is: asks providers, remembers for a while, brakes who guesses."""

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from ipaddress import IPv6Address, ip_address
from typing import NoReturn, Protocol

from attrs import define, field, frozen
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from pulsar_api.auth.rights import Identity
from pulsar_api.errors import (
    LoginBound,
    NotAuthenticated,
    ProviderUnavailable,
    PulsarError,
    TooManyFailures,
)

_log = Logger()

_Answer = Identity | LoginBound | None
"""Who it is; or that the account must not use its login; or that it is nobody."""

FAILURES = 10
"""Wrong credentials from one address in a minute, after which it is not heard."""
MINUTE = 60.0
ASKED = 10
"""New credentials of one address that are looked up at the same time; others wait."""
PATIENCE = 10.0
"""Seconds that a look-up waits for earlier ones of its address."""
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
        """Return who it is; None if it is nobody.

        Raises `LoginBound` for an account that must not use the login that it has, and
        `ProviderUnavailable`.
        """


@define(eq=False)
class Brake:
    """Counts what went wrong by address; IPv6 by network, as anybody has many of them."""

    _clock: IReactorTime
    _failed: OrderedDict[str, list[float]] = field(factory=OrderedDict)

    def check(self, address: str) -> None:
        """Raise `TooManyFailures` if this address is not heard now."""
        failed = self._recent(address)
        if len(failed) >= FAILURES:
            wait = failed[-FAILURES] + MINUTE - self._clock.seconds()
            raise TooManyFailures(math.ceil(wait))

    def left(self, address: str) -> int:
        """Return how many more failures this address may have before it is not heard."""
        return FAILURES - len(self._recent(address))

    def _recent(self, address: str) -> list[float]:
        begin = self._clock.seconds() - MINUTE
        return [at for at in self._failed.get(_network(address), ()) if at > begin]

    def failed(self, address: str) -> None:
        """Count a failure."""
        name = _network(address)
        times = self._failed.setdefault(name, [])
        times.append(self._clock.seconds())
        del times[:-FAILURES]
        self._failed.move_to_end(name)
        while len(self._failed) > _REMEMBERED:
            self._failed.popitem(last=False)


def _network(address: str) -> str:
    try:
        found = ip_address(address)
    except ValueError:
        return address
    if isinstance(found, IPv6Address) and found.ipv4_mapped is None:
        return found.exploded[:19]
    return address


@define(eq=False)
class _Line:
    """The look-ups of one address: how many are under way, and which wait for them."""

    asked: int = 0
    waiting: dict[Deferred[None], None] = field(factory=dict)

    def wait(self) -> Deferred[None]:
        """Fire when there may be room for one more. Cancelling leaves the line."""
        waiter: Deferred[None] = Deferred(self._forget)
        self.waiting[waiter] = None
        return waiter

    def wake(self, number: int) -> None:
        """Let the first ones look again whether there is room."""
        for waiter in list(self.waiting)[:number]:
            if waiter in self.waiting:
                del self.waiting[waiter]
                waiter.callback(None)

    def _forget(self, waiter: Deferred[None]) -> None:
        self.waiting.pop(waiter, None)


@define(eq=False)
class Gate:
    """Says who somebody is."""

    _providers: Sequence[Provider]
    _clock: IReactorTime
    brake: Brake = field(init=False)
    refused: Callable[[Credentials, str], object] = lambda *_: None
    """Is told of each wrong guess, and where it came from."""
    _answers: OrderedDict[bytes, tuple[float, _Answer]] = field(factory=OrderedDict)
    """Until when an answer counts."""
    _waiting: dict[bytes, list[Deferred[_Answer]]] = field(factory=dict)
    """Who waits for the same answer."""
    _proved: OrderedDict[bytes, float] = field(factory=OrderedDict)
    _lines: dict[str, _Line] = field(factory=dict)
    """By address, or network; only those in which something is under way."""

    def __attrs_post_init__(self) -> None:
        self.brake = Brake(self._clock)

    async def identify(
        self, credentials: Credentials, address: str, *, guess: bool = True
    ) -> Identity:
        """Return who it is.

        Raises `NotAuthenticated`, `LoginBound`, `TooManyFailures` or
        `ProviderUnavailable`. ``guess``: whether a no counts as one; what has been proved
        once does not.
        """
        key, now = credentials.key, self._clock.seconds()
        identity: _Answer
        until, identity = self._answers.get(key, (0.0, None))
        if key in self._waiting:
            identity = await self._ask(key)
        elif until <= now:
            new = guess and self._proved.get(key, -_PROVED) <= now - _PROVED
            if new:
                self.brake.check(address)
            # It goes on if who asked does not wait any more: others may, and one who hangs
            # up has guessed all the same.
            self._waiting[key] = []
            answer = self._ask(key)
            look = self._look_in_turn if new else self._look
            looking = Deferred.fromCoroutine(look(credentials, address, guess=guess))
            looking.addBoth(self._tell, key)
            identity = await answer
        elif identity is None and guess:
            self.brake.check(address)
            self._failed(credentials, address)
        if identity is None:
            raise NotAuthenticated
        if isinstance(identity, LoginBound):
            raise LoginBound(identity.principal)  # each time a new one
        return identity

    def _failed(self, credentials: Credentials, address: str) -> None:
        self.brake.failed(address)
        self.refused(credentials, address)

    def _ask(self, key: bytes) -> Deferred[_Answer]:
        answer: Deferred[_Answer] = Deferred()
        self._waiting[key].append(answer)
        return answer

    def _tell(self, result: _Answer | Failure, key: bytes) -> None:
        if isinstance(result, Failure) and not result.check(PulsarError):
            _log.failure("A provider has failed", result)
        for answer in self._waiting.pop(key):
            if not answer.called:
                answer.callback(result)  # a Failure is an errback

    async def _look_in_turn(
        self, credentials: Credentials, address: str, *, guess: bool
    ) -> _Answer:
        """Look up who it is when there is room for it.

        Never are more looked up than may fail before the address is not heard: so any
        number of right ones are let in, and no more wrong ones are tried than if they had
        come one by one.
        """
        name = _network(address)
        line = self._lines.setdefault(name, _Line())
        try:
            await self._room(line, address)
            line.asked += 1
            try:
                return await self._look(credentials, address, guess=guess)
            finally:
                line.asked -= 1
                left = self.brake.left(address)
                # To those behind the last failure there is nothing to say but no.
                room = max(0, min(ASKED, left) - line.asked)
                line.wake(room if left > 0 else len(line.waiting))
        finally:
            if not line.asked and not line.waiting:
                self._lines.pop(name, None)

    async def _room(self, line: _Line, address: str) -> None:
        """Wait until one more may be looked up; raise `TooManyFailures` if none may."""
        until = self._clock.seconds() + PATIENCE
        while line.asked >= min(ASKED, self.brake.left(address)):
            left = max(0.0, until - self._clock.seconds())
            await line.wait().addTimeout(left, self._clock, _too_long)
            self.brake.check(address)

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
        self._answers.move_to_end(key)
        if good:
            self._proved[key] = now
            self._proved.move_to_end(key)
        for remembered in (self._answers, self._proved):
            while len(remembered) > _REMEMBERED:
                remembered.popitem(last=False)
        return identity


def _too_long(*_: object) -> NoReturn:
    detail = "too many new ones of your address are being looked up"
    raise ProviderUnavailable("This daemon", detail, 2)
