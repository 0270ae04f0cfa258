"""The client: creates, follows and kills tasks, over broken connections and restarts.

It works on any Twisted reactor and neither starts nor stops one::

    client = Client(reactor, "https://deploy.example.com:8081")
    task = await client.create("shop", "production", "deploy", {"branch": "main"})
    async for piece in client.follow(task.id):
        print(piece.text, end="")
    print((await client.wait(task.id)).exit_code)

A broken connection and a restart of the daemon are no errors: requests are repeated until
there has been no answer for ``patience`` seconds. A server that does not answer a request
within ``deadline`` seconds, or whose answer does not end, counts as one without an answer.
"""

import json
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote, urlencode
from uuid import uuid4

from attrs import define, field

from pulsar_api.client.errors import Refused, Unreachable, not_the_daemon
from pulsar_api.client.http import Late, TooLarge
from pulsar_api.client.lines import Lines
from pulsar_api.client.model import Event, Piece, Task
from pulsar_api.client.retries import BROKEN, Retries
from pulsar_api.client.transport import Transport
from pulsar_api.client.trust import policy_for

PATIENCE = 60.0
"""Seconds without any answer after which a client gives up."""
ANSWER = 20.0
"""Seconds within which an answer must begin, and a small one must end."""
SILENCE = 45.0
"""Seconds without a line after which an event stream is taken for broken.

The daemon sends a comment every 15 seconds.
"""
POLL = 25.0
"""Seconds that the daemon is asked to wait in a long-poll, if its settings allow that."""
_TASK = 2 << 20  # bytes of a task without its output, and of an error
_LISTED = 100  # tasks of that size in a list
_FIELDS = frozenset(
    {
        *("id", "status", "app", "env", "action", "exitCode", "outputSize", "command"),
        *("signal", "reason", "variables", "waitingFor", "url"),
        *("createdAt", "startedAt", "endedAt"),
    }
)


def random_key() -> str:
    """Return a new key."""
    return uuid4().hex


def _without_slash(url: str) -> str:
    return url.rstrip("/")


@define(eq=False)
class Client:
    """A client of one daemon.

    ``token`` is sent as a bearer token. ``ca_file`` has certificates (PEM) to trust instead
    of the system's. ``new_key`` makes the Idempotency-Key of a new task. Each call ends
    with its result, `Refused` or `Unreachable`, whatever the server does.
    """

    _reactor: Any
    url: str = field(converter=_without_slash)
    token: str | None = field(default=None, repr=False)
    ca_file: Path | None = None
    patience: float = PATIENCE
    deadline: float = ANSWER
    silence: float = SILENCE
    poll: float = POLL
    _new_key: Callable[[], str] = random_key
    met: bool = field(default=False, init=False)
    """Whether the daemon has ever answered."""
    _transport: Transport = field(init=False)

    def __attrs_post_init__(self) -> None:
        try:
            policy = policy_for(self.ca_file)
        except (OSError, ValueError) as e:
            raise Unreachable(self.url, f"{self.ca_file}: {e}") from None
        self._transport = Transport(self._reactor, self, policy)

    async def close(self) -> None:
        """Close the connections that are kept for later."""
        await self._transport.close()

    async def create(
        self,
        app: str,
        env: str,
        action: str,
        variables: Mapping[str, str] | None = None,
        *,
        key: str | None = None,
    ) -> Task:
        """Create a task, at most once, however often the request has to be sent.

        ``key`` is the Idempotency-Key; without it each call has a new one.

        Raises:
            Refused: The daemon has refused the task.
            Unreachable: The daemon does not answer.
        """
        path = f"/{quote(app, safe='')}/{quote(env, safe='')}"
        body = {"action": action, "variables": dict(variables or {})}
        headers = {"Idempotency-Key": key or self._new_key()}
        made = await self._json("POST", path, body, headers)
        if not isinstance(made.get("id"), int):
            raise self._no_daemon("the answer has no task id")
        return await self.get(made["id"])

    async def get(self, task_id: int, output: str = "none") -> Task:
        """Return a task. It raises the errors of `create`.

        ``output``: ``full``, ``tail`` or ``none``.
        """
        most = None if output == "full" else _TASK
        path = f"/task/{task_id}?output={output}"
        return self._task(await self._json("GET", path, most=most))

    async def tasks(self, **query: object) -> list[Task]:
        """Return the tasks that match, newest first. It raises the errors of `create`.

        ``query``: limit, before, status, app, env, user, output.
        """
        given = {"output": "none", **query}
        most = None if given["output"] == "full" else _LISTED * _TASK
        answer = await self._json("GET", f"/tasks?{urlencode(given)}", most=most)
        found = answer.get("tasks")
        if not isinstance(found, dict):
            raise self._no_daemon("the answer has no tasks")
        tasks = [self._task(data) for data in found.values()]
        return sorted(tasks, key=lambda task: -task.id)

    async def kill(self, task_id: int) -> Task:
        """Tell a task and all its processes to end. It raises the errors of `create`.

        Nothing happens to a task that has ended.
        """
        return self._task(await self._json("POST", f"/task/{task_id}/kill?output=none"))

    async def free(self, app: str, env: str) -> list[int]:
        """Free a target that is held by processes which could not be killed.

        Returns the ids of the tasks that held it. Needs the right ``admin``. Raises as
        `create`.
        """
        path = f"/targets/{quote(app, safe='')}/{quote(env, safe='')}/free"
        answer = await self._json("POST", path)
        freed: list[int] = answer["freed"]
        return freed

    async def wait(self, task_id: int) -> Task:
        """Return a task when it has ended. It raises the errors of `create`."""
        while True:
            path = f"/task/{task_id}/state?output=none&timeout={self.poll:g}"
            try:
                answer = await self._json("GET", path, wait=self.poll)
            except Refused as e:
                if e.kind != "invalid-input" or self.poll <= 1:
                    raise
                self.poll = max(1.0, self.poll / 2)  # the daemon's settings allow less
                continue
            if answer.get("changed"):
                task = self._task(answer.get("task"))
                if task.ended:
                    return task

    async def follow(self, task_id: int, offset: int = 0) -> AsyncIterator[Piece]:
        """Yield what a task prints, as it comes, from a byte of its output on.

        Every byte comes once, whatever happens to connections and the daemon. Raises as
        `create`.
        """
        async for event in self.events(task_id, offset):
            if event.kind == "output":
                data = event.data
                yield Piece(data["stream"], data["offset"], data["text"], event.end)

    async def events(self, task_id: int, offset: int = 0) -> AsyncIterator[Event]:
        """Yield the events of a task, of which ``end`` is the last.

        It raises the errors of `create`.
        """
        cursor = ""
        tries = Retries(self, self._reactor)
        path = f"/task/{task_id}/events?offset={offset}"
        while True:
            error: Exception | None = None
            try:
                async for event, after in self._stream(path, cursor, tries):
                    cursor = after
                    yield event
                    if event.kind == "end":
                        return
            except (Refused, Late, *BROKEN) as e:
                self.met = self.met or isinstance(e, Refused)
                error = e
            except TooLarge as e:
                raise self._no_daemon(e) from None
            await tries.again(error)

    async def _stream(
        self, path: str, cursor: str, tries: "Retries"
    ) -> AsyncIterator[tuple[Event, str]]:
        """Yield the events after a cursor, each with its own, until the connection ends."""
        headers = {"Last-Event-ID": cursor} if cursor else {}
        lines = Lines()
        (await self._transport.answer("GET", path, None, headers)).deliverBody(lines)
        kind = ""
        try:
            while (line := await self._line(lines)) is not None:
                tries.begin()  # a comment also shows that the daemon is there
                name, _, value = line.decode("utf-8", "replace").partition(": ")
                if name == "event":
                    kind = value
                elif name == "id":
                    cursor = value
                elif name == "data":
                    yield self._event(kind, value, cursor), cursor
        finally:
            lines.close()

    def _event(self, kind: str, text: str, cursor: str) -> Event:
        try:
            return Event(kind, json.loads(text), int(cursor.partition("-")[0]))
        except (ValueError, RecursionError) as e:
            raise self._no_daemon(e) from None

    async def _line(self, lines: Lines) -> bytes | None:
        def silent(*_: object) -> NoReturn:
            raise Late(self.silence)

        return await lines.next().addTimeout(self.silence, self._reactor, silent)

    async def _json(
        self,
        method: str,
        path: str,
        body: object = None,
        headers: Mapping[str, str] | None = None,
        *,
        wait: float = 0.0,
        most: int | None = _TASK,
    ) -> dict[str, Any]:
        """Send a request, again if need be, and return the JSON of its answer.

        ``wait``: seconds that the daemon may wait before it answers. ``most``: bytes that
        the answer may have.
        """
        tries = Retries(self, self._reactor)
        while True:
            try:
                response = await self._transport.answer(
                    method, path, body, headers or {}, wait
                )
                value = json.loads(await self._transport.content(response, most))
            except (Refused, Late, *BROKEN) as e:
                self.met = self.met or isinstance(e, Refused)
                await tries.again(e)
            except (TooLarge, ValueError, RecursionError) as e:
                raise self._no_daemon(e) from None
            else:
                self.met = True
                if isinstance(value, dict):
                    return value
                raise self._no_daemon("it is not a JSON object")

    def _no_daemon(self, why: object) -> Unreachable:
        return not_the_daemon(self.url, why)

    def _task(self, data: object) -> Task:
        if isinstance(data, dict) and data.keys() >= _FIELDS:
            return Task(data)
        raise self._no_daemon("it is not a task")
