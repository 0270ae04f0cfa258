"""The service that twistd starts and stops."""

import atexit
import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twisted.application.service import MultiService
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.web.resource import Resource
from twisted.web.server import Request

from pulsar_api import __version__
from pulsar_api.config.settings import Settings
from pulsar_api.daemon.preflight import (
    make_commands,
    only_loopback,
)
from pulsar_api.daemon.running import Given, Running, build, within
from pulsar_api.daemon.state import (
    OWN,
    lock,
    narrow,
)
from pulsar_api.execution import processes
from pulsar_api.network import certificates, listener
from pulsar_api.network.renewal import Renewal
from pulsar_api.tasks.service import TaskService
from pulsar_api.web.responses import problem
from pulsar_api.web.server.site import BoundedSite, Capacity

_log = Logger()

LAST = 30.0
"""Seconds that the process has to end once all is closed, even if a thread hangs."""

_RESERVE = 256
"""Descriptors that connections must leave for tasks, the databases and the log."""


class _Starting(Resource):
    isLeaf = True

    def render(self, request: Request) -> bytes:
        request.setHeader("Retry-After", "1")
        detail = "The daemon is starting; try again in a moment."
        return problem(request, 503, "starting", "Starting", detail)


class Daemon(MultiService):
    """The ports, and the parts that run behind them while the service runs.

    Only the ports are opened before ``twistd`` has forked and dropped its privileges.
    """

    def __init__(
        self, reactor: Any, settings: Settings, environ: Mapping[str, str]
    ) -> None:
        super().__init__()
        self._reactor = reactor
        self._settings = settings
        # twistd changes the umask when it becomes a daemon; tasks get the present one.
        umask = os.umask(0o022)
        os.umask(umask)
        environ = {"HOME": os.path.expanduser("~"), "PATH": os.defpath, **environ}
        commands = make_commands(settings, environ)
        self._renewal: Renewal | None = None
        if settings.secure:
            self._renewal = Renewal(settings, reactor, time.time)
            self.addService(self._renewal)
        identity = None if self._renewal is None else self._renewal.identity
        self._shared_key = identity is not None and certificates.is_development(identity)
        loopback = only_loopback(settings, identity)
        soft, limit = processes.raise_file_limit()
        self._given = Given(commands, umask, soft, self._certificate_names)
        most = max(16, limit - _RESERVE)
        bounds = Capacity(
            most, settings.max_connections_per_address, settings.max_requests_per_address
        )
        self.site = BoundedSite(_Starting(), reactor, bounds, settings.hsts)
        self.listeners = [
            listener.Listener(name, endpoint, self.site, loopback)
            for name, endpoint in listener.endpoints(settings, reactor, self._renewal)
        ]
        for service in self.listeners:
            self.addService(service)
        self._running: Running | None = None
        """None before the service has started."""

    @property
    def tasks(self) -> TaskService | None:
        """The tasks, None before the service has started."""
        return None if self._running is None else self._running.tasks

    def startService(self) -> None:
        """Open the state, take up the tasks, and then serve."""
        super().startService()
        state = Path(self._settings.state_dir)
        os.umask(0o077)
        held = lock(state)
        narrow(path for name in OWN for path in state.glob(name))
        for service in self.listeners:
            _log.info(
                "pulsar-api {version} listens on {url}",
                version=__version__,
                url=service.url("http" if self._renewal is None else "https"),
            )
        if not self._settings.allow_sudo:
            processes.forbid_new_privileges()
        if not self._settings.run_as:
            # Tasks run as the daemon here, and can replace a shim or change its orders. A
            # shim with such a capability would let them become root.
            processes.keep_capabilities()
        if os.geteuid() == 0 and not self._settings.run_as:
            _log.warn(
                "TASKS RUN AS ROOT, because this daemon does. Run it as a user of its own, "
                "or give tasks other accounts with [[run-as]] in the settings"
            )
        if self._settings.run_as and not self._settings.authenticated:
            _log.warn(
                "EVERY TASK CAN START TASKS UNDER ALL ACCOUNTS, because callers do not "
                "authenticate: [[run-as]] protects nothing without --auth-provider"
            )
        if self._shared_key:
            _log.warn("DEVELOPMENT CERTIFICATE: its key is public, so it protects nothing")
        starting = Deferred.fromCoroutine(self._start(held))
        starting.addErrback(self._cannot_start)

    async def _start(self, held: int) -> None:
        self._running = build(self._reactor, self._settings, self._given, held)
        await self._running.start(self._cannot_start)
        self.site.resource = self._running.root

    def _certificate_names(self) -> frozenset[str]:
        """Return the host names in the current certificate."""
        found = self._renewal
        return frozenset() if found is None else found.identity.names()

    def _cannot_start(self, failure: Any) -> None:
        _log.failure("The daemon cannot start", failure)
        # The reactor may not run yet. Also, twistd would exit with 0, so the last exit
        # handler exits with 1 to report the failure.
        self._reactor.callWhenRunning(self._reactor.stop)
        atexit.register(os._exit, 1)

    async def _stop(self) -> None:
        if self._running is not None:
            await self._running.stop()
        # Responses have to leave before the connections are cut.
        until = self._reactor.seconds() + 1
        while self.site.serving and self._reactor.seconds() < until:
            await deferLater(self._reactor, 0.01)
        connections = MultiService.stopService(self)
        await within(self._reactor, "the connections", connections)
        if self._running is not None:
            await self._running.close()
        # Children that end from now on are the next daemon's. The reactor now waits for its
        # threads and handles no signals; a traced thread of CPython 3.11 spins as long as a
        # signal is pending.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        # A thread that waits for a dead disk must not keep the process alive.
        threading.Thread(target=_end, name="end", daemon=True).start()
        # There are no certificates left to reload, and with SIG_DFL a SIGHUP would kill the
        # process.
        if signal.getsignal(signal.SIGHUP) == self.hang_up:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def stopService(self) -> Deferred[None]:
        """Take no new tasks, answer all waiters, leave running commands running."""
        return Deferred.fromCoroutine(self._stop())

    def hang_up(self, *_: object) -> None:
        """Reload the certificate files as soon as the reactor has time.

        This is the handler for SIGHUP, which can arrive at any moment.
        """
        self._reactor.callFromThread(self._renew)

    def _renew(self) -> None:
        if self._renewal is None:
            _log.info("SIGHUP: there is no certificate to reload")
        else:
            self._renewal.renew()


def _end() -> None:
    time.sleep(LAST)
    os._exit(1)
