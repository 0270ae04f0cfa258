"""Remembers the processes of running tasks, so as to find them without their shim."""

import os
import threading
import time
from collections.abc import Container, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path

from attrs import field, frozen

from pulsar_api.execution.orphans import MARK, Orphans
from pulsar_api.execution.proc import Entry, Key, Table, arguments
from pulsar_api.execution.sessions import (
    MARGIN,
    MOST_SESSIONS,
    Session,
    last_sign,
    read_sessions,
    write_sessions,
)
from pulsar_api.output.files import folder_of

MOST_PROCESSES = 4096
"""Processes that are remembered of one task."""


@frozen
class _Traces:
    """What is remembered of the processes of one task."""

    sessions: Mapping[int, Session] = field(factory=dict)
    processes: frozenset[Key] = frozenset()
    bystanders: frozenset[Key] = frozenset()
    """Orphans of other tasks that were children of the daemon at that time."""


class ProcessHistory:
    """Remembers the processes of running tasks, so as to find them without their shim.

    ``tasks`` is the folder of all tasks. ``own_children`` has the numbers of the children
    that this process reaps itself, and may change at any time; None means that this process
    is no subreaper.
    """

    def __init__(self, tasks: Path, own_children: Container[int] | None = None) -> None:
        self._tasks = tasks
        self._own_children = own_children
        self._lock = threading.Lock()
        self._known: dict[int, _Traces] = {}
        self._written: dict[int, Mapping[int, Session]] = {}
        self._left: frozenset[Key] = frozenset()

    def sample(self, shims: Mapping[int, Key]) -> float:
        """Remember what runs below the shims; return the processor time that this took.

        ``shims`` has the shim of every task that has not ended, dead or alive. All other
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
                    # What was known when the shim died stays known.
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
    ) -> Orphans:
        """Return the orphans of a task whose shim is dead.

        ``shim`` is the number and start time of the shim, from its lock; None if it is from
        another boot, or not known. ``lived`` is when the shim was last known to live, in
        ticks since the boot (`proc.now`). ``believe`` says whether the files in the folder
        count; in a copy of a folder they are about other processes.
        """
        folder = folder_of(self._tasks, task_id)
        with self._lock:
            traces = self._of(task_id)
            others = [t for n, t in self._known.items() if n != task_id]
        written = read_sessions(folder) if believe else {}
        sessions = {**written, **traces.sessions}
        if shim is not None:
            own = Session(*shim, max(lived, last_sign(folder, shim[1])) + MARGIN)
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
        """Write the sessions of a task to its folder, unless the file still proves them."""
        written = self._written.get(task_id, {})
        known = (n in written and written[n].goes_on(table) for n in sessions)
        if not all(known):
            # What cannot be written now is written with the next sample.
            with suppress(OSError):
                write_sessions(folder_of(self._tasks, task_id), sessions.values())
                self._written[task_id] = sessions

    def _is_left(self, entry: Entry, me: Entry) -> bool:
        """Return whether this daemon has adopted a process when its parent died."""
        # Process 1 adopts the processes of everybody.
        if self._own_children is None or entry.parent != me.pid or me.pid == 1:
            return False
        # Processes that it starts itself are in its session, except for the shims.
        ours = entry.session == me.session or entry.pid in self._own_children
        return not ours and not self._begins(entry)

    def _begins(self, entry: Entry) -> bool:
        """Return whether a process is a shim of this daemon, perhaps without a lock yet."""
        last = os.fsdecode(b"".join(arguments(entry)[-1:]))
        return os.path.dirname(last) == str(self._tasks)
