"""Runs one command for the daemon: keeps its output and result, and ends its processes.

Run as ``python -I -S shim.py FOLDER``; ``FOLDER/spec`` says what to run. The daemon may die
and restart at any moment, so everything that matters is in files (see the docs).

`Shim` is one run. It has a `Recorder` of the output, the `Command`, the `Tree` of its
processes, and the `Deadlines`.

Each task pays for its start, so it imports only modules that are built into the interpreter
or very small: ``posix`` and not ``os``, ``_signal`` and not ``signal``. Nothing is imported
after the start, so an upgrade may remove this file while a task runs.
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
OVER = 7  # on the pipe only: the task has ended, but the shim stays
RECORD = 16

VERSION = b"spec 3"  # the first field of a ``spec``
RESULT = b"version 2"  # the first line of a result that has ``end`` as its last one

TAKEN = 75  # the exit status of a shim whose task another shim has taken

PIPE_SIZE = 1 << 20
READ_SIZE = 1 << 19
DROP_SIZE = 1 << 16
PATIENCE = 3.0  # seconds without output after the end until held pipes are given up
LONGEST = 30.0  # seconds after the end at which they are given up in any case
KILL_PATIENCE = 5.0  # seconds after KILL; the kernel may not end a process
LISTED = 50  # remaining processes that a result names at most
ROUNDS = 20  # of signals to processes that were born in the round before
RETRY = 0.25  # seconds until a failed step is tried again
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38
PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
CLONE3, CLONE_INTO_CGROUP = 435, 1 << 33
CAP_HEADER = b"\x22\x05\x08\x20" + bytes(4)  # of capset(2): its third version, this process
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MEMORY = 1 << 23  # bytes that may be kept for later use
PUNCH_HOLE = 3  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
BLOCK = 4096
ELSEWHERE = (errno.ENOENT, errno.ENOTDIR, errno.EACCES)
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
# Errors that may pass and that the task has not caused: the shim waits and tries again.
PASSING = (
    *(*NO_SPACE, errno.EFBIG, errno.EMFILE, errno.ENFILE),
    *(errno.ENOMEM, errno.ENOLCK, errno.EAGAIN),
)
# Those of them that mean at the start of a command that the machine lacks something. Not
# EIO: the kernel also gives it for a damaged program.
SCARCE = (errno.EAGAIN, errno.ENOMEM, errno.ENFILE)
COUNTED = (  # a name in the result, a file of the cgroup, and the word before the number
    (b"cpu", b"/cpu.stat", b"usage_usec"),
    (b"memory", b"/memory.peak", b""),
    (b"oom", b"/memory.events", b"oom_kill"),
)
LIMITS = "user.pulsar-api.limits"  # an attribute of a cgroup
GONE = (errno.ENOENT, errno.ENODEV)  # what the kernel answers for a removed cgroup
EXITING = 4  # PF_EXITING, a flag of a process that has begun to end


class Spec:
    """What to run, from the file ``spec``: fields, each after its length."""

    def __init__(self, data: bytes) -> None:
        version, *fields = split(data)
        if version != VERSION:
            raise ValueError("the file spec is of another version")
        self.grace, self.total, self.silence = (float(field) for field in fields[:3])
        numbers = [int(field) for field in fields[3:8]]
        self.limit, self.umask, self.files, count, secrets = numbers
        self.library, self.directory, self.promise = fields[8:11]
        # User, group and further groups; nothing: those of the daemon.
        self.account = [int(number) for number in fields[11].split()]
        self.cgroup = fields[12]  # a folder; b"": the command stays in that of the shim
        self.cgroup_limits = fields[13]  # lines, each a file of the cgroup and its content
        rest = fields[14:]
        self.arguments = rest[:count]
        self.secrets = rest[count : count + secrets]
        pairs = rest[count + secrets :]
        self.environment = dict(zip(pairs[::2], pairs[1::2], strict=True))


def split(data: bytes) -> list[bytes]:
    """Return the fields of a ``spec``, without the first one, which is their number.

    Raises `ValueError` if it is not complete.
    """
    fields, at = [], 0
    while at < len(data):
        begin = at + 8
        at = begin + int.from_bytes(data[at:begin], "little")
        fields.append(data[begin:at])
    if at != len(data) or not fields or int(fields[0]) != len(fields) - 1:
        raise ValueError("the file spec is not whole")
    return fields[1:]


def bare(code: int) -> bytes:
    """Return a record with a code only."""
    return bytes(8) + code.to_bytes(8, "little")


class CannotStart(Exception):
    """The command was never started; the message says why."""


def text(data: bytes) -> str:
    """Return bytes as text in one line."""
    return data.decode("utf-8", "replace").replace("\n", " ")


def read_file(name: bytes | str) -> bytes:
    """Return all of a small file."""
    with open(name, "rb", buffering=0) as file:
        return file.readall()


def write_all(fd: int, data: bytes) -> None:
    """Write a small file as a whole; a limit on file sizes may split the write."""
    done = 0
    while done < len(data):
        done += posix.pwrite(fd, data[done:], done)


def remove(name: str, folder: int | None = None) -> None:
    """Remove a file that may not be there."""
    try:
        posix.unlink(name, dir_fd=folder)
    except FileNotFoundError:
        pass


def set_soft_limit(limit: int, value: int) -> int:
    """Set a soft limit, at most to the hard one; return the old soft limit."""
    soft, hard = resource.getrlimit(limit)
    if hard != resource.RLIM_INFINITY and not 0 <= value <= hard:
        value = hard
    resource.setrlimit(limit, (value, hard))
    return soft


def incomplete(data: bytes) -> int:
    """Return how many bytes at the end are an incomplete UTF-8 character."""
    for back in range(1, min(3, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 != 0x80:
            need = 2 if 0xC2 <= byte < 0xE0 else 3 if 0xE0 <= byte < 0xF0 else 0
            need = 4 if 0xF0 <= byte < 0xF5 else need
            return back if need > back else 0
    return 0


def stat(pid: int) -> tuple[bytes, list[bytes]]:
    """Return the name of a process and the fields after it; no fields if it has ended.

    The first one is field 3 of proc_pid_stat(5). Raises `OSError` if descriptors or memory
    run out.
    """
    try:
        data = read_file(f"/proc/{pid}/stat")
    except OSError as e:
        if e.errno in PASSING:
            raise
        return b"", []
    # The name in the second field may hold anything, also ") Z 1".
    head, _, rest = data.rpartition(b")")
    return head.partition(b"(")[2], rest.split()


def process(pid: int) -> tuple[int, int]:
    """Return the parent of a process and when it was started; zeros if it has ended.

    A zombie counts as a process: it may be the first thread of a process whose other
    threads go on.
    """
    fields = stat(pid)[1]
    return (int(fields[1]), int(fields[19])) if fields else (0, 0)


def described(pid: int, start: int) -> bytes:
    """Return the line of a result for a process, or b"" if it has ended, or is ending.

    It has the short name, never the arguments, which may hold secrets.
    """
    name, fields = stat(pid)
    if not fields or int(fields[19]) != start:
        return b""
    ending = fields[0] in (b"Z", b"X") or int(fields[6]) & EXITING
    if ending and int(fields[17]) <= 1:  # else only its first thread has ended
        return b""
    user = b"0"
    try:
        for line in read_file(f"/proc/{pid}/status").split(b"\n"):
            if line.startswith(b"Uid:"):
                user = line.split()[2]  # the one that it acts as
    except OSError as e:
        if e.errno in PASSING:
            raise
        return b""
    shown = "".join(c if c.isprintable() else "?" for c in name.decode("utf-8", "replace"))
    return b"left %d %d %b %b" % (pid, start, user, shown.encode())


def descendants() -> list[tuple[int, int]]:
    """Return all processes below this one, each with its start time.

    None can escape: this process is their subreaper, so a process that loses its parent
    becomes a child of this one, whatever its group or session.
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


def signal_process(pid: int, start: int, *numbers: int) -> bool:
    """Signal a descendant, but never another process that has got its number meanwhile.

    Return False if permission is denied, as it has another user (setuid). Raises `OSError`
    if descriptors or memory run out.
    """
    try:
        handle = posix.pidfd_open(pid)
    except OSError as e:
        if e.errno in PASSING:
            raise
        return True  # it ended by itself
    try:
        # From here on the handle names the process, not the number.
        if process(pid)[1] == start:
            for number in numbers:
                _signal.pidfd_send_signal(handle, number)
    except PermissionError:
        return False
    except ProcessLookupError:
        pass
    finally:
        posix.close(handle)
    return True


class LongLong(_ctypes._SimpleCData):  # type: ignore[type-arg]
    """A number of 64 bits for a function of C."""

    _type_ = "q"


class Half(_ctypes._SimpleCData):  # type: ignore[type-arg]
    """One half of a set of capabilities."""

    _type_ = "I"


class Sets(_ctypes.Array):  # type: ignore[type-arg]
    """What a process may do: effective, permitted, inheritable, in two halves."""

    _type_ = Half
    _length_ = 6


class CloneArguments(_ctypes.Array):  # type: ignore[type-arg]
    """The arguments of clone3(2): flags first, the signal fifth, the cgroup last."""

    _type_ = LongLong
    _length_ = 11


def c_function(name: str, *arguments: object) -> int:
    """Call a function of the C library that Python lacks."""
    library = _ctypes.dlopen(None, 0)  # type: ignore[arg-type]
    address = _ctypes.dlsym(library, name)
    result: int = _ctypes.call_function(address, arguments)
    return result


def clone_into(cgroup: int) -> int:
    """Fork like `posix.fork`, with the child in a cgroup; return -1 if that fails.

    Moving the child there later would take the kernel ten milliseconds and more.
    """
    arguments = CloneArguments()
    arguments[0], arguments[4] = CLONE_INTO_CGROUP, int(_signal.SIGCHLD)
    arguments[10] = cgroup
    size = LongLong(8 * CloneArguments._length_)
    return c_function("syscall", LongLong(CLONE3), arguments, size)


def punch(fd: int, start: int, end: int) -> bool:
    """Free the disk space of a part of a file, which then reads as zeros (fallocate(2))."""
    length = LongLong(end - start)
    return c_function("fallocate64", fd, PUNCH_HOLE, LongLong(start), length) == 0


class Middle:
    """The part that is cut out of an output that becomes too large, and out of its index.

    Both are bounded: an output by ``limit`` and a sixteenth, its index by ``limit``, and
    both by some blocks if that is less. The middle of both files becomes a hole, so offsets
    do not change. The file ``cut`` says where both holes are; it is written before they are
    made.

    A place is a pair: an offset in the output, and the offset in the index after the
    records of the bytes before it.
    """

    def __init__(self, limit: int, folder: int) -> None:
        self.limit = max(limit, 2 * BLOCK) if limit else 0  # 0: all is kept
        self.index_limit = max(limit, 16 * BLOCK)
        self.half = self.limit // 2 // BLOCK * BLOCK
        self.step = max(BLOCK, self.limit // 16 // BLOCK * BLOCK)
        self.folder = folder
        self.files = (-1, -1)  # the output and its index
        self.begin = self.end = self.marked = (0, 0)  # of the holes; the newest place
        self.places: list[tuple[int, int]] = []  # between two pieces, behind the holes
        # The newest record of each code that is not of output, and where it is.
        self.notes: dict[int, tuple[int, bytes]] = {}

    def part(self, size: int, data: bytes) -> bytes:
        """Return the part of a piece to write at once: all, or up to where holes begin."""
        end = self.half - size + 3
        if not self.limit or self.begin[1] or len(data) <= end:
            return data
        return data[: end - incomplete(data[:end])]

    def mark(self, size: int, indexed: int) -> None:
        """Note that a piece and its record end here: holes may begin or end here."""
        if not self.limit:
            return
        if not self.begin[1]:
            # The first half of either is kept.
            if size >= self.half or indexed >= self.index_limit // 2:
                self.begin = self.end = self.marked = (min(size, self.half), indexed)
            return
        before, indexed_before = self.marked
        far = indexed >= indexed_before + self.index_limit // 16
        if far or size >= before + self.step:
            self.marked = (size, indexed)
            self.places.append(self.marked)

    def make_room(self, size: int, indexed: int, more: int) -> list[bytes]:
        """Cut if ``more`` bytes of output, or one more record, would be too much.

        The last half of the output stays, unless its index is too large. If that is less
        than ``more``, the hole extends beyond the output: the bytes in between need not be
        written.

        Return the records to write again: those that are not of output and were cut.
        """
        if not (self.limit and self.begin[1]):
            return []
        (begin, index_begin), (end, index_end) = self.begin, self.end
        if begin + size + more - end > self.limit + self.step:
            end = (size + more - self.limit // 2) // BLOCK * BLOCK
        # A few records that are not of output may come with the next one.
        if index_begin + indexed + 16 * RECORD - index_end > self.index_limit:
            least = indexed - self.index_limit // 4
            end = max(end, next((o for o, i in self.places if i >= least), 0))
        if end <= self.end[0]:
            return []
        passed = [place for place in self.places if place[0] <= end]
        if passed:
            index_end = passed[-1][1]
        self.cut((end, index_end))
        del self.places[: len(passed)]
        lost = range(index_begin, self.end[1])
        return [record for at, record in self.notes.values() if at in lost]

    def cut(self, end: tuple[int, int]) -> None:
        """Extend the holes to a place; if that fails, never cut again."""
        self.announce(end)
        done = list(self.end)
        for number, fd in enumerate(self.files):
            if end[number] > done[number] and punch(fd, self.begin[number], end[number]):
                done[number] = end[number]
        self.end = (done[0], done[1])
        if self.end == end:
            return
        # The file system cannot make holes: keep everything from here on. What was cut
        # before stays announced.
        self.limit = 0
        if self.end == self.begin:
            posix.unlink("cut", dir_fd=self.folder)
        else:
            self.announce(self.end)
        complain("Nothing more is cut, however much is printed: fallocate(2) has failed.")

    def announce(self, end: tuple[int, int]) -> None:
        """Write where the holes begin and end: two numbers for each."""
        text = b"%d %d %d %d\n" % (self.begin[0], end[0], self.begin[1], end[1])
        put(self.folder, "cut", text)


class NoMask:
    """The mask of a task without secrets: it changes nothing (see ``masker.py``)."""

    def feed(self, data: bytes) -> bytes:
        """Return the data unchanged."""
        return data

    def close(self) -> bytes:
        """Return b"", as nothing is held back."""
        return b""


def masker(secrets: list[bytes], library: bytes) -> NoMask:
    """Return a mask for the secrets in one stream."""
    if not secrets:
        return NoMask()
    # It is beside this file. An isolated interpreter does not look there by itself, nor
    # in the folder of the library; that is last, as it may contain much else.
    path = sys.path[:]
    sys.path.insert(0, __file__.rpartition("/")[0])
    sys.path.append(library.decode("utf-8", "surrogateescape"))
    try:
        found: NoMask = __import__("masker").Masker(secrets)
    finally:
        sys.path[:] = path
    return found


class Stream:
    """One of the command's two pipes."""

    def __init__(self, code: int, mask: NoMask) -> None:
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
        """Read from the pipe and return what can be kept now; close it at its end.

        A character that is not complete is held back, so that one stream never prints in
        the middle of a character of the other; so is what may be the start of a secret.
        """
        try:
            data = posix.read(self.fd, READ_SIZE)
        except BlockingIOError:
            return b""
        if not data:
            posix.close(self.fd)
            self.fd = -1
            return self.end()
        self.taken += len(data)
        data = self.held + self.mask.feed(data)
        keep = len(data) - incomplete(data)
        self.held = data[keep:]
        return data[:keep]

    def end(self) -> bytes:
        """Return what was held back."""
        held, self.held = self.held + self.mask.close(), b""
        return held


class Signals:
    """The signals to the shim: a pipe that wakes poll(2), and whether TERM has come."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.term = False
        self.told = False

    def take_term(self, *_: object) -> None:
        """Remember a TERM. The pipe may be full: thousands of children may end at once."""
        self.term = True

    def empty(self) -> None:
        """Empty the pipe, so that it wakes poll(2) only for new signals."""
        try:
            posix.read(self.fd, 1 << 16)
        except BlockingIOError:
            pass

    def ready(self) -> None:
        """Tell the daemon, once, that a TERM ends the task from here on."""
        if not self.told:
            self.told = True
            try:
                posix.write(1, bare(READY))
            except OSError:
                pass  # it is gone; the next one looks at the files

    def wait_out(self, error: OSError) -> None:
        """Wait until an error may have passed; raise it if it cannot pass."""
        if error.errno not in PASSING:
            raise error
        self.ready()
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        poll.poll(RETRY * 1000)
        self.empty()


class FolderLock:
    """The lock of a task's folder: while it is held, the task is alive.

    The file appears with the lock already held, and it stays. So there is never a second
    start, neither by mistake nor in a race.
    """

    def __init__(self) -> None:
        self.fd = -1
        self.folder = -1
        self.linked = False

    def take(self, folder: str) -> bool:
        """Enter a folder and take its lock; return False if another shim has taken it.

        When this returns, the lock is on disk, so that nobody starts the command again
        after a power cut. After an error, call it again to continue.
        """
        if self.folder < 0:
            self.folder = posix.open(folder, posix.O_RDONLY | posix.O_CLOEXEC)
        posix.fchdir(self.folder)
        me = posix.getpid()
        name = f"lock.{me}"
        if self.fd < 0:
            remove(name)  # of a shim that had our number before the machine booted
            flags = posix.O_RDWR | posix.O_CREAT | posix.O_EXCL | posix.O_CLOEXEC
            self.fd = posix.open(name, flags, 0o600)
        if not self.linked:
            fcntl.flock(self.fd, fcntl.LOCK_EX)
            write_all(self.fd, b"%d %d\n" % (me, process(me)[1]))
            try:
                posix.link(name, "lock")
            except FileExistsError:
                remove(name)
                return False
            self.linked = True
        # The permit is used up: it allows no second start, even if other files are removed.
        try:
            posix.rename("start", "begun")
        except FileNotFoundError:
            pass
        remove(name)
        posix.fsync(self.fd)
        posix.fsync(self.folder)
        return True


class Recorder:
    """Keeps the output and its index on disk, and sends its records to the daemon."""

    def __init__(self, folder: int, limit: int) -> None:
        self.folder = folder
        self.began = time.monotonic()
        self.output = -1
        self.index = -1
        self.size = 0
        self.indexed = 0  # the size of the index, with the records that are not written yet
        self.middle = Middle(limit, folder)
        self.backlog: list[tuple[int, bytes]] = []  # (code, what is not written yet)
        self.records = b""  # for output.idx, not written yet
        self.written = 0  # how much of these is, as a limit may cut a record in two
        self.unsent = b""  # a record that the daemon's pipe had no room for
        self.daemon = 1

    def open(self) -> None:
        """Open the files that are not open yet."""
        flags = posix.O_WRONLY | posix.O_CREAT | posix.O_APPEND | posix.O_CLOEXEC
        if self.output < 0:
            self.output = posix.open("output", flags, 0o600, dir_fd=self.folder)
        if self.index < 0:
            self.index = posix.open("output.idx", flags, 0o600, dir_fd=self.folder)
        self.middle.files = (self.output, self.index)

    def keep(self, code: int, data: bytes) -> None:
        """Write data of a stream; what finds no room on the disk waits."""
        if data:
            self.backlog.append((code, data))
        self.flush()

    def note(self, code: int, number: int) -> None:
        """Append a record, and send it to the daemon."""
        self.record(code, number)
        self.flush()

    def record(self, code: int, number: int) -> None:
        """Queue a record with the current time."""
        since = int((time.monotonic() - self.began) * 1000)
        record = number.to_bytes(8, "little") + (since << 8 | code).to_bytes(8, "little")
        if code not in (STDOUT, STDERR):
            self.middle.notes[code] = (self.indexed, record)
        self.records += record
        self.indexed += RECORD

    def flush(self) -> None:
        """Write what is queued. If the disk is full, the command waits."""
        try:
            while self.records or self.backlog:
                if self.records:
                    # Only partly at a limit of file sizes: 16 divides the size of a block.
                    self.written += posix.write(self.index, self.records[self.written :])
                    if self.written == len(self.records):
                        records, self.records, self.written = self.records, b"", 0
                        self.send(records)
                    continue
                self.trim()
                code, data = self.backlog[0]
                piece = self.middle.part(self.size, data)
                written = posix.write(self.output, piece)
                self.size += written
                self.backlog[0] = (code, data[written:])
                if written == len(piece):
                    self.record(code, self.size)
                    self.middle.mark(self.size, self.indexed)
                if written == len(data):
                    del self.backlog[0]
        except OSError as e:
            if e.errno not in PASSING:
                raise

    def trim(self) -> None:
        """Cut the middle out of files that the next piece would make too large."""
        code, data = self.backlog[0]
        for record in self.middle.make_room(self.size, self.indexed, len(data)):
            self.middle.notes[record[8]] = (self.indexed, record)
            self.records += record
            self.indexed += RECORD
        skip = self.middle.end[0] - self.size
        if skip > 0:
            # The start of this piece would be cut as well, so it is never written.
            posix.ftruncate(self.output, self.size + skip)
            self.size += skip
            self.backlog[0] = (code, data[skip:])

    def send(self, record: bytes) -> None:
        """Send records to the daemon: only the newest if it reads slowly."""
        if self.daemon < 0:
            return
        self.unsent = b""
        try:
            posix.write(self.daemon, record)
        except BlockingIOError:
            self.unsent = record
        except OSError:
            self.daemon = -1

    @property
    def waiting(self) -> bool:
        """Whether something is not on disk yet."""
        return bool(self.backlog or self.records)

    def sync(self) -> None:
        """Wait until all output is on disk; raises `OSError` if that fails."""
        if self.size:
            posix.fdatasync(self.output)
            posix.fdatasync(self.index)


class Command:
    """The command of a task: its two streams, and how it is started."""

    def __init__(self, spec: Spec, signals: Signals, limits: list[tuple[int, int]]) -> None:
        self.spec = spec
        self.signals = signals
        self.limits = limits  # soft ones, which only the command gets
        self.streams: list[Stream] = []
        self.cgroup = -1
        self.began = 0.0

    def open(self) -> None:
        """Open the cgroup and the pipes that are not open yet."""
        if self.spec.cgroup and self.cgroup < 0:
            self.cgroup = open_cgroup(self.spec.cgroup, self.spec.cgroup_limits)
        for code in (STDOUT, STDERR)[len(self.streams) :]:
            mask = masker(self.spec.secrets, self.spec.library)
            self.streams.append(Stream(code, mask))

    def enter(self) -> None:
        """Enter the folder in which the command is started.

        It raises the errors of `start`.
        """
        folder = self.spec.directory
        try:
            posix.chdir(folder or ".")
        except (OSError, ValueError) as e:  # ValueError: NUL
            if getattr(e, "errno", None) in SCARCE:
                raise
            why = getattr(e, "strerror", e)
            raise CannotStart(f"cannot enter {text(folder)}: {why}") from e

    def candidates(self) -> list[bytes]:
        """Return the paths at which the program may be."""
        name = self.spec.arguments[0]
        if b"/" in name:
            return [name]
        folders = self.spec.environment.get(b"PATH", b"/usr/local/bin:/usr/bin:/bin")
        return [folder + b"/" + name for folder in folders.split(b":") if folder]

    def start(self) -> int:
        """Start the command and return its process number.

        Raises `CannotStart`, or `OSError` if the error may pass.
        """
        spec = self.spec
        name = spec.arguments[0]
        self.began = time.monotonic()
        pid = 0
        if not spec.account:
            self.enter()
        posix.umask(spec.umask)
        problem = "not found in PATH" if name else "the name is empty"
        spawn = self.spawn_as if spec.account or spec.cgroup else self.spawn
        for path in self.candidates() if name else ():
            try:
                if path.startswith(b"/"):
                    posix.stat(path)  # saves a process for each folder of PATH
                pid = spawn(path)
                break
            except OSError as e:
                if e.errno in SCARCE:
                    raise
                # As in execvp(3): a later folder of PATH may have one that can be run.
                if b"/" in name or e.errno not in ELSEWHERE:
                    problem = str(e.strerror)
                    break
                if e.errno == errno.EACCES:
                    problem = str(e.strerror)
        for stream in self.streams:
            posix.close(stream.write_end)
        if not pid:
            raise CannotStart(f"cannot start {text(name)}: {problem}")
        return pid

    def spawn(self, path: bytes) -> int:
        """Start the program as the daemon's user. It raises the errors of `start`."""
        out, err = (stream.write_end for stream in self.streams)
        ours = [(limit, set_soft_limit(limit, soft)) for limit, soft in self.limits]
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
                setsigdef=_signal.valid_signals(),
            )
        except ValueError as e:  # NUL in an argument, = in the name of a variable
            name = text(self.spec.arguments[0])
            raise CannotStart(f"cannot start {name}: {e}") from e
        finally:
            for limit, soft in ours:
                set_soft_limit(limit, soft)

    def spawn_as(self, path: bytes) -> int:
        """Start the program in its cgroup and under its account.

        It raises the errors of `start`.
        """
        if self.spec.account:
            for stream in self.streams:
                # The pipe belongs to the user of the shim; without this the command could
                # not open /dev/stderr.
                posix.fchmod(stream.write_end, 0o622)
        try:
            told, tell = posix.pipe2(posix.O_CLOEXEC)
        except OSError as e:
            raise OSError(errno.EAGAIN, e.strerror) from e
        try:
            pid = self.fork(path, tell)
            posix.close(tell)
            tell = -1
            self.wait_for_exec(pid, told)
            said = posix.read(told, 64)  # nothing, as soon as another program runs
        finally:
            for fd in (told, tell):
                if fd >= 0:
                    posix.close(fd)
        if said:
            posix.kill(pid, _signal.SIGKILL)  # it may be stopped
            posix.waitpid(pid, 0)
            raise self.refusal(*said.split())
        return pid

    def fork(self, path: bytes, tell: int) -> int:
        """Return the number of the process that becomes the command, in its cgroup."""
        pid = clone_into(self.cgroup) if self.cgroup >= 0 else -1
        outside = -1
        if pid < 0:
            # Some containers forbid the system call.
            outside = self.cgroup
            pid = posix.fork()
        if not pid:
            try:
                self.become(path, tell, outside)
            finally:
                posix._exit(127)
        return pid

    def refusal(self, stage: bytes, number: bytes) -> Exception:
        """Return what `spawn_as` raises if the child could not become the command."""
        error = int(number)
        if stage == b"cgroup" and error in GONE:
            # systemd removes empty cgroups when the unit stops. It is made again.
            posix.close(self.cgroup)
            self.cgroup = -1
            error = errno.EAGAIN
        if stage == b"start" and not error:
            name = text(self.spec.arguments[0])
            return CannotStart(f"cannot start {name}: a text in it has a NUL")
        if stage == b"start" or error in SCARCE:
            return OSError(error, posix.strerror(error))
        what = {
            b"cgroup": "enter its cgroup",
            b"change": "change the user",
            b"enter": f"enter {text(self.spec.directory)}",
        }[stage]
        return CannotStart(f"cannot {what}: {posix.strerror(error)}")

    def wait_for_exec(self, pid: int, told: int) -> None:
        """Wait until the child runs the command, has reported why not, or is killed.

        It may take for ever: other processes of its account can stop it.
        """
        poll = select.poll()
        for fd in (told, self.signals.fd):
            poll.register(fd, select.POLLIN)
        until = self.began + self.spec.total if self.spec.total else 0.0
        while True:
            left = max(0.0, until - time.monotonic()) * 1000 + 1 if until else None
            ready = {fd for fd, _ in poll.poll(left)}
            if told in ready:
                return
            self.signals.empty()
            if self.signals.term or (until and time.monotonic() >= until):
                # What follows is the same as for a command that was just started.
                posix.kill(pid, _signal.SIGKILL)
                until = 0.0

    def become(self, path: bytes, tell: int, cgroup: int) -> None:
        """Become the command; return only if that fails.

        ``cgroup`` is a descriptor of the cgroup to enter, -1 if that is done.
        """
        spec, stage = self.spec, b"cgroup"
        try:
            if cgroup >= 0:
                flags = posix.O_WRONLY | posix.O_CLOEXEC
                posix.write(posix.open("cgroup.procs", flags, dir_fd=cgroup), b"0")
            stage = b"change"
            posix.setpgid(0, 0)
            for limit, soft in self.limits:
                set_soft_limit(limit, soft)
            if spec.account:
                user, group, *groups = spec.account
                posix.setgroups(groups)
                posix.setresgid(group, group, group)
                posix.setresuid(user, user, user)
                drop_capabilities()
                stage = b"enter"
                posix.chdir(spec.directory or "/")
            stage = b"start"
            null = posix.open("/dev/null", posix.O_RDONLY | posix.O_CLOEXEC)
            out, err = (stream.write_end for stream in self.streams)
            for fd, number in ((null, 0), (out, 1), (err, 2)):
                posix.dup2(fd, number)
            for number in _signal.valid_signals():
                if number not in (_signal.SIGKILL, _signal.SIGSTOP):
                    _signal.signal(number, _signal.SIG_DFL)
            _signal.pthread_sigmask(_signal.SIG_SETMASK, ())
            posix.execve(path, spec.arguments, spec.environment)
        except OSError as e:
            posix.write(tell, b"%b %d" % (stage, e.errno or errno.EPERM))
        except ValueError:
            posix.write(tell, b"%b 0" % stage)


class Tree:
    """The processes of the task: the command and all its descendants."""

    def __init__(self, cgroup: bytes) -> None:
        self.cgroup = cgroup  # its folder, or b""
        self.pid = 0  # of the command; 0: it was not started
        self.status: int | None = None
        self.ended_at = 0.0  # seconds since the epoch
        self.gone = 0.0  # when the command had ended, and the disk had room
        self.children = False  # whether any descendant may be left
        self.told: set[tuple[int, int]] = set()  # processes that were sent TERM
        self.refused = False  # whether the last KILL could reach nobody

    def reap(self) -> bool:
        """Reap the children that have ended; return whether any descendant may be left."""
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
                self.gone = time.monotonic()

    def terminate(self, until: float) -> None:
        """Send TERM to every process of the tree, and to those that are born meanwhile.

        Raises `OSError` if nobody can look for them now.
        """
        for _ in range(ROUNDS):
            new = [found for found in descendants() if found not in self.told]
            for pid, start in new:
                # CONT: a stopped process would not notice.
                signal_process(pid, start, _signal.SIGTERM, _signal.SIGCONT)
                self.told.add((pid, start))
            if not new or time.monotonic() >= until:
                break

    def kill_children(self) -> None:
        """Send KILL to our own children.

        They are found so quickly that even a fork bomb ends: its processes become our
        children when they lose their parents. By number, as no other process gets the
        number of a child before it is reaped, which only this process does.
        """
        for _ in range(ROUNDS):
            for pid in read_file(f"/proc/self/task/{posix.getpid()}/children").split():
                try:
                    posix.kill(int(pid), _signal.SIGKILL)
                except PermissionError:
                    pass
            if not self.reap():
                break

    def kill(self) -> bool:
        """Send KILL to what is left of the tree; return False if nobody can look for it."""
        kill_cgroup(self.cgroup)
        try:
            self.kill_children()
        except OSError:
            pass  # not every kernel has the list of children
        try:
            obeyed = [signal_process(*it, _signal.SIGKILL) for it in descendants()]
        except OSError as e:
            if e.errno not in PASSING:
                raise
            self.refused = True
            return False
        self.refused = bool(obeyed) and not any(obeyed)
        return True

    def left(self) -> list[bytes]:
        """Return a line of a result for each process that is left, up to `LISTED`."""
        lines: list[bytes] = []
        for pid, start in descendants():
            line = described(pid, start)
            if line:
                lines.append(line)
            if len(lines) == LISTED:
                break
        return lines


class Deadlines:
    """The clocks of a task: total time, time without output, grace, and patience."""

    def __init__(self, spec: Spec, recorder: Recorder, tree: Tree) -> None:
        self.spec = spec
        self.recorder = recorder
        self.tree = tree
        self.began = self.last_output = time.monotonic()
        self.kill_at = 0.0  # when TERM turns into KILL; 0: nobody asked for the end
        self.killed_at = 0.0
        self.due = False  # whether TERM has not been sent yet to all

    def restart(self, now: float) -> None:
        """Begin both clocks: the command was started."""
        self.began = self.last_output = now

    def pause(self, now: float) -> None:
        """Restart the time without output: the task cannot print, as the disk is full."""
        self.last_output = now
        self.tree.gone = now if self.tree.gone else 0.0

    def passed(self, now: float) -> str:
        """Return the cause for which the task has to end now, or ""."""
        spec, tree = self.spec, self.tree
        if tree.pid and tree.status is None and not self.kill_at:
            if spec.total and now >= self.began + spec.total:
                return "timeout"
            if spec.silence and now >= self.last_output + spec.silence:
                return "silence"
        return ""

    def pipes_until(self) -> float:
        """Return until when to read the pipes of a command that has ended.

        New output extends it, up to a bound: a background process may still be printing.
        """
        return min(
            max(self.tree.gone, self.last_output) + PATIENCE, self.tree.gone + LONGEST
        )

    def wait_for(self, now: float) -> float:
        """Return the seconds until the next deadline, or a negative number if none."""
        spec, tree, deadlines = self.spec, self.tree, []
        if self.recorder.waiting:
            deadlines.append(now + RETRY)
        elif tree.status is not None and self.pipes_until() > now:
            deadlines.append(self.pipes_until())
        if tree.status is None and not self.kill_at:
            if spec.total:
                deadlines.append(self.began + spec.total)
            if spec.silence:
                deadlines.append(self.last_output + spec.silence)
        if self.due:
            deadlines.append(now + RETRY)
        elif self.kill_at and tree.children:
            # A KILL that had no effect is not repeated at once.
            pause = RETRY if tree.refused else 0.02
            deadlines.append(max(self.kill_at, now + pause))
        return max(0.0, min(deadlines) - now) if deadlines else -1.0

    def killed_in_vain(self, now: float) -> bool:
        """Return whether KILL has not ended the tree for so long that it never will."""
        return bool(self.killed_at) and now >= self.killed_at + KILL_PATIENCE


class Shim:
    """One run: from the start of the command to the end of all that it leaves."""

    def __init__(self, spec: Spec, signals: Signals, lock: FolderLock) -> None:
        self.spec = spec
        self.signals = signals
        self.lock = lock
        self.folder = lock.folder
        self.limits: list[tuple[int, int]] = []  # soft ones, which only the command gets
        self.recorder = Recorder(lock.folder, spec.limit)
        self.command = Command(spec, signals, self.limits)
        self.tree = Tree(spec.cgroup)
        self.deadlines = Deadlines(spec, self.recorder, self.tree)
        self.held: list[int] = []  # pipes that somebody held when they were given up
        self.cause = "itself"

    # -- the start

    def begin(self) -> None:
        """Start the command; wait for errors to pass if they can.

        Raises `CannotStart`.
        """
        while not self.tree.pid:
            try:
                # Both may hold secrets, and neither is needed again.
                remove("spec", self.folder)
                remove("secrets", self.folder)
                if self.signals.term:
                    self.cause = "kill"
                    raise CannotStart("The command was not started.")
                self.recorder.open()
                self.command.open()
                self.tree.pid = self.command.start()
            except OSError as e:
                self.signals.wait_out(e)

        self.tree.children = True
        self.recorder.began = self.command.began
        self.deadlines.restart(self.command.began)
        self.recorder.note(CLOCK, int(time.time() * 1000))
        self.recorder.note(STARTED, self.tree.pid)

    # -- the end

    def request_end(self, cause: str) -> None:
        """Begin to end the tree, unless that has begun.

        The result names this cause even if the command itself has ended by then, or never
        began: the end was requested before the task had ended.
        """
        if self.deadlines.kill_at:
            return
        self.cause = cause
        if not self.tree.pid:
            return
        self.deadlines.due = True
        self.recorder.note(TERM_SENT, self.recorder.size)
        self.terminate(time.monotonic())

    def terminate(self, now: float) -> None:
        """Send TERM to every process of the tree; the grace begins now."""
        # If nobody can look for them now, the grace begins when somebody can.
        self.deadlines.kill_at = now + self.spec.grace
        try:
            self.tree.terminate(self.deadlines.kill_at)
            self.deadlines.due = False
        except OSError as e:
            if e.errno not in PASSING:
                raise

    def kill(self, now: float) -> None:
        """Send KILL to what is left of the tree; called again until nothing is left."""
        if self.tree.kill() and not self.deadlines.killed_at:
            self.deadlines.killed_at = now
            self.recorder.note(KILL_SENT, self.recorder.size)

    def check_clocks(self, now: float) -> None:
        """Act on a request to end and on every deadline that has passed."""
        deadlines = self.deadlines
        if self.recorder.waiting:
            deadlines.pause(now)
        cause = "kill" if self.signals.term else deadlines.passed(now)
        if cause:
            self.request_end(cause)
        if deadlines.due:
            self.terminate(now)
        elif deadlines.kill_at and self.tree.children and now >= deadlines.kill_at:
            self.kill(now)

    def over(self, now: float) -> bool:
        """Return whether there is nothing left to wait for."""
        tree, deadlines = self.tree, self.deadlines
        if self.recorder.waiting:
            return False
        if not tree.pid:
            return True
        if tree.status is None or (deadlines.kill_at and tree.children):
            return deadlines.killed_in_vain(now)
        streams = self.command.streams
        return now >= deadlines.pipes_until() or all(s.fd < 0 for s in streams)

    # -- the loop

    def run(self) -> None:
        """Copy the output and act on deadlines until the task is over."""
        while True:
            now = time.monotonic()
            self.check_clocks(now)
            if self.over(now):
                break
            self.poll(self.deadlines.wait_for(now))
            self.tree.children = self.tree.reap()
        for stream in self.command.streams:
            # What is in the pipe now was printed before the end. A background process that
            # goes on printing must not delay the end.
            until, before = stream.taken + PIPE_SIZE, -1
            while stream.fd >= 0 and before < stream.taken < until:
                before = stream.taken
                data = stream.read()
                if data:
                    self.recorder.backlog.append((stream.code, data))
            if stream.fd >= 0:
                self.held.append(stream.fd)
                stream.fd = -1
                self.recorder.keep(stream.code, stream.end())
        self.recorder.flush()
        while not self.over(time.monotonic()):
            self.wait(self.deadlines.wait_for(time.monotonic()))

    def wait(self, seconds: float) -> None:
        """Let some time pass, and act on whatever happens meanwhile."""
        self.poll(seconds)
        self.check_clocks(time.monotonic())
        self.tree.children = self.tree.reap()

    def poll(self, seconds: float) -> None:
        """Wait for output, a signal or a deadline, and copy the output."""
        poll = select.poll()
        poll.register(self.signals.fd, select.POLLIN)
        open_streams = (
            [] if self.recorder.waiting else [s for s in self.command.streams if s.fd >= 0]
        )
        for stream in open_streams:
            poll.register(stream.fd, select.POLLIN)
        if self.recorder.unsent:
            poll.register(self.recorder.daemon, select.POLLOUT)
        ready = {fd for fd, _ in poll.poll(None if seconds < 0 else seconds * 1000 + 1)}
        if self.signals.fd in ready:
            self.signals.empty()
        if self.recorder.unsent and self.recorder.daemon in ready:
            self.recorder.send(self.recorder.unsent)
        self.recorder.flush()
        for stream in open_streams:
            if stream.fd in ready:
                self.deadlines.last_output = time.monotonic()
                self.recorder.keep(stream.code, stream.read())

    # -- the result

    def result(self, error: str) -> bytes:
        """Return the content of ``exit``. Its last line proves that it is complete."""
        lines = [
            RESULT,
            b"ended %r" % (self.tree.ended_at or time.time()),
            b"cause " + self.cause.encode(),
            b"forced %d" % bool(self.deadlines.killed_at),
            b"size %d" % self.recorder.size,
        ]
        if self.held:
            lines.append(b"open 1")
        if self.spec.promise:
            lines.append(b"promise " + self.spec.promise.hex().encode())
        if error:
            lines.append(b"error " + error.encode("utf-8", "replace"))
        elif self.tree.status is None:
            lines.append(b"error The command does not end, not even by KILL.")
        elif posix.WIFSIGNALED(self.tree.status):
            lines.append(b"signal %d" % posix.WTERMSIG(self.tree.status))
        else:
            lines.append(b"code %d" % posix.WEXITSTATUS(self.tree.status))
        if self.tree.children:
            lines += self.tree.left()
        lines += usage(self.spec.cgroup)
        return b"\n".join([*lines, b"end", b""])

    def finish(self, error: str = "") -> None:
        """Write ``exit``, all or nothing, once the output is on disk."""
        while True:
            self.check_clocks(time.monotonic())  # a kill may have come since the last look
            while not self.over(time.monotonic()):
                self.wait(self.deadlines.wait_for(time.monotonic()))
            try:
                self.tree.children = self.tree.children and self.tree.reap()
                result = self.result(error)
                self.recorder.sync()
                put(self.folder, "exit", result)
                posix.fsync(self.folder)
            except OSError as e:
                if e.errno not in PASSING:
                    raise
            else:
                return
            self.wait(RETRY)

    def leave(self) -> None:
        """Remove the cgroup if it is empty."""
        if self.spec.cgroup:
            try:
                remove_cgroup(self.spec.cgroup)
            except OSError:
                pass  # the next daemon removes it when it is empty

    def linger(self) -> None:
        """Stay with the processes that the task has left until they have ended.

        The shim is their parent, and reads what they print, as they would die of their
        next line otherwise. But the task has ended: their output is dropped, TERM does
        nothing, and the shim closes the folder and the pipes to the daemon.
        """
        if not self.tree.children:
            return
        posix.chdir("/")
        # The lock first: a daemon that hears of the end must find nobody alive here.
        posix.close(self.lock.fd)
        try:
            # A process of the task may have opened our end of the pipe (/proc/PID/fd); then
            # the daemon would not see that it is closed here.
            posix.write(1, bare(OVER))
        except OSError:
            pass  # it is gone, or reads the files
        for fd in (self.folder, self.recorder.output, self.recorder.index, 0, 1, 2):
            posix.close(fd)
        self.command.streams.clear()
        for values in (self.spec.arguments, self.spec.secrets):
            values.clear()
        self.spec.environment.clear()
        give_memory_back()
        poll = select.poll()
        for fd in (self.signals.fd, *self.held):
            poll.register(fd, select.POLLIN)
        while self.tree.reap():
            for fd, _ in poll.poll():
                if fd == self.signals.fd:
                    self.signals.empty()
                elif drained(fd):
                    poll.unregister(fd)
                    posix.close(fd)


def open_cgroup(cgroup: bytes, limits: bytes) -> int:
    """Return a descriptor of a cgroup, and make it again if it was removed.

    Raises `CannotStart` if that fails, or `OSError` if the error may pass.
    """
    flags = posix.O_RDONLY | posix.O_DIRECTORY | posix.O_CLOEXEC
    try:
        try:
            return posix.open(cgroup, flags)
        except FileNotFoundError:
            posix.mkdir(cgroup)
            posix.chmod(cgroup, 0o755)
        if limits:
            # The unit switches the controllers off when it stops. The next daemon sets the
            # limits by this attribute.
            posix.setxattr(cgroup, LIMITS, limits)
        for line in limits.splitlines():
            name, _, value = line.partition(b" ")
            try:
                fd = posix.open(cgroup + b"/" + name, posix.O_WRONLY | posix.O_CLOEXEC)
            except FileNotFoundError:
                continue
            try:
                posix.write(fd, value)
            finally:
                posix.close(fd)
        return posix.open(cgroup, flags)
    except OSError as e:
        if e.errno in PASSING:
            raise
        raise CannotStart(f"cannot enter its cgroup: {e.strerror}") from e


def cgroup_tree(cgroup: bytes) -> list[bytes]:
    """Return a cgroup and its sub-cgroups, parents first.

    Not by recursion: a task that runs as the daemon can nest them as deep as it likes.
    """
    found = [cgroup]
    for path in found:  # which grows meanwhile
        with posix.scandir(path) as entries:
            found += [
                entry.path for entry in entries if entry.is_dir(follow_symlinks=False)
            ]
    return found


def remove_cgroup(cgroup: bytes) -> None:
    """Remove a cgroup with its sub-cgroups; raises `OSError` if one is not empty."""
    for path in reversed(cgroup_tree(cgroup)):
        posix.rmdir(path)


def kill_cgroup(cgroup: bytes) -> None:
    """Kill all processes of a cgroup at once, including those of other users."""
    if not cgroup:
        return
    try:
        fd = posix.open(cgroup + b"/cgroup.kill", posix.O_WRONLY | posix.O_CLOEXEC)
    except OSError:
        return  # out of descriptors: the caller repeats it, as it does with signals
    try:
        posix.write(fd, b"1")
    except OSError:
        pass  # a task that runs as the daemon can make its cgroup "threaded"
    finally:
        posix.close(fd)


def usage(cgroup: bytes) -> list[bytes]:
    """Return lines of a result with what the processes of a cgroup have used.

    These are microseconds of processor time, the peak of memory in bytes, and the number
    of processes that the kernel killed for lack of memory, as far as they are counted.
    """
    lines = []
    for line, name, key in COUNTED if cgroup else ():
        try:
            words = read_file(cgroup + name).split()
        except OSError as e:
            if e.errno in PASSING:
                raise
            continue  # the controller is not enabled
        value = words[words.index(key) + 1] if key else words[0]
        lines.append(b"%b %b" % (line, value))
    return lines


def drained(fd: int) -> bool:
    """Read from a pipe and drop the data; return whether its end has come."""
    try:
        return not posix.read(fd, DROP_SIZE)
    except BlockingIOError:
        return False


def complain(text: str) -> None:
    """Send a message to the daemon, for its log, if it is still there."""
    try:
        posix.write(2, text.encode() + b"\n")
    except OSError:
        pass


def put(folder: int, name: str, data: bytes) -> None:
    """Replace a file by a synced one, all of it or nothing.

    The task may have put anything there: what cannot be replaced gets another name.
    """
    temporary = name + ".tmp"
    flags = posix.O_WRONLY | posix.O_CREAT | posix.O_EXCL | posix.O_CLOEXEC
    clear(folder, temporary)
    fd = posix.open(temporary, flags, 0o600, dir_fd=folder)
    try:
        write_all(fd, data)
        posix.fsync(fd)
    finally:
        posix.close(fd)
    try:
        posix.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    except IsADirectoryError:
        clear(folder, name)
        posix.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)


def clear(folder: int, name: str) -> None:
    """Remove the file with a name, or rename it if it is a folder."""
    try:
        remove(name, folder)
    except IsADirectoryError:
        aside = f"{name}.{time.monotonic_ns()}"
        posix.rename(name, aside, src_dir_fd=folder, dst_dir_fd=folder)


def drop_capabilities() -> None:
    """Drop all capabilities of this process (capabilities(7)).

    A change from one ordinary user to another does not drop them by itself.
    """
    c_function("prctl", PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    if c_function("capset", CAP_HEADER, Sets()):
        raise OSError(errno.EPERM, posix.strerror(errno.EPERM))


def keep_capabilities() -> None:
    """Give no capabilities to programs that this process starts, but keep its own.

    This does not restrict root, whose programs have all capabilities in any case.
    """
    c_function("prctl", PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    sets = Sets()
    if not c_function("capget", CAP_HEADER, sets):
        sets[2] = sets[5] = 0  # what is inheritable, both halves
        c_function("capset", CAP_HEADER, sets)


def become_subreaper() -> None:
    """Make every orphan below this process a child of it (prctl(2))."""
    c_function("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def keep_memory() -> None:
    """Keep the memory of pieces for later ones, instead of freeing it (mallopt(3)).

    Otherwise the kernel allocates it anew for each piece, which halves the throughput.
    """
    try:
        c_function("mallopt", M_MMAP_THRESHOLD, MEMORY)
        c_function("mallopt", M_TRIM_THRESHOLD, MEMORY)
    except (OSError, AttributeError):
        pass  # only glibc has it


def give_memory_back() -> None:
    """Free the memory that is not in use (malloc_trim(3))."""
    try:
        c_function("malloc_trim", 0)
    except (OSError, AttributeError):
        pass  # only glibc has it


def listen() -> Signals:
    """Catch TERM and CHLD, and ignore all other signals that can be ignored.

    A task may send any signal to its parent. The command gets the default actions.
    """
    while True:
        try:
            fd, write_end = posix.pipe2(posix.O_CLOEXEC | posix.O_NONBLOCK)
            break
        except OSError as e:
            if e.errno not in PASSING:
                raise
            time.sleep(RETRY)
    signals = Signals(fd)
    _signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    _signal.signal(_signal.SIGTERM, signals.take_term)
    _signal.signal(_signal.SIGCHLD, lambda *_: None)
    ours = {_signal.SIGTERM, _signal.SIGCHLD, _signal.SIGKILL, _signal.SIGSTOP}
    for number in _signal.valid_signals() - ours:
        _signal.signal(number, _signal.SIG_IGN)
    return signals


def take(folder: str, signals: Signals) -> Shim | None:
    """Return the shim of a folder, or None if another shim has taken it."""
    # The soft limit would end the shim in the middle of an output. The hard one is treated
    # like a full disk.
    soft = set_soft_limit(resource.RLIMIT_FSIZE, resource.RLIM_INFINITY)
    lock = FolderLock()
    while True:
        try:
            if not lock.take(folder):
                return None
            shim = Shim(Spec(read_file("spec")), signals, lock)
        except OSError as e:
            signals.wait_out(e)
        else:
            shim.limits.append((resource.RLIMIT_FSIZE, soft))
            if shim.spec.files:
                shim.limits.append((resource.RLIMIT_NOFILE, shim.spec.files))
            return shim


def main(folder: str) -> int:
    """Run the task of a folder, and return an exit status.

    It runs only once: a second shim finds the lock and returns `TAKEN`.
    """
    posix.setsid()
    signals = listen()
    posix.set_blocking(1, False)
    shim = take(folder, signals)
    if shim is None:
        return TAKEN
    become_subreaper()
    keep_capabilities()
    keep_memory()
    signals.ready()
    try:
        shim.begin()
    except CannotStart as e:
        shim.finish(str(e))
    else:
        shim.run()
        shim.finish()
        shim.linger()
    shim.leave()
    return 0


if __name__ == "__main__":
    done = main(sys.argv[1])
    if sys.flags.isolated:
        # Everything is on disk, and an orderly exit would cost 2 ms per task.
        posix._exit(done)
    sys.exit(done)
