"""What can be done with tasks: create, find, list, kill, and give targets back."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress

from attrs import define, evolve, field
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from pulsar_api.concurrency.background import shielded
from pulsar_api.concurrency.changes import Changes
from pulsar_api.errors import (
    KeyInFlight,
    KeyReused,
    ShuttingDown,
    StoreUnavailable,
    UnknownTask,
)
from pulsar_api.principal import Principal
from pulsar_api.tasks import secret_forms
from pulsar_api.tasks.clock import SteadyClock
from pulsar_api.tasks.commands import Commands, shown
from pulsar_api.tasks.interfaces import Executor, NewTask, TaskStore
from pulsar_api.tasks.lifecycle import Lifecycle
from pulsar_api.tasks.live import Phase, Task
from pulsar_api.tasks.model import (
    KEY_LIFE,
    Command,
    Found,
    News,
    Status,
    TaskQuery,
    TaskSnapshot,
    TaskSpec,
    Within,
)
from pulsar_api.tasks.queue import Limits, Queue
from pulsar_api.tasks.recorder import Recorder
from pulsar_api.tasks.recovery import Recovery
from pulsar_api.tasks.retention import Retention

_log = Logger()

LEAVE = 5.0
"""How long, in seconds, a stop waits for records. The next daemon does the rest."""

MAX_ID = 2**63 - 1


@define(eq=False)
class TaskService:
    """The tasks of one daemon.

    ``start`` before anything else; ``stop`` leaves running commands running.
    """

    _store: TaskStore
    _executor: Executor
    _clock: IReactorTime
    """For durations. Nothing but ``time`` knows the date, which may jump."""
    _time: SteadyClock
    _commands: Callable[[], Awaitable[Commands]]
    _limits: Limits
    created: Changes = field(init=False)
    """Its version is the number of the newest task."""
    _queue: Queue = field(init=False)
    _recorder: Recorder = field(init=False)
    _retention: Retention = field(init=False)
    _lifecycle: Lifecycle = field(init=False)
    _keys: set[tuple[Principal | None, str]] = field(factory=set, init=False)
    """The idempotency keys of requests that are under way."""

    def __attrs_post_init__(self) -> None:
        self.created = Changes(self._clock)
        self._queue = Queue(self._limits)
        self._recorder = Recorder(self._store, self._clock)
        self._retention = Retention(
            self._store, self._executor, self._clock, self._time, self._limits.keep
        )
        self._lifecycle = Lifecycle(
            *(self._queue, self._recorder, self._executor, self._clock, self._time),
            *(self._commands, self._limits.bounds, self._retention),
        )

    @property
    def changed(self) -> Changes:
        """Its version grows with each record; see `news`."""
        return self._recorder.changed

    # -- from start to end of the daemon

    async def start(self) -> None:
        """Take up every task that has not ended: queue what waits, adopt what runs.

        Raises `StoreUnavailable`.
        """
        recovery = Recovery(
            *(self._store, self._executor, self._time),
            *(self._lifecycle, self._retention, self.created),
        )
        await recovery.take_up()

    async def stop(self, drain: float) -> None:
        """Take no new tasks, wait for the running ones if told to, then let them go.

        It waits `LEAVE` for records and ``drain`` seconds for tasks, not longer. The next
        daemon does what is not on record then; it is logged.
        """
        self._lifecycle.stop()
        self._retention.stop()
        # A task that is between its record and its process is started.
        leave = self._clock.seconds() + LEAVE
        self._recorder.end_pauses()
        active = self._queue.active

        def settled() -> bool:
            return all(live.phase is not Phase.STARTING for live in active.values())

        await self._until(settled, leave)
        if active and drain > 0:
            _log.info("Waiting for {n} tasks", n=len(active))
        until = self._clock.seconds() + drain
        await self._until(lambda: not active, until)
        # What is restored from a copy that is made now is known by it, see `Reading`.
        reading = Deferred.fromCoroutine(self._retention.keep_reading())
        await reading.addTimeout(LEAVE, self._clock, lambda *_: False)
        self._recorder.closed = True
        for live in active.values():
            self._lifecycle.let_go(live)
        self._recorder.end_pauses()

    async def _until(self, done: Callable[[], bool], until: float) -> None:
        """Wait until a condition holds that changes with a start or an end."""
        moved = self._lifecycle.moved
        while not done() and (left := until - self._clock.seconds()) > 0:
            waiter = moved.after(moved.version)
            await waiter.addTimeout(left, self._clock, lambda *_: 0)

    def release(self) -> None:
        """Answer everybody who waits for a change, although there is none."""
        self.created.release()
        self.changed.release()
        for live in (*self._queue.waiting.values(), *self._queue.active.values()):
            live.task.changes.release()
            live.task.end.release()

    def running(self) -> Sequence[int]:
        """Return the numbers of the tasks that run, or are about to."""
        return tuple(self._queue.active)

    # -- what callers ask for

    async def create(self, spec: TaskSpec, key: str | None = None) -> Task:
        """Record a new task and start it as soon as there is room.

        With a key that was used for the same task in the last 24 hours, return that one
        and start nothing. Raises `InvalidInput`, `KeyReused`, `KeyInFlight`, `QueueFull`,
        `ShuttingDown` or `StoreUnavailable`; then nothing was recorded. It goes on
        when the caller stops waiting.
        """
        return await shielded(self._create_once(spec, key))

    async def _create_once(self, asked: TaskSpec, key: str | None) -> Task:
        # From here on the secrets go a way of their own: no record and no answer has them.
        spec, secrets = (await self._commands()).split(asked)
        if key is None:
            return await self._create(spec, secrets, None)
        # A key is its user's: nobody can use up another's.
        owned = (spec.user, key)
        if owned in self._keys:
            raise KeyInFlight(key)
        self._keys.add(owned)
        try:
            since = self._time.steady() - KEY_LIFE
            known = await self._store.by_key(key, spec.user, since)
            if known is None:
                return await self._create(spec, secrets, key)
            # Of an older record only the name of its user is known.
            if evolve(known.spec, user=spec.user) != spec:
                raise KeyReused(key)
            await self._supply(known, secrets)
            return await self.find(known.id)
        finally:
            self._keys.discard(owned)

    async def _create(
        self, spec: TaskSpec, secrets: Mapping[str, str], key: str | None
    ) -> Task:
        commands = await self._commands()
        commands.check(evolve(spec, variables={**spec.variables, **secrets}))
        if self._lifecycle.stopping:
            raise ShuttingDown
        self._executor.check()
        self._queue.check_room(spec)
        self._queue.creating.append(spec)
        secret_file = None
        try:
            if secrets:
                # Before anybody can find the task: a retry must find both or neither.
                secret_file = await self._executor.keep_secrets(secrets)
            wall, steady = self._time.wall(), self._time.steady()
            notes = tuple(secret_forms.notes(secrets))
            new = NewTask(spec, wall, steady, key, secret_file, notes)
            snapshot = await self._store.create(new)
        except StoreUnavailable:
            if secret_file is not None:
                self._executor.forget_secrets(0, secret_file)
            raise
        finally:
            self._queue.creating.remove(spec)
        snapshot = evolve(snapshot, command=shown(commands.command(spec, snapshot.id)))
        live = self._lifecycle.live(snapshot)
        # Before anybody hears of it: everybody who looks for it finds this one.
        self._queue.move(live, Phase.WAITING)
        self._recorder.advance()
        _log.info("Task {id} created: {it}", id=snapshot.id, it=snapshot.command)
        self._lifecycle.schedule()
        self.created.advance(max(snapshot.id, self.created.version))
        return live.task

    async def _supply(self, known: TaskSnapshot, secrets: Mapping[str, str]) -> None:
        """Give a task that waits the secrets of a retry, if its own are lost."""
        if not secrets or known.status is not Status.CREATED:
            return
        name = known.secret_file
        if name is not None and await self._executor.secrets(known.id, name) is None:
            _log.warn("Task {id} gets its secrets from a retry", id=known.id)
            await self._executor.keep_secrets(secrets, name)
            live = self._queue.find(known.id)
            if live is None or live.newest.status.ended:  # meanwhile
                self._executor.forget_secrets(known.id, name)

    async def find(self, task_id: int) -> Task:
        """Return a task, or raise `UnknownTask`."""
        live = self._queue.find(task_id)
        if live is not None:
            return live.task
        if not 0 < task_id <= MAX_ID:
            raise UnknownTask(str(task_id))
        while True:
            snapshot = await self._store.load(task_id)
            # It may have been recorded, or taken up, only while it was looked for.
            live = self._queue.find(task_id)
            if live is None and not snapshot.status.ended and self._queue.creating:
                await self._created(task_id)
                live = self._queue.find(task_id)
            if live is not None:
                return live.task
            if snapshot.status.ended or self._recorder.closed:
                return Task(self._clock, snapshot)
            # It has ended while it was looked for: what was read is of before.

    async def _created(self, task_id: int) -> None:
        """Wait until a task whose record is on disk is one of ours as well."""
        while self._queue.creating and self.created.version < task_id:
            await self.created.after(self.created.version)

    async def search(self, query: TaskQuery) -> Found:
        """Return the tasks that match, newest first; more of them by `read`."""
        return await self._as_now(await self._store.search(query))

    async def read(self, numbers: Sequence[int]) -> Found:
        """Return the first of these tasks; those that are no more are left out."""
        return await self._as_now(await self._store.read(numbers))

    async def _as_now(self, found: Found) -> Found:
        current = [await self._current(one) for one in found.tasks]
        return Found([one for one in current if one is not None], found.rest)

    async def list(self, query: TaskQuery) -> list[TaskSnapshot]:
        """Return all tasks that match, newest first, however large they are."""
        found = await self._store.select(query)
        current = [await self._current(one) for one in found]
        return [one for one in current if one is not None]

    async def next_after(self, task_id: int, within: Within = None) -> TaskSnapshot | None:
        """Return the oldest task that counts and whose number is higher, or None."""
        if task_id >= self.created.version:
            return None
        found = await self._store.after(task_id, within)
        return None if found is None else await self._current(found) or found

    async def listing(self, app: str, env: str) -> Command:
        """Return what lists the actions of an app, or raise `InvalidInput`, `NoListing`."""
        return (await self._commands()).listing(app, env)

    async def last_change(self) -> tuple[int, int]:
        """Return the numbers of the last record and of the newest task, at one moment."""
        return await self._store.last_change()

    async def news(self, since: int, known: int, limit: int) -> News:
        """Return what has been recorded since a change and a task."""
        return await self._store.news(since, known, limit)

    async def kill(self, task_id: int, by: Principal) -> Task:
        """End a task: its whole process tree, or its wait. An ended task stays as it is.

        It goes on when the caller stops waiting. Raises `UnknownTask`, or `ShuttingDown`
        if the next daemon has to do it.
        """
        return await shielded(self._kill(task_id, by))

    async def _kill(self, task_id: int, by: Principal) -> Task:
        live = self._queue.find(task_id)
        if live is None:
            return await self.find(task_id)
        if not live.kill_requested and not live.newest.status.ended:
            await self._lifecycle.kill(live, by)
        # Nor is the kill of somebody else forgotten that was answered.
        await self._recorder.kill_on_record(live)
        return live.task

    async def free(self, target: str, by: Principal) -> Sequence[int]:
        """Give back a target that ended tasks hold; return the numbers of those tasks.

        What still runs of them goes on running, and is listed in them.
        """
        return await shielded(self._free(target, by))

    async def _free(self, target: str, by: Principal) -> Sequence[int]:
        found = [e for e in self._queue.holding.values() if e.target == target]
        for live in found:
            await self._lifecycle.held.free(live, by)
        return [live.id for live in found]

    async def _current(self, snapshot: TaskSnapshot) -> TaskSnapshot | None:
        """Return how a task stands that was read a moment ago; None: it is removed."""
        live = self._queue.find(snapshot.id)
        if live is not None:
            return live.task.snapshot
        if snapshot.status.ended:
            return snapshot
        with suppress(UnknownTask):
            return (await self.find(snapshot.id)).snapshot
        return None
