"""Turns of the reactor: one for each who has much to do, however much that is."""

from twisted.internet.task import Clock

from pulsar_api.concurrency.turns import Rota


def test_who_does_much_at_a_time_has_no_more_turns_than_others() -> None:
    """They are served in turn by name; who has none is one of their own."""
    clock = Clock()
    rota = Rota(clock)
    done: list[str] = []

    def wait(text: str, name: str | None) -> None:
        rota.turn(name).addCallback(lambda _: done.append(text))

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


def test_who_gives_up_a_turn_leaves_nothing() -> None:
    """And takes nobody's turn, also of the same name."""
    clock = Clock()
    rota = Rota(clock)
    turns = [rota.turn("eve"), rota.turn("eve"), rota.turn(None)]
    for turn in (turns[0], turns[2]):
        turn.addErrback(lambda _: None)
        turn.cancel()
    done: list[None] = []
    turns[1].addCallback(done.append)
    clock.advance(0)
    assert done == [None]
    last = rota.turn("eve")
    last.addErrback(lambda _: None)
    last.cancel()
    clock.advance(0)
    assert clock.getDelayedCalls() == []
    assert rota._waiting == {}
