"""What every test is held to: nothing left behind, no error that nobody handled."""

import gc
import os
from collections.abc import Iterator

import pytest
from hypothesis import settings
from twisted.internet import reactor
from twisted.logger import ILogObserver, LogEvent, globalLogPublisher
from zope.interface import implementer

# How long an example takes says more about the machine than about the example.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


def pytest_collection_finish() -> None:
    """Let the collector pass over what imports have made; below it runs for each test."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_delayed_call_is_left() -> Iterator[None]:
    before = set(reactor.getDelayedCalls())
    yield
    left = [call for call in reactor.getDelayedCalls() if call not in before]
    assert left == []


@pytest.fixture(autouse=True)
def logged_failures() -> Iterator[list[LogEvent]]:
    """Collect errors nobody handled; a test that expects one empties the list."""
    seen: list[LogEvent] = []

    @implementer(ILogObserver)
    def observe(event: LogEvent) -> None:
        if "log_failure" in event:
            seen.append(event)

    globalLogPublisher.addObserver(observe)
    yield seen
    gc.collect()  # a failed coroutine nobody awaits is logged when it is collected
    globalLogPublisher.removeObserver(observe)
    assert [event["log_failure"].getTraceback() for event in seen] == []


@pytest.fixture
def environ() -> dict[str, str]:
    """Return an environment in which nothing of ours is set."""
    kept = ("PATH", "HOME", "LANG", "COVERAGE_PROCESS_CONFIG", "COVERAGE_PROCESS_START")
    return {name: os.environ[name] for name in kept if name in os.environ}
