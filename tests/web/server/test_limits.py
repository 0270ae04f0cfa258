"""Tests of sources of connections, and of their limits."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.interfaces import IAddress
from twisted.internet.task import Clock

from pulsar_api.web.server.limits import Rate, Slots, source


def v4(host: str) -> IAddress:
    """Return the IPv4 address of a client."""
    return IPv4Address("TCP", host, 40000)


def v6(host: str) -> IAddress:
    """Return the IPv6 address of a client."""
    return IPv6Address("TCP", host, 40000)


@pytest.mark.parametrize(
    "address",
    [v4("127.0.0.1"), v6("::1"), v6("::ffff:127.0.0.1"), UNIXAddress("/run/x"), None],
    ids=str,
)
def test_this_machine_is_not_a_source(address: IAddress | None) -> None:
    """A proxy on it connects for many clients."""
    assert source(address) is None


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (v4("127.0.0.2"), "127.0.0.2"),
        (v4("192.0.2.7"), "192.0.2.7"),
        (v6("::ffff:192.0.2.7"), "192.0.2.7"),
        (v6("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::/64"),
        (v6("2001:db8:1:2::1"), "2001:db8:1:2::/64"),
        (v6("2001:db8:1:3::1"), "2001:db8:1:3::/64"),
        (v6("fe80::1%eth0"), "fe80::/64"),
    ],
    ids=str,
)
def test_a_source_is_an_address_or_a_network(address: IAddress, expected: str) -> None:
    """An IPv4 address can be written as IPv6. An IPv6 network of /64 is one source."""
    assert source(address) == expected


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans())))
def test_slots_count_what_is_held(steps: list[tuple[str, bool]]) -> None:
    """No source holds more than the limit, and one without slots takes no memory."""
    slots = Slots(2)
    held: Counter[str] = Counter()
    for name, take in steps:
        if take:
            assert slots.take(name) == (held[name] < 2)
            held[name] = min(2, held[name] + 1)
        elif held[name]:
            slots.give_back(name)
            held[name] -= 1
    assert slots.taken == dict(+held)


def test_this_machine_takes_any_number_of_slots() -> None:
    """Its slots are not counted."""
    slots = Slots(1)
    assert all(slots.take(None) for _ in range(5))
    slots.give_back(None)
    assert slots.taken == {}


@given(
    st.lists(st.integers(0, 8)),
    st.integers(1, 4),
    st.integers(1, 5),
)
def test_no_interval_has_more_than_burst_and_rate_allow(
    quarters: list[int], per_second: int, burst: int
) -> None:
    """The limit is the burst, plus the rate times the length of the interval."""
    clock = Clock()
    rate = Rate(clock, per_second, burst)
    done: list[float] = []
    for quarter in quarters:
        clock.advance(quarter / 4)
        if not rate.wait("a"):
            done.append(clock.seconds())
    for first, begin in enumerate(done):
        for last, end in enumerate(done[first:], first):
            assert last - first + 1 <= burst + per_second * (end - begin)


@given(st.integers(1, 100), st.integers(1, 20))
def test_a_source_that_waits_as_long_as_told_is_served(per_second: int, burst: int) -> None:
    """It is not served earlier, and served once."""
    clock = Clock()
    rate = Rate(clock, per_second, burst)
    assert [rate.wait("a") for _ in range(burst)] == [0.0] * burst
    wait = rate.wait("a")
    assert 0 < wait <= 1 / per_second
    clock.advance(wait / 2)
    assert rate.wait("a") > 0
    clock.advance(wait)
    assert rate.wait("a") == 0
    assert rate.wait("b") == 0


def test_the_number_of_remembered_sources_is_limited() -> None:
    """The one seen longest ago is dropped first."""
    rate = Rate(Clock(), 1, 1, sources=3)
    for name in "abc":
        assert rate.wait(name) == 0
    assert rate.wait("a") > 0
    assert rate.wait("d") == 0
    assert set(rate.buckets) == {"c", "a", "d"}
    assert rate.wait("a") > 0
    assert rate.wait(None) == 0
    assert len(rate.buckets) == 3
