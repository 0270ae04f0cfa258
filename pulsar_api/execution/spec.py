"""Writes what a shim has to run: the file ``spec``, which `shim.Spec` reads."""

from pathlib import Path

from pulsar_api.execution import cgroups, orphans
from pulsar_api.execution.programs import LIBRARY
from pulsar_api.shim import masker, shim
from pulsar_api.tasks.interfaces import Bounds
from pulsar_api.tasks.model import Command, Limits


def encoded_spec(
    folder: Path,
    command: Command,
    bounds: Bounds,
    *,
    umask: int,
    files: int,
    cgroup: str = "",
    limits: Limits = (),
) -> bytes:
    """Return the spec of a command.

    ``files`` is the soft limit of open files, 0 for that of the daemon; ``cgroup`` is the
    folder of the task's cgroup, "" if it has none.
    """
    # The shim copies it to the result, for a daemon that may have other settings. Secrets
    # in it are masked, as they are in the output.
    line = (command.last_line or "").encode()
    promise = masker.masked(line, tuple(text for text in command.secrets if text in line))
    account = command.account
    numbers: tuple[int, ...] = ()
    if account is not None:
        numbers = (account.uid, account.gid, *account.groups)
        umask = umask if account.umask is None else account.umask
    fields: list[str | bytes] = [
        shim.VERSION,
        *(f"{n:.3f}" for n in (bounds.grace, bounds.total, bounds.silence)),
        *(str(n) for n in (bounds.max_output, umask, files)),
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
    # Always UTF-8, whatever the locale; bytes of the daemon's own environment that are not
    # UTF-8 stay as they are.
    encoded = [
        field if isinstance(field, bytes) else field.encode("utf-8", "surrogateescape")
        for field in fields
    ]
    encoded.insert(0, b"%d" % len(encoded))
    # Lengths, as a field may hold any character that could separate them.
    return b"".join(len(text).to_bytes(8, "little") + text for text in encoded)
