"""Fixes that can be taken out of the core, to show that the simulation needs each."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from attrs import evolve
from twisted.internet.defer import Deferred, succeed

from pulsar_api.execution.executor import ShimExecutor
from pulsar_api.execution.permits import Permits
from pulsar_api.output.files import folder_of
from pulsar_api.principal import Principal
from pulsar_api.tasks import service
from pulsar_api.tasks.clock import SteadyClock
from pulsar_api.tasks.interfaces import NewTask
from pulsar_api.tasks.live import LiveTask
from pulsar_api.tasks.model import Exit, TaskSnapshot
from pulsar_api.tasks.recorder import Recorder
from pulsar_api.tasks.service import TaskService
from tests import fakes
from tests.simulation.machine import SimulatedMachine
from tests.simulation.shims import Shim
from tests.simulation.store import SimulatedStore


@contextmanager
def _patched(owner: object, name: str, value: object) -> Iterator[None]:
    old = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, old)


@contextmanager
def no_boot() -> Iterator[None]:
    """A1: a permit stays valid after a boot, and a shim does not sync its lock."""
    text = Permits._text

    def without_boot(permits: Permits, folder: Path) -> bytes:
        return text(permits, folder).partition(b"\n")[2]

    with (
        _patched(Permits, "_text", without_boot),
        _patched(Shim, "syncs", False),
    ):
        yield


@contextmanager
def no_folders() -> Iterator[None]:
    """A2: a permit is valid for any folder, and a missing folder counts as unused."""

    def is_valid(permits: Permits, task_id: int, permit: str | None) -> bool:
        permits._machine.make_folder(permits._tasks)
        permits._machine.make_folder(folder_of(permits._tasks, task_id))
        boot = f"boot {permits._machine.boot_id()}\n"
        return permit is not None and permit.startswith(boot)

    with _patched(Permits, "is_valid", is_valid):
        yield


@contextmanager
def secrets_last() -> Iterator[None]:
    """A8: secrets are stored after the record of their task, and a retry has none."""
    keep, create = ShimExecutor.keep_secrets, SimulatedStore.create
    later: dict[str, tuple[ShimExecutor, Mapping[str, str]]] = {}

    def keep_later(
        executor: ShimExecutor, secrets: Mapping[str, str], name: str | None = None
    ) -> Deferred[str]:
        name = executor._new_name()
        later[name] = executor, secrets
        return succeed(name)

    def create_first(store: SimulatedStore, new: NewTask) -> Deferred[TaskSnapshot]:
        def and_keep(made: TaskSnapshot) -> Deferred[TaskSnapshot]:
            assert new.secret_file is not None
            executor, secrets = later.pop(new.secret_file)
            kept: Deferred[Any] = keep(executor, secrets, new.secret_file)
            return kept.addCallback(lambda _: made)

        made = create(store, new)
        return made if new.secret_file is None else made.addCallback(and_keep)

    async def supply(*_: object) -> None:
        pass

    with (
        _patched(ShimExecutor, "keep_secrets", keep_later),
        _patched(SimulatedStore, "create", create_first),
        _patched(TaskService, "_supply", supply),
    ):
        yield


@contextmanager
def wall_clock() -> Iterator[None]:
    """A9: keys and tasks expire by the wall clock."""
    with _patched(SteadyClock, "steady", SteadyClock.wall):
        yield


@contextmanager
def endless_stop() -> Iterator[None]:
    """A10: a stop waits for records without limit."""
    with _patched(service, "LEAVE", 1e9):
        yield


@contextmanager
def no_jump() -> Iterator[None]:
    """After a restart versions continue from the record, without a jump."""
    with _patched(fakes, "RESTART", 1):
        yield


@contextmanager
def start_not_prevented() -> Iterator[None]:
    """A killed task that has not begun is reported killed while its shim can begin."""
    with _patched(ShimExecutor, "prevent_start", lambda *_: True):
        yield


@contextmanager
def free_targets() -> Iterator[None]:
    """A task gives its target back although its processes survived a kill."""
    ran = LiveTask.ran

    def forget(live: LiveTask, exit: Exit, **more: Any) -> None:
        ran(live, evolve(exit, left=()), **{**more, "held": False})

    with _patched(LiveTask, "ran", forget):
        yield


@contextmanager
def keys_at_once() -> Iterator[None]:
    """Two requests with one key can be in progress at once."""

    class Forgetful(set[tuple[Principal | None, str]]):
        def __contains__(self, _: object) -> bool:
            return False

    init = TaskService.__attrs_post_init__

    def post_init(service: TaskService) -> None:
        init(service)
        service._keys = Forgetful()

    with _patched(TaskService, "__attrs_post_init__", post_init):
        yield


@contextmanager
def told_early() -> Iterator[None]:
    """A change is announced before it is on record."""

    async def record(recorder: Recorder, live: LiveTask) -> None:
        live.task.announce(live.newest)
        await recorder.save(live)

    with _patched(Recorder, "record", record):
        yield


@contextmanager
def left_alive() -> Iterator[None]:
    """The processes of a lost task are not killed."""

    def end(*_: object, **__: object) -> Deferred[Any]:
        return succeed(())

    with _patched(SimulatedMachine, "end", end):
        yield


Mutation = Callable[[], AbstractContextManager[None]]

MUTATIONS: dict[str, Mutation] = {
    "A1": no_boot,
    "A2": no_folders,
    "A8": secrets_last,
    "A9": wall_clock,
    "A10": endless_stop,
    "versions": no_jump,
    "prevent": start_not_prevented,
    "held": free_targets,
    "keys": keys_at_once,
    "told": told_early,
    "left": left_alive,
}
