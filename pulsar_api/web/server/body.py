"""Bodies of requests: read when somebody wants them, and no more than there is room for."""

from collections.abc import Callable

from attrs import define, field, frozen
from twisted.internet.defer import Deferred, fail, succeed
from twisted.web.server import Request

from pulsar_api.errors import PulsarError
from pulsar_api.web.server.limits import Budget

MAX_BODY = 1 << 20
FORM = 1 << 14
"""Bytes of a body of somebody who is not known; it says who they are."""
EAGER = 1 << 14
"""Bytes that are taken before anybody wants them: most bodies are smaller."""


@frozen
class BodyTooLarge(PulsarError):
    """A body has more bytes than are read."""

    most: int

    def __str__(self) -> str:
        return f"The body may have {self.most} bytes at most."


@frozen
class BodyTooSlow(PulsarError):
    """A body did not arrive in time."""

    seconds: float

    def __str__(self) -> str:
        return f"The body must arrive within {self.seconds:g} seconds."


class BodiesFull(PulsarError):
    """There is no room for this body now."""

    def __str__(self) -> str:
        return "The bodies of other requests take all the room; try again in a moment."


@define(eq=False)
class Body:
    """The body of one request, most of which may not have been sent yet.

    Who answers the request decides whether it is read at all. What nobody wants is thrown
    away as it comes.
    """

    length: int | None
    """As it was announced; None if nobody knows."""
    _budget: Budget
    _wanted: Callable[[], object]
    """Called when somebody wants it."""
    _enough: Callable[[], object]
    """Called when more has come than is taken before that."""
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
        """Fire with all of it; fail with `BodyTooLarge`, `BodyTooSlow` or `BodiesFull`.

        ``who`` is the caller for whom there must be room. None: nobody knows them, and
        what they hold is counted with their connection.
        """
        self._most, self._who = most, who
        if self.length is not None and self.length > most:
            self.fail(BodyTooLarge(most))
        self._check(self.received)
        if self._error is not None:
            # Not kept: it will know who wanted the body, and so the body.
            error, self._error = self._error, None
            return fail(error)
        if self.complete:
            return succeed(self._take())
        self._waiter = Deferred(lambda _: self.drop())
        self._wanted()
        return self._waiter

    def receive(self, data: bytes) -> None:
        """Take a piece."""
        self.received += len(data)
        if self._dropped:
            if self.length is None and self.received > EAGER:
                self._enough()  # it may be without an end
            return
        self._pieces.append(data)
        if self._waiter is not None or self.received > self._most:
            self._check(len(data))
        elif self.received > EAGER:
            self._enough()

    def end(self) -> None:
        """There is no more."""
        self.complete = True
        if self._waiter is not None:
            waiter, self._waiter = self._waiter, None
            data = b"".join(self._pieces)
            self._pieces = []
            waiter.callback(data)
            self.drop()

    def fail(self, error: PulsarError) -> None:
        """Whoever wants it, or will want it, gets this error."""
        if self._dropped:
            return
        waiter = self._waiter
        self.drop()
        if waiter is None:
            self._error = error
        else:
            waiter.errback(error)

    def drop(self) -> None:
        """Hold nothing of it any more."""
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
    """A request that is answered from its head on, whenever its body comes."""

    body: Body | None = None
    """None: it has none."""

    def caller_known(self) -> None:
        """Be told that somebody knows who sends this."""


async def body_of(request: Request, who: str | None, most: int = MAX_BODY) -> bytes:
    """Return the body of a request, as `Body.read`."""
    if not isinstance(request, BodyRequest):
        return b"" if request.content is None else request.content.read()
    return b"" if request.body is None else await request.body.read(most, who)
