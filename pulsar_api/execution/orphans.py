"""Finds and ends the processes that a task has left after its shim was killed.

While a shim lives, every process of its task is below it. All of this reads the kernel's
table of processes, which takes milliseconds: call it in a thread. It raises `OSError` if
descriptors or memory run out.
"""

import os
import signal
import time
from collections.abc import Callable, Container, Iterator

from attrs import define, field

from pulsar_api.execution.proc import (
    Entry,
    Key,
    Table,
    chase,
    describe,
    environ,
    send,
)
from pulsar_api.execution.processes import KILL_PATIENCE, Guard, kill_all
from pulsar_api.execution.sessions import Session
from pulsar_api.tasks.model import Process

MARK = "PULSAR_TASK_FOLDER"
"""A variable in the environment of each process of a task; its value is the folder."""

_ROUNDS = 20  # in which processes are stopped that were started in the round before
_CHASE = 0.3  # seconds in which a process is looked for that no table has


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
