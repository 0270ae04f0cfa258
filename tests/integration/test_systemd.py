"""Tests of the shipped unit, and of sockets that systemd opens."""

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
    """Return the section ``Service`` of the unit."""
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
    """All settings and values are valid. Only the path of the program differs here."""
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
    # systemd also checks other units of the machine, which do not matter here.
    complaints = [line for line in done.stderr.splitlines() if "pulsar-api" in line]
    assert complaints == []
    assert done.returncode == 0, done.stderr


def test_the_command_line_of_the_unit_starts_a_daemon(
    service: SectionProxy, start: Start, tmp_path: Path
) -> None:
    """Only the settings file is that of the test."""
    twistd, *options = shlex.split(service["ExecStart"])
    assert Path(twistd).is_absolute()
    assert Path(twistd).name == "twistd"
    assert options[-2:] == ["--config", "/etc/pulsar-api.toml"]
    config = tmp_path / "pulsar-api.toml"
    config.write_text("poll-timeout = 1\n")
    daemon = start(program=(TWISTD, *options[:-1], str(config)))
    assert daemon.get("/tasks/created").json() == {"changed": False}


def test_a_restart_of_the_unit_keeps_tasks_running(service: SectionProxy) -> None:
    """Only the daemon is stopped, and no folder that tasks use is removed."""
    assert service["KillMode"] == "process"
    assert service["OOMPolicy"] == "continue"
    assert service.get("PrivateTmp", "no") == "no"
    assert "RuntimeDirectory" not in service
    assert service["StateDirectory"] == "pulsar-api"


def test_the_unit_runs_as_a_user_of_its_own(service: SectionProxy) -> None:
    """Other users cannot read its state."""
    assert service["User"] == "pulsar-api"
    assert service["StateDirectoryMode"] == "0700"


def test_the_unit_restarts_after_failures_a_limited_number_of_times(
    unit: ConfigParser, service: SectionProxy
) -> None:
    """A refused start reaches the limit within the interval."""
    assert service["Restart"] == "on-failure"
    tries = int(unit["Unit"]["StartLimitBurst"])
    assert tries * int(service["RestartSec"]) < int(unit["Unit"]["StartLimitIntervalSec"])


@pytest.mark.parametrize(
    "setting", ["ProtectHome", "ProtectSystem", "PrivateTmp", *NO_SUDO]
)
def test_the_unit_has_no_setting_that_breaks_deployments(
    setting: str, service: SectionProxy
) -> None:
    """Deployments need keys in the home, write to any place and call sudo."""
    assert setting not in service


def test_the_unit_explains_unusual_settings(service: SectionProxy) -> None:
    """Each has a comment before it."""
    lines = UNIT.read_text().splitlines()
    for setting in ("Type", "KillMode", "OOMPolicy", "LimitNOFILE", "TasksMax"):
        assert setting in service
        place = lines.index(f"{setting}={service[setting]}")
        assert lines[place - 1].startswith("#"), setting


def test_a_socket_that_systemd_opened_is_served(start: Start, near: socket.socket) -> None:
    """No connection is refused while the daemon restarts."""
    daemon = start(
        "--listen",
        "systemd:domain=INET:name=web",
        program=(*activated(near), TWISTD, "--nodaemon", "--pidfile=", "pulsar-api"),
    )
    assert daemon.port == near.getsockname()[1]
    assert daemon.get("/tasks").status == 200


def test_a_public_socket_of_systemd_is_refused(wide: socket.socket, tmp_path: Path) -> None:
    """It is treated like one that the daemon opens."""
    said = refusal(
        tmp_path,
        *("--listen", "systemd:domain=INET:name=web"),
        before=activated(wide),
        busy=wide.getsockname()[1],
    )
    assert said.startswith(
        "will not listen on 0.0.0.0: callers would not have to authenticate"
    )
