"""What the core asks of the world: something that runs commands, something that keeps."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from attrs import frozen
from twisted.internet.defer import Deferred

from pulsar_api.task import Command, Exit, News, TaskQuery, TaskSnapshot, TaskSpec, Within


@frozen
class Bounds:
    """What a run may take: seconds, and bytes. 0 means no limit, but for the grace."""

    grace: float
    total: float = 0
    silence: float = 0
    max_output: int = 0
    """Bytes of output, and of its index; of more the middle is cut. 0: all is kept."""


@frozen
class Keep:
    """How much of the past is kept; 0 means all."""

    tasks: int = 0
    seconds: float = 0
    size: int = 0
    """Bytes of output of all ended tasks, with its indexes."""
    most: int = 0
    """Bytes of output that one task has on disk at most; see `Bounds.max_output`."""


class Sink(Protocol):
    """Who is told about a run. ``ended`` comes once and last."""

    def started(self, pid: int) -> None:
        """The command runs under this process number."""

    def printed(self, size: int) -> None:
        """The output has grown to ``size`` bytes, and they are on disk."""

    def ended(self, exit: Exit) -> None:
        """The run is over and its result is on disk."""


class Run(Protocol):
    """One run of one command."""

    def kill(self) -> None:
        """End the whole process tree: TERM, after the grace KILL. Harmless if repeated."""

    def detach(self) -> None:
        """Stop following; the run goes on, and nobody is told any more."""


class Executor(Protocol):
    """Runs commands. It never starts the same task twice, whoever asks."""

    def check(self) -> None:
        """Raise `StoreUnavailable` if what a new run prints could not be kept."""

    def start(self, task_id: int, command: Command, bounds: Bounds, sink: Sink) -> Run:
        """Start a command. Whatever goes wrong is told to the sink, as an end."""

    def adopt(self, task_id: int, sink: Sink) -> Run:
        """Follow a run that another daemon started, or say how it ended."""

    def keep_secrets(self, task_id: int, secrets: Mapping[str, str]) -> Deferred[None]:
        """Keep the secrets of a task that waits; fires when they are safe on disk.

        They are gone as soon as the run has them. Fails with `StoreUnavailable`.
        """

    def secrets(self, task_id: int) -> Deferred[Mapping[str, str] | None]:
        """Fire with the secrets that are kept, None if there are none (any more).

        Fails with `StoreUnavailable` if nobody can know now.
        """

    def forget_secrets(self, task_id: int) -> None:
        """Remove the secrets of a task that will not start any more."""

    def forget(self, task_ids: Sequence[int]) -> Deferred[None]:
        """Remove what is kept of ended runs."""

    def kept(self) -> Deferred[list[int]]:
        """Fire with the numbers of the runs of which anything is kept."""


class TaskStore(Protocol):
    """Keeps one record per task. Each Deferred fires when the record is safe on disk.

    All of them fail with `StoreUnavailable` if the store cannot be used at the moment.
    """

    def create(
        self, spec: TaskSpec, created_at: float, key: str | None = None
    ) -> Deferred[TaskSnapshot]:
        """Record a new task; its number is higher than any before, for ever."""

    def by_key(
        self, key: str, user: str | None, since: float
    ) -> Deferred[TaskSnapshot | None]:
        """Fire with the newest task with this key of a user that was created since."""

    def reserve(self, number: int) -> Deferred[None]:
        """Give no task this number or a lower one any more."""

    def save(self, snapshot: TaskSnapshot) -> Deferred[None]:
        """Record how a task stands now."""

    def load(self, task_id: int) -> Deferred[TaskSnapshot]:
        """Fire with a task's record, or fail with `UnknownTask`."""

    def select(self, query: TaskQuery) -> Deferred[list[TaskSnapshot]]:
        """Fire with the tasks that match, newest first."""

    def after(self, task_id: int, within: Within = None) -> Deferred[TaskSnapshot | None]:
        """Fire with the oldest task that counts and whose number is higher, or None."""

    def last_change(self) -> Deferred[tuple[int, int]]:
        """Fire with the numbers of the last change and of the newest task, at one moment.

        0 if there was none.
        """

    def news(self, since: int, known: int, limit: int) -> Deferred[News]:
        """Fire with what has been recorded since a change and a task: see `News`.

        At most ``limit`` of each. Numbers of changes grow with each record, also over
        restarts, and are never given again.
        """

    def unfinished(self) -> Deferred[list[TaskSnapshot]]:
        """Fire with the tasks that have not ended, oldest first."""

    def expired(self, keep: Keep, now: float, limit: int) -> Deferred[list[int]]:
        """Fire with the numbers of ended tasks that need not be kept, oldest first.

        A task with an idempotency key is kept as long as the key counts.
        """

    def existing(self, task_ids: Sequence[int]) -> Deferred[set[int]]:
        """Fire with those of the numbers that have a record."""

    def forget(self, task_ids: Sequence[int]) -> Deferred[None]:
        """Remove records of ended tasks; their numbers are not used again."""
