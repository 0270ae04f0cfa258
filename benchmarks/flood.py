"""Bytes per second of a task that prints as fast as it can."""

import os
import subprocess
import time
from pathlib import Path

from benchmarks.client import request
from benchmarks.measure import Line, Measure, compare, in_turn
from benchmarks.place import Place, create, finished, program, served

MEGABYTES = 256
_BYTES = MEGABYTES << 20


def run(place: Place, rounds: int) -> list[Line]:
    """Compare the task's own speed with ``cat``, and the total with others that keep it."""
    took = place.folder / "took"
    command = program("flood", str(_BYTES), str(took))
    place.action("flood", *command)
    daemon = place.daemon()
    ours = place.connect(served(daemon))
    bare = place.connect(place.bare("run"))
    arguments = b"".join(os.fsencode(a) + b"\0" for a in command)
    writing: list[float] = []

    def by_ours() -> float:
        begin = time.perf_counter()
        number = create(ours, "flood")
        finished(ours, number)
        whole = time.perf_counter() - begin
        writing.append(MEGABYTES / float(took.read_text()))
        path = daemon.output_file(number)
        assert path.stat().st_size == _BYTES
        path.unlink()
        return MEGABYTES / whole

    def in_memory() -> float:
        begin = time.perf_counter()
        assert int(bare.ask(request("POST", "/", arguments))) == _BYTES
        return MEGABYTES / (time.perf_counter() - begin)

    def null() -> float:
        _cat(command, Path(os.devnull))
        return MEGABYTES / float(took.read_text())

    def into_file() -> float:
        path = place.folder / "kept"
        begin = time.perf_counter()
        _cat(command, path)
        with path.open("rb") as file:
            os.fdatasync(file)
        whole = time.perf_counter() - begin
        path.unlink()
        return MEGABYTES / whole

    measures: list[Measure] = [by_ours, null, into_file, in_memory]
    ended, *others = in_turn(rounds, *measures)
    return [
        compare("flood, as written / cat > null", "MB/s", writing[1:], others[0]),
        compare("flood, to its end / cat > file", "MB/s", ended, others[1]),
        compare("flood, to its end / in memory", "MB/s", ended, others[2]),
    ]


def _cat(command: list[str], path: Path) -> None:
    """Run a command whose output goes through ``cat`` into a file."""
    with path.open("wb") as file:
        writer = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert writer.stdout is not None
        with writer.stdout:
            subprocess.run(["cat"], stdin=writer.stdout, stdout=file, check=True)
        assert writer.wait() == 0
