"""Tests that run the commands of the README as a newcomer pastes them."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from pulsar_api.cli.demo import EXAMPLE
from tests.integration.conftest import Start
from tests.integration.daemon import PATIENCE, PULSAR_API, Daemon
from tests.integration.github import github
from tests.pages import DOCS, README, ROOT, Block, blocks, section

DEMO = "https://localhost:8001"
TEAM = "https://deploy.example.com:8443"
PROGRAM = "/opt/pulsar-api/bin/pulsar-api"
AS_DAEMON = "runuser -u pulsar-api -- "
MAX_LINES = 150


def by_language(language: str) -> list[Block]:
    """Return the code blocks in one language."""
    return blocks(README, language)


def commands(program: str) -> list[str]:
    """Return the commands of the README that mention a program."""
    found = [c for block in by_language("console") for c in block.commands()]
    return [command for command in found if program in command]


def demonstration(start: Start, environ: dict[str, str], folder: Path) -> Daemon:
    """Return a daemon like that of the demonstration, after its first task."""
    environ["DEMO_SITE"] = str(folder / "site")
    given = ("--dev", "--port=0", "--command=scripts", f"--config-repo={EXAMPLE}")
    daemon = start(*given, environ=environ)
    daemon.ended(daemon.run("site", "production", "fail"))
    return daemon


def run(words: list[str], **more: str) -> "subprocess.CompletedProcess[str]":
    """Run a command of the README in the project's folder."""
    return subprocess.run(
        words,
        cwd=ROOT,
        env={**os.environ, **more},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def test_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= MAX_LINES


def test_readme_names_files_that_exist() -> None:
    """Every path of the repository in the README is checked."""
    paths = re.findall(r"``((?:docs/|systemd/)[\w./-]*|[A-Z]+\.rst)``", README.read_text())
    assert len(paths) > 10
    for path in paths:
        assert (ROOT / path).exists(), path


@pytest.mark.needs("curl")
def test_commands_beside_the_demonstration_work(
    start: Start, environ: dict[str, str], tmp_path: Path
) -> None:
    """The output of ``curl`` is in the README.

    The other command prints the task's output.
    """
    daemon = demonstration(start, environ, tmp_path)
    curl, *_ = commands("curl --cacert")
    done = run([*shlex.split(curl.replace(DEMO, daemon.base)), "--silent"])
    shown = re.search(r"^ +(\{.*\})$", README.read_text(), re.MULTILINE)
    assert shown is not None
    assert done.stdout == shown[1].replace(DEMO, daemon.base) + "\n"
    again, *_ = commands(".venv/bin/pulsar-api run")
    words = shlex.split(again.replace(DEMO, daemon.base))
    done = run([*PULSAR_API, *words[1:]])
    assert done.returncode == 0, done.stderr
    assert "Deploying site to staging" in done.stdout


@pytest.mark.needs("curl")
def test_every_request_of_the_api_page_works(
    start: Start, environ: dict[str, str], tmp_path: Path
) -> None:
    """They run in the order of the page."""
    daemon = demonstration(start, environ, tmp_path)
    lines = [c for b in blocks(DOCS / "api.rst", "console") for c in b.commands()]
    assert len(lines) >= 11
    for line in lines:
        words = shlex.split(line.replace(DEMO, daemon.base))
        assert words[0] == "curl"
        done = run([*words, "--silent", "--show-error", "--fail-with-body"])
        assert done.returncode == 0, (line, done.stdout, done.stderr)
        assert done.stdout, line


@pytest.mark.needs("curl")
def test_api_page_has_every_field_of_a_task(start: Start) -> None:
    """Only ``outputOffset`` and ``outputCut`` are missing from some tasks."""
    daemon = start("--command", "echo")
    number = daemon.run("site", "production", "deploy")
    table = section(DOCS / "api.rst", "The task object")
    cells = re.findall(r"^   \* - (.*)$", table, re.MULTILINE)
    documented = {name for cell in cells for name in re.findall(r"``(\w+)``", cell)}
    assert set(daemon.ended(number)) <= documented
    assert documented - set(daemon.task(number)) <= {"outputOffset", "outputCut"}


@pytest.mark.needs("curl")
def test_team_on_github_deploys_by_the_five_steps(start: Start, tmp_path: Path) -> None:
    """The settings and commands are those of the README. GitHub is a local server."""
    scripts = tmp_path / "apps" / "shop"
    scripts.mkdir(parents=True)
    (scripts / "deploy").write_text("#!/bin/sh\necho deployed\n")
    (scripts / "deploy").chmod(0o755)
    (toml,) = by_language("toml")
    text = toml.text.replace("/srv/deploy", str(tmp_path))
    cut = ("interface", "port", "public-url", "ssl-")
    lines = [line for line in text.splitlines() if not line.startswith(cut)]
    unit = (ROOT / "systemd" / "pulsar-api.service").read_text()
    assert "\nStateDirectory=pulsar-api\n" in unit
    assert "\nUser=pulsar-api\n" in unit
    assert "--config /etc/pulsar-api.toml\n" in unit
    with github() as hub:
        hub.users = {"ghp_alice0000000000": "alice", "ghp_bob000000000000": "bob"}
        hub.members = {("acme", "alice"), ("acme", "bob"), ("acme/deployers", "alice")}
        config = tmp_path / "pulsar-api.toml"
        config.write_text("\n".join([f'github-api-url = "{hub.url}"', *lines]))
        daemon = start("--config", str(config))

        def answer(command: str, token: str = "") -> str:
            text = command.removeprefix(AS_DAEMON).replace(TEAM, daemon.base)
            text = text.replace("$TOKEN", token).replace("$CI_TOKEN", token)
            words = shlex.split(text.replace("/var/lib/pulsar-api", str(daemon.state)))
            if words[0] == PROGRAM:
                return run([*PULSAR_API, *words[1:]]).stdout
            return run([*words, "--silent"]).stdout

        deploy, follow = commands("curl -u")
        create, again, audit = commands(PROGRAM)[-3:]
        assert create.startswith(AS_DAEMON)
        assert audit.startswith(AS_DAEMON)
        assert json.loads(answer(deploy, "ghp_alice0000000000"))["id"] == 1
        assert answer(follow, "ghp_alice0000000000") == "deployed\n"
        assert json.loads(answer(deploy, "ghp_bob000000000000"))["status"] == 403
        assert answer(follow, "ghp_bob000000000000") == "deployed\n"
        assert json.loads(answer(deploy, "ghp_eve000000000000"))["status"] == 401
        assert answer(again, answer(create).strip()) == "deployed\n"
        seen = answer(audit)
        for entry in ("alice (github, ", "NO   bob (github, ", "token:ci (token, "):
            assert entry in seen
