"""A daemon with tasks for everything that the page can show, and the way to each view."""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from selenium.webdriver import Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from tests.integration.browser import chromium
from tests.integration.daemon import PATIENCE, Daemon, shim_of, wait_for
from tests.integration.github import CLIENT_ID, CLIENT_SECRET, github

HUGE = 200_000
"""Number of lines of the longest output."""
USERS = ("alice", "bob")

# An action prints the file beside it: "!" begins a line of stderr, "@hold" waits while the
# test holds it, "@exit" ends, "@huge" prints many lines.
ACTION = f"""#!{sys.executable} -IS
import os, sys, time
path = os.path.realpath(__file__)
stream = sys.stdout
for line in open(path + ".log", encoding="utf-8"):
    if line == "@hold\\n":
        if os.path.exists(os.path.join(os.path.dirname(path), "hold")):
            time.sleep(3600)
    elif line.startswith("@exit"):
        sys.exit(int(line.split()[1]))
    elif line == "@huge\\n":
        for n in range(1, {HUGE} + 1):
            sum = n * 2654435761 % 2**32
            print(f"row {{n:>7}}: copied to the new table, checksum {{sum:08x}}")
    else:
        before, stream = stream, sys.stderr if line.startswith("!") else sys.stdout
        if before is not stream:
            time.sleep(0.1)  # two pipes: what comes at once has no order
        stream.write(line.removeprefix("!").replace("\\\\e", "\\x1b"))
    sys.stdout.flush()
"""


def _step(clock: str, name: str, *lines: str) -> str:
    body = "".join(f"      {line}\n" for line in lines)
    return f"\\e[0;34;49m{clock}\\e[0m \\e[0;33;49m{name}\\e[0m\n{body}"


def _done(number: str, host: str, seconds: str) -> str:
    return f"\\e[0;32;49m✔ {number} deploy@{host}\\e[0m \\e[0;90;49m{seconds}\\e[0m"


_WEB = ("web1.example.com", "web2.example.com")
_RELEASE = "/srv/shop/releases/20261124081512"
_BEGIN = "".join(
    (
        _step(
            "00:00",
            "git:wrapper",
            "\\e[0;33;49m01\\e[0m \\e[1;33;49mmkdir -p /tmp\\e[0m",
            *(_done("01", host, "0.082s") for host in _WEB),
            "Uploading /tmp/git-ssh-shop-production-alice.sh \\e[32m100.0%\\e[0m",
            "\\e[0;33;49m02\\e[0m \\e[1;33;49mchmod 700 /tmp/git-ssh-shop.sh\\e[0m",
            *(_done("02", host, "0.071s") for host in _WEB),
        ),
        _step(
            "00:01",
            "git:check",
            "\\e[0;33;49m01\\e[0m \\e[1;33;49mgit ls-remote git.example.com:shop\\e[0m",
            "01 5d0ae6bb6c1b0c7b4f0b9a1d9f0a6d2c8d7e1f00\tHEAD",
            *(_done("01", host, "0.914s") for host in _WEB),
        ),
        _step(
            "00:02",
            "git:create_release",
            f"\\e[0;33;49m01\\e[0m \\e[1;33;49mmkdir -p {_RELEASE}\\e[0m",
            *(_done("01", host, "0.068s") for host in _WEB),
            "\\e[0;33;49m02\\e[0m "
            f"\\e[1;33;49mgit archive main | /usr/bin/env tar -x -f - -C {_RELEASE}\\e[0m",
            *(_done("02", host, "1.433s") for host in _WEB),
        ),
        _step(
            "00:05",
            "bundler:install",
            "\\e[0;33;49m01\\e[0m \\e[1;33;49mbundle install --jobs 4 --quiet\\e[0m",
        ),
        "!      01 warning: the gem mimemagic was yanked, 0.3.10 is used instead\n",
        "".join(f"      {_done('01', host, '18.201s')}\n" for host in _WEB),
        _step(
            "00:24",
            "deploy:assets:precompile",
            "\\e[0;33;49m01\\e[0m \\e[1;33;49mrake assets:precompile\\e[0m",
            "01 I, [08:15:38.114]  INFO -- : Writing application-7c41e0.css",
            "01 I, [08:15:41.902]  INFO -- : Writing application-0d9f3b.js",
            *(_done("01", host, "21.770s") for host in _WEB),
        ),
    )
)
_END = _step(
    "00:47",
    "deploy:symlink:release",
    f"\\e[0;33;49m01\\e[0m \\e[1;33;49mln -s {_RELEASE} /srv/shop/current\\e[0m",
    *(_done("01", host, "0.077s") for host in _WEB),
)
_MIGRATE = _step(
    "00:46",
    "deploy:migrate",
    "\\e[0;33;49m01\\e[0m \\e[1;33;49mrake db:migrate\\e[0m",
    "01 == 20261121101500 AddIndexToOrders: \\e[1mmigrating\\e[0m =================",
)
_BROKEN = """\
!      \\e[0;31;49m01 rake aborted!\\e[0m
!      \\e[0;31;49m01 PG::LockNotAvailable: ERROR: canceling statement due to timeout\\e[0m
!      01 /srv/shop/releases/20261124081512/db/migrate/20261121101500_add_index.rb:5
!      01 Tasks: TOP => db:migrate
      \\e[0;31;49m✘ 01 deploy@web1.example.com\\e[0m \\e[0;90;49m30.014s\\e[0m
!\\e[1;37;41m DEPLOY FAILED \\e[0m Refer to log/capistrano.log for details.
@exit 1
"""
_COLOURS = "".join(
    (
        *(
            f"\\e[{n}mforeground {n}\\e[0m and \\e[1;{n}mbold\\e[0m\n"
            for n in range(30, 38)
        ),
        *(
            f"\\e[{n}mforeground {n}\\e[0m and \\e[1;{n}mbold\\e[0m\n"
            for n in range(90, 98)
        ),
        *(f"\\e[{n}mbackground {n}\\e[0m, \\e[30;{n}mblack\\e[0m\n" for n in range(40, 48)),
        *(f"\\e[{n}mbackground {n}\\e[0m, \\e[97;{n}mwhite\\e[0m\n" for n in range(41, 47)),
        "\\e[1mbold\\e[0m \\e[2mdim\\e[0m \\e[3mitalic\\e[0m \\e[4munder\\e[0m\n",
        "\\e[7minverse\\e[0m \\e[9mstrike\\e[0m \\e[2;31mdim red\\e[0m\n",
        "!of stderr, \\e[2mdim\\e[0m, \\e[32mgreen\\e[0m, \\e[1mbold\\e[0m\n",
        "!\\e[43mof stderr on yellow\\e[0m \\e[7minverse\\e[0m\n@exit 3\n",
    )
)
LOGS: Mapping[str, str] = {
    "deploy": f"{_BEGIN}@hold\n{_MIGRATE}{_END}",
    "migrate": _BEGIN + _MIGRATE + _BROKEN,
    "rollback": "Back to 20261123170203 ...\n@hold\ndone\n",
    "backup": "Dumping 41 tables ...\n@hold\ndone\n",
    "import": "@huge\n",
    "test": _COLOURS,
    "clear-cache": "",
}


class Stage:
    """The daemon, the browser, and the file that holds actions."""

    def __init__(self, daemon: Daemon, driver: Chrome, hold: Path) -> None:
        self.daemon = daemon
        self.driver = driver
        self.hold = hold
        self.numbers = self._tasks()
        daemon.arguments[daemon.arguments.index("--port") + 1] = str(daemon.port)
        self.cookies: list[dict[str, object]] = []

    def _run(self, user: str, app: str, env: str, action: str, **variables: str) -> int:
        self.daemon.headers = {"Authorization": f"Bearer {token(user)}"}
        return self.daemon.run(app, env, action, **variables)

    def _until(self, number: int, status: str) -> int:
        wait_for(lambda: self.daemon.task(number)["status"] == status, status)
        return number

    def _printed(self, number: int, text: str) -> int:
        wait_for(lambda: text in self.daemon.task(number)["output"], text)
        return number

    def _tasks(self) -> dict[str, int]:
        """Create a task in each state, the most interesting last, as lists begin there."""
        run, until, printed = self._run, self._until, self._printed
        numbers = {}
        until(run("alice", "site", "staging", "deploy"), "finished")
        until(run("alice", "site", "production", "deploy", branch="main"), "finished")
        numbers["huge"] = until(run("bob", "shop", "staging", "import"), "finished")
        numbers["colours"] = until(run("bob", "site", "staging", "test"), "failed")
        numbers["empty"] = until(run("bob", "site", "staging", "clear-cache"), "finished")
        variables = {"branch": "release-41", "statement_timeout": "30s"}
        failed = run("alice", "shop", "staging", "migrate", **variables)
        numbers["failed"] = until(failed, "failed")
        until(run("alice", "shop", "staging", "deploy", branch="release-41"), "finished")
        self.hold.touch()
        killed = printed(run("bob", "shop", "production", "rollback"), "Back")
        self.daemon.post(f"/task/{killed}/kill")
        until(killed, "killed")
        lost = printed(run("alice", "site", "staging", "backup"), "Dumping")
        os.kill(shim_of(self.daemon.output_file(lost).parent), signal.SIGKILL)
        numbers["lost"] = until(lost, "lost")
        variables = {"branch": "release-41", "notify": "#deployments"}
        running = run("alice", "shop", "production", "deploy", **variables)
        numbers["running"] = printed(running, "application-0d9f3b")
        printed(run("bob", "site", "production", "deploy", branch="main"), "application")
        waiting = run("bob", "site", "production", "rollback")
        wait_for(lambda: self.daemon.task(waiting)["waitingFor"], "why it waits")
        numbers["waiting"] = waiting
        return numbers

    # -- the browser

    def look(self, width: int, *, dark: bool = False, still: bool = False) -> None:
        """Set the width of the screen, a phone if it is narrow, and the colour scheme."""
        narrow = width < 700
        screen = {
            "width": width,
            "height": 844 if narrow else 900,
            "deviceScaleFactor": 2 if narrow else 1,
            "mobile": narrow,
        }
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        features = [
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce" if still else ""},
        ]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def until(self, condition: str) -> None:
        """Wait until a JavaScript expression is true."""
        wait = WebDriverWait(self.driver, PATIENCE, poll_frequency=0.02)
        wait.until(lambda d: d.execute_script(f"return Boolean({condition})"), condition)

    def find(self, selector: str) -> WebElement:
        """Wait for a visible element and return it."""
        self.until(f"document.querySelector({selector!r})?.checkVisibility()")
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def open(self, path: str, selector: str) -> None:
        """Open a page as alice and wait for an element of it."""
        if self.daemon.process.poll() is not None:
            self.daemon.start()
        if not self.cookies:
            self.driver.get(f"{self.daemon.base}/login")
            self.find("[name=password]").send_keys(token("alice"), Keys.ENTER)
            self.find(".tasks li")
            self.cookies = self.driver.get_cookies()
        elif not self.driver.get_cookies():
            for cookie in self.cookies:
                self.driver.add_cookie(cookie)
        self.driver.get("about:blank")  # otherwise a new hash reloads nothing
        self.driver.get(self.daemon.base + path)
        self.find(selector)

    def job(self, name: str, anchor: str = "") -> None:
        """Open the page of a task."""
        self.open(f"/web/job/{self.numbers[name]}{anchor}", ".row")


def token(user: str) -> str:
    """Return the token of a user at the GitHub of the tests."""
    return f"gho_{user}00000000"


# -- the views


def _list(stage: Stage) -> None:
    stage.open("/web/", ".tasks .lost")


def _filtered(stage: Stage) -> None:
    stage.open("/web/?app=shop&status=failed", ".tasks li")


def _no_match(stage: Stage) -> None:
    stage.open("/web/?text=nothing-like-it", "main")
    stage.until("document.querySelector('main > .note').textContent.startsWith('No task')")


def _account(stage: Stage) -> None:
    _list(stage)
    stage.find("#account summary").click()
    stage.find("#account form")


def _running(stage: Stage) -> None:
    stage.job("running")


def _failed(stage: Stage) -> None:
    stage.job("failed")


def _waiting(stage: Stage) -> None:
    stage.open(f"/web/job/{stage.numbers['waiting']}", ".reason")


def _empty(stage: Stage) -> None:
    stage.open(f"/web/job/{stage.numbers['empty']}", ".status.finished")


def _missing(stage: Stage) -> None:
    stage.open("/web/job/4711", ".empty")
    stage.until("document.querySelector('.empty').textContent.includes('4711')")


def _colours(stage: Stage) -> None:
    stage.job("colours")


def _huge(stage: Stage) -> None:
    stage.job("huge")
    stage.until(f"document.querySelector('.row [data-n=\"{HUGE}\"]')")
    stage.driver.execute_script(
        "const log = document.querySelector('.log'); log.scrollTop = log.scrollHeight / 2"
    )
    stage.until(
        "Math.abs(document.querySelectorAll('.row .n')[120]?.dataset.n - 100000) < 2000 && "
        "!document.querySelector('.log.loading')"
    )


def _marked(stage: Stage) -> None:
    stage.job("failed", "#L3-L6")
    stage.find(".row.marked")
    stage.find(".find input").send_keys("deploy@", Keys.ENTER)
    stage.find(".row mark")
    next(
        b for b in stage.driver.find_elements(By.TAG_NAME, "button") if b.text == "Times"
    ).click()
    stage.find(".row .at")


def _run(stage: Stage) -> None:
    _list(stage)
    stage.find("#run").click()
    stage.find("dialog [name=app]").send_keys("shop")
    for name, text in (("env", "production"), ("action", "deploy")):
        stage.find(f"dialog [name={name}]").send_keys(text)
    stage.find("dialog fieldset > button").click()
    stage.find("dialog .key").send_keys("branch")
    stage.find("dialog .variable .value").send_keys("release-42")
    stage.find("dialog fieldset > button").click()
    keys, values = (
        stage.driver.find_elements(By.CSS_SELECTOR, f"dialog {name}")
        for name in (".key", ".variable .value")
    )
    stage.driver.find_elements(By.CSS_SELECTOR, "dialog .secret")[1].click()
    keys[1].send_keys("token")
    values[1].send_keys("glpat-0123456789")


def _review(stage: Stage) -> None:
    _run(stage)
    stage.find("dialog .primary").click()
    stage.find("dialog .sure input").send_keys("produ")


def _review_refused(stage: Stage) -> None:
    _review(stage)
    stage.find("dialog .primary").click()
    stage.find("dialog [role=alert]:not(:empty)")


def _kill(stage: Stage) -> None:
    stage.job("running")
    stage.find(".danger").click()
    stage.find("dialog.ask")


def _sign_in(stage: Stage) -> None:
    stage.driver.delete_all_cookies()
    stage.driver.get(f"{stage.daemon.base}/login")
    stage.find("form button")


def _refused(stage: Stage) -> None:
    _sign_in(stage)
    stage.find("[name=password]").send_keys("wrong", Keys.ENTER)
    stage.until("document.querySelector('[role=alert]')?.textContent")


def _away(stage: Stage) -> None:
    _list(stage)
    stage.daemon.kill()
    stage.find("#away")


VIEWS: Mapping[str, Callable[[Stage], None]] = {
    "list": _list,
    "filtered": _filtered,
    "no-match": _no_match,
    "account": _account,
    "running": _running,
    "failed": _failed,
    "waiting": _waiting,
    "empty": _empty,
    "missing": _missing,
    "colours": _colours,
    "huge": _huge,
    "marked": _marked,
    "run": _run,
    "review": _review,
    "review-refused": _review_refused,
    "kill": _kill,
    "sign-in": _sign_in,
    "refused": _refused,
    "away": _away,
}


@contextmanager
def stage(folder: Path) -> Iterator[Stage]:
    """Start a daemon with all tasks and a browser, and end them."""
    actions = folder / "repo" / "actions"
    actions.mkdir(parents=True)
    for name, text in LOGS.items():
        (actions / name).write_text(ACTION)
        (actions / name).chmod(0o755)
        (actions / f"{name}.log").write_text(text)
    apps = folder / "repo" / "apps"
    for app in ("shop", "site"):
        (apps / app).mkdir(parents=True)
        for name in LOGS:
            os.symlink(actions / name, apps / app / name)
    (folder / "secret").write_text(CLIENT_SECRET)
    with ExitStack() as stack:
        hub = stack.enter_context(github())
        hub.users = {token(user): user for user in USERS}
        config = folder / "config.toml"
        config.write_text(
            f'command = "scripts"\nconfig-repo = "{folder}/repo"\nkill-grace = 1\n'
            f'github-url = "{hub.url}"\ngithub-api-url = "{hub.url}"\n'
            f'github-client-id = "{CLIENT_ID}"\n'
            f'github-client-secret-file = "{folder}/secret"\n'
            f'auth-members = ["alice", "bob"]\nmax-running-per-target = 1\n'
            f'confirm = ["*/production"]\n'
        )
        daemon = Daemon(folder, "--config", str(config))
        stack.callback(daemon.stop)
        driver = stack.enter_context(chromium())
        yield Stage(daemon, driver, actions / "hold")
