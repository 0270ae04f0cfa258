"""What the README tells a newcomer to do works when pasted."""

import re
import shlex
import subprocess
from pathlib import Path

from pulsar_api.demo import EXAMPLE
from pulsar_api.settings import options
from tests.integration.conftest import Start
from tests.integration.daemon import PATIENCE

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.rst").read_text()


def section(title: str) -> str:
    """Return one section of the README."""
    pattern = rf"^{title}\n-+\n(.*?)(?=^\S[^\n]*\n-+\n)"
    found = re.search(pattern, README, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def test_every_curl_command_works(
    start: Start, environ: dict[str, str], tmp_path: Path
) -> None:
    """In the order of the README, against a daemon like that of the demonstration."""
    environ["DEMO_SITE"] = str(tmp_path / "site")
    given = ("--dev", "--port=0", "--command=scripts", f"--config-repo={EXAMPLE}")
    daemon = start(*given, environ=environ)
    daemon.ended(daemon.run("site", "production", "fail"))
    commands = re.findall(r"^   \$ (curl .*)$", section("The API"), re.MULTILINE)
    assert len(commands) >= 11
    for command in commands:
        words = shlex.split(command.replace("https://localhost:8001", daemon.base))
        done = subprocess.run(
            [*words, "--silent", "--show-error", "--fail-with-body"],
            cwd=ROOT,
            capture_output=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        assert done.stdout, command


def test_every_option_is_in_the_table() -> None:
    """With its name as it is written."""
    table = section("Options")
    for name, *_ in options():
        assert f"--{name}" in table
