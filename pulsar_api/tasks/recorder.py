"""Records the changes of tasks, and tries again until that succeeds."""

from attrs import define, field
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from pulsar_api.concurrency.changes import Changes
from pulsar_api.errors import ShuttingDown, StoreUnavailable
from pulsar_api.tasks.interfaces import TaskStore
from pulsar_api.tasks.live import LiveTask

_log = Logger()

RETRY = 1.0
"""Seconds until the next try when the store or the disk is unavailable."""


@define(eq=False)
class Recorder:
    """Saves the newest revision of a task before callers learn of it."""

    _store: TaskStore
    _clock: IReactorTime
    changed: Changes = field(init=False)
    """Its version grows with each record."""
    closed: bool = field(default=False, init=False)
    """Whether unrecorded changes are now left to the next daemon."""
    _pauses: dict[Deferred[None], None] = field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        self.changed = Changes(self._clock)

    async def record(self, live: LiveTask) -> None:
        """Save the newest revision, then announce it.

        Raises:
            ShuttingDown: The daemon ends; the change is left to the next one.
        """
        snapshot = live.newest
        await self.save(live)
        if snapshot.revision > live.task.snapshot.revision:
            live.task.announce(snapshot)

    async def save(self, live: LiveTask) -> None:
        """Save the newest revision as `record` does, but announce nothing."""
        snapshot, trouble = live.newest, ""
        while not self.closed:
            try:
                await self._store.save(snapshot)
            except StoreUnavailable as e:
                if trouble != str(e):
                    trouble = str(e)
                    _log.error("Cannot record task {id}: {e}", id=snapshot.id, e=e)
                await self.pause()
            else:
                live.saved = max(live.saved, snapshot.revision)
                self.advance()
                break
        if self.closed:
            raise ShuttingDown

    def advance(self) -> None:
        """Wake the waiters that follow all tasks: there is a new record."""
        self.changed.advance(self.changed.version + 1)

    async def kill_on_record(self, live: LiveTask) -> None:
        """Wait until the request for a kill is on record.

        Raises:
            ShuttingDown: The daemon ends; the record is left to the next one.
        """
        while live.saved < live.kill_revision:
            if self.closed:
                raise ShuttingDown
            await self.changed.after(self.changed.version)

    def pause(self, live: LiveTask | None = None) -> Deferred[None]:
        """Return a Deferred that fires after `RETRY`, or at once when the daemon stops.

        The pause of a task also ends when somebody kills the task.
        """
        wait: Deferred[None] = Deferred()
        self._pauses[wait] = None
        call = self._clock.callLater(RETRY, wait.callback, None)
        if live is not None:
            live.pause = wait

        def done(_: object) -> None:
            del self._pauses[wait]
            if call.active():
                call.cancel()

        return wait.addCallback(done)

    def end_pauses(self) -> None:
        """End all pauses, so that each try is repeated at once."""
        for pause in list(self._pauses):
            pause.callback(None)
