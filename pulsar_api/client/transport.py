"""Sends single requests of the client, within its bounds."""

import json
from collections.abc import Mapping
from typing import Any, NoReturn, Protocol, cast

from OpenSSL import SSL
from treq.client import HTTPClient
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectingCancelledError
from twisted.internet.task import deferLater
from twisted.web.client import BrowserLikePolicyForHTTPS, HTTPConnectionPool
from twisted.web.error import SchemeNotSupported
from twisted.web.http_headers import Headers
from twisted.web.iweb import IResponse

from pulsar_api.client.errors import ClientError, Refused, Unreachable, not_the_daemon
from pulsar_api.client.http import Body, Late, bounded_agent
from pulsar_api.client.retries import BROKEN
from pulsar_api.client.trust import tls_reason

_GATEWAY = frozenset({502, 503, 504})  # of a proxy, while the daemon is away
_MAX_PROBLEM = 2 << 20  # bytes


class Settings(Protocol):
    """What there is to know of the client, which may change between two requests."""

    url: str
    token: str | None
    deadline: float


class Transport:
    """The connections to one daemon."""

    def __init__(
        self, reactor: Any, settings: Settings, policy: BrowserLikePolicyForHTTPS
    ) -> None:
        self._settings = settings
        self._reactor = reactor
        self._pool = HTTPConnectionPool(reactor, persistent=True)
        self._http = HTTPClient(bounded_agent(reactor, policy, self._pool))

    async def close(self) -> None:
        """Close the connections that are kept for later."""
        # A connection whose answer has just been read is kept only after this turn.
        await deferLater(self._reactor, 0)
        await self._pool.closeCachedConnections()

    def content(self, response: IResponse, most: int | None) -> Deferred[bytes]:
        """Fire with the body of an answer; fail as `Body`, beyond ``most`` bytes too."""
        body = Body(self._reactor, self._settings.deadline, most)
        response.deliverBody(body)
        return body.whole

    async def answer(
        self,
        method: str,
        path: str,
        body: object,
        headers: Mapping[str, str],
        wait: float = 0.0,
    ) -> IResponse:
        """Send a request; return its answer once the head of that is there.

        ``wait``: seconds that the daemon may wait before it answers.

        Raises:
            Refused: The status is not a success.
            Unreachable: The URL or the certificate is wrong, or this is another server.
            Late: There is no answer in time.
        """
        given = Headers({name: [value] for name, value in headers.items()})
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            given.setRawHeaders("Content-Type", ["application/json"])
        token, seconds = self._settings.token, wait + self._settings.deadline
        if token is not None:
            given.setRawHeaders("Authorization", [f"Bearer {token}"])
        try:
            response = await self._head(method, path, data, given, seconds)
        except (SSL.Error, *BROKEN) as e:
            why = tls_reason(e)
            if why:
                raise Unreachable(self._settings.url, why) from None
            raise
        except ConnectingCancelledError:
            raise CancelledError from None
        except (ValueError, TypeError, SchemeNotSupported) as e:
            raise Unreachable(
                self._settings.url, f"this is not the URL of a daemon: {e}"
            ) from None
        if response.code >= 300:
            raise await self._refusal(response)
        return cast("IResponse", response)

    def _head(
        self, method: str, path: str, data: bytes | None, headers: Headers, seconds: float
    ) -> Deferred[Any]:
        """Send a request; fire with the head of its answer, or fail with `Late`."""

        def late(*_: object) -> NoReturn:
            raise Late(seconds)

        answer: Deferred[Any] = self._http.request(
            method,
            self._settings.url + path,
            data=data,
            headers=headers,
            allow_redirects=False,
            unbuffered=True,  # else treq would keep the whole body in memory
        )
        return answer.addTimeout(seconds, self._reactor, late)

    async def _refusal(self, response: Any) -> ClientError:
        """Return the error that an unsuccessful response means."""
        text = await self.content(response, _MAX_PROBLEM)
        try:
            problem = json.loads(text)
            kind = problem["type"].rpartition(":")[2]
            detail = str(problem["detail"])
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            error = not_the_daemon(self._settings.url, f"status {response.code}")
            if response.code in _GATEWAY:
                return Refused(response.code, "gateway", error.detail)
            return error
        after = response.headers.getRawHeaders("retry-after", [None])[0]
        wait = None if after is None or not after.isdigit() else float(after)
        return Refused(response.code, kind, detail, wait)
