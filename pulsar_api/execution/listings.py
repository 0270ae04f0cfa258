"""Runs the commands that list the actions of apps, below a shim but without a record."""

from pathlib import Path

from attrs import define, field, frozen
from twisted.internet.defer import Deferred, DeferredLock
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from pulsar_api import files
from pulsar_api.concurrency.background import run_in_background, shielded
from pulsar_api.errors import Busy, StoreUnavailable
from pulsar_api.execution import cgroups
from pulsar_api.execution.machine import Machine
from pulsar_api.output.files import folder_of, output_of
from pulsar_api.tasks.interfaces import Bounds, Executor, Run
from pulsar_api.tasks.model import Account, Command, Exit

_log = Logger()

MOST_OUTPUT = 256 * 1024
"""Bytes of the output of a listing that are returned at most."""

MOST_LISTINGS = 8
"""Apps whose actions can be listed at the same time."""

FRESH = 10.0
"""Seconds for which the output of a listing is cached."""

BOUNDS = Bounds(grace=1.0, total=60.0, silence=0.0, max_output=2 * MOST_OUTPUT)

_Key = tuple[tuple[str, ...], str | None, Account | None]


@frozen
class _Answer:
    text: str
    until: float


@define(eq=False)
class _End:
    """A `Sink` that waits for the end of one run."""

    exit: Deferred[Exit] = field(factory=Deferred)

    def started(self, pid: int) -> None:
        """Ignore it."""

    def printed(self, size: int) -> None:
        """Ignore it: the output is read at the end."""

    def ended(self, exit: Exit) -> None:
        """Fire `exit`."""
        self.exit.callback(exit)


@define(eq=False)
class Listings:
    """Runs listings, each in a folder of its own that is removed afterwards.

    Callers that ask for one app share a listing, so there is never more than one for each
    app, and a command that hangs delays no other app. No process outlives its listing.
    """

    _executor: Executor
    """An executor for the folders of listings only."""
    _machine: Machine
    _clock: IReactorTime
    _folder: Path
    """The parent of these folders; their names are numbers."""
    _bounds: Bounds = BOUNDS
    _last: int = field(default=0, init=False)
    _locks: dict[str, DeferredLock] = field(factory=dict, init=False)
    _runs: dict[int, Run] = field(factory=dict, init=False)
    _answers: dict[_Key, _Answer] = field(factory=dict, init=False)
    _stopped: bool = field(default=False, init=False)

    async def start(self) -> None:
        """End the processes and remove the folders that an earlier daemon has left.

        An error is only logged: the daemon can do its work without listings.
        """
        try:
            self._make_folder()
            left = await self._executor.kept()
            self._last = max((*left, *await self._executor.permitted()), default=0)
        except (OSError, StoreUnavailable) as e:
            _log.error("Listings cannot be made for now: {e}", e=e)
            return
        for number in left:
            # After a boot, or in a copy, these process numbers belong to other processes.
            here = self._executor.is_here(number)
            cgroup = self._executor.cgroup(number) if here else ""
            run_in_background(self._remove(number, numbers=here, cgroup=cgroup))

    def stop(self) -> None:
        """Kill all listings that run."""
        self._stopped = True
        for run in self._runs.values():
            run.kill()

    async def capture_output(self, app: str, command: Command) -> str:
        """Return the first `MOST_OUTPUT` bytes of what a command prints, as text.

        Return "" if the command cannot be started.

        Raises `Busy` if `MOST_LISTINGS` apps are listed already, and `StoreUnavailable` if
        its output cannot be kept.
        """
        lock = self._locks.get(app)
        if lock is None:
            if len(self._locks) >= MOST_LISTINGS:
                raise Busy(MOST_LISTINGS)
            lock = self._locks[app] = DeferredLock()
        await lock.acquire()
        # It goes on if this caller hangs up: the next one may wait for the same output.
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
        # The permits are beside it, so its parent is needed as well.
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
            output = output_of(self._folder, number)
            data = output.read(0, min(output.size(), MOST_OUTPUT))
            return data.decode("utf-8", "replace"), exit.code == 0
        except OSError as e:
            raise StoreUnavailable(str(e)) from None
        finally:
            del self._runs[number]
            cgroup = cgroups.name(number, permit)
            run_in_background(self._remove(number, numbers=True, cgroup=cgroup))

    async def _remove(self, number: int, *, numbers: bool, cgroup: str = "") -> None:
        """Kill what is left of a run, and remove its folder."""
        folder = folder_of(self._folder, number)
        remains = await self._machine.end(folder, numbers=numbers, cgroup=cgroup)
        if remains:
            _log.warn(
                "These processes of a listing still run: {it}", it=[p.pid for p in remains]
            )
        await self._executor.forget([number])
