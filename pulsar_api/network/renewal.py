"""Loads renewed certificates while the daemon runs."""

import datetime as dt
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attrs import define, evolve, field
from OpenSSL.SSL import Connection
from twisted.application.service import Service
from twisted.internet.interfaces import (
    IDelayedCall,
    IOpenSSLServerConnectionCreator,
    IReactorTime,
)
from twisted.internet.ssl import CertificateOptions
from twisted.logger import Logger
from zope.interface import implementer

from pulsar_api.config.settings import Settings
from pulsar_api.errors import SettingsError
from pulsar_api.network import certificates
from pulsar_api.network.certificates import Identity

_log = Logger()

LOOK = 2.0
"""Seconds between two checks of the files."""
SETTLE = 0.5
"""Seconds for which changed files must not change again before they are read."""
SOON = 14 * 86400.0
"""Seconds before a certificate expires in which the log has a warning."""

_Stamp = tuple[tuple[int, ...] | None, ...]


def _located(settings: Settings) -> Settings:
    """Return the settings with absolute paths, as ``twistd`` changes the folder."""
    found: dict[str, Any] = {}  # they are texts, what mypy cannot know of evolve
    for name in ("ssl_key", "ssl_cert", "ssl_pfx", "ssl_passphrase", "ssl_client_ca"):
        path = getattr(settings, name)
        if path:
            found[name] = str(Path(path).absolute())
    return evolve(settings, **found)


@implementer(IOpenSSLServerConnectionCreator)
@define(eq=False)
class Renewal(Service):
    """Gives each new connection the newest valid identity; open ones keep theirs.

    ``now`` returns the seconds since the epoch. The constructor raises `SettingsError` if
    the files are invalid.
    """

    _settings: Settings = field(converter=_located)
    _clock: IReactorTime
    _now: Callable[[], float]
    identity: Identity = field(init=False)
    _files: tuple[Path, ...] = field(init=False)
    _options: CertificateOptions = field(init=False)
    _settled: _Stamp = field(init=False)  # of what was taken, or complained about
    _last: _Stamp = field(init=False)  # of the last look
    _doubtful: bool = field(default=False, init=False)  # wrong once, not yet told
    _told: str | None = field(default=None, init=False)  # about the certificate's end
    _next: IDelayedCall | None = field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        self._files = certificates.files(self._settings)
        # Before the files are read, so that the first check sees what changes meanwhile.
        self._settled = self._last = self._stamp()
        self._use(self._load())

    def serverConnectionForTLS(self, protocol: Any) -> Connection:
        """Return a connection with the current identity."""
        return self._options.serverConnectionForTLS(protocol)

    def startService(self) -> None:
        """Start checking the files."""
        super().startService()
        self._tell_end()
        self._next = self._clock.callLater(LOOK, self._look)

    def stopService(self) -> None:
        """Stop checking the files."""
        super().stopService()
        if self._next is not None and self._next.active():
            self._next.cancel()

    def renew(self) -> None:
        """Read the files now, even if they have not changed."""
        found = self._stamp()
        try:
            self._take(found, self._load())
        except SettingsError as e:
            self._refuse(found, e)

    def _look(self) -> None:
        pause = LOOK
        try:
            pause = self._looked()
        finally:
            self._next = self._clock.callLater(pause, self._look)

    def _looked(self) -> float:
        """Check once, and return after how many seconds to check again."""
        self._tell_end()
        found = self._stamp()
        if found == self._settled:
            self._doubtful = False
            return LOOK
        if found != self._last:
            self._last = found  # somebody may be writing
            return SETTLE
        try:
            self._take(found, self._load())
        except SettingsError as e:
            # While key and certificate are replaced, they do not match for a moment.
            if self._doubtful:
                self._refuse(found, e)
            else:
                self._doubtful = True
        return LOOK

    def _stamp(self) -> _Stamp:
        """Return a value that changes when a file does, or the target of a link to it."""
        return tuple(_stamp(path) for path in self._files)

    def _load(self) -> Identity:
        identity = certificates.load(self._settings)
        assert identity is not None
        return identity

    def _use(self, identity: Identity) -> None:
        self._options = identity.options()
        self.identity = identity

    def _take(self, found: _Stamp, identity: Identity) -> None:
        if certificates.is_development(identity) and not certificates.is_development(
            self.identity
        ):
            # The start would have refused it on any address but loopback.
            raise SettingsError("the key of the development certificate is public")
        self._use(identity)
        self._settled = self._last = found
        self._doubtful = False
        self._told = None
        _log.info(
            "TLS: new connections get the certificate {serial:x}, good until {end}",
            serial=identity.certificate.serial_number,
            end=_end(identity),
        )
        self._tell_end()

    def _refuse(self, found: _Stamp, error: SettingsError) -> None:
        self._settled = self._last = found
        self._doubtful = False
        _log.error(
            "TLS: the new certificate is not used, the old one stays: {error}", error=error
        )

    def _tell_end(self) -> None:
        left = _end(self.identity).timestamp() - self._now()
        what = "has expired" if left < 0 else "will expire" if left < SOON else None
        if what is not None and what != self._told:
            _log.warn(
                "TLS: the certificate {what}: it is good until {end}",
                what=what,
                end=_end(self.identity),
            )
        self._told = what


def _end(identity: Identity) -> dt.datetime:
    return identity.certificate.not_valid_after_utc


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_dev
