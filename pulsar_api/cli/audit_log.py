"""Prints the audit log: ``pulsar-api audit``."""

import argparse
import json
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pulsar_api.auth.audit import FILE, AuditLog


def show(given: argparse.Namespace, now: Callable[[], float]) -> None:
    """Print the entries that the options choose, the last ones of many."""
    wanted = (
        entry
        for entry in AuditLog(Path(given.state_dir) / FILE, now).read()
        if given.user in {None, entry.get("who"), entry.get("principal")}
        and not (given.refused and entry.get("allowed"))
    )
    text: Callable[[dict[str, Any]], str] = json.dumps if given.json else _line
    for entry in deque(wanted, maxlen=max(0, given.limit)):
        print(text(entry))


def _line(entry: dict[str, Any]) -> str:
    def words() -> Iterator[str]:
        yield str(entry.get("at", "")).replace("T", " ")
        yield "yes" if entry.get("allowed") else "NO "
        yield f"{entry.get('who') or '-'} ({entry.get('means')}, {entry.get('from')})"
        yield str(entry.get("what"))
        place = [entry[name] for name in ("app", "env", "action") if entry.get(name)]
        yield "/".join(map(str, place))
        for name in ("task", "user", "token", "login", "id", "times"):
            if entry.get(name) is not None:
                yield f"{name} {entry[name]}"
        if isinstance(entry.get("tasks"), list):
            yield f"tasks {' to '.join(map(str, entry['tasks']))}"

    # Text from outside is escaped, so that it cannot control the terminal.
    text = "  ".join(word for word in words() if word)
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
