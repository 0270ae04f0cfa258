"""What is kept of tokens and sessions, in a database of its own; no secret in clear."""

import hashlib
import json
import secrets
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from attrs import define, field, frozen
from twisted.internet.defer import Deferred

from pulsar_api import database
from pulsar_api.auth.rights import Grant

FILE = "auth.db"
PREFIX = "pulsar_"
"""How our own tokens begin, so that they are never shown to somebody else's server."""

# One script per version; never edit one that was released, add another.
_SCHEMA = [
    """
    CREATE TABLE token (
        name TEXT PRIMARY KEY,
        digest TEXT NOT NULL UNIQUE,
        rights TEXT NOT NULL,
        targets TEXT NOT NULL,
        created_at REAL NOT NULL,
        expires_at REAL,
        used_at REAL
    ) STRICT;
    CREATE TABLE session (
        digest TEXT PRIMARY KEY,
        user TEXT NOT NULL,
        sealed BLOB NOT NULL,
        created_at REAL NOT NULL,
        seen_at REAL NOT NULL
    ) STRICT;
    CREATE INDEX session_user ON session (user);
    """,
]


def new_secret() -> str:
    """Return 256 random bits as text."""
    return secrets.token_urlsafe(32)


def digest(secret: str) -> str:
    """Return what is kept of a secret that is random and long: its SHA-256."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


@frozen
class Token:
    """A token of our own, but not what it is. Times are seconds since the epoch."""

    name: str
    rights: tuple[str, ...]
    """None of them: only rules say what it may."""
    targets: tuple[str, ...]
    created_at: float
    expires_at: float | None = None
    used_at: float | None = None

    grants: tuple[Grant, ...] = field(init=False)
    """What it may beside all rules."""

    @grants.default
    def _granted(self) -> tuple[Grant, ...]:
        return (Grant.parse(self.rights, self.targets),) if self.rights else ()


@frozen
class SessionRecord:
    """A session as it is kept."""

    user: str
    sealed: bytes
    """The credentials, which only who has the session's id can open."""
    created_at: float
    seen_at: float


def _token(row: sqlite3.Row) -> Token:
    return Token(
        row["name"],
        tuple(json.loads(row["rights"])),
        tuple(json.loads(row["targets"])),
        row["created_at"],
        row["expires_at"],
        row["used_at"],
    )


# -- tokens, for the command line


@contextmanager
def opened(path: Path) -> Iterator[sqlite3.Connection]:
    """Open the database, also while a daemon uses it, for one piece of work."""
    prepare(path)
    with closing(database.connect(path)) as db:
        yield db


def prepare(path: Path) -> None:
    """Make the database, readable by nobody else, or bring it to this version's form."""
    path.touch(mode=0o600, exist_ok=True)
    database.prepare(path, _SCHEMA)


def add_token(db: sqlite3.Connection, token: Token, secret: str) -> None:
    """Keep a new token; `KeyError` if the name is taken."""
    values = (
        token.name,
        digest(secret),
        json.dumps(token.rights),
        json.dumps(token.targets),
        token.created_at,
        token.expires_at,
    )
    try:
        db.execute(
            "INSERT INTO token (name, digest, rights, targets, created_at, expires_at)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            values,
        )
    except sqlite3.IntegrityError:
        raise KeyError(token.name) from None


def all_tokens(db: sqlite3.Connection) -> list[Token]:
    """Return all tokens by name."""
    return [_token(row) for row in db.execute("SELECT * FROM token ORDER BY name")]


def remove_token(db: sqlite3.Connection, name: str) -> bool:
    """Forget a token; return whether there was one."""
    return db.execute("DELETE FROM token WHERE name = ?", (name,)).rowcount > 0


# -- for the daemon


@define(eq=False)
class Records:
    """The same for the daemon, in a thread. ``close`` it, or that stays."""

    _path: Path
    _from_thread: Callable[..., object]
    _thread: database.DatabaseThread = field(init=False)
    _tokens: dict[str, Token] = field(factory=dict, init=False)
    """By digest, as they were when somebody else last changed the database."""
    _seen: tuple[int, int] = field(default=(0, 0), init=False)

    def __attrs_post_init__(self) -> None:
        prepare(self._path)
        self._thread = database.DatabaseThread(self._path, self._from_thread)

    def close(self) -> Deferred[None]:
        """Fire when all is written and the thread has ended."""
        return self._thread.close()

    def token(self, secret: str) -> Deferred[Token | None]:
        """Fire with the token that this is; of a wrong one after the same time."""
        key = digest(secret)

        def job(db: sqlite3.Connection) -> Token | None:
            # It changes with what other connections write: with the command line.
            seen = id(db), db.execute("PRAGMA data_version").fetchone()[0]
            if seen != self._seen:
                rows = db.execute("SELECT * FROM token")
                self._tokens = {row["digest"]: _token(row) for row in rows}
                self._seen = seen
            return self._tokens.get(key)

        return self._thread.do(job)

    def use_token(self, name: str, now: float) -> Deferred[None]:
        """Note that a token was used."""
        return self._run("UPDATE token SET used_at = ? WHERE name = ?", (now, name))

    def add_session(self, key: str, session: SessionRecord) -> Deferred[None]:
        """Keep a new session under the digest of its id."""
        values = (key, session.user, session.sealed, session.created_at, session.seen_at)
        text = "INSERT INTO session VALUES (?, ?, ?, ?, ?)"
        return self._run(text, values)

    def session(self, key: str) -> Deferred[SessionRecord | None]:
        """Fire with the session of a digest."""

        def job(db: sqlite3.Connection) -> SessionRecord | None:
            text = "SELECT user, sealed, created_at, seen_at FROM session WHERE digest = ?"
            row = db.execute(text, (key,)).fetchone()
            return None if row is None else SessionRecord(*row)

        return self._thread.do(job)

    def see_session(self, key: str, now: float) -> Deferred[None]:
        """Note that a session is used."""
        return self._run("UPDATE session SET seen_at = ? WHERE digest = ?", (now, key))

    def end_session(self, key: str) -> Deferred[None]:
        """Forget a session."""
        return self._run("DELETE FROM session WHERE digest = ?", (key,))

    def end_sessions(self, user: str) -> Deferred[None]:
        """Forget all sessions of a user."""
        return self._run("DELETE FROM session WHERE user = ?", (user,))

    def expire_sessions(self, created: float, seen: float) -> Deferred[None]:
        """Forget those that began or were last used before these times."""
        text = "DELETE FROM session WHERE created_at < ? OR seen_at < ?"
        return self._run(text, (created, seen))

    def _run(self, text: str, values: Sequence[object]) -> Deferred[None]:
        def job(db: sqlite3.Connection) -> None:
            db.execute(text, values)

        return self._thread.do(job)
