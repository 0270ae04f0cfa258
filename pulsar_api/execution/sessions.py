"""Sessions of tasks, and the file in which the daemon keeps them for the next one."""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from attrs import frozen

from pulsar_api import files
from pulsar_api.execution.proc import TICKS, Table, now, raise_shortage
from pulsar_api.shim import shim

SESSIONS = "sessions"
"""The file in a task's folder that has the sessions of its processes."""

MOST_SESSIONS = 1024
"""Sessions that the daemon remembers of one task."""

MARGIN = TICKS
"""Ticks within which the kernel gives no process number a second time."""

_MOST_NOTED = 1 << 17  # bytes of the file
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@frozen
class Session:
    """A session of a task, with what tells it from a later one of the same number."""

    id: int
    leader: int
    """The start time of its leader; 0 if that had ended before it was seen."""
    seen: int
    """Until when it is known to be the task's, in ticks since the boot."""

    @classmethod
    def of(cls, table: Table, number: int) -> "Session":
        """Return the session with a number; it must have a process in the table."""
        leader = table.entries.get(number)
        return cls(number, 0 if leader is None else leader.start, table.at + MARGIN)

    def goes_on(self, table: Table) -> bool:
        """Return whether the session that has this number now is still this one.

        No other session gets the number as long as this one has a process. And a process
        leaves its session only for a new one. So a process that is in it now has been in
        it since its start; it is in this session if it started while this one existed.
        """
        leader = table.entries.get(self.id)
        if leader is not None:
            return leader.start == self.leader
        return any(entry.start <= self.seen for entry in table.members(self.id))


def read_sessions(folder: Path) -> dict[int, Session]:
    """Return the sessions of a task that a daemon has written since the last boot."""
    try:
        boot, *lines = files.read(folder / SESSIONS, _MOST_NOTED).splitlines()
        if boot != _BOOT.read_bytes().strip():
            return {}
        found = [Session(*map(int, line.split())) for line in lines[:MOST_SESSIONS]]
    except OSError as e:
        raise_shortage(e)
        return {}
    except (ValueError, TypeError):
        return {}  # the daemon was killed while it wrote the file
    # 0 is the session of processes outside of this container.
    return {session.id: session for session in found if session.id > 0}


def write_sessions(folder: Path, sessions: Iterable[Session]) -> None:
    """Write the sessions of a task to its folder, for the next daemon.

    The file is not synced: after a boot it is useless anyway.
    """
    lines = [_BOOT.read_bytes().strip()]
    lines += [b"%d %d %d" % (s.id, s.leader, s.seen) for s in sessions]
    new = folder / f"{SESSIONS}.tmp"
    with open(files.make(new), "wb") as file:
        file.write(b"\n".join([*lines, b""]))
    os.rename(new, folder / SESSIONS)


def last_sign(folder: Path, start: int) -> int:
    """Return when a dead shim is last known to have lived, in ticks since the boot."""
    at = 0
    with (
        suppress(FileNotFoundError, NotADirectoryError, files.Damaged),
        open(files.open_regular(folder / "output.idx"), "rb") as file,
    ):
        records = os.stat(file.fileno()).st_size // shim.RECORD
        if records:
            file.seek((records - 1) * shim.RECORD)
            at = int.from_bytes(file.read(shim.RECORD)[8:], "little") >> 8
    # ``at`` counts milliseconds from a moment after the start of the shim.
    return min(start + at * TICKS // 1000, now())
