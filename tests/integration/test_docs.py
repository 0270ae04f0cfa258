"""Commands and files of the tutorial and the guides work when pasted."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import needs
from tests.integration.conftest import Start
from tests.integration.daemon import PATIENCE, SHELL, Daemon, wait_for
from tests.integration.refused import answers, reserved
from tests.pages import DOCS, ROOT, Block, blocks

BIN = Path(sys.executable).parent
TUTORIAL = DOCS / "tutorial.rst"
HOWTO = DOCS / "howto"


@pytest.fixture
def programs(tmp_path: Path) -> Mapping[str, str]:
    """Return an environment with our ``pulsar-api`` and a ``python3`` that does nothing."""
    folder = tmp_path / "bin"
    folder.mkdir()
    ours = f"#!{sys.executable}\nfrom pulsar_api.cli.main import main\nmain()\n"
    for name, text in (("pulsar-api", ours), ("python3", "#!/bin/sh\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


def shell(text: str, folder: Path, environ: Mapping[str, str]) -> tuple[int, str]:
    """Run lines of shell as if pasted. Return the exit status and both outputs together."""
    done = subprocess.run(
        ["/bin/sh", "-c", text],
        cwd=folder,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    return done.returncode, done.stdout


class Newcomer:
    """A user with two terminals and a new folder who pastes commands of the tutorial."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.port = port
        self.home = folder / "home"
        self.home.mkdir()
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("XDG", "PULSAR"))}
        self.environ = {
            **keep,
            "HOME": str(self.home),
            "TMPDIR": str(folder),
            "PULSAR_API_URL": f"http://localhost:{port}",
        }
        self.daemon: subprocess.Popen[bytes] | None = None
        self.printed: list[tuple[str, int, str]] = []

    def paste(self, command: str) -> None:
        """Run a command. If it starts the daemon, it replaces the running one."""
        command = command.replace(".venv/bin/", f"{BIN}/")
        command = command.replace("localhost:8081", f"localhost:{self.port}")
        if "twistd" in command:
            self.stop()
            log = (self.folder / "daemon.log").open("ab")
            with log:
                self.daemon = subprocess.Popen(
                    ["/bin/sh", "-c", f"exec {command} --port {self.port}"],
                    cwd=self.folder,
                    env=self.environ,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            wait_for(self.serves, "the daemon")
            return
        name, _, value = command.removeprefix("export ").partition("=")
        if command.startswith("export "):
            value = shell(f"printf %s {value}", self.folder, self.environ)[1]
            self.environ[name] = value
            return
        status, text = shell(command, self.folder, self.environ)
        self.printed.append((command, status, text))

    def serves(self) -> bool:
        """Return whether the daemon answers."""
        assert self.daemon is not None
        assert self.daemon.poll() is None, (self.folder / "daemon.log").read_text()
        with closing(
            HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        ) as connection:
            try:
                connection.request("GET", "/tasks")
                return connection.getresponse().status in {200, 401}
            except ConnectionError:
                return False

    def stop(self) -> None:
        """Stop the daemon, if one runs."""
        if self.daemon is not None:
            self.daemon.send_signal(signal.SIGTERM)
            self.daemon.wait(PATIENCE)
            self.daemon = None

    def last(self, part: str) -> tuple[int, str]:
        """Return status and output of the last command that contains ``part``."""
        return [(s, t) for command, s, t in self.printed if part in command][-1]


@pytest.fixture
def newcomer(tmp_path: Path) -> Iterator[Newcomer]:
    """Return a user whose daemon ends with the test."""
    with reserved() as port:
        somebody = Newcomer(tmp_path, port)
    yield somebody
    somebody.stop()


@pytest.mark.needs("curl")
def test_tutorial_leads_to_deployments(newcomer: Newcomer) -> None:
    """Each of its files is written and each command pasted, in the order of the page."""
    for block in blocks(TUTORIAL):
        if block.caption:
            (newcomer.folder / block.caption).write_text(block.text)
            continue
        for command in block.commands():
            if "-m venv" not in command and "pip install" not in command:
                newcomer.paste(command)
    runs = [(s, t) for c, s, t in newcomer.printed if "run shop staging deploy" in c]
    assert [status for status, _ in runs] == [0, 2, 0]
    assert "Deploying shop 1.0 to staging" in runs[0][1]
    assert "Which version?" in runs[1][1]
    assert "Deploying shop 1.2 to staging" in runs[2][1]
    assert "Deploying shop 1.1 to staging" in newcomer.last("/task/3/log")[1]
    assert "finished" in newcomer.last("bin/pulsar-api tasks")[1]
    steps = re.findall(
        r"^step (\d+) of 10$", newcomer.last("log --follow")[1], re.MULTILINE
    )
    assert steps == [str(number) for number in range(1, 11)]
    assert "killed" in newcomer.last("show 5")[1]
    assert "token:me" in newcomer.last("audit")[1]
    assert [status for _, status, _ in newcomer.printed if status] == [2, 121]
    assert not (newcomer.folder / "tutorial").exists()


def test_tutorial_shows_the_folder_that_it_makes() -> None:
    """The picture has exactly the files that the text names."""
    (picture,) = blocks(TUTORIAL, "text")
    shown = set(re.findall(r"[\w.]+(?=/?\n)", picture.text))
    text = TUTORIAL.read_text()
    named = set(re.findall(r"tutorial/apps/shop/([\w/.]+)", text))
    assert shown == {"tutorial", "apps", "shop"} | {p for n in named for p in n.split("/")}


def ci_scripts() -> dict[str, str]:
    """Return the shell code of each CI snippet, by the name of its file."""
    found = {}
    for block in blocks(HOWTO / "ci.rst", "yaml"):
        value: dict[str, Any] = yaml.safe_load(block.text)
        (job,) = value.get("jobs", value).values()
        lines = job.get("script") or [step["run"] for step in job["steps"]]
        found[block.caption] = "\n".join(["set -eu", *lines])
    (block,) = blocks(HOWTO / "ci.rst", "sh")
    return {**found, "curl": block.text}


@pytest.fixture
def shop(start: Start, tmp_path: Path) -> Daemon:
    """Return a daemon with a deployment that fails while the file ``fail`` exists."""
    folder = tmp_path / "repo" / "apps" / "shop"
    folder.mkdir(parents=True)
    script = '#!/bin/sh\necho "revision ${PULSAR_VAR_revision:-none}"\n'
    (folder / "deploy").write_text(script + "[ ! -e fail ]\n")
    (folder / "deploy").chmod(0o755)
    return start("--command", "scripts", "--config-repo", str(folder.parents[1]))


@pytest.mark.needs("curl")
@pytest.mark.parametrize("name", ci_scripts())
def test_ci_snippets_fail_if_the_deployment_fails(
    shop: Daemon, programs: Mapping[str, str], tmp_path: Path, name: str
) -> None:
    """A job succeeds exactly if its task does."""
    script = ci_scripts()[name]
    names = "GITHUB_SHA GITHUB_RUN_ID GITHUB_RUN_ATTEMPT CI_COMMIT_SHA CI_JOB_ID".split()
    environ = {
        **programs,
        **dict.fromkeys(names, "1"),
        "PULSAR_API_URL": shop.base,
        "PULSAR_API_TOKEN": "unused",
    }
    status, text = shell(script, tmp_path, environ)
    assert (status, "revision " in text) == (0, True), text
    (tmp_path / "repo" / "apps" / "shop" / "fail").touch()
    environ.update(dict.fromkeys(names, "2"))
    assert shell(script, tmp_path, environ)[0] != 0


def test_chat_bot_answers(
    shop: Daemon, programs: Mapping[str, str], tmp_path: Path
) -> None:
    """It replies with the URL of the task, its result, or the reason of a refusal."""
    (block,) = blocks(HOWTO / "chat.rst", "python")
    (tmp_path / "bot.py").write_text(block.text)
    said = "deploy shop staging\\nnonsense\\ndeploy -x staging\\n"
    text = f"printf '{said}' | {sys.executable} bot.py"
    status, out = shell(text, tmp_path, {**programs, "PULSAR_API_URL": shop.base})
    assert status == 0, out
    started, ended, help, refused = out.splitlines()
    assert started == f"shop staging: task 1 started, see {shop.base}/web#job/1"
    assert (ended, help) == ("shop staging: finished", "Say: ACTION APP ENV")
    assert "app" in refused


def test_backup_is_restored(start: Start, tmp_path: Path) -> None:
    """The commands of the page restore the history, and start no old task again."""
    daemon = start("--command", SHELL)
    daemon.ended(daemon.sh("echo kept"))
    places = {
        "/var/lib/pulsar-api": str(daemon.state),
        "/root/": f"{tmp_path}/",
        "-o pulsar-api -g pulsar-api ": "",
    }
    for block in blocks(HOWTO / "backup.rst", "console"):
        for command in block.commands():
            if command.startswith("systemctl"):
                daemon.start() if "start " in command else daemon.stop()
                continue
            for before, after in places.items():
                command = command.replace(before, after)  # noqa: PLW2901
            status, text = shell(command, tmp_path, os.environ)
            assert status == 0, text
    assert daemon.task(1)["output"] == "kept\n"
    assert (daemon.state.parent / "state.before").exists()
    daemon.ended(daemon.sh("echo new"))


@contextmanager
def running(words: list[str], folder: Path) -> Iterator[None]:
    """Run a program until the end of the block."""
    environ = {**os.environ, "HOME": str(folder), "XDG_DATA_HOME": str(folder)}
    with (folder / "proxy.log").open("wb") as log:
        process = subprocess.Popen(words, cwd=folder, env=environ, stdout=log, stderr=log)
    try:
        yield
    finally:
        process.terminate()
        process.wait(PATIENCE)


def captioned(caption: str) -> Block:
    """Return the block with this caption from the page about proxies."""
    (found,) = [b for b in blocks(HOWTO / "proxy.rst") if b.caption == caption]
    return found


def through(port: int, path: str, daemon: Daemon, folder: Path) -> None:
    """Check that a proxy passes output on as it is printed, and forwards a POST."""
    go = folder / "go"
    os.mkfifo(go)
    daemon.sh(f"echo one; read x < {go}; echo two")
    wait_for(lambda: daemon.task(1)["output"] == "one\n", "the first line")
    wait_for(lambda: answers(port), "the proxy")
    connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    connection.request("GET", f"{path}/task/1/log?follow=1")
    response = connection.getresponse()
    assert response.status == 200, response.read()
    assert response.readline() == b"one\n"
    threading.Thread(target=go.write_text, args=("go\n",), daemon=True).start()
    assert response.read() == b"two\n"
    body = "action=run&variables[run]=true"
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    connection.request("POST", f"{path}/shop/production", body, form)
    made = connection.getresponse()
    assert b'"taskId": 2' in made.read()
    connection.close()


@pytest.fixture
def behind(start: Start) -> Daemon:
    """Return a daemon with the public URL of the page about proxies."""
    return start("--command", SHELL, "--public-url", "https://deploy.example.com")


@pytest.mark.parametrize(
    ("caption", "path"),
    [
        ("/etc/nginx/sites-enabled/pulsar-api", ""),
        ("/etc/nginx/snippets/pulsar-api", "/deploy"),
    ],
)
@pytest.mark.needs("nginx")
def test_output_arrives_through_nginx(
    behind: Daemon, tmp_path: Path, caption: str, path: str
) -> None:
    """The configuration is that of the page, with other ports and no certificate."""
    nginx = needs.find("nginx")
    assert nginx is not None
    with reserved() as port:
        pass
    text = captioned(caption).text.replace("127.0.0.1:8081", f"127.0.0.1:{behind.port}")
    text = text.replace("listen 443 ssl;", f"listen 127.0.0.1:{port};")
    text = re.sub(r"^ *ssl_certificate.*\n", "", text, flags=re.MULTILINE)
    if "server {" not in text:
        text = f"server {{ listen 127.0.0.1:{port};\n{text}}}\n"
    # The test sends its requests to an address.
    text = text.replace("$host", "deploy.example.com")
    names = "client_body proxy fastcgi uwsgi scgi".split()
    paths = "".join(f"{n}_temp_path {tmp_path}/{n};\n" for n in names)
    (tmp_path / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {tmp_path}/nginx.pid;\n"
        f"error_log {tmp_path}/error.log;\nevents {{}}\n"
        f"http {{ access_log off;\n{paths}{text}}}\n"
    )
    words = [nginx, "-p", str(tmp_path), "-e", "stderr", "-c", f"{tmp_path}/nginx.conf"]
    with running(words, tmp_path):
        through(port, path, behind, tmp_path)


@pytest.mark.parametrize(
    ("caption", "path"), [("Caddyfile", ""), ("Caddyfile with a path", "/deploy")]
)
@pytest.mark.needs("caddy")
def test_output_arrives_through_caddy(
    behind: Daemon, tmp_path: Path, caption: str, path: str
) -> None:
    """The configuration is that of the page, with another name and other ports."""
    caddy = needs.find("caddy")
    assert caddy is not None
    with reserved() as port:
        pass
    text = captioned(caption).text.replace("127.0.0.1:8081", f"127.0.0.1:{behind.port}")
    text = re.sub(r"^\w+\.example\.com", f"http://127.0.0.1:{port}", text)
    (tmp_path / "Caddyfile").write_text("{\n    admin off\n}\n" + text)
    words = [caddy, "run", "--config", "Caddyfile", "--adapter", "caddyfile"]
    with running(words, tmp_path):
        through(port, path, behind, tmp_path)


def unit_of(name: str) -> str:
    """Return the unit with this name from the page about systemd."""
    caption = f"/etc/systemd/system/{name}"
    (found,) = [b for b in blocks(HOWTO / "systemd.rst", "ini") if b.caption == caption]
    return found.text


@pytest.mark.needs("systemd-analyze")
def test_systemd_units_are_valid(tmp_path: Path) -> None:
    """``systemd-analyze`` accepts the shipped unit, its drop-ins and the socket."""
    drop_in = "pulsar-api.service.d"
    unit = (ROOT / "systemd" / "pulsar-api.service").read_text()
    unit = unit.replace("/opt/pulsar-api/bin/twistd", str(BIN / "twistd"))
    (tmp_path / drop_in).mkdir()
    (tmp_path / "pulsar-api.service").write_text(unit)
    (tmp_path / drop_in / "run-as.conf").write_text(
        (ROOT / "systemd" / "run-as.conf").read_text()
    )
    for name in ("pulsar-api.socket", f"{drop_in}/override.conf"):
        (tmp_path / name).write_text(unit_of(name))
    done = subprocess.run(
        ["systemd-analyze", "verify", "./pulsar-api.socket", "./pulsar-api.service"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_container_command_and_files_exist() -> None:
    """The Dockerfile itself cannot be built here."""
    (block,) = blocks(HOWTO / "container.rst", "docker")
    known = "FROM COPY RUN USER VOLUME EXPOSE CMD".split()
    assert {line.split()[0] for line in block.text.splitlines()} == set(known)
    words: list[str] = yaml.safe_load(block.text.partition("\nCMD ")[2])
    assert (BIN / Path(words[0]).name).exists()
    done = subprocess.run(
        [BIN / "twistd", *words[1:4], "--help"], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (ROOT / "pyproject.toml").exists()
