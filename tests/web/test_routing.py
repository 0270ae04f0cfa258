"""Tests of the API that serves each path, and of the names that no app can have."""

from collections.abc import Iterator
from typing import Any

import pytest
from twisted.internet.error import ConnectionDone
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from twisted.web.resource import Resource
from twisted.web.server import Site

from pulsar_api.web.api.creating import CreateAPI
from pulsar_api.web.api.following import FollowAPI
from pulsar_api.web.api.output import PartsAPI
from pulsar_api.web.api.targets import TargetAPI
from pulsar_api.web.api.tasks import TaskAPI
from pulsar_api.web.legacy.jobs import RESERVED, JobAPI
from pulsar_api.web.legacy.sockets import SOCKET
from pulsar_api.web.legacy.sockjs import SockJS
from pulsar_api.web.origin import Origins
from pulsar_api.web.pages import Pages
from pulsar_api.web.root import Root
from pulsar_api.web.routing import Mount, Router, patterns
from pulsar_api.web.signin import SignIn

APIS: dict[str, Any] = {
    "tasks": TaskAPI,
    "create": CreateAPI,
    "follow": FollowAPI,
    "parts": PartsAPI,
    "targets": TargetAPI,
    "jobs": JobAPI,
    "sockjs": SockJS,
    "pages": Pages,
    "sign-in": SignIn,
}


def mounts() -> Iterator[tuple[str, Mount]]:
    """Return the routes of each API, with a resource that does nothing."""
    for name, api in APIS.items():
        more = {SOCKET} if name == "sockjs" else set()
        reserved = RESERVED if name == "jobs" else frozenset()
        resource: Any = Resource()
        yield name, Mount(resource, patterns(api.app) | more, reserved)


MOUNTS = dict(mounts())
ROUTER = Router(list(MOUNTS.values()))
NAMES = {found: name for name, found in MOUNTS.items()}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/", "pages"),
        ("/web", "pages"),
        ("/web/", "pages"),
        ("/web/job/47", "pages"),
        ("/pulsar/index.html", "pages"),
        ("/login", "sign-in"),
        ("/login/me", "sign-in"),
        ("/tasks", "tasks"),
        ("/tasks/created", "tasks"),
        ("/task/47", "tasks"),
        ("/%74ask/47", "tasks"),
        ("/task/47/output", "tasks"),
        ("/task/47/log", "follow"),
        ("/task/47/events", "follow"),
        ("/events", "follow"),
        ("/task/47/lines", "parts"),
        ("/shop/production", "create"),
        ("/targets/production", "create"),
        ("/shop/production/tasks", "jobs"),
        ("/targets/production/tasks", "jobs"),
        ("/targets/shop/production/free", "targets"),
        ("/job/47/kill", "jobs"),
        ("/websocket/0/a/xhr", "sockjs"),
        ("/websocket/0/a/websocket", "sockjs"),
    ],
)
def test_path_has_its_api(path: str, expected: str) -> None:
    """It is the one with a route for the path."""
    assert NAMES[ROUTER.find(path.encode().split(b"/")[1:])] == expected


@pytest.mark.parametrize(
    "path",
    [
        "/shop",
        "/shop/production/staging",
        "/task/47/tasks",
        "/%74ask/47/tasks",
        "/tasks/production",
        "/jobs/production",
        "/event/production",
        "/%65vent/production",
        "/static/a/tasks",
        "/web/a",
        "//job/tasks",
        "//production",
    ],
)
def test_other_paths_have_none(path: str) -> None:
    """A reserved name is not an app, in any spelling; nor is no name at all."""
    assert ROUTER.find(path.encode().split(b"/")[1:]) not in NAMES


def test_reserved_names_are_those_that_collide() -> None:
    """A longer route, like those of targets, reserves no name."""
    names = "api event events job jobs login logout pulsar static task tasks web websocket"
    assert sorted(ROUTER.reserved) == names.encode().split()


def test_path_without_an_api_is_404() -> None:
    """The response is a problem like those of an API."""
    site: Any = Site(Root([], Origins()))
    channel = site.buildProtocol(None)
    transport = StringTransport()
    channel.makeConnection(transport)
    channel.dataReceived(b"POST /task/production HTTP/1.1\r\nHost: localhost\r\n\r\n")
    answer = transport.value()
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert b"application/problem+json" in answer
    channel.connectionLost(Failure(ConnectionDone()))
