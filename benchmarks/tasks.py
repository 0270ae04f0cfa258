"""Tasks per second: from the request for ``/bin/true`` to the response with its end."""

import subprocess
import threading
import time
from collections.abc import Callable, Sequence

from benchmarks.client import Connection, request
from benchmarks.measure import Line, Measure, compare, in_turn
from benchmarks.place import PYTHON, Place, create, finished, served

TRUE = "/bin/true"
SECONDS = 1.5
"""Seconds that each measurement takes."""


def rate(works: Sequence[Callable[[], object]]) -> float:
    """Return how often per second the functions run, each in a thread of its own."""
    done: list[float] = []
    begin = time.perf_counter()

    def repeat(work: Callable[[], object]) -> None:
        while time.perf_counter() < begin + SECONDS:
            work()
            done.append(time.perf_counter())

    threads = [threading.Thread(target=repeat, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(done) / (max(done) - begin)


def run(place: Place, rounds: int) -> list[Line]:
    """Compare with a server that only spawns, and with a loop without a server."""
    place.link("true", TRUE)
    ours, bare = served(place.daemon()), place.bare("run")

    def one_of_ours(connection: Connection) -> None:
        finished(connection, create(connection, "true"))

    def bare_one(connection: Connection, *arguments: str) -> None:
        body = b"".join(a.encode() + b"\0" for a in arguments)
        assert connection.ask(request("POST", "/", body)) == b"0"

    def by_ours(clients: int) -> Measure:
        connections = [place.connect(ours) for _ in range(clients)]
        return lambda: rate([lambda c=c: one_of_ours(c) for c in connections])  # type: ignore[misc]

    def by_bare(clients: int, *arguments: str) -> Measure:
        connections = [place.connect(bare) for _ in range(clients)]
        return lambda: rate([lambda c=c: bare_one(c, *arguments) for c in connections])  # type: ignore[misc]

    def by_loop(clients: int) -> Measure:
        return lambda: rate([lambda: subprocess.run([TRUE], check=True)] * clients)

    lines: list[Line] = []
    for clients in (1, 8):
        found = in_turn(
            rounds,
            by_ours(clients),
            by_bare(clients, TRUE),
            by_loop(clients),
            by_bare(clients, *PYTHON, "-c", "pass"),
        )
        who = f"{clients} client" + "s" * (clients > 1)
        against = ("", " / subprocess loop", " / bare, with an interpreter")
        lines += [
            compare(f"tasks, {who}{what}", "tasks/s", found[0], values)
            for what, values in zip(against, found[1:], strict=True)
        ]
    return lines
