"""Tests that attacks take neither responses nor connections from other clients."""

import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from pulsar_api.network.listener import KEEPALIVE_IDLE
from tests.integration.conftest import Start
from tests.integration.daemon import SHELL, Answer, Daemon, next_answer, problem, wait_for
from tests.integration.latency import Latency

FULL = bool(os.environ.get("PULSAR_HOSTILE"))
"""Whether to attack as hard as the documentation promises: thousands, for a minute."""
SENDERS, READERS, SECONDS = (1000, 200, 60) if FULL else (150, 30, 12)
"""Clients that send heads (as many send bodies); readers; seconds."""
SLOWEST = 0.1
"""Seconds within which 99 of 100 small requests are answered during the attack."""
SIZE = 16_000_000
MIB = 1 << 20
BUFFERS = 512 << 10
"""Bytes that a response may take in the daemon's memory while its client does not read."""

FEW = ("sh", "-c", 'ulimit -n 300; exec "$@"', "sh", sys.executable, "-m", "pulsar_api")
"""A daemon with 44 places for connections: 300 files, less the files for other uses."""
PLACES = 44
SHARE = PLACES // 4


@pytest.fixture
def descriptors() -> Iterator[None]:
    """Let the attackers open a few thousand sockets."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def uncounted() -> dict[str, str]:
    """Return an environment without coverage, which would slow the daemon down."""
    return {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE_")}


def files(daemon: Daemon) -> int:
    """Return how many files the daemon has open."""
    return len(os.listdir(f"/proc/{daemon.process.pid}/fd"))


class Measured:
    """Measurements of an honest client during an attack."""

    def __init__(self, daemon: Daemon, path: str) -> None:
        self.daemon = daemon
        self.path = path
        self.most_files = 0

    def p99(self, seconds: float, others: list[subprocess.Popen[bytes]]) -> float:
        """Return the 99th percentile of response times on one connection, in seconds.

        The measurement ends when the time is over or the other processes have
        ended.
        """
        latency = Latency(self.daemon)
        until = time.monotonic() + seconds

        def get() -> int:
            connection.request("GET", self.path)
            answer = connection.getresponse()
            answer.read()
            return answer.status

        with closing(self.daemon.connect()) as connection:
            while time.monotonic() < until:
                if others and all(other.poll() is not None for other in others):
                    break
                assert latency.of(get) == 200
                self.most_files = max(self.most_files, files(self.daemon))
                time.sleep(0.002)  # a stream of requests, not a second flood
        print(
            f"{latency}; at most {self.most_files} files, "
            f"memory {self.daemon.memory() / MIB:.0f} MiB"
        )
        return latency.p99


@pytest.mark.usefixtures("descriptors")
@pytest.mark.needs("slowhttptest")
def test_slow_clients_disturb_nobody_and_leave_no_open_files(
    start: Start, tmp_path: Path
) -> None:
    """The program slowhttptest sends slow heads and slow bodies, and reads slowly."""
    daemon = start("--command", SHELL, environ=uncounted())
    large = daemon.sh(f"head -c {SIZE} /dev/zero | tr '\\0' x")
    assert daemon.ended(large)["outputSize"] == SIZE
    running = daemon.sh("exec sleep 600")
    wait_for(lambda: daemon.task(running)["status"] == "running", "the task")
    measured = Measured(daemon, f"/task/{running}?output=none")
    idle = measured.p99(3, [])
    usual = files(daemon)
    daemon.forget_peak()
    memory = daemon.memory()
    base = f"http://127.0.0.1:{daemon.port}"
    for_all = ["-l", str(SECONDS), "-r", "500", "-p", "30", "-i", "2"]
    senders = ["-c", str(SENDERS), "-x", "2"]
    # TCP windows of one or two bytes, and a byte every two seconds.
    readers = ["-c", str(READERS), "-w", "1", "-y", "2", "-n", "2", "-z", "1"]
    attacks = {
        "heads": ["-H", *senders, "-u", f"{base}/tasks"],
        "bodies": ["-B", *senders, "-s", "8192", "-u", f"{base}/site/production"],
        "reads": ["-X", *readers, "-u", f"{base}/task/{large}"],
    }
    with ExitStack() as stack:
        attackers = []
        for name, options in attacks.items():
            log = stack.enter_context((tmp_path / name).open("wb"))
            attacker = subprocess.Popen(
                ["slowhttptest", *options, *for_all],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
            stack.callback(attacker.wait)
            stack.callback(attacker.kill)
            attackers.append(attacker)
        busy = measured.p99(SECONDS + 30, attackers)
        # The attack had its full strength, and its own probes were served.
        assert measured.most_files - usual > (2 * SENDERS + READERS) * 0.9
        for name in attacks:
            said = re.sub(r"\x1b\[[0-9;]*m", "", (tmp_path / name).read_text())
            assert "service available" in said
            assert not re.search(r"service available:\s*NO", said), said
        ended = time.monotonic()
    wait_for(lambda: files(daemon) <= usual, "the connections to close")
    print(f"all are closed after {time.monotonic() - ended:.2f} s")
    assert busy < max(SLOWEST, 5 * idle)
    grown = daemon.peak() - memory
    print(f"memory +{grown / MIB:.0f} MiB")
    assert grown < READERS * BUFFERS + 32 * MIB
    assert measured.p99(2, []) < max(SLOWEST, 5 * idle)
    daemon.get(f"/task/{running}/kill")
    daemon.ended(running)
    assert "Traceback" not in daemon.log.read_text()


# -- addresses


def connect_from(daemon: Daemon, host: str) -> HTTPConnection:
    """Return a connection from a given address of 127.0.0.0/8."""
    connection: Any = daemon.connect()
    connection.source_address = (host, 0)  # its type stub lacks the attribute
    connection.connect()
    found: HTTPConnection = connection
    return found


def ask_from(daemon: Daemon, host: str) -> Answer:
    """Send a request from a given address, on a new connection."""
    with closing(connect_from(daemon, host)) as connection:
        connection.request("GET", "/tasks?limit=1")
        return Answer(connection.getresponse())


def ask(connection: HTTPConnection) -> Answer:
    """Send another request on an open connection."""
    connection.request("GET", "/tasks?limit=1")
    return Answer(connection.getresponse())


@pytest.mark.parametrize("tls", [(), ("--dev",)], ids=["http", "tls"])
def test_one_address_can_use_a_quarter_of_the_connections(
    start: Start, tls: tuple[str, ...]
) -> None:
    """The address gets 429 beyond its share.

    It can connect again when it has closed a connection.
    """
    daemon = start("--command", SHELL, *tls, program=FEW)
    with ExitStack() as stack:
        held = []
        for _ in range(SHARE):
            held.append(stack.enter_context(closing(connect_from(daemon, "127.0.0.2"))))
            assert ask(held[-1]).status == 200
        for _ in range(3):
            with closing(connect_from(daemon, "127.0.0.2")) as refused:
                answer = next_answer(refused.sock)
            assert problem(answer, 429)["type"].endswith(":too-many-from-address")
            assert int(answer.headers["Retry-After"] or 0) > 0
        assert ask_from(daemon, "127.0.0.3").status == 200
        here = [stack.enter_context(closing(daemon.connect())) for _ in range(SHARE + 5)]
        assert {ask(connection).status for connection in here} == {200}
        held[0].close()
        wait_for(lambda: _served(daemon, "127.0.0.2"), "a place")
    assert "Traceback" not in daemon.log.read_text()


def _served(daemon: Daemon, host: str) -> bool:
    try:
        return ask_from(daemon, host).status == 200
    except OSError:
        return False  # the daemon closed the connection before the request was sent


def test_too_many_requests_from_one_address_answer_429(start: Start) -> None:
    """The connections stay open, and other addresses are served."""
    daemon = start("--command", SHELL, "--max-requests-per-address", "1")
    with ExitStack() as stack:
        clients = []
        for _ in range(50):
            clients.append(stack.enter_context(closing(connect_from(daemon, "127.0.0.2"))))
            clients[-1].request("GET", "/tasks?limit=1")
        assert ask_from(daemon, "127.0.0.3").status == 200
        assert {daemon.get("/tasks?limit=1").status for _ in range(50)} == {200}
        answers = [Answer(client.getresponse()) for client in clients]
        refused = [answer for answer in answers if answer.status == 429]
        # Five are served at once. A machine that takes a second for a few of them serves
        # more.
        assert len([answer for answer in answers if answer.status == 200]) >= 5
        assert len(refused) > 25
        for answer in refused:
            assert problem(answer, 429)["type"].endswith(":too-many-requests")
            assert answer.headers["Retry-After"] == "1"
        wait_for(lambda: ask(clients[-1]).status == 200, "being served again")


@pytest.mark.parametrize("tls", [(), ("--dev",)], ids=["http", "tls"])
@pytest.mark.parametrize("stalled", [False, True], ids=["idle", "stalled"])
def test_inactive_connections_give_way_to_new_ones(
    start: Start, tls: tuple[str, ...], *, stalled: bool
) -> None:
    """Neither idle clients nor clients that do not read keep others out."""
    daemon = start("--command", SHELL, *tls, program=FEW)
    large = daemon.sh(f"head -c {SIZE} /dev/zero | tr '\\0' x")
    daemon.ended(large)
    wait_for(lambda: files(daemon) < 40, "the connections to close")
    with ExitStack() as stack:
        held = []
        for host in range(2, 6):
            for _ in range(SHARE):
                connection = connect_from(daemon, f"127.0.0.{host}")
                held.append(stack.enter_context(closing(connection)))
                if stalled:
                    connection.request("GET", f"/task/{large}")
                else:
                    assert ask(connection).status == 200
        began = time.monotonic()
        assert not _served(daemon, "127.0.0.9")
        wait_for(lambda: _served(daemon, "127.0.0.9"), "a place")
        # This is sooner than the daemon closes idle connections by itself.
        assert time.monotonic() - began < 50
    assert "Traceback" not in daemon.log.read_text()


def test_keepalive_probes_run_on_waiting_connections(start: Start) -> None:
    """The kernel finds clients that have vanished while they waited for a response."""
    daemon = start("--command", SHELL)
    with closing(daemon.connect()) as connection:
        connection.request("GET", "/tasks/created")
        mine = connection.sock.getsockname()[1]

        def clock() -> float:
            for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
                _, local, remote, _, _, timer = line.split()[:6]
                if (int(local[-4:], 16), int(remote[-4:], 16)) == (daemon.port, mine):
                    kind, left = timer.split(":")
                    return int(left, 16) / os.sysconf("SC_CLK_TCK") if kind == "02" else 0
            return 0

        assert 0 < wait_for(clock, "the clock") <= KEEPALIVE_IDLE
