"""Daemons and browsers that end with the tests that started them."""

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from selenium.webdriver import Chrome

from tests.integration import zygote
from tests.integration.browser import chromium
from tests.integration.daemon import SHELL, Daemon, wait_for

Start = Callable[..., Daemon]
NPM = Path(__file__).parents[1] / "npm"


@pytest.fixture(scope="session")
def npm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the JavaScript packages that tests need, by npm."""
    folder = tmp_path_factory.mktemp("npm")
    for name in ("package.json", "flow.js"):
        shutil.copy(NPM / name, folder)
    command = "npm install --no-audit --no-fund --ignore-scripts --loglevel=error".split()
    subprocess.run(command, cwd=folder, check=True, timeout=300)
    return folder


@pytest.fixture(autouse=True)
def _what_was_started_ends() -> Iterator[None]:
    """Kill the processes that a test has left, for example because it failed."""
    before = len(zygote.Popen.started)
    yield
    for process in zygote.Popen.started[before:]:
        if process.poll() is None:
            process.kill()
            process.wait()
    del zygote.Popen.started[before:]


@pytest.fixture
def place() -> Iterator[Path]:
    """Return a folder that every account can enter, unlike the folders of pytest."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder

    def removed() -> bool:
        # The shim of a task that a test has left may still write its result.
        shutil.rmtree(folder, ignore_errors=True)
        return not folder.exists()

    wait_for(removed, "the removal of a folder")


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """Return a configuration repository for the ``scripts`` preset, without actions."""
    folder = tmp_path / "repo" / "apps" / "site"
    folder.mkdir(parents=True)
    return folder.parents[1]


Script = Callable[[str, str], None]


@pytest.fixture
def script(repo: Path) -> Script:
    """Return a function that writes an action of the app ``site``."""

    def write(name: str, text: str) -> None:
        path = repo / "apps" / "site" / name
        path.write_text(text)
        path.chmod(0o755)

    return write


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts a daemon with the given options."""
    daemons: list[Daemon] = []

    def begin(*options: str, **more: object) -> Daemon:
        folder = tmp_path / f"daemon{len(daemons)}"
        folder.mkdir(exist_ok=True)
        daemons.append(Daemon(folder, *options, **more))  # type: ignore[arg-type]
        return daemons[-1]

    yield begin
    for daemon in daemons:
        daemon.stop()


@pytest.fixture
def daemon(start: Start, repo: Path) -> Daemon:
    """Return a daemon that runs the scripts of ``repo``."""
    return start("--command", "scripts", "--config-repo", str(repo), "--kill-grace", "2")


@pytest.fixture
def returning(start: Start) -> Iterator[Daemon]:
    """Return a daemon that runs lines of shell and restarts on the same port."""
    daemon = start("--command", SHELL, "--kill-grace=1")
    daemon.arguments[daemon.arguments.index("--port") + 1] = str(daemon.port)
    yield daemon
    assert "Traceback" not in daemon.log.read_text()


@pytest.fixture(scope="module")
def chrome() -> Iterator[Chrome]:
    """Return one browser for all tests of this folder."""
    with chromium() as driver:
        yield driver


@pytest.fixture
def browser(chrome: Chrome) -> Iterator[Chrome]:
    """Return a browser without cookies. Fail if a page breaks its policy or a script."""
    chrome.execute_cdp_cmd("Network.clearBrowserCookies", {})
    chrome.get_log("browser")  # type: ignore[no-untyped-call]
    yield chrome
    entries = chrome.get_log("browser")  # type: ignore[no-untyped-call]
    chrome.get("about:blank")
    # The page itself reports an unreachable daemon, and refused requests.
    faults = [e for e in entries if e["source"] != "network"]
    assert faults == []


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """Return a daemon with 120 tasks of two apps and two envs. Every tenth has failed."""
    daemon = Daemon(tmp_path_factory.mktemp("many"), "--command", "sh -c {action}")
    for n in range(1, 121):
        action = "false" if n % 10 == 0 else "true"
        number = daemon.run(f"app{n % 2}", ("staging", "production")[n % 3 == 0], action)
        assert number == n
    for n in range(1, 121):
        daemon.ended(n)
    yield daemon
    daemon.stop()
