"""Tests of the life of tasks: queue, limits, kill, end, restart. Time stands still."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from attrs import define, evolve, field
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import LogEvent
from twisted.trial.unittest import SynchronousTestCase

from pulsar_api.errors import (
    InvalidInput,
    KeyInFlight,
    KeyReused,
    QueueFull,
    ShuttingDown,
    StoreUnavailable,
    UnknownTask,
)
from pulsar_api.principal import Principal
from pulsar_api.tasks.clock import SteadyClock
from pulsar_api.tasks.commands import Commands
from pulsar_api.tasks.interfaces import Bounds, Keep
from pulsar_api.tasks.live import COALESCE, Task
from pulsar_api.tasks.model import (
    KEY_LIFE,
    Cause,
    Process,
    Status,
    TaskQuery,
    TaskSnapshot,
    TaskSpec,
)
from pulsar_api.tasks.presets import parse_template
from pulsar_api.tasks.queue import Limits
from pulsar_api.tasks.recorder import RETRY
from pulsar_api.tasks.retention import TIDY
from pulsar_api.tasks.service import LEAVE, MAX_ID, TaskService
from tests import needs
from tests.fakes import FakeExecutor, MemoryStore, person

CASE = SynchronousTestCase()
BOB = person("bob")
SPEC = TaskSpec("site", "production", "deploy")
OTHER = TaskSpec("shop", "production", "deploy")


@define
class World:
    """A service with fakes of everything that it needs."""

    limits: Limits = field(factory=lambda: Limits(Bounds(10)))
    clock: Clock = field(factory=Clock)
    store: MemoryStore = field(factory=MemoryStore)
    template: str = "deploy {app} {env} {action}"
    wrong: float = 0
    """Seconds by which the wall clock is wrong."""
    secrets: dict[str, Mapping[str, str]] = field(factory=dict)
    executor: FakeExecutor = field(init=False)
    service: TaskService = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.restart()

    def restart(self, **executor: Any) -> None:
        """Start a new service on the same store, as a new daemon does."""
        self.restart_with(set(self.store.rows), **executor)

    def restart_with(self, folders: set[int], **executor: Any) -> None:
        """Start a new service where these runs have left folders."""
        self.replace(folders, **executor)
        CASE.successResultOf(Deferred.fromCoroutine(self.service.start()))

    def replace(self, folders: set[int], **executor: Any) -> None:
        """Make a new service and do not start it."""
        for call in self.clock.getDelayedCalls():
            call.cancel()
        executor.setdefault("kept_secrets", self.secrets)
        self.executor = FakeExecutor(self.clock, folders=folders, **executor)
        commands = Commands(parse_template(self.template), {})

        async def give() -> Commands:
            return commands

        self.service = TaskService(
            self.store,
            self.executor,
            self.clock,
            SteadyClock(self.wall, self.clock.seconds, "a boot"),
            give,
            self.limits,
        )

    def wall(self) -> float:
        return self.clock.seconds() + self.wrong

    def create(self, spec: TaskSpec = SPEC) -> Task:
        return CASE.successResultOf(Deferred.fromCoroutine(self.service.create(spec)))

    def kill(self, task_id: int, by: Principal = BOB) -> Task:
        return CASE.successResultOf(Deferred.fromCoroutine(self.service.kill(task_id, by)))

    def find(self, task_id: int) -> TaskSnapshot:
        found = Deferred.fromCoroutine(self.service.find(task_id))
        return CASE.successResultOf(found).snapshot

    def list(self, query: TaskQuery) -> list[TaskSnapshot]:
        return CASE.successResultOf(Deferred.fromCoroutine(self.service.list(query)))


@pytest.fixture
def world() -> World:
    """Return a world with the usual limits."""
    return World()


def limited(running: int = 16, per_target: int = 0, queued: int = 1000) -> World:
    """Return a world with limits."""
    return World(Limits(Bounds(10), running, per_target, queued))


def test_a_task_goes_from_created_to_finished(world: World) -> None:
    """Each step is announced once it is on disk."""
    task = world.create()
    assert task.snapshot.status is Status.CREATED
    run = world.executor.run(1)
    assert run.command is not None
    assert run.command.arguments == ("deploy", "site", "production", "deploy")
    run.start(pid=99)
    assert (task.snapshot.status, task.snapshot.pid) == (Status.RUNNING, 99)
    run.end(0)
    assert (task.snapshot.status, task.snapshot.exit_code) == (Status.FINISHED, 0)
    assert world.store.rows[1] == task.snapshot


def test_the_record_of_the_start_is_on_disk_before_the_process_exists(
    world: World,
) -> None:
    """A daemon that dies in between cannot start a task a second time."""
    world.store.slow = True
    made = Deferred.fromCoroutine(world.service.create(SPEC))
    CASE.assertNoResult(made)
    world.store.finish()
    CASE.successResultOf(made)
    assert world.store.rows[1].status is Status.RUNNING
    assert world.executor.runs == []
    world.store.finish()
    assert len(world.executor.runs) == 1


@pytest.mark.parametrize(
    ("end", "status", "reason"),
    [
        ({"code": 0}, "finished", None),
        ({"code": 3}, "failed", None),
        ({"signal": "SIGSEGV"}, "failed", None),
        ({"error": "cannot start x: not found"}, "failed", "cannot start x: not found"),
        ({"error": "gone", "lost": True}, "lost", "gone"),
        ({"code": 0, "cause": Cause.TIMEOUT}, "failed", "--task-timeout"),
        ({"code": 0, "cause": Cause.SILENCE, "forced": True}, "failed", "KILL was sent"),
        ({"code": 0, "cause": Cause.KILL}, "killed", "a signal that somebody sent"),
        ({"code": 0, "good": False}, "failed", "exit code is 0"),
    ],
)
def test_the_result_of_a_run_decides_the_state(
    world: World, end: dict[str, object], status: str, reason: str | None
) -> None:
    """Where the exit code does not explain the state, a sentence does."""
    task = world.create()
    world.executor.run(1).start()
    world.executor.run(1).end(**end)  # type: ignore[arg-type]
    assert task.snapshot.status == status
    assert (reason is None) == (task.snapshot.reason is None)
    assert reason is None or reason in (task.snapshot.reason or "")


def test_a_kill_names_its_principal(world: World) -> None:
    """The state is killed whatever the exit code, and a second kill has no effect."""
    task = world.create()
    run = world.executor.run(1)
    run.start()
    assert world.kill(1, person("alice")) is task
    assert "alice" in (task.snapshot.reason or "")
    assert task.snapshot.status is Status.RUNNING
    world.kill(1, BOB)
    assert run.kills == 1
    world.clock.advance(0)
    assert world.find(1).status is Status.KILLED
    assert task.snapshot.reason == "Killed by alice."


def test_a_kill_of_an_ended_task_changes_nothing(world: World) -> None:
    """It returns the task as it is."""
    task = world.create()
    world.executor.run(1).end(0)
    assert world.kill(1).snapshot == task.snapshot


def test_a_waiting_task_can_be_killed(world: World) -> None:
    """It never starts."""
    world = limited(running=1)
    world.create()
    waiting = world.create()
    world.kill(2, person("alice"))
    assert waiting.snapshot.status is Status.KILLED
    assert waiting.snapshot.reason == "Killed by alice before it started."
    world.executor.run(1).end(0)
    assert [run.task_id for run in world.executor.runs] == [1]


def test_a_kill_between_the_record_and_the_process_starts_nothing(world: World) -> None:
    """The start notices the kill."""
    made = Deferred.fromCoroutine(world.service.create(SPEC))
    task = CASE.successResultOf(made)
    world.executor.run(1).end(0)
    world.store.slow = True
    made = Deferred.fromCoroutine(world.service.create(SPEC))
    world.store.finish()
    task = CASE.successResultOf(made)
    killed = Deferred.fromCoroutine(world.service.kill(2, person("alice")))
    while not killed.called:
        world.store.finish()
    world.store.slow = False
    world.store.finish()
    assert len(world.executor.runs) == 1
    assert task.snapshot.status is Status.KILLED
    assert task.snapshot.started_at is None


def test_unknown_tasks_are_an_error(world: World) -> None:
    """So are numbers that no database can hold."""
    for number in (5, 0, MAX_ID + 1):
        CASE.failureResultOf(
            Deferred.fromCoroutine(world.service.find(number)), UnknownTask
        )
    CASE.failureResultOf(Deferred.fromCoroutine(world.service.kill(7, BOB)), UnknownTask)


def test_tasks_beyond_the_limit_wait_in_order() -> None:
    """Each names the reason why it waits."""
    world = limited(running=2)
    tasks = [world.create() for _ in range(4)]
    assert [run.task_id for run in world.executor.runs] == [1, 2]
    assert "2 tasks are running" in (tasks[2].snapshot.waiting_for or "")
    world.executor.run(2).end(0)
    assert [run.task_id for run in world.executor.runs] == [1, 2, 3]
    world.executor.run(3).start()
    assert tasks[2].snapshot.waiting_for is None


def test_a_blocked_target_does_not_hold_up_others() -> None:
    """Tasks start in order of creation per target."""
    world = limited(per_target=1)
    world.create()
    second = world.create()
    world.create(OTHER)
    assert [run.task_id for run in world.executor.runs] == [1, 3]
    assert second.snapshot.waiting_for == "the end of another task on site/production"
    world.executor.run(1).end(1)
    assert world.executor.runs[-1].task_id == 2


def test_a_full_queue_refuses_a_task() -> None:
    """A refused task leaves no record."""
    world = limited(running=1, queued=1)
    world.create()
    world.create()
    refused = Deferred.fromCoroutine(world.service.create(SPEC))
    assert CASE.failureResultOf(refused, QueueFull).value.limit == 1
    assert len(world.store.rows) == 2


def test_one_user_has_half_of_the_queue() -> None:
    """The other half is for others, even after a restart. A retry finds its task."""
    world = limited(running=1, queued=4)
    alice, bob = (evolve(SPEC, user=person(name)) for name in ("alice", "bob"))

    def refused(spec: TaskSpec) -> QueueFull:
        asked = Deferred.fromCoroutine(world.service.create(spec))
        error: QueueFull = CASE.failureResultOf(asked, QueueFull).value
        return error

    def keyed() -> Task:
        return CASE.successResultOf(
            Deferred.fromCoroutine(world.service.create(alice, "key"))
        )

    world.create(alice)  # runs
    world.create(alice)
    waits = keyed().snapshot.id
    for _ in range(2):
        error = refused(alice)
        assert (error.limit, error.whose) == (2, "alice")
        assert "2 tasks of alice are waiting already" in str(error)
        assert keyed().snapshot.id == waits
        renamed = evolve(alice, user=Principal("static", "alice", "alicia"))
        assert refused(renamed).whose == "alicia"
        world.restart()
    world.create(bob)
    world.create(bob)
    assert (refused(bob).limit, refused(bob).whose) == (4, "")
    assert len(world.store.rows) == 5


def test_without_a_queue_a_task_that_must_wait_is_refused() -> None:
    """A task is refused even if it would wait for its target only."""
    world = limited(running=2, per_target=1, queued=0)
    world.create()
    CASE.failureResultOf(Deferred.fromCoroutine(world.service.create(SPEC)), QueueFull)
    world.create(OTHER)
    third = evolve(SPEC, app="third")
    CASE.failureResultOf(Deferred.fromCoroutine(world.service.create(third)), QueueFull)


def test_a_task_that_its_command_cannot_accept_is_refused(world: World) -> None:
    """The refusal comes before the first record."""
    bad = evolve(SPEC, app="--conf-repo=x")
    CASE.failureResultOf(Deferred.fromCoroutine(world.service.create(bad)), InvalidInput)
    assert world.store.rows == {}


def test_lists_show_the_present_state(world: World) -> None:
    """They include changes that are not in the database yet."""
    world.create()
    world.executor.run(1).start(pid=5)
    world.executor.run(1).sink.printed(10)  # type: ignore[union-attr]
    found = world.list(TaskQuery())
    assert [(task.pid, task.output_size) for task in found] == [(5, 10)]
    world.executor.run(1).end(0)


def test_news_of_new_tasks_can_be_followed_from_any_number(world: World) -> None:
    """Each call returns the next newer task, so that a follower sees all of a burst."""
    assert world.service.created.version == 0
    for _ in range(3):
        world.create()
    assert world.service.created.version == 3
    after = [
        CASE.successResultOf(Deferred.fromCoroutine(world.service.next_after(n)))
        for n in range(4)
    ]
    assert [task.id if task else None for task in after] == [1, 2, 3, None]


def test_output_wakes_waiters(world: World) -> None:
    """The size is part of the version."""
    task = world.create()
    run = world.executor.run(1)
    run.start()
    waiting = task.changes.after(task.snapshot.version)
    run.sink.printed(7)  # type: ignore[union-attr]
    assert CASE.successResultOf(waiting) == task.snapshot.version
    run.end(0, output_size=9)
    assert task.snapshot.output_size == 9
    assert len(world.clock.getDelayedCalls()) == 1  # the next tidying


def test_an_end_that_cannot_be_recorded_is_tried_again(world: World) -> None:
    """The end is announced once it is on disk, and not lost."""
    task = world.create()
    world.executor.run(1).start()
    world.store.broken = True
    world.executor.run(1).end(0)
    assert task.snapshot.status is Status.RUNNING
    world.clock.advance(RETRY)
    world.store.broken = False
    world.clock.advance(RETRY)
    assert world.find(1).status is Status.FINISHED


def test_a_task_that_cannot_be_recorded_is_refused(world: World) -> None:
    """The next task is accepted."""
    world.store.broken = True
    CASE.failureResultOf(
        Deferred.fromCoroutine(world.service.create(SPEC)), StoreUnavailable
    )
    world.store.broken = False
    world.create()


def test_a_new_daemon_takes_up_tasks_that_have_not_ended() -> None:
    """It adopts running tasks. Waiting ones keep their order and start once."""
    world = limited(running=1)
    world.create()
    world.create()
    world.executor.run(1).start()
    before = world.find(1).version, world.find(2).version
    world.restart()
    assert [(run.task_id, run.adopted) for run in world.executor.runs] == [(1, True)]
    after = world.find(1).version, world.find(2).version
    assert after[0] > before[0]
    assert after[1] > before[1]
    assert world.service.created.version == 2
    world.executor.run(1).start(pid=8)
    assert world.find(1).pid == 8
    world.executor.run(1).end(0)
    assert [(run.task_id, run.adopted) for run in world.executor.runs[1:]] == [(2, False)]


def test_a_kill_goes_on_after_a_restart(world: World) -> None:
    """The new daemon repeats the kill, and still knows the principal."""
    world.create()
    world.executor.run(1).start()
    world.executor.run(1).deaf = True
    world.kill(1, person("alice"))
    world.restart()
    world.clock.advance(0)
    assert world.find(1).reason == "Killed by alice."


def test_a_waiting_task_that_new_settings_forbid_fails_with_a_reason() -> None:
    """It never runs in another way than requested."""
    world = limited(running=1)
    world.create()
    world.create(evolve(SPEC, variables={"PATH": "x"}))
    world.template = "pulsar-1"
    world.restart()
    world.executor.run(1).end(0)
    assert world.find(2).status is Status.FAILED
    assert "PATH" in (world.find(2).reason or "")


def test_a_stopping_daemon_takes_no_new_tasks_and_leaves_running_ones(
    world: World,
) -> None:
    """Running tasks go on, and their changes are no longer announced."""
    world.create()
    world.executor.run(1).start()
    stopped = Deferred.fromCoroutine(world.service.stop(0))
    CASE.successResultOf(stopped)
    assert world.executor.run(1).sink is None
    assert world.executor.run(1).kills == 0
    CASE.failureResultOf(Deferred.fromCoroutine(world.service.create(SPEC)), ShuttingDown)
    assert world.store.rows[1].status is Status.RUNNING


def test_a_stopping_daemon_can_wait_for_running_tasks() -> None:
    """It waits for the drain, and starts no waiting task."""
    world = limited(running=1)
    world.create()
    world.create()
    stopped = Deferred.fromCoroutine(world.service.stop(100))
    world.clock.advance(50)
    CASE.assertNoResult(stopped)
    world.executor.run(1).end(0)
    CASE.successResultOf(stopped)
    assert len(world.executor.runs) == 1
    assert world.store.rows[2].status is Status.CREATED
    assert world.clock.getDelayedCalls() == []


def test_a_stopping_daemon_waits_no_longer_than_the_drain(world: World) -> None:
    """Then the daemon ends, and the task runs on."""
    world.create()
    stopped = Deferred.fromCoroutine(world.service.stop(100))
    world.clock.advance(100)
    CASE.successResultOf(stopped)
    assert world.executor.run(1).sink is None


def test_a_task_whose_start_is_recorded_during_a_stop_is_started(world: World) -> None:
    """It does not go back to the queue. The next daemon follows it."""
    world.store.slow = True
    made = Deferred.fromCoroutine(world.service.create(SPEC))
    world.store.finish()
    CASE.successResultOf(made)
    stopped = Deferred.fromCoroutine(world.service.stop(0))
    CASE.assertNoResult(stopped)
    world.store.finish()
    CASE.successResultOf(stopped)
    assert world.executor.run(1).sink is None
    assert world.store.rows[1].status is Status.RUNNING


def test_a_stop_does_not_wait_for_the_store_for_ever(world: World) -> None:
    """Without a record there is no start: the task waits for the next daemon."""
    world.executor.full = True
    refused = Deferred.fromCoroutine(world.service.create(SPEC))
    CASE.failureResultOf(refused, StoreUnavailable)
    world.executor.full = False
    world.store.slow = True
    made = Deferred.fromCoroutine(world.service.create(SPEC))
    world.store.finish()
    CASE.successResultOf(made)
    stopped = Deferred.fromCoroutine(world.service.stop(0))
    world.clock.advance(LEAVE - 0.1)
    CASE.assertNoResult(stopped)
    world.clock.advance(0.2)
    CASE.successResultOf(stopped)
    world.store.finish()
    assert world.executor.runs == []
    assert world.clock.getDelayedCalls() == []


def test_a_kill_that_a_stop_could_not_record_is_done_by_the_next_daemon() -> None:
    """The database was unavailable to the daemon that received the kill."""
    world = limited(running=1)
    world.create()
    world.create()
    world.create()
    world.store.broken = True
    killed = Deferred.fromCoroutine(world.service.kill(2, person("alice")))
    CASE.assertNoResult(killed)
    stopped = Deferred.fromCoroutine(world.service.stop(0))
    world.clock.advance(LEAVE)
    CASE.successResultOf(stopped)
    CASE.failureResultOf(killed, ShuttingDown)
    assert world.clock.getDelayedCalls() == []
    assert world.executor.kills_noted == {2: person("alice")}
    world.store.broken = False
    noted = world.executor.kills_noted
    world.restart(kills_noted=noted)
    assert world.find(2).status is Status.KILLED
    assert "alice" in (world.find(2).reason or "")
    assert world.find(3).status is Status.CREATED


def test_a_stop_answers_all_waiters(world: World) -> None:
    """These are long-polls on tasks and on new tasks."""
    task = world.create()
    waiting = [
        task.changes.after(task.changes.version),
        task.end.after(0),
        world.service.created.after(1),
    ]
    world.service.release()
    assert all(one.called for one in waiting)


def test_a_retry_with_the_same_key_returns_the_same_task(world: World) -> None:
    """Nothing starts again, even if the task has ended."""

    def create(key: str) -> Task:
        return CASE.successResultOf(Deferred.fromCoroutine(world.service.create(SPEC, key)))

    first = create("k1")
    assert create("k1") is first
    world.executor.run(1).end(0)
    assert create("k1").snapshot == first.snapshot
    assert create("k2").snapshot.id == 2
    assert len(world.executor.runs) == 2


def test_a_key_counts_for_a_day(world: World) -> None:
    """After a day the key is free for a new task."""
    CASE.successResultOf(Deferred.fromCoroutine(world.service.create(SPEC, "k")))
    world.executor.run(1).end(0)
    world.clock.pump([TIDY] * int(KEY_LIFE / TIDY + 1))
    again = Deferred.fromCoroutine(world.service.create(SPEC, "k"))
    assert CASE.successResultOf(again).snapshot.id == 2


def test_a_key_with_another_task_is_refused(world: World) -> None:
    """A caller that mixes up keys must not believe that its task was started."""
    CASE.successResultOf(Deferred.fromCoroutine(world.service.create(SPEC, "k")))
    other = Deferred.fromCoroutine(world.service.create(OTHER, "k"))
    CASE.failureResultOf(other, KeyReused)
    assert len(world.store.rows) == 1


def test_the_key_of_a_request_in_progress_is_refused(world: World) -> None:
    """It is not known yet whether the request becomes a task."""
    world.store.slow = True
    first = Deferred.fromCoroutine(world.service.create(SPEC, "k"))
    CASE.failureResultOf(
        Deferred.fromCoroutine(world.service.create(SPEC, "k")), KeyInFlight
    )
    world.store.slow = False
    world.store.finish()
    assert CASE.successResultOf(first).snapshot.id == 1


def keeping(keep: Keep) -> World:
    """Return a world with this retention."""
    return World(Limits(Bounds(10), keep=keep))


def ended(world: World, count: int, size: int = 0, index: int = 0) -> None:
    """Let ``count`` tasks run and end."""
    for _ in range(count):
        task = world.create()
        run = world.executor.run(task.snapshot.id)
        run.end(0, output_size=size, index_size=index)


def test_old_tasks_are_removed_with_their_output_and_running_ones_stay() -> None:
    """The newest tasks are kept. Tasks that have not ended are never removed."""
    world = keeping(Keep(tasks=3))
    running = world.create()
    ended(world, 50)
    world.clock.advance(TIDY)
    assert list(world.store.rows) == [1, 49, 50, 51]
    assert world.executor.folders == {1, 49, 50, 51}
    assert running.snapshot.status is Status.CREATED


def test_tasks_are_removed_by_age_and_by_size() -> None:
    """The bound that is reached first counts."""
    world = keeping(Keep(seconds=100))
    ended(world, 2)
    world.clock.advance(TIDY)
    assert len(world.store.rows) == 2
    world.clock.advance(TIDY * 4)
    assert world.store.rows == {}
    world = keeping(Keep(size=25))
    ended(world, 5, size=10)
    world.clock.advance(TIDY)
    assert list(world.store.rows) == [4, 5]


def test_output_that_was_cut_out_does_not_count() -> None:
    """A huge output counts with its size on disk only."""
    world = keeping(Keep(size=25, most=5))
    ended(world, 6, size=10)
    world.clock.advance(TIDY)
    assert list(world.store.rows) == [2, 3, 4, 5, 6]


@pytest.mark.parametrize("days", [370, -370])
def test_a_wrong_wall_clock_removes_nothing_and_ends_no_key(days: int) -> None:
    """Ages come from a clock that nobody can set, even across restarts."""
    world = keeping(Keep(seconds=90 * 86400))
    made = Deferred.fromCoroutine(world.service.create(SPEC, "k"))
    CASE.successResultOf(made)
    world.executor.run(1).end(0)
    ended(world, 3)
    world.wrong = days * 86400.0
    world.clock.pump([TIDY] * 3)
    world.restart()
    world.clock.pump([TIDY] * 3)
    ended(world, 1)
    world.wrong = 0
    world.clock.pump([TIDY] * 3)
    assert list(world.store.rows) == [1, 2, 3, 4, 5]
    again = Deferred.fromCoroutine(world.service.create(SPEC, "k"))
    assert CASE.successResultOf(again).snapshot.id == 1


def test_a_wrong_wall_clock_at_a_boot_removes_nothing() -> None:
    """The time for which the machine was off is unknown, so it does not count."""
    world = keeping(Keep(seconds=86400))
    made = Deferred.fromCoroutine(world.service.create(SPEC, "k"))
    CASE.successResultOf(made)
    world.executor.run(1).end(0)
    world.clock.advance(86400 - 2 * TIDY)
    ended(world, 3)
    world.clock.advance(TIDY)
    reading = world.store.kept_reading
    assert reading is not None
    world.store.kept_reading = evolve(reading, boot="an earlier boot", uptime=1e6)
    world.wrong = 370 * 86400.0
    world.restart()
    world.clock.advance(TIDY / 2)
    assert list(world.store.rows) == [1, 2, 3, 4]
    again = Deferred.fromCoroutine(world.service.create(SPEC, "k"))
    assert CASE.successResultOf(again).snapshot.id == 1


def test_a_first_start_with_a_wrong_wall_clock_removes_nothing() -> None:
    """The clock begins near the newest record."""
    world = keeping(Keep(seconds=86400))
    ended(world, 3)
    world.store.kept_reading = None
    world.wrong = 370 * 86400.0
    world.restart()
    world.clock.pump([TIDY] * 3)
    assert list(world.store.rows) == [1, 2, 3]


def test_the_index_of_an_output_counts_too() -> None:
    """The index of a task that prints byte by byte is larger than its output."""
    world = keeping(Keep(size=50, most=5))
    ended(world, 6, size=10, index=20)
    world.clock.advance(TIDY)
    assert list(world.store.rows) == [5, 6]


def test_a_task_is_kept_as_long_as_its_key_counts() -> None:
    """Otherwise a retry would start it a second time."""
    world = keeping(Keep(tasks=1))
    made = Deferred.fromCoroutine(world.service.create(SPEC, "k"))
    CASE.successResultOf(made)
    world.executor.run(1).end(0)
    ended(world, 3)
    world.clock.advance(TIDY)
    assert list(world.store.rows) == [1, 4]


def test_a_broken_store_is_tidied_later() -> None:
    """The files of a task are removed after its record."""
    world = keeping(Keep(tasks=1))
    ended(world, 3)
    world.store.broken = True
    world.clock.advance(TIDY)
    assert world.executor.folders == {1, 2, 3}
    world.store.broken = False
    world.clock.advance(TIDY)
    assert world.executor.folders == {3}


def test_a_half_finished_removal_is_finished_at_the_next_start(
    world: World,
) -> None:
    """A dead daemon has removed a record but not its output."""
    ended(world, 2)
    CASE.successResultOf(world.store.forget([1]))
    for _ in range(2):
        world.restart_with({1, 2})
        assert world.executor.folders == {2}
    world.restart_with({2})
    assert CASE.successResultOf(world.store.forgotten()) == set()


def test_a_task_that_was_never_started_starts_and_stays_running() -> None:
    """A daemon died between the record of the start and the start. It keeps its place."""
    world = limited(running=1)
    first = world.create()
    world.create()
    world.restart()
    world.executor.run(1).end(error="never", unstarted=True)
    runs = [(run.task_id, run.adopted) for run in world.executor.runs]
    assert runs == [(1, True), (1, False)]
    assert world.store.rows[1].status is Status.RUNNING
    world.executor.run(1).start()
    world.executor.run(1).end(0)
    assert world.find(first.snapshot.id).status is Status.FINISHED
    assert world.executor.runs[-1].task_id == 2


def test_a_killed_task_whose_shim_begins_all_the_same_is_followed(world: World) -> None:
    """A shim of the dead daemon came late. It is killed like any other."""
    world.create()
    world.executor.run(1).deaf = True
    world.kill(1, person("alice"))
    world.restart(begun={1})
    world.executor.run(1).deaf = True
    world.executor.run(1).end(error="never", unstarted=True)
    assert world.find(1).status is Status.RUNNING
    world.clock.advance(0)
    assert world.find(1).reason == "Killed by alice."


@pytest.mark.parametrize("begun", [False, True])
def test_a_task_whose_secrets_are_gone_may_have_begun(world: World, *, begun: bool) -> None:
    """A shim of the dead daemon waited for space, and took the secrets when it began."""
    world.create(HIDDEN)
    world.secrets.clear()
    world.restart(begun={1} if begun else set())
    world.executor.run(1).end(error="never", unstarted=True)
    assert world.executor.prevented == {1}
    if begun:
        assert world.find(1).status is Status.RUNNING
        world.executor.run(1).end(0)
        assert world.find(1).status is Status.FINISHED
    else:
        assert world.find(1).status is Status.FAILED
    assert [run.adopted for run in world.executor.runs] == [True] * (1 + begun)


def test_a_task_that_was_never_started_is_left_to_the_next_daemon(world: World) -> None:
    """The stopping daemon announces nothing that it does not know."""
    world.create()
    world.restart()
    Deferred.fromCoroutine(world.service.stop(100))
    world.executor.run(1).end(error="never", unstarted=True)
    assert world.store.rows[1].status is Status.RUNNING
    world.clock.advance(100)


def test_a_killed_task_that_was_never_started_does_not_start(world: World) -> None:
    """The kill on record counts."""
    world.create()
    world.executor.run(1).deaf = True
    world.kill(1, person("alice"))
    world.restart()
    world.executor.run(1).end(error="never", unstarted=True)
    assert world.find(1).reason == "Killed by alice before it started."
    assert world.find(1).status is Status.KILLED
    assert world.executor.prevented == {1}
    assert len(world.executor.runs) == 1


def test_a_killed_task_that_cannot_be_barred_yet_waits_for_the_disk(world: World) -> None:
    """Its end is announced once it is certain that no shim begins with it."""
    world.create()
    world.executor.run(1).deaf = True
    world.kill(1, person("alice"))
    world.restart()
    world.executor.full = True
    world.executor.run(1).end(error="never", unstarted=True)
    world.clock.advance(RETRY)
    assert world.find(1).status is Status.RUNNING
    world.executor.full = False
    world.clock.advance(RETRY)
    assert (world.find(1).status, world.executor.prevented) == (Status.KILLED, {1})


def test_no_start_is_barred_before_its_kill_is_on_record(world: World) -> None:
    """Otherwise a daemon that dies in between leaves a lost task without a reason."""
    world.create()
    world.executor.run(1).end(error="EAGAIN", unstarted=True, passing=True)
    world.store.broken = True
    killed = Deferred.fromCoroutine(world.service.kill(1, person("alice")))
    assert not killed.called
    assert world.executor.prevented == set()
    world.store.broken = False
    world.clock.advance(RETRY)
    assert CASE.successResultOf(killed).snapshot.status is Status.KILLED
    assert world.executor.prevented == {1}


def test_a_waiting_task_in_a_copied_state_is_lost() -> None:
    """The daemon of the original can start it, or has started it."""
    world = limited(running=1)
    world.create()
    world.create()
    world.restart(where="0 8 9 3 4 5")
    assert world.find(2).status is Status.LOST
    assert "copied" in (world.find(2).reason or "")
    # For a running task its own folder decides.
    assert world.find(1).status is Status.RUNNING


def test_a_daemon_that_is_stopped_before_its_start_changes_no_reading() -> None:
    """Its clock is not set yet, and the next daemon must still see a copy as a copy."""
    world = limited(running=1)
    world.create()
    world.create()
    reading = world.store.kept_reading
    world.replace({1}, where="0 8 9 3 4 5")
    CASE.successResultOf(Deferred.fromCoroutine(world.service.stop(0)))
    assert world.store.kept_reading == reading
    world.restart(where="0 8 9 3 4 5")
    assert world.find(2).status is Status.LOST


def test_a_waiting_task_in_a_database_older_than_the_folders_is_lost() -> None:
    """A restored database does not know the starts since the backup."""
    world = limited(running=1)
    world.create()
    world.create()
    world.restart_with({1, 2, 3})
    assert world.find(2).status is Status.LOST
    assert "older" in (world.find(2).reason or "")
    assert world.create().snapshot.id == 4


def test_a_new_device_number_after_a_boot_does_not_mean_a_copy() -> None:
    """The other values of the place must differ too."""
    world = limited(running=1)
    world.create()
    world.create()
    reading = world.store.kept_reading
    assert reading is not None
    world.store.kept_reading = evolve(reading, boot="an earlier boot")
    world.restart(where="5 1 2 3 4 5")
    assert world.find(2).status is Status.CREATED


def test_versions_never_go_back_over_restarts() -> None:
    """Not even if many changes were announced and none was recorded."""
    world = limited(running=1)
    world.create()
    waiting = world.create()
    seen = [waiting.snapshot.version]
    for _ in range(3):
        waiting.announce(
            evolve(waiting.snapshot, revision=waiting.snapshot.revision + 5000)
        )
        seen.append(waiting.snapshot.version)
        world.restart()
        waiting = CASE.successResultOf(Deferred.fromCoroutine(world.service.find(2)))
        seen.append(waiting.snapshot.version)
    assert seen == sorted(set(seen))


def test_a_bug_at_a_start_ends_the_task(
    world: World, logged_failures: list[LogEvent]
) -> None:
    """The task does not stay in its phase, and a stop does not wait for it."""
    world.executor.bug = RuntimeError("this is a bug")
    task = world.create()
    assert task.snapshot.status is Status.FAILED
    assert "this is a bug" in (task.snapshot.reason or "")
    assert logged_failures.pop()["log_failure"].check(RuntimeError)
    CASE.successResultOf(Deferred.fromCoroutine(world.service.stop(0)))


def test_a_stop_waits_for_the_end_of_a_task_whose_run_could_not_be_made(
    world: World, logged_failures: list[LogEvent]
) -> None:
    """Its start is on record. Otherwise the next daemon would have to find out."""
    world.store.slow = True
    Deferred.fromCoroutine(world.service.create(SPEC))
    world.store.finish()  # the record
    world.executor.late_bug = RuntimeError("this is a bug")
    world.store.finish()  # of the start
    assert logged_failures.pop()["log_failure"].check(RuntimeError)
    stopped = Deferred.fromCoroutine(world.service.stop(0))
    assert not stopped.called
    world.store.finish()  # of the end
    CASE.successResultOf(stopped)
    assert world.store.rows[1].status is Status.FAILED


SUDO = Process(4711, 100, "sleep 1000", "root")


def test_a_process_that_survives_a_kill_holds_the_target() -> None:
    """It holds the target until it ends. Waiting tasks name it as their reason."""
    world = limited(per_target=1)
    first = world.create()
    world.executor.run(1).deaf = True
    world.kill(1)
    world.executor.alive = (SUDO,)
    world.executor.run(1).end(cause=Cause.KILL, forced=True, left=(SUDO,))
    assert (first.snapshot.status, first.snapshot.held) == (Status.KILLED, True)
    assert first.snapshot.still_running == (SUDO,)
    second = world.create()
    assert second.snapshot.status is Status.CREATED
    assert second.snapshot.waiting_for == (
        "task 1, of which these still run: 4711 sleep 1000 (root)"
    )
    assert world.create(OTHER).snapshot.waiting_for is None
    world.clock.advance(RETRY)
    assert world.find(1).held
    world.restart(alive=(SUDO,))
    assert world.find(2).waiting_for is not None
    version = world.find(1).version
    world.executor.alive = ()
    world.clock.advance(RETRY)
    assert (world.find(1).held, world.find(1).still_running) == (False, ())
    assert world.find(1).version > version
    assert world.executor.run(2).command is not None


def test_an_operator_gives_a_target_back() -> None:
    """The task lists the remaining processes, and the principal that gave it back."""
    world = limited(per_target=1)
    first = world.create()
    world.executor.alive = (SUDO,)
    world.executor.run(1).end(lost=True, error="gone", left=(SUDO,))
    world.create()
    freed = Deferred.fromCoroutine(world.service.free("site/production", person("alice")))
    assert CASE.successResultOf(freed) == [1]
    assert (first.snapshot.held, first.snapshot.still_running) == (False, (SUDO,))
    assert first.snapshot.notes == (
        "alice gave site/production back while these still ran: 4711 sleep 1000 (root).",
    )
    assert world.executor.run(2).command is not None
    again = Deferred.fromCoroutine(world.service.free("site/production", person("alice")))
    assert CASE.successResultOf(again) == []


def test_a_process_left_by_a_finished_task_does_not_hold_the_target() -> None:
    """The task ended by itself, and lists the process."""
    world = limited(per_target=1)
    first = world.create()
    world.create()
    world.executor.alive = (SUDO,)
    world.executor.run(1).end(0, left=(SUDO,), open=True)
    assert first.snapshot.status is Status.FINISHED
    assert (first.snapshot.held, first.snapshot.still_running) == (False, (SUDO,))
    assert "background process" in first.snapshot.notes[0]
    assert world.executor.run(2).command is not None


def test_after_a_boot_nothing_holds_a_target() -> None:
    """Process numbers from before the boot mean nothing."""
    world = limited(per_target=1)
    world.create()
    world.executor.alive = (SUDO,)
    world.executor.run(1).end(lost=True, error="gone", left=(SUDO,))
    world.create()
    reading = world.store.kept_reading
    assert reading is not None
    world.store.kept_reading = evolve(reading, boot="an earlier boot")
    world.restart(alive=(SUDO,))
    assert not world.store.rows[1].held
    assert world.executor.run(2).command is not None


def test_remaining_files_are_removed_later_if_the_store_is_broken(world: World) -> None:
    """The start does not fail because of that."""
    ended(world, 2)
    CASE.successResultOf(world.store.forget([1]))
    world.store.broken = True
    world.restart_with({1, 2})
    assert world.executor.folders == {1, 2}
    world.store.broken = False
    world.restart_with({1, 2})
    assert world.executor.folders == {2}


def test_no_task_gets_the_folder_of_one_that_the_database_does_not_know(
    world: World,
) -> None:
    """After somebody has replaced a damaged database, existing folders stay."""
    world.store = MemoryStore()
    world.restart_with({1, 5})
    assert world.executor.folders == {1, 5}
    assert world.create().snapshot.id == 6
    # The same holds at a later start, when a record has a higher number.
    world.executor.run(6).end(0)
    world.restart_with({1, 5, 6})
    assert world.executor.folders == {1, 5, 6}


def test_a_task_that_was_permitted_and_has_no_folder_is_lost() -> None:
    """The database was restored and the folder removed, so it may have run."""
    world = limited(running=1)
    for _ in range(3):
        world.create()
    world.restart_with({1, 3}, allowed={1, 2, 3})
    assert [world.find(number).status for number in (1, 2, 3)] == [
        *(Status.RUNNING, Status.LOST, Status.CREATED),
    ]
    assert "folder was removed" in (world.find(2).reason or "")
    # Nor is its number used again if no record has it.
    world.restart_with({1}, allowed={7})
    assert world.create().snapshot.id == 8


def test_a_task_whose_folder_has_what_another_run_left_is_lost() -> None:
    """The output and the result of the other run must not count as its own."""
    world = limited(running=1)
    world.create()
    world.create()
    world.executor.used = {2}
    world.executor.run(1).end(0)
    found = world.find(2)
    assert (found.status, found.started_at) == (Status.LOST, None)
    assert "another run" in (found.reason or "")
    assert [run.task_id for run in world.executor.runs] == [1]


class Life(RuleBasedStateMachine):
    """Users and processes act in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.world = limited(running=2, per_target=1, queued=3)
        self.started: list[int] = []
        self.ends: dict[int, TaskSnapshot] = {}

    def _runs(self, fits: Callable[[int], bool]) -> list[int]:
        return [i for i, run in enumerate(self.world.executor.runs) if fits(i) and run.sink]

    @rule(app=st.sampled_from(["a", "b"]))
    def create(self, app: str) -> None:
        made = Deferred.fromCoroutine(self.world.service.create(evolve(SPEC, app=app)))
        made.addErrback(lambda failure: failure.trap(QueueFull))

    @rule(pick=st.integers(0, 20), code=st.integers(0, 2))
    def end(self, pick: int, code: int) -> None:
        runs = self._runs(lambda _: True)
        if runs:
            run = self.world.executor.runs[runs[pick % len(runs)]]
            run.start()
            run.end(code)

    @rule(number=st.integers(1, 10))
    def kill(self, number: int) -> None:
        killed = Deferred.fromCoroutine(self.world.service.kill(number, BOB))
        killed.addErrback(lambda failure: failure.trap(UnknownTask))

    @rule()
    def turn(self) -> None:
        self.world.clock.advance(1)

    @rule()
    def restart(self) -> None:
        self._remember()
        for run in self.world.executor.runs:
            run.sink = None
        self.world.restart()

    def _remember(self) -> None:
        self.started += [r.task_id for r in self.world.executor.runs if not r.adopted]

    @invariant()
    def no_task_is_started_twice(self) -> None:
        now = [r.task_id for r in self.world.executor.runs if not r.adopted]
        assert len({*self.started, *now}) == len(self.started) + len(now)

    @invariant()
    def limits_hold(self) -> None:
        rows = self.world.store.rows.values()
        running = [row.spec.target for row in rows if row.status is Status.RUNNING]
        assert len(running) <= 2
        assert len(set(running)) == len(running)

    @invariant()
    def an_end_is_for_ever(self) -> None:
        for number, row in self.world.store.rows.items():
            if number in self.ends:
                assert self.ends[number] == row
            elif row.status.ended:
                self.ends[number] = row


TestLife = Life.TestCase
TestLife.settings = hypothesis_settings(
    max_examples=needs.trials(15, 60), stateful_step_count=30, deadline=None
)


def test_a_task_that_the_disk_cannot_keep_is_refused(world: World) -> None:
    """It leaves no record, and the next one is accepted when there is room."""
    world.executor.full = True
    refused = CASE.failureResultOf(Deferred.fromCoroutine(world.service.create(SPEC)))
    assert refused.check(StoreUnavailable)
    assert world.store.rows == {}
    world.executor.full = False
    task = world.create()
    world.executor.run(1).start()
    assert task.snapshot.status is Status.RUNNING


def test_a_waiting_task_starts_when_there_is_room_on_the_disk() -> None:
    """An accepted task does not fail because of a full disk. It names the disk."""
    world = limited(running=1)
    world.create()
    waiting = world.create()
    world.executor.full = True
    world.executor.run(1).end(0)
    world.clock.advance(RETRY)
    snapshot = waiting.snapshot
    assert (snapshot.status, snapshot.waiting_for) == (
        Status.CREATED,
        "the disk: the fake is full",
    )
    assert len(world.executor.runs) == 1
    world.executor.full = False
    world.clock.advance(RETRY)
    world.executor.run(2).start()
    assert (waiting.snapshot.status, waiting.snapshot.waiting_for) == (Status.RUNNING, None)


def test_a_task_that_waits_for_the_disk_can_be_killed() -> None:
    """It never starts."""
    world = limited(running=1)
    world.create()
    world.create()
    world.executor.full = True
    world.executor.run(1).end(0)
    world.kill(2)
    world.clock.advance(RETRY)
    snapshot = world.find(2)
    assert snapshot.status is Status.KILLED
    assert snapshot.reason == "Killed by bob before it started."
    world.executor.full = False
    world.clock.advance(RETRY)
    assert len(world.executor.runs) == 1


def test_a_stop_does_not_wait_for_the_disk() -> None:
    """A task that waits for space goes back to the queue."""
    world = limited(running=1)
    world.create()
    world.create()
    world.executor.full = True
    world.executor.run(1).end(0)
    stopped = Deferred.fromCoroutine(world.service.stop(0))
    world.clock.advance(RETRY)
    CASE.successResultOf(stopped)
    assert world.store.rows[2].status is Status.CREATED


def test_a_client_that_goes_away_does_not_stop_its_task(world: World) -> None:
    """A task starts even if no client waits for its creation."""
    world.store.slow = True
    asked = Deferred.fromCoroutine(world.service.create(SPEC, "k"))
    asked.addErrback(lambda _: None)
    asked.cancel()
    world.store.finish()  # the record
    world.store.finish()  # of the start
    world.executor.run(1).start()
    assert world.find(1).status is Status.RUNNING
    world.store.slow = False
    again = CASE.successResultOf(Deferred.fromCoroutine(world.service.create(SPEC, "k")))
    assert again.snapshot.id == 1
    assert len(world.executor.runs) == 1


def test_a_client_that_goes_away_does_not_hide_a_refusal(world: World) -> None:
    """A refusal without a client is not an error of the daemon."""
    world.store.slow = True
    asked = Deferred.fromCoroutine(world.service.create(SPEC))
    asked.addErrback(lambda _: None)
    asked.cancel()
    pending, world.store._pending = world.store._pending, []
    pending[0].errback(StoreUnavailable("the fake is broken"))
    world.store.slow = False
    world.create(OTHER)


def test_a_client_that_goes_away_does_not_stop_its_kill() -> None:
    """A waiting task ends, and leaves its place to others."""
    world = limited(running=1)
    world.create()
    waiting = world.create()
    world.store.slow = True
    asked = Deferred.fromCoroutine(world.service.kill(2, BOB))
    asked.addErrback(lambda _: None)
    asked.cancel()
    world.store.finish()
    assert waiting.snapshot.status is Status.KILLED
    world.store.slow = False
    world.executor.run(1).end(0)
    CASE.successResultOf(Deferred.fromCoroutine(world.service.stop(0)))


@pytest.mark.parametrize("running", [1, 2])
def test_a_second_kill_is_answered_when_the_first_is_on_record(running: int) -> None:
    """Otherwise the daemon could die with neither kill on record."""
    world = limited(running=running)
    world.create()
    world.create()
    world.executor.runs[-1].deaf = True
    world.store.slow = True
    first = Deferred.fromCoroutine(world.service.kill(2, BOB))
    second = Deferred.fromCoroutine(world.service.kill(2, person("alice")))
    if running == 2:
        world.executor.run(2).start()  # announces what is not on record yet
    CASE.assertNoResult(second)
    world.store.finish()
    assert CASE.successResultOf(second) is CASE.successResultOf(first)
    assert world.store.rows[2].killed_by == BOB


def test_a_second_kill_does_not_outlast_the_daemon() -> None:
    """It fails when the first kill is left to the next daemon."""
    world = limited(running=1)
    world.create()
    world.create()
    world.store.slow = True
    kills = [
        Deferred.fromCoroutine(world.service.kill(2, by)) for by in (BOB, person("al"))
    ]
    stopped = Deferred.fromCoroutine(world.service.stop(0))
    world.clock.advance(LEAVE)
    CASE.successResultOf(stopped)
    world.service.release()
    CASE.failureResultOf(kills[1], ShuttingDown)
    kills[0].addErrback(lambda _: None)
    world.store.finish()


def test_a_kill_of_a_waiting_task_survives_a_restart() -> None:
    """The kill was answered, so the task never starts."""
    world = limited(running=1)
    world.create()
    world.create()
    row = world.store.rows[2]
    world.store.rows[2] = evolve(row, killed_by=BOB, revision=row.revision + 1)
    world.restart()
    assert world.find(2).status is Status.KILLED
    world.executor.run(1).end(0)
    assert [run.task_id for run in world.executor.runs] == [1]


def test_a_kill_while_the_end_is_recorded_changes_nothing(world: World) -> None:
    """An end is final."""
    task = world.create()
    world.executor.run(1).start()
    world.store.slow = True
    world.executor.run(1).end(0)
    CASE.successResultOf(Deferred.fromCoroutine(world.service.kill(1, BOB)))
    world.store.finish()
    found = task.snapshot
    assert (found.status, found.killed_by, found.reason) == (Status.FINISHED, None, None)


def test_output_that_comes_during_a_record_is_not_taken_back(world: World) -> None:
    """Neither the size nor the version ever falls."""
    task = world.create()
    run = world.executor.run(1)
    run.start()
    run.sink.printed(100)  # type: ignore[union-attr]
    run.deaf = True
    world.store.slow = True
    asked = Deferred.fromCoroutine(world.service.kill(1, BOB))
    run.sink.printed(5000)  # type: ignore[union-attr]
    world.clock.advance(1)
    before = task.snapshot.version
    world.store.finish()
    CASE.successResultOf(asked)
    assert task.snapshot.output_size == 5000
    assert task.snapshot.version > before


def test_a_task_can_be_found_before_its_creation_is_answered(world: World) -> None:
    """Its record is on disk, but its creator has no response yet."""
    world.store.slow = True
    made = Deferred.fromCoroutine(world.service.create(SPEC))
    found = Deferred.fromCoroutine(world.service.find(1))
    CASE.assertNoResult(found)
    world.store.finish()
    world.store.finish()
    assert CASE.successResultOf(found) is CASE.successResultOf(made)


@define(eq=False)
class LateStore(MemoryStore):
    """A store whose results come late, with the state from the time of the call."""

    late: list[Callable[[], object]] = field(factory=list)

    def _later(self, answer: Deferred[Any]) -> Deferred[Any]:
        found: Deferred[Any] = Deferred()
        self.late.append(lambda: answer.chainDeferred(found))
        return found

    def load(self, task_id: int) -> Deferred[TaskSnapshot]:
        return self._later(super().load(task_id))

    def select(self, query: TaskQuery) -> Deferred[list[TaskSnapshot]]:
        return self._later(super().select(query))

    def answer(self) -> None:
        """Fire the pending results."""
        late, self.late = self.late, []
        for one in late:
            one()


@pytest.mark.parametrize("how", ["find", "list"])
def test_a_task_that_ends_during_a_look_up_is_shown_as_ended(how: str) -> None:
    """Otherwise its version would fall, and waiters for its end would wait for ever."""
    world = World()
    task = world.create()
    row = world.store.rows[1]
    late = LateStore(rows=world.store.rows)
    world.service._store = late
    # As if a POST that has no response yet had created it.
    live = world.service._queue.active.pop(1)
    found: Deferred[Any] = Deferred.fromCoroutine(
        world.service.find(1) if how == "find" else world.service.list(TaskQuery())
    )
    world.service._queue.active[1] = live
    world.executor.run(1).end(0)
    assert task.snapshot.status is Status.FINISHED
    late.answer()
    late.answer()
    result = CASE.successResultOf(found)
    snapshot = result.snapshot if how == "find" else result[0]
    assert row.status is not Status.FINISHED
    assert snapshot == task.snapshot


HIDDEN = evolve(SPEC, variables={"password": "s3cret", "branch": "main"})


def test_secrets_reach_the_command_but_no_record(world: World) -> None:
    """The record has a mask and the command has the value, which is then removed."""
    task = world.create(HIDDEN)
    assert task.snapshot.spec.variables == {"password": "***", "branch": "main"}
    assert "s3cret" not in repr(world.store.rows[1])
    command = world.executor.run(1).command
    assert command is not None
    assert command.environment["PULSAR_VAR_password"] == "s3cret"
    assert b"s3cret" in command.secrets
    world.executor.run(1).end(0)
    assert world.executor.kept_secrets == {}


def test_task_notes_that_a_secret_is_not_masked() -> None:
    """The note is in the task, even after a restart."""
    world = limited(running=1)
    world.create(SPEC)
    task = world.create(evolve(SPEC, variables={"password": "true"}))
    (note,) = task.snapshot.notes
    assert note.startswith("variables.password: a common word")
    world.restart()
    assert world.find(2).notes == (note,)


def test_a_task_that_waits_gets_its_secrets_after_a_restart() -> None:
    """They are kept while it waits. If they are lost, it fails and gives the reason."""
    world = limited(running=1)
    for spec in (SPEC, HIDDEN, HIDDEN):
        world.create(spec)
    names = [world.store.rows[number].secret_file for number in (2, 3)]
    assert list(world.secrets) == names
    world.secrets["of nobody"] = {}
    world.restart()
    assert list(world.secrets) == names
    del world.secrets[names[1] or ""]
    world.executor.run(1).end(0)
    command = world.executor.run(2).command
    assert command is not None
    assert command.environment["PULSAR_VAR_password"] == "s3cret"
    world.executor.run(2).end(0)
    found = world.find(3)
    assert (found.status, found.started_at) == (Status.FAILED, None)
    assert found.reason == "Cannot start: the values of its secret variables are gone."


def test_secrets_of_a_task_killed_while_it_waits_are_removed() -> None:
    """Secrets of other tasks stay."""
    world = limited(running=1)
    for spec in (SPEC, HIDDEN, HIDDEN):
        world.create(spec)
    world.kill(2)
    assert list(world.secrets) == [world.store.rows[3].secret_file]


def test_a_task_waits_for_secrets_that_cannot_be_read_yet() -> None:
    """It waits for them as it waits for space on the disk."""
    world = limited(running=1)
    for spec in (SPEC, HIDDEN):
        world.create(spec)
    world.executor.full = True
    world.executor.run(1).end(0)
    assert [run.task_id for run in world.executor.runs] == [1]
    world.executor.full = False
    world.clock.advance(RETRY)
    assert [run.task_id for run in world.executor.runs] == [1, 2]


def test_a_task_whose_secrets_cannot_be_kept_is_refused(world: World) -> None:
    """It leaves no record, and a retry can succeed."""
    world.executor.forgetful = True
    refused = Deferred.fromCoroutine(world.service.create(HIDDEN, "k"))
    CASE.failureResultOf(refused, StoreUnavailable)
    assert world.store.rows == {}
    world.executor.forgetful = False
    made = Deferred.fromCoroutine(world.service.create(HIDDEN, "k"))
    assert CASE.successResultOf(made).snapshot.status is Status.CREATED


def test_secrets_of_a_task_that_could_not_be_recorded_are_removed(world: World) -> None:
    """No task needs them."""
    world.store.broken = True
    refused = Deferred.fromCoroutine(world.service.create(HIDDEN))
    CASE.failureResultOf(refused, StoreUnavailable)
    assert world.secrets == {}


def test_a_retry_brings_secrets_that_are_lost() -> None:
    """The task still waits, and the secrets of the first request are gone."""
    world = limited(running=1)
    world.create()

    def post() -> TaskSnapshot:
        made = Deferred.fromCoroutine(world.service.create(HIDDEN, "k"))
        return CASE.successResultOf(made).snapshot

    assert post().id == 2
    world.secrets.clear()
    assert post().id == 2
    world.executor.run(1).end(0)
    command = world.executor.run(2).command
    assert command is not None
    assert command.environment["PULSAR_VAR_password"] == "s3cret"
    world.executor.run(2).start()
    assert post().status is Status.RUNNING


def test_secrets_of_a_retry_that_comes_too_late_are_removed() -> None:
    """The task is killed while the daemon writes them."""
    world = limited(running=1)
    world.create()
    CASE.successResultOf(Deferred.fromCoroutine(world.service.create(HIDDEN, "k")))
    world.secrets.clear()
    world.executor.slow = []
    retry = Deferred.fromCoroutine(world.service.create(HIDDEN, "k"))
    world.kill(2)
    for written in world.executor.slow:
        written.callback(None)
    assert CASE.successResultOf(retry).snapshot.status is Status.KILLED
    assert world.secrets == {}


def test_secrets_left_by_a_dead_daemon_are_removed_at_the_start() -> None:
    """It died before it removed them, or a power cut undid the removal."""
    world = limited(running=1)
    for spec in (HIDDEN, HIDDEN, HIDDEN):
        world.create(spec)
    world.executor.run(1).end(0)
    world.executor.forgotten.clear()
    world.restart()
    # The shim of 2 still needs its secrets, and 3 waits.
    assert world.executor.forgotten == {1}
    # A restored database does not know 4, which had secrets.
    world.restart_with({1, 2, 3, 4})
    assert world.executor.forgotten == {1, 4}
    assert world.executor.folders == {1, 2, 3, 4}


def test_no_version_falls_if_the_output_is_lost(world: World) -> None:
    """Somebody has removed its folder, but the announced size still counts."""
    world.create()
    run = world.executor.run(1)
    run.start()
    for size in (7, 14):  # the task holds the second one back for a moment
        assert run.sink is not None
        run.sink.printed(size)
    before = world.find(1).version
    world.store.slow = True
    run.end(error="no folder", lost=True)
    world.clock.advance(COALESCE)
    before = max(before, world.find(1).version)
    world.store.finish()
    world.restart()
    assert world.find(1).version > before
