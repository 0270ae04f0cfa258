"""A daemon as process 1 of a container. The tests need root, to make a PID namespace."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.daemon import PATIENCE, SHELL, Daemon, marked, wait_for

pytestmark = pytest.mark.needs("a namespace of processes")

UNSHARE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
STRANGERS = 3


def children(pid: int) -> set[int]:
    """Return the children of a process, including zombies."""
    return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


class Contained(Daemon):
    """A daemon that is process 1 of its PID namespace."""

    def first(self) -> int:
        """Return the number of the container's process 1, as seen from outside."""
        (pid,) = children(self.process.pid)
        status = Path(f"/proc/{pid}/status").read_text()
        assert re.search(r"^NSpid:.*\t1$", status, re.MULTILINE)
        return pid

    def stop(self) -> int:
        """Stop the daemon; unshare(1) ignores TERM and ends with it."""
        if self.process.poll() is None:
            os.kill(self.first(), signal.SIGTERM)
        return self.process.wait(PATIENCE)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Contained]:
    """Return a daemon in a container, whose processes all end with it."""
    program = (*UNSHARE, sys.executable, "-m", "pulsar_api")
    daemon = Contained(tmp_path, "--command", SHELL, program=program)
    yield daemon
    daemon.stop()


def test_daemon_as_process_1_collects_zombies(daemon: Contained) -> None:
    """Processes without a parent become its children. They and tasks do not interfere."""
    first = daemon.first()
    entry = f"PULSAR_TEST_STRANGER={first}"
    run = "exec 3<&0; for n in $(seq $0); do env $1 cat <&3 & done"
    line = ("nsenter", "--target", str(first), "--pid", "sh", "-c", run)
    with subprocess.Popen([*line, str(STRANGERS), entry], stdin=subprocess.PIPE) as parent:
        assert parent.wait(PATIENCE) == 0
        strangers = set(wait_for(lambda: known(entry), "the strangers"))
        assert strangers <= children(first)
        assert daemon.ended(daemon.sh("exit 3"))["exitCode"] == 3
        assert set(marked(entry)) == strangers
        assert parent.stdin is not None
        parent.stdin.close()  # this ends them
    wait_for(lambda: not strangers & children(first), "the end of the zombies")
    assert daemon.ended(daemon.sh("exit 4"))["exitCode"] == 4


def known(entry: str) -> list[int]:
    """Return the processes with this entry in their environment, once all have it."""
    found = marked(entry)
    return found if len(found) == STRANGERS else []
