"""Parts of an output: where its lines are, who printed what and when, where a text is."""

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
    """Return the JSON of an answer that is good."""
    answer = daemon.get(path)
    assert answer.status == 200, answer.body
    assert answer.headers["Content-Type"] == "application/json"
    return answer.json()


def all_segments(daemon: Daemon, number: int) -> list[list[int]]:
    """Return the segments of as many answers as it takes."""
    found = []
    at: int | None = 0
    while at is not None:
        answer = get(daemon, f"/task/{number}/lines?from={at}")
        found += answer["segments"]
        at = answer["nextFrom"]
    return found


def pieces(daemon: Daemon, number: int, start: int, end: int) -> str:
    """Return the text between two bytes, in as many answers as it takes."""
    text = ""
    while start < end:
        answer = get(daemon, f"/task/{number}/pieces?offset={start}&end={end}")
        assert answer["nextOffset"] > start
        text += "".join(part for _, _, part in answer["pieces"])
        start = answer["nextOffset"]
    return text


def test_a_page_finds_each_line_of_a_large_log(daemon: Daemon) -> None:
    """By segments that hold together, and by a search that knows the same numbers."""
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
    """And begins no line in them."""
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
    """Whether it has ended, or waits and has no files yet."""
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


def test_lines_grow_with_a_task(daemon: Daemon, tmp_path: Path) -> None:
    """What was told stays true; the version is that of what was looked at."""
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


def test_pieces_say_who_printed_them_and_when(daemon: Daemon, tmp_path: Path) -> None:
    """Milliseconds after a begin that is the time of day."""
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
    # In the middle of a character: from its begin.
    answer = get(daemon, f"/task/{number}/pieces?offset=5&end=7")
    assert (answer["offset"], answer["nextOffset"]) == (4, 7)
    assert [text for _, _, text in answer["pieces"]] == ["ä", "e"]
    for query in ("offset=99", "offset=6&end=3"):
        assert get(daemon, f"/task/{number}/pieces?{query}")["pieces"] == []


def test_an_answer_has_a_quarter_of_a_mebibyte_at_most(daemon: Daemon) -> None:
    """Whoever wants more goes on; all of it is the log."""
    number = daemon.sh("seq 200000")
    daemon.ended(number)
    answer = get(daemon, f"/task/{number}/pieces?end={MIB}")
    assert answer["nextOffset"] <= 1 << 18
    assert answer["size"] > MIB
    text = pieces(daemon, number, 0, answer["size"])
    assert text == "".join(f"{n}\n" for n in range(1, 200_001))


def test_of_what_was_cut_out_all_say_so(start: Start) -> None:
    """A segment covers the hole, a line tells of it, and nothing is found in it.

    The marker ends the line before, so what follows is two lines on.
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
    # What reads as zeros is none of it.
    assert get(daemon, f"/task/{number}/search?text=%00")["matches"] == []
    part = get(daemon, f"/task/{number}/pieces?offset={start_ - 5}&end={start_ + 9}")
    assert part["nextOffset"] == end
    assert part["pieces"][-1][0] is None
    assert part["pieces"][-1][2] == (
        f"\n[bytes {start_} to {end} were cut: --max-output-size]\n"
    )


def test_lines_are_the_same_whenever_they_were_asked_for(start: Start) -> None:
    """While more and more is cut out of the middle; another daemon finds the same."""
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


def test_a_huge_log_holds_nobody_up(daemon: Daemon) -> None:
    """While its lines are counted for the first time others are answered."""
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
    # No more than 64 MiB are searched for one answer.
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
def test_what_is_wrong_is_named(daemon: Daemon, path: str, field: str) -> None:
    """By 400; and a task that is not there is 404."""
    number = daemon.sh("true")
    problem(daemon.get(f"/task/{number}/{path}"), 400, field)
    assert problem(daemon.get(f"/task/99/{path}"), 404)["type"].endswith(":unknown-task")


def test_the_longest_text_is_found(daemon: Daemon) -> None:
    """Whatever its letters; only those of ASCII have no case."""
    number = daemon.sh("printf 'a\\n%s\\n' \"$PULSAR_VAR_text\"", text="É" + "x" * 199)
    daemon.ended(number)
    path = f"/task/{number}/search?text="
    assert get(daemon, f"{path}%C3%89{'X' * 199}")["matches"] == [[2, 2]]
    assert get(daemon, f"{path}%C3%A9{'X' * 199}")["matches"] == []


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_an_output_that_cannot_be_read_is_a_503(daemon: Daemon, damage: str) -> None:
    """Whether it is gone, though its lines are known, or it is not known what was cut."""
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
    # For a HEAD of them nothing is read.
    assert {daemon.request("HEAD", path).status for path in paths[:3]} == {200}
    if damage == "gone":
        folder.with_suffix(".gone").rename(folder)
    else:
        (folder / "cut").unlink()
    assert [get(daemon, path) for path in paths[:3]] == before


def test_colours_in_force_are_told_with_the_lines(daemon: Daemon) -> None:
    """Of each segment at whose begin there are some."""
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


def test_a_head_has_no_body(daemon: Daemon) -> None:
    """And other methods are not possible."""
    number = daemon.sh("echo hello")
    daemon.ended(number)
    for path in ("lines", "pieces", "search?text=x"):
        answer = daemon.request("HEAD", f"/task/{number}/{path}")
        assert (answer.status, answer.body) == (200, b"")
        answer = daemon.request("POST", f"/task/{number}/{path}")
        problem(answer, 405)
        assert answer.headers["Allow"] == "GET, HEAD, OPTIONS"


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_output_that_cannot_be_read_hides_no_other_task(
    daemon: Daemon, damage: str
) -> None:
    """Lists and the wait for new tasks show it without output, and say why."""
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
