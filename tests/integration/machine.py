"""A machine that a test may break: its processes, its disk, its boot id.

`enter` puts a program into namespaces of its own. The processes and mounts that the program
makes there end with it, even if it is killed, and nothing outside changes.
"""

import fcntl
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path

from tests.integration.daemon import Daemon, wait_for

SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN, fs/ext4/ext4.h
NO_LOG_FLUSH = 2  # EXT4_GOING_FLAGS_NOLOGFLUSH: data that is not in the journal yet is lost
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
STOP_LIMIT = 30.0
"""Seconds in which systemd expects a daemon to end (the unit's ``TimeoutStopSec``)."""
_INSIDE = "PULSAR_TEST_MACHINE"


def command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module in the way of `enter`."""
    options = "--mount --propagation=private --pid --fork --kill-child --mount-proc"
    # A shell is the first process: it collects ended processes, as init does.
    init = ("sh", "-c", 'export "$0=1"; "$@"; exit $?', _INSIDE)
    return ["unshare", *options.split(), *init, sys.executable, "-m", module, *arguments]


def enter(module: str, arguments: Sequence[str]) -> None:
    """Continue as a new process in a machine of its own, unless this is one already."""
    if os.environ.pop(_INSIDE, None) is None:
        started = command(module, *arguments)
        os.execvp(started[0], started)


def end_all() -> None:
    """Kill every process of this machine but this one, and wait until all are gone."""
    with suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)  # spares the first process and the caller (kill(2))
    wait_for(lambda: not _others(), "the end of all processes")


def _others() -> list[int]:
    found = (int(name) for name in os.listdir("/proc") if name.isdigit())
    return [pid for pid in found if pid not in {1, os.getpid()} and alive(pid)]


def stat(pid: int) -> tuple[str, int, int]:
    """Return state, parent and start time of a process, or ("", 0, 0) without it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", 0, 0
    return fields[0], int(fields[1]), int(fields[19])


def alive(pid: int, born: int | None = None) -> bool:
    """Return whether a process runs, and is the one that started at ``born``."""
    state, _, started = stat(pid)
    return state not in {"", "Z", "X"} and born in {None, started}


def send(pid: int, born: int, number: signal.Signals) -> bool:
    """Signal a process if it is the one that started at ``born``. Return whether it was."""
    with suppress(OSError):
        handle = os.pidfd_open(pid)
        try:
            if alive(pid, born):
                signal.pidfd_send_signal(handle, number)
                return True
        finally:
            os.close(handle)
    return False


class Boot:
    """The boot id that every process of this machine sees."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "boot_id"
        self.renew()
        subprocess.run(["mount", "--bind", str(self._file), str(BOOT_ID)], check=True)

    def renew(self) -> None:
        """Change the boot id, as a boot does."""
        self._file.write_text(f"{uuid.uuid4()}\n")


class Disk:
    """A file with ext4 in it. It can be mounted, filled up, and lose its power."""

    def __init__(self, image: Path, at: Path, mib: int = 64, inodes: int = 8192) -> None:
        self.image = image
        self.at = at
        at.mkdir(exist_ok=True)
        with image.open("wb") as file:
            file.truncate(mib << 20)
        # At once, because later a thread of the kernel would write unsynced data.
        at_once = "lazy_itable_init=0,lazy_journal_init=0"
        make = f"mkfs.ext4 -q -F -m 0 -N {inodes} -E {at_once}".split()
        subprocess.run([*make, str(image)], check=True)

    def mount(self, *options: str) -> None:
        """Mount the disk. After a power cut this recovers the journal."""
        chosen = ",".join(("loop", *options))
        subprocess.run(
            ["mount", "-o", chosen, str(self.image), str(self.at)], check=True, timeout=60
        )

    def cut_power(self) -> None:
        """Stop all writing. Data that was not written is lost."""
        folder = os.open(self.at, os.O_RDONLY)
        try:
            fcntl.ioctl(folder, SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
        finally:
            os.close(folder)

    def unmount(self) -> None:
        """Unmount the disk once the kernel has closed the files of killed processes."""
        call = ["umount", str(self.at)]
        wait_for(lambda: subprocess.run(call, check=False).returncode == 0, "the umount")

    def fill(self) -> None:
        """Fill the disk until no byte is free."""
        with (self.at / "filler").open("wb", buffering=0) as file:
            with suppress(OSError):
                while True:
                    os.posix_fallocate(
                        file.fileno(), os.fstat(file.fileno()).st_size, 1 << 20
                    )
            file.seek(0, os.SEEK_END)
            for size in (1 << 16, 1 << 12, 1):
                with suppress(OSError):
                    while True:
                        file.write(bytes(size))

    def ballast(self, left: int) -> None:
        """Take all inodes but ``left`` in advance, so that `use_up` is quick."""
        (self.at / "ballast").mkdir(exist_ok=True)
        while (more := self._free() - left) > 0:
            for _ in range(more):
                (self.at / "ballast" / str(uuid.uuid4())).touch()

    def lighten(self, left: int) -> None:
        """Give back inodes of the ballast until ``left`` are free."""
        names = (self.at / "ballast").iterdir()
        for _ in range(left - self._free()):
            next(names).unlink()

    def use_up(self, left: int) -> None:
        """Take all inodes but ``left``."""
        (self.at / "used").mkdir(exist_ok=True)
        with suppress(OSError):
            while self._free() > left:
                (self.at / "used" / str(uuid.uuid4())).touch()

    def free(self) -> None:
        """Give back the bytes and inodes that were taken."""
        with suppress(FileNotFoundError):
            (self.at / "filler").unlink()
        shutil.rmtree(self.at / "used", ignore_errors=True)

    def _free(self) -> int:
        return os.statvfs(self.at).f_favail


def rise(daemon: Daemon) -> str:
    """Start a daemon that has ended, with a new log. Return the error, or ""."""
    number = int(daemon.log.suffixes[0][1:]) if len(daemon.log.suffixes) > 1 else 0
    daemon.log = daemon.folder / f"daemon.{number + 1}.log"
    try:
        daemon.start()
    except (AssertionError, OSError, HTTPException) as e:
        return str(e)[-500:] or repr(e)
    return ""


def terminate(process: subprocess.Popen[bytes]) -> bool:
    """End a daemon as systemd does. Return whether SIGTERM was enough."""
    process.terminate()
    if within(STOP_LIMIT, lambda: process.poll() is not None):
        return True
    process.kill()
    process.wait()
    return False


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    """Wait until a condition is true. Return whether it became true in time."""
    end = time.monotonic() + seconds
    while not condition():
        left = end - time.monotonic()
        if left <= 0:
            return False
        time.sleep(min(0.02, left))
    return True
