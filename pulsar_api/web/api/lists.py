"""Answers with lists: whatever their size, they hold nobody up and little in memory."""

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
"""Bytes up to which a list is sent as a whole, with its length."""
STALLED = 1.0
"""Seconds that a client does not read, after which its list keeps no place."""
_STEP = 1 << 16  # bytes that are made in one turn of the reactor, and sent at a time
_TASK = _STEP // 16  # bytes that could be made in the time that a task takes anyway


class Entry(NamedTuple):
    """A task in a list."""

    weight: int
    """How much work its output is, in bytes; see `Output.weight`."""
    pieces: Iterable[bytes]


@define(eq=False)
class _Places:
    """Lets one of those who have the same name go on at a time."""

    _locks: dict[str, DeferredLock] = field(factory=dict)

    @asynccontextmanager
    async def of(self, name: str) -> AsyncIterator[None]:
        """Wait for the place of this name, and keep it as long as the block lasts."""
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
    than others, however many it asks for. A list is read and sent piece by piece, as fast
    as its client reads.
    """

    _clock: IReactorTime
    _turns: TurnScheduler
    _searches: _Places = field(factory=_Places, init=False)
    _large: _Places = field(factory=_Places, init=False)

    async def next_after(self, tasks: Guard, number: int) -> TaskSnapshot | None:
        """Return the oldest newer task that may be seen, or None."""
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
        """Answer with the tasks that match and may be seen, newest first.

        A small list is sent at once, else as fast as the client reads. ``more`` is told
        the last number if there may be others behind it, before anything is sent. What
        cannot be read any more breaks the answer off if it has begun.
        """
        answer = _Answer(request)
        try:
            found = await self._search(tasks, query)
            numbers = found.numbers
            if numbers and len(numbers) == query.limit and numbers[-1] > 1:
                more(numbers[-1])
            # Of what is in memory only the one who uses it up knows.
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
            # Half a list must not look whole, whatever it is.
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
        """Send what there is if it is enough, and wait until there is room for more."""
        if not answer.due:
            return
        first = not answer.begun
        answer.send()
        if answer.is_head:
            return
        if first:
            # Whoever waits for a place holds no more than what is on its way.
            entries.put_back()
            await place.enter_async_context(self._large.of(name))
        reads = Deferred.fromCoroutine(answer.open())
        try:
            await reads.addTimeout(STALLED, self._clock)
        except TakesLong:
            # A client that does not read keeps nobody else waiting.
            entries.put_back()
            await place.aclose()
            await answer.open()
            await place.enter_async_context(self._large.of(name))


@define(eq=False)
class _Entries:
    """The tasks of one list: some that were read, and the numbers of the others."""

    _tasks: Guard
    _entry: Callable[[TaskSnapshot], Entry]
    _todo: deque[TaskSnapshot]
    _rest: Sequence[int]

    @property
    def left(self) -> bool:
        """Whether there are more."""
        return bool(self._todo or self._rest)

    async def next(self) -> Entry | None:
        """Return the next one, None if it is no more."""
        if not self._todo:
            found = await self._tasks.read(self._rest)
            self._todo, self._rest = deque(found.tasks), found.rest
        return self._entry(self._todo.popleft()) if self._todo else None

    def put_back(self) -> None:
        """Hold only the numbers of those that were read."""
        numbers = [task.id for task in self._todo]
        self._todo.clear()
        self._rest = array("q", [*numbers, *self._rest])


class _Answer(Valve):
    """One list on its way to one client."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._text: list[bytes] = []
        self._size = 0
        self.begun = False
        """Whether some of it has been sent, as it is large."""

    def add(self, piece: bytes) -> int:
        """Take a piece; return how long it is."""
        self._text.append(piece)
        self._size += len(piece)
        return len(piece)

    @property
    def due(self) -> bool:
        """Whether there is so much that it should be sent."""
        return self._size >= _STEP if self.begun else self._size > SMALL

    @property
    def is_head(self) -> bool:
        """Whether the head is all that is wanted."""
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
