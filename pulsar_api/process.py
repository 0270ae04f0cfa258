"""Runs commands, each below a shim of its own, and follows those of an earlier daemon."""

import json
import os
import py_compile
import resource
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ahocorasick_rs
from attrs import frozen
from twisted.internet.defer import Deferred
from twisted.internet.error import ProcessExitedAlready
from twisted.internet.interfaces import (
    IReactorProcess,
    IReactorTime,
)
from twisted.internet.protocol import ProcessProtocol
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger
from twisted.python.failure import Failure

from pulsar_api import mask, shim, strays
from pulsar_api.errors import StoreUnavailable
from pulsar_api.ports import Bounds, Run, Sink
from pulsar_api.runs import AdoptedRun, ShimProtocol, alive, terminate
from pulsar_api.task import Command, Exit

_log = Logger()

ROOM = 1 << 20
"""Bytes that must be free on the disk for a new task to be taken."""

MOST_ANSWER = 256 * 1024
"""Bytes of what a command answers, see `ask`."""

_LIBRARY = str(Path(ahocorasick_rs.__file__).parents[1])
"""Where the shim finds what it masks secrets with."""

USUAL = (sys.executable, "-I", "-S", shim.__file__)
"""How a shim is started."""


def compiled(folder: Path) -> Sequence[str]:
    """Return how a shim is started from a compiled copy, which is made in the folder.

    That spares 4 ms per task. And it is the shim of this version, whatever an upgrade of
    the package does before the daemon is started again. But the library that masks secrets
    is not copied: a task with secrets takes the one that is installed when it starts.
    """
    copy = folder / "shim.pyc"
    try:
        py_compile.compile(mask.__file__, str(folder / "mask.pyc"), doraise=True)
        py_compile.compile(shim.__file__, str(copy), doraise=True)
    except OSError as e:
        _log.error("Cannot write {copy}: {e}", copy=copy, e=e)
        return USUAL
    return *USUAL[:-1], str(copy)


def end_all(state: Path) -> list[int]:
    """Send TERM to the shim of every task that runs; return their numbers.

    For an operator who has stopped the daemon; each shim then ends its task's tree and
    keeps the result for the next daemon.
    """
    folders = (state / "tasks").glob("[0-9]*")
    found = sorted(int(folder.name) for folder in folders if alive(folder) > 0)
    for number in found:
        terminate(state / "tasks" / str(number))
    return found


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
                    if not alive(folder):
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
            except (FileNotFoundError, ValueError):
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
            _LIBRARY,
            command.directory or "/",
            *command.arguments,
            *(text.decode() for text in command.secrets),
            *(text for pair in command.environment.items() for text in pair),
            *(strays.MARK, str(folder)),
        ]
        # Always UTF-8, whatever the locale; odd bytes of our own environment stay as is.
        encoded = [text.encode("utf-8", "surrogateescape") for text in fields]
        encoded.insert(0, b"%d" % len(encoded))
        # Lengths, as no sign is safe from standing in a text.
        data = b"".join(len(text).to_bytes(8, "little") + text for text in encoded)
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
