"""Tests of the core in simulated worlds: no seed violates an invariant.

``PULSAR_SEEDS=100000 pytest tests/test_simulation.py`` tries more worlds.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import needs

SEEDS = os.environ.get("PULSAR_SEEDS", str(needs.trials(200, 2000)))
ROOT = Path(__file__).parents[1]


def simulate(*arguments: str, hash_seed: str = "0") -> subprocess.CompletedProcess[str]:
    """Run worlds in processes of their own, where coverage is not measured."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE")}
    return subprocess.run(
        [sys.executable, "-m", "tests.simulation", *arguments],
        check=False,
        cwd=ROOT,
        env={**environ, "PYTHONHASHSEED": hash_seed},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_no_seed_breaks_a_promise() -> None:
    """The faults: crashes, power cuts, lost and copied files, wrong clocks, full disks."""
    done = simulate("--seeds", SEEDS)
    assert done.returncode == 0, done.stdout[-5000:]


@pytest.mark.parametrize(
    "mend",
    [
        "A1",
        *(
            pytest.param(mend, marks=pytest.mark.long)
            for mend in "A2 A8 A9 A10 versions held keys told left".split()
        ),
    ],
)
def test_a_seed_finds_the_fault_of_each_fix_taken_out(mend: str) -> None:
    """So the worlds are hard enough. A crash of the program itself does not count."""
    done = simulate("--seeds", "600", "--without", mend, "--stop")
    assert done.returncode == 1, done.stdout[-5000:]
    assert "Traceback" not in done.stdout
    found = re.findall(r"^seed \d+: (.+?): ", done.stdout, re.MULTILINE)
    assert set(found) - {"nothing fails unhandled"}, done.stdout[-5000:]


@pytest.mark.parametrize("seed", ["7", "164"])
def test_a_seed_replays_exactly(seed: str) -> None:
    """Every step is the same, although hash seeds, and so the order of sets, differ."""
    first, second = (simulate("--seed", seed, "--trace", hash_seed=h) for h in "12")
    assert first.stdout == second.stdout
    assert len(first.stdout.splitlines()) > 20
