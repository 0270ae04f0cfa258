"""Processes of tasks, and a model of the shim: each of its system calls is a step."""

import errno
from random import Random
from typing import TYPE_CHECKING

from attrs import define

from pulsar_api.shim import shim
from pulsar_api.shim.shim import RECORD, Spec
from tests.simulation.disk import Inode
from tests.simulation.scheduler import Died, Fiber, Timer

if TYPE_CHECKING:
    from tests.simulation.daemon import State
    from tests.simulation.machine import Pipe
    from tests.simulation.world import World


@define
class Behaviour:
    """The behaviour of a command, which follows from the name of its action."""

    lasts: float
    code: int = 0
    prints: int = 0
    deaf: bool = False
    """Whether the command ignores TERM."""
    immortal: float = 0.0
    """Seconds for which it survives KILL, because it hangs in the kernel or is root's."""
    leaves: float = 0.0
    """Seconds for which a child of the command outlives it."""
    left_holds: bool = False
    """Whether that child holds the output open."""
    holds: bool = False
    """Whether this is the behaviour of such a child."""
    stops: bool = False
    """Whether the command sends STOP to its shim."""


ACTIONS = "ok ok fail long deaf immortal leave hold stop stop quick quick endless".split()


def behaviour(action: str, rng: Random) -> Behaviour:
    """Return the behaviour of one run of an action."""
    lasts = rng.choice((0.0, 0.01, 0.1, 0.5, 2.0, 5.0))
    made = Behaviour(lasts, prints=rng.choice((0, 0, 1, 3)))
    match action:
        case "fail":
            made.code = 3
        case "long":
            made.lasts = rng.uniform(5, 40)
        case "deaf":
            made.deaf, made.lasts = True, rng.uniform(1, 30)
        case "immortal":
            made.deaf, made.lasts, made.immortal = True, rng.uniform(1, 30), 40.0
        case "leave":
            made.leaves = rng.uniform(0.5, 20)
        case "hold":
            made.leaves, made.left_holds = rng.uniform(0.5, 20), True
        case "stop":
            made.stops, made.lasts = True, rng.uniform(1, 20)
        case "endless":
            made.lasts, made.deaf = rng.uniform(100, 400), rng.random() < 0.5
        case "quick":
            made.lasts, made.prints = 0.0, 0
    return made


class Member:
    """A process of a task other than its shim."""

    __slots__ = (
        *(
            "_timer",
            "alive",
            "began",
            "behaviour",
            "immortal_until",
            "pid",
            "start",
            "tree",
        ),
    )

    def __init__(self, tree: "Tree", behaviour: Behaviour, lasts: float) -> None:
        world = tree.world
        self.tree = tree
        self.behaviour = behaviour
        self.pid = world.new_pid()
        self.start = int(world.uptime() * 100)
        self.alive = True
        self.began = world.now
        self.immortal_until = world.now + behaviour.immortal
        self._timer: Timer = world.scheduler.after(lasts, self.end, behaviour.code)

    def signal(self, number: int) -> None:
        """Take TERM (15) or KILL (9)."""
        if number == 15 and not self.behaviour.deaf:
            self.end(-15)
        elif number == 9:
            left = self.immortal_until - self.tree.world.now
            if left <= 0:
                self.end(-9)
            else:
                self._timer.cancel()
                self._timer = self.tree.world.scheduler.after(left, self.end, -9)

    def end(self, status: int) -> None:
        """End, and notify the shim."""
        if self.alive:
            self.alive = False
            self._timer.cancel()
            self.tree.ended(self, status)

    def vanish(self) -> None:
        """End with the machine."""
        self.alive = False
        self._timer.cancel()


class Tree:
    """All processes of one run of a task. The files in its folder name their numbers."""

    def __init__(self, world: "World", state: "State", path: str) -> None:
        self.world = world
        self.state = state
        self.path = path
        """The environment by which the kernel identifies them: the first folder's path."""
        self.shim: Shim | None = None
        self.members: list[Member] = []
        self.task: tuple[int, int] | None = None
        """The state and the number of the task, once the command runs."""
        self.target = ""
        world.trees.append(self)

    def living(self) -> list[Member]:
        """Return the running processes, without the shim."""
        return [member for member in self.members if member.alive]

    def begin(self, task: tuple[int, int], target: str, made: Behaviour) -> int:
        """Start the command."""
        self.task, self.target = task, target
        main = Member(self, made, made.lasts)
        self.members.append(main)
        if made.stops:
            self.world.scheduler.after(made.lasts / 2, self._stop_shim)
        for number in range(made.prints):
            after = made.lasts * (number + 1) / (made.prints + 1)
            self.world.scheduler.after(after, self._print, main)
        return main.pid

    def _stop_shim(self) -> None:
        if self.shim is not None and self.shim.alive and self.members[0].alive:
            self.shim.stop()

    def _print(self, main: Member) -> None:
        if main.alive and self.shim is not None:
            self.shim.arrived += 7
            self.shim.notice()

    def ended(self, member: Member, status: int) -> None:
        """Note the end of one of the processes."""
        if member is self.members[0]:
            made = member.behaviour
            if made.leaves and status >= 0:
                left = Behaviour(made.leaves, holds=made.left_holds)
                self.members.append(Member(self, left, made.leaves))
            if self.shim is not None:
                self.shim.status = status
            self.world.tell("process_ended", self, member)
        if self.shim is not None:
            self.shim.notice()

    def kill(self) -> None:
        """Kill every process that can be killed, and the shim."""
        if self.shim is not None and self.shim.alive:
            self.shim.die("SIGKILL")
        for member in self.living():
            member.signal(9)

    def vanish(self) -> None:
        """End with the machine."""
        if self.shim is not None:
            self.shim.vanish()
        for member in self.members:
            member.vanish()


class Shim(Fiber):
    """A shim, from its spawn on."""

    syncs = True
    """Whether the shim syncs its lock before its task begins."""

    def __init__(self, world: "World", state: "State", path: str, pipe: "Pipe") -> None:
        super().__init__(world.scheduler)
        self.world = world
        self.tree = Tree(world, state, path)
        self.tree.shim = self
        self.pid = world.new_pid()
        self.pipe = pipe
        self.alive = True
        self.stopped = False
        self.listens = True
        """Whether the shim handles TERM as a request."""
        self.told = False
        """Whether the shim has reported that it is ready."""
        self.arrived = 0
        """Bytes that the task has printed."""
        self.status: int | None = None
        """The end of the command: an exit code, or the negative number of a signal."""
        self._folder: Inode | None = None
        self._lock: Inode | None = None
        self._linked = False
        self._begun = 0.0
        self._printed = 0
        self._asked = False
        self._cause = "itself"
        self._kill_at = self._killed_at = 0.0
        self._held: list[Inode] = []
        self._deadline: Timer | None = None
        world.shims.append(self)

    # -- from outside

    def notice(self) -> None:
        """Wake up to handle an event."""
        if self.alive and not self.stopped:
            self.scheduler.wake(self)

    def stop(self) -> None:
        """Take STOP."""
        if self.alive:
            self.world.log("shim {} stopped", self.pid)
            self.stopped = True
            if self.world.mended:
                self.scheduler.after(30.0, self.resume)

    def resume(self) -> None:
        """Take CONT."""
        if self.stopped:
            self.stopped = False
            self.notice()

    def terminate(self) -> None:
        """Take TERM."""
        if self.listens:
            self._asked = True
            self.notice()

    def die(self, how: str) -> None:
        """End by a signal. The processes of the task run on."""
        if self.alive:
            self.world.log("shim {} dies of {}", self.pid, how)
            self._leave()
            self.pipe.ended(None, how)
            self.world.bury(self)

    def vanish(self) -> None:
        """End with the machine."""
        if self.alive:
            self.alive = False
            self.world.bury(self)

    def _leave(self) -> None:
        self.alive = self.stopped = False
        self._let_go()
        self.world.shims.remove(self)

    def _let_go(self) -> None:
        for inode in self._held:
            if inode.holder is self:
                inode.holder = None
            self.world.disk.close(inode)
        self._held.clear()

    def step(self) -> None:
        """Take a step, unless the shim is stopped."""
        if self.alive and not self.stopped:
            super().step()

    # -- from inside

    def run(self) -> None:
        """Behave as ``pulsar_api/shim/shim.py`` does."""
        try:
            status = self._main()
        except OSError as e:
            self.pipe.complain(f"{e}")
            status = 1
        self._step()
        self.world.log("shim {} exits with {}", self.pid, status)
        self._leave()
        self.pipe.ended(status, None)

    def _step(self) -> None:
        if self.world.random() < self.world.preempt:
            self.pause()
        if not self.alive:
            raise Died

    def _until(self, time: float | None) -> None:
        """Wait until an event, or until the given time."""
        if time is not None:
            delay = max(0.0, time - self.world.now)
            self._deadline = self.scheduler.after(delay, self.notice)
        self.rest()
        if self._deadline is not None:
            self._deadline.cancel()
        if not self.alive:
            raise Died

    def _bear(self, error: OSError) -> None:
        """Wait before the next try after a passing error; raise any other error."""
        if error.errno not in shim.PASSING:
            raise error
        self._ready()
        self._until(self.world.now + shim.RETRY)

    def _ready(self) -> None:
        if not self.told:
            self.told = True
            self.pipe.tell(shim.bare(shim.READY))
            self._step()

    @property
    def _here(self) -> Inode:
        assert self._folder is not None
        return self._folder

    def _entries(self) -> dict[str, Inode]:
        return self._here.entries or {}

    def _make(self, name: str) -> Inode:
        made = self.world.disk.make(self._here, name)
        self._hold(made)
        self._step()
        return made

    def _hold(self, inode: Inode) -> None:
        self._held.append(inode)
        self.world.disk.open(inode)

    def _remove(self, name: str) -> None:
        if name in self._entries():
            self.world.disk.unlink(self._here, name)
        self._step()

    def _main(self) -> int:
        self._until(self.world.now + self.world.latency())
        while True:
            try:
                if not self._take():
                    return shim.TAKEN
                self._spec = Spec(self._read("spec"))
                break
            except OSError as e:
                self._bear(e)
        self._ready()
        while not self._begun:
            try:
                self._remove("spec")
                self._remove("secrets")
                if self._asked:
                    self._cause = "kill"
                    self._finish("The command was not started.")
                    return 0
                self._files()
            except OSError as e:
                self._bear(e)
            else:
                self._begin()
        self._watch()
        self._finish()
        self._linger()
        return 0

    def _take(self) -> bool:
        """Enter the folder and take its lock. Return False if another shim has it."""
        disk = self.world.disk
        if self._folder is None:
            self._folder = disk.find(self.tree.path)
            self._hold(self._folder)
            self._step()
        name = f"lock.{self.pid}"
        if self._lock is None:
            self._remove(name)
            self._lock = self._make(name)
        if not self._linked:
            self._lock.holder = self
            self._step()
            disk.write(self._lock, b"%d %d\n" % (self.pid, 1))
            self._step()
            try:
                disk.link(self._here, name, "lock")
            except FileExistsError:
                self._remove(name)
                return False
            self._linked = True
            self.world.log("shim {} holds {}", self.pid, self.tree.path)
            self._here.parts = self.tree
            self._step()
        if "start" in self._entries():
            disk.rename(self._here, "start", self._here, "begun")
            self._step()
        self._remove(name)
        if self.syncs:
            disk.sync(self._lock)
            self._step()
            disk.sync(self._here)
            self._step()
        return True

    def _read(self, name: str) -> bytes:
        if name not in self._entries():
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", name)
        return self._entries()[name].content

    def _files(self) -> None:
        """Open the files for the output."""
        found = []
        for name in ("output", "output.idx"):
            if name in self._entries():
                self._hold(self._entries()[name])
                found.append(self._held[-1])
            else:
                found.append(self._make(name))
        self._output, self._index = found

    def _begin(self) -> None:
        """Start the command."""
        environment = {
            key.decode(): value.decode() for key, value in self._spec.environment.items()
        }
        arguments = [text.decode() for text in self._spec.arguments]
        self._begun = self.world.now
        pid = self.world.begin(self.tree, arguments, environment)
        self._note(shim.STARTED, pid)

    def _record(self, code: int, number: int) -> bytes:
        since = int((self.world.now - self._begun) * 1000)
        return number.to_bytes(8, "little") + (since << 8 | code).to_bytes(8, "little")

    def _note(self, code: int, number: int) -> None:
        record = self._record(code, number)
        self._again(self._index, record)
        self.pipe.tell(record)
        self._step()

    def _again(self, inode: Inode, data: bytes) -> None:
        """Append to a file, as soon as there is room."""
        while True:
            try:
                self.world.disk.write(inode, data, append=True)
            except OSError as e:
                if e.errno not in shim.PASSING:
                    raise
                self._until(self.world.now + shim.RETRY)
            else:
                break

    def _watch(self) -> None:
        spec, pipes_until = self._spec, None
        last_output = self._begun
        while True:
            if self._printed < self.arrived:
                last_output = self.world.now
                new = self.arrived - self._printed
                self._printed = self.arrived
                self._again(self._output, b"x" * new)
                self._note(shim.STDOUT, self._printed)
            now = self.world.now
            deadlines = []
            if self._asked:
                self._ask("kill")
            elif self.status is None and not self._kill_at:
                if spec.total and now >= self._begun + spec.total:
                    self._ask("timeout")
                elif spec.silence and now >= last_output + spec.silence:
                    self._ask("silence")
            if self._kill_at and now >= self._kill_at and self.tree.living():
                if not self._killed_at:
                    self._killed_at = now
                    self._note(shim.KILL_SENT, self._printed)
                for member in self.tree.living():
                    member.signal(9)
                    self._step()
            if self.status is None or (self._kill_at and self.tree.living()):
                if self._killed_at:
                    over = self._killed_at + shim.KILL_PATIENCE
                    if now >= over:
                        return
                    deadlines.append(over)
                elif self._kill_at:
                    deadlines.append(self._kill_at)
                else:
                    if spec.total:
                        deadlines.append(self._begun + spec.total)
                    if spec.silence:
                        deadlines.append(last_output + spec.silence)
            elif not self._holds():
                return
            else:
                if pipes_until is None:
                    pipes_until = now + shim.PATIENCE
                if now >= pipes_until:
                    return
                deadlines.append(pipes_until)
            if self._printed == self.arrived:
                self._until(min(deadlines, default=None))

    def _ask(self, cause: str) -> None:
        if self._kill_at:
            return
        self._cause = cause
        self._kill_at = self.world.now + self._spec.grace
        self._note(shim.TERM_SENT, self._printed)
        for member in self.tree.living():
            member.signal(15)
            self._step()

    def _finish(self, error: str = "") -> None:
        """Write ``exit`` atomically, once the output is on disk."""
        disk = self.world.disk
        while True:
            try:
                if self._printed:
                    disk.sync(self._output)
                    self._step()
                    disk.sync(self._index)
                    self._step()
                self._write_synced("exit.tmp", self._result(error))
                disk.rename(self._here, "exit.tmp", self._here, "exit")
                self._step()
                disk.sync(self._here)
                self._step()
                break
            except OSError as e:
                if e.errno not in shim.PASSING:
                    raise
                self._until(self.world.now + shim.RETRY)

    def _result(self, error: str) -> bytes:
        lines = [
            shim.RESULT.decode(),
            f"ended {self.world.wall()!r}",
            f"cause {self._cause}",
            f"forced {int(bool(self._killed_at))}",
            f"size {self._printed}",
        ]
        if self._holds():
            lines.append("open 1")
        if error:
            lines.append(f"error {error}")
        elif self.status is None:
            lines.append("error The command does not end, not even by KILL.")
        elif self.status < 0:
            lines.append(f"signal {-self.status}")
        else:
            lines.append(f"code {self.status}")
        lines += [f"left {m.pid} {m.start} 0 run" for m in self.tree.living()]
        lines.append("end")
        return "".join(f"{line}\n" for line in lines).encode()

    def _write_synced(self, name: str, data: bytes) -> None:
        disk, entries = self.world.disk, self._entries()
        made = entries[name] if name in entries else disk.make(self._here, name)
        self._step()
        disk.write(made, b"")
        self._step()
        disk.write(made, data)
        self._step()
        disk.sync(made)
        self._step()

    def _holds(self) -> bool:
        """Return whether a process holds a pipe of the command."""
        return any(member.behaviour.holds for member in self.tree.living())

    def _linger(self) -> None:
        """Stay as the parent of remaining processes, without the folder and the daemon."""
        if self.tree.living():
            self.listens = False
            self._let_go()
            self.pipe.tell(shim.bare(shim.OVER))
            self.pipe.closed()
            while self.tree.living():
                self._until(None)


assert RECORD == 16
