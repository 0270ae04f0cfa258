"""Tests of secrets in a daemon: tasks get them, readers and files do not."""

import base64
import json
import os
import stat
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from pulsar_api.tasks.secret_forms import forms
from tests.integration.conftest import Script, Start
from tests.integration.daemon import SHELL, Daemon, problem, wait_for

TOKEN = "gh/p+Zk3 é\"x'-4815162342"
KEY = "-----BEGIN KEY-----\nMC4CAQAwBQYDK2Vw/+BCIEIGk\n-----END KEY-----"
SECRETS = {"github_TOKEN": TOKEN, "deploy-key": KEY}

# Prints it in every form, cut in two, to both streams, and without an end of line.
PRINT = """
import base64, json, os, sys, time, urllib.parse
for name in ("github_TOKEN", "deploy-key"):
    value = os.environ["PULSAR_VAR_" + name]
    data = value.encode()
    for text in (
        data,
        base64.b64encode(data),
        base64.b64encode(b"user:" + data),
        base64.urlsafe_b64encode(b"u:" + data + b":x-oauth-basic"),
        urllib.parse.quote(value, safe="").encode(),
        urllib.parse.urlencode({"a": value}).encode(),
        json.dumps([value]).encode(),
        json.dumps([value], ensure_ascii=False).encode(),
    ):
        os.write(1, b"begin " + text[:9])
        os.write(2, text + b" on stderr\\n")
        time.sleep(0.003)
        os.write(1, text[9:] + b" end\\n")
os.write(1, b"last line: " + os.environ["PULSAR_VAR_github_TOKEN"].encode())
"""


def check_clean(data: bytes, where: str) -> None:
    """Fail if any form of a secret is in some bytes."""
    for text in forms(SECRETS.values()):
        assert text not in data, (where, text)


def create(daemon: Daemon, action: str, **more: object) -> dict[str, Any]:
    """Create a task with those secrets and return the answer."""
    value = {"action": action, "variables": {**SECRETS, "branch": "main"}, **more}
    answer = daemon.post("/site/production", value)
    assert answer.status == 200, answer.body
    check_clean(answer.body, "POST")
    found: dict[str, Any] = answer.json()
    return found


def files(folder: Path) -> dict[str, bytes]:
    """Return the contents of all files below a folder."""
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def python(script: Script, name: str, text: str) -> None:
    """Create an action that is a Python program."""
    script(name, f"#!/usr/bin/env python3\n{text}")


def test_no_reader_and_no_file_has_a_secret(
    daemon: Daemon, script: Script, tmp_path: Path
) -> None:
    """Every way to read is tried, while the task runs and after its end."""
    fifo = tmp_path / "go"
    os.mkfifo(fifo)
    wait = f"\nopen({str(fifo)!r}).read()\n"
    python(script, "deploy", PRINT + wait)
    session = "/websocket/000/reader/xhr"
    assert daemon.post(session).body == b"o\n"
    number = create(daemon, "deploy")["id"]
    wait_for(
        lambda: "end\nlast line" in daemon.task(number)["output"], "all but the held back"
    )
    task = daemon.task(number)
    assert task["variables"] == {**dict.fromkeys(SECRETS, "***"), "branch": "main"}
    folder = daemon.state / "tasks" / str(number)
    assert {"spec", "secrets"}.isdisjoint(path.name for path in folder.iterdir())
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            check_clean(process.read_bytes(), str(process))
        except OSError:
            continue  # the process has just ended
    reads = [
        f"/task/{number}",
        f"/task/{number}/output?since=1&timeout=1",
        *(f"/task/{number}/output?since=1&offset={at}&timeout=1" for at in (0, 5, 60)),
        f"/task/{number}/log",
        f"/task/{number}/log?times=1",
        *(f"/task/{number}/log?stream={name}" for name in ("stdout", "stderr")),
        "/tasks",
        "/tasks?output=full",
        "/tasks/created?since=0",
        "/jobs",
        f"/job/{number}",
    ]
    for path in reads:
        check_clean(daemon.get(path).body, path)
    with fifo.open("w"):
        pass
    daemon.ended(number)
    events = f"/task/{number}/events?offset=0"
    for path in (*reads, f"/task/{number}/log?follow=1", events):
        answer = daemon.get(path)
        assert answer.status == 200, path
        assert b"***" in answer.body, path
        check_clean(answer.body, path)
    seen = b""
    while b"job.close" not in seen:
        seen += daemon.post(session).body
    check_clean(seen, "SockJS")
    output = daemon.output_file(number).read_bytes()
    text = output.decode()
    assert text.endswith("last line: ***")
    counts = [text.count(part) for part in ("begin ", " on stderr\n", " end\n", "***")]
    assert counts == [16, 16, 16, 33]
    assert daemon.task(number)["outputSize"] == len(output)
    for path, data in files(daemon.folder).items():
        check_clean(data, path)


@pytest.mark.parametrize("cut", range(1, 30, 4))
def test_a_secret_printed_in_two_parts_is_masked(start: Start, cut: int) -> None:
    """The first part is held until the second comes. A part without a second is printed."""
    daemon = start("--command", SHELL)
    half, rest = TOKEN[:cut], TOKEN[cut:]
    assert rest or cut >= len(TOKEN)
    run = (
        "import os, time; v = os.environ['PULSAR_VAR_password'];"
        f"os.write(1, b'a' + v[:{cut}].encode()); time.sleep(0.1);"
        f"os.write(1, v[{cut}:].encode() + b'z' + v[:{cut}].encode())"
    )
    line = f'exec python3 -c "{run}"'
    number = daemon.sh(line, password=TOKEN)
    task = daemon.ended(number)
    assert task["status"] == "finished"
    expected = "a***z" + ("***" if cut >= len(TOKEN) else half)
    assert daemon.task(number)["output"] == expected


def test_a_waiting_task_gets_its_secrets_from_the_next_daemon(
    start: Start, repo: Path, script: Script, tmp_path: Path
) -> None:
    """The daemon is killed meanwhile. The values are in a file, which is then removed."""
    python(script, "block", f"open({str(tmp_path / 'block')!r}).read()")
    out = tmp_path / "seen"
    python(
        script,
        "deploy",
        "import os\n"
        f"open({str(out)!r}, 'w').write(os.environ['PULSAR_VAR_github_TOKEN'])\n"
        "print('it is', os.environ['PULSAR_VAR_github_TOKEN'])\n",
    )
    os.mkfifo(tmp_path / "block")
    options = ("--command", "scripts", "--config-repo", str(repo), "--max-running=1")
    daemon = start(*options)
    first = daemon.run("site", "production", "block")
    folder = daemon.state / "secrets"
    second = create(daemon, "deploy")["id"]
    [kept] = folder.iterdir()
    third = create(daemon, "deploy")["id"]
    [gone] = [path for path in folder.iterdir() if path != kept]
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert json.loads(kept.read_bytes()) == SECRETS
    daemon.kill()
    gone.unlink()
    for path, data in files(daemon.folder).items():
        if path != str(kept):
            check_clean(data, path)
    daemon.start()
    assert daemon.task(second)["status"] == "created"
    with (tmp_path / "block").open("w"):
        pass
    assert daemon.ended(first)["status"] == "finished"
    assert daemon.ended(second)["status"] == "finished"
    assert out.read_text() == TOKEN
    assert daemon.task(second)["output"] == "it is ***\n"
    lost = daemon.ended(third)
    assert (lost["status"], lost["startedAt"]) == ("failed", None)
    assert lost["reason"] == "Cannot start: the values of its secret variables are gone."
    assert list(daemon.state.glob("tasks/*/secrets*")) == []
    assert list(folder.iterdir()) == []
    for path, data in files(daemon.folder).items():
        check_clean(data, path)


def test_secrets_of_a_task_killed_while_waiting_are_removed(
    start: Start, repo: Path, script: Script
) -> None:
    """The task never starts, so it needs no secrets."""
    script("block", "#!/bin/sh\nexec sleep 600\n")
    daemon = start("--command=scripts", "--config-repo", str(repo), "--max-running=1")
    first = daemon.run("site", "production", "block")
    second = create(daemon, "block")["id"]
    daemon.get(f"/task/{second}/kill")
    assert daemon.ended(second)["status"] == "killed"
    assert list(daemon.state.glob("tasks/*/secrets")) == []
    daemon.get(f"/task/{first}/kill")
    daemon.ended(first)


def test_a_short_secret_is_not_masked_in_output_and_noted(start: Start) -> None:
    """The response has a note. The value is still in no variable of the task."""
    daemon = start("--command", SHELL)
    run = 'echo "$PULSAR_VAR_token $PULSAR_VAR_password"'
    variables = {"run": run, "token": "q7", "password": "long enough"}
    answer = daemon.post("/site/production", {"action": "run", "variables": variables})
    (note,) = answer.json()["notes"]
    assert note.startswith("variables.token: shorter than 4 characters")
    number = answer.json()["id"]
    daemon.ended(number)
    task = daemon.task(number)
    assert task["output"] == "q7 ***\n"
    assert task["variables"]["token"] == "***"
    plain = daemon.post("/site/production", {"action": "run", "variables": {"run": ":"}})
    assert set(plain.json()) == {"taskId", "id", "url"}
    daemon.ended(plain.json()["id"])


def test_a_request_can_mark_more_variables_as_secret(start: Start) -> None:
    """An unknown name in the list answers 400."""
    daemon = start("--command", SHELL)
    value = {"action": "run", "variables": {"run": "echo $PULSAR_VAR_pin", "pin": "31415"}}
    number = daemon.post("/a/b", {**value, "secret": ["pin"]}).json()["id"]
    daemon.ended(number)
    assert daemon.task(number)["output"] == "***\n"
    assert daemon.task(number)["variables"]["pin"] == "***"
    for wrong in (["pni"], "pin", [1], {"pin": True}):
        problem(daemon.post("/a/b", {**value, "secret": wrong}), 400, "secret")


def test_settings_name_the_secret_variables(start: Start, tmp_path: Path) -> None:
    """A list of patterns in the file replaces the default."""
    config = tmp_path / "config.toml"
    config.write_text('secret-variables = ["*pin*"]\n')
    daemon = start("--command", SHELL, "--config", str(config))
    number = daemon.sh(
        "echo $PULSAR_VAR_MyPin $PULSAR_VAR_password", MyPin=12345, password="abcd"
    )
    daemon.ended(number)
    assert daemon.task(number)["output"] == "*** abcd\n"


def test_a_restart_of_a_job_with_secrets_answers_409(start: Start) -> None:
    """The values are not stored. The response tells the caller to create a new task."""
    daemon = start("--command", SHELL)
    number = daemon.sh("exit 3", password=TOKEN)
    daemon.ended(number)
    refused = problem(daemon.post(f"/job/{number}/restart"), 409)
    assert refused["type"].endswith(":secrets-gone")
    assert "Create a new task" in refused["detail"]


def test_an_idempotency_key_does_not_compare_secrets(start: Start) -> None:
    """They are not stored. The rest of the request must be the same."""
    daemon = start("--command", SHELL)
    key = {"Content-Type": "application/json", "Idempotency-Key": "k"}

    def post(password: str, run: str) -> Any:
        value = {"action": "run", "variables": {"run": run, "password": password}}
        return daemon.request("POST", "/a/b", json.dumps(value), key)

    first = post("first one", "true").json()["id"]
    assert post("another", "true").json()["id"] == first
    problem(post("first one", "false"), 422)
    daemon.ended(first)


def test_pulsar_0_3_gets_secrets_as_masked_arguments(start: Start, tmp_path: Path) -> None:
    """It has no other way to get them. The command and the output show a mask."""
    program = tmp_path / "bin" / "pulsar"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "$@"\n')
    program.chmod(0o755)
    environ = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"}
    daemon = start("--command=pulsar-0.3", environ=environ)
    number = daemon.run("site", "prod", "deploy", password="s3cret value", branch="main")
    daemon.ended(number)
    task = daemon.task(number)
    assert task["command"].endswith("-s 'password=***' -s branch=main")
    assert task["output"].endswith("-s password=*** -s branch=main\n")


def test_forms_of_secrets_are_those_of_other_programs() -> None:
    """Otherwise `check_clean` would look for nothing."""
    texts = forms(SECRETS.values())
    assert quote(TOKEN, safe="").encode() in texts
    assert base64.b64encode(KEY.encode()).rstrip(b"=") in texts
    assert json.dumps(KEY)[1:-1].encode() in texts
