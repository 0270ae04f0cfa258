"""Processes of tasks and how they are ended: a shim, its tree, and what remained.

All of this reads the kernel's table of processes, which takes milliseconds: call it in a
thread. It raises `OSError` for want of descriptors or memory.
"""

import fcntl
import os
import re
import resource
import signal
import time
from collections.abc import Container, Iterable
from contextlib import suppress
from pathlib import Path

from attrs import frozen

from pulsar_api import files
from pulsar_api.execution.proc import (
    Answer,
    Entry,
    Key,
    Table,
    chase,
    describe,
    gone,
    kill_groups,
    lives,
    send,
)
from pulsar_api.shim import shim
from pulsar_api.tasks.model import Process

KILL_PATIENCE = 5.0
"""Seconds from KILL until a process counts as one that does not end."""

LOCK_SIZE = 64
"""Bytes of a lock that are looked at; two numbers are in it."""

_PAUSE = 0.005  # seconds between two looks whether something has ended
_CHASE = 0.1  # seconds in which a process is looked for that no table has


# -- a shim and its lock


def holder(folder: Path) -> Key | None:
    """Return the living shim of a folder.

    The lock says so beyond doubt; a number alone might be somebody else's by now.
    """
    try:
        number = lock_holder(folder / "lock")
    except (FileNotFoundError, NotADirectoryError):
        return None
    found = Entry.of(number) if number > 0 else None
    return None if found is None else found.key


def lock_holder(lock: Path) -> int:
    """Return the number of the process that holds a lock, 0 if nobody does.

    It stands in the file; if a task has damaged that, the kernel is asked. -1 if the number
    is not known. Raises what `open_regular` raises.
    """
    fd = files.open_regular(lock)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        words = os.pread(fd, LOCK_SIZE, 0).split()[:1]
        if words and re.fullmatch(rb"[1-9][0-9]{0,9}", words[0]):
            return int(words[0])
        return _flock_owner(os.fstat(fd)) or -1
    finally:
        os.close(fd)
    return 0


def _flock_owner(found: os.stat_result) -> int:
    """Return who holds a file by flock(2), as proc_locks(5) says; 0 if it does not."""
    device = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}"
    place = f"{device}:{found.st_ino}".encode()
    with open("/proc/locks", "rb") as file:
        for line in file:
            # 4: FLOCK  ADVISORY  WRITE 4711 08:01:131 0 EOF
            fields = line.split()
            if fields[1] == b"FLOCK" and fields[5] == place:
                return max(0, int(fields[4]))
    return 0


def terminate(folder: Path) -> bool:
    """Send TERM to the shim of a folder, and CONT, as a stopped one would not hear it.

    Return whether there was one that could be told.
    """
    found = holder(folder)
    if found is None:
        return False
    try:
        handle = os.pidfd_open(found[0])
    except ProcessLookupError:
        return False
    try:
        # If it still holds the lock, the handle is the shim's.
        if holder(folder) != found:
            return False
        signal.pidfd_send_signal(handle, signal.SIGTERM)
        signal.pidfd_send_signal(handle, signal.SIGCONT)
    except (ProcessLookupError, PermissionError):
        return False
    finally:
        os.close(handle)
    return True


def is_shim(found: Entry) -> bool:
    """Return whether a process is the living shim of a task, of whatever daemon."""
    if found.session != found.pid:
        return False
    try:
        for name in os.listdir(f"/proc/{found.pid}/fd"):
            path = f"/proc/{found.pid}/fd/{name}"
            # It opened its lock by another name, which was removed.
            parent, _, lock = os.readlink(path).rpartition("/")
            if lock.startswith("lock"):
                folder = Path(parent)
                same = os.path.samestat(os.stat(path), os.stat(folder / "lock"))
                if same and holder(folder) == found.key:
                    return True
    except OSError as e:
        gone(e)
    except ValueError:
        pass  # somebody else's file, which is called the same
    return False


# -- who is left alone


class Guard:
    """Says which processes are left alone, even if they count as a task's."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self.me = table.entries[os.getpid()]
        """This daemon; a task of it may have started it."""
        self._above = {one.pid for one in table.line(self.me)}
        self._shims: dict[int, bool] = {}

    def allows(self, found: Entry) -> bool:
        """Return whether a process may be ended by signals (a cgroup is ended as a whole).

        Not process 1, not this daemon and what it started itself, not the living shim of
        any other task and what is below it.
        """
        if found.pid in {1, self.me.pid}:
            return False
        for one in self._table.line(found):
            if one.pid == self.me.pid:
                # What became its child by the death of a parent has another session.
                return found.session != one.session
            # A shim that this daemon itself is below says nothing about what else is.
            if one.pid not in self._above - {found.pid} and self._is_shim(one):
                return False
        return True

    def _is_shim(self, one: Entry) -> bool:
        if one.pid not in self._shims:
            self._shims[one.pid] = one.pid != 1 and is_shim(one)
        return self._shims[one.pid]


# -- ending


@frozen
class Remains:
    """What KILL did not end."""

    denied: tuple[Process, ...] = ()
    """Processes of somebody whom the daemon may not signal."""
    unending: tuple[Process, ...] = ()
    """Processes that were sent KILL and are still there: the kernel holds them."""


def kill(processes: Iterable[Process], patience: float = KILL_PATIENCE) -> Remains:
    """Send KILL to processes and wait until they are gone, for so many seconds."""
    every = [(process.pid, process.start) for process in processes]
    denied = kill_all(every, patience)
    table = Table()
    left = [entry for key in every if (entry := table.get(key)) is not None and entry.alive]
    return Remains(
        tuple(describe(entry for entry in left if entry.key in denied)),
        tuple(describe(entry for entry in left if entry.key not in denied)),
    )


def kill_all(keys: Iterable[Key], patience: float, groups: Iterable[int] = ()) -> set[Key]:
    """Send KILL to processes, then to groups, and wait until the processes are gone.

    Return which may not be signalled.
    """
    answers = {key: send(key, signal.SIGKILL) for key in keys}
    kill_groups(groups)
    until = time.monotonic() + patience
    waiting = [key for key, answer in answers.items() if answer is Answer.SENT]
    while True:
        waiting = [key for key in waiting if lives(key)]
        if not waiting or time.monotonic() >= until:
            break
        time.sleep(_PAUSE)
    return {key for key, answer in answers.items() if answer is Answer.DENIED}


def end_tree(top: Key, patience: float = KILL_PATIENCE) -> list[Process]:
    """End a shim that does not do so itself, and all below it; return what remains.

    Nothing can escape as long as the shim lives. So it is stopped, what is below it is
    sent KILL until nothing is left that can be signalled, and then so is the shim. If it
    is gone already, nothing is done.
    """
    if send(top, signal.SIGSTOP) is Answer.GONE:
        return []
    until = time.monotonic() + patience
    me = os.getpid()

    def below(found: Entry) -> bool:
        one: Entry | None = found
        while one is not None and one.parent not in {0, top[0]} and one.pid != me:
            one = Entry.of(one.parent)
        return one is not None and one.parent == top[0] and one.pid != me

    told: set[Key] = set()
    dead: set[Key] = set()
    while True:
        table = Table()
        shim = table.get(top)
        if shim is None:
            return []
        left = table.below(shim, lambda one: one.pid == me)
        denied = {e.key for e in left if send(e.key, signal.SIGKILL) is Answer.DENIED}
        if time.monotonic() >= until:
            break
        # The shim takes no exit status now. So while no more zombies come, nothing ends
        # below it, and a process that no table has would end all the time.
        zombies = [one for one in table.children(shim) if not one.alive]
        before, dead = dead, {one.key for one in zombies}
        kill_groups({one.group for one in [*left, *zombies]} - {shim.group})
        new = {one.key for one in left} - told
        told |= new
        if not left and dead != before:
            chase(below, _CHASE)
        elif not new and dead == before:
            if {one.key for one in left} <= denied:
                break
            time.sleep(_PAUSE)
    kill_all([top], KILL_PATIENCE)
    return living(describe(left))


def living(processes: Iterable[Process]) -> list[Process]:
    """Return which of these processes still run, with all that runs below them now.

    Not this process, nor the living shim of a task, nor what is below these.
    """
    table = Table()
    me = os.getpid()
    found: dict[int, Entry] = {}
    for process in processes:
        top = table.get((process.pid, process.start))
        if top is not None:
            below = table.below(top, lambda one: one.pid == me or is_shim(one))
            found.update((one.pid, one) for one in [top, *below] if one.alive)
    return describe(found.values())


# -- children that nobody waits for


def become_subreaper() -> None:
    """Make this process the parent of what loses its parent below it (prctl(2)).

    So what a killed shim leaves is below the daemon that started the shim. Whoever calls
    this has to call `Reaper.reap` now and then.
    """
    shim.become_subreaper()


def forbid_new_privileges() -> None:
    """Let no program that is started from now on become more than this process is.

    What is set-uid, such as ``sudo``, runs as who starts it (``no_new_privs``, prctl(2)).
    """
    shim.c_function("prctl", shim.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def keep_capabilities() -> None:
    """Keep the capabilities of this process from all programs started from now on."""
    shim.keep_capabilities()


class Reaper:
    """Takes the exit status of children that this process got by their parent's death.

    ``own`` has the numbers of those that it waits for itself. Call `reap` now and then, in
    the thread that starts processes.
    """

    def __init__(self, own: Container[int]) -> None:
        self._own = own
        self._seen: set[Key] = set()

    def reap(self) -> int:
        """Take the status of those that nobody has taken since the last call.

        Return how many there were. Costs nothing to speak of if no child has ended.
        """
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        try:
            if os.waitid(os.P_ALL, 0, flags) is None:
                self._seen = set()
                return 0
        except ChildProcessError:
            return 0
        table = Table()
        children = table.children(table.entries[os.getpid()])
        dead = {e.key for e in children if not e.alive and e.pid not in self._own}
        for pid, _ in dead & self._seen:
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        reaped = len(dead & self._seen)
        self._seen = dead - self._seen
        return reaped


def raise_file_limit() -> tuple[int, int]:
    """Allow as many open files as the system lets us; return the old and the new limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, 65536) if hard != resource.RLIM_INFINITY else 65536
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return soft, wanted
    return soft, soft
