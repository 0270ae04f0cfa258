"""Runs what lists the actions of an app: below a shim, as a task is, but on no record."""

from contextlib import suppress
from pathlib import Path

from attrs import define, field, frozen
from twisted.internet.defer import Deferred, DeferredLock
from twisted.internet.error import ProcessExitedAlready
from twisted.internet.interfaces import IReactorProcess, IReactorTime
from twisted.internet.protocol import ProcessProtocol
from twisted.logger import Logger
from twisted.python.failure import Failure

from pulsar_api import files
from pulsar_api.concurrency.background import run_in_background, shielded
from pulsar_api.errors import Busy, StoreUnavailable
from pulsar_api.execution import cgroups
from pulsar_api.execution.machine import Machine
from pulsar_api.output.reader import Output
from pulsar_api.tasks.interfaces import Bounds, Executor, Run
from pulsar_api.tasks.model import Account, Command, Exit

_log = Logger()

MOST_ANSWER = 256 * 1024
"""Bytes of what a command answers, see `capture_output`."""

MOST_OUTPUT = 256 * 1024
"""Bytes of what a listing prints that are looked at."""

MOST_LISTINGS = 8
"""Apps whose actions are listed at the same time."""

FRESH = 10.0
"""Seconds for which an answer is given again."""

BOUNDS = Bounds(grace=1.0, total=60.0, silence=0.0, max_output=2 * MOST_OUTPUT)

_Key = tuple[tuple[str, ...], str | None, Account | None]


@frozen
class _Answer:
    text: str
    until: float


@define(eq=False)
class _End:
    """Waits for the end of one run; a `Sink`."""

    exit: Deferred[Exit] = field(factory=Deferred)

    def started(self, pid: int) -> None:
        """Nobody asks."""

    def printed(self, size: int) -> None:
        """It is read at the end."""

    def ended(self, exit: Exit) -> None:
        """Say so."""
        self.exit.callback(exit)


@define(eq=False)
class Listings:
    """Asks commands, each in a folder that is removed afterwards.

    One app is asked once at a time, whoever wants to know, and so hanging commands of one
    app hold up no other. No process of a listing outlives it.
    """

    _executor: Executor
    """Of these folders alone."""
    _machine: Machine
    _clock: IReactorTime
    _folder: Path
    """Where the folder of the first one is ``1``."""
    _bounds: Bounds = BOUNDS
    _last: int = field(default=0, init=False)
    _locks: dict[str, DeferredLock] = field(factory=dict, init=False)
    _runs: dict[int, Run] = field(factory=dict, init=False)
    _answers: dict[_Key, _Answer] = field(factory=dict, init=False)
    _stopped: bool = field(default=False, init=False)

    async def start(self) -> None:
        """End and remove what an earlier daemon has left.

        Whatever is wrong with the folder, the daemon can do its work without.
        """
        try:
            self._make_folder()
            left = await self._executor.kept()
            self._last = max((*left, *await self._executor.permitted()), default=0)
        except (OSError, StoreUnavailable) as e:
            _log.error("Listings cannot be made for now: {e}", e=e)
            return
        for number in left:
            # After a boot, or in a copy, the numbers of its processes are others'.
            here = self._executor.is_here(number)
            cgroup = self._executor.cgroup(number) if here else ""
            run_in_background(self._remove(number, numbers=here, cgroup=cgroup))

    def stop(self) -> None:
        """End what runs; nobody is told."""
        self._stopped = True
        for run in self._runs.values():
            run.kill()

    async def capture_output(self, app: str, command: Command) -> str:
        """Return what a command prints, of much the begin; "" if it cannot be started.

        Raises `Busy` if too many apps are asked already, or `StoreUnavailable`.
        """
        lock = self._locks.get(app)
        if lock is None:
            if len(self._locks) >= MOST_LISTINGS:
                raise Busy(MOST_LISTINGS)
            lock = self._locks[app] = DeferredLock()
        await lock.acquire()
        # It goes on if who asked does not wait: the next one wants to know as well.
        return await shielded(self._capture(app, command, lock))

    async def _capture(self, app: str, command: Command, lock: DeferredLock) -> str:
        try:
            key = command.arguments, command.directory, command.account
            now = self._clock.seconds()
            known = {k: a for k, a in self._answers.items() if a.until > now}
            self._answers = known
            if key not in known:
                text, good = await self._run(command)
                if not good:
                    return text
                known[key] = _Answer(text, self._clock.seconds() + FRESH)
            return known[key].text
        finally:
            if not lock.waiting:
                del self._locks[app]
            lock.release()

    def _make_folder(self) -> None:
        # Beside it are the permits.
        for folder in (self._folder.parent, self._folder):
            files.make_folder(folder)

    async def _run(self, command: Command) -> tuple[str, bool]:
        try:
            self._make_folder()
        except OSError as e:
            raise StoreUnavailable(str(e)) from None
        self._executor.check()
        self._last += 1
        number, end = self._last, _End()
        permit = await self._executor.permit(number)
        try:
            self._runs[number] = self._executor.start(
                number, command, self._bounds, end, permit
            )
            if self._stopped:
                self._runs[number].kill()
            exit = await end.exit
            if exit.code != 0:
                why = exit.error or f"exit code {exit.code}, signal {exit.signal}"
                _log.warn("Listing by {it}: {why}", it=command.arguments, why=why)
            output = Output(self._folder / str(number))
            data = output.read(0, min(output.size(), MOST_OUTPUT))
            return data.decode("utf-8", "replace"), exit.code == 0
        except OSError as e:
            raise StoreUnavailable(str(e)) from None
        finally:
            del self._runs[number]
            cgroup = cgroups.name(number, permit)
            run_in_background(self._remove(number, numbers=True, cgroup=cgroup))

    async def _remove(self, number: int, *, numbers: bool, cgroup: str = "") -> None:
        """End all that is left of a run, and remove its folder."""
        folder = self._folder / str(number)
        remains = await self._machine.end(folder, numbers=numbers, cgroup=cgroup)
        if remains:
            _log.warn("Of a listing these still run: {it}", it=[p.pid for p in remains])
        await self._executor.forget([number])


class _Answer(ProcessProtocol):
    def __init__(self, done: Deferred[str]) -> None:
        self.done = done
        self.text = b""

    def outReceived(self, data: bytes) -> None:
        self.text = (self.text + data)[:MOST_ANSWER]

    def processEnded(self, reason: Failure) -> None:
        if not self.done.called:  # the caller may have stopped waiting
            self.done.callback(self.text.decode("utf-8", "replace"))


async def capture_output(
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
