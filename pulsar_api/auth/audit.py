"""The audit log: who wanted what, from where, and whether they got it."""

import json
import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from attrs import define, field
from twisted.logger import Logger

from pulsar_api.auth.rights import Caller

_log = Logger()

FILE = "audit.log"
MAX_SIZE = 10 << 20
"""Bytes after which a new file is begun."""
REFUSALS = 100
"""Refusals of one user, or of all who are not known, that are written in a minute."""
KEPT = 9
"""Files that are kept beside the newest one: ``audit.log.1`` is the youngest of them."""
_MOST_TEXT = 300  # characters of a text from outside


def _shortened(value: object) -> object:
    return value[:_MOST_TEXT] if isinstance(value, str) else value


@define(eq=False)
class AuditLog:
    """Lines of JSON in a file that only grows, and begins anew when it is large.

    Of what one user, or all who are not known, may not, so many lines are written in a
    minute: else a flood of them would push everything else out. Each line is written with
    one system call at the end of the file, so that the daemon and the command line can
    both write, and what was written survives ``kill -9``.
    """

    path: Path
    _now: Callable[[], float]
    """The seconds since the epoch."""
    max_size: int = MAX_SIZE
    _minute: float = field(default=0.0, init=False)
    _refusals: dict[str | None, int] = field(factory=dict, init=False)
    """By whom, since then."""

    def write(self, caller: Caller, what: str, *, allowed: bool, **more: object) -> None:
        """Note what somebody wanted; if it cannot be written, in the daemon's log."""
        if not allowed:
            if not 0 <= self._now() - self._minute < 60:
                self.close()
                self._minute = self._now()
            self._refusals[caller.name] = self._refusals.get(caller.name, 0) + 1
            if self._refusals[caller.name] > REFUSALS:
                return
        self._write(caller, what, allowed=allowed, **more)

    def close(self) -> None:
        """Say how many refusals were not written down one by one."""
        for name, times in self._refusals.items():
            if times > REFUSALS:
                caller = Caller(name, "here and there", "unknown")
                more = times - REFUSALS
                self._write(caller, "more of it", allowed=False, times=more)
        self._refusals.clear()

    def _write(self, caller: Caller, what: str, *, allowed: bool, **more: object) -> None:
        at = datetime.fromtimestamp(self._now(), UTC).isoformat(timespec="milliseconds")
        entry = {
            "at": at.replace("+00:00", "Z"),
            "who": caller.name,
            "from": caller.address,
            "means": caller.means,
            "what": what,
            "allowed": allowed,
            **more,
        }
        entry = {name: _shortened(value) for name, value in entry.items()}
        line = json.dumps(entry, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        try:
            fd = os.open(self.path, flags, 0o600)
            try:
                written = os.write(fd, line)
                if written < len(line):
                    os.write(fd, line[written:])
                full = os.fstat(fd).st_size >= self.max_size
            finally:
                os.close(fd)
            if full:
                self._rotate()
        except OSError as e:
            _log.error("Cannot write {path}: {e}: {line}", path=self.path, e=e, line=entry)

    def _rotate(self) -> None:
        for number in range(KEPT - 1, -1, -1):
            old = self._numbered(number)
            if old.exists():
                old.replace(self._numbered(number + 1))

    def _numbered(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}") if number else self.path

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield all that is kept, oldest first; a line that is no JSON is passed over."""
        for number in range(KEPT, -1, -1):
            try:
                file = self._numbered(number).open(encoding="utf-8", errors="replace")
            except FileNotFoundError:
                continue
            with file:
                for line in file:
                    try:
                        entry = json.loads(line)
                    except ValueError:
                        continue
                    if isinstance(entry, dict):
                        yield entry
