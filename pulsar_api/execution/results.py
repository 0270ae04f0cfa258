"""Results of runs: reads the file ``exit`` that a shim writes when its task has ended."""

import pwd
import signal
from contextlib import suppress
from errno import EAGAIN, EMFILE, ENFILE, ENOMEM
from pathlib import Path

from attrs import evolve

from pulsar_api.execution.machine import Machine
from pulsar_api.execution.task_files import EXIT, NOTHING
from pulsar_api.files import Damaged
from pulsar_api.output.records import LARGEST, NO_TIME
from pulsar_api.shim import shim
from pulsar_api.tasks.model import Cause, Exit, Process

PASSING = {*shim.NO_SPACE, EAGAIN, EMFILE, ENFILE, ENOMEM}
"""Errors of a start that may pass: a full disk, too few descriptors, no memory."""

LONGEST_MESSAGE = 4096
"""Bytes of an error message that are kept."""

_OUTCOMES = ("code", "signal", "error")
"""Fields of a result of which it has exactly one."""


def read_exit(machine: Machine, folder: Path) -> Exit | None:
    """Return the result that a shim has written, or None if there is none yet.

    A result that makes no sense is returned as lost. `Exit.good` says whether the command
    has printed the last line that was promised (`Command.last_line`).

    Raises `OSError` if the files cannot be read now.
    """
    damaged = Exit(error="The file with its result is damaged.", lost=True)
    try:
        data = machine.read(folder / EXIT)
    except NOTHING:
        return None
    except Damaged:
        return damaged
    try:
        exit, promise = _parse_exit(data)
    except (KeyError, ValueError, OverflowError):
        return damaged
    good, index = exit.code != 0, 0
    try:
        if promise is None and not data.startswith(shim.RESULT):
            # A shim of an older version kept the promise in a file of its own.
            with suppress(*NOTHING):
                promise = machine.read(folder / "promise")
        output = machine.output(folder)
        index = output.index_size()
        good = good or promise is None or output.last_line() == promise
    except Damaged:
        good = good or promise is None
    return evolve(exit, good=good, index_size=index)


def not_started(error: OSError, folder: Path) -> Exit:
    """Return the result of a run whose process could not be started.

    It is `Exit.unstarted`, so the run can be repeated, if the error may pass.
    """
    passing = error.errno in PASSING
    text = f"cannot start: {error.strerror}: {error.filename or folder}"
    return Exit(error=text, unstarted=passing, passing=passing)


def _lines(data: bytes) -> list[str]:
    """Return the lines of a result.

    Raises `ValueError` if it is not complete. In a result of an older shim, missing lines
    at its end go unnoticed; these only name processes.
    """
    *lines, rest = data.decode("utf-8", "replace").split("\n")
    names = [line.partition(" ")[0] for line in lines]
    whole = lines[-1:] == ["end"] or lines[:1] != [shim.RESULT.decode()]
    if rest or not whole or sum(map(names.count, _OUTCOMES)) != 1:
        raise ValueError("the result is not whole")
    return lines


def _parse_exit(data: bytes) -> tuple[Exit, bytes | None]:
    """Return the result, and the last line that was promised, or None.

    Raises `KeyError`, `ValueError` or `OverflowError` if the result makes no sense.
    """
    lines = _lines(data)
    found = dict(line.partition(" ")[::2] for line in lines)
    number, promise = found.get("signal"), found.get("promise")
    left = [line.split(" ", 4)[1:] for line in lines if line.startswith("left ")]
    if len(left) > shim.LISTED:
        raise ValueError("more processes are named than a shim names")
    users = {user: _user_name(_number(user, 1 << 32)) for _, _, user, _ in left}
    exit = Exit(
        ended_at=_moment(found["ended"]),
        code=_number(found["code"], 256) if "code" in found else None,
        signal=signal_name(_number(number, signal.NSIG)) if number else None,
        error=found["error"][:LONGEST_MESSAGE] if "error" in found else None,
        cause=Cause(found["cause"]),
        forced=found["forced"] == "1",
        output_size=_number(found["size"], LARGEST + 1),
        open=found.get("open") == "1",
        left=tuple(
            Process(_number(pid, LARGEST), _number(start, LARGEST), name[:99], users[user])
            for pid, start, user, name in left
        ),
        cpu_seconds=_number(found["cpu"], LARGEST) / 1e6 if "cpu" in found else None,
        memory_peak=_number(found["memory"], LARGEST) if "memory" in found else None,
        memory_kills=_number(found.get("oom", "0"), LARGEST),
    )
    return exit, None if promise is None else bytes.fromhex(promise)


def _number(text: str, end: int) -> int:
    """Return the number, which must be in ``range(end)``; otherwise raise `ValueError`."""
    number = int(text)
    if not 0 <= number < end:
        raise ValueError(f"no shim writes {text[:20]}")
    return number


def _moment(text: str) -> float:
    """Return the time, which must be before the year 10000; or raise `ValueError`."""
    moment = float(text)
    if not 0 <= moment < NO_TIME / 1000:
        raise ValueError(f"no shim writes {text[:20]}")
    return moment


def _user_name(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except (KeyError, OverflowError):
        return str(number)


def signal_name(number: int) -> str:
    """Return the name of a signal, such as ``SIGTERM`` or ``SIGRTMIN+3``."""
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"SIGRTMIN+{number - signal.SIGRTMIN}"
