"""Tests of returning memory to the system. The clock moves only by steps."""

import ctypes
import gc

from twisted.internet.task import Clock

from pulsar_api.memory import EVERY, GROWN, Memory, resident, trim


def test_memory_is_returned_while_it_exceeds_that_at_the_start() -> None:
    """It is returned at each check, until the size is normal.

    A stop leaves no delayed call.
    """
    clock = Clock()
    size = 100 << 20
    trims: list[float] = []
    memory = Memory(clock, lambda: size, lambda: trims.append(clock.seconds()))
    try:
        memory.start()
        clock.advance(EVERY)
        size += GROWN
        clock.advance(EVERY)
        assert trims == []
        size += 1
        clock.advance(EVERY)
        clock.advance(EVERY)
        assert trims == [3 * EVERY, 4 * EVERY]
        size -= 1
        clock.advance(EVERY)
        assert trims == [3 * EVERY, 4 * EVERY]
    finally:
        gc.unfreeze()
    memory.stop()
    memory.stop()
    assert clock.getDelayedCalls() == []


def test_memory_between_blocks_in_use_is_returned() -> None:
    """The C library would keep it."""
    libc = ctypes.CDLL(None)
    malloc, free = libc.malloc, libc.free
    malloc.restype = ctypes.c_void_p
    free.argtypes = [ctypes.c_void_p]
    pieces = [malloc(60_000) for _ in range(2000)]
    for piece in pieces:
        ctypes.memset(piece, 1, 60_000)
    used = resident()
    for piece in pieces[::2]:
        free(piece)
    trim()
    assert used - resident() > 50 << 20
    for piece in pieces[1::2]:
        free(piece)
