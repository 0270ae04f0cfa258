"""A real browser signs in and out, and opens pages of other sites that attack."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from selenium.common.exceptions import WebDriverException
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from tests.integration.browser import chromium
from tests.integration.conftest import Start
from tests.integration.daemon import PATIENCE, Daemon
from tests.integration.github import CLIENT_ID, CLIENT_SECRET, github

PASSWORD = "correct horse"


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    """Return a browser that resolves a name of an attacker to this machine."""
    with chromium("--host-resolver-rules=MAP evil.example 127.0.0.1") as driver:
        yield driver


@pytest.fixture
def daemon(start: Start, tmp_path: Path) -> Daemon:
    """Return a daemon with one user."""
    (tmp_path / "password").write_text(PASSWORD)
    return start(
        *("--auth-provider", "static", "--auth-username", "joe"),
        *("--auth-password-file", str(tmp_path / "password"), "--command", "sleep 600"),
    )


def until(browser: Chrome, path: str) -> None:
    """Wait until the browser is at a path."""
    WebDriverWait(browser, PATIENCE).until(lambda b: urlsplit(b.current_url).path == path)


def text(browser: Chrome) -> str:
    """Return the text of the page."""
    found: str = browser.find_element(By.TAG_NAME, "body").text
    return found


def forget(browser: Chrome) -> None:
    """Remove all cookies of the browser, of every host."""
    browser.execute_cdp_cmd("Network.clearBrowserCookies", {})


def user(browser: Chrome) -> object:
    """Return the user of the session in which the page is open."""
    return browser.execute_async_script(
        "fetch('/login/me').then((r) => r.json()).then((me) => arguments[0](me.user))"
    )


SIGN_OUT = """
const form = document.createElement('form');
form.method = 'post';
form.action = '/logout';
document.body.append(form);
form.submit();
"""


def sign_in(browser: Chrome, daemon: Daemon) -> None:
    """Sign in by the form, which a protected page redirects to."""
    forget(browser)
    browser.get(f"{daemon.base}/pulsar/index.html")
    until(browser, "/login")
    browser.find_element(By.NAME, "user").send_keys("joe")
    browser.find_element(By.NAME, "password").send_keys(PASSWORD)
    browser.find_element(By.CSS_SELECTOR, "form button").click()
    until(browser, "/pulsar/index.html")


def test_user_signs_in_and_out(browser: Chrome, daemon: Daemon) -> None:
    """Sign-in leads back to the page. No script can read the cookie."""
    sign_in(browser, daemon)
    assert user(browser) == "joe"
    assert browser.execute_script("return document.cookie") == ""
    cookie = browser.get_cookie("pulsar")
    assert cookie is not None
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Lax")
    browser.execute_script(SIGN_OUT)
    until(browser, "/login")
    browser.get(f"{daemon.base}/tasks")
    assert "not-authenticated" in text(browser)


def test_cookie_over_tls_is_secure_and_host_only(
    browser: Chrome, start: Start, tmp_path: Path
) -> None:
    """Browsers enforce both because of the prefix ``__Host-``."""
    (tmp_path / "password").write_text(PASSWORD)
    daemon = start(
        *("--dev", "--port", "0", "--auth-provider", "static", "--auth-username", "joe"),
        *("--auth-password-file", str(tmp_path / "password"), "--command", "true"),
    )
    sign_in(browser, daemon)
    cookie = browser.get_cookie("__Host-pulsar")
    assert cookie is not None
    assert (cookie["secure"], cookie["httpOnly"]) == (True, True)


def test_wrong_password_shows_the_form_again(browser: Chrome, daemon: Daemon) -> None:
    """The form still leads to the page that the user wanted."""
    forget(browser)
    browser.get(f"{daemon.base}/web/job/7")
    until(browser, "/login")
    browser.find_element(By.NAME, "user").send_keys("joe")
    browser.find_element(By.NAME, "password").send_keys("<b>wrong")
    browser.find_element(By.CSS_SELECTOR, "form button").click()
    # While the browser replaces the page, reading its text fails in several ways.
    wait = WebDriverWait(browser, PATIENCE, ignored_exceptions=[WebDriverException])
    wait.until(lambda _: "Wrong user name" in text(browser))
    browser.find_element(By.NAME, "user").send_keys("joe")
    browser.find_element(By.NAME, "password").send_keys(PASSWORD)
    browser.find_element(By.CSS_SELECTOR, "form button").click()
    until(browser, "/web/job/7")


def test_user_signs_in_at_github(browser: Chrome, start: Start, tmp_path: Path) -> None:
    """GitHub leads back to the page that the user wanted."""
    with github() as hub:
        hub.users = {"gho_alice0000000000": "Alice"}
        hub.signed_in = "gho_alice0000000000"
        (tmp_path / "secret").write_text(CLIENT_SECRET)
        (tmp_path / "config.toml").write_text(
            f'auth-members = ["alice"]\ngithub-url = "{hub.url}"\n'
            f'github-api-url = "{hub.url}"\ngithub-client-id = "{CLIENT_ID}"\n'
            f'github-client-secret-file = "{tmp_path}/secret"\ncommand = "true"\n'
        )
        daemon = start("--config", str(tmp_path / "config.toml"))
        forget(browser)
        browser.get(f"{daemon.base}/web/job/7")
        until(browser, "/login")
        browser.find_element(By.LINK_TEXT, "Sign in with GitHub").click()
        until(browser, "/web/job/7")
        assert user(browser) == "Alice"


# -- another site

ATTACK = """<!doctype html><title>waiting</title>
<iframe name="frame"></iframe>
<form id="run" method="post" target="frame" action="{base}/site/production?action=x">
</form>
<form id="kill" method="post" target="frame" action="{base}/task/1/kill"></form>
<form id="out" method="post" target="frame" action="{base}/logout?everywhere=1"></form>
<img src="{base}/task/1/kill"><script src="{base}/task/1/kill"></script>
<iframe src="{base}/task/1/kill"></iframe>
<script>
const seen = [];
const tried = (name, promise) => promise.then(
  (value) => seen.push(`${{name}}: ${{value}}`), () => seen.push(`${{name}}: refused`));
const options = {{credentials: "include"}};
const source = (path) => new Promise((yes, no) => {{
  const events = new EventSource(`{base}${{path}}`, {{withCredentials: true}});
  events.onopen = () => yes("open");
  events.onerror = () => no();
}});
const socket = () => new Promise((yes, no) => {{
  const ws = new WebSocket(`{base}/websocket/0/evil/websocket`.replace("http", "ws"));
  ws.onmessage = (message) => yes(message.data);
  ws.onerror = () => no();
}});
const later = (form) => new Promise((yes) => {{
  document.querySelector('iframe[name=frame]').onload = () => yes("sent");
  document.getElementById(form).submit();
}});
const json = {{method: "POST", body: "{{}}",
  headers: {{"Content-Type": "application/json"}}}};
(async () => {{
  await tried("tasks", fetch("{base}/tasks", options).then((r) => r.text()));
  await tried("run", fetch("{base}/site/production?action=x", {{...options, ...json}}));
  await tried("xhr", fetch("{base}/websocket/0/evil/xhr", {{...options, method: "POST"}}));
  await tried("log", fetch("{base}/task/1/log", options).then((r) => r.text()));
  await tried("events", source("/events"));
  await tried("task", source("/task/1/events"));
  await tried("socket", socket());
  await fetch("{base}/task/1/kill", {{...options, mode: "no-cors"}}).catch(() => 0);
  await fetch("{base}/task/1/kill",
    {{...options, mode: "no-cors", method: "POST"}}).catch(() => 0);
  for (const form of ["run", "kill", "out"]) await later(form);
  window.seen = seen;
  document.title = "done";
}})();
</script>
"""


@pytest.fixture
def attack(daemon: Daemon) -> Iterator[str]:
    """Return the address of a page on another site that tries each attack."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(ATTACK.format(base=daemon.base).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://evil.example:{server.server_address[1]}/"
    server.shutdown()
    thread.join()
    server.server_close()


def test_another_site_cannot_use_the_session(
    browser: Chrome, daemon: Daemon, attack: str
) -> None:
    """It can neither start, kill, read nor sign out, by any kind of request of a page."""
    sign_in(browser, daemon)
    cookie = browser.get_cookie("pulsar")
    assert cookie is not None
    daemon.headers = {"Cookie": f"pulsar={cookie['value']}"}
    assert daemon.run("site", "production", "x") == 1
    browser.get(attack)
    WebDriverWait(browser, PATIENCE).until(lambda b: b.title == "done")
    seen = browser.execute_script("return window.seen")
    names = ("tasks", "run", "xhr", "log", "events", "task", "socket")
    assert seen == [f"{name}: refused" for name in names]
    # The session is still valid, and the one task runs on.
    assert daemon.get("/login/me").json()["user"] == "joe"
    assert list(daemon.get("/tasks").json()["tasks"]) == ["1"]
    assert daemon.task(1)["status"] == "running"
    assert daemon.task(1)["reason"] is None


def test_dns_rebinding_reaches_nothing(browser: Chrome, start: Start) -> None:
    """The daemon has no authentication, so the name alone decides."""
    daemon = start("--command", "sleep 600")
    daemon.run("site", "production", "x")
    for path in ("/tasks", "/task/1/kill", "/pulsar/index.html", "/task/1/log"):
        browser.get(f"http://evil.example:{daemon.port}{path}")
        assert "unknown-host" in text(browser)
    assert daemon.task(1)["status"] == "running"


def test_link_on_another_site_opens_the_page(
    browser: Chrome, daemon: Daemon, attack: str
) -> None:
    """Users stay signed in when they follow it, for example from a chat."""
    sign_in(browser, daemon)
    browser.get(attack)
    browser.execute_script(f"location.href = '{daemon.base}/web/job/1'")
    until(browser, "/web/job/1")
    assert user(browser) == "joe"
