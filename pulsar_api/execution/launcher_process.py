"""One process of the launcher: the messages to it, and the check that it still works."""

import os
import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from struct import Struct
from typing import Any

from attrs import define, field
from twisted.internet.error import ProcessExitedAlready
from twisted.internet.interfaces import IDelayedCall, IReadWriteDescriptor
from twisted.internet.protocol import ProcessProtocol
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from pulsar_api.execution.launched_shim import LaunchedShim, NotStarted
from pulsar_api.shim import launcher

_log = Logger()

TICK = 1.0
"""Seconds between two checks of a launcher that owes an answer."""

PATIENCE = 5
"""Ticks without an answer after which a launcher that owes one is killed.

They are counted and not measured: if the daemon itself was stopped, it counts one."""

REST = 30.0
"""Seconds between two checks of a launcher that owes no answer."""

MOST_ANSWERS = 256
"""Answers that are read in one iteration of the reactor."""

_ANSWER = Struct("<QQQ")


@define
class _Message:
    data: bytes
    pipes: list[int] = field(factory=list)
    """Descriptors that are sent with it, and closed here afterwards."""


@implementer(IReadWriteDescriptor)
class LauncherProcess(ProcessProtocol):
    """One process of the launcher: its socket, and the shims whose end it will report."""

    def __init__(
        self,
        reactor: Any,
        sock: socket.socket,
        ready: Callable[["LauncherProcess"], None],
        died: Callable[["LauncherProcess", str], None],
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
        self._check_wanted = False
        """Whether a shim may have ended without a report, so the launcher is checked."""
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
        """Return the prefix of the reactor's log messages."""
        return "launcher"

    def doRead(self) -> None:
        """Read at most `MOST_ANSWERS` answers."""
        self._read(MOST_ANSWERS)

    def doWrite(self) -> None:
        """Send as many of the queued messages as the socket takes."""
        while self._unsent:
            message = self._unsent[0]
            try:
                self._send(message)
            except BlockingIOError:
                return
            except OSError:
                # No memory, or too many descriptors in transit: this passes. Or the
                # launcher is dead, which `processExited` reports.
                self.reactor.removeWriter(self)
                return
            self._unsent.popleft()
            self._close_pipes(message)
        self.reactor.removeWriter(self)

    def connectionLost(self, reason: Failure) -> None:
        """Stop reading: the launcher has died, and `processExited` follows."""
        self.reactor.removeReader(self)
        self.reactor.removeWriter(self)

    # -- the process

    def errReceived(self, data: bytes) -> None:
        """Log an error message of the launcher."""
        text = data.decode("utf-8", "replace").strip()
        _log.error("The launcher says: {it}", it=text)

    def processExited(self, reason: Failure) -> None:
        """Let every shim go on without the launcher."""
        if not self._closed:
            self._read(None)  # what it had sent before
            self._leave(str(reason.value))

    def _leave(self, why: str) -> None:
        self._shut()
        self._on_death(self, why)
        for shim in list(self._shims.values()):
            shim.inherit()

    def kill(self) -> None:
        """Kill a launcher that does not work; `processExited` follows."""
        assert self.transport is not None
        with suppress(ProcessExitedAlready):
            self.transport.signalProcess("KILL")

    def close(self) -> None:
        """Let the launcher end. The shims go on, and their ends are not reported."""
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
                continue  # it died before it had read everything; its answers come next
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
        """Ask for the start of a shim; return False if that cannot be asked now.

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
        """Send a signal to the shim with this number."""
        data = number.to_bytes(launcher.NUMBER, "little") + bytes([signal])
        self._post(_Message(data))
        self.expect_answer()

    def _post(self, message: _Message) -> bool:
        """Send a message or queue it; return False if neither is possible."""
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

    # -- health

    def expect_answer(self) -> None:
        """Check soon that the launcher still works."""
        self._check_wanted = True
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
            # The kernel does not end it. If it forks even now, the lock decides.
            self._leave("it does not end, not even after KILL")
            return
        if self._check_wanted and not self._asked and self._ready:
            self._asked = self._post(_Message(bytes(launcher.NUMBER)))
            self._check_wanted = not self._asked
        if owes or self._asked or self._check_wanted or self._unsent:
            self._watch()
        elif self._shims:
            # A shim may have ended unnoticed: its task can hold its pipes open.
            self._check_wanted = True
            self._watch(REST)
