"""Divides the turns of the reactor among those who have much to do."""

from collections import OrderedDict, deque

from attrs import define, field
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime


@define(eq=False)
class Rota:
    """Lets one of many work in a turn of the reactor, one after the other.

    Whoever has much to do does it in steps of some milliseconds and waits before each. So
    others, who have little to do, wait for one step, however many have much. Who does
    several things at a time has no more turns than who does one: they share a name.
    """

    clock: IReactorTime
    _waiting: OrderedDict[object, deque[Deferred[None]]] = field(
        factory=OrderedDict, init=False
    )
    """By name, in the order in which they have their turn."""
    _due: bool = field(default=False, init=False)

    def turn(self, name: str | None = None) -> Deferred[None]:
        """Fire when it is the caller's turn, never at once. Cancelling gives it up.

        Without a name nobody shares it.
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
                self._waiting[key] = waiters  # last in line
            self._call()
            waiter.callback(None)

    def _forget(self, key: object, waiter: Deferred[None]) -> None:
        waiters = self._waiting.get(key)
        if waiters is not None and waiter in waiters:
            waiters.remove(waiter)
            if not waiters:
                del self._waiting[key]
