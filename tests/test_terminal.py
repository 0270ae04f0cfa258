"""Tests of the page's terminal (``pulsar_api/ui/terminal.js``), run by Node."""

import re
import subprocess
from pathlib import Path

import pytest

PAGE = Path(__file__).with_name("page")


@pytest.mark.needs("node")
def test_tests_of_the_page_pass_in_node() -> None:
    """Their names describe what the terminal does."""
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
    # All of them must run: Node reports success if it finds no file.
    written = sum(f.read_text().count("test(") for f in files)
    assert int(counts["pass"]) >= written > 0
