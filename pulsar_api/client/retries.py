"""Repeats requests that have failed, for a bounded time."""

from typing import Any, Protocol

from attrs import define
from twisted.internet.defer import CancelledError
from twisted.internet.error import (
    ConnectError,
    ConnectionAborted,
    ConnectionLost,
    DNSLookupError,
)
from twisted.internet.error import TimeoutError as ConnectTimeout
from twisted.internet.task import deferLater
from twisted.web.client import ResponseFailed, ResponseNeverReceived

from pulsar_api.client.errors import Refused, Unreachable
from pulsar_api.client.http import Late

FIRST = 3.0
"""Seconds without any answer before a client gives up that has never had one."""
BROKEN = (
    ConnectError,
    ConnectionLost,
    ConnectTimeout,
    DNSLookupError,
    ResponseFailed,
    ResponseNeverReceived,
)
"""Errors of a broken connection."""
_PAUSES = (0.05, 0.1, 0.2, 0.5, 1.0)  # seconds between two tries, the last one again
_TEMPORARY = frozenset(
    {
        "gateway",
        "key-in-flight",
        "provider-unavailable",
        "starting",
        "stopping",
        "too-many-connections",
        "too-many-from-address",
        "too-many-requests",
    }
)
"""The kinds of `Refused` after which another try may succeed."""


class Patient(Protocol):
    """What there is to know of the client."""

    url: str
    patience: float
    met: bool


@define(eq=False)
class Retries:
    """Waits between two tries, and gives up after too long without an answer."""

    client: Patient
    _reactor: Any
    _count: int = 0
    _since: float | None = None
    """When the first try failed after the last answer."""

    def begin(self) -> None:
        """Note that there was an answer."""
        self.client.met = True
        self._count = 0
        self._since = None

    async def again(self, error: Exception | None) -> None:
        """Wait for the next try; raise the error if it is final or there is no time left.

        Raises:
            Refused: The daemon has refused the request, and would again.
            Unreachable: There was no answer for too long.
        """
        if any(failure.check(CancelledError) for failure in getattr(error, "reasons", [])):
            raise CancelledError  # by the caller of the client
        seconds = 0.0
        if isinstance(error, Refused):
            if error.kind not in _TEMPORARY:
                raise error
            seconds = min(error.retry_after or 0.0, 5.0)
        now = self._reactor.seconds()
        waited = error.seconds if isinstance(error, Late) else 0.0
        since = self._since = now - waited if self._since is None else self._since
        client = self.client
        patience = client.patience if client.met else min(client.patience, FIRST)
        if now >= since + patience:
            if isinstance(error, Refused):
                raise error
            raise Unreachable(client.url, _reason(error)) from None
        pause = _PAUSES[min(self._count, len(_PAUSES) - 1)]
        self._count += 1
        await deferLater(self._reactor, max(pause, seconds))


def _reason(error: BaseException | None) -> str:
    if isinstance(error, ResponseFailed):
        return "; ".join(_reason(failure.value) for failure in error.reasons)
    if isinstance(error, ConnectionAborted):  # by the client itself
        return "the head of its response does not end"
    return str(error) if error is not None else "it closes every connection"
