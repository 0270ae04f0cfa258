"""Starts shims by a launcher (`pulsar_api.shim.launcher`), and keeps one running.

A task starts at most once, even if the launcher dies: each shim takes the lock of its task
before anything else, so a start that is in doubt can be repeated.
"""

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twisted.internet.interfaces import IDelayedCall
from twisted.internet.protocol import ProcessProtocol
from twisted.logger import Logger

from pulsar_api.execution.launcher_process import LauncherProcess
from pulsar_api.shim import launcher

_log = Logger()

ROOM = 48
"""Bytes that are enough for the path from the state folder to that of any task."""

DEATHS = 3
PAUSE = 60.0
"""After `DEATHS` ends within `PAUSE` seconds each task starts an interpreter of its own.

The launcher is started again after as many seconds."""


class Launcher:
    """Starts shims by a launcher, and restarts a launcher that has died.

    Use it in the thread of the reactor only.
    """

    def __init__(self, reactor: Any, command: Sequence[str], state: Path) -> None:
        self._room = len(os.fsencode(state)) + ROOM
        self._reactor = reactor
        self._command = command
        self._process: LauncherProcess | None = None
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
        """Let the launcher end; the shims go on."""
        self._stopped = True
        self._works = False
        if self._again is not None and self._again.active():
            self._again.cancel()
        if self._process is not None:
            self._process.close()

    def spawn(self, protocol: ProcessProtocol, folder: Path) -> bool:
        """Start the shim of a folder; return False if the launcher cannot do it now.

        Raises `OSError` if there are no descriptors for its pipes.
        """
        if not self._works or len(os.fsencode(folder)) > self._room:
            return False
        assert self._process is not None
        return self._process.spawn(protocol, folder)

    def _start(self) -> None:
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its:
            try:
                null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            except OSError:
                ours.close()
                raise
            process = LauncherProcess(self._reactor, ours, self._ready, self._died)
            try:
                # As for a shim: it gets an empty environment, and it is in our session.
                self._process = process
                self._reactor.spawnProcess(
                    process,
                    self._command[0],
                    [*self._command, " " * self._room],
                    env={},
                    childFDs={0: null, 1: null, 2: "r", launcher.SOCKET: its.fileno()},
                )
            except OSError:
                process.close()
                raise
            finally:
                os.close(null)

    def _ready(self, process: LauncherProcess) -> None:
        self._works = True
        if self._given_up:
            self._given_up = False
            _log.info("The launcher works again")

    def _died(self, process: LauncherProcess | None, why: str) -> None:
        self._works = False
        if self._stopped:
            return
        now = self._reactor.seconds()
        self._deaths = [at for at in self._deaths if at > now - PAUSE] + [now]
        if not self._given_up and len(self._deaths) < DEATHS:
            _log.error("The launcher has ended; another one is started: {why}", why=why)
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
