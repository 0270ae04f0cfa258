"""Tests of the page with a keyboard alone, and for users of screen readers."""

from collections.abc import Iterator

import pytest
from selenium.webdriver import ActionChains, Chrome, Keys
from selenium.webdriver.support.wait import WebDriverWait

from tests.integration.browser import chromium
from tests.integration.daemon import PATIENCE, SHELL, Daemon

STOPS = 40
"""More presses of Tab than any view needs."""
LINES = "seq 1000; while :; do sleep 1; done"
"""A task that prints and then keeps running."""

FOCUS = """
const it = document.activeElement;
const style = getComputedStyle(it);
const name = it.getAttribute('aria-label') || it.labels?.[0]?.textContent || it.textContent;
return [name.trim(), it.matches(':focus-visible'),
  style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2,
  it.getBoundingClientRect().top >= 0, it.closest('dialog') !== null];
"""


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """Return a daemon that runs lines of shell."""
    daemon = Daemon(tmp_path_factory.mktemp("daemon"), "--command", SHELL, "--kill-grace=1")
    yield daemon
    daemon.stop()
    assert "Traceback" not in daemon.log.read_text()


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    """Return a browser."""
    with chromium() as driver:
        yield driver


class Person:
    """A user with a keyboard alone, who checks where the focus is."""

    def __init__(self, driver: Chrome) -> None:
        self.driver = driver

    def press(self, *keys: str) -> None:
        """Press keys one after the other."""
        ActionChains(self.driver, duration=0).send_keys(*keys).perform()

    def back(self) -> None:
        """Press Tab with Shift."""
        chain = ActionChains(self.driver, duration=0)
        chain.key_down(Keys.SHIFT).send_keys(Keys.TAB).key_up(Keys.SHIFT).perform()

    def focus(self) -> str:
        """Return the name of the element with the focus, which must be visible."""
        name, visible, outlined, on_screen, _ = self.driver.execute_script(FOCUS)
        assert visible, name
        assert outlined, name
        assert on_screen, name
        return str(name)

    def in_dialog(self) -> bool:
        """Return whether the focus is in a dialog."""
        return bool(self.driver.execute_script(FOCUS)[-1])

    def tab_to(self, name: str) -> None:
        """Press Tab until an element with this name has the focus."""
        seen = []
        for _ in range(STOPS):
            self.press(Keys.TAB)
            seen.append(self.focus())
            if seen[-1].startswith(name):
                return
        raise AssertionError(f"no {name!r} among {seen}")

    def until(self, condition: str) -> None:
        """Wait until an expression in JavaScript is true."""
        wait = WebDriverWait(self.driver, PATIENCE, poll_frequency=0.02)
        wait.until(lambda d: d.execute_script(f"return Boolean({condition})"), condition)


@pytest.fixture
def person(browser: Chrome, daemon: Daemon) -> Person:
    """Return a user who looks at the list."""
    browser.get("about:blank")
    browser.get(f"{daemon.base}/web/")
    person = Person(browser)
    person.until("!document.querySelector('#run').hidden")
    return person


def seen(number: int) -> str:
    """Return a condition in JavaScript: a line is visible in the log."""
    return (
        "(() => { "
        "const place = (it) => document.querySelector(it)?.getBoundingClientRect(); "
        f"const [log, row] = ['.log', '[data-n=\"{number}\"]'].map(place); "
        "return row && row.top >= log.top - 1 && row.bottom <= log.bottom + 1; })()"
    )


def test_a_task_is_started_followed_and_killed_by_keys(person: Person) -> None:
    """The focus is visible at every stop, from the list to the task and back."""
    press, until = person.press, person.until
    # The skip link is the first stop, and leads to the content.
    press(Keys.TAB)
    assert person.focus() == "Skip to the content"
    press(Keys.ENTER)
    until("document.activeElement.matches('main')")
    press(Keys.TAB)
    assert person.focus() == "search"
    # Go back to the button in the head of the page.
    for _ in range(STOPS):
        person.back()
        if person.focus() == "Run…":
            break
    press(Keys.ENTER)
    until("document.activeElement.name === 'app'")
    assert person.in_dialog()
    press("site", Keys.TAB, "production", Keys.TAB, "run")
    person.tab_to("Add a variable")
    press(Keys.ENTER)
    assert person.focus() == "Name"
    press("run", Keys.TAB, LINES, Keys.ENTER)
    # The dialog is closed, and the heading of the task has the focus.
    until("document.body.matches('.task') && document.activeElement.matches('h1')")
    until("document.activeElement.textContent.startsWith('site production run')")
    until(seen(1000))
    number = person.driver.current_url.rpartition("/")[2]
    _search(person)
    _scroll(person)
    _kill(person)
    # Go back to the list.
    for _ in range(STOPS):
        person.back()
        if "Tasks" in person.focus():
            break
    press(Keys.ENTER)
    until("document.querySelector('.tasks .killed')")
    assert (
        person.driver.execute_script("return document.activeElement.textContent") == "Tasks"
    )
    # Go to the task again.
    person.tab_to(f"#{number}")
    press(Keys.ENTER)
    until("document.body.matches('.task')")


def _search(person: Person) -> None:
    person.press("/")
    assert person.focus() == "Search the output"
    person.press("777", Keys.ENTER)
    person.until("document.querySelector('.found').textContent === '1 of 1'")
    person.until(seen(777))


def _scroll(person: Person) -> None:
    person.tab_to("Output")
    person.press(Keys.HOME)
    person.until(seen(1))
    person.press(Keys.PAGE_DOWN)
    person.until("document.querySelector('.log').scrollTop > 100")
    person.press(Keys.END)
    person.until(seen(1000))
    # The key puts the line into the address, which the user can share.
    person.press("l")
    person.until("/^#L[0-9]+$/.test(location.hash) && document.querySelector('.marked')")
    # The log follows the end when the user is there, and stops when the user goes up.
    person.until("document.querySelector('.resume').hidden")
    person.press(Keys.PAGE_UP)
    person.until("!document.querySelector('.resume').hidden")
    person.tab_to("↓ Follow the end")
    person.press(Keys.ENTER)
    person.until(seen(1000))
    person.until("document.querySelector('.resume').hidden")
    assert person.focus() == "Output"


def _kill(person: Person) -> None:
    for _ in range(STOPS):
        person.back()
        if person.focus() == "Kill…":
            break
    for leave in (Keys.ESCAPE, Keys.ENTER):  # Escape, and the button "Keep it running"
        person.press(Keys.ENTER)
        person.until("document.querySelector('dialog[open]')")
        assert person.focus() == "Keep it running"
        for _ in range(5):
            person.press(Keys.TAB)
            # Chromium goes through its own toolbar between the last element and the first.
            at = "document.activeElement.closest('dialog') || document.activeElement"
            assert person.driver.execute_script(f"return ({at}).localName") in {
                "dialog",
                "body",
            }
        while person.driver.execute_script(FOCUS)[0] != "Keep it running":
            person.press(Keys.TAB)
        person.press(leave)
        person.until("!document.querySelector('dialog')")
        assert person.focus() == "Kill…"
    person.press(Keys.ENTER)
    person.until("document.querySelector('dialog[open]')")
    person.tab_to("Kill site on production")
    person.press(Keys.ENTER)
    person.until("document.querySelector('.titles .killed')")
    # The focused button is gone, so the page must move the focus.
    person.until("document.activeElement.matches('h1, .actions button')")


WATCH = """
window.said = [];
const watch = new MutationObserver((found) => {
  for (const { target } of found) {
    const live = target.closest?.('[role=status], [role=alert], [aria-live]')
      ?? target.parentElement?.closest('[role=status], [role=alert], [aria-live]');
    if (live) window.said.push(live.textContent);
  }
});
watch.observe(document.body, { subtree: true, childList: true, characterData: true });
"""


def test_a_screen_reader_gets_a_few_announcements_of_a_task(
    person: Person, daemon: Daemon
) -> None:
    """The page does not announce a thousand lines, but it announces the end."""
    number = daemon.sh("sleep 1; for i in $(seq 1000); do echo $i; sleep 0.001; done")
    person.driver.get(f"{daemon.base}/web/job/{number}")
    person.until("document.querySelector('.titles .running')")
    person.driver.execute_script(WATCH)
    person.until("document.querySelector('.titles .finished')")
    person.until(seen(1000))
    said = person.driver.execute_script("return window.said")
    assert 1 <= len(said) <= 5
    assert said[-1] == "The task is finished."


def test_a_screen_reader_gets_few_announcements_of_a_list(
    person: Person, daemon: Daemon
) -> None:
    """The page does not announce every start and end of a task."""
    person.driver.execute_script(WATCH)
    for _ in range(5):
        daemon.ended(daemon.sh("true"))
    # Wait for the last of the tasks.
    shown = "document.querySelector('.tasks li:first-child .finished')"
    person.until(f"document.querySelectorAll('.tasks li').length >= 5 && {shown}")
    said = person.driver.execute_script("return window.said")
    assert len(said) <= 5
