"""Sessions of tasks, and the file in which the daemon keeps them for the next one."""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from attrs import frozen

from pulsar_api import files
from pulsar_api.execution.proc import TICKS, Table, gone, now
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
        return cls(number, 0 if leader is None else leader.start, table.at + MARGIN)

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


def last_sign(folder: Path, start: int) -> int:
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
