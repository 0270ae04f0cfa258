"""The pages for people, and the root of the tree that serves everything."""

from html import escape
from importlib.resources import files
from typing import ClassVar
from urllib.parse import quote, unquote_to_bytes

from attrs import frozen
from klein import Klein
from twisted.web.resource import IResource, Resource
from twisted.web.server import Request

from pulsar_api.errors import NotAuthenticated
from pulsar_api.web.access import Access
from pulsar_api.web.origin import Origins, UnknownHost
from pulsar_api.web.reply import handle_errors, page, problem, reply
from pulsar_api.web.tasks import RESERVED

_RESERVED = frozenset(name.encode() for name in RESERVED)
_HTML = "text/html; charset=utf-8"
_UI = files("pulsar_api") / "ui"


def _new_app() -> Klein:
    app = Klein()
    app.url_map.strict_slashes = False
    handle_errors(app)
    return app


@frozen(eq=False)
class Pages:
    """What a browser shows."""

    app: ClassVar[Klein] = _new_app()
    access: Access
    page: str = (_UI / "index.html").read_text("utf-8")
    style: bytes = (_UI / "style.css").read_bytes()

    @app.route("/", methods=["GET"])
    def root(self, request: Request) -> bytes:
        request.setHeader("Location", "/web/")
        return reply(request, b"", 302, _HTML)

    @app.route("/web", methods=["GET"])
    @app.route("/web/job/<number>", methods=["GET"])
    @app.route("/pulsar", methods=["GET"])
    @app.route("/pulsar/index.html", methods=["GET"])
    async def index(self, request: Request, number: str = "") -> bytes:
        access = self.access
        try:
            shown = access.shown(request)
            caller = await access.caller(shown, access.origins.address(request))
        except NotAuthenticated:
            target = quote(request.uri.decode("ascii", "replace"), safe="")
            request.setHeader("Location", f"/login?next={target}")
            return reply(request, b"", 303, _HTML)
        account = ""
        if caller.name is not None:
            account = _ACCOUNT.format(user=escape(caller.name))
        return page(request, self.page, {"account": account})

    @app.route("/pulsar/style.css", methods=["GET"])
    def stylesheet(self, request: Request) -> bytes:
        return reply(request, self.style, kind="text/css; charset=utf-8")


_ACCOUNT = """<form method="post" action="/logout" class="account">
  Signed in as {user}. <button>Sign out</button>
  <button formaction="/logout?everywhere=1">everywhere</button></form>"""


class Root(Resource):
    """Looks at the path before anybody routes by it, and chooses who does."""

    isLeaf = True

    def __init__(
        self,
        api: IResource,
        follow: IResource,
        jobs: IResource,
        sockjs: IResource,
        pages: IResource,
        sign_in: IResource,
        origins: Origins,
    ) -> None:
        super().__init__()
        self._sign_in = sign_in
        self._origins = origins
        self._sockjs = sockjs
        self._api = api
        self._follow = follow
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
        return answer

    def _for(self, segments: list[bytes]) -> IResource:
        if segments[0] in {b"", b"web", b"pulsar"}:
            return self._pages
        if segments[0] in {b"login", b"logout"}:
            return self._sign_in
        if segments[0] == b"websocket":
            return self._sockjs
        listing = len(segments) == 3 and segments[2] == b"tasks"
        if segments[0] in {b"job", b"jobs"} or (listing and segments[0] not in _RESERVED):
            return self._jobs
        of_task = segments[0] == b"task" and segments[2:3] in ([b"log"], [b"events"])
        return self._follow if of_task or segments[0] == b"events" else self._api


def _is_text(value: bytes) -> bool:
    if not value.isascii():
        try:
            value.decode()
        except UnicodeDecodeError:
            return False
    return True
