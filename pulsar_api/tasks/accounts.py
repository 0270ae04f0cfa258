"""Finds the account under which a task runs: ``[[run-as]]`` in the settings."""

import grp
import os
import pwd
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path

from attrs import frozen

from pulsar_api.errors import InvalidInput, SettingsError
from pulsar_api.tasks.model import Account, Limits
from pulsar_api.tasks.targets import Target

CAP_KILL, CAP_SETGID, CAP_SETUID = 5, 6, 7
"""The numbers of three capabilities (capability.h)."""

NEEDED = 1 << CAP_KILL | 1 << CAP_SETGID | 1 << CAP_SETUID

_LIMITS = ("memory-max", "cpu-quota", "tasks-max")
_KEYS = frozenset({"on", "user", "group", "home", "umask", *_LIMITS})
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_LEAST_MEMORY = 1 << 20  # bytes; hardly any program can start with less
_MOST_PROCESSES = 1 << 22  # the most that a kernel has at all (PID_MAX_LIMIT)


@frozen
class RunAs:
    """One ``[[run-as]]`` table. `Accounts.find` looks up the names in it."""

    on: tuple[Target, ...]
    user: str
    group: str | None = None
    home: str | None = None
    umask: int | None = None
    limits: Limits = ()

    @classmethod
    def parse(cls, table: object) -> "RunAs":
        """Return the parsed table.

        Raises:
            ValueError: The table is wrong; the message is a sentence about the mistake.
        """
        if not isinstance(table, dict):
            raise ValueError("must be a list of tables: [[run-as]]")  # noqa: TRY004
        unknown = sorted(set(table) - _KEYS)
        if unknown:
            known = ", ".join(sorted(_KEYS))
            raise ValueError(f"{unknown[0]!r} is unknown. Use one of {known}")
        on = table.get("on")
        if not isinstance(on, list) or not on or not all(isinstance(o, str) for o in on):
            raise ValueError('on must be a list of targets, as in on = ["shop/*"]')
        texts = {name: _text(table, name) for name in ("user", "group", "home")}
        if texts["user"] is None:
            raise ValueError("user, the name of an account, is missing")
        if texts["home"] is not None and not texts["home"].startswith("/"):
            raise ValueError("home must be the path of a folder, beginning with /")
        umask = _text(table, "umask")
        if umask is not None and not re.fullmatch("0?[0-7]{3}", umask):
            raise ValueError('umask must have three digits, as in umask = "022"')
        return cls(
            tuple(Target.parse(text) for text in on),
            texts["user"],
            texts["group"],
            texts["home"],
            None if umask is None else int(umask, 8),
            tuple(_limits(table)),
        )


def _limits(table: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Yield each limit of a table as a file of a cgroup (cgroups(7)) and its content."""
    memory, quota, tasks = (table.get(name) for name in _LIMITS)
    if memory is not None:
        found = re.fullmatch("([1-9][0-9]{0,14})([KMGT]?)", str(memory))
        size = int(found[1]) * _UNITS[found[2]] if found else 0
        if not _LEAST_MEMORY <= size < 1 << 63:
            raise ValueError('memory-max must be at least 1M, as in memory-max = "2G"')
        yield "memory.max", str(size)
    if quota is not None:
        found = re.fullmatch("([1-9][0-9]{0,5})%", str(quota))
        if not found:
            raise ValueError('cpu-quota must be a percentage of one core, as in "150%"')
        yield "cpu.max", f"{int(found[1]) * 1000} 100000"
    if tasks is not None:
        if type(tasks) is not int or not 1 <= tasks <= _MOST_PROCESSES:
            raise ValueError("tasks-max must be a number of processes, as in 500")
        yield "pids.max", str(tasks)


def _text(table: Mapping[str, object], name: str) -> str | None:
    value = table.get(name)
    if value is None:
        return None
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError(f"{name} must be a text that is not empty")
    return value


@frozen
class Accounts:
    """Finds the account of a target. Without tables, that is the daemon's own account."""

    tables: tuple[tuple[tuple[Target, ...], Account], ...] = ()

    @classmethod
    def find(cls, tables: Iterable[RunAs], own: int) -> "Accounts":
        """Return the accounts that the tables name.

        ``own`` is the user id of the daemon.

        Raises:
            SettingsError: An account is unknown, or has too many rights: root and the
                daemon's own account are refused.
        """
        return cls(tuple((table.on, _account(table, own)) for table in tables))

    def of(self, app: str, env: str, action: str | None) -> Account | None:
        """Return the account of the first table that matches, None for the daemon's own.

        Raises:
            InvalidInput: There are tables, but none matches.
        """
        for on, account in self.tables:
            if any(target.matches(app, env, action) for target in on):
                return account
        if self.tables:
            detail = (
                f"no [[run-as]] table in the settings matches {app}/{env}. Ask the "
                "operator of this daemon to add one"
            )
            raise InvalidInput("app", detail)
        return None


OWN_ACCOUNT = Accounts()
"""All tasks run under the daemon's own account."""


def _account(table: RunAs, own: int) -> Account:
    try:
        user = pwd.getpwnam(table.user)
    except KeyError:
        raise SettingsError(f"run-as: the user {table.user} does not exist") from None
    group = user.pw_gid
    if table.group is not None:
        try:
            group = grp.getgrnam(table.group).gr_gid
        except KeyError:
            raise SettingsError(f"run-as: the group {table.group} does not exist") from None
    if user.pw_uid == 0:
        raise SettingsError("run-as: tasks must not run as root. Name another user")
    if user.pw_uid == own:
        why = "the daemon runs as this user, so tasks could change the daemon's state"
        raise SettingsError(f"run-as: {table.user}: {why}")
    groups = os.getgrouplist(table.user, group)
    if 0 in groups or os.getegid() in groups:
        why = "the user is in the group of root or of the daemon"
        raise SettingsError(f"run-as: {table.user}: {why}")
    home = user.pw_dir if table.home is None else table.home
    return Account(
        user.pw_name, user.pw_uid, group, tuple(groups), home, table.umask, table.limits
    )


def check_limits(tables: Iterable[RunAs], controllers: Container[str]) -> None:
    """Raise `SettingsError` if a limit needs a controller that is not available."""
    for table in tables:
        for file, _ in table.limits:
            controller = file.partition(".")[0]
            if controller not in controllers:
                key = {"memory": "memory-max", "cpu": "cpu-quota", "pids": "tasks-max"}
                raise SettingsError(
                    f"run-as: {key[controller]} needs a delegated cgroup with the "
                    f"controller {controller}. Set Delegate=cpu memory pids in the unit of "
                    "this daemon; see docs/access.rst"
                )


def check_capabilities(status: Path = Path("/proc/self/status")) -> None:
    """Raise `SettingsError` if this process cannot give its tasks other accounts.

    Each shim needs the same capabilities. A process that is not root must therefore have
    them in its ambient set, which an exec preserves (capabilities(7)).
    """
    found = capabilities(status)
    held = found["CapEff"] if os.geteuid() == 0 else found["CapEff"] & found["CapAmb"]
    if held & NEEDED != NEEDED:
        raise SettingsError(
            "run-as needs root, or AmbientCapabilities=CAP_SETUID CAP_SETGID CAP_KILL "
            "in the unit of this daemon; see docs/access.rst"
        )


def capabilities(status: Path) -> Mapping[str, int]:
    """Return the capability sets of a process, by their names in its ``status`` file."""
    lines = status.read_text().splitlines()
    return {
        name: int(value, 16)
        for name, _, value in (line.partition(":") for line in lines)
        if name.startswith("Cap")
    }
