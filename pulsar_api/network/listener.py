"""Opens ports, and tries them first: without one of them the daemon does not start."""

import os
import re
import socket
import stat
from contextlib import ExitStack
from typing import Any

from attrs import define, field
from twisted.application.service import Service
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import (
    AdoptedStreamServerEndpoint,
    TCP4ServerEndpoint,
    TCP6ServerEndpoint,
    serverFromString,
    wrapServerTLS,
)
from twisted.internet.interfaces import (
    IListeningPort,
    IOpenSSLServerConnectionCreator,
    IProtocolFactory,
    IStreamServerEndpoint,
)
from twisted.internet.protocol import Factory
from twisted.internet.tcp import Port
from twisted.python.failure import Failure

from pulsar_api.config.settings import Settings
from pulsar_api.config.values import is_loopback
from pulsar_api.errors import CannotListen

BACKLOG = 4096
"""Connections that can wait to be accepted; with Twisted's 50, 5,000 clients take 24 s."""

KINDS = ("tcp", "tcp6", "unix", "systemd", "tls", "haproxy")
"""The kinds of Twisted endpoints that are allowed; ``ssl:`` has other ciphers."""

MOST_PATH = 107
"""Bytes of the path of a Unix socket, see unix(7)."""

KEEPALIVE_IDLE = 60
"""Seconds of silence after which the kernel probes whether a client is there."""
KEEPALIVE_INTERVAL = 15
KEEPALIVE_PROBES = 4


def endpoints(
    settings: Settings, reactor: Any, tls: IOpenSSLServerConnectionCreator | None
) -> list[tuple[str, IStreamServerEndpoint]]:
    """Return the endpoints to listen on, each with its name.

    TLS is added to all that is TCP, but not to ``unix:`` (a proxy on the same machine) and
    ``tls:`` (which has its own).

    Raises:
        CannotListen: One is not a valid endpoint.
    """
    found: list[tuple[str, IStreamServerEndpoint]] = []
    for text in settings.listen:
        endpoint = _endpoint(text, reactor)
        if tls is not None and not text.startswith(("unix:", "tls:")):
            endpoint = wrapServerTLS(tls, endpoint)
        found.append((text, endpoint))
    if not settings.listen:
        kind = TCP6ServerEndpoint if ":" in settings.interface else TCP4ServerEndpoint
        plain = kind(reactor, settings.port, BACKLOG, settings.interface)
        name = f"{settings.interface} port {settings.port}"
        found.append((name, plain if tls is None else wrapServerTLS(tls, plain)))
    return found


def _endpoint(text: str, reactor: Any) -> IStreamServerEndpoint:
    full = text
    if text.startswith("tcp:") and "backlog=" not in text:
        full = f"{text}:backlog={BACKLOG}"
    kind, _, rest = text.removeprefix("haproxy:").partition(":")
    try:
        if kind == "ssl":
            raise ValueError("use tcp: with --ssl-cert and --ssl-key")  # noqa: TRY301
        if kind not in KINDS:
            known = ", ".join(f"{name}:" for name in KINDS)
            raise ValueError(f"use one of {known}")  # noqa: TRY301
        if kind == "tls":
            _check_folder(rest)
        found: IStreamServerEndpoint = serverFromString(reactor, full)
    except Exception as e:  # noqa: BLE001 - the parser can raise anything
        why = str(e) or type(e).__name__
        raise CannotListen(f"--listen: {text!r} is not an endpoint: {why}") from None
    return found


def _check_folder(rest: str) -> None:
    """Raise ValueError if the first part is not a folder, as nobody could connect."""
    path, *_ = re.split(r"(?<!\\):", rest.removeprefix("path="))
    path = re.sub(r"\\(.)", r"\1", path)
    if not os.path.isdir(path):
        raise ValueError(f"{path!r} is not a folder with a certificate for each host name")


class _Trial(ExitStack):
    """Stands in for the reactor to try an endpoint: opens and closes it."""

    def __init__(self, only_loopback: str | None) -> None:
        super().__init__()
        self.only_loopback = only_loopback

    def listenTCP(
        self, port: int, factory: object, backlog: int = 50, interface: str = ""
    ) -> None:
        check_address(interface, self.only_loopback)
        family = socket.AF_INET6 if ":" in interface else socket.AF_INET
        # Kept open until all have been tried, so that one named twice is busy.
        trial = self.enter_context(socket.socket(family))
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        trial.bind((interface, port))
        trial.listen(backlog)

    def listenUNIX(self, address: str, *_: object, **__: object) -> None:
        # Not opened, as that would replace one that is in use.
        folder = os.path.dirname(address) or "."
        why = None
        if not 0 < len(os.fsencode(address)) <= MOST_PATH:
            why = f"a path has 1 to {MOST_PATH} bytes"
        elif not os.access(folder, os.W_OK | os.X_OK):
            why = f"cannot write {folder}"
        elif os.path.lexists(address):
            trial = self.enter_context(socket.socket(socket.AF_UNIX))
            if not stat.S_ISSOCK(os.lstat(address).st_mode):
                why = "it exists and is not a socket"
            elif trial.connect_ex(address) == 0:
                why = "Address already in use"
        if why is not None:
            raise CannotListen(f"cannot listen on unix:{address}: {why}")


def check_address(address: str, only_loopback: str | None) -> None:
    """Raise `CannotListen` if other machines can reach an address and must not."""
    if only_loopback is not None and not is_loopback(address):
        raise CannotListen(
            f"will not listen on {address or 'all addresses'}: {only_loopback}"
        )


def why_only_loopback(settings: Settings, *, development_key: bool) -> str | None:
    """Return why only this machine may reach the daemon; None if others may."""
    if development_key:
        return "the key of the development certificate is public; use another one"
    if settings.allow_anonymous or settings.authenticated:
        return None
    return (
        "callers would not have to authenticate; listen on 127.0.0.1 behind a proxy that "
        "authenticates them, set --auth-provider, or give --allow-anonymous if everybody "
        "there may deploy"
    )


def try_out(settings: Settings, only_loopback: str | None) -> None:
    """Raise `CannotListen` if an endpoint is malformed, forbidden or busy."""
    with _Trial(only_loopback) as trial:
        for name, endpoint in endpoints(settings, trial, None):
            try:
                _try(name, endpoint, only_loopback)
            except CannotListen:
                raise
            except Exception as e:  # noqa: BLE001 - as above
                raise CannotListen(f"cannot listen on {name}: {e}") from None


def _try(name: str, endpoint: IStreamServerEndpoint, only_loopback: str | None) -> None:
    if isinstance(endpoint, AdoptedStreamServerEndpoint):
        # It can be adopted only once, so only check it.
        found = endpoint.fileno, endpoint.addressFamily
        with socket.fromfd(*found, socket.SOCK_STREAM) as open_already:
            if open_already.family != socket.AF_UNIX:
                check_address(open_already.getsockname()[0], only_loopback)
    else:
        _now(name, endpoint.listen(Factory()))


def _now(name: str, listening: Deferred[Any]) -> Any:
    """Return the result of a listen, which is there at once, or raise `CannotListen`."""
    failures: list[Failure] = []
    ports: list[Any] = []
    listening.addCallbacks(ports.append, failures.append)
    if failures:
        error = failures[0].value
        if isinstance(error, CannotListen):
            raise error
        reason = getattr(error, "socketError", error)
        text = getattr(reason, "strerror", None) or str(reason)
        raise CannotListen(f"cannot listen on {name}: {text}")
    return ports[0]


def _keep_alive(found: socket.socket) -> None:
    """Let the kernel find out which clients have vanished.

    Accepted connections inherit it. TCP_USER_TIMEOUT is not set, as it would also cut
    clients that have stopped reading for a while.
    """
    found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    found.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE)
    found.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL)
    found.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)


@define(eq=False)
class Listener(Service):
    """Listens while the daemon runs; the daemon does not start if it cannot."""

    description: str
    endpoint: IStreamServerEndpoint
    factory: IProtocolFactory
    only_loopback: str | None
    port: IListeningPort = field(init=False)

    def privilegedStartService(self) -> None:
        """Open the port, or raise `CannotListen`, which ends ``twistd``."""
        self.port = _now(self.description, self.endpoint.listen(self.factory))
        host = self.port.getHost()
        if isinstance(host, IPv4Address | IPv6Address):
            check_address(host.host, self.only_loopback)
            if isinstance(self.port, Port):
                _keep_alive(self.port.socket)

    def url(self, scheme: str) -> str:
        """Return the URL it listens on, or its description if it has none."""
        host = self.port.getHost()
        if not isinstance(host, IPv4Address | IPv6Address):
            return self.description
        name = f"[{host.host}]" if ":" in host.host else host.host
        return f"{scheme}://{name}:{host.port}"

    def stopService(self) -> Deferred[None] | None:
        """Close the port; connections that are open stay."""
        super().stopService()
        return self.port.stopListening()
