"""``python -m benchmarks.soak``: the daemon's resources during 20,000 tasks."""

import argparse
import os
import re
import tempfile
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from itertools import pairwise
from json import loads
from pathlib import Path
from threading import Lock, Thread

from attrs import frozen

from benchmarks.place import place
from tests.integration.daemon import Daemon

CLIENTS = 8
SAMPLES = 20


@frozen
class Sample:
    """The resources that the daemon and its state take at one moment."""

    tasks: int
    descriptors: int
    threads: int
    memory: float
    """Resident memory in MiB."""
    folders: int
    size: float
    """State on disk in MiB, as the file system counts it."""
    speed: float
    """Tasks per second since the previous sample."""


def size(folder: Path) -> int:
    """Return the bytes that a folder takes on disk."""
    found = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                found += os.lstat(os.path.join(root, name)).st_blocks * 512
            except FileNotFoundError:
                continue
    return found


def sample(daemon: Daemon, tasks: int, speed: float) -> Sample:
    """Return the present resources of a daemon."""
    process = Path(f"/proc/{daemon.process.pid}")
    threads = re.search(r"Threads:\s+(\d+)", (process / "status").read_text())
    assert threads is not None
    return Sample(
        tasks,
        len(os.listdir(process / "fd")),
        int(threads[1]),
        daemon.memory() / 2**20,
        len(os.listdir(daemon.state / "tasks")),
        size(daemon.state) / 2**20,
        speed,
    )


def client(daemon: Daemon, numbers: Iterator[int], lock: Lock, done: list[int]) -> None:
    """Create tasks, one after the other, and wait for the end of each."""
    connection = HTTPConnection(daemon.host, daemon.port)
    while True:
        with lock:
            if next(numbers, None) is None:
                return
        connection.request("POST", "/bench/prod?action=true")
        number = loads(connection.getresponse().read())["id"]
        while True:
            connection.request("GET", f"/task/{number}/state?output=none")
            answer = loads(connection.getresponse().read())
            if answer["changed"]:
                assert answer["task"]["exitCode"] == 0
                break
        done.append(number)


def main() -> None:
    """Run the tasks, and print a line after each twentieth of them."""
    parser = argparse.ArgumentParser("python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--tasks", type=int, default=20_000, help="how many [20000]")
    parser.add_argument("--keep", type=int, default=1000, help="tasks to keep [1000]")
    options = parser.parse_args()
    with place(Path(tempfile.gettempdir())) as here:
        here.link("true", "/bin/true")
        daemon = here.daemon("--keep-tasks", str(options.keep))
        numbers, lock = iter(range(options.tasks)), Lock()
        done: list[int] = []
        arguments = (daemon, numbers, lock, done)
        threads = [Thread(target=client, args=arguments) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        print(" tasks  fds  threads  memory MiB  folders  state MiB  tasks/s")
        step, began, before = options.tasks // SAMPLES, time.monotonic(), 0
        samples: list[Sample] = []
        while before < options.tasks:
            while len(done) < min(before + step, options.tasks):
                time.sleep(0.05)
                assert any(thread.is_alive() for thread in threads) or (
                    len(done) == options.tasks
                )
            now = time.monotonic()
            found = sample(daemon, len(done), (len(done) - before) / (now - began))
            before, began = found.tasks, now
            samples.append(found)
            print(
                f"{found.tasks:6} {found.descriptors:4} {found.threads:8} "
                f"{found.memory:11.1f} {found.folders:8} {found.size:10.1f} "
                f"{found.speed:8.1f}",
                flush=True,
            )
        assert sorted(done) == list(range(1, options.tasks + 1))
        later = samples[len(samples) // 4 :]
        grown = later[-1].memory - later[0].memory
        largest = max(b.memory - a.memory for a, b in pairwise(later))
        print(f"memory over the last three quarters: {grown:+.1f} MiB", end="; ")
        print(f"largest step: {largest:+.1f} MiB")


if __name__ == "__main__":
    main()
