"""Try what a task must not be able to do, and print the results as JSON.

The script runs as a task with the account of its app, so it cannot import the project.
Arguments: the state folder, the process numbers of the daemon, of a process of another
account and of the launcher, and the file with the secrets of a task that waits.
"""

import contextlib
import ctypes
import json
import os
import signal
import stat
import sys
from collections.abc import Callable

state = sys.argv[1]
daemon, other, launcher = map(int, sys.argv[2:5])
waiting = sys.argv[5]
shim = os.getppid()
while os.stat(f"/proc/{shim}").st_uid == os.getuid():  # the shell of the command
    with open(f"/proc/{shim}/stat") as file:
        shim = int(file.read().rpartition(")")[2].split()[1])
own = os.environ["PULSAR_TASK_FOLDER"]
libc = ctypes.CDLL(None, use_errno=True)
results: dict[str, str] = {}
_buffer = ctypes.create_string_buffer(8)
HERE = (ctypes.c_size_t * 2)(ctypes.addressof(_buffer), 8)
"""Eight bytes in the form of readv(2), here and at the same address of another process."""


def attempt(what: str, function: Callable[..., object], *arguments: object) -> None:
    """Try one thing, and record its result."""
    try:
        found = function(*arguments)
    except OSError as e:
        results[what] = f"refused: {e.strerror}"
    else:
        results[what] = f"done: {found!r}"


def call(name: str, *arguments: object) -> int:
    """Call a function of the C library."""
    result: int = getattr(libc, name)(*arguments)
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def read(path: str) -> bytes:
    """Return the first bytes of a file."""
    with open(path, "rb", buffering=0) as file:
        return file.read(10)


def change(path: str) -> None:
    """Change a file."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666))


def device(path: str) -> None:
    """Make another node for the device of /dev/null."""
    os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))


for folder in (state, f"{state}/tasks", f"{state}/secrets", own, f"{own}/output.idx"):
    attempt(f"list {folder}", os.listdir, folder)
    attempt(f"open {folder} to the public", os.chmod, folder, 0o777)
    attempt(f"rename {folder}", os.rename, folder, f"{folder}.away")
PROGRAMS = ("shim.pyc", "masker.pyc", "launcher.pyc")
for name in ("auth.db", "pulsar-api.db", "audit.db", "lock", "permits", *PROGRAMS):
    attempt(f"read {name}", read, f"{state}/{name}")
    attempt(f"change {name}", change, f"{state}/{name}")
for name in ("output", "output.idx", "lock", "begun", "exit", "spec", "new"):
    attempt(f"read own {name}", read, f"{own}/{name}")
    attempt(f"change own {name}", change, f"{own}/{name}")
    attempt(f"own FIFO {name}", os.mkfifo, f"{own}/{name}")
    attempt(f"own device {name}", device, f"{own}/{name}")
    attempt(f"own link {name}", os.symlink, "/dev/zero", f"{own}/{name}")
attempt("device where all may write", device, f"/tmp/{os.getpid()}.device")
attempt("read secrets that wait", read, waiting)
attempt("change secrets that wait", change, waiting)
attempt("remove secrets that wait", os.remove, waiting)
attempt("link to secrets that wait", os.link, waiting, f"/tmp/{os.getpid()}.secrets")
WHO = {"daemon": daemon, "shim": shim, "launcher": launcher, "other": other}
for who, pid in WHO.items():
    for number in (signal.SIGTERM, signal.SIGSTOP, signal.SIGKILL):
        attempt(f"send {number.name} to {who}", os.kill, pid, number)
    for name in ("environ", "mem", "maps", "auxv", "stack"):
        attempt(f"read {name} of {who}", read, f"/proc/{pid}/{name}")
    attempt(f"descriptors of {who}", os.listdir, f"/proc/{pid}/fd")
    attempt(f"root of {who}", os.listdir, f"/proc/{pid}/root/")
    attempt(f"trace {who}", call, "ptrace", 16, pid, None, None)
    attempt(f"priority of {who}", os.setpriority, os.PRIO_PROCESS, pid, 19)
    attempt(f"limits of {who}", call, "prlimit", pid, 7, b"\0" * 16, None)
    attempt(f"memory of {who}", call, "process_vm_readv", pid, HERE, 1, HERE, 1, 0)
attempt("become root", os.setuid, 0)
attempt("become the other", os.setuid, os.stat(f"/proc/{other}").st_uid)
attempt("take a group", os.setgroups, [0])
attempt("mount", call, "mount", b"none", b"/mnt", b"tmpfs", 0, None)
attempt("change the root", os.chroot, "/")
for fd in range(3, 256):
    with contextlib.suppress(OSError):
        results[f"inherited {fd}"] = f"done: {os.readlink(f'/proc/self/fd/{fd}')}"
print(json.dumps(results))
