"""A client for programs: creates tasks, follows and kills them, whatever happens between.

All of it works on any Twisted reactor; nothing here starts or stops one::

    client = Client(reactor, "https://deploy.example.com:8081")
    task = await client.create("shop", "production", "deploy", {"branch": "main"})
    async for piece in client.follow(task.id):
        print(piece.text, end="")
    print((await client.wait(task.id)).exit_code)

Connections that break and a daemon that is started again are not errors: what can be
repeated is, for ``patience`` seconds without any answer.
"""

import json
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, cast
from urllib.parse import quote, urlencode
from uuid import uuid4

import treq
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
    ConnectionLost,
    DNSLookupError,
)
from twisted.internet.error import TimeoutError as ConnectTimeout
from twisted.internet.protocol import Protocol, connectionDone
from twisted.internet.ssl import Certificate, trustRootFromCertificates
from twisted.internet.task import deferLater
from twisted.python.failure import Failure
from twisted.web.client import (
    Agent,
    BrowserLikePolicyForHTTPS,
    HTTPConnectionPool,
    ResponseDone,
    ResponseFailed,
    ResponseNeverReceived,
)
from twisted.web.error import SchemeNotSupported
from twisted.web.http_headers import Headers
from twisted.web.iweb import IResponse

PATIENCE = 60.0
"""Seconds without any answer after which a client gives up."""
FIRST = 3.0
"""The same, before the daemon has answered for the first time."""
SILENCE = 45.0
"""Seconds without a byte after which an event stream is taken for dead.

The daemon says each 15 seconds that it is alive.
"""
_CONNECT = 10.0
_PAUSES = (0.05, 0.1, 0.2, 0.5, 1.0)  # seconds between two tries, the last one again
_MANY = 1 << 20  # bytes that wait to be read before the daemon is asked to wait
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
        self._lines.extend(whole)
        self._held += len(data)
        if self._held > _MANY and not self._paused:
            self._paused = True
            cast("Any", self.transport).pauseProducing()
        self._wake()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Take the end."""
        self._end = reason
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
    sent as a bearer token.
    """

    _reactor: Any
    url: str = field(converter=_without_slash)
    token: str | None = None
    ca_file: Path | None = None
    patience: float = PATIENCE
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
        agent = Agent(self._reactor, policy, connectTimeout=_CONNECT, pool=self._pool)
        self._http = HTTPClient(agent)

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
        return await self.get(made["id"])

    async def get(self, task_id: int, output: str = "none") -> Task:
        """Return a task; with its output: ``full`` or ``tail``."""
        return Task(await self._json("GET", f"/task/{task_id}?output={output}"))

    async def tasks(self, **query: object) -> list[Task]:
        """Return tasks, newest first.

        Filters: limit, before, status, app, env, user, output.
        """
        given = {"output": "none", **query}
        answer = await self._json("GET", f"/tasks?{urlencode(given)}")
        tasks = [Task(data) for data in answer["tasks"].values()]
        return sorted(tasks, key=lambda task: -task.id)

    async def kill(self, task_id: int) -> Task:
        """Ask for the end of a task and all its processes; of an ended one: nothing."""
        return Task(await self._json("POST", f"/task/{task_id}/kill?output=none"))

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
            answer = await self._json("GET", f"/task/{task_id}/state?output=none")
            if answer["changed"] and Task(answer["task"]).ended:
                return Task(answer["task"])

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
            except (Refused, *_BROKEN) as e:
                error = e
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
                name, _, value = line.decode().partition(": ")
                if name == "event":
                    kind = value
                elif name == "id":
                    cursor = value
                elif name == "data":
                    end = int(cursor.partition("-")[0])
                    yield Event(kind, json.loads(value), end), cursor
        finally:
            lines.close()

    async def _line(self, lines: _Lines) -> bytes | None:
        def silent(*_: object) -> NoReturn:
            raise ConnectionLost("no byte for too long")

        return await lines.next().addTimeout(SILENCE, self._reactor, silent)

    async def _json(
        self,
        method: str,
        path: str,
        body: object = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """Send a request that may be repeated until it is answered; return its JSON."""
        tries = _Tries(self, self._reactor)
        while True:
            try:
                response = await self._answer(method, path, body, headers or {})
                return await treq.json_content(response)
            except _BROKEN as e:
                await tries.again(e)
            except Refused as e:
                await tries.again(e)
            except json.JSONDecodeError as e:
                raise Unreachable(self.url, f"what answers is no daemon ({e})") from None

    async def _answer(
        self, method: str, path: str, body: object, headers: Mapping[str, str]
    ) -> IResponse:
        given = Headers({name: [value] for name, value in headers.items()})
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            given.setRawHeaders("Content-Type", ["application/json"])
        if self.token is not None:
            given.setRawHeaders("Authorization", [f"Bearer {self.token}"])
        try:
            response: Any = await self._http.request(
                method, self.url + path, data=data, headers=given, allow_redirects=False
            )
        except (SSL.Error, *_BROKEN) as e:
            why = _tls_reason(e)
            if why:
                raise Unreachable(self.url, why) from None
            raise
        except ConnectingCancelledError:
            raise CancelledError from None
        except (ValueError, TypeError, SchemeNotSupported) as e:
            raise Unreachable(self.url, f"no address of a daemon: {e}") from None
        self.met = True
        if response.code < 300:
            return cast("IResponse", response)
        text = await treq.content(response)
        try:
            problem = json.loads(text)
            kind = problem["type"].rpartition(":")[2]
            detail = problem["detail"]
        except (ValueError, KeyError, TypeError, AttributeError):
            detail = f"what answers is no daemon (status {response.code})"
            if response.code in _GATEWAY:
                raise Refused(response.code, "gateway", detail) from None
            raise Unreachable(self.url, detail) from None
        after = response.headers.getRawHeaders("retry-after", [None])[0]
        wait = None if after is None or not after.isdigit() else float(after)
        raise Refused(response.code, kind, detail, wait)


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
        self._since = now if self._since is None else self._since
        client = self.client
        patience = client.patience if client.met else min(client.patience, FIRST)
        if now >= self._since + patience:
            if isinstance(error, Refused):
                raise error
            raise Unreachable(client.url, _reason(error)) from None
        pause = _PAUSES[min(self._count, len(_PAUSES) - 1)]
        self._count += 1
        await deferLater(self._reactor, max(pause, seconds))


def _reason(error: Exception | None) -> str:
    if isinstance(error, ResponseFailed):
        return "; ".join(failure.getErrorMessage() for failure in error.reasons)
    return str(error) if error is not None else "the connection is closed again and again"
