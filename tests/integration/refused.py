"""Starts that must fail, in each way in which the daemon can be started."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import (
    ExitStack,
    contextmanager,
    redirect_stderr,
    redirect_stdout,
    suppress,
)
from io import StringIO
from pathlib import Path

import pytest

from pulsar_api.tap import Options
from tests.integration import zygote
from tests.integration.daemon import wait_for

TWISTD = zygote.TWISTD[0]
WAYS: Mapping[str, Sequence[str]] = {
    "python": zygote.DAEMON,
    "foreground": (TWISTD, "--nodaemon", "--pidfile=", "pulsar-api"),
    "background": (TWISTD, "--pidfile", "twistd.pid", "pulsar-api"),
}

_POWERLESS = """
import ctypes, os, sys
for right in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    ctypes.CDLL(None).prctl(24, right, 0, 0, 0)  # PR_CAPBSET_DROP
os.execv(sys.argv[1], sys.argv[1:])
"""
POWERLESS = (sys.executable, "-c", _POWERLESS)
"""Runs a program that has to obey the permissions of files, even if root starts it."""

_LIBC = ctypes.CDLL(None, use_errno=True)
_CAPABILITIES = 0x20080522, 0
"""Version 3 of the capability sets, of this process (capset(2))."""


@contextmanager
def powerless() -> Iterator[None]:
    """Obey the permissions of files in this process, even as root."""
    head = (ctypes.c_uint32 * 2)(*_CAPABILITIES)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable, and upper halves
    assert _LIBC.capget(head, sets) == 0
    had = sets[0]
    sets[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert _LIBC.capset(head, sets) == 0
    try:
        yield
    finally:
        sets[0] = had
        assert _LIBC.capset(head, sets) == 0


@contextmanager
def reserved() -> Iterator[int]:
    """Yield a free port that no other test gets."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


def answers(port: int) -> bool:
    """Return whether a process listens on a port of this machine."""
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def serves(port: int) -> bool:
    """Return whether a server answers on a port, even if it expects TLS.

    A successful connection is not enough: a start opens the port before other steps fail.
    """
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as sock:
        sock.sendall(b"GET /tasks HTTP/1.0\r\n\r\n")
        return sock.recv(1) != b""
    return False


def alive(pid: int) -> bool:
    """Return whether a process has not ended. A zombie has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def end(pid: int) -> None:
    """Stop a process that is no child of this one, and wait until it is gone."""
    os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not alive(pid), f"the end of process {pid}")


class _Start:
    def __init__(
        self,
        folder: Path,
        way: str,
        options: Sequence[str],
        before: Sequence[str],
        port: int,
        environ: Mapping[str, str],
    ) -> None:
        self.folder = folder
        self.way = way
        self.port = port
        self.pid_file = folder / "twistd.pid"
        folder.mkdir()
        given = _given(folder, options, port)
        with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
            self.process = zygote.Popen(
                [*before, *WAYS[way], *given],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=folder,
                env=environ,
                close_fds=False,  # a test can have opened a socket for it
            )

    def said(self, *, busy: bool) -> str:
        """Wait for the end and return its one line, with names of its own replaced."""
        wait_for(
            lambda: self.process.poll() is not None or (not busy and serves(self.port)),
            f"the end of {self.process.args!r}",
        )
        status = self.process.poll()
        out, err = ((self.folder / name).read_text() for name in ("stdout", "stderr"))
        everything = f"{self.way}: exit status {status}\n{out}\n{err}"
        assert status is not None, f"it serves: {everything}"
        assert not self.pid_file.exists(), everything
        assert not (self.folder / "twistd.log").exists(), everything
        assert busy or not answers(self.port), everything
        return _line(status, out, err, self.folder, self.port)

    def clean_up(self) -> None:
        """End the processes of a start that succeeded against expectation."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self.pid_file.exists():
            end(int(self.pid_file.read_text()))


def _given(folder: Path, options: Sequence[str], port: int) -> list[str]:
    places = {"{port}": str(port), "{own}": str(folder)}
    given = [_filled(option, places) for option in options]
    if not any(o.startswith(("--port", "--listen")) for o in options):
        given = ["--port", str(port), *given]
    if "--state-dir" not in options:
        given = ["--state-dir", str(folder / "state"), *given]
    return given


def _line(status: object, out: str, err: str, folder: Path, port: int) -> str:
    everything = f"exit status {status}\n{out}\n{err}"
    assert status == 1, everything
    assert out == "", everything
    assert err.startswith("pulsar-api: "), everything
    assert err.endswith("\n"), everything
    assert err.count("\n") == 1, everything
    line = err.removeprefix("pulsar-api: ").removesuffix("\n")
    return line.replace(str(folder), "{own}").replace(str(port), "{port}")


def _filled(text: str, places: Mapping[str, str]) -> str:
    for place, value in places.items():
        text = text.replace(place, value)
    return text


def told(folder: Path, *options: str) -> str:
    """Return the one line that refuses the options, parsed in this process.

    It equals the result of `refusal` and takes a thousandth of the time: no process starts.
    """
    out, err = StringIO(), StringIO()
    folder.mkdir(exist_ok=True)
    with (
        reserved() as port,
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as end,
    ):
        Options().parseOptions(_given(folder, options, port))
    return _line(end.value.code, out.getvalue(), err.getvalue(), folder, port)


def refusal(
    folder: Path,
    *options: str,
    before: Sequence[str] = (),
    busy: int | None = None,
    ways: Sequence[str] = tuple(WAYS),
    environ: Mapping[str, str] = os.environ,
) -> str:
    """Start in several ways and return the one line that all of them print.

    Each start has a folder ``{own}`` of state and a port ``{port}``, unless the options
    name others. ``busy`` is a port on which a process listens already. The starts run at
    once, unless they share a state folder, in which they would disturb each other.
    """
    shared = "--state-dir" in options
    said: set[str] = set()
    for together in [[way] for way in ways] if shared else [ways]:
        with ExitStack() as stack:
            starts = []
            for way in together:
                port = stack.enter_context(reserved()) if busy is None else busy
                start = _Start(folder / way, way, options, before, port, environ)
                stack.callback(start.clean_up)
                starts.append(start)
            said.update(start.said(busy=busy is not None) for start in starts)
    assert len(said) == 1, said
    return said.pop()
