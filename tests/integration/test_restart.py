"""A daemon that dies, is stopped or is replaced in the middle of everything.

``PULSAR_RESTARTS=100 pytest -s tests/integration/test_restart.py`` prints the figures of a
longer run than the usual one.
"""

import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from http.client import HTTPException
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

import pulsar_api
from pulsar_api.output.files import Output
from pulsar_api.shim.shim import STDERR, STDOUT
from tests.integration.conftest import Script, Start
from tests.integration.daemon import SHELL, Daemon, Poll, wait_for

TIMES = int(os.environ.get("PULSAR_RESTARTS", "10"))

# Prints numbered lines on both streams, refuses to run twice, exits with 7.
COUNTER = f"""#!{sys.executable} -IS
import os, sys, time
folder, lines = os.environ["PULSAR_VAR_folder"], int(os.environ["PULSAR_VAR_lines"])
marker = os.path.join(folder, "started-" + os.environ["PULSAR_TASK_ID"])
os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
for n in range(lines):
    os.write(1 + n % 2, b"%06d\\n" % n)
    if n % 20 == 0:
        time.sleep(0.01)
sys.exit(7)
"""


def follow(daemon: Daemon, number: int, into: list[str]) -> None:
    """Follow a task to its end by offsets, over restarts of the daemon."""
    offset = version = 0
    while True:
        try:
            path = f"/task/{number}/output?since={version}&offset={offset}"
            answer = daemon.get(path).json()
        except (OSError, HTTPException, json.JSONDecodeError):
            time.sleep(0.005)  # the daemon is away; the port stays the same
            continue
        if answer.get("status") == 503 or not answer.get("changed", False):
            continue
        task = answer["task"]
        assert task.get("outputOffset", 0) == offset
        into.append(task["output"])
        offset, version = answer["nextOffset"], task["version"]
        if task["status"] not in {"created", "running"}:
            return


def streams(daemon: Daemon, number: int) -> tuple[bytes, bytes]:
    """Return the bytes of both streams by the index."""
    output = Output(daemon.output_file(number).parent)
    found = {STDOUT: b"", STDERR: b""}
    start = 0
    for record in output.records():
        if record.code in found:
            found[record.code] += b"".join(output.pieces(start, record.number))
            start = record.number
    return found[STDOUT], found[STDERR]


def expected(lines: int, stream: int) -> bytes:
    """Return the expected bytes of one stream of the counter."""
    return b"".join(b"%06d\n" % n for n in range(stream, lines, 2))


@pytest.fixture
def fixed(start: Start, repo: Path, script: Script) -> Daemon:
    """Return a daemon that keeps its port over restarts."""
    script("count", COUNTER)
    options = ("--command=scripts", f"--config-repo={repo}", "--kill-grace=1")
    daemon = start(*options)
    at = daemon.arguments.index("--port") + 1
    daemon.arguments[at] = str(daemon.port)
    return daemon


def check(daemon: Daemon, number: int, lines: int, shown: list[str]) -> None:
    """Check the status, both streams and the followed output of a task."""
    task = daemon.ended(number)
    assert (task["status"], task["exitCode"]) == ("failed", 7)
    assert streams(daemon, number) == (expected(lines, 0), expected(lines, 1))
    whole = daemon.output_file(number).read_bytes()
    assert "".join(shown).encode() == whole


def again_and_again(
    daemon: Daemon, folder: Path, chance: random.Random, restart: Callable[[], None]
) -> None:
    """Start a task, restart the daemon at some moment of it, and check; many times."""
    found_again: list[float] = []
    for _ in range(TIMES):
        number = daemon.run("site", "prod", "count", folder=str(folder), lines=400)
        shown: list[str] = []
        follower = Thread(target=follow, args=(daemon, number, shown))
        follower.start()
        time.sleep(chance.uniform(0, 0.35))  # at any moment
        restart()
        began = time.monotonic()
        # A task that ended before its shim began can be waiting again for a moment.
        assert daemon.task(number)["status"] in {"created", "running", "failed"}
        found_again.append(time.monotonic() - began)
        check(daemon, number, 400, shown_by(follower, shown))
    print(f"{TIMES} restarts, found again within {max(found_again) * 1000:.0f} ms")
    assert max(found_again) < 30
    assert zombies(daemon) == []


def test_a_killed_daemon_loses_no_output(fixed: Daemon, tmp_path: Path) -> None:
    """The kill comes at any moment.

    Followers get every byte once, and the exit code is right.
    """

    def restart() -> None:
        fixed.kill()
        fixed.start()

    again_and_again(fixed, tmp_path, random.Random(4), restart)


def test_another_version_takes_over_a_running_task(fixed: Daemon, tmp_path: Path) -> None:
    """The old version gets SIGTERM in the middle of a task, then the other one starts."""
    copy = tmp_path / "other"
    source = Path(pulsar_api.__file__).parent
    for name in ("pulsar_api", "ssl", "twisted"):
        shutil.copytree(source.parent / name, copy / name)
    init = copy / "pulsar_api" / "__init__.py"
    init.write_text('"""Another version."""\n\n__version__ = "99.0"\n')
    usual = dict(fixed.environ)
    versions = itertools.cycle([{**usual, "PYTHONPATH": str(copy)}, usual])

    def restart() -> None:
        fixed.process.terminate()
        assert fixed.process.wait(60) == 0
        fixed.environ = next(versions)
        fixed.start()

    again_and_again(fixed, tmp_path, random.Random(6), restart)
    log = fixed.log.read_text()
    for version in ("99.0", pulsar_api.__version__):
        assert log.count(f"pulsar-api {version} listens") >= TIMES // 2


def shown_by(follower: Thread, shown: list[str]) -> list[str]:
    """Wait for a follower and return what it has seen."""
    follower.join(60)
    assert not follower.is_alive()
    return shown


def zombies(daemon: Daemon) -> list[str]:
    """Return the children of the daemon that wait for it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] == "Z" and int(fields[1]) == daemon.process.pid:
            found.append(path.parent.name)
    return found


def test_twenty_tasks_survive_a_restart(fixed: Daemon, tmp_path: Path) -> None:
    """Some run and some wait. Each starts exactly once."""
    numbers = [
        fixed.run("site", f"env{n}", "count", folder=str(tmp_path), lines=300)
        for n in range(20)
    ]
    for _ in range(max(3, TIMES // 10)):
        fixed.kill()
        fixed.start()
    for number in numbers:
        assert fixed.ended(number)["exitCode"] == 7
        assert streams(fixed, number) == (expected(300, 0), expected(300, 1))
    assert len(list(tmp_path.glob("started-*"))) == 20


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_long_polls_are_answered_before_a_stop(
    fixed: Daemon, script: Script, number: signal.Signals
) -> None:
    """The connection is not broken, and the task keeps running."""
    script("sleep", "#!/bin/sh\nexec sleep 60\n")
    task = fixed.run("site", "prod", "sleep")
    version = wait_for(lambda: (t := fixed.task(task))["pid"] and t["version"], "the start")
    paths = [f"/task/{task}/output?since={version}", f"/task/{task}/state"]
    polls = [Poll(fixed, path) for path in (*paths, "/tasks/created")]
    fixed.process.send_signal(number)
    assert [poll.answer().json() for poll in polls] == [{"changed": False}] * 3
    assert fixed.process.wait(60) == 0
    fixed.start()
    assert fixed.task(task)["status"] == "running"


def test_a_stopping_daemon_serves_all_but_new_tasks(
    start: Start, repo: Path, script: Script
) -> None:
    """Reads, follows and kills work while it waits for running tasks."""
    script("sleep", "#!/bin/sh\necho ready\nexec sleep 60\n")
    daemon = start("--command=scripts", f"--config-repo={repo}", "--drain-timeout=100")
    number = daemon.run("site", "prod", "sleep")
    wait_for(lambda: daemon.task(number)["output"], "the start")
    daemon.process.terminate()
    wait_for(lambda: "Waiting for 1 tasks" in daemon.log.read_text(), "the stop")
    refused = daemon.post("/site/prod", {"action": "sleep"})
    assert refused.status == 503
    assert refused.json()["type"].endswith(":stopping")
    assert int(refused.headers["Retry-After"]) > 0
    assert daemon.task(number)["output"] == "ready\n"
    assert daemon.post(f"/task/{number}/kill").status == 200
    assert daemon.process.wait(60) == 0


def test_a_kill_of_the_daemon_during_a_post_starts_at_most_one_task(
    fixed: Daemon, tmp_path: Path
) -> None:
    """A client that retries with the same key gets the same task, which ran once."""
    chance = random.Random(5)
    tries = TIMES * 2
    for n in range(tries):
        body = json.dumps(
            {"action": "count", "variables": {"folder": str(tmp_path), "lines": 1}}
        )
        headers = {"Content-Type": "application/json", "Idempotency-Key": f"key-{n}"}
        answers: list[Any] = []

        def post(
            body: str = body, headers: dict[str, str] = headers, to: list[Any] = answers
        ) -> None:
            with suppress(OSError, HTTPException):
                to.append(fixed.request("POST", "/site/prod", body, headers))

        thread = Thread(target=post)
        thread.start()
        time.sleep(chance.uniform(0, 0.01))  # at any moment
        fixed.kill()
        thread.join(60)
        fixed.start()
        post()
        ids = {a.json()["id"] for a in answers if a.status == 200}
        assert len(ids) == 1
        fixed.ended(ids.pop())
    tasks = fixed.get("/tasks?limit=1000&output=none").json()["tasks"]
    assert len(tasks) == tries
    assert len(list(tmp_path.glob("started-*"))) == tries
    assert all(task["exitCode"] == 7 for task in tasks.values())


def test_a_too_large_output_loses_its_middle(
    start: Start, repo: Path, script: Script
) -> None:
    """The begin and the end are kept byte for byte, and offsets do not change."""
    # Written in blocks of lines, so that the output reaches its limit before the index
    # does.
    code = (
        "import os\nfor first in range(0, 100000, 100):\n"
        "    os.write(1, b''.join(b'%09d\\n' % n for n in range(first, first + 100)))\n"
    )
    script("talk", f"#!{sys.executable} -IS\n{code}")
    daemon = start("--command=scripts", f"--config-repo={repo}", "--max-output-size=256K")
    number = daemon.run("site", "prod", "talk")
    task = daemon.ended(number)
    assert (task["exitCode"], task["outputSize"]) == (0, 1_000_000)
    cut = daemon.task(number)["outputCut"]
    whole = b"".join(b"%09d\n" % n for n in range(100_000))
    data = daemon.output_file(number).read_bytes()
    assert data[: cut["from"]] == whole[: cut["from"]]
    assert data[cut["to"] :] == whole[cut["to"] :]
    assert cut["from"] == 128 * 1024
    assert 1_000_000 - cut["to"] >= 128 * 1024
    assert daemon.output_file(number).stat().st_blocks * 512 < 400_000
    text = daemon.task(number)["output"]
    middle = f"\n[bytes {cut['from']} to {cut['to']} were cut: --max-output-size]\n"
    expected = whole[: cut["from"]].decode() + middle + whole[cut["to"] :].decode()
    assert hashlib.sha256(text.encode()).digest() == (
        hashlib.sha256(expected.encode()).digest()
    )


def test_a_too_large_index_loses_its_middle_over_a_restart(
    start: Start, repo: Path, script: Script, tmp_path: Path
) -> None:
    """The task writes single bytes to both streams. Readers get the rest, early or late."""
    go = tmp_path / "go"
    # With O_DIRECT the shim reads each byte by itself, even if it is slow.
    code = (
        "import fcntl, os, time\n"
        "for fd in (1, 2): fcntl.fcntl(fd, fcntl.F_SETFL, os.O_WRONLY | os.O_DIRECT)\n"
        "def alternate():\n"
        "    for _ in range(6000): os.write(1, b'o'); os.write(2, b'e')\n"
        f"alternate()\nwhile not os.path.exists({str(go)!r}): time.sleep(0.01)\n"
        "alternate()\nprint('end')\n"
    )
    script("talk", f"#!{sys.executable} -IS\n{code}")
    daemon = start("--command=scripts", f"--config-repo={repo}", "--max-output-size=20K")
    daemon.arguments[daemon.arguments.index("--port") + 1] = str(daemon.port)
    number = daemon.run("site", "prod", "talk")
    index = daemon.output_file(number).with_name("output.idx")
    wait_for(lambda: daemon.task(number)["outputSize"] == 12_000, "the first half")
    assert daemon.task(number)["outputCut"]["from"] > 0
    daemon.kill()
    go.touch()
    wait_for(lambda: index.stat().st_size > 20_000 * 16, "the second half")
    daemon.start()
    task = daemon.ended(number)
    assert (task["exitCode"], task["outputSize"]) == (0, 24_004)
    assert index.stat().st_size > 24_000 * 16
    assert index.stat().st_blocks * 512 < 80_000
    cut = daemon.task(number)["outputCut"]
    line = f"\n[bytes {cut['from']} to {cut['to']} were cut: --max-output-size]\n"
    for stream, letter in (("stdout", "o"), ("stderr", "e")):
        text = daemon.get(f"/task/{number}/log?stream={stream}").body.decode()
        before, _, after = text.partition(line)
        assert set(before + after.removesuffix("end\n")) == {letter}
        assert abs(len(before) - cut["from"] / 2) <= 1
        assert abs(len(after) - (24_004 - cut["to"]) / 2) <= 4
    with closing(sqlite3.connect(daemon.state / "pulsar-api.db")) as db:
        (kept,) = db.execute("SELECT index_size FROM task").fetchone()
    assert 0 < kept <= 65_536


def test_old_tasks_are_removed_with_their_output(
    start: Start, repo: Path, script: Script
) -> None:
    """The next start removes them at the latest. No number is used again."""
    script("true", "#!/bin/sh\n")
    daemon = start("--command=scripts", f"--config-repo={repo}", "--keep-tasks=3")
    for _ in range(8):
        number = daemon.run("site", "prod", "true")
        daemon.ended(number)
    daemon.kill()
    daemon.start()
    wait_for(lambda: len(daemon.get("/tasks").json()["tasks"]) == 3, "a smaller list")
    folders = daemon.state / "tasks"
    wait_for(lambda: len(list(folders.iterdir())) == 3, "fewer folders")
    assert daemon.get("/task/1").status == 404
    assert daemon.run("site", "prod", "true") == 9


def test_end_tasks_ends_the_tasks_of_a_stopped_daemon(
    fixed: Daemon, script: Script
) -> None:
    """The next daemon finds them killed."""
    script("sleep", "#!/bin/sh\necho ready\nexec sleep 60\n")
    number = fixed.run("site", "prod", "sleep")
    wait_for(lambda: fixed.task(number)["output"], "the start")
    fixed.kill()
    program = "from pulsar_api.cli.main import main; main()"
    command = [sys.executable, "-c", program, "end-tasks", "--state-dir", str(fixed.state)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=fixed.environ
    )
    assert done.stdout == f"Told 1 task to end: {number}\n"
    fixed.start()
    assert fixed.ended(number)["status"] == "killed"


def test_fifty_clients_race_for_one_target(start: Start, tmp_path: Path) -> None:
    """Tasks run one at a time, in the order of their creation, also over a restart."""
    daemon = start("--command", SHELL, "--max-running-per-target=1")
    daemon.arguments[daemon.arguments.index("--port") + 1] = str(daemon.port)
    order, lock = tmp_path / "order", tmp_path / "lock"
    order.touch()
    order.chmod(0o666)
    # A task that finds the folder has run beside another one, and fails.
    run = f"mkdir {lock} || exit 9; echo $PULSAR_TASK_ID >> {order}; rmdir {lock}"
    body = json.dumps({"action": "run", "variables": {"run": run}})
    created: list[int] = []

    def client(name: int) -> None:
        for n in range(4):
            headers = {
                "Content-Type": "application/json",
                "Idempotency-Key": f"{name}-{n}",
            }
            while True:
                with suppress(OSError, HTTPException):
                    answer = daemon.request("POST", "/site/prod", body, headers)
                    if answer.status == 200:
                        created.append(answer.json()["id"])
                        break
                    assert answer.status in {409, 503}
                time.sleep(0.01)  # the daemon is away

    clients = [Thread(target=client, args=(name,)) for name in range(50)]
    for thread in clients:
        thread.start()
    wait_for(lambda: order.read_text().count("\n") >= 60, "some tasks")
    daemon.kill()
    daemon.start()
    for thread in clients:
        thread.join(120)
        assert not thread.is_alive()
    assert sorted(created) == list(range(1, 201))
    for number in created:
        assert daemon.ended(number)["exitCode"] == 0
    assert [int(line) for line in order.read_text().split()] == sorted(created)
