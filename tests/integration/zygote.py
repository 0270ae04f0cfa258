"""Starts daemons and commands by a fork instead of an interpreter each.

An interpreter that imports all of Twisted needs a second; most tests start one. So each
process of pytest has one *zygote*: an interpreter that has imported everything and forks
when it is asked to. What it forks is the child of the process of pytest, by
``CLONE_PARENT``, so that `Popen` waits for it and signals it as for any other.

`Popen` and `run` are those of `subprocess`, and start the real program for everything but
``python -m pulsar_api``, ``twistd`` and ``python -c`` in a usual environment. With
``PULSAR_ZYGOTE=0`` in the environment, or when coverage is measured, they always do.
"""

import array
import atexit
import ctypes
import gc
import inspect
import io
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

DAEMON = (sys.executable, "-m", "pulsar_api")
"""The daemon in the foreground."""

PULSAR_API = (sys.executable, "-c", "from pulsar_api.cli.main import main; main()")
"""The command ``pulsar-api``."""

TWISTD = (str(Path(sys.executable).with_name("twistd")),)
"""Twisted's own program, with which the daemon can be started as well."""

_SCRIPT = PULSAR_API[:2]
_PROGRAMS = (DAEMON, TWISTD, _SCRIPT)
"""What can be started by a fork: two programs, and any script after ``-c``."""

_ROOT = Path(__file__).parents[2]
_LIMITS = [name for name in dir(resource) if name.startswith("RLIMIT_")]


def _shapes_the_interpreter(name: str) -> bool:
    """Return whether a variable counts when Python starts, or when it imports."""
    own = name.startswith(("PYTHON", "LC_", "LD_", "MALLOC_")) or name in {"LANG", "TZ"}
    return own and name not in {"PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE"}


def _shape(environ: Mapping[str, str]) -> dict[str, str]:
    return {k: v for k, v in environ.items() if _shapes_the_interpreter(k)}


class Zygote:
    """The zygote of this process, which ends with it."""

    def __init__(self) -> None:
        self.shape = _shape(os.environ)
        self._lock = threading.Lock()
        self._sock, other = socket.socketpair()
        with other:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(other.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[other.fileno()],
                cwd="/",
            )
        atexit.register(self.close)

    def close(self) -> None:
        """End it."""
        self._sock.close()
        self._process.wait()

    def fork(self, request: Mapping[str, object], fds: list[int]) -> int:
        """Return the process number of a new child of this process."""
        data = json.dumps(request).encode()
        reads, writes = os.pipe()
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [*fds, writes]))
        with open(reads, "rb") as answer:
            try:
                with self._lock:
                    self._sock.sendmsg([len(data).to_bytes(8, "big")], [rights])
                    self._sock.sendall(data)
            finally:
                os.close(writes)
            return int(answer.read())


_zygote: Zygote | None = None


def _running() -> Zygote:
    global _zygote  # noqa: PLW0603 - one for all tests of this process
    if _zygote is None:
        _zygote = Zygote()
    return _zygote


def _inherited() -> set[int]:
    """Return the descriptors that a program which is started now would inherit."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # that of the folder
            if int(name) > 2 and os.get_inheritable(int(name)):
                found.add(int(name))
    return found


_INHERITED = _inherited()
"""What whoever started pytest left open, which is no test's business."""


class Popen(subprocess.Popen[Any]):
    """`subprocess.Popen`, with a fork where that is the same and not ``real``."""

    started: ClassVar[list["Popen"]] = []
    """All that there were, for whoever ends what a test has left."""

    def __init__(self, args: Any, *, real: bool = False, **more: Any) -> None:
        self._real = real
        super().__init__(args, **more)
        self.started.append(self)

    def _execute_child(self, *given: Any) -> None:
        start = super()._execute_child  # type: ignore[misc]
        asked = inspect.signature(start).bind(*given).arguments
        environ = os.environ if asked["env"] is None else asked["env"]
        program = None if self._real else self._forkable(asked, environ)
        if program is None:
            start(*given)
            return
        request = {
            "program": program,
            "arguments": list(map(os.fspath, asked["args"]))[len(program) :],
            "environ": dict(environ),
            "cwd": os.fspath(asked["cwd"] or os.getcwd()),
            "umask": asked["umask"],
            "session": asked["start_new_session"],
            "limits": {n: resource.getrlimit(getattr(resource, n)) for n in _LIMITS},
        }
        fds = [
            number if asked[name] == -1 else asked[name]
            for number, name in enumerate(("p2cread", "c2pwrite", "errwrite"))
        ]
        self.pid = _running().fork(request, fds)
        self._child_created = True
        names = "p2cread p2cwrite c2pread c2pwrite errread errwrite".split()
        self._close_pipe_fds(*(asked[n] for n in names))  # type: ignore[attr-defined]

    @staticmethod
    def _forkable(
        asked: Mapping[str, Any], environ: Mapping[str, str]
    ) -> tuple[str, ...] | None:
        """Return how the command line begins, None if it has to be a real start."""
        if os.environ.get("PULSAR_ZYGOTE") == "0" or "COVERAGE_PROCESS_CONFIG" in environ:
            return None
        args = asked["args"]
        if isinstance(args, (str, bytes, os.PathLike)):
            return None
        program = next((p for p in _PROGRAMS if tuple(args[: len(p)]) == p), None)
        plain = (
            asked["preexec_fn"] is None
            and not asked["pass_fds"]
            and not asked["shell"]
            and (asked["gid"], asked["gids"], asked["uid"]) == (None, None, None)
            and asked["process_group"] == -1
            and asked["executable"] is None
            and _shape(environ) == _running().shape
            and (asked["close_fds"] or _inherited() <= _INHERITED)
        )
        return program if plain else None


def run(
    args: Any,
    *,
    input: Any = None,
    capture_output: bool = False,
    timeout: float | None = None,
    check: bool = False,
    **more: Any,
) -> subprocess.CompletedProcess[Any]:
    """Run a program to its end as `subprocess.run` does.

    Raises:
        subprocess.CalledProcessError: with ``check``, it failed.
        subprocess.TimeoutExpired: it did not end in time, and was killed.

    """
    if input is not None:
        more["stdin"] = subprocess.PIPE
    if capture_output:
        more["stdout"] = more["stderr"] = subprocess.PIPE
    with Popen(args, **more) as process:
        try:
            out, err = process.communicate(input, timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(args, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done


# What follows runs in the zygote, and in what it forks.


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = sock.recv(size - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data


def _request(sock: socket.socket) -> tuple[dict[str, Any], list[int]]:
    size, fds, _, _ = socket.recv_fds(sock, 8, 4)
    if not size:
        raise EOFError
    size += _exactly(sock, 8 - len(size))
    return json.loads(_exactly(sock, int.from_bytes(size, "big"))), list(fds)


_LIBC = ctypes.PyDLL(None)  # which keeps the lock of the interpreter over a call
_PR_GET_TID_ADDRESS = 40
_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE_PARENT = 0x8000
_CLONE_CHILD_CLEARTID = 0x200000
_CLONE_CHILD_SETTID = 0x1000000


def _fork() -> int:
    """Fork a child of this process's parent, as `os.fork` forks one of its own."""
    address = ctypes.c_void_p()
    flags = _CLONE_PARENT | signal.SIGCHLD
    # Where the C library keeps the number of the thread, which is another one in the child.
    if _LIBC.prctl(_PR_GET_TID_ADDRESS, ctypes.byref(address), 0, 0, 0) == 0:
        flags |= _CLONE_CHILD_SETTID | _CLONE_CHILD_CLEARTID
    tid = ctypes.c_long(address.value or 0)
    null = ctypes.c_long(0)
    call = ctypes.c_long(_CLONE[os.uname().machine])
    # Of the last two, which is the thread's number depends on the processor.
    last = (tid, null) if os.uname().machine == "x86_64" else (null, tid)
    ctypes.pythonapi.PyOS_BeforeFork()
    pid: int = _LIBC.syscall(call, ctypes.c_long(flags), null, null, *last)
    if pid == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
    else:
        ctypes.pythonapi.PyOS_AfterFork_Parent()
    return pid


def _import_all() -> None:
    """Import what daemons and commands need, also what they import later."""
    import importlib

    for name in (
        "pulsar_api.__main__",
        "pulsar_api.tap",
        "pulsar_api.cli.main",
        "twisted.scripts.twistd",
        *("sqlite3", "encodings.idna", "html.parser", "zoneinfo", "multiprocessing"),
        *("twisted.plugin", "twisted.internet.endpoints", "twisted.python.threadpool"),
        *("twisted.internet.process", "twisted.web.static", "twisted.web.wsgi"),
        *("twisted.logger._legacy", "twisted.python.logfile", "twisted.names.client"),
        *("twisted.application.internet", "twisted.application.strports"),
        *(
            "twisted.internet._signals",
            "twisted.scripts._twistd_unix",
            "twisted.cred.checkers",
        ),
    ):
        try:
            importlib.import_module(name)
        except ImportError:  # of another version
            continue
    from twisted.application.service import IServiceMaker
    from twisted.plugin import getPlugins

    list(getPlugins(IServiceMaker))  # twistd looks through all of them


def _become(request: Mapping[str, Any], fds: list[int], answer: int) -> None:
    """Be what a new interpreter would be for this request."""
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
    # Klein makes the reactor when it is imported; this process needs one of its own.
    reactor: Any = sys.modules["twisted.internet.reactor"]
    reactor._poller.close()
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2 and fd != answer:
            with suppress(OSError):  # that of the folder
                os.close(fd)
    reactor.__init__()
    for name, (soft, hard) in request["limits"].items():
        if resource.getrlimit(getattr(resource, name)) != (soft, hard):
            resource.setrlimit(getattr(resource, name), (soft, hard))
    if request["session"]:
        os.setsid()
    if request["umask"] >= 0:
        os.umask(request["umask"])
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environ"])
    time.tzset()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    program = tuple(request["program"])
    if program == DAEMON:
        sys.path[0] = os.getcwd()
        sys.argv = [str(_ROOT / "pulsar_api" / "__main__.py"), *request["arguments"]]
    elif program == TWISTD:
        sys.path[0] = str(Path(TWISTD[0]).parent)
        sys.argv = [TWISTD[0], *request["arguments"]]
    else:
        sys.path[0] = ""
        sys.argv = ["-c", *request["arguments"][1:]]
    sys.dont_write_bytecode = "PYTHONDONTWRITEBYTECODE" in os.environ
    for stream in (sys.stdout, sys.stderr):
        assert isinstance(stream, io.TextIOWrapper)
        at_once = "PYTHONUNBUFFERED" in os.environ
        lines = stream is sys.stderr or stream.isatty()
        stream.reconfigure(line_buffering=lines, write_through=at_once)


def _serve(sock: socket.socket) -> Mapping[str, Any]:
    """Fork for each request; return it in the child, which has become a new program."""
    while True:
        try:
            request, fds = _request(sock)
        except (EOFError, ConnectionError):
            raise SystemExit from None
        pid = _fork()
        if pid == 0:
            sock.detach()
            _become(request, fds[:3], fds[3])
            # Now it is what it will be, as a program is when `subprocess` returns.
            os.write(fds[3], b"%d" % os.getpid())
            os.close(fds[3])
            return request
        for fd in fds:
            os.close(fd)
        if pid < 0:
            raise SystemExit("no process can be forked")


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest to handle
    sys.path[0] = str(_ROOT)
    sock = socket.socket(fileno=int(sys.argv[1]))
    _import_all()
    gc.collect()
    gc.freeze()
    request = _serve(sock)
    program = tuple(request["program"])
    if program == DAEMON:
        sys.modules["pulsar_api.__main__"].main()
    elif program == TWISTD:
        sys.modules["twisted.scripts.twistd"].run()
    else:
        exec(request["arguments"][0], {"__name__": "__main__"})


if __name__ == "__main__":
    _main()
