"""Request bodies: read when a route wants them, within limits of memory and time."""

from collections.abc import Callable

from attrs import define, field, frozen
from twisted.internet.defer import Deferred, fail, succeed
from twisted.web.server import Request

from pulsar_api.errors import PulsarError
from pulsar_api.web.server.limits import Budget

MAX_BODY = 1 << 20
FORM = 1 << 14
"""Bytes of the body of a sign-in, whose caller is not identified yet."""
EAGER = 1 << 14
"""Bytes that are read before a route wants the body; most bodies are smaller."""


@frozen
class BodyTooLarge(PulsarError):
    """A body is too large."""

    most: int

    def __str__(self) -> str:
        return f"The body may have at most {self.most} bytes."


@frozen
class BodyTooSlow(PulsarError):
    """A body did not arrive in time."""

    seconds: float

    def __str__(self) -> str:
        return f"The body must arrive within {self.seconds:g} seconds."


class BodiesFull(PulsarError):
    """There is no memory for this body now."""

    def __str__(self) -> str:
        return "Other requests take all the memory for bodies; try again in a moment."


@define(eq=False)
class Body:
    """The body of one request, most of which may not have been sent yet.

    The route decides whether it is read. An unwanted body is discarded as it comes.
    """

    length: int | None
    """The announced length in bytes; None if there is none."""
    _budget: Budget
    _wanted: Callable[[], object]
    """Is called when a route wants the body."""
    _enough: Callable[[], object]
    """Is called when more has come than is read before that."""
    received: int = field(default=0, init=False)
    complete: bool = field(default=False, init=False)
    _pieces: list[bytes] = field(factory=list, init=False)
    _who: str | None = field(default=None, init=False)
    _most: int = field(default=MAX_BODY, init=False)
    _charged: int = field(default=0, init=False)
    _waiter: Deferred[bytes] | None = field(default=None, init=False)
    _error: PulsarError | None = field(default=None, init=False)
    _dropped: bool = field(default=False, init=False)

    def read(self, most: int, who: str | None) -> Deferred[bytes]:
        """Fire with the body; fail with `BodyTooLarge`, `BodyTooSlow` or `BodiesFull`.

        ``most``: bytes that it may have. ``who``: the caller in whose share of memory it is
        counted; None for a caller who is not identified, whose connection is counted.
        """
        self._most, self._who = most, who
        if self.length is not None and self.length > most:
            self.fail(BodyTooLarge(most))
        self._check(self.received)
        if self._error is not None:
            # Not kept, as its traceback would refer to the reader, and so to the body.
            error, self._error = self._error, None
            return fail(error)
        if self.complete:
            return succeed(self._take())
        self._waiter = Deferred(lambda _: self.drop())
        self._wanted()
        return self._waiter

    def receive(self, data: bytes) -> None:
        """Receive a piece."""
        self.received += len(data)
        if self._dropped:
            if self.length is None and self.received > EAGER:
                self._enough()  # it may be endless
            return
        self._pieces.append(data)
        if self._waiter is not None or self.received > self._most:
            self._check(len(data))
        elif self.received > EAGER:
            self._enough()

    def end(self) -> None:
        """End the body."""
        self.complete = True
        if self._waiter is not None:
            waiter, self._waiter = self._waiter, None
            data = b"".join(self._pieces)
            self._pieces = []
            waiter.callback(data)
            self.drop()

    def fail(self, error: PulsarError) -> None:
        """Fail with an error for the route that wants the body, now or later."""
        if self._dropped:
            return
        waiter = self._waiter
        self.drop()
        if waiter is None:
            self._error = error
        else:
            waiter.errback(error)

    def drop(self) -> None:
        """Free the body; what still comes is discarded."""
        self._dropped = True
        self._waiter = None
        self._pieces = []
        self._budget.give_back(self._who, self._charged)
        self._charged = 0

    def _take(self) -> bytes:
        data = b"".join(self._pieces)
        self.drop()
        return data

    def _check(self, size: int) -> None:
        if self._dropped:
            return
        if self.received > self._most:
            self.fail(BodyTooLarge(self._most))
        elif not self._budget.take(self._who, size):
            self.fail(BodiesFull())
        else:
            self._charged += size


class BodyRequest(Request):
    """A request that is answered as soon as its head is there."""

    body: Body | None = None
    """None if the request has no body."""

    def caller_known(self) -> None:
        """Note that the caller has been identified."""


async def body_of(request: Request, who: str | None, most: int = MAX_BODY) -> bytes:
    """Return the body of a request. It raises the errors of `Body.read`."""
    if not isinstance(request, BodyRequest):
        return b"" if request.content is None else request.content.read()
    return b"" if request.body is None else await request.body.read(most, who)
