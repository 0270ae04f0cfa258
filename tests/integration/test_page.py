"""Tests of the page in Chromium: the steps that users take."""

import re
from pathlib import Path
from urllib.parse import urlsplit

from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select

from tests.integration.conftest import Script, Start
from tests.integration.daemon import Daemon
from tests.integration.page import (
    answer,
    at_begin,
    click,
    fill,
    find,
    listed,
    path,
    rows,
    shows,
    status,
    until,
)
from tests.integration.test_signin import command

# -- start, follow, kill


def test_a_task_is_started_followed_and_killed_on_the_page(
    browser: Chrome, daemon: Daemon, script: Script, tmp_path: Path
) -> None:
    """The page shows the same state as the API."""
    gate = tmp_path / "gate"
    script(
        "deploy",
        f"#!/bin/sh\necho branch $PULSAR_VAR_branch\nwhile [ ! -e {gate} ]; do sleep 0.02; "
        "done\necho through the gate\necho careful >&2\nexec sleep 600",
    )
    browser.get(f"{daemon.base}/web/")
    find(browser, ".note", "There are no tasks yet.")
    click(browser, "#run")
    fill(browser, "app", "site")
    fill(browser, "env", "production")
    fill(browser, "action", "deploy")
    click(browser, "dialog button", "Add a variable")
    find(browser, "dialog .key").send_keys("branch")
    find(browser, "dialog .value").send_keys("<b>main</b>")
    click(browser, "dialog button.primary")
    until(browser, lambda: path(browser) == "/web/job/1", "the task's page")
    status(browser, "running")
    shows(browser, "branch <b>main</b>")
    assert browser.title.startswith("▶ running · site production #1")
    gate.touch()
    shows(browser, "through the gate")
    shows(browser, "careful")
    assert "careful" in find(browser, ".row.err").text
    click(browser, ".actions button", "Kill")
    dialog = find(browser, "dialog")
    assert "Kill site on production?" in dialog.text
    assert daemon.task(1)["status"] == "running"
    click(browser, "dialog .danger")
    status(browser, "killed")
    assert daemon.ended(1)["status"] == "killed"
    assert not browser.find_elements(By.CSS_SELECTOR, ".actions .danger:not([hidden])")
    assert browser.title.startswith("■ killed")
    click(browser, ".back")
    until(browser, lambda: listed(browser) == [1], "the list")
    assert "killed" in find(browser, ".tasks li").text


def test_run_again_starts_a_task_with_the_same_values(
    browser: Chrome, daemon: Daemon, script: Script
) -> None:
    """The user has to enter secrets again."""
    script(
        "deploy",
        "#!/bin/sh\necho $PULSAR_VAR_branch; test $PULSAR_VAR_token = shh-2",
    )
    number = daemon.run("site", "staging", "deploy", branch="main", token="shh-1")
    assert daemon.ended(number)["exitCode"] == 1
    browser.get(f"{daemon.base}/web/job/{number}")
    status(browser, "failed")
    assert "exit code 1" in find(browser, ".about summary").text
    assert "token=***" in find(browser, ".facts").text
    click(browser, ".actions button", "Run again")
    values = browser.find_elements(By.CSS_SELECTOR, "dialog .value")
    assert [v.get_attribute("value") for v in values] == ["main", ""]
    assert values[1].get_attribute("type") == "password"
    click(browser, "dialog button.primary")
    assert path(browser) == f"/web/job/{number}"  # a required field is empty
    values[1].send_keys("shh-2")
    click(browser, "dialog button.primary")
    until(browser, lambda: path(browser) == f"/web/job/{number + 1}", "the new task")
    status(browser, "finished")
    shows(browser, "main")


def test_run_again_keeps_values_of_several_lines(
    browser: Chrome, daemon: Daemon, script: Script
) -> None:
    """An input of one line would drop the others. Some names make the field a secret."""
    script("deploy", '#!/bin/sh\nprintf %s "$PULSAR_VAR_note"')
    number = daemon.run("site", "staging", "deploy", note="one\ntwo")
    daemon.ended(number)
    browser.get(f"{daemon.base}/web/job/{number}")
    shows(browser, "two")
    click(browser, ".actions button", "Run again")
    click(browser, "dialog button", "Add a variable")
    keys = browser.find_elements(By.CSS_SELECTOR, "dialog .key")
    keys[1].send_keys("Deploy_Token", Keys.TAB, "abcd")
    assert browser.find_elements(By.CSS_SELECTOR, "dialog .secret")[1].is_selected()
    value = browser.find_elements(By.CSS_SELECTOR, "dialog .value")[1]
    assert value.get_attribute("type") == "password"
    # When a variable is removed, the focus goes to the remaining one.
    browser.find_elements(By.CSS_SELECTOR, "dialog .variable button")[1].send_keys(
        Keys.ENTER
    )
    assert browser.switch_to.active_element == keys[0]
    click(browser, "dialog button.primary")
    until(browser, lambda: path(browser) == f"/web/job/{number + 1}", "the new task")
    status(browser, "finished")
    assert daemon.task(number + 1)["output"] == "one\ntwo"


def test_the_dialog_offers_known_actions_apps_and_envs(
    browser: Chrome, daemon: Daemon, script: Script
) -> None:
    """The command knows the actions. The apps and envs are those of earlier tasks."""
    for name in ("deploy", "rollback"):
        script(name, "#!/bin/sh\ntrue")
    daemon.ended(daemon.run("site", "staging", "deploy"))
    browser.get(f"{daemon.base}/web/")
    click(browser, "#run")

    def offered(name: str) -> list[str]:
        script = (
            "const field = document.querySelector(`dialog [name=${arguments[0]}]`);"
            "return [...field.list.options].map((one) => one.value)"
        )
        found: list[str] = browser.execute_script(script, name)
        return found

    until(browser, lambda: offered("app") == ["site"], "the apps")
    assert offered("env") == ["staging"]
    fill(browser, "app", "site")
    fill(browser, "env", "production")
    fill(browser, "action", "")
    until(
        browser, lambda: sorted(offered("action")) == ["deploy", "rollback"], "the actions"
    )


def test_the_dialog_shows_why_a_task_was_refused(browser: Chrome, daemon: Daemon) -> None:
    """The fields keep their text."""
    browser.get(f"{daemon.base}/web/")
    click(browser, "#run")
    fill(browser, "app", "site")
    fill(browser, "env", "staging")
    fill(browser, "action", "no/such")
    click(browser, "dialog button.primary")
    said = find(browser, "dialog [role=alert]", "action").text
    assert "action" in said
    assert find(browser, "dialog [name=app]").get_attribute("value") == "site"
    assert daemon.get("/tasks").json()["tasks"] == {}


def test_dangerous_tasks_need_a_confirmation(
    browser: Chrome, start: Start, repo: Path, script: Script, tmp_path: Path
) -> None:
    """The user has to type the name of the env, and again after a change of the task."""
    script("deploy", "#!/bin/sh\ntrue")
    (tmp_path / "config.toml").write_text(
        f'command = "scripts"\nconfig-repo = "{repo}"\nconfirm = ["*/production"]\n'
    )
    daemon = start("--config", str(tmp_path / "config.toml"))
    browser.get(f"{daemon.base}/web/")
    click(browser, "#run")
    fill(browser, "app", "site")
    fill(browser, "env", "production")
    fill(browser, "action", "deploy")
    click(browser, "dialog button.primary")
    assert "deploy for site on production" in find(browser, "dialog .sure").text
    find(browser, "dialog [name=sure]").send_keys("staging", Keys.ENTER)
    find(browser, "dialog [role=alert]", "Type production to confirm.")
    assert daemon.get("/tasks").json()["tasks"] == {}
    find(browser, "dialog [name=app]").send_keys("2")
    until(
        browser,
        lambda: not browser.find_element(By.CSS_SELECTOR, ".sure").is_displayed(),
        "the review of something else to go",
    )
    find(browser, "dialog [name=app]").send_keys(Keys.BACKSPACE)
    click(browser, "dialog button.primary")
    find(browser, "dialog [name=sure]").send_keys("production", Keys.ENTER)
    until(browser, lambda: path(browser) == "/web/job/1", "the task's page")
    status(browser, "finished")
    click(browser, "#run")
    fill(browser, "app", "site")
    fill(browser, "env", "staging")
    fill(browser, "action", "deploy")
    click(browser, "dialog button.primary")
    until(browser, lambda: path(browser) == "/web/job/2", "what needs no second look")


# -- restarts of the daemon


def test_a_log_continues_after_a_kill_of_the_daemon(
    browser: Chrome, returning: Daemon
) -> None:
    """After ``kill -9`` and a start, the log on the page is the whole output."""
    number = returning.sh("for i in $(seq 1 200); do echo line $i; sleep 0.02; done")
    browser.get(f"{returning.base}/web/job/{number}")
    shows(browser, "line 10")
    returning.kill()
    find(browser, "#away", "cannot be reached")
    until(browser, lambda: len(returning.output_file(number).read_bytes()) > 1500, "output")
    returning.start()
    status(browser, "finished")
    until(
        browser, lambda: not browser.find_element(By.ID, "away").is_displayed(), "no banner"
    )
    shows(browser, "line 200")
    assert rows(browser) == [[str(n), f"line {n}"] for n in range(1, 201)]
    assert returning.task(number)["output"] == "".join(f"line {n}\n" for n in range(1, 201))


def test_the_list_continues_after_a_restart(browser: Chrome, returning: Daemon) -> None:
    """It has the tasks that began or ended meanwhile."""
    first = returning.sh("sleep 600")
    browser.get(f"{returning.base}/web/")
    find(browser, ".tasks .running")
    returning.kill()
    find(browser, "#away")
    returning.start()
    returning.post(f"/task/{first}/kill")
    second = returning.sh("true")
    find(browser, f".tasks [data-id='{first}'] .killed")
    find(browser, f".tasks [data-id='{second}'] .finished")


def test_a_task_opened_while_the_daemon_is_away_loads_later(
    browser: Chrome, returning: Daemon
) -> None:
    """The view of the task repeats its request until the daemon answers."""
    number = returning.sh("echo here")
    returning.ended(number)
    browser.get(f"{returning.base}/web/")
    find(browser, ".tasks .finished")
    returning.kill()
    find(browser, "#away")
    click(browser, ".tasks a")
    until(browser, lambda: path(browser) == f"/web/job/{number}", "the task's address")
    returning.start()
    shows(browser, "here")
    status(browser, "finished")


def test_new_settings_count_on_an_open_page(
    browser: Chrome, returning: Daemon, tmp_path: Path
) -> None:
    """An open page asks for confirmations that the settings require since the restart."""
    browser.get(f"{returning.base}/web/")
    find(browser, "#run")
    returning.kill()
    find(browser, "#away")
    (tmp_path / "config.toml").write_text('confirm = ["*/production"]\n')
    returning.arguments += ["--config", str(tmp_path / "config.toml")]
    returning.start()
    click(browser, "#run")
    fill(browser, "app", "site")
    fill(browser, "env", "production")
    fill(browser, "action", "run")
    click(browser, "dialog button.primary")
    find(browser, "dialog .sure")
    assert returning.get("/tasks").json()["tasks"] == {}


def test_a_list_keeps_its_place_over_a_restart(browser: Chrome, returning: Daemon) -> None:
    """It keeps all loaded tasks, also when the user looks at a task and comes back."""
    for _ in range(130):
        last = returning.sh("true")
    for number in range(1, last + 1):
        returning.ended(number)
    browser.get(f"{returning.base}/web/")
    until(browser, lambda: len(listed(browser)) == 100, "a first page")

    def scrolled() -> bool:
        browser.execute_script("scrollTo(0, document.body.scrollHeight)")
        return len(listed(browser)) == 130

    until(browser, scrolled, "all pages")
    browser.execute_script("document.querySelector('[data-id=\"5\"]').scrollIntoView()")
    place = browser.execute_script("return scrollY")
    returning.kill()
    find(browser, "#away")
    returning.start()
    number = returning.sh("true")
    until(browser, lambda: listed(browser)[0] == number, "what is new")
    assert len(listed(browser)) == 131
    row = browser.find_element(By.CSS_SELECTOR, "[data-id='5']")
    assert row.is_displayed()
    place = browser.execute_script("return scrollY")
    assert place > 1000
    browser.execute_script("document.querySelector('[data-id=\"5\"] a').click()")
    until(browser, lambda: path(browser) == "/web/job/5", "the task")
    browser.back()
    until(browser, lambda: browser.execute_script("return scrollY") == place, "the place")
    assert len(listed(browser)) == 131


def test_a_list_that_was_refused_is_requested_again(browser: Chrome, many: Daemon) -> None:
    """Such refusals are 429 and the 503 of a starting daemon."""
    script = (
        "const real = fetch; let first = true; window.fetch = (...all) => {"
        "if (!first || !all[0].startsWith('/tasks')) return real(...all);"
        "first = false; return Promise.resolve(new Response("
        "JSON.stringify({detail: 'Not now.'}), {status: 503})); };"
    )
    with at_begin(browser, script):
        browser.get(f"{many.base}/web/")
        find(browser, ".note", "Not now.")
        until(browser, lambda: len(listed(browser)) == 100, "the list")


def test_a_hidden_tab_shows_the_state_in_its_title(
    browser: Chrome, daemon: Daemon, script: Script, tmp_path: Path
) -> None:
    """It closes its stream and polls from time to time."""
    gate = tmp_path / "gate"
    script("wait", f"#!/bin/sh\nwhile [ ! -e {gate} ]; do sleep 0.02; done")
    number = daemon.run("site", "staging", "wait")
    hidden = "Object.defineProperty(Document.prototype, 'hidden', {get: () => true});"
    count = "const Real = EventSource; window.EventSource = class extends Real {"
    count += "close() { super.close(); window.cut = true; } };"
    with at_begin(browser, hidden + count):
        browser.get(f"{daemon.base}/web/job/{number}")
        until(browser, lambda: browser.title.startswith("▶"), "the state")
        until(browser, lambda: browser.execute_script("return window.cut"), "no stream")
        gate.touch()
        until(browser, lambda: browser.title.startswith("✓"), "the end")


# -- the list


def test_a_task_that_begins_to_match_is_added_to_the_list(
    browser: Chrome, daemon: Daemon, script: Script, tmp_path: Path
) -> None:
    """It can be older than the tasks that the list has loaded."""
    gate = tmp_path / "gate"
    script("wait", f"#!/bin/sh\nwhile [ ! -e {gate} ]; do sleep 0.02; done; exit 1")
    script("fail", "#!/bin/sh\nexit 1")
    first = daemon.run("site", "staging", "wait")
    second = daemon.run("site", "staging", "fail")
    daemon.ended(second)
    browser.get(f"{daemon.base}/web/?status=failed")
    until(browser, lambda: listed(browser) == [second], "the one that has failed")
    gate.touch()
    until(browser, lambda: listed(browser) == [second, first], "the other one")


def test_scrolling_loads_all_tasks_newest_first(browser: Chrome, many: Daemon) -> None:
    """Each task is in the list once."""
    browser.get(f"{many.base}/web/")
    until(browser, lambda: len(listed(browser)) == 100, "a first page")

    def scrolled() -> bool:
        browser.execute_script("scrollTo(0, document.body.scrollHeight)")
        return len(listed(browser)) >= 120

    until(browser, scrolled, "all pages")
    assert listed(browser) == list(range(120, 0, -1))
    find(browser, ".note", "120 tasks")


def test_filters_are_in_the_address(browser: Chrome, many: Daemon) -> None:
    """A user can share the address of a filtered list."""
    browser.get(f"{many.base}/web/")
    fill(browser, "app", "app0")
    fill(browser, "env", "production")
    want = [n for n in range(120, 0, -1) if n % 6 == 0]
    until(browser, lambda: listed(browser) == want, "the filtered list")
    Select(find(browser, ".filter [name=status]")).select_by_value("failed")
    want = [n for n in want if n % 10 == 0]
    until(browser, lambda: listed(browser) == want, "the failed ones")
    url = browser.current_url
    assert urlsplit(url).query == "status=failed&app=app0&env=production"
    browser.get("about:blank")
    browser.get(url)
    until(browser, lambda: listed(browser) == want, "the same by the address")
    assert find(browser, ".filter [name=app]").get_attribute("value") == "app0"
    browser.get(f"{many.base}/web/?text=PP1")
    odd = [n for n in range(120, 0, -1) if n % 2]
    until(browser, lambda: listed(browser) == odd, "a text in any of the names")
    fill(browser, "text", "no such")
    find(browser, ".note", "No tasks match.")


def test_the_list_adds_and_removes_tasks_as_they_match(
    browser: Chrome, daemon: Daemon, script: Script, tmp_path: Path
) -> None:
    """The filter applies to new tasks and to changes of status."""
    gate = tmp_path / "gate"
    script("wait", f"#!/bin/sh\nwhile [ ! -e {gate} ]; do sleep 0.02; done")
    browser.get(f"{daemon.base}/web/?env=production&status=running")
    find(browser, ".note", "No tasks match.")
    daemon.run("site", "staging", "wait")
    number = daemon.run("site", "production", "wait")
    until(browser, lambda: listed(browser) == [number], "the one that matches")
    until(browser, lambda: re.search(r"[1-9] s", find(browser, ".long").text), "a clock")
    gate.touch()
    until(browser, lambda: listed(browser) == [], "it to go as it runs no more")


def test_a_waiting_task_shows_its_reason(
    browser: Chrome, start: Start, repo: Path, script: Script
) -> None:
    """The reason is in the list and on the page of the task."""
    script("wait", "#!/bin/sh\nexec sleep 600")
    daemon = start(
        *("--command", "scripts", "--config-repo", str(repo), "--kill-grace", "1"),
        *("--max-running", "1"),
    )
    first = daemon.run("site", "staging", "wait")
    second = daemon.run("site", "production", "wait")
    reason = daemon.task(second)["waitingFor"]
    assert reason
    browser.get(f"{daemon.base}/web/")
    assert reason in find(browser, f".tasks [data-id='{second}']", "waiting").text
    browser.get(f"{daemon.base}/web/job/{second}")
    status(browser, "waiting")
    assert reason in find(browser, ".reason").text
    daemon.post(f"/task/{first}/kill")
    status(browser, "running")


def test_old_addresses_lead_to_the_task(browser: Chrome, many: Daemon) -> None:
    """The responses to published clients still have them."""
    url = many.task(7)["url"]
    assert url.endswith("/web#job/7")
    browser.get(url)
    until(browser, lambda: path(browser) == "/web/job/7", "the task's own address")
    status(browser, "finished")
    find(browser, ".empty", "The task printed nothing.")
    browser.get(f"{many.base}/web/job/9999")
    find(browser, ".empty", "9999")


# -- rights


def test_a_reader_sees_no_buttons_and_the_api_refuses(
    browser: Chrome, start: Start, tmp_path: Path
) -> None:
    """A user with a token for ``read`` sees the log, but nothing to start or kill tasks."""
    (tmp_path / "config.toml").write_text(
        'command = "sh -c \\"echo here; exec sleep 600\\""\nkill-grace = 1\n'
        'auth-provider = "static"\nauth-username = "joe"\nauth-password = "correct horse"\n'
    )
    daemon = start("--config", str(tmp_path / "config.toml"))
    reader = command(daemon, "token", "create", "reader", "--may", "read").split()[-1]
    runner = command(daemon, "token", "create", "all", "--may", "admin").split()[-1]
    daemon.headers = {"Authorization": f"Bearer {runner}"}
    number = daemon.run("shop", "production", "x")

    def sign_in(token: str) -> None:
        browser.get(f"{daemon.base}/web#job/{number}")  # like a link from a chat
        until(browser, lambda: path(browser) == "/login", "the sign-in")
        find(browser, "[name=password]").send_keys(token, Keys.ENTER)
        until(browser, lambda: path(browser) == f"/web/job/{number}", "the page wanted")

    sign_in(reader)
    status(browser, "running")
    shows(browser, "here")
    find(browser, "#account summary", "token:reader")
    shown = [
        b.text for b in browser.find_elements(By.TAG_NAME, "button") if b.is_displayed()
    ]
    assert not [text for text in shown if "Kill" in text or "Run" in text]
    assert answer(browser, "POST", f"/task/{number}/kill")["status"] == 403
    assert answer(browser, "POST", "/shop/production?action=x")["status"] == 403
    assert daemon.task(number)["status"] == "running"
    click(browser, "#account summary")
    click(browser, "#account button", "Sign out")
    until(browser, lambda: path(browser) == "/login", "the sign-in again")
    sign_in(runner)
    find(browser, ".actions button", "Kill")
    find(browser, "#run")


def test_an_ended_session_leads_to_the_sign_in(
    browser: Chrome, start: Start, tmp_path: Path
) -> None:
    """The page goes to the sign-in at the next refused request."""
    (tmp_path / "password").write_text("correct horse")
    daemon = start(
        *("--auth-provider", "static", "--auth-username", "joe"),
        *("--auth-password-file", str(tmp_path / "password"), "--command", "sleep 600"),
    )
    browser.get(f"{daemon.base}/web/")
    find(browser, "[name=user]").send_keys("joe")
    find(browser, "[name=password]").send_keys("correct horse", Keys.ENTER)
    find(browser, ".note", "There are no tasks yet.")
    browser.execute_cdp_cmd("Network.clearBrowserCookies", {})
    click(browser, "#run")
    until(browser, lambda: path(browser) == "/login", "the sign-in")
