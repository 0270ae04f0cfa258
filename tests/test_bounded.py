"""Tests of bounded maps and of shared work."""

import pytest
from twisted.internet.defer import Deferred
from twisted.logger import LogEvent
from twisted.trial.unittest import SynchronousTestCase

from pulsar_api.bounded import BoundedDict
from pulsar_api.concurrency.single_flight import SingleFlight
from pulsar_api.errors import ShuttingDown

CASE = SynchronousTestCase()


def test_the_item_set_longest_ago_is_dropped() -> None:
    """Setting an item again makes it the newest."""
    found: BoundedDict[str, int] = BoundedDict(2)
    found["a"], found["b"] = 1, 2
    found["a"] = 3
    found["c"] = 4
    assert dict(found) == {"a": 3, "c": 4}
    assert found.get("a") == 3
    found["d"] = 5
    assert dict(found) == {"c": 4, "d": 5}


def test_callers_of_the_same_key_share_its_work() -> None:
    """A caller that cancels does not affect the others."""
    flights: SingleFlight[str, int] = SingleFlight("A test")
    asked: list[str] = []
    answer: Deferred[int] = Deferred()

    async def work() -> int:
        asked.append("work")
        return await answer

    first, second = flights.do("a", work), flights.do("a", work)
    assert asked == ["work"]
    assert "a" in flights
    first.cancel()
    CASE.failureResultOf(first)
    answer.callback(7)
    assert CASE.successResultOf(second) == 7
    assert "a" not in flights


@pytest.mark.parametrize("error", [ShuttingDown(), ValueError("odd")])
def test_an_error_of_shared_work_reaches_all_callers(
    error: Exception, logged_failures: list[LogEvent]
) -> None:
    """An unexpected error is logged as well."""
    flights: SingleFlight[str, int] = SingleFlight("A test")
    answer: Deferred[int] = Deferred()

    async def work() -> int:
        return await answer

    waiting = [flights.do("a", work) for _ in range(2)]
    answer.errback(error)
    for waiter in waiting:
        assert CASE.failureResultOf(waiter).value is error
    assert not len(flights)
    assert len(logged_failures) == isinstance(error, ValueError)
    logged_failures.clear()
