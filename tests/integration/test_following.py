"""Each example of docs/following.rst works."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.integration.conftest import Start
from tests.integration.daemon import PATIENCE, SHELL, Daemon, wait_for

PAGE = (Path(__file__).parents[2] / "docs" / "following.rst").read_text()
EXAMPLES = [
    (kind, textwrap.dedent(text).strip() + "\n")
    for kind, text in re.findall(
        r"^\.\. code-block:: (\w+)\n\n((?:(?:   .*)?\n)+)", PAGE, re.MULTILINE
    )
]
PROGRAMS = {
    "shell": ("/bin/sh", "example.sh"),
    "python": (sys.executable, "example.py"),
    "javascript": ("node", "example.mjs"),
}


def test_each_way_to_follow_has_an_example() -> None:
    """The list decides which program runs each example."""
    assert [kind for kind, _ in EXAMPLES] == [*["shell"] * 5, "python", "javascript"]


def play(
    example: "subprocess.Popen[str]", daemon: Daemon, folder: Path, text: str
) -> tuple[str, str]:
    """Let the task go on after its first line. Return both outputs of the example."""
    assert example.stdout is not None
    if "until" in text:
        log = folder / "task-1.log"
        wait_for(lambda: log.exists() and log.read_text() == "one\n", "a line")
    elif "output?" not in text:
        assert example.stdout.readline() == "one\n"
    if "curl" not in text or "until" in text:
        daemon.kill()
        daemon.start()
    (folder / "go").write_text("go\n")
    return example.communicate(timeout=PATIENCE)


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(
            number,
            marks=pytest.mark.needs(
                *{"javascript": ["node"]}.get(kind, []), *["curl"] * ("curl" in text)
            ),
        )
        for number, (kind, text) in enumerate(EXAMPLES)
    ],
)
def test_example_prints_the_output_of_the_task(
    start: Start, tmp_path: Path, number: int
) -> None:
    """Where the page promises it, the daemon restarts meanwhile."""
    kind, text = EXAMPLES[number]
    daemon = start("--command", SHELL)
    daemon.arguments[daemon.arguments.index("--port") + 1] = str(daemon.port)
    go = tmp_path / "go"
    os.mkfifo(go)
    line = f"echo one; read x < {go}; echo two ä; exit 3"
    starts_one = "pulsar-api run" in text
    if starts_one:
        text = text.replace("deploy -v branch=main", f"run -v 'run={line}'")
    else:
        daemon.sh(line)
        wait_for(lambda: daemon.task(1)["output"] == "one\n", "the first line")
    program, name = PROGRAMS[kind]
    (tmp_path / name).write_text(text)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pulsar-api").write_text(
        f"#!{sys.executable}\nfrom pulsar_api.cli.main import main\nmain()\n"
    )
    (tmp_path / "bin" / "pulsar-api").chmod(0o755)
    environ = {
        **os.environ,
        "PULSAR_API_URL": f"http://127.0.0.1:{daemon.port}",
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
    }
    with subprocess.Popen(
        [program, name],
        cwd=tmp_path,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as example:
        try:
            out, err = play(example, daemon, tmp_path, text)
        finally:
            example.kill()
    if "output?" in text:
        assert json.loads(out)["task"]["output"].startswith("one\n")
        return
    assert out.startswith("one\ntwo ä\n" if "until" in text else "two ä\n"), err
    if "it ended" in text:
        assert out.endswith("it ended with 3\n")
    elif starts_one or kind != "shell":
        assert example.returncode == 3, err
