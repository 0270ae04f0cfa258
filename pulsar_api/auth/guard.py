"""The one place where rights are checked: what a caller can do with tasks."""

from collections.abc import Mapping, Sequence

from attrs import evolve, frozen

from pulsar_api.auth.audit import AuditLog
from pulsar_api.auth.rights import Caller, Right
from pulsar_api.concurrency.background import shielded
from pulsar_api.concurrency.changes import Changes
from pulsar_api.errors import InvalidInput, NotAllowed, NotRestartable, SecretsGone
from pulsar_api.tasks.commands import MAX_ACTION, MAX_NAME
from pulsar_api.tasks.live import Task
from pulsar_api.tasks.model import (
    Command,
    Found,
    News,
    Status,
    TaskQuery,
    TaskSnapshot,
    TaskSpec,
)
from pulsar_api.tasks.service import TaskService

_RESTARTABLE = frozenset({Status.FAILED, Status.KILLED, Status.LOST})


@frozen(eq=False)
class Guard:
    """The tasks on which a caller has the one right that a route needs.

    Routes reach tasks by a guard only, so none can forget the check. Without the right, a
    call raises `NotAllowed` and is in the audit log; lists leave such tasks out.
    """

    _service: TaskService
    caller: Caller
    right: Right
    _audit: AuditLog

    # -- one task

    async def find(self, number: int) -> Task:
        """Return a task, or raise `UnknownTask` or `NotAllowed`."""
        task = await self._service.find(number)
        spec = task.snapshot.spec
        self._check(spec.app, spec.env, spec.action, task=number)
        return task

    async def create(
        self,
        app: str,
        env: str,
        action: str,
        variables: Mapping[str, str],
        secret: frozenset[str] = frozenset(),
        key: str | None = None,
    ) -> Task:
        """Create a task in the caller's name.

        It raises the errors of `TaskService.create`.
        """
        _bounded(app=app, env=env)
        _bounded(MAX_ACTION, action=action)
        self._check(app, env, action)
        spec = TaskSpec(app, env, action, variables, self.caller.principal, secret)
        return await self._created(spec, key)

    async def restart(self, number: int) -> Task:
        """Create a task like one that has failed; the old one stays what it is."""
        old = (await self.find(number)).snapshot
        if old.status not in _RESTARTABLE:
            raise NotRestartable(old.id, old.status)
        if old.spec.secret_names:
            raise SecretsGone(old.id)
        return await self._created(evolve(old.spec, user=self.caller.principal), None)

    async def _created(self, spec: TaskSpec, key: str | None) -> Task:
        # In the log even if who asked does not wait for it.
        return await shielded(self._noted(spec, key))

    async def _noted(self, spec: TaskSpec, key: str | None) -> Task:
        newest = self._service.created.version
        task = await self._service.create(spec, key)
        number = task.snapshot.id
        # A retry with the same key has started nothing.
        note = self._note if number > newest else self._note_unchanged
        note(spec.app, spec.env, spec.action, task=number)
        return task

    async def kill(self, number: int) -> Task:
        """End a task, as `TaskService.kill`."""
        snapshot = (await self.find(number)).snapshot
        spec = snapshot.spec
        changes = not snapshot.status.ended and snapshot.killed_by is None
        note = self._note if changes else self._note_unchanged
        note(spec.app, spec.env, spec.action, task=number)
        return await self._service.kill(number, self.caller.actor)

    async def free(self, app: str, env: str) -> Sequence[int]:
        """Give back a target that ended tasks hold, as `TaskService.free`."""
        _bounded(app=app, env=env)
        self._check(app, env, None)
        freed = await self._service.free(f"{app}/{env}", self.caller.actor)
        self._note(app, env, None, freed=list(freed))
        return freed

    # -- many

    async def search(self, query: TaskQuery) -> Found:
        """Return the tasks that match and that the caller may see, newest first."""
        return await self._service.search(self.narrowed(query))

    def narrowed(self, query: TaskQuery) -> TaskQuery:
        """Return the query, restricted to tasks that the caller may see."""
        return evolve(query, within=self._within())

    async def read(self, numbers: Sequence[int]) -> Found:
        """Return the first of these tasks, without those that the caller may not see."""
        found = await self._service.read(numbers)
        return Found([task for task in found.tasks if self.sees(task)], found.rest)

    async def next_after(self, number: int) -> TaskSnapshot | None:
        """Return the oldest newer task that the caller may see, or None."""
        return await self._service.next_after(number, self._within())

    async def news(self, since: int, known: int, limit: int) -> News:
        """Return what has been recorded, also of tasks that `sees` leaves out."""
        return await self._service.news(since, known, limit)

    async def last_change(self) -> tuple[int, int]:
        """Return as `TaskService.last_change`."""
        return await self._service.last_change()

    async def listing(self, app: str, env: str) -> Command:
        """Return the command that lists the actions of an app."""
        _bounded(app=app, env=env)
        self._check(app, env, None)
        command = await self._service.listing(app, env)
        self._audit.write_unchanged(self.caller, "list", app=app, env=env)
        return command

    def sees(self, snapshot: TaskSnapshot) -> bool:
        """Return whether the caller may see a task."""
        spec = snapshot.spec
        return self.caller.has_right(self.right, spec.app, spec.env, spec.action)

    @property
    def created(self) -> Changes:
        """The number of the newest task, also if the caller may not see it."""
        return self._service.created

    @property
    def changed(self) -> Changes:
        """Grows with each record."""
        return self._service.changed

    # -- what they share

    def _within(self) -> tuple[tuple[str, str, str], ...] | None:
        found = self.caller.targets_of(self.right)
        return None if found is None else tuple((t.app, t.env, t.action) for t in found)

    def _check(self, app: str, env: str, action: str | None, **more: object) -> None:
        if not self.caller.has_right(self.right, app, env, action):
            self._note(app, env, action, allowed=False, **more)
            where = "/".join(part for part in (app, env, action) if part is not None)
            if "task" in more and not self.caller.has_right(Right.READ, app, env, action):
                where = f"task {more['task']}"  # the caller may not know what it is
            raise NotAllowed(self.caller.actor.name, self.right, where)

    def _note(
        self,
        app: str,
        env: str,
        action: str | None,
        *,
        allowed: bool = True,
        **more: object,
    ) -> None:
        place = {"app": app, "env": env, "action": action}
        self._audit.write(self.caller, self.right, allowed=allowed, **place, **more)

    def _note_unchanged(self, app: str, env: str, action: str, *, task: int) -> None:
        place = {"app": app, "env": env, "action": action}
        self._audit.write_unchanged(self.caller, self.right, **place, task=task)


def _bounded(most: int = MAX_NAME, **names: str) -> None:
    """Raise `InvalidInput` for a name that is too long, before it is compared or logged."""
    for field, name in names.items():
        if len(name) > most:
            raise InvalidInput(field, f"at most {most} characters are allowed")
