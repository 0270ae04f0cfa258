"""A real daemon as a child process, and raw HTTP to it without our own client."""

import fcntl
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import termios
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from pathlib import Path
from typing import Any, TypeVar

from tests.integration import zygote
from tests.integration.zygote import PULSAR_API as PULSAR_API  # noqa: PLC0414 - for tests

T = TypeVar("T")
PATIENCE = 60.0
"""Seconds after which `wait_for` gives up. Every test is much faster than that."""

CERTIFICATE = Path(__file__).parents[2] / "ssl" / "pulsar.local.crt"

SHELL = "sh -c 'eval \"$PULSAR_VAR_run\"'"
"""A ``--command`` that runs the variable ``run`` as a line of shell. See `Daemon.sh`."""

ACCOUNT = os.environ.get("PULSAR_RUN_AS")
"""The user that runs all tasks, if set, unless a test chooses accounts itself."""


def wait_for(condition: Callable[[], T], what: str, patience: float = PATIENCE) -> T:
    """Return the value of a condition as soon as it is true."""
    until = time.monotonic() + patience
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < until, f"waited in vain for {what}"
        time.sleep(0.01)


class Answer:
    """An HTTP answer whose body has been read to its end."""

    def __init__(self, response: HTTPResponse) -> None:
        self.status = response.status
        self.headers = response.headers
        self.body = response.read()

    def json(self) -> Any:
        """Return the body as JSON."""
        return json.loads(self.body)


def next_answer(sock: socket.socket) -> Answer:
    """Read the next answer from a connection from which nothing was read before.

    Bytes behind it can be lost. To read several answers keep one `HTTPConnection`.
    """
    response = HTTPResponse(sock)
    try:
        response.begin()
        return Answer(response)
    finally:
        response.close()


def _with_account(account: str, folder: Path) -> Path:
    """Return settings with one account for all tasks, which can enter the folder.

    The account can also write to the folders above it that belong to the test.
    """
    for place in (folder, *folder.parents):
        if place.name.startswith("pytest-of-"):
            place.chmod(0o755)
            break
        place.chmod(0o777)
    settings = folder / "settings.toml"
    settings.write_text(f'[[run-as]]\non = ["*"]\nuser = "{account}"\n')
    return settings


class Daemon:
    """``python -m pulsar_api`` with its own state, on a port that the kernel chose."""

    def __init__(
        self,
        folder: Path,
        *options: str,
        environ: Mapping[str, str] | None = None,
        program: Sequence[str] = zygote.DAEMON,
        trust: Path = CERTIFICATE,
        identity: Path | None = None,  # key and certificate of the clients
        umask: int = -1,
        state: Path | None = None,
    ) -> None:
        self.folder = folder
        self.headers: dict[str, str] = {}
        """Headers of each request, such as its credentials."""
        self.trust = trust
        self.identity = identity
        self.umask = umask
        self.state = state or folder / "state"
        self.log = folder / "daemon.log"
        if ACCOUNT and "--config" not in options:
            options = (*options, "--config", str(_with_account(ACCOUNT, folder)))
        self.environ = dict(os.environ if environ is None else environ)
        port = (
            ()
            if any(o.startswith(("--port", "--listen")) for o in options)
            else (
                "--port",
                "0",
            )
        )
        # A program that a test names is started as users start it.
        self._real = program != zygote.DAEMON
        self.arguments = [*program, "--state-dir", str(self.state), *port, *options]
        self.start()

    def start(self) -> None:
        """Start the daemon, also again, and wait until it serves."""
        begin = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.process = zygote.Popen(
                self.arguments,
                real=self._real,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=self.environ,
                umask=self.umask,
                close_fds=False,  # a test can have opened a socket for it
            )

        def address() -> re.Match[str] | None:
            assert self.process.poll() is None, self.log.read_text()
            text = self.log.read_text()[begin:]
            return re.search(r"listens on (https?)://(\S+):(\d+)", text)

        try:
            found = wait_for(address, "the daemon's address")
            assert found is not None
            self.scheme = found[1]
            self.host, self.port = found[2].strip("[]"), int(found[3])
            self.base = f"{self.scheme}://localhost:{self.port}"
            wait_for(self._serves, "the first answer")
        except BaseException:
            self.kill()  # no caller has a reference to it yet
            raise

    def _serves(self) -> bool:
        return self.get("/tasks?limit=1").status in {200, 401}

    def connect(
        self, timeout: float = PATIENCE, source: str | None = None
    ) -> HTTPConnection:
        """Return a new connection, from one of this machine's loopback addresses."""
        if self.scheme == "http":
            here = None if source is None else (source, 0)
            return HTTPConnection(
                self.host, self.port, timeout=timeout, source_address=here
            )
        context = ssl.create_default_context(cafile=self.trust)
        if self.identity is not None:
            context.load_cert_chain(self.identity)
        return HTTPSConnection("localhost", self.port, timeout=timeout, context=context)

    def request(
        self,
        method: str,
        path: str,
        body: bytes | str | None = None,
        headers: Mapping[str, str] | None = None,
        source: str | None = None,
    ) -> Answer:
        """Send one request on a connection of its own."""
        connection = self.connect(source=source)
        try:
            connection.request(method, path, body, {**self.headers, **(headers or {})})
            return Answer(connection.getresponse())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        """GET a path."""
        return self.request("GET", path, headers=headers)

    def post(self, path: str, value: object = None) -> Answer:
        """POST a value as JSON."""
        body = json.dumps(value)
        return self.request("POST", path, body, {"Content-Type": "application/json"})

    def run(self, app: str, env: str, action: str, **variables: object) -> int:
        """Create a task and return its number."""
        answer = self.post(f"/{app}/{env}", {"action": action, "variables": variables})
        assert answer.status == 200, answer.body
        number: int = answer.json()["taskId"]
        return number

    def sh(self, run: str, env: str = "production", **variables: object) -> int:
        """Create a task that runs a line of shell. The daemon's command must be `SHELL`."""
        return self.run("site", env, "run", run=run, **variables)

    def task(self, number: int) -> dict[str, Any]:
        """Return a task."""
        found: dict[str, Any] = self.get(f"/task/{number}").json()
        return found

    def ended(self, number: int) -> dict[str, Any]:
        """Wait for the end of a task and return it without its output."""
        while True:
            answer = self.get(f"/task/{number}/state?output=none").json()
            if answer["changed"]:
                task: dict[str, Any] = answer["task"]
                return task

    def output_file(self, number: int) -> Path:
        """Return the path of the file with the output of a task."""
        return self.state / "tasks" / str(number) / "output"

    def launcher(self) -> int:
        """Return the process number of the launcher, as soon as it runs."""

        def found() -> int:
            path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
            for child in path.read_text().split():
                with suppress(FileNotFoundError, ProcessLookupError):
                    line = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
                    # The arguments of a shim end in the folder of its task.
                    own = line[6:] == [b""] and not line[5].strip(b" ")
                    if own and Path(os.fsdecode(line[3])).stem == "launcher":
                        return int(child)
            return 0

        return wait_for(found, "a launcher")

    def memory(self) -> int:
        """Return the resident memory of the daemon in bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) * 1024

    def forget_peak(self) -> None:
        """Reset `peak`, so that it counts from now on."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def peak(self) -> int:
        """Return the highest resident memory since `forget_peak`, in bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) * 1024

    def open_socket(
        self, timeout: float = PATIENCE, source: str | None = None
    ) -> socket.socket:
        """Return a new TCP connection on which nothing was sent, not even TLS."""
        here = None if source is None else (source, 0)
        return socket.create_connection((self.host, self.port), timeout, here)

    def has_read(self, sock: socket.socket) -> bool:
        """Return whether the daemon has read all bytes that were sent on a connection.

        The kernel tells it: no byte is on its way, and none waits to be read. The daemon
        handles what it reads at once, before it reads from any later connection.
        """
        left = int.from_bytes(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
        mine = sock.getsockname()[1]
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            _, local, remote, _, queues = line.split()[:5]
            ports = int(local.partition(":")[2], 16), int(remote.partition(":")[2], 16)
            if ports == (self.port, mine):
                return left == 0 and int(queues.partition(":")[2], 16) == 0
        return False

    def kill(self) -> None:
        """Kill the daemon as a power cut would. Its tasks go on."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """Stop the daemon as an operator would, and end the tasks that it left running."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(PATIENCE)
        for lock in self.state.glob("tasks/*/lock"):
            end_shim(lock)
        return code


class Poll:
    """A request that the daemon has read, and whose answer comes later."""

    def __init__(self, daemon: Daemon, path: str) -> None:
        self.connection = daemon.connect()
        self.connection.request("GET", path, headers=daemon.headers)
        self.sock: socket.socket = self.connection.sock
        wait_for(lambda: daemon.has_read(self.sock), f"the daemon to read GET {path}")

    def waits(self) -> bool:
        """Return whether no byte of the answer has come."""
        self.sock.settimeout(0)
        try:
            self.sock.recv(1)
        except (BlockingIOError, ssl.SSLWantReadError):
            return True
        finally:
            self.sock.settimeout(PATIENCE)
        return False

    def close(self) -> None:
        """Disconnect, as a client that stops waiting."""
        self.connection.close()

    def answer(self) -> Answer:
        """Wait for the answer and return it."""
        try:
            return Answer(self.connection.getresponse())
        finally:
            self.connection.close()


def problem(answer: Answer, status: int, field: str | None = None) -> dict[str, Any]:
    """Check that an answer is an error in the documented form, and return it."""
    assert answer.status == status, answer.body
    assert answer.headers["Content-Type"] == "application/problem+json"
    found: dict[str, Any] = answer.json()
    assert found["status"] == status
    assert found["type"].startswith("urn:pulsar-api:problem:")
    assert found["title"]
    assert found["detail"] == found["error"]
    assert found.get("field") == field, found
    return found


def marked(entry: str) -> list[int]:
    """Return the living processes with this ``NAME=value`` in their environment."""
    wanted = entry.encode()

    def has_it(folder: Path) -> bool:
        try:
            return wanted in (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            return False  # it has just ended

    def threads(folder: Path) -> list[Path]:
        try:
            return list((folder / "task").iterdir())
        except OSError:
            return []

    # If its first thread has ended, a process shows its environment at the others only.
    return [
        int(folder.name)
        for folder in Path("/proc").iterdir()
        if folder.name.isdigit() and (has_it(folder) or any(map(has_it, threads(folder))))
    ]


def end_shim(lock: Path, number: int = signal.SIGTERM) -> None:
    """End a task that its test left behind, by the process number in its lock."""
    if shim_lives(lock):
        with suppress(ProcessLookupError):
            os.kill(shim_of(lock.parent), number)


def shim_of(folder: Path) -> int:
    """Return the process number of a task's shim, or 0 if a daemon holds its lock."""
    lock = folder / "lock"
    if not lock.is_file():  # a task can put anything in its place
        return 0
    with lock.open("rb") as file:
        word = (file.read(100).split() or [b""])[0]
    return int(word) if word.isdigit() else 0


def shim_lives(lock: Path) -> bool:
    """Return whether the process of a task's shim exists, even if the task has ended."""
    try:
        line = Path(f"/proc/{shim_of(lock.parent)}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return str(lock.parent).encode() in line


def open_url(url: str) -> bytes:
    """Return the body that a URL answers."""
    with urllib.request.urlopen(url, timeout=PATIENCE) as response:
        data: bytes = response.read()
        return data
