"""The entry point: ``python -m benchmarks``, from the root of the project."""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

from attrs import asdict

from benchmarks import flood, gets, latency, start, tasks, waiters
from benchmarks.measure import Line, table
from benchmarks.place import Place, place

BENCHMARKS: Mapping[str, Callable[[Place, int], list[Line]]] = {
    "tasks": tasks.run,
    "start": start.run,
    "latency": latency.run,
    "flood": flood.run,
    "gets": gets.run,
    "waiters": waiters.run,
}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    names = ", ".join(BENCHMARKS)
    found = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    found.add_argument("names", nargs="*", metavar="NAME", help=f"which [all]: {names}")
    found.add_argument("--rounds", type=int, default=5, help="rounds of each pair [5]")
    found.add_argument(
        "--json", type=Path, metavar="FILE", help="write all rounds to this file as JSON"
    )
    found.add_argument(
        "--folder", type=Path, help="folder for the temporary state [$TMPDIR or /tmp]"
    )
    return found


def machine() -> dict[str, object]:
    """Return the facts that the figures depend on, as they are before the first one."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **{name: version(name) for name in ("pulsar-api", "twisted", "klein")},
    }


def main() -> None:
    """Measure, print the table, write the file."""
    options = parser().parse_args()
    for name in options.names:
        if name not in BENCHMARKS:
            sys.exit(f"{name!r} is unknown. Choose from {', '.join(BENCHMARKS)}")
    about = machine()
    lines: list[Line] = []
    for name in options.names or BENCHMARKS:
        print(f"{name} ...", file=sys.stderr)
        with place(options.folder) as here:
            lines += BENCHMARKS[name](here, options.rounds)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(table(lines))
    if options.json:
        value = {**about, "results": [asdict(line) for line in lines]}
        options.json.write_text(json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    main()
