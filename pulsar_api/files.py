"""Opens files below the state folder, whatever a task has put in their place.

A task may run as the account of the daemon, so it can replace each of them by a FIFO, a
link, a folder or a device, and fill it with anything.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

SMALL = 1 << 22
"""Bytes of a small file; one that is larger was not written by us."""

_NEVER = frozenset(
    {errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.ENODEV, errno.EINVAL, errno.ENAMETOOLONG}
)
"""Errors of an open that say that something else is there, and that do not pass."""

_TRIES = 20  # in which a file is put where somebody else keeps putting another one


class Damaged(OSError):
    """A file of a task makes no sense, and never will."""


def open_regular(path: Path, flags: int = os.O_RDONLY) -> int:
    """Open a regular file and return its descriptor; never follow a link, never wait.

    With ``O_CREAT`` a new file is for this user alone.

    Raises `Damaged` if there is something else, or a file that this user may not open;
    `FileNotFoundError` or `NotADirectoryError` if there is nothing; another `OSError` if
    nobody can open it now.
    """
    flags |= os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        try:
            fd = os.open(path, flags, 0o600)
        except PermissionError:
            _give_back(path.parent)
            _give_back(path)
            fd = os.open(path, flags, 0o600)
    except OSError as e:
        # Else the folder above is closed for a while, which is no task's doing.
        there = os.access(path.parent, os.X_OK, effective_ids=True)
        closed = e.errno == errno.EACCES and there
        if closed or e.errno in _NEVER:
            raise Damaged(e.errno, e.strerror, str(path)) from e
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise Damaged(errno.EINVAL, "is not a regular file", str(path))
    return fd


def read(path: Path, most: int = SMALL, *, tail: bool = False) -> bytes:
    """Return a small file; of a larger one the first ``most`` bytes, or the last.

    Raises what `open_regular` raises.
    """
    with open(open_regular(path), "rb") as file:
        if tail:
            file.seek(max(0, os.fstat(file.fileno()).st_size - most))
        return file.read(most)


def make(path: Path) -> int:
    """Make a file in place of what has this name, for this user alone; return a descriptor.

    A folder of this name stays, and is an `OSError`.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    for _ in range(_TRIES):
        with suppress(FileNotFoundError):
            os.unlink(path)
        with suppress(FileExistsError):
            return os.open(path, flags, 0o600)
    raise Damaged(errno.EEXIST, "is made again and again by somebody else", str(path))


def make_folder(path: Path) -> None:
    """Make a folder for this user alone, in place of what has this name and is none.

    A link is removed, and what it leads to stays.
    """
    with suppress(FileNotFoundError):
        if not stat.S_ISDIR(os.stat(path, follow_symlinks=False).st_mode):
            os.unlink(path)
    path.mkdir(mode=0o700, exist_ok=True)
    _give_back(path)


def size(path: Path) -> int:
    """Return the bytes of a regular file; errors as `open_regular`."""
    try:
        found = os.stat(path, follow_symlinks=False)
    except PermissionError:
        _give_back(path.parent)
        found = os.stat(path, follow_symlinks=False)
    except OSError as e:
        if e.errno in _NEVER:
            raise Damaged(e.errno, e.strerror, str(path)) from e
        raise
    if not stat.S_ISREG(found.st_mode):
        raise Damaged(errno.EINVAL, "is not a regular file", str(path))
    return found.st_size


def narrow(path: Path) -> Iterator[Path]:
    """Take all rights of others from a file, or from a folder and all that is in it.

    Yields each path that was open to others. Links are not followed; what belongs to
    another user, or has another name elsewhere, stays as it is.
    """
    folders = []
    with suppress(OSError):
        found = os.stat(path, follow_symlinks=False)
        if _narrow(path, found):
            yield path
        if stat.S_ISDIR(found.st_mode):
            folders.append(path)
    while folders:
        # What is removed meanwhile, or is in too deep, stays as it is.
        with suppress(OSError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(Path(entry.path))
                if _narrow(Path(entry.path), entry.stat(follow_symlinks=False)):
                    yield Path(entry.path)


def _narrow(path: Path, found: os.stat_result) -> bool:
    is_folder = stat.S_ISDIR(found.st_mode)
    ours = found.st_uid == os.geteuid() and (is_folder or found.st_nlink == 1)
    ours = ours and (is_folder or stat.S_ISREG(found.st_mode))
    return bool(
        ours
        and found.st_mode & 0o077
        and _change(path, found, stat.S_IMODE(found.st_mode) & ~0o077)
    )


def _give_back(path: Path) -> None:
    """Let this user read and change what it owns: a task may have taken the right away."""
    with suppress(OSError):
        found = os.stat(path, follow_symlinks=False)
        needed = {stat.S_IFDIR: 0o700, stat.S_IFREG: 0o600}.get(stat.S_IFMT(found.st_mode))
        if needed is not None and found.st_uid == os.geteuid():
            _change(path, found, stat.S_IMODE(found.st_mode) | needed)


def _change(path: Path, found: os.stat_result, mode: int) -> bool:
    """Change the mode of what was found at a path, and of nothing else."""
    # Such a descriptor drops no lock (fcntl(2)) of SQLite when it is closed.
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not os.path.samestat(os.fstat(fd), found):
            return False
        os.chmod(f"/proc/self/fd/{fd}", mode)
    finally:
        os.close(fd)
    return True
