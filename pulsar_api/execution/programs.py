"""How the shim and the launcher are started: from the package, or from compiled copies."""

import os
import py_compile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import ahocorasick_rs
from attrs import frozen
from twisted.logger import Logger

from pulsar_api import files
from pulsar_api.execution.machine import SHIM_COMMAND
from pulsar_api.shim import launcher, masker, shim

_log = Logger()

LIBRARY = str(Path(ahocorasick_rs.__file__).parents[1])
"""Where the shim finds what it masks secrets with."""


@frozen
class Programs:
    """How what stands between the daemon and its commands is started."""

    shim: Sequence[str] = SHIM_COMMAND
    launcher: Sequence[str] = (*SHIM_COMMAND[:-1], launcher.__file__, LIBRARY)


COMPILED = ("masker.pyc", "shim.pyc", "launcher.pyc")
"""The files that `compiled` makes."""


def remove_compiled(folder: Path) -> None:
    """Remove the files that `compiled` has made in a folder."""
    for name in COMPILED:
        with suppress(OSError):
            (folder / name).unlink()


def compiled(folder: Path) -> Programs:
    """Return how to start shim and launcher from compiled copies, made in the folder.

    No task may be able to write there. A copy keeps the version of this daemon, whatever an
    upgrade of the package does before the daemon is restarted. But the library that masks
    secrets is not copied: a task with secrets uses the one that is installed at its start.
    """
    try:
        for source, name in zip(
            (masker.__file__, shim.__file__, launcher.__file__), COMPILED, strict=True
        ):
            target = folder / name
            # It replaces no link and no FIFO by itself, and gives the rights of the source.
            os.close(files.make(target))
            py_compile.compile(source, str(target), doraise=True)
            for _ in files.narrow(target):
                pass
    except OSError as e:
        _log.error("Cannot write {target}: {e}", target=target, e=e)
        return Programs()
    before = SHIM_COMMAND[:-1]
    return Programs(
        (*before, str(folder / "shim.pyc")),
        (*before, str(folder / "launcher.pyc"), LIBRARY),
    )
