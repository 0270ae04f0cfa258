"""Creates a cgroup for each task, below that of the daemon (cgroups(7), version 2).

The cgroup of the daemon has to be delegated to it. ``Delegate=`` in a unit of systemd does
that and sets an attribute (systemd.resource-control(5)), which other programs can set too.
"""

import errno
import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from attrs import field, frozen
from twisted.logger import Logger

from pulsar_api.execution import proc
from pulsar_api.execution.proc import Entry
from pulsar_api.shim import shim
from pulsar_api.tasks.model import Limits, Process

_log = Logger()

MARK = "user.delegate"
"""The attribute of a delegated cgroup; its value is 1."""

OWN = "daemon"
"""The cgroup of daemon, launcher and shims, as a cgroup with children has no processes."""

CONTROLLERS = ("cpu", "memory", "pids")
LIMITS = ("cpu.max", "memory.max", "pids.max")
"""The files of a cgroup that limit a task."""

_ENABLED = "cgroup.subtree_control"
_NEW = 3600.0  # seconds; a shim may be about to start its command in an empty cgroup
_PAUSE = 0.005  # seconds between two checks whether a cgroup is empty


def name(task_id: int, permit: str) -> str:
    """Return the name of the cgroup for a task that starts with this permit.

    The last word of a permit does not count: it is a time, which changes with its use.
    """
    lasting = permit.rpartition(" ")[0]
    return f"task-{task_id}-{sha256(lasting.encode()).hexdigest()[:16]}"


def delegated(process: Path = Path("/proc/self")) -> Path | None:
    """Return the cgroup that is delegated to a process, or None."""
    own = _own(process)
    if own is None:
        return None
    for path in [own, own.parent] if own.name == OWN else [own]:
        with suppress(OSError):
            marked = os.getxattr(path, MARK) == b"1"
            writable = os.access(path, os.W_OK) and os.access(
                path / "cgroup.procs", os.W_OK
            )
            # Since Linux 5.14. It is the main purpose of a task's cgroup.
            if marked and writable and (path / "cgroup.kill").exists():
                return path
    return None


def _own(process: Path) -> Path | None:
    """Return the folder of the cgroup of a process, or None."""
    try:
        found = (process / "cgroup").read_bytes().split(b"\n")
        mounts = (process / "mountinfo").read_bytes().split(b"\n")
    except OSError:
        return None
    inside = next((line[3:] for line in found if line.startswith(b"0::")), b"")
    for line in mounts if inside else ():
        # 31 23 0:26 ROOT MOUNT-POINT rw,nosuid shared:9 - cgroup2 cgroup2 rw
        fields, _, rest = (part.split(b" ") for part in line.partition(b" - "))
        if rest[0] == b"cgroup2":
            root, at = (Path(os.fsdecode(_plain(name))) for name in fields[3:5])
            with suppress(ValueError):  # another part of the tree is mounted there
                return at / Path(os.fsdecode(inside)).relative_to(root)
    return None


def _plain(name: bytes) -> bytes:
    """Return a name without the escapes of proc_pid_mountinfo(5)."""
    return re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), name)


def available(root: Path | None) -> frozenset[str]:
    """Return the controllers that the daemon can enable for its tasks."""
    if root is None:
        return frozenset()
    return frozenset(CONTROLLERS) & set((root / "cgroup.controllers").read_text().split())


@frozen
class Cgroups:
    """The tree of cgroups below the delegated one."""

    root: Path
    _lock: int
    """A locked descriptor: no other daemon uses the tree while it is open."""
    _logged: list[str] = field(factory=list, init=False)
    """Errors that were logged already."""

    @classmethod
    def enter(cls, root: Path, now: float) -> "Cgroups | None":
        """Move this process to a cgroup of its own, and prepare the tree for tasks.

        ``now`` is in seconds since the epoch. If this fails, or if another daemon uses the
        tree, log the reason and return None.
        """
        lock = -1
        try:
            lock = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (root / OWN).mkdir(exist_ok=True)
            _move("0", root / OWN)
            found = cls(root, lock)
            found._enable()
            found._tidy(now)
        except OSError as e:
            _log.error("Tasks get no cgroups: {root}: {e}", root=root, e=e)
            if lock >= 0:
                os.close(lock)
            return None
        return found

    def enabled(self) -> frozenset[str]:
        """Return the controllers that can limit tasks now."""
        return frozenset((self.root / _ENABLED).read_text().split())

    def _enable(self) -> None:
        # A cgroup with processes cannot enable controllers for its children. These
        # processes are shims and tasks of a version without cgroups.
        for pid in (self.root / "cgroup.procs").read_text().split():
            with suppress(ProcessLookupError):
                _move(pid, self.root / OWN)
        for controller in sorted(available(self.root) - self.enabled()):
            try:
                (self.root / _ENABLED).write_text(f"+{controller}")
            except OSError as e:
                _log.error(
                    "Cgroups cannot limit {it}: {path}: {e}",
                    it=controller,
                    path=self.root,
                    e=e,
                )

    def _tidy(self, now: float) -> None:
        """Remove old empty cgroups, and set the limits of the others again."""
        for path in self.root.glob("task-*"):
            with suppress(OSError):
                if not _populated(path):
                    if path.stat().st_mtime < now - _NEW:
                        _remove(path)
                    continue
            try:
                # A task that runs as the daemon can write anything there.
                found = _parse(os.getxattr(path, shim.LIMITS))
                _limit(path, [(f, v) for f, v in found if f in LIMITS])
            except OSError as e:
                if e.errno != errno.ENODATA:
                    _log.error("Cannot limit {path} again: {e}", path=path, e=e)

    def make(self, name: str, limits: Limits) -> str:
        """Create a cgroup and return its folder.

        If the kernel refuses it, return "" if there are no limits. If there are, raise
        `OSError`, as the task must not run without them.
        """
        path = self.root / name
        try:
            path.mkdir(exist_ok=True)
            # Language runtimes read their limits there, which our umask would prevent.
            path.chmod(0o755)
            if limits:
                os.setxattr(path, shim.LIMITS, encoded(limits))
                if not all((path / file).exists() for file, _ in limits):
                    self._enable()
                _limit(path, limits)
        except OSError as e:
            if limits:
                raise
            text = os.strerror(e.errno or errno.EIO)
            if text not in self._logged:
                self._logged.append(text)
                _log.error("A task gets no cgroup: {path}: {it}", path=path, it=text)
            return ""
        return str(path)

    def end(self, name: str, patience: float) -> list[Process]:
        """Kill all processes of a cgroup and remove it; return those that do not end.

        Waits at most ``patience`` seconds. Raises `OSError` if descriptors or memory run
        out.
        """
        path = self.root / name
        left: list[Process] = []
        try:
            (path / "cgroup.kill").write_text("1")
            until = time.monotonic() + patience
            while _populated(path) and time.monotonic() < until:
                time.sleep(_PAUSE)
            left = proc.describe(_members(path))
            _remove(path)
        except OSError as e:
            proc.raise_shortage(e)  # it does not exist, or it is not empty
        return left


def _populated(path: Path) -> bool:
    return "populated 1" in (path / "cgroup.events").read_text().splitlines()


def _members(path: Path) -> Iterator[Entry]:
    """Yield the processes of a cgroup and its sub-cgroups."""
    for folder in shim.cgroup_tree(os.fsencode(path)):
        for number in (Path(os.fsdecode(folder)) / "cgroup.procs").read_text().split():
            found = Entry.of(int(number))
            if found is not None and found.alive:
                yield found


def _remove(path: Path) -> None:
    shim.remove_cgroup(os.fsencode(path))


def _move(pid: str, path: Path) -> None:
    (path / "cgroup.procs").write_text(pid)


def encoded(limits: Limits) -> bytes:
    """Return limits as an attribute of a cgroup: lines with a file and its content."""
    return "".join(f"{file} {value}\n" for file, value in limits).encode()


def _parse(data: bytes) -> list[tuple[str, str]]:
    lines = data.decode("ascii", "replace").splitlines()
    return [(file, value) for file, _, value in (line.partition(" ") for line in lines)]


def _limit(path: Path, limits: Limits) -> None:
    for file, value in limits:
        (path / file).write_text(value)
