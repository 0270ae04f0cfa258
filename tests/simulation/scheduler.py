"""Time and order of a simulated world: who takes the next step is a matter of the seed."""

from collections.abc import Callable
from contextlib import suppress
from heapq import heappop, heappush
from math import inf
from random import Random

from greenlet import getcurrent, greenlet

SLOW = 0.3
"""Seconds that may pass at once while somebody has something to do."""


class Died(BaseException):
    """Raised in the middle of what a process does, when that process is killed."""


class Actor:
    """Takes one step at a time, for as long as it has something to do."""

    __slots__ = ("_queued",)

    def __init__(self) -> None:
        self._queued = False

    def step(self) -> None:
        """Do the next thing."""
        raise NotImplementedError


class Timer:
    """Something to do later."""

    __slots__ = ("args", "call")

    def __init__(self, call: Callable[..., object], args: tuple[object, ...]) -> None:
        self.call: Callable[..., object] | None = call
        self.args = args

    def cancel(self) -> None:
        """Do it no more."""
        self.call = None
        self.args = ()


class Scheduler:
    """Lets actors take their steps, one after the other, in an order of chance.

    ``drift`` is how likely it is that time goes on although somebody has something to do.
    """

    def __init__(self, rng: Random, drift: float) -> None:
        self.hub = getcurrent()
        self.random = rng.random
        self.now = 0.0
        """Seconds since the begin of the world in which some machine was awake."""
        self.current: Fiber | None = None
        self._drift = drift
        self._ready: list[Actor] = []
        self._heap: list[tuple[float, int, Timer]] = []
        self._count = 0

    def wake(self, actor: Actor) -> None:
        """Note that an actor has something to do."""
        if not actor._queued:
            actor._queued = True
            self._ready.append(actor)

    def after(self, delay: float, call: Callable[..., object], *args: object) -> Timer:
        """Call something when some time has passed."""
        timer = Timer(call, args)
        self._count += 1
        heappush(self._heap, (self.now + delay, self._count, timer))
        return timer

    def step(self) -> bool:
        """Let one of those who can take a step; return False if nobody ever will."""
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
        """Return when something is to be called that was not cancelled."""
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
    """A course of actions that others can come in between of, at each operation."""

    __slots__ = ("_greenlet", "scheduler")

    def __init__(self, scheduler: Scheduler) -> None:
        super().__init__()
        self.scheduler = scheduler
        # Always below the hub: who makes a fiber does not wait for it.
        self._greenlet = greenlet(self._guarded, parent=scheduler.hub)

    def run(self) -> None:
        """Do all of it."""
        raise NotImplementedError

    def _guarded(self) -> None:
        with suppress(Died):
            self.run()

    def step(self) -> None:
        """Go on to the next pause."""
        scheduler = self.scheduler
        scheduler.current = self
        self._greenlet.switch()
        scheduler.current = None

    def pause(self) -> None:
        """Let others come in between. Only from within."""
        self.scheduler.wake(self)
        self.scheduler.hub.switch()

    def rest(self) -> None:
        """Do nothing until somebody wakes this fiber. Only from within."""
        self.scheduler.hub.switch()

    def sleep(self, seconds: float) -> None:
        """Do nothing for a while. Only from within."""
        self.scheduler.after(seconds, self.scheduler.wake, self)
        self.scheduler.hub.switch()

    def unwind(self) -> None:
        """End it in the middle of what it does. Only from outside of any fiber."""
        if self._greenlet:  # it has begun and not ended
            self._greenlet.throw(Died)
