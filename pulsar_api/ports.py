"""What the core asks of the world: something that runs commands, something that keeps."""

from typing import Protocol

from attrs import frozen
from twisted.internet.defer import Deferred

from pulsar_api.task import Command, Exit, TaskQuery, TaskSnapshot, TaskSpec


@frozen
class Clocks:
    """Seconds that a run may take; 0 means no limit for the last two."""

    grace: float
    total: float = 0
    silence: float = 0


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

    def start(self, task_id: int, command: Command, clocks: Clocks, sink: Sink) -> Run:
        """Start a command. Whatever goes wrong is told to the sink, as an end."""

    def adopt(self, task_id: int, sink: Sink) -> Run:
        """Follow a run that another daemon started, or say how it ended."""


class TaskStore(Protocol):
    """Keeps one record per task. Each Deferred fires when the record is safe on disk.

    All of them fail with `StoreUnavailable` if the store cannot be used at the moment.
    """

    def create(self, spec: TaskSpec, created_at: float) -> Deferred[TaskSnapshot]:
        """Record a new task; its number is higher than any before, for ever."""

    def save(self, snapshot: TaskSnapshot) -> Deferred[None]:
        """Record how a task stands now."""

    def load(self, task_id: int) -> Deferred[TaskSnapshot]:
        """Fire with a task's record, or fail with `UnknownTask`."""

    def select(self, query: TaskQuery) -> Deferred[list[TaskSnapshot]]:
        """Fire with the tasks that match, newest first."""

    def after(self, task_id: int) -> Deferred[TaskSnapshot | None]:
        """Fire with the oldest task whose number is higher, or None."""

    def unfinished(self) -> Deferred[list[TaskSnapshot]]:
        """Fire with the tasks that have not ended, oldest first."""
