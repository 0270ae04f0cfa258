"""Response times of requests, without the time that a busy machine adds."""

import os
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from tests.integration.daemon import Daemon

T = TypeVar("T")


class Latency:
    """Measure the response times of requests.

    Time in which this thread or one of the daemon was runnable, but had no processor, says
    something about the machine only, so it is subtracted. A request counts at least the
    time for which the reactor worked meanwhile. The kernel tells both
    (``/proc/PID/schedstat``, see sched-stats in its documentation).
    """

    def __init__(self, daemon: Daemon) -> None:
        self._reactor = str(daemon.process.pid)
        self._threads = Path(f"/proc/{self._reactor}/task")
        self.times: list[float] = []

    def of(self, ask: Callable[[], T]) -> T:
        """Return the result of a request, and record how long it took."""
        (worked, waited), begin = self._so_far(), time.perf_counter()
        answer = ask()
        took, so_far = time.perf_counter() - begin, self._so_far()
        self.times.append(max(so_far[0] - worked, took - (so_far[1] - waited)))
        return answer

    def _so_far(self) -> tuple[float, float]:
        """Return the seconds that the reactor has run, and that all threads have waited."""
        worked = waited = 0
        paths = [self._threads / name / "schedstat" for name in os.listdir(self._threads)]
        for path in (*paths, Path("/proc/thread-self/schedstat")):
            with suppress(OSError):  # a thread that has ended
                ran, delay, _ = map(int, path.read_text().split())
                waited += delay
                if path.parent.name == self._reactor:
                    worked = ran
        return worked / 1e9, waited / 1e9

    @property
    def p99(self) -> float:
        """The time that 99 of 100 requests do not exceed, in seconds."""
        return statistics.quantiles(self.times, n=100)[98]

    def __str__(self) -> str:
        return (
            f"{len(self.times)} requests, p50 {statistics.median(self.times) * 1e3:.1f} "
            f"ms, p99 {self.p99 * 1e3:.1f} ms, max {max(self.times) * 1e3:.1f} ms"
        )
