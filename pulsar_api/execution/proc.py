"""Reads the kernel's table of processes, and signals processes without mistakes.

Every function raises `OSError` if descriptors or memory run out.
"""

import errno
import os
import pwd
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from enum import Enum
from typing import NamedTuple

from pulsar_api.tasks.model import Process

Key = tuple[int, int]
"""A process number and a start time: they name one process until the next boot."""

TICKS = os.sysconf("SC_CLK_TCK")
"""Ticks per second; the kernel gives start times in ticks since the boot."""

_FIELDS = (1, 2, 3, 17, 19)  # of /proc/PID/stat, counted from the state
_REREADS = 3  # of processes whose parent changed while the table was read
_QUIET = 0.02  # seconds without a new process that prove that nobody forks
_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def now() -> int:
    """Return the ticks since the boot."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * TICKS)


def raise_shortage(error: OSError) -> None:
    """Raise an error again if descriptors or memory have run out.

    Every other error means that the process has ended, or cannot be read.
    """
    if error.errno in _SHORTAGES:
        raise error


class Entry(NamedTuple):
    """One process, as the kernel describes it."""

    pid: int
    parent: int
    group: int
    session: int
    start: int
    ended: bool
    """Whether its first thread has ended, and perhaps all threads."""
    threads: int
    name: bytes

    @property
    def key(self) -> Key:
        """What names this process; another one may get its number."""
        return self.pid, self.start

    @property
    def alive(self) -> bool:
        """Whether it runs, and is not only a zombie."""
        return not self.ended or self.threads > 1

    @classmethod
    def of(cls, pid: int) -> "Entry | None":
        """Return the process with a number, or None if there is none."""
        try:
            fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise_shortage(e)
            return None
        try:
            data = os.read(fd, 1024)
        except OSError as e:
            raise_shortage(e)
            return None
        finally:
            os.close(fd)
        if not data:
            return None
        # The name in the second field may hold anything, also ") Z 1" (proc(5)).
        end = data.rindex(b")")
        fields = data[end + 2 :].split()
        parent, group, session, threads, start = (int(fields[n]) for n in _FIELDS)
        name = data[data.index(b"(") + 1 : end]
        ended = fields[0] in b"ZX"
        return cls(pid, parent, group, session, start, ended, threads, name)


def lives(key: Key) -> bool:
    """Return whether a process still runs."""
    found = Entry.of(key[0])
    return found is not None and found.key == key and found.alive


class Table:
    """All processes at one moment."""

    def __init__(self) -> None:
        self.at = now()
        """When the table was read, in ticks since the boot."""
        self.entries: dict[int, Entry] = {}
        # The newest first: they may end soon.
        for name in reversed(os.listdir("/proc")):
            if name.isdigit():
                self._add(int(name))
        for _ in range(_REREADS):
            # If its parent has ended meanwhile, a process has another parent by now.
            adrift = [e for e in self.entries.values() if self._adrift(e)]
            for found in adrift:
                del self.entries[found.pid]
                self._add(found.pid)
                again = self.entries.get(found.pid)
                if again is not None and self._adrift(again):
                    self._add(again.parent)
            if not adrift:
                break
        self._children: dict[int, list[Entry]] = {}
        self._members: dict[int, list[Entry]] = {}
        for found in self.entries.values():
            self._children.setdefault(found.parent, []).append(found)
            self._members.setdefault(found.session, []).append(found)

    def _add(self, pid: int) -> None:
        found = Entry.of(pid)
        if found is not None:
            self.entries[pid] = found

    def _adrift(self, found: Entry) -> bool:
        return found.parent != 0 and self.parent(found) is None

    def get(self, key: Key) -> Entry | None:
        """Return a process, or None if it has ended."""
        found = self.entries.get(key[0])
        return found if found is not None and found.start == key[1] else None

    def parent(self, of: Entry) -> Entry | None:
        """Return the parent of a process, or None if it is not in the table."""
        found = self.entries.get(of.parent)
        # A parent is older than its child; otherwise another process has the number.
        return found if found is not None and found.start <= of.start else None

    def line(self, of: Entry) -> Iterator[Entry]:
        """Yield a process, its parent, and so on, as far as they are in the table."""
        one: Entry | None = of
        seen: set[int] = set()
        while one is not None and one.pid not in seen:
            seen.add(one.pid)  # entries are read one by one and might form a circle
            yield one
            one = self.parent(one)

    def children(self, of: Entry) -> list[Entry]:
        """Return the children of a process."""
        return [e for e in self._children.get(of.pid, []) if of.start <= e.start]

    def members(self, session: int) -> list[Entry]:
        """Return the processes of a session; its leader may have ended."""
        return self._members.get(session, [])

    def below(self, top: Entry, stop: Callable[[Entry], bool]) -> list[Entry]:
        """Return the descendants of a process that run, parents before their children.

        Processes for which ``stop`` is true are left out, with all below them.
        """
        found: list[Entry] = []
        new = [top]
        while new:
            new = [one for e in new for one in self.children(e) if not stop(one)]
            found += new
        return [e for e in found if e.alive]


def kill_groups(numbers: Iterable[int]) -> None:
    """Send KILL to process groups, each as a whole, but never to the group of this process.

    Pass only groups that were seen just now: even if one is empty, the kernel does not
    give its number to another one so soon.
    """
    for number in set(numbers) - {0, 1, os.getpgrp()}:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(number, signal.SIGKILL)


def chase(ours: Callable[[Entry], bool], seconds: float) -> bool:
    """Send KILL to a process that is in no table; return whether one was found.

    Such a process only forks and ends, again and again. But it is often the newest process
    of the machine. If no process is started for a moment, there is none like that.
    """
    until = time.monotonic() + seconds
    last, since = 0, 0.0
    while (moment := time.monotonic()) < until:
        with open("/proc/loadavg", "rb", buffering=0) as file:
            newest = int(file.read(128).split()[4])
        if newest != last:
            last, since = newest, moment
            found = Entry.of(newest)
            if found is None or not found.alive or not ours(found):
                continue
            if send(found.key, signal.SIGKILL) is Answer.SENT:
                return True
        elif moment > since + _QUIET:
            break
    return False


class Answer(Enum):
    """The outcome of a signal."""

    SENT = "sent"
    GONE = "gone"
    DENIED = "denied"
    """The process has a user that this one is not permitted to signal."""


def send(key: Key, *numbers: int) -> Answer:
    """Signal a process, but never another one that has got its number meanwhile."""
    try:
        handle = os.pidfd_open(key[0])
    except OSError as e:
        raise_shortage(e)
        return Answer.GONE
    try:
        # From here on the handle names the process, not the number.
        found = Entry.of(key[0])
        if found is None or found.key != key:
            return Answer.GONE
        for number in numbers:
            signal.pidfd_send_signal(handle, number)
    except PermissionError:
        return Answer.DENIED
    except ProcessLookupError:
        return Answer.GONE
    finally:
        os.close(handle)
    return Answer.SENT


def environ(found: Entry) -> list[bytes]:
    """Return the environment with which a process was started, or [] if unreadable."""
    if not found.ended:
        return _read(f"/proc/{found.pid}/environ").split(b"\0")
    # The first thread has ended; the others still have its memory.
    with suppress(FileNotFoundError, ProcessLookupError):
        for thread in os.listdir(f"/proc/{found.pid}/task"):
            data = _read(f"/proc/{found.pid}/task/{thread}/environ")
            if data:
                return data.split(b"\0")
    return []


def arguments(found: Entry) -> list[bytes]:
    """Return the arguments of a process, or [] if they cannot be read."""
    return _read(f"/proc/{found.pid}/cmdline").split(b"\0")[:-1]


def describe(found: Iterable[Entry]) -> list[Process]:
    """Return descriptions of the processes that still exist."""
    result = []
    for one in found:
        try:
            uid = os.stat(f"/proc/{one.pid}").st_uid
        except OSError as e:
            raise_shortage(e)
            continue
        # The arguments may contain a secret; the name does not.
        text = one.name.decode("utf-8", "replace")
        name = "".join(c if c.isprintable() else "?" for c in text)
        result.append(Process(one.pid, one.start, name, _user(uid)))
    return result


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _read(path: str) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:
            return file.readall()
    except OSError as e:
        raise_shortage(e)
        return b""
