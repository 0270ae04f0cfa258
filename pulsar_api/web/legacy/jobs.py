"""The API of release 0.6, in which tasks are called jobs."""

import re
from itertools import chain
from pathlib import Path
from typing import ClassVar

from attrs import frozen
from klein import Klein
from twisted.web.server import Request

from pulsar_api.auth.guard import Guard
from pulsar_api.auth.rights import Right
from pulsar_api.execution.listings import Listings
from pulsar_api.output.files import output_of
from pulsar_api.tasks.model import TaskQuery, TaskSnapshot
from pulsar_api.web import decoding, encoding
from pulsar_api.web.api.lists import Entry, Lists
from pulsar_api.web.api.tasks import find, query_of, respond
from pulsar_api.web.authentication import Access, needs
from pulsar_api.web.legacy.feed import Feed
from pulsar_api.web.responses import new_app, reply

_LISTED = re.compile(r"^(?:cap |pulsar )?(\S+) +# ?(.*?) *$", re.MULTILINE)
_MAX_PAGE = 1_000_000

RESERVED = frozenset({b"event", b"api", b"static"})
"""Names that no app could have in release 0.6, beside those of its routes."""


@frozen(eq=False)
class JobAPI:
    """The routes of release 0.6 that the main API does not have."""

    app: ClassVar[Klein] = new_app()

    access: Access
    folder: Path
    """The folder with the output of all tasks."""
    feed: Feed
    listings: Listings
    lists: Lists

    @app.route("/<app>/<env>/tasks", methods=["GET"])
    @needs(Right.RUN)
    async def tasks(self, request: Request, tasks: Guard, app: str, env: str) -> bytes:
        """List the actions of an app, as its command does."""
        command = await tasks.listing(app, env)
        text = await self.listings.capture_output(app, command)
        return reply(request, encoding.encode(dict(_LISTED.findall(text))))

    @app.route("/jobs", methods=["GET"])
    @needs(Right.READ)
    async def jobs(self, request: Request, tasks: Guard) -> bytes:
        given = query_of(request)
        page = decoding.parse_number(given, "currentPage", 0, _MAX_PAGE)
        size = decoding.parse_number(given, "pageSize", 10, decoding.MAX_LIST)
        query = TaskQuery(limit=size, offset=page * size)

        def entry(task: TaskSnapshot) -> Entry:
            task, output = encoding.with_output(task, self.folder)
            return Entry(2 * output.weight(), encoding.job_pieces(task, output))

        return await self.lists.answer(request, tasks, query, entry, b"[", b"]\n")

    @app.route("/job/<number>", methods=["GET"])
    @needs(Right.READ)
    async def job(self, request: Request, tasks: Guard, number: str) -> bytes:
        task = (await find(tasks, number)).snapshot
        output = output_of(self.folder, task.id)
        pieces = chain(encoding.job_pieces(task, output), [b"\n"])
        return await respond(request, pieces, 2 * output.weight())

    @app.route("/job/<number>/kill", methods=["POST"])
    @needs(Right.KILL)
    async def kill(self, request: Request, tasks: Guard, number: str) -> bytes:
        task = await find(tasks, number)
        await tasks.kill(task.snapshot.id)
        return reply(request, b"OK", kind="text/plain; charset=utf-8")

    @app.route("/job/<number>/restart", methods=["POST"])
    @needs(Right.RUN)
    async def restart(self, request: Request, tasks: Guard, number: str) -> bytes:
        """Create a task like an old one, which does not change."""
        old = await find(tasks, number)
        new = (await tasks.restart(old.snapshot.id)).snapshot
        self.feed.hold(new.id, request)
        request.setHeader("Location", f"/task/{new.id}")
        url = encoding.task_url(self.access.origins.base(request), new.id)
        return reply(request, encoding.encode({"id": new.id, "url": url}))
