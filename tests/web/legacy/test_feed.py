"""Tests of the messages to clients of release 0.6, and of their times.

Time stands still.
"""

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from attrs import define, field
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from pulsar_api.concurrency.turns import TurnScheduler
from pulsar_api.output.records import BLOCK
from pulsar_api.shim import shim
from pulsar_api.tasks.commands import Commands
from pulsar_api.tasks.interfaces import Bounds
from pulsar_api.tasks.model import TaskSpec
from pulsar_api.tasks.presets import Template
from pulsar_api.tasks.queue import Limits
from pulsar_api.tasks.service import TaskService
from pulsar_api.web.legacy.feed import EVERY, HELD, Closed, Feed, Subscription
from pulsar_api.web.legacy.message import MAX_CHANGE_TEXT, MAX_TEXT, PIECE_BYTES, Message
from pulsar_api.web.legacy.visit import HEARTBEAT, next_frame
from tests.fakes import FakeExecutor, FakeRun, MemoryStore, steady_clock
from tests.output.test_lines import Turns
from tests.output.test_reader import printed

CASE = SynchronousTestCase()
SPEC = TaskSpec("site", "production", "deploy")


@define
class FakeRequest:
    """A request whose response ends when the test says so."""

    done: Deferred[None] = field(factory=Deferred)

    def notifyFinish(self) -> Deferred[None]:
        return self.done


@define
class World:
    """A feed for a service without processes or disk."""

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
        self.feed = Feed(self.service, self.folder, clock, TurnScheduler(self.turns))

    def create(self) -> FakeRun:
        """Create a task and return its run."""
        made = Deferred.fromCoroutine(self.service.create(SPEC))
        return self.executor.run(CASE.successResultOf(made).snapshot.id)

    def turn(self) -> None:
        """Let one turn of the reactor pass, but no time."""
        self.turns.turn()
        self.clock.advance(0)

    def run(self, deferred: Deferred[Any], turns: int = 500) -> None:
        """Let turns pass until a Deferred has fired, or at most this many."""
        for _ in range(turns):
            if deferred.called:
                break
            self.turn()

    def text(self, message: Message) -> Any:
        """Return the JSON inside the frame of a message."""
        parts: list[str] = []

        async def write(text: str, _: bool) -> None:  # noqa: FBT001
            parts.append(text)

        sent = Deferred.fromCoroutine(message.send(write))
        self.run(sent, 10_000)
        CASE.successResultOf(sent)
        (inner,) = json.loads("".join(parts).removeprefix("a"))
        return json.loads(inner)

    def told(self, subscription: Subscription) -> list[str]:
        """Return the kinds and states of all messages that are due now."""
        found: list[str] = []
        while True:
            waiting = Deferred.fromCoroutine(subscription.next())
            self.run(waiting, 5)
            if not waiting.called:
                waiting.addErrback(lambda _: None)
                waiting.cancel()
                return found
            message = self.text(CASE.successResultOf(waiting))
            found.append(f"{message['event']} {message['job']['status']}")


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Return a new world."""
    return World(tmp_path)


def test_a_job_is_reported_from_creation_to_end(world: World) -> None:
    """Its end is reported at once."""
    subscription = world.feed.subscribe(lambda _: True)
    run = world.create()
    run.start()
    assert world.told(subscription) == ["job.create RUNNING", "job.change RUNNING"]
    run.end(3)
    assert world.told(subscription) == ["job.close FAILED"]
    subscription.close()


def test_a_running_job_is_reported_to_a_new_subscriber(world: World) -> None:
    """The subscriber hears of its end."""
    run = world.create()
    run.start()
    subscription = world.feed.subscribe(lambda _: True)
    run.end(0)
    assert world.told(subscription)[-1] == "job.close FINISHED"
    subscription.close()


def test_output_is_reported_a_few_times_a_second(world: World) -> None:
    """The number of prints does not matter."""
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


def test_a_slow_subscriber_hears_only_the_newest_state(world: World) -> None:
    """Unread messages take a few words of memory for each job."""
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


def test_no_change_is_reported_before_the_response_to_the_post(world: World) -> None:
    """Until then the published client does not know the number of the job."""
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
    # A busy client can read these before the response, so they are sent twice more.
    world.clock.advance(1)
    assert world.told(subscription) == end
    world.clock.advance(4)
    assert world.told(subscription) == end
    world.clock.advance(60)
    assert world.told(subscription) == []
    subscription.close()


def test_without_subscribers_the_feed_watches_nothing(world: World) -> None:
    """It stops with the last subscriber."""
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
    """Waiting subscribers get an error or a closing frame."""
    subscription = world.feed.subscribe(lambda _: True)
    waiting = Deferred.fromCoroutine(subscription.next())
    world.feed.end()
    assert CASE.failureResultOf(waiting).check(Closed)
    frame = Deferred.fromCoroutine(next_frame(subscription, world.clock))
    assert CASE.successResultOf(frame) == 'c[3000,"Go away!"]'
    subscription.close()


def test_a_heartbeat_breaks_the_silence(world: World) -> None:
    """It keeps proxies from closing the connection. No message is lost."""
    subscription = world.feed.subscribe(lambda _: True)
    frame = Deferred.fromCoroutine(next_frame(subscription, world.clock))
    world.clock.advance(HEARTBEAT)
    assert CASE.successResultOf(frame) == "h"
    world.create()
    frame = Deferred.fromCoroutine(next_frame(subscription, world.clock))
    world.run(frame)
    message = CASE.successResultOf(frame)
    assert isinstance(message, Message)
    assert world.text(message)["event"] == "job.create"
    subscription.close()


def test_a_locked_database_does_not_end_a_feed(world: World) -> None:
    """Changes are reported once they can be read."""
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
    """Write an output that consists of very many pieces of one byte."""
    (folder / "1").mkdir()
    pieces = [(shim.STDOUT, b"x"), (shim.STDERR, b"y")] * (number // 2)
    printed(folder / "1", pieces)


def test_a_flood_of_tiny_pieces_is_read_over_many_turns(world: World) -> None:
    """One scan serves all subscribers. A cancelled wait loses no message."""
    first, second = (world.feed.subscribe(lambda _: True) for _ in range(2))
    tiny(world.folder, 100_000)
    run = world.create()
    run.start()
    world.told(first)
    world.told(second)
    run.end(0, output_size=100_000)
    gone = Deferred.fromCoroutine(first.next())
    stays = Deferred.fromCoroutine(second.next())
    for _ in range(2):
        world.turn()
    CASE.assertNoResult(gone)
    CASE.assertNoResult(stays)
    gone.cancel()
    CASE.failureResultOf(gone).check(CancelledError)
    again = Deferred.fromCoroutine(first.next())
    world.run(stays)
    world.run(again)
    messages = [CASE.successResultOf(one) for one in (stays, again)]
    assert messages[0] is messages[1]
    turns = world.turns.seconds()
    assert world.text(messages[0])["job"]["stdout"] == "x" * 50_000
    # Each byte of it has two records, and a turn reads some thousands.
    assert world.turns.seconds() - turns > 100_000 / BLOCK / 2
    first.close()
    second.close()


def test_a_crowd_shares_one_message_and_its_pieces(world: World) -> None:
    """Pieces are made once for all subscribers that receive them at the same time."""
    (world.folder / "1").mkdir()
    printed(world.folder / "1", [(shim.STDOUT, b"0123456789abcde\n" * (MAX_TEXT // 16))])
    crowd = [world.feed.subscribe(lambda _: True) for _ in range(50)]
    run = world.create()
    run.start()
    for subscription in crowd:
        world.told(subscription)
    run.end(0, output_size=MAX_TEXT)
    waiting = [Deferred.fromCoroutine(member.next()) for member in crowd]
    for one in waiting:
        world.run(one)
    messages = {CASE.successResultOf(one) for one in waiting}
    assert len(messages) == 1
    before = world.feed.pieces.misses
    sent = [0] * len(crowd)

    def count(place: int) -> Callable[[str, bool], Awaitable[None]]:
        async def write(text: str, _: bool) -> None:  # noqa: FBT001
            sent[place] += len(text)

        return write

    (message,) = messages
    sending = [Deferred.fromCoroutine(message.send(count(n))) for n in range(len(crowd))]
    for telling in sending:
        world.run(telling, 100_000)
        CASE.successResultOf(telling)
    assert len(set(sent)) == 1
    assert sent[0] > 2 * MAX_TEXT
    made = world.feed.pieces.misses - before
    assert made <= sent[0] / PIECE_BYTES + 2
    assert world.feed.pieces.size <= world.feed.pieces.max_bytes
    for subscription in crowd:
        subscription.close()
    assert world.feed.pieces.size == 0


def test_each_turn_wakes_one_subscriber(world: World) -> None:
    """Many wake at the same time. Other work waits for one of them only."""
    crowd = [world.feed.subscribe(lambda _: True) for _ in range(20)]
    world.create()
    waiting = [Deferred.fromCoroutine(member.next()) for member in crowd]
    done = 0
    while done < len(crowd):
        world.turn()
        now = sum(one.called for one in waiting)
        assert now <= done + 1
        assert world.turns.seconds() < 100
        done = now
    for subscription in crowd:
        subscription.close()


CONTROL = bytes(range(1, 9))
"""Characters that nested JSON encodes in seven bytes each."""


@pytest.mark.parametrize(
    "data",
    [
        CONTROL * (MAX_TEXT // 8),
        b"\xff" * MAX_TEXT,
        b'"\\' * (MAX_TEXT // 2),
        "ä".encode() * (MAX_TEXT // 2),
        "😀".encode() * (MAX_TEXT // 4),
        b"\r\n" * (MAX_TEXT // 2),
    ],
    ids=["control", "no-utf8", "quotes", "umlauts", "emoji", "line-ends"],
)
@pytest.mark.parametrize(
    ("kind", "most"), [("close", MAX_TEXT), ("change", MAX_CHANGE_TEXT)]
)
def test_a_message_is_limited_by_its_encoded_size(
    world: World, data: bytes, kind: str, most: int
) -> None:
    """The number of printed bytes does not matter. The message says where the rest is."""
    data += b"end\n"
    (world.folder / "1").mkdir()
    printed(world.folder / "1", [(shim.STDOUT, data)])
    subscription = world.feed.subscribe(lambda _: True)
    run = world.create()
    run.start()
    run.end(0, output_size=len(data))
    found = Deferred.fromCoroutine(world.feed.message(1, kind, lambda _: True))
    world.run(found)
    message = CASE.successResultOf(found)
    assert message is not None
    sizes: list[int] = []

    async def write(text: str, _: bool) -> None:  # noqa: FBT001
        sizes.append(len(text))

    sending = Deferred.fromCoroutine(message.send(write))
    world.run(sending, 10_000)
    assert sum(sizes) < 2 * 1.5 * most + 1000
    assert sum(sizes) > most / 2
    assert max(sizes) <= 4 * PIECE_BYTES
    job = world.text(message)["job"]
    assert job["stdout"] == job["output"]
    first, _, rest = job["output"].partition("\n")
    start = int(first.removeprefix("[the first ").partition(" ")[0])
    assert rest == data[start:].decode("utf-8", "replace")
    subscription.close()


def test_a_slow_reader_gets_the_same_text_without_cached_pieces(world: World) -> None:
    """Pieces are made again for it, so that it takes no memory."""
    (world.folder / "1").mkdir()
    lines = b"".join(b"%07d\n" % n for n in range(MAX_TEXT // 8))
    printed(world.folder / "1", [(shim.STDOUT, lines)])
    world.feed.pieces.max_bytes = 4 * PIECE_BYTES
    subscription = world.feed.subscribe(lambda _: True)
    run = world.create()
    run.start()
    run.end(0, output_size=MAX_TEXT)
    found = Deferred.fromCoroutine(world.feed.message(1, "close", lambda _: True))
    world.run(found)
    message = CASE.successResultOf(found)
    assert message is not None
    room: Deferred[None] = Deferred()
    slow: list[str] = []

    async def write(text: str, _: bool) -> None:  # noqa: FBT001
        slow.append(text)
        if len(slow) == 10:
            await room

    sending = Deferred.fromCoroutine(message.send(write))
    for _ in range(50):
        world.turn()
    assert len(slow) == 10
    job = world.text(message)["job"]
    assert world.feed.pieces.size <= world.feed.pieces.max_bytes
    room.callback(None)
    world.run(sending, 10_000)
    CASE.successResultOf(sending)
    (inner,) = json.loads("".join(slow).removeprefix("a"))
    assert json.loads(inner)["job"] == job
    assert job["stdout"] == job["output"] == lines.decode()
    subscription.close()


def test_a_message_about_a_removed_output_ends_with_a_note(world: World) -> None:
    """The JSON that has begun is completed."""
    (world.folder / "1").mkdir()
    printed(world.folder / "1", [(shim.STDOUT, b"x" * 100_000)])
    subscription = world.feed.subscribe(lambda _: True)
    run = world.create()
    run.start()
    run.end(0, output_size=100_000)
    found = Deferred.fromCoroutine(world.feed.message(1, "close", lambda _: True))
    world.run(found)
    message = CASE.successResultOf(found)
    assert message is not None
    parts: list[str] = []

    async def write(text: str, _: bool) -> None:  # noqa: FBT001
        parts.append(text)
        (world.folder / "1" / "output").unlink(missing_ok=True)

    sending = Deferred.fromCoroutine(message.send(write))
    world.run(sending)
    (inner,) = json.loads("".join(parts).removeprefix("a"))
    job = json.loads(inner)["job"]
    assert job["stdout"].startswith("xxx")
    assert job["stdout"].endswith("[cannot be read now: No such file or directory]\n")
    assert job["output"] == "[cannot be read now: No such file or directory]\n"
    subscription.close()


def test_a_cut_output_is_reported_with_a_marker(world: World) -> None:
    """Both texts have it at the place of the cut."""
    (world.folder / "1").mkdir()
    printed(
        world.folder / "1", [(shim.STDOUT, b"a" * 50_000), (shim.STDERR, b"b" * 50_000)]
    )
    (world.folder / "1" / "cut").write_text("20000 60000")
    subscription = world.feed.subscribe(lambda _: True)
    run = world.create()
    run.start()
    run.end(0, output_size=100_000)
    found = Deferred.fromCoroutine(world.feed.message(1, "close", lambda _: True))
    world.run(found)
    message = CASE.successResultOf(found)
    assert message is not None
    job = world.text(message)["job"]
    marker = "\n[bytes 20000 to 60000 were cut: --max-output-size]\n"
    assert job["output"] == "a" * 20_000 + marker + "b" * 40_000
    assert job["stdout"] == "a" * 20_000 + marker
    subscription.close()
