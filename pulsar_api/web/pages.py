"""The pages for people, and the files that they load."""

import gzip
from collections.abc import Mapping
from hashlib import sha256
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import PurePath
from typing import ClassVar
from urllib.parse import quote

from attrs import field, frozen
from klein import Klein
from twisted.web.server import Request
from werkzeug.exceptions import NotFound

from pulsar_api.web.authentication import Access
from pulsar_api.web.headers import PAGE_POLICY
from pulsar_api.web.responses import header, new_app, not_modified, reply

_HTML = "text/html; charset=utf-8"
_UI = files("pulsar_api") / "ui"
_KINDS = {
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}


@frozen
class Asset:
    """A file that a page loads."""

    kind: str
    data: bytes
    etag: str

    def packed(self) -> "Asset":
        """Return the same as it goes over the network; it has a name of its own there."""
        return Asset(
            self.kind, gzip.compress(self.data, mtime=0), f'{self.etag[:-1]}-gzip"'
        )

    @classmethod
    def all_in(cls, folder: Traversable) -> "dict[str, Asset]":
        """Read what pages load of a folder, by name; other files in it are not for them."""
        found = {}
        for file in folder.iterdir():
            kind = _KINDS.get(PurePath(file.name).suffix)
            if kind is not None:
                data = file.read_bytes()
                found[file.name] = cls(kind, data, f'"{sha256(data).hexdigest()[:32]}"')
        return found


def _takes_gzip(request: Request) -> bool:
    names = [part.strip().lower() for part in header(request, "accept-encoding").split(",")]
    return "gzip" in names  # with a weight, even of nothing, nobody asks for it


@frozen(eq=False)
class Pages:
    """What a browser shows."""

    app: ClassVar[Klein] = new_app()
    access: Access
    shell: bytes = (_UI / "index.html").read_bytes()
    assets: Mapping[str, Asset] = field(factory=lambda: Asset.all_in(_UI))
    """All that there is: a path of a client's never leads to the disk."""
    packed: Mapping[str, Asset] = field(init=False)
    """The same by gzip; they hold no secret, whose length could tell something."""

    @packed.default
    def _packed(self) -> Mapping[str, Asset]:
        return {name: asset.packed() for name, asset in self.assets.items()}

    @app.route("/", methods=["GET"])
    def root(self, request: Request) -> bytes:
        request.setHeader("Location", "/web/")
        return reply(request, b"", 302, _HTML)

    @app.route("/web", methods=["GET"])
    @app.route("/web/job/<number>", methods=["GET"])
    @app.route("/pulsar", methods=["GET"])
    @app.route("/pulsar/index.html", methods=["GET"])
    def index(self, request: Request, number: str = "") -> bytes:
        # The page itself asks /login/me whether the credentials are still valid: a slow
        # provider must not keep it from being drawn.
        if (
            self.access.authenticator is not None
            and self.access.credentials(request) is None
        ):
            target = quote(request.uri.decode("ascii", "replace"), safe="")
            request.setHeader("Location", f"/login?next={target}")
            return reply(request, b"", 303, _HTML)
        request.setHeader("Content-Security-Policy", PAGE_POLICY)
        return reply(request, self.shell, kind=_HTML)

    @app.route("/pulsar/<name>", methods=["GET"])
    def asset(self, request: Request, name: str) -> bytes:
        packed = _takes_gzip(request)
        found = (self.packed if packed else self.assets).get(name)
        if found is None:
            raise NotFound
        request.setHeader("Vary", "Accept-Encoding")
        if packed:
            request.setHeader("Content-Encoding", "gzip")
        body = b""
        if not not_modified(request, found.etag):
            body = reply(request, found.data, kind=found.kind)
        request.setHeader("Cache-Control", "no-cache")
        return body
