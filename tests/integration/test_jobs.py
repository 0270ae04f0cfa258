"""Tests of the API of release 0.6: REST, SockJS, and its published client."""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from wsproto.events import (
    BytesMessage,
    TextMessage,
)

from tests.integration.conftest import Script, Start
from tests.integration.daemon import PATIENCE, SHELL, Answer, Daemon, problem, wait_for
from tests.integration.sockjs import WebSocket

JOBS = int(os.environ.get("PULSAR_JOBS", "20"))
JOB = set("id status timestamp exitCode pid command args stdout output".split())


@pytest.fixture
def daemon(start: Start) -> Iterator[Daemon]:
    """Return a daemon that runs lines of shell. Its log must have no traceback."""
    daemon = start("--command", SHELL, "--kill-grace=1")
    yield daemon
    assert "Traceback" not in daemon.log.read_text()


def create(daemon: Daemon, run: str, **more: object) -> dict[str, Any]:
    """Create a job as the clients of release 0.6 do."""
    value = {"task": "run", "taskVariables": {"run": run}, **more}
    answer = daemon.post("/site/production", value)
    assert answer.status == 200, answer.body
    found: dict[str, Any] = answer.json()
    return found


def job(daemon: Daemon, number: int) -> dict[str, Any]:
    """Return a job."""
    found: dict[str, Any] = daemon.get(f"/job/{number}").json()
    return found


# -- REST


def test_a_job_is_a_task_with_the_same_number(daemon: Daemon) -> None:
    """It has the field names of release 0.6, and its stdout has no stderr in it."""
    created = create(daemon, "echo out; echo err >&2; exit 3")
    assert created["id"] == created["taskId"]
    assert created["url"].endswith(f"/web#job/{created['id']}")
    assert "data" not in created
    daemon.ended(created["id"])
    found = job(daemon, created["id"])
    assert set(found) == JOB
    assert (found["status"], found["exitCode"]) == ("FAILED", 3)
    assert (found["stdout"], found["output"]) == ("out\n", "out\nerr\n")
    assert found["command"].startswith("site production run -s run=echo out")
    assert found["args"]["task"] == "run"
    assert 1e12 < found["timestamp"] < 1e13
    assert daemon.get("/job/99").status == 404


def test_a_request_with_wait_is_answered_at_the_end_of_the_job(daemon: Daemon) -> None:
    """The response has the job.

    Its status is 200 even if the job failed, and forms work too.
    """
    created = create(daemon, "sleep 0.1; echo done; exit 3", wait=True)
    assert (created["data"]["status"], created["data"]["stdout"]) == ("FAILED", "done\n")
    form = "task=run&wait=true&taskVariables[run]=echo+form"
    kind = {"Content-Type": "application/x-www-form-urlencoded"}
    answer = daemon.request("POST", "/site/production", form, kind)
    assert answer.json()["data"]["stdout"] == "form\n"


def test_a_job_continues_when_its_waiting_client_disconnects(
    daemon: Daemon, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    os.mkfifo(go)
    value = {"task": "run", "taskVariables": {"run": f"read x < {go}; echo end"}}
    with closing(daemon.connect()) as connection:
        body = json.dumps({**value, "wait": True})
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/site/production", body, headers)
        wait_for(lambda: daemon.get("/task/1").status == 200, "the task")
    go.write_text("go\n")
    assert daemon.ended(1)["exitCode"] == 0


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"task": "shell"}, "task"),
        ({"task": "invoke"}, "task"),
        ({"task": "invoke[a,b]"}, "task"),
        ({"task": 5}, "task"),
        ({"task": "run", "taskVariables": []}, "taskVariables"),
        ({"task": "run", "taskVariables": {"a": True}}, "taskVariables.a"),
        ({"task": "run", "taskVariables": {"a": None}}, "taskVariables.a"),
        ({"task": "run", "taskVariables": {"a": []}}, "taskVariables.a"),
        ({"task": "run", "taskVariables": {"a b": "c"}}, "variables.a b"),
        ({"task": "run", "wait": "perhaps"}, "wait"),
        ({"task": "run", "wait": 1}, "wait"),
        ({"taskVariables": {}}, "action"),
    ],
)
def test_requests_that_release_0_6_refused_answer_400(
    daemon: Daemon, body: dict[str, object], field: str
) -> None:
    """No job is created."""
    problem(daemon.post("/site/production", body), 400, field)
    assert daemon.get("/jobs").json() == []


def test_numbers_and_empty_strings_are_valid_variables(daemon: Daemon) -> None:
    """An empty string ended the daemon of release 0.6."""
    value = {"task": "run", "taskVariables": {"run": "", "n": 5, "f": 1.5}, "wait": True}
    answer = daemon.post("/site/production", value)
    assert answer.json()["data"]["status"] == "FINISHED"
    assert answer.json()["data"]["args"]["taskVariables"]["n"] == "5"


def test_jobs_are_listed_in_pages_newest_first(daemon: Daemon) -> None:
    """A page has ten jobs by default."""
    numbers = [create(daemon, "true")["id"] for _ in range(23)]
    for number in numbers:
        daemon.ended(number)

    def ids(query: str) -> list[int]:
        return [one["id"] for one in daemon.get(f"/jobs{query}").json()]

    newest = numbers[::-1]
    assert ids("") == newest[:10]
    assert ids("?currentPage=1") == newest[10:20]
    assert ids("?currentPage=2") == newest[20:]
    assert ids("?currentPage=3") == []
    assert ids("?currentPage=1&pageSize=5") == newest[5:10]
    problem(daemon.get("/jobs?pageSize=x"), 400, "pageSize")
    problem(daemon.get("/jobs?currentPage=-1"), 400, "currentPage")


def test_failed_and_killed_jobs_can_be_restarted(daemon: Daemon) -> None:
    """Running and successful jobs answer 409."""
    number = create(daemon, "echo ready; exec sleep 60")["id"]
    wait_for(lambda: job(daemon, number)["output"], "the start")
    assert job(daemon, number)["status"] == "RUNNING"
    problem(daemon.post(f"/job/{number}/restart"), 409)
    killed = daemon.post(f"/job/{number}/kill")
    assert (killed.status, killed.body) == (200, b"OK")
    daemon.ended(number)
    assert job(daemon, number)["status"] == "KILLED"
    assert daemon.get(f"/job/{number}/kill").status == 405
    again = daemon.post(f"/job/{number}/restart").json()
    assert again["id"] == number + 1
    wait_for(lambda: job(daemon, again["id"])["output"] == "ready\n", "the new one")
    daemon.post(f"/job/{again['id']}/kill")
    daemon.ended(again["id"])
    failed = create(daemon, "exit 3", wait=True)["id"]
    assert daemon.post(f"/job/{failed}/restart").status == 200
    good = create(daemon, "true", wait=True)["id"]
    problem(daemon.post(f"/job/{good}/restart"), 409)
    foreign = {"Origin": "https://evil.example"}
    for path in (f"/job/{failed}/restart", f"/job/{failed}/kill"):
        problem(daemon.request("POST", path, headers=foreign), 403)


def test_actions_of_an_app_are_listed(start: Start, repo: Path, script: Script) -> None:
    """With ``--command scripts`` they are the executables of the app.

    Other commands have no list.
    """
    for name in ("deploy", "roll-back"):
        script(name, "#!/bin/sh\n")
    (repo / "apps" / "site" / "README").write_text("no action")
    daemon = start("--command=scripts", f"--config-repo={repo}")
    found = daemon.get("/site/production/tasks")
    assert (found.status, found.json()) == (200, {"deploy": "", "roll-back": ""})
    assert daemon.get("/unknown/production/tasks").json() == {}
    problem(daemon.get("/-x/production/tasks"), 400, "app")
    problem(daemon.get("/site/a%20b/tasks"), 400, "env")
    problem(daemon.get("/site/production/tasks", Origin="https://evil.example"), 403)
    assert daemon.post("/site/production/tasks", {}).status == 405
    other = start("--command", SHELL)
    assert problem(other.get("/site/production/tasks"), 404)["type"].endswith(":no-listing")


# -- SockJS


def test_sockjs_describes_itself(daemon: Daemon) -> None:
    """The responses are those of version 0.3 of the SockJS protocol."""
    welcome = daemon.get("/websocket")
    assert (welcome.status, welcome.body) == (200, b"Welcome to SockJS!\n")
    info = daemon.get("/websocket/info")
    value = info.json()
    assert (value["websocket"], value["cookie_needed"]) == (True, False)
    assert value["origins"] == ["*:*"]
    assert 0 <= value["entropy"] < 2**32
    assert value["entropy"] != daemon.get("/websocket/info").json()["entropy"]
    assert "no-store" in info.headers["Cache-Control"]


def events(frames: list[str], number: int) -> list[tuple[str, dict[str, Any]]]:
    """Return the events of one job in some frames."""
    found = []
    for frame in frames:
        if frame.startswith("a"):
            for message in json.loads(frame[1:]):
                value = json.loads(message)
                if value["job"]["id"] == number:
                    found.append((value["event"], value["job"]))
    return found


def told_all(told: list[tuple[str, dict[str, Any]]]) -> bool:
    """Return whether the last event is the end of a job."""
    return told != [] and told[-1][0] == "job.close"


def checked(told: list[tuple[str, dict[str, Any]]]) -> None:
    """Check all events of a job that prints on both streams and exits with 3."""
    kinds = [kind for kind, _ in told]
    assert kinds[0] == "job.create"
    assert kinds[-1] == "job.close"
    assert set(kinds[1:-1]) == {"job.change"}
    assert all(set(one) == JOB for _, one in told)
    last = told[-1][1]
    assert (last["status"], last["exitCode"]) == ("FAILED", 3)
    assert (last["stdout"], last["output"]) == ("out\n", "out\nerr\n")


def test_a_session_by_polling_gets_all_events(daemon: Daemon) -> None:
    """Each request returns one frame."""
    path = "/websocket/000/first/xhr"
    assert daemon.post(path).body == b"o\n"
    number = create(daemon, "echo out; echo err >&2; exit 3")["id"]
    frames: list[str] = []
    while not told_all(events(frames, number)):
        answer = daemon.post(path)
        assert answer.headers["Content-Type"].startswith("application/javascript")
        frames.append(answer.body.decode())
    checked(events(frames, number))


def test_a_session_by_streaming_gets_all_events(daemon: Daemon) -> None:
    """The frames are lines of one response, after a prelude."""
    with closing(daemon.connect()) as connection:
        connection.request("POST", "/websocket/000/second/xhr_streaming")
        response = connection.getresponse()
        assert response.readline() == b"h" * 2048 + b"\n"
        assert response.readline() == b"o\n"
        # A second connection of the session is refused.
        busy = daemon.post("/websocket/000/second/xhr_streaming").body
        assert busy.endswith(b'\nc[2010,"Another connection still open"]\n')
        assert daemon.post("/websocket/000/second/xhr").body == (
            b'c[2010,"Another connection still open"]\n'
        )
        sent = daemon.post("/websocket/000/second/xhr_send", ['{"token": "x"}'])
        assert (sent.status, sent.body) == (204, b"")
        number = create(daemon, "echo out; echo err >&2; exit 3")["id"]
        frames: list[str] = []
        while not told_all(events(frames, number)):
            frames.append(response.readline().decode())
        checked(events(frames, number))
        daemon.process.terminate()
        assert response.readline() == b'c[3000,"Go away!"]\n'
        assert daemon.process.wait(PATIENCE) == 0


def test_a_session_ends_when_its_client_stays_away(daemon: Daemon) -> None:
    """It ends after 5 seconds. A client that comes back gets a new session."""
    path = "/websocket/000/third/xhr"
    assert daemon.post(path).body == b"o\n"
    wait_for(
        lambda: daemon.post("/websocket/0/third/xhr_send", []).status == 404, "its end"
    )
    assert daemon.post(path).body == b"o\n"


@pytest.mark.parametrize("body", [b"", b"x", b"{}", b"[1]", b"[" * 5000, b"\xff"])
def test_malformed_messages_answer_400(daemon: Daemon, body: bytes) -> None:
    """The session stays open."""
    daemon.post("/websocket/000/fourth/xhr")
    problem(daemon.request("POST", "/websocket/000/fourth/xhr_send", body), 400, "body")
    unknown = daemon.request("POST", "/websocket/000/nobody/xhr_send", body)
    problem(unknown, 404)
    assert daemon.post("/websocket/000/fourth/xhr_send", []).status == 204


def test_a_session_by_websocket_gets_all_events(daemon: Daemon) -> None:
    """Each message has one of the same frames, and a client can send its token."""
    client = WebSocket(daemon)
    with client.sock as sock:
        assert client.frame() == "o"
        sock.sendall(client.ws.send(TextMessage('["{\\"token\\": \\"x\\"}"]')))
        number = create(daemon, "echo out; echo err >&2; exit 3")["id"]
        frames: list[str] = []
        while not told_all(events(frames, number)):
            frames.append(client.frame() or "")
        checked(events(frames, number))
        before = len(os.listdir(f"/proc/{daemon.process.pid}/fd"))
    folder = f"/proc/{daemon.process.pid}/fd"
    wait_for(lambda: len(os.listdir(folder)) < before, "the connection to close")
    last = WebSocket(daemon)
    assert last.frame() == "o"
    daemon.process.terminate()
    assert last.frame() == 'c[3000,"Go away!"]'
    assert last.frame() is None
    last.sock.close()
    assert daemon.process.wait(PATIENCE) == 0


@pytest.mark.parametrize(
    "data",
    [
        TextMessage("no JSON"),
        TextMessage("{}"),
        BytesMessage(b"bytes"),
        TextMessage("[" * 50_000),
        TextMessage("x" * 200_000),
        b"\xff" * 100,
        b"\x81\x01x",
    ],
    ids=["words", "object", "bytes", "deep", "long", "no-frame", "unmasked"],
)
def test_a_websocket_that_sends_nonsense_is_closed(
    daemon: Daemon, data: TextMessage | BytesMessage | bytes
) -> None:
    """Other sockets continue."""
    good = WebSocket(daemon)
    assert good.frame() == "o"
    bad = WebSocket(daemon)
    assert bad.frame() == "o"
    try:
        bad.sock.sendall(data if isinstance(data, bytes) else bad.ws.send(data))
        assert bad.frame() is None
    except ConnectionResetError:
        pass
    bad.sock.close()
    number = create(daemon, "true")["id"]
    frames: list[str] = []
    while not events(frames, number):
        frames.append(good.frame() or "")
    good.sock.close()
    daemon.ended(number)


def test_another_site_cannot_open_a_session(daemon: Daemon) -> None:
    """The daemon compares the ``Origin`` that a browser sends with its own address."""
    foreign = WebSocket(daemon, "https://evil.example")
    assert b" 403 " in foreign.sock.recv(1 << 16).partition(b"\r\n")[0]
    foreign.sock.close()
    own = WebSocket(daemon, f"http://{daemon.host}:{daemon.port}")
    assert own.frame() == "o"
    own.sock.close()
    foreign_poll = {"Origin": "https://evil.example"}
    for name in ("xhr", "xhr_streaming", "xhr_send"):
        path = f"/websocket/0/foreign/{name}"
        problem(daemon.request("POST", path, "[]", foreign_poll), 403)
    assert daemon.post("/websocket/000/socket/websocket").status == 405


def test_a_message_has_the_end_of_a_huge_output(daemon: Daemon) -> None:
    """Its first line names the request that returns the rest."""
    client = WebSocket(daemon)
    assert client.frame() == "o"
    number = create(daemon, "head -c 3000000 /dev/zero | tr '\\0' x; echo end")["id"]
    frames: list[str] = []
    while not told_all(events(frames, number)):
        frames.append(client.frame() or "")
    client.sock.close()
    text = events(frames, number)[-1][1]["stdout"]
    first, _, rest = text.partition("\n")
    assert first == f"[the first {3000004 - (1 << 20)} bytes: GET /task/{number}/log]"
    assert len(rest) == 1 << 20
    assert rest.endswith("xend\n")


# -- the published client


def flow(npm: Path, daemon: Daemon, *arguments: str) -> Any:
    """Run the published client and return its JSON output."""
    done = subprocess.run(
        ["node", "flow.js", f"http://{daemon.host}:{daemon.port}", *arguments],
        cwd=npm,
        check=True,
        stdout=subprocess.PIPE,
        timeout=300,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("count", "how"),
    [(JOBS, "one-by-one"), (50, "together")],
    ids=["one-by-one", "together"],
)
def test_the_published_client_gets_the_end_of_each_job(
    npm: Path, daemon: Daemon, count: int, how: str
) -> None:
    """It learns the number of a job only from the response, and these jobs are short."""
    results = flow(npm, daemon, "run", str(count), how)
    assert len(results) == count
    for n, result in enumerate(results):
        told = result["events"]
        assert told[0] == "create"
        assert "change" in told[1:-1]
        end = "error: Job finished with status `FAILED`." if n % 2 else "success"
        assert told[-1] == end
        assert told.count(end) == 1
        data = result["data"]
        assert (data["stdout"], data["exitCode"]) == (f"out {n}\n", n % 2 * 3)


def test_the_published_client_kills_and_lists_jobs(npm: Path, daemon: Daemon) -> None:
    """It sees the job run, and then its status ``KILLED``."""
    result = flow(npm, daemon, "kill")
    assert result["events"][-1] == "error: Job finished with status `KILLED`."
    assert [one["status"] for one in result["jobs"]] == ["KILLED"]
    assert result["jobs"][0]["stdout"] == "begin\n"
    answer: Answer = daemon.get("/task/1")
    assert answer.json()["status"] == "killed"
