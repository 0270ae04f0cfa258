"""Tests of the limits of connections and requests. The clock moves only by steps."""

import json
from typing import Any

import pytest
from attrs import define, field
from twisted.internet.address import IPv4Address
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Request

from pulsar_api.web.server.channel import LINGER, STALL
from pulsar_api.web.server.refusals import PENALTY
from pulsar_api.web.server.site import BURST, IDLE, MIN_IDLE, BoundedSite, Capacity

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
WAIT = b"GET /wait HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Leaf(Resource):
    """A resource that responds at once, or never."""

    isLeaf = True

    def render(self, request: Request) -> bytes | int:
        """Respond, or wait for ever."""
        return NOT_DONE_YET if request.path == b"/wait" else b"good"


LEAF: Any = Leaf


class Transport(StringTransport):
    """A connection that tells its protocol when it is aborted."""

    protocol: Any

    def abortConnection(self) -> None:
        """Close the connection at once."""
        self.disconnected = True
        self.protocol.connectionLost()


@define
class Client:
    """A connection to a site."""

    channel: Any
    transport: Any = field(factory=Transport)

    def __attrs_post_init__(self) -> None:
        self.transport.protocol = self.channel
        self.channel.makeConnection(self.transport)

    def ask(self, request: bytes) -> bytes:
        """Send a request and return the response so far."""
        self.transport.clear()
        self.channel.dataReceived(request)
        said: bytes = self.transport.value()
        return said

    @property
    def status(self) -> bytes:
        """The status of the last response."""
        said: bytes = self.transport.value()
        return said[9:12]

    @property
    def cut(self) -> bool:
        """Whether the daemon has closed the connection."""
        return bool(self.transport.disconnected)


@define
class House:
    """A site with few places, and its clock."""

    most: Capacity
    clock: Clock = field(factory=Clock)
    site: BoundedSite = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.site = BoundedSite(LEAF(), self.clock, self.most)

    def connect(self, host: str = "127.0.0.1") -> Client:
        """Connect from an address."""
        return Client(self.site.buildProtocol(IPv4Address("TCP", host, 40000)))


@pytest.fixture
def house() -> House:
    """Return a site with eight places, two per address."""
    return House(Capacity(8))


def test_an_address_has_a_quarter_of_the_places(house: House) -> None:
    """Others have room, and a place that becomes free can be taken again."""
    held = [house.connect("192.0.2.1") for _ in range(2)]
    refused = house.connect("192.0.2.1")
    assert refused.status == b"429"
    assert b"\r\nRetry-After: 5\r\n" in refused.transport.value()
    assert refused.transport.disconnecting
    assert b"good" in house.connect("192.0.2.2").ask(GET)
    assert house.site.connections == 3
    held[0].transport.abortConnection()
    assert b"good" in house.connect("192.0.2.1").ask(GET)


def test_this_machine_can_take_all_places(house: House) -> None:
    """A proxy on it connects for many clients."""
    held = [house.connect() for _ in range(8)]
    assert all(b"good" in client.ask(GET) for client in held)
    assert house.connect().status == b"503"


def test_the_share_of_an_address_is_a_setting() -> None:
    """It can be smaller than a quarter, or unlimited."""
    small, large = House(Capacity(8, 1)), House(Capacity(8, 0))
    small.connect("192.0.2.1")
    assert small.connect("192.0.2.1").status == b"429"
    assert [large.connect("192.0.2.1").status for _ in range(9)][7:] == [b"", b"503"]


def test_too_many_requests_answer_429_with_a_time_to_wait() -> None:
    """The response is delayed. The connection stays, and other clients are served."""
    house = House(Capacity(8, requests_of_address=2))
    client, head = house.connect("192.0.2.1"), house.connect("192.0.2.1")
    for _ in range(2 * BURST):
        assert b"good" in client.ask(GET)
    assert client.ask(GET + GET) == b""
    assert head.ask(GET.replace(b"GET", b"HEAD")) == b""
    assert b"good" in house.connect("192.0.2.2").ask(GET)
    own = house.connect("127.0.0.1")
    assert all(b"good" in own.ask(GET) for _ in range(10 * BURST))
    house.clock.advance(PENALTY)
    said = client.transport.value()
    refusal, good, _ = said.partition(b"HTTP/1.1 200 OK")
    assert refusal.startswith(b"HTTP/1.1 429 ")
    assert b"\r\nRetry-After: 1\r\n" in refusal
    body = json.loads(refusal.partition(b"\r\n\r\n")[2])
    assert body["type"] == "urn:pulsar-api:problem:too-many-requests"
    assert good  # its turn came during the delay of the first
    assert head.status == b"429"
    assert head.transport.value().endswith(b"\r\n\r\n")
    assert not client.cut
    assert b"good" in client.ask(GET)


def test_a_client_that_leaves_before_its_refusal_leaves_nothing() -> None:
    """Neither a place nor a delayed call stays."""
    house = House(Capacity(8, requests_of_address=1))
    client = house.connect("192.0.2.1")
    for _ in range(BURST + 1):
        client.ask(GET)
    client.transport.abortConnection()
    assert house.site.connections == house.site.serving == 0
    assert house.clock.getDelayedCalls() == []


def test_the_rate_of_requests_can_be_unlimited() -> None:
    """The value 0 means no limit."""
    client = House(Capacity(8, requests_of_address=0)).connect("192.0.2.1")
    assert all(b"good" in client.ask(GET) for _ in range(1000))


def test_the_longest_idle_connection_makes_room_for_a_new_one(house: House) -> None:
    """Connections that were just served stay, and so do those that wait for a response."""
    waiting = house.connect()
    waiting.ask(WAIT)
    idle = [house.connect() for _ in range(7)]
    for client in idle:
        house.clock.advance(1)
        client.ask(GET)
    house.clock.advance(1)
    idle[0].ask(GET)
    assert house.connect().status == b"503"
    house.clock.advance(MIN_IDLE - 1)
    assert b"good" in house.connect().ask(GET)
    assert [client.cut for client in idle] == [False, True] + [False] * 5
    assert not waiting.cut
    assert house.site.connections == 8


def test_a_client_that_does_not_read_makes_room(house: House) -> None:
    """Once it reads again, it stays."""
    clients = [house.connect() for _ in range(8)]
    for client in clients:
        client.ask(WAIT)
    clients[2].channel.pauseProducing()
    clients[3].channel.pauseProducing()
    house.clock.advance(MIN_IDLE)
    clients[2].channel.resumeProducing()
    assert b"good" in house.connect().ask(GET)
    assert [client.cut for client in clients] == [n == 3 for n in range(8)]


def test_a_client_that_never_reads_is_cut(house: House) -> None:
    """One that reads now and then stays."""
    stuck, slow = house.connect(), house.connect()
    for client in (stuck, slow):
        client.ask(WAIT)
        client.channel.pauseProducing()
    house.clock.advance(STALL - 1)
    slow.channel.resumeProducing()
    slow.channel.pauseProducing()
    assert not stuck.cut
    house.clock.advance(1)
    assert stuck.cut
    house.clock.advance(STALL - 2)
    assert not slow.cut
    assert house.site.connections == 1
    assert house.site.serving == 1


def test_an_idle_connection_is_closed(house: House) -> None:
    """It is closed properly first.

    If the client does not close it as well, it is aborted.
    """
    client = house.connect()
    client.ask(GET)
    house.clock.advance(IDLE - 1)
    assert not client.transport.disconnecting
    house.clock.advance(1)
    assert client.transport.disconnecting
    assert not client.cut
    house.clock.advance(LINGER)
    assert client.cut
    assert house.site.connections == 0


def test_nothing_is_left_of_closed_connections(house: House) -> None:
    """No place, no delayed call and no entry in the list of idle connections stays."""
    for request in (b"", b"G", GET, WAIT):
        client = house.connect("192.0.2.1")
        client.ask(request)
        client.channel.pauseProducing()
        client.transport.abortConnection()
    assert house.site.connections == house.site.serving == 0
    assert not house.site.idle
    assert house.clock.getDelayedCalls() == []
    assert house.connect("192.0.2.1").status == b""
