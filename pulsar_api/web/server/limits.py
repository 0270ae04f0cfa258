"""Limits for one address, one caller, and all together: connections, requests, memory."""

import ipaddress
from typing import Protocol

from attrs import define, field
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.interfaces import IAddress, IReactorTime

from pulsar_api.bounded import BoundedDict

OWN = frozenset({"127.0.0.1", "::1"})
"""This machine: a proxy that connects for everybody, or scripts of its owner."""
_NETWORK = 64  # bits; the owner of one IPv6 address has all of its /64


def source(address: IAddress | None) -> str | None:
    """Return what a connection counts for: an IPv4 address or an IPv6 network.

    None for this machine, which has no limit: ``127.0.0.1``, ``::1`` and Unix sockets.
    Other addresses of 127.0.0.0/8 are counted.
    """
    if not isinstance(address, IPv4Address | IPv6Address):
        return None
    ip = ipaddress.ip_address(address.host.partition("%")[0])
    if ip.version == 6:
        ip = ip.ipv4_mapped or ip
    if str(ip) in OWN:
        return None
    if ip.version == 6:
        return str(ipaddress.ip_network((ip, _NETWORK), strict=False))
    return str(ip)


@define(eq=False)
class Slots:
    """Counts the slots of each source; remembers only sources that hold some."""

    most: int
    """Slots that one source may hold."""
    taken: dict[str, int] = field(factory=dict, init=False)

    def take(self, source: str | None) -> bool:
        """Take a slot for a source, to be given back; return whether there was one."""
        if source is None:
            return True
        held = self.taken.get(source, 0)
        if held >= self.most:
            return False
        self.taken[source] = held + 1
        return True

    def give_back(self, source: str | None) -> None:
        """Give a slot back."""
        if source is None:
            return
        self.taken[source] -= 1
        if not self.taken[source]:
            del self.taken[source]


@define(eq=False)
class Rate:
    """Limits how often each source does something, by a token bucket for each.

    At most ``sources`` buckets are kept. Beyond that the source seen longest ago is
    forgotten, and may then do as much at once as a new one.
    """

    clock: IReactorTime
    per_second: float
    burst: int
    """How often a source may do it at once after a silence."""
    sources: int = 10_000
    """Buckets that are kept."""
    buckets: BoundedDict[str, tuple[float, float]] = field(init=False)
    """For each source its tokens, and when there were so many."""

    @buckets.default
    def _new_buckets(self) -> BoundedDict[str, tuple[float, float]]:
        return BoundedDict(self.sources)

    def wait(self, source: str | None) -> float:
        """Count one use and return 0; or return the seconds to wait, and count nothing.

        A source that keeps asking is thus served as often as one that waits.
        """
        if source is None:
            return 0.0
        now = self.clock.seconds()
        tokens, at = self.buckets.get(source, (float(self.burst), now))
        tokens = min(self.burst, tokens + (now - at) * self.per_second)
        allowed = tokens >= 1
        self.buckets[source] = (tokens - allowed, now)
        return 0.0 if allowed else (1 - tokens) / self.per_second


@define(eq=False)
class Budget:
    """Counts bytes that are held for callers: in total, and for each."""

    total: int
    share: int
    """Bytes that one caller may hold of them."""
    used: int = field(default=0, init=False)
    held: dict[str, int] = field(factory=dict, init=False)

    def take(self, name: str | None, size: int) -> bool:
        """Take bytes, to be given back; return whether there was room.

        What a caller named None holds is not counted.
        """
        if name is None:
            return True
        held = self.held.get(name, 0) + size
        if held > self.share or self.used + size > self.total:
            return False
        self.held[name] = held
        self.used += size
        return True

    def give_back(self, name: str | None, size: int) -> None:
        """Give bytes back."""
        if name is None or not size:
            return
        self.used -= size
        self.held[name] -= size
        if not self.held[name]:
            del self.held[name]


class Holder(Protocol):
    """A connection that can be closed to free its memory."""

    def evict(self) -> None:
        """Free what is held."""


@define(eq=False)
class UnidentifiedMemory:
    """Counts bytes that are held for callers who are not identified yet.

    Beyond ``most`` bytes the holder of most of them is evicted: an honest request is small
    and identified within a moment.
    """

    most: int
    total: int = field(default=0, init=False)
    held: dict[Holder, int] = field(factory=dict, init=False)

    def hold(self, who: Holder, size: int) -> None:
        """Count bytes of a holder; this one or others may be evicted for it."""
        self.held[who] = self.held.get(who, 0) + size
        self.total += size
        while self.total > self.most:
            largest = max(self.held, key=self.held.__getitem__)
            self.free(largest)
            largest.evict()

    def free(self, who: Holder) -> None:
        """Count nothing any more for a holder."""
        self.total -= self.held.pop(who, 0)
