"""Responses as JSON: tasks, jobs, events and problems."""

import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from attrs import evolve, frozen

from pulsar_api.output.files import Missing, Output, output_of
from pulsar_api.output.reader import stdout_text
from pulsar_api.tasks.model import Status, TaskSnapshot
from pulsar_api.web import json_stream
from pulsar_api.web.json_stream import Text

PROBLEM = "application/problem+json"
TYPE_PREFIX = "urn:pulsar-api:problem:"
TAIL = 4096
"""Bytes of output of each task in a list."""


def problem(
    status: int, type_: str, title: str, detail: str, field: str | None = None
) -> bytes:
    """Return an error in the form of RFC 9457; ``error`` repeats it for old clients."""
    value = {
        "type": TYPE_PREFIX + type_,
        "title": title,
        "status": status,
        "detail": detail,
        "error": detail,
    }
    if field is not None:
        value["field"] = field
    return encode(value)


def encode(value: object) -> bytes:
    """Return a value as JSON, one line."""
    # Half a surrogate pair, which UTF-8 cannot encode, becomes a question mark.
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _time(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    text = datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")


UNREADABLE = "The output cannot be read: its files are missing or damaged."
"""The note that `with_output` adds."""


def with_output(snapshot: TaskSnapshot, folder: Path) -> tuple[TaskSnapshot, Output]:
    """Return a task and its output, for an answer that must not fail for one of many.

    If the output of a task cannot be read any more, it is `Missing` and a note of
    the task says so. ``folder`` holds the output of task 47 in the folder ``47``.

    Raises: `OSError` if nobody can look now.
    """
    output = output_of(folder, snapshot.id)
    if output.readable(snapshot.output_size):
        return snapshot, output
    noted = evolve(snapshot, notes=(*snapshot.notes, UNREADABLE))
    return noted, Missing(output.folder)


def task_fields(snapshot: TaskSnapshot, base: str) -> dict[str, object]:
    spec = snapshot.spec
    remaining = [
        {"pid": one.pid, "command": one.command, "user": one.user}
        for one in snapshot.still_running
    ]
    return {
        "id": snapshot.id,
        "status": snapshot.status,
        "app": spec.app,
        "env": spec.env,
        "action": spec.action,
        "exitCode": snapshot.exit_code,
        "pid": snapshot.pid,
        "version": snapshot.version,
        "outputSize": snapshot.output_size,
        "command": snapshot.command,
        "signal": snapshot.signal,
        "reason": snapshot.reason,
        "variables": dict(spec.variables),
        "user": None if spec.user is None else spec.user.name,
        "waitingFor": snapshot.waiting_for,
        "heldBy": remaining if snapshot.held else [],
        "stillRunning": [] if snapshot.held else remaining,
        "notes": list(snapshot.notes),
        "createdAt": _time(snapshot.created_at),
        "startedAt": _time(snapshot.started_at),
        "endedAt": _time(snapshot.ended_at),
        "cpuSeconds": snapshot.cpu_seconds,
        "memoryPeak": snapshot.memory_peak,
        "url": task_url(base, snapshot.id),
    }


def event(kind: str, cursor: Sequence[int], value: object) -> bytes:
    """Return a server-sent event (HTML standard, 9.2): one line of JSON with an id."""
    name = "-".join(map(str, cursor))
    return b"event: %s\nid: %s\ndata: %s\n" % (kind.encode(), name.encode(), encode(value))


def task_url(base: str, task_id: int) -> str:
    """Return the address of a task's page."""
    return f"{base}/web#job/{task_id}"


def list_head(base: str) -> bytes:
    """Return the beginning of a response with a list of tasks."""
    return f"{json_stream.opened({'url': f'{base}/pulsar/index.html'}, 'tasks')}{{".encode()


LIST_TAIL = b"}}\n"
"""The end of such a response."""


def list_entry(
    snapshot: TaskSnapshot, base: str, output: Output, part: "Part"
) -> Iterator[bytes]:
    """Yield a task of such a list piece by piece."""
    yield b'"%d": ' % snapshot.id
    yield from task_pieces(snapshot, base, output, part)


@frozen
class Part:
    """The bytes of a task's output that a response has."""

    start: int
    end: int

    @classmethod
    def chosen(cls, how: str, snapshot: TaskSnapshot, output: Output) -> "Part":
        """Return all of the output, its tail or nothing: ``full``, ``tail`` or ``none``."""
        size = snapshot.output_size
        if isinstance(output, Missing):
            how = "none"
        start = {"full": 0, "tail": max(0, size - TAIL), "none": size}[how]
        return cls(output.character_start(start) if how == "tail" else start, size)

    @property
    def size(self) -> int:
        """The number of bytes."""
        return self.end - self.start


def task_pieces(
    snapshot: TaskSnapshot, base: str, output: Output, part: Part
) -> Iterator[bytes]:
    """Yield the JSON of a task piece by piece; nothing of it is held.

    ``output`` stands last; ``outputOffset`` says at which byte it begins, where that is
    not the first.
    """
    fields = task_fields(snapshot, base)
    cut = output.cut()
    if cut != (0, 0):
        fields["outputCut"] = {"from": cut[0], "to": cut[1]}
    if part.start:
        fields["outputOffset"] = part.start
    written = json_stream.pieces(fields, output=Text(output.text(part.start, part.end)))
    del fields  # they may be large, and it may take long to write the rest
    yield from written


# -- the jobs of release 0.6


def job_fields(snapshot: TaskSnapshot) -> dict[str, object]:
    """Return a task as a job of release 0.6, without its output."""
    spec = snapshot.spec
    status = "FAILED" if snapshot.status is Status.LOST else snapshot.status.value.upper()
    if snapshot.killed_by is not None and not snapshot.status.ended:
        status = "KILLING"
    variables = [f"-s {key}={value}" for key, value in spec.variables.items()]
    return {
        "id": snapshot.id,
        "status": status,
        "timestamp": int(snapshot.created_at * 1000),
        "exitCode": snapshot.exit_code,
        "pid": snapshot.pid,
        "command": " ".join([spec.app, spec.env, spec.action, *variables]),
        "args": {
            "app": spec.app,
            "env": spec.env,
            "task": spec.action,
            "taskVariables": dict(spec.variables),
        },
    }


def job_pieces(snapshot: TaskSnapshot, output: Output) -> Iterator[bytes]:
    """Yield the JSON of a job piece by piece; nothing of it is held."""
    size = snapshot.output_size
    yield from json_stream.pieces(
        job_fields(snapshot),
        stdout=Text(stdout_text(output, size)),
        output=Text(output.text(0, size)),
    )
