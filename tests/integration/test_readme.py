"""What the README tells a newcomer to do works when pasted."""

import json
import re
import shlex
import subprocess
import textwrap
from pathlib import Path

from pulsar_api.cli.demo import EXAMPLE
from pulsar_api.config.settings import options
from tests.integration.conftest import Start
from tests.integration.daemon import PATIENCE, PULSAR_API
from tests.integration.github import github

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


def test_a_team_on_github_deploys_as_the_walk_through_says(
    start: Start, tmp_path: Path
) -> None:
    """Its settings and commands, with a GitHub of ours and another address."""
    scripts = tmp_path / "apps" / "shop"
    scripts.mkdir(parents=True)
    (scripts / "deploy").write_text("#!/bin/sh\necho deployed\n")
    (scripts / "deploy").chmod(0o755)
    walk = README[README.index("A team on GitHub") : README.index("What a task runs")]
    toml = re.search(r"code-block:: toml\n\n(.*?)\n\n\d", walk, re.DOTALL)
    assert toml is not None
    text = textwrap.dedent(toml[1]).replace("/srv/deploy", str(tmp_path))
    cut = ("interface", "port", "ssl-")
    lines = [line for line in text.splitlines() if not line.startswith(cut)]
    with github() as hub:
        hub.users = {"ghp_alice0000000000": "alice", "ghp_bob000000000000": "bob"}
        hub.members = {("acme", "alice"), ("acme", "bob"), ("acme/deployers", "alice")}
        config = tmp_path / "pulsar-api.toml"
        config.write_text("\n".join([f'github-api-url = "{hub.url}"', *lines]))
        daemon = start("--config", str(config))

        def run(token: str, command: str) -> str:
            command = command.replace("https://deploy.example.com:8443", daemon.base)
            words = shlex.split(
                command.replace("$TOKEN", token).replace("$CI_TOKEN", token)
            )
            if words[0] == "pulsar-api":
                words[:1] = PULSAR_API
                if words[3] in {"token", "audit"}:
                    words += ["--state-dir", str(daemon.state)]
            done = subprocess.run(
                [*words, *(["--silent"] if words[0] == "curl" else [])],
                capture_output=True,
                timeout=PATIENCE,
                check=False,
                text=True,
            )
            return done.stdout

        commands = re.findall(r"^ {6}\$ ((?:curl|pulsar-api) .*)$", walk, re.MULTILINE)
        deploy, follow, create, again, audit = commands
        assert json.loads(run("ghp_alice0000000000", deploy))["id"] == 1
        assert run("ghp_alice0000000000", follow) == "deployed\n"
        assert json.loads(run("ghp_bob000000000000", deploy))["status"] == 403
        assert run("ghp_bob000000000000", follow) == "deployed\n"
        assert json.loads(run("ghp_eve000000000000", deploy))["status"] == 401
        assert run(run("", create).strip(), again) == "deployed\n"
        seen = run("", audit)
        for entry in ("alice (github, ", "NO   bob (github, ", "token:ci (token, "):
            assert entry in seen


def test_every_option_is_in_the_table() -> None:
    """With its name as it is written."""
    table = section("Options")
    for name, *_ in options():
        assert f"--{name}" in table
