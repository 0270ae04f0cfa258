"""All faults at once, for a short while.

``PULSAR_CHAOS_MINUTES=30 pytest -s tests/integration/test_chaos.py`` takes longer.
``python -m tests.integration.chaos`` takes a seed as well.
"""

import os
import subprocess

import pytest

from tests.integration.machine import command

MINUTES = os.environ.get("PULSAR_CHAOS_MINUTES", "0.5")


@pytest.mark.needs("mounts")
@pytest.mark.long
def test_all_promises_hold_under_all_faults() -> None:
    """Faults hit the daemon, its shims and its disk while clients work."""
    call = command("tests.integration.chaos", f"--minutes={MINUTES}")
    done = subprocess.run(call, check=False, stdout=subprocess.PIPE, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout
