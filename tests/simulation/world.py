"""A simulated world: one machine, its disk and its clocks, a daemon, tasks, clients.

Everything that happens follows from a `Plan`. `World.run` returns the violations.
"""

from collections.abc import Callable
from itertools import count
from random import Random
from typing import Any

from attrs import define
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from pulsar_api.tasks.service import MAX_ID
from tests.simulation import faults
from tests.simulation.clients import Client
from tests.simulation.daemon import Broken, Daemon, Exchange, State
from tests.simulation.disk import Disk
from tests.simulation.invariants import INVARIANTS, Invariant
from tests.simulation.plan import Plan
from tests.simulation.scheduler import Fiber, Scheduler
from tests.simulation.shims import Shim, Tree, behaviour
from tests.simulation.store import Database

EPOCH = 1_700_000_000.0
"""The time of the wall clock at the beginning of a world."""

PATIENCE = 3000.0
"""Simulated seconds in which everything must end once all faults are over."""

MOST_STEPS = 40_000
"""The most steps that this may take."""

SETTLE = 5.0
"""Simulated seconds until work that clients do not see is done as well."""

_LOOK = 25  # steps between two checks whether everything has ended


@define
class Violation:
    """An invariant that did not hold."""

    invariant: str
    text: str

    def __str__(self) -> str:
        return f"{self.invariant}: {self.text}"


class World:
    """One simulated world; see the module."""

    def __init__(self, plan: Plan, trace: list[str] | None = None) -> None:
        self.plan = plan
        rng = Random(plan.seed * 1_000_003 + plan.salt)
        self.rng = rng
        self.random = rng.random
        self.preempt = plan.preempt
        self.scheduler = Scheduler(rng, plan.drift)
        self.trace = trace
        self.violations: list[Violation] = []
        self.disk = Disk(lambda: int(self.wall() * 1e9))
        self.away = 0.0
        """Seconds for which the machine was suspended or off."""
        self.skew = 0.0
        """The error of the wall clock, in seconds."""
        self.boot_id = "boot 1"
        self.powered = True
        self.backup: Database | None = None
        """An older copy of the records."""
        self.crowded = False
        """Whether no process can be started."""
        self.choked = False
        """Whether no daemon can open a file."""
        self.mended = False
        self.calm_since = 0.0
        """The time at which all faults had ended."""
        self.steps = 0
        self.shims: list[Shim] = []
        self.trees: list[Tree] = []
        self.daemons: list[Daemon] = []
        self.clients: list[Client] = []
        self.seen: dict[int, int] = {}
        """The highest version of each task that a client has seen."""
        self._booted = 0.0
        self._boots = 1
        self._pids = count(300)
        self._names = count(1)
        self._states = count(1)
        self._buried: list[Fiber] = []
        self.invariants: list[Invariant] = [make(self) for make in INVARIANTS]
        self._handlers: dict[str, list[Callable[..., None]]] = {}
        for invariant in self.invariants:
            for name in invariant.listens():
                self._handlers.setdefault(name[3:], []).append(getattr(invariant, name))
        self.disk.make(self.disk.root, "state", is_folder=True)
        self.disk.sync_all()
        self.state = State("/state", Database(), [(MAX_ID, next(self._states))])
        self.states = [self.state]
        kinds = {fault.kind for fault in plan.faults}
        if "rolled_back" in kinds:
            self.scheduler.after(rng.choice((0.1, 1.0, 5.0)), self._back_up)

    # -- clocks, names, chance

    @property
    def now(self) -> float:
        """Seconds for which the machine was awake: `CLOCK_MONOTONIC`."""
        return self.scheduler.now

    def real(self) -> float:
        """Return the true seconds since the world began."""
        return self.scheduler.now + self.away

    def uptime(self) -> float:
        """Return the seconds since boot, including suspend: `CLOCK_BOOTTIME`."""
        return self.scheduler.now + self.away - self._booted

    def wall(self) -> float:
        """Return the seconds since 1970 by the wall clock of the machine."""
        return EPOCH + self.scheduler.now + self.away + self.skew

    def latency(self) -> float:
        """Return the seconds that a short operation takes."""
        chance = self.random()
        slow = 20.0 if chance > 0.98 else 1.0
        return chance * slow * self.plan.latency

    def new_pid(self) -> int:
        """Return a number for a process. A boot makes the numbers start again."""
        return next(self._pids)

    def new_name(self) -> str:
        """Return a new, unique name."""
        return f"name-{next(self._names)}"

    # -- what happens

    def log(self, text: str, *values: object, **named: object) -> None:
        """Note an event for the trace."""
        if self.trace is not None:
            line = text.format(*values, **named)
            self.trace.append(f"{self.steps:6} {self.now:12.6f}  {line}")

    def tell(self, name: str, *values: object) -> None:
        """Notify the invariants of an event."""
        for handler in self._handlers.get(name, ()):
            handler(*values)

    def violated(self, invariant: str, text: str) -> None:
        """Note a violation. The world ends after this step."""
        self.log("VIOLATION of {}: {}", invariant, text)
        self.violations.append(Violation(invariant, text))

    def failure(self, what: str, failure: Failure | None) -> None:
        """Handle a failure that the core or its reactor has logged."""
        fiber = self.scheduler.current
        if fiber is not None and getattr(fiber, "alive", False):
            trouble = "" if failure is None else failure.getTraceback()
            self.violated("nothing fails unhandled", f"{what}\n{trouble}")

    def recorded(self) -> None:
        """Note that records have changed."""
        self.tell("recorded")

    def begin(self, tree: Tree, arguments: list[str], environment: dict[str, str]) -> int:
        """Start the command of a task; return its process number."""
        _, app, env, action, number = arguments
        task = tree.state.name(int(number))
        pid = tree.begin(task, f"{app}/{env}", behaviour(action, self.rng))
        self.log("the command of task {} starts: {} as {}", task, action, pid)
        self.tell("begun", tree, environment)
        return pid

    def call(self, work: Callable[..., Any], patience: float) -> Deferred[Any]:
        """Send a request to the daemon, as a client does over the network."""
        exchange = Exchange(Deferred())
        self.scheduler.after(self.latency(), self._arrive, exchange, work, patience)
        return exchange.done

    def _arrive(
        self, exchange: Exchange, work: Callable[..., Any], patience: float
    ) -> None:
        daemon = self.daemon()
        if daemon is None or not daemon.serving:
            exchange.close(Failure(Broken()))
        else:
            daemon.ask(exchange, work)
            exchange.patience = self.scheduler.after(
                patience, self._give_up, daemon, exchange, patience
            )

    def _give_up(self, daemon: Daemon, exchange: Exchange, patience: float) -> None:
        if exchange.open:
            if self.now - self.calm_since > patience:
                self.tell("unanswered", patience)
            daemon.hang_up(exchange)
            exchange.close(Failure(Broken()))

    # -- daemons and the machine

    def daemon(self) -> Daemon | None:
        """Return the daemon that clients talk to, if it runs."""
        for daemon in self.daemons:
            if daemon.state is self.state:
                return daemon
        return None

    def start(self, state: State) -> None:
        """Start a daemon, as init does."""
        if self.powered and all(daemon.state is not state for daemon in self.daemons):
            self.log("a daemon starts for state {}", state.number)
            self.daemons.append(Daemon(self, state))
            self.tell("started", state)

    def kill(self, daemon: Daemon, pause: float | None = None) -> None:
        """Let a daemon die. The simulated init starts it again."""
        if daemon.alive:
            self.log("daemon {} dies", daemon.state.number)
            daemon.die()
            self.daemons.remove(daemon)
            if pause is None:
                pause = self.rng.choice((0.1, 0.1, 1.0, 20.0))
            if daemon.state is self.state:
                self.scheduler.after(pause, self.start, self.state)

    def bury(self, fiber: Fiber) -> None:
        """End a fiber of a process that has died, after this step."""
        self._buried.append(fiber)

    def copy_state(self, path: str, database: Database) -> State:
        """Return the state for a copied folder."""
        number = next(self._states)
        known = database.memory.last
        before = [(upto, of) for upto, of in self.state.lineage if upto < known]
        middle = (known, self.state.lineage[len(before)][1])
        state = State(path, database, [*before, middle, (MAX_ID, number)])
        self.states.append(state)
        return state

    def end_machine(self) -> None:
        """End all processes at once."""
        self.powered = False
        for daemon in list(self.daemons):
            daemon.die()
        self.daemons.clear()
        for tree in self.trees:
            tree.vanish()
        self.shims.clear()
        self.trees.clear()

    def boot(self, *, new: bool) -> None:
        """Start the machine again."""
        if new:
            self._boots += 1
            self.boot_id = f"boot {self._boots}"
            self._booted = self.real()
            self._pids = count(300)
        self.log("the machine runs: {}", self.boot_id)
        self.powered = True
        self.start(self.state)

    def _back_up(self) -> None:
        self.backup = self.state.database.copy()

    def _write_back(self) -> None:
        # The kernel writes unsynced data back after some time.
        if self.powered:
            self.disk.sync_all()
        self.scheduler.after(self.rng.uniform(5, 60), self._write_back)

    # -- all of it

    def run(self) -> list[Violation]:
        """Run the world to its end, and return the violations."""
        plan, scheduler = self.plan, self.scheduler
        self.start(self.state)
        self.scheduler.after(self.rng.uniform(5, 60), self._write_back)
        self.clients = [Client(self, number) for number in plan.clients]
        for client in self.clients:
            client.start()
        todo = list(reversed(plan.faults))
        while self.steps < plan.steps and not self.violations:
            while todo and todo[-1].step <= self.steps:
                fault = todo.pop()
                self.log("FAULT {}", fault.kind)
                faults.KINDS[fault.kind](self, Random(fault.seed))
            self._step()
            if not todo and self.steps % _LOOK == 0 and self.is_over():
                break
        if not self.violations:
            faults.mend(self)
            self._come_to_an_end()
        if not self.violations:
            self.tell("end")
        for tree in self.trees:
            tree.vanish()
        for daemon in self.daemons:
            daemon.die()
        self._dig()
        scheduler.current = None
        return self.violations

    def _step(self) -> None:
        self.steps += 1
        self.scheduler.step()
        if self._buried:
            self._dig()

    def _dig(self) -> None:
        while self._buried:
            self._buried.pop().unwind()

    def _come_to_an_end(self) -> None:
        until, most = self.now + PATIENCE, self.steps + MOST_STEPS
        over: float | None = None
        while not self.violations and self.now < until and self.steps < most:
            self._step()
            if self.steps % _LOOK == 0:
                # The last work is done after the last client has had its response.
                if not self.is_over():
                    over = None
                elif over is None:
                    over = self.now
                elif self.now > over + SETTLE:
                    return

    def is_over(self) -> bool:
        """Return whether every client is served and every task has ended."""
        daemon = self.daemon()
        rows = self.state.database.memory.rows.values()
        return (
            daemon is not None
            and daemon.serving
            and daemon.stopping is None
            and all(client.done for client in self.clients)
            and all(row.status.ended and not row.held for row in rows)
        )
