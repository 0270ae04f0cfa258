"""Lets callers that ask for the same thing at the same time share one answer."""

from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from attrs import define, field
from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from pulsar_api.errors import PulsarError

_log = Logger()
K = TypeVar("K")
T = TypeVar("T")


@define(eq=False)
class SingleFlight(Generic[K, T]):
    """Does the work for a key once, however many wait for it at the same time."""

    _what: str
    """What the work is, for the log."""
    _waiting: dict[K, list[Deferred[T]]] = field(factory=dict, init=False)

    def __contains__(self, key: K) -> bool:
        """Return whether the work for a key is under way."""
        return key in self._waiting

    def __len__(self) -> int:
        """Return for how many keys work is under way."""
        return len(self._waiting)

    def do(
        self, key: K, work: Callable[[], Coroutine[Deferred[Any], Any, T]]
    ) -> Deferred[T]:
        """Fire with the result of the work for a key, or fail as it does.

        The work is started unless it is under way. It goes on when the Deferred is
        cancelled, as others may wait for it.
        """
        waiter: Deferred[T] = Deferred()
        waiters = self._waiting.setdefault(key, [])
        waiters.append(waiter)
        if len(waiters) == 1:
            Deferred.fromCoroutine(work()).addBoth(self._done, key)
        return waiter

    def _done(self, result: T | Failure, key: K) -> None:
        if isinstance(result, Failure) and not result.check(PulsarError):
            _log.failure("{what} has failed", result, what=self._what)
        for waiter in self._waiting.pop(key):
            if not waiter.called:
                waiter.callback(result)  # a Failure is an errback
