"""The state folder: its lock, the names in it, and the rights to them."""

import fcntl
import os
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

from twisted.logger import Logger

from pulsar_api import files
from pulsar_api.auth import audit, credentials
from pulsar_api.errors import SettingsError
from pulsar_api.execution import programs

_log = Logger()

DATABASE = "pulsar-api.db"
TASKS = "tasks"
LISTINGS = "listings"
_NAMED = 20  # the log names at most this many files that were open to other users


def make_folder(option: str, path: Path) -> None:
    """Create a folder unless it exists.

    Raises:
        SettingsError: The folder cannot be created or written; the message begins with the
            ``option`` that names it.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as e:
        raise SettingsError(f"{option}: cannot create {path}: {e.strerror}") from None
    if not os.access(path, os.W_OK | os.X_OK, effective_ids=True):
        raise SettingsError(f"{option}: {path} is not writable")


def lock(state: Path) -> int:
    """Return a descriptor that keeps other daemons out as long as it is open.

    Raises:
        SettingsError: Another daemon has the lock, or the file cannot be opened.
    """
    path = state / "lock"
    try:
        fd = files.open_regular(path, os.O_RDWR | os.O_CREAT)
    except OSError as e:
        raise SettingsError(f"--state-dir: cannot open {path}: {e.strerror}") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        text = f"--state-dir: another pulsar-api uses {state}. Give each its own folder"
        raise SettingsError(text) from None
    return fd


OWN = (
    *("lock", "permits", "secrets", LISTINGS),
    *programs.COMPILED,
    *programs.FORMER,
    *(
        f"{name}{end}"
        for name in (DATABASE, credentials.FILE)
        for end in ("", "-wal", "-shm")
    ),
    *(f"{name}*" for name in (audit.FILE, audit.ACCESS_FILE)),
)
"""The daemon's own files in the state folder, without the folder of the tasks."""


def narrow(paths: Iterable[Path]) -> None:
    """Take all rights of other users from these files and folders, and log the changes."""
    number = 0
    for number, path in enumerate(chain.from_iterable(map(files.narrow, paths)), 1):
        if number <= _NAMED:
            _log.warn("{path} was open to other users; this is now mended", path=path)
    if number > _NAMED:
        _log.warn("{n} more files and folders were, too", n=number - _NAMED)
