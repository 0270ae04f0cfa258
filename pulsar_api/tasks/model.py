"""Tasks: what was asked for, how it stands, how it ended."""

from collections.abc import Mapping, Sequence
from enum import StrEnum

from attrs import define, evolve, field, frozen
from twisted.internet.interfaces import IDelayedCall, IReactorTime

from pulsar_api.concurrency.changes import Changes
from pulsar_api.principal import Principal

MASK = "***"
"""What is shown in place of a secret."""

KEY_LIFE = 24 * 3600.0
"""Seconds for which an idempotency key counts."""

_PASSED_OVER = 1000  # tasks, which takes next to no time

COALESCE = 0.05
"""Seconds: news of output wakes the waiting at most this often (the first at once)."""


class Status(StrEnum):
    """Where a task is in its life; the last four are for ever."""

    CREATED = "created"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    KILLED = "killed"
    LOST = "lost"

    @property
    def ended(self) -> bool:
        """Whether nothing can change any more."""
        return self not in {Status.CREATED, Status.RUNNING}


@frozen
class TaskSpec:
    """What somebody asked for; every name in it has been checked."""

    app: str
    env: str
    action: str
    variables: Mapping[str, str] = field(factory=dict)
    """Of one that is secret `MASK` stands here; its value goes another way."""
    user: Principal | None = None
    """Who asked for it; None: nobody is asked who they are."""
    secret_names: frozenset[str] = frozenset()
    """Which of the variables are secret. Of a task that is asked for, some of them."""

    @property
    def target(self) -> str:
        """What two deployments must not touch at the same time."""
        return f"{self.app}/{self.env}"


Limits = Sequence[tuple[str, str]]
"""Files of a task's cgroup (cgroups(7)) and their contents."""


@frozen
class Account:
    """Whom a command runs as, if not as the daemon: names and numbers of passwd(5)."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str
    umask: int | None = None
    """None: as the daemon was started with."""
    limits: Limits = ()


@frozen
class Command:
    """What a task runs: a list of arguments, never a line for a shell."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(repr=False)
    directory: str | None = None
    last_line: str | None = None
    """If set, exit code 0 is good only if stdout's last line is exactly this."""
    secrets: tuple[bytes, ...] = field(default=(), repr=False)
    """What must not be seen in its output, in each form."""
    secret_file: str | None = None
    """See `TaskSnapshot.secret_file`."""
    account: Account | None = None
    """Whom it runs as; None: as the daemon."""
    shown: tuple[str, ...] | None = None
    """The arguments as people may see them, if not all of them may be seen."""


class Cause(StrEnum):
    """Why the command ended."""

    ITSELF = "itself"
    KILL = "kill"
    TIMEOUT = "timeout"
    SILENCE = "silence"


@frozen
class Process:
    """A process of a task that still runs, or did when the task had ended."""

    pid: int
    start: int
    """When it was started, in ticks of the clock since the boot (field 22 of proc(5)).

    With this a number means one process only, until the next boot."""
    command: str
    """Its short name, without its arguments."""
    user: str
    """Who it acts as: a name, or a number that has none."""

    def __str__(self) -> str:
        return f"{self.pid} {self.command} ({self.user})"


@frozen
class Exit:
    """How a run ended. ``error`` is a sentence and set if it never started or is lost."""

    ended_at: float | None = None
    """Seconds since the epoch; None: nobody knows better than "now"."""
    code: int | None = None
    signal: str | None = None
    error: str | None = None
    lost: bool = False
    cause: Cause = Cause.ITSELF
    forced: bool = False
    """TERM was not enough: KILL was sent."""
    output_size: int = 0
    index_size: int = 0
    """Bytes that are kept of the index of the output."""
    unstarted: bool = False
    """The permit to start is valid and no shim has begun: it can be started now."""
    passing: bool = False
    """With ``unstarted``: it wants something that may come, such as a free descriptor."""
    good: bool = True
    """False if the command answered 0 without the line that it promises (`Command`)."""
    open: bool = False
    """Some process still held a pipe of the command: what it prints later is not kept."""
    left: tuple[Process, ...] = ()
    """Processes of the task that still ran, at most the first fifty."""
    cpu_seconds: float | None = None
    """Processor time of all its processes, None if it had no cgroup."""
    memory_peak: int | None = None
    """The most bytes of memory that it used at one time, None if that was not counted."""
    memory_kills: int = 0
    """How many of its processes the kernel killed because of the limit of memory."""


NAMED = 10
"""Processes that a reason names."""


def listed(processes: Sequence[Process]) -> str:
    """Return processes as people read them; of many the first."""
    names = ", ".join(map(str, processes[:NAMED]))
    more = len(processes) - NAMED
    return f"{names} and {more} more" if more > 0 else names


def judge(exit: Exit, killed_by: Principal | None) -> tuple[Status, str | None]:
    """Return what a result means, and a sentence if it needs one."""
    if exit.lost:
        return Status.LOST, exit.error
    if exit.cause is Cause.KILL:
        by = killed_by or "a signal from outside to the process that watches the task"
        return Status.KILLED, _ended(f"Killed by {by}", exit)
    if exit.cause is Cause.TIMEOUT:
        what = "It took longer than a task may (--task-timeout)"
        return Status.FAILED, _ended(what, exit)
    if exit.cause is Cause.SILENCE:
        what = "It printed nothing for too long (--silence-timeout)"
        return Status.FAILED, _ended(what, exit)
    if exit.error is not None:
        return Status.FAILED, exit.error
    if exit.code == 0 and not exit.good:
        reason = "The exit code is 0, but the line that says so is not the last one."
        return Status.FAILED, reason
    return (Status.FINISHED if exit.code == 0 else Status.FAILED), None


def _ended(what: str, exit: Exit) -> str:
    """Say why a task was ended, and what came of it."""
    if exit.left:
        sent = "TERM and KILL were sent" if exit.forced else "TERM was sent"
        return f"{what}; {sent}, but these processes still run: {listed(exit.left)}."
    ladder = "; TERM was not enough, KILL was sent" if exit.forced else ""
    return f"{what}{ladder}." + ("" if exit.error is None else f" {exit.error}")


@frozen
class TaskSnapshot:
    """How a task stands at one moment. Times are seconds since the epoch."""

    id: int
    spec: TaskSpec
    created_at: float
    status: Status = Status.CREATED
    command: str = ""
    pid: int | None = None
    exit_code: int | None = None
    signal: str | None = None
    reason: str | None = None
    killed_by: Principal | None = None
    waiting_for: str | None = None
    started_at: float | None = None
    ended_at: float | None = None
    output_size: int = 0
    index_size: int = 0
    """Bytes that are kept of the index of the output, when the task has ended."""
    permit: str | None = None
    """Names the permit under which the task was started; see `Executor.permit`."""
    secret_file: str | None = None
    """Names where the values of its secret variables are until it starts."""
    still_running: tuple[Process, ...] = ()
    """What still ran of the task after its end, when that was last looked at."""
    held: bool = False
    """Whether the target stays taken until ``still_running`` is empty."""
    notes: tuple[str, ...] = ()
    """Sentences for people about what is unusual with the task."""
    cpu_seconds: float | None = None
    """See `Exit.cpu_seconds`."""
    memory_peak: int | None = None
    """See `Exit.memory_peak`."""
    created_steady: float | None = None
    """When it was created, by the `SteadyClock`."""
    ended_steady: float | None = None
    revision: int = 1
    """Counts the changes of all but the output."""

    @property
    def version(self) -> int:
        """Grows with each change, also over a restart: both parts are on disk."""
        return self.revision + self.output_size

    def as_created(self) -> "TaskSnapshot":
        """Return the task as it was before anything happened to it."""
        return TaskSnapshot(self.id, self.spec, self.created_at, command=self.command)


@frozen
class News:
    """What somebody who follows all tasks has not seen yet, as it is on disk."""

    created: Sequence[TaskSnapshot]
    """The tasks that are new, by their number."""
    changed: Sequence[tuple[int, TaskSnapshot]]
    """Those that have changed after their creation, by the number of the last change.

    Empty while there may be more new ones, so that no task changes before it is known.
    """
    more: bool = False
    """Whether there may be more than is read at a time."""


Within = Sequence[tuple[str, str, str]] | None
"""Apps, envs and actions that count, * and ? being wild; None: all."""


@frozen
class TaskQuery:
    """Which tasks, newest first; at most ``limit`` with a number below ``before``."""

    limit: int = 100
    before: int | None = None
    status: Status | None = None
    app: str | None = None
    env: str | None = None
    user: str | None = None
    """The name that the tasks show."""
    text: str | None = None
    """In one of app, env, action and user, whatever the case of its ASCII letters."""
    offset: int = 0
    """How many of them are passed over."""
    within: Within = None

    @property
    def quick(self) -> bool:
        """Whether these tasks are found without a look at those that do not match."""
        if self.status in {Status.CREATED, Status.RUNNING}:
            return True  # they have an index, and are few
        narrow = (self.text, self.within, self.user, self.status)
        if any(one is not None for one in narrow) or self.offset > _PASSED_OVER:
            return False
        return (self.app is None) == (self.env is None)


@frozen
class Found:
    """The tasks that match a query, newest first: as many as are read at a time."""

    tasks: Sequence[TaskSnapshot]
    rest: Sequence[int] = ()
    """The numbers of the others; see `TaskStore.read`."""

    @property
    def numbers(self) -> list[int]:
        """The numbers of all of them."""
        return [*(task.id for task in self.tasks), *self.rest]


@define(eq=False)
class Task:
    """A task that has not ended, or ended a moment ago, and whom to tell about it."""

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
        """Make this the state of the task and wake whoever waits, at once.

        What has been printed since the snapshot was taken stays printed.
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
        """Note that the output has grown to ``size`` bytes, all of them on disk."""
        if size <= self._printed:
            return
        self._printed = size
        if self._coalescing is None:
            self.refresh()
            self._coalescing = self._clock.callLater(COALESCE, self._coalesced)

    def refresh(self) -> None:
        """Announce what was printed and is held back to wake the waiting less often."""
        if self._printed > self.snapshot.output_size and not self.snapshot.status.ended:
            self.announce(evolve(self.snapshot, output_size=self._printed))

    def settle(self) -> None:
        """Announce nothing later by itself."""
        if self._coalescing is not None:
            self._coalescing.cancel()
            self._coalescing = None

    def _coalesced(self) -> None:
        self._coalescing = None
        if self._printed > self.snapshot.output_size:
            self.refresh()
            self._coalescing = self._clock.callLater(COALESCE, self._coalesced)
