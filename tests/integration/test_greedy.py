"""Clients that want more than their share: sign-ins, bodies, lists and searches."""

import os
import socket
import sqlite3
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from pulsar_api.auth import records
from pulsar_api.auth.audit import FILE, VISITS, AuditLog
from tests.integration.conftest import Start
from tests.integration.daemon import Answer, Daemon, next_answer, wait_for
from tests.integration.others import Times, others

FULL = bool(os.environ.get("PULSAR_HOSTILE"))
"""Whether to attack as hard as is promised to be borne, and to judge how fast it is."""
SECONDS = 10 if FULL else 1
SESSIONS = 300_000 if FULL else 2_000
MIB = 1 << 20
FLAT = 16 * MIB
"""Bytes that the daemon's memory may grow by in the end."""
SLOWEST = 0.1
"""Seconds within which 99 of 100 small requests of others are answered meanwhile."""

TOKENS = ("--command", "true", "--auth-provider", "tokens")


def new_tokens(
    daemon: Daemon, names: Sequence[str], right: str = "admin", on: str = "*"
) -> list[dict[str, str]]:
    """Return the headers that show new tokens; the daemon has not seen them yet."""
    secrets = [records.PREFIX + records.new_secret() for _ in names]
    with records.opened(daemon.state / records.FILE) as db:
        for name, secret in zip(names, secrets, strict=True):
            token = records.Token(name, (right,), (on,), time.time())
            records.add_token(db, token, secret)
    return [{"Authorization": f"Bearer {secret}"} for secret in secrets]


def begin(sock: socket.socket, method: str, path: str, **headers: str) -> None:
    """Send the head of a request."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    sock.sendall("\r\n".join([*lines, "", ""]).encode())


def test_many_right_tokens_at_once_are_all_let_in(start: Start) -> None:
    """429 is for wrong ones: nobody here has shown any."""
    daemon = start(*TOKENS)
    headers = new_tokens(daemon, [f"bot{n}" for n in range(60)])
    with ExitStack() as stack:
        socks = [stack.enter_context(closing(daemon.open_socket())) for _ in headers]
        for sock, shown in zip(socks, headers, strict=True):
            begin(sock, "GET", "/tasks?limit=1", **shown)
        assert [next_answer(sock).status for sock in socks] == [200] * len(headers)


def report(what: str, idle: Times, busy: Times) -> None:
    """Print figures, for who wants to see them."""
    print(f"{what}: {busy} (idle: p99 {idle.p99 * 1e3:.1f} ms)")


def calm(idle: Times, busy: Times) -> bool:
    """Return whether others were served in time, be it a machine that does much else."""
    return not FULL or busy.p99 < max(SLOWEST, 5 * idle.p99)


# -- sign-ins

FORM = {"Content-Type": "application/x-www-form-urlencoded"}


def fill_sessions(path: Path, user: str, number: int) -> None:
    """Write sessions of a user as if they had signed in so often."""
    now = time.time()
    rows = ((f"{n:064d}", user, now - 100 - n / 1e3) for n in range(number))
    with closing(sqlite3.connect(path)) as db, db:
        db.executemany("INSERT INTO session VALUES (?, ?, x'00', ?3, ?3)", rows)


def sessions(path: Path) -> int:
    """Return how many sessions are kept."""
    with closing(sqlite3.connect(path)) as db:
        found: int = db.execute("SELECT count(*) FROM session").fetchone()[0]
        return found


def test_one_user_who_signs_in_without_end_disturbs_nobody(start: Start) -> None:
    """Old sessions of theirs end; what was done to tasks stays in the audit log."""
    daemon = start(
        *("--command", "true", "--auth-provider", "static"),
        *("--auth-username", "joe", "--auth-password", "hunter2"),
    )
    (bot,) = new_tokens(daemon, ["bot"])
    daemon.headers = bot
    daemon.ended(daemon.run("site", "prod", "deploy"))
    daemon.stop()
    auth = daemon.state / records.FILE
    fill_sessions(auth, "joe", SESSIONS)
    daemon.start()
    with others(daemon, "/login/me", bot) as idle:
        time.sleep(1)
    memory = daemon.memory()
    signed_in = 0
    with others(daemon, "/login/me", bot) as busy, closing(daemon.connect()) as connection:
        until = time.monotonic() + SECONDS
        while time.monotonic() < until or signed_in < 2 * VISITS:
            connection.request("POST", "/login", "user=joe&password=hunter2", FORM)
            answer = Answer(connection.getresponse())
            assert answer.status == 303
            signed_in += 1
    cookie = {"Cookie": answer.headers["Set-Cookie"].partition(";")[0]}
    daemon.headers = {}
    assert daemon.get("/login/me", **cookie).json()["signedIn"]
    wait_for(lambda: sessions(auth) == records.MOST_SESSIONS, "the old sessions to end")
    report(f"{signed_in} sign-ins among {SESSIONS} sessions", idle, busy)
    assert calm(idle, busy)
    assert daemon.memory() - memory < FLAT
    log = AuditLog(daemon.state / FILE, time.time)
    daemon.stop()
    found = [entry["what"] for entry in log.read()]
    assert found[0] == "run"
    assert found.count("sign-in") < signed_in
    assert sum(entry.get("times", 1) for entry in log.read()) == signed_in + 1
