"""Everything at once, for a short while.

``PULSAR_CHAOS_MINUTES=30 pytest -s tests/integration/test_chaos.py`` makes it longer; so
does ``python -m tests.integration.chaos``, with another seed.
"""

import os
import subprocess

import pytest

from tests.integration.machine import command

MINUTES = os.environ.get("PULSAR_CHAOS_MINUTES", "0.5")


@pytest.mark.needs("mounts")
@pytest.mark.long
def test_no_promise_breaks_when_everything_goes_wrong() -> None:
    """The daemon, its shims and its disk are attacked while clients work."""
    call = command("tests.integration.chaos", f"--minutes={MINUTES}")
    done = subprocess.run(call, check=False, stdout=subprocess.PIPE, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout
