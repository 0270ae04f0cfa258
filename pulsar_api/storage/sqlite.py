"""SQLite files: opening them, bringing them up to date, and threads that use them."""

import os
import sqlite3
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from attrs import define, field
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from pulsar_api.errors import StoreUnavailable, UnknownTask

T = TypeVar("T")
_Job = Callable[[sqlite3.Connection], Any]


def trouble(error: Exception) -> StoreUnavailable:
    full = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
    text = str(error) or type(error).__name__
    return StoreUnavailable(text, full=full)


def connect(path: Path) -> sqlite3.Connection:
    """Open a database, which is never made here."""
    uri = f"{path.absolute().as_uri()}?mode=rw"
    db = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
    db.row_factory = sqlite3.Row
    try:
        db.execute("PRAGMA busy_timeout = 5000")
        db.execute("PRAGMA journal_mode = WAL")
        # Whoever was told that a task exists must find it after a power cut.
        db.execute("PRAGMA synchronous = FULL")
    except sqlite3.Error:
        db.close()
        raise
    return db


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _reserve(path: Path) -> None:
    """Make the file of a database, for this user alone; SQLite gives its others this mode.

    Raises: `StoreUnavailable` if there is something else.
    """
    try:
        # One that is there is not opened: closing it would drop the locks of SQLite.
        with suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        if not path.is_file():
            raise StoreUnavailable(f"{path} is not a regular file")
    except OSError as e:
        raise StoreUnavailable(f"{path}: {e.strerror}") from e


def prepare(path: Path, schema: Sequence[str]) -> None:
    """Make a database, or bring it to this version's form; `StoreUnavailable` if not.

    ``schema`` has one script per version.
    """
    _reserve(path)
    try:
        db = connect(path)
        try:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version > len(schema):
                text = f"{path} was made by a newer version (form {version})"
                raise StoreUnavailable(text)
            for number, script in enumerate(schema[version:], version + 1):
                db.executescript(f"BEGIN; {script}; PRAGMA user_version = {number}; COMMIT")
            # Says if it cannot be written, which BEGIN IMMEDIATE does not.
            db.execute(f"PRAGMA user_version = {len(schema)}")
        finally:
            db.close()
    except sqlite3.Error as e:
        raise StoreUnavailable(f"{path}: {e}") from e


def _nothing(_: sqlite3.Connection) -> None:
    """Do nothing."""


@define(eq=False)
class DatabaseThread:
    """A thread with a connection of its own, to which one gives jobs.

    What has queued up is done in one transaction, so that many records cost one sync.
    Who only reads gains nothing by that and waits for the last of them: ``most`` is how
    many jobs are done before their results are told.
    """

    _path: Path
    _from_thread: Callable[..., object]
    _connected: Callable[[sqlite3.Connection], None] = _nothing
    """Called with each connection before it is used: another file may be there now."""
    _committed: Callable[[sqlite3.Connection], None] = _nothing
    """Called when a transaction is on disk."""
    _most: int = 1 << 20
    _jobs: SimpleQueue[tuple[_Job, Deferred[Any]] | None] = field(factory=SimpleQueue)
    _closed: Deferred[None] = field(factory=Deferred, init=False)

    def __attrs_post_init__(self) -> None:
        threading.Thread(target=self._run, name="database", daemon=True).start()

    def do(self, job: Callable[[sqlite3.Connection], T]) -> Deferred[T]:
        """Fire with what the job returns, once its transaction is on disk."""
        done: Deferred[T] = Deferred()
        self._jobs.put((job, done))
        return done

    def close(self) -> Deferred[None]:
        """Finish what was given and end; fire when the database is closed."""
        self._jobs.put(None)
        return self._closed

    def _run(self) -> None:
        db: sqlite3.Connection | None = None
        opened: tuple[int, int] | None = None
        going = True
        while going:
            batch = [self._jobs.get()]
            while len(batch) < self._most and not self._jobs.empty():
                batch.append(self._jobs.get())
            going = None not in batch
            jobs = [job for job in batch if job is not None]
            try:
                there = self._there()
                if db is not None and there != opened:
                    db.close()
                    db = None
                if db is None:
                    db = connect(self._path)
                    self._connected(db)
                    opened = there
                results = self._transaction(db, [job for job, _ in jobs])
                self._committed(db)
            except Exception as e:  # noqa: BLE001 - whatever it is, who waits is told
                results = [Failure(trouble(e)) for _ in jobs]
                if db is not None:
                    db.close()  # this also rolls back
                    db = None
            if jobs:
                self._from_thread(self._fire, [done for _, done in jobs], results)
        if db is not None:
            db.close()
        self._from_thread(self._closed.callback, None)

    def _there(self) -> tuple[int, int]:
        found = _identity(self._path)
        if found is None:
            # What is written into a file without a name is lost with us.
            raise sqlite3.OperationalError(f"{self._path} is gone")
        return found

    @staticmethod
    def _transaction(db: sqlite3.Connection, jobs: list[_Job]) -> list[Any]:
        results: list[Any] = []
        db.execute("BEGIN")
        for job in jobs:
            try:
                results.append(job(db))
            except UnknownTask:
                results.append(Failure())
            except sqlite3.Error:
                raise
            except Exception as e:  # noqa: BLE001 - a row that makes no sense, and the like
                results.append(Failure(trouble(e)))
        db.execute("COMMIT")
        return results

    @staticmethod
    def _fire(waiting: list[Deferred[Any]], results: list[Any]) -> None:
        for done, result in zip(waiting, results, strict=True):
            # A Failure makes it an errback. Who asked may have gone away meanwhile.
            if not done.called:
                done.callback(result)
