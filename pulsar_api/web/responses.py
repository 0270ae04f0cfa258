"""Ways to answer a request: by a value, a stream, or the problem of an error."""

import re
from collections.abc import Iterator
from typing import Any

from klein import Klein
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IPullProducer, IPushProducer
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.server import Request
from werkzeug.exceptions import HTTPException, MethodNotAllowed
from zope.interface import implementer

from pulsar_api import errors
from pulsar_api.web import decoding, encoding
from pulsar_api.web.headers import PAGE_POLICY
from pulsar_api.web.origin import ForeignOrigin
from pulsar_api.web.server import body

_log = Logger()

JSON = "application/json"
_HTML = "text/html; charset=utf-8"

# For each error: status, type, title, seconds for Retry-After.
_PROBLEMS: dict[type[errors.PulsarError], tuple[int, str, str, int | None]] = {
    errors.InvalidInput: (400, "invalid-input", "Invalid input", None),
    decoding.UnsupportedMedia: (415, "unsupported-media", "Unsupported media type", None),
    errors.UnknownTask: (404, "unknown-task", "Unknown task", None),
    errors.NotAuthenticated: (401, "not-authenticated", "Not authenticated", None),
    errors.NotAllowed: (403, "not-allowed", "Not allowed", None),
    errors.LoginBound: (403, "login-bound", "Login bound to another account", None),
    errors.TooManyFailures: (429, "too-many-failures", "Too many failures", None),
    errors.ProviderUnavailable: (
        *(503, "provider-unavailable", "Provider unavailable"),
        None,
    ),
    ForeignOrigin: (403, "foreign-origin", "Request from another site", None),
    errors.KeyReused: (422, "key-reused", "Idempotency key reused", None),
    errors.NoListing: (404, "no-listing", "No list of actions", None),
    errors.NotRestartable: (409, "not-restartable", "Not restartable", None),
    errors.SecretsGone: (409, "secrets-gone", "Secrets are gone", None),
    errors.KeyInFlight: (409, "key-in-flight", "First request is under way", 1),
    errors.QueueFull: (503, "queue-full", "Queue full", 10),
    errors.Busy: (503, "busy", "Busy", 10),
    errors.ShuttingDown: (503, "stopping", "Daemon is stopping", 5),
    errors.StoreUnavailable: (503, "store-unavailable", "State unavailable", 10),
    body.BodyTooLarge: (413, "body-too-large", "Content Too Large", None),
    body.BodyTooSlow: (408, "too-slow", "Request Timeout", None),
    body.BodiesFull: (503, "bodies-full", "No room for the body", 5),
}


def reply(request: Request, body: bytes, code: int = 200, kind: str = JSON) -> bytes:
    """Set the head of a response and return its body."""
    request.setResponseCode(code)
    request.setHeader("Content-Type", kind)
    request.setHeader("Cache-Control", "no-store")
    request.setHeader("Content-Length", str(len(body)))
    return body


def problem(
    request: Request,
    status: int,
    type_: str,
    title: str,
    detail: str,
    field: str | None = None,
) -> bytes:
    """Set the head of an error response (RFC 9457) and return its body."""
    body = encoding.problem(status, type_, title, detail, field)
    return reply(request, body, status, encoding.PROBLEM)


async def stream(request: Request, pieces: Iterator[bytes]) -> bytes:
    """Send pieces as fast as the client reads, holding none of them."""
    request.setResponseCode(200)
    request.setHeader("Content-Type", JSON)
    request.setHeader("Cache-Control", "no-store")
    if request.method != b"HEAD":
        await _Pump(request, pieces).run()
    return b""


@implementer(IPullProducer)
class _Pump:
    """Writes one piece each time the client has room."""

    def __init__(self, request: Request, pieces: Iterator[bytes]) -> None:
        self._request = request
        self._pieces = pieces
        self._done: Deferred[None] = Deferred(lambda _: self.stopProducing())

    def run(self) -> Deferred[None]:
        """Fire when the last piece is written; cancelled when the client goes away."""
        self._request.registerProducer(self, False)
        return self._done

    def resumeProducing(self) -> None:
        try:
            piece = next(self._pieces, None)
        except OSError:
            # A partial response must not look complete.
            _log.failure("Cannot read output")
            transport: Any = self._request.transport
            transport.abortConnection()
            return
        if piece is not None:
            self._request.write(piece)
        else:
            self._request.unregisterProducer()
            self._done.callback(None)

    def stopProducing(self) -> None:
        self._pieces = iter(())


@implementer(IPushProducer)
class Valve:
    """Lets a writer wait for a client that reads more slowly than is written."""

    _paused = False
    _room: Deferred[None] | None = None

    def pauseProducing(self) -> None:
        """Close the valve: the client's buffer is full."""
        self._paused = True

    def resumeProducing(self) -> None:
        """Open the valve: the client has read."""
        self._paused = False
        room, self._room = self._room, None
        if room is not None:
            room.callback(None)

    def stopProducing(self) -> None:
        """Do nothing: the writer is cancelled when the client goes away."""

    async def open(self) -> None:
        """Wait until there is room for more."""
        while self._paused:
            self._room = Deferred()
            await self._room


def new_app() -> Klein:
    """Return an application that matches paths as they are and answers with problems."""
    app = Klein()
    app.url_map.strict_slashes = False
    app.url_map.merge_slashes = False
    _handle_errors(app)
    return app


def _handle_errors(app: Klein) -> None:
    """Make a Klein application answer each error with a problem (RFC 9457)."""

    @app.handle_errors(errors.PulsarError)
    def known(self: Any, request: Any, failure: Failure) -> bytes:
        error = failure.value
        assert isinstance(error, errors.PulsarError)
        status, type_, title, retry = _PROBLEMS[type(error)]
        if isinstance(error, errors.StoreUnavailable):
            status = 507 if error.full else status
            _log.error("{uri} cannot be answered: {error}", uri=request.uri, error=error)
        if isinstance(error, errors.NotAuthenticated):
            challenge(request)
        retry = getattr(error, "retry_after", retry)
        if retry is not None:
            request.setHeader("Retry-After", str(retry))
        name = error.field if isinstance(error, errors.InvalidInput) else None
        return problem(request, status, type_, title, str(error), name)

    @app.handle_errors(OSError)
    def unreadable(self: Any, request: Any, failure: Failure) -> bytes:
        _log.error("Cannot read for {uri}: {e}", uri=request.uri, e=failure.value)
        request.setHeader("Retry-After", "10")
        why = getattr(failure.value, "strerror", None) or "no reason is given"
        detail = f"The output cannot be read now: {why}. Try again later."
        return problem(request, 503, "output-unavailable", "Output unavailable", detail)

    @app.handle_errors(HTTPException)
    def routing(self: Any, request: Any, failure: Failure) -> bytes:
        error = failure.value
        assert isinstance(error, HTTPException)
        if isinstance(error, MethodNotAllowed):
            allowed = sorted({*(error.valid_methods or ()), "OPTIONS"})
            request.setHeader("Allow", ", ".join(allowed))
            if request.method == b"OPTIONS":
                request.setResponseCode(204)
                return b""
            method = request.method.decode("ascii", "replace")
            detail = f"This path does not allow {method}; it allows {', '.join(allowed)}."
            title = "Method not allowed"
            return problem(request, 405, "method-not-allowed", title, detail)
        detail = "There is nothing at this path; /pulsar/index.html lists the API."
        return problem(request, 404, "not-found", "Not found", detail)

    @app.handle_errors(Exception)
    def unexpected(self: Any, request: Any, failure: Failure) -> bytes:
        _log.failure("Cannot answer {uri}", failure, uri=request.uri)
        detail = "This is a bug in the daemon; the daemon's log has the details."
        return problem(request, 500, "internal-error", "Internal error", detail)


def challenge(request: Request) -> None:
    """Say how to authenticate (RFC 9110, section 11.6.1).

    Browsers are not offered Basic, as they would show a dialog of their own over the page.
    """
    add = request.responseHeaders.addRawHeader
    if not request.requestHeaders.hasHeader("sec-fetch-mode"):
        add("WWW-Authenticate", 'Basic realm="pulsar-api", charset="UTF-8"')
    add("WWW-Authenticate", 'Bearer realm="pulsar-api"')


def page(request: Request, text: str, places: dict[str, str], status: int = 200) -> bytes:
    """Answer with a page in which each ``{name}`` is replaced by an escaped value."""
    request.setHeader("Content-Security-Policy", PAGE_POLICY)
    text = re.sub(r"\{(\w+)\}", lambda found: places[found[1]], text)
    return reply(request, text.encode(), status, _HTML)


def not_modified(request: Request, etag: str) -> bool:
    """Set the ETag; return whether the client has this version already (RFC 9110).

    Not by werkzeug's `parse_etags`: the regular expression of its older versions takes
    half a second for 15 KB of spaces.
    """
    request.setHeader("ETag", etag)
    given = request.requestHeaders.getRawHeaders("if-none-match", [])
    tags = [tag.strip().removeprefix("W/") for line in given for tag in line.split(",")]
    if etag not in tags and "*" not in tags:
        return False
    request.setResponseCode(304)
    return True


def header(request: Request, name: str) -> str:
    """Return a header of the request, or "" if it is missing."""
    value: Any = request.getHeader(name)
    return value or ""
