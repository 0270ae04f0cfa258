"""Tests of the bounds of an HTTP client: a body that comes slowly, is large, or breaks."""

import pytest
from twisted.internet.error import ConnectionLost
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone
from twisted.web.http import PotentialDataLoss

from pulsar_api.client.http import RATE, Body, Late, TooLarge


def reading(clock: Clock, most: int | None = None) -> Body:
    """Return what reads a body, for 10 seconds at first."""
    body = Body(clock, 10, most)
    body.transport = StringTransport()
    return body


@pytest.mark.parametrize("end", [ResponseDone, PotentialDataLoss])
def test_a_body_may_take_as_long_as_it_comes(end: type[Exception]) -> None:
    """The deadline moves with what has come; the end is the end."""
    clock = Clock()
    body = reading(clock)
    for _ in range(100):
        clock.advance(9)
        body.dataReceived(b"x" * (9 * RATE))
    body.connectionLost(Failure(end()))
    assert body.whole.result == b"x" * (900 * RATE)
    assert clock.getDelayedCalls() == []


def test_a_body_that_comes_too_slowly_is_given_up() -> None:
    """Whatever came before: on the whole it is as slow as that."""
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


def test_a_body_that_is_too_large_is_given_up_at_once() -> None:
    """What comes after is not kept."""
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


def test_who_wants_it_no_more_hangs_up() -> None:
    """And a connection that breaks breaks the body."""
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
