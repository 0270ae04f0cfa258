"""A shim that the launcher has forked, as a process transport of Twisted."""

import os
import signal
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, Protocol

from twisted.internet.error import ProcessDone, ProcessExitedAlready, ProcessTerminated
from twisted.internet.interfaces import IAddress, IProcessTransport
from twisted.internet.process import (
    ProcessReader,
    reapProcessHandlers,
    registerReapProcessHandler,
    unregisterReapProcessHandler,
)
from twisted.internet.protocol import ProcessProtocol
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

_log = Logger()


class NotStarted(Exception):
    """No process was started; ``error`` says why."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.error = error


class StatusUnknown(Exception):
    """The launcher died, so nobody knows whether a shim was started, or how it ended."""


class Owner(Protocol):
    """The launcher process that a shim is a child of, as far as the shim needs it."""

    reactor: Any

    def send_signal(self, number: int, signal: int) -> None:
        """Send a signal to the shim with this number."""

    def expect_answer(self) -> None:
        """Check soon that the launcher still works."""


@implementer(IProcessTransport)
class LaunchedShim:
    """The transport of a shim that the launcher has forked, as `spawnProcess` returns one.

    It calls its protocol in the same order: `processEnded` comes last, when both pipes are
    closed and the exit status is known.
    """

    def __init__(
        self,
        owner: Owner,
        number: int,
        protocol: ProcessProtocol,
        pipes: Sequence[int],
    ) -> None:
        self.pid: int | None = None
        """The process number, as long as no other process can have it; otherwise None."""
        self.ended = False
        self._owner: Owner | None = owner
        self._number = number
        self._protocol = protocol
        self._reason: Exception | None = None
        self._pipes: dict[int, ProcessReader] = {}
        try:
            for name, fd in zip((1, 2), pipes, strict=True):
                self._pipes[name] = ProcessReader(owner.reactor, self, name, fd)
        except OSError:
            self.abandon()
            raise

    def abandon(self) -> None:
        """Stop reading, as the protocol was told nothing yet. The pipes stay open."""
        for pipe in self._pipes.values():
            pipe.stopReading()

    def connect(self) -> None:
        """Tell the protocol that the launcher was asked to start its process."""
        self._tell(self._protocol.makeConnection, self)

    def _tell(self, event: Callable[..., object], *arguments: object) -> None:
        """Call the protocol; its exceptions are logged, as they concern no other shim."""
        try:
            event(*arguments)
        except Exception:  # noqa: BLE001
            _log.failure("Cannot handle an event of a shim")

    # -- the end

    def processEnded(self, status: int) -> None:
        """Take the exit status, in the form of wait(2)."""
        code = sig = None
        if os.WIFEXITED(status):
            code = os.WEXITSTATUS(status)
        else:
            sig = os.WTERMSIG(status)
        failed = bool(code or sig)
        reason = ProcessTerminated(code, sig, status) if failed else ProcessDone(status)
        self.finish(reason)

    def finish(self, reason: Exception) -> None:
        """Take the reason of the end, also if there never was a process."""
        self.pid = None
        self._owner = None
        self._reason = reason
        if isinstance(reason, ProcessDone | ProcessTerminated):
            self._tell(self._protocol.processExited, Failure(reason))
        self._end()

    def _end(self) -> None:
        if self._pipes or self.ended:
            return
        if self._reason is not None:
            self.ended = True
            self._tell(self._protocol.processEnded, Failure(self._reason))
        elif self._owner is not None:
            self._owner.expect_answer()

    def inherit(self) -> None:
        """Go on without the launcher, which has died.

        If the daemon is a subreaper, the children of the launcher are now its own, and it
        reads the exit status itself. The process number still means the shim: the launcher
        reports an end as soon as it has read the status, and all its reports were read.
        """
        self._owner = None
        pid = self.pid
        if pid is not None and pid not in reapProcessHandlers:
            with suppress(ChildProcessError):  # it ended unseen, or is not our child
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self.processEnded(status)
                else:
                    registerReapProcessHandler(pid, self)
                return
        self.loseConnection()
        self.finish(StatusUnknown("the launcher has died"))

    def reapProcess(self) -> None:
        """Read the exit status if the shim has ended; Twisted calls this."""
        pid = self.pid
        assert pid is not None
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            unregisterReapProcessHandler(pid, self)
            self.processEnded(status)

    # -- the pipes

    def childDataReceived(self, name: int, data: bytes) -> None:
        """Pass data of a pipe on to the protocol."""
        self._protocol.childDataReceived(name, data)

    def childConnectionLost(self, name: int, reason: Failure) -> None:
        """Close a pipe whose other end is closed, or that nobody reads any more."""
        os.close(self._pipes.pop(name).fd)
        self._tell(self._protocol.childConnectionLost, name)
        self._end()

    # -- for the protocol

    def signalProcess(self, signalID: str | int) -> None:
        """Send a signal.

        Raises `ProcessExitedAlready` once the end of the process is known.
        """
        number = signalID
        if isinstance(number, str):
            number = signal.Signals[f"SIG{number}"].value
        if self._reason is not None:
            raise ProcessExitedAlready
        if self._owner is not None:
            # Another process may have this number by now; only the launcher knows.
            self._owner.send_signal(self._number, number)
        elif self.pid is not None:
            os.kill(self.pid, number)

    def closeChildFD(self, descriptor: int) -> None:
        """Close our end of a pipe."""
        if descriptor in self._pipes:
            self._pipes[descriptor].loseConnection()

    def closeStdin(self) -> None:
        """Do nothing: a shim has ``/dev/null``."""

    def closeStdout(self) -> None:
        """Close the pipe of records."""
        self.closeChildFD(1)

    def closeStderr(self) -> None:
        """Close the pipe of error messages."""
        self.closeChildFD(2)

    def loseConnection(self) -> None:
        """Close both pipes."""
        self.closeStdout()
        self.closeStderr()

    def writeToChild(self, childFD: int, data: bytes) -> None:
        """Raise `KeyError`: a shim reads nothing."""
        raise KeyError(childFD)

    def write(self, data: bytes) -> None:
        """Do nothing, as the interface asks where there is no standard input."""

    def writeSequence(self, data: Iterable[bytes]) -> None:
        """Do nothing, as `write`."""

    def getHost(self) -> IAddress:
        """Raise `NotImplementedError`: there is no address."""
        raise NotImplementedError

    def getPeer(self) -> IAddress:
        """Raise `NotImplementedError`: there is no address."""
        raise NotImplementedError
