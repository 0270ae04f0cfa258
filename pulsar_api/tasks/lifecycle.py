"""Leads a task from its first record to its end: its start, its run, its kill."""

from collections.abc import Awaitable, Callable

from attrs import define, evolve, field
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from pulsar_api.concurrency.background import run_in_background
from pulsar_api.concurrency.changes import Changes
from pulsar_api.errors import FolderInUse, InvalidInput, ShuttingDown, StoreUnavailable
from pulsar_api.principal import Principal
from pulsar_api.tasks.clock import SteadyClock
from pulsar_api.tasks.commands import Commands, shown
from pulsar_api.tasks.held import HeldTargets
from pulsar_api.tasks.interfaces import Bounds, Executor, Secrets
from pulsar_api.tasks.live import LiveTask, Phase, Task
from pulsar_api.tasks.model import (
    Cause,
    Command,
    Exit,
    Status,
    TaskSnapshot,
    judge,
    listed,
)
from pulsar_api.tasks.queue import Queue
from pulsar_api.tasks.recorder import Recorder
from pulsar_api.tasks.retention import Retention

_log = Logger()

MEMORY_RAN_OUT = "The kernel killed a process of this task because memory ran out."

OUTPUT_STILL_OPEN = (
    "A background process still held the output open at the end. Anything that it prints "
    "after that is not kept."
)


@define(eq=False)
class Lifecycle:
    """Moves tasks from phase to phase, and records each step before it is announced."""

    queue: Queue
    recorder: Recorder
    _executor: Executor
    _clock: IReactorTime
    _time: SteadyClock
    _commands: Callable[[], Awaitable[Commands]]
    _bounds: Bounds
    _retention: Retention
    stopping: bool = field(default=False, init=False)
    """Whether the daemon is stopping, so that no task starts; see `stop`."""
    moved: Changes = field(init=False)
    """Its version grows whenever a run has started or ended."""
    held: HeldTargets = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.moved = Changes(self._clock)
        self.held = HeldTargets(self.queue, self.recorder, self._executor, self.schedule)

    def stop(self) -> None:
        """Start no more tasks, and stop watching the processes of ended ones."""
        self.stopping = self.held.stopped = True

    def live(self, snapshot: TaskSnapshot) -> LiveTask:
        """Return a live task for this record. It is not in the queue yet."""
        return LiveTask(Task(self._clock, snapshot), snapshot, self._ended)

    # -- the start

    def schedule(self) -> None:
        """Start the tasks that can start now, and announce what the others wait for."""
        if self.stopping:
            return
        choice = self.queue.choose()
        for live, why in choice.wait:
            self._announce_wait(live, why)
        for live in choice.start:
            run_in_background(self._guarded(live, self._start(live)))

    def _announce_wait(self, live: LiveTask, why: str) -> None:
        # This needs no record, because a restarted daemon finds the reason again.
        live.waits_for(why)
        live.task.announce(live.newest)

    async def _guarded(self, live: LiveTask, start: Awaitable[None]) -> None:
        """Await the start of a task. On any error the task ends: none is left hanging."""
        try:
            await start
        except (ShuttingDown, CancelledError):
            return
        except Exception as e:
            if live.run is not None:
                raise
            _log.failure("Task {id} cannot be started", id=live.id)
            await self._fail(live, f"an error in pulsar-api, {e!r}. See the daemon's log.")

    async def _fail(self, live: LiveTask, why: str) -> None:
        """End a task that cannot be started.

        The exception: an earlier daemon started a shim, which had to wait for space or for
        descriptors and has begun only now. Then follow its run.
        """
        if live.newest.status is Status.RUNNING and not await self._prevent_start(live):
            live.waits_for(None)
            self.adopt(live)
            return
        reason = f"Cannot start: {why}"
        await self.finish_without_run(live, Status.FAILED, reason, start_recorded=True)

    async def _start(self, live: LiveTask) -> None:
        try:
            permit = await self._permit(live)
        except FolderInUse as e:
            await self.finish_without_run(live, Status.LOST, str(e))
            return
        secrets = await self._secrets(live)
        if live.kill_requested:
            await self.end_killed(live)
            return
        if self.stopping or permit is None:
            # Its start is not on record, so the next daemon finds it waiting.
            self.queue.move(live, Phase.WAITING)
            self._moved()
            return
        command = await self._command(live, secrets)
        if command is None:
            return
        # In the same transaction as the start: if somebody restores a backup, this reading
        # shows that the database and the folders are from different moments.
        run_in_background(self._retention.keep_reading())
        # The record of the start is on disk before the process exists, so that no task
        # ever starts twice.
        live.starts(shown(command), self._time.wall(), permit)
        await self.recorder.save(live)
        if live.kill_requested:
            await self.end_killed(live)
        else:
            self._run(live, command)

    def _run(self, live: LiveTask, command: Command) -> None:
        permit = live.newest.permit
        live.run = self._executor.start(live.id, command, self._bounds, live, permit)
        # Not before: a stop waits for tasks without a run until their end is on record.
        self.queue.move(live, Phase.RUNNING)
        if live.kill_requested:
            live.run.kill()
        self._moved()

    async def _command(self, live: LiveTask, secrets: Secrets | None) -> Command | None:
        """Return the command of a task, or None if it cannot run and has ended."""
        why = "the values of its secret variables are gone."
        if secrets is not None:
            try:
                commands = await self._commands()
                spec = live.newest.spec
                command = commands.command(spec, live.id, secrets.values)
                if not secrets.values:
                    return command
                # The command that is shown and recorded must contain no secret.
                return evolve(
                    command,
                    shown=commands.command(spec, live.id).arguments,
                    secrets=secrets.forms,
                    secret_file=live.newest.secret_file,
                )
            except InvalidInput as e:
                why = str(e)
        await self._fail(live, why)
        return None

    async def _secrets(self, live: LiveTask) -> Secrets | None:
        """Return the secrets of a task, or None if they are gone."""
        name = live.newest.secret_file
        while live.newest.spec.secret_names and not self._called_off(live):
            try:
                return await self._executor.secrets(live.id, name)
            except StoreUnavailable as e:
                await self._wait_for_disk(live, e)
        return Secrets()

    async def _permit(self, live: LiveTask) -> str | None:
        """Return a permit as soon as the disk can keep the task's output.

        Return None if the task was killed, or if the next daemon has to start it.
        """
        while not self._called_off(live):
            try:
                self._executor.check()
                return await self._executor.permit(live.id)
            except StoreUnavailable as e:
                await self._wait_for_disk(live, e)
        return None

    def _called_off(self, live: LiveTask) -> bool:
        return live.kill_requested or self.stopping

    async def _wait_for_disk(self, live: LiveTask, error: StoreUnavailable) -> None:
        """Wait until the next try, and announce the reason."""
        why = f"the disk: {error.detail}"
        if live.newest.waiting_for != why:
            _log.error("Task {id} has to wait: {e}", id=live.id, e=error)
            self._announce_wait(live, why)
        await self.recorder.pause(live)

    # -- a start that is in doubt

    def adopt(self, live: LiveTask) -> None:
        """Follow the run that an earlier daemon started."""
        live.kill_requested = live.newest.killed_by is not None
        self.queue.move(live, Phase.RUNNING)
        live.run = self._executor.adopt(live.id, live.newest.permit, self._bounds, live)
        if live.kill_requested:
            live.run.kill()
        _log.info("Task {id} goes on", id=live.id)

    async def _start_again(self, live: LiveTask, exit: Exit) -> None:
        """Start a task whose start is on record but for which no shim has begun."""
        live.run = None
        self.queue.move(live, Phase.STARTING)
        if exit.passing:
            self._announce_wait(live, f"the next try: {exit.error}")
            await self.recorder.pause(live)
        secrets = await self._secrets(live)
        if live.kill_requested:
            # A daemon that finds a barred start must find the reason on record.
            await self.recorder.kill_on_record(live)
            if await self._prevent_start(live):
                await self.end_killed(live)
            else:
                self.adopt(live)
        elif self.stopping:
            self.queue.move(live, Phase.LEFT)
            self._moved()
        else:
            _log.info("Task {id} has not started yet; it starts now", id=live.id)
            command = await self._command(live, secrets)
            if command is not None:
                if live.newest.waiting_for is not None:
                    live.waits_for(None)
                self._run(live, command)

    async def _prevent_start(self, live: LiveTask) -> bool:
        """Bar every shim from a task; return False if one has begun."""
        while not self.recorder.closed:
            try:
                return self._executor.prevent_start(live.id)
            except StoreUnavailable as e:
                await self._wait_for_disk(live, e)
        raise ShuttingDown

    # -- the end

    async def kill(self, live: LiveTask, by: Principal) -> None:
        """End a task. Return when the request, or the end, is on record."""
        live.kill_requested = True
        live.kill_revision = live.newest.revision + 1
        _log.info("Task {id}: kill asked for by {by}", id=live.id, by=by.name)
        if live.run is not None:
            live.run.kill()
        if live.phase is Phase.WAITING:
            # Among the active tasks, callers find it until its end is on disk.
            self.queue.move(live, Phase.STARTING)
            live.killed_by(by)
            await self.end_killed(live)
        else:
            live.killed_by(by, f"Kill asked for by {by}.")
            recorded = Deferred.fromCoroutine(self.recorder.record(live))
            # Not before: the end of a task that waits for the disk names the caller.
            live.wake()
            await recorded

    async def end_killed(self, live: LiveTask) -> None:
        """Record the end of a task that was killed before it started."""
        reason = f"Killed by {live.newest.killed_by} before it started."
        await self.finish_without_run(live, Status.KILLED, reason)

    def _ended(self, live: LiveTask, exit: Exit) -> None:
        """Handle the result of a run."""
        if exit.unstarted:
            run_in_background(self._guarded(live, self._start_again(live, exit)))
        else:
            run_in_background(self._finish_run(live, exit))

    async def _finish_run(self, live: LiveTask, exit: Exit) -> None:
        live.task.refresh()  # so the record of the end has all announced output
        notes = [*live.newest.notes]
        if exit.open:
            notes.append(OUTPUT_STILL_OPEN)
        if exit.memory_kills:
            notes.append(MEMORY_RAN_OUT)
        status, reason = judge(exit, live.newest.killed_by)
        live.ends(status, reason, self._time.wall(), self._time.steady())
        held = bool(exit.left) and (exit.lost or exit.cause is not Cause.ITSELF)
        live.ran(exit, held=held, notes=notes)
        await self._finish(live)

    async def finish_without_run(
        self, live: LiveTask, status: Status, reason: str, *, start_recorded: bool = False
    ) -> None:
        """Record the end of a task that never ran."""
        wall, steady = self._time.wall(), self._time.steady()
        live.ends(status, reason, wall, steady, started=start_recorded)
        await self._finish(live)

    async def _finish(self, live: LiveTask) -> None:
        """Put an end on record, and give the task's place to another one."""
        await self.recorder.record(live)
        newest = live.newest
        if newest.spec.secret_names:
            self._executor.forget_secrets(live.id, newest.secret_file)
        _log.info(
            "Task {id} {status}: {why}",
            id=live.id,
            status=newest.status.value,
            why=newest.reason or "",
        )
        if newest.still_running:
            remains = listed(newest.still_running)
            _log.warn("Task {id} left processes running: {it}", id=live.id, it=remains)
        if newest.held:
            self.held.watch(live)
        else:
            self.queue.move(live, Phase.ENDED)
        self._moved()
        self.schedule()

    def _moved(self) -> None:
        self.moved.advance(self.moved.version + 1)

    def let_go(self, live: LiveTask) -> None:
        """Stop following a run. It goes on, and the next daemon adopts it."""
        if live.run is not None:
            live.run.detach()
            _log.info("Task {id} is left running", id=live.id)
        else:
            _log.error("Task {id} is left to the next daemon, as recorded", id=live.id)
        by = live.newest.killed_by
        if live.kill_requested and by is not None and live.saved < live.newest.revision:
            # The next daemon must learn of the kill even if neither can use the database.
            self._executor.note_kill(live.id, by)
        live.task.settle()
