"""Sends requests to GitHub, and heeds its rate limits.

REST API: https://docs.github.com/en/rest/using-the-rest-api (rate limits).
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from attrs import define, field
from treq.client import HTTPClient
from twisted.internet.defer import Deferred
from twisted.internet.protocol import Protocol, connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone
from twisted.web.http_headers import Headers

from pulsar_api.bounded import BoundedDict
from pulsar_api.errors import ProviderUnavailable

_log = Logger()

NAME = "GitHub"
_MAX_ANSWER = 1 << 20  # bytes
_MAX_WAIT = 3600  # seconds
_MAX_SILENT = 1000  # credentials


@define(eq=False)
class GitHubAPI:
    """The connection to GitHub, or to a GitHub Enterprise server."""

    _http: HTTPClient
    _now: Callable[[], float]
    """The seconds since the epoch, which GitHub's limits are given in."""
    url: str
    """The base URL of the REST API."""
    _silent: BoundedDict[bytes, float] = field(factory=partial(BoundedDict, _MAX_SILENT))
    """When requests with each of these credentials may be sent again, since the epoch."""

    async def get(self, path: str, auth: str) -> tuple[int, Any]:
        """Return the status and the JSON of a resource. It raises the errors of `send`.

        ``auth`` is the Authorization header.
        """
        headers = {
            "Authorization": auth,
            "Accept": "application/vnd.github+json",
            "X-GitHub-Api-Version": "2022-11-28",
            "User-Agent": "pulsar-api",
        }
        return await self.send("GET", f"{self.url}{path}", headers)

    async def post(self, url: str, form: Mapping[str, str]) -> tuple[int, Any]:
        """Return the status and the JSON that a form is answered with.

        It raises the errors of `send`.
        """
        headers = {"Accept": "application/json", "User-Agent": "pulsar-api"}
        return await self.send("POST", url, headers, form)

    async def send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        form: Mapping[str, str] | None = None,
    ) -> tuple[int, Any]:
        """Return the status and the JSON of a response; None if it is not JSON.

        Raises:
            ProviderUnavailable: GitHub has failed, or its rate limit is reached.
        """
        left = self._silent.get(_digest(headers.get("Authorization", "")), 0) - self._now()
        if left > 0:
            raise ProviderUnavailable(NAME, "its rate limit is reached", math.ceil(left))
        response: Any = await self._http.request(
            method,
            url,
            headers=Headers({k: [v] for k, v in headers.items()}),
            data=None if form is None else dict(form),
            allow_redirects=False,
        )
        body = _Body()
        response.deliverBody(body)
        text = await body.whole
        if response.code in {403, 429}:
            self._heed(response.headers, headers.get("Authorization", ""))
        if response.code >= 500:
            raise ProviderUnavailable(NAME, f"it answers with status {response.code}")
        try:
            return response.code, json.loads(text) if text else None
        except (ValueError, RecursionError):
            return response.code, None

    def _heed(self, headers: Any, auth: str) -> None:
        """Raise `ProviderUnavailable` if a response says that the rate limit is reached."""
        wait = None
        if (text := headers.getRawHeaders("retry-after", [""])[0]).isdigit():
            wait = float(text)
        elif headers.getRawHeaders("x-ratelimit-remaining", [""])[0] == "0":
            reset = headers.getRawHeaders("x-ratelimit-reset", [""])[0]
            wait = float(reset) - self._now() if reset.isdigit() else 60.0
        if wait is not None:
            wait = min(max(wait, 1.0), _MAX_WAIT)
            self._silent[_digest(auth)] = self._now() + wait
            _log.warn("{name}: rate limit; no requests for {s:.0f} s", name=NAME, s=wait)
            raise ProviderUnavailable(NAME, "its rate limit is reached", math.ceil(wait))


def _digest(auth: str) -> bytes:
    return hashlib.sha256(auth.encode()).digest()


class _Body(Protocol):
    """Reads a response of a bounded size. Cancelling `whole` closes the connection."""

    transport: Any

    def __init__(self) -> None:
        self._data = b""
        self.whole: Deferred[bytes] = Deferred(lambda _: self._stop())

    def dataReceived(self, data: bytes) -> None:
        """Receive a piece."""
        if len(self._data) <= _MAX_ANSWER:
            self._data += data
        if len(self._data) > _MAX_ANSWER:
            self._stop()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Receive the end."""
        if self.whole.called:
            return
        if reason.check(ResponseDone) and len(self._data) <= _MAX_ANSWER:
            self.whole.callback(self._data)
        else:
            self.whole.errback(reason)

    def _stop(self) -> None:
        self.transport.loseConnection()
