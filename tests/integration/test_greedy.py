"""Clients that take more than their share by sign-ins, bodies, lists and searches."""

import json
import os
import select
import selectors
import socket
import sqlite3
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import pytest

from pulsar_api.auth import credentials
from pulsar_api.auth.audit import FILE, VISITS, AuditLog
from tests.integration.conftest import Start
from tests.integration.daemon import (
    PATIENCE,
    Answer,
    Daemon,
    next_answer,
    problem,
    wait_for,
)
from tests.integration.others import Times, others

FULL = bool(os.environ.get("PULSAR_HOSTILE"))
"""Whether to attack as hard as the documented bounds allow, and to judge the times."""
SECONDS = 10 if FULL else 1
SESSIONS = 300_000 if FULL else 2_000
TASKS = 1000 if FULL else 40
"""Number of tasks with variables of `LARGE` characters."""
SMALL_TASKS = 100_000 if FULL else 3_000
READERS = 20 if FULL else 4
STALLED = 50 if FULL else 6
SEARCHERS = 50 if FULL else 10
STRANGERS = 1000 if FULL else 100
MIB = 1 << 20
FLAT = 16 * MIB
"""Bytes by which the daemon's memory may have grown after an attack."""
SLOWEST = 0.1
"""Seconds in which 99 of 100 small requests of others are answered meanwhile."""

TOKENS = ("--command", "true", "--auth-provider", "tokens")


def new_tokens(
    daemon: Daemon, names: Sequence[str], right: str = "admin", on: str = "*"
) -> list[dict[str, str]]:
    """Return the headers with new tokens, which the daemon has not cached yet."""
    secrets = [credentials.PREFIX + credentials.new_secret() for _ in names]
    with credentials.opened(daemon.state / credentials.FILE) as db:
        for name, secret in zip(names, secrets, strict=True):
            token = credentials.Token(name, (right,), (on,), time.time())
            credentials.add_token(db, token, secret)
    return [{"Authorization": f"Bearer {secret}"} for secret in secrets]


def head(method: str, path: str, headers: Mapping[str, str]) -> bytes:
    """Return the head of a request."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode()


def test_many_valid_tokens_at_once_are_accepted(start: Start) -> None:
    """Only wrong credentials lead to 429."""
    daemon = start(*TOKENS)
    headers = new_tokens(daemon, [f"bot{n}" for n in range(60)])
    with ExitStack() as stack:
        socks = [stack.enter_context(closing(daemon.open_socket())) for _ in headers]
        for sock, shown in zip(socks, headers, strict=True):
            sock.sendall(head("GET", "/tasks?limit=1", shown))
        assert [next_answer(sock).status for sock in socks] == [200] * len(headers)


def test_one_user_fills_half_of_the_queue_and_others_the_rest(start: Start) -> None:
    """The problem tells which limit is reached, and when to try again."""
    daemon = start(
        *("--auth-provider", "tokens", "--command", "sleep 60"),
        *("--max-running=1", "--max-queued=4"),
    )
    mean, good = new_tokens(daemon, ["mean", "good"])

    def refusal(limit: str) -> None:
        answer = daemon.post("/site/prod", {"action": "deploy"})
        found = problem(answer, 503)
        assert found["type"].endswith(":queue-full")
        assert answer.headers["Retry-After"] == "10"
        assert found["detail"].startswith(limit)

    daemon.headers = mean
    for _ in range(1 + 2):  # one of them runs
        daemon.run("site", "prod", "deploy")
    share = "2 tasks of token:mean are waiting already, which is the limit for one user;"
    refusal(share)
    daemon.headers = good
    for _ in range(2):
        daemon.run("site", "prod", "deploy")
    refusal("4 tasks are waiting already, which is the limit;")
    assert len(daemon.get("/tasks").json()["tasks"]) == 5


def report(what: str, idle: Times, busy: Times) -> None:
    """Print the response times during an attack and before it."""
    print(f"{what}: {busy} (idle: p99 {idle.p99 * 1e3:.1f} ms)")


def calm(idle: Times, busy: Times) -> bool:
    """Return whether others were served in time. On a slow machine the bound is higher."""
    return not FULL or busy.p99 < max(SLOWEST, 5 * idle.p99)


# -- sign-ins

FORM = {"Content-Type": "application/x-www-form-urlencoded"}


def fill_sessions(path: Path, user: str, number: int) -> None:
    """Write as many sessions as if a user had signed in that often."""
    now = time.time()
    rows = (
        (f"{n:064d}", f"static:{user}", now - 100 - n / 1e3, user) for n in range(number)
    )
    with closing(sqlite3.connect(path)) as db, db:
        db.executemany("INSERT INTO session VALUES (?, ?, x'00', ?3, ?3, ?4)", rows)


def sessions(path: Path) -> int:
    """Return the number of stored sessions."""
    with closing(sqlite3.connect(path)) as db:
        found: int = db.execute("SELECT count(*) FROM session").fetchone()[0]
        return found


def test_endless_sign_ins_do_not_slow_others(start: Start) -> None:
    """Old sessions of that user end. The audit log still has the actions on tasks."""
    daemon = start(
        *("--command", "true", "--auth-provider", "static"),
        *("--auth-username", "joe", "--auth-password", "hunter2"),
    )
    (bot,) = new_tokens(daemon, ["bot"])
    daemon.headers = bot
    daemon.ended(daemon.run("site", "prod", "deploy"))
    daemon.stop()
    auth = daemon.state / credentials.FILE
    fill_sessions(auth, "joe", SESSIONS)
    daemon.start()
    with others(daemon, "/login/me", bot) as idle:
        time.sleep(1)
    memory = daemon.memory()
    signed_in = 0
    with others(daemon, "/login/me", bot) as busy, closing(daemon.connect()) as connection:
        until = time.monotonic() + SECONDS
        while time.monotonic() < until or signed_in < 2 * VISITS:
            connection.request("POST", "/login", "user=joe&password=hunter2", FORM)
            answer = Answer(connection.getresponse())
            assert answer.status == 303
            signed_in += 1
    cookie = {"Cookie": answer.headers["Set-Cookie"].partition(";")[0]}
    daemon.headers = {}
    assert daemon.get("/login/me", **cookie).json()["signedIn"]
    # Each transaction ends at most a hundred sessions.
    few = credentials.MOST_SESSIONS
    wait_for(lambda: sessions(auth) <= few, "the old sessions to end", 10 * PATIENCE)
    # If a hundred others overtake a sign-in, its own session has ended already.
    assert sessions(auth) >= few - 1
    report(f"{signed_in} sign-ins among {SESSIONS} sessions", idle, busy)
    assert calm(idle, busy)
    assert daemon.memory() - memory < FLAT
    log = AuditLog(daemon.state / FILE, time.time)
    daemon.stop()
    found = [entry["what"] for entry in log.read()]
    assert found[0] == "run"
    assert found.count("sign-in") < signed_in
    assert sum(entry.get("times", 1) for entry in log.read()) == signed_in + 1


# -- lists and searches

LARGE = 60_000
"""Characters in the variables of a task."""
LIST = "/tasks?limit=1000&output=none"
FOREVER = ("--keep-tasks", "0", "--keep-days", "0")


def fill_tasks(daemon: Daemon, number: int, size: int) -> None:
    """Restart a daemon with ``number`` ended tasks with variables of ``size`` each."""
    daemon.stop()
    now = time.time()
    row = (json.dumps({"data": "x" * size}), f"deploy data={'x' * size}", now, now, now)
    with closing(sqlite3.connect(daemon.state / "pulsar-api.db")) as db, db:
        db.executemany(
            "INSERT INTO task (revision, status, app, env, action, variables, command,"
            " exit_code, created_at, started_at, ended_at, output_size)"
            " VALUES (3, 'finished', 'site', 'prod', 'deploy', ?, ?, 0, ?, ?, ?, 0)",
            [row] * number,
        )
    daemon.start()


class Crowd:
    """Clients that repeat a request without end, each on its own connection."""

    def __init__(
        self, daemon: Daemon, clients: int, path: str, headers: Mapping[str, str]
    ) -> None:
        self.selector = selectors.DefaultSelector()
        self.head = head("GET", path, headers)
        self.answers = 0
        self.largest = 0
        for _ in range(clients):
            sock = daemon.open_socket()
            self.selector.register(sock, selectors.EVENT_READ, bytearray())
            sock.sendall(self.head)
            sock.setblocking(False)

    def go_on(self, seconds: float, least: int) -> None:
        """Send and read until the time is over and at least ``least`` answers have come."""
        until = time.monotonic() + seconds
        while time.monotonic() < until or self.answers < least:
            for key, _ in self.selector.select(1):
                sock: Any = key.fileobj
                data = sock.recv(1 << 20)
                assert data, "the daemon has hung up"
                key.data.extend(data)
                if _is_whole(key.data):
                    assert key.data.startswith(b"HTTP/1.1 200 "), key.data[:1000]
                    self.answers += 1
                    self.largest = max(self.largest, len(key.data))
                    key.data.clear()
                    sock.sendall(self.head)

    def close(self) -> None:
        """Close all connections."""
        for key in list(self.selector.get_map().values()):
            sock: Any = key.fileobj
            sock.close()
        self.selector.close()


def _is_whole(data: bytearray) -> bool:
    begin = data.find(b"\r\n\r\n")
    if begin < 0:
        return False
    for line in bytes(data[:begin]).split(b"\r\n"):
        if line.startswith(b"Content-Length: "):
            return len(data) - begin - 4 >= int(line[16:])
    return data.endswith(b"\r\n0\r\n\r\n")


def test_huge_lists_do_not_slow_others(start: Start) -> None:
    """Requests for lists wait for each other, and delay no other request."""
    daemon = start("--command", "true", *FOREVER)
    fill_tasks(daemon, TASKS, LARGE)
    whole = daemon.get(LIST)
    assert list(map(int, whole.json()["tasks"])) == list(range(TASKS, 0, -1))
    assert whole.headers["Content-Length"] is None
    path = "/task/1?output=none"
    with others(daemon, path, {}) as idle:
        time.sleep(1)
    memory = daemon.memory()
    daemon.forget_peak()
    with (
        closing(Crowd(daemon, READERS, LIST, {})) as crowd,
        others(daemon, path, {}) as busy,
    ):
        crowd.go_on(SECONDS, READERS)
    grown = (daemon.peak() - memory) / MIB
    what = f"{crowd.answers} lists of {crowd.largest >> 20} MiB for {READERS}"
    report(f"{what}, memory +{grown:.1f} MiB", idle, busy)
    assert calm(idle, busy)
    assert grown * MIB < 2 * FLAT
    wait_for(lambda: daemon.memory() - memory < FLAT, "the memory to come back")
    assert "Traceback" not in daemon.log.read_text()


@pytest.mark.parametrize("path", [LIST, "/jobs?pageSize=1000"])
def test_unread_huge_lists_need_little_memory(start: Start, path: str) -> None:
    """The next list of the same caller does not wait for them."""
    daemon = start("--command", "true", *FOREVER)
    fill_tasks(daemon, TASKS, LARGE)
    assert daemon.get(path).status == 200
    memory = daemon.memory()
    with ExitStack() as stack:
        socks = []
        for _ in range(STALLED):
            socks.append(stack.enter_context(closing(socket.socket())))
            socks[-1].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            socks[-1].settimeout(PATIENCE)
            socks[-1].connect((daemon.host, daemon.port))
            socks[-1].sendall(head("GET", path, {}))
        for sock in socks:
            assert sock.recv(9) == b"HTTP/1.1 "
        assert daemon.get(path).status == 200
        grown = (daemon.memory() - memory) / MIB
        print(f"{STALLED} lists that nobody reads: memory +{grown:.1f} MiB")
        assert grown * MIB < 2 * FLAT
        # A client that goes on to read still gets the whole list.
        rest = bytearray(b"HTTP/1.1 ")
        while not rest.endswith(b"\r\n0\r\n\r\n"):
            data = socks[-1].recv(1 << 20)
            assert data
            rest += data
        assert rest.count(b'"data": "x') >= TASKS
    wait_for(lambda: daemon.memory() - memory < FLAT, "the memory to come back")
    assert "Traceback" not in daemon.log.read_text()


def test_http_1_0_client_gets_huge_lists(start: Start) -> None:
    """The answer has no chunks. The end of the JSON shows that it is complete."""
    daemon = start("--command", "true", *FOREVER)
    fill_tasks(daemon, 40, LARGE)
    with closing(daemon.open_socket()) as sock:
        sock.sendall(f"GET {LIST} HTTP/1.0\r\n\r\n".encode())
        answer = next_answer(sock)
    assert answer.headers["Transfer-Encoding"] is None
    assert answer.body.endswith(b"}}\n")
    assert len(answer.json()["tasks"]) == 40


@pytest.mark.parametrize(
    ("path", "on"),
    [
        ("/tasks/created?since=0&timeout=0", "nothing/*"),
        ("/tasks/created?since=0&timeout=0", "*"),
        ("/tasks?text=nothing", "*"),
        ("/tasks?app=nothing&output=none", "*"),
        ("/tasks?limit=1", "nothing/*"),
    ],
)
def test_searches_do_not_slow_others(start: Start, path: str, on: str) -> None:
    """Each search reads all tasks and finds none."""
    daemon = start(*TOKENS, *FOREVER)
    (mean,) = new_tokens(daemon, ["mean"], "read", on)
    (good,) = new_tokens(daemon, ["good"])
    daemon.headers = good
    fill_tasks(daemon, SMALL_TASKS, 100)
    with others(daemon, "/task/1?output=none", good) as idle:
        time.sleep(1)
    memory = daemon.memory()
    with (
        closing(Crowd(daemon, SEARCHERS, path, mean)) as crowd,
        others(daemon, "/task/1?output=none", good) as busy,
    ):
        crowd.go_on(SECONDS, 2)
        # A list of another user is not delayed either.
        assert len(daemon.get("/tasks?limit=2").json()["tasks"]) == 2
    report(f"{crowd.answers} times {path} for {SEARCHERS} with {on}", idle, busy)
    assert calm(idle, busy)
    assert daemon.memory() - memory < FLAT


# -- heads and bodies

JSON = {"Content-Type": "application/json", "Content-Length": "1000000"}
WRONG = {"Authorization": "Bearer pulsar_wrong"}


@pytest.mark.parametrize(
    ("path", "headers", "statuses"),
    [
        ("/site/prod", {}, {401}),
        ("/site/prod", WRONG, {401, 429}),
        ("/task/1/kill", {}, {401}),
        ("/nothing/at/all", {}, {404}),
        ("/tasks", {}, {405}),
        ("/login", {}, {413}),
    ],
)
def test_unauthorised_bodies_need_no_memory(
    start: Start, path: str, headers: dict[str, str], statuses: set[int]
) -> None:
    """The daemon refuses them by the head of the request."""
    daemon = start(*TOKENS)
    (good,) = new_tokens(daemon, ["good"])
    daemon.headers = good
    assert daemon.get("/tasks?limit=1").status == 200
    memory = daemon.memory()
    daemon.forget_peak()
    with ExitStack() as stack, others(daemon, "/tasks?limit=1", good) as busy:
        for _ in range(STRANGERS):
            sock = stack.enter_context(closing(daemon.open_socket()))
            sock.sendall(head("POST", path, {**headers, **JSON}))
            answer = next_answer(sock)
            assert answer.status in statuses
            assert answer.headers["Connection"] == "close"
            sock.setblocking(False)
            with suppress(OSError):
                sock.send(b"x" * 500_000)
        grown = (daemon.peak() - memory) / MIB
    print(f"{STRANGERS} bodies for {path}: memory +{grown:.1f} MiB; {busy}")
    assert grown * MIB < FLAT
    assert daemon.get("/tasks?limit=1").status == 200
    assert "Traceback" not in daemon.log.read_text()


@pytest.mark.parametrize("options", [TOKENS, ("--command", "true")], ids=["auth", "open"])
def test_bodies_sent_at_once_need_no_memory(start: Start, options: tuple[str, ...]) -> None:
    """The clients send whole bodies before the daemon can refuse them."""
    daemon = start(*options)
    assert daemon.get("/tasks?limit=1").status in {200, 401}
    memory = daemon.memory()
    daemon.forget_peak()
    data = head("POST", "/site/prod", JSON) + b"x" * 500_000
    with ExitStack() as stack:
        for _ in range(STRANGERS):
            sock = stack.enter_context(closing(daemon.open_socket()))
            sock.setblocking(False)
            with suppress(OSError):
                sock.send(data)
        wait_for(lambda: daemon.get("/tasks?limit=1").status, "an answer")
        grown = (daemon.peak() - memory) / MIB
    print(f"{STRANGERS} bodies at once, {options}: memory +{grown:.1f} MiB")
    assert grown * MIB < FLAT
    wait_for(lambda: daemon.memory() - memory < FLAT, "the memory to come back")


@pytest.mark.parametrize("line", [b"a%d:b\r\n", b"X%d: " + b"x" * 3000 + b"\r\n"])
def test_endless_heads_need_no_memory(start: Start, line: bytes) -> None:
    """They have many lines, or long ones. Other clients are served meanwhile."""
    daemon = start("--command", "true")
    assert daemon.get("/tasks?limit=1").status == 200
    memory = daemon.memory()
    daemon.forget_peak()
    data = b"GET /tasks HTTP/1.1\r\n" + b"".join(line % n for n in range(90))[:15_000]
    with ExitStack() as stack:
        for _ in range(STRANGERS):
            sock = stack.enter_context(closing(daemon.open_socket()))
            sock.setblocking(False)
            with suppress(OSError):
                sock.send(data)
        assert daemon.get("/tasks?limit=1").status == 200
        grown = (daemon.peak() - memory) / MIB
    print(f"{STRANGERS} heads of {len(data)} bytes: memory +{grown:.1f} MiB")
    assert grown * MIB < FLAT


def test_header_names_of_clients_are_not_cached(start: Start) -> None:
    """Otherwise a client could fill the memory with invented names."""
    daemon = start("--command", "true")
    daemon.get("/tasks?limit=1")
    memory = daemon.memory()
    for number in range(10 * STRANGERS):
        with closing(daemon.open_socket()) as sock:
            sock.sendall(head("GET", "/tasks", {f"x{number}" + "y" * 15_000: "z"}))
            assert next_answer(sock).status == 400
    assert daemon.memory() - memory < FLAT // 2


def test_many_bodies_of_one_caller_leave_room_for_others(start: Start) -> None:
    """Further bodies of that caller get 503 with ``Retry-After``."""
    daemon = start(*TOKENS)
    mean, good = new_tokens(daemon, ["mean", "good"])
    daemon.headers = good
    memory = daemon.memory()
    with ExitStack() as stack:
        socks = []
        for _ in range(30):
            socks.append(stack.enter_context(closing(daemon.open_socket())))
            socks[-1].sendall(head("POST", "/site/prod", {**mean, **JSON}))
            socks[-1].sendall(b" " * 900_000)
        number = daemon.run("site", "prod", "deploy", data="x" * LARGE)
        assert daemon.ended(number)["status"] == "finished"
        refused = [sock for sock in socks if select.select([sock], [], [], 0.2)[0]]
        assert 20 < len(refused) < 30
        for sock in refused:
            answer = next_answer(sock)
            assert answer.status == 503
            assert answer.headers["Retry-After"] == "5"
        grown = (daemon.memory() - memory) / MIB
        print(f"bodies of one caller: memory +{grown:.1f} MiB")
        assert grown * MIB < FLAT
    wait_for(lambda: daemon.memory() - memory < FLAT, "the memory to come back")


def test_unread_streams_need_little_memory(start: Start) -> None:
    """The streams begin with the very first event."""
    daemon = start("--command", "true", *FOREVER)
    fill_tasks(daemon, TASKS, LARGE)
    daemon.get(LIST)
    memory = daemon.memory()
    with ExitStack() as stack:
        for _ in range(STALLED):
            sock = stack.enter_context(closing(socket.socket()))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.settimeout(PATIENCE)
            sock.connect((daemon.host, daemon.port))
            sock.sendall(head("GET", "/events?lastEventId=0-0-0", {}))
            received = 0
            while received < 10_000:
                received += len(sock.recv(4096))
        assert daemon.get("/tasks?limit=1").status == 200
        grown = (daemon.memory() - memory) / MIB
        print(f"{STALLED} streams that nobody reads: memory +{grown:.1f} MiB")
        assert grown * MIB < 2 * FLAT
    wait_for(lambda: daemon.memory() - memory < FLAT, "the memory to come back")
