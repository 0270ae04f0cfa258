"""Tests of the life of tasks: queue, limits, kill, end, restart; time stands still."""

from collections.abc import Callable

import pytest
from attrs import define, evolve, field
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from pulsar_api.command import Commands, parse_template
from pulsar_api.errors import (
    InvalidInput,
    KeyInFlight,
    KeyReused,
    QueueFull,
    ShuttingDown,
    StoreUnavailable,
    UnknownTask,
)
from pulsar_api.ports import Bounds, Keep
from pulsar_api.retention import TIDY
from pulsar_api.service import MAX_ID, RETRY, Limits, TaskService
from pulsar_api.task import KEY_LIFE, Cause, Status, Task, TaskQuery, TaskSnapshot, TaskSpec
from tests.fakes import FakeExecutor, MemoryStore

CASE = SynchronousTestCase()
SPEC = TaskSpec("site", "production", "deploy")
OTHER = TaskSpec("shop", "production", "deploy")


@define
class World:
    """A service with everything it needs, none of it real."""

    limits: Limits = field(factory=lambda: Limits(Bounds(10)))
    clock: Clock = field(factory=Clock)
    store: MemoryStore = field(factory=MemoryStore)
    template: str = "deploy {app} {env} {action}"
    executor: FakeExecutor = field(init=False)
    service: TaskService = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin again with what the store holds, as a new daemon does."""
        self.restart_with(set(self.store.rows))

    def restart_with(self, folders: set[int]) -> None:
        """Begin again where so many runs have left a folder."""
        for call in self.clock.getDelayedCalls():
            call.cancel()
        self.executor = FakeExecutor(self.clock, folders=folders)
        commands = Commands(parse_template(self.template), {})

        async def give() -> Commands:
            return commands

        self.service = TaskService(
            self.store, self.executor, self.clock, self.clock.seconds, give, self.limits
        )
        CASE.successResultOf(Deferred.fromCoroutine(self.service.start()))

    def create(self, spec: TaskSpec = SPEC) -> Task:
        return CASE.successResultOf(Deferred.fromCoroutine(self.service.create(spec)))

    def kill(self, task_id: int, by: str = "bob") -> Task:
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
    """Each step is announced when it is on disk."""
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
        ({"code": 0, "cause": Cause.KILL}, "killed", "a signal from outside"),
        ({"code": 0, "good": False}, "failed", "exit code is 0"),
    ],
)
def test_how_a_run_ended_decides_the_state(
    world: World, end: dict[str, object], status: str, reason: str | None
) -> None:
    """And where the exit code does not say it, there is a sentence."""
    task = world.create()
    world.executor.run(1).start()
    world.executor.run(1).end(**end)  # type: ignore[arg-type]
    assert task.snapshot.status == status
    assert (reason is None) == (task.snapshot.reason is None)
    assert reason is None or reason in (task.snapshot.reason or "")


def test_a_kill_names_who_asked(world: World) -> None:
    """The state is killed whatever the exit code, and a second kill asks nothing."""
    task = world.create()
    run = world.executor.run(1)
    run.start()
    assert world.kill(1, "alice") is task
    assert "alice" in (task.snapshot.reason or "")
    assert task.snapshot.status is Status.RUNNING
    world.kill(1, "bob")
    assert run.kills == 1
    world.clock.advance(0)
    assert world.find(1).status is Status.KILLED
    assert task.snapshot.reason == "Killed by alice."


def test_a_kill_of_an_ended_task_changes_nothing(world: World) -> None:
    """It answers with the task as it is."""
    task = world.create()
    world.executor.run(1).end(0)
    assert world.kill(1).snapshot == task.snapshot


def test_a_waiting_task_can_be_killed(world: World) -> None:
    """It never starts."""
    world = limited(running=1)
    world.create()
    waiting = world.create()
    world.kill(2, "alice")
    assert waiting.snapshot.status is Status.KILLED
    assert waiting.snapshot.reason == "Killed by alice before it started."
    world.executor.run(1).end(0)
    assert [run.task_id for run in world.executor.runs] == [1]


def test_a_kill_between_the_record_and_the_process_starts_nothing(world: World) -> None:
    """The start sees it and does not happen."""
    made = Deferred.fromCoroutine(world.service.create(SPEC))
    task = CASE.successResultOf(made)
    world.executor.run(1).end(0)
    world.store.slow = True
    made = Deferred.fromCoroutine(world.service.create(SPEC))
    world.store.finish()
    task = CASE.successResultOf(made)
    killed = Deferred.fromCoroutine(world.service.kill(2, "alice"))
    while not killed.called:
        world.store.finish()
    world.store.slow = False
    world.store.finish()
    assert len(world.executor.runs) == 1
    assert task.snapshot.status is Status.KILLED
    assert task.snapshot.started_at is None


def test_unknown_tasks_are_an_error(world: World) -> None:
    """Also numbers that no database can hold."""
    for number in (5, 0, MAX_ID + 1):
        CASE.failureResultOf(
            Deferred.fromCoroutine(world.service.find(number)), UnknownTask
        )
    CASE.failureResultOf(Deferred.fromCoroutine(world.service.kill(7, "bob")), UnknownTask)


def test_more_than_may_run_wait_in_order() -> None:
    """And say what they wait for."""
    world = limited(running=2)
    tasks = [world.create() for _ in range(4)]
    assert [run.task_id for run in world.executor.runs] == [1, 2]
    assert "2 tasks are running" in (tasks[2].snapshot.waiting_for or "")
    world.executor.run(2).end(0)
    assert [run.task_id for run in world.executor.runs] == [1, 2, 3]
    world.executor.run(3).start()
    assert tasks[2].snapshot.waiting_for is None


def test_a_blocked_target_holds_up_nobody_else() -> None:
    """First come first served is per app and env."""
    world = limited(per_target=1)
    world.create()
    second = world.create()
    world.create(OTHER)
    assert [run.task_id for run in world.executor.runs] == [1, 3]
    assert second.snapshot.waiting_for == "the end of another task on site/production"
    world.executor.run(1).end(1)
    assert world.executor.runs[-1].task_id == 2


def test_a_full_queue_is_said() -> None:
    """Nothing is recorded then."""
    world = limited(running=1, queued=1)
    world.create()
    world.create()
    refused = Deferred.fromCoroutine(world.service.create(SPEC))
    assert CASE.failureResultOf(refused, QueueFull).value.limit == 1
    assert len(world.store.rows) == 2


def test_without_a_queue_only_what_can_start_is_taken() -> None:
    """Who would have to wait is refused, also for the target's sake."""
    world = limited(running=2, per_target=1, queued=0)
    world.create()
    CASE.failureResultOf(Deferred.fromCoroutine(world.service.create(SPEC)), QueueFull)
    world.create(OTHER)
    third = evolve(SPEC, app="third")
    CASE.failureResultOf(Deferred.fromCoroutine(world.service.create(third)), QueueFull)


def test_what_the_command_cannot_carry_is_refused(world: World) -> None:
    """Before anything is recorded."""
    bad = evolve(SPEC, app="--conf-repo=x")
    CASE.failureResultOf(Deferred.fromCoroutine(world.service.create(bad)), InvalidInput)
    assert world.store.rows == {}


def test_lists_show_the_present_state(world: World) -> None:
    """Also what is not in the database yet."""
    world.create()
    world.executor.run(1).start(pid=5)
    world.executor.run(1).sink.printed(10)  # type: ignore[union-attr]
    found = world.list(TaskQuery())
    assert [(task.pid, task.output_size) for task in found] == [(5, 10)]
    world.executor.run(1).end(0)


def test_news_of_new_tasks_can_be_followed_from_any_number(world: World) -> None:
    """The oldest newer one each time, so that a burst is seen whole."""
    assert world.service.created.version == 0
    for _ in range(3):
        world.create()
    assert world.service.created.version == 3
    after = [
        CASE.successResultOf(Deferred.fromCoroutine(world.service.next_after(n)))
        for n in range(4)
    ]
    assert [task.id if task else None for task in after] == [1, 2, 3, None]


def test_output_wakes_who_waits(world: World) -> None:
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
    """Nobody is told before it is on disk, and nothing is forgotten."""
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
    """And the next one is taken."""
    world.store.broken = True
    CASE.failureResultOf(
        Deferred.fromCoroutine(world.service.create(SPEC)), StoreUnavailable
    )
    world.store.broken = False
    world.create()


def test_a_new_daemon_takes_up_what_has_not_ended() -> None:
    """Running ones are adopted, waiting ones wait on, in their order, and start once."""
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
    """The new daemon asks again, and still knows for whom."""
    world.create()
    world.executor.run(1).start()
    world.executor.run(1).deaf = True
    world.kill(1, "alice")
    world.restart()
    world.clock.advance(0)
    assert world.find(1).reason == "Killed by alice."


def test_a_waiting_task_that_new_settings_forbid_fails_with_a_reason() -> None:
    """It is not run in another way than it was asked for."""
    world = limited(running=1)
    world.create()
    world.create(evolve(SPEC, variables={"PATH": "x"}))
    world.template = "pulsar-1"
    world.restart()
    world.executor.run(1).end(0)
    assert world.find(2).status is Status.FAILED
    assert "PATH" in (world.find(2).reason or "")


def test_a_stopping_daemon_takes_no_new_tasks_and_leaves_the_running(
    world: World,
) -> None:
    """What runs runs on; nobody is told of it any more."""
    world.create()
    world.executor.run(1).start()
    stopped = Deferred.fromCoroutine(world.service.stop(0))
    CASE.successResultOf(stopped)
    assert world.executor.run(1).sink is None
    assert world.executor.run(1).kills == 0
    CASE.failureResultOf(Deferred.fromCoroutine(world.service.create(SPEC)), ShuttingDown)
    assert world.store.rows[1].status is Status.RUNNING


def test_a_stopping_daemon_can_wait_for_the_running() -> None:
    """As long as it was told to, and starts nothing of what waits."""
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


def test_a_stopping_daemon_does_not_wait_for_ever(world: World) -> None:
    """After the drain time-out it ends, and the task runs on."""
    world.create()
    stopped = Deferred.fromCoroutine(world.service.stop(100))
    world.clock.advance(100)
    CASE.successResultOf(stopped)
    assert world.executor.run(1).sink is None


def test_a_stop_between_the_record_and_the_process_puts_it_back(world: World) -> None:
    """The next daemon starts it; this one has not."""
    world.store.slow = True
    made = Deferred.fromCoroutine(world.service.create(SPEC))
    world.store.finish()
    CASE.successResultOf(made)
    stopped = Deferred.fromCoroutine(world.service.stop(0))
    CASE.assertNoResult(stopped)
    world.store.finish()
    world.store.finish()
    CASE.successResultOf(stopped)
    assert world.executor.runs == []
    assert world.store.rows[1].status is Status.CREATED


def test_who_waits_is_let_go_at_the_end(world: World) -> None:
    """Long-polls on tasks and on news of tasks are answered."""
    task = world.create()
    waiting = [
        task.changes.after(task.changes.version),
        task.end.after(0),
        world.service.created.after(1),
    ]
    world.service.release()
    assert all(one.called for one in waiting)


def test_the_same_key_starts_nothing_again(world: World) -> None:
    """The first answer is given again, also when the task has ended."""

    def create(key: str) -> Task:
        return CASE.successResultOf(Deferred.fromCoroutine(world.service.create(SPEC, key)))

    first = create("k1")
    assert create("k1") is first
    world.executor.run(1).end(0)
    assert create("k1").snapshot == first.snapshot
    assert create("k2").snapshot.id == 2
    assert len(world.executor.runs) == 2


def test_a_key_counts_for_a_day(world: World) -> None:
    """After that it is a new one."""
    CASE.successResultOf(Deferred.fromCoroutine(world.service.create(SPEC, "k")))
    world.executor.run(1).end(0)
    world.clock.pump([TIDY] * int(KEY_LIFE / TIDY + 1))
    again = Deferred.fromCoroutine(world.service.create(SPEC, "k"))
    assert CASE.successResultOf(again).snapshot.id == 2


def test_a_key_with_another_task_is_refused(world: World) -> None:
    """Whoever mixes up keys must not believe that something was started."""
    CASE.successResultOf(Deferred.fromCoroutine(world.service.create(SPEC, "k")))
    other = Deferred.fromCoroutine(world.service.create(OTHER, "k"))
    CASE.failureResultOf(other, KeyReused)
    assert len(world.store.rows) == 1


def test_a_key_whose_first_request_is_under_way_is_refused(world: World) -> None:
    """Nobody knows yet whether it will be a task."""
    world.store.slow = True
    first = Deferred.fromCoroutine(world.service.create(SPEC, "k"))
    CASE.failureResultOf(
        Deferred.fromCoroutine(world.service.create(SPEC, "k")), KeyInFlight
    )
    world.store.slow = False
    world.store.finish()
    assert CASE.successResultOf(first).snapshot.id == 1


def keeping(keep: Keep) -> World:
    """Return a world that keeps so much of the past."""
    return World(Limits(Bounds(10), keep=keep))


def ended(world: World, count: int, size: int = 0, index: int = 0) -> None:
    """Let so many tasks run and end."""
    for _ in range(count):
        task = world.create()
        run = world.executor.run(task.snapshot.id)
        run.end(0, output_size=size, index_size=index)


def test_old_tasks_go_with_their_output_and_running_ones_stay() -> None:
    """The newest are kept; what has not ended is never touched."""
    world = keeping(Keep(tasks=3))
    running = world.create()
    ended(world, 50)
    world.clock.advance(TIDY)
    assert list(world.store.rows) == [1, 49, 50, 51]
    assert world.executor.folders == {1, 49, 50, 51}
    assert running.snapshot.status is Status.CREATED


def test_tasks_go_by_age_and_by_size() -> None:
    """Whichever bound is reached first."""
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


def test_what_was_cut_out_of_an_output_takes_no_room() -> None:
    """A huge output counts as what is kept of it."""
    world = keeping(Keep(size=25, most=5))
    ended(world, 6, size=10)
    world.clock.advance(TIDY)
    assert list(world.store.rows) == [2, 3, 4, 5, 6]


def test_the_index_of_an_output_takes_room_as_well() -> None:
    """A task that printed byte by byte has more of it than of output."""
    world = keeping(Keep(size=50, most=5))
    ended(world, 6, size=10, index=20)
    world.clock.advance(TIDY)
    assert list(world.store.rows) == [5, 6]


def test_a_task_is_kept_as_long_as_its_key_counts() -> None:
    """Else a retry would start it a second time."""
    world = keeping(Keep(tasks=1))
    made = Deferred.fromCoroutine(world.service.create(SPEC, "k"))
    CASE.successResultOf(made)
    world.executor.run(1).end(0)
    ended(world, 3)
    world.clock.advance(TIDY)
    assert list(world.store.rows) == [1, 4]


def test_a_store_that_is_broken_is_tidied_later() -> None:
    """Nothing of a task is removed before its record is."""
    world = keeping(Keep(tasks=1))
    ended(world, 3)
    world.store.broken = True
    world.clock.advance(TIDY)
    assert world.executor.folders == {1, 2, 3}
    world.store.broken = False
    world.clock.advance(TIDY)
    assert world.executor.folders == {3}


def test_what_a_dead_daemon_has_half_removed_is_removed_at_the_start(
    world: World,
) -> None:
    """A record is gone, its output is not."""
    ended(world, 2)
    del world.store.rows[1]
    world.executor.folders = {1, 2}
    world.restart_with(world.executor.folders)
    assert world.executor.folders == {2}


def test_a_task_that_was_never_started_waits_again_in_its_place() -> None:
    """A daemon died between the record of the start and the start; no one is skipped."""
    world = limited(running=1)
    first = world.create()
    world.create()
    world.restart()
    world.executor.run(1).end(error="never", unstarted=True)
    runs = [(run.task_id, run.adopted) for run in world.executor.runs]
    assert runs == [(1, True), (1, False)]
    world.executor.run(1).start()
    world.executor.run(1).end(0)
    assert world.find(first.snapshot.id).status is Status.FINISHED
    assert world.executor.runs[-1].task_id == 2


def test_a_task_that_was_never_started_is_left_to_the_next_daemon(world: World) -> None:
    """If this one is stopping; nothing is said of it that is not known."""
    world.create()
    world.restart()
    Deferred.fromCoroutine(world.service.stop(100))
    world.executor.run(1).end(error="never", unstarted=True)
    assert world.store.rows[1].status is Status.RUNNING
    world.clock.advance(100)


def test_a_killed_task_that_was_never_started_does_not_start(world: World) -> None:
    """Somebody did not want it any more."""
    world.create()
    world.executor.run(1).deaf = True
    world.kill(1, "alice")
    world.restart()
    world.executor.run(1).end(error="never", unstarted=True)
    assert world.find(1).reason == "Killed by alice before it started."
    assert world.find(1).status is Status.KILLED
    assert len(world.executor.runs) == 1


def test_what_is_left_is_removed_later_if_the_store_is_broken(world: World) -> None:
    """A start does not fail for that."""
    ended(world, 2)
    del world.store.rows[1]
    world.store.broken = True
    world.restart_with({1, 2})
    assert world.executor.folders == {1, 2}
    world.store.broken = False
    world.restart_with({1, 2})
    assert world.executor.folders == {2}


def test_no_task_gets_the_folder_of_one_that_the_database_does_not_know(
    world: World,
) -> None:
    """Somebody has set a damaged database aside; what is there stays there."""
    world.store = MemoryStore()
    world.restart_with({1, 5})
    assert world.executor.folders == {1, 5}
    assert world.create().snapshot.id == 6


class Life(RuleBasedStateMachine):
    """Any order of what users and processes do."""

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
        killed = Deferred.fromCoroutine(self.world.service.kill(number, "bob"))
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
    max_examples=60, stateful_step_count=30, deadline=None
)


def test_what_could_not_be_kept_is_refused(world: World) -> None:
    """Nothing is recorded, and it works again when there is room."""
    world.executor.full = True
    refused = CASE.failureResultOf(Deferred.fromCoroutine(world.service.create(SPEC)))
    assert refused.check(StoreUnavailable)
    assert world.store.rows == {}
    world.executor.full = False
    task = world.create()
    world.executor.run(1).start()
    assert task.snapshot.status is Status.RUNNING


def test_a_waiting_task_starts_when_there_is_room_on_the_disk() -> None:
    """It was accepted, so it does not fail for that; and it says what it waits for."""
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
    """And is never started."""
    world = limited(running=1)
    world.create()
    world.create()
    world.executor.full = True
    world.executor.run(1).end(0)
    world.kill(2)
    world.clock.advance(RETRY)
    assert world.find(2).status is Status.KILLED
    world.executor.full = False
    world.clock.advance(RETRY)
    assert len(world.executor.runs) == 1


def test_a_stop_does_not_wait_for_the_disk() -> None:
    """A task that waits for room goes back to the queue."""
    world = limited(running=1)
    world.create()
    world.create()
    world.executor.full = True
    world.executor.run(1).end(0)
    stopped = Deferred.fromCoroutine(world.service.stop(0))
    world.clock.advance(RETRY)
    CASE.successResultOf(stopped)
    assert world.store.rows[2].status is Status.CREATED


def test_a_client_that_goes_away_does_not_stop_what_it_asked_for(world: World) -> None:
    """Between the record of a task and its start nobody has to wait for it."""
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
    """A refusal nobody hears is no error of the daemon."""
    world.store.slow = True
    asked = Deferred.fromCoroutine(world.service.create(SPEC))
    asked.addErrback(lambda _: None)
    asked.cancel()
    pending, world.store._pending = world.store._pending, []
    pending[0].errback(StoreUnavailable("the fake is broken"))
    world.store.slow = False
    world.create(OTHER)


def test_a_client_that_goes_away_does_not_stop_its_kill() -> None:
    """Of a task that waits: it ends, and nobody waits for its place."""
    world = limited(running=1)
    world.create()
    waiting = world.create()
    world.store.slow = True
    asked = Deferred.fromCoroutine(world.service.kill(2, "bob"))
    asked.addErrback(lambda _: None)
    asked.cancel()
    world.store.finish()
    assert waiting.snapshot.status is Status.KILLED
    world.store.slow = False
    world.executor.run(1).end(0)
    CASE.successResultOf(Deferred.fromCoroutine(world.service.stop(0)))


def test_a_kill_of_a_waiting_task_survives_a_restart() -> None:
    """It was answered, so the task never starts."""
    world = limited(running=1)
    world.create()
    world.create()
    row = world.store.rows[2]
    world.store.rows[2] = evolve(row, killed_by="bob", revision=row.revision + 1)
    world.restart()
    assert world.find(2).status is Status.KILLED
    world.executor.run(1).end(0)
    assert [run.task_id for run in world.executor.runs] == [1]


def test_a_kill_while_a_task_is_put_back_is_not_forgotten(world: World) -> None:
    """It does not wait for a free place to be ended."""
    world.create()
    world.store.slow = True
    world.executor.run(1).end(error="never began", unstarted=True)
    asked = Deferred.fromCoroutine(world.service.kill(1, "bob"))
    while world.store._pending:
        world.store.finish()
    CASE.successResultOf(asked)
    assert world.find(1).status is Status.KILLED
    assert len(world.executor.runs) == 1


def test_a_kill_while_the_end_is_recorded_changes_nothing(world: World) -> None:
    """What has ended has ended."""
    task = world.create()
    world.executor.run(1).start()
    world.store.slow = True
    world.executor.run(1).end(0)
    CASE.successResultOf(Deferred.fromCoroutine(world.service.kill(1, "bob")))
    world.store.finish()
    found = task.snapshot
    assert (found.status, found.killed_by, found.reason) == (Status.FINISHED, None, None)


def test_output_that_comes_during_a_record_is_not_taken_back(world: World) -> None:
    """Neither the size nor the version ever goes back."""
    task = world.create()
    run = world.executor.run(1)
    run.start()
    run.sink.printed(100)  # type: ignore[union-attr]
    run.deaf = True
    world.store.slow = True
    asked = Deferred.fromCoroutine(world.service.kill(1, "bob"))
    run.sink.printed(5000)  # type: ignore[union-attr]
    world.clock.advance(1)
    before = task.snapshot.version
    world.store.finish()
    CASE.successResultOf(asked)
    assert task.snapshot.output_size == 5000
    assert task.snapshot.version > before


def test_who_is_faster_than_the_answer_gets_the_living_task(world: World) -> None:
    """A task whose record is on disk, and of which its creator does not know yet."""
    world.store.slow = True
    made = Deferred.fromCoroutine(world.service.create(SPEC))
    found = Deferred.fromCoroutine(world.service.find(1))
    CASE.assertNoResult(found)
    world.store.finish()
    world.store.finish()
    assert CASE.successResultOf(found) is CASE.successResultOf(made)


HIDDEN = evolve(SPEC, variables={"password": "s3cret", "branch": "main"})


def test_secrets_go_a_way_of_their_own(world: World) -> None:
    """The record has a mask; the command has the value; in the end nobody has it."""
    task = world.create(HIDDEN)
    assert task.snapshot.spec.variables == {"password": "***", "branch": "main"}
    assert "s3cret" not in repr(world.store.rows[1])
    command = world.executor.run(1).command
    assert command is not None
    assert command.environment["PULSAR_VAR_password"] == "s3cret"
    assert b"s3cret" in command.secrets
    world.executor.run(1).end(0)
    assert world.executor.kept_secrets == {}


def test_a_task_that_waits_gets_its_secrets_after_a_restart() -> None:
    """They are kept as long as it waits; if they are gone it fails, and says so."""
    world = limited(running=1)
    for spec in (SPEC, HIDDEN, HIDDEN):
        world.create(spec)
    kept = {2: {"password": "s3cret"}}
    assert world.executor.kept_secrets == {**kept, 3: kept[2]}
    world.restart()
    world.executor.kept_secrets = dict(kept)
    world.executor.run(1).end(0)
    command = world.executor.run(2).command
    assert command is not None
    assert command.environment["PULSAR_VAR_password"] == "s3cret"
    world.executor.run(2).end(0)
    found = world.find(3)
    assert (found.status, found.started_at) == (Status.FAILED, None)
    assert found.reason == "Cannot start: the values of its secret variables are gone."


def test_secrets_of_one_that_is_killed_while_it_waits_are_removed() -> None:
    """Those of others stay."""
    world = limited(running=1)
    for spec in (SPEC, HIDDEN, HIDDEN):
        world.create(spec)
    world.kill(2)
    assert world.executor.kept_secrets == {3: {"password": "s3cret"}}


def test_secrets_that_cannot_be_read_now_are_waited_for() -> None:
    """As a task waits for room on the disk."""
    world = limited(running=1)
    for spec in (SPEC, HIDDEN):
        world.create(spec)
    world.executor.full = True
    world.executor.run(1).end(0)
    assert [run.task_id for run in world.executor.runs] == [1]
    world.executor.full = False
    world.clock.advance(RETRY)
    assert [run.task_id for run in world.executor.runs] == [1, 2]


def test_a_task_whose_secrets_cannot_be_kept_fails(world: World) -> None:
    """It has a number by then; nothing is started."""
    world.executor.forgetful = True
    found = world.create(HIDDEN).snapshot
    assert found.status is Status.FAILED
    assert found.reason is not None
    assert "could not be kept" in found.reason
    assert world.executor.runs == []
