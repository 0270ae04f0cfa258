"""Tests that slow, large, broken and numerous clients take nothing from the others."""

import json
import select
import socket
import ssl
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from http.client import HTTPConnection
from threading import Thread

import pytest
from attrs import frozen

from tests.integration.conftest import Start
from tests.integration.daemon import (
    PATIENCE,
    SHELL,
    Answer,
    Daemon,
    next_answer,
    problem,
    wait_for,
)

HEAD_DEADLINE = 10.0
BODY_DEADLINE = 30.0
SLACK = 10.0
"""Seconds by which a deadline may be late on a busy machine."""
MIB = 1 << 20
FLAT = 16 * MIB
"""Bytes by which the daemon's memory may grow, whatever clients send or leave unread."""
FEW_FILES = 300
CROWD = 150
"""More connections than a daemon that may open `FEW_FILES` files can have."""
FEW = (
    "sh",
    "-c",
    f'ulimit -n {FEW_FILES}; exec "$@"',
    "sh",
    sys.executable,
    "-m",
    "pulsar_api",
)

GET = b"GET /tasks?limit=1 HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = b"POST /site/production?action=run HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """Return a daemon that the tests share. Its log must have no traceback."""
    folder = tmp_path_factory.mktemp("limits")
    daemon = Daemon(folder, "--command", SHELL, "--poll-timeout", "60")
    yield daemon
    daemon.stop()
    assert "Traceback" not in daemon.log.read_text()


def sent(daemon: Daemon, data: bytes) -> Answer:
    """Send bytes on a new connection and return the response."""
    with daemon.open_socket() as sock:
        sock.sendall(data)
        return next_answer(sock)


def serves(daemon: Daemon) -> bool:
    """Return whether the daemon answers another client."""
    return daemon.get("/tasks?limit=1").status == 200


def newest(daemon: Daemon) -> int:
    """Return the number of the newest task."""
    return max(map(int, daemon.get("/tasks?limit=1").json()["tasks"]), default=0)


# -- time


def until_cut(sock: socket.socket, drip: bytes, pause: float) -> tuple[float, bytes]:
    """Send a little every ``pause`` seconds until the daemon closes the connection.

    Return the seconds until then, and the bytes that the daemon sent.
    """
    began = time.monotonic()
    said = b""
    sock.setblocking(False)
    while time.monotonic() - began < BODY_DEADLINE + SLACK:
        with suppress(OSError):
            sock.send(drip)
        if select.select([sock], [], [], pause)[0]:
            try:
                data = sock.recv(1 << 16)
            except (BlockingIOError, ssl.SSLWantReadError):
                continue
            except (ConnectionResetError, ssl.SSLError):
                break
            if not data:
                break
            said += data
    return time.monotonic() - began, said


class Slow(Thread):
    """A client that sends a beginning, and then a little every two seconds."""

    def __init__(
        self,
        name: str,
        deadline: float,
        sock: socket.socket,
        begin: bytes = b"",
        drip: bytes = b"",
    ) -> None:
        super().__init__(name=name)
        self.deadline = deadline
        self.sock = sock
        self.begin = begin
        self.drip = drip
        self.seconds = 0.0
        self.said = b""
        self.start()

    def run(self) -> None:
        """Send slowly until the daemon closes the connection."""
        with self.sock, suppress(ConnectionResetError):
            self.sock.sendall(self.begin)
            self.seconds, self.said = until_cut(self.sock, self.drip, 2)


@frozen
class Meeting:
    """Clients that were slow at the same time, and the results."""

    told: list[Slow]
    """Slow clients whose connection is ready for HTTP."""
    mute: list[Slow]
    """Clients that do not complete a TLS handshake."""
    crowd: list[Slow]
    """Clients that send nothing, more of them than the daemon has connections."""
    patient: Answer
    """The response to a client that waited in a long-poll meanwhile."""
    others_are_served: bool


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """Return a daemon with TLS and few connections."""
    folder = tmp_path_factory.mktemp("secure")
    secure = Daemon(folder, "--command", SHELL, "--dev", program=FEW)
    yield secure
    secure.stop()


@pytest.fixture(scope="module")
def meeting(daemon: Daemon, secure: Daemon) -> Meeting:
    """Return the results of many slow clients, which run at the same time."""
    number = daemon.sh("exec sleep 100")
    waiting = daemon.connect()
    waiting.request("GET", "/tasks?limit=1")
    Answer(waiting.getresponse())
    waiting.request("GET", f"/task/{number}/state?timeout=35")
    used = daemon.open_socket()
    used.sendall(GET)
    next_answer(used)
    encrypted = secure.connect()
    encrypted.connect()

    def head(name: str, begin: bytes = b"", drip: bytes = b"") -> Slow:
        return Slow(name, HEAD_DEADLINE, daemon.open_socket(), begin, drip)

    def body(name: str, rest: bytes, drip: bytes = b"") -> Slow:
        return Slow(name, BODY_DEADLINE, daemon.open_socket(), POST + rest, drip)

    told = [
        head("silence"),
        head("bytes", b"", b"G"),
        head("lines", GET[:-2], b"X: y\r\n"),
        head("a request behind another", GET + b"G", b"E"),
        Slow("a second request", HEAD_DEADLINE, used, b"", b"G"),
        Slow("encrypted bytes", HEAD_DEADLINE, encrypted.sock, b"", b"G"),
        body("no body", b"Content-Length: 1000\r\n\r\n"),
        body("bytes of a body", b"Content-Length: 1000\r\n\r\n", b"x"),
        body("chunks", b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        body("a promise", b"Content-Length: 1000\r\nExpect: 100-continue\r\n\r\n"),
    ]
    hello = b"\x16\x03\x01\x02\x00\x01"
    mute = [
        Slow("no handshake", HEAD_DEADLINE, secure.open_socket()),
        Slow("half a handshake", HEAD_DEADLINE, secure.open_socket(), hello, b"\0"),
    ]
    crowd = []
    for number in range(CROWD):
        with suppress(ConnectionResetError):  # the daemon closes these at once
            sock = secure.open_socket()
            crowd.append(Slow(f"one of many, {number}", HEAD_DEADLINE, sock))
    patient = Answer(waiting.getresponse())
    waiting.close()
    for slow in told + mute + crowd:
        slow.join()
    daemon.get(f"/task/{number}/kill")
    return Meeting(told, mute, crowd, patient, serves(daemon) and serves(secure))


def test_slow_requests_answer_408_and_are_closed(meeting: Meeting) -> None:
    """The deadline is ten seconds for a head and thirty for a body, however it trickles."""
    assert [s.name for s in meeting.told if s.seconds > s.deadline + SLACK] == []
    assert [s.name for s in meeting.told if s.seconds < s.deadline - 1] == []
    for slow in meeting.told:
        assert slow.said.count(b"HTTP/1.1 408 ") == 1, slow.name
        assert b"application/problem+json" in slow.said


def test_connections_without_a_tls_handshake_are_closed(meeting: Meeting) -> None:
    """The deadline of a head also holds before and during the handshake."""
    assert [s.name for s in meeting.mute if s.seconds > s.deadline + SLACK] == []


def test_a_silent_crowd_over_tls_is_closed(meeting: Meeting) -> None:
    """Clients beyond the limit of connections are closed as well, as each costs a file."""
    assert [s.name for s in meeting.crowd if s.seconds > s.deadline + SLACK] == []


def test_long_polls_and_other_clients_are_served_among_slow_ones(meeting: Meeting) -> None:
    """The deadlines are for requests, not for the wait for a response."""
    assert meeting.patient.status == 200
    assert meeting.patient.json() == {"changed": False}
    assert meeting.others_are_served


# -- sizes


@pytest.mark.parametrize("length", [MIB + 1, 10**9, 2**63, 10**19])
def test_a_body_with_a_too_large_content_length_answers_413(
    daemon: Daemon, length: int
) -> None:
    """The response comes before the client sends a byte of the body."""
    head = POST + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % length
    problem(sent(daemon, head), 413)


def test_a_too_large_body_gets_413_instead_of_100_continue(daemon: Daemon) -> None:
    """With a small body such a client gets ``100 Continue``."""
    head = POST + b"Expect: 100-continue\r\nContent-Type: application/json\r\n"
    with daemon.open_socket() as sock:
        sock.sendall(head + b"Content-Length: 2\r\n\r\n")
        assert sock.recv(1 << 16) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"{}")
        assert next_answer(sock).status == 200
    with daemon.open_socket() as sock:
        sock.sendall(head + b"Content-Length: %d\r\n\r\n" % (MIB + 1))
        _, said = until_cut(sock, b"", 1)
    assert said.startswith(b"HTTP/1.1 413 ")
    assert b"100 Continue" not in said


def test_a_too_large_chunked_body_answers_413_before_its_end(daemon: Daemon) -> None:
    """A chunked body announces no size, so the daemon counts what has arrived."""
    before = daemon.memory()
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    with daemon.open_socket() as sock:
        sock.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(16):
            sock.sendall(chunk)
        assert not select.select([sock], [], [], 0)[0]
        sock.sendall(b"1\r\nx\r\n")
        problem(next_answer(sock), 413)
    assert daemon.memory() - before < FLAT
    # A single chunk announces a size above the limit.
    with daemon.open_socket() as sock:
        sock.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n7fffffff\r\n")
        sock.sendall(b"x" * (MIB + 1))
        problem(next_answer(sock), 413)


def test_a_client_that_keeps_sending_a_refused_body_is_disconnected(daemon: Daemon) -> None:
    """The daemon stores none of these bytes, and soon stops reading them."""
    daemon.forget_peak()
    before = daemon.memory()
    piece = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    with daemon.open_socket() as sock:
        began = time.monotonic()
        sock.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n")
        with suppress(ConnectionError):
            while time.monotonic() - began < PATIENCE:
                sock.sendall(piece)
        assert time.monotonic() - began < SLACK
    assert daemon.peak() - before < FLAT
    assert serves(daemon)


def test_a_body_of_exactly_the_limit_is_accepted(daemon: Daemon) -> None:
    """The limit is 1 MiB, with ``Content-Length`` and in chunks."""
    text = b'{"action": "run"}'
    body = text + b" " * (MIB - len(text))
    kind = b"Content-Type: application/json\r\n"
    whole = b"Content-Length: %d\r\n\r\n" % len(body) + body
    chunked = (
        b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n"
    )
    for rest in (whole, chunked):
        answer = sent(daemon, POST + kind + rest)
        assert answer.status == 200, answer.body


@pytest.mark.parametrize(
    "data",
    [
        b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\n\r\n",
        b"GET /" + b"x" * MIB + b" HTTP/1.1\r\n\r\n",
        b"GET /tasks?" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"POST /" + b"x" * 100_000 + b"/production HTTP/1.1\r\nContent-Length: 0\r\n\r\n",
        b"x" * 100_000,
        b"GET /tasks HTTP/1.1\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
        b"GET /tasks HTTP/1.1\r\n" + b"X: y\r\n" * 10_000 + b"\r\n",
    ],
    ids=lambda data: f"{data[:12]!r} {len(data)}",
)
def test_a_too_large_head_answers_4xx(daemon: Daemon, data: bytes) -> None:
    """The client can read the response even if it sends the whole head first."""
    answer = sent(daemon, data)
    assert 400 <= answer.status < 500
    problem(answer, answer.status)


# -- malformed HTTP


@pytest.mark.parametrize(
    "data",
    [
        b"GARBAGE\r\n\r\n",
        b"\0\r\n",
        b"\x16\x03\x01\x02\x00\r\n",
        b"GET\r\n\r\n",
        b"GET /tasks\r\n\r\n",
        b"GET /tasks HTTP/9.9\r\n\r\n",
        b"GET /tasks FTP/1.1\r\n\r\n",
        b"GET /tasks HTTP/1.1 more\r\n\r\n",
        b"GET  /tasks HTTP/1.1\r\n\r\n",
        b"GET\t/tasks HTTP/1.1\r\n\r\n",
        b"GET /ta sks HTTP/1.1\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\n\r\n",
        b"GET /tasks?app=\xff HTTP/1.1\r\n\r\n",
        b"GET tasks HTTP/1.1\r\n\r\n",
        b"G{T /tasks HTTP/1.1\r\n\r\n",
        b"GET /tasks HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET /tasks HTTP/1.1\r\nName : value\r\n\r\n",
        b"GET /tasks HTTP/1.1\r\n: value\r\n\r\n",
        b"GET /tasks HTTP/1.1\r\n folded\r\n\r\n",
        b"GET /tasks HTTP/1.1\r\nX: \0\r\n\r\n",
        POST + b"Content-Length: x\r\n\r\n",
        POST + b"Content-Length: -1\r\n\r\n",
        POST + b"Content-Length: +1\r\n\r\nx",
        POST + b"Content-Length: 1_0\r\n\r\n",
        POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
        POST + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: gzip\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\nxx\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\n1;" + b"x" * 100_000,
    ],
    ids=lambda data: repr(data.removeprefix(POST)[:40]),
)
def test_malformed_requests_answer_400(daemon: Daemon, data: bytes) -> None:
    """The body is a problem in JSON, and no task is created."""
    before = newest(daemon)
    problem(sent(daemon, data), 400)
    assert newest(daemon) == before


def test_requests_behind_a_broken_one_are_not_answered(daemon: Daemon) -> None:
    """After an error the daemon no longer knows where the next request begins."""
    before = newest(daemon)
    requests = [
        b"GET /tasks HTTP/1.1\r\nno colon\r\n\r\n",
        POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
        POST + b"Content-Length: 99999999\r\n\r\n",
        b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\n\r\n",
    ]
    with ExitStack() as stack:
        socks = [stack.enter_context(daemon.open_socket()) for _ in requests]
        for sock, request in zip(socks, requests, strict=True):
            sock.sendall(request + POST + b"Content-Length: 0\r\n\r\n")
        for sock in socks:
            seconds, said = until_cut(sock, b"", 1)
            assert seconds < SLACK
            assert said.count(b"\r\n\r\n") == 1, said
    assert newest(daemon) == before


def test_a_method_in_lower_case_is_refused(daemon: Daemon) -> None:
    """Methods are case-sensitive: ``get`` must not kill as GET does."""
    number = daemon.sh("exec sleep 100")
    for method in (b"head", b"get", b"post", b"Get"):
        request = b"%s /task/%d/kill HTTP/1.1\r\nHost: localhost\r\n\r\n" % (method, number)
        answer = sent(daemon, request)
        assert 400 <= answer.status < 500, method
        problem(answer, answer.status)
    assert daemon.task(number)["reason"] is None
    daemon.get(f"/task/{number}/kill")


# -- many requests on one connection


def test_a_connection_serves_successive_requests(daemon: Daemon) -> None:
    """It stays open after errors, with and without a body, until the client closes it."""
    connection = daemon.connect()
    connection.connect()
    sock = connection.sock
    requests: list[tuple[str, str, str | None, int]] = [
        ("GET", "/tasks", None, 200),
        ("POST", "/site/production?action=run", None, 200),
        ("POST", "/site/production", '{"action": "-x"}', 400),
        ("GET", "/task/999999", None, 404),
        ("HEAD", "/tasks", None, 200),
        ("OPTIONS", "/tasks", None, 204),
        ("DELETE", "/tasks", None, 405),
        ("GET", "/tasks/created?timeout=0", None, 200),
        ("GET", "/pulsar/index.html", None, 200),
    ]
    for _ in range(5):
        for method, path, body, status in requests:
            headers = {"Content-Type": "application/json"} if body else {}
            connection.request(method, path, body, headers)
            assert Answer(connection.getresponse()).status == status, (method, path)
            assert connection.sock is sock
    connection.close()


def test_pipelined_requests_are_answered_in_order(daemon: Daemon) -> None:
    """A client need not wait for a response before it sends the next request."""
    number = daemon.sh("exec sleep 100")
    path = f"/task/{number}/state?timeout=1".encode()
    requests = [
        GET,
        b"GET " + path + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        POST + b"Content-Length: 0\r\n\r\n",
        b"GET /task/%d?output=none HTTP/1.1\r\nHost: localhost\r\n\r\n" % number,
        POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET /tasks?limit=x HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    ]
    with daemon.open_socket() as sock:
        sock.sendall(b"".join(requests))
        with sock.makefile("rb") as file:
            data = file.read()
    answers = data.split(b"HTTP/1.1 ")[1:]
    assert [answer[:3] for answer in answers] == [
        b"200",
        b"200",
        b"200",
        b"200",
        b"200",
        b"400",
    ]
    bodies = [json.loads(answer.partition(b"\r\n\r\n")[2]) for answer in answers]
    assert "tasks" in bodies[0]
    assert bodies[1] == {"changed": False}
    assert bodies[2]["id"] == number + 1
    assert bodies[3]["id"] == number
    assert bodies[4]["id"] == number + 2
    assert bodies[5]["field"] == "limit"
    daemon.get(f"/task/{number}/kill")


def test_requests_pipelined_behind_a_long_poll_are_not_buffered(daemon: Daemon) -> None:
    """The daemon stops reading until it has answered the long-poll."""
    number = daemon.sh("exec sleep 100")
    daemon.forget_peak()
    before = daemon.memory()
    with daemon.open_socket() as sock:
        poll = f"GET /task/{number}/state HTTP/1.1\r\nHost: localhost\r\n\r\n"
        sock.sendall(poll.encode())
        wait_for(lambda: daemon.has_read(sock), "the daemon to read the poll")
        sock.setblocking(False)
        total = 0
        # If the buffers are full for a second, the daemon has stopped reading.
        while select.select([], [sock], [], 1)[1]:
            total += sock.send(GET * 1000)
            assert total < 100 * MIB
        assert daemon.peak() - before < FLAT
        assert serves(daemon)
    daemon.get(f"/task/{number}/kill")
    daemon.ended(number)


# -- numbers


@pytest.fixture(params=[(), ("--dev",)], ids=["http", "tls"])
def few(start: Start, request: pytest.FixtureRequest) -> Daemon:
    """Return a daemon with few connections."""
    return start("--command", SHELL, *request.param, program=FEW)


def hold_all(daemon: Daemon, stack: ExitStack) -> tuple[list[HTTPConnection], Answer]:
    """Return all connections that the daemon accepts, and the response to the next one."""
    held: list[HTTPConnection] = []
    while len(held) < CROWD:
        connection = daemon.connect()
        stack.callback(connection.close)
        with suppress(OSError):  # the daemon answers and closes before it reads a request
            connection.request("GET", "/tasks?limit=1")
        answer = Answer(connection.getresponse())
        if answer.status != 200:
            return held, answer
        held.append(connection)
    raise AssertionError("there was room for everybody")


def test_a_connection_beyond_the_limit_answers_503(few: Daemon) -> None:
    """Earlier connections are served, and new ones when an earlier one is closed.

    Tasks still start, as some files are kept free for them.
    """
    with ExitStack() as stack:
        held, refusal = hold_all(few, stack)
        problem(refusal, 503)
        for _ in range(50):
            connection = few.connect()
            stack.callback(connection.close)
            connection.connect()
            problem(next_answer(connection.sock), 503)
        held[0].request("POST", "/site/production?action=run", None)
        number = Answer(held[0].getresponse()).json()["id"]
        held[-1].request("GET", f"/task/{number}/state")
        assert Answer(held[-1].getresponse()).json()["task"]["status"] == "finished"
    wait_for(lambda: few.get("/tasks?limit=1").status == 200, "a free connection")


def test_a_connection_beyond_the_limit_has_retry_after(few: Daemon) -> None:
    """Every 503 of the daemon has this header."""
    with ExitStack() as stack:
        _, refusal = hold_all(few, stack)
        assert int(refusal.headers["Retry-After"] or 0) > 0


# -- slow readers


def test_slow_readers_of_a_huge_output_cost_the_daemon_no_memory(start: Start) -> None:
    """Unread output stays on the disk. A slow reader gets all of it in the end."""
    daemon = start("--command", SHELL)
    size = 40_000_000
    number = daemon.sh(f"head -c {size} /dev/zero | tr '\\0' x")
    assert daemon.ended(number)["outputSize"] == size
    daemon.forget_peak()
    before = daemon.memory()
    paths = [f"/task/{number}", f"/task/{number}/output", "/tasks?output=full"] * 3
    readers = []
    for path in paths:
        reader = daemon.connect()
        reader.connect()
        reader.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        reader.request("GET", path)
        readers.append(reader)
    answers = [reader.getresponse() for reader in readers]
    # Each reader takes some in turn, and other clients are served meanwhile.
    received = [bytearray() for _ in answers]
    for _ in range(20):
        for answer, data in zip(answers, received, strict=True):
            data.extend(answer.read(32768))
        assert serves(daemon)
    assert daemon.peak() - before < FLAT
    # One reader disconnects, and another reads to the end.
    readers[1].close()
    answers[1].close()
    received[0] += answers[0].read()
    assert len(json.loads(received[0])["output"]) == size
    assert daemon.peak() - before < FLAT
    for reader, answer in zip(readers, answers, strict=True):
        answer.close()
        reader.close()
    assert serves(daemon)
    assert "Traceback" not in daemon.log.read_text()


def test_a_stopped_reader_does_not_delay_another(daemon: Daemon) -> None:
    """Two clients wait for the same end.

    One reads at once, one late, and both get everything.
    """
    size = 10_000_000
    number = daemon.sh(f"sleep 1; head -c {size} /dev/zero | tr '\\0' x")
    with daemon.open_socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        request = f"GET /task/{number}/state HTTP/1.1\r\nHost: localhost\r\n\r\n"
        sock.sendall(request.encode())
        wait_for(lambda: daemon.has_read(sock), "the daemon to read the request")
        first = daemon.get(f"/task/{number}/state").json()
        late = next_answer(sock).json()
    assert len(first["task"]["output"]) == size
    assert late["task"]["output"] == first["task"]["output"]
