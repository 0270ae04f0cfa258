"""What one address, one caller, or all together may take: connections, requests, memory."""

import ipaddress
from collections import OrderedDict
from typing import Protocol

from attrs import define, field
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.interfaces import IAddress, IReactorTime

OWN = frozenset({"127.0.0.1", "::1"})
"""This machine: a proxy that speaks for everybody, or scripts of its owner."""
_NETWORK = 64  # bits; whoever has an IPv6 address has all of its /64


def source(address: IAddress | None) -> str | None:
    """Return whom a connection counts for; None for this machine, which is not counted.

    A Unix socket is this machine too. Other addresses of 127.0.0.0/8 are not: nobody
    uses them but for a reason.
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
class Places:
    """Counts what each source holds; remembers only those that hold something."""

    most: int
    """How many one source may hold."""
    taken: dict[str, int] = field(factory=dict, init=False)

    def take(self, source: str | None) -> bool:
        """Return whether there is a place for a source; it then has to be given back."""
        if source is None:
            return True
        held = self.taken.get(source, 0)
        if held >= self.most:
            return False
        self.taken[source] = held + 1
        return True

    def give_back(self, source: str | None) -> None:
        """Take back what was taken."""
        if source is None:
            return
        self.taken[source] -= 1
        if not self.taken[source]:
            del self.taken[source]


@define(eq=False)
class Rate:
    """Lets each source do something so often: a token bucket for each.

    Of more sources than are kept the one seen longest ago is forgotten, and may then do
    as much at once as a new one.
    """

    clock: IReactorTime
    per_second: float
    burst: int
    """How much a source may do at once after a silence."""
    sources: int = 10_000
    """How many are kept."""
    # For each source its tokens, and when there were so many; last seen, last in line.
    buckets: OrderedDict[str, tuple[float, float]] = field(factory=OrderedDict, init=False)

    def wait(self, source: str | None) -> float:
        """Count one more; return 0, or the seconds after which it would have been right.

        What has to wait is not counted: who keeps asking is served as often as who waits.
        """
        if source is None:
            return 0.0
        now = self.clock.seconds()
        tokens, at = self.buckets.pop(source, (float(self.burst), now))
        tokens = min(self.burst, tokens + (now - at) * self.per_second)
        may = tokens >= 1
        self.buckets[source] = (tokens - may, now)
        if len(self.buckets) > self.sources:
            self.buckets.popitem(last=False)
        return 0.0 if may else (1 - tokens) / self.per_second


@define(eq=False)
class Budget:
    """Counts bytes that are held for many: in total, and for each."""

    total: int
    share: int
    """How many of them may be for one."""
    used: int = field(default=0, init=False)
    held: dict[str, int] = field(factory=dict, init=False)

    def take(self, name: str | None, size: int) -> bool:
        """Return whether there is room; it then has to be given back. None: no count."""
        if name is None:
            return True
        held = self.held.get(name, 0) + size
        if held > self.share or self.used + size > self.total:
            return False
        self.held[name] = held
        self.used += size
        return True

    def give_back(self, name: str | None, size: int) -> None:
        """Take back what was taken."""
        if name is None or not size:
            return
        self.used -= size
        self.held[name] -= size
        if not self.held[name]:
            del self.held[name]


class Holder(Protocol):
    """Somebody who can give way."""

    def give_way(self) -> None:
        """Hold nothing more."""


@define(eq=False)
class Strangers:
    """Counts bytes that are held for those of whom nobody knows yet who they are.

    If there are too many, who holds most of them gives way: a request that is meant well
    is small, and known in a moment.
    """

    most: int
    total: int = field(default=0, init=False)
    held: dict[Holder, int] = field(factory=dict, init=False)

    def hold(self, who: Holder, size: int) -> None:
        """Count so many bytes more; somebody, or this one, may have to give way."""
        self.held[who] = self.held.get(who, 0) + size
        self.total += size
        while self.total > self.most:
            largest = max(self.held, key=self.held.__getitem__)
            self.free(largest)
            largest.give_way()

    def free(self, who: Holder) -> None:
        """Count nothing any more for somebody."""
        self.total -= self.held.pop(who, 0)
