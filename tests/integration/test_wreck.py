"""Tests of tasks that damage their own folders, as the account of the daemon."""

from pathlib import Path

import pytest

from tests.integration.conftest import Start
from tests.integration.daemon import SHELL, wait_for

WRECK = """
cd "$PULSAR_TASK_FOLDER"
for name in output output.idx cut exit exit.tmp kill sessions begun start spec lock secrets
do
  rm -rf "$name"
  case $KIND in
    FIFO) mkfifo "$name" ;;
    link) ln -s /dev/zero "$name" ;;
    folder) mkdir -p "$name/in/it" ;;
    hole) truncate -s 1T "$name" ;;
    garbage) head -c 5000 /dev/urandom > "$name" ;;
  esac
done
echo > "$DONE"
sleep $TIME
"""


@pytest.mark.parametrize("kind", ["FIFO", "link", "folder", "hole", "garbage", "nothing"])
def test_a_task_that_damages_its_folder_affects_no_other(
    start: Start, tmp_path: Path, kind: str
) -> None:
    """The daemon serves, ends in time and starts again. The task ends."""
    daemon = start("--command", SHELL, "--kill-grace=1")
    short = daemon.sh(f"KIND={kind} TIME=0 DONE=/dev/null; {WRECK}", env="one")
    long = daemon.sh(f"KIND={kind} TIME=600 DONE={tmp_path}/wrecked; {WRECK}", env="two")
    good = daemon.sh("echo good")
    assert daemon.ended(good)["status"] == "finished"
    assert daemon.ended(short)["status"] in {"finished", "lost", "failed"}
    # The task reports it in a file of its own, as its output can be unreadable.
    wait_for((tmp_path / "wrecked").exists, "the wreck")
    daemon.stop()
    daemon.start()
    for number in (short, long):
        assert daemon.get(f"/task/{number}?output=none").status == 200
    assert len(daemon.get("/tasks").json()["tasks"]) == 3
    daemon.post(f"/task/{long}/kill")
    task = daemon.ended(long)
    # The next daemon ends tasks without a lock, and the shim can still record the result.
    assert task["status"] in {"killed", "lost"} or task["signal"] == "SIGKILL", task
    again = daemon.sh("echo good", env="two")
    assert daemon.ended(again)["status"] == "finished"
