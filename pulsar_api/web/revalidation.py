"""Ends answers that take long when the rights of their caller change."""

from collections.abc import Awaitable, Callable

from attrs import define, field
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from pulsar_api.auth.rights import Caller
from pulsar_api.auth.sessions import Presented
from pulsar_api.errors import LoginBound, NotAuthenticated, PulsarError

_log = Logger()

RECHECK = 5.0
"""Seconds between two checks of the callers that are being answered."""
GRACE = 300.0
"""Seconds for which an answer goes on while its caller cannot be checked."""


@define(eq=False)
class _Watched:
    """An answer that takes long, and its caller."""

    credentials: Presented
    caller: Caller
    confirmed: float
    """When the caller was last known to have the same rights."""
    end: Callable[[], object]


@define(eq=False)
class Revalidation:
    """Checks from time to time that callers still have the rights that they had."""

    _clock: IReactorTime
    _authenticate: Callable[[Presented, str], Awaitable[Caller]]
    """Returns the caller with these credentials at an address, as of now."""
    _watched: dict[_Watched, None] = field(factory=dict, init=False)
    _next: IDelayedCall | None = field(default=None, init=False)

    def watch(
        self, credentials: Presented, caller: Caller, end: Callable[[], object]
    ) -> Callable[[], None]:
        """Call ``end`` when the caller's rights change. Return a function that stops it."""
        watched = _Watched(credentials, caller, self._clock.seconds(), end)
        self._watched[watched] = None
        if self._next is None:
            self._next = self._clock.callLater(RECHECK, self._recheck)

        def stop() -> None:
            self._watched.pop(watched, None)

        return stop

    def release(self) -> None:
        """Stop watching."""
        if self._next is not None and self._next.active():
            self._next.cancel()
        self._watched.clear()

    def _recheck(self) -> None:
        self._next = None
        now = self._clock.seconds()
        # Those with the same credentials and address are checked together.
        callers: dict[tuple[Presented, str], list[_Watched]] = {}
        for watched in self._watched:
            if watched.confirmed <= now - RECHECK:
                key = watched.credentials, watched.caller.address
                callers.setdefault(key, []).append(watched)
        for (credentials, address), group in callers.items():
            checking = Deferred.fromCoroutine(self._check(credentials, address, group))
            checking.addErrback(self._cannot_check, group)
        if self._watched:
            self._next = self._clock.callLater(RECHECK, self._recheck)

    def _cannot_check(self, failure: Failure, group: list[_Watched]) -> None:
        _log.failure("Cannot check whether callers still have their rights", failure)
        for watched in group:
            self._watched.pop(watched, None)
            watched.end()

    async def _check(
        self, credentials: Presented, address: str, group: list[_Watched]
    ) -> None:
        now = self._clock.seconds()
        current = None
        unsure = False
        who = group[0].caller.actor.name
        try:
            caller = await self._authenticate(credentials, address)
            current = caller.principal, caller.grants
        except (NotAuthenticated, LoginBound) as e:
            _log.info("{who} has no access any more: {e}", who=who, e=e)
        except PulsarError as e:
            _log.warn("Cannot check whether {who} still has access: {e}", who=who, e=e)
            unsure = True
        for watched in group:
            if (watched.caller.principal, watched.caller.grants) == current:
                watched.confirmed = now
            elif watched in self._watched and not (
                unsure and now < watched.confirmed + GRACE
            ):
                del self._watched[watched]
                watched.end()
