"""Tests of the limits of an HTTP client for slow, large and broken bodies."""

import pytest
from twisted.internet.error import ConnectionLost
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone
from twisted.web.http import PotentialDataLoss

from pulsar_api.client.http import RATE, Body, Late, TooLarge


def reading(clock: Clock, most: int | None = None) -> Body:
    """Return a body that may take 10 seconds at first."""
    body = Body(clock, 10, most)
    body.transport = StringTransport()
    return body


@pytest.mark.parametrize("end", [ResponseDone, PotentialDataLoss])
def test_a_long_body_is_read_while_it_is_fast_enough(end: type[Exception]) -> None:
    """Each byte moves the deadline."""
    clock = Clock()
    body = reading(clock)
    for _ in range(100):
        clock.advance(9)
        body.dataReceived(b"x" * (9 * RATE))
    body.connectionLost(Failure(end()))
    assert body.whole.result == b"x" * (900 * RATE)
    assert clock.getDelayedCalls() == []


def test_a_slow_body_is_abandoned() -> None:
    """The average rate counts, so a fast start does not help for long."""
    clock = Clock()
    body = reading(clock)
    body.dataReceived(b"x" * (5 * RATE))
    for _ in range(14):
        clock.advance(1)
        body.dataReceived(b"x")
    assert not body.whole.called
    clock.advance(1.1)
    body.whole.addErrback(lambda failure: failure.trap(Late))
    assert body.whole.result is Late
    assert body.transport.disconnecting
    assert clock.getDelayedCalls() == []


def test_a_body_that_is_too_large_is_abandoned_at_once() -> None:
    """Later bytes are not kept."""
    clock = Clock()
    body = reading(clock, most=10)
    body.dataReceived(b"x" * 10)
    assert not body.whole.called
    body.dataReceived(b"x")
    body.dataReceived(b"x")
    body.connectionLost(Failure(ResponseDone()))
    body.whole.addErrback(lambda failure: failure.trap(TooLarge))
    assert body.whole.result is TooLarge
    assert body.transport.disconnecting
    assert clock.getDelayedCalls() == []


def test_a_cancelled_body_closes_the_connection() -> None:
    """A broken connection is an error of the body."""
    clock = Clock()
    body = reading(clock)
    body.whole.addErrback(lambda _: None)
    body.whole.cancel()
    assert body.transport.disconnecting
    broken = reading(clock)
    broken.connectionLost(Failure(ConnectionLost()))
    broken.whole.addErrback(lambda failure: failure.trap(ConnectionLost))
    assert broken.whole.result is ConnectionLost
    assert clock.getDelayedCalls() == []
