"""Faults of the machine under a running daemon, those of the table in docs/faults.rst."""

import json
import os
import random
import re
import resource
import shutil
import socket
import sqlite3
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest

import pulsar_api
from tests.integration.conftest import Start
from tests.integration.daemon import (
    SHELL,
    Answer,
    Daemon,
    Poll,
    marked,
    shim_of,
    wait_for,
)

ROOT = Path(__file__).parents[2]
FAULTS = ROOT / "docs" / "faults.rst"


def test_every_row_of_the_faults_table_names_a_test() -> None:
    """Each named test exists."""
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    rows = FAULTS.read_text().partition(".. list-table::")[2].split("\n   * - ")[2:]
    assert len(rows) > 10
    for row in rows:
        named = re.findall(r"``(test_\w+)``", row)
        assert named, row
        for name in named:
            assert f"def {name}(" in tests, name


@pytest.fixture
def daemon(start: Start) -> Daemon:
    """Return a daemon that runs lines of shell."""
    return start("--command", SHELL, "--kill-grace=1")


def refused(answer: Answer, status: int = 503) -> str:
    """Check that a POST was refused in the documented way, and return the detail."""
    assert answer.status == status, answer.body
    assert answer.json()["type"] == "urn:pulsar-api:problem:store-unavailable"
    assert int(answer.headers["Retry-After"]) > 0
    detail: str = answer.json()["detail"]
    assert "Nothing was started" in detail
    return detail


def post(daemon: Daemon, run: str = "true") -> Answer:
    """Send a POST for a task."""
    return daemon.post("/site/prod", {"action": "run", "variables": {"run": run}})


def works(daemon: Daemon, traced: str = "Traceback") -> None:
    """Check that a task runs, and that each traceback in the log is below ``traced``."""
    number = daemon.sh("echo well; exit 5")
    assert daemon.ended(number)["exitCode"] == 5
    assert daemon.task(number)["output"] == "well\n"
    for before in daemon.log.read_text().split("Traceback")[:-1]:
        assert traced in before.splitlines()[-2]


def processes(daemon: Daemon, number: int) -> list[int]:
    """Return the living processes of a task."""
    return marked(f"PULSAR_TASK_FOLDER={daemon.output_file(number).parent}")


def waiter(daemon: Daemon, folder: Path, then: str) -> tuple[int, Callable[[], None]]:
    """Start a task that waits. Return its number and a function that lets it go on."""
    pipe = folder / f"pipe{len(list(folder.glob('pipe*')))}"
    os.mkfifo(pipe)
    pipe.chmod(0o644)
    number = daemon.sh(f"echo ready; read x < {pipe}; {then}")
    wait_for(lambda: daemon.task(number)["output"] == "ready\n", "the first line")

    def go() -> None:
        pipe.write_text("go\n")

    return number, go


@contextmanager
def mounted(path: Path, *options: str) -> Iterator[None]:
    """Mount a file system on a folder until the end of the block."""
    path.mkdir(exist_ok=True)
    subprocess.run(["mount", *options, str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(path: Path) -> None:
    """Write a file until the disk has no free byte."""
    with path.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            with suppress(OSError):
                while True:
                    file.write(bytes(size))


@pytest.mark.needs("mounts")
def test_full_disk_refuses_new_tasks_and_loses_no_output(
    start: Start, tmp_path: Path
) -> None:
    """Running tasks wait for space, and go on when there is some."""
    disk = tmp_path / "daemon0" / "state"
    disk.mkdir(parents=True)
    with mounted(disk, "-t", "tmpfs", "-o", "size=8m", "tmpfs"):
        daemon = start("--command", SHELL, "--max-running=2")
        before = daemon.sh("seq 1000")
        daemon.ended(before)
        text = daemon.task(before)["output"]
        lines = "seq 40000; seq 40000 >&2; exit 3"
        number, go = waiter(daemon, tmp_path, lines)
        other, let_go = waiter(daemon, tmp_path, "exit 4")
        queued = daemon.sh("echo at last")
        fill(disk / "filler")
        assert "MiB is free" in refused(post(daemon), 507)
        go()
        # More than the pipes hold, so the command is blocked until there is space.
        output = daemon.output_file(number)
        wait_for(lambda: output.stat().st_size > 6, "what has room")
        assert daemon.task(number)["status"] == "running"
        assert daemon.task(before)["output"] == text
        let_go()
        wait_for(lambda: not processes(daemon, other), "its end")
        assert daemon.task(other)["status"] == "running"  # its result is not on disk
        refused(post(daemon), 507)
        (disk / "filler").unlink()
        assert daemon.ended(other)["exitCode"] == 4
        assert daemon.ended(number)["exitCode"] == 3
        whole = "".join(f"{n}\n" for n in range(1, 40001))
        assert daemon.task(number)["output"] == f"ready\n{whole}{whole}"
        assert daemon.ended(queued)["exitCode"] == 0
        works(daemon)
        assert daemon.task(before)["output"] == text
        daemon.kill()
        with closing(sqlite3.connect(disk / "pulsar-api.db")) as db:
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        daemon.start()
        assert daemon.task(number)["exitCode"] == 3
        assert daemon.stop() == 0


@pytest.mark.parametrize("free", range(5))
@pytest.mark.needs("mounts")
def test_accepted_task_waits_for_inodes(start: Start, tmp_path: Path, free: int) -> None:
    """It does not start until there are enough inodes for all of its files."""
    disk = tmp_path / "daemon0" / "state"
    disk.mkdir(parents=True)
    with mounted(disk, "-t", "tmpfs", "-o", "size=64m,nr_inodes=64", "tmpfs"):
        daemon = start("--command", SHELL, "--max-running=1")
        first, go = waiter(daemon, tmp_path, "exit 4")
        second = daemon.sh("echo well; exit 3")
        fillers = [disk / f"filler{number}" for number in range(64)]
        with suppress(OSError):
            for filler in fillers:
                filler.touch()
        for filler in fillers[: free + 1]:  # the result of the first task takes one inode
            filler.unlink()
        go()
        assert daemon.ended(first)["exitCode"] == 4
        assert os.statvfs(disk).f_ffree == free
        wait_for(lambda: "(inodes)" in str(daemon.task(second)["waitingFor"]), "it")
        subprocess.run(["mount", "-o", "remount,nr_inodes=99", disk], check=True)
        assert daemon.ended(second)["exitCode"] == 3
        assert daemon.task(second)["output"] == "well\n"
        assert daemon.stop() == 0


@pytest.mark.needs("mounts")
def test_read_only_state_folder_refuses_new_tasks(daemon: Daemon, tmp_path: Path) -> None:
    """Running tasks keep their output and exit code."""
    number, go = waiter(daemon, tmp_path, "echo more; exit 3")
    tasks = daemon.state / "tasks"
    with mounted(tasks, "--bind", str(tasks)):
        subprocess.run(["mount", "-o", "remount,bind,ro", str(tasks)], check=True)
        assert "not writable" in refused(post(daemon))
        go()
        assert daemon.ended(number)["exitCode"] == 3
    assert daemon.task(number)["output"] == "ready\nmore\n"
    works(daemon)


def test_missing_state_folder_refuses_new_tasks(daemon: Daemon, tmp_path: Path) -> None:
    """When it is back, everything goes on without a restart."""
    before = daemon.sh("echo before")
    daemon.ended(before)
    away = daemon.state.with_name("away")
    adopted, let_adopted_go = waiter(daemon, tmp_path, "exit 4")
    daemon.kill()
    daemon.start()
    number, go = waiter(daemon, tmp_path, "exit 3")
    wait_for(lambda: daemon.task(adopted)["pid"], "the adoption")
    daemon.state.rename(away)
    refused(post(daemon))
    go()
    wait_for((away / "tasks" / str(number) / "exit").exists, "its end")
    # The daemon does not take a task for dead whose folder it cannot read.
    seen = daemon.log.read_text().count("Cannot read")
    wait_for(
        lambda: daemon.log.read_text().count("Cannot read") > seen + 4, "some more looks"
    )
    assert processes(daemon, adopted) != []
    away.rename(daemon.state)
    assert daemon.task(before)["output"] == "before\n"
    assert daemon.ended(number)["exitCode"] == 3
    let_adopted_go()
    assert daemon.ended(adopted)["exitCode"] == 4
    works(daemon)


def test_locked_database_refuses_starts_and_delays_ends(
    daemon: Daemon, tmp_path: Path
) -> None:
    """Reads work. A POST is refused after 5 s. An end is recorded after the lock."""
    number, go = waiter(daemon, tmp_path, "exit 3")
    path = daemon.state / "pulsar-api.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        poll = Poll(daemon, f"/task/{number}/state")
        go()
        assert "locked" in refused(post(daemon))
        assert daemon.task(number)["status"] == "running"
        assert daemon.get("/tasks").status == 200
        assert poll.waits()
        other.execute("ROLLBACK")
    assert poll.answer().json()["task"]["exitCode"] == 3
    works(daemon)


def test_damaged_database_is_not_replaced(daemon: Daemon, tmp_path: Path) -> None:
    """When an operator has restored a good one, everything goes on."""
    number, go = waiter(daemon, tmp_path, "exit 3")
    away = tmp_path / "away"
    away.mkdir()
    for path in daemon.state.glob("pulsar-api.db*"):
        path.rename(away / path.name)
    damaged = daemon.state / "pulsar-api.db"
    damaged.write_bytes(b"\xff" * 8192)
    refused(post(daemon))
    assert "not a database" in refused(post(daemon))
    assert "not a database" in refused(daemon.get("/tasks"))
    go()
    assert damaged.read_bytes() == b"\xff" * 8192
    assert list(daemon.state.glob("pulsar-api.db*")) == [damaged]
    damaged.unlink()
    for path in away.iterdir():
        path.rename(daemon.state / path.name)
    assert daemon.ended(number)["exitCode"] == 3
    works(daemon)


def limit(daemon: Daemon, which: int, soft: int) -> int:
    """Set a soft limit of the running daemon, and return the old one."""
    before, hard = resource.prlimit(daemon.process.pid, which)
    resource.prlimit(daemon.process.pid, which, (soft, hard))
    return before


def taken(folder: Path, few: int) -> None:
    """Wait until a process has more than ``few`` descriptors."""
    wait_for(lambda: len(os.listdir(folder)) > few, "another descriptor")


def test_task_waits_for_file_descriptors(daemon: Daemon, tmp_path: Path) -> None:
    """It shows the reason. No descriptor leaks, and later everything goes on."""
    number, go = waiter(daemon, tmp_path, "echo more; exit 3")
    folder = Path(f"/proc/{daemon.process.pid}/fd")
    with ExitStack() as stack:
        connection = stack.enter_context(closing(daemon.connect()))

        def ask(method: str, path: str, value: object = None) -> Any:
            body = None if value is None else json.dumps(value)
            headers = {"Content-Type": "application/json"}
            connection.request(method, path, body, headers)
            return json.loads(connection.getresponse().read())

        ask("GET", "/tasks")
        # No number below the limit is free, as when many clients are connected.
        clients = stack.enter_context(ExitStack())
        while len(used := {int(path.name) for path in folder.iterdir()}) <= max(used):
            clients.enter_context(daemon.open_socket())
            taken(folder, len(used))
        free = max(used) + 1
        usual = resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE)[0]
        waited = set()
        tasks = []
        for more in range(30):
            limit(daemon, resource.RLIMIT_NOFILE, free + more)
            value = {"action": "run", "variables": {"run": "true"}}
            tasks.append(ask("POST", "/site/prod", value)["id"])
            if ask("GET", f"/task/{tasks[-1]}/state?timeout=2")["changed"]:
                break
            said = ask("GET", f"/task/{tasks[-1]}")
            waited.add(said.get("waitingFor") or said.get("detail") or "")
        for created in tasks:
            assert ask("GET", f"/task/{created}/state")["task"]["status"] == "finished"
        while len(used := {int(path.name) for path in folder.iterdir()}) <= max(used):
            clients.enter_context(daemon.open_socket())
            taken(folder, len(used))
        limit(daemon, resource.RLIMIT_NOFILE, max(used) + 1)
        with pytest.raises((OSError, HTTPException)):
            daemon.get("/tasks")
        # From now on even a closed descriptor cannot be used again.
        limit(daemon, resource.RLIMIT_NOFILE, 3)
        unread = ask("GET", f"/task/{number}")
        assert (unread["status"], "Too many open files" in unread["detail"]) == (503, True)
        go()
        poll = f"/task/{number}/state?output=none&timeout=0.5"
        assert ask("GET", poll) == {"changed": False}  # the daemon cannot read the result
        limit(daemon, resource.RLIMIT_NOFILE, usual)
        assert ask("GET", f"/task/{number}/state")["task"]["exitCode"] == 3
        assert any("Too many open files" in why for why in waited)
        wait_for(lambda: len(list(folder.iterdir())) <= len(used), "the same descriptors")
    works(daemon, "recovery file descriptor")


def test_task_waits_for_processes(start: Start, tmp_path: Path) -> None:
    """It shows the reason. Running tasks go on, and later it starts."""
    user: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    place = tmp_path
    if os.geteuid() == 0:
        # Root has no such limit. Another user is perhaps unable to read this Python, and a
        # daemon without accounts for tasks passes none of its capabilities on.
        may = "+dac_override,+setuid,+setgid,+kill"
        user = ("setpriv", "--reuid=54321", "--clear-groups")
        user = (*user, f"--inh-caps={may}", f"--ambient-caps={may}")
        settings = tmp_path / "settings.toml"
        settings.write_text('[[run-as]]\non = ["*"]\nuser = "games"\n')
        options = ("--config", str(settings))
        place = Path(tempfile.mkdtemp())
        place.chmod(0o755)
    program = (*user, sys.executable, "-m", "pulsar_api")
    daemon = start("--command", SHELL, *options, program=program)
    number, go = waiter(daemon, place, "exit 3")
    limits = Path(f"/proc/{daemon.process.pid}/limits").read_text()
    found = re.search(r"^Max processes +(\w+)", limits, re.MULTILINE)
    assert found is not None

    def allow(processes: str) -> None:
        for process in (daemon.process.pid, daemon.launcher()):
            pid = f"--pid={process}"
            subprocess.run([*user, "prlimit", pid, f"--nproc={processes}:"], check=True)

    allow("0")
    waits = daemon.sh("true")

    def why() -> bool:
        said = daemon.task(waits)["waitingFor"] or ""
        return "Resource temporarily unavailable" in said

    wait_for(why, "the reason")
    assert daemon.task(number)["status"] == "running"
    allow(found[1])
    assert daemon.ended(waits)["status"] == "finished"
    go()
    assert daemon.ended(number)["exitCode"] == 3
    works(daemon)
    if place != tmp_path:
        shutil.rmtree(place)


def test_killed_shim_makes_the_task_lost(daemon: Daemon) -> None:
    """Its exit code is unknown, and all of its processes are ended."""
    for restart in (False, True):
        number = daemon.sh("sleep 61 & setsid sleep 61 & echo ready; wait")
        wait_for(lambda n=number: daemon.task(n)["output"], "the start")  # type: ignore[misc]
        watcher = shim_of(daemon.output_file(number).parent)
        assert len(processes(daemon, number)) == 3
        if restart:
            daemon.kill()
        os.kill(watcher, 9)
        if restart:
            daemon.start()
        began = time.monotonic()
        task = daemon.ended(number)
        print(f"lost after {time.monotonic() - began:.2f} s")
        assert task["status"] == "lost"
        assert "left no result" in task["reason"] or "ended" in task["reason"]
        assert processes(daemon, number) == []
    works(daemon)


def test_task_from_before_a_boot_is_lost(daemon: Daemon, tmp_path: Path) -> None:
    """Its process numbers can belong to other processes, which are never signalled."""
    number, _ = waiter(daemon, tmp_path, "exit 3")
    lock = daemon.output_file(number).with_name("lock")
    daemon.kill()
    watcher = shim_of(lock.parent)
    os.kill(watcher, 9)
    for process in processes(daemon, number):
        os.kill(process, 9)
    wait_for(lambda: not processes(daemon, number), "the end of the task")
    with subprocess.Popen(["/bin/sleep", "100"]) as stranger:
        lock.write_text(f"{stranger.pid}\n")
        daemon.start()
        assert daemon.ended(number)["status"] == "lost"
        assert daemon.post(f"/task/{number}/kill").status == 200
        assert daemon.task(number)["output"] == "ready\n"
        works(daemon)
        assert stranger.poll() is None
        stranger.kill()


def test_tasks_need_no_files_of_the_removed_version(start: Start, tmp_path: Path) -> None:
    """An upgrade removes them before the restart, for running and for new tasks."""
    copy = tmp_path / "copy"
    source = Path(pulsar_api.__file__).parent
    for name in ("pulsar_api", "ssl", "twisted"):
        shutil.copytree(source.parent / name, copy / name)
    environ = {**os.environ, "PYTHONPATH": str(copy)}
    daemon = start("--command", SHELL, environ=environ)
    number, go = waiter(daemon, tmp_path, "echo more; exit 3")
    shutil.rmtree(copy / "pulsar_api")
    go()
    assert daemon.ended(number)["exitCode"] == 3
    assert daemon.task(number)["output"] == "ready\nmore\n"
    works(daemon)
    hidden = daemon.sh("echo $PULSAR_VAR_password", password="a secret of its own")
    assert daemon.ended(hidden)["exitCode"] == 0
    assert daemon.task(hidden)["output"] == "***\n"


def test_jumping_clock_changes_no_waiting_time(start: Start, tmp_path: Path) -> None:
    """Waiting times are measured by the monotonic clock."""
    jump = tmp_path / "jump"
    jump.write_text("0")
    program = (
        sys.executable,
        "-c",
        (
            "import sys, time\n"
            "real = time.time\n"
            f"time.time = lambda: real() + float(open({str(jump)!r}).read() or 0)\n"
            "from pulsar_api.__main__ import main\n"
            "main()"
        ),
    )
    options = ("--command", SHELL, "--poll-timeout=5", "--task-timeout=600")
    daemon = start(*options, program=program)
    number, go = waiter(daemon, tmp_path, "echo more; exit 3")
    for seconds in ("-3600", "3600"):
        jump.write_text(seconds)
        answer = daemon.get(f"/task/{number}/output?timeout=0.2").json()
        assert answer == {"changed": False}
    jump.write_text("-3600")
    go()
    assert daemon.ended(number)["exitCode"] == 3
    works(daemon)


def test_task_of_a_disconnected_client_runs(daemon: Daemon) -> None:
    """Each recorded task is started, at whatever moment its client hangs up."""
    chance = random.Random(7)
    reset = struct.pack("ii", 1, 0)  # on, with a delay of 0 seconds (socket(7))
    for n in range(60):
        body = json.dumps({"action": "run", "variables": {"run": f"exit {n % 7}"}})
        with daemon.open_socket() as sock:
            head = f"POST /site/prod HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
            head += "Content-Type: application/json\r\n\r\n"
            sock.sendall((head + body).encode())
            time.sleep(chance.uniform(0, 0.006))  # a random moment
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
    works(daemon)  # its task is newer than all others
    tasks = daemon.get("/tasks?limit=1000&output=none").json()["tasks"]
    for number in tasks:
        assert daemon.ended(int(number))["status"] in {"finished", "failed"}
