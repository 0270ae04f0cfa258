"""Clients that want more than their share: sign-ins, bodies, lists and searches."""

import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing

from pulsar_api.auth import records
from tests.integration.conftest import Start
from tests.integration.daemon import Daemon, next_answer

TOKENS = ("--command", "true", "--auth-provider", "tokens")


def new_tokens(
    daemon: Daemon, names: Sequence[str], right: str = "admin", on: str = "*"
) -> list[dict[str, str]]:
    """Return the headers that show new tokens; the daemon has not seen them yet."""
    secrets = [records.PREFIX + records.new_secret() for _ in names]
    with records.opened(daemon.state / records.FILE) as db:
        for name, secret in zip(names, secrets, strict=True):
            token = records.Token(name, (right,), (on,), time.time())
            records.add_token(db, token, secret)
    return [{"Authorization": f"Bearer {secret}"} for secret in secrets]


def begin(sock: socket.socket, method: str, path: str, **headers: str) -> None:
    """Send the head of a request."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    sock.sendall("\r\n".join([*lines, "", ""]).encode())


def test_many_right_tokens_at_once_are_all_let_in(start: Start) -> None:
    """429 is for wrong ones: nobody here has shown any."""
    daemon = start(*TOKENS)
    headers = new_tokens(daemon, [f"bot{n}" for n in range(60)])
    with ExitStack() as stack:
        socks = [stack.enter_context(closing(daemon.open_socket())) for _ in headers]
        for sock, shown in zip(socks, headers, strict=True):
            begin(sock, "GET", "/tasks?limit=1", **shown)
        assert [next_answer(sock).status for sock in socks] == [200] * len(headers)
