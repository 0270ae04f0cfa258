"""What the measured tasks run: ``python -I -S programs.py line|flood ...``."""

import os
import sys
import time

PIECE = bytes(range(33, 127)) * 697 + b"\n"  # a little less than 64 KiB of text


def line(fifo: str) -> None:
    """For each byte from a FIFO print the time of the monotonic clock, as one line."""
    fd = os.open(fifo, os.O_RDONLY)
    while os.read(fd, 1):
        os.write(1, b"%d\n" % time.monotonic_ns())


def flood(size: str, seconds: str) -> None:
    """Print as many bytes as fast as they are taken; note in a file how long that took."""
    left = int(size)
    begin = time.perf_counter()
    while left > 0:
        left -= os.write(1, PIECE[:left])
    took = time.perf_counter() - begin
    with open(seconds, "w") as file:
        file.write(str(took))


if __name__ == "__main__":
    if sys.argv[1] == "line":
        line(sys.argv[2])
    else:
        flood(sys.argv[2], sys.argv[3])
