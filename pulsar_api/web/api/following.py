"""Following: the raw log of a task, and the events of one task or of all."""

from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

from attrs import frozen
from klein import Klein
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.web.server import Request
from werkzeug.http import parse_range_header

from pulsar_api.auth.guard import Guard
from pulsar_api.auth.rights import Right
from pulsar_api.concurrency.changes import Changes
from pulsar_api.concurrency.turns import TurnScheduler
from pulsar_api.output.files import PIECE, Output, output_of
from pulsar_api.output.reader import Chunk, Reader
from pulsar_api.output.records import NAMES
from pulsar_api.output.timestamps import Timed
from pulsar_api.tasks.live import COALESCE, Task
from pulsar_api.tasks.model import TaskSnapshot
from pulsar_api.tasks.service import MAX_ID
from pulsar_api.web import decoding, encoding
from pulsar_api.web.api.tasks import find, query_of
from pulsar_api.web.authentication import Access, needs
from pulsar_api.web.responses import Valve, header, new_app, not_modified, problem

_log = Logger()

PING = 15.0
"""Seconds of silence after which an event stream sends a comment."""

_BATCH = 100  # tasks that are read at a time
_EVENT = 4096  # the fixed cost of an event, in bytes that take the same time
_TURN = 64  # chunks written in one turn of the reactor
_STREAMS = {name: code for code, name in NAMES.items()}
_LOG = "text/plain; charset=utf-8"
_EVENTS = "text/event-stream"


@frozen(eq=False)
class FollowAPI:
    """The routes for following tasks live."""

    app: ClassVar[Klein] = new_app()

    access: Access
    folder: Path
    """The folder with the output of all tasks."""
    clock: IReactorTime
    turns: TurnScheduler

    @app.route("/task/<number>/log", methods=["GET"])
    @needs(Right.READ)
    async def log(self, request: Request, tasks: Guard, number: str) -> bytes:
        query = query_of(request)
        follow = decoding.parse_flag(query, "follow")
        times = decoding.parse_flag(query, "times")
        stream = None
        if "stream" in query:
            stream = _STREAMS[decoding.parse_choice(query, "stream", "", tuple(_STREAMS))]
        task = await find(tasks, number)
        task.refresh()
        output = output_of(self.folder, task.snapshot.id)
        size = task.snapshot.output_size
        start = decoding.parse_number(query, "offset", 0, MAX_ID)
        if "tail" in query:
            start = max(0, size - decoding.parse_number(query, "tail", 0, MAX_ID))
        start = min(start, size)
        request.setHeader("Content-Type", _LOG)
        request.setHeader("Cache-Control", "no-cache")
        if not (follow or times or stream or output.cut() != (0, 0)):
            return await self._whole(request, output, start, size)
        if "tail" in query:
            start = output.character_start(start)
        request.setHeader("X-Accel-Buffering", "no")
        if request.method == b"HEAD":
            return b""
        record = output.record_at(start) if start else 0
        reader = Reader(output, start, record, stream, timed=times)
        dress: Callable[[Chunk], bytes] = _bytes
        if times:
            dress = Timed(output, _begins_line(output, start)).dress
        return await self._stream(request, task, reader, dress, follow=follow)

    async def _whole(
        self, request: Request, output: Output, start: int, size: int
    ) -> bytes:
        """Answer with the output so far, or the requested range (RFC 9110, section 14)."""
        etag = f'"{size}"'
        if not_modified(request, etag):
            return b""
        request.setHeader("Accept-Ranges", "bytes")
        length = size - start
        first, end = 0, length
        wanted = parse_range_header(header(request, "range"))
        condition = header(request, "if-range")
        usable = wanted is not None and wanted.units == "bytes" and len(wanted.ranges) == 1
        if wanted is not None and usable and condition in {"", etag}:
            found = wanted.range_for_length(length)
            if found is None and 0 < length <= -(wanted.ranges[0][0] or 0):
                found = (
                    0,
                    length,
                )  # a longer suffix means everything (RFC 9110, section 14.1.2)
            if found is None:
                request.setHeader("Content-Range", f"bytes */{length}")
                detail = (
                    f"The range is outside of the output, which has {length} bytes so far."
                )
                title = "Range not satisfiable"
                return problem(request, 416, "range-not-satisfiable", title, detail)
            first, end = found
            request.setResponseCode(206)
            request.setHeader("Content-Range", f"bytes {first}-{end - 1}/{length}")
        request.setHeader("Content-Length", str(end - first))
        if request.method == b"HEAD" or first == end:
            return b""
        outlet = Outlet(request, self.clock)
        return await outlet.send_all(_uncut(output, start + first, start + end))

    async def _stream(
        self,
        request: Request,
        task: Task,
        reader: Reader,
        dress: Callable[[Chunk], bytes],
        *,
        follow: bool,
    ) -> bytes:
        outlet = Outlet(request, self.clock)
        while True:
            seen, snapshot = task.changes.version, task.snapshot
            for count, chunk in outlet.reading(reader.read(snapshot.output_size)):
                await outlet.write(dress(chunk))
                await self._rest(count, chunk)
            if snapshot.status.ended or not follow:
                return outlet.end()
            if await task.changes.after(seen) == seen:
                await outlet.break_off()

    @app.route("/task/<number>/events", methods=["GET"])
    @needs(Right.READ)
    async def events(self, request: Request, tasks: Guard, number: str) -> bytes:
        query = query_of(request)
        times = decoding.parse_flag(query, "times")
        task = await find(tasks, number)
        task.refresh()
        output = output_of(self.folder, task.snapshot.id)
        cursor = _cursor(request, query)
        if cursor is not None:
            offset, record, revision = cursor
            if task.snapshot.status.ended and cursor[::2] == (
                task.snapshot.output_size,
                task.snapshot.revision,
            ):
                # All events have been sent. 204 stops an EventSource from reconnecting.
                request.setResponseCode(204)
                return b""
        else:
            revision = 0
            offset = decoding.parse_number(query, "offset", 0, MAX_ID)
            offset = output.character_start(min(offset, task.snapshot.output_size))
            record = output.record_at(offset) if offset else 0
        _begin_events(request)
        if request.method == b"HEAD":
            return b""
        base = self.access.origins.base(request)
        reader = Reader(output, offset, record, timed=times)
        timed = Timed(output) if times else None
        outlet = Outlet(request, self.clock)
        await outlet.write(b"retry: 1000\n\n")
        while True:
            seen, snapshot = task.changes.version, task.snapshot
            if snapshot.revision != revision and not snapshot.status.ended:
                revision = snapshot.revision
                place = (reader.offset, reader.record, revision)
                fields = encoding.task_fields(snapshot, base)
                await outlet.write(encoding.event("state", place, fields))
            for count, chunk in outlet.reading(reader.read(snapshot.output_size)):
                place = (reader.offset, reader.record, revision)
                at = None if timed is None else timed.moment(chunk)
                await outlet.write(_output_event(chunk, place, at))
                await self._rest(count, chunk)
            if snapshot.status.ended:
                place = (snapshot.output_size, reader.record, snapshot.revision)
                fields = encoding.task_fields(snapshot, base)
                await outlet.write(encoding.event("end", place, fields))
                return outlet.end()
            await outlet.wait(task.changes, seen)

    @app.route("/events", methods=["GET"])
    @needs(Right.READ)
    async def all_events(self, request: Request, tasks: Guard) -> bytes:
        cursor = _cursor(request, query_of(request))
        _begin_events(request)
        if request.method == b"HEAD":
            return b""
        change, known = await tasks.last_change()
        if cursor is not None:
            # Larger numbers come from another database.
            change, known = min(change, cursor[0]), min(known, cursor[1])
        base = self.access.origins.base(request)
        changed = tasks.changed
        outlet = Outlet(request, self.clock)
        await outlet.write(b"retry: 1000\n\n")
        while True:
            seen = changed.version
            news = await tasks.news(change, known, _BATCH)
            more = news.more
            events: deque[tuple[str, int, TaskSnapshot]] = deque(
                ("created", change, found.as_created()) for found in news.created
            )
            events.extend(("state", at, found) for at, found in news.changed)
            del news
            size = 0
            while events:
                kind, change, snapshot = events.popleft()
                known = max(known, snapshot.id)
                if not tasks.sees(snapshot):
                    continue
                fields = encoding.task_fields(snapshot, base)
                text = encoding.event(kind, (change, known, 0), fields)
                size += len(text) + _EVENT
                await outlet.write(text)
                if size >= PIECE:
                    size = 0
                    await self.turns.wait(tasks.caller.actor.key)
            if not more:
                await outlet.wait(changed, seen)
                # In busy times each stream asks only a few times a second.
                await deferLater(self.clock, COALESCE)

    async def _rest(self, count: int, chunk: Chunk) -> None:
        """Wait for another turn after much was read or written."""
        if not chunk.data or count % _TURN == 0:
            await self.turns.wait()


def _cursor(request: Request, query: dict[str, str]) -> tuple[int, ...] | None:
    text = header(request, "last-event-id") or query.get("lastEventId", "")
    return decoding.parse_cursor(text) if text else None


def _begin_events(request: Request) -> None:
    request.setHeader("Content-Type", _EVENTS)
    request.setHeader("Cache-Control", "no-store")
    request.setHeader("X-Accel-Buffering", "no")


def _output_event(chunk: Chunk, place: tuple[int, ...], at: int | None) -> bytes:
    if not chunk.data:
        return b""
    name = None if chunk.stream is None else NAMES[chunk.stream]
    text = chunk.data.decode("utf-8", "replace")
    fields: dict[str, object] = {"offset": chunk.start, "stream": name, "text": text}
    if at is not None:
        fields["at"] = at
    return encoding.event("output", place, fields)


def _bytes(chunk: Chunk) -> bytes:
    return chunk.data


def _begins_line(output: Output, offset: int) -> bool:
    return offset == 0 or output.read(offset - 1, offset) == b"\n"


def _uncut(output: Output, start: int, end: int) -> Iterable[bytes]:
    """Yield bytes; raise OSError if they are dropped meanwhile, as zeros would be read."""
    for piece in output.pieces(start, end):
        hole_start, hole_end = output.cut()
        if start < hole_end and start + len(piece) > hole_start:
            raise OSError("the output was cut while it was sent")
        start += len(piece)
        yield piece
    if start < end:
        raise OSError("the output is shorter than was known")


class Outlet(Valve):
    """Writes to one client no faster than it reads."""

    def __init__(self, request: Request, clock: IReactorTime) -> None:
        self._request = request
        self._clock = clock
        request.registerProducer(self, True)
        # Send the head at once, so that the client sees that it is connected.
        request.write(b"")

    async def write(self, data: bytes) -> None:
        """Write, and wait until there is room for more."""
        self._request.write(data)
        await self.open()

    def reading(self, chunks: Iterable[Chunk]) -> Iterable[tuple[int, Chunk]]:
        """Yield chunks with their count; cut the connection if one cannot be read."""
        try:
            yield from enumerate(chunks, 1)
        except OSError as e:
            self._cut(e)
            raise

    async def send_all(self, pieces: Iterable[bytes]) -> bytes:
        """Write all pieces, and end the response."""
        try:
            for piece in pieces:
                await self.write(piece)
        except OSError as e:
            self._cut(e)
            await Deferred()
        return self.end()

    def end(self) -> bytes:
        """Stop writing; Klein ends the response."""
        self._request.unregisterProducer()
        return b""

    async def wait(self, changes: Changes, seen: int) -> None:
        """Wait for another version; meanwhile send a comment every `PING` seconds."""
        while True:
            change = changes.after(seen)
            version = await change.addTimeout(PING, self._clock, lambda *_: -1)
            if version == seen:
                await self.break_off()
            if version >= 0:
                return
            await self.write(b":\n\n")

    async def break_off(self) -> None:
        """Hang up in the middle, as the daemon stops."""
        transport: Any = self._request.transport
        transport.loseConnection()
        await Deferred()

    def _cut(self, error: OSError) -> None:
        # A partial response must not look complete.
        _log.error("Cannot read for {uri}: {e}", uri=self._request.uri, e=error)
        transport: Any = self._request.transport
        transport.abortConnection()
