"""Tests of sessions, passwords, tokens, limits on guesses, and the audit log."""

import base64
import errno
import json
import os
import sqlite3
import threading
import time
from http.client import HTTPResponse, IncompleteRead
from pathlib import Path
from typing import Any

import pytest

from pulsar_api.cli import admin
from pulsar_api.cli.parser import parser
from pulsar_api.tasks.secret_forms import PATTERNS
from tests.integration import zygote
from tests.integration.conftest import Script, Start
from tests.integration.daemon import (
    PATIENCE,
    PULSAR_API,
    Answer,
    Daemon,
    Poll,
    problem,
    wait_for,
)
from tests.integration.sockjs import SOCKJS, Transport

FORM = {"Content-Type": "application/x-www-form-urlencoded"}
PASSWORD = "correct horse"


@pytest.fixture
def static(start: Start, tmp_path: Path) -> Daemon:
    """Return a daemon with one user."""
    (tmp_path / "password").write_text(PASSWORD + "\n")
    return start(
        *("--auth-provider", "static", "--auth-username", "joe"),
        *("--auth-password-file", str(tmp_path / "password"), "--command", "sleep 600"),
    )


def command(daemon: Daemon, *arguments: str) -> str:
    """Return what ``pulsar-api`` says about a daemon's state."""
    done = zygote.run(
        [*PULSAR_API, *arguments, "--state-dir", str(daemon.state)],
        check=True,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    text: str = done.stdout
    return text


def audit(daemon: Daemon, *options: str) -> list[dict[str, Any]]:
    """Return the audit log."""
    text = command(daemon, "audit", "--json", *options)
    return [json.loads(line) for line in text.splitlines()]


def basic(user: str = "joe", password: str = PASSWORD) -> dict[str, str]:
    """Return the header of Basic authentication."""
    text = base64.b64encode(f"{user}:{password}".encode()).decode()
    return {"Authorization": f"Basic {text}"}


def bearer(token: str) -> dict[str, str]:
    """Return the header of a Bearer token."""
    return {"Authorization": f"Bearer {token}"}


def sign_in(daemon: Daemon, body: str, **headers: str) -> Answer:
    """Send the form of the sign-in."""
    return daemon.request("POST", "/login", body, {**FORM, **headers})


def session_of(answer: Answer) -> dict[str, str]:
    """Return the cookie that an answer sets."""
    assert answer.status == 303, answer.body
    return {"Cookie": answer.headers["Set-Cookie"].partition(";")[0]}


JOE = "user=joe&password=correct+horse"


def test_basic_authentication_needs_the_exact_user_and_password(static: Daemon) -> None:
    """Any other pair answers 401."""
    assert static.get("/tasks", **basic()).status == 200
    wrong = [("joe", ""), ("joe", "correct"), ("Joe", PASSWORD), ("", PASSWORD), ("x", "y")]
    for number, pair in enumerate([*wrong, ("joe", PASSWORD + "\n"), ("joe", "\0")]):
        source = f"127.3.0.{number + 1}"
        answer = static.request("GET", "/tasks", None, basic(*pair), source)
        problem(answer, 401)


def test_ten_wrong_passwords_in_a_minute_answer_429(static: Daemon) -> None:
    """The limit is for an address. Credentials that were accepted before still work."""
    assert static.get("/tasks", **basic()).status == 200
    source = "127.3.1.1"
    for number in range(10):
        headers = basic("joe", f"guess {number}")
        assert static.request("GET", "/tasks", None, headers, source).status == 401
    for headers in (basic("joe", "guess 11"), basic("joe", "guess 1")):
        answer = static.request("GET", "/tasks", None, headers, source)
        assert problem(answer, 429)["type"].endswith(":too-many-failures")
        assert 0 < int(answer.headers["Retry-After"]) <= 60
    # The form shows a page with the reason.
    form = static.request("POST", "/login", "user=joe&password=x", FORM, source)
    assert (form.status, form.headers["Content-Type"]) == (429, "text/html; charset=utf-8")
    assert b"try again in" in form.body
    assert 0 < int(form.headers["Retry-After"]) <= 60
    assert static.request("GET", "/tasks", None, basic(), source).status == 200
    assert static.request("GET", "/tasks", None, basic("x", "y"), "127.3.1.2").status == 401


def test_a_new_valid_password_after_ten_wrong_ones_answers_429(static: Daemon) -> None:
    """Otherwise a guesser could tell a right password from a wrong one."""
    source = "127.3.1.3"
    for number in range(10):
        static.request("GET", "/tasks", None, basic("joe", f"{number}"), source)
    problem(static.request("GET", "/tasks", None, basic(), source), 429)


@pytest.mark.parametrize("tls", [False, True])
def test_the_session_of_a_browser(start: Start, tmp_path: Path, tls: bool) -> None:  # noqa: FBT001
    """Its cookie has all flags. It survives a restart and ends at the sign-out."""
    (tmp_path / "password").write_text(PASSWORD)
    daemon = start(
        *("--auth-provider", "static", "--auth-username", "joe"),
        *("--auth-password-file", str(tmp_path / "password"), "--command", "true"),
        *(("--dev", "--port", "0") if tls else ()),
    )
    page = daemon.get("/login?next=/web/job/1")
    assert page.status == 200
    assert b'value="/web/job/1"' in page.body
    answer = sign_in(daemon, f"{JOE}&next=/web/job/1")
    assert answer.headers["Location"] == "/web/job/1"
    cookie = answer.headers["Set-Cookie"]
    flags = {part.strip() for part in cookie.split(";")[1:]}
    usual = {"Path=/", "Max-Age=604800", "HttpOnly", "SameSite=lax"}
    assert flags == usual | ({"Secure"} if tls else set())
    assert cookie.startswith("__Host-pulsar=" if tls else "pulsar=")
    session = session_of(answer)
    assert daemon.get("/web/job/1", **session).status == 200
    assert daemon.get("/login/me", **session).json()["user"] == "joe"
    assert answer.headers["Cache-Control"] == "no-store"
    daemon.process.terminate()
    daemon.process.wait(PATIENCE)
    daemon.start()
    assert daemon.get("/login/me", **session).json()["user"] == "joe"
    other = session_of(sign_in(daemon, JOE))
    third = session_of(sign_in(daemon, JOE))
    assert len({session["Cookie"], other["Cookie"], third["Cookie"]}) == 3
    left = daemon.request("POST", "/logout", headers=session)
    assert left.headers["Location"] == "/login"
    assert "Max-Age=0" in left.headers["Set-Cookie"]
    problem(daemon.get("/login/me", **session), 401)
    assert daemon.get("/login/me", **other).status == 200
    daemon.request("POST", "/logout?everywhere=1", headers=other)
    for one in (other, third):
        problem(daemon.get("/login/me", **one), 401)
    means = {(e["what"], e["means"], e["allowed"]) for e in audit(daemon, "--user", "joe")}
    assert ("sign-in", "static", True) in means
    assert ("sign-out", "session", True) in means


def test_a_sign_in_ignores_the_session_id_of_the_browser(static: Daemon) -> None:
    """An id that an attacker has set does not become a session (session fixation)."""
    planted = {"Cookie": "pulsar=" + "x" * 43}
    session = session_of(sign_in(static, JOE, **planted))
    assert session != planted
    problem(static.get("/login/me", **planted), 401)
    # An earlier id of the same user ends too, as somebody could have seen it.
    again = session_of(sign_in(static, JOE, **session))
    problem(static.get("/login/me", **session), 401)
    assert static.get("/login/me", **again).status == 200


@pytest.mark.parametrize("path", ["/web/", "/web/job/7", "/pulsar/index.html"])
def test_pages_are_the_same_for_every_credential(static: Daemon, path: str) -> None:
    """A request without any credential is redirected to the sign-in."""
    answer = static.get(path)
    assert answer.status == 303
    target = path.replace("/", "%2F")
    assert answer.headers["Location"] == f"/login?next={target}"
    session = session_of(sign_in(static, JOE))
    shown = [session, basic(), basic("joe", "wrong"), bearer("x"), {"Cookie": "pulsar=x"}]
    answers = [static.get(path, **headers) for headers in shown]
    assert [answer.status for answer in answers] == [200] * 5
    assert len({answer.body for answer in answers}) == 1
    # The daemon did not check the credentials, so it counted no guess.
    assert "sign-in" not in {e["what"] for e in audit(static, "--refused")}


def test_a_wrong_sign_in_answers_403_with_the_form(static: Daemon) -> None:
    """It sets no cookie and does not repeat the input."""
    answer = sign_in(static, "user=%3Cb%3E&password=%3Ci%3E&next=//evil.example")
    assert answer.status == 403
    assert answer.headers["Set-Cookie"] is None
    assert b"<b>" not in answer.body
    assert b"evil" not in answer.body
    problem(
        static.request("POST", "/login", "{}", {"Content-Type": "application/json"}), 415
    )


def test_the_state_holds_no_secret_in_clear(static: Daemon) -> None:
    """No file has a session id, password or token. Other users cannot read the files."""
    session = session_of(sign_in(static, JOE))
    token = command(static, "token", "create", "ci", "--may", "read").strip()
    assert static.get("/tasks", **bearer(token)).status == 200
    static.process.terminate()
    static.process.wait(PATIENCE)
    secrets = [session["Cookie"].partition("=")[2], PASSWORD, token]
    for path in static.state.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert not [s for s in secrets if s.encode() in data], path
    for name in ("auth.db", "audit.log"):
        assert (static.state / name).stat().st_mode & 0o777 == 0o600
    assert not [s for s in secrets if s in static.log.read_text()]


def test_tokens_are_created_and_revoked_while_the_daemon_runs(static: Daemon) -> None:
    """The list has the last use. Expired tokens are refused."""
    token = command(
        static, "token", "create", "ci", "--may", "run", "--on", "shop/*", "--expires", "9"
    ).strip()
    old = command(
        static, "token", "create", "old", "--may", "read", "--expires", "2020-01-01"
    )
    assert static.get("/login/me", **bearer(token)).json()["user"] == "token:ci"
    problem(static.get("/tasks", **bearer(old.strip())), 401)
    made = static.request("POST", "/shop/p?action=x", None, bearer(token))
    assert made.status == 200
    problem(static.request("POST", "/blog/p?action=x", None, bearer(token)), 403)
    task = static.get(f"/task/{made.json()['id']}", **bearer(token)).json()
    assert task["user"] == "token:ci"
    found = [
        json.loads(line)
        for line in command(static, "token", "list", "--json").split("\n")
        if line
    ]
    assert [(t["name"], t["may"], t["on"]) for t in found] == [
        ("ci", ["run"], ["shop/*"]),
        ("old", ["read"], ["*"]),
    ]
    assert found[0]["used"] is not None
    assert found[1]["used"] is None
    command(static, "token", "revoke", "ci")

    def out() -> bool:
        return static.get("/tasks", **bearer(token)).status == 401

    wait_for(out, "the end of the token")
    what = [entry["what"] for entry in audit(static) if entry["means"] == "command line"]
    assert what == ["token create", "token create", "token revoke"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("create", "UPPER"),
        ("create", "../x"),
        ("create", "x" * 65),
        ("create", "x", "--may", "fly"),
        ("create", "x", "--may", "read", "--on", "a b"),
        ("create", "x", "--on", "shop"),
        ("revoke", "nobody"),
    ],
)
def test_invalid_arguments_for_tokens_are_reported(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    """The error has one line, and no token is created."""
    (tmp_path / "lock").touch()
    done = zygote.run(
        [*PULSAR_API, "token", *arguments, "--state-dir", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("pulsar-api: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.needs("root")
def test_only_the_owner_of_the_state_can_create_a_token(tmp_path: Path) -> None:
    """Root would leave files that the daemon cannot write."""
    (tmp_path / "lock").touch()
    os.chown(tmp_path, 12345, 12345)
    done = zygote.run(
        [*PULSAR_API, "token", "create", "x", "--state-dir", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "lock"]


def test_commands_for_operators_find_the_state_folder_in_the_settings(
    static: Daemon, tmp_path: Path
) -> None:
    """An operator need not repeat the options of the daemon."""
    settings = tmp_path / "pulsar-api.toml"
    settings.write_text(f'state-dir = "{static.state}"\nport = 1\n')
    for command in (("token", "create", "ci"), ("token", "list"), ("audit",)):
        done = zygote.run(
            [*PULSAR_API, *command, "--config", str(settings)],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout
    assert "token create" in done.stdout


@pytest.mark.parametrize("command", ["audit", "token list", "token create x", "end-tasks"])
def test_a_folder_without_a_daemon_is_refused(tmp_path: Path, command: str) -> None:
    """An empty list would look as if nothing had happened."""
    for options in (
        ("--state-dir", str(tmp_path)),
        ("--config", str(tmp_path / "pulsar-api.toml")),
    ):
        (tmp_path / "pulsar-api.toml").write_text(f'state-dir = "{tmp_path}"\n')
        done = zygote.run(
            [*PULSAR_API, *command.split(), *options],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        expected = f"pulsar-api: {tmp_path} is not the state folder of a daemon"
        assert done.stderr.startswith(expected)
        assert done.stderr.count("\n") == 1
        assert [p.name for p in tmp_path.iterdir()] == ["pulsar-api.toml"]


def test_a_folder_of_another_user_is_reported(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Usually only that user can read it."""

    def forbidden(_: Path) -> bool:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "lock")

    monkeypatch.setattr(Path, "exists", forbidden)
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    given = parser().parse_args(["token", "list", "--state-dir", str(tmp_path)])
    assert admin.run(given, time.time) == 1
    expected = f"pulsar-api: {tmp_path} belongs to another user; run the command as that"
    assert capsys.readouterr().err.startswith(expected)


def is_cut(response: HTTPResponse) -> bool:
    """Return whether a stream is cut before its end. It waits for that."""
    try:
        response.read()
    except (IncompleteRead, OSError):
        return True
    return False


class Streams:
    """Everything that stays open: a log, events and long-polls."""

    def __init__(self, daemon: Daemon, number: int, headers: dict[str, str]) -> None:
        self.daemon = daemon
        paths = [f"/task/{number}/log?follow=1", f"/task/{number}/events", "/events"]
        self.open = []
        for path in paths:
            connection = daemon.connect(4 * PATIENCE)
            connection.request("GET", path, headers=headers)
            self.open.append((path, connection, connection.getresponse()))
        daemon.headers = headers
        self.polls = [Poll(daemon, p) for p in ("/tasks/created", f"/task/{number}/output")]
        daemon.headers = {}

    def all_ended(self) -> None:
        """Wait until all of them are cut."""
        for path, connection, response in self.open:
            assert is_cut(response), path
            connection.close()
        for poll in self.polls:
            with pytest.raises(ConnectionError):
                poll.answer()


def test_streams_end_when_their_token_is_revoked(static: Daemon) -> None:
    """Long-polls end too. Streams of other callers continue."""
    token = command(static, "token", "create", "ci", "--may", "run").strip()
    number = static.request("POST", "/shop/p?action=x", None, bearer(token)).json()["id"]
    task = f"/task/{number}?output=none"
    wait_for(lambda: static.get(task, **bearer(token)).json()["pid"], "its start")
    session = session_of(sign_in(static, f"user=&password={token}"))
    by_token = Streams(static, number, bearer(token))
    by_session = Streams(static, number, session)
    other = static.connect()
    other.request("GET", f"/task/{number}/events", headers=basic())
    others = other.getresponse()
    command(static, "token", "revoke", "ci")
    by_token.all_ended()
    by_session.all_ended()
    assert others.readline().startswith(b"retry")
    other.close()
    for shown in (bearer(token), session):
        problem(static.get("/tasks", **shown), 401)


@pytest.mark.parametrize("transport", SOCKJS)
def test_a_socket_ends_when_its_token_is_revoked(
    static: Daemon, transport: type[Transport]
) -> None:
    """The last frame has the reason."""
    token = command(static, "token", "create", "ci", "--may", "run").strip()
    with transport(static, {}) as socket:
        socket.say(json.dumps({"token": token}))
        heard = threading.Event()

        def create() -> None:
            while not heard.wait(0.05):
                static.request("POST", "/site/p?action=x", None, basic())

        thread = threading.Thread(target=create)
        thread.start()
        try:
            while not (socket.frame() or "c").startswith(("a", "c")):
                pass
        finally:
            heard.set()
            thread.join()
        command(static, "token", "revoke", "ci")
        assert socket.last() == 'c[403,"Access denied"]'


def test_the_audit_log_has_callers_and_actions(static: Daemon) -> None:
    """Refused requests are in it too. Passwords and tokens are not."""
    token = command(static, "token", "create", "ci", "--may", "read").strip()
    number = static.request("POST", "/shop/p?action=x", None, basic()).json()["id"]
    problem(static.get(f"/task/{number}/kill", **bearer(token)), 403)
    assert static.request("POST", f"/task/{number}/kill", None, basic()).status == 200
    static.request("GET", "/tasks", None, basic("joe", "wrong"), "127.3.2.1")
    static.request("GET", "/tasks", None, basic(f"ghp_{'x' * 36}", "wrong"), "127.3.2.1")
    entries = [e for e in audit(static) if e["means"] != "command line"]
    seen = [
        (e["who"], e["from"], e["what"], e["allowed"], e.get("task"), e.get("user"))
        for e in entries
    ]
    assert seen == [
        ("joe", "127.0.0.1", "run", True, number, None),
        ("token:ci", "127.0.0.1", "kill", False, number, None),
        ("joe", "127.0.0.1", "kill", True, number, None),
        (None, "127.3.2.1", "sign-in", False, None, "joe"),
        (None, "127.3.2.1", "sign-in", False, None, None),
    ]
    assert [e["what"] for e in audit(static, "--refused", "--limit", "2")] == [
        "sign-in"
    ] * 2
    text = command(static, "audit")
    assert "joe (static, 127.0.0.1)  run  shop/p/x  task 1" in text
    assert (PASSWORD in text, token in text) == (False, False)


def test_the_audit_log_has_requests_for_lists_of_actions(
    start: Start, repo: Path, script: Script
) -> None:
    """A refusal names the missing right."""
    script("deploy", "#!/bin/sh\n")
    daemon = start(
        *("--auth-provider", "tokens"),
        *("--command", "scripts", "--config-repo", str(repo)),
    )
    for name, on in (("ci", "site"), ("other", "shop")):
        token = command(daemon, "token", "create", name, "--may", "run", "--on", on)
        answer = daemon.get("/site/prod/tasks", **bearer(token.strip()))
        assert answer.status == (200 if name == "ci" else 403)
    seen = [
        (e["who"], e["from"], e["what"], e["app"], e["env"], e["allowed"])
        for e in audit(daemon)
        if e["means"] != "command line"
    ]
    assert seen == [
        ("token:ci", "127.0.0.1", "list", "site", "prod", True),
        ("token:other", "127.0.0.1", "run", "site", "prod", False),
    ]
    assert "token:ci (token, 127.0.0.1)  list  site/prod\n" in command(daemon, "audit")


def test_a_proxy_gives_the_address_of_a_request(start: Start, tmp_path: Path) -> None:
    """The daemon believes only the proxies in the settings."""
    config = tmp_path / "config.toml"
    config.write_text('auth-provider = "tokens"\nproxies = ["127.0.0.1"]\n')
    daemon = start("--config", str(config), "--command", "true")
    wrong = bearer("pulsar_wrong")
    for source, said, heard in (
        (None, "192.0.2.1", "192.0.2.1"),
        (None, "6.6.6.6, 192.0.2.2", "192.0.2.2"),
        (None, "192.0.2.3, 127.0.0.1", "192.0.2.3"),
        (None, "x<script>", "127.0.0.1"),
        ("127.3.3.1", "192.0.2.4", "127.3.3.1"),
    ):
        headers = {**wrong, "X-Forwarded-For": said}
        daemon.request("GET", "/tasks", None, headers, source)
        assert audit(daemon)[-1]["from"] == heard


@pytest.mark.parametrize("asked", [True, False])
def test_a_page_gets_its_caller_and_settings(
    start: Start,
    tmp_path: Path,
    asked: bool,  # noqa: FBT001
) -> None:
    """These are the user, the means, the rights, and targets that need a confirmation."""
    config = tmp_path / "config.toml"
    provider = 'auth-provider = "tokens"\n' if asked else ""
    config.write_text(provider + 'confirm = ["*/production", "shop/x/drop"]\n')
    daemon = start("--config", str(config), "--command", "true")
    confirm = ["*/production/*", "shop/x/drop"]
    if not asked:
        for headers in ({}, {"Cookie": f"pulsar={'x' * 43}"}, bearer("x")):
            assert daemon.get("/login/me", **headers).json() == {
                "user": None,
                "means": "anonymous",
                "rights": [{"may": ["admin", "kill", "read", "run"], "on": ["*/*/*"]}],
                "signedIn": False,
                "confirm": confirm,
                "secret": list(PATTERNS),
            }
        return
    token = command(
        daemon, "token", "create", "ci", "--may", "run", "--on", "shop/*"
    ).strip()
    me = {
        "user": "token:ci",
        "means": "token",
        "rights": [{"may": ["read", "run"], "on": ["shop/*/*"]}],
        "signedIn": False,
        "confirm": confirm,
        "secret": list(PATTERNS),
    }
    assert daemon.get("/login/me", **bearer(token)).json() == me
    session = session_of(sign_in(daemon, f"user=&password={token}"))
    signed_in = {**me, "means": "token session", "signedIn": True}
    assert daemon.get("/login/me", **session).json() == signed_in
    # A token in the header takes precedence over the cookie.
    assert daemon.get("/login/me", **session, **bearer(token)).json() == me


def test_without_authentication_credentials_are_ignored(start: Start) -> None:
    """The audit log has the address."""
    daemon = start("--command", "true")
    assert daemon.get("/tasks", **bearer("x")).status == 200
    number = daemon.run("site", "p", "x")
    assert daemon.task(number)["user"] is None
    assert audit(daemon)[0]["from"] == "127.0.0.1"
    assert daemon.get("/login/me").json()["user"] is None
    problem(sign_in(daemon, JOE), 400, "login")
    with sqlite3.connect(daemon.state / "auth.db") as db:
        assert db.execute("SELECT count(*) FROM session").fetchone() == (0,)
    db.close()
