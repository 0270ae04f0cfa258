"""Opens files below the state folder, which a task may have replaced by anything.

A task may run under the account of the daemon. So it can replace each file by a FIFO, a
link, a folder or a device, or fill it with anything.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

SMALL = 1 << 22
"""Bytes of a small file; the daemon writes no larger one."""

_NEVER = frozenset(
    {errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.ENODEV, errno.EINVAL, errno.ENAMETOOLONG}
)
"""Errors of open(2) that mean that the path is no regular file, and that do not pass."""

_TRIES = 20  # to create a file where a task keeps creating another one


class Damaged(OSError):
    """A file of a task makes no sense, and trying again does not help."""


def open_regular(path: Path, flags: int = os.O_RDONLY) -> int:
    """Open a regular file and return its descriptor, without following links or waiting.

    With ``O_CREAT`` a new file is for this user only.

    Raises `Damaged` if the path is not a regular file, or if this user is not permitted to
    open it; `FileNotFoundError` or `NotADirectoryError` if there is none; and another
    `OSError` if it cannot be opened now.
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
        # Otherwise the folder above is closed for a while, which no task has caused.
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
    """Return the content of a file: its first ``most`` bytes, or with ``tail`` the last.

    Raises what `open_regular` raises.
    """
    with open(open_regular(path), "rb") as file:
        if tail:
            file.seek(max(0, os.fstat(file.fileno()).st_size - most))
        return file.read(most)


def make(path: Path) -> int:
    """Create a file for this user only, in place of the old one; return a descriptor.

    Raises `OSError` if there is a folder with this name, which stays.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    for _ in range(_TRIES):
        with suppress(FileNotFoundError):
            os.unlink(path)
        with suppress(FileExistsError):
            return os.open(path, flags, 0o600)
    raise Damaged(errno.EEXIST, "is created again and again by another process", str(path))


def make_folder(path: Path) -> None:
    """Create a folder for this user only, in place of a file or link with this name.

    A link is removed, but not its target. An existing folder stays.
    """
    with suppress(FileNotFoundError):
        if not stat.S_ISDIR(os.stat(path, follow_symlinks=False).st_mode):
            os.unlink(path)
    path.mkdir(mode=0o700, exist_ok=True)
    _give_back(path)


def size(path: Path) -> int:
    """Return the size of a regular file in bytes.

    It raises the errors of `open_regular`.
    """
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
    """Remove the permissions of other users from a file, or from a folder and its content.

    Yield each path that other users could access. Links are not followed. Files of other
    users, and files with more than one name, are not changed.
    """
    folders = []
    with suppress(OSError):
        found = os.stat(path, follow_symlinks=False)
        if _narrow(path, found):
            yield path
        if stat.S_ISDIR(found.st_mode):
            folders.append(path)
    while folders:
        # Skip what is removed meanwhile, or nested too deep.
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
    """Restore this user's permissions on what it owns: a task may have removed them."""
    with suppress(OSError):
        found = os.stat(path, follow_symlinks=False)
        needed = {stat.S_IFDIR: 0o700, stat.S_IFREG: 0o600}.get(stat.S_IFMT(found.st_mode))
        if needed is not None and found.st_uid == os.geteuid():
            _change(path, found, stat.S_IMODE(found.st_mode) | needed)


def _change(path: Path, found: os.stat_result, mode: int) -> bool:
    """Change the mode of what was found at a path, unless it was replaced meanwhile."""
    # With O_PATH, closing the descriptor drops no lock (fcntl(2)) of SQLite.
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not os.path.samestat(os.fstat(fd), found):
            return False
        os.chmod(f"/proc/self/fd/{fd}", mode)
    finally:
        os.close(fd)
    return True
