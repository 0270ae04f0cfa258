"""Finds and ends orphans: the processes of a task whose shim was killed.

While a shim lives, every process of its task is below it. The methods read the kernel's
table of processes, which takes milliseconds: call them in a thread. They raise `OSError` if
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

_ROUNDS = 20  # of stopping processes that were started in the round before
_CHASE = 0.3  # seconds in which to look for a process that is in no table, see `chase`


@define(eq=False)
class Orphans:
    """The processes of one task whose shim is dead."""

    _mark: bytes
    _shim: Key | None
    _sessions: dict[int, Session]
    _processes: set[Key]
    _other_processes: frozenset[Key]
    """Processes of other tasks, and their orphans."""
    _other_sessions: frozenset[int]
    """Sessions of other tasks."""
    _is_left: Callable[[Entry, Entry], bool]
    _own_sessions: set[int] = field(init=False)
    """The session of the shim, and those in which a process of the task was found."""

    def __attrs_post_init__(self) -> None:
        self._own_sessions = set() if self._shim is None else {self._shim[0]}

    def find(self) -> list[Process]:
        """Return the orphans that run."""
        return describe(self._find(Table()))

    def end(self, patience: float = KILL_PATIENCE) -> list[Process]:
        """Kill the orphans; return those that remain.

        These are processes that this one is not permitted to signal, and those that do not
        end within ``patience`` seconds.
        """
        until = time.monotonic() + patience
        dead: set[Key] | None = None
        while True:
            table, found = self._freeze()
            groups = [one.group for one in found if one.session in self._own_sessions]
            # Children first: the end of a parent may continue a stopped child.
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
        """Return the zombies of the task that are children of this daemon.

        New ones prove that there is a process that is in no table.
        """
        me = table.entries[os.getpid()]
        return {
            one.key
            for one in table.children(me)
            if not one.alive and self._was_left(one, me)
        }

    def _chase(self) -> None:
        """Kill a process of the task that is in no table, if there is one."""
        me = Entry.of(os.getpid())
        assert me is not None

        def ours(one: Entry) -> bool:
            if one.pid in {1, me.pid} or one.session == me.session:
                return False
            known = (
                one.session in self._own_sessions
                and one.start <= self._sessions[one.session].seen
            )
            return known or self._was_left(one, me) or self._carries_mark(one)

        chase(ours, _CHASE)

    def _freeze(self) -> tuple[Table, list[Entry]]:
        """Stop all orphans and return them, with the table that they are from.

        A stopped process starts no other one. So a table without a new one has all of
        them, and none can escape when its parent dies.
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
        """Return the processes of the task that run, parents before their children."""
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
        # So what they start is found even after they have ended.
        self._processes.update(entry.key for entry in found.values())
        self._own_sessions |= whole
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
        """Return whether the environment of a process names the folder of this task.

        A process that is older than the shim is of an earlier task with this folder.
        """
        older = self._shim is not None and not self._is_younger(entry)
        return not older and self._mark in environ(entry)

    def _carries_another(self, entry: Entry) -> bool:
        """Return whether the environment names the folder of another task."""
        name = f"{MARK}=".encode()
        marks = [text for text in environ(entry) if text.startswith(name)]
        return bool(marks) and self._mark not in marks

    def _was_left(self, entry: Entry, me: Entry) -> bool:
        """Return whether this daemon has adopted a process from this task."""
        other = entry.key in self._other_processes or entry.session in self._other_sessions
        if other or not self._is_younger(entry) or not self._is_left(entry, me):
            return False
        return not self._carries_another(entry)

    def _whole(self, table: Table, number: int, found: Container[int]) -> bool:
        """Return whether all of a session is of the task, given that one process of it is.

        Usually a session was made below the shim. But another program, such as cron, may
        have started that process for the task in a session of its own.
        """
        members = table.members(number)
        if self._shim is None or any(one.start < self._shim[1] for one in members):
            return False
        leader = table.entries.get(number)
        return leader is None or not leader.alive or leader.pid in found
