"""The run of a shim that this daemon has started, as a process protocol of Twisted."""

import signal
from contextlib import suppress

from attrs import define, field
from twisted.internet.error import ProcessDone, ProcessExitedAlready, ProcessTerminated
from twisted.internet.interfaces import IDelayedCall, IProcessTransport
from twisted.internet.protocol import ProcessProtocol
from twisted.logger import Logger
from twisted.python.failure import Failure

from pulsar_api.execution.adopted_run import AdoptedRun
from pulsar_api.execution.followed_run import INTERVAL, PRINTED, FollowedRun
from pulsar_api.execution.launched_shim import NotStarted, StatusUnknown
from pulsar_api.execution.results import LONGEST_MESSAGE, not_started, signal_name
from pulsar_api.execution.task_files import LOCK, NOTHING, SHIM_FILES, SPEC, alive
from pulsar_api.output.records import Record
from pulsar_api.shim import shim
from pulsar_api.tasks.interfaces import Sink
from pulsar_api.tasks.model import Cause, Exit

_log = Logger()


@define(eq=False)
class ShimProtocol(FollowedRun, ProcessProtocol):
    """Receives the records of a shim that this daemon has started, never the output."""

    _buffer: bytes = field(default=b"", init=False)
    _errors: bytes = field(default=b"", init=False)
    _ready: bool = field(default=False, init=False)
    _over: bool = field(default=False, init=False)
    """Whether the result was read; the shim may live on with what the task has left."""
    _killed: bool = field(default=False, init=False)
    _detached: bool = field(default=False, init=False)
    _looking: IDelayedCall | None = field(default=None, init=False)
    _closing: IDelayedCall | None = field(default=None, init=False)
    _other: "AdoptedRun | None" = field(default=None, init=False)
    """The run of another shim, which has taken the lock before ours."""
    _in_doubt: bool = field(default=False, init=False)
    """Whether an earlier start is in doubt, so that its shim may still begin."""
    transport: IProcessTransport = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.watch()

    def detach(self) -> None:
        """Stop reporting."""
        super().detach()
        self._detached = True
        self._cancel(self._looking, self._closing)
        if self._other is not None:
            self._other.detach()

    def _cancel(self, *calls: IDelayedCall | None) -> None:
        for call in calls:
            if call is not None and call.active():
                call.cancel()

    def _tell_end(self, exit: Exit) -> None:
        self._cancel(self._looking)
        super()._tell_end(exit)

    def connectionMade(self) -> None:
        """Close the standard input of the shim."""
        self.transport.closeStdin()

    def childDataReceived(self, childFD: int, data: bytes) -> None:
        """Take records (from 1) or error messages of the shim (from 2)."""
        if childFD != 1:
            self._errors = (self._errors + data)[-LONGEST_MESSAGE:]
            return
        self._buffer += data
        end = len(self._buffer) // shim.RECORD * shim.RECORD
        whole, self._buffer = self._buffer[:end], self._buffer[end:]
        # A flood brings thousands of records at once; only the last one says something new.
        printed, over = None, False
        for at in range(0, end, shim.RECORD):
            if whole[at + 8] in PRINTED:
                printed = at
                continue
            record = Record.parse(whole[at : at + shim.RECORD])
            if record.code == shim.READY:
                self._ready = True
                if self._killed:
                    self.kill()
            over |= record.code == shim.OVER
            self._read(record)
        if printed is not None:
            self._read(Record.parse(whole[printed : printed + shim.RECORD]))
        if over:
            self._look()
            self._close_later()

    def kill(self) -> None:
        """Ask the shim to end the process tree, as soon as it is ready."""
        self._killed = True
        if self._other is not None:
            self._other.kill()
        elif self._ready:
            self._watchdog.kill()
            with suppress(ProcessExitedAlready):
                self.transport.signalProcess("TERM")
                self.transport.signalProcess(signal.SIGCONT)  # it may be stopped
            # Not at once: records that it sent before may not have been read yet.
            self._look_later()

    def childConnectionLost(self, childFD: int) -> None:
        """Read the result if there is one: a shim may stay with what the task has left."""
        if childFD == 1 and self._ready:
            self._look()

    def _look_later(self) -> None:
        waits = self._looking is not None and self._looking.active()
        if self._sink is not None and not waits:
            self._looking = self._clock.callLater(INTERVAL, self._look)

    def _look(self) -> None:
        if self._over:
            return
        try:
            # A living shim replaces a damaged result by its own.
            lives = alive(self._machine, self._folder) != 0
            exit = self.result()
            if exit is not None and exit.lost and lives:
                self._look_later()
            elif exit is not None:
                self._over = True
                self.conclude(exit, numbers=True)
        except OSError as e:
            self.cannot_read(e)
            self._look_later()

    def _close_later(self) -> None:
        """Close the pipes of a shim that sends nothing more, once they were read.

        A process of the task may hold them open (/proc/PID/fd). When they are closed,
        `processEnded` comes as soon as the shim was reaped.
        """
        if self._closing is None and not self._detached:
            lose = self.transport.loseConnection
            self._closing = self._clock.callLater(INTERVAL, lose)

    def processExited(self, reason: Failure) -> None:
        """Close the pipes soon; `processEnded` follows."""
        self._close_later()

    def processEnded(self, reason: Failure) -> None:
        """Read the result from the disk, unless that was done."""
        self._cancel(self._looking, self._closing)
        errors = self._errors.decode("utf-8", "replace").strip()
        if errors:
            _log.error("The shim in {folder} says: {it}", folder=self._folder, it=errors)
        if self._over:
            return
        end = reason.value
        if isinstance(end, StatusUnknown):
            self._in_doubt = True
            self._again_later(0)
            return
        if isinstance(end, NotStarted):
            if self._in_doubt:
                self._again_later(INTERVAL)
            else:
                self._tell_end(not_started(end.error, self._folder))
            return
        assert isinstance(end, ProcessDone | ProcessTerminated)
        if end.exitCode == shim.TAKEN and self._sink is not None:
            self._follow(self._sink)
            return
        if not self._ready:
            # No shim will remove it, and it may hold secrets.
            with suppress(OSError):
                self._machine.remove(self._folder / SPEC)
        how = signal_name(end.signal) if end.signal else f"exit status {end.exitCode}"
        self._conclude(errors.rpartition("\n")[2] or how)

    def _follow(self, sink: Sink) -> None:
        """Follow another shim, which has or had the lock."""
        self._watchdog.stop()
        self._other = AdoptedRun(
            *(self._machine, self._clock, self._folder, self._bounds, sink, self._is_new),
            cgroup=self._cgroup,
        )
        if self._killed:
            self._other.kill()

    def _is_new(self) -> bool:
        """Return whether it is certain that no shim has begun if no file says so."""
        return not self._in_doubt

    def _again_later(self, seconds: float) -> None:
        self._looking = self._clock.callLater(seconds, self._start_again)

    def _start_again(self) -> None:
        """Repeat a start of which nobody knows whether it succeeded.

        If it did, the first shim takes the lock or has taken it; the second one then ends
        with a status of its own, and never reads the spec. If any file proves that a shim
        has begun, follow that shim.
        """
        if self._sink is None or self._ending:
            return
        self._buffer = self._errors = b""
        self._ready, self._closing = False, None
        names: list[str] = []
        try:
            with suppress(*NOTHING):
                names = self._machine.names(self._folder)
            begun = bool(SHIM_FILES & set(names))
            if begun or (self._killed and not self._prevent_start()):
                self._follow(self._sink)
            elif self._killed:
                self._tell_end(Exit(error="The command was not started.", cause=Cause.KILL))
            else:
                self._machine.spawn(self, self._folder)
        except OSError as e:
            self.cannot_read(e)
            self._again_later(INTERVAL)

    def _prevent_start(self) -> bool:
        """Make sure that no shim begins any more; return False if one has."""
        try:
            prevented = self._machine.claim(self._folder / LOCK)
        except NOTHING:
            return True  # there is no folder to begin in
        if prevented:
            with suppress(OSError):  # it may hold secrets
                self._machine.remove(self._folder / SPEC)
        return prevented

    def _conclude(self, why: str) -> None:
        if self._ending:
            return
        try:
            exit = self.result()
            if exit is not None:
                self.conclude(exit, numbers=True)
                return
            # Before it counts as ended: the shim of an earlier start may still begin.
            if self._in_doubt and self._sink is not None and not self._prevent_start():
                self._follow(self._sink)
                return
            if self._ready:
                why = f"The process that watched the command ended: {why}."
                self.lost(why, numbers=True)
                return
        except OSError as e:
            self.cannot_read(e)
            if self._sink is not None:
                self._clock.callLater(INTERVAL, self._conclude, why)
            return
        error = f"cannot start the process that watches the command: {why}"
        self._tell_end(Exit(error=error))
