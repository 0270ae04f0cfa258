"""Makes a cgroup for each task, below that of the daemon (cgroups(7), version 2).

The cgroup of the daemon has to be delegated to it. ``Delegate=`` in a unit of systemd does
that and sets an attribute (systemd.resource-control(5)); anybody else can set it as well.
"""

import errno
import fcntl
import json
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from attrs import field, frozen
from twisted.logger import Logger

from pulsar_api import proc
from pulsar_api.proc import Entry
from pulsar_api.task import Limits, Process

_log = Logger()

MARK = "user.delegate"
"""The attribute of a delegated cgroup; its value is 1."""

OWN = "daemon"
"""The cgroup of daemon, launcher and shims: a cgroup with sub-cgroups has no processes."""

CONTROLLERS = ("cpu", "memory", "pids")
LIMITS = ("cpu.max", "memory.max", "pids.max")
"""The files of a cgroup that limit a task."""

_LIMITS = "user.pulsar-api.limits"
_NEW = 3600.0  # seconds; a shim may be about to start its command in an empty cgroup
_PAUSE = 0.005  # seconds between two looks whether a cgroup is empty


def name(task_id: int, permit: str) -> str:
    """Return the name of the cgroup for a task that starts with this permit."""
    return f"task-{task_id}-{sha256(permit.encode()).hexdigest()[:16]}"


def delegated(process: Path = Path("/proc/self")) -> Path | None:
    """Return the cgroup that is delegated to a process, None if there is none."""
    own = _own(process)
    if own is None:
        return None
    for path in [own, own.parent] if own.name == OWN else [own]:
        with suppress(OSError):
            marked = os.getxattr(path, MARK) == b"1"
            writable = os.access(path, os.W_OK) and os.access(
                path / "cgroup.procs", os.W_OK
            )
            # Linux has it since 5.14. It is the main use of a task's cgroup.
            if marked and writable and (path / "cgroup.kill").exists():
                return path
    return None


def _own(process: Path) -> Path | None:
    """Return the folder of a process's cgroup."""
    try:
        found = (process / "cgroup").read_text()
        mounts = (process / "mountinfo").read_text()
    except OSError:
        return None
    inside = next((line[3:] for line in found.splitlines() if line[:3] == "0::"), None)
    for line in mounts.splitlines() if inside is not None else ():
        fields = line.split()
        if fields[fields.index("-") + 1] == "cgroup2":
            with suppress(ValueError):  # another part of the tree is mounted there
                return Path(fields[4]) / Path(inside or "/").relative_to(fields[3])
    return None


def available(root: Path | None) -> frozenset[str]:
    """Return the controllers that the daemon can enable for its tasks."""
    if root is None:
        return frozenset()
    return frozenset(CONTROLLERS) & set((root / "cgroup.controllers").read_text().split())


@frozen
class Cgroups:
    """The tree of cgroups below the one that is delegated."""

    root: Path
    _lock: int
    """A descriptor; no other daemon uses the tree while it is open."""
    _logged: list[str] = field(factory=list, init=False)
    """Errors that are in the log already."""

    @classmethod
    def enter(cls, root: Path) -> "Cgroups | None":
        """Move this process to its own cgroup, and prepare the tree for those of tasks.

        Return None, and log the reason, if that fails or another daemon uses the tree.
        """
        try:
            lock = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            own = root / OWN
            own.mkdir(exist_ok=True)
            (own / "cgroup.procs").write_text("0")
        except OSError as e:
            _log.error("Tasks get no cgroups: {root}: {e}", root=root, e=e)
            return None
        for controller in sorted(available(root)):
            try:
                (root / "cgroup.subtree_control").write_text(f"+{controller}")
            except OSError as e:
                _log.error(
                    "Cgroups cannot limit {it}: {root}: {e}", it=controller, root=root, e=e
                )
        found = cls(root, lock)
        found._tidy()
        return found

    def _tidy(self) -> None:
        """Remove old empty cgroups, and set the limits of the others again."""
        for path in self.root.glob("task-*"):
            with suppress(OSError, ValueError, TypeError):
                if _populated(path):
                    # A task that runs as the daemon can write anything there.
                    found = dict(json.loads(os.getxattr(path, _LIMITS)))
                    _limit(path, [(f, str(found[f])) for f in LIMITS if f in found])
                elif path.stat().st_mtime < time.time() - _NEW:
                    path.rmdir()

    def make(self, name: str, limits: Limits) -> str:
        """Make a cgroup and return its folder.

        Return "" if the kernel refuses it and there are no limits. Raise `OSError` if there
        are: the task must not run without them.
        """
        path = self.root / name
        try:
            path.mkdir(exist_ok=True)
            # Language runtimes read their limits there. Our umask would forbid it.
            path.chmod(0o755)
            if limits:
                os.setxattr(path, _LIMITS, json.dumps(list(limits)).encode())
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

        Wait at most ``patience`` seconds. Raise `OSError` if descriptors or memory run out.
        """
        path = self.root / name
        left: list[Process] = []
        try:
            (path / "cgroup.kill").write_text("1")
            until = time.monotonic() + patience
            while _populated(path) and time.monotonic() < until:
                time.sleep(_PAUSE)
            left = proc.describe(_members(path))
            path.rmdir()
        except OSError as e:
            proc.gone(e)  # it does not exist, or it is not empty
        return left


def _populated(path: Path) -> bool:
    return "populated 1" in (path / "cgroup.events").read_text().splitlines()


def _members(path: Path) -> Iterable[Entry]:
    for number in (path / "cgroup.procs").read_text().split():
        found = Entry.of(int(number))
        if found is not None and found.alive:
            yield found


def _limit(path: Path, limits: Limits) -> None:
    for file, value in limits:
        (path / file).write_text(value)
