"""Keeps one row for each task in SQLite, in threads of its own; never any output."""

import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path

from attrs import asdict, define, field
from twisted.internet.defer import Deferred

from pulsar_api.errors import UnknownTask
from pulsar_api.principal import Principal
from pulsar_api.storage import sqlite
from pulsar_api.storage.conditions import condition, within_condition
from pulsar_api.storage.expiry import EXPIRED, expired_values
from pulsar_api.storage.rows import (
    INSERT,
    UPDATE,
    first_of,
    name_and_key,
    new_values_of,
    page_of,
    snapshot_of,
    some_of,
    values_of,
)
from pulsar_api.storage.schema import MAX_INTEGER, SCHEMA
from pulsar_api.storage.sqlite import DatabaseThread
from pulsar_api.tasks.interfaces import RESTART, Keep, NewTask, Reading
from pulsar_api.tasks.model import (
    Found,
    News,
    TaskQuery,
    TaskSnapshot,
    Within,
)

_WINDOW = 1000  # tasks that are searched before the next search is served
_AT_ONCE = 16  # jobs that a reader does before it reports their results


def _count(db: sqlite3.Connection) -> int:
    """Return the number of the next change; it is never given again."""
    rows = db.execute("UPDATE counter SET change = change + 1 RETURNING change")
    number: int = rows.fetchone()[0]
    return number


def _last_change(db: sqlite3.Connection) -> int:
    number: int = db.execute("SELECT change FROM counter").fetchone()[0]
    return number


def prepare(path: Path) -> None:
    """Create the database of tasks, or upgrade it.

    Raises `StoreUnavailable` if it cannot be used.
    """
    sqlite.prepare(path, SCHEMA)


@define(eq=False)
class SQLiteStore:
    """The `TaskStore` of one daemon. Call `close` to end its threads.

    ``from_thread`` runs a function in the thread of the reactor (`callFromThread`).
    """

    _path: Path
    _from_thread: Callable[..., object]
    _writer: DatabaseThread = field(init=False)
    _reader: DatabaseThread = field(init=False)
    """Does quick queries."""
    _searcher: DatabaseThread = field(init=False)
    """Searches for tasks step by step, and reads the pages of lists."""
    _keeper: DatabaseThread = field(init=False)
    """Looks for expired tasks, which may take a while."""
    _change: int = field(default=0, init=False)
    """The number of the newest change that is on disk."""

    def __attrs_post_init__(self) -> None:
        prepare(self._path)
        check = self._check
        self._writer = DatabaseThread(self._path, self._from_thread, check, self._note)
        self._reader = DatabaseThread(self._path, self._from_thread, check, most=_AT_ONCE)
        self._searcher = DatabaseThread(self._path, self._from_thread, check, most=1)
        self._keeper = DatabaseThread(self._path, self._from_thread, check)

    def _note(self, db: sqlite3.Connection) -> None:
        self._change = _last_change(db)

    def _check(self, db: sqlite3.Connection) -> None:
        """Raise `sqlite3.OperationalError` if an older database has replaced the file."""
        known = self._change  # before: the writer may add a change meanwhile
        if _last_change(db) < known:
            text = f"{self._path} was replaced by an older one: start the daemon again"
            raise sqlite3.OperationalError(text)

    async def close(self) -> None:
        """Finish all jobs and end the threads."""
        for thread in (self._writer, self._reader, self._searcher, self._keeper):
            await thread.close()

    def create(self, new: NewTask) -> Deferred[TaskSnapshot]:
        """Record a new task; its number is higher than any before, for ever."""
        values = new_values_of(new)

        def job(db: sqlite3.Connection) -> TaskSnapshot:
            cursor = db.execute(INSERT, {**values, "change": _count(db)})
            assert cursor.lastrowid is not None
            return TaskSnapshot(
                cursor.lastrowid,
                new.spec,
                new.created_at,
                secret_file=new.secret_file,
                notes=new.notes,
                created_steady=new.steady,
            )

        return self._writer.do(job)

    def by_key(
        self, key: str, user: Principal | None, since: float
    ) -> Deferred[TaskSnapshot | None]:
        """Fire with the newest task that this user has created with a key since then."""
        text = (
            "SELECT * FROM task WHERE idempotency_key = ? AND created_steady > ?"
            # Records of earlier versions have only the name.
            " AND CASE WHEN user_key IS NULL THEN user IS ? ELSE user_key = ? END"
            " ORDER BY id DESC LIMIT 1"
        )
        values = (key, since, *name_and_key(user))
        # By the writer: it knows every task that was ever answered, in order.
        return self._writer.do(lambda db: first_of(db.execute(text, values)))

    def reserve(self, number: int) -> Deferred[int]:
        """Give no new task this number or a lower one; fires with the newest number."""

        def job(db: sqlite3.Connection) -> int:
            db.execute(
                "INSERT INTO sqlite_sequence (name, seq) SELECT 'task', 0"
                " WHERE NOT EXISTS (SELECT 1 FROM sqlite_sequence WHERE name = 'task')"
            )
            found = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'task'")
            given: int = found.fetchone()[0]
            db.execute(
                "UPDATE sqlite_sequence SET seq = ? WHERE name = 'task'",
                (max(number, given),),
            )
            return given

        return self._writer.do(job)

    def save(self, snapshot: TaskSnapshot) -> Deferred[None]:
        """Record the state of a task; an older state never replaces a newer one."""
        values = values_of(snapshot)

        def job(db: sqlite3.Connection) -> None:
            db.execute(UPDATE, {**values, "change": _count(db)})

        return self._writer.do(job)

    def load(self, task_id: int) -> Deferred[TaskSnapshot]:
        """Fire with the record of a task, or fail with `UnknownTask`."""

        def job(db: sqlite3.Connection) -> TaskSnapshot:
            row = db.execute("SELECT * FROM task WHERE id = ?", (task_id,)).fetchone()
            if row is None:
                raise UnknownTask(str(task_id))
            return snapshot_of(row)

        return self._reader.do(job)

    def search(self, query: TaskQuery) -> Deferred[Found]:
        """Fire with the tasks that match, newest first: some tasks, and further numbers."""
        if not query.quick:
            return Deferred.fromCoroutine(self._search(query))
        where, values = condition(query)
        text = (
            f"SELECT id FROM task WHERE id < ? AND {where}"  # noqa: S608
            " ORDER BY id DESC LIMIT ? OFFSET ?"
        )
        before = MAX_INTEGER if query.before is None else query.before
        values = [before, *values, query.limit, query.offset]
        return self._reader.do(
            lambda db: page_of(db, [row["id"] for row in db.execute(text, values)])
        )

    async def _search(self, query: TaskQuery) -> Found:
        """Search `_WINDOW` tasks at a time; other searches are served in between."""
        where, values = condition(query)
        text = (
            f"SELECT id FROM task WHERE id < ? AND id >= ? AND {where}"  # noqa: S608
            " ORDER BY id DESC LIMIT ?"
        )
        numbers: list[int] = []
        before = MAX_INTEGER if query.before is None else query.before
        most = query.offset + query.limit

        def some(db: sqlite3.Connection) -> tuple[list[int], int]:
            last = "SELECT id FROM task WHERE id < ? ORDER BY id DESC LIMIT 1 OFFSET ?"
            row = db.execute(last, (before, _WINDOW - 1)).fetchone()
            begin = 0 if row is None else row["id"]
            rows = db.execute(text, (before, begin, *values, most - len(numbers)))
            return [row["id"] for row in rows], begin

        while before and len(numbers) < most:
            found, before = await self._searcher.do(some)
            numbers += found
        return await self.read(numbers[query.offset :])

    def read(self, numbers: Sequence[int]) -> Deferred[Found]:
        """Fire with the first of these tasks, without those that have been removed."""
        return self._searcher.do(lambda db: page_of(db, numbers))

    def select(self, query: TaskQuery) -> Deferred[list[TaskSnapshot]]:
        """Fire with all tasks that match, newest first, however large they are."""
        return Deferred.fromCoroutine(self._select(query))

    async def _select(self, query: TaskQuery) -> list[TaskSnapshot]:
        found = await self.search(query)
        tasks = list(found.tasks)
        while found.rest:
            found = await self.read(found.rest)
            tasks += found.tasks
        return tasks

    def after(self, task_id: int, within: Within = None) -> Deferred[TaskSnapshot | None]:
        """Fire with the oldest task with a higher number, or None."""
        if within is not None:
            return Deferred.fromCoroutine(self._after(task_id, within))
        text = "SELECT * FROM task WHERE id > ? ORDER BY id LIMIT 1"
        return self._reader.do(lambda db: first_of(db.execute(text, (task_id,))))

    async def _after(self, task_id: int, within: Within) -> TaskSnapshot | None:
        where, globs = within_condition(within)
        text = (
            f"SELECT * FROM task WHERE id > ? AND id <= ? AND {where}"  # noqa: S608
            " ORDER BY id LIMIT 1"
        )
        seen = task_id

        def some(db: sqlite3.Connection) -> tuple[TaskSnapshot | None, int]:
            last = "SELECT id FROM task WHERE id > ? ORDER BY id LIMIT 1 OFFSET ?"
            row = db.execute(last, (seen, _WINDOW - 1)).fetchone()
            end = MAX_INTEGER if row is None else row["id"]
            return first_of(db.execute(text, (seen, end, *globs))), end

        found = None
        while found is None and seen < MAX_INTEGER:
            found, seen = await self._searcher.do(some)
        return found

    def last_change(self) -> Deferred[tuple[int, int]]:
        """Fire with the numbers of the newest change and of the newest task."""
        text = "SELECT change, (SELECT coalesce(max(id), 0) FROM task) FROM counter"
        return self._reader.do(lambda db: tuple(db.execute(text).fetchone()))

    def news(self, since: int, known: int, limit: int) -> Deferred[News]:
        """Fire with the records that follow a given change and a given task."""
        new = "SELECT * FROM task WHERE id > ? ORDER BY id LIMIT ?"
        changed = (
            "SELECT * FROM task WHERE change > ? AND revision > 1 ORDER BY change LIMIT ?"
        )

        def job(db: sqlite3.Connection) -> News:
            rows, more = some_of(db.execute(new, (known, limit)), limit)
            created = [snapshot_of(row) for row in rows]
            if more:
                return News(created, [], more)
            rows, more = some_of(db.execute(changed, (since, limit)), limit)
            return News(created, [(row["change"], snapshot_of(row)) for row in rows], more)

        return self._reader.do(job)

    def take_up(self) -> Deferred[list[TaskSnapshot]]:
        """Fire with the tasks that have not ended or hold their target, oldest first."""
        which = "status IN ('created', 'running') OR held = 1"

        def job(db: sqlite3.Connection) -> list[TaskSnapshot]:
            db.execute(f"UPDATE task SET revision = revision + ? WHERE {which}", (RESTART,))  # noqa: S608
            rows = db.execute(f"SELECT * FROM task WHERE {which} ORDER BY id")  # noqa: S608
            return [snapshot_of(row) for row in rows]

        return self._writer.do(job)

    def reading(self) -> Deferred[Reading | None]:
        """Fire with the last reading of the clocks, or None."""

        def job(db: sqlite3.Connection) -> Reading | None:
            row = db.execute("SELECT * FROM reading").fetchone()
            return None if row is None else Reading(**dict(row))

        return self._writer.do(job)

    def keep_reading(self, reading: Reading) -> Deferred[None]:
        """Keep a reading of the clocks in place of the last one."""

        def job(db: sqlite3.Connection) -> None:
            db.execute("DELETE FROM reading")
            text = "INSERT INTO reading VALUES (:boot, :uptime, :wall, :steady, :place)"
            db.execute(text, asdict(reading))

        return self._writer.do(job)

    def newest_time(self) -> Deferred[float | None]:
        """Fire with the newest time in any record."""
        text = "SELECT max(max(created_at, coalesce(ended_at, 0))) FROM task"
        return self._writer.do(lambda db: db.execute(text).fetchone()[0])

    def expired(self, keep: Keep, steady: float, limit: int) -> Deferred[list[int]]:
        """Fire with the numbers of ended tasks that need not be kept, oldest first."""
        values = expired_values(keep, steady, limit)
        return self._keeper.do(
            lambda db: [row["id"] for row in db.execute(EXPIRED, values)]
        )

    def forget(self, task_ids: Sequence[int]) -> Deferred[None]:
        """Remove records of ended tasks; their numbers are not used again."""

        def job(db: sqlite3.Connection) -> None:
            numbers = [(number,) for number in task_ids]
            which = "FROM task WHERE id = ? AND ended_at IS NOT NULL AND held = 0"
            db.executemany(f"INSERT OR IGNORE INTO removed SELECT id {which}", numbers)
            db.executemany(f"DELETE {which}", numbers)

        return self._writer.do(job)

    def forgotten(self) -> Deferred[set[int]]:
        """Fire with the numbers of removed records, without those that were `cleared`."""
        text = "SELECT id FROM removed"
        return self._writer.do(lambda db: {row["id"] for row in db.execute(text)})

    def cleared(self, task_ids: Sequence[int]) -> Deferred[None]:
        """Note that nothing is left of tasks whose records were removed."""

        def job(db: sqlite3.Connection) -> None:
            numbers = [(number,) for number in task_ids]
            db.executemany("DELETE FROM removed WHERE id = ?", numbers)

        return self._writer.do(job)
