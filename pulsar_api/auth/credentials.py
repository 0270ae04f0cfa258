"""Tokens, sessions and bound logins in a database of their own; no secret in clear."""

import hashlib
import json
import secrets
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from attrs import define, field, frozen
from twisted.internet.defer import Deferred

from pulsar_api.auth.rights import Grant
from pulsar_api.principal import Principal
from pulsar_api.storage import sqlite

FILE = "auth.db"
PREFIX = "pulsar_"
"""How API tokens begin, so that they are never sent to another server."""

MOST_SESSIONS = 100
"""Sessions of one user; with one more, the one that is unused for longest ends."""
_AT_ONCE = 100  # sessions that are removed in one step

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
    """
    DROP INDEX session_user;
    CREATE INDEX session_user ON session (user, seen_at, created_at);
    CREATE INDEX session_created ON session (created_at);
    CREATE INDEX session_seen ON session (seen_at);
    """,
    # Sessions of earlier versions have only the name of their user.
    """
    DELETE FROM session;
    ALTER TABLE session ADD COLUMN name TEXT NOT NULL DEFAULT '';
    CREATE TABLE login (
        login TEXT PRIMARY KEY,
        id TEXT NOT NULL,
        bound_at REAL NOT NULL
    ) STRICT;
    CREATE INDEX login_id ON login (id);
    """,
]


def new_secret() -> str:
    """Return 256 random bits as text."""
    return secrets.token_urlsafe(32)


def digest(secret: str) -> str:
    """Return what is stored of a long random secret: its SHA-256."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


@frozen
class Token:
    """An API token without its secret. Times are seconds since the epoch."""

    name: str
    rights: tuple[str, ...]
    """Without any, only rules give it rights."""
    targets: tuple[str, ...]
    created_at: float
    expires_at: float | None = None
    used_at: float | None = None

    grants: tuple[Grant, ...] = field(init=False)
    """The rights that it has beside all rules."""

    @grants.default
    def _granted(self) -> tuple[Grant, ...]:
        return (Grant.parse(self.rights, self.targets),) if self.rights else ()


@frozen
class SessionRecord:
    """A session as it is stored."""

    user: Principal
    sealed: bytes
    """The credentials, which can only be opened with the id of the session."""
    created_at: float
    seen_at: float


def _token(row: sqlite3.Row | Mapping[str, Any]) -> Token:
    return Token(
        row["name"],
        tuple(json.loads(row["rights"])),
        tuple(json.loads(row["targets"])),
        row["created_at"],
        row["expires_at"],
        row["used_at"],
    )


_NOTHING = {
    "name": "",
    "rights": '["read"]',
    "targets": '["*"]',
    "created_at": 0.0,
    "expires_at": 0.0,
    "used_at": None,
}
"""What is parsed instead of a missing token, so that both take the same time."""

# -- tokens, for the command line


@contextmanager
def opened(path: Path) -> Iterator[sqlite3.Connection]:
    """Open the database, also while a daemon uses it, for one piece of work."""
    prepare(path)
    with closing(sqlite.connect(path)) as db:
        yield db


def prepare(path: Path) -> None:
    """Create the database, readable by its owner only, or migrate it to this version."""
    sqlite.prepare(path, _SCHEMA)


def add_token(db: sqlite3.Connection, token: Token, secret: str) -> None:
    """Store a new token.

    Raises:
        KeyError: There is a token of this name.
    """
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
    """Remove a token; return whether there was one."""
    return db.execute("DELETE FROM token WHERE name = ?", (name,)).rowcount > 0


# -- the accounts that listed logins are bound to


@frozen
class Login:
    """A listed login, and the one GitHub account that is allowed to use it."""

    name: str
    """In lower case."""
    id: str
    bound_at: float


def all_logins(db: sqlite3.Connection) -> list[Login]:
    """Return all bound logins by name."""
    return [Login(*row) for row in db.execute("SELECT * FROM login ORDER BY login")]


def bind_login(db: sqlite3.Connection, login: Login) -> None:
    """Bind a login to an account instead of any other."""
    text = "INSERT OR REPLACE INTO login VALUES (?, ?, ?)"
    db.execute(text, (login.name, login.id, login.bound_at))


# -- for the daemon


@define(eq=False)
class CredentialStore:
    """The database for the daemon, in two threads that `close` ends.

    Reads do not wait for writes, which are synced.
    """

    _path: Path
    _from_thread: Callable[..., object]
    _writer: sqlite.DatabaseThread = field(init=False)
    _reader: sqlite.DatabaseThread = field(init=False)

    def __attrs_post_init__(self) -> None:
        prepare(self._path)
        self._writer = sqlite.DatabaseThread(self._path, self._from_thread)
        self._reader = sqlite.DatabaseThread(self._path, self._from_thread)

    async def close(self) -> None:
        """Complete all writes and end the threads."""
        for thread in (self._writer, self._reader):
            await thread.close()

    def token(self, secret: str) -> Deferred[Token | None]:
        """Fire with the token of a secret, or None; both take the same time."""
        key = digest(secret)

        def job(db: sqlite3.Connection) -> Token | None:
            row = db.execute("SELECT * FROM token WHERE digest = ?", (key,)).fetchone()
            token = _token(row or _NOTHING)
            return None if row is None else token

        return self._reader.do(job)

    def use_token(self, name: str, now: float) -> Deferred[None]:
        """Store when a token was used."""
        return self._run("UPDATE token SET used_at = ? WHERE name = ?", (now, name))

    def logins(self, name: str, id: str) -> Deferred[dict[str, str]]:
        """Fire with the bound ids of a login and of all logins of an account, by login."""
        text = "SELECT login, id FROM login WHERE login = ? OR id = ?"
        return self._reader.do(
            lambda db: {row["login"]: row["id"] for row in db.execute(text, (name, id))}
        )

    def bind_new_login(self, login: Login) -> Deferred[tuple[str, bool]]:
        """Bind a login unless it is bound; fire with its id, and whether that is new."""

        def job(db: sqlite3.Connection) -> tuple[str, bool]:
            text = "INSERT OR IGNORE INTO login VALUES (?, ?, ?)"
            values = (login.name, login.id, login.bound_at)
            new = db.execute(text, values).rowcount > 0
            found = db.execute("SELECT id FROM login WHERE login = ?", (login.name,))
            return found.fetchone()[0], new

        return self._writer.do(job)

    def add_session(self, key: str, session: SessionRecord) -> Deferred[None]:
        """Store a new session under the digest of its id."""
        values = (
            key,
            session.user.key,
            session.sealed,
            session.created_at,
            session.seen_at,
            session.user.name,
        )
        text = (
            "INSERT INTO session (digest, user, sealed, created_at, seen_at, name)"
            " VALUES (?, ?, ?, ?, ?, ?)"
        )
        return self._run(text, values)

    def forget_sessions(
        self, created: float, seen: float, user: Principal, key: str
    ) -> Deferred[bool]:
        """Remove some old sessions; fire with whether there may be more of them.

        A session is old if it began before ``created``, if it was last used before
        ``seen``, or if the user has `MOST_SESSIONS` newer ones; but never the one with the
        digest ``key``. Indexes find them, so the time does not grow with their number.
        """
        old = {
            "created_at < ?": (created,),
            "seen_at < ?": (seen,),
            # Not the new one: after the clock was set back it looks like the oldest.
            "user = ? AND digest <> ? ORDER BY seen_at DESC, created_at DESC, rowid DESC": (
                user.key,
                key,
            ),
        }

        def job(db: sqlite3.Connection) -> bool:
            most = 0
            for text, values in old.items():
                begin = MOST_SESSIONS - 1 if "user" in text else 0
                found = f"SELECT rowid FROM session WHERE {text} LIMIT ? OFFSET ?"  # noqa: S608
                delete = f"DELETE FROM session WHERE rowid IN ({found})"  # noqa: S608
                done = db.execute(delete, (*values, _AT_ONCE, begin))
                most = max(most, done.rowcount)
            return most == _AT_ONCE

        return self._writer.do(job)

    def session(self, key: str) -> Deferred[SessionRecord | None]:
        """Fire with the session of a digest."""

        def job(db: sqlite3.Connection) -> SessionRecord | None:
            row = db.execute("SELECT * FROM session WHERE digest = ?", (key,)).fetchone()
            if row is None:
                return None
            user = Principal.from_key(row["user"], row["name"])
            return SessionRecord(user, row["sealed"], row["created_at"], row["seen_at"])

        return self._reader.do(job)

    def see_session(self, key: str, now: float) -> Deferred[None]:
        """Store when a session was used."""
        return self._run("UPDATE session SET seen_at = ? WHERE digest = ?", (now, key))

    def end_session(self, key: str) -> Deferred[None]:
        """Remove a session."""
        return self._run("DELETE FROM session WHERE digest = ?", (key,))

    def end_sessions(self, user: Principal) -> Deferred[None]:
        """Remove all sessions of a user."""
        return self._run("DELETE FROM session WHERE user = ?", (user.key,))

    def _run(self, text: str, values: Sequence[object]) -> Deferred[None]:
        def job(db: sqlite3.Connection) -> None:
            db.execute(text, values)

        return self._writer.do(job)
