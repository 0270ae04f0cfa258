"""A server on loopback that speaks the part of GitHub's API that the daemon calls."""

import base64
import hashlib
import json
import secrets
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

CLIENT_ID = "Iv1.0123456789abcdef"
CLIENT_SECRET = "the-secret-of-the-oauth-app"


class GitHubServer(ThreadingHTTPServer):
    """Users by their tokens, members of organisations and teams, and ways to misbehave."""

    daemon_threads = True
    request_queue_size = 512

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.users: dict[str, str] = {}
        """The login of each token."""
        self.ids: dict[str, int] = {}
        """The account of each login in lower case. An unknown login gets one when seen."""
        self.members: set[tuple[str, str]] = set()
        """Pairs of an organisation, or ``org/team``, and the login of a member."""
        self.pending: set[tuple[str, str]] = set()
        """The same for users who were invited and have not accepted."""
        self.own: tuple[str, str] | None = None
        """If set, only this user with this token may read memberships."""
        self.answer: tuple[int, bytes, dict[str, str]] | None = None
        """If set, the answer to every request."""
        self.limited: dict[str, dict[str, str]] = {}
        """Tokens that have reached their limit, and the headers that announce it."""
        self.slow: dict[str, float] = {}
        """Delay of an answer in seconds, by token. The key "" stands for all tokens."""
        self.asked: list[tuple[str, str]] = []
        """Method and path of each request, without its query."""
        self.urls: list[str] = []
        """The full URL of each request, as a proxy would log it."""
        self.codes: dict[str, tuple[str, str]] = {}
        """Token and challenge of each OAuth code."""
        self.signed_in: str | None = None
        """The token of the user at the browser."""

        self.broken_group = self.slow_group = ""
        """Groups whose requests are answered by 500, or only after a long delay."""
        self.cookie = ""
        """The cookie that each answer sets."""
        self.cookies: list[str] = []
        """The cookies that clients sent back."""
        self.over = threading.Event()
        """Set at the end of the test. Delayed answers are then sent at once."""
        self.connections: list[socket.socket] = []

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection, and remember it."""
        sock, address = super().get_request()
        self.connections.append(sock)
        return sock, address

    def id_of(self, login: str) -> int:
        """Return the number of the account that has this login now."""
        return self.ids.setdefault(login.lower(), 1000 + len(self.ids))

    def hang_up(self) -> None:
        """Close all connections, as a machine that goes down."""
        self.over.set()
        for sock in self.connections:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    @property
    def url(self) -> str:
        """Return the address of the server."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: GitHubServer

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def do_GET(self) -> None:
        """Answer a GET."""
        self._serve(b"")

    def do_POST(self) -> None:
        """Answer a POST."""
        self._serve(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    def _serve(self, body: bytes) -> None:
        hub, parts = self.server, urlsplit(self.path)
        hub.asked.append((self.command, parts.path))
        hub.urls.append(self.path)
        hub.cookies += self.headers.get_all("Cookie") or []
        token = self._token()
        hub.over.wait(hub.slow.get(token, hub.slow.get("", 0.0)))
        if hub.answer is not None:
            self._answer(*hub.answer)
        elif parts.path == "/login/oauth/authorize":
            self._authorize(dict(parse_qsl(parts.query)))
        elif parts.path == "/login/oauth/access_token":
            self._exchange(dict(parse_qsl(body.decode())))
        elif token in hub.limited:
            text = b'{"message": "API rate limit exceeded"}'
            self._answer(403, text, hub.limited[token])
        elif self.headers.get("User-Agent") is None:
            self._answer(403, b"Request forbidden by administrative rules")
        else:
            self._api(parts.path.strip("/").split("/"), token)

    def _token(self) -> str:
        kind, _, rest = (self.headers.get("Authorization") or "").partition(" ")
        if kind == "Basic":
            return base64.b64decode(rest).decode()
        return rest

    def _api(self, path: list[str], token: str) -> None:
        hub = self.server
        own = hub.own is not None and token == ":".join(hub.own)
        login = hub.users.get(token)
        if login is None and not own:
            self._json(401, {"message": "Bad credentials"})
        elif path == ["user"]:
            self._json(200, {"login": login, "id": hub.id_of(login or "")})
        elif path[:3] == ["user", "memberships", "orgs"]:
            self._membership(path[3], login or "", may=hub.own is None)
        elif path[2:3] == ["teams"]:
            team = f"{path[1]}/{path[3]}"
            self._membership(team, path[5], may=own or hub.own is None)
        elif path[2:3] == ["members"]:
            if not own:
                self._answer(302, b"", {"Location": "/elsewhere"})
            else:
                there = (path[1], path[3]) in hub.members
                self._answer(204 if there else 404, b"")
        else:
            self._json(404, {"message": "Not Found"})

    def _membership(self, group: str, login: str, *, may: bool) -> None:
        hub = self.server
        if group == hub.slow_group:
            hub.over.wait(30)
        if group == hub.broken_group:
            self._answer(500, b"")
            return
        if not may or (group, login) not in hub.members | hub.pending:
            self._json(403 if not may else 404, {"message": "no"})
        else:
            state = "active" if (group, login) in hub.members else "pending"
            self._json(200, {"state": state, "role": "member"})

    def _authorize(self, query: dict[str, str]) -> None:
        hub = self.server
        assert query["client_id"] == CLIENT_ID
        assert query["code_challenge_method"] == "S256"
        back = {"error": "access_denied", "state": query["state"]}
        if hub.signed_in is not None:
            code = secrets.token_hex(10)
            hub.codes[code] = hub.signed_in, query["code_challenge"]
            back = {"code": code, "state": query["state"]}
        url = f"{query['redirect_uri']}?{urlencode(back)}"
        self._answer(302, b"", {"Location": url})

    def _exchange(self, form: dict[str, str]) -> None:
        token, challenge = self.server.codes.pop(form.get("code", ""), ("", ""))
        hashed = hashlib.sha256(form.get("code_verifier", "").encode()).digest()
        right = (
            form.get("client_id") == CLIENT_ID
            and form.get("client_secret") == CLIENT_SECRET
            and base64.urlsafe_b64encode(hashed).rstrip(b"=").decode() == challenge
        )
        if right and token:
            self._json(200, {"access_token": token, "token_type": "bearer"})
        else:
            self._json(200, {"error": "bad_verification_code"})

    def _json(self, status: int, value: Any) -> None:
        self._answer(status, json.dumps(value).encode())

    def _answer(
        self, status: int, body: bytes, headers: dict[str, str] | None = None
    ) -> None:
        try:
            self.send_response(status)
            if self.server.cookie:
                self.send_header("Set-Cookie", self.server.cookie)
            for name, text in (headers or {}).items():
                self.send_header(name, text)
            if status != 204:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except OSError:
            self.close_connection = True  # the client has given up


@contextmanager
def github() -> Iterator[GitHubServer]:
    """Yield a server that runs in a thread of its own."""
    hub = GitHubServer()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.hang_up()
        hub.server_close()
