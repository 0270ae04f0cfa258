"""Sessions of people who have signed in: an id that says nothing, and ends by itself."""

import hashlib
import json
from collections.abc import Callable

from attrs import define
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from twisted.logger import Logger
from twisted.python.failure import Failure

from pulsar_api.auth.gate import Credentials
from pulsar_api.auth.records import Records, SessionRecord, digest, new_secret

_log = Logger()

IDLE = 12 * 3600.0
"""Seconds without a request after which a session ends."""
TOTAL = 7 * 86400.0
"""Seconds after which it ends however much it is used."""
_STEP = 60.0  # seconds: how exactly is known when it was last used
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

    _records: Records
    _now: Callable[[], float]
    """Seconds by a clock that does not jump, or a wrong one would sign everybody out."""

    async def begin(self, user: str, credentials: Credentials) -> str:
        """Return the id of a new session."""
        now = self._now()
        await self._records.expire_sessions(now - TOTAL, now - IDLE)
        id = new_secret()
        text = json.dumps([credentials.user, credentials.secret]).encode()
        sealed = AESGCM(_key(id)).encrypt(_NONCE, text, None)
        await self._records.add_session(digest(id), SessionRecord(user, sealed, now, now))
        return id

    async def find(self, id: str, *, used: bool = True) -> Credentials | None:
        """Return what a session began with; None if there is no such session any more.

        ``used``: whether this is a sign that somebody is there.
        """
        now = self._now()
        found = await self._records.session(digest(id))
        if found is None:
            return None
        if found.created_at <= now - TOTAL or found.seen_at <= now - IDLE:
            await self._records.end_session(digest(id))
            return None
        if used and found.seen_at <= now - _STEP:
            # Nobody has to wait for that, nor fail with it.
            self._records.see_session(digest(id), now).addErrback(_not_noted)
        try:
            user, secret = json.loads(AESGCM(_key(id)).decrypt(_NONCE, found.sealed, None))
        except InvalidTag:
            return None
        return Credentials(user, secret)

    async def end(self, id: str) -> None:
        """End a session."""
        await self._records.end_session(digest(id))

    async def user(self, id: str) -> str | None:
        """Return whose session it is, whatever that one may by now."""
        found = await self._records.session(digest(id))
        return None if found is None else found.user

    async def end_all(self, user: str) -> None:
        """End all sessions of somebody."""
        await self._records.end_sessions(user)


def _not_noted(failure: Failure) -> None:
    _log.error("Cannot note that a session is used: {e}", e=failure.value)
