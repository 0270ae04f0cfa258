"""The main API: lists of tasks, one task, and the long-polls."""

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlencode

from attrs import field, frozen
from klein import Klein
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.web.server import Request

from pulsar_api.auth.guard import Guard
from pulsar_api.auth.rights import Right
from pulsar_api.bounded import BoundedDict
from pulsar_api.concurrency.turns import TurnScheduler
from pulsar_api.errors import UnknownTask
from pulsar_api.output.files import Output, output_of
from pulsar_api.tasks.live import Task
from pulsar_api.tasks.model import TaskSnapshot
from pulsar_api.tasks.service import MAX_ID
from pulsar_api.web import decoding, encoding, json_stream
from pulsar_api.web.api.lists import Entry, Lists
from pulsar_api.web.authentication import Access, needs
from pulsar_api.web.encoding import Part
from pulsar_api.web.responses import new_app, not_modified, reply, stream

_SMALL = 1 << 18  # bytes of output up to which an answer is built at once, and shared
_SHARED = 16  # such answers that are kept for further requests
_OUTPUTS = ("full", "tail", "none")
_UNCHANGED = encoding.encode({"changed": False})


@frozen(eq=False)
class TaskAPI:
    """The routes of the API. ``app.resource()`` is what a site serves."""

    app: ClassVar[Klein] = new_app()

    access: Access
    folder: Path
    """The folder with the output of all tasks."""
    clock: IReactorTime
    poll_timeout: float = 30.0
    lists: Lists = field()
    _shared: BoundedDict[tuple[object, ...], bytes] = field(
        factory=partial(BoundedDict, _SHARED)
    )

    @lists.default
    def _lists(self) -> Lists:
        return Lists(self.clock, TurnScheduler(self.clock))

    # -- tasks

    @app.route("/tasks", methods=["GET"])
    @needs(Right.READ)
    async def list_tasks(self, request: Request, tasks: Guard) -> bytes:
        query = query_of(request)
        wanted = decoding.parse_task_query(query)
        how = decoding.parse_choice(query, "output", "tail", _OUTPUTS)
        base = self._base(request)

        def entry(task: TaskSnapshot) -> Entry:
            task, output = encoding.with_output(task, self.folder)
            part = Part.chosen(how, task, output)
            return Entry(part.size, encoding.list_entry(task, base, output, part))

        def more(last: int) -> None:
            path = urlencode({**query, "before": last})
            request.setHeader("Link", f'</tasks?{path}>; rel="next"')

        begin, end = encoding.list_head(base), encoding.LIST_TAIL
        return await self.lists.answer(request, tasks, wanted, entry, begin, end, more)

    @app.route("/tasks/created", methods=["GET"])
    @needs(Right.READ)
    async def created(self, request: Request, tasks: Guard) -> bytes:
        query = query_of(request)
        created = tasks.created
        since = decoding.parse_number(query, "since", created.version, MAX_ID)
        how = decoding.parse_choice(query, "output", "full", _OUTPUTS)
        seconds = self._seconds(request, query)
        # A larger number comes from another database; treat it as the newest one.
        seen = min(since, created.version)
        until = self.clock.seconds() + seconds
        newest = created.version
        task = await self.lists.next_after(tasks, seen) if seen < newest else None
        while task is None:
            seen = newest  # skips tasks that the caller may not see
            left = until - self.clock.seconds()
            if left <= 0 or await self._wait(created.after(seen), left) in {0, seen}:
                return reply(request, _UNCHANGED)
            newest = created.version
            task = await tasks.next_after(seen)
        task, output = encoding.with_output(task, self.folder)
        part = Part.chosen(how, task, output)
        return await self._changed(request, task, part, output=output)

    # -- one task

    @app.route("/task/<number>", methods=["GET"])
    @needs(Right.READ)
    async def task(self, request: Request, tasks: Guard, number: str) -> bytes:
        how = decoding.parse_choice(query_of(request), "output", "full", _OUTPUTS)
        task = await find(tasks, number)
        task.refresh()
        snapshot = task.snapshot
        if not_modified(request, f'"{snapshot.version}-{how}"'):
            return b""
        part = Part.chosen(how, snapshot, self._output(snapshot))
        pieces = self._pieces(snapshot, self._base(request), part)
        return await respond(request, chain(pieces, [b"\n"]), part.size)

    @app.route("/task/<number>/output", methods=["GET"])
    @needs(Right.READ)
    async def output(self, request: Request, tasks: Guard, number: str) -> bytes:
        query = query_of(request)
        task = await find(tasks, number)
        seen = decoding.parse_number(query, "since", task.changes.version, MAX_ID)
        offset = decoding.parse_number(query, "offset", -1, MAX_ID)
        how = decoding.parse_choice(query, "output", "full", _OUTPUTS)
        seconds = self._seconds(request, query)
        if not task.snapshot.status.ended and task.changes.version == seen:
            await self._wait(task.changes.after(seen), seconds)
            if task.changes.version == seen:
                return reply(request, _UNCHANGED)
        if offset > task.snapshot.output_size:
            task.refresh()
        snapshot = task.snapshot
        if offset < 0:
            part = Part.chosen(how, snapshot, self._output(snapshot))
            return await self._changed(request, snapshot, part)
        start = self._output(snapshot).character_start(min(offset, snapshot.output_size))
        part = Part(start, snapshot.output_size)
        return await self._changed(request, snapshot, part, part.end)

    @app.route("/task/<number>/state", methods=["GET"])
    @needs(Right.READ)
    async def state(self, request: Request, tasks: Guard, number: str) -> bytes:
        query = query_of(request)
        task = await find(tasks, number)
        seen = decoding.parse_number(query, "since", task.changes.version, MAX_ID)
        how = decoding.parse_choice(query, "output", "full", _OUTPUTS)
        seconds = self._seconds(request, query)
        if not task.snapshot.status.ended and task.changes.version == seen:
            await self._wait(task.end.after(0), seconds)
            if not task.snapshot.status.ended:
                return reply(request, _UNCHANGED)
        part = Part.chosen(how, task.snapshot, self._output(task.snapshot))
        return await self._changed(request, task.snapshot, part)

    @app.route("/task/<number>/kill", methods=["GET", "POST"])
    @needs(Right.KILL)
    async def kill(self, request: Request, tasks: Guard, number: str) -> bytes:
        how = decoding.parse_choice(query_of(request), "output", "full", _OUTPUTS)
        task = await find(tasks, number)
        if request.method != b"HEAD":  # HEAD must not change anything
            task = await tasks.kill(task.snapshot.id)
        part = Part.chosen(how, task.snapshot, self._output(task.snapshot))
        pieces = self._pieces(task.snapshot, self._base(request), part)
        return await respond(request, chain(pieces, [b"\n"]), part.size)

    # -- what they share

    def _base(self, request: Request) -> str:
        return self.access.origins.base(request)

    def _output(self, snapshot: TaskSnapshot) -> Output:
        return output_of(self.folder, snapshot.id)

    def _pieces(self, snapshot: TaskSnapshot, base: str, part: Part) -> Iterator[bytes]:
        snapshot, output = self._with_output(snapshot, part)
        return encoding.task_pieces(snapshot, base, output, part)

    def _with_output(self, task: TaskSnapshot, part: Part) -> tuple[TaskSnapshot, Output]:
        # Without output, the answer does not depend on whether that can be read.
        return (
            (task, self._output(task))
            if part.size
            else encoding.with_output(task, self.folder)
        )

    def _seconds(self, request: Request, query: dict[str, str]) -> float:
        seconds = decoding.parse_seconds(query, "timeout", self.poll_timeout)
        return 0.0 if request.method == b"HEAD" else seconds

    async def _wait(self, change: Deferred[int], seconds: float) -> int:
        return await change.addTimeout(seconds, self.clock, lambda *_: 0)

    async def _changed(
        self,
        request: Request,
        snapshot: TaskSnapshot,
        part: Part,
        next_offset: int | None = None,
        output: Output | None = None,
    ) -> bytes:
        base = self._base(request)
        if output is None:
            snapshot, output = self._with_output(snapshot, part)
        fields: dict[str, object] = {"changed": True}
        if next_offset is not None:
            fields["nextOffset"] = next_offset
        written = encoding.task_pieces(snapshot, base, output, part)
        pieces = chain(json_stream.pieces(fields, task=written), [b"\n"])
        if part.size > _SMALL:
            return await respond(request, pieces, part.size)
        # Thousands may wait for the same change, so its answer is built once.
        # The note that the output cannot be read does not change the version.
        key = (snapshot.id, snapshot.version, snapshot.notes, base, part, next_offset)
        body = self._shared.get(key)
        if body is None:
            body = self._shared[key] = b"".join(pieces)
        return reply(request, body)


async def find(tasks: Guard, number: str) -> Task:
    """Return the task with the number in a path. It raises the errors of `Guard.find`."""
    if not (number.isascii() and number.isdigit() and len(number) < 20):
        raise UnknownTask(number[:100])
    return await tasks.find(int(number))


async def respond(request: Request, pieces: Iterable[bytes], size: int) -> bytes:
    """Answer at once if ``size`` is small, else as fast as the client reads."""
    if size <= _SMALL:
        return reply(request, b"".join(pieces))
    return await stream(request, iter(pieces))


def query_of(request: Request) -> dict[str, str]:
    """Return the parameters of the URL."""
    return decoding.parse_query(request.uri.partition(b"?")[2])
