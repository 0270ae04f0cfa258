"""The host that this process runs on: its files, processes and threads."""

import errno
import os
import shutil
import signal
from collections.abc import Callable, Container, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

from attrs import field, frozen
from twisted.internet.defer import Deferred
from twisted.internet.protocol import ProcessProtocol
from twisted.internet.threads import deferToThreadPool

from pulsar_api import files
from pulsar_api.errors import StoreUnavailable
from pulsar_api.execution import proc, processes
from pulsar_api.execution.cgroups import Cgroups
from pulsar_api.execution.history import ProcessHistory
from pulsar_api.execution.launcher import Launcher
from pulsar_api.execution.machine import Identity, T
from pulsar_api.execution.proc import Key
from pulsar_api.execution.programs import SHIM_COMMAND
from pulsar_api.output.files import Output, folder_of
from pulsar_api.tasks.model import Limits, Process

BOOT_ID = "/proc/sys/kernel/random/boot_id"

ROOM = 1 << 20
"""Bytes that must be free on the disk for a new task."""

INODES = 32
"""Inodes that must be free on the disk for a new task."""


def _identity(found: os.stat_result) -> Identity:
    return Identity(found.st_dev, found.st_ino, found.st_ctime_ns, found.st_size)


def _living(of: Sequence[Process]) -> Iterable[Process]:
    return processes.living(of)


def _holder(folder: Path) -> Key | None:
    """Return the living shim of a folder, or None if its lock cannot be read."""
    try:
        return processes.holder(folder)
    except OSError as e:
        proc.raise_shortage(e)
        return None  # the disk fails, or the lock is damaged; cgroup and history remain


def _named(folder: Path) -> Key | None:
    """Return the shim that a lock names, living or not, or None."""
    try:
        pid, start = files.read(folder / "lock", processes.LOCK_SIZE).split()
        return int(pid), int(start)
    except (OSError, ValueError):
        return None


@frozen
class LocalMachine:
    """The host that this process runs on; see `Machine` for the methods."""

    _reactor: Any
    """Starts processes and has a thread pool; no interface of Twisted covers both."""
    _shim: Sequence[str] = SHIM_COMMAND
    """The command that starts a shim without a launcher."""
    _own_children: Container[int] | None = None
    """The children that this process reaps itself; None: it is no subreaper."""
    _launcher: Launcher | None = None
    _cgroups: Cgroups | None = None
    _appending: Lock = field(factory=Lock, init=False)
    """Held while a file grows."""
    _histories: dict[Path, ProcessHistory] = field(factory=dict, init=False)
    """The histories of processes, by the folder of the tasks."""

    def boot_id(self) -> str:
        """Return the identifier of this boot."""
        with open(BOOT_ID, encoding="ascii") as file:
            return file.read().strip()

    def in_thread(self, work: Callable[[], T]) -> Deferred[T]:
        """Run a function in a thread, and fire with what it returns."""
        return deferToThreadPool(self._reactor, self._reactor.getThreadPool(), work)

    def check_room(self, folder: Path) -> None:
        """Raise `StoreUnavailable` if there is no room for a new task in a folder."""
        try:
            disk = os.statvfs(folder)
        except OSError as e:
            raise StoreUnavailable(f"{folder}: {e.strerror}") from None
        if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
            raise StoreUnavailable(f"{folder} is not writable")
        if disk.f_bavail * disk.f_frsize < ROOM:
            text = f"less than {ROOM >> 20} MiB is free on the disk of {folder}"
            raise StoreUnavailable(text, full=True)
        if disk.f_files and disk.f_favail < INODES:
            text = f"fewer than {INODES} more files fit on the disk of {folder} (inodes)"
            raise StoreUnavailable(text, full=True)

    def read(self, path: Path, *, tail: bool = False) -> bytes:
        """Return a small file; of a larger one the first `SMALL` bytes, or the last."""
        return files.read(path, tail=tail)

    def write(self, path: Path, data: bytes) -> None:
        """Create or replace a file that only this user can read. It is not synced."""
        with open(files.make(path), "wb") as file:
            file.write(data)

    def append(self, path: Path, data: bytes) -> Identity:
        """Append to a file, which is created if needed, and wait until it is on disk."""
        flags = os.O_WRONLY | os.O_CREAT
        with (
            self._appending,
            open(files.open_regular(path, flags), "wb", buffering=0) as file,
        ):
            fd = file.fileno()
            end = os.fstat(fd).st_size
            # A kill may end write(2) when it has changed only the time of the file. So the
            # size is changed before, which happens completely or not at all.
            os.ftruncate(fd, end + len(data))
            if os.pwrite(fd, data, end) != len(data):
                raise OSError(errno.ENOSPC, "was written only in part", str(path))
            os.fsync(fd)
            return _identity(os.fstat(fd))

    def claim(self, path: Path) -> bool:
        """Create an empty file and sync its folder; return False if the file exists."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            os.close(os.open(path, flags, 0o600))
        except FileExistsError:
            return False
        self.sync(path.parent)
        return True

    def sync(self, path: Path) -> None:
        """Wait until a file or a folder is on disk."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def rename(self, old: Path, new: Path) -> None:
        """Rename a file, and replace what had the new name."""
        os.rename(old, new)

    def remove(self, path: Path) -> None:
        """Remove a file, if it exists."""
        with suppress(FileNotFoundError):
            os.unlink(path)

    def make_folder(self, path: Path) -> None:
        """Create a folder that only this user can enter, if it does not exist."""
        path.mkdir(mode=0o700, exist_ok=True)

    def remove_folder(self, path: Path) -> None:
        """Remove a folder and its content, as far as possible."""
        shutil.rmtree(path, ignore_errors=True)

    def names(self, path: Path) -> list[str]:
        """Return the names in a folder."""
        return os.listdir(path)

    def identity(self, path: Path) -> Identity:
        """Return the identity of a file or folder."""
        return _identity(os.stat(path, follow_symlinks=False))

    def holder(self, lock: Path) -> int:
        """Return the number of the shim that holds a lock, or 0 if none does."""
        return processes.lock_holder(lock)

    def output(self, folder: Path) -> Output:
        """Return the output in a task's folder."""
        return Output(folder)

    def make_cgroup(self, name: str, limits: Limits) -> str:
        """Create a cgroup for a task and return its folder, "" if there are no cgroups."""
        if self._cgroups is not None and name:
            return self._cgroups.make(name, limits)
        if limits:
            raise OSError(errno.ENOSYS, "there are no cgroups, so limits cannot be set")
        return ""

    def spawn(self, protocol: ProcessProtocol, folder: Path) -> None:
        """Start the shim of a folder."""
        if self._launcher is not None and self._launcher.spawn(protocol, folder):
            return
        # No path, uid or gid: with them Twisted forks the whole daemon. The shim
        # changes directory itself.
        self._reactor.spawnProcess(
            protocol,
            self._shim[0],
            [*self._shim, str(folder)],
            env={},
            childFDs={0: "w", 1: "r", 2: "r"},
        )

    def terminate(self, folder: Path) -> None:
        """Send TERM and CONT to the shim of a folder, and to no other process."""
        self._signal(folder, signal.SIGTERM, signal.SIGCONT)

    def wake(self, folder: Path) -> bool:
        """Send CONT to the shim of a folder; return whether it was stopped."""
        return self._signal(folder, signal.SIGCONT)

    def end(
        self, folder: Path, *, numbers: bool, cgroup: str
    ) -> Deferred[tuple[Process, ...]]:
        """Kill the shim of a folder and all of its task; fires with what remains."""
        return self.in_thread(lambda: self._end(folder, numbers, cgroup))

    def _end(
        self,
        folder: Path,
        numbers: bool,  # noqa: FBT001
        cgroup: str,
    ) -> tuple[Process, ...]:
        living = _holder(folder)
        remains: list[Process] = []
        if self._cgroups is not None and cgroup:
            if living is not None:
                # Otherwise the shim would report that the command ended by itself.
                proc.send(living, signal.SIGSTOP)
            remains += self._cgroups.end(cgroup, processes.KILL_PATIENCE)
        if living is not None:
            remains += processes.end_tree(living)
        dead = _named(folder) if numbers else None
        history = self._history(folder.parent)
        found = history.orphans(int(folder.name), dead, believe=numbers)
        remains += found.end()
        return tuple(dict.fromkeys(remains))

    def _history(self, tasks: Path) -> ProcessHistory:
        return self._histories.setdefault(tasks, ProcessHistory(tasks, self._own_children))

    def sample_processes(self, tasks: Path, running: Sequence[int]) -> Deferred[float]:
        """Remember the processes of tasks; fires with the processor time that this took."""

        def sample() -> float:
            found = {number: _holder(folder_of(tasks, number)) for number in running}
            shims = {n: key or _named(folder_of(tasks, n)) for n, key in found.items()}
            known = {n: key for n, key in shims.items() if key is not None}
            return self._history(tasks).sample(known)

        return self.in_thread(sample)

    def living(self, processes: Sequence[Process]) -> Deferred[tuple[Process, ...]]:
        """Fire with those of the processes that still run, and all that runs below them."""
        return self.in_thread(lambda: tuple(_living(processes)))

    def _signal(self, folder: Path, *numbers: signal.Signals) -> bool:
        with suppress(OSError):
            lock = folder / "lock"
            handle = os.pidfd_open(pid := self.holder(lock))
            try:
                # If the number still holds the lock, the handle is that of the shim.
                if self.holder(lock) == pid:
                    with open(f"/proc/{pid}/stat", "rb") as file:
                        stopped = file.read().rpartition(b")")[2].split()[0] in b"tT"
                    for number in numbers:
                        signal.pidfd_send_signal(handle, number)
                    return stopped
            finally:
                os.close(handle)
        return False
