"""Tests of the parts of a daemon: how they are built."""

import os
from pathlib import Path

import pytest
from twisted.internet.task import Clock

from pulsar_api.config.settings import Settings
from pulsar_api.daemon import running
from pulsar_api.daemon.preflight import make_commands
from pulsar_api.daemon.running import Given, build
from pulsar_api.daemon.state import lock
from pulsar_api.execution import cgroups, processes
from pulsar_api.execution.local_machine import LocalMachine


class FakeLauncher:
    """Notes what it is told."""

    def __init__(self, *_: object) -> None:
        self.told: list[str] = []
        LAUNCHERS.append(self)

    def start(self) -> None:
        self.told.append("start")

    def stop(self) -> None:
        self.told.append("stop")


LAUNCHERS: list[FakeLauncher] = []


def fail(*_: object) -> None:
    raise OSError("a broken disk")


def test_a_daemon_that_cannot_be_built_leaves_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one must be able to use the state while this one is still ending."""
    monkeypatch.setattr(processes, "become_subreaper", lambda: None)
    monkeypatch.setattr(cgroups, "delegated", lambda: None)
    monkeypatch.setattr(running, "Launcher", FakeLauncher)
    monkeypatch.setattr(LocalMachine, "sync", fail)
    settings = Settings(port=0, state_dir=str(tmp_path), command="pulsar-0.3")
    given = Given(make_commands(settings, {}), 0o022, 0, frozenset)
    with pytest.raises(OSError, match="broken"):
        build(Clock(), settings, given, lock(tmp_path))
    assert LAUNCHERS.pop().told == ["start", "stop"]
    os.close(lock(tmp_path))
