"""Finds the shims of tasks, and ends processes: a shim, its tree, and what is left.

The functions read the kernel's table of processes, which takes milliseconds: call them in
a thread. They raise `OSError` if descriptors or memory run out.
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
    kill_groups,
    lives,
    raise_shortage,
    send,
)
from pulsar_api.shim import shim
from pulsar_api.tasks.model import Process

KILL_PATIENCE = 5.0
"""Seconds after KILL from which a process counts as one that does not end."""

LOCK_SIZE = 64
"""Bytes of a lock that are read; it has two numbers."""

_PAUSE = 0.005  # seconds between two checks whether something has ended
_CHASE = 0.1  # seconds in which to look for a process that is in no table, see `chase`


# -- a shim and its lock


def holder(folder: Path) -> Key | None:
    """Return the living shim of a folder, or None.

    The lock is the proof: another process may have the number by now.
    """
    try:
        number = lock_holder(folder / "lock")
    except (FileNotFoundError, NotADirectoryError):
        return None
    found = Entry.of(number) if number > 0 else None
    return None if found is None else found.key


def lock_holder(lock: Path) -> int:
    """Return the number of the process that holds a lock, or 0 if none does.

    The number is in the file; if a task has damaged that, the kernel is asked. Return -1
    if the number is not known. Raises what `open_regular` raises.
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
    """Return the process that holds a file by flock(2), see proc_locks(5); or 0."""
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
    """Send TERM to the shim of a folder, and CONT, as it may be stopped.

    Return whether there was a shim that could be signalled.
    """
    found = holder(folder)
    if found is None:
        return False
    try:
        handle = os.pidfd_open(found[0])
    except ProcessLookupError:
        return False
    try:
        # If the number still holds the lock, the handle is that of the shim.
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
    """Return whether a process is the living shim of a task, of any daemon."""
    if found.session != found.pid:
        return False
    try:
        for name in os.listdir(f"/proc/{found.pid}/fd"):
            path = f"/proc/{found.pid}/fd/{name}"
            # The shim has opened its lock by another name, which was removed later.
            parent, _, lock = os.readlink(path).rpartition("/")
            if lock.startswith("lock"):
                folder = Path(parent)
                same = os.path.samestat(os.stat(path), os.stat(folder / "lock"))
                if same and holder(folder) == found.key:
                    return True
    except OSError as e:
        raise_shortage(e)
    except ValueError:
        pass  # another program's file with the same name
    return False


# -- processes that must not be ended


class Guard:
    """Decides which processes must not be ended, even if they seem to be a task's."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self.me = table.entries[os.getpid()]
        """This daemon, which a task may have started."""
        self._above = {one.pid for one in table.line(self.me)}
        self._shims: dict[int, bool] = {}

    def allows(self, found: Entry) -> bool:
        """Return whether a process may be killed by a signal.

        Protected are process 1, this daemon and what it has started itself, and the living
        shims of other tasks with all processes below them.
        """
        if found.pid in {1, self.me.pid}:
            return False
        for one in self._table.line(found):
            if one.pid == self.me.pid:
                # A process that became its child when its parent died has another session.
                return found.session != one.session
            # If this daemon itself runs below a shim, that shim protects nothing.
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
    """The processes that KILL did not end."""

    denied: tuple[Process, ...] = ()
    """Processes of users that the daemon is not permitted to signal."""
    unending: tuple[Process, ...] = ()
    """Processes that the kernel does not end although they were sent KILL."""


def kill(processes: Iterable[Process], patience: float = KILL_PATIENCE) -> Remains:
    """Send KILL to processes and wait until they have ended, or patience is out."""
    every = [(process.pid, process.start) for process in processes]
    denied = kill_all(every, patience)
    table = Table()
    left = [entry for key in every if (entry := table.get(key)) is not None and entry.alive]
    return Remains(
        tuple(describe(entry for entry in left if entry.key in denied)),
        tuple(describe(entry for entry in left if entry.key not in denied)),
    )


def kill_all(keys: Iterable[Key], patience: float, groups: Iterable[int] = ()) -> set[Key]:
    """Send KILL to processes, then to groups, and wait until the processes have ended.

    Return the processes that this one is not permitted to signal.
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
    """Kill a shim and all processes below it; return those that remain.

    No process can escape while the shim lives. So the shim is stopped, KILL is sent to all
    processes below it until none is left that can be signalled, and last to the shim. If
    the shim has ended already, nothing is done.
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
        # The stopped shim reaps nothing. So as long as no zombie is added, no process below
        # it ends; a process that is in no table would end all the time.
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
    """Return those of the processes that still run, with all that run below them now.

    This process and living shims of tasks are left out, with all processes below them.
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


# -- adopted children


def become_subreaper() -> None:
    """Make this process the parent of descendants that lose their parent (prctl(2)).

    So the processes of a task whose shim was killed stay below the daemon. The caller has
    to call `Reaper.reap` regularly.
    """
    shim.become_subreaper()


def forbid_new_privileges() -> None:
    """Let no program that is started from now on gain privileges.

    A set-uid program such as ``sudo`` then runs as its caller (``no_new_privs``, prctl(2)).
    """
    shim.c_function("prctl", shim.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def keep_capabilities() -> None:
    """Give no capabilities to programs that are started from now on."""
    shim.keep_capabilities()


class Reaper:
    """Reaps children that this process has adopted when their parents died.

    ``own_children`` has the numbers of those that it reaps elsewhere. Call `reap`
    regularly, in the thread that starts processes.
    """

    def __init__(self, own_children: Container[int]) -> None:
        self._own_children = own_children
        self._seen: set[Key] = set()

    def reap(self) -> int:
        """Reap those that have been zombies since the last call; return their number.

        This is cheap if no child has ended.
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
        dead = {e.key for e in children if not e.alive and e.pid not in self._own_children}
        for pid, _ in dead & self._seen:
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        reaped = len(dead & self._seen)
        self._seen = dead - self._seen
        return reaped


def raise_file_limit() -> tuple[int, int]:
    """Raise the limit of open files, up to 65536; return the old and the new soft limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, 65536) if hard != resource.RLIM_INFINITY else 65536
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return soft, wanted
    return soft, soft
