"""Which task may start next, and how many may wait. It is pure: nothing here waits."""

from collections.abc import Iterator, Sequence

from attrs import define, field, frozen

from pulsar_api.errors import QueueFull
from pulsar_api.tasks.interfaces import Bounds, Keep
from pulsar_api.tasks.live import LiveTask, Phase
from pulsar_api.tasks.model import TaskSpec, listed


@frozen
class Limits:
    """How many tasks run and wait at the same time, and the bounds of each."""

    bounds: Bounds
    running: int = 16
    running_per_target: int = 0
    """0: as many as run at all."""
    queued: int = 1000
    keep: Keep = Keep()

    @property
    def share(self) -> int:
        """How many tasks of one principal may wait: half of the queue."""
        return (self.queued + 1) // 2


@frozen
class Choice:
    """What became of the tasks that wait."""

    start: Sequence[LiveTask]
    """Tasks that have a place now, oldest first."""
    wait: Sequence[tuple[LiveTask, str]]
    """Tasks that wait for something else than before, and for what."""


@define(eq=False)
class Queue:
    """Every task in the care of the daemon, by its phase."""

    _limits: Limits
    waiting: dict[int, LiveTask] = field(factory=dict, init=False)
    active: dict[int, LiveTask] = field(factory=dict, init=False)
    """Tasks that take a place: those that start, run, or are left to the next daemon."""
    holding: dict[int, LiveTask] = field(factory=dict, init=False)
    """Tasks that have ended and hold their target."""
    creating: list[TaskSpec] = field(factory=list, init=False)
    """What is about to be recorded."""

    def find(self, task_id: int) -> LiveTask | None:
        """Return a task, None if it is not in the daemon's care."""
        for place in (self.waiting, self.active, self.holding):
            if task_id in place:
                return place[task_id]
        return None

    def move(self, live: LiveTask, phase: Phase) -> None:
        """Put a task where one in this phase belongs; an ended one nowhere."""
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
        """Raise `QueueFull` unless a task can start, or there is room for it to wait."""
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
        """Give places to waiting tasks, oldest first.

        A task that has to wait for its target holds up no other one.
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
        """Return what holds a target although its task has ended."""
        for live in self.holding.values():
            if live.target == target:
                remains = listed(live.newest.still_running)
                return f"task {live.id}, of which these still run: {remains}"
        return None
