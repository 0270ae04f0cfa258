"""The time and the order of a simulated world. The seed decides which actor is next."""

from collections.abc import Callable
from contextlib import suppress
from heapq import heappop, heappush
from math import inf
from random import Random

from greenlet import getcurrent, greenlet

SLOW = 0.3
"""The most seconds that pass at once while an actor has something to do."""


class Died(BaseException):
    """Raised inside a process when it is killed."""


class Actor:
    """Takes one step at a time while it has something to do."""

    __slots__ = ("_queued",)

    def __init__(self) -> None:
        self._queued = False

    def step(self) -> None:
        """Take the next step."""
        raise NotImplementedError


class Timer:
    """A call at a later time."""

    __slots__ = ("args", "call")

    def __init__(self, call: Callable[..., object], args: tuple[object, ...]) -> None:
        self.call: Callable[..., object] | None = call
        self.args = args

    def cancel(self) -> None:
        """Cancel the call."""
        self.call = None
        self.args = ()


class Scheduler:
    """Lets actors take their steps one at a time, in random order.

    ``drift`` is the probability that time passes although an actor has something to do.
    """

    def __init__(self, rng: Random, drift: float) -> None:
        self.hub = getcurrent()
        self.random = rng.random
        self.now = 0.0
        """Seconds since the beginning of the world for which the machine was awake."""
        self.current: Fiber | None = None
        self._drift = drift
        self._ready: list[Actor] = []
        self._heap: list[tuple[float, int, Timer]] = []
        self._count = 0

    def wake(self, actor: Actor) -> None:
        """Mark an actor as having something to do."""
        if not actor._queued:
            actor._queued = True
            self._ready.append(actor)

    def after(self, delay: float, call: Callable[..., object], *args: object) -> Timer:
        """Call a function after some time."""
        timer = Timer(call, args)
        self._count += 1
        heappush(self._heap, (self.now + delay, self._count, timer))
        return timer

    def step(self) -> bool:
        """Let one actor take a step. Return False if no actor ever will again."""
        ready = self._ready
        number = len(ready)
        if number == 0:
            return self._pass_time()
        if self._drift and self.random() < self._drift and self._next() < self.now + SLOW:
            return self._pass_time()
        at = int(self.random() * number) if number > 1 else 0
        actor = ready[at]
        last = ready.pop()
        if last is not actor:
            ready[at] = last
        actor._queued = False
        actor.step()
        return True

    def _next(self) -> float:
        """Return the time of the next call that has not been cancelled."""
        heap = self._heap
        while heap and heap[0][2].call is None:
            heappop(heap)
        return heap[0][0] if heap else inf

    def _pass_time(self) -> bool:
        heap = self._heap
        while heap:
            time, _, timer = heappop(heap)
            if timer.call is not None:
                self.now = max(self.now, time)
                timer.call(*timer.args)
                return True
        return False


class Fiber(Actor):
    """A sequence of operations, between which other actors can run."""

    __slots__ = ("_greenlet", "scheduler")

    def __init__(self, scheduler: Scheduler) -> None:
        super().__init__()
        self.scheduler = scheduler
        # Always a child of the hub, because the maker of a fiber does not wait for it.
        self._greenlet = greenlet(self._guarded, parent=scheduler.hub)

    def run(self) -> None:
        """Do the whole sequence."""
        raise NotImplementedError

    def _guarded(self) -> None:
        with suppress(Died):
            self.run()

    def step(self) -> None:
        """Run until the next pause."""
        scheduler = self.scheduler
        scheduler.current = self
        self._greenlet.switch()
        scheduler.current = None

    def pause(self) -> None:
        """Let other actors run. Call this only from within the fiber."""
        self.scheduler.wake(self)
        self.scheduler.hub.switch()

    def rest(self) -> None:
        """Wait until another actor wakes this fiber. Call this only from within it."""
        self.scheduler.hub.switch()

    def sleep(self, seconds: float) -> None:
        """Wait for some seconds. Call this only from within the fiber."""
        self.scheduler.after(seconds, self.scheduler.wake, self)
        self.scheduler.hub.switch()

    def unwind(self) -> None:
        """End the fiber at its present operation. Call this only outside all fibers."""
        if self._greenlet:  # it has begun and has not ended
            self._greenlet.throw(Died)
