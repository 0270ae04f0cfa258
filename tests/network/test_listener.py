"""Tests of listeners: endpoints, allowed addresses, and errors on opening."""

import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet import reactor
from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ServerEndpoint, TCP6ServerEndpoint
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.ssl import CertificateOptions
from twisted.internet.testing import MemoryReactor
from twisted.protocols.tls import TLSMemoryBIOFactory

from pulsar_api.config.settings import Settings
from pulsar_api.errors import CannotListen
from pulsar_api.network import certificates, listener
from pulsar_api.network.listener import Listener
from tests.certificates import self_signed

KEY, CERTIFICATE = certificates.development_files()
USUAL = Settings(port=0, state_dir="/s")
BECAUSE = "others could come in"


@pytest.fixture(scope="module")
def options() -> CertificateOptions:
    """Return the TLS options of a server."""
    one = self_signed(ec.generate_private_key(ec.SECP256R1()))
    return certificates.Identity(one.key, one.certificate).options()


@pytest.fixture
def busy() -> Iterator[int]:
    """Yield a port of 127.0.0.1 with a listener."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield sock.getsockname()[1]


@pytest.fixture
def free() -> Iterator[int]:
    """Yield a port of 127.0.0.1 without a listener, which no other program gets."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


def open_in_memory(settings: Settings, options: CertificateOptions | None) -> MemoryReactor:
    """Return a reactor that records the opened endpoints."""
    memory = MemoryReactor()
    for _, endpoint in listener.endpoints(settings, memory, options):
        endpoint.listen(Factory.forProtocol(Protocol))
    return memory


def refusal(settings: Settings, only_loopback: str | None = None) -> str:
    """Return the error message for settings that are tried, which is one line."""
    with pytest.raises(CannotListen) as caught:
        listener.try_out(settings, only_loopback)
    text = str(caught.value)
    assert "\n" not in text
    return text


def first(settings: Settings, only_loopback: str | None = None) -> Listener:
    """Return a real listener on the first endpoint."""
    name, endpoint = listener.endpoints(settings, reactor, None)[0]
    factory = Factory.forProtocol(Protocol)
    return Listener(name, endpoint, factory, only_loopback)


def answers(port: int) -> bool:
    """Return whether a listener accepts connections on a port of 127.0.0.1."""
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


class TestEndpoints:
    def test_the_default_endpoint_is_a_port_of_loopback(self) -> None:
        """Its backlog allows for many simultaneous connections."""
        memory = open_in_memory(evolve(USUAL, port=8081), None)
        ((port, _, backlog, interface),) = memory.tcpServers
        assert (port, backlog, interface) == (8081, listener.BACKLOG, "127.0.0.1")

    @pytest.mark.parametrize(
        ("interface", "kind"),
        [("10.0.0.1", TCP4ServerEndpoint), ("::1", TCP6ServerEndpoint)],
    )
    def test_an_interface_can_be_ipv4_or_ipv6(self, interface: str, kind: type) -> None:
        """The form of the address decides."""
        settings = evolve(USUAL, port=8081, interface=interface)
        ((name, endpoint),) = listener.endpoints(settings, MemoryReactor(), None)
        assert isinstance(endpoint, kind)
        assert name == f"{interface} port 8081"

    def test_listen_replaces_the_port(self) -> None:
        """Each endpoint has its text as its name."""
        texts = ("tcp:7001:interface=127.0.0.1", "unix:/s/socket")
        settings = evolve(USUAL, port=8081, listen=texts)
        found = listener.endpoints(settings, MemoryReactor(), None)
        assert [name for name, _ in found] == list(texts)
        memory = open_in_memory(settings, None)
        assert [server[0] for server in memory.tcpServers] == [7001]
        assert [server[0] for server in memory.unixServers] == ["/s/socket"]

    def test_a_tcp_endpoint_without_a_backlog_gets_the_default(self) -> None:
        """Twisted's default of 50 is too small."""
        settings = evolve(USUAL, listen=("tcp:1", "tcp:2:backlog=3"))
        memory = open_in_memory(settings, None)
        assert [server[2] for server in memory.tcpServers] == [listener.BACKLOG, 3]

    def test_tls_wraps_all_tcp_endpoints(self, options: CertificateOptions) -> None:
        """These come from the port and from --listen."""
        for settings in (USUAL, evolve(USUAL, listen=("tcp:1",))):
            (server,) = open_in_memory(settings, options).tcpServers
            assert isinstance(server[1], TLSMemoryBIOFactory)

    def test_tls_does_not_wrap_a_unix_socket(self, options: CertificateOptions) -> None:
        """It serves a proxy on the same machine."""
        settings = evolve(USUAL, listen=("unix:/s/socket",))
        (server,) = open_in_memory(settings, options).unixServers
        assert not isinstance(server[1], TLSMemoryBIOFactory)

    @pytest.mark.parametrize(
        "text",
        [
            "carrier-pigeon:1",
            "tcp",
            "tcp:http",
            "tcp:1:colour=red",
            "systemd:domain=INET:name=no-such-socket",
            "systemd:domain=INET:index=99",
            "systemd",
            "systemd:",
            "systemd:domain=INET:index=x",
            "systemd:domain=\0:index=0",
            "ssl:1:privateKey=/nonexistent:interface=127.0.0.1",
            f"ssl:0:interface=127.0.0.1:certKey={CERTIFICATE}:privateKey={KEY}",
            f"ssl:0:interface=127.0.0.1:privateKey={CERTIFICATE}",
            "ssl:0:interface=127.0.0.1:sslmethod=none",
            f"haproxy:ssl:0:certKey={CERTIFICATE}:privateKey={KEY}",
            *("tls", "tls:0", "tls:/nonexistent:port=x", "tls:x:privateKey=y"),
            "tls:/nonexistent:port=99999999999999999999:interface=127.0.0.1",
            *("fd:3", "fd:-1", "fd", "stdio:", "stdio", "haproxy:stdio:", "haproxy:fd:3"),
            *(
                "launchd:x",
                "onion:80",
                "haproxy",
                "haproxy:",
                ":",
                "::",
                "=",
                "\\",
                "tcp=1",
            ),
            *("tcp:", "tcp:0:1:2:3:4", "tcp:0\\", "tcp:0x1", "tcp:1e3", "tcp:0:port=1"),
            *("tcp:-1:interface=127.0.0.1", "tcp:99999999999999999999:interface=127.0.0.1"),
            "tcp:0:interface=127.0.0.1:backlog=99999999999999999999",
            "tcp:0:interface=127.0.0.1:backlog=x",
            "tcp:0:interface=a\0b",
            "tcp:0:interface=" + "1" * 5000,
            *("unix", "unix:", "unix:/" + "x" * 200, "unix:x:mode=999"),
        ],
        ids=lambda text: ascii(text)[:40],
    )
    def test_an_invalid_endpoint_is_named(self, text: str) -> None:
        """Twisted raises many kinds of errors for them."""
        said = refusal(evolve(USUAL, listen=(text,)))
        assert said.startswith(
            (f"--listen: {text!r} is not an endpoint: ", f"cannot listen on {text}: ")
        )
        assert said.rpartition(": ")[2]

    @given(
        st.sampled_from(
            "tcp tcp6 unix ssl tls fd systemd haproxy:tcp stdio haproxy".split()
        ),
        st.lists(
            st.sampled_from("0 1 -1 x /nope port=0 interface=127.0.0.1 backlog=-1".split())
            | st.sampled_from("index=0 domain=INET mode=0 name=x privateKey=x \\".split())
            | st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
            max_size=4,
        ),
    )
    def test_any_endpoint_opens_or_is_named(self, kind: str, parts: list[str]) -> None:
        """No other error is raised than the one that the daemon prints as one line."""
        text = ":".join([kind, *parts])
        with suppress(CannotListen):
            listener.try_out(evolve(USUAL, listen=(text,)), BECAUSE)


class TestReach:
    @pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
    def test_loopback_is_always_allowed(self, address: str) -> None:
        """Other machines cannot reach it."""
        listener.check_address(address, BECAUSE)

    @pytest.mark.parametrize("address", ["0.0.0.0", "::", "10.0.0.1"])
    def test_other_addresses_are_refused_with_the_reason(self, address: str) -> None:
        """The message quotes it."""
        with pytest.raises(CannotListen) as caught:
            listener.check_address(address, BECAUSE)
        assert str(caught.value) == f"will not listen on {address}: {BECAUSE}"

    def test_an_empty_address_means_all_addresses(self) -> None:
        """The operating system reads it in the same way."""
        with pytest.raises(CannotListen, match="will not listen on all addresses: "):
            listener.check_address("", BECAUSE)

    def test_all_addresses_are_allowed_without_a_reason(self) -> None:
        """The reason decides."""
        listener.check_address("0.0.0.0", None)

    def test_without_authentication_only_loopback_is_allowed(self) -> None:
        """The message names the option to change that."""
        text = listener.why_only_loopback(USUAL, development_key=False)
        assert text is not None
        assert "--allow-anonymous" in text

    def test_anonymous_callers_can_be_allowed(self) -> None:
        """The operator says so explicitly."""
        settings = evolve(USUAL, allow_anonymous=True)
        assert listener.why_only_loopback(settings, development_key=False) is None

    def test_the_development_key_is_for_loopback_only(self) -> None:
        """With it anybody can decrypt the traffic, so no option allows it elsewhere."""
        settings = evolve(USUAL, allow_anonymous=True)
        text = listener.why_only_loopback(settings, development_key=True)
        assert text is not None
        assert "development certificate" in text

    @pytest.mark.parametrize(
        "text",
        [
            "tcp:0",
            "tcp:0:interface=0.0.0.0",
            "tcp6:0",
            "haproxy:tcp:0",
        ],
    )
    def test_an_endpoint_on_all_addresses_is_refused_before_the_start(
        self, text: str
    ) -> None:
        """It can be wrapped in another one."""
        said = refusal(evolve(USUAL, listen=(text,)), BECAUSE)
        assert said.startswith("will not listen on ")
        assert said.endswith(BECAUSE)

    def test_a_port_on_all_addresses_is_refused_before_the_start(self) -> None:
        """It comes from --interface."""
        said = refusal(evolve(USUAL, interface="0.0.0.0"), BECAUSE)
        assert said == f"will not listen on 0.0.0.0: {BECAUSE}"


class TestTrying:
    def test_a_tried_endpoint_is_closed_again(self, free: int) -> None:
        """The trial can be repeated."""
        settings = evolve(USUAL, port=free)
        for _ in range(2):
            listener.try_out(settings, None)
            assert not answers(free)

    def test_a_busy_port_is_reported(self, busy: int) -> None:
        """The message quotes the error of the system."""
        said = refusal(evolve(USUAL, port=busy))
        expected = f"cannot listen on 127.0.0.1 port {busy}: Address already in use"
        assert said == expected

    def test_a_busy_endpoint_is_reported(self, busy: int) -> None:
        """The message has the text of the endpoint."""
        text = f"tcp:{busy}:interface=127.0.0.1"
        said = refusal(evolve(USUAL, listen=(text,)))
        assert said == f"cannot listen on {text}: Address already in use"

    def test_an_address_of_another_machine_is_reported(self) -> None:
        """192.0.2.0/24 belongs to no machine (RFC 5737)."""
        said = refusal(evolve(USUAL, interface="192.0.2.1"))
        assert said.startswith("cannot listen on 192.0.2.1 port 0: ")

    def test_an_impossible_port_is_reported(self) -> None:
        """The number in an endpoint is not checked earlier."""
        said = refusal(evolve(USUAL, listen=("tcp:99999:interface=127.0.0.1",)))
        assert said.startswith("cannot listen on tcp:99999:interface=127.0.0.1: ")

    def test_a_repeated_endpoint_is_reported(self, free: int) -> None:
        """The second one can never be opened."""
        text = f"tcp:{free}:interface=127.0.0.1"
        assert text in refusal(evolve(USUAL, listen=(text, text)))

    def test_a_unix_socket_is_not_tried(self, tmp_path: Path) -> None:
        """The trial would replace a socket in use."""
        path = tmp_path / "socket"
        listener.try_out(evolve(USUAL, listen=(f"unix:{path}",)), BECAUSE)
        assert not path.exists()

    def test_a_unix_socket_in_a_missing_folder_is_reported(self) -> None:
        """The error comes before the start."""
        text = "unix:/nonexistent/socket"
        assert text in refusal(evolve(USUAL, listen=(text,)))


class TestListener:
    async def test_a_listener_accepts_connections_until_it_is_stopped(self) -> None:
        """It opens at the privileged start, so that low ports are possible."""
        one = first(USUAL, BECAUSE)
        one.privilegedStartService()
        port = number(one)
        assert answers(port)
        await stopped(one)
        assert not answers(port)

    async def test_a_listener_knows_its_url(self) -> None:
        """The kernel chose the port."""
        one = first(USUAL)
        one.privilegedStartService()
        assert one.url("http") == f"http://127.0.0.1:{number(one)}"
        await stopped(one)

    def test_an_ipv6_address_has_brackets_in_a_url(self) -> None:
        settings = evolve(USUAL, interface="::1", port=8081)
        ((name, endpoint),) = listener.endpoints(settings, MemoryReactor(), None)
        one = Listener(name, endpoint, Factory.forProtocol(Protocol), BECAUSE)
        one.privilegedStartService()
        assert one.url("https") == "https://[::1]:8081"

    async def test_the_url_of_a_unix_socket_is_its_endpoint(self, tmp_path: Path) -> None:
        """No URL scheme exists for it."""
        text = f"unix:{tmp_path / 's'}"
        one = first(evolve(USUAL, listen=(text,)), BECAUSE)
        one.privilegedStartService()
        assert one.url("http") == text
        await stopped(one)

    def test_a_listener_on_a_busy_port_does_not_start(self, busy: int) -> None:
        """The error ends the program, because a daemon without a port is useless."""
        one = first(evolve(USUAL, port=busy))
        with pytest.raises(CannotListen, match="Address already in use"):
            one.privilegedStartService()

    async def test_a_listener_with_a_forbidden_address_does_not_start(self) -> None:
        """The address of some endpoints is only known when they are open."""
        text = "haproxy:tcp:0:interface=0.0.0.0"
        one = first(evolve(USUAL, listen=(text,)), BECAUSE)
        with pytest.raises(CannotListen, match="will not listen on"):
            one.privilegedStartService()
        await stopped(one)


def number(one: Listener) -> int:
    """Return the port that the kernel chose."""
    host = one.port.getHost()
    assert isinstance(host, IPv4Address)
    return host.port


async def stopped(one: Listener) -> None:
    """Stop a listener and wait until its port is closed."""
    done: Any = one.stopService()
    assert isinstance(done, Deferred)
    await done
