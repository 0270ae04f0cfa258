"""Tests of the Python client and the command line against broken servers."""

import resource
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread
from twisted.python.failure import Failure

from pulsar_api.client import Client, Refused, Unreachable
from tests.integration import zygote
from tests.integration.conftest import Start
from tests.integration.daemon import PATIENCE, SHELL

Call = Callable[[Client], Coroutine[Deferred[Any], Any, object]]

OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
NOT_FOUND = b"HTTP/1.1 404 Not Found\r\n\r\n"


class Server(Factory):
    """A server that begins a response and then repeats a piece of bytes."""

    noisy = False
    begin = again = b""
    pause = 0.05

    def __init__(self) -> None:
        self.open: set[Answering] = set()
        any_reactor: Any = reactor
        self.listening = any_reactor.listenTCP(0, self, interface="127.0.0.1")
        self.port: int = self.listening.getHost().port

    def buildProtocol(self, _: object) -> "Answering":
        """Return the protocol of a new connection."""
        return Answering(self)


class Answering(Protocol):
    """One connection."""

    transport: Any

    def __init__(self, server: Server) -> None:
        self.server = server
        self.next: IDelayedCall | None = None

    def connectionMade(self) -> None:
        """Add the connection to those that are open."""
        self.server.open.add(self)

    def dataReceived(self, data: bytes) -> None:
        """Begin the response, once."""
        if self.next is None:
            self.transport.write(self.server.begin)
            if self.server.again:
                self.go_on()

    def go_on(self) -> None:
        """Send the piece now, and again after a pause."""
        self.transport.write(self.server.again)
        self.next = reactor.callLater(self.server.pause, self.go_on)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Remove the connection from those that are open."""
        self.server.open.discard(self)
        if self.next is not None and self.next.active():
            self.next.cancel()


@pytest_twisted.async_yield_fixture
async def server() -> AsyncIterator[Server]:
    """Return a server that accepts connections and sends nothing by default."""
    server = Server()
    yield server
    await server.listening.stopListening()
    # A client that gives up closes at once, without waiting for the server to agree.
    tries = 0
    while server.open and tries < 1000:
        tries += 1
        await deferLater(reactor, 0.01)
    assert not server.open


def resident() -> int:
    """Return the resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


async def followed(client: Client) -> None:
    """Follow a task to its end."""
    async for _ in client.follow(1):
        pass


CALLS: dict[str, Call] = {
    "create": lambda client: client.create("a", "b", "c"),
    "get": lambda client: client.get(1),
    "tasks": lambda client: client.tasks(),
    "kill": lambda client: client.kill(1),
    "wait": lambda client: client.wait(1),
    "follow": followed,
    "get all": lambda client: client.get(1, "full"),
}


def impatient(server: Server, scheme: str = "http", deadline: float = 0.2) -> Client:
    """Return a client with short deadlines."""
    return Client(
        reactor,
        f"{scheme}://127.0.0.1:{server.port}",
        patience=0.1,
        deadline=deadline,
        silence=deadline + 0.1,
        poll=0.1,
    )


def patient(server: Server) -> Client:
    """Return a client that would wait longer than any test."""
    return impatient(server, deadline=10 * PATIENCE)


async def given_up(client: Client, call: str) -> str:
    """Return the error of a call. The test fails if the call goes on."""
    waiting = Deferred.fromCoroutine(CALLS[call](client))
    with pytest.raises(Unreachable) as caught:
        await waiting.addTimeout(PATIENCE, reactor)
    await client.close()
    return str(caught.value)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_calls_to_a_silent_server_end_at_the_deadline(
    server: Server, call: str, scheme: str
) -> None:
    """The server accepts the connection only.

    The error names the address and the deadline.
    """
    client = impatient(server, scheme)
    seconds = "0.3" if call == "wait" else "0.2"
    why = f"it has not answered within {seconds} seconds"
    assert await given_up(client, call) == f"{client.url} cannot be reached: {why}"


@pytest.mark.parametrize(
    ("begin", "again"),
    [
        (b"", b"H"),
        (b"HTTP/1.1 200 OK\r\n", b"a: b\r\n"),
        (b"HTTP/1.1 200 OK\r\nx:", b"y"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (CHUNKED, b"1\r\n \r\n"),
        (OK + b"Content-Length: 99999\r\n\r\n", b" "),
        (OK + b"\r\n", b" "),
        (CHUNKED + b"2\r\n{}\r\n", b""),
        (NOT_FOUND, b" "),
    ],
    ids=ascii,
)
@pytest.mark.parametrize("call", CALLS)
async def test_calls_to_a_trickling_server_end_at_the_deadline(
    server: Server, call: str, begin: bytes, again: bytes
) -> None:
    """The trickle is in the head, in the body, or after a complete response."""
    server.begin, server.again = begin, again
    assert "it has not answered within" in await given_up(impatient(server), call)


LINE = b"x" * 30_000
SPACES = b" " * (1 << 18)


@pytest.mark.parametrize(
    ("begin", "again", "why"),
    [
        (
            b"HTTP/1.1 200 OK\r\n",
            b"a: b\r\n" * 5000,
            "the head of its response does not end",
        ),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000, "the head of its response does not"),
        (b"HTTP/1.1 200 OK\r\n", LINE, ""),
        (b"", LINE, ""),
        (CHUNKED, b"40000\r\n" + SPACES + b"\r\n", "the response has more than"),
        (OK + b"\r\n", SPACES, "the response has more than"),
        (NOT_FOUND, SPACES, "the response has more than"),
    ],
    ids=lambda value: ascii(value)[:40],
)
@pytest.mark.parametrize("call", ["create", "get", "kill", "wait", "follow"])
async def test_an_endless_response_is_cut(
    server: Server, call: str, begin: bytes, again: bytes, why: str
) -> None:
    """The head and the body have a limit in bytes. It ends the call before any deadline."""
    server.begin, server.again, server.pause = begin, again, 0.001
    assert why in await given_up(patient(server), call)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"{}", b'{"id": "1"}', b"\xff", b"[" * 100_000, b'"x"'],
    ids=lambda value: ascii(value)[:40],
)
@pytest.mark.parametrize("status", [b"200 OK", b"404 Not Found", b"302 Found"])
@pytest.mark.parametrize("call", ["create", "get", "tasks", "kill"])
async def test_responses_of_another_server_are_reported(
    server: Server, call: str, status: bytes, body: bytes
) -> None:
    """The client says that the server is not pulsar-api, whether it got JSON or not."""
    length = b"Content-Length: %d\r\n\r\n" % len(body)
    server.begin = b"HTTP/1.1 " + status + b"\r\n" + length + body
    assert "the server that answers is not pulsar-api (" in await given_up(
        patient(server), call
    )


@pytest.mark.parametrize(
    "event",
    [b"data: {\n\n", b"id: x\ndata: {}\n\n", b"id: 1-1-1\ndata: \xff\n\n", b"data: {}\n\n"],
    ids=ascii,
)
async def test_event_streams_of_another_server_are_reported(
    server: Server, event: bytes
) -> None:
    """Malformed events give the same error as other responses."""
    server.begin = OK + b"\r\n" + event
    assert "the server that answers is not pulsar-api (" in await given_up(
        patient(server), "follow"
    )


async def test_the_client_waits_no_longer_than_the_daemon_allows(start: Start) -> None:
    """The daemon refuses the first long-poll, and the client then uses a shorter one."""
    daemon = start("--poll-timeout", "2", "--command", SHELL)
    client = Client(reactor, f"http://127.0.0.1:{daemon.port}")
    task = await client.create("a", "b", "run", {"run": "sleep 3; exit 7"})
    assert (await client.wait(task.id)).exit_code == 7
    assert client.poll <= 2
    with pytest.raises(Refused):
        await client.wait(99)
    await client.close()


async def test_following_a_large_output_needs_little_memory(start: Start) -> None:
    """The client holds only one piece of the stream."""
    daemon = start("--command", SHELL)
    client = Client(reactor, f"http://127.0.0.1:{daemon.port}")
    task = await client.create("a", "b", "run", {"run": "yes | head -c 30000000"})
    await client.wait(task.id)
    before = resident()
    size = 0
    async for piece in client.follow(task.id):
        size = piece.end
    assert size == 30_000_000
    assert resident() - before < 15_000_000
    await client.close()


IMPATIENT = """
from functools import partial
from pulsar_api.cli import main
main.Client = partial(main.Client, patience=1, deadline=1, silence=2, poll=1)
main.main()
"""
"""The command ``pulsar-api`` with deadlines that a test can wait for."""


async def test_every_command_reports_a_silent_server(server: Server) -> None:
    """It exits within the deadline, with the status of an unreachable daemon."""
    lines = ("show 1", "tasks", "kill 1", "log 1", "run a b c", "wait 1", "free a b")

    def ask() -> list[tuple[int, str, str]]:
        calls = [
            zygote.Popen(
                [
                    *(sys.executable, "-c", IMPATIENT, *line.split()),
                    *("--url", f"http://127.0.0.1:{server.port}"),
                ],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                stdin=subprocess.DEVNULL,
                text=True,
            )
            for line in lines
        ]
        try:
            return [
                (call.wait(2 * PATIENCE), *call.communicate(timeout=PATIENCE))
                for call in calls
            ]
        finally:
            for call in calls:
                call.kill()
                call.wait()

    for status, out, err in await deferToThread(ask):
        assert (status, out) == (123, "")
        assert f":{server.port} cannot be reached: it has not answered within" in err
        assert "Traceback" not in err
