"""Forks shims for the daemon, so that not every task has to start an interpreter.

Run as ``python -I -S launcher.py LIBRARY ROOM``. Descriptor 0 is ``/dev/null``, 3 the
daemon's ``SOCK_SEQPACKET`` socket. LIBRARY is the folder of the library that masks secrets.
ROOM is an argument of spaces: each child overwrites it with the folder of its task, so that
the process table shows which task a shim belongs to.

A message of the daemon is the number of a start and a task's folder, with two descriptors;
or the number of a start and a signal for its shim; or 0, which is sent back. The launcher
answers in order with three numbers: the start, what happened to it, and a value.

The launcher never learns what a task runs. It has a single thread, so that a fork copies
all of it. It ends when the daemon closes the socket or ends; the shims go on.
"""

import _signal  # type: ignore[import-not-found]
import _socket
import errno
import gc
import posix
import select
import sys

if __name__ == "__main__":
    # It is beside this file, where an isolated interpreter does not look by itself.
    sys.path.append(__file__.rpartition("/")[0])
    shim = __import__("shim")
    try:
        # So every shim has it, even after an upgrade has removed the files.
        sys.path.append(sys.argv[1])
        __import__("masker")
    except ImportError:
        pass  # the shim of a task with secrets reports it
    del sys.path[-2:]
else:
    from pulsar_api.shim import shim

STARTED, FAILED, ENDED = range(1, 4)
"""Kinds of answers; their values are a process number, an errno, a status of wait(2)."""

NUMBER = 8
"""Bytes of each number in a message, in little-endian order."""

SOCKET = 3
MOST = NUMBER + 4096  # bytes of a message: a folder may be as long as a path


class Launcher:
    """Forks shims for one daemon."""

    def __init__(self, sock: _socket.socket, ear: int, room: int) -> None:
        self.sock = sock
        self.ear = ear  # can be read when a child has ended
        self.room = room
        self.starts: dict[int, int] = {}  # of each living child, by its process number

    def serve(self) -> tuple[bytes, list[int]] | None:
        """Serve the daemon until it is gone, then return None.

        In each child, return the task's folder and both pipes to the daemon.
        """
        self.tell(0, 0, 0)
        poll = select.poll()
        poll.register(self.sock.fileno(), select.POLLIN)
        poll.register(self.ear, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if self.ear in ready:
                # Before `reap`: a child that ends from now on makes it readable again.
                posix.read(self.ear, 1 << 16)
                self.reap()
            if self.sock.fileno() not in ready:
                continue
            try:
                data, ancillary, _, _ = self.sock.recvmsg(
                    MOST, _socket.CMSG_SPACE(8), _socket.MSG_CMSG_CLOEXEC
                )
            except ConnectionError:
                continue  # it did not read all answers; what it had sent follows
            if not data:
                return None
            number, rest = int.from_bytes(data[:NUMBER], "little"), data[NUMBER:]
            if not number:
                self.tell(0, 0, 0)
            elif len(rest) == 1:
                self.signal(number, rest[0])
            else:
                fds = [
                    int.from_bytes(rights[at : at + 4], sys.byteorder)
                    for _, _, rights in ancillary
                    for at in range(0, len(rights) - 3, 4)
                ]
                if self.start(number, rest, fds):
                    return rest, fds

    def start(self, number: int, folder: bytes, fds: list[int]) -> bool:
        """Fork; return whether this is the child."""
        if len(fds) != 2:  # there was no room for them
            self.tell(number, FAILED, errno.EMFILE)
        elif len(folder) > self.room:
            self.tell(number, FAILED, errno.ENAMETOOLONG)
        else:
            try:
                pid = posix.fork()
            except OSError as e:
                self.tell(number, FAILED, e.errno or errno.EAGAIN)
            else:
                if not pid:
                    return True
                self.starts[pid] = number
                self.tell(number, STARTED, pid)
        for fd in fds:
            posix.close(fd)
        return False

    def signal(self, number: int, signal: int) -> None:
        """Signal a shim. No other process has its number before it is reaped, only here."""
        for pid, start in self.starts.items():
            if start == number:
                posix.kill(pid, signal)

    def reap(self) -> None:
        """Report the shims that have ended, and their status."""
        while self.starts:
            pid, status = posix.waitpid(-1, posix.WNOHANG)
            if not pid:
                return
            self.tell(self.starts.pop(pid), ENDED, status)

    def tell(self, number: int, what: int, value: int) -> None:
        """Send an answer; wait if the daemon does not read."""
        numbers = number, what, value
        try:
            self.sock.send(b"".join(n.to_bytes(NUMBER, "little") for n in numbers))
        except ConnectionError:
            pass  # it is gone; what it had sent is still read


def listen() -> int:
    """Ignore all signals, and return a pipe that is readable when a child has ended.

    A signal to the process group of the daemon, such as Ctrl-C, ends the daemon first, and
    that ends the launcher.
    """
    ear, write_end = posix.pipe2(posix.O_CLOEXEC | posix.O_NONBLOCK)
    _signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    _signal.signal(_signal.SIGCHLD, lambda *_: None)
    ours = {_signal.SIGCHLD, _signal.SIGKILL, _signal.SIGSTOP}
    for number in _signal.valid_signals() - ours:
        _signal.signal(number, _signal.SIG_IGN)
    _signal.pthread_sigmask(_signal.SIG_SETMASK, ())
    return ear


def last_argument() -> tuple[int, int]:
    """Return the address of the last argument of this process, and its length."""
    fields = shim.stat(posix.getpid())[1]
    begin, end = int(fields[45]), int(fields[46])  # 48 and 49 of proc(5)
    arguments = shim.read_file("/proc/self/cmdline")
    room = len(arguments.split(b"\0")[-2])
    if len(arguments) != end - begin:
        raise RuntimeError("the kernel does not say where the arguments are")
    return end - room - 1, room


def become_shim(folder: bytes, fds: list[int], begin: int, room: int) -> int:
    """Run as ``python -I -S shim.py FOLDER`` would, and return the exit status."""
    _signal.set_wakeup_fd(-1)
    # By this argument the daemon knows a shim that has no lock yet and whose launcher is
    # dead. It is set before the shim makes its session, as else the shim would be taken for
    # a process that a task has left.
    text = folder.rjust(room)
    if len(folder) < room:
        text = (b"\0" + folder).rjust(room)
    shim.c_function("memmove", shim.LongLong(begin), text, shim.LongLong(room))
    posix.dup2(fds[0], 1)
    posix.dup2(fds[1], 2)
    posix.closerange(SOCKET, max(fds) + 1)
    gc.enable()
    status: int = shim.main(
        folder.decode(sys.getfilesystemencoding(), sys.getfilesystemencodeerrors())
    )
    return status


def main() -> int:
    """Serve the daemon, and return an exit status; in each child, that of a shim."""
    begin, room = last_argument()
    sock = _socket.socket(fileno=SOCKET)
    launcher = Launcher(sock, listen(), room)
    # A collection would write to, and so copy, memory that shims share with this process.
    gc.disable()
    gc.collect()
    gc.freeze()
    found = launcher.serve()
    if found is None:
        return 0
    sock.detach()  # its destructor would close a descriptor of the shim
    return become_shim(*found, begin, room)


if __name__ == "__main__":
    status = 1
    try:
        status = main()
    except BaseException:  # noqa: BLE001 - as the interpreter itself does
        sys.excepthook(*sys.exc_info())
    finally:
        posix._exit(status)  # without the handlers of the interpreter
