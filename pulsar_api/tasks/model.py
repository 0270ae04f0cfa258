"""Values: the request for a task, the state of a task, the result of its run."""

from collections.abc import Mapping, Sequence
from enum import StrEnum

from attrs import field, frozen

from pulsar_api.principal import Principal

MASK = "***"
"""Replaces a secret."""

KEY_LIFE = 24 * 3600.0
"""How long, in seconds, an idempotency key is remembered."""

_PASSED_OVER = 1000  # tasks, which takes next to no time


class Status(StrEnum):
    """The states of a task. The last four are final."""

    CREATED = "created"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    KILLED = "killed"
    LOST = "lost"

    @property
    def ended(self) -> bool:
        """Whether the state is final."""
        return self not in {Status.CREATED, Status.RUNNING}


@frozen
class TaskSpec:
    """A caller's request for a task. Every name in it has been checked."""

    app: str
    env: str
    action: str
    variables: Mapping[str, str] = field(factory=dict)
    """A secret variable has the value `MASK` here. Its real value is kept elsewhere."""
    user: Principal | None = None
    """The principal that asked for the task, None if callers do not authenticate."""
    secret_names: frozenset[str] = frozenset()
    """The names of the secret variables. A request has only those that it lists."""

    @property
    def target(self) -> str:
        """The app and the env, as ``app/env``."""
        return f"{self.app}/{self.env}"


Limits = Sequence[tuple[str, str]]
"""Files of a task's cgroup (cgroups(7)) and their contents."""


@frozen
class Account:
    """The account that a command runs under; see passwd(5)."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str
    umask: int | None = None
    """None: the umask that the daemon was started with."""
    limits: Limits = ()


@frozen
class Command:
    """A list of arguments that runs without a shell, and the settings that it runs with."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(repr=False)
    directory: str | None = None
    last_line: str | None = None
    """If set, exit code 0 means success only if this is the last line of stdout."""
    secrets: tuple[bytes, ...] = field(default=(), repr=False)
    """The texts to mask in the output; see `secret_forms.forms`."""
    secret_file: str | None = None
    """See `TaskSnapshot.secret_file`."""
    account: Account | None = None
    """None: the account of the daemon."""
    shown: tuple[str, ...] | None = None
    """The arguments with each secret masked, None if they contain no secret."""


class Cause(StrEnum):
    """Why the command ended."""

    ITSELF = "itself"
    KILL = "kill"
    TIMEOUT = "timeout"
    SILENCE = "silence"


@frozen
class Process:
    """A process that a task left running at its end."""

    pid: int
    start: int
    """Its start in clock ticks since boot (field 22 of stat, proc(5)).

    Together with the number it identifies a process until the next boot."""
    command: str
    """Its short name, without its arguments."""
    user: str
    """The name of its effective user, or the number of a user without a name."""

    def __str__(self) -> str:
        return f"{self.pid} {self.command} ({self.user})"


@frozen
class Exit:
    """How a run ended. ``error`` is a sentence, set if it never started or is lost."""

    ended_at: float | None = None
    """Seconds since the epoch, None if it is not known."""
    code: int | None = None
    signal: str | None = None
    error: str | None = None
    lost: bool = False
    cause: Cause = Cause.ITSELF
    forced: bool = False
    """TERM was not enough: KILL was sent."""
    output_size: int = 0
    index_size: int = 0
    """Size in bytes of the index of the output, as far as it is kept."""
    unstarted: bool = False
    """No shim has begun and the permit is still valid, so the task can start now."""
    passing: bool = False
    """With ``unstarted``: the cause may pass, such as a lack of descriptors."""
    good: bool = True
    """False if the exit code was 0 without `Command.last_line` at the end."""
    open: bool = False
    """A process still held a pipe of the command. Its later output is not kept."""
    left: tuple[Process, ...] = ()
    """Processes of the task that still ran at its end, at most fifty."""
    cpu_seconds: float | None = None
    """Processor time of all processes of the task, None if it had no cgroup."""
    memory_peak: int | None = None
    """Peak memory in bytes, None if it was not measured."""
    memory_kills: int = 0
    """How many processes of the task the kernel killed at the memory limit."""


NAMED = 10
"""How many processes a reason names."""


def listed(processes: Sequence[Process]) -> str:
    """Return a text that names the processes, at most the first `NAMED` of them."""
    names = ", ".join(map(str, processes[:NAMED]))
    more = len(processes) - NAMED
    return f"{names} and {more} more" if more > 0 else names


def judge(exit: Exit, killed_by: Principal | None) -> tuple[Status, str | None]:
    """Return the status for a result, and a sentence that explains it where needed."""
    if exit.lost:
        return Status.LOST, exit.error
    if exit.cause is Cause.KILL:
        by = killed_by or "a signal that somebody sent to the task's shim"
        return Status.KILLED, _ended(f"Killed by {by}", exit)
    if exit.cause is Cause.TIMEOUT:
        what = "It ran for longer than allowed (--task-timeout)"
        return Status.FAILED, _ended(what, exit)
    if exit.cause is Cause.SILENCE:
        what = "It printed nothing for too long (--silence-timeout)"
        return Status.FAILED, _ended(what, exit)
    if exit.error is not None:
        return Status.FAILED, exit.error
    if exit.code == 0 and not exit.good:
        reason = "The exit code is 0, but the last line of stdout is not the expected one."
        return Status.FAILED, reason
    return (Status.FINISHED if exit.code == 0 else Status.FAILED), None


def _ended(what: str, exit: Exit) -> str:
    """Return why the shim ended a task, and how its processes reacted."""
    if exit.left:
        sent = "TERM and KILL were sent" if exit.forced else "TERM was sent"
        return f"{what}; {sent}, but these processes still run: {listed(exit.left)}."
    ladder = "; TERM was not enough, KILL was sent" if exit.forced else ""
    return f"{what}{ladder}." + ("" if exit.error is None else f" {exit.error}")


@frozen
class TaskSnapshot:
    """The state of a task at one moment. Times are in seconds since the epoch."""

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
    """Size in bytes of the index of the output, once the task has ended."""
    permit: str | None = None
    """The name of the permit under which it was started; see `Executor.permit`."""
    secret_file: str | None = None
    """The name under which its secrets are kept until it starts."""
    still_running: tuple[Process, ...] = ()
    """Processes that still ran after its end, at the last look."""
    held: bool = False
    """Whether its target stays taken until ``still_running`` is empty."""
    notes: tuple[str, ...] = ()
    """Sentences about anything unusual, for people."""
    cpu_seconds: float | None = None
    """See `Exit.cpu_seconds`."""
    memory_peak: int | None = None
    """See `Exit.memory_peak`."""
    created_steady: float | None = None
    """When it was created, by the `SteadyClock`."""
    ended_steady: float | None = None
    revision: int = 1
    """Counts the changes of everything but the output."""

    @property
    def version(self) -> int:
        """Grows with each change, also across restarts: both parts are on disk."""
        return self.revision + self.output_size

    def as_created(self) -> "TaskSnapshot":
        """Return the task as it was at its creation."""
        return TaskSnapshot(self.id, self.spec, self.created_at, command=self.command)


@frozen
class News:
    """The records that a follower of all tasks has not seen yet."""

    created: Sequence[TaskSnapshot]
    """New tasks, lowest number first."""
    changed: Sequence[tuple[int, TaskSnapshot]]
    """Tasks that changed after their creation, with the number of their last change.

    It is empty while more new tasks may follow, so no task changes before it is known.
    """
    more: bool = False
    """Whether another read may give more."""


Within = Sequence[tuple[str, str, str]] | None
"""Rows of globs for app, env and action. One row must match; None matches all tasks."""


@frozen
class TaskQuery:
    """A search, newest first: at most ``limit`` tasks with a number below ``before``."""

    limit: int = 100
    before: int | None = None
    status: Status | None = None
    app: str | None = None
    env: str | None = None
    user: str | None = None
    """The display name of the principal."""
    text: str | None = None
    """A part of app, env, action or user, whatever the case of ASCII letters."""
    offset: int = 0
    """How many matching tasks are skipped."""
    within: Within = None

    @property
    def quick(self) -> bool:
        """Whether an index finds these tasks, without a scan over others."""
        if self.status in {Status.CREATED, Status.RUNNING}:
            return True  # they have an index, and are few
        narrow = (self.text, self.within, self.user, self.status)
        if any(one is not None for one in narrow) or self.offset > _PASSED_OVER:
            return False
        return (self.app is None) == (self.env is None)


@frozen
class Found:
    """The result of a search: the tasks that were read, newest first."""

    tasks: Sequence[TaskSnapshot]
    rest: Sequence[int] = ()
    """The numbers of further matches; see `TaskStore.read`."""

    @property
    def numbers(self) -> list[int]:
        """The numbers of all matches."""
        return [*(task.id for task in self.tasks), *self.rest]
