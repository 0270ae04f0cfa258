"""Sign-in of a team by GitHub: access, duration, and failures of GitHub."""

import base64
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlsplit

import pytest

from tests.integration import zygote
from tests.integration.conftest import Start
from tests.integration.daemon import PATIENCE, PULSAR_API, Answer, Daemon, problem, wait_for
from tests.integration.github import CLIENT_ID, CLIENT_SECRET, GitHubServer, github

ALICE, BOB, EVE = "ghp_alice0000000000", "gho_bob000000000000", "ghp_eve0000000000000"


@pytest.fixture
def hub() -> Iterator[GitHubServer]:
    """Return a GitHub with three users, two of them in teams of one organisation."""
    with github() as server:
        server.users = {ALICE: "Alice", BOB: "bob", EVE: "eve"}
        server.members = {
            *(("acme", "Alice"), ("acme", "bob")),
            *(("acme/ops", "Alice"), ("acme/dev", "bob")),
        }
        yield server


Team = Callable[..., Daemon]


@pytest.fixture
def team(start: Start, hub: GitHubServer, tmp_path: Path) -> Team:
    """Return a function that starts a daemon that uses that GitHub."""

    def begin(method: str, members: str, more: str = "", *options: str) -> Daemon:
        config = tmp_path / "config.toml"
        secret = tmp_path / "secret"
        secret.write_text(CLIENT_SECRET + "\n")
        config.write_text(
            f'auth-method = "{method}"\nauth-members = "{members}"\ncommand = "echo hi"\n'
            f'github-url = "{hub.url}"\ngithub-api-url = "{hub.url}"\n'
            f'github-client-id = "{CLIENT_ID}"\ngithub-client-secret-file = "{secret}"\n'
            f"{more}"
        )
        return start("--config", str(config), *options)

    return begin


def bearer(token: str) -> dict[str, str]:
    """Return the header with a token."""
    return {"Authorization": f"Bearer {token}"}


def asked(daemon: Daemon, token: str, path: str = "/login/me") -> Answer:
    """Return the answer to a request with a token."""
    return daemon.get(path, **bearer(token))


def basic(user: str, password: str) -> dict[str, str]:
    """Return the header of Basic authentication."""
    text = base64.b64encode(f"{user}:{password}".encode()).decode()
    return {"Authorization": f"Basic {text}"}


@pytest.mark.parametrize("own", [False, True], ids=["callers-token", "own-token"])
@pytest.mark.parametrize(
    ("method", "members", "let_in"),
    [
        ("user", "alice,BOB", {"Alice", "bob"}),
        ("user", "alice", {"Alice"}),
        ("org", "Acme", {"Alice", "bob"}),
        ("org", "other", set()),
        ("team", "acme/ops", {"Alice"}),
        ("team", "acme/ops,acme/dev", {"Alice", "bob"}),
        ("team", "acme/none", set()),
    ],
)
def test_method_and_members_decide_who_has_access(
    team: Team,
    hub: GitHubServer,
    tmp_path: Path,
    method: str,
    members: str,
    let_in: set[str],
    own: bool,  # noqa: FBT001
) -> None:
    """The daemon asks with the caller's token, or with one of its own."""
    more = ""
    if own:
        hub.own = ("robot", "ghp_robot0000000000")
        (tmp_path / "password").write_text(hub.own[1])
        more = f'auth-username = "robot"\nauth-password-file = "{tmp_path}/password"\n'
    daemon = team(method, members, more)
    for token, login in hub.users.items():
        answer = asked(daemon, token)
        if login in let_in:
            assert answer.json()["user"] == login
            task = daemon.request("POST", "/site/p?action=x", headers=bearer(token)).json()
            shown = asked(daemon, token, f"/task/{task['id']}").json()
            assert shown["user"] == login
        else:
            problem(answer, 401)
    assert hub.own is None or hub.own[1] not in daemon.log.read_text()


def test_invited_user_who_has_not_accepted_is_refused(
    team: Team, hub: GitHubServer
) -> None:
    """GitHub reports such a membership as pending."""
    hub.members.discard(("acme/ops", "Alice"))
    hub.pending.add(("acme/ops", "Alice"))
    problem(asked(team("team", "acme/ops"), ALICE), 401)


def test_token_is_accepted_as_bearer_or_in_basic(team: Team) -> None:
    """Release 0.6 and git use Basic. A user name in it must be that of the token."""
    daemon = team("user", "alice")
    for headers in (
        bearer(ALICE),
        {"Authorization": f"bearer  {ALICE} "},
        basic(ALICE, "x-oauth-basic"),
        basic(ALICE, ""),
        basic("alice", ALICE),
    ):
        assert daemon.get("/login/me", **headers).json()["user"] == "Alice"
    for number, header in enumerate(
        [
            basic("bob", ALICE)["Authorization"],
            basic("alice", "x-oauth-basic")["Authorization"],
            f"Bearer {ALICE}x",
            f"Token {ALICE}",
            "Bearer",
            "Basic !!!",
            f"Basic {base64.b64encode(b'no colon').decode()}",
            f"Basic {base64.b64encode(bytes([255, 58, 255])).decode()}",
            "Bearer " + "x" * 5000,
            "x",
        ]
    ):
        answer = daemon.request(
            "GET", "/tasks", None, {"Authorization": header}, f"127.2.0.{number + 1}"
        )
        problem(answer, 401)


def test_rules_give_rights_to_organisation_team_and_user(team: Team) -> None:
    """The organisation may read, one of its teams may run, and a user may kill."""
    daemon = team(
        "org",
        "acme",
        '[[rights]]\nwho = ["org:ACME"]\nmay = ["read"]\n'
        '[[rights]]\nwho = "team:acme/ops"\nmay = ["run"]\non = ["site/p*"]\n'
        '[[rights]]\nwho = ["user:Bob"]\nmay = ["kill"]\non = ["site"]\n',
    )
    for token, path, status in (
        (ALICE, "/site/production", 200),
        (ALICE, "/site/staging", 403),
        (BOB, "/site/production", 403),
    ):
        answer = daemon.request("POST", f"{path}?action=x", headers=bearer(token))
        assert answer.status == status, (token, path)
    for token, path, status in (
        (ALICE, "/task/1", 200),
        (BOB, "/task/1", 200),
        (ALICE, "/task/1/kill", 403),
        (BOB, "/task/1/kill", 200),
    ):
        assert asked(daemon, token, path).status == status, (token, path)


# -- a login is bound to its first account with access


def operator(daemon: Daemon, *command: str) -> str:
    """Return the output of a command for operators."""
    state = ("--state-dir", str(daemon.state))
    done = zygote.run(
        [*PULSAR_API, *command, *state], check=True, capture_output=True, text=True
    )
    text: str = done.stdout
    return text


def restarted(daemon: Daemon) -> None:
    """Restart the daemon, so that no answer of GitHub is cached."""
    daemon.process.terminate()
    daemon.process.wait()
    daemon.start()


def test_login_taken_by_another_account_is_refused(team: Team, hub: GitHubServer) -> None:
    """An operator can bind it again. The audit log has each step."""
    daemon = team("user", "alice")
    hub.ids["alice"] = 7
    assert asked(daemon, ALICE).json()["user"] == "Alice"
    hub.users = {EVE: "Alice"}
    hub.ids["alice"] = 99
    for _ in range(2):
        refused = asked(daemon, EVE)
        problem(refused, 403)
        assert refused.json()["type"].endswith("login-bound")
        assert "pulsar-api login rebind Alice 99" in refused.json()["detail"]
        restarted(daemon)
    assert operator(daemon, "login", "list").split()[:2] == ["alice", "7"]
    operator(daemon, "login", "rebind", "ALICE", "99")
    assert asked(daemon, EVE).json()["user"] == "Alice"
    lines = operator(daemon, "audit", "--json").splitlines()
    entries = [json.loads(line) for line in lines]
    assert [
        (one["principal"], one["what"], one["allowed"])
        for one in entries
        if one["what"] in {"login bind", "sign-in"}
    ] == [
        ("github:7", "login bind", True),
        *[("github:99", "sign-in", False)] * 2,
    ]
    rebound = next(one for one in entries if one["what"] == "login rebind")
    assert (rebound["login"], rebound["id"], rebound["before"]) == ("alice", "99", "7")


def test_renamed_user_keeps_rights_and_keys(team: Team, hub: GitHubServer) -> None:
    """The rules still name the old login."""
    daemon = team(
        "org", "acme", '[[rights]]\nwho = "user:alice"\nmay = ["run"]\non = ["site"]\n'
    )
    hub.ids["alice"] = 7

    def run(token: str) -> Answer:
        headers = {**bearer(token), "Idempotency-Key": "one"}
        return daemon.request("POST", "/site/p?action=x", headers=headers)

    first = run(ALICE).json()["id"]
    hub.users[ALICE] = "alicia"
    hub.ids["alicia"] = 7
    hub.members.add(("acme", "alicia"))
    restarted(daemon)
    assert asked(daemon, ALICE).json()["user"] == "alicia"
    assert run(ALICE).json()["id"] == first


@pytest.mark.parametrize(("method", "members"), [("org", "acme"), ("team", "acme/ops")])
def test_only_members_bind_a_login(
    team: Team, hub: GitHubServer, method: str, members: str
) -> None:
    """The account of a refused user is not bound, so it reserves no login."""
    rule = '[[rights]]\nwho = "user:alice"\nmay = ["run"]\n'
    daemon = team(method, members, rule)
    hub.ids["alice"] = 5
    there = set(hub.members)
    hub.members.clear()
    problem(asked(daemon, ALICE), 401)
    assert operator(daemon, "login", "list") == ""
    hub.members |= there
    hub.ids["alice"] = 7
    restarted(daemon)
    assert asked(daemon, ALICE).status == 200
    hub.ids["alice"] = 99
    restarted(daemon)
    assert asked(daemon, ALICE).json()["type"].endswith("login-bound")


# -- GitHub is away or slow, or another server answers


NONSENSE: list[tuple[int, bytes, dict[str, str]]] = [
    (500, b"{}", {}),
    (502, b"<html>Unicorn", {}),
    (503, b"", {}),
    (200, b"", {}),
    (200, b"<html>welcome", {}),
    (200, b"[]", {}),
    (200, b'{"login": null, "id": 7}', {}),
    (200, b'{"login": "Alice"}', {}),
    (200, b'{"login": "Alice", "id": true}', {}),
    (200, b'{"login": "Alice", "id": -7}', {}),
    (200, b'{"login": "../../user"}', {}),
    (200, b'{"login": "' + b"x" * (2 << 20) + b'"}', {}),
    (200, b"[" * 100_000, {}),
    (200, b'{"log', {"Content-Length": "100"}),
    (301, b"", {"Location": "https://evil.example/user"}),
    (404, b'{"message": "Not Found"}', {}),
    (403, b"blocked", {}),
]


@pytest.mark.parametrize(
    "answer", NONSENSE, ids=[f"{a[0]}-{a[1][:12]!r}" for a in NONSENSE]
)
def test_invalid_github_response_answers_503(
    team: Team, hub: GitHubServer, answer: tuple[int, bytes, dict[str, str]]
) -> None:
    """As soon as GitHub answers correctly, users have access again."""
    daemon = team("user", "alice")
    hub.answer = answer
    began = time.monotonic()
    found = problem(asked(daemon, ALICE), 503)
    assert found["type"].endswith(":provider-unavailable")
    print(f"503 after {time.monotonic() - began:.3f} s")
    hub.answer = None
    assert asked(daemon, ALICE).status == 200
    assert "Traceback" not in daemon.log.read_text()


def test_slow_github_delays_only_unknown_users(team: Team, hub: GitHubServer) -> None:
    """They get 503 before GitHub answers after 30 s. Others are not delayed."""
    daemon = team("user", "alice,bob,eve")
    assert asked(daemon, ALICE).status == 200
    hub.slow = {EVE: 30.0}
    answers: list[tuple[float, Answer]] = []

    def ask() -> None:
        began = time.monotonic()
        answer = asked(daemon, EVE)
        answers.append((time.monotonic() - began, answer))

    waiting = threading.Thread(target=ask)
    waiting.start()
    wait_for(lambda: ("GET", "/user") in hub.asked[1:], "the question about eve")
    assert asked(daemon, BOB).status == 200
    assert asked(daemon, ALICE).status == 200
    assert not answers
    waiting.join()
    seconds, answer = answers[0]
    problem(answer, 503)
    print(f"503 after {seconds:.2f} s")
    assert seconds < 25
    assert answer.headers["Retry-After"].isdigit()


def test_cached_user_has_access_without_github(start: Start, tmp_path: Path) -> None:
    """Other users get 503."""
    config = tmp_path / "config.toml"
    with github() as hub:
        hub.users = {ALICE: "Alice", BOB: "bob"}
        config.write_text(
            f'github-api-url = "{hub.url}"\nauth-members = ["alice", "bob"]\n'
        )
        daemon = start("--config", str(config), "--command", "echo hi")
        assert asked(daemon, ALICE).status == 200
    problem(asked(daemon, BOB), 503)
    assert asked(daemon, ALICE).status == 200


def test_github_rate_limit_is_honoured(team: Team, hub: GitHubServer) -> None:
    """The daemon sends no request with that token until the limit ends. Others work."""
    daemon = team("user", "alice,bob,eve")
    reset = str(int(time.time()) + 600)
    hub.limited = {
        EVE: {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": reset},
        BOB: {"Retry-After": "30"},
    }
    first = asked(daemon, EVE)
    problem(first, 503)
    assert 590 <= int(first.headers["Retry-After"]) <= 600
    before = len(hub.asked)
    problem(asked(daemon, EVE), 503)
    assert len(hub.asked) == before
    assert 0 < int(asked(daemon, BOB).headers["Retry-After"]) <= 30
    assert asked(daemon, ALICE).status == 200


def test_github_answers_are_cached(team: Team, hub: GitHubServer) -> None:
    """Many requests with one token, valid or not, cause one request to GitHub."""
    daemon = team("user", "alice")
    for _ in range(50):
        assert asked(daemon, ALICE).status == 200
    assert hub.asked.count(("GET", "/user")) == 1
    problem(asked(daemon, BOB), 401)
    problem(asked(daemon, BOB), 401)
    assert hub.asked.count(("GET", "/user")) == 2


def test_concurrent_requests_share_one_github_request(
    team: Team, hub: GitHubServer
) -> None:
    """If the first client disconnects, the others still get the answer."""
    daemon = team("user", "alice")
    hub.slow = {"": 0.5}
    polls = []
    for _ in range(20):
        connection = daemon.connect()
        connection.request("GET", "/login/me", headers=bearer(ALICE))
        polls.append(connection)
    wait_for(lambda: hub.asked, "the question")
    polls.pop(0).close()
    assert {c.getresponse().status for c in polls} == {200}
    for connection in polls:
        connection.close()
    assert hub.asked.count(("GET", "/user")) == 1


def test_password_is_never_sent_to_github(team: Team, hub: GitHubServer) -> None:
    """The daemon does not send its own tokens either."""
    daemon = team("user", "alice")
    for secret in ("hunter2!", "correct horse battery staple", "pulsar_" + "x" * 43):
        problem(daemon.get("/login/me", **basic("alice", secret)), 401)
    assert hub.asked == []


# -- in a browser, by OAuth


def redirected(answer: Answer) -> str:
    """Return the target of a redirect."""
    assert answer.status in {302, 303}, answer.body
    location: str = answer.headers["Location"]
    return location


def cookies(answer: Answer) -> dict[str, str]:
    """Return the cookies that an answer sets."""
    lines = answer.headers.get_all("Set-Cookie") or []
    return dict(line.partition(";")[0].split("=", 1) for line in lines)


def from_hub(url: str) -> str:
    """Return path and query to which GitHub redirects the browser."""
    parts = urlsplit(url)
    connection = HTTPConnection(parts.netloc)
    connection.request("GET", f"{parts.path}?{parts.query}")
    back = urlsplit(connection.getresponse().headers["Location"])
    connection.close()
    return f"{back.path}?{back.query}"


def signing_in(daemon: Daemon, hub: GitHubServer, target: str = "") -> tuple[str, str]:
    """Begin to sign in. Return the browser's cookie, and the path GitHub redirects to."""
    begun = daemon.get(f"/login/github?next={target}")
    url = redirected(begun)
    assert url.startswith(f"{hub.url}/login/oauth/authorize?")
    return cookies(begun)["pulsar-login"], from_hub(url)


def test_browser_signs_in_by_oauth(team: Team, hub: GitHubServer) -> None:
    """State and PKCE protect the sign-in. No secret is in a URL."""
    daemon = team("team", "acme/ops")
    hub.signed_in = ALICE
    assert redirected(daemon.get("/web/")).startswith("/login?next=")
    begun = redirected(daemon.get("/login/github"))
    assert dict(parse_qsl(urlsplit(begun).query))["scope"] == "read:org"
    browser, back = signing_in(daemon, hub, "/web/job/1")
    answer = daemon.get(back, Cookie=f"pulsar-login={browser}")
    assert redirected(answer) == "/web/job/1"
    session = cookies(answer)["pulsar"]
    me = daemon.get("/login/me", Cookie=f"pulsar={session}").json()
    assert (me["user"], me["means"]) == ("Alice", "github session")
    for url in hub.urls:
        assert CLIENT_SECRET not in url
        assert ALICE not in url
    # Code and state are valid once.
    again = daemon.get(back, Cookie=f"pulsar-login={browser}")
    assert again.status == 403
    assert "pulsar" not in cookies(again)


def test_sign_in_begun_by_another_browser_is_refused(team: Team, hub: GitHubServer) -> None:
    """Otherwise an attacker could sign a user in to the attacker's account."""
    daemon = team("user", "alice")
    hub.signed_in = ALICE
    browser, back = signing_in(daemon, hub)
    other, _ = signing_in(daemon, hub)
    assert browser != other
    for cookie in ({"Cookie": f"pulsar-login={other}"}, {}):
        answer = daemon.get(back, **cookie)
        assert answer.status == 403
        assert "pulsar" not in cookies(answer)
    state = dict(parse_qsl(urlsplit(back).query))["state"]
    forged = daemon.get(
        f"/login/callback?code=x&state={state}x", Cookie=f"pulsar-login={other}"
    )
    assert forged.status == 403


def test_only_members_get_a_session(team: Team, hub: GitHubServer) -> None:
    """Users without membership, or who decline, get 403. If GitHub fails, it is 503."""
    daemon = team("team", "acme/ops")
    for signed_in, ill, status in (
        (BOB, None, 403),
        (None, None, 403),
        (ALICE, (500, b"", {}), 503),
    ):
        hub.signed_in = signed_in
        browser, back = signing_in(daemon, hub)
        hub.answer = ill
        answer = daemon.get(back, Cookie=f"pulsar-login={browser}")
        assert answer.status == status
        assert "pulsar" not in cookies(answer)


@pytest.mark.parametrize(
    "target",
    [
        "https://evil.example",
        "//evil.example",
        "/\\evil.example",
        "\\\\evil.example",
        "/%09/evil.example",
        "javascript:alert(1)",
        "/web\r\nX: y",
        "",
        "x",
    ],
)
def test_sign_in_never_redirects_to_another_site(
    team: Team, hub: GitHubServer, target: str
) -> None:
    """The value of ``next`` can be anything."""
    daemon = team("user", "alice")
    hub.signed_in = ALICE
    browser, back = signing_in(daemon, hub, quote(target, safe=""))
    answer = daemon.get(back, Cookie=f"pulsar-login={browser}")
    assert redirected(answer) in {"/web/", "/%09/evil.example"}
    assert answer.headers["X"] is None


def test_signing_out_everywhere_works_without_github(team: Team, hub: GitHubServer) -> None:
    """A user who has lost a phone can end its session at any time."""
    daemon = team("user", "alice")
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    sessions = [
        cookies(daemon.request("POST", "/login", f"password={ALICE}", form))["pulsar"]
        for _ in range(2)
    ]
    hub.answer = (500, b"", {})
    daemon.process.terminate()
    daemon.process.wait()
    daemon.start()  # it has no cached answers
    problem(daemon.get("/login/me", Cookie=f"pulsar={sessions[0]}"), 503)
    path = "/logout?everywhere=1"
    daemon.request("POST", path, None, {"Cookie": f"pulsar={sessions[0]}"})
    hub.answer = None
    for session in sessions:
        problem(daemon.get("/login/me", Cookie=f"pulsar={session}"), 401)


def test_stranger_causes_few_github_requests(
    team: Team, hub: GitHubServer, tmp_path: Path
) -> None:
    """Answers to the daemon's own requests are cached by login, in any case of letters."""
    hub.own = ("robot", "ghp_robot0000000000")
    (tmp_path / "password").write_text(hub.own[1])
    rules = "".join(
        f'[[rights]]\nwho = "team:acme/t{n}"\nmay = ["read"]\n' for n in range(10)
    )
    own = f'auth-username = "robot"\nauth-password-file = "{tmp_path}/password"\n'
    daemon = team("org", "acme", own + rules)
    for user in ("eve", "Eve", "eVe"):
        problem(daemon.get("/login/me", **basic(user, EVE)), 401)
    assert [path for _, path in hub.asked if path != "/user"] == ["/orgs/acme/members/eve"]


def test_failed_github_request_cancels_the_others(team: Team, hub: GitHubServer) -> None:
    """No connection to GitHub stays open after the answer."""
    daemon = team("team", "acme/ops,acme/dev", '[[rights]]\nwho = "*"\nmay = ["read"]\n')
    hub.broken_group = "acme/ops"
    hub.slow_group = "acme/dev"
    problem(asked(daemon, ALICE), 503)
    folder = Path(f"/proc/{daemon.process.pid}/fd")

    def sockets() -> int:
        return sum(
            os.readlink(fd).startswith("socket:")
            for fd in folder.iterdir()
            if fd.is_symlink()
        )

    few = sockets()
    for number in range(5):
        hub.users[f"ghp_more{number}0000000"] = "Alice"
        problem(asked(daemon, f"ghp_more{number}0000000"), 503)
    wait_for(lambda: sockets() <= few + 1, "the connections to end")


def test_github_cookies_are_ignored(team: Team, hub: GitHubServer) -> None:
    """Otherwise one user's cookie would be sent with another user's token."""
    daemon = team("user", "alice,bob")
    hub.cookie = "session=alice"
    assert asked(daemon, ALICE).status == 200
    assert asked(daemon, BOB).status == 200
    assert hub.cookies == []


def test_command_line_waits_for_github(team: Team, hub: GitHubServer) -> None:
    """It repeats the request, as after any other failure of the daemon."""
    daemon = team("user", "alice")
    hub.answer = (502, b"", {})
    with zygote.Popen(
        [*PULSAR_API, "tasks", "--json", "--url", daemon.base],
        env={**os.environ, "PULSAR_API_TOKEN": ALICE},
        stdout=subprocess.PIPE,
    ) as asking:
        wait_for(lambda: hub.asked, "the question")
        hub.answer = None
        assert asking.wait(PATIENCE) == 0
