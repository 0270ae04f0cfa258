"""The page's own terminal (``pulsar_api/ui/terminal.js``), tested where it is at home."""

import re
import subprocess
from pathlib import Path

import pytest

PAGE = Path(__file__).with_name("page")


@pytest.mark.needs("node")
def test_what_the_page_makes_of_an_output_is_as_its_tests_say() -> None:
    """Each of them is a sentence in that file; Node runs them."""
    files = sorted(PAGE.glob("*.test.mjs"))
    done = subprocess.run(
        ["node", "--test", "--test-reporter=tap", *files],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = dict(re.findall(r"^# (\w+) (\d+)$", done.stdout, re.MULTILINE))
    assert {counts[k] for k in ("fail", "cancelled", "skipped", "todo")} == {"0"}
    # Node has run what is written there: files that it does not find are no failures.
    written = sum(f.read_text().count("test(") for f in files)
    assert int(counts["pass"]) >= written > 0
