"""Tells subscribers what happens to jobs, in the words of release 0.6."""

import json
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

from pulsar_api import wire
from pulsar_api.changes import Changes
from pulsar_api.errors import StoreUnavailable, UnknownTask
from pulsar_api.output import PIECE, Output
from pulsar_api.rota import Rota
from pulsar_api.service import TaskService
from pulsar_api.task import Status, TaskQuery, TaskSnapshot

_log = Logger()
T = TypeVar("T")

EVERY = 0.25
"""Seconds: a job's output is news at most this often; its end at once."""
HELD = 0.1
"""Seconds after the answer to its POST until a job's news are told.

The published client knows the number of its job only then, and drops what comes before.
"""
MOST = 1 << 20
"""Bytes of each text in a message; of a longer one its end, and where the rest is."""
MOST_CHANGE = 1 << 16
"""The same of a job that goes on: that is told again and again."""

_AGAIN = (1.0, 4.0)
"""Seconds after which the end of a job that has just been answered is told again.

The published client forgets a job at its first end, so it does not hear the second one.
"""
_BATCH = 100
_SHARED = 16
_KINDS = ("create", "change", "close")


class Closed(Exception):
    """The feed has ended: the daemon stops."""


@define(eq=False)
class Subscription:
    """What one subscriber has not been told yet: which jobs, not what of them.

    So it costs the same however slowly it is read, and what is told is always the newest.
    """

    _feed: "Feed"
    _changes: Changes
    _sees: Callable[[TaskSnapshot], bool]
    _pending: OrderedDict[int, set[str]] = field(factory=OrderedDict)
    _closed: bool = False

    def mark(self, number: int, kind: str) -> None:
        """Note that there is news of a job."""
        self._pending.setdefault(number, set()).add(kind)
        self._changes.advance(self._changes.version + 1)

    async def next(self) -> str:
        """Return the next message as soon as there is one; raise `Closed` at the end.

        If it is cancelled nothing is lost.
        """
        while True:
            if self._closed:
                raise Closed
            if not self._pending:
                await self._changes.after(self._changes.version)
                continue
            number, kinds = next(iter(self._pending.items()))
            kind = next(kind for kind in _KINDS if kind in kinds)
            kinds.discard(kind)
            if not kinds:
                del self._pending[number]
            try:
                text = await self._feed.message(number, kind, self._sees)
            except (CancelledError, StoreUnavailable):
                self.mark(number, kind)
                raise
            if text is not None:
                return text

    def close(self) -> None:
        """Want no more."""
        self._feed.leave(self)

    def end(self) -> None:
        """Be told that there will be no more."""
        self._closed = True
        self._changes.advance(self._changes.version + 1)


@define(eq=False)
class Feed:
    """Watches all tasks as long as somebody subscribes."""

    _service: TaskService
    _folder: Path
    """Where the output of task 47 is in the folder ``47``."""
    _clock: IReactorTime
    _rota: Rota
    _subscribers: dict[Subscription, None] = field(factory=dict, init=False)
    _watched: dict[int, Deferred[None]] = field(factory=dict, init=False)
    _held: dict[int, Changes] = field(factory=dict, init=False)
    _running: Deferred[None] | None = field(default=None, init=False)
    _messages: OrderedDict[tuple[object, ...], str] = field(factory=OrderedDict, init=False)
    _made: dict[tuple[object, ...], Changes] = field(factory=dict, init=False)
    """The messages that are being made, and who waits for them."""

    def subscribe(self, sees: Callable[[TaskSnapshot], bool]) -> Subscription:
        """Return a subscription to all that happens from now on to tasks that it sees."""
        found = Subscription(self, Changes(self._clock), sees)
        self._subscribers[found] = None
        if self._running is None:
            self._running = self._begin(self._run())
        return found

    def leave(self, subscription: Subscription) -> None:
        """Forget a subscription; with the last one stop watching."""
        self._subscribers.pop(subscription, None)
        if not self._subscribers and self._running is not None:
            running, self._running = self._running, None
            running.cancel()
            for watching in list(self._watched.values()):
                watching.cancel()

    def end(self) -> None:
        """Tell all subscribers that there will be no more."""
        for subscriber in list(self._subscribers):
            subscriber.end()

    def hold(self, number: int, request: Request) -> None:
        """Tell no change of a task until its POST was answered, and a moment longer."""
        if number in self._held:
            return
        self._held[number] = Changes(self._clock)

        def release() -> None:
            self._held.pop(number).advance(1)

        request.notifyFinish().addBoth(lambda _: self._clock.callLater(HELD, release))

    async def message(
        self, number: int, kind: str, sees: Callable[[TaskSnapshot], bool]
    ) -> str | None:
        """Return what is to be said of a job now; None if it is no more, or not seen."""
        try:
            snapshot = (await self._service.find(number)).snapshot
        except UnknownTask:
            return None
        if not sees(snapshot):
            return None
        key = (number, kind, snapshot.version, snapshot.status)
        while (text := self._messages.get(key)) is None:
            made = self._made.get(key)
            if made is not None:
                await made.after(0)
                continue
            made = self._made[key] = Changes(self._clock)
            try:
                self._messages[key] = await self._text(snapshot, kind)
            finally:
                del self._made[key]
                made.advance(1)
            while len(self._messages) > _SHARED:
                self._messages.popitem(last=False)
        return text

    async def _text(self, snapshot: TaskSnapshot, kind: str) -> str:
        output = Output(self._folder / str(snapshot.id))
        job = wire.job_fields(snapshot)
        size = snapshot.output_size
        most = MOST_CHANGE if kind == "change" else MOST
        try:
            start = output.character_start(size - most) if size > most else 0
            left_out = ""
            if start:
                left_out = f"[the first {start} bytes: GET /task/{snapshot.id}/log]\n"
            job["stdout"] = left_out + await self._stdout(output, start, size)
            job["output"] = left_out + "".join(output.text(start, size))
        except OSError as e:
            _log.error("Cannot read the output of task {id}: {e}", id=snapshot.id, e=e)
            job["stdout"] = job["output"] = f"[cannot be read now: {e.strerror}]\n"
        return json.dumps({"event": f"job.{kind}", "job": job})

    async def _stdout(self, output: Output, start: int, end: int) -> str:
        parts: list[str] = []
        for piece in output.stdout(end, start):
            if parts and len(parts[-1]) < PIECE:
                # Some thousands of records are behind it.
                await self._rota.turn()
            parts.append(piece)
        return "".join(parts)

    async def _run(self) -> None:
        change, known = await self._surely(self._service.last_change)
        for status in (Status.RUNNING, Status.CREATED):
            query = TaskQuery(limit=wire.MAX_LIST, status=status)
            for found in await self._surely(partial(self._service.list, query)):
                self._watch(found.id)
        while True:
            seen = self._service.changed.version
            news = await self._surely(partial(self._service.news, change, known, _BATCH))
            for snapshot in news.created:
                known = snapshot.id
                self._tell(known, "create")
                self._watch(known)
            if news.changed:
                change = news.changed[-1][0]
            if max(len(news.created), len(news.changed)) == _BATCH:
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
                self._tell(number, "close")
                break
            if await task.changes.after(seen) == seen:
                return
        if held and self._clock.seconds() < answered + _AGAIN[0]:
            # A client that was busy may have read this before the answer to its POST.
            for seconds in _AGAIN:
                await deferLater(self._clock, seconds)
                self._tell(number, "change")
                self._tell(number, "close")

    async def _surely(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Ask the service until it can answer: the database may be locked for a while."""
        while True:
            try:
                return await ask()
            except StoreUnavailable as e:
                _log.error("The feed of jobs has to wait: {e}", e=e)
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
