"""Tests of power cuts, boots, and lost or copied states: no task starts twice.

``PULSAR_POWER_CUTS=100 PULSAR_LOST_FILES=50 pytest -s tests/integration/test_power.py``
runs longer than the default and prints its figures.
"""

import os
import subprocess

import pytest

from tests.integration.machine import command
from tests.integration.power import KINDS, ON_DISK

CUTS = int(os.environ.get("PULSAR_POWER_CUTS", "4"))
LOST = int(os.environ.get("PULSAR_LOST_FILES", "1"))
IDLE = 25 if CUTS >= 50 else 2


def tried(*arguments: str) -> None:
    """Run some kinds of failure in another process. Its output shows any error."""
    call = command("tests.integration.power", *arguments)
    done = subprocess.run(call, check=False, stdout=subprocess.PIPE, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout


@pytest.mark.needs("loop mounts")
def test_a_power_cut_starts_no_task_twice() -> None:
    """The cut comes at any moment, busy and idle, with the same boot id or another."""
    half = CUTS // 2
    tried(f"busy={half}", f"idle={CUTS - half}", f"--idle={IDLE}")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ON_DISK])
@pytest.mark.needs("loop mounts")
def test_a_state_in_doubt_starts_no_task_twice(kind: str) -> None:
    """Files are removed or damaged, the boot id changes, or the state is copied.

    A task whose start is in doubt is lost.
    """
    tried(f"{kind}={LOST}")
