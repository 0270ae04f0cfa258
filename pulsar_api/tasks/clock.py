"""A clock for ages that a wrong wall clock cannot move."""

from collections.abc import Callable

from attrs import define, field

from pulsar_api.tasks.interfaces import Reading


@define(eq=False)
class SteadyClock:
    """Counts the seconds for which the machine ran.

    Within one boot it follows `CLOCK_BOOTTIME`, which nobody can set. Only the wall clock
    knows how long the machine was off, and the wall clock can be wrong at boot. This clock
    therefore does not count that time. It starts near the wall clock and falls behind it
    while the machine is off, so everything expires late rather than early.
    """

    _wall: Callable[[], float]
    _uptime: Callable[[], float]
    _boot: str
    _ahead: float = field(default=0.0, init=False)
    """The seconds that this clock adds to the uptime."""

    def resume(self, last: Reading | None, newest: float | None) -> None:
        """Continue from the last reading of an earlier daemon.

        Without such a reading, continue from the newest time in the records. If there are
        no records, or the wall clock is earlier, continue from the wall clock.
        """
        uptime, wall = self._uptime(), self._wall()
        if last is None:
            steady = wall if newest is None else min(wall, newest)
        elif last.boot == self._boot:
            steady = last.steady + max(0.0, uptime - last.uptime)
        else:
            steady = last.steady
        self._ahead = steady - uptime

    def wall(self) -> float:
        """Return the seconds since the epoch by the wall clock."""
        return self._wall()

    def steady(self) -> float:
        """Return the seconds by this clock."""
        return self._uptime() + self._ahead

    def reading(self, place: str) -> Reading:
        """Return the reading that the next daemon continues from."""
        uptime = self._uptime()
        return Reading(self._boot, uptime, self._wall(), uptime + self._ahead, place)
