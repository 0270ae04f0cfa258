"""A daemon as process 1 of a container. This needs root, for a namespace of processes."""

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
    """Return the children of a process, zombies as well."""
    return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


class Contained(Daemon):
    """A daemon that is process 1 where it is."""

    def first(self) -> int:
        """Return the number of process 1 of the container, as it is outside."""
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
    """Return a daemon in a container; all that is left there ends with it."""
    program = (*UNSHARE, sys.executable, "-m", "pulsar_api")
    daemon = Contained(tmp_path, "--command", SHELL, program=program)
    yield daemon
    daemon.stop()


def test_a_daemon_as_process_1_leaves_no_zombies_of_strangers(daemon: Contained) -> None:
    """It gets them when they lose their parent; tasks and strangers leave each other be."""
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
        parent.stdin.close()  # which ends them
    wait_for(lambda: not strangers & children(first), "the end of the zombies")
    assert daemon.ended(daemon.sh("exit 4"))["exitCode"] == 4


def known(entry: str) -> list[int]:
    """Return the processes that have it in their environment, as soon as all have."""
    found = marked(entry)
    return found if len(found) == STRANGERS else []
