"""Tests that other users have no rights on anything below the state folder."""

import os
import stat
from pathlib import Path

from tests.integration.conftest import Start
from tests.integration.daemon import SHELL, Daemon, wait_for


def wide(state: Path) -> list[str]:
    """Return the paths on which others have rights, each with its mode."""
    found = []
    for folder, folders, names in os.walk(state):
        for name in (*folders, *names):
            path = Path(folder, name)
            mode = path.lstat().st_mode
            if not stat.S_ISLNK(mode) and mode & 0o077:
                found.append(f"{path.relative_to(state)} {mode & 0o777:o}")
    return found


def work(daemon: Daemon) -> None:
    """Run tasks to their end and kill one."""
    ends = daemon.sh("echo one; echo two >&2", PASSWORD="a secret value")
    killed = daemon.sh("echo ready; exec sleep 600")
    wait_for(lambda: daemon.task(killed)["output"] == "ready\n", "the output")
    assert daemon.post(f"/task/{killed}/kill").status == 200
    assert daemon.ended(ends)["status"] == "finished"
    assert daemon.ended(killed)["status"] == "killed"


def test_state_is_closed_to_other_users(start: Start, tmp_path: Path) -> None:
    """The umask does not matter, and files that an older version left open are closed."""
    state = tmp_path / "state"
    state.mkdir(mode=0o755)
    state.chmod(0o755)
    options = ("--command", SHELL, "--kill-grace=1")
    daemon = start(*options, state=state, umask=0)
    work(daemon)
    assert wide(state) == []
    daemon.stop()
    outside = tmp_path / "outside"
    outside.touch()
    outside.chmod(0o644)
    for path in state.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    (state / "tasks" / "1" / "link").symlink_to(outside)
    daemon.start()
    work(daemon)
    wait_for(lambda: not wide(state), "the modes")
    assert outside.stat().st_mode & 0o777 == 0o644
    log = daemon.log.read_text()
    for name in ("pulsar-api.db", "tasks/1/output"):
        assert f"{state / name} was open to other users; this is now mended" in log
