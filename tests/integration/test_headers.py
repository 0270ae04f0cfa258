"""Tests of the security headers, which every response has."""

import gzip
import json
import re
from collections.abc import Iterator
from http.client import HTTPMessage
from pathlib import Path

import pytest

import pulsar_api
from tests.integration.daemon import SHELL, Daemon, next_answer, problem

UI = Path(pulsar_api.__file__).parent / "ui"

ALWAYS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
PAGES = ("/web", "/web/", "/web/job/1", "/pulsar", "/pulsar/", "/pulsar/index.html")


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """Return a daemon with one task that has ended."""
    daemon = Daemon(tmp_path_factory.mktemp("headers"), "--command", SHELL)
    assert daemon.ended(daemon.sh("echo hello"))["id"] == 1
    yield daemon
    daemon.stop()


def check(headers: HTTPMessage, policy: str = POLICY) -> None:
    """Check that a response has each security header once, and no version of a program."""
    for name, value in {**ALWAYS, "Content-Security-Policy": policy}.items():
        assert headers.get_all(name) == [value], name
    assert headers["Server"] is None


ANSWERS = [
    ("GET", "/", 302),
    ("GET", "/tasks", 200),
    ("HEAD", "/tasks", 200),
    ("OPTIONS", "/tasks", 204),
    ("GET", "/task/1", 200),
    ("GET", "/task/1/output?since=0", 200),
    ("GET", "/tasks/created?timeout=0", 200),
    ("POST", "/site/production?action=run", 200),
    ("POST", "/site/production?action=-x", 400),
    ("GET", "/%2f", 400),
    ("GET", "/nothing/is/here", 404),
    ("GET", "/task/999", 404),
    ("DELETE", "/tasks", 405),
    ("OPTIONS", "*", 200),
    ("GET", "/task/1/log", 200),
    ("GET", "/task/1/log?follow=1", 200),
    ("HEAD", "/task/1/log", 200),
    ("GET", "/task/1/events", 200),
    ("HEAD", "/events", 200),
    ("GET", "/task/1/lines", 200),
    ("GET", "/task/1/pieces", 200),
    ("HEAD", "/task/1/pieces", 200),
    ("GET", "/task/1/search?text=hello", 200),
    ("GET", "/task/1/search", 400),
    ("GET", "/jobs", 200),
    ("GET", "/job/1", 200),
    ("GET", "/websocket", 200),
    ("GET", "/websocket/info", 200),
    ("GET", "/websocket/a/b/websocket", 400),
    ("GET", "/pulsar/style.css", 200),
]


@pytest.mark.parametrize(("method", "path", "status"), ANSWERS)
def test_every_response_has_security_headers(
    daemon: Daemon, method: str, path: str, status: int
) -> None:
    """Responses that Twisted or Klein makes by itself have them too."""
    answer = daemon.request(method, path)
    assert answer.status == status, answer.body
    check(answer.headers)


def test_partial_and_not_modified_responses_have_security_headers(daemon: Daemon) -> None:
    """The statuses are 206, 304 and 416."""
    etag = daemon.get("/task/1").headers["ETag"] or ""
    given = {"If-None-Match": etag}, {"Range": "bytes=0-1"}, {"Range": "bytes=100-"}
    paths = "/task/1", "/task/1/log", "/task/1/log"
    statuses = []
    for path, headers in zip(paths, given, strict=True):
        answer = daemon.request("GET", path, headers=headers)
        statuses.append(answer.status)
        check(answer.headers)
    assert statuses == [304, 206, 416]


def test_refusals_of_requests_from_another_site_have_security_headers(
    daemon: Daemon,
) -> None:
    """The status is 403."""
    answer = daemon.get("/task/1/kill", Origin="https://evil.example")
    assert answer.status == 403
    check(answer.headers)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\n\r\n", 400),
        (b"POST /site/x HTTP/1.1\r\nContent-Length: 9999999\r\n\r\n", 413),
    ],
    ids=lambda value: str(value)[:20],
)
def test_responses_to_unparsed_requests_have_security_headers(
    daemon: Daemon, data: bytes, status: int
) -> None:
    """These responses are prepared bytes, sent before any routing."""
    with daemon.open_socket() as sock:
        sock.sendall(data)
        answer = next_answer(sock)
    assert answer.status == status
    check(answer.headers)


@pytest.mark.parametrize("path", PAGES)
def test_pages_forbid_inline_scripts_and_styles(daemon: Daemon, path: str) -> None:
    """Every file that a page links to can be loaded under its policy."""
    answer = daemon.get(path)
    policy = answer.headers["Content-Security-Policy"] or ""
    check(answer.headers, policy)
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["frame-ancestors"] == "'none'"
    rest = ("script-src", "style-src", "img-src", "connect-src", "form-action")
    assert {rules[name] for name in rest} == {"'self'"}
    assert not re.search("unsafe|http|[*]|data:", policy)
    text = answer.body.decode()
    assert not re.search(r"<style|<script(?![^>]* src=)| (style|on[a-z]+)=", text)
    links = re.findall(r'<link rel="stylesheet" href="(.*?)"', text)
    assert links
    for link in links + re.findall(r'<script[^>]* src="(.*?)"', text):
        found = daemon.get(link)
        assert found.status == 200
        kind = "text/javascript" if link.endswith(".js") else "text/css"
        assert found.headers["Content-Type"] == f"{kind}; charset=utf-8"
        assert b"{" in found.body


KINDS = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8"}
FILES = [path for path in UI.iterdir() if path.suffix in {".js", ".css", ".svg"}]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_of_the_page_are_revalidated_by_etag(daemon: Daemon, path: Path) -> None:
    """A browser asks each time whether a file has changed, and gets 304 if it has not."""
    answer = daemon.get(f"/pulsar/{path.name}")
    assert (answer.status, answer.body) == (200, path.read_bytes())
    assert answer.headers["Content-Type"] == KINDS.get(path.suffix, "image/svg+xml")
    assert answer.headers.get_all("Cache-Control") == ["no-cache"]
    check(answer.headers)
    etag = answer.headers["ETag"]
    assert re.fullmatch('"[0-9a-f]{32}"', etag or "")
    again = daemon.get(f"/pulsar/{path.name}", **{"If-None-Match": etag})
    assert (again.status, again.body, again.headers["ETag"]) == (304, b"", etag)
    assert again.headers.get_all("Cache-Control") == ["no-cache"]
    check(again.headers)
    head = daemon.request("HEAD", f"/pulsar/{path.name}")
    assert (head.status, head.body, head.headers["ETag"]) == (200, b"", etag)
    assert head.headers["Content-Length"] == str(len(answer.body))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_of_the_page_are_compressed_for_clients_that_accept_gzip(
    daemon: Daemon, path: Path
) -> None:
    """The compressed form has an ETag of its own."""
    plain = daemon.get(f"/pulsar/{path.name}")
    asked = {"Accept-Encoding": "br, GZIP"}
    answer = daemon.get(f"/pulsar/{path.name}", **asked)
    assert (answer.status, gzip.decompress(answer.body)) == (200, plain.body)
    assert (plain.headers["Content-Encoding"], answer.headers["Content-Encoding"]) == (
        None,
        "gzip",
    )
    assert plain.headers["Vary"] == answer.headers["Vary"] == "Accept-Encoding"
    check(answer.headers)
    etag = answer.headers["ETag"]
    assert etag != plain.headers["ETag"]
    again = daemon.get(f"/pulsar/{path.name}", **asked, **{"If-None-Match": etag})
    assert (again.status, again.body, again.headers["ETag"]) == (304, b"", etag)
    never = daemon.get(f"/pulsar/{path.name}", **{"Accept-Encoding": "gzip;q=0"})
    assert never.body == plain.body


@pytest.mark.parametrize(
    "name", ["login.html", "none.js", "..", "__init__.py", "style.css/x", ".css", "%2e%2e"]
)
def test_unknown_files_of_the_page_answer_404(daemon: Daemon, name: str) -> None:
    """The daemon serves a fixed list of names and never resolves a path on the disk."""
    assert problem(daemon.get(f"/pulsar/{name}"), 404)["type"].endswith(":not-found")


def test_errors_are_json_even_if_the_path_is_html(daemon: Daemon) -> None:
    """A path that a client sends cannot become part of a page."""
    answer = daemon.get("/<script>alert(1)</script>")
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert json.loads(answer.body)["status"] == answer.status
