"""One life of a daemon in a simulated world: the real core, built as in ``tap``."""

from collections import deque
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import define
from twisted.internet.defer import Deferred
from twisted.internet.error import AlreadyCalled, AlreadyCancelled
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.python.failure import Failure
from zope.interface import implementer

from pulsar_api.errors import PulsarError
from pulsar_api.execution.executor import ShimExecutor
from pulsar_api.tasks.clock import SteadyClock
from pulsar_api.tasks.commands import Commands
from pulsar_api.tasks.presets import parse_template
from pulsar_api.tasks.service import TaskService
from tests.simulation.machine import SimulatedMachine, Work
from tests.simulation.scheduler import Died, Fiber, Timer
from tests.simulation.store import Database, SimulatedStore

if TYPE_CHECKING:
    from tests.simulation.world import World

COMMANDS = Commands(parse_template("run {app} {env} {action} {id}"), {})

STOP = 30.0
"""Seconds after the drain by which a daemon must have stopped."""


async def _commands() -> Commands:
    return COMMANDS


@define(eq=False)
class State:
    """A state folder, its database, and the tasks that it shares with other states."""

    path: str
    database: Database
    lineage: list[tuple[int, int]]
    """For each state, the number up to which this one has its tasks."""

    def name(self, task_id: int) -> tuple[int, int]:
        """Return an identity of a task that is the same in all copies of the state."""
        for upto, number in self.lineage:
            if task_id <= upto:
                return number, task_id
        raise AssertionError

    @property
    def number(self) -> int:
        """The number of the state itself."""
        return self.lineage[-1][1]


@implementer(IDelayedCall)
class _Call:
    """A delayed call of a daemon's reactor."""

    def __init__(self, clock: "Clock", delay: float, work: Callable[[], object]) -> None:
        self._clock = clock
        self._work: Callable[[], object] | None = work
        self._done = False
        self._set(delay)

    def _set(self, delay: float) -> None:
        self._time = self._clock.seconds() + delay
        daemon = self._clock.daemon
        self._timer: Timer | None = None
        if delay <= 0:
            daemon.post(self._run)
        else:
            self._timer = daemon.scheduler.after(delay, daemon.post, self._run)

    def _run(self) -> None:
        work, self._work = self._work, None
        if work is not None:
            self._done = True
            work()

    def getTime(self) -> float:
        return self._time

    def cancel(self) -> None:
        if self._done:
            raise AlreadyCalled
        if self._work is None:
            raise AlreadyCancelled
        self._work = None
        if self._timer is not None:
            self._timer.cancel()

    def active(self) -> bool:
        return self._work is not None

    def delay(self, secondsLater: float) -> None:
        raise NotImplementedError

    def reset(self, secondsFromNow: float) -> None:
        raise NotImplementedError


@implementer(IReactorTime)
@define(eq=False)
class Clock:
    """The clock of a daemon's reactor."""

    daemon: "Daemon"

    def seconds(self) -> float:
        return self.daemon.world.now

    def callLater(
        self, delay: float, callable: Callable[..., Any], *args: object, **kw: object
    ) -> _Call:
        return _Call(self, delay, lambda: callable(*args, **kw))

    def getDelayedCalls(self) -> list[IDelayedCall]:
        raise NotImplementedError


@define(eq=False)
class Exchange:
    """A request of a client, and its response."""

    done: Deferred[Any]
    inner: Deferred[Any] | None = None
    patience: Timer | None = None
    open: bool = True

    def close(self, result: object) -> None:
        """Give the client a response or an error."""
        if self.open:
            self.open = False
            if self.patience is not None:
                self.patience.cancel()
            self.done.callback(result)


class Broken(Exception):
    """The daemon could not be reached, or died before it responded."""


class Daemon(Fiber):
    """A process with a reactor. It does one thing at a time; threads run beside it."""

    def __init__(self, world: "World", state: State) -> None:
        super().__init__(world.scheduler)
        self.world = world
        self.state = state
        self.alive = True
        self.serving = False
        self.stopping: float | None = None
        self.operations: int | None = None
        """The number of operations after which it is killed."""
        self.threads: dict[Work, None] = {}
        self.exchanges: dict[Exchange, None] = {}
        self._inbox: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._idle = True
        machine = SimulatedMachine(self)
        clock = Clock(self)
        self.store = SimulatedStore(state.database, self.post, self._later, world.recorded)
        tasks = Path(state.path, "tasks")
        executor = ShimExecutor(machine, clock, tasks, world.new_name)
        steady = SteadyClock(world.wall, world.uptime, world.boot_id)
        self.service = TaskService(
            self.store, executor, clock, steady, _commands, world.plan.limits
        )

        async def start() -> None:
            machine.make_folder(tasks)
            machine.sync(Path(state.path))
            await self.service.start()

        self.post(self._own, start, self._started, self._failed)

    # -- the reactor

    def post(self, call: Callable[..., object], *args: object) -> None:
        """Call something in the reactor's thread."""
        if self.alive:
            self._inbox.append((call, args))
            if self._idle:
                self.scheduler.wake(self)

    def _later(self, delay: float, call: Callable[..., object], *args: object) -> None:
        self.scheduler.after(delay + self.world.latency(), self._if_alive, call, args)

    def _if_alive(self, call: Callable[..., object], args: tuple[object, ...]) -> None:
        if self.alive:
            call(*args)

    def step(self) -> None:
        if self.alive:
            super().step()

    def run(self) -> None:
        """Handle calls, one after the other."""
        while True:
            self._idle = False
            while self._inbox:
                call, args = self._inbox.popleft()
                try:
                    call(*args)
                except Exception:  # noqa: BLE001 - the reactor would log it
                    self.world.failure("an exception reached the reactor", Failure())
                if not self.alive:
                    raise Died
                if self._inbox:
                    self.pause()
            self._idle = True
            self.rest()

    def operation(self) -> None:
        """Let other actors run, and die if this is the last operation."""
        if self.operations is not None:
            self.operations -= 1
            if self.operations < 0:
                self.world.log("daemon {} is killed in the middle", self.state.number)
                self.world.kill(self)
        if not self.alive:
            raise Died
        world = self.world
        if world.preempt and world.random() < world.preempt:
            fiber = world.scheduler.current
            if fiber is not None:
                fiber.pause()
                if not self.alive:
                    raise Died

    def _own(
        self,
        start: Callable[[], Coroutine[Deferred[Any], Any, None]],
        good: Callable[[object], object],
        bad: Callable[[Failure], object],
    ) -> None:
        Deferred.fromCoroutine(start()).addCallbacks(good, bad)

    # -- its life

    def _started(self, _: object) -> None:
        if self.alive:
            self.world.log("daemon {} serves", self.state.number)
            self.serving = True

    def _failed(self, failure: Failure) -> None:
        if self.alive:
            self.world.log("daemon {} cannot start: {}", self.state.number, failure.value)
            if not failure.check(PulsarError, OSError):
                self.world.failure("the daemon cannot start", failure)
            self.world.kill(self)

    def stop(self) -> None:
        """Take TERM."""
        if self.stopping is None:
            self.stopping = self.world.now
            self.world.log("daemon {} gets TERM", self.state.number)
            limit = self.world.plan.drain + STOP
            self.scheduler.after(limit, self._too_late)
            self.post(self._own, self._stop, self._stopped, self._stopped)

    async def _stop(self) -> None:
        await self.service.stop(self.world.plan.drain)
        self.service.release()
        # Responses leave; then the database is closed, or abandoned.
        clock = Clock(self)
        leave: Deferred[None] = Deferred()
        clock.callLater(0.01, leave.callback, None)
        await leave
        closing = Deferred.fromCoroutine(self.store.close())
        await closing.addTimeout(10, clock, lambda *_: None)

    def _stopped(self, result: object) -> None:
        if self.alive:
            if isinstance(result, Failure):
                self.world.failure("the daemon cannot stop", result)
            self.world.log("daemon {} has stopped", self.state.number)
            self.world.tell("stopped", self)
            self.world.kill(self)

    def _too_late(self) -> None:
        if self.alive:
            self.world.tell("stop_hangs", self)
            self.world.kill(self)

    def die(self) -> None:
        """Die, in the middle of any operation."""
        self.alive = self.serving = False
        self._inbox.clear()
        for thread in self.threads:
            self.world.bury(thread)
        self.threads.clear()
        self.world.bury(self)
        exchanges, self.exchanges = self.exchanges, {}
        for exchange in exchanges:
            self.scheduler.after(self.world.latency(), exchange.close, Failure(Broken()))

    # -- requests

    def ask(self, exchange: Exchange, work: Callable[[TaskService], Any]) -> None:
        """Handle the request of a client."""
        self.exchanges[exchange] = None
        self.post(self._answer, exchange, work)

    def _answer(self, exchange: Exchange, work: Callable[[TaskService], Any]) -> None:
        if exchange.open:
            exchange.inner = Deferred.fromCoroutine(work(self.service))
            exchange.inner.addBoth(self._answered, exchange)

    def _answered(self, result: object, exchange: Exchange) -> None:
        if self.alive and exchange in self.exchanges:
            del self.exchanges[exchange]
            self.scheduler.after(self.world.latency(), exchange.close, result)

    def hang_up(self, exchange: Exchange) -> None:
        """Note that the client no longer waits."""
        if exchange in self.exchanges:
            del self.exchanges[exchange]
            self.post(self._cancel, exchange)

    def _cancel(self, exchange: Exchange) -> None:
        if exchange.inner is not None:
            exchange.inner.addErrback(lambda _: None)
            exchange.inner.cancel()
