"""Daemons that end with the test that started them."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.daemon import SHELL, Daemon

Start = Callable[..., Daemon]


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """Return a configuration repository for the ``scripts`` preset, with no action yet."""
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
    """Return a function that starts a daemon with some options."""
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
    """Return a daemon that runs lines of shell, and comes back on the same port."""
    daemon = start("--command", SHELL, "--kill-grace=1")
    daemon.arguments[daemon.arguments.index("--port") + 1] = str(daemon.port)
    yield daemon
    assert "Traceback" not in daemon.log.read_text()
