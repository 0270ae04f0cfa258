"""The audit log: who asked for what, from where, and whether it was allowed."""

import heapq
import json
import os
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from attrs import define, field
from twisted.logger import Logger

from pulsar_api import files
from pulsar_api.auth.rights import Caller
from pulsar_api.principal import Principal

_log = Logger()

FILE = "audit.log"
"""The file of changes."""
ACCESS_FILE = "audit-access.log"
"""The file of sign-ins and sign-outs, refusals, and requests without effect."""
MAX_SIZE = 10 << 20
"""Bytes after which a new file is begun."""
REFUSALS = 100
"""Refusals of one user, or of all unknown callers, that are logged a minute."""
VISITS = 100
"""Sign-ins, sign-outs and requests without effect of one user that are logged a minute."""
CHANGES = 1000
"""Changes by one user that are logged a minute."""
MAX_OLD_FILES = 9
"""Older files that are kept; ``audit.log.1`` is the youngest of them."""
_MOST = {"done": CHANGES, "refused": REFUSALS, "visits": VISITS}
_MAX_TEXT = 300  # characters of a text from outside
_VISITS = frozenset({"sign-in", "sign-out", "sign-out everywhere"})


def _shortened(value: object) -> object:
    return value[:_MAX_TEXT] if isinstance(value, str) else value


@define(eq=False)
class _Count:
    """The lines of one kind and one user within a minute."""

    lines: int = 0
    tasks: list[int] = field(factory=list)
    """The first and the last task without a line of its own."""


@define(eq=False)
class AuditLog:
    """Lines of JSON in append-only files, which are rotated by size.

    Changes have a file of their own, so that no number of visits and refusals pushes them
    out. Each user, and all unknown callers together, have a limited number of lines of
    each kind a minute; beyond it one line counts the rest. Each line is appended with one
    system call, so that the daemon and the command line can both write, and lines survive
    ``kill -9``.
    """

    path: Path
    """The path of the file of changes; the other file is beside it."""
    _now: Callable[[], float]
    """The seconds since the epoch."""
    max_size: int = MAX_SIZE
    _minute: float = field(default=0.0, init=False)
    _written: dict[tuple[Principal | None, str], _Count] = field(factory=dict, init=False)
    """The lines since then, by user and kind."""

    def write(self, caller: Caller, what: str, *, allowed: bool, **more: object) -> None:
        """Log what a caller asked for; in the daemon's log if the file is not writable."""
        kind = "visits" if what in _VISITS else "done"
        self._count(kind if allowed else "refused", caller, what, more)

    def write_unchanged(self, caller: Caller, what: str, **more: object) -> None:
        """Log a request that was allowed and had no effect."""
        self._count("visits", caller, what, more)

    def _count(
        self, kind: str, caller: Caller, what: str, more: Mapping[str, object]
    ) -> None:
        if not 0 <= self._now() - self._minute < 60:
            self.close()
            self._minute = self._now()
        written = self._written.setdefault((caller.principal, kind), _Count())
        written.lines += 1
        if written.lines <= _MOST[kind]:
            self._write(kind, caller, what, more)
        elif isinstance(task := more.get("task"), int):
            written.tasks[1:] = [task]

    def close(self) -> None:
        """Log how many lines were left out."""
        for (principal, kind), written in self._written.items():
            times = written.lines - _MOST[kind]
            if times > 0:
                caller = Caller(principal, "here and there", "unknown")
                more: dict[str, object] = {"times": times}
                if written.tasks:
                    more["tasks"] = [written.tasks[0], written.tasks[-1]]
                self._write(kind, caller, "more of it", more)
        self._written.clear()

    def _write(
        self, kind: str, caller: Caller, what: str, more: Mapping[str, object]
    ) -> None:
        at = datetime.fromtimestamp(self._now(), UTC).isoformat(timespec="milliseconds")
        who = caller.principal
        entry = {
            "at": at.replace("+00:00", "Z"),
            "who": None if who is None else who.name,
            "principal": None if who is None else who.key,
            "from": caller.address,
            "means": caller.means,
            "what": what,
            "allowed": kind != "refused",
            **more,
        }
        entry = {name: _shortened(value) for name, value in entry.items()}
        line = json.dumps(entry, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        path = self.path if kind == "done" else self._access
        try:
            fd = files.open_regular(path, flags)
            try:
                written = os.write(fd, line)
                if written < len(line):
                    os.write(fd, line[written:])
                full = os.fstat(fd).st_size >= self.max_size
            finally:
                os.close(fd)
            if full:
                _rotate(path)
        except OSError as e:
            _log.error("Cannot write {path}: {e}: {line}", path=path, e=e, line=entry)

    @property
    def _access(self) -> Path:
        return self.path.with_name(ACCESS_FILE)

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield all entries, oldest first; lines that are not JSON are skipped."""
        files = (_entries(self.path), _entries(self._access))
        yield from heapq.merge(*files, key=lambda entry: str(entry.get("at", "")))


def _rotate(path: Path) -> None:
    for number in range(MAX_OLD_FILES - 1, -1, -1):
        old = _numbered(path, number)
        if old.exists():
            old.replace(_numbered(path, number + 1))


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}") if number else path


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    for number in range(MAX_OLD_FILES, -1, -1):
        try:
            fd = files.open_regular(_numbered(path, number))
        except FileNotFoundError:
            continue
        with open(fd, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue
                if isinstance(entry, dict):
                    yield entry
