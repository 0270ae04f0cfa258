"""Opens SQLite databases, upgrades their schema, and runs jobs on them in threads."""

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
    """Return the exception that callers get for an error of SQLite or of a job."""
    full = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
    text = str(error) or type(error).__name__
    return StoreUnavailable(text, full=full)


def connect(path: Path) -> sqlite3.Connection:
    """Return a connection to an existing database.

    Raises `sqlite3.Error` if it does not exist or cannot be opened.
    """
    uri = f"{path.absolute().as_uri()}?mode=rw"
    db = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
    db.row_factory = sqlite3.Row
    try:
        db.execute("PRAGMA busy_timeout = 5000")
        db.execute("PRAGMA journal_mode = WAL")
        # A client that knows of a task must find it after a power cut.
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
    """Create the file of a database, for this user only; SQLite copies this mode.

    Raises `StoreUnavailable` if the path is not a regular file.
    """
    try:
        # An existing file is not opened, as closing it would drop the locks of SQLite.
        with suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        if not path.is_file():
            raise StoreUnavailable(f"{path} is not a regular file")
    except OSError as e:
        raise StoreUnavailable(f"{path}: {e.strerror}") from e


def prepare(path: Path, schema: Sequence[str]) -> None:
    """Create a database, or upgrade it. ``schema`` has one script for each version.

    Raises `StoreUnavailable` if the database is newer than the schema, or cannot be used.
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
            # Fails if the database cannot be written, which BEGIN IMMEDIATE does not.
            db.execute(f"PRAGMA user_version = {len(schema)}")
        finally:
            db.close()
    except sqlite3.Error as e:
        raise StoreUnavailable(f"{path}: {e}") from e


def _nothing(_: sqlite3.Connection) -> None:
    """Do nothing."""


@define(eq=False)
class DatabaseThread:
    """A thread with a connection of its own that runs jobs.

    All jobs that are queued run in one transaction, so many records cost one sync. Their
    results are reported after it. ``most`` bounds the number of jobs in a transaction:
    jobs that only read gain nothing from a large one.
    """

    _path: Path
    _from_thread: Callable[..., object]
    _connected: Callable[[sqlite3.Connection], None] = _nothing
    """Called with each new connection before use: the file may have been replaced."""
    _committed: Callable[[sqlite3.Connection], None] = _nothing
    """Called after each transaction, when it is on disk."""
    _most: int = 1 << 20
    _jobs: SimpleQueue[tuple[_Job, Deferred[Any]] | None] = field(factory=SimpleQueue)
    _closed: Deferred[None] = field(factory=Deferred, init=False)

    def __attrs_post_init__(self) -> None:
        threading.Thread(target=self._run, name="database", daemon=True).start()

    def do(self, job: Callable[[sqlite3.Connection], T]) -> Deferred[T]:
        """Fire with what the job returns, once its transaction is on disk.

        Fails with `StoreUnavailable` if the database cannot be used, and with
        `UnknownTask` if the job raises that.
        """
        done: Deferred[T] = Deferred()
        self._jobs.put((job, done))
        return done

    def close(self) -> Deferred[None]:
        """Finish all jobs, then end the thread; fires when the database is closed."""
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
            except Exception as e:  # noqa: BLE001 - the callers get every error
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
            # What is written to a deleted file is lost when the daemon ends.
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
            except Exception as e:  # noqa: BLE001 - such as a row that makes no sense
                results.append(Failure(trouble(e)))
        db.execute("COMMIT")
        return results

    @staticmethod
    def _fire(waiting: list[Deferred[Any]], results: list[Any]) -> None:
        for done, result in zip(waiting, results, strict=True):
            # A Failure becomes an errback. The caller may have cancelled meanwhile.
            if not done.called:
                done.callback(result)
