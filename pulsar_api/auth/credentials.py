"""What is kept of tokens and sessions, in a database of its own; no secret in clear."""

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
"""How our own tokens begin, so that they are never shown to somebody else's server."""

MOST_SESSIONS = 100
"""Sessions of one user. With one more, the one that was not used for longest ends."""
_AT_ONCE = 100  # sessions that are forgotten before somebody else has their turn

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
    # Sessions of earlier versions know no more than the name of their user.
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

    user: Principal
    sealed: bytes
    """The credentials, which only who has the session's id can open."""
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
"""What is read instead of a token that does not exist."""

# -- tokens, for the command line


@contextmanager
def opened(path: Path) -> Iterator[sqlite3.Connection]:
    """Open the database, also while a daemon uses it, for one piece of work."""
    prepare(path)
    with closing(sqlite.connect(path)) as db:
        yield db


def prepare(path: Path) -> None:
    """Make the database, readable by nobody else, or bring it to this version's form."""
    sqlite.prepare(path, _SCHEMA)


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


# -- the accounts that listed logins are bound to


@frozen
class Login:
    """A listed login, and the one account of GitHub that may use it."""

    name: str
    """In lower case."""
    id: str
    bound_at: float


def all_logins(db: sqlite3.Connection) -> list[Login]:
    """Return all bound logins by name."""
    return [Login(*row) for row in db.execute("SELECT * FROM login ORDER BY login")]


def bind_login(db: sqlite3.Connection, login: Login) -> None:
    """Bind a login to an account, whatever it was bound to."""
    text = "INSERT OR REPLACE INTO login VALUES (?, ?, ?)"
    db.execute(text, (login.name, login.id, login.bound_at))


# -- for the daemon


@define(eq=False)
class CredentialStore:
    """The same for the daemon, in threads. ``close`` it, or they stay.

    What is asked for does not wait for what is written, and synced.
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
        """Write what was given and end the threads."""
        for thread in (self._writer, self._reader):
            await thread.close()

    def token(self, secret: str) -> Deferred[Token | None]:
        """Fire with the token that this is; of a wrong one after the same time."""
        key = digest(secret)

        def job(db: sqlite3.Connection) -> Token | None:
            row = db.execute("SELECT * FROM token WHERE digest = ?", (key,)).fetchone()
            token = _token(row or _NOTHING)
            return None if row is None else token

        return self._reader.do(job)

    def use_token(self, name: str, now: float) -> Deferred[None]:
        """Note that a token was used."""
        return self._run("UPDATE token SET used_at = ? WHERE name = ?", (now, name))

    def logins(self, name: str, id: str) -> Deferred[dict[str, str]]:
        """Fire with the ids that a login and the logins of an account are bound to."""
        text = "SELECT login, id FROM login WHERE login = ? OR id = ?"
        return self._reader.do(
            lambda db: {row["login"]: row["id"] for row in db.execute(text, (name, id))}
        )

    def bind_new_login(self, login: Login) -> Deferred[tuple[str, bool]]:
        """Bind a login unless it is bound.

        Fires with the id that it is bound to, and whether that is new.
        """

        def job(db: sqlite3.Connection) -> tuple[str, bool]:
            text = "INSERT OR IGNORE INTO login VALUES (?, ?, ?)"
            values = (login.name, login.id, login.bound_at)
            new = db.execute(text, values).rowcount > 0
            found = db.execute("SELECT id FROM login WHERE login = ?", (login.name,))
            return found.fetchone()[0], new

        return self._writer.do(job)

    def add_session(self, key: str, session: SessionRecord) -> Deferred[None]:
        """Keep a new session under the digest of its id."""
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
        """Forget some old sessions; fires with whether there may be more of them.

        Old are those that began before ``created`` or were last used before ``seen``, and
        those of a user beyond `MOST_SESSIONS`, but never that of the digest ``key``.
        Indexes find them, so the time does not grow with the number of sessions.
        """
        old = {
            "created_at < ?": (created,),
            "seen_at < ?": (seen,),
            # Not the newest one: a clock that was set back makes it look like the oldest.
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
        """Note that a session is used."""
        return self._run("UPDATE session SET seen_at = ? WHERE digest = ?", (now, key))

    def end_session(self, key: str) -> Deferred[None]:
        """Forget a session."""
        return self._run("DELETE FROM session WHERE digest = ?", (key,))

    def end_sessions(self, user: Principal) -> Deferred[None]:
        """Forget all sessions of a user."""
        return self._run("DELETE FROM session WHERE user = ?", (user.key,))

    def _run(self, text: str, values: Sequence[object]) -> Deferred[None]:
        def job(db: sqlite3.Connection) -> None:
            db.execute(text, values)

        return self._writer.do(job)
