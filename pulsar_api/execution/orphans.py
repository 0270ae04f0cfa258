"""What a killed shim leaves of its task, found by what is remembered and what it carries.

While a shim lives, every process of its task is below it. All of this reads the kernel's
table of processes, which takes milliseconds: call it in a thread. It raises `OSError` for
want of descriptors or memory.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path

from attrs import define, field, frozen

from pulsar_api import files
from pulsar_api.execution.proc import (
    TICKS,
    Entry,
    Key,
    Table,
    arguments,
    chase,
    describe,
    environ,
    gone,
    now,
    send,
)
from pulsar_api.execution.processes import KILL_PATIENCE, Guard, kill_all
from pulsar_api.shim import shim
from pulsar_api.tasks.model import Process

MARK = "PULSAR_TASK_FOLDER"
"""A variable in the environment of each process of a task; its value is the folder."""

SESSIONS = "sessions"
"""The file in a task's folder that has the sessions of its processes."""

MOST_SESSIONS = 1024
MOST_PROCESSES = 4096
"""How much of one task is remembered."""

_MOST_NOTED = 1 << 17  # bytes of the file of the sessions
_AGAIN = TICKS  # within that time no number of a process comes round again
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_ROUNDS = 20  # in which processes are stopped that were started in the round before
_CHASE = 0.3  # seconds in which a process is looked for that no table has


@frozen
class Session:
    """A session of a task: its number, and how to know that it is still the same."""

    id: int
    leader: int
    """When the process that made it started; 0 if that had ended before anybody looked."""
    seen: int
    """Until when it was the task's, in ticks since the boot."""

    @classmethod
    def of(cls, table: Table, number: int) -> "Session":
        """Return the session of a number, which has a process in the table."""
        leader = table.entries.get(number)
        return cls(number, 0 if leader is None else leader.start, table.at + _AGAIN)

    def goes_on(self, table: Table) -> bool:
        """Return whether the session that has this number now is this one.

        Nobody else gets the number as long as the session has a process. And a process
        leaves its session only for a new one: so one that is in it now was in it from its
        start, and in this one if it started while this one had the number.
        """
        leader = table.entries.get(self.id)
        if leader is not None:
            return leader.start == self.leader
        return any(entry.start <= self.seen for entry in table.members(self.id))


def read_sessions(folder: Path) -> dict[int, Session]:
    """Return the sessions that a daemon wrote down since this machine was booted."""
    try:
        boot, *lines = files.read(folder / SESSIONS, _MOST_NOTED).splitlines()
        if boot != _BOOT.read_bytes().strip():
            return {}
        found = [Session(*map(int, line.split())) for line in lines[:MOST_SESSIONS]]
    except OSError as e:
        gone(e)
        return {}
    except (ValueError, TypeError):
        return {}  # the daemon was killed while it wrote them
    # 0 is the session of whatever is outside of a container.
    return {session.id: session for session in found if session.id > 0}


def write_sessions(folder: Path, sessions: Iterable[Session]) -> None:
    """Write the sessions of a task down for the next daemon.

    They are not synced: after a power cut they are worth nothing.
    """
    lines = [_BOOT.read_bytes().strip()]
    lines += [b"%d %d %d" % (s.id, s.leader, s.seen) for s in sessions]
    new = folder / f"{SESSIONS}.tmp"
    with open(files.make(new), "wb") as file:
        file.write(b"\n".join([*lines, b""]))
    os.rename(new, folder / SESSIONS)


def _last_sign(folder: Path, start: int) -> int:
    """Return when, in ticks since the boot, a dead shim is known to have lived."""
    at = 0
    with (
        suppress(FileNotFoundError, NotADirectoryError, files.Damaged),
        open(files.open_regular(folder / "output.idx"), "rb") as file,
    ):
        records = os.stat(file.fileno()).st_size // shim.RECORD
        if records:
            file.seek((records - 1) * shim.RECORD)
            at = int.from_bytes(file.read(shim.RECORD)[8:], "little") >> 8
    # Milliseconds since it had begun, a moment after its start.
    return min(start + at * TICKS // 1000, now())


@frozen
class _Traces:
    """What is remembered of one task."""

    sessions: Mapping[int, Session] = field(factory=dict)
    processes: frozenset[Key] = frozenset()
    bystanders: frozenset[Key] = frozenset()
    """What the daemon had been left by other tasks at that time."""


class Memory:
    """Knows the processes of the tasks that run, so as to find them without their shim.

    ``tasks`` is the folder of all tasks. ``own`` has the numbers of the children that this
    process waits for itself, and may change at any time; None: it is not a subreaper.
    """

    def __init__(self, tasks: Path, own: Container[int] | None = None) -> None:
        self._tasks = tasks
        self._own = own
        self._lock = threading.Lock()
        self._known: dict[int, _Traces] = {}
        self._written: dict[int, Mapping[int, Session]] = {}
        self._left: frozenset[Key] = frozenset()

    def look(self, shims: Mapping[int, Key]) -> float:
        """Remember what runs below the shims; return the processor time that it took.

        ``shims`` has every task that has not ended, also one whose shim is dead. All other
        tasks are forgotten.
        """
        began = time.thread_time()
        table = Table()
        tops = {os.getpid(), *(pid for pid, _ in shims.values())}
        with self._lock:
            me = table.entries[os.getpid()]
            left = frozenset(e.key for e in table.children(me) if self._is_left(e, me))
            known = {}
            for task_id, key in shims.items():
                top = table.get(key)
                if top is None or not top.alive:
                    # What was known when it died stays known.
                    known[task_id] = self._of(task_id)
                    continue
                tree = [top, *table.below(top, lambda one: one.pid in tops)]
                numbers = islice(dict.fromkeys(e.session for e in tree), MOST_SESSIONS)
                sessions = {number: Session.of(table, number) for number in numbers}
                processes = frozenset(entry.key for entry in tree[:MOST_PROCESSES])
                known[task_id] = _Traces(sessions, processes, left)
                self._write(task_id, table, sessions)
            self._known = known
            self._written = {n: w for n, w in self._written.items() if n in known}
            self._left = left
        return time.thread_time() - began

    def orphans(
        self, task_id: int, shim: Key | None, lived: int = 0, *, believe: bool = True
    ) -> "Orphans":
        """Return what finds and ends the processes of a task whose shim is dead.

        ``shim`` is the shim's number and start, by its lock; None if another boot wrote
        that, or nobody knows. ``lived`` is when it was last known to live, in ticks since
        the boot (`proc.now`); the time of its death, if somebody saw that. ``believe``:
        whether what is written in the folder counts; in a copy it is about others.
        """
        folder = self._tasks / str(task_id)
        with self._lock:
            traces = self._of(task_id)
            others = [t for n, t in self._known.items() if n != task_id]
        written = read_sessions(folder) if believe else {}
        sessions = {**written, **traces.sessions}
        if shim is not None:
            own = Session(*shim, max(lived, _last_sign(folder, shim[1])) + _AGAIN)
            sessions[own.id] = max(own, sessions.get(own.id, own), key=lambda s: s.seen)
        return Orphans(
            f"{MARK}={folder}".encode("utf-8", "surrogateescape"),
            shim,
            sessions,
            set(traces.processes),
            traces.bystanders.union(*(t.processes for t in others)),
            frozenset[int]().union(*(t.sessions for t in others)),
            self._is_left,
        )

    def _of(self, task_id: int) -> _Traces:
        found = self._known.get(task_id)
        return _Traces(bystanders=self._left) if found is None else found

    def _write(self, task_id: int, table: Table, sessions: Mapping[int, Session]) -> None:
        """Write the sessions of a task down, unless they are known by what is written."""
        written = self._written.get(task_id, {})
        known = (n in written and written[n].goes_on(table) for n in sessions)
        if not all(known):
            # What cannot be written now is at the next look.
            with suppress(OSError):
                write_sessions(self._tasks / str(task_id), sessions.values())
                self._written[task_id] = sessions

    def _is_left(self, entry: Entry, me: Entry) -> bool:
        """Return whether this daemon has got a process by the death of its parent."""
        # Process 1 gets those of strangers, too.
        if self._own is None or entry.parent != me.pid or me.pid == 1:
            return False
        # What it starts itself is of its session, but for the shims.
        ours = entry.session == me.session or entry.pid in self._own
        return not ours and not self._begins(entry)

    def _begins(self, entry: Entry) -> bool:
        """Return whether a process is a shim of ours, perhaps without its lock yet."""
        last = os.fsdecode(b"".join(arguments(entry)[-1:]))
        return os.path.dirname(last) == str(self._tasks)


@define(eq=False)
class Orphans:
    """The processes of one task whose shim is dead."""

    _mark: bytes
    _shim: Key | None
    _sessions: dict[int, Session]
    _processes: set[Key]
    _strangers: frozenset[Key]
    """Processes that other tasks have or have left."""
    _strange: frozenset[int]
    """Sessions of other tasks."""
    _is_left: Callable[[Entry, Entry], bool]
    _own: set[int] = field(init=False)
    """The session of the shim, and those in which a process of the task was found."""

    def __attrs_post_init__(self) -> None:
        self._own = set() if self._shim is None else {self._shim[0]}

    def find(self) -> list[Process]:
        """Return what runs of the task."""
        return describe(self._find(Table()))

    def end(self, patience: float = KILL_PATIENCE) -> list[Process]:
        """KILL what runs of the task; return what remains.

        That is what may not be signalled, and what does not end within the patience.
        """
        until = time.monotonic() + patience
        dead: set[Key] | None = None
        while True:
            table, found = self._freeze()
            groups = [one.group for one in found if one.session in self._own]
            # Children first: the end of a parent may wake a child that is stopped.
            keys = [entry.key for entry in reversed(found)]
            denied = kill_all(keys, until - time.monotonic(), groups)
            if time.monotonic() >= until:
                return self.find()
            before, dead = dead, self._dead(table)
            if denied == set(keys):
                if before is not None and dead <= before:
                    return describe(found)
                self._chase()

    def _dead(self, table: Table) -> set[Key]:
        """Return what of the task has ended as a child of this daemon.

        New ones say that there is one which no table has.
        """
        me = table.entries[os.getpid()]
        return {
            one.key
            for one in table.children(me)
            if not one.alive and self._was_left(one, me)
        }

    def _chase(self) -> None:
        """KILL a process that no table has, if there is one."""
        me = Entry.of(os.getpid())
        assert me is not None

        def ours(one: Entry) -> bool:
            if one.pid in {1, me.pid} or one.session == me.session:
                return False
            known = (
                one.session in self._own and one.start <= self._sessions[one.session].seen
            )
            return known or self._was_left(one, me) or self._carries_mark(one)

        chase(ours, _CHASE)

    def _freeze(self) -> tuple[Table, list[Entry]]:
        """Stop what runs of the task and return it, with the table that has it.

        A stopped process starts no other. So a look that finds no new one has found all,
        and none gets away by the death of its parent.
        """
        stopped: set[Key] = set()
        for _ in range(_ROUNDS):
            table = Table()
            found = self._find(table)
            new = [entry.key for entry in found if entry.key not in stopped]
            if not new:
                break
            for key in new:
                send(key, signal.SIGSTOP)
            stopped.update(new)
        return table, found

    def _find(self, table: Table) -> list[Entry]:
        """Return what runs of the task, parents before their children."""
        guard = Guard(table)
        found: dict[int, Entry] = {}
        whole: set[int] = set()
        new = list(self._roots(table, guard.me))
        while new:
            new = [e for e in new if e.alive and e.pid not in found and guard.allows(e)]
            found.update((entry.pid, entry) for entry in new)
            near: list[Entry] = []
            for entry in new:
                near += table.children(entry)
                number = entry.session
                if number not in {*whole, guard.me.session} and self._whole(
                    table, number, found
                ):
                    whole.add(number)
                    near += table.members(number)
            new = near
        # What they start is found also when they are no more.
        self._processes.update(entry.key for entry in found.values())
        self._own |= whole
        self._sessions.update((number, Session.of(table, number)) for number in whole)
        return sorted(found.values(), key=lambda entry: (entry.start, entry.pid))

    def _roots(self, table: Table, me: Entry) -> Iterator[Entry]:
        for session in self._sessions.values():
            if session.id != me.session and session.goes_on(table):
                yield from table.members(session.id)
        for entry in table.entries.values():
            known = entry.key in self._processes or self._was_left(entry, me)
            if known or (entry.alive and self._carries_mark(entry)):
                yield entry

    def _is_younger(self, entry: Entry) -> bool:
        """Return whether a process was started after the shim."""
        return self._shim is not None and entry.start >= self._shim[1]

    def _carries_mark(self, entry: Entry) -> bool:
        """Return whether the environment of a process says that it is of this task.

        One that is older than the shim is of a task that had this folder before.
        """
        older = self._shim is not None and not self._is_younger(entry)
        return not older and self._mark in environ(entry)

    def _carries_another(self, entry: Entry) -> bool:
        """Return whether it says that it is of another task."""
        name = f"{MARK}=".encode()
        marks = [text for text in environ(entry) if text.startswith(name)]
        return bool(marks) and self._mark not in marks

    def _was_left(self, entry: Entry, me: Entry) -> bool:
        """Return whether a process is this daemon's child by the end of this task."""
        other = entry.key in self._strangers or entry.session in self._strange
        if other or not self._is_younger(entry) or not self._is_left(entry, me):
            return False
        return not self._carries_another(entry)

    def _whole(self, table: Table, number: int, found: Container[int]) -> bool:
        """Return whether a session is of the task as a whole, as one process of it is.

        Sessions are made below the shim. But somebody else, such as cron, may have
        started that process for the task, with the mark, in a session of its own.
        """
        members = table.members(number)
        if self._shim is None or any(one.start < self._shim[1] for one in members):
            return False
        leader = table.entries.get(number)
        return leader is None or not leader.alive or leader.pid in found
