"""Stands between the daemon and one command: keeps its output, its end, its whole tree.

Run as ``python -I -S shim.py FOLDER``; what to do is in ``FOLDER/spec``. The daemon may
die and come back at any moment: everything that counts is in files (see docs).

Its start is paid for each task, so it imports only what is built into the interpreter or
very small: ``posix`` rather than ``os``, ``_signal`` rather than ``signal``. Nothing is
imported after the start, so an upgrade may remove this file while a task runs.
"""

import _ctypes
import _signal  # type: ignore[import-not-found]
import errno
import fcntl
import posix
import resource
import select
import sys
import time

# Codes of the records in ``output.idx`` (and on the pipe to the daemon).
READY, STDOUT, STDERR, STARTED, TERM_SENT, KILL_SENT, CLOCK = range(7)
RECORD = 16

TAKEN = 75  # the exit status of a shim that finds another one at its task

PIPE_SIZE = 1 << 20
READ_SIZE = 1 << 19
PATIENCE = 1.0  # seconds that background children may hold the pipes after the end
KILL_PATIENCE = 5.0  # seconds after KILL; a process in the kernel cannot be ended
ROUNDS = 20  # in which TERM goes to those that were born in the round before
RETRY = 0.25  # seconds until the next try when the disk is full
PR_SET_CHILD_SUBREAPER = 36
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MEMORY = 1 << 23  # bytes that may be kept for later use
PUNCH_HOLE = 3  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
BLOCK = 4096
ELSEWHERE = (errno.ENOENT, errno.ENOTDIR, errno.EACCES)
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


class Spec:
    """What to run, from the file ``spec``: fields, each with its length before it."""

    def __init__(self, data: bytes) -> None:
        fields = split(data)
        self.grace, self.total, self.silence = (float(field) for field in fields[:3])
        numbers = [int(field) for field in fields[3:8]]
        self.limit, self.umask, self.files, count, secrets = numbers
        self.library, self.directory = fields[8:10]
        self.arguments = fields[10 : 10 + count]
        self.secrets = fields[10 + count : 10 + count + secrets]
        pairs = fields[10 + count + secrets :]
        self.environment = dict(zip(pairs[::2], pairs[1::2], strict=True))


def split(data: bytes) -> list[bytes]:
    """Return the fields of a ``spec``; `ValueError` if it does not end with one.

    The first of them says how many there are.
    """
    fields, at = [], 0
    while at < len(data):
        begin = at + 8
        at = begin + int.from_bytes(data[at:begin], "little")
        fields.append(data[begin:at])
    if at != len(data) or not fields or int(fields[0]) != len(fields) - 1:
        raise ValueError("the file spec is not whole")
    return fields[1:]


class CannotStart(Exception):
    """The command was never started; the message says why."""


def text(data: bytes) -> str:
    """Return bytes as they can be shown in one line."""
    return data.decode("utf-8", "replace").replace("\n", " ")


def read_file(name: bytes | str) -> bytes:
    """Return all of a small file."""
    with open(name, "rb", buffering=0) as file:
        return file.readall()


def incomplete(data: bytes) -> int:
    """Return how many bytes at the end begin a UTF-8 character and do not finish it."""
    for back in range(1, min(3, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 != 0x80:
            need = 2 if 0xC2 <= byte < 0xE0 else 3 if 0xE0 <= byte < 0xF0 else 0
            need = 4 if 0xF0 <= byte < 0xF5 else need
            return back if need > back else 0
    return 0


def process(pid: int) -> tuple[int, int]:
    """Return a process's parent and when it was started; zeros if it is no more.

    One that has ended and waits for its parent counts: it may be the first thread of a
    process whose others go on.
    """
    try:
        # The name in the second field may hold anything, also ") Z 1" (proc(5)).
        fields = read_file(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    except OSError:
        return 0, 0
    return int(fields[1]), int(fields[19])


def descendants() -> list[tuple[int, int]]:
    """Return all processes below this one, each with its time of start.

    None escapes: this process is their subreaper, so one that loses its parent becomes a
    child of ours, whatever its group or session.
    """
    children: dict[int, list[tuple[int, int]]] = {}
    for name in posix.listdir("/proc"):
        if name.isdigit():
            parent, start = process(int(name))
            children.setdefault(parent, []).append((int(name), start))
    found: list[tuple[int, int]] = []
    new = children.get(posix.getpid(), [])
    while new:
        found += new
        new = [child for pid, _ in new for child in children.get(pid, [])]
    return found


def signal_process(pid: int, start: int, *numbers: int) -> None:
    """Signal a descendant, and never a stranger that got its number meanwhile."""
    try:
        handle = posix.pidfd_open(pid)
    except OSError:
        return
    try:
        # From here on the handle, not the number, says who is meant.
        if process(pid)[1] == start:
            for number in numbers:
                _signal.pidfd_send_signal(handle, number)
    except OSError:
        pass  # it ended by itself, or became somebody else (setuid)
    finally:
        posix.close(handle)


class LongLong(_ctypes._SimpleCData):  # type: ignore[type-arg]
    """A number of 64 bits for a function of C."""

    _type_ = "q"


def c_function(name: str, *arguments: object) -> int:
    """Call a function of the C library that Python does not offer."""
    library = _ctypes.dlopen(None, 0)  # type: ignore[arg-type]
    address = _ctypes.dlsym(library, name)
    result: int = _ctypes.call_function(address, arguments)
    return result


def punch(fd: int, start: int, end: int) -> bool:
    """Give the disk space of a part of a file back; it reads as zeros (fallocate(2))."""
    length = LongLong(end - start)
    return c_function("fallocate64", fd, PUNCH_HOLE, LongLong(start), length) == 0


class Clear:
    """What a stream goes through if there is nothing to mask (see ``mask.py``)."""

    def feed(self, data: bytes) -> bytes:
        """Return it as it is."""
        return data

    def close(self) -> bytes:
        """Return nothing: nothing is held back."""
        return b""


def masker(secrets: list[bytes], library: bytes) -> Clear:
    """Return what masks some texts in one stream."""
    if not secrets:
        return Clear()
    # It lies beside this file. An isolated interpreter does not look there by itself, nor
    # where the library is that it needs: last, as much else may be there.
    path = sys.path[:]
    sys.path.insert(0, __file__.rpartition("/")[0])
    sys.path.append(library.decode("utf-8", "surrogateescape"))
    found: Clear = __import__("mask").Masker(secrets)
    sys.path[:] = path
    return found


class Stream:
    """One of the command's two pipes."""

    def __init__(self, code: int, mask: Clear) -> None:
        self.code = code
        self.mask = mask
        self.taken = 0  # bytes that were read, as they came
        self.fd, self.write_end = posix.pipe2(posix.O_CLOEXEC)
        self.held = b""
        try:
            fcntl.fcntl(self.fd, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
        except OSError:
            pass  # a user has a limited amount of pipe; the usual size works too
        posix.set_blocking(self.fd, False)

    def read(self) -> bytes:
        """Return what can be kept now; at the end of the stream close it.

        A character that is not complete yet is held back, so that the two streams never
        cut into each other's characters; so is what may be the begin of a secret.
        """
        try:
            data = posix.read(self.fd, READ_SIZE)
        except BlockingIOError:
            return b""
        if not data:
            return self.close()
        self.taken += len(data)
        data = self.held + self.mask.feed(data)
        keep = len(data) - incomplete(data)
        self.held = data[keep:]
        return data[:keep]

    def close(self) -> bytes:
        """Stop reading and return what was held back."""
        if self.fd >= 0:
            posix.close(self.fd)
        self.fd = -1
        held, self.held = self.held + self.mask.close(), b""
        return held


class Shim:
    """One run: from the start of the command to the file ``exit``."""

    def __init__(self, spec: Spec, wakeup: int, folder: int) -> None:
        self.spec = spec
        self.folder = folder
        self.wakeup = wakeup
        self.began = time.monotonic()
        flags = posix.O_WRONLY | posix.O_CREAT | posix.O_APPEND | posix.O_CLOEXEC
        self.output = posix.open("output", flags, 0o600)
        self.index = posix.open("output.idx", flags, 0o600)
        self.size = 0
        # Of more than the limit its first half is kept, and its last.
        self.head = spec.limit // 2 // BLOCK * BLOCK
        self.cut = self.head  # where what is cut ends
        self.cut_step = max(BLOCK, spec.limit // 16 // BLOCK * BLOCK)
        self.backlog: list[tuple[int, bytes]] = []  # (code, what is not written yet)
        self.records = b""  # for output.idx, not written yet
        self.news = b""  # a record that the daemon's pipe had no room for
        self.daemon = 1
        self.streams = [
            Stream(code, masker(spec.secrets, spec.library)) for code in (STDOUT, STDERR)
        ]
        self.pid = 0
        self.status: int | None = None
        self.ended_at = 0.0  # seconds since the epoch
        self.last_output = self.began
        self.pipes_until = 0.0  # patience with the pipes, once the command has ended
        self.cause = "itself"
        self.kill_at = 0.0  # when TERM turns into KILL; 0: nobody asked
        self.killed_at = 0.0
        self.asked = False
        self.children = True  # whether any descendant may be left

    # -- writing

    def keep(self, code: int, data: bytes) -> None:
        """Write what a stream brought, or let it wait for room on the disk."""
        if data:
            self.backlog.append((code, data))
        self.flush()

    def note(self, code: int, number: int) -> None:
        """Append a record: ``number`` and when, and tell the daemon the same."""
        self.record(code, number)
        self.flush()

    def record(self, code: int, number: int) -> None:
        """Let a record wait to be written."""
        since = int((time.monotonic() - self.began) * 1000)
        self.records += number.to_bytes(8, "little")
        self.records += (since << 8 | code).to_bytes(8, "little")

    def flush(self) -> None:
        """Write what waits; if the disk is full leave it, and the command waits too."""
        try:
            while self.records or self.backlog:
                if self.records:
                    # Never in part: 16 divides the size of a block.
                    posix.write(self.index, self.records)
                    records, self.records = self.records, b""
                    self.tell(records)
                    continue
                code, data = self.backlog[0]
                written = posix.write(self.output, data)
                self.size += written
                self.backlog[0] = (code, data[written:])
                if written == len(data):
                    del self.backlog[0]
                    self.record(code, self.size)
                    self.trim()
        except OSError as e:
            if e.errno not in NO_SPACE:
                raise

    def trim(self) -> None:
        """Cut the middle out of an output that has become too large.

        Offsets stay what they are: the middle becomes a hole. The file ``cut`` says from
        where to where, and it says so before it is true.
        """
        if not self.spec.limit or self.size <= self.spec.limit:
            return
        end = (self.size - self.spec.limit // 2) // BLOCK * BLOCK
        if end < self.cut + self.cut_step:
            return
        self.announce_cut(end)
        if punch(self.output, self.cut, end):
            self.cut = end
        else:
            # The file system cannot do it: keep all rather than lose some unannounced.
            # What was cut before stays announced.
            self.spec.limit = 0
            if self.cut > self.head:
                self.announce_cut(self.cut)
            else:
                posix.unlink("cut", dir_fd=self.folder)

    def announce_cut(self, end: int) -> None:
        """Say from where to where the output is cut."""
        write_synced(self.folder, "cut.tmp", b"%d %d\n" % (self.head, end))
        posix.rename("cut.tmp", "cut", src_dir_fd=self.folder, dst_dir_fd=self.folder)

    def tell(self, record: bytes) -> None:
        """Send news to the daemon, the newest if it reads slowly, none if it is gone."""
        if self.daemon < 0:
            return
        self.news = b""
        try:
            posix.write(self.daemon, record)
        except BlockingIOError:
            self.news = record
        except OSError:
            self.daemon = -1

    @property
    def waiting(self) -> bool:
        """Whether something is not on disk yet."""
        return bool(self.backlog or self.records)

    # -- the command

    def start(self) -> None:
        """Start the command, or raise `CannotStart`."""
        spec = self.spec
        name = spec.arguments[0]
        try:
            posix.chdir(spec.directory or ".")
        except (OSError, ValueError) as e:  # ValueError: NUL
            why = getattr(e, "strerror", e)
            raise CannotStart(f"cannot enter {text(spec.directory)}: {why}") from e
        posix.umask(spec.umask)
        if spec.files:
            hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            resource.setrlimit(resource.RLIMIT_NOFILE, (spec.files, hard))
        candidates = [name]
        if b"/" not in name:
            folders = spec.environment.get(b"PATH", b"/usr/local/bin:/usr/bin:/bin")
            candidates = [f + b"/" + name for f in folders.split(b":") if f]
        problem = "not found in PATH" if name else "the name is empty"
        for path in candidates if name else ():
            try:
                self.pid = self.spawn(path)
                break
            except OSError as e:
                # As execvp(3): what cannot be run may stand in a later folder of PATH.
                if b"/" in name or e.errno not in ELSEWHERE:
                    problem = str(e.strerror)
                    break
                if e.errno == errno.EACCES:
                    problem = str(e.strerror)
        for stream in self.streams:
            posix.close(stream.write_end)
        if not self.pid:
            raise CannotStart(f"cannot start {text(name)}: {problem}")
        self.note(CLOCK, int(time.time() * 1000))
        self.note(STARTED, self.pid)

    def spawn(self, path: bytes) -> int:
        out, err = (stream.write_end for stream in self.streams)
        try:
            return posix.posix_spawn(
                path,
                self.spec.arguments,
                self.spec.environment,
                file_actions=[
                    (posix.POSIX_SPAWN_OPEN, 0, "/dev/null", posix.O_RDONLY, 0),
                    (posix.POSIX_SPAWN_DUP2, out, 1),
                    (posix.POSIX_SPAWN_DUP2, err, 2),
                ],
                setpgroup=0,
                setsigmask=(),
                setsigdef=range(1, 32),
            )
        except ValueError as e:  # NUL in an argument, = in the name of a variable
            name = text(self.spec.arguments[0])
            raise CannotStart(f"cannot start {name}: {e}") from e

    def reap(self) -> bool:
        """Take what has ended; return whether any descendant may be left."""
        while True:
            try:
                pid, status = posix.waitpid(-1, posix.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == self.pid:
                self.status = status
                self.ended_at = time.time()
                self.pipes_until = time.monotonic() + PATIENCE

    # -- ending it

    def ask(self, cause: str) -> None:
        """Begin to end the tree: TERM to every process, also to those that escaped."""
        if self.kill_at:
            return
        if self.status is None:
            self.cause = cause
        self.kill_at = time.monotonic() + self.spec.grace
        self.note(TERM_SENT, self.size)
        told: set[tuple[int, int]] = set()
        for _ in range(ROUNDS):
            new = [found for found in descendants() if found not in told]
            for pid, start in new:
                # CONT: a stopped process would not notice.
                signal_process(pid, start, _signal.SIGTERM, _signal.SIGCONT)
            told.update(new)
            if not new:
                break

    def kill(self, now: float) -> None:
        """KILL whatever is left of the tree, again until nothing is."""
        if not self.killed_at:
            self.killed_at = now
            self.note(KILL_SENT, self.size)
        for pid, start in descendants():
            signal_process(pid, start, _signal.SIGKILL)

    def check_clocks(self, now: float) -> None:
        """Act on every deadline that has come."""
        spec = self.spec
        if self.waiting:
            self.last_output = now  # it might print if it could
        if self.asked:
            self.ask("kill")
        elif self.status is None and not self.kill_at:
            if spec.total and now >= self.began + spec.total:
                self.ask("timeout")
            elif spec.silence and now >= self.last_output + spec.silence:
                self.ask("silence")
        if self.kill_at and self.children and now >= self.kill_at:
            self.kill(now)

    def wait_for(self, now: float) -> float:
        """Return the seconds until the next deadline; negative: none."""
        spec, deadlines = self.spec, []
        if self.waiting:
            deadlines.append(now + RETRY)
        elif self.status is not None and self.pipes_until > now:
            deadlines.append(self.pipes_until)
        if self.status is None and not self.kill_at:
            if spec.total:
                deadlines.append(self.began + spec.total)
            if spec.silence:
                deadlines.append(self.last_output + spec.silence)
        if self.kill_at and self.children:
            deadlines.append(max(self.kill_at, now + 0.02))
        return max(0.0, min(deadlines) - now) if deadlines else -1.0

    def over(self, now: float) -> bool:
        """Return whether there is nothing left to wait for."""
        if self.waiting:
            return False
        if self.status is None or (self.kill_at and self.children):
            # Killed, yet in the kernel for good: nobody can wait for that.
            return bool(self.killed_at) and now >= self.killed_at + KILL_PATIENCE
        return now >= self.pipes_until or all(s.fd < 0 for s in self.streams)

    def run(self) -> None:
        """Copy, watch and wait until it is over."""
        while True:
            now = time.monotonic()
            self.check_clocks(now)
            if self.over(now):
                break
            self.poll(self.wait_for(now))
            self.children = self.reap()
        for stream in self.streams:
            # What is in the pipe now was printed before the end; a background child that
            # goes on printing must not keep us.
            until, before = stream.taken + PIPE_SIZE, -1
            while stream.fd >= 0 and before < stream.taken < until:
                before = stream.taken
                data = stream.read()
                if data:
                    self.backlog.append((stream.code, data))
            self.keep(stream.code, stream.close())
        while not self.over(time.monotonic()):
            self.wait(self.wait_for(time.monotonic()))

    def wait(self, seconds: float) -> None:
        """Let some time pass, deaf to nothing."""
        self.poll(seconds)
        self.check_clocks(time.monotonic())
        self.children = self.reap()

    def poll(self, seconds: float) -> None:
        """Wait for output, a signal or a deadline, and deal with it."""
        poll = select.poll()
        poll.register(self.wakeup, select.POLLIN)
        open_streams = [] if self.waiting else [s for s in self.streams if s.fd >= 0]
        for stream in open_streams:
            poll.register(stream.fd, select.POLLIN)
        if self.news:
            poll.register(self.daemon, select.POLLOUT)
        ready = {fd for fd, _ in poll.poll(None if seconds < 0 else seconds * 1000 + 1)}
        if self.wakeup in ready:
            self.asked |= _signal.SIGTERM in posix.read(self.wakeup, 4096)
        if self.news and self.daemon in ready:
            self.tell(self.news)
        self.flush()
        for stream in open_streams:
            if stream.fd in ready:
                self.last_output = time.monotonic()
                self.keep(stream.code, stream.read())

    def finish(self, error: str = "") -> None:
        """Write ``exit``: all or nothing, and only when the output is safe."""
        status = self.status
        lines = [
            b"ended %r" % (self.ended_at or time.time()),
            b"cause " + self.cause.encode(),
            b"forced %d" % bool(self.killed_at),
            b"size %d" % self.size,
        ]
        if error:
            lines.append(b"error " + error.encode("utf-8", "replace"))
        elif status is None:
            lines.append(b"error The command does not end, not even by KILL.")
        elif posix.WIFSIGNALED(status):
            lines.append(b"signal %d" % posix.WTERMSIG(status))
        else:
            lines.append(b"code %d" % posix.WEXITSTATUS(status))
        result = b"\n".join([*lines, b""])
        while True:
            try:
                if self.size:
                    posix.fdatasync(self.output)
                    posix.fdatasync(self.index)
                write_synced(self.folder, "exit.tmp", result)
                break
            except OSError as e:
                if e.errno not in NO_SPACE:
                    raise
                self.wait(RETRY)
        posix.rename("exit.tmp", "exit", src_dir_fd=self.folder, dst_dir_fd=self.folder)
        posix.fsync(self.folder)


def write_synced(folder: int, name: str, data: bytes) -> None:
    """Write a file and wait until it is on disk."""
    flags = posix.O_WRONLY | posix.O_CREAT | posix.O_TRUNC | posix.O_CLOEXEC
    fd = posix.open(name, flags, 0o600, dir_fd=folder)
    try:
        posix.write(fd, data)
        posix.fsync(fd)
    finally:
        posix.close(fd)


def become_subreaper() -> None:
    """Make every orphan below this process a child of it (prctl(2))."""
    c_function("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def keep_memory() -> None:
    """Reuse the memory of pieces that were read, rather than give it back (mallopt(3)).

    Else the kernel makes it anew for each, which halves the throughput.
    """
    try:
        c_function("mallopt", M_MMAP_THRESHOLD, MEMORY)
        c_function("mallopt", M_TRIM_THRESHOLD, MEMORY)
    except (OSError, AttributeError):
        pass  # it is glibc's; without it all works, too


def main(folder: str) -> int:
    """Run the task of a folder, once: a second start finds the lock and does nothing."""
    posix.setsid()
    wakeup, write_end = posix.pipe2(posix.O_CLOEXEC | posix.O_NONBLOCK)
    _signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    for number in (_signal.SIGTERM, _signal.SIGCHLD):
        _signal.signal(number, lambda *_: None)
    for number in (_signal.SIGHUP, _signal.SIGINT, _signal.SIGQUIT):
        _signal.signal(number, _signal.SIG_IGN)
    posix.chdir(folder)
    # Whoever cannot get this lock knows that the task is alive. The name appears with the
    # lock held, and it stays: there is no second start, neither by mistake nor in a race.
    name = f"lock.{posix.getpid()}"
    flags = posix.O_RDWR | posix.O_CREAT | posix.O_EXCL | posix.O_CLOEXEC
    lock = posix.open(name, flags, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    posix.write(lock, b"%d\n" % posix.getpid())
    try:
        posix.link(name, "lock")
    except FileExistsError:
        return TAKEN
    finally:
        posix.unlink(name)
    posix.set_blocking(1, False)
    become_subreaper()
    keep_memory()
    here = posix.open(".", posix.O_RDONLY | posix.O_CLOEXEC)
    shim = Shim(Spec(read_file("spec")), wakeup, here)
    # From here on a TERM is understood.
    shim.tell(bytes(8) + READY.to_bytes(8, "little"))
    # It may hold secrets, and it is not needed twice; nor are those of who waits.
    posix.unlink("spec")
    try:
        posix.unlink("secrets")
    except FileNotFoundError:
        pass
    try:
        shim.start()
    except CannotStart as e:
        shim.finish(str(e))
    else:
        shim.run()
        shim.finish()
    return 0


if __name__ == "__main__":
    done = main(sys.argv[1])
    if sys.flags.isolated:
        # All is on disk, and taking an interpreter down in order costs 2 ms per task.
        posix._exit(done)
    sys.exit(done)
