"""The operations on tasks: create, find, list, kill, and give targets back."""

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
"""Seconds that a stop waits for records. The next daemon finishes the rest."""

MAX_ID = 2**63 - 1


@define(eq=False)
class TaskService:
    """The tasks of one daemon.

    Call `start` before anything else. `stop` leaves running commands running.
    """

    _store: TaskStore
    _executor: Executor
    _clock: IReactorTime
    """Measures durations. Only ``_time`` knows the date, which can jump."""
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
    """The idempotency keys of requests in progress."""

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

    # -- the start and the stop of the daemon

    async def start(self) -> None:
        """Take up every task that has not ended: queue waiting tasks, adopt running ones.

        Raises:
            StoreUnavailable: The records cannot be read or written.
        """
        recovery = Recovery(
            *(self._store, self._executor, self._time),
            *(self._lifecycle, self._retention, self.created),
        )
        await recovery.take_up()

    async def stop(self, drain: float) -> None:
        """Take no new tasks, give running ones ``drain`` seconds, then detach.

        It also waits `LEAVE` seconds for records. The log names the tasks whose records the
        next daemon has to finish.
        """
        self._lifecycle.stop()
        self._retention.stop()
        # A task whose start is on record but whose process is not running yet still starts.
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
        # This reading identifies a copy of the state made from now on; see `Reading`.
        reading = Deferred.fromCoroutine(self._retention.keep_reading())
        await reading.addTimeout(LEAVE, self._clock, lambda *_: False)
        self._recorder.closed = True
        for live in active.values():
            self._lifecycle.let_go(live)
        self._recorder.end_pauses()

    async def _until(self, done: Callable[[], bool], until: float) -> None:
        """Wait until ``done`` or that time. A start or an end can change ``done``."""
        moved = self._lifecycle.moved
        while not done() and (left := until - self._clock.seconds()) > 0:
            waiter = moved.after(moved.version)
            await waiter.addTimeout(left, self._clock, lambda *_: 0)

    def release(self) -> None:
        """Wake all waiters for changes, although nothing has changed."""
        self.created.release()
        self.changed.release()
        for live in (*self._queue.waiting.values(), *self._queue.active.values()):
            live.task.changes.release()
            live.task.end.release()

    def running(self) -> Sequence[int]:
        """Return the numbers of the tasks that run or are about to run."""
        return tuple(self._queue.active)

    # -- the requests of callers

    async def create(self, spec: TaskSpec, key: str | None = None) -> Task:
        """Record a new task and start it as soon as there is room.

        With a key that was used for the same task in the last 24 hours, return that task
        and start nothing. The work goes on when the caller stops waiting.

        Raises:
            InvalidInput: A name or a value is not allowed.
            KeyReused: The key was used for another task.
            KeyInFlight: Another request with this key is in progress.
            QueueFull: There is no room for the task to wait.
            ShuttingDown: The daemon is stopping.
            StoreUnavailable: The disk cannot keep the task or its output.
        """
        return await shielded(self._create_once(spec, key))

    async def _create_once(self, asked: TaskSpec, key: str | None) -> Task:
        # From here on the secrets travel apart from the task, so that no record and no
        # response contains them.
        spec, secrets = (await self._commands()).split(asked)
        if key is None:
            return await self._create(spec, secrets, None)
        # Each user has keys of their own, so nobody can use up the keys of another user.
        owned = (spec.user, key)
        if owned in self._keys:
            raise KeyInFlight(key)
        self._keys.add(owned)
        try:
            since = self._time.steady() - KEY_LIFE
            known = await self._store.by_key(key, spec.user, since)
            if known is None:
                return await self._create(spec, secrets, key)
            # An older record has only the name of its user, not the stable id.
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
                # Secrets come before the record: a retry must find both or neither.
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
        # Before the task is announced, so that every look-up finds this object.
        self._queue.move(live, Phase.WAITING)
        self._recorder.advance()
        _log.info("Task {id} created: {it}", id=snapshot.id, it=snapshot.command)
        self._lifecycle.schedule()
        self.created.advance(max(snapshot.id, self.created.version))
        return live.task

    async def _supply(self, known: TaskSnapshot, secrets: Mapping[str, str]) -> None:
        """Give a waiting task the secrets of a retry if its own are lost."""
        if not secrets or known.status is not Status.CREATED:
            return
        name = known.secret_file
        if name is not None and await self._executor.secrets(known.id, name) is None:
            _log.warn("Task {id} takes its secrets from a retry", id=known.id)
            await self._executor.keep_secrets(secrets, name)
            live = self._queue.find(known.id)
            if live is None or live.newest.status.ended:  # it ended in the meantime
                self._executor.forget_secrets(known.id, name)

    async def find(self, task_id: int) -> Task:
        """Return a task. Raises `UnknownTask` if there is none, or `StoreUnavailable`."""
        live = self._queue.find(task_id)
        if live is not None:
            return live.task
        if not 0 < task_id <= MAX_ID:
            raise UnknownTask(str(task_id))
        while True:
            snapshot = await self._store.load(task_id)
            # The task may have been recorded or taken up while `load` was reading.
            live = self._queue.find(task_id)
            if live is None and not snapshot.status.ended and self._queue.creating:
                await self._created(task_id)
                live = self._queue.find(task_id)
            if live is not None:
                return live.task
            if snapshot.status.ended or self._recorder.closed:
                return Task(self._clock, snapshot)
            # The task ended while `load` was reading, so the snapshot is out of date.

    async def _created(self, task_id: int) -> None:
        """Wait until a task whose record is on disk is in the queue as well."""
        while self._queue.creating and self.created.version < task_id:
            await self.created.after(self.created.version)

    async def search(self, query: TaskQuery) -> Found:
        """Return the tasks that match, newest first. `read` returns further ones."""
        return await self._as_now(await self._store.search(query))

    async def read(self, numbers: Sequence[int]) -> Found:
        """Return the first of these tasks, leaving out removed ones."""
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
        """Return the oldest task within the globs that has a higher number, or None."""
        if task_id >= self.created.version:
            return None
        found = await self._store.after(task_id, within)
        return None if found is None else await self._current(found) or found

    async def listing(self, app: str, env: str) -> Command:
        """Return the command that lists the actions of an app.

        Raises `InvalidInput` for a bad name, `NoListing` if there is no such command.
        """
        return (await self._commands()).listing(app, env)

    async def last_change(self) -> tuple[int, int]:
        """Return the numbers of the last record and of the newest task, at one moment."""
        return await self._store.last_change()

    async def news(self, since: int, known: int, limit: int) -> News:
        """Return the records made since a change and a task."""
        return await self._store.news(since, known, limit)

    async def kill(self, task_id: int, by: Principal) -> Task:
        """End a task: its whole process tree, or its wait. An ended task stays as it is.

        The kill goes on when the caller stops waiting.

        Raises:
            UnknownTask: No task has this number.
            ShuttingDown: The daemon is stopping; the next one has to end the task.
        """
        return await shielded(self._kill(task_id, by))

    async def _kill(self, task_id: int, by: Principal) -> Task:
        live = self._queue.find(task_id)
        if live is None:
            return await self.find(task_id)
        if not live.kill_requested and not live.newest.status.ended:
            await self._lifecycle.kill(live, by)
        # Wait also for the kill of another caller, so that the response is true on disk.
        await self._recorder.kill_on_record(live)
        return live.task

    async def free(self, target: str, by: Principal) -> Sequence[int]:
        """Give back a target that ended tasks hold, and return the numbers of those tasks.

        Their processes go on running, and the tasks go on listing them.
        """
        return await shielded(self._free(target, by))

    async def _free(self, target: str, by: Principal) -> Sequence[int]:
        found = [e for e in self._queue.holding.values() if e.target == target]
        for live in found:
            await self._lifecycle.held.free(live, by)
        return [live.id for live in found]

    async def _current(self, snapshot: TaskSnapshot) -> TaskSnapshot | None:
        """Return the present state of a task that was read earlier, None if it is gone."""
        live = self._queue.find(snapshot.id)
        if live is not None:
            return live.task.snapshot
        if snapshot.status.ended:
            return snapshot
        with suppress(UnknownTask):
            return (await self.find(snapshot.id)).snapshot
        return None
