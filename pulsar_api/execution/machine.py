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
    """Identifies a file or folder, to tell it from another one with the same path."""

    device: int
    inode: int
    changed: int
    """The time of its last change (ctime) in nanoseconds; no program can set it."""
    size: int
    """Its size in bytes."""


class Records(Protocol):
    """The output that a shim writes; see `Output`."""

    def size(self) -> int:
        """Return the size of the output in bytes."""

    def index_size(self) -> int:
        """Return the size of its index in bytes, without what was cut."""

    def news(self, first: int) -> Iterable[tuple[int, Record]]:
        """Return the records that matter from number ``first`` on; see `Index.news`."""

    def last_line(self) -> bytes:
        """Return the last line of standard output."""


class Machine(Protocol):
    """Files, processes and threads of one host. All methods may raise `OSError`."""

    def boot_id(self) -> str:
        """Return the identifier of this boot."""

    def in_thread(self, work: Callable[[], T]) -> Deferred[T]:
        """Run a function in a thread, and fire with what it returns."""

    def check_room(self, folder: Path) -> None:
        """Raise `StoreUnavailable` if there is no room for a new task in a folder."""

    def read(self, path: Path, *, tail: bool = False) -> bytes:
        """Return a small file; of a larger one the first `SMALL` bytes, or the last.

        Raises `Damaged` if it is not a regular file.
        """

    def write(self, path: Path, data: bytes) -> None:
        """Create or replace a file that only this user can read. It is not synced."""

    def append(self, path: Path, data: bytes) -> Identity:
        """Append to a file, which is created if needed, and wait until it is on disk.

        Return the identity of the file afterwards. If the process is killed, the file is
        unchanged or larger; it never changes without a change of its size.
        """

    def claim(self, path: Path) -> bool:
        """Create an empty file and sync its folder; return False if the file exists."""

    def sync(self, path: Path) -> None:
        """Wait until a file or a folder is on disk."""

    def rename(self, old: Path, new: Path) -> None:
        """Rename a file, and replace what had the new name."""

    def remove(self, path: Path) -> None:
        """Remove a file, if it exists."""

    def make_folder(self, path: Path) -> None:
        """Create a folder that only this user can enter, if it does not exist."""

    def remove_folder(self, path: Path) -> None:
        """Remove a folder and its content, as far as possible."""

    def names(self, path: Path) -> list[str]:
        """Return the names in a folder."""

    def identity(self, path: Path) -> Identity:
        """Return the identity of a file or folder."""

    def holder(self, lock: Path) -> int:
        """Return the number of the shim that holds a lock, or 0 if none does.

        Return -1 if its number is not known. Raises `Damaged` if the lock is not a regular
        file.
        """

    def output(self, folder: Path) -> Records:
        """Return the output in a task's folder."""

    def make_cgroup(self, name: str, limits: Limits) -> str:
        """Create a cgroup for a task and return its folder, "" if there are no cgroups.

        Raises `OSError` if a limit cannot be set.
        """

    def spawn(self, protocol: ProcessProtocol, folder: Path) -> None:
        """Start the shim of a folder."""

    def terminate(self, folder: Path) -> None:
        """Send TERM and CONT to the shim of a folder, and to no other process."""

    def wake(self, folder: Path) -> bool:
        """Send CONT to the shim of a folder; return whether it was stopped."""

    def end(
        self, folder: Path, *, numbers: bool, cgroup: str
    ) -> Deferred[tuple[Process, ...]]:
        """Kill the shim of a folder and all processes of its task; fires with what remains.

        ``numbers`` says whether process numbers in the folder's files are to be believed.
        ``cgroup`` is the name of its cgroup, "" if that is not known.
        """

    def living(self, processes: Sequence[Process]) -> Deferred[tuple[Process, ...]]:
        """Fire with those of the processes that still run, and all that runs below them."""
