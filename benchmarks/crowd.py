"""``python -m benchmarks.crowd``: thousands of clients wait, and hundreds follow events."""

import argparse
import json
import os
import socket
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median, quantiles

from benchmarks.client import Connection, Crowd, request
from benchmarks.place import Place, create, place, program, served

RUNNING = 20


def gets(connection: Connection, number: int, count: int = 500) -> list[float]:
    """Return the milliseconds of each of ``count`` plain requests, made in sequence."""
    found = []
    for _ in range(count):
        began = time.perf_counter()
        connection.ask(request("GET", f"/task/{number}?output=none"))
        found.append((time.perf_counter() - began) * 1e3)
        time.sleep(0.001)
    return found


def measure(here: Place, polls: int, streams: int) -> None:
    """Print the cost of the waiting clients, and how long they wait for one line."""
    fifo = here.fifo("line")
    here.action("line", *program("line", str(fifo)))
    here.action("sleep", "sleep", "600")
    daemon = here.daemon("--max-running", str(RUNNING + 1))
    server = served(daemon)
    connection = here.connect(server)
    number = create(connection, "line")
    tap = here.tap(fifo)
    for _ in range(RUNNING - 1):
        create(connection, "sleep")
    server.rest()
    before = server.memory()
    idle = gets(connection, number)
    with ExitStack() as stack:
        began = time.monotonic()
        crowd = Crowd.connect(server.port, polls)
        stack.callback(crowd.close)
        print(f"{polls} clients connect in {time.monotonic() - began:.2f} s")
        task = json.loads(connection.ask(request("GET", f"/task/{number}?output=none")))
        path = f"/task/{number}/output?since={task['version']}&offset=0"
        crowd.send(request("GET", path))
        for n in range(streams):
            where = "/events" if n % 2 else f"/task/{number}/events"
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            sock.sendall(request("GET", where))
        server.rest()
        grown = (server.memory() - before) / 2**20
        busy = gets(connection, number)
        os.write(tap, b".")
        answers = list(crowd.answers())
        line = json.loads(answers[0][1])["task"]["output"]
        assert len(answers) == polls
        times = [(at - int(line)) / 1e6 for at, _ in answers]
        print(
            f"{polls} long-polls, {streams} event streams, {RUNNING} running tasks: memory "
            f"+{grown:.1f} MiB; a plain GET p50 {median(busy):.2f} ms, "
            f"p99 {quantiles(busy, n=100)[98]:.2f} ms (without them "
            f"{quantiles(idle, n=100)[98]:.2f}); one line answers the first after "
            f"{times[0]:.0f} ms, the last after {times[-1]:.0f} ms"
        )


def main() -> None:
    """Measure once."""
    parser = argparse.ArgumentParser("python -m benchmarks.crowd", description=__doc__)
    parser.add_argument("--polls", type=int, default=5000, help="long-polls [5000]")
    parser.add_argument("--streams", type=int, default=200, help="event streams [200]")
    options = parser.parse_args()
    with place(Path(tempfile.gettempdir())) as here:
        measure(here, options.polls, options.streams)


if __name__ == "__main__":
    main()
