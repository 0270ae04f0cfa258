"""What the command ``pulsar-api`` shows: output, tables and questions."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import IO, Any

from attrs import define, field
from twisted.internet.abstract import FileDescriptor
from twisted.internet.interfaces import IDelayedCall

from pulsar_api.client import Task

LOST = 120
KILLED = 121
REFUSED = 122
UNREACHABLE = 123
NO_CODE = 124
LEFT = 130

_COLOURS = {
    "created": "33",
    "running": "36",
    "finished": "32",
    "failed": "31",
    "killed": "35",
    "lost": "31;1",
}
_QUIET = 3.0  # seconds without output after which the elapsed time is shown
_CLEAR = "\r\x1b[K"


def exit_status(task: Task) -> int:
    """Return the exit status of a command that has followed a task."""
    if task.status in {"killed", "lost"}:
        return KILLED if task.status == "killed" else LOST
    if task.exit_code is None:
        return NO_CODE
    # A task can fail with exit code 0 if its program has not printed the expected line.
    return task.exit_code or (0 if task.status == "finished" else NO_CODE)


def ending(task: Task) -> str:
    """Return how a task ended, in a sentence."""
    code = "" if task.exit_code is None else f", exit code {task.exit_code}"
    reason = f": {task.data['reason']}" if task.data["reason"] else ""
    return f"task {task.id} {task.status}{code}{reason}"


@define(eq=False)
class Console:
    """Writes to standard output and standard error.

    On a terminal it uses colours and shows the elapsed time while there is no output.
    """

    reactor: Any
    as_json: bool = False
    out: IO[bytes] = field(factory=lambda: sys.stdout.buffer)
    err: IO[bytes] = field(factory=lambda: sys.stderr.buffer)
    _now: Callable[[], float] = time.time
    """The seconds since the epoch."""
    _ticking: IDelayedCall | None = field(default=None, init=False)
    _last: float = field(default=0.0, init=False)
    _began: float = field(default=0.0, init=False)
    _elapsed_shown: bool = field(default=False, init=False)

    def value(self, value: object) -> None:
        """Print a value as one line of JSON."""
        self.write(json.dumps(value, ensure_ascii=False) + "\n")

    def write(self, text: str, stream: str | None = "stdout") -> None:
        """Print output of a task to the stream that the task has printed it to."""
        self._quiet()
        self._last = self.reactor.seconds()
        file = self.err if stream == "stderr" else self.out
        file.write(text.encode("utf-8", "replace"))
        file.flush()

    def say(self, text: str) -> None:
        """Print a message that is not output of the task."""
        self._quiet()
        self.err.write(f"pulsar-api: {text}\n".encode())
        self.err.flush()

    def watch(self) -> None:
        """Show the elapsed time on a terminal while there is no output."""
        if not (self.err.isatty() and self.out.isatty()) or self.as_json:
            return
        self._began = self._last = self.reactor.seconds()
        self._ticking = self.reactor.callLater(1, self._tick)

    def rest(self) -> None:
        """Show it no longer."""
        self._quiet()
        if self._ticking is not None and self._ticking.active():
            self._ticking.cancel()

    def _tick(self) -> None:
        self._ticking = self.reactor.callLater(1, self._tick)
        now = self.reactor.seconds()
        if now - self._last >= _QUIET:
            self._elapsed_shown = True
            self.err.write(f"{_CLEAR}… {now - self._began:.0f} s".encode())
            self.err.flush()

    def _quiet(self) -> None:
        if self._elapsed_shown:
            self._elapsed_shown = False
            self.err.write(_CLEAR.encode())
            self.err.flush()  # before anything on the other stream

    # -- tables

    def tasks(self, tasks: Iterable[Task]) -> None:
        """Print a line for each task."""
        rows = [
            (
                str(task.id),
                task.status,
                f"{task.data['app']}/{task.data['env']}",
                _plain(task.data["action"]),
                _when(task.data["createdAt"]),
                _took(task.data, self._now()),
            )
            for task in tasks
        ]
        head = ("ID", "STATUS", "TARGET", "ACTION", "CREATED", "TOOK")
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        for row in (head, *rows):
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            cells[1] = self._coloured(row[1], cells[1])
            self.write("  ".join(cells).rstrip() + "\n")

    def task(self, task: Task) -> None:
        """Print the fields of a task, one a line."""
        data = task.data
        lines = {
            "task": str(task.id),
            "status": self._coloured(task.status, task.status),
            "target": f"{data['app']}/{data['env']}",
            "action": data["action"],
            **{f"  {key}": value for key, value in data["variables"].items()},
            "command": data["command"],
            "exit code": data["exitCode"],
            "signal": data["signal"],
            "reason": data["reason"],
            "waits for": data["waitingFor"],
            "held by": _processes(data["heldBy"]),
            "still runs": _processes(data["stillRunning"]),
            "notes": " ".join(data["notes"]),
            "created": _when(data["createdAt"]),
            "took": _took(data, self._now()),
            "processors": _amount(data.get("cpuSeconds"), "s"),
            "memory": _amount(data.get("memoryPeak"), "bytes at most"),
            "output": f"{data['outputSize']} bytes",
            "page": data["url"],
        }
        for name, value in lines.items():
            if value not in (None, ""):
                text = value if name == "status" else _plain(str(value))
                self.write(f"{_plain(name):12}{text}\n")

    def _coloured(self, status: str, text: str) -> str:
        colour = _COLOURS.get(status)
        if colour is None or not self.out.isatty() or os.environ.get("NO_COLOR"):
            return text
        return f"\x1b[{colour}m{text}\x1b[0m"


def _amount(number: float | None, unit: str) -> str | None:
    return None if number is None else f"{number:g} {unit}"


def _processes(found: Iterable[Mapping[str, Any]]) -> str:
    return ", ".join(f"{one['pid']} {one['command']} ({one['user']})" for one in found)


def _plain(text: str) -> str:
    """Return a text with all characters escaped that could control a terminal."""
    return "".join(
        character
        if character.isprintable()
        else character.encode("unicode_escape").decode()
        for character in text
    )


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text)


def _when(text: str) -> str:
    return f"{_moment(text).astimezone():%Y-%m-%d %H:%M:%S}"


def _took(data: Mapping[str, Any], now: float) -> str:
    if data["startedAt"] is None:
        return ""
    ended = data["endedAt"]
    end = datetime.fromtimestamp(now, UTC) if ended is None else _moment(ended)
    seconds = max(0, int((end - _moment(data["startedAt"])).total_seconds()))
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Answers(FileDescriptor):
    """Reads lines from a terminal by the reactor, as a thread could not be stopped."""

    def __init__(self, reactor: Any, fd: int, tell: Callable[[str], None]) -> None:
        super().__init__(reactor)
        self._fd = fd
        self._tell = tell
        reactor.addReader(self)

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._fd

    def doRead(self) -> None:
        """Pass a line on."""
        data = os.read(self._fd, 1024)
        if not data:
            self.reactor.removeReader(self)
        self._tell(data.decode("utf-8", "replace").strip().lower())

    def close(self) -> None:
        """Stop reading."""
        self.reactor.removeReader(self)
