"""Builds the parts of a daemon behind its ports, starts them and closes them."""

import os
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from attrs import frozen
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.process import reapProcessHandlers
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure

from pulsar_api.concurrency.turns import TurnScheduler
from pulsar_api.config.settings import Settings
from pulsar_api.daemon.access import AccessParts, build_access
from pulsar_api.daemon.preflight import find_accounts
from pulsar_api.daemon.state import DATABASE, LISTINGS, TASKS, narrow
from pulsar_api.execution import cgroups, processes, programs
from pulsar_api.execution.cgroups import Cgroups
from pulsar_api.execution.executor import ShimExecutor
from pulsar_api.execution.launcher import Launcher
from pulsar_api.execution.listings import Listings
from pulsar_api.execution.local_machine import LocalMachine
from pulsar_api.execution.pulsar_version import Pulsar
from pulsar_api.execution.sampler import ProcessSampler
from pulsar_api.memory import Memory
from pulsar_api.output.lines import LineIndexes
from pulsar_api.storage.tasks import SQLiteStore
from pulsar_api.tasks import presets
from pulsar_api.tasks.clock import SteadyClock
from pulsar_api.tasks.commands import Commands
from pulsar_api.tasks.interfaces import Bounds, Keep
from pulsar_api.tasks.queue import Limits
from pulsar_api.tasks.service import TaskService
from pulsar_api.web.api.creating import CreateAPI
from pulsar_api.web.api.following import FollowAPI
from pulsar_api.web.api.lists import Lists
from pulsar_api.web.api.output import PartsAPI
from pulsar_api.web.api.targets import TargetAPI
from pulsar_api.web.api.tasks import TaskAPI
from pulsar_api.web.legacy.feed import Feed
from pulsar_api.web.legacy.jobs import RESERVED, JobAPI
from pulsar_api.web.legacy.sockjs import SockJS
from pulsar_api.web.pages import Pages
from pulsar_api.web.root import Root
from pulsar_api.web.routing import mount
from pulsar_api.web.signin import SignIn

_log = Logger()

REAP = 1.0
"""Seconds between two checks for ended children that no other code waits for."""

CLOSE = 10.0
"""Seconds that each part of the daemon has to close at the end."""


@frozen
class Given:
    """The values that are fixed before ``twistd`` forks."""

    commands: Commands
    umask: int
    """The umask of tasks."""
    files: int
    """The soft limit of open files of tasks."""
    certificate_names: Callable[[], frozenset[str]]


@frozen
class Running:
    """The parts of a daemon. All of them exist from its start to its end."""

    tasks: TaskService
    root: Root
    """Serves the routes, once `start` has taken up the tasks."""
    _reactor: Any
    _settings: Settings
    _lock: int
    """The descriptor that keeps other daemons out."""
    _store: SQLiteStore
    _parts: AccessParts
    _sockjs: SockJS
    _launcher: Launcher
    _listings: Listings
    _pulsar: Pulsar
    _sampler: ProcessSampler
    _reaper: LoopingCall
    _memory: Memory

    async def start(self, failed: Callable[[Failure], object]) -> None:
        """Take up the tasks of earlier daemons.

        ``failed`` is called later if the installed version of pulsar cannot be found out.
        """
        self._reaper.start(REAP)
        await self._listings.start()
        if self._settings.command == presets.DETECTED:
            Deferred.fromCoroutine(self._pulsar.find_out()).addErrback(failed)
        await self.tasks.start()
        self._sampler.start()
        self._memory.start()

    async def stop(self) -> None:
        """Take no new tasks and answer all waiters. Running tasks go on."""
        self._memory.stop()
        await self.tasks.stop(self._settings.drain_timeout)
        self.tasks.release()
        for service in (self._listings, self._sampler, self._launcher):
            service.stop()
        if self._reaper.running:
            self._reaper.stop()
        self._sockjs.release()
        self._parts.access.release()

    async def close(self) -> None:
        """Close databases and connections, and let the next daemon in."""
        database = Deferred.fromCoroutine(self._store.close())
        await within(self._reactor, "the database", database)
        if self._parts.store is not None:
            tokens = Deferred.fromCoroutine(self._parts.store.close())
            await within(self._reactor, "the database of tokens", tokens)
        if self._parts.pool is not None:
            pool = self._parts.pool.closeCachedConnections()
            await within(self._reactor, "the connections to the provider", pool)
        os.close(self._lock)


async def within(clock: IReactorTime, what: str, closing: Deferred[Any]) -> None:
    """Wait at most `CLOSE` seconds until ``closing`` fires."""

    def late(*_: object) -> None:
        _log.error("Closing {what} takes too long; going on without", what=what)

    await closing.addTimeout(CLOSE, clock, late)


def build(reactor: Any, s: Settings, given: Given, lock: int) -> Running:
    """Return the parts that the settings describe, with the launcher started.

    ``lock`` is the descriptor that keeps other daemons out of the state folder. It is
    closed if this fails.

    Raises:
        SettingsError: This process cannot give tasks their accounts.
        OSError: The state folder or the launcher cannot be set up.
    """
    with ExitStack() as undo:
        undo.callback(os.close, lock)
        running = _build(reactor, s, given, lock, undo)
        undo.pop_all()
    return running


def _build(reactor: Any, s: Settings, given: Given, lock: int, undo: ExitStack) -> Running:
    """Build as `build`. What has to be undone if that fails is added to ``undo``."""
    state = Path(s.state_dir)
    tasks = state / TASKS
    tasks.mkdir(mode=0o700, exist_ok=True)
    # With very many files this takes long. Nothing waits for it, not even the stop.
    threading.Thread(target=narrow, args=([tasks],), daemon=True).start()
    # The processes of a killed shim then become children of this one, which finds them.
    processes.become_subreaper()
    own_children = reapProcessHandlers
    reaper = LoopingCall(_reap, processes.Reaper(own_children))
    reaper.clock = reactor
    # Without other accounts a task could replace the compiled programs in this folder.
    started = programs.compiled(state) if s.run_as else programs.Programs()
    if not s.run_as:
        programs.remove_compiled(state)
    # Before the launcher starts, because it inherits the cgroup of the daemon.
    root = cgroups.delegated()
    groups = None if root is None else Cgroups.enter(root, time.time())
    # Check again, because twistd may have changed the user since (--uid).
    find_accounts(s, () if groups is None else groups.enabled())
    launcher = Launcher(reactor, started.launcher, state)
    launcher.start()
    undo.callback(launcher.stop)
    machine = LocalMachine(reactor, started.shim, own_children, launcher, groups)
    machine.sync(state)

    def executor(folder: Path) -> ShimExecutor:
        return ShimExecutor(
            machine, reactor, folder, lambda: uuid4().hex, given.umask, given.files
        )

    # Permits are kept beside the folder of tasks, so listings need a folder of their own.
    listed = state / LISTINGS / TASKS
    listings = Listings(executor(listed), machine, reactor, listed)
    known = None if s.command == presets.DETECTED else given.commands
    pulsar = Pulsar(reactor, listings, given.commands, known)
    clock = SteadyClock(time.time, _uptime, machine.boot_id())
    store = SQLiteStore(state / DATABASE, reactor.callFromThread)
    service = TaskService(
        store, executor(tasks), reactor, clock, pulsar.commands, _limits(s)
    )
    parts = build_access(reactor, s, service, clock, given.certificate_names)
    turns = TurnScheduler(reactor)
    feed = Feed(service, tasks, reactor, turns)
    sockjs = SockJS(parts.access, feed, reactor)
    return Running(
        tasks=service,
        root=_root(reactor, s, parts, feed, turns, sockjs, listings, tasks),
        reactor=reactor,
        settings=s,
        lock=lock,
        store=store,
        parts=parts,
        sockjs=sockjs,
        launcher=launcher,
        listings=listings,
        pulsar=pulsar,
        sampler=ProcessSampler(machine, reactor, tasks, service.running),
        reaper=reaper,
        memory=Memory(reactor),
    )


def _limits(s: Settings) -> Limits:
    bounds = Bounds(s.kill_grace, s.task_timeout, s.silence_timeout, s.max_output_size)
    most = s.max_output_size
    keep = Keep(s.keep_tasks, s.keep_days * 86400, s.max_state_size, most)
    return Limits(bounds, s.max_running, s.max_running_per_target, s.max_queued, keep)


def _root(
    reactor: Any,
    s: Settings,
    parts: AccessParts,
    feed: Feed,
    turns: TurnScheduler,
    sockjs: SockJS,
    listings: Listings,
    tasks: Path,
) -> Root:
    access = parts.access
    lists = Lists(reactor, turns)
    github, confirm, secret = parts.github, s.confirm, s.secret_variables
    mounts = [
        mount(TaskAPI(access, tasks, reactor, s.poll_timeout, lists)),
        mount(CreateAPI(access, tasks, feed)),
        mount(FollowAPI(access, tasks, reactor, turns)),
        mount(PartsAPI(access, LineIndexes(tasks, turns))),
        mount(TargetAPI(access)),
        mount(JobAPI(access, tasks, feed, listings, lists), RESERVED),
        sockjs.mount(),
        mount(Pages(access)),
        mount(SignIn(access, reactor, github, confirm, secret)),
    ]
    return Root(mounts, access.origins)


def _reap(reaper: processes.Reaper) -> None:
    with suppress(OSError):  # no descriptor is free; the next call tries again
        reaper.reap()


def _uptime() -> float:
    """Return the seconds since the machine booted, including suspend."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
