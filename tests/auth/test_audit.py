"""Tests of the audit log: complete lines, in order, whatever happens."""

import json
import multiprocessing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.task import Clock

from pulsar_api.auth import audit
from pulsar_api.auth.audit import AuditLog
from pulsar_api.auth.rights import Caller
from tests.fakes import person

JOE = Caller(person("joe"), "192.0.2.1", "static")


def log_in(folder: Path, max_size: int = audit.MAX_SIZE) -> AuditLog:
    """Return a log whose clock stands still."""
    return AuditLog(folder / "audit.log", lambda: 1_700_000_000.0, max_size)


def test_an_entry_has_all_documented_fields(tmp_path: Path) -> None:
    """They tell when, who, from where, by which means, what and whether it was allowed."""
    log = log_in(tmp_path)
    log.write(JOE, "kill", allowed=False, app="site", task=47)
    assert list(log.read()) == [
        {
            "at": "2023-11-14T22:13:20.000Z",
            "who": "joe",
            "principal": "static:joe",
            "from": "192.0.2.1",
            "means": "static",
            "what": "kill",
            "allowed": False,
            "app": "site",
            "task": 47,
        }
    ]
    log.write(JOE, "kill", allowed=True)
    for name in ("audit.log", "audit-access.log"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600


@given(text=st.text(st.characters(exclude_categories=[]), max_size=400))
def test_each_entry_is_one_line(text: str) -> None:
    """It can contain line ends and lone surrogates. Long texts are shortened."""
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


def test_a_large_file_is_rotated_and_few_are_kept(tmp_path: Path) -> None:
    """The log returns the newest entries in order, without repetitions."""
    log = log_in(tmp_path, max_size=1000)
    for number in range(200):
        log.write(JOE, "run", allowed=True, task=number)
    names = {path.name for path in tmp_path.iterdir()}
    assert names <= {
        "audit.log",
        *(f"audit.log.{n}" for n in range(1, audit.MAX_OLD_FILES + 1)),
    }
    tasks = [entry["task"] for entry in log.read()]
    assert tasks == list(range(200 - len(tasks), 200))
    assert len(tasks) > 40
    assert all(path.stat().st_size < 1400 for path in tmp_path.iterdir())


def _write_many(folder: Path, name: str) -> None:
    log = log_in(folder)
    for number in range(300):
        log.write(
            Caller(person(name), "", ""), "run", allowed=True, task=number, more="x" * 250
        )


@pytest.mark.parametrize(
    ("what", "allowed", "changed"),
    [
        ("sign-in", True, True),
        ("sign-out", True, True),
        ("sign-in", False, True),
        ("kill", False, True),
        ("kill", True, False),
    ],
)
def test_actions_are_never_displaced(
    tmp_path: Path,
    what: str,
    allowed: bool,  # noqa: FBT001
    changed: bool,  # noqa: FBT001
) -> None:
    """No number of sign-ins, refusals and requests without effect removes them."""
    clock = Clock()
    log = AuditLog(tmp_path / "audit.log", clock.seconds, max_size=1000)
    log.write(JOE, "run", allowed=True, task=1)
    for _ in range(20):
        clock.advance(60)
        for _ in range(audit.REFUSALS + 10):
            if changed:
                log.write(JOE, what, allowed=allowed)
            else:
                log.write_unchanged(JOE, what)
    clock.advance(1)
    log.write(JOE, "stop", allowed=True, task=1)
    found = [entry["what"] for entry in log.read()]
    assert (found[0], found[-1]) == ("run", "stop")
    assert len(found) > 40
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 14_000


def test_the_lines_of_a_user_per_minute_are_limited(tmp_path: Path) -> None:
    """One line for each kind counts the others. Other users have lines of their own."""
    clock = Clock()
    log = AuditLog(tmp_path / "audit.log", clock.seconds)
    eve = Caller(person("eve"), "192.0.2.2", "static")
    for number in range(1, audit.CHANGES + 6):
        log.write(JOE, "run", allowed=True, task=number)
    for _ in range(audit.VISITS + 3):
        log.write(JOE, "sign-in", allowed=True)
    log.write(eve, "sign-in", allowed=True)
    log.write(eve, "kill", allowed=True, task=7)
    clock.advance(60)
    log.write(JOE, "run", allowed=True, task=5000)
    assert next(entry for entry in log.read() if entry.get("task") == 5000)
    found = list(log.read())
    more = [entry for entry in found if entry["what"] == "more of it"]
    assert [(e["who"], e["allowed"], e["times"], e.get("tasks")) for e in more] == [
        ("joe", True, 5, [audit.CHANGES + 1, audit.CHANGES + 5]),
        ("joe", True, 3, None),
    ]
    assert [entry["what"] for entry in found if entry["who"] == "eve"] == [
        "kill",
        "sign-in",
    ]
    assert len(found) == audit.CHANGES + audit.VISITS + 5


def test_two_programs_can_write_at_once(tmp_path: Path) -> None:
    """They are the daemon and the command line."""
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


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    """The daemon's own log has the error. Damaged lines are skipped on reading."""
    log = log_in(tmp_path / "nothing")
    log.write(JOE, "kill", allowed=True)
    assert list(log.read()) == []
    good = log_in(tmp_path)
    (tmp_path / "audit.log").write_bytes(b"\xff\n[1]\n{\n" + json.dumps({"a": 1}).encode())
    assert list(good.read()) == [{"a": 1}]
