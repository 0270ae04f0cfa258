"""Where a request comes from and where our links point; the Host header is not believed."""

import re

from attrs import field, frozen
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.web.server import Request

from pulsar_api.errors import PulsarError
from pulsar_api.settings import is_loopback

_HOST = re.compile(r"(\[[0-9a-f:]+\]|[a-z0-9_.-]+)(:[0-9]{1,5})?")


class ForeignOrigin(PulsarError):
    """A browser says that another site made it send this request."""

    def __str__(self) -> str:
        return (
            "A browser sent this request for another site. If this is your daemon under a "
            "name of its own, tell it that name by --public-url."
        )


@frozen
class Origins:
    """Knows under which addresses this daemon may be called."""

    public_url: str | None = None
    names: frozenset[str] = field(default=frozenset())
    """Host names that are ours beside the loopback ones; ``*.example`` for all below."""

    def base(self, request: Request) -> str:
        """Return the URL that links begin with, without a slash at the end."""
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

    def check(self, request: Request) -> None:
        """Raise `ForeignOrigin` if a browser sends this for another site.

        What is no browser sends neither header and is not meant.
        """
        headers = request.requestHeaders
        site = headers.getRawHeaders("sec-fetch-site", ["none"])[0].lower()
        origin = headers.getRawHeaders("origin")
        ours = "/".join(self.base(request).split("/")[:3])
        if site not in {"none", "same-origin"} or (
            origin is not None and origin[0].lower() != ours.lower()
        ):
            raise ForeignOrigin

    def _is_ours(self, host: str) -> bool:
        found = _HOST.fullmatch(host)
        if found is None:
            return False
        name = found[1].strip("[]")
        if name == "localhost" or name.endswith(".localhost") or is_loopback(name):
            return True
        return name in self.names or f"*.{name.partition('.')[2]}" in self.names
