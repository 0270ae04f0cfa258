"""Acts in place of a shim that was stopped and so cannot act itself."""

from collections.abc import Callable
from pathlib import Path

from attrs import define, field
from twisted.internet.interfaces import IDelayedCall, IReactorTime

from pulsar_api.execution.machine import Machine
from pulsar_api.tasks.interfaces import Bounds
from pulsar_api.tasks.model import Cause

MARGIN = 5.0
"""Seconds that a shim is given beyond its own deadlines before the daemon acts."""

AGAIN = 1.0
"""Seconds between two signals to a shim that does not act."""


@define(eq=False)
class Watchdog:
    """Acts for a shim that a task or an operator has stopped (SIGSTOP).

    It repeats a kill that the shim was asked for, and continues the shim when one of its
    deadlines has passed. If the shim is still stopped `MARGIN` seconds after it should
    have ended the task, ``force`` is called.
    """

    _machine: Machine
    _clock: IReactorTime
    _folder: Path
    _bounds: Bounds
    _force: Callable[[Cause], None]
    _began: float = field(init=False)
    _printed: float = field(init=False)
    _killed: bool = field(default=False, init=False)
    _late: float | None = field(default=None, init=False)
    """The time from which a stopped shim is ended by force."""
    _cause: Cause = field(default=Cause.KILL, init=False)
    _call: IDelayedCall | None = field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        self._began = self._printed = self._clock.seconds()
        self._wait()

    def printed(self) -> None:
        """Restart the time without output: the task has printed something."""
        self._printed = self._clock.seconds()

    def kill(self) -> None:
        """Watch whether the shim ends the task, as it was just asked to do."""
        if not self._killed:
            self._killed = True
            self._cause = Cause.KILL
            self._late = self._clock.seconds() + self._bounds.grace + MARGIN
            self.stop()
            self._call = self._clock.callLater(AGAIN, self._look)

    def stop(self) -> None:
        """Stop watching."""
        if self._call is not None and self._call.active():
            self._call.cancel()

    def _due(self) -> tuple[float, Cause] | None:
        """Return when a deadline of the shim has surely passed, and which one."""
        bounds = self._bounds
        found = []
        if bounds.total:
            found.append((self._began + bounds.total + MARGIN, Cause.TIMEOUT))
        if bounds.silence:
            found.append((self._printed + bounds.silence + MARGIN, Cause.SILENCE))
        return min(found, default=None)

    def _wait(self) -> None:
        due = self._due()
        if due is not None:
            wait = max(0.0, due[0] - self._clock.seconds())
            self._call = self._clock.callLater(wait, self._look)

    def _look(self) -> None:
        now = self._clock.seconds()
        if self._late is None:
            due = self._due()
            if due is None or now < due[0]:  # it has printed since
                self._wait()
                return
            self._cause = due[1]
            self._late = now + self._bounds.grace + MARGIN
        stopped = self._machine.wake(self._folder)
        if self._killed:
            self._machine.terminate(self._folder)
        if stopped and now >= self._late:
            self._force(self._cause)
        else:
            self._call = self._clock.callLater(AGAIN, self._look)
