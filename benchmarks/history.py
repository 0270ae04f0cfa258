"""``python -m benchmarks.history``: a start and a list with 10,000 ended tasks."""

import argparse
import sqlite3
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks.place import place
from pulsar_api.storage.tasks import prepare
from tests.integration.daemon import Daemon


def fill(state: Path, tasks: int, size: int) -> None:
    """Write a state with ended tasks that have ``size`` bytes of output each."""
    (state / "tasks").mkdir(parents=True)
    prepare(state / "pulsar-api.db")
    now = time.time()
    with sqlite3.connect(state / "pulsar-api.db") as db:
        db.executemany(
            "INSERT INTO task (revision, status, app, env, action, variables, command,"
            " exit_code, created_at, started_at, ended_at, output_size)"
            " VALUES (3, 'finished', 'site', 'prod', 'deploy', '{}', 'deploy site', 0,"
            " ?, ?, ?, ?)",
            [(now, now, now, size)] * tasks,
        )
    db.close()
    text = (b"%063d\n" % 0) * (size // 64)
    for number in range(1, tasks + 1):
        folder = state / "tasks" / str(number)
        folder.mkdir()
        (folder / "lock").write_text("1\n")
        (folder / "output").write_bytes(text)
        end = size.to_bytes(8, "little") + (1).to_bytes(8, "little")
        (folder / "output.idx").write_bytes(end)
        lines = f"ended {now!r}\ncause itself\nforced 0\nsize {size}\ncode 0\n"
        (folder / "exit").write_text(lines)


def measure(daemon: Daemon) -> tuple[float, float]:
    """Return the seconds that a start and a list take."""
    daemon.kill()
    began = time.perf_counter()
    daemon.start()
    started = time.perf_counter() - began
    times = []
    for _ in range(20):
        began = time.perf_counter()
        assert len(daemon.get("/tasks").json()["tasks"]) == 100
        times.append(time.perf_counter() - began)
    return started, median(times)


def main() -> None:
    """Print the times of both with few tasks, with many, and with large ones."""
    parser = argparse.ArgumentParser("python -m benchmarks.history", description=__doc__)
    parser.add_argument("--tasks", type=int, default=10_000, help="how many [10000]")
    parser.add_argument(
        "--size", type=int, default=100, help="KiB of output of each task [100]"
    )
    options = parser.parse_args()
    print("tasks  KiB each  start s  GET /tasks ms")
    for tasks, size in ((100, 4), (options.tasks, 4), (options.tasks, options.size)):
        with place(Path(tempfile.gettempdir())) as here:
            here.link("true", "/bin/true")
            fill(here.folder / "state", tasks, size << 10)
            daemon = here.daemon("--keep-tasks", "0", "--keep-days", "0")
            starts, lists = zip(*(measure(daemon) for _ in range(5)), strict=True)
            print(
                f"{tasks:5} {size:9} {median(starts):8.2f} {median(lists) * 1e3:14.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
