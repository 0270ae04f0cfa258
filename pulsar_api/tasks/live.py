"""Tasks while they can change: where each is in its life, and who waits for news of it."""

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
"""Seconds between two wake-ups by output; the first output wakes at once."""


@define(eq=False)
class Task:
    """The state of a task that others see, and those who wait for its changes."""

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
        """Make this the state of the task and wake all waiters, at once.

        The output never shrinks: what was printed since the snapshot was taken counts.
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
        """Announce output that is held back to wake waiters less often."""
        if self._printed > self.snapshot.output_size and not self.snapshot.status.ended:
            self.announce(evolve(self.snapshot, output_size=self._printed))

    def settle(self) -> None:
        """Cancel the announcement that is held back."""
        if self._coalescing is not None:
            self._coalescing.cancel()
            self._coalescing = None

    def _coalesced(self) -> None:
        self._coalescing = None
        if self._printed > self.snapshot.output_size:
            self.refresh()
            self._coalescing = self._clock.callLater(COALESCE, self._coalesced)


class Phase(Enum):
    """Where a task is that this daemon looks after."""

    WAITING = "waiting"
    """In the queue."""
    STARTING = "starting"
    """It has its place among the running tasks, and no run yet."""
    RUNNING = "running"
    """It has a run, or its end is about to be recorded."""
    LEFT = "left"
    """Its start is on record, and the next daemon starts it."""
    HOLDING = "holding"
    """It has ended, and processes that it left hold its target."""
    ENDED = "ended"


@define(eq=False)
class LiveTask:
    """A task in the care of this daemon, and its newest record; the `Sink` of its run.

    Each method that changes ``newest`` makes the next revision, which may not be on disk
    yet. ``task`` has what others may see.
    """

    task: Task
    newest: TaskSnapshot
    on_end: Callable[["LiveTask", Exit], None]
    """Is called once when the run has ended."""
    phase: Phase = Phase.WAITING
    run: Run | None = None
    kill_requested: bool = False
    saved: int = 0
    """The newest revision that is certainly on disk."""
    kill_revision: int = 0
    """The first revision that tells that this daemon was asked for a kill."""
    pause: Deferred[None] | None = None
    """What the task waits for before the next try; see `Recorder.pause`."""

    @property
    def id(self) -> int:
        """The number of the task."""
        return self.newest.id

    @property
    def target(self) -> str:
        """The app and the env that it works on."""
        return self.newest.spec.target

    def wake(self) -> None:
        """End the pause before the next try."""
        if self.pause is not None and not self.pause.called:
            self.pause.callback(None)

    # What a run tells, as a `Sink`.

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
        """Pass the result on."""
        self.on_end(self, exit)

    # What becomes of the record.

    def waits_for(self, why: str | None) -> None:
        """Note what the task waits for; None: nothing any more."""
        self.newest = evolve(
            self.newest, output_size=self._size, revision=self._next, waiting_for=why
        )

    def starts(self, command: str, started_at: float, permit: str) -> None:
        """Note that the task is started under a permit."""
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
        """Note who asked for a kill."""
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
        """Note the end of a task, at these times; ``started``: whether it had begun."""
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
        """Add to the end of a task how its run ended, in the same revision."""
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
        """Note which processes still run, and hold the target as long as there are any."""
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
