"""The route that creates tasks."""

from itertools import chain
from pathlib import Path
from typing import ClassVar

from attrs import frozen
from klein import Klein
from twisted.web.server import Request

from pulsar_api.auth.guard import Guard
from pulsar_api.auth.rights import Right
from pulsar_api.output.files import output_of
from pulsar_api.web import decoding, encoding, json_stream
from pulsar_api.web.api.tasks import query_of, respond
from pulsar_api.web.authentication import Access, needs
from pulsar_api.web.legacy.feed import Feed
from pulsar_api.web.responses import header, new_app, reply
from pulsar_api.web.server.body import body_of


@frozen(eq=False)
class CreateAPI:
    """``POST /:app/:env``. It has no other routes, as an app may have almost any name."""

    app: ClassVar[Klein] = new_app()

    access: Access
    folder: Path
    """The folder with the output of all tasks."""
    feed: Feed
    """Holds back the news of a task until its POST is answered."""

    @app.route("/<app>/<env>", methods=["POST"])
    @needs(Right.RUN)
    async def create(self, request: Request, tasks: Guard, app: str, env: str) -> bytes:
        asked = decoding.parse_new_task(
            header(request, "content-type"),
            await body_of(request, tasks.caller.actor.key),
            query_of(request),
        )
        variables, secret = asked.variables, asked.secret
        key = decoding.parse_key(request.requestHeaders.getRawHeaders("idempotency-key"))
        task = await tasks.create(app, env, asked.action, variables, secret, key)
        number = task.snapshot.id
        if self.feed is not None:
            self.feed.hold(number, request)
        request.setHeader("Location", f"/task/{number}")
        url = encoding.task_url(self.access.origins.base(request), number)
        fields: dict[str, object] = {"taskId": number, "id": number, "url": url}
        if task.snapshot.notes:
            fields["notes"] = list(task.snapshot.notes)
        if not asked.wait:
            return reply(request, encoding.encode(fields))
        if not task.snapshot.status.ended:
            # A client that goes away stops the waiting, not the task.
            await task.end.after(0)
        output = output_of(self.folder, number)
        job = encoding.job_pieces(task.snapshot, output)
        pieces = chain(json_stream.pieces(fields, data=job), [b"\n"])
        return await respond(request, pieces, 2 * output.weight())
