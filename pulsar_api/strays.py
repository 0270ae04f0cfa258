"""Finds and ends the processes of a task whose shim was killed and ends them no more."""

import errno
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

MARK = "PULSAR_TASK_FOLDER"
"""A variable in the environment of each process of a task; its value is the folder."""


def kill(folder: Path) -> bool:
    """Send KILL to every process of a task; return whether there was one.

    Raises `OSError` if nobody can look, for want of descriptors or memory.
    They are known by what the kernel says of their environment, never by a number that
    was remembered. A program that empties its environment is not found.
    """
    found = False
    for pid in _marked(folder):
        try:
            handle = os.pidfd_open(pid)
        except OSError as e:
            _gone(e)
            continue
        try:
            # The handle names one process for ever; look again whether it is ours.
            if _is_marked(pid, folder):
                found = True
                with suppress(OSError):
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
        finally:
            os.close(handle)
    return found


def _gone(error: OSError) -> None:
    """Take an error for the end of a process, unless it is the want of descriptors."""
    if error.errno in {errno.EMFILE, errno.ENFILE, errno.ENOMEM}:
        raise error


def _marked(folder: Path) -> Iterator[int]:
    for name in os.listdir("/proc"):
        # Not ourselves, should a task of this daemon have started it.
        ours = name == str(os.getpid())
        if name.isdigit() and not ours and _is_marked(int(name), folder):
            yield int(name)


def _is_marked(pid: int, folder: Path) -> bool:
    mark = b"%s=%s" % (MARK.encode(), os.fsencode(folder))
    environ = _environ(Path(f"/proc/{pid}"))
    if environ:
        return mark in environ
    # It has ended and only waits for its parent, or its first thread has and others go on.
    return any(mark in _environ(path) for path in Path(f"/proc/{pid}/task").glob("*"))


def _environ(path: Path) -> list[bytes]:
    try:
        data = (path / "environ").read_bytes()
    except OSError as e:
        _gone(e)
        return []
    return data.split(b"\0") if data else []
