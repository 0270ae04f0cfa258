"""HTTP clients that use little processor time compared with the measured servers."""

import select
import socket
import time
from collections.abc import Iterable

from attrs import define, field

PATIENCE = 60.0
"""Seconds after which a client gives up on a response."""


def request(method: str, path: str, body: bytes = b"", kind: str = "") -> bytes:
    """Return the bytes of a request."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost"]
    if method == "POST":
        lines.append(f"Content-Length: {len(body)}")
    if kind:
        lines.append(f"Content-Type: {kind}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def body_of(data: bytes) -> bytes | None:
    """Return the body of a response, or None if it is incomplete.

    Any status but 200 is an error. The body has a Content-Length or is a single chunk.
    """
    head, gap, rest = data.partition(b"\r\n\r\n")
    if not gap:
        return None
    assert head.startswith(b"HTTP/1.1 200 "), data
    name, found, tail = head.lower().partition(b"content-length: ")
    if found:
        length = int(tail.split(b"\r\n", 1)[0])
        return rest if len(rest) == length else None
    assert b"transfer-encoding: chunked" in name, data
    if not rest.endswith(b"0\r\n\r\n"):
        return None
    return rest.split(b"\r\n", 2)[1]


class Connection:
    """One persistent connection, with one request at a time."""

    authorization = b""
    """The credentials of each request: the line of a header."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, data: bytes) -> None:
        """Send a request."""
        line, _, rest = data.partition(b"\r\n")
        self.socket.sendall(line + b"\r\n" + self.authorization + rest)

    def receive(self) -> bytes:
        """Wait for the response and return its body."""
        data = b""
        while (body := body_of(data)) is None:
            piece = self.socket.recv(65536)
            assert piece, "the server has hung up"
            data += piece
        return body

    def ask(self, data: bytes) -> bytes:
        """Send a request and return the body of the response."""
        self.send(data)
        return self.receive()

    def close(self) -> None:
        """Close the connection."""
        self.socket.close()


@define
class Crowd:
    """Many connections in one thread, each with one request at a time."""

    connections: dict[int, Connection]
    poll: select.epoll = field(factory=select.epoll, init=False)

    @classmethod
    def connect(cls, port: int, number: int) -> "Crowd":
        """Return a connected crowd."""
        made = [Connection(port) for _ in range(number)]
        crowd = cls({c.socket.fileno(): c for c in made})
        for fd in crowd.connections:
            crowd.poll.register(fd, select.EPOLLIN)
        return crowd

    def send(self, data: bytes) -> None:
        """Send the same request on each connection."""
        for connection in self.connections.values():
            connection.send(data)

    def answers(self) -> Iterable[tuple[int, bytes]]:
        """Yield the time of each response (`monotonic_ns`) and its body."""
        data = dict.fromkeys(self.connections, b"")
        while data:
            ready = self.poll.poll(PATIENCE)
            assert ready, f"{len(data)} clients got no response"
            for fd, _ in ready:
                data[fd] += self.connections[fd].socket.recv(65536)
                body = body_of(data[fd])
                if body is not None:
                    del data[fd]
                    yield time.monotonic_ns(), body

    def rate(self, data: bytes, seconds: float) -> float:
        """Return the responses per second if each client asks again after each response.

        All responses must have the same size, because they are counted by it, not parsed.
        """
        size = self._size(data)
        left = dict.fromkeys(self.connections, size)
        count = 0
        begin = time.perf_counter()
        self.send(data)
        while left:
            ready = self.poll.poll(PATIENCE)
            assert ready, f"{len(left)} clients got no response"
            for fd, _ in ready:
                connection = self.connections[fd].socket
                left[fd] -= len(connection.recv(65536))
                assert left[fd] >= 0, "a response has another size"
                if left[fd]:
                    continue
                count += 1
                if time.perf_counter() < begin + seconds:
                    left[fd] = size
                    connection.sendall(data)
                else:
                    del left[fd]
        return count / (time.perf_counter() - begin)

    def _size(self, data: bytes) -> int:
        connection = next(iter(self.connections.values()))
        connection.send(data)
        answer = b""
        while body_of(answer) is None:
            answer += connection.socket.recv(65536)
        return len(answer)

    def close(self) -> None:
        """Hang up."""
        self.poll.close()
        for connection in self.connections.values():
            connection.close()
