"""The resource that serves everything."""

from collections.abc import Sequence
from urllib.parse import unquote_to_bytes

from twisted.web.resource import Resource
from twisted.web.server import Request

from pulsar_api.web.origin import Origins, UnknownHost
from pulsar_api.web.responses import problem
from pulsar_api.web.routing import Mount, Router
from pulsar_api.web.server.body import BodyRequest


class Root(Resource):
    """Checks the head of each request, and hands it to the API of its path."""

    isLeaf = True

    def __init__(self, mounts: Sequence[Mount], origins: Origins) -> None:
        super().__init__()
        self._router = Router(mounts)
        self._origins = origins

    def render(self, request: Request) -> bytes | int:
        """Refuse an ambiguous request, or let the API of its path answer it."""
        headers = request.requestHeaders.getAllRawHeaders()
        if not all(_is_text(value) for _, values in headers for value in values):
            detail = "A header of the request is not UTF-8."
            return problem(request, 400, "malformed", "Bad Request", detail)
        try:
            self._origins.check_host(request)
        except UnknownHost as e:
            return problem(request, 421, "unknown-host", "Misdirected request", str(e))
        segments = request.path.split(b"/")[1:]
        # The segments of POST /:app/:env have names in the API.
        names = ["app", "env"] if len(segments) == 2 else ["path"] * len(segments)
        for name, segment in zip(names, segments, strict=True):
            text = unquote_to_bytes(segment)
            why = None
            if b"/" in text or b"\0" in text:
                why = "must not contain a slash or NUL, percent-encoded or not"
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
            detail = "The method or the target of the request is malformed."
            return problem(request, 400, "malformed", "Bad Request", detail)
        found = self._router.find(segments)
        answer: bytes | int = found.resource.render(request)
        if found.identifies_later and isinstance(request, BodyRequest):
            request.caller_known()  # the API bounds how many are not identified
        return answer


def _is_text(value: bytes) -> bool:
    if not value.isascii():
        try:
            value.decode()
        except UnicodeDecodeError:
            return False
    return True
