"""Tasks that can still change: the phase of each, and the waiters for its changes."""

from collections.abc import Callable, Sequence
from enum import Enum

from attrs import define, evolve, field
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime

from pulsar_api.concurrency.changes import Changes
from pulsar_api.principal import Principal
from pulsar_api.tasks.interfaces import Run
from pulsar_api.tasks.model import Exit, Process, Status, TaskSnapshot

COALESCE = 0.05
"""Seconds between two wake-ups by output. The first output wakes waiters at once."""


@define(eq=False)
class Task:
    """The public state of a task, and the waiters for its changes."""

    _clock: IReactorTime
    snapshot: TaskSnapshot
    changes: Changes = field(init=False)
    end: Changes = field(init=False)
    """Its version is 0 until the task has ended, then 1."""
    _printed: int = field(default=0, init=False)
    _coalescing: IDelayedCall | None = field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        self.changes = Changes(self._clock, self.snapshot.version)
        self.end = Changes(self._clock)
        self._printed = self.snapshot.output_size

    def announce(self, snapshot: TaskSnapshot) -> None:
        """Make this the state of the task, and wake all waiters at once.

        The output never shrinks: the task keeps a larger size that it has already shown.
        """
        if snapshot.output_size < self.snapshot.output_size:
            snapshot = evolve(snapshot, output_size=self.snapshot.output_size)
        self.snapshot = snapshot
        self._printed = max(self._printed, snapshot.output_size)
        if snapshot.status.ended:
            self.settle()
        self.changes.advance(snapshot.version)
        if snapshot.status.ended:
            self.end.advance(1)

    def printed(self, size: int) -> None:
        """Note that the output has ``size`` bytes, all of them on disk."""
        if size <= self._printed:
            return
        self._printed = size
        if self._coalescing is None:
            self.refresh()
            self._coalescing = self._clock.callLater(COALESCE, self._coalesced)

    def refresh(self) -> None:
        """Announce output now that `printed` holds back to wake waiters less often."""
        if self._printed > self.snapshot.output_size and not self.snapshot.status.ended:
            self.announce(evolve(self.snapshot, output_size=self._printed))

    def settle(self) -> None:
        """Cancel the announcement that `printed` holds back."""
        if self._coalescing is not None:
            self._coalescing.cancel()
            self._coalescing = None

    def _coalesced(self) -> None:
        self._coalescing = None
        if self._printed > self.snapshot.output_size:
            self.refresh()
            self._coalescing = self._clock.callLater(COALESCE, self._coalesced)


class Phase(Enum):
    """The stage that a task in the care of this daemon has reached."""

    WAITING = "waiting"
    """In the queue."""
    STARTING = "starting"
    """It has a place among the running tasks, but no run yet."""
    RUNNING = "running"
    """It has a run, or its end is about to be recorded."""
    LEFT = "left"
    """Its start is on record, and the next daemon will start it."""
    HOLDING = "holding"
    """It has ended, but its remaining processes hold the target."""
    ENDED = "ended"


@define(eq=False)
class LiveTask:
    """A task in the care of this daemon, and its newest record; the `Sink` of its run.

    Each method that changes ``newest`` makes the next revision, which is not on disk yet.
    ``task`` has the state that callers see.
    """

    task: Task
    newest: TaskSnapshot
    on_end: Callable[["LiveTask", Exit], None]
    """Called once, when the run has ended."""
    phase: Phase = Phase.WAITING
    run: Run | None = None
    kill_requested: bool = False
    saved: int = 0
    """The newest revision that is certainly on disk."""
    kill_revision: int = 0
    """The first revision that records this daemon's request for a kill."""
    pause: Deferred[None] | None = None
    """Fires before the next try; see `Recorder.pause`."""

    @property
    def id(self) -> int:
        """The number of the task."""
        return self.newest.id

    @property
    def target(self) -> str:
        """The app and the env that the task works on."""
        return self.newest.spec.target

    def wake(self) -> None:
        """End the pause before the next try."""
        if self.pause is not None and not self.pause.called:
            self.pause.callback(None)

    # The reports of a run: the methods of `Sink`.

    def started(self, pid: int) -> None:
        """Announce the process number of the command."""
        if self.newest.pid is None:
            self.newest = evolve(
                self.newest, output_size=self._size, revision=self._next, pid=pid
            )
            self.task.announce(self.newest)

    def printed(self, size: int) -> None:
        """Announce that the output has grown."""
        self.task.printed(size)

    def ended(self, exit: Exit) -> None:
        """Pass the result to ``on_end``."""
        self.on_end(self, exit)

    # The changes of the record.

    def waits_for(self, why: str | None) -> None:
        """Note what the task waits for, None if it no longer waits."""
        self.newest = evolve(
            self.newest, output_size=self._size, revision=self._next, waiting_for=why
        )

    def starts(self, command: str, started_at: float, permit: str) -> None:
        """Note the start of the task under a permit."""
        self.newest = evolve(
            self.newest,
            output_size=self._size,
            revision=self._next,
            status=Status.RUNNING,
            command=command,
            waiting_for=None,
            started_at=started_at,
            permit=permit,
        )

    def killed_by(self, by: Principal, reason: str | None = None) -> None:
        """Note the principal that asked for a kill."""
        why = self.newest.reason if reason is None else reason
        self.newest = evolve(
            self.newest,
            output_size=self._size,
            revision=self._next,
            killed_by=by,
            reason=why,
        )

    def ends(
        self,
        status: Status,
        reason: str | None,
        wall: float,
        steady: float,
        *,
        started: bool = True,
    ) -> None:
        """Note the end of the task at these times. ``started``: whether it had begun."""
        self.newest = evolve(
            self.newest,
            output_size=self._size,
            revision=self._next,
            status=status,
            reason=reason,
            waiting_for=None,
            started_at=self.newest.started_at if started else None,
            ended_at=wall,
            ended_steady=steady,
        )

    def ran(self, exit: Exit, *, held: bool, notes: Sequence[str]) -> None:
        """Add the result of the run to the noted end, within the same revision."""
        shown = self.task.snapshot.output_size
        self.newest = evolve(
            self.newest,
            ended_at=exit.ended_at or self.newest.ended_at,
            exit_code=exit.code,
            signal=exit.signal,
            output_size=max(exit.output_size, shown),
            index_size=exit.index_size,
            still_running=exit.left,
            held=held,
            notes=tuple(notes),
            cpu_seconds=exit.cpu_seconds,
            memory_peak=exit.memory_peak,
        )

    def has_left(self, processes: Sequence[Process]) -> None:
        """Note the processes that still run. The target stays held while there are any."""
        left = tuple(processes)
        self.newest = evolve(
            self.newest,
            output_size=self._size,
            revision=self._next,
            still_running=left,
            held=bool(left),
        )

    def gives_target_back(self, note: str) -> None:
        """Note that the target is free although processes still run."""
        notes = (*self.newest.notes, note)
        self.newest = evolve(
            self.newest,
            output_size=self._size,
            revision=self._next,
            held=False,
            notes=notes,
        )

    @property
    def _next(self) -> int:
        return self.newest.revision + 1

    @property
    def _size(self) -> int:
        return max(self.newest.output_size, self.task.snapshot.output_size)
