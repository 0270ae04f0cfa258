"""What happens to a task between its record and its end: its start, its run, its kill."""

from collections.abc import Awaitable, Callable

from attrs import define, evolve, field
from twisted.internet.defer import CancelledError
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
    "A background process still held the output at the end; what it prints after that is "
    "not kept."
)


@define(eq=False)
class Lifecycle:
    """Moves tasks from phase to phase, and has each step recorded before it is told."""

    queue: Queue
    recorder: Recorder
    _executor: Executor
    _clock: IReactorTime
    _time: SteadyClock
    _commands: Callable[[], Awaitable[Commands]]
    _bounds: Bounds
    _retention: Retention
    stopping: bool = field(default=False, init=False)
    """Whether no task starts any more; see `stop`."""
    moved: Changes = field(init=False)
    """Its version grows whenever a run has started or ended."""
    held: HeldTargets = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.moved = Changes(self._clock)
        self.held = HeldTargets(self.queue, self.recorder, self._executor, self.schedule)

    def stop(self) -> None:
        """Start no more tasks, and look no more after what ended ones have left."""
        self.stopping = self.held.stopped = True

    def live(self, snapshot: TaskSnapshot) -> LiveTask:
        """Return a task to look after, which has no place yet."""
        return LiveTask(Task(self._clock, snapshot), snapshot, self._ended)

    # -- the start

    def schedule(self) -> None:
        """Start the tasks that may start now, and tell the others what they wait for."""
        if self.stopping:
            return
        choice = self.queue.choose()
        for live, why in choice.wait:
            self._announce_wait(live, why)
        for live in choice.start:
            run_in_background(self._guarded(live, self._start(live)))

    def _announce_wait(self, live: LiveTask, why: str) -> None:
        # Without a record: a restart finds it out again.
        live.waits_for(why)
        live.task.announce(live.newest)

    async def _guarded(self, live: LiveTask, start: Awaitable[None]) -> None:
        """Await the start of a task; whatever goes wrong, an accepted task ends."""
        try:
            await start
        except (ShuttingDown, CancelledError):
            return
        except Exception as e:
            if live.run is not None:
                raise
            _log.failure("Task {id} cannot be started", id=live.id)
            await self._fail(live, f"an error in pulsar-api, {e!r}; its log says more.")

    async def _fail(self, live: LiveTask, why: str) -> None:
        """End a task that cannot be started.

        Unless a shim has begun with it that an earlier daemon started, and that had to
        wait until now for room or for descriptors.
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
            # Nothing is recorded of it: the next daemon finds it waiting.
            self.queue.move(live, Phase.WAITING)
            self._moved()
            return
        command = await self._command(live, secrets)
        if command is None:
            return
        # With it in one transaction: a database that is restored must not fit what is
        # restored beside it.
        run_in_background(self._retention.keep_reading())
        # The record that it starts is on disk before the process exists.
        live.starts(shown(command), self._time.wall(), permit)
        await self.recorder.save(live)
        if live.kill_requested:
            await self.end_killed(live)
        else:
            self._run(live, command)

    def _run(self, live: LiveTask, command: Command) -> None:
        self.queue.move(live, Phase.RUNNING)
        permit = live.newest.permit
        live.run = self._executor.start(live.id, command, self._bounds, live, permit)
        if live.kill_requested:
            live.run.kill()
        self._moved()

    async def _command(self, live: LiveTask, secrets: Secrets | None) -> Command | None:
        """Return what a task runs; None: it cannot run, and has ended."""
        why = "the values of its secret variables are gone."
        if secrets is not None:
            try:
                commands = await self._commands()
                spec = live.newest.spec
                command = commands.command(spec, live.id, secrets.values)
                if not secrets.values:
                    return command
                # What is shown and recorded has no secret in it.
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
        """Return the secrets of a task; None: they are gone."""
        name = live.newest.secret_file
        while live.newest.spec.secret_names and not self._called_off(live):
            try:
                return await self._executor.secrets(live.id, name)
            except StoreUnavailable as e:
                await self._wait_for_disk(live, e)
        return Secrets()

    async def _permit(self, live: LiveTask) -> str | None:
        """Return a permit as soon as what the task prints can be kept.

        None: the task is not to start any more, or not by this daemon.
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
        """Wait for a while, and tell what for."""
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
        """Start a task whose start is on record, and with which no shim has begun."""
        live.run = None
        self.queue.move(live, Phase.STARTING)
        if exit.passing:
            self._announce_wait(live, f"another try: {exit.error}")
            await self.recorder.pause(live)
        secrets = await self._secrets(live)
        if live.kill_requested:
            # A daemon that finds a start barred has to find on record why.
            await self.recorder.kill_on_record(live)
            if await self._prevent_start(live):
                await self.end_killed(live)
            else:
                self.adopt(live)
        elif self.stopping:
            self.queue.move(live, Phase.LEFT)
            self._moved()
        else:
            _log.info("Task {id} was not started yet; it starts now", id=live.id)
            command = await self._command(live, secrets)
            if command is not None:
                if live.newest.waiting_for is not None:
                    live.waits_for(None)
                self._run(live, command)

    async def _prevent_start(self, live: LiveTask) -> bool:
        """Make sure that no shim begins with a task; return False if one has."""
        while not self.recorder.closed:
            try:
                return self._executor.prevent_start(live.id)
            except StoreUnavailable as e:
                await self._wait_for_disk(live, e)
        raise ShuttingDown

    # -- the end

    async def kill(self, live: LiveTask, by: Principal) -> None:
        """End a task; it returns when that is recorded as asked for, or as done."""
        live.kill_requested = True
        live.kill_revision = live.newest.revision + 1
        live.wake()
        _log.info("Task {id}: kill asked for by {by}", id=live.id, by=by.name)
        if live.run is not None:
            live.run.kill()
        if live.phase is Phase.WAITING:
            # Found there until its end is on disk.
            self.queue.move(live, Phase.STARTING)
            live.killed_by(by)
            await self.end_killed(live)
        else:
            live.killed_by(by, f"Kill asked for by {by}.")
            await self.recorder.record(live)

    async def end_killed(self, live: LiveTask) -> None:
        """Record the end of a task that was killed before it started."""
        reason = f"Killed by {live.newest.killed_by} before it started."
        await self.finish_without_run(live, Status.KILLED, reason)

    def _ended(self, live: LiveTask, exit: Exit) -> None:
        """Take the result of a run."""
        if exit.unstarted:
            run_in_background(self._guarded(live, self._start_again(live, exit)))
        else:
            run_in_background(self._finish_run(live, exit))

    async def _finish_run(self, live: LiveTask, exit: Exit) -> None:
        live.task.refresh()  # what was told of its output is on record with its end
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
        """Record the end of a task of which nothing has run."""
        wall, steady = self._time.wall(), self._time.steady()
        live.ends(status, reason, wall, steady, started=start_recorded)
        await self._finish(live)

    async def _finish(self, live: LiveTask) -> None:
        """Put an end on record, and give the place of the task to another one."""
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
            _log.warn("Of task {id} these still run: {it}", id=live.id, it=remains)
        if newest.held:
            self.held.watch(live)
        else:
            self.queue.move(live, Phase.ENDED)
        self._moved()
        self.schedule()

    def _moved(self) -> None:
        self.moved.advance(self.moved.version + 1)

    def let_go(self, live: LiveTask) -> None:
        """Stop following a run, which goes on; the next daemon adopts it."""
        if live.run is not None:
            live.run.detach()
            _log.info("Task {id} is left running", id=live.id)
        else:
            _log.error("Task {id} is left as it is on record", id=live.id)
        by = live.newest.killed_by
        if live.kill_requested and by is not None and live.saved < live.newest.revision:
            # The next daemon must know of it, even if the database is away for both.
            self._executor.note_kill(live.id, by)
        live.task.settle()
