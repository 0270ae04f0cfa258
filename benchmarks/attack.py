"""``python -m benchmarks.attack PORT PATH``: hostile clients, in one process.

It prints ``ready`` once all clients are connected, goes on until its standard input ends,
and then prints counts of the responses as JSON.
"""

import argparse
import heapq
import json
import random
import select
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from itertools import count

from attrs import define, field

PAUSE = 2.0
"""Seconds between two bytes, in either direction."""
GUESSERS = 20
_HEAD = b"GET /tasks HTTP/1.1\r\nHost: localhost\r\nX-Slow: "
_BODY = b"POST /bench/here HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n"


@define(eq=False)
class Client:
    """One connection, which reconnects whenever the daemon cuts it."""

    port: int
    answers: Counter[str]
    sock: socket.socket = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.connect()

    def connect(self) -> None:
        """Connect."""
        self.sock = socket.socket()
        self.prepare()
        self.sock.connect(("127.0.0.1", self.port))
        self.sock.setblocking(False)

    def prepare(self) -> None:
        """Set up the socket before it connects."""
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def again(self) -> None:
        """Count the cut connection, and reconnect."""
        self.answers["cut"] += 1
        self.sock.close()
        self.connect()

    def take(self, most: int) -> bytes:
        """Return at most ``most`` bytes. Reconnect if the daemon has hung up."""
        with suppress(BlockingIOError):
            try:
                data = self.sock.recv(most)
            except ConnectionError:
                data = b""
            if not data:
                self.again()
            return data
        return b""

    def give(self, data: bytes) -> None:
        """Send the data. Reconnect if the daemon has hung up."""
        with suppress(BlockingIOError):
            try:
                self.sock.send(data)
            except ConnectionError:
                self.again()


class Sender(Client):
    """Sends an endless head or body, one byte at a time."""

    def connect(self) -> None:
        """Begin a request."""
        super().connect()
        self.give(random.choice([_HEAD, _BODY]))

    def act(self) -> None:
        """Send a byte."""
        self.give(b"x")
        if b"HTTP/1.1 408 " in self.take(4096):
            self.answers["408"] += 1
            self.again()


@define(eq=False)
class Reader(Client):
    """Asks for a large response and reads it one byte at a time."""

    path: bytes = field(kw_only=True)
    authorization: bytes = field(kw_only=True, default=b"")

    def prepare(self) -> None:
        """Make the receive buffer as small as the kernel allows."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)

    def connect(self) -> None:
        """Send the request."""
        super().connect()
        head = b" HTTP/1.1\r\nHost: localhost\r\n" + self.authorization
        self.give(b"GET " + self.path + head + b"\r\n")

    def act(self) -> None:
        """Read a byte."""
        self.answers["bytes read"] += len(self.take(1))


class Guesser(Client):
    """Tries one wrong token after the other, each from a new address.

    From a single address, the daemon would check only ten tokens a minute and refuse the
    others unchecked, which costs less.
    """

    numbers = count()

    def prepare(self) -> None:
        """Take the next address."""
        super().prepare()
        number = next(self.numbers)
        self.sock.bind((f"127.{32 + (number >> 16)}.{number >> 8 & 255}.{number & 255}", 0))

    def act(self) -> None:
        """Count the last response, reconnect and try the next token."""
        data = self.take(65536)
        for piece in data.split(b"HTTP/1.1 ")[1:]:
            self.answers[f"guesses: {piece[:3].decode()}"] += 1
        self.sock.close()
        self.connect()
        self.give(
            b"GET /tasks?limit=1&output=none HTTP/1.1\r\nHost: localhost\r\n"
            b"Authorization: Bearer pulsar_%d\r\n\r\n" % random.getrandbits(256)
        )


def attack(clients: list[tuple[Callable[[], None], float]]) -> None:
    """Let each client act at its own pace until the standard input ends."""
    now = time.monotonic()
    due = [
        (now + pause * n / len(clients), n, act, pause)
        for n, (act, pause) in enumerate(clients)
    ]
    random.shuffle(due)
    heapq.heapify(due)
    while not select.select([sys.stdin], [], [], 0)[0]:
        time.sleep(0.001)
        now = time.monotonic()
        while due[0][0] <= now:
            at, n, act, pause = due[0]
            act()
            heapq.heapreplace(due, (at + pause, n, act, pause))


def main() -> None:
    """Attack the daemon on the given port."""
    parser = argparse.ArgumentParser("python -m benchmarks.attack", description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("path", help="path of a large response, for the readers")
    parser.add_argument(
        "--authorization", default="", help="value of this header, for the readers"
    )
    parser.add_argument("--senders", type=int, default=2000)
    parser.add_argument("--readers", type=int, default=200)
    parser.add_argument("--guesses", type=int, default=500, help="in a second")
    options = parser.parse_args()
    port, path = options.port, options.path.encode()
    answers: Counter[str] = Counter()
    slow: list[Sender | Reader] = [Sender(port, answers) for _ in range(options.senders)]
    shown = f"{options.authorization}\r\n".encode() if options.authorization else b""
    slow += [
        Reader(port, answers, path=path, authorization=shown)
        for _ in range(options.readers)
    ]
    clients = [(client.act, PAUSE) for client in slow]
    if options.guesses:
        pause = GUESSERS / options.guesses
        guessers = [Guesser(port, answers) for _ in range(GUESSERS)]
        clients += [(guesser.act, pause) for guesser in guessers]
    print("ready", flush=True)
    attack(clients)
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
