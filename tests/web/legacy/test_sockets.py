"""Tests of the bytes and objects that a SockJS client can use. Time stands still."""

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from attrs import define, field
from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase
from wsproto.connection import Connection, ConnectionType
from wsproto.events import (
    BytesMessage,
    CloseConnection,
    Event,
    Ping,
    Pong,
    TextMessage,
)

from pulsar_api.auth.audit import AuditLog
from pulsar_api.auth.authenticator import Authenticator
from pulsar_api.concurrency.turns import TurnScheduler
from pulsar_api.shim import shim
from pulsar_api.tasks.clock import SteadyClock
from pulsar_api.tasks.commands import Commands
from pulsar_api.tasks.interfaces import Bounds
from pulsar_api.tasks.model import TaskSpec
from pulsar_api.tasks.presets import Template
from pulsar_api.tasks.queue import Limits
from pulsar_api.tasks.service import TaskService
from pulsar_api.web.authentication import Access
from pulsar_api.web.legacy.feed import Feed
from pulsar_api.web.legacy.message import PIECE_BYTES
from pulsar_api.web.legacy.sockjs import SockJS
from pulsar_api.web.legacy.visit import ANSWER, HEARTBEAT, MAX_UNIDENTIFIED
from pulsar_api.web.origin import Origins
from pulsar_api.web.revalidation import RECHECK
from pulsar_api.web.server.channel import LINGER
from pulsar_api.web.server.site import BoundedSite, Capacity
from pulsar_api.web.server.websocket import (
    BUFFER,
    BURST,
    BYTES_PER_SECOND,
    FRAME_COST,
    KERNEL_BUFFER,
    MAX_MESSAGE,
    STALL,
    limit_buffer,
)
from tests.auth.test_authenticator import ALICE, FakeProvider
from tests.fakes import FakeExecutor, FakeRun, MemoryStore
from tests.output.test_lines import Turns
from tests.output.test_reader import printed
from tests.web.server.test_site import Transport

CASE = SynchronousTestCase()
PATH = "/websocket/000/socket"
TOKEN = TextMessage(json.dumps([json.dumps({"token": ALICE.secret})]))
BEARER = f"Authorization: Bearer {ALICE.secret}\r\n"
SESSIONS = MAX_UNIDENTIFIED + 50
DENIED = 'c[403,"Access denied"]'


class Line(Transport):
    """A connection whose client reads when the test says so.

    Like Twisted's transports it pauses its producer above the size of its buffer.
    """

    bufferSize = 65536

    def write(self, data: bytes) -> None:
        """Store the data, and pause the producer if there is too much."""
        line: Any = super()
        line.write(data)
        if self.producer is not None and len(line.value()) > self.bufferSize:
            self.producer.pauseProducing()

    def read(self) -> bytes:
        """Return all data written so far, and resume the producer."""
        line: Any = super()
        data: bytes = line.value()
        line.clear()
        if self.producer is not None:
            self.producer.resumeProducing()
        return data

    def unregisterProducer(self) -> None:
        """Forget the producer."""
        self.producer = None


LINE: Any = Line


@define(eq=False)
class Client:
    """A client of a WebSocket."""

    channel: Any
    line: Any = field(factory=LINE)
    ws: Connection = field(factory=lambda: Connection(ConnectionType.CLIENT))
    texts: list[str] = field(factory=list)
    others: list[Event] = field(factory=list)
    _part: str = ""

    def __attrs_post_init__(self) -> None:
        self.line.protocol = self.channel
        self.channel.makeConnection(self.line)

    def shake(self, more: str = "", behind: bytes = b"") -> bytes:
        """Ask for a WebSocket and return the response head. Append data to the request."""
        self.channel.dataReceived(
            f"GET {PATH}/websocket HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
            "Connection: keep-alive, Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            f"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{more}\r\n".encode()
            + behind
        )
        head, _, rest = self.line.read().partition(b"\r\n\r\n")
        self._receive(rest)
        return bytes(head)

    def say(self, event: Event) -> None:
        """Send an event."""
        self.give(self.ws.send(event))

    def give(self, data: bytes) -> None:
        """Send bytes, unless the daemon has closed the connection."""
        if not self.cut:
            self.channel.dataReceived(data)

    def frames(self) -> list[str]:
        """Return the complete texts that were received."""
        self._receive(self.line.read())
        texts, self.texts = self.texts, []
        return texts

    def _receive(self, data: bytes) -> None:
        self.ws.receive_data(data)
        for event in self.ws.events():
            if isinstance(event, TextMessage):
                self._part += event.data
                if event.message_finished:
                    self.texts.append(self._part)
                    self._part = ""
            else:
                self.others.append(event)

    @property
    def cut(self) -> bool:
        """Whether the daemon has closed the connection."""
        return bool(self.line.disconnected)


@define
class World:
    """A site that serves SockJS alone, with authentication but no processes or network."""

    folder: Path
    clock: Clock = field(factory=Clock)
    turns: Turns = field(factory=Turns)
    provider: FakeProvider = field(factory=FakeProvider)
    executor: FakeExecutor = field(init=False)
    service: TaskService = field(init=False)
    sockjs: SockJS = field(init=False)
    access: Access = field(init=False)
    site: BoundedSite = field(init=False)
    clients: list[Client] = field(factory=list)

    def __attrs_post_init__(self) -> None:
        self.executor = FakeExecutor(self.clock)

        async def commands() -> Commands:
            return Commands(Template(("true",)), {})

        clock = self.clock
        self.service = TaskService(
            MemoryStore(),
            self.executor,
            clock,
            SteadyClock(clock.seconds, clock.seconds, "a boot"),
            commands,
            Limits(Bounds(10)),
        )
        CASE.successResultOf(Deferred.fromCoroutine(self.service.start()))
        self.provider.known[ALICE.secret] = "alice"
        self.provider.good = 1.0
        self.access = Access(
            self.service,
            AuditLog(self.folder / "audit.log", clock.seconds),
            Origins(),
            clock,
            Authenticator([self.provider], clock),
        )
        feed = Feed(self.service, self.folder, clock, TurnScheduler(self.turns))
        self.sockjs = SockJS(self.access, feed, clock, SESSIONS)
        self.site = BoundedSite(self.sockjs.resource(), clock, Capacity(5000, 0, 0))

    def channel(self, host: str = "192.0.2.1") -> Client:
        """Connect."""
        client = Client(self.site.buildProtocol(IPv4Address("TCP", host, 40000)))
        self.clients.append(client)
        return client

    def connect(self, more: str = "") -> Client:
        """Open a WebSocket."""
        client = self.channel()
        assert client.shake(more).startswith(b"HTTP/1.1 101 ")
        assert client.frames() == ["o"]
        return client

    def create(self) -> FakeRun:
        """Create a task and return its run."""
        made = Deferred.fromCoroutine(self.service.create(TaskSpec("site", "p", "deploy")))
        return self.executor.run(CASE.successResultOf(made).snapshot.id)

    def pass_turns(self, number: int = 20) -> None:
        """Let a number of reactor turns pass, without any time."""
        for _ in range(number):
            self.turns.turn()
            self.clock.advance(0)

    def close(self) -> None:
        """Close all connections, and check that nothing is left of them."""
        for client in self.clients:
            if not client.cut:
                client.line.abortConnection()
        self.sockjs.release()
        self.access.release()
        assert self.site.connections == self.site.serving == 0
        assert not self.site.idle
        left = [str(call) for call in self.clock.getDelayedCalls()]
        assert [call for call in left if "Retention" not in call] == []
        assert self.turns.getDelayedCalls() == []


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """Yield a world, and check that nothing is left at the end."""
    world = World(tmp_path)
    yield world
    world.close()


# -- clients that send


def masked(event: Event) -> bytes:
    """Return a frame as a client sends it."""
    return Connection(ConnectionType.CLIENT).send(event)


PING, PONG = masked(Ping(b"x" * 125)), masked(Pong(b""))
EMPTY = b"\x00\x80" + bytes(4)
"""An empty fragment, which is not the last of its message."""
SENT: dict[str, Callable[[], Iterator[bytes]]] = {
    "pings": lambda: iter(lambda: PING, b""),
    "empty pings": lambda: iter(lambda: masked(Ping(b"")), b""),
    "pongs": lambda: iter(lambda: PONG, b""),
    "messages": lambda: iter(lambda: masked(TextMessage('["x"]')), b""),
    "fragments": lambda: _fragments(b"\x00\xfd" + bytes(4) + b"x" * 125),
    "empty fragments": lambda: _fragments(EMPTY),
    "one endless frame": lambda: _begun(
        b"\x81\xff" + (1 << 40).to_bytes(8) + bytes(4), b"x" * 100
    ),
}


def _begun(first: bytes, rest: bytes) -> Iterator[bytes]:
    yield first
    while True:
        yield rest


def _fragments(fragment: bytes) -> Iterator[bytes]:
    # A pong that answers nothing once made the daemon restart its count.
    return _begun(masked(TextMessage('["', message_finished=False)), PONG + fragment)


@pytest.mark.parametrize("known", [False, True], ids=["stranger", "known"])
@pytest.mark.parametrize("kind", SENT)
def test_a_flood_is_cut_after_its_burst(world: World, kind: str, *, known: bool) -> None:
    """The daemon accepts that many bytes at once.

    Then it closes the connection and keeps nothing.
    """
    client = world.connect(BEARER if known else "")
    sent = frames = 0
    for data in SENT[kind]():
        if client.cut or client.line.disconnecting or sent > 10 * BURST:
            break
        client.give(data)
        sent += len(data)
        frames += 1
    world.clock.advance(LINGER)
    assert sent <= BURST + len(data)
    assert frames <= BURST / FRAME_COST + 2
    assert world.site.connections == 0


@pytest.mark.parametrize("kind", ["pings", "pongs", "messages"])
def test_a_slow_sender_stays_connected(world: World, kind: str) -> None:
    """It can go on for ever, if it reads."""
    client = world.connect(BEARER)
    data = next(SENT[kind]())
    pause = (len(data) + FRAME_COST) / BYTES_PER_SECOND
    for _ in range(2000):
        client.give(data)
        world.clock.advance(pause)
        client.frames()
    assert not client.cut


@pytest.mark.parametrize("fragment", [b"\x00\xfd" + bytes(4) + b"x" * 125, EMPTY])
def test_slow_fragments_are_cut_at_the_size_of_a_message(
    world: World, fragment: bytes
) -> None:
    """Neither a slow pace nor other frames in between prevent that."""
    client = world.connect(BEARER)
    sent = 0
    for data in _fragments(fragment):
        if client.cut or sent > 10 * MAX_MESSAGE:
            break
        client.give(data)
        world.clock.advance((len(data) + 2 * FRAME_COST) / BYTES_PER_SECOND)
        client.frames()
        sent += max(1, len(data) - len(PONG) - 6)
    assert MAX_MESSAGE - 500 <= sent <= MAX_MESSAGE + 500


def test_the_longest_token_is_accepted(world: World) -> None:
    """It can come in pieces."""
    secret = "x" * 4096
    world.provider.known[secret] = "bob"
    data = masked(TextMessage(json.dumps([json.dumps({"token": secret})])))
    client = world.connect()
    for at in range(0, len(data), 100):
        client.give(data[at : at + 100])
    world.create()
    world.pass_turns()
    assert client.frames()[0].startswith('a["')


@pytest.mark.parametrize(
    "data",
    [
        masked(BytesMessage(b"bytes")),
        masked(TextMessage("no JSON")),
        masked(CloseConnection(1000)),
        b"\xff" * 50,
        b"\x81\x01x",
        b"\x88\x82" + bytes(4) + b"\x00\x01",
    ],
    ids=["bytes", "no-json", "close", "no-frame", "unmasked", "odd-close"],
)
def test_a_refused_client_that_stays_is_cut(world: World, data: bytes) -> None:
    """Its unread data is dropped, and its further messages are ignored."""
    client = world.connect(BEARER)
    client.give(data)
    for _ in range(100):
        client.give(PING * 100)
    client.frames()
    assert not [event for event in client.others if isinstance(event, Pong)]
    if not client.cut:
        assert client.line.disconnecting
        world.clock.advance(LINGER)
    assert client.cut
    assert world.site.connections == 0


def test_a_silent_client_is_denied_and_cut(world: World) -> None:
    """It has ten seconds to identify itself."""
    client = world.connect()
    world.clock.advance(ANSWER)
    assert client.frames() == [DENIED]
    world.clock.advance(LINGER)
    assert client.cut


def test_the_oldest_of_too_many_unidentified_clients_is_denied(world: World) -> None:
    """Identified clients and the newest ones stay."""
    by_request = world.connect(BEARER)
    by_message = world.connect()
    by_message.say(TOKEN)
    strangers = [world.connect() for _ in range(MAX_UNIDENTIFIED + 3)]
    world.clock.advance(LINGER)
    denied = [client for client in strangers if client.cut]
    assert denied == strangers[:3]
    assert all(client.frames() == [DENIED] for client in denied)
    world.create()
    world.pass_turns(100)
    for client in (by_request, by_message):
        assert not client.cut
        assert client.frames()[0].startswith('a["')


def test_a_message_right_after_the_handshake_is_heard(world: World) -> None:
    """It can come in the same piece, and its bytes count."""
    client = world.channel()
    assert client.shake(behind=masked(TOKEN)).startswith(b"HTTP/1.1 101 ")
    world.create()
    world.pass_turns()
    texts = client.frames()
    assert (texts[0], texts[1][:3]) == ("o", 'a["')
    flood = world.channel()
    flood.shake(behind=PING * 1000)
    assert flood.cut


@pytest.mark.parametrize(
    "more",
    ["Upgrade: h2c\r\n", "Sec-WebSocket-Key: x\r\n", "Sec-WebSocket-Version: 8\r\n"],
)
def test_a_wrong_handshake_is_refused(world: World, more: str) -> None:
    """The response explains it, and the connection can be used for another request."""
    client = world.channel()
    if more.startswith("Upgrade"):
        client.channel.dataReceived(
            f"GET {PATH}/websocket HTTP/1.1\r\nHost: x\r\n{more}\r\n".encode()
        )
        said = client.line.read()
    else:
        said = client.shake(more)
    assert said.startswith(b"HTTP/1.1 400 ")
    client.channel.dataReceived(b"GET /websocket HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert client.line.read().endswith(b"Welcome to SockJS!\n")


# -- clients that do not read


def test_the_daemon_does_not_read_from_a_client_that_does_not_read(world: World) -> None:
    """Its pings wait on its own machine, and are answered when it reads again."""
    client = world.connect(BEARER)
    client.line.producer.pauseProducing()
    assert client.line.producerState == "paused"
    world.create().start()
    world.pass_turns()
    # Part of one frame was already sent.
    assert len(client.line.value()) <= 4 * PIECE_BYTES
    client.line.producer.resumeProducing()
    assert client.line.producerState == "producing"
    world.pass_turns()
    assert [json.loads(json.loads(text[1:])[0])["event"] for text in client.frames()] == [
        "job.create",
        "job.change",
    ]


def test_a_client_that_never_reads_is_cut(world: World) -> None:
    """It has a minute, and counts as idle meanwhile."""
    client = world.connect(BEARER)
    client.line.producer.pauseProducing()
    assert list(world.site.idle) == [client.channel]
    world.clock.advance(STALL - 1)
    assert not client.cut
    world.clock.advance(1)
    assert client.cut
    assert world.site.connections == 0


def test_heartbeats_break_the_silence(world: World) -> None:
    """Pings are answered, too."""
    client = world.connect(BEARER)
    world.clock.advance(HEARTBEAT)
    assert client.frames() == ["h"]
    client.say(Ping(b"are you there"))
    client.frames()
    assert client.others == [Pong(b"are you there")]


def test_each_client_that_does_not_read_holds_one_piece(world: World) -> None:
    """The message has a megabyte. Each client gets all of it once it reads."""
    size = 1 << 20
    (world.folder / "1").mkdir()
    printed(world.folder / "1", [(shim.STDOUT, b"0123456789abcde\n" * (size // 16))])
    crowd = [world.connect(BEARER) for _ in range(30)]
    run = world.create()
    run.start()
    world.pass_turns(200)
    for client in crowd:
        client.frames()
    run.end(0, output_size=size)
    world.pass_turns(2000)
    for client in crowd:
        assert BUFFER < len(client.line.value()) <= BUFFER + 4 * PIECE_BYTES
    # Further pieces are made when a client asks for them.
    assert world.sockjs.feed.pieces.size <= world.sockjs.feed.pieces.max_bytes
    last = crowd[-1]
    heard: list[str] = []
    for _ in range(1000):
        heard += last.frames()
        if heard:
            break
        world.pass_turns(2)
    (text,) = heard
    job = json.loads(json.loads(text[1:])[0])["job"]
    assert job["stdout"] == job["output"] == "0123456789abcde\n" * (size // 16)
    assert not any(client.cut for client in crowd)


def test_a_revoked_client_is_cut_in_the_middle_of_a_message(world: World) -> None:
    """Half a message has no valid end."""
    (world.folder / "1").mkdir()
    printed(world.folder / "1", [(shim.STDOUT, b"x" * 500_000)])
    client = world.connect(BEARER)
    run = world.create()
    run.start()
    world.pass_turns()
    client.frames()
    run.end(0, output_size=500_000)
    world.pass_turns(100)
    assert len(client.line.value()) > BUFFER
    world.provider.known.clear()
    world.clock.advance(RECHECK)
    assert not client.cut
    client.line.read()
    world.pass_turns()
    assert client.cut
    assert len(client.line.value()) == 0


# -- private parts of Twisted


def test_an_upgraded_channel_is_cleaned_up(
    world: World,
) -> None:
    """It uses ``HTTPChannel._protocolUpgradeForWebsockets``. No reference cycle remains."""
    client = world.connect()
    own = {"dataReceived", "rawDataReceived", "connectionLost"}
    assert own <= set(vars(client.channel))
    assert (world.site.connections, world.site.serving) == (1, 1)
    client.line.abortConnection()
    assert not own & set(vars(client.channel))
    assert (world.site.connections, world.site.serving) == (0, 0)


def test_the_buffer_is_limited_with_and_without_tls() -> None:
    """``FileDescriptor.bufferSize`` limits it in Twisted, and SO_SNDBUF in the kernel."""

    @define
    class Channel:
        transport: Any
        stall: float = 3600.0

    below, tls, tcp = LINE(), LINE(), LINE()
    tls.transport = below
    channel = Channel(tls)
    limit_buffer(channel)
    assert (below.bufferSize, channel.stall) == (BUFFER, STALL)
    with socket.socket() as tcp.socket:
        limit_buffer(Channel(tcp))
        assert tcp.bufferSize == BUFFER
        size = tcp.socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        assert size == 2 * KERNEL_BUFFER


def test_a_handshake_with_a_body_is_refused(world: World) -> None:
    """The bytes of the body would be read as frames."""
    said = world.channel().shake("Content-Length: 11\r\n", behind=PING[:11])
    assert said.startswith(b"HTTP/1.1 400 ")


def test_open_sockets_do_not_count_as_heads_of_strangers(world: World) -> None:
    """Hundreds of them leave room for the request heads of others, and none is cut."""
    clients = [world.connect(f"Cookie: a={'x' * 8000}\r\n") for _ in range(600)]
    assert world.site.unidentified.total == 0
    assert not any(client.cut for client in clients)


# -- sessions over HTTP


def post(client: Client, name: str, route: str, body: str = "") -> bytes:
    """Send a request and return the response so far."""
    client.channel.dataReceived(
        f"POST /websocket/000/{name}/{route} HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
    )
    return bytes(client.line.read())


def test_unknown_sessions_make_room_for_new_ones(world: World) -> None:
    """Denied sessions make room, too."""
    client = world.channel()
    for n in range(SESSIONS + 10):
        assert post(client, f"session{n}", "xhr").endswith(b"\r\n\r\no\n")
    assert post(client, "session1", "xhr_send", "[]").startswith(b"HTTP/1.1 404 ")
    last = f"session{SESSIONS + 9}"
    assert post(client, last, "xhr_send", "[]").startswith(b"HTTP/1.1 204 ")


@pytest.mark.parametrize("route", ["xhr", "xhr_streaming"])
def test_an_identified_client_does_not_count_as_a_stranger_while_it_waits(
    world: World, route: str
) -> None:
    """Its head counts until it is identified."""
    client, other = world.channel(), world.channel()
    post(client, "joe", "xhr")
    post(client, "joe", route)
    assert world.site.unidentified.total > 0
    message = json.dumps([json.dumps({"token": ALICE.secret})])
    assert post(other, "joe", "xhr_send", message).startswith(b"HTTP/1.1 204 ")
    world.pass_turns()
    assert world.site.unidentified.total == 0
    assert not client.cut


def test_reading_of_an_endless_unwanted_body_stops(world: World) -> None:
    """The body uses neither memory nor time."""
    client = world.channel()
    post(client, "joe", "xhr")
    client.channel.dataReceived(
        b"POST /websocket/000/joe/xhr_streaming HTTP/1.1\r\nHost: localhost\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n"
    )
    sent = 0
    while client.line.producerState == "producing":
        client.channel.dataReceived(b"400\r\n" + b"x" * 0x400 + b"\r\n")
        sent += 0x400
        assert sent < 100_000
    assert client.line.producerState == "paused"


def test_a_message_or_name_that_is_too_long_is_refused(world: World) -> None:
    """The refusal comes before authentication."""
    client = world.channel()
    post(client, "short", "xhr")
    said = post(client, "short", "xhr_send", json.dumps(["x" * MAX_MESSAGE]))
    assert said.startswith(b"HTTP/1.1 413 ")
    assert post(client, "x" * 101, "xhr").startswith(b"HTTP/1.1 404 ")
