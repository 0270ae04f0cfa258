"""Latency from a task that writes a line to the long-poll that returns it."""

import json
import os
import time

from benchmarks.client import Connection, request
from benchmarks.measure import Line, compare_percentile
from benchmarks.place import Place, create, program, served

PAUSE = 0.04
"""Seconds before each line. The servers take turns, so each is silent for two pauses, which
is more than the 50 ms for which the daemon holds back further output on purpose."""
LINES = 80
"""Lines per round."""


def run(place: Place, rounds: int) -> list[Line]:
    """Write lines to ours and to the bare server in turn, and wait for each response."""
    fifos = [place.fifo(name) for name in ("ours", "bare")]
    place.action("line", *program("line", str(fifos[0])))
    ours = place.connect(served(place.daemon()))
    bare = place.connect(place.bare("follow", *program("line", str(fifos[1]))))
    number = create(ours, "line")
    taps = [place.tap(fifo) for fifo in fifos]
    times: tuple[list[float], list[float]] = ([], [])
    offset = 0
    for _ in range(rounds * LINES):
        ours.send(request("GET", f"/task/{number}/output?offset={offset}"))
        bare.send(request("GET", "/"))
        now, body = _write_line(taps[0], ours)
        answer = json.loads(body)
        offset = answer["nextOffset"]
        times[0].append(_since(now, answer["task"]["output"]))
        times[1].append(_since(*_write_line(taps[1], bare)))
    return [compare_percentile(f"line to answer, p{p}", "ms", p, *times) for p in (50, 99)]


def _write_line(tap: int, connection: Connection) -> tuple[int, bytes]:
    """Have a line written, and return the time of the response and its body."""
    time.sleep(PAUSE)
    os.write(tap, b".")
    body = connection.receive()
    return time.monotonic_ns(), body


def _since(now: int, text: str | bytes) -> float:
    """Return the milliseconds since a line was written, by the time in the line."""
    return (now - int(text)) / 1e6
