"""Tests of the queue: which tasks start and which wait, without time or processes."""

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.task import Clock

from pulsar_api.errors import QueueFull
from pulsar_api.tasks.interfaces import Bounds
from pulsar_api.tasks.live import LiveTask, Phase, Task
from pulsar_api.tasks.model import Process, TaskSnapshot, TaskSpec
from pulsar_api.tasks.queue import Limits, Queue
from tests.fakes import person


def queue(running: int = 16, per_target: int = 0, queued: int = 1000) -> Queue:
    """Return an empty queue with limits."""
    return Queue(Limits(Bounds(10), running, per_target, queued))


def waiting(queue: Queue, number: int, app: str = "site", user: str = "joe") -> LiveTask:
    """Return a task that waits in a queue."""
    spec = TaskSpec(app, "production", "deploy", user=person(user))
    snapshot = TaskSnapshot(number, spec, 0.0)
    live = LiveTask(Task(Clock(), snapshot), snapshot, lambda *_: None)
    queue.move(live, Phase.WAITING)
    return live


def test_tasks_start_in_the_order_of_their_creation() -> None:
    """The limit counts. Each of the others learns its reason to wait, once."""
    tasks = queue(running=2)
    first, second, third = (waiting(tasks, n) for n in (1, 2, 3))
    choice = tasks.choose()
    assert choice.start == [first, second]
    assert choice.wait == [(third, "a free place: 2 tasks are running")]
    third.waits_for(choice.wait[0][1])
    assert tasks.choose() == type(choice)([], [])
    tasks.move(first, Phase.ENDED)
    assert tasks.choose().start == [third]


def test_a_busy_target_holds_up_no_other_target() -> None:
    """Not even if its tasks are the oldest."""
    tasks = queue(per_target=1)
    first, second = waiting(tasks, 1, "site"), waiting(tasks, 2, "site")
    other = waiting(tasks, 3, "shop")
    choice = tasks.choose()
    assert choice.start == [first, other]
    assert choice.wait == [(second, "the end of another task on site/production")]


def test_a_process_of_an_ended_task_holds_its_target() -> None:
    """The waiting task names the processes."""
    tasks = queue(per_target=1)
    first, second = waiting(tasks, 1), waiting(tasks, 2)
    tasks.move(first, Phase.HOLDING)
    first.newest = evolve(first.newest, still_running=(Process(7, 1, "sleep", "joe"),))
    why = "task 1, of which these still run: 7 sleep (joe)"
    assert tasks.choose().wait == [(second, why)]
    tasks.move(first, Phase.ENDED)
    assert tasks.choose().start == [second]


@pytest.mark.parametrize("phase", list(Phase))
def test_a_task_is_in_one_place(phase: Phase) -> None:
    """Its earlier phase does not matter."""
    for before in Phase:
        tasks = queue()
        live = waiting(tasks, 1)
        tasks.move(live, before)
        tasks.move(live, phase)
        places = (tasks.waiting, tasks.active, tasks.holding)
        assert sum(1 in place for place in places) == (phase is not Phase.ENDED)
        assert tasks.find(1) is (None if phase is Phase.ENDED else live)


def test_a_full_queue_takes_a_task_that_can_start_at_once() -> None:
    """The limit is for tasks that wait."""
    tasks = queue(running=1, queued=1)
    waiting(tasks, 1)
    spec = TaskSpec("site", "production", "deploy")
    tasks.check_room(spec)
    tasks.choose()
    waiting(tasks, 2)
    with pytest.raises(QueueFull):
        tasks.check_room(spec)


def test_one_principal_fills_half_of_the_queue() -> None:
    """Requests whose record is being written count too."""
    tasks = queue(running=1, queued=4)
    waiting(tasks, 1)
    tasks.choose()
    waiting(tasks, 2)
    mine = TaskSpec("site", "production", "deploy", user=person("joe"))
    tasks.creating.append(mine)
    with pytest.raises(QueueFull) as refused:
        tasks.check_room(mine)
    assert refused.value.whose == "joe"
    tasks.check_room(evolve(mine, user=person("alice")))


@given(
    st.lists(st.sampled_from(["site", "shop", "blog"]), max_size=12),
    st.integers(1, 5),
    st.integers(0, 3),
    st.data(),
)
def test_limits_hold_in_whatever_order_tasks_end(
    apps: list[str], running: int, per_target: int, data: st.DataObject
) -> None:
    """Every task starts in the end, and those of one target start in order."""
    tasks = queue(running, per_target)
    for number, app in enumerate(apps, 1):
        waiting(tasks, number, app)
    started: list[LiveTask] = []
    while tasks.waiting or tasks.active:
        started += tasks.choose().start
        active = list(tasks.active.values())
        assert 0 < len(active) <= running
        targets = [live.target for live in active]
        assert not per_target or max(map(targets.count, targets)) <= per_target
        tasks.move(data.draw(st.sampled_from(active)), Phase.ENDED)
    assert len(started) == len(apps)
    for app in set(apps):
        numbers = [live.id for live in started if live.newest.spec.app == app]
        assert numbers == sorted(numbers)
