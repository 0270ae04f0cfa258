"""Tests of a task's state and of who is told about it when."""

import pytest
from attrs import evolve
from twisted.internet.task import Clock

from pulsar_api.task import COALESCE, Status, Task, TaskSnapshot, TaskSpec

SPEC = TaskSpec("site", "production", "deploy")


@pytest.fixture
def clock() -> Clock:
    """Return a clock that stands still."""
    return Clock()


@pytest.fixture
def task(clock: Clock) -> Task:
    """Return a task that runs."""
    return Task(clock, TaskSnapshot(1, SPEC, 0.0, Status.RUNNING))


@pytest.mark.parametrize("status", list(Status))
def test_four_of_six_states_are_for_ever(status: Status) -> None:
    """Only a task that waits or runs can still change."""
    assert status.ended == (status not in {"created", "running"})


def test_the_first_piece_wakes_at_once_and_the_next_ones_together(
    clock: Clock, task: Task
) -> None:
    """A thousand small pieces wake the waiting at most every 50 ms."""
    begin = task.changes.version
    task.printed(10)
    assert task.changes.version == begin + 10
    for size in range(11, 1000):
        task.printed(size)
    assert task.changes.version == begin + 10
    clock.advance(COALESCE)
    assert task.changes.version == begin + 999
    clock.advance(COALESCE)
    assert clock.getDelayedCalls() == []


def test_an_older_size_changes_nothing(clock: Clock, task: Task) -> None:
    """News may come twice; the output never shrinks."""
    task.printed(10)
    task.printed(10)
    task.printed(4)
    clock.advance(COALESCE)
    assert task.snapshot.output_size == 10


def test_refresh_announces_what_was_held_back(clock: Clock, task: Task) -> None:
    """A plain GET sees all output to date."""
    task.printed(1)
    task.printed(2)
    assert task.snapshot.output_size == 1
    task.refresh()
    assert task.snapshot.output_size == 2
    task.settle()
    task.settle()
    assert clock.getDelayedCalls() == []


def test_the_end_is_announced_at_once_and_leaves_no_clock(clock: Clock, task: Task) -> None:
    """Whoever waits for the end is woken with it, and nothing is announced after it."""
    task.printed(1)
    task.printed(2)
    end = task.end.after(0)
    task.announce(evolve(task.snapshot, status=Status.FINISHED, output_size=2, revision=2))
    assert end.called
    task.refresh()
    assert task.snapshot.version == 4
    assert clock.getDelayedCalls() == []
