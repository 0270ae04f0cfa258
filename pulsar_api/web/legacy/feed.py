"""The feed of jobs: tells subscribers what happens to tasks, as release 0.6 did."""

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from attrs import define, field
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.web.server import Request

from pulsar_api.bounded import BoundedDict
from pulsar_api.concurrency.changes import Changes
from pulsar_api.concurrency.single_flight import SingleFlight
from pulsar_api.concurrency.turns import TurnScheduler
from pulsar_api.errors import StoreUnavailable, UnknownTask
from pulsar_api.output.files import output_of
from pulsar_api.tasks.live import Task
from pulsar_api.tasks.model import Status, TaskQuery, TaskSnapshot
from pulsar_api.tasks.service import TaskService
from pulsar_api.web.decoding import MAX_LIST
from pulsar_api.web.legacy.message import (
    MAX_CHANGE_TEXT,
    MAX_TEXT,
    Message,
    PieceCache,
    start_offset,
)

_log = Logger()
T = TypeVar("T")

EVERY = 0.25
"""Seconds between two changes of a running job; its end is told at once."""
HELD = 0.1
"""Seconds after the answer to its POST until changes of a job are told.

The published client learns the number of its job from the answer, and drops changes that
come earlier.
"""
_AGAIN = (1.0, 4.0)
"""Seconds after which the end of a job that has just been answered is told again.

The published client forgets a job at its first end, so a second one does no harm.
"""
_BATCH = 100
_SHARED = 16
_KINDS = ("create", "change", "close")
_BIT = {kind: 1 << place for place, kind in enumerate(_KINDS)}


class Closed(Exception):
    """The feed has ended because the daemon stops."""


@define(eq=False)
class Subscription:
    """The changes that one subscriber has not been told yet: which jobs, not their content.

    So a slow subscriber costs no more than a fast one, and always gets the newest state.
    """

    _feed: "Feed"
    _changes: Changes
    _sees: Callable[[TaskSnapshot], bool]
    _pending: OrderedDict[int, int] = field(factory=OrderedDict)
    """The kinds of changes of each job, as the sum of their bits."""
    _closed: bool = False

    def mark(self, number: int, kind: str) -> None:
        """Note that a job has changed."""
        self._pending[number] = self._pending.get(number, 0) | _BIT[kind]
        self._changes.advance(self._changes.version + 1)

    async def next(self) -> Message:
        """Return the next message as soon as there is one. Cancelling it loses nothing.

        Raises:
            Closed: The feed has ended.
        """
        while True:
            if self._closed:
                raise Closed
            if not self._pending:
                await self._changes.after(self._changes.version)
                continue
            # A change wakes all subscribers at once, and there may be many.
            await self._feed.turn()
            if self._closed or not self._pending:
                continue
            number, bits = next(iter(self._pending.items()))
            kind = next(kind for kind in _KINDS if bits & _BIT[kind])
            self._pending[number] = bits & ~_BIT[kind]
            if not self._pending[number]:
                del self._pending[number]
            try:
                found = await self._feed.message(number, kind, self._sees)
            except (CancelledError, StoreUnavailable):
                self.mark(number, kind)
                raise
            if found is not None:
                return found

    def close(self) -> None:
        """End the subscription."""
        self._feed.leave(self)

    def end(self) -> None:
        """Note that the feed has ended."""
        self._closed = True
        self._changes.advance(self._changes.version + 1)


@define(eq=False)
class Feed:
    """Watches all tasks while there are subscribers."""

    _service: TaskService
    _folder: Path
    """The folder with the output of all tasks."""
    _clock: IReactorTime
    _turns: TurnScheduler
    _subscribers: dict[Subscription, None] = field(factory=dict, init=False)
    _watched: dict[int, Deferred[None]] = field(factory=dict, init=False)
    _held: dict[int, Changes] = field(factory=dict, init=False)
    _running: Deferred[None] | None = field(default=None, init=False)
    _messages: BoundedDict[tuple[object, ...], Message] = field(
        factory=partial(BoundedDict, _SHARED), init=False
    )
    pieces: PieceCache = field(factory=PieceCache, init=False)
    """Shared by subscribers that are sent the same message."""
    _ended: BoundedDict[int, Task] = field(
        factory=partial(BoundedDict, _SHARED), init=False
    )
    """Tasks whose end is being told."""
    _making: SingleFlight[tuple[object, ...], Message] = field(
        factory=partial(SingleFlight, "A message of the feed"), init=False
    )

    def subscribe(self, sees: Callable[[TaskSnapshot], bool]) -> Subscription:
        """Return a subscription to future changes of the tasks that ``sees`` accepts."""
        found = Subscription(self, Changes(self._clock), sees)
        self._subscribers[found] = None
        if self._running is None:
            self._running = self._begin(self._run())
        return found

    def leave(self, subscription: Subscription) -> None:
        """Remove a subscription; with the last one stop watching."""
        self._subscribers.pop(subscription, None)
        if not self._subscribers and self._running is not None:
            running, self._running = self._running, None
            running.cancel()
            for watching in list(self._watched.values()):
                watching.cancel()
            self._messages.clear()
            self._ended.clear()
            self.pieces.clear()

    def end(self) -> None:
        """Tell all subscribers that the feed has ended."""
        for subscriber in list(self._subscribers):
            subscriber.end()

    def turn(self) -> Deferred[None]:
        """Fire when it is the caller's turn to work."""
        return self._turns.wait()

    def hold(self, number: int, request: Request) -> None:
        """Hold changes of a task back until `HELD` seconds after the answer to its POST."""
        if number in self._held:
            return
        self._held[number] = Changes(self._clock)

        def release() -> None:
            self._held.pop(number).advance(1)

        request.notifyFinish().addBoth(lambda _: self._clock.callLater(HELD, release))

    async def message(
        self, number: int, kind: str, sees: Callable[[TaskSnapshot], bool]
    ) -> Message | None:
        """Return a message with the state of a job; None if it is removed or hidden."""
        try:
            task = self._ended.get(number) or await self._service.find(number)
        except UnknownTask:
            return None
        snapshot = task.snapshot
        if not sees(snapshot):
            return None
        key = (number, kind, snapshot.version, snapshot.status)
        found = self._messages.get(key)
        if found is None:
            found = await self._making.do(key, partial(self._make, snapshot, kind))
            self._messages[key] = found
        return found

    async def _make(self, snapshot: TaskSnapshot, kind: str) -> Message:
        output = output_of(self._folder, snapshot.id)
        size = snapshot.output_size
        limit = MAX_CHANGE_TEXT if kind == "change" else MAX_TEXT
        try:
            start = await start_offset(output, self._turns, size, limit)
        except OSError:
            start = max(0, size - limit)  # the pieces will contain the error
        return Message(kind, snapshot, output, start, self.pieces, self._turns)

    async def _run(self) -> None:
        change, known = await self._surely(self._service.last_change)
        for status in (Status.RUNNING, Status.CREATED):
            query = TaskQuery(limit=MAX_LIST, status=status)
            found = await self._surely(partial(self._service.search, query))
            for number in found.numbers:
                self._watch(number)
        while True:
            seen = self._service.changed.version
            news = await self._surely(partial(self._service.news, change, known, _BATCH))
            for snapshot in news.created:
                known = snapshot.id
                self._tell(known, "create")
                self._watch(known)
            if news.changed:
                change = news.changed[-1][0]
            if news.more:
                continue
            if await self._service.changed.after(seen) == seen:
                return

    def _watch(self, number: int) -> None:
        if number not in self._watched:
            watching = self._watched[number] = self._begin(self._follow(number))

            def forget(_: object) -> None:
                self._watched.pop(number, None)

            watching.addBoth(forget)

    async def _follow(self, number: int) -> None:
        held = number in self._held
        if held:
            await self._held[number].after(0)
        answered = self._clock.seconds()
        task = await self._surely(partial(self._service.find, number))
        while True:
            seen = task.changes.version
            self._tell(number, "change")
            if not task.snapshot.status.ended:
                end = task.end.after(0)
                await end.addTimeout(EVERY, self._clock, lambda *_: 0)
            if task.snapshot.status.ended:
                self._ended[number] = task
                self._tell(number, "close")
                break
            if await task.changes.after(seen) == seen:
                return
        if held and self._clock.seconds() < answered + _AGAIN[0]:
            # A busy client may have read this before the answer to its POST.
            for seconds in _AGAIN:
                await deferLater(self._clock, seconds)
                self._tell(number, "change")
                self._tell(number, "close")

    async def _surely(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Repeat a call until it succeeds, as the database may be locked for a while."""
        while True:
            try:
                return await ask()
            except StoreUnavailable as e:
                _log.error("The feed of jobs is delayed: {e}", e=e)
                await deferLater(self._clock, 1.0)

    def _tell(self, number: int, kind: str) -> None:
        for subscriber in list(self._subscribers):
            subscriber.mark(number, kind)

    def _begin(self, coroutine: Coroutine[Deferred[Any], Any, None]) -> Deferred[None]:
        running = Deferred.fromCoroutine(coroutine)

        def failed(failure: Any) -> None:
            if not failure.check(CancelledError, UnknownTask):
                _log.failure("The feed of jobs has ended", failure)

        return running.addErrback(failed)
