"""Permits to start tasks: they prove whether a task may have been started already.

A permit is a file in the task's folder. It names the boot, the state folder and the task's
folder, and the daemon records its inode and its time of change, which no copy keeps. The
number of each task that was ever permitted to start is in a list.
"""

from collections.abc import Callable
from collections.abc import Set as AbstractSet
from contextlib import suppress
from pathlib import Path

from attrs import field, frozen
from twisted.internet.defer import Deferred
from twisted.logger import Logger

from pulsar_api.errors import FolderInUse
from pulsar_api.execution.machine import Identity, Machine
from pulsar_api.execution.task_files import (
    NOTHING,
    PERMIT,
    SHIM_FILES,
    USED_PERMIT,
    unavailable,
)
from pulsar_api.files import Damaged
from pulsar_api.output.files import folder_of

_log = Logger()


@frozen
class Permits:
    """Gives permits to start tasks, and judges those that were given."""

    _machine: Machine
    _tasks: Path
    """The folder of all tasks; the list of permits is beside it."""
    _new_name: Callable[[], str]
    """Returns a name that nobody can guess and that never comes again."""
    _synced: set[int] = field(factory=set, init=False)
    """The inode of the list, once it is known to be in its folder on disk."""
    _appended: list[Identity] = field(factory=list, init=False)
    """The identity of the list after the newest permit of this daemon."""

    @property
    def _list(self) -> Path:
        return self._tasks.parent / "permits"

    def place(self) -> str:
        """Return what tells these folders from copies of them.

        Raises `OSError` if a folder cannot be read.
        """
        state = self._machine.identity(self._tasks.parent)
        tasks = self._machine.identity(self._tasks)
        try:
            # Another thread may be in the middle of an `append`: take its state before.
            known = self._appended or [self._machine.identity(self._list)]
            permits = known[-1]
            last = f"{permits.inode} {permits.size} {permits.changed}"
        except FileNotFoundError:
            last = "0 0 0"
        return f"{state.device} {state.inode} {tasks.inode} {last}"

    def give(self, task_id: int) -> Deferred[str]:
        """Permit the start of a task; fires with the name of the permit, safe on disk.

        Fails with `FolderInUse` if the folder of the task was used already, and with
        `StoreUnavailable` if the permit cannot be written.
        """
        machine, folder = self._machine, folder_of(self._tasks, task_id)

        def make() -> str:
            try:
                machine.make_folder(folder)
                if SHIM_FILES & set(machine.names(folder)):
                    raise FolderInUse(task_id)
                text = self._text(folder)
                machine.write(folder / PERMIT, text)
                # Not its folder: if a power cut takes that, the list still has the number.
                machine.sync(folder / PERMIT)
                # Last: a number in the list without a folder proves that this was removed.
                self._appended[:] = [machine.append(self._list, b"\n%019d\n" % task_id)]
                self._sync_list()
                return self._name(folder, text)
            except OSError as e:
                raise unavailable(folder, e) from None

        return machine.in_thread(make)

    def _sync_list(self) -> None:
        """Wait until the list, which may be new, is in its folder on disk."""
        inode = self._machine.identity(self._list).inode
        if inode not in self._synced:
            self._machine.sync(self._list.parent)
            self._synced.add(inode)

    def given(self) -> Deferred[AbstractSet[int]]:
        """Fire with the numbers of the tasks that were ever permitted to start.

        If the list is very long, with the newest ones. Fails with `StoreUnavailable` if it
        cannot be read now.
        """

        def read() -> AbstractSet[int]:
            try:
                lines = self._machine.read(self._list, tail=True).split(b"\n")
            except FileNotFoundError:
                return frozenset()
            except Damaged as e:
                # As if it had been removed: waiting tasks are lost, see `Reading`.
                aside = self._list.with_name(f"permits.{self._new_name()}")
                _log.error("{e}; it is now {aside}", e=e, aside=aside)
                self._machine.rename(self._list, aside)
                return frozenset()
            except OSError as e:
                raise unavailable(self._list, e) from None
            # A permit whose line is incomplete was never reported to anybody.
            return {int(line) for line in lines if len(line) == 19 and line.isdigit()}

        return self._machine.in_thread(read)

    def is_valid(self, task_id: int, permit: str | None) -> bool:
        """Return whether a permit is unused, of this boot and of this very folder.

        Raises `OSError` if nobody can know that now.
        """
        folder = folder_of(self._tasks, task_id)
        try:
            text = self._machine.read(folder / PERMIT)
            return text == self._text(folder) and permit == self._name(folder, text)
        except (*NOTHING, Damaged):
            return False

    def is_here(self, task_id: int) -> bool:
        """Return whether the permit of a run, used or not, is of this boot and folder.

        Raises `OSError` if nobody can know that now.
        """
        folder = folder_of(self._tasks, task_id)
        for name in (USED_PERMIT, PERMIT):
            with suppress(*NOTHING, Damaged):
                return self._machine.read(folder / name) == self._text(folder)
        return False

    def name_of(self, task_id: int) -> str | None:
        """Return the name of the permit of a run, used or not; None if it is not known."""
        folder = folder_of(self._tasks, task_id)
        for name in (USED_PERMIT, PERMIT):
            with suppress(OSError):
                return self._name(folder, self._machine.read(folder / name), name)
        return None

    def _text(self, folder: Path) -> bytes:
        """Return the content of a permit that is given now."""
        lines = [f"boot {self._machine.boot_id()}"]
        for name, path in (("state", self._tasks.parent), ("folder", folder)):
            found = self._machine.identity(path)
            lines.append(f"{name} {found.device} {found.inode}")
        return "".join(f"{line}\n" for line in lines).encode()

    def _name(self, folder: Path, text: bytes, file: str = PERMIT) -> str:
        # The time of its last change cannot be copied with the file: it tells a folder
        # that was restored even if it got the very inodes of the old one.
        found = self._machine.identity(folder / file)
        return f"{text.decode()}permit {found.inode} {found.changed}"
