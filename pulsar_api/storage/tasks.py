"""Keeps one row per task in SQLite, in threads of its own; never any output."""

import json
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from attrs import asdict, astuple, define, field
from twisted.internet.defer import Deferred

from pulsar_api.errors import UnknownTask
from pulsar_api.principal import Principal
from pulsar_api.storage import sqlite
from pulsar_api.storage.sqlite import DatabaseThread
from pulsar_api.tasks.interfaces import RESTART, Keep, NewTask, Reading
from pulsar_api.tasks.model import (
    KEY_LIFE,
    Found,
    News,
    Process,
    Status,
    TaskQuery,
    TaskSnapshot,
    TaskSpec,
    Within,
)

MAX_SIZE = 2**63 - 1
PAGE = 1 << 17
"""Characters of tasks, at least, that are read at a time."""
_ROWS = 100  # tasks that are read at a time
_WINDOW = 1000  # tasks that are looked at before somebody else's search has its turn
_AT_ONCE = 16  # jobs after which a reader tells their results
_MOST_TARGETS = 50

T = TypeVar("T")

# One script per version; never edit one that was released, add another.
_SCHEMA = [
    """
    CREATE TABLE task (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        revision INTEGER NOT NULL,
        status TEXT NOT NULL,
        app TEXT NOT NULL,
        env TEXT NOT NULL,
        action TEXT NOT NULL,
        variables TEXT NOT NULL,
        user TEXT,
        command TEXT NOT NULL,
        pid INTEGER,
        exit_code INTEGER,
        signal TEXT,
        reason TEXT,
        killed_by TEXT,
        created_at REAL NOT NULL,
        started_at REAL,
        ended_at REAL,
        output_size INTEGER NOT NULL
    ) STRICT;
    CREATE INDEX task_unfinished ON task (id) WHERE status IN ('created', 'running');
    CREATE INDEX task_target ON task (app, env, id);
    """,
    """
    ALTER TABLE task ADD COLUMN idempotency_key TEXT;
    CREATE INDEX task_key ON task (idempotency_key) WHERE idempotency_key IS NOT NULL;
    ALTER TABLE task ADD COLUMN change INTEGER NOT NULL DEFAULT 0;
    CREATE INDEX task_change ON task (change);
    CREATE TABLE counter (change INTEGER NOT NULL) STRICT;
    INSERT INTO counter VALUES (0);
    """,
    "ALTER TABLE task ADD COLUMN secret_names TEXT NOT NULL DEFAULT '[]'",
    """
    ALTER TABLE task ADD COLUMN index_size INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE task ADD COLUMN permit TEXT;
    ALTER TABLE task ADD COLUMN secret_file TEXT;
    ALTER TABLE task ADD COLUMN still_running TEXT NOT NULL DEFAULT '[]';
    ALTER TABLE task ADD COLUMN held INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE task ADD COLUMN notes TEXT NOT NULL DEFAULT '[]';
    ALTER TABLE task ADD COLUMN created_steady REAL;
    ALTER TABLE task ADD COLUMN ended_steady REAL;
    UPDATE task SET created_steady = created_at, ended_steady = ended_at;
    CREATE INDEX task_held ON task (id) WHERE held = 1;
    CREATE TABLE reading (
        boot TEXT NOT NULL,
        uptime REAL NOT NULL,
        wall REAL NOT NULL,
        steady REAL NOT NULL,
        place TEXT NOT NULL
    ) STRICT;
    CREATE TABLE removed (id INTEGER PRIMARY KEY) STRICT;
    """,
    """
    ALTER TABLE task ADD COLUMN user_key TEXT;
    ALTER TABLE task ADD COLUMN killer_key TEXT;
    """,
    """
    ALTER TABLE task ADD COLUMN cpu_seconds REAL;
    ALTER TABLE task ADD COLUMN memory_peak INTEGER;
    """,
]

_PLAIN = (
    "revision status command pid exit_code signal reason started_at ended_at "
    "output_size index_size permit secret_file held ended_steady cpu_seconds memory_peak"
).split()
_COLUMNS = [*_PLAIN, "still_running", "notes", "killed_by", "killer_key"]
_UPDATE = (
    f"UPDATE task SET {', '.join(f'{name} = :{name}' for name in _COLUMNS)}, "  # noqa: S608
    "change = :change WHERE id = :id AND revision <= :revision"
)

# Not LIKE, for which some characters are wild; both know the letters of ASCII only.
_HOLDERS = "app env action user".split()
_PLACE = "app env action".split()
_HOLDS = f"({' OR '.join(f'instr(lower({name}), ?)' for name in _HOLDERS)})"


def _snapshot(row: sqlite3.Row) -> TaskSnapshot:
    variables = json.loads(row["variables"])
    secret = frozenset(json.loads(row["secret_names"]))
    user = _principal(row["user"], row["user_key"])
    spec = TaskSpec(row["app"], row["env"], row["action"], variables, user, secret)
    rest = {name: row[name] for name in _PLAIN if name not in {"status", "held"}}
    return TaskSnapshot(
        id=row["id"],
        spec=spec,
        created_at=row["created_at"],
        created_steady=row["created_steady"],
        status=Status(row["status"]),
        killed_by=_principal(row["killed_by"], row["killer_key"]),
        still_running=tuple(Process(*found) for found in json.loads(row["still_running"])),
        notes=tuple(json.loads(row["notes"])),
        held=bool(row["held"]),
        **rest,
    )


def _principal(name: str | None, key: str | None) -> Principal | None:
    return None if name is None else Principal.from_key(key, name)


def _name_and_key(of: Principal | None) -> tuple[str | None, str | None]:
    return (None, None) if of is None else (of.name, of.key)


def _first(rows: Iterable[sqlite3.Row]) -> TaskSnapshot | None:
    for row in rows:
        return _snapshot(row)
    return None


def _within(targets: Within) -> tuple[str, list[str]]:
    """Return a condition, and the values for it."""
    if targets is None:
        return "1", []
    if len(targets) <= _MOST_TARGETS:
        # Half the time of what stands below, which has no bound.
        values = [_glob(glob) for target in targets for glob in target if glob != "*"]
        conditions = [
            " AND ".join(
                f"+{name} GLOB ?"
                for name, glob in zip(_PLACE, target, strict=True)
                if glob != "*"
            )
            or "1"
            for target in targets
        ]
        return f"({' OR '.join(conditions) or '0'})", values
    one = " AND ".join(
        f"{name} GLOB json_extract(target.value, '$[{number}]')"
        for number, name in enumerate(_PLACE)
    )
    text = f"EXISTS (SELECT 1 FROM json_each(?) AS target WHERE {one})"  # noqa: S608
    return text, [json.dumps([list(map(_glob, target)) for target in targets])]


def _glob(text: str) -> str:
    # A bracket would begin a set of characters.
    return text.replace("[", "[[]")


def _condition(query: TaskQuery) -> tuple[str, list[object]]:
    """Return which tasks match but for their number, and the values for it."""
    # The + keeps a look at some tasks from becoming one at all that an index has.
    plus = "" if query.quick and query.status is None else "+"
    wanted = {
        "status = ?": query.status,
        f"{plus}app = ?": query.app,
        f"{plus}env = ?": query.env,
        "user = ?": query.user,
    }
    within, globs = _within(query.within)
    texts = [within]
    values: list[object] = [*globs]
    for text, value in wanted.items():
        if value is not None:
            texts.append(text)
            values.append(value)
    if query.status in {Status.CREATED, Status.RUNNING}:
        texts.append("status IN ('created', 'running')")  # they have an index
    if query.text is not None:
        texts.append(_HOLDS)
        values += [query.text.encode().lower().decode()] * len(_HOLDERS)
    return " AND ".join(texts), values


def _size(row: sqlite3.Row) -> int:
    return len(row["variables"]) + len(row["command"])


def _some(rows: Iterable[sqlite3.Row], limit: int) -> tuple[list[sqlite3.Row], bool]:
    """Return the first of at most ``limit`` rows, and whether there may be more."""
    some = []
    size = 0
    for row in rows:
        some.append(row)
        size += _size(row)
        if size >= PAGE:
            return some, True
    return some, len(some) == limit


def _page(db: sqlite3.Connection, numbers: Sequence[int]) -> Found:
    """Read the first of these tasks."""
    tasks = []
    size = 0
    for done, number in enumerate(numbers[:_ROWS], 1):
        row = db.execute("SELECT * FROM task WHERE id = ?", (number,)).fetchone()
        if row is None:
            continue
        tasks.append(_snapshot(row))
        size += _size(row)
        if size >= PAGE:
            return Found(tasks, numbers[done:])
    return Found(tasks, numbers[_ROWS:])


def _count(db: sqlite3.Connection) -> int:
    """Return the number of the next change; it is never given again."""
    rows = db.execute("UPDATE counter SET change = change + 1 RETURNING change")
    number: int = rows.fetchone()[0]
    return number


def _last_change(db: sqlite3.Connection) -> int:
    number: int = db.execute("SELECT change FROM counter").fetchone()[0]
    return number


def _values(snapshot: TaskSnapshot) -> dict[str, object]:
    killer, killer_key = _name_and_key(snapshot.killed_by)
    return {
        "id": snapshot.id,
        **{name: getattr(snapshot, name) for name in _PLAIN},
        "killed_by": killer,
        "killer_key": killer_key,
        "still_running": json.dumps([astuple(one) for one in snapshot.still_running]),
        "notes": json.dumps(snapshot.notes),
    }


def prepare(path: Path) -> None:
    """Make the database, or bring it to this version's form; `StoreUnavailable` if not."""
    sqlite.prepare(path, _SCHEMA)


@define(eq=False)
class SQLiteStore:
    """The `TaskStore` of one daemon. ``close`` it, or its threads stay.

    ``from_thread`` runs a function in the reactor's thread (`callFromThread`).
    """

    _path: Path
    _from_thread: Callable[..., object]
    _writer: DatabaseThread = field(init=False)
    _reader: DatabaseThread = field(init=False)
    """For what takes next to no time."""
    _searcher: DatabaseThread = field(init=False)
    """Looks for tasks that match, little by little, and reads the pages of lists."""
    _keeper: DatabaseThread = field(init=False)
    """Looks for what need not be kept, which may take a while."""
    _change: int = field(default=0, init=False)
    """The number of the last change that is on disk."""

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
        """Refuse a database that was put in place of ours and knows less than it did."""
        known = self._change  # before: the writer may add a change meanwhile
        if _last_change(db) < known:
            text = f"{self._path} was replaced by an older one: start the daemon again"
            raise sqlite3.OperationalError(text)

    async def close(self) -> None:
        """Write what was given and end the threads."""
        for thread in (self._writer, self._reader, self._searcher, self._keeper):
            await thread.close()

    def create(self, new: NewTask) -> Deferred[TaskSnapshot]:
        """Record a new task; its number is higher than any before, for ever."""
        spec = new.spec

        def job(db: sqlite3.Connection) -> TaskSnapshot:
            cursor = db.execute(
                "INSERT INTO task (revision, status, app, env, action, variables, user,"
                " user_key, secret_names, secret_file, command, created_at, created_steady,"
                " output_size, idempotency_key, notes, change)"
                " VALUES (1, ?, ?, ?, ?, ?, ?, ?, ?, ?, '', ?, ?, 0, ?, ?, ?)",
                (
                    Status.CREATED,
                    spec.app,
                    spec.env,
                    spec.action,
                    json.dumps(dict(spec.variables)),
                    *_name_and_key(spec.user),
                    json.dumps(sorted(spec.secret_names)),
                    new.secret_file,
                    new.created_at,
                    new.steady,
                    new.key,
                    json.dumps(new.notes),
                    _count(db),
                ),
            )
            assert cursor.lastrowid is not None
            return TaskSnapshot(
                cursor.lastrowid,
                spec,
                new.created_at,
                secret_file=new.secret_file,
                notes=new.notes,
                created_steady=new.steady,
            )

        return self._writer.do(job)

    def by_key(
        self, key: str, user: Principal | None, since: float
    ) -> Deferred[TaskSnapshot | None]:
        """Fire with the newest task with this key of a user that was created since."""
        text = (
            "SELECT * FROM task WHERE idempotency_key = ? AND created_steady > ?"
            # Records of earlier versions have only the name.
            " AND CASE WHEN user_key IS NULL THEN user IS ? ELSE user_key = ? END"
            " ORDER BY id DESC LIMIT 1"
        )
        values = (key, since, *_name_and_key(user))
        # By the writer: it has all that was answered, in order.
        return self._writer.do(lambda db: _first(db.execute(text, values)))

    def reserve(self, number: int) -> Deferred[int]:
        """Give no task this number or a lower one; fires with the last one given."""

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
        """Record how a task stands now; an older record never replaces a newer one."""
        values = _values(snapshot)

        def job(db: sqlite3.Connection) -> None:
            db.execute(_UPDATE, {**values, "change": _count(db)})

        return self._writer.do(job)

    def load(self, task_id: int) -> Deferred[TaskSnapshot]:
        """Fire with a task's record, or fail with `UnknownTask`."""

        def job(db: sqlite3.Connection) -> TaskSnapshot:
            row = db.execute("SELECT * FROM task WHERE id = ?", (task_id,)).fetchone()
            if row is None:
                raise UnknownTask(str(task_id))
            return _snapshot(row)

        return self._reader.do(job)

    def search(self, query: TaskQuery) -> Deferred[Found]:
        """Fire with the tasks that match, newest first: some of them, and which more."""
        if not query.quick:
            return Deferred.fromCoroutine(self._search(query))
        where, values = _condition(query)
        text = (
            f"SELECT id FROM task WHERE id < ? AND {where}"  # noqa: S608
            " ORDER BY id DESC LIMIT ? OFFSET ?"
        )
        before = MAX_SIZE if query.before is None else query.before
        values = [before, *values, query.limit, query.offset]
        return self._reader.do(
            lambda db: _page(db, [row["id"] for row in db.execute(text, values)])
        )

    async def _search(self, query: TaskQuery) -> Found:
        """Look at some tasks after the other, so that other searches have their turn."""
        where, values = _condition(query)
        text = (
            f"SELECT id FROM task WHERE id < ? AND id >= ? AND {where}"  # noqa: S608
            " ORDER BY id DESC LIMIT ?"
        )
        numbers: list[int] = []
        before = MAX_SIZE if query.before is None else query.before
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
        """Fire with the first of these tasks; those that are no more are left out."""
        return self._searcher.do(lambda db: _page(db, numbers))

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
        """Fire with the oldest task whose number is higher, or None."""
        if within is not None:
            return Deferred.fromCoroutine(self._after(task_id, within))
        text = "SELECT * FROM task WHERE id > ? ORDER BY id LIMIT 1"
        return self._reader.do(lambda db: _first(db.execute(text, (task_id,))))

    async def _after(self, task_id: int, within: Within) -> TaskSnapshot | None:
        where, globs = _within(within)
        text = (
            f"SELECT * FROM task WHERE id > ? AND id <= ? AND {where}"  # noqa: S608
            " ORDER BY id LIMIT 1"
        )
        seen = task_id

        def some(db: sqlite3.Connection) -> tuple[TaskSnapshot | None, int]:
            last = "SELECT id FROM task WHERE id > ? ORDER BY id LIMIT 1 OFFSET ?"
            row = db.execute(last, (seen, _WINDOW - 1)).fetchone()
            end = MAX_SIZE if row is None else row["id"]
            return _first(db.execute(text, (seen, end, *globs))), end

        found = None
        while found is None and seen < MAX_SIZE:
            found, seen = await self._searcher.do(some)
        return found

    def last_change(self) -> Deferred[tuple[int, int]]:
        """Fire with the numbers of the last change and of the newest task."""
        text = "SELECT change, (SELECT coalesce(max(id), 0) FROM task) FROM counter"
        return self._reader.do(lambda db: tuple(db.execute(text).fetchone()))

    def news(self, since: int, known: int, limit: int) -> Deferred[News]:
        """Fire with what has been recorded since a change and a task."""
        new = "SELECT * FROM task WHERE id > ? ORDER BY id LIMIT ?"
        changed = (
            "SELECT * FROM task WHERE change > ? AND revision > 1 ORDER BY change LIMIT ?"
        )

        def job(db: sqlite3.Connection) -> News:
            rows, more = _some(db.execute(new, (known, limit)), limit)
            created = [_snapshot(row) for row in rows]
            if more:
                return News(created, [], more)
            rows, more = _some(db.execute(changed, (since, limit)), limit)
            return News(created, [(row["change"], _snapshot(row)) for row in rows], more)

        return self._reader.do(job)

    def take_up(self) -> Deferred[list[TaskSnapshot]]:
        """Fire with the tasks that have not ended or hold their target, oldest first."""
        which = "status IN ('created', 'running') OR held = 1"

        def job(db: sqlite3.Connection) -> list[TaskSnapshot]:
            db.execute(f"UPDATE task SET revision = revision + ? WHERE {which}", (RESTART,))  # noqa: S608
            rows = db.execute(f"SELECT * FROM task WHERE {which} ORDER BY id")  # noqa: S608
            return [_snapshot(row) for row in rows]

        return self._writer.do(job)

    def reading(self) -> Deferred[Reading | None]:
        """Fire with the reading of the clocks that was kept last."""

        def job(db: sqlite3.Connection) -> Reading | None:
            row = db.execute("SELECT * FROM reading").fetchone()
            return None if row is None else Reading(**dict(row))

        return self._writer.do(job)

    def keep_reading(self, reading: Reading) -> Deferred[None]:
        """Keep a reading of the clocks, in place of the last."""

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
        # The youngest ones are kept until one of the bounds is reached.
        text = """
            SELECT id FROM (
                SELECT id, ended_steady, created_steady, idempotency_key, held,
                    row_number() OVER newest AS number,
                    sum(min(output_size, :most) + index_size) OVER newest AS size
                FROM task WHERE ended_at IS NOT NULL
                WINDOW newest AS (ORDER BY id DESC)
            )
            WHERE held = 0
            AND (idempotency_key IS NULL OR created_steady < :now - :key_life) AND (
                (:tasks > 0 AND number > :tasks)
                OR (:seconds > 0 AND ended_steady < :now - :seconds)
                OR (:size > 0 AND size > :size)
            )
            ORDER BY id LIMIT :limit
        """
        values = {
            "tasks": keep.tasks,
            "seconds": keep.seconds,
            "size": keep.size,
            "most": keep.most or MAX_SIZE,
            "now": steady,
            "key_life": KEY_LIFE,
            "limit": limit,
        }
        return self._keeper.do(lambda db: [row["id"] for row in db.execute(text, values)])

    def forget(self, task_ids: Sequence[int]) -> Deferred[None]:
        """Remove records of ended tasks; their numbers are not used again."""

        def job(db: sqlite3.Connection) -> None:
            numbers = [(number,) for number in task_ids]
            which = "FROM task WHERE id = ? AND ended_at IS NOT NULL AND held = 0"
            db.executemany(f"INSERT OR IGNORE INTO removed SELECT id {which}", numbers)
            db.executemany(f"DELETE {which}", numbers)

        return self._writer.do(job)

    def forgotten(self) -> Deferred[set[int]]:
        """Fire with the numbers of removed records, but for those that are `cleared`."""
        text = "SELECT id FROM removed"
        return self._writer.do(lambda db: {row["id"] for row in db.execute(text)})

    def cleared(self, task_ids: Sequence[int]) -> Deferred[None]:
        """Note that nothing is left of tasks whose records were removed."""

        def job(db: sqlite3.Connection) -> None:
            numbers = [(number,) for number in task_ids]
            db.executemany("DELETE FROM removed WHERE id = ?", numbers)

        return self._writer.do(job)

    def _rows(self, text: str, *values: object) -> Deferred[list[TaskSnapshot]]:
        def job(db: sqlite3.Connection) -> list[TaskSnapshot]:
            return [_snapshot(row) for row in db.execute(text, values)]

        return self._reader.do(job)
