"""Conditions in SQL for queries for tasks."""

import json

from pulsar_api.tasks.model import Status, TaskQuery, Within

_MOST_TARGETS = 50  # above which all targets are one parameter of a query

# Not LIKE, which treats some characters as wildcards. Both fold ASCII letters only.
_HOLDERS = "app env action user".split()
_PLACE = "app env action".split()
_HOLDS = f"({' OR '.join(f'instr(lower({name}), ?)' for name in _HOLDERS)})"


def within_condition(targets: Within) -> tuple[str, list[str]]:
    """Return the condition that a task is on one of the targets, and its values."""
    if targets is None:
        return "1", []
    if len(targets) <= _MOST_TARGETS:
        # Takes half the time of the form below, which works for any number of targets.
        values = [_glob(glob) for target in targets for glob in target if glob != "*"]
        conditions = [
            " AND ".join(
                f"+{name} GLOB ?"
                for name, glob in zip(_PLACE, target, strict=True)
                if glob != "*"
            )
            or "1"
            for target in targets
        ]
        return f"({' OR '.join(conditions) or '0'})", values
    one = " AND ".join(
        f"{name} GLOB json_extract(target.value, '$[{number}]')"
        for number, name in enumerate(_PLACE)
    )
    text = f"EXISTS (SELECT 1 FROM json_each(?) AS target WHERE {one})"  # noqa: S608
    return text, [json.dumps([list(map(_glob, target)) for target in targets])]


def _glob(text: str) -> str:
    # In a GLOB of SQLite a bracket would begin a set of characters.
    return text.replace("[", "[[]")


def condition(query: TaskQuery) -> tuple[str, list[object]]:
    """Return the condition that a task matches a query, and its values.

    It says nothing about the number of the task.
    """
    # A + keeps SQLite from using the index of a column: a search looks at a range of tasks.
    plus = "" if query.quick and query.status is None else "+"
    wanted = {
        "status = ?": query.status,
        f"{plus}app = ?": query.app,
        f"{plus}env = ?": query.env,
        "user = ?": query.user,
    }
    within, globs = within_condition(query.within)
    texts = [within]
    values: list[object] = [*globs]
    for text, value in wanted.items():
        if value is not None:
            texts.append(text)
            values.append(value)
    if query.status in {Status.CREATED, Status.RUNNING}:
        texts.append("status IN ('created', 'running')")  # they have an index
    if query.text is not None:
        texts.append(_HOLDS)
        values += [query.text.encode().lower().decode()] * len(_HOLDERS)
    return " AND ".join(texts), values
