"""What one address may take: connections at a time, requests in a second."""

import ipaddress
from collections import OrderedDict

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
