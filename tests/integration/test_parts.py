"""Tests of parts of an output: its lines, its pieces with stream and time, and searches."""

import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest

from pulsar_api.output.lines import LEAST, MOST
from pulsar_api.web import encoding
from tests.integration.conftest import Start
from tests.integration.daemon import SHELL, Daemon, problem, wait_for

MIB = 1 << 20


@pytest.fixture
def daemon(start: Start) -> Daemon:
    """Return a daemon that runs lines of shell."""
    return start("--command", SHELL, "--kill-grace=1")


def get(daemon: Daemon, path: str) -> Any:
    """Return the JSON of a response with status 200."""
    answer = daemon.get(path)
    assert answer.status == 200, answer.body
    assert answer.headers["Content-Type"] == "application/json"
    return answer.json()


def all_segments(daemon: Daemon, number: int) -> list[list[int]]:
    """Return all segments, in as many requests as needed."""
    found = []
    at: int | None = 0
    while at is not None:
        answer = get(daemon, f"/task/{number}/lines?from={at}")
        found += answer["segments"]
        at = answer["nextFrom"]
    return found


def pieces(daemon: Daemon, number: int, start: int, end: int) -> str:
    """Return the text between two offsets, in as many requests as needed."""
    text = ""
    while start < end:
        answer = get(daemon, f"/task/{number}/pieces?offset={start}&end={end}")
        assert answer["nextOffset"] > start
        text += "".join(part for _, _, part in answer["pieces"])
        start = answer["nextOffset"]
    return text


def test_segments_and_searches_locate_lines_of_a_large_log(daemon: Daemon) -> None:
    """The segments join without gaps, and a search gives the same line numbers."""
    number = daemon.sh("seq -f 'line %07.0f ä' 300000")
    daemon.ended(number)
    answer = get(daemon, f"/task/{number}/lines")
    data = daemon.output_file(number).read_bytes()
    assert (answer["size"], answer["lines"]) == (len(data), 300_000)
    assert (answer["cut"], answer["nextFrom"]) == (None, None)
    task = daemon.task(number)
    assert (answer["status"], answer["version"]) == ("finished", task["version"])
    segments = answer["segments"]
    assert segments[0] == [0, 1, True]
    ends = [segment[0] for segment in segments[1:]] + [len(data)]
    for (offset, line, begins), end in zip(segments, ends, strict=True):
        assert begins is True
        assert data[offset:].startswith(f"line {line:07} ".encode())
        assert end == len(data) or LEAST <= end - offset <= LEAST + 20
    assert (
        get(daemon, f"/task/{number}/lines?from={segments[9][0]}")["segments"]
        == (segments[9:])
    )
    offset, line, _ = segments[7]
    end = segments[8][0]
    assert pieces(daemon, number, offset, end) == data[offset:end].decode()
    found = get(daemon, f"/task/{number}/search?text=LINE 0123".replace(" ", "%20"))
    assert len(found["matches"]) == 1000
    assert found["matches"][0] == [123_000, data.index(b"line 0123000")]
    found = get(daemon, f"/task/{number}/search?text=0299999")
    assert found == {
        "matches": [[299_999, data.index(b"0299999")]],
        "nextFrom": None,
        "searched": len(data),
    }


def test_an_output_without_newlines_has_segments_between_characters(daemon: Daemon) -> None:
    """All segments are in line 1, and only the first begins it."""
    number = daemon.sh("printf 'x'; yes 'ä€' | head -n 100000 | tr -d '\\n'")
    daemon.ended(number)
    segments = all_segments(daemon, number)
    assert [line for _, line, _ in segments] == [1] * len(segments)
    assert [begins for _, _, begins in segments] == [True, *[False] * (len(segments) - 1)]
    data = daemon.output_file(number).read_bytes()
    ends = [segment[0] for segment in segments[1:]] + [len(data)]
    for (offset, _, _), end in zip(segments, ends, strict=True):
        assert end - offset <= MOST
        data[offset:end].decode()


@pytest.mark.parametrize("begun", [True, False])
def test_a_task_that_has_printed_nothing_has_no_parts(
    start: Start,
    begun: bool,  # noqa: FBT001
) -> None:
    """It has ended, or it waits and has no files yet."""
    daemon = start("--command", SHELL, "--kill-grace=1", "--max-running=1")
    if not begun:
        daemon.sh("sleep 600")
    number = daemon.sh("true")
    if begun:
        daemon.ended(number)
    answer = get(daemon, f"/task/{number}/lines")
    assert answer.pop("version") > 0
    assert answer == {
        "size": 0,
        "lines": 0,
        "segments": [],
        "styles": {},
        "nextFrom": None,
        "cut": None,
        "status": "finished" if begun else "created",
    }
    answer = get(daemon, f"/task/{number}/pieces")
    assert (answer.pop("began") is not None) == begun
    assert answer == {"offset": 0, "nextOffset": 0, "size": 0, "pieces": []}
    answer = get(daemon, f"/task/{number}/search?text=x")
    assert answer == {"matches": [], "nextFrom": None, "searched": 0}


def test_segments_grow_with_a_task(daemon: Daemon, tmp_path: Path) -> None:
    """Earlier segments stay valid. The version is that of the output in the response."""
    go = tmp_path / "go"
    number = daemon.sh(
        f"seq 20000; printf begun; while ! [ -e {go} ]; do sleep 0.01; done; echo ' end'"
    )

    def begun() -> Any:
        answer = get(daemon, f"/task/{number}/lines")
        return answer if answer["size"] == 108_899 else None

    first = wait_for(begun, "what it prints at once")
    assert (first["status"], first["lines"]) == ("running", 20_000)
    poll = f"/task/{number}/output?since={first['version']}&output=none&timeout=0"
    assert get(daemon, poll) == {"changed": False}
    go.touch()
    daemon.ended(number)
    last = get(daemon, f"/task/{number}/lines")
    assert (last["size"], last["lines"], last["status"]) == (108_904, 20_001, "finished")
    assert last["segments"] == first["segments"]
    assert last["version"] > first["version"]


def test_pieces_have_their_stream_and_time(daemon: Daemon, tmp_path: Path) -> None:
    """The time is in milliseconds after the start, which is a time of day."""
    step = tmp_path / "step"
    wait = f"while ! [ -e {step} ]; do sleep 0.01; done"
    number = daemon.sh(f"printf 'out ä'; {wait}; echo err >&2")
    wait_for(lambda: daemon.task(number)["outputSize"] == 6, "the first piece")
    step.touch()
    task = daemon.ended(number)
    answer = get(daemon, f"/task/{number}/pieces")
    (out, at, text), (err, later, rest) = answer.pop("pieces")
    assert (out, text, err, rest) == ("stdout", "out ä", "stderr", "err\n")
    assert 0 <= at <= later
    began = answer.pop("began")
    with sqlite3.connect(daemon.state / "pulsar-api.db") as db:
        (started,) = db.execute("SELECT started_at FROM task").fetchone()
    db.close()
    assert abs(began - started) < 10
    assert answer == {"offset": 0, "nextOffset": 10, "size": task["outputSize"]}
    # An offset in the middle of a character gives the whole character.
    answer = get(daemon, f"/task/{number}/pieces?offset=5&end=7")
    assert (answer["offset"], answer["nextOffset"]) == (4, 7)
    assert [text for _, _, text in answer["pieces"]] == ["ä", "e"]
    for query in ("offset=99", "offset=6&end=3"):
        assert get(daemon, f"/task/{number}/pieces?{query}")["pieces"] == []


def test_a_response_has_at_most_256_kib_of_pieces(daemon: Daemon) -> None:
    """A client continues at ``nextOffset``, and gets the whole log."""
    number = daemon.sh("seq 200000")
    daemon.ended(number)
    answer = get(daemon, f"/task/{number}/pieces?end={MIB}")
    assert answer["nextOffset"] <= 1 << 18
    assert answer["size"] > MIB
    text = pieces(daemon, number, 0, answer["size"])
    assert text == "".join(f"{n}\n" for n in range(1, 200_001))


def test_lines_pieces_and_searches_show_a_cut(start: Start) -> None:
    """A segment covers the cut, a marker tells of it, and searches find nothing in it.

    The marker ends the line before the cut, so the text after it is two lines later.
    """
    daemon = start("--command", SHELL, "--max-output-size", "2M")
    number = daemon.sh("seq -f 'number %.0f of many' 400000")
    task = daemon.ended(number)
    answer = get(daemon, f"/task/{number}/lines")
    start_, end = answer["cut"]
    assert daemon.task(number)["outputCut"] == {"from": start_, "to": end}
    data = daemon.output_file(number).read_bytes()
    segments = answer["segments"]
    at = [offset for offset, _, _ in segments].index(start_)
    hole, after = segments[at : at + 2]
    line = 1 + data[:start_].count(b"\n")
    assert hole == [start_, line, data[start_ - 1 : start_] == b"\n"]
    assert after == [end, line + 2, True]
    assert answer["size"] == task["outputSize"] == len(data)
    lines = line + 1 + data[end:].count(b"\n")
    assert answer["lines"] == lines
    found = get(daemon, f"/task/{number}/search?text=number%20400000")
    assert found["matches"] == [[lines, data.index(b"number 400000")]]
    # The cut reads as NUL bytes, which are not part of the output.
    assert get(daemon, f"/task/{number}/search?text=%00")["matches"] == []
    part = get(daemon, f"/task/{number}/pieces?offset={start_ - 5}&end={start_ + 9}")
    assert part["nextOffset"] == end
    assert part["pieces"][-1][0] is None
    assert part["pieces"][-1][2] == (
        f"\n[bytes {start_} to {end} were cut: --max-output-size]\n"
    )


def test_lines_are_the_same_at_any_time_and_after_a_restart(start: Start) -> None:
    """Clients ask for them while the middle is being cut more and more."""
    daemon = start("--command", SHELL, "--max-output-size", "2M")
    number = daemon.sh("seq -f 'number %.0f of many, of far too many' 2000000")
    paths = [f"/task/{number}/{path}" for path in ("lines", "search?text=X", "pieces")]
    cuts = set()
    while daemon.get(f"/task/{number}?output=none").json()["status"] != "finished":
        answer = get(daemon, paths[0])
        offsets = [segment[0] for segment in answer["segments"]]
        assert offsets == sorted(set(offsets))
        if answer["cut"] is not None:
            cuts.add(answer["cut"][1])
            assert set(answer["cut"]) <= {*offsets, answer["size"]}
        assert get(daemon, paths[1])["matches"] == []
    assert len(cuts) > 1
    answers = [get(daemon, path) for path in paths]
    daemon.kill()
    daemon.start()
    assert [get(daemon, path) for path in paths] == answers


def test_a_huge_log_does_not_delay_other_requests(daemon: Daemon) -> None:
    """The daemon answers them while it counts the lines of the log for the first time."""
    number = daemon.sh("head -c 280000000 /dev/zero | tr '\\0' '\\n'")
    daemon.ended(number)
    answers: list[Any] = []

    def ask() -> None:
        answers.append(daemon.get(f"/task/{number}/lines"))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    between = 0
    while any(thread.is_alive() for thread in threads):
        assert daemon.get(f"/task/{number}?output=none").status == 200
        between += not answers
    for thread in threads:
        thread.join()
    assert between > 3
    first = answers[0].json()
    assert all(answer.json() == first for answer in answers)
    assert first["lines"] == 280_000_000
    assert (len(first["segments"]), first["nextFrom"]) == (4096, 4096 * (LEAST + 1))
    segments = all_segments(daemon, number)
    assert len(segments) == -(-280_000_000 // (LEAST + 1))
    # A response covers at most 64 MiB of the searched output.
    found = get(daemon, f"/task/{number}/search?text=x")
    assert found == {"matches": [], "nextFrom": 64 * MIB, "searched": 64 * MIB}
    found = get(daemon, f"/task/{number}/search?text=x&from=279999990")
    assert found == {"matches": [], "nextFrom": None, "searched": 10}


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("lines?from=-1", "from"),
        ("lines?from=x", "from"),
        ("pieces?offset=1.5", "offset"),
        ("pieces?end=-3", "end"),
        ("search", "text"),
        ("search?text=", "text"),
        ("search?text=a%0Ab", "text"),
        (f"search?text={'x' * 201}", "text"),
        ("search?text=x&from=y", "from"),
    ],
)
def test_invalid_parameters_answer_400_with_the_field(
    daemon: Daemon, path: str, field: str
) -> None:
    """A task that does not exist answers 404."""
    number = daemon.sh("true")
    problem(daemon.get(f"/task/{number}/{path}"), 400, field)
    assert problem(daemon.get(f"/task/99/{path}"), 404)["type"].endswith(":unknown-task")


def test_a_text_of_the_maximum_length_is_found(daemon: Daemon) -> None:
    """A search ignores case only for letters of ASCII."""
    number = daemon.sh("printf 'a\\n%s\\n' \"$PULSAR_VAR_text\"", text="É" + "x" * 199)
    daemon.ended(number)
    path = f"/task/{number}/search?text="
    assert get(daemon, f"{path}%C3%89{'X' * 199}")["matches"] == [[2, 2]]
    assert get(daemon, f"{path}%C3%A9{'X' * 199}")["matches"] == []


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_an_output_that_cannot_be_read_answers_503(daemon: Daemon, damage: str) -> None:
    """The folder is gone after the lines were indexed, or the record of a cut is bad."""
    number = daemon.sh("seq 1000")
    daemon.ended(number)
    paths = [f"/task/{number}/{path}" for path in ("lines", "pieces", "search?text=7")]
    before = [get(daemon, path) for path in paths]
    folder = daemon.output_file(number).parent
    if damage == "gone":
        folder.rename(folder.with_suffix(".gone"))
    else:
        (folder / "cut").write_text("seven\n")
        paths.append(f"/task/{number}/log")
    for path in paths:
        answer = problem(daemon.get(path), 503)
        assert answer["type"].endswith(":output-unavailable")
    # A HEAD request reads no output.
    assert {daemon.request("HEAD", path).status for path in paths[:3]} == {200}
    if damage == "gone":
        folder.with_suffix(".gone").rename(folder)
    else:
        (folder / "cut").unlink()
    assert [get(daemon, path) for path in paths[:3]] == before


def test_lines_have_the_colours_at_the_begin_of_segments(daemon: Daemon) -> None:
    """Segments without a colour are not in ``styles``."""
    number = daemon.sh("printf '\\033[1;31m'; seq 30000; printf '\\033[m'; seq 30000")
    daemon.ended(number)
    answer = get(daemon, f"/task/{number}/lines")
    data = daemon.output_file(number).read_bytes()
    reset = data.index(b"\x1b[m")
    offsets = [offset for offset, _, _ in answer["segments"]]
    assert answer["styles"] == {str(o): "1;31" for o in offsets if 0 < o <= reset}
    assert offsets[-1] > reset > offsets[1]
    last = get(daemon, f"/task/{number}/lines?from={len(data)}")
    assert (len(last["segments"]), last["styles"]) == (1, {})


def test_a_head_request_for_parts_has_no_body(daemon: Daemon) -> None:
    """Other methods answer 405."""
    number = daemon.sh("echo hello")
    daemon.ended(number)
    for path in ("lines", "pieces", "search?text=x"):
        answer = daemon.request("HEAD", f"/task/{number}/{path}")
        assert (answer.status, answer.body) == (200, b"")
        answer = daemon.request("POST", f"/task/{number}/{path}")
        problem(answer, 405)
        assert answer.headers["Allow"] == "GET, HEAD, OPTIONS"


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_an_output_that_cannot_be_read_hides_no_other_task(
    daemon: Daemon, damage: str
) -> None:
    """Lists and long-polls for new tasks show such a task without output, with a note."""
    numbers = [daemon.sh(f"echo {word}") for word in ("one", "two", "three")]
    for number in numbers:
        daemon.ended(number)
    folder = daemon.output_file(numbers[1]).parent
    if damage == "gone":
        folder.rename(folder.with_suffix(".gone"))
    else:
        (folder / "cut").write_text("seven\n")
    for how in ("tail", "full"):
        tasks = get(daemon, f"/tasks?output={how}")["tasks"]
        shown = [tasks[str(number)]["output"] for number in numbers]
        assert shown == ["one\n", "", "three\n"]
        notes = [tasks[str(number)]["notes"] for number in numbers]
        assert notes == [[], [encoding.UNREADABLE], []]
    jobs = get(daemon, "/jobs")
    assert [job["output"] for job in jobs] == ["three\n", "", "one\n"]
    created = get(daemon, f"/tasks/created?since={numbers[0]}")["task"]
    assert (created["id"], created["notes"]) == (numbers[1], [encoding.UNREADABLE])
    problem(daemon.get(f"/task/{numbers[1]}"), 503)
