"""Sessions of signed-in people: a random id that expires by itself."""

import hashlib
import json
from collections.abc import Callable
from functools import partial

from attrs import define, field, frozen
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
from pulsar_api.bounded import BoundedDict
from pulsar_api.concurrency.background import run_in_background
from pulsar_api.errors import StoreUnavailable
from pulsar_api.principal import Principal

_log = Logger()

IDLE = 12 * 3600.0
"""Seconds without a request after which a session ends."""
TOTAL = 7 * 86400.0
"""Seconds after which it ends however much it is used."""
_STEP = 60.0  # seconds: the precision of the time of last use on disk
_MAX_USERS = 1000  # whose times of last use are in memory
_NONCE = bytes(12)  # each key seals one message


@frozen
class SessionId:
    """The secret that a browser presents to continue a session."""

    value: str = field(repr=False)

    @property
    def digest(self) -> str:
        """What the session is stored under."""
        return digest(self.value)

    @property
    def key(self) -> bytes:
        """What the session's credentials are sealed with.

        It is not stored, so that nobody who reads the database can open them.
        """
        return hashlib.sha256(b"sealed by " + self.value.encode()).digest()


Presented = Credentials | SessionId
"""What a request presents to say who its caller is."""


@define(eq=False)
class Sessions:
    """Begins, finds and ends sessions; they survive a restart of the daemon.

    The credentials of a sign-in are sealed with the id of the session, which only the
    browser has. Each request is authenticated by them again, so revoking a token ends the
    sessions that began with it.
    """

    _store: CredentialStore
    _now: Callable[[], float]
    """Seconds by a clock that does not jump, as a wrong time would end all sessions."""
    _forgetting: set[Principal] = field(factory=set, init=False)
    """The users whose many old sessions are being removed."""
    _used: BoundedDict[Principal, BoundedDict[str, float]] = field(
        factory=partial(BoundedDict, _MAX_USERS), init=False
    )
    """For each user, when each session was last used; on disk that is a minute old."""

    async def begin(self, user: Principal, credentials: Credentials) -> SessionId:
        """Return the id of a new session.

        Raises:
            StoreUnavailable: The session cannot be stored now.
        """
        now = self._now()
        id = SessionId(new_secret())
        text = json.dumps([credentials.user, credentials.secret]).encode()
        sealed = AESGCM(id.key).encrypt(_NONCE, text, None)
        # A used session must not look older on disk than one that was never used.
        used = self._used.pop(user, None)
        for key, at in {} if used is None else used.items():
            self._store.see_session(key, at).addErrback(_not_noted)
        added = self._store.add_session(id.digest, SessionRecord(user, sealed, now, now))
        run_in_background(self._forget_old(user, id.digest))  # in the same transaction
        await added
        return id

    async def _forget_old(self, user: Principal, key: str) -> None:
        """Remove expired sessions, and those of a user beyond `MOST_SESSIONS`."""
        try:
            more = await self._forget_some(user, key)
            if not more or user in self._forgetting:
                return
            # In steps, so that a request with a session does not wait for all of them.
            self._forgetting.add(user)
            try:
                while more:
                    more = await self._forget_some(user, key)
            finally:
                self._forgetting.discard(user)
        except StoreUnavailable as e:
            _log.error("Cannot remove old sessions: {e}", e=e)

    def _forget_some(self, user: Principal, key: str) -> Deferred[bool]:
        now = self._now()
        return self._store.forget_sessions(now - TOTAL, now - IDLE, user, key)

    async def find(self, id: SessionId, *, used: bool = True) -> Credentials | None:
        """Return the credentials that a session began with; None if it has ended.

        ``used``: whether this counts as a use of the session.

        Raises:
            StoreUnavailable: The sessions cannot be read now.
        """
        now = self._now()
        found = await self._store.session(id.digest)
        if found is None:
            return None
        # The latest use may not be on disk yet.
        used_at = self._used.get(found.user)
        noted = 0.0 if used_at is None else used_at.get(id.digest, 0.0)
        seen = max(found.seen_at, noted)
        if found.created_at <= now - TOTAL or seen <= now - IDLE:
            await self._store.end_session(id.digest)
            return None
        if used:
            self._note(found.user, id.digest, now)
            if found.seen_at <= now - _STEP:
                # The request neither waits for that nor fails with it.
                self._store.see_session(id.digest, now).addErrback(_not_noted)
        try:
            user, secret = json.loads(AESGCM(id.key).decrypt(_NONCE, found.sealed, None))
        except InvalidTag:
            return None
        return Credentials(user, secret)

    def _note(self, user: Principal, key: str, now: float) -> None:
        used = self._used.get(user)
        if used is None:
            used = BoundedDict(MOST_SESSIONS)
        used[key] = now
        self._used[user] = used

    async def end(self, id: SessionId) -> None:
        """End a session."""
        await self._store.end_session(id.digest)

    async def user(self, id: SessionId) -> Principal | None:
        """Return whose session it is, even if its credentials have been revoked."""
        found = await self._store.session(id.digest)
        return None if found is None else found.user

    async def end_all(self, user: Principal) -> None:
        """End all sessions of a user."""
        await self._store.end_sessions(user)


def _not_noted(failure: Failure) -> None:
    _log.error("Cannot note that a session is used: {e}", e=failure.value)
