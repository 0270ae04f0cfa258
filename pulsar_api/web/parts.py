"""Parts of an output, for who does not want all of it: lines, streams and times, search."""

from itertools import islice
from typing import ClassVar

from attrs import frozen
from klein import Klein
from twisted.web.server import Request

from pulsar_api import wire
from pulsar_api.auth.guard import Guard
from pulsar_api.auth.rights import Right
from pulsar_api.lines import LineIndexes
from pulsar_api.output import NAMES
from pulsar_api.pieces import read_pieces
from pulsar_api.search import search
from pulsar_api.service import MAX_ID
from pulsar_api.web.access import Access, needs
from pulsar_api.web.reply import new_app, reply
from pulsar_api.web.tasks import find, query_of

_SEGMENTS = 4096  # in one answer


@frozen(eq=False)
class PartsAPI:
    """The routes for a page that shows an output of any size."""

    app: ClassVar[Klein] = new_app()

    access: Access
    indexes: LineIndexes

    @app.route("/task/<number>/lines", methods=["GET"])
    @needs(Right.READ)
    async def lines(self, request: Request, tasks: Guard, number: str) -> bytes:
        task = await find(tasks, number)
        start = wire.parse_number(query_of(request), "from", 0, MAX_ID)
        task.refresh()
        # Of now: what comes while the index is made has another version.
        snapshot = task.snapshot
        index = self.indexes.of(snapshot.id)
        await index.reach(snapshot.output_size)
        found = list(islice(index.segments(start), _SEGMENTS + 1))
        answer = {
            "size": index.size,
            "lines": index.lines,
            "segments": [[s.offset, s.line, s.begins] for s in found[:_SEGMENTS]],
            "nextFrom": found[-1].offset if len(found) > _SEGMENTS else None,
            "cut": None if index.cut == (0, 0) else index.cut,
            "status": snapshot.status,
            "version": snapshot.version,
        }
        return reply(request, wire.encode(answer))

    @app.route("/task/<number>/pieces", methods=["GET"])
    @needs(Right.READ)
    async def pieces(self, request: Request, tasks: Guard, number: str) -> bytes:
        task = await find(tasks, number)
        query = query_of(request)
        task.refresh()
        size = task.snapshot.output_size
        start = min(wire.parse_number(query, "offset", 0, MAX_ID), size)
        end = min(wire.parse_number(query, "end", size, MAX_ID), size)
        output = self.indexes.of(task.snapshot.id).output
        found = await read_pieces(output, self.indexes.clock, start, end)
        answer = {
            "offset": found.start,
            "nextOffset": found.next,
            "size": size,
            "began": output.began() or None,
            "pieces": [
                (None if stream is None else NAMES[stream], at, text)
                for stream, at, text in found.pieces
            ],
        }
        return reply(request, wire.encode(answer))

    @app.route("/task/<number>/search", methods=["GET"])
    @needs(Right.READ)
    async def search(self, request: Request, tasks: Guard, number: str) -> bytes:
        task = await find(tasks, number)
        query = query_of(request)
        text = wire.parse_needle(query)
        start = wire.parse_number(query, "from", 0, MAX_ID)
        task.refresh()
        index = self.indexes.of(task.snapshot.id)
        await index.reach(task.snapshot.output_size)
        found = await search(index, self.indexes.clock, text, start)
        answer = {
            "matches": found.matches,
            "nextFrom": found.next,
            "searched": found.searched,
        }
        return reply(request, wire.encode(answer))
