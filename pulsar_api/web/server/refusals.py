"""What is answered before anybody routes: to who is too large, too slow, or too many."""

import math

from twisted.internet.interfaces import IReactorTime
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Request

from pulsar_api.web import encoding
from pulsar_api.web.headers import ALWAYS
from pulsar_api.web.responses import problem
from pulsar_api.web.server.body import MAX_BODY

HEAD_DEADLINE = 10.0
"""Seconds from a request's first byte to the end of its head, however it trickles."""
BODY_DEADLINE = 30.0
"""Seconds for the whole body."""
MAX_HEADERS = 100
MAX_NAME = 128
"""Bytes of the name of a header."""
PENALTY = 1.0
"""Seconds after which who asks too often is told so."""


def _raw_problem(
    status: int, reason: str, type_: str, detail: str, more: str = ""
) -> bytes:
    body = encoding.problem(status, type_, reason, detail)
    more += "".join(f"{name}: {value}\r\n" for name, value in ALWAYS)
    head = (
        f"HTTP/1.1 {status} {reason}\r\nContent-Type: {encoding.PROBLEM}\r\n{more}"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


TOO_LARGE = _raw_problem(
    413,
    "Content Too Large",
    "body-too-large",
    f"A body may have {MAX_BODY} bytes at most.",
)
TOO_SLOW = _raw_problem(
    408,
    "Request Timeout",
    "too-slow",
    f"The head of a request must arrive within {HEAD_DEADLINE:g} seconds, its body "
    f"within {BODY_DEADLINE:g} more.",
)
MALFORMED = _raw_problem(
    400,
    "Bad Request",
    "malformed",
    "This is no HTTP/1.1 request whose head has 16 KiB at most, in "
    f"{MAX_HEADERS} headers with names of {MAX_NAME} bytes at most.",
)
TOO_MANY = _raw_problem(
    503,
    "Service Unavailable",
    "too-many-connections",
    "The daemon has as many connections as it can serve; try again in a moment.",
    "Retry-After: 5\r\n",
)
TOO_MANY_FROM_ADDRESS = _raw_problem(
    429,
    "Too Many Requests",
    "too-many-from-address",
    "Your address has as many connections open as one may have; close some, or try again "
    "in a moment.",
    "Retry-After: 5\r\n",
)


class TooManyRequests(Resource):
    """Says when an address may ask again, and takes its time to say so.

    At once it would cost others: one address got 17,000 such answers in a second, and a
    processor with them. Nothing is read from the connection meanwhile.
    """

    isLeaf = True

    def __init__(self, clock: IReactorTime, wait: float) -> None:
        super().__init__()
        self._clock = clock
        self._wait = max(1, math.ceil(wait))

    def render(self, request: Request) -> int:
        later = self._clock.callLater(PENALTY, self._answer, request)
        request.notifyFinish().addErrback(lambda _: later.cancel())
        return NOT_DONE_YET

    def _answer(self, request: Request) -> None:
        request.setHeader("Retry-After", str(self._wait))
        detail = f"Your address asks too often; wait {self._wait} s, then ask again."
        title = "Too many requests"
        body = problem(request, 429, "too-many-requests", title, detail)
        request.write(b"" if request.method == b"HEAD" else body)
        request.finish()
