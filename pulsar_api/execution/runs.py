"""Runs of commands, each below a shim: one of ours, or one of an earlier daemon."""

import pwd
import signal
from collections.abc import Callable
from contextlib import suppress
from errno import EAGAIN, EMFILE, ENFILE, ENOMEM
from pathlib import Path

from attrs import define, evolve, field
from twisted.internet.defer import Deferred
from twisted.internet.error import ProcessDone, ProcessExitedAlready, ProcessTerminated
from twisted.internet.interfaces import IDelayedCall, IProcessTransport, IReactorTime
from twisted.internet.protocol import ProcessProtocol
from twisted.logger import Logger
from twisted.python.failure import Failure

from pulsar_api.concurrency.background import run_in_background
from pulsar_api.execution.launched_shim import NotStarted, StatusUnknown
from pulsar_api.execution.machine import Machine
from pulsar_api.files import Damaged
from pulsar_api.output.reader import LARGEST, NO_TIME, Record
from pulsar_api.shim import shim
from pulsar_api.tasks.interfaces import Bounds, Sink
from pulsar_api.tasks.model import Cause, Exit, Process

_log = Logger()

LOOK = 0.25
"""Seconds between two looks at a run that was adopted."""

MARGIN = 5.0
"""Seconds that a shim is given beyond its own deadlines before the daemon acts."""

AGAIN = 1.0
"""Seconds until a shim that does not act is told again."""

BEGUN = frozenset({"begun", "output", "output.idx", "cut", "sessions", "exit.tmp"})
"""Files of which each proves that a shim has begun: somebody may have removed its lock."""

NOTHING = (FileNotFoundError, NotADirectoryError)
"""What is raised where there is no file, or no folder in which it could be."""

PASSING = {*shim.NO_SPACE, EAGAIN, EMFILE, ENFILE, ENOMEM}
"""Errors of a start that may pass: a full disk, too few descriptors, no memory."""

_OUTCOMES = ("code", "signal", "error")
"""What a result says of the command: one of these."""

_PRINTED = frozenset({shim.STDOUT, shim.STDERR})
_TROUBLE = 4096  # bytes of a shim's own complaint that are kept


def read_exit(machine: Machine, folder: Path) -> Exit | None:
    """Return the result that a shim has written, or None if there is none yet.

    It is judged by what the command promised to print last (`Command.last_line`).
    """
    damaged = Exit(error="The file with its result is damaged.", lost=True)
    try:
        data = machine.read(folder / "exit")
    except NOTHING:
        return None
    except Damaged:
        return damaged
    try:
        exit, promise = _parse_exit(data)
    except (KeyError, ValueError, OverflowError):
        return damaged
    good, index = exit.code != 0, 0
    try:
        if promise is None and not data.startswith(shim.RESULT):
            # An older shim had it in a file of its own.
            with suppress(*NOTHING):
                promise = machine.read(folder / "promise")
        output = machine.output(folder)
        index = output.index_size()
        good = good or promise is None or output.last_line() == promise
    except Damaged:
        good = good or promise is None
    return evolve(exit, good=good, index_size=index)


def not_started(error: OSError, folder: Path) -> Exit:
    """Return how a run ended for which no process was made; it can be tried again."""
    passing = error.errno in PASSING
    text = f"cannot start: {error.strerror}: {error.filename or folder}"
    return Exit(error=text, unstarted=passing, passing=passing)


def _lines(data: bytes) -> list[str]:
    """Return the lines of a result, or raise `ValueError` if it is not whole.

    Of one that an older shim has written nobody can know it if lines are missing at its
    end: those that name processes.
    """
    *lines, rest = data.decode("utf-8", "replace").split("\n")
    names = [line.partition(" ")[0] for line in lines]
    whole = lines[-1:] == ["end"] or lines[:1] != [shim.RESULT.decode()]
    if rest or not whole or sum(map(names.count, _OUTCOMES)) != 1:
        raise ValueError("the result is not whole")
    return lines


def _parse_exit(data: bytes) -> tuple[Exit, bytes | None]:
    """Return what a result says, and the last line that was promised, if one was."""
    lines = _lines(data)
    found = dict(line.partition(" ")[::2] for line in lines)
    number, promise = found.get("signal"), found.get("promise")
    left = [line.split(" ", 4)[1:] for line in lines if line.startswith("left ")]
    if len(left) > shim.LISTED:
        raise ValueError("more processes are named than a shim names")
    users = {user: _user_name(_number(user, 1 << 32)) for _, _, user, _ in left}
    exit = Exit(
        ended_at=_moment(found["ended"]),
        code=_number(found["code"], 256) if "code" in found else None,
        signal=_signal_name(_number(number, signal.NSIG)) if number else None,
        error=found["error"][:_TROUBLE] if "error" in found else None,
        cause=Cause(found["cause"]),
        forced=found["forced"] == "1",
        output_size=_number(found["size"], LARGEST + 1),
        open=found.get("open") == "1",
        left=tuple(
            Process(_number(pid, LARGEST), _number(start, LARGEST), name[:99], users[user])
            for pid, start, user, name in left
        ),
        cpu_seconds=_number(found["cpu"], LARGEST) / 1e6 if "cpu" in found else None,
        memory_peak=_number(found["memory"], LARGEST) if "memory" in found else None,
        memory_kills=_number(found.get("oom", "0"), LARGEST),
    )
    return exit, None if promise is None else bytes.fromhex(promise)


def _number(text: str, end: int) -> int:
    """Return a number from 0 to before ``end``, or raise `ValueError`."""
    number = int(text)
    if not 0 <= number < end:
        raise ValueError(f"no shim writes {text[:20]}")
    return number


def _moment(text: str) -> float:
    """Return a time before the year 10000, or raise `ValueError`."""
    moment = float(text)
    if not 0 <= moment < NO_TIME / 1000:
        raise ValueError(f"no shim writes {text[:20]}")
    return moment


def _user_name(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except (KeyError, OverflowError):
        return str(number)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"SIGRTMIN+{number - signal.SIGRTMIN}"


def alive(machine: Machine, folder: Path) -> int:
    """Return the process number of the folder's shim, 0 if it is not alive.

    The lock says so beyond doubt; a number alone might be somebody else's by now. Where
    the lock is damaged nobody is known to live.
    """
    try:
        return machine.holder(folder / "lock")
    except (*NOTHING, Damaged):
        return 0


@define(eq=False)
class Watch:
    """Acts for a shim that cannot: one that a task or an operator has stopped.

    It repeats what the shim was told, and wakes it when one of its clocks has run out.
    If it is still stopped `MARGIN` after it should have been done, ``force`` is called.
    """

    _machine: Machine
    _clock: IReactorTime
    _folder: Path
    _bounds: Bounds
    _force: Callable[[Cause], None]
    _began: float = field(init=False)
    _printed: float = field(init=False)
    _killed: bool = field(default=False, init=False)
    _late: float | None = field(default=None, init=False)
    """From when on a shim that is stopped is ended by force."""
    _cause: Cause = field(default=Cause.KILL, init=False)
    _call: IDelayedCall | None = field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        self._began = self._printed = self._clock.seconds()
        self._wait()

    def printed(self) -> None:
        """Note that the task has printed something."""
        self._printed = self._clock.seconds()

    def kill(self) -> None:
        """Note that the shim was told to end the task."""
        if not self._killed:
            self._killed = True
            self._cause = Cause.KILL
            self._late = self._clock.seconds() + self._bounds.grace + MARGIN
            self.stop()
            self._call = self._clock.callLater(AGAIN, self._look)

    def stop(self) -> None:
        """Act no more."""
        if self._call is not None and self._call.active():
            self._call.cancel()

    def _due(self) -> tuple[float, Cause] | None:
        """Return when a clock of the shim has run out for certain, and which."""
        bounds = self._bounds
        found = []
        if bounds.total:
            found.append((self._began + bounds.total + MARGIN, Cause.TIMEOUT))
        if bounds.silence:
            found.append((self._printed + bounds.silence + MARGIN, Cause.SILENCE))
        return min(found, default=None)

    def _wait(self) -> None:
        due = self._due()
        if due is not None:
            wait = max(0.0, due[0] - self._clock.seconds())
            self._call = self._clock.callLater(wait, self._look)

    def _look(self) -> None:
        now = self._clock.seconds()
        if self._late is None:
            due = self._due()
            if due is None or now < due[0]:  # it has printed since
                self._wait()
                return
            self._cause = due[1]
            self._late = now + self._bounds.grace + MARGIN
        stopped = self._machine.wake(self._folder)
        if self._killed:
            self._machine.terminate(self._folder)
        if stopped and now >= self._late:
            self._force(self._cause)
        else:
            self._call = self._clock.callLater(AGAIN, self._look)


@define(eq=False)
class _Following:
    """What both kinds of run share: telling the sink, once, how it ended."""

    _machine: Machine
    _clock: IReactorTime
    _folder: Path
    _bounds: Bounds
    _sink: Sink | None
    _cgroup: str = field(default="", kw_only=True)
    """The name of its cgroup, "" if that is not known."""
    _watch: Watch = field(init=False)
    _ending: bool = field(default=False, init=False)
    """Whether the daemon itself ends the task by force, or what is left of it."""

    def watch(self) -> None:
        """Begin to act for a shim that cannot."""
        self._watch = Watch(
            self._machine, self._clock, self._folder, self._bounds, self._force
        )

    def end(self, exit: Exit) -> None:
        """Tell the sink soon (never while it is being made) and for the last time."""
        self._clock.callLater(0, self._tell_end, exit)

    def result(self) -> Exit | None:
        """Return the result that is on disk."""
        return read_exit(self._machine, self._folder)

    def lost(self, why: str, *, numbers: bool) -> None:
        """End what is left of a run of which nobody can know how it ended; then tell.

        Raises `OSError` if the folder of all runs is away: then nobody knows yet.
        """
        self._machine.identity(self._folder.parent)
        self._end_all(Exit(error=why, lost=True), numbers=numbers)

    def conclude(self, exit: Exit, *, numbers: bool) -> None:
        """Take a result; one that is damaged says nothing of what may still run."""
        if exit.lost:
            self.lost(exit.error or "", numbers=numbers)
        else:
            self._tell_end(exit)

    def _force(self, cause: Cause) -> None:
        _log.error("The shim in {folder} is stopped; it is killed", folder=self._folder)
        self._end_all(Exit(cause=cause, forced=True), numbers=True)

    def _end_all(self, exit: Exit, *, numbers: bool) -> None:
        if self._ending:
            return
        self._ending = True
        self._watch.stop()
        run_in_background(self._end_by_force(exit, numbers))

    async def _end_by_force(self, exit: Exit, numbers: bool) -> None:  # noqa: FBT001
        while True:
            try:
                left = await self._machine.end(
                    self._folder, numbers=numbers, cgroup=self._cgroup
                )
                size, index = self._sizes()
                found = None if exit.lost else self.result()
            except OSError as e:
                self.cannot_read(e)
                wait: Deferred[None] = Deferred()
                self._clock.callLater(LOOK, wait.callback, None)
                await wait
            else:
                break
        # It may have done its work in the last moment.
        exit = evolve(exit, left=left, output_size=size, index_size=index)
        self._tell_end(found or exit)

    def _sizes(self) -> tuple[int, int]:
        output = self._machine.output(self._folder)
        try:
            return output.size(), output.index_size()
        except (NotADirectoryError, Damaged):
            return 0, 0

    def cannot_read(self, error: OSError) -> None:
        """Log why the end is not known yet: no more descriptors, a disk that is ill."""
        _log.error("Cannot read {folder}: {e}", folder=self._folder, e=error)

    def detach(self) -> None:
        """Stop telling."""
        self._sink = None
        self._watch.stop()

    def _tell_end(self, exit: Exit) -> None:
        sink, self._sink = self._sink, None
        self._watch.stop()
        if sink is not None:
            sink.ended(exit)

    def _read(self, record: Record) -> None:
        if self._sink is None or record.number > LARGEST:
            return
        if record.code in _PRINTED:
            self._watch.printed()
            self._sink.printed(record.number)
        elif record.code == shim.STARTED:
            self._sink.started(record.number)


@define(eq=False)
class ShimProtocol(_Following, ProcessProtocol):
    """Hears from a shim that this daemon started: records, not the bytes themselves."""

    _buffer: bytes = field(default=b"", init=False)
    _trouble: bytes = field(default=b"", init=False)
    _ready: bool = field(default=False, init=False)
    _over: bool = field(default=False, init=False)
    """Whether the result was seen; the shim may live on for what the task has left."""
    _killed: bool = field(default=False, init=False)
    _detached: bool = field(default=False, init=False)
    _looking: IDelayedCall | None = field(default=None, init=False)
    _closing: IDelayedCall | None = field(default=None, init=False)
    _other: "AdoptedRun | None" = field(default=None, init=False)
    """The run of a shim that was faster than ours."""
    _again: bool = field(default=False, init=False)
    """Whether an earlier start is in doubt: its shim may still come."""
    transport: IProcessTransport = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.watch()

    def detach(self) -> None:
        """Stop telling."""
        super().detach()
        self._detached = True
        self._cancel(self._looking, self._closing)
        if self._other is not None:
            self._other.detach()

    def _cancel(self, *calls: IDelayedCall | None) -> None:
        for call in calls:
            if call is not None and call.active():
                call.cancel()

    def _tell_end(self, exit: Exit) -> None:
        self._cancel(self._looking)
        super()._tell_end(exit)

    def connectionMade(self) -> None:
        """Give the shim an end of file to read."""
        self.transport.closeStdin()

    def childDataReceived(self, childFD: int, data: bytes) -> None:
        """Take news (1) or a shim's own complaint (2)."""
        if childFD != 1:
            self._trouble = (self._trouble + data)[-_TROUBLE:]
            return
        self._buffer += data
        end = len(self._buffer) // shim.RECORD * shim.RECORD
        whole, self._buffer = self._buffer[:end], self._buffer[end:]
        # A flood brings thousands at a time, of which only the last says something new.
        printed, over = None, False
        for at in range(0, end, shim.RECORD):
            if whole[at + 8] in _PRINTED:
                printed = at
                continue
            record = Record.parse(whole[at : at + shim.RECORD])
            if record.code == shim.READY:
                self._ready = True
                if self._killed:
                    self.kill()
            over |= record.code == shim.OVER
            self._read(record)
        if printed is not None:
            self._read(Record.parse(whole[printed : printed + shim.RECORD]))
        if over:
            self._look()
            self._close_later()

    def kill(self) -> None:
        """Let the shim end the tree; as soon as it can hear us."""
        self._killed = True
        if self._other is not None:
            self._other.kill()
        elif self._ready:
            self._watch.kill()
            with suppress(ProcessExitedAlready):
                self.transport.signalProcess("TERM")
                self.transport.signalProcess(signal.SIGCONT)  # it may be stopped
            # Not at once: news that it has sent before may not have been read yet.
            self._look_later()

    def childConnectionLost(self, childFD: int) -> None:
        """Take the result if there is one: a shim stays for what the task has left."""
        if childFD == 1 and self._ready:
            self._look()

    def _look_later(self) -> None:
        waits = self._looking is not None and self._looking.active()
        if self._sink is not None and not waits:
            self._looking = self._clock.callLater(LOOK, self._look)

    def _look(self) -> None:
        if self._over:
            return
        try:
            # A living shim puts its own result in place of one that is damaged.
            lives = alive(self._machine, self._folder) != 0
            exit = self.result()
            if exit is not None and exit.lost and lives:
                self._look_later()
            elif exit is not None:
                self._over = True
                self.conclude(exit, numbers=True)
        except OSError as e:
            self.cannot_read(e)
            self._look_later()

    def _close_later(self) -> None:
        """Close the pipes from a shim that sends nothing more, when they have been read.

        A process of the task may hold them open (/proc/PID/fd). Without them
        `processEnded` comes as soon as the shim has been reaped.
        """
        if self._closing is None and not self._detached:
            lose = self.transport.loseConnection
            self._closing = self._clock.callLater(LOOK, lose)

    def processExited(self, reason: Failure) -> None:
        """Expect no more from the pipes; `processEnded` follows when they are closed."""
        self._close_later()

    def processEnded(self, reason: Failure) -> None:
        """Take the result from the disk, unless that is done."""
        self._cancel(self._looking, self._closing)
        trouble = self._trouble.decode("utf-8", "replace").strip()
        if trouble:
            _log.error("The shim in {folder} says: {it}", folder=self._folder, it=trouble)
        if self._over:
            return
        end = reason.value
        if isinstance(end, StatusUnknown):
            self._again = True
            self._again_later(0)
            return
        if isinstance(end, NotStarted):
            if self._again:
                self._again_later(LOOK)
            else:
                self._tell_end(not_started(end.error, self._folder))
            return
        assert isinstance(end, ProcessDone | ProcessTerminated)
        if end.exitCode == shim.TAKEN and self._sink is not None:
            self._follow(self._sink)
            return
        if not self._ready:
            # Nobody will read it, and it may hold secrets.
            with suppress(OSError):
                self._machine.remove(self._folder / "spec")
        how = _signal_name(end.signal) if end.signal else f"exit status {end.exitCode}"
        self._conclude(trouble.rpartition("\n")[2] or how)

    def _follow(self, sink: Sink) -> None:
        """Leave it to another shim, which has the lock or had it."""
        self._watch.stop()
        self._other = AdoptedRun(
            *(self._machine, self._clock, self._folder, self._bounds, sink, self._is_new),
            cgroup=self._cgroup,
        )
        if self._killed:
            self._other.kill()

    def _is_new(self) -> bool:
        """Return whether no shim can have begun if there is no sign of one."""
        return not self._again

    def _again_later(self, seconds: float) -> None:
        self._looking = self._clock.callLater(seconds, self._start_again)

    def _start_again(self) -> None:
        """Start a shim of which nobody knows whether it was started.

        If it was, it takes the lock, or has taken it; then this one ends and says so, and
        reads nothing of what is to be run. If any file says that one has begun, it did.
        """
        if self._sink is None or self._ending:
            return
        self._buffer = self._trouble = b""
        self._ready, self._closing = False, None
        names: list[str] = []
        try:
            with suppress(*NOTHING):
                names = self._machine.names(self._folder)
            begun = bool((BEGUN | {"lock", "exit"}) & set(names))
            if begun or (self._killed and not self._prevent_start()):
                self._follow(self._sink)
            elif self._killed:
                self._tell_end(Exit(error="The command was not started.", cause=Cause.KILL))
            else:
                self._machine.spawn(self, self._folder)
        except OSError as e:
            self.cannot_read(e)
            self._again_later(LOOK)

    def _prevent_start(self) -> bool:
        """Make sure that no shim begins any more; False: one has."""
        try:
            prevented = self._machine.claim(self._folder / "lock")
        except NOTHING:
            return True  # there is no folder to begin in
        if prevented:
            with suppress(OSError):  # it may hold secrets
                self._machine.remove(self._folder / "spec")
        return prevented

    def _conclude(self, why: str) -> None:
        if self._ending:
            return
        try:
            exit = self.result()
            if exit is not None:
                self.conclude(exit, numbers=True)
                return
            # Before it is called ended: the shim of an earlier start may still come.
            if self._again and self._sink is not None and not self._prevent_start():
                self._follow(self._sink)
                return
            if self._ready:
                why = f"The process that watched the command ended: {why}."
                self.lost(why, numbers=True)
                return
        except OSError as e:
            self.cannot_read(e)
            if self._sink is not None:
                self._clock.callLater(LOOK, self._conclude, why)
            return
        error = f"cannot start the process that watches the command: {why}"
        self._tell_end(Exit(error=error))


@define(eq=False)
class AdoptedRun(_Following):
    """Follows a shim that is not our child, by looking at its files."""

    _is_valid: Callable[[], bool] = lambda: True
    """Whether the permit to start it is of this boot, of this very folder, and unused."""
    _is_here: Callable[[], bool] = lambda: True
    """Whether the permit, used or not, is of this boot and folder: numbers are, too."""
    _seen: int = field(default=0, init=False)
    _killed: bool = field(default=False, init=False)
    _look: IDelayedCall = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.watch()
        # What is on disk is told before anybody can ask for it.
        with suppress(OSError):
            self._news()
        self._look = self._clock.callLater(0, self._check)

    def kill(self) -> None:
        """Let the shim end the tree; told again for as long as it has not ended."""
        self._killed = True
        self._watch.kill()
        self._machine.terminate(self._folder)

    def detach(self) -> None:
        """Stop looking."""
        super().detach()
        if self._look.active():
            self._look.cancel()

    def _check(self) -> None:
        if self._ending:
            return
        try:
            self._look_at_it()
        except OSError as e:
            self.cannot_read(e)
            self._look_later()

    def _look_later(self) -> None:
        self._look = self._clock.callLater(LOOK, self._check)

    def _look_at_it(self) -> None:
        # In this order: what is dead now has written its result before.
        lock = self._folder / "lock"
        try:
            begun, lives = True, self._machine.holder(lock) != 0
        except Damaged:  # a shim has begun here: nothing else lets a task into its folder
            begun, lives = True, False
        except NOTHING:
            begun = lives = False
        exit = self.result()
        # What cannot be known of the output any more changes nothing about the end.
        with suppress(NotADirectoryError, Damaged):
            self._news()
        if exit is not None and not (exit.lost and lives):
            self.conclude(exit, numbers=self._is_here())
        elif lives:
            if self._killed:
                self._machine.terminate(self._folder)
            self._look_later()
        elif begun:
            why = "The process that watched the command is gone and left no result."
            self.lost(why, numbers=self._is_here())
        elif self._is_valid() and not BEGUN & set(self._machine.names(self._folder)):
            error = "The daemon ended before the command was started."
            self._tell_end(Exit(error=error, unstarted=True))
        else:
            # From here on no shim can begin, should one come late.
            with suppress(*NOTHING):
                if not self._machine.claim(lock):
                    self._look_later()
                    return
            why = (
                "The daemon ended when the command was about to start, and nothing proves "
                "that it did not: the machine has booted since, or the files of the task "
                "are not those of then."
            )
            self.lost(why, numbers=False)

    def _news(self) -> None:
        for number, record in self._machine.output(self._folder).news(self._seen):
            self._seen = number + 1
            self._read(record)
