"""The Python client with a real daemon, which can die at any moment."""

import os
import random
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread

from pulsar_api.client import Client, Refused, Unreachable
from tests.integration.conftest import Start
from tests.integration.daemon import CERTIFICATE, PATIENCE, SHELL, Daemon, wait_for
from tests.integration.test_follow import TALKER
from tests.integration.test_restart import streams

CUTS = int(os.environ.get("PULSAR_CUTS", "40"))


@pytest.fixture
def daemon(returning: Daemon) -> Daemon:
    """Return a daemon that runs lines of shell."""
    return returning


def client_of(daemon: Daemon, **more: Any) -> Client:
    """Return a client of a daemon."""
    return Client(reactor, f"{daemon.scheme}://localhost:{daemon.port}", **more)


async def test_client_creates_follows_and_finds_a_task(daemon: Daemon) -> None:
    """It follows both streams, and waits for the end."""
    client = client_of(daemon)
    run = "echo out; echo ä >&2; exit 3"
    task = await client.create("site", "production", "run", {"run": run})
    assert (task.id, task.data["app"]) == (1, "site")
    pieces = [piece async for piece in client.follow(task.id)]
    assert [(p.stream, p.offset, p.text) for p in pieces] == [
        ("stdout", 0, "out\n"),
        ("stderr", 4, "ä\n"),
    ]
    ended = await client.wait(task.id)
    assert (ended.status, ended.exit_code, ended.ended) == ("failed", 3, True)
    assert (await client.get(task.id, "full")).data["output"] == "out\nä\n"
    assert [found.id for found in await client.tasks(app="site", status="failed")] == [1]
    assert await client.tasks(app="other") == []
    kinds = [event.kind async for event in client.events(task.id)]
    assert kinds == ["output", "output", "end"]
    assert [p.text async for p in client.follow(task.id, 4)] == ["ä\n"]
    await client.close()


async def test_kill_ends_the_task(daemon: Daemon) -> None:
    """Another kill after the end changes nothing."""
    client = client_of(daemon)
    task = await client.create("site", "production", "run", {"run": "exec sleep 60"})
    await client.kill(task.id)
    assert (await client.wait(task.id)).status == "killed"
    assert (await client.kill(task.id)).status == "killed"
    await client.close()


async def test_refused_request_raises_refused_with_a_reason(daemon: Daemon) -> None:
    """Programs read the type, people the sentence."""
    client = client_of(daemon)
    with pytest.raises(Refused) as caught:
        await client.get(99)
    assert (caught.value.status, caught.value.kind) == (404, "unknown-task")
    assert str(caught.value) == "There is no task 99."
    with pytest.raises(Refused, match="app"):
        await client.create("-x", "production", "run")
    await client.create("site", "prod", "run", {"run": "true"}, key="same")
    with pytest.raises(Refused, match="Idempotency-Key"):
        await client.create("site", "prod", "run", {"run": "false"}, key="same")
    with pytest.raises(Refused):
        async for _ in client.follow(99):
            pass
    await client.close()


@pytest.fixture
def other_server(tmp_path: Path) -> Iterator[int]:
    """Return the port of a web server that is no daemon."""
    program = "import http.server as s; s.test(s.SimpleHTTPRequestHandler, port=0)"
    with subprocess.Popen(
        [sys.executable, "-u", "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=tmp_path,
        text=True,
    ) as other:
        assert other.stdout is not None
        yield int(other.stdout.readline().split("port ")[1].split()[0])
        other.kill()


async def test_unreachable_daemon_raises_unreachable_with_a_reason(
    daemon: Daemon, other_server: int
) -> None:
    """No server listens, another one answers, or the URL is invalid."""
    daemon.kill()
    client = client_of(daemon, patience=0.3)
    with pytest.raises(Unreachable, match="refused"):
        await client.get(1)
    daemon.start()
    await client.close()
    for url in ("nonsense", "http://", "ftp://localhost/"):
        with pytest.raises(Unreachable):
            await Client(reactor, url, patience=0).get(1)
    stranger = Client(reactor, f"http://127.0.0.1:{other_server}", patience=0)
    with pytest.raises(Unreachable, match="not pulsar-api"):
        await stranger.get(1)
    await stranger.close()


async def test_client_checks_the_certificate(start: Start) -> None:
    """It trusts the authorities of the system, or those of a file."""
    daemon = start("--dev", "--command", SHELL)
    good = client_of(daemon, ca_file=CERTIFICATE)
    assert await good.tasks() == []
    await good.close()
    bad = client_of(daemon)
    with pytest.raises(Unreachable, match="TLS"):
        await bad.tasks()
    await bad.close()
    with pytest.raises(Unreachable, match="no-such-file"):
        client_of(daemon, ca_file=Path("no-such-file"))


async def test_repeated_post_starts_one_task(daemon: Daemon) -> None:
    """The daemon dies in the middle of each POST, and the client repeats it."""
    client = client_of(daemon)
    await client.tasks()
    chance = random.Random(3)
    for n in range(1, 6):
        made = Deferred.fromCoroutine(client.create("a", "b", "run", {"run": "exit 3"}))
        await deferLater(reactor, chance.uniform(0, 0.01))
        daemon.kill()
        await deferToThread(daemon.start)
        task = await made
        assert (await client.wait(task.id)).exit_code == 3
        assert [found.id for found in await client.tasks()] == list(range(n, 0, -1))
    await client.close()


def grown(path: Path, size: int) -> None:
    """Wait until a file is larger than ``size``."""
    wait_for(lambda: path.stat().st_size > size, "more output")


async def test_follow_resumes_at_any_offset(daemon: Daemon, tmp_path: Path) -> None:
    """The caller stops at random pieces, and the daemon is killed now and then."""
    script, stop = tmp_path / "talker.py", tmp_path / "stop"
    script.write_text(TALKER)
    client = client_of(daemon)
    run = f"exec {sys.executable} -IS {script} {stop}"
    task = await client.create("site", "production", "run", {"run": run})
    chance = random.Random(5)
    found: list[str] = []
    offset = cuts = 0
    while True:
        until = chance.randrange(1, 4) if cuts < CUTS else sys.maxsize
        async for piece in client.follow(task.id, offset):
            assert piece.offset == offset
            found.append(piece.text)
            offset += len(piece.text.encode())
            until -= 1
            if until == 0:
                break
        else:
            break
        cuts += 1
        if cuts % (CUTS // 4) == 0:
            daemon.kill()
            await deferToThread(daemon.start)
        if cuts == CUTS:
            # The last call then gets more than the last words of the task.
            await deferToThread(grown, daemon.output_file(task.id), offset)
            stop.touch()
    assert (await client.wait(task.id)).exit_code == 7
    assert "".join(found).encode() == daemon.output_file(task.id).read_bytes()
    print(f"{cuts} cuts, {offset} bytes")
    await client.close()


class Scissors:
    """A proxy between client and daemon that cuts connections at random moments."""

    def __init__(self, daemon: Daemon, chance: random.Random) -> None:
        self.daemon = daemon
        self.chance = chance
        self.cuts = 0
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listening.getsockname()[1]
        Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client = self.listening.accept()[0]
            except OSError:
                return
            Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        left = self.chance.randrange(200, 6000) if self.cuts < CUTS else sys.maxsize
        with client, suppress(OSError), self.daemon.open_socket() as server:
            pairs = {client: server, server: client}
            while True:
                for sock in select.select(list(pairs), [], [])[0]:
                    data = sock.recv(min(left, 4096))
                    if not data:
                        return
                    pairs[sock].sendall(data)
                    left -= len(data) if sock is server else 0
                    if left <= 0:
                        self.cuts += 1
                        return

    def close(self) -> None:
        """Accept no more connections."""
        self.listening.close()


def talk(daemon: Daemon, folder: Path) -> tuple[int, Path]:
    """Start a task that prints until a file exists."""
    script, stop = folder / "talker.py", folder / "stop"
    script.write_text(TALKER)
    return daemon.sh(f"exec {sys.executable} -IS {script} {stop}"), stop


def until_cut(scissors: Scissors, daemon: Daemon, stop: Path) -> None:
    """Kill the daemon now and then until enough connections were cut, then end the task."""
    for part in (1, 2, 3):
        wait_for(lambda p=part: scissors.cuts >= CUTS * p / 4, "cuts", 300)  # type: ignore[misc]
        daemon.kill()
        daemon.start()
    wait_for(lambda: scissors.cuts >= CUTS, "all cuts", 300)
    stop.touch()


async def test_client_hides_broken_connections(daemon: Daemon, tmp_path: Path) -> None:
    """One call of ``follow`` returns all output, even if the daemon is killed."""
    number, stop = talk(daemon, tmp_path)
    scissors = Scissors(daemon, random.Random(8))
    client = Client(reactor, f"http://127.0.0.1:{scissors.port}")
    cutting = deferToThread(until_cut, scissors, daemon, stop)
    found = [piece async for piece in client.follow(number)]
    await cutting
    assert (await client.wait(number)).exit_code == 7
    text = "".join(piece.text for piece in found)
    assert text.encode() == daemon.output_file(number).read_bytes()
    print(f"client: {scissors.cuts} cuts, {len(text)} characters")
    scissors.close()
    await client.close()


def test_command_line_hides_broken_connections(daemon: Daemon, tmp_path: Path) -> None:
    """Both streams are complete, and the exit status is that of the task."""
    number, stop = talk(daemon, tmp_path)
    scissors = Scissors(daemon, random.Random(9))
    program = "from pulsar_api.cli.main import main; main()"
    url = f"--url=http://127.0.0.1:{scissors.port}"
    command = [sys.executable, "-c", program, "log", "--follow", str(number), url]
    paths = tmp_path / "out", tmp_path / "err"
    with (
        paths[0].open("wb") as stdout,
        paths[1].open("wb") as stderr,
        subprocess.Popen(command, stdout=stdout, stderr=stderr) as following,
    ):
        try:
            until_cut(scissors, daemon, stop)
            assert following.wait(PATIENCE) == 7
        finally:
            following.kill()
    out, err = (path.read_bytes() for path in paths)
    expected = streams(daemon, number)
    last = f"pulsar-api: task {number} failed, exit code 7\n".encode()
    assert (out, err) == (expected[0], expected[1] + last)
    print(f"command line: {scissors.cuts} cuts, {len(out) + len(err)} bytes")
    scissors.close()


async def test_follow_continues_over_restarts(daemon: Daemon, tmp_path: Path) -> None:
    """The calling program does nothing for it."""
    go = tmp_path / "go"
    os.mkfifo(go)
    client = client_of(daemon)
    run = f"echo one; read x < {go}; echo two; exit 3"
    task = await client.create("site", "production", "run", {"run": run})
    found: list[str] = []
    async for piece in client.follow(task.id):
        found.append(piece.text)
        if len(found) == 1:
            for _ in range(2):
                daemon.kill()
                await deferToThread(daemon.start)
            await deferToThread(go.write_text, "go\n")
    assert found == ["one\n", "two\n"]
    await client.close()


class Later:
    """The reactor, with a clock that can be advanced."""

    def __init__(self) -> None:
        self.seconds_ahead = 0.0

    def seconds(self) -> float:
        """Return the time of the reactor plus ``seconds_ahead``."""
        return float(reactor.seconds()) + self.seconds_ahead

    def __getattr__(self, name: str) -> Any:
        return getattr(reactor, name)


async def test_patience_begins_with_the_first_failure(
    daemon: Daemon, tmp_path: Path
) -> None:
    """Patience counts from the failure, not from the last line of a silent task."""
    go = tmp_path / "go"
    os.mkfifo(go)
    later = Later()
    client = Client(later, f"{daemon.scheme}://localhost:{daemon.port}", patience=PATIENCE)
    run = f"echo one; read x < {go}; echo two; exit 3"
    task = await client.create("a", "b", "run", {"run": run})
    found: list[str] = []
    async for piece in client.follow(task.id):
        found.append(piece.text)
        if len(found) == 1:
            later.seconds_ahead += 100 * PATIENCE
            daemon.kill()
            await deferToThread(daemon.start)
            await deferToThread(go.write_text, "go\n")
    assert found == ["one\n", "two\n"]
    assert (await client.wait(task.id)).exit_code == 3
    await client.close()


async def test_cancelled_call_ends_at_once(daemon: Daemon) -> None:
    """The client does not repeat a cancelled request."""
    client = client_of(daemon)
    task = await client.create("a", "b", "run", {"run": "echo x; exec sleep 60"})

    async def follow() -> None:
        async for _ in client.follow(task.id):
            pass

    for coroutine in (client.wait(task.id), follow()):
        waiting = Deferred.fromCoroutine(coroutine)
        await deferLater(reactor, 0.3)
        waiting.cancel()
        with pytest.raises(CancelledError):
            await waiting
    await client.kill(task.id)
    await client.wait(task.id)
    await client.close()
