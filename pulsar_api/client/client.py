"""A client for programs: creates tasks, follows and kills them, whatever happens between.

All of it works on any Twisted reactor; nothing here starts or stops one::

    client = Client(reactor, "https://deploy.example.com:8081")
    task = await client.create("shop", "production", "deploy", {"branch": "main"})
    async for piece in client.follow(task.id):
        print(piece.text, end="")
    print((await client.wait(task.id)).exit_code)

Connections that break and a daemon that is started again are not errors: what can be
repeated is, for ``patience`` seconds without any answer. A server that accepts and does not
answer is one, after ``deadline`` seconds; so is one that answers without end.
"""

import json
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, cast
from urllib.parse import quote, urlencode
from uuid import uuid4

from attrs import define, field, frozen
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import load_pem_x509_certificates
from OpenSSL import SSL
from OpenSSL.crypto import FILETYPE_ASN1
from treq.client import HTTPClient
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import (
    ConnectError,
    ConnectingCancelledError,
    ConnectionAborted,
    ConnectionLost,
    DNSLookupError,
)
from twisted.internet.error import TimeoutError as ConnectTimeout
from twisted.internet.protocol import Protocol, connectionDone
from twisted.internet.ssl import Certificate, trustRootFromCertificates
from twisted.internet.task import deferLater
from twisted.python.failure import Failure
from twisted.web.client import (
    BrowserLikePolicyForHTTPS,
    HTTPConnectionPool,
    ResponseDone,
    ResponseFailed,
    ResponseNeverReceived,
)
from twisted.web.error import SchemeNotSupported
from twisted.web.http_headers import Headers
from twisted.web.iweb import IResponse

from pulsar_api.client.http import Body, Late, TooLarge, bounded_agent

PATIENCE = 60.0
"""Seconds without any answer after which a client gives up."""
FIRST = 3.0
"""The same, before the daemon has answered for the first time."""
ANSWER = 20.0
"""Seconds within which an answer must begin; and within which a small one must end."""
SILENCE = 45.0
"""Seconds without a line after which an event stream is taken for dead.

The daemon says each 15 seconds that it is alive.
"""
POLL = 25.0
"""Seconds for which a long-poll asks the daemon to wait, if its settings allow so much."""
_PAUSES = (0.05, 0.1, 0.2, 0.5, 1.0)  # seconds between two tries, the last one again
_MANY = 1 << 20  # bytes that wait to be read before the daemon is asked to wait
_LINE = 4 << 20  # bytes of one line of an event stream
_TASK = 2 << 20  # bytes of a task without its output, and of an error
_LISTED = 100  # tasks of that size in a list
_FIELDS = frozenset(
    {
        *("id", "status", "app", "env", "action", "exitCode", "outputSize", "command"),
        *("signal", "reason", "variables", "waitingFor", "url"),
        *("createdAt", "startedAt", "endedAt"),
    }
)
_BROKEN = (
    ConnectError,
    ConnectionLost,
    ConnectTimeout,
    DNSLookupError,
    ResponseFailed,
    ResponseNeverReceived,
)
_GATEWAY = frozenset({502, 503, 504})  # of a proxy, while the daemon is away
_AGAIN = frozenset(
    {
        "gateway",
        "key-in-flight",
        "provider-unavailable",
        "starting",
        "stopping",
        "too-many-connections",
        "too-many-from-address",
        "too-many-requests",
    }
)


class ClientError(Exception):
    """What can go wrong; the message is a sentence for people."""


@frozen(str=False)
class Refused(ClientError):
    """The daemon says no."""

    status: int
    """Of the HTTP answer."""
    kind: str
    """What docs/api.rst calls it, as ``unknown-task``."""
    detail: str
    retry_after: float | None = None
    """Seconds after which it may be worth another try."""

    def __str__(self) -> str:
        return self.detail


@frozen(str=False)
class Unreachable(ClientError):
    """Nobody answers, or not as the daemon does."""

    url: str
    detail: str

    def __str__(self) -> str:
        return f"{self.url} cannot be reached: {self.detail}"


@frozen
class Task:
    """A task as the daemon shows it. ``data`` has every field of docs/api.rst."""

    data: Mapping[str, Any]

    @property
    def id(self) -> int:
        """Its number."""
        return cast("int", self.data["id"])

    @property
    def status(self) -> str:
        """``created``, ``running``, ``finished``, ``failed``, ``killed`` or ``lost``."""
        return cast("str", self.data["status"])

    @property
    def ended(self) -> bool:
        """Whether nothing can change any more."""
        return self.status not in {"created", "running"}

    @property
    def exit_code(self) -> int | None:
        """What the command answered; None until then, and after death by a signal."""
        return cast("int | None", self.data["exitCode"])


@frozen
class Piece:
    """A part of the output."""

    stream: str | None
    """``stdout`` or ``stderr``; None: nobody knows, or a line about what was cut."""
    offset: int
    """At which byte of the output it begins."""
    text: str
    end: int
    """At which byte the next piece begins; ``text`` may be longer or shorter in UTF-8."""


@frozen
class Event:
    """Something that happened to a task: ``state``, ``output`` or ``end``."""

    kind: str
    data: Mapping[str, Any]
    end: int
    """How many bytes of the output come before the next event."""


class _Lines(Protocol):
    """The body of an answer, line by line, no faster than it is asked for."""

    def __init__(self) -> None:
        self._lines: deque[bytes] = deque()
        self._rest = b""
        self._waiting: Deferred[None] | None = None
        self._end: Failure | None = None
        self._held = 0
        self._paused = False

    def dataReceived(self, data: bytes) -> None:
        """Take bytes."""
        *whole, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _LINE:
            self._rest = b""
            self.close()
            self._end = Failure(TooLarge(_LINE))
        self._lines.extend(whole)
        self._held += len(data)
        if self._held > _MANY and not self._paused:
            self._paused = True
            cast("Any", self.transport).pauseProducing()
        self._wake()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Take the end."""
        self._end = self._end or reason
        self._wake()

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.callback(None)

    def next(self) -> Deferred[bytes | None]:
        """Fire with the next line; None at a good end; fail at another."""
        return Deferred.fromCoroutine(self._next())

    async def _next(self) -> bytes | None:
        while not self._lines:
            if self._end is not None:
                if self._end.check(ResponseDone):
                    return None
                self._end.trap(*_BROKEN)  # anything else is no reason to try again
                raise ResponseFailed([self._end])
            if self._paused:
                self._paused = False
                cast("Any", self.transport).resumeProducing()
            self._waiting = Deferred()
            await self._waiting
        line = self._lines.popleft()
        self._held -= len(line) + 1
        return line

    def close(self) -> None:
        """Want no more."""
        if self._end is None and self.transport is not None:
            cast("Any", self.transport).loseConnection()


def _without_slash(url: str) -> str:
    return url.rstrip("/")


@define(eq=False)
class Client:
    """Talks to one daemon.

    ``ca_file``: certificates (PEM) to trust instead of those of the system. ``token`` is
    sent as a bearer token. Each call ends: with what it is for, or with `Refused` or
    `Unreachable`, whatever the server does.
    """

    _reactor: Any
    url: str = field(converter=_without_slash)
    token: str | None = None
    ca_file: Path | None = None
    patience: float = PATIENCE
    deadline: float = ANSWER
    silence: float = SILENCE
    poll: float = POLL
    _new_key: Callable[[], str] = lambda: uuid4().hex
    met: bool = field(default=False, init=False)
    """Whether the daemon has answered anything."""
    _http: HTTPClient = field(init=False)
    _pool: HTTPConnectionPool = field(init=False)

    def __attrs_post_init__(self) -> None:
        policy = BrowserLikePolicyForHTTPS()
        if self.ca_file is not None:
            try:
                bundle = load_pem_x509_certificates(self.ca_file.read_bytes())
            except (OSError, ValueError) as e:
                raise Unreachable(self.url, f"{self.ca_file}: {e}") from None
            found = [
                Certificate.load(one.public_bytes(Encoding.DER), FILETYPE_ASN1)
                for one in bundle
            ]
            policy = BrowserLikePolicyForHTTPS(trustRootFromCertificates(found))
        self._pool = HTTPConnectionPool(self._reactor, persistent=True)
        self._http = HTTPClient(bounded_agent(self._reactor, policy, self._pool))

    async def close(self) -> None:
        """Close the connections that are kept for later."""
        # The one whose answer was read just now is kept only after this turn.
        await deferLater(self._reactor, 0)
        await self._pool.closeCachedConnections()

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

        ``key`` is the Idempotency-Key; without one there is a new one for each call.
        Raises `Refused` and `Unreachable`.
        """
        path = f"/{quote(app, safe='')}/{quote(env, safe='')}"
        body = {"action": action, "variables": dict(variables or {})}
        headers = {"Idempotency-Key": key or self._new_key()}
        made = await self._json("POST", path, body, headers)
        if not isinstance(made.get("id"), int):
            raise self._no_daemon("there is no number of a task")
        return await self.get(made["id"])

    async def get(self, task_id: int, output: str = "none") -> Task:
        """Return a task; with its output: ``full`` or ``tail``."""
        most = None if output == "full" else _TASK
        path = f"/task/{task_id}?output={output}"
        return self._task(await self._json("GET", path, most=most))

    async def tasks(self, **query: object) -> list[Task]:
        """Return tasks, newest first.

        Filters: limit, before, status, app, env, user, output.
        """
        given = {"output": "none", **query}
        most = None if given["output"] == "full" else _LISTED * _TASK
        answer = await self._json("GET", f"/tasks?{urlencode(given)}", most=most)
        found = answer.get("tasks")
        if not isinstance(found, dict):
            raise self._no_daemon("there is no list of tasks")
        tasks = [self._task(data) for data in found.values()]
        return sorted(tasks, key=lambda task: -task.id)

    async def kill(self, task_id: int) -> Task:
        """Ask for the end of a task and all its processes; of an ended one: nothing."""
        return self._task(await self._json("POST", f"/task/{task_id}/kill?output=none"))

    async def free(self, app: str, env: str) -> list[int]:
        """Give back a target that processes hold which could not be killed.

        Returns the ids of the tasks that held it. Needs the right ``admin``.
        """
        path = f"/targets/{quote(app, safe='')}/{quote(env, safe='')}/free"
        answer = await self._json("POST", path)
        freed: list[int] = answer["freed"]
        return freed

    async def wait(self, task_id: int) -> Task:
        """Return a task when it has ended."""
        while True:
            path = f"/task/{task_id}/state?output=none&timeout={self.poll:g}"
            try:
                answer = await self._json("GET", path, wait=self.poll)
            except Refused as e:
                if e.kind != "invalid-input" or self.poll <= 1:
                    raise
                self.poll = max(1.0, self.poll / 2)  # its settings allow less
                continue
            if answer.get("changed"):
                task = self._task(answer.get("task"))
                if task.ended:
                    return task

    async def follow(self, task_id: int, offset: int = 0) -> AsyncIterator[Piece]:
        """Yield what a task prints, as it comes, from a byte of its output on.

        Every byte once, whatever happens to connections and the daemon.
        """
        async for event in self.events(task_id, offset):
            if event.kind == "output":
                data = event.data
                yield Piece(data["stream"], data["offset"], data["text"], event.end)

    async def events(self, task_id: int, offset: int = 0) -> AsyncIterator[Event]:
        """Yield what happens to a task; the last one is ``end``."""
        cursor = ""
        tries = _Tries(self, self._reactor)
        path = f"/task/{task_id}/events?offset={offset}"
        while True:
            error: Exception | None = None
            try:
                async for event, after in self._stream(path, cursor, tries):
                    cursor = after
                    yield event
                    if event.kind == "end":
                        return
            except (Refused, Late, *_BROKEN) as e:
                error = e
            except TooLarge as e:
                raise self._no_daemon(e) from None
            await tries.again(error)

    async def _stream(
        self, path: str, cursor: str, tries: "_Tries"
    ) -> AsyncIterator[tuple[Event, str]]:
        """Yield the events after a cursor, each with its own, until the connection ends."""
        headers = {"Last-Event-ID": cursor} if cursor else {}
        lines = _Lines()
        (await self._answer("GET", path, None, headers)).deliverBody(lines)
        kind = ""
        try:
            while (line := await self._line(lines)) is not None:
                tries.begin()  # also a comment says that the daemon is there
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

    async def _line(self, lines: _Lines) -> bytes | None:
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
        """Send a request that may be repeated until it is answered; return its JSON.

        ``wait``: seconds for which the daemon may wait before it answers. ``most``: bytes
        that the answer may have.
        """
        tries = _Tries(self, self._reactor)
        while True:
            try:
                response = await self._answer(method, path, body, headers or {}, wait)
                value = json.loads(await self._content(response, most))
            except (Refused, Late, *_BROKEN) as e:
                await tries.again(e)
            except (TooLarge, ValueError, RecursionError) as e:
                raise self._no_daemon(e) from None
            else:
                self.met = True
                if isinstance(value, dict):
                    return value
                raise self._no_daemon("that is no object")

    def _no_daemon(self, why: object) -> Unreachable:
        return Unreachable(self.url, f"what answers is no daemon ({why})")

    def _task(self, data: object) -> Task:
        if isinstance(data, dict) and data.keys() >= _FIELDS:
            return Task(data)
        raise self._no_daemon("that is no task")

    def _content(self, response: IResponse, most: int | None) -> Deferred[bytes]:
        body = Body(self._reactor, self.deadline, most)
        response.deliverBody(body)
        return body.whole

    async def _answer(
        self,
        method: str,
        path: str,
        body: object,
        headers: Mapping[str, str],
        wait: float = 0.0,
    ) -> IResponse:
        given = Headers({name: [value] for name, value in headers.items()})
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            given.setRawHeaders("Content-Type", ["application/json"])
        if self.token is not None:
            given.setRawHeaders("Authorization", [f"Bearer {self.token}"])
        try:
            response = await self._head(method, path, data, given, wait + self.deadline)
        except (SSL.Error, *_BROKEN) as e:
            why = _tls_reason(e)
            if why:
                raise Unreachable(self.url, why) from None
            raise
        except ConnectingCancelledError:
            raise CancelledError from None
        except (ValueError, TypeError, SchemeNotSupported) as e:
            raise Unreachable(self.url, f"no address of a daemon: {e}") from None
        if response.code >= 300:
            raise await self._refusal(response)
        return cast("IResponse", response)

    def _head(
        self, method: str, path: str, data: bytes | None, headers: Headers, seconds: float
    ) -> Deferred[Any]:
        """Send a request; fire with the head of its answer, or fail with `Late`."""

        def late(*_: object) -> NoReturn:
            raise Late(seconds)

        answer: Deferred[Any] = self._http.request(
            method,
            self.url + path,
            data=data,
            headers=headers,
            allow_redirects=False,
            unbuffered=True,  # else treq would keep all that is ever followed
        )
        return answer.addTimeout(seconds, self._reactor, late)

    async def _refusal(self, response: Any) -> ClientError:
        """Return what an answer that is no success means."""
        text = await self._content(response, _TASK)
        self.met = True
        try:
            problem = json.loads(text)
            kind = problem["type"].rpartition(":")[2]
            detail = str(problem["detail"])
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            error = self._no_daemon(f"status {response.code}")
            if response.code in _GATEWAY:
                return Refused(response.code, "gateway", error.detail)
            return error
        after = response.headers.getRawHeaders("retry-after", [None])[0]
        wait = None if after is None or not after.isdigit() else float(after)
        return Refused(response.code, kind, detail, wait)


def _tls_reason(error: BaseException) -> str:
    """Return why a certificate is not trusted; "" if that is not what has happened."""
    reasons = getattr(error, "reasons", [])
    for failure in reasons:
        value = getattr(failure, "value", failure)
        if isinstance(value, SSL.Error):
            words = [part for entry in value.args[:1] for part in entry]
            text = ", ".join(part[-1] for part in words if part and part[-1])
            return f"TLS: {text or value!r}"
        if type(value).__name__ == "VerificationError":
            return "TLS: the certificate is for another name"
    return ""


@define(eq=False)
class _Tries:
    """Waits between two tries, and gives up when nobody has answered for too long."""

    client: Client
    _reactor: Any
    _count: int = 0
    _since: float | None = None
    """When it first failed since the last answer."""

    def begin(self) -> None:
        """There was an answer."""
        self.client.met = True
        self._count = 0
        self._since = None

    async def again(self, error: Exception | None) -> None:
        """Wait for the next try, or raise."""
        if any(failure.check(CancelledError) for failure in getattr(error, "reasons", [])):
            raise CancelledError  # by whoever waits for us, not by the daemon
        seconds = 0.0
        if isinstance(error, Refused):
            if error.kind not in _AGAIN:
                raise error
            seconds = min(error.retry_after or 0.0, 5.0)
        now = self._reactor.seconds()
        waited = error.seconds if isinstance(error, Late) else 0.0
        since = self._since = now - waited if self._since is None else self._since
        client = self.client
        patience = client.patience if client.met else min(client.patience, FIRST)
        if now >= since + patience:
            if isinstance(error, Refused):
                raise error
            raise Unreachable(client.url, _reason(error)) from None
        pause = _PAUSES[min(self._count, len(_PAUSES) - 1)]
        self._count += 1
        await deferLater(self._reactor, max(pause, seconds))


def _reason(error: BaseException | None) -> str:
    if isinstance(error, ResponseFailed):
        return "; ".join(_reason(failure.value) for failure in error.reasons)
    if isinstance(error, ConnectionAborted):  # by nobody but us
        return "the head of its answer does not end"
    return str(error) if error is not None else "the connection is closed again and again"
