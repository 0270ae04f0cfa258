"""Tests of the version counter that long-polls wait on."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from pulsar_api.concurrency.changes import Changes

CASE = SynchronousTestCase()


@pytest.fixture
def clock() -> Clock:
    """Return a clock that stands still."""
    return Clock()


def test_a_waiter_with_another_version_is_answered_at_once(clock: Clock) -> None:
    """The version can be higher than the present one, from before a restart."""
    changes = Changes(clock, 5)
    assert CASE.successResultOf(changes.after(4)) == 5
    assert CASE.successResultOf(changes.after(6)) == 5


def test_a_waiter_with_the_present_version_waits_for_the_next(clock: Clock) -> None:
    """The Deferred fires with the new version, and not earlier."""
    changes = Changes(clock, 5)
    waiter = changes.after(5)
    changes.advance(5)
    CASE.assertNoResult(waiter)
    changes.advance(6)
    assert CASE.successResultOf(waiter) == 6


def test_a_cancelled_waiter_is_removed(clock: Clock) -> None:
    """Nothing of it stays in memory."""
    changes = Changes(clock)
    waiter = changes.after(0)
    assert changes.waiting == 1
    waiter.cancel()
    CASE.failureResultOf(waiter, CancelledError)
    assert changes.waiting == 0


def test_many_waiters_are_woken_in_slices(clock: Clock) -> None:
    """Other work gets a turn after each hundred waiters."""
    changes = Changes(clock)
    waiters = [changes.after(0) for _ in range(250)]
    changes.advance(1)
    assert sum(w.called for w in waiters) == 100
    seen = []
    clock.callLater(0, lambda: seen.append(sum(w.called for w in waiters)))
    clock.advance(0)
    assert seen == [200]
    assert all(w.called for w in waiters)
    assert clock.getDelayedCalls() == []


def test_a_waiter_cancelled_between_two_slices_does_not_fire(clock: Clock) -> None:
    """It belongs to a later slice."""
    changes = Changes(clock)
    waiters = [changes.after(0) for _ in range(150)]
    changes.advance(1)
    waiters[149].cancel()
    CASE.failureResultOf(waiters[149], CancelledError)
    clock.advance(0)
    assert all(w.called for w in waiters)


def test_release_wakes_without_a_change(clock: Clock) -> None:
    """At the end of the daemon each waiter gets the version that it knew."""
    changes = Changes(clock, 3)
    waiter = changes.after(3)
    changes.release()
    assert CASE.successResultOf(waiter) == 3


@given(st.lists(st.sampled_from(["wait", "advance", "cancel", "turn"]), max_size=300))
def test_no_waiter_is_left_behind(steps: list[str]) -> None:
    """After a change and enough turns none waits for an old version."""
    clock = Clock()
    changes = Changes(clock)
    waiters: list[Deferred[int]] = []
    for step in steps:
        if step == "wait":
            waiters.append(changes.after(changes.version))
        elif step == "advance":
            changes.advance(changes.version + 1)
        elif step == "cancel" and waiters:
            waiters.pop().addErrback(lambda f: f.trap(CancelledError)).cancel()
        else:
            clock.advance(0)
    changes.advance(changes.version + 1)
    while clock.getDelayedCalls():
        clock.advance(0)
    assert all(waiter.called for waiter in waiters)
    assert changes.waiting == 0
