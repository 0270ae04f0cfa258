"""Much output, many lines and many clients must not cost the daemon memory or speed."""

import hashlib
import json
import os
import resource
import selectors
import shlex
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from treq.testing import StubTreq
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from pulsar_api.auth.audit import AuditLog
from pulsar_api.output.files import Output
from pulsar_api.shim import shim
from pulsar_api.tasks.commands import Commands
from pulsar_api.tasks.interfaces import Bounds
from pulsar_api.tasks.model import TaskSpec
from pulsar_api.tasks.presets import Template
from pulsar_api.tasks.queue import Limits
from pulsar_api.tasks.service import TaskService
from pulsar_api.web.api.tasks import TaskAPI
from pulsar_api.web.authentication import Access
from pulsar_api.web.origin import Origins
from tests.fakes import FakeExecutor, MemoryStore, steady_clock
from tests.integration.conftest import Start
from tests.integration.daemon import PATIENCE, SHELL, Daemon, wait_for
from tests.integration.latency import Latency

MIB = 1 << 20
MANY = 1000
SLOWEST = 0.05
"""Seconds in which 99 of 100 small requests must be answered during a flood."""
FLOOD = 180.0
"""Seconds after which a flood must be over. An idle machine needs a tenth of it."""


@pytest.fixture
def daemon(start: Start) -> Daemon:
    """Return a daemon that runs lines of shell, at its usual speed.

    Measuring the coverage would make it several times slower.
    """
    environ = {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE_")}
    return start("--command", SHELL, environ=environ)


def python(folder: Path, text: str, *arguments: str) -> str:
    """Write a Python script and return the line of shell that runs it."""
    path = folder / "writer.py"
    path.write_text(text)
    return "exec " + shlex.join([sys.executable, "-I", "-S", str(path), *arguments])


def ask(daemon: Daemon, number: int, go_on: Callable[[], bool]) -> Latency:
    """Request a task again and again on one connection, and return the response times."""
    latency = Latency(daemon)

    def get() -> int:
        connection.request("GET", f"/task/{number}?output=none")
        answer = connection.getresponse()
        answer.read()
        return answer.status

    with closing(daemon.connect()) as connection:
        while go_on():
            assert latency.of(get) == 200
            # A continuous flood of requests would disturb the daemon itself.
            time.sleep(0.001)
    return latency


def flood(daemon: Daemon, run: str, what: str) -> int:
    """Run a task that prints much, watch the daemon meanwhile, and return its number."""
    other = daemon.sh("exec sleep 300")
    wait_for(lambda: daemon.task(other)["status"] == "running", "the other task")
    # The time of a small request on this machine while the daemon is idle.
    left = iter(range(500))
    idle = ask(daemon, other, lambda: next(left, None) is not None)
    daemon.forget_peak()
    memory = daemon.memory()
    begin = time.monotonic()
    number = daemon.sh(run)
    result = daemon.output_file(number).with_name("exit")
    busy = ask(
        daemon,
        other,
        lambda: not result.exists() and time.monotonic() < begin + FLOOD,
    )
    took = time.monotonic() - begin
    ended = daemon.ended(number)
    assert (ended["status"], ended["reason"]) == ("finished", None)
    assert ended["outputSize"] == daemon.output_file(number).stat().st_size
    grown = daemon.peak() - memory
    print(
        f"{what}: {took:.1f} s, memory +{grown / MIB:.1f} MiB; meanwhile {busy} "
        f"(idle {idle.p99 * 1e3:.1f})"
    )
    daemon.get(f"/task/{other}/kill")
    daemon.ended(other)
    assert grown < 32 * MIB
    # If requests are slow on an idle daemon, the bound is higher.
    assert busy.p99 < max(SLOWEST, 5 * idle.p99)
    return number


def streams(folder: Path) -> dict[int, str]:
    """Return the SHA-256 of each stream of a task, which its index separates."""
    found = {shim.STDOUT: hashlib.sha256(), shim.STDERR: hashlib.sha256()}
    begin = 0
    with (folder / "output").open("rb") as file:
        for record in Output(folder).records():
            if record.code in found:
                found[record.code].update(file.read(record.number - begin))
                begin = record.number
        assert file.read() == b""
    return {code: digest.hexdigest() for code, digest in found.items()}


@pytest.mark.long
def test_gigabyte_without_a_line_end_is_kept(daemon: Daemon, tmp_path: Path) -> None:
    """Meanwhile the daemon does not grow, and other requests are fast."""
    run = python(
        tmp_path,
        """
import os
for number in range(1000):
    data = b"%08d" % number * 125000
    while data:
        data = data[os.write(1, data):]
""",
    )
    number = flood(daemon, run, "1 GB without a line end")
    expected = hashlib.sha256()
    for block in range(1000):
        expected.update(b"%08d" % block * 125000)
    path = daemon.output_file(number)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256")
    path.unlink()
    assert found.hexdigest() == expected.hexdigest()


@pytest.mark.long
def test_million_lines_are_kept(daemon: Daemon, tmp_path: Path) -> None:
    """Most are written one by one, on both streams in turn. Other requests are fast."""
    run = python(
        tmp_path,
        """
import os, sys
for number in range(200000):
    sys.stdout.write("line %d\\n" % number)
sys.stdout.flush()
for number in range(200000, 1000000):
    os.write(1 + number % 2, b"line %d\\n" % number)
""",
    )
    number = flood(daemon, run, "1,000,000 lines")
    wanted = {shim.STDOUT: hashlib.sha256(), shim.STDERR: hashlib.sha256()}
    for line in range(1_000_000):
        odd = line >= 200_000 and line % 2
        wanted[shim.STDERR if odd else shim.STDOUT].update(b"line %d\n" % line)
    found = streams(daemon.output_file(number).parent)
    assert found == {code: digest.hexdigest() for code, digest in wanted.items()}


def test_long_output_is_sent_in_constant_memory(daemon: Daemon, tmp_path: Path) -> None:
    """The answer has 64 MiB as JSON, and the client reads it slowly at first."""
    text = "0123456789abcde\n"
    run = python(
        tmp_path, f"import os\nfor _ in range(64): os.write(1, {text!r}.encode() * 65536)"
    )
    number = daemon.sh(run)
    assert daemon.ended(number)["outputSize"] == 64 * MIB
    daemon.forget_peak()
    memory = daemon.memory()
    with closing(daemon.connect()) as connection:
        connection.request("GET", f"/task/{number}")
        answer = connection.getresponse()
        head = answer.read(1000)
        # While this client does not read, the daemon answers others.
        ask(daemon, number, iter([True] * 100 + [False]).__next__)
        task = json.loads(head + answer.read())
    daemon.output_file(number).unlink()  # pytest keeps the folders of the last tests
    assert task["output"] == text * (4 * MIB)
    grown = daemon.peak() - memory
    print(f"64 MiB as JSON: memory +{grown / MIB:.1f} MiB")
    assert grown < 32 * MIB


# -- clients


@pytest.fixture
def descriptors() -> Iterator[None]:
    """Let this process open a few thousand sockets."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4 * MANY)), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def many_polls(daemon: Daemon, path: str) -> Iterator[list[socket.socket]]:
    """Yield a thousand connections, each with a request that the daemon has read."""
    request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    with ExitStack() as stack:
        opened = []
        for _ in range(MANY):
            opened.append(stack.enter_context(daemon.open_socket()))
            opened[-1].sendall(request)
        wait_until_read(daemon, opened)
        yield opened


def wait_until_read(daemon: Daemon, opened: list[socket.socket]) -> None:
    """Wait until the daemon has read all bytes on all these connections."""
    mine = {sock.getsockname()[1] for sock in opened}

    def all_read() -> bool:
        read = set()
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            _, local, remote, _, queues = line.split()[:5]
            if int(local[-4:], 16) == daemon.port and queues[-8:] == "0" * 8:
                read.add(int(remote[-4:], 16))
        return mine <= read

    wait_for(all_read, "the daemon to read all requests")
    # With this answer, the reactor's iteration that read the last bytes is over.
    daemon.get("/tasks?limit=1")


def read_all(opened: list[socket.socket]) -> list[tuple[float, bytes]]:
    """Read an answer on each connection. Return the times of completion and the bodies."""
    answers: dict[socket.socket, bytes] = dict.fromkeys(opened, b"")
    done: list[tuple[float, bytes]] = []
    until = time.monotonic() + PATIENCE
    with selectors.DefaultSelector() as selector:
        for sock in opened:
            selector.register(sock, selectors.EVENT_READ, sock)
        while len(done) < len(opened):
            assert time.monotonic() < until, f"only {len(done)} answers"
            for key, _ in selector.select(1):
                sock = key.data
                data = sock.recv(1 << 16)
                assert data, "the daemon hung up"
                answers[sock] += data
                head, _, body = answers[sock].partition(b"\r\n\r\n")
                length = head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]
                if length and len(body) == int(length):
                    done.append((time.time(), body))
                    selector.unregister(sock)
    return done


def a_talker(daemon: Daemon, tmp_path: Path) -> tuple[int, Path]:
    """Start a task that prints a line as soon as a file exists, and then runs on."""
    go = tmp_path / "go"
    wait = f"while ! [ -e {shlex.quote(str(go))} ]; do sleep 0.01; done"
    number = daemon.sh(f"echo begin; {wait}; echo line; exec sleep 300")
    wait_for(lambda: daemon.task(number)["output"] == "begin\n", "the first line")
    return number, go


@pytest.mark.usefixtures("descriptors")
def test_one_line_answers_a_thousand_long_polls(daemon: Daemon, tmp_path: Path) -> None:
    """Each answer has the line, and the task runs on."""
    number, go = a_talker(daemon, tmp_path)
    version = daemon.task(number)["version"]
    memory = daemon.memory()
    with many_polls(daemon, f"/task/{number}/output?since={version}&offset=6") as opened:
        waiting = daemon.memory()
        go.touch()
        answers = read_all(opened)
    for _, body in answers:
        value = json.loads(body)
        assert (value["changed"], value["nextOffset"]) == (True, 11)
        assert value["task"]["output"] == "line\n"
        assert value["task"]["status"] == "running"
    printed = daemon.output_file(number).stat().st_mtime
    print(
        f"{MANY} long-polls: {(waiting - memory) / MANY / 1024:.1f} KiB each; answered "
        f"{(answers[0][0] - printed) * 1e3:.0f} to {(answers[-1][0] - printed) * 1e3:.0f}"
        " ms after the line"
    )
    daemon.get(f"/task/{number}/kill")
    daemon.ended(number)


@pytest.mark.usefixtures("descriptors")
def test_thousand_disconnected_clients_leave_nothing(
    daemon: Daemon, tmp_path: Path
) -> None:
    """The daemon closes their connections, logs nothing, and does not grow."""
    number, go = a_talker(daemon, tmp_path)
    folder = f"/proc/{daemon.process.pid}/fd"
    before = len(os.listdir(folder))
    for round_ in range(3):
        memory = daemon.memory()
        with many_polls(daemon, f"/task/{number}/output"):
            assert len(os.listdir(folder)) > MANY
        wait_for(lambda: len(os.listdir(folder)) <= before, "the connections to close")
        print(f"round {round_}: memory {(daemon.memory() - memory) / MIB:+.1f} MiB")
    # Python reuses memory that it has freed, so only a leak grows in the last round.
    assert daemon.memory() - memory < 4 * MIB
    go.touch()
    wait_for(lambda: "line" in daemon.task(number)["output"], "the line")
    log = daemon.log.read_text()
    assert "Traceback" not in log
    assert "rror" not in log
    daemon.get(f"/task/{number}/kill")
    daemon.ended(number)


class Waiters:
    """A thousand requests for one task to an API in memory, without sockets."""

    def __init__(self, folder: Path) -> None:
        self.clock = Clock()
        self.executor = FakeExecutor(self.clock)
        limits = Limits(Bounds(10))
        self.service = TaskService(
            MemoryStore(),
            self.executor,
            self.clock,
            steady_clock(self.clock),
            self.commands,
            limits,
        )
        origins = Origins("https://pulsar.example")
        audit = AuditLog(folder / "audit.log", lambda: 0.0)
        access = Access(self.service, audit, origins, self.clock)
        self.api = TaskAPI(access, folder, self.clock)
        self.client: Any = StubTreq(self.api.app.resource())
        Deferred.fromCoroutine(self.service.start())
        created = Deferred.fromCoroutine(
            self.service.create(TaskSpec("site", "production", "deploy"))
        )
        self.task: Any = created.result
        self.executor.run(1).start()

    async def commands(self) -> Commands:
        return Commands(Template(("true",)), {})

    def poll(self, path: str) -> list[Deferred[object]]:
        """Send the requests, and return their answers."""
        answers = [self.client.get(f"https://localhost{path}") for _ in range(MANY)]
        self.client.flush()
        return answers

    @property
    def waiting(self) -> tuple[int, int, int]:
        """The numbers of waiters for output, for the end, and for a new task."""
        return (
            self.task.changes.waiting,
            self.task.end.waiting,
            self.service.created.waiting,
        )

    @property
    def calls(self) -> int:
        """The number of delayed calls, without the one for the next retention."""
        return len(self.clock.getDelayedCalls()) - 1

    def end(self) -> None:
        """End the task, and run everything that this causes."""
        self.executor.run(1).end(0)
        for _ in range(MANY // 50):
            self.clock.advance(0)
            self.client.flush()


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/task/1/output", 0), ("/task/1/state", 1), ("/tasks/created", 2)],
)
def test_abandoned_long_polls_leave_no_waiter(tmp_path: Path, path: str, kind: int) -> None:
    """No delayed call is left either."""
    waiters = Waiters(tmp_path)
    answers = waiters.poll(path)
    assert waiters.waiting[kind] == MANY
    assert waiters.calls == MANY
    for answer in answers:
        answer.addErrback(lambda _: None)
        answer.cancel()
    waiters.client.flush()
    assert waiters.waiting == (0, 0, 0)
    assert waiters.calls == 0
    waiters.end()


@pytest.mark.parametrize("path", ["/task/1/output", "/task/1/state", "/tasks/created"])
def test_timed_out_long_polls_leave_no_waiter(tmp_path: Path, path: str) -> None:
    """The daemon has answered all of them, and no delayed call is left."""
    waiters = Waiters(tmp_path)
    answers = waiters.poll(path)
    waiters.clock.advance(30)
    waiters.client.flush()
    assert all(answer.called for answer in answers)
    assert waiters.waiting == (0, 0, 0)
    assert waiters.calls == 0
    waiters.end()


@pytest.mark.parametrize("half", [0, 1])
def test_long_polls_abandoned_during_a_wakeup_leave_no_waiter(
    tmp_path: Path, half: int
) -> None:
    """A thousand are woken in slices, and half of them give up after the first slice."""
    waiters = Waiters(tmp_path)
    answers = waiters.poll("/task/1/output")
    waiters.executor.run(1).end(3)
    waiters.client.flush()
    for answer in answers[half::2]:
        answer.addErrback(lambda _: None)
        answer.cancel()
    waiters.end()
    assert all(answer.called for answer in answers)
    assert waiters.waiting == (0, 0, 0)
    assert waiters.calls == 0
