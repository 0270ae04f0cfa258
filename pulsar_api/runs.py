"""Runs of commands, each below a shim: one of ours, or one of an earlier daemon."""

import fcntl
import os
import signal
from contextlib import suppress
from pathlib import Path

from attrs import define, evolve, field
from twisted.internet.error import ProcessDone, ProcessExitedAlready, ProcessTerminated
from twisted.internet.interfaces import IDelayedCall, IProcessTransport, IReactorTime
from twisted.internet.protocol import ProcessProtocol
from twisted.logger import Logger
from twisted.python.failure import Failure

from pulsar_api import shim, strays
from pulsar_api.output import Output, Record
from pulsar_api.ports import Sink
from pulsar_api.task import Cause, Exit

_log = Logger()

LOOK = 0.25
"""Seconds between two looks at a run that was adopted."""

SWEEP = 5.0
"""Seconds for which the processes of a lost task are killed; some are in the kernel."""

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
        index_size=Output(folder).index_size(),
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"SIGRTMIN+{number - signal.SIGRTMIN}"


def alive(folder: Path) -> int:
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


def terminate(folder: Path) -> None:
    """Send TERM to the shim of a folder, and to nobody else."""
    with suppress(OSError):
        handle = os.pidfd_open(alive(folder))
        try:
            # If it still holds the lock, the handle is the shim's.
            if alive(folder) > 0:
                signal.pidfd_send_signal(handle, signal.SIGTERM)
        finally:
            os.close(handle)


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
        output = Output(self._folder)
        size, index = output.size(), output.index_size()
        return Exit(error=why, lost=True, output_size=size, index_size=index)

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
        end = reason.value
        assert isinstance(end, ProcessDone | ProcessTerminated)
        if end.exitCode == shim.TAKEN and self._sink is not None:
            self._other = AdoptedRun(self._clock, self._folder, self._sink)
            if self._killed:
                self._other.kill()
            return
        if not self._ready:
            # Nobody will read it, and it may hold secrets.
            with suppress(OSError):
                (self._folder / "spec").unlink()
        how = _signal_name(end.signal) if end.signal else f"exit status {end.exitCode}"
        self._conclude(trouble.rpartition("\n")[2] or how)

    def _conclude(self, why: str) -> None:
        try:
            exit = self.result()
            if exit is None and self._ready:
                lost = self.lost(f"The process that watched the command ended: {why}.")
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
        terminate(self._folder)

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
        lives = alive(self._folder) != 0
        self._news()
        exit = self.result()
        if exit is not None:
            self._tell_end(exit)
        elif lives:
            if self._killed:
                terminate(self._folder)
            self._look = self._clock.callLater(LOOK, self._check)
        elif not begun:
            error = "The daemon ended before the command was started."
            self._tell_end(Exit(error=error, unstarted=True))
        else:
            why = "The process that watched the command is gone and left no result."
            self.sweep(self.lost(why))

    def _news(self) -> None:
        for number, record in Output(self._folder).news(self._seen):
            self._seen = number + 1
            self._read(record)

    def _never_started(self) -> bool:
        """Return whether no shim has begun, and if so make sure that none ever will."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        lock = self._folder / "lock"
        self._folder.mkdir(mode=0o700, exist_ok=True)
        with suppress(FileExistsError):
            os.close(os.open(lock, flags, 0o600))
        # A shim's lock has its number in it from the first moment on, ours is empty.
        return lock.stat().st_size == 0
