"""What all runs share: reporting to a sink, and ending what a lost shim has left."""

from pathlib import Path

from attrs import define, evolve, field
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from pulsar_api.concurrency.background import run_in_background
from pulsar_api.execution.machine import Machine
from pulsar_api.execution.results import read_exit
from pulsar_api.execution.watchdog import Watchdog
from pulsar_api.files import Damaged
from pulsar_api.output.records import LARGEST, Record
from pulsar_api.shim import shim
from pulsar_api.tasks.interfaces import Bounds, Sink
from pulsar_api.tasks.model import Cause, Exit

_log = Logger()

INTERVAL = 0.25
"""Seconds between two looks at the files of a run."""

PRINTED = frozenset({shim.STDOUT, shim.STDERR})
"""Codes of records of output."""


@define(eq=False)
class FollowedRun:
    """Reports what happens to a run to its sink, and its end exactly once."""

    _machine: Machine
    _clock: IReactorTime
    _folder: Path
    _bounds: Bounds
    _sink: Sink | None
    _cgroup: str = field(default="", kw_only=True)
    """The name of its cgroup, "" if that is not known."""
    _watchdog: Watchdog = field(init=False)
    _ending: bool = field(default=False, init=False)
    """Whether the daemon itself is killing the task, or what is left of it."""

    def watch(self) -> None:
        """Start the watchdog."""
        self._watchdog = Watchdog(
            self._machine, self._clock, self._folder, self._bounds, self._force
        )

    def end(self, exit: Exit) -> None:
        """Report the end in the next iteration of the reactor, never before."""
        self._clock.callLater(0, self._tell_end, exit)

    def result(self) -> Exit | None:
        """Return the result that is on disk, or None; see `read_exit`."""
        return read_exit(self._machine, self._folder)

    def lost(self, why: str, *, numbers: bool) -> None:
        """Kill what is left of a run whose result is lost, then report that.

        ``numbers``: whether process numbers in the folder's files are to be believed.

        Raises `OSError` if the folder of all runs is missing, as nothing is known then.
        """
        self._machine.identity(self._folder.parent)
        self._end_all(Exit(error=why, lost=True), numbers=numbers)

    def conclude(self, exit: Exit, *, numbers: bool) -> None:
        """Report a result; if it is damaged, first kill what may still run."""
        if exit.lost:
            self.lost(exit.error or "", numbers=numbers)
        else:
            self._tell_end(exit)

    def _force(self, cause: Cause) -> None:
        _log.error("The shim in {folder} is stopped; it is killed", folder=self._folder)
        self._end_all(Exit(cause=cause, forced=True), numbers=True)

    def _end_all(self, exit: Exit, *, numbers: bool) -> None:
        if self._ending:
            return
        self._ending = True
        self._watchdog.stop()
        run_in_background(self._end_by_force(exit, numbers))

    async def _end_by_force(self, exit: Exit, numbers: bool) -> None:  # noqa: FBT001
        while True:
            try:
                left = await self._machine.end(
                    self._folder, numbers=numbers, cgroup=self._cgroup
                )
                size, index = self._sizes()
                found = None if exit.lost else self.result()
            except OSError as e:
                self.cannot_read(e)
                wait: Deferred[None] = Deferred()
                self._clock.callLater(INTERVAL, wait.callback, None)
                await wait
            else:
                break
        # The shim may have written its result in the last moment.
        exit = evolve(exit, left=left, output_size=size, index_size=index)
        self._tell_end(found or exit)

    def _sizes(self) -> tuple[int, int]:
        output = self._machine.output(self._folder)
        try:
            return output.size(), output.index_size()
        except (NotADirectoryError, Damaged):
            return 0, 0

    def cannot_read(self, error: OSError) -> None:
        """Log why the end is not known yet: a lack of descriptors, or a failing disk."""
        _log.error("Cannot read {folder}: {e}", folder=self._folder, e=error)

    def detach(self) -> None:
        """Stop reporting."""
        self._sink = None
        self._watchdog.stop()

    def _tell_end(self, exit: Exit) -> None:
        sink, self._sink = self._sink, None
        self._watchdog.stop()
        if sink is not None:
            sink.ended(exit)

    def _read(self, record: Record) -> None:
        if self._sink is None or record.number > LARGEST:
            return
        if record.code in PRINTED:
            self._watchdog.printed()
            self._sink.printed(record.number)
        elif record.code == shim.STARTED:
            self._sink.started(record.number)
