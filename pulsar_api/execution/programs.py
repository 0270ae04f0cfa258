"""The commands that start a shim or the launcher: from the package or compiled copies."""

import os
import py_compile
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import ahocorasick_rs
from attrs import frozen
from twisted.logger import Logger

from pulsar_api import files
from pulsar_api.shim import launcher, masker, shim

_log = Logger()

SHIM_COMMAND = (sys.executable, "-I", "-S", shim.__file__)
"""The command that starts a shim from the package; a task's folder follows."""

LIBRARY = str(Path(ahocorasick_rs.__file__).parents[1])
"""The folder of the library with which the shim masks secrets."""


@frozen
class Programs:
    """The commands that start a shim and the launcher."""

    shim: Sequence[str] = SHIM_COMMAND
    launcher: Sequence[str] = (*SHIM_COMMAND[:-1], launcher.__file__, LIBRARY)


COMPILED = ("masker.pyc", "shim.pyc", "launcher.pyc")
"""The files that `compiled` makes."""

FORMER = ("mask.pyc",)
"""Files that `compiled` made in earlier versions; shims of these may still need them."""


def remove_compiled(folder: Path) -> None:
    """Remove the files that `compiled` has made in a folder, also in earlier versions."""
    for name in (*COMPILED, *FORMER):
        with suppress(OSError):
            (folder / name).unlink()


def compiled(folder: Path) -> Programs:
    """Compile shim and launcher into a folder, and return the commands that start them.

    No task must be able to write to that folder. The copies keep the version of this
    daemon if the package is upgraded before the daemon is restarted. The library that
    masks secrets is not copied: a task with secrets uses the version that is installed
    when the task starts.

    If a copy cannot be written, log it and return the commands of the package.
    """
    try:
        for source, name in zip(
            (masker.__file__, shim.__file__, launcher.__file__), COMPILED, strict=True
        ):
            target = folder / name
            # `compile` replaces no link or FIFO, and gives the copy the mode of the source.
            os.close(files.make(target))
            py_compile.compile(source, str(target), doraise=True)
            for _ in files.narrow(target):
                pass
    except OSError as e:
        _log.error("Cannot write {target}: {e}", target=target, e=e)
        return Programs()
    interpreter = SHIM_COMMAND[:-1]
    return Programs(
        (*interpreter, str(folder / "shim.pyc")),
        (*interpreter, str(folder / "launcher.pyc"), LIBRARY),
    )
