"""Returns memory to the kernel after heavy work."""

import ctypes
import gc
import os
from collections.abc import Callable
from contextlib import suppress

from attrs import define, field
from twisted.internet.interfaces import IDelayedCall, IReactorTime

EVERY = 5.0
"""Seconds between two looks at how much there is."""
GROWN = 4 << 20
"""Bytes, beyond what there was at the start, that are worth it."""


def resident() -> int:
    """Return how much memory of this process is in use, in bytes (proc(5), statm)."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def trim() -> None:
    """Give back what is free (malloc_trim(3))."""
    with suppress(AttributeError):  # it is glibc's
        ctypes.CDLL(None).malloc_trim(0)


@define(eq=False)
class Memory:
    """Gives back what is free, now and then, while there is more than at the start.

    What a crowd needed for a moment is free afterwards, but the C library keeps for the
    next one what lies between pieces that are in use.
    """

    _clock: IReactorTime
    _resident: Callable[[], int] = resident
    _trim: Callable[[], None] = trim
    _usual: int = field(default=0, init=False)
    _next: IDelayedCall | None = field(default=None, init=False)

    def start(self) -> None:
        """Begin: what there is now is there for good."""
        # The garbage collector needs not look at it again, and what is made and forgotten
        # later it finds sooner.
        gc.collect()
        gc.freeze()
        self._usual = self._resident()
        self._next = self._clock.callLater(EVERY, self._look)

    def stop(self) -> None:
        """Look no more."""
        if self._next is not None:
            self._next.cancel()
            self._next = None

    def _look(self) -> None:
        self._next = self._clock.callLater(EVERY, self._look)
        with suppress(OSError):  # no descriptor is free now
            if self._resident() > self._usual + GROWN:
                self._trim()
