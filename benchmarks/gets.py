"""Requests per second of ``GET /task/:id``."""

import json
import os

from benchmarks.client import Crowd, request
from benchmarks.measure import Line, Measure, compare, in_turn
from benchmarks.place import Place, Server, create, finished, program, served

CONNECTIONS = 64
SECONDS = 1.0
"""Seconds that each measurement takes."""


def run(place: Place, rounds: int) -> list[Line]:
    """Compare with a leaf that returns the same bytes, for a running and an ended task."""
    fifo = place.fifo("fifo")
    place.action("line", *program("line", str(fifo)))
    place.link("true", "/bin/true")
    ours = served(place.daemon())
    connection = place.connect(ours)
    running, ended = (create(connection, action) for action in ("line", "true"))
    tap = place.tap(fifo)
    os.write(tap, b".")
    finished(connection, ended)
    ours.rest()
    lines: list[Line] = []
    for number, what in ((running, "running"), (ended, "ended")):
        body = connection.ask(request("GET", f"/task/{number}"))
        assert json.loads(body)["id"] == number
        found = in_turn(
            rounds,
            _rate(ours, f"/task/{number}"),
            _rate(place.bare("same", body=body), "/"),
        )
        lines.append(compare(f"GET /task/:id, {what}", "requests/s", *found))
    return lines


def _rate(server: Server, path: str) -> Measure:
    def measure() -> float:
        crowd = Crowd.connect(server.port, CONNECTIONS)
        try:
            return crowd.rate(request("GET", path), SECONDS)
        finally:
            crowd.close()

    return measure
