"""Actions on the page, and functions that read from it, for the tests of the page."""

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

# The output as the page shows it: the number of each line ("" if it continues), and text.
ROWS = """
return [...document.querySelectorAll('.log .row')].map((row) =>
  [row.querySelector('.n').dataset.n ?? '', row.querySelector('.t').textContent]);
"""
# The distance of the log from its end, in pixels.
FROM_END = """
const log = document.querySelector('.log');
return log.scrollHeight - log.clientHeight - log.scrollTop;
"""


def until(browser: Chrome, condition: Callable[[], T], what: str) -> T:
    """Wait until a condition of the page is true, even while the page changes."""
    wait = WebDriverWait(browser, PATIENCE, 0.05, [WebDriverException])
    return wait.until(lambda _: condition(), f"{what}: {browser.current_url}")


def find(browser: Chrome, css: str, text: str = "") -> WebElement:
    """Wait for a visible element that contains a text, and return it."""

    def shown() -> WebElement | None:
        for element in browser.find_elements(By.CSS_SELECTOR, css):
            if element.is_displayed() and text in element.text:
                return element
        return None

    found = until(browser, shown, f"{css} {text!r}")
    assert found is not None
    return found


def click(browser: Chrome, css: str, text: str = "") -> None:
    """Click on an element as soon as it is there."""

    def clicked() -> bool:
        find(browser, css, text).click()
        return True

    until(browser, clicked, f"a click on {css} {text!r}")


def path(browser: Chrome) -> str:
    """Return the path of the page's URL."""
    return urlsplit(browser.current_url).path


def status(browser: Chrome, word: str) -> None:
    """Wait until the page of the task shows a status."""
    find(browser, ".titles .status", word)


def rows(browser: Chrome) -> list[list[str]]:
    """Return the lines of output that the page shows."""
    found: list[list[str]] = browser.execute_script(ROWS)
    return found


def shows(browser: Chrome, line: str) -> None:
    """Wait until the log contains a line."""
    until(browser, lambda: line in [text for _, text in rows(browser)], f"line {line!r}")


def listed(browser: Chrome) -> list[int]:
    """Return the numbers of the tasks in the list."""
    script = "return [...document.querySelectorAll('.tasks li')].map((i) => +i.dataset.id)"
    found: list[int] = browser.execute_script(script)
    return found


def fill(browser: Chrome, name: str, text: str) -> None:
    """Write text into a field."""
    place = "dialog" if browser.find_elements(By.TAG_NAME, "dialog") else ".filter"
    field = find(browser, f"{place} [name={name}]")
    field.clear()
    field.send_keys(text)


def answer(browser: Chrome, method: str, url: str) -> dict[str, Any]:
    """Return the daemon's answer to a request with the session of the page."""
    script = """
    const [method, url, done] = arguments;
    fetch(url, {method}).then(async (r) => done({status: r.status, body: await r.json()}));
    """
    found: dict[str, Any] = browser.execute_async_script(script, method, url)
    return found


def latency(browser: Chrome, milliseconds: int) -> None:
    """Set the latency of the network, 0 for its real speed."""
    browser.execute_cdp_cmd("Network.enable", {})
    conditions = {"offline": False, "downloadThroughput": -1, "uploadThroughput": -1}
    browser.execute_cdp_cmd(
        "Network.emulateNetworkConditions", {**conditions, "latency": milliseconds}
    )
    if not milliseconds:
        browser.execute_cdp_cmd("Network.disable", {})


@contextmanager
def sized(browser: Chrome) -> Iterator[Callable[[int, int], None]]:
    """Yield a function that resizes the page. The old size comes back at the end."""

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
    """Run a script before the scripts of each page that is opened."""
    command = "Page.addScriptToEvaluateOnNewDocument"
    made = browser.execute_cdp_cmd(command, {"source": script})
    try:
        yield
    finally:
        browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", made)


def clipboard(browser: Chrome) -> str:
    """Return the text in the clipboard."""
    read = "const done = arguments[0]; navigator.clipboard.readText().then(done)"
    return str(browser.execute_async_script(read))
