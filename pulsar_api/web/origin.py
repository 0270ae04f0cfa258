"""Where a request comes from and where links point, without trust in the Host header."""

import re
from collections.abc import Callable, Sequence
from ipaddress import ip_address
from urllib.parse import urlsplit

from attrs import field, frozen
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.web.server import Request

from pulsar_api.config.values import is_loopback
from pulsar_api.errors import PulsarError

_HOST = re.compile(r"(\[[0-9a-f:]+\]|[a-z0-9_.-]+)(:[0-9]{1,5})?")
_PORT = re.compile(r"([0-9.]+):[0-9]+|\[([0-9a-fA-F:.]+)\](?::[0-9]+)?")


_BROWSER = re.compile(r"(mozilla|opera)/", re.IGNORECASE)


class UnknownHost(PulsarError):
    """The Host header of a request names an unknown host."""

    def __str__(self) -> str:
        return (
            "This daemon does not know the host name of this request. If the name is its "
            "own, set it with --public-url or with hosts in the settings file."
        )


class ForeignOrigin(PulsarError):
    """A browser sends a request on behalf of another site."""

    def __str__(self) -> str:
        return (
            "A browser sent this request on behalf of another site. If the daemon has "
            "another name than the one it knows, set that with --public-url."
        )


@frozen
class Origins:
    """The URLs and host names under which this daemon is reached."""

    public_url: str | None = None
    names: frozenset[str] = field(default=frozenset())
    """Host names of the daemon beside the loopback ones; ``*.example`` for subdomains."""
    proxies: frozenset[str] = field(default=frozenset())
    """Addresses whose ``X-Forwarded-For`` is trusted; ``unix`` for Unix sockets."""
    more_names: Callable[[], frozenset[str]] = frozenset
    """Returns names that can change: those of the certificate."""

    def base(self, request: Request) -> str:
        """Return the URL that links begin with, without a trailing slash."""
        if self.public_url is not None:
            return self.public_url
        scheme = "https" if request.isSecure() else "http"
        host = request.requestHeaders.getRawHeaders("host", [""])[0].lower()
        if self._is_ours(host):
            return f"{scheme}://{host}"
        address = request.getHost()
        if not isinstance(address, IPv4Address | IPv6Address):
            return f"{scheme}://localhost"
        name = f"[{address.host}]" if ":" in address.host else address.host
        return f"{scheme}://{name}:{address.port}"

    def address(self, request: Request) -> str:
        """Return where a request comes from: an IP address, or "a local user"."""
        host = getattr(request.getClientAddress(), "host", None)
        peer = "unix" if host is None else _address(host) or host
        if peer in self.proxies:
            said = ",".join(request.requestHeaders.getRawHeaders("x-forwarded-for", []))
            # From the right, as a client can have written what is further left.
            for hop in reversed(said.split(",")):
                address = _address(hop.strip())
                if address is None:
                    break
                peer = address
                if peer not in self.proxies:
                    break
        return "a local user" if peer == "unix" else peer

    def check_host(self, request: Request) -> None:
        """Raise `UnknownHost` if the Host header names an unknown host.

        So no page can reach the daemon under a name of its own (DNS rebinding). Addresses
        cannot be rebound, and clients other than browsers may omit the header.
        """
        host = request.requestHeaders.getRawHeaders("host", [""])[0].lower()
        if not host or self._is_ours(host):
            return
        found = _HOST.fullmatch(host)
        try:
            ip_address(found[1].strip("[]") if found else host)
        except ValueError:
            public = urlsplit(self.public_url or "").hostname
            if found is None or found[1] != public:
                raise UnknownHost from None

    def check(self, request: Request, *, navigation: bool = False) -> None:
        """Raise `ForeignOrigin` if a browser sends this request on behalf of another site.

        Other clients send none of these headers and pass. ``navigation``: whether a link on
        another site may lead here, as the request only reads.
        """
        headers = request.requestHeaders
        ours = "/".join(self.base(request).split("/")[:3]).lower()
        if not navigation and not _all_from(ours, headers.getRawHeaders("referer", [])):
            raise ForeignOrigin
        site = headers.getRawHeaders("sec-fetch-site", ["none"])[0].lower()
        origin = headers.getRawHeaders("origin")
        mode = headers.getRawHeaders("sec-fetch-mode", [""])[0].lower()
        if navigation and mode == "navigate" and request.method in {b"GET", b"HEAD"}:
            return
        if site not in {"none", "same-origin"} or (
            origin is not None and origin[0].lower() != ours
        ):
            raise ForeignOrigin

    def check_link(self, request: Request, *, referer: bool) -> None:
        """Raise `ForeignOrigin` if another site may have made a browser send this GET.

        Over plain HTTP browsers do not say so, and an image on any page can be such a
        request. ``referer``: whether a Referer of this daemon is enough. Clients other than
        browsers pass.
        """
        headers = request.requestHeaders
        said = "sec-fetch-site", *(("referer",) if referer else ())
        if any(headers.hasHeader(name) for name in said):
            return  # `check` has checked it
        if _BROWSER.match(headers.getRawHeaders("user-agent", [""])[0]):
            raise ForeignOrigin

    def _is_ours(self, host: str) -> bool:
        found = _HOST.fullmatch(host)
        if found is None:
            return False
        name = found[1].strip("[]")
        if name == "localhost" or name.endswith(".localhost") or is_loopback(name):
            return True
        names = self.names | self.more_names()
        return name in names or any(
            name.endswith(known[1:]) for known in names if known.startswith("*.")
        )


def _all_from(ours: str, addresses: Sequence[str]) -> bool:
    return all("/".join(text.split("/")[:3]).lower() == ours for text in addresses)


def _address(text: str) -> str | None:
    """Return an IP address in its usual form, without a port; None if it is not one."""
    found = _PORT.fullmatch(text)
    if found is not None:
        text = found[1] or found[2]
    try:
        address = ip_address(text)
    except ValueError:
        return None
    return str(getattr(address, "ipv4_mapped", None) or address)
