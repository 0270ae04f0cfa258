"""Tests of installations by pip: in the foreground, in the background, from any folder."""

import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.integration.conftest import Script, Start
from tests.integration.daemon import CERTIFICATE, Daemon, end_shim, wait_for
from tests.integration.refused import alive, answers, end, reserved

pytestmark = pytest.mark.long  # each installs packages from an index

PROJECT = Path(__file__).parents[2]
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "node_modules", "dist", "build")

# The environment of the tests must not hide a fault of the installation.
ENVIRON = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run(*arguments: object, folder: str | Path = "/") -> str:
    """Run a program that must succeed, and return its output."""
    done = subprocess.run(
        [str(argument) for argument in arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        env=ENVIRON,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


class Place:
    """A virtual environment in which a test installs packages."""

    def __init__(self, folder: Path) -> None:
        run(sys.executable, "-m", "venv", folder)
        self.python = folder / "bin" / "python"
        self.twistd = folder / "bin" / "twistd"
        self.foreground = (str(self.twistd), "--nodaemon", "--pidfile=", "pulsar-api")

    def pip(self, *arguments: object) -> str:
        """Run pip in this environment."""
        return run(self.python, "-m", "pip", "--quiet", *arguments)

    def installed(self) -> Path:
        """Return the folder of the installed package."""
        code = "import pulsar_api; print(pulsar_api.__path__[0])"
        return Path(run(self.python, "-c", code).strip())


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the project with a cache of twistd in it."""
    copy = tmp_path_factory.mktemp("sources") / "pulsar-api"
    shutil.copytree(PROJECT, copy, ignore=NOT_COPIED)
    (copy / "twisted" / "plugins" / "dropin.cache").write_bytes(b"of this machine")
    return copy


@pytest.fixture(scope="module")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the wheel of the project."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--quiet")
    run(*pip, "wheel", "--no-deps", "--wheel-dir", folder, sources)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def fresh(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Return an environment with the wheel and its dependencies installed."""
    place = Place(tmp_path_factory.mktemp("fresh") / "venv")
    place.pip("install", wheel)
    return place


class TestWheel:
    @pytest.mark.parametrize(
        "name",
        [
            "pulsar_api/py.typed",
            "pulsar_api/ssl/pulsar.local.crt",
            "pulsar_api/ssl/pulsar.local.key",
            "pulsar_api/ui/index.html",
            "pulsar_api/ruby/pulsar_live.rb",
            "pulsar_api/example/apps/site/deploy",
            "pulsar_api/example/apps/site/public/index.html",
            "twisted/plugins/pulsar_api.py",
        ],
    )
    def test_the_wheel_has_the_files_that_are_no_modules(
        self, wheel: Path, name: str
    ) -> None:
        """Without them the daemon would start and fail later."""
        assert name in zipfile.ZipFile(wheel).namelist()

    @pytest.mark.parametrize("folder", ["ui", "ruby", "example"])
    def test_the_wheel_has_every_file_of_these_folders(
        self, wheel: Path, folder: str
    ) -> None:
        """No suffix is left out."""
        root = PROJECT / "pulsar_api"
        expected = {
            f"pulsar_api/{path.relative_to(root)}"
            for path in (root / folder).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        assert expected
        assert expected <= set(zipfile.ZipFile(wheel).namelist())

    def test_the_wheel_has_no_caches_or_logs(self, wheel: Path) -> None:
        """The sources had a cache of twistd."""
        names = zipfile.ZipFile(wheel).namelist()
        assert [n for n in names if n.endswith((".cache", ".pyc", ".db", ".log"))] == []

    def test_the_wheel_overwrites_nothing_of_twisted(self, wheel: Path) -> None:
        """Twisted's folder gets the plugin alone, without an ``__init__.py``."""
        names = zipfile.ZipFile(wheel).namelist()
        ours = [name for name in names if name.startswith("twisted/")]
        assert ours == ["twisted/plugins/pulsar_api.py"]

    def test_the_wheel_has_no_other_packages(self, wheel: Path) -> None:
        """Tests and benchmarks are not installed."""
        tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
        assert {t for t in tops if not t.endswith(".dist-info")} == {
            "pulsar_api",
            "twisted",
        }


class TestInstalled:
    def test_no_requirement_is_missing_or_in_conflict(self, fresh: Place) -> None:
        assert run(fresh.python, "-m", "pip", "check").strip() == (
            "No broken requirements found."
        )

    def test_every_module_can_be_imported(self, fresh: Place) -> None:
        """The requirements of the wheel are enough, without those of the tests."""
        code = """if True:
            import importlib, pkgutil, pulsar_api
            for module in pkgutil.walk_packages(pulsar_api.__path__, "pulsar_api."):
                if not module.name.endswith("__main__"):
                    importlib.import_module(module.name)
        """
        assert run(fresh.python, "-W", "error::ImportWarning", "-c", code) == ""

    def test_twistd_lists_the_plugin(self, fresh: Place) -> None:
        """The list has its description, from any folder."""
        text = run(fresh.twistd, "--help")
        line = r"^ +pulsar-api +Run deployment and operations tasks over HTTP\.$"
        assert re.search(line, text, re.MULTILINE)

    def test_listing_plugins_does_not_import_the_package(self, fresh: Place) -> None:
        """So other programs of twistd are not slowed down."""
        code = """if True:
            import sys
            from twisted.application.service import IServiceMaker
            from twisted.plugin import getPlugins
            names = {plugin.tapname for plugin in getPlugins(IServiceMaker)}
            print("pulsar-api" in names, "pulsar_api" in sys.modules)
        """
        # Twisted imports each plugin the first time, and then reads its cache.
        assert run(fresh.python, "-c", code).splitlines()[-1] == "True False"

    def test_twistd_serves_from_the_root_folder(
        self, fresh: Place, start: Start, repo: Path, script: Script
    ) -> None:
        """A task runs and has its output, and the page is served."""
        script("deploy", "#!/bin/sh\necho done\n")
        options = ("--command", "scripts", "--config-repo", str(repo))
        daemon = start(*options, program=fresh.foreground, environ=ENVIRON)
        number = daemon.run("site", "production", "deploy")
        assert daemon.ended(number)["status"] == "finished"
        assert daemon.task(number)["output"] == "done\n"
        page = daemon.get("/pulsar/index.html")
        assert page.status == 200
        assert page.headers["Content-Type"].startswith("text/html")

    def test_the_module_serves_without_twistd(self, fresh: Place, start: Start) -> None:
        """A machine need not have the plugin folder of twistd."""
        program = (str(fresh.python), "-m", "pulsar_api")
        assert start(program=program, environ=ENVIRON).get("/tasks").status == 200

    def test_dev_finds_its_certificate(self, fresh: Place, start: Start) -> None:
        """The package has the same certificate as the sources."""
        daemon = start("--dev", program=fresh.foreground, environ=ENVIRON)
        assert daemon.scheme == "https"
        installed = fresh.installed() / "ssl" / CERTIFICATE.name
        assert installed.read_bytes() == CERTIFICATE.read_bytes()

    def test_the_scripts_of_the_example_are_executable(
        self, fresh: Place, start: Start
    ) -> None:
        """Their mode survives the installation."""
        example = fresh.installed() / "example"
        scripts = [p for p in (example / "apps" / "site").iterdir() if p.is_file()]
        assert scripts
        assert [p.name for p in scripts if not os.access(p, os.X_OK)] == []

    @pytest.mark.parametrize("program", ["module", "twistd", "command"])
    def test_the_version_is_that_of_the_wheel(
        self, fresh: Place, wheel: Path, program: str
    ) -> None:
        """Each way to start the program prints it."""
        command: dict[str, Sequence[object]] = {
            "module": (fresh.python, "-m", "pulsar_api"),
            "twistd": (fresh.twistd, "pulsar-api"),
            "command": (fresh.python.with_name("pulsar-api"),),
        }
        version = wheel.name.split("-")[1]
        assert run(*command[program], "--version") == f"pulsar-api {version}\n"

    @pytest.mark.parametrize("program", ["module", "twistd"])
    def test_the_help_lists_the_options(self, fresh: Place, program: str) -> None:
        """It has the defaults, and the usage once."""
        command: dict[str, Sequence[object]] = {
            "module": (fresh.python, "-m", "pulsar_api"),
            "twistd": (fresh.twistd, "pulsar-api"),
        }
        text = run(*command[program], "--help")
        for option in ("--config-repo=", "--port=", "--ssl-pfx=", "--listen=", "--dev "):
            assert option in text
        assert "[master]" in text
        assert text.startswith("Usage: ")
        assert text.count("Usage:") == 1

    def test_the_help_of_the_module_has_its_own_usage(self, fresh: Place) -> None:
        """It does not mention twistd."""
        first = run(fresh.python, "-m", "pulsar_api", "--help").splitlines()[0]
        assert first == "Usage: python -m pulsar_api [options]"


class Background(Daemon):
    """A daemon in the background, started by twistd."""

    def __init__(
        self, folder: Path, twistd: Path, *options: str, own: Sequence[str], umask: int
    ) -> None:
        self.pid_file = folder / "pulsar-api.pid"
        self.pid = 0
        program = (str(twistd), "--pidfile", str(self.pid_file), *own, "pulsar-api")
        logs = ("--log-dir", str(folder / "logs" / "deep"))
        super().__init__(
            folder, *logs, *options, program=program, environ=ENVIRON, umask=umask
        )

    def start(self) -> None:
        """Start the daemon and read its process id and address from its files."""
        done = subprocess.run(
            self.arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=self.folder,
            env=self.environ,
            umask=self.umask,
            check=False,
        )
        assert (done.returncode, done.stdout) == (0, b"")
        self.pid = int(self.pid_file.read_text())
        self.log = self.folder / "logs" / "deep" / "pulsar-api.log"
        try:
            found = re.search(r"listens on (http)://(\S+):(\d+)", self.log.read_text())
            assert found is not None
            self.scheme, self.host, port = found.groups()
            self.port = int(port)
            wait_for(lambda: self.get("/tasks?limit=1").status == 200, "the first answer")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> int:
        """Stop the daemon by its process id, as an init script does."""
        if self.pid and alive(self.pid):
            end(self.pid)
        for lock in self.folder.rglob("tasks/*/lock"):
            end_shim(lock)
        return 0


StartBackground = Callable[..., Background]


@pytest.fixture
def start_background(fresh: Place, tmp_path: Path) -> Iterator[StartBackground]:
    """Return a function that starts a daemon in the background until the test ends."""
    daemons: list[Background] = []

    def begin(*options: str, own: Sequence[str] = (), umask: int = -1) -> Background:
        folder = tmp_path / "background"
        folder.mkdir()
        made = Background(folder, fresh.twistd, *options, own=own, umask=umask)
        daemons.append(made)
        return made

    yield begin
    for daemon in daemons:
        daemon.stop()


class TestBackground:
    def test_the_pid_file_names_the_daemon(self, start_background: StartBackground) -> None:
        """The process is the daemon, not the one that started it."""
        daemon = start_background()
        arguments = Path(f"/proc/{daemon.pid}/cmdline").read_bytes().split(b"\0")
        assert arguments[1:-1] == [os.fsencode(a) for a in daemon.arguments]

    def test_twistd_returns_when_the_port_is_open(
        self, start_background: StartBackground
    ) -> None:
        """So the next command of a script can send a request. See `Background.start`."""
        with reserved() as port:
            assert start_background("--port", str(port)).port == port

    def test_the_log_is_in_the_folder_of_the_option(
        self, start_background: StartBackground
    ) -> None:
        """The daemon creates missing folders and writes no other log."""
        daemon = start_background()
        assert "listens on http://127.0.0.1:" in daemon.log.read_text()
        assert sorted(path.name for path in daemon.folder.iterdir()) == [
            "logs",
            "pulsar-api.pid",
            "state",
        ]

    def test_a_signal_to_the_process_id_ends_the_daemon(
        self, start_background: StartBackground
    ) -> None:
        """The port is then free, the pid file is gone, and the log has the end."""
        daemon = start_background()
        assert answers(daemon.port)
        daemon.stop()
        assert not answers(daemon.port)
        assert not daemon.pid_file.exists()
        assert "Server Shut Down." in daemon.log.read_text()
        assert "Traceback" not in daemon.log.read_text()

    def test_other_users_cannot_read_state_or_logs(
        self, start_background: StartBackground
    ) -> None:
        """Output can contain secrets. The umask of the caller does not matter."""
        daemon = start_background(umask=0)
        assert daemon.state.stat().st_mode & 0o777 == 0o700
        assert (daemon.folder / "logs" / "deep").stat().st_mode & 0o777 == 0o700

    @pytest.mark.parametrize("umask", [0o022, 0o027], ids=oct)
    def test_tasks_have_the_umask_of_the_caller_of_twistd(
        self, start_background: StartBackground, repo: Path, script: Script, umask: int
    ) -> None:
        """The umask 077 of twistd would hide deployed files from a web server."""
        script("deploy", "#!/bin/sh\numask\n")
        options = ("--command", "scripts", "--config-repo", str(repo))
        daemon = start_background(*options, umask=umask)
        number = daemon.run("site", "production", "deploy")
        assert daemon.ended(number)["status"] == "finished"
        assert daemon.task(number)["output"] == f"{umask:04o}\n"

    def test_relative_folders_start_where_twistd_was_started(
        self, start_background: StartBackground, script: Script
    ) -> None:
        """The option ``--rundir`` does not change them."""
        script("deploy", "#!/bin/sh\necho done\n")
        daemon = start_background(
            "--state-dir=here",
            "--log-dir=logs/deep",
            "--command=scripts",
            "--config-repo=../repo",
            own=("--rundir", "/"),
        )
        number = daemon.run("site", "production", "deploy")
        assert daemon.ended(number)["status"] == "finished"
        output = daemon.folder / "here" / "tasks" / str(number) / "output"
        assert output.read_bytes() == b"done\n"


class TestEditable:
    def test_an_editable_installation_works_and_can_be_removed(
        self, sources: Path, tmp_path: Path, start: Start
    ) -> None:
        """After its removal, twistd has only its other plugins."""
        place = Place(tmp_path / "venv")
        place.pip("install", "--editable", sources)
        assert place.installed() == sources / "pulsar_api"
        assert re.search(r"^ +pulsar-api ", run(place.twistd, "--help"), re.MULTILINE)
        daemon = start("--dev", program=place.foreground, environ=ENVIRON)
        assert daemon.get("/pulsar/index.html").status == 200
        assert daemon.stop() in {0, -signal.SIGTERM}  # twistd ends by the signal
        place.pip("uninstall", "--yes", "pulsar-api")
        text = run(place.twistd, "--help")
        assert "pulsar-api" not in text
        assert re.search(r"^ +web ", text, re.MULTILINE)
