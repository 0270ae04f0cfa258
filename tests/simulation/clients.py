"""Clients of a simulated daemon: they create tasks, retry, follow and kill."""

from collections.abc import Coroutine
from random import Random
from typing import TYPE_CHECKING, Any

from attrs import define
from twisted.internet.defer import Deferred

from pulsar_api.errors import (
    KeyInFlight,
    PulsarError,
    QueueFull,
    ShuttingDown,
    StoreUnavailable,
    UnknownTask,
)
from pulsar_api.tasks.model import TaskSnapshot, TaskSpec
from pulsar_api.tasks.service import TaskService
from tests.fakes import person
from tests.simulation.daemon import Broken
from tests.simulation.shims import ACTIONS

if TYPE_CHECKING:
    from tests.simulation.world import World

PATIENCE = 60.0
"""Seconds that a client waits for a response, far more than the daemon needs."""

POLL = 25.0
"""Seconds that a long-poll lasts."""

REFUSED = (KeyInFlight, QueueFull, ShuttingDown, StoreUnavailable)


@define(eq=False)
class Request:
    """A task that a client wants. Its ``ref`` is unique."""

    ref: str
    spec: TaskSpec
    key: str | None
    first: float | None = None
    """When it was sent for the first time, by the true clock of the world."""
    unsure: bool = False
    """Whether the daemon may have accepted it without the client knowing."""
    accepted: int | None = None
    """The number of its task."""


class Client:
    """One client. The seed decides what it does."""

    def __init__(self, world: "World", number: int) -> None:
        self.world = world
        self.number = number
        self._busy = 0
        self._rng = Random(world.plan.seed * 7919 + number * 104_729 + 17)
        self._requests = 0

    @property
    def done(self) -> bool:
        """Whether all its requests are served."""
        return self._busy == 0

    def start(self) -> None:
        """Begin to send requests."""
        self._also(self._run())

    def _also(self, work: Coroutine[Deferred[Any], Any, None]) -> None:
        """Do something at the same time as the rest."""
        self._busy += 1
        Deferred.fromCoroutine(work).addBoth(self._ended)

    def _ended(self, failure: object) -> None:
        self._busy -= 1
        if failure is not None:
            self.world.violated("clients understand all responses", str(failure))

    def _sleep(self, seconds: float) -> Deferred[None]:
        done: Deferred[None] = Deferred()
        self.world.scheduler.after(seconds, done.callback, None)
        return done

    async def _run(self) -> None:
        rng = self._rng
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            await self._sleep(rng.choice((0.0, 0.01, 0.1, 1.0, 5.0)) * rng.random())
            request = self._request()
            if request.key is not None and rng.random() < 0.15:
                self._also(self._repeat(request, 0.0))
            task_id = await self._post(request)
            if task_id is None:
                continue
            if rng.random() < 0.3:
                self._also(self._kill(task_id, rng.choice((0.0, 0.1, 1.0, 8.0))))
            if request.key is not None and rng.random() < 0.5:
                self._also(self._repeat(request, rng.choice((0.01, 1.0, 10.0, 40.0))))
            if rng.random() < 0.7:
                await self._follow(task_id)

    def _request(self) -> Request:
        rng = self._rng
        self._requests += 1
        ref = f"{self.number}-{self._requests}"
        variables = {"ref": ref}
        if rng.random() < 0.4:
            variables["password"] = f"secret {ref}"
        env = rng.choice(("production", "production", "staging"))
        spec = TaskSpec("shop", env, rng.choice(ACTIONS), variables, person("alice"))
        key = f"key {ref}" if rng.random() < 0.7 else None
        request = Request(ref, spec, key)
        self.world.tell("wanted", request)
        return request

    async def _post(self, request: Request) -> int | None:
        """Ask for a task until the client knows whether it was created."""
        world = self.world

        async def create(service: TaskService) -> TaskSnapshot:
            return (await service.create(request.spec, request.key)).snapshot

        for attempt in range(200):
            if request.first is None:
                request.first = world.real()
            try:
                found = await world.call(create, PATIENCE)
            except REFUSED as e:
                world.log("client {} is refused: {}", self.number, e)
            except Broken:
                request.unsure = True
                if request.key is None:
                    return None
            else:
                world.log("client {} gets task {}", self.number, found.id)
                request.accepted = found.id
                world.tell("accepted", request, found)
                self._told(found, 0)
                return found.id  # type: ignore[no-any-return]
            pause = min(0.1 * 2**attempt, 20.0)
            await self._sleep(pause * self._rng.uniform(0.2, 1.0))
        world.violated("nothing waits for ever", f"{request} is never accepted")
        return None

    async def _repeat(self, request: Request, pause: float) -> None:
        """Send the same request again, as a proxy may do."""
        await self._sleep(pause)
        await self._post(request)

    async def _kill(self, task_id: int, pause: float) -> None:
        await self._sleep(pause)
        by = person(f"client {self.number}")

        async def kill(service: TaskService) -> TaskSnapshot:
            return (await service.kill(task_id, by)).snapshot

        for _ in range(200):
            floor = self.world.seen.get(task_id, 0)
            try:
                found = await self.world.call(kill, PATIENCE)
            except (Broken, PulsarError):
                await self._sleep(1.0)
            else:
                self.world.tell("kill_accepted", found)
                self._told(found, floor)
                return

    async def _follow(self, task_id: int) -> None:
        """Follow a task until it has ended."""
        seen = -1

        async def poll(service: TaskService) -> TaskSnapshot:
            task = await service.find(task_id)
            task.refresh()
            clock = service._clock
            await task.changes.after(seen).addTimeout(POLL, clock, lambda *_: 0)
            task.refresh()
            return task.snapshot

        while True:
            floor = self.world.seen.get(task_id, 0)
            try:
                found: TaskSnapshot = await self.world.call(poll, PATIENCE)
            except UnknownTask:
                self.world.tell("missing", task_id)
                return
            except (Broken, PulsarError):
                await self._sleep(self._rng.choice((0.1, 1.0, 3.0)))
                continue
            self._told(found, floor)
            seen = found.version
            if found.status.ended:
                return

    def _told(self, found: TaskSnapshot, floor: int) -> None:
        self.world.log(
            "client {} is told: {} {} {}",
            *(self.number, found.id, found.status, found.version),
        )
        self.world.tell("told", found, floor)
        self.world.seen[found.id] = max(self.world.seen.get(found.id, 0), found.version)
