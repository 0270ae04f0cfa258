"""The documented API, line by line, over real sockets with HTTP and TLS."""

import hashlib
import json
import os
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime
from http.client import HTTPConnection
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import Start
from tests.integration.daemon import (
    CERTIFICATE,
    PATIENCE,
    SHELL,
    Answer,
    Daemon,
    Poll,
    problem,
    wait_for,
)

SCHEMES: dict[str, tuple[str, ...]] = {"http": (), "tls": ("--dev",)}
UNCHANGED = b'{"changed": false}'
SEED = {"id", "status", "app", "env", "action", "exitCode", "output", "pid"}
ADDED = set(
    "version outputSize command signal reason variables user waitingFor createdAt "
    "startedAt endedAt cpuSeconds memoryPeak url heldBy stillRunning notes".split()
)
TAIL = 4096
HUGE = 40_000_000
AT_ONCE = 20.0
"""Seconds: longer than any immediate answer takes, shorter than a long-poll waits."""
FLAT = 20 << 20
"""Bytes by which the daemon's memory may grow while it sends `HUGE` bytes."""


@pytest.fixture(scope="module", params=list(SCHEMES))
def tls(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """Return the options of the daemon for plain HTTP, or for TLS."""
    return SCHEMES[request.param]


@pytest.fixture(scope="module")
def api(tls: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """Return a daemon that the tests share, and fail if its log has a traceback."""
    folder = tmp_path_factory.mktemp("daemon")
    daemon = Daemon(folder, "--command", SHELL, "--kill-grace", "1", *tls)
    yield daemon
    daemon.stop()
    assert "Traceback" not in daemon.log.read_text()


class Puppet:
    """A running task that prints and ends when its test tells it to."""

    def __init__(self, daemon: Daemon, fifo: Path, code: int = 0) -> None:
        os.mkfifo(fifo)
        self.daemon = daemon
        self.fifo = fifo
        self.fd = -1
        run = 'cat "$PULSAR_VAR_fifo"; exit "$PULSAR_VAR_code"'
        self.number = daemon.sh(run, fifo=str(fifo), code=code)
        self.path = f"/task/{self.number}"

    def starts(self) -> None:
        """Wait until the command runs and the daemon knows it."""
        wait_for(self._open, "the command to open its end")
        wait_for(lambda: self.now()["pid"] is not None, "the news of the start")

    def _open(self) -> bool:
        with suppress(OSError):  # the task has not opened it yet
            self.fd = os.open(self.fifo, os.O_WRONLY | os.O_NONBLOCK)
            os.set_blocking(self.fd, True)
        return self.fd >= 0

    def says(self, data: bytes) -> None:
        """Let the task print some bytes."""
        os.write(self.fd, data)

    def ends(self) -> None:
        """Let the task end."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1

    def now(self) -> dict[str, Any]:
        """Return the task as the daemon shows it now."""
        return self.daemon.task(self.number)

    def printed(self, size: int) -> dict[str, Any]:
        """Wait until the daemon knows of ``size`` bytes of output, and return the task."""
        return wait_for(
            lambda: now if (now := self.now())["outputSize"] >= size else {},
            f"{size} bytes of output",
        )

    def poll(self, path: str) -> Poll:
        """Begin a long-poll below the path of this task."""
        return Poll(self.daemon, self.path + path)


Play = Callable[..., Puppet]


@pytest.fixture
def play(tmp_path: Path) -> Iterator[Play]:
    """Return a function that creates a puppet. Its second argument is the exit code."""
    puppets: list[Puppet] = []

    def begin(daemon: Daemon, code: int = 0, *, wait: bool = True) -> Puppet:
        puppets.append(Puppet(daemon, tmp_path / f"fifo{len(puppets)}", code))
        if wait:
            puppets[-1].starts()
        return puppets[-1]

    yield begin
    for puppet in puppets:
        puppet.ends()


@pytest.fixture
def ended(api: Daemon) -> dict[str, Any]:
    """Return a task that has ended, with its output."""
    number = api.sh("echo one; echo two >&2; exit 7")
    api.ended(number)
    return api.task(number)


def address(daemon: Daemon) -> str:
    """Return the URL of a daemon, with the host that our requests send."""
    connection = daemon.connect()
    return f"{daemon.scheme}://{connection.host}:{daemon.port}"


def newest(daemon: Daemon) -> int:
    """Return the number of the newest task."""
    tasks = daemon.get("/tasks?limit=1&output=none").json()["tasks"]
    return max(map(int, tasks), default=0)


def unchanged(answer: Answer) -> bool:
    """Return whether an answer is exactly that of a long-poll at its timeout."""
    assert answer.status == 200
    return answer.body.strip() == UNCHANGED


def changed(answer: Answer) -> dict[str, Any]:
    """Check that a change ended a long-poll, and return the task in its answer."""
    value = answer.json()
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "application/json"
    assert value["changed"] is True
    task: dict[str, Any] = value["task"]
    assert set(task) - {"outputOffset"} == SEED | ADDED
    return task


# -- the task object


def test_task_has_every_documented_field(api: Daemon) -> None:
    """Fields that are not known yet are there too. Each has the right type."""
    number = api.sh("echo hello; exit 3", count=5)
    task = changed(api.get(f"/task/{number}/state"))
    assert task["id"] == number
    assert (task["status"], task["exitCode"], task["signal"]) == ("failed", 3, None)
    assert (task["app"], task["env"], task["action"]) == ("site", "production", "run")
    assert task["output"] == "hello\n"
    assert task["outputSize"] == len("hello\n")
    assert task["pid"] > 0
    assert task["version"] > 0
    assert task["variables"] == {"run": "echo hello; exit 3", "count": "5"}
    assert task["user"] is None
    assert task["waitingFor"] is None
    assert shlex.split(task["command"]) == ["sh", "-c", 'eval "$PULSAR_VAR_run"']
    times = [task[name] for name in ("createdAt", "startedAt", "endedAt")]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", t) for t in times)
    moments = [datetime.fromisoformat(t).timestamp() for t in times]
    assert moments == sorted(moments)
    assert abs(moments[0] - time.time()) < PATIENCE


def test_end_of_the_command_decides_the_status(api: Daemon) -> None:
    """Exit code 0 is finished, another one failed. A signal replaces the exit code."""
    numbers = [api.sh(run) for run in ("exit 0", "exit 1", "kill -USR1 $$")]
    tasks = [api.ended(number) for number in numbers]
    found = [(task["status"], task["exitCode"], task["signal"]) for task in tasks]
    assert found == [
        ("finished", 0, None),
        ("failed", 1, None),
        ("failed", None, "SIGUSR1"),
    ]


def test_command_that_cannot_start_fails_the_task(
    start: Start, tls: tuple[str, ...]
) -> None:
    """The task has a reason, and neither pid nor exit code."""
    daemon = start("--command", "no-such-program {app}", *tls)
    task = daemon.ended(daemon.run("site", "production", "run"))
    assert (task["status"], task["exitCode"], task["pid"]) == ("failed", None, None)
    assert "no-such-program" in task["reason"]


def test_output_is_decoded_as_one_stream(api: Daemon, play: Play) -> None:
    """A character can arrive byte by byte. Invalid bytes are shown as U+FFFD, and kept."""
    puppet = play(api)
    for byte in "ä€𝄞".encode():
        puppet.says(bytes([byte]))
    puppet.says(b"\xff|\xc3|")
    puppet.ends()
    api.ended(puppet.number)
    assert (
        puppet.now()["output"] == "ä€𝄞\N{REPLACEMENT CHARACTER}|\N{REPLACEMENT CHARACTER}|"
    )
    kept = api.output_file(puppet.number).read_bytes()
    assert kept == "ä€𝄞".encode() + b"\xff|\xc3|"


def test_task_numbers_increase_over_restarts(start: Start, tls: tuple[str, ...]) -> None:
    """No number is used twice."""
    daemon = start("--command", "true", *tls)
    numbers = [daemon.run("site", "production", "run") for _ in range(3)]
    daemon.ended(numbers[-1])
    daemon.stop()
    daemon.start()
    numbers.append(daemon.run("site", "production", "run"))
    assert numbers == sorted(set(numbers))


# -- GET /tasks


def test_list_has_page_url_and_tasks_by_number(api: Daemon, ended: dict[str, Any]) -> None:
    """``tasks`` maps numbers, as strings, to whole tasks. ``url`` leads to the page."""
    answer = api.get("/tasks")
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "application/json"
    value = answer.json()
    assert set(value) == {"url", "tasks"}
    assert value["url"] == f"{address(api)}/pulsar/index.html"
    assert all(str(task["id"]) == number for number, task in value["tasks"].items())
    assert value["tasks"][str(ended["id"])] == ended
    assert api.get("/pulsar/index.html").status == 200


def test_list_has_newest_hundred_and_links_to_older(
    start: Start, tls: tuple[str, ...]
) -> None:
    """``limit`` raises 100 to at most 1000. The pages hold each task exactly once."""
    daemon = start("--command", SHELL, "--max-running", "1", *tls)
    connection = daemon.connect()
    numbers = []
    for index in range(105):
        path = f"/app{index % 2}/env{index % 3}?action=run"
        body = json.dumps({"variables": {"run": "sleep 100"}})
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        numbers.append(Answer(connection.getresponse()).json()["id"])
    connection.close()

    def listed(path: str) -> tuple[list[int], str | None]:
        answer = daemon.get(path)
        link = answer.headers["Link"]
        found = re.fullmatch(r'<(/tasks\?\S+)>; rel="next"', link) if link else None
        assert (link is None) == (found is None)
        return list(map(int, answer.json()["tasks"])), found[1] if found else None

    def pages(path: str) -> Iterator[list[int]]:
        following: str | None = path
        while following is not None:
            page, following = listed(following)
            yield page

    assert sorted(listed("/tasks")[0]) == numbers[-100:]
    assert sorted(listed("/tasks?limit=1000")[0]) == numbers
    assert sorted(listed(f"/tasks?before={numbers[50]}&limit=7")[0]) == numbers[43:50]
    found = list(pages("/tasks?limit=40&output=none"))
    assert [len(page) for page in found] == [40, 40, 25]
    assert all(min(page) > max(older) for page, older in pairwise(found))
    assert sorted(chain(*found)) == numbers
    wanted = [n for i, n in enumerate(numbers) if i % 2 == 1 and i % 3 == 2]
    for query in ("app=app1&env=env2&status=created", "app=app1&text=NV2"):
        assert sorted(chain(*pages(f"/tasks?limit=10&{query}"))) == wanted


def test_list_is_filtered_by_status_app_env_user_and_text(api: Daemon) -> None:
    """A listed task matches all filters."""
    sites = [("filter-a", "one"), ("filter-a", "two"), ("filter-b", "two")]
    numbers = [str(api.run(*site, "run", run="exit 0")) for site in sites]
    for number in numbers:
        api.ended(int(number))

    def found(query: str) -> list[str]:
        return sorted(api.get(f"/tasks?{query}").json()["tasks"], key=int)

    assert found("app=filter-a") == numbers[:2]
    assert found("app=filter-a&env=two") == numbers[1:2]
    assert found("app=filter-b&status=finished") == numbers[2:]
    assert found("app=filter-b&status=failed") == []
    assert found("app=filter-a&user=somebody") == []
    problem(api.get("/tasks?app=%00"), 400, "app")
    assert found("text=FILTER-A") == numbers[:2]
    assert found("text=tw&app=filter-a") == numbers[1:2]
    assert found("text=filter_a") == found("text=filter-a&status=failed") == []
    assert found("app=filter-a&text=") == numbers[:2]


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("limit=-1", "limit"),
        ("limit=1e2", "limit"),
        ("limit=", "limit"),
        ("before=x", "before"),
        ("before=99999999999999999999", "before"),
        ("status=done", "status"),
        ("status=", "status"),
        ("output=all", "output"),
        (f"text={'x' * 201}", "text"),
    ],
)
def test_invalid_list_parameter_answers_400(api: Daemon, query: str, field: str) -> None:
    """The problem names the parameter."""
    problem(api.get(f"/tasks?{query}"), 400, field)


def test_output_parameter_selects_all_tail_or_none(
    api: Daemon,
) -> None:
    """Lists have the last 4 KiB by default, other answers all. No character is cut."""
    # The tail would begin within a character of three bytes.
    text = "x" * 1000 + "€" * 1500
    run = 'printf "%s" "$PULSAR_VAR_text"'
    before = newest(api)
    number = api.run("outputs", "production", "run", run=run, text=text)
    assert api.ended(number)["output"] == ""
    size = len(text.encode())
    tail = text[-(TAIL // 3 + 1) :]

    def of(path: str) -> tuple[str, int]:
        value = api.get(path).json()
        task = value.get("tasks", {}).get(str(number)) or value.get("task") or value
        assert task["outputSize"] == size
        return task["output"], task.get("outputOffset", 0)

    paths = [
        "/tasks?app=outputs",
        f"/tasks/created?since={before}",
        f"/task/{number}?",
        f"/task/{number}/output?",
        f"/task/{number}/state?",
        f"/task/{number}/kill?",
    ]
    cut = size - len(tail.encode())
    for path in paths:
        assert of(f"{path}&output=full") == (text, 0), path
        assert of(f"{path}&output=tail") == (tail, cut), path
        assert of(f"{path}&output=none") == ("", size), path
        default = (tail, cut) if path.startswith("/tasks?") else (text, 0)
        assert of(path) == default, path
        problem(api.get(f"{path}&output=some"), 400, "output")


# -- GET /tasks/created


def test_created_poll_returns_the_next_task(api: Daemon) -> None:
    """Every waiter gets the same task."""
    polls = [Poll(api, "/tasks/created") for _ in range(3)]
    assert all(poll.waits() for poll in polls)
    number = api.sh("sleep 0")
    assert [changed(poll.answer())["id"] for poll in polls] == [number] * 3


def test_since_returns_every_task_of_a_burst(api: Daemon) -> None:
    """The answer to ``since`` is the oldest newer task, at once if there is one."""
    last = newest(api)
    numbers = [api.sh("sleep 0") for _ in range(5)]
    seen = []
    for _ in numbers:
        last = changed(api.get(f"/tasks/created?since={last}"))["id"]
        seen.append(last)
    assert seen == numbers
    poll = Poll(api, f"/tasks/created?since={last}")
    assert poll.waits()
    number = api.sh("sleep 0")
    assert changed(poll.answer())["id"] == number


def test_created_poll_ends_unchanged_at_its_timeout(api: Daemon) -> None:
    """The answer is exactly ``{"changed": false}``."""
    assert unchanged(api.get("/tasks/created?timeout=0.2"))


# -- POST /:app/:env


def post(
    daemon: Daemon, path: str, body: str = "", kind: str | None = None, **headers: str
) -> Answer:
    """Send a POST with a body of the given content type."""
    if kind is not None:
        headers["Content-Type"] = kind
    return daemon.request("POST", path, body, headers)


JSON = "application/json"
FORM = "application/x-www-form-urlencoded"


@pytest.mark.parametrize(
    ("query", "body", "kind"),
    [
        ("", '{"action": "deploy", "variables": {"run": "true", "n": 1}}', JSON),
        (
            "",
            '{"action":"deploy","variables":{"run":"true","n":1}}',
            JSON + "; charset=utf-8",
        ),
        ("", "action=deploy&variables[run]=true&variables[n]=1", FORM),
        ("", "action=deploy&variables%5Brun%5D=true&variables%5Bn%5D=1", FORM),
        ("?action=deploy", '{"variables": {"run": "true", "n": "1"}}', JSON),
        ("?action=deploy", "variables[run]=true&variables[n]=1", FORM),
        (
            "?action=other",
            '{"action": "deploy", "variables": {"run": "true", "n": 1}}',
            JSON,
        ),
        ("?action=other", "action=deploy&variables[run]=true&variables[n]=1", FORM),
        ("", '{"action": " \\tdeploy ", "variables": {"run": "true", "n": 1}}', JSON),
        (
            "?app=evil&env=evil",
            '{"action":"deploy","app":"evil","env":"evil","variables":{"run":"true","n":1}}',
            JSON,
        ),
        (
            "",
            "app=evil&env=evil&action=deploy&variables[run]=true&variables[n]=1",
            FORM,
        ),
    ],
)
def test_post_creates_the_task_of_its_body(
    api: Daemon, query: str, body: str, kind: str
) -> None:
    """JSON or a form overrides the query. Only the path sets app and env."""
    answer = post(api, f"/site/production{query}", body, kind)
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "application/json"
    value = answer.json()
    number = value["taskId"]
    assert value == {
        "taskId": number,
        "id": number,
        "url": f"{address(api)}/web#job/{number}",
    }
    assert isinstance(number, int)
    assert answer.headers["Location"] == f"/task/{number}"
    task = api.get(answer.headers["Location"]).json()
    assert (task["app"], task["env"], task["action"]) == ("site", "production", "deploy")
    assert task["variables"] == {"run": "true", "n": "1"}
    assert task["url"] == value["url"]
    page = api.get(value["url"].removeprefix(address(api)).partition("#")[0])
    assert (page.status, page.headers["Content-Type"]) == (200, "text/html; charset=utf-8")


def test_post_with_an_action_in_its_query_needs_no_body(api: Daemon) -> None:
    """The query sets no variables."""
    answer = post(api, "/site/production?action=deploy&variables[run]=x&run=x")
    assert answer.status == 200
    task = api.ended(answer.json()["id"])
    assert (task["action"], task["variables"]) == ("deploy", {})


def test_invalid_post_creates_no_task(api: Daemon) -> None:
    """A missing action answers 400, a wrong type 415, and a large body 413."""
    before = newest(api)
    problem(post(api, "/site/production"), 400, "action")
    problem(post(api, "/site/production", "{}", JSON), 400, "action")
    problem(post(api, "/site/production?action=x", "<a/>", "text/xml"), 415)
    problem(post(api, "/site/production?action=x", "action=x", "text/plain"), 415)
    problem(post(api, "/site/production?action=x", "{}"), 415)
    large = json.dumps({"action": "x", "variables": {"a": "x" * (1 << 20)}})
    problem(post(api, "/site/production", large, JSON), 413)
    assert newest(api) == before


# -- GET /task/:id


def test_get_of_a_running_task_has_its_output_so_far(api: Daemon, play: Play) -> None:
    """The answer comes at once, and the task goes on."""
    puppet = play(api)
    assert puppet.now()["output"] == ""
    puppet.says(b"first\n")
    task = puppet.printed(6)
    assert (task["status"], task["output"], task["exitCode"]) == (
        "running",
        "first\n",
        None,
    )
    puppet.says(b"second\n")
    assert puppet.printed(13)["output"] == "first\nsecond\n"


def test_matching_etag_answers_304(api: Daemon, play: Play) -> None:
    """The tag differs after each change, and for another part of the output."""
    puppet = play(api)
    answer = api.get(puppet.path)
    tag = answer.headers["ETag"]
    assert re.fullmatch(r'(W/)?"[^"]+"', tag)
    for tags in (tag, f'"other", {tag}', f"W/{tag}", "*"):
        again = api.get(puppet.path, **{"If-None-Match": tags})
        assert (again.status, again.body) == (304, b""), tags
        assert again.headers["ETag"] == tag
    puppet.says(b"more")
    puppet.printed(4)
    after = api.get(puppet.path, **{"If-None-Match": tag})
    assert (after.status, after.json()["output"]) == (200, "more")
    assert after.headers["ETag"] != tag
    none = api.get(f"{puppet.path}?output=none")
    assert none.headers["ETag"] != after.headers["ETag"]
    puppet.ends()
    api.ended(puppet.number)
    last = api.get(puppet.path, **{"If-None-Match": after.headers["ETag"]})
    assert (last.status, last.json()["status"]) == (200, "finished")


@pytest.mark.parametrize("rest", ["", "/output", "/state", "/kill"])
@pytest.mark.parametrize(
    "number",
    "0 999999 9223372036854775807 9223372036854775808 99999999999999999999 -1 1.0 0x1 "
    "abc %20 1%20 %C2%B2 %D9%A1".split(),
)
def test_unknown_task_number_answers_404(api: Daemon, number: str, rest: str) -> None:
    """Text that is no number is answered in the same way."""
    problem(api.get(f"/task/{number}{rest}"), 404)


# -- GET /task/:id/output


def test_output_poll_ends_with_new_output(api: Daemon, play: Play) -> None:
    """Every waiter gets the task with all of its output."""
    puppet = play(api)
    puppet.says(b"one ")
    puppet.printed(4)
    polls = [puppet.poll("/output") for _ in range(3)]
    assert all(poll.waits() for poll in polls)
    puppet.says("zwölf\n".encode())
    for poll in polls:
        task = changed(poll.answer())
        assert (task["status"], task["output"]) == ("running", "one zwölf\n")


def test_output_poll_ends_with_the_task(api: Daemon, play: Play) -> None:
    """The end is a change even if the task printed nothing."""
    puppet = play(api, 5)
    poll = puppet.poll("/output")
    assert poll.waits()
    puppet.ends()
    task = changed(poll.answer())
    assert (task["status"], task["exitCode"]) == ("failed", 5)


@pytest.mark.parametrize("what", ["output", "state"])
def test_poll_of_an_ended_task_returns_at_once(
    api: Daemon, ended: dict[str, Any], what: str
) -> None:
    """The task will not change any more, even if the client has its last version."""
    began = time.monotonic()
    assert changed(api.get(f"/task/{ended['id']}/{what}")) == ended
    version = ended["version"]
    assert changed(api.get(f"/task/{ended['id']}/{what}?since={version}")) == ended
    assert time.monotonic() - began < AT_ONCE


@pytest.mark.parametrize("what", ["output", "state"])
def test_poll_with_another_version_returns_at_once(
    api: Daemon, play: Play, what: str
) -> None:
    """The answer has the current version, with which the next poll waits."""
    puppet = play(api)
    old = puppet.now()["version"]
    waiting = puppet.poll(f"/{what}?since={old}")
    assert waiting.waits()
    waiting.close()
    puppet.says(b"more")
    current = puppet.printed(4)
    assert current["version"] > old
    began = time.monotonic()
    for version in (old, 0, current["version"] + 1000):
        answer = api.get(f"{puppet.path}/{what}?since={version}")
        assert changed(answer)["version"] == current["version"]
    assert time.monotonic() - began < AT_ONCE


def test_polls_by_version_and_offset_return_the_whole_output(api: Daemon) -> None:
    """Each answer begins where the one before ended."""
    number = api.sh(
        'i=0; while [ $i -lt 3000 ]; do i=$((i+1)); echo "$i äöü € 𝄞";'
        " [ $((i % 100)) -gt 0 ] || sleep 0.01; done"
    )
    text, offset, version, polls = "", 0, 0, 0
    while True:
        answer = api.get(f"/task/{number}/output?since={version}&offset={offset}")
        if unchanged(answer):
            continue
        task = changed(answer)
        assert task.get("outputOffset", 0) == offset
        assert task["version"] != version
        text += task["output"]
        polls += 1
        offset, version = answer.json()["nextOffset"], task["version"]
        if task["status"] != "running" and task["status"] != "created":
            break
    assert text == "".join(f"{i} äöü € 𝄞\n" for i in range(1, 3001))
    assert offset == len(text.encode())
    assert polls > 3


def test_offset_within_a_character_moves_to_its_start(
    api: Daemon,
) -> None:
    """``outputOffset`` is the byte at which the text begins."""
    text = "aä€𝄞z"
    number = api.sh('printf "%s" "$PULSAR_VAR_text"', text=text)
    api.ended(number)
    size = len(text.encode())
    begins = {0: 0, 1: 1, 2: 1, 3: 3, 4: 3, 5: 3, 6: 6, 7: 6, 8: 6, 9: 6, 10: 10, 11: 11}
    for offset, begin in begins.items():
        answer = api.get(f"/task/{number}/output?offset={offset}")
        task = changed(answer)
        assert task["output"] == text.encode()[begin:].decode(), offset
        assert task.get("outputOffset", 0) == begin
        assert answer.json()["nextOffset"] == size
    answer = api.get(f"/task/{number}/output?offset={size + 1000}")
    assert changed(answer)["output"] == ""
    assert answer.json()["nextOffset"] == size
    problem(api.get(f"/task/{number}/output?offset=-1"), 400, "offset")


# -- GET /task/:id/state


def test_state_poll_outlasts_output(api: Daemon, play: Play) -> None:
    """Output ends only the polls for ``/output``."""
    puppet = play(api, 9)
    end = puppet.poll("/state")
    for word in (b"one\n", b"two\n"):
        change = puppet.poll("/output")
        puppet.says(word)
        changed(change.answer())
    api.get("/tasks?limit=1")
    assert end.waits()
    puppet.ends()
    task = changed(end.answer())
    assert (task["status"], task["exitCode"], task["output"]) == ("failed", 9, "one\ntwo\n")


# -- all long-polls


def poll_paths(puppet: Puppet) -> list[str]:
    """Return the paths of the three kinds of long-poll."""
    return [f"{puppet.path}/output", f"{puppet.path}/state", "/tasks/created"]


def test_long_poll_ends_at_the_requested_timeout(api: Daemon, play: Play) -> None:
    """A timeout of 0 returns at once. The answer is exactly ``{"changed": false}``."""
    puppet = play(api)
    for path in poll_paths(puppet):
        began = time.monotonic()
        assert unchanged(api.get(f"{path}?timeout=0"))
        assert time.monotonic() - began < AT_ONCE
    began = time.monotonic()
    polls = [Poll(api, f"{path}?timeout=1") for path in poll_paths(puppet)]
    for poll in polls:
        assert unchanged(poll.answer())
        assert 1 <= time.monotonic() - began < AT_ONCE


def test_state_poll_of_a_printing_task_ends_unchanged(api: Daemon, play: Play) -> None:
    """Its timeout ends it, although the version of the task has changed."""
    puppet = play(api)
    poll = puppet.poll("/state?timeout=1")
    puppet.says(b"more")
    puppet.printed(4)
    assert unchanged(poll.answer())


@pytest.mark.parametrize("query", ["timeout=-1", "timeout=30.5", "timeout=nan", "since=x"])
def test_invalid_poll_parameter_answers_400(api: Daemon, play: Play, query: str) -> None:
    """The problem names the parameter. A timeout above the daemon's is invalid too."""
    puppet = play(api)
    for path in poll_paths(puppet):
        problem(api.get(f"{path}?{query}"), 400, query.partition("=")[0])


def test_poll_timeout_is_default_and_maximum(
    start: Start, tls: tuple[str, ...], play: Play
) -> None:
    """``--poll-timeout`` holds for polls without ``timeout``, and limits those with one."""
    daemon = start("--command", SHELL, "--poll-timeout", "1.5", *tls)
    paths = poll_paths(play(daemon))
    began = time.monotonic()
    polls = [Poll(daemon, path) for path in paths]
    for poll in polls:
        assert unchanged(poll.answer())
        assert 1.5 <= time.monotonic() - began < AT_ONCE
    for path in paths:
        problem(daemon.get(f"{path}?timeout=1.6"), 400, "timeout")


def test_long_poll_waits_30_seconds_by_default(start: Start, play: Play) -> None:
    """The test waits in real time, for all three kinds over HTTP and TLS at once."""
    polls = []
    for options in SCHEMES.values():
        daemon = start("--command", SHELL, *options)
        puppet = play(daemon)
        polls += [(time.monotonic(), Poll(daemon, path)) for path in poll_paths(puppet)]
    for began, poll in polls:
        assert unchanged(poll.answer())
        assert 29.5 <= time.monotonic() - began < 45


def test_client_that_disconnects_ends_no_other_poll(api: Daemon, play: Play) -> None:
    """The task runs on."""
    puppet = play(api)
    stays, goes = puppet.poll("/output"), puppet.poll("/output")
    goes.close()
    puppet.says(b"hello")
    assert changed(stays.answer())["output"] == "hello"
    assert puppet.now()["status"] == "running"


# -- /task/:id/kill


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_kill_answers_200_and_ends_the_task(api: Daemon, play: Play, method: str) -> None:
    """The end of the task also ends the poll for its state."""
    puppet = play(api)
    puppet.says(b"before")
    puppet.printed(6)
    end = puppet.poll("/state")
    answer = api.request(method, f"{puppet.path}/kill")
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "application/json"
    task = answer.json()
    assert (task["id"], task["output"]) == (puppet.number, "before")
    task = changed(end.answer())
    assert task["status"] == "killed"
    assert (task["exitCode"], task["signal"]) == (None, "SIGTERM")
    assert "127.0.0.1" in task["reason"]


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_kill_of_an_ended_task_changes_nothing(
    api: Daemon, ended: dict[str, Any], method: str
) -> None:
    """The answer is 200 with the task."""
    answer = api.request(method, f"/task/{ended['id']}/kill")
    assert (answer.status, answer.json()) == (200, ended)
    assert api.task(ended["id"]) == ended


def alive(pid: str) -> bool:
    """Return whether a process lives. A zombie does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in {"Z", "X"}


def test_kill_ends_the_whole_process_tree(api: Daemon) -> None:
    """Some have sessions of their own, and some ignore TERM."""
    number = api.sh(
        "trap '' TERM; sh -c 'trap \"\" TERM; echo $$; while :; do sleep 1; done' &"
        " setsid sh -c 'echo $$; exec sleep 1000' & sh -c '(sleep 1000 & echo $!)';"
        " echo $$; while :; do sleep 1; done"
    )
    lines = wait_for(
        lambda: lines if len(lines := api.task(number)["output"].split()) == 4 else [],
        "four process numbers",
    )
    assert [pid for pid in lines if alive(pid)] == lines
    api.get(f"/task/{number}/kill")
    task = api.ended(number)
    assert (task["status"], task["signal"]) == ("killed", "SIGKILL")
    assert [pid for pid in lines if alive(pid)] == []


def test_kill_lets_every_process_clean_up(
    start: Start, tls: tuple[str, ...], tmp_path: Path
) -> None:
    """TERM reaches the whole tree, and no KILL comes within the grace period."""
    daemon = start("--command", SHELL, "--kill-grace", "50", *tls)
    loop = "trap 'echo tidy; exit 5' TERM; echo up; while :; do sleep 0.1; done"
    program = tmp_path / "loop"
    program.write_text(loop)
    number = daemon.sh(
        'sh "$PULSAR_VAR_loop" & setsid sh "$PULSAR_VAR_loop" & (sh "$PULSAR_VAR_loop" &);'
        ' . "$PULSAR_VAR_loop"',
        loop=str(program),
    )
    wait_for(lambda: daemon.task(number)["output"].count("up") == 4, "four processes")
    daemon.get(f"/task/{number}/kill")
    task = daemon.ended(number)
    assert (task["status"], task["exitCode"], task["signal"]) == ("killed", 5, None)
    assert daemon.task(number)["output"].split().count("tidy") == 4


# -- the page


def test_page_is_html_and_lists_the_api(api: Daemon) -> None:
    """A user who opens it in a browser sees what the daemon is and offers."""
    answer = api.get("/pulsar/index.html")
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    text = answer.body.decode()
    for path in ("/:app/:env", "/tasks", "/tasks/created", "/task/:id", "/kill"):
        assert path in text


# -- HEAD, OPTIONS, 405


def test_head_answers_as_get_without_the_body(api: Daemon, ended: dict[str, Any]) -> None:
    """Status, type, length, tag and caching are the same."""
    number = ended["id"]
    paths = [
        "/tasks",
        "/tasks/created?timeout=0",
        f"/task/{number}",
        f"/task/{number}/output",
        f"/task/{number}/state",
        f"/task/{number}/kill",
        "/pulsar/index.html",
        "/task/999999",
        "/tasks?limit=x",
    ]
    connection = api.connect()
    for path in paths:
        answers = []
        for method in ("HEAD", "GET"):
            # On one connection, where a body after HEAD would be read as the next answer.
            connection.request(method, path)
            answers.append(Answer(connection.getresponse()))
        head, get = answers
        assert head.body == b""
        assert head.status == get.status, path
        for name in ("Content-Type", "Content-Length", "ETag", "Cache-Control"):
            assert head.headers[name] == get.headers[name], path
    connection.close()


def test_head_of_kill_does_not_kill(api: Daemon, play: Play) -> None:
    """The answer is 200, and the task runs on and prints."""
    puppet = play(api)
    assert api.request("HEAD", f"{puppet.path}/kill").status == 200
    puppet.says(b"alive")
    task = puppet.printed(5)
    assert (task["status"], task["reason"]) == ("running", None)
    puppet.ends()
    assert api.ended(puppet.number)["status"] == "finished"


def test_head_of_a_long_poll_returns_at_once(api: Daemon, play: Play) -> None:
    """It has no body that could hold a change."""
    puppet = play(api)
    began = time.monotonic()
    for path in poll_paths(puppet):
        answer = api.request("HEAD", path)
        assert (answer.status, answer.body) == (200, b"")
    assert time.monotonic() - began < AT_ONCE


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/tasks", "GET HEAD OPTIONS"),
        ("/tasks/created", "GET HEAD OPTIONS"),
        ("/task/{}", "GET HEAD OPTIONS"),
        ("/task/{}/output", "GET HEAD OPTIONS"),
        ("/task/{}/state", "GET HEAD OPTIONS"),
        ("/task/{}/kill", "GET HEAD OPTIONS POST"),
        ("/site/production", "OPTIONS POST"),
        ("/pulsar/index.html", "GET HEAD OPTIONS"),
    ],
)
def test_options_and_405_list_the_allowed_methods(
    api: Daemon, ended: dict[str, Any], path: str, allowed: str
) -> None:
    """Both have the header ``Allow``. A method outside of it changes nothing."""
    path = path.format(ended["id"])
    before = newest(api)
    options = api.request("OPTIONS", path)
    assert options.status in {200, 204}
    assert options.body == b""
    assert sorted(options.headers["Allow"].split(", ")) == allowed.split()
    for method in {"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH"} - set(allowed.split()):
        answer = api.request(method, path)
        assert answer.status == 405, method
        assert sorted(answer.headers["Allow"].split(", ")) == allowed.split()
        if method != "HEAD":
            problem(answer, 405)
    assert newest(api) == before


@pytest.mark.parametrize(
    "app", "task tasks job jobs pulsar web websocket event events %74ask".split()
)
def test_post_to_a_reserved_name_creates_no_task(api: Daemon, app: str) -> None:
    """The answer is 404 or 405, below that name too."""
    before = newest(api)
    for rest in ("", "/", "/production", "/1", "/created"):
        answer = post(api, f"/{app}{rest}?action=run")
        assert answer.status in {404, 405}
        problem(answer, answer.status)
    assert newest(api) == before


# -- the queue


def test_waiting_task_is_created_and_can_be_polled(
    start: Start, tls: tuple[str, ...], play: Play
) -> None:
    """Its start ends polls for ``/output``, its end those for ``/state``."""
    daemon = start("--command", SHELL, "--max-running", "1", *tls)
    first = play(daemon)
    second = play(daemon, 4, wait=False)
    task = second.now()
    assert (task["status"], task["pid"], task["startedAt"]) == ("created", None, None)
    assert "running" in task["waitingFor"]
    change, end = second.poll("/output"), second.poll("/state")
    assert unchanged(daemon.get(f"{second.path}/output?timeout=0.3"))
    assert unchanged(daemon.get(f"{second.path}/state?timeout=0.3"))
    assert change.waits()
    first.ends()
    task = changed(change.answer())
    assert (task["status"], task["waitingFor"]) == ("running", None)
    second.starts()
    assert end.waits()
    second.ends()
    task = changed(end.answer())
    assert (task["status"], task["exitCode"]) == ("failed", 4)


def test_kill_of_a_waiting_task_prevents_its_start(
    start: Start, tls: tuple[str, ...], play: Play, tmp_path: Path
) -> None:
    """It never has a process, and the tasks behind it get their turn."""
    daemon = start("--command", SHELL, "--max-running", "1", *tls)
    first = play(daemon)
    marker = tmp_path / "marker"
    second = daemon.sh('touch "$PULSAR_VAR_marker"', marker=str(marker))
    third = daemon.sh("exit 0")
    end = Poll(daemon, f"/task/{second}/state")
    answer = daemon.get(f"/task/{second}/kill")
    assert (answer.status, answer.json()["status"]) == (200, "killed")
    task = changed(end.answer())
    assert (task["status"], task["pid"], task["startedAt"]) == ("killed", None, None)
    assert task["waitingFor"] is None
    assert task["reason"]
    first.ends()
    assert daemon.ended(third)["status"] == "finished"
    assert daemon.ended(second) == {**task, "output": ""}
    assert not marker.exists()


def test_full_queue_answers_503_with_retry_after(
    start: Start, tls: tuple[str, ...], play: Play
) -> None:
    """Refused tasks are not recorded. When the queue has room, tasks are accepted again."""
    daemon = start("--command", SHELL, "--max-running", "1", "--max-queued", "2", *tls)
    first = play(daemon)
    waiting = [daemon.sh("exit 0") for _ in range(2)]
    for _ in range(3):
        answer = daemon.post("/site/production", {"action": "run"})
        problem(answer, 503)
        assert int(answer.headers["Retry-After"]) > 0
    assert newest(daemon) == waiting[-1]
    first.ends()
    assert [daemon.ended(number)["status"] for number in waiting] == ["finished"] * 2
    assert daemon.ended(daemon.sh("exit 0"))["status"] == "finished"


# -- other sites


FOREIGN = [
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Sec-Fetch-Site": "CROSS-SITE"},
    {"Sec-Fetch-Site": "something-new"},
    {"Origin": "https://evil.example"},
    {"Origin": "null"},
    {"Origin": ""},
    {"Origin": "http://localhost"},
    {"Origin": "http://localhost:1"},
    {"Origin": "{base}.evil.example"},
    {"Origin": "{base}@evil.example"},
    {"Sec-Fetch-Site": "same-origin", "Origin": "https://evil.example"},
    {"Sec-Fetch-Site": "cross-site", "Origin": "{base}"},
]
OWN = [
    {"Sec-Fetch-Site": "same-origin"},
    {"Sec-Fetch-Site": "none"},
    {"Origin": "{base}"},
    {"Sec-Fetch-Site": "same-origin", "Origin": "{base}"},
    {},
]


def filled(daemon: Daemon, headers: dict[str, str]) -> dict[str, str]:
    """Return headers with the daemon's address in place of ``{base}``."""
    return {name: value.format(base=address(daemon)) for name, value in headers.items()}


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_requests_of_other_sites_answer_403(
    api: Daemon, play: Play, headers: dict[str, str]
) -> None:
    """The task does not change. A link to it can be followed."""
    puppet = play(api)
    headers = filled(api, headers)
    form = {**headers, "Content-Type": FORM}
    problem(api.request("POST", "/site/production", "action=run", form), 403)
    problem(api.request("POST", "/site/production?action=run", None, headers), 403)
    problem(api.get(f"{puppet.path}/kill", **headers), 403)
    problem(api.request("POST", f"{puppet.path}/kill", None, headers), 403)
    assert newest(api) == puppet.number
    task = puppet.now()
    assert (task["status"], task["reason"]) == ("running", None)
    problem(api.get(puppet.path, **headers), 403)
    reading = api.get(puppet.path, **{**headers, "Sec-Fetch-Mode": "navigate"})
    assert reading.status == 200
    assert reading.headers["Access-Control-Allow-Origin"] is None


@pytest.mark.parametrize("headers", OWN, ids=str)
def test_requests_of_the_page_and_of_programs_are_accepted(
    api: Daemon, play: Play, headers: dict[str, str]
) -> None:
    """Both may create and kill. Programs send neither header."""
    puppet = play(api)
    headers = filled(api, headers)
    assert api.request("POST", "/site/production?action=run", None, headers).status == 200
    assert api.get(f"{puppet.path}/kill", **headers).status == 200
    assert api.ended(puppet.number)["status"] == "killed"


BROWSERS = [
    "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0",
    "mozilla/4.0 (compatible; MSIE 6.0)",
    "Opera/9.80 (X11; Linux x86_64) Presto/2.12 Version/12.16",
]
REFERERS = [
    "https://evil.example/page",
    "http://evil.example",
    "{base}.evil.example/",
    "{base}@evil.example/",
    "http://localhost/",
    "http://localhost:1/",
    "about:blank",
    "null",
]


@pytest.mark.parametrize("referer", REFERERS)
def test_foreign_referer_answers_403(api: Daemon, play: Play, referer: str) -> None:
    """Over plain HTTP a browser identifies a site by this header alone. Reading works."""
    puppet = play(api)
    headers = filled(api, {"Referer": referer})
    problem(api.get(f"{puppet.path}/kill", **headers), 403)
    problem(api.request("POST", f"{puppet.path}/kill", None, headers), 403)
    problem(api.request("POST", "/site/production?action=run", None, headers), 403)
    problem(api.get("/site/production/tasks", **headers), 403)
    assert (newest(api), puppet.now()["status"]) == (puppet.number, "running")
    assert api.get(puppet.path, **headers).status == 200


@pytest.mark.parametrize("browser", BROWSERS)
def test_browser_without_an_origin_cannot_kill_by_a_link(
    api: Daemon, play: Play, browser: str
) -> None:
    """Only a link of the page can run the command that lists actions."""
    puppet = play(api)
    headers = {"User-Agent": browser}
    own = filled(api, {**headers, "Referer": "{base}/web/"})
    for kill in (headers, own):
        problem(api.get(f"{puppet.path}/kill", **kill), 403)
    problem(api.get("/site/production/tasks", **headers), 403)
    assert puppet.now()["status"] == "running"
    listing = api.get("/site/production/tasks", **own)
    assert problem(listing, 404)["type"].endswith(":no-listing")
    # The page may create tasks, even if the browser sends nothing but its origin.
    started = {**own, **filled(api, {"Origin": "{base}"})}
    path = "/site/production?action=run"
    assert api.request("POST", path, None, started).status == 200
    typed = api.get(f"{puppet.path}/kill", **headers, **{"Sec-Fetch-Site": "none"})
    assert typed.status == 200
    assert api.ended(puppet.number)["status"] == "killed"


@pytest.mark.parametrize("program", ["curl/7.88.1", "node-fetch", "", "x Mozilla/5.0"])
def test_program_can_kill_without_a_header(api: Daemon, play: Play, program: str) -> None:
    """The documented GET works for each User-Agent that is not a browser's."""
    puppet = play(api)
    assert api.get(f"{puppet.path}/kill", **{"User-Agent": program}).status == 200
    assert api.ended(puppet.number)["status"] == "killed"


# -- where links point


def urls(daemon: Daemon, number: int, host: str) -> set[str]:
    """Return the addresses, without paths, in the links of each kind of answer."""
    answers = [
        (daemon.get("/tasks?limit=1", Host=host).json()["url"], "/pulsar/index.html"),
        (daemon.get(f"/task/{number}", Host=host).json()["url"], f"/web#job/{number}"),
        (
            daemon.get(f"/task/{number}/state", Host=host).json()["task"]["url"],
            f"/web#job/{number}",
        ),
    ]
    created = daemon.request("POST", "/site/production?action=run", None, {"Host": host})
    assert created.headers["Location"] == f"/task/{created.json()['id']}"
    answers.append((created.json()["url"], f"/web#job/{created.json()['id']}"))
    assert all(url.endswith(rest) for url, rest in answers)
    return {url.removesuffix(rest) for url, rest in answers}


@pytest.mark.parametrize(
    "host",
    [
        "192.0.2.1",
        "[2001:db8::1]",
        "0.0.0.0",
        "",
    ],
)
def test_foreign_address_in_host_header_is_not_linked(
    api: Daemon, ended: dict[str, Any], host: str
) -> None:
    """Links contain the address to which the request came."""
    assert urls(api, ended["id"], host) == {f"{api.scheme}://127.0.0.1:{api.port}"}


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8081",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "localhost@evil.example",
        "evil.example#localhost",
        "evil.example/localhost",
        "localhost:80:80",
        "localhost:port",
        '"><script>',
    ],
)
def test_foreign_host_header_answers_421(
    api: Daemon, ended: dict[str, Any], host: str
) -> None:
    """An attacker's name can resolve to the daemon (DNS rebinding)."""
    for path in ("/tasks", f"/task/{ended['id']}", "/pulsar/index.html", "/nothing"):
        answer = api.get(path, Host=host)
        assert problem(answer, 421)["type"].endswith(":unknown-host")
        assert host not in str(answer.headers["Location"])


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST", "127.0.0.1", "[::1]", "a.localhost"]
)
def test_loopback_host_header_is_kept_in_links(
    api: Daemon, ended: dict[str, Any], host: str
) -> None:
    """Links then work through a tunnel, with the name and port of the client."""
    own = f"{api.scheme}://{host.lower()}:12345"
    assert urls(api, ended["id"], f"{host}:12345") == {own}


def test_proxy_headers_do_not_change_links(api: Daemon, ended: dict[str, Any]) -> None:
    """Any client can send them."""
    headers = {
        "X-Forwarded-Host": "evil.example",
        "X-Forwarded-Proto": "ftp",
        "Forwarded": "host=evil.example",
        "X-Original-URL": "/task/1/kill",
    }
    task = api.get(f"/task/{ended['id']}", **headers).json()
    assert task == ended


def test_public_url_sets_links_and_the_own_origin(
    start: Start, tls: tuple[str, ...]
) -> None:
    """The Host header does not matter. Pages of that address may create and kill."""
    public = "https://deploy.example.com/pulsar"
    daemon = start("--command", "true", "--public-url", f"{public}/", *tls)
    number = daemon.run("site", "production", "run")
    daemon.ended(number)
    for host in ("localhost", "deploy.example.com", "192.0.2.1"):
        assert urls(daemon, number, host) == {public}
    problem(daemon.get("/tasks", Host="evil.example"), 421)
    before = newest(daemon)
    for origin in ("https://evil.example", daemon.base, "http://deploy.example.com"):
        path = "/site/production?action=run"
        problem(daemon.request("POST", path, None, {"Origin": origin}), 403)
    assert newest(daemon) == before
    path = "/site/production?action=run"
    headers = {"Origin": "https://deploy.example.com"}
    assert daemon.request("POST", path, None, headers).status == 200


def test_dev_allows_the_names_of_its_certificate(start: Start) -> None:
    """Links then lead to api.pulsar.local, as documented."""
    daemon = start("--command", "true", "--dev")
    number = daemon.run("site", "production", "run")
    daemon.ended(number)
    assert urls(daemon, number, "api.pulsar.local:8001") == {
        "https://api.pulsar.local:8001"
    }
    problem(daemon.get("/tasks", Host="pulsar.local.evil.example"), 421)


# -- large outputs


def drained(connection: HTTPConnection, path: str) -> tuple[str, int]:
    """Read an answer in small pieces. Return the hash and size of the text in it."""
    connection.request("GET", path)
    response = connection.getresponse()
    assert response.status == 200
    body = b"".join(iter(lambda: response.read(1 << 16), b""))
    value = json.loads(body)
    task = next(iter(value["tasks"].values())) if "tasks" in value else value
    text = task.get("task", task)["output"].encode()
    return hashlib.sha256(text).hexdigest(), len(text)


def test_huge_output_is_sent_in_constant_memory(start: Start, tls: tuple[str, ...]) -> None:
    """Every answer that holds a task streams 40 MB of text, complete to the last byte."""
    daemon = start("--command", SHELL, *tls)
    words = 'zeile "äöü" \\ € 𝄞\t.'
    line = f"{words}\n"
    count = HUGE // len(line.encode())
    run = 'yes "$PULSAR_VAR_words" | head -n $PULSAR_VAR_count'
    number = daemon.sh(run, words=words, count=count)
    assert daemon.ended(number)["outputSize"] == count * len(line.encode())
    whole = (line * count).encode()
    wanted = hashlib.sha256(whole).hexdigest(), len(whole)
    connection = daemon.connect()
    daemon.forget_peak()
    before = daemon.memory()
    connection.request("HEAD", f"/task/{number}")
    assert Answer(connection.getresponse()).body == b""
    for path in (
        f"/task/{number}",
        f"/task/{number}/output",
        f"/task/{number}/output?offset=0",
        f"/task/{number}/state",
        f"/task/{number}/kill",
        "/tasks?output=full",
    ):
        assert drained(connection, path) == wanted, path
        assert daemon.peak() - before < FLAT, path
    connection.close()
    assert (
        len(daemon.get("/tasks").json()["tasks"][str(number)]["output"].encode())
        <= TAIL + 3
    )


# -- by curl


SCRIPT = Path(__file__).with_name("contract_by_curl.sh")


def by_curl(base: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the script that checks the contract by curl."""
    return subprocess.run(
        ["sh", SCRIPT, base, *options],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE * 2,
    )


@pytest.mark.needs("curl")
def test_contract_by_curl_passes(start: Start, tls: tuple[str, ...]) -> None:
    """Each line of the script's output is a promise that it has checked."""
    daemon = start("--command", SHELL, "--max-running", "3", "--max-queued", "2", *tls)
    options = ("--cacert", str(CERTIFICATE)) if tls else ()
    found = by_curl(daemon.base, *options)
    lines = found.stdout.splitlines()
    assert [line for line in lines if not line.startswith("ok ")] == [], found.stderr
    assert len(lines) > 60
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.needs("curl")
def test_contract_by_curl_fails_for_a_wrong_daemon(start: Start) -> None:
    """The daemon has a wrong command, or does not run."""
    daemon = start("--command", "true")
    wrong = by_curl(daemon.base)
    assert wrong.returncode == 1
    assert any(line.startswith("FAIL") for line in wrong.stdout.splitlines())
    daemon.stop()
    assert by_curl(daemon.base).returncode == 1
