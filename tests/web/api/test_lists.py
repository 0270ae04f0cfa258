"""Tests of lists over HTTP: complete, in little memory, one large list per caller."""

import json
from pathlib import Path
from typing import Any

import pytest
from attrs import define, evolve, field
from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.logger import LogEvent
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.server import Site

from pulsar_api.auth.audit import AuditLog
from pulsar_api.tasks.clock import SteadyClock
from pulsar_api.tasks.commands import Commands
from pulsar_api.tasks.interfaces import Bounds, NewTask
from pulsar_api.tasks.model import Status, TaskSnapshot, TaskSpec
from pulsar_api.tasks.presets import Template
from pulsar_api.tasks.queue import Limits
from pulsar_api.tasks.service import TaskService
from pulsar_api.web.api.lists import SMALL, STALLED
from pulsar_api.web.api.tasks import TaskAPI
from pulsar_api.web.authentication import Access
from pulsar_api.web.origin import Origins
from tests.fakes import ROWS, FakeExecutor, MemoryStore

CASE = SynchronousTestCase()
LARGE = 60_000
"""Characters in a variable of each task."""
JOE, EVE = "192.0.2.1", "192.0.2.2"


class Turns(Clock):
    """A clock that can let one turn of the reactor pass."""

    def turn(self) -> None:
        """Run the calls that are due now, without those that they schedule."""
        due = [call for call in self.calls if call.getTime() <= self.seconds()]
        for call in due:
            if call.active():
                self.calls.remove(call)
                call.called = 1
                call.func(*call.args, **call.kw)

    def pass_by(self, seconds: float) -> None:
        """Let time pass, and then a turn."""
        self.rightNow += seconds
        self.turn()


@define(eq=False)
class CountingStore(MemoryStore):
    """A store that counts the tasks that are read, and can break."""

    read_rows: int = 0

    def read(self, numbers: Any) -> Any:
        self.read_rows += ROWS
        if self.broken:
            return self.load(0)
        return MemoryStore.read(self, numbers)


class Transport(StringTransport):
    """A connection that tells its protocol when it is aborted."""

    protocol: Any
    aborted = False

    def abortConnection(self) -> None:
        """Close the connection at once."""
        self.aborted = True
        self.protocol.connectionLost(Failure(ConnectionDone()))


@define(eq=False)
class Client:
    """A client that has sent a request."""

    channel: Any
    transport: Transport = field(factory=Transport)

    def ask(self, path: str, method: str = "GET", version: str = "1.1") -> None:
        """Send a request."""
        self.transport.protocol = self.channel
        self.channel.makeConnection(self.transport)
        head = f"{method} {path} HTTP/{version}\r\nHost: localhost\r\n\r\n"
        self.channel.dataReceived(head.encode())

    def stop(self) -> None:
        """Stop reading."""
        producer: Any = self.transport.producer
        producer.pauseProducing()

    def go_on(self) -> None:
        """Go on reading."""
        producer: Any = self.transport.producer
        producer.resumeProducing()

    @property
    def said(self) -> bytes:
        """All data that was received."""
        transport: Any = self.transport
        return bytes(transport.value())

    def leave(self) -> None:
        """Close the connection."""
        self.channel.connectionLost(Failure(ConnectionDone()))

    @property
    def head(self) -> bytes:
        """The head of the response."""
        return self.said.partition(b"\r\n\r\n")[0]

    @property
    def received(self) -> int:
        """The number of bytes received."""
        return len(self.said)

    @property
    def body(self) -> bytes | None:
        """The body of the response, or None if it has not ended."""
        rest = self.said.partition(b"\r\n\r\n")[2]
        if b"Transfer-Encoding: chunked" not in self.head:
            return rest
        body = b""
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            if not int(size, 16):
                return body
            body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
        return None


@define(eq=False)
class World:
    """A daemon with fake tasks. Time stands still."""

    folder: Path
    clock: Turns = field(factory=Turns)
    store: CountingStore = field(factory=CountingStore)
    api: TaskAPI = field(init=False)
    site: Any = field(init=False)

    def __attrs_post_init__(self) -> None:
        service = TaskService(
            self.store,
            FakeExecutor(self.clock),
            self.clock,
            SteadyClock(self.clock.seconds, self.clock.seconds, "a boot"),
            self.commands,
            Limits(Bounds(10)),
        )
        log = AuditLog(self.folder / "audit.log", self.clock.seconds)
        access = Access(service, log, Origins("https://pulsar.example"), self.clock)
        self.api = TaskAPI(access, self.folder, self.clock)
        self.site = Site(self.api.app.resource(), reactor=self.clock)

    async def commands(self) -> Commands:
        """Return the command."""
        return Commands(Template(("true",)), {})

    def fill(self, number: int, size: int = LARGE) -> None:
        """Add ended tasks."""
        spec = TaskSpec("site", "prod", "deploy", {"data": "x" * size})
        for _ in range(number):
            found: TaskSnapshot = CASE.successResultOf(
                self.store.create(NewTask(spec, 0.0, 0.0))
            )
            ended = evolve(found, status=Status.FINISHED, revision=2, ended_at=1.0)
            CASE.successResultOf(self.store.save(ended))

    def client(self, host: str = JOE) -> Client:
        """Return a new client, whose address is its caller."""
        return Client(self.site.buildProtocol(IPv4Address("TCP", host, 40000)))

    def ask(self, path: str, host: str = JOE, **more: str) -> Client:
        """Return a client that has sent a request."""
        client = self.client(host)
        client.transport.peerAddr = IPv4Address("TCP", host, 40000)
        client.ask(path, **more)
        return client

    def turns(self, number: int = 1) -> None:
        """Let a number of reactor turns pass."""
        for _ in range(number):
            self.clock.turn()

    @property
    def idle(self) -> bool:
        """Whether nothing is left of any list."""
        lists = self.api.lists
        return not (lists._searches._locks or lists._large._locks or self.calls)

    @property
    def calls(self) -> int:
        """The number of delayed calls without those of connections."""
        names = [getattr(call.func, "__name__", "") for call in self.clock.calls]
        return len([name for name in names if "imeout" not in name and "imed" not in name])


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Return a new world."""
    return World(tmp_path)


LIST = "/tasks?limit=1000&output=none"


def numbers(client: Client) -> list[int]:
    """Return the numbers of the tasks in a complete response, in order."""
    assert client.body is not None
    return [int(number) for number in json.loads(client.body)["tasks"]]


@pytest.mark.parametrize("size", [0, 10, LARGE])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_list_has_all_tasks_at_any_size(world: World, size: int, version: str) -> None:
    """They are listed newest first. A short list has a Content-Length."""
    world.fill(20, size)
    client = world.ask(LIST, version=version)
    world.turns(200)
    assert numbers(client) == list(range(20, 0, -1))
    assert client.head.startswith(f"HTTP/{version} 200 OK".encode())
    assert (b"Content-Length: " in client.head) == (size < LARGE)
    assert b"Link" not in client.head
    # HTTP/1.0 cannot show that a response is complete, but the end of the JSON can.
    assert client.body is not None
    assert client.body.endswith(b"}}\n")
    assert client.transport.disconnecting == (version == "1.0")
    assert world.idle


def test_the_next_page_is_named_before_the_first_byte(world: World) -> None:
    """Its link has the last number of the whole list, which has not been read yet."""
    world.fill(20)
    client = world.ask("/tasks?limit=12&output=none&app=site")
    while not client.received:
        world.turns()
    link = b'Link: </tasks?limit=12&output=none&app=site&before=9>; rel="next"'
    assert link in client.head
    assert client.body is None
    world.turns(200)
    assert numbers(client) == list(range(20, 8, -1))


def test_an_empty_list_is_a_list(world: World) -> None:
    """Its JSON is complete."""
    client = world.ask(LIST)
    world.turns(3)
    assert json.loads(client.body or b"")["tasks"] == {}


def test_the_daemon_waits_for_a_client_that_does_not_read(world: World) -> None:
    """Meanwhile it reads no more than the next part."""
    world.fill(200)
    client = world.ask(LIST)
    while not client.received:
        world.turns()
    client.stop()
    world.clock.pass_by(100 * STALLED)
    world.turns(100)
    stopped, rows = client.received, world.store.read_rows
    assert stopped < SMALL + 8 * LARGE
    assert rows <= 8
    world.clock.pass_by(100 * STALLED)
    assert (client.received, world.store.read_rows) == (stopped, rows)
    client.go_on()
    world.turns(1000)
    assert numbers(client) == list(range(200, 0, -1))
    assert world.idle


def test_a_caller_has_one_large_list_at_a_time(world: World) -> None:
    """Other callers get theirs meanwhile, and all get short ones."""
    world.fill(50)
    first, second = world.ask(LIST), world.ask(LIST)
    while not (first.received and second.received):
        world.turns()
    begun = second.received
    other = world.ask(LIST, EVE)
    small = world.ask("/tasks?limit=1&output=none")
    world.turns(20)
    assert first.received > begun
    assert second.received == begun
    assert other.received > 0
    assert numbers(small) == [50]
    assert first.body is None
    world.turns(1000)
    for client in (first, second, other):
        assert numbers(client) == list(range(50, 0, -1))
    assert world.idle


def test_a_client_that_does_not_read_gives_up_its_place(world: World) -> None:
    """Its list continues later at the same task."""
    world.fill(50)
    stuck, second = world.ask(LIST), world.ask(LIST)
    while not second.received:
        world.turns()
    begun = second.received
    stuck.stop()
    world.turns(20)
    assert second.received == begun
    world.clock.pass_by(STALLED)
    world.turns(5)
    assert second.received > begun
    stuck.go_on()
    world.turns(1000)
    assert numbers(second) == numbers(stuck) == list(range(50, 0, -1))
    assert world.idle


@pytest.mark.parametrize("when", [0, 1, 3, 12, 20])
def test_nothing_is_left_of_a_client_that_leaves(world: World, when: int) -> None:
    """Its list can be in any state. The next one starts."""
    world.fill(50)
    clients = [world.ask(LIST) for _ in range(3)]
    world.turns(when)
    clients[1].leave()
    clients[0].leave()
    world.turns(1000)
    assert numbers(clients[2]) == list(range(50, 0, -1))
    assert world.idle


def test_a_caller_with_many_lists_gets_no_more_turns_than_others(world: World) -> None:
    """The list of another caller is complete after a few turns."""
    world.fill(30)
    many = [world.ask(LIST) for _ in range(50)]
    world.turns(10)
    other = world.ask(LIST, EVE)
    turns = 0
    while other.body is None or not other.received:
        world.turns()
        turns += 1
    assert turns < 4 * 30
    assert all(client.body is None or not client.received for client in many)
    for client in many:
        client.leave()


def test_half_a_list_does_not_look_complete(
    world: World, logged_failures: list[LogEvent]
) -> None:
    """The connection is aborted when the rest cannot be read."""
    world.fill(50)
    client = world.ask(LIST)
    while not client.received:
        world.turns()
    world.store.broken = True
    world.turns(100)
    assert client.transport.aborted
    assert client.body is None
    assert len(logged_failures) == 1
    logged_failures.clear()
    assert world.idle


def test_a_list_that_cannot_be_read_is_a_problem(world: World) -> None:
    """The error occurs before the first byte, so the response can report it."""
    world.fill(20, 10)
    world.store.broken = True
    client = world.ask(LIST)
    world.turns(20)
    assert client.head.startswith(b"HTTP/1.1 503 ")
    assert json.loads(client.body or b"")["type"].endswith(":store-unavailable")


def test_the_head_of_a_large_list_costs_little(world: World) -> None:
    """The daemon reads no tasks for it."""
    world.fill(200)
    client = world.ask(LIST, method="HEAD")
    world.turns(100)
    assert client.head.startswith(b"HTTP/1.1 200 ")
    assert client.body in {None, b""}
    assert world.store.read_rows < 10
    assert world.idle


def test_tasks_removed_meanwhile_are_left_out(world: World) -> None:
    """Retention does not wait for readers."""
    world.fill(50)
    client = world.ask(LIST)
    while not client.received:
        world.turns()
    CASE.successResultOf(world.store.forget(range(1, 21)))
    world.turns(1000)
    assert numbers(client) == list(range(50, 20, -1))


def test_requests_for_the_next_task_take_turns(world: World) -> None:
    """Of many concurrent requests one is answered per turn, with other work in between."""
    world.fill(3, 10)
    CASE.successResultOf(Deferred.fromCoroutine(world.api.access.service.start()))
    many = [world.ask("/tasks/created?since=0&timeout=0") for _ in range(50)]
    other = world.ask("/tasks/created?since=2&timeout=0", EVE)
    world.turns(2)
    assert other.body is not None
    assert json.loads(other.body)["task"]["id"] == 3
    assert len([client for client in many if client.received]) == 1
    world.turns(50)
    assert all(client.received for client in many)
