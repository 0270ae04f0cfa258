"""The unit that is shipped, and sockets that systemd opens."""

import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from configparser import ConfigParser, SectionProxy
from pathlib import Path

import pytest

from tests.integration.conftest import Start
from tests.integration.refused import TWISTD, refusal

UNIT = Path(__file__).parents[2] / "systemd" / "pulsar-api.service"

# What would keep sudo from working in every task, directly or because it implies
# NoNewPrivileges (systemd.exec, of version 252).
NO_SUDO = (
    "DynamicUser LockPersonality MemoryDenyWriteExecute NoNewPrivileges PrivateDevices "
    "ProtectClock ProtectHostname ProtectKernelLogs ProtectKernelModules "
    "ProtectKernelTunables RestrictAddressFamilies RestrictNamespaces RestrictRealtime "
    "RestrictSUIDSGID SystemCallArchitectures SystemCallFilter SystemCallLog"
).split()

_ACTIVATED = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES="web")
os.execv(sys.argv[2], sys.argv[2:])
"""


@pytest.fixture(scope="module")
def unit() -> ConfigParser:
    """Return the unit; a setting that is given twice is an error."""
    parser = ConfigParser(
        delimiters=("=",), comment_prefixes=("#",), interpolation=None, strict=True
    )
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(UNIT.read_text())
    return parser


@pytest.fixture(scope="module")
def service(unit: ConfigParser) -> SectionProxy:
    """Return what is said about the process."""
    return unit["Service"]


@pytest.fixture
def wide() -> Iterator[socket.socket]:
    """Return a socket that everybody can reach, as a unit might open it."""
    with socket.socket() as sock:
        sock.bind(("0.0.0.0", 0))
        sock.listen()
        sock.set_inheritable(True)
        yield sock


@pytest.fixture
def near() -> Iterator[socket.socket]:
    """Return a socket that only this machine can reach."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        sock.set_inheritable(True)
        yield sock


def activated(sock: socket.socket) -> tuple[str, ...]:
    """Return what starts a program as systemd does for a socket, with the name "web"."""
    return (sys.executable, "-c", _ACTIVATED, str(sock.fileno()))


@pytest.mark.needs("systemd-analyze")
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    """No unknown setting, no wrong value; only the program has another place here."""
    copy = tmp_path / UNIT.name
    text = UNIT.read_text()
    assert text.count("ExecStart=/opt/pulsar-api/bin/twistd ") == 1
    copy.write_text(text.replace("/opt/pulsar-api/bin/twistd", TWISTD))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(copy)],
        capture_output=True,
        text=True,
        check=False,
    )
    # A machine's other units are looked at too, and are no business of ours.
    complaints = [line for line in done.stderr.splitlines() if "pulsar-api" in line]
    assert complaints == []
    assert done.returncode == 0, done.stderr


def test_what_the_unit_starts_serves(
    service: SectionProxy, start: Start, tmp_path: Path
) -> None:
    """The very command line of the unit, with a settings file of this test."""
    twistd, *options = shlex.split(service["ExecStart"])
    assert Path(twistd).is_absolute()
    assert Path(twistd).name == "twistd"
    assert options[-2:] == ["--config", "/etc/pulsar-api.toml"]
    config = tmp_path / "pulsar-api.toml"
    config.write_text("poll-timeout = 1\n")
    daemon = start(program=(TWISTD, *options[:-1], str(config)))
    assert daemon.get("/tasks/created").json() == {"changed": False}


def test_a_restart_of_the_unit_leaves_tasks_alone(service: SectionProxy) -> None:
    """Only the daemon is stopped, and nothing that tasks use is removed under them."""
    assert service["KillMode"] == "process"
    assert service["OOMPolicy"] == "continue"
    assert service.get("PrivateTmp", "no") == "no"
    assert "RuntimeDirectory" not in service
    assert service["StateDirectory"] == "pulsar-api"


def test_the_unit_runs_as_a_user_of_its_own(service: SectionProxy) -> None:
    """And what it keeps is for nobody else."""
    assert service["User"] == "pulsar-api"
    assert service["StateDirectoryMode"] == "0700"


def test_the_unit_is_started_again_if_it_fails_but_not_for_ever(
    unit: ConfigParser, service: SectionProxy
) -> None:
    """A refused start comes to an end before the limit's interval does."""
    assert service["Restart"] == "on-failure"
    tries = int(unit["Unit"]["StartLimitBurst"])
    assert tries * int(service["RestartSec"]) < int(unit["Unit"]["StartLimitIntervalSec"])


@pytest.mark.parametrize(
    "setting", ["ProtectHome", "ProtectSystem", "PrivateTmp", *NO_SUDO]
)
def test_the_unit_does_not_set_what_breaks_deployments(
    setting: str, service: SectionProxy
) -> None:
    """Keys are in the home, files go where they have to, sudo works."""
    assert setting not in service


def test_the_unit_says_why(service: SectionProxy) -> None:
    """What is unusual about it has a comment before it."""
    lines = UNIT.read_text().splitlines()
    for setting in ("Type", "KillMode", "OOMPolicy", "LimitNOFILE", "TasksMax"):
        assert setting in service
        place = lines.index(f"{setting}={service[setting]}")
        assert lines[place - 1].startswith("#"), setting


def test_a_socket_that_systemd_opened_is_served(start: Start, near: socket.socket) -> None:
    """So that no connection is refused while the daemon is restarted."""
    daemon = start(
        "--listen",
        "systemd:domain=INET:name=web",
        program=(*activated(near), TWISTD, "--nodaemon", "--pidfile=", "pulsar-api"),
    )
    assert daemon.port == near.getsockname()[1]
    assert daemon.get("/tasks").status == 200


def test_a_socket_that_everybody_reaches_is_refused(
    wide: socket.socket, tmp_path: Path
) -> None:
    """Who opened it makes no difference."""
    said = refusal(
        tmp_path,
        *("--listen", "systemd:domain=INET:name=web"),
        before=activated(wide),
        busy=wide.getsockname()[1],
    )
    assert said.startswith(
        "will not listen on 0.0.0.0: callers would not have to authenticate"
    )
