"""Shares the reactor fairly between callers that have much work to do."""

from collections import OrderedDict, deque

from attrs import define, field
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime


@define(eq=False)
class TurnScheduler:
    """Lets one caller work in each iteration of the reactor, in round-robin order.

    A caller with much work does it in steps of a few milliseconds and waits for its turn
    before each step. So a short request waits for one step only, however many long ones
    there are. A caller that does several things at once gives all of them the same name,
    and gets no more turns than a caller that does one.
    """

    clock: IReactorTime
    _waiting: OrderedDict[object, deque[Deferred[None]]] = field(
        factory=OrderedDict, init=False
    )
    """By name, in the order of their next turns."""
    _due: bool = field(default=False, init=False)

    def wait(self, name: str | None = None) -> Deferred[None]:
        """Return a Deferred that fires at the caller's next turn, never at once.

        Cancel it to give up the turn. Callers with one name share their turns; a caller
        without a name shares them with nobody.
        """
        key = object() if name is None else name
        waiter: Deferred[None] = Deferred(lambda waiter: self._forget(key, waiter))
        self._waiting.setdefault(key, deque()).append(waiter)
        self._call()
        return waiter

    def _call(self) -> None:
        if self._waiting and not self._due:
            self._due = True
            self.clock.callLater(0, self._next)

    def _next(self) -> None:
        self._due = False
        if self._waiting:
            key, waiters = self._waiting.popitem(last=False)
            waiter = waiters.popleft()
            if waiters:
                self._waiting[key] = waiters  # at the end of the queue
            self._call()
            waiter.callback(None)

    def _forget(self, key: object, waiter: Deferred[None]) -> None:
        waiters = self._waiting.get(key)
        if waiters is not None and waiter in waiters:
            waiters.remove(waiter)
            if not waiters:
                del self._waiting[key]
