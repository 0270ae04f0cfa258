"""Decides which task starts next and how many may wait. It is pure and does no I/O."""

from collections.abc import Iterator, Sequence

from attrs import define, field, frozen

from pulsar_api.errors import QueueFull
from pulsar_api.tasks.interfaces import Bounds, Keep
from pulsar_api.tasks.live import LiveTask, Phase
from pulsar_api.tasks.model import TaskSpec, listed


@frozen
class Limits:
    """How many tasks run and wait at the same time, and the bounds of each run."""

    bounds: Bounds
    running: int = 16
    running_per_target: int = 0
    """0 means no limit besides ``running``."""
    queued: int = 1000
    keep: Keep = Keep()

    @property
    def share(self) -> int:
        """The number of tasks of one principal that may wait: half of the queue."""
        return (self.queued + 1) // 2


@frozen
class Choice:
    """The outcome of `Queue.choose` for the tasks that wait."""

    start: Sequence[LiveTask]
    """Tasks that start now, oldest first."""
    wait: Sequence[tuple[LiveTask, str]]
    """Tasks whose reason to wait has changed, each with the new reason."""


@define(eq=False)
class Queue:
    """Every task in the care of the daemon, by its phase."""

    _limits: Limits
    waiting: dict[int, LiveTask] = field(factory=dict, init=False)
    active: dict[int, LiveTask] = field(factory=dict, init=False)
    """Tasks that take a place: they start, run, or are left to the next daemon."""
    holding: dict[int, LiveTask] = field(factory=dict, init=False)
    """Tasks that have ended and hold their target."""
    creating: list[TaskSpec] = field(factory=list, init=False)
    """The requests for tasks whose first record is being written."""

    def find(self, task_id: int) -> LiveTask | None:
        """Return a task, or None if it is not in the daemon's care."""
        for place in (self.waiting, self.active, self.holding):
            if task_id in place:
                return place[task_id]
        return None

    def move(self, live: LiveTask, phase: Phase) -> None:
        """Put a task into the collection for this phase. An ended task leaves them all."""
        before, after = self._place(live.phase), self._place(phase)
        if before is not None and before is not after:
            before.pop(live.id, None)
        if after is not None:
            after[live.id] = live
        live.phase = phase

    def _place(self, phase: Phase) -> dict[int, LiveTask] | None:
        match phase:
            case Phase.WAITING:
                return self.waiting
            case Phase.STARTING | Phase.RUNNING | Phase.LEFT:
                return self.active
            case Phase.HOLDING:
                return self.holding
            case Phase.ENDED:
                return None

    def check_room(self, spec: TaskSpec) -> None:
        """Raise `QueueFull` unless a task can start or the queue has room for it."""
        queued = len(self.waiting) + len(self.creating)
        full = None
        if queued >= self._limits.queued:
            full = QueueFull(self._limits.queued)
        elif spec.user is not None and queued >= self._limits.share:
            specs = [live.newest.spec for live in self.waiting.values()]
            mine = sum(one.user == spec.user for one in (*specs, *self.creating))
            if mine >= self._limits.share:
                full = QueueFull(self._limits.share, spec.user.name)
        if full is None:
            return
        busy = [live.target for live in self.active.values()]
        busy += [one.target for one in self.creating]
        per_target = self._limits.running_per_target or len(busy) + 1
        if len(busy) >= self._limits.running or busy.count(spec.target) >= per_target:
            raise full

    def choose(self) -> Choice:
        """Give places to waiting tasks, oldest first, and return the outcome.

        A task that waits for its target does not hold up the tasks behind it.
        """
        start, wait = [], []
        per_target = self._limits.running_per_target
        busy: dict[str, int] = {}
        for live in self._taking_targets():
            busy[live.target] = busy.get(live.target, 0) + 1
        for live in list(self.waiting.values()):
            target, why = live.target, None
            if len(self.active) >= self._limits.running:
                why = f"a free place: {len(self.active)} tasks are running"
            elif per_target and busy.get(target, 0) >= per_target:
                why = self._holder(target) or f"the end of another task on {target}"
            if why is None:
                busy[target] = busy.get(target, 0) + 1
                self.move(live, Phase.STARTING)
                start.append(live)
            elif live.newest.waiting_for != why:
                wait.append((live, why))
        return Choice(start, wait)

    def _taking_targets(self) -> Iterator[LiveTask]:
        yield from self.active.values()
        yield from self.holding.values()

    def _holder(self, target: str) -> str | None:
        """Name the ended task and the processes that still hold a target, or None."""
        for live in self.holding.values():
            if live.target == target:
                remains = listed(live.newest.still_running)
                return f"task {live.id}, of which these still run: {remains}"
        return None
