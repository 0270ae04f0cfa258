"""Lists of tasks of any size, in bounded memory and without delaying other requests."""

from array import array
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, NamedTuple

from attrs import define, field
from twisted.internet.defer import (
    CancelledError,
    Deferred,
    DeferredLock,
)
from twisted.internet.defer import (
    TimeoutError as TakesLong,
)
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.web.server import Request

from pulsar_api.auth.guard import Guard
from pulsar_api.concurrency.turns import TurnScheduler
from pulsar_api.tasks.model import Found, TaskQuery, TaskSnapshot
from pulsar_api.web.responses import JSON, Valve, reply

_log = Logger()

SMALL = 1 << 18
"""Bytes up to which a list is sent at once, with its length."""
STALLED = 1.0
"""Seconds without reading after which a client loses its place."""
_STEP = 1 << 16  # bytes that are made in one turn of the reactor, and sent at once
_TASK = _STEP // 16  # the fixed cost of a task, in bytes that take the same time


class Entry(NamedTuple):
    """A task in a list."""

    weight: int
    """The cost of its output, in bytes; see `Output.weight`."""
    pieces: Iterable[bytes]


@define(eq=False)
class _Places:
    """Lets one request with the same name go on at a time."""

    _locks: dict[str, DeferredLock] = field(factory=dict)

    @asynccontextmanager
    async def of(self, name: str) -> AsyncIterator[None]:
        """Wait for the place of a name, and keep it for the block."""
        lock = self._locks.setdefault(name, DeferredLock())
        await lock.acquire()
        try:
            yield
        finally:
            lock.release()
            if not lock.locked:
                del self._locks[name]


@define(eq=False)
class Lists:
    """Makes the lists of all callers.

    A caller has one search and one large list at a time, and no more turns of the reactor
    than others. A list is read and sent piece by piece, as fast as its client reads.
    """

    _clock: IReactorTime
    _turns: TurnScheduler
    _searches: _Places = field(factory=_Places, init=False)
    _large: _Places = field(factory=_Places, init=False)

    async def next_after(self, tasks: Guard, number: int) -> TaskSnapshot | None:
        """Return the oldest newer task that the caller may see, or None."""
        name = tasks.caller.actor.key
        await self._turns.wait(name)
        if tasks.narrowed(TaskQuery()).quick:
            return await tasks.next_after(number)
        async with self._searches.of(name):
            return await tasks.next_after(number)

    async def _search(self, tasks: Guard, query: TaskQuery) -> Found:
        name = tasks.caller.actor.key
        await self._turns.wait(name)
        if tasks.narrowed(query).quick:
            return await tasks.search(query)
        async with self._searches.of(name):
            return await tasks.search(query)

    async def answer(
        self,
        request: Request,
        tasks: Guard,
        query: TaskQuery,
        entry: Callable[[TaskSnapshot], Entry],
        begin: bytes,
        end: bytes,
        more: Callable[[int], object] = lambda _: None,
    ) -> bytes:
        """Answer with the tasks that match and that the caller may see, newest first.

        ``more`` is called with the last number, before anything is sent, if there may be
        further tasks. If a task cannot be read after the response has begun, the connection
        is cut.
        """
        answer = _Answer(request)
        try:
            found = await self._search(tasks, query)
            numbers = found.numbers
            if numbers and len(numbers) == query.limit and numbers[-1] > 1:
                more(numbers[-1])
            # Keep no other reference to the tasks, so that each is freed when it is sent.
            entries = _Entries(tasks, entry, deque(found.tasks), array("q", found.rest))
            del found, numbers
            answer.add(begin)
            await self._send(answer, entries, tasks.caller.actor.key)
            answer.add(end)
            return answer.finish()
        except CancelledError:
            raise
        except Exception:
            if not answer.begun:
                raise
            # A partial list must not look complete, whatever the error is.
            _log.failure("The list {uri} ends too early", uri=request.uri)
            transport: Any = request.transport
            transport.abortConnection()
            await Deferred()
            return b""

    async def _send(self, answer: "_Answer", entries: "_Entries", name: str) -> None:
        made = _STEP
        separator = b""
        async with AsyncExitStack() as place:
            while entries.left:
                if made >= _STEP:
                    await self._turns.wait(name)
                    made = 0
                found = await entries.next()
                if found is None:
                    continue
                made += _TASK + answer.add(separator)
                separator = b", "
                for piece in found.pieces:
                    made += answer.add(piece)
                    if found.weight < _STEP:
                        continue  # all of it is little
                    await self._flush(answer, entries, place, name)
                    await self._turns.wait(name)
                    made = 0
                del found
                await self._flush(answer, entries, place, name)
                if answer.begun and answer.is_head:
                    return

    async def _flush(
        self, answer: "_Answer", entries: "_Entries", place: AsyncExitStack, name: str
    ) -> None:
        """Send what there is, if it is enough, and wait until there is room for more."""
        if not answer.due:
            return
        first = not answer.begun
        answer.send()
        if answer.is_head:
            return
        if first:
            # While waiting for a place, hold no more than what has been sent.
            entries.put_back()
            await place.enter_async_context(self._large.of(name))
        reads = Deferred.fromCoroutine(answer.open())
        try:
            await reads.addTimeout(STALLED, self._clock)
        except TakesLong:
            # A client that does not read must not make other requests wait.
            entries.put_back()
            await place.aclose()
            await answer.open()
            await place.enter_async_context(self._large.of(name))


@define(eq=False)
class _Entries:
    """The tasks of one list: some that have been read, and the numbers of the others."""

    _tasks: Guard
    _entry: Callable[[TaskSnapshot], Entry]
    _todo: deque[TaskSnapshot]
    _rest: Sequence[int]

    @property
    def left(self) -> bool:
        """Whether there are more."""
        return bool(self._todo or self._rest)

    async def next(self) -> Entry | None:
        """Return the next entry; None if the task has been removed."""
        if not self._todo:
            found = await self._tasks.read(self._rest)
            self._todo, self._rest = deque(found.tasks), found.rest
        return self._entry(self._todo.popleft()) if self._todo else None

    def put_back(self) -> None:
        """Keep only the numbers of the tasks that have been read."""
        numbers = [task.id for task in self._todo]
        self._todo.clear()
        self._rest = array("q", [*numbers, *self._rest])


class _Answer(Valve):
    """The response with one list."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._text: list[bytes] = []
        self._size = 0
        self.begun = False
        """Whether a part of it has been sent, as it is large."""

    def add(self, piece: bytes) -> int:
        """Add a piece; return its length."""
        self._text.append(piece)
        self._size += len(piece)
        return len(piece)

    @property
    def due(self) -> bool:
        """Whether there is enough to be sent."""
        return self._size >= _STEP if self.begun else self._size > SMALL

    @property
    def is_head(self) -> bool:
        """Whether the request is a HEAD."""
        return self._request.method == b"HEAD"

    def send(self) -> None:
        """Send what there is."""
        if not self.begun:
            self.begun = True
            self._request.setResponseCode(200)
            self._request.setHeader("Content-Type", JSON)
            self._request.setHeader("Cache-Control", "no-store")
            if not self.is_head:
                self._request.registerProducer(self, True)
        if not self.is_head:
            self._request.write(b"".join(self._text))
        self._text, self._size = [], 0

    def finish(self) -> bytes:
        """Send the rest, or all of a small list."""
        if not self.begun:
            return reply(self._request, b"".join(self._text))
        self.send()
        if not self.is_head:
            self._request.unregisterProducer()
        return b""
