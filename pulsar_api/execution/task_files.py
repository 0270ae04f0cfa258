"""The folder of a task: the names of files in it, and what they prove about its shim."""

from pathlib import Path

from pulsar_api.errors import StoreUnavailable
from pulsar_api.execution.machine import Machine
from pulsar_api.files import Damaged
from pulsar_api.shim import shim

LOCK = "lock"
"""The file that a living shim holds locked."""

EXIT = "exit"
"""The result of a task, present only when it is complete."""

SPEC = "spec"
"""What a shim has to run. It may hold secrets, so the shim removes it."""

PERMIT = "start"
"""The permit that allows a shim to begin."""

USED_PERMIT = "begun"
"""The name that a shim gives to the permit when it begins."""

SECRETS = "secrets"
"""The secrets of a task that is about to start; removed like the spec."""

KILL = "kill"
"""The name of the caller that asked for a kill, if the daemon could not record that."""

BEGUN = frozenset({USED_PERMIT, "output", "output.idx", "cut", "sessions", "exit.tmp"})
"""Files each of which proves that a shim has begun, even if its lock was removed."""

SHIM_FILES = BEGUN | {LOCK, EXIT}
"""All files that a shim makes; a folder without them was never used."""

NOTHING = (FileNotFoundError, NotADirectoryError)
"""Exceptions that say that there is no file, or no folder in which it could be."""


def alive(machine: Machine, folder: Path) -> int:
    """Return the process number of the folder's shim, or 0 if it is not alive.

    The lock is the proof: another process may have the number by now. If the lock is
    damaged, return 0.
    """
    try:
        return machine.holder(folder / LOCK)
    except (*NOTHING, Damaged):
        return 0


def unavailable(path: Path, error: OSError) -> StoreUnavailable:
    """Return the exception that says why a file cannot be used now."""
    return StoreUnavailable(f"{path}: {error.strerror}", full=error.errno in shim.NO_SPACE)
