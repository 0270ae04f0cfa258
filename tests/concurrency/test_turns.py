"""Tests of turns of the reactor: each caller gets one, however much work it has."""

from twisted.internet.task import Clock

from pulsar_api.concurrency.turns import TurnScheduler


def test_a_caller_with_much_work_gets_no_more_turns_than_others() -> None:
    """Names are served in turn, and each caller without a name has a turn of its own."""
    clock = Clock()
    turns = TurnScheduler(clock)
    done: list[str] = []

    def wait(text: str, name: str | None) -> None:
        turns.wait(name).addCallback(lambda _: done.append(text))

    for number in range(4):
        wait(f"eve {number}", "eve")
    wait("joe 0", "joe")
    wait("nobody 0", None)
    wait("nobody 1", None)
    wait("joe 1", "joe")
    assert done == []
    for _ in range(8):
        clock.advance(0)
    expected = "eve 0, joe 0, nobody 0, nobody 1, eve 1, joe 1, eve 2, eve 3"
    assert ", ".join(done) == expected
    assert clock.getDelayedCalls() == []


def test_a_cancelled_turn_leaves_nothing_behind() -> None:
    """It costs no other caller its turn, even one with the same name."""
    clock = Clock()
    turns = TurnScheduler(clock)
    waiting = [turns.wait("eve"), turns.wait("eve"), turns.wait(None)]
    for turn in (waiting[0], waiting[2]):
        turn.addErrback(lambda _: None)
        turn.cancel()
    done: list[None] = []
    waiting[1].addCallback(done.append)
    clock.advance(0)
    assert done == [None]
    last = turns.wait("eve")
    last.addErrback(lambda _: None)
    last.cancel()
    clock.advance(0)
    assert clock.getDelayedCalls() == []
    assert turns._waiting == {}
