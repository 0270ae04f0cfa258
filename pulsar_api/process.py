"""Runs commands, each below a shim of its own, and follows those of an earlier daemon."""

import fcntl
import json
import os
import py_compile
import resource
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from attrs import define, evolve, field, frozen
from twisted.internet.defer import Deferred
from twisted.internet.error import ProcessDone, ProcessExitedAlready, ProcessTerminated
from twisted.internet.interfaces import (
    IDelayedCall,
    IProcessTransport,
    IReactorProcess,
    IReactorTime,
)
from twisted.internet.protocol import ProcessProtocol
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger
from twisted.python.failure import Failure

from pulsar_api import mask, shim, strays
from pulsar_api.errors import StoreUnavailable
from pulsar_api.output import Output, Record
from pulsar_api.ports import Bounds, Run, Sink
from pulsar_api.task import Cause, Command, Exit

_log = Logger()

LOOK = 0.25
"""Seconds between two looks at a run that was adopted."""

ROOM = 1 << 20
"""Bytes that must be free on the disk for a new task to be taken."""

SWEEP = 5.0
"""Seconds for which the processes of a lost task are killed; some are in the kernel."""

MOST_ANSWER = 256 * 1024
"""Bytes of what a command answers, see `ask`."""

_PRINTED = frozenset({shim.STDOUT, shim.STDERR})
_TROUBLE = 4096  # bytes of a shim's own complaint that are kept


def read_exit(folder: Path) -> Exit | None:
    """Return the result that a shim has written, or None if there is none yet."""
    try:
        lines = (folder / "exit").read_bytes().decode("utf-8", "replace").split("\n")
    except FileNotFoundError:
        return None
    found = dict(line.partition(" ")[::2] for line in lines)
    number = found.get("signal")
    return Exit(
        ended_at=float(found["ended"]),
        code=int(found["code"]) if "code" in found else None,
        signal=_signal_name(int(number)) if number else None,
        error=found.get("error"),
        cause=Cause(found["cause"]),
        forced=found["forced"] == "1",
        output_size=int(found["size"]),
    )


USUAL = (sys.executable, "-I", "-S", shim.__file__)
"""How a shim is started."""


def compiled(folder: Path) -> Sequence[str]:
    """Return how a shim is started from a compiled copy, which is made in the folder.

    That spares 4 ms per task. And it is the shim of this version, whatever an upgrade of
    the package does before the daemon is started again.
    """
    copy = folder / "shim.pyc"
    try:
        py_compile.compile(mask.__file__, str(folder / "mask.pyc"), doraise=True)
        py_compile.compile(shim.__file__, str(copy), doraise=True)
    except OSError as e:
        _log.error("Cannot write {copy}: {e}", copy=copy, e=e)
        return USUAL
    return *USUAL[:-1], str(copy)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"SIGRTMIN+{number - signal.SIGRTMIN}"


def _alive(folder: Path) -> int:
    """Return the process number of the folder's shim, 0 if it is not alive.

    The lock says so beyond doubt; a number alone might be somebody else's by now.
    """
    try:
        with (folder / "lock").open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(file.read() or 0) or -1
    except FileNotFoundError:
        pass
    return 0


def _terminate(folder: Path) -> None:
    """Send TERM to the shim of a folder, and to nobody else."""
    with suppress(OSError):
        handle = os.pidfd_open(_alive(folder))
        try:
            # If it still holds the lock, the handle is the shim's.
            if _alive(folder) > 0:
                signal.pidfd_send_signal(handle, signal.SIGTERM)
        finally:
            os.close(handle)


def end_all(state: Path) -> list[int]:
    """Send TERM to the shim of every task that runs; return their numbers.

    For an operator who has stopped the daemon; each shim then ends its task's tree and
    keeps the result for the next daemon.
    """
    folders = (state / "tasks").glob("[0-9]*")
    alive = sorted(int(folder.name) for folder in folders if _alive(folder) > 0)
    for number in alive:
        _terminate(state / "tasks" / str(number))
    return alive


@frozen
class ShimExecutor:
    """Runs each command below a shim, in a folder per task."""

    _reactor: Any
    """Starts processes and has a thread pool; no interface says both."""
    _clock: IReactorTime
    _tasks: Path
    _umask: int = 0o022
    _files: int = 0
    """The soft limit of open files that commands get; 0: the daemon's."""
    _launcher: Sequence[str] = USUAL

    def check(self) -> None:
        """Raise `StoreUnavailable` if there is no room, or the folder is no use."""
        try:
            disk = os.statvfs(self._tasks)
        except OSError as e:
            raise StoreUnavailable(f"{self._tasks}: {e.strerror}") from None
        if not os.access(self._tasks, os.W_OK | os.X_OK, effective_ids=True):
            raise StoreUnavailable(f"{self._tasks} is not writable")
        if disk.f_bavail * disk.f_frsize < ROOM or (disk.f_files and not disk.f_favail):
            text = f"less than {ROOM >> 20} MiB is free on the disk of {self._tasks}"
            raise StoreUnavailable(text, full=True)

    def start(self, task_id: int, command: Command, bounds: Bounds, sink: Sink) -> Run:
        """Start a command. Whatever goes wrong is told to the sink, as an end."""
        folder = self._tasks / str(task_id)
        protocol = ShimProtocol(self._clock, folder, sink)
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            self._write_spec(folder, command, bounds)
            claim = folder / "lock"
            if claim.exists() and claim.stat().st_size == 0:
                # Ours, from when it was made sure that an earlier shim never started. If
                # that one comes now after all, it is faster or ours is, never both.
                claim.unlink()
            # No path, uid or gid: with them Twisted forks the whole daemon. The shim
            # changes directory itself.
            self._reactor.spawnProcess(
                protocol,
                self._launcher[0],
                [*self._launcher, str(folder)],
                env={},
                childFDs={0: "w", 1: "r", 2: "r"},
            )
        except OSError as e:
            error = f"cannot start: {e.strerror}: {e.filename or folder}"
            protocol.end(Exit(error=error))
        return protocol

    def adopt(self, task_id: int, sink: Sink) -> Run:
        """Follow a run that another daemon started, or say how it ended."""
        return AdoptedRun(self._clock, self._tasks / str(task_id), sink)

    def forget(self, task_ids: Sequence[int]) -> Deferred[None]:
        """Remove the folders of ended runs, in a thread: a large file takes its time."""

        def remove() -> None:
            for task_id in task_ids:
                folder = self._tasks / str(task_id)
                # What cannot be removed now is at the next start.
                with suppress(OSError):
                    if not _alive(folder):
                        shutil.rmtree(folder, ignore_errors=True)

        return deferToThreadPool(self._reactor, self._reactor.getThreadPool(), remove)

    def kept(self) -> Deferred[list[int]]:
        """Fire with the numbers that have a folder, lowest first."""

        def look() -> list[int]:
            try:
                return sorted(int(n) for n in os.listdir(self._tasks) if n.isdigit())
            except FileNotFoundError:
                return []

        return deferToThreadPool(self._reactor, self._reactor.getThreadPool(), look)

    def keep_secrets(self, task_id: int, secrets: Mapping[str, str]) -> Deferred[None]:
        """Keep the secrets of a task that waits, in a thread: it syncs."""
        folder = self._tasks / str(task_id)

        def write() -> None:
            try:
                folder.mkdir(mode=0o700, exist_ok=True)
                _write_synced(folder / "secrets", json.dumps(dict(secrets)).encode())
                _sync(self._tasks)
            except OSError as e:
                full = e.errno in shim.NO_SPACE
                raise StoreUnavailable(f"{folder}: {e.strerror}", full=full) from None

        return deferToThreadPool(self._reactor, self._reactor.getThreadPool(), write)

    def secrets(self, task_id: int) -> Deferred[Mapping[str, str] | None]:
        """Fire with the secrets that are kept, or None."""
        path = self._tasks / str(task_id) / "secrets"

        def read() -> Mapping[str, str] | None:
            try:
                found: Mapping[str, str] = json.loads(path.read_bytes())
            except FileNotFoundError:
                return None
            except OSError as e:
                raise StoreUnavailable(f"{path}: {e.strerror}") from None
            return found

        return deferToThreadPool(self._reactor, self._reactor.getThreadPool(), read)

    def forget_secrets(self, task_id: int) -> None:
        """Remove what holds the secrets of a task that will not start any more."""
        for name in ("secrets", "secrets.tmp", "spec", "spec.tmp"):
            with suppress(OSError):
                (self._tasks / str(task_id) / name).unlink()

    def _write_spec(self, folder: Path, command: Command, bounds: Bounds) -> None:
        if command.last_line is not None:
            # For whoever reads the result, perhaps a later daemon with other settings.
            # A secret may be in it, and then the output does not have it.
            line = command.last_line.encode()
            (folder / "promise").write_bytes(mask.masked(line, command.secrets))
        fields = [
            *(f"{n:.3f}" for n in (bounds.grace, bounds.total, bounds.silence)),
            *(str(n) for n in (bounds.max_output, self._umask, self._files)),
            *(str(len(texts)) for texts in (command.arguments, command.secrets)),
            command.directory or "/",
            *command.arguments,
            *(text.decode() for text in command.secrets),
            *(f"{key}={value}" for key, value in command.environment.items()),
            f"{strays.MARK}={folder}",
        ]
        # Always UTF-8, whatever the locale; odd bytes of our own environment stay as is.
        data = "".join(f"{text}\0" for text in fields).encode("utf-8", "surrogateescape")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        fd = os.open(folder / "spec.tmp", flags, 0o600)
        with open(fd, "wb") as file:
            file.write(data)
        # A shim that comes late, from before a restart, must not read half of it.
        os.rename(folder / "spec.tmp", folder / "spec")


def _write_synced(path: Path, data: bytes) -> None:
    """Write a file that only its owner can read: all or nothing, and on disk."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    temporary = path.with_name(f"{path.name}.tmp")
    with open(os.open(temporary, flags, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)
    _sync(path.parent)


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@define(eq=False)
class _Following:
    """What both kinds of run share: telling the sink, once, how it ended."""

    _clock: IReactorTime
    _folder: Path
    _sink: Sink | None

    def end(self, exit: Exit) -> None:
        """Tell the sink soon (never while it is being made) and for the last time."""
        self._clock.callLater(0, self._tell_end, exit)

    def result(self) -> Exit | None:
        """Return the result that is on disk, judged by the command's promise."""
        exit = read_exit(self._folder)
        if exit is None or exit.code != 0:
            return exit
        try:
            promised = (self._folder / "promise").read_bytes()
        except FileNotFoundError:
            return exit
        return evolve(exit, good=Output(self._folder).last_line() == promised)

    def lost(self, why: str) -> Exit:
        """Return the end of a run of which nobody can know how it ended.

        Raises `OSError` if the folder of all runs is away: then nobody knows yet.
        """
        os.stat(self._folder.parent)
        size = Output(self._folder).size()
        return Exit(error=why, lost=True, output_size=size)

    def sweep(self, exit: Exit) -> None:
        """End what a lost task has left, and tell its end when nothing of it is left."""
        until = self._clock.seconds() + SWEEP

        def again() -> None:
            try:
                found = strays.kill(self._folder)
            except OSError as e:
                self.cannot_read(e)
                found = True
            if found and self._clock.seconds() < until:
                self._clock.callLater(0.02, again)
            else:
                self._tell_end(exit)

        self._clock.callLater(0, again)

    def cannot_read(self, error: OSError) -> None:
        """Log why the end is not known yet: no more descriptors, a disk that is ill."""
        _log.error("Cannot read {folder}: {e}", folder=self._folder, e=error)

    def detach(self) -> None:
        """Stop telling."""
        self._sink = None

    def _tell_end(self, exit: Exit) -> None:
        sink, self._sink = self._sink, None
        if sink is not None:
            sink.ended(exit)

    def _read(self, record: Record) -> None:
        if self._sink is None:
            return
        if record.code in _PRINTED:
            self._sink.printed(record.number)
        elif record.code == shim.STARTED:
            self._sink.started(record.number)


@define(eq=False)
class ShimProtocol(_Following, ProcessProtocol):
    """Hears from a shim that this daemon started: records, not the bytes themselves."""

    _buffer: bytes = field(default=b"", init=False)
    _trouble: bytes = field(default=b"", init=False)
    _ready: bool = field(default=False, init=False)
    _killed: bool = field(default=False, init=False)
    _other: "AdoptedRun | None" = field(default=None, init=False)
    """The run of a shim that was faster than ours."""
    transport: IProcessTransport = field(init=False)

    def detach(self) -> None:
        """Stop telling."""
        super().detach()
        if self._other is not None:
            self._other.detach()

    def connectionMade(self) -> None:
        """Give the shim an end of file to read."""
        self.transport.closeStdin()

    def childDataReceived(self, childFD: int, data: bytes) -> None:
        """Take news (1) or a shim's own complaint (2)."""
        if childFD != 1:
            self._trouble = (self._trouble + data)[-_TROUBLE:]
            return
        self._buffer += data
        end = len(self._buffer) // shim.RECORD * shim.RECORD
        whole, self._buffer = self._buffer[:end], self._buffer[end:]
        # A flood brings thousands at a time, of which only the last says something new.
        printed = None
        for at in range(0, end, shim.RECORD):
            if whole[at + 8] in _PRINTED:
                printed = at
                continue
            record = Record.parse(whole[at : at + shim.RECORD])
            if record.code == shim.READY:
                self._ready = True
                if self._killed:
                    self.kill()
            self._read(record)
        if printed is not None:
            self._read(Record.parse(whole[printed : printed + shim.RECORD]))

    def kill(self) -> None:
        """Let the shim end the tree; as soon as it can hear us."""
        self._killed = True
        if self._other is not None:
            self._other.kill()
        elif self._ready:
            with suppress(ProcessExitedAlready):
                self.transport.signalProcess("TERM")

    def processEnded(self, reason: Failure) -> None:
        """Take the result from the disk."""
        trouble = self._trouble.decode("utf-8", "replace").strip()
        if trouble:
            _log.error("The shim in {folder} says: {it}", folder=self._folder, it=trouble)
        assert isinstance(reason.value, ProcessDone | ProcessTerminated)
        if reason.value.exitCode == shim.TAKEN and self._sink is not None:
            self._other = AdoptedRun(self._clock, self._folder, self._sink)
            if self._killed:
                self._other.kill()
            return
        if not self._ready:
            # Nobody will read it, and it may hold secrets.
            with suppress(OSError):
                (self._folder / "spec").unlink()
        self._conclude(trouble.rpartition("\n")[2] or str(reason.value))

    def _conclude(self, why: str) -> None:
        try:
            exit = self.result()
            if exit is None and self._ready:
                lost = self.lost(f"The process that watched the command ended: {why}")
                self.sweep(lost)
                return
        except OSError as e:
            self.cannot_read(e)
            if self._sink is not None:
                self._clock.callLater(LOOK, self._conclude, why)
            return
        if exit is None:
            error = f"cannot start the process that watches the command: {why}"
            exit = Exit(error=error)
        self._tell_end(exit)


@define(eq=False)
class AdoptedRun(_Following):
    """Follows a shim that is not our child, by looking at its files."""

    _seen: int = field(default=0, init=False)
    _killed: bool = field(default=False, init=False)
    _look: IDelayedCall = field(init=False)

    def __attrs_post_init__(self) -> None:
        # What is on disk is told before anybody can ask for it.
        with suppress(OSError):
            self._news()
        self._look = self._clock.callLater(0, self._check)

    def kill(self) -> None:
        """Let the shim end the tree; asked again at each look, as it may not hear yet."""
        self._killed = True
        _terminate(self._folder)

    def detach(self) -> None:
        """Stop looking."""
        super().detach()
        if self._look.active():
            self._look.cancel()

    def _check(self) -> None:
        try:
            self._look_at_it()
        except OSError as e:
            self.cannot_read(e)
            self._look = self._clock.callLater(LOOK, self._check)

    def _look_at_it(self) -> None:
        # In this order: what is dead now has written its result before.
        begun = self._seen > 0 or not self._never_started()
        alive = _alive(self._folder)
        self._news()
        exit = self.result()
        if exit is not None:
            self._tell_end(exit)
        elif alive:
            if self._killed:
                _terminate(self._folder)
            self._look = self._clock.callLater(LOOK, self._check)
        elif not begun:
            error = "The daemon ended before the command was started."
            self._tell_end(Exit(error=error, unstarted=True))
        else:
            why = "The process that watched the command is gone and left no result."
            self.sweep(self.lost(why))

    def _news(self) -> None:
        printed = None
        for record in Output(self._folder).records(self._seen):
            self._seen += 1
            if record.code in _PRINTED:
                printed = record
            else:
                self._read(record)
        if printed is not None:
            self._read(printed)

    def _never_started(self) -> bool:
        """Return whether no shim has begun, and if so make sure that none ever will."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        lock = self._folder / "lock"
        self._folder.mkdir(mode=0o700, exist_ok=True)
        with suppress(FileExistsError):
            os.close(os.open(lock, flags, 0o600))
        # A shim's lock has its number in it from the first moment on, ours is empty.
        return lock.stat().st_size == 0


class _Answer(ProcessProtocol):
    def __init__(self, done: Deferred[str]) -> None:
        self.done = done
        self.text = b""

    def outReceived(self, data: bytes) -> None:
        self.text = (self.text + data)[:MOST_ANSWER]

    def processEnded(self, reason: Failure) -> None:
        if not self.done.called:  # who asked may wait no more
            self.done.callback(self.text.decode("utf-8", "replace"))


async def ask(
    reactor: IReactorProcess, clock: IReactorTime, command: Command, seconds: float = 10
) -> str:
    """Return what a command prints, of much the begin.

    "" if it cannot be started or takes too long: then, and if nobody waits for it any
    more, it is killed.
    """

    def end(_: object) -> None:
        with suppress(ProcessExitedAlready):
            process.signalProcess("KILL")

    done: Deferred[str] = Deferred(end)
    arguments = command.arguments
    if command.directory is not None:
        # With a folder of its own Twisted would fork the whole daemon.
        arguments = ("env", f"--chdir={command.directory}", *arguments)
    try:
        process = reactor.spawnProcess(
            _Answer(done), arguments[0], arguments, env=dict(command.environment)
        )
    except OSError:
        return ""
    process.closeStdin()
    return await done.addTimeout(seconds, clock, lambda *_: "")


def raise_file_limit() -> tuple[int, int]:
    """Allow as many open files as the system lets us; return the old and the new limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, 65536) if hard != resource.RLIM_INFINITY else 65536
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return soft, wanted
    return soft, soft
