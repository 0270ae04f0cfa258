"""No client, however slow, large, broken or numerous, takes the daemon from the others."""

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
"""Seconds that a deadline may be late by on a busy machine."""
MIB = 1 << 20
FLAT = 16 * MIB
"""Bytes that the daemon's memory may grow by, whatever is sent or not read."""
FEW_FILES = 300
CROWD = 150
"""More connections than a daemon has that may open `FEW_FILES` files, and keeps some."""
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
    """Return a daemon that the tests share; its log must stay free of tracebacks."""
    folder = tmp_path_factory.mktemp("limits")
    daemon = Daemon(folder, "--command", SHELL, "--poll-timeout", "60")
    yield daemon
    daemon.stop()
    assert "Traceback" not in daemon.log.read_text()


def sent(daemon: Daemon, data: bytes) -> Answer:
    """Send bytes on a connection of their own and return the answer to them."""
    with daemon.open_socket() as sock:
        sock.sendall(data)
        return next_answer(sock)


def serves(daemon: Daemon) -> bool:
    """Return whether the daemon answers somebody else."""
    return daemon.get("/tasks?limit=1").status == 200


def newest(daemon: Daemon) -> int:
    """Return the number of the newest task."""
    return max(map(int, daemon.get("/tasks?limit=1").json()["tasks"]), default=0)


# -- time


def until_cut(sock: socket.socket, drip: bytes, pause: float) -> tuple[float, bytes]:
    """Send a little every ``pause`` seconds until the other side ends the connection.

    Return after how many seconds it did, and what it said.
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
    """Somebody who sends a beginning, and then a little every two seconds."""

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
        """Be slow until cut."""
        with self.sock, suppress(ConnectionResetError):
            self.sock.sendall(self.begin)
            self.seconds, self.said = until_cut(self.sock, self.drip, 2)


@frozen
class Meeting:
    """Those who were slow at the same time, until the last of them was cut."""

    told: list[Slow]
    """They speak HTTP, so far."""
    mute: list[Slow]
    """They speak not even TLS."""
    crowd: list[Slow]
    """They say nothing, and are more than there is room for."""
    patient: Answer
    """What somebody got who waited for an answer meanwhile."""
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
    """Return what became of many slow clients; they take their time all at once."""
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
        with suppress(ConnectionResetError):  # those are cut at once
            sock = secure.open_socket()
            crowd.append(Slow(f"one of many, {number}", HEAD_DEADLINE, sock))
    patient = Answer(waiting.getresponse())
    waiting.close()
    for slow in told + mute + crowd:
        slow.join()
    daemon.get(f"/task/{number}/kill")
    return Meeting(told, mute, crowd, patient, serves(daemon) and serves(secure))


def test_who_is_too_slow_is_told_and_cut(meeting: Meeting) -> None:
    """Ten seconds for a head, thirty for a body, however steadily they trickle."""
    assert [s.name for s in meeting.told if s.seconds > s.deadline + SLACK] == []
    assert [s.name for s in meeting.told if s.seconds < s.deadline - 1] == []
    for slow in meeting.told:
        assert slow.said.count(b"HTTP/1.1 408 ") == 1, slow.name
        assert b"application/problem+json" in slow.said


def test_who_does_not_even_speak_tls_is_cut(meeting: Meeting) -> None:
    """The same deadline holds before and during a handshake."""
    assert [s.name for s in meeting.mute if s.seconds > s.deadline + SLACK] == []


def test_a_silent_crowd_over_tls_is_cut_too(meeting: Meeting) -> None:
    """Also those for whom there is no room: they take files from the daemon."""
    assert [s.name for s in meeting.crowd if s.seconds > s.deadline + SLACK] == []


def test_the_patient_are_served_among_the_slow(meeting: Meeting) -> None:
    """The deadlines are for requests: who waits for an answer on a used one gets it."""
    assert meeting.patient.status == 200
    assert meeting.patient.json() == {"changed": False}
    assert meeting.others_are_served


# -- sizes


@pytest.mark.parametrize("length", [MIB + 1, 10**9, 2**63, 10**19])
def test_a_body_that_is_announced_as_too_large_is_refused_unsent(
    daemon: Daemon, length: int
) -> None:
    """The answer is there before a byte of the body is."""
    head = POST + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % length
    problem(sent(daemon, head), 413)


def test_a_body_that_is_too_large_is_not_asked_for(daemon: Daemon) -> None:
    """Who expects ``100 Continue`` gets 413 and nothing else; a small body is asked for."""
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


def test_a_chunked_body_is_refused_as_soon_as_it_is_too_large(daemon: Daemon) -> None:
    """It announces no size, and its end is not waited for."""
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
    # One chunk that says it is larger than everything.
    with daemon.open_socket() as sock:
        sock.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n7fffffff\r\n")
        sock.sendall(b"x" * (MIB + 1))
        problem(next_answer(sock), 413)


def test_whoever_goes_on_sending_what_was_refused_is_cut(daemon: Daemon) -> None:
    """Nothing of it is kept, and soon nothing of it is taken."""
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


def test_a_body_of_exactly_the_limit_is_read(daemon: Daemon) -> None:
    """1 MiB, by length and chunked."""
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
def test_a_head_that_is_too_large_is_answered_not_hung_up_on(
    daemon: Daemon, data: bytes
) -> None:
    """The client can read why, even if it sends all of it first."""
    answer = sent(daemon, data)
    assert 400 <= answer.status < 500
    problem(answer, answer.status)


# -- what is no HTTP


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
def test_what_is_no_http_is_answered_by_a_problem(daemon: Daemon, data: bytes) -> None:
    """400 that a program can read, and no task."""
    before = newest(daemon)
    problem(sent(daemon, data), 400)
    assert newest(daemon) == before


def test_what_comes_behind_a_broken_request_is_not_answered(daemon: Daemon) -> None:
    """Where one request ends is not known any more: nothing is taken for another."""
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


def test_a_method_in_lower_case_is_another_method(daemon: Daemon) -> None:
    """Methods are case-sensitive: ``head`` is not HEAD, and must not kill as GET does."""
    number = daemon.sh("exec sleep 100")
    for method in (b"head", b"get", b"post", b"Get"):
        request = b"%s /task/%d/kill HTTP/1.1\r\nHost: localhost\r\n\r\n" % (method, number)
        answer = sent(daemon, request)
        assert 400 <= answer.status < 500, method
        problem(answer, answer.status)
    assert daemon.task(number)["reason"] is None
    daemon.get(f"/task/{number}/kill")


# -- many requests on one connection


def test_a_connection_serves_one_request_after_the_other(daemon: Daemon) -> None:
    """Also behind errors, without a body and with one, and until the client closes it."""
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


def test_requests_sent_at_once_are_answered_in_order(daemon: Daemon) -> None:
    """A client need not wait for one answer to send the next request."""
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


def test_what_is_sent_behind_a_long_poll_is_not_hoarded(daemon: Daemon) -> None:
    """The daemon stops reading until it has answered, instead of keeping it all."""
    number = daemon.sh("exec sleep 100")
    daemon.forget_peak()
    before = daemon.memory()
    with daemon.open_socket() as sock:
        poll = f"GET /task/{number}/state HTTP/1.1\r\nHost: localhost\r\n\r\n"
        sock.sendall(poll.encode())
        wait_for(lambda: daemon.has_read(sock), "the daemon to read the poll")
        sock.setblocking(False)
        total = 0
        # Full for a whole second: nobody takes anything any more.
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
    """Return a daemon that has few connections."""
    return start("--command", SHELL, *request.param, program=FEW)


def hold_all(daemon: Daemon, stack: ExitStack) -> tuple[list[HTTPConnection], Answer]:
    """Return all connections that a daemon has, and what the next one was told."""
    held: list[HTTPConnection] = []
    while len(held) < CROWD:
        connection = daemon.connect()
        stack.callback(connection.close)
        with suppress(OSError):  # it is told without being asked, and closed
            connection.request("GET", "/tasks?limit=1")
        answer = Answer(connection.getresponse())
        if answer.status != 200:
            return held, answer
        held.append(connection)
    raise AssertionError("there was room for everybody")


def test_one_connection_too_many_is_told_so(few: Daemon) -> None:
    """Those before are served, and so is the next one after them.

    Tasks still start: the files that they need are not for connections.
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


def test_one_connection_too_many_is_told_when_to_try_again(few: Daemon) -> None:
    """503 has Retry-After, like every 503 of ours."""
    with ExitStack() as stack:
        _, refusal = hold_all(few, stack)
        assert int(refusal.headers["Retry-After"] or 0) > 0


# -- slow readers


def test_slow_readers_of_a_huge_output_cost_the_daemon_no_memory(start: Start) -> None:
    """What they do not take stays on the disk; it is complete when they take it at last."""
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
    # They take some, in turns; meanwhile others are served.
    received = [bytearray() for _ in answers]
    for _ in range(20):
        for answer, data in zip(answers, received, strict=True):
            data.extend(answer.read(32768))
        assert serves(daemon)
    assert daemon.peak() - before < FLAT
    # One goes away, one takes all.
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


def test_a_reader_that_stops_keeps_nobody_else_waiting(daemon: Daemon) -> None:
    """Of two who wait for the same end one reads at once, one late; both see all of it."""
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
