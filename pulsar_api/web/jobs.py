"""The API of release 0.6: the same tasks, called jobs, for the clients of those days."""

import re
from collections.abc import Awaitable, Callable
from itertools import chain
from pathlib import Path
from typing import ClassVar

from attrs import field, frozen
from klein import Klein
from twisted.internet.defer import DeferredSemaphore
from twisted.web.server import Request

from pulsar_api import wire
from pulsar_api.errors import NotRestartable, SecretsGone
from pulsar_api.output import Output
from pulsar_api.service import TaskService
from pulsar_api.task import Command, Status, TaskQuery
from pulsar_api.web.feed import Feed
from pulsar_api.web.origin import Origins
from pulsar_api.web.reply import new_app, reply
from pulsar_api.web.tasks import caller, find, query_of, respond

LISTED = 60.0
"""Seconds for a command to say which actions there are."""

_LISTED = re.compile(r"^(?:cap |pulsar )?(\S+) +# ?(.*?) *$", re.MULTILINE)
_LISTS = 2  # such commands at the same time
_MOST_PAGES = 1_000_000


@frozen(eq=False)
class JobAPI:
    """The routes of release 0.6 that are not those of the document."""

    app: ClassVar[Klein] = new_app()

    service: TaskService
    folder: Path
    """Where the output of task 47 is in the folder ``47``."""
    origins: Origins
    feed: Feed
    ask: Callable[[Command], Awaitable[str]]
    """Returns what a command prints, "" if it cannot be run."""
    _asking: DeferredSemaphore = field(factory=lambda: DeferredSemaphore(_LISTS))

    @app.route("/<app>/<env>/tasks", methods=["GET"])
    async def tasks(self, request: Request, app: str, env: str) -> bytes:
        """Answer which actions there are, as the command itself says."""
        self.origins.check(request)
        command = await self.service.listing(app, env)
        await self._asking.acquire()
        try:
            text = await self.ask(command)
        finally:
            self._asking.release()
        return reply(request, wire.encode(dict(_LISTED.findall(text))))

    @app.route("/jobs", methods=["GET"])
    async def jobs(self, request: Request) -> bytes:
        query = query_of(request)
        page = wire.parse_number(query, "currentPage", 0, _MOST_PAGES)
        size = wire.parse_number(query, "pageSize", 10, wire.MAX_LIST)
        found = await self.service.list(TaskQuery(limit=size, offset=page * size))
        pieces = chain(
            [b"["],
            *(
                chain(
                    [b", " if place else b""],
                    wire.job_pieces(task, Output(self.folder / str(task.id))),
                )
                for place, task in enumerate(found)
            ),
            [b"]\n"],
        )
        return await respond(request, pieces, 2 * sum(task.output_size for task in found))

    @app.route("/job/<number>", methods=["GET"])
    async def job(self, request: Request, number: str) -> bytes:
        task = (await find(self.service, number)).snapshot
        pieces = wire.job_pieces(task, Output(self.folder / str(task.id)))
        return await respond(request, chain(pieces, [b"\n"]), 2 * task.output_size)

    @app.route("/job/<number>/kill", methods=["POST"])
    async def kill(self, request: Request, number: str) -> bytes:
        self.origins.check(request)
        task = await find(self.service, number)
        await self.service.kill(task.snapshot.id, caller(request))
        return reply(request, b"OK", kind="text/plain; charset=utf-8")

    @app.route("/job/<number>/restart", methods=["POST"])
    async def restart(self, request: Request, number: str) -> bytes:
        """Start a new task of the same kind; the old one stays what it is."""
        self.origins.check(request)
        old = (await find(self.service, number)).snapshot
        if old.status not in {Status.FAILED, Status.KILLED, Status.LOST}:
            raise NotRestartable(old.id, old.status)
        if old.spec.secret_names:
            raise SecretsGone(old.id)
        new = (await self.service.create(old.spec)).snapshot
        self.feed.hold(new.id, request)
        request.setHeader("Location", f"/task/{new.id}")
        url = wire.task_url(self.origins.base(request), new.id)
        return reply(request, wire.encode({"id": new.id, "url": url}))
