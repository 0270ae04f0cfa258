"""Tests of the end of a daemon: in time, whatever is broken, with a handover."""

import os
import signal
import sqlite3
import stat
import subprocess
import time
from contextlib import closing
from pathlib import Path

import pytest

from pulsar_api.daemon.running import CLOSE
from pulsar_api.tasks.service import LEAVE
from tests.integration.conftest import Start
from tests.integration.daemon import SHELL, Daemon, wait_for

NOISE = 20.0
"""Seconds that a busy machine can add."""


def ends(daemon: Daemon, within: float) -> None:
    """Send SIGTERM, and check that the daemon ends in time."""
    begin = time.monotonic()
    daemon.process.send_signal(signal.SIGTERM)
    try:
        daemon.process.wait(within + NOISE)
    except subprocess.TimeoutExpired:
        pytest.fail(f"still there after {time.monotonic() - begin:.0f} s")


def test_a_daemon_with_a_locked_database_ends_and_the_next_one_kills(
    start: Start,
) -> None:
    """One task waits and one runs. Neither kill could be recorded."""
    daemon = start("--command", SHELL, "--max-running=1", "--kill-grace=1")
    running = daemon.sh("trap '' TERM; echo ready; sleep 600")
    wait_for(lambda: daemon.task(running)["output"], "the task")
    waiting, spared = daemon.sh("echo never"), daemon.sh("echo spared")
    with closing(sqlite3.connect(daemon.state / "pulsar-api.db")) as db:
        db.execute("BEGIN EXCLUSIVE")
        asked = [daemon.connect(), daemon.connect()]
        for connection, number in zip(asked, (waiting, running), strict=True):
            connection.request("POST", f"/task/{number}/kill")
        text = f"Task {waiting}: kill asked for"
        wait_for(lambda: text in daemon.log.read_text(), "the kill")
        ends(daemon, LEAVE + 3 * CLOSE)
        left = f"Task {waiting} is left to the next daemon, as recorded"
        assert left in daemon.log.read_text()
        for connection in asked:
            connection.close()
    daemon.start()
    assert daemon.ended(waiting)["status"] == "killed"
    assert daemon.task(waiting)["startedAt"] is None
    assert daemon.ended(running)["status"] == "killed"
    daemon.ended(spared)
    assert daemon.task(spared)["output"] == "spared\n"


def test_a_daemon_with_a_moved_database_ends_and_the_next_one_kills(
    start: Start,
) -> None:
    """The daemon cannot record the kill of a waiting task."""
    daemon = start("--command", SHELL, "--max-running=1", "--kill-grace=1")
    running = daemon.sh("echo ready; exec sleep 600")
    wait_for(lambda: daemon.task(running)["output"], "the task")
    waiting = daemon.sh("echo never")
    database = daemon.state / "pulsar-api.db"
    away = database.rename(daemon.state / "away")
    with closing(daemon.connect()) as connection:
        connection.request("POST", f"/task/{waiting}/kill")
        text = f"Task {waiting}: kill asked for"
        wait_for(lambda: text in daemon.log.read_text(), "the kill")
        ends(daemon, LEAVE + 3 * CLOSE)
    left = f"Task {waiting} is left to the next daemon, as recorded"
    assert left in daemon.log.read_text()
    assert not database.exists()
    away.rename(database)
    daemon.start()
    assert daemon.ended(waiting)["status"] == "killed"
    assert daemon.task(waiting)["startedAt"] is None
    assert daemon.task(running)["status"] == "running"


@pytest.mark.parametrize("where", ["repo", "state"])
def test_paths_that_are_not_utf_8_work(start: Start, tmp_path: Path, where: str) -> None:
    """The task gets the bytes, and the API escapes them."""
    odd = os.fsdecode(b"caf\xe9")
    repo = tmp_path / (odd if where == "repo" else "repo")
    actions = repo / "apps" / "site"
    actions.mkdir(parents=True)
    script = actions / "deploy"
    script.write_text("#!/bin/sh\necho done\n")
    script.chmod(stat.S_IRWXU)
    options = ["--command", "scripts", "--config-repo", str(repo)]
    if where == "state":
        options += ["--state-dir", str(tmp_path / odd)]
    daemon = start(*options)
    number = daemon.run("site", "production", "deploy")
    daemon.ended(number)
    task = daemon.task(number)
    assert (task["status"], task["output"]) == ("finished", "done\n")
    if where == "repo":
        assert "caf\\351" in task["command"]
    ends(daemon, LEAVE)
    daemon.start()
    assert daemon.task(number)["status"] == "finished"
