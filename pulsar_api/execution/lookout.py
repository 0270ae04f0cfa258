"""Remembers the processes of tasks, so that they are found if their shim is killed."""

from collections.abc import Callable, Sequence
from pathlib import Path

from attrs import define, field
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger

from pulsar_api.concurrency.background import own
from pulsar_api.execution.machine import LocalMachine

_log = Logger()

LOOK = 2.0
"""Seconds between two looks at the processes of tasks, if that costs little."""


@define(eq=False)
class Lookout:
    """Remembers every few seconds which processes the tasks have, from start to stop.

    So they are found should their shim be killed, whatever they do to their environment.
    """

    _machine: LocalMachine
    _clock: IReactorTime
    _tasks: Path
    _running: Callable[[], Sequence[int]]
    """Returns the numbers of the tasks that run."""
    _next: IDelayedCall | None = field(default=None, init=False)
    _stopped: bool = field(default=False, init=False)

    def start(self) -> None:
        """Begin to look."""
        own(self._go_on())

    def stop(self) -> None:
        """Look no more."""
        self._stopped = True
        if self._next is not None and self._next.active():
            self._next.cancel()

    async def _go_on(self) -> None:
        took = 0.0
        running = self._running()
        if running:
            try:
                took = await self._machine.look(self._tasks, running)
            except OSError as e:
                _log.error("Cannot look at the processes of tasks: {e}", e=e)
        if not self._stopped:
            # Less than a hundredth of one core.
            wait = max(LOOK, 200 * took)
            self._next = self._clock.callLater(wait, lambda: own(self._go_on()))
