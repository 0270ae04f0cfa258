"""Runs coroutines to their end, whether or not anybody waits for them."""

from collections.abc import Coroutine
from typing import Any, TypeVar

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from pulsar_api.errors import PulsarError, ShuttingDown

_log = Logger()
_T = TypeVar("_T")


def run_in_background(coroutine: Coroutine[Deferred[Any], Any, object]) -> None:
    """Run a coroutine that nobody waits for, and log the exception if it fails.

    `ShuttingDown` is not logged: the next daemon does the rest.
    """

    def failed(failure: Failure) -> None:
        if not failure.check(ShuttingDown):
            _log.failure("A task could not be served", failure)

    Deferred.fromCoroutine(coroutine).addErrback(failed)


def shielded(coroutine: Coroutine[Deferred[Any], Any, _T]) -> Deferred[_T]:
    """Return a Deferred for a coroutine that goes on even if the Deferred is cancelled.

    A client may hang up when its task is recorded but not started yet.
    """
    waiter: Deferred[_T] = Deferred()

    def done(result: _T | Failure) -> None:
        if not waiter.called:
            waiter.callback(result)  # a Failure is an errback
        elif isinstance(result, Failure) and not result.check(PulsarError):
            _log.failure("A task could not be served", result)

    Deferred.fromCoroutine(coroutine).addBoth(done)
    return waiter
