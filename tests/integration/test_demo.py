"""The demonstration, started as the README starts it."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from tests.integration import zygote
from tests.integration.daemon import PATIENCE, wait_for

DEMO = (*zygote.PULSAR_API, "demo")


@pytest.fixture
def environ(environ: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """Return an environment whose temporary folder the test can inspect."""
    return {**environ, "TMPDIR": str(tmp_path)}


def once(environ: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the demonstration to the end of its task."""
    return zygote.run(
        [*DEMO, "--once", *arguments],
        env=environ,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def test_demo_deploys_and_exits_with_0(environ: dict[str, str], tmp_path: Path) -> None:
    """It shows the lines of the deployment, and leaves no files."""
    done = once(environ)
    assert (done.returncode, done.stderr) == (0, "")
    assert "** Copying public/index.html" in done.stdout
    assert "Published: " in done.stdout
    assert "The task ended: finished, exit code 0." in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("action", "code"), [("fail", 3), ("rollback", 1)])
def test_demo_exits_with_the_code_of_a_failed_task(
    environ: dict[str, str], action: str, code: int
) -> None:
    """A rollback fails because nothing was deployed before."""
    done = once(environ, action)
    assert (done.returncode, done.stderr) == (code, "")
    assert f"The task ended: failed, exit code {code}." in done.stdout


@pytest.mark.needs("curl")
def test_demo_serves_until_ctrl_c(environ: dict[str, str], tmp_path: Path) -> None:
    """The commands that it prints work, also if two demonstrations run at once."""
    with (tmp_path / "out").open("w+b") as out:
        demos = [zygote.Popen(DEMO, env=environ, stdout=out, stderr=out) for _ in range(2)]
        try:
            text = wait_for(
                lambda: (t := (tmp_path / "out").read_text()).count("Ctrl-C") == 2 and t,
                "two demonstrations that serve",
            )
            assert isinstance(text, str)
            commands = re.findall(r"^  (curl .*)$", text, re.MULTILINE)
            assert len(commands) == 6
            for command in commands:
                done = subprocess.run(
                    [*command.split(), "--silent", "--fail"],
                    check=True,
                    capture_output=True,
                    timeout=PATIENCE,
                    env={**os.environ, "https_proxy": ""},
                )
                assert b'"url": "https://localhost:' in done.stdout
            published = re.findall(r"^What was published: (.*)$", text, re.MULTILINE)
            assert all((Path(path) / "index.html").exists() for path in published)
        finally:
            for demo in demos:
                demo.send_signal(signal.SIGINT)
            try:
                codes = [demo.wait(PATIENCE) for demo in demos]
            finally:
                for demo in demos:
                    demo.kill()  # otherwise it keeps the port of the README for ever
    assert codes == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
