"""Converts tasks to rows of the database, and rows to tasks."""

import json
import sqlite3
from collections.abc import Iterable, Sequence

from attrs import astuple

from pulsar_api.principal import Principal
from pulsar_api.tasks.interfaces import NewTask
from pulsar_api.tasks.model import Found, Process, Status, TaskSnapshot, TaskSpec

PAGE = 1 << 17
"""Characters of tasks, at least, that are read at a time."""

_ROWS = 100  # tasks that are read at a time

_PLAIN = (
    "revision status command pid exit_code signal reason started_at ended_at "
    "output_size index_size permit secret_file held ended_steady cpu_seconds memory_peak"
).split()
_COLUMNS = [*_PLAIN, "still_running", "notes", "killed_by", "killer_key"]
INSERT = (
    "INSERT INTO task (revision, status, app, env, action, variables, user, user_key,"
    " secret_names, secret_file, command, created_at, created_steady, output_size,"
    " idempotency_key, notes, change)"
    " VALUES (1, :status, :app, :env, :action, :variables, :user, :user_key,"
    " :secret_names, :secret_file, '', :created_at, :created_steady, 0,"
    " :idempotency_key, :notes, :change)"
)
UPDATE = (
    f"UPDATE task SET {', '.join(f'{name} = :{name}' for name in _COLUMNS)}, "  # noqa: S608
    "change = :change WHERE id = :id AND revision <= :revision"
)


def snapshot_of(row: sqlite3.Row) -> TaskSnapshot:
    """Return the task of a row."""
    variables = json.loads(row["variables"])
    secret = frozenset(json.loads(row["secret_names"]))
    user = _principal(row["user"], row["user_key"])
    spec = TaskSpec(row["app"], row["env"], row["action"], variables, user, secret)
    rest = {name: row[name] for name in _PLAIN if name not in {"status", "held"}}
    return TaskSnapshot(
        id=row["id"],
        spec=spec,
        created_at=row["created_at"],
        created_steady=row["created_steady"],
        status=Status(row["status"]),
        killed_by=_principal(row["killed_by"], row["killer_key"]),
        still_running=tuple(Process(*found) for found in json.loads(row["still_running"])),
        notes=tuple(json.loads(row["notes"])),
        held=bool(row["held"]),
        **rest,
    )


def _principal(name: str | None, key: str | None) -> Principal | None:
    return None if name is None else Principal.from_key(key, name)


def name_and_key(of: Principal | None) -> tuple[str | None, str | None]:
    """Return both columns of a principal."""
    return (None, None) if of is None else (of.name, of.key)


def first_of(rows: Iterable[sqlite3.Row]) -> TaskSnapshot | None:
    """Return the task of the first row, or None if there is no row."""
    for row in rows:
        return snapshot_of(row)
    return None


def new_values_of(new: NewTask) -> dict[str, object]:
    """Return the values of `INSERT` for a task, without the number of the change."""
    spec = new.spec
    user, user_key = name_and_key(spec.user)
    return {
        "status": Status.CREATED,
        "app": spec.app,
        "env": spec.env,
        "action": spec.action,
        "variables": json.dumps(dict(spec.variables)),
        "user": user,
        "user_key": user_key,
        "secret_names": json.dumps(sorted(spec.secret_names)),
        "secret_file": new.secret_file,
        "created_at": new.created_at,
        "created_steady": new.steady,
        "idempotency_key": new.key,
        "notes": json.dumps(new.notes),
    }


def values_of(snapshot: TaskSnapshot) -> dict[str, object]:
    """Return the values of `UPDATE` for a task, without the number of the change."""
    killer, killer_key = name_and_key(snapshot.killed_by)
    return {
        "id": snapshot.id,
        **{name: getattr(snapshot, name) for name in _PLAIN},
        "killed_by": killer,
        "killer_key": killer_key,
        "still_running": json.dumps([astuple(one) for one in snapshot.still_running]),
        "notes": json.dumps(snapshot.notes),
    }


def _size(row: sqlite3.Row) -> int:
    return len(row["variables"]) + len(row["command"])


def some_of(rows: Iterable[sqlite3.Row], limit: int) -> tuple[list[sqlite3.Row], bool]:
    """Return the first rows, up to `PAGE`, and whether there may be more.

    ``limit`` is the largest number of rows that there can be.
    """
    some = []
    size = 0
    for row in rows:
        some.append(row)
        size += _size(row)
        if size >= PAGE:
            return some, True
    return some, len(some) == limit


def page_of(db: sqlite3.Connection, numbers: Sequence[int]) -> Found:
    """Return the first of these tasks, up to `PAGE`, and the numbers of the others."""
    tasks = []
    size = 0
    for done, number in enumerate(numbers[:_ROWS], 1):
        row = db.execute("SELECT * FROM task WHERE id = ?", (number,)).fetchone()
        if row is None:
            continue
        tasks.append(snapshot_of(row))
        size += _size(row)
        if size >= PAGE:
            return Found(tasks, numbers[done:])
    return Found(tasks, numbers[_ROWS:])
