"""Samples the processes of running tasks, to find them even if their shim is killed."""

from collections.abc import Callable, Sequence
from pathlib import Path

from attrs import define, field
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger

from pulsar_api.concurrency.background import run_in_background
from pulsar_api.execution.local_machine import LocalMachine

_log = Logger()

INTERVAL = 2.0
"""Seconds between two samples, if a sample costs little."""


@define(eq=False)
class ProcessSampler:
    """Remembers every few seconds which processes the tasks have, from start to stop.

    So the daemon finds the processes of a task whose shim was killed, even if they have
    changed their environment.
    """

    _machine: LocalMachine
    _clock: IReactorTime
    _tasks: Path
    _running: Callable[[], Sequence[int]]
    """Returns the numbers of the running tasks."""
    _next: IDelayedCall | None = field(default=None, init=False)
    _stopped: bool = field(default=False, init=False)

    def start(self) -> None:
        """Take the first sample, and more until `stop`."""
        run_in_background(self._sample())

    def stop(self) -> None:
        """Take no more samples."""
        self._stopped = True
        if self._next is not None and self._next.active():
            self._next.cancel()

    async def _sample(self) -> None:
        took = 0.0
        running = self._running()
        if running:
            try:
                took = await self._machine.sample_processes(self._tasks, running)
            except OSError as e:
                _log.error("Cannot look at the processes of tasks: {e}", e=e)
        if not self._stopped:
            # Less than a hundredth of one core.
            wait = max(INTERVAL, 200 * took)
            self._next = self._clock.callLater(
                wait, lambda: run_in_background(self._sample())
            )
