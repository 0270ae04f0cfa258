"""Removes the records and outputs of ended tasks that retention does not keep."""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from attrs import define, field
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger

from pulsar_api.concurrency.background import run_in_background
from pulsar_api.errors import StoreUnavailable
from pulsar_api.tasks.clock import SteadyClock
from pulsar_api.tasks.interfaces import Executor, Keep, TaskStore

_log = Logger()

TIDY = 30.0
"""Seconds between two searches for tasks to remove."""

_STEP = 20  # tasks that are removed at a time, so that no other work has to wait long


@define(eq=False)
class Retention:
    """Removes old tasks in the background, from `start` to `stop`."""

    _store: TaskStore
    _executor: Executor
    _clock: IReactorTime
    _time: SteadyClock
    _keep: Keep
    taken_up: bool = field(default=False, init=False)
    """Whether all tasks of earlier daemons are taken up, or on record as lost."""
    _next: IDelayedCall | None = field(default=None, init=False)
    _stopped: bool = field(default=False, init=False)

    def start(self, kept: Sequence[int], unfinished: AbstractSet[int]) -> None:
        """Begin to remove old tasks. ``kept`` are the numbers of all folders.

        The secrets of ``unfinished`` tasks stay.
        """
        self._look()
        run_in_background(self._remove_left(kept, unfinished))

    def stop(self) -> None:
        """Start no further removal."""
        self._stopped = True
        if self._next is not None and self._next.active():
            self._next.cancel()

    def _look(self) -> None:
        self._next = self._clock.callLater(TIDY, self._look)
        run_in_background(self._tidy())

    async def keep_reading(self) -> bool:
        """Record a `Reading` of the clocks; return False if that fails.

        Before the tasks are taken up the last reading stays: the clock is not set yet, and
        by that reading the next daemon may see that this state is a copy.
        """
        if not self.taken_up:
            return False
        try:
            reading = self._time.reading(self._executor.place())
            await self._store.keep_reading(reading)
        except (OSError, StoreUnavailable) as e:
            _log.error("Cannot record the clocks: {e}", e=e)
            return False
        return True

    async def _tidy(self) -> None:
        if not await self.keep_reading():
            return
        while not self._stopped:
            try:
                steady = self._time.steady()
                old = await self._store.expired(self._keep, steady, _STEP)
                await self._store.forget(old)
            except StoreUnavailable as e:
                _log.error("Cannot remove old tasks: {e}", e=e)
                return
            # Records go first: one whose output is missing would be wrong.
            await self._executor.forget(old)
            if old:
                _log.info("Tasks {first} to {last} removed", first=old[0], last=old[-1])
            if len(old) < _STEP:
                return

    async def _remove_left(self, kept: Sequence[int], unfinished: AbstractSet[int]) -> None:
        """Finish the removals that an earlier daemon began or that a power cut undid.

        A folder without a record stays unless a removal is noted for it, because the
        database may be the wrong one.
        """
        ended = [number for number in kept if number not in unfinished]
        await self._executor.forget_all_secrets(ended)
        try:
            removed = await self._store.forgotten()
            left = sorted(removed & {*kept})
            if left:
                _log.info("Removing the remaining files of tasks {ids}", ids=left)
                await self._executor.forget(left)
            await self._store.cleared(sorted(removed - {*kept}))
        except StoreUnavailable as e:
            _log.error("Cannot look for remaining files of old tasks: {e}", e=e)
