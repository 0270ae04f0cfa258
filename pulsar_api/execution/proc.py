"""Reads the kernel's table of processes, and signals those that are really meant.

Every function raises `OSError` for want of descriptors or memory, as nobody can tell then.
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
"""A process number and when the process started: one process, until the next boot."""

TICKS = os.sysconf("SC_CLK_TCK")
"""In a second; the kernel gives a start in ticks since the boot."""

_FIELDS = (1, 2, 3, 17, 19)  # of a process's line, counted from its state
_REREADS = 3  # of processes that changed their parent while the table was read
_QUIET = 0.02  # seconds in which no process was started
_WANT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def now() -> int:
    """Return the ticks since the boot."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * TICKS)


def gone(error: OSError) -> None:
    """Take an error for the end of a process, unless it is the want of descriptors."""
    if error.errno in _WANT:
        raise error


class Entry(NamedTuple):
    """What the kernel says of one process."""

    pid: int
    parent: int
    group: int
    session: int
    start: int
    ended: bool
    """Its first thread has, perhaps all."""
    threads: int
    name: bytes

    @property
    def key(self) -> Key:
        """The number alone may soon be somebody else's."""
        return self.pid, self.start

    @property
    def alive(self) -> bool:
        """Whether it runs, and does not only wait for its parent to hear of its end."""
        return not self.ended or self.threads > 1

    @classmethod
    def of(cls, pid: int) -> "Entry | None":
        """Return what the kernel says of a process, None if it is gone."""
        try:
            fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            gone(e)
            return None
        try:
            data = os.read(fd, 1024)
        except OSError as e:
            gone(e)
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
    """All processes, as one reading found them."""

    def __init__(self) -> None:
        self.at = now()
        """When the reading began, in ticks since the boot."""
        self.entries: dict[int, Entry] = {}
        # The newest first: they may not be there for long.
        for name in reversed(os.listdir("/proc")):
            if name.isdigit():
                self._add(int(name))
        for _ in range(_REREADS):
            # If its parent ended meanwhile, a process has another one by now.
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
        """Return a process, None if it is gone or its number is somebody else's."""
        found = self.entries.get(key[0])
        return found if found is not None and found.start == key[1] else None

    def parent(self, of: Entry) -> Entry | None:
        """Return a process's parent, if it can be seen."""
        found = self.entries.get(of.parent)
        # A parent is older than its child: else the number is a stranger's by now.
        return found if found is not None and found.start <= of.start else None

    def line(self, of: Entry) -> Iterator[Entry]:
        """Yield a process, its parent, and so on to the first that can be seen."""
        one: Entry | None = of
        seen: set[int] = set()
        while one is not None and one.pid not in seen:
            seen.add(one.pid)  # readings of different moments could make a circle
            yield one
            one = self.parent(one)

    def children(self, of: Entry) -> list[Entry]:
        """Return a process's children."""
        return [e for e in self._children.get(of.pid, []) if of.start <= e.start]

    def members(self, session: int) -> list[Entry]:
        """Return the processes of a session, without its leader if that is gone."""
        return self._members.get(session, [])

    def below(self, top: Entry, stop: Callable[[Entry], bool]) -> list[Entry]:
        """Return what runs below a process, parents before their children.

        Without the processes at which it has to stop, and what is below them.
        """
        found: list[Entry] = []
        new = [top]
        while new:
            new = [one for e in new for one in self.children(e) if not stop(one)]
            found += new
        return [e for e in found if e.alive]


def kill_groups(numbers: Iterable[int]) -> None:
    """KILL groups of processes, each as a whole at one moment, but not that of this one.

    Each number has to be that of a group which was seen just now: for one that is empty
    no number comes round again so soon.
    """
    for number in set(numbers) - {0, 1, os.getpgrp()}:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(number, signal.SIGKILL)


def chase(ours: Callable[[Entry], bool], seconds: float) -> bool:
    """KILL a process that is never there when a table is read; return whether it was hit.

    It only starts another one like it and ends. But often it is the newest process of
    all. If no process is started at all for a moment, there is no such one.
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
    """What became of a signal."""

    SENT = "sent"
    GONE = "gone"
    DENIED = "denied"
    """The process belongs to somebody whom this one may not signal."""


def send(key: Key, *numbers: int) -> Answer:
    """Signal a process, and never a stranger that got its number meanwhile."""
    try:
        handle = os.pidfd_open(key[0])
    except OSError as e:
        gone(e)
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
    """Return the environment that a process was started with, as far as it can be read."""
    if not found.ended:
        return _read(f"/proc/{found.pid}/environ").split(b"\0")
    # The memory of its first thread is gone; it is still that of the others.
    with suppress(FileNotFoundError, ProcessLookupError):
        for thread in os.listdir(f"/proc/{found.pid}/task"):
            data = _read(f"/proc/{found.pid}/task/{thread}/environ")
            if data:
                return data.split(b"\0")
    return []


def arguments(found: Entry) -> list[bytes]:
    """Return what a process was started with, as far as it can be read."""
    return _read(f"/proc/{found.pid}/cmdline").split(b"\0")[:-1]


def describe(found: Iterable[Entry]) -> list[Process]:
    """Return processes as people want to see them; of those that are gone nothing."""
    result = []
    for one in found:
        try:
            uid = os.stat(f"/proc/{one.pid}").st_uid
        except OSError as e:
            gone(e)
            continue
        # Its arguments may hold a secret, its name does not.
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
        gone(e)
        return b""
