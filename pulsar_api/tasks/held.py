"""Targets that stay taken after their task has ended, since its processes still run."""

from collections.abc import Callable

from attrs import define
from twisted.logger import Logger

from pulsar_api.concurrency.background import run_in_background
from pulsar_api.principal import Principal
from pulsar_api.tasks.interfaces import Executor
from pulsar_api.tasks.live import LiveTask, Phase
from pulsar_api.tasks.model import listed
from pulsar_api.tasks.queue import Queue
from pulsar_api.tasks.recorder import Recorder

_log = Logger()


@define(eq=False)
class HeldTargets:
    """Gives each target back once the last process of its ended task has ended."""

    _queue: Queue
    _recorder: Recorder
    _executor: Executor
    _schedule: Callable[[], None]
    """Called when a target becomes free."""
    stopped: bool = False

    def watch(self, live: LiveTask) -> None:
        """Keep the target of an ended task taken until none of its processes runs."""
        self._queue.move(live, Phase.HOLDING)
        run_in_background(self._watch(live))

    async def _watch(self, live: LiveTask) -> None:
        while not self.stopped:
            before = live.newest.still_running
            try:
                left = await self._executor.living(before)
            except OSError as e:
                _log.error("Cannot check the processes of task {id}: {e}", id=live.id, e=e)
                left = before
            if not live.newest.held:
                return
            if {one.pid for one in left} != {one.pid for one in before}:
                live.has_left(left)
                await self._recorder.record(live)
            if not left:
                _log.info("No process of task {id} runs any more", id=live.id)
                self._give_back(live)
                return
            await self._recorder.pause(live)

    async def free(self, live: LiveTask, by: Principal) -> None:
        """Give the target of an ended task back although processes still run.

        Raises:
            ShuttingDown: The daemon ends before this is on record.
        """
        remains = listed(live.newest.still_running)
        note = f"{by} gave {live.target} back while these still ran: {remains}."
        live.gives_target_back(note)
        await self._recorder.record(live)
        _log.warn("Task {id}: {it}", id=live.id, it=note)
        self._give_back(live)

    def _give_back(self, live: LiveTask) -> None:
        self._queue.move(live, Phase.ENDED)
        self._schedule()
