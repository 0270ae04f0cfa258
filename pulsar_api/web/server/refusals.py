"""Responses for requests that are rejected before routing."""

import math

from twisted.internet.interfaces import IReactorTime
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Request

from pulsar_api.web import encoding
from pulsar_api.web.headers import ALWAYS
from pulsar_api.web.responses import problem
from pulsar_api.web.server.body import MAX_BODY

HEAD_DEADLINE = 10.0
"""Seconds from the first byte of a request to the end of its head."""
BODY_DEADLINE = 30.0
"""Seconds for the whole body."""
MAX_HEADERS = 100
MAX_NAME = 128
"""Bytes of a header name."""
PENALTY = 1.0
"""Seconds for which the response to an address with too many requests is delayed."""


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
    f"A body may have at most {MAX_BODY} bytes.",
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
    "This is not an HTTP/1.1 request whose head has at most 16 KiB and "
    f"{MAX_HEADERS} headers, with names of at most {MAX_NAME} bytes.",
)
TOO_MANY = _raw_problem(
    503,
    "Service Unavailable",
    "too-many-connections",
    "The daemon has too many connections; try again in a moment.",
    "Retry-After: 5\r\n",
)
TOO_MANY_FROM_ADDRESS = _raw_problem(
    429,
    "Too Many Requests",
    "too-many-from-address",
    "Your address has too many open connections; close some, or try again in a moment.",
    "Retry-After: 5\r\n",
)


class TooManyRequests(Resource):
    """Answers, after a delay, when the address may send the next request.

    Without the delay one address got 17,000 such responses a second, which takes a whole
    processor. Nothing is read from the connection meanwhile.
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
        detail = f"Your address sends too many requests; try again in {self._wait} seconds."
        title = "Too many requests"
        body = problem(request, 429, "too-many-requests", title, detail)
        request.write(b"" if request.method == b"HEAD" else body)
        request.finish()
