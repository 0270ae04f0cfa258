"""Files with the secrets of waiting tasks; each is removed as soon as possible."""

import json
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from pathlib import Path

from attrs import frozen
from twisted.internet.defer import Deferred
from twisted.logger import Logger

from pulsar_api.execution.machine import Machine
from pulsar_api.execution.task_files import NOTHING, SECRETS, SPEC, unavailable
from pulsar_api.files import Damaged
from pulsar_api.output.files import folder_of
from pulsar_api.tasks import secret_forms
from pulsar_api.tasks.interfaces import Secrets

_log = Logger()

HOLDERS = (SECRETS, f"{SECRETS}.tmp", SPEC, f"{SPEC}.tmp")
"""Files in a task's folder that may hold secrets."""


@frozen
class SecretFiles:
    """Keeps the secrets of tasks that wait, a file for each."""

    _machine: Machine
    _tasks: Path
    """The folder of all tasks; that of the secrets is beside it."""
    _new_name: Callable[[], str]
    """Returns a name that nobody can guess and that never comes again."""

    @property
    def _folder(self) -> Path:
        return self._tasks.parent / "secrets"

    def keep(self, secrets: Mapping[str, str], name: str | None = None) -> Deferred[str]:
        """Keep the secrets of a task; fires with the name of the file, safe on disk.

        Under a given name they replace what was there. Works in a thread, as it syncs.
        Fails with `StoreUnavailable`.
        """
        machine = self._machine
        path = self._folder / (name or self._new_name())

        def write() -> str:
            temporary = path.with_name(f"{path.name}.tmp")
            try:
                machine.make_folder(self._folder)
                machine.write(temporary, json.dumps(dict(secrets)).encode())
                machine.sync(temporary)
                machine.rename(temporary, path)
                machine.sync(self._folder)
                machine.sync(self._tasks.parent)
            except OSError as e:
                with suppress(OSError):
                    machine.remove(temporary)
                    if name is None:  # else a task waits that needs them
                        machine.remove(path)
                raise unavailable(path, e) from None
            return path.name

        return machine.in_thread(write)

    def read(self, task_id: int, name: str | None) -> Deferred[Secrets | None]:
        """Fire with the secrets of a task, or None if there are none any more.

        Works in a thread, as the forms of secrets take time to compute. Fails with
        `StoreUnavailable` if they cannot be read now.
        """
        # A daemon that has died may have moved them there already, see `hand_over`.
        paths = [folder_of(self._tasks, task_id) / SECRETS]
        if name is not None:
            paths.insert(0, self._folder / name)

        def read() -> Secrets | None:
            for path in paths:
                try:
                    found = json.loads(self._machine.read(path))
                except (*NOTHING, Damaged, ValueError, RecursionError):
                    continue
                except OSError as e:
                    raise unavailable(path, e) from None
                if isinstance(found, dict) and all(
                    isinstance(value, str) for value in found.values()
                ):
                    return Secrets(found, secret_forms.forms(found.values()))
            return None

        return self._machine.in_thread(read)

    def hand_over(self, task_id: int, name: str) -> None:
        """Move a file to the folder of its task, where the shim removes it.

        Raises `OSError` if that fails; a file that does not exist is no error.
        """
        with suppress(FileNotFoundError):
            target = folder_of(self._tasks, task_id) / SECRETS
            self._machine.rename(self._folder / name, target)

    def forget(self, task_id: int, name: str | None) -> None:
        """Remove the secrets of a task that will not start any more."""
        folder = folder_of(self._tasks, task_id)
        paths = [folder / kept for kept in HOLDERS]
        if name is not None:
            paths += [self._folder / name, self._folder / f"{name}.tmp"]
        for path in paths:
            with suppress(OSError):
                self._machine.remove(path)

    def forget_all(self, task_ids: Sequence[int]) -> Deferred[None]:
        """Remove the files with secrets in the folders of ended tasks."""

        def remove() -> None:
            for task_id in task_ids:
                self.forget(task_id, None)

        return self._machine.in_thread(remove)

    def forget_others(self, names: AbstractSet[str]) -> Deferred[None]:
        """Remove all files but those with these names.

        Fails with `OSError` if the files cannot be listed: nobody looks again later.
        """

        def remove() -> None:
            try:
                left = self._machine.names(self._folder)
            except (FileNotFoundError, NotADirectoryError):
                return
            for name in left:
                if name not in names:
                    path = self._folder / name
                    try:
                        self._machine.remove(path)
                    except OSError as e:
                        _log.error("Secrets are left on disk: {path}: {e}", path=path, e=e)

        return self._machine.in_thread(remove)
