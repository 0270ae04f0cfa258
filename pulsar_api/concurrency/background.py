"""Runs coroutines to their end, whoever waits for them."""

from collections.abc import Coroutine
from typing import Any, TypeVar

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from pulsar_api.errors import PulsarError, ShuttingDown

_log = Logger()
_T = TypeVar("_T")


def own(coroutine: Coroutine[Deferred[Any], Any, object]) -> None:
    """Run a coroutine that nobody waits for; what it does not expect is logged.

    `ShuttingDown` is expected: it leaves the rest to the next daemon.
    """

    def failed(failure: Failure) -> None:
        if not failure.check(ShuttingDown):
            _log.failure("A task could not be served", failure)

    Deferred.fromCoroutine(coroutine).addErrback(failed)


def shielded(coroutine: Coroutine[Deferred[Any], Any, _T]) -> Deferred[_T]:
    """Return a Deferred of a coroutine that goes on if the Deferred is cancelled.

    A client may hang up between the record of a task and its start.
    """
    waiter: Deferred[_T] = Deferred()

    def done(result: _T | Failure) -> None:
        if not waiter.called:
            waiter.callback(result)  # a Failure is an errback
        elif isinstance(result, Failure) and not result.check(PulsarError):
            _log.failure("A task could not be served", result)

    Deferred.fromCoroutine(coroutine).addBoth(done)
    return waiter
