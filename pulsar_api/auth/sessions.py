"""Sessions of people who have signed in: an id that says nothing, and ends by itself."""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable

from attrs import define, field
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from pulsar_api.auth.authenticator import Credentials
from pulsar_api.auth.credentials import (
    MOST_SESSIONS,
    CredentialStore,
    SessionRecord,
    digest,
    new_secret,
)
from pulsar_api.concurrency.background import run_in_background
from pulsar_api.errors import StoreUnavailable
from pulsar_api.principal import Principal

_log = Logger()

IDLE = 12 * 3600.0
"""Seconds without a request after which a session ends."""
TOTAL = 7 * 86400.0
"""Seconds after which it ends however much it is used."""
_STEP = 60.0  # seconds: how exactly is known when it was last used
_REMEMBERED = 1000  # users
_NONCE = bytes(12)  # each key seals one message


def _key(id: str) -> bytes:
    # Not what is kept of the id: who reads the database cannot open what is in it.
    return hashlib.sha256(b"sealed by " + id.encode()).digest()


@define(eq=False)
class Sessions:
    """Begins, finds and ends sessions; they outlive a restart of the daemon.

    What somebody signed in with is kept sealed by the id of the session, which only their
    browser has. So each request is judged by what it was, and taking a token back ends the
    sessions that began with it.
    """

    _store: CredentialStore
    _now: Callable[[], float]
    """Seconds by a clock that does not jump, or a wrong one would sign everybody out."""
    _forgetting: set[Principal] = field(factory=set, init=False)
    """The users of whom there are many sessions to forget."""
    _used: OrderedDict[Principal, dict[str, float]] = field(factory=OrderedDict, init=False)
    """For each user which sessions were used when; on disk that is a minute old."""

    async def begin(self, user: Principal, credentials: Credentials) -> str:
        """Return the id of a new session."""
        now = self._now()
        id = new_secret()
        text = json.dumps([credentials.user, credentials.secret]).encode()
        sealed = AESGCM(_key(id)).encrypt(_NONCE, text, None)
        # What is used must not look older than what nobody has used since its begin.
        for key, at in self._used.pop(user, {}).items():
            self._store.see_session(key, at).addErrback(_not_noted)
        added = self._store.add_session(digest(id), SessionRecord(user, sealed, now, now))
        run_in_background(self._forget_old(user, digest(id)))  # in the same transaction
        await added
        return id

    async def _forget_old(self, user: Principal, key: str) -> None:
        """Forget sessions that are over, and those of a user that are too many."""
        try:
            more = await self._forget_some(user, key)
            if not more or user in self._forgetting:
                return
            # Little by little: whoever shows a session meanwhile does not wait for all.
            self._forgetting.add(user)
            try:
                while more:
                    more = await self._forget_some(user, key)
            finally:
                self._forgetting.discard(user)
        except StoreUnavailable as e:
            _log.error("Cannot forget old sessions: {e}", e=e)

    def _forget_some(self, user: Principal, key: str) -> Deferred[bool]:
        now = self._now()
        return self._store.forget_sessions(now - TOTAL, now - IDLE, user, key)

    async def find(self, id: str, *, used: bool = True) -> Credentials | None:
        """Return what a session began with; None if there is no such session any more.

        ``used``: whether this is a sign that somebody is there.
        """
        now = self._now()
        found = await self._store.session(digest(id))
        if found is None:
            return None
        # What was noted a moment ago may not be on disk yet.
        noted = self._used.get(found.user, {}).get(digest(id), 0.0)
        seen = max(found.seen_at, noted)
        if found.created_at <= now - TOTAL or seen <= now - IDLE:
            await self._store.end_session(digest(id))
            return None
        if used:
            self._note(found.user, digest(id), now)
            if found.seen_at <= now - _STEP:
                # Nobody has to wait for that, nor fail with it.
                self._store.see_session(digest(id), now).addErrback(_not_noted)
        try:
            user, secret = json.loads(AESGCM(_key(id)).decrypt(_NONCE, found.sealed, None))
        except InvalidTag:
            return None
        return Credentials(user, secret)

    def _note(self, user: Principal, key: str, now: float) -> None:
        used = self._used.setdefault(user, {})
        self._used.move_to_end(user)
        used.pop(key, None)
        used[key] = now  # last in line
        while len(used) > MOST_SESSIONS:
            del used[next(iter(used))]
        while len(self._used) > _REMEMBERED:
            self._used.popitem(last=False)

    async def end(self, id: str) -> None:
        """End a session."""
        await self._store.end_session(digest(id))

    async def user(self, id: str) -> Principal | None:
        """Return whose session it is, whatever that one may by now."""
        found = await self._store.session(digest(id))
        return None if found is None else found.user

    async def end_all(self, user: Principal) -> None:
        """End all sessions of somebody."""
        await self._store.end_sessions(user)


def _not_noted(failure: Failure) -> None:
    _log.error("Cannot note that a session is used: {e}", e=failure.value)
