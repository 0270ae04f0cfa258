"""Tests of the entries in the audit log about tasks."""

from pathlib import Path
from typing import Any

import pytest
from attrs import define, field
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from pulsar_api.auth.audit import VISITS, AuditLog
from pulsar_api.auth.guard import Guard
from pulsar_api.auth.rights import Caller, Right
from pulsar_api.tasks.commands import Commands
from pulsar_api.tasks.interfaces import Bounds
from pulsar_api.tasks.presets import Template
from pulsar_api.tasks.queue import Limits
from pulsar_api.tasks.service import TaskService
from tests.fakes import FakeExecutor, MemoryStore, person, steady_clock

CASE = SynchronousTestCase()


@define(eq=False)
class World:
    """The tasks of joe, with a fake executor."""

    folder: Path
    clock: Clock = field(factory=Clock)
    executor: FakeExecutor = field(init=False)
    log: AuditLog = field(init=False)
    tasks: Guard = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.executor = FakeExecutor(self.clock)
        self.log = AuditLog(self.folder / "audit.log", self.clock.seconds)
        limits = Limits(Bounds(10))
        service = TaskService(
            MemoryStore(),
            self.executor,
            self.clock,
            steady_clock(self.clock),
            self.commands,
            limits,
        )
        CASE.successResultOf(Deferred.fromCoroutine(service.start()))
        joe = Caller(person("joe"), "192.0.2.1", "static")
        self.tasks = Guard(service, joe, Right.KILL, self.log)

    async def commands(self) -> Commands:
        """Return the command."""
        return Commands(Template(("true",)), {})

    def run(self, key: str | None = None) -> int:
        """Create a task and return its number."""
        asked = self.tasks.create("site", "prod", "deploy", {}, frozenset(), key)
        found: int = CASE.successResultOf(Deferred.fromCoroutine(asked)).snapshot.id
        return found

    def kill(self, number: int) -> None:
        """Kill a task."""
        CASE.successResultOf(Deferred.fromCoroutine(self.tasks.kill(number)))

    def lines(self, name: str) -> int:
        """Return how many lines a file has."""
        path = self.folder / name
        return len(path.read_bytes().splitlines()) if path.exists() else 0


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Return a new world."""
    return World(tmp_path)


def entries(world: World) -> list[tuple[Any, ...]]:
    """Return the entries of the log."""
    return [(entry["what"], entry.get("task")) for entry in world.log.read()]


def test_requests_without_effect_are_not_logged_as_actions(world: World) -> None:
    """These are a retry with the same key, and kills of killed or ended tasks."""
    first = world.run("a key")
    second = world.run()
    world.executor.run(second).deaf = True
    world.kill(second)
    assert world.lines("audit.log") == 3
    for _ in range(VISITS):
        assert world.run("a key") == first
        world.kill(second)
    world.executor.run(first).end(0)
    world.kill(first)
    assert world.lines("audit.log") == 3
    assert world.lines("audit-access.log") == VISITS
    assert entries(world)[:3] == [("kill", first), ("kill", second), ("kill", second)]
