"""The faults of a simulated world. Each function is one kind of fault."""

from collections.abc import Callable
from functools import partial
from random import Random
from typing import TYPE_CHECKING

from pulsar_api.tasks.model import Status
from pulsar_api.tasks.service import TaskService
from tests.fakes import person
from tests.simulation.disk import Inode
from tests.simulation.shims import Shim

if TYPE_CHECKING:
    from tests.simulation.world import World

HOUR = 3600.0
DAY = 24 * HOUR


def kill(world: "World", _: Random) -> None:
    """The daemon is killed."""
    daemon = world.daemon()
    if daemon is not None:
        world.kill(daemon)


def kill_soon(world: "World", rng: Random) -> None:
    """The daemon is killed during one of its next operations."""
    daemon = world.daemon()
    if daemon is not None:
        daemon.operations = rng.randrange(40)


def stop(world: "World", _: Random) -> None:
    """The daemon gets TERM."""
    daemon = world.daemon()
    if daemon is not None:
        daemon.stop()


def power(world: "World", rng: Random) -> None:
    """The power is cut."""
    if not world.powered:
        return
    world.end_machine()
    world.disk.lose_power(rng)
    off = rng.choice((5.0, 60.0, 2 * HOUR))
    world.away += off
    if rng.random() < 0.2:  # a clock without a battery
        world.skew = -world.wall() + rng.choice((0.0, world.wall() - DAY))
    world.scheduler.after(1.0, lambda: world.boot(new=True))


def detach(world: "World", rng: Random) -> None:
    """The disk disappears with unsynced data, and comes back while the machine runs."""
    if not world.powered:
        return
    world.end_machine()
    world.disk.lose_power(rng)
    world.scheduler.after(1.0, lambda: world.boot(new=False))


def shim_killed(world: "World", rng: Random) -> None:
    """A shim is killed."""
    shim = _some_shim(world, rng)
    if shim is not None:
        shim.die("SIGKILL")


def shim_stopped(world: "World", rng: Random) -> None:
    """A shim is stopped; perhaps it goes on later."""
    shim = _some_shim(world, rng)
    if shim is not None:
        shim.stop()
        if rng.random() < 0.5:
            world.scheduler.after(rng.uniform(0.1, 30), shim.resume)


def folder_removed(world: "World", rng: Random) -> None:
    """The folder of a task is removed, perhaps with a restart of the daemon."""
    tasks = _tasks(world)
    if tasks is not None and tasks.entries:
        name = rng.choice(list(tasks.entries))
        world.log("the folder of task {} is removed", name)
        world.disk.remove_all(tasks, name)
        _perhaps_restart(world, rng)


def lock_emptied(world: "World", rng: Random) -> None:
    """The lock of a task becomes empty."""
    tasks = _tasks(world)
    folders = [] if tasks is None else list((tasks.entries or {}).items())
    found = [(n, f) for n, f in folders if f.entries and "lock" in f.entries]
    if found:
        name, folder = rng.choice(found)
        world.log("the lock of task {} is emptied", name)
        assert folder.entries is not None
        lock = folder.entries["lock"]
        lock.content = b""
        _perhaps_restart(world, rng)


def copied(world: "World", _: Random) -> None:
    """A second daemon runs on a copy of the state."""
    name = f"copy{len(world.states)}"
    path = f"/{name}"
    if world.disk.full or world.disk.no_inodes or world.disk.sick:
        return
    world.disk.copy(world.disk.find("/state"), world.disk.root, name)
    state = world.copy_state(path, world.state.database.copy())
    world.start(state)


def moved(world: "World", rng: Random) -> None:
    """The state is replaced by a copy of it while no daemon runs."""
    disk, root = world.disk, world.disk.root
    if disk.full or disk.no_inodes or disk.sick:
        return
    daemon = world.daemon()
    if daemon is not None:
        world.kill(daemon, pause=rng.uniform(0.1, 5))
    name = f"old-{rng.getrandbits(32)}"
    disk.rename(root, "state", root, name)
    disk.copy(disk.find(f"/{name}"), root, "state")
    disk.sync(root)  # else a power cut could leave no state at all


def restored(world: "World", rng: Random) -> None:
    """The state is restored from a backup that has no outputs, while no daemon runs."""
    daemon = world.daemon()
    if daemon is not None:
        world.kill(daemon, pause=rng.uniform(0.1, 5))
    state = world.disk.find("/state")
    if state.entries and "tasks" in state.entries:
        if rng.random() < 0.5:
            world.disk.remove_all(state, "tasks")
        else:
            name = f"tasks.{rng.getrandbits(32)}"
            world.disk.rename(state, "tasks", state, name)


def clock(world: "World", rng: Random) -> None:
    """The wall clock jumps, for a while or for good."""
    jump = rng.choice((1, 1, 1, -1)) * rng.choice((HOUR, 25 * HOUR, 370 * DAY))
    world.skew += jump
    world.log("the wall clock jumps by {} s", jump)

    def back() -> None:
        world.skew -= jump

    if rng.random() < 0.7:
        world.scheduler.after(rng.uniform(1, 60), back)
    if rng.random() < 0.3:
        kill(world, rng)


def store(world: "World", rng: Random) -> None:
    """The database is away for a while."""
    database = world.state.database
    database.away = True
    world.calm_since = float("inf")

    def back() -> None:
        if not world.mended:
            database.away = False
            world.calm_since = world.now

    world.scheduler.after(rng.choice((0.5, 3.0, 40.0, 90.0)), back)
    if rng.random() < 0.5:
        # Kill the waiting tasks, and then stop the daemon.
        for row in database.memory.rows.values():
            if row.status is Status.CREATED:
                world.call(partial(_kill, row.id), 60.0).addErrback(lambda _: None)
        world.scheduler.after(rng.uniform(0.1, 3), stop, world, rng)


async def _kill(task_id: int, service: TaskService) -> None:
    await service.kill(task_id, person("an operator"))


def full(world: "World", rng: Random) -> None:
    """The disk is full for a while."""
    world.disk.full = True
    world.scheduler.after(rng.choice((0.5, 5.0, 40.0)), _emptied, world)


def inodes(world: "World", rng: Random) -> None:
    """No file can be made for a while."""
    world.disk.no_inodes = True
    world.scheduler.after(rng.choice((0.5, 5.0, 40.0)), _emptied, world)


def _emptied(world: "World") -> None:
    world.disk.full = world.disk.no_inodes = False


def asleep(world: "World", rng: Random) -> None:
    """The machine is suspended for hours."""
    world.away += rng.choice((HOUR, 8 * HOUR, 23 * HOUR))


def crowd(world: "World", rng: Random) -> None:
    """No process can be started for a while."""
    world.crowded = True

    def gone() -> None:
        world.crowded = False

    world.scheduler.after(rng.uniform(0.1, 5), gone)


def sick(world: "World", rng: Random) -> None:
    """For a while the disk cannot make anything durable, and reports errors."""
    world.disk.sick = True

    def healed() -> None:
        world.disk.sick = False

    world.scheduler.after(rng.choice((0.01, 1.0, 20.0)), healed)


def rolled_back(world: "World", rng: Random) -> None:
    """The database is replaced by an older copy of it, while no daemon runs."""
    if world.backup is None or rng.random() < 0.3:
        world.backup = world.state.database.copy()
    daemon = world.daemon()
    if daemon is not None:
        world.kill(daemon, pause=rng.uniform(0.1, 5))
    world.state.database.memory = world.backup.copy().memory


def choked(world: "World", rng: Random) -> None:
    """The daemon has no file descriptors for a while."""
    world.choked = True

    def gone() -> None:
        world.choked = False

    world.scheduler.after(rng.choice((0.01, 1.0, 10.0)), gone)


def mend(world: "World") -> None:
    """End all faults."""
    world.log("ALL IS MENDED")
    world.mended = True
    world.calm_since = world.now
    world.disk.full = world.disk.no_inodes = world.disk.sick = False
    world.crowded = world.choked = False
    for state in world.states:
        state.database.away = False
    for daemon in list(world.daemons):
        daemon.operations = None
        if daemon.state is not world.state:
            world.kill(daemon)
    for shim in list(world.shims):
        shim.resume()
    for tree in world.trees:
        for member in tree.living():
            member.immortal_until = 0.0


def _some_shim(world: "World", rng: Random) -> Shim | None:
    return rng.choice(world.shims) if world.shims else None


def _tasks(world: "World") -> Inode | None:
    try:
        return world.disk.find("/state/tasks")
    except OSError:
        return None


def _perhaps_restart(world: "World", rng: Random) -> None:
    if rng.random() < 0.7:
        daemon = world.daemon()
        if daemon is not None:
            world.scheduler.after(rng.uniform(0, 2), world.kill, daemon)


KINDS: dict[str, Callable[["World", Random], None]] = {
    made.__name__: made
    for made in (
        *(kill, kill_soon, stop, power, detach, shim_killed, shim_stopped),
        *(folder_removed, lock_emptied, copied, moved, restored, clock, store, full),
        *(inodes, asleep, crowd, choked, sick, rolled_back),
    )
}
