"""``python -m tests.integration.rude PORT KIND COUNT``: hostile clients.

They use no code of the daemon, and run in a process of their own. It prints ``ready`` when
all are connected, goes on until its standard input ends, and then prints as JSON how many
bytes it sent and how often the daemon cut a connection.
"""

import argparse
import json
import selectors
import socket
import ssl
import struct
import sys
from collections import Counter
from collections.abc import Callable

from attrs import define, field

MASK = bytes(4)
"""The mask of a client's bytes. This one leaves them unchanged."""


def frame(opcode: int, payload: bytes, *, final: bool = True) -> bytes:
    """Return a frame of RFC 6455 as a client sends it."""
    size = len(payload)
    length = (
        struct.pack("!B", 0x80 | size) if size < 126 else struct.pack("!BH", 0xFE, size)
    )
    return bytes([final << 7 | opcode]) + length + MASK + payload


TEXT, PING, PONG = 1, 9, 10
BEGIN = frame(TEXT, b'["', final=False)
ALIVE = frame(PONG, b"")
"""An unsolicited PONG, which once reset the count of the daemon."""
KINDS: dict[str, tuple[bytes, bytes]] = {
    "pings": (b"", frame(PING, b"x" * 125) * 400 + ALIVE),
    "tiny-pings": (b"", (frame(PING, b"") * 5_000 + ALIVE) * 2),
    "fragments": (BEGIN, frame(0, b"x" * 60_000, final=False) + ALIVE),
    "tiny-fragments": (BEGIN, (frame(0, b"x", final=False) * 5_000 + ALIVE) * 2),
    "endless-frame": (b"\x81\xff" + (1 << 40).to_bytes(8) + MASK, b"x" * 65_536),
    "messages": (b"", frame(TEXT, b'["x"]') * 5_000),
    "nothing": (b"", b""),
}
"""The bytes that each kind sends once, and then without end. No kind ever reads."""


@define(eq=False)
class Rude:
    """One connection, which is opened again whenever the daemon cuts it."""

    port: int
    first: bytes
    rest: bytes
    header: str
    counts: Counter[str]
    tls: bool
    sock: socket.socket = field(init=False)
    left: memoryview = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.connect()

    def connect(self) -> None:
        """Open a WebSocket."""
        self.sock = socket.socket()
        # The smallest possible buffer for answers.
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        self.sock.settimeout(60)
        self.sock.connect(("127.0.0.1", self.port))
        if self.tls:
            context = ssl.create_default_context()
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            self.sock = context.wrap_socket(self.sock)
        self.sock.sendall(
            b"GET /websocket/000/rude/websocket HTTP/1.1\r\nHost: localhost\r\n"
            b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
            + (f"{self.header}\r\n" if self.header else "").encode()
            + b"\r\n"
        )
        head = b""
        while b"\r\n\r\n" not in head:
            data = self.sock.recv(1)
            assert data, head
            head += data
        assert head.startswith(b"HTTP/1.1 101 "), head
        self.sock.setblocking(False)
        self.left = memoryview(self.first + self.rest)

    def send(self) -> bool:
        """Send as much as the daemon takes. Return whether the connection is still open."""
        try:
            while self.left:
                sent = self.sock.send(self.left)
                self.counts["sent"] += sent
                self.left = self.left[sent:] or memoryview(self.rest)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass
        except OSError:
            self.counts["cut"] += 1
            self.sock.close()
            return False
        return True


def main() -> None:
    """Attack until the input ends, and print the figures."""
    parser = argparse.ArgumentParser(
        "python -m tests.integration.rude", description=__doc__
    )
    parser.add_argument("port", type=int)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("count", type=int)
    parser.add_argument("--header", default="", help="a header of the handshake")
    parser.add_argument("--tls", action="store_true")
    options = parser.parse_args()
    counts: Counter[str] = Counter()
    selector = selectors.DefaultSelector()

    clients = [
        Rude(options.port, *KINDS[options.kind], options.header, counts, options.tls)
        for _ in range(options.count)
    ]
    if KINDS[options.kind] != KINDS["nothing"]:
        for client in clients:
            selector.register(client.sock, selectors.EVENT_WRITE, client)
    end: Callable[[], None] = sys.exit
    selector.register(sys.stdin, selectors.EVENT_READ, end)
    print("ready", flush=True)
    while True:
        for key, _ in selector.select():
            client = key.data
            if client is end:
                print(json.dumps(counts))
                return
            if not client.send():
                selector.unregister(client.sock)
                client.connect()
                selector.register(client.sock, selectors.EVENT_WRITE, client)


if __name__ == "__main__":
    main()
