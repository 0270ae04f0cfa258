"""What execution asks of a host: files, processes and threads, as protocols.

`LocalMachine` is the host that the daemon runs on. The simulation of the tests has another
one, with a disk that forgets what was not synced.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from attrs import frozen
from twisted.internet.defer import Deferred
from twisted.internet.protocol import ProcessProtocol

from pulsar_api.output.records import Record
from pulsar_api.tasks.model import Limits, Process

T = TypeVar("T")


@frozen
class Identity:
    """Which file or folder a path means, to tell it from another in its place."""

    device: int
    inode: int
    changed: int
    """When it was last changed in any way, nanoseconds; nothing can set this (stat(2))."""
    size: int
    """Bytes."""


class Records(Protocol):
    """The files that a shim writes, see `Output`."""

    def size(self) -> int:
        """Return the bytes of output."""

    def index_size(self) -> int:
        """Return the bytes of the index of the output that are on disk."""

    def news(self, first: int) -> Iterable[tuple[int, Record]]:
        """Return what is new since record ``first``, with the numbers: see `Output`."""

    def last_line(self) -> bytes:
        """Return the last line of standard output."""


class Machine(Protocol):
    """Files, processes and threads of one host. What goes wrong is an `OSError`."""

    def boot_id(self) -> str:
        """Return the kernel's name for this boot."""

    def in_thread(self, work: Callable[[], T]) -> Deferred[T]:
        """Fire with what the function returns, which may take its time."""

    def check_room(self, folder: Path) -> None:
        """Raise `StoreUnavailable` if a new task could not be kept in a folder."""

    def read(self, path: Path, *, tail: bool = False) -> bytes:
        """Return a small file; of a larger one the first `SMALL` bytes, or the last.

        Raises `Damaged` if it is no file, and never will be.
        """

    def write(self, path: Path, data: bytes) -> None:
        """Make or replace a file; nobody else can read it; it is not synced."""

    def append(self, path: Path, data: bytes) -> Identity:
        """Add to a file, which is made if need be, and wait until it is on disk.

        Return the identity of the file afterwards. A kill in the middle leaves the file as
        it was, or larger; it never changes the file without its size.
        """

    def claim(self, path: Path) -> bool:
        """Make an empty file and sync its folder; False: there is one already."""

    def sync(self, path: Path) -> None:
        """Wait until a file or a folder is on disk."""

    def rename(self, old: Path, new: Path) -> None:
        """Give a file another name, in place of what has that name."""

    def remove(self, path: Path) -> None:
        """Remove a file, if it is there."""

    def make_folder(self, path: Path) -> None:
        """Make a folder that nobody else can enter, if it is not there."""

    def remove_folder(self, path: Path) -> None:
        """Remove a folder and what is in it, as far as possible."""

    def names(self, path: Path) -> list[str]:
        """Return the names in a folder."""

    def identity(self, path: Path) -> Identity:
        """Return which file or folder this is."""

    def holder(self, lock: Path) -> int:
        """Return the number of the shim that holds a lock, 0 if nobody does.

        -1 if its number is not known. Raises `Damaged` if the lock is no file.
        """

    def output(self, folder: Path) -> Records:
        """Return a reader of what a shim has written."""

    def make_cgroup(self, name: str, limits: Limits) -> str:
        """Make a cgroup for a task and return its folder, "" if there are no cgroups.

        Raise `OSError` if a limit cannot be set.
        """

    def spawn(self, protocol: ProcessProtocol, folder: Path) -> None:
        """Start the shim of a folder."""

    def terminate(self, folder: Path) -> None:
        """Send TERM and CONT to the shim of a folder, and to nobody else."""

    def wake(self, folder: Path) -> bool:
        """Send CONT to the shim of a folder; return whether it was stopped."""

    def end(
        self, folder: Path, *, numbers: bool, cgroup: str
    ) -> Deferred[tuple[Process, ...]]:
        """Kill the shim of a folder and all of its task; fires with what remains.

        ``numbers``: whether process numbers in the folder's files are to be believed.
        ``cgroup`` is the name of its cgroup, "" if that is not known.
        """

    def living(self, processes: Sequence[Process]) -> Deferred[tuple[Process, ...]]:
        """Fire with those of the processes, and what is below them, that still run."""
