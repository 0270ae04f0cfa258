"""Runs commands, each below a shim of its own, and follows those of an earlier daemon."""

import re
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from functools import partial
from pathlib import Path

from attrs import field, frozen
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from pulsar_api.execution import cgroups
from pulsar_api.execution.adopted_run import AdoptedRun
from pulsar_api.execution.local_machine import LocalMachine
from pulsar_api.execution.machine import Machine
from pulsar_api.execution.permits import Permits
from pulsar_api.execution.results import not_started
from pulsar_api.execution.secret_files import SecretFiles
from pulsar_api.execution.shim_protocol import ShimProtocol
from pulsar_api.execution.spec import encoded_spec
from pulsar_api.execution.task_files import KILL, LOCK, NOTHING, SPEC, alive, unavailable
from pulsar_api.output.files import folder_of
from pulsar_api.principal import Principal
from pulsar_api.tasks.interfaces import Bounds, Run, Secrets, Sink
from pulsar_api.tasks.model import Command, Limits, Process

_log = Logger()

_NUMBER = re.compile(r"[1-9][0-9]{0,14}")
"""The name of a task's folder."""

_LONGEST_NAME = 1024
"""Bytes of the name of the caller that asked for a kill, at most."""


def end_all(state: Path) -> list[int]:
    """Send TERM to the shim of every running task, and return the numbers of the tasks.

    For an operator who has stopped the daemon. Each shim ends the process tree of its task
    and keeps the result for the next daemon.
    """
    machine = LocalMachine(None)
    tasks = state / "tasks"
    folders = [f for f in tasks.glob("[0-9]*") if _NUMBER.fullmatch(f.name)]
    found = sorted(int(folder.name) for folder in folders if _runs(machine, folder))
    for number in found:
        machine.terminate(folder_of(tasks, number))
    return found


def _runs(machine: Machine, folder: Path) -> bool:
    with suppress(OSError):  # a task that cannot be read must not hide the others
        return alive(machine, folder) > 0
    return False


@frozen
class ShimExecutor:
    """An `Executor` that runs each command below a shim, in a folder per task."""

    _machine: Machine
    _clock: IReactorTime
    _tasks: Path
    _new_name: Callable[[], str]
    """Returns a name that nobody can guess and that never comes again."""
    _umask: int = 0o022
    _files: int = 0
    """The soft limit of open files that commands get; 0: that of the daemon."""
    _permits: Permits = field(init=False)
    _secrets: SecretFiles = field(init=False)

    @_permits.default
    def _make_permits(self) -> Permits:
        return Permits(self._machine, self._tasks, self._new_name)

    @_secrets.default
    def _make_secrets(self) -> SecretFiles:
        return SecretFiles(self._machine, self._tasks, self._new_name)

    def _folder(self, task_id: int) -> Path:
        return folder_of(self._tasks, task_id)

    def check(self) -> None:
        """Raise `StoreUnavailable` if the disk is full or the folder cannot be used."""
        self._machine.check_room(self._tasks)

    # -- permits

    def place(self) -> str:
        """Return what tells the folders of this executor from copies of them."""
        return self._permits.place()

    def permit(self, task_id: int) -> Deferred[str]:
        """Permit the start of a task; see `Permits.give`."""
        return self._permits.give(task_id)

    def permitted(self) -> Deferred[AbstractSet[int]]:
        """Fire with the numbers of all tasks that were ever permitted to start."""
        return self._permits.given()

    def is_here(self, task_id: int) -> bool:
        """Return whether the permit of a run, used or not, is of this boot and folder."""
        try:
            return self._permits.is_here(task_id)
        except OSError:
            return False

    # -- runs

    def start(
        self,
        task_id: int,
        command: Command,
        bounds: Bounds,
        sink: Sink,
        permit: str | None = None,
    ) -> Run:
        """Start a command and return its run. Every error is reported to the sink."""
        folder = self._folder(task_id)
        cgroup = _cgroup(task_id, permit)
        run = ShimProtocol(self._machine, self._clock, folder, bounds, sink, cgroup=cgroup)
        try:
            limits = () if command.account is None else command.account.limits
            place = self._machine.make_cgroup(cgroup, limits)
            if command.secret_file is not None:
                self._secrets.hand_over(task_id, command.secret_file)
            self._write_spec(folder, command, bounds, place, limits)
            self._machine.spawn(run, folder)
        except OSError as e:
            run.end(not_started(e, folder))
        return run

    def _write_spec(
        self,
        folder: Path,
        command: Command,
        bounds: Bounds,
        cgroup: str = "",
        limits: Limits = (),
    ) -> None:
        data = encoded_spec(
            folder,
            command,
            bounds,
            umask=self._umask,
            files=self._files,
            cgroup=cgroup,
            limits=limits,
        )
        # A shim that comes late, from before a restart, must not read half of it.
        temporary = folder / f"{SPEC}.tmp"
        self._machine.write(temporary, data)
        self._machine.rename(temporary, folder / SPEC)

    def adopt(self, task_id: int, permit: str | None, bounds: Bounds, sink: Sink) -> Run:
        """Follow a run that another daemon started, or report how it ended."""
        return AdoptedRun(
            self._machine,
            self._clock,
            self._folder(task_id),
            bounds,
            sink,
            partial(self._permits.is_valid, task_id, permit),
            partial(self._permits.is_here, task_id),
            cgroup=_cgroup(task_id, permit),
        )

    def cgroup(self, task_id: int) -> str:
        """Return the name of a run's cgroup, or "" if the run's folder does not tell it."""
        return _cgroup(task_id, self._permits.name_of(task_id))

    def prevent_start(self, task_id: int) -> bool:
        """Make sure that no shim begins with this task; return False if one has.

        Raises `StoreUnavailable` if that cannot be done now.
        """
        lock = self._folder(task_id) / LOCK
        try:
            return self._machine.claim(lock)
        except NOTHING:
            return True
        except OSError as e:
            raise unavailable(lock, e) from None

    def living(self, processes: Sequence[Process]) -> Deferred[tuple[Process, ...]]:
        """Fire with those of the processes that still run, and all that runs below them."""
        return self._machine.living(processes)

    def note_kill(self, task_id: int, by: Principal) -> None:
        """Leave a note for the next daemon that a kill was asked for."""
        folder = self._folder(task_id)
        try:
            self._machine.make_folder(folder)
            self._machine.write(folder / KILL, f"{by.name}\n{by.key}".encode())
            self._machine.sync(folder / KILL)
            self._machine.sync(folder)
        except OSError as e:
            _log.error("The kill of task {id} cannot be noted: {e}", id=task_id, e=e)

    def noted_kill(self, task_id: int) -> Principal | None:
        """Return who asked an earlier daemon for a kill that it could only note."""
        with suppress(OSError):
            data = self._machine.read(self._folder(task_id) / KILL)[:_LONGEST_NAME]
            name, line, key = data.decode("utf-8", "replace").partition("\n")
            return Principal.from_key(key if line else None, name)
        return None

    # -- folders

    def forget(self, task_ids: Sequence[int]) -> Deferred[None]:
        """Remove the folders of ended runs, in a thread, as large files take time."""
        machine = self._machine

        def remove() -> None:
            for task_id in task_ids:
                folder = self._folder(task_id)
                # What cannot be removed now is removed at the next start. Folders may be
                # nested too deep for `shutil.rmtree`.
                with suppress(OSError, RecursionError):
                    if not alive(machine, folder):
                        # A shim that comes late must not find the spec without the lock.
                        with suppress(OSError):
                            machine.remove(folder / SPEC)
                        machine.remove_folder(folder)

        return machine.in_thread(remove)

    def kept(self) -> Deferred[list[int]]:
        """Fire with the numbers of the tasks that have a folder, lowest first."""

        def look() -> list[int]:
            try:
                names = self._machine.names(self._tasks)
            except FileNotFoundError:
                return []
            # Other names are not ours; a number that is too large would use up all numbers.
            return sorted(int(n) for n in names if _NUMBER.fullmatch(n))

        return self._machine.in_thread(look)

    # -- secrets

    def keep_secrets(
        self, secrets: Mapping[str, str], name: str | None = None
    ) -> Deferred[str]:
        """Keep the secrets of a task that waits; see `SecretFiles.keep`."""
        return self._secrets.keep(secrets, name)

    def secrets(self, task_id: int, name: str | None) -> Deferred[Secrets | None]:
        """Fire with the secrets of a task, or None; see `SecretFiles.read`."""
        return self._secrets.read(task_id, name)

    def forget_secrets(self, task_id: int, name: str | None) -> None:
        """Remove the secrets of a task that will not start any more."""
        self._secrets.forget(task_id, name)

    def forget_all_secrets(self, task_ids: Sequence[int]) -> Deferred[None]:
        """Remove the files with secrets in the folders of ended runs."""
        return self._secrets.forget_all(task_ids)

    def forget_other_secrets(self, names: AbstractSet[str]) -> Deferred[None]:
        """Remove all files of secrets but those with these names."""
        return self._secrets.forget_others(names)


def _cgroup(task_id: int, permit: str | None) -> str:
    """Return the name of a run's cgroup, or "" if its permit is not known."""
    return "" if permit is None else cgroups.name(task_id, permit)
