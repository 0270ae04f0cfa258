"""What is told to the clients of release 0.6, and when; time stands still."""

import json
from pathlib import Path
from typing import Any

import pytest
from attrs import define, field
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from pulsar_api import shim
from pulsar_api.command import Commands, Template
from pulsar_api.ports import Bounds
from pulsar_api.rota import Rota
from pulsar_api.service import Limits, TaskService
from pulsar_api.task import TaskSpec
from pulsar_api.web.feed import EVERY, HELD, Closed, Feed, Subscription
from pulsar_api.web.visit import HEARTBEAT, next_frame
from tests.fakes import FakeExecutor, FakeRun, MemoryStore, steady_clock
from tests.test_lines import Turns
from tests.test_output import printed

CASE = SynchronousTestCase()
SPEC = TaskSpec("site", "production", "deploy")


@define
class FakeRequest:
    """A request that is answered when the test says so."""

    done: Deferred[None] = field(factory=Deferred)

    def notifyFinish(self) -> Deferred[None]:
        return self.done


@define
class World:
    """A feed of a service without processes or disk."""

    folder: Path
    clock: Clock = field(factory=Clock)
    turns: Turns = field(factory=Turns)
    store: MemoryStore = field(factory=MemoryStore)
    executor: FakeExecutor = field(init=False)
    service: TaskService = field(init=False)
    feed: Feed = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.executor = FakeExecutor(self.clock)

        async def commands() -> Commands:
            return Commands(Template(("true",)), {})

        clock, limits = self.clock, Limits(Bounds(10))
        self.service = TaskService(
            self.store, self.executor, clock, steady_clock(clock), commands, limits
        )
        CASE.successResultOf(Deferred.fromCoroutine(self.service.start()))
        self.feed = Feed(self.service, self.folder, clock, Rota(self.turns))

    def create(self) -> FakeRun:
        """Create a task and return its run."""
        made = Deferred.fromCoroutine(self.service.create(SPEC))
        return self.executor.run(CASE.successResultOf(made).snapshot.id)

    def told(self, subscription: Subscription) -> list[str]:
        """Return what there is to tell now: kinds and states."""
        found: list[str] = []
        while True:
            waiting = Deferred.fromCoroutine(subscription.next())
            if not waiting.called:
                waiting.addErrback(lambda _: None)
                waiting.cancel()
                return found
            message: Any = json.loads(CASE.successResultOf(waiting))
            found.append(f"{message['event']} {message['job']['status']}")


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Return a world."""
    return World(tmp_path)


def test_a_job_is_told_from_its_creation_to_its_end(world: World) -> None:
    """Its start is told, and its end at once."""
    subscription = world.feed.subscribe(lambda _: True)
    run = world.create()
    run.start()
    assert world.told(subscription) == ["job.create RUNNING", "job.change RUNNING"]
    run.end(3)
    assert world.told(subscription) == ["job.close FAILED"]
    subscription.close()


def test_what_runs_already_is_told_too(world: World) -> None:
    """Who subscribes late hears of its end."""
    run = world.create()
    run.start()
    subscription = world.feed.subscribe(lambda _: True)
    run.end(0)
    assert world.told(subscription)[-1] == "job.close FINISHED"
    subscription.close()


def test_output_is_news_a_few_times_a_second(world: World) -> None:
    """However often something is printed."""
    subscription = world.feed.subscribe(lambda _: True)
    run = world.create()
    run.start()
    world.told(subscription)
    told = []
    for size in range(1, 1001):
        run.sink.printed(size)  # type: ignore[union-attr]
        world.clock.advance(0.001)
        told += world.told(subscription)
    assert 1 <= len(told) <= 1 / EVERY + 1
    run.end(0)
    assert world.told(subscription) == ["job.close FINISHED"]
    subscription.close()


def test_a_slow_subscriber_hears_the_newest_only(world: World) -> None:
    """What it has not read costs a few words for each job."""
    subscription = world.feed.subscribe(lambda _: True)
    run = world.create()
    run.start()
    for size in range(1, 101):
        run.sink.printed(size)  # type: ignore[union-attr]
        world.clock.advance(1)
    run.end(0)
    kinds = ["job.create", "job.change", "job.close"]
    assert world.told(subscription) == [f"{kind} FINISHED" for kind in kinds]
    subscription.close()


def test_nothing_is_told_before_the_post_is_answered(world: World) -> None:
    """The published client does not know the number before."""
    subscription = world.feed.subscribe(lambda _: True)
    request: Any = FakeRequest()
    world.feed.hold(1, request)
    run = world.create()
    world.feed.hold(1, request)  # a second request for the same task changes nothing
    run.start()
    run.end(0)
    assert world.told(subscription) == ["job.create FINISHED"]
    request.done.callback(None)
    world.clock.advance(HELD / 2)
    assert world.told(subscription) == []
    world.clock.advance(HELD / 2)
    end = ["job.change FINISHED", "job.close FINISHED"]
    assert world.told(subscription) == end
    # A busy client may read that before the answer; so it is said again, twice.
    world.clock.advance(1)
    assert world.told(subscription) == end
    world.clock.advance(4)
    assert world.told(subscription) == end
    world.clock.advance(60)
    assert world.told(subscription) == []
    subscription.close()


def test_nobody_watches_when_nobody_listens(world: World) -> None:
    """With the last subscriber all of it ends."""
    first, second = (
        world.feed.subscribe(lambda _: True),
        world.feed.subscribe(lambda _: True),
    )
    world.create().start()
    before = len(world.clock.getDelayedCalls())
    first.close()
    second.close()
    assert len(world.clock.getDelayedCalls()) < before
    assert world.service.changed.waiting == 0
    third = world.feed.subscribe(lambda _: True)
    world.create()
    assert "job.create CREATED" in world.told(third)
    third.close()


def test_the_end_of_the_daemon_ends_every_subscription(world: World) -> None:
    """Who waits is told."""
    subscription = world.feed.subscribe(lambda _: True)
    waiting = Deferred.fromCoroutine(subscription.next())
    world.feed.end()
    assert CASE.failureResultOf(waiting).check(Closed)
    frame = Deferred.fromCoroutine(next_frame(subscription, world.clock))
    assert CASE.successResultOf(frame) == 'c[3000,"Go away!"]'
    subscription.close()


def test_silence_is_broken_by_a_heartbeat(world: World) -> None:
    """So that nobody between takes the connection for dead; nothing is lost by it."""
    subscription = world.feed.subscribe(lambda _: True)
    frame = Deferred.fromCoroutine(next_frame(subscription, world.clock))
    world.clock.advance(HEARTBEAT)
    assert CASE.successResultOf(frame) == "h"
    world.create()
    frame = Deferred.fromCoroutine(next_frame(subscription, world.clock))
    assert CASE.successResultOf(frame).startswith('a["{')
    subscription.close()


def test_a_database_that_is_locked_ends_no_feed(world: World) -> None:
    """What has happened meanwhile is told when it can be read."""
    subscription = world.feed.subscribe(lambda _: True)
    run = world.create()
    run.start()
    world.told(subscription)
    world.store.broken = True
    world.service.changed.advance(world.service.changed.version + 1)
    world.clock.advance(5)
    world.store.broken = False
    world.clock.advance(1)
    run.end(0)
    world.create()
    told = world.told(subscription)
    assert "job.close FINISHED" in told
    assert "job.create CREATED" in told
    subscription.close()


def tiny(folder: Path, number: int) -> None:
    """Write a flood of the tiniest pieces as what a task has printed."""
    (folder / "1").mkdir()
    pieces = [(shim.STDOUT, b"x"), (shim.STDERR, b"y")] * (number // 2)
    printed(folder / "1", pieces)


def test_a_flood_of_tiny_pieces_is_read_in_many_turns(world: World) -> None:
    """By one for all; who goes away meanwhile has lost nothing, and the others have it."""
    first, second = (world.feed.subscribe(lambda _: True) for _ in range(2))
    tiny(world.folder, 40_000)
    run = world.create()
    run.start()
    world.told(first)
    world.told(second)
    run.end(0, output_size=40_000)
    gone = Deferred.fromCoroutine(first.next())
    stays = Deferred.fromCoroutine(second.next())
    for _ in range(3):
        world.turns.turn()
    CASE.assertNoResult(gone)
    CASE.assertNoResult(stays)
    gone.cancel()
    CASE.failureResultOf(gone).check(CancelledError)
    again = Deferred.fromCoroutine(first.next())
    turns = 0
    while turns < 20 and not (stays.called and again.called):
        world.turns.turn()
        world.clock.advance(0)
        turns += 1
    assert 10 < turns < 20
    texts = [CASE.successResultOf(one) for one in (stays, again)]
    assert texts[0] == texts[1]
    assert json.loads(texts[0])["job"]["stdout"] == "x" * 20_000
    first.close()
    second.close()
