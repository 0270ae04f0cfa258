"""Runs commands, each below a shim of its own, and follows those of an earlier daemon."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from functools import partial
from pathlib import Path

from attrs import field, frozen
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import (
    IReactorTime,
)
from twisted.logger import Logger

from pulsar_api.errors import FolderInUse, StoreUnavailable
from pulsar_api.execution import cgroups, orphans
from pulsar_api.execution.local_machine import LocalMachine
from pulsar_api.execution.machine import Identity, Machine
from pulsar_api.execution.programs import LIBRARY
from pulsar_api.execution.runs import (
    BEGUN,
    NOTHING,
    AdoptedRun,
    ShimProtocol,
    alive,
    not_started,
)
from pulsar_api.files import Damaged
from pulsar_api.principal import Principal
from pulsar_api.shim import masker, shim
from pulsar_api.tasks import secret_forms
from pulsar_api.tasks.interfaces import Bounds, Run, Secrets, Sink
from pulsar_api.tasks.model import Command, Limits, Process

_log = Logger()


def end_all(state: Path) -> list[int]:
    """Send TERM to the shim of every task that runs; return their numbers.

    For an operator who has stopped the daemon; each shim then ends its task's tree and
    keeps the result for the next daemon.
    """
    machine = LocalMachine(None)
    folders = [f for f in (state / "tasks").glob("[0-9]*") if _NUMBER.fullmatch(f.name)]
    found = sorted(int(folder.name) for folder in folders if _runs(machine, folder))
    for number in found:
        machine.terminate(state / "tasks" / str(number))
    return found


def _runs(machine: Machine, folder: Path) -> bool:
    with suppress(OSError):  # what cannot be read hides no other task
        return alive(machine, folder) > 0
    return False


SECRET = ("secrets", "secrets.tmp", "spec", "spec.tmp")
"""Files in a task's folder that may hold secrets."""

PERMIT = "start"
"""The file in a task's folder that allows a shim to begin."""

USED = "begun"
"""The name that a shim gives to the permit under which it begins."""


_NUMBER = re.compile(r"[1-9][0-9]{0,14}")
"""The name of a task's folder."""

_WHO = 1024
"""Bytes of the name of who asked for a kill, at most."""


@frozen
class ShimExecutor:
    """Runs each command below a shim, in a folder per task."""

    _machine: Machine
    _clock: IReactorTime
    _tasks: Path
    _new_name: Callable[[], str]
    """Returns a name that nobody can guess and that never comes again."""
    _umask: int = 0o022
    _files: int = 0
    """The soft limit of open files that commands get; 0: the daemon's."""
    _listed: set[int] = field(factory=set, init=False)
    """The inode of the list of permits that is known to be in its folder on disk."""
    _appended: list[Identity] = field(factory=list, init=False)
    """What the list of permits was after the newest permit of this daemon."""

    @property
    def _permits(self) -> Path:
        return self._tasks.parent / "permits"

    @property
    def _secrets(self) -> Path:
        return self._tasks.parent / "secrets"

    def check(self) -> None:
        """Raise `StoreUnavailable` if there is no room, or the folder is no use."""
        self._machine.check_room(self._tasks)

    def place(self) -> str:
        """Return what tells the folders of this executor from copies of them."""
        state = self._machine.identity(self._tasks.parent)
        tasks = self._machine.identity(self._tasks)
        try:
            # Not what it is in the middle of an `append`, which another thread may be in.
            known = self._appended or [self._machine.identity(self._permits)]
            permits = known[-1]
            last = f"{permits.inode} {permits.size} {permits.changed}"
        except FileNotFoundError:
            last = "0 0 0"
        return f"{state.device} {state.inode} {tasks.inode} {last}"

    def permit(self, task_id: int) -> Deferred[str]:
        """Allow the start of a task; fires with a name for this permit."""
        machine, folder = self._machine, self._tasks / str(task_id)

        def make() -> str:
            try:
                machine.make_folder(folder)
                if (BEGUN | {"lock", "exit"}) & set(machine.names(folder)):
                    raise FolderInUse(task_id)
                text = self._permitted(folder)
                machine.write(folder / PERMIT, text)
                # Not its folder: if a power cut takes that, the list still has the number.
                machine.sync(folder / PERMIT)
                # Last: whoever finds the number, but no folder, knows that it was removed.
                self._appended[:] = [machine.append(self._permits, b"\n%019d\n" % task_id)]
                self._sync_list()
                return self._permit_name(folder, text)
            except OSError as e:
                raise _unavailable(folder, e) from None

        return machine.in_thread(make)

    def _sync_list(self) -> None:
        """Wait until the list of permits, which may be new, is in its folder on disk."""
        inode = self._machine.identity(self._permits).inode
        if inode not in self._listed:
            self._machine.sync(self._permits.parent)
            self._listed.add(inode)

    def permitted(self) -> Deferred[AbstractSet[int]]:
        """Fire with the numbers of all tasks that were ever allowed to start.

        Of very many the newest ones.
        """

        def read() -> AbstractSet[int]:
            try:
                lines = self._machine.read(self._permits, tail=True).split(b"\n")
            except FileNotFoundError:
                return frozenset()
            except Damaged as e:
                # As if it had been removed: tasks that wait are lost, see `Reading`.
                aside = self._permits.with_name(f"permits.{self._new_name()}")
                _log.error("{e}; it is now {aside}", e=e, aside=aside)
                self._machine.rename(self._permits, aside)
                return frozenset()
            except OSError as e:
                raise _unavailable(self._permits, e) from None
            # A line that was not written whole was not told to anybody.
            return {int(line) for line in lines if len(line) == 19 and line.isdigit()}

        return self._machine.in_thread(read)

    def _permitted(self, folder: Path) -> bytes:
        """Return what a permit says that is given now."""
        lines = [f"boot {self._machine.boot_id()}"]
        for name, path in (("state", self._tasks.parent), ("folder", folder)):
            found = self._machine.identity(path)
            lines.append(f"{name} {found.device} {found.inode}")
        return "".join(f"{line}\n" for line in lines).encode()

    def _permit_name(self, folder: Path, text: bytes, name: str = PERMIT) -> str:
        # The time of its last change cannot be copied with the file: it tells a folder
        # that was restored even if it got the very inodes of the old one.
        found = self._machine.identity(folder / name)
        return f"{text.decode()}permit {found.inode} {found.changed}"

    def _is_valid(self, folder: Path, permit: str | None) -> bool:
        """Return whether a permit is unused, of this boot and of this very folder."""
        try:
            text = self._machine.read(folder / PERMIT)
            return text == self._permitted(folder) and permit == self._permit_name(
                folder, text
            )
        except (*NOTHING, Damaged):
            return False

    def _is_here(self, folder: Path) -> bool:
        """Return whether a folder, copied or not, is in use where and when it was made."""
        for name in (USED, PERMIT):
            with suppress(*NOTHING, Damaged):
                return self._machine.read(folder / name) == self._permitted(folder)
        return False

    def is_here(self, task_id: int) -> bool:
        """Return whether the permit of a run, used or not, is of this boot and folder."""
        try:
            return self._is_here(self._tasks / str(task_id))
        except OSError:
            return False

    def start(
        self,
        task_id: int,
        command: Command,
        bounds: Bounds,
        sink: Sink,
        permit: str | None = None,
    ) -> Run:
        """Start a command. Whatever goes wrong is told to the sink, as an end."""
        folder = self._tasks / str(task_id)
        cgroup = _cgroup(task_id, permit)
        run = ShimProtocol(self._machine, self._clock, folder, bounds, sink, cgroup=cgroup)
        try:
            limits = () if command.account is None else command.account.limits
            place = self._machine.make_cgroup(cgroup, limits)
            self._take_secrets(folder, command)
            self._write_spec(folder, command, bounds, place, limits)
            self._machine.spawn(run, folder)
        except OSError as e:
            run.end(not_started(e, folder))
        return run

    def _take_secrets(self, folder: Path, command: Command) -> None:
        """Move the file of the secrets to where the shim removes it."""
        if command.secret_file is not None:
            with suppress(FileNotFoundError):
                old = self._secrets / command.secret_file
                self._machine.rename(old, folder / "secrets")

    def adopt(self, task_id: int, permit: str | None, bounds: Bounds, sink: Sink) -> Run:
        """Follow a run that another daemon started, or say how it ended."""
        folder = self._tasks / str(task_id)
        valid = partial(self._is_valid, folder, permit)
        here = partial(self._is_here, folder)
        return AdoptedRun(
            *(self._machine, self._clock, folder, bounds, sink, valid, here),
            cgroup=_cgroup(task_id, permit),
        )

    def cgroup(self, task_id: int) -> str:
        """Return the name of a run's cgroup, "" if the run's folder does not tell it."""
        folder = self._tasks / str(task_id)
        for name in (USED, PERMIT):
            with suppress(OSError):
                text = self._machine.read(folder / name)
                return cgroups.name(task_id, self._permit_name(folder, text, name))
        return ""

    def prevent_start(self, task_id: int) -> bool:
        """Make sure that no shim begins with this task; False: one has."""
        lock = self._tasks / str(task_id) / "lock"
        try:
            return self._machine.claim(lock)
        except NOTHING:
            return True
        except OSError as e:
            raise _unavailable(lock, e) from None

    def living(self, processes: Sequence[Process]) -> Deferred[tuple[Process, ...]]:
        """Fire with those of the processes, and what is below them, that still run."""
        return self._machine.living(processes)

    def forget(self, task_ids: Sequence[int]) -> Deferred[None]:
        """Remove the folders of ended runs, in a thread: a large file takes its time."""
        machine = self._machine

        def remove() -> None:
            for task_id in task_ids:
                folder = self._tasks / str(task_id)
                # What cannot be removed now is at the next start; folders may be in too
                # deep for `shutil.rmtree`.
                with suppress(OSError, RecursionError):
                    if not alive(machine, folder):
                        # A shim that comes late must not find this without the lock.
                        with suppress(OSError):
                            machine.remove(folder / "spec")
                        machine.remove_folder(folder)

        return machine.in_thread(remove)

    def kept(self) -> Deferred[list[int]]:
        """Fire with the numbers that have a folder, lowest first."""

        def look() -> list[int]:
            try:
                names = self._machine.names(self._tasks)
            except FileNotFoundError:
                return []
            # Others are not ours, and a number that is too large would use all of them up.
            return sorted(int(n) for n in names if _NUMBER.fullmatch(n))

        return self._machine.in_thread(look)

    def keep_secrets(
        self, secrets: Mapping[str, str], name: str | None = None
    ) -> Deferred[str]:
        """Keep the secrets of a task that waits, in a thread: it syncs."""
        machine = self._machine
        path = self._secrets / (name or self._new_name())

        def write() -> str:
            temporary = path.with_name(f"{path.name}.tmp")
            try:
                machine.make_folder(self._secrets)
                machine.write(temporary, json.dumps(dict(secrets)).encode())
                machine.sync(temporary)
                machine.rename(temporary, path)
                machine.sync(self._secrets)
                machine.sync(self._tasks.parent)
            except OSError as e:
                with suppress(OSError):
                    machine.remove(temporary)
                    if name is None:  # else they are of a task that waits for them
                        machine.remove(path)
                raise _unavailable(path, e) from None
            return path.name

        return machine.in_thread(write)

    def secrets(self, task_id: int, name: str | None) -> Deferred[Secrets | None]:
        """Fire with the secrets that are kept, or None, in a thread: forms take long."""
        # A daemon that has died may have moved them already, see `start`.
        paths = [self._tasks / str(task_id) / "secrets"]
        if name is not None:
            paths.insert(0, self._secrets / name)

        def read() -> Secrets | None:
            for path in paths:
                try:
                    found = json.loads(self._machine.read(path))
                except (*NOTHING, Damaged, ValueError, RecursionError):
                    continue
                except OSError as e:
                    raise _unavailable(path, e) from None
                if isinstance(found, dict) and all(
                    isinstance(value, str) for value in found.values()
                ):
                    return Secrets(found, secret_forms.forms(found.values()))
            return None

        return self._machine.in_thread(read)

    def forget_secrets(self, task_id: int, name: str | None) -> None:
        """Remove what holds the secrets of a task that will not start any more."""
        paths = [self._tasks / str(task_id) / kept for kept in SECRET]
        if name is not None:
            paths += [self._secrets / name, self._secrets / f"{name}.tmp"]
        for path in paths:
            with suppress(OSError):
                self._machine.remove(path)

    def forget_all_secrets(self, task_ids: Sequence[int]) -> Deferred[None]:
        """Remove what still holds secrets in the folders of ended runs."""

        def remove() -> None:
            for task_id in task_ids:
                self.forget_secrets(task_id, None)

        return self._machine.in_thread(remove)

    def forget_other_secrets(self, names: AbstractSet[str]) -> Deferred[None]:
        """Remove all secrets but those of these names.

        It raises `OSError` if nobody can say which there are: nothing looks again later.
        """

        def remove() -> None:
            try:
                left = self._machine.names(self._secrets)
            except (FileNotFoundError, NotADirectoryError):
                return
            for name in left:
                if name not in names:
                    path = self._secrets / name
                    try:
                        self._machine.remove(path)
                    except OSError as e:
                        _log.error("Secrets are left on disk: {path}: {e}", path=path, e=e)

        return self._machine.in_thread(remove)

    def note_kill(self, task_id: int, by: Principal) -> None:
        """Leave word for the next daemon that a kill was asked for."""
        folder = self._tasks / str(task_id)
        try:
            self._machine.make_folder(folder)
            self._machine.write(folder / "kill", f"{by.name}\n{by.key}".encode())
            self._machine.sync(folder / "kill")
            self._machine.sync(folder)
        except OSError as e:
            _log.error("The kill of task {id} cannot be noted: {e}", id=task_id, e=e)

    def noted_kill(self, task_id: int) -> Principal | None:
        """Return who asked for a kill that an earlier daemon has left word of."""
        with suppress(OSError):
            path = self._tasks / str(task_id) / "kill"
            text = self._machine.read(path)[:_WHO].decode("utf-8", "replace")
            name, line, key = text.partition("\n")
            return Principal.from_key(key if line else None, name)
        return None

    def _write_spec(
        self,
        folder: Path,
        command: Command,
        bounds: Bounds,
        cgroup: str = "",
        limits: Limits = (),
    ) -> None:
        # The shim hands it on to whoever reads the result, perhaps a later daemon with
        # other settings. A secret may be in it, and then the output does not have it.
        line = (command.last_line or "").encode()
        promise = masker.masked(
            line, tuple(text for text in command.secrets if text in line)
        )
        account, umask = command.account, self._umask
        numbers: tuple[int, ...] = ()
        if account is not None:
            numbers = (account.uid, account.gid, *account.groups)
            umask = umask if account.umask is None else account.umask
        fields: list[str | bytes] = [
            shim.VERSION,
            *(f"{n:.3f}" for n in (bounds.grace, bounds.total, bounds.silence)),
            *(str(n) for n in (bounds.max_output, umask, self._files)),
            *(str(len(texts)) for texts in (command.arguments, command.secrets)),
            LIBRARY,
            command.directory or "/",
            promise,
            " ".join(map(str, numbers)),
            cgroup,
            cgroups.encoded(limits),
            *command.arguments,
            *command.secrets,
            *(text for pair in command.environment.items() for text in pair),
            *(orphans.MARK, str(folder)),
        ]
        # Always UTF-8, whatever the locale; odd bytes of our own environment stay as is.
        encoded = [
            field if isinstance(field, bytes) else field.encode("utf-8", "surrogateescape")
            for field in fields
        ]
        encoded.insert(0, b"%d" % len(encoded))
        # Lengths, as no sign is safe from standing in a text.
        data = b"".join(len(text).to_bytes(8, "little") + text for text in encoded)
        # A shim that comes late, from before a restart, must not read half of it.
        self._machine.write(folder / "spec.tmp", data)
        self._machine.rename(folder / "spec.tmp", folder / "spec")


def _cgroup(task_id: int, permit: str | None) -> str:
    """Return the name of a run's cgroup, "" if its permit is not known."""
    return "" if permit is None else cgroups.name(task_id, permit)


def _unavailable(path: Path, error: OSError) -> StoreUnavailable:
    full = error.errno in shim.NO_SPACE
    return StoreUnavailable(f"{path}: {error.strerror}", full=full)
