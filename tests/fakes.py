"""Verified fakes: the contract tests check that they behave like the real ones."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from fnmatch import fnmatchcase

from attrs import define, evolve, field
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.interfaces import IReactorTime

from pulsar_api.errors import FolderInUse, StoreUnavailable, UnknownTask
from pulsar_api.principal import Principal
from pulsar_api.tasks.clock import SteadyClock
from pulsar_api.tasks.interfaces import (
    RESTART,
    Bounds,
    Keep,
    NewTask,
    Reading,
    Secrets,
    Sink,
)
from pulsar_api.tasks.model import (
    KEY_LIFE,
    Cause,
    Command,
    Exit,
    Found,
    News,
    Process,
    TaskQuery,
    TaskSnapshot,
    Within,
)
from pulsar_api.tasks.secret_forms import forms

ROWS = 3
"""The most tasks that one read returns."""


def person(name: str) -> Principal:
    """Return the principal of a user with a name and a password."""
    return Principal("static", name, name)


def steady_clock(clock: IReactorTime) -> SteadyClock:
    """Return the clock for ages on a machine whose clocks all agree."""
    return SteadyClock(clock.seconds, clock.seconds, "a boot")


@define(eq=False)
class MemoryStore:
    """A `TaskStore` in memory."""

    rows: dict[int, TaskSnapshot] = field(factory=dict)
    last: int = 0
    broken: bool = False
    """While set, every call fails with `StoreUnavailable`."""
    slow: bool = False
    """While set, records wait until `finish` is called."""
    _pending: list[Deferred[None]] = field(factory=list)

    keys: dict[tuple[Principal | None, str], int] = field(factory=dict)
    changes: dict[int, int] = field(factory=dict)
    """The number of each task's last change."""
    count: int = 0
    removed: set[int] = field(factory=set)

    kept_reading: Reading | None = None

    def create(self, new: NewTask) -> Deferred[TaskSnapshot]:
        if self.broken:
            return fail(StoreUnavailable("the fake is broken"))
        self.last += 1
        if new.key is not None:
            self.keys[new.spec.user, new.key] = self.last
        snapshot = TaskSnapshot(
            self.last,
            new.spec,
            new.created_at,
            secret_file=new.secret_file,
            notes=new.notes,
            created_steady=new.steady,
        )
        self.rows[self.last] = snapshot
        self._count(self.last)
        return self._written().addCallback(lambda _: snapshot)

    def by_key(
        self, key: str, user: Principal | None, since: float
    ) -> Deferred[TaskSnapshot | None]:
        found = self.rows.get(self.keys.get((user, key), 0))
        fits = found is not None and (found.created_steady or 0) > since
        return succeed(found if fits else None)

    def reading(self) -> Deferred[Reading | None]:
        return succeed(self.kept_reading)

    def keep_reading(self, reading: Reading) -> Deferred[None]:
        if self.broken:
            return fail(StoreUnavailable("the fake is broken"))
        self.kept_reading = reading
        return succeed(None)

    def newest_time(self) -> Deferred[float | None]:
        times = [max(row.created_at, row.ended_at or 0) for row in self.rows.values()]
        return succeed(max(times, default=None))

    def expired(self, keep: Keep, steady: float, limit: int) -> Deferred[list[int]]:
        if self.broken:
            return fail(StoreUnavailable("the fake is broken"))
        found = []
        number = size = 0
        day_ago = steady - KEY_LIFE
        for row in reversed(self.rows.values()):
            if row.ended_at is None:
                continue
            number += 1
            size += min(row.output_size, keep.most or row.output_size)
            size += row.index_size
            old = keep.seconds and (row.ended_steady or 0) < steady - keep.seconds
            if (0 < keep.tasks < number or old or 0 < keep.size < size) and (
                row.id not in self.keys.values() or (row.created_steady or 0) < day_ago
            ):
                if row.held:
                    continue
                found.append(row.id)
        return succeed(sorted(found)[:limit])

    def forget(self, task_ids: Sequence[int]) -> Deferred[None]:
        for number in task_ids:
            row = self.rows.get(number)
            if row is not None and row.ended_at is not None and not row.held:
                del self.rows[number]
                self.removed.add(number)
        return succeed(None)

    def forgotten(self) -> Deferred[set[int]]:
        if self.broken:
            return fail(StoreUnavailable("the fake is broken"))
        return succeed(set(self.removed))

    def cleared(self, task_ids: Sequence[int]) -> Deferred[None]:
        self.removed -= set(task_ids)
        return succeed(None)

    def reserve(self, number: int) -> Deferred[int]:
        given, self.last = self.last, max(self.last, number)
        return succeed(given)

    def save(self, snapshot: TaskSnapshot) -> Deferred[None]:
        if self.broken:
            return fail(StoreUnavailable("the fake is broken"))
        if self.rows[snapshot.id].revision <= snapshot.revision:
            self.rows[snapshot.id] = snapshot
            self._count(snapshot.id)
        return self._written()

    def last_change(self) -> Deferred[tuple[int, int]]:
        return succeed((self.count, max(self.rows, default=0)))

    def news(self, since: int, known: int, limit: int) -> Deferred[News]:
        if self.broken:
            return fail(StoreUnavailable("the fake is broken"))
        created = [row for number, row in self.rows.items() if number > known][:limit]
        if len(created) == limit:
            return succeed(News(created, [], more=True))
        numbers = sorted((change, task_id) for task_id, change in self.changes.items())
        changed = [
            (change, self.rows[task_id])
            for change, task_id in numbers
            if change > since and task_id in self.rows and self.rows[task_id].revision > 1
        ]
        return succeed(News(created, changed[:limit], len(changed) >= limit))

    def _count(self, task_id: int) -> None:
        self.count += 1
        self.changes[task_id] = self.count

    def load(self, task_id: int) -> Deferred[TaskSnapshot]:
        if self.broken:
            return fail(StoreUnavailable("the fake is broken"))
        if task_id not in self.rows:
            return fail(UnknownTask(str(task_id)))
        return succeed(self.rows[task_id])

    def select(self, query: TaskQuery) -> Deferred[list[TaskSnapshot]]:
        wanted = {
            "status": query.status,
            "spec.app": query.app,
            "spec.env": query.env,
            "spec.user": query.user,
        }

        def fits(row: TaskSnapshot) -> bool:
            for name, value in wanted.items():
                holder, _, attribute = name.rpartition(".")
                found = getattr(row.spec if holder else row, attribute)
                if value is not None and str(found) != value:
                    return False
            before = query.before is None or row.id < query.before
            return before and _holds(row, query.text) and _is_within(row, query.within)

        found = [row for row in reversed(self.rows.values()) if fits(row)]
        return succeed(found[query.offset :][: query.limit])

    def search(self, query: TaskQuery) -> Deferred[Found]:
        found = self.select(query)
        return found.addCallback(lambda rows: _page([row.id for row in rows], self.rows))

    def read(self, numbers: Sequence[int]) -> Deferred[Found]:
        return succeed(_page(numbers, self.rows))

    def after(self, task_id: int, within: Within = None) -> Deferred[TaskSnapshot | None]:
        found = [
            row
            for number, row in self.rows.items()
            if number > task_id and _is_within(row, within)
        ]
        return succeed(found[0] if found else None)

    def take_up(self) -> Deferred[list[TaskSnapshot]]:
        for number, row in self.rows.items():
            if row.held or not row.status.ended:
                self.rows[number] = evolve(row, revision=row.revision + RESTART)
        rows = self.rows.values()
        return succeed([row for row in rows if row.held or not row.status.ended])

    def finish(self) -> None:
        """Finish the records that were made while `slow` was set."""
        pending, self._pending = self._pending, []
        for one in pending:
            one.callback(None)

    def _written(self) -> Deferred[None]:
        if not self.slow:
            return succeed(None)
        self._pending.append(Deferred())
        return self._pending[-1]


def _page(numbers: Sequence[int], rows: Mapping[int, TaskSnapshot]) -> Found:
    tasks = [rows[number] for number in numbers[:ROWS] if number in rows]
    return Found(tasks, numbers[ROWS:])


def _holds(row: TaskSnapshot, text: str | None) -> bool:
    names = (row.spec.app, row.spec.env, row.spec.action, str(row.spec.user or ""))
    # In bytes, only ASCII letters have upper and lower case.
    return text is None or any(
        text.encode().lower() in name.encode().lower() for name in names
    )


def _is_within(row: TaskSnapshot, within: Within) -> bool:
    place = (row.spec.app, row.spec.env, row.spec.action)
    return within is None or any(
        all(
            fnmatchcase(text, glob.replace("[", "[[]"))
            for text, glob in zip(place, globs, strict=True)
        )
        for globs in within
    )


@define(eq=False)
class FakeRun:
    """A run that a test drives through its sink."""

    clock: IReactorTime
    task_id: int
    sink: Sink | None
    command: Command | None
    bounds: Bounds | None
    adopted: bool
    kills: int = 0
    deaf: bool = False
    """While set, a kill has no effect, as with a program that ignores TERM."""

    def kill(self) -> None:
        self.kills += 1
        if self.kills == 1 and not self.deaf:
            self.clock.callLater(0, self.end, signal="SIGTERM", cause=Cause.KILL)

    def detach(self) -> None:
        self.sink = None

    def start(self, pid: int = 4711) -> None:
        if self.sink is not None:
            self.sink.started(pid)

    def end(self, code: int | None = None, **more: object) -> None:
        """End with an exit code, or with these fields of `Exit`."""
        sink, self.sink = self.sink, None
        if sink is not None:
            sink.ended(Exit(self.clock.seconds(), code, **more))  # type: ignore[arg-type]


@define(eq=False)
class FakeExecutor:
    """An `Executor` whose runs are driven by the test."""

    clock: IReactorTime
    runs: list[FakeRun] = field(factory=list)
    folders: set[int] = field(factory=set)
    full: bool = False
    kept_secrets: dict[str, Mapping[str, str]] = field(factory=dict)
    forgetful: bool = False
    """While set, keeping secrets fails."""
    slow: list[Deferred[None]] | None = None
    """While set, keeping secrets waits until the test fires these."""
    where: str = "0 1 2 3 4 5"
    prevented: set[int] = field(factory=set)
    allowed: set[int] = field(factory=set)
    used: set[int] = field(factory=set)
    """Tasks whose folder has files of another run."""
    begun: set[int] = field(factory=set)
    """Tasks whose shim has begun without a report."""
    alive: tuple[Process, ...] = ()
    kills_noted: dict[int, Principal] = field(factory=dict)
    forgotten: set[int] = field(factory=set)
    """Ended tasks whose secrets a start of the service has removed."""
    bug: Exception | None = None
    """Raised when a task is about to start."""
    late_bug: Exception | None = None
    """Raised when the start of a task is on record already."""

    def check(self) -> None:
        if self.full:
            raise StoreUnavailable("the fake is full", full=True)

    def place(self) -> str:
        return self.where

    def permit(self, task_id: int) -> Deferred[str]:
        if self.bug is not None:
            raise self.bug
        if task_id in self.used:
            return fail(FolderInUse(task_id))
        self.allowed.add(task_id)
        return succeed(f"permit for {task_id}")

    def start(
        self,
        task_id: int,
        command: Command,
        bounds: Bounds,
        sink: Sink,
        permit: str | None = None,
    ) -> FakeRun:
        if self.late_bug is not None:
            raise self.late_bug
        return self._keep(FakeRun(self.clock, task_id, sink, command, bounds, False))

    def adopt(
        self, task_id: int, permit: str | None, bounds: Bounds, sink: Sink
    ) -> FakeRun:
        return self._keep(FakeRun(self.clock, task_id, sink, None, bounds, True))

    def permitted(self) -> Deferred[AbstractSet[int]]:
        return succeed(set(self.allowed))

    def is_here(self, task_id: int) -> bool:
        return True

    def cgroup(self, task_id: int) -> str:
        return ""

    def prevent_start(self, task_id: int) -> bool:
        self.check()
        self.prevented.add(task_id)
        return task_id not in self.begun

    def living(self, processes: Sequence[Process]) -> Deferred[tuple[Process, ...]]:
        return succeed(tuple(one for one in processes if one in self.alive))

    def keep_secrets(
        self, secrets: Mapping[str, str], name: str | None = None
    ) -> Deferred[str]:
        if self.forgetful:
            return fail(StoreUnavailable("the fake is forgetful"))
        name = name or f"secrets-{len(self.kept_secrets)}"
        kept = name

        def keep(_: object) -> str:
            self.kept_secrets[kept] = secrets
            return kept

        written: Deferred[None] = Deferred()
        if self.slow is None:
            written.callback(None)
        else:
            self.slow.append(written)
        return written.addCallback(keep)

    def secrets(self, task_id: int, name: str | None) -> Deferred[Secrets | None]:
        if self.full:
            return fail(StoreUnavailable("the fake is full", full=True))
        values = self.kept_secrets.get(name or "")
        if values is None:
            return succeed(None)
        return succeed(Secrets(values, forms(values.values())))

    def forget_secrets(self, task_id: int, name: str | None) -> None:
        self.kept_secrets.pop(name or "", None)

    def forget_other_secrets(self, names: AbstractSet[str]) -> Deferred[None]:
        for name in set(self.kept_secrets) - set(names):
            del self.kept_secrets[name]
        return succeed(None)

    def forget_all_secrets(self, task_ids: Sequence[int]) -> Deferred[None]:
        self.forgotten |= set(task_ids)
        return succeed(None)

    def note_kill(self, task_id: int, by: Principal) -> None:
        self.kills_noted[task_id] = by

    def noted_kill(self, task_id: int) -> Principal | None:
        return self.kills_noted.get(task_id)

    def forget(self, task_ids: Sequence[int]) -> Deferred[None]:
        self.folders -= set(task_ids)
        return succeed(None)

    def kept(self) -> Deferred[list[int]]:
        return succeed(sorted(self.folders))

    def _keep(self, run: FakeRun) -> FakeRun:
        self.runs.append(run)
        self.folders.add(run.task_id)
        return run

    def run(self, task_id: int) -> FakeRun:
        """Return the newest run of a task."""
        return next(run for run in reversed(self.runs) if run.task_id == task_id)
