"""The ports of the core: an executor that runs commands, a store that keeps records."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Protocol

from attrs import field, frozen
from twisted.internet.defer import Deferred

from pulsar_api.principal import Principal
from pulsar_api.tasks.model import (
    Command,
    Exit,
    Found,
    News,
    Process,
    TaskQuery,
    TaskSnapshot,
    TaskSpec,
    Within,
)

RESTART = 1 << 36
"""How far revisions jump when a daemon takes up a task; see `TaskStore.take_up`."""


@frozen
class NewTask:
    """The first record of a task."""

    spec: TaskSpec
    created_at: float
    """By the wall clock."""
    steady: float
    """When it was created, by the `SteadyClock`."""
    key: str | None = None
    """The idempotency key."""
    secret_file: str | None = None
    """See `Executor.keep_secrets`."""
    notes: tuple[str, ...] = ()
    """See `TaskSnapshot.notes`."""


@frozen
class Bounds:
    """The limits of a run, in seconds and bytes. 0 means no limit, except for ``grace``."""

    grace: float
    total: float = 0
    silence: float = 0
    max_output: int = 0
    """Bytes of output, and bytes of its index. Beyond this limit the middle is dropped."""


@frozen
class Secrets:
    """The secrets of a task."""

    values: Mapping[str, str] = field(factory=dict, repr=False)
    """By the names of the variables."""
    forms: tuple[bytes, ...] = field(default=(), repr=False)
    """The texts that must not be printed; see `secret_forms.forms`."""


@frozen
class Keep:
    """What retention keeps; 0 means everything."""

    tasks: int = 0
    seconds: float = 0
    size: int = 0
    """Bytes of output of all ended tasks, with its indexes."""
    most: int = 0
    """Bytes of output that one task has on disk at most; see `Bounds.max_output`."""


class Sink(Protocol):
    """Receives the reports of a run. ``ended`` is called once, and last."""

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
        """Stop following. The run goes on, and the sink gets no more reports."""


class Executor(Protocol):
    """Runs commands. It never starts the same task twice."""

    def check(self) -> None:
        """Raise `StoreUnavailable` if the output of a new run could not be kept."""

    def place(self) -> str:
        """Return a text that differs between these folders and any copy of them."""

    def permit(self, task_id: int) -> Deferred[str]:
        """Allow the start of a task; fire with the permit's name once it is on disk.

        A permit is valid until the machine boots or the folders are replaced. Fails with
        `StoreUnavailable`, or with `FolderInUse` if a run has begun in the task's folder.
        """

    def permitted(self) -> Deferred[AbstractSet[int]]:
        """Fire with the numbers of all tasks that ever got a permit."""

    def is_here(self, task_id: int) -> bool:
        """Return whether the permit of a run, used or not, is from this boot and folder.

        Only then do the process numbers in its folder still identify the same processes.
        """

    def start(
        self,
        task_id: int,
        command: Command,
        bounds: Bounds,
        sink: Sink,
        permit: str | None = None,
    ) -> Run:
        """Start a command. It raises nothing: the sink gets each error as an end."""

    def adopt(self, task_id: int, permit: str | None, bounds: Bounds, sink: Sink) -> Run:
        """Follow a run that another daemon started, or report how it ended.

        The sink gets `Exit.unstarted` only if no shim has begun and the permit is valid.
        In every other doubtful case the run counts as lost.
        """

    def cgroup(self, task_id: int) -> str:
        """Return the name of a run's cgroup, "" if the run's folder does not name one."""

    def prevent_start(self, task_id: int) -> bool:
        """Bar every shim from this task; return False if one has begun.

        Raises:
            StoreUnavailable: The disk does not allow this at the moment.
        """

    def living(self, processes: Sequence[Process]) -> Deferred[tuple[Process, ...]]:
        """Fire with those of the processes that still run, and with their descendants."""

    def keep_secrets(
        self, secrets: Mapping[str, str], name: str | None = None
    ) -> Deferred[str]:
        """Keep the secrets of a waiting task; fire with their name once they are on disk.

        With a name, replace the secrets of that name. Fails with `StoreUnavailable`.
        """

    def secrets(self, task_id: int, name: str | None) -> Deferred[Secrets | None]:
        """Fire with the secrets of a task, or None if they are gone.

        Fails with `StoreUnavailable` if they cannot be read at the moment.
        """

    def forget_secrets(self, task_id: int, name: str | None) -> None:
        """Remove the secrets of a task that no longer starts."""

    def forget_other_secrets(self, names: AbstractSet[str]) -> Deferred[None]:
        """Remove all secrets but those of these names."""

    def forget_all_secrets(self, task_ids: Sequence[int]) -> Deferred[None]:
        """Remove all files with secrets from the folders of ended runs."""

    def note_kill(self, task_id: int, by: Principal) -> None:
        """Note on disk, for the next daemon, the principal that asked for a kill."""

    def noted_kill(self, task_id: int) -> Principal | None:
        """Return the principal that asked an earlier daemon for a kill, or None."""

    def forget(self, task_ids: Sequence[int]) -> Deferred[None]:
        """Remove the folders of ended runs."""

    def kept(self) -> Deferred[list[int]]:
        """Fire with the numbers of all runs that have a folder."""


@frozen
class Reading:
    """The clocks of the host at one moment, in seconds, and the place of the state."""

    boot: str
    """The kernel's id of this boot (``/proc/sys/kernel/random/boot_id``)."""
    uptime: float
    """Time since boot, including suspend (``CLOCK_BOOTTIME``)."""
    wall: float
    """Seconds since the epoch by the clock of the host, which may be wrong."""
    steady: float
    """The same moment by the `SteadyClock`."""
    place: str
    """See `Executor.place`."""

    def elsewhere(self, now: "Reading") -> bool:
        """Return whether a later reading comes from a copy of the state folder.

        A boot can change the number of a device, but none of the other values. The file of
        permits only ever grows.
        """
        before, after = self.place.split(), now.place.split()
        if self.boot != now.boot:
            before[0] = after[0]
        *folders, size, changed = before
        *same, new_size, new_changed = after
        if size == "0":  # there was no such file yet
            return folders[:3] != same[:3]
        if folders != same or int(new_size) < int(size):
            return True
        return size == new_size and changed != new_changed


class TaskStore(Protocol):
    """Keeps one record for each task. Each Deferred fires when the record is on disk.

    All of them fail with `StoreUnavailable` if the store cannot be used at the moment.
    """

    def create(self, new: NewTask) -> Deferred[TaskSnapshot]:
        """Record a new task; its number is higher than that of every earlier task."""

    def by_key(
        self, key: str, user: Principal | None, since: float
    ) -> Deferred[TaskSnapshot | None]:
        """Fire with the newest task that this user created with a key, or None.

        Only tasks created after ``since``, by the `SteadyClock`, count.
        """

    def reserve(self, number: int) -> Deferred[int]:
        """Give no task this number or a lower one; fires with the last one given."""

    def save(self, snapshot: TaskSnapshot) -> Deferred[None]:
        """Record the state of a task."""

    def load(self, task_id: int) -> Deferred[TaskSnapshot]:
        """Fire with a task's record, or fail with `UnknownTask`."""

    def search(self, query: TaskQuery) -> Deferred[Found]:
        """Fire with the tasks that match, newest first: some tasks, and further numbers.

        A long search delays no other request. Cancelling the Deferred ends the search.
        """

    def read(self, numbers: Sequence[int]) -> Deferred[Found]:
        """Fire with the first of these tasks, leaving out removed ones."""

    def select(self, query: TaskQuery) -> Deferred[list[TaskSnapshot]]:
        """Fire with all tasks that match, newest first, however large they are."""

    def after(self, task_id: int, within: Within = None) -> Deferred[TaskSnapshot | None]:
        """Fire with the oldest matching task with a higher number, or None."""

    def last_change(self) -> Deferred[tuple[int, int]]:
        """Fire with the numbers of the last change and of the newest task, at one moment.

        0 if there was none.
        """

    def news(self, since: int, known: int, limit: int) -> Deferred[News]:
        """Fire with the records made since a change and a task; see `News`.

        At most ``limit`` of each, fewer if they are large. The number of changes grows with
        each record, also across restarts, and no number is ever used twice.
        """

    def take_up(self) -> Deferred[list[TaskSnapshot]]:
        """Fire with the tasks that have not ended or hold their target, oldest first.

        Each recorded revision is raised by `RESTART`, and so exceeds every revision that an
        earlier daemon announced without a record.
        """

    def reading(self) -> Deferred[Reading | None]:
        """Fire with the last reading of the clocks that was kept, or None."""

    def keep_reading(self, reading: Reading) -> Deferred[None]:
        """Keep a reading of the clocks in place of the last one."""

    def newest_time(self) -> Deferred[float | None]:
        """Fire with the newest time, by the wall clock, in any record."""

    def expired(self, keep: Keep, steady: float, limit: int) -> Deferred[list[int]]:
        """Fire with the numbers of ended tasks that retention does not keep, oldest first.

        Ages are measured by the `SteadyClock`. A task is kept as long as its idempotency
        key is remembered and as long as it holds its target.
        """

    def forget(self, task_ids: Sequence[int]) -> Deferred[None]:
        """Remove records of ended tasks; their numbers are not used again."""

    def forgotten(self) -> Deferred[set[int]]:
        """Fire with the numbers of removed records, except those that are `cleared`."""

    def cleared(self, task_ids: Sequence[int]) -> Deferred[None]:
        """Note that tasks with removed records have no files left either."""
