"""The invariants that hold in every simulated world, whatever breaks.

Each class is one invariant, and its docstring is its name. `World.tell` calls its method
``on_SOMETHING`` when that happens, and ``on_end`` when the world has ended. To add an
invariant, write a class in this module.
"""

from typing import TYPE_CHECKING, ClassVar

from pulsar_api.tasks.model import KEY_LIFE, Status, TaskSnapshot
from tests.simulation.shims import Member, Tree

if TYPE_CHECKING:
    from tests.simulation.clients import Request
    from tests.simulation.daemon import Daemon, State
    from tests.simulation.world import World


SLACK = 35.0
"""Simulated seconds that count as soon, even if a daemon has to start first."""


class Invariant:
    """A statement that must always hold."""

    all: ClassVar[list[type["Invariant"]]] = []
    excuses: ClassVar[str] = ""
    """The kinds of faults under which no daemon could keep the invariant."""

    def __init_subclass__(cls) -> None:
        cls.all.append(cls)

    def __init__(self, world: "World") -> None:
        self.world = world
        self.prepare()

    def prepare(self) -> None:
        """Set up the memory of the invariant."""

    def listens(self) -> list[str]:
        """Return the names of the events that it follows in this world."""
        kinds = {fault.kind for fault in self.world.plan.faults}
        if not kinds.isdisjoint(self.excuses.split()):
            return []
        return [name for name in dir(type(self)) if name.startswith("on_")]

    def require(self, holds: object, text: str) -> None:
        """Note a violation unless the condition holds."""
        if not holds:
            self.world.violated((self.__doc__ or "").split("\n")[0].rstrip("."), text)

    def rows(self) -> dict[int, TaskSnapshot]:
        """Return the records of the daemon that clients talk to."""
        return self.world.state.database.memory.rows


class StartedOnce(Invariant):
    """No task is started twice."""

    def prepare(self) -> None:
        self.begun: set[tuple[int, int, str]] = set()

    def on_begun(self, tree: Tree, environment: dict[str, str]) -> None:
        assert tree.task is not None
        # Together with the request, because a restored database can reuse a number.
        task = *tree.task, environment["PULSAR_VAR_ref"]
        self.require(task not in self.begun, f"task {tree.task}")
        self.begun.add(task)


class OneTaskAKey(Invariant):
    """No key is used for two tasks within a day."""

    excuses = "rolled_back"

    def prepare(self) -> None:
        self.tasks: dict[str, int] = {}
        self.begun: dict[str, tuple[int, int]] = {}
        self.requests: dict[str, Request] = {}

    def on_wanted(self, request: "Request") -> None:
        self.requests[request.ref] = request

    def _counts(self, request: "Request") -> bool:
        assert request.first is not None
        return self.world.real() - request.first < KEY_LIFE

    def on_accepted(self, request: "Request", found: TaskSnapshot) -> None:
        if request.key is not None:
            known = self.tasks.setdefault(request.key, found.id)
            if self._counts(request):
                self.require(known == found.id, f"{request.key}: {known} and {found.id}")

    def on_begun(self, tree: Tree, environment: dict[str, str]) -> None:
        request = self.requests[environment["PULSAR_VAR_ref"]]
        if request.key is not None:
            assert tree.task is not None
            known = self.begun.setdefault(request.key, tree.task)
            if self._counts(request):
                self.require(known == tree.task, f"{request.key}: {known}, {tree.task}")


class TargetLimit(Invariant):
    """No target has more living tasks than its limit."""

    excuses = "rolled_back"

    def on_begun(self, tree: Tree, environment: dict[str, str]) -> None:
        limit = self.world.plan.limits.running_per_target
        assert tree.task is not None
        if limit and tree.task[0] == self.world.state.number:
            others = {
                other.task[1]
                for other in self.world.trees
                if other.task is not None
                and other.task[0] == tree.task[0]
                and other.task != tree.task
                and other.target == tree.target
                and self._takes_it(other, other.task[1])
            }
            text = f"task {tree.task[1]} starts beside {sorted(others)}"
            self.require(len(others) < limit, text)

    def _takes_it(self, tree: Tree, task_id: int) -> bool:
        living = {member.pid for member in tree.living()}
        row = self.rows().get(task_id)
        if not living or row is None:
            return False
        left_alone = row.status in {Status.FINISHED, Status.FAILED} and not row.held
        return not left_alone or not living <= {one.pid for one in row.still_running}


class RunningLimit(Invariant):
    """No more tasks run than the limit."""

    def on_begun(self, tree: Tree, environment: dict[str, str]) -> None:
        rows = self.rows().values()
        running = sum(row.status is Status.RUNNING for row in rows)
        limit = self.world.plan.limits.running
        self.require(running <= limit, f"{running}")


class EndsStand(Invariant):
    """An announced end never changes, and retention keeps the task as long as it must."""

    excuses = "rolled_back"

    def prepare(self) -> None:
        self.told: dict[int, tuple[Status, float]] = {}

    def on_told(self, found: TaskSnapshot, floor: int) -> None:
        if found.status.ended:
            before = self.told.setdefault(found.id, (found.status, self.world.real()))
            self.require(before[0] is found.status, f"task {found.id}: {before[0]}")
            self._check(found.id)

    def _check(self, task_id: int) -> None:
        status, since = self.told[task_id]
        row = self.rows().get(task_id)
        if row is None:
            seconds = self.world.plan.limits.keep.seconds
            age = self.world.real() - since
            self.require(seconds and age > seconds - 120, f"task {task_id} is gone")
        else:
            self.require(row.status is status, f"task {task_id}: {status}, {row.status}")

    def on_recorded(self) -> None:
        for task_id in self.told:
            self._check(task_id)

    def on_started(self, state: "State") -> None:
        self.on_recorded()


class AllEnd(Invariant):
    """Every accepted task ends, and every client is served."""

    def on_end(self) -> None:
        if not self.world.is_over():
            rows = [
                f"{row.id} {row.status} held={row.held} {row.waiting_for}"
                for row in self.rows().values()
                if row.held or not row.status.ended
            ]
            waiting = [client.number for client in self.world.clients if not client.done]
            self.require(False, f"tasks {rows}, clients {waiting}")


class VersionsGrow(Invariant):
    """No version of a task falls."""

    excuses = "rolled_back"

    def on_told(self, found: TaskSnapshot, floor: int) -> None:
        self.require(found.version >= floor, f"{found.id}: {found.version} < {floor}")


class NothingWaits(Invariant):
    """Nothing waits for ever."""

    def on_unanswered(self, seconds: float) -> None:
        self.require(False, f"no answer for {seconds} s")

    def on_stop_hangs(self, daemon: "Daemon") -> None:
        self.require(False, "a daemon does not stop")


class NoneLeft(Invariant):
    """After the announced end of a task only the processes that it lists still live."""

    excuses = "rolled_back"

    def on_told(self, found: TaskSnapshot, floor: int) -> None:
        if not found.status.ended:
            return
        listed = {one.pid for one in found.still_running}
        for tree in self.world.trees:
            if tree.task == (self.world.state.number, found.id):
                living = {member.pid for member in tree.living()}
                self.require(living <= listed, f"task {found.id}: {living}")
                shim = tree.shim
                lives = shim is not None and shim.alive and found.status is not Status.LOST
                self.require(not lives or found.status.ended, f"shim of {found.id}")


class KillsWork(Invariant):
    """A killed task ends, and does not begin if it had not begun."""

    # A later daemon cannot reach a shim whose lock file does not name its process.
    excuses = "rolled_back lock_emptied"

    def prepare(self) -> None:
        self.killed: dict[int, float] = {}
        self.over: set[int] = set()

    def on_kill_accepted(self, found: TaskSnapshot) -> None:
        if found.status.ended:
            self.over.add(found.id)
        else:
            self.killed.setdefault(found.id, self.world.now)

    def on_begun(self, tree: Tree, environment: dict[str, str]) -> None:
        assert tree.task is not None
        if tree.task[0] == self.world.state.number:
            holds = tree.task[1] not in self.over
            self.require(holds, f"task {tree.task[1]} begins")

    def on_process_ended(self, tree: Tree, main: Member) -> None:
        assert tree.task is not None
        since = self.killed.get(tree.task[1])
        if since is not None and self.world.mended and not main.behaviour.immortal:
            late = max(since, self.world.calm_since) + self.world.plan.limits.bounds.grace
            text = f"task {tree.task[1]} was killed at {since}"
            self.require(self.world.now < late + SLACK, text)


class ClocksWork(Invariant):
    """No task runs longer than its time-out."""

    def on_process_ended(self, tree: Tree, main: Member) -> None:
        bounds = self.world.plan.limits.bounds
        if bounds.total and self.world.mended and not main.behaviour.immortal:
            due = max(main.began + bounds.total, self.world.calm_since) + bounds.grace
            self.require(self.world.now < due + SLACK, f"task {tree.task}")


class EndsAreTold(Invariant):
    """The end of a command is on record soon."""

    def prepare(self) -> None:
        self.ended: dict[int, float] = {}

    def on_process_ended(self, tree: Tree, main: Member) -> None:
        assert tree.task is not None
        if tree.task[0] == self.world.state.number:
            self.ended[tree.task[1]] = self.world.now

    def on_recorded(self) -> None:
        if self.ended:
            rows = self.rows()
            for task_id, ended in list(self.ended.items()):
                row = rows.get(task_id)
                if row is None or row.status.ended:
                    del self.ended[task_id]
                    late = max(ended, self.world.calm_since) + SLACK
                    self.require(
                        not self.world.mended or self.world.now < late,
                        f"task {task_id} ended at {ended}",
                    )


class SecretsArrive(Invariant):
    """The secrets of an accepted task reach its command."""

    def on_begun(self, tree: Tree, environment: dict[str, str]) -> None:
        ref = environment["PULSAR_VAR_ref"]
        found = environment.get("PULSAR_VAR_password", f"secret {ref}")
        self.require(found == f"secret {ref}", f"task {tree.task} has {found}")


class AcceptedStart(Invariant):
    """An accepted task starts, unless it is killed or lost."""

    excuses = "shim_killed folder_removed lock_emptied moved restored rolled_back"

    def prepare(self) -> None:
        self.begun: set[int] = set()

    def on_begun(self, tree: Tree, environment: dict[str, str]) -> None:
        assert tree.task is not None
        self.begun.add(tree.task[1])

    def on_end(self) -> None:
        for row in self.rows().values():
            ended = row.status in {Status.FINISHED, Status.FAILED}
            holds = row.id in self.begun or not ended
            self.require(holds, f"task {row.id}: {row.status}, {row.reason}")


class LostForAReason(Invariant):
    """A task is lost only if a fault takes its files or its shim."""

    excuses = (
        "power detach shim_killed folder_removed lock_emptied moved restored rolled_back"
    )

    def on_end(self) -> None:
        for row in self.rows().values():
            # A task that was killed before it began may be lost, see
            # `Executor.prevent_start`.
            holds = row.status is not Status.LOST or row.killed_by is not None
            self.require(holds, f"task {row.id}: {row.reason}")


class RefusedNever(Invariant):
    """A refused task never starts."""

    excuses = "rolled_back"

    def prepare(self) -> None:
        self.requests: dict[str, Request] = {}

    def on_wanted(self, request: "Request") -> None:
        self.requests[request.ref] = request

    def on_end(self) -> None:
        for row in self.rows().values():
            request = self.requests[row.spec.variables["ref"]]
            holds = request.unsure or request.accepted is not None
            self.require(holds, f"task {row.id} was refused")


class SecretsGo(Invariant):
    """No secrets of ended tasks are left on disk."""

    def on_end(self) -> None:
        state = self.world.disk.find("/state").entries or {}
        kept = (state["secrets"].entries or {}) if "secrets" in state else {}
        self.require(not kept, f"{sorted(kept)}")
        folders = (state["tasks"].entries or {}) if "tasks" in state else {}
        for name, folder in folders.items():
            row = self.rows().get(int(name))
            if row is None or row.spec.secret_names:
                left = {"spec", "secrets", "spec.tmp"} & set(folder.entries or ())
                self.require(not left, f"task {name}: {sorted(left)}")


INVARIANTS = Invariant.all
