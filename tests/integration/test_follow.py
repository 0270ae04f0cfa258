"""Following a task by its raw log or its events: cut off, resumed, and read slowly."""

import hashlib
import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from pulsar_api.shim.shim import STDERR, STDOUT
from tests.integration.conftest import Start
from tests.integration.daemon import PATIENCE, SHELL, Daemon, problem, wait_for
from tests.integration.test_restart import streams

CUTS = int(os.environ.get("PULSAR_CUTS", "40"))
SLOW = float(os.environ.get("PULSAR_SLOW", "5"))
"""Seconds for which clients slowly read a flood of 50 MB/s."""
MIB = 1 << 20


@pytest.fixture
def daemon(start: Start) -> Daemon:
    """Return a daemon that runs lines of shell and restarts on the same port."""
    daemon = start("--command", SHELL, "--kill-grace=1")
    daemon.arguments[daemon.arguments.index("--port") + 1] = str(daemon.port)
    return daemon


def events(lines: Iterator[bytes]) -> Iterator[tuple[str, str, Any]]:
    """Yield kind, id and data of each complete server-sent event."""
    kind = cursor = ""
    data: list[str] = []
    for raw in lines:
        if not raw.endswith(b"\n"):
            return
        line = raw.decode().rstrip("\n")
        name, _, value = line.partition(": ")
        if name == "event":
            kind = value
        elif name == "id":
            cursor = value
        elif name == "data":
            data.append(value)
        elif not line and data:
            yield kind, cursor, json.loads("\n".join(data))
            data = []


def all_events(daemon: Daemon, path: str, **headers: str) -> list[tuple[str, str, Any]]:
    """Return the events of a stream that ends."""
    answer = daemon.get(path, **headers)
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "text/event-stream"
    assert answer.headers["X-Accel-Buffering"] == "no"
    return list(events(iter(answer.body.splitlines(keepends=True))))


# -- the raw log


def test_log_has_the_exact_bytes(daemon: Daemon) -> None:
    """The daemon neither decodes nor adds anything. Browsers show the log as text."""
    number = daemon.sh(r"printf 'a\377\000b\303\244\n'; printf 'err\n' >&2")
    daemon.ended(number)
    answer = daemon.get(f"/task/{number}/log")
    assert answer.body == daemon.output_file(number).read_bytes()
    assert b"a\xff\x00b\xc3\xa4\n" in answer.body
    assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    head = daemon.request("HEAD", f"/task/{number}/log")
    assert head.headers["Content-Length"] == str(len(answer.body))
    etag = answer.headers["ETag"]
    assert daemon.get(f"/task/{number}/log", **{"If-None-Match": etag}).status == 304
    assert daemon.get("/task/99/log").status == 404
    assert daemon.post(f"/task/{number}/log").status == 405


@pytest.mark.parametrize(
    ("wanted", "status", "body", "content_range"),
    [
        ("bytes=0-2", 206, b"one", "bytes 0-2/13"),
        ("bytes=4-", 206, b"two\nthree", "bytes 4-12/13"),
        ("bytes=-5", 206, b"three", "bytes 8-12/13"),
        ("bytes=8-100", 206, b"three", "bytes 8-12/13"),
        ("bytes=-100", 206, b"one\ntwo\nthree", "bytes 0-12/13"),
        ("bytes=13-", 416, None, "bytes */13"),
        ("bytes=0-1,3-4", 200, b"one\ntwo\nthree", None),
        ("lines=1-2", 200, b"one\ntwo\nthree", None),
        ("bytes=x", 200, b"one\ntwo\nthree", None),
    ],
)
def test_range_selects_a_part_of_the_log(
    daemon: Daemon, wanted: str, status: int, body: bytes | None, content_range: str | None
) -> None:
    """It follows RFC 9110, so ``curl -C -`` can resume a download."""
    number = daemon.sh("printf 'one\ntwo\nthree'")
    daemon.ended(number)
    path = f"/task/{number}/log"
    answer = daemon.get(path, Range=wanted)
    assert answer.status == status
    assert answer.headers["Content-Range"] == content_range
    if body is None:
        problem(answer, 416)
    else:
        assert answer.body == body
    etag = daemon.get(path).headers["ETag"]
    same = daemon.get(path, **{"Range": wanted, "If-Range": etag})
    assert same.status == status
    other = daemon.get(path, **{"Range": wanted, "If-Range": '"other"'})
    assert (other.status, other.body) == (200, b"one\ntwo\nthree")


def test_log_can_be_limited_and_timed(daemon: Daemon) -> None:
    """Parameters select stream, tail and offset, and put the time before each line."""
    run = "echo out; echo err >&2; sleep 0.3; printf 'half '; sleep 0.1; echo line"
    number = daemon.sh(run)
    daemon.ended(number)
    path = f"/task/{number}/log"
    assert daemon.get(f"{path}?stream=stdout").body == b"out\nhalf line\n"
    assert daemon.get(f"{path}?stream=stderr").body == b"err\n"
    assert daemon.get(f"{path}?tail=5").body == b"line\n"
    assert daemon.get(f"{path}?tail=500").body == b"out\nerr\nhalf line\n"
    assert daemon.get(f"{path}?offset=8").body == b"half line\n"
    timed = daemon.get(f"{path}?times=1").body.decode()
    found = re.findall(r"^(\S+Z) (.*)$", timed, re.MULTILINE)
    assert [text for _, text in found] == ["out", "err", "half line"]
    task = daemon.task(number)
    assert task["startedAt"][:16] <= found[0][0] <= found[1][0] < found[2][0]
    assert found[2][0] <= task["endedAt"]
    for query in ("stream=both", "times=yes", "follow=2", "tail=-1", "offset=x"):
        problem(daemon.get(f"{path}?{query}"), 400, query.partition("=")[0])


@pytest.mark.needs("curl")
def test_follow_receives_the_log_to_its_last_byte(daemon: Daemon, tmp_path: Path) -> None:
    """``curl -N`` follows both streams, with and without times, and one stream alone."""
    go = tmp_path / "go"
    os.mkfifo(go)
    number = daemon.sh(f"echo one; read x < {go}; echo two >&2; exit 3")
    url = f"{daemon.base}/task/{number}/log?follow=1"
    command = ["curl", "--silent", "--fail", "--no-buffer"]
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "text": True}
    with (
        subprocess.Popen([*command, url], **options) as plain,
        subprocess.Popen([*command, f"{url}&times=1"], **options) as timed,
        subprocess.Popen([*command, f"{url}&stream=stderr"], **options) as errors,
    ):
        assert plain.stdout is not None
        assert plain.stdout.readline() == "one\n"
        assert timed.stdout is not None
        assert timed.stdout.readline().endswith("Z one\n")
        go.write_text("go\n")
        assert plain.communicate()[0] == "two\n"
        assert timed.communicate()[0].endswith("Z two\n")
        assert errors.communicate()[0] == "two\n"
        assert (plain.returncode, timed.returncode, errors.returncode) == (0, 0, 0)


@pytest.mark.needs("curl")
def test_stop_of_the_daemon_cuts_streams_off(daemon: Daemon) -> None:
    """A client must not take the stop of the daemon for the end of the task."""
    number = daemon.sh("echo one; exec sleep 60")
    command = ["curl", "--silent", "--no-buffer"]
    paths = [f"/task/{number}/log?follow=1", f"/task/{number}/events", "/events"]
    clients = [
        subprocess.Popen([*command, daemon.base + path], stdout=subprocess.PIPE)
        for path in paths
    ]
    for client in clients:
        assert client.stdout is not None
        assert client.stdout.readline()
    daemon.process.terminate()
    for client in clients:
        client.communicate()
        assert client.returncode == 18  # "a file was only partially transferred"
    assert daemon.process.wait(PATIENCE) == 0
    assert "Traceback" not in daemon.log.read_text()


# -- events


def test_events_have_states_output_and_end(daemon: Daemon) -> None:
    """Output has its stream and offset. The end is the last event."""
    number = daemon.sh("echo one; echo ä >&2; sleep 0.1; echo three; exit 3")
    found = all_events(daemon, f"/task/{number}/events")
    kinds = [kind for kind, _, _ in found]
    assert kinds[0] == "state"
    assert kinds[-1] == "end"
    assert set(kinds[1:-1]) <= {"state", "output"}
    output = [data for kind, _, data in found if kind == "output"]
    text = "".join(data["text"] for data in output)
    assert text == daemon.task(number)["output"] == "one\nä\nthree\n"
    assert [data["stream"] for data in output] == ["stdout", "stderr", "stdout"]
    assert [data["offset"] for data in output] == [0, 4, 7]
    end = found[-1][2]
    assert (end["status"], end["exitCode"]) == ("failed", 3)
    assert "output" not in end
    # After the end, 204 tells an EventSource not to reconnect.
    last = {"Last-Event-ID": found[-1][1]}
    assert daemon.get(f"/task/{number}/events", **last).status == 204
    # Resumed after any event, the stream has exactly the events behind it.
    for place, (_, cursor, _) in enumerate(found[:-1]):
        rest = all_events(daemon, f"/task/{number}/events?lastEventId={cursor}")
        texts = [data for kind, _, data in found[place + 1 :] if kind == "output"]
        assert [data for kind, _, data in rest if kind == "output"] == texts
    assert all_events(daemon, f"/task/{number}/events?offset=5")[0][2]["text"] == "ä\n"
    far = {"Last-Event-ID": f"0-{'9' * 17}-0"}
    assert all_events(daemon, f"/task/{number}/events", **far)[-1][0] == "end"
    for odd in ("x", "1-2", "1-2-3-4", "-1-2-3", "9" * 18 + "-1-1"):
        problem(
            daemon.get(f"/task/{number}/events", **{"Last-Event-ID": odd}),
            400,
            "Last-Event-ID",
        )


@pytest.mark.needs("curl")
def test_events_of_all_tasks_can_be_resumed(daemon: Daemon) -> None:
    """Over a restart too, each task appears once as created, and once as ended."""
    client = subprocess.Popen(
        ["curl", "--silent", "--no-buffer", f"{daemon.base}/events"], stdout=subprocess.PIPE
    )
    assert client.stdout is not None
    assert client.stdout.readline() == b"retry: 1000\n"
    first = daemon.sh("exit 3")
    seen: dict[int, list[str]] = {}
    cursor = ""
    for kind, cursor, data in events(iter(client.stdout.readline, b"")):  # noqa: B007
        seen.setdefault(data["id"], []).append(f"{kind} {data['status']}")
        if data["status"] == "failed":
            break
    client.kill()
    client.communicate()
    assert list(seen) == [first]
    assert seen[first][0].startswith("created ")
    assert seen[first][-1].endswith(" failed")
    assert all(text.startswith("state ") for text in seen[first][1:])
    assert seen[first][0] == "created created"
    numbers = [daemon.sh("true") for _ in range(120)]
    for number in numbers:
        daemon.ended(number)
    daemon.kill()
    daemon.start()
    last = daemon.sh("exit 4")
    daemon.ended(last)
    with closing(daemon.connect()) as connection:
        connection.request("GET", "/events", headers={"Last-Event-ID": cursor})
        found = []
        for event in events(iter(connection.getresponse().readline, b"")):
            found.append(event)
            if event[2]["id"] == last and event[2]["status"] == "failed":
                break
    created = [data["id"] for kind, _, data in found if kind == "created"]
    assert created == [*numbers, last]
    final = {data["id"]: data["status"] for _, _, data in found}
    assert final == {**dict.fromkeys(numbers, "finished"), last: "failed"}


# -- cut off and resumed

TALKER = """
import os, sys, time
n = 0
while not os.path.exists(sys.argv[1]):
    os.write(1 + n % 2, b"%07d \\xc3\\xa4\\n" % n)
    n += 1
    if n % 10 == 0:
        time.sleep(0.005)
sys.exit(7)
"""


@contextmanager
def attempt(daemon: Daemon) -> Iterator[HTTPConnection]:
    """Ignore errors of the connection, as the daemon can be away or stop."""
    try:
        with closing(daemon.connect()) as connection:
            yield connection
    except (OSError, HTTPException):
        time.sleep(0.01)


def follow_events(daemon: Daemon, number: int, cut: Callable[[], float], got: Any) -> None:
    """Follow by events, with disconnects at random moments."""
    cursor = ""
    while True:
        with attempt(daemon) as connection:
            headers = {"Last-Event-ID": cursor} if cursor else {}
            connection.request("GET", f"/task/{number}/events", headers=headers)
            lines = iter(connection.getresponse().readline, b"")
            until = cut()
            for kind, place, data in events(lines):
                cursor = place
                if kind == "output":
                    got.append(data["text"].encode())
                if kind == "end":
                    return
                if time.monotonic() > until:
                    break


def follow_log(daemon: Daemon, number: int, cut: Callable[[], float], got: Any) -> None:
    """Follow by ranges of the raw log, with disconnects at random moments."""
    size = 0
    while True:
        with attempt(daemon) as connection:
            connection.request("GET", f"/task/{number}?output=none")
            task = json.loads(connection.getresponse().read())
            ended = task.get("status") in {"finished", "failed"}
            connection.request(
                "GET", f"/task/{number}/log", headers={"Range": f"bytes={size}-"}
            )
            response = connection.getresponse()
            if response.status == 416 and ended:
                return
            if response.status == 416:
                response.read()
                time.sleep(0.005)
                continue
            until = cut()
            while response.status == 206 and (data := response.read1(1 << 12)):
                got.append(data)
                size += len(data)
                if time.monotonic() > until:
                    break


def follow_stream(daemon: Daemon, number: int, cut: Callable[[], float], got: Any) -> None:
    """Follow by the open stream of the raw log, with disconnects at random moments."""
    size = 0
    while True:
        with attempt(daemon) as connection:
            connection.request("GET", f"/task/{number}/log?follow=1&offset={size}")
            response = connection.getresponse()
            until = cut()
            while response.status == 200:
                data = response.read1(1 << 12)
                if not data and response.isclosed():
                    return
                got.append(data)
                size += len(data)
                if time.monotonic() > until:
                    break


def follow_polls(daemon: Daemon, number: int, cut: Callable[[], float], got: Any) -> None:
    """Follow by long-polls with an offset, with disconnects at random moments."""
    offset = version = 0
    while True:
        with attempt(daemon) as connection:
            until = cut()
            while time.monotonic() < until:
                path = f"/task/{number}/output?since={version}&offset={offset}&timeout=1"
                connection.request("GET", path)
                answer = json.loads(connection.getresponse().read())
                if not answer.get("changed"):
                    break
                task = answer["task"]
                got.append(task["output"].encode())
                offset, version = answer["nextOffset"], task["version"]
                if task["status"] in {"finished", "failed"}:
                    return


def test_resumed_client_misses_and_repeats_nothing(daemon: Daemon, tmp_path: Path) -> None:
    """Each way to follow survives cuts at any moment, and kills of the daemon."""
    script, stop = tmp_path / "talker.py", tmp_path / "stop"
    script.write_text(TALKER)
    number = daemon.sh(f"exec {sys.executable} -IS {script} {stop}")
    chance = random.Random(11)
    ways = [follow_events, follow_log, follow_stream, follow_polls]
    counted = dict.fromkeys((way.__name__ for way in ways), 0)
    read: dict[str, list[bytes]] = {name: [] for name in counted}

    def run(way: Callable[..., None]) -> None:
        def cut() -> float:
            counted[way.__name__] += 1
            if counted[way.__name__] > CUTS:
                return float("inf")
            return time.monotonic() + chance.uniform(0, 0.05)

        way(daemon, number, cut, read[way.__name__])

    threads = [Thread(target=run, args=(way,)) for way in ways]
    for thread in threads:
        thread.start()
    for part in range(1, 4):
        wait_for(lambda p=part: min(counted.values()) > CUTS * p / 4, "cuts", 300)  # type: ignore[misc]
        daemon.kill()
        daemon.start()
    wait_for(lambda: min(counted.values()) > CUTS, "all cuts", 300)
    stop.touch()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert daemon.ended(number)["exitCode"] == 7
    whole = daemon.output_file(number).read_bytes()
    for name, pieces in read.items():
        assert b"".join(pieces) == whole, name
    print(f"{counted} cuts, {len(whole)} bytes each")
    out, err = streams(daemon, number)
    path = f"/task/{number}/log?stream="
    assert daemon.get(f"{path}stdout").body == out
    assert daemon.get(f"{path}stderr").body == err
    assert (STDOUT, STDERR) == (1, 2)
    assert "Traceback" not in daemon.log.read_text()


# -- the cost of following


def test_following_sends_little_more_than_the_text(daemon: Daemon, tmp_path: Path) -> None:
    """The output has 10,000 lines. Polls for the whole output are counted as well."""
    script = tmp_path / "lines.py"
    script.write_text(
        "import os, time\n"
        "for n in range(10000):\n"
        "    os.write(1, b'%099d\\n' % n)\n"
        "    if n % 20 == 0: time.sleep(0.005)\n"
    )
    number = daemon.sh(f"exec {sys.executable} -IS {script}")
    sent = dict.fromkeys(("whole each time", "offset", "events"), 0)
    texts = dict.fromkeys(sent, "")

    def poll() -> None:
        # The documented poll has no parameters, so each answer has the whole output.
        while True:
            answer = daemon.get(f"/task/{number}/output")
            sent["whole each time"] += len(answer.body)
            task = answer.json().get("task", {"status": "unchanged"})
            if task["status"] == "finished":
                texts["whole each time"] = task["output"]
                return

    def offset() -> None:
        version = at = 0
        while True:
            answer = daemon.get(f"/task/{number}/output?since={version}&offset={at}")
            sent["offset"] += len(answer.body)
            value = answer.json()
            version, at = value["task"]["version"], value["nextOffset"]
            texts["offset"] += value["task"]["output"]
            if value["task"]["status"] == "finished":
                return

    def stream() -> None:
        answer = daemon.get(f"/task/{number}/events")
        sent["events"] += len(answer.body)
        for kind, _, data in events(iter(answer.body.splitlines(keepends=True))):
            if kind == "output":
                texts["events"] += data["text"]

    threads = [Thread(target=way) for way in (poll, offset, stream)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    whole = daemon.output_file(number).read_text()
    assert len(whole) == 1_000_000
    assert set(texts.values()) == {whole}
    print({name: f"{size / len(whole):.2f} x the text" for name, size in sent.items()})
    assert sent["offset"] < 1.3 * len(whole)
    assert sent["events"] < 2 * len(whole)


def test_slow_reader_receives_everything_in_constant_memory(
    start: Start, tmp_path: Path
) -> None:
    """Its task does not wait for it, although it prints 50 MB/s."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE_")}
    daemon = start("--command", SHELL, "--max-output-size=0", environ=environ)
    script = tmp_path / "flood.py"
    script.write_text(
        "import os, time\n"
        f"for n in range({int(SLOW * 200)}):\n"
        "    os.write(1, b'%07d\\n' % n * 32768)\n"
        "    time.sleep(0.005)\n"
    )
    number = daemon.sh(f"exec {sys.executable} -IS {script}")
    paths = [f"/task/{number}/log?follow=1", f"/task/{number}/events"]
    slow = []
    for path in paths:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(PATIENCE)
        sock.connect((daemon.host, daemon.port))
        sock.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        slow.append(sock)
    begin = [sock.recv(1024) for sock in slow]
    daemon.forget_peak()
    memory = daemon.memory()
    while daemon.task(number)["status"] == "running":
        for place, sock in enumerate(slow):
            begin[place] += sock.recv(512)
        time.sleep(0.2)
    assert daemon.ended(number)["status"] == "finished"
    grown = daemon.peak() - memory
    print(f"memory grew by {grown / MIB:.1f} MiB")
    assert grown < 16 * MIB
    whole = daemon.output_file(number).read_bytes()
    digests = []
    for place, sock in enumerate(slow):
        with sock, sock.makefile("rb") as file:
            text = begin[place] + file.read()
        body = text.partition(b"\r\n\r\n")[2]
        if "events" in paths[place]:
            lines = iter(body.splitlines(keepends=True))
            found = [data["text"] for kind, _, data in events(lines) if kind == "output"]
            body = "".join(found).encode()
        digests.append(hashlib.sha256(body).digest())
    assert digests == [hashlib.sha256(whole).digest()] * 2


def test_marker_replaces_the_dropped_middle_of_an_output(
    start: Start, tmp_path: Path
) -> None:
    """A request with a Range gets the whole log, instead of zeros for the middle."""
    daemon = start("--command", SHELL, "--max-output-size=256K")
    script = tmp_path / "talk.py"
    script.write_text("import os\nfor n in range(100000): os.write(1, b'%09d\\n' % n)\n")
    number = daemon.sh(f"exec {sys.executable} -IS {script}")
    daemon.ended(number)
    cut = daemon.task(number)["outputCut"]
    line = f"\n[bytes {cut['from']} to {cut['to']} were cut: --max-output-size]\n"
    expected = daemon.task(number)["output"]
    assert expected.count(line) == 1
    log = daemon.get(f"/task/{number}/log", Range="bytes=0-10")
    assert (log.status, log.body.decode()) == (200, expected)
    found = all_events(daemon, f"/task/{number}/events")
    output = [data for kind, _, data in found if kind == "output"]
    assert "".join(data["text"] for data in output) == expected
    assert [data["text"] for data in output if data["stream"] is None] == [line]
    late = daemon.get(f"/task/{number}/log?follow=1&offset={cut['to']}")
    assert late.body.decode() == expected.partition(line)[2]
