"""What browsers are told is on every answer, whatever kind of answer it is."""

import json
import re
from collections.abc import Iterator
from http.client import HTTPMessage

import pytest

from tests.integration.daemon import SHELL, Daemon, next_answer

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
    """Check what is on every answer: once, and no version of anything."""
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
    ("GET", "/jobs", 200),
    ("GET", "/job/1", 200),
    ("GET", "/websocket", 200),
    ("GET", "/websocket/info", 200),
    ("GET", "/websocket/a/b/websocket", 400),
    ("GET", "/pulsar/style.css", 200),
]


@pytest.mark.parametrize(("method", "path", "status"), ANSWERS)
def test_every_answer_has_them(daemon: Daemon, method: str, path: str, status: int) -> None:
    """Also those that nobody of ours has made."""
    answer = daemon.request(method, path)
    assert answer.status == status, answer.body
    check(answer.headers)


def test_ranges_and_what_is_not_modified_have_them(daemon: Daemon) -> None:
    """206, 304 and 416."""
    etag = daemon.get("/task/1").headers["ETag"] or ""
    given = {"If-None-Match": etag}, {"Range": "bytes=0-1"}, {"Range": "bytes=100-"}
    paths = "/task/1", "/task/1/log", "/task/1/log"
    statuses = []
    for path, headers in zip(paths, given, strict=True):
        answer = daemon.request("GET", path, headers=headers)
        statuses.append(answer.status)
        check(answer.headers)
    assert statuses == [304, 206, 416]


def test_what_another_site_asks_is_refused_with_them(daemon: Daemon) -> None:
    """403."""
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
def test_what_is_refused_unread_has_them(daemon: Daemon, data: bytes, status: int) -> None:
    """These answers are bytes that were made beforehand."""
    with daemon.open_socket() as sock:
        sock.sendall(data)
        answer = next_answer(sock)
    assert answer.status == status
    check(answer.headers)


@pytest.mark.parametrize("path", PAGES)
def test_a_page_allows_nothing_inline(daemon: Daemon, path: str) -> None:
    """And what it allows is all that it needs."""
    answer = daemon.get(path)
    policy = answer.headers["Content-Security-Policy"] or ""
    check(answer.headers, policy)
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["frame-ancestors"] == "'none'"
    assert rules["form-action"] == "'self'"
    assert not re.search("unsafe|http|[*]|data:", policy)
    text = answer.body.decode()
    assert not re.search(r"<style|<script(?![^>]* src=)| (style|on[a-z]+)=", text)
    for link in re.findall(r'<link rel="stylesheet" href="(.*?)"', text):
        found = daemon.get(link)
        assert found.status == 200
        assert found.headers["Content-Type"] == "text/css; charset=utf-8"
        assert b"{" in found.body


def test_errors_are_no_pages(daemon: Daemon) -> None:
    """What a client sent comes back as JSON only."""
    answer = daemon.get("/<script>alert(1)</script>")
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert json.loads(answer.body)["status"] == answer.status
