"""The routes about targets: an app and an env."""

from typing import ClassVar

from attrs import frozen
from klein import Klein
from twisted.web.server import Request

from pulsar_api.auth.guard import Guard
from pulsar_api.auth.rights import Right
from pulsar_api.web import encoding
from pulsar_api.web.authentication import Access, needs
from pulsar_api.web.responses import new_app, reply


@frozen(eq=False)
class TargetAPI:
    """The routes below ``/targets``."""

    app: ClassVar[Klein] = new_app()

    access: Access

    @app.route("/targets/<app>/<env>/free", methods=["POST"])
    @needs(Right.ADMIN)
    async def free(self, request: Request, tasks: Guard, app: str, env: str) -> bytes:
        freed = list(await tasks.free(app, env))
        return reply(request, encoding.encode({"app": app, "env": env, "freed": freed}))
