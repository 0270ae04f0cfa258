"""Tests of request bodies: early refusals, and limits of memory and time."""

import re
from typing import Any

import pytest
from attrs import define, field
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.address import IPv4Address
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET

from pulsar_api.errors import PulsarError
from pulsar_api.web import responses
from pulsar_api.web.server.body import EAGER, FORM, MAX_BODY, BodyRequest, body_of
from pulsar_api.web.server.channel import LINGER, MAX_DISCARDED
from pulsar_api.web.server.refusals import (
    BODY_DEADLINE,
    HEAD_DEADLINE,
    MAX_HEADERS,
    MAX_NAME,
)
from pulsar_api.web.server.site import (
    BODY_MEMORY,
    UNIDENTIFIED_MEMORY,
    BoundedSite,
    Capacity,
)


class Desk(Resource):
    """A resource that reads a body, refuses it, or waits for the caller's identity."""

    isLeaf = True

    def __init__(self) -> None:
        untyped: Any = super()
        untyped.__init__()
        self.waiting: list[Deferred[None]] = []
        self.seen: list[BodyRequest] = []

    def render(self, request: BodyRequest) -> bytes | int:
        """Respond as the path says."""
        self.seen.append(request)
        if request.path == b"/refuse":
            request.setResponseCode(401)
            return b"no"
        Deferred.fromCoroutine(self.read(request)).addErrback(self.failed, request)
        return NOT_DONE_YET

    async def read(self, request: Any) -> None:
        """Read the body and respond with its length."""
        who: str | None = request.getClientAddress().host
        if request.path == b"/wait":
            self.waiting.append(Deferred())
            await self.waiting[-1]
        if request.path == b"/form":
            body = await body_of(request, None, FORM)
        else:
            request.caller_known()
            body = await body_of(request, who)
        answer = b"%d %d" % (len(body), sum(body))
        request.setHeader("Content-Length", str(len(answer)))
        request.write(answer)
        request.finish()

    def failed(self, failure: Failure, request: Any) -> None:
        """Respond with a problem, as the applications do."""
        if failure.check(CancelledError):
            return
        error = failure.value
        assert isinstance(error, PulsarError)
        status, type_, title, retry = responses._PROBLEMS[type(error)]
        if retry is not None:
            request.setHeader("Retry-After", str(retry))
        request.write(responses.problem(request, status, type_, title, str(error)))
        request.finish()


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
    """A connection to the desk."""

    channel: Any
    transport: Any = field(factory=Transport)

    def __attrs_post_init__(self) -> None:
        self.transport.protocol = self.channel
        self.channel.makeConnection(self.transport)

    def send(self, data: bytes) -> bytes:
        """Send data, unless the daemon has closed the connection. Return all responses."""
        if not self.cut:
            self.channel.dataReceived(data)
        return self.said

    def post(self, path: str, *lines: str, body: bytes = b"") -> bytes:
        """Send a request. Its body may follow later."""
        head = [f"POST {path} HTTP/1.1", "Host: localhost", *lines, "", ""]
        return self.send("\r\n".join(head).encode() + body)

    def leave(self) -> None:
        """Close the connection."""
        self.channel.connectionLost(Failure(ConnectionDone()))

    @property
    def said(self) -> bytes:
        """All data that was received."""
        return bytes(self.transport.value())

    @property
    def statuses(self) -> list[int]:
        """The statuses of all responses."""
        return [int(found) for found in re.findall(rb"HTTP/1\.1 (\d{3}) ", self.said)]

    @property
    def cut(self) -> bool:
        """Whether the daemon has closed the connection."""
        return bool(self.transport.aborted)

    @property
    def reads(self) -> bool:
        """Whether the daemon reads."""
        return bool(self.transport.producerState == "producing")


@define(eq=False)
class World:
    """A site with that resource. Time stands still."""

    clock: Clock = field(factory=Clock)
    desk: Any = field(factory=Desk)
    site: BoundedSite = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.site = BoundedSite(self.desk, self.clock, Capacity(10_000, 0, 0))

    def connect(self, host: str = "192.0.2.1") -> Client:
        """Connect from an address."""
        address = IPv4Address("TCP", host, 40000)
        client = Client(self.site.buildProtocol(address))
        client.transport.peerAddr = address
        return client

    @property
    def idle(self) -> bool:
        """Whether the site holds no bytes and no requests."""
        site = self.site
        held = site.bodies.used, site.bodies.held, site.unidentified.total
        return held == (0, {}, 0) and not site.unidentified.held and not site.serving


@pytest.fixture
def world() -> World:
    """Return a new world."""
    return World()


def length(number: int) -> str:
    """Return the header with the length of a body."""
    return f"Content-Length: {number}"


CHUNKED = "Transfer-Encoding: chunked"
PROMISE = "Expect: 100-continue"


# -- refused requests


def test_a_refusal_comes_before_the_body(world: World) -> None:
    """A small body is discarded, and the connection stays open."""
    client = world.connect()
    client.post("/refuse", length(1000))
    assert client.statuses == [401]
    assert b"Connection: close" not in client.said
    client.send(b"x" * 400)
    client.send(b"x" * 600 + b"POST /read HTTP/1.1\r\nHost: localhost\r\n")
    client.send(b"Content-Length: 2\r\n\r\n\1\2")
    assert client.statuses == [401, 200]
    assert client.said.endswith(b"\r\n\r\n2 3")
    client.leave()
    assert world.idle
    assert world.clock.getDelayedCalls() == []


@pytest.mark.parametrize(
    "lines", [[length(MAX_DISCARDED + 1)], [CHUNKED], [length(10), PROMISE], [length(10)]]
)
@pytest.mark.parametrize("more", ["Connection: close", "X: y"])
def test_a_refused_body_that_is_not_awaited_ends_the_connection(
    world: World, lines: list[str], more: str
) -> None:
    """It ends after a pause, in which a client that still sends can read the response."""
    client = world.connect()
    client.post("/refuse", *lines, more)
    assert client.statuses == [401]
    assert b"100 Continue" not in client.said
    goes_on = lines == [length(10)] and more == "X: y"
    assert (b"Connection: close" in client.said) == (not goes_on)
    client.send(b"x" * 1000)
    assert client.reads
    world.clock.advance(LINGER)
    assert client.cut != goes_on
    assert client.statuses[:1] == [401]
    client.leave()
    assert world.idle


def test_a_client_that_does_not_send_the_rest_is_cut(world: World) -> None:
    """The deadline of an unwanted body is that of any body."""
    client = world.connect()
    client.post("/refuse", length(1000), body=b"x")
    world.clock.advance(BODY_DEADLINE - 1)
    assert not client.cut
    world.clock.advance(1)
    assert client.cut
    assert client.statuses == [401]
    assert world.clock.getDelayedCalls() == []


@pytest.mark.parametrize("size", [MAX_BODY + 1, 10**12])
def test_a_body_announced_as_too_large_is_refused(world: World, size: int) -> None:
    """The refusal comes before authentication."""
    client = world.connect()
    client.post("/read", length(size), body=b"x" * 1000)
    assert client.statuses == [413]
    assert world.desk.seen == []


# -- accepted requests


def test_100_continue_is_sent_when_the_body_is_wanted(world: World) -> None:
    """It is not sent before the caller is identified."""
    client = world.connect()
    client.post("/wait", length(4), PROMISE)
    assert client.said == b""
    world.desk.waiting[0].callback(None)
    assert client.said == b"HTTP/1.1 100 Continue\r\n\r\n"
    client.send(b"\1\2\3\4")
    assert client.said.endswith(b"\r\n\r\n4 10")
    client.leave()
    assert world.idle


def test_little_of_a_body_is_read_before_it_is_wanted(world: World) -> None:
    """The rest waits at the client."""
    client = world.connect()
    client.post("/wait", length(MAX_BODY), body=b"x" * EAGER)
    assert client.reads
    client.send(b"x")
    assert not client.reads
    assert world.site.bodies.used == 0
    assert world.site.unidentified.total > EAGER
    world.clock.advance(10 * BODY_DEADLINE)  # which has not started
    world.desk.waiting[0].callback(None)
    assert client.reads
    assert world.site.bodies.used == EAGER + 1
    assert world.site.unidentified.total == 0
    client.send(b"x" * (MAX_BODY - EAGER - 1))
    assert client.statuses == [200]
    client.leave()
    assert world.idle


def test_a_small_body_is_ready_when_it_is_wanted(world: World) -> None:
    """The next request can follow it at once."""
    client = world.connect()
    client.post("/wait", length(3), body=b"\1\2\3POST /read HTTP/1.1\r\n\r\n")
    world.desk.waiting[0].callback(None)
    assert client.statuses == [200, 200]
    assert b"\r\n\r\n3 6" in client.said
    assert client.said.endswith(b"\r\n\r\n0 0")


@pytest.mark.parametrize("lines", [[length(10)], [CHUNKED]])
def test_a_body_that_is_too_slow_answers_408(world: World, lines: list[str]) -> None:
    """A steady trickle does not help. The connection ends afterwards."""
    client = world.connect()
    client.post("/read", *lines)
    for _ in range(3):
        world.clock.advance(BODY_DEADLINE / 3 - 0.1)
        client.send(b"1\r\nx\r\n" if lines == [CHUNKED] else b"x")
    assert client.said == b""
    world.clock.advance(1)
    assert client.statuses == [408]
    assert b"Connection: close" in client.said
    world.clock.advance(LINGER)
    assert client.cut
    assert world.idle
    assert world.clock.getDelayedCalls() == []


@pytest.mark.parametrize(("path", "most"), [("/read", MAX_BODY), ("/form", FORM)])
def test_the_size_of_a_body_is_limited(world: World, path: str, most: int) -> None:
    """The limit holds with and without an announced length.

    It is small for unidentified callers.
    """
    client = world.connect()
    client.post(path, CHUNKED, body=b"%x\r\n" % most + b"x" * most + b"\r\n")
    assert client.said == b""
    client.send(b"1\r\nx\r\n")
    assert client.statuses == [413]
    other = world.connect()
    other.post(path, length(most + 1), PROMISE)
    assert other.statuses == [413]
    exact = world.connect()
    exact.post(path, length(most), body=b"x" * most)
    assert exact.statuses == [200]


def test_an_invalid_chunk_answers_400(world: World) -> None:
    """No other response follows, whatever the state of the request."""
    client = world.connect()
    client.post("/read", CHUNKED, body=b"1\r\nx\r\nzz\r\n")
    assert client.statuses == [400]
    client.send(b"POST /read HTTP/1.1\r\n\r\n")
    world.clock.advance(BODY_DEADLINE)
    assert client.statuses == [400]
    assert client.cut
    assert world.idle


BODY = bytes(range(100))
CHUNKS = b"a\r\n" + BODY[:10] + b"\r\n5a\r\n" + BODY[10:] + b"\r\n0\r\n\r\n"


def request(path: str, *lines: str, body: bytes = b"") -> bytes:
    """Return the bytes of a request."""
    head = [f"POST {path} HTTP/1.1", "Host: localhost", *lines, "", ""]
    return "\r\n".join(head).encode() + body


STREAM = b"".join(
    [
        request("/refuse", length(100), body=BODY),
        request("/read", length(100), body=BODY),
        request("/read", CHUNKED, body=CHUNKS),
        request("/refuse"),
        request("/read"),
        request("/refuse", length(100), body=BODY),
        request("/read", length(100), PROMISE, body=BODY),
        request("/form", length(100), body=BODY),
        request("/refuse", length(3), body=b"end"),
    ]
)


@given(st.lists(st.integers(0, len(STREAM)), max_size=40))
def test_any_split_of_a_stream_of_requests_gives_the_same_responses(
    cuts: list[int],
) -> None:
    """The next request begins at the end of a body, wanted or not."""
    world = World()
    client = world.connect()
    ends = [*sorted(cuts), len(STREAM)]
    for begin, end in zip([0, *ends], ends, strict=False):
        if begin < end:
            client.send(STREAM[begin:end])
    statuses = [status for status in client.statuses if status != 100]
    assert statuses == [401, 200, 200, 401, 200, 401, 200, 200, 401]
    assert client.said.count(b"100 %d" % sum(BODY)) == 4
    assert not client.cut
    client.leave()
    assert world.idle
    assert world.clock.getDelayedCalls() == []


# -- memory


def test_memory_for_all_bodies_is_limited(world: World) -> None:
    """One caller gets a third of it. Beyond that the response is 503 with Retry-After."""
    held = []
    for number in range(BODY_MEMORY // 3 // MAX_BODY):
        held.append(world.connect())
        held[-1].post("/read", length(MAX_BODY), body=b"x" * (MAX_BODY - 1))
        assert held[-1].said == b"", number
    full = world.connect()
    full.post("/read", length(MAX_BODY), body=b"x" * 100)
    assert full.statuses == [503]
    for host in ("192.0.2.2", "192.0.2.3"):
        while True:
            client = world.connect(host)
            client.post("/read", length(MAX_BODY), body=b"x" * (MAX_BODY - 1))
            if client.said:
                break
            held.append(client)
        assert client.statuses == [503]
        assert b"\r\nRetry-After: 5\r\n" in client.said
    assert world.site.bodies.used <= BODY_MEMORY
    assert BODY_MEMORY - world.site.bodies.used < 2 * MAX_BODY
    for client in held:
        client.send(b"x")
        assert client.statuses == [200]
    assert world.site.bodies.used == 0
    later = world.connect()
    later.post("/read", length(10), body=b"x" * 10)
    assert later.statuses == [200]


@pytest.mark.parametrize("path", ["/read", "/wait", "/form", "/refuse"])
@pytest.mark.parametrize("lines", [[length(100_000)], [CHUNKED]])
def test_nothing_is_held_for_a_client_that_has_left(
    world: World, path: str, lines: list[str]
) -> None:
    """The state of its request does not matter."""
    client = world.connect()
    begin = b"2000\r\n" if lines == [CHUNKED] else b""
    client.post(path, *lines, body=begin + b"x" * 8192)
    client.leave()
    for waiting in world.desk.waiting:
        waiting.addErrback(lambda _: None)
        waiting.cancel()
    assert world.idle
    assert world.clock.getDelayedCalls() == []


def test_the_stranger_that_holds_most_is_cut(world: World) -> None:
    """Strangers with little data stay, and so do identified callers."""
    known = world.connect()
    known.post("/read", length(MAX_BODY), body=b"x" * (MAX_BODY - 1))
    small = world.connect()
    small.send(b"GET /read HTTP/1.1\r\nHost: loc")
    many = []
    for number in range(2000):
        client = world.connect(f"192.0.{number >> 8}.{number & 255}")
        client.send(b"GET /read HTTP/1.1\r\nX: " + b"x" * 10_000)
        many.append(client)
        assert world.site.unidentified.total <= UNIDENTIFIED_MEMORY
    left = [client for client in many if not client.cut]
    assert len(left) < UNIDENTIFIED_MEMORY // 10_000
    assert len(left) > UNIDENTIFIED_MEMORY // 20_000
    assert all(len(client.channel._buffer) == 0 for client in many if client.cut)
    small.send(b"alhost\r\n\r\n")
    assert small.statuses == [200]
    known.send(b"x")
    assert known.statuses == [200]
    for client in [*left, small, known]:
        client.leave()
    assert world.idle


def test_a_header_line_counts_for_more_than_its_bytes(world: World) -> None:
    """The objects of Twisted are many times larger."""
    client = world.connect()
    lines = b"".join(b"a%d:b\r\n" % number for number in range(MAX_HEADERS - 1))
    client.send(b"GET /read HTTP/1.1\r\n" + lines)
    assert world.site.unidentified.total > 100 * MAX_HEADERS
    client.leave()
    assert world.idle


def test_an_identified_caller_is_no_stranger_until_its_next_request(world: World) -> None:
    """The long-poll of an accepted caller takes no memory of strangers."""
    client = world.connect()
    client.post("/wait", length(0), body=b"GET /rea")
    assert world.site.unidentified.total > 0
    world.desk.waiting[0].callback(None)
    assert client.statuses == [200]
    client.send(b"d HTTP/1.1\r\nX: y")
    assert world.site.unidentified.total > 0
    client.leave()
    assert world.idle


def test_number_and_length_of_header_names_are_limited(world: World) -> None:
    """Twisted would cache ten thousand long names for ever."""
    good = world.connect()
    good.post("/read", *(f"X{n}: y" for n in range(MAX_HEADERS - 1)))
    assert good.statuses == [200]
    many = world.connect()
    many.post("/read", *(f"X{n}: y" for n in range(MAX_HEADERS)))
    assert many.statuses == [400]
    longest = world.connect()
    longest.post("/read", "x" * MAX_NAME + ": y")
    assert longest.statuses == [200]
    longer = world.connect()
    longer.post("/read", "x" * (MAX_NAME + 1) + ": y")
    assert longer.statuses == [400]


def test_parameters_and_cookies_are_not_kept_as_twisted_parses_them(world: World) -> None:
    """A head can hold thousands, which would take a hundred times its bytes."""
    client = world.connect()
    client.send(
        b"GET /wait?" + b"&".join(b"a%d" % n for n in range(1000)) + b" HTTP/1.1\r\n"
    )
    client.send(b"Cookie: " + b"; ".join(b"a%d=1" % n for n in range(500)) + b"\r\n\r\n")
    (seen,) = world.desk.seen
    assert seen.args == {}
    assert seen.received_cookies == {}
    assert b"a999" in seen.uri
    client.leave()
    world.desk.waiting[0].addErrback(lambda _: None)
    world.desk.waiting[0].cancel()


def test_a_head_after_a_body_has_a_deadline_of_its_own(world: World) -> None:
    """The deadline starts with its first byte."""
    client = world.connect()
    client.post("/read", length(1), body=b"x")
    world.clock.advance(HEAD_DEADLINE)
    client.send(b"G")
    world.clock.advance(HEAD_DEADLINE)
    assert client.statuses == [200, 408]
