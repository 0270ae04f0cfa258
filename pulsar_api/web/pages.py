"""The pages for people, and the root of the tree that serves everything."""

import gzip
from collections.abc import Mapping
from hashlib import sha256
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import PurePath
from typing import ClassVar
from urllib.parse import quote, unquote_to_bytes

from attrs import field, frozen
from klein import Klein
from twisted.web.resource import IResource, Resource
from twisted.web.server import Request
from werkzeug.exceptions import NotFound

from pulsar_api.web.api.tasks import RESERVED
from pulsar_api.web.authentication import Access
from pulsar_api.web.headers import PAGE_POLICY
from pulsar_api.web.origin import Origins, UnknownHost
from pulsar_api.web.responses import header, new_app, not_modified, problem, reply
from pulsar_api.web.server.body import BodyRequest

_RESERVED = frozenset(name.encode() for name in RESERVED)
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
        # Whether what is shown is still good the page finds out by /login/me: a provider
        # that is slow must not keep it from being drawn.
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


class Root(Resource):
    """Looks at the path before anybody routes by it, and chooses who does."""

    isLeaf = True

    def __init__(
        self,
        api: IResource,
        follow: IResource,
        parts: IResource,
        jobs: IResource,
        sockjs: IResource,
        pages: IResource,
        sign_in: IResource,
        targets: IResource,
        origins: Origins,
    ) -> None:
        super().__init__()
        self._sign_in = sign_in
        self._targets = targets
        self._origins = origins
        self._sockjs = sockjs
        self._api = api
        self._follow = follow
        self._parts = parts
        self._jobs = jobs
        self._pages = pages

    def render(self, request: Request) -> bytes | int:
        """Refuse a path that would be routed as something else than it says."""
        headers = request.requestHeaders.getAllRawHeaders()
        if not all(_is_text(value) for _, values in headers for value in values):
            detail = "A header is not UTF-8."
            return problem(request, 400, "malformed", "Bad Request", detail)
        try:
            self._origins.check_host(request)
        except UnknownHost as e:
            return problem(request, 421, "unknown-host", "Misdirected request", str(e))
        segments = request.path.split(b"/")[1:]
        # Those of POST /:app/:env have names that the sender knows.
        names = ["app", "env"] if len(segments) == 2 else ["path"] * len(segments)
        for name, segment in zip(names, segments, strict=True):
            text = unquote_to_bytes(segment)
            why = None
            if b"/" in text or b"\0" in text:
                why = "a slash or NUL is not allowed in it, percent-encoded or not"
            try:
                text.decode("utf-8")
            except UnicodeDecodeError:
                why = "must be UTF-8"
            if why is not None:
                detail = f"{name}: {why}"
                title = "Invalid input"
                return problem(request, 400, "invalid-input", title, detail, name)
        known = request.method.isalpha() and request.method.isupper()
        if not known or not request.path.startswith(b"/"):
            detail = "This method or target is not understood."
            return problem(request, 400, "malformed", "Bad Request", detail)
        answer: bytes | int = self._for(segments).render(request)
        if segments[0] == b"websocket" and isinstance(request, BodyRequest):
            request.caller_known()  # of those who say it later there are only so many
        return answer

    def _for(self, segments: list[bytes]) -> IResource:
        if segments[0] in {b"", b"web", b"pulsar"}:
            return self._pages
        if segments[0] in {b"login", b"logout"}:
            return self._sign_in
        if segments[0] == b"websocket":
            return self._sockjs
        if segments[0] == b"targets" and len(segments) == 4:
            return self._targets
        listing = len(segments) == 3 and segments[2] == b"tasks"
        if segments[0] in {b"job", b"jobs"} or (listing and segments[0] not in _RESERVED):
            return self._jobs
        of_task = segments[2] if segments[0] == b"task" and len(segments) > 2 else None
        if of_task in {b"lines", b"pieces", b"search"}:
            return self._parts
        follow = segments[0] == b"events" or of_task in {b"log", b"events"}
        return self._follow if follow else self._api


def _is_text(value: bytes) -> bool:
    if not value.isascii():
        try:
            value.decode()
        except UnicodeDecodeError:
            return False
    return True
