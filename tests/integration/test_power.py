"""A power cut, a boot, a lost or copied state: no task starts twice, no end changes.

``PULSAR_POWER_CUTS=100 PULSAR_LOST_FILES=50 pytest -s tests/integration/test_power.py``
makes a longer run than the usual one and prints its figures.
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
    """Try some kinds of misfortune; their figures say what was wrong."""
    call = command("tests.integration.power", *arguments)
    done = subprocess.run(call, check=False, stdout=subprocess.PIPE, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout


@pytest.mark.needs("loop mounts")
def test_a_power_cut_starts_no_task_twice() -> None:
    """At any moment, busy and idle, whether or not the boot id is another one."""
    half = CUTS // 2
    tried(f"busy={half}", f"idle={CUTS - half}", f"--idle={IDLE}")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ON_DISK])
@pytest.mark.needs("loop mounts")
def test_a_state_in_doubt_starts_no_task_twice(kind: str) -> None:
    """Files removed or damaged, another boot id, a copy: in doubt a task is lost."""
    tried(f"{kind}={LOST}")
