"""Takes up the tasks of earlier daemons when this one starts."""

from attrs import evolve, frozen
from twisted.logger import Logger

from pulsar_api.concurrency.background import run_in_background
from pulsar_api.concurrency.changes import Changes
from pulsar_api.tasks.clock import SteadyClock
from pulsar_api.tasks.interfaces import Executor, TaskStore
from pulsar_api.tasks.lifecycle import Lifecycle
from pulsar_api.tasks.live import Phase
from pulsar_api.tasks.model import Status, TaskQuery, TaskSnapshot
from pulsar_api.tasks.retention import Retention

_log = Logger()


@frozen
class Recovery:
    """Queues waiting tasks, adopts running ones, and marks those in doubt as `LOST`."""

    _store: TaskStore
    _executor: Executor
    _time: SteadyClock
    _lifecycle: Lifecycle
    _retention: Retention
    _created: Changes
    """Its version is the number of the newest task."""

    async def take_up(self) -> None:
        """Take up every task that has not ended, and start those that can start.

        Raises:
            StoreUnavailable: The records cannot be read or written.
        """
        last = await self._store.reading()
        newest_time = None if last is not None else await self._store.newest_time()
        self._time.resume(last, newest_time)
        now = self._time.reading(self._executor.place())
        newest = await self._store.select(TaskQuery(limit=1))
        highest = newest[0].id if newest else 0
        kept = await self._executor.kept()
        permitted = await self._executor.permitted()
        last_used = max((*kept, *permitted), default=0)
        given = await self._store.reserve(0)
        self._created.advance(highest)
        doubt = None
        if last is not None and last.elsewhere(now):
            doubt = "the state folder was copied, or its folder of tasks was replaced"
        elif given < last_used:
            doubt = "the database was older than the folders of the tasks"
        rebooted = last is not None and last.boot != now.boot
        found = await self._store.take_up()
        in_use = {one.secret_file for one in found if not one.status.ended}
        await self._executor.forget_other_secrets({n for n in in_use if n is not None})
        if found and doubt is not None:
            _log.error("Tasks that have not ended are lost: {why}", why=doubt)
        for snapshot in found:
            if snapshot.status.ended and rebooted:
                gone = evolve(snapshot, held=False, still_running=())
                await self._store.save(gone)
            elif snapshot.status is Status.CREATED and doubt is not None:
                await self._lose(snapshot, doubt)
            elif snapshot.status is Status.CREATED and snapshot.id in permitted - {*kept}:
                await self._lose(snapshot, "its folder was removed after a permit to start")
            else:
                self._take_up(snapshot)
        # A new database does not know the folders that are already there, and no new task
        # may get the folder of an old one. This call also removes the reason for the doubt,
        # so it must come after the lost tasks are on record.
        await self._store.reserve(last_used)
        self._retention.taken_up = True
        self._lifecycle.schedule()
        unfinished = {one.id for one in found if not one.status.ended}
        self._retention.start(kept, unfinished)
        unknown = [number for number in kept if number > highest]
        if unknown:
            _log.warn("Tasks {ids} have folders but no records; kept", ids=unknown)

    async def _lose(self, found: TaskSnapshot, doubt: str) -> None:
        """End a waiting task as lost, because another daemon may have started it."""
        live = self._lifecycle.live(found)
        self._lifecycle.queue.move(live, Phase.STARTING)
        reason = f"It was waiting, and {doubt}. Another daemon may have started it."
        await self._lifecycle.finish_without_run(live, Status.LOST, reason)

    def _take_up(self, found: TaskSnapshot) -> None:
        snapshot = evolve(found, pid=None)
        by = found.killed_by
        if by is None and not found.status.ended:
            by = self._executor.noted_kill(found.id)
            snapshot = evolve(snapshot, killed_by=by)
        live = self._lifecycle.live(snapshot)
        if found.status.ended:
            self._lifecycle.held.watch(live)
        elif found.status is Status.RUNNING:
            self._lifecycle.adopt(live)
        elif by is not None:
            self._lifecycle.queue.move(live, Phase.STARTING)
            run_in_background(self._lifecycle.end_killed(live))
        else:
            self._lifecycle.queue.move(live, Phase.WAITING)
