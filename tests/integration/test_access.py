"""Access to each route by each transport for each caller, as the table of the docs says."""

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from pulsar_api.auth.rights import Right
from pulsar_api.web.api.creating import CreateAPI
from pulsar_api.web.api.following import FollowAPI
from pulsar_api.web.api.output import PartsAPI
from pulsar_api.web.api.targets import TargetAPI
from pulsar_api.web.api.tasks import TaskAPI
from pulsar_api.web.legacy.jobs import JobAPI
from pulsar_api.web.legacy.sockjs import SockJS
from pulsar_api.web.pages import Pages
from pulsar_api.web.signin import SignIn
from tests.integration import zygote
from tests.integration.daemon import (
    PULSAR_API,
    Answer,
    Daemon,
    next_answer,
    problem,
    wait_for,
)
from tests.integration.sockjs import SOCKJS, ByPolling, ByStreaming, Transport

PAGE = Path(__file__).parents[2] / "docs" / "access.rst"
FORM = "application/x-www-form-urlencoded"

ROLES = {
    "nobody": None,
    "wrong": None,
    "read": "read",
    "run": "run",
    "kill": "kill",
    "admin": "admin",
    "other": "admin",  # of another app
}
HAS = {
    "read": {"read"},
    "run": {"read", "run"},
    "kill": {"read", "kill"},
    "admin": {"read", "run", "kill", "admin"},
}


APIS = (
    *(TaskAPI, CreateAPI, FollowAPI, PartsAPI, TargetAPI),
    *(JobAPI, SockJS, Pages, SignIn),
)


def routes() -> dict[str, str]:
    """Return each method and path in the code, and the right that it needs."""
    found = {}
    for api in APIS:
        for rule in api.app.url_map.iter_rules():
            handler = api.app.endpoints[rule.endpoint]
            path = re.sub(r"<(?:\w+:)?(\w+)>", r":\1", rule.rule)
            for method in sorted((rule.methods or set()) - {"HEAD", "OPTIONS"}):
                right = getattr(handler, "right", None)
                found[f"{method} {path}"] = "-" if right is None else str(right)
    return found


def table() -> dict[str, str]:
    """Return each method and path in the docs, and the right that it needs."""
    rows = re.findall(r"^   \* - ``(.*?)``\n     - (\S+)", PAGE.read_text(), re.MULTILINE)
    return dict(rows)


TABLE = table()
GUARDED = {route: right for route, right in TABLE.items() if right in list(Right)}


def test_docs_list_every_route_with_its_right() -> None:
    """``python -m tests.integration.test_access`` prints the table for the docs."""
    rest = {route for route, right in TABLE.items() if right in {"-", "socket"}}
    assert {**TABLE, **dict.fromkeys(rest, "-")} == routes()


# -- a daemon that knows a token for each role


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator["World"]:
    """Return a daemon with tasks of two apps, and a caller of each role."""
    folder = tmp_path_factory.mktemp("access")
    for app in ("site", "other"):
        actions = folder / "repo" / "apps" / app
        actions.mkdir(parents=True)
        for name, code in (("deploy", 0), ("fail", 1)):
            (actions / name).write_text(f"#!/bin/sh\necho of {app}\nexit {code}\n")
            (actions / name).chmod(0o755)
    daemon = Daemon(
        folder,
        *("--auth-provider", "tokens", "--command", "scripts"),
        *("--config-repo", str(folder / "repo")),
    )
    try:
        yield World(daemon)
    finally:
        daemon.stop()


class World:
    """The daemon, its tokens and sessions, and a new address for each wrong credential."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.addresses = 0
        self.tokens = {"wrong": "pulsar_" + "x" * 43}
        for role, right in ROLES.items():
            if right is not None:
                app = "other" if role == "other" else "site"
                self.tokens[role] = self.token(role, right, app)
        self.sessions = {
            role: self.sign_in(token)
            for role, token in self.tokens.items()
            if role != "wrong"
        }
        self.sessions["wrong"] = "pulsar=" + "x" * 43
        self.daemon.headers = self.bearer("admin")
        self.failed = daemon.run("site", "production", "fail")
        daemon.ended(self.failed)
        self.daemon.headers = self.bearer("other")
        self.foreign = daemon.run("other", "production", "fail")
        daemon.ended(self.foreign)
        self.daemon.headers = {}

    def token(self, name: str, right: str, app: str) -> str:
        """Return a new token."""
        made = zygote.run(
            [
                *(*PULSAR_API, "token", "create", name),
                *("--may", right, "--on", app, "--state-dir", str(self.daemon.state)),
            ],
            check=True,
            capture_output=True,
            text=True,
        )
        text: str = made.stdout.strip()
        return text

    def bearer(self, role: str) -> dict[str, str]:
        """Return the header with the token of a role."""
        return {"Authorization": f"Bearer {self.tokens[role]}"}

    def sign_in(self, token: str) -> str:
        """Return the cookie of a new session."""
        answer = self.daemon.request(
            *("POST", "/login", f"user=&password={token}", {"Content-Type": FORM})
        )
        assert answer.status == 303
        cookie: str = answer.headers["Set-Cookie"].partition(";")[0]
        return cookie

    def address(self) -> str:
        """Return an address from which no wrong credential came."""
        self.addresses += 1
        return f"127.1.{self.addresses >> 8}.{self.addresses & 255}"

    def shown(self, role: str, means: str) -> dict[str, str]:
        """Return the headers that authenticate a role in a given way."""
        if role == "nobody":
            return {}
        token = self.tokens[role]
        if means == "session":
            return {"Cookie": self.sessions[role]}
        if means == "bearer":
            return self.bearer(role)
        pair = {"0.6": f"{token}:x-oauth-basic", "basic": f"somebody:{token}"}[means]
        return {"Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}

    def head(self, method: str, path: str, headers: dict[str, str]) -> Answer:
        """Return an answer. Of an endless stream it has only the head."""
        connection = self.daemon.connect(source=self.address())
        try:
            body = None
            if method == "POST":
                body = json.dumps({"action": "deploy"})
                headers = {**headers, "Content-Type": "application/json"}
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            if path == "/events" and response.status == 200:
                response.length = 0
                response.chunked = False
            return Answer(response)
        finally:
            connection.close()


def path_of(route: str, number: int, app: str) -> tuple[str, str]:
    """Return a method, and a path that matches the route."""
    method, _, path = route.partition(" ")
    path = path.replace(":number", str(number)).replace(":app", app)
    path = path.replace(":env", "production")
    query = "?timeout=0" if path == "/tasks/created" else ""
    if path.endswith("/search"):
        query = "?text=echo"
    return method, path + query


@pytest.mark.parametrize("means", ["bearer", "0.6", "basic", "session"])
@pytest.mark.parametrize("role", list(ROLES))
@pytest.mark.parametrize("route", list(GUARDED))
def test_route_allows_the_roles_of_the_table(
    world: World, route: str, role: str, means: str
) -> None:
    """Unknown callers get 401, and callers without the right 403."""
    right = GUARDED[route]
    method, path = path_of(route, world.failed, "site")
    answer = world.head(method, path, world.shown(role, means))
    link = (method, right, means) == ("GET", "kill", "session") and role != "nobody"
    if role in {"nobody", "wrong"} and not link:
        assert problem(answer, 401)["type"].endswith(":not-authenticated")
        assert "WWW-Authenticate" in answer.headers
    elif ":" not in route:
        # Every caller gets lists, with only the tasks that they may read.
        assert answer.status == 200
        assert (b"of site" in answer.body) == (route in LISTS and role != "other")
    elif link:
        # A link can come from another site, so a session has to use POST.
        assert problem(answer, 403)["type"].endswith(":foreign-origin")
    elif role == "other" or right not in HAS[role]:
        assert problem(answer, 403)["type"].endswith(":not-allowed")
        assert b"of site" not in answer.body
    else:
        assert answer.status == 200


LISTS = {"GET /tasks", "GET /jobs"}


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("route", [r for r in GUARDED if r.startswith("GET")])
def test_head_refuses_callers_as_get_does(world: World, route: str, method: str) -> None:
    """They answer 401 without a credential, and 403 without the right."""
    _, path = path_of(route, world.failed, "site")
    assert world.head(method, path, {}).status == 401
    expected = 403 if ":" in route else 200
    assert world.head(method, path, world.bearer("other")).status == expected


@pytest.mark.parametrize("role", [role for role in ROLES if ROLES[role]])
@pytest.mark.parametrize("transport", SOCKJS)
@pytest.mark.parametrize("how", ["request", "token", "cookie"])
def test_socket_sends_only_readable_tasks(
    world: World, transport: type[Transport], role: str, how: str
) -> None:
    """The request carries the credential, or the first message does."""
    message: dict[str, str] | None = None
    headers = {}
    if how == "request":
        headers = world.shown(role, "session")
    elif how == "token":
        message = {"token": world.tokens[role]}
    else:
        message = {"cookie": world.sessions[role]}
    with transport(world.daemon, headers) as socket:
        if message is not None:
            socket.say(json.dumps(message))
        socket.settled(world.daemon, world.bearer("admin"), world.bearer("other"))
        app = "other" if role == "other" else "site"
        hidden = "site" if role == "other" else "other"
        new = {}
        for name in (hidden, app):  # the hidden task comes first
            shown = world.bearer("other" if name == "other" else "admin")
            world.daemon.headers = shown
            new[name] = world.daemon.run(name, "production", "deploy")
            world.daemon.ended(new[name])
        world.daemon.headers = {}
        told = socket.until_close(new[app])
        assert new[app] in told
        assert new[hidden] not in told


@pytest.mark.parametrize("transport", SOCKJS)
@pytest.mark.parametrize("how", ["request", "token", "cookie", "nonsense"])
def test_socket_denies_unknown_callers(
    world: World, transport: type[Transport], how: str
) -> None:
    """They get the frame of release 0.6: ``c[403,"Access denied"]``."""
    headers = world.shown("wrong", "bearer") if how == "request" else {}
    said: dict[str, Any] = {"how": "are you"}
    if how != "nonsense":
        name = "cookie" if how == "cookie" else "token"
        said = {name: world.tokens["wrong"] + how}
    with transport(world.daemon, headers, world.address()) as socket:
        socket.say(json.dumps(said))
        assert socket.last() == 'c[403,"Access denied"]'


@pytest.mark.parametrize("role", ["read", "run", "kill"])
def test_lists_hide_tasks_of_other_apps(world: World, role: str) -> None:
    """Queries, and the wait for a new task, hide them as well."""
    headers = world.bearer(role)
    for path in (
        "/tasks?limit=1000",
        "/tasks?app=other",
        "/tasks?text=other",
        f"/tasks?before={world.foreign + 1}&limit=1",
        "/jobs?pageSize=1000",
        f"/tasks/created?since={world.foreign - 1}&timeout=0",
    ):
        assert b"of other" not in world.daemon.get(path, **headers).body


def test_link_on_another_site_can_only_read(world: World) -> None:
    """A browser sends its session along. The daemon refuses all requests but navigation."""
    cookie = {"Cookie": world.sessions["admin"], "Sec-Fetch-Site": "cross-site"}
    navigate = {**cookie, "Sec-Fetch-Mode": "navigate"}
    task = f"/task/{world.failed}"
    assert world.daemon.request("GET", task, headers=navigate).status == 200
    for method, path, headers in (
        ("GET", task, {**cookie, "Sec-Fetch-Mode": "cors"}),
        ("GET", f"{task}/kill", navigate),
        ("POST", f"{task}/kill", navigate),
        ("POST", "/site/production?action=deploy", navigate),
        ("POST", f"/job/{world.failed}/restart", navigate),
        ("GET", f"{task}/events", {**cookie, "Sec-Fetch-Mode": "cors"}),
        ("GET", "/events", {**cookie, "Sec-Fetch-Mode": "cors"}),
        ("POST", "/websocket/000/abc/xhr", navigate),
        ("POST", "/logout", navigate),
        ("POST", "/login", navigate),
    ):
        answer = world.daemon.request(method, path, headers=headers)
        assert problem(answer, 403)["type"].endswith(":foreign-origin"), path


@pytest.mark.parametrize("route", list(TABLE))
def test_unknown_host_is_refused_on_every_route(world: World, route: str) -> None:
    """Another site can make its own name resolve to the daemon (DNS rebinding)."""
    method, path = path_of(route, world.failed, "site")
    path = path.replace(":server", "000").replace(":name", "abcdefgh")
    for host in (
        "evil.example",
        f"evil.example:{world.daemon.port}",
        "localhost.evil.example",
    ):
        headers = {"Host": host, **world.bearer("admin")}
        answer = world.daemon.request(method, quote(path, "/?="), headers=headers)
        assert problem(answer, 421)["type"].endswith(":unknown-host")


def test_refusal_hides_the_target_of_a_task(world: World) -> None:
    """Callers who may read the task learn which right they lack."""
    for path in ("", "/log", "/events", "/kill", "/output", "/lines", "/pieces", "/search"):
        answer = world.daemon.get(f"/task/{world.foreign}{path}", **world.bearer("kill"))
        assert b"other" not in problem_text(answer)
        assert f"task {world.foreign}".encode() in problem_text(answer)
    answer = world.daemon.get(f"/task/{world.failed}/kill", **world.bearer("read"))
    assert b"site/production/fail" in problem_text(answer)


def problem_text(answer: Answer) -> bytes:
    """Return the body of a 403."""
    problem(answer, 403)
    return answer.body


WAYS = ["basic", "bearer", "session", "token", "cookie", "junk"]
"""How the owner of a session authenticates: by each request, or by a message. With "junk"
the requests carry a credential that anybody could send."""
JUNK = {"Authorization": "Bearer anything"}


def opened(world: World, transport: type[Transport], how: str) -> ByPolling:
    """Open a session by HTTP with the right to read the tasks of one app."""
    headers = JUNK if how == "junk" else {}
    if how in {"basic", "bearer", "session"}:
        headers = world.shown("read", how)
    session = transport(world.daemon, headers)
    assert isinstance(session, ByPolling)
    if how in {"token", "junk"}:
        session.say(json.dumps({"token": world.tokens["read"]}))
    elif how == "cookie":
        session.say(json.dumps({"cookie": world.sessions["read"]}))
    session.settled(world.daemon, world.bearer("admin"), world.bearer("other"))
    return session


def strangers(world: World) -> list[dict[str, str]]:
    """Return the headers of other callers at the same address."""
    return [
        {},
        JUNK,
        world.bearer("other"),
        world.shown("other", "session"),
        {"Cookie": "pulsar-sockjs=" + "x" * 43},
        {"Cookie": "pulsar-sockjs="},
    ]


@pytest.mark.parametrize("transport", [ByPolling, ByStreaming])
@pytest.mark.parametrize("how", WAYS)
def test_sockjs_session_refuses_other_callers(
    world: World, transport: type[Transport], how: str
) -> None:
    """The name of the session is no secret: it appears in URLs, and in logs of proxies."""
    with opened(world, transport, how) as session:
        for headers in strangers(world):
            for route in ("xhr", "xhr_streaming", "xhr_send"):
                path = f"{session.path}/{route}"
                answer = world.daemon.request("POST", path, "[]", headers)
                assert answer.status == 404
                assert answer.headers["Set-Cookie"] is None
                assert b"a[" not in answer.body
                if route != "xhr_send":
                    assert answer.body == b'c[2010,"Another connection still open"]\n'
        # The requests of others took no message from it.
        world.daemon.headers = world.bearer("admin")
        number = world.daemon.run("site", "production", "deploy")
        world.daemon.headers = {}
        assert number in session.until_close(number)


@pytest.mark.parametrize("how", WAYS[:3])
def test_credential_replaces_the_cookie_of_a_sockjs_session(world: World, how: str) -> None:
    """Not every client keeps cookies."""
    with opened(world, ByPolling, how) as session:
        session.headers = world.shown("read", how)
        world.daemon.headers = world.bearer("admin")
        number = world.daemon.run("site", "production", "deploy")
        world.daemon.headers = {}
        assert number in session.until_close(number)


def test_stranger_that_polls_first_receives_nothing(
    world: World,
) -> None:
    """The owner, who authenticates later by a message, receives everything."""
    session = ByPolling(world.daemon, {})
    stranger = world.daemon.connect()
    stranger.request("POST", f"{session.path}/xhr")
    wait_for(lambda: world.daemon.has_read(stranger.sock), "the stranger to wait")
    session.say(json.dumps({"token": world.tokens["read"]}))
    answer = Answer(stranger.getresponse())
    stranger.close()
    assert answer.status == 404
    assert answer.body == b'c[2010,"Another connection still open"]\n'
    session.settled(world.daemon, world.bearer("admin"), world.bearer("other"))


def test_client_without_cookies_receives_its_whole_stream(world: World) -> None:
    """The published client keeps no cookies. The session belongs to its first request."""
    with ByStreaming(world.daemon, {}) as session:
        del session.headers["Cookie"]
        session.say(json.dumps({"token": world.tokens["read"]}))
        session.settled(world.daemon, world.bearer("admin"), world.bearer("other"))
        session.connection.close()
        # After a break it cannot prove that the session is its own, and opens another.
        wait_for(lambda: _status(session) == 404, "its end")


def _status(session: ByPolling) -> int:
    path = f"{session.path}/xhr"
    return session.daemon.request("POST", path, "", session.headers).status


def test_idempotency_keys_of_users_are_separate(world: World) -> None:
    """No user can use up the Idempotency-Key of another."""
    ids = set()
    for role, app in (("other", "other"), ("admin", "site"), ("run", "site")):
        headers = {**world.bearer(role), "Idempotency-Key": "release-1"}
        path = f"/{app}/production?action=deploy"
        for _ in range(2):
            ids.add(world.daemon.request("POST", path, None, headers).json()["id"])
    assert len(ids) == 3


@pytest.mark.parametrize("name", ["Host", "Authorization", "Cookie", "Origin", "Accept"])
def test_header_with_invalid_text_answers_400(world: World, name: str) -> None:
    """The log has no traceback."""
    with world.daemon.open_socket() as sock:
        lines = b"GET /tasks HTTP/1.1\r\nHost: localhost\r\n"
        if name == "Host":
            lines = b"GET /tasks HTTP/1.1\r\n"
        sock.sendall(lines + name.encode() + b": \xff\xfe\r\n\r\n")
        assert problem(next_answer(sock), 400)["type"].endswith(":malformed")
    assert "Traceback" not in world.daemon.log.read_text()


def test_too_long_names_answer_400(world: World) -> None:
    """Callers without rights get 400 too, as no rule is matched against such names."""
    for path in (f"/{'x' * 101}/p", f"/site/{'x' * 101}", "/site/p"):
        body = json.dumps({"action": "deploy" if "x" in path else "d" * 100_000})
        headers = {**world.bearer("other"), "Content-Type": "application/json"}
        answer = world.daemon.request("POST", path, body, headers)
        assert answer.status == 400


if __name__ == "__main__":
    for name, needed in routes().items():
        print(f"   * - ``{name}``\n     - {needed}")
