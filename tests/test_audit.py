"""The audit log: one line each, whole, in order, whatever happens."""

import json
import multiprocessing
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given
from hypothesis import strategies as st

from pulsar_api.auth import audit
from pulsar_api.auth.audit import AuditLog
from pulsar_api.auth.rights import Caller

JOE = Caller("joe", "192.0.2.1", "static")


def log_in(folder: Path, max_size: int = audit.MAX_SIZE) -> AuditLog:
    """Return a log; it is always the same moment."""
    return AuditLog(folder / "audit.log", lambda: 1_700_000_000.0, max_size)


def test_an_entry_has_all_that_is_promised(tmp_path: Path) -> None:
    """When, who, from where, by which means, what, allowed or not, and more."""
    log = log_in(tmp_path)
    log.write(JOE, "kill", allowed=False, app="site", task=47)
    assert list(log.read()) == [
        {
            "at": "2023-11-14T22:13:20.000Z",
            "who": "joe",
            "from": "192.0.2.1",
            "means": "static",
            "what": "kill",
            "allowed": False,
            "app": "site",
            "task": 47,
        }
    ]
    assert (tmp_path / "audit.log").stat().st_mode & 0o777 == 0o600


@given(text=st.text(st.characters(exclude_categories=[]), max_size=400))
def test_whatever_is_written_is_one_line(text: str) -> None:
    """Newlines, half characters and all; long texts are shortened."""
    with TemporaryDirectory() as folder:
        log = log_in(Path(folder))
        log.write(JOE, "run", allowed=True, action=text)
        log.write(JOE, "run", allowed=True, action="last")
        lines = (Path(folder) / "audit.log").read_bytes().split(b"\n")
        assert len(lines) == 3
        first, last = log.read()
        kept = text[:300].encode("utf-8", "replace").decode()
        assert first["action"] == kept
        assert last["action"] == "last"


def test_a_large_file_is_set_aside_and_few_are_kept(tmp_path: Path) -> None:
    """What is read is the newest of it, in order, nothing twice."""
    log = log_in(tmp_path, max_size=1000)
    for number in range(200):
        log.write(JOE, "run", allowed=True, task=number)
    names = {path.name for path in tmp_path.iterdir()}
    assert names <= {"audit.log", *(f"audit.log.{n}" for n in range(1, audit.KEPT + 1))}
    tasks = [entry["task"] for entry in log.read()]
    assert tasks == list(range(200 - len(tasks), 200))
    assert len(tasks) > 40
    assert all(path.stat().st_size < 1400 for path in tmp_path.iterdir())


def _write_many(folder: Path, name: str) -> None:
    log = log_in(folder)
    for number in range(300):
        log.write(Caller(name, "", ""), "run", allowed=True, task=number, more="x" * 250)


def test_two_programs_write_without_harm_to_each_other(tmp_path: Path) -> None:
    """The daemon and the command line, at the same time."""
    spawn = multiprocessing.get_context("spawn")
    writers = [spawn.Process(target=_write_many, args=(tmp_path, n)) for n in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        writer.close()
    entries = list(log_in(tmp_path).read())
    for name in "ab":
        mine = [entry["task"] for entry in entries if entry["who"] == name]
        assert mine == list(range(300))


def test_what_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    """It is in the daemon's own log; a damaged line is passed over when it is read."""
    log = log_in(tmp_path / "nothing")
    log.write(JOE, "kill", allowed=True)
    assert list(log.read()) == []
    good = log_in(tmp_path)
    (tmp_path / "audit.log").write_bytes(b"\xff\n[1]\n{\n" + json.dumps({"a": 1}).encode())
    assert list(good.read()) == [{"a": 1}]
