"""The programs of measured tasks: ``python -I -S programs.py line|flood|clock|rows``."""

import os
import sys
import time

PIECE = bytes(range(33, 127)) * 697 + b"\n"  # a little less than 64 KiB of text


def line(fifo: str) -> None:
    """For each byte from a FIFO, print a line with the time of the monotonic clock."""
    fd = os.open(fifo, os.O_RDONLY)
    while os.read(fd, 1):
        os.write(1, b"%d\n" % time.monotonic_ns())


def flood(size: str, seconds: str) -> None:
    """Print ``size`` bytes as fast as they are read, and note the seconds in a file."""
    left = int(size)
    begin = time.perf_counter()
    while left > 0:
        left -= os.write(1, PIECE[:left])
    took = time.perf_counter() - begin
    with open(seconds, "w") as file:
        file.write(str(took))


def clock(count: str) -> None:
    """Print the time of day in nanoseconds ``count`` times, with pauses in between."""
    for number in range(int(count)):
        time.sleep(0.06 + number * 37 % 100 / 1000)
        os.write(1, b"%d\n" % time.time_ns())


def rows(count: str) -> None:
    """Print ``count`` lines like those of a real program, some of them coloured."""
    for number in range(1, int(count) + 1):
        colour = "\x1b[32mdone\x1b[0m" if number % 10 == 0 else "done"
        print(
            f"row {number:>8}: copied, checksum {number * 2654435761 % 2**32:08x}, {colour}"
        )


if __name__ == "__main__":
    if sys.argv[1] == "line":
        line(sys.argv[2])
    elif sys.argv[1] == "clock":
        clock(sys.argv[2])
    elif sys.argv[1] == "rows":
        rows(sys.argv[2])
    else:
        flood(sys.argv[2], sys.argv[3])
