"""A `TaskStore` whose records survive their daemon, and whose results arrive late.

`Database` has the records on disk. It is the memory store of the other tests, which defines
each operation. `SimulatedStore` is the access of one daemon: operations wait for a thread,
are committed in groups, and fire later. If the daemon dies in between, all of a group or
none of it has been committed.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from attrs import define, field
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from pulsar_api.errors import StoreUnavailable
from pulsar_api.principal import Principal
from pulsar_api.tasks.interfaces import Keep, NewTask, Reading, TaskStore
from pulsar_api.tasks.model import Found, News, TaskQuery, TaskSnapshot, Within
from tests.fakes import MemoryStore

T = TypeVar("T")

BUSY = 5.0
"""Seconds after which an operation fails while the database is away."""

Later = Callable[..., object]
"""Takes a function and its arguments, and calls it later."""


@define(eq=False)
class Database:
    """The records of one state on disk."""

    memory: MemoryStore = field(factory=MemoryStore)
    away: bool = False

    def copy(self) -> "Database":
        """Return a database with the same records."""
        old = self.memory
        made = MemoryStore()
        made.rows, made.keys, made.changes = (
            dict(old.rows),
            dict(old.keys),
            dict(old.changes),
        )
        made.removed = set(old.removed)
        made.last, made.count, made.kept_reading = old.last, old.count, old.kept_reading
        return Database(made)


@define(eq=False)
class _Thread:
    """Does the operations of one daemon in order. Those that wait form one group."""

    _database: Database
    _post: Later
    """Calls a function in the reactor's thread, unless the daemon has died."""
    _later: Later
    """Calls a function after some time, unless the daemon has died."""
    _committed: Callable[[], object]
    _jobs: list[tuple[Callable[[MemoryStore], Deferred[Any]], Deferred[Any]]] = field(
        factory=list, init=False
    )
    _busy: bool = field(default=False, init=False)
    _closed: Deferred[None] | None = field(default=None, init=False)

    def do(self, job: Callable[[MemoryStore], Deferred[T]]) -> Deferred[T]:
        done: Deferred[T] = Deferred()
        self._jobs.append((job, done))
        self._go_on()
        return done

    def close(self) -> Deferred[None]:
        closed: Deferred[None] = Deferred()
        self._closed = closed
        self._go_on()
        return closed

    def _go_on(self) -> None:
        if self._busy:
            return
        if self._jobs:
            self._busy = True
            self._later(0.0, self._work)
        elif self._closed is not None:
            self._post(self._closed.callback, None)
            self._closed = None

    def _work(self) -> None:
        batch, self._jobs = self._jobs, []
        if self._database.away:
            self._later(BUSY, self._refuse, batch)
        else:
            self._commit(batch)

    def _refuse(self, batch: list[tuple[Any, Deferred[Any]]]) -> None:
        error = Failure(StoreUnavailable("the simulated database is away"))
        self._answer([(done, error) for _, done in batch])

    def _commit(self, batch: list[tuple[Any, Deferred[Any]]]) -> None:
        found: list[tuple[Deferred[Any], Any]] = []
        for job, done in batch:
            results: list[Any] = []
            job(self._database.memory).addBoth(results.append)
            found.append((done, results[0]))
        self._committed()
        self._answer(found)

    def _answer(self, found: list[tuple[Deferred[Any], Any]]) -> None:
        self._busy = False
        self._post(self._fire, found)
        self._go_on()

    def _fire(self, found: list[tuple[Deferred[Any], Any]]) -> None:
        for done, result in found:
            if not done.called:
                done.callback(result)


def _nothing() -> None:
    """Do nothing."""


@define(eq=False)
class SimulatedStore:
    """The `TaskStore` of one daemon."""

    _database: Database
    _post: Later
    _later: Later
    _committed: Callable[[], object] = _nothing
    """Called when records have changed."""
    _writer: _Thread = field(init=False)
    _reader: _Thread = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._writer = _Thread(self._database, self._post, self._later, self._committed)
        self._reader = _Thread(self._database, self._post, self._later, _nothing)

    async def close(self) -> None:
        """Finish the requested operations, and accept no more."""
        await self._writer.close()
        await self._reader.close()

    def create(self, new: NewTask) -> Deferred[TaskSnapshot]:
        return self._writer.do(lambda db: db.create(new))

    def by_key(
        self, key: str, user: Principal | None, since: float
    ) -> Deferred[TaskSnapshot | None]:
        return self._writer.do(lambda db: db.by_key(key, user, since))

    def reserve(self, number: int) -> Deferred[int]:
        return self._writer.do(lambda db: db.reserve(number))

    def save(self, snapshot: TaskSnapshot) -> Deferred[None]:
        return self._writer.do(lambda db: db.save(snapshot))

    def take_up(self) -> Deferred[list[TaskSnapshot]]:
        return self._writer.do(lambda db: db.take_up())

    def reading(self) -> Deferred[Reading | None]:
        return self._writer.do(lambda db: db.reading())

    def keep_reading(self, reading: Reading) -> Deferred[None]:
        return self._writer.do(lambda db: db.keep_reading(reading))

    def newest_time(self) -> Deferred[float | None]:
        return self._writer.do(lambda db: db.newest_time())

    def forget(self, task_ids: Sequence[int]) -> Deferred[None]:
        return self._writer.do(lambda db: db.forget(task_ids))

    def load(self, task_id: int) -> Deferred[TaskSnapshot]:
        return self._reader.do(lambda db: db.load(task_id))

    def select(self, query: TaskQuery) -> Deferred[list[TaskSnapshot]]:
        return self._reader.do(lambda db: db.select(query))

    def search(self, query: TaskQuery) -> Deferred[Found]:
        return self._reader.do(lambda db: db.search(query))

    def read(self, numbers: Sequence[int]) -> Deferred[Found]:
        return self._reader.do(lambda db: db.read(numbers))

    def after(self, task_id: int, within: Within = None) -> Deferred[TaskSnapshot | None]:
        return self._reader.do(lambda db: db.after(task_id, within))

    def last_change(self) -> Deferred[tuple[int, int]]:
        return self._reader.do(lambda db: db.last_change())

    def news(self, since: int, known: int, limit: int) -> Deferred[News]:
        return self._reader.do(lambda db: db.news(since, known, limit))

    def expired(self, keep: Keep, steady: float, limit: int) -> Deferred[list[int]]:
        return self._reader.do(lambda db: db.expired(keep, steady, limit))

    def forgotten(self) -> Deferred[set[int]]:
        return self._writer.do(lambda db: db.forgotten())

    def cleared(self, task_ids: Sequence[int]) -> Deferred[None]:
        return self._writer.do(lambda db: db.cleared(task_ids))


_: type[TaskStore] = SimulatedStore
