"""The `Machine` of a simulated daemon, where each operation may be the last one."""

import errno
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from attrs import define
from twisted.internet.defer import Deferred
from twisted.internet.error import ProcessDone, ProcessExitedAlready, ProcessTerminated
from twisted.internet.protocol import ProcessProtocol
from twisted.python.failure import Failure

from pulsar_api.errors import StoreUnavailable
from pulsar_api.execution.machine import Identity, Machine
from pulsar_api.output.records import Record
from pulsar_api.shim.shim import RECORD
from pulsar_api.tasks.model import Limits, Process
from tests.simulation.disk import Inode
from tests.simulation.scheduler import Died, Fiber
from tests.simulation.shims import Shim, Tree

if TYPE_CHECKING:
    from tests.simulation.daemon import Daemon

T = TypeVar("T")

SWEEP = 5.0
"""Seconds for which a kill of processes is repeated."""


class Work(Fiber):
    """A thread of a daemon that does one piece of work."""

    __slots__ = ("_daemon", "_done", "_work")

    def __init__(
        self, daemon: "Daemon", work: Callable[[], object], done: Deferred[object]
    ) -> None:
        super().__init__(daemon.scheduler)
        self._daemon = daemon
        self._work = work
        self._done = done
        daemon.threads[self] = None
        daemon.scheduler.after(daemon.world.latency(), daemon.scheduler.wake, self)

    @property
    def alive(self) -> bool:
        """Whether the process of the thread is alive."""
        return self._daemon.alive

    def step(self) -> None:
        """Take a step, unless the process has been killed."""
        if self._daemon.alive:
            super().step()

    def run(self) -> None:
        """Do the work, and pass the result to the reactor."""
        result: object
        try:
            result = self._work()
        except Exception:  # noqa: BLE001 - as a thread pool does
            result = Failure()
        if not self._daemon.alive:
            raise Died
        del self._daemon.threads[self]
        self._daemon.post(self._fire, result)

    def _fire(self, result: object) -> None:
        if not self._done.called:
            self._done.callback(result)


@define(eq=False)
class Pipe:
    """The connection from a shim to the daemon that has started it."""

    daemon: "Daemon"
    protocol: ProcessProtocol
    shim: Shim | None = None

    def tell(self, data: bytes) -> None:
        """Send a report of the shim."""
        self.daemon.post(self.protocol.childDataReceived, 1, data)

    def complain(self, text: str) -> None:
        """Send the shim's standard error."""
        self.daemon.post(self.protocol.childDataReceived, 2, f"{text}\n".encode())

    def closed(self) -> None:
        """Report that the shim sends nothing more."""
        self.daemon.post(self.protocol.childConnectionLost, 1)

    def ended(self, status: int | None, signal: str | None) -> None:
        """Report that the shim has ended."""
        number = {"SIGKILL": 9, "SIGTERM": 15}.get(signal or "")
        reason = ProcessDone(0) if status == 0 else ProcessTerminated(status, number)
        self.daemon.post(self.protocol.processExited, Failure(reason))
        self.daemon.post(self.protocol.processEnded, Failure(reason))

    # The methods that the protocol calls on its transport.

    def closeStdin(self) -> None:
        """Do nothing, because the shim does not read it."""

    def loseConnection(self) -> None:
        """Do nothing, because no task holds the pipes."""

    def signalProcess(self, name: str | int) -> None:
        """Signal the shim."""
        shim = self.shim
        self.daemon.operation()
        if shim is None or not shim.alive:
            raise ProcessExitedAlready
        if name == "TERM":
            shim.terminate()
        elif name == signal.SIGCONT:
            shim.resume()


@define(eq=False)
class SimulatedMachine:
    """Files and processes of a world, as one daemon sees them."""

    _daemon: "Daemon"

    def _operation(self) -> None:
        self._daemon.operation()

    def _open(self) -> None:
        """Raise `OSError` if no descriptor is free to open a file."""
        self._daemon.operation()
        if self._daemon.world.choked:
            raise OSError(errno.EMFILE, "Too many open files", "a file")

    def boot_id(self) -> str:
        """Return the kernel's name for this boot."""
        self._open()
        return self._daemon.world.boot_id

    def in_thread(self, work: Callable[[], T]) -> Deferred[T]:
        """Fire with the result of the function, when a thread has run it."""
        done: Deferred[T] = Deferred()
        if self._daemon.alive:
            Work(self._daemon, work, done)  # type: ignore[arg-type]
        return done

    def check_room(self, folder: Path) -> None:
        """Raise `StoreUnavailable` if there is no room for a new task in a folder."""
        self._operation()
        disk = self._daemon.world.disk
        try:
            disk.find(str(folder))
        except OSError as e:
            raise StoreUnavailable(f"{folder}: {e.strerror}") from None
        if disk.full or disk.no_inodes:
            raise StoreUnavailable("the simulated disk is full", full=True)

    def append(self, path: Path, data: bytes) -> Identity:
        """Append to a file, made if it is missing, and wait until it is on disk."""
        self._open()
        disk = self._daemon.world.disk
        folder, name = disk.folder_of(str(path))
        found = (folder.entries or {}).get(name) or disk.make(folder, name)
        self._operation()
        # As on a real disk, the size comes first, and a crash can precede the content.
        end = len(found.content)
        disk.write(found, bytes(len(data)), append=True)
        self._operation()
        disk.write(found, found.content[:end] + data)
        self._operation()
        disk.sync(found)
        return Identity(1, found.number, found.changed, len(found.content))

    def read(self, path: Path, *, tail: bool = False) -> bytes:
        """Return the content of a file; all files are small here."""
        self._open()
        found = self._daemon.world.disk.find(str(path))
        if found.entries is not None:
            raise IsADirectoryError(21, "Is a directory", str(path))
        return found.content

    def write(self, path: Path, data: bytes) -> None:
        """Make or replace a file."""
        self._open()
        disk = self._daemon.world.disk
        folder, name = disk.folder_of(str(path))
        if folder.entries and name in folder.entries:
            found = folder.entries[name]
            disk.write(found, b"")
        else:
            found = disk.make(folder, name)
        self._operation()
        disk.write(found, data)

    def claim(self, path: Path) -> bool:
        """Make an empty file and sync its folder. Return False if it already exists."""
        self._open()
        disk = self._daemon.world.disk
        folder, name = disk.folder_of(str(path))
        try:
            disk.make(folder, name)
        except FileExistsError:
            return False
        self._operation()
        disk.sync(folder)
        return True

    def sync(self, path: Path) -> None:
        """Wait until a file or a folder is on disk."""
        self._open()
        disk = self._daemon.world.disk
        disk.sync(disk.find(str(path)))

    def rename(self, old: Path, new: Path) -> None:
        """Rename a file, replacing any other with the new name."""
        self._operation()
        disk = self._daemon.world.disk
        disk.rename(*disk.folder_of(str(old)), *disk.folder_of(str(new)))

    def remove(self, path: Path) -> None:
        """Remove a file if it exists."""
        self._operation()
        disk = self._daemon.world.disk
        with suppress(FileNotFoundError):
            disk.unlink(*disk.folder_of(str(path)))

    def make_folder(self, path: Path) -> None:
        """Make a folder unless it exists."""
        self._operation()
        disk = self._daemon.world.disk
        folder, name = disk.folder_of(str(path))
        if folder.entries is not None and name in folder.entries:
            return
        disk.make(folder, name, is_folder=True)

    def remove_folder(self, path: Path) -> None:
        """Remove a folder and its content, as far as possible."""
        disk = self._daemon.world.disk
        try:
            folder, name = disk.folder_of(str(path))
            inside = disk.find(str(path))
            for entry in list(inside.entries or ()):
                self._operation()
                disk.unlink(inside, entry)
            self._operation()
            disk.unlink(folder, name)
        except OSError:
            pass

    def names(self, path: Path) -> list[str]:
        """Return the names in a folder."""
        self._open()
        return list(self._folder(path).entries or ())

    def identity(self, path: Path) -> Identity:
        """Return the identity of a file or folder."""
        self._operation()
        found = self._daemon.world.disk.find(str(path))
        return Identity(1, found.number, found.changed, len(found.content))

    def holder(self, lock: Path) -> int:
        """Return the number of the shim that holds a lock, 0 if the lock is free."""
        self._open()
        found = self._daemon.world.disk.find(str(lock))
        if found.holder is None:
            return 0
        return int((found.content.split() or [b"-1"])[0])

    def output(self, folder: Path) -> "Written":
        """Return a reader of the output that a shim has written."""
        return Written(self, folder)

    def content(self, path: Path) -> bytes:
        """Return the content of a file, empty if it does not exist."""
        try:
            return self.read(path)
        except FileNotFoundError:
            return b""

    def make_cgroup(self, name: str, limits: Limits) -> str:
        """Return "", because this world has no cgroups."""
        return ""

    def spawn(self, protocol: ProcessProtocol, folder: Path) -> None:
        """Start the shim of a folder."""
        self._open()
        world = self._daemon.world
        if world.crowded:
            raise BlockingIOError(11, "Resource temporarily unavailable", "fork")
        pipe = Pipe(self._daemon, protocol)
        pipe.shim = Shim(world, self._daemon.state, str(folder), pipe)
        world.scheduler.wake(pipe.shim)
        protocol.makeConnection(pipe)
        self._operation()

    def _shim_of(self, folder: Path) -> Shim | None:
        try:
            pid = self.holder(folder / "lock")
        except (OSError, ValueError):
            return None
        self._operation()
        found = self._daemon.world.shims
        return next((shim for shim in found if shim.pid == pid), None)

    def terminate(self, folder: Path) -> None:
        """Send TERM and CONT to the shim of a folder, and to no other process."""
        shim = self._shim_of(folder)
        if shim is not None:
            shim.terminate()
            shim.resume()

    def wake(self, folder: Path) -> bool:
        """Send CONT to the shim of a folder; return whether it was stopped."""
        shim = self._shim_of(folder)
        stopped = shim is not None and shim.stopped
        if shim is not None:
            shim.resume()
        return stopped

    def end(
        self, folder: Path, *, numbers: bool, cgroup: str
    ) -> Deferred[tuple[Process, ...]]:
        """Kill the shim of a folder and its task; fire with the remaining processes."""

        def work() -> tuple[Process, ...]:
            trees = list(self._trees(folder, numbers=numbers))
            world = self._daemon.world
            until = world.now + SWEEP
            while True:
                for tree in trees:
                    self._operation()
                    tree.kill()
                left = [member for tree in trees for member in tree.living()]
                if not left or world.now >= until:
                    break
                assert world.scheduler.current is not None
                world.scheduler.current.sleep(1.0)
                self._operation()
            return tuple(Process(m.pid, m.start, "run", "root") for m in left)

        return self.in_thread(work)

    def _trees(self, folder: Path, *, numbers: bool) -> Iterator[Tree]:
        self._operation()
        world, path = self._daemon.world, str(folder)
        named: object = None
        if numbers:
            try:
                named = world.disk.find(path).parts
            except OSError:
                named = None
        for tree in world.trees:
            if tree is named or tree.path == path:
                yield tree

    def living(self, processes: Sequence[Process]) -> Deferred[tuple[Process, ...]]:
        """Fire with those of the processes and their descendants that still run."""
        wanted = {(one.pid, one.start) for one in processes}

        def work() -> tuple[Process, ...]:
            self._operation()
            return tuple(
                Process(member.pid, member.start, "run", "root")
                for tree in self._daemon.world.trees
                for member in tree.living()
                if (member.pid, member.start) in wanted
            )

        return self.in_thread(work)

    def _folder(self, path: Path) -> Inode:
        found = self._daemon.world.disk.find(str(path))
        if found.entries is None:
            raise NotADirectoryError(20, "Not a directory", str(path))
        return found


@define(eq=False)
class Written:
    """The `Records` of a task on the simulated disk."""

    _machine: SimulatedMachine
    _folder: Path

    def size(self) -> int:
        """Return the bytes of output."""
        return len(self._machine.content(self._folder / "output"))

    def index_size(self) -> int:
        """Return the bytes of the index."""
        return len(self._machine.content(self._folder / "output.idx"))

    def news(self, first: int) -> Iterator[tuple[int, Record]]:
        """Return the records from number ``first`` on, with their numbers."""
        data = self._machine.content(self._folder / "output.idx")
        for at in range(first * RECORD, len(data) // RECORD * RECORD, RECORD):
            yield at // RECORD, Record.parse(data[at : at + RECORD])

    def last_line(self) -> bytes:
        """Return nothing, because no simulated command has a required last line."""
        return b""


_: type[Machine] = SimulatedMachine
