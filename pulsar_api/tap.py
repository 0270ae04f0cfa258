"""Puts the daemon together; the only place that knows everything, and the reactor."""

import atexit
import fcntl
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from http.cookiejar import CookieJar, DefaultCookiePolicy
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn, TypeGuard, cast
from uuid import uuid4

from attrs import define, evolve, field
from treq.client import HTTPClient
from twisted.application.service import MultiService, Service
from twisted.internet.defer import Deferred
from twisted.internet.process import reapProcessHandlers
from twisted.internet.task import LoopingCall, deferLater
from twisted.logger import Logger
from twisted.python import usage
from twisted.web.client import Agent, HTTPConnectionPool
from twisted.web.resource import Resource
from twisted.web.server import Request

from pulsar_api import (
    __version__,
    cgroups,
    command,
    files,
    listener,
    process,
    processes,
    settings,
    store,
    tls,
)
from pulsar_api.accounts import Accounts, check_capabilities, check_limits
from pulsar_api.auth import audit, records
from pulsar_api.auth.gate import Gate, Provider
from pulsar_api.auth.github import DEADLINE, GitHub, Members, OAuth
from pulsar_api.auth.own import OwnTokens, Static
from pulsar_api.auth.records import Records
from pulsar_api.auth.rights import Caller, Policy
from pulsar_api.auth.sessions import Sessions
from pulsar_api.cgroups import Cgroups
from pulsar_api.changes import Changes
from pulsar_api.command import Commands, Names
from pulsar_api.errors import Busy, CannotListen, SettingsError, StoreUnavailable
from pulsar_api.launch import Launcher
from pulsar_api.lines import LineIndexes
from pulsar_api.listings import Listings
from pulsar_api.machine import LocalMachine
from pulsar_api.memory import Memory
from pulsar_api.ports import Bounds, Keep
from pulsar_api.principal import Principal
from pulsar_api.process import ShimExecutor
from pulsar_api.renewal import Renewal
from pulsar_api.rota import Rota
from pulsar_api.service import Limits, TaskService
from pulsar_api.settings import Settings
from pulsar_api.steady import SteadyClock
from pulsar_api.store import SQLiteStore
from pulsar_api.task import Command
from pulsar_api.web.access import Access
from pulsar_api.web.feed import Feed
from pulsar_api.web.follow import FollowAPI
from pulsar_api.web.jobs import JobAPI
from pulsar_api.web.lists import Lists
from pulsar_api.web.origin import Origins
from pulsar_api.web.pages import Pages, Root
from pulsar_api.web.parts import PartsAPI
from pulsar_api.web.reply import problem
from pulsar_api.web.signin import SignIn
from pulsar_api.web.site import BoundedSite, Most
from pulsar_api.web.sockjs import SockJS
from pulsar_api.web.targets import TargetAPI
from pulsar_api.web.tasks import TaskAPI

_log = Logger()

DATABASE = "pulsar-api.db"
TASKS = "tasks"
LISTINGS = "listings"
_NAMED = 20  # files that were open to other users and are named in the log
_AGAIN = 2.0  # seconds until pulsar is asked again for its version
LOG = "pulsar-api.log"

REAP = 1.0
"""Seconds between two looks for children that nobody else waits for."""

CLOSE = 10.0
"""Seconds that closing each part of the daemon may take at its end."""

LAST = 30.0
"""Seconds after all is closed in which the process must end, threads or not."""

_RESERVE = 256
"""Open files that are kept for tasks, the database and the log."""


def _parameters() -> tuple[list[list[Any]], list[list[Any]]]:
    parameters: list[list[Any]] = []
    flags: list[list[Any]] = []
    for name, help, default, is_flag in settings.options():
        if default in (None, False, ()) or "[" in help:
            text = help
        else:
            text = f"{help} [{default:g}]" if is_number(default) else f"{help} [{default}]"
        if is_flag:
            flags.append([name, None, text])
        elif name != "listen":  # which may be repeated, see opt_listen
            parameters.append([name, None, None, text])
    parameters.append(["config", None, None, "TOML file with these options"])
    return parameters, flags


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a default is written as a number."""
    return isinstance(value, float)


class Options(usage.Options):
    """The command line; ``settings`` is what it means."""

    synopsis = "[options]"
    longdesc = (
        "Runs deployment and operations tasks over HTTP. Every option can also stand in "
        "the file of --config, without the dashes; the command line wins."
    )
    optParameters, optFlags = _parameters()
    settings: Settings

    def __init__(self) -> None:
        self._listen: list[str] = []
        super().__init__()

    def opt_listen(self, endpoint: str) -> None:
        """Twisted endpoint to listen on instead of --port; may be repeated"""  # noqa: D400,D415
        self._listen.append(endpoint)

    def opt_version(self) -> NoReturn:
        """Show the version and exit."""
        print("pulsar-api", __version__)
        sys.exit(0)

    def parseOptions(self, options: Sequence[str] | None = None) -> None:
        """Parse and check everything; on a mistake say so in one line and exit with 1."""
        try:
            super().parseOptions(options)
        except usage.UsageError as e:
            fail(str(e))

    def parseArgs(self, *unknown: str) -> None:
        """Refuse what is no option."""
        if unknown:
            raise usage.UsageError(f"{unknown[0]!r} is no option")

    def postOptions(self) -> None:
        """Make the settings, and try everything that can be tried without starting."""
        given = {k: v for k, v in self.items() if v not in (None, 0)}
        if self._listen:
            given["listen"] = self._listen
        twistd: Mapping[str, Any] = self.parent or {}
        try:
            self.settings = settings.load(given, os.environ)
            check(self.settings, own_files=twistd.get("uid") is None)
        except (SettingsError, CannotListen, StoreUnavailable) as e:
            fail(str(e))
        if "auth-password" in given:
            text = "everybody on this machine can see --auth-password; use a file"
            print(f"pulsar-api: warning: {text}: --auth-password-file", file=sys.stderr)
        if self.settings.log_dir and self.parent is not None:
            self.parent["logfile"] = str(Path(self.settings.log_dir) / LOG)


def fail(message: str) -> NoReturn:
    """Say in one line why the daemon does not start, and exit with 1."""
    print("pulsar-api:", " ".join(message.split()), file=sys.stderr)
    sys.exit(1)


def check(settings: Settings, *, own_files: bool) -> None:
    """Raise if the daemon could not start like this; nothing stays open.

    ``own_files``: whether the process that tries is the one that will write.
    """
    identity = tls.load(settings)
    listener.try_out(settings, _only_loopback(settings, identity))
    _commands(settings, {})
    if not own_files:
        return
    if settings.log_dir:
        _make_folder("--log-dir", Path(settings.log_dir))
        log = Path(settings.log_dir) / LOG
        if log.exists() and not (log.is_file() and os.access(log, os.W_OK)):
            raise SettingsError(f"--log-dir: {log} is no file that can be written")
    state = Path(settings.state_dir)
    _make_folder("--state-dir", state)
    _make_folder("--state-dir", state / TASKS)
    os.close(_lock(state))
    store.prepare(state / DATABASE)
    records.prepare(state / records.FILE)


def _make_folder(option: str, path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as e:
        raise SettingsError(f"{option}: cannot make {path}: {e.strerror}") from None
    if not os.access(path, os.W_OK | os.X_OK, effective_ids=True):
        raise SettingsError(f"{option}: {path} is not writable")


def _lock(state: Path) -> int:
    """Return a descriptor that keeps other daemons out as long as it is open."""
    path = state / "lock"
    try:
        fd = files.open_regular(path, os.O_RDWR | os.O_CREAT)
    except OSError as e:
        raise SettingsError(f"--state-dir: cannot open {path}: {e.strerror}") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        text = f"--state-dir: another pulsar-api uses {state}; give each its own"
        raise SettingsError(text) from None
    return fd


OWN = (
    *("lock", "permits", "secrets", LISTINGS),
    *process.COMPILED,
    *(f"{name}{end}" for name in (DATABASE, records.FILE) for end in ("", "-wal", "-shm")),
    *(f"{name}*" for name in (audit.FILE, audit.ACCESS_FILE)),
)
"""What is ours in the state folder, beside the folder of the tasks."""


def _narrow(paths: Iterable[Path]) -> None:
    """Take all rights of others from files and folders of ours, and say which had some."""
    number = 0
    for number, path in enumerate(chain.from_iterable(map(files.narrow, paths)), 1):
        if number <= _NAMED:
            _log.warn("{path} was open to other users; now it is not", path=path)
    if number > _NAMED:
        _log.warn("So were {n} other files and folders", n=number - _NAMED)


def _only_loopback(settings: Settings, identity: tls.Identity | None) -> str | None:
    shared = identity is not None and tls.is_development(identity)
    return listener.why_only_loopback(settings, development_key=shared)


def _commands(settings: Settings, environment: Mapping[str, str]) -> Commands:
    name = settings.command
    template = command.parse_template("pulsar-0.3" if name == command.DETECTED else name)
    repo = settings.config_repo
    if template.needs_repo and repo is None:
        raise SettingsError(f"--command {name} needs --config-repo")
    if template.local_repo and repo is not None:
        if not Path(repo).is_dir():
            raise SettingsError(f"--config-repo: {repo} is no folder; {name} needs one")
        repo = str(Path(repo).resolve())
    usual = Names()
    names = Names(
        settings.app_pattern or usual.app,
        settings.env_pattern or usual.env,
        settings.action_pattern or usual.action,
        settings.variable_pattern or usual.variable,
        frozenset(settings.forbidden_actions),
        settings.secret_variables,
    )
    accounts = _accounts(settings, cgroups.available(cgroups.delegated()))
    return Commands(template, environment, repo, settings.config_branch, names, accounts)


def _accounts(settings: Settings, controllers: Container[str]) -> Accounts:
    """Return the accounts of tasks; `SettingsError` if this process cannot give them."""
    accounts = Accounts.find(settings.run_as, os.geteuid())
    if settings.run_as:
        check_capabilities()
        check_limits(settings.run_as, controllers)
    return accounts


@define(eq=False)
class Pulsar:
    """Finds out, once, which pulsar is installed, and gives the commands for it."""

    _reactor: Any
    _listings: Listings
    _usual: Commands
    _found: Commands | None = None
    _known: Changes = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._known = Changes(self._reactor)

    async def find_out(self) -> None:
        version = self._usual.version()
        if version.account is None:
            answer = await process.ask(self._reactor, self._reactor, version)
        else:
            answer = await self._ask_below_a_shim(version)
        name = command.preset_for(answer)
        said = answer.strip() or "nothing"
        _log.info("pulsar --version says {said}: using {name}", said=said, name=name)
        self._found = evolve(self._usual, template=command.PRESETS[name])
        self._known.advance(1)

    async def _ask_below_a_shim(self, version: Command) -> str:
        # Only a shim can run it under another account.
        while True:
            try:
                return await self._listings.ask(command.DETECTED, version)
            except (StoreUnavailable, Busy) as e:
                _log.error("Cannot find out which pulsar is installed: {e}", e=e)
                await deferLater(self._reactor, _AGAIN)

    async def commands(self) -> Commands:
        while self._found is None:
            await self._known.after(0)
        return self._found


class _Starting(Resource):
    isLeaf = True

    def render(self, request: Request) -> bytes:
        request.setHeader("Retry-After", "1")
        detail = "The daemon is starting; try again in a moment."
        return problem(request, 503, "starting", "Starting", detail)


class Daemon(MultiService):
    """Everything that runs; `twistd` starts and stops it.

    Nothing is opened before ``twistd`` has forked and given up its privileges, but for
    the ports.
    """

    def __init__(
        self, reactor: Any, settings: Settings, environ: Mapping[str, str]
    ) -> None:
        super().__init__()
        self._reactor = reactor
        self._settings = settings
        # twistd sets its own umask when it becomes a daemon; tasks get the one of now.
        self._umask = os.umask(0o022)
        os.umask(self._umask)
        environ = {"HOME": os.path.expanduser("~"), "PATH": os.defpath, **environ}
        self._commands = _commands(settings, environ)
        self._renewal: Renewal | None = None
        if settings.secure:
            self._renewal = Renewal(settings, reactor, time.time)
            self.addService(self._renewal)
        identity = None if self._renewal is None else self._renewal.identity
        self._shared_key = identity is not None and tls.is_development(identity)
        only_loopback = _only_loopback(settings, identity)
        self._files = process.raise_file_limit()
        most = max(16, self._files[1] - _RESERVE)
        bounds = Most(
            most, settings.max_connections_per_address, settings.max_requests_per_address
        )
        self.site = BoundedSite(_Starting(), reactor, bounds, settings.hsts)
        self.listeners = [
            listener.Listener(name, endpoint, self.site, only_loopback)
            for name, endpoint in listener.endpoints(settings, reactor, self._renewal)
        ]
        for service in self.listeners:
            self.addService(service)
        self.tasks: TaskService | None = None
        self._sockjs: SockJS | None = None
        self._access: Access | None = None
        self._records: Records | None = None
        self._github: GitHub | None = None
        self._pool: HTTPConnectionPool | None = None
        self._listings: Listings | None = None
        self._lookout: process.Lookout | None = None
        self._reaper: LoopingCall | None = None
        self._launcher: Launcher | None = None
        self._memory = Memory(reactor)

    def startService(self) -> None:
        """Open the state, take up the tasks, and then serve."""
        super().startService()
        state = Path(self._settings.state_dir)
        os.umask(0o077)
        self._lock = _lock(state)
        _narrow(path for name in OWN for path in state.glob(name))
        self._store = SQLiteStore(state / DATABASE, self._reactor.callFromThread)
        for service in self.listeners:
            _log.info(
                "pulsar-api {version} listens on {url}",
                version=__version__,
                url=service.url("http" if self._renewal is None else "https"),
            )
        if not self._settings.allow_sudo:
            processes.forbid_new_privileges()
        if not self._settings.run_as:
            # Its tasks can replace the shim, or change what one is told: with such a
            # capability they would become root.
            processes.keep_capabilities()
        if os.geteuid() == 0 and not self._settings.run_as:
            _log.warn(
                "TASKS RUN AS ROOT, as this daemon does: give it a user of its own, or its "
                "tasks one by [[run-as]] in the settings"
            )
        if self._settings.run_as and not self._settings.authenticated:
            _log.warn(
                "EVERY TASK CAN ASK THIS DAEMON FOR TASKS OF ALL ACCOUNTS, as nobody has "
                "to say who they are: [[run-as]] protects nothing without --auth-provider"
            )
        if self._shared_key:
            _log.warn("DEVELOPMENT CERTIFICATE: everybody has its key, it protects nothing")
        starting = Deferred.fromCoroutine(self._start(state))
        starting.addErrback(self._cannot_start)

    async def _start(self, state: Path) -> None:
        s = self._settings
        detect = s.command == command.DETECTED
        known = None if detect else self._commands
        tasks = state / TASKS
        tasks.mkdir(mode=0o700, exist_ok=True)
        # Of very many files it takes long; nobody waits for it, and nothing at the end.
        threading.Thread(target=_narrow, args=([tasks],), daemon=True).start()
        # What a killed shim leaves becomes a child of this process, and is found as such.
        processes.become_subreaper()
        own_children = reapProcessHandlers
        self._reaper = LoopingCall(_reap, processes.Reaper(own_children))
        self._reaper.clock = self._reactor
        self._reaper.start(REAP)
        # A task that runs as the daemon could replace what the state folder holds.
        programs = process.compiled(state) if s.run_as else process.Programs()
        if not s.run_as:
            process.remove_compiled(state)
        # Before the launcher starts: that inherits the cgroup of the daemon.
        root = cgroups.delegated()
        groups = None if root is None else Cgroups.enter(root, time.time())
        # Again: twistd may have changed the user since (--uid).
        _accounts(s, () if groups is None else groups.enabled())
        self._launcher = Launcher(self._reactor, programs.launcher, state)
        self._launcher.start()
        machine = LocalMachine(
            *(self._reactor, programs.shim, own_children, self._launcher, groups)
        )
        machine.sync(state)
        listings = self._listings = self._make_listings(state / LISTINGS, machine)
        await listings.start()
        pulsar = Pulsar(self._reactor, listings, self._commands, known)
        if detect:
            Deferred.fromCoroutine(pulsar.find_out()).addErrback(self._cannot_start)
        executor = self._executor(machine, tasks)
        clock = SteadyClock(time.time, uptime, machine.boot_id())
        bounds = Bounds(s.kill_grace, s.task_timeout, s.silence_timeout, s.max_output_size)
        most = s.max_output_size
        keep = Keep(s.keep_tasks, s.keep_days * 86400, s.max_state_size, most)
        limits = Limits(bounds, s.max_running, s.max_running_per_target, s.max_queued, keep)
        self.tasks = TaskService(
            self._store, executor, self._reactor, clock, pulsar.commands, limits
        )
        await self.tasks.start()
        running = self.tasks.running
        self._lookout = process.Lookout(machine, self._reactor, tasks, running)
        self._lookout.start()
        access = self._access = self._make_access(self.tasks, state, clock)
        rota = Rota(self._reactor)
        feed = Feed(self.tasks, tasks, self._reactor, rota)
        lists = Lists(self._reactor, rota)
        api = TaskAPI(access, tasks, self._reactor, s.poll_timeout, feed, lists)
        follow = FollowAPI(access, tasks, self._reactor, rota)
        jobs = JobAPI(access, tasks, feed, listings, lists)
        self._sockjs = SockJS(access, feed, self._reactor)
        sign_in = SignIn(access, self._reactor, self._github, s.confirm, s.secret_variables)
        self.site.resource = Root(
            api.app.resource(),
            follow.app.resource(),
            PartsAPI(access, LineIndexes(tasks, rota)).app.resource(),
            jobs.app.resource(),
            self._sockjs.resource(),
            Pages(access).app.resource(),
            sign_in.app.resource(),
            TargetAPI(access).app.resource(),
            access.origins,
        )
        self._memory.start()

    def _executor(self, machine: LocalMachine, folder: Path) -> ShimExecutor:
        return ShimExecutor(
            machine, self._reactor, folder, lambda: uuid4().hex, self._umask, self._files[0]
        )

    def _make_listings(self, folder: Path, machine: LocalMachine) -> Listings:
        # With a permit for each, which are kept beside their folders.
        folder = folder / TASKS
        executor = self._executor(machine, folder)
        return Listings(executor, machine, self._reactor, folder)

    def _names(self) -> frozenset[str]:
        """Return the names in the certificate of now."""
        found = self._renewal
        return frozenset() if found is None else found.identity.names()

    def _make_access(self, service: TaskService, state: Path, clock: SteadyClock) -> Access:
        s = self._settings
        log = audit.AuditLog(state / audit.FILE, time.time)
        names = {socket.gethostname().lower(), *(name.lower() for name in s.hosts)}
        origins = Origins(s.public_url, frozenset(names), frozenset(s.proxies), self._names)
        if not s.authenticated:
            return Access(service, log, origins, self._reactor)
        policy = Policy(s.rights)
        self._records = Records(state / records.FILE, self._reactor.callFromThread)
        providers: list[Provider] = [OwnTokens(self._records, time.time)]
        if s.auth_provider == "static":
            assert s.auth_username is not None
            assert s.auth_password is not None
            providers.append(Static(s.auth_username, s.auth_password))
        if s.auth_provider == "github":
            pool = HTTPConnectionPool(self._reactor, persistent=True)
            pool._factory.noisy = False  # noqa: SLF001 - two lines for each connection
            bound = partial(_note_login, log)
            self._github = github(s, policy, self._reactor, pool, self._records, bound)
            providers.append(self._github)
            self._pool = pool
        gate = Gate(providers, self._reactor)
        sessions = Sessions(self._records, clock.steady)
        return Access(service, log, origins, self._reactor, gate, sessions, policy)

    def _cannot_start(self, failure: Any) -> None:
        _log.failure("The daemon cannot start", failure)
        # It may not run yet. And who started it must see that it failed: twistd would
        # end with 0, so the last thing that is done is to end with 1.
        self._reactor.callWhenRunning(self._reactor.stop)
        atexit.register(os._exit, 1)

    async def _stop(self) -> None:
        self._memory.stop()
        if self.tasks is not None:
            await self.tasks.stop(self._settings.drain_timeout)
            self.tasks.release()
        for service in (self._listings, self._lookout, self._launcher):
            if service is not None:
                service.stop()
        if self._reaper is not None and self._reaper.running:
            self._reaper.stop()
        self._release()
        # What was answered has to leave before the connections are cut.
        until = self._reactor.seconds() + 1
        while self.site.serving and self._reactor.seconds() < until:
            await deferLater(self._reactor, 0.01)
        await self._within("the connections", MultiService.stopService(self))
        await self._within("the database", Deferred.fromCoroutine(self._store.close()))
        if self._records is not None:
            closing = Deferred.fromCoroutine(self._records.close())
            await self._within("the database of tokens", closing)
        if self._pool is not None:
            pool = self._pool.closeCachedConnections()
            await self._within("the connections to the provider", pool)
        os.close(self._lock)
        # What ends from now on is the next daemon's. The reactor now waits for its
        # threads, deaf to signals; a traced thread of CPython 3.11 spins for as long as
        # one is not taken.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        # A thread that waits for a dead disk must not keep it.
        threading.Thread(target=_end, name="end", daemon=True).start()
        # Nor is there anything left to read again; and SIG_DFL would end it by the signal.
        if signal.getsignal(signal.SIGHUP) == self.hang_up:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def _release(self) -> None:
        """Answer who waits."""
        if self._sockjs is not None:
            self._sockjs.release()
        if self._access is not None:
            self._access.release()

    async def _within(self, what: str, closing: Deferred[Any]) -> None:
        """Wait until something is closed, for `CLOSE` seconds at most."""

        def late(*_: object) -> None:
            _log.error("Closing {what} takes too long; it is left open", what=what)

        await closing.addTimeout(CLOSE, self._reactor, late)

    def hang_up(self, *_: object) -> None:
        """Read the certificate files again, as soon as the reactor has time.

        A handler for SIGHUP, which may come at any moment.
        """
        self._reactor.callFromThread(self._renew)

    def _renew(self) -> None:
        if self._renewal is None:
            _log.info("SIGHUP: there is no certificate that could be read again")
        else:
            self._renewal.renew()

    def stopService(self) -> Deferred[None]:
        """Take no new tasks, answer who waits, leave running commands running."""
        return Deferred.fromCoroutine(self._stop())


def _note_login(log: audit.AuditLog, account: Principal) -> None:
    caller = Caller(account, "the daemon", "github")
    log.write(caller, "login bind", allowed=True, login=account.name.casefold())


def github(
    s: Settings,
    policy: Policy,
    reactor: Any,
    pool: HTTPConnectionPool,
    logins: Records,
    bound: Callable[[Principal], object],
) -> GitHub:
    """Return the provider that the settings describe."""
    oauth = None
    if s.github_client_id is not None and s.github_client_secret is not None:
        oauth = OAuth(s.github_url, s.github_client_id, s.github_client_secret)
    own = None
    if s.auth_username is not None and s.auth_password is not None:
        own = s.auth_username, s.auth_password
    names = frozenset(name.casefold() for name in s.auth_members)
    return GitHub(
        # No cookies: one user's must not go with the next one's token.
        HTTPClient(
            Agent(reactor, connectTimeout=DEADLINE, pool=pool),
            cast("Any", CookieJar(DefaultCookiePolicy(allowed_domains=[]))),
        ),
        reactor,
        time.time,
        s.api_url,
        logins,
        bound,
        Members(s.auth_method or "user", names),
        policy.groups(),
        own,
        oauth,
    )


def _reap(reaper: processes.Reaper) -> None:
    with suppress(OSError):  # for want of descriptors; the next one has more luck
        reaper.reap()


def _end() -> None:
    time.sleep(LAST)
    os._exit(1)


def uptime() -> float:
    """Return the seconds since the machine booted, including suspend."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def steady(reactor: Any) -> None:
    """Let the reactor's clock be one that never jumps.

    Twisted measures by the time of day: a clock that is set back by an hour would hold
    every long-poll and every piece of news for an hour.
    """
    assert not reactor.getDelayedCalls()
    reactor.seconds = time.monotonic


def makeService(options: Options) -> Service:
    """Return the daemon for ``twistd``."""
    from twisted.internet import reactor

    steady(reactor)
    daemon = Daemon(reactor, options.settings, os.environ)
    # A function and not SIG_IGN, which the tasks would inherit.
    signal.signal(signal.SIGHUP, daemon.hang_up)
    return daemon
