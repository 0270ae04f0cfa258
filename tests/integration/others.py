"""``others.py PORT PATH NAME:VALUE...``: a client that sends requests until its input ends.

Then it prints the time of each answer as JSON. It is a process of its own, so that it
measures the cost of an attack for others, not for the attacker.
"""

import json
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from http.client import HTTPConnection

from attrs import define, field

from tests.integration.daemon import PATIENCE, Daemon

PAUSE = 0.002
"""Seconds between two requests. A continuous flood would disturb the daemon itself."""


@define
class Times:
    """The seconds that requests of others took."""

    all: list[float] = field(factory=list)

    @property
    def p99(self) -> float:
        """The time that 99 of 100 requests did not exceed, in seconds."""
        return statistics.quantiles(self.all, n=100)[98]

    def __str__(self) -> str:
        median, most = statistics.median(self.all), max(self.all)
        return (
            f"{len(self.all)} requests of others, p50 {median * 1e3:.1f} ms, p99 "
            f"{self.p99 * 1e3:.1f} ms, max {most * 1e3:.0f} ms"
        )


@contextmanager
def others(daemon: Daemon, path: str, headers: Mapping[str, str]) -> Iterator[Times]:
    """Request a path while the block runs. The times are available after it."""
    arguments = [str(daemon.port), path, *(f"{k}:{v}" for k, v in headers.items())]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.integration.others", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    times = Times()
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield times
        times.all.extend(json.loads(process.communicate(timeout=PATIENCE)[0]))
    finally:
        process.kill()
        process.communicate()


def main() -> None:
    """Send requests until the input ends, and print their times."""
    port, path, *lines = sys.argv[1:]
    headers = dict(line.split(":", 1) for line in lines)
    times: list[float] = []
    with closing(HTTPConnection("127.0.0.1", int(port), timeout=PATIENCE)) as connection:
        ended = False
        while not ended or len(times) < 50:
            began = time.perf_counter()
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 200, answer.status
            times.append(time.perf_counter() - began)
            if len(times) == 1:
                print("ready", flush=True)
            ended = ended or bool(select.select([sys.stdin], [], [], PAUSE)[0])
    print(json.dumps(times))


if __name__ == "__main__":
    main()
