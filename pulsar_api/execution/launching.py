"""Has shims started by a launcher (``launcher.py``), and sees to it that there is one.

Whatever happens to the launcher, a task starts at most once: each shim takes the lock of
its task before anything else, so a start that is in doubt may be made again.
"""

import os
import signal
import socket
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from struct import Struct
from typing import Any

from attrs import define, field
from twisted.internet.error import ProcessDone, ProcessExitedAlready, ProcessTerminated
from twisted.internet.interfaces import (
    IAddress,
    IDelayedCall,
    IProcessTransport,
    IReadWriteDescriptor,
)
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

from pulsar_api.shim import launcher

_log = Logger()

ROOM = 48
"""Bytes that are enough for the way from the state folder to that of any task."""

TICK = 1.0
PATIENCE = 5
"""Ticks without a word after which a launcher that owes an answer is killed.

They are counted rather than measured: a daemon that was stopped itself sees one."""

REST = 30.0
"""Seconds after which a launcher of which nothing is wanted is asked for a sign of life."""

DEATHS = 3
PAUSE = 60.0
"""After so many deaths in so many seconds tasks start interpreters for as long."""

MOST_ANSWERS = 256  # that are read at one turn of the reactor
_ANSWER = Struct("<QQQ")


class NotStarted(Exception):
    """No process was made; ``error`` says why."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.error = error


class StatusUnknown(Exception):
    """The launcher died: nobody can say whether a shim was started, or how it ended."""


@implementer(IProcessTransport)
class LaunchedShim:
    """What `spawnProcess` would return, for a process that the launcher has forked.

    It tells its protocol the same in the same order: `processEnded` comes last, when both
    pipes are closed and it is known how the process ended.
    """

    def __init__(
        self,
        launch: "_Launch",
        number: int,
        protocol: ProcessProtocol,
        pipes: Sequence[int],
    ) -> None:
        self.pid: int | None = None
        """Its number as long as nobody else can have it; None before and after."""
        self.ended = False
        self._launch: _Launch | None = launch
        self._number = number
        self._protocol = protocol
        self._reason: Exception | None = None
        self._pipes: dict[int, ProcessReader] = {}
        try:
            for name, fd in zip((1, 2), pipes, strict=True):
                self._pipes[name] = ProcessReader(launch.reactor, self, name, fd)
        except OSError:
            self.abandon()
            raise

    def abandon(self) -> None:
        """Read nothing, for nobody was told of it; its pipes stay open."""
        for pipe in self._pipes.values():
            pipe.stopReading()

    def connect(self) -> None:
        """Tell the protocol that its process is on its way."""
        self._tell(self._protocol.makeConnection, self)

    def _tell(self, event: Callable[..., object], *arguments: object) -> None:
        """What goes wrong in one protocol must not end the launcher of all."""
        try:
            event(*arguments)
        except Exception:  # noqa: BLE001
            _log.failure("Cannot handle what a shim tells")

    # -- the end

    def processEnded(self, status: int) -> None:
        """Take the status of wait(2)."""
        code = sig = None
        if os.WIFEXITED(status):
            code = os.WEXITSTATUS(status)
        else:
            sig = os.WTERMSIG(status)
        failed = bool(code or sig)
        reason = ProcessTerminated(code, sig, status) if failed else ProcessDone(status)
        self.finish(reason)

    def finish(self, reason: Exception) -> None:
        """Take why it is over, whether there ever was a process or not."""
        self.pid = None
        self._launch = None
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
        elif self._launch is not None:
            self._launch.doubt()

    def inherit(self) -> None:
        """Go on without the launcher, which is dead.

        Its children are those of the daemon now, if that is a subreaper; then it takes the
        status itself. The number still means the shim: the launcher tells of an end as soon
        as it has taken its status, and all that it had told has been read.
        """
        self._launch = None
        pid = self.pid
        if pid is not None and pid not in reapProcessHandlers:
            with suppress(ChildProcessError):  # it ended unseen, or is somebody else's
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self.processEnded(status)
                else:
                    registerReapProcessHandler(pid, self)
                return
        self.loseConnection()
        self.finish(StatusUnknown("the launcher has died"))

    def reapProcess(self) -> None:
        """Take its status if it has ended; Twisted calls this for children of ours."""
        pid = self.pid
        assert pid is not None
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            unregisterReapProcessHandler(pid, self)
            self.processEnded(status)

    # -- what the pipes tell

    def childDataReceived(self, name: int, data: bytes) -> None:
        """Pass on what a pipe brought."""
        self._protocol.childDataReceived(name, data)

    def childConnectionLost(self, name: int, reason: Failure) -> None:
        """Close a pipe whose other end is closed, or that is not wanted any more."""
        os.close(self._pipes.pop(name).fd)
        self._tell(self._protocol.childConnectionLost, name)
        self._end()

    # -- what the protocol asks for

    def signalProcess(self, signalID: str | int) -> None:
        """Send a signal; `ProcessExitedAlready` as soon as its end is known."""
        number = signalID
        if isinstance(number, str):
            number = signal.Signals[f"SIG{number}"].value
        if self._reason is not None:
            raise ProcessExitedAlready
        if self._launch is not None:
            # The number may be a stranger's by now; only the launcher knows.
            self._launch.send_signal(self._number, number)
        elif self.pid is not None:
            os.kill(self.pid, number)

    def closeChildFD(self, descriptor: int) -> None:
        """Close our end of a pipe."""
        if descriptor in self._pipes:
            self._pipes[descriptor].loseConnection()

    def closeStdin(self) -> None:
        """Do nothing: a shim has ``/dev/null``."""

    def closeStdout(self) -> None:
        """Hear no more news."""
        self.closeChildFD(1)

    def closeStderr(self) -> None:
        """Hear no more complaints."""
        self.closeChildFD(2)

    def loseConnection(self) -> None:
        """Close both pipes."""
        self.closeStdout()
        self.closeStderr()

    def writeToChild(self, childFD: int, data: bytes) -> None:
        """Refuse it: a shim reads nothing."""
        raise KeyError(childFD)

    def write(self, data: bytes) -> None:
        """Lose it, as the interface says where there is no standard input."""

    def writeSequence(self, data: Iterable[bytes]) -> None:
        """As `write`."""

    def getHost(self) -> IAddress:
        """Refuse it: there is no address."""
        raise NotImplementedError

    def getPeer(self) -> IAddress:
        """Refuse it: there is no address."""
        raise NotImplementedError


@define
class _Message:
    data: bytes
    pipes: list[int] = field(factory=list)
    """Descriptors that go with it, and are closed as soon as it has been sent."""


@implementer(IReadWriteDescriptor)
class _Launch(ProcessProtocol):
    """One process of the launcher: its socket, and the shims whose end it will tell."""

    def __init__(
        self,
        reactor: Any,
        sock: socket.socket,
        ready: Callable[["_Launch"], None],
        died: Callable[["_Launch", str], None],
    ) -> None:
        self.reactor = reactor
        self._sock = sock
        self._on_ready = ready
        self._on_death = died
        self._ready = False
        self._closed = False
        self._last = 0
        self._shims: dict[int, LaunchedShim] = {}
        self._unanswered: set[int] = set()
        self._unsent: deque[_Message] = deque()
        self._doubted = False
        """Whether a shim has closed its pipes, and perhaps ended, for longer than usual."""
        self._asked = False
        self._silent = 0
        self._heard = False
        self._next: IDelayedCall | None = None
        sock.setblocking(False)
        reactor.addReader(self)
        self._watch()

    # -- for the reactor

    def fileno(self) -> int:
        """Return the number of the socket."""
        return self._sock.fileno()

    def logPrefix(self) -> str:
        """Return what the reactor's own messages begin with."""
        return "launcher"

    def doRead(self) -> None:
        """Take answers, a bounded number at a time."""
        self._read(MOST_ANSWERS)

    def doWrite(self) -> None:
        """Send the messages that are queued, as many as the socket takes."""
        while self._unsent:
            message = self._unsent[0]
            try:
                self._send(message)
            except BlockingIOError:
                return
            except OSError:
                # No memory, too many descriptors on their way: it passes. Or the launcher
                # is dead, which is told in another way.
                self.reactor.removeWriter(self)
                return
            self._unsent.popleft()
            self._close_pipes(message)
        self.reactor.removeWriter(self)

    def connectionLost(self, reason: Failure) -> None:
        """Read no more: it is dead, or dying, and `processExited` comes."""
        self.reactor.removeReader(self)
        self.reactor.removeWriter(self)

    # -- its process

    def errReceived(self, data: bytes) -> None:
        """Log what it complains of."""
        text = data.decode("utf-8", "replace").strip()
        _log.error("The launcher says: {it}", it=text)

    def processExited(self, reason: Failure) -> None:
        """Let every shim go its own way."""
        if not self._closed:
            self._read(None)  # what it had said before
            self._leave(str(reason.value))

    def _leave(self, why: str) -> None:
        self._shut()
        self._on_death(self, why)
        for shim in list(self._shims.values()):
            shim.inherit()

    def kill(self) -> None:
        """End a launcher that does not work; `processExited` says when it is no more."""
        assert self.transport is not None
        with suppress(ProcessExitedAlready):
            self.transport.signalProcess("KILL")

    def close(self) -> None:
        """Let the launcher end. The shims go on, and nobody is told of their end."""
        if not self._closed:
            self.doWrite()
            self._shut()

    def _shut(self) -> None:
        self._closed = True
        self.reactor.removeReader(self)
        self.reactor.removeWriter(self)
        self._sock.close()
        for message in self._unsent:
            self._close_pipes(message)
        self._unsent.clear()
        if self._next is not None and self._next.active():
            self._next.cancel()

    # -- messages

    def _read(self, most: int | None) -> None:
        while most is None or most > 0:
            try:
                data = self._sock.recv(_ANSWER.size)
            except ConnectionError:
                continue  # it died before it had read all; its answers come next
            except OSError:
                return
            if len(data) != _ANSWER.size:
                self.reactor.removeReader(self)
                return
            self._heard = True
            self._take(*_ANSWER.unpack(data))
            if self._closed:
                return
            most = None if most is None else most - 1

    def _take(self, number: int, what: int, value: int) -> None:
        if not number:
            self._asked = False
            if not self._ready:
                self._ready = True
                self._on_ready(self)
            return
        self._unanswered.discard(number)
        if what == launcher.STARTED:
            self._shims[number].pid = value
            return
        shim = self._shims.pop(number)
        if what == launcher.ENDED:
            shim.processEnded(value)
        else:
            shim.finish(NotStarted(OSError(value, os.strerror(value))))

    def spawn(self, protocol: ProcessProtocol, folder: Path) -> bool:
        """Have a shim started; return False if that cannot be asked for now.

        Raises `OSError` if there are no descriptors for its pipes.
        """
        ends: list[int] = []
        try:
            for _ in range(2):
                ends += os.pipe()
        except OSError:
            for fd in ends:
                os.close(fd)
            raise
        number = self._last + 1
        data = number.to_bytes(launcher.NUMBER, "little") + os.fsencode(folder)
        try:
            # Before the request is sent: afterwards a failure here could not undo it.
            shim = LaunchedShim(self, number, protocol, ends[::2])
        except OSError:
            for fd in ends:
                os.close(fd)
            raise
        if not self._post(_Message(data, ends[1::2])):
            shim.abandon()
            for fd in ends[::2]:
                os.close(fd)
            return False
        self._last = number
        self._unanswered.add(number)
        self._shims[number] = shim
        self._watch()
        shim.connect()
        return True

    def send_signal(self, number: int, signal: int) -> None:
        """Have a shim signalled."""
        data = number.to_bytes(launcher.NUMBER, "little") + bytes([signal])
        self._post(_Message(data))
        self.doubt()

    def _post(self, message: _Message) -> bool:
        """Send a message, now or in its turn; return whether that can be."""
        if not self._unsent:
            try:
                self._send(message)
            except BlockingIOError:
                pass
            except OSError:
                self._close_pipes(message)
                return False
            else:
                self._close_pipes(message)
                return True
        self._unsent.append(message)
        self.reactor.addWriter(self)
        return True

    def _send(self, message: _Message) -> None:
        if message.pipes:
            socket.send_fds(self._sock, [message.data], message.pipes)
        else:
            self._sock.send(message.data)

    def _close_pipes(self, message: _Message) -> None:
        for fd in message.pipes:
            os.close(fd)

    # -- whether it works

    def doubt(self) -> None:
        """Ask it soon for a sign of life."""
        self._doubted = True
        self._watch()

    def _watch(self, rest: float = 0) -> None:
        seconds = rest or TICK
        if self._closed:
            return
        if self._next is None:
            self._next = self.reactor.callLater(seconds, self._tick)
        elif self._next.getTime() > self.reactor.seconds() + seconds:
            self._next.reset(seconds)

    def _tick(self) -> None:
        self._next = None
        self._read(None)  # this process may have been stopped, not the launcher
        if self._closed:
            return
        owes = self._unanswered or self._asked or not self._ready
        self._silent = self._silent + 1 if owes and not self._heard else 0
        self._heard = False
        if self._unsent:
            self.doWrite()
        if self._silent == PATIENCE:
            _log.error("The launcher does not answer; it is killed")
            self.kill()
        if self._silent == 2 * PATIENCE:
            # The kernel does not let it go. Should it fork even now, the lock decides.
            self._leave("it does not end, not even by KILL")
            return
        if self._doubted and not self._asked and self._ready:
            self._asked = self._post(_Message(bytes(launcher.NUMBER)))
            self._doubted = not self._asked
        if owes or self._asked or self._doubted or self._unsent:
            self._watch()
        elif self._shims:
            # A shim may have ended unseen: its task can hold its pipes open.
            self._doubted = True
            self._watch(REST)


class Launcher:
    """Starts shims by a launcher, as long as there is one that works.

    Use it in the thread of the reactor.
    """

    def __init__(self, reactor: Any, command: Sequence[str], state: Path) -> None:
        self._room = len(os.fsencode(state)) + ROOM
        self._reactor = reactor
        self._command = command
        self._launch: _Launch | None = None
        """The newest one, dead or alive."""
        self._works = False
        self._given_up = False
        self._stopped = False
        self._deaths: list[float] = []
        self._again: IDelayedCall | None = None

    def start(self) -> None:
        """Start the launcher; until it is ready `spawn` returns False."""
        try:
            self._start()
        except OSError as e:
            self._died(None, str(e))

    def stop(self) -> None:
        """Let the launcher end; the shims do not notice."""
        self._stopped = True
        self._works = False
        if self._again is not None and self._again.active():
            self._again.cancel()
        if self._launch is not None:
            self._launch.close()

    def spawn(self, protocol: ProcessProtocol, folder: Path) -> bool:
        """Start the shim of a folder; False: it has to be started in another way.

        Raises `OSError` if there are no descriptors for its pipes.
        """
        if not self._works or len(os.fsencode(folder)) > self._room:
            return False
        assert self._launch is not None
        return self._launch.spawn(protocol, folder)

    def _start(self) -> None:
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its:
            try:
                null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            except OSError:
                ours.close()
                raise
            launch = _Launch(self._reactor, ours, self._ready, self._died)
            try:
                # As for a shim: its own environment is empty, and it is in our session.
                self._launch = launch
                self._reactor.spawnProcess(
                    launch,
                    self._command[0],
                    [*self._command, " " * self._room],
                    env={},
                    childFDs={0: null, 1: null, 2: "r", launcher.SOCKET: its.fileno()},
                )
            except OSError:
                launch.close()
                raise
            finally:
                os.close(null)

    def _ready(self, launch: _Launch) -> None:
        self._works = True
        if self._given_up:
            self._given_up = False
            _log.info("The launcher works again")

    def _died(self, launch: _Launch | None, why: str) -> None:
        self._works = False
        if self._stopped:
            return
        now = self._reactor.seconds()
        self._deaths = [at for at in self._deaths if at > now - PAUSE] + [now]
        if not self._given_up and len(self._deaths) < DEATHS:
            _log.error("The launcher has ended, another one is started: {why}", why=why)
            self.start()
            return
        if not self._given_up:
            self._given_up = True
            _log.error(
                "The launcher has ended {n} times; each task starts an interpreter of its "
                "own for now, which is slower: {why}",
                n=len(self._deaths),
                why=why,
            )
        self._again = self._reactor.callLater(PAUSE, self.start)
