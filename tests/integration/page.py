"""What the tests of the page do with it, and look for."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import urlsplit

from selenium.common.exceptions import WebDriverException
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from tests.integration.daemon import PATIENCE

T = TypeVar("T")

# What the page shows as the output: the number of each line, "" where it goes on, and text.
ROWS = """
return [...document.querySelectorAll('.log .row')].map((row) =>
  [row.querySelector('.n').dataset.n ?? '', row.querySelector('.t').textContent]);
"""
# How far the log is from its end, in pixels.
FROM_END = """
const log = document.querySelector('.log');
return log.scrollHeight - log.clientHeight - log.scrollTop;
"""


def until(browser: Chrome, condition: Callable[[], T], what: str) -> T:
    """Wait until something is true of the page, whatever it is doing meanwhile."""
    wait = WebDriverWait(browser, PATIENCE, 0.05, [WebDriverException])
    return wait.until(lambda _: condition(), f"{what}: {browser.current_url}")


def find(browser: Chrome, css: str, text: str = "") -> WebElement:
    """Wait for an element that is shown, with some text in it."""

    def shown() -> WebElement | None:
        for element in browser.find_elements(By.CSS_SELECTOR, css):
            if element.is_displayed() and text in element.text:
                return element
        return None

    found = until(browser, shown, f"{css} {text!r}")
    assert found is not None
    return found


def click(browser: Chrome, css: str, text: str = "") -> None:
    """Click on something as soon as it is there."""

    def clicked() -> bool:
        find(browser, css, text).click()
        return True

    until(browser, clicked, f"a click on {css} {text!r}")


def path(browser: Chrome) -> str:
    """Return the path of the address."""
    return urlsplit(browser.current_url).path


def status(browser: Chrome, word: str) -> None:
    """Wait until the task's page says a status."""
    find(browser, ".titles .status", word)


def rows(browser: Chrome) -> list[list[str]]:
    """Return what the page shows of the output."""
    found: list[list[str]] = browser.execute_script(ROWS)
    return found


def shows(browser: Chrome, line: str) -> None:
    """Wait until a line is among the elements of the log."""
    until(browser, lambda: line in [text for _, text in rows(browser)], f"line {line!r}")


def listed(browser: Chrome) -> list[int]:
    """Return the numbers of the tasks in the list."""
    script = "return [...document.querySelectorAll('.tasks li')].map((i) => +i.dataset.id)"
    found: list[int] = browser.execute_script(script)
    return found


def fill(browser: Chrome, name: str, text: str) -> None:
    """Write into a field."""
    place = "dialog" if browser.find_elements(By.TAG_NAME, "dialog") else ".filter"
    field = find(browser, f"{place} [name={name}]")
    field.clear()
    field.send_keys(text)


def answer(browser: Chrome, method: str, url: str) -> dict[str, Any]:
    """Return what the daemon answers to the page's own session."""
    script = """
    const [method, url, done] = arguments;
    fetch(url, {method}).then(async (r) => done({status: r.status, body: await r.json()}));
    """
    found: dict[str, Any] = browser.execute_async_script(script, method, url)
    return found


def latency(browser: Chrome, milliseconds: int) -> None:
    """Make the network slow, or with 0 as fast as it is."""
    browser.execute_cdp_cmd("Network.enable", {})
    conditions = {"offline": False, "downloadThroughput": -1, "uploadThroughput": -1}
    browser.execute_cdp_cmd(
        "Network.emulateNetworkConditions", {**conditions, "latency": milliseconds}
    )
    if not milliseconds:
        browser.execute_cdp_cmd("Network.disable", {})


@contextmanager
def sized(browser: Chrome) -> Iterator[Callable[[int, int], None]]:
    """Yield what gives the page another width and height, until the end."""

    def resize(width: int, height: int) -> None:
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 0, "mobile": False},
        )

    try:
        yield resize
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@contextmanager
def at_begin(browser: Chrome, script: str) -> Iterator[None]:
    """Run a script before those of each page that is opened."""
    command = "Page.addScriptToEvaluateOnNewDocument"
    made = browser.execute_cdp_cmd(command, {"source": script})
    try:
        yield
    finally:
        browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", made)


def clipboard(browser: Chrome) -> str:
    """Return what was copied."""
    read = "const done = arguments[0]; navigator.clipboard.readText().then(done)"
    return str(browser.execute_async_script(read))
