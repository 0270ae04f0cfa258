"""The cost of masking secrets: ``python -m benchmarks.mask``.

It compares a flood to its end (see ``flood``) with secrets and without, in turn.
"""

import argparse
import base64
import json
import random
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from benchmarks.client import Connection, request
from benchmarks.measure import Line, Measure, compare, in_turn, table
from benchmarks.place import JSON, PYTHON, Place, finished, place, served

MEGABYTES = 128
PROGRAM = "seq"
LAST = 16_000_000
"""The number that the program counts to. The output is 135 MB."""
_BLOCK = (1 << 20) - 4099

_PRINT = "import os, sys; b = open(sys.argv[1], 'rb').read()\nfor _ in range({n}):\n"
_PRINT += " left = b\n while left: left = left[os.write(1, left):]"


def _blocks(rng: random.Random) -> dict[str, bytes]:
    lines = (
        f"{rng.getrandbits(32):08x} copying file {rng.getrandbits(20)} to "
        f"/srv/site/releases/{rng.getrandbits(40)}\n".encode()
        for _ in range(_BLOCK // 50)
    )
    return {
        "lines": b"".join(lines)[:_BLOCK],
        "base64": base64.b64encode(rng.randbytes(_BLOCK))[:_BLOCK],
        "zeros": bytes(_BLOCK),
    }


def _token(rng: random.Random) -> str:
    return "ghp_" + rng.randbytes(18).hex()


def run(here: Place, rounds: int) -> list[Line]:
    """Compare floods with a token, with ten, and with a key of 38 lines against none.

    Three kinds of floods come as fast as memory can be copied. The fourth comes from a
    program that computes its output.
    """
    rng = random.Random(1)
    blocks = _blocks(rng)
    for name, block in blocks.items():
        path = here.folder / name
        path.write_bytes(block)
        here.action(name, *PYTHON, "-c", _PRINT.format(n=MEGABYTES), str(path))
    here.action(PROGRAM, "seq", str(LAST))
    tokens = {f"token{n}": _token(rng) for n in range(10)}
    daemon = here.daemon()
    client = here.connect(served(daemon))
    key = "\n".join(base64.b64encode(rng.randbytes(48)).decode() for _ in range(38))
    some: dict[str, Mapping[str, str]] = {
        "a token": {"token0": tokens["token0"]},
        "10 tokens": tokens,
        "a long key": {"key": key},
    }
    lines = []
    for name in (*blocks, PROGRAM):
        measures: list[Measure] = [
            partial(_flood, client, daemon.state, name, secrets)
            for secrets in ({}, *some.values())
        ]
        none, *others = in_turn(rounds, *measures)
        for what, found in zip(some, others, strict=True):
            lines.append(compare(f"{name}, {what} / none", "MB/s", found, none))
    return lines


def _flood(client: Connection, state: Path, name: str, secrets: Mapping[str, str]) -> float:
    body = json.dumps({"action": name, "variables": dict(secrets)}).encode()
    begin = time.perf_counter()
    number = json.loads(client.ask(request("POST", "/bench/here", body, JSON)))["id"]
    finished(client, number)
    took = time.perf_counter() - begin
    output = state / "tasks" / str(number) / "output"
    size = output.stat().st_size
    assert name == PROGRAM or size == MEGABYTES * _BLOCK
    output.unlink()
    return size / 1e6 / took


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser("python -m benchmarks.mask", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="rounds of each pair [9]")
    parser.add_argument("--folder", type=Path, help="folder for the temporary state")
    options = parser.parse_args()
    print("mask ...", file=sys.stderr)
    with place(options.folder) as here:
        print(table(run(here, options.rounds)))


if __name__ == "__main__":
    main()
