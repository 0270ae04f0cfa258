"""Clients for the daemon's SockJS that use no code of it, one for each transport."""

import json
import threading
from collections.abc import Mapping
from http.client import HTTPResponse
from types import TracebackType
from typing import Any, Self

from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, CloseConnection, Request, TextMessage

from tests.integration.daemon import Daemon


class WebSocket:
    """A WebSocket to the daemon that uses no code of it."""

    def __init__(
        self,
        daemon: Daemon,
        origin: str | None = None,
        headers: Mapping[str, str] | None = None,
        source: str | None = None,
    ) -> None:
        self.sock = daemon.open_socket(source=source)
        self.ws = WSConnection(ConnectionType.CLIENT)
        given = dict(headers or {})
        if origin is not None:
            given["Origin"] = origin
        extra = [(name.encode(), value.encode()) for name, value in given.items()]
        host = f"{daemon.host}:{daemon.port}"
        target = "/websocket/000/socket/websocket"
        request = Request(host=host, target=target, extra_headers=extra)
        self.sock.sendall(self.ws.send(request))
        self.pending: list[Any] = []
        self.text = ""

    def event(self) -> Any:
        """Return the next event, or None if the connection is closed."""
        while not self.pending:
            data = self.sock.recv(1 << 16)
            if not data:
                return None
            self.ws.receive_data(data)
            self.pending = list(self.ws.events())
        return self.pending.pop(0)

    def frame(self) -> str | None:
        """Return the next frame of SockJS, or None at the end."""
        while True:
            event = self.event()
            if isinstance(event, TextMessage):
                self.text += event.data
                if event.message_finished:
                    text, self.text = self.text, ""
                    return text
            elif event is None or isinstance(event, CloseConnection):
                return None
            else:
                assert isinstance(event, AcceptConnection)


class Transport:
    """A client of one of the transports of SockJS."""

    def __init__(
        self, daemon: Daemon, headers: Mapping[str, str], source: str | None = None
    ) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def say(self, text: str) -> None:
        """Send a message."""
        raise NotImplementedError

    def frame(self) -> str | None:
        """Return the next frame, or None at the end."""
        raise NotImplementedError

    def close(self) -> None:
        """Close the session."""
        raise NotImplementedError

    def last(self) -> str | None:
        """Return the frame that ends the session."""
        while (frame := self.frame()) is not None:
            if frame.startswith("c"):
                return frame
        return None

    def settled(self, daemon: Daemon, *callers: Mapping[str, str]) -> None:
        """Create tasks for each caller until the session receives its first event."""
        heard = threading.Event()
        apps = ("site", "other")

        def create() -> None:
            while not heard.wait(0.05):
                for app, headers in zip(apps, callers, strict=True):
                    daemon.request(
                        *("POST", f"/{app}/production?action=deploy"), headers=headers
                    )

        thread = threading.Thread(target=create)
        thread.start()
        try:
            while not (self.frame() or "c").startswith(("a", "c")):
                pass
        finally:
            heard.set()
            thread.join()

    def until_close(self, number: int) -> set[int]:
        """Return the numbers of the jobs in the events up to the close of ``number``."""
        told: set[int] = set()
        while True:
            frame = self.frame()
            assert frame is not None
            assert frame[0] in "ah", frame
            for message in json.loads(frame[1:]) if frame[0] == "a" else []:
                event = json.loads(message)
                told.add(event["job"]["id"])
                if event["event"] == "job.close" and event["job"]["id"] == number:
                    return told


class ByWebSocket(Transport):
    """The transport ``websocket``."""

    def __init__(
        self, daemon: Daemon, headers: Mapping[str, str], source: str | None = None
    ) -> None:
        self.socket = WebSocket(daemon, headers=headers, source=source)
        assert self.socket.frame() == "o"

    def say(self, text: str) -> None:
        """Send a message."""
        self.socket.sock.sendall(self.socket.ws.send(TextMessage(json.dumps([text]))))

    def frame(self) -> str | None:
        """Return the next frame, or None at the end."""
        return self.socket.frame()

    def close(self) -> None:
        """Close the connection."""
        self.socket.sock.close()


class ByPolling(Transport):
    """The transport ``xhr``."""

    kind = "xhr"
    count = 0

    def __init__(
        self, daemon: Daemon, headers: Mapping[str, str], source: str | None = None
    ) -> None:
        ByPolling.count += 1
        self.daemon, self.headers, self.source = daemon, dict(headers), source
        self.path = f"/websocket/000/session{ByPolling.count}"
        self.begin()

    def begin(self) -> None:
        """Open the session."""
        assert self.post("xhr", "").startswith("o")

    def post(self, name: str, body: str) -> str:
        """Send a request."""
        path = f"{self.path}/{name}"
        answer = self.daemon.request("POST", path, body, self.headers, self.source)
        assert answer.status in {200, 204}, answer.body
        self.keep(answer.headers["Set-Cookie"])
        return answer.body.decode()

    def keep(self, cookie: str | None) -> None:
        """Send the cookie with each later request, as a browser does."""
        if cookie is not None:
            old = self.headers.get("Cookie")
            new = cookie.partition(";")[0]
            self.headers["Cookie"] = new if old is None else f"{old}; {new}"

    def say(self, text: str) -> None:
        """Send a message."""
        self.post("xhr_send", json.dumps([text]))

    def frame(self) -> str | None:
        """Return the next frame."""
        return self.post("xhr", "").rstrip("\n")

    def close(self) -> None:
        """Stop polling."""


class ByStreaming(ByPolling):
    """The transport ``xhr_streaming``."""

    response: HTTPResponse

    def begin(self) -> None:
        """Open the session."""
        self.connection = self.daemon.connect(source=self.source)
        self.stream()
        assert self.frame() == "o"

    def stream(self) -> None:
        """Request a stream."""
        path = f"{self.path}/xhr_streaming"
        self.connection.request("POST", path, headers=self.headers)
        self.response = self.connection.getresponse()
        self.keep(self.response.headers["Set-Cookie"])
        assert self.response.readline() == b"h" * 2048 + b"\n"

    def frame(self) -> str | None:
        """Return the next frame."""
        line = self.response.readline()
        if not line:
            self.stream()
            line = self.response.readline()
        return line.decode().rstrip("\n")

    def close(self) -> None:
        """Close the stream."""
        self.connection.close()


SOCKJS: list[type[Transport]] = [ByWebSocket, ByPolling, ByStreaming]
