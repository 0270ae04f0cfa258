"""Tests of a task's state, and of when its changes are announced."""

import pytest
from attrs import evolve
from twisted.internet.task import Clock

from pulsar_api.tasks.live import COALESCE, Task
from pulsar_api.tasks.model import (
    Cause,
    Exit,
    Process,
    Status,
    TaskSnapshot,
    TaskSpec,
    judge,
)
from tests.fakes import person

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
def test_four_of_six_states_are_final(status: Status) -> None:
    """Only a waiting or a running task can still change."""
    assert status.ended == (status not in {"created", "running"})


def test_the_first_piece_wakes_at_once_and_the_next_ones_together(
    clock: Clock, task: Task
) -> None:
    """A thousand small pieces wake the waiters at most every 50 ms."""
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
    """Reports can arrive twice, but the output never shrinks."""
    task.printed(10)
    task.printed(10)
    task.printed(4)
    clock.advance(COALESCE)
    assert task.snapshot.output_size == 10


def test_refresh_announces_output_that_was_held_back(clock: Clock, task: Task) -> None:
    """So a plain GET shows all output so far."""
    task.printed(1)
    task.printed(2)
    assert task.snapshot.output_size == 1
    task.refresh()
    assert task.snapshot.output_size == 2
    task.settle()
    task.settle()
    assert clock.getDelayedCalls() == []


def test_the_end_is_announced_at_once_and_cancels_the_timer(
    clock: Clock, task: Task
) -> None:
    """Waiters for the end wake with it, and nothing is announced after it."""
    task.printed(1)
    task.printed(2)
    end = task.end.after(0)
    task.announce(evolve(task.snapshot, status=Status.FINISHED, output_size=2, revision=2))
    assert end.called
    task.refresh()
    assert task.snapshot.version == 4
    assert clock.getDelayedCalls() == []


ROOT = Process(4711, 99, "sleep", "root")
RUN = "TERM and KILL were sent, but these processes still run: 4711 sleep (root)"
FORCED = "TERM was not enough, KILL was sent"
STAYS = "The command does not end, not even by KILL."


@pytest.mark.parametrize(
    ("exit", "status", "reason"),
    [
        (Exit(cause=Cause.KILL), "killed", "Killed by me."),
        (
            Exit(cause=Cause.KILL, forced=True),
            "killed",
            f"Killed by me; {FORCED}.",
        ),
        (
            Exit(cause=Cause.KILL, forced=True, left=(ROOT,)),
            "killed",
            f"Killed by me; {RUN}.",
        ),
        (
            Exit(cause=Cause.KILL, forced=True, left=(ROOT,) * 12, error=STAYS),
            "killed",
            f"Killed by me; {RUN}{', 4711 sleep (root)' * 9} and 2 more.",
        ),
        (
            Exit(cause=Cause.KILL, left=(ROOT,)),
            "killed",
            f"Killed by me; {RUN.replace('TERM and KILL were', 'TERM was')}.",
        ),
        (
            Exit(cause=Cause.KILL, error="The command was not started."),
            "killed",
            "Killed by me. The command was not started.",
        ),
        (
            Exit(cause=Cause.TIMEOUT, forced=True, error=STAYS, left=(ROOT,)),
            "failed",
            f"It ran for longer than allowed (--task-timeout); {RUN}.",
        ),
        (
            Exit(cause=Cause.SILENCE, code=0, forced=True),
            "failed",
            f"It printed nothing for too long (--silence-timeout); {FORCED}.",
        ),
        (Exit(code=0, left=(ROOT,), open=True), "finished", None),
        (Exit(code=0, forced=True, left=(ROOT,)), "finished", None),
        (Exit(error="cannot start x: not found"), "failed", "cannot start x: not found"),
    ],
)
def test_a_reason_states_only_what_has_happened(
    exit: Exit, status: str, reason: str | None
) -> None:
    """It names processes that survived, but a background process is not a fault."""
    assert judge(exit, person("me")) == (status, reason)
