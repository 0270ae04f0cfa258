"""Tests of the authenticator: accepted callers, caching, and limits for guesses."""

import pytest
from attrs import define, field
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import LogEvent
from twisted.trial.unittest import SynchronousTestCase

from pulsar_api.auth.authenticator import (
    FAILURES,
    MAX_LOOKUPS,
    PATIENCE,
    Authenticator,
    Credentials,
    Throttle,
)
from pulsar_api.auth.rights import Identity
from pulsar_api.errors import NotAuthenticated, ProviderUnavailable, TooManyFailures
from tests.fakes import person

CASE = SynchronousTestCase()
HERE, THERE = "192.0.2.1", "192.0.2.2"
ALICE = Credentials("", "alice's token")


@define(eq=False)
class FakeProvider:
    """A provider that knows the tokens of a test, and answers when the test says so."""

    known: dict[str, str] = field(factory=dict)
    asked: list[str] = field(factory=list)
    waiting: list[Deferred[None]] = field(factory=list)
    slow: bool = False
    broken: Exception | None = None
    good: float = 60.0
    bad: float = 10.0

    def takes(self, credentials: Credentials) -> bool:
        """Accept all credentials except those of the user "nobody"."""
        return credentials.user != "nobody"

    async def identify(self, credentials: Credentials) -> Identity | None:
        """Answer."""
        self.asked.append(credentials.secret)
        if self.slow:
            self.waiting.append(Deferred())
            await self.waiting[-1]
        if self.broken is not None:
            raise self.broken
        name = self.known.get(credentials.secret)
        return None if name is None else Identity(person(name))


@define(eq=False)
class World:
    """An authenticator with one provider. Time stands still."""

    clock: Clock = field(factory=Clock)
    provider: FakeProvider = field(factory=FakeProvider)
    authenticator: Authenticator = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.provider.known[ALICE.secret] = "alice"
        self.authenticator = Authenticator([self.provider], self.clock)

    def begin(self, shown: Credentials, address: str = HERE) -> Deferred[Identity]:
        """Start to authenticate."""
        return Deferred.fromCoroutine(self.authenticator.identify(shown, address))

    def ask(self, shown: Credentials, address: str = HERE) -> str:
        """Return the name of the caller."""
        return CASE.successResultOf(self.begin(shown, address)).principal.name

    def refused(self, shown: Credentials, address: str = HERE) -> BaseException:
        """Return the error of a refused caller."""
        error: BaseException = CASE.failureResultOf(self.begin(shown, address)).value
        return error

    def answer_all(self) -> None:
        """Let the provider answer all pending questions."""
        while self.provider.waiting:
            self.provider.waiting.pop(0).callback(None)

    @property
    def idle(self) -> bool:
        """Whether nothing is kept of finished look-ups."""
        return not self.authenticator._queues and not self.authenticator._lookups

    def guess(self, number: int, address: str = HERE) -> BaseException:
        """Try one of many wrong tokens."""
        return self.refused(Credentials("", f"guess {number}"), address)


@pytest.fixture
def world() -> World:
    """Return a new world."""
    return World()


def test_an_accepted_credential_is_cached_for_a_while(world: World) -> None:
    """A caller who was removed is refused exactly after that time."""
    assert world.ask(ALICE) == "alice"
    world.provider.known.clear()
    world.clock.advance(59.9)
    assert world.ask(ALICE) == "alice"
    assert len(world.provider.asked) == 1
    world.clock.advance(0.1)
    assert isinstance(world.refused(ALICE), NotAuthenticated)


def test_a_refused_credential_is_cached_for_a_shorter_while(world: World) -> None:
    """The caller may have been added meanwhile."""
    bob = Credentials("", "bob's token")
    assert isinstance(world.refused(bob), NotAuthenticated)
    world.provider.known["bob's token"] = "bob"
    world.clock.advance(9.9)
    assert isinstance(world.refused(bob), NotAuthenticated)
    world.clock.advance(0.1)
    assert world.ask(bob) == "bob"


def test_a_failure_of_the_provider_is_not_cached(world: World) -> None:
    """It does not count as a guess. Callers in the cache go on until their time is over."""
    assert world.ask(ALICE) == "alice"
    world.provider.broken = ProviderUnavailable("GitHub", "ill")
    for number in range(3 * FAILURES):
        assert isinstance(world.guess(number), ProviderUnavailable)
    assert world.ask(ALICE) == "alice"
    world.clock.advance(60)
    assert isinstance(world.refused(ALICE), ProviderUnavailable)
    world.provider.broken = None
    assert world.ask(ALICE) == "alice"


def test_an_internal_error_admits_no_caller(
    world: World, logged_failures: list[LogEvent]
) -> None:
    """The log has the error."""
    world.provider.broken = ZeroDivisionError()
    assert isinstance(world.refused(ALICE), ZeroDivisionError)
    assert len(logged_failures) == 1
    logged_failures.clear()


def test_credentials_without_a_provider_are_refused(world: World) -> None:
    """They count as guesses."""
    for number in range(FAILURES):
        shown = Credentials("nobody", f"{number}")
        assert isinstance(world.refused(shown), NotAuthenticated)
    assert isinstance(world.refused(Credentials("nobody", "x")), TooManyFailures)


def test_an_address_that_guesses_is_refused(world: World) -> None:
    """It is refused until a minute after its tenth last guess."""
    for number in range(FAILURES):
        world.clock.advance(1)
        assert isinstance(world.guess(number), NotAuthenticated)
    error = world.guess(FAILURES)
    assert isinstance(error, TooManyFailures)
    assert error.retry_after == 60 - FAILURES + 1
    assert len(world.provider.asked) == FAILURES
    assert isinstance(world.refused(ALICE), TooManyFailures)
    assert world.ask(ALICE, THERE) == "alice"
    # A caller who was accepted before goes on, even from this address.
    assert world.ask(ALICE) == "alice"
    world.clock.advance(61)
    assert isinstance(world.guess(0), NotAuthenticated)


def test_a_repeated_wrong_token_counts_as_guesses(world: World) -> None:
    """A script with an old token gets a refusal from the cache."""
    shown = Credentials("", "old")
    for _ in range(FAILURES):
        assert isinstance(world.refused(shown), NotAuthenticated)
    assert isinstance(world.refused(shown), TooManyFailures)
    assert world.provider.asked == ["old"]


def test_concurrent_guesses_are_limited(world: World) -> None:
    """No more of them are tried than of successive ones.

    Other addresses are not delayed.
    """
    world.provider.slow = True
    guesses = [world.begin(Credentials("", f"guess {n}")) for n in range(5 * MAX_LOOKUPS)]
    elsewhere = world.begin(ALICE, THERE)
    assert len(world.provider.asked) == MAX_LOOKUPS + 1
    world.answer_all()
    assert CASE.successResultOf(elsewhere).principal.name == "alice"
    for guess in guesses[:FAILURES]:
        CASE.failureResultOf(guess, NotAuthenticated)
    for guess in guesses[FAILURES:]:
        CASE.failureResultOf(guess, TooManyFailures)
    assert len(world.provider.asked) == FAILURES + 1
    assert world.idle


def test_valid_credentials_are_accepted_in_any_number_at_once(world: World) -> None:
    """They wait for each other. The status 429 is for wrong ones only."""
    world.provider.slow = True
    world.provider.known.update({f"token {n}": f"bot {n}" for n in range(6 * MAX_LOOKUPS)})
    asking = [world.begin(Credentials("", f"token {n}")) for n in range(6 * MAX_LOOKUPS)]
    most = 0
    while world.provider.waiting:
        most = max(most, len(world.provider.waiting))
        world.provider.waiting.pop(0).callback(None)
    assert most == MAX_LOOKUPS
    names = [CASE.successResultOf(one).principal.name for one in asking]
    assert names == [f"bot {n}" for n in range(6 * MAX_LOOKUPS)]
    assert world.idle


def test_concurrent_look_ups_are_limited_to_the_remaining_failures(world: World) -> None:
    """Valid credentials among them are accepted until ten wrong ones have failed."""
    for number in range(FAILURES - 1):
        world.guess(number)
    world.provider.slow = True
    right, wrong, late = (
        world.begin(shown) for shown in (ALICE, Credentials("", "w"), Credentials("", "l"))
    )
    assert len(world.provider.waiting) == 1
    world.answer_all()
    assert CASE.successResultOf(right).principal.name == "alice"
    CASE.failureResultOf(wrong, NotAuthenticated)
    CASE.failureResultOf(late, TooManyFailures)
    assert world.idle


def test_a_long_wait_for_a_look_up_answers_503(world: World) -> None:
    """It is not 429, because the credentials are not known to be wrong."""
    world.provider.slow = True
    for number in range(MAX_LOOKUPS):
        world.provider.known[f"slow {number}"] = f"bot {number}"
        world.begin(Credentials("", f"slow {number}"))
    late = world.begin(ALICE)
    world.clock.advance(PATIENCE - 1)
    CASE.assertNoResult(late)
    gone = world.begin(Credentials("", "gone"))
    gone.cancel()
    CASE.failureResultOf(gone)
    world.clock.advance(1)
    assert CASE.failureResultOf(late).check(ProviderUnavailable)
    world.answer_all()
    # The credentials of a client that has left are looked up all the same.
    assert world.provider.asked[-1] == "gone"
    assert world.idle
    assert world.clock.getDelayedCalls() == []


def test_credentials_accepted_before_are_looked_up_without_waiting(world: World) -> None:
    """New callers do not delay open streams."""
    assert world.ask(ALICE) == "alice"
    world.clock.advance(60)
    world.provider.slow = True
    for number in range(2 * MAX_LOOKUPS):
        world.provider.known[f"slow {number}"] = f"bot {number}"
        world.begin(Credentials("", f"slow {number}"))
    again = world.begin(ALICE)
    world.provider.waiting.pop().callback(None)
    assert CASE.successResultOf(again).principal.name == "alice"
    world.answer_all()


def test_equal_requests_share_one_answer(world: World) -> None:
    """The first of them can be cancelled."""
    world.provider.slow = True
    asking = [world.begin(ALICE) for _ in range(3 * MAX_LOOKUPS)]
    first = asking.pop(0)
    first.cancel()
    CASE.failureResultOf(first)
    world.provider.waiting[0].callback(None)
    assert {CASE.successResultOf(one).principal.name for one in asking} == {"alice"}
    assert len(world.provider.asked) == 1


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(0, 3)), max_size=60))
def test_the_throttle_counts_the_last_minute(steps: list[tuple[float, int]]) -> None:
    """An address is heard if and only if fewer than ten guesses failed in 60 seconds."""
    clock = Clock()
    throttle = Throttle(clock)
    times: dict[str, list[float]] = {}
    for seconds, number in steps:
        clock.advance(seconds)
        address = f"192.0.2.{number}"
        mine = times.setdefault(address, [])
        recent = [at for at in mine if at > clock.seconds() - 60]
        if len(recent) < FAILURES:
            throttle.check(address)
        else:
            with pytest.raises(TooManyFailures):
                throttle.check(address)
        throttle.failed(address)
        mine.append(clock.seconds())


def test_an_ipv6_network_counts_as_one_address() -> None:
    """A client usually has 2**64 addresses."""
    throttle = Throttle(Clock())
    for number in range(FAILURES):
        throttle.failed(f"2001:db8:0:1::{number:x}")
    with pytest.raises(TooManyFailures):
        throttle.check("2001:db8:0:1:ffff::1")
    throttle.check("2001:db8:0:2::1")
    throttle.check("::ffff:192.0.2.1")
    throttle.check("a local user")


def test_credentials_do_not_show_their_secret() -> None:
    """Logs and tracebacks use their repr."""
    assert "hunter2" not in repr(Credentials("joe", "hunter2"))
    assert Credentials("a", "b").key != Credentials("ab", "").key


def test_different_credentials_have_different_keys() -> None:
    """Characters can be distributed over name and password in any way."""
    texts = ["", "a", "b", "\0", "a\0", "\0b", "a\0b", "1", "1:", ":", "1:a", "11", "é"]
    keys = {Credentials(user, secret).key for user in texts for secret in texts}
    assert len(keys) == len(texts) ** 2


def test_a_guess_counts_even_if_its_client_hangs_up(world: World) -> None:
    """Otherwise a client could bypass the throttle and the audit log."""
    heard: list[str] = []
    world.authenticator.refused = lambda shown, address: heard.append(
        f"{shown.secret} {address}"
    )
    world.provider.slow = True
    for number in range(FAILURES):
        asked = world.begin(Credentials("", f"guess {number}"))
        asked.cancel()
        CASE.failureResultOf(asked)
        world.provider.waiting[-1].callback(None)
    assert isinstance(world.guess(FAILURES), TooManyFailures)
    assert len(heard) == FAILURES
    assert heard[0] == f"guess 0 {HERE}"


def test_credentials_that_were_valid_once_are_not_guesses(world: World) -> None:
    """An old session in an open tab locks no address out."""
    for number in range(2 * FAILURES):
        shown = Credentials("", f"revoked {number}")
        asked = Deferred.fromCoroutine(
            world.authenticator.identify(shown, HERE, guess=False)
        )
        CASE.failureResultOf(asked, NotAuthenticated)
    assert world.ask(ALICE) == "alice"
