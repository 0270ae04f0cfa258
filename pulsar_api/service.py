"""What can be done with tasks: create, find, list, kill; the queue; start and end."""

from collections.abc import Awaitable, Callable, Mapping

from attrs import define, evolve, field, frozen
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from pulsar_api.background import own, shielded
from pulsar_api.changes import Changes
from pulsar_api.command import Commands, shown
from pulsar_api.errors import (
    InvalidInput,
    KeyInFlight,
    KeyReused,
    QueueFull,
    ShuttingDown,
    StoreUnavailable,
    UnknownTask,
)
from pulsar_api.ports import Bounds, Executor, Keep, Run, TaskStore
from pulsar_api.retention import Retention
from pulsar_api.task import (
    KEY_LIFE,
    Command,
    Exit,
    News,
    Status,
    Task,
    TaskQuery,
    TaskSnapshot,
    TaskSpec,
    Within,
    judge,
)

_log = Logger()

RETRY = 1.0
"""Seconds until the next try when the store is not usable."""

MAX_ID = 2**63 - 1

_RESTART = 1000  # more revisions than one daemon ever announces without saving


@frozen
class Limits:
    """How much at the same time, and how long each."""

    bounds: Bounds
    running: int = 16
    running_per_target: int = 0
    queued: int = 1000
    keep: Keep = Keep()


@define(eq=False)
class _Live:
    """A task that has not ended: its newest record, which may not be on disk yet."""

    service: "TaskService"
    task: Task
    newest: TaskSnapshot
    run: Run | None = None
    kill: bool = False

    # What a run tells (`Sink`).

    def started(self, pid: int) -> None:
        if self.newest.pid is None:
            self.newest = self.changed(pid=pid)
            self.task.announce(self.newest)

    def printed(self, size: int) -> None:
        self.task.printed(size)

    def ended(self, exit: Exit) -> None:
        self.service.ended(self, exit)

    def changed(self, **new: object) -> TaskSnapshot:
        size = max(self.newest.output_size, self.task.snapshot.output_size)
        fields = {"output_size": size, "revision": self.newest.revision + 1, **new}
        return evolve(self.newest, **fields)  # type: ignore[arg-type]


@define(eq=False)
class TaskService:
    """The tasks of one daemon.

    ``start`` before anything else; ``stop`` leaves running commands running.
    """

    _store: TaskStore
    _executor: Executor
    _clock: IReactorTime
    """For durations. Nothing but ``now`` knows the date, which may jump."""
    _now: Callable[[], float]
    """The seconds since the epoch."""
    _commands: Callable[[], Awaitable[Commands]]
    _limits: Limits
    created: Changes = field(init=False)
    """Its version is the number of the newest task."""
    changed: Changes = field(init=False)
    """Its version grows with each record; see `news`."""
    _waiting: dict[int, _Live] = field(factory=dict, init=False)
    _running: dict[int, _Live] = field(factory=dict, init=False)
    _creating: list[str] = field(factory=list, init=False)
    _keys: set[tuple[str | None, str]] = field(factory=set, init=False)
    _retention: Retention = field(init=False)
    _stopping: bool = field(default=False, init=False)
    _moved: Changes = field(init=False)
    """Its version grows whenever a run has started or ended."""

    def __attrs_post_init__(self) -> None:
        self.created = Changes(self._clock)
        self.changed = Changes(self._clock)
        self._moved = Changes(self._clock)
        self._retention = Retention(
            self._store, self._executor, self._clock, self._now, self._limits.keep
        )

    # -- from start to end of the daemon

    async def start(self) -> None:
        """Take up every task that has not ended: queue what waits, adopt what runs."""
        newest = await self._store.select(TaskQuery(limit=1))
        highest = newest[0].id if newest else 0
        # A database that somebody has set aside knows nothing of what is there: no new
        # task may get the folder of an old one.
        kept = await self._executor.kept()
        await self._store.reserve(max(kept, default=0))
        self.created.advance(highest)
        for found in await self._store.unfinished():
            # A change, beyond any that was announced and not saved: whoever waits with a
            # version from before is answered at once.
            snapshot = evolve(found, revision=found.revision + _RESTART, pid=None)
            live = _Live(self, Task(self._clock, snapshot), snapshot)
            if snapshot.status is Status.CREATED and snapshot.killed_by is not None:
                self._running[snapshot.id] = live
                own(self._killed_waiting(live))
            elif snapshot.status is Status.CREATED:
                self._waiting[snapshot.id] = live
            else:
                self._adopt(live)
        self._schedule()
        self._retention.start([number for number in kept if number <= highest])

    def _adopt(self, live: _Live) -> None:
        live.kill = live.newest.killed_by is not None
        self._running[live.newest.id] = live
        live.run = self._executor.adopt(live.newest.id, live)
        if live.kill:
            live.run.kill()
        _log.info("Task {id} goes on", id=live.newest.id)

    async def stop(self, drain: float) -> None:
        """Take no new tasks, wait for the running ones if told to, then let them go."""
        self._stopping = True
        self._retention.stop()
        # One that is between its record and its process goes back to the queue.
        while any(live.run is None for live in self._running.values()):
            await self._moved.after(self._moved.version)
        until = self._clock.seconds() + drain
        while self._running and (left := until - self._clock.seconds()) > 0:
            _log.info("Waiting for {n} tasks", n=len(self._running))
            moved = self._moved.after(self._moved.version)
            await moved.addTimeout(left, self._clock, lambda *_: 0)
        for live in self._running.values():
            if live.run is not None:
                live.run.detach()
            _log.info("Task {id} is left running", id=live.newest.id)
            live.task.settle()

    def release(self) -> None:
        """Let everybody who waits for a change go, without one."""
        self.created.release()
        self.changed.release()
        for live in (*self._waiting.values(), *self._running.values()):
            live.task.changes.release()
            live.task.end.release()

    # -- what callers ask for

    async def create(self, spec: TaskSpec, key: str | None = None) -> Task:
        """Record a new task and start it as soon as there is room.

        With a key that was used for the same task in the last 24 hours, return that one
        and start nothing. Raises `InvalidInput`, `KeyReused`, `KeyInFlight`, `QueueFull`,
        `ShuttingDown` or `StoreUnavailable`; then nothing was recorded. It goes on when
        who asked does not wait any more.
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
            known = await self._store.by_key(key, spec.user, self._now() - KEY_LIFE)
            if known is not None and _never_could(known):
                known = None
            if known is None:
                return await self._create(spec, secrets, key)
            if known.spec != spec:
                raise KeyReused(key)
            return await self.find(known.id)
        finally:
            self._keys.discard(owned)

    async def _create(
        self, spec: TaskSpec, secrets: Mapping[str, str], key: str | None
    ) -> Task:
        commands = await self._commands()
        commands.check(evolve(spec, variables={**spec.variables, **secrets}))
        if self._stopping:
            raise ShuttingDown
        self._executor.check()
        if not self._room_for(spec.target):
            raise QueueFull(self._limits.queued)
        self._creating.append(spec.target)
        why = None
        try:
            snapshot = await self._store.create(spec, self._now(), key)
            if secrets:
                why = await self._keep_secrets(snapshot.id, secrets)
        finally:
            self._creating.remove(spec.target)
        command = commands.command(spec, snapshot.id)
        snapshot = evolve(snapshot, command=shown(command))
        live = _Live(self, Task(self._clock, snapshot), snapshot)
        # Before anybody hears of it: whoever looks for it finds this one.
        (self._waiting if why is None else self._running)[snapshot.id] = live
        self.changed.advance(self.changed.version + 1)
        _log.info("Task {id} created: {it}", id=snapshot.id, it=snapshot.command)
        if why is None:
            self._schedule()
        else:
            own(self._finish(live, status=Status.FAILED, reason=why))
        self.created.advance(max(snapshot.id, self.created.version))
        return live.task

    async def _keep_secrets(self, task_id: int, secrets: Mapping[str, str]) -> str | None:
        """Keep them until the task starts; return why it cannot, or None."""
        try:
            await self._executor.keep_secrets(task_id, secrets)
        except StoreUnavailable as e:
            return f"Cannot start: its secret variables could not be kept: {e.detail}"
        return None

    def _room_for(self, target: str) -> bool:
        """Return whether a task may be created: it can start, or there is room to wait."""
        if len(self._waiting) + len(self._creating) < self._limits.queued:
            return True
        busy = [live.newest.spec.target for live in self._running.values()]
        busy += self._creating
        per_target = self._limits.running_per_target or len(busy) + 1
        return len(busy) < self._limits.running and busy.count(target) < per_target

    async def find(self, task_id: int) -> Task:
        """Return a task, or raise `UnknownTask`."""
        live = self._waiting.get(task_id) or self._running.get(task_id)
        if live is not None:
            return live.task
        if not 0 < task_id <= MAX_ID:
            raise UnknownTask(str(task_id))
        snapshot = await self._store.load(task_id)
        # It may have been recorded, or taken up, only while it was looked for.
        live = self._waiting.get(task_id) or self._running.get(task_id)
        if live is None and not snapshot.status.ended and self._creating:
            await self._created(task_id)
            live = self._waiting.get(task_id) or self._running.get(task_id)
        return Task(self._clock, snapshot) if live is None else live.task

    async def _created(self, task_id: int) -> None:
        """Wait until a task whose record is on disk is one of ours as well."""
        while self._creating and self.created.version < task_id:
            await self.created.after(self.created.version)

    async def list(self, query: TaskQuery) -> list[TaskSnapshot]:
        """Return the tasks that match, newest first."""
        return [self._current(found) for found in await self._store.select(query)]

    async def next_after(self, task_id: int, within: Within = None) -> TaskSnapshot | None:
        """Return the oldest task that counts and whose number is higher, or None."""
        if task_id >= self.created.version:
            return None
        found = await self._store.after(task_id, within)
        return None if found is None else self._current(found)

    async def listing(self, app: str, env: str) -> Command:
        """Return what lists the actions of an app, or raise `InvalidInput`, `NoListing`."""
        return (await self._commands()).listing(app, env)

    async def last_change(self) -> tuple[int, int]:
        """Return the numbers of the last record and of the newest task, at one moment."""
        return await self._store.last_change()

    async def news(self, since: int, known: int, limit: int) -> News:
        """Return what has been recorded since a change and a task."""
        return await self._store.news(since, known, limit)

    async def kill(self, task_id: int, by: str) -> Task:
        """End a task: its whole process tree, or its waiting. Of an ended one: nothing.

        It goes on when who asked does not wait any more.
        """
        return await shielded(self._kill(task_id, by))

    async def _kill(self, task_id: int, by: str) -> Task:
        live = self._waiting.get(task_id) or self._running.get(task_id)
        if live is None:
            return await self.find(task_id)
        if not live.kill and not live.newest.status.ended:
            live.kill = True
            _log.info("Task {id}: kill asked for by {by}", id=task_id, by=by)
            if live.run is not None:
                live.run.kill()
            reason = f"Kill asked for by {by}."
            if self._waiting.pop(task_id, None) is not None:
                # Found there until its end is on disk.
                self._running[task_id] = live
                live.newest = live.changed(killed_by=by)
                await self._killed_waiting(live)
            else:
                await self._record(live, killed_by=by, reason=reason)
        return live.task

    # -- the life of a task

    def _current(self, snapshot: TaskSnapshot) -> TaskSnapshot:
        live = self._waiting.get(snapshot.id) or self._running.get(snapshot.id)
        return snapshot if live is None else live.task.snapshot

    def _schedule(self) -> None:
        """Start what may start, oldest first; a blocked target holds up nobody else."""
        per_target = self._limits.running_per_target or len(self._running) + 1
        busy: dict[str, int] = {}
        for live in self._running.values():
            target = live.newest.spec.target
            busy[target] = busy.get(target, 0) + 1
        for live in [] if self._stopping else list(self._waiting.values()):
            target = live.newest.spec.target
            why = None
            if len(self._running) >= self._limits.running:
                why = f"a free place: {len(self._running)} tasks are running"
            elif self._limits.running_per_target and busy.get(target, 0) >= per_target:
                why = f"the end of another task on {target}"
            if why is None:
                busy[target] = busy.get(target, 0) + 1
                del self._waiting[live.newest.id]
                self._running[live.newest.id] = live
                own(self._start(live))
            elif live.newest.waiting_for != why:
                live.newest = live.changed(waiting_for=why)
                live.task.announce(live.newest)

    async def _start(self, live: _Live) -> None:
        await self._room(live)
        try:
            commands = await self._commands()
            secrets = await self._secrets(live)
            if secrets is None:
                reason = "Cannot start: the values of its secret variables are gone."
                await self._finish(live, status=Status.FAILED, reason=reason)
                return
            to_show = commands.command(live.newest.spec, live.newest.id)
            command = commands.command(live.newest.spec, live.newest.id, secrets)
        except InvalidInput as e:
            await self._finish(live, status=Status.FAILED, reason=f"Cannot start: {e}")
            return
        # The record that it starts is on disk before the process exists.
        live.newest = live.changed(
            status=Status.RUNNING,
            command=shown(to_show),
            waiting_for=None,
            started_at=self._now(),
        )
        await self._save(live.newest)
        if live.kill:
            await self._killed_waiting(live)
        elif self._stopping:
            # Nothing was started and nothing will be: back to the queue.
            live.newest = live.changed(status=Status.CREATED, started_at=None)
            await self._save(live.newest)
            del self._running[live.newest.id]
            self._waiting[live.newest.id] = live
        else:
            bounds = self._limits.bounds
            live.run = self._executor.start(live.newest.id, command, bounds, live)
        self._moved.advance(self._moved.version + 1)

    async def _secrets(self, live: _Live) -> Mapping[str, str] | None:
        """Return the values of a task's secret variables; None: they are gone."""
        while live.newest.spec.secret_names and not (live.kill or self._stopping):
            try:
                found = await self._executor.secrets(live.newest.id)
            except StoreUnavailable as e:
                _log.error("Task {id} has to wait: {e}", id=live.newest.id, e=e)
                await self._pause()
            else:
                return found
        return {}

    async def _room(self, live: _Live) -> None:
        """Wait until what a task prints can be kept, or it is not to start any more."""
        while not (live.kill or self._stopping):
            try:
                self._executor.check()
            except StoreUnavailable as e:
                _log.error("Task {id} has to wait: {e}", id=live.newest.id, e=e)
                live.newest = live.changed(waiting_for=f"the disk: {e.detail}")
                live.task.announce(live.newest)
                await self._pause()
            else:
                return

    def ended(self, live: _Live, exit: Exit) -> None:
        """Take the result of a run."""
        if exit.unstarted:
            if live.kill:
                own(self._killed_waiting(live))
            elif not self._stopping:
                own(self._requeue(live))
            return
        status, reason = judge(exit, live.newest.killed_by)
        own(
            self._finish(
                live,
                status=status,
                reason=reason,
                exit_code=exit.code,
                signal=exit.signal,
                ended_at=exit.ended_at or self._now(),
                output_size=max(exit.output_size, live.task.snapshot.output_size),
                index_size=exit.index_size,
            )
        )

    async def _requeue(self, live: _Live) -> None:
        """Let a task wait again of which it is certain that it was never started."""
        _log.info("Task {id} was never started and waits again", id=live.newest.id)
        await self._record(live, status=Status.CREATED, started_at=None)
        live.run = None
        if live.kill:
            await self._killed_waiting(live)
            return
        self._running.pop(live.newest.id, None)
        waiting = {**self._waiting, live.newest.id: live}
        self._waiting = dict(sorted(waiting.items()))  # in its old place
        self._schedule()

    async def _killed_waiting(self, live: _Live) -> None:
        reason = f"Killed by {live.newest.killed_by} before it started."
        await self._finish(live, status=Status.KILLED, reason=reason, started_at=None)

    async def _finish(self, live: _Live, **new: object) -> None:
        if live.newest.spec.secret_names:
            self._executor.forget_secrets(live.newest.id)
        end = {"ended_at": self._now(), "waiting_for": None, **new}
        await self._record(live, **end)
        task_id = live.newest.id
        _log.info(
            "Task {id} {status}: {why}",
            id=task_id,
            status=live.newest.status.value,
            why=live.newest.reason or "",
        )
        self._running.pop(task_id, None)
        self._moved.advance(self._moved.version + 1)
        self._schedule()

    async def _record(self, live: _Live, **new: object) -> None:
        """Change a task, and tell about it when the change is on disk."""
        live.newest = snapshot = live.changed(**new)
        await self._save(snapshot)
        if snapshot.revision > live.task.snapshot.revision:
            live.task.announce(snapshot)

    async def _save(self, snapshot: TaskSnapshot) -> None:
        """Save until it is saved: what has happened must not be forgotten."""
        while True:
            try:
                await self._store.save(snapshot)
            except StoreUnavailable as e:
                _log.error("Cannot record task {id}: {e}", id=snapshot.id, e=e)
                await self._pause()
            else:
                self.changed.advance(self.changed.version + 1)
                return

    def _pause(self) -> Deferred[None]:
        wait: Deferred[None] = Deferred()
        self._clock.callLater(RETRY, wait.callback, None)
        return wait


def _never_could(task: TaskSnapshot) -> bool:
    """Return whether a task never started for want of its secrets: a retry has them."""
    failed = task.status is Status.FAILED and task.started_at is None
    return failed and bool(task.spec.secret_names)
