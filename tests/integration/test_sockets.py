"""Tests that sockets that flood or do not read take no memory or time from others."""

import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.integration import zygote
from tests.integration.conftest import Start
from tests.integration.daemon import PATIENCE, PULSAR_API, SHELL, Daemon, wait_for
from tests.integration.latency import Latency
from tests.integration.rude import KINDS
from tests.integration.sockjs import ByStreaming, ByWebSocket, Transport

FULL = bool(os.environ.get("PULSAR_HOSTILE"))
"""Whether to attack with the numbers that are promised to be borne, for 20 seconds."""
SECONDS, CROWD, SILENT = (20.0, 300, 900) if FULL else (2.0, 60, 100)
"""Seconds of a flood; sockets that do not read; sockets that say nothing."""
SLOWEST = 0.1
"""Seconds within which 99 of 100 small requests are answered meanwhile."""
MIB = 1 << 20
GROWN = 16 * MIB
"""How much the daemon may grow by what comes without credentials, or keep of any attack."""
FREED = 10.0
"""Seconds after an attack within which its memory is given back."""
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def descriptors() -> Iterator[None]:
    """Let the attackers open a thousand sockets."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture(params=[()])
def daemon(start: Start, request: pytest.FixtureRequest) -> Iterator[Daemon]:
    """Return a daemon with authentication, without the slowness of coverage."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE_")}
    options = ("--command", SHELL, "--auth-provider", "tokens", *request.param)
    daemon = start(*options, environ=environ)
    state = ("--state-dir", str(daemon.state))
    made = zygote.run(
        [*PULSAR_API, "token", "create", "ci", "--may", "admin", *state],
        capture_output=True,
        text=True,
        check=True,
    )
    daemon.headers = {"Authorization": f"Bearer {made.stdout.split()[-1]}"}
    yield daemon
    assert "Traceback" not in daemon.log.read_text()


class Watch:
    """What an honest client and the kernel see of the daemon."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        number = daemon.sh("exec sleep 600")
        wait_for(lambda: daemon.task(number)["status"] == "running", "the task")
        self.path = f"/task/{number}?output=none"
        self.task = number
        with attackers(daemon, "pings", 1):
            pass  # whatever the first one imports or opens is there now
        self.idle = self.p99(1.0)
        daemon.forget_peak()
        self.memory = daemon.memory()

    def p99(self, seconds: float) -> float:
        """Ask on one connection for so long; return what 99 of 100 do not exceed."""
        latency = Latency(self.daemon)
        until = time.monotonic() + seconds

        def get() -> int:
            connection.request("GET", self.path, headers=self.daemon.headers)
            answer = connection.getresponse()
            answer.read()
            return answer.status

        with closing(self.daemon.connect()) as connection:
            while time.monotonic() < until or len(latency.times) < 20:
                assert latency.of(get) == 200
                time.sleep(0.002)  # a stream of requests, not a flood of its own
        print(f"{latency}; memory {self.daemon.memory() / MIB:.1f} MiB")
        return latency.p99

    @property
    def grown(self) -> int:
        """How much more memory the daemon has had than at the begin."""
        return self.daemon.peak() - self.memory

    def check_rest(self) -> None:
        """Check that what the attack took is given back in time."""
        began = time.monotonic()
        wait_for(lambda: self.daemon.memory() < self.memory + GROWN, "memory", FREED)
        print(
            f"after {time.monotonic() - began:.1f} s {self.daemon.memory() / MIB:.1f} MiB"
        )
        self.daemon.post(f"/task/{self.task}/kill")
        self.daemon.ended(self.task)


@contextmanager
def attackers(daemon: Daemon, kind: str, count: int, header: str = "") -> Iterator[None]:
    """Attack; see `tests.integration.rude`."""
    command = [sys.executable, "-m", "tests.integration.rude", str(daemon.port), kind]
    command += [str(count), "--header", header]
    command += ["--tls"] if daemon.scheme == "https" else []
    with zygote.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield
            counts = json.loads(process.communicate(timeout=PATIENCE)[0])
            print(f"{kind}: {counts}")
        finally:
            process.kill()


FLOODS: list[tuple[tuple[str, ...], str]] = [
    ((), kind) for kind in KINDS if kind != "nothing"
]
FLOODS += [(("--dev",), "pings"), (("--dev",), "fragments")]


@pytest.mark.parametrize(
    ("daemon", "kind"),
    FLOODS,
    ids=[f"{kind}-{'tls' if options else 'http'}" for options, kind in FLOODS],
    indirect=["daemon"],
)
def test_a_flooding_socket_delays_nobody(daemon: Daemon, kind: str) -> None:
    """It sends pings, endless messages or tiny frames, without credentials."""
    watch = Watch(daemon)
    with attackers(daemon, kind, 1):
        busy = watch.p99(SECONDS)
    print(f"memory +{watch.grown / MIB:.1f} MiB")
    assert watch.grown < GROWN
    assert busy < max(SLOWEST, 5 * watch.idle)
    watch.check_rest()


def test_silent_sockets_need_little_memory(daemon: Daemon) -> None:
    """The daemon waits for their credentials."""
    watch = Watch(daemon)
    with attackers(daemon, "nothing", SILENT):
        busy = watch.p99(SECONDS)
    print(f"memory +{watch.grown / MIB:.1f} MiB")
    assert watch.grown < GROWN
    assert busy < max(SLOWEST, 5 * watch.idle)
    watch.check_rest()


TEXTS = {
    "text": "yes 0123456789abcde | head -c 1100000",
    "control": "head -c 1100000 /dev/zero | tr '\\0' '\\1'",
}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("transport", [ByWebSocket, ByStreaming])
def test_sockets_that_do_not_read_delay_nobody(
    daemon: Daemon, transport: type[Transport], text: str
) -> None:
    """A task has printed much. The daemon makes the text once for all sockets."""
    watch = Watch(daemon)
    header = f"Authorization: {daemon.headers['Authorization']}"
    with (
        attackers(daemon, "nothing", CROWD, header),
        transport(daemon, daemon.headers) as honest,
    ):
        heard: list[float] = []

        def listen() -> None:
            honest.until_close(number)
            heard.append(time.monotonic())

        began = time.monotonic()
        number = daemon.sh(TEXTS[text])
        listener = threading.Thread(target=listen)
        listener.start()
        busy = watch.p99(SECONDS)
        listener.join()
        print(f"another socket heard the end after {heard[0] - began:.2f} s")
    print(f"memory +{watch.grown / MIB:.1f} MiB")
    assert busy < max(SLOWEST, 5 * watch.idle)
    # Each socket can have some unread pieces, and is an object itself.
    assert watch.grown < CROWD * 64 * 1024 + GROWN
    watch.check_rest()
