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
OVER = 7  # on the pipe only: the task has ended, and the shim stays
RECORD = 16

VERSION = b"spec 3"  # the first field of a ``spec``
RESULT = b"version 2"  # the first line of a result that has ``end`` as its last one

TAKEN = 75  # the exit status of a shim that finds another one at its task

PIPE_SIZE = 1 << 20
READ_SIZE = 1 << 19
DROP_SIZE = 1 << 16
PATIENCE = 3.0  # seconds without output until held pipes are given up after the end
LONGEST = 30.0  # seconds after the end at which they are given up in any case
KILL_PATIENCE = 5.0  # seconds after KILL; a process in the kernel cannot be ended
LISTED = 50  # processes that a result names at most
ROUNDS = 20  # in which TERM goes to those that were born in the round before
RETRY = 0.25  # seconds until the next try of what could not be done
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
# Errors that can pass without the task being to blame: nothing fails for them, it waits.
PASSING = (
    *(*NO_SPACE, errno.EFBIG, errno.EMFILE, errno.ENFILE),
    *(errno.ENOMEM, errno.ENOLCK, errno.EAGAIN),
)
# Of these, what the start of a command wants of the machine, and not of a file's content:
# the kernel also answers EIO for a program that is damaged.
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
    """What to run, from the file ``spec``: fields, each with its length before it."""

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


def bare(code: int) -> bytes:
    """Return a record that says nothing but its code."""
    return bytes(8) + code.to_bytes(8, "little")


class CannotStart(Exception):
    """The command was never started; the message says why."""


def text(data: bytes) -> str:
    """Return bytes as they can be shown in one line."""
    return data.decode("utf-8", "replace").replace("\n", " ")


def read_file(name: bytes | str) -> bytes:
    """Return all of a small file."""
    with open(name, "rb", buffering=0) as file:
        return file.readall()


def write_all(fd: int, data: bytes) -> None:
    """Write a small file from its begin; a limit may let a part of it through at first."""
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
    """Set a soft limit, or the hard one where that is lower; return what it was."""
    soft, hard = resource.getrlimit(limit)
    if hard != resource.RLIM_INFINITY and not 0 <= value <= hard:
        value = hard
    resource.setrlimit(limit, (value, hard))
    return soft


def incomplete(data: bytes) -> int:
    """Return how many bytes at the end begin a UTF-8 character and do not finish it."""
    for back in range(1, min(3, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 != 0x80:
            need = 2 if 0xC2 <= byte < 0xE0 else 3 if 0xE0 <= byte < 0xF0 else 0
            need = 4 if 0xF0 <= byte < 0xF5 else need
            return back if need > back else 0
    return 0


def stat(pid: int) -> tuple[bytes, list[bytes]]:
    """Return a process's name and the fields behind it; no fields if it is no more.

    The first is field 3 of proc(5). Raises `OSError` if nobody can look now, for want of
    descriptors or memory.
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
    """Return a process's parent and when it was started; zeros if it is no more.

    One that has ended and waits for its parent counts: it may be the first thread of a
    process whose others go on.
    """
    fields = stat(pid)[1]
    return (int(fields[1]), int(fields[19])) if fields else (0, 0)


def described(pid: int, start: int) -> bytes:
    """Return a process as a result names it, b"" if it has ended, or is just ending.

    By its short name, never its arguments: they may hold secrets.
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


def signal_process(pid: int, start: int, *numbers: int) -> bool:
    """Signal a descendant, and never a stranger that got its number meanwhile.

    Return False if it may not be signalled, as it became somebody else (setuid). Raises
    `OSError` if nobody can do it now, for want of descriptors or memory.
    """
    try:
        handle = posix.pidfd_open(pid)
    except OSError as e:
        if e.errno in PASSING:
            raise
        return True  # it ended by itself
    try:
        # From here on the handle, not the number, says who is meant.
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
    """Call a function of the C library that Python does not offer."""
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
    """Give the disk space of a part of a file back; it reads as zeros (fallocate(2))."""
    length = LongLong(end - start)
    return c_function("fallocate64", fd, PUNCH_HOLE, LongLong(start), length) == 0


class Middle:
    """What is cut out of an output that becomes too large, and out of its index.

    Both are bounded: an output by ``limit`` and a sixteenth, its index by ``limit``, and
    both by some blocks if that is less. The middle of both files becomes a hole, so offsets
    stay what they are. The file ``cut`` says where both holes are, and it says so before it
    is true.

    A place is a pair: so many bytes of output, and so many of the records of them.
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
        """Return what of a piece is written at once: all, or up to where holes begin."""
        end = self.half - size + 3
        if not self.limit or self.begin[1] or len(data) <= end:
            return data
        return data[: end - incomplete(data[:end])]

    def mark(self, size: int, indexed: int) -> None:
        """Note that a piece and its record end here; the holes may begin here."""
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
        """Cut, if ``more`` bytes of output would be too many, or one more record.

        Of the output its last half stays, unless its index is too large. If that is less
        than ``more``, the hole ends behind the output: what is missing need not be written.
        Returns records to be written again: those that are not of output and were cut.
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
        """Let the holes end further back; if that cannot be, never cut again."""
        self.announce(end)
        done = list(self.end)
        for number, fd in enumerate(self.files):
            if end[number] > done[number] and punch(fd, self.begin[number], end[number]):
                done[number] = end[number]
        self.end = (done[0], done[1])
        if self.end == end:
            return
        # The file system cannot do it: keep all from here on rather than lose some
        # unannounced. What was cut before stays announced.
        self.limit = 0
        if self.end == self.begin:
            posix.unlink("cut", dir_fd=self.folder)
        else:
            self.announce(self.end)
        complain("Nothing more is cut, however much is printed: fallocate(2) has failed.")

    def announce(self, end: tuple[int, int]) -> None:
        """Say where the holes begin and end: two numbers each."""
        text = b"%d %d %d %d\n" % (self.begin[0], end[0], self.begin[1], end[1])
        put(self.folder, "cut", text)


class Clear:
    """What a stream goes through if there is nothing to mask (see ``masker.py``)."""

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
    try:
        found: Clear = __import__("masker").Masker(secrets)
    finally:
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


class Ear:
    """Hears signals: a pipe that wakes poll(2), and whether TERM has come."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.term = False
        self.told = False

    def take_term(self, *_: object) -> None:
        """Remember a TERM. The pipe may be full: children may end by the thousand."""
        self.term = True

    def empty(self) -> None:
        """Let the pipe wake nobody for what has come so far."""
        try:
            posix.read(self.fd, 1 << 16)
        except BlockingIOError:
            pass

    def ready(self) -> None:
        """Tell the daemon, once, that a TERM is understood from here on."""
        if not self.told:
            self.told = True
            try:
                posix.write(1, bare(READY))
            except OSError:
                pass  # it is gone; the next one looks at the files

    def bear(self, error: OSError) -> None:
        """Wait until what went wrong may have passed; raise it if it cannot pass."""
        if error.errno not in PASSING:
            raise error
        self.ready()
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        poll.poll(RETRY * 1000)
        self.empty()


class Claim:
    """The lock of a task's folder: whoever cannot get it knows that the task is alive.

    The name appears with the lock held, and it stays: there is no second start, neither
    by mistake nor in a race.
    """

    def __init__(self) -> None:
        self.lock = -1
        self.folder = -1
        self.linked = False

    def take(self, folder: str) -> bool:
        """Enter a folder and take its lock; return False if another one has it.

        When it returns the lock is on disk, so after a power cut nobody starts the command
        again. After an error a second call goes on where the first one was.
        """
        if self.folder < 0:
            self.folder = posix.open(folder, posix.O_RDONLY | posix.O_CLOEXEC)
        posix.fchdir(self.folder)
        me = posix.getpid()
        name = f"lock.{me}"
        if self.lock < 0:
            remove(name)  # of a shim that had our number before the machine booted
            flags = posix.O_RDWR | posix.O_CREAT | posix.O_EXCL | posix.O_CLOEXEC
            self.lock = posix.open(name, flags, 0o600)
        if not self.linked:
            fcntl.flock(self.lock, fcntl.LOCK_EX)
            write_all(self.lock, b"%d %d\n" % (me, process(me)[1]))
            try:
                posix.link(name, "lock")
            except FileExistsError:
                remove(name)
                return False
            self.linked = True
        # The permit is used up, so whatever else is removed, it allows no second start.
        try:
            posix.rename("start", "begun")
        except FileNotFoundError:
            pass
        remove(name)
        posix.fsync(self.lock)
        posix.fsync(self.folder)
        return True


class Shim:
    """One run: from the start of the command to the end of all that it leaves."""

    def __init__(self, spec: Spec, ear: Ear, claim: Claim) -> None:
        self.spec = spec
        self.ear = ear
        self.claim = claim
        self.folder = claim.folder
        self.limits: list[tuple[int, int]] = []  # soft ones, which only the command gets
        self.began = time.monotonic()
        self.output = -1
        self.index = -1
        self.size = 0
        self.indexed = 0  # the size of the index with what waits to be written
        self.middle = Middle(spec.limit, claim.folder)
        self.backlog: list[tuple[int, bytes]] = []  # (code, what is not written yet)
        self.records = b""  # for output.idx, not written yet
        self.written = 0  # how much of these is, as a limit may cut a record in two
        self.news = b""  # a record that the daemon's pipe had no room for
        self.daemon = 1
        self.streams: list[Stream] = []
        self.held: list[int] = []  # pipes that somebody held when they were given up
        self.pid = 0
        self.status: int | None = None
        self.ended_at = 0.0  # seconds since the epoch
        self.last_output = self.began
        self.gone = 0.0  # when the command had ended, and the disk had room
        self.cause = "itself"
        self.kill_at = 0.0  # when TERM turns into KILL; 0: nobody asked
        self.killed_at = 0.0
        self.due = False  # whether TERM has not been sent yet to all
        self.told: set[tuple[int, int]] = set()  # who has got it
        self.refused = False  # whether the last KILL could reach nobody
        self.children = False  # whether any descendant may be left
        self.cgroup = -1

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
        record = number.to_bytes(8, "little") + (since << 8 | code).to_bytes(8, "little")
        if code not in (STDOUT, STDERR):
            self.middle.notes[code] = (self.indexed, record)
        self.records += record
        self.indexed += RECORD

    def flush(self) -> None:
        """Write what waits; if the disk is full leave it, and the command waits too."""
        try:
            while self.records or self.backlog:
                if self.records:
                    # In part only at a limit: 16 divides the size of a block.
                    self.written += posix.write(self.index, self.records[self.written :])
                    if self.written == len(self.records):
                        records, self.records, self.written = self.records, b"", 0
                        self.tell(records)
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
        """Cut the middle out of what would be too large with the next piece."""
        code, data = self.backlog[0]
        for record in self.middle.make_room(self.size, self.indexed, len(data)):
            self.middle.notes[record[8]] = (self.indexed, record)
            self.records += record
            self.indexed += RECORD
        skip = self.middle.end[0] - self.size
        if skip > 0:
            # The begin of this piece is cut as well, and never written.
            posix.ftruncate(self.output, self.size + skip)
            self.size += skip
            self.backlog[0] = (code, data[skip:])

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

    def begin(self) -> None:
        """Start the command, or raise `CannotStart`; what can pass is waited for."""
        while not self.pid:
            try:
                # It may hold secrets, and it is not needed twice; nor are those of who
                # waits.
                remove("spec", self.folder)
                remove("secrets", self.folder)
                if self.ear.term:
                    self.cause = "kill"
                    raise CannotStart("The command was not started.")
                self.open_files()
                self.start()
            except OSError as e:
                self.ear.bear(e)

    def open_files(self) -> None:
        """Open the files and the pipes; after an error, those that are missing."""
        flags = posix.O_WRONLY | posix.O_CREAT | posix.O_APPEND | posix.O_CLOEXEC
        if self.output < 0:
            self.output = posix.open("output", flags, 0o600, dir_fd=self.folder)
        if self.index < 0:
            self.index = posix.open("output.idx", flags, 0o600, dir_fd=self.folder)
        self.middle.files = (self.output, self.index)
        if self.spec.cgroup and self.cgroup < 0:
            self.cgroup = open_cgroup(self.spec.cgroup, self.spec.cgroup_limits)
        for code in (STDOUT, STDERR)[len(self.streams) :]:
            mask = masker(self.spec.secrets, self.spec.library)
            self.streams.append(Stream(code, mask))

    def enter(self) -> None:
        """Enter the folder in which the command is started; errors as `start`."""
        folder = self.spec.directory
        try:
            posix.chdir(folder or ".")
        except (OSError, ValueError) as e:  # ValueError: NUL
            if getattr(e, "errno", None) in SCARCE:
                raise
            why = getattr(e, "strerror", e)
            raise CannotStart(f"cannot enter {text(folder)}: {why}") from e

    def candidates(self) -> list[bytes]:
        """Return the paths at which the program is looked for."""
        name = self.spec.arguments[0]
        if b"/" in name:
            return [name]
        folders = self.spec.environment.get(b"PATH", b"/usr/local/bin:/usr/bin:/bin")
        return [folder + b"/" + name for folder in folders.split(b":") if folder]

    def start(self) -> None:
        """Start the command, or raise `CannotStart`; or `OSError` if that may pass."""
        spec = self.spec
        name = spec.arguments[0]
        self.began = self.last_output = time.monotonic()
        if not spec.account:
            self.enter()
        posix.umask(spec.umask)
        problem = "not found in PATH" if name else "the name is empty"
        spawn = self.spawn_as if spec.account or spec.cgroup else self.spawn
        for path in self.candidates() if name else ():
            try:
                if path.startswith(b"/"):
                    posix.stat(path)  # spares a process for each folder of PATH
                self.pid = spawn(path)
                break
            except OSError as e:
                if e.errno in SCARCE:
                    raise
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
        self.children = True
        self.note(CLOCK, int(time.time() * 1000))
        self.note(STARTED, self.pid)

    def spawn(self, path: bytes) -> int:
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
        """Start the command in its cgroup, under its account; raises as `spawn`."""
        if self.spec.account:
            for stream in self.streams:
                # A pipe belongs to its maker; without this the command could not open
                # /dev/stderr.
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
        """Return the process that becomes the command, in its cgroup."""
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
        """Wait until a child runs the command, or has said why not, or is killed.

        As soon as it has the other account, processes of that can stop it.
        """
        poll = select.poll()
        for fd in (told, self.ear.fd):
            poll.register(fd, select.POLLIN)
        until = self.began + self.spec.total if self.spec.total else 0.0
        while True:
            left = max(0.0, until - time.monotonic()) * 1000 + 1 if until else None
            ready = {fd for fd, _ in poll.poll(left)}
            if told in ready:
                return
            self.ear.empty()
            if self.ear.term or (until and time.monotonic() >= until):
                # What follows is as if the command had just been started.
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
                self.gone = time.monotonic()

    # -- ending it

    def ask(self, cause: str) -> None:
        """Begin to end the tree, unless that has begun.

        The result names this cause also if the command itself has ended by then, or never
        began: somebody asked before the task had ended.
        """
        if self.kill_at:
            return
        self.cause = cause
        if not self.pid:
            return
        self.due = True
        self.note(TERM_SENT, self.size)
        self.terminate(time.monotonic())

    def terminate(self, now: float) -> None:
        """Send TERM to every process of the tree, also to those that escaped."""
        # If nobody can look now, the grace begins when somebody can.
        self.kill_at = now + self.spec.grace
        try:
            for _ in range(ROUNDS):
                new = [found for found in descendants() if found not in self.told]
                for pid, start in new:
                    # CONT: a stopped process would not notice.
                    signal_process(pid, start, _signal.SIGTERM, _signal.SIGCONT)
                    self.told.add((pid, start))
                if not new or time.monotonic() >= self.kill_at:
                    break
            self.due = False
        except OSError as e:
            if e.errno not in PASSING:
                raise

    def kill_children(self) -> None:
        """KILL our own children, which are found quickly, and so who forks without end.

        Whoever loses its parent is one of them. Nobody else gets the number of a child
        before it is reaped, and that is done here.
        """
        for _ in range(ROUNDS):
            for pid in read_file(f"/proc/self/task/{posix.getpid()}/children").split():
                try:
                    posix.kill(int(pid), _signal.SIGKILL)
                except PermissionError:
                    pass
            if not self.reap():
                break

    def kill(self, now: float) -> None:
        """KILL whatever is left of the tree, again until nothing is."""
        kill_cgroup(self.spec.cgroup)
        try:
            self.kill_children()
        except OSError:
            pass  # not every kernel has this list
        try:
            obeyed = [signal_process(*it, _signal.SIGKILL) for it in descendants()]
        except OSError as e:
            if e.errno not in PASSING:
                raise
            self.refused = True
            return
        self.refused = bool(obeyed) and not any(obeyed)
        if not self.killed_at:
            self.killed_at = now
            self.note(KILL_SENT, self.size)

    def check_clocks(self, now: float) -> None:
        """Act on every deadline that has come."""
        spec = self.spec
        if self.waiting:
            self.last_output = now  # it might print if it could
            self.gone = now if self.gone else 0.0
        if self.ear.term:
            self.ask("kill")
        elif self.pid and self.status is None and not self.kill_at:
            if spec.total and now >= self.began + spec.total:
                self.ask("timeout")
            elif spec.silence and now >= self.last_output + spec.silence:
                self.ask("silence")
        if self.due:
            self.terminate(now)
        elif self.kill_at and self.children and now >= self.kill_at:
            self.kill(now)

    def pipes_until(self) -> float:
        """Return until when there is patience with the pipes of a command that has ended.

        Whoever prints gets it anew: the last of the output may take its time.
        """
        return min(max(self.gone, self.last_output) + PATIENCE, self.gone + LONGEST)

    def wait_for(self, now: float) -> float:
        """Return the seconds until the next deadline; negative: none."""
        spec, deadlines = self.spec, []
        if self.waiting:
            deadlines.append(now + RETRY)
        elif self.status is not None and self.pipes_until() > now:
            deadlines.append(self.pipes_until())
        if self.status is None and not self.kill_at:
            if spec.total:
                deadlines.append(self.began + spec.total)
            if spec.silence:
                deadlines.append(self.last_output + spec.silence)
        if self.due:
            deadlines.append(now + RETRY)
        elif self.kill_at and self.children:
            # What was of no effect need not be done again at once.
            pause = RETRY if self.refused else 0.02
            deadlines.append(max(self.kill_at, now + pause))
        return max(0.0, min(deadlines) - now) if deadlines else -1.0

    def over(self, now: float) -> bool:
        """Return whether there is nothing left to wait for."""
        if self.waiting:
            return False
        if not self.pid:
            return True
        if self.status is None or (self.kill_at and self.children):
            # Killed, yet in the kernel for good: nobody can wait for that.
            return bool(self.killed_at) and now >= self.killed_at + KILL_PATIENCE
        return now >= self.pipes_until() or all(s.fd < 0 for s in self.streams)

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
            if stream.fd >= 0:
                self.held.append(stream.fd)
                stream.fd = -1
                self.keep(stream.code, stream.end())
        self.flush()
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
        poll.register(self.ear.fd, select.POLLIN)
        open_streams = [] if self.waiting else [s for s in self.streams if s.fd >= 0]
        for stream in open_streams:
            poll.register(stream.fd, select.POLLIN)
        if self.news:
            poll.register(self.daemon, select.POLLOUT)
        ready = {fd for fd, _ in poll.poll(None if seconds < 0 else seconds * 1000 + 1)}
        if self.ear.fd in ready:
            self.ear.empty()
        if self.news and self.daemon in ready:
            self.tell(self.news)
        self.flush()
        for stream in open_streams:
            if stream.fd in ready:
                self.last_output = time.monotonic()
                self.keep(stream.code, stream.read())

    def result(self, error: str) -> bytes:
        """Return what stands in ``exit``; a part of it is not taken for all of it."""
        lines = [
            RESULT,
            b"ended %r" % (self.ended_at or time.time()),
            b"cause " + self.cause.encode(),
            b"forced %d" % bool(self.killed_at),
            b"size %d" % self.size,
        ]
        if self.held:
            lines.append(b"open 1")
        if self.spec.promise:
            lines.append(b"promise " + self.spec.promise.hex().encode())
        if error:
            lines.append(b"error " + error.encode("utf-8", "replace"))
        elif self.status is None:
            lines.append(b"error The command does not end, not even by KILL.")
        elif posix.WIFSIGNALED(self.status):
            lines.append(b"signal %d" % posix.WTERMSIG(self.status))
        else:
            lines.append(b"code %d" % posix.WEXITSTATUS(self.status))
        if self.children:
            lines += self.left()
        lines += usage(self.spec.cgroup)
        return b"\n".join([*lines, b"end", b""])

    def left(self) -> list[bytes]:
        """Return a line for each process that is left, up to a bound."""
        lines: list[bytes] = []
        for pid, start in descendants():
            line = described(pid, start)
            if line:
                lines.append(line)
            if len(lines) == LISTED:
                break
        return lines

    def finish(self, error: str = "") -> None:
        """Write ``exit``: all or nothing, and only when the output is safe."""
        while True:
            self.check_clocks(time.monotonic())  # a kill may have come since the last look
            while not self.over(time.monotonic()):
                self.wait(self.wait_for(time.monotonic()))
            try:
                self.children = self.children and self.reap()
                result = self.result(error)
                if self.size:
                    posix.fdatasync(self.output)
                    posix.fdatasync(self.index)
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
        """Stay with what the task has left behind until nothing of it is left.

        It is still ours: we are its parent, and read what it prints, else it would die of
        its next line. But the task has ended: nothing of it is kept, TERM does nothing,
        and the folder and the daemon are let go.
        """
        if not self.children:
            return
        posix.chdir("/")
        # The lock first: a daemon that hears of the end finds nobody alive here.
        posix.close(self.claim.lock)
        try:
            # A process of the task may have opened our end of the pipe (/proc/PID/fd), so
            # the daemon would never see that we close it.
            posix.write(1, bare(OVER))
        except OSError:
            pass  # it is gone, or looks at the files
        for fd in (self.folder, self.output, self.index, 0, 1, 2):
            posix.close(fd)
        self.streams.clear()
        for values in (self.spec.arguments, self.spec.secrets):
            values.clear()
        self.spec.environment.clear()
        give_memory_back()
        poll = select.poll()
        for fd in (self.ear.fd, *self.held):
            poll.register(fd, select.POLLIN)
        while self.reap():
            for fd, _ in poll.poll():
                if fd == self.ear.fd:
                    self.ear.empty()
                elif drained(fd):
                    poll.unregister(fd)
                    posix.close(fd)


def open_cgroup(cgroup: bytes, limits: bytes) -> int:
    """Return a descriptor of a cgroup; make it again if somebody has removed it.

    Raises `CannotStart` if that cannot be, or `OSError` if that may pass.
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
    """Remove a cgroup with its sub-cgroups, as far as they are empty."""
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
    """Return lines with what the processes of a cgroup have used, as far as it is counted.

    That is microseconds of processor time, the peak of memory in bytes, and the number of
    processes that the kernel killed because of the limit of memory.
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
    """Read a piece from a pipe for nobody; return whether its end has come."""
    try:
        return not posix.read(fd, DROP_SIZE)
    except BlockingIOError:
        return False


def complain(text: str) -> None:
    """Tell the daemon, for its log, if it is still there."""
    try:
        posix.write(2, text.encode() + b"\n")
    except OSError:
        pass


def put(folder: int, name: str, data: bytes) -> None:
    """Put a synced file in place of what has this name, all of it or nothing.

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
    """Remove what has a name, or give it another one if it is a folder."""
    try:
        remove(name, folder)
    except IsADirectoryError:
        aside = f"{name}.{time.monotonic_ns()}"
        posix.rename(name, aside, src_dir_fd=folder, dst_dir_fd=folder)


def drop_capabilities() -> None:
    """Give up all that this process may do beyond its user (capabilities(7)).

    A change from one ordinary user to another takes nothing away by itself.
    """
    c_function("prctl", PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    if c_function("capset", CAP_HEADER, Sets()):
        raise OSError(errno.EPERM, posix.strerror(errno.EPERM))


def keep_capabilities() -> None:
    """Keep what this process may do from the programs that it starts, and keep it itself.

    From root nothing can be kept: its programs may do all in any case.
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
    """Reuse the memory of pieces that were read, rather than give it back (mallopt(3)).

    Else the kernel makes it anew for each, which halves the throughput.
    """
    try:
        c_function("mallopt", M_MMAP_THRESHOLD, MEMORY)
        c_function("mallopt", M_TRIM_THRESHOLD, MEMORY)
    except (OSError, AttributeError):
        pass  # it is glibc's; without it all works, too


def give_memory_back() -> None:
    """Keep no more memory than is needed (malloc_trim(3))."""
    try:
        c_function("malloc_trim", 0)
    except (OSError, AttributeError):
        pass  # as above


def listen() -> Ear:
    """Return what hears TERM and CHLD. No other signal that can be caught ends us.

    A task may send any of them to its parent; the command gets the usual ones.
    """
    while True:
        try:
            fd, write_end = posix.pipe2(posix.O_CLOEXEC | posix.O_NONBLOCK)
            break
        except OSError as e:
            if e.errno not in PASSING:
                raise
            time.sleep(RETRY)
    ear = Ear(fd)
    _signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    _signal.signal(_signal.SIGTERM, ear.take_term)
    _signal.signal(_signal.SIGCHLD, lambda *_: None)
    ours = {_signal.SIGTERM, _signal.SIGCHLD, _signal.SIGKILL, _signal.SIGSTOP}
    for number in _signal.valid_signals() - ours:
        _signal.signal(number, _signal.SIG_IGN)
    return ear


def take(folder: str, ear: Ear) -> Shim | None:
    """Return the shim of a folder, None if there is one already."""
    # Ours would end us in the middle of an output; a hard limit is like a full disk.
    soft = set_soft_limit(resource.RLIMIT_FSIZE, resource.RLIM_INFINITY)
    claim = Claim()
    while True:
        try:
            if not claim.take(folder):
                return None
            shim = Shim(Spec(read_file("spec")), ear, claim)
        except OSError as e:
            ear.bear(e)
        else:
            shim.limits.append((resource.RLIMIT_FSIZE, soft))
            if shim.spec.files:
                shim.limits.append((resource.RLIMIT_NOFILE, shim.spec.files))
            return shim


def main(folder: str) -> int:
    """Run the task of a folder, once: a second start finds the lock and does nothing."""
    posix.setsid()
    ear = listen()
    posix.set_blocking(1, False)
    shim = take(folder, ear)
    if shim is None:
        return TAKEN
    become_subreaper()
    keep_capabilities()
    keep_memory()
    ear.ready()
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
        # All is on disk, and taking an interpreter down in order costs 2 ms per task.
        posix._exit(done)
    sys.exit(done)
