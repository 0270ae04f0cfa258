"""Divides the turns of the reactor among those who have much to do."""

from collections import OrderedDict

from attrs import define, field
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime


@define(eq=False)
class Rota:
    """Lets one of many work in a turn of the reactor, one after the other.

    Whoever has much to do does it in steps of some milliseconds and waits before each. So
    others, who have little to do, wait for one step, however many have much.
    """

    clock: IReactorTime
    _waiting: OrderedDict[Deferred[None], None] = field(factory=OrderedDict, init=False)
    _due: bool = field(default=False, init=False)

    def turn(self) -> Deferred[None]:
        """Fire when it is the caller's turn, never at once. Cancelling gives it up."""
        waiter: Deferred[None] = Deferred(self._forget)
        self._waiting[waiter] = None
        self._call()
        return waiter

    def _call(self) -> None:
        if self._waiting and not self._due:
            self._due = True
            self.clock.callLater(0, self._next)

    def _next(self) -> None:
        self._due = False
        if self._waiting:
            waiter, _ = self._waiting.popitem(last=False)
            self._call()
            waiter.callback(None)

    def _forget(self, waiter: Deferred[None]) -> None:
        self._waiting.pop(waiter, None)
