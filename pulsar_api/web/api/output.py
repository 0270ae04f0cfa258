"""Parts of an output: lines, pieces with streams and times, and search."""

from functools import partial
from typing import ClassVar

from attrs import field, frozen
from klein import Klein
from twisted.web.server import Request

from pulsar_api.auth.guard import Guard
from pulsar_api.auth.rights import Right
from pulsar_api.bounded import BoundedDict
from pulsar_api.output.files import output_of
from pulsar_api.output.lines import LineIndex, LineIndexes
from pulsar_api.output.pieces import read_pieces
from pulsar_api.output.records import NAMES
from pulsar_api.output.search import search
from pulsar_api.tasks.model import TaskSnapshot
from pulsar_api.tasks.service import MAX_ID
from pulsar_api.web import decoding, encoding
from pulsar_api.web.api.tasks import find, query_of
from pulsar_api.web.authentication import Access, needs
from pulsar_api.web.responses import JSON, new_app, reply

_SEGMENTS = 4096  # in one answer
_SHARED = 16  # answers that are kept for further requests


@frozen(eq=False)
class PartsAPI:
    """The routes for a page that shows an output of any size."""

    app: ClassVar[Klein] = new_app()

    access: Access
    indexes: LineIndexes
    _shared: BoundedDict[tuple[object, ...], bytes] = field(
        factory=partial(BoundedDict, _SHARED)
    )

    @app.route("/task/<number>/lines", methods=["GET"])
    @needs(Right.READ)
    async def lines(self, request: Request, tasks: Guard, number: str) -> bytes:
        task = await find(tasks, number)
        start = decoding.parse_number(query_of(request), "from", 0, MAX_ID)
        task.refresh()
        # The current state, as what comes while the index is made has another version.
        snapshot = task.snapshot
        if request.method == b"HEAD":
            return _head(request)
        index = self.indexes.of(snapshot.id)
        await index.reach(snapshot.output_size)
        body = self._shared.get(_key(index, snapshot, start))
        if body is None:
            await self.indexes.turns.wait()
            await index.reach(snapshot.output_size)
            body = self._body(index, snapshot, start)
        return reply(request, body)

    def _body(self, index: LineIndex, snapshot: TaskSnapshot, start: int) -> bytes:
        """Return the answer, which is built once for all requests that wait for it."""
        key = _key(index, snapshot, start)
        body = self._shared.get(key)
        if body is None:
            body = self._shared[key] = encoding.encode(_lines(index, snapshot, start))
        return body

    @app.route("/task/<number>/pieces", methods=["GET"])
    @needs(Right.READ)
    async def pieces(self, request: Request, tasks: Guard, number: str) -> bytes:
        task = await find(tasks, number)
        query = query_of(request)
        task.refresh()
        size = task.snapshot.output_size
        start = min(decoding.parse_number(query, "offset", 0, MAX_ID), size)
        end = min(decoding.parse_number(query, "end", size, MAX_ID), size)
        if request.method == b"HEAD":
            return _head(request)
        output = output_of(self.indexes.folder, task.snapshot.id)
        found = await read_pieces(output, self.indexes.turns, start, end)
        began = output.began()
        answer = {
            "offset": found.start,
            "nextOffset": found.next,
            "size": size,
            "began": None if began is None else began / 1000,
            "pieces": [
                (None if stream is None else NAMES[stream], at, text)
                for stream, at, text in found.pieces
            ],
        }
        return reply(request, encoding.encode(answer))

    @app.route("/task/<number>/search", methods=["GET"])
    @needs(Right.READ)
    async def search(self, request: Request, tasks: Guard, number: str) -> bytes:
        task = await find(tasks, number)
        query = query_of(request)
        text = decoding.parse_needle(query)
        start = decoding.parse_number(query, "from", 0, MAX_ID)
        if request.method == b"HEAD":
            return _head(request)
        task.refresh()
        index = self.indexes.of(task.snapshot.id)
        await index.reach(task.snapshot.output_size)
        found = await search(index, text, start)
        answer = {
            "matches": found.matches,
            "nextFrom": found.next,
            "searched": found.searched,
        }
        return reply(request, encoding.encode(answer))


def _key(index: LineIndex, snapshot: TaskSnapshot, start: int) -> tuple[object, ...]:
    return snapshot.id, snapshot.version, index.size, index.cut, start


def _lines(index: LineIndex, snapshot: TaskSnapshot, start: int) -> dict[str, object]:
    """Return where the lines are, from the segment that holds the byte ``start``."""
    found = index.segments(start, _SEGMENTS + 1)
    segments = found[:_SEGMENTS]
    styles = ((str(offset), index.style_at(offset)) for offset, _, _ in segments)
    return {
        "size": index.size,
        "lines": index.lines,
        "segments": segments,
        "styles": {offset: style for offset, style in styles if style},
        "nextFrom": found[-1][0] if len(found) > _SEGMENTS else None,
        "cut": None if index.cut == (0, 0) else index.cut,
        "status": snapshot.status,
        "version": snapshot.version,
    }


def _head(request: Request) -> bytes:
    """Answer a HEAD without reading anything."""
    request.setHeader("Content-Type", JSON)
    request.setHeader("Cache-Control", "no-store")
    return b""
